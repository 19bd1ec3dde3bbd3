//! Fuzz targets, one function per parser: any bytes must be refused or parsed, and what was parsed
//! must survive being encoded and parsed again. Targets bypass the hashes that protect the parsers,
//! since a fuzzer cannot guess them.

use std::collections::BTreeMap;

use crate::catalog::SnapshotInfo;
use crate::codec::Decoder;
use crate::format::{FileHeader, FileKind, RECORD_HEADER_LEN, RecordHeader, RecordKind};
use crate::frame::Frame;
use crate::id::{BlockRef, Hash};
use crate::journal::Cursor;
use crate::manifest::Manifest;
use crate::node::{MAX_LEVEL, MAX_REGION_PAGES, Node, root_level, span_pages};
use crate::pack::PackIndex;
use crate::record::VerifiedRecord;
use crate::{delta, elide, reference};

/// The name of a target and its function.
pub type Target = (&'static str, fn(&[u8]));

/// All targets. The folders of `fuzz/corpus` have the same names.
pub const TARGETS: [Target; 9] = [
    ("header", header),
    ("record", record),
    ("node", node),
    ("delta", delta),
    ("fingerprints", fingerprints),
    ("pack_index", pack_index),
    ("journal", journal),
    ("manifest", manifest),
    ("reference", reference),
];

/// The target called `name`.
///
/// # Panics
/// If there is no such target.
#[must_use]
pub fn target(name: &str) -> fn(&[u8]) {
    let found = TARGETS.iter().find(|(known, _)| *known == name);
    found.unwrap_or_else(|| panic!("no fuzz target {name}")).1
}

fn header(bytes: &[u8]) {
    for kind in [FileKind::Store, FileKind::Segment, FileKind::Pack, FileKind::Journal] {
        // Correct the checksum, or next to nothing gets past it.
        let mut fixed = bytes.to_vec();
        if let Some((covered, check)) = fixed.split_at_mut_checked(48)
            && let Some(check) = check.get_mut(..16)
        {
            check.copy_from_slice(&Hash::of(covered).0[..16]);
        }
        if let Ok(header) = FileHeader::decode(&fixed, kind, "fuzz") {
            let again = header.encode();
            assert_eq!(FileHeader::decode(&again, kind, "fuzz").expect("its own"), header);
        }
    }
}

fn record(bytes: &[u8]) {
    if bytes.len() < RECORD_HEADER_LEN {
        assert!(RecordHeader::decode(bytes).is_err());
        return;
    }
    let frames = [RecordKind::Frame, RecordKind::Delta];
    let others = [RecordKind::Node, RecordKind::Blob, RecordKind::Manifest];
    let more = [RecordKind::Fingerprints, RecordKind::PackIndex];
    for kind in frames.into_iter().chain(others).chain(more) {
        if let Ok(record) = VerifiedRecord::check(bytes, &Hash::of(bytes), kind) {
            let is_delta = kind == RecordKind::Delta;
            if matches!(kind, RecordKind::Frame | RecordKind::Delta)
                && let Ok(frame) = Frame::decode(&record, is_delta)
            {
                assert!(frame.slots() > 0);
                assert!(!is_delta || frame.bases.len() == frame.slots());
            }
            if let Ok(raw) = record.decode() {
                assert_eq!(raw.len(), record.raw_len());
            }
        }
    }
}

fn node(bytes: &[u8]) {
    // A reader knows which level and first page to expect; here they are taken from the bytes.
    let mut decoder = Decoder::new(bytes);
    let (Ok(level), Ok(first)) = (decoder.u8("level"), decoder.varint("first page")) else {
        return;
    };
    let level = level % (MAX_LEVEL + 1);
    // Round down to where such a node can be.
    let first = first - first % span_pages(level);
    if first >= MAX_REGION_PAGES {
        return;
    }
    if let Ok(node) = Node::decode(bytes, level, first) {
        assert_eq!(Node::decode(&node.encode(), level, first).as_ref(), Ok(&node));
        assert!(node.runs.windows(2).all(|pair| pair[0].end() <= pair[1].first));
        assert!(node.runs.iter().all(|run| run.end() <= node.end()));
    }
}

fn delta(bytes: &[u8]) {
    if let Ok((bases, at)) = delta::decode(bytes) {
        let again = delta::encode(&bases, &bytes[at..]);
        let (same, at_again) = delta::decode(&again).expect("its own");
        assert_eq!((same, &again[at_again..]), (bases, &bytes[at..]));
    }
}

fn fingerprints(bytes: &[u8]) {
    if let Ok(frames) = elide::decode_fingerprints(bytes) {
        assert_eq!(elide::encode_fingerprints(&frames), bytes);
    }
}

fn pack_index(bytes: &[u8]) {
    if let Ok(index) = PackIndex::decode(bytes) {
        assert_eq!(PackIndex::decode(&index.encode()).as_ref(), Ok(&index));
        for (segment, entries) in &index.segments {
            assert!(
                entries.iter().all(|(offset, place)| index.find(*segment, *offset) == Some(*place))
            );
        }
    }
}

fn journal(bytes: &[u8]) {
    let header = FileHeader {
        kind: FileKind::Journal,
        version: crate::format::FORMAT_VERSION,
        number: 0,
        store: [0; 16],
        created_unix_ms: 0,
    };
    // The bytes as they are, and with their checks corrected.
    for fixed in [bytes.to_vec(), crate::journal::with_checks(bytes, &header)] {
        let mut cursor = Cursor::start(&header.encode());
        let mut catalog = crate::catalog::Catalog::new(cursor.clone());
        if let Ok(entries) = cursor.parse(&fixed) {
            entries.into_iter().for_each(|entry| catalog.take(entry));
            assert!(catalog.snapshots().iter().all(|info| catalog.find(info.id).is_some()));
        }
    }
}

fn manifest(bytes: &[u8]) {
    if let Ok(manifest) = serde_json::from_slice::<Manifest>(bytes) {
        let again = serde_json::to_vec(&manifest).expect("what was read can be written");
        let same = serde_json::from_slice::<Manifest>(&again).expect("and read");
        assert_eq!(same, manifest);
        assert!(manifest.regions.iter().all(|region| root_level(region.pages) <= MAX_LEVEL));
    }
}

fn reference(bytes: &[u8]) {
    let mut decoder = Decoder::new(bytes);
    let _any = decoder.block_ref("reference");
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let (_, name) = reference::split(text);
    let block = BlockRef { segment: 0, offset: 0, len: 0, hash: Hash([0; 32]) };
    let snapshots: Vec<SnapshotInfo> = (0..3_u8)
        .map(|index| SnapshotInfo {
            id: Hash([index / 2; 32]),
            parent: (index > 0).then(|| Hash([(index - 1) / 2; 32])),
            time_unix_ms: 0,
            manifest: block,
            fingerprints: None,
        })
        .collect();
    let tags = BTreeMap::from([("gold".to_owned(), Hash([0; 32]))]);
    let _any = reference::resolve(&snapshots, &tags, name, "fuzz");
    let _any = reference::check_tag(name);
    let _any = text.parse::<crate::retention::Policy>();
}
