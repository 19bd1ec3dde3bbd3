//! A store directory on a medium that fails on demand, or is full at a given size.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use frazil_snapstore::{
    DirStorage, LockError, Pin, SEGMENT_FOLDER, Storage, StoreFile, WriterLock,
};

/// "Input/output error".
pub const EIO: i32 = 5;
/// "No space left on device".
pub const ENOSPC: i32 = 28;

/// The longest that a hanging medium hangs, so that a test that never releases it still ends.
const HANG_MAX: Duration = Duration::from_mins(1);

/// The failures of a [`FaultyStorage`]. Only operations that change the medium fail.
#[derive(Debug)]
pub struct Faults {
    /// Number of operations that still succeed; negative if no failure is planned.
    left: AtomicI64,
    errno: AtomicI32,
    /// True if all operations after the first that fails do so too.
    lasting: AtomicBool,
    capacity_bytes: AtomicU64,
    injected: AtomicU64,
    hangs: Mutex<bool>,
    released: Condvar,
    usage: OnceLock<Usage>,
}

/// Returns how many bytes are in use.
struct Usage(Box<dyn Fn() -> u64 + Send + Sync>);

impl std::fmt::Debug for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Usage")
    }
}

impl Faults {
    /// Lets `after` more operations that change the medium succeed and makes the next one fail with
    /// `errno`; if `lasting`, all later ones fail too.
    pub fn plan(&self, after: u64, errno: i32, lasting: bool) {
        self.errno.store(errno, Ordering::SeqCst);
        self.lasting.store(lasting, Ordering::SeqCst);
        self.left.store(after as i64, Ordering::SeqCst);
    }

    /// Limits the medium to `bytes`.
    pub fn limit(&self, bytes: u64) {
        self.capacity_bytes.store(bytes, Ordering::SeqCst);
    }

    /// From now on, writing to files and syncing them waits for [`Self::release`].
    pub fn hang(&self) {
        *self.hangs.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// Ends [`Self::hang`].
    pub fn release(&self) {
        *self.hangs.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.released.notify_all();
    }

    fn wait_while_it_hangs(&self) {
        let hangs = self.hangs.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.released.wait_timeout_while(hangs, HANG_MAX, |hangs| *hangs);
        let (mut hangs, result) = waited.unwrap_or_else(PoisonError::into_inner);
        *hangs &= !result.timed_out();
    }

    /// Cancels any planned failure and the capacity limit.
    pub fn clear(&self) {
        self.left.store(-1, Ordering::SeqCst);
        self.capacity_bytes.store(u64::MAX, Ordering::SeqCst);
    }

    /// Number of operations that have been made to fail so far.
    #[must_use]
    pub fn injected(&self) -> u64 {
        self.injected.load(Ordering::SeqCst)
    }

    fn fail(&self, errno: i32) -> io::Result<()> {
        self.injected.fetch_add(1, Ordering::SeqCst);
        Err(io::Error::from_raw_os_error(errno))
    }

    fn check(&self) -> io::Result<()> {
        let step = |left: i64| (left >= 0).then(|| left - 1);
        // An error from `fetch_update` only means that no failure is planned.
        match self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, step) {
            Ok(0) => {
                if self.lasting.load(Ordering::SeqCst) {
                    self.left.store(0, Ordering::SeqCst);
                }
                self.fail(self.errno.load(Ordering::SeqCst))
            }
            _ => Ok(()),
        }
    }

    fn check_room(&self, more: u64) -> io::Result<()> {
        let capacity = self.capacity_bytes.load(Ordering::SeqCst);
        let used = self.usage.get().map_or(0, |usage| (usage.0)());
        if capacity != u64::MAX && used + more > capacity { self.fail(ENOSPC) } else { Ok(()) }
    }
}

/// A store's directory with [`Faults`].
#[derive(Debug)]
pub struct FaultyStorage {
    inner: DirStorage,
    faults: Arc<Faults>,
}

impl FaultyStorage {
    /// Creates the store's folders in the directory `root`; nothing fails until told to.
    #[must_use]
    pub fn new(root: &Path) -> (Self, Arc<Faults>) {
        let inner = DirStorage::new(root);
        inner.create_folders().expect("a scratch folder");
        let faults = Arc::new(Faults {
            left: AtomicI64::new(-1),
            errno: AtomicI32::new(EIO),
            lasting: AtomicBool::new(false),
            capacity_bytes: AtomicU64::new(u64::MAX),
            injected: AtomicU64::new(0),
            hangs: Mutex::new(false),
            released: Condvar::new(),
            usage: OnceLock::new(),
        });
        let path = root.to_path_buf();
        let usage = Usage(Box::new(move || used_bytes(&path)));
        faults.usage.set(usage).expect("it is set once");
        (Self { inner, faults: Arc::clone(&faults) }, faults)
    }
}

/// Total size of all files of the store at `root`, in bytes.
#[must_use]
pub fn used_bytes(root: &Path) -> u64 {
    let folder_bytes = |folder: &Path| -> u64 {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let files = entries.filter_map(|entry| entry.metadata().ok());
        files.filter(std::fs::Metadata::is_file).map(|file| file.len()).sum()
    };
    folder_bytes(root) + folder_bytes(&root.join(SEGMENT_FOLDER))
}

impl Storage for FaultyStorage {
    fn open(&self, name: &str, writable: bool) -> io::Result<Arc<dyn StoreFile>> {
        let inner = self.inner.open(name, writable)?;
        Ok(Arc::new(FaultyFile { inner, faults: Arc::clone(&self.faults) }))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn StoreFile>> {
        self.faults.check()?;
        let inner = self.inner.create(name)?;
        Ok(Arc::new(FaultyFile { inner, faults: Arc::clone(&self.faults) }))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.faults.check()?;
        self.inner.remove(name)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.faults.check()?;
        self.inner.rename(from, to)
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        self.inner.list(folder)
    }

    fn pin(&self, name: &str) -> io::Result<Box<dyn Pin>> {
        self.inner.pin(name)
    }

    fn pinned(&self) -> io::Result<Vec<String>> {
        self.inner.pinned()
    }

    fn sync_names(&self, folder: &str) -> io::Result<()> {
        self.faults.check()?;
        self.inner.sync_names(folder)
    }

    fn try_lock(&self) -> Result<Box<dyn WriterLock>, LockError> {
        self.inner.try_lock()
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

#[derive(Debug)]
struct FaultyFile {
    inner: Arc<dyn StoreFile>,
    faults: Arc<Faults>,
}

impl StoreFile for FaultyFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.faults.wait_while_it_hangs();
        let grows = (offset + buf.len() as u64).saturating_sub(self.inner.len_bytes()?);
        if let Err(error) = self.faults.check().and_then(|()| self.faults.check_room(grows)) {
            // As on a real disk, part of the data is written, and the caller cannot tell which.
            self.inner.write_all_at(&buf[..buf.len() / 2], offset)?;
            return Err(error);
        }
        self.inner.write_all_at(buf, offset)
    }

    fn len_bytes(&self) -> io::Result<u64> {
        self.inner.len_bytes()
    }

    fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        self.faults.check()?;
        self.inner.set_len(len_bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.faults.wait_while_it_hangs();
        self.faults.check()?;
        self.inner.sync()
    }
}
