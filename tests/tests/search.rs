//! Searches of regions, compared with a single search through all their bytes.

use std::ops::ControlFlow;
use std::sync::Arc;

use frazil_snapstore::search::{Pattern, SearchProgress, search};
use frazil_snapstore::{
    Description, PAGE_SIZE, Page, PageSet, RegionReader, SnapshotId, Store, StoreOptions,
};
use frazil_tests::oracle::small_options;
use frazil_tests::storage_sim::SimStorage;
use proptest::prelude::*;
use regex_automata::meta::Regex;
use regex_automata::util::syntax;

/// Three of the parts (512 pages) that a core searches at once, and a bit more.
const PAGES: usize = 3 * 512 + 70;

/// A region, and all its bytes.
struct Bed {
    store: Arc<Store>,
    head: Option<SnapshotId>,
    memory: Vec<Page>,
}

impl Bed {
    fn new(options: StoreOptions) -> Self {
        let storage = Arc::new(SimStorage::default());
        let store = Store::open_or_create_storage(storage, options).expect("a store");
        Self { store, head: None, memory: vec![[0; PAGE_SIZE]; PAGES] }
    }

    /// Writes each text at its offset, in one snapshot on top of the last.
    fn write(&mut self, texts: &[(usize, Vec<u8>)]) {
        let mut dirty = PageSet::new(PAGES as u64);
        let bytes = self.memory.as_flattened_mut();
        for (at, text) in texts {
            let len = text.len().min(bytes.len() - at);
            bytes[*at..at + len].copy_from_slice(&text[..len]);
            (at / PAGE_SIZE..(at + len).div_ceil(PAGE_SIZE)).for_each(|page| {
                dirty.insert(page as u64);
            });
        }
        let mut transaction = self.store.begin(self.head).expect("a transaction");
        let region = transaction.region("ram", PAGES as u64).expect("a region");
        transaction.write_pages(region, &dirty, &self.memory).expect("they are written");
        let message = format!("{:?}", self.head);
        let description = Description { message, ..Description::default() };
        self.head = Some(transaction.commit(description).expect("a snapshot").id);
    }

    fn region(&self) -> RegionReader {
        let snapshot = self.store.snapshot(self.head.expect("one")).expect("it");
        snapshot.region("ram").expect("it")
    }

    /// Returns the offset and bytes of each match, after checking its context.
    fn found(&self, pattern: &Pattern, context: usize) -> Vec<(u64, Vec<u8>)> {
        let memory = self.memory.as_flattened();
        let mut all = Vec::new();
        let report = search(
            &self.region(),
            0..u64::MAX,
            pattern,
            context,
            &SearchProgress::default(),
            &mut |found| {
                let (start, len) = (found.offset as usize, found.bytes.len());
                assert_eq!(found.bytes, &memory[start..start + len]);
                assert_eq!(found.before, &memory[start.saturating_sub(context)..start]);
                let end = (start + len + context).min(memory.len());
                assert_eq!(found.after, &memory[start + len..end]);
                all.push((found.offset, found.bytes.to_vec()));
                ControlFlow::Continue(())
            },
        )
        .expect("a search");
        assert_eq!(report.matches, all.len() as u64);
        all
    }
}

/// Offsets near the borders of pages and parts, where matches could be missed.
fn place() -> impl Strategy<Value = usize> {
    let border = prop_oneof![
        (0..PAGES).prop_map(|page| page * PAGE_SIZE),
        (0_usize..4).prop_map(|part| part * 512 * PAGE_SIZE),
        Just(PAGES * PAGE_SIZE - 8),
    ];
    (border, 0_usize..12).prop_map(|(border, before)| border.saturating_sub(before))
}

fn texts() -> impl Strategy<Value = Vec<(usize, Vec<u8>)>> {
    let byte = prop_oneof![4 => Just(b'a'), 3 => Just(b'b'), 1 => Just(b'\n'), 1 => Just(0), 1 => Just(b'B')];
    let text = (place(), proptest::collection::vec(byte, 1..24));
    proptest::collection::vec(text, 1..40)
}

