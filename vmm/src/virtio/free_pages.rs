//! What happens to memory that the guest does not need.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use frazil_snapstore::PAGE_SIZE;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use vm_memory::{Bytes, GuestAddress};

use crate::memory::{GuestRam, HOLE_END, HOLE_START};

/// Receives pages that the guest has given up.
pub trait FreePages: Send + Sync + fmt::Debug {
    /// Takes `len_bytes` bytes of RAM from `address` on, whole pages of 4 KiB whose contents the
    /// guest does not need. The guest may write to them again at any time, and until then may find
    /// anything in them.
    ///
    /// # Errors
    /// If they cannot be freed; some of them may have been by then.
    fn free(&self, address: GuestAddress, len_bytes: u64) -> io::Result<()>;
}

/// Makes free pages zero, so that snapshots need not keep what they held.
///
/// The zeros are written through vm-memory. That informs the dirty tracking, makes a checkpoint
/// that has yet to read the pages keep what they held, and keeps a pager from filling them again;
/// just punching a hole into memory would do none of this. Where a hole reads as zeros, it may be
/// punched afterwards.
#[derive(Debug)]
pub struct ZeroedPages {
    ram: Arc<GuestRam>,
    punch: bool,
}

impl ZeroedPages {
    /// Frees pages of `ram`. `punch` also gives the memory back to the host: only for memory that
    /// is the machine's own and has no pager, which would fill a hole with what the snapshot has.
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

    /// Returns the first pages present in a range of the memory's file.
    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        if range.is_empty() {
            return Ok(None);
        }
        let start = match seek(self.ram.memfd(), SeekFrom::Data(range.start)) {
            Ok(start) if start < range.end => start,
            // None in the range, or none before the file's end.
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
        // RAM has one hole, which no range of pages spans.
        let before = if address.0 < HOLE_START { 0 } else { HOLE_END - HOLE_START };
        let in_file = address.0 - before..address.0 - before + len_bytes;
        let mut at = in_file.start;
        // Memory that nobody has touched is a hole in the file, and without a pager is meant to be
        // zero.
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
            // Measured before reading, which fills holes of shared memory.
            let freed = before.saturating_sub(ram.allocated_bytes().unwrap());
            let mut found = vec![0; 5 * PAGE_SIZE];
            ram.memory().read_slice(&mut found, GuestAddress(0)).unwrap();
            let zero: Vec<_> = found.chunks(PAGE_SIZE).map(|page| page[9] == 0).collect();
            assert_eq!(zero, [false, true, true, true, false]);
            let mut dirty = PageSet::new(ram.end_page());
            ram.harvest_vmm_writes(&mut dirty);
            assert_eq!(dirty.iter().collect::<Vec<_>>(), [1, 2, 3]);
            assert!(!punch || freed >= 3 * PAGE_SIZE as u64, "{freed} bytes");
            // Untouched pages stay untouched, unless they may be meant to hold something.
            let end = ram.allocated_bytes().unwrap();
            free.free(GuestAddress(0x10_0000), 0x4000).unwrap();
            assert_eq!(ram.allocated_bytes().unwrap(), end + if punch { 0 } else { 0x4000 });
            assert_eq!(free.free(GuestAddress(2 << 20), 0x1000).is_err(), !punch, "beyond all RAM");
        }
    }
}
