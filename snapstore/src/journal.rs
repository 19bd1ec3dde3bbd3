//! The journal: an append-only log that says which snapshots are published and what is tagged.
//!
//! A record is one write and one sync. Its checksum covers the checksum before it, so a record
//! cannot be lost, moved or changed without the next one showing it.

use std::io;

use crate::codec::{Decoded, Decoder, Malformed, put_block_ref};
use crate::error::{Result, StoreError};
use crate::format::{FILE_HEADER_LEN, FileHeader, FileKind, JOURNAL_FILE};
use crate::id::{BlockRef, Hash, SnapshotId};
use crate::layout::Relayout;
use crate::storage::StoreFile;

const MAGIC: u32 = u32::from_le_bytes(*b"FRJR");
/// magic, kind, sequence number, body length, zero.
const HEADER_LEN: usize = 4 + 4 + 8 + 4 + 4;
const CHECK_LEN: usize = 32;
/// Bounds what a damaged length can ask for; 32,000 forgotten snapshots fit one record.
const MAX_BODY_LEN: usize = 1 << 20;
/// The most snapshots of one record, and the most segments of one relayout.
pub(crate) const MAX_LISTED: usize = 30_000;
/// The longest tag, in bytes.
pub(crate) const MAX_TAG_LEN: usize = 255;

const KIND_PUBLISH: u32 = 1;
const KIND_TAG: u32 = 2;
const KIND_FORGET: u32 = 3;
const KIND_RELAYOUT: u32 = 4;

const _: () = assert!(MAX_LISTED * 32 <= MAX_BODY_LEN && MAX_LISTED * 3 * 4 + 128 <= MAX_BODY_LEN);

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    Publish(Publication),
    /// The tag points to the snapshot from here on; no snapshot removes it.
    Tag {
        name: String,
        target: Option<SnapshotId>,
    },
    /// These snapshots are no more; at most [`MAX_LISTED`].
    Forget(Vec<SnapshotId>),
    /// Files changed places; at most [`MAX_LISTED`] in each list.
    Relayout(Relayout),
}

/// A snapshot became visible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Publication {
    pub id: SnapshotId,
    pub parent: Option<SnapshotId>,
    pub manifest: BlockRef,
    pub time_unix_ms: u64,
    /// Where the next transaction goes on: segment and offset in bytes.
    pub tail: (u32, u64),
    /// The fingerprints of the pages this transaction wrote, if it kept any.
    pub fingerprints: Option<BlockRef>,
}

impl Entry {
    fn kind(&self) -> u32 {
        match self {
            Self::Publish(_) => KIND_PUBLISH,
            Self::Tag { .. } => KIND_TAG,
            Self::Forget(_) => KIND_FORGET,
            Self::Relayout(_) => KIND_RELAYOUT,
        }
    }

    fn encode_body(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(160);
        match self {
            Self::Publish(publication) => {
                body.extend_from_slice(&publication.id.0);
                put_optional_id(&mut body, publication.parent);
                put_block_ref(&mut body, &publication.manifest);
                body.extend_from_slice(&publication.time_unix_ms.to_le_bytes());
                put_tail(&mut body, publication.tail);
                put_optional_ref(&mut body, publication.fingerprints.as_ref());
            }
            Self::Tag { name, target } => {
                put_optional_id(&mut body, *target);
                body.extend_from_slice(name.as_bytes());
            }
            Self::Forget(ids) => ids.iter().for_each(|id| body.extend_from_slice(&id.0)),
            Self::Relayout(Relayout { tail, next_pack, pack, moved, dropped, retired_packs }) => {
                body.push(u8::from(tail.is_some()));
                put_tail(&mut body, tail.unwrap_or_default());
                body.extend_from_slice(&next_pack.to_le_bytes());
                put_optional_ref(&mut body, pack.as_ref());
                for list in [moved, dropped, retired_packs] {
                    body.extend_from_slice(&(list.len() as u32).to_le_bytes());
                    list.iter().for_each(|number| body.extend_from_slice(&number.to_le_bytes()));
                }
            }
        }
        body
    }

