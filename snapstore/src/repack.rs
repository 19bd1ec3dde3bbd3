//! Writing a pack: collects what is in use of segments and older packs in one file.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rayon::prelude::*;

use crate::delta::{self, Base};
use crate::error::{Result, StoreError};
use crate::format::{FileKind, MAX_BLOB_LEN, RecordKind, SEGMENT_FOLDER, pack_name};
use crate::id::BlockRef;
use crate::pack::{PackIndex, PackedRecord, Place, SlotMap, slots_of};
use crate::page::PAGE_SIZE;
use crate::prune::{Item, PruneProgress, Source};
use crate::record::{EncodedRecord, RecordEncoder};
use crate::segment::Appender;
use crate::store::Store;

/// Bytes read and decoded at a time, and bytes of pages gathered before they are compressed, each
/// on all cores.
const WINDOW_LEN: usize = 16 << 20;

/// Why a pack could not be written; `source` is the index of the source to blame, if one is.
pub(crate) struct Failure {
    pub error: StoreError,
    pub source: Option<usize>,
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self { error, source: None }
    }
}

/// The file that holds an item, and the bytes it takes there: for a frame only partly in use, the
/// share of the pages in use.
pub(crate) fn live_bytes(store: &Store, item: &Item) -> Result<((FileKind, u32), u64)> {
    let place = store.segments.resolve(&item.block)?;
    let len = u64::from(place.len);
    if !matches!(item.kind, RecordKind::Frame | RecordKind::Delta) {
        return Ok((place.file, len));
    }
    // If the header cannot be read, count the whole frame.
    let slots = store.segments.slots(&place).unwrap_or(0);
    let used = u64::from(item.slots.count_ones());
    let share = if used >= slots { len } else { len * used / slots };
    Ok((place.file, share))
}

/// Writes pack `number` with the items of `sources`; returns the reference to its index, and the
/// length of the pack. If this fails, removes the file.
pub(crate) fn write_pack(
    store: &Arc<Store>,
    number: u32,
    sources: &[Source],
    progress: &PruneProgress,
) -> Result<(BlockRef, u64), Failure> {
    // Fails without removing anything if the file exists: it is not ours.
    let mut pack = PackWriter::create(store, number)?;
    let fill = || -> Result<(BlockRef, u64), Failure> {
        for (index, source) in sources.iter().enumerate() {
            let mut rest = source.items.as_slice();
            while !rest.is_empty() {
                progress.check()?;
                let (items, later) = rest.split_at(window(rest));
                let read = || items.par_iter().map(|item| read(store, item)).collect::<Vec<_>>();
                for (item, piece) in items.iter().zip(store.pool.install(read)) {
                    let piece = piece.map_err(|error| {
                        let damaged = matches!(
                            error,
                            StoreError::Corrupt { .. } | StoreError::Missing { .. }
                        );
                        Failure { error, source: damaged.then_some(index) }
                    })?;
                    pack.add(item, piece)?;
                }
                rest = later;
            }
            progress.rewrite_bytes_done.fetch_add(source.live_bytes, Ordering::Relaxed);
        }
        match pack.finish()? {
            Some(written) => Ok(written),
            // Only a single file can have so many blocks: groups are chosen to stay far below.
            None => Err(Failure {
                error: StoreError::Invalid(format!(
                    "the index of {} cannot list all blocks in use",
                    pack_name(number)
                )),
                source: (sources.len() == 1).then_some(0),
            }),
        }
    };
    let written = fill();
    if written.is_err() {
        // If it stays, it is an orphan, which the next writer removes.
        let _left_behind = store.storage.remove(&pack_name(number));
    }
    written
}

/// What is to be written for an item.
enum Piece {
    /// A record to be copied byte for byte.
    Record(Vec<u8>),
    /// The pages in use of a frame, with their bases if it is a delta frame.
    Pages { raw: Vec<u8>, bases: Vec<Base> },
}

/// How many of `items` to read at a time.
fn window(items: &[Item]) -> usize {
    let mut bytes = 0;
    let fits = items.iter().take_while(|item| {
        let pages = item.slots.count_ones() as usize * PAGE_SIZE;
        let is_frame = matches!(item.kind, RecordKind::Frame | RecordKind::Delta);
        bytes += if is_frame { pages } else { item.block.len as usize };
        bytes <= WINDOW_LEN
    });
    fits.count().max(1)
}

fn read(store: &Store, item: &Item) -> Result<Piece> {
    let place = store.segments.resolve(&item.block)?;
    if matches!(item.kind, RecordKind::Frame | RecordKind::Delta) {
        let whole = place.slots == SlotMap::Identity
            && u64::from(item.slots.count_ones()) >= store.segments.slots(&place)?;
        if !whole {
            return read_slots(store, item);
        }
    }
    let bytes = store.segments.read_at(&place, item.kind, |record| Ok(record.bytes().to_vec()))?;
    Ok(Piece::Record(bytes))
}

