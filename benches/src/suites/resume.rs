//! `resume`: how soon a guest runs again, and what it pays while its memory arrives.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use frazil_snapstore::pager::{PagerOptions, PagerStats};
use frazil_snapstore::{Snapshot, Store, StoreOptions};
use frazil_vmm::{CheckpointRequest, Loading};
use rustix::process::{Pid, Signal, kill_process};
use rustix::time::{ClockId, clock_gettime};
use serde_json::Value;
use tempfile::TempDir;

use super::{faults, floors};
use crate::bench::{Bench, size_label};
use crate::cleanup;
use crate::codec::{self, Cores};
use crate::content;
use crate::machine::{Machine, create_store};
use crate::metric::{MIB_S, Metric};
use crate::raw;
use crate::samples::Samples;

/// Text pages; once they are all written, two words a page, page after page, without a pause.
const SPEC: &str = "rate=max,pattern=seq,content=edit,report=0";
/// A `frazil` that was asked to end gets so long.
const END_PATIENCE: Duration = Duration::from_secs(5);
const MIB: f64 = (1 << 20) as f64;

/// A snapshot to resume.
struct Bed {
    frazil: PathBuf,
    folder: TempDir,
    snapshot: Snapshot,
    label: String,
    ram_bytes: u64,
}

type Measure = fn(&mut Bench, &Bed) -> anyhow::Result<()>;

const MEASUREMENTS: [(&str, Measure); 4] = [
    ("first progress", first_progress),
    ("single faults", |bench, bed| faults::single(bench, &bed.snapshot)),
    ("eager loading", eager),
    ("sweeps of all memory", sweeps),
];

pub(crate) fn run(bench: &mut Bench, frazil: Option<PathBuf>) -> anyhow::Result<()> {
    let frazil = find_frazil(frazil)?;
    for ram_bytes in bench.memory_sizes(2) {
        let label = size_label(ram_bytes);
        bench.say(&format!("{label}: taking the snapshot"));
        let bed = prepare(bench, frazil.clone(), ram_bytes, label)?;
        for (name, measure) in MEASUREMENTS {
            bench.say(&format!("{}: {name}", bed.label));
            measure(bench, &bed)?;
        }
    }
    bench.say("a working set");
    faults::working_set(bench)
}

fn find_frazil(given: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    let path = match given {
        Some(path) => path,
        None => std::env::current_exe()
            .context("cannot tell where this program is")?
            .with_file_name("frazil"),
    };
    ensure!(
        path.is_file(),
        "no `frazil` at {}: build it (cargo build --release --bin frazil) or give --frazil PATH",
        path.display()
    );
    Ok(path)
}

fn prepare(bench: &Bench, frazil: PathBuf, ram_bytes: u64, label: String) -> anyhow::Result<Bed> {
    let folder = bench.scratch()?;
    let path = folder.path().join("store");
    let machine = Machine::boot(SPEC, ram_bytes, Some(create_store(&path)?))?;
    machine.vm.pause()?;
    machine.vm.checkpoint(&CheckpointRequest::default()).context("the checkpoint failed")?;
    drop(machine);
    let store = Store::open(&path, StoreOptions::default())?;
    let latest = store.latest().context("the store has no snapshot")?;
    let snapshot = store.snapshot(latest.id)?;
    Ok(Bed { frazil, folder, snapshot, label, ram_bytes })
}

/// From before `frazil resume` is started until its guest has done something.
fn first_progress(bench: &mut Bench, bed: &Bed) -> anyhow::Result<()> {
    let floor = floors::create_empty_vms(bed.ram_bytes, bench.runs(30))?;
    let start = process_start(&bed.frazil, bench.runs(20))?;
    let (mut whole, mut inside) = (Samples::new(), Samples::new());
    // The first brings program and store into the page cache.
    resume_once(bed)?;
    for _ in 0..bench.runs(20) {
        let (total, own) = resume_once(bed)?;
        whole.add_time(total);
        inside.add_time(own);
    }
    let label = &bed.label;
    let name = format!("resume.first_progress_{label}");
    let n = whole.n();
    let floor_ms = floor.ms(0.5);
    bench.emit(Metric::new(format!("{name}_ms"), whole.ms(0.5), "ms", n).against(floor_ms))?;
    bench.emit(Metric::new(format!("{name}_p99_ms"), whole.ms(0.99), "ms", n).against(floor_ms))?;
    bench.emit(Metric::new(format!("{name}_from_main_ms"), inside.ms(0.5), "ms", n))?;
    bench.emit(Metric::new(format!("resume.create_vm_{label}_ms"), floor_ms, "ms", floor.n()))?;
    let start_name = format!("resume.process_{label}_ms");
    bench.emit(Metric::new(start_name, start.ms(0.5), "ms", start.n()))
}

