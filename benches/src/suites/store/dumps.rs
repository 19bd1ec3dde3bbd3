//! A sequence of dumps of a guest's RAM, and what changed from each to the next.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use frazil_snapstore::{PAGE_SIZE, Page, PageSet, PageSource, RegionReader, is_zero};

/// Pages read at a time when a dump is read in order.
const PIECE_PAGES: usize = 256;

/// A dump. Pages are read when needed, so that the dumps need not fit into memory.
pub(super) struct Dump {
    path: PathBuf,
    file: File,
    /// The number of its pages to use.
    pages: u64,
}

impl Dump {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let bytes = file.metadata().context("cannot read a file's length")?.len();
        ensure!(
            bytes > 0 && bytes.is_multiple_of(PAGE_SIZE as u64),
            "{}: expected whole pages of {PAGE_SIZE} bytes, found {bytes} bytes",
            path.display()
        );
        Ok(Self { path: path.to_path_buf(), file, pages: bytes / PAGE_SIZE as u64 })
    }

    /// Calls `look` with the number of each page, its contents, and those that `other` has there.
    fn for_each_pair(
        &self,
        mut other: impl FnMut(u64, &mut [u8]) -> anyhow::Result<()>,
        mut look: impl FnMut(u64, &[u8], &[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let (mut own, mut others) = (Vec::new(), Vec::new());
        for first in (0..self.pages).step_by(PIECE_PAGES) {
            let len = (self.pages - first).min(PIECE_PAGES as u64) as usize * PAGE_SIZE;
            own.resize(len, 0);
            others.resize(len, 0);
            self.read(first, &mut own)?;
            other(first, &mut others)?;
            for (page, (own, other)) in
                (first..).zip(own.chunks(PAGE_SIZE).zip(others.chunks(PAGE_SIZE)))
            {
                look(page, own, other)?;
            }
        }
        Ok(())
    }

    fn read(&self, first: u64, bytes: &mut [u8]) -> anyhow::Result<()> {
        self.file
            .read_exact_at(bytes, first * PAGE_SIZE as u64)
            .with_context(|| format!("cannot read {}", self.path.display()))
    }

    /// Fails unless `region` has the same pages as the dump.
    pub(super) fn expect_in(&self, region: &RegionReader) -> anyhow::Result<()> {
        let read = |first, bytes: &mut [u8]| Ok(region.read_pages(first, bytes)?);
        self.for_each_pair(read, |page, expected, found| {
            if expected != found {
                bail!("page {page} of the snapshot differs from that of {}", self.path.display());
            }
            Ok(())
        })
    }
}

impl PageSource for Dump {
    fn read_page(&self, page: u64, buf: &mut Page) -> io::Result<()> {
        self.file.read_exact_at(buf, page * PAGE_SIZE as u64)
    }
}

/// Opens dumps of one guest, to use the first `pages_max` pages of each.
pub(super) fn open(paths: &[PathBuf], pages_max: u64) -> anyhow::Result<Vec<Dump>> {
    ensure!(paths.len() > 1, "expected two dumps or more: --images FILE FILE ...");
    let mut dumps =
        paths.iter().map(|path| Dump::open(path)).collect::<anyhow::Result<Vec<_>>>()?;
    let pages = dumps[0].pages;
    for dump in &mut dumps {
        ensure!(
            dump.pages == pages,
            "{}: expected {pages} pages, as in the first dump, found {}",
            dump.path.display(),
            dump.pages
        );
        dump.pages = pages.min(pages_max);
    }
    Ok(dumps)
}

/// The number of pages of each of `dumps`.
pub(super) fn pages(dumps: &[Dump]) -> u64 {
    dumps.first().map_or(0, |dump| dump.pages)
}

/// What changed from one dump to the next.
pub(super) struct Step {
    /// The pages that differ.
    pub changed: PageSet,
    /// The same, and as many pages that do not differ; fewer if there are not enough.
    pub doubled: PageSet,
    /// Changed pages that were zero.
    pub appeared: u64,
    /// Changed pages that are zero now.
    pub cleared: u64,
    /// Pages that are not zero now.
    pub filled: u64,
}

impl Step {
    /// Compares two dumps; calls `edited` with the old and the new contents of each page that
    /// differs and is not zero in either.
    pub(super) fn between(
        before: &Dump,
        after: &Dump,
        mut edited: impl FnMut(&[u8], &[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let (mut changed, mut kept) = (PageSet::new(after.pages), PageSet::new(after.pages));
        let (mut appeared, mut cleared, mut filled) = (0, 0, 0);
        let read = |first, bytes: &mut [u8]| before.read(first, bytes);
        after.for_each_pair(read, |page, new, old| {
            let zero = is_zero(new);
            filled += u64::from(!zero);
            if new == old {
                if !zero {
                    kept.insert(page);
                }
                return Ok(());
            }
            changed.insert(page);
            match (is_zero(old), zero) {
                (true, _) => appeared += 1,
                (_, true) => cleared += 1,
                _ => edited(old, new)?,
            }
            Ok(())
        })?;
        let doubled = doubled(&changed, &kept);
        Ok(Self { changed, doubled, appeared, cleared, filled })
    }
}

/// `changed`, and as many pages of `kept`: those after changed pages, as in a dirty log that is
/// coarser than a page. `kept` has no zero pages, which would cost nothing in any case.
fn doubled(changed: &PageSet, kept: &PageSet) -> PageSet {
    let mut dirty = changed.clone();
    let mut owed = 0_u64;
    // Twice around: what is still owed at the end is taken from the beginning.
    for turn in 0..2 {
        for page in 0..changed.capacity() {
            if changed.contains(page) {
                owed += u64::from(turn == 0);
            } else if owed > 0 && kept.contains(page) && !dirty.contains(page) {
                dirty.insert(page);
                owed -= 1;
            }
        }
    }
    dirty
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(pages: &[u64]) -> PageSet {
        let mut set = PageSet::new(10);
        pages.iter().for_each(|page| set.insert(*page));
        set
    }

    #[test]
    fn unchanged_pages_behind_changed_ones_double_a_set() {
        assert_eq!(doubled(&set(&[1, 2]), &set(&[0, 4, 5, 6])), set(&[1, 2, 4, 5]));
        assert_eq!(doubled(&set(&[8, 9]), &set(&[0, 3, 7])), set(&[0, 3, 8, 9]), "around the end");
        assert_eq!(doubled(&set(&[1, 9]), &set(&[5])), set(&[1, 5, 9]), "there are no more");
        assert_eq!(doubled(&set(&[]), &set(&[5])), set(&[]));
    }
}
