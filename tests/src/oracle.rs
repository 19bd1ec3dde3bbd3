//! A naive model of a store (per snapshot, what every page of every region holds), and checks that
//! a real store agrees with it.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, OnceLock};

use frazil_snapstore::{
    Committed, Description, Location, PAGE_SIZE, Page, PageSet, PageSource, Result, Snapshot,
    SnapshotId, StateChunk, Store, StoreOptions, VerifyProgress, verify,
};

use crate::format_reader::read_journal;
use crate::rng::Rng;
use crate::storage_sim::SimStorage;

/// Number of different page contents the tests use; 0 is the zero page.
pub const CONTENTS: u8 = 36;
/// Contents from this id on are noise pages with a few bytes changed.
const NEAR: u8 = 24;

/// Returns the page that `id` stands for: all zero, nearly zero, compressible, noise, or slightly
/// different from another page.
///
/// # Panics
/// If `id` is [`CONTENTS`] or more.
#[must_use]
pub fn content(id: u8) -> &'static Page {
    static TABLE: OnceLock<Vec<Page>> = OnceLock::new();
    let table = TABLE.get_or_init(|| (0..CONTENTS).map(make_content).collect());
    &table[usize::from(id)]
}

fn make_content(id: u8) -> Page {
    if id >= NEAR {
        // Three variants of each of four noise pages.
        let mut page = make_content(3 * (1 + (id - NEAR) % 4));
        page[usize::from(id) * 100..][..5].copy_from_slice(&[id; 5]);
        return page;
    }
    let mut page = [0; PAGE_SIZE];
    let mut rng = Rng::new(u64::from(id));
    match (id, id % 3) {
        (0, _) => {}
        (1, _) => page[PAGE_SIZE - 1] = 1,
        (_, 0) => page.iter_mut().for_each(|byte| *byte = rng.bits() as u8),
        (_, 1) => page.fill(id),
        _ => {
            let words = page.chunks_exact_mut(8).enumerate();
            words.for_each(|(index, word)| {
                word.copy_from_slice(&(rng.bits() % (index as u64 + 2)).to_le_bytes());
            });
        }
    }
    page
}

/// The contents of a snapshot: per region, the content id of each page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    /// Content ids by region name.
    pub regions: BTreeMap<String, Vec<u8>>,
}

/// The pages of one region as a source for the store.
#[derive(Debug)]
pub struct Source<'a>(pub &'a [u8]);

impl PageSource for Source<'_> {
    fn read_page(&self, page: u64, buf: &mut Page) -> io::Result<()> {
        let id = self.0.get(page as usize).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(content(*id));
        Ok(())
    }
}

/// The changes from one snapshot to the next.
#[derive(Clone, Debug)]
pub struct Edit {
    /// Per round: the region's name, and its pages with their new content ids.
    pub rounds: Vec<(String, Vec<(u64, u8)>)>,
    /// Makes the manifest unique.
    pub step: u64,
}

/// Options under which even small stores have several frames and segments.
#[must_use]
pub fn small_options() -> StoreOptions {
    StoreOptions {
        frame_pages: 4,
        segment_max_bytes: 1 << 13,
        workers: 1,
        node_cache_bytes: 4 << 20,
        frame_cache_bytes: 4 << 20,
        pending_runs: 6,
        ..StoreOptions::default()
    }
}

/// Takes a snapshot on `parent`: applies `edit` to `model` (the parent's model, which names all
/// regions) and writes the changed pages to the store.
///
/// # Errors
/// The store's.
pub fn take(
    store: &Arc<Store>,
    parent: Option<SnapshotId>,
    model: &mut Model,
    edit: &Edit,
) -> Result<Committed> {
    let mut transaction = store.begin(parent)?;
    let mut handles = BTreeMap::new();
    for (name, pages) in &model.regions {
        handles.insert(name.clone(), transaction.region(name, pages.len() as u64)?);
    }
    for (name, pages) in &edit.rounds {
        let contents = model.regions.get_mut(name).expect("edits name regions of the model");
        let mut set = PageSet::new(contents.len() as u64);
        for (page, id) in pages {
            set.insert(*page);
            contents[*page as usize] = *id;
        }
        let stats = transaction.write_pages(handles[name], &set, &Source(contents))?;
        assert_eq!(stats.pages, set.count(), "every page of the set is written");
    }
    transaction.commit(describe(edit.step))
}

/// Returns everything but the pages of snapshot `step`.
#[must_use]
pub fn describe(step: u64) -> Description {
    let chunk = |name: &str, value: u64| StateChunk {
        name: name.into(),
        kind: "test".into(),
        version: 3,
        body: serde_json::json!({ "step": value, "text": "frazil ".repeat(20) }),
    };
    Description {
        tag: None,
        name: "oracle".into(),
        message: format!("step {step}"),
        time_unix_ms: 1_700_000_000_000 + step,
        // One chunk changes with every snapshot, the other seldom.
        state: vec![chunk("each", step), chunk("seldom", step / 8)],
        stats: serde_json::Value::Null,
        pin: false,
    }
}

