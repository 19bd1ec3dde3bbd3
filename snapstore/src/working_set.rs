//! Working sets: the pages of a snapshot that were wanted first when it was resumed.
//!
//! Kept in a small file of its own, since it is only a hint: one that is lost, damaged or of
//! another snapshot costs a resume its head start and nothing else. See REAP (Ustiugov et al.,
//! ASPLOS 2021) for what such a record is worth.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::codec::{Decoded, Decoder, Malformed, put_varint};
use crate::error::{Result, StoreError};
use crate::id::{Hash, SnapshotId};
use crate::node::MAX_REGION_PAGES;
use crate::store::Store;

const MAGIC: &[u8; 8] = b"FRZLWSET";
const VERSION: u8 = 1;
/// The most ranges kept: 16 GiB, at a frame of 16 pages each.
const RANGES_MAX: usize = 1 << 18;
const PREFIX: &str = "working-set-";

/// Ranges of pages of a region, in the order in which they were wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    /// First page and number of pages of each range; some pages may be in two ranges.
    pub ranges: Vec<(u64, u64)>,
}

impl WorkingSet {
    /// Number of pages in the ranges.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.ranges.iter().map(|(_, count)| count).sum()
    }

    /// Appends pages that were wanted next.
    pub fn push(&mut self, first: u64, count: u64) {
        let full = self.ranges.len() >= RANGES_MAX;
        match self.ranges.last_mut() {
            Some((start, len)) if *start + *len == first => *len += count,
            // Pages wanted so late matter little.
            _ if full => {}
            _ => self.ranges.push((first, count)),
        }
    }

    /// Layout: magic, version (1 byte), the snapshot's id, length (varint) and name of the region,
    /// number of ranges (varint), per range its first page and its length (varints), and BLAKE3 of
    /// all that.
    fn encode(&self, id: SnapshotId, region: &str) -> Vec<u8> {
        let mut out = head(id, region);
        put_varint(&mut out, self.ranges.len() as u64);
        for (first, count) in &self.ranges {
            put_varint(&mut out, *first);
            put_varint(&mut out, *count);
        }
        let hash = Hash::of(&out);
        out.extend_from_slice(&hash.0);
        out
    }

    fn decode(bytes: &[u8], id: SnapshotId, region: &str) -> Decoded<Self> {
        let wrong = |what, found: &str| Malformed::new("working set", what, found.to_owned());
        let (body, hash) = bytes
            .split_last_chunk::<32>()
            .ok_or_else(|| wrong("a hash at the end", "a shorter file"))?;
        if Hash::of(body).0 != *hash {
            return Err(wrong("contents that match the hash", "other contents"));
        }
        let list = body
            .strip_prefix(&head(id, region)[..])
            .ok_or_else(|| wrong("version 1 for this snapshot", "another version or snapshot"))?;
        let mut decoder = Decoder::new(list);
        let count = decoder.varint("number of ranges")?;
        if count > (list.len() / 2).min(RANGES_MAX) as u64 {
            return Err(Malformed::new("number of ranges", "no more than the file holds", count));
        }
        let mut range = || {
            let (first, count) = (decoder.varint("first page")?, decoder.varint("pages")?);
            if first > MAX_REGION_PAGES || count > MAX_REGION_PAGES {
                let most = format!("at most {MAX_REGION_PAGES}");
                return Err(Malformed::new("range of pages", most, first.max(count)));
            }
            Ok((first, count))
        };
        let ranges = (0..count).map(|_| range()).collect::<Decoded<Vec<_>>>()?;
        decoder.finish("working set")?;
        Ok(Self { ranges })
    }
}

/// The beginning of a file of version 1.
fn head(id: SnapshotId, region: &str) -> Vec<u8> {
    let mut out = [&MAGIC[..], &[VERSION], &id.0].concat();
    put_varint(&mut out, region.len() as u64);
    out.extend_from_slice(region.as_bytes());
    out
}

fn file_name(id: SnapshotId) -> String {
    format!("{PREFIX}{id}")
}

