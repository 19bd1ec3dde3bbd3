//! ORC, Linux's unwind table: for every instruction, where the caller's stack pointer, return
//! address and frame pointer are (arch/x86/include/asm/orc_types.h, arch/x86/kernel/unwind_orc.c).

use std::ops::Range;

use super::{End, Saved, Stack, State, Step, UnwindMethod};
use crate::inspect::Result;

/// Size of an entry.
const ENTRY_BYTES: usize = 6;
/// The addresses of the kernel's own code. Above it are modules, which have tables of their own,
/// and code generated at run time, which has none.
const KERNEL_CODE: Range<u64> = 0xffff_ffff_8000_0000..0xffff_ffff_c000_0000;

/// The layout of an entry's flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OrcFormat {
    /// Before Linux 6.3: two bits for the kind, then an end flag.
    Old,
    /// Linux 6.3: two bits for the kind, then a signal flag, then an end flag.
    Signal,
    /// Since Linux 6.4: three bits for the kind, which include the end, then a signal flag.
    New,
}

impl OrcFormat {
    /// The layout of a kernel release.
    #[must_use]
    pub fn of_version(version: (u32, u32)) -> Self {
        match version {
            (0..=5, _) | (6, 0..=2) => Self::Old,
            (6, 3) => Self::Signal,
            _ => Self::New,
        }
    }
}

/// An unwind table, of the kernel and possibly its modules.
#[derive(Clone, Debug)]
pub struct OrcTable {
    /// The first instruction of each entry, ascending, and the entry's index.
    by_ip: Vec<(u64, u32)>,
    entries: Vec<u8>,
    format: OrcFormat,
}

/// A decoded entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    sp_offset: i64,
    bp_offset: i64,
    sp_reg: u8,
    bp_reg: u8,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Undefined,
    End,
    Call,
    Regs,
    RegsPartial,
}

impl OrcTable {
    /// Makes a table of `entries` and the addresses of their instructions, `ips`. Each address is a
    /// 32-bit offset from its own location; the first one is at `ips_gva`. Excess addresses or
    /// entries, and an incomplete one at the end, are ignored.
    #[must_use]
    pub fn new(ips: &[u8], ips_gva: u64, entries: &[u8], format: OrcFormat) -> Self {
        let mut table = Self { by_ip: Vec::new(), entries: Vec::new(), format };
        table.add(ips, ips_gva, entries, &(0..u64::MAX));
        table
    }

    /// Adds the table of a module whose code is at `code`. Entries for other code are left out:
    /// that code was freed, and another module may be there by now.
    pub fn add(&mut self, ips: &[u8], ips_gva: u64, entries: &[u8], code: &Range<u64>) {
        let count = (entries.len() / ENTRY_BYTES).min(ips.len() / 4);
        let before = self.entries.len() / ENTRY_BYTES;
        self.entries.extend_from_slice(&entries[..count * ENTRY_BYTES]);
        let address = |(index, offset): (usize, &[u8])| {
            let offset = i32::from_le_bytes([offset[0], offset[1], offset[2], offset[3]]);
            let here = ips_gva.wrapping_add(index as u64 * 4);
            (here.wrapping_add(i64::from(offset) as u64), (before + index) as u32)
        };
        let all = ips.chunks_exact(4).take(count).enumerate().map(address);
        // An entry just after the code may mark its end.
        let ends = |index| self.entry(index).kind == Kind::Undefined;
        let own: Vec<_> = all
            .filter(|(ip, index)| code.contains(ip) || (*ip == code.end && ends(*index)))
            .collect();
        self.by_ip.extend(own);
        // Linux sorts its table at build time or boot; a file's may be unsorted.
        self.by_ip.sort_by_key(|(ip, _)| *ip);
    }

    /// The entry for the instruction at `ip`.
    pub(super) fn find(&self, ip: u64) -> Option<Entry> {
        let position = self.by_ip.partition_point(|(first, _)| *first <= ip).checked_sub(1)?;
        // The last entry only marks the end.
        if position + 1 == self.by_ip.len() {
            return None;
        }
        // Among several entries for one instruction, prefer one that is not the end of a section.
        let (first, _) = self.by_ip[position];
        let same = self.by_ip[..=position].iter().rev().take_while(|(other, _)| *other == first);
        let decoded = same.map(|(_, index)| self.entry(*index));
        let entry = decoded
            .reduce(|last, before| if last.kind == Kind::Undefined { before } else { last })?;
        // Between and after modules there is code that the table does not cover.
        (is_kernel(ip) || entry.kind != Kind::Undefined).then_some(entry)
    }

