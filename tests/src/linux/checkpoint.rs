//! The checkpoints that scripts report.

use std::ops::RangeInclusive;

use serde_json::Value;

use super::{Outcome, value};

/// A checkpoint, as `checkpoint` in `outer.sh` reports it.
#[derive(Debug)]
pub struct Checkpoint {
    /// The guest's latest tick when the checkpoint was requested, and when it was done.
    pub ticks: [u64; 2],
    /// What `frazil checkpoint --json` printed.
    pub report: Value,
}

impl Checkpoint {
    /// Finds the checkpoint with this tag.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    #[must_use]
    pub fn find(outcome: &Outcome, tag: &str) -> Self {
        let lines = outcome.test_lines("checkpoint");
        let words = lines
            .iter()
            .find(|words| words[0] == tag)
            .unwrap_or_else(|| panic!("no checkpoint `{tag}` among {lines:?}"));
        let report = serde_json::from_str(&words[3..].join(" ")).expect("JSON");
        Self { ticks: [value(words[1]), value(words[2])], report }
    }

    /// Returns the numbers that the first tick of a guest resumed from this checkpoint can have. A
    /// tick's line may begin before the cut and end after it.
    #[must_use]
    pub fn next(&self) -> RangeInclusive<u64> {
        self.ticks[0]..=self.ticks[1] + 2
    }
}

impl Outcome {
    /// Fails the test if the guest ever said `GUEST bad`.
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
