//! One test for each way the store was, or could have been, broken: races between handles, failures
//! at awkward places, unexpected files.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use frazil_snapstore::{
    Description, Elide, PAGE_SIZE, Page, PageSet, PageSource, StateChunk, Store, StoreError,
    StoreOptions, VerifyProgress, segment_name, verify,
};
use frazil_tests::format_reader::{BLOCK_HEADER_LEN, KIND_FRAME, KIND_NODE, read_segment};
use frazil_tests::oracle::{
    Edit, Model, Source, check_all, check_no_orphans, compare, describe, small_options, take,
};
use frazil_tests::storage_sim::{Fault, FaultPlan, Op, SimStorage};

fn store_on(storage: &SimStorage) -> Arc<Store> {
    Store::open_or_create_storage(Arc::new(storage.clone()), small_options()).unwrap()
}

fn model(pages: usize) -> Model {
    Model { regions: [("ram".to_owned(), vec![0; pages])].into() }
}

/// Writes noise to `pages`, so that segments fill up.
fn edit(step: u64, pages: std::ops::Range<u64>) -> Edit {
    Edit {
        rounds: vec![("ram".into(), pages.map(|page| (page, 3 + 3 * (page % 7) as u8)).collect())],
        step,
    }
}

/// Fails the test if `run` does not return within `seconds`: a hang is the bug looked for.
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

const EIO_NOW: FaultPlan = FaultPlan { after: 0, fault: Fault::Eio, lasting: false };

#[test]
fn a_failing_appender_does_not_hang_its_workers() {
    within(20, || {
        let storage = SimStorage::default();
        let store = store_on(&storage);
        let mut transaction = store.begin(None).unwrap();
        let region = transaction.region("ram", 400).unwrap();
        let mut set = PageSet::new(400);
        set.insert_range(0, 400);
        storage.fail(Some(EIO_NOW));
        let error = transaction.write_pages(region, &set, &Source(&[3; 400])).unwrap_err();
        assert!(matches!(error, StoreError::Io { .. }), "{error}");
    });
}

#[test]
fn a_transaction_that_failed_cannot_be_committed() {
    struct Broken;
    impl PageSource for Broken {
        fn read_page(&self, page: u64, buf: &mut Page) -> io::Result<()> {
            buf.fill(7);
            if page == 9 { Err(io::Error::other("no such page")) } else { Ok(()) }
        }
    }
    let store = store_on(&SimStorage::default());
    let mut transaction = store.begin(None).unwrap();
    let region = transaction.region("ram", 16).unwrap();
    let mut set = PageSet::new(16);
    set.insert_range(0, 16);
    let error = transaction.write_pages(region, &set, &Broken).unwrap_err();
    assert!(error.to_string().contains("page 9 of region `ram`"), "{error}");
    // Otherwise the snapshot would silently lack the pages of the failed call.
    assert!(matches!(transaction.commit(describe(1)), Err(StoreError::Invalid(_))));
    assert_eq!(store.latest(), None);
    take(&store, None, &mut model(16), &edit(2, 0..16)).unwrap();
}

#[test]
fn two_creators_at_once_make_one_store() {
    let storage = SimStorage::default();
    let (other, published) = (storage.clone(), Arc::new(std::sync::Mutex::new(None)));
    let result = Arc::clone(&published);
    storage.once(Op::Lock, "", move || {
        let store = store_on(&other);
        let mut model = model(8);
        let id = take(&store, None, &mut model, &edit(1, 0..8)).unwrap().id;
        *result.lock().unwrap() = Some((id, model));
    });
    let store = store_on(&storage);
    let published = published.lock().unwrap().take().unwrap();
    check_all(&store, &[published]);
}

#[test]
fn a_reader_that_refreshes_during_a_commit_sees_one_snapshot_once() {
    let storage = SimStorage::default();
    let store = store_on(&storage);
    let reader = Arc::clone(&store);
    storage.once(Op::Sync, "journal", move || reader.refresh().unwrap());
    let mut model = model(8);
    let id = take(&store, None, &mut model, &edit(1, 0..8)).unwrap().id;
    check_all(&store, &[(id, model)]);
    assert!(store.resolve(&id.to_string()[..8]).is_ok());
    store.set_tag("gold", Some(id)).unwrap();
}

