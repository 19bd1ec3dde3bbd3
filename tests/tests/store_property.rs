//! Random histories of a store against a naive oracle: rounds of writing, branches, abandoned and
//! failed transactions, full media, two handles, tags, forgetting, pruning, pins.

use std::collections::BTreeMap;
use std::sync::Arc;

use frazil_snapstore::{
    Elide, PageSet, PruneOptions, PruneProgress, Snapshot, SnapshotId, Store, StoreError,
    StoreOptions,
};
use frazil_tests::oracle::{
    CONTENTS, Edit, Model, Source, check_all, check_no_orphans, compare, compare_snapshot,
    small_options, take,
};
use frazil_tests::storage_sim::{Fault, FaultPlan, SimStorage};
use proptest::prelude::*;
use proptest::sample::Index;

/// A region with a single leaf and one with an inner node, with their numbers of pages.
const REGIONS: [(&str, u64); 2] = [("disk", 40), ("ram", 640)];

#[derive(Clone, Debug)]
enum Trouble {
    None,
    /// An operation fails, and perhaps all later ones.
    Fault(FaultPlan),
    /// The medium has this many bytes left.
    Full(u64),
}

#[derive(Clone, Debug)]
enum Step {
    Take {
        parent: Parent,
        rounds: Vec<Round>,
        trouble: Trouble,
    },
    Abandon {
        parent: Parent,
        round: Round,
        trouble: Trouble,
    },
    Tag {
        name: u8,
        target: Option<Index>,
    },
    /// Forgets the snapshots whose bit is set.
    Forget(u64),
    Prune {
        max_unused: f64,
        max_rewrite_bytes: u64,
        trouble: Trouble,
    },
    /// Pins a snapshot instead of the one pinned before, or none.
    Pin(Option<Index>),
    Reopen,
    /// Replaces the handle by a new one, as of another process.
    Fresh,
}

#[derive(Clone, Debug)]
enum Parent {
    Newest,
    Any(Index),
    None,
}

/// Changes to one region: single pages, and a range of pages.
#[derive(Clone, Debug)]
struct Round {
    region: usize,
    pages: Vec<(Index, u8)>,
    range: Option<(Index, u64, u8)>,
}

fn round() -> impl Strategy<Value = Round> {
    let id = prop_oneof![2 => Just(0), 6 => 0..CONTENTS];
    let pages = proptest::collection::vec((any::<Index>(), id), 0..12);
    let range = proptest::option::of((any::<Index>(), 1_u64..60, 0..CONTENTS));
    (0..REGIONS.len(), pages, range).prop_map(|(region, pages, range)| Round {
        region,
        pages,
        range,
    })
}

fn parent() -> impl Strategy<Value = Parent> {
    prop_oneof![6 => Just(Parent::Newest), 2 => any::<Index>().prop_map(Parent::Any), 1 => Just(Parent::None)]
}

fn trouble() -> impl Strategy<Value = Trouble> {
    let fault = prop_oneof![Just(Fault::Eio), Just(Fault::Enospc), Just(Fault::Torn)];
    let plan = (0_u64..12, fault, any::<bool>());
    prop_oneof![
        3 => Just(Trouble::None),
        3 => plan.prop_map(|(after, fault, lasting)| Trouble::Fault(FaultPlan { after, fault, lasting })),
        1 => (0_u64..100_000).prop_map(Trouble::Full),
        1 => (0_u64..2000).prop_map(Trouble::Full),
    ]
}

fn step() -> impl Strategy<Value = (usize, Step)> {
    let take = (parent(), proptest::collection::vec(round(), 0..4), trouble())
        .prop_map(|(parent, rounds, trouble)| Step::Take { parent, rounds, trouble });
    let abandon = (parent(), round(), trouble())
        .prop_map(|(parent, round, trouble)| Step::Abandon { parent, round, trouble });
    let tag = (0_u8..3, proptest::option::of(any::<Index>()))
        .prop_map(|(name, target)| Step::Tag { name, target });
    let rewrite = prop::sample::select(vec![0, 3000, u64::MAX]);
    let prune = (prop::sample::select(vec![0.0, 0.3]), rewrite, trouble()).prop_map(
        |(max_unused, max_rewrite_bytes, trouble)| Step::Prune {
            max_unused,
            max_rewrite_bytes,
            trouble,
        },
    );
    let pin = proptest::option::of(any::<Index>()).prop_map(Step::Pin);
    let step = prop_oneof![
        8 => take, 2 => abandon, 1 => tag, 1 => Just(Step::Reopen), 1 => Just(Step::Fresh),
        2 => any::<u64>().prop_map(Step::Forget), 3 => prune, 1 => pin,
    ];
    (0_usize..2, step)
}

