//! Reading frames and delta frames: verified, decoded, cached.

use std::sync::Arc;

use crate::codec::{Decoded, Malformed};
use crate::delta::{self, Base};
use crate::error::{Result, StoreError};
use crate::format::{RecordKind, segment_name};
use crate::id::BlockRef;
use crate::node::Location;
use crate::page::{PAGE_SIZE, Page};
use crate::record::VerifiedRecord;
use crate::segment::Physical;
use crate::store::Store;

/// A decoded frame: its pages or, in a delta frame, their differences from their bases.
#[derive(Debug)]
pub(crate) struct Frame {
    /// The pages or differences, one after the other.
    pub pages: Vec<u8>,
    /// The base of each page of a delta frame; empty for a plain frame.
    pub bases: Box<[Base]>,
}

impl Frame {
    /// Decodes a plain frame or, if `delta`, a delta frame.
    pub fn decode(record: &VerifiedRecord<'_>, delta: bool) -> Decoded<Self> {
        if !delta {
            check_frame_len(record.raw_len())?;
            return Ok(Self { pages: record.decode()?, bases: Box::default() });
        }
        let mut pages = record.decode()?;
        let (bases, at) = delta::decode(&pages)?;
        pages.drain(..at);
        Ok(Self { pages, bases: bases.into() })
    }

    /// Number of pages.
    pub fn slots(&self) -> usize {
        self.pages.len() / PAGE_SIZE
    }
}

pub(crate) fn kind_of(delta: bool) -> RecordKind {
    if delta { RecordKind::Delta } else { RecordKind::Frame }
}

/// Checks that a plain frame consists of whole pages, at least one.
pub(crate) fn check_frame_len(raw_len: usize) -> Decoded<()> {
    if raw_len == 0 || !raw_len.is_multiple_of(PAGE_SIZE) {
        return Err(Malformed::new("decoded length", "whole pages", format!("{raw_len} bytes")));
    }
    Ok(())
}

/// A frame as seen through one reference: by the slots of the frame that was first written.
#[derive(Clone, Debug)]
pub(crate) struct FrameView {
    block: BlockRef,
    place: Physical,
    pub frame: Arc<Frame>,
}

impl FrameView {
    pub fn new(block: BlockRef, place: Physical, frame: Arc<Frame>) -> Self {
        Self { block, place, frame }
    }

    /// The bytes of `count` consecutive slots from `slot` on.
    pub fn bytes(&self, slot: u8, count: u64) -> Result<&[u8]> {
        let first = self.index(slot)?;
        // All slots of a run are live, so they stay adjacent wherever they are moved to.
        let last = self.index(slot.saturating_add((count - 1).min(255) as u8))?;
        if last - first + 1 != count as usize {
            return Err(self.damaged(slot, count));
        }
        self.frame
            .pages
            .get(first * PAGE_SIZE..(last + 1) * PAGE_SIZE)
            .ok_or_else(|| self.damaged(slot, count))
    }

    /// The base of slot `slot`, in a delta frame.
    pub fn base(&self, slot: u8) -> Result<Base> {
        let base = self.frame.bases.get(self.index(slot)?);
        base.copied().ok_or_else(|| self.damaged(slot, 1))
    }

    /// The index of slot `slot` in the record that was read.
    fn index(&self, slot: u8) -> Result<usize> {
        let index = self.place.slots.get(slot).map(usize::from);
        index.filter(|index| *index < self.frame.slots()).ok_or_else(|| self.damaged(slot, 1))
    }

    /// The error for slots beyond the frame's end, or that were not kept: damage.
    fn damaged(&self, slot: u8, count: u64) -> StoreError {
        StoreError::Corrupt {
            file: segment_name(self.block.segment),
            offset: u64::from(self.block.offset),
            what: "frame: referenced slots".into(),
            expected: format!("slots {slot} to {}", u64::from(slot) + count),
            found: format!("{} pages, {:?}", self.frame.slots(), self.place.slots),
        }
    }
}

impl Store {
    /// Reads a plain frame or, if `delta`, a delta frame.
    pub(crate) fn frame(&self, block: &BlockRef, delta: bool) -> Result<FrameView> {
        self.reading(|| self.frame_at(block, self.segments.resolve(block)?, delta))
    }

    fn frame_at(&self, block: &BlockRef, place: Physical, delta: bool) -> Result<FrameView> {
        let frame = match self.frames.get(&place.hash) {
            Some(frame) if frame.bases.is_empty() != delta => frame,
            _ => {
                let frame = self
                    .segments
                    .read_at(&place, kind_of(delta), |record| Frame::decode(record, delta))?;
                let frame = Arc::new(frame);
                self.frames.insert(place.hash, Arc::clone(&frame));
                frame
            }
        };
        Ok(FrameView { block: *block, place, frame })
    }

    /// Reads one base page, through the cache of bases.
    pub(crate) fn base_page(&self, base: &Base) -> Result<Arc<Page>> {
        if let Some(page) = self.bases.get(base) {
            return Ok(page);
        }
        let view = self.frame(&base.frame, false)?;
        let page: &Page = view.bytes(base.slot, 1)?.try_into().expect("one slot is one page");
        let page = Arc::new(*page);
        self.bases.insert(*base, Arc::clone(&page));
        Ok(page)
    }

    /// Fills `out` with the pages from `location` on, verified.
    pub(crate) fn read_location(&self, location: &Location, out: &mut [u8]) -> Result<()> {
        let count = (out.len() / PAGE_SIZE) as u64;
        match *location {
            Location::Zero => out.fill(0),
            Location::Frame { frame, slot } => {
                if slot == 0 && count > 1 && self.read_whole_frame(&frame, out)? {
                    return Ok(());
                }
                out.copy_from_slice(self.frame(&frame, false)?.bytes(slot, count)?);
            }
            Location::Delta { frame, slot } => {
                let view = self.frame(&frame, true)?;
                out.copy_from_slice(view.bytes(slot, count)?);
                for (slot, page) in (slot..).zip(out.chunks_exact_mut(PAGE_SIZE)) {
                    self.add_base(&view.base(slot)?, page)?;
                }
            }
        }
        Ok(())
    }

    fn add_base(&self, base: &Base, page: &mut [u8]) -> Result<()> {
        let view = self.frame(&base.frame, false)?;
        delta::xor(page, view.bytes(base.slot, 1)?);
        Ok(())
    }

    /// Decodes a plain frame straight into `out`, without adding it to the cache, if it is exactly
    /// as long as `out` and was not regrouped. Returns false otherwise, with `out` untouched.
    fn read_whole_frame(&self, block: &BlockRef, out: &mut [u8]) -> Result<bool> {
        self.reading(|| {
            let place = self.segments.resolve(block)?;
            if place.slots != crate::pack::SlotMap::Identity {
                return Ok(false);
            }
            if let Some(frame) = self.frames.get(&place.hash) {
                let whole = frame.bases.is_empty() && frame.pages.len() == out.len();
                if whole {
                    out.copy_from_slice(&frame.pages);
                }
                return Ok(whole);
            }
            self.segments.read_at(&place, RecordKind::Frame, |record| {
                check_frame_len(record.raw_len())?;
                if record.raw_len() != out.len() {
                    return Ok(false);
                }
                record.decode_into(out).map(|()| true)
            })
        })
    }
}
