//! Filling chunks: which pages came from the store already, and bringing in the others.

use std::fs::File;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;
use rustix::fs::{FallocateFlags, fallocate};

use super::alias::Alias;
use super::{CHUNK_PAGES, Mapping, PagerError, Shared};
use crate::error::StoreError;
use crate::node::{Location, Run};
use crate::page::PAGE_SIZE;
use crate::snapshot::RegionReader;
use crate::uffd::uffd_error;

/// One bit a page: mapped for the user, by us, with its contents.
type ChunkBits = u64;

const _: () = assert!(CHUNK_PAGES == ChunkBits::BITS as u64);

pub(super) struct Filler {
    region: RegionReader,
    memory: File,
    alias: Alias,
    /// Per mapping, its first chunk's index in `chunks`.
    bases: Vec<(u64, usize)>,
    /// What was filled; the lock is held while a chunk is being filled.
    chunks: Vec<Mutex<ChunkBits>>,
}

impl Filler {
    pub(super) fn new(
        region: RegionReader,
        memory: &File,
        mappings: &[Mapping],
    ) -> Result<Self, PagerError> {
        let memory_error = |op| move |source| PagerError::Memory { op, source };
        let memory_len = memory.metadata().map_err(memory_error("look at the memory file"))?.len();
        let mut bases = Vec::with_capacity(mappings.len());
        let mut chunks = 0;
        let mut file_len = 0;
        for (index, mapping) in mappings.iter().enumerate() {
            let chunk_bytes = CHUNK_PAGES as usize * PAGE_SIZE;
            let whole = mapping.len_bytes.is_multiple_of(chunk_bytes)
                && mapping.first_page.is_multiple_of(CHUNK_PAGES)
                && mapping.first_page + mapping.pages() <= region.pages()
                // A page beyond the file's end would kill the process, not fail.
                && mapping.file_offset + mapping.len_bytes as u64 <= memory_len
                && !mappings[..index].iter().any(|other| other.overlaps(mapping));
            if !whole {
                return Err(PagerError::Store {
                    region: region.name().to_owned(),
                    page: mapping.first_page,
                    source: StoreError::Invalid(format!(
                        "a mapping must be whole chunks of {chunk_bytes} bytes inside the region's \
                         {} pages and the memory file's {memory_len} bytes, and overlap no other, \
                         found {mapping:?}",
                        region.pages()
                    )),
                });
            }
            bases.push((mapping.first_page, chunks));
            chunks += mapping.len_bytes / chunk_bytes;
            file_len = file_len.max(mapping.file_offset as usize + mapping.len_bytes);
        }
        Ok(Self {
            region,
            memory: memory.try_clone().map_err(memory_error("duplicate the memory file"))?,
            alias: Alias::new(memory, file_len).map_err(memory_error("map the memory file"))?,
            bases,
            chunks: std::iter::repeat_with(Mutex::default).take(chunks).collect(),
        })
    }

    /// Makes `page` resident first, then everything with contents in its chunk.
    pub(super) fn serve(
        &self,
        mapping: &Mapping,
        page: u64,
        shared: &Shared,
    ) -> Result<(), PagerError> {
        let mut chunk = self.chunk(mapping, page);
        if chunk.has(page) {
            // Served meanwhile, or the kernel has dropped the page-table entry since (reclaim,
            // migration, a hole punched): waking alone would have it fault for ever.
            self.allocate(&chunk, page, 1)?;
            return map(shared, mapping, page, 1);
        }
        let runs = self
            .region
            .runs(chunk.first, CHUNK_PAGES)
            .map_err(|source| self.store_error(page, source))?;
        match runs.iter().find(|run| (run.first..run.end()).contains(&page)) {
            Some(run) => {
                self.fill_run(&mut chunk, run, shared)?;
            }
            None => self.map_zero(&mut chunk, page, &runs, shared)?,
        }
        for run in &runs {
            self.fill_run(&mut chunk, run, shared)?;
        }
        Ok(())
    }

    /// Brings in everything with contents in the chunk that starts at `first`; returns how many
    /// pages that is.
    pub(super) fn fill_chunk(
        &self,
        mapping: &Mapping,
        first: u64,
        shared: &Shared,
    ) -> Result<u64, PagerError> {
        let runs = self.runs_of(first)?;
        let mut chunk = self.chunk(mapping, first);
        for run in &runs {
            self.fill_run(&mut chunk, run, shared)?;
        }
        Ok(runs.iter().map(|run| run.count).sum())
    }

    /// Decodes everything with contents in `mapping`, on all cores, and maps nothing.
    pub(super) fn load(&self, mapping: &Mapping) -> Result<(), PagerError> {
        (0..mapping.pages() / CHUNK_PAGES).into_par_iter().try_for_each(|index| {
            let first = mapping.first_page + index * CHUNK_PAGES;
            let runs = self.runs_of(first)?;
            let mut chunk = self.chunk(mapping, first);
            for run in &runs {
                self.decode(&chunk, run).map_err(|source| self.store_error(run.first, source))?;
                chunk.mark(run);
            }
            Ok(())
        })
    }

    fn chunk<'a>(&'a self, mapping: &'a Mapping, page: u64) -> Chunk<'a> {
        let first = page - page % CHUNK_PAGES;
        let base = self.bases.iter().find(|(first, _)| *first == mapping.first_page);
        let base = base.expect("mappings are those the filler was made with").1;
        let index = base + ((first - mapping.first_page) / CHUNK_PAGES) as usize;
        let bits = self.chunks[index].lock().unwrap_or_else(PoisonError::into_inner);
        Chunk { mapping, first, bits }
    }

