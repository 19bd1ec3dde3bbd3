//! A mounted store without FUSE: which files there are, what they read as, and how changes show.

use std::sync::Arc;

use frazil_snapstore::{
    Committed, Description, PAGE_SIZE, Page, PageSet, PruneOptions, PruneProgress, SnapshotId,
    StateChunk, Store, StoreOptions,
};
use proptest::prelude::*;
use tempfile::TempDir;

use super::files::{OpenFiles, Seek};
use super::node::{Node, Part};
use super::view::{Kind, Refused, View};

struct Bed {
    folder: TempDir,
    store: Arc<Store>,
    view: View,
    files: OpenFiles,
}

impl Bed {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store");
        let store = Store::open_or_create(&path, StoreOptions::default()).unwrap();
        // A handle of its own, as another process would have.
        let view = View::new(Store::open(&path, StoreOptions::default()).unwrap());
        Self { folder, store, view, files: OpenFiles::default() }
    }

    /// Takes a snapshot of VM `name`, with `pages` as its memory and a disk of 9 sectors.
    fn take(&self, name: &str, pages: &[Page], parent: Option<SnapshotId>) -> Committed {
        let mut transaction = self.store.begin(parent).unwrap();
        let mut all = PageSet::new(pages.len() as u64);
        all.insert_range(0, pages.len() as u64);
        let ram = transaction.region("ram", pages.len() as u64).unwrap();
        transaction.write_pages(ram, &all, &pages.to_vec()).unwrap();
        let disk = transaction.region("disk0", 2).unwrap();
        let mut both = PageSet::new(2);
        both.insert_range(0, 2);
        transaction.write_pages(disk, &both, &vec![[7; PAGE_SIZE]; 2]).unwrap();
        let sectors = serde_json::json!(
            {"region": "disk0", "sectors": 9, "read_only": false, "serial": "x"}
        );
        let chunk = |name: &str, kind: &str, body| StateChunk {
            name: name.into(),
            kind: kind.into(),
            version: 1,
            body,
        };
        let state = vec![
            chunk("vcpu0", "test", serde_json::json!({"rip": "0x1"})),
            chunk("disk0", "frazil.disk", sectors),
        ];
        let description = Description {
            name: name.into(),
            time_unix_ms: 1_700_000_000_000 + self.store.snapshots().len() as u64,
            state,
            ..Description::default()
        };
        transaction.commit(description).unwrap()
    }

    /// Resolves a path, following links.
    fn walk(&self, path: &str) -> Result<Node, Refused> {
        let mut node = Node::Root;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            if name == ".." {
                node = node.parent();
                continue;
            }
            let folder = node;
            node = self.view.lookup(folder, name)?.node;
            if self.view.attr(node)?.kind == Kind::Link {
                let target = self.view.link(node)?;
                // Links are relative to the folder that they are in.
                let up = target.matches("../").count();
                let mut at = folder;
                for _ in 0..up {
                    at = at.parent();
                }
                for name in target.split('/').filter(|name| *name != "..") {
                    at = self.view.lookup(at, name)?.node;
                }
                node = at;
            }
        }
        Ok(node)
    }

    fn names(&self, path: &str) -> Vec<String> {
        let list = self.view.list(self.walk(path).unwrap()).unwrap();
        for entry in &list {
            // Everything listed can be looked up, and is of the kind that was listed.
            let attr = self.view.lookup(self.walk(path).unwrap(), &entry.name).unwrap();
            assert_eq!((attr.node, attr.kind), (entry.node, entry.kind), "{}", entry.name);
        }
        list.into_iter().map(|entry| entry.name).collect()
    }

    fn read(&self, path: &str, offset: u64, len: u32) -> Vec<u8> {
        let handle = self.files.open(&self.view, self.walk(path).unwrap()).unwrap();
        let bytes = self.files.get(handle).unwrap().read(offset, len).unwrap();
        self.files.close(handle);
        bytes
    }

    fn len(&self, path: &str) -> u64 {
        self.view.attr(self.walk(path).unwrap()).unwrap().len_bytes
    }
}

fn page(byte: u8) -> Page {
    [byte; PAGE_SIZE]
}

#[test]
fn an_empty_store_is_an_empty_tree() {
    let bed = Bed::new();
    assert_eq!(bed.names("/"), ["ids", "tags", "vms"]);
    for folder in ["ids", "tags", "vms"] {
        assert!(bed.names(folder).is_empty(), "{folder}");
    }
    for nothing in ["latest", "x", "ids/abcd", "vms/x"] {
        assert!(matches!(bed.walk(nothing), Err(Refused::NotFound)), "{nothing}");
    }
}

