//! Memory as the kernel sees it: a mapped memfd to copy from, to fault on, and to give to KVM.
//!
//! `unsafe` is allowed here because a floor is what the bare operation costs: the wrappers that
//! make these operations safe are what is being measured.
#![allow(unsafe_code)]

use std::fs::File;

use anyhow::Context;
use frazil_snapstore::PAGE_SIZE;
use frazil_vmm::memory::GuestRam;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{Advice, madvise};
use userfaultfd::Uffd;

/// A memfd and a shared mapping of it.
#[derive(Debug)]
pub(crate) struct SharedMemory {
    file: File,
    map: MmapRaw,
}

impl SharedMemory {
    /// Creates `len` bytes, not backed by memory yet.
    pub(crate) fn new(len: usize) -> anyhow::Result<Self> {
        let memfd =
            memfd_create("frazil-bench", MemfdFlags::CLOEXEC).context("cannot create a memfd")?;
        ftruncate(&memfd, len as u64).context("cannot grow a memfd")?;
        let file = File::from(memfd);
        let map = MmapOptions::new().len(len).map_raw(&file).context("cannot map a memfd")?;
        Ok(Self { file, map })
    }

    /// The memfd.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// The address of the mapping.
    pub(crate) fn address(&self) -> usize {
        self.map.as_mut_ptr() as usize
    }

    /// Length of the mapping in bytes.
    pub(crate) fn len_bytes(&self) -> usize {
        self.map.len()
    }

    /// Writes a byte to page `index` through the mapping.
    pub(crate) fn touch(&self, index: usize) {
        assert!((index + 1) * PAGE_SIZE <= self.map.len(), "page {index} is outside the mapping");
        // SAFETY: the byte is inside the mapping, by the assertion, and the mapping lives as long
        // as `self`; no reference to these bytes exists. Volatile, so that the write happens.
        unsafe { self.map.as_mut_ptr().add(index * PAGE_SIZE).write_volatile(1) };
    }

    /// Copies `out.len()` bytes at `offset`.
    pub(crate) fn copy_out(&self, offset: usize, out: &mut [u8]) {
        assert!(offset + out.len() <= self.map.len(), "copy from outside the mapping");
        // SAFETY: the source is inside the mapping, by the assertion, and `out` is the caller's own
        // memory; nobody writes to the mapping meanwhile.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.map.as_ptr().add(offset),
                out.as_mut_ptr(),
                out.len(),
            );
        }
    }

    /// Copies `page` to page `index` by `UFFDIO_COPY`.
    pub(crate) fn uffd_copy(
        &self,
        uffd: &Uffd,
        page: &[u8; PAGE_SIZE],
        index: usize,
    ) -> anyhow::Result<()> {
        assert!((index + 1) * PAGE_SIZE <= self.map.len(), "page {index} is outside the mapping");
        // SAFETY: the target is a page of the mapping, by the assertion; nobody holds a reference
        // to it, and the kernel fills it only if it is missing.
        unsafe {
            let target = self.map.as_mut_ptr().add(index * PAGE_SIZE);
            uffd.copy(page.as_ptr().cast(), target.cast(), PAGE_SIZE, true)
        }
        .context("UFFDIO_COPY failed")?;
        Ok(())
    }
}

/// A KVM VM whose only slot is `memory`, with the dirty log on. Field order matters: the VM is
/// dropped first.
#[derive(Debug)]
pub(crate) struct SlotVm {
    /// KVM's handle.
    pub vm: VmFd,
    _memory: SharedMemory,
}

impl SlotVm {
    /// Gives `memory` to `vm` as guest RAM at address 0.
    pub(crate) fn new(vm: VmFd, memory: SharedMemory) -> anyhow::Result<Self> {
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: KVM_MEM_LOG_DIRTY_PAGES,
            guest_phys_addr: 0,
            memory_size: memory.len_bytes() as u64,
            userspace_addr: memory.address() as u64,
        };
        // SAFETY: the mapping is as long as the slot says, and outlives the VM: the struct holds
        // both and drops the VM first.
        unsafe { vm.set_user_memory_region(region) }.context("KVM refused a memory slot")?;
        Ok(Self { vm, _memory: memory })
    }
}

/// Copies `page` to `address` in a guest's RAM by `UFFDIO_COPY`.
pub(crate) fn uffd_copy_to_guest(
    ram: &GuestRam,
    uffd: &Uffd,
    page: &[u8; PAGE_SIZE],
    address: usize,
) -> anyhow::Result<()> {
    let inside = ram.mapped_ranges().any(|(range, start)| {
        address >= start && address + PAGE_SIZE <= start + range.len_bytes as usize
    });
    assert!(inside && address.is_multiple_of(PAGE_SIZE), "{address:#x} is not a page of the guest");
    // SAFETY: the target is a page of `ram`'s mapping, by the assertion; nobody holds a reference
    // to guest memory, and the kernel fills the page only if it is missing.
    unsafe { uffd.copy(page.as_ptr().cast(), address as *mut _, PAGE_SIZE, true) }
        .context("UFFDIO_COPY failed")?;
    Ok(())
}

/// Allocates all of a guest's RAM, and fills the host's page tables for it.
pub(crate) fn populate(ram: &GuestRam) -> anyhow::Result<()> {
    for (range, address) in ram.mapped_ranges() {
        // SAFETY: the range is one mapping of `ram`, and populating it changes no byte.
        unsafe { madvise(address as *mut _, range.len_bytes as usize, Advice::LinuxPopulateWrite) }
            .context("MADV_POPULATE_WRITE failed (it needs Linux 5.14 or later)")?;
    }
    Ok(())
}
