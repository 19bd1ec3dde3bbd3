//! Page trees: looking up pages, and writing a changed tree beside the old one.

use std::sync::Arc;

use rayon::prelude::*;

use crate::changes::Changes;
use crate::error::Result;
use crate::id::BlockRef;
use crate::node::{
    Location, Node, Run, clip_runs, find_page, overlay, push_run, root_level, span_pages,
};
use crate::numbered::Numbered;

/// Reads and verifies nodes.
pub(crate) trait NodeSource {
    fn node(&self, block: &BlockRef, level: u8, first: u64) -> Result<Arc<Node>>;
}

/// Appends nodes, from any thread; children are appended before their parent.
pub(crate) trait NodeSink: Sync {
    fn put(&self, node: Node) -> Result<BlockRef>;
}

/// When pending runs move down: in batches large enough to be worth rewriting a child for.
/// `DESIGN.md` has the figures.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FlushPolicy {
    /// The most that the pending runs of a node right above the leaves may weigh; see [`weight`].
    pub above_leaves_weight_max: usize,
    /// The same for nodes further up.
    pub higher_weight_max: usize,
    /// Groups of fewer runs than this stay while the rest moves down.
    pub group_runs_min: usize,
}

impl FlushPolicy {
    /// The policy under which nodes keep about `pending_runs` scattered runs: three quarters of the
    /// weight allowed are for the frames these are in.
    pub fn of(pending_runs: usize) -> Self {
        let pending_runs = pending_runs.max(2);
        let weight_max = pending_runs * 4;
        Self {
            above_leaves_weight_max: weight_max,
            higher_weight_max: weight_max,
            group_runs_min: 8.min(pending_runs / 2),
        }
    }

    fn weight_max(self, level: u8) -> usize {
        if level == 1 { self.above_leaves_weight_max } else { self.higher_weight_max }
    }
}

/// One region's tree, as of one snapshot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tree {
    pub root: Option<BlockRef>,
    pub pages: u64,
}

impl Tree {
    /// Where `page` is stored. Reads one node per level, whatever the history.
    pub fn page(&self, nodes: &impl NodeSource, page: u64) -> Result<Location> {
        Self::page_below(nodes, self.root, root_level(self.pages), 0, page)
    }

    /// Where `page` is stored, looking from the node `next` at `(level, first)` down.
    pub fn page_below(
        nodes: &impl NodeSource,
        mut next: Option<BlockRef>,
        mut level: u8,
        mut first: u64,
        page: u64,
    ) -> Result<Location> {
        while let Some(block) = next {
            let node = nodes.node(&block, level, first)?;
            if let Some(location) = find_page(&node.runs, page) {
                return Ok(location);
            }
            if level == 0 {
                break;
            }
            let index = node.child_index(page);
            next = node.child(index).copied();
            (first, level) = node.child_place(index);
        }
        Ok(Location::Zero)
    }

    /// The runs with contents in `start .. end`, ascending; pages in no run are zero.
    pub fn runs(&self, nodes: &impl NodeSource, start: u64, end: u64) -> Result<Vec<Run>> {
        let mut runs = match &self.root {
            Some(block) => {
                collect(nodes, block, root_level(self.pages), 0, start, end.min(self.pages))?
            }
            None => Vec::new(),
        };
        runs.retain(|run| run.location != Location::Zero);
        Ok(runs)
    }

    /// Writes a tree with `changes` laid over this one. Only nodes from the root down to where
    /// changes move are written, on all threads of the current pool.
    pub fn apply(
        &self,
        nodes: &(impl NodeSource + Sync),
        sink: &impl NodeSink,
        policy: FlushPolicy,
        changes: &Changes,
    ) -> Result<Self> {
        if changes.is_empty() {
            return Ok(*self);
        }
        let level = root_level(self.pages);
        let root = Writer { nodes, sink, policy, changes }.write(self.root, level, 0, &[])?;
        Ok(Self { root, pages: self.pages })
    }
}

