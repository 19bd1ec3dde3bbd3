//! What a Linux kernel says of itself in memory, for debugging after a crash: the VMCOREINFO note,
//! and through it page tables, the offset of a randomly placed kernel, and the symbol table.

mod btf;
mod kallsyms;
mod modules;
#[cfg(test)]
mod tests;
mod vmcoreinfo;

pub use modules::Module;
pub use vmcoreinfo::VmCoreInfo;

use std::ops::ControlFlow;

use frazil_snapstore::PAGE_SIZE;
use frazil_snapstore::search::{Pattern, SearchProgress, search};

use super::memory::{PhysicalMemory, number};
use super::symbols::Symbols;
use super::{AddressSpace, GuestView, InspectError, OrcFormat, OrcTable, PagingMode, Result};

/// The address that kernels are linked at (`__START_KERNEL_map`).
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// Size of the note's header: lengths of name and contents, type.
const NOTE_HEADER_BYTES: u64 = 12;
const NOTE_NAME: &[u8; 12] = b"VMCOREINFO\0\0";
/// Kernels write at most one page; those of some distributions more.
const NOTE_BYTES_MAX: u64 = 64 << 10;

/// More than any kernel's unwind table takes.
const ORC_BYTES_MAX: u64 = 64 << 20;
/// The most candidates for the note that are examined: a guest's memory may be full of them.
const NOTES_MAX: usize = 256;

/// A Linux kernel found in a guest's memory.
#[derive(Clone, Debug)]
pub struct LinuxKernel {
    /// The contents of its VMCOREINFO note.
    pub info: VmCoreInfo,
    /// Guest physical address of the note.
    pub note_gpa: u64,
    /// The kernel's own address space, whatever vCPUs are running.
    pub space: AddressSpace,
    /// Its offset from the address that it was linked at, in bytes.
    pub offset_bytes: u64,
}

impl LinuxKernel {
    /// Searches the guest's memory for the note. A note that does not agree with the page tables
    /// that it names does not count: it is a copy, or a leftover of an older kernel.
    ///
    /// # Errors
    /// Store errors.
    pub fn find(view: &GuestView, progress: &SearchProgress) -> Result<Option<Self>> {
        let memory = view.memory();
        let region = memory.region();
        let pattern = Pattern::bytes(NOTE_NAME)?;
        let processor = view
            .vcpus()
            .first()
            .map_or_else(|| AddressSpace::new(PagingMode::FourLevel, 0), AddressSpace::of);
        let (mut found, mut notes) = (Ok(None), 0);
        let all = 0..region.pages() * PAGE_SIZE as u64;
        search(region, all, &pattern, 0, progress, &mut |place| {
            found = place
                .offset
                .checked_sub(NOTE_HEADER_BYTES)
                .map_or(Ok(None), |note_gpa| Self::at(memory, note_gpa, &processor));
            notes += 1;
            let goes_on = matches!(found, Ok(None)) && notes < NOTES_MAX;
            if goes_on { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        found
    }

    /// The kernel whose note is at `note_gpa`, if there is one. `processor` has the processor's
    /// features.
    fn at(
        memory: &dyn PhysicalMemory,
        note_gpa: u64,
        processor: &AddressSpace,
    ) -> Result<Option<Self>> {
        let Some(text) = note(memory, note_gpa)? else { return Ok(None) };
        let Some(info) = VmCoreInfo::parse(text) else { return Ok(None) };
        let tables = info.symbol("init_top_pgt").or_else(|| info.symbol("swapper_pg_dir"));
        let (Some(tables), Some(phys_base)) = (tables, info.number("phys_base")) else {
            return Ok(None);
        };
        let root_gpa = tables.wrapping_sub(KERNEL_MAP).wrapping_add(phys_base as u64);
        let five = info.number("pgtable_l5_enabled") == Some(1);
        let mode = if five { PagingMode::FiveLevel } else { PagingMode::FourLevel };
        let space = AddressSpace { mode, root_gpa, has_no_execute: true, ..*processor };
        let agrees = space.translate(memory, tables).is_ok_and(|found| found.gpa == root_gpa);
        let offset_bytes = info.hex("KERNELOFFSET").unwrap_or(0);
        Ok(agrees.then_some(Self { info, note_gpa, space, offset_bytes }))
    }

    /// The kernel's own symbol table; None if the note does not say where it is, or it makes no
    /// sense.
    ///
    /// # Errors
    /// Store errors.
    pub fn symbols(&self, memory: &dyn PhysicalMemory) -> Result<Option<Symbols>> {
        kallsyms::read(self, memory)
    }

    /// The modules that the kernel has loaded, found through the symbol `modules` in `symbols`.
    /// None if the kernel does not describe its structures (CONFIG_DEBUG_INFO_BTF). What makes no
    /// sense is left out.
    ///
    /// # Errors
    /// Store errors.
    pub fn modules(
        &self,
        memory: &dyn PhysicalMemory,
        symbols: &Symbols,
    ) -> Result<Option<Vec<Module>>> {
        modules::read(self, memory, symbols)
    }

    /// The kernel's unwind table, located by `symbols`; None if it cannot be read.
    ///
    /// # Errors
    /// Store errors.
    pub fn orc(&self, memory: &dyn PhysicalMemory, symbols: &Symbols) -> Result<Option<OrcTable>> {
        let read = |part: &str| -> Result<Option<(u64, Vec<u8>)>> {
            let start = symbols.address(&format!("__start_{part}"));
            let end = symbols.address(&format!("__stop_{part}"));
            let (Some(start), Some(end)) = (start, end) else { return Ok(None) };
            let Some(len) = end.checked_sub(start).filter(|len| *len <= ORC_BYTES_MAX) else {
                return Ok(None);
            };
            let mut bytes = vec![0; len as usize];
            match self.space.read(memory, start, &mut bytes) {
                Ok(()) => Ok(Some((start, bytes))),
                Err(InspectError::Store(error)) => Err(error.into()),
                Err(_) => Ok(None),
            }
        };
        let (Some((at, ips)), Some((_, entries))) = (read("orc_unwind_ip")?, read("orc_unwind")?)
        else {
            return Ok(None);
        };
        let Some(version) = self.info.version() else { return Ok(None) };
        Ok(Some(OrcTable::new(&ips, at, &entries, OrcFormat::of_version(version))))
    }
}

/// The contents of the note at `gpa`, if there is one.
fn note(memory: &dyn PhysicalMemory, gpa: u64) -> Result<Option<Vec<u8>>> {
    let mut header = [0; NOTE_HEADER_BYTES as usize];
    if !memory.has(gpa, NOTE_HEADER_BYTES) {
        return Ok(None);
    }
    memory.read(gpa, &mut header)?;
    let [name_len, len, kind] = [0, 4, 8].map(|at| number(&header[at..at + 4]));
    let text_gpa = gpa + NOTE_HEADER_BYTES + NOTE_NAME.len() as u64;
    let fits = (1..=NOTE_BYTES_MAX).contains(&len) && memory.has(text_gpa, len);
    if (name_len, kind) != (NOTE_NAME.len() as u64 - 1, 0) || !fits {
        return Ok(None);
    }
    let mut text = vec![0; len as usize];
    memory.read(text_gpa, &mut text)?;
    Ok(Some(text))
}
