//! Pages, sets of pages, and where page contents come from.

use std::io;

use bitvec::prelude::{BitVec, Lsb0};

/// Bytes in a page. Regions are made of whole pages.
pub const PAGE_SIZE: usize = 4096;

/// The contents of one page.
pub type Page = [u8; PAGE_SIZE];

/// Where the pages of a region are read from when they are written to the store.
///
/// The store calls it from several threads at once.
pub trait PageSource: Sync {
    /// Copies page number `page` of the region into `buf`.
    ///
    /// # Errors
    /// Any failure ends the transaction that asked.
    fn read_page(&self, page: u64, buf: &mut Page) -> io::Result<()>;
}

impl PageSource for [Page] {
    fn read_page(&self, page: u64, buf: &mut Page) -> io::Result<()> {
        let index = usize::try_from(page).map_err(io::Error::other)?;
        let source = self.get(index).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("page {page} of a source of {} pages", self.len()),
            )
        })?;
        buf.copy_from_slice(source);
        Ok(())
    }
}

/// True if every byte is zero.
#[must_use]
pub fn is_zero(page: &[u8]) -> bool {
    // Eight words at a time keeps the early exit and still vectorises.
    page.chunks(64).all(|chunk| chunk.iter().fold(0_u8, |acc, byte| acc | byte) == 0)
}

/// A set of pages of one region: a dirty set, a residency set, the pages to write.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    bits: BitVec<u64, Lsb0>,
}

impl PageSet {
    /// An empty set over `pages` pages.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        let len = usize::try_from(pages).expect("a region fits the address space");
        Self { bits: BitVec::repeat(false, len) }
    }

    /// Number of pages the set ranges over (not the number in it).
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.bits.len() as u64
    }

    /// Number of pages in the set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words().iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// True if no page is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words().iter().all(|&word| word == 0)
    }

    /// The last page in the set.
    #[must_use]
    pub fn last(&self) -> Option<u64> {
        self.bits.last_one().map(|index| index as u64)
    }

    /// True if `page` is in the set; pages beyond its capacity are not.
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        usize::try_from(page).ok().and_then(|index| self.bits.get(index).map(|bit| *bit))
            == Some(true)
    }

    /// Adds `page`.
    ///
    /// # Panics
    /// If `page` is beyond the capacity.
    pub fn insert(&mut self, page: u64) {
        let index = usize::try_from(page).expect("a page number fits the address space");
        self.bits.set(index, true);
    }

    /// Adds the pages `first .. first + count`.
    ///
    /// # Panics
    /// If a page is beyond the capacity.
    pub fn insert_range(&mut self, first: u64, count: u64) {
        let start = usize::try_from(first).expect("a page number fits the address space");
        let end = usize::try_from(first + count).expect("a page number fits the address space");
        self.bits[start..end].fill(true);
    }

    /// Adds the pages whose bits are set in `words`; bit 0 of `words[0]` is page `first`, which
    /// must be a multiple of 64 (memory slots are). Bits beyond the capacity are ignored.
    pub fn insert_words(&mut self, first: u64, words: &[u64]) {
        debug_assert_eq!(first % 64, 0, "dirty logs start at a multiple of 64 pages");
        let start = usize::try_from(first / 64).unwrap_or(usize::MAX).min(self.words().len());
        for (own, other) in self.bits.as_raw_mut_slice()[start..].iter_mut().zip(words) {
            *own |= other;
        }
        self.keep_to_capacity();
    }

    fn keep_to_capacity(&mut self) {
        let tail = self.bits.len() % 64;
        if tail != 0
            && let Some(last) = self.bits.as_raw_mut_slice().last_mut()
        {
            *last &= (1 << tail) - 1;
        }
    }

    /// Adds every page of `other` that is not beyond this set's capacity.
    pub fn union(&mut self, other: &Self) {
        for (own, word) in self.bits.as_raw_mut_slice().iter_mut().zip(other.words()) {
            *own |= word;
        }
        self.keep_to_capacity();
    }

    /// Takes every page of `other` out.
    pub fn subtract(&mut self, other: &Self) {
        for (own, word) in self.bits.as_raw_mut_slice().iter_mut().zip(other.words()) {
            *own &= !word;
        }
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.bits.as_raw_mut_slice().fill(0);
    }

    /// The pages in the set, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.words().iter().enumerate().flat_map(|(index, &word)| {
            let base = index as u64 * 64;
            std::iter::successors((word != 0).then_some(word), |&rest| {
                let next = rest & (rest - 1);
                (next != 0).then_some(next)
            })
            .map(move |rest| base + u64::from(rest.trailing_zeros()))
        })
    }

    fn words(&self) -> &[u64] {
        self.bits.as_raw_slice()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_set_of_numbers(
            capacity in 1_u64..400,
            pages in proptest::collection::vec(0_u64..400, 0..60),
            words in proptest::collection::vec(any::<u64>(), 0..4),
            first_word in 0_u64..4,
        ) {
            let mut set = PageSet::new(capacity);
            let mut oracle = BTreeSet::new();
            for page in pages.into_iter().filter(|page| *page < capacity) {
                set.insert(page);
                oracle.insert(page);
            }
            set.insert_words(first_word * 64, &words);
            for (index, word) in words.iter().enumerate() {
                for bit in (0..64).filter(|bit| word >> bit & 1 == 1) {
                    let page = (first_word + index as u64) * 64 + bit;
                    if page < capacity {
                        oracle.insert(page);
                    }
                }
            }
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), oracle.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.count(), oracle.len() as u64);
            prop_assert_eq!(set.is_empty(), oracle.is_empty());
            for page in 0..capacity + 3 {
                prop_assert_eq!(set.contains(page), oracle.contains(&page));
            }
        }
    }

    #[test]
    fn zero_is_told_from_nearly_zero() {
        let mut page = [0_u8; PAGE_SIZE];
        assert!(is_zero(&page));
        for position in [0, 63, 64, 2048, PAGE_SIZE - 1] {
            page[position] = 1;
            assert!(!is_zero(&page), "byte {position}");
            page[position] = 0;
        }
    }
}
