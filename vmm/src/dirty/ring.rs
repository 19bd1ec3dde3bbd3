//! KVM's dirty rings: each vCPU has one, with the numbers of the pages that it wrote.
//!
//! `unsafe` is allowed here because the rings are memory that KVM writes to while we read it.
//!
//! See "KVM_CAP_DIRTY_LOG_RING/KVM_CAP_DIRTY_LOG_RING_ACQ_REL" in the kernel's
//! Documentation/virt/kvm/api.rst.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use frazil_snapstore::{PAGE_SIZE, PageSet};
use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use kvm_ioctls::{VcpuFd, VmFd};
use memmap2::{MmapOptions, MmapRaw};

use super::ioctls::reset_dirty_rings;
use super::{DirtyTracker, TrackerKind};
use crate::error::{Result, VmmError};
use crate::memory::GuestRam;

/// `KVM_DIRTY_GFN_F_DIRTY`: KVM has filled the entry.
const DIRTY: u32 = 1;
/// `KVM_DIRTY_GFN_F_RESET`: we have taken the entry, and KVM may track its page again.
const RESET: u32 = 2;

/// The pages of a memory slot. Slots are the ranges of RAM, in order.
#[derive(Clone, Copy, Debug)]
struct Slot {
    first_page: u64,
    pages: u64,
}

/// One vCPU's ring.
#[derive(Debug)]
struct Ring {
    map: MmapRaw,
    entries: u32,
    /// Number of entries taken so far, wrapping; modulo `entries`, the index of the next one.
    next: u32,
}

impl Ring {
    fn map(vcpu: &VcpuFd, entries: u32) -> std::io::Result<Self> {
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE as u64;
        let len = entries as usize * size_of::<kvm_dirty_gfn>();
        let map = MmapOptions::new().offset(offset).len(len).map_raw(vcpu)?;
        Ok(Self { map, entries, next: 0 })
    }

    /// Takes every entry that KVM has filled, passing slot and offset to `found`; returns how many.
    fn take(&mut self, mut found: impl FnMut(u32, u64)) -> u32 {
        // Once around: KVM cannot fill more until these are reset.
        for taken in 0..self.entries {
            let index = (self.next % self.entries) as usize;
            #[allow(clippy::cast_ptr_alignment)] // a mapping starts at a page
            let first = self.map.as_mut_ptr().cast::<kvm_dirty_gfn>();
            // SAFETY: the mapping has `entries` entries and lives as long as `self`. KVM writes to
            // it concurrently, so only raw pointers refer to it.
            let entry = unsafe { first.add(index) };
            // SAFETY: `flags` is aligned, and both sides access it atomically.
            let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
            if flags.load(Ordering::Acquire) & DIRTY == 0 {
                return taken;
            }
            // SAFETY: KVM wrote both fields before it set the flag, and leaves them alone until the
            // entry is reset.
            let (slot, offset) =
                unsafe { ((&raw const (*entry).slot).read(), (&raw const (*entry).offset).read()) };
            found(slot, offset);
            flags.store(RESET, Ordering::Release);
            self.next = self.next.wrapping_add(1);
        }
        self.entries
    }
}

#[derive(Debug)]
struct Inner {
    rings: Vec<Ring>,
    /// Pages taken by [`DirtyRings::relieve`] since the last harvest.
    spilled: PageSet,
    /// Pages whose entries the last [`DirtyRings::take`] took.
    taken: PageSet,
    /// Entries taken that KVM has not reset yet.
    owed: u64,
    /// Pages that KVM may have failed to track again: every harvest reports them.
    unwatched: PageSet,
}

/// The rings of all vCPUs of a machine.
///
/// A vCPU whose ring is full leaves the guest, and its thread calls [`Self::relieve`]. The cost of
/// a harvest grows with the pages written, not with the size of RAM.
#[derive(Debug)]
pub struct DirtyRings {
    vm: Arc<VmFd>,
    slots: Vec<Slot>,
    entries: u32,
    inner: Mutex<Inner>,
    /// The VM's slots refer to this memory, so it must be dropped last.
    _ram: Arc<GuestRam>,
}

impl DirtyRings {
    /// Rings of `entries` each, the size that was enabled for `vm`. [`Self::add`] adds each vCPU's.
    #[must_use]
    pub fn new(vm: Arc<VmFd>, ram: &Arc<GuestRam>, entries: u32) -> Self {
        let slots = ram.mapped_ranges().map(|(range, _)| Slot {
            first_page: range.gpa / PAGE_SIZE as u64,
            pages: range.len_bytes / PAGE_SIZE as u64,
        });
        let none = || PageSet::new(ram.end_page());
        let inner =
            Inner { rings: Vec::new(), spilled: none(), taken: none(), owed: 0, unwatched: none() };
        Self {
            slots: slots.collect(),
            vm,
            entries,
            inner: Mutex::new(inner),
            _ram: Arc::clone(ram),
        }
    }

    /// Adds a vCPU's ring.
    ///
    /// # Errors
    /// [`VmmError::Host`] if it cannot be mapped.
    pub fn add(&self, vcpu: &VcpuFd) -> Result<()> {
        let ring = Ring::map(vcpu, self.entries).map_err(VmmError::host("map a dirty ring"))?;
        self.lock().rings.push(ring);
        Ok(())
    }

    /// Empties the rings, for a vCPU whose ring is full. The next harvest reports the pages.
    ///
    /// # Errors
    /// [`VmmError::Kvm`] if KVM cannot reset the rings. No page is lost.
    pub fn relieve(&self) -> Result<()> {
        let inner = &mut *self.lock();
        let taken = self.take(inner);
        inner.spilled.union(&inner.taken);
        taken
    }

    /// Takes all entries, leaving their pages in `taken`, and makes KVM track those pages again.
    fn take(&self, inner: &mut Inner) -> Result<()> {
        inner.taken.clear();
        for ring in &mut inner.rings {
            inner.owed += u64::from(ring.take(|slot, offset| {
                // KVM names only slots and pages that exist.
                if let Some(slot) = self.slots.get(slot as usize)
                    && offset < slot.pages
                {
                    inner.taken.insert(slot.first_page + offset);
                }
            }));
        }
        if inner.owed == 0 {
            return Ok(());
        }
        // Before anybody reads those pages: a write after that must be seen.
        let reset = reset_dirty_rings(&self.vm);
        inner.owed -= reset.as_ref().map_or(0, |reset| *reset.min(&inner.owed));
        if inner.owed > 0 {
            // It is not known which of the pages KVM tracks, and it will not retry the others.
            inner.unwatched.union(&inner.taken);
        }
        reset.map(drop)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DirtyTracker for Arc<DirtyRings> {
    fn harvest(&mut self, dirty: &mut PageSet) -> Result<()> {
        let inner = &mut *self.lock();
        let taken = self.take(inner);
        for pages in [&inner.spilled, &inner.taken, &inner.unwatched] {
            dirty.union(pages);
        }
        inner.spilled.clear();
        taken
    }

    fn kind(&self) -> TrackerKind {
        TrackerKind::Ring
    }
}
