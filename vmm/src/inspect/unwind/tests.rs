//! Unwinds stacks that are laid out by hand, with each layout of the table.

use super::orc::tests::{AT, ENTRY_KINDS, Line, encoded, table};
use super::*;
use crate::inspect::PagingMode;
use crate::inspect::tests::Ram;

/// The address of the kernel's code.
const CODE: u64 = 0xffff_ffff_8100_0000;

fn space() -> AddressSpace {
    AddressSpace::new(PagingMode::Off, 0)
}

fn put(ram: &mut Ram, at: u64, value: u64) {
    ram.0[at as usize..][..8].copy_from_slice(&value.to_le_bytes());
}

fn registers(rip: u64, rsp: u64, rbp: u64) -> SavedRegs {
    let regs = kvm_bindings::kvm_regs { rip, rsp, rbp, ..Default::default() };
    SavedRegs::from(&regs)
}

#[test]
fn callers_are_found_by_the_table() {
    let [call, regs, end, undefined] = ENTRY_KINDS;
    let lines = [
        // sp + 16, nothing saved; bp + 16, bp saved below; registers at sp; the end.
        Line { ip: CODE, sp_reg: 5, sp_offset: 16, bp_reg: 0, bp_offset: 0, kind: call },
        Line { ip: CODE + 0x100, sp_reg: 4, sp_offset: 16, bp_reg: 1, bp_offset: -16, kind: call },
        Line { ip: CODE + 0x200, sp_reg: 5, sp_offset: 0, bp_reg: 0, bp_offset: 0, kind: regs },
        Line { ip: CODE + 0x300, sp_reg: 5, sp_offset: 8, bp_reg: 0, bp_offset: 0, kind: end },
        Line {
            ip: CODE + 0x400,
            sp_reg: 0,
            sp_offset: 0,
            bp_reg: 0,
            bp_offset: 0,
            kind: undefined,
        },
    ];
    let mut ram = Ram(vec![0; 0x4000]);
    put(&mut ram, 0x1008, CODE + 0x105);
    put(&mut ram, 0x1108, CODE + 0x205);
    put(&mut ram, 0x1100, 0x1234);
    // Instruction and stack pointers, where an interrupt saves them.
    put(&mut ram, 0x1110 + 128, CODE + 0x300);
    put(&mut ram, 0x1110 + 152, 0x2000);
    for format in [OrcFormat::Old, OrcFormat::Signal, OrcFormat::New] {
        let table = table(&lines, format);
        let stack =
            Stack { space: space(), memory: &ram, orc: Some(&table), mode: CodeMode::Bits64 };
        let (frames, why) =
            stack.walk(&registers(CODE + 0x50, 0x1000, 0x1100), 10).expect("readable");
        assert_eq!(why, End::Bottom, "{format:?}");
        let found: Vec<_> =
            frames.iter().map(|frame| (frame.ip - CODE, frame.sp, frame.how)).collect();
        assert_eq!(
            found,
            [
                (0x50, 0x1000, UnwindMethod::Registers),
                (0x105, 0x1010, UnwindMethod::Orc),
                (0x205, 0x1110, UnwindMethod::Orc),
                (0x300, 0x2000, UnwindMethod::OrcInterrupted),
            ],
            "{format:?}"
        );
        // Interrupted code is looked up at its own address, other code one byte before it.
        assert_eq!((frames[2].lookup_ip(), frames[3].lookup_ip()), (CODE + 0x204, CODE + 0x300));
        let (frames, why) =
            stack.walk(&registers(CODE + 0x50, 0x1000, 0x1100), 2).expect("readable");
        assert_eq!((frames.len(), why), (2, End::Enough));
        // An instruction without an entry; a stack outside memory; a program.
        let walk = |rip, rsp| stack.walk(&registers(rip, rsp, 0), 10).expect("readable").1;
        assert_eq!(walk(CODE + 0x410, 0x1000), End::NoWay { ip: CODE + 0x410 });
        assert!(matches!(walk(CODE, 0x9000), End::Damaged { .. }));
        assert_eq!(walk(CODE + 0x9000, 0x1000), End::NoWay { ip: CODE + 0x9000 });
    }
}

