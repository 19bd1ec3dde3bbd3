//! Exporting a region to a plain file.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use crate::error::StoreError;
use crate::page::PAGE_SIZE;
use crate::snapshot::RegionReader;

/// Pages that one core looks up at once: 4 MiB.
const PART_PAGES: u64 = 1024;
/// Bytes of adjacent pages after which they are written.
const WRITE_BYTES_MAX: u64 = 1 << 20;

/// Why a region could not be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The region cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file cannot be written.
    #[error("cannot write the file: {0}")]
    File(#[source] io::Error),
}

/// How far exporting has come.
#[derive(Debug, Default)]
pub struct ExportProgress {
    /// Pages processed, zero or not.
    pub pages_done: AtomicU64,
    /// Of these, pages with contents.
    pub pages_written: AtomicU64,
}

/// Writes the first `len_bytes` of `region` to `file`, page `n` at byte 4096 · `n`, on all cores,
/// and sets its length. Zero pages are left out: `file` must be new, so that they are holes.
///
/// # Errors
/// [`StoreError::Corrupt`] if a page cannot be read (nothing of such a page is written);
/// [`StoreError::Invalid`] if the region is shorter; [`ExportError::File`] for errors of the file.
/// In any case the file is then incomplete.
pub fn export(
    region: &RegionReader,
    file: &File,
    len_bytes: u64,
    progress: &ExportProgress,
) -> Result<(), ExportError> {
    let pages = len_bytes.div_ceil(PAGE_SIZE as u64);
    check(region, pages)?;
    file.set_len(len_bytes).map_err(ExportError::File)?;
    let part = Part { region, file, first: 0, start: 0, end: len_bytes, progress };
    part.write(0..pages)
}

/// Writes the pages `pages` of `region` to `file`, from byte `start` on, on all cores. Zero pages
/// are left out: that part of `file` must be a hole, and `file` must be long enough.
///
/// # Errors
/// As [`export`].
pub fn export_at(
    region: &RegionReader,
    pages: Range<u64>,
    file: &File,
    start: u64,
    progress: &ExportProgress,
) -> Result<(), ExportError> {
    check(region, pages.end)?;
    let end = start + (pages.end - pages.start) * PAGE_SIZE as u64;
    Part { region, file, first: pages.start, start, end, progress }.write(pages)
}

fn check(region: &RegionReader, end_page: u64) -> Result<(), ExportError> {
    if end_page <= region.pages() {
        return Ok(());
    }
    let (name, pages) = (region.name(), region.pages());
    let short = format!("region `{name}` has only {pages} pages: cannot export {end_page}");
    Err(StoreError::Invalid(short).into())
}

/// A part of a region, and the part of a file that it is written to.
struct Part<'a> {
    region: &'a RegionReader,
    file: &'a File,
    /// The page at byte `start` of the file.
    first: u64,
    start: u64,
    /// The offset in the file where the part ends.
    end: u64,
    progress: &'a ExportProgress,
}

impl Part<'_> {
    fn write(&self, pages: Range<u64>) -> Result<(), ExportError> {
        let parts = (pages.end - pages.start).div_ceil(PART_PAGES);
        (0..parts).into_par_iter().try_for_each(|part| {
            let first = pages.start + part * PART_PAGES;
            let end = (first + PART_PAGES).min(pages.end);
            self.write_some(first..end)?;
            self.progress.pages_done.fetch_add(end - first, Ordering::Relaxed);
            Ok(())
        })
    }

    /// Writes the pages `pages`, adjacent ones together.
    fn write_some(&self, pages: Range<u64>) -> Result<(), ExportError> {
        let mut at = pages.start;
        let mut contents = Vec::new();
        for run in self.region.runs(pages.start, pages.end - pages.start)? {
            let end = at + (contents.len() / PAGE_SIZE) as u64;
            if !contents.is_empty()
                && (run.first != end || contents.len() as u64 >= WRITE_BYTES_MAX)
            {
                self.flush(at, &mut contents)?;
            }
            if contents.is_empty() {
                at = run.first;
            }
            let start = contents.len();
            contents.resize(start + run.count as usize * PAGE_SIZE, 0);
            self.region.read_run(&run, &mut contents[start..])?;
            self.progress.pages_written.fetch_add(run.count, Ordering::Relaxed);
        }
        if contents.is_empty() { Ok(()) } else { self.flush(at, &mut contents) }
    }

    fn flush(&self, page: u64, contents: &mut Vec<u8>) -> Result<(), ExportError> {
        let offset = self.start + (page - self.first) * PAGE_SIZE as u64;
        let len = (contents.len() as u64).min(self.end - offset) as usize;
        self.file.write_all_at(&contents[..len], offset).map_err(ExportError::File)?;
        contents.clear();
        Ok(())
    }
}
