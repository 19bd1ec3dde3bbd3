//! Symbols: names for addresses.

use std::sync::Arc;

/// A symbol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// Its virtual address.
    pub address: u64,
    /// Its length in bytes; 0 if unknown, in which case it extends to the next symbol.
    pub len_bytes: u64,
    /// Whether it names a function or other executable code.
    pub is_code: bool,
    /// Its name.
    pub name: String,
    /// The module that it belongs to; None for the kernel itself, or a program.
    pub module: Option<Arc<str>>,
}

/// A table of symbols.
#[derive(Clone, Debug, Default)]
pub struct Symbols {
    by_address: Vec<Symbol>,
}

impl Symbols {
    /// A table of `symbols`. Among several at one address, the first one wins.
    #[must_use]
    pub fn new(mut symbols: Vec<Symbol>) -> Self {
        // A stable sort keeps the order of symbols at one address.
        symbols.sort_by_key(|symbol| symbol.address);
        Self { by_address: symbols }
    }

    /// The number of symbols.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_address.len()
    }

    /// True if there are no symbols.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_address.is_empty()
    }

    /// Adds `more` symbols.
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

    /// The addresses of all symbols called `name`, ascending.
    pub fn addresses(&self, name: &str) -> impl Iterator<Item = u64> {
        let named = self.by_address.iter().filter(move |symbol| symbol.name == name);
        named.map(|symbol| symbol.address)
    }

    /// The function that contains `address`, and the offset of `address` in it, in bytes.
    #[must_use]
    pub fn function(&self, address: u64) -> Option<(&Symbol, u64)> {
        let end = self.by_address.partition_point(|symbol| symbol.address <= address);
        let before = &self.by_address[..end];
        let nearest = before.iter().rev().find(|symbol| symbol.is_code)?;
        let next = self.by_address[end..].iter().find(|symbol| symbol.is_code);
        let offset = address - nearest.address;
        // After the last function, or past the end of one of known length, there is none.
        let inside = match nearest.len_bytes {
            0 => next.is_some(),
            len => offset < len,
        };
        // Among several functions at that address, take the first.
        let same = before.partition_point(|symbol| symbol.address < nearest.address);
        let first = before[same..].iter().find(|symbol| symbol.is_code)?;
        inside.then_some((first, offset))
    }
}
