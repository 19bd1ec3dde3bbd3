//! Packs: where `prune` puts the live records of segments it removes.
//!
//! A reference names the place where a record was first written, and is never rewritten. A pack's
//! index says where the record of a name is now. Frames that are only partly live are not copied
//! whole: their live pages are regrouped into new records, several frames to one, and the index
//! maps the slots.

use std::collections::HashMap;

use crate::codec::{Decoded, Decoder, Malformed, put_varint};
use crate::format::{FILE_HEADER_LEN, MAX_BLOB_LEN, MAX_FRAME_PAGES, RECORD_HEADER_LEN};
use crate::id::Hash;

/// Where the slots of a frame are in the record that now holds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotMap {
    /// In the same places as when the frame was first written.
    Identity,
    /// The slots in `live` are, ascending, the record's slots from `first` on; the others are gone.
    Packed {
        /// The record's slot that holds the first live one.
        first: u8,
        /// Bit n is set if slot n of the frame is live.
        live: u64,
    },
}

impl SlotMap {
    /// The slot of the record that holds slot `slot` of the frame; none if it is not live.
    pub fn get(&self, slot: u8) -> Option<u8> {
        match *self {
            Self::Identity => Some(slot),
            Self::Packed { first, live } => {
                let bit = 1_u64.checked_shl(u32::from(slot))?;
                (live & bit != 0).then(|| first + (live & (bit - 1)).count_ones() as u8)
            }
        }
    }
}

/// The slots whose bits are set, ascending.
pub(crate) fn slots_of(bits: u64) -> impl Iterator<Item = u8> {
    (0..64).filter(move |slot| bits >> slot & 1 == 1)
}

/// A record in a pack that several frames may share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PackedRecord {
    /// Offset of its header in the pack, in bytes.
    pub position: u32,
    /// Length with its header, in bytes.
    pub len: u32,
    /// BLAKE3 of the whole record (references have the hash of the original record).
    pub hash: Hash,
}

/// Where a pack has the record of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The same bytes are at this offset.
    Verbatim(u32),
    /// Some of its slots are in record `record` of the index's table.
    Regrouped { record: u32, slots: SlotMap },
}

/// The index of a pack.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PackIndex {
    /// The regrouped records.
    pub records: Vec<PackedRecord>,
    /// Entries (offset, place) per segment, sorted by offset.
    pub segments: HashMap<u32, Vec<(u32, Place)>>,
}

impl PackIndex {
    /// About how many bytes the index takes in memory.
    pub fn memory_bytes(&self) -> u64 {
        let entries: usize = self.segments.values().map(Vec::len).sum();
        let bytes = size_of_val(self.records.as_slice())
            + entries * size_of::<(u32, Place)>()
            + self.segments.len() * 64;
        bytes as u64
    }

    /// Where the record first written to `offset` of `segment` is.
    pub fn find(&self, segment: u32, offset: u32) -> Option<Place> {
        let entries = self.segments.get(&segment)?;
        let at = entries.binary_search_by_key(&offset, |(offset, _)| *offset).ok()?;
        Some(entries[at].1)
    }

    /// Layout: number of records (varint), per record position and length (4 bytes each) and hash;
    /// number of segments (varint), per segment, ascending, its number (4 bytes), how many entries
    /// (varint), and the entries by ascending offset: distance from the previous entry (varint),
    /// then 0 (varint) and the position (4 bytes), or 1 + the record's index (varint), the first
    /// slot (1 byte) and the live slots (8 bytes).
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_varint(&mut out, self.records.len() as u64);
        for PackedRecord { position, len, hash } in &self.records {
            out.extend_from_slice(&position.to_le_bytes());
            out.extend_from_slice(&len.to_le_bytes());
            out.extend_from_slice(&hash.0);
        }
        let mut numbers: Vec<u32> = self.segments.keys().copied().collect();
        numbers.sort_unstable();
        put_varint(&mut out, numbers.len() as u64);
        for number in numbers {
            let entries = &self.segments[&number];
            out.extend_from_slice(&number.to_le_bytes());
            put_varint(&mut out, entries.len() as u64);
            let mut before = 0;
            for (offset, place) in entries {
                put_varint(&mut out, u64::from(offset - before));
                before = *offset;
                encode_place(&mut out, place);
            }
        }
        out
    }

    pub fn decode(bytes: &[u8]) -> Decoded<Self> {
        let mut decoder = Decoder::new(bytes);
        let count = bounded(&mut decoder, "number of records", bytes.len() / 40)?;
        let mut records = Vec::with_capacity(count);
        for _ in 0..count {
            let record = PackedRecord {
                position: decoder.u32("position of a record")?,
                len: decoder.u32("length of a record")?,
                hash: decoder.hash("hash of a record")?,
            };
            let len = record.len as usize;
            if record.position < FILE_HEADER_LEN as u32
                || !(RECORD_HEADER_LEN..=RECORD_HEADER_LEN + MAX_BLOB_LEN).contains(&len)
            {
                return Err(Malformed::new("record of the index", "a place and length", len));
            }
            records.push(record);
        }
        let segment_count = bounded(&mut decoder, "number of segments", bytes.len() / 5)?;
        let mut segments = HashMap::with_capacity(segment_count);
        let mut last = None;
        for _ in 0..segment_count {
            let number = decoder.u32("segment")?;
            if last.is_some_and(|last| last >= number) {
                return Err(Malformed::new("segment", "ascending numbers", number));
            }
            last = Some(number);
            let entries = bounded(&mut decoder, "number of entries", bytes.len() / 6)?;
            segments.insert(number, decode_entries(&mut decoder, entries, &records)?);
        }
        decoder.finish("pack index")?;
        Ok(Self { records, segments })
    }
}