    /// The runs with contents in the chunk that starts at `first`.
    fn runs_of(&self, first: u64) -> Result<Vec<Run>, PagerError> {
        self.region.runs(first, CHUNK_PAGES).map_err(|source| self.store_error(first, source))
    }

    fn store_error(&self, page: u64, source: StoreError) -> PagerError {
        PagerError::Store { region: self.region.name().to_owned(), page, source }
    }

    /// Fills and maps what is not resident yet of `run`, which lies in the chunk.
    fn fill_run(
        &self,
        chunk: &mut Chunk<'_>,
        run: &Run,
        shared: &Shared,
    ) -> Result<(), PagerError> {
        // A chunk is filled frame by frame, so usually all of a run or nothing is missing.
        for missing in chunk.missing(run) {
            self.decode(chunk, &missing)
                .map_err(|source| self.store_error(missing.first, source))?;
            chunk.mark(&missing);
            map(shared, chunk.mapping, missing.first, missing.count)?;
            shared.counters.filled_pages.fetch_add(missing.count, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Puts the contents of `run` into the memory file.
    fn decode(&self, chunk: &Chunk<'_>, run: &Run) -> Result<(), StoreError> {
        let offset = chunk.file_offset(run.first);
        let len = run.count as usize * PAGE_SIZE;
        self.alias.fill(offset, len, |bytes| self.region.read_run(run, bytes))
    }

    /// Maps zero pages around `page`, up to the next page with contents or the chunk's end.
    fn map_zero(
        &self,
        chunk: &mut Chunk<'_>,
        page: u64,
        runs: &[Run],
        shared: &Shared,
    ) -> Result<(), PagerError> {
        let start =
            runs.iter().map(Run::end).filter(|end| *end <= page).max().unwrap_or(chunk.first);
        let end = runs
            .iter()
            .map(|run| run.first)
            .find(|first| *first > page)
            .unwrap_or(chunk.first + CHUNK_PAGES);
        let gap = Run { first: start, count: end - start, location: Location::Zero };
        for missing in chunk.missing(&gap) {
            self.allocate(chunk, missing.first, missing.count)?;
            chunk.mark(&missing);
            map(shared, chunk.mapping, missing.first, missing.count)?;
            shared.counters.zero_pages.fetch_add(missing.count, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Has the memory file hold these pages: those that nobody wrote are zero then.
    fn allocate(&self, chunk: &Chunk<'_>, first: u64, count: u64) -> Result<(), PagerError> {
        let (offset, len) = (chunk.file_offset(first) as u64, count * PAGE_SIZE as u64);
        fallocate(&self.memory, FallocateFlags::empty(), offset, len).map_err(|error| {
            PagerError::Memory { op: "allocate guest memory", source: error.into() }
        })
    }
}

/// A chunk whose lock is held.
struct Chunk<'a> {
    mapping: &'a Mapping,
    first: u64,
    bits: MutexGuard<'a, ChunkBits>,
}

impl Chunk<'_> {
    fn has(&self, page: u64) -> bool {
        *self.bits >> (page - self.first) & 1 == 1
    }

    fn mark(&mut self, run: &Run) {
        for page in run.first..run.end() {
            *self.bits |= 1 << (page - self.first);
        }
    }

    /// The parts of `run` that are not filled yet.
    fn missing(&self, run: &Run) -> Vec<Run> {
        let mut parts = Vec::new();
        for page in (run.first..run.end()).filter(|page| !self.has(*page)) {
            if let Some(part) = run.clip(page, page + 1) {
                crate::node::push_run(&mut parts, part);
            }
        }
        parts
    }

    fn file_offset(&self, page: u64) -> usize {
        self.mapping.file_offset as usize + (page - self.mapping.first_page) as usize * PAGE_SIZE
    }
}

/// Maps `count` filled pages for the user, and wakes whoever waits for one of them.
fn map(shared: &Shared, mapping: &Mapping, first: u64, count: u64) -> Result<(), PagerError> {
    let mut page = first;
    let end = first + count;
    while page < end {
        let address = address_of(mapping, page);
        let len = (end - page) as usize * PAGE_SIZE;
        match shared.watch.uffd.r#continue(address as *mut _, len, true) {
            Ok(mapped) => page += mapped / PAGE_SIZE as u64,
            Err(userfaultfd::Error::SystemError(errno)) => match errno as i32 {
                // Mapped already, by a fault that raced with us: success, but nobody was woken.
                EEXIST => {
                    wake(shared, mapping, page, 1)?;
                    page += 1;
                }
                // The address space is being changed: again.
                EAGAIN => std::thread::yield_now(),
                // The background fill is done and has let go of the mapping, which woke all.
                ENOENT if shared.letting_go.load(Ordering::Acquire) => return Ok(()),
                _ => {
                    return Err(uffd_error(
                        "map pages",
                        address,
                        &userfaultfd::Error::SystemError(errno),
                    ));
                }
            },
            Err(error) => return Err(uffd_error("map pages", address, &error)),
        }
    }
    Ok(())
}

const EEXIST: i32 = rustix::io::Errno::EXIST.raw_os_error();
const EAGAIN: i32 = rustix::io::Errno::AGAIN.raw_os_error();
const ENOENT: i32 = rustix::io::Errno::NOENT.raw_os_error();

fn wake(shared: &Shared, mapping: &Mapping, first: u64, count: u64) -> Result<(), PagerError> {
    let address = address_of(mapping, first);
    shared
        .watch
        .uffd
        .wake(address as *mut _, count as usize * PAGE_SIZE)
        .map_err(|error| uffd_error("wake", address, &error))
}

fn address_of(mapping: &Mapping, page: u64) -> usize {
    mapping.address + (page - mapping.first_page) as usize * PAGE_SIZE
}
