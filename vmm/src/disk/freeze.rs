//! A disk's contents as of a cut, while requests go on.
//!
//! Freezing copies nothing: it only marks the pages that a checkpoint still has to read. A request
//! that is about to change one of them first keeps its contents, under the lock of its chunk, so
//! that at any time the page is either unchanged or kept.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use frazil_snapstore::{Page, PageSet, PageSource, RegionHandle, Transaction, WriteStats};

use super::Disk;
use crate::error::{Result, VmmError};

/// What a page that has changed since the cut held then.
#[derive(Debug)]
pub(super) enum Kept {
    /// What the base holds, which never changes: nothing had to be copied.
    Below,
    /// Zeros.
    Zero,
    InMemory(Box<Page>),
    /// In a slot of the overlay's file.
    InSlot(u64),
}

/// The kept pages of one stripe of chunks, by page number.
pub(super) type KeptPages = HashMap<u64, Kept>;

/// Which pages to keep before they change.
#[derive(Debug, Default)]
pub(super) struct Freeze {
    /// True from the cut until the last kept page is forgotten.
    busy: bool,
    /// `None` while nothing has to be kept.
    pages: Option<Arc<PageSet>>,
}

impl Freeze {
    pub(super) fn is_off(&self) -> bool {
        self.pages.is_none()
    }

    pub(super) fn holds(&self, page: u64) -> bool {
        self.pages.as_ref().is_some_and(|pages| pages.contains(page))
    }

    /// Starts a freeze; returns false if the one before is not over.
    fn start(&mut self, pages: &Arc<PageSet>) -> bool {
        if self.busy {
            return false;
        }
        *self = Self { busy: true, pages: Some(Arc::clone(pages)) };
        true
    }
}

/// How many kept pages are in memory, and how many may be.
#[derive(Debug)]
pub(super) struct KeptRoom {
    used: AtomicU64,
    max: u64,
}

impl KeptRoom {
    pub(super) fn new(max: u64) -> Self {
        Self { used: AtomicU64::new(0), max }
    }

    /// Takes room for one page, if there is any.
    pub(super) fn take(&self) -> bool {
        let one_more = |used: u64| (used < self.max).then_some(used + 1);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
    }

    pub(super) fn give_back(&self, kept: &Kept) {
        if matches!(kept, Kept::InMemory(_)) {
            self.used.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// The contents of some pages of a disk as of a checkpoint's cut, as a source for the store. The
/// disk stays in use; dropping this thaws the pages.
#[derive(Debug)]
pub struct FrozenDisk {
    disk: Arc<Disk>,
    pages: Arc<PageSet>,
}

impl FrozenDisk {
    /// Freezes `pages`. The disk must stand still.
    pub(super) fn new(disk: &Arc<Disk>, pages: Arc<PageSet>) -> Result<Self> {
        if !disk.contents.freeze_mut().start(&pages) {
            return Err(VmmError::NotNow(format!(
                "{}: an earlier checkpoint is not done with its pages",
                disk.name()
            )));
        }
        Ok(Self { disk: Arc::clone(disk), pages })
    }

    /// The pages that were frozen.
    #[must_use]
    pub fn pages(&self) -> &PageSet {
        &self.pages
    }

    /// The disk that the pages belong to.
    #[must_use]
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Writes the frozen pages to `region` of a transaction, and thaws them.
    ///
    /// # Errors
    /// Errors of the store or of reading the disk; the pages stay frozen then.
    pub fn write_to(
        &self,
        transaction: &mut Transaction,
        region: RegionHandle,
    ) -> Result<WriteStats> {
        let written = transaction.write_pages(region, &self.pages, self)?;
        // Thawed before the commit, which does not read the pages again.
        self.thaw();
        Ok(written)
    }

    /// Thaws all pages: no more contents are kept, and those that were are forgotten.
    pub fn thaw(&self) {
        let contents = &self.disk.contents;
        contents.freeze_mut().pages = None;
        contents.forget_kept();
        contents.drop_slots();
    }

    /// Number of pages that are kept because they changed after the cut.
    #[must_use]
    pub fn kept_pages(&self) -> u64 {
        self.disk.contents.kept_count()
    }
}

impl PageSource for FrozenDisk {
    fn read_page(&self, page: u64, buf: &mut Page) -> io::Result<()> {
        let read = self.disk.contents.read_frozen(page, buf);
        read.map_err(|error| {
            io::Error::new(error.kind(), format!("page {page} of {}: {error}", self.disk.name()))
        })
    }
}

impl Drop for FrozenDisk {
    fn drop(&mut self) {
        self.thaw();
        // Only now may another checkpoint freeze pages: it must not find what this one kept.
        self.disk.contents.freeze_mut().busy = false;
    }
}
