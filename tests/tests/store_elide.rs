//! Elision: each way to avoid writing pages works as described, with its switch and its counter,
//! and no page that is left out is lost.

use std::collections::BTreeMap;
use std::sync::Arc;

use frazil_snapstore::{
    Elide, PAGE_SIZE, Page, PageSet, PageSource, SnapshotId, Store, StoreOptions, WriteStats,
};
use frazil_tests::oracle::{check_all, describe, small_options};
use frazil_tests::rng::Rng;
use frazil_tests::storage_sim::SimStorage;

const PAGES: u64 = 256;

/// All of a guest's memory.
struct Memory(Vec<Page>);

impl Memory {
    fn noise() -> Self {
        let mut rng = Rng::new(7);
        let mut page = || std::array::from_fn(|_| rng.bits() as u8);
        Self((0..PAGES).map(|_| page()).collect())
    }
}

impl PageSource for Memory {
    fn read_page(&self, page: u64, buf: &mut Page) -> std::io::Result<()> {
        self.0[..].read_page(page, buf)
    }
}

struct Bed {
    storage: SimStorage,
    store: Arc<Store>,
    head: Option<SnapshotId>,
    step: u64,
}

impl Bed {
    fn new(elide: Elide) -> Self {
        let storage = SimStorage::default();
        let options = StoreOptions { segment_max_bytes: 1 << 20, elide, ..small_options() };
        let store = Store::open_or_create_storage(Arc::new(storage.clone()), options).unwrap();
        Self { storage, store, head: None, step: 0 }
    }

    /// A handle as another process would have it, with nothing cached and no parent.
    fn fresh(&self, elide: Elide) -> Self {
        let options = StoreOptions { segment_max_bytes: 1 << 20, elide, ..small_options() };
        let store = Store::open_storage(Arc::new(self.storage.clone()), options).unwrap();
        Self { storage: self.storage.clone(), store, head: None, step: self.step + 100 }
    }

    fn write(&mut self, memory: &Memory, pages: impl Iterator<Item = u64>) -> WriteStats {
        let mut set = PageSet::new(PAGES);
        pages.for_each(|page| set.insert(page));
        let mut transaction = self.store.begin(self.head).unwrap();
        let region = transaction.region("ram", PAGES).unwrap();
        let stats = transaction.write_pages(region, &set, memory).unwrap();
        self.step += 1;
        self.head = Some(transaction.commit(describe(self.step)).unwrap().id);
        self.check(memory);
        stats
    }

    fn check(&self, memory: &Memory) {
        let region = self.store.snapshot(self.head.unwrap()).unwrap().region("ram").unwrap();
        let mut bytes = vec![0; PAGES as usize * PAGE_SIZE];
        region.read_pages(0, &mut bytes).unwrap();
        assert!(bytes == memory.0.concat(), "the snapshot is not what was written");
    }
}

const EQUAL: Elide = Elide { equal: true, ..Elide::NONE };
const DEDUP: Elide = Elide { dedup: true, ..Elide::NONE };
const DELTA: Elide = Elide { delta: true, ..Elide::NONE };
const ZERO: Elide = Elide { zero: true, ..Elide::NONE };

#[test]
fn with_every_switch_off_every_page_is_written() {
    let mut bed = Bed::new(Elide::NONE);
    let mut memory = Memory::noise();
    memory.0[9] = [0; PAGE_SIZE];
    memory.0[10] = memory.0[11];
    for _ in 0..2 {
        let stats = bed.write(&memory, 0..PAGES);
        assert!(stats.stored_bytes > (PAGES - 3) * PAGE_SIZE as u64);
        let WriteStats { pages, frames, stored_bytes, .. } = stats;
        assert_eq!(stats, WriteStats { pages, frames, stored_bytes, ..WriteStats::default() });
    }
}