    fn decode_body(kind: u32, body: &[u8]) -> Decoded<Self> {
        let mut decoder = Decoder::new(body);
        match kind {
            KIND_PUBLISH => {
                let publication = Publication {
                    id: decoder.hash("snapshot id")?,
                    parent: optional_id(&mut decoder)?,
                    manifest: decoder.block_ref("manifest reference")?,
                    time_unix_ms: decoder.u64("time")?,
                    tail: (decoder.u32("segment")?, decoder.u64("segment length")?),
                    fingerprints: optional_ref(&mut decoder, "fingerprints")?,
                };
                decoder.finish("published snapshot")?;
                Ok(Self::Publish(publication))
            }
            KIND_TAG => {
                let target = optional_id(&mut decoder)?;
                let name = std::str::from_utf8(decoder.rest())
                    .map_err(|error| Malformed::new("tag", "UTF-8", error))?;
                Ok(Self::Tag { name: name.to_owned(), target })
            }
            KIND_FORGET => {
                let mut ids = Vec::with_capacity(body.len() / 32);
                while !decoder.is_empty() {
                    ids.push(decoder.hash("snapshot id")?);
                }
                Ok(Self::Forget(ids))
            }
            KIND_RELAYOUT => {
                let has_tail = flag(&mut decoder, "presence of a tail")?;
                let tail = (decoder.u32("segment")?, decoder.u64("segment length")?);
                let relayout = Relayout {
                    tail: has_tail.then_some(tail),
                    next_pack: decoder.u32("number of the next pack")?,
                    pack: optional_ref(&mut decoder, "pack index")?,
                    moved: numbers(&mut decoder, "moved segments")?,
                    dropped: numbers(&mut decoder, "dropped segments")?,
                    retired_packs: numbers(&mut decoder, "retired packs")?,
                };
                decoder.finish("relayout")?;
                Ok(Self::Relayout(relayout))
            }
            other => Err(Malformed::new("journal record kind", "1 to 4", other)),
        }
    }
}

fn put_tail(out: &mut Vec<u8>, (segment, offset): (u32, u64)) {
    out.extend_from_slice(&segment.to_le_bytes());
    out.extend_from_slice(&offset.to_le_bytes());
}

fn put_optional_ref(out: &mut Vec<u8>, block: Option<&BlockRef>) {
    out.push(u8::from(block.is_some()));
    if let Some(block) = block {
        put_block_ref(out, block);
    }
}

fn optional_ref(decoder: &mut Decoder<'_>, what: &'static str) -> Decoded<Option<BlockRef>> {
    flag(decoder, "presence of a reference")?.then(|| decoder.block_ref(what)).transpose()
}

fn flag(decoder: &mut Decoder<'_>, what: &'static str) -> Decoded<bool> {
    match decoder.u8(what)? {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(Malformed::new(what, "0 or 1", other)),
    }
}

fn numbers(decoder: &mut Decoder<'_>, what: &'static str) -> Decoded<Vec<u32>> {
    let count = decoder.u32(what)? as usize;
    if count > MAX_LISTED {
        return Err(Malformed::new(what, format!("at most {MAX_LISTED}"), count));
    }
    (0..count).map(|_| decoder.u32(what)).collect()
}

fn put_optional_id(out: &mut Vec<u8>, id: Option<SnapshotId>) {
    out.push(u8::from(id.is_some()));
    out.extend_from_slice(&id.unwrap_or(Hash([0; 32])).0);
}

fn optional_id(decoder: &mut Decoder<'_>) -> Decoded<Option<SnapshotId>> {
    let present = flag(decoder, "presence of an id")?;
    let id = decoder.hash("id")?;
    Ok(present.then_some(id))
}

/// Where reading the journal stands: after the last good record.
#[derive(Clone, Debug)]
pub(crate) struct Cursor {
    /// The header of the journal that was read: another one is another journal.
    header: [u8; FILE_HEADER_LEN],
    /// Offset after the last good record, in bytes.
    pub end: u64,
    next_sequence: u64,
    chain: Hash,
    /// Bytes after `end` that are no record: a torn append, or damage to the newest record.
    pub torn_bytes: u64,
}

