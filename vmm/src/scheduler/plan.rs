//! Decides when the next checkpoint is due, and which are left out, without reading a clock.

use std::time::{Duration, Instant};

use super::{Every, SkipReason};

/// How long to take no checkpoint after one that failed; doubles with each further failure.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// The longest such pause.
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// How often continuous checkpoints check whether a guest at rest has gone on.
const LOOK_AT_REST_EVERY: Duration = Duration::from_millis(10);
/// Checkpoints left out are reported at once, and then only this often.
const REPORT_EVERY: Duration = Duration::from_secs(10);

/// What became of a checkpoint that was due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Published.
    Taken,
    /// Failed, or cancelled.
    Failed,
    /// Not begun, because another one was being taken.
    LeftOut,
    /// Not needed: the guest stands still, and is saved.
    Resting,
}

/// The beat of a schedule, counted from a checkpoint that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Beat {
    due: Instant,
    interval: Duration,
}

impl Beat {
    /// Returns how many more checkpoints fell due by `now`.
    pub(crate) fn missed(self, now: Instant) -> u64 {
        let late = now.saturating_duration_since(self.due).as_nanos();
        u64::try_from(late / self.interval.as_nanos().max(1)).unwrap_or(u64::MAX)
    }
}

/// How many checkpoints were left out, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LeftOut {
    pub not_done: u64,
    pub quiet: u64,
    pub failed: u64,
}

impl LeftOut {
    /// Returns each reason that applied, and how many were left out for it.
    pub fn reasons(self) -> impl Iterator<Item = (SkipReason, u64)> {
        [
            (SkipReason::NotDone, self.not_done),
            (SkipReason::Quiet, self.quiet),
            (SkipReason::Failed, self.failed),
        ]
        .into_iter()
        .filter(|(_, count)| *count > 0)
    }
}

/// When checkpoints are due.
#[derive(Debug)]
pub(super) struct Plan {
    every: Every,
    due: Instant,
    failed_in_a_row: u32,
}

impl Plan {
    pub fn new(every: Every, now: Instant) -> Self {
        let due = match every {
            Every::Interval(interval) => now + interval,
            Every::Continuous => now,
        };
        Self { every, due, failed_in_a_row: 0 }
    }

    /// Returns when the next checkpoint is due, which may be in the past.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Returns the beat from the checkpoint that is due; `None` for continuous checkpoints, which
    /// miss nothing.
    pub fn beat(&self) -> Option<Beat> {
        match self.every {
            Every::Interval(interval) => Some(Beat { due: self.due, interval }),
            Every::Continuous => None,
        }
    }

    /// Returns how many more checkpoints fell due by `now`.
    pub fn missed(&self, now: Instant) -> u64 {
        self.beat().map_or(0, |beat| beat.missed(now))
    }

    /// Plans the next checkpoint, given the outcome of the last. Returns how many fall due before
    /// it, up to now or, after a failure, in the pause that follows: those are left out, not made
    /// up for.
    pub fn advance(&mut self, outcome: Outcome, now: Instant) -> u64 {
        self.failed_in_a_row = match outcome {
            Outcome::Failed => self.failed_in_a_row.saturating_add(1),
            _ => 0,
        };
        let not_before = match self.failed_in_a_row {
            0 => now,
            // If the store is full, say, trying all the time helps nobody, and pauses the guest
            // each time.
            n => now + (PAUSE_MIN * 2_u32.pow((n - 1).min(16))).min(PAUSE_MAX),
        };
        match self.every {
            Every::Interval(interval) => {
                self.due += interval;
                if self.due > not_before {
                    return 0;
                }
                let late = not_before.saturating_duration_since(self.due).as_nanos();
                let beat = interval.as_nanos().max(1);
                // Stay on the same beat, whatever was missed.
                self.due = not_before
                    + interval.saturating_sub(Duration::from_nanos((late % beat) as u64));
                if outcome == Outcome::Resting { 0 } else { (late / beat + 1) as u64 }
            }
            Every::Continuous => {
                self.due = match outcome {
                    Outcome::Resting => now + LOOK_AT_REST_EVERY,
                    _ => not_before,
                };
                0
            }
        }
    }
}

