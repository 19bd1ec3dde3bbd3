//! Which pages changed: what KVM saw the guest write, joined with what the VMM wrote itself.

use std::sync::Arc;

use frazil_snapstore::{PAGE_SIZE, PageSet};
use kvm_ioctls::VmFd;

use crate::error::{Result, VmmError};
use crate::memory::GuestRam;

/// A source of dirty pages. Reading it clears it: the caller keeps what it got until a snapshot
/// that holds those pages is published.
pub trait DirtyTracker: Send + std::fmt::Debug {
    /// Adds the pages written since the last call to `dirty`, and starts watching them again.
    ///
    /// # Errors
    /// What was added to `dirty` by then is not reported again.
    fn harvest(&mut self, dirty: &mut PageSet) -> Result<()>;
}

/// KVM's dirty bitmap, one a memory slot.
#[derive(Debug)]
pub struct KvmBitmap {
    vm: Arc<VmFd>,
    ram: Arc<GuestRam>,
}

impl KvmBitmap {
    /// Tracks the slots of `vm`, which are the ranges of `ram` in their order.
    #[must_use]
    pub fn new(vm: Arc<VmFd>, ram: Arc<GuestRam>) -> Self {
        Self { vm, ram }
    }
}

impl DirtyTracker for KvmBitmap {
    fn harvest(&mut self, dirty: &mut PageSet) -> Result<()> {
        for (slot, (range, _)) in self.ram.mapped_ranges().enumerate() {
            let words = self
                .vm
                .get_dirty_log(slot as u32, range.len_bytes as usize)
                .map_err(VmmError::kvm("read the dirty log"))?;
            dirty.insert_words(range.gpa / PAGE_SIZE as u64, &words);
        }
        Ok(())
    }
}

/// A tracker joined with the VMM's own writes: what checkpoints use.
#[derive(Debug)]
pub struct AllWrites<T> {
    guest: T,
    ram: Arc<GuestRam>,
}

impl<T: DirtyTracker> AllWrites<T> {
    /// Joins `guest` with what the VMM writes to `ram`.
    #[must_use]
    pub fn new(guest: T, ram: Arc<GuestRam>) -> Self {
        Self { guest, ram }
    }
}

impl<T: DirtyTracker> DirtyTracker for AllWrites<T> {
    fn harvest(&mut self, dirty: &mut PageSet) -> Result<()> {
        // The VMM's writes first: its bitmap cannot fail, so an error from KVM loses nothing.
        self.ram.harvest_vmm_writes(dirty);
        self.guest.harvest(dirty)
    }
}
