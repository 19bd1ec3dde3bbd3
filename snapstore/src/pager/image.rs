//! A memory file that is gradually filled with a region's pages, for all its users.
//!
//! A page is filled at most once, under the lock of its chunk, then marked as filled, and only then
//! mapped for any user. So a fill never undoes a user's write, and whoever takes over from a dead
//! pager knows which pages can be trusted.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use rayon::prelude::*;
use rustix::fs::{FallocateFlags, fallocate};

use super::fill::FillState;
use super::shared::SharedWords;
use super::{CHUNK_PAGES, Extent, PagerError};
use crate::error::StoreError;
use crate::node::{Location, Run};
use crate::page::PAGE_SIZE;
use crate::snapshot::RegionReader;

/// Length of a chunk in bytes.
pub(super) const CHUNK_BYTES: u64 = CHUNK_PAGES * PAGE_SIZE as u64;
/// Number of locks, which chunks share: far more than there are filling threads.
const LOCKS: usize = 1024;

const _: () = assert!(CHUNK_PAGES == u64::BITS as u64);

thread_local! {
    /// The buffer that runs are decoded into. Decoding straight into a mapping of the memory file
    /// would save a copy but is slower: see `DESIGN.md`.
    static DECODED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A memory file that holds the contents of a region as far as they were filled, shared by all its
/// users; see [`super::Pager`].
#[derive(Debug)]
pub struct Image {
    region: RegionReader,
    memory: File,
    extents: Vec<Extent>,
    /// One word per chunk of the memory file, one bit per page: set if the page is filled. The
    /// counters of [`Count`] follow.
    filled: SharedWords,
    locks: Box<[Mutex<()>]>,
    /// False if another process fills the image, or did until it died.
    writable: bool,
    /// The chunks of the memory file in which no page with contents is missing. The image is
    /// complete when all chunks of the extents are whole. Not shared: whoever takes over checks
    /// each chunk again.
    whole: Box<[AtomicBool]>,
    /// Number of whole chunks.
    whole_chunks: AtomicU64,
    pub(super) fill: FillState,
}

/// The counters that follow the words of the chunks.
#[derive(Clone, Copy, Debug)]
pub(super) enum Count {
    /// Pages filled with contents from the store.
    Filled,
    /// Zero pages allocated because they were wanted.
    Zero,
    /// All pages with contents, once their number is known.
    Total,
    /// 1 once all pages with contents are filled.
    Complete,
}

const COUNTS: usize = 4;

impl Image {
    /// An image of `region` in `memory`, nothing of which is filled yet.
    ///
    /// # Errors
    /// [`PagerError::Store`] if `extents` overlap or are not whole chunks inside both;
    /// [`PagerError::Memory`] if a system call fails, such as for want of file descriptors.
    pub fn new(
        region: RegionReader,
        memory: &File,
        extents: &[Extent],
    ) -> Result<Self, PagerError> {
        let filled = |words| SharedWords::new("frazil-filled", words);
        Self::assemble(region, memory, extents, filled, true)
    }

    /// Takes over an image that another pager began; `filled` is its [`Self::filled_file`].
    ///
    /// # Errors
    /// As [`Self::new`]; [`PagerError::Memory`] if `filled` does not fit.
    pub fn take_over(
        region: RegionReader,
        memory: &File,
        extents: &[Extent],
        filled: File,
    ) -> Result<Self, PagerError> {
        Self::assemble(region, memory, extents, |words| SharedWords::of(filled, words), true)
    }

    /// Joins an image that another process fills, read-only. If that process dies, a user gets
    /// private copies of the pages that are not filled.
    ///
    /// # Errors
    /// As [`Self::take_over`].
    pub(super) fn join(
        region: RegionReader,
        memory: &File,
        extents: &[Extent],
        filled: File,
    ) -> Result<Self, PagerError> {
        let filled = |words| SharedWords::of_read_only(filled, words);
        Self::assemble(region, memory, extents, filled, false)
    }

    fn assemble(
        region: RegionReader,
        memory: &File,
        extents: &[Extent],
        filled: impl FnOnce(usize) -> io::Result<SharedWords>,
        writable: bool,
    ) -> Result<Self, PagerError> {
        let memory_error = |op| move |source| PagerError::Memory { op, source };
        let chunks = check_extents(&region, memory, extents)?;
        let filled = filled(chunks + COUNTS).map_err(memory_error("share memory"))?;
        Ok(Self {
            memory: memory.try_clone().map_err(memory_error("duplicate the memory file"))?,
            region,
            extents: extents.to_vec(),
            filled,
            writable,
            locks: std::iter::repeat_with(Mutex::default).take(LOCKS.min(chunks.max(1))).collect(),
            whole: std::iter::repeat_with(AtomicBool::default).take(chunks).collect(),
            whole_chunks: AtomicU64::new(0),
            fill: FillState::default(),
        })
    }

    /// The region that the image is filled from.
    #[must_use]
    pub fn region(&self) -> &RegionReader {
        &self.region
    }

    /// The memory file.
    #[must_use]
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// The parts of the region, and their places in the memory file.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// The file of marks that say which pages are filled, for whoever takes over.
    #[must_use]
    pub fn filled_file(&self) -> &File {
        self.filled.file()
    }

    /// True once all pages with contents are filled.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.count(Count::Complete).load(Ordering::Acquire) != 0
    }

    pub(super) fn set_complete(&self) {
        self.count(Count::Complete).store(1, Ordering::Release);
    }

    pub(super) fn count(&self, count: Count) -> &AtomicU64 {
        self.filled.word(self.whole.len() + count as usize)
    }

    fn add(&self, count: Count, pages: u64) {
        if pages > 0 {
            self.count(count).fetch_add(pages, Ordering::Relaxed);
        }
    }

    pub(super) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Decodes `run`, or fills a buffer with zeros, and passes it to `with`.
    pub(super) fn decoded<T>(
        &self,
        run: &Run,
        with: impl FnOnce(&[u8]) -> Result<T, PagerError>,
    ) -> Result<T, PagerError> {
        DECODED.with_borrow_mut(|decoded| {
            decoded.resize(run.count as usize * PAGE_SIZE, 0);
            match run.location {
                Location::Zero => decoded.fill(0),
                _ => self
                    .region
                    .read_run(run, decoded)
                    .map_err(|source| self.store_error(run.first, source))?,
            }
            with(decoded)
        })
    }

    /// Fills everything at once, on all cores.
    ///
    /// # Errors
    /// [`PagerError::Store`] if a page cannot be read.
    pub fn load_all(&self) -> Result<(), PagerError> {
        for extent in &self.extents {
            (0..extent.pages / CHUNK_PAGES).into_par_iter().try_for_each(|index| {
                let first = extent.first_page + index * CHUNK_PAGES;
                let runs = self.runs_of(first)?;
                let mut chunk = self.chunk(first);
                runs.iter().try_for_each(|run| self.fill(&mut chunk, run))
            })?;
        }
        self.set_complete();
        Ok(())
    }

    /// The runs with contents in the chunk that starts at `first`.
    pub(super) fn runs_of(&self, first: u64) -> Result<Vec<Run>, PagerError> {
        debug_assert!(first.is_multiple_of(CHUNK_PAGES));
        self.region.runs(first, CHUNK_PAGES).map_err(|source| self.store_error(first, source))
    }

    /// Locks the chunk that contains `page`.
    ///
    /// # Panics
    /// If `page` is in no extent.
    pub(super) fn chunk(&self, page: u64) -> Chunk<'_> {
        let place = self.chunk_place(page);
        let lock = self.lock_of(&place).lock().unwrap_or_else(PoisonError::into_inner);
        self.locked(place, lock)
    }

    /// As [`Self::chunk`], or none if the lock is taken.
    pub(super) fn try_chunk(&self, page: u64) -> Option<Chunk<'_>> {
        let place = self.chunk_place(page);
        let lock = match self.lock_of(&place).try_lock() {
            Ok(lock) => lock,
            Err(TryLockError::Poisoned(lock)) => lock.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(self.locked(place, lock))
    }

    fn chunk_place(&self, page: u64) -> ChunkPlace {
        let first = page - page % CHUNK_PAGES;
        let offset = self.place(first).expect("users have pages of extents only");
        ChunkPlace { first, offset, index: (offset / CHUNK_BYTES) as usize }
    }

    fn lock_of(&self, place: &ChunkPlace) -> &Mutex<()> {
        &self.locks[place.index % self.locks.len()]
    }

    fn locked<'a>(&'a self, place: ChunkPlace, lock: MutexGuard<'a, ()>) -> Chunk<'a> {
        let bits = self.filled.word(place.index).load(Ordering::Acquire);
        let ChunkPlace { first, offset, index } = place;
        Chunk { image: self, first, index, offset, bits, _lock: lock }
    }

    /// True if the chunk that contains `page` is known to be whole. False for pages in no extent.
    pub(super) fn is_whole(&self, page: u64) -> bool {
        self.place(page).is_some_and(|offset| {
            self.whole[(offset / CHUNK_BYTES) as usize].load(Ordering::Relaxed)
        })
    }

    /// Marks the chunk as whole, after each of its runs was filled.
    pub(super) fn set_whole(&self, chunk: &Chunk<'_>) {
        if !self.whole[chunk.index].swap(true, Ordering::Relaxed) {
            // Release: after the contents were written and counted.
            self.whole_chunks.fetch_add(1, Ordering::Release);
        }
    }

    /// Number of chunks known to be whole. Whoever sees the number also sees their contents.
    pub(super) fn whole_chunks(&self) -> u64 {
        self.whole_chunks.load(Ordering::Acquire)
    }

    /// Number of chunks in all extents.
    pub(super) fn chunks(&self) -> u64 {
        self.extents.iter().map(|extent| extent.pages / CHUNK_PAGES).sum()
    }

    /// True if all of `part` is in the image, at the same place in the memory file.
    pub(super) fn holds(&self, part: &Extent) -> bool {
        // A user in another process may send anything.
        let Some(end) = part.first_page.checked_add(part.pages) else { return false };
        let inside = |extent: &Extent| {
            part.first_page >= extent.first_page && end <= extent.first_page + extent.pages
        };
        part.first_page.is_multiple_of(CHUNK_PAGES)
            && part.pages.is_multiple_of(CHUNK_PAGES)
            && self.extents.iter().any(inside)
            && self.place(part.first_page) == Some(part.file_offset)
    }

    /// Offset of `page` in the memory file, if it is in an extent.
    fn place(&self, page: u64) -> Option<u64> {
        let extent = self.extents.iter().find(|extent| extent.contains(page))?;
        Some(extent.file_offset + (page - extent.first_page) * PAGE_SIZE as u64)
    }

    fn store_error(&self, page: u64, source: StoreError) -> PagerError {
        PagerError::Store { region: self.region.name().to_owned(), page, source }
    }

    /// Fills the missing pages of `run`, which lies in the chunk.
    pub(super) fn fill(&self, chunk: &mut Chunk<'_>, run: &Run) -> Result<(), PagerError> {
        // Chunks are filled run by run, so usually all of a run or nothing is missing.
        for missing in chunk.missing(run) {
            self.write(chunk.offset_of(missing.first), &missing)?;
            chunk.mark(&missing);
            self.add(Count::Filled, missing.count);
        }
        Ok(())
    }

    /// Writes the contents of `run` to the memory file at `offset`.
    fn write(&self, offset: u64, run: &Run) -> Result<(), PagerError> {
        self.decoded(run, |contents| {
            self.memory
                .write_all_at(contents, offset)
                .map_err(|source| PagerError::Memory { op: "fill guest memory", source })
        })
    }

    /// Allocates the zero pages around `page`, which is in none of `runs`, up to the next page with
    /// contents or the end of the chunk on either side. Returns these pages.
    pub(super) fn fill_zero(
        &self,
        chunk: &mut Chunk<'_>,
        page: u64,
        runs: &[Run],
    ) -> Result<Run, PagerError> {
        let gap = gap_around(page, runs);
        self.fill_gap(chunk, gap.first, gap.end())?;
        Ok(gap)
    }

    /// Fills the pages `first .. end` of one chunk, zero pages too.
    pub(super) fn fill_part(&self, first: u64, end: u64) -> Result<(), PagerError> {
        let runs = self.runs_of(first - first % CHUNK_PAGES)?;
        let mut chunk = self.chunk(first);
        let mut at = first;
        for run in crate::node::clip_runs(&runs, first, end) {
            self.fill_gap(&mut chunk, at, run.first)?;
            self.fill(&mut chunk, &run)?;
            at = run.end();
        }
        self.fill_gap(&mut chunk, at, end)
    }

    fn fill_gap(&self, chunk: &mut Chunk<'_>, first: u64, end: u64) -> Result<(), PagerError> {
        if first == end {
            return Ok(());
        }
        let gap = Run { first, count: end - first, location: Location::Zero };
        for missing in chunk.missing(&gap) {
            self.allocate(chunk, missing.first, missing.count)?;
            chunk.mark(&missing);
            self.add(Count::Zero, missing.count);
        }
        Ok(())
    }

    /// Allocates pages of the memory file; those not written yet are zero.
    pub(super) fn allocate(
        &self,
        chunk: &Chunk<'_>,
        first: u64,
        count: u64,
    ) -> Result<(), PagerError> {
        let (offset, len) = (chunk.offset_of(first), count * PAGE_SIZE as u64);
        fallocate(&self.memory, FallocateFlags::empty(), offset, len).map_err(|error| {
            PagerError::Memory { op: "allocate guest memory", source: error.into() }
        })
    }
}