impl Cursor {
    /// At the start of a journal with this header.
    pub fn start(header: &[u8; FILE_HEADER_LEN]) -> Self {
        Self {
            header: *header,
            end: FILE_HEADER_LEN as u64,
            next_sequence: 0,
            chain: Hash::of(header),
            torn_bytes: 0,
        }
    }

    /// True if `file` is the journal that was read so far: the same header, and the same check at
    /// the end of what was read.
    pub fn goes_on_in(&self, file: &dyn StoreFile) -> Result<bool> {
        let read = |bytes: &mut [u8], offset| match file.read_exact_at(bytes, offset) {
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
                Err(StoreError::io("read", JOURNAL_FILE, error))
            }
            read => Ok(read.is_ok()),
        };
        let (mut header, mut check) = ([0; FILE_HEADER_LEN], [0; CHECK_LEN]);
        if !read(&mut header, 0)? || header != self.header {
            return Ok(false);
        }
        if self.end == FILE_HEADER_LEN as u64 {
            return Ok(true);
        }
        Ok(read(&mut check, self.end - CHECK_LEN as u64)? && check == self.chain.0)
    }

    /// How often the journal was written anew before this one.
    pub fn generation(&self) -> u32 {
        u32::from_le_bytes(self.header[12..16].try_into().expect("four bytes"))
    }

    /// Reads what was appended since.
    pub fn advance(&mut self, file: &dyn StoreFile) -> Result<Vec<Entry>> {
        let len = file.len_bytes().map_err(|error| StoreError::io("read", JOURNAL_FILE, error))?;
        if len < self.end {
            return Err(StoreError::Corrupt {
                file: JOURNAL_FILE.into(),
                offset: len,
                what: "journal".into(),
                expected: format!("at least {} bytes", self.end),
                found: "a truncated file".into(),
            });
        }
        let mut bytes = vec![0; usize::try_from(len - self.end).expect("a journal fits in memory")];
        match file.read_exact_at(&mut bytes, self.end) {
            Ok(()) => {}
            // Cut between the two calls by a writer that dropped a torn tail: nothing new.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Vec::new()),
            Err(error) => return Err(StoreError::io("read", JOURNAL_FILE, error)),
        }
        self.parse(&bytes)
    }

    pub fn parse(&mut self, bytes: &[u8]) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        let mut rest = bytes;
        self.torn_bytes = 0;
        while !rest.is_empty() {
            match self.parse_record(rest) {
                Ok((kind, body, check)) => {
                    // Its checksum is right, so it is no torn append, whatever it says.
                    entries.push(
                        Entry::decode_body(kind, body)
                            .map_err(|malformed| self.damaged(malformed))?,
                    );
                    let len = HEADER_LEN + body.len() + CHECK_LEN;
                    self.chain = check;
                    self.next_sequence += 1;
                    self.end += len as u64;
                    rest = &rest[len..];
                }
                Err(malformed) if self.record_follows(rest) => {
                    // Only the newest record can be torn; one with another behind it was durable.
                    return Err(self.damaged(malformed));
                }
                Err(_torn) => {
                    self.torn_bytes = rest.len() as u64;
                    break;
                }
            }
        }
        Ok(entries)
    }

    fn damaged(&self, malformed: Malformed) -> StoreError {
        StoreError::Corrupt {
            file: JOURNAL_FILE.into(),
            offset: self.end,
            what: format!("journal record: {}", malformed.what),
            expected: malformed.expected,
            found: malformed.found,
        }
    }

    /// True if a later record starts behind the (damaged) one at the start of `bytes`. The magic
    /// alone would not do: a tag may be called that.
    fn record_follows(&self, bytes: &[u8]) -> bool {
        bytes.windows(HEADER_LEN).skip(HEADER_LEN).any(|window| {
            decode_header(&mut Decoder::new(window))
                .is_ok_and(|(_, sequence, _)| sequence > self.next_sequence)
        })
    }

    /// Kind, body and checksum of the record at the start of `bytes`.
    fn parse_record<'a>(&self, bytes: &'a [u8]) -> Decoded<(u32, &'a [u8], Hash)> {
        let mut decoder = Decoder::new(bytes);
        let (kind, sequence, body_len) = decode_header(&mut decoder)?;
        if sequence != self.next_sequence {
            return Err(Malformed::new("sequence number", self.next_sequence, sequence));
        }
        let body = decoder.bytes("body", body_len)?;
        let check = decoder.hash("checksum")?;
        let covered = &bytes[..HEADER_LEN + body_len];
        let computed = chain(&self.chain, covered);
        if check != computed {
            return Err(Malformed::new("checksum", computed, check));
        }
        Ok((kind, body, check))
    }

    /// The bytes of `entry` as the next record, and the cursor after it.
    pub fn encode_next(&self, entry: &Entry) -> (Vec<u8>, Self) {
        let body = entry.encode_body();
        let mut bytes = Vec::with_capacity(HEADER_LEN + body.len() + CHECK_LEN);
        bytes.extend_from_slice(&MAGIC.to_le_bytes());
        bytes.extend_from_slice(&entry.kind().to_le_bytes());
        bytes.extend_from_slice(&self.next_sequence.to_le_bytes());
        bytes
            .extend_from_slice(&u32::try_from(body.len()).expect("bodies are short").to_le_bytes());
        bytes.extend_from_slice(&0_u32.to_le_bytes());
        bytes.extend_from_slice(&body);
        let check = chain(&self.chain, &bytes);
        bytes.extend_from_slice(&check.0);
        let after = Self {
            header: self.header,
            end: self.end + bytes.len() as u64,
            next_sequence: self.next_sequence + 1,
            chain: check,
            torn_bytes: 0,
        };
        (bytes, after)
    }
}

