//! The pager with a memfd and plain threads: no virtual machine is needed to be wrong.
//!
//! `unsafe` is allowed in the module `memory` only, which owns the raw pointers.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use frazil_snapstore::pager::{
    self, CHUNK_PAGES, Extent, Image, Mapping, OnFailure, Pager, PagerOptions, Replay, Seat,
};
use frazil_snapstore::{
    PAGE_SIZE, PruneOptions, PruneProgress, RegionReader, Store, StoreOptions, segment_name,
};
use frazil_tests::oracle::{CONTENTS, Edit, Model, content, take};
use frazil_tests::rng::Rng;
use frazil_tests::storage_sim::SimStorage;
use frazil_tests::vm_harness::uffd_or_skip;

use memory::Memory;

/// The guest's memory. `unsafe` is allowed here because shared memory that a pager fills while
/// threads use it can only be touched through raw pointers, volatile.
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
        /// Private mappings of what `image` has: what is written to them is a copy.
        pub fn private(image: &Image) -> Self {
            Self::private_of(image.memory().try_clone().unwrap(), image.extents())
        }

        /// The same of a memory file.
        pub fn private_of(file: File, extents: &[Extent]) -> Self {
            let mut memory = Self { file, mappings: Vec::new(), maps: Vec::new() };
            for extent in extents {
                let len_bytes = extent.pages as usize * PAGE_SIZE;
                let options = MmapOptions::new().offset(extent.file_offset).len(len_bytes).clone();
                // SAFETY: of the mapping only the address and length are used, for volatile accesses
                // like those of the shared ones; it is kept as long as `self`.
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

        /// A memory file, and a mapping per `(first page in the region, chunks)`, one behind the
        /// other in the file.
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

        /// Every page of the region that is mapped.
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

        /// Drops the page's page-table entry, as reclaim or migration may.
        pub fn unmap(&self, page: u64) {
            // SAFETY: the range is one page of a shared mapping: its contents stay in the file.
            unsafe { madvise(self.word(page, 0).cast(), PAGE_SIZE, Advice::LinuxDontNeed) }
                .unwrap();
        }
    }
}

