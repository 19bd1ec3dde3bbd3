//! Statistics of a VM's checkpoints: distributions, sums, and the last report.
//!
//! A checkpoint is recorded after it is published, when the guest has long been running again:
//! nothing here is part of a pause. The pauses of checkpoints that fail after the cut are recorded
//! too, since they stopped the guest all the same.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{CheckpointReport, CheckpointStats, CheckpointTotals};
use crate::scheduler::Beat;
use crate::vm::Vm;

/// Significant digits that distributions keep.
const DIGITS: u8 = 3;

/// Upper bounds of the buckets for pauses and their parts, in microseconds: 10 µs to 1 s.
const PAUSE_BOUNDS_US: [u64; 16] = [
    10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000,
    500_000, 1_000_000,
];

/// Upper bounds of the buckets for durations of checkpoints, in microseconds: 1 ms to 100 s.
const DURATION_BOUNDS_US: [u64; 16] = [
    1_000,
    2_000,
    5_000,
    10_000,
    20_000,
    50_000,
    100_000,
    200_000,
    500_000,
    1_000_000,
    2_000_000,
    5_000_000,
    10_000_000,
    20_000_000,
    50_000_000,
    100_000_000,
];

/// Upper bounds of the buckets for dirty pages: from 1 page to 16 GiB of pages.
const PAGE_BOUNDS: [u64; 12] =
    [1, 4, 16, 64, 256, 1_024, 4_096, 16_384, 65_536, 262_144, 1_048_576, 4_194_304];

/// A bucket of a distribution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    /// The largest value in this bucket, in the distribution's unit. None for the last bucket,
    /// which has no upper bound.
    pub le: Option<u64>,
    /// Number of values in this bucket and in none before it.
    pub count: u64,
}

/// The distribution of values. Percentiles and bounds of buckets are exact to one in a thousand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Distribution {
    /// Number of values.
    pub count: u64,
    /// Sum of the values.
    pub sum: u64,
    /// The smallest value; 0 if there is none.
    pub min: u64,
    /// The median.
    pub p50: u64,
    /// The 90th percentile.
    pub p90: u64,
    /// The 99th percentile.
    pub p99: u64,
    /// The largest value.
    pub max: u64,
    /// Buckets, in ascending order.
    pub buckets: Vec<Bucket>,
}

/// Sums over the published checkpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointSums {
    /// Distinct pages that changed from one checkpoint to the next.
    pub dirty_pages: u64,
    /// Pages written before the cut, some of them more than once.
    pub precopied_pages: u64,
    /// Pages copied aside before the cut, some of them more than once.
    pub staged_pages: u64,
    /// Pages copied in the pause.
    pub cut_pages: u64,
    /// Pages left in place, copy-on-write, until they were written to the store.
    pub protected_pages: u64,
    /// Of these, pages copied because the guest was about to change them.
    pub cow_pages: u64,
    /// Times that a vCPU waited until such a page was written to the store.
    pub cow_waits: u64,
    /// The longest such wait, in microseconds: a maximum, not a sum.
    pub cow_wait_us_max: u64,
    /// Pages written after the cut.
    pub commit_pages: u64,
    /// Pages that were all zeros.
    pub zero_pages: u64,
    /// Pages whose contents were unchanged.
    pub equal_pages: u64,
    /// Pages that were in the store already.
    pub dedup_pages: u64,
    /// Pages written as differences.
    pub delta_pages: u64,
    /// Bytes of compressed pages.
    pub frame_bytes: u64,
    /// Bytes of tree nodes, state and manifests.
    pub meta_bytes: u64,
}

/// The answer to `GET /checkpoints/statistics`: figures of the published checkpoints of a VM since
/// it was booted or resumed. Pauses and their parts also count checkpoints that failed or were
/// cancelled after they had paused the guest; they do not count checkpoints taken while the user
/// had it paused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointStatistics {
    /// Counts, also of checkpoints that failed or were skipped.
    pub totals: CheckpointTotals,
    /// Sums.
    pub sums: CheckpointSums,
    /// How long the guest was paused, in microseconds.
    pub pause_us: Distribution,
    /// Of which: until every vCPU had stopped, in microseconds.
    pub quiesce_us: Distribution,
    /// Of which: last harvest, copying, device state; in microseconds.
    pub cut_us: Distribution,
    /// From the request to the publication, in microseconds.
    pub duration_us: Distribution,
    /// Distinct pages that changed since the checkpoint before.
    pub dirty_pages: Distribution,
    /// Distinct pages that changed per second between the last two cuts, or, after only one
    /// checkpoint, since the VM was built. None before the first.
    pub dirty_pages_per_s: Option<f64>,
    /// The last checkpoint.
    pub last: Option<CheckpointReport>,
}

