//! A second reader of the store's files, written from `FORMAT.md` and sharing no code with the
//! store: it tells the tests what is published, and reveals what `FORMAT.md` leaves out.

use std::collections::BTreeSet;

/// Size of the header of every file, in bytes.
pub const FILE_HEADER_LEN: usize = 64;
/// Size of the header of a record in a segment, in bytes.
pub const BLOCK_HEADER_LEN: usize = 16;
/// Kind of a record that holds pages.
pub const KIND_FRAME: u8 = 1;
/// Kind of a record that holds a node of a page tree.
pub const KIND_NODE: u8 = 2;
const RECORD_HEADER_LEN: usize = 24;
const CHECK_LEN: usize = 32;
const KIND_PUBLISH: u32 = 1;
const KIND_TAG: u32 = 2;
const KIND_FORGET: u32 = 3;
const KIND_RELAYOUT: u32 = 4;

/// A `Publish` record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// The snapshot.
    pub id: [u8; 32],
    /// Its parent.
    pub parent: Option<[u8; 32]>,
    /// Segment, offset and length of its manifest's record.
    pub manifest: (u32, u32, u32),
    /// Segment and offset where its transaction ended.
    pub tail: (u32, u64),
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// The state that a journal describes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JournalState {
    /// Snapshots that are published and not forgotten, in order.
    pub published: Vec<Published>,
    /// Where the newest transaction ended: segment and offset.
    pub tail: Option<(u32, u64)>,
    /// Packs that are in use.
    pub packs: BTreeSet<u32>,
    /// Segments whose file is gone.
    pub retired: BTreeSet<u32>,
    /// Length of the part that holds whole records, in bytes, file header included.
    pub len: usize,
}

impl Record {
    /// Where the next record starts.
    #[must_use]
    pub fn end(&self) -> usize {
        self.offset + self.len
    }
}

/// Reads a journal.
///
/// # Panics
/// If it violates `FORMAT.md`.
#[must_use]
pub fn read_journal(bytes: &[u8]) -> JournalState {
    assert_eq!(&bytes[..8], b"FRZLJNL\n");
    let mut check = *blake3::hash(&bytes[..FILE_HEADER_LEN]).as_bytes();
    let mut state = JournalState { len: FILE_HEADER_LEN, ..JournalState::default() };
    let mut sequence = 0;
    while let Some(header) = bytes.get(state.len..state.len + RECORD_HEADER_LEN) {
        let body_len = u32_at(header, 16) as usize;
        let end = state.len + RECORD_HEADER_LEN + body_len;
        let Some(found) = bytes.get(end..end + CHECK_LEN) else { break };
        let mut hasher = blake3::Hasher::new();
        hasher.update(&check).update(&bytes[state.len..end]);
        if &header[..4] != b"FRJR" || hasher.finalize().as_bytes() != found {
            break;
        }
        assert_eq!((u64_at(header, 8), u32_at(header, 20)), (sequence, 0));
        state.take(u32_at(header, 4), &bytes[state.len + RECORD_HEADER_LEN..end]);
        check.copy_from_slice(found);
        sequence += 1;
        state.len = end + CHECK_LEN;
    }
    state
}

impl JournalState {
    fn take(&mut self, kind: u32, body: &[u8]) {
        let id = |at: usize| -> [u8; 32] { body[at..at + 32].try_into().expect("32 bytes") };
        match kind {
            KIND_PUBLISH => {
                let fingerprints = usize::from(body[129]) * 44;
                assert_eq!(body.len(), 32 + 33 + 44 + 8 + 12 + 1 + fingerprints);
                let tail = (u32_at(body, 117), u64_at(body, 121));
                self.tail = Some(tail);
                self.published.push(Published {
                    id: id(0),
                    parent: (body[32] == 1).then(|| id(33)),
                    manifest: (u32_at(body, 65), u32_at(body, 69), u32_at(body, 73)),
                    tail,
                });
            }
            KIND_FORGET => {
                assert_eq!(body.len() % 32, 0);
                let gone: Vec<[u8; 32]> = (0..body.len()).step_by(32).map(id).collect();
                self.published.retain(|snapshot| !gone.contains(&snapshot.id));
            }
            KIND_RELAYOUT => self.relayout(body),
            kind => assert_eq!(kind, KIND_TAG),
        }
    }

    fn relayout(&mut self, body: &[u8]) {
        if body[0] == 1 {
            self.tail = Some((u32_at(body, 1), u64_at(body, 5)));
        }
        let mut at = 18;
        if body[17] == 1 {
            self.packs.insert(u32_at(body, at));
            at += 44;
        }
        let mut list = || {
            let count = u32_at(body, at) as usize;
            let numbers = (0..count).map(|index| u32_at(body, at + 4 + index * 4)).collect();
            at += 4 + count * 4;
            numbers
        };
        let [moved, dropped, packs]: [Vec<u32>; 3] = [list(), list(), list()];
        assert_eq!(at, body.len());
        self.retired.extend(moved.iter().chain(&dropped));
        packs
            .iter()
            .for_each(|pack| assert!(self.packs.remove(pack), "pack {pack} is retired once"));
    }
}

/// Kind of a record that only writers read.
pub const KIND_FINGERPRINTS: u8 = 6;

/// A record of a segment or pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Where its header starts.
    pub offset: usize,
    /// Header and payload, in bytes.
    pub len: usize,
    /// Frame, node, state chunk or manifest.
    pub kind: u8,
}

/// Reads the records of a segment or pack, which must fill it.
///
/// # Panics
/// If they do not.
#[must_use]
pub fn read_segment(bytes: &[u8]) -> Vec<Record> {
    assert!([b"FRZLSEG\n", b"FRZLPAK\n"].contains(&bytes[..8].try_into().expect("eight bytes")));
    let mut records = Vec::new();
    let mut offset = FILE_HEADER_LEN;
    while offset < bytes.len() {
        assert_eq!(bytes[offset], 0xF5, "a record at {offset}");
        let len = BLOCK_HEADER_LEN + u32_at(bytes, offset + 4) as usize;
        records.push(Record { offset, len, kind: bytes[offset + 1] });
        offset += len;
    }
    assert_eq!(offset, bytes.len(), "the last record ends the segment");
    records
}

/// Returns the payload of a record, decompressed.
///
/// # Panics
/// If it cannot be decompressed.
#[must_use]
pub fn payload_of(record: &[u8]) -> Vec<u8> {
    let stored = &record[BLOCK_HEADER_LEN..];
    let len = u32_at(record, 8) as usize;
    match record[2] {
        0 => stored.to_vec(),
        codec => {
            assert_eq!(codec, 1);
            zstd::bulk::decompress(stored, len).expect("a zstd frame")
        }
    }
}