/// Times of a `frazil` that only says its version: what starting and ending a process costs.
fn process_start(frazil: &Path, runs: usize) -> anyhow::Result<Samples> {
    let mut times = Samples::new();
    for _ in 0..runs {
        let output = times.time(|| Command::new(frazil).arg("--version").output());
        let output = output.with_context(|| format!("cannot run {}", frazil.display()))?;
        ensure!(output.status.success(), "{} --version failed", frazil.display());
    }
    Ok(times)
}

/// Runs `frazil resume` until first progress; the time from before it was started, and from its
/// own first instruction.
fn resume_once(bed: &Bed) -> anyhow::Result<(Duration, Duration)> {
    let mut reference = OsString::from(bed.folder.path().join("store"));
    reference.push("@latest");
    let errors = std::fs::File::create(bed.folder.path().join("stderr"))
        .context("cannot create a scratch file")?;
    let mut command = Command::new(&bed.frazil);
    command
        .arg("resume")
        .arg(reference)
        .args(["--json", "--serial", "null", "--no-fill"])
        .env("FRAZIL_RUNTIME_DIR", bed.folder.path().join("run"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors);
    let before_ns = monotonic_ns();
    let mut process = Process::start(&mut command)
        .with_context(|| format!("cannot run {}", bed.frazil.display()))?;
    let Some((ms, at_ns)) = process.first_progress()? else {
        let said = std::fs::read_to_string(bed.folder.path().join("stderr")).unwrap_or_default();
        bail!("frazil resume ended before its guest made progress; it said: {}", said.trim());
    };
    process.end()?;
    let whole = at_ns.checked_sub(before_ns).context("the clock went back")?;
    Ok((Duration::from_nanos(whole), Duration::from_secs_f64(ms / 1e3)))
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// A child that does not outlive this.
struct Process(Child);

impl Process {
    fn start(command: &mut Command) -> std::io::Result<Self> {
        let process = Self(command.spawn()?);
        cleanup::kill_at_exit(Some(process.pid()));
        Ok(process)
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.0)
    }

    /// Reads its events up to first progress: milliseconds by its own account, and the moment.
    fn first_progress(&mut self) -> anyhow::Result<Option<(f64, u64)>> {
        let stdout = self.0.stdout.take().context("the child has no standard output")?;
        for line in BufReader::new(stdout).lines() {
            let line = line.context("cannot read from frazil")?;
            let event: Value = serde_json::from_str(&line)
                .with_context(|| format!("frazil printed what is no JSON: {line}"))?;
            if event["event"] == "first_progress" {
                let ms = event["ms"].as_f64().context("first_progress has no `ms`")?;
                let at_ns = event["monotonic_ns"]
                    .as_u64()
                    .context("first_progress has no `monotonic_ns`")?;
                return Ok(Some((ms, at_ns)));
            }
        }
        Ok(None)
    }

    /// Asks it to end, so that it takes its control socket with it, and waits.
    fn end(&mut self) -> anyhow::Result<()> {
        // Gone already is as good.
        let _gone = kill_process(self.pid(), Signal::TERM);
        let asked = Instant::now();
        while asked.elapsed() < END_PATIENCE {
            if self.0.try_wait().context("cannot wait for frazil")?.is_some() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        bail!("frazil did not end within {} s of SIGTERM", END_PATIENCE.as_secs())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // After `end` neither does anything.
        let _gone = self.0.kill();
        let _waited = self.0.wait();
        cleanup::kill_at_exit(None);
    }
}

/// All memory before the guest runs, against decompression of it on all cores.
fn eager(bench: &mut Bench, bed: &Bed) -> anyhow::Result<()> {
    let mut times = Samples::new();
    let mut raw = Vec::new();
    for run in 0..=bench.runs(3) {
        let started = Instant::now();
        let machine = Machine::resume(&bed.snapshot, Loading::Eager)?;
        let took = started.elapsed();
        if run == 0 {
            // Warms the memory, which the next one gets from this one.
            raw = content::sample(machine.vm.ram(), bench.sized(128 << 20, 8 << 20))?;
        } else {
            times.add_time(took);
        }
    }
    let unzstd = codec::decompress_times(&codec::compress(&raw)?, Cores::All, bench.runs(5))?;
    let floor = unzstd.per_second(raw.len() as f64 / MIB);
    let mib_s = times.per_second(bed.ram_bytes as f64 / MIB);
    let name = format!("resume.eager_{}", bed.label);
    bench.emit(Metric::new(format!("{name}_ms"), times.ms(0.5), "ms", times.n()))?;
    bench.emit(Metric::new(format!("{name}_mib_s"), mib_s, MIB_S, times.n()).against(floor))
}

/// The guest writes to every page in order, from the moment it is let go.
fn sweeps(bench: &mut Bench, bed: &Bed) -> anyhow::Result<()> {
    let lazy = |background_fill| {
        Loading::lazy(PagerOptions { background_fill, ..PagerOptions::default() })
    };
    let runs = bench.runs(3);
    let (populated, _) = sweep(bed, &Loading::Eager, runs)?;
    let (filled, _) = sweep(bed, &lazy(true), runs)?;
    let (touched, stats) = sweep(bed, &lazy(false), runs)?;
    let label = &bed.label;
    let floor_ms = populated.ms(0.5);
    for (name, times) in [("sweep_seq", &filled), ("sweep_seq_no_fill", &touched)] {
        let name = format!("resume.{name}_{label}_ms");
        bench.emit(Metric::new(name, times.ms(0.5), "ms", times.n()).against(floor_ms))?;
    }
    let name = format!("resume.sweep_populated_{label}_ms");
    bench.emit(Metric::new(name, floor_ms, "ms", populated.n()))?;

    let stats = stats.context("a VM that was resumed lazily has no pager")?;
    let name = |what: &str| format!("resume.sweep_{label}_{what}");
    let mean_us = stats.fault_us_total as f64 / stats.faults.max(1) as f64;
    let pages_per_fault = stats.resident_pages() as f64 / stats.faults.max(1) as f64;
    bench.emit(Metric::new(name("faults"), stats.faults as f64, "faults", 1))?;
    bench.emit(Metric::new(name("pages_per_fault"), pages_per_fault, "pages", stats.faults))?;
    bench.emit(Metric::new(name("fault_mean_us"), mean_us, "us", stats.faults))?;
    bench.emit(Metric::new(name("fault_max_us"), stats.fault_us_max as f64, "us", stats.faults))
}

/// Times of `runs` sweeps, each of a VM of its own; what the last one's pager did.
fn sweep(
    bed: &Bed,
    loading: &Loading,
    runs: usize,
) -> anyhow::Result<(Samples, Option<PagerStats>)> {
    let mut times = Samples::new();
    let mut stats = None;
    for _ in 0..runs {
        let machine = Machine::resume(&bed.snapshot, loading.clone())?;
        if matches!(loading, Loading::Eager) {
            // Loading leaves the host's page tables empty; the reference is memory that is there.
            raw::populate(machine.vm.ram())?;
        }
        let from = machine.turns()?;
        let started = Instant::now();
        machine.vm.go()?;
        let (to, ended) = machine.wait_turns(from + machine.data_pages)?;
        // Seen late, by when the guest is a little further on.
        let share = machine.data_pages as f64 / (to - from) as f64;
        times.add_time((ended - started).mul_f64(share));
        stats = machine.vm.pager_stats();
    }
    Ok((times, stats))
}
