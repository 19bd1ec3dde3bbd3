//! Reads symbol tables and modules as kernels of several ages write them, and damaged ones.

use super::*;
use crate::inspect::Symbol;
use crate::inspect::tests::Ram;

const NAMES: usize = 0x4000;
const COUNT: usize = 0x1000;
const TOKEN_TABLE: usize = 0x2000;
const TOKEN_INDEX: usize = 0x3000;
const OFFSETS: usize = 0x8000;
const BASE: usize = 0x1100;
const TEXT: u64 = 0xffff_ffff_8100_0000;

/// How a kernel stores symbols' addresses.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Age {
    Signed,
    Unsigned,
    Whole,
}

/// The token for a part that many names have; all others but 0 stand for their own byte.
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
        space: AddressSpace::new(PagingMode::Off, 0),
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
        let function = |address| {
            let found = found.function(address);
            found.map(|(symbol, offset)| (symbol.name.as_str(), offset))
        };
        assert_eq!(function(TEXT + 0x3ff), Some(("first_unwind_function", 0x3ef)));
        assert_eq!(function(TEXT + 0x450), Some((&long[1..], 0x50)));
        // Data is not a function; after the last symbol there is none.
        assert_eq!(function(TEXT + 0x510), Some((&long[1..], 0x110)));
        assert_eq!((function(TEXT + 0x700), function(TEXT - 1)), (None, None));
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
    // Too many symbols; names that are too long; an empty name; addresses that disagree with the
    // note.
    none(&|ram, _| ram.0[COUNT..COUNT + 4].fill(0xff));
    none(&|ram, _| ram.0[NAMES..].fill(0xff));
    none(&|ram, _| ram.0[NAMES] = 0);
    none(&|ram, _| ram.0[OFFSETS..OFFSETS + 8].fill(5));
    // A token without an end; a table outside memory.
    none(&|ram, _| ram.0[TOKEN_TABLE..].fill(b'x'));
    none(&|ram, _| ram.0.truncate(OFFSETS));
    // A table that reaches beyond the last address.
    none(&|_, kernel| {
        let text = String::from_utf8(kernel.info.bytes().to_vec()).expect("text");
        let table = format!("SYMBOL(kallsyms_token_table)={TOKEN_TABLE:x}");
        let text = text.replace(&table, "SYMBOL(kallsyms_token_table)=ffffffffffffffff");
        kernel.info = VmCoreInfo::parse(text.into_bytes()).expect("a note");
    });
    none(&|_, kernel| {
        let text = format!("OSRELEASE=6.1.0\nSYMBOL(_stext)={TEXT:x}\n");
        kernel.info = VmCoreInfo::parse(text.into_bytes()).expect("a note");
    });
}

#[test]
fn a_note_counts_if_its_page_tables_agree() {
    // Page tables at 0x5000 that map themselves at the kernel's virtual address for them.
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
    let processor = AddressSpace::new(PagingMode::Off, 0);
    let mut note = Vec::new();
    [11_u32, text.len() as u32, 0]
        .iter()
        .for_each(|word| note.extend_from_slice(&word.to_le_bytes()));
    note.extend_from_slice(NOTE_NAME);
    note.extend_from_slice(text.as_bytes());
    ram.0[0x1000..0x1000 + note.len()].copy_from_slice(&note);
    let found = LinuxKernel::at(&ram, 0x1000, &processor).expect("readable").expect("a kernel");
    assert_eq!((found.space.root_gpa, found.offset_bytes), (0x5000, 0x120_0000));
    assert_eq!(found.info.release(), "6.1.0-test");
    // Page tables that do not agree; contents cut short, and too long; another type of note; memory
    // that ends within the note.
    for change in [
        |ram: &mut Ram| ram.0[0x7000..0x8000].fill(0),
        |ram: &mut Ram| ram.0[0x1004] = 0,
        |ram: &mut Ram| ram.0[0x1006] = 0xff,
        |ram: &mut Ram| ram.0[0x1008] = 1,
        |ram: &mut Ram| ram.0.truncate(0x1010),
    ] {
        let mut changed = Ram(ram.0.clone());
        change(&mut changed);
        let looked = LinuxKernel::at(&changed, 0x1000, &processor).expect("readable");
        assert!(looked.is_none());
    }
}

