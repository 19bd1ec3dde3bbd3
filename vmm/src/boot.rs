//! Loading a kernel and entering it by the 64-bit Linux boot protocol
//! (`Documentation/arch/x86/boot.rst` in the Linux sources): long mode, the zero page in RSI.

use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use kvm_bindings::{kvm_fpu, kvm_lapic_state, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{KernelLoader, load_cmdline};
use vm_memory::{Bytes, GuestAddress, ReadVolatile};

use crate::error::{Result, VmmError};
use crate::memory::{GuestMemory, GuestRam, HOLE_END, HOLE_START};

const GDT: u64 = 0x500;
const IDT: u64 = 0x540;
const ZERO_PAGE: u64 = 0x7000;
const STACK_TOP: u64 = 0x8ff0;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORIES: u64 = 0xb000;
const CMDLINE: u64 = 0x2_0000;
const CMDLINE_MAX_LEN: usize = 2048;
/// The extended BIOS data area, and the rest of the first MiB, are no RAM to a PC.
const EBDA: u64 = 0x9_fc00;
const HIGH_RAM: u64 = 0x10_0000;

const E820_RAM: u32 = 1;
const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const MODE_NMI: u8 = 4;
const MODE_EXTINT: u8 = 7;

/// A kernel to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// An ELF file.
    File(PathBuf),
    /// An ELF image in this program.
    Builtin(&'static [u8]),
}

/// What to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootSource {
    /// The kernel.
    pub kernel: Kernel,
    /// An initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// Loads `source` into RAM; returns the address to enter at.
///
/// # Errors
/// [`VmmError::Boot`] saying what cannot be booted and why.
pub fn load(source: &BootSource, ram: &GuestRam) -> Result<u64> {
    let memory = ram.memory();
    let (entry, kernel_end) = match &source.kernel {
        Kernel::Builtin(image) => load_elf("the built-in guest", &mut Cursor::new(image), memory)?,
        Kernel::File(path) => load_elf(&path.display().to_string(), &mut open(path)?, memory)?,
    };
    let initrd =
        source.initrd.as_ref().map(|path| load_initrd(path, ram, kernel_end)).transpose()?;
    let cmdline = load_command_line(&source.cmdline, memory)?;
    write_zero_page(ram, cmdline, initrd)?;
    write_tables(memory)?;
    Ok(entry)
}

fn boot_error(what: impl Into<String>, expected: &str, found: impl ToString) -> VmmError {
    VmmError::Boot { what: what.into(), expected: expected.to_owned(), found: found.to_string() }
}

fn open(path: &Path) -> Result<File> {
    File::open(path)
        .map_err(|error| boot_error(path.display().to_string(), "a readable file", error))
}

/// Loads the segments of an ELF file; returns the address to enter at and the end of the highest.
fn load_elf<F: Read + Seek + ReadVolatile>(
    what: &str,
    image: &mut F,
    memory: &GuestMemory,
) -> Result<(u64, u64)> {
    const EXPECTED: &str =
        "an ELF64 executable for x86-64 (of a Linux kernel: the uncompressed vmlinux)";
    let mut head = Vec::new();
    image
        .by_ref()
        .take(0x206)
        .read_to_end(&mut head)
        .map_err(|error| boot_error(what, EXPECTED, error))?;
    let elf64_x86 = head.starts_with(b"\x7fELF")
        && head.get(4) == Some(&2)
        && head.get(18..20) == Some(&[62, 0]);
    if !elf64_x86 {
        let found = if head.get(0x202..0x206) == Some(b"HdrS") {
            "a Linux bzImage: unpack its vmlinux (scripts/extract-vmlinux in the Linux sources)"
        } else if head.starts_with(b"\x7fELF") {
            "an ELF file for another machine"
        } else {
            "something else"
        };
        return Err(boot_error(what, EXPECTED, found));
    }
    image.seek(SeekFrom::Start(0)).map_err(|error| boot_error(what, EXPECTED, error))?;
    let loaded = Elf::load(memory, None, image, None)
        .map_err(|error| boot_error(what, "ELF segments that fit guest memory", error))?;
    Ok((loaded.kernel_load.0, loaded.kernel_end))
}

/// Loads the initrd behind `kernel_end`; returns its address and length.
fn load_initrd(path: &Path, ram: &GuestRam, kernel_end: u64) -> Result<(u64, u64)> {
    let mut file = open(path)?;
    let what = || path.display().to_string();
    let len = file.metadata().map_err(|error| boot_error(what(), "a readable file", error))?.len();
    // As high as the kernel can reach it, out of the way of its own segments.
    let low_end = ram.len_bytes().min(HOLE_START);
    let address = low_end
        .checked_sub(len)
        .map(|address| address & !0xfff)
        .filter(|address| *address >= kernel_end.max(HIGH_RAM) && len > 0)
        .ok_or_else(|| {
            boot_error(
                what(),
                "an initrd that fits guest memory behind the kernel",
                format!("{len} bytes"),
            )
        })?;
    ram.memory()
        .read_exact_volatile_from(GuestAddress(address), &mut file, len as usize)
        .map_err(|error| boot_error(what(), "a readable file", error))?;
    Ok((address, len))
}

fn load_command_line(text: &str, memory: &GuestMemory) -> Result<(u64, u32)> {
    let wrong = |error: &dyn std::fmt::Display| {
        boot_error("the command line", "up to 2047 printable characters", error)
    };
    let mut cmdline = Cmdline::new(CMDLINE_MAX_LEN).map_err(|error| wrong(&error))?;
    if !text.is_empty() {
        cmdline.insert_str(text).map_err(|error| wrong(&error))?;
    }
    load_cmdline(memory, GuestAddress(CMDLINE), &cmdline).map_err(|error| wrong(&error))?;
    Ok((CMDLINE, text.len() as u32 + 1))
}

fn write_zero_page(ram: &GuestRam, cmdline: (u64, u32), initrd: Option<(u64, u64)>) -> Result<()> {
    let mut params = boot_params::default();
    params.hdr.type_of_loader = 0xff;
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = u32::from_le_bytes(*b"HdrS");
    params.hdr.kernel_alignment = 0x100_0000;
    params.hdr.cmd_line_ptr = cmdline.0 as u32;
    params.hdr.cmdline_size = cmdline.1;
    if let Some((address, len)) = initrd {
        params.hdr.ramdisk_image = address as u32;
        params.hdr.ramdisk_size = len as u32;
    }
    for (index, (start, end)) in e820(ram.len_bytes()).into_iter().enumerate() {
        params.e820_table[index] =
            boot_e820_entry { addr: start, size: end - start, r#type: E820_RAM };
        params.e820_entries += 1;
    }
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&params, GuestAddress(ZERO_PAGE)),
        ram.memory(),
    )
    .map_err(|error| boot_error("the zero page", "room in guest memory", error))
}