/// How long a checkpoint paused the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pause {
    /// The whole pause, in microseconds.
    pub us: u64,
    /// Of which: until every vCPU had stopped.
    pub quiesce_us: u64,
    /// Of which: last harvest, copying, device state.
    pub cut_us: u64,
}

impl Pause {
    /// The pause of a checkpoint that has made its cut, or failed to.
    pub(crate) fn of(stats: &CheckpointStats) -> Self {
        Self { us: stats.pause_us, quiesce_us: stats.quiesce_us, cut_us: stats.cut_us }
    }
}

/// Values of one kind: their histogram and, since that rounds, their sum.
#[derive(Debug)]
struct Values {
    histogram: Histogram<u64>,
    sum: u64,
}

impl Values {
    fn new() -> Self {
        let histogram = Histogram::new(DIGITS).expect("a number of digits that it knows");
        Self { histogram, sum: 0 }
    }

    fn record(&mut self, value: u64) {
        // The histogram resizes itself and takes any 64-bit value.
        if self.histogram.record(value).is_ok() {
            self.sum = self.sum.saturating_add(value);
        }
    }

    fn distribution(&self, bounds: &[u64]) -> Distribution {
        let all = &self.histogram;
        let mut before = 0;
        let mut buckets: Vec<Bucket> = bounds
            .iter()
            .map(|le| {
                let up_to = all.count_between(0, *le);
                let count = up_to - before;
                before = up_to;
                Bucket { le: Some(*le), count }
            })
            .collect();
        buckets.push(Bucket { le: None, count: all.len() - before });
        Distribution {
            count: all.len(),
            sum: self.sum,
            min: all.min(),
            p50: all.value_at_quantile(0.5),
            p90: all.value_at_quantile(0.9),
            p99: all.value_at_quantile(0.99),
            max: all.max(),
            buckets,
        }
    }
}

#[derive(Debug)]
struct Recorded {
    pause_us: Values,
    quiesce_us: Values,
    cut_us: Values,
    duration_us: Values,
    dirty_pages: Values,
    sums: CheckpointSums,
    dirty_pages_per_s: Option<f64>,
    /// When the last checkpoint was cut; before the first, when the VM was built.
    cut_at: Instant,
    last: Option<CheckpointReport>,
}

/// What a VM remembers of its checkpoints.
#[derive(Debug)]
pub(crate) struct Telemetry {
    recorded: Mutex<Recorded>,
    /// The scheduler's beat, while a checkpoint that was due waits or is being taken.
    beat: Mutex<Option<Beat>>,
}

impl Default for Telemetry {
    fn default() -> Self {
        let recorded = Mutex::new(Recorded {
            pause_us: Values::new(),
            quiesce_us: Values::new(),
            cut_us: Values::new(),
            duration_us: Values::new(),
            dirty_pages: Values::new(),
            sums: CheckpointSums::default(),
            dirty_pages_per_s: None,
            cut_at: Instant::now(),
            last: None,
        });
        Self { recorded, beat: Mutex::default() }
    }
}

impl Telemetry {
    /// Records a checkpoint that was just published.
    pub(crate) fn record(&self, report: &CheckpointReport) {
        // The cut came just before the commit. Not taken from the report's time of day, since the
        // clock may have been set back.
        let now = Instant::now();
        let cut_at = now.checked_sub(Duration::from_micros(report.commit_us)).unwrap_or(now);
        self.recorded().record(report, cut_at);
    }

    /// Records a pause, whether or not its checkpoint succeeded.
    pub(crate) fn record_pause(&self, pause: Pause) {
        let mut recorded = self.recorded();
        recorded.pause_us.record(pause.us);
        recorded.quiesce_us.record(pause.quiesce_us);
        recorded.cut_us.record(pause.cut_us);
    }