/// The real store and the naive one, side by side.
struct Pair {
    storage: SimStorage,
    /// Two handles, as of two processes on one medium.
    handles: [Arc<Store>; 2],
    options: StoreOptions,
    published: Vec<(SnapshotId, Model)>,
    tags: BTreeMap<String, SnapshotId>,
    /// The pinned snapshot, forgotten or not.
    pinned: Option<(Snapshot, Model)>,
    steps: u64,
    /// True if the medium must hold no orphans; false after a torn journal or a doubtful segment,
    /// which make the store careful.
    tidy: bool,
}

impl Pair {
    fn new(options: StoreOptions) -> Self {
        let storage = SimStorage::default();
        let open =
            || Store::open_or_create_storage(Arc::new(storage.clone()), options.clone()).unwrap();
        let handles = [open(), open()];
        Self {
            storage,
            handles,
            options,
            published: Vec::new(),
            tags: BTreeMap::new(),
            pinned: None,
            steps: 0,
            tidy: true,
        }
    }

    fn base(&self, parent: &Parent) -> (Option<SnapshotId>, Model) {
        let found = match parent {
            Parent::Newest => self.published.last(),
            Parent::Any(index) if !self.published.is_empty() => Some(index.get(&self.published)),
            Parent::Any(_) | Parent::None => None,
        };
        let empty =
            || REGIONS.map(|(name, pages)| (name.to_owned(), vec![0; pages as usize])).into();
        found.map_or_else(
            || (None, Model { regions: empty() }),
            |(id, model)| (Some(*id), model.clone()),
        )
    }

    fn arm(&self, trouble: &Trouble) {
        match trouble {
            Trouble::None => {}
            Trouble::Fault(plan) => self.storage.fail(Some(*plan)),
            Trouble::Full(left) => {
                self.storage.set_capacity(Some(self.storage.used_bytes() + left));
            }
        }
    }

    fn disarm(&self) {
        self.storage.fail(None);
        self.storage.set_capacity(None);
    }

    fn run(&mut self, handle: usize, step: &Step) {
        self.steps += 1;
        match step {
            Step::Take { parent, rounds, trouble } => self.take(handle, parent, rounds, trouble),
            Step::Abandon { parent, round, trouble } => {
                self.abandon(handle, parent, round, trouble);
            }
            Step::Tag { name, target } => self.tag(handle, *name, target.as_ref()),
            Step::Forget(which) => self.forget(handle, *which),
            Step::Prune { max_unused, max_rewrite_bytes, trouble } => {
                let options = PruneOptions {
                    max_unused: *max_unused,
                    max_rewrite_bytes: *max_rewrite_bytes,
                    dry_run: false,
                };
                self.prune(handle, &options, trouble);
            }
            Step::Pin(which) => self.pin(handle, which.as_ref()),
            Step::Reopen => {
                self.handles[handle].reopen().unwrap();
                // Reopening leaves the newest segment alone, and so what a failed rollback left
                // there.
                self.tidy = false;
            }
            Step::Fresh => {
                let storage = Arc::new(self.storage.clone());
                self.handles[handle] = Store::open_storage(storage, self.options.clone()).unwrap();
            }
        }
        self.handles[handle].refresh().unwrap();
        // The full check uses the handle that did not write, which has none of the new data cached.
        let [writer, other] = [handle, 1 - handle].map(|index| &self.handles[index]);
        other.refresh().unwrap();
        check_all(other, &self.published);
        for handle in [writer, other] {
            let found: Vec<_> = handle.snapshots().iter().map(|info| info.id).collect();
            let expected: Vec<_> = self.published.iter().map(|(id, _)| *id).collect();
            assert_eq!(found, expected);
            assert_eq!(handle.tags(), self.tags);
        }
        if let Some((id, model)) = self.published.last() {
            compare(writer, *id, model).unwrap();
        }
        if let Some((snapshot, model)) = &self.pinned {
            compare_snapshot(snapshot, model).unwrap();
        }
    }

    fn forget(&mut self, handle: usize, which: u64) {
        let mut index = 0;
        let gone = self.published.iter().map(|(id, _)| *id).filter(|_| {
            index += 1;
            which >> (index % 64) & 1 == 1
        });
        let gone: Vec<SnapshotId> = gone.collect();
        self.handles[handle].forget(&gone).unwrap();
        self.published.retain(|(id, _)| !gone.contains(id));
        self.tags.retain(|_, id| !gone.contains(id));
    }

