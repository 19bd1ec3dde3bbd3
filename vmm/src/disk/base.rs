//! What lies beneath the guest's writes: a file, which is only read, or a region of a snapshot.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use frazil_snapstore::{PAGE_SIZE, Page, PageSet, RegionReader};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::pages::{CHUNK_PAGES, mask};
use super::{DISK_MAX_BYTES, PAGE_BYTES, SECTOR_BYTES};
use crate::error::{Result, VmmError};

/// The contents of a disk as of when the machine was built. They never change, so whatever the
/// overlay does not hold can be read here at any time.
#[derive(Debug)]
pub(super) enum Base {
    File(BaseFile),
    Snapshot(RegionReader),
}

impl Base {
    /// Fills `buf` from `offset`, with zeros past the disk's end, up to the end of its last page.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        match self {
            Self::File(file) => file.read(offset, buf),
            Self::Snapshot(region) => read_region(region, offset, buf)
                .map_err(|error| io::Error::other(format!("the snapshot: {error}"))),
        }
    }

    pub(super) fn read_page(&self, page: u64, buf: &mut Page) -> io::Result<()> {
        self.read(page * PAGE_BYTES, buf)
    }

    /// Returns which pages of a chunk may be nonzero.
    pub(super) fn data(&self, chunk: u64) -> io::Result<u64> {
        let first = chunk * CHUNK_PAGES;
        match self {
            Self::File(file) => Ok((0..CHUNK_PAGES)
                .filter(|page| file.data.contains(first + page))
                .fold(0, |word, page| word | mask(page, 1))),
            Self::Snapshot(region) => {
                let runs = region.runs(first, CHUNK_PAGES).map_err(io::Error::other)?;
                Ok(runs.iter().fold(0, |word, run| word | mask(run.first - first, run.count)))
            }
        }
    }
}

/// Reads from a region, which yields only whole pages: partial ones go through a buffer.
fn read_region(region: &RegionReader, offset: u64, buf: &mut [u8]) -> frazil_snapstore::Result<()> {
    let mut at = 0;
    while at < buf.len() {
        let (page, from) = ((offset + at as u64) / PAGE_BYTES, (offset as usize + at) % PAGE_SIZE);
        let rest = buf.len() - at;
        let len = if from == 0 && rest >= PAGE_SIZE {
            let len = rest - rest % PAGE_SIZE;
            region.read_pages(page, &mut buf[at..at + len])?;
            len
        } else {
            let len = (PAGE_SIZE - from).min(rest);
            let mut whole = [0; PAGE_SIZE];
            region.read_page(page, &mut whole)?;
            buf[at..at + len].copy_from_slice(&whole[from..from + len]);
            len
        };
        at += len;
    }
    Ok(())
}

/// A file with the contents of a disk, opened read-only.
#[derive(Debug)]
pub(super) struct BaseFile {
    file: File,
    path: PathBuf,
    pub(super) len_bytes: u64,
    /// Pages that are not in a hole of the file.
    pub(super) data: PageSet,
}

impl BaseFile {
    /// # Errors
    /// [`VmmError::Host`] if the file cannot be read; [`VmmError::Config`] if it cannot be a disk.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let host = || VmmError::host(format!("open disk {}", path.display()));
        let file = File::open(path).map_err(host())?;
        // Not from the metadata, where a block device's length is 0.
        let len_bytes = seek(&file, SeekFrom::End(0)).map_err(|error| host()(error.into()))?;
        let wrong = |found: String| {
            Err(VmmError::Config(format!(
                "disk {}: expected a file or block device of 1 to {} sectors of {SECTOR_BYTES} \
                 bytes, found {found}",
                path.display(),
                DISK_MAX_BYTES / SECTOR_BYTES
            )))
        };
        if file.metadata().map_err(host())?.is_dir() {
            return wrong("a folder".into());
        }
        if !is_disk_len(len_bytes) {
            return wrong(format!("{len_bytes} bytes"));
        }
        let data = data_pages(&file, len_bytes).map_err(host())?;
        Ok(Self { file, path: path.to_owned(), len_bytes, data })
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let inside = self.len_bytes.saturating_sub(offset).min(buf.len() as u64) as usize;
        let (contents, padding) = buf.split_at_mut(inside);
        padding.fill(0);
        self.file.read_exact_at(contents, offset).map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("the disk's file {}: {error}", self.path.display()),
            )
        })
    }
}

/// Returns true for a valid disk length: whole sectors, at least one, up to the maximum.
pub(super) fn is_disk_len(len_bytes: u64) -> bool {
    (1..=DISK_MAX_BYTES).contains(&len_bytes) && len_bytes.is_multiple_of(SECTOR_BYTES)
}

/// Returns the pages of `file` that are not in holes, as far as its file system reports holes.
fn data_pages(file: &File, len_bytes: u64) -> io::Result<PageSet> {
    let pages = len_bytes.div_ceil(PAGE_BYTES);
    let mut data = PageSet::new(pages);
    let mut at = 0;
    while at < len_bytes {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Only a hole is left.
            Err(Errno::NXIO) => break,
            // A block device, or a file system without holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                data.insert_range(0, pages);
                break;
            }
            Err(error) => return Err(error.into()),
        };
        let end = seek(file, SeekFrom::Hole(start))?.min(len_bytes);
        let first = start.min(len_bytes) / PAGE_BYTES;
        data.insert_range(first, end.div_ceil(PAGE_BYTES).saturating_sub(first));
        at = end.max(start + 1);
    }
    Ok(data)
}
