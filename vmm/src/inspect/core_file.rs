//! Writes a machine as an ELF core file for debuggers: gdb, crash, drgn.
//!
//! | part | contents |
//! |---|---|
//! | notes | NT_PRSTATUS, NT_FPREGSET, NT_X86_XSTATE and QEMU's note for each vCPU; VMCOREINFO |
//! | first PT_LOADs | RAM by physical address, each range once, at its place in the direct map |
//! | other PT_LOADs | what else is mapped: the kernel's text, modules, stacks; running programs |
//!
//! VMCOREINFO is a Linux guest's, as in /proc/vmcore. The direct map is the kernel's map of all
//! memory; without one the RAM ranges come last, with virtual address 0, as in QEMU's files. The
//! other PT_LOADs refer to the same bytes of the file, which is sparse.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;

use frazil_snapstore::search::SearchProgress;
use frazil_snapstore::{ExportError, ExportProgress, PAGE_SIZE, export_at};

use super::linux::LinuxKernel;
use super::notes;
use super::{
    AddressSpace, Found, GuestView, InspectError, Joining, MappedRange, PagingMode, TABLES_MAX,
};
use crate::memory::RamRange;

/// Size of an ELF64 header.
const HEADER_BYTES: u64 = 64;
/// Size of an ELF64 program header.
const PROGRAM_HEADER_BYTES: u64 = 56;
/// About the most PT_LOADs: more than 65,534 would need the extended count, which not all readers
/// know.
const LOADS_MAX: usize = 60_000;
/// A direct map covers at least the size of RAM divided by this.
const DIRECT_MAP_DIVISOR: u64 = 2;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const ET_CORE: u16 = 4;
const EM_X86_64: u16 = 62;
/// Readable, writable, executable: a debugger's rights, not the guest's.
const FLAGS: u32 = 7;

