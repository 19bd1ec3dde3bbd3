//! Loads a kernel and prepares the boot processor to enter it by the 64-bit Linux boot protocol
//! (`Documentation/arch/x86/boot.rst` in the Linux sources): long mode, the zero page in RSI.

mod acpi;
mod bzimage;
mod elf;
mod registers;
mod zero_page;

use std::fs::File;
use std::io::{Cursor, Read, Seek};
use std::path::{Path, PathBuf};

use linux_loader::cmdline::Cmdline;
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::load_cmdline;
use vm_memory::{Bytes, GuestAddress, ReadVolatile};

use crate::error::{Result, VmmError};
use crate::memory::{GuestMemory, GuestRam, HOLE_START};
pub use acpi::{GenerationSlot, Hardware, MmioSlot};
pub use registers::{set_boot_registers, set_local_apic};
use zero_page::BootInfo;

// Where the boot tables are, in guest physical addresses.
const GDT: u64 = 0x500;
const IDT: u64 = 0x540;
const ZERO_PAGE: u64 = 0x7000;
const STACK_TOP: u64 = 0x8ff0;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORIES: u64 = 0xb000;
const CMDLINE: u64 = 0x2_0000;
const CMDLINE_MAX_LEN: usize = 2048;
/// The first page after the tables above.
const BOOT_TABLES_END: u64 = 0x2_1000;
/// Start of the extended BIOS data area: from here to the end of the first MiB a PC has no RAM.
const EBDA: u64 = 0x9_fc00;
/// Where a PC has its BIOS in read-only memory, and kernels look for the firmware's tables.
const BIOS_AREA: std::ops::Range<u64> = 0xe_0000..HIGH_RAM;
const HIGH_RAM: u64 = 0x10_0000;

/// A kernel to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// An ELF file or a Linux bzImage.
    File(PathBuf),
    /// An image in this program.
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

/// A kernel loaded into RAM.
#[derive(Debug)]
struct Loaded {
    /// The address to enter at.
    entry: u64,
    /// The end of the RAM that the kernel uses before it knows what else is in RAM.
    end: u64,
    /// The setup header of a bzImage.
    header: Option<setup_header>,
    /// The highest address at which an initrd may end.
    initrd_end_max: u64,
}

/// Loads `source` into RAM, with tables that list `cpus` processors, the virtio devices `slots` and
/// no other optional hardware; returns the address to enter at.
///
/// # Errors
/// As [`load_on`].
pub fn load(source: &BootSource, ram: &GuestRam, cpus: usize, slots: &[MmioSlot]) -> Result<u64> {
    load_on(source, ram, &Hardware { cpus, slots, ..Hardware::default() })
}

/// Loads `source` into RAM, with tables that list `hardware`; returns the address to enter at.
///
/// # Errors
/// [`VmmError::Boot`], which says what cannot be booted and why.
pub fn load_on(source: &BootSource, ram: &GuestRam, hardware: &Hardware<'_>) -> Result<u64> {
    let memory = ram.memory();
    let kernel = match &source.kernel {
        Kernel::Builtin(image) => load_kernel("the built-in guest", &mut Cursor::new(image), ram)?,
        Kernel::File(path) => load_kernel(&path.display().to_string(), &mut open(path)?, ram)?,
    };
    let initrd = source.initrd.as_ref().map(|path| load_initrd(path, ram, &kernel)).transpose()?;
    let cmdline_len_max = kernel.header.map(|header| header.cmdline_size);
    let cmdline = load_command_line(&source.cmdline, cmdline_len_max, memory)?;
    zero_page::write(ram, &BootInfo { header: kernel.header, cmdline, initrd })?;
    acpi::write(memory, hardware)?;
    registers::write_tables(memory)?;
    Ok(kernel.entry)
}

fn boot_error(what: impl Into<String>, expected: &str, found: impl ToString) -> VmmError {
    VmmError::Boot { what: what.into(), expected: expected.to_owned(), found: found.to_string() }
}

fn open(path: &Path) -> Result<File> {
    File::open(path)
        .map_err(|error| boot_error(path.display().to_string(), "a readable file", error))
}

/// Loads `image`, an ELF file or a bzImage.
fn load_kernel<F: Read + Seek + ReadVolatile>(
    what: &str,
    image: &mut F,
    ram: &GuestRam,
) -> Result<Loaded> {
    const EXPECTED: &str = "an ELF64 executable for x86-64, or a Linux bzImage";
    let mut head = Vec::new();
    image
        .by_ref()
        .take(bzimage::HEAD_BYTES)
        .read_to_end(&mut head)
        .map_err(|error| boot_error(what, EXPECTED, error))?;
    match elf::why_not_elf(&head) {
        None => elf::load(what, image, ram.memory()),
        Some(_) if bzimage::is_bzimage(&head) => bzimage::load(what, &head, image, ram),
        Some(found) => Err(boot_error(what, EXPECTED, found)),
    }
}

