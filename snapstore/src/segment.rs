//! Segments, append-only files of records; and finding records wherever pruning moved them.

use std::cell::Cell;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use quick_cache::sync::Cache;

use crate::codec::Malformed;
use crate::error::{Result, StoreError};
use crate::format::{
    FILE_HEADER_LEN, FORMAT_VERSION, FileHeader, FileKind, MAX_BLOB_LEN, RECORD_HEADER_LEN,
    RecordHeader, RecordKind, SEGMENT_FOLDER, pack_name, segment_name,
};
use crate::id::{BlockRef, Hash};
use crate::index_cache::IndexCache;
use crate::layout::Layout;
use crate::pack::{PackIndex, Place, SlotMap};
use crate::page::PAGE_SIZE;
use crate::record::{RecordView, VerifiedRecord};
use crate::storage::{Storage, StoreFile};
use crate::writeback::{WRITE_BACK_LEN, WriteBack};

/// Bytes gathered before they are written to the file.
///
/// Few enough to be still in a core's cache when the kernel copies them.
const WRITE_BUFFER_LEN: usize = 256 << 10;

/// The segments and packs of a store, opened on demand.
#[derive(Debug)]
pub(crate) struct Segments {
    storage: Arc<dyn Storage>,
    store: [u8; 16],
    layout: RwLock<Arc<Layout>>,
    /// Open files, bounded: a store may have more files than a process may have open.
    open: Cache<(FileKind, u32), Arc<dyn StoreFile>>,
    indexes: IndexCache,
}

/// The most files kept open.
const OPEN_FILES_MAX: usize = 128;
/// The most memory for decoded pack indexes, in bytes, apart from one that is larger by itself.
const INDEXES_LEN_MAX: u64 = 64 << 20;

/// Where the record that a reference names is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Physical {
    /// The segment or pack that holds it.
    pub file: (FileKind, u32),
    /// Offset of the record's header there, in bytes.
    pub position: u32,
    /// Length of the record, header included, in bytes.
    pub len: u32,
    /// BLAKE3 of the record.
    pub hash: Hash,
    /// Where the slots of the referenced frame are in the record.
    pub slots: SlotMap,
}

impl Physical {
    fn file_name(&self) -> String {
        file_name(self.file)
    }

    /// The error for a damaged record; `what` is the kind of record it should be.
    fn damaged(&self, what: &str, malformed: Malformed) -> StoreError {
        StoreError::Corrupt {
            file: self.file_name(),
            offset: u64::from(self.position),
            what: format!("{what}: {}", malformed.what),
            expected: malformed.expected,
            found: malformed.found,
        }
    }
}

pub(crate) fn file_name((kind, number): (FileKind, u32)) -> String {
    if kind == FileKind::Pack { pack_name(number) } else { segment_name(number) }
}

