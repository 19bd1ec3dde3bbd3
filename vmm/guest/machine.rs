//! What the guest needs of the machine: memory, the clock, ports, the E820 table and page tables. All of it
//! works in ring 3.

use core::arch::asm;
use core::arch::x86_64::{_mm_pause, _rdtsc};
use core::slice;

use super::control::{DATA_GPA_MIN, DataRange, PAGE_BYTES, RANGES_MAX};
use super::writer::Memory;

/// The RAM of this machine, which is mapped where it is: a virtual address is a physical one.
#[derive(Clone, Copy)]
pub struct Ram;

impl Memory for Ram {
    #[inline(always)]
    fn load(&self, gpa: u64) -> u64 {
        // SAFETY: callers pass aligned addresses of RAM outside the image, which no reference points to.
        unsafe { (gpa as *const u64).read_volatile() }
    }

    #[inline(always)]
    fn store(&mut self, gpa: u64, value: u64) {
        // SAFETY: as for `load`.
        unsafe { (gpa as *mut u64).write_volatile(value) }
    }
}

/// The time stamp counter.
#[inline(always)]
pub fn read_tsc() -> u64 {
    // SAFETY: CR4.TSD is clear.
    unsafe { _rdtsc() }
}

/// Tells the processor that this is a loop that waits.
#[inline(always)]
pub fn pause() {
    _mm_pause();
}

/// Writes to a port that the I/O bitmap opens.
pub fn out(port: u16, value: u8) {
    // SAFETY: devices of this machine do not write to memory by themselves.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
    }
}

/// Reads from a port that the I/O bitmap opens.
pub fn input(port: u16) -> u8 {
    let value;
    // SAFETY: as for `out`.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags))
    }
    value
}

/// Resets the machine by the keyboard controller, which ends the VM.
pub fn reset() -> ! {
    out(0x64, 0xfe);
    loop {
        pause();
    }
}

const CMDLINE_BYTES_MAX: usize = 4096;
const BOOT_PARAMS_CMDLINE: u64 = 0x228;
const BOOT_PARAMS_E820_COUNT: u64 = 0x1e8;
const BOOT_PARAMS_E820: u64 = 0x2d0;
const E820_ENTRY_BYTES: u64 = 20;
const E820_ENTRIES_MAX: u64 = 128;
const E820_RAM: u32 = 1;

/// The kernel command line; not text that is not ASCII.
pub fn cmdline(boot_params_gpa: u64) -> &'static str {
    // SAFETY: by the boot protocol boot_params and the command line lie in RAM, mapped, and stay as they are.
    let bytes = unsafe {
        let gpa = ((boot_params_gpa + BOOT_PARAMS_CMDLINE) as *const u32).read_unaligned();
        slice::from_raw_parts(
            gpa as usize as *const u8,
            if gpa == 0 { 0 } else { CMDLINE_BYTES_MAX },
        )
    };
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    str::from_utf8(&bytes[..end]).unwrap_or("")
}

/// Collects the RAM above [`DATA_GPA_MIN`], in whole pages, and returns how many pages there are.
///
/// # Errors
/// There is too little, or it is in too many pieces.
pub fn find_data_ranges(
    boot_params_gpa: u64,
    ranges: &mut [DataRange; RANGES_MAX],
) -> Result<u64, &'static str> {
    // SAFETY: by the boot protocol boot_params is in RAM and mapped.
    let count = unsafe { ((boot_params_gpa + BOOT_PARAMS_E820_COUNT) as *const u8).read() };
    let (mut used, mut pages) = (0, 0);
    for index in 0..u64::from(count).min(E820_ENTRIES_MAX) {
        let entry = boot_params_gpa + BOOT_PARAMS_E820 + index * E820_ENTRY_BYTES;
        // SAFETY: as above; entries are packed, so nothing is aligned.
        let (gpa, bytes, kind) = unsafe {
            (
                (entry as *const u64).read_unaligned(),
                ((entry + 8) as *const u64).read_unaligned(),
                ((entry + 16) as *const u32).read_unaligned(),
            )
        };
        let start = gpa.max(DATA_GPA_MIN).next_multiple_of(PAGE_BYTES);
        let end = gpa.saturating_add(bytes) / PAGE_BYTES * PAGE_BYTES;
        if kind != E820_RAM || start >= end {
            continue;
        }
        if end > ADDRESSES_MAX {
            return Err("expected RAM below 512 GiB, found more");
        }
        let range = ranges.get_mut(used).ok_or("expected 16 RAM ranges or fewer, found more")?;
        *range = DataRange { gpa: start, pages: (end - start) / PAGE_BYTES };
        pages += range.pages;
        used += 1;
    }
    if pages * PAGE_BYTES < DATA_GPA_MIN {
        return Err("expected 32 MiB of RAM or more, found less");
    }
    Ok(pages)
}

unsafe extern "C" {
    static mut page_directory_pointers: [u64; 512];
    static mut page_directory_gib3: [u64; 512];
}

const DIRECTORIES_GPA: u64 = 0x40_0000;
const GIB: u64 = 1 << 30;
const ADDRESSES_MAX: u64 = 512 * GIB;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const LARGE_PAGE_FLAGS: u64 = 0xe7; // present, writable, user, accessed, dirty, large
const TABLE_FLAGS: u64 = 7;

/// Maps all of `ranges` where they are; boot.s has mapped the first GiB. A directory is filled before the
/// table above points to it, so a hypervisor that shadows page tables sees each change once.
pub fn map_memory(ranges: &[DataRange; RANGES_MAX]) {
    let (pointers, gib3) =
        (&raw mut page_directory_pointers as u64, &raw mut page_directory_gib3 as u64);
    for range in ranges {
        let end = range.gpa + range.pages * PAGE_BYTES;
        let mut gpa = range.gpa.max(GIB) / LARGE_PAGE_BYTES * LARGE_PAGE_BYTES;
        while gpa < end {
            let gib = gpa / GIB;
            // The fourth GiB has a directory already, for the local APIC.
            let directory = if gib == 3 { gib3 } else { DIRECTORIES_GPA + gib * PAGE_BYTES };
            while gpa < end && gpa / GIB == gib {
                Ram.store(directory + gpa / LARGE_PAGE_BYTES % 512 * 8, gpa | LARGE_PAGE_FLAGS);
                gpa += LARGE_PAGE_BYTES;
            }
            if Ram.load(pointers + gib * 8) == 0 {
                Ram.store(pointers + gib * 8, directory | TABLE_FLAGS);
            }
        }
    }
}

/// The functions that the compiler calls by name. The string instructions are quick enough for the few bytes
/// moved this way, and cannot be turned back into calls of these functions.
mod memory_functions {
    use core::arch::asm;

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
        // SAFETY: the caller vouches for both areas.
        unsafe {
            asm!("rep movsb", inout("rcx") bytes => _, inout("rdi") to => _, inout("rsi") from => _,
                options(nostack, preserves_flags));
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, value: i32, bytes: usize) -> *mut u8 {
        // SAFETY: the caller vouches for the area.
        unsafe {
            asm!("rep stosb", inout("rcx") bytes => _, inout("rdi") to => _, in("al") value as u8,
                options(nostack, preserves_flags));
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
        for index in 0..bytes {
            // SAFETY: the caller vouches for both areas; volatile, so that this loop stays one.
            let (left, right) =
                unsafe { (left.add(index).read_volatile(), right.add(index).read_volatile()) };
            if left != right {
                return i32::from(left) - i32::from(right);
            }
        }
        0
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
        // SAFETY: as for memcmp.
        unsafe { memcmp(left, right, bytes) }
    }
}
