//! Page contents that cost about as much to make as to copy, and sets of pages to write.

use std::io;

use frazil_snapstore::{PAGE_SIZE, Page, PageSet, PageSource};
use frazil_vmm::workload::spec::Content;

use crate::content;

/// Pages to copy from: far more than a frame holds, so that none repeats within it.
const POOL_PAGES: usize = 4096;
/// How far a page's contents move in the pool from version to version; odd, so that they only
/// return to the same place after as many versions as the pool has pages.
const VERSION_STRIDE: u64 = 1009;
/// Words that make a page unique: at both ends and in between.
const MARKED_WORDS: [usize; 4] = [0, 171, 340, 511];
const PAGE_WORDS: u64 = (PAGE_SIZE / 8) as u64;

/// Turns similar numbers into unrelated ones (the finalizer of splitmix64).
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Eight letters from `a` to `p`, like the numbers in the built-in guest's text.
fn letters(random: u64) -> u64 {
    (random & 0x0f0f_0f0f_0f0f_0f0f) + 0x6161_6161_6161_6161
}

fn put_word(page: &mut Page, word: usize, value: u64) {
    page[word * 8..][..8].copy_from_slice(&value.to_le_bytes());
}

/// The contents that pages are copied from.
pub(super) struct Pool {
    bytes: Vec<u8>,
}

impl Pool {
    /// Text as the built-in guest writes it, which zstd compresses to about a third.
    pub(super) fn text() -> Self {
        Self { bytes: content::generate(Content::Text, POOL_PAGES) }
    }

    /// Pages with next to nothing on them, for large regions of which only the shape matters.
    pub(super) fn sparse() -> Self {
        Self { bytes: vec![0; PAGE_SIZE] }
    }

    /// All pages after their `version`-th change: each differs from all others, and from its
    /// earlier versions.
    pub(super) fn at(&self, version: u64) -> Pages<'_> {
        Pages { pool: self, version }
    }
}

/// A [`Pool`]'s pages at one version.
#[derive(Clone, Copy)]
pub(super) struct Pages<'a> {
    pool: &'a Pool,
    version: u64,
}

impl PageSource for Pages<'_> {
    fn read_page(&self, page: u64, buf: &mut Page) -> io::Result<()> {
        let pool_pages = (self.pool.bytes.len() / PAGE_SIZE) as u64;
        let place = page.wrapping_add(self.version.wrapping_mul(VERSION_STRIDE)) % pool_pages;
        buf.copy_from_slice(&self.pool.bytes[place as usize * PAGE_SIZE..][..PAGE_SIZE]);
        let mut mark = mix(mix(page) ^ self.version);
        for word in MARKED_WORDS {
            put_word(buf, word, letters(mark));
            mark = mix(mark);
        }
        Ok(())
    }
}

/// Pages in which each version changes 1 to 8 words in place, to arbitrary values.
#[derive(Clone, Copy)]
pub(super) struct Edited<'a> {
    pub base: Pages<'a>,
    /// The number of changes.
    pub edits: u64,
}

impl PageSource for Edited<'_> {
    fn read_page(&self, page: u64, buf: &mut Page) -> io::Result<()> {
        self.base.read_page(page, buf)?;
        for edit in 1..=self.edits {
            let mut random = mix(mix(page).wrapping_add(edit));
            for _ in 0..=random % 8 {
                random = mix(random);
                put_word(buf, (random % PAGE_WORDS) as usize, mix(!random));
            }
        }
        Ok(())
    }
}

/// Zero pages.
pub(super) struct Zeros;

impl PageSource for Zeros {
    fn read_page(&self, _page: u64, buf: &mut Page) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }
}

/// Every page of a region.
pub(super) fn all(pages: u64) -> PageSet {
    contiguous(pages, 0, pages)
}

/// `count` pages from `first` on.
pub(super) fn contiguous(pages: u64, first: u64, count: u64) -> PageSet {
    let mut set = PageSet::new(pages);
    set.insert_range(first, count);
    set
}

/// `count` random pages of `place(0 .. choices)`; other seeds give other pages.
pub(super) fn scattered(
    pages: u64,
    count: u64,
    seed: u64,
    choices: u64,
    place: impl Fn(u64) -> u64,
) -> PageSet {
    let mut set = PageSet::new(pages);
    let mut random = mix(seed);
    let mut left = count.min(choices);
    while left > 0 {
        random = mix(random);
        let page = place(random % choices);
        if !set.contains(page) {
            set.insert(page);
            left -= 1;
        }
    }
    set
}

/// `count` random pages of the region.
pub(super) fn scattered_anywhere(pages: u64, count: u64, seed: u64) -> PageSet {
    scattered(pages, count, seed, pages, |page| page)
}

/// The numbers of `count` random pages to read; some may repeat.
pub(super) fn random_pages(pages: u64, count: usize, seed: u64) -> Vec<u64> {
    let numbers = std::iter::successors(Some(mix(seed)), |random| Some(mix(*random)));
    numbers.take(count).map(|random| random % pages).collect()
}

/// The contents of the pages `numbers`, one after the other.
pub(super) fn contents(
    source: &dyn PageSource,
    numbers: impl Iterator<Item = u64>,
) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    numbers.into_iter().try_for_each(|page| append(source, page, &mut bytes))?;
    Ok(bytes)
}

/// Appends the contents of `page`.
pub(super) fn append(source: &dyn PageSource, page: u64, bytes: &mut Vec<u8>) -> io::Result<()> {
    let mut buf = [0; PAGE_SIZE];
    source.read_page(page, &mut buf)?;
    bytes.extend_from_slice(&buf);
    Ok(())
}
