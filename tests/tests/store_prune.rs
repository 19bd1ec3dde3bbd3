//! Forgetting and pruning: space comes back, live data are never lost, readers go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use frazil_snapstore::{
    DiffOptions, PageRange, PruneOptions, PruneProgress, SnapshotId, Store, StoreError,
    StoreOptions, diff,
};
use frazil_tests::format_reader::read_journal;
use frazil_tests::oracle::{
    Edit, Model, check_all, check_no_orphans, compare_snapshot, content, small_options, take,
};
use frazil_tests::rng::Rng;
use frazil_tests::storage_sim::{Op, SimStorage};

const PAGES: u64 = 700;
const ALL: PruneOptions =
    PruneOptions { max_unused: 0.0, max_rewrite_bytes: u64::MAX, dry_run: false };

struct Line {
    storage: SimStorage,
    store: Arc<Store>,
    model: Model,
    published: Vec<(SnapshotId, Model)>,
    rng: Rng,
}

impl Line {
    fn new(options: StoreOptions) -> Self {
        let storage = SimStorage::default();
        let store = Store::open_or_create_storage(Arc::new(storage.clone()), options).unwrap();
        let model = Model { regions: [("ram".to_owned(), vec![0; PAGES as usize])].into() };
        Self { storage, store, model, published: Vec::new(), rng: Rng::new(3) }
    }

    fn step(&mut self, pages: u64) {
        let mut random = || (self.rng.below(PAGES), 2 + self.rng.below(22) as u8);
        let pages = (0..pages).map(|_| random()).collect();
        let step = self.published.len() as u64;
        let edit = Edit { rounds: vec![("ram".into(), pages)], step };
        let parent = self.published.last().map(|(id, _)| *id);
        let id = take(&self.store, parent, &mut self.model, &edit).unwrap().id;
        self.published.push((id, self.model.clone()));
    }

    /// Forgets all snapshots but those whose index satisfies `keep`.
    fn thin(&mut self, keep: impl Fn(usize) -> bool) {
        let (kept, gone): (Vec<_>, Vec<_>) =
            self.published.drain(..).enumerate().partition(|(index, _)| keep(*index));
        self.published = kept.into_iter().map(|(_, snapshot)| snapshot).collect();
        let gone: Vec<SnapshotId> = gone.into_iter().map(|(_, (id, _))| id).collect();
        self.store.forget(&gone).unwrap();
    }

    fn prune(&self, options: &PruneOptions) -> frazil_snapstore::PruneReport {
        let report = self.store.prune(options, &PruneProgress::default()).unwrap();
        check_all(&self.store, &self.published);
        report
    }
}

#[test]
fn after_pruning_a_store_is_as_small_as_a_fresh_one() {
    let options = || StoreOptions {
        segment_max_bytes: 1 << 16,
        // With dedup, equal pages would be found in one of the stores and not in the other.
        elide: frazil_snapstore::Elide { dedup: false, ..frazil_snapstore::Elide::default() },
        ..small_options()
    };
    let mut line = Line::new(options());
    (0..60).for_each(|_| line.step(60));
    line.thin(|index| index == 59);
    let before = line.storage.used_bytes();
    line.prune(&ALL);
    let after = line.storage.used_bytes();
    let mut fresh = Line::new(options());
    fresh.model = line.model.clone();
    let all = fresh.model.regions["ram"].iter().enumerate();
    let pages = all.map(|(page, id)| (page as u64, *id)).collect();
    let edit = Edit { rounds: vec![("ram".into(), pages)], step: 0 };
    take(&fresh.store, None, &mut fresh.model, &edit).unwrap();
    let fresh = fresh.storage.used_bytes();
    println!("{before} bytes, {after} after pruning, {fresh} in a fresh store");
    assert!(before > 4 * after && after * 100 <= fresh * 110, "{before} {after} {fresh}");
}

