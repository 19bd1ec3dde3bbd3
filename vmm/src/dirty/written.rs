//! A set of written pages that many threads add to and one takes from.

use std::sync::atomic::{AtomicU64, Ordering};

use frazil_snapstore::PageSet;

/// The positions of the set bits of `word`, ascending.
pub(crate) fn bits(word: u64) -> impl Iterator<Item = u64> {
    std::iter::successors(Some(word), |rest| Some(rest & rest.wrapping_sub(1)))
        .take_while(|rest| *rest != 0)
        .map(|rest| u64::from(rest.trailing_zeros()))
}

/// Pages written since the last [`Self::take`], one bit each. A second level has a bit for each
/// word that may be non-zero, so taking costs what was written, not what there is. It allocates
/// nothing.
#[derive(Debug)]
pub(crate) struct WrittenPages {
    words: Vec<AtomicU64>,
    summary: Vec<AtomicU64>,
}

impl WrittenPages {
    /// An empty set with room for `words` words of 64 pages each.
    pub fn new(words: u64) -> Self {
        let zeros =
            |count: u64| std::iter::repeat_with(AtomicU64::default).take(count as usize).collect();
        Self { words: zeros(words), summary: zeros(words.div_ceil(64)) }
    }

    /// Adds `pages`, a bit for each page of word `word`. Words beyond the last are ignored.
    pub fn insert(&self, word: u64, pages: u64) {
        if let Some(own) = self.words.get(word as usize) {
            own.fetch_or(pages, Ordering::AcqRel);
            // After the word: a reader that clears the summary's bit before this finds it set again
            // next time, and one that clears it afterwards sees the word. At worst a word is looked
            // at twice.
            self.summary[(word / 64) as usize].fetch_or(1 << (word % 64), Ordering::AcqRel);
        }
    }

    /// True if page `page` is in the set.
    pub fn contains(&self, page: u64) -> bool {
        let word = self.words.get((page / 64) as usize);
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (page % 64) & 1 == 1)
    }

    /// Takes all pages out, passing each non-zero word's number and bits to `each`.
    pub fn take(&self, mut each: impl FnMut(u64, u64)) {
        for (index, summary) in self.summary.iter().enumerate() {
            if summary.load(Ordering::Acquire) == 0 {
                continue;
            }
            for bit in bits(summary.swap(0, Ordering::AcqRel)) {
                let word = index as u64 * 64 + bit;
                let pages = self.words[word as usize].swap(0, Ordering::AcqRel);
                if pages != 0 {
                    each(word, pages);
                }
            }
        }
    }

    /// Moves all pages into `dirty`, where page 0 of this set is page `first_page`.
    pub fn harvest(&self, first_page: u64, dirty: &mut PageSet) {
        self.take(|word, pages| dirty.insert_words(first_page + word * 64, &[pages]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_page_is_lost_between_writers_and_who_looks() {
        const WORDS: u64 = 200;
        let pages = WrittenPages::new(WORDS);
        let mut found = vec![0; WORDS as usize];
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..2)
                .map(|writer| {
                    let pages = &pages;
                    scope.spawn(move || {
                        for step in 0..WORDS * 64 {
                            let (index, page) = (step * 7 % WORDS, step / WORDS);
                            if page % 2 == writer {
                                pages.insert(index, 1 << page);
                            }
                        }
                    })
                })
                .collect();
            while !writers.iter().all(std::thread::ScopedJoinHandle::is_finished) {
                pages.take(|index, word| found[index as usize] |= word);
            }
        });
        pages.take(|index, word| found[index as usize] |= word);
        assert!(found.iter().all(|word| *word == u64::MAX), "every page was written once");
        pages.take(|_, _| panic!("all was taken"));
    }
}