fn collect(
    nodes: &impl NodeSource,
    block: &BlockRef,
    level: u8,
    first: u64,
    start: u64,
    end: u64,
) -> Result<Vec<Run>> {
    let node = nodes.node(block, level, first)?;
    let own: Vec<Run> = clip_runs(&node.runs, start, end).collect();
    if level == 0 {
        return Ok(own);
    }
    let mut below = Vec::new();
    for (index, child) in &node.children {
        let (first, level) = node.child_place(*index);
        if first < end && first + span_pages(level) > start {
            for run in collect(nodes, child, level, first, start, end)? {
                push_run(&mut below, run);
            }
        }
    }
    Ok(overlay(&below, &own))
}

/// Changes are merged into a node before deciding what moves down, as long as its runs stay within
/// this many times the weight allowed.
const MERGE_FACTOR: usize = 4;

/// Writes a changed tree.
struct Writer<'a, N, S> {
    nodes: &'a N,
    sink: &'a S,
    policy: FlushPolicy,
    changes: &'a Changes,
}

impl<N: NodeSource + Sync, S: NodeSink> Writer<'_, N, S> {
    /// Writes the node at `(level, first)` with `inherited` (the runs pushed down from its parent)
    /// and then the changes laid over it. Both may reach beyond the node.
    fn write(
        &self,
        old: Option<BlockRef>,
        level: u8,
        first: u64,
        inherited: &[Run],
    ) -> Result<Option<BlockRef>> {
        if level == 0 {
            let leaf = leaf(self.nodes, old, first, inherited, self.changes)?;
            return leaf.map(|leaf| self.sink.put(leaf)).transpose();
        }
        let mut node = open(self.nodes, old, level, first, inherited)?;
        let weight_max = self.policy.weight_max(level);
        // Many changes are handed down packed: unpacking all at once would take much memory.
        if node.runs.len() + self.changes.count(first, node.end()) <= MERGE_FACTOR * weight_max {
            node.runs = overlay(&node.runs, &self.changes.collect(first, node.end()));
            if weight(&node.runs) > weight_max {
                self.push_down(&mut node, &Changes::default())?;
            }
        } else {
            self.push_down(&mut node, self.changes)?;
        }
        if node.children.is_empty() {
            // Without children, pages that the node does not name are zero anyway.
            node.runs.retain(|run| run.location != Location::Zero);
        }
        if node.runs.is_empty() && node.children.is_empty() {
            return Ok(None);
        }
        self.sink.put(node).map(Some)
    }

    /// Moves the pending runs of `node`, and `changes`, to its children, leaving small groups
    /// where they are.
    fn push_down(&self, node: &mut Node, changes: &Changes) -> Result<()> {
        let pending = std::mem::take(&mut node.runs);
        let child_span = span_pages(node.level - 1);
        let mut moving: Vec<u8> = Vec::new();
        let mut at = next_page(&pending, changes, node.first, node.end());
        while at < node.end() {
            let index = node.child_index(at);
            let (first, _) = node.child_place(index);
            let end = first + child_span;
            let group = clip_runs(&pending, first, end).count() + changes.count(first, end);
            if group < self.policy.group_runs_min {
                let group: Vec<Run> = clip_runs(&pending, first, end).collect();
                let merged = overlay(&group, &changes.collect(first, end));
                // Without a child, pages are zero without being named.
                let there = node.child(index).is_some();
                let needed =
                    merged.into_iter().filter(|run| there || run.location != Location::Zero);
                needed.for_each(|run| push_run(&mut node.runs, run));
            } else {
                moving.push(index);
            }
            // On to the child of the next run, if there is one.
            at = next_page(&pending, changes, end, node.end());
        }
        let below = Writer { changes, ..*self };
        let write = |index: &u8| {
            let (first, level) = node.child_place(*index);
            below.write(node.child(*index).copied(), level, first, &pending)
        };
        // Scattered changes rewrite every leaf: let all threads read, merge and compress.
        let children = moving.par_iter().map(write).collect::<Result<Vec<_>>>()?;
        moving.iter().zip(children).for_each(|(index, child)| set_child(node, *index, child));
        Ok(())
    }
}

