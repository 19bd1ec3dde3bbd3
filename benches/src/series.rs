//! A series of checkpoints of a running guest, and what host and guest saw of each.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use frazil_snapstore::PAGE_SIZE;
use frazil_vmm::workload::control::GAP_RING_ENTRIES;
use frazil_vmm::workload::{ControlView, VcpuView};
use frazil_vmm::{CheckpointReport, CheckpointRequest, Vm};

use crate::bench::Bench;
use crate::machine::Machine;
use crate::metric::Metric;
use crate::report::Picture;
use crate::samples::Samples;

/// A guest whose `gap_us` is this does not record gaps up to this length, so this stands for them.
const GAP_FLOOR_US: u64 = 50;
/// How long a vCPU may be without a core.
const RUNS_AGAIN_TIMEOUT: Duration = Duration::from_secs(20);
/// The quantiles printed of a pause, as seen by host and guest.
const QUANTILES: [(&str, f64); 4] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)];

/// Takes a checkpoint.
pub(crate) fn checkpoint(vm: &Vm) -> anyhow::Result<CheckpointReport> {
    vm.checkpoint(&CheckpointRequest::default()).context("the checkpoint failed")
}

/// Paces work so that starts are at least an interval apart.
#[derive(Debug)]
pub(crate) struct Beat {
    interval: Duration,
    due: Instant,
}

impl Beat {
    /// The first start is an interval from now.
    pub(crate) fn new(interval: Duration) -> Self {
        Self { interval, due: Instant::now() + interval }
    }

    /// Waits until an interval after the last start, however late that one was.
    pub(crate) fn wait(&mut self) {
        std::thread::sleep(self.due.saturating_duration_since(Instant::now()));
        self.due = Instant::now() + self.interval;
    }
}

/// Figures of checkpoints of one kind.
#[derive(Debug)]
pub(crate) struct Series {
    /// From the first kick until every vCPU runs again.
    pub pause: Samples,
    /// From the request until the checkpoint is published.
    pub duration: Samples,
    /// The longest time for which a vCPU could not look at its clock.
    gap: Samples,
    quiesce: Samples,
    cut: Samples,
    go_on: Samples,
    dirty_pages: Samples,
    cut_pages: Samples,
    stored_bytes: Samples,
    /// Checkpoints in which a vCPU saw more gaps than its ring holds.
    gaps_lost: u64,
}

impl Series {
    pub(crate) fn new() -> Self {
        let none = Samples::new();
        Self {
            pause: none.clone(),
            duration: none.clone(),
            gap: none.clone(),
            quiesce: none.clone(),
            cut: none.clone(),
            go_on: none.clone(),
            dirty_pages: none.clone(),
            cut_pages: none.clone(),
            stored_bytes: none,
            gaps_lost: 0,
        }
    }

    /// Takes a checkpoint of a running guest.
    pub(crate) fn take(&mut self, machine: &Machine) -> anyhow::Result<CheckpointReport> {
        let before = machine.view()?;
        let report = checkpoint(&machine.vm)?;
        let after = view_once_running(|| machine.view(), &before)?;
        self.add(&report);
        self.gap.add_time(Duration::from_micros(largest_gap_us(&before, &after)));
        let overrun = |(before, after): (&VcpuView, &VcpuView)| {
            after.control.gap_count - before.control.gap_count > GAP_RING_ENTRIES
        };
        if before.vcpus.iter().zip(&after.vcpus).any(overrun) {
            self.gaps_lost += 1;
        }
        Ok(report)
    }

    /// Adds a checkpoint of a paused guest, which feels no gap.
    pub(crate) fn add(&mut self, report: &CheckpointReport) {
        let stats = &report.stats;
        for (samples, us) in [
            (&mut self.pause, stats.pause_us),
            (&mut self.quiesce, stats.quiesce_us),
            (&mut self.cut, stats.cut_us),
            (&mut self.go_on, stats.go_on_us),
            (&mut self.duration, report.duration_us),
        ] {
            samples.add_time(Duration::from_micros(us));
        }
        self.dirty_pages.add(stats.dirty_pages);
        self.cut_pages.add(stats.cut_pages);
        self.stored_bytes.add(report.stored_bytes);
    }

    /// Bytes of distinct changed pages per second, in the median checkpoint.
    pub(crate) fn changed_bytes_per_s(&self) -> f64 {
        self.duration.per_second(self.dirty_pages.median() * PAGE_SIZE as f64)
    }

