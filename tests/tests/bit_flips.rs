//! Damages the files of a store bit by bit: the damage is reported with the file's name, or it is
//! harmless. There is never a panic, never a wrong page.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use frazil_snapstore::{
    DirStorage, PAGE_SIZE, Page, SnapshotId, Store, StoreError, StoreOptions, VerifyProgress,
    verify,
};
use frazil_tests::fixture;
use frazil_tests::format_reader::{KIND_FINGERPRINTS, read_segment};
use frazil_tests::oracle::{Model, check_all, content, small_options};

/// One flip in this many also has all pages read, by a store that has nothing cached.
const READ_STRIDE: usize = 200;

/// How damage showed.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// An error or a finding of `verify` names the file.
    Reported,
    /// Everything is there and right.
    Intact,
    /// The store is in an older state, with this many snapshots, and nothing says so.
    Older(usize),
}

/// A store that uses every feature of the format, to be damaged.
struct Fixture(fixture::Everything);

impl std::ops::Deref for Fixture {
    type Target = fixture::Everything;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

fn fixture() -> Fixture {
    Fixture(fixture::everything())
}

impl Fixture {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn open(&self) -> Result<Arc<Store>, String> {
        open(self.folder.path(), small_options())
    }

    /// Opens the store without caches, so that every page is read from its own record: frames are
    /// cached by hash, so of two equal records a damaged one could hide behind the other.
    fn open_without_cache(&self) -> Arc<Store> {
        let options = StoreOptions { frame_cache_bytes: 0, base_cache_bytes: 0, ..small_options() };
        open(self.folder.path(), options).expect("only a segment is damaged")
    }

    /// Opens and verifies the store and reads every page. `damaged` is part of the name of the
    /// damaged file.
    fn judge(&self, damaged: &str) -> Outcome {
        let store = match self.open() {
            Ok(store) => store,
            Err(error) => {
                assert!(error.contains(damaged), "`{error}` does not name {damaged}");
                return Outcome::Reported;
            }
        };
        let found: Vec<SnapshotId> = store.snapshots().iter().map(|info| info.id).collect();
        let expected: Vec<SnapshotId> = self.published.iter().map(|(id, _)| *id).collect();
        let models = found.iter().map(|id| (*id, self.models[id].clone()));
        let models: Vec<(SnapshotId, Model)> = models.collect();
        let reported = reported(&store, &found, damaged);
        let unread = read_all(&store, &models);
        assert!(reported || unread == 0, "pages cannot be read, and verify finds nothing");
        match found {
            _ if reported => Outcome::Reported,
            found if found != expected => Outcome::Older(found.len()),
            _ => Outcome::Intact,
        }
    }

    /// Replaces a file, or removes it if `content` is `None`, while `run` runs.
    fn with<T>(&self, name: &str, content: Option<&[u8]>, run: impl FnOnce() -> T) -> T {
        let path = self.path(name);
        let good = fs::read(&path).unwrap();
        content.map_or_else(|| fs::remove_file(&path), |bytes| fs::write(&path, bytes)).unwrap();
        let result = run();
        fs::write(&path, good).unwrap();
        result
    }
}

fn open(folder: &Path, options: StoreOptions) -> Result<Arc<Store>, String> {
    let storage = Arc::new(DirStorage::new(folder));
    Store::open_storage(storage, options).map_err(|error| error.to_string())
}

/// True if `verify` finds damage. All of it must be in `file`, unless that is the journal: a
/// damaged journal may be cut back to an older state, which names files that are gone.
fn reported(store: &Arc<Store>, snapshots: &[SnapshotId], file: &str) -> bool {
    let report = verify(store, snapshots, &VerifyProgress::default()).unwrap();
    for damage in report.damage.iter().filter(|_| file != "journal") {
        assert!(damage.error.to_string().contains(file), "`{}` does not name {file}", damage.error);
    }
    !report.damage.is_empty()
}

/// True if `verify` finds damage in `file` at `offset`, and says what was expected and what was
/// found.
fn reported_at(store: &Arc<Store>, snapshots: &[SnapshotId], file: &str, offset: u64) -> bool {
    let report = verify(store, snapshots, &VerifyProgress::default()).unwrap();
    report.damage.iter().any(|damage| match &damage.error {
        StoreError::Corrupt { file: found, offset: at, expected, found: what, .. } => {
            found == file && *at == offset && !expected.is_empty() && !what.is_empty()
        }
        // The flipped version number looks like that of a later format.
        StoreError::UnsupportedVersion { file: found, .. } => found == file && offset == 0,
        _ => false,
    })
}

/// Reads every page of every snapshot. Those that can be read must be right; returns the number of
/// failed reads.
fn read_all(store: &Arc<Store>, published: &[(SnapshotId, Model)]) -> usize {
    let mut unread = 0;
    let mut page: Page = [0; PAGE_SIZE];
    for (id, model) in published {
        let Ok(snapshot) = store.snapshot(*id) else {
            unread += 1;
            continue;
        };
        unread += usize::from(snapshot.states().is_err());
        for (name, contents) in &model.regions {
            let region = snapshot.region(name).expect("the manifest was verified");
            for (number, expected) in contents.iter().enumerate() {
                match region.read_page(number as u64, &mut page) {
                    Ok(()) => assert!(&page == content(*expected), "page {number} of {name}"),
                    Err(_) => unread += 1,
                }
            }
        }
    }
    unread
}

#[test]
fn every_bit_of_the_small_files_counts() {
    let fixture = fixture();
    // Header, body and check of the newest record, the tag.
    let newest_len = 24 + 33 + "gold".len() + 32;
    for (name, matters) in [("FRAZIL", true), ("journal", true), ("lock", false)] {
        let good = fs::read(fixture.path(name)).unwrap();
        assert!(!good.is_empty());
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let (outcome, opens) =
                fixture.with(name, Some(&bytes), || (fixture.judge(name), fixture.open().is_ok()));
            // Only damage to the newest record may pass for a torn append, which the next writer
            // cuts off. Damage before it must make opening fail.
            let may_open =
                name == "lock" || (name == "journal" && bit / 8 >= good.len() - newest_len);
            assert_eq!(opens, may_open, "bit {bit} of {name}");
            let expected = if matters { Outcome::Reported } else { Outcome::Intact };
            assert_eq!(outcome, expected, "bit {bit} of {name}");
        }
    }
    assert_eq!(fixture.judge(""), Outcome::Intact, "the fixture is as it was");
}

