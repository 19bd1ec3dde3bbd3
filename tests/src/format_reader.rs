//! A second reader of the files, written from `FORMAT.md` and sharing no code with the store: it
//! tells the tests what is published, and the text what it forgot to say.

/// Bytes of the header of every file.
pub const FILE_HEADER_LEN: usize = 64;
/// Bytes of the header of a record in a segment.
pub const BLOCK_HEADER_LEN: usize = 16;
/// Kind of a record that holds pages.
pub const KIND_FRAME: u8 = 1;
const RECORD_HEADER_LEN: usize = 24;
const CHECK_LEN: usize = 32;
const KIND_PUBLISH: u32 = 1;

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

/// The published snapshots in a journal, and the length of the part that holds whole records.
///
/// # Panics
/// If the journal is not what `FORMAT.md` says.
#[must_use]
pub fn read_journal(bytes: &[u8]) -> (Vec<Published>, usize) {
    assert_eq!(&bytes[..8], b"FRZLJNL\n");
    let mut check = *blake3::hash(&bytes[..FILE_HEADER_LEN]).as_bytes();
    let mut published = Vec::new();
    let mut at = FILE_HEADER_LEN;
    let mut sequence = 0;
    while let Some(header) = bytes.get(at..at + RECORD_HEADER_LEN) {
        let body_len = u32_at(header, 16) as usize;
        let end = at + RECORD_HEADER_LEN + body_len;
        let Some(found) = bytes.get(end..end + CHECK_LEN) else { break };
        let mut hasher = blake3::Hasher::new();
        hasher.update(&check).update(&bytes[at..end]);
        if &header[..4] != b"FRJR" || hasher.finalize().as_bytes() != found {
            break;
        }
        assert_eq!((u64_at(header, 8), u32_at(header, 20)), (sequence, 0));
        let body = &bytes[at + RECORD_HEADER_LEN..end];
        if u32_at(header, 4) == KIND_PUBLISH {
            assert_eq!(body.len(), 32 + 33 + 44 + 8 + 12);
            published.push(Published {
                id: body[..32].try_into().expect("32 bytes"),
                parent: (body[32] == 1).then(|| body[33..65].try_into().expect("32 bytes")),
                manifest: (u32_at(body, 65), u32_at(body, 69), u32_at(body, 73)),
                tail: (u32_at(body, 117), u64_at(body, 121)),
            });
        }
        check.copy_from_slice(found);
        sequence += 1;
        at = end + CHECK_LEN;
    }
    (published, at)
}

/// A record of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Where its header starts.
    pub offset: usize,
    /// Header and payload, in bytes.
    pub len: usize,
    /// Frame, node, state chunk or manifest.
    pub kind: u8,
}

/// The records of a segment, which must fill it.
///
/// # Panics
/// If they do not.
#[must_use]
pub fn read_segment(bytes: &[u8]) -> Vec<Record> {
    assert_eq!(&bytes[..8], b"FRZLSEG\n");
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
