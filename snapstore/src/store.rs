//! A store: opening it, its catalog of snapshots, and finding one by what a person types.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use crate::codec::Malformed;
use crate::error::{Result, StoreError};
use crate::format::{
    FILE_HEADER_LEN, FORMAT_VERSION, FileHeader, FileKind, JOURNAL_FILE, LOCK_FILE,
    MAX_FRAME_PAGES, RecordKind, SEGMENT_FOLDER, STORE_FILE,
};
use crate::id::{BlockRef, Hash, SnapshotId};
use crate::journal::{self, Cursor, Entry, Publication};
use crate::node::Node;
use crate::segment::Segments;
use crate::snapshot::Snapshot;
use crate::storage::{DirStorage, LockError, Storage, StoreFile, WriterLock};
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
        }
    }
}

/// A published snapshot, as the catalog lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its id.
    pub id: SnapshotId,
    /// The snapshot it changed.
    pub parent: Option<SnapshotId>,
    /// When it was published, Unix milliseconds.
    pub time_unix_ms: u64,
    pub(crate) manifest: BlockRef,
}

/// A store of snapshots.
pub struct Store {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) options: StoreOptions,
    pub(crate) uuid: [u8; 16],
    pub(crate) segments: Segments,
    pub(crate) nodes: Cache<Hash, Arc<Node>, NodeWeighter>,
    pub(crate) frames: Cache<Hash, Arc<[u8]>, FrameWeighter>,
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

/// What the journal says, as far as it was read.
#[derive(Debug)]
pub(crate) struct Catalog {
    pub cursor: Cursor,
    snapshots: Vec<SnapshotInfo>,
    index: HashMap<SnapshotId, usize>,
    tags: BTreeMap<String, SnapshotId>,
    /// Where the newest transaction ended: segment and offset.
    pub tail: Option<(u32, u64)>,
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

impl Weighter<Hash, Arc<[u8]>> for FrameWeighter {
    fn weight(&self, _key: &Hash, frame: &Arc<[u8]>) -> u64 {
        64 + frame.len() as u64
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
        if unfinished(storage.as_ref())?.is_some() {
            let _lock = lock(storage.as_ref())?;
            // Looked at again: another process may have made the store before the lock was ours.
            match unfinished(storage.as_ref())? {
                Some(Unfinished::Nothing) => create(storage.as_ref())?,
                Some(Unfinished::StoreFile(header)) => {
                    let file = storage.open(STORE_FILE, true);
                    put_header(storage.as_ref(), STORE_FILE, file, &header)?;
                }
                None => {}
            }
        }
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
        let header = read_store_header(storage.as_ref())?;
        let cursor = journal_start(storage.as_ref(), header.store)?;
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
            flush_policy: FlushPolicy::default(),
            pool,
            catalog: RwLock::new(Catalog::new(cursor)),
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

    /// Reads what other processes published since the store was opened or last refreshed.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if the journal is damaged before its newest record.
    pub fn refresh(&self) -> Result<()> {
        let mut catalog = self.catalog.write().unwrap_or_else(PoisonError::into_inner);
        let file = self
            .storage
            .open(JOURNAL_FILE, false)
            .map_err(|error| StoreError::io("open", JOURNAL_FILE, error))?;
        catalog.advance(file.as_ref())
    }

    /// Lets a handle that was latched by an I/O error write again, as a new process would: what
    /// is published is read anew, and nothing is appended to the segment in doubt.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn reopen(&self) -> Result<()> {
        let mut writer = self.writer_state();
        let mut catalog = Catalog::new(journal_start(self.storage.as_ref(), self.uuid)?);
        let file = self
            .storage
            .open(JOURNAL_FILE, false)
            .map_err(|error| StoreError::io("open", JOURNAL_FILE, error))?;
        // Replaced as a whole: readers never see an empty store.
        catalog.advance(file.as_ref())?;
        *self.catalog.write().unwrap_or_else(PoisonError::into_inner) = catalog;
        *writer = WriterState { abandon_tail: true, latched: None };
        Ok(())
    }

    /// The published snapshots, oldest first.
    #[must_use]
    pub fn snapshots(&self) -> Vec<SnapshotInfo> {
        self.catalog().snapshots.clone()
    }

    /// The newest published snapshot.
    #[must_use]
    pub fn latest(&self) -> Option<SnapshotInfo> {
        self.catalog().snapshots.last().copied()
    }

