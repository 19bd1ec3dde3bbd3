//! The register of the VMs running on this host: a small file and a socket for each, in the user's
//! runtime folder.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use frazil_snapstore::SnapshotId;
use serde::{Deserialize, Serialize};

use crate::error::{Result, VmmError};

/// Listing VMs locks each of their files for a moment; a file that stays locked for longer than
/// this belongs to a running VM.
const LOOKED_AT: Duration = Duration::from_millis(200);

/// The register's record of a running VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// The VM's name.
    pub name: String,
    /// The id of the process that runs it.
    pub pid: u32,
    /// The path of its control socket.
    pub socket: PathBuf,
}

/// The folder of running VMs: `$FRAZIL_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/frazil`, else
/// `/run/frazil` for root, else `/tmp/frazil-UID`.
#[must_use]
pub fn runtime_folder() -> PathBuf {
    if let Some(folder) = std::env::var_os("FRAZIL_RUNTIME_DIR") {
        return folder.into();
    }
    if let Some(folder) = std::env::var_os("XDG_RUNTIME_DIR") {
        return Path::new(&folder).join("frazil");
    }
    match rustix::process::getuid().as_raw() {
        0 => PathBuf::from("/run/frazil"),
        uid => PathBuf::from(format!("/tmp/frazil-{uid}")),
    }
}

/// The path of the socket of the process that serves the memory of snapshot `id` to clones.
///
/// # Errors
/// [`VmmError::Host`] if the folder of running VMs cannot be created; [`VmmError::Config`] if it
/// belongs to another user.
pub fn memory_socket(id: SnapshotId) -> Result<PathBuf> {
    let folder = runtime_folder();
    make_private_folder(&folder)?;
    Ok(folder.join(format!("memory-{}.socket", id.short())))
}

/// A running VM's entry in the register, removed when dropped.
#[derive(Debug)]
pub struct Registration {
    record: VmRecord,
    file: PathBuf,
    /// The file opened for writing, until the record is written. Opened early, since the process
    /// may switch to a user who must not be able to change the record.
    unwritten: Option<File>,
    // The lock shows that the process lives: the kernel drops it however the process ends.
    _lock: File,
}

impl Registration {
    /// Reserves `name` for a VM, with its control socket at `socket` or at the usual place. The VM
    /// is not listed before [`Self::announce`].
    ///
    /// # Errors
    /// [`VmmError::Config`] if `name` is not a valid name, or a VM of that name is running;
    /// [`VmmError::Host`] if its file cannot be created.
    pub fn enter(name: &str, socket: Option<PathBuf>) -> Result<Self> {
        check_name(name)?;
        let folder = runtime_folder();
        make_private_folder(&folder)?;
        let file = folder.join(format!("{name}.json"));
        let lock = lock(&file, name)?;
        let socket = socket.unwrap_or_else(|| folder.join(format!("{name}.sock")));
        let record = VmRecord { name: name.to_owned(), pid: std::process::id(), socket };
        let unwritten = OpenOptions::new().write(true).truncate(true).open(&file);
        let unwritten = unwritten.map_err(VmmError::host(format!("write {}", file.display())))?;
        Ok(Self { record, file, unwritten: Some(unwritten), _lock: lock })
    }

    /// Lists the VM. Call this once its control socket listens and it handles signals.
    ///
    /// # Errors
    /// [`VmmError::Host`] if the record cannot be written.
    pub fn announce(&mut self) -> Result<()> {
        let Some(mut unwritten) = self.unwritten.take() else { return Ok(()) };
        let json = serde_json::to_vec(&self.record)
            .map_err(|error| VmmError::Config(error.to_string()))?;
        // In one write: a partly written record does not parse and counts as none.
        let failed = VmmError::host(format!("write {}", self.file.display()));
        unwritten.write_all(&json).map_err(failed)
    }

    /// The VM's record.
    #[must_use]
    pub fn record(&self) -> &VmRecord {
        &self.record
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // A file that cannot be removed is recognised as stale, since its lock goes with this.
        // The server removes its own socket.
        let _gone = fs::remove_file(&self.file);
    }
}

fn check_name(name: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.chars().all(allowed) {
        return Err(VmmError::Config(format!(
            "name: expected up to 64 letters, digits, `-`, `_` or `.`, not starting with `.`, found `{name}`"
        )));
    }
    Ok(())
}

fn make_private_folder(folder: &Path) -> Result<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(VmmError::host(format!("create {}", folder.display())))?;
    // In /tmp another user may have created it first.
    let owner = rustix::fs::stat(folder).map(|stat| stat.st_uid);
    if owner != Ok(rustix::process::getuid().as_raw()) {
        return Err(VmmError::Config(format!(
            "{} belongs to another user: set FRAZIL_RUNTIME_DIR to a folder of your own",
            folder.display()
        )));
    }
    Ok(())
}

