//! All access to the medium: a small trait, and its implementation on a directory.
//!
//! The store relies on these few calls alone for durability, so a crash simulator or a failing
//! disk is just another implementation of them (see the `tests` folder of the repository).

use std::fmt::Debug;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::format::{PIN_FOLDER, SEGMENT_FOLDER};
use crate::pins;

/// One file of a store.
pub trait StoreFile: Send + Sync + Debug {
    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` if the file ends before `buf` is full.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `buf` at `offset`, growing the file if needed. [`Self::sync`] makes it
    /// durable.
    ///
    /// # Errors
    /// The medium's; after one, any part of `buf` may have been written.
    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Length in bytes.
    ///
    /// # Errors
    /// The medium's.
    fn len_bytes(&self) -> io::Result<u64>;

    /// Cuts or grows the file.
    ///
    /// # Errors
    /// The medium's.
    fn set_len(&self, len_bytes: u64) -> io::Result<()>;

    /// Makes everything written to the file durable.
    ///
    /// # Errors
    /// The medium's; after one, nothing is known about what was written since the last success.
    fn sync(&self) -> io::Result<()>;
}

/// Held while a transaction writes; dropping it lets the next writer in.
pub trait WriterLock: Send + Debug {}

/// Why the writer lock could not be taken.
#[derive(Debug)]
pub enum LockError {
    /// Another writer holds the lock; the text says who.
    Held(String),
    /// An I/O error.
    Io(io::Error),
}

/// A place that holds a store's files, named by paths relative to it.
pub trait Storage: Send + Sync + Debug {
    /// Opens an existing file for reading, and for writing if `writable`.
    ///
    /// # Errors
    /// `NotFound` if it does not exist.
    fn open(&self, name: &str, writable: bool) -> io::Result<Arc<dyn StoreFile>>;

    /// Creates a new, empty file for reading and writing. [`Self::sync_names`] makes its name
    /// durable.
    ///
    /// # Errors
    /// `AlreadyExists` if it exists.
    fn create(&self, name: &str) -> io::Result<Arc<dyn StoreFile>>;

    /// Removes a file.
    ///
    /// # Errors
    /// The medium's.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Renames file `from` to `to` in the same folder, atomically replacing an existing `to`.
    ///
    /// # Errors
    /// The medium's.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Names of the files in `folder` ("" is the store itself), in no particular order.
    ///
    /// # Errors
    /// The medium's.
    fn list(&self, folder: &str) -> io::Result<Vec<String>>;

    /// Makes creations, removals and renames in `folder` durable.
    ///
    /// # Errors
    /// The medium's.
    fn sync_names(&self, folder: &str) -> io::Result<()>;

    /// Takes the writer lock without waiting.
    ///
    /// # Errors
    /// [`LockError::Held`] if another writer, in this or another process, has it.
    fn try_lock(&self) -> Result<Box<dyn WriterLock>, LockError>;

    /// Marks `name` as in use by this process, until the pin is dropped or the process ends in any
    /// way. The same name may be pinned many times.
    ///
    /// # Errors
    /// The medium's, such as when it is read-only.
    fn pin(&self, name: &str) -> io::Result<Box<dyn Pin>>;

    /// The names pinned by this or any other process.
    ///
    /// # Errors
    /// The medium's.
    fn pinned(&self) -> io::Result<Vec<String>>;

    /// Where the store is, for messages.
    fn describe(&self) -> String;

    /// The store's folder in a local file system, where another process can open it, if it has
    /// one.
    fn folder(&self) -> Option<PathBuf> {
        None
    }
}

/// Keeps a snapshot from being pruned while it is in use.
pub trait Pin: Send + Sync + Debug {}

/// A store in a directory of a local file system.
#[derive(Debug)]
pub struct DirStorage {
    root: PathBuf,
}

impl DirStorage {
    /// A storage on `root`, which need not exist yet.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Creates the directory and its folders if they are missing, durably.
    ///
    /// # Errors
    /// The file system's.
    pub fn create_folders(&self) -> io::Result<()> {
        let to_sync = self.folders_to_sync();
        fs::create_dir_all(self.root.join(SEGMENT_FOLDER))?;
        to_sync.iter().try_for_each(|folder| File::open(folder)?.sync_all())
    }

    /// The folders to sync when the store is created: those that get a new entry, from the store's
    /// own up to the nearest one that exists.
    fn folders_to_sync(&self) -> Vec<PathBuf> {
        let segments = self.root.join(SEGMENT_FOLDER);
        // These two are synced even if they exist: whoever made them may not have got that far.
        let own = |folder: &Path| folder == segments || folder == self.root;
        let made = segments.ancestors().take_while(|folder| own(folder) || !folder.exists());
        let here = Path::new(".");
        let above = made.filter_map(Path::parent);
        above
            .map(|folder| if folder.as_os_str().is_empty() { here } else { folder }.to_owned())
            .collect()
    }

    /// The directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }
}

impl Storage for DirStorage {
    fn open(&self, name: &str, writable: bool) -> io::Result<Arc<dyn StoreFile>> {
        let file = OpenOptions::new().read(true).write(writable).open(self.root.join(name))?;
        Ok(Arc::new(DirFile(file)))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn StoreFile>> {
        let path = self.root.join(name);
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        Ok(Arc::new(DirFile(file)))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.root.join(name))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.root.join(from), self.root.join(to))
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        fs::read_dir(self.root.join(folder))?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect()
    }

    fn sync_names(&self, folder: &str) -> io::Result<()> {
        File::open(self.root.join(folder))?.sync_all()
    }

    fn try_lock(&self) -> Result<Box<dyn WriterLock>, LockError> {
        let path = self.root.join(crate::format::LOCK_FILE);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(LockError::Io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // Only a hint for the message: the holder may be writing it just now.
                let _unread = file.read_to_string(&mut holder);
                let holder = holder.trim();
                return Err(LockError::Held(if holder.is_empty() {
                    "another process".to_owned()
                } else {
                    format!("process {holder}")
                }));
            }
            Err(TryLockError::Error(error)) => return Err(LockError::Io(error)),
        }
        // The lock is the flock; the process id is only a hint for others. Failing to write it on
        // a full disk must not stop a `prune` that would free space.
        let _unwritten = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
        Ok(Box::new(DirLock { file }))
    }

    fn pin(&self, name: &str) -> io::Result<Box<dyn Pin>> {
        pins::pin(&self.root.join(PIN_FOLDER), name)
    }

    fn pinned(&self) -> io::Result<Vec<String>> {
        pins::pinned(&self.root.join(PIN_FOLDER))
    }

    fn describe(&self) -> String {
        format!("store {}", self.root.display())
    }

    fn folder(&self) -> Option<PathBuf> {
        std::path::absolute(&self.root).ok()
    }
}

#[derive(Debug)]
struct DirLock {
    // The kernel drops the flock when the last descriptor closes, however the process ends.
    file: File,
}

impl Drop for DirLock {
    fn drop(&mut self) {
        // Closing the file is not enough: a child process being started has a copy of the
        // descriptor until it calls exec.
        let _closed_below_at_the_latest = self.file.unlock();
    }
}

impl WriterLock for DirLock {}

#[derive(Debug)]
struct DirFile(File);

impl StoreFile for DirFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(buf, offset)
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        self.0.set_len(len_bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A store whose folder's name a crash takes back is lost with all that was published.
    #[test]
    fn every_folder_that_gets_a_name_is_synced() {
        let scratch = tempfile::tempdir().unwrap();
        let top = scratch.path();
        let storage = DirStorage::new(top.join("a/b/st"));
        let expected = ["a/b/st", "a/b", "a", ""].map(|name| top.join(name));
        assert_eq!(storage.folders_to_sync(), expected);
        storage.create_folders().unwrap();
        assert!(top.join("a/b/st/segments").is_dir());
        assert_eq!(
            storage.folders_to_sync(),
            expected[..2],
            "what was there before is not looked at"
        );
        assert_eq!(DirStorage::new("st").folders_to_sync(), [Path::new("st"), Path::new(".")]);
    }
}