    fn recorded(&self) -> MutexGuard<'_, Recorded> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn beat(&self) -> MutexGuard<'_, Option<Beat>> {
        self.beat.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn statistics(&self, totals: CheckpointTotals) -> CheckpointStatistics {
        let recorded = self.recorded();
        CheckpointStatistics {
            totals,
            sums: recorded.sums,
            pause_us: recorded.pause_us.distribution(&PAUSE_BOUNDS_US),
            quiesce_us: recorded.quiesce_us.distribution(&PAUSE_BOUNDS_US),
            cut_us: recorded.cut_us.distribution(&PAUSE_BOUNDS_US),
            duration_us: recorded.duration_us.distribution(&DURATION_BOUNDS_US),
            dirty_pages: recorded.dirty_pages.distribution(&PAGE_BOUNDS),
            dirty_pages_per_s: recorded.dirty_pages_per_s,
            last: recorded.last.clone(),
        }
    }
}

impl Recorded {
    fn record(&mut self, report: &CheckpointReport, cut_at: Instant) {
        let stats = &report.stats;
        self.duration_us.record(report.duration_us);
        self.dirty_pages.record(stats.dirty_pages);
        let sums = &mut self.sums;
        sums.dirty_pages += stats.dirty_pages;
        sums.precopied_pages += stats.precopied_pages;
        sums.staged_pages += stats.staged_pages;
        sums.cut_pages += stats.cut_pages;
        sums.protected_pages += stats.protected_pages;
        sums.cow_pages += stats.cow_pages;
        sums.cow_waits += stats.cow_waits;
        sums.cow_wait_us_max = sums.cow_wait_us_max.max(stats.cow_wait_us_max);
        sums.commit_pages += stats.commit_pages;
        sums.zero_pages += stats.zero_pages;
        sums.equal_pages += stats.equal_pages;
        sums.dedup_pages += stats.dedup_pages;
        sums.delta_pages += stats.delta_pages;
        sums.frame_bytes += stats.frame_bytes;
        sums.meta_bytes += report.meta_bytes;
        let since = cut_at.saturating_duration_since(self.cut_at);
        if !since.is_zero() {
            self.dirty_pages_per_s = Some(stats.dirty_pages as f64 / since.as_secs_f64());
        }
        self.cut_at = cut_at;
        self.last = Some(report.clone());
    }
}

impl Vm {
    /// Statistics of the VM's checkpoints so far.
    #[must_use]
    pub fn checkpoint_statistics(&self) -> CheckpointStatistics {
        // Totals and telemetry are both recorded under the lock of the totals, so they agree.
        let totals = self.totals();
        self.telemetry.statistics(self.with_missed(*totals))
    }

    /// Totals over the VM's checkpoints so far.
    #[must_use]
    pub fn checkpoint_totals(&self) -> CheckpointTotals {
        let totals = self.totals();
        self.with_missed(*totals)
    }

    fn totals(&self) -> MutexGuard<'_, CheckpointTotals> {
        self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the checkpoints that are being missed right now, so that a hanging store shows at once.
    fn with_missed(&self, mut totals: CheckpointTotals) -> CheckpointTotals {
        totals.skipped += self.telemetry.beat().map_or(0, |beat| beat.missed(Instant::now()));
        totals
    }

    /// Notes that a checkpoint is due: those that `beat` misses in the meantime count as skipped.
    pub(crate) fn expect_beat(&self, beat: Option<Beat>) {
        let _totals = self.totals();
        *self.telemetry.beat() = beat;
    }

    /// Notes that no checkpoint will be taken any more. Returns how many were missed until now;
    /// they stay counted.
    pub(crate) fn end_beat(&self) -> u64 {
        let mut totals = self.totals();
        let missed = self.telemetry.beat().take().map_or(0, |beat| beat.missed(Instant::now()));
        totals.skipped += missed;
        missed
    }

    /// Notes that the checkpoint that was due is over, and that `left_out` were skipped for it.
    pub(crate) fn count_beat(&self, left_out: u64) {
        let mut totals = self.totals();
        *self.telemetry.beat() = None;
        totals.skipped += left_out;
    }

