//! Stores written by earlier versions of frazil open for ever: they read as they did, and can be
//! written to and pruned.
//!
//! `cargo test -p frazil-tests --test golden -- --ignored` writes a store of the present version,
//! to be added when the format's version goes up. Existing golden stores never change.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use frazil_snapstore::{
    FORMAT_VERSION, Hash, PAGE_SIZE, PruneOptions, PruneProgress, SnapshotId, Store, StoreOptions,
    VerifyProgress, verify,
};
use frazil_tests::fixture::{everything, segment_files};
use frazil_tests::oracle::small_options;
use serde::{Deserialize, Serialize};

/// What a golden store must hold.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Expected {
    snapshots: Vec<ExpectedSnapshot>,
    tags: BTreeMap<String, SnapshotId>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct ExpectedSnapshot {
    id: SnapshotId,
    parent: Option<SnapshotId>,
    time_unix_ms: u64,
    name: String,
    message: String,
    /// Per region, its number of pages and the BLAKE3 of all of them.
    regions: BTreeMap<String, (u64, Hash)>,
    /// Per state chunk, its kind, version and body.
    state: BTreeMap<String, (String, u32, serde_json::Value)>,
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

fn read(store: &Arc<Store>) -> Expected {
    let snapshots = store.snapshots().into_iter().map(|info| {
        let snapshot = store.snapshot(info.id).expect("it opens");
        let manifest = snapshot.manifest();
        let regions = manifest.regions.iter().map(|region| {
            let mut bytes = vec![0; region.pages as usize * PAGE_SIZE];
            let reader = snapshot.region(&region.name).expect("it is listed");
            reader.read_pages(0, &mut bytes).expect("it can be read");
            (region.name.clone(), (region.pages, Hash::of(&bytes)))
        });
        let state = snapshot.states().expect("they can be read").into_iter();
        ExpectedSnapshot {
            id: info.id,
            parent: info.parent,
            time_unix_ms: info.time_unix_ms,
            name: manifest.name.clone(),
            message: manifest.message.clone(),
            regions: regions.collect(),
            state: state
                .map(|chunk| (chunk.name, (chunk.kind, chunk.version, chunk.body)))
                .collect(),
        }
    });
    Expected { snapshots: snapshots.collect(), tags: store.tags() }
}

fn copy_store(from: &Path, to: &Path) {
    fs::create_dir_all(to.join("segments")).unwrap();
    let files = ["FRAZIL".to_owned(), "journal".to_owned()];
    for name in files.iter().chain(&segment_files(from)) {
        fs::copy(from.join(name), to.join(name)).unwrap();
    }
}

#[test]
fn golden_stores_open_for_ever() {
    let mut versions = 0;
    for entry in fs::read_dir(golden()).expect("golden stores") {
        let folder = entry.expect("readable").path();
        let json = fs::read(folder.join("expected.json")).expect("what it must hold");
        let expected: Expected = serde_json::from_slice(&json).expect("JSON");
        // Opened in place: reading changes nothing, not even a lock file.
        let store = Store::open(&folder.join("store"), StoreOptions::default())
            .unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        assert_eq!(read(&store), expected, "{}", folder.display());
        let ids: Vec<SnapshotId> = expected.snapshots.iter().map(|snapshot| snapshot.id).collect();
        let report = verify(&store, &ids, &VerifyProgress::default()).unwrap();
        assert!(report.damage.is_empty(), "{}: {:?}", folder.display(), report.damage);
        go_on(&folder.join("store"), &expected);
        versions += 1;
    }
    assert!(versions >= FORMAT_VERSION, "a golden store for every version");
}

/// Writes to a copy of the store, forgets a snapshot, prunes, and checks that the rest is still
/// there.
fn go_on(folder: &Path, expected: &Expected) {
    let scratch = tempfile::tempdir().unwrap();
    copy_store(folder, scratch.path());
    let store = Store::open(scratch.path(), small_options()).unwrap();
    let newest = store.latest().unwrap();
    let mut transaction = store.begin(Some(newest.id)).unwrap();
    let regions = store.snapshot(newest.id).unwrap().manifest().regions.clone();
    for region in &regions {
        transaction.region(&region.name, region.pages).unwrap();
    }
    transaction.commit(frazil_tests::oracle::describe(77)).unwrap();
    store.forget(&[newest.id]).unwrap();
    let all = PruneOptions { max_unused: 0.0, ..PruneOptions::default() };
    store.prune(&all, &PruneProgress::default()).unwrap();
    let mut found = read(&store);
    let added = found.snapshots.pop().unwrap();
    let old = expected.snapshots.iter().find(|snapshot| snapshot.id == newest.id).unwrap();
    assert_eq!((&added.regions, added.parent), (&old.regions, old.parent));
    let kept = expected.snapshots.iter().filter(|snapshot| snapshot.id != newest.id);
    assert!(found.snapshots.iter().eq(kept));
}

#[test]
#[ignore = "writes a golden store of the present version"]
fn write_golden_store() {
    let folder = golden().join(format!("v{FORMAT_VERSION}"));
    assert!(!folder.exists(), "golden stores never change: {} is there", folder.display());
    let fixture = everything();
    copy_store(fixture.folder.path(), &folder.join("store"));
    let store = Store::open(&folder.join("store"), StoreOptions::default()).unwrap();
    let json = serde_json::to_vec_pretty(&read(&store)).unwrap();
    fs::write(folder.join("expected.json"), json).unwrap();
}
