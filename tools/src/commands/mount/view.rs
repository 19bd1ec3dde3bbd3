//! A store as a tree of files: which files there are, their names and their lengths. Knows nothing
//! of FUSE.
//!
//! ```text
//! ids/7d4656d12ab3/…                     every snapshot, by id
//! tags/TAG              -> ../ids/…      by tag
//! vms/VM/DATE_TIME_ID   -> ../../ids/…   by VM
//! vms/VM/latest
//! latest                -> ids/…         the newest
//! ```
//!
//! The contents of a snapshot never change, and its nodes stay valid for ever; which snapshots
//! there are is looked up anew each time.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use frazil_snapstore::{Hash, PAGE_SIZE, SnapshotId, SnapshotInfo, Store, StoreError};
use jiff::{Timestamp, tz::TimeZone};
use quick_cache::sync::Cache;

use super::node::{Node, Numbers, Part};
use crate::snapshot_files::{Folder, MANIFEST_FILE, SnapshotFiles, file_name};

/// Snapshots whose manifests, states and lengths are kept in memory.
const KNOWN_MAX: usize = 64;
/// The name of the links to the newest snapshots.
const LATEST: &str = "latest";

/// Why an operation fails, in terms of system calls' errors.
#[derive(Debug)]
pub(super) enum Refused {
    NotFound,
    NotAFolder,
    /// A folder where a file is expected.
    IsAFolder,
    BadHandle,
    /// There is no more data after that offset.
    Beyond,
    /// The store cannot be read.
    Damaged(anyhow::Error),
}

impl From<StoreError> for Refused {
    fn from(error: StoreError) -> Self {
        match error {
            // The snapshot was forgotten meanwhile.
            StoreError::UnknownRef { .. } => Self::NotFound,
            error => Self::Damaged(error.into()),
        }
    }
}

impl From<anyhow::Error> for Refused {
    fn from(error: anyhow::Error) -> Self {
        match error.downcast::<StoreError>() {
            Ok(error) => error.into(),
            Err(error) => Self::Damaged(error),
        }
    }
}

pub(super) type Result<T> = std::result::Result<T, Refused>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Folder,
    File,
    Link,
}

/// The attributes that `stat` returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attr {
    pub node: Node,
    pub kind: Kind,
    pub len_bytes: u64,
    /// The length without holes.
    pub data_bytes: u64,
    pub time_unix_ms: u64,
}

/// An entry of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub node: Node,
    pub name: String,
    pub kind: Kind,
}

impl Entry {
    fn new(node: Node, name: impl Into<String>) -> Self {
        Self { node, name: name.into(), kind: kind_of(node) }
    }
}

fn kind_of(node: Node) -> Kind {
    match node {
        Node::Root
        | Node::Ids
        | Node::Tags
        | Node::Vms
        | Node::Vm(_)
        | Node::In(_, Part::Folder | Part::Memory | Part::Disks | Part::State) => Kind::Folder,
        Node::In(_, Part::Manifest | Part::Region(_) | Part::Chunk(_)) => Kind::File,
        Node::Latest | Node::Tag(_) | Node::VmLatest(_) | Node::VmEntry(_) | Node::Alias(_) => {
            Kind::Link
        }
    }
}

/// A snapshot that was accessed lately.
pub(super) struct Known {
    pub(super) files: SnapshotFiles,
    manifest: OnceLock<Arc<[u8]>>,
    state: Vec<OnceLock<Arc<[u8]>>>,
    /// For each region, the length with holes and without.
    len_bytes: Vec<OnceLock<u64>>,
    data_bytes: Vec<OnceLock<u64>>,
}

impl Known {
    /// The contents of a small file, generated on first use.
    pub(super) fn text(&self, part: Part) -> Result<Arc<[u8]>> {
        let slot = match part {
            Part::Manifest => &self.manifest,
            Part::Chunk(place) => self.state.get(usize::from(place)).ok_or(Refused::NotFound)?,
            _ => return Err(Refused::IsAFolder),
        };
        if let Some(text) = slot.get() {
            return Ok(Arc::clone(text));
        }
        let text: Arc<[u8]> = match part {
            Part::Chunk(place) => self.files.state_json(usize::from(place))?,
            _ => self.files.manifest_json()?,
        }
        .into();
        Ok(Arc::clone(slot.get_or_init(|| text)))
    }

    fn len_bytes(&self, place: usize) -> Result<u64> {
        let slot = self.len_bytes.get(place).ok_or(Refused::NotFound)?;
        if let Some(bytes) = slot.get() {
            return Ok(*bytes);
        }
        let bytes = self.files.len_bytes(&self.files.regions[place])?;
        Ok(*slot.get_or_init(|| bytes))
    }

