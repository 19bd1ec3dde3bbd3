//! Images that several users share, pagers that take over from one another, and working sets.

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use frazil_snapstore::pager::{
    self, CHUNK_PAGES, Extent, Image, Mapping, Pager, PagerOptions, Replay, Seat,
};
use frazil_snapstore::{PAGE_SIZE, PruneOptions, PruneProgress, RegionReader, Store, StoreOptions};
use frazil_tests::oracle::{Edit, Model, content, take};
use frazil_tests::pager_bed::{
    Fixture, Memory, check_memory, fixture, mixed, no_failure, run_threads, wait_until_complete,
    within,
};
use frazil_tests::vm_harness::uffd_or_skip;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};

/// Makes an image of all of `region`, with nothing loaded yet.
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
            // A user that leaves does not hurt the others.
            let mut users = users.into_iter();
            drop(users.next());
            for (memory, pager) in users {
                if options.background_fill {
                    wait_until_complete(&pager);
                }
                assert!(pager.failure().is_none());
                check_memory(&memory, &contents);
            }
            // A late user finds the snapshot unchanged, whether the image is complete or not.
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

/// Makes a snapshot in a store in `folder`, and opens it by a second handle, as another process
/// would.
fn fixture_in(folder: &std::path::Path, contents: &[u8]) -> RegionReader {
    let store = Store::open_or_create(folder, StoreOptions::default()).unwrap();
    let mut model = Model { regions: [("ram".to_owned(), vec![0; contents.len()])].into() };
    let pages = (0..).zip(contents.iter().copied()).filter(|(_, id)| *id != 0).collect();
    let edit = Edit { rounds: vec![("ram".into(), pages)], step: 1 };
    let id = take(&store, None, &mut model, &edit).unwrap().id;
    let store = Store::open(folder, StoreOptions::default()).unwrap();
    store.snapshot(id).unwrap().region("ram").unwrap()
}

/// Pagers run in this process instead of their own: a pager that is dropped just stops answering.
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
                    // The seat is kept, so threads wait instead of finding zeros.
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
                        // Serves until `hang_up`, which closes connections as a killed process
                        // does.
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
    // The offered memory is read-only.
    assert!(std::os::unix::fs::FileExt::write_at(&memory.file, &[1], 0).is_err());
    let pager = offer.accept(region.clone(), seat_of(&memory), no_failure()).unwrap();
    (memory, pager)
}

#[test]
fn a_server_that_has_ended_is_said_to_have() {
    if !uffd_or_skip() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let region = fixture_in(&scratch.path().join("store"), &mixed(1, 9));
    let socket = scratch.path().join("socket");
    let listener = pager::listen(&socket).unwrap();
    let user = pager::connect(&socket).unwrap();
    drop(pager::accept(&listener, Duration::from_secs(10)).unwrap().expect("a user"));
    let error = pager::Offer::receive(user, &region).unwrap_err().to_string();
    assert!(error.contains("has ended"), "{error}");
}

/// A test case's name, and the message and file descriptors that a hostile user sends.
type Nonsense<'a> = (&'static str, String, Vec<BorrowedFd<'a>>);

/// Sends nonsense to the server at `socket`; returns the answer, empty if the server hangs up.
fn say(socket: &std::path::Path, (what, message, fds): &Nonsense<'_>) -> String {
    let user = pager::connect(socket).unwrap();
    let mut bytes = vec![0; 1 << 16];
    assert!(recv(&user, &mut bytes, RecvFlags::empty()).unwrap().0 > 0, "{what}: an offer");
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
    let message = [IoSlice::new(message.as_bytes())];
    sendmsg(&user, &message, &mut control, SendFlags::empty()).unwrap();
    let answer = recv(&user, &mut bytes, RecvFlags::empty()).map_or(0, |(len, _)| len);
    String::from_utf8(bytes[..answer].to_vec()).unwrap()
}

/// Serves every user that connects, as long as the test runs.
fn serve_all(listener: OwnedFd, server: Arc<pager::ImageServer>) {
    std::thread::spawn(move || {
        loop {
            if let Some(user) = pager::accept(&listener, Duration::from_secs(1)).unwrap() {
                let server = Arc::clone(&server);
                std::thread::spawn(move || server.serve(user));
            }
        }
    });
}

/// Returns the message by which a user takes a seat.
fn sit_message(mappings: &[Mapping]) -> String {
    let mappings = serde_json::to_string(mappings).unwrap();
    format!("{{\"message\":\"sit\",\"mappings\":{mappings}}}")
}

fn wrong_mappings(mapping: Mapping) -> [Mapping; 7] {
    [
        Mapping { len_bytes: 1 << 63, ..mapping },
        Mapping { len_bytes: usize::MAX, ..mapping },
        Mapping { address: usize::MAX - 4095, ..mapping },
        Mapping { first_page: 0_u64.wrapping_sub(CHUNK_PAGES), ..mapping },
        Mapping { first_page: 1, ..mapping },
        Mapping { file_offset: 1 << 63, ..mapping },
        Mapping { file_offset: 4096, ..mapping },
    ]
}