const EXPRESSIONS: [&str; 15] = [
    "ab+a",
    "(?s)a.b",
    r"\bab",
    "b$",
    "^ab",
    "a[ab]{2,9}b",
    "(?i)ab",
    r"b\x00{1,9}a",
    "a.{0,6}b|ba",
    // Assertions between zeros and what is beside them.
    r"\b\x00",
    r"\x00{3}\b",
    // Expressions without any literal byte.
    r"\w{3}",
    r"\w[^ab]\w?",
    // Matches of any length.
    r"[ab]+\n",
    r"[^a\x00]+a",
];
const BYTES: [&[u8]; 6] = [b"ab", b"aa", b"b", b"ba\nb", b"\0a", b"abababab"];

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn what_is_found_is_what_one_search_finds(
        first in texts(), second in texts(), expression in 0..EXPRESSIONS.len(), bytes in 0..BYTES.len(),
    ) {
        let mut bed = Bed::new(small_options());
        bed.write(&first);
        bed.write(&second);
        let memory = bed.memory.as_flattened();

        let mut expected = Vec::new();
        let (needle, mut at) = (BYTES[bytes], 0);
        while let Some(found) = memory[at..].windows(needle.len()).position(|window| window == needle) {
            expected.push(((at + found) as u64, needle.to_vec()));
            at += found + needle.len();
        }
        let pattern = Pattern::bytes(needle).expect("a pattern");
        prop_assert_eq!(bed.found(&pattern, 5), expected);

        let syntax = syntax::Config::new().unicode(false).utf8(false).multi_line(true);
        let expression = EXPRESSIONS[expression];
        let oracle = Regex::builder().syntax(syntax).build(expression).expect("an expression");
        let expected: Vec<_> = oracle
            .find_iter(memory)
            .map(|found| (found.start() as u64, memory[found.range()].to_vec()))
            .collect();
        let pattern = Pattern::regex(expression).expect("a pattern");
        prop_assert_eq!(bed.found(&pattern, 100), expected, "{}", expression);
    }
}