/// Reads all of snapshot `id` in every way there is, and compares it with `model`.
///
/// # Errors
/// The store's, if something cannot be read.
///
/// # Panics
/// If anything differs.
pub fn compare(store: &Arc<Store>, id: SnapshotId, model: &Model) -> Result<()> {
    compare_snapshot(&store.snapshot(id)?, model)
}

/// As [`compare`], for an open snapshot.
///
/// # Errors
/// The store's, if something cannot be read.
///
/// # Panics
/// If anything differs.
pub fn compare_snapshot(snapshot: &Snapshot, model: &Model) -> Result<()> {
    let id = snapshot.id();
    let manifest = snapshot.manifest();
    let names: Vec<&String> = manifest.regions.iter().map(|region| &region.name).collect();
    assert_eq!(names, model.regions.keys().collect::<Vec<_>>(), "regions of {id}");
    let step = manifest.time_unix_ms - 1_700_000_000_000;
    assert_eq!(manifest.message, describe(step).message);
    assert_eq!(snapshot.states()?, describe(step).state, "state of {id}");
    for (name, contents) in &model.regions {
        let region = snapshot.region(name)?;
        assert_eq!(region.pages(), contents.len() as u64);
        let mut seen = vec![0_u8; contents.len()];
        for run in region.runs(0, u64::MAX)? {
            assert_ne!(run.location, Location::Zero);
            let mut bytes = vec![0xAA; run.count as usize * PAGE_SIZE];
            region.read_run(&run, &mut bytes)?;
            for (page, bytes) in (run.first..).zip(bytes.chunks(PAGE_SIZE)) {
                let expected = contents[page as usize];
                assert!(bytes == content(expected), "run page {page} of {name} in {id}");
                seen[page as usize] = expected;
            }
        }
        let mut all = vec![0xAA; contents.len() * PAGE_SIZE];
        region.read_pages(0, &mut all)?;
        for (number, expected) in contents.iter().enumerate() {
            let found = &all[number * PAGE_SIZE..][..PAGE_SIZE];
            assert!(found == content(*expected), "page {number} of {name} in {id}, in sequence");
        }
        assert!(&seen == contents, "runs of {name} in {id} miss pages");
        let mut page = [0xAA; PAGE_SIZE];
        for (number, expected) in contents.iter().enumerate() {
            region.read_page(number as u64, &mut page)?;
            assert!(&page == content(*expected), "page {number} of {name} in {id}");
        }
        assert!(region.read_page(contents.len() as u64, &mut page).is_err(), "beyond the region");
    }
    Ok(())
}

/// Checks that exactly the snapshots of `models` are published, and that they read back right and
/// verify clean.
///
/// # Panics
/// If not.
pub fn check_all(store: &Arc<Store>, models: &[(SnapshotId, Model)]) {
    let found: Vec<SnapshotId> = store.snapshots().iter().map(|info| info.id).collect();
    let expected: Vec<SnapshotId> = models.iter().map(|(id, _)| *id).collect();
    assert_eq!(found, expected, "published snapshots, in order");
    for (id, model) in models {
        compare(store, *id, model).unwrap_or_else(|error| panic!("snapshot {id}: {error}"));
    }
    let report = verify(store, &found, &VerifyProgress::default()).expect("verify runs");
    let torn = store.torn_journal_bytes() > 0;
    assert_eq!(report.damage.len(), usize::from(torn), "damage: {:?}", report.damage);
    assert_eq!(report.snapshots, found.len() as u64);
}

/// Checks that the medium holds no unpublished bytes: whatever lay behind the tail or was pruned is
/// gone.
///
/// # Panics
/// If there are such bytes.
pub fn check_no_orphans(storage: &SimStorage) {
    let journal = storage.content("journal").expect("a store has a journal");
    let state = read_journal(&journal);
    assert_eq!(state.len, journal.len(), "nothing behind the last record");
    let (last, tail) = state.tail.unwrap_or((0, 0));
    for (name, len) in &storage.files() {
        match name.strip_prefix("segments/").and_then(|name| name.split_once('.')) {
            None => assert!(["FRAZIL", "journal"].contains(&name.as_str()), "{name} is left over"),
            Some((digits, "pack")) => {
                let number = u32::from_str_radix(digits, 16).expect("a number");
                assert!(state.packs.contains(&number), "{name} is a pack of nothing");
            }
            Some((digits, _)) => {
                let number = u32::from_str_radix(digits, 16).expect("a number");
                assert!(number <= last, "{name} is behind the last segment {last}");
                assert!(!state.retired.contains(&number), "{name} was pruned");
                assert!(number != last || *len == tail, "{name} has {len} bytes, {tail} published");
            }
        }
    }
}