#[test]
fn zero_pages_take_no_frame() {
    let mut bed = Bed::new(ZERO);
    let mut memory = Memory::noise();
    memory.0[..100].fill([0; PAGE_SIZE]);
    assert_eq!(bed.write(&memory, 0..PAGES).zero_pages, 100);
    memory.0[100..150].fill([0; PAGE_SIZE]);
    assert_eq!(bed.write(&memory, 0..PAGES).zero_pages, 150);
}

#[test]
fn pages_equal_to_the_parents_are_not_written() {
    for elide in [EQUAL, Elide { dedup: true, ..EQUAL }, Elide { delta: true, ..EQUAL }] {
        let mut bed = Bed::new(elide);
        let mut memory = Memory::noise();
        memory.0[0] = [0; PAGE_SIZE];
        bed.write(&memory, 0..PAGES);
        memory.0[3][5] ^= 1;
        memory.0[7] = memory.0[8];
        let stats = bed.write(&memory, 0..64);
        assert_eq!(stats.equal_pages, 62, "{stats:?}");
        assert_eq!(stats.dedup_pages, u64::from(elide.dedup), "{stats:?}");
        // Back to the contents of two snapshots ago, which only dedup or delta can find.
        memory.0[3][5] ^= 1;
        let stats = bed.write(&memory, 0..64);
        assert!(stats.equal_pages >= 62, "{stats:?}");
    }
}

#[test]
fn a_page_that_went_back_within_one_transaction_is_what_it_was() {
    let mut bed = Bed::new(Elide::default());
    let mut memory = Memory::noise();
    bed.write(&memory, 0..PAGES);
    let before = memory.0[5];
    let mut set = PageSet::new(PAGES);
    set.insert(5);
    let mut transaction = bed.store.begin(bed.head).unwrap();
    let region = transaction.region("ram", PAGES).unwrap();
    // A round of pre-copy sees the page changed, the cut sees it as it was.
    memory.0[5].fill(0x5A);
    assert_eq!(transaction.write_pages(region, &set, &memory).unwrap().equal_pages, 0);
    memory.0[5] = before;
    assert_eq!(transaction.write_pages(region, &set, &memory).unwrap().equal_pages, 1);
    bed.head = Some(transaction.commit(describe(50)).unwrap().id);
    bed.check(&memory);
}

#[test]
fn another_line_finds_the_pages_of_the_first() {
    let mut bed = Bed::new(DEDUP);
    let mut memory = Memory::noise();
    bed.write(&memory, 0..PAGES);
    let used = bed.storage.used_bytes();
    // The pages move in memory, and another process writes them.
    memory.0.rotate_left(3);
    memory.0[40].fill(0x77);
    let mut other = bed.fresh(DEDUP);
    let stats = other.write(&memory, 0..PAGES);
    assert_eq!(stats.dedup_pages, PAGES - 1);
    assert!(bed.storage.used_bytes() - used < 40_000, "{}", bed.storage.used_bytes() - used);
}

#[test]
fn small_edits_are_stored_as_differences_at_any_depth() {
    let mut bed = Bed::new(DELTA);
    let mut memory = Memory::noise();
    bed.write(&memory, 0..PAGES);
    for step in 0..60_usize {
        for page in 0..32 {
            memory.0[page * 8][(step * 24 + page) % PAGE_SIZE] ^= 0x41;
        }
        let stats = bed.write(&memory, (0..32).map(|page| page * 8));
        // The deltas grow until a page is written whole again.
        if step < 38 {
            assert_eq!(stats.delta_pages, 32, "step {step}: {stats:?}");
            assert!(stats.stored_bytes < 32 * PAGE_SIZE as u64 / 8, "step {step}: {stats:?}");
            assert_eq!(stats.stored_bytes, stats.delta_bytes);
        }
    }
}

