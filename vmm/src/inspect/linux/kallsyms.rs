//! The kernel's own symbol table (kernel/kallsyms.c): names are sequences of tokens, addresses are
//! whole or offsets. Since Linux 6.0 the VMCOREINFO note says where its parts are.

use super::LinuxKernel;
use crate::inspect::memory::{PhysicalMemory, number};
use crate::inspect::symbols::{Symbol, Symbols};
use crate::inspect::{InspectError, Result};

/// More than any kernel has.
const SYMBOLS_MAX: u64 = 4 << 20;
/// More than the longest name that Linux allows (`KSYM_NAME_LEN`).
const NAME_BYTES_MAX: usize = 4096;
/// More than all names of any kernel take, together with the tokens that they are made of.
const NAMES_BYTES_MAX: usize = 64 << 20;
const TOKENS: usize = 256;

/// Reads the table; None if the note does not say where it is, or it makes no sense.
pub(super) fn read(kernel: &LinuxKernel, memory: &dyn PhysicalMemory) -> Result<Option<Symbols>> {
    let found = Table::open(kernel, memory).and_then(|table| match table {
        Some(table) => table.symbols(),
        None => Ok(None),
    });
    match found {
        Err(InspectError::Store(error)) => Err(error.into()),
        // A guest may put anything there.
        Err(_) => Ok(None),
        Ok(symbols) => Ok(symbols),
    }
}

struct Table<'a> {
    kernel: &'a LinuxKernel,
    memory: &'a dyn PhysicalMemory,
    count: u64,
    tokens: Vec<Vec<u8>>,
    names: u64,
    places: Places,
}

/// How addresses are stored.
enum Places {
    /// As 64-bit addresses, in an array at this address.
    Whole(u64),
    /// As 32-bit offsets from `base`, in an array at `at`.
    Offsets { at: u64, base: u64 },
}

impl<'a> Table<'a> {
    fn open(kernel: &'a LinuxKernel, memory: &'a dyn PhysicalMemory) -> Result<Option<Self>> {
        let at = |name: &str| kernel.info.symbol(&format!("kallsyms_{name}"));
        let (Some(names), Some(count), Some(table), Some(index)) =
            (at("names"), at("num_syms"), at("token_table"), at("token_index"))
        else {
            return Ok(None);
        };
        let read = |gva: u64, len: usize| -> Result<Vec<u8>> {
            let mut bytes = vec![0; len];
            kernel.space.read(memory, gva, &mut bytes)?;
            Ok(bytes)
        };
        let places = match (at("offsets"), at("relative_base"), at("addresses")) {
            (Some(offsets), Some(base), _) => {
                Places::Offsets { at: offsets, base: number(&read(base, 8)?) }
            }
            (_, _, Some(addresses)) => Places::Whole(addresses),
            _ => return Ok(None),
        };
        let count = number(&read(count, 4)?);
        if count > SYMBOLS_MAX {
            return Ok(None);
        }
        let index = read(index, TOKENS * 2)?;
        let starts: Vec<u64> = index.chunks_exact(2).map(number).collect();
        let mut tokens = Vec::with_capacity(TOKENS);
        for start in starts {
            let mut token = Vec::new();
            let mut stream = Stream::new(kernel, memory, table.wrapping_add(start));
            while let byte @ 1.. = stream.byte()? {
                if token.len() == NAME_BYTES_MAX {
                    return Ok(None);
                }
                token.push(byte);
            }
            tokens.push(token);
        }
        Ok(Some(Self { kernel, memory, count, tokens, names, places }))
    }

    fn symbols(&self) -> Result<Option<Symbols>> {
        let width = if matches!(self.places, Places::Whole(_)) { 8 } else { 4 };
        let (Places::Whole(at) | Places::Offsets { at, .. }) = self.places;
        let mut bytes = vec![0; self.count as usize * width];
        self.kernel.space.read(self.memory, at, &mut bytes)?;
        let mut stream = Stream::new(self.kernel, self.memory, self.names);
        let mut names_bytes = 0;
        let mut raw = Vec::with_capacity(self.count as usize);
        for place in bytes.chunks_exact(width) {
            let Some((kind, name, tokens)) = self.name(&mut stream)? else { return Ok(None) };
            // Counts tokens too: empty ones take time all the same.
            names_bytes += name.len() + tokens;
            if names_bytes > NAMES_BYTES_MAX {
                return Ok(None);
            }
            raw.push((number(place), kind, name));
        }
        // Since about Linux 6.14 offsets are unsigned. Before, those of per-CPU variables were
        // absolute and not negative, and others counted back from -1. The right one of the two
        // agrees with the note's `_stext`.
        for signed in [true, false] {
            let address = |place: u64| match self.places {
                Places::Whole(_) => place,
                Places::Offsets { base, .. } if !signed => base.wrapping_add(place),
                Places::Offsets { base, .. } => match place as u32 as i32 {
                    absolute @ 0.. => absolute as u64,
                    offset => base.wrapping_sub(1).wrapping_sub(i64::from(offset) as u64),
                },
            };
            let stext = raw.iter().find(|(_, _, name)| name == "_stext");
            if stext.map(|(place, _, _)| address(*place)) == self.kernel.info.symbol("_stext") {
                let symbols = raw.into_iter().map(|(place, kind, name)| Symbol {
                    address: address(place),
                    len_bytes: 0,
                    is_code: matches!(kind, b't' | b'T' | b'w' | b'W'),
                    name,
                    module: None,
                });
                return Ok(Some(Symbols::new(symbols.collect())));
            }
        }
        Ok(None)
    }

    /// Reads the next symbol: the letter for its type, its name, and how many tokens both took.
    fn name(&self, stream: &mut Stream<'_>) -> Result<Option<(u8, String, usize)>> {
        let mut tokens = usize::from(stream.byte()?);
        // Long names take two bytes since Linux 6.1.
        if tokens & 0x80 != 0 {
            tokens = tokens & 0x7f | usize::from(stream.byte()?) << 7;
        }
        let mut name = Vec::new();
        for _ in 0..tokens {
            name.extend_from_slice(&self.tokens[usize::from(stream.byte()?)]);
            if name.len() > NAME_BYTES_MAX {
                return Ok(None);
            }
        }
        let Some((kind, name)) = name.split_first() else { return Ok(None) };
        Ok(String::from_utf8(name.to_vec()).ok().map(|name| (*kind, name, tokens)))
    }
}

/// Reads bytes from a virtual address on, a page at a time.
struct Stream<'a> {
    kernel: &'a LinuxKernel,
    memory: &'a dyn PhysicalMemory,
    next: u64,
    page: Vec<u8>,
    at: usize,
}

impl<'a> Stream<'a> {
    fn new(kernel: &'a LinuxKernel, memory: &'a dyn PhysicalMemory, gva: u64) -> Self {
        Self { kernel, memory, next: gva, page: Vec::new(), at: 0 }
    }

    fn byte(&mut self) -> Result<u8> {
        if self.at == self.page.len() {
            self.page.resize((4096 - self.next % 4096) as usize, 0);
            self.kernel.space.read(self.memory, self.next, &mut self.page)?;
            self.next = self.next.wrapping_add(self.page.len() as u64);
            self.at = 0;
        }
        self.at += 1;
        Ok(self.page[self.at - 1])
    }
}
