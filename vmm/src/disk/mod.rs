//! Disks: block storage whose contents are part of every snapshot, cut at the same moment as
//! memory.
//!
//! A [`Disk`] is a base that never changes, a file or a snapshot's region, and an overlay of the
//! pages the guest wrote. Devices work on it through [`Request`]s from any thread. A checkpoint
//! [drains](Disk::drain) them while the guest stands still, [freezes](Drained::freeze) the pages
//! written since the last one, and reads them from the [`FrozenDisk`] while the guest runs again.
//! [`DiskLine`] keeps track of those pages. The block device that the guest sees is elsewhere.

mod base;
mod contents;
mod freeze;
mod line;
mod overlay;
mod pages;
mod requests;
mod state;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use frazil_snapstore::{PAGE_SIZE, PageSet, RegionReader};

use crate::error::{Result, VmmError};
use base::{Base, BaseFile};
use contents::Contents;
pub use freeze::FrozenDisk;
pub use line::DiskLine;
use overlay::Overlay;
pub use overlay::OverlayOptions;
use pages::CHUNK_PAGES;
pub(crate) use requests::RequestGate;
pub use requests::{Drained, Request};
pub use state::{SERIAL_LEN_MAX, SavedDisk};

/// Bytes in a sector: the unit of every request, and of a disk's length.
pub const SECTOR_BYTES: u64 = 512;
/// Maximum length of a disk, up to which sets of its pages remain manageable.
pub const DISK_MAX_BYTES: u64 = 16 << 40;

const PAGE_BYTES: u64 = PAGE_SIZE as u64;
/// Pages of a region that one query for its runs covers.
const RUNS_PAGES: u64 = 1 << 16;

/// The name of disk `index` of a machine: of its region in the store, whose page numbers count
/// 4 KiB from the disk's start, and of its state chunk.
#[must_use]
pub fn disk_name(index: usize) -> String {
    format!("disk{index}")
}

/// A disk to run a machine with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// The file with its contents, which is never written to and must not change while a machine
    /// runs.
    pub file: PathBuf,
    /// Whether to refuse the guest's writes.
    pub read_only: bool,
    /// The serial number that the guest sees; the disk's name if `None`.
    pub serial: Option<String>,
}

/// A disk of a machine. See the module documentation.
#[derive(Debug)]
pub struct Disk {
    saved: SavedDisk,
    contents: Contents,
    requests: RequestGate,
}

impl Disk {
    /// Opens disk `index` of a machine, with the contents of a file. All of them count as written,
    /// since the first checkpoint has no parent to share them with, except holes, which are zero
    /// anyway.
    ///
    /// # Errors
    /// [`VmmError::Config`] if the file cannot be a disk or the serial number is invalid;
    /// [`VmmError::Host`] if the file cannot be read or the overlay cannot be created.
    pub fn open(index: usize, config: &DiskConfig, options: &OverlayOptions) -> Result<Self> {
        let file = BaseFile::open(&config.file)?;
        let region = disk_name(index);
        let saved = SavedDisk {
            sectors: file.len_bytes / SECTOR_BYTES,
            read_only: config.read_only,
            serial: config.serial.clone().unwrap_or_else(|| region.clone()),
            region,
        };
        saved.check().map_err(|wrong| {
            VmmError::Config(format!(
                "disk {}: expected {}, found {}",
                config.file.display(),
                wrong.expected,
                wrong.found
            ))
        })?;
        let written = file.data.clone();
        let disk = Self::assemble(saved, Base::File(file), options)?;
        disk.note_written(&written);
        Ok(disk)
    }

    /// Creates the disk that a snapshot holds as `saved` and `region`. Its pages are read on
    /// demand, and none of them count as written.
    ///
    /// # Errors
    /// [`VmmError::State`] if `saved` and `region` do not match; [`VmmError::Host`] if the overlay
    /// cannot be created.
    pub fn resume(
        saved: SavedDisk,
        region: RegionReader,
        options: &OverlayOptions,
    ) -> Result<Self> {
        saved.check_region(&region)?;
        Self::assemble(saved, Base::Snapshot(region), options)
    }

    /// As [`Self::resume`], with the contents of `file` in place of `region`'s. Pages for which
    /// either has data count as written, since the snapshot may hold something else there.
    ///
    /// # Errors
    /// As [`Self::resume`] and [`Self::open`]; [`VmmError::Config`] if the file's length is not the
    /// disk's.
    pub fn resume_with(
        saved: SavedDisk,
        region: &RegionReader,
        file: &Path,
        options: &OverlayOptions,
    ) -> Result<Self> {
        saved.check_region(region)?;
        let base = BaseFile::open(file)?;
        if base.len_bytes != saved.len_bytes() {
            return Err(VmmError::Config(format!(
                "disk {}: expected {} bytes, the length of the machine's `{}`, found {}",
                file.display(),
                saved.len_bytes(),
                saved.region,
                base.len_bytes
            )));
        }
        let mut written = base.data.clone();
        for first in (0..region.pages()).step_by(RUNS_PAGES as usize) {
            for run in region.runs(first, RUNS_PAGES)? {
                written.insert_range(run.first, run.count);
            }
        }
        let disk = Self::assemble(saved, Base::File(base), options)?;
        disk.note_written(&written);
        Ok(disk)
    }

    fn note_written(&self, written: &PageSet) {
        for page in written.iter() {
            self.contents.dirty.insert(page / CHUNK_PAGES, pages::mask(page % CHUNK_PAGES, 1));
        }
    }

    fn assemble(saved: SavedDisk, base: Base, options: &OverlayOptions) -> Result<Self> {
        // The overlay of a read-only disk stays empty, so it needs no file in the folder.
        let folder = options.folder.as_deref().filter(|_| !saved.read_only);
        let overlay = Overlay::create(folder, saved.pages())?;
        Ok(Self::on(saved, base, overlay, options.kept_pages_max))
    }

    fn on(saved: SavedDisk, base: Base, overlay: Overlay, kept_pages_max: u64) -> Self {
        let contents = Contents::new(saved.len_bytes(), base, overlay, kept_pages_max);
        Self { saved, contents, requests: RequestGate::default() }
    }

    /// The disk's name, which is also that of its region and of its state chunk.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.saved.region
    }

    /// The disk's length, always whole sectors.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.contents.len_bytes
    }

    /// Number of pages in the disk's region; the last one is padded with zeros past the disk's end.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.saved.pages()
    }

    /// Returns true if the guest's writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.saved.read_only
    }

    /// The serial number that the guest sees.
    #[must_use]
    pub fn serial(&self) -> &str {
        &self.saved.serial
    }

    /// What a snapshot saves of the disk besides its pages. Never changes.
    #[must_use]
    pub fn saved(&self) -> &SavedDisk {
        &self.saved
    }

    /// Moves the pages written since the last call into `dirty`, whose owner keeps them until a
    /// snapshot that holds them is published.
    pub fn harvest(&self, dirty: &mut PageSet) {
        self.contents.dirty.harvest(0, dirty);
    }
}
