//! The journal: an append-only log of published and forgotten snapshots, tags and relayouts.
//!
//! A record is one write and one sync. Its checksum covers the previous record's, so a record
//! cannot be lost, moved or changed without the next one failing its check.

use std::io;

use crate::codec::{Decoded, Decoder, Malformed};
use crate::error::{Result, StoreError};
use crate::format::{FILE_HEADER_LEN, FileHeader, FileKind, JOURNAL_FILE};
use crate::id::Hash;
use crate::journal_entry::Entry;
use crate::storage::StoreFile;

const MAGIC: u32 = u32::from_le_bytes(*b"FRJR");
/// Magic, kind, sequence number, body length, zero.
const HEADER_LEN: usize = 4 + 4 + 8 + 4 + 4;
const CHECK_LEN: usize = 32;
/// Bounds what a damaged length can ask for; 32,000 forgotten snapshots fit in one record.
pub(crate) const MAX_BODY_LEN: usize = 1 << 20;
/// Bytes of a journal read at a time; the longest record fits.
const PART_LEN: u64 = 4 << 20;

const _: () = assert!(HEADER_LEN + MAX_BODY_LEN + CHECK_LEN <= PART_LEN as usize);

/// A position in the journal, after the last good record read.
#[derive(Clone, Debug)]
pub(crate) struct Cursor {
    /// The header of the journal that was read; a different header means a different journal.
    header: [u8; FILE_HEADER_LEN],
    /// Offset after the last good record, in bytes.
    pub end: u64,
    next_sequence: u64,
    chain: Hash,
    /// Bytes after `end` that are no record: a torn append, or damage to the newest record.
    pub torn_bytes: u64,
}

impl Cursor {
    /// The start of a journal with this header.
    pub fn start(header: &[u8; FILE_HEADER_LEN]) -> Self {
        Self {
            header: *header,
            end: FILE_HEADER_LEN as u64,
            next_sequence: 0,
            chain: Hash::of(header),
            torn_bytes: 0,
        }
    }

    /// A hash of everything read so far.
    pub fn chain(&self) -> Hash {
        self.chain
    }

    /// True if `file` continues the journal read so far: it has the same header, and the same check
    /// at the cursor's position.
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

    /// Number of records read so far.
    pub fn records(&self) -> u64 {
        self.next_sequence
    }

    /// How often the journal had been rewritten before this one.
    pub fn generation(&self) -> u32 {
        u32::from_le_bytes(self.header[12..16].try_into().expect("four bytes"))
    }