/// Fails the test if `run` does not come back: a thread that waits for a page cannot be ended.
fn within(seconds: u64, run: impl FnOnce() + Send + 'static) {
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

struct Fixture {
    storage: SimStorage,
    region: RegionReader,
    contents: Vec<u8>,
}

/// A snapshot of one region. It has two generations, so that frames are only partly in use.
fn fixture(contents: Vec<u8>) -> Fixture {
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
    // Another handle, which has nothing cached: writing reads pages back to compare them.
    let store = Store::open_storage(Arc::new(storage.clone()), options).unwrap();
    Fixture { storage, region: store.snapshot(id).unwrap().region("ram").unwrap(), contents }
}

/// Random contents: whole chunks of zeros, single zero pages, the rest data.
fn mixed(chunks: u64, seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let chunk = |rng: &mut Rng| {
        let empty = rng.chance(2);
        let mut page =
            || if empty || rng.chance(2) { 0 } else { rng.below(u64::from(CONTENTS)) as u8 };
        (0..CHUNK_PAGES).map(|_| page()).collect::<Vec<_>>()
    };
    (0..chunks).flat_map(|_| chunk(&mut rng)).collect()
}

fn no_failure() -> OnFailure {
    Box::new(|error| panic!("the pager failed: {error}"))
}

fn wait_until_complete(pager: &Pager) {
    let started = Instant::now();
    while !pager.stats().complete {
        assert!(pager.failure().is_none(), "{:?}", pager.failure());
        assert!(started.elapsed() < Duration::from_secs(30), "{:?}", pager.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn allocated_pages(memory: &Memory) -> u64 {
    memory.file.metadata().unwrap().blocks() * 512 / PAGE_SIZE as u64
}

const THREADS: u64 = 4;

/// What thread `page % 8` writes to its pages; pages with `page % 8 >= THREADS` stay as they are.
fn written(page: u64) -> u64 {
    0xF5_0000_0000 | page
}

/// Reads pages in random order, and writes to those of its own, for ever changing interleavings.
fn use_memory(memory: &Memory, contents: &[u8], thread: u64, seed: u64) {
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

fn check_memory(memory: &Memory, contents: &[u8]) {
    for page in memory.pages() {
        let mut expected = *content(contents[page as usize]);
        if page % 8 < THREADS {
            expected[24..32].copy_from_slice(&written(page).to_ne_bytes());
        }
        assert!(memory.read_page(page) == expected, "page {page} in the end");
    }
}

fn run_threads(memory: &Memory, contents: &[u8], seed: u64) {
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || use_memory(memory, contents, thread, seed));
        }
    });
}

#[test]
fn many_threads_see_the_snapshot_and_keep_what_they_write() {
    if !uffd_or_skip() {
        return;
    }
    within(120, || {
        for seed in 0..48 {
            let Fixture { region, contents, .. } = fixture(mixed(12, seed));
            // As memory below and above a hole: two ranges of the region, one file.
            let memory = Memory::new(&[(0, 5), (6 * CHUNK_PAGES, 6)]);
            let background_fill = seed % 3 != 0;
            let options = PagerOptions {
                fault_threads: 1 + seed as usize % 3,
                background_fill,
                ..PagerOptions::default()
            };
            let pager = Pager::start(region, &memory.file, &memory.mappings, options, no_failure())
                .unwrap();
            run_threads(&memory, &contents, seed);
            if background_fill {
                wait_until_complete(&pager);
            }
            let stats = pager.stats();
            assert_eq!(stats.complete, background_fill);
            assert!(stats.filled_pages > 0 && pager.failure().is_none());
            drop(pager);
            check_memory(&memory, &contents);
        }
    });
}

/// A fault on a zero page can be in flight when the background fill lets go of userfaultfd.
#[test]
fn completing_while_zero_pages_are_touched_is_no_failure() {
    if !uffd_or_skip() {
        return;
    }
    within(120, || {
        let mut contents = vec![0; 64 * CHUNK_PAGES as usize];
        (0..64).for_each(|index| contents[index * 5] = 4);
        let Fixture { region, contents, .. } = fixture(contents);
        let failed = Arc::new(Mutex::new(None));
        for seed in 0..60 {
            let memory = Memory::new(&[(0, 32), (32 * CHUNK_PAGES, 32)]);
            let sink = Arc::clone(&failed);
            let on_failure: OnFailure =
                Box::new(move |error| *sink.lock().unwrap() = Some(error.to_string()));
            let options = PagerOptions::default();
            let pager =
                Pager::start(region.clone(), &memory.file, &memory.mappings, options, on_failure)
                    .unwrap();
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                for thread in 0..3 {
                    let (memory, stop) = (&memory, &stop);
                    scope.spawn(move || {
                        // One page a chunk, from the end: each is a fault of its own.
                        for chunk in (6..64).rev().filter(|chunk| chunk % 3 == thread) {
                            if !stop.load(Ordering::Relaxed) {
                                assert_eq!(memory.read_word(chunk * CHUNK_PAGES + seed % 64, 0), 0);
                            }
                        }
                    });
                }
                while !pager.stats().complete && pager.failure().is_none() {
                    std::thread::yield_now();
                }
                stop.store(true, Ordering::Relaxed);
                drop(pager);
            });
            assert_eq!(failed.lock().unwrap().take(), None, "round {seed}");
            assert!(&memory.read_page(0) == content(contents[0]));
        }
    });
}