/// How much `runs` add to the encoded size of a node, in units of one run. References to frames are
/// much longer than runs: dense pages, with a new frame every few pages, belong in leaves, while
/// scattered pages share frames.
fn weight(runs: &[Run]) -> usize {
    let mut frames = Numbered::default();
    for (frame, _) in runs.iter().filter_map(|run| run.location.block()) {
        frames.number(frame);
    }
    runs.len() + FRAME_WEIGHT * frames.items().len()
}

/// The weight of a frame: its reference is 44 incompressible bytes, a run is about 3.
const FRAME_WEIGHT: usize = 14;

/// The first page in `from .. end` that a pending run or a change names, or `end`.
fn next_page(pending: &[Run], changes: &Changes, from: u64, end: u64) -> u64 {
    let next = clip_runs(pending, from, end).next().into_iter();
    next.chain(changes.view(from, end).next()).map(|run| run.first).min().unwrap_or(end)
}

/// Reads the node at `(level, first)`, or makes an empty one if there is none, and lays `inherited`
/// over it.
fn open(
    nodes: &impl NodeSource,
    old: Option<BlockRef>,
    level: u8,
    first: u64,
    inherited: &[Run],
) -> Result<Node> {
    let mut node = match old {
        Some(block) => Arc::unwrap_or_clone(nodes.node(&block, level, first)?),
        None => Node::empty(level, first),
    };
    let inherited: Vec<Run> = clip_runs(inherited, first, node.end()).collect();
    node.runs = overlay(&node.runs, &inherited);
    Ok(node)
}

/// The leaf at `first` with `inherited` and then `changes` laid over it, or none if it is all zero.
fn leaf(
    nodes: &impl NodeSource,
    old: Option<BlockRef>,
    first: u64,
    inherited: &[Run],
    changes: &Changes,
) -> Result<Option<Node>> {
    let mut leaf = open(nodes, old, 0, first, inherited)?;
    leaf.runs = overlay(&leaf.runs, &changes.collect(first, leaf.end()));
    leaf.runs.retain(|run| run.location != Location::Zero);
    Ok((!leaf.runs.is_empty()).then_some(leaf))
}

