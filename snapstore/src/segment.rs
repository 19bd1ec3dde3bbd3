//! Segments: append-only files of records; and finding what was written to them, wherever it is.

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

/// Bytes gathered before they are written to the medium.
///
/// Few enough that they are still in a core's cache when the system copies them.
const WRITE_BUFFER_LEN: usize = 256 << 10;

/// The segments and packs of a store, opened as they are needed.
#[derive(Debug)]
pub(crate) struct Segments {
    storage: Arc<dyn Storage>,
    store: [u8; 16],
    layout: RwLock<Arc<Layout>>,
    /// Some of them: a store has more than a process may have open.
    open: Cache<(FileKind, u32), Arc<dyn StoreFile>>,
    indexes: IndexCache,
}

/// The most files that are kept open.
const OPEN_FILES_MAX: usize = 128;
/// The most memory for decoded indexes of packs, but for the one that is being used.
const INDEXES_LEN_MAX: u64 = 64 << 20;

/// Where the record of a reference is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Physical {
    /// A segment or a pack.
    pub file: (FileKind, u32),
    /// Offset of the record's header there, in bytes.
    pub position: u32,
    /// Length with its header, in bytes.
    pub len: u32,
    /// BLAKE3 of the record.
    pub hash: Hash,
    /// Which slots of the frame are where in it.
    pub slots: SlotMap,
}

impl Physical {
    fn file_name(&self) -> String {
        file_name(self.file)
    }

    /// What is there is not what `what` should be.
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
    /// Where records are read into: a new buffer each time would cost as much as the read.
    static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// What a thread keeps of it between reads at the most.
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

    /// Where everything is, as far as the journal was read.
    pub fn layout(&self) -> Arc<Layout> {
        Arc::clone(&self.layout.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes note of a layout; if it is another than before, closes all files, since those that
    /// are open may be no more, and returns true.
    pub fn set_layout(&self, layout: &Arc<Layout>) -> bool {
        let known = self.layout();
        // Mostly it is the very same, and need not be compared: it lists all segments that are no more.
        if Arc::ptr_eq(&known, layout) {
            return false;
        }
        *self.layout.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(layout);
        if known == *layout {
            return false;
        }
        self.close();
        true
    }

    /// Finds the record `block` refers to.
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

    /// The index of a pack.
    pub fn index(&self, pack: u32, layout: &Layout) -> Result<Arc<PackIndex>> {
        let block = layout.packs.get(&pack).ok_or_else(|| StoreError::Missing {
            file: pack_name(pack),
            offset: 0,
            found: "the journal names no such pack".into(),
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
            return Err(damaged(Malformed::new("length in the reference", "a record", len)));
        }
        let file = self.file(place.file)?;
        // Taken out while it is in use: `with` may read another record.
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

    /// How many pages the frame or delta frame at `place` has, by its header alone, which is not
    /// verified: for estimates, and for choosing how to read what is verified then.
    pub fn slots(&self, place: &Physical) -> Result<u64> {
        let mut bytes = [0; RECORD_HEADER_LEN];
        let damaged = |malformed| place.damaged("frame", malformed);
        read_record(self.file(place.file)?.as_ref(), place, &mut bytes, damaged)?;
        let header = RecordHeader::decode(&bytes).map_err(damaged)?;
        // What names the bases of a delta frame is shorter than a page.
        Ok(u64::from(header.raw_len) / PAGE_SIZE as u64)
    }

    /// A segment or pack, its header checked when it is first opened.
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

    /// Closes all files, and forgets what was read of them: they are opened and checked anew.
    pub fn close(&self) {
        self.open.clear();
        self.indexes.clear();
    }

    /// Forgets the open file of a segment that was cut or removed.
    pub fn forget(&self, key: (FileKind, u32)) {
        self.open.remove(&key);
    }
}

fn pruned(block: &BlockRef) -> StoreError {
    StoreError::Missing {
        file: segment_name(block.segment),
        offset: u64::from(block.offset),
        found: "it was pruned away".into(),
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

/// A file that grows: what is appended goes to the medium in large pieces.
#[derive(Debug)]
pub(crate) struct Appender {
    name: String,
    file: Arc<dyn StoreFile>,
    /// Bytes already handed to the medium.
    written: u64,
    /// Bytes behind them, not handed over yet.
    buffer: Vec<u8>,
    /// Bytes handed over since the last sync in the background was asked for.
    unsynced: u64,
    write_back: WriteBack,
}

impl Appender {
    /// Creates segment or pack `key` of `store`, to be appended to behind its header.
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

    /// Goes on at `end` of a file that is there.
    pub fn open(name: String, file: Arc<dyn StoreFile>, end: u64) -> Self {
        let (buffer, write_back) = Default::default();
        Self { name, file, written: end, buffer, unsynced: 0, write_back }
    }

    /// Length with all that was appended, in bytes.
    pub fn len(&self) -> u64 {
        self.written + self.buffer.len() as u64
    }

    /// Appends `bytes`; returns where they start.
    pub fn append(&mut self, bytes: &[u8]) -> Result<u32> {
        let offset = u32::try_from(self.len())
            .map_err(|_| StoreError::Invalid(format!("{} would grow beyond 4 GiB", self.name)))?;
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= WRITE_BUFFER_LEN {
            self.flush()?;
        }
        Ok(offset)
    }

    /// Hands everything gathered to the medium.
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
/// Nothing it writes is referred to by a published snapshot before the journal says so; until
/// then [`Self::roll_back`] gives all of it back.
#[derive(Debug)]
pub(crate) struct SegmentWriter {
    storage: Arc<dyn Storage>,
    store: [u8; 16],
    max_len_bytes: u64,
    number: u32,
    current: Option<Appender>,
    /// Segment and length to return to.
    started_at: Option<(u32, u64)>,
    /// Segments created by this transaction.
    created: Vec<u32>,
    /// Segments filled up by this transaction and not synced yet.
    full: Vec<Appender>,
    appended_bytes: u64,
}

impl SegmentWriter {
    /// Goes on at `(segment, end)`, or with a new segment `next` if there is none to go on with.
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

    /// Appends `record`; it is on the medium for certain only after [`Self::sync`].
    pub fn append(&mut self, record: RecordView<'_>) -> Result<BlockRef> {
        let len = record.bytes.len() as u64;
        let full = |current: &Appender| {
            let end = current.len();
            end + len > self.max_len_bytes && end > FILE_HEADER_LEN as u64
        };
        if let Some(current) = self.current.as_mut().filter(|current| full(current)) {
            // While it is still the current one: if this fails, so it stays.
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

    /// Makes everything appended durable; returns the segment to go on with and its length.
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

    /// Takes back everything appended. The caller drops its references.
    pub fn roll_back(self, segments: &Segments) -> Result<()> {
        let Self { storage, created, started_at, current, full, .. } = self;
        // Nobody syncs a file that is being cut.
        let synced = full.into_iter().chain(current).map(|mut file| file.write_back.finish());
        let synced: Vec<Result<()>> = synced.collect();
        for number in created {
            segments.forget((FileKind::Segment, number));
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
