//! The pager with a memfd and plain threads; no virtual machine is needed to find its bugs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use frazil_snapstore::pager::{
    self, CHUNK_PAGES, Image, Mapping, OnFailure, Pager, PagerOptions, Seat,
};
use frazil_snapstore::{PAGE_SIZE, segment_name};
use frazil_tests::oracle::content;
use frazil_tests::pager_bed::{
    Fixture, Memory, allocated_pages, check_memory, fixture, mixed, no_failure, run_threads,
    wait_until_complete, within,
};
use frazil_tests::vm_harness::uffd_or_skip;

#[test]
fn many_threads_see_the_snapshot_and_keep_what_they_write() {
    if !uffd_or_skip() {
        return;
    }
    within(120, || {
        for seed in 0..48 {
            let Fixture { region, contents, .. } = fixture(mixed(12, seed));
            // As memory below and above a hole: two ranges of the region in one file.
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

/// A fault on a zero page can be in flight when the background fill gives up the userfaultfd.
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
                        // One page per chunk, from the end, so that each is a fault of its own.
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

/// Threads fault all the time where everything is resident, which makes the fill look there again
/// and again. Pages far away must still be loaded before the memory counts as complete.
#[test]
fn faults_where_all_is_there_do_not_end_the_fill_early() {
    if !uffd_or_skip() {
        return;
    }
    within(240, || {
        const CHUNKS: u64 = 1 << 16;
        let mut contents = vec![0; (CHUNKS * CHUNK_PAGES) as usize];
        let last = contents.len() - 1;
        (0..300).for_each(|index| contents[last - index * 71] = 1 + (index % 20) as u8);
        let Fixture { region, contents, .. } = fixture(contents);
        let with_data: Vec<u64> =
            (0..).zip(&contents).filter(|(_, id)| **id != 0).map(|(page, _)| page).collect();
        for round in 0..3 {
            let memory = Memory::new(&[(0, CHUNKS)]);
            let options = PagerOptions { fill_threads: 1 + round, ..PagerOptions::default() };
            let image = Arc::new(
                Image::new(region.clone(), &memory.file, &[memory.mappings[0].extent()]).unwrap(),
            );
            let serve = |memory: &Memory| {
                let seat = Seat::take(&memory.mappings).unwrap();
                Pager::serve(Arc::clone(&image), seat, options, no_failure()).unwrap()
            };
            let pager = serve(&memory);
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                for page in 0..2 {
                    let (memory, stop) = (&memory, &stop);
                    scope.spawn(move || {
                        while !stop.load(Ordering::Relaxed) {
                            assert_eq!(memory.read_word(page, 0), 0);
                            memory.unmap(page);
                        }
                    });
                }
                while !pager.stats().complete {
                    std::thread::yield_now();
                }
                stop.store(true, Ordering::Relaxed);
            });
            let stats = pager.stats();
            let expected = with_data.len() as u64;
            assert_eq!((stats.filled_pages, stats.total_pages), (expected, expected));
            drop(pager);
            // A later user of the image needs no pager.
            let late = Memory::private(&image);
            let pager = serve(&late);
            assert!(pager.stats().complete);
            for page in &with_data {
                let expected = content(contents[*page as usize]);
                assert!(&memory.read_page(*page) == expected, "page {page} is lost");
                assert!(&late.read_page(*page) == expected, "page {page} is lost, late");
            }
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
    pager::load_memory(&region, &memory.file, &memory.mappings).unwrap();
    assert_eq!(allocated_pages(&memory), with_data, "loading at once keeps holes, too");
    (0..)
        .zip(&contents)
        .for_each(|(page, id)| assert!(&memory.read_page(page) == content(*id), "page {page}"));
}

/// Waits until no more pages are loaded.
fn wait_quiet(pager: &Pager) {
    let count = || (pager.stats().faults, pager.stats().filled_pages);
    let mut last = count();
    loop {
        std::thread::sleep(Duration::from_millis(10));
        let now = count();
        if now == last {
            return;
        }
        last = now;
    }
}

#[test]
fn who_goes_on_finds_what_is_next_and_who_jumps_pays_for_what_is_touched() {
    if !uffd_or_skip() {
        return;
    }
    within(120, || {
        const CHUNKS: u64 = 96;
        const FRAME_PAGES_MAX: u64 = 16;
        let contents = (0..CHUNKS * CHUNK_PAGES).map(|page| 1 + (page % 20) as u8).collect();
        let Fixture { region, contents, .. } = fixture(contents);
        let serve = |memory: &Memory| {
            let options = PagerOptions { background_fill: false, ..PagerOptions::default() };
            Pager::start(region.clone(), &memory.file, &memory.mappings, options, no_failure())
                .unwrap()
        };
        let check = |memory: &Memory, page: u64| {
            assert!(&memory.read_page(page) == content(contents[page as usize]), "page {page}");
        };
        let memory = Memory::new(&[(0, CHUNKS)]);
        let pager = serve(&memory);
        let mut faults = 0;
        for page in memory.pages() {
            check(&memory, page);
            if pager.stats().faults > faults {
                // Lets the pager finish, as for a reader that takes its time.
                wait_quiet(&pager);
                faults = pager.stats().faults;
            }
        }
        // Two faults in the first chunk, then each loads as much as lies behind it, so that in the
        // end only every eighth chunk faults.
        assert!(pager.stats().faults < CHUNKS / 2, "{:?}", pager.stats());
        drop(pager);

        let memory = Memory::new(&[(0, CHUNKS)]);
        let pager = serve(&memory);
        for chunk in 0..CHUNKS {
            check(&memory, chunk * CHUNK_PAGES + 20);
        }
        wait_quiet(&pager);
        let stats = pager.stats();
        assert!(stats.filled_pages <= CHUNKS * FRAME_PAGES_MAX, "{stats:?}");
    });
}

/// The kernel may drop the page-table entry of a page that was served, by reclaim or migration.
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
        // No two frames are equal: a frame verified once would do for an equal one.
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
                // The reader is released, and sees nothing unverified.
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
    // The refused attempts leave the memory free to be served.
    let pager =
        Pager::start(region, &memory.file, &memory.mappings, PagerOptions::default(), no_failure())
            .unwrap();
    wait_until_complete(&pager);
}