#[test]
fn a_dry_run_changes_nothing_and_a_bound_is_kept() {
    let mut line = Line::new(small_options());
    (0..20).for_each(|_| line.step(40));
    line.thin(|index| index % 3 == 0);
    let (files, journal) = (line.storage.files(), line.storage.content("journal"));
    let dry = line.prune(&PruneOptions { dry_run: true, ..ALL });
    assert_eq!((&files, &journal), (&line.storage.files(), &line.storage.content("journal")));
    assert!(dry.segments_rewritten > 1 && dry.bytes_unused > 0, "{dry:?}");
    let none = line.prune(&PruneOptions { max_rewrite_bytes: 0, ..ALL });
    assert_eq!((none.segments_rewritten, none.bytes_rewritten), (0, 0));
    assert_eq!(none.segments_removed, dry.segments_removed);
    let some = line.prune(&PruneOptions { max_rewrite_bytes: 9000, ..ALL });
    assert!(some.segments_rewritten > 0 && some.segments_rewritten < dry.segments_rewritten);
    let all = line.prune(&ALL);
    assert!(all.segments_rewritten > 0);
    let again = line.prune(&ALL);
    assert_eq!((again.segments_removed, again.segments_rewritten), (0, 0), "{again:?}");
    assert!(again.bytes_unused <= again.bytes_live / 20, "{again:?}");
}

#[test]
fn readers_go_on_while_everything_moves_under_them() {
    let mut line = Line::new(small_options());
    (0..12).for_each(|_| line.step(50));
    let reader = Store::open_storage(
        Arc::new(line.storage.clone()),
        StoreOptions { frame_cache_bytes: 0, ..small_options() },
    )
    .unwrap();
    let (kept_id, kept_model) = line.published[6].clone();
    let (gone_id, gone_model) = line.published[5].clone();
    // Opened before the prune and read after it, without a refresh of the handle.
    let kept = reader.snapshot(kept_id).unwrap();
    let pinned = reader.pin(gone_id).unwrap();
    let unpinned = reader.snapshot(line.published[4].0).unwrap();
    line.thin(|index| index == 6 || index == 11);
    let report = line.prune(&ALL);
    assert_eq!((report.snapshots, report.pinned), (3, 1));
    compare_snapshot(&kept, &kept_model).unwrap();
    compare_snapshot(&pinned, &gone_model).unwrap();
    let region = unpinned.region("ram").unwrap();
    let mut pages = vec![0; PAGES as usize * 4096];
    match region.read_pages(0, &mut pages) {
        Ok(()) => panic!("what nobody holds on to is gone"),
        Err(error) => assert!(matches!(error, StoreError::Missing { .. }), "{error}"),
    }
    assert!(reader.pin(line.published[0].0).is_ok());
    let error = reader.pin(gone_id).unwrap_err();
    assert!(matches!(error, StoreError::UnknownRef { .. }), "{error}");
    drop(pinned);
    assert_eq!(line.prune(&ALL).pinned, 0);
}

/// Threads with handles of their own read pinned snapshots over and over, while another line of
/// snapshots is written, forgotten and pruned.
#[test]
fn readers_read_while_another_writes_forgets_and_prunes() {
    let mut line = Line::new(StoreOptions { segment_max_bytes: 1 << 15, ..small_options() });
    (0..6).for_each(|_| line.step(60));
    let uncached = || StoreOptions { frame_cache_bytes: 0, node_cache_bytes: 0, ..small_options() };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = [1, 3, 5]
            .map(|index| {
                let (id, model) = line.published[index].clone();
                let storage = Arc::new(line.storage.clone());
                let reader = Store::open_storage(storage, uncached()).unwrap();
                let pinned = reader.pin(id).unwrap();
                let done = &done;
                scope.spawn(move || {
                    let mut times = 0;
                    // Bounded, in case the writer fails.
                    while times < 3 || !done.load(Ordering::Relaxed) && times < 5000 {
                        compare_snapshot(&pinned, &model).unwrap();
                        times += 1;
                    }
                    times
                })
            })
            .into();
        let mut moved = 0;
        for _ in 0..30 {
            (0..4).for_each(|_| line.step(40));
            let newest = line.published.len() - 1;
            line.thin(|index| index == newest);
            let report = line.prune(&ALL);
            moved += report.segments_rewritten;
        }
        done.store(true, Ordering::Relaxed);
        let read: Vec<u64> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
        println!("{moved} segments were rewritten while snapshots were read {read:?} times");
        assert!(moved > 0);
    });
}