/// Loads the initrd above the kernel; returns its address and length.
fn load_initrd(path: &Path, ram: &GuestRam, kernel: &Loaded) -> Result<(u64, u64)> {
    let mut file = open(path)?;
    let what = || path.display().to_string();
    let len = file.metadata().map_err(|error| boot_error(what(), "a readable file", error))?.len();
    // As high as the kernel can reach, out of the way of its own segments.
    let end = ram.len_bytes().min(HOLE_START).min(kernel.initrd_end_max);
    let address = end
        .checked_sub(len)
        .map(|address| address & !0xfff)
        .filter(|address| *address >= kernel.end.max(HIGH_RAM) && len > 0)
        .ok_or_else(|| {
            boot_error(
                what(),
                "an initrd that fits in guest memory after the kernel",
                format!("{len} bytes"),
            )
        })?;
    ram.memory()
        .read_exact_volatile_from(GuestAddress(address), &mut file, len as usize)
        .map_err(|error| boot_error(what(), "a readable file", error))?;
    Ok((address, len))
}

/// Loads the command line; returns its address, and its length with the terminating zero. `len_max`
/// is the most characters that the kernel says it takes.
fn load_command_line(text: &str, len_max: Option<u32>, memory: &GuestMemory) -> Result<(u64, u32)> {
    let most =
        len_max.map_or(CMDLINE_MAX_LEN - 1, |most| CMDLINE_MAX_LEN.min(most as usize + 1) - 1);
    let wrong = |error: &dyn std::fmt::Display| {
        boot_error("the command line", &format!("up to {most} printable characters"), error)
    };
    if text.len() > most {
        return Err(wrong(&format!("{} bytes", text.len())));
    }
    let mut cmdline = Cmdline::new(CMDLINE_MAX_LEN).map_err(|error| wrong(&error))?;
    if !text.is_empty() {
        cmdline.insert_str(text).map_err(|error| wrong(&error))?;
    }
    load_cmdline(memory, GuestAddress(CMDLINE), &cmdline).map_err(|error| wrong(&error))?;
    Ok((CMDLINE, text.len() as u32 + 1))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_is_no_kernel_is_said_to_be_none() {
        let ram = GuestRam::new(32 << 20).unwrap();
        let mut bzimage = vec![0; 0x300];
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        let error = load_kernel("x", &mut Cursor::new(&bzimage), &ram).unwrap_err();
        assert!(error.to_string().contains("bzImage"), "{error}");
        for bad in [&b""[..], b"\x7fELF", b"#!/bin/sh\n"] {
            assert!(matches!(
                load_kernel("x", &mut Cursor::new(bad), &ram),
                Err(VmmError::Boot { .. })
            ));
        }
    }

    #[test]
    fn an_initrd_goes_where_the_kernel_reaches_it() {
        let ram = GuestRam::new(32 << 20).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 5000]).unwrap();
        let mut kernel = Loaded { entry: 0, end: 8 << 20, header: None, initrd_end_max: u64::MAX };
        let place = |kernel: &Loaded| load_initrd(file.path(), &ram, kernel);
        assert_eq!(place(&kernel).unwrap(), ((32 << 20) - 0x2000, 5000));
        kernel.initrd_end_max = 16 << 20;
        assert_eq!(place(&kernel).unwrap(), ((16 << 20) - 0x2000, 5000));
        kernel.end = (16 << 20) - 0x1000;
        assert!(place(&kernel).is_err());
    }

    #[test]
    fn command_lines_are_no_longer_than_the_kernel_takes() {
        let ram = GuestRam::new(4 << 20).unwrap();
        let load = |len: usize, most| load_command_line(&"x".repeat(len), most, ram.memory());
        assert_eq!(load(2047, None).unwrap(), (CMDLINE, 2048));
        assert!(load(2048, None).is_err());
        assert!(load(2048, Some(u32::MAX)).is_err());
        assert_eq!(load(255, Some(255)).unwrap(), (CMDLINE, 256));
        assert!(load(256, Some(255)).unwrap_err().to_string().contains("up to 255"));
        assert_eq!(load(0, Some(0)).unwrap(), (CMDLINE, 1));
    }
}
