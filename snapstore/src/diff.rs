//! Differences between two snapshots: walks two trees side by side and skips equal subtrees.

use std::collections::HashSet;

use serde::Serialize;

use crate::error::{Result, StoreError};
use crate::id::BlockRef;
use crate::manifest::{RegionManifest, StateChunk, StateRef};
use crate::node::{
    Location, Node, Run, clip_runs, find_page, overlay, push_run, root_level, span_pages,
};
use crate::page::{PAGE_SIZE, Page};
use crate::snapshot::Snapshot;
use crate::store::Store;
use crate::tree::{NodeSource, Tree};

/// How to compare snapshots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiffOptions {
    /// Compare contents, so that pages rewritten with the same contents do not count. Otherwise,
    /// pages differ if they are stored in different places, and only trees are read.
    pub exact: bool,
}

/// What differs between snapshot A and snapshot B.
#[derive(Clone, Debug, PartialEq)]
pub struct SnapshotDiff {
    /// All regions of either snapshot: first B's, in its order, then those that only A has.
    pub regions: Vec<RegionDiff>,
    /// State chunks that differ.
    pub state: Vec<StateDiff>,
}

/// What differs in one region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionDiff {
    /// The region's name.
    pub name: String,
    /// Its size in pages in A; none if A does not have it.
    pub pages_a: Option<u64>,
    /// The same for B.
    pub pages_b: Option<u64>,
    /// Number of pages that differ; in a region that only one has, those that are not zero.
    pub changed_pages: u64,
    /// Stored bytes of the distinct frames that hold B's version of these pages.
    pub stored_bytes: u64,
    /// The pages that differ, ascending.
    pub ranges: Vec<PageRange>,
}

/// Neighbouring pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PageRange {
    /// Number of the first page.
    pub first: u64,
    /// Number of pages.
    pub count: u64,
}

/// A state chunk that differs, or that only one has.
#[derive(Clone, Debug, PartialEq)]
pub struct StateDiff {
    /// The chunk's name.
    pub name: String,
    /// The chunk in A.
    pub a: Option<StateChunk>,
    /// The chunk in B.
    pub b: Option<StateChunk>,
}

/// Compares `a` with `b`, which must be in the same store. Takes time in proportion to what
/// differs, not to the size of the snapshots.
///
/// # Errors
/// [`StoreError::Invalid`] if they are in different stores; [`StoreError::Corrupt`] if something
/// that must be read is damaged.
pub fn diff(a: &Snapshot, b: &Snapshot, options: DiffOptions) -> Result<SnapshotDiff> {
    of_one_store(a, b)?;
    let (ours, theirs) = (&b.manifest().regions, &a.manifest().regions);
    let only_a = theirs.iter().filter(|region| b.manifest().region(&region.name).is_none());
    let regions = ours
        .iter()
        .map(|region| (a.manifest().region(&region.name), Some(region)))
        .chain(only_a.map(|region| (Some(region), None)))
        .map(|(in_a, in_b)| compare_region(b.store(), in_a, in_b, (options, a.written_at)))
        .collect::<Result<Vec<_>>>()?;
    Ok(SnapshotDiff { regions, state: diff_state(a, b)? })
}

fn of_one_store(a: &Snapshot, b: &Snapshot) -> Result<()> {
    if a.store().uuid == b.store().uuid {
        return Ok(());
    }
    Err(StoreError::Invalid(format!(
        "expected two snapshots of the same store, found {} and {}",
        a.store().describe(),
        b.store().describe()
    )))
}

/// Compares region `name` alone. In a region that only one of the snapshots has, all pages that are
/// not zero differ.
///
/// # Errors
/// As [`diff`]; [`StoreError::Invalid`] if neither has such a region.
pub fn diff_region(
    a: &Snapshot,
    b: &Snapshot,
    name: &str,
    options: DiffOptions,
) -> Result<RegionDiff> {
    of_one_store(a, b)?;
    let (in_a, in_b) = (a.manifest().region(name), b.manifest().region(name));
    if in_a.is_none() {
        // If B has no such region either, this fails, and the error lists B's regions.
        b.region(name)?;
    }
    compare_region(b.store(), in_a, in_b, (options, a.written_at))
}

