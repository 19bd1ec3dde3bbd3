//! The pages the guest wrote, in a sparse, unnamed file that vanishes with the process.

use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use frazil_snapstore::{PAGE_SIZE, Page};
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags, fallocate, memfd_create, open};
use rustix::io::Errno;

use super::PAGE_BYTES;
use super::pages::{CHUNK_PAGES, LockedPages, mask};
use crate::error::{Result, VmmError};

/// Where the guest's writes are kept, and how much of what a checkpoint still has to read may be in
/// memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverlayOptions {
    /// The folder for the overlay's unnamed file; `None` keeps the overlay in memory.
    pub folder: Option<PathBuf>,
    /// How many pages overwritten before a checkpoint has saved them may have their old contents
    /// kept in memory; those of further pages go to the overlay's file.
    pub kept_pages_max: u64,
}

impl Default for OverlayOptions {
    /// In memory; 16 MiB of overwritten pages.
    fn default() -> Self {
        Self { folder: None, kept_pages_max: 4096 }
    }
}

/// The few operations an overlay needs of its file. Tests have an implementation that fails.
pub(super) trait Medium: Send + Sync + Debug {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes a range of whole pages read as zeros, and frees its space.
    fn punch(&self, offset: u64, len_bytes: u64) -> io::Result<()>;

    fn set_len(&self, len_bytes: u64) -> io::Result<()>;
}

impl Medium for File {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buf, offset)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn punch(&self, offset: u64, len_bytes: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(self, flags, offset, len_bytes) {
            // A file system without holes.
            Err(Errno::OPNOTSUPP) => (0..len_bytes / PAGE_BYTES).try_for_each(|page| {
                self.write_all_at(&[0; PAGE_SIZE], offset + page * PAGE_BYTES)
            }),
            other => Ok(other?),
        }
    }

    fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        File::set_len(self, len_bytes)
    }
}

/// See the module documentation. After the disk's own pages the file has *slots*, for old contents
/// that a checkpoint has not read yet.
#[derive(Debug)]
pub(super) struct Overlay {
    medium: Box<dyn Medium>,
    /// Where the overlay is, for messages.
    place: String,
    pages: u64,
    /// Pages that the overlay holds; all others are in the base.
    present: LockedPages,
    slots: AtomicU64,
}

impl Overlay {
    /// Creates an overlay that holds none of a disk's `pages` pages yet.
    ///
    /// # Errors
    /// [`VmmError::Host`] if its file cannot be created.
    pub(super) fn create(folder: Option<&Path>, pages: u64) -> Result<Self> {
        let place =
            folder.map_or_else(|| "memory".to_owned(), |folder| folder.display().to_string());
        let create = || VmmError::host(format!("create a disk's overlay in {place}"));
        let file = match folder {
            None => memfd_create("frazil-disk", MemfdFlags::CLOEXEC)
                .map(File::from)
                .map_err(io::Error::from),
            Some(folder) => nameless_file(folder),
        };
        let file = file.map_err(create())?;
        Self::on(Box::new(file), place.clone(), pages).map_err(create())
    }

    pub(super) fn on(medium: Box<dyn Medium>, place: String, pages: u64) -> io::Result<Self> {
        medium.set_len(pages * PAGE_BYTES)?;
        let present = LockedPages::new(pages.div_ceil(CHUNK_PAGES));
        Ok(Self { medium, place, pages, present, slots: AtomicU64::new(0) })
    }

    /// Returns which pages of a chunk the overlay holds. The caller holds the chunk's lock, as for
    /// all methods below.
    pub(super) fn present(&self, chunk: u64) -> u64 {
        self.present.word(chunk)
    }

    pub(super) fn holds(&self, page: u64) -> bool {
        self.present(page / CHUNK_PAGES) & mask(page % CHUNK_PAGES, 1) != 0
    }

    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.medium.read(offset, buf).map_err(self.named())
    }

    /// Writes bytes of one chunk: whole pages, or a part of a page that the overlay holds.
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.medium.write(offset, bytes).map_err(self.named())?;
        let first = offset / PAGE_BYTES;
        self.mark(first, (offset + bytes.len() as u64).div_ceil(PAGE_BYTES) - first);
        Ok(())
    }

    /// Zeros pages of one chunk.
    pub(super) fn punch(&self, first: u64, count: u64) -> io::Result<()> {
        // Even if the overlay does not hold them: a failed write may have left something there.
        self.medium.punch(first * PAGE_BYTES, count * PAGE_BYTES).map_err(self.named())?;
        self.mark(first, count);
        Ok(())
    }

    fn mark(&self, first: u64, count: u64) {
        self.present.insert(first / CHUNK_PAGES, mask(first % CHUNK_PAGES, count));
    }

    /// Stores a page after the disk's own and returns its slot.
    pub(super) fn put_slot(&self, page: &Page) -> io::Result<u64> {
        let slot = self.slots.fetch_add(1, Ordering::Relaxed);
        self.medium.write((self.pages + slot) * PAGE_BYTES, page).map_err(self.named())?;
        Ok(slot)
    }

    pub(super) fn read_slot(&self, slot: u64, buf: &mut Page) -> io::Result<()> {
        self.medium.read((self.pages + slot) * PAGE_BYTES, buf).map_err(self.named())
    }

    /// Frees the space of all slots. None may be in use any more.
    pub(super) fn drop_slots(&self) {
        if self.slots.swap(0, Ordering::Relaxed) == 0 {
            return;
        }
        if let Err(error) = self.medium.set_len(self.pages * PAGE_BYTES) {
            // The next checkpoint's slots overwrite these.
            tracing::warn!(%error, place = self.place, "cannot shorten a disk's overlay");
        }
    }

    fn named(&self) -> impl Fn(io::Error) -> io::Error + '_ {
        |error| {
            io::Error::new(error.kind(), format!("the disk's overlay in {}: {error}", self.place))
        }
    }
}

/// Number of files created under a temporary name; makes those names differ.
static NAMELESS_FILES: AtomicU64 = AtomicU64::new(0);

/// Creates a file in `folder`'s file system that is in no folder.
fn nameless_file(folder: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match open(folder, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => return Ok(File::from(file)),
        // The file system does not support unnamed files; NFS is one.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    let count = NAMELESS_FILES.fetch_add(1, Ordering::Relaxed);
    let path = folder.join(format!(".frazil-disk-{}-{count}", std::process::id()));
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}
