//! What the VMM itself writes to guest memory, which KVM does not see.

use std::sync::atomic::{AtomicU64, Ordering};

use frazil_snapstore::{PAGE_SIZE, PageSet};
use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};

/// A bit for each page of a range of RAM, and one for each word of those that may not be zero: a
/// harvest looks at one bit for every 4096 pages, and allocates nothing.
#[derive(Debug)]
pub struct VmmWrites {
    words: Vec<AtomicU64>,
    /// Bit `n` of word `m` is set after word `64 m + n` of `words` got a bit.
    occupied: Vec<AtomicU64>,
}

impl VmmWrites {
    /// Nothing written, to `len` bytes.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let atomics = |count| std::iter::repeat_with(AtomicU64::default).take(count).collect();
        let words = len.div_ceil(64 * PAGE_SIZE);
        Self { words: atomics(words), occupied: atomics(words.div_ceil(64)) }
    }

    /// Moves the pages written into `dirty`, of which this range's first page is `first_page`.
    pub fn harvest(&self, first_page: u64, dirty: &mut PageSet) {
        for (index, occupied) in self.occupied.iter().enumerate() {
            // Taken before the words: a writer sets them in the other order, so that a bit missed
            // here is announced anew.
            let mut announced = match occupied.load(Ordering::Relaxed) {
                0 => 0,
                _ => occupied.swap(0, Ordering::Acquire),
            };
            while announced != 0 {
                let word = index * 64 + announced.trailing_zeros() as usize;
                let bits = self.words[word].swap(0, Ordering::Acquire);
                dirty.insert_words(first_page + word as u64 * 64, &[bits]);
                announced &= announced - 1;
            }
        }
    }

    fn mark(&self, page: usize) {
        // What is beyond the range was not written either.
        if let Some(word) = self.words.get(page / 64) {
            word.fetch_or(1 << (page % 64), Ordering::Release);
            self.occupied[page / 4096].fetch_or(1 << (page / 64 % 64), Ordering::Release);
        }
    }
}

impl<'a> WithBitmapSlice<'a> for VmmWrites {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for VmmWrites {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len > 0 {
            let last = offset.saturating_add(len - 1);
            (offset / PAGE_SIZE..=last / PAGE_SIZE).for_each(|page| self.mark(page));
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE_SIZE;
        self.words
            .get(page / 64)
            .is_some_and(|word| word.load(Ordering::Acquire) >> (page % 64) & 1 == 1)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}