fn diff_state(a: &Snapshot, b: &Snapshot) -> Result<Vec<StateDiff>> {
    let (ours, theirs) = (&b.manifest().state, &a.manifest().state);
    let find =
        |list: &[StateRef], name: &str| list.iter().find(|chunk| chunk.name == name).cloned();
    let only_a = theirs.iter().filter(|chunk| find(ours, &chunk.name).is_none()).cloned();
    let pairs = ours
        .iter()
        .map(|chunk| (find(theirs, &chunk.name), Some(chunk.clone())))
        .chain(only_a.map(|chunk| (Some(chunk), None)));
    let mut out = Vec::new();
    for (in_a, in_b) in pairs.filter(|(in_a, in_b)| in_a != in_b) {
        let read = |snapshot: &Snapshot, chunk: Option<&StateRef>| {
            chunk.map(|chunk| snapshot.state(chunk)).transpose()
        };
        let (old, new) = (read(a, in_a.as_ref())?, read(b, in_b.as_ref())?);
        // Equal state may be stored twice.
        if old != new {
            let name = in_b.or(in_a).map(|chunk| chunk.name).unwrap_or_default();
            out.push(StateDiff { name, a: old, b: new });
        }
    }
    Ok(out)
}

fn compare_region(
    store: &Store,
    a: Option<&RegionManifest>,
    b: Option<&RegionManifest>,
    (options, a_written_at): (DiffOptions, (u32, u32)),
) -> Result<RegionDiff> {
    let pages = |region: Option<&RegionManifest>| region.map(|region| region.pages);
    let most = pages(a).max(pages(b)).unwrap_or(0);
    let level = root_level(most);
    let mut walk = Walk {
        store,
        options,
        a_written_at,
        pages: most,
        ranges: Vec::new(),
        frames: HashSet::new(),
    };
    let (left, right) = (side(store, a, level)?, side(store, b, level)?);
    walk.compare(&left, &right, level, 0)?;
    Ok(RegionDiff {
        name: b.or(a).map(|region| region.name.clone()).unwrap_or_default(),
        pages_a: pages(a),
        pages_b: pages(b),
        changed_pages: walk.ranges.iter().map(|range| range.count).sum(),
        stored_bytes: walk.frames.iter().map(|frame| u64::from(frame.len)).sum(),
        ranges: walk.ranges,
    })
}

/// A subtree on one side: its node, if there is one, and the pending runs above that override it.
#[derive(Clone, Debug, Default)]
struct Side {
    node: Option<BlockRef>,
    pending: Vec<Run>,
}

/// The root of a region as a subtree of `level`, which is above the region's own level if the other
/// side's region is larger.
fn side(store: &Store, region: Option<&RegionManifest>, level: u8) -> Result<Side> {
    let Some(region) = region else { return Ok(Side::default()) };
    if root_level(region.pages) == level {
        return Ok(Side { node: region.root, pending: Vec::new() });
    }
    // Regions keep their size within a line, so this only happens with unrelated snapshots.
    let tree = Tree { root: region.root, pages: region.pages };
    Ok(Side { node: None, pending: tree.runs(store, 0, region.pages)? })
}

struct Walk<'a> {
    store: &'a Store,
    options: DiffOptions,
    /// Where A's manifest was written: A refers to nothing written later.
    a_written_at: (u32, u32),
    pages: u64,
    ranges: Vec<PageRange>,
    frames: HashSet<BlockRef>,
}

