//! The modules that a kernel has loaded. Their names, symbols and unwind tables are in the guest's
//! memory; the kernel's description of its own structures says where (kernel/module/ and
//! arch/x86/kernel/unwind_orc.c in the Linux sources).

use std::ops::Range;
use std::sync::Arc;

use super::LinuxKernel;
use super::btf::Btf;
use crate::inspect::memory::{PhysicalMemory, number};
use crate::inspect::symbols::{Symbol, Symbols};
use crate::inspect::{InspectError, OrcTable, Result};

/// More than any kernel has.
const MODULES_MAX: usize = 4096;
const BTF_BYTES_MAX: u64 = 128 << 20;
/// The most symbols and unwind entries of one module.
const SYMBOLS_MAX: u64 = 1 << 20;
const ENTRIES_MAX: u64 = 1 << 22;
/// The most bytes that are read for all modules together: a guest's list may have any length.
const BYTES_MAX: u64 = 256 << 20;
/// `MODULE_NAME_LEN` on 64-bit machines.
const NAME_BYTES: usize = 56;
/// The longest name of a symbol (`KSYM_NAME_LEN`).
const SYMBOL_BYTES_MAX: u64 = 512;
/// Size of an entry of an ELF64 symbol table.
const SYMBOL_BYTES: usize = 24;
const ORC_IP_BYTES: u64 = 4;
const ORC_BYTES: u64 = 6;
const PAGE_BYTES: u64 = 4096;

/// A loaded module.
#[derive(Clone, Debug)]
pub struct Module {
    /// Its name.
    pub name: Arc<str>,
    /// The virtual addresses of its code.
    pub code: Range<u64>,
    /// Its symbols.
    pub symbols: Vec<Symbol>,
    /// The instructions' addresses of its unwind table, and the address where they are stored.
    orc_ips: (u64, Vec<u8>),
    orc: Vec<u8>,
}

impl Module {
    /// Adds the module's unwind table to a kernel's.
    pub fn add_to(&self, table: &mut OrcTable) {
        let (at, ips) = &self.orc_ips;
        table.add(ips, *at, &self.orc, &self.code);
    }
}

/// Offsets in the kernel's structures, in bytes.
struct Layout {
    list: u64,
    name: u64,
    /// In `struct module`, the pointer to its code, and the length of the code.
    code: [u64; 2],
    orcs: u64,
    orc_ips: u64,
    orc: u64,
    /// In `struct module`, the pointer to its `struct mod_kallsyms`; then offsets in that.
    kallsyms: u64,
    symtab: u64,
    symbols: u64,
    strtab: u64,
    typetab: u64,
}

impl Layout {
    fn of(btf: &Btf) -> Option<Self> {
        let [list, name, arch, kallsyms] =
            btf.offsets("module", ["list", "name", "arch", "kallsyms"])?;
        let [orcs, orc_ips, orc] =
            btf.offsets("mod_arch_specific", ["num_orcs", "orc_unwind_ip", "orc_unwind"])?;
        let [symtab, symbols, strtab, typetab] =
            btf.offsets("mod_kallsyms", ["symtab", "num_symtab", "strtab", "typetab"])?;
        // Since Linux 6.4 a module has several pieces of memory, the first of which is its code.
        let (place, parts) = match btf.offsets("module", ["mem"]) {
            Some([mem]) => (mem, "module_memory"),
            None => (btf.offsets("module", ["core_layout"])?[0], "module_layout"),
        };
        let code = btf.offsets(parts, ["base", "size"])?.map(|offset| place + offset);
        let [orcs, orc_ips, orc] = [orcs, orc_ips, orc].map(|offset| arch + offset);
        Some(Self {
            list,
            name,
            code,
            orcs,
            orc_ips,
            orc,
            kallsyms,
            symtab,
            symbols,
            strtab,
            typetab,
        })
    }
}

/// The loaded modules; None if the kernel does not say how to find them.
pub(super) fn read(
    kernel: &LinuxKernel,
    memory: &dyn PhysicalMemory,
    symbols: &Symbols,
) -> Result<Option<Vec<Module>>> {
    let reader = Reader { kernel, memory };
    let (Some(start), Some(end)) = (symbols.address("__start_BTF"), symbols.address("__stop_BTF"))
    else {
        return Ok(None);
    };
    let len = end.wrapping_sub(start);
    if len > BTF_BYTES_MAX {
        return Ok(None);
    }
    let Some(bytes) = reader.bytes(start, len)? else { return Ok(None) };
    let Some(layout) = Btf::parse(&bytes).and_then(|btf| Layout::of(&btf)) else { return Ok(None) };
    for head in symbols.addresses("modules") {
        if let Some(modules) = reader.list(head, &layout)? {
            return Ok(Some(modules));
        }
    }
    Ok(None)
}

/// Reads memory at the kernel's own addresses. What cannot be read is None: a guest may put
/// anything there.
struct Reader<'a> {
    kernel: &'a LinuxKernel,
    memory: &'a dyn PhysicalMemory,
}