    fn data_bytes(&self, place: usize) -> Result<u64> {
        let slot = self.data_bytes.get(place).ok_or(Refused::NotFound)?;
        if let Some(bytes) = slot.get() {
            return Ok(*bytes);
        }
        let region = self.files.snapshot.region(&self.files.regions[place].region)?;
        let bytes = region.contents_pages()? * PAGE_SIZE as u64;
        Ok(*slot.get_or_init(|| bytes))
    }
}

/// The names of snapshots in `ids`, and their numbers.
#[derive(Default)]
struct Ids {
    listed: Vec<(SnapshotId, String)>,
    by_id: HashMap<SnapshotId, u32>,
    by_name: HashMap<String, u32>,
}

impl Ids {
    /// The number of `id`, which keeps its number and name from then on. Names are short ids,
    /// unless another snapshot has the same.
    fn number(&mut self, id: SnapshotId) -> u32 {
        if let Some(number) = self.by_id.get(&id) {
            return *number;
        }
        let number = u32::try_from(self.listed.len()).expect("fewer than four billion snapshots");
        let name = Some(id.short()).filter(|name| !self.by_name.contains_key(name));
        let name = name.unwrap_or_else(|| id.to_string());
        self.by_id.insert(id, number);
        self.by_name.insert(name.clone(), number);
        self.listed.push((id, name));
        number
    }
}

/// The entries of a folder, for listing and for lookup.
#[derive(Default)]
struct Names {
    entries: Vec<Entry>,
    nodes: HashMap<String, Node>,
}

impl Names {
    fn add(&mut self, node: Node, name: impl Into<String>) {
        let entry = Entry::new(node, name);
        self.nodes.insert(entry.name.clone(), node);
        self.entries.push(entry);
    }

    fn find(&self, name: &str) -> Result<Node> {
        self.nodes.get(name).copied().ok_or(Refused::NotFound)
    }
}

/// The snapshots and tags at one state of the journal. Made once per state: otherwise looking up
/// every entry of a folder would take quadratic time.
pub(super) struct Listing {
    journal: Hash,
    /// Oldest first.
    published: Vec<SnapshotInfo>,
    ids: Names,
    tags: Names,
    /// Generated on first use, as it takes every manifest.
    by_vm: OnceLock<ByVm>,
}

#[derive(Default)]
struct ByVm {
    vms: Names,
    /// The folder of each VM, without its `latest` link, and the VM's newest snapshot.
    of: HashMap<u32, (Names, SnapshotInfo)>,
}

/// A store as a tree of files.
pub(super) struct View {
    pub(super) store: Arc<Store>,
    ids: Mutex<Ids>,
    tags: Numbers<String>,
    vms: Numbers<String>,
    /// The VM of each snapshot listed by VM so far; None if its manifest is damaged.
    vm_of: Mutex<HashMap<SnapshotId, Option<u32>>>,
    listing: Mutex<Option<Arc<Listing>>>,
    known: Cache<u32, Arc<Known>>,
    zone: TimeZone,
}

impl View {
    pub(super) fn new(store: Arc<Store>) -> Self {
        Self {
            store,
            ids: Mutex::default(),
            tags: Numbers::default(),
            vms: Numbers::default(),
            vm_of: Mutex::default(),
            listing: Mutex::default(),
            known: Cache::new(KNOWN_MAX),
            zone: TimeZone::system(),
        }
    }

    /// The attributes of the entry `name` of folder `parent`.
    pub(super) fn lookup(&self, parent: Node, name: &str) -> Result<Attr> {
        let node = match parent {
            Node::Root => match name {
                "ids" => Node::Ids,
                "tags" => Node::Tags,
                "vms" => Node::Vms,
                LATEST => Node::Latest,
                _ => return Err(Refused::NotFound),
            },
            Node::Ids => self.find_id(name)?,
            Node::Tags => self.listing()?.tags.find(name)?,
            Node::Vms => {
                let listing = self.listing()?;
                self.by_vm(&listing).vms.find(name)?
            }
            Node::Vm(vm) if name == LATEST => Node::VmLatest(vm),
            Node::Vm(vm) => {
                let listing = self.listing()?;
                self.by_vm(&listing).of.get(&vm).ok_or(Refused::NotFound)?.0.find(name)?
            }
            Node::In(..) => {
                let entries = self.list(parent)?;
                entries.into_iter().find(|entry| entry.name == name).ok_or(Refused::NotFound)?.node
            }
            _ => return Err(Refused::NotAFolder),
        };
        self.attr(node)
    }

