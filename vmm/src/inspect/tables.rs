//! Lists everything that page tables map, as ranges.

use std::ops::{ControlFlow, RangeInclusive};

use super::memory::{PhysicalMemory, number};
use super::space::{AddressSpace, Caching, Entry, GLOBAL, Level, NO_EXECUTE, USER, WRITABLE};
use super::{InspectError, Result};

/// The most tables that one listing reads. A guest with 1 TiB in pages of 4 KiB has half as many.
pub const TABLES_MAX: u64 = 1 << 20;
/// Bits of an entry that the processor sets when it uses the entry: accessed and dirty.
const TOUCHED: u64 = 0x60;
/// The most bad entries that a report lists.
const BAD_MAX: usize = 16;

/// Access rights to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// It may be written.
    pub write: bool,
    /// It may be executed.
    pub execute: bool,
    /// User mode may access it too.
    pub user: bool,
}

/// A range of adjacent addresses that are mapped alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedRange {
    /// The first virtual address.
    pub gva: u64,
    /// Length in bytes.
    pub len_bytes: u64,
    /// Its guest physical address, if it is contiguous there.
    pub gpa: Option<u64>,
    /// Size of the pages, in bytes.
    pub page_bytes: u64,
    /// Access rights.
    pub access: Access,
    /// Whether it stays in the TLB when CR3 changes.
    pub global: bool,
    /// How it is cached.
    pub caching: Caching,
}

/// A finding of a walk over page tables. Findings come in order of ascending addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// A mapped range.
    Range(MappedRange),
    /// The same tables again: the mappings of the `span_bytes` before `gva` are repeated `times`
    /// more times, back to back.
    Repeated {
        /// The first address of the first repetition.
        gva: u64,
        /// Length of one repetition, in bytes.
        span_bytes: u64,
        /// The number of repetitions.
        times: u64,
    },
}

/// When adjacent pages are joined to one range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Joining {
    /// If they are mapped alike.
    Alike,
    /// If they are mapped alike, and are adjacent in guest physical memory too.
    Contiguous,
}

/// An entry that the processor cannot follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadEntry {
    /// It refers to a table outside RAM.
    NoTable {
        /// The first virtual address that the entry is for.
        gva: u64,
        /// The kind of table that it refers to.
        level: &'static str,
        /// The guest physical address that it refers to.
        table_gpa: u64,
    },
    /// It has reserved bits set.
    Reserved {
        /// The first virtual address that the entry is for.
        gva: u64,
        /// The kind of table that the entry is in.
        level: &'static str,
        /// The entry.
        entry: u64,
        /// Those of its bits that should be 0.
        bits: u64,
    },
}

/// The result of a walk over page tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TablesReport {
    /// Tables read.
    pub tables: u64,
    /// Number of bad entries.
    pub bad_entries: u64,
    /// The first of those entries.
    pub bad: Vec<BadEntry>,
}

impl AddressSpace {
    /// Passes everything that is mapped in `addresses` to `visit`, in ascending order, until
    /// `visit` returns `Break`. Without paging there is nothing to find.
    ///
    /// # Errors
    /// [`InspectError::NoTable`] if the root table is outside RAM; [`InspectError::TooManyTables`];
    /// errors of `memory`. Other tables outside RAM are in the report.
    pub fn mapped(
        &self,
        memory: &dyn PhysicalMemory,
        addresses: RangeInclusive<u64>,
        joining: Joining,
        visit: &mut dyn FnMut(Found) -> ControlFlow<()>,
    ) -> Result<TablesReport> {
        let levels = self.levels();
        let mut walk = Walk {
            space: *self,
            memory,
            addresses,
            joining,
            visit,
            pending: None,
            report: TablesReport::default(),
            emitted: 0,
        };
        if let Some(first) = levels.first() {
            let bytes = (self.entry_bytes() << first.bits) as u64;
            if !memory.has(self.root_gpa, bytes) {
                let (gva, level) = (*walk.addresses.start(), first.name);
                return Err(InspectError::NoTable { gva, level, table_gpa: self.root_gpa });
            }
            let stopped = walk.table(levels, self.root_gpa, 0, ALL)?;
            if stopped.is_continue() {
                let _the_last = walk.flush();
            }
        }
        Ok(walk.report)
    }
}

