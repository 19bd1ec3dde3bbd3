//! Checks the walker against page tables built from a list of mappings, and against tables that
//! make no sense.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use proptest::prelude::*;

use super::memory::not_ram;
use super::*;
use crate::memory::RamRange;

/// Guest physical memory that starts at 0.
pub(super) struct Ram(pub(super) Vec<u8>);

impl PhysicalMemory for Ram {
    fn read(&self, gpa: u64, out: &mut [u8]) -> Result<()> {
        let all = RamRange { gpa: 0, len_bytes: self.0.len() as u64, file_offset: 0 };
        if !self.has(gpa, out.len() as u64) {
            return Err(not_ram(gpa, out.len() as u64, &[all]));
        }
        out.copy_from_slice(&self.0[gpa as usize..][..out.len()]);
        Ok(())
    }

    fn has(&self, gpa: u64, len_bytes: u64) -> bool {
        gpa.checked_add(len_bytes).is_some_and(|end| end <= self.0.len() as u64)
    }
}

/// A paging mode, as in the manuals: the lowest bit and the width of each level's index, from the
/// root on; the size of an entry; which levels can map pages.
struct Shape {
    mode: PagingMode,
    levels: &'static [(u32, u32)],
    entry_bytes: usize,
    leaves: &'static [usize],
    /// Number of levels, from the root on, whose entries have no rights.
    without_rights: usize,
}

const SHAPES: [Shape; 5] = [
    Shape {
        mode: PagingMode::FourLevel,
        levels: &[(39, 9), (30, 9), (21, 9), (12, 9)],
        entry_bytes: 8,
        leaves: &[1, 2, 3],
        without_rights: 0,
    },
    Shape {
        mode: PagingMode::FiveLevel,
        levels: &[(48, 9), (39, 9), (30, 9), (21, 9), (12, 9)],
        entry_bytes: 8,
        leaves: &[2, 3, 4],
        without_rights: 0,
    },
    Shape {
        mode: PagingMode::Pae,
        levels: &[(30, 2), (21, 9), (12, 9)],
        entry_bytes: 8,
        leaves: &[1, 2],
        without_rights: 1,
    },
    Shape {
        mode: PagingMode::Bits32 { large_pages: true },
        levels: &[(22, 10), (12, 10)],
        entry_bytes: 4,
        leaves: &[0, 1],
        without_rights: 0,
    },
    Shape {
        mode: PagingMode::Bits32 { large_pages: false },
        levels: &[(22, 10), (12, 10)],
        entry_bytes: 4,
        leaves: &[1],
        without_rights: 0,
    },
];

/// Access rights: writable, accessible to user mode, executable.
type Rights = (bool, bool, bool);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Page {
    gpa: u64,
    bytes: u64,
    rights: Rights,
}

/// Builds tables, and keeps what they map.
struct Builder {
    shape: &'static Shape,
    ram: Ram,
    next_table: u64,
    root_gpa: u64,
    /// By level and the address's bits from there on up: the table below, and its entry's rights.
    tables: BTreeMap<(usize, u64), (u64, Rights)>,
    pages: BTreeMap<u64, Page>,
}

const TABLE_PAGES: u64 = 96;

impl Builder {
    fn new(shape: &'static Shape) -> Self {
        let ram = Ram(vec![0; (TABLE_PAGES * 4096) as usize]);
        // Not at 0, so that a missing table is not found there by chance.
        let (root_gpa, next_table) = (0x3000, 0x4000);
        let (tables, pages) = (BTreeMap::new(), BTreeMap::new());
        Self { shape, ram, next_table, root_gpa, tables, pages }
    }

    fn space(&self) -> AddressSpace {
        let has_no_execute = self.shape.entry_bytes == 8;
        AddressSpace { has_no_execute, ..AddressSpace::new(self.shape.mode, self.root_gpa) }
    }

    fn bits(&self) -> u32 {
        let (shift, width) = self.shape.levels[0];
        shift + width
    }