#[test]
fn sparse_regions_stay_sparse() {
    if !uffd_or_skip() {
        return;
    }
    let mut contents = vec![0; 40 * CHUNK_PAGES as usize];
    (0..90).for_each(|index| contents[index * 28] = 1 + index as u8 % 20);
    let Fixture { region, contents, .. } = fixture(contents);
    let with_data = contents.iter().filter(|id| **id != 0).count() as u64;
    let memory = Memory::new(&[(0, 40)]);
    let pager = Pager::start(
        region.clone(),
        &memory.file,
        &memory.mappings,
        PagerOptions::default(),
        no_failure(),
    )
    .unwrap();
    wait_until_complete(&pager);
    let stats = pager.stats();
    assert_eq!(
        (stats.filled_pages, stats.total_pages, stats.zero_pages),
        (with_data, with_data, 0)
    );
    assert_eq!(allocated_pages(&memory), with_data, "zero pages nobody touched take no memory");
    drop(pager);
    (0..)
        .zip(&contents)
        .for_each(|(page, id)| assert!(&memory.read_page(page) == content(*id), "page {page}"));

    let memory = Memory::new(&[(0, 40)]);
    pager::load(&region, &memory.file, &memory.mappings).unwrap();
    assert_eq!(allocated_pages(&memory), with_data, "loading at once keeps holes, too");
    (0..)
        .zip(&contents)
        .for_each(|(page, id)| assert!(&memory.read_page(page) == content(*id), "page {page}"));
}

/// The kernel may drop the page-table entry of a page that was served: reclaim, migration.
#[test]
fn a_page_that_lost_its_page_table_entry_is_mapped_again() {
    if !uffd_or_skip() {
        return;
    }
    within(20, || {
        let Fixture { region, contents, .. } = fixture(mixed(2, 5));
        let memory = Memory::new(&[(0, 2)]);
        let options = PagerOptions { background_fill: false, ..PagerOptions::default() };
        let pager =
            Pager::start(region, &memory.file, &memory.mappings, options, no_failure()).unwrap();
        for page in memory.pages() {
            assert!(&memory.read_page(page) == content(contents[page as usize]));
            memory.write_word(page, 1, page);
            memory.unmap(page);
            assert_eq!(memory.read_word(page, 1), page, "what was written is still there");
        }
        drop(pager);
    });
}

#[test]
fn a_damaged_frame_is_reported_and_nobody_hangs() {
    if !uffd_or_skip() {
        return;
    }
    within(30, || {
        // No two frames alike: what is verified once is as good for an equal one.
        let contents = (0..CHUNK_PAGES).map(|page| 2 + (page % 22) as u8).collect();
        let Fixture { storage, region, .. } = fixture(contents);
        let (frame, _) = region.locate(21).unwrap().block().expect("page 21 has data");
        let name = segment_name(frame.segment);
        let file = frazil_snapstore::Storage::open(&storage, &name, true).unwrap();
        let mut byte = [0];
        let offset = u64::from(frame.offset + frame.len - 1);
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
        for background_fill in [false, true] {
            let memory = Memory::new(&[(0, 1)]);
            let (tell, told) = mpsc::channel();
            let tell = Mutex::new(tell);
            let on_failure: OnFailure =
                Box::new(move |error| tell.lock().unwrap().send(error.to_string()).unwrap());
            let options = PagerOptions { background_fill, ..PagerOptions::default() };
            let pager =
                Pager::start(region.clone(), &memory.file, &memory.mappings, options, on_failure)
                    .unwrap();
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| memory.read_page(21));
                let text =
                    told.recv_timeout(Duration::from_secs(10)).expect("on_failure is called");
                let place = format!("{name} is damaged at offset {}", frame.offset);
                assert!(text.contains(&place) && text.contains("region `ram`"), "{text}");
                assert!(told.recv_timeout(Duration::from_millis(50)).is_err(), "it is called once");
                assert!(pager.failure().unwrap().to_string() == text && !pager.stats().complete);
                drop(pager);
                // It is released, and sees nothing that was not verified.
                assert!(&waiting.join().unwrap() == content(0));
            });
        }
    });
}