/// Why a core file could not be written.
#[derive(Debug, thiserror::Error)]
pub enum CoreError {
    /// The machine cannot be read.
    #[error(transparent)]
    Inspect(#[from] InspectError),
    /// Memory cannot be read, or cannot be written to the file.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// The headers or notes cannot be written.
    #[error("cannot write the file: {0}")]
    File(#[source] std::io::Error),
}

/// A report on a core file.
#[derive(Clone, Debug)]
pub struct CoreReport {
    /// Length of the file in bytes, holes included.
    pub file_bytes: u64,
    /// Number of PT_LOADs: ranges of RAM, and of virtual addresses.
    pub loads: usize,
    /// Whether everything mapped is there by its virtual address. If not, there was too much of it;
    /// debuggers that read page tables themselves (crash, drgn) do not need it.
    pub all_mapped: bool,
    /// The Linux kernel, if one was found.
    pub kernel: Option<LinuxKernel>,
    /// The virtual address of guest physical 0 in the kernel's direct map, if there is one.
    pub direct_map: Option<u64>,
}

/// A PT_LOAD: virtual addresses and the memory that they map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Load {
    gva: u64,
    gpa: u64,
    len_bytes: u64,
}

/// Writes the machine of `view` to `file`, which must be empty.
///
/// # Errors
/// [`CoreError`]; the file's contents are then unusable.
pub fn write_core(
    view: &GuestView,
    file: &File,
    searching: &SearchProgress,
    writing: &ExportProgress,
) -> Result<CoreReport, CoreError> {
    let kernel = LinuxKernel::find(view, searching)?;
    let spaces = spaces(view, kernel.as_ref());
    let ranges = view.memory().ranges();
    let (mapped, all_mapped) = mapped(view, &spaces)?;
    let direct_map = direct_map(&mapped, ranges, view, kernel.as_ref());
    let loads = layout(ranges, &mapped, direct_map);
    let notes = notes::all(view, kernel.as_ref());
    let notes_at = HEADER_BYTES + (loads.len() as u64 + 1) * PROGRAM_HEADER_BYTES;
    let data_at = (notes_at + notes.len() as u64).next_multiple_of(PAGE_SIZE as u64);
    let file_bytes = data_at + ranges.iter().map(|range| range.len_bytes).sum::<u64>();
    file.set_len(file_bytes).map_err(CoreError::File)?;
    let mut head = header(loads.len() as u16 + 1);
    program_header(
        &mut head,
        PT_NOTE,
        notes_at,
        &Load { gva: 0, gpa: 0, len_bytes: notes.len() as u64 },
    );
    for load in &loads {
        program_header(&mut head, PT_LOAD, data_at + place(ranges, load.gpa), load);
    }
    head.extend_from_slice(&notes);
    file.write_all_at(&head, 0).map_err(CoreError::File)?;
    for range in ranges {
        let first = range.gpa / PAGE_SIZE as u64;
        let pages = first..first + range.len_bytes / PAGE_SIZE as u64;
        export_at(
            view.memory().region(),
            pages,
            file,
            data_at + place(ranges, range.gpa),
            writing,
        )?;
    }
    Ok(CoreReport { file_bytes, loads: loads.len(), all_mapped, kernel, direct_map })
}

/// The address spaces in the file: the kernel's, then each vCPU's. The first that maps an address
/// counts.
fn spaces(view: &GuestView, kernel: Option<&LinuxKernel>) -> Vec<AddressSpace> {
    let vcpus = view.vcpus().iter().map(AddressSpace::of);
    let mut all: Vec<AddressSpace> = Vec::new();
    for space in kernel.map(|kernel| kernel.space).into_iter().chain(vcpus) {
        if !all.contains(&space) {
            all.push(space);
        }
    }
    all
}

/// The ranges that are mapped to RAM, by virtual address.
type Mapped = BTreeMap<u64, Load>;

/// The ranges that `spaces` map to RAM, and whether these are all.
fn mapped(view: &GuestView, spaces: &[AddressSpace]) -> Result<(Mapped, bool), InspectError> {
    let ranges = view.memory().ranges();
    let (mut all, mut tables, mut again) = (Mapped::new(), 0, false);
    for space in spaces.iter().filter(|space| space.mode != PagingMode::Off) {
        let looked = space.mapped(view.memory(), 0..=u64::MAX, Joining::Contiguous, &mut |found| {
            if let Found::Range(MappedRange { gva, len_bytes, gpa: Some(gpa), .. }) = found {
                in_ram(ranges, Load { gva, gpa, len_bytes }).for_each(|part| add(&mut all, part));
            }
            // For example a shadow area, where the same page is mapped all over terabytes.
            again |= matches!(found, Found::Repeated { .. });
            if all.len() < LOADS_MAX { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        match looked {
            Ok(report) => tables += report.tables,
            // One vCPU's damaged tables do not affect the others.
            Err(InspectError::NoTable { .. }) => {}
            Err(InspectError::TooManyTables) => tables = TABLES_MAX,
            Err(error) => return Err(error),
        }
        // The limits are for all vCPUs together: there may be hundreds.
        if all.len() >= LOADS_MAX || tables >= TABLES_MAX {
            return Ok((all, false));
        }
    }
    Ok((all, !again))
}

/// The parts of `load` that are RAM.
fn in_ram(ranges: &[RamRange], load: Load) -> impl Iterator<Item = Load> + '_ {
    ranges.iter().filter_map(move |range| {
        let first = load.gpa.max(range.gpa);
        let end = load.gpa.saturating_add(load.len_bytes).min(range.gpa + range.len_bytes);
        let gva = load.gva.wrapping_add(first.wrapping_sub(load.gpa));
        (first < end).then(|| Load { gva, gpa: first, len_bytes: end - first })
    })
}

/// Adds the parts of `load` that are not mapped yet, joining each to the range that it continues.
fn add(all: &mut Mapped, load: Load) {
    let last_of = |load: &Load| load.gva + (load.len_bytes - 1);
    let (mut gva, last) = (load.gva, last_of(&load));
    while gva <= last {
        let before = all.range(..=gva).next_back().map(|(_, load)| *load);
        if let Some(before) = before.filter(|before| last_of(before) >= gva) {
            // Already mapped.
            let Some(next) = last_of(&before).checked_add(1) else { return };
            gva = next;
            continue;
        }
        let end = all.range(gva..=last).next().map_or(last, |(next, _)| next - 1);
        let gpa = load.gpa + (gva - load.gva);
        let part = Load { gva, gpa, len_bytes: end - gva + 1 };
        let goes_on = |before: &Load| {
            before.gva + before.len_bytes == gva && before.gpa + before.len_bytes == gpa
        };
        let joined = before
            .filter(goes_on)
            .map_or(part, |before| Load { len_bytes: before.len_bytes + part.len_bytes, ..before });
        all.insert(joined.gva, joined);
        let Some(next) = end.checked_add(1) else { return };
        gva = next;
    }
}

/// The virtual address of guest physical 0 in the kernel's direct map: the offset from physical to
/// virtual addresses by which most of RAM is mapped. With a Linux kernel only mappings in the
/// kernel's half, at offsets that are multiples of 1 GiB, count.
fn direct_map(
    mapped: &Mapped,
    ranges: &[RamRange],
    view: &GuestView,
    kernel: Option<&LinuxKernel>,
) -> Option<u64> {
    let off = |vcpu| AddressSpace::of(vcpu).mode == PagingMode::Off;
    if kernel.is_none() && view.vcpus().first().is_some_and(off) {
        return Some(0);
    }
    let mut bytes_by_offset: BTreeMap<u64, u64> = BTreeMap::new();
    for load in mapped.values() {
        let offset = load.gva.wrapping_sub(load.gpa);
        let kernel_half = load.gva >> 63 == 1;
        if kernel.is_none() || (kernel_half && offset.is_multiple_of(1 << 30)) {
            *bytes_by_offset.entry(offset).or_default() += load.len_bytes;
        }
    }
    let ram_bytes: u64 = ranges.iter().map(|range| range.len_bytes).sum();
    let (offset, bytes) = bytes_by_offset.into_iter().max_by_key(|(_, bytes)| *bytes)?;
    (bytes >= ram_bytes / DIRECT_MAP_DIVISOR).then_some(offset)
}

/// The PT_LOADs, in order.
fn layout(ranges: &[RamRange], mapped: &Mapped, direct_map: Option<u64>) -> Vec<Load> {
    let ram = ranges.iter().map(|range| Load {
        gva: direct_map.map_or(0, |base| base.wrapping_add(range.gpa)),
        gpa: range.gpa,
        len_bytes: range.len_bytes,
    });
    let is_direct = |load: &Load| Some(load.gva.wrapping_sub(load.gpa)) == direct_map;
    // The last range may have come in pieces.
    let others = mapped.values().copied().filter(|load| !is_direct(load)).take(LOADS_MAX);
    match direct_map {
        Some(_) => ram.chain(others).collect(),
        None => others.chain(ram).collect(),
    }
}

/// The offset of guest physical address `gpa` from the start of memory in the file.
fn place(ranges: &[RamRange], gpa: u64) -> u64 {
    let before = ranges.iter().map(|range| gpa.saturating_sub(range.gpa).min(range.len_bytes));
    before.sum()
}

/// The header of a core file that has `program_headers` program headers after it.
fn header(program_headers: u16) -> Vec<u8> {
    // Magic, 64 bits, little-endian, version 1, System V.
    let mut out = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    [ET_CORE, EM_X86_64].iter().for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
    out.extend_from_slice(&1_u32.to_le_bytes());
    // No entry point; program headers; no section headers.
    [0, HEADER_BYTES, 0].iter().for_each(|word: &u64| out.extend_from_slice(&word.to_le_bytes()));
    out.extend_from_slice(&0_u32.to_le_bytes());
    let sizes = [HEADER_BYTES as u16, PROGRAM_HEADER_BYTES as u16, program_headers, 0, 0, 0];
    sizes.iter().for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
    out
}

fn program_header(out: &mut Vec<u8>, kind: u32, at: u64, load: &Load) {
    let Load { gva, gpa, len_bytes } = *load;
    // Without an alignment, as in /proc/vmcore: crash recognises a kernel's dump by that.
    let (flags, align) = if kind == PT_LOAD { (FLAGS, 0) } else { (0, 4) };
    [kind, flags].iter().for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
    let words = [at, gva, gpa, len_bytes, len_bytes, align];
    words.iter().for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Compares with a map of single bytes.
        #[test]
        fn what_is_mapped_first_stays(loads in proptest::collection::vec((0_u64..60, 0_u64..60, 1_u64..20), 1..20)) {
            let (mut all, mut oracle) = (Mapped::new(), BTreeMap::new());
            for (gva, gpa, len_bytes) in loads {
                add(&mut all, Load { gva, gpa, len_bytes });
                for byte in 0..len_bytes {
                    oracle.entry(gva + byte).or_insert(gpa + byte);
                }
            }
            let mut found = BTreeMap::new();
            for (key, load) in &all {
                prop_assert_eq!(*key, load.gva);
                for byte in 0..load.len_bytes {
                    prop_assert!(found.insert(load.gva + byte, load.gpa + byte).is_none());
                }
            }
            prop_assert_eq!(found, oracle);
        }
    }

    #[test]
    fn memory_lies_in_the_file_without_the_hole() {
        let ranges = crate::memory::ram_ranges(5 << 30);
        assert_eq!(place(&ranges, 0x1000), 0x1000);
        assert_eq!(place(&ranges, 4 << 30), 3 << 30);
        assert_eq!(place(&ranges, (4 << 30) + 0x1000), (3 << 30) + 0x1000);
        let across = Load { gva: 0, gpa: (3 << 30) - 0x1000, len_bytes: (1 << 30) + 0x2000 };
        let parts: Vec<Load> = in_ram(&ranges, across).collect();
        assert_eq!(
            parts,
            [
                Load { gva: 0, gpa: (3 << 30) - 0x1000, len_bytes: 0x1000 },
                Load { gva: (1 << 30) + 0x1000, gpa: 4 << 30, len_bytes: 0x1000 },
            ]
        );
    }
}
