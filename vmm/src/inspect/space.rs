//! Virtual address spaces: walks the guest's page tables as the processor does (Intel SDM vol. 3,
//! chapter 4; AMD APM vol. 2, chapter 5).

use std::fmt;

use super::memory::{PhysicalMemory, number};
use super::{InspectError, Result};
use crate::vcpu::saved::SavedVcpu;

const CR0_PAGING: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;

/// Bits of entries, the same in all modes.
pub(super) const PRESENT: u64 = 1;
pub(super) const WRITABLE: u64 = 1 << 1;
pub(super) const USER: u64 = 1 << 2;
pub(super) const WRITE_THROUGH: u64 = 1 << 3;
pub(super) const UNCACHED: u64 = 1 << 4;
/// In an entry above the last level: the entry maps a page of that level's size.
const LARGE: u64 = 1 << 7;
pub(super) const GLOBAL: u64 = 1 << 8;
pub(super) const NO_EXECUTE: u64 = 1 << 63;
/// The bits of an 8-byte entry that hold an address.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// The third of the three caching bits of an entry that maps a page: in the last level, and above.
const PAT_LAST: u64 = LARGE;
const PAT_LARGE: u64 = 1 << 12;

/// The CPUID leaf with the width of physical addresses, and the width if there is no such leaf.
const CPUID_ADDRESSES: u32 = 0x8000_0008;
const PHYSICAL_BITS: u32 = 36;
/// The largest width that the architecture allows.
const PHYSICAL_BITS_MAX: u32 = 52;
/// The MSR with the page attribute table, and its value after a reset.
const MSR_IA32_PAT: u64 = 0x277;
const PAT_AT_RESET: u64 = 0x0007_0406_0007_0406;

/// How a vCPU translates virtual addresses into physical ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PagingMode {
    /// Not at all: both are the same.
    Off,
    /// Two levels of 4-byte entries.
    Bits32 {
        /// Whether entries of the directory may map pages of 4 MiB.
        large_pages: bool,
    },
    /// Three levels of 8-byte entries.
    Pae,
    /// Long mode, four levels.
    FourLevel,
    /// Long mode, five levels.
    FiveLevel,
}

impl fmt::Display for PagingMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "no paging mode (paging is off)",
            Self::Bits32 { .. } => "32-bit paging",
            Self::Pae => "PAE paging",
            Self::FourLevel => "4-level paging",
            Self::FiveLevel => "5-level paging",
        })
    }
}

/// One level of tables.
#[derive(Clone, Copy, Debug)]
pub(super) struct Level {
    /// The table's name in the manuals.
    pub name: &'static str,
    /// The lowest address bit of the table's index.
    pub shift: u32,
    /// The number of address bits in the table's index.
    pub bits: u32,
    /// Whether its entries can map pages.
    pub maps_pages: bool,
    /// Whether its entries hold access rights.
    pub has_rights: bool,
}

const fn level(name: &'static str, shift: u32, maps_pages: bool) -> Level {
    Level { name, shift, bits: 9, maps_pages, has_rights: true }
}

const LONG: [Level; 5] = [
    level("PML5", 48, false),
    level("PML4", 39, false),
    level("page directory pointer table", 30, true),
    level("page directory", 21, true),
    level("page table", 12, true),
];
const PAE: [Level; 3] = [
    Level { bits: 2, has_rights: false, ..level("page directory pointer table", 30, false) },
    level("page directory", 21, true),
    level("page table", 12, true),
];
const BITS_32: [Level; 2] = [
    Level { bits: 10, ..level("page directory", 22, false) },
    Level { bits: 10, ..level("page table", 12, true) },
];
const BITS_32_LARGE: [Level; 2] = [Level { maps_pages: true, ..BITS_32[0] }, BITS_32[1]];

/// A virtual address space: that of a vCPU, or of anything else with page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressSpace {
    /// How addresses are translated.
    pub mode: PagingMode,
    /// Guest physical address of the root table; unused without paging.
    pub root_gpa: u64,
    /// Whether entries can forbid execution.
    pub has_no_execute: bool,
    /// The processor's width of physical addresses, in bits; entries' bits above it are reserved.
    pub physical_bits: u32,
    /// The processor's page attribute table: eight caching modes, one byte each.
    pub pat: u64,
}