fn bounded(decoder: &mut Decoder<'_>, what: &'static str, most: usize) -> Decoded<usize> {
    let count = decoder.varint(what)?;
    match usize::try_from(count) {
        Ok(count) if count <= most => Ok(count),
        _ => Err(Malformed::new(what, format!("at most {most}"), count)),
    }
}

fn encode_place(out: &mut Vec<u8>, place: &Place) {
    match *place {
        Place::Verbatim(position) => {
            out.push(0);
            out.extend_from_slice(&position.to_le_bytes());
        }
        Place::Regrouped { record, slots } => {
            put_varint(out, 1 + u64::from(record));
            let (first, live) = match slots {
                SlotMap::Packed { first, live } => (first, live),
                SlotMap::Identity => (0, u64::MAX),
            };
            out.push(first);
            out.extend_from_slice(&live.to_le_bytes());
        }
    }
}

fn decode_entries(
    decoder: &mut Decoder<'_>,
    count: usize,
    records: &[PackedRecord],
) -> Decoded<Vec<(u32, Place)>> {
    let mut entries: Vec<(u32, Place)> = Vec::with_capacity(count);
    for _ in 0..count {
        let distance = decoder.varint("distance between entries")?;
        let before = entries.last().map_or(0, |(offset, _)| *offset);
        let offset = u32::try_from(distance).ok().and_then(|distance| before.checked_add(distance));
        let offset = offset
            .filter(|offset| entries.is_empty() || *offset > before)
            .ok_or_else(|| Malformed::new("offset of an entry", "ascending offsets", distance))?;
        let index = decoder.varint("record of an entry")?;
        if index == 0 {
            entries.push((offset, Place::Verbatim(decoder.u32("position of an entry")?)));
            continue;
        }
        let first = decoder.u8("first slot of an entry")?;
        let live = decoder.u64("live slots of an entry")?;
        let fits = live != 0 && usize::from(first) + live.count_ones() as usize <= MAX_FRAME_PAGES;
        if index > records.len() as u64 || !fits {
            let expected = format!("a record below {} and slots within it", records.len());
            let found = format!("record {}, slot {first}, {live:#x}", index - 1);
            return Err(Malformed::new("entry", expected, found));
        }
        let slots = SlotMap::Packed { first, live };
        entries.push((offset, Place::Regrouped { record: (index - 1) as u32, slots }));
    }
    Ok(entries)
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub fn index() -> impl Strategy<Value = PackIndex> {
        let record = (64_u32..1 << 20, 16_u32..1 << 20);
        let entry = (1_u32..5000, proptest::option::of((any::<u32>(), 0_u8..8, 1_u64..1 << 50)));
        let segment = proptest::collection::vec(entry, 0..9);
        let segments = proptest::collection::btree_map(0_u32..50, segment, 0..4);
        (proptest::collection::vec(record, 1..5), segments).prop_map(|(records, segments)| {
            let records: Vec<PackedRecord> = records
                .into_iter()
                .map(|(position, len)| PackedRecord {
                    position,
                    len,
                    hash: Hash::of(&len.to_le_bytes()),
                })
                .collect();
            let count = records.len() as u32;
            let place = |place| match place {
                None => Place::Verbatim(count),
                Some((record, first, live)) => {
                    let slots = SlotMap::Packed { first, live };
                    Place::Regrouped { record: record % count, slots }
                }
            };
            let segments = segments.into_iter().map(|(number, entries)| {
                let mut offset = 0;
                let entries = entries.into_iter().map(|(distance, regrouped)| {
                    offset += distance;
                    (offset, place(regrouped))
                });
                (number, entries.collect())
            });
            PackIndex { segments: segments.collect(), records }
        })
    }

    proptest! {
        #[test]
        fn indexes_round_trip_and_find(index in index()) {
            prop_assert_eq!(&PackIndex::decode(&index.encode()).unwrap(), &index);
            for (segment, entries) in &index.segments {
                for (offset, place) in entries {
                    prop_assert_eq!(index.find(*segment, *offset), Some(*place));
                }
                prop_assert_eq!(index.find(*segment, u32::MAX), None);
            }
        }

        #[test]
        fn damaged_indexes_parse_or_fail(index in index(), at in any::<prop::sample::Index>(), value in any::<u8>(), cut in any::<prop::sample::Index>()) {
            let mut bytes = index.encode();
            let position = at.index(bytes.len());
            bytes[position] = value;
            let _any = PackIndex::decode(&bytes);
            let _any = PackIndex::decode(&bytes[..cut.index(bytes.len())]);
        }

        #[test]
        fn slots_are_counted(first in 0_u8..8, live in any::<u64>()) {
            let mut next = first;
            for slot in 0..64 {
                let expected = (live >> slot & 1 == 1).then(|| { next += 1; next - 1 });
                prop_assert_eq!(SlotMap::Packed { first, live }.get(slot), expected);
            }
            prop_assert_eq!(SlotMap::Packed { first, live }.get(64), None);
        }
    }
}