    /// The tags and what they point to.
    #[must_use]
    pub fn tags(&self) -> BTreeMap<String, SnapshotId> {
        self.catalog().tags.clone()
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
        crate::reference::resolve(&catalog.snapshots, &catalog.tags, reference, &self.describe())
    }

    /// Opens snapshot `id` for reading.
    ///
    /// # Errors
    /// [`StoreError::UnknownRef`] if it is not published; [`StoreError::Corrupt`] if its manifest
    /// is damaged.
    pub fn snapshot(self: &Arc<Self>, id: SnapshotId) -> Result<Snapshot> {
        Snapshot::load(Arc::clone(self), &self.published(id)?)
    }

    pub(crate) fn published(&self, id: SnapshotId) -> Result<SnapshotInfo> {
        self.find(id).ok_or_else(|| StoreError::UnknownRef {
            reference: id.to_string(),
            store: self.describe(),
            hint: "it is not published here".into(),
        })
    }

    pub(crate) fn find(&self, id: SnapshotId) -> Option<SnapshotInfo> {
        let catalog = self.catalog();
        catalog.index.get(&id).map(|index| catalog.snapshots[*index])
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
    }
}

impl Catalog {
    fn new(cursor: Cursor) -> Self {
        Self {
            cursor,
            snapshots: Vec::new(),
            index: HashMap::new(),
            tags: BTreeMap::new(),
            tail: None,
        }
    }

    /// Takes in what was appended to the journal, or nothing if it is damaged.
    fn advance(&mut self, journal: &dyn StoreFile) -> Result<()> {
        let mut cursor = self.cursor.clone();
        let entries = cursor.advance(journal)?;
        self.cursor = cursor;
        entries.into_iter().for_each(|entry| self.take(entry));
        Ok(())
    }

    fn take(&mut self, entry: Entry) {
        match entry {
            Entry::Publish(Publication { id, parent, manifest, time_unix_ms, tail }) => {
                self.index.insert(id, self.snapshots.len());
                self.snapshots.push(SnapshotInfo { id, parent, time_unix_ms, manifest });
                self.tail = Some(tail);
            }
            Entry::Tag { name, target: Some(id) } => {
                self.tags.insert(name, id);
            }
            Entry::Tag { name, target: None } => {
                self.tags.remove(&name);
            }
        }
    }
}

impl NodeSource for Store {
    fn node(&self, block: &BlockRef, level: u8, first: u64) -> Result<Arc<Node>> {
        if let Some(node) = self.nodes.get(&block.hash)
            && (node.level, node.first) == (level, first)
        {
            return Ok(node);
        }
        let node = self.segments.read(block, RecordKind::Node, |record| {
            Node::decode(&record.decode()?, level, first)
        })?;
        let node = Arc::new(node);
        self.nodes.insert(block.hash, Arc::clone(&node));
        Ok(node)
    }
}

impl Store {
    /// Reads a frame, verified and decoded: whole pages, one after the other.
    pub(crate) fn frame(&self, frame: &BlockRef) -> Result<Arc<[u8]>> {
        if let Some(pages) = self.frames.get(&frame.hash) {
            return Ok(pages);
        }
        let pages: Arc<[u8]> = self
            .segments
            .read(frame, RecordKind::Frame, |record| {
                check_frame_len(record.raw_len())?;
                record.decode()
            })?
            .into();
        self.frames.insert(frame.hash, Arc::clone(&pages));
        Ok(pages)
    }
}

pub(crate) fn check_frame_len(raw_len: usize) -> Result<(), Malformed> {
    if raw_len == 0 || !raw_len.is_multiple_of(crate::page::PAGE_SIZE) {
        return Err(Malformed::new("decoded length", "whole pages", format!("{raw_len} bytes")));
    }
    Ok(())
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

/// A directory that holds anything but what an interrupted creation leaves is not ours to fill.
fn refuse_foreign(storage: &dyn Storage, names: &[String]) -> Result<()> {
    let known = [LOCK_FILE, JOURNAL_FILE, SEGMENT_FOLDER];
    let foreign = names.iter().find(|name| !known.contains(&name.as_str()));
    let segments = storage.list(SEGMENT_FOLDER).unwrap_or_default();
    match foreign.or(segments.first()) {
        None => Ok(()),
        Some(name) => Err(StoreError::NotAStore {
            path: storage.describe(),
            expected: "the file FRAZIL, or an empty directory",
            found: format!("`{name}` and no FRAZIL"),
        }),
    }
}

fn create(storage: &dyn Storage) -> Result<()> {
    let header = FileHeader {
        kind: FileKind::Journal,
        version: FORMAT_VERSION,
        number: 0,
        store: random_uuid()?,
        created_unix_ms: unix_ms(),
    };
    // The file that makes it a store comes last: before it, an interrupted creation starts over.
    match storage.remove(JOURNAL_FILE) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(StoreError::io("replace", JOURNAL_FILE, error));
        }
        _ => {}
    }
    for (name, kind) in [(JOURNAL_FILE, FileKind::Journal), (STORE_FILE, FileKind::Store)] {
        put_header(storage, name, storage.create(name), &FileHeader { kind, ..header })?;
    }
    Ok(())
}

