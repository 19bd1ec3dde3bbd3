//! A storage medium in memory that fails and loses power as badly as a real one may.
//!
//! Data are durable only after a sync of the file, and a name only after a sync of its folder. A
//! crash keeps any part of the rest: sectors of a write, lengths without the data, names without
//! the file. A failed sync leaves its writes in doubt for good, as on Linux.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use frazil_snapstore::{LockError, Pin, Storage, StoreFile, WriterLock};

use crate::rng::Rng;

/// The unit that a medium writes whole or not at all, in bytes; now and then even a sector is torn.
const SECTOR_LEN: u64 = 512;
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// The operations that a hook can wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // They are the calls of the trait.
pub enum Op {
    Lock,
    Create,
    Remove,
    Rename,
    SyncNames,
    Write,
    SetLen,
    Sync,
}

/// How an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// EIO, with no effect.
    Eio,
    /// ENOSPC, with no effect.
    Enospc,
    /// A write is cut short and ends in EIO; other operations fail with EIO.
    Torn,
}

/// A planned failure: `after` more mutations succeed, then the next one fails, and all later ones
/// too if `lasting`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultPlan {
    /// How many mutations succeed before the failure.
    pub after: u64,
    /// How it fails.
    pub fault: Fault,
    /// True if all later mutations fail too.
    pub lasting: bool,
}

#[derive(Clone, Debug)]
enum Change {
    Write { offset: u64, bytes: Vec<u8> },
    SetLen(u64),
}

/// A file: its durable contents, the contents a reader sees, and the changes between the two.
#[derive(Clone, Debug, Default)]
struct Inode {
    durable: Vec<u8>,
    current: Vec<u8>,
    /// Changes that are not durable yet; true marks those that a failed sync left in doubt.
    pending: Vec<(Change, bool)>,
}

impl Change {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Self::SetLen(len) => content.resize(*len as usize, 0),
            Self::Write { offset, bytes } => write_at(content, *offset, bytes),
        }
    }

    /// True if `self`, made later, is taken to replace `earlier`. For two writes that is
    /// approximate: the later one need only start at or before the end of the earlier.
    fn replaces(&self, earlier: &Self) -> bool {
        match (self, earlier) {
            (Self::SetLen(len), Self::Write { offset, .. }) => len <= offset,
            (Self::Write { offset, .. }, Self::Write { offset: old, bytes }) => {
                *offset <= *old + bytes.len() as u64
            }
            (_, Self::SetLen(_)) => true,
        }
    }
}

fn write_at(content: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    let (start, end) = (offset as usize, offset as usize + bytes.len());
    if content.len() < end {
        content.resize(end, 0);
    }
    content[start..end].copy_from_slice(bytes);
}

impl Inode {
    fn change(&mut self, change: Change) {
        change.apply(&mut self.current);
        self.pending.push((change, false));
    }

    fn sync(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        for (index, (change, in_doubt)) in pending.iter().enumerate() {
            if !in_doubt {
                change.apply(&mut self.durable);
            } else if !pending[index + 1..].iter().any(|(later, _)| later.replaces(change)) {
                self.pending.push((change.clone(), true));
            }
        }
    }

    /// Returns the contents found when power is back.
    fn after_power_cut(&self, rng: &mut Rng, eighths: u64) -> Vec<u8> {
        let mut content = self.durable.clone();
        for (change, _) in &self.pending {
            match change {
                Change::SetLen(_) if rng.chance(eighths) => change.apply(&mut content),
                Change::SetLen(_) => {}
                Change::Write { offset, bytes } => {
                    let end = offset + bytes.len() as u64;
                    // The new length may reach the medium without the data.
                    if rng.chance(eighths) && (content.len() as u64) < end {
                        content.resize(end as usize, 0);
                    }
                    let mut at = *offset;
                    while at < end {
                        let next = (at - at % SECTOR_LEN + SECTOR_LEN).min(end);
                        if rng.chance(eighths) {
                            let torn = eighths < 8 && rng.chance(1);
                            let keep = if torn { rng.below(next - at) } else { next - at };
                            let piece = &bytes[(at - offset) as usize..][..keep as usize];
                            write_at(&mut content, at, piece);
                        }
                        at = next;
                    }
                }
            }
        }
        content
    }
}

