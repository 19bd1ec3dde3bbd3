//! The fixed layouts of a store: file names, file headers, record headers. `FORMAT.md`, beside this
//! crate's sources, is normative; assertions check the constants here against each other.

use crate::codec::{Decoded, Decoder, Malformed};
use crate::error::{Result, StoreError};
use crate::id::Hash;
use crate::page::PAGE_SIZE;

/// The format this program writes, and the newest it reads.
pub const FORMAT_VERSION: u32 = 1;

/// The file that makes a directory a store.
pub const STORE_FILE: &str = "FRAZIL";
/// The file whose `flock` is the writer lock.
pub const LOCK_FILE: &str = "lock";
/// The log of published and forgotten snapshots, tags and relayouts.
pub const JOURNAL_FILE: &str = "journal";
/// A rewritten journal, before it replaces the old one.
pub const JOURNAL_NEW_FILE: &str = "journal.new";
/// The folder of segments and packs.
pub const SEGMENT_FOLDER: &str = "segments";
/// The folder of pins, which keep snapshots in use from being pruned. Not part of the data.
pub const PIN_FOLDER: &str = "pins";

/// The name of segment `number`.
#[must_use]
pub fn segment_name(number: u32) -> String {
    format!("{SEGMENT_FOLDER}/{number:08x}.seg")
}

/// The name of pack `number`.
#[must_use]
pub fn pack_name(number: u32) -> String {
    format!("{SEGMENT_FOLDER}/{number:08x}.pack")
}

/// The kind and number of the segment or pack called `name` in the segment folder, if it is one.
pub(crate) fn parse_name(name: &str) -> Option<(FileKind, u32)> {
    let (digits, kind) = match name.rsplit_once('.')? {
        (digits, "seg") => (digits, FileKind::Segment),
        (digits, "pack") => (digits, FileKind::Pack),
        _ => return None,
    };
    let number = u32::from_str_radix(digits, 16).ok()?;
    // Only names in exactly our form: others are not files of the store.
    (format!("{number:08x}") == digits).then_some((kind, number))
}

/// Bytes of every file header.
pub(crate) const FILE_HEADER_LEN: usize = 64;
/// Bytes of a record header.
pub(crate) const RECORD_HEADER_LEN: usize = 16;
/// First byte of every record in a segment.
pub(crate) const RECORD_MAGIC: u8 = 0xF5;

/// The most pages one frame may hold. Bounds what a damaged length can make a reader allocate.
pub const MAX_FRAME_PAGES: usize = 64;
/// The most bytes a decoded node may have.
pub(crate) const MAX_NODE_LEN: usize = 4 << 20;
/// The most bytes a decoded delta frame may have: pages, and up to 46 bytes each to name the base.
pub(crate) const MAX_DELTA_LEN: usize = MAX_FRAME_PAGES * (PAGE_SIZE + 64);
/// The most bytes a decoded manifest, state chunk, pack index or block of fingerprints may have.
pub const MAX_BLOB_LEN: usize = 64 << 20;
/// The most bytes a segment may have before it is closed; offsets are 32 bits.
pub(crate) const MAX_SEGMENT_LEN: u64 = 1 << 31;

const _: () = {
    assert!(8 + 4 + 4 + 16 + 8 + 8 + 16 == FILE_HEADER_LEN);
    assert!(1 + 1 + 1 + 1 + 4 + 4 + 4 == RECORD_HEADER_LEN);
    assert!((MAX_SEGMENT_LEN + MAX_BLOB_LEN as u64) < u32::MAX as u64);
    assert!(MAX_FRAME_PAGES * PAGE_SIZE <= MAX_NODE_LEN);
};

/// What kind of file a header belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum FileKind {
    Store,
    Segment,
    Pack,
    Journal,
}

impl FileKind {
    const fn magic(self) -> [u8; 8] {
        match self {
            Self::Store => *b"FRAZIL\r\n",
            Self::Segment => *b"FRZLSEG\n",
            Self::Pack => *b"FRZLPAK\n",
            Self::Journal => *b"FRZLJNL\n",
        }
    }
}

