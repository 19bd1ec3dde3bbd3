//! Marking: finds every block that snapshots reach, and the slots reached in each frame.
//!
//! A page that is overridden by a run further up is not reached, so its slot may go. In different
//! snapshots, the same node can be below different overrides; it is visited again only for pages
//! that were hidden before. In a line of snapshots, every visit but the first is therefore short.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use rayon::prelude::*;

use crate::catalog::SnapshotInfo;
use crate::error::{Result, StoreError};
use crate::id::{BlockRef, SnapshotId};
use crate::node::{Location, Node, Run, root_level};
use crate::pack::slots_of;
use crate::snapshot::Snapshot;
use crate::store::Store;
use crate::tree::NodeSource;

/// A frame, and the slots reached in it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FrameUse {
    pub frame: BlockRef,
    pub delta: bool,
    /// Bit n is set if slot n is reached.
    pub slots: u64,
    /// Index in [`Marked::snapshots`] of the first snapshot found to reach it.
    pub snapshot: u32,
}

/// A manifest, node or delta frame that cannot be read.
#[derive(Debug)]
pub(crate) struct Obstacle {
    pub error: StoreError,
    pub snapshot: SnapshotId,
    /// True for a delta frame, which is in [`Marked::frames`] too.
    pub is_frame: bool,
}

/// Everything that was reached.
#[derive(Debug, Default)]
pub(crate) struct Marked {
    /// Snapshots visited, in order; other fields refer to them by index.
    pub snapshots: Vec<SnapshotId>,
    /// Frames, sorted by segment and offset, each once.
    pub frames: Vec<FrameUse>,
    pub nodes: Vec<BlockRef>,
    /// State chunks, each with the index of the first snapshot found to reach it.
    pub chunks: Vec<(BlockRef, u32)>,
    pub manifests: Vec<BlockRef>,
    /// Blocks of fingerprints, each with the index of its snapshot.
    pub fingerprints: Vec<(BlockRef, u32)>,
    pub obstacles: Vec<Obstacle>,
}

/// Sorted page ranges `start .. end` without overlaps.
type Ranges = Vec<(u64, u64)>;

/// Visits snapshots one after the other.
pub(crate) struct Marker<'a> {
    store: &'a Arc<Store>,
    marked: Marked,
    /// The pages visible so far in each node.
    visited: HashMap<BlockRef, Ranges>,
    seen_chunks: HashSet<BlockRef>,
    /// Length of the part of `marked.frames` that is sorted and without duplicates.
    settled: usize,
    /// Read each node from its own place, even if an equal node is cached from another place.
    as_stored: bool,
    is_cancelled: &'a (dyn Fn() -> bool + Sync),
}

impl<'a> Marker<'a> {
    /// A marker that stops visiting once `is_cancelled`; its results are then incomplete.
    pub fn new(store: &'a Arc<Store>, is_cancelled: &'a (dyn Fn() -> bool + Sync)) -> Self {
        Self {
            store,
            as_stored: false,
            is_cancelled,
            marked: Marked::default(),
            visited: HashMap::new(),
            seen_chunks: HashSet::new(),
            settled: 0,
        }
    }

    /// A marker that trusts no cache: it reads each node from the medium.
    pub fn as_stored(store: &'a Arc<Store>) -> Self {
        Self { as_stored: true, ..Self::new(store, &|| false) }
    }

    /// Marks everything that a snapshot reaches. Callers begin with the newest snapshot: blocks in
    /// several snapshots are attributed to the first one visited.
    pub fn snapshot(&mut self, info: &SnapshotInfo) {
        self.marked.snapshots.push(info.id);
        self.marked.manifests.push(info.manifest);
        let index = self.marked.snapshots.len() as u32 - 1;
        self.marked.fingerprints.extend(info.fingerprints.map(|block| (block, index)));
        let snapshot = match Snapshot::load(Arc::clone(self.store), info, None) {
            Ok(snapshot) => snapshot,
            Err(error) => return self.obstacle(error),
        };
        for chunk in &snapshot.manifest().state {
            if self.seen_chunks.insert(chunk.body) {
                self.marked.chunks.push((chunk.body, index));
            }
        }
        for region in &snapshot.manifest().regions {
            if let Some(root) = &region.root {
                self.node(root, root_level(region.pages), 0, &[(0, region.pages)]);
            }
        }
        self.settle(1 << 20);
    }

