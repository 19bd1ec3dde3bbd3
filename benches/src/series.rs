//! Checkpoints of a running guest, one after the other, and what host and guest saw of each.

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

/// Gaps up to this are not recorded by a guest whose `gap_us` is this; so it stands for them.
const GAP_FLOOR_US: u64 = 50;
/// So long a vCPU may be without a core.
const RUNS_AGAIN_TIMEOUT: Duration = Duration::from_secs(20);
/// What is said of a pause, host-side and guest-felt.
const QUANTILES: [(&str, f64); 4] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)];

/// Takes a checkpoint.
pub(crate) fn checkpoint(vm: &Vm) -> anyhow::Result<CheckpointReport> {
    vm.checkpoint(&CheckpointRequest::default()).context("the checkpoint failed")
}

/// Starts no closer than an interval apart.
#[derive(Debug)]
pub(crate) struct Beat {
    interval: Duration,
    due: Instant,
}

impl Beat {
    /// The first one is an interval from now.
    pub(crate) fn new(interval: Duration) -> Self {
        Self { interval, due: Instant::now() + interval }
    }

    /// Waits for the next one. From its start: what was late moves those after it, and none has
    /// less than an interval.
    pub(crate) fn wait(&mut self) {
        std::thread::sleep(self.due.saturating_duration_since(Instant::now()));
        self.due = Instant::now() + self.interval;
    }
}

/// Checkpoints of one kind.
#[derive(Debug)]
pub(crate) struct Series {
    /// From the first kick until every vCPU was on its way again.
    pub pause: Samples,
    /// From the request to the publication.
    pub duration: Samples,
    /// The longest time a vCPU could not look at its clock.
    gap: Samples,
    quiesce: Samples,
    cut: Samples,
    go_on: Samples,
    dirty_pages: Samples,
    cut_pages: Samples,
    stored_bytes: Samples,
    /// Checkpoints during which a vCPU saw more gaps than its ring holds.
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

    /// Takes a checkpoint of a guest that runs.
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

    /// Adds a checkpoint of which the guest noticed nothing.
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

    /// Bytes of distinct pages that changed, a second, in the middle checkpoint.
    pub(crate) fn changed_bytes_per_s(&self) -> f64 {
        self.duration.per_second(self.dirty_pages.median() * PAGE_SIZE as f64)
    }

    /// Prints the pauses as `NAME_p50_us` and so on, as `NAME_gap_p50_us` what the guest felt, and
    /// what the pause is made of.
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
            // The guest's own view of the pause has the pause for its floor.
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

    /// Prints the median of the pause, of what the guest felt, and of the time until the publication, as
    /// `NAME_pause_us`, `NAME_gap_us` and `NAME_duration_us`.
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

    /// Prints how long checkpoints took from request to publication, and what they wrote.
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
                "{name}: in {} of {} checkpoints the guest saw more gaps than it could keep; \
                 the longest may be among those it forgot",
                self.gaps_lost,
                self.pause.n()
            ));
        }
    }
}

/// Looks at the guest when every vCPU has been running since `before`: on a busy host one may have had
/// no core during a whole checkpoint, and then the gap it feels is not over yet.
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
            "the guest's clock stands still, {} s after a checkpoint",
            RUNS_AGAIN_TIMEOUT.as_secs()
        );
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// The longest time a vCPU could not look at its clock between two looks at it from outside. All
/// on the guest's own clock, so that its offset from the host's does not matter.
pub(crate) fn largest_gap_us(before: &ControlView, after: &ControlView) -> u64 {
    let mut largest = GAP_FLOOR_US;
    for (before, vcpu) in before.vcpus.iter().zip(&after.vcpus) {
        let before = &before.control;
        // A new longest gap is known even if the ring has forgotten it since.
        let record = vcpu.control.gap_max_tsc;
        let record = (record > before.gap_max_tsc).then_some(record);
        let kept = vcpu.gaps.iter().filter(|gap| gap.tsc > before.last_tsc).map(|gap| gap.gap_tsc);
        let longest = kept.chain(record).max().map_or(0, |tsc| after.tsc_to_us(tsc));
        largest = largest.max(longest);
    }
    largest
}
