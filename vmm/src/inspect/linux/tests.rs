//! Tables of symbols as kernels of several ages write them, and as none does.

use super::*;
use crate::inspect::tests::Ram;

const NAMES: usize = 0x4000;
const COUNT: usize = 0x1000;
const TOKEN_TABLE: usize = 0x2000;
const TOKEN_INDEX: usize = 0x3000;
const OFFSETS: usize = 0x8000;
const BASE: usize = 0x1100;
const TEXT: u64 = 0xffff_ffff_8100_0000;

/// How a kernel tells addresses.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Age {
    Signed,
    Unsigned,
    Whole,
}

/// A token for each byte, and one for a part that many names have.
const PART: u8 = 1;
const PART_TEXT: &[u8] = b"_unwind_";

fn tokens(ram: &mut Ram) {
    let mut at = TOKEN_TABLE;
    for token in 0..=255_u8 {
        let text = match token {
            0 => &[][..],
            PART => PART_TEXT,
            _ => &[token],
        };
        let start = ((at - TOKEN_TABLE) as u16).to_le_bytes();
        ram.0[TOKEN_INDEX + usize::from(token) * 2..][..2].copy_from_slice(&start);
        ram.0[at..at + text.len()].copy_from_slice(text);
        at += text.len() + 1;
    }
}

fn memory(age: Age, symbols: &[(u64, &str)]) -> (Ram, LinuxKernel) {
    let mut ram = Ram(vec![0; 0x10000]);
    tokens(&mut ram);
    let mut put = |at: usize, bytes: &[u8]| ram.0[at..at + bytes.len()].copy_from_slice(bytes);
    put(COUNT, &(symbols.len() as u32).to_le_bytes());
    put(BASE, &TEXT.to_le_bytes());
    let mut at = NAMES;
    for (index, (address, name)) in symbols.iter().enumerate() {
        let name = name.replace("_unwind_", "\u{1}");
        let name = name.as_bytes();
        // A length of 128 or more takes two bytes.
        let len = if name.len() < 128 {
            vec![name.len() as u8]
        } else {
            vec![name.len() as u8 | 0x80, (name.len() >> 7) as u8]
        };
        put(at, &len);
        put(at + len.len(), name);
        at += len.len() + name.len();
        let absolute = *address < TEXT;
        match age {
            Age::Whole => put(OFFSETS + index * 8, &address.to_le_bytes()),
            Age::Unsigned => {
                put(OFFSETS + index * 4, &(address.wrapping_sub(TEXT) as u32).to_le_bytes());
            }
            Age::Signed if absolute => put(OFFSETS + index * 4, &(*address as u32).to_le_bytes()),
            Age::Signed => {
                let offset = -1 - (address - TEXT) as i32;
                put(OFFSETS + index * 4, &offset.to_le_bytes());
            }
        }
    }
    (ram, kernel(age))
}

fn kernel(age: Age) -> LinuxKernel {
    let places = match age {
        Age::Whole => format!("SYMBOL(kallsyms_addresses)={OFFSETS:x}\n"),
        _ => format!(
            "SYMBOL(kallsyms_offsets)={OFFSETS:x}\nSYMBOL(kallsyms_relative_base)={BASE:x}\n"
        ),
    };
    let text = format!(
        "OSRELEASE=6.1.0\nSYMBOL(_stext)={TEXT:x}\nSYMBOL(kallsyms_names)={NAMES:x}\n\
         SYMBOL(kallsyms_num_syms)={COUNT:x}\nSYMBOL(kallsyms_token_table)={TOKEN_TABLE:x}\n\
         SYMBOL(kallsyms_token_index)={TOKEN_INDEX:x}\n{places}"
    );
    LinuxKernel {
        info: VmCoreInfo::parse(text.into_bytes()).expect("a note"),
        note_gpa: 0,
        space: AddressSpace { mode: PagingMode::Off, root_gpa: 0, has_no_execute: true },
        offset_bytes: 0,
    }
}