#[test]
fn a_stack_that_goes_round_ends() {
    let [call, regs, ..] = ENTRY_KINDS;
    let line =
        |ip, sp_reg, sp_offset, kind| Line { ip, sp_reg, sp_offset, bp_reg: 0, bp_offset: 0, kind };
    let lines =
        [line(CODE, 5, 0, call), line(CODE + 0x100, 5, 0, regs), line(CODE + 0x200, 5, 8, call)];
    let mut ram = Ram(vec![0; 0x4000]);
    put(&mut ram, 0xff8, CODE + 0x10);
    // Saved registers that lead to themselves.
    put(&mut ram, 0x2000 + 128, CODE + 0x110);
    put(&mut ram, 0x2000 + 152, 0x2000);
    let table = table(&lines, OrcFormat::New);
    let stack = Stack { space: space(), memory: &ram, orc: Some(&table), mode: CodeMode::Bits64 };
    let (_, why) = stack.walk(&registers(CODE + 0x50, 0x1000, 0), 1000).expect("readable");
    assert!(matches!(why, End::Damaged { .. }), "{why:?}");
    let (frames, why) = stack.walk(&registers(CODE + 0x150, 0x2000, 0), 100).expect("readable");
    assert_eq!((frames.len(), why), (100, End::Enough), "as many as were wanted");
}

/// An interrupt handler's stack may lie above or below that of the code that called on it.
#[test]
fn calls_on_another_stack_return_to_the_first() {
    let [call, _, end, _] = ENTRY_KINDS;
    let line =
        |ip, sp_reg, sp_offset, kind| Line { ip, sp_reg, sp_offset, bp_reg: 0, bp_offset: 0, kind };
    // In the handler; where the word at the top of its stack is the caller's stack pointer.
    let lines =
        [line(CODE, 5, 8, call), line(CODE + 0x100, 9, 0x20, call), line(CODE + 0x200, 5, 8, end)];
    for (handler, task) in [(0x3000, 0x1000), (0x1000, 0x3000)] {
        let mut ram = Ram(vec![0; 0x4000]);
        put(&mut ram, handler, CODE + 0x110);
        put(&mut ram, handler + 8, task);
        put(&mut ram, task + 0x18, CODE + 0x210);
        let table = table(&lines, OrcFormat::Old);
        let stack =
            Stack { space: space(), memory: &ram, orc: Some(&table), mode: CodeMode::Bits64 };
        let (frames, why) = stack.walk(&registers(CODE + 0x50, handler, 0), 10).expect("readable");
        let found: Vec<_> = frames.iter().map(|frame| (frame.ip - CODE, frame.sp)).collect();
        let expected = [(0x50, handler), (0x110, handler + 8), (0x210, task + 0x20)];
        assert_eq!((found, why), (expected.to_vec(), End::Bottom));
    }
}

#[test]
fn frame_pointers_lead_up_while_they_make_sense() {
    let mut ram = Ram(vec![0; 0x4000]);
    for (bp, next, ip) in [(0x1000, 0x1100, 0x3010), (0x1100, 0x1200, 0x3020), (0x1200, 0, 0x3030)]
    {
        put(&mut ram, bp, next);
        put(&mut ram, bp + 8, ip);
    }
    let stack = Stack { space: space(), memory: &ram, orc: None, mode: CodeMode::Bits64 };
    let (frames, why) = stack.walk(&registers(0x3000, 0xff0, 0x1000), 10).expect("readable");
    let ips: Vec<u64> = frames.iter().map(|frame| frame.ip).collect();
    assert_eq!((ips, why), (vec![0x3000, 0x3010, 0x3020, 0x3030], End::Bottom));
    for (at, value) in [(0x1100, 0x1000), (0x1100, 0x1101)] {
        let mut bad = Ram(ram.0.clone());
        put(&mut bad, at, value);
        let stack = Stack { space: space(), memory: &bad, orc: None, mode: CodeMode::Bits64 };
        let (frames, why) = stack.walk(&registers(0x3000, 0xff0, 0x1000), 10).expect("readable");
        assert!(frames.len() <= 3 && matches!(why, End::NoWay { .. }), "{frames:?} {why:?}");
    }
    let (frames, _) = stack.walk(&registers(0x3000, 0x2000, 0x1000), 10).expect("readable");
    assert_eq!(frames.len(), 1, "a frame pointer below the stack is none");
}