impl Walk<'_> {
    fn compare(&mut self, a: &Side, b: &Side, level: u8, first: u64) -> Result<()> {
        let end = (first + span_pages(level)).min(self.pages);
        if a.node.is_none() && b.node.is_none() {
            // Only pending runs are left, in which zeros mean nothing: there is nothing to
            // override.
            let named = |side: &Side| {
                let mut runs = side.pending.clone();
                runs.retain(|run| run.location != Location::Zero);
                runs
            };
            let (a, b) = (named(a), named(b));
            let both = covered(&without(&a, &b), &without(&b, &a));
            for page in both.iter().flat_map(|run| run.first..run.end()).filter(|page| *page < end)
            {
                let find = |runs: &[Run]| find_page(runs, page).unwrap_or(Location::Zero);
                self.page(page, find(&a), find(&b))?;
            }
            return Ok(());
        }
        if a.node == b.node {
            // The same node: pages can only differ where the pending runs do.
            let (only_a, only_b) =
                (without(&a.pending, &b.pending), without(&b.pending, &a.pending));
            for run in covered(&only_a, &only_b) {
                for page in run.first..run.end() {
                    let find = |side: &Side| self.locate(side, level, first, page);
                    let new = find(b)?;
                    // Usually there is no need to look up the page in A.
                    let old = if self.is_news(&new) { Location::Zero } else { find(a)? };
                    self.page(page, old, new)?;
                }
            }
            return Ok(());
        }
        let (a, b) = (self.open(a, level, first)?, self.open(b, level, first)?);
        if level == 0 {
            let both = covered(&without(&a.runs, &b.runs), &without(&b.runs, &a.runs));
            for page in both.iter().flat_map(|run| run.first..run.end()).filter(|page| *page < end)
            {
                let find = |node: &Node| find_page(&node.runs, page).unwrap_or(Location::Zero);
                self.page(page, find(&a), find(&b))?;
            }
            return Ok(());
        }
        for index in 0..64 {
            let (first, level) = a.child_place(index);
            let end = first + span_pages(level);
            let pending = |node: &Node| clip_runs(&node.runs, first, end).collect();
            let (left, right) = (a.child(index).copied(), b.child(index).copied());
            // Most children are equal, and so are the runs that override them.
            if left == right && clip_runs(&a.runs, first, end).eq(clip_runs(&b.runs, first, end)) {
                continue;
            }
            let (left, right) = (
                Side { node: left, pending: pending(&a) },
                Side { node: right, pending: pending(&b) },
            );
            self.compare(&left, &right, level, first)?;
        }
        Ok(())
    }

    /// Reads the node of a side, and lays the pending runs over it.
    fn open(&self, side: &Side, level: u8, first: u64) -> Result<Node> {
        let mut node = match &side.node {
            Some(block) => (*self.store.node(block, level, first)?).clone(),
            None => Node::empty(level, first),
        };
        node.runs = overlay(&node.runs, &side.pending);
        Ok(node)
    }

    fn locate(&self, side: &Side, level: u8, first: u64, page: u64) -> Result<Location> {
        match find_page(&side.pending, page) {
            Some(location) => Ok(location),
            None => Tree::page_below(self.store, side.node, level, first, page),
        }
    }

    /// True if `location` was written after A, so that A must have the page elsewhere. Always false
    /// for an exact comparison, which needs A's page.
    fn is_news(&self, location: &Location) -> bool {
        let written_at = location.block().map(|(frame, _)| (frame.segment, frame.offset));
        !self.options.exact && written_at.is_some_and(|place| place > self.a_written_at)
    }

    fn page(&mut self, page: u64, old: Location, new: Location) -> Result<()> {
        if old == new || (self.options.exact && self.same_contents(&old, &new)?) {
            return Ok(());
        }
        match self.ranges.last_mut() {
            Some(last) if last.first + last.count == page => last.count += 1,
            _ => self.ranges.push(PageRange { first: page, count: 1 }),
        }
        self.frames.extend(new.block().map(|(frame, _)| frame));
        Ok(())
    }

    fn same_contents(&self, old: &Location, new: &Location) -> Result<bool> {
        let mut pages: [Page; 2] = [[0; PAGE_SIZE]; 2];
        let [a, b] = &mut pages;
        self.store.read_location(old, a)?;
        self.store.read_location(new, b)?;
        Ok(a == b)
    }
}

/// The parts of sorted `runs` for which `others` have no equal location.
fn without(runs: &[Run], others: &[Run]) -> Vec<Run> {
    let mut out = Vec::new();
    let mut others = others.iter().peekable();
    for run in runs {
        while others.next_if(|other| other.end() <= run.first).is_some() {}
        let mut rest = Some(*run);
        let mut overlapping = others.clone();
        while let (Some(left), Some(other)) =
            (rest, overlapping.next_if(|other| other.first < run.end()))
        {
            let Some(common) = other.clip(left.first, left.end()) else { continue };
            if left.clip(common.first, common.end()).is_some_and(|same| same == common) {
                out.extend(left.clip(0, common.first));
                rest = left.clip(common.end(), u64::MAX);
            }
        }
        out.extend(rest);
    }
    out
}

/// The pages in either of two sorted lists of runs.
fn covered(a: &[Run], b: &[Run]) -> Vec<Run> {
    let blank = |runs: &[Run]| {
        let mut out = Vec::with_capacity(runs.len());
        runs.iter().for_each(|run| push_run(&mut out, Run { location: Location::Zero, ..*run }));
        out
    };
    overlay(&blank(a), &blank(b))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::node::tests::{explode, runs};

    proptest! {
        #[test]
        fn equal_parts_are_left_out(a in runs(512), changes in runs(512), keep in any::<bool>()) {
            // Related lists, like those of a snapshot and its parent.
            let b = if keep { overlay(&a, &changes) } else { changes };
            let mut expected = explode(&a);
            let other = explode(&b);
            expected.retain(|page, location| other.get(page) != Some(location));
            prop_assert_eq!(explode(&without(&a, &b)), expected);
        }
    }
}