/// Collects the counts of checkpoints left out until they are reported.
#[derive(Debug, Default)]
pub(super) struct Skips {
    unreported: LeftOut,
    reported_at: Option<Instant>,
}

impl Skips {
    /// Adds `more`; returns what to report now.
    pub fn add(&mut self, more: LeftOut, now: Instant) -> LeftOut {
        self.unreported.not_done += more.not_done;
        self.unreported.quiet += more.quiet;
        self.unreported.failed += more.failed;
        let often =
            self.reported_at.is_some_and(|at| now.saturating_duration_since(at) < REPORT_EVERY);
        if often || self.unreported == LeftOut::default() {
            return LeftOut::default();
        }
        self.reported_at = Some(now);
        self.take_unreported()
    }

    /// Takes everything not reported yet.
    pub fn take_unreported(&mut self) -> LeftOut {
        std::mem::take(&mut self.unreported)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn intervals_keep_the_beat_and_leave_out_what_was_missed() {
        let start = Instant::now();
        let mut plan = Plan::new(Every::Interval(100 * MS), start);
        assert_eq!(plan.due(), start + 100 * MS, "not at once");
        assert_eq!(plan.advance(Outcome::Taken, start + 130 * MS), 0);
        assert_eq!(plan.due(), start + 200 * MS, "on the beat, however long it took");
        // Those due at 300, 400 and 500 are left out.
        assert_eq!(plan.advance(Outcome::Taken, start + 510 * MS), 3);
        assert_eq!(plan.due(), start + 600 * MS);
        // A checkpoint that is done just when the next is due has missed it.
        assert_eq!(plan.advance(Outcome::Taken, start + 700 * MS), 1);
        assert_eq!(plan.due(), start + 800 * MS);
        assert_eq!(plan.advance(Outcome::LeftOut, start + 800 * MS), 0);
    }

    #[test]
    fn however_short_the_interval_and_long_the_wait_counting_takes_no_time() {
        let start = Instant::now();
        let mut plan = Plan::new(Every::Interval(Duration::from_nanos(1)), start);
        let late = start + Duration::from_hours(24 * 365);
        assert_eq!(plan.advance(Outcome::Taken, late), (late - start).as_nanos() as u64 - 1);
        assert_eq!(plan.due(), late + Duration::from_nanos(1));
        let mut plan = Plan::new(Every::Interval(Duration::from_hours(1)), start);
        assert_eq!(plan.advance(Outcome::Taken, late), 24 * 365 - 1);
    }

    #[test]
    fn continuous_ones_follow_at_once_and_miss_nothing() {
        let start = Instant::now();
        let mut plan = Plan::new(Every::Continuous, start);
        assert_eq!(plan.due(), start);
        for took in [1, 5_000] {
            assert_eq!(plan.advance(Outcome::Taken, start + took * MS), 0);
            assert_eq!(plan.due(), start + took * MS);
        }
    }

    #[test]
    fn continuous_ones_that_fail_come_less_and_less_often() {
        let mut now = Instant::now();
        let mut plan = Plan::new(Every::Continuous, now);
        let mut pauses = Vec::new();
        for _ in 0..60 {
            assert_eq!(plan.advance(Outcome::Failed, now), 0);
            pauses.push(plan.due() - now);
            now = plan.due();
        }
        assert_eq!(pauses[..3], [100 * MS, 200 * MS, 400 * MS]);
        assert_eq!(pauses[59], PAUSE_MAX);
        let _none = plan.advance(Outcome::Taken, now);
        assert_eq!(plan.due(), now, "forgiven");
        let _none = plan.advance(Outcome::Failed, now);
        assert_eq!(plan.due() - now, 100 * MS);
    }

    #[test]
    fn intervals_that_fail_leave_out_more_and_more_and_keep_the_beat() {
        let start = Instant::now();
        let mut plan = Plan::new(Every::Interval(50 * MS), start);
        // A pause of 100 ms leaves out those due at 100 and 150; then one of 200 ms, those at 250
        // to 400.
        assert_eq!(plan.advance(Outcome::Failed, start + 51 * MS), 2);
        assert_eq!(plan.due(), start + 200 * MS);
        assert_eq!(plan.advance(Outcome::Failed, start + 201 * MS), 4);
        assert_eq!(plan.due(), start + 450 * MS);
        let (mut now, mut left_out, mut failed) = (plan.due(), 0, 0);
        while now < start + 60_000 * MS {
            left_out += plan.advance(Outcome::Failed, now);
            failed += 1;
            now = plan.due();
        }
        assert!(failed < 15, "{failed} in a minute");
        assert_eq!(left_out + failed, (plan.due() - start).as_millis() as u64 / 50 - 9);
        assert_eq!(plan.advance(Outcome::Taken, now), 0);
        assert_eq!(plan.due(), now + 50 * MS, "forgiven");
        // With a long interval, none are missed.
        let mut plan = Plan::new(Every::Interval(1_000 * MS), start);
        assert_eq!(plan.advance(Outcome::Failed, start + 1_001 * MS), 0);
        assert_eq!(plan.due(), start + 2_000 * MS);
    }

    #[test]
    fn a_guest_at_rest_costs_no_checkpoints_and_no_skips() {
        let start = Instant::now();
        let mut plan = Plan::new(Every::Continuous, start);
        assert_eq!(plan.advance(Outcome::Resting, start), 0);
        assert_eq!(plan.due(), start + LOOK_AT_REST_EVERY);
        let mut plan = Plan::new(Every::Interval(MS), start);
        assert_eq!(plan.advance(Outcome::Resting, start + 50 * MS), 0);
        assert_eq!(plan.due(), start + 51 * MS);
    }

    #[test]
    fn what_is_left_out_is_told_at_once_and_then_seldom_and_in_full() {
        let start = Instant::now();
        let mut skips = Skips::default();
        let (none, late) = (LeftOut::default(), |n| LeftOut { not_done: n, ..LeftOut::default() });
        assert_eq!(skips.add(none, start), none);
        assert_eq!(skips.add(late(2), start), late(2));
        let mut told = 0;
        for n in 1..=1000 {
            told += skips.add(late(3), start + n * 10 * MS).not_done;
        }
        assert_eq!(told, 3000, "those of the last ten seconds together");
        assert_eq!(skips.add(none, start + 60_000 * MS), none, "nothing new");
        let more = LeftOut { not_done: 1, quiet: 2, failed: 3 };
        assert_eq!(skips.add(late(1), start + 60_000 * MS), late(1));
        assert_eq!(skips.add(more, start + 60_001 * MS), none, "too soon");
        assert_eq!(skips.take_unreported(), more, "unless it ends");
        assert_eq!(skips.take_unreported(), none);
        let reasons: Vec<_> = LeftOut { not_done: 0, ..more }.reasons().collect();
        assert_eq!(reasons, [(SkipReason::Quiet, 2), (SkipReason::Failed, 3)]);
    }

    #[test]
    fn what_is_missed_can_be_told_before_it_is_over() {
        let start = Instant::now();
        let mut plan = Plan::new(Every::Interval(100 * MS), start);
        // Due at 100; those due at 200 and 300 pass while it is taken.
        for (now, missed) in [(0, 0), (100, 0), (199, 0), (200, 1), (399, 2)] {
            assert_eq!(plan.missed(start + now * MS), missed, "{now}");
            assert_eq!(plan.beat().expect("a beat").missed(start + now * MS), missed, "{now}");
        }
        assert_eq!(plan.advance(Outcome::Taken, start + 399 * MS), 2, "as it comes out");
        assert_eq!(Plan::new(Every::Continuous, start).missed(start + 5_000 * MS), 0);
    }
}
