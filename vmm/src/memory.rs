//! Guest RAM: a memfd, mapped once, with the usual hole below 4 GiB. The memfd is either the
//! machine's own, or shared by clones of a snapshot that map it privately: a page that a clone
//! writes becomes its own copy.
//!
//! Guest memory is never a `&[u8]`: every access goes through vm-memory, whose accesses are
//! volatile and which records the VMM's writes, as KVM's dirty log records the guest's.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use frazil_snapstore::pager::{CHUNK_PAGES, Extent, Mapping};
use frazil_snapstore::{PAGE_SIZE, Page, PageSet, PageSource};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap,
};

use crate::dirty::VmmWrites;
use crate::error::{Result, VmmError};

/// Where the hole for devices starts: 3 GiB.
pub const HOLE_START: u64 = 3 << 30;
/// Where RAM continues above the hole: 4 GiB.
pub const HOLE_END: u64 = 4 << 30;
/// The size of RAM is a multiple of this many bytes.
pub const RAM_GRANULE_BYTES: u64 = 2 << 20;
/// The most RAM a guest may have: what four-level page tables comfortably map.
pub const RAM_MAX_BYTES: u64 = 16 << 40;

const _: () = assert!(RAM_GRANULE_BYTES.is_multiple_of(CHUNK_PAGES * PAGE_SIZE as u64));

/// The name of the store region that holds RAM; its page numbers are guest page numbers.
pub const RAM_REGION: &str = "ram";

/// vm-memory's view of guest RAM, with a bitmap of the pages that the VMM wrote.
pub type GuestMemory = GuestMemoryMmap<VmmWrites>;

/// One contiguous part of RAM; each is one KVM memory slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// Guest physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len_bytes: u64,
    /// Offset in the memfd.
    pub file_offset: u64,
}

/// The ranges that `ram_bytes` of RAM occupy: up to the hole, and the rest above it.
#[must_use]
pub fn ram_ranges(ram_bytes: u64) -> Vec<RamRange> {
    let low = ram_bytes.min(HOLE_START);
    let mut ranges = vec![RamRange { gpa: 0, len_bytes: low, file_offset: 0 }];
    if ram_bytes > low {
        ranges.push(RamRange { gpa: HOLE_END, len_bytes: ram_bytes - low, file_offset: low });
    }
    ranges
}

/// A guest's RAM.
#[derive(Debug)]
pub struct GuestRam {
    memfd: File,
    memory: GuestMemory,
    ranges: Vec<RamRange>,
    sharing: Sharing,
}

/// Whether others see what is written through a mapping of the memfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sharing {
    /// Whoever has the memfd sees it; the memfd is this machine's alone.
    Shared,
    /// Nobody else does: a page is copied when it is written.
    Private,
}

impl GuestRam {
    /// Creates `ram_bytes` of RAM, all zeros and not yet backed by host memory.
    ///
    /// # Errors
    /// [`VmmError::Config`] unless the size is a nonzero multiple of [`RAM_GRANULE_BYTES`] up to
    /// [`RAM_MAX_BYTES`]; [`VmmError::Host`] if the host has no room for it.
    pub fn new(ram_bytes: u64) -> Result<Self> {
        Self::map(ram_memfd(ram_bytes)?, ram_bytes, Sharing::Shared)
    }

    /// RAM that starts as the contents of `memfd` and keeps what is written to itself.
    ///
    /// # Errors
    /// As [`Self::new`]; [`VmmError::Config`] if the memfd is not of that size.
    pub fn private(memfd: File, ram_bytes: u64) -> Result<Self> {
        check_ram_bytes(ram_bytes)?;
        let len = memfd.metadata().map_err(VmmError::host("get the size of guest memory"))?.len();
        if len != ram_bytes {
            return Err(VmmError::Config(format!(
                "shared memory: expected {ram_bytes} bytes, found {len}"
            )));
        }
        Self::map(memfd, ram_bytes, Sharing::Private)
    }

    fn map(memfd: File, ram_bytes: u64, sharing: Sharing) -> Result<Self> {
        let failed = || format!("map {} MiB of guest memory", ram_bytes >> 20);
        let ranges = ram_ranges(ram_bytes);
        let regions = ranges
            .iter()
            .map(|range| map(&memfd, range, sharing))
            .collect::<io::Result<Vec<_>>>()
            .map_err(VmmError::host(failed()))?;
        let memory = GuestMemory::from_regions(regions)
            .map_err(|error| VmmError::Host { op: failed(), source: io::Error::other(error) })?;
        Ok(Self { memfd, memory, ranges, sharing })
    }

    /// Volatile access to RAM.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The memfd that RAM is mapped from.
    #[must_use]
    pub fn memfd(&self) -> &File {
        &self.memfd
    }