#[test]
fn a_line_goes_on_from_a_forgotten_snapshot_only_while_it_is_pinned() {
    let mut line = Line::new(small_options());
    (0..4).for_each(|_| line.step(50));
    let (head, mut model) = line.published[3].clone();
    let pin = line.store.pin(head).unwrap();
    line.thin(|index| index == 1);
    line.prune(&ALL);
    let edit = Edit { rounds: vec![("ram".into(), vec![(3, 4)])], step: 90 };
    let next = take(&line.store, Some(head), &mut model, &edit).unwrap().id;
    line.published.push((next, model.clone()));
    check_all(&line.store, &line.published);
    let parent = line.store.latest().unwrap().parent;
    assert_eq!(parent, Some(line.published[0].0), "the nearest ancestor that is kept");
    assert_eq!(line.store.resolve("latest~1").unwrap().id, line.published[0].0);
    drop(pin);
    let edit = Edit { rounds: Vec::new(), step: 91 };
    let error = take(&line.store, Some(head), &mut model, &edit).unwrap_err();
    assert!(matches!(error, StoreError::UnknownRef { .. }), "{error}");
}

#[test]
fn forgetting_takes_tags_along_and_refuses_what_is_not_there() {
    let mut line = Line::new(small_options());
    (0..3).for_each(|_| line.step(10));
    line.store.set_tag("gold", Some(line.published[1].0)).unwrap();
    let unknown = frazil_snapstore::Hash::of(b"nothing");
    let error = line.store.forget(&[line.published[0].0, unknown]).unwrap_err();
    assert!(matches!(error, StoreError::UnknownRef { .. }), "{error}");
    assert_eq!(line.store.snapshots().len(), 3, "all or nothing");
    line.thin(|index| index != 1);
    assert!(line.store.tags().is_empty());
    check_all(&line.store, &line.published);
    line.thin(|_| false);
    line.prune(&ALL);
    assert!(line.storage.files().keys().all(|name| !name.starts_with("segments/")));
    // A new line, from nothing.
    line.model.regions.get_mut("ram").unwrap().fill(0);
    line.step(20);
    check_all(&line.store, &line.published);
}

#[test]
fn damage_keeps_what_it_touches_and_stops_nothing_else() {
    let mut line =
        Line::new(StoreOptions { elide: frazil_snapstore::Elide::NONE, ..small_options() });
    (0..12).for_each(|_| line.step(40));
    line.thin(|index| index % 4 == 3);
    // A frame of the newest snapshot.
    let newest = line.store.snapshot(line.published[2].0).unwrap().region("ram").unwrap();
    let run = newest.runs(0, PAGES).unwrap()[0];
    let (frame, _) = run.location.block().unwrap();
    let name = frazil_snapstore::segment_name(frame.segment);
    let good = line.storage.content(&name).unwrap();
    let mut bad = good.clone();
    bad[frame.offset as usize + 20] ^= 4;
    line.storage.put(&name, Some(&bad));
    let fresh = Store::open_storage(Arc::new(line.storage.clone()), small_options()).unwrap();
    let report = fresh.prune(&ALL, &PruneProgress::default()).unwrap();
    assert_eq!(report.segments_skipped, 1, "{report:?}");
    assert!(report.segments_rewritten > 0, "{report:?}");
    assert_eq!(line.storage.content(&name), Some(bad), "it stays as it is");
    // A good copy of that file brings everything back.
    line.storage.put(&name, Some(&good));
    let fresh = Store::open_storage(Arc::new(line.storage.clone()), small_options()).unwrap();
    check_all(&fresh, &line.published);
}