#[test]
fn users_that_talk_nonsense_are_not_served_and_hurt_nobody() {
    if !uffd_or_skip() {
        return;
    }
    within(120, || {
        let scratch = tempfile::tempdir().unwrap();
        let contents = mixed(16, 3);
        let region = fixture_in(&scratch.path().join("store"), &contents);
        let socket = scratch.path().join("socket");
        let listener = pager::listen(&socket).unwrap();
        let server = Arc::new(pager::ImageServer::new(image_of(&region), SHARED).unwrap());
        serve_all(listener, Arc::clone(&server));
        let (memory, pager) = join(&socket, &region);
        let never_sit: Vec<OwnedFd> = (0..5).map(|_| pager::connect(&socket).unwrap()).collect();
        wait_until("users without a seat", || server.unseated_users() == 5);

        let own = Memory::new(&[(0, 16)]);
        let [uffd, counters] = seat_of(&own).descriptors().unwrap();
        let counters = File::from(counters);
        let words = counters.metadata().unwrap().len();
        let unsealed = |len: u64| {
            let file = memfd_create("counters", MemfdFlags::ALLOW_SEALING).unwrap();
            ftruncate(&file, len).unwrap();
            file
        };
        let (loose, short) = (unsealed(words), unsealed(words - 8));
        fcntl_add_seals(&short, SealFlags::SHRINK | SealFlags::GROW).unwrap();
        let open = |path| File::open(path).unwrap();
        let (null, zero, random) = (open("/dev/null"), open("/dev/zero"), open("/dev/urandom"));
        let (pipe, _writes) = rustix::pipe::pipe().unwrap();
        let mapping = own.mappings[0];
        let good = sit_message(&[mapping]);
        let mut nonsense: Vec<Nonsense<'_>> = vec![
            ("no files", good.clone(), vec![]),
            ("one file", good.clone(), vec![uffd.as_fd()]),
            ("unreadable: many files", good.clone(), vec![null.as_fd(); 8]),
            ("loose counters", good.clone(), vec![uffd.as_fd(), loose.as_fd()]),
            ("short counters", good.clone(), vec![uffd.as_fd(), short.as_fd()]),
            ("no counters", good.clone(), vec![uffd.as_fd(), null.as_fd()]),
            ("unreadable: garbage", "\u{7f}".repeat(1000), vec![uffd.as_fd(), counters.as_fd()]),
            ("unreadable: long", " ".repeat(60_000), vec![uffd.as_fd(), counters.as_fd()]),
            ("another message", "{\"message\":\"replayed\"}".into(), vec![]),
        ];
        for file in [null.as_fd(), zero.as_fd(), random.as_fd(), pipe.as_fd(), loose.as_fd()] {
            nonsense.push(("no userfaultfd", good.clone(), vec![file, counters.as_fd()]));
        }
        for wrong in wrong_mappings(mapping) {
            let files = vec![uffd.as_fd(), counters.as_fd()];
            nonsense.push(("a mapping", sit_message(&[mapping, wrong]), files));
        }
        for case in &nonsense {
            let answer = say(&socket, case);
            println!("{}: {answer}", case.0);
            // The user is told why it is not served, unless its message was unreadable.
            let unreadable = case.0.starts_with("unreadable: ");
            let refused =
                if unreadable { answer.is_empty() } else { answer.contains("\"failed\"") };
            assert!(refused, "{}: {}: {answer}", case.0, case.1);
        }
        run_threads(&memory, &contents, 5);
        check_memory(&memory, &contents);
        assert!(pager.failure().is_none());
        wait_until("only they are left", || server.users() == 6 && server.unseated_users() == 5);
        drop(never_sit);
        wait_until("one is left", || server.users() == 1);
    });
}

fn wait_until(what: &str, reached: impl Fn() -> bool) {
    let started = Instant::now();
    while !reached() {
        assert!(started.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
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
        // Zero pages that are touched belong to the working set, too.
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
        // A damaged working set is treated as absent.
        let file = scratch.path().join(format!("store/working-set-{}", region.snapshot()));
        let mut bytes = std::fs::read(&file).unwrap();
        bytes[60] ^= 4;
        std::fs::write(&file, bytes).unwrap();
        assert_eq!(store.working_set(region.snapshot(), "ram"), None);
        // A working set goes with its snapshot.
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
        // One chunk every 20 ms, and one every 250 ms, which is longer than the fill sleeps at a
        // time.
        for (chunks, per_s, least_ms) in [(8, 50, 130), (4, 4, 700)] {
            keeps_to_rate(chunks, per_s, least_ms);
        }
    });
}

fn keeps_to_rate(chunks: u64, chunks_per_s: u64, least_ms: u64) {
    let contents = vec![3; (chunks * CHUNK_PAGES) as usize];
    let Fixture { region, contents, .. } = fixture(contents);
    let memory = Memory::new(&[(0, chunks)]);
    let rate = CHUNK_PAGES * PAGE_SIZE as u64 * chunks_per_s;
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
    // Never faster; how much slower depends on the host.
    assert!(started.elapsed() >= Duration::from_millis(least_ms), "{:?}", started.elapsed());
    assert!(&memory.read_page(200) == content(contents[200]));
}