/// How a page is cached, according to its entry and the page attribute table. Memory type range
/// registers are not taken into account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caching {
    /// Normal caching.
    WriteBack,
    /// Reads are cached; writes go to memory too.
    WriteThrough,
    /// Reads are cached; writes go to memory, and caches drop what they hold of it.
    WriteProtected,
    /// Uncached, but writes may be combined.
    WriteCombining,
    /// Uncached, unless range registers say write-combining.
    UncachedMinus,
    /// Uncached.
    Uncached,
}

/// One entry on the walk to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The table's name.
    pub level: &'static str,
    /// Guest physical address of the entry.
    pub entry_gpa: u64,
    /// The entry.
    pub entry: u64,
}

/// The translation of a virtual address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The guest physical address, which is not necessarily in RAM.
    pub gpa: u64,
    /// Size of the page it is in, in bytes.
    pub page_bytes: u64,
    /// Whether the page may be written (by the kernel too, if it honours write protection).
    pub writable: bool,
    /// Whether user mode may access the page.
    pub user: bool,
    /// Whether the page may be executed.
    pub executable: bool,
    /// The entries on the walk, from the root table on.
    pub steps: Vec<Step>,
}

/// A decoded entry.
pub(super) enum Entry {
    /// Nothing is mapped.
    Absent,
    /// The next table is at this guest physical address.
    Table(u64),
    /// A page begins at this guest physical address.
    Page(u64),
    /// These bits are set but reserved: the processor faults.
    Reserved(u64),
}

impl AddressSpace {
    /// The space of a processor with all features, in its state after a reset.
    #[must_use]
    pub fn new(mode: PagingMode, root_gpa: u64) -> Self {
        let (physical_bits, pat) = (PHYSICAL_BITS_MAX, PAT_AT_RESET);
        Self { mode, root_gpa, has_no_execute: true, physical_bits, pat }
    }

    /// The space that `vcpu` is in.
    #[must_use]
    pub fn of(vcpu: &SavedVcpu) -> Self {
        let SavedVcpu { sregs, cpuid, msrs, .. } = vcpu;
        let (cr0, cr3) = (u64::from(sregs.cr0), u64::from(sregs.cr3));
        let (cr4, efer) = (u64::from(sregs.cr4), u64::from(sregs.efer));
        let mode = if cr0 & CR0_PAGING == 0 {
            PagingMode::Off
        } else if cr4 & CR4_PAE == 0 {
            PagingMode::Bits32 { large_pages: cr4 & CR4_PSE != 0 }
        } else if efer & EFER_LMA == 0 {
            PagingMode::Pae
        } else if cr4 & CR4_LA57 == 0 {
            PagingMode::FourLevel
        } else {
            PagingMode::FiveLevel
        };
        let root_gpa = match mode {
            PagingMode::Off => 0,
            PagingMode::Bits32 { .. } => cr3 & 0xffff_f000,
            PagingMode::Pae => cr3 & 0xffff_ffe0,
            PagingMode::FourLevel | PagingMode::FiveLevel => cr3 & ADDRESS,
        };
        let has_no_execute = efer & EFER_NXE != 0 && !matches!(mode, PagingMode::Bits32 { .. });
        let leaf = cpuid.iter().find(|leaf| leaf.function == CPUID_ADDRESSES);
        let physical_bits = leaf.map_or(PHYSICAL_BITS, |leaf| leaf.eax & 0xff);
        let msr = msrs.iter().find(|msr| u64::from(msr.index) == MSR_IA32_PAT);
        let pat = msr.map_or(PAT_AT_RESET, |msr| msr.value.into());
        let physical_bits = physical_bits.clamp(32, PHYSICAL_BITS_MAX);
        Self { mode, root_gpa, has_no_execute, physical_bits, pat }
    }