    fn entry(&self, index: u32) -> Entry {
        let bytes = &self.entries[index as usize * ENTRY_BYTES..][..ENTRY_BYTES];
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let offset = |at: usize| i64::from(word(at) as i16);
        let flags = word(4);
        let bit = |number: u16| flags >> number & 1 != 0;
        let registers = ((flags & 15) as u8, (flags >> 4 & 15) as u8);
        let old_kind = |end: bool| match flags >> 8 & 3 {
            _ if end => Kind::End,
            0 if registers.0 == UNDEFINED => Kind::Undefined,
            0 => Kind::Call,
            1 => Kind::Regs,
            _ => Kind::RegsPartial,
        };
        let kind = match self.format {
            OrcFormat::Old => old_kind(bit(10)),
            OrcFormat::Signal => old_kind(bit(11)),
            OrcFormat::New => match flags >> 8 & 7 {
                1 => Kind::End,
                2 => Kind::Call,
                3 => Kind::Regs,
                4 => Kind::RegsPartial,
                _ => Kind::Undefined,
            },
        };
        let (sp_reg, bp_reg) = registers;
        Entry { sp_offset: offset(0), bp_offset: offset(2), sp_reg, bp_reg, kind }
    }
}

/// True if `ip` is in the range of the kernel's own code.
pub(super) fn is_kernel(ip: u64) -> bool {
    KERNEL_CODE.contains(&ip)
}

const UNDEFINED: u8 = 0;
const PREV_SP: u8 = 1;
const DX: u8 = 2;
const DI: u8 = 3;
const BP: u8 = 4;
const SP: u8 = 5;
const R10: u8 = 6;
const R13: u8 = 7;
const BP_INDIRECT: u8 = 8;
const SP_INDIRECT: u8 = 9;

/// Offsets of registers in what an interrupt saves (`struct pt_regs`), in bytes.
mod saved_at {
    pub(super) const R13: u64 = 16;
    pub(super) const BP: u64 = 32;
    pub(super) const R10: u64 = 56;
    pub(super) const DX: u64 = 96;
    pub(super) const DI: u64 = 112;
    pub(super) const IP: u64 = 128;
    pub(super) const SP: u64 = 152;
}

/// Steps from a function to its caller, or to the code that it interrupted.
pub(super) fn step(stack: &Stack<'_>, entry: Entry, state: &mut State) -> Result<Step> {
    match entry.kind {
        Kind::Undefined => return Ok(Step::End(End::NoWay { ip: state.ip })),
        Kind::End => return Ok(Step::End(End::Bottom)),
        Kind::Call | Kind::Regs | Kind::RegsPartial => {}
    }
    let Some(sp) = caller_sp(stack, entry, state)? else {
        let what = format!(
            "the unwind table needs register {} at {:#x}, whose value is not known",
            entry.sp_reg, state.ip
        );
        return Ok(Step::End(End::Damaged { what }));
    };
    let missing =
        |gva: u64| Ok(Step::End(End::Damaged { what: format!("there is no stack at {gva:#x}") }));
    let regs = match entry.kind {
        Kind::Regs => Some(sp),
        Kind::RegsPartial => Some(sp.wrapping_sub(saved_at::IP)),
        _ => None,
    };
    let (mut next, found) = if let Some(regs) = regs {
        let [ip, above] = [saved_at::IP, saved_at::SP].map(|at| stack.word(regs.wrapping_add(at)));
        let (Some(ip), Some(above)) = (ip?, above?) else { return missing(regs) };
        let saved = if entry.kind == Kind::Regs { Some(saved(stack, regs)?) } else { None };
        (
            State { ip, sp: above, bp: state.bp, saved, interrupted: true },
            UnwindMethod::OrcInterrupted,
        )
    } else {
        let at = sp.wrapping_sub(8);
        let Some(ip) = stack.word(at)? else { return missing(at) };
        (State { ip, sp, bp: state.bp, saved: None, interrupted: false }, UnwindMethod::Orc)
    };
    let bp_at = match entry.bp_reg {
        PREV_SP => Some(sp.wrapping_add(entry.bp_offset as u64)),
        BP => Some(state.bp.wrapping_add(entry.bp_offset as u64)),
        _ => None,
    };
    match (bp_at, next.saved) {
        (Some(at), _) => match stack.word(at)? {
            Some(bp) => next.bp = bp,
            None => return missing(at),
        },
        (None, Some(saved)) => next.bp = saved.bp,
        (None, None) => {}
    }
    *state = next;
    // Code that calls on another stack (`call_on_stack` in arch/x86/include/asm/irq_stack.h) leaves
    // its own stack pointer at the top of that stack, where this entry finds it.
    let same_stack = regs.is_none() && entry.sp_reg != SP_INDIRECT;
    Ok(Step::Up { how: found, same_stack })
}