fn decode_header(decoder: &mut Decoder<'_>) -> Decoded<(u32, u64, usize)> {
    let magic = decoder.u32("magic")?;
    let kind = decoder.u32("kind")?;
    let sequence = decoder.u64("sequence number")?;
    let body_len = decoder.u32("body length")? as usize;
    let reserved = decoder.u32("reserved field")?;
    if magic != MAGIC {
        return Err(Malformed::new("magic", MAGIC, magic));
    }
    if body_len > MAX_BODY_LEN {
        return Err(Malformed::new("body length", format!("at most {MAX_BODY_LEN}"), body_len));
    }
    if reserved != 0 {
        return Err(Malformed::new("reserved field", 0, reserved));
    }
    Ok((kind, sequence, body_len))
}

fn chain(previous: &Hash, record: &[u8]) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&previous.0);
    hasher.update(record);
    Hash(*hasher.finalize().as_bytes())
}

/// Reads and checks the journal's header; returns its bytes, which the first check starts from.
pub(crate) fn read_header(file: &dyn StoreFile, store: [u8; 16]) -> Result<[u8; FILE_HEADER_LEN]> {
    let mut bytes = [0; FILE_HEADER_LEN];
    file.read_exact_at(&mut bytes, 0).map_err(|error| {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            StoreError::Corrupt {
                file: JOURNAL_FILE.into(),
                offset: 0,
                what: "file header".into(),
                expected: format!("{FILE_HEADER_LEN} bytes"),
                found: "a shorter file: the journal was truncated".into(),
            }
        } else {
            StoreError::io("read", JOURNAL_FILE, error)
        }
    })?;
    let header = FileHeader::decode(&bytes, FileKind::Journal, JOURNAL_FILE)?;
    if header.store != store {
        return Err(StoreError::Corrupt {
            file: JOURNAL_FILE.into(),
            offset: 16,
            what: "store UUID".into(),
            expected: crate::format::hex(&store),
            found: crate::format::hex(&header.store),
        });
    }
    Ok(bytes)
}