#[test]
fn reopening_and_publishing_in_two_threads_do_not_deadlock() {
    within(60, || {
        let storage = SimStorage::default();
        let store = store_on(&storage);
        let id = take(&store, None, &mut model(8), &edit(1, 0..8)).unwrap().id;
        let other = Arc::clone(&store);
        let thread = std::thread::spawn(move || (0..1500).for_each(|_| other.reopen().unwrap()));
        for index in 0..1500 {
            store.set_tag("moving", (index % 2 == 0).then_some(id)).unwrap();
            assert_eq!(store.snapshots().len(), 1, "a reopen must not hide what is published");
        }
        thread.join().unwrap();
    });
}

#[test]
fn what_another_process_left_is_cleared_by_a_handle_that_was_idle() {
    let storage = SimStorage::default();
    let idle = store_on(&storage);
    let mut first = model(400);
    let id = take(&idle, None, &mut first, &edit(1, 0..5)).unwrap().id;
    // The other process writes several segments and dies: its rollback fails like everything else.
    let other = store_on(&storage);
    let mut transaction = other.begin(Some(id)).unwrap();
    let region = transaction.region("ram", 400).unwrap();
    let mut set = PageSet::new(400);
    set.insert_range(0, 400);
    transaction.write_pages(region, &set, &Source(&[6; 400])).unwrap();
    storage.fail(Some(FaultPlan { after: 0, fault: Fault::Eio, lasting: true }));
    drop(transaction);
    storage.fail(None);
    assert!(storage.files().len() > 5, "{:?}", storage.files());
    let mut second = first.clone();
    let next = take(&idle, Some(id), &mut second, &edit(2, 3..9)).unwrap().id;
    check_all(&idle, &[(id, first), (next, second)]);
    check_no_orphans(&storage);
}

#[test]
fn tagging_does_not_vouch_for_files_it_never_looked_at() {
    let storage = SimStorage::default();
    let store = store_on(&storage);
    let mut first = model(400);
    let id = take(&store, None, &mut first, &edit(1, 0..5)).unwrap().id;
    let mut transaction = store.begin(Some(id)).unwrap();
    let region = transaction.region("ram", 400).unwrap();
    let mut set = PageSet::new(400);
    set.insert_range(0, 400);
    transaction.write_pages(region, &set, &Source(&[6; 400])).unwrap();
    storage.fail(Some(FaultPlan { after: 0, fault: Fault::Eio, lasting: true }));
    drop(transaction);
    storage.fail(None);
    store.set_tag("gold", Some(id)).unwrap();
    let mut second = first.clone();
    take(&store, Some(id), &mut second, &edit(2, 3..9)).unwrap();
    check_no_orphans(&storage);
}

#[test]
fn an_error_while_tagging_latches_and_a_latched_handle_does_not_tag() {
    let storage = SimStorage::default();
    let store = store_on(&storage);
    let id = take(&store, None, &mut model(8), &edit(1, 0..8)).unwrap().id;
    storage.fail(Some(FaultPlan { after: 1, fault: Fault::Eio, lasting: false }));
    let error = store.set_tag("gold", Some(id)).unwrap_err();
    assert!(matches!(error, StoreError::Io { op: "sync", .. }), "{error}");
    assert!(matches!(store.set_tag("gold", Some(id)), Err(StoreError::Latched { .. })));
    assert!(matches!(store.begin(None), Err(StoreError::Latched { .. })));
    store.reopen().unwrap();
    assert!(store.tags().is_empty());
    store.set_tag("gold", Some(id)).unwrap();
    assert_eq!(store.resolve("gold").unwrap().id, id);
}

#[test]
fn a_tag_points_to_a_published_snapshot() {
    let store = store_on(&SimStorage::default());
    let nobody = frazil_snapstore::Hash::of(b"nobody");
    assert!(matches!(store.set_tag("gold", Some(nobody)), Err(StoreError::UnknownRef { .. })));
    assert!(store.tags().is_empty());
}

