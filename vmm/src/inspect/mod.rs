//! Looking into a snapshot's machine: guest memory by physical and by virtual address, page tables, and
//! what its kernel tells of itself. Nothing here needs KVM, and nothing is changed.
//!
//! A guest may be hostile or broken: its tables may refer to themselves or to nowhere. What is wrong is
//! an error that says where, and no look takes longer than it says.

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
pub use unwind::{By, End, Frame, OrcFormat, OrcTable, Stack};
pub use view::{CodeMode, GuestView};

use frazil_snapstore::StoreError;

use crate::error::VmmError;

/// Why a look into a guest fails.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// An address where the guest has no memory.
    #[error("guest physical {gpa:#x}, {len_bytes} bytes: expected RAM, which is at {ram}")]
    NotRam {
        /// The first guest physical address that was wanted.
        gpa: u64,
        /// How many bytes.
        len_bytes: u64,
        /// Where RAM is.
        ram: String,
    },
    /// An address that this paging mode does not have.
    #[error("virtual address {gva:#x}: expected {expected}, as the vCPU is in {mode}")]
    NoSuchAddress {
        /// The address.
        gva: u64,
        /// What addresses there are.
        expected: String,
        /// The vCPU's paging mode.
        mode: PagingMode,
    },
    /// An address that the guest has not mapped.
    #[error(
        "virtual address {gva:#x} is not mapped: the {level} entry at guest physical {entry_gpa:#x} is {entry:#x}"
    )]
    NotMapped {
        /// The address.
        gva: u64,
        /// The table whose entry ends the walk.
        level: &'static str,
        /// Where the entry is.
        entry_gpa: u64,
        /// The entry.
        entry: u64,
    },
    /// An address that is mapped in a way which the processor does not accept.
    #[error(
        "virtual address {gva:#x} is not mapped: the {level} entry at guest physical {entry_gpa:#x} is {entry:#x}, where {bits:#x} is reserved, so that the processor faults"
    )]
    Reserved {
        /// The address.
        gva: u64,
        /// The table whose entry ends the walk.
        level: &'static str,
        /// Where the entry is.
        entry_gpa: u64,
        /// The entry.
        entry: u64,
        /// What of it should be 0.
        bits: u64,
    },
    /// Page tables that are not where memory is.
    #[error(
        "virtual address {gva:#x}: expected a {level} in RAM, found one at guest physical {table_gpa:#x}; the page tables are damaged, or not in use"
    )]
    NoTable {
        /// The address.
        gva: u64,
        /// Which table.
        level: &'static str,
        /// Where it would be.
        table_gpa: u64,
    },
    /// Page tables that refer to each other without end.
    #[error(
        "page tables: expected at most {TABLES_MAX} of them to be reached, found more: they refer to each other; look at a part of the addresses"
    )]
    TooManyTables,
    /// A part of a kernel's file that cannot be read.
    #[error(
        "section {name}: expected it uncompressed and all there (`objcopy --decompress-debug-sections` helps with the first), found {found}"
    )]
    Section {
        /// The section.
        name: &'static str,
        /// What is there.
        found: String,
    },
    /// A snapshot without a machine.
    #[error(
        "expected a snapshot of a machine, found one of memory or disks alone, as `frazil import` makes them: it has no vCPUs, so there are no virtual addresses, no code and no stacks to look at. --gpa, --search, --regex, and the map of its regions, show what is in it"
    )]
    NoMachine,
    /// A vCPU that the machine does not have.
    #[error("vCPU {index}: expected one of the machine's {cpus}, 0 to {last}", last = cpus.saturating_sub(1))]
    NoSuchVcpu {
        /// The one that was wanted.
        index: usize,
        /// How many there are.
        cpus: usize,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The machine's state does not fit.
    #[error(transparent)]
    Machine(#[from] VmmError),
}

/// The result of a look.
pub type Result<T, E = InspectError> = std::result::Result<T, E>;
