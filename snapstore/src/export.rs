//! A region as a plain file again.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use crate::error::StoreError;
use crate::page::PAGE_SIZE;
use crate::snapshot::RegionReader;

/// Pages looked up at once, by one core: 4 MiB.
const PART_PAGES: u64 = 1024;
/// The longest stretch that is written at once.
const WRITE_BYTES_MAX: u64 = 1 << 20;

/// Why a region could not be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// It cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file cannot be written.
    #[error("cannot write the file: {0}")]
    File(#[source] io::Error),
}

/// How far exporting has come.
#[derive(Debug, Default)]
pub struct ExportProgress {
    /// Pages looked at, zero or not.
    pub pages_done: AtomicU64,
    /// Of them, pages written.
    pub pages_written: AtomicU64,
}

/// Writes the first `len_bytes` of `region` to `file`, page `n` at byte 4096 · `n`, on all cores. Pages
/// that are zero are left out: `file` is new, so they are holes. Its length is set.
///
/// # Errors
/// [`StoreError::Corrupt`] if a page cannot be read, before anything of it is written;
/// [`StoreError::Invalid`] if the region is shorter; those of the file. What is in it then is of no use.
pub fn export(
    region: &RegionReader,
    file: &File,
    len_bytes: u64,
    progress: &ExportProgress,
) -> Result<(), ExportError> {
    let pages = len_bytes.div_ceil(PAGE_SIZE as u64);
    if pages > region.pages() {
        let short = StoreError::Invalid(format!(
            "{len_bytes} bytes are more than region `{}` has, {} pages",
            region.name(),
            region.pages()
        ));
        return Err(short.into());
    }
    file.set_len(len_bytes).map_err(ExportError::File)?;
    (0..pages.div_ceil(PART_PAGES)).into_par_iter().try_for_each(|part| {
        let first = part * PART_PAGES;
        let count = PART_PAGES.min(pages - first);
        export_part(region, file, len_bytes, first..first + count, progress)?;
        progress.pages_done.fetch_add(count, Ordering::Relaxed);
        Ok(())
    })
}

/// Writes the pages `pages`, neighbours together.
fn export_part(
    region: &RegionReader,
    file: &File,
    len_bytes: u64,
    pages: std::ops::Range<u64>,
    progress: &ExportProgress,
) -> Result<(), ExportError> {
    let mut at = pages.start;
    let mut contents = Vec::new();
    let write = |at: u64, contents: &mut Vec<u8>| {
        let offset = at * PAGE_SIZE as u64;
        let len = (contents.len() as u64).min(len_bytes - offset) as usize;
        file.write_all_at(&contents[..len], offset).map_err(ExportError::File)?;
        contents.clear();
        Ok(())
    };
    for run in region.runs(pages.start, pages.end - pages.start)? {
        let end = at + (contents.len() / PAGE_SIZE) as u64;
        if !contents.is_empty() && (run.first != end || contents.len() as u64 >= WRITE_BYTES_MAX) {
            write(at, &mut contents)?;
        }
        if contents.is_empty() {
            at = run.first;
        }
        let start = contents.len();
        contents.resize(start + run.count as usize * PAGE_SIZE, 0);
        region.read_run(&run, &mut contents[start..])?;
        progress.pages_written.fetch_add(run.count, Ordering::Relaxed);
    }
    if contents.is_empty() { Ok(()) } else { write(at, &mut contents) }
}