#[test]
fn a_tag_named_like_the_journals_magic_survives_a_crash() {
    let storage = SimStorage::default();
    let store = store_on(&storage);
    let id = take(&store, None, &mut model(8), &edit(1, 0..8)).unwrap().id;
    let before = storage.content("journal").unwrap();
    store.set_tag("FRJR/FRJRFRJR", Some(id)).unwrap();
    let after = storage.content("journal").unwrap();
    for cut in before.len()..after.len() {
        storage.put("journal", Some(&after[..cut]));
        let store = Store::open_storage(Arc::new(storage.clone()), small_options());
        let store = store.unwrap_or_else(|error| panic!("cut at {cut}: {error}"));
        assert_eq!(store.torn_journal_bytes() as usize, cut - before.len());
        assert_eq!(store.snapshots().len(), 1);
    }
}

#[test]
fn after_reopening_a_segment_is_still_shared_by_many_snapshots() {
    let storage = SimStorage::default();
    let options = StoreOptions { segment_max_bytes: 1 << 20, ..small_options() };
    let store = Store::open_or_create_storage(Arc::new(storage.clone()), options).unwrap();
    store.reopen().unwrap();
    let mut contents = model(64);
    let mut parent = None;
    for step in 0..6 {
        parent = Some(take(&store, parent, &mut contents, &edit(step, step..step + 1)).unwrap().id);
    }
    let segments = storage.files().keys().filter(|name| name.starts_with("segments/")).count();
    assert_eq!(segments, 1, "six small snapshots need one segment: {:?}", storage.files());
}

#[test]
fn foreign_names_among_the_segments_are_left_alone() {
    let storage = SimStorage::default();
    let store = store_on(&storage);
    let foreign =
        ["segments/ffffffff.seg.bak", "segments/9.seg", "segments/+0000009.seg", "segments/note"];
    foreign.iter().for_each(|name| storage.put(name, Some(b"mine")));
    let mut contents = model(64);
    let id = take(&store, None, &mut contents, &edit(1, 0..9)).unwrap().id;
    take(&store, Some(id), &mut contents, &edit(2, 0..9)).unwrap();
    for name in foreign {
        assert_eq!(storage.content(name).as_deref(), Some(b"mine".as_slice()), "{name}");
    }
}

#[test]
fn the_last_segment_number_there_is_does_no_harm() {
    let storage = SimStorage::default();
    let store = store_on(&storage);
    storage.put(&segment_name(u32::MAX), Some(b"an orphan"));
    take(&store, None, &mut model(8), &edit(1, 0..8)).unwrap();
    check_no_orphans(&storage);
}

#[test]
fn a_damaged_newest_segment_is_not_appended_to() {
    for damage in ["header", "missing", "short"] {
        let storage = SimStorage::default();
        take(&store_on(&storage), None, &mut model(64), &edit(1, 0..3)).unwrap();
        let name = segment_name(1);
        let mut bytes = storage.content(&name).unwrap();
        bytes[20] ^= 1;
        match damage {
            "header" => storage.put(&name, Some(&bytes)),
            "missing" => storage.put(&name, None),
            _ => storage.put(&name, Some(&bytes[..100])),
        }
        let store = store_on(&storage);
        let mut contents = model(64);
        let id = take(&store, None, &mut contents, &edit(2, 0..9));
        let id = id.unwrap_or_else(|error| panic!("{damage}: {error}")).id;
        // A new line of snapshots owes nothing to the damage.
        compare(&store_on(&storage), id, &contents)
            .unwrap_or_else(|error| panic!("{damage}: {error}"));
    }
}

#[test]
fn a_journal_without_its_header_is_named() {
    let storage = SimStorage::default();
    drop(store_on(&storage));
    for len in [0, 1, 63] {
        let bytes = storage.content("journal").unwrap();
        storage.put("journal", Some(&bytes[..len]));
        let error = Store::open_storage(Arc::new(storage.clone()), small_options()).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, StoreError::Corrupt { .. }) && text.contains("journal"), "{text}");
        storage.put("journal", Some(&bytes));
    }
}