/// The header at the start of every file of a store. All versions can read it: magic, version and
/// checksum keep their places.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 8 | magic |
/// | 8 | 4 | format version |
/// | 12 | 4 | number of the segment or pack; for a journal, how often it was rewritten before |
/// | 16 | 16 | the store's UUID |
/// | 32 | 8 | time of creation, Unix milliseconds |
/// | 40 | 8 | zero |
/// | 48 | 16 | first 16 bytes of the BLAKE3 of bytes 0..48 |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileHeader {
    pub kind: FileKind,
    pub version: u32,
    pub number: u32,
    pub store: [u8; 16],
    pub created_unix_ms: u64,
}

impl FileHeader {
    pub fn encode(&self) -> [u8; FILE_HEADER_LEN] {
        let mut out = [0; FILE_HEADER_LEN];
        out[..8].copy_from_slice(&self.kind.magic());
        out[8..12].copy_from_slice(&self.version.to_le_bytes());
        out[12..16].copy_from_slice(&self.number.to_le_bytes());
        out[16..32].copy_from_slice(&self.store);
        out[32..40].copy_from_slice(&self.created_unix_ms.to_le_bytes());
        let check = Hash::of(&out[..48]);
        out[48..].copy_from_slice(&check.0[..16]);
        out
    }

    /// Parses and checks a header; `file` is named in errors.
    pub fn decode(bytes: &[u8], kind: FileKind, file: &str) -> Result<Self> {
        let damaged = |malformed: Malformed| StoreError::Corrupt {
            file: file.to_owned(),
            offset: 0,
            what: format!("file header: {}", malformed.what),
            expected: malformed.expected,
            found: malformed.found,
        };
        let header = Self::parse(bytes, kind).map_err(damaged)?;
        if header.version > FORMAT_VERSION {
            return Err(StoreError::UnsupportedVersion {
                file: file.to_owned(),
                expected: FORMAT_VERSION,
                found: header.version,
            });
        }
        Ok(header)
    }

    fn parse(bytes: &[u8], kind: FileKind) -> Decoded<Self> {
        let mut decoder = Decoder::new(bytes);
        let magic: [u8; 8] = decoder.array("magic")?;
        if magic != kind.magic() {
            return Err(Malformed::new("magic", kind.magic().escape_ascii(), magic.escape_ascii()));
        }
        let header = Self {
            kind,
            version: decoder.u32("version")?,
            number: decoder.u32("number")?,
            store: decoder.array("store UUID")?,
            created_unix_ms: decoder.u64("creation time")?,
        };
        let _zero = decoder.u64("reserved")?;
        let check: [u8; 16] = decoder.array("checksum")?;
        let computed = Hash::of(&bytes[..48]);
        if computed.0[..16] != check {
            return Err(Malformed::new("checksum", computed, hex(&check)));
        }
        Ok(header)
    }
}

/// Kinds of record in a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum RecordKind {
    /// Up to [`MAX_FRAME_PAGES`] pages, one after the other.
    Frame = 1,
    /// A node of a page tree.
    Node = 2,
    /// The body of a state chunk.
    Blob = 3,
    /// A snapshot's manifest.
    Manifest = 4,
    /// Up to [`MAX_FRAME_PAGES`] pages as their difference from pages of frames.
    Delta = 5,
    /// Fingerprints of the pages of frames.
    Fingerprints = 6,
    /// The index of a pack: what it holds, and where.
    PackIndex = 7,
}

impl RecordKind {
    fn max_raw_len(self) -> usize {
        match self {
            Self::Frame => MAX_FRAME_PAGES * PAGE_SIZE,
            Self::Node => MAX_NODE_LEN,
            Self::Delta => MAX_DELTA_LEN,
            Self::Blob | Self::Manifest | Self::Fingerprints | Self::PackIndex => MAX_BLOB_LEN,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Frame => "frame",
            Self::Node => "tree node",
            Self::Blob => "state chunk",
            Self::Manifest => "manifest",
            Self::Delta => "delta frame",
            Self::Fingerprints => "fingerprints",
            Self::PackIndex => "pack index",
        }
    }
}

/// How a record's payload is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Codec {
    /// Uncompressed.
    Plain = 0,
    /// One zstd frame.
    Zstd = 1,
}

