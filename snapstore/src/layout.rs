//! Which file of the store now holds the blocks first written to a segment.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::id::BlockRef;
use crate::journal_entry::MAX_LISTED;

/// What one step of pruning did to the files, as the journal records it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Relayout {
    /// Where the newest transaction ended: segment and offset in bytes.
    pub tail: Option<(u32, u64)>,
    /// The number of the next pack; numbers are never reused.
    pub next_pack: u32,
    /// A reference to the index of a new pack; its segment number is the pack's number.
    pub pack: Option<BlockRef>,
    /// Segments whose live records the new pack holds.
    pub moved: Vec<u32>,
    /// Segments in which nothing is in use.
    pub dropped: Vec<u32>,
    /// Packs that are removed; what was live in them, if anything, is in the new pack.
    pub retired_packs: Vec<u32>,
}

/// Where all blocks are, as of some point in the journal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Segment number to the number of the pack that holds its live records.
    pub moved: HashMap<u32, u32>,
    /// References to the indexes of the packs.
    pub packs: BTreeMap<u32, BlockRef>,
    /// Segments whose files are gone, including the `moved` ones.
    pub retired: BTreeSet<u32>,
    /// The number of the next pack.
    pub next_pack: u32,
}

impl Layout {
    pub fn apply(&mut self, step: &Relayout) {
        let Relayout { tail: _, next_pack, pack, moved, dropped, retired_packs } = step;
        self.next_pack = self.next_pack.max(*next_pack);
        for number in dropped {
            self.moved.remove(number);
            self.retired.insert(*number);
        }
        if let Some(index) = pack {
            self.packs.insert(index.segment, *index);
            for number in moved {
                self.moved.insert(*number, index.segment);
                self.retired.insert(*number);
            }
        }
        for number in retired_packs {
            self.packs.remove(number);
        }
        self.moved.retain(|_, pack| self.packs.contains_key(pack));
    }

    /// True if segment `number` no longer has a file of its own.
    pub fn is_retired(&self, number: u32) -> bool {
        self.retired.contains(&number) || self.moved.contains_key(&number)
    }

    /// The steps that lead from an empty layout to this one: one for `tail`, some for retired
    /// segments without a pack, and one per pack.
    pub fn as_steps(&self, tail: Option<(u32, u64)>) -> Vec<Relayout> {
        let step = Relayout { tail, next_pack: self.next_pack, ..Relayout::default() };
        let mut steps = vec![step.clone()];
        // List even those without a pack: they must not be looked for as files.
        let gone = self.retired.iter().filter(|number| !self.moved.contains_key(number));
        let gone: Vec<u32> = gone.copied().collect();
        let dropped = gone.chunks(MAX_LISTED).map(<[u32]>::to_vec);
        steps.extend(dropped.map(|dropped| Relayout { dropped, ..step.clone() }));
        for (number, index) in &self.packs {
            let here = self.moved.iter().filter(|(_, pack)| *pack == number);
            let mut moved: Vec<u32> = here.map(|(segment, _)| *segment).collect();
            moved.sort_unstable();
            steps.push(Relayout { pack: Some(*index), moved, ..step.clone() });
        }
        steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Hash;

    fn index(number: u32) -> BlockRef {
        BlockRef { segment: number, offset: 64, len: 20, hash: Hash([number as u8; 32]) }
    }

    #[test]
    fn steps_move_and_drop_segments() {
        let mut layout = Layout::default();
        layout.apply(&Relayout {
            next_pack: 2,
            pack: Some(index(1)),
            moved: vec![1, 3],
            dropped: vec![2],
            ..Relayout::default()
        });
        assert_eq!(layout.moved, HashMap::from([(1, 1), (3, 1)]));
        assert_eq!(layout.retired, BTreeSet::from([1, 2, 3]));
        layout.apply(&Relayout {
            next_pack: 3,
            pack: Some(index(2)),
            moved: vec![3, 4],
            retired_packs: vec![1],
            ..Relayout::default()
        });
        assert_eq!(layout.moved, HashMap::from([(3, 2), (4, 2)]), "1 was live nowhere");
        assert_eq!(layout.packs.keys().copied().collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn a_layout_is_what_its_steps_make() {
        let mut layout = Layout::default();
        for number in 1..4 {
            layout.apply(&Relayout {
                next_pack: number + 1,
                pack: Some(index(number)),
                moved: vec![number * 10, number * 10 + 1],
                ..Relayout::default()
            });
        }
        let mut again = Layout::default();
        layout.as_steps(Some((9, 64))).iter().for_each(|step| again.apply(step));
        assert_eq!(again, layout);
    }
}