const ALL: Access = Access { write: true, execute: true, user: true };

struct Walk<'a> {
    space: AddressSpace,
    memory: &'a dyn PhysicalMemory,
    addresses: RangeInclusive<u64>,
    joining: Joining,
    visit: &'a mut dyn FnMut(Found) -> ControlFlow<()>,
    pending: Option<MappedRange>,
    report: TablesReport,
    /// Number of ranges begun, from which a caller can tell how many a table yielded.
    emitted: u64,
}

/// A page that an entry maps.
struct Page {
    gpa: u64,
    bytes: u64,
    access: Access,
    caching: Caching,
    global: bool,
}

/// Whether to continue the walk.
type Flow = Result<ControlFlow<()>>;

impl Walk<'_> {
    /// Walks the table at `gpa`, which is of the first of `levels` and maps addresses from `base`
    /// on. Recursion ends with the levels, even if a table refers to itself.
    fn table(&mut self, levels: &[Level], gpa: u64, base: u64, allowed: Access) -> Flow {
        let Some((level, below)) = levels.split_first() else {
            return Ok(ControlFlow::Continue(()));
        };
        self.report.tables += 1;
        if self.report.tables > TABLES_MAX {
            return Err(InspectError::TooManyTables);
        }
        let size = self.space.entry_bytes();
        let mut bytes = [0; 4096];
        let bytes = &mut bytes[..size << level.bits];
        self.memory.read(gpa, bytes)?;
        let entries: Vec<u64> = bytes.chunks_exact(size).map(number).collect();
        let span = 1_u64 << level.shift;
        let mut index = 0;
        while index < entries.len() {
            let first = base + index as u64 * span;
            let entry = entries[index];
            index += 1;
            if !self.wants(first, span) {
                continue;
            }
            let is_last = below.is_empty();
            let access = allowed.with(&self.space, level, entry);
            match self.space.decode(level, is_last, entry) {
                Entry::Absent => {}
                Entry::Reserved(bits) => {
                    let (gva, level) = (self.space.canonical(first), level.name);
                    self.bad(BadEntry::Reserved { gva, level, entry, bits }, 1);
                }
                Entry::Page(gpa) => {
                    let caching = self.space.caching(is_last, entry);
                    let global = entry & GLOBAL != 0;
                    let page = Page { gpa, bytes: span, access, caching, global };
                    if self.page(first, &page).is_break() {
                        return Ok(ControlFlow::Break(()));
                    }
                }
                Entry::Table(next) => {
                    // Of consecutive entries for the same table, only the first is followed.
                    let like = |other: &&u64| **other | TOUCHED == entry | TOUCHED;
                    let same = 1 + entries[index..].iter().take_while(like).count();
                    let again = self.wanted_whole(first, span, same);
                    if self.below(below, next, first, access, again)?.is_break() {
                        return Ok(ControlFlow::Break(()));
                    }
                    index += again as usize - 1;
                }
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn bad(&mut self, entry: BadEntry, times: u64) {
        self.report.bad_entries += times;
        if self.report.bad.len() < BAD_MAX {
            self.report.bad.push(entry);
        }
    }

    /// Walks the table at `gpa`, which maps `times` consecutive spans from `first` on.
    fn below(
        &mut self,
        levels: &[Level],
        gpa: u64,
        first: u64,
        allowed: Access,
        times: u64,
    ) -> Flow {
        let Some(level) = levels.first() else { return Ok(ControlFlow::Continue(())) };
        let span = 1_u64 << (level.shift + level.bits);
        let table_bytes = (self.space.entry_bytes() << level.bits) as u64;
        if !self.memory.has(gpa, table_bytes) {
            let gva = self.space.canonical(first);
            self.bad(BadEntry::NoTable { gva, level: level.name, table_gpa: gpa }, times);
            return Ok(ControlFlow::Continue(()));
        }
        if times == 1 {
            return self.table(levels, gpa, first, allowed);
        }
        let before = self.emitted;
        // The table's ranges must not be joined with the one before.
        if self.flush().is_break() || self.table(levels, gpa, first, allowed)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        let gva = self.space.canonical(first);
        match &mut self.pending {
            // The whole span is one range: repetitions make it longer.
            Some(range)
                if self.emitted == before + 1
                    && (range.gva, range.len_bytes) == (gva, span)
                    && self.joining == Joining::Alike =>
            {
                range.len_bytes = span * times;
                range.gpa = None;
                Ok(ControlFlow::Continue(()))
            }
            None if self.emitted == before => Ok(ControlFlow::Continue(())),
            _ => {
                if self.flush().is_break() {
                    return Ok(ControlFlow::Break(()));
                }
                let gva = self.space.canonical(first + span);
                Ok((self.visit)(Found::Repeated { gva, span_bytes: span, times: times - 1 }))
            }
        }
    }

    /// True if some of the `span` addresses from `first` on were asked for.
    fn wants(&self, first: u64, span: u64) -> bool {
        let gva = self.space.canonical(first);
        gva <= *self.addresses.end() && gva + (span - 1) >= *self.addresses.start()
    }

    /// How many of the `count` spans from `first` on were asked for as a whole and are consecutive;
    /// 1 if the first was asked for only in part.
    fn wanted_whole(&self, first: u64, span: u64, count: usize) -> u64 {
        let whole = |index: u64| {
            let gva = self.space.canonical(first + index * span);
            self.addresses.contains(&gva) && self.addresses.contains(&(gva + (span - 1)))
        };
        // The lower and upper half of the canonical addresses are not adjacent.
        let follows = |index: u64| {
            let step = self.space.canonical(first + index * span);
            step == self.space.canonical(first).wrapping_add(index * span)
        };
        (0..count as u64).take_while(|index| whole(*index) && follows(*index)).count().max(1) as u64
    }

    fn page(&mut self, first: u64, page: &Page) -> ControlFlow<()> {
        let Page { gpa, bytes, access, caching, global } = *page;
        let gva = self.space.canonical(first);
        // Only the part that was asked for.
        let start = gva.max(*self.addresses.start());
        let last = (gva + (bytes - 1)).min(*self.addresses.end());
        let range = MappedRange {
            gva: start,
            len_bytes: last - start + 1,
            gpa: Some(gpa + (start - gva)),
            page_bytes: bytes,
            access,
            global,
            caching,
        };
        if let Some(pending) = &mut self.pending
            && pending.is_followed_by(&range)
        {
            let contiguous =
                pending.gpa.is_some_and(|gpa| Some(gpa + pending.len_bytes) == range.gpa);
            if contiguous || self.joining == Joining::Alike {
                pending.len_bytes += range.len_bytes;
                pending.gpa = pending.gpa.filter(|_| contiguous);
                return ControlFlow::Continue(());
            }
        }
        let flow = self.flush();
        self.pending = Some(range);
        self.emitted += 1;
        flow
    }

    fn flush(&mut self) -> ControlFlow<()> {
        match self.pending.take() {
            Some(range) => (self.visit)(Found::Range(range)),
            None => ControlFlow::Continue(()),
        }
    }
}

impl MappedRange {
    fn is_followed_by(&self, next: &Self) -> bool {
        self.gva.checked_add(self.len_bytes) == Some(next.gva)
            && self.page_bytes == next.page_bytes
            && (self.access, self.global, self.caching) == (next.access, next.global, next.caching)
    }
}

impl Access {
    /// The rights that remain after `entry`.
    fn with(self, space: &AddressSpace, level: &Level, entry: u64) -> Self {
        if !level.has_rights {
            return self;
        }
        Self {
            write: self.write && entry & WRITABLE != 0,
            execute: self.execute && (!space.has_no_execute || entry & NO_EXECUTE == 0),
            user: self.user && entry & USER != 0,
        }
    }
}
