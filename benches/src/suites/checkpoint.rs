//! `checkpoint`: what a running guest, and its host, pay for a checkpoint.
//!
//! One guest a memory size. It writes 10,000 text pages a second at random, so that 100 ms apart
//! means 1,000 pages, and goes on doing so while a floor is measured: its vCPU takes a core from
//! the compressor and from zstd alike.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use frazil_snapstore::PAGE_SIZE;
use frazil_vmm::workload::ControlView;
use frazil_vmm::workload::control::GAP_RING_ENTRIES;
use frazil_vmm::{CheckpointReport, CheckpointRequest, Vm};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::floors;
use crate::bench::{Bench, size_label};
use crate::codec::{self, Cores};
use crate::content;
use crate::machine::{Machine, create_store};
use crate::metric::{MIB_S, Metric};
use crate::raw_guest::RawGuest;
use crate::samples::Samples;

const PAGES_PER_S: u64 = 10_000;
const INTERVAL: Duration = Duration::from_millis(100);
const SPEC: &str = "rate=10000,pattern=uniform,content=text,report=0,gap_us=50";
/// Gaps up to this are not recorded, as `SPEC` says; so it stands for them.
const GAP_FLOOR_US: u64 = 50;
/// Writes to random pages that change a tenth of them: -ln(1 - 0.1) of their number.
const TENTH_WRITES: f64 = 0.105_36;
/// Above this a guest takes a while to fill, so fewer full checkpoints must do.
const MUCH_RAM_BYTES: u64 = 2 << 30;
const MIB: f64 = (1 << 20) as f64;

/// A guest that is checkpointed.
struct Bed {
    machine: Machine,
    label: String,
    folder: TempDir,
    limits: Limits,
}

/// Floors of this guest, measured beside it.
#[derive(Default)]
struct Limits {
    /// min(zstd on all cores, disk), raw bytes.
    write_mib_s: f64,
    /// Stopping the vCPU and reading all state.
    stop_us: f64,
    /// Reading the dirty log when 1,000 pages are dirty.
    log_p1000_us: f64,
    /// Stopping the guest and copying its RAM.
    stop_and_copy_us: f64,
}

type Measure = fn(&mut Bench, &mut Bed) -> anyhow::Result<()>;

const MEASUREMENTS: [(&str, Measure); 4] = [
    ("floor of the pause", pause_floor),
    ("stop-and-copy", stop_and_copy),
    ("1,000 pages a checkpoint", thousand_pages),
    ("a tenth of the pages a checkpoint", tenth_of_pages),
];

pub(crate) fn run(bench: &mut Bench) -> anyhow::Result<()> {
    for ram_bytes in bench.memory_sizes(2) {
        let label = size_label(ram_bytes);
        bench.say(&format!("{label}: full checkpoints"));
        let mut bed = full(bench, ram_bytes, &label)?;
        for (name, measure) in MEASUREMENTS {
            bench.say(&format!("{label}: {name}"));
            measure(bench, &mut bed)?;
        }
    }
    Ok(())
}

/// The first checkpoint of a guest is a full one, so each takes a new guest; the last one stays.
fn full(bench: &mut Bench, ram_bytes: u64, label: &str) -> anyhow::Result<Bed> {
    let (mut pause, mut duration, mut stored) = (Samples::new(), Samples::new(), Samples::new());
    let mut left = bench.runs(if ram_bytes > MUCH_RAM_BYTES { 1 } else { 3 });
    let mut bed = loop {
        let folder = bench.scratch()?;
        let store = create_store(&folder.path().join("store"))?;
        let machine = Machine::boot(SPEC, ram_bytes, Some(store))?;
        let report = checkpoint(&machine.vm)?;
        pause.add_time(Duration::from_micros(report.stats.pause_us));
        duration.add_time(Duration::from_micros(report.duration_us));
        stored.add(report.stored_bytes);
        left -= 1;
        if left == 0 {
            let label = label.to_owned();
            break Bed { machine, label, folder, limits: Limits::default() };
        }
    };
    let zstd_mib_s = write_floor(bench, &mut bed)?;
    let name = |what: &str| format!("checkpoint.full_{label}_{what}");
    let mib_s = duration.per_second(ram_bytes as f64 / MIB);
    let n = duration.n();
    bench.emit(Metric::new(name("mib_s"), mib_s, MIB_S, n).against(bed.limits.write_mib_s))?;
    bench.emit(Metric::new(name("mib_s_vs_zstd"), mib_s, MIB_S, n).against(zstd_mib_s))?;
    bench.emit(Metric::new(name("duration_ms"), duration.ms(0.5), "ms", n))?;
    bench.emit(Metric::new(name("pause_us"), pause.us(0.5), "us", n))?;
    bench.emit(Metric::new(name("stored_bytes"), stored.median(), "bytes", n))?;
    Ok(bed)
}