    /// The canonical form of `gva`.
    fn canonical(&self, gva: u64) -> u64 {
        let bits = self.bits();
        let low = gva & (u64::MAX >> (64 - bits));
        let long = self.shape.levels.len() > 3;
        if long && low >> (bits - 1) == 1 { low | u64::MAX << bits } else { low }
    }

    fn flags(&self, (write, user, execute): Rights) -> u64 {
        let no_execute = if self.shape.entry_bytes == 8 && !execute { 1 << 63 } else { 0 };
        1 | u64::from(write) << 1 | u64::from(user) << 2 | no_execute
    }

    fn put(&mut self, table_gpa: u64, index: u64, entry: u64) {
        let bytes = self.shape.entry_bytes;
        let at = table_gpa as usize + index as usize * bytes;
        self.ram.0[at..at + bytes].copy_from_slice(&entry.to_le_bytes()[..bytes]);
    }

    /// Maps a page of level `leaf` at `gva`, unless something is mapped there.
    fn map(&mut self, gva: u64, leaf: usize, gpa: u64, rights: [Rights; 5]) {
        let (shift, _) = self.shape.levels[leaf];
        let size = 1_u64 << shift;
        let base = self.canonical(gva) & !(size - 1);
        let overlaps = |(start, page): (&u64, &Page)| {
            let (first, last) = (*start, start + (page.bytes - 1));
            first <= base + (size - 1) && base <= last
        };
        if self.pages.iter().any(overlaps) {
            return;
        }
        let mut table = self.root_gpa;
        let mut allowed = (true, true, true);
        let and = |a: Rights, b: Rights| (a.0 && b.0, a.1 && b.1, a.2 && b.2);
        for (level, wished) in rights.into_iter().enumerate().take(leaf + 1) {
            let (shift, width) = self.shape.levels[level];
            let index = base >> shift & ((1 << width) - 1);
            let own = if level < self.shape.without_rights { (true, true, true) } else { wished };
            if level == leaf {
                allowed = and(allowed, own);
                let address_bits = if self.shape.entry_bytes == 4 { 32 } else { 46 };
                let gpa = gpa & !(size - 1) & (u64::MAX >> (64 - address_bits));
                let large = if level + 1 < self.shape.levels.len() { 1 << 7 } else { 0 };
                self.put(table, index, gpa | self.flags(own) | large);
                self.pages.insert(base, Page { gpa, bytes: size, rights: allowed });
                return;
            }
            let key = (level, base >> shift);
            let (next, own) = match self.tables.get(&key) {
                Some(found) => *found,
                None if self.next_table >= TABLE_PAGES * 4096 => return,
                None => {
                    let next = self.next_table;
                    self.next_table += 4096;
                    // Reserved bits in PAE's first level are 0.
                    let flags = if level < self.shape.without_rights { 1 } else { self.flags(own) };
                    self.put(table, index, next | flags);
                    self.tables.insert(key, (next, own));
                    (next, own)
                }
            };
            allowed = and(allowed, own);
            table = next;
        }
    }

    fn page(&self, gva: u64) -> Option<(u64, Page)> {
        let (start, page) = self.pages.range(..=gva).next_back()?;
        (gva - start < page.bytes).then_some((*start, *page))
    }

    fn expected_rights(&self, page: &Page) -> Rights {
        let (write, user, execute) = page.rights;
        (write, user, execute || self.shape.entry_bytes == 4)
    }
}

#[derive(Clone, Debug)]
struct Wish {
    gva: u64,
    leaf: usize,
    gpa: u64,
    rights: [Rights; 5],
}

/// Addresses near each other and near both ends, so that pages become adjacent.
fn addresses() -> impl Strategy<Value = u64> {
    let near = (0_u64..6, 0_u64..3, 0_u64..6, 0_u64..5)
        .prop_map(|(a, b, c, d)| a << 39 | b << 30 | c << 21 | d << 12);
    prop_oneof![near.clone(), near.prop_map(|gva| !gva), any::<u64>()]
}

fn wishes() -> impl Strategy<Value = Vec<Wish>> {
    let rights = any::<[Rights; 5]>();
    let wish = (addresses(), 0_usize..3, any::<u64>(), rights)
        .prop_map(|(gva, leaf, gpa, rights)| Wish { gva, leaf, gpa, rights });
    proptest::collection::vec(wish, 1..30)
}

