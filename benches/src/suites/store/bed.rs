//! A store to measure, with one region and one branch of snapshots.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use frazil_snapstore::{
    Description, PAGE_SIZE, PageSet, PageSource, RegionReader, SnapshotId, Store, StoreOptions,
    WriteStats,
};
use rustix::fs::{Advice, fadvise};
use tempfile::TempDir;

use super::pages::random_pages;
use crate::bench::Bench;

const REGION: &str = "ram";
const READ_BYTES: usize = 1 << 20;

/// A store in a directory of its own. It is opened when first needed.
pub(super) struct Bed {
    folder: TempDir,
    options: StoreOptions,
    pages: u64,
    store: Option<Arc<Store>>,
    head: Option<SnapshotId>,
    commits: u64,
}

impl Bed {
    /// Prepares a store for a region of `pages` pages.
    pub(super) fn new(bench: &Bench, pages: u64, options: StoreOptions) -> anyhow::Result<Self> {
        let folder = bench.scratch()?;
        Ok(Self { folder, options, pages, store: None, head: None, commits: 0 })
    }

    /// Pages of the region.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// Bytes of the region.
    pub(super) fn region_bytes(&self) -> f64 {
        self.pages as f64 * PAGE_SIZE as f64
    }

    /// A directory on the same disk.
    pub(super) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A version that no page has had yet.
    pub(super) fn next_version(&self) -> u64 {
        self.commits + 1
    }

    /// The store's handle, opened if necessary.
    pub(super) fn store(&mut self) -> anyhow::Result<Arc<Store>> {
        if let Some(store) = &self.store {
            return Ok(Arc::clone(store));
        }
        let store = Store::open_or_create(&self.folder.path().join("store"), self.options.clone())
            .context("cannot open a store")?;
        Ok(Arc::clone(self.store.insert(store)))
    }

    /// Drops the handle: the next one has nothing cached.
    pub(super) fn close(&mut self) {
        self.store = None;
    }

    /// Sets the options of the next handle.
    pub(super) fn set_options(&mut self, options: StoreOptions) {
        self.close();
        self.options = options;
    }

    /// The newest snapshot.
    pub(super) fn head(&self) -> anyhow::Result<SnapshotId> {
        self.head.context("nothing was committed yet")
    }

    /// Makes the next snapshot have no parent.
    pub(super) fn start_over(&mut self) {
        self.head = None;
    }

    /// Commits `dirty` on top of the newest snapshot. Returns the time.
    pub(super) fn commit(
        &mut self,
        dirty: &PageSet,
        source: &dyn PageSource,
    ) -> anyhow::Result<Duration> {
        Ok(self.commit_counted(dirty, source)?.0)
    }

    /// Like [`Self::commit`]; also returns what became of the pages.
    pub(super) fn commit_counted(
        &mut self,
        dirty: &PageSet,
        source: &dyn PageSource,
    ) -> anyhow::Result<(Duration, WriteStats)> {
        let store = self.store()?;
        self.commits += 1;
        let description = Description {
            name: "bench".into(),
            // Otherwise two snapshots of the same millisecond could be identical.
            message: format!("commit {}", self.commits),
            ..Description::default()
        };
        let started = Instant::now();
        let mut transaction = store.begin(self.head)?;
        let region = transaction.region(REGION, self.pages)?;
        let stats = transaction.write_pages(region, dirty, source)?;
        let committed = transaction.commit(description)?;
        let took = started.elapsed();
        self.head = Some(committed.id);
        Ok((took, stats))
    }

    /// Like [`Self::commit`], but returns the bytes by which the store's files grew.
    pub(super) fn commit_growth(
        &mut self,
        dirty: &PageSet,
        source: &dyn PageSource,
    ) -> anyhow::Result<u64> {
        let before = self.stored_bytes()?;
        self.commit(dirty, source)?;
        Ok(self.stored_bytes()?.saturating_sub(before))
    }

    /// The region in the newest snapshot.
    pub(super) fn reader(&mut self) -> anyhow::Result<RegionReader> {
        let head = self.head()?;
        self.reader_of(head)
    }

    /// The region in a snapshot of the store.
    pub(super) fn reader_of(&mut self, id: SnapshotId) -> anyhow::Result<RegionReader> {
        Ok(self.store()?.snapshot(id)?.region(REGION)?)
    }

    /// Reopens the store and reads `count` random pages of the newest snapshot. Returns the time.
    pub(super) fn open_and_read(&mut self, count: usize, seed: u64) -> anyhow::Result<Duration> {
        let numbers = random_pages(self.pages, count, seed);
        let mut buf = [0; PAGE_SIZE];
        self.close();
        let started = Instant::now();
        let reader = self.reader()?;
        for page in numbers {
            reader.read_page(page, &mut buf)?;
        }
        Ok(started.elapsed())
    }

    /// Total length of the store's files.
    pub(super) fn stored_bytes(&self) -> anyhow::Result<u64> {
        let files = self.files()?;
        files.iter().map(|path| Ok(fs::metadata(path).with_context(|| at(path))?.len())).sum()
    }

    /// Closes the store, and asks the kernel to drop its files from the page cache. That works
    /// because they are durable; a host below may still have them in memory.
    pub(super) fn evict(&mut self) -> anyhow::Result<()> {
        self.close();
        for path in self.files()? {
            let file = File::open(&path).with_context(|| at(&path))?;
            fadvise(&file, 0, None, Advice::DontNeed).context("posix_fadvise failed")?;
        }
        Ok(())
    }

    /// Reads the store's files one after the other. Returns the time.
    pub(super) fn read_files(&self) -> anyhow::Result<Duration> {
        let files = self.files()?;
        let mut buffer = vec![1; READ_BYTES];
        let started = Instant::now();
        for path in files {
            let mut file = File::open(&path).with_context(|| at(&path))?;
            while file.read(&mut buffer).with_context(|| at(&path))? > 0 {}
        }
        Ok(started.elapsed())
    }

    fn files(&self) -> anyhow::Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        list(&self.folder.path().join("store"), &mut files)?;
        ensure!(!files.is_empty(), "there is no store yet");
        Ok(files)
    }
}

fn list(folder: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder).with_context(|| at(folder))? {
        let path = entry.with_context(|| at(folder))?.path();
        if path.is_dir() {
            list(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

fn at(path: &Path) -> String {
    format!("cannot read {}", path.display())
}