/// How fast the guest's own pages could be written at best, while it runs: by zstd, and by the
/// disk after zstd. Returns the first.
fn write_floor(bench: &mut Bench, bed: &mut Bed) -> anyhow::Result<f64> {
    let raw = content::sample(bed.machine.vm.ram(), bench.sized(128 << 20, 8 << 20))?;
    let (zstd, stored_len) = codec::compress_times(&raw, Cores::All, bench.runs(5))?;
    let zstd_mib_s = zstd.per_second(raw.len() as f64 / MIB);
    let mut disk = Samples::new();
    for _ in 0..bench.runs(3) {
        disk.add_time(floors::sequential_write(bed.folder.path(), stored_len)?);
    }
    // What the disk does to compressed bytes, said of the bytes they stand for.
    let disk_mib_s = disk.per_second(raw.len() as f64 / MIB);
    bed.limits.write_mib_s = zstd_mib_s.min(disk_mib_s);
    Ok(zstd_mib_s)
}

/// Kick + state + harvest. The first is measured on the guest itself; the others need KVM's
/// handle, so on a bare machine of the same size with a guest that writes as much.
fn pause_floor(bench: &mut Bench, bed: &mut Bed) -> anyhow::Result<()> {
    let (stop, go) = floors::stop_and_go(&bed.machine, bench.runs(50))?;
    let name = |what: &str| format!("checkpoint.floor_{}_{what}", bed.label);
    bench.emit(Metric::new(name("kick_us"), stop.us(0.5), "us", stop.n()))?;
    bench.emit(Metric::new(name("go_on_us"), go.us(0.5), "us", go.n()))?;

    // Of each page only one write matters, so nothing is gained by filling them before.
    let spec = format!("{SPEC},populate=no");
    let mut bare = RawGuest::start(&spec, bed.machine.vm.ram().len_bytes(), |_ram| Ok(()))?;
    let p1000 = harvests(&bare, PAGES_PER_S / 10, bench.runs(20))?;
    let dirty10 = harvests(&bare, tenth(bare.data_pages()), bench.runs(3))?;
    bench.emit(Metric::new(name("dirty_log_p1000_us"), p1000.us(0.5), "us", p1000.n()))?;
    bench.emit(Metric::new(name("dirty_log_dirty10_us"), dirty10.us(0.5), "us", dirty10.n()))?;
    let vcpu = bare.stop()?;
    let (vcpu_state, vm_state) = floors::state_times(bare.vm(), &vcpu, bench.runs(50))?;
    let state_us = vcpu_state.us(0.5) + vm_state.us(0.5);
    bench.emit(Metric::new(name("state_us"), state_us, "us", vcpu_state.n()))?;

    bed.limits.stop_us = stop.us(0.5) + state_us;
    bed.limits.log_p1000_us = p1000.us(0.5);
    Ok(())
}

/// Times of reading the dirty log each time the guest has written `pages` more pages.
fn harvests(guest: &RawGuest, pages: u64, runs: usize) -> anyhow::Result<Samples> {
    let mut times = Samples::new();
    guest.dirty_log()?;
    for _ in 0..runs {
        guest.wait_turns(guest.turns()? + pages)?;
        times.add_time(guest.dirty_log()?.0);
    }
    Ok(times)
}

fn tenth(pages: u64) -> u64 {
    (pages as f64 * TENTH_WRITES) as u64
}

/// What a snapshot costs whoever has only a stopped guest and a copy of its RAM. The buffer is
/// small and used again and again, which is kind to the copy.
fn stop_and_copy(bench: &mut Bench, bed: &mut Bed) -> anyhow::Result<()> {
    let mut buffer = vec![1; 32 << 20];
    let mut times = Samples::new();
    let ram = Arc::clone(bed.machine.vm.ram());
    for _ in 0..bench.runs(3) {
        times.time(|| {
            bed.machine.vm.while_paused(|| -> anyhow::Result<()> {
                for (range, _) in ram.mapped_ranges() {
                    let mut done = 0;
                    while done < range.len_bytes {
                        let len = (range.len_bytes - done).min(buffer.len() as u64);
                        ram.memory()
                            .read_slice(&mut buffer[..len as usize], GuestAddress(range.gpa + done))
                            .context("cannot copy guest memory")?;
                        done += len;
                    }
                }
                Ok(())
            })
        })??;
    }
    bed.limits.stop_and_copy_us = times.us(0.5);
    let name = format!("checkpoint.stop_and_copy_{}_us", bed.label);
    bench.emit(Metric::new(name, times.us(0.5), "us", times.n()))
}

fn thousand_pages(bench: &mut Bench, bed: &mut Bed) -> anyhow::Result<()> {
    let floor_us = bed.limits.stop_us + bed.limits.log_p1000_us;
    let mut series = Series::new();
    // The first one catches up with what was written while floors were measured.
    checkpoint(&bed.machine.vm)?;
    let mut due = Instant::now() + INTERVAL;
    for _ in 0..bench.runs(50) {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        // From its start: what was late moves those after it, and none has less than 100 ms.
        due = Instant::now() + INTERVAL;
        series.take(&bed.machine)?;
    }
    series.emit(bench, &format!("checkpoint.p1000_{}", bed.label), floor_us)?;
    Ok(())
}

