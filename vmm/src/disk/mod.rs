//! Disks: block storage whose contents are in every snapshot, cut together with memory.
//!
//! A [`Disk`] is a base that never changes, a file or a snapshot's region, and an overlay of the
//! pages the guest wrote. Devices work on it through [`Request`]s from any thread; a checkpoint
//! [drains](Disk::drain) them while the guest stands still, [freezes](Drained::freeze) what was
//! written since the last one, and reads it from the [`FrozenDisk`] while the guest runs again.
//! [`DiskLine`] keeps the books for that. How the device meets the guest is not in here.

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
/// The longest disk: what sets of its pages comfortably range over.
pub const DISK_MAX_BYTES: u64 = 16 << 40;

const PAGE_BYTES: u64 = PAGE_SIZE as u64;
/// Pages of a region that are asked for at once, where they are.
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
    /// The file with its contents. It is never written to, and must not change while a machine runs.
    pub file: PathBuf,
    /// Refuse the guest's writes.
    pub read_only: bool,
    /// What the guest sees as its serial number; the disk's name if there is none.
    pub serial: Option<String>,
}

/// A disk of a machine. See the module's text.
#[derive(Debug)]
pub struct Disk {
    saved: SavedDisk,
    contents: Contents,
    requests: RequestGate,
}

impl Disk {
    /// Disk `index` of a machine, with the contents of a file. All of them count as written: the
    /// first checkpoint has no parent to share them with. Holes of the file are zero as they are.
    ///
    /// # Errors
    /// [`VmmError::Config`] if the file is no disk or the serial number is none;
    /// [`VmmError::Host`] if it cannot be read or the overlay cannot be made.
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

    /// The disk that a snapshot holds as `saved` and `region`; its pages are read when they are
    /// needed. None of them count as written.
    ///
    /// # Errors
    /// [`VmmError::State`] if the two do not fit each other; [`VmmError::Host`] if the overlay
    /// cannot be made.
    pub fn resume(
        saved: SavedDisk,
        region: RegionReader,
        options: &OverlayOptions,
    ) -> Result<Self> {
        saved.check_region(&region)?;
        Self::assemble(saved, Base::Snapshot(region), options)
    }

    /// As [`Self::resume`], with the contents of `file` in place of `region`'s. Wherever one of the two
    /// has something counts as written: the snapshot has something else there.
    ///
    /// # Errors
    /// As [`Self::resume`] and [`Self::open`]; [`VmmError::Config`] if the file is not as long as the
    /// disk.
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
                "disk {}: expected {} bytes, as long as `{}` is, which it is to be, found {}",
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
        // Nothing is ever written over a disk that is only read.
        let folder = options.folder.as_deref().filter(|_| !saved.read_only);
        let overlay = Overlay::create(folder, saved.pages())?;
        Ok(Self::on(saved, base, overlay, options.kept_pages_max))
    }

    fn on(saved: SavedDisk, base: Base, overlay: Overlay, kept_pages_max: u64) -> Self {
        let contents = Contents::new(saved.len_bytes(), base, overlay, kept_pages_max);
        Self { saved, contents, requests: RequestGate::default() }
    }

    /// Its name, which is that of its region and of its state chunk.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.saved.region
    }

    /// Its length, always whole sectors.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.contents.len_bytes
    }

    /// How many pages its region ranges over; what the last one has behind the disk's end is zero.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.saved.pages()
    }

    /// True if the guest's writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.saved.read_only
    }

    /// What the guest sees as its serial number.
    #[must_use]
    pub fn serial(&self) -> &str {
        &self.saved.serial
    }

    /// What a snapshot keeps of it besides its pages. Never changes.
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
