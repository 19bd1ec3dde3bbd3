//! What a transaction changes in a region, packed into 16 bytes per run.
//!
//! A guest of 16 GiB may have two million scattered pages to write; as [`Run`]s they would take
//! more memory than everything else together.

use crate::id::BlockRef;
use crate::node::{Location, Run, push_run};
use crate::numbered::Numbered;

/// A frame or, with `true`, a delta frame.
type Frame = (BlockRef, bool);

/// In place of a frame's index: zero pages.
const ZERO: u32 = u32::MAX;

/// The most pages in one packed run.
const COUNT_MAX: u64 = u16::MAX as u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Packed {
    first: u64,
    frame: u32,
    count: u16,
    slot: u8,
}

const _: () = assert!(size_of::<Packed>() == 16);

impl Packed {
    fn end(&self) -> u64 {
        self.first + u64::from(self.count)
    }

    /// The part inside `start .. end`, if any.
    fn clip(&self, start: u64, end: u64) -> Option<Self> {
        let (first, end) = (self.first.max(start), self.end().min(end));
        (first < end).then(|| Self {
            first,
            frame: self.frame,
            count: (end - first) as u16,
            slot: self.slot.wrapping_add((first - self.first) as u8),
        })
    }

    fn is_followed_by(&self, next: &Self) -> bool {
        let goes_on = match self.frame {
            ZERO => next.frame == ZERO,
            frame => {
                next.frame == frame
                    && u64::from(self.slot) + u64::from(self.count) == u64::from(next.slot)
            }
        };
        goes_on
            && self.end() == next.first
            && u64::from(self.count) + u64::from(next.count) <= COUNT_MAX
    }
}

fn push(runs: &mut Vec<Packed>, run: Packed) {
    match runs.last_mut() {
        Some(last) if last.is_followed_by(&run) => last.count += run.count,
        _ => runs.push(run),
    }
}

/// Runs of one region, sorted and without overlaps.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changes {
    frames: Vec<Frame>,
    runs: Vec<Packed>,
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The runs inside `start .. end`, clipped to it.
    pub fn view(&self, start: u64, end: u64) -> impl Iterator<Item = Run> + '_ {
        self.packed(start, end).map(|run| self.unpack(run))
    }

    /// How many runs overlap `start .. end`.
    pub fn count(&self, start: u64, end: u64) -> usize {
        let from = self.runs.partition_point(|run| run.end() <= start);
        let to = self.runs.partition_point(|run| run.first < end);
        if start < end { to - from } else { 0 }
    }

    /// The runs inside `start .. end`, clipped to it, with adjacent ones merged.
    pub fn collect(&self, start: u64, end: u64) -> Vec<Run> {
        let mut runs = Vec::new();
        self.view(start, end).for_each(|run| push_run(&mut runs, run));
        runs
    }

    fn packed(&self, start: u64, end: u64) -> impl Iterator<Item = Packed> + '_ {
        let from = self.runs.partition_point(|run| run.end() <= start);
        self.runs[from..]
            .iter()
            .take_while(move |run| run.first < end)
            .filter_map(move |run| run.clip(start, end))
    }

    fn unpack(&self, run: Packed) -> Run {
        let location = match run.frame {
            ZERO => Location::Zero,
            index => match self.frames[index as usize] {
                (frame, false) => Location::Frame { frame, slot: run.slot },
                (frame, true) => Location::Delta { frame, slot: run.slot },
            },
        };
        Run { first: run.first, count: u64::from(run.count), location }
    }

    /// The runs of `other` that overlap runs of `self`.
    pub fn overlapping_runs_of(&self, mut other: Self) -> Self {
        other.runs.retain(|run| self.count(run.first, run.end()) > 0);
        other
    }

    /// Lays `newer` over these changes.
    pub fn overlay(self, newer: Self) -> Self {
        if self.is_empty() {
            return newer;
        }
        let Self { mut frames, runs: older } = self;
        let offset = frames.len() as u32;
        frames.extend(newer.frames);
        let mut out = Vec::with_capacity(older.len() + newer.runs.len());
        let mut rest = older.into_iter();
        let mut current = rest.next();
        for mut run in newer.runs {
            if run.frame != ZERO {
                run.frame += offset;
            }
            while let Some(old) = current {
                if let Some(before) = old.clip(0, run.first) {
                    push(&mut out, before);
                }
                // The part after the newer run is compared with the next one.
                current = old.clip(run.end(), u64::MAX);
                if current.is_some() {
                    break;
                }
                current = rest.next();
            }
            push(&mut out, run);
        }
        while let Some(old) = current {
            push(&mut out, old);
            current = rest.next();
        }
        Self { frames, runs: out }
    }
}

/// Collects runs in any order; they must not overlap.
#[derive(Debug, Default)]
pub(crate) struct ChangesBuilder {
    frames: Numbered<Frame>,
    runs: Vec<Packed>,
}

impl ChangesBuilder {
    pub fn push(&mut self, run: &Run) {
        let (frame, slot) = match run.location {
            Location::Zero => (ZERO, 0),
            Location::Frame { frame, slot } => (self.frames.number((frame, false)), slot),
            Location::Delta { frame, slot } => (self.frames.number((frame, true)), slot),
        };
        let mut first = run.first;
        while first < run.end() {
            let count = (run.end() - first).min(COUNT_MAX);
            let slot = slot.wrapping_add((first - run.first) as u8);
            push(&mut self.runs, Packed { first, frame, count: count as u16, slot });
            first += count;
        }
    }

    pub fn finish(self) -> Changes {
        let Self { frames, mut runs } = self;
        runs.sort_unstable_by_key(|run| run.first);
        // Merge in place: the merged runs never get ahead of the reader.
        let mut kept: usize = 0;
        for at in 0..runs.len() {
            let run = runs[at];
            match kept.checked_sub(1).map(|last| &mut runs[last]) {
                Some(last) if last.is_followed_by(&run) => last.count += run.count,
                _ => {
                    runs[kept] = run;
                    kept += 1;
                }
            }
        }
        runs.truncate(kept);
        Changes { frames: frames.into_items(), runs }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::node::overlay;
    use crate::node::tests::{explode, runs};

    pub fn changes(runs: &[Run]) -> Changes {
        let mut builder = ChangesBuilder::default();
        runs.iter().for_each(|run| builder.push(run));
        builder.finish()
    }

    proptest! {
        #[test]
        fn packed_runs_agree_with_runs(older in runs(512), newer in runs(512), start in 0_u64..512, len in 0_u64..512, order in any::<u64>()) {
            let mut shuffled = newer.clone();
            if !shuffled.is_empty() {
                let middle = order as usize % shuffled.len();
                shuffled.rotate_left(middle);
            }
            let merged = changes(&older).overlay(changes(&shuffled));
            prop_assert_eq!(explode(&merged.collect(0, u64::MAX)), explode(&overlay(&older, &newer)));
            let part = merged.collect(start, start + len);
            prop_assert_eq!(explode(&part), explode(&overlay(&older, &newer)).range(start..start + len).map(|(k, v)| (*k, *v)).collect());
            prop_assert_eq!(merged.view(start, start + len).count(), merged.count(start, start + len));
        }
    }

    #[test]
    fn long_runs_of_zeros_are_kept_whole() {
        let run = Run { first: 5, count: 200_000, location: Location::Zero };
        assert_eq!(changes(&[run]).collect(0, u64::MAX), [run]);
        assert_eq!(changes(&[run]).collect(100_000, 100_001).len(), 1);
    }
}