fn read_slots(store: &Store, item: &Item) -> Result<Piece> {
    let is_delta = item.kind == RecordKind::Delta;
    let view = store.frame(&item.block, is_delta)?;
    let (mut raw, mut bases) = (Vec::new(), Vec::new());
    for slot in slots_of(item.slots) {
        raw.extend_from_slice(view.bytes(slot, 1)?);
        if is_delta {
            bases.push(view.base(slot)?);
        }
    }
    Ok(Piece::Pages { raw, bases })
}

/// Pages of several frames that will be one record.
#[derive(Default)]
struct Group {
    raw: Vec<u8>,
    bases: Vec<Base>,
    members: Vec<(BlockRef, SlotMap)>,
}

impl Group {
    fn pages(&self) -> usize {
        self.raw.len() / PAGE_SIZE
    }
}

struct PackWriter<'a> {
    store: &'a Arc<Store>,
    number: u32,
    file: Appender,
    index: PackIndex,
    plain: Group,
    delta: Group,
    /// Full groups; `true` for those of delta frames.
    full: Vec<(Group, bool)>,
}

impl<'a> PackWriter<'a> {
    fn create(store: &'a Arc<Store>, number: u32) -> Result<Self> {
        let key = (FileKind::Pack, number);
        let file = Appender::create(store.storage.as_ref(), key, store.uuid)?;
        let (index, plain, delta) = Default::default();
        Ok(Self { store, number, file, index, plain, delta, full: Vec::new() })
    }

    fn add(&mut self, item: &Item, piece: Piece) -> Result<()> {
        match piece {
            Piece::Record(bytes) => {
                let position = self.file.append(&bytes)?;
                self.enter(&item.block, Place::Verbatim(position));
            }
            Piece::Pages { raw, bases } => {
                let is_delta = item.kind == RecordKind::Delta;
                let most = self.store.options.frame_pages;
                let group = if is_delta { &mut self.delta } else { &mut self.plain };
                if !group.members.is_empty() && group.pages() + raw.len() / PAGE_SIZE > most {
                    self.full.push((std::mem::take(group), is_delta));
                }
                let first = group.pages() as u8;
                group.raw.extend_from_slice(&raw);
                group.bases.extend(bases);
                group.members.push((item.block, SlotMap::Packed { first, live: item.slots }));
            }
        }
        if self.full.iter().map(|(group, _)| group.raw.len()).sum::<usize>() >= WINDOW_LEN {
            self.flush()?;
        }
        Ok(())
    }

    fn enter(&mut self, name: &BlockRef, place: Place) {
        self.index.segments.entry(name.segment).or_default().push((name.offset, place));
    }

    /// Compresses and appends the full groups.
    fn flush(&mut self) -> Result<()> {
        let full = std::mem::take(&mut self.full);
        let level = self.store.options.compression_level;
        let encode = |(group, is_delta): &(Group, bool)| -> Result<EncodedRecord> {
            let mut encoder = RecordEncoder::new(level)?;
            Ok(if *is_delta {
                encoder.encode(RecordKind::Delta, &delta::encode(&group.bases, &group.raw))
            } else {
                encoder.encode(RecordKind::Frame, &group.raw)
            })
        };
        let records: Vec<EncodedRecord> =
            self.store.pool.install(|| full.par_iter().map(encode).collect::<Result<_>>())?;
        for ((group, _), record) in full.iter().zip(records) {
            let position = self.file.append(&record.bytes)?;
            let len = record.bytes.len() as u32;
            let number = self.index.records.len() as u32;
            self.index.records.push(PackedRecord { position, len, hash: record.hash });
            for (name, slots) in &group.members {
                self.enter(name, Place::Regrouped { record: number, slots: *slots });
            }
        }
        Ok(())
    }

    /// Writes what is left and the index, durably; returns none if the index is longer than readers
    /// accept.
    fn finish(mut self) -> Result<Option<(BlockRef, u64)>> {
        for (group, is_delta) in
            [(std::mem::take(&mut self.plain), false), (std::mem::take(&mut self.delta), true)]
        {
            if !group.members.is_empty() {
                self.full.push((group, is_delta));
            }
        }
        self.flush()?;
        for entries in self.index.segments.values_mut() {
            entries.sort_unstable_by_key(|(offset, _)| *offset);
        }
        let payload = self.index.encode();
        // The files it replaces will be removed, so make sure that it can be read.
        if payload.len() > MAX_BLOB_LEN
            || PackIndex::decode(&payload).ok().as_ref() != Some(&self.index)
        {
            return Ok(None);
        }
        let mut encoder = RecordEncoder::new(1)?;
        let record = encoder.encode(RecordKind::PackIndex, &payload);
        let offset = self.file.append(&record.bytes)?;
        self.file.sync()?;
        self.store
            .storage
            .sync_names(SEGMENT_FOLDER)
            .map_err(|error| StoreError::io("sync", SEGMENT_FOLDER, error))?;
        let len = record.bytes.len() as u32;
        let index = BlockRef { segment: self.number, offset, len, hash: record.hash };
        Ok(Some((index, self.file.len())))
    }
}
