//! `checkpoint`: how fast checkpoints of a running guest are written, and how large they are.
//!
//! One guest for each memory size. It writes 10,000 text pages a second at random, so that
//! checkpoints 100 ms apart have 1,000 pages each, and goes on while a floor is measured: its vCPU
//! takes a core from the compressor and from bare zstd alike. The costs to the guest are measured
//! by `pause`.

use std::time::Duration;

use tempfile::TempDir;

use super::floors;
use crate::bench::{Bench, size_label};
use crate::codec::{self, Cores};
use crate::content;
use crate::machine::{Machine, create_store};
use crate::metric::{MIB_S, Metric};
use crate::samples::Samples;
use crate::series::{Beat, Series, checkpoint};

const INTERVAL: Duration = Duration::from_millis(100);
const SPEC: &str = "rate=10000,pattern=uniform,content=text,report=0,gap_us=50";
/// Writes per page that change a tenth of all pages, if they are random: -ln(1 - 0.1).
pub(super) const TENTH_WRITES: f64 = 0.105_36;
/// Above this size a guest takes a while to fill its memory, so there are fewer full checkpoints.
const MUCH_RAM_BYTES: u64 = 2 << 30;
const MIB: f64 = (1 << 20) as f64;

/// A guest to take checkpoints of.
struct Bed {
    machine: Machine,
    label: String,
    folder: TempDir,
    /// The limit beside this guest, in raw bytes: the slower of zstd on all cores and the disk.
    floor_mib_s: f64,
}

type Measure = fn(&mut Bench, &mut Bed) -> anyhow::Result<()>;

const MEASUREMENTS: [(&str, Measure); 2] = [
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

/// Measures full checkpoints. Only a guest's first one is full, so each takes a new guest; returns
/// the last.
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
            break Bed { machine, label: label.to_owned(), folder, floor_mib_s: 0.0 };
        }
    };
    let zstd_mib_s = write_floor(bench, &mut bed)?;
    let name = |what: &str| format!("checkpoint.full_{label}_{what}");
    let mib_s = duration.per_second(ram_bytes as f64 / MIB);
    let n = duration.n();
    bench.emit(Metric::new(name("mib_s"), mib_s, MIB_S, n).against(bed.floor_mib_s))?;
    bench.emit(Metric::new(name("mib_s_vs_zstd"), mib_s, MIB_S, n).against(zstd_mib_s))?;
    bench.emit(Metric::new(name("duration_ms"), duration.ms(0.5), "ms", n))?;
    bench.emit(Metric::new(name("pause_us"), pause.us(0.5), "us", n))?;
    bench.emit(Metric::new(name("stored_bytes"), stored.median(), "bytes", n))?;
    Ok(bed)
}

/// Measures how fast the guest's own pages could be written at best while it runs: by zstd, and by
/// the disk after zstd. Returns the speed of zstd.
fn write_floor(bench: &mut Bench, bed: &mut Bed) -> anyhow::Result<f64> {
    let raw = content::sample(bed.machine.vm.ram(), bench.sized(128 << 20, 8 << 20))?;
    let (zstd, stored_len) = codec::compress_times(&raw, Cores::All, bench.runs(5))?;
    let zstd_mib_s = zstd.per_second(raw.len() as f64 / MIB);
    let mut disk = Samples::new();
    for _ in 0..bench.runs(3) {
        disk.add_time(floors::sequential_write(bed.folder.path(), stored_len)?);
    }
    // The disk writes compressed bytes; its speed is stated in the raw bytes they stand for.
    let disk_mib_s = disk.per_second(raw.len() as f64 / MIB);
    bed.floor_mib_s = zstd_mib_s.min(disk_mib_s);
    Ok(zstd_mib_s)
}

fn thousand_pages(bench: &mut Bench, bed: &mut Bed) -> anyhow::Result<()> {
    let mut series = Series::new();
    // This one catches up with what was written while floors were measured.
    checkpoint(&bed.machine.vm)?;
    let mut beat = Beat::new(INTERVAL);
    for _ in 0..bench.runs(30) {
        beat.wait();
        series.take(&bed.machine)?;
    }
    series.emit_writes(bench, &format!("checkpoint.p1000_{}", bed.label))
}

fn tenth_of_pages(bench: &mut Bench, bed: &mut Bed) -> anyhow::Result<()> {
    let mut series = Series::new();
    checkpoint(&bed.machine.vm)?;
    let writes = (bed.machine.data_pages as f64 * TENTH_WRITES) as u64;
    for _ in 0..bench.runs(5) {
        bed.machine.wait_turns(bed.machine.turns()? + writes)?;
        series.take(&bed.machine)?;
    }
    let name = format!("checkpoint.dirty10_{}", bed.label);
    series.emit_writes(bench, &name)?;
    let mib_s = series.changed_bytes_per_s() / MIB;
    let metric = Metric::new(format!("{name}_mib_s"), mib_s, MIB_S, series.duration.n());
    bench.emit(metric.against(bed.floor_mib_s))
}