thread_local! {
    /// The buffer for reading records: allocating one each time would cost as much as the read.
    static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// The largest buffer that a thread keeps between reads, in bytes.
const BUFFER_KEPT_MAX: usize = 1 << 20;

impl Segments {
    pub fn new(storage: Arc<dyn Storage>, store: [u8; 16]) -> Self {
        Self {
            storage,
            store,
            layout: RwLock::default(),
            open: Cache::new(OPEN_FILES_MAX),
            indexes: IndexCache::new(INDEXES_LEN_MAX),
        }
    }

    /// The layout as of where the journal was read to.
    pub fn layout(&self) -> Arc<Layout> {
        Arc::clone(&self.layout.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Adopts `layout`. If it differs from the previous one, closes all files, which may have been
    /// removed, and returns true.
    pub fn set_layout(&self, layout: &Arc<Layout>) -> bool {
        let known = self.layout();
        // Usually it is the same object. Comparing is costly: it lists every retired segment.
        if Arc::ptr_eq(&known, layout) {
            return false;
        }
        *self.layout.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(layout);
        if known == *layout {
            return false;
        }
        self.close_all();
        true
    }

    /// Finds where the record that `block` refers to is now.
    pub fn resolve(&self, block: &BlockRef) -> Result<Physical> {
        let layout = self.layout();
        let (position, len, hash) = (block.offset, block.len, block.hash);
        let Some(pack) = layout.moved.get(&block.segment) else {
            if layout.retired.contains(&block.segment) {
                return Err(pruned(block));
            }
            let file = (FileKind::Segment, block.segment);
            return Ok(Physical { file, position, len, hash, slots: SlotMap::Identity });
        };
        let file = (FileKind::Pack, *pack);
        let index = self.index(*pack, &layout)?;
        match index.find(block.segment, block.offset) {
            None => Err(pruned(block)),
            Some(Place::Verbatim(position)) => {
                Ok(Physical { file, position, len, hash, slots: SlotMap::Identity })
            }
            Some(Place::Regrouped { record, slots }) => {
                let record = index.records[record as usize];
                let (position, len, hash) = (record.position, record.len, record.hash);
                Ok(Physical { file, position, len, hash, slots })
            }
        }
    }

    /// The index of `pack`, from the cache or read and verified.
    pub fn index(&self, pack: u32, layout: &Layout) -> Result<Arc<PackIndex>> {
        let block = layout.packs.get(&pack).ok_or_else(|| StoreError::Missing {
            file: pack_name(pack),
            offset: 0,
            found: "the journal does not list this pack".into(),
        })?;
        if let Some(index) = self.indexes.get(pack, &block.hash) {
            return Ok(index);
        }
        let place = Physical {
            file: (FileKind::Pack, pack),
            position: block.offset,
            len: block.len,
            hash: block.hash,
            slots: SlotMap::Identity,
        };
        let index = self.read_at(&place, RecordKind::PackIndex, |record| {
            PackIndex::decode(&record.decode()?)
        })?;
        let index = Arc::new(index);
        self.indexes.insert(pack, block.hash, Arc::clone(&index));
        Ok(index)
    }

    /// Reads the record `block` refers to, checks it, and hands it to `with`.
    pub fn read<T>(
        &self,
        block: &BlockRef,
        kind: RecordKind,
        with: impl FnOnce(&VerifiedRecord<'_>) -> Result<T, Malformed>,
    ) -> Result<T> {
        self.read_at(&self.resolve(block)?, kind, with)
    }

    /// Reads the record at `place`, checks it, and hands it to `with`.
    pub fn read_at<T>(
        &self,
        place: &Physical,
        kind: RecordKind,
        with: impl FnOnce(&VerifiedRecord<'_>) -> Result<T, Malformed>,
    ) -> Result<T> {
        let damaged = |malformed| place.damaged(kind.name(), malformed);
        let len = place.len as usize;
        if !(RECORD_HEADER_LEN..=RECORD_HEADER_LEN + MAX_BLOB_LEN).contains(&len) {
            return Err(damaged(Malformed::new(
                "length in the reference",
                "the length of a record",
                len,
            )));
        }
        let file = self.file(place.file)?;
        // Taken out of the thread-local while in use: `with` may read another record.
        let mut bytes = BUFFER.take();
        bytes.resize(len, 0);
        let read = read_record(file.as_ref(), place, &mut bytes, damaged).and_then(|()| {
            let record = VerifiedRecord::check(&bytes, &place.hash, kind).map_err(damaged)?;
            with(&record).map_err(damaged)
        });
        if bytes.capacity() <= BUFFER_KEPT_MAX {
            BUFFER.set(bytes);
        }
        read
    }

    /// The number of pages in the frame or delta frame at `place`, according to its header alone,
    /// which is not verified: for estimates, and for choosing how to read the frame.
    pub fn slots(&self, place: &Physical) -> Result<u64> {
        let mut bytes = [0; RECORD_HEADER_LEN];
        let damaged = |malformed| place.damaged("frame", malformed);
        read_record(self.file(place.file)?.as_ref(), place, &mut bytes, damaged)?;
        let header = RecordHeader::decode(&bytes).map_err(damaged)?;
        // Rounding down is right for delta frames: the bytes that name their bases are less than a
        // page.
        Ok(u64::from(header.raw_len) / PAGE_SIZE as u64)
    }

    /// Opens a segment or pack, or returns it if it is open. Checks the header on opening.
    pub fn file(&self, key: (FileKind, u32)) -> Result<Arc<dyn StoreFile>> {
        if let Some(file) = self.open.get(&key) {
            return Ok(file);
        }
        let name = file_name(key);
        let file = self.storage.open(&name, false).map_err(|error| {
            if error.kind() == io::ErrorKind::NotFound {
                let found = "no such file".to_owned();
                StoreError::Missing { file: name.clone(), offset: 0, found }
            } else {
                StoreError::io("open", name.clone(), error)
            }
        })?;
        check_header(file.as_ref(), key, &name, self.store)?;
        self.open.insert(key, Arc::clone(&file));
        Ok(file)
    }

    /// Closes all files and drops the cached indexes: they are opened and checked anew.
    pub fn close_all(&self) {
        self.open.clear();
        self.indexes.clear();
    }

    /// Closes a file that is to be removed.
    pub fn close_file(&self, key: (FileKind, u32)) {
        self.open.remove(&key);
    }
}

fn pruned(block: &BlockRef) -> StoreError {
    StoreError::Missing {
        file: segment_name(block.segment),
        offset: u64::from(block.offset),
        found: "it was pruned".into(),
    }
}

fn read_record(
    file: &dyn StoreFile,
    place: &Physical,
    bytes: &mut [u8],
    damaged: impl Fn(Malformed) -> StoreError,
) -> Result<()> {
    file.read_exact_at(bytes, u64::from(place.position)).map_err(|error| {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            let end = file.len_bytes().unwrap_or(0);
            damaged(Malformed::new(
                "record",
                format!("{} bytes", bytes.len()),
                format!("the end of the file at {end}: the file was truncated"),
            ))
        } else {
            StoreError::io("read", place.file_name(), error)
        }
    })
}

fn check_header(
    file: &dyn StoreFile,
    (kind, number): (FileKind, u32),
    name: &str,
    store: [u8; 16],
) -> Result<()> {
    let mut bytes = [0; FILE_HEADER_LEN];
    file.read_exact_at(&mut bytes, 0).map_err(|error| {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            StoreError::Corrupt {
                file: name.to_owned(),
                offset: 0,
                what: "file header".into(),
                expected: format!("{FILE_HEADER_LEN} bytes"),
                found: "a shorter file: it was truncated".into(),
            }
        } else {
            StoreError::io("read", name, error)
        }
    })?;
    let header = FileHeader::decode(&bytes, kind, name)?;
    if header.number != number || header.store != store {
        return Err(StoreError::Corrupt {
            file: name.to_owned(),
            offset: 0,
            what: "file header: number and store".into(),
            expected: format!("number {number} of this store"),
            found: format!(
                "number {} of store {}",
                header.number,
                crate::format::hex(&header.store)
            ),
        });
    }
    Ok(())
}

/// Appends to a segment or pack, gathering small appends into large writes.
#[derive(Debug)]
pub(crate) struct Appender {
    name: String,
    file: Arc<dyn StoreFile>,
    /// Length of the file as written so far, in bytes.
    written: u64,
    /// Bytes appended after these, not written yet.
    buffer: Vec<u8>,
    /// Bytes written since the last request for a background sync.
    unsynced: u64,
    write_back: WriteBack,
}

impl Appender {
    /// Creates segment or pack `key` of `store` and appends its header.
    pub fn create(storage: &dyn Storage, key: (FileKind, u32), store: [u8; 16]) -> Result<Self> {
        let name = file_name(key);
        let file =
            storage.create(&name).map_err(|error| StoreError::io("create", name.clone(), error))?;
        let header = FileHeader {
            kind: key.0,
            version: FORMAT_VERSION,
            number: key.1,
            store,
            created_unix_ms: crate::store::unix_ms(),
        };
        Ok(Self { buffer: header.encode().to_vec(), ..Self::open(name, file, 0) })
    }

    /// Continues the existing `file` at offset `end`.
    pub fn open(name: String, file: Arc<dyn StoreFile>, end: u64) -> Self {
        let (buffer, write_back) = Default::default();
        Self { name, file, written: end, buffer, unsynced: 0, write_back }
    }

    /// Length including everything appended, in bytes.
    pub fn len(&self) -> u64 {
        self.written + self.buffer.len() as u64
    }

    /// Appends `bytes` and returns the offset where they start.
    pub fn append(&mut self, bytes: &[u8]) -> Result<u32> {
        let offset = u32::try_from(self.len())
            .map_err(|_| StoreError::Invalid(format!("{} would grow beyond 4 GiB", self.name)))?;
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= WRITE_BUFFER_LEN {
            self.flush()?;
        }
        Ok(offset)
    }

    /// Writes everything gathered to the file.
    pub fn flush(&mut self) -> Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        self.file
            .write_all_at(&self.buffer, self.written)
            .map_err(|error| StoreError::io("append to", self.name.clone(), error))?;
        self.written += self.buffer.len() as u64;
        self.unsynced += self.buffer.len() as u64;
        self.buffer.clear();
        if self.unsynced >= WRITE_BACK_LEN {
            self.unsynced = 0;
            self.write_back.request(&self.name, &self.file);
        }
        Ok(())
    }

    /// Makes everything appended durable.
    pub fn sync(&mut self) -> Result<()> {
        self.flush()?;
        self.write_back.finish()?;
        self.file.sync().map_err(|error| StoreError::io("sync", self.name.clone(), error))
    }
}

/// Appends records to segments for one transaction.
///
/// No published snapshot refers to what it writes until the journal publishes one; until then,
/// [`Self::roll_back`] takes everything back.
#[derive(Debug)]
pub(crate) struct SegmentWriter {
    storage: Arc<dyn Storage>,
    store: [u8; 16],
    max_len_bytes: u64,
    number: u32,
    current: Option<Appender>,
    /// Segment and length to restore when rolling back.
    started_at: Option<(u32, u64)>,
    /// Segments created by this transaction.
    created: Vec<u32>,
    /// Segments filled up by this transaction and not synced yet.
    full: Vec<Appender>,
    appended_bytes: u64,
}

impl SegmentWriter {
    /// Continues the segment `tail` (number, end, file), or starts new segment `next` if there is
    /// no tail.
    pub fn new(
        storage: Arc<dyn Storage>,
        store: [u8; 16],
        max_len_bytes: u64,
        tail: Option<(u32, u64, Arc<dyn StoreFile>)>,
        next: u32,
    ) -> Self {
        let started_at = tail.as_ref().map(|(number, end, _)| (*number, *end));
        let number = tail.as_ref().map_or(next, |(number, _, _)| *number);
        let current =
            tail.map(|(number, end, file)| Appender::open(segment_name(number), file, end));
        Self {
            storage,
            store,
            max_len_bytes,
            number,
            current,
            started_at,
            created: Vec::new(),
            full: Vec::new(),
            appended_bytes: 0,
        }
    }

    /// Appends `record`; [`Self::sync`] makes it durable.
    pub fn append(&mut self, record: RecordView<'_>) -> Result<BlockRef> {
        let len = record.bytes.len() as u64;
        let full = |current: &Appender| {
            let end = current.len();
            end + len > self.max_len_bytes && end > FILE_HEADER_LEN as u64
        };
        if let Some(current) = self.current.as_mut().filter(|current| full(current)) {
            // Flushed while still current: if this fails, it remains the current one.
            current.flush()?;
            self.full.extend(self.current.take());
            self.number += 1;
        }
        if self.current.is_none() {
            let key = (FileKind::Segment, self.number);
            let appender = Appender::create(self.storage.as_ref(), key, self.store)?;
            self.created.push(self.number);
            self.appended_bytes += FILE_HEADER_LEN as u64;
            self.current = Some(appender);
        }
        let current = self.current.as_mut().expect("just made");
        let offset = current.append(record.bytes)?;
        self.appended_bytes += len;
        Ok(BlockRef {
            segment: self.number,
            offset,
            len: u32::try_from(record.bytes.len()).expect("records are bounded below 4 GiB"),
            hash: record.hash,
        })
    }

    /// Makes everything appended durable; returns the segment to continue with and its length.
    pub fn sync(&mut self) -> Result<(u32, u64)> {
        for mut full in self.full.drain(..) {
            full.sync()?;
        }
        if let Some(current) = &mut self.current {
            current.sync()?;
        }
        if !self.created.is_empty() {
            self.storage
                .sync_names(SEGMENT_FOLDER)
                .map_err(|error| StoreError::io("sync", SEGMENT_FOLDER, error))?;
        }
        Ok((self.number, self.current.as_ref().map_or(0, Appender::len)))
    }

    /// Bytes appended so far, file headers included.
    pub fn appended_bytes(&self) -> u64 {
        self.appended_bytes
    }

    /// Takes back everything appended. The caller must drop all references to it.
    pub fn roll_back(self, segments: &Segments) -> Result<()> {
        let Self { storage, created, started_at, current, full, .. } = self;
        // Wait for background syncs first, so that no file is cut while it is being synced.
        let synced = full.into_iter().chain(current).map(|mut file| file.write_back.finish());
        let synced: Vec<Result<()>> = synced.collect();
        for number in created {
            segments.close_file((FileKind::Segment, number));
            let name = segment_name(number);
            storage.remove(&name).map_err(|error| StoreError::io("remove", name, error))?;
        }
        if let Some((number, end)) = started_at {
            let name = segment_name(number);
            storage
                .open(&name, true)
                .and_then(|file| file.set_len(end))
                .map_err(|error| StoreError::io("truncate", name, error))?;
        }
        synced.into_iter().collect()
    }
}
