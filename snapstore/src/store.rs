//! A store: opening it, its catalog of snapshots, and finding one by what a person types.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use crate::catalog::{Catalog, SnapshotInfo};
use crate::create::{create_if_missing, journal_start, read_store_header, refuse_foreign};
use crate::delta::Base;
use crate::elide::{FingerprintIndex, Gate};
use crate::error::{Result, StoreError};
use crate::format::{
    JOURNAL_FILE, LOCK_FILE, MAX_FRAME_PAGES, MAX_SEGMENT_LEN, RecordKind, STORE_FILE,
};
use crate::frame::Frame;
use crate::id::{BlockRef, Hash, SnapshotId};
use crate::journal::Cursor;
use crate::journal_entry::Entry;
use crate::node::Node;
use crate::page::{PAGE_SIZE, Page};
use crate::segment::Segments;
use crate::snapshot::Snapshot;
use crate::storage::{DirStorage, LockError, Pin, Storage, StoreFile, WriterLock};
use crate::tree::{FlushPolicy, NodeSource};

/// How a store is written and read. Nothing here changes the format.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// zstd level for frames; negative levels are the fast ones.
    pub compression_level: i32,
    /// Pages compressed together: small frames make faults quick, large ones compress better.
    pub frame_pages: usize,
    /// A segment is closed when it would grow beyond this many bytes.
    pub segment_max_bytes: u64,
    /// Threads that compress; 0 means one a core.
    pub workers: usize,
    /// Memory for decoded tree nodes in bytes.
    pub node_cache_bytes: u64,
    /// Memory for decoded frames in bytes.
    pub frame_cache_bytes: u64,
    /// Memory for single pages that deltas are made against, in bytes.
    pub base_cache_bytes: u64,
    /// Memory for the fingerprints of pages in the store, in bytes.
    pub dedup_index_bytes: u64,
    /// About how many scattered changes a tree node right above the leaves keeps before they move
    /// down; at most 16,384, so that nodes stay small enough to be read.
    pub pending_runs: usize,
    /// What need not be written.
    pub elide: Elide,
}

/// The most of [`StoreOptions::pending_runs`].
const PENDING_RUNS_MAX: usize = 1 << 14;

/// What is left out of what is written. Reading needs none of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)] // four independent switches
pub struct Elide {
    /// Zero pages take no frame.
    pub zero: bool,
    /// Pages equal to the parent's are not written again.
    pub equal: bool,
    /// Pages equal to any in the store that is still known refer to that one.
    pub dedup: bool,
    /// Pages that differ little from the parent's are stored as the difference.
    pub delta: bool,
}

impl Default for Elide {
    fn default() -> Self {
        Self { zero: true, equal: true, dedup: true, delta: true }
    }
}

impl Elide {
    /// Every page is written as it is.
    pub const NONE: Self = Self { zero: false, equal: false, dedup: false, delta: false };
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            compression_level: 1,
            frame_pages: 16,
            segment_max_bytes: 256 << 20,
            workers: 0,
            node_cache_bytes: 32 << 20,
            frame_cache_bytes: 16 << 20,
            base_cache_bytes: 32 << 20,
            dedup_index_bytes: 16 << 20,
            pending_runs: 2048,
            elide: Elide::default(),
        }
    }
}

/// A store of snapshots.
pub struct Store {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) options: StoreOptions,
    pub(crate) uuid: [u8; 16],
    pub(crate) segments: Segments,
    pub(crate) nodes: Cache<Hash, Arc<Node>, NodeWeighter>,
    pub(crate) frames: Cache<Hash, Arc<Frame>, FrameWeighter>,
    pub(crate) bases: Cache<Base, Arc<Page>, PageWeighter>,
    pub(crate) fingerprints: FingerprintIndex,
    pub(crate) delta_gate: Gate,
    pub(crate) flush_policy: FlushPolicy,
    pub(crate) pool: rayon::ThreadPool,
    catalog: RwLock<Catalog>,
    pub(crate) writer: Mutex<WriterState>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("storage", &self.storage).finish_non_exhaustive()
    }
}

