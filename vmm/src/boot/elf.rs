//! Loads ELF executables: an uncompressed Linux kernel (vmlinux), or any other 64-bit guest.

use std::io::{Read, Seek, SeekFrom};

use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::Elf;
use vm_memory::ReadVolatile;

use super::{BIOS_AREA, BOOT_TABLES_END, HIGH_RAM, Loaded, boot_error};
use crate::error::{Result, VmmError};
use crate::memory::GuestMemory;

/// Lengths of the ELF64 header and of a program header (System V ABI, "ELF-64 Object File Format").
const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const PT_LOAD: u64 = 1;

/// Reads a little-endian field of `bytes` bytes, at most 8; None if it is beyond the end.
fn field(of: &[u8], offset: usize, bytes: usize) -> Option<u64> {
    let bytes = of.get(offset..offset + bytes)?;
    Some(bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

/// Why a file that starts with `head` is not an ELF64 executable for x86-64; None if it is one.
pub(super) fn why_not_elf(head: &[u8]) -> Option<&'static str> {
    if !head.starts_with(b"\x7fELF") {
        return Some("something else");
    }
    let fits = head.get(4) == Some(&2) && field(head, 18, 2) == Some(62);
    (!fits).then_some("an ELF file for another machine")
}

/// Loads the segments of an ELF file at their physical addresses.
///
/// # Errors
/// [`VmmError::Boot`] if a segment does not fit RAM, or lies where the boot tables go.
pub(super) fn load<F: Read + Seek + ReadVolatile>(
    what: &str,
    image: &mut F,
    memory: &GuestMemory,
) -> Result<Loaded> {
    check_segments(what, image)?;
    let loaded = Elf::load(memory, None, image, None).map_err(|error| misplaced(what, error))?;
    Ok(Loaded {
        entry: loaded.kernel_load.0,
        end: loaded.kernel_end,
        header: None,
        initrd_end_max: u64::MAX,
    })
}

fn misplaced(what: &str, found: impl ToString) -> VmmError {
    boot_error(what, "ELF segments that fit guest memory", found)
}

/// Refuses segments that the boot tables, which are written after the kernel, would overwrite.
fn check_segments<F: Read + Seek>(what: &str, image: &mut F) -> Result<()> {
    let mut header = [0; HEADER_BYTES];
    image
        .seek(SeekFrom::Start(0))
        .and_then(|_| image.read_exact(&mut header))
        .map_err(|error| misplaced(what, error))?;
    let (table, count) = (field(&header, 0x20, 8), field(&header, 0x38, 2));
    image
        .seek(SeekFrom::Start(table.unwrap_or(0)))
        .map_err(|error| misplaced(what, format!("program headers out of reach: {error}")))?;
    for _ in 0..count.unwrap_or(0) {
        let mut segment = [0; PROGRAM_HEADER_BYTES];
        image.read_exact(&mut segment).map_err(|error| misplaced(what, error))?;
        let get = |offset, bytes| field(&segment, offset, bytes).unwrap_or(0);
        if get(0, 4) == PT_LOAD && get(0x28, 8) > 0 {
            check_segment(what, get(0x18, 8), get(0x28, 8))?;
        }
    }
    Ok(())
}

fn check_segment(what: &str, start: u64, len: u64) -> Result<()> {
    let end = start
        .checked_add(len)
        .ok_or_else(|| misplaced(what, format!("{len:#x} bytes at {start:#x}")))?;
    if start < BOOT_TABLES_END || (start < BIOS_AREA.end && end > BIOS_AREA.start) {
        let expected = format!(
            "ELF segments at {HIGH_RAM:#x} or above, or between {BOOT_TABLES_END:#x} and {:#x}: \
             the rest below is for boot tables",
            BIOS_AREA.start
        );
        return Err(boot_error(what, &expected, format!("one from {start:#x} to {end:#x}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::memory::GuestRam;

    /// An ELF executable with a segment of one page at `paddr`.
    fn elf_at(paddr: u64) -> Vec<u8> {
        let mut image = vec![0; 0x1000];
        image[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let mut put = |offset: usize, bytes: &[u8]| {
            image[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(18, &62_u16.to_le_bytes());
        put(0x18, &paddr.to_le_bytes());
        put(0x20, &64_u64.to_le_bytes());
        put(0x36, &56_u16.to_le_bytes());
        put(0x38, &1_u16.to_le_bytes());
        put(64, &1_u32.to_le_bytes());
        put(64 + 0x18, &paddr.to_le_bytes());
        put(64 + 0x20, &16_u64.to_le_bytes());
        put(64 + 0x28, &0x1000_u64.to_le_bytes());
        image
    }

    fn load_at(paddr: u64) -> Result<Loaded> {
        let ram = GuestRam::new(4 << 20)?;
        load("x", &mut Cursor::new(elf_at(paddr)), ram.memory())
    }

    #[test]
    fn segments_keep_clear_of_the_boot_tables() {
        for paddr in [0, 0x7000, 0x2_0fff, 0xd_f001, 0xf_f000, u64::MAX - 0xfff] {
            let error = load_at(paddr).unwrap_err();
            assert!(error.to_string().contains("ELF segments"), "{paddr:#x}: {error}");
        }
        for paddr in [0x2_1000, 0x10_0000] {
            let loaded = load_at(paddr).unwrap();
            assert_eq!((loaded.entry, loaded.end), (paddr, paddr + 0x1000));
        }
    }

    #[test]
    fn what_is_cut_short_or_outside_ram_is_refused() {
        assert!(load_at(1 << 40).is_err());
        let ram = GuestRam::new(4 << 20).unwrap();
        for len in [64, 100, 119] {
            let short = elf_at(0x10_0000)[..len].to_vec();
            assert!(load("x", &mut Cursor::new(short), ram.memory()).is_err(), "{len}");
        }
    }
}
