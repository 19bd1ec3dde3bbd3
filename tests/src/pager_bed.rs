//! For tests of the pager: a snapshot, memory to load it into, and threads that use that memory.
//!
//! `unsafe` is allowed in the module `memory` only, which owns the raw pointers.
#![allow(missing_docs)]

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use frazil_snapstore::pager::{CHUNK_PAGES, Extent, Image, Mapping, OnFailure, Pager};
use frazil_snapstore::{PAGE_SIZE, RegionReader, Store, StoreOptions};

use crate::oracle::{CONTENTS, Edit, Model, content, take};
use crate::rng::Rng;
use crate::storage_sim::SimStorage;

pub use memory::Memory;

/// The guest's memory. `unsafe` is allowed here because memory that a pager fills while threads use
/// it can only be accessed through raw pointers, with volatile reads and writes.
mod memory {
    #![allow(unsafe_code)]

    use super::{CHUNK_PAGES, Extent, File, Image, Mapping, PAGE_SIZE};
    use frazil_snapstore::Page;
    use memmap2::{MmapOptions, MmapRaw};
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use rustix::mm::{Advice, madvise};

    pub struct Memory {
        pub file: File,
        pub mappings: Vec<Mapping>,
        maps: Vec<MmapRaw>,
    }

    impl Memory {
        /// Maps the extents of `image` privately: writes to the mappings do not reach the image.
        pub fn private(image: &Image) -> Self {
            Self::private_of(image.memory().try_clone().unwrap(), image.extents())
        }

        /// As `private`, for a memory file.
        pub fn private_of(file: File, extents: &[Extent]) -> Self {
            let mut memory = Self { file, mappings: Vec::new(), maps: Vec::new() };
            for extent in extents {
                let len_bytes = extent.pages as usize * PAGE_SIZE;
                let options = MmapOptions::new().offset(extent.file_offset).len(len_bytes).clone();
                // SAFETY: only the address and length of the mapping are used, for volatile
                // accesses as with the shared mappings; it lives as long as `self`.
                let mut map = unsafe { options.map_copy(&memory.file) }.unwrap();
                let address = map.as_mut_ptr() as usize;
                memory.mappings.push(Mapping {
                    address,
                    len_bytes,
                    file_offset: extent.file_offset,
                    first_page: extent.first_page,
                });
                memory.maps.push(map.into());
            }
            memory
        }

        /// Makes a memory file with one shared mapping per `(first page in the region, chunks)`,
        /// laid out one after the other in the file.
        pub fn new(ranges: &[(u64, u64)]) -> Self {
            let file = File::from(memfd_create("pager-test", MemfdFlags::CLOEXEC).unwrap());
            let len_of = |chunks: u64| (chunks * CHUNK_PAGES) as usize * PAGE_SIZE;
            let total: usize = ranges.iter().map(|(_, chunks)| len_of(*chunks)).sum();
            ftruncate(&file, total as u64).unwrap();
            let mut memory = Self { file, mappings: Vec::new(), maps: Vec::new() };
            let mut file_offset = 0;
            for (first_page, chunks) in ranges {
                let len_bytes = len_of(*chunks);
                let options = MmapOptions::new().offset(file_offset).len(len_bytes).clone();
                let map = options.map_raw(&memory.file).unwrap();
                let address = map.as_ptr() as usize;
                let first_page = *first_page;
                memory.mappings.push(Mapping { address, len_bytes, file_offset, first_page });
                memory.maps.push(map);
                file_offset += len_bytes as u64;
            }
            memory
        }

        /// Returns every page of the region that is mapped.
        pub fn pages(&self) -> Vec<u64> {
            let pages = |mapping: &Mapping| mapping.len_bytes as u64 / PAGE_SIZE as u64;
            self.mappings
                .iter()
                .flat_map(|map| map.first_page..map.first_page + pages(map))
                .collect()
        }

        fn word(&self, page: u64, index: usize) -> *mut u64 {
            let inside = |mapping: &&Mapping| {
                (mapping.first_page..mapping.first_page + (mapping.len_bytes / PAGE_SIZE) as u64)
                    .contains(&page)
            };
            let mapping = self.mappings.iter().find(inside).expect("a mapped page");
            assert!(index < PAGE_SIZE / 8);
            let offset = (page - mapping.first_page) as usize * PAGE_SIZE + index * 8;
            (mapping.address + offset) as *mut u64
        }

        pub fn read_word(&self, page: u64, index: usize) -> u64 {
            // SAFETY: `word` points into a mapping that lives as long as `self`; its memory is
            // shared with the kernel and other threads, hence volatile.
            unsafe { self.word(page, index).read_volatile() }
        }

        pub fn read_page(&self, page: u64) -> Page {
            let mut bytes = [0; PAGE_SIZE];
            for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
                word.copy_from_slice(&self.read_word(page, index).to_ne_bytes());
            }
            bytes
        }

        pub fn write_word(&self, page: u64, index: usize, value: u64) {
            // SAFETY: as above.
            unsafe { self.word(page, index).write_volatile(value) }
        }

