//! Guest memory by guest physical address.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use frazil_snapstore::{PAGE_SIZE, Page, RegionReader};

use super::{InspectError, Result};
use crate::memory::RamRange;

/// Readable guest physical memory.
pub trait PhysicalMemory {
    /// Reads the `out.len()` bytes from guest physical address `gpa` on.
    ///
    /// # Errors
    /// [`InspectError::NotRam`] if some of them are outside RAM; errors of the underlying storage.
    fn read(&self, gpa: u64, out: &mut [u8]) -> Result<()>;

    /// True if all of `gpa .. gpa + len_bytes` is RAM.
    fn has(&self, gpa: u64, len_bytes: u64) -> bool;
}

/// The most pages to cache: those of page tables are read again and again.
const PAGES_KEPT: usize = 4096;

/// The RAM of a snapshot.
#[derive(Debug)]
pub struct SnapshotMemory {
    region: RegionReader,
    ranges: Vec<RamRange>,
    kept: Mutex<HashMap<u64, Arc<Page>>>,
}

impl SnapshotMemory {
    /// The memory in `region`, in which RAM occupies `ranges`.
    pub(super) fn new(region: RegionReader, ranges: Vec<RamRange>) -> Self {
        Self { region, ranges, kept: Mutex::default() }
    }

    /// The store's region.
    #[must_use]
    pub fn region(&self) -> &RegionReader {
        &self.region
    }

    /// The ranges of RAM.
    #[must_use]
    pub fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    /// Bytes of RAM from guest physical address `gpa` to the end of its range; 0 if there is none.
    #[must_use]
    pub fn ram_behind(&self, gpa: u64) -> u64 {
        let ends = self.ranges.iter().map(|range| (range.gpa, range.gpa + range.len_bytes));
        ends.filter(|(first, end)| (*first..*end).contains(&gpa)).map(|(_, end)| end - gpa).sum()
    }

    fn page(&self, page: u64) -> Result<Arc<Page>> {
        let lock = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = lock().get(&page) {
            return Ok(Arc::clone(found));
        }
        let mut contents = Box::new([0; PAGE_SIZE]);
        self.region.read_page(page, &mut contents)?;
        let contents: Arc<Page> = Arc::from(contents);
        let mut kept = lock();
        if kept.len() >= PAGES_KEPT {
            kept.clear();
        }
        kept.insert(page, Arc::clone(&contents));
        Ok(contents)
    }
}

impl PhysicalMemory for SnapshotMemory {
    fn read(&self, gpa: u64, out: &mut [u8]) -> Result<()> {
        if !self.has(gpa, out.len() as u64) {
            return Err(not_ram(gpa, out.len() as u64, &self.ranges));
        }
        let (mut at, mut rest) = (gpa, out);
        while !rest.is_empty() {
            let offset = (at % PAGE_SIZE as u64) as usize;
            let (part, more) = rest.split_at_mut((PAGE_SIZE - offset).min(rest.len()));
            let page = self.page(at / PAGE_SIZE as u64)?;
            part.copy_from_slice(&page[offset..offset + part.len()]);
            at += part.len() as u64;
            rest = more;
        }
        Ok(())
    }

    fn has(&self, gpa: u64, len_bytes: u64) -> bool {
        let Some(end) = gpa.checked_add(len_bytes) else { return false };
        self.ranges.iter().any(|range| range.gpa <= gpa && end <= range.gpa + range.len_bytes)
    }
}

/// The error for an address outside RAM.
pub(super) fn not_ram(gpa: u64, len_bytes: u64, ranges: &[RamRange]) -> InspectError {
    let places = ranges
        .iter()
        .map(|range| format!("{:#x} to {:#x}", range.gpa, range.gpa + range.len_bytes - 1));
    InspectError::NotRam { gpa, len_bytes, ram: places.collect::<Vec<_>>().join(" and ") }
}

/// Decodes a little-endian number of up to 8 bytes.
pub(super) fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