fn set_child(node: &mut Node, index: u8, child: Option<BlockRef>) {
    match (node.children.binary_search_by_key(&index, |(index, _)| *index), child) {
        (Ok(position), Some(child)) => node.children[position].1 = child,
        (Ok(position), None) => {
            node.children.remove(position);
        }
        (Err(position), Some(child)) => node.children.insert(position, (index, child)),
        (Err(_), None) => {}
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;
    use crate::changes::tests::changes;
    use crate::id::Hash;
    use crate::node::tests::{explode, frame};

    #[derive(Default)]
    struct Memory {
        nodes: Mutex<HashMap<BlockRef, Arc<Node>>>,
    }

    impl Memory {
        fn put_so_far(&self) -> usize {
            self.nodes.lock().unwrap().len()
        }

        fn apply(&self, tree: &Tree, policy: FlushPolicy, changes: &Changes) -> Tree {
            tree.apply(self, self, policy, changes).unwrap()
        }
    }

    impl NodeSource for Memory {
        fn node(&self, block: &BlockRef, level: u8, first: u64) -> Result<Arc<Node>> {
            let node = Arc::clone(&self.nodes.lock().unwrap()[block]);
            assert_eq!((node.level, node.first), (level, first));
            Ok(node)
        }
    }

    impl NodeSink for Memory {
        fn put(&self, node: Node) -> Result<BlockRef> {
            let bytes = node.encode();
            assert_eq!(Node::decode(&bytes, node.level, node.first).unwrap(), node);
            let mut nodes = self.nodes.lock().unwrap();
            let (offset, hash) = (nodes.len() as u32, Hash::of(&bytes));
            let block = BlockRef { segment: 0, offset, len: 0, hash };
            nodes.insert(block, Arc::new(node));
            Ok(block)
        }
    }

    const PAGES: u64 = 512 * 64 * 3;

    /// Small buffers, so that a few runs reach the leaves.
    const SMALL: FlushPolicy =
        FlushPolicy { above_leaves_weight_max: 6, higher_weight_max: 4, group_runs_min: 2 };

    fn commits() -> impl Strategy<Value = Vec<Vec<(u64, u64, u32, u8)>>> {
        let run = (0..PAGES - 64, 1_u64..40, 0_u32..5, 0_u8..24);
        proptest::collection::vec(proptest::collection::vec(run, 1..25), 1..12)
    }

    fn sorted_runs(parts: Vec<(u64, u64, u32, u8)>) -> Vec<Run> {
        parts.into_iter().fold(Vec::new(), |runs, (first, count, number, slot)| {
            let location = match number {
                0 => Location::Zero,
                number => Location::Frame { frame: frame(number), slot },
            };
            overlay(&runs, &[Run { first, count, location }])
        })
    }

    proptest! {
        #[test]
        fn trees_agree_with_maps_at_every_commit(commits in commits(), probe in 0..PAGES) {
            let memory = Memory::default();
            let mut tree = Tree { root: None, pages: PAGES };
            let mut oracle = BTreeMap::new();
            let mut history = Vec::new();
            for parts in commits {
                let changes = sorted_runs(parts);
                oracle.extend(explode(&changes));
                oracle.retain(|_, location| *location != Location::Zero);
                tree = memory.apply(&tree, SMALL, &self::changes(&changes));
                history.push((tree, oracle.clone()));
            }
            for (tree, oracle) in history {
                let all = tree.runs(&memory, 0, PAGES).unwrap();
                prop_assert_eq!(explode(&all), oracle.clone());
                let part = tree.runs(&memory, probe, probe + 5000).unwrap();
                prop_assert_eq!(explode(&part), oracle.range(probe..probe + 5000).map(|(k, v)| (*k, *v)).collect());
                for page in oracle.keys().copied().chain([probe]) {
                    let expected = oracle.get(&page).copied().unwrap_or(Location::Zero);
                    prop_assert_eq!(tree.page(&memory, page).unwrap(), expected);
                }
            }
        }
    }

    #[test]
    fn a_small_commit_writes_one_node() {
        let memory = Memory::default();
        let tree = Tree { root: None, pages: PAGES };
        let full: Vec<Run> = (0..PAGES / 16)
            .map(|index| Run {
                first: index * 16,
                count: 16,
                location: Location::Frame { frame: frame(index as u32), slot: 0 },
            })
            .collect();
        let tree = memory.apply(&tree, FlushPolicy::of(2048), &changes(&full));
        let before = memory.put_so_far();
        let scattered: Vec<Run> = (0..1000)
            .map(|index| Run {
                first: index * 97,
                count: 1,
                location: Location::Frame { frame: frame(7), slot: 3 },
            })
            .collect();
        memory.apply(&tree, FlushPolicy::of(2048), &changes(&scattered));
        assert_eq!(memory.put_so_far() - before, 1);
    }

    #[test]
    fn zeroed_pages_leave_nothing_behind() {
        let memory = Memory::default();
        let tree = Tree { root: None, pages: 512 };
        let run =
            Run { first: 3, count: 9, location: Location::Frame { frame: frame(1), slot: 0 } };
        let tree = memory.apply(&tree, SMALL, &changes(&[run]));
        let zeros = changes(&[Run { location: Location::Zero, ..run }]);
        let tree = memory.apply(&tree, SMALL, &zeros);
        assert_eq!(tree.root, None);
    }
}