/// What the writing side of this handle remembers between transactions.
#[derive(Debug, Default)]
pub(crate) struct WriterState {
    /// Why no more transactions may start, after an I/O error.
    pub latched: Option<String>,
    /// Leave the newest segment alone and start another.
    pub abandon_tail: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct NodeWeighter;

impl Weighter<Hash, Arc<Node>> for NodeWeighter {
    fn weight(&self, _key: &Hash, node: &Arc<Node>) -> u64 {
        128 + (node.runs.len() * 72 + node.children.len() * 48) as u64
    }
}

#[derive(Clone, Debug)]
pub(crate) struct FrameWeighter;

impl Weighter<Hash, Arc<Frame>> for FrameWeighter {
    fn weight(&self, _key: &Hash, frame: &Arc<Frame>) -> u64 {
        64 + (frame.pages.len() + size_of_val(&*frame.bases)) as u64
    }
}

#[derive(Clone, Debug)]
pub(crate) struct PageWeighter;

impl Weighter<Base, Arc<Page>> for PageWeighter {
    fn weight(&self, _key: &Base, _page: &Arc<Page>) -> u64 {
        128 + PAGE_SIZE as u64
    }
}

impl Store {
    /// Opens the store in directory `path`.
    ///
    /// # Errors
    /// [`StoreError::NotAStore`] if there is none; [`StoreError::Corrupt`] if its journal is
    /// damaged before the newest record.
    pub fn open(path: &Path, options: StoreOptions) -> Result<Arc<Self>> {
        Self::open_storage(Arc::new(DirStorage::new(path)), options)
    }

    /// Opens the store in directory `path`, creating it if the directory is missing or empty.
    ///
    /// # Errors
    /// [`StoreError::NotAStore`] if the directory holds anything else.
    pub fn open_or_create(path: &Path, options: StoreOptions) -> Result<Arc<Self>> {
        let storage = DirStorage::new(path);
        if path.exists() && !path.is_dir() {
            return Err(StoreError::NotAStore {
                path: path.display().to_string(),
                expected: "a directory",
                found: "a file".into(),
            });
        }
        if !path.join(STORE_FILE).exists() {
            storage.list("").map_or(Ok(()), |names| refuse_foreign(&storage, &names))?;
            storage
                .create_folders()
                .map_err(|error| StoreError::io("create", path.display().to_string(), error))?;
        }
        Self::open_or_create_storage(Arc::new(storage), options)
    }

    /// As [`Self::open_or_create`], on any storage.
    ///
    /// # Errors
    /// As [`Self::open_or_create`].
    pub fn open_or_create_storage(
        storage: Arc<dyn Storage>,
        options: StoreOptions,
    ) -> Result<Arc<Self>> {
        create_if_missing(storage.as_ref())?;
        Self::open_storage(storage, options)
    }

    /// As [`Self::open`], on any storage.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_storage(storage: Arc<dyn Storage>, options: StoreOptions) -> Result<Arc<Self>> {
        if !(1..=MAX_FRAME_PAGES).contains(&options.frame_pages) {
            return Err(StoreError::Invalid(format!(
                "frame size: expected 1 to {MAX_FRAME_PAGES} pages, found {}",
                options.frame_pages
            )));
        }
        let segment_max_bytes = options.segment_max_bytes.clamp(1 << 12, MAX_SEGMENT_LEN);
        let options = StoreOptions { segment_max_bytes, ..options };
        let header = read_store_header(storage.as_ref())?;
        let start = journal_start(storage.as_ref(), header.store)?;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(options.workers)
            .thread_name(|index| format!("frazil-zstd{index}"))
            .build()
            .map_err(|error| {
                StoreError::Invalid(format!("cannot start worker threads: {error}"))
            })?;
        let store = Self {
            uuid: header.store,
            segments: Segments::new(Arc::clone(&storage), header.store),
            nodes: Cache::with_weighter(4096, options.node_cache_bytes, NodeWeighter),
            frames: Cache::with_weighter(512, options.frame_cache_bytes, FrameWeighter),
            flush_policy: FlushPolicy::of(options.pending_runs.min(PENDING_RUNS_MAX)),
            pool,
            catalog: RwLock::new(Catalog::new(start)),
            fingerprints: FingerprintIndex::new(options.dedup_index_bytes),
            delta_gate: Gate::default(),
            bases: Cache::with_weighter(1024, options.base_cache_bytes, PageWeighter),
            writer: Mutex::default(),
            storage,
            options,
        };
        store.refresh()?;
        Ok(Arc::new(store))
    }

    /// The store's place, for messages.
    #[must_use]
    pub fn describe(&self) -> String {
        self.storage.describe()
    }

    /// The folder it is in, if it is in one of a local file system.
    #[must_use]
    pub fn folder(&self) -> Option<std::path::PathBuf> {
        self.storage.folder()
    }

    /// Reads what other processes published, forgot or pruned since the store was opened or last
    /// refreshed.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if the journal is damaged before its newest record.
    pub fn refresh(&self) -> Result<()> {
        let mut catalog = self.catalog.write().unwrap_or_else(PoisonError::into_inner);
        let file = self.open_journal(false)?;
        if catalog.cursor.goes_on_in(file.as_ref())? {
            catalog.advance(file.as_ref())?;
            self.follow(&catalog);
        } else {
            // Written anew by `prune`, or a record that was seen was taken back, since its sync
            // failed. From this file: its name may change hands again.
            *catalog = Catalog::read(file.as_ref(), self.uuid)?;
            self.follow(&catalog);
            self.segments.close();
            self.forget_contents();
        }
        Ok(())
    }