#[test]
fn state_that_could_not_be_read_back_is_not_published() {
    let deep = |levels: usize| {
        (0..levels).fold(serde_json::json!(1), |inner, _| serde_json::json!([inner]))
    };
    let store = store_on(&SimStorage::default());
    for (step, levels) in (1..).zip([3, 100, 120, 126, 127, 128, 140, 300]) {
        let body =
            StateChunk { name: "deep".into(), kind: "test".into(), version: 1, body: deep(levels) };
        for in_stats in [false, true] {
            let mut description = Description {
                message: format!("{levels} {in_stats}"),
                time_unix_ms: step,
                ..Description::default()
            };
            if in_stats {
                description.stats = deep(levels);
            } else {
                description.state.push(body.clone());
            }
            if let Ok(committed) = store.begin(None).unwrap().commit(description) {
                let snapshot = store
                    .snapshot(committed.id)
                    .unwrap_or_else(|error| panic!("{levels}: {error}"));
                snapshot.states().unwrap_or_else(|error| panic!("{levels}: {error}"));
            } else {
                assert!(levels > 100, "{levels} levels are few");
            }
        }
    }
}

#[test]
fn no_cache_at_all_is_slow_but_right() {
    let storage = SimStorage::default();
    let options = StoreOptions {
        node_cache_bytes: 0,
        frame_cache_bytes: 0,
        frame_pages: 64,
        ..small_options()
    };
    let store = Store::open_or_create_storage(Arc::new(storage), options).unwrap();
    let mut contents = model(700);
    let id = take(&store, None, &mut contents, &edit(1, 10..300)).unwrap().id;
    check_all(&store, &[(id, contents)]);
}

#[test]
fn a_union_keeps_to_the_capacity() {
    let (mut small, mut large) = (PageSet::new(10), PageSet::new(64));
    large.insert_range(8, 20);
    small.union(&large);
    assert_eq!(small.iter().collect::<Vec<_>>(), [8, 9]);
    assert_eq!(small.count(), 2);
}

#[test]
fn cancelling_stops_at_once_and_leaves_nothing() {
    let storage = SimStorage::default();
    let store = store_on(&storage);
    let before = storage.used_bytes();
    let mut transaction = store.begin(None).unwrap();
    let region = transaction.region("ram", 400).unwrap();
    let mut set = PageSet::new(400);
    set.insert_range(0, 400);
    transaction.write_pages(region, &set, &Source(&[6; 400])).unwrap();
    transaction.progress().cancel();
    assert!(matches!(transaction.commit(describe(1)), Err(StoreError::Cancelled(_))));
    assert_eq!(storage.used_bytes(), before);
    assert_eq!(store.latest(), None);
}

#[test]
fn a_second_writer_is_told_who_holds_the_lock() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(folder.path(), small_options()).unwrap();
    let other = Store::open(folder.path(), small_options()).unwrap();
    let transaction = store.begin(None).unwrap();
    for busy in [&store, &other] {
        let error = busy.begin(None).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        assert!(matches!(busy.set_tag("x", None), Err(StoreError::Busy { .. })));
    }
    drop(transaction);
    drop(other.begin(None).unwrap());
}

#[test]
fn verify_reads_past_the_caches() {
    let storage = SimStorage::default();
    let store = Store::open_or_create_storage(
        Arc::new(storage.clone()),
        StoreOptions { workers: 1, ..StoreOptions::default() },
    )
    .unwrap();
    let mut contents = model(64);
    let id = take(&store, None, &mut contents, &edit(1, 0..20)).unwrap().id;
    compare(&store, id, &contents).unwrap();
    let file = frazil_snapstore::Storage::open(&storage, &segment_name(1), true).unwrap();
    let (start, end) = (64 + 100, 64 + 100 + PAGE_SIZE as u64);
    file.write_all_at(&vec![0; (end - start) as usize], start).unwrap();
    let report = verify(&store, &[id], &VerifyProgress::default()).unwrap();
    assert!(!report.damage.is_empty());
    assert!(report.damage[0].error.to_string().contains(&segment_name(1)));
}

