//! The bytes of a disk: overlay over base, chunk by chunk, and what a checkpoint has frozen.
//!
//! A chunk of 64 pages is one word of every set and changes under one lock, which it shares with
//! every 64th other chunk. Readers share the lock. I/O is done while holding it, for one chunk at a
//! time.

use std::collections::hash_map::Entry;
use std::io;
use std::ops::Range;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use frazil_snapstore::{PAGE_SIZE, Page, is_zero};

use super::PAGE_BYTES;
use super::base::Base;
use super::freeze::{Freeze, Kept, KeptPages, KeptRoom};
use super::overlay::Overlay;
use super::pages::{CHUNK_PAGES, mask};
use crate::dirty::{WrittenPages, bits};

const STRIPES: u64 = 64;
const CHUNK_BYTES: u64 = CHUNK_PAGES * PAGE_BYTES;

#[derive(Debug)]
pub(super) struct Contents {
    pub(super) len_bytes: u64,
    base: Base,
    overlay: Overlay,
    pub(super) dirty: WrittenPages,
    stripes: Vec<RwLock<KeptPages>>,
    room: KeptRoom,
    /// Locked after a stripe, never before one.
    freeze: RwLock<Freeze>,
}

/// The part of a request that lies in one chunk.
struct Part {
    chunk: u64,
    /// Where it begins on the disk.
    offset: u64,
    /// Where it is in the request.
    within: Range<usize>,
}

impl Part {
    /// Returns the bits of the pages that the part touches.
    fn pages(&self) -> u64 {
        let first = self.offset / PAGE_BYTES;
        let end = (self.offset + self.within.len() as u64).div_ceil(PAGE_BYTES);
        mask(first % CHUNK_PAGES, end - first)
    }
}

fn parts(offset: u64, len_bytes: u64) -> impl Iterator<Item = Part> {
    let end = offset + len_bytes;
    // An empty request has no parts.
    let chunks =
        if len_bytes == 0 { 0..0 } else { offset / CHUNK_BYTES..end.div_ceil(CHUNK_BYTES) };
    chunks.map(move |chunk| {
        let start = offset.max(chunk * CHUNK_BYTES);
        let stop = end.min((chunk + 1) * CHUNK_BYTES);
        let within = (start - offset) as usize..(stop - offset) as usize;
        Part { chunk, offset: start, within }
    })
}

impl Contents {
    pub(super) fn new(len_bytes: u64, base: Base, overlay: Overlay, kept_pages_max: u64) -> Self {
        let chunks = len_bytes.div_ceil(CHUNK_BYTES);
        Self {
            len_bytes,
            base,
            overlay,
            dirty: WrittenPages::new(chunks),
            stripes: std::iter::repeat_with(RwLock::default).take(STRIPES as usize).collect(),
            room: KeptRoom::new(kept_pages_max),
            freeze: RwLock::default(),
        }
    }

    fn stripe(&self, chunk: u64) -> &RwLock<KeptPages> {
        &self.stripes[(chunk % STRIPES) as usize]
    }