    /// Prints pauses as `NAME_p50_us` and so on, what the guest felt as `NAME_gap_p50_us` and so
    /// on, and the parts of the pause.
    pub(crate) fn emit_pauses(
        &self,
        bench: &mut Bench,
        name: &str,
        floor_us: Option<f64>,
    ) -> anyhow::Result<()> {
        let n = self.pause.n();
        if !name.contains("scale") {
            bench.draw(Picture::Pauses, name.trim_start_matches("pause."), &self.pause);
        }
        for (suffix, quantile) in QUANTILES {
            let pause_us = self.pause.us(quantile);
            let pause = Metric::new(format!("{name}_{suffix}_us"), pause_us, "us", n);
            bench.emit(match floor_us {
                Some(floor_us) => pause.against(floor_us),
                None => pause,
            })?;
        }
        for (suffix, quantile) in QUANTILES {
            // The pause is the floor of what the guest feels.
            let gap_us = self.gap.us(quantile);
            let gap = Metric::new(format!("{name}_gap_{suffix}_us"), gap_us, "us", n);
            bench.emit(gap.against(self.pause.us(quantile)))?;
        }
        for (part, times) in
            [("quiesce", &self.quiesce), ("cut", &self.cut), ("go_on", &self.go_on)]
        {
            bench.emit(Metric::new(format!("{name}_{part}_us"), times.us(0.5), "us", n))?;
        }
        let cut_pages = self.cut_pages.median();
        bench.emit(Metric::new(format!("{name}_cut_pages"), cut_pages, "pages", n))?;
        self.say_gaps_lost(bench, name);
        Ok(())
    }

    /// Prints the medians of the pause, of what the guest felt, and of the time until it was
    /// published, as `NAME_pause_us`, `NAME_gap_us` and `NAME_duration_us`.
    pub(crate) fn emit_step(
        &self,
        bench: &mut Bench,
        name: &str,
        stop_and_copy_us: f64,
    ) -> anyhow::Result<()> {
        for (what, times) in
            [("pause", &self.pause), ("gap", &self.gap), ("duration", &self.duration)]
        {
            let metric = Metric::new(format!("{name}_{what}_us"), times.us(0.5), "us", times.n());
            bench.emit(metric.against(stop_and_copy_us))?;
        }
        Ok(())
    }

    /// Prints how long checkpoints took until they were published, and what they wrote.
    pub(crate) fn emit_writes(&self, bench: &mut Bench, name: &str) -> anyhow::Result<()> {
        let n = self.duration.n();
        let duration_ms = self.duration.ms(0.5);
        bench.emit(Metric::new(format!("{name}_duration_ms"), duration_ms, "ms", n))?;
        let dirty = self.dirty_pages.median();
        bench.emit(Metric::new(format!("{name}_dirty_pages"), dirty, "pages", n))?;
        let stored = self.stored_bytes.median();
        bench.emit(Metric::new(format!("{name}_stored_bytes"), stored, "bytes", n))
    }

    fn say_gaps_lost(&self, bench: &Bench, name: &str) {
        if self.gaps_lost > 0 {
            bench.say(&format!(
                "{name}: in {} of {} checkpoints the guest saw more gaps than it could record; the \
                 longest may be missing",
                self.gaps_lost,
                self.pause.n()
            ));
        }
    }
}

/// Views the guest's counters once every vCPU has run since `before`: on a busy host one may have
/// had no core during a whole checkpoint, and then the gap it feels is not over yet.
pub(crate) fn view_once_running(
    mut view: impl FnMut() -> anyhow::Result<ControlView>,
    before: &ControlView,
) -> anyhow::Result<ControlView> {
    let deadline = Instant::now() + RUNS_AGAIN_TIMEOUT;
    loop {
        let after = view()?;
        let runs = |(before, after): (&VcpuView, &VcpuView)| {
            after.control.last_tsc > before.control.last_tsc
        };
        if before.vcpus.iter().zip(&after.vcpus).all(runs) {
            return Ok(after);
        }
        ensure!(
            Instant::now() < deadline,
            "the guest's clock has not moved {} s after a checkpoint",
            RUNS_AGAIN_TIMEOUT.as_secs()
        );
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// The longest time for which a vCPU could not look at its clock between the two views. It is
/// measured by the guest's own clock, so that its offset from the host's does not matter.
pub(crate) fn largest_gap_us(before: &ControlView, after: &ControlView) -> u64 {
    let mut largest = GAP_FLOOR_US;
    for (before, vcpu) in before.vcpus.iter().zip(&after.vcpus) {
        let before = &before.control;
        // A new longest gap is known even if it is no longer in the ring.
        let record = vcpu.control.gap_max_tsc;
        let record = (record > before.gap_max_tsc).then_some(record);
        let kept = vcpu.gaps.iter().filter(|gap| gap.tsc > before.last_tsc).map(|gap| gap.gap_tsc);
        let longest = kept.chain(record).max().map_or(0, |tsc| after.tsc_to_us(tsc));
        largest = largest.max(longest);
    }
    largest
}
