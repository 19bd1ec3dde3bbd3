//! A pager's counters, kept in shared memory so that another pager can go on counting.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::image::{Count, Image};
use super::shared::SharedWords;

/// Number of classes of [`PagerStats::fault_us_log2`].
pub const FAULT_CLASSES: usize = 24;

/// What a pager has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagerStats {
    /// Faults answered.
    pub faults: u64,
    /// Total time spent answering faults, in microseconds.
    pub fault_us_total: u64,
    /// Time spent on the slowest fault, in microseconds.
    pub fault_us_max: u64,
    /// Number of faults by the time they took: class 0 is below 1 us, class n from 2^(n-1) us to
    /// below 2^n us; the last class has no upper bound.
    pub fault_us_log2: [u64; FAULT_CLASSES],
    /// Pages filled with contents from the store.
    pub filled_pages: u64,
    /// Zero pages allocated because they were touched or in the working set.
    pub zero_pages: u64,
    /// All pages with contents in the store; 0 until all of them are filled.
    pub total_pages: u64,
    /// True once everything is filled and userfaultfd was let go of.
    pub complete: bool,
}

impl PagerStats {
    /// Number of pages in the memory file. Zero pages that nobody touched are not counted.
    #[must_use]
    pub fn resident_pages(&self) -> u64 {
        self.filled_pages + self.zero_pages
    }

    /// The time in microseconds within which `share` (0 to 1) of the faults were answered, rounded
    /// up to the upper bound of its class; 0 if there were no faults.
    #[must_use]
    pub fn fault_us_within(&self, share: f64) -> u64 {
        let wanted = (share * self.faults as f64).ceil() as u64;
        let mut seen = 0;
        for (class, count) in self.fault_us_log2.iter().enumerate() {
            seen += count;
            if seen >= wanted && seen > 0 {
                return 1 << class;
            }
        }
        0
    }
}

const FAULTS: usize = 0;
const US_TOTAL: usize = 1;
const US_MAX: usize = 2;
const CLASSES: usize = 3;
const LET_GO: usize = CLASSES + FAULT_CLASSES;
/// Number of words that a user's counters take.
pub(super) const COUNTER_WORDS: usize = LET_GO + 1;

/// The counters of one user.
#[derive(Debug)]
pub(super) struct Counters(pub SharedWords);

impl Counters {
    pub fn count_fault(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let class = (u64::BITS - us.leading_zeros()) as usize;
        self.0.word(FAULTS).fetch_add(1, Ordering::Relaxed);
        self.0.word(US_TOTAL).fetch_add(us, Ordering::Relaxed);
        self.0.word(US_MAX).fetch_max(us, Ordering::Relaxed);
        self.0.word(CLASSES + class.min(FAULT_CLASSES - 1)).fetch_add(1, Ordering::Relaxed);
    }

    /// Records that the memory is complete and was let go of.
    pub fn set_let_go(&self) {
        self.0.word(LET_GO).store(1, Ordering::Release);
    }

    pub fn stats(&self, image: &Image) -> PagerStats {
        let get = |index: usize| self.0.word(index).load(Ordering::Relaxed);
        let count = |what| image.count(what).load(Ordering::Relaxed);
        PagerStats {
            complete: self.0.word(LET_GO).load(Ordering::Acquire) != 0,
            faults: get(FAULTS),
            fault_us_total: get(US_TOTAL),
            fault_us_max: get(US_MAX),
            fault_us_log2: std::array::from_fn(|class| get(CLASSES + class)),
            filled_pages: count(Count::Filled),
            zero_pages: count(Count::Zero),
            total_pages: count(Count::Total),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_classed_by_powers_of_two() {
        let mut stats = PagerStats::default();
        assert_eq!(stats.fault_us_within(0.5), 0, "none yet");
        (stats.faults, stats.fault_us_log2[3], stats.fault_us_log2[7]) = (10, 6, 4);
        assert_eq!((stats.fault_us_within(0.5), stats.fault_us_within(0.99)), (8, 128));
    }
}
