//! What a pager counts, where another can go on counting.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::image::{Count, Image};
use super::shared::SharedWords;

/// Classes of [`PagerStats::fault_us_log2`].
pub const FAULT_CLASSES: usize = 24;

/// What the pager did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagerStats {
    /// Faults answered.
    pub faults: u64,
    /// Time spent answering them, in microseconds.
    pub fault_us_total: u64,
    /// The slowest, in microseconds.
    pub fault_us_max: u64,
    /// Faults by the time they took: class 0 is below 1 us, class n from 2^(n-1) us to below 2^n us;
    /// the last one has no end.
    pub fault_us_log2: [u64; FAULT_CLASSES],
    /// Pages whose contents came from the store.
    pub filled_pages: u64,
    /// Pages mapped as zero because somebody touched them.
    pub zero_pages: u64,
    /// Pages with contents in the store, when all are filled; 0 until that is known.
    pub total_pages: u64,
    /// True once everything is resident and userfaultfd was let go.
    pub complete: bool,
}

impl PagerStats {
    /// Pages that need no fault any more. Until all is there, zero pages that nobody touched are
    /// not among them.
    #[must_use]
    pub fn resident_pages(&self) -> u64 {
        self.filled_pages + self.zero_pages
    }

    /// The time, in microseconds, within which a `share` of the faults were answered, 0 to 1: the end
    /// of the class they are in. 0 if there were none.
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
/// Words that a user's counters are.
pub(super) const COUNTER_WORDS: usize = LET_GO + 1;

/// What is counted for one user.
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

    /// Its memory was given back, complete.
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