#[test]
fn only_what_is_not_zero_is_read_and_a_search_can_be_ended() {
    let mut bed = Bed::new(StoreOptions::default());
    let texts: Vec<_> =
        (0..20).map(|number| (number * 60 * PAGE_SIZE, b"needle".to_vec())).collect();
    bed.write(&texts);
    let pattern = Pattern::bytes(b"needle").expect("a pattern");
    let mut count = 0;
    let mut run = |most: u64, range| {
        count = 0;
        let progress = SearchProgress::default();
        let report = search(&bed.region(), range, &pattern, 4, &progress, &mut |_| {
            count += 1;
            if count == most { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        report.expect("a search")
    };
    let all = run(u64::MAX, 0..u64::MAX);
    assert_eq!((all.matches, all.pages_read), (20, 20));
    assert_eq!(run(3, 0..u64::MAX).matches, 3);
    // Only matches inside the range: one at its first byte counts, one that ends beyond it does
    // not.
    let page = 60 * PAGE_SIZE as u64;
    assert_eq!(run(u64::MAX, page..3 * page + 5).matches, 2);
    assert_eq!(run(u64::MAX, page..3 * page + 6).matches, 3);
    assert_eq!(run(u64::MAX, page + 1..2 * page).matches, 0);
    assert_eq!(run(u64::MAX, u64::MAX - 1..u64::MAX).matches, 0);
}

/// Many more matches than are buffered before they are reported, reaching from part to part.
#[test]
fn memory_full_of_matches_is_told_match_by_match() {
    let mut bed = Bed::new(StoreOptions::default());
    let text: Vec<u8> =
        (0..PAGES * PAGE_SIZE).map(|at| if at % 1000 == 999 { b'.' } else { b'a' }).collect();
    bed.write(&[(0, text)]);
    let memory = bed.memory.as_flattened();
    for (pattern, len) in [
        (Pattern::bytes(b"aaa"), 3),
        (Pattern::bytes(b"aaaaaaa"), 7),
        (Pattern::regex(r"\w{5}"), 5),
        (Pattern::regex("aa[abc]{5}"), 7),
    ] {
        let mut expected = 0;
        let mut at = 0;
        while at + len <= memory.len() {
            let dot = memory[at..at + len].iter().rposition(|byte| *byte == b'.');
            expected += u64::from(dot.is_none());
            at += dot.map_or(len, |dot| dot + 1);
        }
        let (mut count, mut last) = (0, None);
        let pattern = pattern.expect("a pattern");
        search(&bed.region(), 0..u64::MAX, &pattern, 0, &SearchProgress::default(), &mut |found| {
            assert!(last.is_none_or(|end| found.offset >= end), "none covers another");
            assert!(found.bytes.len() == len && !found.bytes.contains(&b'.'));
            last = Some(found.offset + len as u64);
            count += 1;
            ControlFlow::Continue(())
        })
        .expect("a search");
        assert_eq!(count, expected, "{pattern:?}");
    }
}

/// The end of a part is not the end of a line.
#[test]
fn what_is_cut_off_for_a_core_ends_nothing() {
    let mut bed = Bed::new(StoreOptions::default());
    bed.write(&[(0, vec![b'a'; PAGES * PAGE_SIZE - 1])]);
    for expression in ["a+$", r"a+\b", r"[a-z]+$", r"\b[a-z]{7}\b"] {
        let pattern = Pattern::regex(expression).expect("a pattern");
        for (offset, bytes) in bed.found(&pattern, 1) {
            // The only place where a match can end.
            assert_eq!(offset as usize + bytes.len(), PAGES * PAGE_SIZE - 1, "{expression}");
        }
    }
}

/// Zeros that match only because of what is beside them.
#[test]
fn zeros_are_found_where_something_is_beside_them() {
    let mut bed = Bed::new(StoreOptions::default());
    let page = |number: usize| number * PAGE_SIZE;
    bed.write(&[
        (page(6) - 2, b"x\n".to_vec()),
        (page(9), b"\ny".to_vec()),
        (page(512), b"z".to_vec()),
    ]);
    for (expression, expected) in [
        (r"^\x00{2}", vec![page(6)]),
        (r"^\x00{5000}y?", vec![page(6)]),
        (r"\x00{2}$", vec![page(9) - 2]),
        (r"\x00{3}\b", vec![page(6) - 5, page(512) - 3]),
        (r"\b\x00{4}", vec![page(9) + 2, page(512) + 1]),
    ] {
        let pattern = Pattern::regex(expression).expect("a pattern");
        let found: Vec<usize> =
            bed.found(&pattern, 3).into_iter().map(|(offset, _)| offset as usize).collect();
        assert_eq!(found, expected, "{expression}");
    }
}

/// As on either side of a hole in memory.
#[test]
fn a_range_is_searched_as_if_there_was_nothing_else() {
    let mut bed = Bed::new(StoreOptions::default());
    let border = 600 * PAGE_SIZE;
    bed.write(&[(border - 5, b"aaaaabbbbb".to_vec())]);
    let region = bed.region();
    let look = |pattern: &Pattern, range: std::ops::Range<u64>| {
        let mut all = Vec::new();
        let progress = SearchProgress::default();
        search(&region, range, pattern, 8, &progress, &mut |found| {
            let [before, bytes, after] =
                [found.before, found.bytes, found.after].map(<[u8]>::to_vec);
            all.push((found.offset, before, bytes, after));
            ControlFlow::Continue(())
        })
        .expect("a search");
        all
    };
    let border = border as u64;
    let bytes = |text: &[u8]| Pattern::bytes(text).expect("a pattern");
    assert!(look(&bytes(b"ab"), 0..border).is_empty());
    assert!(look(&bytes(b"ab"), border..u64::MAX).is_empty());
    assert_eq!(look(&bytes(b"ab"), 0..u64::MAX).len(), 1);
    let below = look(&bytes(b"aaa"), 0..border);
    let [(offset, before, _, after)] = &below[..] else { panic!("{below:?}") };
    assert_eq!((*offset, &before[..], &after[..]), (border - 5, &[0; 8][..], &b"aa"[..]));
    let above = look(&bytes(b"bbb"), border..u64::MAX);
    let [(offset, before, _, after)] = &above[..] else { panic!("{above:?}") };
    assert_eq!((*offset, &before[..], &after[..]), (border, &b""[..], &b"bb\0\0\0\0\0\0"[..]));
    // Two searches with the same counters: each reports only what it read itself.
    let progress = SearchProgress::default();
    for _ in 0..2 {
        let all = |_: frazil_snapstore::search::Match<'_>| ControlFlow::Continue(());
        let report = search(&region, 0..u64::MAX, &bytes(b"ab"), 0, &progress, &mut { all });
        assert_eq!(report.expect("a search").pages_read, 2);
    }
}

#[test]
fn patterns_that_say_nothing_are_refused() {
    let bytes = |bytes: &[u8]| Pattern::bytes(bytes).map(|_| ()).expect_err("refused").to_string();
    assert!(bytes(b"").contains("1 to"));
    assert!(bytes(&[0; 9]).contains("zero"));
    assert!(bytes(&vec![1; 1 << 20]).contains("65536"));
    for (expression, says) in [
        ("(", "regular expression"),
        ("a*", "nothing at all"),
        (r"\b", "nothing at all"),
        (r"\x00+", "zeros alone"),
        ("(?s).", "zeros alone"),
        (r"\Afoo", "no beginning"),
        ("a{70000}", "65536"),
        ("a{5000,}", "4096"),
        // Matches that are empty only at some places, which a search of zeros does not reveal.
        (r"a*\b", "nothing at all"),
        (r"(?:foo)?\b|bar", "nothing at all"),
        ("[a&&b]", "nothing does"),
        (r"(?-m)foo$", "no beginning"),
        (r"\x00{4}\B", "zeros alone"),
        ("((a{500}){500}){500}", "expression"),
    ] {
        let error = Pattern::regex(expression).map(|_| ()).expect_err(expression).to_string();
        assert!(error.contains(says), "{expression}: {error}");
    }
}