/// The RAM a guest may use, as address ranges.
fn e820(ram_bytes: u64) -> Vec<(u64, u64)> {
    let mut ranges = vec![(0, EBDA), (HIGH_RAM, ram_bytes.min(HOLE_START))];
    if ram_bytes > HOLE_START {
        ranges.push((HOLE_END, HOLE_END + ram_bytes - HOLE_START));
    }
    ranges
}

/// A flat GDT with the selectors Linux wants, and an identity map of the first 4 GiB.
fn write_tables(memory: &GuestMemory) -> Result<()> {
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

/// Flags (as in bits 40..56 of a descriptor) and limit of the GDT's entries: two unused, code at
/// 0x10, data at 0x18, the task state at 0x20.
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
        // In pages, except where the granularity bit says bytes; all of ours are in pages.
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

/// Sets the boot processor's registers to enter at `entry`. The other processors wait for the
/// startup interrupts that the guest sends them.
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
    // As after FNINIT, and the MXCSR every processor starts with.
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(VmmError::kvm("set the FPU"))
}

/// Wires the local APIC's pins as a PC's firmware does: the 8259A to LINT0, the NMI to LINT1.
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
    // Bits 8 to 10 of the register, little-endian: the low bits of its second byte.
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

    #[test]
    fn what_is_no_kernel_is_said_to_be_none() {
        let ram = GuestRam::new(32 << 20).unwrap();
        let mut bzimage = vec![0; 0x300];
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        let error = load_elf("x", &mut Cursor::new(&bzimage), ram.memory()).unwrap_err();
        assert!(error.to_string().contains("bzImage"), "{error}");
        for bad in [&b""[..], b"\x7fELF", b"#!/bin/sh\n"] {
            assert!(matches!(
                load_elf("x", &mut Cursor::new(bad), ram.memory()),
                Err(VmmError::Boot { .. })
            ));
        }
    }

    #[test]
    fn e820_covers_all_ram_but_the_pc_hole() {
        let total: u64 = e820(5 << 30).iter().map(|(start, end)| end - start).sum();
        assert_eq!(total, (5 << 30) - (HIGH_RAM - EBDA));
    }
}