/// All files and names.
#[derive(Clone, Debug, Default)]
struct Image {
    inodes: Vec<Inode>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    /// Creations, removals and renames whose folder has not been synced since.
    name_changes: Vec<NameChange>,
}

/// Names that change together, with their new targets: a rename removes one name and adds another.
type NameChange = Vec<(String, Option<usize>)>;

fn rename(names: &mut BTreeMap<String, usize>, change: &NameChange) {
    for (name, target) in change {
        match target {
            Some(inode) => names.insert(name.clone(), *inode),
            None => names.remove(name),
        };
    }
}

fn folder_of(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(folder, _)| folder)
}

impl Image {
    fn change_name(&mut self, name: &str, target: Option<usize>) {
        self.change_names(vec![(name.to_owned(), target)]);
    }

    fn change_names(&mut self, change: NameChange) {
        rename(&mut self.names, &change);
        self.name_changes.push(change);
    }

    fn sync_names(&mut self, folder: &str) {
        let (now, later) = std::mem::take(&mut self.name_changes)
            .into_iter()
            .partition(|change: &NameChange| folder_of(&change[0].0) == folder);
        self.name_changes = later;
        let now: Vec<NameChange> = now;
        now.iter().for_each(|change| rename(&mut self.durable_names, change));
    }

    fn used_bytes(&self) -> u64 {
        self.names.values().map(|inode| self.inodes[*inode].current.len() as u64).sum()
    }

    fn after_power_cut(&self, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        // The cases most likely to matter: none of what was not synced is kept, or all of it.
        let eighths = match seed % 4 {
            0 => 0,
            1 => 8,
            _ => 1 + rng.below(7),
        };
        let mut names = self.durable_names.clone();
        for change in &self.name_changes {
            if rng.chance(eighths) {
                rename(&mut names, change);
            }
        }
        let inodes = self.inodes.iter().map(|inode| {
            let content = inode.after_power_cut(&mut rng, eighths);
            Inode { durable: content.clone(), current: content, pending: Vec::new() }
        });
        let inodes = inodes.collect();
        Self { inodes, durable_names: names.clone(), names, name_changes: Vec::new() }
    }
}

type Hook = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Medium {
    image: Image,
    /// Number of operations so far that change the medium or make changes durable.
    mutations: u64,
    fault: Option<(u64, FaultPlan)>,
    capacity_bytes: Option<u64>,
    locked: bool,
    pins: Vec<String>,
    /// The image before each mutation, if recording is on.
    history: Option<Vec<Image>>,
    hook: Option<(Op, String, Hook)>,
}

/// A handle to a simulated medium. Clones share the medium, as processes on one machine do.
#[derive(Clone, Default)]
pub struct SimStorage {
    medium: Arc<Mutex<Medium>>,
    open: Arc<OpenFiles>,
}

/// How many files are open now, and the most that ever were.
#[derive(Debug, Default)]
struct OpenFiles {
    now: AtomicUsize,
    most: AtomicUsize,
}

impl std::fmt::Debug for SimStorage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SimStorage")
    }
}

impl SimStorage {
    fn medium(&self) -> MutexGuard<'_, Medium> {
        self.medium.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of(image: Image) -> Self {
        let medium = Arc::new(Mutex::new(Medium { image, ..Medium::default() }));
        Self { medium, open: Arc::default() }
    }

    /// Returns the most files that were ever open at a time.
    #[must_use]
    pub fn most_open_files(&self) -> usize {
        self.open.most.load(Ordering::Relaxed)
    }

    fn file(&self, name: &str, inode: usize) -> Arc<dyn StoreFile> {
        let now = self.open.now.fetch_add(1, Ordering::Relaxed) + 1;
        self.open.most.fetch_max(now, Ordering::Relaxed);
        Arc::new(SimFile { storage: self.clone(), name: name.to_owned(), inode })
    }

    /// From now on, records the state before every mutation, for [`Self::crash_before`]. Restarts
    /// the count of mutations.
    pub fn record(&self) {
        let mut medium = self.medium();
        medium.history = Some(Vec::new());
        medium.mutations = 0;
    }

    /// Returns the number of mutations so far, since [`Self::record`] if that was called.
    #[must_use]
    pub fn mutations(&self) -> u64 {
        self.medium().mutations
    }

    /// Returns the medium as found if power fails now. `self` is unaffected.
    #[must_use]
    pub fn crash(&self, seed: u64) -> Self {
        Self::of(self.medium().image.after_power_cut(seed))
    }