#[test]
fn words_are_as_long_as_the_code_has_them() {
    let mut ram = Ram(vec![0; 0x4000]);
    let mut put = |at: usize, value: u32| ram.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
    for (bp, next, ip) in [(0x1004, 0x1100, 0x3010), (0x1100, 0x120c, 0x3020), (0x120c, 0, 0x3030)]
    {
        put(bp, next);
        put(bp + 4, ip);
    }
    let regs = registers(0x3000, 0xff0, 0x1004);
    let walk = |mode| {
        let stack = Stack { space: space(), memory: &ram, orc: None, mode };
        let (frames, why) = stack.walk(&regs, 10).expect("readable");
        (frames.iter().map(|frame| (frame.ip, frame.sp)).collect::<Vec<_>>(), why)
    };
    let all = [(0x3000, 0xff0), (0x3010, 0x100c), (0x3020, 0x1108), (0x3030, 0x1214)];
    assert_eq!(walk(CodeMode::Bits32), (all.to_vec(), End::Bottom));
    assert_eq!(walk(CodeMode::Bits16), (all[..1].to_vec(), End::NoWay { ip: 0x3000 }));
    assert_eq!(walk(CodeMode::Bits64).0, all[..1]);
}

/// A module's table is added to the kernel's; its entries for freed code are not used.
#[test]
fn modules_have_tables_of_their_own() {
    const MODULE: u64 = 0xffff_ffff_c000_1000;
    let [call, _, end, undefined] = ENTRY_KINDS;
    let line =
        |ip, sp_reg, sp_offset, kind| Line { ip, sp_reg, sp_offset, bp_reg: 0, bp_offset: 0, kind };
    let kernel = [
        line(CODE, 5, 8, end),
        line(CODE + 0x100, 5, 16, call),
        line(CODE + 0x200, 0, 0, undefined),
    ];
    let module = [
        line(MODULE, 5, 24, call),
        line(MODULE + 0x100, 0, 0, undefined),
        // An entry for its init code, which was freed: another module is there by now.
        line(MODULE + 0x1000, 5, 8, end),
    ];
    let other = [line(MODULE + 0x1000, 5, 8, call), line(MODULE + 0x1100, 0, 0, undefined)];
    let mut ram = Ram(vec![0; 0x4000]);
    put(&mut ram, 0x1010, MODULE + 0x1010);
    put(&mut ram, 0x1018, CODE + 0x110);
    put(&mut ram, 0x1028, CODE + 0x10);
    for format in [OrcFormat::Old, OrcFormat::Signal, OrcFormat::New] {
        let mut all = table(&kernel, format);
        for (lines, first) in [(&module[..], MODULE), (&other[..], MODULE + 0x1000)] {
            let (ips, entries) = encoded(lines, format);
            all.add(&ips, AT, &entries, &(first..first + 0x1000));
        }
        let stack = Stack { space: space(), memory: &ram, orc: Some(&all), mode: CodeMode::Bits64 };
        let (frames, why) = stack.walk(&registers(MODULE + 0x20, 0x1000, 0), 10).expect("readable");
        let ips: Vec<u64> = frames.iter().map(|frame| frame.ip).collect();
        assert_eq!(
            (ips, why),
            (vec![MODULE + 0x20, MODULE + 0x1010, CODE + 0x110, CODE + 0x10], End::Bottom),
            "{format:?}"
        );
        // After the modules is code generated at run time: it has frame pointers, or nothing.
        let (frames, why) =
            stack.walk(&registers(MODULE + 0x5000, 0x1000, 0), 10).expect("readable");
        assert_eq!((frames.len(), why), (1, End::Bottom), "no frame pointer");
    }
}
