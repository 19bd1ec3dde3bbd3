//! Sets of pages that many threads change at once, a word for each chunk of 64 pages.

use std::sync::atomic::{AtomicU64, Ordering};

/// Pages under one lock, and bits of one word: 256 KiB.
pub(super) const CHUNK_PAGES: u64 = u64::BITS as u64;

/// `count` words of zeros.
fn words(count: u64) -> Vec<AtomicU64> {
    std::iter::repeat_with(AtomicU64::default).take(count as usize).collect()
}

/// The word of pages `first .. first + count` of a chunk, counted from its start.
pub(super) fn mask(first: u64, count: u64) -> u64 {
    debug_assert!(count > 0 && first + count <= CHUNK_PAGES, "pages of one chunk");
    (u64::MAX >> (CHUNK_PAGES - count)) << first
}

/// The set bits of `word`, ascending.
pub(super) fn bits(word: u64) -> impl Iterator<Item = u64> {
    std::iter::successors(Some(word), |rest| Some(rest & rest.wrapping_sub(1)))
        .take_while(|rest| *rest != 0)
        .map(|rest| u64::from(rest.trailing_zeros()))
}

/// A set that is changed under the chunk's lock, which also orders its changes for those who read.
#[derive(Debug)]
pub(super) struct LockedPages(Vec<AtomicU64>);

impl LockedPages {
    pub(super) fn new(chunks: u64) -> Self {
        Self(words(chunks))
    }

    pub(super) fn word(&self, chunk: u64) -> u64 {
        self.0[chunk as usize].load(Ordering::Relaxed)
    }

    pub(super) fn insert(&self, chunk: u64, mask: u64) {
        self.0[chunk as usize].fetch_or(mask, Ordering::Relaxed);
    }
}

/// Pages written since somebody last looked. Looking costs what was written, not what there is:
/// a bit for each word says which of them are worth a look.
#[derive(Debug)]
pub(super) struct DirtyPages {
    words: Vec<AtomicU64>,
    summary: Vec<AtomicU64>,
}

impl DirtyPages {
    pub(super) fn new(chunks: u64) -> Self {
        Self { words: words(chunks), summary: words(chunks.div_ceil(CHUNK_PAGES)) }
    }

    pub(super) fn insert(&self, chunk: u64, mask: u64) {
        self.words[chunk as usize].fetch_or(mask, Ordering::AcqRel);
        // After the word: whoever takes the summary's bit before that leaves it set again, and who
        // takes it afterwards sees the word. At worst a word is looked at twice.
        let bit = 1 << (chunk % CHUNK_PAGES);
        self.summary[(chunk / CHUNK_PAGES) as usize].fetch_or(bit, Ordering::AcqRel);
    }

    /// Takes all pages out, handing each chunk's to `each`.
    pub(super) fn take(&self, mut each: impl FnMut(u64, u64)) {
        for (index, summary) in self.summary.iter().enumerate() {
            if summary.load(Ordering::Acquire) == 0 {
                continue;
            }
            for bit in bits(summary.swap(0, Ordering::AcqRel)) {
                let chunk = index as u64 * CHUNK_PAGES + bit;
                let word = self.words[chunk as usize].swap(0, Ordering::AcqRel);
                if word != 0 {
                    each(chunk, word);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_and_bits_agree() {
        for (first, count) in [(0, 1), (0, 64), (63, 1), (5, 7)] {
            let found: Vec<_> = bits(mask(first, count)).collect();
            assert_eq!(found, (first..first + count).collect::<Vec<_>>());
        }
        assert_eq!(bits(0).count(), 0);
    }

    #[test]
    fn no_page_is_lost_between_writers_and_who_looks() {
        const CHUNKS: u64 = 200;
        let pages = DirtyPages::new(CHUNKS);
        let mut found = vec![0; CHUNKS as usize];
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..2)
                .map(|writer| {
                    let pages = &pages;
                    scope.spawn(move || {
                        for step in 0..CHUNKS * CHUNK_PAGES {
                            let (chunk, page) = (step * 7 % CHUNKS, step / CHUNKS);
                            if page % 2 == writer {
                                pages.insert(chunk, mask(page, 1));
                            }
                        }
                    })
                })
                .collect();
            while !writers.iter().all(std::thread::ScopedJoinHandle::is_finished) {
                pages.take(|chunk, word| found[chunk as usize] |= word);
            }
        });
        pages.take(|chunk, word| found[chunk as usize] |= word);
        assert!(found.iter().all(|word| *word == u64::MAX), "every page was written once");
        pages.take(|_, _| panic!("all was taken"));
    }
}
