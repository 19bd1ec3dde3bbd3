//! Disks in snapshots, against a naive oracle: whatever writers do meanwhile, a snapshot holds
//! every byte of the disk as it was at the cut, and a disk resumed from the snapshot goes on from
//! there.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use frazil_snapstore::{
    Description, PAGE_SIZE, RegionReader, SnapshotId, Store, StoreOptions, Transaction,
    VerifyProgress, verify,
};
use frazil_tests::oracle::small_options;
use frazil_tests::rng::Rng;
use frazil_tests::storage_sim::SimStorage;
use frazil_vmm::VmmError;
use frazil_vmm::disk::{
    Disk, DiskConfig, DiskLine, FrozenDisk, OverlayOptions, SECTOR_BYTES, SavedDisk,
};
use frazil_vmm::state::{ChunkSet, chunk};
use proptest::prelude::*;
use tempfile::NamedTempFile;

const SECTOR: usize = SECTOR_BYTES as usize;
/// Three chunks of 64 pages; the last chunk and its last page are partial.
const SECTORS: usize = 8 * 150 + 5;
const PAGES: usize = SECTORS.div_ceil(8);
const PATIENCE: Duration = Duration::from_secs(20);
/// Sectors per block. Blocks belong to the writers in turn, and a page is not a whole number of
/// blocks, so writers share pages but never sectors.
const BLOCK: usize = 3;
const WRITERS: usize = 2;

/// A change to some sectors.
#[derive(Clone, Debug)]
struct Change {
    /// The first sector.
    at: usize,
    sectors: usize,
    /// `None` for zeros.
    seed: Option<u64>,
}

impl Change {
    /// Returns a change of the same sectors to other contents.
    fn again(&self, round: u64) -> Self {
        Self { seed: self.seed.map(|seed| seed ^ (round << 32)), ..self.clone() }
    }

    /// Returns the byte offset and the new contents, limited to one block.
    fn in_block(&self) -> (usize, Vec<u8>) {
        self.bytes(self.sectors.min(BLOCK - self.at % BLOCK).min(SECTORS - self.at))
    }

    fn anywhere(&self) -> (usize, Vec<u8>) {
        self.bytes(self.sectors.min(SECTORS - self.at))
    }

    fn bytes(&self, sectors: usize) -> (usize, Vec<u8>) {
        let mut bytes = vec![0; sectors * SECTOR];
        if let Some(seed) = self.seed {
            // Even seeds give noise, odd ones compressible data.
            let mut rng = Rng::new(seed);
            bytes.chunks_mut(8).for_each(|word| {
                let value = if seed % 2 == 0 { rng.bits() } else { rng.below(9) + 1 };
                word.copy_from_slice(&value.to_le_bytes());
            });
        }
        (self.at * SECTOR, bytes)
    }

    fn apply(&self, disk: &Disk, model: &Mutex<Vec<u8>>, (at, bytes): (usize, Vec<u8>)) {
        let request = disk.begin();
        let written = match self.seed {
            Some(_) => request.write_at(at as u64, &bytes),
            None => request.write_zeroes(at as u64, bytes.len() as u64),
        };
        written.unwrap();
        // Before the request ends, so that a drain finds disk and model in agreement.
        model.lock().unwrap()[at..at + bytes.len()].copy_from_slice(&bytes);
    }
}

#[derive(Clone, Debug)]
enum Fate {
    Published,
    /// The checkpoint fails before the cut (early), or after the disk has been written (late).
    FailedEarly,
    FailedLate,
}

#[derive(Clone, Debug)]
enum Step {
    Write(Vec<Change>),
    Read(usize, usize),
    /// A checkpoint, during which writers make these changes.
    Checkpoint(Vec<Change>, Fate),
    /// Resumes from this snapshot (modulo their number), or as `Open` if there is none.
    Resume(usize),
    /// Starts again from the file.
    Open,
}

fn change(sectors_max: usize) -> impl Strategy<Value = Change> {
    let seed = proptest::option::weighted(0.8, 0..u64::from(u32::MAX));
    (0..SECTORS, 1..=sectors_max, seed).prop_map(|(at, sectors, seed)| Change { at, sectors, seed })
}