    /// Bytes of RAM.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.len_bytes).sum()
    }

    /// Bytes of RAM backed by host memory: the pages that the guest, or whoever fills its memory,
    /// has touched. None if the host does not say, or the memory is shared with others.
    #[must_use]
    pub fn allocated_bytes(&self) -> Option<u64> {
        if self.sharing == Sharing::Private {
            return None;
        }
        // `st_blocks` counts units of 512 bytes, whatever the file system's block size.
        self.memfd.metadata().ok().map(|found| found.blocks() * 512)
    }

    /// The number of the last page plus one, which is the length of the store's region in pages.
    #[must_use]
    pub fn end_page(&self) -> u64 {
        self.ranges
            .iter()
            .map(|range| (range.gpa + range.len_bytes) / PAGE_SIZE as u64)
            .max()
            .unwrap_or(0)
    }

    /// The ranges of RAM with their host virtual addresses.
    pub fn mapped_ranges(&self) -> impl Iterator<Item = (RamRange, usize)> + '_ {
        self.ranges.iter().copied().zip(self.memory.iter().map(|region| {
            region
                .get_host_address(vm_memory::MemoryRegionAddress(0))
                .map_or(0, |address| address as usize)
        }))
    }

    /// The mapped ranges, in the form that the pager takes.
    #[must_use]
    pub fn mappings(&self) -> Vec<Mapping> {
        self.mapped_ranges()
            .map(|(range, address)| Mapping {
                address,
                len_bytes: range.len_bytes as usize,
                file_offset: range.file_offset,
                first_page: range.gpa / PAGE_SIZE as u64,
            })
            .collect()
    }

    /// Adds the pages that the VMM wrote since the last call to `dirty`.
    pub fn harvest_vmm_writes(&self, dirty: &mut PageSet) {
        for region in self.memory.iter() {
            let first = region.start_addr().raw_value() / PAGE_SIZE as u64;
            region.get_mmap().bitmap().harvest(first, dirty);
        }
    }
}

impl PageSource for GuestRam {
    fn read_page(&self, page: u64, buf: &mut Page) -> io::Result<()> {
        self.memory.read_slice(buf, GuestAddress(page * PAGE_SIZE as u64)).map_err(io::Error::other)
    }
}

fn check_ram_bytes(ram_bytes: u64) -> Result<()> {
    if ram_bytes == 0 || !ram_bytes.is_multiple_of(RAM_GRANULE_BYTES) || ram_bytes > RAM_MAX_BYTES {
        return Err(VmmError::Config(format!(
            "memory: expected a multiple of {} MiB up to {} TiB, found {ram_bytes} bytes",
            RAM_GRANULE_BYTES >> 20,
            RAM_MAX_BYTES >> 40
        )));
    }
    Ok(())
}

/// Creates a memfd of `ram_bytes`, all zeros and not yet backed by host memory.
///
/// # Errors
/// As [`GuestRam::new`].
pub fn ram_memfd(ram_bytes: u64) -> Result<File> {
    check_ram_bytes(ram_bytes)?;
    let failed = |op: &str| format!("{op} {} MiB of guest memory", ram_bytes >> 20);
    let memfd = memfd_create("frazil-ram", MemfdFlags::CLOEXEC)
        .map_err(|error| VmmError::Host { op: failed("create"), source: error.into() })?;
    ftruncate(&memfd, ram_bytes)
        .map_err(|error| VmmError::Host { op: failed("reserve"), source: error.into() })?;
    Ok(File::from(memfd))
}

/// Where `ram_bytes` of RAM lie in their memfd, in the form that the pager takes.
#[must_use]
pub fn ram_extents(ram_bytes: u64) -> Vec<Extent> {
    ram_ranges(ram_bytes)
        .into_iter()
        .map(|range| Extent {
            first_page: range.gpa / PAGE_SIZE as u64,
            pages: range.len_bytes / PAGE_SIZE as u64,
            file_offset: range.file_offset,
        })
        .collect()
}

fn map(memfd: &File, range: &RamRange, sharing: Sharing) -> io::Result<GuestRegionMmap<VmmWrites>> {
    let len = usize::try_from(range.len_bytes).map_err(io::Error::other)?;
    let sharing = match sharing {
        Sharing::Shared => libc::MAP_SHARED,
        Sharing::Private => libc::MAP_PRIVATE,
    };
    let region = MmapRegionBuilder::new_with_bitmap(len, VmmWrites::new(len))
        .with_file_offset(FileOffset::new(memfd.try_clone()?, range.file_offset))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(sharing | libc::MAP_NORESERVE)
        .build()
        .map_err(io::Error::other)?;
    GuestRegionMmap::new(region, GuestAddress(range.gpa))
        .ok_or_else(|| io::Error::other("guest addresses overflow"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_hole() {
        assert_eq!(ram_ranges(1 << 30).len(), 1);
        let ranges = ram_ranges(5 << 30);
        assert_eq!(ranges[0], RamRange { gpa: 0, len_bytes: 3 << 30, file_offset: 0 });
        assert_eq!(ranges[1], RamRange { gpa: 4 << 30, len_bytes: 2 << 30, file_offset: 3 << 30 });
    }

    #[test]
    fn what_the_vmm_writes_is_noted_once() {
        let ram = GuestRam::new(4 << 20).unwrap();
        ram.memory().write_slice(&[1; 5000], GuestAddress(0x3ff8)).unwrap();
        let mut dirty = PageSet::new(ram.end_page());
        ram.harvest_vmm_writes(&mut dirty);
        assert_eq!(dirty.iter().collect::<Vec<_>>(), [3, 4, 5]);
        let mut again = PageSet::new(ram.end_page());
        ram.harvest_vmm_writes(&mut again);
        assert!(again.is_empty());
        let mut page = [0; PAGE_SIZE];
        ram.read_page(3, &mut page).unwrap();
        assert_eq!(page[0xff8..], [1; 8]);
        assert!(ram.read_page(5000, &mut page).is_err());
    }

    #[test]
    fn odd_sizes_are_refused() {
        for bytes in [0, 4096, (2 << 20) + 4096, RAM_MAX_BYTES * 2] {
            assert!(matches!(GuestRam::new(bytes), Err(VmmError::Config(_))), "{bytes}");
        }
    }
}