/// The header of a record; the hash in a reference covers both header and payload.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 1 | 0xF5 |
/// | 1 | 1 | kind |
/// | 2 | 1 | codec |
/// | 3 | 1 | zero |
/// | 4 | 4 | bytes of payload as stored |
/// | 8 | 4 | bytes of payload when decoded |
/// | 12 | 4 | zero |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecordHeader {
    pub kind: RecordKind,
    pub codec: Codec,
    pub stored_len: u32,
    pub raw_len: u32,
}

impl RecordHeader {
    pub fn encode(&self) -> [u8; RECORD_HEADER_LEN] {
        let mut out = [0; RECORD_HEADER_LEN];
        out[0] = RECORD_MAGIC;
        out[1] = self.kind as u8;
        out[2] = self.codec as u8;
        out[4..8].copy_from_slice(&self.stored_len.to_le_bytes());
        out[8..12].copy_from_slice(&self.raw_len.to_le_bytes());
        out
    }

    pub fn decode(bytes: &[u8]) -> Decoded<Self> {
        let mut decoder = Decoder::new(bytes);
        let magic = decoder.u8("record magic")?;
        if magic != RECORD_MAGIC {
            return Err(Malformed::new("record magic", RECORD_MAGIC, magic));
        }
        let kind = match decoder.u8("record kind")? {
            1 => RecordKind::Frame,
            2 => RecordKind::Node,
            3 => RecordKind::Blob,
            4 => RecordKind::Manifest,
            5 => RecordKind::Delta,
            6 => RecordKind::Fingerprints,
            7 => RecordKind::PackIndex,
            other => return Err(Malformed::new("record kind", "1 to 7", other)),
        };
        let codec = match decoder.u8("record codec")? {
            0 => Codec::Plain,
            1 => Codec::Zstd,
            other => return Err(Malformed::new("record codec", "0 or 1", other)),
        };
        let flags = decoder.u8("record flags")?;
        let stored_len = decoder.u32("stored length")?;
        let raw_len = decoder.u32("decoded length")?;
        let reserved = decoder.u32("reserved field")?;
        if flags != 0 || reserved != 0 {
            return Err(Malformed::new("reserved field", 0, u32::from(flags) | reserved));
        }
        if raw_len as usize > kind.max_raw_len() {
            let most = format!("at most {} for a {}", kind.max_raw_len(), kind.name());
            return Err(Malformed::new("decoded length", most, raw_len));
        }
        if codec == Codec::Plain && stored_len != raw_len {
            return Err(Malformed::new("stored length", raw_len, stored_len));
        }
        Ok(Self { kind, codec, stored_len, raw_len })
    }
}

/// Hex digits of `bytes`, for messages.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header() -> FileHeader {
        FileHeader {
            kind: FileKind::Segment,
            version: FORMAT_VERSION,
            number: 7,
            store: [9; 16],
            created_unix_ms: 1_700_000_000_000,
        }
    }

    #[test]
    fn every_flipped_bit_of_a_file_header_is_seen() {
        let bytes = header().encode();
        assert_eq!(FileHeader::decode(&bytes, FileKind::Segment, "f").unwrap(), header());
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(FileHeader::decode(&flipped, FileKind::Segment, "f").is_err(), "bit {bit}");
        }
        assert!(FileHeader::decode(&bytes, FileKind::Journal, "f").is_err());
        assert!(FileHeader::decode(&bytes[..63], FileKind::Segment, "f").is_err());
    }

    #[test]
    fn a_later_version_is_refused_by_number() {
        let later = FileHeader { version: FORMAT_VERSION + 1, ..header() }.encode();
        let error = FileHeader::decode(&later, FileKind::Segment, "f").unwrap_err();
        assert!(matches!(error, StoreError::UnsupportedVersion { .. }), "{error}");
    }

    proptest! {
        #[test]
        fn record_headers_parse_or_fail(bytes in any::<[u8; RECORD_HEADER_LEN]>(), kind in 1_u8..8) {
            let mut bytes = bytes;
            bytes[0] = RECORD_MAGIC;
            bytes[1] = kind;
            if let Ok(header) = RecordHeader::decode(&bytes) {
                prop_assert_eq!(header.encode(), bytes);
            }
        }
    }
}