/// Writes a file that is nothing but its header so far, durably.
fn put_header(
    storage: &dyn Storage,
    name: &str,
    file: io::Result<Arc<dyn StoreFile>>,
    header: &FileHeader,
) -> Result<()> {
    file.and_then(|file| file.write_all_at(&header.encode(), 0).and_then(|()| file.sync()))
        .and_then(|()| storage.sync_names(""))
        .map_err(|error| StoreError::io("create", name, error))
}

/// How far a store's creation came.
enum Unfinished {
    /// There is no `FRAZIL`: whatever else creation leaves is made anew.
    Nothing,
    /// `FRAZIL` was being written when the power failed; this is what it has to say.
    StoreFile(FileHeader),
}

/// What is left to do to have a store here; none if `FRAZIL` stands.
fn unfinished(storage: &dyn Storage) -> Result<Option<Unfinished>> {
    let names = storage.list("").map_err(|error| StoreError::io("list", "", error))?;
    if !names.iter().any(|name| name == STORE_FILE) {
        refuse_foreign(storage, &names)?;
        return Ok(Some(Unfinished::Nothing));
    }
    // Whatever else is wrong with the files, opening the store will say it better.
    Ok(interrupted_store_file(storage).unwrap_or(None).map(Unfinished::StoreFile))
}

/// The header that `FRAZIL` was to have, if a crash left it cut short or with zeros in it. The
/// journal was durable before, and nothing is appended to it before `FRAZIL` is.
fn interrupted_store_file(storage: &dyn Storage) -> io::Result<Option<FileHeader>> {
    let (file, journal) = (storage.open(STORE_FILE, false)?, storage.open(JOURNAL_FILE, false)?);
    let len = file.len_bytes()?;
    if len > FILE_HEADER_LEN as u64 || journal.len_bytes()? != FILE_HEADER_LEN as u64 {
        return Ok(None);
    }
    let (mut bytes, mut found) = ([0; FILE_HEADER_LEN], vec![0; len as usize]);
    journal.read_exact_at(&mut bytes, 0)?;
    file.read_exact_at(&mut found, 0)?;
    let Ok(header) = FileHeader::decode(&bytes, FileKind::Journal, JOURNAL_FILE) else {
        return Ok(None);
    };
    let header = FileHeader { kind: FileKind::Store, ..header };
    let expected = header.encode();
    let cut_short = found != expected
        && found.iter().zip(expected).all(|(byte, expected)| *byte == 0 || *byte == expected);
    Ok(cut_short.then_some(header))
}

fn random_uuid() -> Result<[u8; 16]> {
    use std::io::Read;
    let mut uuid = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut uuid))
        .map_err(|error| StoreError::io("read", "/dev/urandom", error))?;
    Ok(uuid)
}

fn read_store_header(storage: &dyn Storage) -> Result<FileHeader> {
    let not_a_store = |found: String| StoreError::NotAStore {
        path: storage.describe(),
        expected: "the file FRAZIL with a store header",
        found,
    };
    let file = match storage.open(STORE_FILE, false) {
        Ok(file) => file,
        Err(error)
            if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
        {
            return Err(not_a_store("no such file".into()));
        }
        Err(error) => return Err(StoreError::io("open", STORE_FILE, error)),
    };
    let mut bytes = [0; FILE_HEADER_LEN];
    match file.read_exact_at(&mut bytes, 0) {
        Ok(()) => FileHeader::decode(&bytes, FileKind::Store, STORE_FILE),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(not_a_store("a file shorter than its header".into()))
        }
        Err(error) => Err(StoreError::io("read", STORE_FILE, error)),
    }
}

fn journal_start(storage: &dyn Storage, uuid: [u8; 16]) -> Result<Cursor> {
    let file = storage
        .open(JOURNAL_FILE, false)
        .map_err(|error| StoreError::io("open", JOURNAL_FILE, error))?;
    Ok(Cursor::start(&journal::read_header(file.as_ref(), uuid)?))
}