    fn find_id(&self, name: &str) -> Result<Node> {
        let digits = (4..=64).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_hexdigit());
        if !digits {
            return Err(Refused::NotFound);
        }
        if let Ok(node) = self.listing()?.ids.find(name) {
            return Ok(node);
        }
        // Perhaps another unique prefix of an id.
        let id = self.store.resolve(name).map_err(|_unknown| Refused::NotFound)?.id;
        Ok(Node::Alias(self.ids().number(id)))
    }

    /// The current listing.
    pub(super) fn listing(&self) -> Result<Arc<Listing>> {
        self.store.refresh()?;
        // Read before the listing is made: if the journal grows in between, the next call makes a
        // new one.
        let journal = self.store.journal_hash();
        let mut listing = self.listing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(listing) = listing.as_ref().filter(|listing| listing.journal == journal) {
            return Ok(Arc::clone(listing));
        }
        let published = self.store.snapshots();
        let (mut ids, mut tags) = (Names::default(), Names::default());
        let mut numbers = self.ids();
        for info in &published {
            let number = numbers.number(info.id);
            ids.add(Node::In(number, Part::Folder), &*numbers.listed[number as usize].1);
        }
        drop(numbers);
        for tag in self.store.tags().into_keys() {
            tags.add(Node::Tag(self.tags.number(&tag)), file_name(&tag));
        }
        let made = Listing { journal, published, ids, tags, by_vm: OnceLock::new() };
        Ok(Arc::clone(listing.insert(Arc::new(made))))
    }

    /// The snapshots by VM.
    fn by_vm<'a>(&self, listing: &'a Listing) -> &'a ByVm {
        listing.by_vm.get_or_init(|| {
            let mut by_vm = ByVm::default();
            let mut vm_of = self.vm_of.lock().unwrap_or_else(PoisonError::into_inner);
            for info in &listing.published {
                let vm = vm_of.entry(info.id).or_insert_with(|| {
                    // A snapshot that cannot be read is under no VM; its folder in `ids` shows the
                    // error.
                    let snapshot = self.store.snapshot(info.id).ok()?;
                    Some(self.vms.number(&snapshot.manifest().name))
                });
                let Some(vm) = *vm else { continue };
                let (names, newest) = by_vm.of.entry(vm).or_insert_with(|| {
                    by_vm.vms.add(Node::Vm(vm), file_name(&self.vms.get(vm).unwrap_or_default()));
                    (Names::default(), *info)
                });
                // Not in one expression: `dated` takes the same lock.
                let number = self.ids().number(info.id);
                names.add(Node::VmEntry(number), self.dated(info));
                *newest = *info;
            }
            by_vm
        })
    }

    fn ids(&self) -> std::sync::MutexGuard<'_, Ids> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The id of snapshot `number`, and its name in `ids`.
    pub(super) fn id(&self, number: u32) -> Result<(SnapshotId, String)> {
        self.ids().listed.get(number as usize).cloned().ok_or(Refused::NotFound)
    }

    fn name_of(&self, id: SnapshotId) -> String {
        let mut ids = self.ids();
        let number = ids.number(id);
        ids.listed[number as usize].1.clone()
    }

    /// The attributes of `node`.
    pub(super) fn attr(&self, node: Node) -> Result<Attr> {
        let kind = kind_of(node);
        let mut attr = Attr { node, kind, len_bytes: 0, data_bytes: 0, time_unix_ms: 0 };
        match node {
            Node::In(number, part) => {
                let (id, _) = self.id(number)?;
                if part == Part::Folder {
                    // The folder of a forgotten snapshot can no longer be entered.
                    let info = self.store.find(id).ok_or(Refused::NotFound)?;
                    attr.time_unix_ms = info.time_unix_ms;
                    return Ok(attr);
                }
                let known = self.known(number)?;
                attr.time_unix_ms = known.files.snapshot.manifest().time_unix_ms;
                (attr.len_bytes, attr.data_bytes) = lengths(&known, part)?;
            }
            _ if kind == Kind::Link => {
                let (target, info) = self.target(node)?;
                attr.len_bytes = target.len() as u64;
                attr.time_unix_ms = info.time_unix_ms;
            }
            _ => {
                attr.time_unix_ms = self.store.latest().map_or(0, |info| info.time_unix_ms);
            }
        }
        Ok(attr)
    }

    /// The target of a link.
    pub(super) fn link(&self, node: Node) -> Result<String> {
        self.target(node).map(|(target, _)| target)
    }

    fn target(&self, node: Node) -> Result<(String, SnapshotInfo)> {
        let (up, info) = match node {
            Node::Latest => {
                self.store.refresh()?;
                ("ids/", self.store.latest())
            }
            Node::Tag(number) => {
                self.store.refresh()?;
                let tag = self.tags.get(number).ok_or(Refused::NotFound)?;
                let id = self.store.tags().get(&tag).copied();
                ("../ids/", id.and_then(|id| self.store.find(id)))
            }
            Node::VmLatest(vm) => {
                let listing = self.listing()?;
                ("../../ids/", self.by_vm(&listing).of.get(&vm).map(|(_, newest)| *newest))
            }
            Node::VmEntry(number) => ("../../ids/", self.store.find(self.id(number)?.0)),
            Node::Alias(number) => ("", self.store.find(self.id(number)?.0)),
            _ => return Err(Refused::NotFound),
        };
        let info = info.ok_or(Refused::NotFound)?;
        Ok((format!("{up}{}", self.name_of(info.id)), info))
    }

    /// The entries of folder `node`.
    pub(super) fn list(&self, node: Node) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        match node {
            Node::Root => {
                let names = [(Node::Ids, "ids"), (Node::Tags, "tags"), (Node::Vms, "vms")];
                entries.extend(names.map(|(node, name)| Entry::new(node, name)));
                self.store.refresh()?;
                if self.store.latest().is_some() {
                    entries.push(Entry::new(Node::Latest, LATEST));
                }
            }
            Node::Ids => entries.clone_from(&self.listing()?.ids.entries),
            Node::Tags => entries.clone_from(&self.listing()?.tags.entries),
            Node::Vms => {
                let listing = self.listing()?;
                entries.clone_from(&self.by_vm(&listing).vms.entries);
            }
            Node::Vm(vm) => {
                let listing = self.listing()?;
                let (names, _) = self.by_vm(&listing).of.get(&vm).ok_or(Refused::NotFound)?;
                entries.clone_from(&names.entries);
                entries.push(Entry::new(Node::VmLatest(vm), LATEST));
            }
            Node::In(number, part) => entries = self.list_in(number, part)?,
            _ => return Err(Refused::NotAFolder),
        }
        Ok(entries)
    }

    fn list_in(&self, number: u32, part: Part) -> Result<Vec<Entry>> {
        let known = self.known(number)?;
        let files = &known.files;
        let node = |part| Node::In(number, part);
        // No more than inode numbers have room for.
        let places = 0..=u16::MAX;
        let regions = |folder: Folder| {
            let all = places.clone().zip(&files.regions);
            all.filter(move |(_, file)| file.folder == folder)
        };
        Ok(match part {
            Part::Folder => {
                let mut entries = vec![Entry::new(node(Part::Manifest), MANIFEST_FILE)];
                for folder in Folder::ALL {
                    let (part, empty) = match folder {
                        Folder::Memory => (Part::Memory, regions(folder).next().is_none()),
                        Folder::Disks => (Part::Disks, regions(folder).next().is_none()),
                        Folder::State => (Part::State, files.state.is_empty()),
                    };
                    if !empty {
                        entries.push(Entry::new(node(part), folder.name()));
                    }
                }
                entries
            }
            Part::Memory | Part::Disks => {
                let folder = if part == Part::Memory { Folder::Memory } else { Folder::Disks };
                regions(folder)
                    .map(|(place, file)| Entry::new(node(Part::Region(place)), &*file.name))
                    .collect()
            }
            Part::State => places
                .clone()
                .zip(&files.state)
                .map(|(place, name)| Entry::new(node(Part::Chunk(place)), &**name))
                .collect(),
            Part::Manifest | Part::Region(_) | Part::Chunk(_) => return Err(Refused::NotAFolder),
        })
    }

    /// A snapshot, from the cache if it was accessed lately.
    pub(super) fn known(&self, number: u32) -> Result<Arc<Known>> {
        self.known.get_or_insert_with(&number, || {
            let (id, _) = self.id(number)?;
            let files = SnapshotFiles::new(self.store.snapshot(id)?);
            Ok(Arc::new(Known {
                manifest: OnceLock::new(),
                state: files.state.iter().map(|_| OnceLock::new()).collect(),
                len_bytes: files.regions.iter().map(|_| OnceLock::new()).collect(),
                data_bytes: files.regions.iter().map(|_| OnceLock::new()).collect(),
                files,
            }))
        })
    }

    /// A snapshot's name in its VM's folder: the order of names is the order of time.
    fn dated(&self, info: &SnapshotInfo) -> String {
        let time = i64::try_from(info.time_unix_ms).ok();
        let time = time.and_then(|ms| Timestamp::from_millisecond(ms).ok());
        let time = time.map_or(Cow::Borrowed("undated"), |time| {
            let time = time.to_zoned_datetime(self.zone.clone());
            time.strftime("%Y-%m-%d_%H.%M.%S%.3f").to_string().into()
        });
        format!("{time}_{}", self.name_of(info.id))
    }
}

/// A file's length, and its length without holes.
fn lengths(known: &Known, part: Part) -> Result<(u64, u64)> {
    Ok(match part {
        Part::Region(place) => {
            let place = usize::from(place);
            (known.len_bytes(place)?, known.data_bytes(place)?)
        }
        Part::Manifest | Part::Chunk(_) => {
            let len = known.text(part)?.len() as u64;
            (len, len)
        }
        Part::Folder | Part::Memory | Part::Disks | Part::State => (0, 0),
    })
}
