//! Nodes of a page tree, and the runs they are made of.
//!
//! A leaf holds runs of pages. An inner node holds references to its children and, like a node of
//! a Bε-tree, *pending* runs that override the children: a small commit rewrites only the root, and
//! changes move down in batches large enough to be worth rewriting a child for.

use crate::codec::{Decoded, Decoder, Malformed, put_block_ref, put_varint};
use crate::format::MAX_FRAME_PAGES;
use crate::id::BlockRef;
use crate::numbered::Numbered;

/// Pages under one leaf: 2 MiB of memory.
pub(crate) const LEAF_PAGES: u64 = 512;
/// Children of an inner node.
pub(crate) const FAN_OUT: u64 = 64;
/// The highest level a node can have; it spans 2^45 pages (128 PiB).
pub(crate) const MAX_LEVEL: u8 = 6;

const _: () = assert!(LEAF_PAGES.is_power_of_two() && FAN_OUT == u64::BITS as u64);

/// Where the contents of a page are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// Nowhere: the page is all zero.
    Zero,
    /// In slot `slot` (counted in pages) of a frame.
    Frame {
        /// The frame's record.
        frame: BlockRef,
        /// The page's place in the decoded frame.
        slot: u8,
    },
    /// In slot `slot` of a delta frame, as the difference from a page of a plain frame.
    Delta {
        /// The delta frame's record.
        frame: BlockRef,
        /// The page's place in the decoded frame.
        slot: u8,
    },
}

impl Location {
    /// The frame or delta frame, and the slot there; none for zero pages.
    #[must_use]
    pub fn block(&self) -> Option<(BlockRef, u8)> {
        match *self {
            Self::Zero => None,
            Self::Frame { frame, slot } | Self::Delta { frame, slot } => Some((frame, slot)),
        }
    }

    /// The location `pages` further on in the same run.
    fn advance(self, pages: u64) -> Self {
        match self {
            Self::Zero => Self::Zero,
            Self::Frame { frame, slot } => Self::Frame { frame, slot: slot + pages as u8 },
            Self::Delta { frame, slot } => Self::Delta { frame, slot: slot + pages as u8 },
        }
    }
}

/// `count` pages from page `first` on that are in consecutive slots of one frame, or all zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Number of the first page in its region.
    pub first: u64,
    /// How many pages, at least one.
    pub count: u64,
    /// Where the first page is; the others are in the slots that follow.
    pub location: Location,
}

impl Run {
    /// The page after the last.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.first + self.count
    }

    /// The part of the run inside `start .. end`, if any.
    pub(crate) fn clip(&self, start: u64, end: u64) -> Option<Self> {
        let first = self.first.max(start);
        let end = self.end().min(end);
        (first < end).then(|| Self {
            first,
            count: end - first,
            location: self.location.advance(first - self.first),
        })
    }

    fn is_followed_by(&self, next: &Self) -> bool {
        self.end() == next.first && self.location.advance_fits(self.count, next.location)
    }
}

impl Location {
    fn advance_fits(self, pages: u64, next: Self) -> bool {
        match (self, next) {
            (Self::Zero, Self::Zero) => true,
            (Self::Frame { frame: a, slot }, Self::Frame { frame: b, slot: next })
            | (Self::Delta { frame: a, slot }, Self::Delta { frame: b, slot: next }) => {
                a == b && u64::from(slot) + pages == u64::from(next)
            }
            _ => false,
        }
    }
}

/// Appends `run` to sorted `runs`, merging it into the last one if it continues that one.
pub(crate) fn push_run(runs: &mut Vec<Run>, run: Run) {
    if let Some(last) = runs.last_mut()
        && last.is_followed_by(&run)
    {
        last.count += run.count;
        return;
    }
    runs.push(run);
}

