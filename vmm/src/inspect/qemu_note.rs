//! The note that QEMU's `dump-guest-memory` writes for each vCPU in addition to those that Linux
//! writes for threads: control registers, segments and tables (`QEMUCPUState`, version 1, in
//! `target/i386/arch_dump.c` of QEMU's sources). crash takes it as a sign that there are notes for
//! all vCPUs, even those that the kernel has taken offline, and tools for guests other than Linux
//! find page tables by it.

use crate::vcpu::saved::{SavedSegment, SavedTable, SavedVcpu};

pub(super) const NAME: &str = "QEMU";
const VERSION: u32 = 1;
/// Two numbers, 18 registers, 10 segments, 5 control registers, the kernel's GS base.
const STATE_BYTES: usize = 8 + 18 * 8 + 10 * SEGMENT_BYTES + 5 * 8 + 8;
const SEGMENT_BYTES: usize = 24;
const MSR_KERNEL_GS_BASE: u64 = 0xc000_0102;

/// The contents of the note for `vcpu`.
pub(super) fn contents(vcpu: &SavedVcpu) -> Vec<u8> {
    let mut out = Vec::with_capacity(STATE_BYTES);
    [VERSION, STATE_BYTES as u32].iter().for_each(|word| put_u32(&mut out, *word));
    let regs = &vcpu.regs;
    let registers = [
        regs.rax,
        regs.rbx,
        regs.rcx,
        regs.rdx,
        regs.rsi,
        regs.rdi,
        regs.rsp,
        regs.rbp,
        regs.r8,
        regs.r9,
        regs.r10,
        regs.r11,
        regs.r12,
        regs.r13,
        regs.r14,
        regs.r15,
        regs.rip,
        regs.rflags,
    ];
    registers.iter().for_each(|register| put_u64(&mut out, (*register).into()));
    let sregs = &vcpu.sregs;
    for segment in
        [&sregs.cs, &sregs.ds, &sregs.es, &sregs.fs, &sregs.gs, &sregs.ss, &sregs.ldt, &sregs.tr]
    {
        put_segment(&mut out, segment);
    }
    [&sregs.gdt, &sregs.idt].iter().for_each(|table| put_table(&mut out, table));
    // There is no CR1.
    for register in [sregs.cr0.into(), 0, sregs.cr2.into(), sregs.cr3.into(), sregs.cr4.into()] {
        put_u64(&mut out, register);
    }
    let kernel_gs = vcpu.msrs.iter().find(|msr| u64::from(msr.index) == MSR_KERNEL_GS_BASE);
    put_u64(&mut out, kernel_gs.map_or(0, |msr| msr.value.into()));
    out
}

fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_segment(out: &mut Vec<u8>, segment: &SavedSegment) {
    let words = [segment.selector.into(), segment.limit, attributes(segment), 0];
    words.iter().for_each(|word| put_u32(out, *word));
    put_u64(out, segment.base.into());
}

fn put_table(out: &mut Vec<u8>, table: &SavedTable) {
    [0, table.limit.into(), 0, 0].iter().for_each(|word| put_u32(out, *word));
    put_u64(out, table.base.into());
}

/// A segment's attributes, as in the upper half of a descriptor (Intel SDM vol. 3, section 3.4.5).
fn attributes(segment: &SavedSegment) -> u32 {
    let present = u8::from(segment.present != 0 && segment.unusable == 0);
    [
        (segment.type_, 8),
        (segment.s, 12),
        (segment.dpl, 13),
        (present, 15),
        (segment.avl, 20),
        (segment.l, 21),
        (segment.db, 22),
        (segment.g, 23),
    ]
    .iter()
    .fold(0, |all, (value, bit)| all | u32::from(*value) << bit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vcpu::saved::Reg;

    #[test]
    fn attributes_are_those_of_a_descriptor() {
        // The 64-bit code segment of Linux: 0x00af9b000000ffff.
        let code = SavedSegment {
            base: Reg(0),
            limit: 0xffff_ffff,
            selector: 0x10,
            type_: 0xb,
            present: 1,
            dpl: 0,
            db: 0,
            s: 1,
            l: 1,
            g: 1,
            avl: 0,
            unusable: 0,
        };
        assert_eq!(attributes(&code), 0x00a0_9b00);
        let nothing = SavedSegment { unusable: 1, ..code.clone() };
        assert_eq!(attributes(&nothing) & 1 << 15, 0);
        let mut out = Vec::new();
        put_segment(&mut out, &code);
        assert_eq!(out.len(), SEGMENT_BYTES);
        assert_eq!(out[..8], [0x10, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    }
}
