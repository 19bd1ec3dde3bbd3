//! Names of addresses.

use object::{Object, ObjectSection, ObjectSymbol, ReadRef, SectionKind, SymbolKind};

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

    /// Those of a file whose contents lie `offset_bytes` beyond where they were linked to be.
    pub(super) fn of_file<'a, R: ReadRef<'a>>(
        file: &object::File<'a, R>,
        offset_bytes: u64,
    ) -> Self {
        let is_code = |symbol: &object::Symbol<'a, '_, R>| {
            symbol.kind() == SymbolKind::Text
                || symbol
                    .section_index()
                    .and_then(|index| file.section_by_index(index).ok())
                    .is_some_and(|section| section.kind() == SectionKind::Text)
        };
        let symbols = file.symbols().filter(|symbol| !symbol.is_undefined()).filter_map(|symbol| {
            let name = symbol.name().ok().filter(|name| !name.is_empty())?.to_owned();
            let kinds = [SymbolKind::Section, SymbolKind::File];
            (!kinds.contains(&symbol.kind())).then(|| Symbol {
                address: symbol.address().wrapping_add(offset_bytes),
                len_bytes: symbol.size(),
                is_code: is_code(&symbol),
                name,
            })
        });
        Self::new(symbols.collect())
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

    /// The address of the symbol `name`.
    #[must_use]
    pub fn address(&self, name: &str) -> Option<u64> {
        self.by_address.iter().find(|symbol| symbol.name == name).map(|symbol| symbol.address)
    }

    /// The function that `address` is in, and how far from its beginning, in bytes.
    #[must_use]
    pub fn function(&self, address: u64) -> Option<(&str, u64)> {
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
        inside.then_some((first.name.as_str(), offset))
    }
}