/// Lays `newer` over `older`. Both must be sorted and without overlaps, and so is the result.
pub(crate) fn overlay(older: &[Run], newer: &[Run]) -> Vec<Run> {
    if older.is_empty() {
        return newer.to_vec();
    }
    let mut out = Vec::with_capacity(older.len() + newer.len());
    let mut old = older.iter().copied();
    let mut current = old.next();
    for run in newer {
        // Keep the older runs as far as they lie before this one.
        while let Some(older_run) = current {
            if let Some(before) = older_run.clip(0, run.first) {
                push_run(&mut out, before);
            }
            current = older_run.clip(run.first, u64::MAX);
            if current.is_some() {
                break;
            }
            current = old.next();
        }
        push_run(&mut out, *run);
        // Skip what this one covers.
        while let Some(older_run) = current {
            current = older_run.clip(run.end(), u64::MAX);
            if current.is_some() {
                break;
            }
            current = old.next();
        }
    }
    while let Some(run) = current {
        push_run(&mut out, run);
        current = old.next();
    }
    out
}

/// The parts of sorted `runs` inside `start .. end`.
pub(crate) fn clip_runs(runs: &[Run], start: u64, end: u64) -> impl Iterator<Item = Run> + '_ {
    let from = runs.partition_point(|run| run.end() <= start);
    runs[from..]
        .iter()
        .take_while(move |run| run.first < end)
        .filter_map(move |run| run.clip(start, end))
}

/// The location of `page`, if one of the sorted `runs` holds it.
pub(crate) fn find_page(runs: &[Run], page: u64) -> Option<Location> {
    clip_runs(runs, page, page + 1).next().map(|run| run.location)
}

/// Pages under a node of `level` (0 is a leaf).
pub(crate) const fn span_pages(level: u8) -> u64 {
    LEAF_PAGES * FAN_OUT.pow(level as u32)
}

/// The level of the root of a region of `pages` pages.
pub(crate) fn root_level(pages: u64) -> u8 {
    (0..MAX_LEVEL).find(|level| span_pages(*level) >= pages).unwrap_or(MAX_LEVEL)
}

/// The most pages a region may range over: what a root of the highest level spans.
pub const MAX_REGION_PAGES: u64 = span_pages(MAX_LEVEL);

/// A node in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    /// 0 for a leaf.
    pub level: u8,
    /// Number of the first page under the node.
    pub first: u64,
    /// Sorted runs: a leaf's contents, an inner node's pending changes.
    pub runs: Vec<Run>,
    /// `(index, child)`, sorted by index; none in a leaf.
    pub children: Vec<(u8, BlockRef)>,
}

impl Node {
    pub fn empty(level: u8, first: u64) -> Self {
        Self { level, first, runs: Vec::new(), children: Vec::new() }
    }

    /// The page after the last one under the node.
    pub fn end(&self) -> u64 {
        self.first + span_pages(self.level)
    }

    pub fn child(&self, index: u8) -> Option<&BlockRef> {
        self.children
            .binary_search_by_key(&index, |(index, _)| *index)
            .ok()
            .map(|position| &self.children[position].1)
    }

    /// First page and level of child `index`.
    pub fn child_place(&self, index: u8) -> (u64, u8) {
        let level = self.level - 1;
        (self.first + u64::from(index) * span_pages(level), level)
    }

    /// The index of the child that holds `page`.
    pub fn child_index(&self, page: u64) -> u8 {
        ((page - self.first) / span_pages(self.level - 1)) as u8
    }

