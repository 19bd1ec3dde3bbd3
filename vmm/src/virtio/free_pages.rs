//! What becomes of memory that the guest does not need.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use frazil_snapstore::PAGE_SIZE;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use vm_memory::{Bytes, GuestAddress};

use crate::memory::{GuestRam, HOLE_END, HOLE_START};

/// Takes pages that the guest has given up.
pub trait FreePages: Send + Sync + fmt::Debug {
    /// Pages of RAM that hold nothing any more: `len_bytes` bytes from `address`, whole pages of 4 KiB.
    /// The guest may write to them again at any time, and may find anything in them before.
    ///
    /// # Errors
    /// If they cannot be given up; some of them may be by then.
    fn free(&self, address: GuestAddress, len_bytes: u64) -> io::Result<()>;
}

/// Makes free pages zero, so that snapshots need not keep what they held.
///
/// They are written, through vm-memory: that tells the dirty tracking, has a checkpoint that has still
/// to read them keep what they held, and has a pager not bring them in again, none of which a hole
/// that is only punched into memory would do. The hole may follow, where it reads as the zeros that
/// are there by then.
#[derive(Debug)]
pub struct ZeroedPages {
    ram: Arc<GuestRam>,
    punch: bool,
}

impl ZeroedPages {
    /// For `ram`. `punch` gives the host its memory back too: only for memory that is the machine's
    /// alone and has no pager, which would fill a hole with what the snapshot has.
    #[must_use]
    pub fn new(ram: Arc<GuestRam>, punch: bool) -> Self {
        Self { ram, punch }
    }
}

impl ZeroedPages {
    fn zero(&self, addresses: Range<u64>) -> io::Result<()> {
        const ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
        for page in addresses.step_by(PAGE_SIZE) {
            let page = GuestAddress(page);
            self.ram.memory().write_slice(&ZEROS, page).map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// The first pages in a range of the memory's file that are there.
    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        if range.is_empty() {
            return Ok(None);
        }
        let start = match seek(self.ram.memfd(), SeekFrom::Data(range.start)) {
            Ok(start) if start < range.end => start,
            // None, or none before the file's end.
            Ok(_) | Err(Errno::NXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let end = seek(self.ram.memfd(), SeekFrom::Hole(start))?;
        Ok(Some(start..end.min(range.end)))
    }
}

impl FreePages for ZeroedPages {
    fn free(&self, address: GuestAddress, len_bytes: u64) -> io::Result<()> {
        if !self.punch {
            return self.zero(address.0..address.0 + len_bytes);
        }
        // RAM has one hole, and what is around it is no range of pages.
        let before = if address.0 < HOLE_START { 0 } else { HOLE_END - HOLE_START };
        let in_file = address.0 - before..address.0 - before + len_bytes;
        let mut at = in_file.start;
        // What nobody has touched is a hole, and nothing else is meant to be there.
        while let Some(data) = self.next_data(at..in_file.end)? {
            self.zero(data.start + before..data.end + before)?;
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(self.ram.memfd(), flags, data.start, data.end - data.start)?;
            at = data.end;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use frazil_snapstore::PageSet;

    use super::*;

    #[test]
    fn free_pages_read_as_zeros_and_count_as_written() {
        for punch in [false, true] {
            let ram = Arc::new(GuestRam::new(2 << 20).unwrap());
            ram.memory().write_slice(&vec![7; 5 * PAGE_SIZE], GuestAddress(0)).unwrap();
            ram.harvest_vmm_writes(&mut PageSet::new(ram.end_page()));
            let before = ram.allocated_bytes().unwrap();
            let free = ZeroedPages::new(Arc::clone(&ram), punch);
            free.free(GuestAddress(0x1000), 0x3000).unwrap();
            // Before somebody looks, which fills holes of shared memory.
            let freed = before.saturating_sub(ram.allocated_bytes().unwrap());
            let mut found = vec![0; 5 * PAGE_SIZE];
            ram.memory().read_slice(&mut found, GuestAddress(0)).unwrap();
            let zero: Vec<_> = found.chunks(PAGE_SIZE).map(|page| page[9] == 0).collect();
            assert_eq!(zero, [false, true, true, true, false]);
            let mut dirty = PageSet::new(ram.end_page());
            ram.harvest_vmm_writes(&mut dirty);
            assert_eq!(dirty.iter().collect::<Vec<_>>(), [1, 2, 3]);
            assert!(!punch || freed >= 3 * PAGE_SIZE as u64, "{freed} bytes");
            // What nobody has touched stays untouched, unless something else may be meant to be there.
            let end = ram.allocated_bytes().unwrap();
            free.free(GuestAddress(0x10_0000), 0x4000).unwrap();
            assert_eq!(ram.allocated_bytes().unwrap(), end + if punch { 0 } else { 0x4000 });
            assert_eq!(free.free(GuestAddress(2 << 20), 0x1000).is_err(), !punch, "beyond all RAM");
        }
    }
}
