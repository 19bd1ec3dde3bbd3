//! A small store that uses every feature of the format.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use frazil_snapstore::{PruneOptions, PruneProgress, SnapshotId, Store, StoreOptions};
use tempfile::TempDir;

use crate::oracle::{Edit, Model, check_all, small_options, take};

/// The store, and what it must hold.
#[derive(Debug)]
pub struct Everything {
    /// The store's folder.
    pub folder: TempDir,
    /// The published snapshots, oldest first.
    pub published: Vec<(SnapshotId, Model)>,
    /// The models of all snapshots ever taken, including the forgotten ones.
    pub models: HashMap<SnapshotId, Model>,
    /// Names of the segments and packs, sorted.
    pub segments: Vec<String>,
}

/// Names of the segments and packs of the store at `root`, sorted.
///
/// # Panics
/// If there is no store.
#[must_use]
pub fn segment_files(root: &Path) -> Vec<String> {
    let files = fs::read_dir(root.join("segments")).expect("a store has segments");
    let name = |file: std::io::Result<fs::DirEntry>| file.expect("readable").file_name();
    let mut names: Vec<String> =
        files.map(|file| format!("segments/{}", name(file).display())).collect();
    names.sort();
    names
}

/// Makes a store that uses every feature of the format: frames, deltas, pages found elsewhere, zero
/// pages, several segments, a pack with regrouped frames, tags, forgotten snapshots. Nothing in its
/// files is unused, and little of it is incompressible, so that a test can flip every single bit.
///
/// # Panics
/// If the store does not work.
#[must_use]
pub fn everything() -> Everything {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let options = StoreOptions { segment_max_bytes: 1 << 12, ..small_options() };
    let store = Store::open_or_create(folder.path(), options).expect("it works");
    // "ram" is large enough for inner nodes, which keep some runs pending and push others down.
    let regions = [("disk".to_owned(), vec![0; 30]), ("ram".to_owned(), vec![0; 1300])];
    let mut model = Model { regions: regions.into() };
    let mut published: Vec<(SnapshotId, Model)> = Vec::new();
    let mut models = HashMap::new();
    // 3 is noise, 24 and up are noise with a few bytes changed, the rest compress.
    let rounds: [&[(u64, u8)]; 5] = [
        &[(0, 4), (1, 3), (2, 7), (3, 10), (20, 13), (21, 16), (600, 4), (602, 7), (604, 1)],
        &[(1, 24), (2, 19), (5, 3), (606, 4), (608, 4), (610, 7), (612, 10)],
        &[(1, 28), (3, 22), (4, 0), (60, 1), (602, 0), (1290, 4)],
        &[(0, 0), (2, 7), (69, 13), (20, 10)],
        &[(5, 32), (61, 4), (600, 0)],
    ];
    for (step, ram) in rounds.iter().enumerate() {
        let disk = vec![(step as u64 * 5, 4 + 3 * step as u8), (29, 1)];
        let rounds = vec![("ram".to_owned(), ram.to_vec()), ("disk".to_owned(), disk)];
        let parent = published.last().map(|(id, _)| *id);
        let edit = Edit { rounds, step: step as u64 };
        let id = take(&store, parent, &mut model, &edit).expect("it works").id;
        published.push((id, model.clone()));
        models.insert(id, model.clone());
        if step == 3 {
            // Makes enough of the journal stale that it is rewritten.
            for tag in ["one", "two", "three", "four"] {
                store.set_tag(tag, Some(published[0].0)).expect("it works");
                store.set_tag(tag, None).expect("it works");
            }
            let gone = [published.remove(0).0, published.remove(1).0];
            store.forget(&gone).expect("it works");
            let all = PruneOptions { max_unused: 0.0, ..PruneOptions::default() };
            let report = store.prune(&all, &PruneProgress::default()).expect("it works");
            assert!(report.segments_rewritten > 0, "{report:?}");
            let journal = fs::read(folder.path().join("journal")).expect("it is there");
            assert_ne!(journal[12], 0, "the journal was written anew");
        }
    }
    store.set_tag("gold", Some(published[1].0)).expect("it works");
    check_all(&store, &published);
    let segments = segment_files(folder.path());
    assert!(segments.iter().any(|name| name.ends_with(".pack")), "{segments:?}");
    assert!(segments.iter().any(|name| name.ends_with(".seg")), "{segments:?}");
    Everything { folder, published, models, segments }
}