#[test]
fn memory_that_cannot_be_served_is_refused_at_once() {
    if !uffd_or_skip() {
        return;
    }
    let Fixture { region, .. } = fixture(mixed(4, 1));
    let memory = Memory::new(&[(0, 2), (2 * CHUNK_PAGES, 2)]);
    let mapping = memory.mappings[0];
    let refused = [
        ("not whole chunks", vec![Mapping { len_bytes: mapping.len_bytes - PAGE_SIZE, ..mapping }]),
        ("not aligned", vec![Mapping { first_page: 1, ..mapping }]),
        ("beyond the region", vec![Mapping { first_page: 3 * CHUNK_PAGES, ..mapping }]),
        (
            "beyond the file",
            vec![Mapping { file_offset: 3 * CHUNK_PAGES * PAGE_SIZE as u64, ..mapping }],
        ),
        ("the same pages twice", vec![mapping, Mapping { first_page: 0, ..memory.mappings[1] }]),
    ];
    for (why, mappings) in refused {
        let pager = Pager::start(
            region.clone(),
            &memory.file,
            &mappings,
            PagerOptions::default(),
            no_failure(),
        );
        let error = pager.expect_err(why).to_string();
        println!("{why}: {error}");
        assert!(error.contains("mapping"), "{why}: {error}");
    }
    // And the memory is free again.
    let pager =
        Pager::start(region, &memory.file, &memory.mappings, PagerOptions::default(), no_failure())
            .unwrap();
    wait_until_complete(&pager);
}

/// An image of all of `region`, of which nothing is there yet.
fn image_of(region: &RegionReader) -> Arc<Image> {
    let pages = region.pages() - region.pages() % CHUNK_PAGES;
    let memory = Memory::new(&[(0, pages / CHUNK_PAGES)]);
    let extents = [memory.mappings[0].extent()];
    Arc::new(Image::new(region.clone(), &memory.file, &extents).unwrap())
}

fn seat_of(memory: &Memory) -> Seat {
    Seat::take(&memory.mappings).unwrap()
}

const SHARED: PagerOptions = PagerOptions {
    fault_threads: 2,
    background_fill: false,
    fill_threads: 1,
    fill_bytes_per_s: None,
    replay: Replay::Off,
    record: None,
    maps_ahead: false,
};

#[test]
fn users_of_one_image_see_the_snapshot_and_only_what_they_wrote_themselves() {
    if !uffd_or_skip() {
        return;
    }
    within(120, || {
        for seed in 0..12 {
            let Fixture { region, contents, .. } = fixture(mixed(12, seed));
            let image = image_of(&region);
            let options = PagerOptions { background_fill: seed % 2 == 0, ..SHARED };
            let users: Vec<(Memory, Pager)> = (0..3)
                .map(|_| {
                    let memory = Memory::private(&image);
                    let seat = seat_of(&memory);
                    let pager = Pager::serve(Arc::clone(&image), seat, options, no_failure());
                    (memory, pager.unwrap())
                })
                .collect();
            std::thread::scope(|scope| {
                for (index, (memory, _)) in users.iter().enumerate() {
                    let contents = &contents;
                    scope.spawn(move || run_threads(memory, contents, seed * 3 + index as u64));
                }
            });
            // One that goes hurts nobody.
            let mut users = users.into_iter();
            drop(users.next());
            for (memory, pager) in users {
                if options.background_fill {
                    wait_until_complete(&pager);
                }
                assert!(pager.failure().is_none());
                check_memory(&memory, &contents);
            }
            // Late, and complete or not, another one finds the snapshot as it was.
            let memory = Memory::private(&image);
            let seat = seat_of(&memory);
            let pager = Pager::serve(Arc::clone(&image), seat, options, no_failure()).unwrap();
            assert_eq!(pager.stats().complete, options.background_fill);
            for page in memory.pages() {
                assert!(&memory.read_page(page) == content(contents[page as usize]), "page {page}");
            }
            let filled = contents.iter().filter(|id| **id != 0).count() as u64;
            assert_eq!(pager.stats().filled_pages, filled, "each page once, for all of them");
        }
    });
}

