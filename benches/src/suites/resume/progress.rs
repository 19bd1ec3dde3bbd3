//! From the start of `frazil resume` to its guest's first progress.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use rustix::time::{ClockId, clock_gettime};
use serde_json::Value;

use super::Bed;
use crate::bench::Bench;
use crate::cleanup;
use crate::metric::Metric;
use crate::samples::Samples;
use crate::suites::floors;

/// How long `frazil` may take to end.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// Measures the time from before `frazil resume` is started until its guest makes progress.
pub(super) fn first_progress(bench: &mut Bench, bed: &Bed) -> anyhow::Result<()> {
    let floor = floors::create_empty_vms(bed.ram_bytes, bench.runs(30))?;
    let start = process_start(&bed.frazil, bench.runs(20))?;
    let (mut whole, mut inside) = (Samples::new(), Samples::new());
    // The first run brings the program and the store into the page cache.
    resume_once(&bed.frazil, bed.folder.path())?;
    for _ in 0..bench.runs(20) {
        let (total, own) = resume_once(&bed.frazil, bed.folder.path())?;
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

/// Times of `frazil --version`: the cost of starting and ending a process.
fn process_start(frazil: &Path, runs: usize) -> anyhow::Result<Samples> {
    let mut times = Samples::new();
    for _ in 0..runs {
        let output = times.time(|| Command::new(frazil).arg("--version").output());
        let output = output.with_context(|| format!("cannot run {}", frazil.display()))?;
        ensure!(output.status.success(), "{} --version failed", frazil.display());
    }
    Ok(times)
}

/// Runs `frazil resume` of the latest snapshot in the store in `folder` until first progress.
/// Returns the time from before the process was started, and the time from the start of its `main`.
pub(crate) fn resume_once(frazil: &Path, folder: &Path) -> anyhow::Result<(Duration, Duration)> {
    let mut reference = OsString::from(folder.join("store"));
    reference.push("@latest");
    let errors =
        std::fs::File::create(folder.join("stderr")).context("cannot create a scratch file")?;
    let mut command = Command::new(frazil);
    command
        .arg("resume")
        .arg(reference)
        .args(["--json", "--serial", "null", "--no-fill"])
        .env("FRAZIL_RUNTIME_DIR", folder.join("run"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors);
    let before_ns = monotonic_ns();
    let mut process =
        Process::start(&mut command).with_context(|| format!("cannot run {}", frazil.display()))?;
    let Some((ms, at_ns)) = process.first_progress()? else {
        let said = std::fs::read_to_string(folder.join("stderr")).unwrap_or_default();
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

/// A child process that is killed when this is dropped.
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

    /// Reads events until first progress. Returns the milliseconds since its start as `frazil`
    /// reports them, and the time on the monotonic clock.
    fn first_progress(&mut self) -> anyhow::Result<Option<(f64, u64)>> {
        let stdout = self.0.stdout.take().context("the child has no standard output")?;
        for line in BufReader::new(stdout).lines() {
            let line = line.context("cannot read from frazil")?;
            let event: Value = serde_json::from_str(&line)
                .with_context(|| format!("expected JSON from frazil, found {line}"))?;
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

    /// Asks the process to end, so that it removes its control socket, and waits for it.
    fn end(&mut self) -> anyhow::Result<()> {
        // It may have ended already.
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
        // After `end` neither has any effect.
        let _gone = self.0.kill();
        let _waited = self.0.wait();
        cleanup::kill_at_exit(None);
    }
}