/// A second line with the same pages has the same nodes, each written again. Nodes are cached by
/// hash, but damage to either copy must be found.
#[test]
fn damage_to_a_node_that_stands_twice_is_found() {
    let storage = SimStorage::default();
    let options = StoreOptions { segment_max_bytes: 1 << 20, ..small_options() };
    let store = Store::open_or_create_storage(Arc::new(storage.clone()), options).unwrap();
    let ids = [1, 2].map(|step| take(&store, None, &mut model(64), &edit(step, 0..7)).unwrap().id);
    let name = segment_name(1);
    let good = storage.content(&name).unwrap();
    let nodes: Vec<_> =
        read_segment(&good).into_iter().filter(|record| record.kind == KIND_NODE).collect();
    let [first, second] = nodes.as_slice() else { panic!("{} nodes", nodes.len()) };
    assert_eq!(good[first.offset..first.end()], good[second.offset..second.end()], "the same");
    for node in [first, second] {
        let mut bad = good.clone();
        bad[node.offset + 20] ^= 1;
        storage.put(&name, Some(&bad));
        let report = verify(&store, &ids, &VerifyProgress::default()).unwrap();
        let [damage] = report.damage.as_slice() else { panic!("{:?}", report.damage) };
        let place = format!("{name} is damaged at offset {}", node.offset);
        assert!(damage.error.to_string().contains(&place), "{}", damage.error);
    }
}

/// A process may have about a thousand files open, and a store of some hundred gigabytes has more.
#[test]
fn a_store_of_many_segments_keeps_few_files_open() {
    let storage = SimStorage::default();
    let options = StoreOptions { elide: Elide::NONE, ..small_options() };
    let store = Store::open_or_create_storage(Arc::new(storage.clone()), options).unwrap();
    let (mut contents, mut published) = (model(600), Vec::new());
    for step in 0..300 {
        let parent = published.last().map(|(id, _)| *id);
        let edit = edit(step, 2 * step..2 * step + 2);
        let id = take(&store, parent, &mut contents, &edit).unwrap().id;
        published.push((id, contents.clone()));
    }
    let segments = storage.files().len();
    assert!(segments > 300, "{segments} files");
    let ids: Vec<_> = published.iter().map(|(id, _)| *id).collect();
    drop(store);
    let reader = store_on(&storage);
    assert!(verify(&reader, &ids, &VerifyProgress::default()).unwrap().damage.is_empty());
    let (id, contents) = published.last().unwrap();
    compare(&reader, *id, contents).unwrap();
    let open = storage.most_open_files();
    assert!(open <= 200, "{open} files were open at a time");
}

/// After a failed sync the contents of a segment are in doubt, although a full medium does not
/// latch the handle.
#[test]
fn a_segment_whose_sync_failed_is_not_appended_to() {
    let storage = SimStorage::default();
    let options = StoreOptions { segment_max_bytes: 1 << 20, ..small_options() };
    let store = Store::open_or_create_storage(Arc::new(storage.clone()), options).unwrap();
    let mut contents = model(64);
    let first = take(&store, None, &mut contents, &edit(1, 0..5)).unwrap().id;
    let (name, used) = (segment_name(1), storage.files()[&segment_name(1)]);
    let failing = storage.clone();
    let full = FaultPlan { after: 0, fault: Fault::Enospc, lasting: false };
    storage.once(Op::Sync, &name, move || failing.fail(Some(full)));
    let mut second = contents.clone();
    let error = take(&store, Some(first), &mut second.clone(), &edit(2, 5..9)).unwrap_err();
    assert!(matches!(error, StoreError::DiskFull { .. }), "{error}");
    storage.fail(None);
    assert_eq!(storage.files()[&name], used, "the space came back");
    let id = take(&store, Some(first), &mut second, &edit(3, 5..9)).unwrap().id;
    assert_eq!(storage.files()[&name], used, "nothing is appended to it");
    for seed in 0..20 {
        check_all(
            &store_on(&storage.crash(seed)),
            &[(first, contents.clone()), (id, second.clone())],
        );
    }
}