fn built(shape: &'static Shape, wishes: &[Wish]) -> Builder {
    let mut builder = Builder::new(shape);
    for wish in wishes {
        let leaf = shape.leaves[wish.leaf % shape.leaves.len()];
        builder.map(wish.gva, leaf, wish.gpa, wish.rights);
    }
    builder
}

fn all_of(builder: &Builder, joining: Joining) -> Vec<Found> {
    let mut all = Vec::new();
    builder
        .space()
        .mapped(&builder.ram, 0..=u64::MAX, joining, &mut |found| {
            all.push(found);
            ControlFlow::Continue(())
        })
        .expect("tables that make sense");
    all
}

proptest! {
    #[test]
    fn addresses_lead_where_they_were_mapped_to(
        shape in 0..SHAPES.len(), wishes in wishes(), probes in proptest::collection::vec(addresses(), 20),
    ) {
        let builder = built(&SHAPES[shape], &wishes);
        let space = builder.space();
        let inside = builder.pages.iter().flat_map(|(start, page)| {
            [*start, start + page.bytes / 3, start + (page.bytes - 1), start.wrapping_sub(1), start.wrapping_add(page.bytes)]
        });
        for gva in inside.chain(probes).map(|gva| builder.canonical(gva)) {
            match (space.translate(&builder.ram, gva), builder.page(gva)) {
                (Ok(found), Some((start, page))) => {
                    prop_assert_eq!(found.gpa, page.gpa + (gva - start), "{:#x}", gva);
                    let rights = (found.writable, found.user, found.executable);
                    prop_assert_eq!((found.page_bytes, rights), (page.bytes, builder.expected_rights(&page)));
                }
                (Err(InspectError::NotMapped { gva: told, .. }), None) => prop_assert_eq!(told, gva),
                (found, expected) => prop_assert!(false, "{gva:#x}: {found:?}, expected {expected:?}"),
            }
        }
    }

    #[test]
    fn ranges_are_what_was_mapped(shape in 0..SHAPES.len(), wishes in wishes()) {
        let builder = built(&SHAPES[shape], &wishes);
        for joining in [Joining::Alike, Joining::Contiguous] {
            let mut bytes = 0;
            let mut last = None;
            for found in all_of(&builder, joining) {
                let Found::Range(range) = found else { panic!("nothing is there twice: {found:?}") };
                prop_assert!(last.is_none_or(|last| last < range.gva), "ascending");
                last = Some(range.gva + (range.len_bytes - 1));
                bytes += range.len_bytes;
                // Checks each page of the range.
                let mut at = range.gva;
                loop {
                    let (start, page) = builder.page(at).expect("mapped");
                    prop_assert_eq!(start, at);
                    let rights = (range.access.write, range.access.user, range.access.execute);
                    prop_assert_eq!(rights, builder.expected_rights(&page));
                    prop_assert_eq!(range.page_bytes, page.bytes);
                    if let Some(gpa) = range.gpa {
                        prop_assert_eq!(page.gpa, gpa + (at - range.gva));
                    }
                    prop_assert!(range.gpa.is_some() || joining == Joining::Alike);
                    if at + (page.bytes - 1) == range.gva + (range.len_bytes - 1) {
                        break;
                    }
                    at += page.bytes;
                }
            }
            prop_assert_eq!(bytes, builder.pages.values().map(|page| page.bytes).sum::<u64>());
        }
    }

    #[test]
    fn a_part_is_that_part_of_the_whole(
        shape in 0..SHAPES.len(), wishes in wishes(), first in addresses(), len in 0_u64..1 << 31,
    ) {
        let builder = built(&SHAPES[shape], &wishes);
        let first = builder.canonical(first);
        let last = first.saturating_add(len);
        let mut part = Vec::new();
        let report = builder.space().mapped(&builder.ram, first..=last, Joining::Contiguous, &mut |found| {
            part.push(found);
            ControlFlow::Continue(())
        });
        prop_assert!(report.is_ok());
        let clipped = all_of(&builder, Joining::Contiguous).into_iter().filter_map(|found| {
            let Found::Range(range) = found else { return None };
            let start = range.gva.max(first);
            let end = (range.gva + (range.len_bytes - 1)).min(last);
            (start <= end).then(|| Found::Range(MappedRange {
                gva: start,
                len_bytes: end - start + 1,
                gpa: range.gpa.map(|gpa| gpa + (start - range.gva)),
                ..range
            }))
        });
        prop_assert_eq!(part, clipped.collect::<Vec<_>>());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever is in memory, a walk ends and reports what is wrong.
    #[test]
    fn nonsense_ends(
        shape in 0..SHAPES.len(),
        entries in proptest::collection::vec((0_u64..8 * 512, any::<u64>(), 0_u64..9), 0..2000),
        fill in prop_oneof![Just(0_u64), 1_u64..8],
    ) {
        let shape = &SHAPES[shape];
        let mut builder = Builder::new(shape);
        builder.ram.0.truncate(8 * 4096);
        if fill > 0 {
            // Every entry of every table refers to the same table.
            let (entry, bytes) = (fill << 12 | 7, shape.entry_bytes);
            for place in builder.ram.0.chunks_exact_mut(bytes) {
                place.copy_from_slice(&entry.to_le_bytes()[..bytes]);
            }
        }
        for (place, noise, page) in entries {
            let entry = if page == 8 { noise } else { page << 12 | noise & 0x1e7 };
            builder.ram.0[place as usize * 8..][..8].copy_from_slice(&entry.to_le_bytes());
        }
        let mut found = 0_u64;
        let looked = builder.space().mapped(&builder.ram, 0..=u64::MAX, Joining::Alike, &mut |_| {
            found += 1;
            if found == 100_000 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        match looked {
            Ok(report) => prop_assert!(report.tables <= TABLES_MAX && report.bad.len() <= 16),
            Err(error) => prop_assert!(matches!(error, InspectError::TooManyTables), "{error}"),
        }
        let _whatever = builder.space().translate(&builder.ram, 0x1234_5678);
    }
}

#[test]
fn a_table_that_leads_to_itself_is_told_in_a_few_words() {
    let mut builder = Builder::new(&SHAPES[0]);
    for index in 0..512 {
        builder.put(builder.root_gpa, index, builder.root_gpa | 3);
    }
    let mut all = Vec::new();
    let report = builder
        .space()
        .mapped(&builder.ram, 0..=u64::MAX, Joining::Alike, &mut |found| {
            all.push(found);
            ControlFlow::Continue(())
        })
        .expect("it ends");
    assert!(report.tables <= 8, "{report:?}");
    // Everything in both halves of the addresses.
    let [Found::Range(low), Found::Range(high)] = all[..] else { panic!("{all:?}") };
    assert_eq!((low.gva, low.len_bytes), (0, 1 << 47));
    assert_eq!((high.gva, high.len_bytes), (0xffff_8000_0000_0000, 1 << 47));
}

#[test]
fn tables_that_take_turns_with_each_other_are_too_many() {
    let mut builder = Builder::new(&SHAPES[1]);
    for table in [0x3000, 0x5000] {
        for index in 0..512 {
            builder.put(table, index, if index % 2 == 0 { 0x3003 } else { 0x5003 });
        }
    }
    let all = |_| ControlFlow::Continue(());
    let looked = builder.space().mapped(&builder.ram, 0..=u64::MAX, Joining::Alike, &mut { all });
    assert!(matches!(looked, Err(InspectError::TooManyTables)), "{looked:?}");
}

#[test]
fn tables_outside_ram_are_told() {
    let mut builder = Builder::new(&SHAPES[0]);
    builder.map(0x1000, 3, 0x9000, [(true, true, true); 5]);
    builder.put(builder.root_gpa, 1, 0xdead_beef_f003);
    let mut found = 0;
    let report = builder
        .space()
        .mapped(&builder.ram, 0..=u64::MAX, Joining::Alike, &mut |_| {
            found += 1;
            ControlFlow::Continue(())
        })
        .expect("the rest is read");
    assert_eq!((found, report.bad_entries), (1, 1));
    let level = "page directory pointer table";
    assert_eq!(
        report.bad,
        [BadEntry::NoTable { gva: 1 << 39, level, table_gpa: 0xdead_beef_f000 }]
    );
    let looked = builder.space().translate(&builder.ram, 1 << 39);
    let Err(InspectError::NoTable { table_gpa: 0xdead_beef_f000, .. }) = looked else {
        panic!("{looked:?}");
    };
    let nowhere = AddressSpace { root_gpa: 1 << 40, ..builder.space() };
    assert!(matches!(nowhere.translate(&builder.ram, 0), Err(InspectError::NoTable { .. })));
    let looked =
        nowhere.mapped(&builder.ram, 0..=9, Joining::Alike, &mut |_| ControlFlow::Continue(()));
    assert!(matches!(looked, Err(InspectError::NoTable { .. })));
}

#[test]
fn large_pages_beyond_4_gib_and_odd_addresses() {
    let mut builder = Builder::new(&SHAPES[3]);
    // PSE-36: bits 13 to 20 of the entry are bits 32 to 39 of the address.
    builder.put(builder.root_gpa, 3, 0x1040_0000 | 5 << 13 | 0x83);
    let found = builder.space().translate(&builder.ram, 0x00c0_1234).expect("mapped");
    assert_eq!((found.gpa, found.page_bytes), (0x5_1040_1234, 4 << 20));
    let space = builder.space();
    for (mode, gva) in [
        (PagingMode::FourLevel, 0x0000_8000_0000_0000),
        (PagingMode::FiveLevel, 0x0100_0000_0000_0000),
        (PagingMode::Pae, 1 << 32),
    ] {
        let looked = AddressSpace { mode, ..space }.translate(&builder.ram, gva);
        assert!(matches!(looked, Err(InspectError::NoSuchAddress { .. })), "{mode:?}: {looked:?}");
    }
    // Without paging there is no long mode: addresses have 32 bits.
    let off = AddressSpace { mode: PagingMode::Off, ..space };
    assert_eq!(off.translate(&builder.ram, 0xfedc_ba98).expect("itself").gpa, 0xfedc_ba98);
    let looked = off.translate(&builder.ram, 1 << 32);
    let Err(error @ InspectError::NoSuchAddress { .. }) = looked else { panic!("{looked:?}") };
    assert!(error.to_string().contains("below 0x100000000"), "{error}");
}

/// The reserved bits in the manuals: those of a table's entry, and of pages of each size.
#[test]
fn entries_that_a_processor_faults_on_map_nothing() {
    let cases: [(usize, u64, usize, u64); 13] = [
        // Shape; address; depth of the table whose entry is changed; the bit set in it.
        (0, 0x1000, 0, 1 << 7),  // a page of 512 GiB
        (0, 0x1000, 3, 1 << 45), // beyond the processor's addresses
        (0, 0x1000, 1, 1 << 51),
        (0, 0x20_0000, 2, 1 << 13), // a page of 2 MiB that begins elsewhere
        (0, 0x20_0000, 2, 1 << 20),
        (0, 0x4000_0000, 1, 1 << 29), // one of 1 GiB
        (1, 0x1000, 0, 1 << 7),
        (1, 0x1000, 1, 1 << 7),
        (2, 0x1000, 0, 1 << 1), // PAE's first table has no rights
        (2, 0x1000, 0, 1 << 63),
        (2, 0x1000, 2, 1 << 52),
        (2, 0x20_0000, 1, 1 << 62),
        (3, 0x40_0000, 0, 1 << 21), // a page of 4 MiB
    ];
    for (shape, gva, at, change) in cases {
        let shape = &SHAPES[shape];
        let leaf = match gva {
            0x1000 => shape.levels.len() - 1,
            0x4000_0000 => 1,
            _ => shape.levels.len() - 2,
        };
        let mut builder = Builder::new(shape);
        builder.map(gva, leaf, 0, [(true, true, true); 5]);
        let space = AddressSpace { physical_bits: 45, ..builder.space() };
        let found = space.translate(&builder.ram, gva).expect("it is mapped");
        let step = found.steps[at];
        let entry_bytes = shape.entry_bytes;
        let entry = (step.entry | change).to_le_bytes();
        builder.ram.0[step.entry_gpa as usize..][..entry_bytes]
            .copy_from_slice(&entry[..entry_bytes]);
        let looked = space.translate(&builder.ram, gva);
        let Err(InspectError::Reserved { bits, entry_gpa, level, .. }) = looked else {
            panic!("{:?} {gva:#x} {change:#x}: {looked:?}", shape.mode);
        };
        assert_eq!((bits, entry_gpa, level), (change, step.entry_gpa, step.level));
        let report = space
            .mapped(&builder.ram, 0..=u64::MAX, Joining::Alike, &mut |found| {
                panic!("nothing is mapped: {found:?}")
            })
            .expect("tables are read");
        let [BadEntry::Reserved { bits, .. }] = report.bad[..] else { panic!("{report:?}") };
        assert_eq!((bits, report.bad_entries), (change, 1));
    }
    // A bit reserved on one processor is part of an address on another, or forbids execution.
    let mut builder = Builder::new(&SHAPES[0]);
    builder.map(0x1000, 3, 1 << 45, [(true, true, false); 5]);
    let space = builder.space();
    assert_eq!(space.translate(&builder.ram, 0x1000).expect("mapped").gpa, 1 << 45);
    let narrow = AddressSpace { physical_bits: 45, ..space };
    assert!(matches!(narrow.translate(&builder.ram, 0x1000), Err(InspectError::Reserved { .. })));
    let old = AddressSpace { has_no_execute: false, ..space };
    let looked = old.translate(&builder.ram, 0x1000);
    assert!(matches!(looked, Err(InspectError::Reserved { bits, .. }) if bits == 1 << 63));
}

#[test]
fn pages_are_cached_as_the_attribute_table_says() {
    use Caching::{
        Uncached, UncachedMinus, WriteBack, WriteCombining, WriteProtected, WriteThrough,
    };

    // Linux's page attribute table, and the one after a reset.
    let linux = 0x0407_0506_0007_0106;
    let reset = AddressSpace::new(PagingMode::FourLevel, 0).pat;
    let all = |pat, shape: usize, leaf: usize| {
        let mut builder = Builder::new(&SHAPES[shape]);
        let (shift, _) = SHAPES[shape].levels[leaf];
        for way in 0_u64..8 {
            let gva = way << shift;
            builder.map(gva, leaf, gva, [(true, true, true); 5]);
            let space = builder.space();
            let step =
                *space.translate(&builder.ram, gva).expect("mapped").steps.last().expect("a step");
            let third = if leaf + 1 == SHAPES[shape].levels.len() { 7 } else { 12 };
            let entry = step.entry | (way & 3) << 3 | (way >> 2) << third;
            builder.ram.0[step.entry_gpa as usize..][..4]
                .copy_from_slice(&(entry as u32).to_le_bytes());
        }
        let space = AddressSpace { pat, ..builder.space() };
        let mut ways = Vec::new();
        let looked = space.mapped(&builder.ram, 0..=u64::MAX, Joining::Alike, &mut |found| {
            let Found::Range(range) = found else { panic!("{found:?}") };
            let spans = range.len_bytes >> shift;
            ways.extend((0..spans).map(|_| range.caching));
            ControlFlow::Continue(())
        });
        assert!(looked.is_ok());
        ways
    };
    for (shape, leaf) in [(0, 3), (0, 2), (2, 2), (3, 1), (3, 0)] {
        assert_eq!(
            all(linux, shape, leaf),
            [
                WriteBack,
                WriteCombining,
                UncachedMinus,
                Uncached,
                WriteBack,
                WriteProtected,
                UncachedMinus,
                WriteThrough,
            ]
        );
        let once = [WriteBack, WriteThrough, UncachedMinus, Uncached];
        assert_eq!(all(reset, shape, leaf), [once, once].concat());
    }
}
