//! Names of addresses.

use std::sync::Arc;

/// A symbol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// Its virtual address.
    pub address: u64,
    /// Its length in bytes, 0 if that is not known: then it goes to the next one.
    pub len_bytes: u64,
    /// It is a function, or something else that is run.
    pub is_code: bool,
    /// Its name.
    pub name: String,
    /// The module that it is of; none if it is of the kernel itself, or of a program.
    pub module: Option<Arc<str>>,
}

/// Symbols, to be looked up.
#[derive(Clone, Debug, Default)]
pub struct Symbols {
    by_address: Vec<Symbol>,
}

impl Symbols {
    /// These.
    #[must_use]
    pub fn new(mut symbols: Vec<Symbol>) -> Self {
        // Of several at one address, the first that was told counts.
        symbols.sort_by_key(|symbol| symbol.address);
        Self { by_address: symbols }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_address.len()
    }

    /// True if there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_address.is_empty()
    }

    /// These too.
    #[must_use]
    pub fn with(self, more: Vec<Symbol>) -> Self {
        let mut symbols = self.by_address;
        symbols.extend(more);
        Self::new(symbols)
    }

    /// The address of the symbol `name`.
    #[must_use]
    pub fn address(&self, name: &str) -> Option<u64> {
        self.by_address.iter().find(|symbol| symbol.name == name).map(|symbol| symbol.address)
    }

    /// The addresses of all symbols `name`, ascending.
    pub fn addresses(&self, name: &str) -> impl Iterator<Item = u64> {
        let named = self.by_address.iter().filter(move |symbol| symbol.name == name);
        named.map(|symbol| symbol.address)
    }

    /// The function that `address` is in, and how far from its beginning, in bytes.
    #[must_use]
    pub fn function(&self, address: u64) -> Option<(&Symbol, u64)> {
        let end = self.by_address.partition_point(|symbol| symbol.address <= address);
        let before = &self.by_address[..end];
        let nearest = before.iter().rev().find(|symbol| symbol.is_code)?;
        let next = self.by_address[end..].iter().find(|symbol| symbol.is_code);
        let offset = address - nearest.address;
        // Behind the last one, or behind one that says how long it is, there is none.
        let inside = match nearest.len_bytes {
            0 => next.is_some(),
            len => offset < len,
        };
        // The first of those at that address.
        let same = before.partition_point(|symbol| symbol.address < nearest.address);
        let first = before[same..].iter().find(|symbol| symbol.is_code)?;
        inside.then_some((first, offset))
    }
}
