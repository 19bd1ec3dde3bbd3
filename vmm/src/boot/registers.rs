//! The descriptor tables, page tables and registers with which the boot processor enters a kernel.

use kvm_bindings::{kvm_fpu, kvm_lapic_state, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::{GDT, IDT, PAGE_DIRECTORIES, PDPT, PML4, STACK_TOP, ZERO_PAGE, boot_error};
use crate::error::{Result, VmmError};
use crate::memory::GuestMemory;

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const MODE_NMI: u8 = 4;
const MODE_EXTINT: u8 = 7;

/// Writes a flat GDT with the selectors that Linux expects, and page tables that map the first
/// 4 GiB one to one.
pub(super) fn write_tables(memory: &GuestMemory) -> Result<()> {
    let write = |value: u64, address: u64| {
        memory
            .write_obj(value, GuestAddress(address))
            .map_err(|error| boot_error("boot tables", "room in guest memory", error))
    };
    for (index, (flags, _)) in SEGMENTS.iter().enumerate() {
        write(descriptor(*flags), GDT + index as u64 * 8)?;
    }
    write(0, IDT)?;
    write(PDPT | 3, PML4)?;
    for gib in 0..4 {
        write((PAGE_DIRECTORIES + gib * 0x1000) | 3, PDPT + gib * 8)?;
    }
    // 2 MiB pages, present and writable.
    (0..4 * 512).try_for_each(|index| write(index << 21 | 0x83, PAGE_DIRECTORIES + index * 8))
}

/// Flags (as in bits 40..56 of a descriptor) and limit of each GDT entry: two unused ones, code at
/// 0x10, data at 0x18, the task state segment at 0x20.
const SEGMENTS: [(u16, u32); 5] =
    [(0, 0), (0, 0), (0xa09b, 0xf_ffff), (0xc093, 0xf_ffff), (0x808b, 0xf_ffff)];

fn descriptor(flags: u16) -> u64 {
    match flags {
        0 => 0,
        flags => u64::from(flags) << 40 | 0xf << 48 | 0xffff,
    }
}

fn segment(index: usize) -> kvm_segment {
    let (flags, limit) = SEGMENTS[index];
    let bit = |position: u16| (flags >> position & 1) as u8;
    kvm_segment {
        base: 0,
        // KVM takes the limit in bytes; all our entries have it in pages.
        limit: limit << 12 | 0xfff,
        selector: index as u16 * 8,
        type_: (flags & 0xf) as u8,
        s: bit(4),
        dpl: (flags >> 5 & 3) as u8,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: 0,
        padding: 0,
    }
}

/// Sets the boot processor's registers to enter the kernel at `entry`. The other processors wait
/// for startup interrupts from the guest.
///
/// # Errors
/// [`VmmError::Kvm`].
pub fn set_boot_registers(vcpu: &VcpuFd, entry: u64) -> Result<()> {
    let mut sregs = vcpu.get_sregs().map_err(VmmError::kvm("read segment registers"))?;
    sregs.cs = segment(2);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) =
        (segment(3), segment(3), segment(3), segment(3), segment(3));
    sregs.tr = segment(4);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, SEGMENTS.len() as u16 * 8 - 1);
    (sregs.idt.base, sregs.idt.limit) = (IDT, 7);
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE | CR0_PAGING;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LONG_MODE;
    vcpu.set_sregs(&sregs).map_err(VmmError::kvm("set segment registers"))?;
    let regs = kvm_regs {
        rflags: 2,
        rip: entry,
        rsp: STACK_TOP,
        rbp: STACK_TOP,
        rsi: ZERO_PAGE,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(VmmError::kvm("set registers"))?;
    // The state after FNINIT, and the MXCSR that every processor starts with.
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(VmmError::kvm("set the FPU"))
}

/// Sets up the local APIC's pins as a PC's firmware does: the 8259A at LINT0, the NMI at LINT1.
///
/// # Errors
/// [`VmmError::Kvm`].
pub fn set_local_apic(vcpu: &VcpuFd) -> Result<()> {
    let mut lapic = vcpu.get_lapic().map_err(VmmError::kvm("read the local APIC"))?;
    set_delivery_mode(&mut lapic, LVT_LINT0, MODE_EXTINT);
    set_delivery_mode(&mut lapic, LVT_LINT1, MODE_NMI);
    vcpu.set_lapic(&lapic).map_err(VmmError::kvm("set the local APIC"))
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u8) {
    // Bits 8 to 10 of a little-endian register: the low bits of its second byte.
    let byte = &mut lapic.regs[register + 1];
    *byte = (*byte as u8 & !7 | mode) as _;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_what_the_boot_protocol_says() {
        let code = segment(2);
        assert_eq!(
            (code.selector, code.l, code.db, code.g, code.present, code.type_),
            (0x10, 1, 0, 1, 1, 11)
        );
        let data = segment(3);
        assert_eq!((data.selector, data.l, data.db, data.s, data.type_), (0x18, 0, 1, 1, 3));
        assert_eq!(descriptor(SEGMENTS[2].0), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(SEGMENTS[3].0), 0x00cf_9300_0000_ffff);
    }
}