#[test]
fn every_bit_of_a_segment_and_pack_counts() {
    let fixture = fixture();
    // One store, kept open: opening for each flip would take minutes. `verify` trusts no cache.
    let store = fixture.open().unwrap();
    let ids: Vec<SnapshotId> = fixture.published.iter().map(|(id, _)| *id).collect();
    let mut flips = 0;
    for name in &fixture.segments {
        let good = fs::read(fixture.path(name)).unwrap();
        let blocks = read_segment(&good);
        assert!(!blocks.is_empty(), "{name} is records from end to end");
        let file = fs::OpenOptions::new().write(true).open(fixture.path(name)).unwrap();
        for bit in 0..good.len() * 8 {
            let byte = bit / 8;
            file.write_all_at(&[good[byte] ^ 1 << (bit % 8)], byte as u64).unwrap();
            flips += 1;
            let block = blocks.iter().find(|block| (block.offset..block.end()).contains(&byte));
            let offset = block.map_or(0, |block| block.offset as u64);
            assert!(reported_at(&store, &ids, name, offset), "bit {bit} of {name} was not seen");
            if flips % READ_STRIDE == 0 {
                assert_eq!(fixture.judge(name), Outcome::Reported, "bit {bit} of {name}");
                let fresh = fixture.open_without_cache();
                // Fingerprints are not needed for reading.
                let needed = block.is_none_or(|block| block.kind != KIND_FINGERPRINTS);
                let unread = read_all(&fresh, &fixture.published);
                assert_eq!(unread > 0, needed, "bit {bit} of {name} in reading");
            }
            file.write_all_at(&good[byte..=byte], byte as u64).unwrap();
        }
    }
    println!("{flips} flips, all reported");
    assert_eq!(fixture.judge(""), Outcome::Intact, "the fixture is as it was");
}

#[test]
fn truncated_files_are_reported() {
    let fixture = fixture();
    for name in fixture.segments.iter().map(String::as_str).chain(["FRAZIL"]) {
        let good = fs::read(fixture.path(name)).unwrap();
        for len in (0..good.len()).step_by(64) {
            let outcome = fixture.with(name, Some(&good[..len]), || fixture.judge(name));
            assert_eq!(outcome, Outcome::Reported, "{name} cut to {len}");
        }
        let missing = fixture.with(name, None, || fixture.judge(name));
        assert_eq!(missing, Outcome::Reported, "{name} removed");
    }
}

/// A journal cut right behind a record cannot be told from that of an older store.
#[test]
fn a_truncated_journal_is_reported_or_an_older_store() {
    let fixture = fixture();
    let good = fs::read(fixture.path("journal")).unwrap();
    let mut older = Vec::new();
    for len in 0..good.len() {
        match fixture.with("journal", Some(&good[..len]), || fixture.judge("journal")) {
            Outcome::Reported => {}
            Outcome::Older(count) => older.push(count),
            Outcome::Intact => older.push(fixture.published.len()),
        }
    }
    // Cuts right behind the header and right behind a record give older stores, except that a store
    // whose snapshots' files were pruned later is reported.
    assert_eq!((older[0], older.last()), (0, Some(&fixture.published.len())), "{older:?}");
}

#[test]
fn exchanged_and_foreign_files_are_reported() {
    let fixture = fixture();
    let [first, second] =
        [0, 1].map(|index| fs::read(fixture.path(&fixture.segments[index])).unwrap());
    let swapped = fixture.with(&fixture.segments[0], Some(&second), || {
        fixture.with(&fixture.segments[1], Some(&first), || fixture.judge("segments/"))
    });
    assert_eq!(swapped, Outcome::Reported);
    let stranger = self::fixture();
    let (pack, segment) = (&fixture.segments[0], fixture.segments.last().unwrap());
    for name in ["FRAZIL", "journal", pack, segment] {
        let foreign = fs::read(stranger.path(name)).unwrap();
        // With a foreign FRAZIL, it is the journal that is reported.
        let named = if name == "FRAZIL" { "journal" } else { name };
        let outcome = fixture.with(name, Some(&foreign), || fixture.judge(named));
        assert_eq!(outcome, Outcome::Reported, "{name} of another store");
    }
}

#[test]
fn garbage_behind_the_journal_is_reported_and_cleared_by_the_next_writer() {
    let fixture = fixture();
    let good = fs::read(fixture.path("journal")).unwrap();
    for garbage in [&b"x"[..], &[0; 4096], &[0xFF; 300], &good[64..200], b"FRJR"] {
        let bytes = [&good, garbage].concat();
        let outcome = fixture.with("journal", Some(&bytes), || {
            let outcome = fixture.judge("journal");
            let store = fixture.open().unwrap();
            assert_eq!(store.torn_journal_bytes(), garbage.len() as u64);
            check_all(&store, &fixture.published);
            store.set_tag("silver", None).unwrap();
            assert_eq!(fixture.judge("journal"), Outcome::Intact, "after the next record");
            outcome
        });
        assert_eq!(outcome, Outcome::Reported);
    }
}