    pub(super) fn levels(&self) -> &'static [Level] {
        match self.mode {
            PagingMode::Off => &[],
            PagingMode::Bits32 { large_pages: false } => &BITS_32,
            PagingMode::Bits32 { large_pages: true } => &BITS_32_LARGE,
            PagingMode::Pae => &PAE,
            PagingMode::FourLevel => &LONG[1..],
            PagingMode::FiveLevel => &LONG,
        }
    }

    pub(super) fn entry_bytes(&self) -> usize {
        if matches!(self.mode, PagingMode::Bits32 { .. }) { 4 } else { 8 }
    }

    /// The width of virtual addresses, in bits; in long mode, the bits above repeat the highest.
    pub(super) fn address_bits(&self) -> u32 {
        match self.mode {
            // Without paging there is no long mode.
            PagingMode::Off | PagingMode::Bits32 { .. } | PagingMode::Pae => 32,
            PagingMode::FourLevel => 48,
            PagingMode::FiveLevel => 57,
        }
    }

    fn is_long(&self) -> bool {
        matches!(self.mode, PagingMode::FourLevel | PagingMode::FiveLevel)
    }

    /// The canonical form of `address`, whose bits above the width of addresses are ignored.
    pub(super) fn canonical(&self, address: u64) -> u64 {
        let unused = 64 - self.address_bits();
        if self.is_long() {
            ((address << unused) as i64 >> unused) as u64
        } else {
            address << unused >> unused
        }
    }

    /// Checks that `gva` is an address of this mode.
    ///
    /// # Errors
    /// [`InspectError::NoSuchAddress`] if it is not.
    pub(super) fn check(&self, gva: u64) -> Result<()> {
        if self.canonical(gva) == gva {
            return Ok(());
        }
        let bits = self.address_bits();
        let expected = if self.is_long() {
            format!("a canonical address of {bits} bits")
        } else {
            format!("one below {:#x}", 1_u64 << bits)
        };
        Err(InspectError::NoSuchAddress { gva, expected, mode: self.mode })
    }

    pub(super) fn decode(&self, level: &Level, is_last: bool, entry: u64) -> Entry {
        if entry & PRESENT == 0 {
            return Entry::Absent;
        }
        let is_large = !is_last && level.maps_pages && entry & LARGE != 0;
        let reserved = entry & self.reserved(level, is_last, is_large);
        if reserved != 0 {
            return Entry::Reserved(reserved);
        }
        let address = if self.entry_bytes() == 4 { entry & 0xffff_f000 } else { entry & ADDRESS };
        if is_last {
            return Entry::Page(address);
        }
        if !is_large {
            return Entry::Table(address);
        }
        if self.entry_bytes() == 4 {
            // PSE-36: bits 32 to 39 of the address are in bits 13 to 20.
            return Entry::Page(entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32);
        }
        Entry::Page(address & !((1 << level.shift) - 1))
    }

    /// The bits that must be 0 in a present entry of `level`.
    fn reserved(&self, level: &Level, is_last: bool, is_large: bool) -> u64 {
        let bits = |bits: std::ops::Range<u32>| {
            (bits.start..bits.end).fold(0_u64, |mask, bit| mask | 1 << bit)
        };
        if self.entry_bytes() == 4 {
            // PSE-36 again: address bits beyond the processor's width, and bit 21, which is unused.
            let missing = 13 + self.physical_bits.min(40) - 32..22;
            return if is_large { bits(missing) } else { 0 };
        }
        let mut reserved = bits(self.physical_bits..52);
        if !self.has_no_execute {
            reserved |= NO_EXECUTE;
        }
        match self.mode {
            // PAE's four root entries have neither rights nor the other flags.
            PagingMode::Pae if !level.has_rights => {
                reserved |= bits(1..3) | bits(5..9) | bits(52..64);
            }
            PagingMode::Pae => reserved |= bits(52..63),
            _ if !level.maps_pages => reserved |= LARGE,
            _ => {}
        }
        if is_large && !is_last {
            reserved |= bits(13..level.shift);
        }
        reserved
    }

    /// How the page that `entry` maps is cached.
    pub(super) fn caching(&self, is_last: bool, entry: u64) -> Caching {
        let third = entry & if is_last { PAT_LAST } else { PAT_LARGE } != 0;
        let [first, second] = [WRITE_THROUGH, UNCACHED].map(|bit| u64::from(entry & bit != 0));
        let index = u64::from(third) << 2 | second << 1 | first;
        match self.pat >> (index * 8) & 7 {
            1 => Caching::WriteCombining,
            4 => Caching::WriteThrough,
            5 => Caching::WriteProtected,
            6 => Caching::WriteBack,
            7 => Caching::UncachedMinus,
            _ => Caching::Uncached,
        }
    }

    /// Translates `gva`.
    ///
    /// # Errors
    /// [`InspectError::NotMapped`] or [`InspectError::Reserved`] if it is not mapped;
    /// [`InspectError::NoSuchAddress`], [`InspectError::NoTable`]; errors of `memory`.
    pub fn translate(&self, memory: &dyn PhysicalMemory, gva: u64) -> Result<Translation> {
        self.check(gva)?;
        let mut found = Translation {
            gpa: gva,
            page_bytes: 4096,
            writable: true,
            user: true,
            executable: true,
            steps: Vec::new(),
        };
        let (levels, bytes) = (self.levels(), self.entry_bytes());
        let mut table_gpa = self.root_gpa;
        for (depth, level) in levels.iter().enumerate() {
            let index = gva >> level.shift & ((1 << level.bits) - 1);
            let entry_gpa = table_gpa + index * bytes as u64;
            if !memory.has(entry_gpa, bytes as u64) {
                return Err(InspectError::NoTable { gva, level: level.name, table_gpa });
            }
            let mut entry = [0; 8];
            memory.read(entry_gpa, &mut entry[..bytes])?;
            let entry = number(&entry);
            found.steps.push(Step { level: level.name, entry_gpa, entry });
            if level.has_rights {
                found.writable &= entry & WRITABLE != 0;
                found.user &= entry & USER != 0;
                found.executable &= !self.has_no_execute || entry & NO_EXECUTE == 0;
            }
            match self.decode(level, depth + 1 == levels.len(), entry) {
                Entry::Absent => {
                    return Err(InspectError::NotMapped {
                        gva,
                        level: level.name,
                        entry_gpa,
                        entry,
                    });
                }
                Entry::Reserved(bits) => {
                    let level = level.name;
                    return Err(InspectError::Reserved { gva, level, entry_gpa, entry, bits });
                }
                Entry::Table(next) => table_gpa = next,
                Entry::Page(page_gpa) => {
                    found.page_bytes = 1 << level.shift;
                    found.gpa = page_gpa | gva & (found.page_bytes - 1);
                    return Ok(found);
                }
            }
        }
        Ok(found)
    }

    /// Reads the `out.len()` bytes from virtual address `gva` on.
    ///
    /// # Errors
    /// As [`Self::translate`], for the first page that cannot be read.
    pub fn read(&self, memory: &dyn PhysicalMemory, gva: u64, out: &mut [u8]) -> Result<()> {
        let (mut at, mut rest) = (gva, out);
        while !rest.is_empty() {
            let found = self.translate(memory, at)?;
            let left = found.page_bytes - (found.gpa & (found.page_bytes - 1));
            let (part, more) = rest.split_at_mut(left.min(rest.len() as u64) as usize);
            memory.read(found.gpa, part)?;
            rest = more;
            match at.checked_add(part.len() as u64) {
                Some(next) => at = next,
                // Nothing follows the last address.
                None if rest.is_empty() => {}
                None => {
                    let expected = format!("{} bytes more before the last address", rest.len());
                    return Err(InspectError::NoSuchAddress { gva, expected, mode: self.mode });
                }
            }
        }
        Ok(())
    }

    /// The highest address of this mode.
    #[must_use]
    pub fn last(&self) -> u64 {
        if self.is_long() { u64::MAX } else { (1 << self.address_bits()) - 1 }
    }

    /// Checks that this mode has at least one of `addresses`.
    ///
    /// # Errors
    /// [`InspectError::NoSuchAddress`] if it has none.
    pub fn check_some(&self, addresses: &std::ops::RangeInclusive<u64>) -> Result<()> {
        // The invalid addresses are contiguous: if both ends are invalid, all between them are.
        self.check(*addresses.start())
            .or_else(|wrong| self.check(*addresses.end()).map_err(|_| wrong))
    }
}