/// The caller's stack pointer; None if it cannot be computed.
fn caller_sp(stack: &Stack<'_>, entry: Entry, state: &State) -> Result<Option<u64>> {
    let offset = entry.sp_offset as u64;
    let saved = |register: fn(Saved) -> u64| state.saved.map(register);
    Ok(match entry.sp_reg {
        SP => Some(state.sp.wrapping_add(offset)),
        BP => Some(state.bp.wrapping_add(offset)),
        SP_INDIRECT => stack.word(state.sp)?.map(|sp| sp.wrapping_add(offset)),
        BP_INDIRECT => stack.word(state.bp.wrapping_add(offset))?,
        R10 => saved(|saved| saved.r10),
        R13 => saved(|saved| saved.r13),
        DI => saved(|saved| saved.di),
        DX => saved(|saved| saved.dx),
        _ => None,
    })
}

/// The registers that an interrupt saved at `regs`; those that cannot be read are 0.
fn saved(stack: &Stack<'_>, regs: u64) -> Result<Saved> {
    let word = |at: u64| stack.word(regs.wrapping_add(at)).map(Option::unwrap_or_default);
    Ok(Saved {
        bp: word(saved_at::BP)?,
        dx: word(saved_at::DX)?,
        di: word(saved_at::DI)?,
        r10: word(saved_at::R10)?,
        r13: word(saved_at::R13)?,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Call, saved registers, end, undefined: each as in the old layouts and in the new one.
    pub(in super::super) const ENTRY_KINDS: [(u16, u16); 4] = [(0, 2), (1, 3), (0, 1), (0, 0)];
    const END: (u16, u16) = ENTRY_KINDS[2];

    /// An entry to encode.
    pub(in super::super) struct Line {
        pub(in super::super) ip: u64,
        pub(in super::super) sp_reg: u16,
        pub(in super::super) sp_offset: i16,
        pub(in super::super) bp_reg: u16,
        pub(in super::super) bp_offset: i16,
        pub(in super::super) kind: (u16, u16),
    }

    /// Where the instructions' addresses are located.
    pub(in super::super) const AT: u64 = 0xffff_ffff_8200_0000;

    /// A table of `lines` in the given layout, with an end marker after them.
    pub(in super::super) fn table(lines: &[Line], format: OrcFormat) -> OrcTable {
        let (ips, entries) = encoded(lines, format);
        OrcTable::new(&ips, AT, &entries, format)
    }

    /// The two parts of such a table: addresses and entries.
    pub(in super::super) fn encoded(lines: &[Line], format: OrcFormat) -> (Vec<u8>, Vec<u8>) {
        let last = lines.iter().map(|line| line.ip).max().unwrap_or_default() + 0x100;
        let (mut ips, mut entries) = (Vec::new(), Vec::new());
        let behind = Line { ip: last, sp_reg: 0, sp_offset: 0, bp_reg: 0, bp_offset: 0, kind: END };
        for (index, line) in lines.iter().chain([&behind]).enumerate() {
            let offset = line.ip.wrapping_sub(AT + index as u64 * 4) as u32;
            ips.extend_from_slice(&offset.to_le_bytes());
            let end = u16::from(line.kind == END);
            let flags = line.sp_reg
                | line.bp_reg << 4
                | match format {
                    OrcFormat::Old => line.kind.0 << 8 | end << 10,
                    OrcFormat::Signal => line.kind.0 << 8 | end << 11,
                    OrcFormat::New => line.kind.1 << 8,
                };
            [line.sp_offset as u16, line.bp_offset as u16, flags]
                .iter()
                .for_each(|word| entries.extend_from_slice(&word.to_le_bytes()));
        }
        (ips, entries)
    }

    #[test]
    fn layouts_follow_releases() {
        let of = |major, minor| OrcFormat::of_version((major, minor));
        assert_eq!((of(5, 10), of(6, 2)), (OrcFormat::Old, OrcFormat::Old));
        assert_eq!(
            (of(6, 3), of(6, 4), of(7, 0)),
            (OrcFormat::Signal, OrcFormat::New, OrcFormat::New)
        );
        // If there are fewer addresses than entries, or vice versa, the excess is ignored.
        let table = OrcTable::new(&[0; 10], 0, &[0; 20], OrcFormat::Old);
        assert!(table.find(0xffff_ffff_8000_0000).is_none());
    }
}