/// A store in a folder, which another process, or a second handle, can open.
fn fixture_in(folder: &std::path::Path, contents: &[u8]) -> RegionReader {
    let store = Store::open_or_create(folder, StoreOptions::default()).unwrap();
    let mut model = Model { regions: [("ram".to_owned(), vec![0; contents.len()])].into() };
    let pages = (0..).zip(contents.iter().copied()).filter(|(_, id)| *id != 0).collect();
    let edit = Edit { rounds: vec![("ram".into(), pages)], step: 1 };
    let id = take(&store, None, &mut model, &edit).unwrap().id;
    let store = Store::open(folder, StoreOptions::default()).unwrap();
    store.snapshot(id).unwrap().region("ram").unwrap()
}

/// Serves users in threads instead of processes: who is told to die just stops answering.
#[test]
fn another_pager_goes_on_where_one_stopped() {
    if !uffd_or_skip() {
        return;
    }
    within(120, || {
        let scratch = tempfile::tempdir().unwrap();
        let contents = mixed(16, 7);
        let region = fixture_in(&scratch.path().join("store"), &contents);
        for seed in 0..8 {
            let memory = Memory::new(&[(0, 16)]);
            let extents = [memory.mappings[0].extent()];
            let image = Image::new(region.clone(), &memory.file, &extents).unwrap();
            let filled = image.filled_file().try_clone().unwrap();
            let seat = seat_of(&memory);
            let options = PagerOptions { background_fill: seed % 2 == 0, ..SHARED };
            let serve = |image: Image| {
                let seat = seat.try_clone().unwrap();
                Some(Pager::serve(Arc::new(image), seat, options, no_failure()).unwrap())
            };
            let mut pager = serve(image);
            std::thread::scope(|scope| {
                let user = scope.spawn(|| run_threads(&memory, &contents, seed));
                while !user.is_finished() {
                    std::thread::sleep(Duration::from_micros(300));
                    // The seat is kept, so nobody finds zeros; they wait.
                    drop(pager.take());
                    let image = Image::take_over(
                        region.clone(),
                        &memory.file,
                        &extents,
                        filled.try_clone().unwrap(),
                    );
                    pager = serve(image.unwrap());
                }
            });
            drop((pager, seat));
            check_memory(&memory, &contents);
        }
    });
}

#[test]
fn a_server_of_shared_memory_can_die_and_its_users_go_on() {
    if !uffd_or_skip() {
        return;
    }
    within(60, || {
        let scratch = tempfile::tempdir().unwrap();
        let contents = mixed(16, 9);
        let region = fixture_in(&scratch.path().join("store"), &contents);
        for seed in 0..6 {
            let socket = scratch.path().join(format!("socket{seed}"));
            let listener = pager::listen(&socket).unwrap();
            let server = pager::ImageServer::new(image_of(&region), SHARED).unwrap();
            let server = Arc::new(server);
            let (hang_up, hung_up) = mpsc::channel::<()>();
            let users: Vec<(Memory, pager::RemotePager)> = std::thread::scope(|scope| {
                let (server, listener) = (&server, &listener);
                scope.spawn(move || {
                    for _ in 0..2 {
                        let user = pager::accept(listener, Duration::from_secs(10)).unwrap();
                        let server = Arc::clone(server);
                        let user = user.expect("a user comes");
                        // What a process that is killed does to its connections.
                        std::thread::spawn(move || server.serve(user));
                    }
                });
                (0..2).map(|_| join(&socket, &region)).collect()
            });
            std::thread::scope(|scope| {
                for (index, (memory, _)) in users.iter().enumerate() {
                    let contents = &contents;
                    scope.spawn(move || run_threads(memory, contents, seed * 2 + index as u64));
                }
                scope.spawn(move || {
                    let _never = hung_up.recv_timeout(Duration::from_millis(seed));
                    server.hang_up();
                });
            });
            drop(hang_up);
            for (memory, pager) in users {
                assert!(pager.failure().is_none(), "{:?}", pager.failure());
                check_memory(&memory, &contents);
            }
        }
    });
}

