//! [`Store`]: opening a store, listing its snapshots, and opening, pinning or resolving one.

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
use crate::elide::{DeltaGate, FingerprintIndex};
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
    /// Pages compressed together in one frame, 1 to [`MAX_FRAME_PAGES`]: small frames make faults
    /// quick, large ones compress better.
    pub frame_pages: usize,
    /// The length in bytes beyond which a segment is closed and a new one started.
    pub segment_max_bytes: u64,
    /// Number of compressing threads; 0 means one per core.
    pub workers: usize,
    /// Memory for decoded tree nodes, in bytes.
    pub node_cache_bytes: u64,
    /// Memory for decoded frames, in bytes.
    pub frame_cache_bytes: u64,
    /// Memory for single base pages that deltas are computed against, in bytes.
    pub base_cache_bytes: u64,
    /// Memory for the index of fingerprints of stored pages, in bytes.
    pub dedup_index_bytes: u64,
    /// About how many scattered changes an inner tree node holds before they move down; at most
    /// 16,384, to keep nodes small enough to read quickly.
    pub pending_runs: usize,
    /// Which pages need not be written.
    pub elide: Elide,
}

/// The largest effective [`StoreOptions::pending_runs`].
const PENDING_RUNS_MAX: usize = 1 << 14;

/// Which pages are not written in full. Reading does not depend on these switches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)] // four independent switches
pub struct Elide {
    /// Zero pages take no frame.
    pub zero: bool,
    /// Pages equal to the parent's are not written again.
    pub equal: bool,
    /// Pages equal to a stored page found in the fingerprint index refer to that page.
    pub dedup: bool,
    /// Pages that differ little from the parent's are stored as a delta.
    pub delta: bool,
}

impl Default for Elide {
    fn default() -> Self {
        Self { zero: true, equal: true, dedup: true, delta: true }
    }
}

impl Elide {
    /// Every page is written in full.
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
    pub(crate) delta_gate: DeltaGate,
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
    /// True if the newest segment must not be appended to: the next transaction starts another.
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
    /// damaged before the newest record; [`StoreError::Invalid`] if `options` ask for frames of
    /// an impossible size.
    pub fn open(path: &Path, options: StoreOptions) -> Result<Arc<Self>> {
        Self::open_storage(Arc::new(DirStorage::new(path)), options)
    }

