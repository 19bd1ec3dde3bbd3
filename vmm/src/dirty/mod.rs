//! Dirty tracking: which pages the guest wrote, according to KVM, joined with those that the VMM
//! wrote itself.
//!
//! | tracker | cost of a harvest | used for |
//! |---|---|---|
//! | [`DirtyRings`] | grows with the pages written | machines of more than [`SMALL_RAM_BYTES`] |
//! | [`KvmBitmap`], manual protection | a bit for each page of RAM | smaller ones, or no rings |
//! | [`KvmBitmap`] without | the same, and protecting again at once | a KVM with nothing better |
//!
//! A VM's tracker is chosen before its first vCPU exists, since KVM has to know by then.

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

/// The most RAM for which bitmaps are preferred to rings. Reading a bitmap costs a bit for each
/// page, 4 KiB of bits for 128 MiB; reading a ring costs what was written. So little is left for
/// the pause that neither shows in it up to 4 GiB (see DESIGN.md). Below this size a ring's
/// memory, at least 64 KiB per vCPU, buys nothing.
pub const SMALL_RAM_BYTES: u64 = 512 << 20;

/// A source of dirty pages. Reading it clears it: the caller must keep the pages until a snapshot
/// that holds them is published.
pub trait DirtyTracker: Send + std::fmt::Debug {
    /// Adds the pages written since the last call to `dirty`, and tracks them again: a page written
    /// after this returns is reported once more.
    ///
    /// # Errors
    /// Pages that were already added to `dirty` may not be reported again; all others will be.
    fn harvest(&mut self, dirty: &mut PageSet) -> Result<()>;

    /// Like [`Self::harvest`], but as fast as possible, and only while no vCPU runs. Pages may be
    /// left untracked; the next harvest then reports them whether they were written or not.
    ///
    /// # Errors
    /// As [`Self::harvest`].
    fn harvest_at_cut(&mut self, dirty: &mut PageSet) -> Result<()> {
        self.harvest(dirty)
    }

    /// The kind of this tracker.
    fn kind(&self) -> TrackerKind;
}

/// A kind of tracker of the pages that a guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrackerKind {
    /// A ring of page numbers for each vCPU (`KVM_CAP_DIRTY_LOG_RING_ACQ_REL`).
    Ring,
    /// A bit for each page, cleared by a separate call (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`).
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

/// A tracker of the guest's writes joined with the VMM's own: what checkpoints use.
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