fn tenth_of_pages(bench: &mut Bench, bed: &mut Bed) -> anyhow::Result<()> {
    // Not a limit but the yardstick: what is copied before the pause is not read in it.
    let floor_us = bed.limits.stop_and_copy_us;
    let mut series = Series::new();
    checkpoint(&bed.machine.vm)?;
    for _ in 0..bench.runs(5) {
        bed.machine.wait_turns(bed.machine.turns()? + tenth(bed.machine.data_pages))?;
        series.take(&bed.machine)?;
    }
    let name = format!("checkpoint.dirty10_{}", bed.label);
    series.emit(bench, &name, floor_us)?;
    let mib_s = series.raw_bytes.median() / MIB / (series.duration.median() / 1e9);
    let metric = Metric::new(format!("{name}_mib_s"), mib_s, MIB_S, series.duration.n());
    bench.emit(metric.against(bed.limits.write_mib_s))
}

fn checkpoint(vm: &Vm) -> anyhow::Result<CheckpointReport> {
    vm.checkpoint(&CheckpointRequest::default()).context("the checkpoint failed")
}

/// Incremental checkpoints of one kind.
struct Series {
    pause: Samples,
    duration: Samples,
    gap: Samples,
    dirty_pages: Samples,
    stored_bytes: Samples,
    raw_bytes: Samples,
    /// Checkpoints during which the guest saw more gaps than its ring holds.
    gaps_lost: u64,
}

impl Series {
    fn new() -> Self {
        let none = Samples::new();
        Self {
            pause: none.clone(),
            duration: none.clone(),
            gap: none.clone(),
            dirty_pages: none.clone(),
            stored_bytes: none.clone(),
            raw_bytes: none,
            gaps_lost: 0,
        }
    }

    fn take(&mut self, machine: &Machine) -> anyhow::Result<()> {
        let before = machine.view()?;
        let report = checkpoint(&machine.vm)?;
        let after = machine.view()?;
        let stats = &report.stats;
        self.pause.add_time(Duration::from_micros(stats.pause_us));
        self.duration.add_time(Duration::from_micros(report.duration_us));
        self.dirty_pages.add(stats.dirty_pages);
        self.stored_bytes.add(report.stored_bytes);
        self.raw_bytes.add((stats.precopied_pages + stats.cut_pages) * PAGE_SIZE as u64);
        self.gap.add_time(Duration::from_micros(largest_gap_us(&before, &after)?));
        if gaps(&after) - gaps(&before) > GAP_RING_ENTRIES {
            self.gaps_lost += 1;
        }
        Ok(())
    }

    fn emit(&self, bench: &mut Bench, name: &str, floor_us: f64) -> anyhow::Result<()> {
        let n = self.pause.n();
        for (what, times) in [("pause", &self.pause), ("gap", &self.gap)] {
            for (suffix, quantile) in [("p50", 0.5), ("p99", 0.99), ("max", 1.0)] {
                let metric = format!("{name}_{what}_{suffix}_us");
                let metric = Metric::new(metric, times.us(quantile), "us", n);
                // The guest's own view of the pause has the pause for its floor.
                let floor = if what == "pause" { floor_us } else { self.pause.us(quantile) };
                bench.emit(metric.against(floor))?;
            }
        }
        let duration_ms = self.duration.ms(0.5);
        bench.emit(Metric::new(format!("{name}_duration_ms"), duration_ms, "ms", n))?;
        let dirty = self.dirty_pages.median();
        bench.emit(Metric::new(format!("{name}_dirty_pages"), dirty, "pages", n))?;
        let stored = self.stored_bytes.median();
        bench.emit(Metric::new(format!("{name}_stored_bytes"), stored, "bytes", n))?;
        if self.gaps_lost > 0 {
            bench.say(&format!(
                "{name}: in {} of {n} checkpoints the guest saw more gaps than it could keep; \
                 the longest may be among those it forgot",
                self.gaps_lost
            ));
        }
        Ok(())
    }
}

fn gaps(view: &ControlView) -> u64 {
    view.vcpus[0].control.gap_count
}

/// The longest time the guest could not look at its clock between two looks at it from outside.
/// All on the guest's own clock, so that its offset from the host's does not matter.
fn largest_gap_us(before: &ControlView, after: &ControlView) -> anyhow::Result<u64> {
    let (before, vcpu) = (&before.vcpus[0].control, &after.vcpus[0]);
    ensure!(vcpu.control.last_tsc > before.last_tsc, "the guest's clock stands still");
    // A new longest gap is known even if the ring has forgotten it since.
    let record = vcpu.control.gap_max_tsc;
    let record = (record > before.gap_max_tsc).then_some(record);
    let kept = vcpu.gaps.iter().filter(|gap| gap.tsc > before.last_tsc).map(|gap| gap.gap_tsc);
    Ok(kept.chain(record).max().map_or(GAP_FLOOR_US, |tsc| after.tsc_to_us(tsc)))
}
