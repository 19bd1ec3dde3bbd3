//! What becomes of memory that the guest does not need.

use std::fmt;
use std::io;
use std::sync::Arc;

use frazil_snapstore::PAGE_SIZE;
use rustix::fs::{FallocateFlags, fallocate};
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

impl FreePages for ZeroedPages {
    fn free(&self, address: GuestAddress, len_bytes: u64) -> io::Result<()> {
        const ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
        for offset in (0..len_bytes).step_by(PAGE_SIZE) {
            let page = GuestAddress(address.0 + offset);
            self.ram.memory().write_slice(&ZEROS, page).map_err(io::Error::other)?;
        }
        if self.punch && len_bytes > 0 {
            // RAM has one hole, and what is around it is no range of pages.
            let in_file = if address.0 < HOLE_START {
                address.0
            } else {
                address.0 - (HOLE_END - HOLE_START)
            };
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(self.ram.memfd(), flags, in_file, len_bytes)?;
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
            assert!(free.free(GuestAddress(2 << 20), 0x1000).is_err());
        }
    }
}