        /// Drops the page's page-table entry, as reclaim or migration may do.
        pub fn unmap(&self, page: u64) {
            // SAFETY: the range is one page of a shared mapping, whose contents stay in the file.
            unsafe { madvise(self.word(page, 0).cast(), PAGE_SIZE, Advice::LinuxDontNeed) }
                .unwrap();
        }
    }
}

/// Fails the test if `run` does not return within `seconds`. `run` gets a thread of its own, which
/// is then left behind, since a thread that waits for a page cannot be ended.
pub fn within(seconds: u64, run: impl FnOnce() + Send + 'static) {
    let (done, wait) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        run();
        let _gone = done.send(());
    });
    match wait.recv_timeout(Duration::from_secs(seconds)) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("it hangs"),
        _ => thread.join().unwrap(),
    }
}

pub struct Fixture {
    pub storage: SimStorage,
    pub region: RegionReader,
    pub contents: Vec<u8>,
}

/// Makes a snapshot of one region. It has a parent, so that some frames are only partly in use.
pub fn fixture(contents: Vec<u8>) -> Fixture {
    let storage = SimStorage::default();
    let options = StoreOptions { workers: 2, ..StoreOptions::default() };
    let store = Store::open_or_create_storage(Arc::new(storage.clone()), options.clone()).unwrap();
    let mut model = Model { regions: [("ram".to_owned(), vec![0; contents.len()])].into() };
    let pages: Vec<(u64, u8)> =
        (0..).zip(contents.iter().copied()).filter(|(_, id)| *id != 0).collect();
    let old = pages.iter().map(|(page, id)| (*page, if page % 5 == 0 { 3 } else { *id })).collect();
    let parent =
        take(&store, None, &mut model, &Edit { rounds: vec![("ram".into(), old)], step: 1 });
    let changed = pages.into_iter().filter(|(page, _)| page % 5 == 0).collect();
    let edit = Edit { rounds: vec![("ram".into(), changed)], step: 2 };
    let id = take(&store, Some(parent.unwrap().id), &mut model, &edit).unwrap().id;
    assert_eq!(model.regions["ram"], contents);
    // Reopened to start with empty caches: writing reads pages back to compare them.
    let store = Store::open_storage(Arc::new(storage.clone()), options).unwrap();
    Fixture { storage, region: store.snapshot(id).unwrap().region("ram").unwrap(), contents }
}

/// Returns random contents: whole chunks of zeros, single zero pages, the rest data.
pub fn mixed(chunks: u64, seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let chunk = |rng: &mut Rng| {
        let empty = rng.chance(2);
        let mut page =
            || if empty || rng.chance(2) { 0 } else { rng.below(u64::from(CONTENTS)) as u8 };
        (0..CHUNK_PAGES).map(|_| page()).collect::<Vec<_>>()
    };
    (0..chunks).flat_map(|_| chunk(&mut rng)).collect()
}

pub fn no_failure() -> OnFailure {
    Box::new(|error| panic!("the pager failed: {error}"))
}

pub fn wait_until_complete(pager: &Pager) {
    let started = Instant::now();
    while !pager.stats().complete {
        assert!(pager.failure().is_none(), "{:?}", pager.failure());
        assert!(started.elapsed() < Duration::from_secs(30), "{:?}", pager.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn allocated_pages(memory: &Memory) -> u64 {
    memory.file.metadata().unwrap().blocks() * 512 / PAGE_SIZE as u64
}

pub const THREADS: u64 = 4;

/// Returns the word that thread `page % 8` writes to `page`. Pages with `page % 8 >= THREADS` are
/// never written.
pub fn written(page: u64) -> u64 {
    0xF5_0000_0000 | page
}

/// Visits all pages in random order, for ever changing interleavings: writes to the thread's own,
/// and checks those that no thread writes to.
pub fn use_memory(memory: &Memory, contents: &[u8], thread: u64, seed: u64) {
    let mut rng = Rng::new(seed * THREADS + thread);
    let mut pages = memory.pages();
    for index in (1..pages.len()).rev() {
        pages.swap(index, rng.below(index as u64 + 1) as usize);
    }
    for page in pages {
        if page % 8 == thread {
            // The write may itself be the first touch.
            memory.write_word(page, 3, written(page));
        } else if page % 8 >= THREADS {
            let expected = content(contents[page as usize]);
            assert!(&memory.read_page(page) == expected, "page {page} as first seen");
        }
    }
}

pub fn check_memory(memory: &Memory, contents: &[u8]) {
    for page in memory.pages() {
        let mut expected = *content(contents[page as usize]);
        if page % 8 < THREADS {
            expected[24..32].copy_from_slice(&written(page).to_ne_bytes());
        }
        assert!(memory.read_page(page) == expected, "page {page} in the end");
    }
}

pub fn run_threads(memory: &Memory, contents: &[u8], seed: u64) {
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || use_memory(memory, contents, thread, seed));
        }
    });
}