#[test]
fn what_a_rolled_back_transaction_wrote_is_not_referred_to() {
    let mut bed = Bed::new(Elide::default());
    let memory = Memory::noise();
    let mut set = PageSet::new(PAGES);
    set.insert_range(0, PAGES);
    for _ in 0..2 {
        let mut transaction = bed.store.begin(None).unwrap();
        let region = transaction.region("ram", PAGES).unwrap();
        transaction.write_pages(region, &set, &memory).unwrap();
        drop(transaction);
    }
    // Something else is written where those pages were.
    let mut other = Memory::noise();
    other.0.reverse();
    other.0.iter_mut().for_each(|page| page[0] ^= 0xFF);
    bed.write(&other, 0..PAGES);
    bed.head = None;
    let stats = bed.write(&memory, 0..PAGES);
    assert_eq!(stats.dedup_pages, 0);
}

#[test]
fn nothing_comes_of_looking_at_pages_that_always_change() {
    let mut bed = Bed::new(DELTA);
    let mut memory = Memory::noise();
    bed.write(&memory, 0..PAGES);
    for round in 0..4_u8 {
        memory.0.iter_mut().flatten().for_each(|byte| *byte = byte.wrapping_mul(5) ^ round ^ 0x33);
        assert_eq!(bed.write(&memory, 0..PAGES).delta_pages, 0);
    }
    // When the guest turns to small edits, the store soon notices.
    let mut delta_pages = 0;
    for round in 0..40_usize {
        memory.0.iter_mut().for_each(|page| page[round] ^= 0x10);
        delta_pages = bed.write(&memory, 0..PAGES).delta_pages;
        if delta_pages == PAGES {
            break;
        }
    }
    assert_eq!(delta_pages, PAGES);
}

#[test]
fn damage_in_the_parent_is_not_carried_on() {
    let mut bed = Bed::new(Elide::default());
    let mut memory = Memory::noise();
    bed.write(&memory, 0..PAGES);
    let good = bed.storage.content("segments/00000001.seg").unwrap();
    let mut bad = good.clone();
    // In the first frame's payload.
    bad[200] ^= 1;
    bed.storage.put("segments/00000001.seg", Some(&bad));
    let mut fresh = bed.fresh(Elide::default());
    fresh.head = bed.head;
    memory.0[0][9] ^= 1;
    memory.0[200][9] ^= 1;
    let mut set = PageSet::new(PAGES);
    (0..4).chain([200]).for_each(|page| set.insert(page));
    let mut transaction = fresh.store.begin(fresh.head).unwrap();
    let region = transaction.region("ram", PAGES).unwrap();
    let stats = transaction.write_pages(region, &set, &memory).unwrap();
    assert_eq!((stats.delta_pages, stats.equal_pages, stats.dedup_pages), (1, 0, 0));
    fresh.head = Some(transaction.commit(describe(60)).unwrap().id);
    // The frame's four pages were written again, so the new snapshot is whole.
    fresh.check(&memory);
}

#[test]
fn models_and_elision_agree() {
    // The oracle's own check with everything on: contents that are near, equal and zero.
    let storage = SimStorage::default();
    let store = Store::open_or_create_storage(Arc::new(storage), small_options()).unwrap();
    let mut model = frazil_tests::oracle::Model {
        regions: BTreeMap::from([("ram".to_owned(), (0..36).cycle().take(200).collect())]),
    };
    let all: Vec<(u64, u8)> = (0..200).map(|page| (page, (page % 36) as u8)).collect();
    let near: Vec<(u64, u8)> = (0..200).map(|page| (page, 24 + (page % 12) as u8)).collect();
    let mut published = Vec::new();
    for (step, pages) in [all.clone(), near, all].into_iter().enumerate() {
        let parent = published.last().map(|(id, _)| *id);
        let edit =
            frazil_tests::oracle::Edit { rounds: vec![("ram".into(), pages)], step: step as u64 };
        let id = frazil_tests::oracle::take(&store, parent, &mut model, &edit).unwrap().id;
        published.push((id, model.clone()));
    }
    check_all(&store, &published);
}