fn join(socket: &std::path::Path, region: &RegionReader) -> (Memory, pager::RemotePager) {
    let offer = pager::Offer::receive(pager::connect(socket).unwrap(), region).unwrap();
    let pages = region.pages();
    let extent = Extent { first_page: 0, pages, file_offset: 0 };
    let memory = Memory::private_of(offer.memory().try_clone().unwrap(), &[extent]);
    // It is for reading.
    assert!(std::os::unix::fs::FileExt::write_at(&memory.file, &[1], 0).is_err());
    let pager = offer.accept(region.clone(), seat_of(&memory), no_failure()).unwrap();
    (memory, pager)
}

#[test]
fn a_working_set_is_recorded_once_and_there_before_it_is_wanted() {
    if !uffd_or_skip() {
        return;
    }
    within(60, || {
        let scratch = tempfile::tempdir().unwrap();
        let mut contents: Vec<u8> =
            (0..32 * CHUNK_PAGES).map(|page| 1 + (page % 20) as u8).collect();
        // Zero pages that are touched belong to it, too.
        contents[900..1000].fill(0);
        let region = fixture_in(&scratch.path().join("store"), &contents);
        let touched = [5_u64, 70, 333, 950, 951, 1500, 1501, 2000];
        let record = PagerOptions {
            record: Some(Duration::from_millis(300)),
            replay: Replay::Before,
            ..SHARED
        };
        let memory = Memory::new(&[(0, 32)]);
        let pager =
            Pager::start(region.clone(), &memory.file, &memory.mappings, record, no_failure())
                .unwrap();
        for page in touched {
            assert!(&memory.read_page(page) == content(contents[page as usize]));
        }
        let store = region.store();
        let started = Instant::now();
        let set = loop {
            if let Some(set) = store.working_set(region.snapshot(), "ram") {
                break set;
            }
            assert!(started.elapsed() < Duration::from_secs(20), "it is never kept");
            std::thread::sleep(Duration::from_millis(5));
        };
        let has = |page: &u64| set.ranges.iter().any(|(at, len)| (*at..at + len).contains(page));
        assert!(touched.iter().all(has), "{set:?}");
        assert!(set.pages() < contents.len() as u64 / 4, "what was not touched is not: {set:?}");
        drop((pager, memory));

        let memory = Memory::new(&[(0, 32)]);
        let pager =
            Pager::start(region.clone(), &memory.file, &memory.mappings, record, no_failure())
                .unwrap();
        for page in touched {
            assert!(&memory.read_page(page) == content(contents[page as usize]));
        }
        assert_eq!(pager.stats().faults, 0, "all that is wanted is there");
        for page in memory.pages() {
            assert!(&memory.read_page(page) == content(contents[page as usize]), "page {page}");
        }
        drop(pager);
        // Damaged, it is as if it were not there.
        let file = scratch.path().join(format!("store/working-set-{}", region.snapshot()));
        let mut bytes = std::fs::read(&file).unwrap();
        bytes[60] ^= 4;
        std::fs::write(&file, bytes).unwrap();
        assert_eq!(store.working_set(region.snapshot(), "ram"), None);
        // And goes with its snapshot.
        store.forget(&[region.snapshot()]).unwrap();
        store.prune(&PruneOptions::default(), &PruneProgress::default()).unwrap();
        assert!(!file.exists());
    });
}

#[test]
fn the_background_fill_keeps_to_its_rate() {
    if !uffd_or_skip() {
        return;
    }
    within(60, || {
        let Fixture { region, contents, .. } = fixture(vec![3; 8 * CHUNK_PAGES as usize]);
        let memory = Memory::new(&[(0, 8)]);
        // A chunk every 20 ms.
        let rate = CHUNK_PAGES * PAGE_SIZE as u64 * 50;
        let options = PagerOptions {
            background_fill: true,
            fill_bytes_per_s: Some(rate),
            maps_ahead: true,
            ..SHARED
        };
        let started = Instant::now();
        let pager =
            Pager::start(region, &memory.file, &memory.mappings, options, no_failure()).unwrap();
        wait_until_complete(&pager);
        // Never faster; how much slower is the host's business.
        assert!(started.elapsed() >= Duration::from_millis(130), "{:?}", started.elapsed());
        assert!(&memory.read_page(300) == content(contents[300]));
    });
}