#[test]
fn snapshots_are_found_in_every_way_there_is() {
    let bed = Bed::new();
    let first = bed.take("web", &[page(1), page(0), page(3)], None).id;
    let second = bed.take("a/b", &[page(2), page(0), page(3)], Some(first)).id;
    bed.store.set_tag("good", Some(first)).unwrap();
    bed.store.set_tag("with/slash", Some(second)).unwrap();
    assert_eq!(bed.names("ids"), [first.short(), second.short()]);
    assert_eq!(bed.names("tags"), ["good", "with%2Fslash"]);
    assert_eq!(bed.names("vms"), ["web", "a%2Fb"]);
    let dated = bed.names("vms/web");
    assert_eq!((dated.len(), dated[1].as_str()), (2, "latest"));
    assert!(dated[0].starts_with("2023-11-1") && dated[0].ends_with(&first.short()), "{dated:?}");
    let node = |id: SnapshotId| bed.walk(&format!("ids/{}", id.short())).unwrap();
    for (path, id) in [
        ("latest".to_owned(), second),
        ("tags/good".to_owned(), first),
        ("tags/with%2Fslash".to_owned(), second),
        ("vms/web/latest".to_owned(), first),
        (format!("vms/web/{}", dated[0]), first),
        (format!("ids/{first}"), first),
        (format!("ids/{}", &first.to_string()[..20]), first),
        (format!("ids/{}", first.to_string().to_uppercase()), first),
    ] {
        assert_eq!(bed.walk(&path).unwrap(), node(id), "{path}");
    }
    assert!(matches!(bed.walk("ids/latest"), Err(Refused::NotFound)));
    assert_eq!(bed.names("latest"), ["manifest.json", "memory", "disks", "state"]);
    assert_eq!(bed.names("latest/memory"), ["ram"]);
    assert_eq!(bed.names("latest/disks"), ["disk0"]);
    assert_eq!(bed.names("latest/state"), ["vcpu0.json", "disk0.json"]);
    // Its length is the disk's, which ends inside a page.
    assert_eq!(bed.len("latest/disks/disk0"), 9 * 512);
    assert_eq!(bed.read("latest/disks/disk0", 4600, 100), [7; 8]);
    let text = bed.read("tags/good/manifest.json", 0, 1 << 20);
    assert_eq!(bed.len("tags/good/manifest.json"), text.len() as u64);
    let manifest: serde_json::Value = serde_json::from_slice(&text).unwrap();
    assert_eq!((&manifest["id"], &manifest["name"]), (&first.to_string().into(), &"web".into()));
    let state: serde_json::Value =
        serde_json::from_slice(&bed.read("latest/state/vcpu0.json", 0, 1 << 20)).unwrap();
    assert_eq!(state["body"]["rip"], "0x1");
}

#[test]
fn an_open_file_stays_when_its_snapshot_is_forgotten_and_pruned() {
    let bed = Bed::new();
    let old = bed.take("web", &[page(1), page(2)], None).id;
    let handle = bed.files.open(&bed.view, bed.walk("latest/memory/ram").unwrap()).unwrap();
    let new = bed.take("web", &[page(3), page(4)], Some(old)).id;
    assert_eq!(bed.walk("latest").unwrap(), bed.walk(&format!("ids/{}", new.short())).unwrap());
    let folder = bed.walk(&format!("ids/{}", old.short())).unwrap();
    bed.store.forget(&[old]).unwrap();
    let all = PruneOptions { max_unused: 0.0, ..PruneOptions::default() };
    bed.store.prune(&all, &PruneProgress::default()).unwrap();
    assert_eq!(bed.names("ids"), [new.short()]);
    assert!(matches!(bed.walk(&format!("ids/{}", old.short())), Err(Refused::NotFound)));
    assert!(matches!(bed.view.attr(folder), Err(Refused::NotFound)));
    let open = bed.files.get(handle).unwrap();
    assert_eq!(open.read(0, 4096).unwrap(), page(1), "past anything that is cached");
    drop(open);
    bed.files.close(handle);
    assert!(matches!(bed.files.get(handle), Err(Refused::BadHandle)));
    // No pin is left.
    let report = bed.store.prune(&all, &PruneProgress::default()).unwrap();
    assert_eq!(report.pinned, 0);
}

#[test]
fn damage_is_an_error_of_what_is_damaged_and_of_nothing_else() {
    let bed = Bed::new();
    // Noise does not compress, so every page has bytes of its own in the file.
    let noise = |seed: u64| {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        std::array::from_fn(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
    };
    let pages: Vec<Page> = (1..=64).map(noise).collect();
    bed.take("web", &pages, None);
    let segments = bed.folder.path().join("store/segments");
    let segment = segments.read_dir().unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&segment).unwrap();
    let at = bytes.windows(64).position(|window| window == &pages[20][..64]).unwrap();
    bytes[at] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    let handle = bed.files.open(&bed.view, bed.walk("latest/memory/ram").unwrap()).unwrap();
    let open = bed.files.get(handle).unwrap();
    let mut bad = Vec::new();
    for (index, page) in pages.iter().enumerate() {
        match open.read((index * PAGE_SIZE) as u64, 4096) {
            Ok(found) => assert_eq!(found, page, "page {index}"),
            Err(Refused::Damaged(error)) => {
                let error = error.to_string();
                assert!(error.contains("segments/") && error.contains("offset"), "{error}");
                bad.push(index);
            }
            Err(other) => panic!("{other:?}"),
        }
    }
    assert!(bad.contains(&20) && bad.len() <= 16, "the pages of one frame: {bad:?}");
}

