//! Segments: append-only files of records.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use crate::codec::Malformed;
use crate::error::{Result, StoreError};
use crate::format::{
    FILE_HEADER_LEN, FORMAT_VERSION, FileHeader, FileKind, MAX_BLOB_LEN, MAX_SEGMENT_LEN,
    RECORD_HEADER_LEN, RecordKind, SEGMENT_FOLDER, segment_name,
};
use crate::id::BlockRef;
use crate::record::{EncodedRecord, VerifiedRecord};
use crate::storage::{Storage, StoreFile};

/// Bytes gathered before they are written to the medium.
const WRITE_BUFFER_LEN: usize = 1 << 20;

/// The segments of a store, opened as they are needed.
#[derive(Debug)]
pub(crate) struct Segments {
    storage: Arc<dyn Storage>,
    store: [u8; 16],
    open: RwLock<HashMap<u32, Arc<dyn StoreFile>>>,
}

impl Segments {
    pub fn new(storage: Arc<dyn Storage>, store: [u8; 16]) -> Self {
        Self { storage, store, open: RwLock::default() }
    }

    /// Reads the record `block` refers to, checks it, and hands it to `with`.
    pub fn read<T>(
        &self,
        block: &BlockRef,
        kind: RecordKind,
        with: impl FnOnce(&VerifiedRecord<'_>) -> Result<T, Malformed>,
    ) -> Result<T> {
        let damaged = |malformed: Malformed| StoreError::Corrupt {
            file: segment_name(block.segment),
            offset: u64::from(block.offset),
            what: format!("{}: {}", kind.name(), malformed.what),
            expected: malformed.expected,
            found: malformed.found,
        };
        let len = block.len as usize;
        if !(RECORD_HEADER_LEN..=RECORD_HEADER_LEN + MAX_BLOB_LEN).contains(&len) {
            return Err(damaged(Malformed::new("length in the reference", "a record", len)));
        }
        let file = self.file(block.segment)?;
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, u64::from(block.offset)).map_err(|error| {
            if error.kind() == io::ErrorKind::UnexpectedEof {
                let end = file.len_bytes().unwrap_or(0);
                damaged(Malformed::new(
                    "record",
                    format!("{len} bytes"),
                    format!("the end of the file at {end}: the segment was truncated"),
                ))
            } else {
                StoreError::io("read", segment_name(block.segment), error)
            }
        })?;
        let record = VerifiedRecord::check(&bytes, block, kind).map_err(damaged)?;
        with(&record).map_err(damaged)
    }

    /// The file of a segment, its header checked when it is first opened.
    pub fn file(&self, number: u32) -> Result<Arc<dyn StoreFile>> {
        if let Some(file) = self.open.read().unwrap_or_else(PoisonError::into_inner).get(&number) {
            return Ok(Arc::clone(file));
        }
        let name = segment_name(number);
        let file = self.storage.open(&name, false).map_err(|error| {
            if error.kind() == io::ErrorKind::NotFound {
                StoreError::Corrupt {
                    file: name.clone(),
                    offset: 0,
                    what: "segment".into(),
                    expected: "a file that snapshots refer to".into(),
                    found: "no such file".into(),
                }
            } else {
                StoreError::io("open", name.clone(), error)
            }
        })?;
        check_segment_header(file.as_ref(), number, self.store)?;
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        Ok(Arc::clone(open.entry(number).or_insert(file)))
    }

    /// Forgets the open file of a segment that was cut or removed.
    pub fn forget(&self, number: u32) {
        self.open.write().unwrap_or_else(PoisonError::into_inner).remove(&number);
    }
}

fn check_segment_header(file: &dyn StoreFile, number: u32, store: [u8; 16]) -> Result<()> {
    let name = segment_name(number);
    let mut bytes = [0; FILE_HEADER_LEN];
    file.read_exact_at(&mut bytes, 0).map_err(|error| {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            StoreError::Corrupt {
                file: name.clone(),
                offset: 0,
                what: "file header".into(),
                expected: format!("{FILE_HEADER_LEN} bytes"),
                found: "a shorter file: the segment was truncated".into(),
            }
        } else {
            StoreError::io("read", name.clone(), error)
        }
    })?;
    let header = FileHeader::decode(&bytes, FileKind::Segment, &name)?;
    if header.number != number || header.store != store {
        return Err(StoreError::Corrupt {
            file: name,
            offset: 0,
            what: "file header: segment and store".into(),
            expected: format!("segment {number} of this store"),
            found: format!(
                "segment {} of store {}",
                header.number,
                crate::format::hex(&header.store)
            ),
        });
    }
    Ok(())
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
    current: Current,
    /// Segment and length to return to.
    started_at: Option<(u32, u64)>,
    /// Segments created by this transaction.
    created: Vec<u32>,
    /// Segments filled up by this transaction and not synced yet.
    full: Vec<(u32, Arc<dyn StoreFile>)>,
    appended_bytes: u64,
}

