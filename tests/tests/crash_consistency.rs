//! Lets power fail before every operation that changes the medium, keeping any part of what was not
//! synced. The store found afterwards is that before or that after the operation in progress.

use std::sync::Arc;

use frazil_snapstore::{PruneOptions, PruneProgress, SnapshotId, Store, StoreError};
use frazil_tests::oracle::{Edit, Model, check_all, check_no_orphans, small_options, take};
use frazil_tests::rng::Rng;
use frazil_tests::storage_sim::SimStorage;

const WORKLOADS: u64 = 6;
const STEPS: u64 = 9;
/// Different outcomes tried per crash; a multiple of 4 includes "nothing kept" and "all kept".
const SEEDS: u64 = 4;

/// Something that was made durable, with the medium's count of mutations before and after.
struct Event {
    kind: Kind,
    started: u64,
    done: u64,
}

enum Kind {
    Snapshot(SnapshotId, Model),
    Tag(&'static str, Option<SnapshotId>),
    Forget(Vec<SnapshotId>),
    Prune,
}

struct Recorded {
    storage: SimStorage,
    created: u64,
    events: Vec<Event>,
}

fn empty_model() -> Model {
    Model { regions: [("disk".to_owned(), vec![0; 24]), ("ram".to_owned(), vec![0; 600])].into() }
}

fn random_edit(rng: &mut Rng, step: u64) -> Edit {
    let mut rounds = Vec::new();
    for (name, pages, most) in [("ram", 600, 30), ("disk", 24, 6)] {
        let count = rng.below(most);
        // Mostly noise, so that segments fill up; now and then zeros.
        let mut content = || if rng.chance(1) { 0 } else { 3 * (1 + rng.below(7) as u8) };
        let contents: Vec<u8> = (0..count).map(|_| content()).collect();
        let pages = contents.into_iter().map(|id| (rng.below(pages), id)).collect();
        rounds.push((name.to_owned(), pages));
    }
    Edit { rounds, step }
}

fn open(storage: &SimStorage) -> Arc<Store> {
    Store::open_or_create_storage(Arc::new(storage.clone()), small_options())
        .expect("the store opens")
}

/// Runs a random workload on a medium that records each of its states.
fn record(seed: u64) -> Recorded {
    let mut rng = Rng::new(seed);
    let storage = SimStorage::default();
    storage.record();
    let store = open(&storage);
    let created = storage.mutations();
    let mut events = Vec::new();
    let mut published: Vec<(SnapshotId, Model)> = Vec::new();
    for step in 0..STEPS {
        let branch = published.get(rng.below(published.len() as u64 + 1) as usize);
        // Mostly on the newest, so that there are long lines; sometimes a branch, or a new line.
        let base = if rng.chance(6) { published.last() } else { branch };
        let (parent, mut model) =
            base.map_or((None, empty_model()), |(id, model)| (Some(*id), model.clone()));
        let edit = random_edit(&mut rng, step);
        let started = storage.mutations();
        if rng.chance(1) {
            // Abandoned: what this transaction wrote must not get in the way of later ones.
            let mut abandoned = store.begin(parent).unwrap();
            let region = abandoned.region("ram", 600).unwrap();
            let mut set = frazil_snapstore::PageSet::new(600);
            set.insert_range(0, 40);
            let source = frazil_tests::oracle::Source(&[9; 600]);
            abandoned.write_pages(region, &set, &source).unwrap();
            continue;
        }
        let id = take(&store, parent, &mut model, &edit).unwrap().id;
        published.push((id, model.clone()));
        events.push(Event { kind: Kind::Snapshot(id, model), started, done: storage.mutations() });
        if rng.chance(4) {
            forget_some(&storage, &store, &mut rng, &mut published, &mut events);
        }
        if rng.chance(4) {
            let max_unused = if rng.chance(6) { 0.0 } else { 0.3 };
            let options = PruneOptions { max_unused, ..PruneOptions::default() };
            let started = storage.mutations();
            let report = store.prune(&options, &PruneProgress::default()).unwrap();
            assert!(report.bytes_after <= report.bytes_before + 4096, "{report:?}");
            events.push(Event { kind: Kind::Prune, started, done: storage.mutations() });
        }
        if rng.chance(3) && published.iter().any(|(found, _)| *found == id) {
            let (started, target) = (storage.mutations(), rng.chance(6).then_some(id));
            store.set_tag("gold", target).unwrap();
            events.push(Event {
                kind: Kind::Tag("gold", target),
                started,
                done: storage.mutations(),
            });
        }
    }
    Recorded { storage, created, events }
}

fn forget_some(
    storage: &SimStorage,
    store: &Arc<Store>,
    rng: &mut Rng,
    published: &mut Vec<(SnapshotId, Model)>,
    events: &mut Vec<Event>,
) {
    // Seldom the newest, so that there are long lines with few old snapshots left.
    let newest = published.last().map(|(id, _)| *id);
    let some = published.iter().map(|(id, _)| *id);
    let some = some.filter(|id| rng.chance(if Some(*id) == newest { 1 } else { 4 }));
    let gone: Vec<SnapshotId> = some.collect();
    let started = storage.mutations();
    store.forget(&gone).unwrap();
    published.retain(|(id, _)| !gone.contains(id));
    events.push(Event { kind: Kind::Forget(gone), started, done: storage.mutations() });
}

/// Checks that `store` is the result of the events before mutation `index`, with or without the one
/// in progress; returns its snapshots.
fn check_prefix(store: &Arc<Store>, events: &[Event], index: u64) -> Vec<(SnapshotId, Model)> {
    let mut published = Vec::new();
    let mut gold = None;
    let torn = store.torn_journal_bytes() > 0;
    let busy = events.iter().any(|event| event.started < index && index < event.done);
    assert!(!torn || busy, "torn, and nothing was being written");
    for event in events.iter().take_while(|event| event.started < index) {
        let certain = event.done <= index;
        match &event.kind {
            Kind::Snapshot(id, model) => {
                let later = events.iter().filter(|event| event.started < index);
                let forgotten = later
                    .into_iter()
                    .any(|event| matches!(&event.kind, Kind::Forget(ids) if ids.contains(id)));
                let there = forgotten || store.resolve(&id.to_string()).is_ok();
                assert!(there || !certain, "snapshot {id} was committed, and is lost");
                if there {
                    published.push((*id, model.clone()));
                }
            }
            Kind::Prune => {}
            Kind::Forget(ids) => {
                let gone = ids.iter().all(|id| store.resolve(&id.to_string()).is_err());
                assert!(gone || !certain, "what was forgotten is back");
                if gone {
                    published.retain(|(id, _)| !ids.contains(id));
                    gold = gold.filter(|id| !ids.contains(id));
                }
            }
            Kind::Tag(_, target) if certain => gold = *target,
            Kind::Tag(name, target) => {
                let found = store.tags().get(*name).copied();
                assert!(found == gold || found == *target, "a tag is the old or the new one");
                gold = found;
            }
        }
    }
    assert_eq!(store.tags().get("gold").copied(), gold);
    check_all(store, &published);
    published
}

/// Takes a snapshot in a store found after a crash, and checks that the crash left nothing behind.
fn go_on(
    storage: &SimStorage,
    store: &Arc<Store>,
    published: &mut Vec<(SnapshotId, Model)>,
    step: u64,
    torn: bool,
) {
    let last = published.last().cloned();
    let (parent, mut model) = last.map_or((None, empty_model()), |(id, model)| (Some(id), model));
    let edit = Edit { rounds: vec![("ram".into(), vec![(step % 600, 3), (599, 6), (0, 0)])], step };
    let id = take(store, parent, &mut model, &edit).expect("a commit after the crash").id;
    published.push((id, model));
    assert_eq!(store.torn_journal_bytes(), 0, "the writer clears a torn tail away");
    if step.is_multiple_of(3) {
        // A prune can be run, whatever was interrupted.
        let all = PruneOptions { max_unused: 0.0, ..PruneOptions::default() };
        store.prune(&all, &PruneProgress::default()).expect("a prune after the crash");
        check_all(store, published);
        check_no_orphans(storage);
    }
    // The data that a torn record refers to is kept on purpose: it may be all that is left of a
    // snapshot.
    if !torn {
        check_no_orphans(storage);
    }
}

#[test]
fn a_crash_at_any_point_leaves_the_old_store_or_the_new_one() {
    let (mut crashes, mut torn, mut kept, mut packs, mut journals) = (0, 0, 0, 0, 0);
    for workload in 0..WORKLOADS {
        let Recorded { storage, created, events } = record(workload);
        packs += storage.files().keys().filter(|name| name.ends_with(".pack")).count();
        journals += u64::from(storage.content("journal").unwrap()[12]);
        for index in 0..=storage.mutations() {
            for seed in (0..SEEDS).map(|seed| seed + SEEDS * index) {
                let found = storage.crash_before(index, seed);
                let created = created <= index;
                let opened = Store::open_storage(Arc::new(found.clone()), small_options());
                match opened {
                    Ok(_) => {}
                    Err(StoreError::NotAStore { .. } | StoreError::Corrupt { .. }) if !created => {}
                    Err(error) => {
                        panic!("workload {workload}, before {index}, seed {seed}: {error}")
                    }
                }
                let store = open(&found);
                let mut published = check_prefix(&store, &events, index);
                crashes += 1;
                torn += u64::from(store.torn_journal_bytes() > 0);
                kept += u64::from(published.len() > certain(&events, index));
                crash_again(&found, &store, &mut published, seed);
            }
        }
    }
    println!(
        "{crashes} crashes, {torn} with a torn journal, {kept} that kept an unfinished commit"
    );
    assert!(torn > 0 && kept > 0, "the simulator must be able to tear and to keep");
    assert!(packs > 0 && journals > 0, "{packs} packs, {journals} journals written anew");
}

fn certain(events: &[Event], index: u64) -> usize {
    let done = events.iter().filter(|event| event.done <= index);
    done.filter(|event| matches!(event.kind, Kind::Snapshot(..))).count()
}

/// Goes on with the store, and lets power fail once more meanwhile.
fn crash_again(
    storage: &SimStorage,
    store: &Arc<Store>,
    published: &mut Vec<(SnapshotId, Model)>,
    seed: u64,
) {
    let before = published.clone();
    let torn = store.torn_journal_bytes() > 0;
    storage.record();
    go_on(storage, store, published, 900 + seed, torn);
    let index = Rng::new(seed).below(storage.mutations() + 1);
    let again = storage.crash_before(index, seed.wrapping_mul(31));
    let reopened = open(&again);
    let mut found =
        if reopened.snapshots().len() == before.len() { before } else { published.clone() };
    assert!(index < storage.mutations() || found.len() == published.len(), "the commit is lost");
    check_all(&reopened, &found);
    let torn = torn || reopened.torn_journal_bytes() > 0;
    go_on(&again, &reopened, &mut found, 901 + seed, torn);
    check_all(&reopened, &found);
}