#[test]
fn a_tree_that_cannot_be_read_stops_pruning_before_it_starts() {
    let mut line = Line::new(small_options());
    (0..6).for_each(|_| line.step(40));
    line.thin(|index| index != 2);
    let names: Vec<String> =
        line.storage.files().into_keys().filter(|name| name.ends_with(".seg")).collect();
    let name = names.last().unwrap();
    let mut bytes = line.storage.content(name).unwrap();
    let last = bytes.len() - 1;
    // The newest manifest is the last record there.
    bytes[last] ^= 1;
    line.storage.put(name, Some(&bytes));
    let files = line.storage.files();
    let fresh = Store::open_storage(Arc::new(line.storage.clone()), small_options()).unwrap();
    let error = fresh.prune(&ALL, &PruneProgress::default()).unwrap_err();
    assert!(error.to_string().contains(name.as_str()), "{error}");
    assert_eq!(line.storage.files(), files);
    // Once the damaged snapshot is forgotten, pruning works.
    fresh.forget(&[line.published.last().unwrap().0]).unwrap();
    fresh.prune(&ALL, &PruneProgress::default()).unwrap();
    line.published.pop();
    check_all(&fresh, &line.published);
}

#[test]
fn a_long_history_with_regular_pruning_stays_small() {
    let mut line = Line::new(StoreOptions { segment_max_bytes: 1 << 15, ..small_options() });
    let (mut journal, mut files) = (0, 0);
    for round in 0..60 {
        (0..10).for_each(|_| line.step(12));
        let newest = line.published.len();
        // The last five, and one of each ten before.
        line.thin(|index| index + 5 >= newest || index < 6);
        let all = PruneProgress::default();
        line.store.prune(&PruneOptions::default(), &all).unwrap();
        let now = line.storage.files();
        journal = now["journal"];
        files = now.len();
        if round == 20 || round == 59 {
            check_all(&line.store, &line.published);
        }
    }
    assert!(journal < 40_000, "the journal has {journal} bytes");
    assert!(files < 40, "{files} files");
}

/// A handle that has everything cached must not refer to blocks that are gone, after another handle
/// has forgotten and pruned and the journal was rewritten.
#[test]
fn what_others_pruned_is_not_referred_to() {
    let options = || StoreOptions { frame_cache_bytes: 8 << 20, ..small_options() };
    let mut line = Line::new(options());
    let all: Vec<(u64, u8)> = (0..PAGES).map(|page| (page, 2 + (page % 30) as u8)).collect();
    let edit = |step| Edit { rounds: vec![("ram".into(), all.clone())], step };
    let first = take(&line.store, None, &mut line.model, &edit(0)).unwrap().id;
    // Read back, so that the frames are cached and the files open.
    compare_snapshot(&line.store.snapshot(first).unwrap(), &line.model).unwrap();
    let other = Store::open_storage(Arc::new(line.storage.clone()), options()).unwrap();
    for step in 0..20 {
        other.set_tag(&format!("tag-{step}"), Some(first)).unwrap();
        other.set_tag(&format!("tag-{step}"), None).unwrap();
    }
    other.forget(&[first]).unwrap();
    other.prune(&ALL, &PruneProgress::default()).unwrap();
    assert_ne!(line.storage.content("journal").unwrap()[12], 0, "written anew");
    let again = take(&line.store, None, &mut line.model, &edit(1)).unwrap().id;
    let fresh = Store::open_storage(Arc::new(line.storage.clone()), options()).unwrap();
    check_all(&fresh, &[(again, line.model)]);
}

#[test]
fn a_cancelled_prune_keeps_what_it_did_and_can_be_run_again() {
    let mut line = Line::new(small_options());
    (0..12).for_each(|_| line.step(40));
    line.thin(|index| index % 4 == 3);
    let progress = PruneProgress::default();
    progress.cancel();
    let error = line.store.prune(&ALL, &progress).unwrap_err();
    assert!(matches!(error, StoreError::Cancelled(_)), "{error}");
    check_all(&line.store, &line.published);
    assert!(line.prune(&ALL).segments_rewritten > 0);
}

