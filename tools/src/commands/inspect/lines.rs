//! Source lines for addresses, from a kernel's debug information.

use addr2line::Context;
use addr2line::gimli::{AbbreviationsCacheStrategy, Dwarf, EndianSlice, LittleEndian, SectionId};
use frazil_vmm::inspect::KernelFile;

/// The sections that functions and lines need. Those on variables are large, and of no use here.
const NEEDED: [SectionId; 10] = [
    SectionId::DebugAbbrev,
    SectionId::DebugAddr,
    SectionId::DebugAranges,
    SectionId::DebugInfo,
    SectionId::DebugLine,
    SectionId::DebugLineStr,
    SectionId::DebugRanges,
    SectionId::DebugRngLists,
    SectionId::DebugStr,
    SectionId::DebugStrOffsets,
];

/// Source lines, by the addresses that the file was linked for.
pub(super) struct Lines<'a>(Context<EndianSlice<'a, LittleEndian>>);

impl<'a> Lines<'a> {
    /// The lines of `file`. Relocations that a vmlinux may have kept are already applied, and not
    /// read.
    pub(super) fn of(file: &KernelFile<'a>) -> anyhow::Result<Self> {
        let load = |id: SectionId| -> anyhow::Result<_> {
            let bytes = if NEEDED.contains(&id) { file.section(id.name())? } else { None };
            Ok(EndianSlice::new(bytes.unwrap_or_default(), LittleEndian))
        };
        if file.section(SectionId::DebugInfo.name())?.is_none_or(<[u8]>::is_empty) {
            anyhow::bail!("expected debug information (.debug_info) for --lines, found none");
        }
        let mut dwarf = Dwarf::load(load)?;
        dwarf.populate_abbreviations_cache(AbbreviationsCacheStrategy::Duplicates);
        Ok(Self(Context::from_dwarf(dwarf)?))
    }

    /// The lines for `address`, as `function at file:line`; of functions inlined there, the
    /// innermost first.
    pub(super) fn find(&self, address: u64) -> Vec<String> {
        let Ok(mut frames) = self.0.find_frames(address).skip_all_loads() else {
            return Vec::new();
        };
        let mut lines = Vec::new();
        while let Ok(Some(frame)) = frames.next() {
            let Some(place) = frame.location else { continue };
            let function = frame.function.as_ref().and_then(|function| function.demangle().ok());
            lines.push(format!(
                "{}{}:{}",
                function.map_or_else(String::new, |name| format!("{name} at ")),
                place.file.unwrap_or("?"),
                place.line.unwrap_or(0)
            ));
        }
        lines
    }
}
