//! Where a disk stands in its machine's line of snapshots.

use std::sync::Arc;

use frazil_snapstore::{Page, PageSet, RegionHandle, Transaction};

use super::pages::CHUNK_PAGES;
use super::{Disk, Drained, FrozenDisk};
use crate::error::{Result, VmmError};

/// A disk, and which of its pages the machine's head snapshot lacks.
///
/// A checkpoint calls, in this order: [`Self::prepare`] and [`Self::region`] while the guest runs;
/// [`Disk::drain`] and [`Self::cut`] while the vCPUs stand still, dropping what `drain` returned
/// when they go on; [`FrozenDisk::write_to`] while the guest runs; [`Self::record_published`] once
/// the snapshot is published. A checkpoint that fails in between just drops what it has.
#[derive(Debug)]
pub struct DiskLine {
    disk: Arc<Disk>,
    /// Harvested pages that were written since the head. They leave the set only when a snapshot
    /// that holds them is published, so a failed checkpoint loses none.
    since_head: PageSet,
    /// A copy of `since_head`, made before the pause so that nothing is allocated during it.
    ready: Option<Arc<PageSet>>,
}

impl DiskLine {
    /// Tracks a disk that has just been opened or resumed.
    #[must_use]
    pub fn new(disk: Arc<Disk>) -> Self {
        let since_head = PageSet::new(disk.pages());
        Self { disk, since_head, ready: None }
    }

    /// The disk.
    #[must_use]
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Harvested pages that the head lacks.
    #[must_use]
    pub fn since_head(&self) -> &PageSet {
        &self.since_head
    }

    /// Names the disk's region in a transaction.
    ///
    /// # Errors
    /// Errors of the store.
    pub fn region(&self, transaction: &mut Transaction) -> Result<RegionHandle> {
        Ok(transaction.region(self.disk.name(), self.disk.pages())?)
    }

    /// Shortens the pause that follows by harvesting what was written so far.
    pub fn prepare(&mut self) {
        self.disk.harvest(&mut self.since_head);
        self.ready = Some(Arc::new(self.since_head.clone()));
    }

    /// Harvests what was written so far.
    pub fn harvest(&mut self) {
        self.disk.harvest(&mut self.since_head);
    }

    /// Sets a page to what it holds in the snapshot that is about to become the head. `drained`
    /// proves that the disk stands still; no checkpoint may be under way.
    ///
    /// # Errors
    /// [`VmmError::Host`] if the overlay cannot be written.
    pub fn put_back(&self, drained: &Drained, page: u64, contents: &Page) -> Result<()> {
        let cannot = || VmmError::host(format!("put page {page} of {} back", self.disk.name()));
        drained.disk().contents.put_back(page, contents).map_err(cannot())
    }

    /// Notes that the disk now equals the head, which therefore lacks nothing.
    pub fn rewound(&mut self) {
        self.since_head.clear();
    }

    /// Freezes all pages that the head lacks. How long this takes depends on what was written since
    /// [`Self::prepare`], not on the size of the disk.
    ///
    /// # Errors
    /// As [`Drained::freeze`].
    ///
    /// # Panics
    /// If `drained` is another disk's.
    pub fn cut(&mut self, drained: &Drained) -> Result<FrozenDisk> {
        assert!(Arc::ptr_eq(drained.disk(), &self.disk), "the disk of this line stands still");
        let mut ready = self.ready.take().unwrap_or_else(|| Arc::new(self.since_head.clone()));
        // Nobody else holds this `Arc` yet, so nothing is cloned.
        let pages = Arc::make_mut(&mut ready);
        self.disk.contents.dirty.take(|chunk, word| {
            pages.insert_words(chunk * CHUNK_PAGES, &[word]);
            self.since_head.insert_words(chunk * CHUNK_PAGES, &[word]);
        });
        drained.freeze(ready)
    }

    /// Notes that the snapshot with the frozen pages is published, and so is the head.
    pub fn record_published(&mut self, frozen: &FrozenDisk) {
        self.since_head.subtract(frozen.pages());
    }
}