    fn obstacle(&mut self, error: StoreError) {
        let snapshot = *self.marked.snapshots.last().expect("a snapshot is being looked at");
        self.marked.obstacles.push(Obstacle { error, snapshot, is_frame: false });
    }

    fn node(&mut self, block: &BlockRef, level: u8, first: u64, visible: &[(u64, u64)]) {
        let known = self.visited.get(block);
        let first_visit = known.is_none();
        let fresh = known.map_or_else(|| visible.to_vec(), |known| subtract(visible, known));
        if fresh.is_empty() && !first_visit || (self.is_cancelled)() {
            return;
        }
        let all = known.map_or_else(|| fresh.clone(), |known| union(known, &fresh));
        self.visited.insert(*block, all);
        if first_visit {
            self.marked.nodes.push(*block);
        }
        let read = if self.as_stored && first_visit {
            self.store.node_as_stored(block, level, first)
        } else {
            self.store.node(block, level, first)
        };
        let node = match read {
            Ok(node) => node,
            Err(error) => {
                if first_visit {
                    self.obstacle(error);
                }
                return;
            }
        };
        let snapshot = self.marked.snapshots.len() as u32 - 1;
        let frames = &mut self.marked.frames;
        each_visible(&node.runs, &fresh, |run| push_use(frames, &run, snapshot));
        self.children(&node, &fresh, first_visit);
    }

    fn children(&mut self, node: &Node, fresh: &[(u64, u64)], first_visit: bool) {
        if node.children.is_empty() {
            return;
        }
        let own: Ranges = node.runs.iter().map(|run| (run.first, run.end())).collect();
        let below = subtract(fresh, &own);
        for (index, child) in &node.children {
            let (first, level) = node.child_place(*index);
            let part = clip(&below, first, first + crate::node::span_pages(level));
            // Visit it even if nothing in it is visible: readers follow the references.
            if first_visit || !part.is_empty() {
                self.node(child, level, first, part);
            }
        }
    }

    /// Sorts the frames and merges entries for the same frame, once many are not merged yet.
    fn settle(&mut self, least: usize) {
        let frames = &mut self.marked.frames;
        if frames.len() < self.settled * 2 + least {
            return;
        }
        frames.sort_unstable_by_key(|usage| {
            (usage.frame.segment, usage.frame.offset, usage.frame.hash, usage.snapshot)
        });
        frames.dedup_by(|later, kept| {
            let same = later.frame == kept.frame && later.delta == kept.delta;
            if same {
                kept.slots |= later.slots;
            }
            same
        });
        self.settled = frames.len();
    }

    /// Adds the base frames of the delta frames, and returns everything.
    pub fn finish(mut self) -> Marked {
        self.settled = 0;
        self.settle(0);
        let deltas: Vec<FrameUse> =
            self.marked.frames.iter().filter(|usage| usage.delta).copied().collect();
        // All delta frames must be decoded for this: do it on all cores.
        let read = |usage: &FrameUse| bases_of(self.store, usage, self.is_cancelled);
        let found: Vec<_> =
            self.store.pool.install(|| deltas.par_iter().map(read).collect::<Vec<_>>());
        for (usage, bases) in deltas.iter().zip(found) {
            match bases {
                Ok(bases) => self.marked.frames.extend(bases),
                Err(error) => self.delta_obstacle(error, usage),
            }
        }
        self.settled = 0;
        self.settle(0);
        self.marked
    }

    fn delta_obstacle(&mut self, error: StoreError, usage: &FrameUse) {
        let snapshot = self.marked.snapshots[usage.snapshot as usize];
        self.marked.obstacles.push(Obstacle { error, snapshot, is_frame: true });
    }
}

