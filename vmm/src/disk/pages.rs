//! Sets of a disk's pages, one word for each chunk of 64 pages.

use std::sync::atomic::{AtomicU64, Ordering};

/// Pages in a chunk (256 KiB), which are under one lock and in one word of each set.
pub(super) const CHUNK_PAGES: u64 = u64::BITS as u64;

/// Returns the word with the bits `first .. first + count` set, counted from the chunk's start.
pub(super) fn mask(first: u64, count: u64) -> u64 {
    debug_assert!(count > 0 && first + count <= CHUNK_PAGES, "pages of one chunk");
    (u64::MAX >> (CHUNK_PAGES - count)) << first
}

/// A set that changes under the chunk's lock, which also orders the changes for readers.
#[derive(Debug)]
pub(super) struct LockedPages(Vec<AtomicU64>);

impl LockedPages {
    pub(super) fn new(chunks: u64) -> Self {
        Self(std::iter::repeat_with(AtomicU64::default).take(chunks as usize).collect())
    }

    pub(super) fn word(&self, chunk: u64) -> u64 {
        self.0[chunk as usize].load(Ordering::Relaxed)
    }

    pub(super) fn insert(&self, chunk: u64, mask: u64) {
        self.0[chunk as usize].fetch_or(mask, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dirty::bits;

    #[test]
    fn masks_and_bits_agree() {
        for (first, count) in [(0, 1), (0, 64), (63, 1), (5, 7)] {
            let found: Vec<_> = bits(mask(first, count)).collect();
            assert_eq!(found, (first..first + count).collect::<Vec<_>>());
        }
        assert_eq!(bits(0).count(), 0);
    }
}
