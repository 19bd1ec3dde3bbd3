//! Regions as streams of bytes, for archives and pipes: decompressed on all cores, 16 MiB at a
//! time.

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, ensure};
use frazil_snapstore::{PAGE_SIZE, RegionReader, StoreError};
use rayon::prelude::*;

const PAGE_BYTES: u64 = PAGE_SIZE as u64;
/// Pages decompressed at once by all cores: 16 MiB.
const BATCH_PAGES: u64 = 4096;
/// Pages of a batch that one core decompresses in a row.
const PART_PAGES: u64 = 256;
/// Bytes written at once.
pub(super) const WRITE_BYTES: usize = 256 << 10;
/// The most extents kept of a region: 16 MiB of them. Beyond that, short holes count as data.
const EXTENTS_MAX: usize = 1 << 20;

/// Standard output, for binary data.
///
/// # Errors
/// If it is a terminal.
pub(super) fn stdout(what: &str) -> anyhow::Result<File> {
    let stdout = io::stdout();
    ensure!(
        !stdout.is_terminal(),
        "expected {what} to go to a file or a pipe, found a terminal on standard output"
    );
    // Bypasses Rust's line buffer for standard output.
    Ok(stdout.as_fd().try_clone_to_owned().context("cannot use standard output")?.into())
}

/// The parts of a region that are not zero.
pub(super) struct Extents {
    /// Pairs of first byte and length, ascending.
    pub list: Vec<(u64, u64)>,
    pub len_bytes: u64,
    /// Holes up to this length count as data.
    hole_max: u64,
}

impl Extents {
    /// The extents of the first `len_bytes` of a region.
    ///
    /// # Errors
    /// Those of the store.
    pub(super) fn of(reader: &RegionReader, len_bytes: u64) -> frazil_snapstore::Result<Self> {
        let mut extents = Self { list: Vec::new(), len_bytes, hole_max: 0 };
        reader.visit_runs(0, |run| {
            let start = run.first * PAGE_BYTES;
            if start >= len_bytes {
                return ControlFlow::Break(());
            }
            extents.add(start, (run.count * PAGE_BYTES).min(len_bytes - start), EXTENTS_MAX);
            ControlFlow::Continue(())
        })?;
        Ok(extents)
    }

    /// One extent that covers everything, zeros included.
    pub(super) fn all(len_bytes: u64) -> Self {
        Self { list: vec![(0, len_bytes)], len_bytes, hole_max: 0 }
    }

    fn add(&mut self, start: u64, len: u64, most: usize) {
        let join = |list: &mut Vec<(u64, u64)>, (start, len): (u64, u64), hole_max: u64| match list
            .last_mut()
        {
            Some((first, before)) if start - (*first + *before) <= hole_max => {
                *before = start + len - *first;
            }
            _ => list.push((start, len)),
        };
        join(&mut self.list, (start, len), self.hole_max);
        while self.list.len() > most {
            self.hole_max = (self.hole_max * 2).max(PAGE_BYTES);
            for extent in std::mem::take(&mut self.list) {
                join(&mut self.list, extent, self.hole_max);
            }
        }
    }

    pub(super) fn data_bytes(&self) -> u64 {
        self.list.iter().map(|(_, len)| len).sum()
    }

    pub(super) fn pages(&self) -> u64 {
        self.data_bytes().div_ceil(PAGE_BYTES)
    }
}

/// Reads the contents of extents, one after the other.
pub(super) struct Contents<'a> {
    reader: &'a RegionReader,
    extents: &'a Extents,
    /// The next extent to read, and how many of its pages were read.
    at: usize,
    inside: u64,
    /// The bytes at hand, and how many of them were returned.
    part: Vec<u8>,
    read: usize,
    /// Pages read so far, for a progress bar.
    done: &'a AtomicU64,
    /// Why reading stopped.
    pub failed: Option<StoreError>,
}

impl<'a> Contents<'a> {
    /// `before` is returned before the first extent.
    pub(super) fn new(
        reader: &'a RegionReader,
        extents: &'a Extents,
        before: Vec<u8>,
        done: &'a AtomicU64,
    ) -> Self {
        Self { reader, extents, at: 0, inside: 0, part: before, read: 0, done, failed: None }
    }

    /// Reads the next extents on all cores; of a long one, only as much as fits the batch.
    fn next_batch(&mut self) -> frazil_snapstore::Result<()> {
        let mut parts = Vec::new();
        let mut room = BATCH_PAGES;
        while let Some((start, len)) = self.extents.list.get(self.at).filter(|_| room > 0) {
            let pages = len.div_ceil(PAGE_BYTES);
            let count = (pages - self.inside).min(room).min(PART_PAGES);
            let bytes = (count * PAGE_BYTES).min(len - self.inside * PAGE_BYTES);
            parts.push((start / PAGE_BYTES + self.inside, count, bytes as usize));
            room -= count;
            self.inside += count;
            if self.inside == pages {
                self.at += 1;
                self.inside = 0;
            }
        }
        let read = |(first, count, bytes): &(u64, u64, usize)| {
            let mut pages = vec![0; *count as usize * PAGE_SIZE];
            self.reader.read_pages(*first, &mut pages)?;
            pages.truncate(*bytes);
            Ok(pages)
        };
        let parts: Vec<Vec<u8>> =
            parts.par_iter().map(read).collect::<frazil_snapstore::Result<_>>()?;
        self.part = parts.concat();
        self.read = 0;
        self.done.fetch_add((self.part.len() as u64).div_ceil(PAGE_BYTES), Ordering::Relaxed);
        Ok(())
    }
}

impl Read for Contents<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.read == self.part.len() && self.at < self.extents.list.len() {
            self.next_batch().map_err(|error| {
                let told = io::Error::other(error.to_string());
                self.failed = Some(error);
                told
            })?;
        }
        let len = out.len().min(self.part.len() - self.read);
        out[..len].copy_from_slice(&self.part[self.read..self.read + len]);
        self.read += len;
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// However few extents are kept, they cover all contents and do not overlap.
        #[test]
        fn extents_are_few_and_leave_nothing_out(
            pages in proptest::collection::btree_set(0_u64..400, 0..150),
            most in 1_usize..20,
        ) {
            let len_bytes = 400 * PAGE_BYTES;
            let mut extents = Extents { list: Vec::new(), len_bytes, hole_max: 0 };
            pages.iter().for_each(|page| extents.add(page * PAGE_BYTES, PAGE_BYTES, most));
            prop_assert!(extents.list.len() <= most);
            let mut end = 0;
            for (index, (start, len)) in extents.list.iter().enumerate() {
                prop_assert!(*len > 0 && (index == 0 || *start > end));
                end = start + len;
            }
            let inside = |page: u64| {
                let at = page * PAGE_BYTES;
                extents.list.iter().any(|(start, len)| (*start..start + len).contains(&at))
            };
            prop_assert!(pages.iter().all(|page| inside(*page)));
            // As long as there is room, no hole is filled.
            let mut exact = Extents { list: Vec::new(), len_bytes, hole_max: 0 };
            pages.iter().for_each(|page| exact.add(page * PAGE_BYTES, PAGE_BYTES, 400));
            prop_assert_eq!(exact.data_bytes(), pages.len() as u64 * PAGE_BYTES);
        }
    }
}