    /// The journal as it is now: its name may have changed hands.
    pub(crate) fn open_journal(&self, writable: bool) -> Result<Arc<dyn StoreFile>> {
        self.storage
            .open(JOURNAL_FILE, writable)
            .map_err(|error| StoreError::io("open", JOURNAL_FILE, error))
    }

    /// Lets a handle that was latched by an I/O error write again, as a new process would: what
    /// is published is read anew, and nothing is appended to the segment in doubt.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn reopen(&self) -> Result<()> {
        let mut writer = self.writer_state();
        let file = self.open_journal(false)?;
        // Replaced as a whole: readers never see an empty store.
        let catalog = Catalog::read(file.as_ref(), self.uuid)?;
        self.follow(&catalog);
        // Whatever the handle wrote and was not published is no more.
        self.segments.close();
        self.forget_contents();
        *self.catalog.write().unwrap_or_else(PoisonError::into_inner) = catalog;
        *writer = WriterState { abandon_tail: true, latched: None };
        Ok(())
    }

    /// The published snapshots, oldest first.
    #[must_use]
    pub fn snapshots(&self) -> Vec<SnapshotInfo> {
        self.catalog().snapshots().to_vec()
    }

    /// A hash of all of the journal that was read: as long as it stays the same, so do snapshots and tags.
    #[must_use]
    pub fn journal_hash(&self) -> Hash {
        self.catalog().cursor.chain()
    }

    /// The newest published snapshot.
    #[must_use]
    pub fn latest(&self) -> Option<SnapshotInfo> {
        self.catalog().snapshots().last().copied()
    }

    /// The tags and what they point to.
    #[must_use]
    pub fn tags(&self) -> BTreeMap<String, SnapshotId> {
        self.catalog().tags().clone()
    }

    /// Bytes at the end of the journal that are no record: a torn append, which the next writer
    /// clears away, or damage to the newest record.
    #[must_use]
    pub fn torn_journal_bytes(&self) -> u64 {
        self.catalog().cursor.torn_bytes
    }

    /// Finds the snapshot that `reference` names: an id or a unique prefix of at least four
    /// digits, a tag, `latest`, each with an optional `~N` for the N-th ancestor.
    ///
    /// # Errors
    /// [`StoreError::UnknownRef`] or [`StoreError::AmbiguousRef`].
    pub fn resolve(&self, reference: &str) -> Result<SnapshotInfo> {
        let catalog = self.catalog();
        crate::reference::resolve(catalog.snapshots(), catalog.tags(), reference, &self.describe())
    }

    /// Opens snapshot `id` for reading. If it is forgotten and pruned meanwhile, reading fails:
    /// see [`Self::pin`].
    ///
    /// # Errors
    /// [`StoreError::UnknownRef`] if it is not published; [`StoreError::Corrupt`] if its manifest
    /// is damaged.
    pub fn snapshot(self: &Arc<Self>, id: SnapshotId) -> Result<Snapshot> {
        Snapshot::load(Arc::clone(self), &self.published(id)?, None)
    }

    /// Opens snapshot `id` for as long as the returned one, and what is made of it, lives: nobody
    /// prunes it away meanwhile, though it may be forgotten. On a medium that cannot be written
    /// to, as [`Self::snapshot`].
    ///
    /// # Errors
    /// As [`Self::snapshot`].
    pub fn pin(self: &Arc<Self>, id: SnapshotId) -> Result<Snapshot> {
        let pin = self.pin_name(id);
        // Behind the pin: whoever prunes from here on sees it, and what was forgotten before is
        // not published any more.
        self.refresh()?;
        Snapshot::load(Arc::clone(self), &self.published(id)?, pin)
    }

    /// As [`Self::pin`]; or a snapshot that was forgotten while somebody, such as the running
    /// machine that goes on from it, holds a pin on it, and does until this returns.
    ///
    /// # Errors
    /// As [`Self::snapshot`].
    pub fn pin_held(self: &Arc<Self>, id: SnapshotId) -> Result<Snapshot> {
        self.refresh()?;
        if self.find(id).is_some() {
            return self.pin(id);
        }
        // Before there is a pin of our own, which would be no sign that the data is still there.
        let info = self.published_or_held(id)?;
        Snapshot::load(Arc::clone(self), &info, self.pin_name(id))
    }

    /// A snapshot that is published, or was forgotten while somebody holds a pin on it.
    pub(crate) fn published_or_held(&self, id: SnapshotId) -> Result<SnapshotInfo> {
        let forgotten = self.catalog().find_forgotten(id);
        match forgotten {
            Some(info) if self.pinned()?.contains(&id) => Ok(info),
            _ => self.published(id),
        }
    }

    pub(crate) fn pin_name(&self, id: SnapshotId) -> Option<Arc<dyn Pin>> {
        match self.storage.pin(&id.to_string()) {
            Ok(pin) => Some(Arc::from(pin)),
            Err(error) => {
                tracing::warn!(%error, %id, "cannot pin a snapshot: it can be pruned while in use");
                None
            }
        }
    }

    pub(crate) fn published(&self, id: SnapshotId) -> Result<SnapshotInfo> {
        self.find(id).ok_or_else(|| StoreError::UnknownRef {
            reference: id.to_string(),
            store: self.describe(),
            hint: "it is not published here, or was forgotten".into(),
        })
    }

    /// The published snapshot `id`, if there is one, as far as the store was read.
    #[must_use]
    pub fn find(&self, id: SnapshotId) -> Option<SnapshotInfo> {
        self.catalog().find(id)
    }

    pub(crate) fn writer_state(&self) -> MutexGuard<'_, WriterState> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn catalog(&self) -> std::sync::RwLockReadGuard<'_, Catalog> {
        self.catalog.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of an entry this handle has just made durable.
    pub(crate) fn appended(&self, entry: Entry, cursor: Cursor) {
        let mut catalog = self.catalog.write().unwrap_or_else(PoisonError::into_inner);
        // A `refresh` in another thread may have read it from the file already.
        if catalog.cursor.end < cursor.end {
            catalog.take(entry);
            catalog.cursor = cursor;
        }
        self.follow(&catalog);
    }

    /// Takes note of a journal this handle has just written anew.
    pub(crate) fn replaced(&self, catalog: Catalog) {
        self.follow(&catalog);
        *self.catalog.write().unwrap_or_else(PoisonError::into_inner) = catalog;
    }

    /// Goes by the layout of `catalog` from here on.
    fn follow(&self, catalog: &Catalog) {
        if self.segments.set_layout(&catalog.layout) {
            self.forget_contents();
        }
    }

    /// Forgets which contents are where: a page found by what the store no longer has would be
    /// referred to, and lost.
    pub(crate) fn forget_contents(&self) {
        self.fingerprints.clear();
        self.frames.clear();
        self.bases.clear();
    }

    /// Does `read`; if something is missing, once more after looking at what others pruned: it
    /// may have been moved.
    pub(crate) fn reading<T>(&self, mut read: impl FnMut() -> Result<T>) -> Result<T> {
        // As of before the read: whoever looks at the journal at the same time must not make it
        // seem that nothing happened.
        let mut before = self.segments.layout();
        for _ in 0..MOVED_MAX {
            match read() {
                Err(error @ StoreError::Missing { .. }) => {
                    self.refresh()?;
                    let now = self.segments.layout();
                    if *before == *now {
                        return Err(error);
                    }
                    before = now;
                }
                other => return other,
            }
        }
        read()
    }
}

