//! Copy-on-write by write-protection, without KVM: a memfd, and threads that write to it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use frazil_snapstore::cow::CopyOnWrite;
use frazil_snapstore::{Description, PAGE_SIZE, Page, PageSet, PageSource, Store, StoreOptions};
use frazil_tests::rng::Rng;
use frazil_tests::vm_harness::uffd_or_skip;
use frazil_vmm::memory::{GuestRam, RAM_REGION};
use vm_memory::{Bytes, GuestAddress};

const RAM_BYTES: u64 = 64 << 20;
const PAGES: u64 = RAM_BYTES / PAGE_SIZE as u64;

/// Writers hold the read side while they write, so they stand still while the write side is held.
type CutLock = RwLock<()>;

/// Writes to random pages (even seeds) or to one page after the other (odd seeds) until told to
/// stop.
fn write(ram: &GuestRam, cut: &CutLock, stop: &AtomicBool, writes: &AtomicU64, seed: u64) {
    let mut rng = Rng::new(seed);
    let mut next = 0;
    while !stop.load(Ordering::Relaxed) {
        let runs = cut.read().expect("nobody panicked");
        for _ in 0..16 {
            let page = if seed.is_multiple_of(2) { rng.below(PAGES) } else { next };
            next = (page + 1) % PAGES;
            let words: Vec<u8> = (0..16).map(|_| rng.bits() as u8).collect();
            let offset = rng.below(PAGE_SIZE as u64 - 16);
            ram.memory()
                .write_slice(&words, GuestAddress(page * PAGE_SIZE as u64 + offset))
                .expect("a page of RAM");
            writes.fetch_add(1, Ordering::Relaxed);
        }
        drop(runs);
    }
}

/// Makes RAM and the protection of its pages.
fn watched() -> (Arc<GuestRam>, CopyOnWrite) {
    let ram = Arc::new(GuestRam::new(RAM_BYTES).expect("RAM"));
    let memory = Arc::clone(&ram);
    let cow = CopyOnWrite::new(memory, &ram.mappings()).expect("userfaultfd protects memory");
    (ram, cow)
}

fn all_of(ram: &GuestRam) -> Vec<Page> {
    let mut copy = vec![[0; PAGE_SIZE]; PAGES as usize];
    for (page, out) in copy.iter_mut().enumerate() {
        ram.read_page(page as u64, out).expect("a page of RAM");
    }
    copy
}

/// In each generation pages are protected while writers run, and the writers stand still for the
/// cut. While they run again, the store gets memory exactly as it was at the cut.
#[test]
fn the_store_gets_memory_as_it_was_at_the_cut() {
    if !uffd_or_skip() {
        return;
    }
    let (ram, cow) = watched();
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open_or_create(&folder.path().join("store"), StoreOptions::default())
        .expect("a store");
    let (cut, stop, writes) = (CutLock::default(), AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let (ram, cut, stop, writes) = (&*ram, &cut, &stop, &writes);
        for seed in 0..3 {
            scope.spawn(move || self::write(ram, cut, stop, writes, seed));
        }
        let mut rng = Rng::new(7);
        let (mut parent, mut copied, mut waits) = (None, 0, 0);
        for generation in 0..6 {
            // In every other generation few copies may be made, and writers have to wait.
            let generous = generation % 2 == 0;
            let mut protected = cow.begin(if generous { usize::MAX } else { 50 });
            // Protects about half of what changed since the generation before; the rest is copied.
            let mut dirty = PageSet::new(PAGES);
            ram.harvest_vmm_writes(&mut dirty);
            if generation == 0 {
                dirty.insert_range(0, PAGES);
            }
            let mut others = PageSet::new(PAGES);
            for page in dirty.iter().filter(|_| rng.chance(4)) {
                others.insert(page);
            }
            dirty.subtract(&others);
            protected.protect(&dirty).expect("it is protected");

            let still = cut.write().expect("nobody panicked");
            ram.harvest_vmm_writes(&mut others);
            protected.cut(&mut others);
            let expected = all_of(ram);
            drop(still);

            // Lets writers change much of it before the store reads it, as far as they can.
            let until = writes.load(Ordering::Relaxed) + 2000;
            while generous && writes.load(Ordering::Relaxed) < until {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(5));
            let mut transaction = store.begin(parent).expect("a transaction");
            let region = transaction.region(RAM_REGION, PAGES).expect("a region");
            protected.write(&mut transaction, region).expect("it is written");
            copied += protected.copied();
            let waited = protected.waits();
            assert!(!generous || waited.count == 0, "nobody has to: {waited:?}");
            assert_eq!(waited.count > 0, !waited.longest.is_zero(), "{waited:?}");
            waits += waited.count;
            drop(protected);
            transaction.write_pages(region, &others, &expected).expect("it is written");
            let id = transaction.commit(Description::default()).expect("a snapshot").id;
            let snapshot = store.snapshot(id).expect("the snapshot");
            let reader = snapshot.region(RAM_REGION).expect("the region");
            let mut page = [0; PAGE_SIZE];
            for (number, expected) in expected.iter().enumerate() {
                reader.read_page(number as u64, &mut page).expect("a page");
                assert!(page == *expected, "generation {generation}: page {number}");
            }
            parent = Some(id);
        }
        stop.store(true, Ordering::Relaxed);
        assert!(copied > 1000, "writers met protection: {copied} pages");
        assert!(waits > 0, "where few copies are made they wait");
    });
}

/// Giving up a checkpoint, before the cut or after it, removes the protection: no writer hangs.
#[test]
fn giving_up_takes_the_protection_away() {
    if !uffd_or_skip() {
        return;
    }
    let (ram, cow) = watched();
    let mut all = PageSet::new(PAGES);
    all.insert_range(0, PAGES);
    for after_cut in [false, true] {
        let mut protected = cow.begin(usize::MAX);
        protected.protect(&all).expect("it is protected");
        ram.memory().write_slice(&[1; 8], GuestAddress(5 << 12)).expect("a late writer");
        if after_cut {
            let mut others = PageSet::new(PAGES);
            protected.cut(&mut others);
            assert_eq!(others.iter().collect::<Vec<_>>(), [5], "it may have been written to");
            assert_eq!(protected.pages().count(), PAGES - 1);
            ram.memory().write_slice(&[2; 8], GuestAddress(6 << 12)).expect("a copy is made");
        }
        drop(protected);
        for page in 0..PAGES {
            ram.memory().write_slice(&[3; 8], GuestAddress(page << 12)).expect("nobody hangs");
        }
    }
}
