//! The naive store: per snapshot, what every page of every region holds. And the checks that a
//! real store agrees with it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, OnceLock};

use frazil_snapstore::{
    Committed, Description, Location, PAGE_SIZE, Page, PageSet, PageSource, Result, SnapshotId,
    StateChunk, Store, StoreOptions, VerifyProgress, segment_name, verify,
};

use crate::format_reader::read_journal;
use crate::rng::Rng;
use crate::storage_sim::SimStorage;

/// Number of different page contents the tests use; 0 is the zero page.
pub const CONTENTS: u8 = 24;

/// The page that `id` stands for: all zero, nearly zero, text that compresses, and noise.
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

/// What a snapshot holds: per region, the content of each page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    /// Contents by region name.
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

/// One snapshot to be taken.
#[derive(Clone, Debug)]
pub struct Edit {
    /// Per round and region name: pages and their new contents.
    pub rounds: Vec<(String, Vec<(u64, u8)>)>,
    /// Makes the manifest unique.
    pub step: u64,
}

/// Options under which small stores have several frames and segments.
#[must_use]
pub fn small_options() -> StoreOptions {
    StoreOptions {
        frame_pages: 4,
        segment_max_bytes: 1 << 16,
        workers: 1,
        node_cache_bytes: 4 << 20,
        frame_cache_bytes: 4 << 20,
        ..StoreOptions::default()
    }
}

/// Takes a snapshot on `parent`: `model` (that of the parent, with all regions) is changed by
/// `edit` and written to the store.
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

/// What snapshot `step` is besides its pages.
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
    }
}

/// Compares all of snapshot `id`, read in every way there is, with `model`.
///
/// # Errors
/// The store's, if something cannot be read.
///
/// # Panics
/// If anything reads wrong.
pub fn compare(store: &Arc<Store>, id: SnapshotId, model: &Model) -> Result<()> {
    let snapshot = store.snapshot(id)?;
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
            let read = region.read_run(&run, |bytes| {
                assert_eq!(bytes.len() as u64, run.count * PAGE_SIZE as u64);
                for (page, bytes) in (run.first..).zip(bytes.chunks(PAGE_SIZE)) {
                    let expected = contents[page as usize];
                    assert!(bytes == content(expected), "run page {page} of {name} in {id}");
                    seen[page as usize] = expected;
                }
            })?;
            assert!(read.is_some(), "a run with contents has bytes");
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

/// Checks that exactly the snapshots of `models` are published, read right and verify clean.
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

/// Checks that the medium holds no bytes that nobody published. `dead_frames` says that pages
/// were written twice in one transaction, so that a segment may hold nothing that is in use.
///
/// # Panics
/// If there are such bytes.
pub fn check_no_orphans(storage: &SimStorage, store: &Arc<Store>, dead_frames: bool) {
    let journal = storage.content("journal").expect("a store has a journal");
    let (published, end) = read_journal(&journal);
    assert_eq!(end, journal.len(), "nothing behind the last record");
    let mut used: BTreeSet<u32> = BTreeSet::new();
    for publication in &published {
        used.extend([publication.manifest.0, publication.tail.0]);
        let snapshot = store.snapshot(frazil_snapstore::Hash(publication.id)).expect("published");
        let manifest = snapshot.manifest();
        used.extend(manifest.state.iter().map(|chunk| chunk.body.segment));
        for region in &manifest.regions {
            used.extend(region.root.map(|root| root.segment));
            let reader = snapshot.region(&region.name).expect("listed");
            for run in reader.runs(0, u64::MAX).expect("readable") {
                if let Location::Frame { frame, .. } = run.location {
                    used.insert(frame.segment);
                }
            }
        }
    }
    let (last, tail) = published.last().map_or((0, 0), |publication| publication.tail);
    for (name, len) in storage.files().iter().filter(|(name, _)| name.starts_with("segments/")) {
        let number = (1..=last).find(|number| segment_name(*number) == *name);
        let number = number.unwrap_or_else(|| panic!("{name} is behind the last segment {last}"));
        assert!(number != last || *len == tail, "{name} has {len} bytes, {tail} published");
        assert!(dead_frames || used.contains(&number), "{name} is used by nobody");
    }
}
