//! Virtual addresses: the walk that the processor makes through the guest's page tables (Intel SDM
//! vol. 3, chapter 4; AMD APM vol. 2, chapter 5).

use std::fmt;

use super::memory::{PhysicalMemory, number};
use super::{InspectError, Result};
use crate::vcpu::saved::SavedSregs;

const CR0_PAGING: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;

/// Bits of entries, alike in all modes.
pub(super) const PRESENT: u64 = 1;
pub(super) const WRITABLE: u64 = 1 << 1;
pub(super) const USER: u64 = 1 << 2;
pub(super) const WRITE_THROUGH: u64 = 1 << 3;
pub(super) const UNCACHED: u64 = 1 << 4;
/// In an entry above the last level: it maps a page of that level's size.
const LARGE: u64 = 1 << 7;
pub(super) const GLOBAL: u64 = 1 << 8;
pub(super) const NO_EXECUTE: u64 = 1 << 63;
/// The address in an entry of 8 bytes. Bits beyond what the processor has are reserved; a guest that
/// sets them points outside RAM.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// How a vCPU turns virtual addresses into physical ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PagingMode {
    /// Not at all: they are the same.
    Off,
    /// Two levels of 4-byte entries.
    Bits32 {
        /// Entries of the directory may map pages of 4 MiB.
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
    /// The lowest bit of an address that it looks at.
    pub shift: u32,
    /// How many bits it looks at.
    pub bits: u32,
    /// Its entries can map pages.
    pub maps_pages: bool,
    /// Its entries say what may be done.
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

/// The virtual addresses of a vCPU, or of whoever has such page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressSpace {
    /// How addresses are turned.
    pub mode: PagingMode,
    /// Guest physical address of the first table; nothing without paging.
    pub root_gpa: u64,
    /// Entries can forbid execution.
    pub has_no_execute: bool,
}

/// One entry on the way to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The table's name.
    pub level: &'static str,
    /// Guest physical address of the entry.
    pub entry_gpa: u64,
    /// The entry.
    pub entry: u64,
}

/// Where a virtual address leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The guest physical address. There need not be RAM.
    pub gpa: u64,
    /// Size of the page it is in, in bytes.
    pub page_bytes: u64,
    /// It may be written (by the kernel, if it honours write protection).
    pub writable: bool,
    /// User mode may access it.
    pub user: bool,
    /// It may be executed.
    pub executable: bool,
    /// The entries on the way, from the first table on.
    pub steps: Vec<Step>,
}

/// What an entry says.
pub(super) enum Entry {
    /// Nothing is there.
    Absent,
    /// The next table is at this guest physical address.
    Table(u64),
    /// A page begins at this guest physical address.
    Page(u64),
}

impl AddressSpace {
    /// The one that a vCPU with these registers is in.
    #[must_use]
    pub fn of(sregs: &SavedSregs) -> Self {
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
        Self { mode, root_gpa, has_no_execute }
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

    /// Bits that an address has; in long mode, those above repeat the highest.
    pub(super) fn address_bits(&self) -> u32 {
        match self.mode {
            PagingMode::Off => 64,
            PagingMode::Bits32 { .. } | PagingMode::Pae => 32,
            PagingMode::FourLevel => 48,
            PagingMode::FiveLevel => 57,
        }
    }

    fn is_long(&self) -> bool {
        matches!(self.mode, PagingMode::FourLevel | PagingMode::FiveLevel)
    }

    /// `address` with the bits that it has, as the processor writes it.
    pub(super) fn canonical(&self, address: u64) -> u64 {
        let unused = 64 - self.address_bits();
        if self.is_long() {
            ((address << unused) as i64 >> unused) as u64
        } else {
            address << unused >> unused
        }
    }

    /// # Errors
    /// [`InspectError::NoSuchAddress`] if no such address can be in this mode.
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
        let address = if self.entry_bytes() == 4 { entry & 0xffff_f000 } else { entry & ADDRESS };
        if is_last {
            return Entry::Page(address);
        }
        if !level.maps_pages || entry & LARGE == 0 {
            return Entry::Table(address);
        }
        if self.entry_bytes() == 4 {
            // PSE-36: bits 32 to 39 of the address are in bits 13 to 20.
            return Entry::Page(entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32);
        }
        Entry::Page(address & !((1 << level.shift) - 1))
    }

    /// Where `gva` leads.
    ///
    /// # Errors
    /// [`InspectError::NotMapped`] if nowhere; [`InspectError::NoSuchAddress`],
    /// [`InspectError::NoTable`]; those of the memory.
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

    /// Copies the `out.len()` bytes from virtual address `gva` on.
    ///
    /// # Errors
    /// As [`Self::translate`], of the first page that cannot be read.
    pub fn read(&self, memory: &dyn PhysicalMemory, gva: u64, out: &mut [u8]) -> Result<()> {
        let (mut at, mut rest) = (gva, out);
        while !rest.is_empty() {
            let found = self.translate(memory, at)?;
            let left = found.page_bytes - (found.gpa & (found.page_bytes - 1));
            let (part, more) = rest.split_at_mut(left.min(rest.len() as u64) as usize);
            memory.read(found.gpa, part)?;
            at = at.wrapping_add(part.len() as u64);
            rest = more;
        }
        Ok(())
    }
}