    /// Returns the medium as found if power failed before recorded mutation `index`.
    #[must_use]
    pub fn crash_before(&self, index: u64, seed: u64) -> Self {
        let medium = self.medium();
        let history = medium.history.as_ref().expect("recording was switched on");
        Self::of(history.get(index as usize).unwrap_or(&medium.image).after_power_cut(seed))
    }

    /// Plans a failure; `None` cancels it.
    pub fn fail(&self, plan: Option<FaultPlan>) {
        let mut medium = self.medium();
        medium.fault = plan.map(|plan| (medium.mutations + plan.after, plan));
    }

    /// Runs `hook` once, right before the next `op` on the file (or folder) `name`.
    pub fn once(&self, op: Op, name: &str, hook: impl FnOnce() + Send + 'static) {
        self.medium().hook = Some((op, name.to_owned(), Box::new(hook)));
    }

    /// Limits the medium to this many bytes; `None` lifts the limit.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.medium().capacity_bytes = bytes;
    }

    /// Returns the total size of all files that have a name, in bytes.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.medium().image.used_bytes()
    }

    /// Returns the names of all files, with their lengths in bytes.
    #[must_use]
    pub fn files(&self) -> BTreeMap<String, u64> {
        let medium = self.medium();
        let len = |inode: &usize| medium.image.inodes[*inode].current.len() as u64;
        medium.image.names.iter().map(|(name, inode)| (name.clone(), len(inode))).collect()
    }

    /// Returns the contents of a file.
    #[must_use]
    pub fn content(&self, name: &str) -> Option<Vec<u8>> {
        let medium = self.medium();
        medium.image.names.get(name).map(|inode| medium.image.inodes[*inode].current.clone())
    }

    /// Creates or replaces a file durably, or removes it, as damage or a third party would.
    pub fn put(&self, name: &str, content: Option<&[u8]>) {
        let mut medium = self.medium();
        let image = &mut medium.image;
        let inode = content.map(|content| {
            let (durable, current) = (content.to_vec(), content.to_vec());
            image.inodes.push(Inode { durable, current, pending: Vec::new() });
            image.inodes.len() - 1
        });
        let change = vec![(name.to_owned(), inode)];
        rename(&mut image.names, &change);
        rename(&mut image.durable_names, &change);
    }

    /// Prepares a mutation: runs the hook, records the history, and returns the fault to inject.
    fn mutate(&self, op: Op, name: &str) -> (MutexGuard<'_, Medium>, Option<Fault>) {
        let mut medium = self.medium();
        if medium.hook.as_ref().is_some_and(|(on, file, _)| (*on, file.as_str()) == (op, name)) {
            let (_, _, hook) = medium.hook.take().expect("just seen");
            // The hook may use the medium itself.
            drop(medium);
            hook();
            medium = self.medium();
        }
        if op == Op::Lock {
            return (medium, None);
        }
        let index = medium.mutations;
        medium.mutations += 1;
        let before = medium.history.is_some().then(|| medium.image.clone());
        medium.history.iter_mut().zip(before).for_each(|(history, image)| history.push(image));
        let fault = medium.fault.filter(|(at, plan)| index == *at || (plan.lasting && index > *at));
        (medium, fault.map(|(_, plan)| plan.fault))
    }
}

impl Fault {
    fn error(self) -> io::Error {
        io::Error::from_raw_os_error(if self == Self::Enospc { ENOSPC } else { EIO })
    }
}

