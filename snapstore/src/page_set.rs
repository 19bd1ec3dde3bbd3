//! Sets of pages.
//!
//! Dirty sets are small and regions are large, so a set has two levels: a bit for each page, and a
//! bit for each 64-bit word of these that is not zero. Counting, listing, joining and emptying a
//! set take time in proportion to its contents, plus a scan of one bit for every 64 pages of the
//! region: 8 KiB of bits for 16 GiB.

use bitvec::prelude::{BitVec, Lsb0};

/// A set of pages of one region: a dirty set, a residency set, the pages to write.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    bits: BitVec<u64, Lsb0>,
    /// Bit `n` is set if word `n` of `bits` is not zero, and only then.
    occupied: BitVec<u64, Lsb0>,
}

impl PageSet {
    /// An empty set over `pages` pages.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        let len = usize::try_from(pages).expect("a region fits the address space");
        // Allocated zeroed: takes no memory until it is used, and a machine has a dozen of these.
        let zeros = |len: usize| {
            let mut bits = BitVec::from_vec(vec![0; len.div_ceil(64)]);
            bits.truncate(len);
            bits
        };
        Self { bits: zeros(len), occupied: zeros(len.div_ceil(64)) }
    }

    /// Number of pages the set ranges over (not the number in it).
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.bits.len() as u64
    }

    /// Number of pages in the set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.occupied_words().map(|(_, word)| u64::from(word.count_ones())).sum()
    }

    /// True if no page is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.occupied.not_any()
    }

    /// The last page in the set.
    #[must_use]
    pub fn last(&self) -> Option<u64> {
        let index = self.occupied.last_one()?;
        let word = self.words()[index];
        Some(index as u64 * 64 + 63 - u64::from(word.leading_zeros()))
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
        self.occupied.set(index / 64, true);
    }

    /// Removes `page`, if the set contains it.
    pub fn remove(&mut self, page: u64) {
        if self.contains(page) {
            let index = page as usize;
            self.bits.set(index, false);
            let left = self.words()[index / 64] != 0;
            self.occupied.set(index / 64, left);
        }
    }

    /// Adds the pages `first .. first + count`.
    ///
    /// # Panics
    /// If a page is beyond the capacity.
    pub fn insert_range(&mut self, first: u64, count: u64) {
        if count == 0 {
            return;
        }
        let start = usize::try_from(first).expect("a page number fits the address space");
        let end = usize::try_from(first + count).expect("a page number fits the address space");
        self.bits[start..end].fill(true);
        self.occupied[start / 64..end.div_ceil(64)].fill(true);
    }

    /// Adds the pages whose bits are set in `words`; bit 0 of `words[0]` is page `first`, which
    /// must be a multiple of 64 (memory slots are). Bits beyond the capacity are ignored.
    pub fn insert_words(&mut self, first: u64, words: &[u64]) {
        debug_assert_eq!(first % 64, 0, "dirty logs start at a multiple of 64 pages");
        let start = usize::try_from(first / 64).unwrap_or(usize::MAX);
        for (offset, &word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
            match start.checked_add(offset) {
                Some(index) if index < self.words().len() => self.insert_word(index, word),
                _ => return,
            }
        }
    }

    fn insert_word(&mut self, index: usize, word: u64) {
        let word = word & self.mask(index);
        if word != 0 {
            self.bits.as_raw_mut_slice()[index] |= word;
            self.occupied.set(index, true);
        }
    }

    /// The bits of word `index` that stand for pages of the region.
    fn mask(&self, index: usize) -> u64 {
        match self.bits.len() - index * 64 {
            pages @ 0..64 => (1 << pages) - 1,
            _ => u64::MAX,
        }
    }

    /// Adds every page of `other` that is within this set's capacity.
    pub fn union(&mut self, other: &Self) {
        let len = self.words().len();
        for (index, word) in other.occupied_words().take_while(|(index, _)| *index < len) {
            self.insert_word(index, word);
        }
    }

    /// Removes every page of `other`.
    pub fn subtract(&mut self, other: &Self) {
        let len = self.words().len();
        for (index, word) in other.occupied_words().take_while(|(index, _)| *index < len) {
            let own = &mut self.bits.as_raw_mut_slice()[index];
            *own &= !word;
            let left = *own != 0;
            self.occupied.set(index, left);
        }
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        let words = self.bits.as_raw_mut_slice();
        for index in self.occupied.iter_ones() {
            words[index] = 0;
        }
        self.occupied.fill(false);
    }

    /// The pages in the set, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.occupied_words().flat_map(|(index, word)| {
            let base = index as u64 * 64;
            std::iter::successors(Some(word), |&rest| {
                let next = rest & (rest - 1);
                (next != 0).then_some(next)
            })
            .map(move |rest| base + u64::from(rest.trailing_zeros()))
        })
    }

    /// The runs of adjacent pages in the set, ascending: first page and number of pages.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut pages = self.iter().peekable();
        std::iter::from_fn(move || {
            let first = pages.next()?;
            let mut count = 1;
            while pages.next_if_eq(&(first + count)).is_some() {
                count += 1;
            }
            Some((first, count))
        })
    }

    fn occupied_words(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        let words = self.words();
        self.occupied.iter_ones().map(move |index| (index, words[index]))
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

    #[derive(Clone, Debug)]
    enum Op {
        Insert(u64),
        Remove(u64),
        Range(u64, u64),
        Words(u64, Vec<u64>),
        Union(Vec<u64>),
        Subtract(Vec<u64>),
        Clear,
    }

    fn op() -> impl Strategy<Value = Op> {
        let pages = || proptest::collection::vec(0_u64..9000, 0..40);
        let word = prop_oneof![2 => Just(0), 1 => Just(1 << 63), 2 => any::<u64>()];
        prop_oneof![
            4 => (0_u64..9000).prop_map(Op::Insert),
            4 => (0_u64..9000).prop_map(Op::Remove),
            1 => (0_u64..9000, 0_u64..300).prop_map(|(first, count)| Op::Range(first, count)),
            2 => (0_u64..140, proptest::collection::vec(word, 0..4))
                .prop_map(|(index, words)| Op::Words(index * 64, words)),
            1 => pages().prop_map(Op::Union),
            1 => pages().prop_map(Op::Subtract),
            1 => Just(Op::Clear),
        ]
    }

    /// Does the same to both; the other set of a union or subtraction is larger than either.
    fn apply(op: Op, set: &mut PageSet, oracle: &mut BTreeSet<u64>) {
        let capacity = set.capacity();
        let other = |pages: &[u64]| {
            let mut other = PageSet::new(9000);
            pages.iter().for_each(|page| other.insert(*page));
            other
        };
        match op {
            Op::Insert(page) if page < capacity => {
                set.insert(page);
                oracle.insert(page);
            }
            Op::Insert(_) => {}
            Op::Remove(page) => {
                set.remove(page);
                oracle.remove(&page);
            }
            Op::Range(first, count) => {
                let (first, end) = (first.min(capacity), (first + count).min(capacity));
                set.insert_range(first, end - first);
                oracle.extend(first..end);
            }
            Op::Words(first, words) => {
                set.insert_words(first, &words);
                let bits = words.iter().enumerate().flat_map(|(index, word)| {
                    (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| (index, bit))
                });
                let pages = bits.map(|(index, bit)| first + index as u64 * 64 + bit);
                oracle.extend(pages.filter(|page| *page < capacity));
            }
            Op::Union(pages) => {
                set.union(&other(&pages));
                oracle.extend(pages.into_iter().filter(|page| *page < capacity));
            }
            Op::Subtract(pages) => {
                set.subtract(&other(&pages));
                pages.iter().for_each(|page| _ = oracle.remove(page));
            }
            Op::Clear => {
                set.clear();
                oracle.clear();
            }
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_set_of_numbers(
            capacity in prop_oneof![0_u64..200, 4000_u64..9000],
            ops in proptest::collection::vec(op(), 0..40),
        ) {
            let mut set = PageSet::new(capacity);
            let mut oracle = BTreeSet::new();
            for op in ops {
                apply(op, &mut set, &mut oracle);
                prop_assert!(set.iter().eq(oracle.iter().copied()));
                prop_assert_eq!(set.count(), oracle.len() as u64);
                prop_assert_eq!(set.is_empty(), oracle.is_empty());
                prop_assert_eq!(set.last(), oracle.last().copied());
                let flat = set.runs().flat_map(|(first, count)| first..first + count);
                prop_assert!(flat.eq(oracle.iter().copied()));
                let mut runs = set.runs().zip(set.runs().skip(1));
                prop_assert!(runs.all(|((first, count), (next, _))| first + count < next));
                let mut fresh = PageSet::new(capacity);
                oracle.iter().for_each(|page| fresh.insert(*page));
                prop_assert_eq!(&set, &fresh, "equal sets compare equal");
            }
            for page in 0..capacity + 70 {
                prop_assert_eq!(set.contains(page), oracle.contains(&page));
            }
        }
    }
}