/// The base frames, with their slots, of the slots in use of a delta frame.
fn bases_of(
    store: &Store,
    usage: &FrameUse,
    is_cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<Vec<FrameUse>> {
    let mut bases: Vec<FrameUse> = Vec::new();
    if is_cancelled() {
        return Ok(bases);
    }
    let view = store.frame(&usage.frame, true)?;
    for slot in slots_of(usage.slots) {
        let base = view.base(slot)?;
        let slots = 1 << (base.slot & 63);
        match bases.iter_mut().find(|known| known.frame == base.frame) {
            Some(known) => known.slots |= slots,
            None => bases.push(FrameUse { frame: base.frame, delta: false, slots, ..*usage }),
        }
    }
    Ok(bases)
}

fn push_use(frames: &mut Vec<FrameUse>, run: &Run, snapshot: u32) {
    let (frame, slot, delta) = match run.location {
        Location::Zero => return,
        Location::Frame { frame, slot } => (frame, slot, false),
        Location::Delta { frame, slot } => (frame, slot, true),
    };
    let slots = ones(run.count) << slot;
    // Runs of one frame are usually adjacent.
    match frames.last_mut() {
        Some(last) if last.frame == frame && last.delta == delta => last.slots |= slots,
        _ => frames.push(FrameUse { frame, delta, slots, snapshot }),
    }
}

/// A word with the lowest `count` bits set.
fn ones(count: u64) -> u64 {
    if count >= 64 { u64::MAX } else { (1 << count) - 1 }
}

/// Passes every part of sorted `runs` that lies in `ranges` to `with`.
fn each_visible(runs: &[Run], ranges: &[(u64, u64)], mut with: impl FnMut(Run)) {
    let mut ranges = ranges.iter().peekable();
    for run in runs {
        while ranges.next_if(|(_, end)| *end <= run.first).is_some() {}
        let mut rest = ranges.clone();
        while let Some((start, end)) = rest.next_if(|(start, _)| *start < run.end()) {
            run.clip(*start, *end).into_iter().for_each(&mut with);
        }
    }
}

/// The ranges that overlap `start .. end`, not clipped: a node looks only at its own pages.
fn clip(ranges: &[(u64, u64)], start: u64, end: u64) -> &[(u64, u64)] {
    let from = ranges.partition_point(|range| range.1 <= start);
    let to = ranges.partition_point(|range| range.0 < end);
    &ranges[from..to.max(from)]
}

fn subtract(from: &[(u64, u64)], what: &[(u64, u64)]) -> Ranges {
    let mut out = Ranges::new();
    let mut what = what.iter().copied().peekable();
    for &(mut start, end) in from {
        while start < end {
            while what.next_if(|(_, stop)| *stop <= start).is_some() {}
            match what.peek() {
                Some(&(first, stop)) if first < end => {
                    if start < first {
                        out.push((start, first));
                    }
                    start = stop;
                }
                _ => {
                    out.push((start, end));
                    break;
                }
            }
        }
    }
    out
}

fn union(a: &[(u64, u64)], b: &[(u64, u64)]) -> Ranges {
    let mut all: Ranges = a.iter().chain(b).copied().collect();
    all.sort_unstable();
    let mut out = Ranges::with_capacity(all.len());
    for (start, end) in all {
        match out.last_mut() {
            Some((_, last)) if *last >= start => *last = end.max(*last),
            _ => out.push((start, end)),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::node::tests::{explode, runs};

    fn ranges() -> impl Strategy<Value = Ranges> {
        proptest::collection::vec((0_u64..30, 1_u64..30), 0..20).prop_map(|parts| {
            let mut end = 0;
            let ranges = parts.into_iter().map(|(gap, count)| {
                let start = end + gap;
                end = start + count;
                (start, end)
            });
            union(&ranges.collect::<Vec<_>>(), &[])
        })
    }

    fn pages(ranges: &[(u64, u64)]) -> BTreeSet<u64> {
        ranges.iter().flat_map(|(start, end)| *start..*end).collect()
    }

    proptest! {
        #[test]
        fn ranges_agree_with_sets(a in ranges(), b in ranges(), start in 0_u64..300, len in 0_u64..100) {
            prop_assert_eq!(pages(&subtract(&a, &b)), &pages(&a) - &pages(&b));
            prop_assert_eq!(pages(&union(&a, &b)), &pages(&a) | &pages(&b));
            let inside: BTreeSet<u64> = pages(clip(&a, start, start + len)).into_iter().filter(|page| (start..start + len).contains(page)).collect();
            prop_assert_eq!(inside, pages(&a).into_iter().filter(|page| (start..start + len).contains(page)).collect());
        }

        #[test]
        fn visible_runs_agree_with_maps(runs in runs(512), visible in ranges()) {
            let mut found = Vec::new();
            each_visible(&runs, &visible, |run| found.push(run));
            let visible = pages(&visible);
            let mut expected = explode(&runs);
            expected.retain(|page, _| visible.contains(page));
            prop_assert_eq!(explode(&found), expected);
        }
    }
}
