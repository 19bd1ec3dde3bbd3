//! How the pages of a region are stored: zero, in frames or as deltas.

use std::collections::HashSet;
use std::ops::ControlFlow;

use crate::error::Result;
use crate::node::{Location, Run};
use crate::snapshot::RegionReader;

/// Pages whose runs are looked up at once: 64 MiB of memory.
const PART_PAGES: u64 = 1 << 14;

/// How pages are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// Not at all: the pages are zero.
    Zero,
    /// In frames.
    Whole,
    /// As differences from other pages.
    Delta,
}

/// Neighbouring pages of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRange {
    /// Number of the first page.
    pub first: u64,
    /// Number of pages.
    pub count: u64,
    /// How the pages are stored.
    pub kind: PageKind,
    /// Stored bytes of the distinct frames that hold the pages, which may hold other pages too.
    pub stored_bytes: u64,
}

/// Totals of a region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegionMap {
    /// Pages that are zero.
    pub zero_pages: u64,
    /// Pages in frames.
    pub whole_pages: u64,
    /// Pages stored as differences.
    pub delta_pages: u64,
    /// Distinct frames, plain and delta.
    pub frames: u64,
    /// Stored bytes of these frames.
    pub stored_bytes: u64,
    /// Number of ranges passed to `visit`.
    pub ranges: u64,
}

/// Passes the ranges of `region` to `visit` in order, until it breaks. Reads the tree only, no
/// page contents.
///
/// # Errors
/// [`StoreError::Corrupt`](crate::StoreError::Corrupt) if a node is damaged.
pub fn map(
    region: &RegionReader,
    visit: &mut dyn FnMut(MapRange) -> ControlFlow<()>,
) -> Result<RegionMap> {
    let mut mapper = Mapper {
        seen: HashSet::new(),
        here: HashSet::new(),
        current: None,
        found: RegionMap::default(),
    };
    let mut at = 0;
    for first in (0..region.pages()).step_by(PART_PAGES as usize) {
        let count = PART_PAGES.min(region.pages() - first);
        for run in region.runs(first, count)? {
            let zero = Run { first: at, count: run.first - at, location: Location::Zero };
            if mapper.add(&zero, visit).is_break() || mapper.add(&run, visit).is_break() {
                return Ok(mapper.found);
            }
            at = run.end();
        }
    }
    let zero = Run { first: at, count: region.pages() - at, location: Location::Zero };
    if mapper.add(&zero, visit).is_continue() {
        let _the_last = mapper.flush(visit);
    }
    Ok(mapper.found)
}

struct Mapper {
    /// Frames seen in the region, by segment and offset.
    seen: HashSet<(u32, u32)>,
    /// Frames seen in the current range.
    here: HashSet<(u32, u32)>,
    current: Option<MapRange>,
    found: RegionMap,
}

impl Mapper {
    fn add(
        &mut self,
        run: &Run,
        visit: &mut dyn FnMut(MapRange) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        if run.count == 0 {
            return ControlFlow::Continue(());
        }
        let (kind, pages) = match run.location {
            Location::Zero => (PageKind::Zero, &mut self.found.zero_pages),
            Location::Frame { .. } => (PageKind::Whole, &mut self.found.whole_pages),
            Location::Delta { .. } => (PageKind::Delta, &mut self.found.delta_pages),
        };
        *pages += run.count;
        if self.current.is_none_or(|current| current.kind != kind) {
            self.flush(visit)?;
            self.current = Some(MapRange { first: run.first, count: 0, kind, stored_bytes: 0 });
        }
        let Some(current) = &mut self.current else { return ControlFlow::Continue(()) };
        current.count += run.count;
        if let Some((frame, _)) = run.location.block() {
            let name = (frame.segment, frame.offset);
            if self.here.insert(name) {
                current.stored_bytes += u64::from(frame.len);
            }
            if self.seen.insert(name) {
                self.found.frames += 1;
                self.found.stored_bytes += u64::from(frame.len);
            }
        }
        ControlFlow::Continue(())
    }

    fn flush(&mut self, visit: &mut dyn FnMut(MapRange) -> ControlFlow<()>) -> ControlFlow<()> {
        self.here.clear();
        match self.current.take() {
            Some(range) => {
                self.found.ranges += 1;
                visit(range)
            }
            None => ControlFlow::Continue(()),
        }
    }
}