/// Records with their checks made right, as far as there are records; for fuzzers.
pub(crate) fn with_checks(bytes: &[u8], header: &FileHeader) -> Vec<u8> {
    let mut out = bytes.to_vec();
    let (mut at, mut check) = (0, Cursor::start(&header.encode()).chain);
    while let Some(rest) = out.get(at..) {
        let Ok((_, _, body_len)) = decode_header(&mut Decoder::new(rest)) else { break };
        let end = HEADER_LEN + body_len;
        if rest.len() < end + CHECK_LEN {
            break;
        }
        check = chain(&check, &rest[..end]);
        out[at + end..at + end + CHECK_LEN].copy_from_slice(&check.0);
        at += end + CHECK_LEN;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::FORMAT_VERSION;

    fn start() -> Cursor {
        let header = FileHeader {
            kind: FileKind::Journal,
            version: FORMAT_VERSION,
            number: 0,
            store: [3; 16],
            created_unix_ms: 1,
        };
        Cursor::start(&header.encode())
    }

    fn sample() -> Vec<Entry> {
        let id = Hash::of(b"one");
        let manifest = BlockRef { segment: 1, offset: 64, len: 900, hash: Hash::of(b"manifest") };
        vec![
            Entry::Publish(Publication {
                id,
                parent: None,
                manifest,
                time_unix_ms: 5,
                tail: (1, 964),
                fingerprints: None,
            }),
            Entry::Tag { name: "gold".into(), target: Some(id) },
            Entry::Publish(Publication {
                id: Hash::of(b"two"),
                parent: Some(id),
                manifest,
                time_unix_ms: 6,
                tail: (2, 64),
                fingerprints: Some(manifest),
            }),
            Entry::Forget(vec![id, Hash::of(b"other")]),
            Entry::Relayout(Relayout {
                tail: Some((2, 64)),
                next_pack: 8,
                pack: Some(manifest),
                moved: vec![1, 2],
                dropped: vec![9],
                retired_packs: vec![3, 4, 5],
            }),
            Entry::Tag { name: "gold".into(), target: None },
        ]
    }

    fn encoded() -> (Vec<u8>, Vec<usize>) {
        let mut cursor = start();
        let mut bytes = Vec::new();
        let mut ends = vec![0];
        for entry in sample() {
            let (record, next) = cursor.encode_next(&entry);
            bytes.extend_from_slice(&record);
            ends.push(bytes.len());
            cursor = next;
        }
        (bytes, ends)
    }

    #[test]
    fn entries_round_trip_and_cuts_are_torn_tails() {
        let (bytes, ends) = encoded();
        for cut in 0..=bytes.len() {
            let mut cursor = start();
            let entries = cursor.parse(&bytes[..cut]).unwrap();
            let whole = ends.iter().filter(|end| **end <= cut).count() - 1;
            assert_eq!(entries, sample()[..whole], "cut at {cut}");
            assert_eq!(cursor.torn_bytes as usize, cut - ends[whole]);
        }
    }

    /// What a later version may append is not a torn tail that the next writer may cut off.
    #[test]
    fn a_whole_record_of_an_unknown_kind_is_an_error() {
        let (mut bytes, _) = start().encode_next(&sample()[0]);
        bytes[4] = 9;
        let covered = bytes.len() - CHECK_LEN;
        let check = chain(&start().chain, &bytes[..covered]);
        bytes[covered..].copy_from_slice(&check.0);
        let error = start().parse(&bytes).unwrap_err();
        assert!(error.to_string().contains("expected 1 to 4, found 9"), "{error}");
    }

    #[test]
    fn a_flipped_bit_is_damage_or_a_torn_tail_but_never_another_entry() {
        let (bytes, ends) = encoded();
        let last = ends[ends.len() - 2];
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let mut cursor = start();
            match cursor.parse(&flipped) {
                Err(StoreError::Corrupt { .. }) => assert!(bit / 8 < last, "bit {bit}"),
                Ok(entries) => {
                    assert!(bit / 8 >= last, "bit {bit} went unseen");
                    assert!(cursor.torn_bytes > 0);
                    assert_eq!(entries, sample()[..sample().len() - 1]);
                }
                Err(other) => panic!("{other}"),
            }
        }
    }
}
