//! Where a disk stands in its machine's line of snapshots.

use std::sync::Arc;

use frazil_snapstore::{Page, PageSet, RegionHandle, Transaction};

use super::pages::CHUNK_PAGES;
use super::{Disk, Drained, FrozenDisk};
use crate::error::{Result, VmmError};

/// A disk, and what the snapshot that its machine stands on lacks of it.
///
/// A checkpoint calls, in this order: [`Self::prepare`] and [`Self::region`] while the guest runs;
/// [`Disk::drain`] and [`Self::cut`] while the vCPUs stand still, dropping what `drain` returned when
/// they go on; [`FrozenDisk::write_to`] while the guest runs; [`Self::published`] once the snapshot
/// is. One that fails in between just drops what it has.
#[derive(Debug)]
pub struct DiskLine {
    disk: Arc<Disk>,
    /// Pages written since the head, as far as they were harvested. They leave the set only when a
    /// snapshot that holds them is published, so a failed checkpoint loses none.
    since_head: PageSet,
    /// A copy of it, made before the pause so that nothing is allocated in it.
    ready: Option<Arc<PageSet>>,
}

impl DiskLine {
    /// A disk that has just been opened or resumed.
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

    /// Pages that the head lacks, as far as they were harvested.
    #[must_use]
    pub fn since_head(&self) -> &PageSet {
        &self.since_head
    }

    /// Names the disk's region in a transaction.
    ///
    /// # Errors
    /// The store's.
    pub fn region(&self, transaction: &mut Transaction) -> Result<RegionHandle> {
        Ok(transaction.region(self.disk.name(), self.disk.pages())?)
    }

    /// Shortens the pause that follows: what was written by now is harvested now.
    pub fn prepare(&mut self) {
        self.disk.harvest(&mut self.since_head);
        self.ready = Some(Arc::new(self.since_head.clone()));
    }

    /// Takes note of what was written by now.
    pub fn harvest(&mut self) {
        self.disk.harvest(&mut self.since_head);
    }

    /// Makes a page what the snapshot has of it that is about to be the head. The disk stands still,
    /// which `drained` proves, and no checkpoint is being taken.
    ///
    /// # Errors
    /// [`VmmError::Host`] if the overlay cannot be written.
    pub fn put_back(&self, drained: &Drained, page: u64, contents: &Page) -> Result<()> {
        let cannot = || VmmError::host(format!("put page {page} of {} back", self.disk.name()));
        drained.disk().contents.put_back(page, contents).map_err(cannot())
    }

    /// The disk has become what the head has: it lacks nothing.
    pub fn rewound(&mut self) {
        self.since_head.clear();
    }

    /// Freezes all that the head lacks. What this takes depends on what was written since
    /// [`Self::prepare`], not on the disk.
    ///
    /// # Errors
    /// As [`Drained::freeze`].
    ///
    /// # Panics
    /// If `drained` is another disk.
    pub fn cut(&mut self, drained: &Drained) -> Result<FrozenDisk> {
        assert!(Arc::ptr_eq(drained.disk(), &self.disk), "the disk of this line stands still");
        let mut ready = self.ready.take().unwrap_or_else(|| Arc::new(self.since_head.clone()));
        // Nobody else has it yet, so nothing is cloned.
        let pages = Arc::make_mut(&mut ready);
        self.disk.contents.dirty.take(|chunk, word| {
            pages.insert_words(chunk * CHUNK_PAGES, &[word]);
            self.since_head.insert_words(chunk * CHUNK_PAGES, &[word]);
        });
        drained.freeze(ready)
    }

    /// The snapshot that holds what was frozen is published: it is the head.
    pub fn published(&mut self, frozen: &FrozenDisk) {
        self.since_head.subtract(frozen.pages());
    }
}
