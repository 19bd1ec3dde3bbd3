//! The pages the guest wrote, in a sparse file without a name, which goes with the process.

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

/// Where what the guest writes is kept until it is in a snapshot, and how much of what a checkpoint
/// still has to read may be in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverlayOptions {
    /// The folder of the overlay's file, which has no name there; None keeps it in memory.
    pub folder: Option<PathBuf>,
    /// Pages that were overwritten during a checkpoint, and are not saved yet, beyond which the old
    /// contents go to the overlay's file.
    pub kept_pages_max: u64,
}

impl Default for OverlayOptions {
    /// In memory; 16 MiB of overwritten pages.
    fn default() -> Self {
        Self { folder: None, kept_pages_max: 4096 }
    }
}

/// The few calls an overlay makes to its file. Tests have another that fails.
pub(super) trait Medium: Send + Sync + Debug {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes a range of whole pages read as zeros, and gives its space back.
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

/// See the module's text. Behind the disk's own pages the file has *slots*, for old contents that a
/// checkpoint has not read yet.
#[derive(Debug)]
pub(super) struct Overlay {
    medium: Box<dyn Medium>,
    /// Where it is, for messages.
    place: String,
    pages: u64,
    /// Pages whose contents are here, no longer below.
    present: LockedPages,
    slots: AtomicU64,
}

impl Overlay {
    /// An overlay that holds none of a disk's `pages` pages yet.
    ///
    /// # Errors
    /// [`VmmError::Host`] if its file cannot be made.
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

    /// Which pages of a chunk are here. The caller holds the chunk's lock, as for all that follows.
    pub(super) fn present(&self, chunk: u64) -> u64 {
        self.present.word(chunk)
    }

    pub(super) fn holds(&self, page: u64) -> bool {
        self.present(page / CHUNK_PAGES) & mask(page % CHUNK_PAGES, 1) != 0
    }

    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.medium.read(offset, buf).map_err(self.named())
    }

    /// Writes bytes of one chunk: whole pages, or a part of a page that is here.
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.medium.write(offset, bytes).map_err(self.named())?;
        let first = offset / PAGE_BYTES;
        self.mark(first, (offset + bytes.len() as u64).div_ceil(PAGE_BYTES) - first);
        Ok(())
    }

    /// Makes pages of one chunk zero.
    pub(super) fn punch(&self, first: u64, count: u64) -> io::Result<()> {
        // Whether they are here or not: a write that failed may have left something.
        self.medium.punch(first * PAGE_BYTES, count * PAGE_BYTES).map_err(self.named())?;
        self.mark(first, count);
        Ok(())
    }

    fn mark(&self, first: u64, count: u64) {
        self.present.insert(first / CHUNK_PAGES, mask(first % CHUNK_PAGES, count));
    }

    /// Puts a page behind the disk's own; returns where.
    pub(super) fn put_slot(&self, page: &Page) -> io::Result<u64> {
        let slot = self.slots.fetch_add(1, Ordering::Relaxed);
        self.medium.write((self.pages + slot) * PAGE_BYTES, page).map_err(self.named())?;
        Ok(slot)
    }

    pub(super) fn read_slot(&self, slot: u64, buf: &mut Page) -> io::Result<()> {
        self.medium.read((self.pages + slot) * PAGE_BYTES, buf).map_err(self.named())
    }

    /// Gives the space of all slots back. Nobody uses one any more.
    pub(super) fn drop_slots(&self) {
        if self.slots.swap(0, Ordering::Relaxed) == 0 {
            return;
        }
        if let Err(error) = self.medium.set_len(self.pages * PAGE_BYTES) {
            // They are written over by the next checkpoint's.
            tracing::warn!(%error, place = self.place, "cannot shorten a disk's overlay");
        }
    }

    fn named(&self) -> impl Fn(io::Error) -> io::Error + '_ {
        |error| {
            io::Error::new(error.kind(), format!("the disk's overlay in {}: {error}", self.place))
        }
    }
}

/// Files made with a name that was taken away again; makes those names differ.
static NAMELESS_FILES: AtomicU64 = AtomicU64::new(0);

/// A file that is in `folder`'s file system and in no folder.
fn nameless_file(folder: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match open(folder, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => return Ok(File::from(file)),
        // A file system that always wants a name, NFS for one.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    let count = NAMELESS_FILES.fetch_add(1, Ordering::Relaxed);
    let path = folder.join(format!(".frazil-disk-{}-{count}", std::process::id()));
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}