    fn prune(&mut self, handle: usize, options: &PruneOptions, trouble: &Trouble) {
        let store = Arc::clone(&self.handles[handle]);
        let progress = PruneProgress::default();
        let dry = store.prune(&PruneOptions { dry_run: true, ..*options }, &progress).unwrap();
        self.arm(trouble);
        let pruned = store.prune(options, &progress);
        self.disarm();
        match pruned {
            Ok(report) => {
                assert_eq!(
                    (report.bytes_live, report.segments_removed, report.segments_rewritten),
                    (dry.bytes_live, dry.segments_removed, dry.segments_rewritten),
                );
                check_no_orphans(&self.storage);
                self.tidy = true;
            }
            Err(error) => {
                assert!(!matches!(trouble, Trouble::None), "it failed for no reason: {error}");
                if let Err(refused) = store.begin(None) {
                    assert!(matches!(refused, StoreError::Latched { .. }), "{refused}");
                    store.reopen().unwrap();
                }
                self.tidy = false;
                // Again without trouble. The first prune after a torn record keeps what that may
                // have named.
                if store.torn_journal_bytes() > 0 {
                    store.prune(options, &progress).expect("the next one works");
                }
                store.prune(options, &progress).expect("the next one works");
                check_no_orphans(&self.storage);
            }
        }
    }

    fn pin(&mut self, handle: usize, which: Option<&Index>) {
        self.pinned = which.filter(|_| !self.published.is_empty()).map(|index| {
            let (id, model) = index.get(&self.published);
            (self.handles[handle].pin(*id).unwrap(), model.clone())
        });
    }

    fn take(&mut self, handle: usize, parent: &Parent, rounds: &[Round], trouble: &Trouble) {
        let store = Arc::clone(&self.handles[handle]);
        let (base, before) = self.base(parent);
        let edit = Edit { rounds: rounds.iter().map(pages_of).collect(), step: self.steps };
        let used = self.storage.used_bytes();
        self.arm(trouble);
        let mut model = before.clone();
        let taken = take(&store, base, &mut model, &edit);
        self.disarm();
        match taken {
            Ok(committed) => {
                self.published.push((committed.id, model));
                if self.tidy && store.torn_journal_bytes() == 0 {
                    check_no_orphans(&self.storage);
                }
            }
            Err(error) => {
                assert!(!matches!(trouble, Trouble::None), "it failed for no reason: {error}");
                let lasting = matches!(trouble, Trouble::Fault(plan) if plan.lasting);
                if matches!(trouble, Trouble::Full(_)) {
                    assert!(matches!(error, StoreError::DiskFull { .. }), "{error}");
                    assert!(self.storage.used_bytes() <= used, "space was not given back");
                }
                self.recover(handle, &error, lasting.then_some(&model));
                // Again without trouble.
                self.steps += 1;
                let edit = Edit { step: self.steps, ..edit };
                let mut model = before;
                let committed = take(&store, base, &mut model, &edit).expect("the next one works");
                self.published.push((committed.id, model));
            }
        }
    }

    /// Makes the store usable again after `error`. If all later operations failed too, `doubtful`
    /// is the model of the snapshot that may or may not have been published.
    fn recover(&mut self, handle: usize, error: &StoreError, doubtful: Option<&Model>) {
        let store = &self.handles[handle];
        if let Err(refused) = store.begin(None) {
            assert!(matches!(refused, StoreError::Latched { .. }), "{refused} after {error}");
            assert!(error.latches() || doubtful.is_some(), "latched by {error}");
            store.reopen().unwrap();
            self.tidy = false;
        }
        // If not even undoing the record worked, the snapshot may have been published.
        store.refresh().unwrap();
        self.tidy &= store.torn_journal_bytes() == 0;
        if let (Some(model), Some(newest)) = (doubtful, store.snapshots().get(self.published.len()))
        {
            self.published.push((newest.id, model.clone()));
        }
    }

    fn abandon(&mut self, handle: usize, parent: &Parent, round: &Round, trouble: &Trouble) {
        let store = Arc::clone(&self.handles[handle]);
        let (base, mut model) = self.base(parent);
        let (name, pages) = pages_of(round);
        let contents = model.regions.get_mut(&name).unwrap();
        let mut set = PageSet::new(contents.len() as u64);
        for (page, id) in pages {
            set.insert(page);
            contents[page as usize] = id;
        }
        self.arm(trouble);
        if let Ok(mut transaction) = store.begin(base) {
            let region = transaction.region(&name, contents.len() as u64).unwrap();
            let written = transaction.write_pages(region, &set, &Source(contents));
            assert!(written.is_ok() || !matches!(trouble, Trouble::None));
        }
        self.disarm();
        drop(store.begin(None).expect("nothing latches before a commit"));
    }