/// Cancelled in the middle of its work, a prune keeps what is done and does not begin the rest.
#[test]
fn a_prune_that_is_cancelled_halfway_leaves_whole_packs_only() {
    for (op, number, whole) in [(Op::Create, 1, 0), (Op::Sync, 1, 1), (Op::Create, 3, 2)] {
        let mut line = Line::new(small_options());
        (0..16).for_each(|_| line.step(40));
        line.thin(|index| index % 4 == 3);
        let progress = Arc::new(PruneProgress::default());
        let cancel = Arc::clone(&progress);
        line.storage.once(op, &frazil_snapstore::pack_name(number), move || cancel.cancel());
        let error = line.store.prune(&ALL, &progress).unwrap_err();
        assert!(matches!(error, StoreError::Cancelled(_)), "{error}");
        let files = line.storage.files();
        let packs = files.keys().filter(|name| name.ends_with(".pack")).count();
        assert_eq!(packs, whole, "{op:?} {number}: {files:?}");
        check_all(&line.store, &line.published);
        check_no_orphans(&line.storage);
        assert!(line.prune(&ALL).segments_rewritten > 0);
        check_no_orphans(&line.storage);
    }
}

/// A torn newest record may really be a damaged one, so its blocks stay, whatever is written next,
/// until the next prune.
#[test]
fn blocks_of_a_torn_record_survive_tags_and_checkpoints() {
    let mut line = Line::new(small_options());
    (0..4).for_each(|_| line.step(30));
    let good = line.storage.content("journal").unwrap();
    line.storage.put("journal", Some(&good[..good.len() - 5]));
    let files = line.storage.files();
    let store = Store::open_storage(Arc::new(line.storage.clone()), small_options()).unwrap();
    assert!(store.torn_journal_bytes() > 0);
    let newest = line.published.pop().unwrap();
    store.set_tag("gold", Some(line.published[2].0)).unwrap();
    let mut model = line.published[2].1.clone();
    let edit = Edit { rounds: vec![("ram".into(), vec![(1, 5)])], step: 70 };
    let id = take(&store, Some(line.published[2].0), &mut model, &edit).unwrap().id;
    line.published.push((id, model));
    check_all(&store, &line.published);
    for (name, len) in files.iter().filter(|(name, _)| name.starts_with("segments/")) {
        assert!(line.storage.files()[name] >= *len, "{name} lost something");
    }
    // Restoring the record brings the snapshot back.
    line.storage.put("journal", Some(&good));
    let repaired = Store::open_storage(Arc::new(line.storage.clone()), small_options()).unwrap();
    compare_snapshot(&repaired.snapshot(newest.0).unwrap(), &newest.1).unwrap();
}

#[test]
fn diffs_agree_with_a_naive_one() {
    let mut line = Line::new(small_options());
    (0..10).for_each(|step| line.step(if step == 4 { 500 } else { 25 }));
    for (a, before) in &line.published {
        for (b, after) in &line.published {
            let [a, b] = [a, b].map(|id| line.store.snapshot(*id).unwrap());
            let exact = diff(&a, &b, DiffOptions { exact: true }).unwrap();
            let found: Vec<u64> = pages(&exact.regions[0].ranges);
            let (old, new) = (&before.regions["ram"], &after.regions["ram"]);
            let naive: Vec<u64> = (0..PAGES)
                .filter(|page| content(old[*page as usize]) != content(new[*page as usize]))
                .collect();
            assert_eq!(found, naive);
            assert_eq!(exact.regions[0].changed_pages, naive.len() as u64);
            let quick = diff(&a, &b, DiffOptions::default()).unwrap();
            let quick_pages = pages(&quick.regions[0].ranges);
            assert!(
                naive.iter().all(|page| quick_pages.contains(page)),
                "it may say more, not less"
            );
            assert_eq!(a.id() == b.id(), quick.state.is_empty());
            assert!(a.id() != b.id() || quick_pages.is_empty());
        }
    }
}