    /// Reads the entries appended since.
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
        self.read_to(len, |bytes, at| match file.read_exact_at(bytes, at) {
            Ok(()) => Ok(true),
            // A writer has cut off a torn tail meanwhile: there is nothing more.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(StoreError::io("read", JOURNAL_FILE, error)),
        })
    }

    /// As [`Self::advance`], from `bytes` in memory.
    pub fn parse(&mut self, bytes: &[u8]) -> Result<Vec<Entry>> {
        let start = self.end;
        self.read_to(start + bytes.len() as u64, |part, at| {
            part.copy_from_slice(&bytes[(at - start) as usize..][..part.len()]);
            Ok(true)
        })
    }

    /// Reads the records up to `len`, in parts, so that memory is bounded however long the journal
    /// is. `read` fills a buffer from an offset, or returns false if the journal ends before.
    fn read_to(
        &mut self,
        len: u64,
        mut read: impl FnMut(&mut [u8], u64) -> Result<bool>,
    ) -> Result<Vec<Entry>> {
        let (mut entries, mut bytes) = (Vec::new(), Vec::new());
        let mut part = |bytes: &mut Vec<u8>, at: u64| {
            bytes.resize((len - at).min(PART_LEN) as usize, 0);
            read(bytes, at)
        };
        self.torn_bytes = 0;
        while self.end < len {
            let start = self.end;
            if !part(&mut bytes, start)? {
                break;
            }
            let Some(malformed) = self.take_records(&bytes, &mut entries)? else { continue };
            if self.end > start && start + (bytes.len() as u64) < len {
                // The rest of the record is in the next part.
                continue;
            }
            let mut at = self.end + HEADER_LEN as u64;
            while at + HEADER_LEN as u64 <= len && part(&mut bytes, at)? {
                if self.has_later_record(&bytes) {
                    // Only the newest record can be torn; one followed by another was durable.
                    return Err(self.damaged(malformed));
                }
                at += (bytes.len() - HEADER_LEN + 1) as u64;
            }
            self.torn_bytes = len - self.end;
            break;
        }
        Ok(entries)
    }

    /// Parses records from the start of `bytes`; returns what is wrong with the first that is not
    /// whole, if there is one.
    fn take_records(
        &mut self,
        bytes: &[u8],
        entries: &mut Vec<Entry>,
    ) -> Result<Option<Malformed>> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let (kind, body, check) = match self.parse_record(rest) {
                Ok(record) => record,
                Err(malformed) => return Ok(Some(malformed)),
            };
            // The checksum is right, so a record we cannot decode is not a torn append.
            let entry =
                Entry::decode_body(kind, body).map_err(|malformed| self.damaged(malformed))?;
            entries.push(entry);
            let len = HEADER_LEN + body.len() + CHECK_LEN;
            self.chain = check;
            self.next_sequence += 1;
            self.end += len as u64;
            rest = &rest[len..];
        }
        Ok(None)
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

    /// True if a header with a later sequence number than the next is anywhere in `bytes`. The
    /// magic alone would not do: a tag may contain it.
    fn has_later_record(&self, bytes: &[u8]) -> bool {
        bytes.windows(HEADER_LEN).any(|window| {
            // The cheap test first: there may be much to scan.
            window.starts_with(&MAGIC.to_le_bytes())
                && decode_header(&mut Decoder::new(window))
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

    /// Encodes `entry` as the next record; returns its bytes and the cursor after it.
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

/// Reads and checks the journal's header; returns its bytes, from which the chain of checks starts.
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

/// Corrects the checks of the records in `bytes`, as far as they parse; for fuzzers.
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
    use crate::id::BlockRef;
    use crate::journal_entry::{MAX_LISTED, Publication};
    use crate::layout::Relayout;

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

    /// Uses the longest possible records, enough of them to be read in several parts.
    #[test]
    fn a_journal_of_many_parts_is_read_as_one() {
        let long = Entry::Forget(vec![Hash([7; 32]); MAX_LISTED]);
        let (mut cursor, mut bytes, mut ends) = (start(), Vec::new(), vec![0]);
        while bytes.len() < 3 * PART_LEN as usize {
            let (record, next) = cursor.encode_next(&long);
            bytes.extend_from_slice(&record);
            ends.push(bytes.len());
            cursor = next;
        }
        let mut whole = start();
        assert_eq!(whole.parse(&bytes).unwrap().len(), ends.len() - 1);
        assert_eq!((whole.end, whole.torn_bytes), (cursor.end, 0));
        // Torn in the last part, followed by zeros for longer than a part.
        let mut torn = bytes[..bytes.len() - 9].to_vec();
        torn.resize(bytes.len() + 2 * PART_LEN as usize, 0);
        let mut cursor = start();
        assert_eq!(cursor.parse(&torn).unwrap().len(), ends.len() - 2);
        assert_eq!(cursor.torn_bytes as usize, torn.len() - ends[ends.len() - 2]);
        // Damaged in the first part, with no recognisable record before the last part.
        bytes[100] ^= 1;
        let last = ends[ends.len() - 2];
        bytes[ends[1]..last].fill(0);
        let error = start().parse(&bytes).unwrap_err().to_string();
        assert!(error.contains("journal is damaged at offset 64"), "{error}");
    }

    /// A later version may have appended it: the next writer must not cut it off as a torn tail.
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