#[test]
fn folders_are_made_once_for_all_that_look_until_something_happens() {
    let bed = Bed::new();
    let first = bed.take("web", &[page(1)], None).id;
    let mut before = bed.view.listing().unwrap();
    let mut expect_new = |what: &str| {
        let now = bed.view.listing().unwrap();
        assert!(!Arc::ptr_eq(&before, &now), "{what}");
        assert!(Arc::ptr_eq(&now, &bed.view.listing().unwrap()), "{what}");
        before = now;
    };
    let _second = bed.take("web", &[page(2)], Some(first));
    expect_new("a snapshot");
    bed.store.set_tag("good", Some(first)).unwrap();
    expect_new("a tag");
    bed.store.forget(&[first]).unwrap();
    expect_new("one less");
    bed.store.prune(&PruneOptions::default(), &PruneProgress::default()).unwrap();
    assert_eq!((bed.names("ids").len(), bed.names("tags").len()), (1, 0));
    assert_eq!(bed.names("vms/web").len(), 2, "one, and the link to the latest");
}

#[test]
fn what_is_no_folder_and_no_file_is_told_apart() {
    let bed = Bed::new();
    bed.take("web", &[page(1)], None);
    let file = bed.walk("latest/memory/ram").unwrap();
    assert!(matches!(bed.view.list(file), Err(Refused::NotAFolder)));
    assert!(matches!(bed.view.lookup(file, "x"), Err(Refused::NotFound | Refused::NotAFolder)));
    let handle = bed.files.open(&bed.view, bed.walk("latest").unwrap()).unwrap();
    assert!(matches!(bed.files.get(handle).unwrap().read(0, 10), Err(Refused::IsAFolder)));
    let Node::In(number, _) = file else { panic!("{file:?}") };
    for beyond in [Part::Region(2), Part::Chunk(2), Part::Region(u16::MAX)] {
        let node = Node::In(number, beyond);
        assert!(matches!(bed.view.attr(node), Err(Refused::NotFound)), "{beyond:?}");
    }
    assert!(matches!(bed.view.attr(Node::In(99, Part::Folder)), Err(Refused::NotFound)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn reading_and_seeking_agree_with_a_plain_file(
        bytes in proptest::collection::vec(prop_oneof![Just(0_u8), 0..4_u8], 1..300),
        reads in proptest::collection::vec((0..1_300_000_u64, 0..200_000_u32), 1..20),
        seeks in proptest::collection::vec(0..1_300_000_u64, 1..30),
    ) {
        let bed = Bed::new();
        let pages: Vec<Page> = bytes.iter().map(|byte| page(*byte)).collect();
        bed.take("web", &pages, None);
        let plain: Vec<u8> = pages.concat();
        let node = bed.walk("latest/memory/ram").unwrap();
        let attr = bed.view.attr(node).unwrap();
        prop_assert_eq!(attr.len_bytes, plain.len() as u64);
        let set = bytes.iter().filter(|byte| **byte != 0).count();
        prop_assert_eq!(attr.data_bytes, (set * PAGE_SIZE) as u64);
        let open = bed.files.get(bed.files.open(&bed.view, node).unwrap()).unwrap();
        for (offset, len) in reads {
            let [start, end] =
                [offset, offset + u64::from(len)].map(|at| (at as usize).min(plain.len()));
            prop_assert!(open.read(offset, len).unwrap() == plain[start..end]);
        }
        for offset in seeks {
            let is_data = |at: usize| bytes[at / PAGE_SIZE] != 0;
            // What the manual page of lseek says, page by page.
            let next = |data: bool| {
                let mut at = offset as usize;
                while at < plain.len() && is_data(at) != data {
                    at = (at / PAGE_SIZE + 1) * PAGE_SIZE;
                }
                at
            };
            match (open.seek(offset, Seek::Data), open.seek(offset, Seek::Hole)) {
                _ if offset as usize >= plain.len() => {}
                (data, Ok(hole)) => {
                    prop_assert_eq!(hole as usize, next(false).min(plain.len()));
                    match data {
                        Ok(data) => prop_assert_eq!(data as usize, next(true)),
                        Err(Refused::Beyond) => prop_assert!(next(true) >= plain.len()),
                        Err(other) => panic!("{other:?}"),
                    }
                }
                (_, Err(other)) => panic!("{other:?}"),
            }
            if offset as usize >= plain.len() {
                prop_assert!(matches!(open.seek(offset, Seek::Data), Err(Refused::Beyond)));
                prop_assert!(matches!(open.seek(offset, Seek::Hole), Err(Refused::Beyond)));
            }
        }
    }
}
