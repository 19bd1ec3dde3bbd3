//! Pages of a snapshot's region that were needed before, kept in memory.

use std::collections::HashMap;

use frazil_snapstore::{PAGE_SIZE, Page, PageSet, RegionReader};
use rayon::prelude::*;

use crate::error::Result;

/// Pages read from the store at once.
const READ_PAGES: u64 = 64;

/// A region, and as many of its pages as there is room for.
#[derive(Debug)]
pub(super) struct CachedRegion {
    reader: RegionReader,
    pages: HashMap<u64, Box<Page>>,
    max_pages: usize,
}

fn read_part(reader: &RegionReader, first: u64, count: u64) -> Result<Vec<(u64, Box<Page>)>> {
    let mut bytes = vec![0; count as usize * PAGE_SIZE];
    reader.read_pages(first, &mut bytes)?;
    let (pages, _) = bytes.as_chunks::<PAGE_SIZE>();
    Ok((first..).zip(pages.iter().map(|page| Box::new(*page))).collect())
}

impl CachedRegion {
    pub(super) fn new(reader: RegionReader, max_pages: usize) -> Self {
        Self { reader, pages: HashMap::new(), max_pages }
    }

    /// Reads those of `wanted` that are not here, as far as there is room; returns how many it read.
    pub(super) fn fetch(&mut self, wanted: &PageSet) -> Result<u64> {
        let mut missing = PageSet::new(wanted.capacity());
        let absent = wanted.iter().filter(|page| !self.pages.contains_key(page));
        absent.for_each(|page| missing.insert(page));
        let count = missing.count() as usize;
        if count == 0 {
            return Ok(0);
        }
        if self.pages.len() + count > self.max_pages {
            // Those that this time does not need make room. The others stay: to go round in a set
            // that is too large must not cost all of it each time.
            self.pages.retain(|page, _| wanted.contains(*page));
        }
        let mut room = self.max_pages.saturating_sub(self.pages.len()) as u64;
        let mut parts = Vec::new();
        for (mut first, mut count) in missing.runs() {
            while count > 0 && room > 0 {
                let now = count.min(READ_PAGES).min(room);
                parts.push((first, now));
                (first, count, room) = (first + now, count - now, room - now);
            }
        }
        // Each page may be a frame to unpack, and the guest writes on meanwhile: on all cores.
        let read = parts.par_iter().map(|(first, count)| read_part(&self.reader, *first, *count));
        let read: Vec<(u64, Box<Page>)> =
            read.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        let count = read.len() as u64;
        self.pages.extend(read);
        Ok(count)
    }

    /// Hands each of `wanted` to `put`; what is not here is read. Returns how many pages that was.
    pub(super) fn each(
        &self,
        wanted: &PageSet,
        mut put: impl FnMut(u64, &Page) -> Result<()>,
    ) -> Result<u64> {
        let (mut read, mut buf) = (0, [0; PAGE_SIZE]);
        for page in wanted.iter() {
            if let Some(contents) = self.pages.get(&page) {
                put(page, contents)?;
            } else {
                self.reader.read_page(page, &mut buf)?;
                put(page, &buf)?;
                read += 1;
            }
        }
        Ok(read)
    }

    /// Adds every page that is not zero to `pages`.
    pub(super) fn add_contents(&self, pages: &mut PageSet) -> Result<()> {
        for run in self.reader.runs(0, self.reader.pages())? {
            pages.insert_range(run.first, run.count);
        }
        Ok(())
    }
}