fn step() -> impl Strategy<Value = Step> {
    // Mostly a few sectors, sometimes many pages.
    let change_of_any_size = prop_oneof![4 => change(20), 1 => change(SECTORS)];
    let fate = prop_oneof![
        5 => Just(Fate::Published), 1 => Just(Fate::FailedEarly), 1 => Just(Fate::FailedLate),
    ];
    let meanwhile = proptest::collection::vec(change(BLOCK), 0..40);
    prop_oneof![
        3 => proptest::collection::vec(change_of_any_size, 1..8).prop_map(Step::Write),
        2 => (0..SECTORS, 1..SECTORS).prop_map(|(at, sectors)| Step::Read(at, sectors)),
        4 => (meanwhile, fate).prop_map(|(changes, fate)| Step::Checkpoint(changes, fate)),
        1 => any::<usize>().prop_map(Step::Resume),
        1 => Just(Step::Open),
    ]
}

/// A disk and its naive model, side by side.
struct Pair {
    store: Arc<Store>,
    config: DiskConfig,
    options: OverlayOptions,
    /// The contents of the file.
    original: Vec<u8>,
    line: DiskLine,
    head: Option<SnapshotId>,
    model: Mutex<Vec<u8>>,
    published: Vec<(SnapshotId, Vec<u8>)>,
    steps: u64,
}

impl Pair {
    fn new(store: Arc<Store>, file: &NamedTempFile, options: OverlayOptions) -> Self {
        let original = std::fs::read(file.path()).unwrap();
        let config = DiskConfig { file: file.path().to_owned(), read_only: false, serial: None };
        let disk = Arc::new(Disk::open(0, &config, &options).unwrap());
        Self {
            store,
            config,
            options,
            model: Mutex::new(original.clone()),
            original,
            line: DiskLine::new(disk),
            head: None,
            published: Vec::new(),
            steps: 0,
        }
    }

    fn run(&mut self, step: &Step) {
        self.steps += 1;
        let disk = Arc::clone(self.line.disk());
        match step {
            Step::Write(changes) => {
                let apply = |change: &Change| change.apply(&disk, &self.model, change.anywhere());
                changes.iter().for_each(apply);
            }
            Step::Read(at, sectors) => {
                let mut found = vec![0xaa; (*sectors).min(SECTORS - at) * SECTOR];
                disk.begin().read_at((at * SECTOR) as u64, &mut found).unwrap();
                assert!(found == self.model.lock().unwrap()[at * SECTOR..][..found.len()]);
            }
            Step::Checkpoint(changes, fate) => self.checkpoint(&disk, changes, fate),
            Step::Resume(which) if !self.published.is_empty() => {
                let (id, contents) = self.published[which % self.published.len()].clone();
                self.go_on(resume(&self.store, id, &self.options), Some(id), contents);
            }
            Step::Open | Step::Resume(_) => {
                let disk = Disk::open(0, &self.config, &self.options).unwrap();
                self.go_on(disk, None, self.original.clone());
            }
        }
        let mut all = vec![0xaa; SECTORS * SECTOR];
        self.line.disk().begin().read_at(0, &mut all).unwrap();
        assert!(all == *self.model.lock().unwrap(), "what the guest reads after {step:?}");
    }

    fn go_on(&mut self, disk: Disk, head: Option<SnapshotId>, contents: Vec<u8>) {
        self.line = DiskLine::new(Arc::new(disk));
        self.head = head;
        self.model = Mutex::new(contents);
    }

    /// Takes a checkpoint as a machine does.
    fn checkpoint(&mut self, disk: &Arc<Disk>, changes: &[Change], fate: &Fate) {
        let mut transaction = self.store.begin(self.head).unwrap();
        let region = self.line.region(&mut transaction).unwrap();
        self.line.prepare();
        if matches!(fate, Fate::FailedEarly) {
            return;
        }
        let (before, changes) = changes.split_at(changes.len() / 4);
        before.iter().for_each(|change| change.apply(disk, &self.model, change.in_block()));
        let (frozen, contents) = self.cut_among_writers(disk, changes);
        let model = &self.model;
        std::thread::scope(|scope| {
            start_writers(scope, disk, model, changes);
            frozen.write_to(&mut transaction, region).unwrap();
        });
        if matches!(fate, Fate::FailedLate) {
            return;
        }
        let id = commit(transaction, disk, self.steps);
        self.line.record_published(&frozen);
        self.head = Some(id);
        drop(frozen);
        check(&self.store, id, &contents);
        self.published.push((id, contents));
    }