/// The layout of a kernel's structures for modules, which differs between the two kernels.
struct Layout {
    module: &'static [(&'static str, u32)],
    arch: &'static [(&'static str, u32)],
    kallsyms: &'static [(&'static str, u32)],
    code: (&'static str, &'static [(&'static str, u32)]),
}

const LAYOUTS: [Layout; 2] = [
    Layout {
        module: &[
            ("state", 0),
            ("list", 8),
            ("name", 24),
            ("core_layout", 0x80),
            ("arch", 0xc0),
            ("kallsyms", 0x100),
        ],
        arch: &[("num_orcs", 0), ("orc_unwind_ip", 8), ("orc_unwind", 16)],
        kallsyms: &[("symtab", 0), ("num_symtab", 8), ("strtab", 16), ("typetab", 24)],
        code: ("module_layout", &[("base", 0), ("size", 8), ("text_size", 12)]),
    },
    Layout {
        module: &[("name", 0), ("list", 0x38), ("kallsyms", 0x50), ("mem", 0x60), ("arch", 0x180)],
        arch: &[("orc_unwind", 0), ("orc_unwind_ip", 8), ("num_orcs", 24)],
        kallsyms: &[("typetab", 0), ("strtab", 8), ("symtab", 16), ("num_symtab", 24)],
        code: ("module_memory", &[("base", 0), ("rw_copy", 8), ("is_rox", 16), ("size", 20)]),
    },
];

const MODULE_CODE: u64 = 0xffff_ffff_c010_0000;

impl Layout {
    fn at(members: &[(&str, u32)], name: &str) -> usize {
        members.iter().find(|(member, _)| *member == name).expect("a member").1 as usize
    }

    /// A guest with two modules on the list at 0x100, and the kernel's symbols.
    fn guest(&self) -> (Ram, LinuxKernel, Symbols) {
        let (mut ram, kernel) = memory(Age::Whole, &[(TEXT, "T_stext")]);
        ram.0.resize(0x2_0000, 0);
        let structures = [
            ("mod_arch_specific", self.arch),
            ("module", self.module),
            ("mod_kallsyms", self.kallsyms),
            self.code,
        ];
        let description = super::btf::tests::described(&structures);
        let mut put = |at: usize, bytes: &[u8]| ram.0[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x1_0000, &description);
        let list = Self::at(self.module, "list");
        let nodes = [0x100, 0x1_8000 + list, 0x1_9000 + list];
        for (index, node) in nodes.iter().enumerate() {
            put(*node, &(nodes[(index + 1) % 3] as u64).to_le_bytes());
        }
        for (index, name) in ["first", "second"].into_iter().enumerate() {
            let (module, tables) = (0x1_8000 + index * 0x1000, 0x1_8800 + index * 0x1000);
            let code = MODULE_CODE + index as u64 * 0x1000;
            put(module + Self::at(self.module, "name"), name.as_bytes());
            let (place, members) = self.code;
            let place = if place == "module_layout" { "core_layout" } else { "mem" };
            let place = module + Self::at(self.module, place);
            put(place + Self::at(members, "base"), &code.to_le_bytes());
            put(place + Self::at(members, "size"), &0x1000_u32.to_le_bytes());
            let arch = module + Self::at(self.module, "arch");
            put(arch + Self::at(self.arch, "num_orcs"), &2_u32.to_le_bytes());
            put(arch + Self::at(self.arch, "orc_unwind_ip"), &(tables as u64).to_le_bytes());
            put(arch + Self::at(self.arch, "orc_unwind"), &(tables as u64 + 8).to_le_bytes());
            let kallsyms = tables + 0x100;
            put(module + Self::at(self.module, "kallsyms"), &(kallsyms as u64).to_le_bytes());
            for (member, offset) in [("symtab", 0x200), ("strtab", 0x300), ("typetab", 0x400)] {
                let at = kallsyms + Self::at(self.kallsyms, member);
                put(at, &((tables + offset) as u64).to_le_bytes());
            }
            put(kallsyms + Self::at(self.kallsyms, "num_symtab"), &3_u32.to_le_bytes());
            // A null symbol, an undefined one, and a function.
            for (number, (section, address, len)) in
                [(0_u16, 0, 0), (0, 5, 0), (1, code + 0x40, 0x20_u64)].into_iter().enumerate()
            {
                let at = tables + 0x200 + number * 24;
                put(at, &(number as u32 * 5).to_le_bytes());
                put(at + 6, &section.to_le_bytes());
                put(at + 8, &address.to_le_bytes());
                put(at + 16, &len.to_le_bytes());
            }
            put(tables + 0x300, b"\0abc\0defg\0work\0");
            put(tables + 0x400, b"ttt");
        }
        let end = 0x1_0000 + description.len() as u64;
        let symbol = |name: &str, address| Symbol {
            address,
            len_bytes: 0,
            is_code: false,
            name: name.to_owned(),
            module: None,
        };
        // One of the two symbols of that name is something else.
        let symbols = Symbols::new(vec![
            symbol("modules", 0x90),
            symbol("modules", 0x100),
            symbol("__start_BTF", 0x1_0000),
            symbol("__stop_BTF", end),
        ]);
        (ram, kernel, symbols)
    }
}

#[test]
fn modules_are_found_as_the_kernel_describes_them() {
    for layout in &LAYOUTS {
        let (ram, kernel, symbols) = layout.guest();
        let modules = kernel.modules(&ram, &symbols).expect("readable").expect("a list");
        let [first, second] = &modules[..] else { panic!("{modules:?}") };
        assert_eq!((&*first.name, &*second.name), ("first", "second"));
        assert_eq!(second.code, MODULE_CODE + 0x1000..MODULE_CODE + 0x2000);
        let all = symbols.with(modules.iter().flat_map(|module| module.symbols.clone()).collect());
        let (symbol, offset) = all.function(MODULE_CODE + 0x1050).expect("a function");
        assert_eq!((symbol.name.as_str(), symbol.module.as_deref()), ("work", Some("second")));
        assert_eq!(offset, 0x10);
        assert!(all.function(MODULE_CODE + 0x60).is_none(), "behind its end");
        assert_eq!(modules.iter().map(|module| module.symbols.len()).collect::<Vec<_>>(), [1, 1]);
    }
}

#[test]
fn lists_of_modules_that_make_no_sense_end() {
    let layout = &LAYOUTS[0];
    let modules = |change: &dyn Fn(&mut Ram)| {
        let (mut ram, kernel, symbols) = layout.guest();
        change(&mut ram);
        kernel.modules(&ram, &symbols).expect("readable")
    };
    // A circular list without its head; invalid names, of the second and the first module; a first
    // module outside memory.
    let round =
        modules(&|ram| ram.0[0x1_9008..0x1_9010].copy_from_slice(&0x1_8008_u64.to_le_bytes()));
    assert!(round.expect("modules").len() <= 4096);
    let cut = modules(&|ram| ram.0[0x1_9018] = 0x80).expect("those before it");
    assert_eq!(cut.len(), 1);
    assert!(modules(&|ram| ram.0[0x1_8018] = 0).is_none());
    assert!(modules(&|ram| ram.0[0x100..0x108].fill(0x77)).is_none());
    // No description; then counts that make no sense, which only cost a module its tables.
    assert!(modules(&|ram| ram.0[0x1_0000] = 0).is_none());
    let huge = modules(&|ram| {
        ram.0[0x1_80c0..0x1_80c4].fill(0xff);
        ram.0[0x1_8908..0x1_890c].fill(0xff);
    });
    let huge = huge.expect("modules");
    assert_eq!((huge.len(), huge[0].symbols.len(), huge[1].symbols.len()), (2, 0, 1));
}