    pub(crate) fn count_skipped(&self, count: u64) {
        self.totals().skipped += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn report(pause_us: u64, dirty_pages: u64) -> CheckpointReport {
        serde_json::from_value(json!({
            "vm": "v", "id": "00".repeat(32), "parent": null, "time_unix_ms": 1,
            "ram_bytes": 1 << 20, "dirty_pages": dirty_pages, "zero_pages": 1,
            "precopied_pages": 2, "cut_pages": 3, "cow_waits": 2, "cow_wait_us_max": 50, "commit_pages": 5, "frame_bytes": 400, "rounds": [],
            "pause_us": pause_us, "quiesce_us": 7, "cut_us": 8, "go_on_us": 9, "precopy_us": 10,
            "meta_bytes": 50, "stored_bytes": 450, "commit_us": 0, "sync_us": 0,
            "duration_us": 5_000,
        }))
        .unwrap()
    }

    fn record(telemetry: &Telemetry, report: &CheckpointReport) {
        telemetry.record_pause(Pause::of(&report.stats));
        telemetry.record(report);
    }

    #[test]
    fn buckets_hold_each_value_once_and_bounds_belong_to_the_lower_one() {
        let telemetry = Telemetry::default();
        for pause_us in [0, 10, 11, 200, 201, 1_000_000, 2_000_000] {
            record(&telemetry, &report(pause_us, 5));
        }
        let found = telemetry.statistics(CheckpointTotals::default());
        let pause = &found.pause_us;
        let count = |le: Option<u64>| {
            pause.buckets.iter().find(|bucket| bucket.le == le).map(|bucket| bucket.count)
        };
        assert_eq!(count(Some(10)), Some(2));
        assert_eq!(count(Some(20)), Some(1));
        assert_eq!(count(Some(200)), Some(1));
        assert_eq!(count(Some(500)), Some(1));
        assert_eq!(count(Some(1_000_000)), Some(1));
        assert_eq!(count(None), Some(1));
        assert_eq!(pause.buckets.iter().map(|bucket| bucket.count).sum::<u64>(), 7);
        assert_eq!((pause.count, pause.min, pause.sum), (7, 0, 3_000_422));
        assert!(pause.max.abs_diff(2_000_000) <= 2_000, "{pause:?}");
        assert_eq!(pause.p50, 200);
        assert_eq!(found.dirty_pages.sum, 35);
        assert_eq!((found.sums.frame_bytes, found.sums.meta_bytes), (2_800, 350));
        assert_eq!((found.sums.cow_waits, found.sums.cow_wait_us_max), (14, 50));
        assert_eq!(found.last.unwrap().stats.pause_us, 2_000_000);
    }

    #[test]
    fn a_pause_without_a_snapshot_is_a_pause() {
        let telemetry = Telemetry::default();
        telemetry.record_pause(Pause { us: 300, quiesce_us: 200, cut_us: 90 });
        let found = telemetry.statistics(CheckpointTotals::default());
        assert_eq!((found.pause_us.count, found.pause_us.max), (1, 300));
        assert_eq!((found.quiesce_us.max, found.cut_us.max), (200, 90));
        assert_eq!((found.duration_us.count, found.last), (0, None));
    }

    #[test]
    fn nothing_recorded_is_no_error() {
        let found = Telemetry::default().statistics(CheckpointTotals::default());
        assert_eq!((found.pause_us.count, found.pause_us.p99, found.pause_us.max), (0, 0, 0));
        assert_eq!((found.last, found.dirty_pages_per_s), (None, None));
    }

    #[test]
    fn the_dirty_rate_is_over_the_time_between_two_cuts() {
        let telemetry = Telemetry::default();
        let mut recorded = telemetry.recorded();
        let start = recorded.cut_at;
        recorded.record(&report(1, 1_000), start + Duration::from_secs(2));
        assert_eq!(recorded.dirty_pages_per_s, Some(500.0));
        recorded.record(&report(1, 30), start + Duration::from_millis(2_100));
        assert!((recorded.dirty_pages_per_s.unwrap() - 300.0).abs() < 1e-6);
        // Without time between two cuts there is no new rate.
        recorded.record(&report(1, 5), start + Duration::from_millis(2_100));
        assert!((recorded.dirty_pages_per_s.unwrap() - 300.0).abs() < 1e-6);
    }

    #[test]
    fn values_as_large_as_they_come_are_taken() {
        let telemetry = Telemetry::default();
        record(&telemetry, &report(u64::MAX, u64::MAX / 4));
        record(&telemetry, &report(u64::MAX, 0));
        let found = telemetry.statistics(CheckpointTotals::default());
        assert_eq!((found.pause_us.count, found.pause_us.sum), (2, u64::MAX));
    }
}