    fn cut_among_writers(&mut self, disk: &Arc<Disk>, changes: &[Change]) -> (FrozenDisk, Vec<u8>) {
        let (line, model) = (&mut self.line, &self.model);
        std::thread::scope(|scope| {
            start_writers(scope, disk, model, changes);
            let drained = disk.drain(PATIENCE).unwrap();
            let frozen = line.cut(&drained).unwrap();
            (frozen, model.lock().unwrap().clone())
        })
    }

    fn finish(self) {
        for (id, contents) in &self.published {
            check(&self.store, *id, contents);
            let disk = resume(&self.store, *id, &self.options);
            let mut all = vec![0xaa; SECTORS * SECTOR];
            disk.begin().read_at(0, &mut all).unwrap();
            assert!(&all == contents, "what a guest resumed from {id} reads");
        }
        let ids: Vec<_> = self.published.iter().map(|(id, _)| *id).collect();
        let report = verify(&self.store, &ids, &VerifyProgress::default()).unwrap();
        assert!(report.damage.is_empty(), "{:?}", report.damage);
        assert!(
            std::fs::read(&self.config.file).unwrap() == self.original,
            "the file is untouched"
        );
    }
}

/// Starts writers, each of which makes the changes to its own blocks several times.
fn start_writers<'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    disk: &'scope Disk,
    model: &'scope Mutex<Vec<u8>>,
    changes: &'scope [Change],
) {
    for writer in 0..WRITERS {
        scope.spawn(move || {
            for round in 0..5 {
                for change in changes.iter().map(|change| change.again(round)) {
                    let (at, bytes) = change.in_block();
                    if at / SECTOR / BLOCK % WRITERS == writer {
                        change.apply(disk, model, (at, bytes));
                    }
                }
            }
        });
    }
}

fn commit(transaction: Transaction, disk: &Disk, step: u64) -> SnapshotId {
    let description = Description {
        time_unix_ms: step,
        state: vec![chunk(disk.name(), disk.saved()).unwrap()],
        ..Description::default()
    };
    transaction.commit(description).unwrap().id
}

fn saved_and_region(store: &Arc<Store>, id: SnapshotId) -> (SavedDisk, RegionReader) {
    let snapshot = store.snapshot(id).unwrap();
    let mut chunks = ChunkSet::new(snapshot.states().unwrap()).unwrap();
    let saved: SavedDisk = chunks.take("disk0").unwrap();
    chunks.finish().unwrap();
    let region = snapshot.region(&saved.region).unwrap();
    (saved, region)
}

fn resume(store: &Arc<Store>, id: SnapshotId, options: &OverlayOptions) -> Disk {
    let (saved, region) = saved_and_region(store, id);
    Disk::resume(saved, region, options).unwrap()
}

/// Compares the disk in a snapshot with `contents`, and checks that the padding is zero.
fn check(store: &Arc<Store>, id: SnapshotId, contents: &[u8]) {
    let (saved, region) = saved_and_region(store, id);
    assert_eq!((saved.sectors, region.pages()), (SECTORS as u64, PAGES as u64));
    let mut found = vec![0xaa; PAGES * PAGE_SIZE];
    region.read_pages(0, &mut found).unwrap();
    let (found, padding) = found.split_at(contents.len());
    assert!(padding.iter().all(|byte| *byte == 0));
    let wrong: Vec<_> = found
        .chunks(SECTOR)
        .zip(contents.chunks(SECTOR))
        .enumerate()
        .filter_map(|(sector, (found, wanted))| (found != wanted).then_some(sector))
        .collect();
    assert!(wrong.is_empty(), "sectors {wrong:?} of {id}");
}