/// Creates `file` if necessary and locks it, taking over the file of a dead process.
fn lock(file: &Path, name: &str) -> Result<File> {
    let cannot = |error| VmmError::host(format!("create {}", file.display()))(error);
    let until = Instant::now() + LOOKED_AT;
    loop {
        let mut make = OpenOptions::new();
        make.write(true).create(true).truncate(false).mode(0o600).open(file).map_err(cannot)?;
        let lock = match File::open(file) {
            // Its previous owner has just removed it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            opened => opened.map_err(cannot)?,
        };
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) if Instant::now() < until => {
                std::thread::sleep(LOOKED_AT / 20);
                continue;
            }
            Err(TryLockError::WouldBlock) => {
                let pid = read_record(file)
                    .map_or_else(String::new, |record| format!(" (process {})", record.pid));
                return Err(VmmError::Config(format!(
                    "a VM `{name}` is already running{pid}: choose another --name, or `frazil stop {name}`"
                )));
            }
            Err(TryLockError::Error(error)) => return Err(cannot(error)),
        }
        // Between our open and lock, its previous owner may have removed it: then the name no
        // longer refers to the file that we locked.
        let same = match (lock.metadata(), fs::metadata(file)) {
            (Ok(ours), Ok(named)) => ours.ino() == named.ino(),
            _ => false,
        };
        if same {
            return Ok(lock);
        }
    }
}

fn read_record(file: &Path) -> Option<VmRecord> {
    serde_json::from_slice(&fs::read(file).ok()?).ok()
}

/// True if the process that registered `file` lives.
fn is_live(file: &Path) -> bool {
    File::open(file)
        .is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// Removes the empty file of a process that ended before its VM was
/// [announced](Registration::announce).
fn clear_name_away(file: &Path) {
    let Ok(lock) = OpenOptions::new().write(true).open(file) else { return };
    // While we hold the lock nobody else removes or writes the file.
    let is_empty = |found: fs::Metadata| found.len() == 0 && found.nlink() > 0;
    if lock.try_lock().is_ok() && lock.metadata().is_ok_and(is_empty) {
        let _gone = fs::remove_file(file);
    }
}

/// Removes what a dead process left behind, unless another has taken it over.
fn clear_away(file: &Path, record: &VmRecord) {
    // While we hold the lock nobody can register; an unchanged record shows that nobody has.
    let Ok(lock) = OpenOptions::new().write(true).open(file) else { return };
    if lock.try_lock().is_err() || read_record(file).as_ref() != Some(record) {
        return;
    }
    if std::os::unix::net::UnixStream::connect(&record.socket).is_err() {
        let is_socket = fs::symlink_metadata(&record.socket)
            .is_ok_and(|found| std::os::unix::fs::FileTypeExt::is_socket(&found.file_type()));
        if is_socket {
            let _gone = fs::remove_file(&record.socket);
        }
    }
    let _gone = fs::remove_file(file);
}

/// Removes the lock file `lock` of a process that served memory to clones, and what it left beside
/// that because it was killed or had no right to remove it. A log that is not empty stays.
fn clear_memory_away(lock: &Path) {
    let Ok(held) = OpenOptions::new().write(true).open(lock) else { return };
    // A lock file that was unlinked in the meantime says nothing about its successor's owner.
    if held.try_lock().is_err() || held.metadata().is_ok_and(|found| found.nlink() == 0) {
        return;
    }
    let socket = lock.with_extension("");
    let log = lock.with_extension("log");
    if fs::metadata(&log).is_ok_and(|found| found.len() == 0) {
        let _gone = fs::remove_file(&log);
    }
    // The lock last: without it, the next such process may begin.
    for path in [socket.as_path(), lock] {
        let _gone = fs::remove_file(path);
    }
}

/// The running VMs, sorted by name. Removes what dead processes left behind.
///
/// # Errors
/// [`VmmError::Host`] if the folder cannot be read.
pub fn list() -> Result<Vec<VmRecord>> {
    let folder = runtime_folder();
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(VmmError::host(format!("read {}", folder.display()))(error)),
    };
    let mut records = Vec::new();
    for entry in entries.flatten() {
        let file = entry.path();
        if file.extension().is_some_and(|extension| extension == "lock") {
            clear_memory_away(&file);
        }
        if file.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        match read_record(&file) {
            Some(record) if is_live(&file) => records.push(record),
            Some(record) => clear_away(&file, &record),
            // Not announced yet, never announced, or not readable to us.
            None => clear_name_away(&file),
        }
    }
    records.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(records)
}

/// The running VM called `name`; a name with a slash is the path of a VM's socket.
///
/// # Errors
/// [`VmmError::NoSuchVm`] if there is none; as [`list`].
pub fn find(name: &str) -> Result<VmRecord> {
    if name.contains('/') {
        return Ok(VmRecord { name: name.to_owned(), pid: 0, socket: name.into() });
    }
    let running = list()?;
    let names = running.iter().map(|record| record.name.clone()).collect::<Vec<_>>().join(", ");
    running.into_iter().find(|record| record.name == name).ok_or_else(|| VmmError::NoSuchVm {
        name: name.to_owned(),
        found: if names.is_empty() {
            "none is running".into()
        } else {
            format!("running: {names}")
        },
    })
}