    /// Layout: level (1 byte), first page, numbers of frames, delta frames and runs (varints),
    /// references to frames and to delta frames; then, for all runs, the gaps to the end of the
    /// previous run (varints), the counts (varints), the frames (varints: 0 for zero pages, else
    /// the zigzag distance from the frame of the previous run that has one, plus 1), and, for runs
    /// with a frame, the slots (1 byte: the zigzag distance from where the last run in that frame
    /// ended); in inner nodes, the bit map of children (8 bytes) and their references.
    ///
    /// Fields are stored by column and as distances because pending runs are mostly single pages
    /// that take slot after slot of their frames: all columns but the gaps then compress to almost
    /// nothing.
    pub fn encode(&self) -> Vec<u8> {
        let table = FrameTable::of(&self.runs);
        let mut out = Vec::with_capacity(
            32 + table.len() * 44 + self.runs.len() * 6 + self.children.len() * 44,
        );
        out.push(self.level);
        put_varint(&mut out, self.first);
        let (frames, deltas) = (table.frames.items(), table.deltas.items());
        put_varint(&mut out, frames.len() as u64);
        put_varint(&mut out, deltas.len() as u64);
        put_varint(&mut out, self.runs.len() as u64);
        frames.iter().chain(deltas).for_each(|frame| put_block_ref(&mut out, frame));
        let mut end = self.first;
        for run in &self.runs {
            put_varint(&mut out, run.first - end);
            end = run.end();
        }
        self.runs.iter().for_each(|run| put_varint(&mut out, run.count));
        let mut slots = Vec::with_capacity(self.runs.len());
        let mut places = Places::new(table.len());
        for (run, place) in self.runs.iter().zip(table.places()) {
            let (frame, slot) = places.encode(place, run.count);
            put_varint(&mut out, frame);
            slots.extend(slot);
        }
        out.extend_from_slice(&slots);
        if self.level > 0 {
            let map = self.children.iter().fold(0_u64, |map, (index, _)| map | 1 << index);
            out.extend_from_slice(&map.to_le_bytes());
            self.children.iter().for_each(|(_, child)| put_block_ref(&mut out, child));
        }
        out
    }

    pub fn decode(bytes: &[u8], level: u8, first: u64) -> Decoded<Self> {
        let mut decoder = Decoder::new(bytes);
        let found = (decoder.u8("level")?, decoder.varint("first page")?);
        if found != (level, first) {
            let expected = format!("level {level} at page {first}");
            return Err(Malformed::new(
                "place of the node",
                expected,
                format!("level {} at page {}", found.0, found.1),
            ));
        }
        let mut node = Self::empty(level, first);
        let frame_count = decoder.varint("number of frames")?;
        let delta_count = decoder.varint("number of delta frames")?;
        let run_count = decoder.varint("number of runs")?;
        let most = bytes.len() as u64;
        let table_len = frame_count.saturating_add(delta_count);
        if table_len > most / BlockRef::ENCODED_LEN as u64 || run_count > most / 3 {
            return Err(Malformed::new(
                "counts",
                format!("no more than fit in {most} bytes"),
                format!("{frame_count} frames, {delta_count} delta frames, {run_count} runs"),
            ));
        }
        let mut refs = |count: u64, what| {
            (0..count).map(|_| decoder.block_ref(what)).collect::<Decoded<Vec<_>>>()
        };
        let (frames, deltas) = (refs(frame_count, "frame")?, refs(delta_count, "delta frame")?);
        node.runs = decode_runs(&mut decoder, run_count as usize, (first, node.end()))?;
        decode_locations(&mut decoder, &mut node.runs, &frames, &deltas)?;
        if level > 0 {
            let map = decoder.u64("map of children")?;
            for index in (0..64_u8).filter(|index| map >> index & 1 == 1) {
                node.children.push((index, decoder.block_ref("child")?));
            }
        }
        decoder.finish("node")?;
        Ok(node)
    }
}

/// Decodes the pages of `count` runs inside the pages `place.0 .. place.1`; their locations follow
/// in the encoding and are left zero here.
fn decode_runs(decoder: &mut Decoder<'_>, count: usize, place: (u64, u64)) -> Decoded<Vec<Run>> {
    let mut runs = Vec::with_capacity(count);
    for _ in 0..count {
        let first = decoder.varint("gap between runs")?;
        runs.push(Run { first, count: 0, location: Location::Zero });
    }
    let (mut end, limit) = place;
    for run in &mut runs {
        run.count = decoder.varint("length of a run")?;
        let first = end.checked_add(run.first).filter(|first| *first < limit);
        run.first = first.ok_or_else(|| {
            Malformed::new("first page of a run", format!("below {limit}"), run.first)
        })?;
        if run.count == 0 || run.count > limit - run.first {
            let most = limit - run.first;
            return Err(Malformed::new("length of a run", format!("1 to {most}"), run.count));
        }
        end = run.end();
    }
    Ok(runs)
}