#[derive(Debug)]
struct Current {
    number: u32,
    file: Option<Arc<dyn StoreFile>>,
    /// Bytes already handed to the medium.
    written: u64,
    /// Bytes after `written`, not handed over yet.
    buffer: Vec<u8>,
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
        let (started_at, current) = match tail {
            Some((number, end, file)) => (
                Some((number, end)),
                Current { number, file: Some(file), written: end, buffer: Vec::new() },
            ),
            None => (None, Current { number: next, file: None, written: 0, buffer: Vec::new() }),
        };
        Self {
            storage,
            store,
            max_len_bytes: max_len_bytes.clamp(1 << 16, MAX_SEGMENT_LEN),
            current,
            started_at,
            created: Vec::new(),
            full: Vec::new(),
            appended_bytes: 0,
        }
    }

    /// Appends `record`; it is on the medium for certain only after [`Self::sync`].
    pub fn append(&mut self, record: &EncodedRecord) -> Result<BlockRef> {
        let end = self.current.written + self.current.buffer.len() as u64;
        if self.current.file.is_none() {
            self.start_segment(self.current.number)?;
        } else if end + record.bytes.len() as u64 > self.max_len_bytes
            && end > FILE_HEADER_LEN as u64
        {
            self.flush()?;
            let next = self.current.number + 1;
            if let Some(file) = self.current.file.take() {
                self.full.push((self.current.number, file));
            }
            self.start_segment(next)?;
        }
        let offset = self.current.written + self.current.buffer.len() as u64;
        self.current.buffer.extend_from_slice(&record.bytes);
        self.appended_bytes += record.bytes.len() as u64;
        if self.current.buffer.len() >= WRITE_BUFFER_LEN {
            self.flush()?;
        }
        Ok(BlockRef {
            segment: self.current.number,
            offset: u32::try_from(offset).expect("segments are bounded below 4 GiB"),
            len: u32::try_from(record.bytes.len()).expect("records are bounded below 4 GiB"),
            hash: record.hash,
        })
    }

    fn start_segment(&mut self, number: u32) -> Result<()> {
        let name = segment_name(number);
        let file =
            self.storage.create(&name).map_err(|error| StoreError::io("create", name, error))?;
        self.created.push(number);
        let header = FileHeader {
            kind: FileKind::Segment,
            version: FORMAT_VERSION,
            number,
            store: self.store,
            created_unix_ms: crate::store::unix_ms(),
        };
        self.appended_bytes += FILE_HEADER_LEN as u64;
        let mut buffer = std::mem::take(&mut self.current.buffer);
        buffer.clear();
        buffer.extend_from_slice(&header.encode());
        self.current = Current { number, file: Some(file), written: 0, buffer };
        Ok(())
    }

    /// Hands everything gathered to the medium.
    fn flush(&mut self) -> Result<()> {
        let Some(file) = &self.current.file else { return Ok(()) };
        if self.current.buffer.is_empty() {
            return Ok(());
        }
        file.write_all_at(&self.current.buffer, self.current.written).map_err(|error| {
            StoreError::io("append to", segment_name(self.current.number), error)
        })?;
        self.current.written += self.current.buffer.len() as u64;
        self.current.buffer.clear();
        Ok(())
    }

    /// Makes everything appended durable; returns the segment to go on with and its length.
    pub fn sync(&mut self) -> Result<(u32, u64)> {
        self.flush()?;
        for (number, file) in self.full.drain(..) {
            file.sync().map_err(|error| StoreError::io("sync", segment_name(number), error))?;
        }
        if let Some(file) = &self.current.file {
            file.sync().map_err(|error| {
                StoreError::io("sync", segment_name(self.current.number), error)
            })?;
        }
        if !self.created.is_empty() {
            self.storage
                .sync_names(SEGMENT_FOLDER)
                .map_err(|error| StoreError::io("sync", SEGMENT_FOLDER, error))?;
        }
        Ok((self.current.number, self.current.written))
    }

    /// Bytes appended so far, file headers included.
    pub fn appended_bytes(&self) -> u64 {
        self.appended_bytes
    }

    /// Takes back everything appended. The caller drops its references.
    pub fn roll_back(self, segments: &Segments) -> Result<()> {
        let Self { storage, created, started_at, .. } = self;
        for number in created {
            segments.forget(number);
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
        Ok(())
    }
}