    fn read_stripe(&self, chunk: u64) -> RwLockReadGuard<'_, KeptPages> {
        self.stripe(chunk).read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_stripe(&self, chunk: u64) -> RwLockWriteGuard<'_, KeptPages> {
        self.stripe(chunk).write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fills `buf` with the bytes at `offset`.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        parts(offset, buf.len() as u64).try_for_each(|part| {
            let _unchanging = self.read_stripe(part.chunk);
            self.read_part(part.offset, &mut buf[part.within])
        })
    }

    /// Writes `bytes` at `offset`.
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        parts(offset, bytes.len() as u64).try_for_each(|part| {
            let mut kept = self.write_stripe(part.chunk);
            self.before_change(&mut kept, part.chunk, part.pages())?;
            self.write_part(part.offset, &bytes[part.within])
        })
    }

    /// Zeros `len_bytes` bytes from `offset` on.
    pub(super) fn zero(&self, offset: u64, len_bytes: u64) -> io::Result<()> {
        parts(offset, len_bytes).try_for_each(|part| {
            let mut kept = self.write_stripe(part.chunk);
            // Pages without data are zero already and stay as they are: a guest that discards all
            // of its new disk adds nothing to the next checkpoint.
            let present = self.overlay.present(part.chunk);
            let pages = part.pages() & (present | self.base.data(part.chunk)?);
            if pages != 0 {
                self.before_change(&mut kept, part.chunk, pages)?;
                self.zero_part(&part, pages)?;
            }
            Ok(())
        })
    }

    /// Called before `pages` of a chunk change: keeps what the frozen ones hold, and marks all as
    /// written, even if the write then fails half way.
    fn before_change(&self, kept: &mut KeptPages, chunk: u64, pages: u64) -> io::Result<()> {
        for page in bits(self.frozen(chunk, pages)).map(|bit| chunk * CHUNK_PAGES + bit) {
            if let Entry::Vacant(place) = kept.entry(page) {
                place.insert(self.keep(page)?);
            }
        }
        self.dirty.insert(chunk, pages);
        Ok(())
    }

    /// Returns which of `pages` of a chunk are frozen. The caller holds the chunk's lock: if the
    /// pages are thawed meanwhile, what is kept of them is not forgotten before the lock is
    /// released.
    fn frozen(&self, chunk: u64, pages: u64) -> u64 {
        let freeze = self.freeze.read().unwrap_or_else(PoisonError::into_inner);
        if freeze.is_off() {
            return 0;
        }
        bits(pages)
            .filter(|bit| freeze.holds(chunk * CHUNK_PAGES + bit))
            .fold(0, |word, bit| word | mask(bit, 1))
    }

    fn keep(&self, page: u64) -> io::Result<Kept> {
        if !self.overlay.holds(page) {
            return Ok(Kept::Below);
        }
        let mut old = [0; PAGE_SIZE];
        self.overlay.read(page * PAGE_BYTES, &mut old)?;
        if is_zero(&old) {
            return Ok(Kept::Zero);
        }
        if self.room.take() {
            return Ok(Kept::InMemory(Box::new(old)));
        }
        Ok(Kept::InSlot(self.overlay.put_slot(&old)?))
    }

    /// Reads what a frozen page held at the cut.
    pub(super) fn read_frozen(&self, page: u64, buf: &mut Page) -> io::Result<()> {
        let chunk = page / CHUNK_PAGES;
        let kept = self.read_stripe(chunk);
        if page >= self.len_bytes.div_ceil(PAGE_BYTES)
            || self.frozen(chunk, mask(page % CHUNK_PAGES, 1)) == 0
        {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not frozen"));
        }
        match kept.get(&page) {
            None => self.read_part(page * PAGE_BYTES, buf),
            Some(Kept::Below) => self.base.read_page(page, buf),
            Some(Kept::Zero) => {
                buf.fill(0);
                Ok(())
            }
            Some(Kept::InMemory(old)) => {
                buf.copy_from_slice(old.as_slice());
                Ok(())
            }
            Some(Kept::InSlot(slot)) => self.overlay.read_slot(*slot, buf),
        }
    }

    /// Reads bytes of one chunk, whose lock is held: each run of pages from the overlay or the
    /// base.
    fn read_part(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let here = self.overlay.holds(at / PAGE_BYTES);
            let mut stop = page_end(at);
            while stop < end && self.overlay.holds(stop / PAGE_BYTES) == here {
                stop += PAGE_BYTES;
            }
            stop = stop.min(end);
            let run = &mut buf[(at - offset) as usize..(stop - offset) as usize];
            if here {
                self.overlay.read(at, run)?;
            } else {
                self.base.read(at, run)?;
            }
            at = stop;
        }
        Ok(())
    }

    /// Writes bytes of one chunk, whose lock is held: whole pages together, partial ones singly.
    fn write_part(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut at = 0;
        while at < bytes.len() {
            let start = offset + at as u64;
            let rest = &bytes[at..];
            at += if start.is_multiple_of(PAGE_BYTES) && rest.len() >= PAGE_SIZE {
                let len = rest.len() - rest.len() % PAGE_SIZE;
                self.overlay.write(start, &rest[..len])?;
                len
            } else {
                let len = rest.len().min((page_end(start) - start) as usize);
                self.write_in_page(start, &rest[..len])?;
                len
            };
        }
        Ok(())
    }

    /// Writes a part of one page. If the overlay does not hold it yet, the rest comes from the
    /// base.
    fn write_in_page(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let page = offset / PAGE_BYTES;
        if self.overlay.holds(page) {
            return self.overlay.write(offset, bytes);
        }
        let mut whole = [0; PAGE_SIZE];
        self.base.read_page(page, &mut whole)?;
        whole[(offset % PAGE_BYTES) as usize..][..bytes.len()].copy_from_slice(bytes);
        self.overlay.write(page * PAGE_BYTES, &whole)
    }

    /// Zeros the bytes of `part` that lie in `pages`: whole pages become holes.
    fn zero_part(&self, part: &Part, pages: u64) -> io::Result<()> {
        let part_end = part.offset + part.within.len() as u64;
        let mut holes = 0;
        for bit in bits(pages) {
            let page = (part.chunk * CHUNK_PAGES + bit) * PAGE_BYTES;
            // The padding of the last page is zero already.
            let page_stop = page_end(page).min(self.len_bytes);
            let (start, stop) = (part.offset.max(page), part_end.min(page_stop));
            if (start, stop) == (page, page_stop) {
                holes |= mask(bit, 1);
            } else {
                self.write_in_page(start, &[0; PAGE_SIZE][..(stop - start) as usize])?;
            }
        }
        while holes != 0 {
            let first = u64::from(holes.trailing_zeros());
            let count = u64::from((holes >> first).trailing_ones());
            self.overlay.punch(part.chunk * CHUNK_PAGES + first, count)?;
            holes &= !mask(first, count);
        }
        Ok(())
    }

    /// Sets a page to what a snapshot holds, without counting it as written. The disk must stand
    /// still, and no page may be frozen.
    pub(super) fn put_back(&self, page: u64, contents: &Page) -> io::Result<()> {
        let _unchanging = self.write_stripe(page / CHUNK_PAGES);
        if is_zero(contents) {
            return self.overlay.punch(page, 1);
        }
        self.overlay.write(page * PAGE_BYTES, contents)
    }

    pub(super) fn freeze_mut(&self) -> RwLockWriteGuard<'_, Freeze> {
        self.freeze.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets the kept pages. None may be frozen any more.
    pub(super) fn forget_kept(&self) {
        for stripe in 0..STRIPES {
            self.write_stripe(stripe).drain().for_each(|(_, kept)| self.room.give_back(&kept));
        }
    }

    pub(super) fn drop_slots(&self) {
        self.overlay.drop_slots();
    }

    pub(super) fn kept_count(&self) -> u64 {
        (0..STRIPES).map(|stripe| self.read_stripe(stripe).len() as u64).sum()
    }
}

/// Returns where the page around `offset` ends.
fn page_end(offset: u64) -> u64 {
    (offset / PAGE_BYTES + 1) * PAGE_BYTES
}