fn decode_locations(
    decoder: &mut Decoder<'_>,
    runs: &mut [Run],
    frames: &[BlockRef],
    deltas: &[BlockRef],
) -> Decoded<()> {
    let numbers = runs.iter().map(|_| decoder.varint("frame of a run"));
    let numbers = numbers.collect::<Decoded<Vec<_>>>()?;
    let table_len = frames.len() + deltas.len();
    let mut places = Places::new(table_len);
    for (run, number) in runs.iter_mut().zip(numbers) {
        // 0 stands for zero pages, which the run says already.
        let Some(distance) = number.checked_sub(1) else { continue };
        let index = places.index(distance).ok_or_else(|| {
            Malformed::new("frame of a run", format!("one of {table_len} frames"), number)
        })?;
        let slot = places.slot(index, decoder.u8("slot of a run")?, run.count);
        let slot = slot.ok_or_else(|| {
            Malformed::new(
                "slots of a run",
                format!("to end within {MAX_FRAME_PAGES}"),
                format!("a run of {}", run.count),
            )
        })?;
        run.location = match frames.get(index) {
            Some(&frame) => Location::Frame { frame, slot },
            None => Location::Delta { frame: deltas[index - frames.len()], slot },
        };
    }
    Ok(())
}

/// Predicts where the next run is: in the frame of the previous run, after its last slot used.
struct Places {
    last: usize,
    next_slots: Vec<u8>,
}

impl Places {
    fn new(frames: usize) -> Self {
        Self { last: 0, next_slots: vec![0; frames] }
    }

    /// The encoded frame number and slot byte of a run; 0 and none for zero pages.
    fn encode(&mut self, place: Option<(usize, u8)>, count: u64) -> (u64, Option<u8>) {
        let Some((index, slot)) = place else { return (0, None) };
        let frame = 1 + zigzag(index as i64 - self.last as i64);
        let slot_distance = zigzag(i64::from(slot) - i64::from(self.next_slots[index]));
        self.last = index;
        self.next_slots[index] = slot + count as u8;
        (frame, Some(slot_distance as u8))
    }

    /// The index of the frame at this zigzag distance from the last one, if there is such a frame.
    fn index(&mut self, distance: u64) -> Option<usize> {
        let index = usize::try_from((self.last as i64).checked_add(unzigzag(distance))?).ok()?;
        self.last = index;
        (index < self.next_slots.len()).then_some(index)
    }

    /// The slot that `byte` stands for in frame `index`, if `count` slots from there on fit in it.
    fn slot(&mut self, index: usize, byte: u8, count: u64) -> Option<u8> {
        let slot = i64::from(self.next_slots[index]) + unzigzag(u64::from(byte));
        let slot = u8::try_from(slot).ok()?;
        let end =
            u64::from(slot).checked_add(count).filter(|end| *end <= MAX_FRAME_PAGES as u64)?;
        self.next_slots[index] = end as u8;
        Some(slot)
    }
}

/// Maps numbers near zero, of either sign, to small unsigned ones.
fn zigzag(number: i64) -> u64 {
    (number << 1 ^ number >> 63) as u64
}

fn unzigzag(number: u64) -> i64 {
    (number >> 1) as i64 ^ -((number & 1) as i64)
}

/// The distinct frames and delta frames that runs refer to, each in order of first use.
#[derive(Default)]
struct FrameTable {
    frames: Numbered<BlockRef>,
    deltas: Numbered<BlockRef>,
    /// For each run, the index of its frame in its list, and the slot.
    used: Vec<Used>,
}

#[derive(Clone, Copy)]
enum Used {
    None,
    Frame(usize, u8),
    Delta(usize, u8),
}

impl FrameTable {
    fn of(runs: &[Run]) -> Self {
        let mut table = Self { used: Vec::with_capacity(runs.len()), ..Self::default() };
        for run in runs {
            table.used.push(match run.location {
                Location::Zero => Used::None,
                Location::Frame { frame, slot } => {
                    Used::Frame(table.frames.number(frame) as usize, slot)
                }
                Location::Delta { frame, slot } => {
                    Used::Delta(table.deltas.number(frame) as usize, slot)
                }
            });
        }
        table
    }