/// The report tells the user which snapshot to forget.
#[test]
fn verify_names_the_snapshot_of_whatever_is_damaged() {
    let storage = SimStorage::default();
    let options = StoreOptions { segment_max_bytes: 1 << 20, ..small_options() };
    let store = Store::open_or_create_storage(Arc::new(storage.clone()), options).unwrap();
    let id = take(&store, None, &mut model(64), &edit(1, 0..20)).unwrap().id;
    let name = segment_name(1);
    let good = storage.content(&name).unwrap();
    let mut kinds = BTreeSet::new();
    for record in read_segment(&good) {
        let mut bad = good.clone();
        bad[record.end() - 1] ^= 1;
        storage.put(&name, Some(&bad));
        let report = verify(&store, &[id], &VerifyProgress::default()).unwrap();
        let [damage] = report.damage.as_slice() else { panic!("{:?}", report.damage) };
        assert_eq!(damage.snapshot, Some(id), "{}", damage.error);
        kinds.insert(record.kind);
    }
    assert!(kinds.len() >= 5, "frames, nodes, state, fingerprints and the manifest: {kinds:?}");
}

#[test]
fn levels_are_a_setting_and_noise_is_stored_as_it_is() {
    let text_len = |compression_level| {
        let storage = SimStorage::default();
        let options = StoreOptions {
            compression_level,
            frame_pages: 7,
            segment_max_bytes: 1 << 20,
            elide: Elide::NONE,
            ..small_options()
        };
        let store = Store::open_or_create_storage(Arc::new(storage.clone()), options).unwrap();
        // A frame of numbers that compress, and one of noise.
        let of = |page: u64| if page < 7 { 2 } else { 3 } + 3 * (page % 7) as u8;
        let pages = (0..14).map(|page| (page, of(page))).collect();
        let mut contents = model(64);
        let edit = Edit { rounds: vec![("ram".into(), pages)], step: 1 };
        let id = take(&store, None, &mut contents, &edit).unwrap().id;
        check_all(&store_on(&storage), &[(id, contents)]);
        let bytes = storage.content(&segment_name(1)).unwrap();
        let mut frames = read_segment(&bytes);
        frames.retain(|record| record.kind == KIND_FRAME);
        let [text, noise] = frames.as_slice() else { panic!("{} frames", frames.len()) };
        // The codec is the third byte of the header.
        assert_eq!((bytes[noise.offset + 2], noise.len), (0, BLOCK_HEADER_LEN + 7 * PAGE_SIZE));
        text.len
    };
    let lens = [-50, -1, 1, 19].map(text_len);
    assert!(lens[0] > lens[2] && lens[2] > lens[3], "{lens:?}");
}

/// Segments whose rollback failed are still open, since they were read while being written, to look
/// for equal pages. Another process removes them and reuses their numbers.
#[test]
fn a_number_that_is_used_again_is_not_looked_for_in_an_open_file() {
    let storage = SimStorage::default();
    let first = store_on(&storage);
    let mut set = PageSet::new(400);
    set.insert_range(0, 400);
    let contents: Vec<u8> = (0..400).map(|page| 1 + (page % 23) as u8).collect();
    let mut transaction = first.begin(None).unwrap();
    let region = transaction.region("ram", 400).unwrap();
    let stats = transaction.write_pages(region, &set, &Source(&contents)).unwrap();
    assert!(stats.dedup_pages > 0, "{stats:?}");
    storage.fail(Some(FaultPlan { after: 0, fault: Fault::Eio, lasting: true }));
    drop(transaction);
    storage.fail(None);
    let options = StoreOptions { elide: Elide::NONE, ..small_options() };
    let second = Store::open_storage(Arc::new(storage.clone()), options).unwrap();
    let mut contents = model(400);
    let id = take(&second, None, &mut contents, &edit(1, 0..60)).unwrap().id;
    first.refresh().unwrap();
    compare(&first, id, &contents).unwrap();
}

#[test]
fn many_make_one_store_at_once() {
    let folder = tempfile::tempdir().unwrap();
    for turn in 0..10 {
        let path = folder.path().join(turn.to_string());
        let made: Vec<_> = std::thread::scope(|scope| {
            let make = || Store::open_or_create(&path, small_options()).map(|_| ());
            let all: Vec<_> = (0..8).map(|_| scope.spawn(make)).collect();
            all.into_iter().map(|one| one.join().unwrap()).collect()
        });
        assert!(made.iter().all(Result::is_ok), "{made:?}");
    }
}