impl Reader<'_> {
    fn bytes(&self, gva: u64, len: u64) -> Result<Option<Vec<u8>>> {
        let mut bytes = vec![0; len as usize];
        match self.kernel.space.read(self.memory, gva, &mut bytes) {
            Ok(()) => Ok(Some(bytes)),
            Err(InspectError::Store(error)) => Err(error.into()),
            Err(_) => Ok(None),
        }
    }

    fn number(&self, gva: u64, len: u64) -> Result<Option<u64>> {
        Ok(self.bytes(gva, len)?.map(|bytes| number(&bytes)))
    }

    /// The modules on the list whose head is at `head`; None if that is not a list of modules.
    fn list(&self, head: u64, layout: &Layout) -> Result<Option<Vec<Module>>> {
        let mut modules = Vec::new();
        let mut left = BYTES_MAX;
        let Some(mut node) = self.number(head, 8)? else { return Ok(None) };
        while node != head && modules.len() < MODULES_MAX {
            let at = node.wrapping_sub(layout.list);
            let Some(module) = self.module(at, layout, &mut left)? else {
                // A module that is being loaded may be incomplete; but if the first one makes no
                // sense, this is not the list of modules.
                return Ok((!modules.is_empty()).then_some(modules));
            };
            modules.push(module);
            let Some(next) = self.number(node, 8)? else { break };
            node = next;
        }
        Ok(Some(modules))
    }

    fn module(&self, at: u64, layout: &Layout, left: &mut u64) -> Result<Option<Module>> {
        let field = |offset: u64, len| self.number(at.wrapping_add(offset), len);
        let Some(name) = self.bytes(at.wrapping_add(layout.name), NAME_BYTES as u64)? else {
            return Ok(None);
        };
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        let printable = |byte: &u8| byte.is_ascii_graphic();
        let name: Arc<str> = match str::from_utf8(name) {
            Ok(text) if !text.is_empty() && name.iter().all(printable) => text.into(),
            _ => return Ok(None),
        };
        let [code, code_len] = layout.code;
        let (Some(start), Some(len)) = (field(code, 8)?, field(code_len, 4)?) else {
            return Ok(None);
        };
        let code = start..start.saturating_add(len);
        let (Some(count), Some(ips), Some(entries)) =
            (field(layout.orcs, 4)?, field(layout.orc_ips, 8)?, field(layout.orc, 8)?)
        else {
            return Ok(None);
        };
        let (ips_len, entries_len) = (count * ORC_IP_BYTES, count * ORC_BYTES);
        let (mut orc_ips, mut orc) = ((ips, Vec::new()), Vec::new());
        if count <= ENTRIES_MAX && charge(left, ips_len + entries_len) {
            orc_ips.1 = self.bytes(ips, ips_len)?.unwrap_or_default();
            orc = self.bytes(entries, entries_len)?.unwrap_or_default();
        }
        let symbols = match field(layout.kallsyms, 8)? {
            Some(tables) => self.symbols(tables, layout, &name, left)?.unwrap_or_default(),
            None => Vec::new(),
        };
        Ok(Some(Module { name, code, symbols, orc_ips, orc }))
    }

    /// The symbols of the module `name`, from its `struct mod_kallsyms` at `at`.
    fn symbols(
        &self,
        at: u64,
        layout: &Layout,
        name: &Arc<str>,
        left: &mut u64,
    ) -> Result<Option<Vec<Symbol>>> {
        let field = |offset: u64, len| self.number(at.wrapping_add(offset), len);
        let (Some(symtab), Some(count), Some(strtab), Some(typetab)) = (
            field(layout.symtab, 8)?,
            field(layout.symbols, 4)?,
            field(layout.strtab, 8)?,
            field(layout.typetab, 8)?,
        ) else {
            return Ok(None);
        };
        if count > SYMBOLS_MAX || !charge(left, count * (SYMBOL_BYTES as u64 + 1)) {
            return Ok(None);
        }
        let (Some(table), Some(kinds)) =
            (self.bytes(symtab, count * SYMBOL_BYTES as u64)?, self.bytes(typetab, count)?)
        else {
            return Ok(None);
        };
        let entries = || table.chunks_exact(SYMBOL_BYTES).zip(&kinds);
        let name_of = |entry: &[u8]| number(&entry[..4]);
        let longest = entries().map(|(entry, _)| name_of(entry)).max().unwrap_or(0);
        let Some(names) = self.readable_bytes(strtab, longest + SYMBOL_BYTES_MAX, left)? else {
            return Ok(None);
        };
        let symbols = entries().filter_map(|(entry, kind)| {
            let text = names.get(name_of(entry) as usize..)?.split(|byte| *byte == 0).next()?;
            let text = str::from_utf8(text).ok().filter(|text| !text.is_empty())?;
            let [section, address, len_bytes] =
                [6..8, 8..16, 16..24].map(|place| number(&entry[place]));
            (section != 0).then(|| Symbol {
                address,
                len_bytes,
                is_code: matches!(kind, b't' | b'T' | b'w' | b'W'),
                name: text.to_owned(),
                module: Some(Arc::clone(name)),
            })
        });
        Ok(Some(symbols.collect()))
    }

    /// As many of the `len` bytes at `gva` as can be read, page by page.
    fn readable_bytes(&self, gva: u64, len: u64, left: &mut u64) -> Result<Option<Vec<u8>>> {
        if !charge(left, len) {
            return Ok(None);
        }
        let mut all = Vec::new();
        while (all.len() as u64) < len {
            let at = gva.wrapping_add(all.len() as u64);
            let part = (PAGE_BYTES - at % PAGE_BYTES).min(len - all.len() as u64);
            match self.bytes(at, part)? {
                Some(bytes) => all.extend(bytes),
                None => break,
            }
        }
        Ok(Some(all))
    }
}

/// Subtracts `bytes` from the limit `left`; false if that leaves too little.
fn charge(left: &mut u64, bytes: u64) -> bool {
    let enough = bytes <= *left;
    if enough {
        *left -= bytes;
    }
    enough
}
