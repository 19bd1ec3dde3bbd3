//! A cache of the pages of a snapshot's region that rewinds have needed.

use std::sync::atomic::{AtomicU64, Ordering};

use frazil_snapstore::{PAGE_SIZE, Page, PageSet, RegionReader};
use rayon::prelude::*;

use crate::error::Result;

/// Pages per read from the store.
const READ_PAGES: u64 = 64;
/// Pages that one task hands out.
const HAND_OUT_PAGES: usize = 128;
/// Pages that are allocated together: 2 MiB.
const ARENA_PAGES: usize = 512;

/// A region, and as many of its pages as the cache has room for.
#[derive(Debug)]
pub(super) struct CachedRegion {
    reader: RegionReader,
    /// The pages in the cache.
    here: PageSet,
    /// The slot of each cached page, by page number. Other entries are never touched, so they take
    /// no memory.
    slots: Vec<u32>,
    arena: Vec<Vec<Page>>,
    /// Slots that no page uses.
    free: Vec<u32>,
    max_pages: usize,
}

fn read_part(reader: &RegionReader, first: u64, count: u64) -> Result<(u64, Vec<u8>)> {
    let mut bytes = vec![0; count as usize * PAGE_SIZE];
    reader.read_pages(first, &mut bytes)?;
    Ok((first, bytes))
}

impl CachedRegion {
    pub(super) fn new(reader: RegionReader, max_pages: usize) -> Self {
        let pages = reader.pages();
        Self {
            here: PageSet::new(pages),
            slots: vec![0; pages as usize],
            arena: Vec::new(),
            free: Vec::new(),
            max_pages: max_pages.min(u32::MAX as usize),
            reader,
        }
    }

    /// Reads those of `wanted` that are not cached, as far as there is room; returns how many.
    pub(super) fn fetch(&mut self, wanted: &PageSet) -> Result<u64> {
        let mut missing = wanted.clone();
        missing.subtract(&self.here);
        let count = missing.count();
        if count == 0 {
            return Ok(0);
        }
        if self.here.count() + count > self.max_pages as u64 {
            self.make_room(wanted);
        }
        let mut room = (self.max_pages as u64).saturating_sub(self.here.count());
        let mut parts = Vec::new();
        for (mut first, mut count) in missing.runs() {
            while count > 0 && room > 0 {
                let now = count.min(READ_PAGES).min(room);
                parts.push((first, now));
                (first, count, room) = (first + now, count - now, room - now);
            }
        }
        // On all cores: each page may need a frame unpacked, and the guest keeps writing meanwhile.
        let read = parts.par_iter().map(|(first, count)| read_part(&self.reader, *first, *count));
        let mut pages = 0;
        for (first, bytes) in read.collect::<Result<Vec<_>>>()? {
            for (page, contents) in (first..).zip(bytes.as_chunks::<PAGE_SIZE>().0) {
                self.keep(page, contents);
                pages += 1;
            }
        }
        Ok(pages)
    }

    /// Drops the pages that are not in `wanted`. The others stay, so that looping over a set larger
    /// than the cache does not read all of it each time.
    fn make_room(&mut self, wanted: &PageSet) {
        let mut gone = self.here.clone();
        gone.subtract(wanted);
        self.free.extend(gone.iter().map(|page| self.slots[page as usize]));
        self.here.subtract(&gone);
    }

    fn keep(&mut self, page: u64, contents: &Page) {
        let slot = self.free.pop().unwrap_or_else(|| {
            let last = self.arena.last().map_or(ARENA_PAGES, Vec::len);
            if last == ARENA_PAGES {
                self.arena.push(Vec::with_capacity(ARENA_PAGES));
            }
            let arena = self.arena.len() - 1;
            self.arena[arena].push([0; PAGE_SIZE]);
            (arena * ARENA_PAGES + self.arena[arena].len() - 1) as u32
        });
        self.arena[slot as usize / ARENA_PAGES][slot as usize % ARENA_PAGES] = *contents;
        self.slots[page as usize] = slot;
        self.here.insert(page);
    }

    fn get(&self, page: u64) -> Option<&Page> {
        let slot = self.here.contains(page).then(|| self.slots[page as usize] as usize)?;
        Some(&self.arena[slot / ARENA_PAGES][slot % ARENA_PAGES])
    }

    /// Hands each page of `wanted` to `put`, on all cores, which nobody else needs now. Pages that
    /// are not cached are read from the store; returns how many were.
    pub(super) fn each(
        &self,
        wanted: &PageSet,
        put: impl Fn(u64, &Page) -> Result<()> + Sync,
    ) -> Result<u64> {
        let pages: Vec<u64> = wanted.iter().collect();
        let read = AtomicU64::new(0);
        let hand_out = |part: &[u64]| -> Result<()> {
            let mut buf = [0; PAGE_SIZE];
            for page in part {
                if let Some(contents) = self.get(*page) {
                    put(*page, contents)?;
                } else {
                    self.reader.read_page(*page, &mut buf)?;
                    put(*page, &buf)?;
                    read.fetch_add(1, Ordering::Relaxed);
                }
            }
            Ok(())
        };
        // For few pages, waking other threads would take longer.
        if pages.len() <= 2 * HAND_OUT_PAGES {
            hand_out(&pages)?;
        } else {
            pages.par_chunks(HAND_OUT_PAGES).try_for_each(hand_out)?;
        }
        Ok(read.into_inner())
    }

    /// Adds every page that may be nonzero to `pages`.
    pub(super) fn add_contents(&self, pages: &mut PageSet) -> Result<()> {
        for run in self.reader.runs(0, self.reader.pages())? {
            pages.insert_range(run.first, run.count);
        }
        Ok(())
    }
}