    fn len(&self) -> usize {
        self.frames.items().len() + self.deltas.items().len()
    }

    /// For each run, the index of its frame in the encoded table (delta frames after plain ones)
    /// and the slot.
    fn places(&self) -> impl Iterator<Item = Option<(usize, u8)>> + '_ {
        self.used.iter().map(|used| match *used {
            Used::None => None,
            Used::Frame(index, slot) => Some((index, slot)),
            Used::Delta(index, slot) => Some((self.frames.items().len() + index, slot)),
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::id::Hash;

    pub fn frame(number: u32) -> BlockRef {
        BlockRef {
            segment: number % 3,
            offset: number * 100,
            len: 50 + number,
            hash: Hash::of(&number.to_le_bytes()),
        }
    }

    /// Sorted runs without overlaps inside `0 .. limit`.
    pub fn runs(limit: u64) -> impl Strategy<Value = Vec<Run>> {
        proptest::collection::vec((0_u64..40, 1_u64..20, 0_u32..6, 0_u8..40), 0..30).prop_map(
            move |parts| {
                let mut out = Vec::new();
                let mut end = 0;
                for (gap, count, number, slot) in parts {
                    let first = end + gap;
                    if first + count > limit {
                        break;
                    }
                    end = first + count;
                    let location = match number {
                        0 => Location::Zero,
                        number if number % 3 == 0 => Location::Delta { frame: frame(number), slot },
                        number => Location::Frame { frame: frame(number), slot },
                    };
                    out.push(Run { first, count, location });
                }
                out
            },
        )
    }

    pub fn explode(runs: &[Run]) -> BTreeMap<u64, Location> {
        runs.iter()
            .flat_map(|run| {
                (0..run.count).map(|index| (run.first + index, run.location.advance(index)))
            })
            .collect()
    }

    proptest! {
        #[test]
        fn overlay_agrees_with_maps(older in runs(512), newer in runs(512), start in 0_u64..512, len in 0_u64..512) {
            let mut oracle = explode(&older);
            oracle.extend(explode(&newer));
            let merged = overlay(&older, &newer);
            prop_assert!(merged.windows(2).all(|pair| pair[0].end() <= pair[1].first));
            prop_assert_eq!(explode(&merged), oracle.clone());
            let clipped: Vec<_> = clip_runs(&merged, start, start + len).collect();
            prop_assert_eq!(explode(&clipped), oracle.range(start..start + len).map(|(k, v)| (*k, *v)).collect());
            for page in 0..520 {
                prop_assert_eq!(find_page(&merged, page), oracle.get(&page).copied());
            }
        }

        #[test]
        fn nodes_round_trip(runs in runs(512), inner in any::<bool>(), children in proptest::collection::btree_map(0_u8..64, 0_u32..9, 0..64)) {
            let mut node = Node::empty(u8::from(inner), 0);
            node.runs = runs;
            if inner {
                node.children = children.into_iter().map(|(index, number)| (index, frame(number))).collect();
            }
            let bytes = node.encode();
            prop_assert_eq!(Node::decode(&bytes, node.level, 0), Ok(node));
        }

        #[test]
        fn damaged_nodes_parse_or_fail(runs in runs(512), position in any::<prop::sample::Index>(), value in any::<u8>(), cut in any::<prop::sample::Index>()) {
            let mut node = Node::empty(0, 0);
            node.runs = runs;
            let mut bytes = node.encode();
            let at = position.index(bytes.len());
            bytes[at] = value;
            let _any = Node::decode(&bytes, 0, 0);
            let _any = Node::decode(&bytes[..cut.index(bytes.len())], 0, 0);
        }
    }

    #[test]
    fn levels_span_what_they_should() {
        assert_eq!(root_level(1), 0);
        assert_eq!(root_level(512), 0);
        assert_eq!(root_level(513), 1);
        assert_eq!(root_level(1 << 18), 2);
        assert_eq!(root_level(span_pages(3)), 3);
        assert_eq!(root_level(MAX_REGION_PAGES), MAX_LEVEL);
    }
}