/// The place of a chunk.
struct ChunkPlace {
    /// Number of its first page.
    first: u64,
    /// Offset in the memory file, in bytes.
    offset: u64,
    /// Index in the memory file, in chunks.
    index: usize,
}

/// A chunk whose lock is held.
pub(super) struct Chunk<'a> {
    image: &'a Image,
    pub first: u64,
    index: usize,
    offset: u64,
    bits: u64,
    _lock: MutexGuard<'a, ()>,
}

impl Chunk<'_> {
    pub fn has(&self, page: u64) -> bool {
        self.bits >> (page - self.first) & 1 == 1
    }

    fn mark(&mut self, run: &Run) {
        let new = mask(run.first - self.first, run.count);
        // Released after the contents were written, for readers without the lock. OR-ed, so that
        // no mark is ever lost.
        self.bits = new | self.image.filled.word(self.index).fetch_or(new, Ordering::AcqRel);
    }

    pub fn is_empty(&self) -> bool {
        self.bits == 0
    }

    /// The filled pages adjacent to `page`, including `page` itself.
    pub fn filled_around(&self, page: u64) -> Run {
        let at = page - self.first;
        let below = (self.bits << (63 - at)).leading_ones();
        let above = (self.bits >> at).trailing_ones();
        let first = page + 1 - u64::from(below.max(1));
        let count = page + u64::from(above.max(1)) - first;
        Run { first, count, location: Location::Zero }
    }

    /// The parts of `run` that are not filled yet.
    fn missing(&self, run: &Run) -> Vec<Run> {
        let mut parts = Vec::new();
        if self.bits & mask(run.first - self.first, run.count) == 0 {
            parts.push(*run);
            return parts;
        }
        for page in (run.first..run.end()).filter(|page| !self.has(*page)) {
            if let Some(part) = run.clip(page, page + 1) {
                crate::node::push_run(&mut parts, part);
            }
        }
        parts
    }

    fn offset_of(&self, page: u64) -> u64 {
        self.offset + (page - self.first) * PAGE_SIZE as u64
    }
}

