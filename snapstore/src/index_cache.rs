//! A cache of decoded pack indexes, in a bounded amount of memory.
//!
//! Nodes and frames have another kind of cache. An index can take many megabytes, and the one in
//! use must stay however large it is, or each look-up would decode it anew.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::id::Hash;
use crate::pack::PackIndex;

/// Indexes by the number of their pack; the least recently used are dropped first.
#[derive(Debug)]
pub(crate) struct IndexCache {
    most_bytes: u64,
    known: RwLock<HashMap<u32, Known>>,
    /// Number of look-ups and insertions so far.
    clock: AtomicU64,
}

#[derive(Debug)]
struct Known {
    /// Hash of the record that the index was decoded from.
    hash: Hash,
    index: Arc<PackIndex>,
    used_at: AtomicU64,
}

impl IndexCache {
    /// A cache of at most `most_bytes`, or of a single larger index.
    pub fn new(most_bytes: u64) -> Self {
        Self { most_bytes, known: RwLock::default(), clock: AtomicU64::new(0) }
    }

    /// The index of pack `number`, if it is cached and was decoded from a record with this hash.
    pub fn get(&self, number: u32, hash: &Hash) -> Option<Arc<PackIndex>> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let found = known.get(&number).filter(|known| known.hash == *hash)?;
        found.used_at.store(self.now(), Ordering::Relaxed);
        Some(Arc::clone(&found.index))
    }

    pub fn insert(&self, number: u32, hash: Hash, index: Arc<PackIndex>) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let used_at = AtomicU64::new(self.now());
        known.insert(number, Known { hash, index, used_at });
        let mut bytes: u64 = known.values().map(|known| known.index.memory_bytes()).sum();
        while bytes > self.most_bytes && known.len() > 1 {
            let oldest =
                known.iter().min_by_key(|(_, known)| known.used_at.load(Ordering::Relaxed));
            let Some(number) = oldest.map(|(number, _)| *number) else { break };
            bytes -= known.remove(&number).map_or(0, |known| known.index.memory_bytes());
        }
    }

    pub fn clear(&self) {
        self.known.write().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::Place;

    fn index(entries: u32) -> Arc<PackIndex> {
        let entries = (0..entries).map(|offset| (offset, Place::Verbatim(64))).collect();
        Arc::new(PackIndex { segments: HashMap::from([(1, entries)]), ..PackIndex::default() })
    }

    #[test]
    fn what_was_not_used_for_longest_makes_way() {
        let cache = IndexCache::new(index(100).memory_bytes() * 2);
        let hash = Hash([1; 32]);
        cache.insert(1, hash, index(100));
        cache.insert(2, hash, index(100));
        assert!(cache.get(1, &hash).is_some());
        cache.insert(3, hash, index(100));
        let there = [1, 2, 3].map(|number| cache.get(number, &hash).is_some());
        assert_eq!(there, [true, false, true]);
        assert!(cache.get(1, &Hash([2; 32])).is_none(), "another record's");
        cache.clear();
        assert!(cache.get(1, &hash).is_none());
    }

    #[test]
    fn one_that_is_larger_than_all_there_is_stays_while_it_is_used() {
        let cache = IndexCache::new(100);
        let hash = Hash([1; 32]);
        cache.insert(1, hash, index(100));
        cache.insert(2, hash, index(1000));
        assert!(cache.get(1, &hash).is_none());
        assert!(cache.get(2, &hash).is_some());
    }
}