    /// Opens the store in directory `path`, creating it if the directory is missing or empty.
    ///
    /// # Errors
    /// [`StoreError::NotAStore`] if the directory holds anything else; else as [`Self::open`].
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
            delta_gate: DeltaGate::default(),
            bases: Cache::with_weighter(1024, options.base_cache_bytes, PageWeighter),
            writer: Mutex::default(),
            storage,
            options,
        };
        store.refresh()?;
        Ok(Arc::new(store))
    }

    /// Where the store is, for messages.
    #[must_use]
    pub fn describe(&self) -> String {
        self.storage.describe()
    }

    /// The local folder that holds the store, if there is one.
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
            // `prune` rewrote the journal, or a writer took back a record we had read because its
            // sync failed. Read the file just opened: its name may be given to another one again.
            *catalog = Catalog::read(file.as_ref(), self.uuid)?;
            self.follow(&catalog);
            self.segments.close_all();
            self.forget_contents();
        }
        Ok(())
    }

    /// Opens the journal by name each time, since `prune` may have replaced the file.
    pub(crate) fn open_journal(&self, writable: bool) -> Result<Arc<dyn StoreFile>> {
        self.storage
            .open(JOURNAL_FILE, writable)
            .map_err(|error| StoreError::io("open", JOURNAL_FILE, error))
    }

    /// Lets a handle latched by an I/O error write again, as a new process would: rereads what is
    /// published, and never appends to the segment in doubt.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn reopen(&self) -> Result<()> {
        let mut writer = self.writer_state();
        let file = self.open_journal(false)?;
        // Read in full before the old one is replaced: readers never see an empty store.
        let catalog = Catalog::read(file.as_ref(), self.uuid)?;
        self.follow(&catalog);
        // Nothing this handle wrote without publishing it may be read any more.
        self.segments.close_all();
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

    /// A hash over the journal as far as it was read: while it is unchanged, so are the snapshots
    /// and tags.
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

    /// Finds the snapshot that `reference` names: an id, a unique prefix of at least four hex
    /// digits, a tag, or `latest`, each optionally followed by `~N` for the N-th ancestor.
    ///
    /// # Errors
    /// [`StoreError::UnknownRef`] or [`StoreError::AmbiguousRef`].
    pub fn resolve(&self, reference: &str) -> Result<SnapshotInfo> {
        let catalog = self.catalog();
        crate::reference::resolve(catalog.snapshots(), catalog.tags(), reference, &self.describe())
    }

    /// Opens snapshot `id` for reading. Reads fail once the snapshot is forgotten and pruned;
    /// [`Self::pin`] prevents that.
    ///
    /// # Errors
    /// [`StoreError::UnknownRef`] if it is not published; [`StoreError::Corrupt`] if its manifest
    /// is damaged.
    pub fn snapshot(self: &Arc<Self>, id: SnapshotId) -> Result<Snapshot> {
        Snapshot::load(Arc::clone(self), &self.published(id)?, None)
    }

    /// Opens snapshot `id` and keeps it from being pruned, even if it is forgotten, as long as the
    /// returned snapshot or any of its region readers lives. On a medium that cannot be written
    /// to, the same as [`Self::snapshot`].
    ///
    /// # Errors
    /// As [`Self::snapshot`].
    pub fn pin(self: &Arc<Self>, id: SnapshotId) -> Result<Snapshot> {
        let pin = self.pin_name(id);
        // After pinning: a prune that starts from here on sees the pin, and a snapshot that was
        // forgotten earlier is no longer published.
        self.refresh()?;
        Snapshot::load(Arc::clone(self), &self.published(id)?, pin)
    }

    /// As [`Self::pin`], but also opens a forgotten snapshot if somebody else (such as a running
    /// machine that continues from it) holds a pin on it until this returns.
    ///
    /// # Errors
    /// As [`Self::snapshot`].
    pub fn pin_held(self: &Arc<Self>, id: SnapshotId) -> Result<Snapshot> {
        self.refresh()?;
        if self.find(id).is_some() {
            return self.pin(id);
        }
        // Looked up before pinning: our own pin would prove nothing about the data still existing.
        let info = self.published_or_held(id)?;
        Snapshot::load(Arc::clone(self), &info, self.pin_name(id))
    }

    /// Finds snapshot `id` if it is published, or forgotten but still pinned by somebody.
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
                tracing::warn!(%error, %id, "cannot pin a snapshot: it may be pruned while in use");
                None
            }
        }
    }

    pub(crate) fn published(&self, id: SnapshotId) -> Result<SnapshotInfo> {
        self.find(id).ok_or_else(|| StoreError::UnknownRef {
            reference: id.to_string(),
            store: self.describe(),
            hint: "it was never published here, or was forgotten".into(),
        })
    }

    /// The published snapshot `id`, if there was one when the journal was last read.
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

    /// Adds an entry to the catalog that this handle has just made durable.
    pub(crate) fn appended(&self, entry: Entry, cursor: Cursor) {
        let mut catalog = self.catalog.write().unwrap_or_else(PoisonError::into_inner);
        // A `refresh` in another thread may have read it from the file already.
        if catalog.cursor.end < cursor.end {
            catalog.take(entry);
            catalog.cursor = cursor;
        }
        self.follow(&catalog);
    }

    /// Replaces the catalog after this handle has rewritten the journal.
    pub(crate) fn replaced(&self, catalog: Catalog) {
        self.follow(&catalog);
        *self.catalog.write().unwrap_or_else(PoisonError::into_inner) = catalog;
    }

    /// Resolves blocks by the layout of `catalog` from here on.
    fn follow(&self, catalog: &Catalog) {
        if self.segments.set_layout(&catalog.layout) {
            self.forget_contents();
        }
    }

    /// Empties fingerprint index and caches: an entry for a block that the store no longer has
    /// could make a new snapshot refer to it, and lose that page.
    pub(crate) fn forget_contents(&self) {
        self.fingerprints.clear();
        self.frames.clear();
        self.bases.clear();
    }

    /// Calls `read`; if a block is missing, refreshes and calls it again, as long as the layout
    /// has changed: a prune may have moved the block.
    pub(crate) fn reading<T>(&self, mut read: impl FnMut() -> Result<T>) -> Result<T> {
        // Taken before the read: if another thread refreshes meanwhile, the layouts must still be
        // seen to differ.
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
    /// Reads the node at `block` from its segment, bypassing the cache. The cache is keyed by hash,
    /// and equal nodes may be stored in several places: two lines can hold the same pages.
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

/// The most times that a read is repeated because its block was moved.
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

/// The current time in Unix milliseconds.
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