/// The zero pages around `page` in its chunk, up to the nearest of `runs` on either side.
pub(super) fn gap_around(page: u64, runs: &[Run]) -> Run {
    let chunk = page - page % CHUNK_PAGES;
    let first = runs.iter().map(Run::end).filter(|end| *end <= page).max().unwrap_or(chunk);
    let end = runs.iter().map(|run| run.first).find(|first| *first > page);
    let count = end.unwrap_or(chunk + CHUNK_PAGES) - first;
    Run { first, count, location: Location::Zero }
}

/// A word with `count` bits set, from bit `first` on.
fn mask(first: u64, count: u64) -> u64 {
    u64::MAX.checked_shr(64 - count as u32).unwrap_or(0) << first
}

/// Checks that `extents` can be served; returns the number of chunks in the memory file.
fn check_extents(
    region: &RegionReader,
    memory: &File,
    extents: &[Extent],
) -> Result<usize, PagerError> {
    let memory_error = |op| move |source| PagerError::Memory { op, source };
    let memory_len =
        memory.metadata().map_err(memory_error("read the size of the memory file"))?.len();
    for (index, extent) in extents.iter().enumerate() {
        let whole = extent.pages.is_multiple_of(CHUNK_PAGES)
            && extent.first_page.is_multiple_of(CHUNK_PAGES)
            && extent.file_offset.is_multiple_of(CHUNK_BYTES)
            && extent.first_page + extent.pages <= region.pages()
            // Touching a page beyond the file's end would raise SIGBUS, not return an error.
            && extent.file_offset + extent.pages * PAGE_SIZE as u64 <= memory_len
            && !extents[..index].iter().any(|other| other.overlaps(extent));
        if !whole {
            return Err(PagerError::Store {
                region: region.name().to_owned(),
                page: extent.first_page,
                source: StoreError::Invalid(format!(
                    "expected a mapping of whole {CHUNK_BYTES}-byte chunks, within the region's {} \
                     pages and the memory file's {memory_len} bytes and overlapping no other, \
                     found {extent:?}",
                    region.pages()
                )),
            });
        }
    }
    Ok((memory_len / CHUNK_BYTES) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_bits_in_a_row() {
        for first in 0..64 {
            for count in 0..=64 - first {
                let naive = (first..first + count).fold(0, |bits, bit| bits | 1_u64 << bit);
                assert_eq!(mask(first, count), naive, "{count} from {first} on");
            }
        }
    }
}