impl Store {
    /// A node as it stands where `block` says, whatever is cached. Nodes are cached by their hash, and
    /// the same node may stand in several places: where a line has the pages of another.
    pub(crate) fn node_as_stored(
        &self,
        block: &BlockRef,
        level: u8,
        first: u64,
    ) -> Result<Arc<Node>> {
        let node = self.reading(|| {
            self.segments.read(block, RecordKind::Node, |record| {
                Node::decode(&record.decode()?, level, first)
            })
        })?;
        let node = Arc::new(node);
        self.nodes.insert(block.hash, Arc::clone(&node));
        Ok(node)
    }
}

/// How often in a row a block may be moved while it is being read.
const MOVED_MAX: usize = 8;

impl NodeSource for Store {
    fn node(&self, block: &BlockRef, level: u8, first: u64) -> Result<Arc<Node>> {
        if let Some(node) = self.nodes.get(&block.hash)
            && (node.level, node.first) == (level, first)
        {
            return Ok(node);
        }
        self.node_as_stored(block, level, first)
    }
}

/// Now, in Unix milliseconds.
#[must_use]
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Takes the writer lock.
pub(crate) fn lock(storage: &dyn Storage) -> Result<Box<dyn WriterLock>> {
    storage.try_lock().map_err(|error| match error {
        LockError::Held(holder) => StoreError::Busy { store: storage.describe(), holder },
        LockError::Io(error) => StoreError::io("lock", LOCK_FILE, error),
    })
}