impl Store {
    /// The working set recorded for region `region` of snapshot `id`, if there is an intact one.
    #[must_use]
    pub fn working_set(&self, id: SnapshotId, region: &str) -> Option<WorkingSet> {
        let file = self.storage.open(&file_name(id), false).ok()?;
        let len = usize::try_from(file.len_bytes().ok()?).ok().filter(|len| *len <= 8 << 20)?;
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, 0).ok()?;
        let decoded = WorkingSet::decode(&bytes, id, region);
        decoded.inspect_err(|error| tracing::warn!(?error, %id, "ignoring a working set")).ok()
    }

    /// Saves `set` as the working set of region `region` of snapshot `id`, replacing any earlier
    /// one: a snapshot has only one.
    ///
    /// # Errors
    /// The medium's; an earlier working set then remains.
    pub fn save_working_set(&self, id: SnapshotId, region: &str, set: &WorkingSet) -> Result<()> {
        static SAVED: AtomicU64 = AtomicU64::new(0);
        let number = SAVED.fetch_add(1, Ordering::Relaxed);
        let name = file_name(id);
        let new = format!("{name}.{}-{number}", std::process::id());
        let failed = |op| {
            let new = new.clone();
            move |error| StoreError::io(op, new, error)
        };
        // A crash may have left one.
        let _none = self.storage.remove(&new);
        let file = self.storage.create(&new).map_err(failed("create"))?;
        let written = file
            .write_all_at(&set.encode(id, region), 0)
            .and_then(|()| file.sync())
            .and_then(|()| self.storage.rename(&new, &name));
        if written.is_err() {
            let _left_behind = self.storage.remove(&new);
        }
        written.map_err(failed("write"))
    }

    /// Removes the working sets of snapshots that are not `kept`.
    pub(crate) fn remove_working_sets(&self, kept: impl Fn(&str) -> bool) {
        for name in self.storage.list("").unwrap_or_default() {
            if name.strip_prefix(PREFIX).is_some_and(|id| !kept(id)) {
                // If it stays, it does no harm, and the next prune tries again.
                let _stays = self.storage.remove(&name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(byte: u8) -> SnapshotId {
        Hash([byte; 32])
    }

    proptest! {
        #[test]
        fn working_sets_round_trip(ranges in proptest::collection::vec((0..=MAX_REGION_PAGES, 0..=MAX_REGION_PAGES), 0..50), at in any::<prop::sample::Index>(), bit in 0..8) {
            let set = WorkingSet { ranges };
            let bytes = set.encode(id(1), "ram");
            prop_assert_eq!(&WorkingSet::decode(&bytes, id(1), "ram").unwrap(), &set);
            prop_assert!(WorkingSet::decode(&bytes, id(2), "ram").is_err());
            prop_assert!(WorkingSet::decode(&bytes, id(1), "disk0").is_err());
            let mut damaged = bytes.clone();
            damaged[at.index(bytes.len())] ^= 1_u8 << bit;
            prop_assert!(WorkingSet::decode(&damaged, id(1), "ram").is_err());
            prop_assert!(WorkingSet::decode(&bytes[..at.index(bytes.len())], id(1), "ram").is_err());
        }
    }

    /// Whoever can write to the store can make a file whose hash is right.
    #[test]
    fn ranges_beyond_any_region_are_refused() {
        for range in [(u64::MAX, 1), (0, u64::MAX)] {
            let set = WorkingSet { ranges: vec![range, (1, 2)] };
            let error = WorkingSet::decode(&set.encode(id(1), "ram"), id(1), "ram").unwrap_err();
            assert_eq!(error.what, "range of pages");
        }
    }

    #[test]
    fn what_follows_is_joined() {
        let mut set = WorkingSet::default();
        for (first, count) in [(16, 16), (32, 16), (0, 16), (48, 1)] {
            set.push(first, count);
        }
        assert_eq!(set.ranges, [(16, 32), (0, 16), (48, 1)]);
        assert_eq!(set.pages(), 49);
    }
}
