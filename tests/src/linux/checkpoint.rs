//! What scripts tell of checkpoints.

use std::ops::RangeInclusive;

use serde_json::Value;

use super::{Outcome, value};

/// One, as `checkpoint` of `outer.sh` tells of it.
#[derive(Debug)]
pub struct Checkpoint {
    /// Those of its guest before it was asked for and after it was done.
    pub ticks: [u64; 2],
    /// What `frazil checkpoint --json` printed.
    pub report: Value,
}

impl Checkpoint {
    /// The one with this tag.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    #[must_use]
    pub fn find(outcome: &Outcome, tag: &str) -> Self {
        let told = outcome.told("checkpoint");
        let words = told
            .iter()
            .find(|words| words[0] == tag)
            .unwrap_or_else(|| panic!("no checkpoint `{tag}` among {told:?}"));
        let report = serde_json::from_str(&words[3..].join(" ")).expect("JSON");
        Self { ticks: [value(words[1]), value(words[2])], report }
    }

    /// What the first tick of a guest that is resumed from it can be. The line of one may be begun
    /// before the cut and ended after it.
    #[must_use]
    pub fn next(&self) -> RangeInclusive<u64> {
        self.ticks[0]..=self.ticks[1] + 2
    }
}

impl Outcome {
    /// Fails the test unless a guest never found anything bad.
    ///
    /// # Panics
    /// If it did.
    #[track_caller]
    pub fn expect_well(&self, vm: &str) {
        let console = self.console(vm);
        let bad: Vec<_> = console.iter().filter(|line| line.contains("GUEST bad")).collect();
        assert!(bad.is_empty(), "{vm}: {bad:#?}");
    }
}