impl Storage for SimStorage {
    fn open(&self, name: &str, _writable: bool) -> io::Result<Arc<dyn StoreFile>> {
        let inode = self.medium().image.names.get(name).copied();
        Ok(self.file(name, inode.ok_or(io::ErrorKind::NotFound)?))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn StoreFile>> {
        let (mut medium, fault) = self.mutate(Op::Create, name);
        if let Some(fault) = fault {
            return Err(fault.error());
        }
        if medium.image.names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        medium.image.inodes.push(Inode::default());
        let inode = medium.image.inodes.len() - 1;
        medium.image.change_name(name, Some(inode));
        Ok(self.file(name, inode))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let (mut medium, fault) = self.mutate(Op::Remove, name);
        if let Some(fault) = fault {
            return Err(fault.error());
        }
        if !medium.image.names.contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        medium.image.change_name(name, None);
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let (mut medium, fault) = self.mutate(Op::Rename, from);
        if let Some(fault) = fault {
            return Err(fault.error());
        }
        let inode = medium.image.names.get(from).copied().ok_or(io::ErrorKind::NotFound)?;
        medium.image.change_names(vec![(from.to_owned(), None), (to.to_owned(), Some(inode))]);
        Ok(())
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        let medium = self.medium();
        let inside = medium.image.names.keys().filter(|name| folder_of(name) == folder);
        Ok(inside.map(|name| name.rsplit('/').next().unwrap_or(name).to_owned()).collect())
    }

    fn sync_names(&self, folder: &str) -> io::Result<()> {
        let (mut medium, fault) = self.mutate(Op::SyncNames, folder);
        if let Some(fault) = fault {
            return Err(fault.error());
        }
        medium.image.sync_names(folder);
        Ok(())
    }

    fn try_lock(&self) -> Result<Box<dyn WriterLock>, LockError> {
        let (mut medium, _) = self.mutate(Op::Lock, "");
        if std::mem::replace(&mut medium.locked, true) {
            return Err(LockError::Held("another handle".into()));
        }
        Ok(Box::new(SimLock(self.clone())))
    }

    fn pin(&self, name: &str) -> io::Result<Box<dyn Pin>> {
        self.medium().pins.push(name.to_owned());
        Ok(Box::new(SimPin(self.clone(), name.to_owned())))
    }

    fn pinned(&self) -> io::Result<Vec<String>> {
        Ok(self.medium().pins.clone())
    }

    fn describe(&self) -> String {
        "simulated store".into()
    }
}

/// Pins end with their process, so they are not part of the image.
#[derive(Debug)]
struct SimPin(SimStorage, String);

impl Pin for SimPin {}

impl Drop for SimPin {
    fn drop(&mut self) {
        let mut medium = self.0.medium();
        let at = medium.pins.iter().position(|name| *name == self.1);
        medium.pins.remove(at.expect("pins are dropped once"));
    }
}

#[derive(Debug)]
struct SimLock(SimStorage);

impl WriterLock for SimLock {}

impl Drop for SimLock {
    fn drop(&mut self) {
        self.0.medium().locked = false;
    }
}

#[derive(Debug)]
struct SimFile {
    storage: SimStorage,
    name: String,
    inode: usize,
}

impl Drop for SimFile {
    fn drop(&mut self) {
        self.storage.open.now.fetch_sub(1, Ordering::Relaxed);
    }
}

impl StoreFile for SimFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let medium = self.storage.medium();
        let content = &medium.image.inodes[self.inode].current;
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = content.get(start..).and_then(|rest| rest.get(..buf.len()));
        buf.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let (mut medium, fault) = self.storage.mutate(Op::Write, &self.name);
        let len = medium.image.inodes[self.inode].current.len() as u64;
        let growth = (offset + buf.len() as u64).saturating_sub(len);
        let free = medium
            .capacity_bytes
            .map_or(u64::MAX, |capacity| capacity.saturating_sub(medium.image.used_bytes()));
        let (keep, error) = match fault {
            Some(Fault::Torn) => (buf.len() * 2 / 3, Some(Fault::Torn)),
            Some(fault) => (0, Some(fault)),
            // A full medium keeps what fits.
            None if growth > free => {
                (buf.len().saturating_sub((growth - free) as usize), Some(Fault::Enospc))
            }
            None => (buf.len(), None),
        };
        if keep > 0 {
            let change = Change::Write { offset, bytes: buf[..keep].to_vec() };
            medium.image.inodes[self.inode].change(change);
        }
        error.map_or(Ok(()), |fault| Err(fault.error()))
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.storage.medium().image.inodes[self.inode].current.len() as u64)
    }

    fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        let (mut medium, fault) = self.storage.mutate(Op::SetLen, &self.name);
        if let Some(fault) = fault {
            return Err(fault.error());
        }
        medium.image.inodes[self.inode].change(Change::SetLen(len_bytes));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let (mut medium, fault) = self.storage.mutate(Op::Sync, &self.name);
        let inode = &mut medium.image.inodes[self.inode];
        if let Some(fault) = fault {
            inode.pending.iter_mut().for_each(|(_, in_doubt)| *in_doubt = true);
            return Err(fault.error());
        }
        inode.sync();
        Ok(())
    }
}