#[test]
fn names_are_read_as_they_were_written() {
    let long = "a".repeat(300);
    let long = format!("t{long}");
    for age in [Age::Signed, Age::Unsigned, Age::Whole] {
        let mut symbols = vec![
            (TEXT, "T_stext"),
            (TEXT + 0x10, "Tfirst_unwind_function"),
            (TEXT + 0x10, "talias"),
            (TEXT + 0x400, long.as_str()),
            (TEXT + 0x500, "Dsome_data"),
            (TEXT + 0x600, "T_etext"),
        ];
        if age != Age::Unsigned {
            symbols.insert(0, (0x1f0, "Aper_cpu_variable"));
        }
        let (ram, kernel) = memory(age, &symbols);
        let found = kernel.symbols(&ram).expect("readable").expect("a table");
        assert_eq!(found.len(), symbols.len(), "{age:?}");
        for (address, name) in &symbols {
            assert_eq!(found.address(&name[1..]), Some(*address), "{age:?}");
        }
        assert_eq!(found.function(TEXT + 0x3ff), Some(("first_unwind_function", 0x3ef)));
        assert_eq!(found.function(TEXT + 0x450), Some((&long[1..], 0x50)));
        // Data is no function; behind the last one there is none.
        assert_eq!(found.function(TEXT + 0x510), Some((&long[1..], 0x110)));
        assert_eq!((found.function(TEXT + 0x700), found.function(TEXT - 1)), (None, None));
    }
}

#[test]
fn tables_that_make_no_sense_are_none() {
    let symbols = [(TEXT, "T_stext"), (TEXT + 0x10, "Tother")];
    let none = |change: &dyn Fn(&mut Ram, &mut LinuxKernel)| {
        let (mut ram, mut kernel) = memory(Age::Signed, &symbols);
        change(&mut ram, &mut kernel);
        assert!(kernel.symbols(&ram).expect("readable").is_none());
    };
    // More than there can be; names that never end; addresses of which none is where the note says.
    none(&|ram, _| ram.0[COUNT..COUNT + 4].fill(0xff));
    none(&|ram, _| ram.0[NAMES..].fill(0xff));
    none(&|ram, _| ram.0[NAMES] = 0);
    none(&|ram, _| ram.0[OFFSETS..OFFSETS + 8].fill(5));
    // Tokens without an end; a table beyond memory.
    none(&|ram, _| ram.0[TOKEN_TABLE..].fill(b'x'));
    none(&|ram, _| ram.0.truncate(OFFSETS));
    none(&|_, kernel| {
        let text = format!("OSRELEASE=6.1.0\nSYMBOL(_stext)={TEXT:x}\n");
        kernel.info = VmCoreInfo::parse(text.into_bytes()).expect("a note");
    });
}

#[test]
fn a_note_counts_if_its_page_tables_agree() {
    // Tables at 0x5000 that map their own place, as kernels see it.
    let mut ram = Ram(vec![0; 0x10000]);
    let tables = KERNEL_MAP + 0x5000;
    let mut entry = |table: usize, index: u64, value: u64| {
        ram.0[table + index as usize * 8..][..8].copy_from_slice(&value.to_le_bytes());
    };
    let index = |shift: u32| tables >> shift & 511;
    entry(0x5000, index(39), 0x6003);
    entry(0x6000, index(30), 0x7003);
    entry(0x7000, index(21), 0x83);
    let text = format!(
        "OSRELEASE=6.1.0-test\nSYMBOL(init_top_pgt)={tables:x}\nNUMBER(phys_base)=0\nKERNELOFFSET=1200000\n"
    );
    let mut note = Vec::new();
    [11_u32, text.len() as u32, 0]
        .iter()
        .for_each(|word| note.extend_from_slice(&word.to_le_bytes()));
    note.extend_from_slice(NOTE_NAME);
    note.extend_from_slice(text.as_bytes());
    ram.0[0x1000..0x1000 + note.len()].copy_from_slice(&note);
    let found = LinuxKernel::at(&ram, 0x1000).expect("readable").expect("a kernel");
    assert_eq!((found.space.root_gpa, found.offset_bytes), (0x5000, 0x120_0000));
    assert_eq!(found.info.release(), "6.1.0-test");
    // Not of these tables; cut off; beyond memory; another note.
    for change in [
        |ram: &mut Ram| ram.0[0x7000..0x8000].fill(0),
        |ram: &mut Ram| ram.0[0x1004] = 0,
        |ram: &mut Ram| ram.0[0x1006] = 0xff,
        |ram: &mut Ram| ram.0[0x1008] = 1,
        |ram: &mut Ram| ram.0.truncate(0x1010),
    ] {
        let mut changed = Ram(ram.0.clone());
        change(&mut changed);
        let looked = LinuxKernel::at(&changed, 0x1000).expect("readable");
        assert!(looked.is_none());
    }
}