    fn tag(&mut self, handle: usize, name: u8, target: Option<&Index>) {
        let target = target.filter(|_| !self.published.is_empty());
        let target = target.map(|index| index.get(&self.published).0);
        let name = format!("tag-{name}");
        let store = &self.handles[handle];
        store.set_tag(&name, target).unwrap();
        match target {
            Some(id) => {
                assert_eq!(store.resolve(&name).unwrap().id, id);
                self.tags.insert(name, id);
            }
            None => {
                self.tags.remove(&name);
            }
        }
    }
}

fn pages_of(round: &Round) -> (String, Vec<(u64, u8)>) {
    let (name, count) = REGIONS[round.region];
    let single = round.pages.iter().map(|(index, id)| (index.index(count as usize) as u64, *id));
    let range = round.range.iter().flat_map(|(index, len, id)| {
        let first = index.index(count as usize) as u64;
        // Neighbours differ, so that an off-by-one slot is noticed; content 0 stays a run of zeros.
        let next =
            move |page: u64| if *id == 0 { 0 } else { (u64::from(*id) + page) as u8 % CONTENTS };
        (first..(first + len).min(count)).map(move |page| (page, next(page)))
    });
    (name.to_owned(), single.chain(range).collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_store_agrees_with_a_naive_one(
        steps in proptest::collection::vec(step(), 1..12),
        frame_pages in prop::sample::select(vec![1_usize, 3, 16, 64]),
        workers in 1_usize..3,
        [zero, equal, dedup, delta] in any::<[bool; 4]>(),
    ) {
        let elide = Elide { zero, equal, dedup, delta };
        let mut pair = Pair::new(StoreOptions { frame_pages, workers, elide, ..small_options() });
        for (handle, step) in &steps {
            pair.run(*handle, step);
        }
    }
}

/// Regions large enough that pending runs move down two levels, with overwrites on the way.
#[test]
fn deep_trees_agree_with_a_naive_store() {
    const PAGES: u64 = 40_000;
    let storage = SimStorage::default();
    let options =
        StoreOptions { frame_pages: 64, workers: 2, segment_max_bytes: 1 << 20, ..small_options() };
    let store = Store::open_or_create_storage(Arc::new(storage.clone()), options).unwrap();
    let mut model = Model { regions: [("ram".to_owned(), vec![0; PAGES as usize])].into() };
    let mut published: Vec<(SnapshotId, Model)> = Vec::new();
    // (stride, offset, content): many single runs, zeros over data, data over zeros.
    for (step, (stride, offset, id)) in
        [(7, 0, 4), (7, 3, 1), (14, 0, 0), (9, 1, 7), (7, 3, 0), (11, 2, 10)]
            .into_iter()
            .enumerate()
    {
        let pages = (offset..PAGES).step_by(stride).map(|page| (page, id)).collect();
        let edit = Edit { rounds: vec![("ram".into(), pages)], step: step as u64 };
        let parent = published.last().map(|(id, _)| *id);
        let committed = take(&store, parent, &mut model, &edit).unwrap();
        assert!(step > 0 || committed.nodes > 10, "the first snapshot is more than a root");
        published.push((committed.id, model.clone()));
    }
    check_all(&store, &published);
    check_no_orphans(&storage);
}

/// Wherever a prune that moves blocks is torn, later prunes remove what it left behind, once
/// nothing can refer to that.
#[test]
fn what_a_torn_prune_leaves_behind_goes() {
    for after in 0..60 {
        let elide = Elide { zero: false, equal: false, dedup: false, delta: false };
        let mut pair =
            Pair::new(StoreOptions { frame_pages: 3, workers: 1, elide, ..small_options() });
        // Pages overwritten before they were published are unused.
        let pages = |id| (0..12).map(move |page| (page, id)).collect();
        let rounds = vec![("ram".into(), pages(3)), ("ram".into(), pages(1))];
        let mut model = Model { regions: [("ram".to_owned(), vec![0; 12])].into() };
        let store = Arc::clone(&pair.handles[0]);
        let committed = take(&store, None, &mut model, &Edit { rounds, step: 1 }).unwrap();
        pair.published.push((committed.id, model));
        let options = PruneOptions { max_unused: 0.0, max_rewrite_bytes: 3000, dry_run: false };
        let plan = FaultPlan { after, fault: Fault::Torn, lasting: true };
        pair.prune(0, &options, &Trouble::Fault(plan));
    }
}