fn pages(ranges: &[PageRange]) -> Vec<u64> {
    ranges.iter().flat_map(|range| range.first..range.first + range.count).collect()
}

/// However little room there is, and wherever it runs out: what a prune could not finish takes
/// none.
#[test]
fn a_full_medium_leaves_no_half_pack_and_no_half_journal() {
    let mut line = Line::new(small_options());
    (0..14).for_each(|_| line.step(40));
    line.thin(|index| index % 4 == 3);
    let good: Vec<(String, Vec<u8>)> = line
        .storage
        .files()
        .into_keys()
        .map(|name| (name.clone(), line.storage.content(&name).unwrap()))
        .collect();
    let (mut full, mut packs) = (0, 0);
    for room in (0..60_000).step_by(499) {
        let storage = SimStorage::default();
        good.iter().for_each(|(name, bytes)| storage.put(name, Some(bytes)));
        let store = Store::open_storage(Arc::new(storage.clone()), small_options()).unwrap();
        storage.set_capacity(Some(storage.used_bytes() + room));
        let pruned = store.prune(&ALL, &PruneProgress::default());
        storage.set_capacity(None);
        check_all(&store, &line.published);
        let files = storage.files();
        assert!(!files.contains_key("journal.new"), "{room} bytes of room: {files:?}");
        let Err(error) = pruned else { continue };
        assert!(matches!(error, StoreError::DiskFull { .. }), "{error}");
        full += 1;
        let named = read_journal(&storage.content("journal").unwrap()).packs;
        for (name, _) in files.iter().filter(|(name, _)| name.ends_with(".pack")) {
            let number = u32::from_str_radix(&name["segments/".len()..][..8], 16).unwrap();
            assert!(named.contains(&number), "{room} bytes of room: {name} is a pack of nothing");
            packs += 1;
        }
        // Again with room.
        store.prune(&ALL, &PruneProgress::default()).unwrap();
        check_all(&store, &line.published);
    }
    println!("{full} times full, {packs} packs written before");
    assert!(full > 5 && packs > 0, "{full} {packs}");
}

/// A crash left both an unfinished rewritten journal and one with a torn tail.
#[test]
fn an_unfinished_journal_beside_a_torn_one_stops_no_prune() {
    let mut line = Line::new(small_options());
    (0..12).for_each(|_| line.step(40));
    line.thin(|index| index == 11);
    let good = line.storage.content("journal").unwrap();
    line.storage.put("journal", Some(&[&good[..], b"torn"].concat()));
    line.storage.put("journal.new", Some(b"unfinished"));
    let fresh = Store::open_storage(Arc::new(line.storage.clone()), small_options()).unwrap();
    fresh.prune(&ALL, &PruneProgress::default()).unwrap();
    assert_eq!(line.storage.content("journal.new"), None);
    assert_ne!(line.storage.content("journal").unwrap()[12], 0, "written anew");
    check_all(&fresh, &line.published);
}

/// Rewriting the journal makes every reader read it again and drop its caches, so it must be worth
/// it.
#[test]
fn a_journal_that_says_nothing_in_vain_is_not_written_anew() {
    let elide = frazil_snapstore::Elide::NONE;
    let mut line = Line::new(StoreOptions { elide, ..small_options() });
    (0..24).for_each(|_| line.step(60));
    line.thin(|index| index % 2 == 1);
    line.prune(&ALL);
    let packs = line.storage.files().keys().filter(|name| name.ends_with(".pack")).count();
    assert!(packs > 8, "{packs} packs, a record each");
    let journal = line.storage.content("journal").unwrap();
    assert_ne!(journal[12], 0, "written anew");
    let report = line.prune(&PruneOptions::default());
    assert_eq!((report.segments_removed, report.segments_rewritten), (0, 0), "{report:?}");
    assert_eq!(line.storage.content("journal").unwrap(), journal);
}