/// Makes a sparse file with the contents of `changes`.
fn file_with(changes: &[Change]) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len((SECTORS * SECTOR) as u64).unwrap();
    for change in changes {
        let (at, bytes) = change.anywhere();
        file.as_file().write_all_at(&bytes, at as u64).unwrap();
    }
    file
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn snapshots_hold_disks_as_they_were_at_the_cut(
        contents in proptest::collection::vec(change(300), 0..5),
        steps in proptest::collection::vec(step(), 1..16),
        kept_pages_max in prop::sample::select(vec![0, 3, 4096]),
        frame_pages in prop::sample::select(vec![1_usize, 16]),
        workers in 1_usize..3,
    ) {
        let store = StoreOptions { frame_pages, workers, ..small_options() };
        let store = Store::open_or_create_storage(Arc::new(SimStorage::default()), store).unwrap();
        let file = file_with(&contents);
        let mut pair = Pair::new(store, &file, OverlayOptions { folder: None, kept_pages_max });
        steps.iter().for_each(|step| pair.run(step));
        pair.finish();
    }
}

/// Generations and branches in a store on a real file system, with the overlay beside it.
#[test]
fn generations_and_branches_of_a_disk_in_a_real_store() {
    let folder = tempfile::tempdir().unwrap();
    let open =
        || Store::open_or_create(&folder.path().join("store"), StoreOptions::default()).unwrap();
    let overlays: PathBuf = folder.path().join("overlays");
    std::fs::create_dir(&overlays).unwrap();
    let mut rng = Rng::new(7);
    let mut changes = |count: usize, sectors_max: u64| -> Vec<Change> {
        let change = |rng: &mut Rng| Change {
            at: rng.below(SECTORS as u64) as usize,
            sectors: 1 + rng.below(sectors_max) as usize,
            seed: (!rng.chance(1)).then(|| rng.bits() >> 32),
        };
        (0..count).map(|_| change(&mut rng)).collect()
    };
    let file = file_with(&changes(4, 400));
    let options = OverlayOptions { folder: Some(overlays.clone()), kept_pages_max: 8 };
    let mut pair = Pair::new(open(), &file, options);
    for generation in 0..12_usize {
        pair.run(&Step::Write(changes(6, 60)));
        pair.run(&Step::Checkpoint(changes(60, 3), Fate::FailedLate));
        pair.run(&Step::Checkpoint(changes(60, 3), Fate::Published));
        // Every other generation branches off somewhere, with the store reopened as by another
        // process.
        if generation % 2 == 1 {
            pair.store = open();
            pair.run(&Step::Resume(generation * 5));
        }
    }
    assert_eq!(std::fs::read_dir(&overlays).unwrap().count(), 0);
    assert_eq!(pair.published.len(), 12);
    pair.finish();
}

#[test]
fn a_chunk_and_a_region_that_do_not_fit_are_refused() {
    let store =
        Store::open_or_create_storage(Arc::new(SimStorage::default()), small_options()).unwrap();
    let file = file_with(&[]);
    let options = OverlayOptions::default();
    let mut pair = Pair::new(Arc::clone(&store), &file, options.clone());
    pair.run(&Step::Checkpoint(Vec::new(), Fate::Published));
    let (good, region) = saved_and_region(&store, pair.published[0].0);
    let wrong = [
        SavedDisk { sectors: good.sectors + 8, ..good.clone() },
        SavedDisk { sectors: u64::MAX, ..good.clone() },
        SavedDisk { sectors: 0, ..good.clone() },
        SavedDisk { region: "disk1".into(), ..good.clone() },
        SavedDisk { serial: "\n".into(), ..good.clone() },
    ];
    for saved in wrong {
        let error = Disk::resume(saved.clone(), region.clone(), &options).unwrap_err();
        assert!(
            matches!(&error, VmmError::State { chunk, .. } if *chunk == saved.region),
            "{error}"
        );
    }
    // A read-only disk is read-only after resuming.
    let saved = SavedDisk { read_only: true, ..good };
    let disk = Disk::resume(saved, region, &options).unwrap();
    assert!(disk.begin().write_at(0, &[1; SECTOR]).is_err());
}
