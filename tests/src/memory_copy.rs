//! A naive oracle of guest memory: a hash of every page, taken while the guest stands still.

use std::io;

use frazil_snapstore::{PAGE_SIZE, Page, PageSource, RegionReader, Snapshot};
use frazil_vmm::memory::{GuestRam, RAM_REGION};
use frazil_vmm::workload::{ControlView, PageRead};

/// A copy of a guest's memory that keeps only a hash of each page: enough to compare pages.
#[derive(Clone, PartialEq, Eq)]
pub struct MemoryCopy {
    pages: Vec<blake3::Hash>,
}

impl std::fmt::Debug for MemoryCopy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MemoryCopy of {} pages", self.pages.len())
    }
}

impl MemoryCopy {
    /// Copies all of `ram`, which must have no hole and whose guest must stand still.
    #[must_use]
    pub fn of_ram(ram: &GuestRam) -> Self {
        Self::read(ram.end_page(), |page, buf| ram.read_page(page, buf))
    }

    /// Copies all of the RAM in `snapshot`.
    #[must_use]
    pub fn of_snapshot(snapshot: &Snapshot) -> Self {
        let region = snapshot.region(RAM_REGION).expect("it has RAM");
        Self::read(region.pages(), |page, buf| {
            region.read_page(page, buf).map_err(io::Error::other)
        })
    }

    fn read(pages: u64, read: impl Fn(u64, &mut Page) -> io::Result<()>) -> Self {
        let mut buf = [0; PAGE_SIZE];
        let hash = |page: u64| {
            read(page, &mut buf).unwrap_or_else(|error| panic!("page {page}: {error}"));
            blake3::hash(&buf)
        };
        Self { pages: (0..pages).map(hash).collect() }
    }

    /// Returns the numbers of the pages that differ from `other`.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<usize> {
        assert_eq!(self.pages.len(), other.pages.len(), "memories of different sizes");
        (0..self.pages.len()).filter(|page| self.pages[*page] != other.pages[*page]).collect()
    }

    /// True if `page` of `ram` equals that page of this copy.
    #[must_use]
    pub fn has(&self, ram: &GuestRam, page: u64) -> bool {
        let mut buf = [0; PAGE_SIZE];
        ram.read_page(page, &mut buf).expect("the page is there");
        self.pages[page as usize] == blake3::hash(&buf)
    }

    /// True if `page` of this copy equals `contents`.
    #[must_use]
    pub fn is(&self, page: u64, contents: &Page) -> bool {
        self.pages[page as usize] == blake3::hash(contents)
    }

    /// Number of pages.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.pages.len() as u64
    }

    /// True if there are no pages.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
}

struct SnapshotMemory(RegionReader);

impl PageRead for SnapshotMemory {
    fn read_page(&mut self, page: u64, buf: &mut [u8; 4096]) -> io::Result<()> {
        self.0.read_page(page, buf).map_err(io::Error::other)
    }
}

/// Returns the progress of the built-in workload in `snapshot`; `None` if it had not started yet.
#[must_use]
pub fn workload_of(snapshot: &Snapshot) -> Option<ControlView> {
    let region = snapshot.region(RAM_REGION).expect("it has RAM");
    ControlView::read(&mut SnapshotMemory(region)).ok()
}
