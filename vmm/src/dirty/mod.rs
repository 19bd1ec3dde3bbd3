//! Which pages changed: what KVM saw the guest write, joined with what the VMM wrote itself.
//!
//! | tracker | reading it costs | when it is used |
//! |---|---|---|
//! | [`DirtyRings`] | what was written | machines of more than [`SMALL_RAM_BYTES`] |
//! | [`KvmBitmap`] with manual protection | a bit for each page of RAM | smaller ones, whose bits are few |
//! | [`KvmBitmap`] without | the same, and protecting again at once | a KVM that has nothing better |
//!
//! Which one a VM has is settled before its first vCPU exists, since KVM wants to know by then.

mod ioctls;
mod kvm_bitmap;
mod ring;
#[cfg(test)]
mod tests;
mod vmm_writes;
mod written;

use std::sync::Arc;

use frazil_snapstore::PageSet;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::memory::GuestRam;

pub use kvm_bitmap::KvmBitmap;
pub use ring::DirtyRings;
pub use vmm_writes::VmmWrites;
pub(crate) use written::{WrittenPages, bits};

/// RAM up to which bitmaps are used. Reading one costs a bit for each page, 4 KiB of them for 128
/// MiB, and a ring what was written; what a pause is left with is so little that neither shows up to
/// 4 GiB here (see DESIGN.md). Below this a ring's memory, 64 KiB a vCPU at least, buys nothing.
pub const SMALL_RAM_BYTES: u64 = 512 << 20;

/// A source of dirty pages. Reading it clears it: the caller keeps what it got until a snapshot
/// that holds those pages is published.
pub trait DirtyTracker: Send + std::fmt::Debug {
    /// Adds the pages written since the last call to `dirty`, and watches them again: a page that
    /// is read after this returns and written later is reported once more.
    ///
    /// # Errors
    /// What was added to `dirty` by then may not be reported again; the rest is.
    fn harvest(&mut self, dirty: &mut PageSet) -> Result<()>;

    /// The same while no vCPU runs, as quickly as can be: pages may go unwatched, which the next
    /// harvest then reports whether they were written or not.
    ///
    /// # Errors
    /// As [`Self::harvest`].
    fn harvest_at_cut(&mut self, dirty: &mut PageSet) -> Result<()> {
        self.harvest(dirty)
    }

    /// Which one it is.
    fn kind(&self) -> TrackerKind;
}

/// What keeps track of the pages a guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrackerKind {
    /// A ring of page numbers for each vCPU (`KVM_CAP_DIRTY_LOG_RING_ACQ_REL`).
    Ring,
    /// A bit for each page, cleared when asked (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`).
    ManualBitmap,
    /// A bit for each page, cleared whenever it is read.
    Bitmap,
}

impl std::fmt::Display for TrackerKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Ring => "ring",
            Self::ManualBitmap => "manual-bitmap",
            Self::Bitmap => "bitmap",
        })
    }
}

/// A tracker joined with the VMM's own writes: what checkpoints use.
#[derive(Debug)]
pub struct AllWrites {
    guest: Box<dyn DirtyTracker>,
    ram: Arc<GuestRam>,
}

impl AllWrites {
    /// Joins `guest` with what the VMM writes to `ram`.
    #[must_use]
    pub fn new(guest: Box<dyn DirtyTracker>, ram: Arc<GuestRam>) -> Self {
        Self { guest, ram }
    }
}

impl DirtyTracker for AllWrites {
    fn harvest(&mut self, dirty: &mut PageSet) -> Result<()> {
        // The VMM's writes first: its bitmap cannot fail, so an error from KVM loses nothing.
        self.ram.harvest_vmm_writes(dirty);
        self.guest.harvest(dirty)
    }

    fn harvest_at_cut(&mut self, dirty: &mut PageSet) -> Result<()> {
        self.ram.harvest_vmm_writes(dirty);
        self.guest.harvest_at_cut(dirty)
    }

    fn kind(&self) -> TrackerKind {
        self.guest.kind()
    }
}
