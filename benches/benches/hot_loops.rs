//! The loops that handle pages one by one: `cargo bench -p frazil-benches`.
//!
//! `frazil-bench` says how near the whole is to the limit; these benchmarks show which part of it a
//! change has made faster or slower.

#![allow(missing_docs)] // the macros take none

use std::hint::black_box;
use std::io;
use std::sync::Arc;

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use frazil_snapstore::{
    Description, DiffOptions, PAGE_SIZE, Page, PageSet, PageSource, Snapshot, Store, StoreOptions,
    diff, is_zero,
};
use tempfile::TempDir;

fn main() {
    divan::main();
}

/// Pages of a 4 GiB guest.
const GUEST_PAGES: u64 = 1 << 20;
/// Pages of the region stored here: 32 MiB.
const STORED_PAGES: u64 = 8192;
const REGION: &str = "ram";

/// Numbers that look random, and are the same in every run.
fn scattered(count: u64, below: u64) -> impl Iterator<Item = u64> {
    (0..count).map(move |index| index.wrapping_mul(0x9e37_79b9_7f4a_7c15) % below)
}

fn set(count: u64) -> PageSet {
    let mut set = PageSet::new(GUEST_PAGES);
    scattered(count, GUEST_PAGES).for_each(|page| set.insert(page));
    set
}

/// Sets of dirty pages, with few and with all of a guest's pages.
mod page_set {
    use super::{Bencher, GUEST_PAGES, ItemsCount, PageSet, black_box, set};

    const COUNTS: [u64; 3] = [1_000, 100_000, GUEST_PAGES];

    #[divan::bench(args = COUNTS)]
    fn union(bencher: Bencher<'_, '_>, count: u64) {
        let (other, mut into) = (set(count), PageSet::new(GUEST_PAGES));
        bencher.counter(ItemsCount::new(count)).bench_local(|| into.union(black_box(&other)));
    }

    #[divan::bench(args = COUNTS)]
    fn iterate(bencher: Bencher<'_, '_>, count: u64) {
        let set = set(count);
        bencher.counter(ItemsCount::new(count)).bench_local(|| set.iter().map(black_box).count());
    }

    #[divan::bench(args = COUNTS)]
    fn runs(bencher: Bencher<'_, '_>, count: u64) {
        let set = set(count);
        bencher.counter(ItemsCount::new(count)).bench_local(|| set.runs().map(black_box).count());
    }

    /// How a dirty log is read into a set.
    #[divan::bench]
    fn insert_words(bencher: Bencher<'_, '_>) {
        let words = vec![1 << 17; (GUEST_PAGES / 64) as usize];
        let mut into = PageSet::new(GUEST_PAGES);
        bencher
            .counter(ItemsCount::new(words.len()))
            .bench_local(|| into.insert_words(0, black_box(&words)));
    }
}

#[divan::bench]
fn zero_page(bencher: Bencher<'_, '_>) {
    let page = [0; PAGE_SIZE];
    bencher.counter(BytesCount::new(PAGE_SIZE)).bench_local(|| is_zero(black_box(&page)));
}

/// A kind of prose: lines of repeating words, and numbers that do not repeat.
struct Text {
    turn: u64,
}

impl PageSource for Text {
    fn read_page(&self, page: u64, buf: &mut Page) -> io::Result<()> {
        let seeds = scattered(64, u64::MAX).map(|seed| seed ^ page.wrapping_mul(31) ^ self.turn);
        for (line, seed) in buf.chunks_exact_mut(64).zip(seeds) {
            let text = format!("{page:08} request {:05} took {:>18} us, ", seed % 30_000, seed);
            line.fill(b' ');
            line[..text.len().min(64)].copy_from_slice(&text.as_bytes()[..text.len().min(64)]);
        }
        Ok(())
    }
}

/// A store, and snapshots of a region with scattered changes between them.
struct Bed {
    store: Arc<Store>,
    snapshots: Vec<Snapshot>,
    folder: TempDir,
}

impl Bed {
    fn new(snapshots: u64) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open_or_create(&folder.path().join("store"), StoreOptions::default());
        let mut bed = Self { store: store.expect("a store"), snapshots: Vec::new(), folder };
        let mut all = PageSet::new(STORED_PAGES);
        all.insert_range(0, STORED_PAGES);
        bed.commit(&all, 0);
        for turn in 1..snapshots {
            let mut some = PageSet::new(STORED_PAGES);
            scattered(100, STORED_PAGES).for_each(|page| some.insert((page + turn) % STORED_PAGES));
            bed.commit(&some, turn);
        }
        bed
    }

    /// The last snapshot, through a store handle that has not read or written anything yet.
    fn last(&self) -> Snapshot {
        let path = self.folder.path().join("store");
        let store = Store::open(&path, StoreOptions::default()).expect("the store");
        store.snapshot(self.snapshots.last().expect("one").id()).expect("it is there")
    }

    fn commit(&mut self, pages: &PageSet, turn: u64) {
        let parent = self.snapshots.last().map(Snapshot::id);
        let mut transaction = self.store.begin(parent).expect("a transaction");
        let region = transaction.region(REGION, STORED_PAGES).expect("a region");
        transaction.write_pages(region, pages, &Text { turn }).expect("it is written");
        let committed = transaction.commit(Description::default()).expect("it is committed");
        self.snapshots.push(self.store.snapshot(committed.id).expect("it is there"));
    }
}

/// Hashes, compares, compresses, appends and publishes 32 MiB.
#[divan::bench(sample_count = 10)]
fn write_a_first_snapshot(bencher: Bencher<'_, '_>) {
    bencher.counter(BytesCount::new(STORED_PAGES * PAGE_SIZE as u64)).bench_local(|| Bed::new(1));
}

/// Looks a page up, and verifies and decodes its frame.
#[divan::bench(args = [1, 200])]
fn read_a_page(bencher: Bencher<'_, '_>, depth: u64) {
    let bed = Bed::new(depth);
    let region = bed.last().region(REGION).expect("the region");
    let mut pages = scattered(u64::MAX, STORED_PAGES);
    let mut buf = [0; PAGE_SIZE];
    bencher.counter(ItemsCount::new(1_u64)).bench_local(|| {
        let page = pages.next().expect("endless");
        region.read_page(page, &mut buf).expect("a page");
        black_box(&buf);
    });
}

/// Reads page after page, as a sweep does.
#[divan::bench(sample_count = 10)]
fn read_all_pages(bencher: Bencher<'_, '_>) {
    let bed = Bed::new(1);
    let region = bed.last().region(REGION).expect("the region");
    let mut buf = vec![0; 64 * PAGE_SIZE];
    bencher.counter(BytesCount::new(STORED_PAGES * PAGE_SIZE as u64)).bench_local(|| {
        for first in (0..STORED_PAGES).step_by(64) {
            region.read_pages(first, &mut buf).expect("pages");
            black_box(&buf);
        }
    });
}

/// Compares two trees that differ only in what a hundred pages depend on.
#[divan::bench]
fn compare_snapshots(bencher: Bencher<'_, '_>) {
    let bed = Bed::new(2);
    let options = DiffOptions::default();
    bencher.bench_local(|| diff(&bed.snapshots[0], &bed.snapshots[1], options).expect("a diff"));
}
