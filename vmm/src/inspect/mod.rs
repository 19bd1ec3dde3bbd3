//! Inspects a snapshot's machine: guest memory by physical and by virtual address, page tables, and
//! what its kernel says of itself. Nothing here needs KVM, and nothing is changed.
//!
//! A guest may be hostile or broken: its tables may refer to themselves or to nowhere. Such damage
//! is reported with its location, and the work done on a guest's tables has fixed limits.

mod core_file;
mod kernel_file;
mod linux;
pub mod memory;
mod notes;
mod qemu_note;
mod space;
mod symbols;
mod tables;
mod unwind;
mod view;

#[cfg(test)]
mod tests;

pub use core_file::{CoreError, CoreReport, write_core};
pub use kernel_file::{KernelBytes, KernelFile};
pub use linux::{LinuxKernel, Module, VmCoreInfo};
pub use memory::{PhysicalMemory, SnapshotMemory};
pub use space::{AddressSpace, Caching, PagingMode, Step, Translation};
pub use symbols::{Symbol, Symbols};
pub use tables::{Access, BadEntry, Found, Joining, MappedRange, TABLES_MAX, TablesReport};
pub use unwind::{End, Frame, OrcFormat, OrcTable, Stack, UnwindMethod};
pub use view::{CodeMode, GuestView};

use frazil_snapstore::StoreError;

use crate::error::VmmError;

/// Why inspecting a guest failed.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// A guest physical address where the guest has no RAM.
    #[error("guest physical {gpa:#x}, {len_bytes} bytes: expected RAM, which is at {ram}")]
    NotRam {
        /// The first address that was to be read.
        gpa: u64,
        /// Number of bytes that were to be read.
        len_bytes: u64,
        /// Where RAM is.
        ram: String,
    },
    /// A virtual address that does not exist in the vCPU's paging mode.
    #[error("virtual address {gva:#x}: expected {expected}, as the vCPU uses {mode}")]
    NoSuchAddress {
        /// The address.
        gva: u64,
        /// Which addresses exist.
        expected: String,
        /// The vCPU's paging mode.
        mode: PagingMode,
    },
    /// A virtual address that the guest has not mapped.
    #[error(
        "virtual address {gva:#x} is not mapped: the {level} entry at guest physical {entry_gpa:#x} is {entry:#x}"
    )]
    NotMapped {
        /// The address.
        gva: u64,
        /// The kind of table whose entry ends the walk.
        level: &'static str,
        /// The guest physical address of the entry.
        entry_gpa: u64,
        /// The entry.
        entry: u64,
    },
    /// A virtual address whose mapping has reserved bits set.
    #[error(
        "virtual address {gva:#x} is not mapped: the {level} entry at guest physical {entry_gpa:#x} is {entry:#x}, whose reserved bits {bits:#x} make the processor fault"
    )]
    Reserved {
        /// The address.
        gva: u64,
        /// The kind of table whose entry ends the walk.
        level: &'static str,
        /// The guest physical address of the entry.
        entry_gpa: u64,
        /// The entry.
        entry: u64,
        /// Those of its bits that should be 0.
        bits: u64,
    },
    /// A page table outside RAM.
    #[error(
        "virtual address {gva:#x}: expected a {level} in RAM, found one at guest physical {table_gpa:#x}; the page tables are damaged, or not in use"
    )]
    NoTable {
        /// The address.
        gva: u64,
        /// The kind of table.
        level: &'static str,
        /// The guest physical address where it should be.
        table_gpa: u64,
    },
    /// More page tables than [`TABLES_MAX`], as when they refer to each other.
    #[error(
        "page tables: expected at most {TABLES_MAX}, found more: they refer to each other; look at a smaller range of addresses"
    )]
    TooManyTables,
    /// A section of a kernel's file that cannot be read.
    #[error(
        "section {name}: expected it uncompressed and complete (`objcopy --decompress-debug-sections` decompresses it), found {found}"
    )]
    Section {
        /// The section's name.
        name: &'static str,
        /// What was found.
        found: String,
    },
    /// A snapshot without a machine.
    #[error(
        "expected a snapshot of a machine, found one of memory or disks alone, as `frazil import` makes them: without vCPUs there are no virtual addresses, code or stacks to look at. --gpa, --search, --regex and the map of its regions show what is in it"
    )]
    NoMachine,
    /// A vCPU that the machine does not have.
    #[error("vCPU {index}: expected one of the machine's {cpus}, 0 to {last}", last = cpus.saturating_sub(1))]
    NoSuchVcpu {
        /// The index that was asked for.
        index: usize,
        /// How many vCPUs there are.
        cpus: usize,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The machine's saved state cannot be read.
    #[error(transparent)]
    Machine(#[from] VmmError),
}

/// The result of inspecting a guest.
pub type Result<T, E = InspectError> = std::result::Result<T, E>;
