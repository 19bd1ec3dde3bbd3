//! Tests of the checker against a simulated guest: the guest's own code writes pages into a memory
//! that can stop taking stores at any moment.

use std::collections::BTreeMap;
use std::io;

use proptest::prelude::*;

use super::control::{
    CONTROL_GPA, DataRange, PAGE_BYTES, PAGE_WORDS, RANGES_MAX, data_gpa, vcpu_control_gpa,
    vcpu_field,
};
use super::oracle::{Oracle, PageOrder};
use super::spec::{Content, Pattern, SpecError};
use super::writer::{Memory, publish_header, write_page};
use super::{
    ControlError, Damage, GUEST_ELF, PageRead, PageReadShared, VerifyError, WorkloadSpec, verify,
    verify_parallel,
};

/// Stores in a turn that writes the whole page.
const STORES_PER_TURN: u64 = 2 + PAGE_WORDS as u64 + 3;
const PAGES: u64 = 70;

/// Sparse guest memory that takes `stores_left` more stores and ignores the rest.
#[derive(Clone)]
struct Simulated {
    pages: BTreeMap<u64, Vec<u64>>,
    stores_left: u64,
}

impl Memory for Simulated {
    fn load(&self, gpa: u64) -> u64 {
        let word = usize::try_from(gpa % PAGE_BYTES / 8).unwrap();
        self.pages.get(&(gpa / PAGE_BYTES)).map_or(0, |page| page[word])
    }

    fn store(&mut self, gpa: u64, value: u64) {
        if self.stores_left > 0 {
            self.stores_left -= 1;
            let word = usize::try_from(gpa % PAGE_BYTES / 8).unwrap();
            self.pages.entry(gpa / PAGE_BYTES).or_insert_with(|| vec![0; PAGE_WORDS])[word] = value;
        }
    }
}

impl PageReadShared for Simulated {
    fn read_page(&self, page: u64, buf: &mut [u8; 4096]) -> io::Result<()> {
        buf.fill(0);
        for (bytes, word) in buf.chunks_mut(8).zip(self.pages.get(&page).into_iter().flatten()) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        Ok(())
    }
}

impl PageRead for Simulated {
    fn read_page(&mut self, page: u64, buf: &mut [u8; 4096]) -> io::Result<()> {
        PageReadShared::read_page(self, page, buf)
    }
}

/// A guest whose memory is in two pieces, as around the hole below 4 GiB.
#[derive(Clone)]
struct Guest {
    spec: WorkloadSpec,
    ranges: [DataRange; RANGES_MAX],
    memory: Simulated,
}

impl Guest {
    fn new(spec: WorkloadSpec) -> Self {
        let mut ranges = [DataRange::default(); RANGES_MAX];
        ranges[0] = DataRange { gpa: 16 << 20, pages: 41 };
        ranges[1] = DataRange { gpa: 4 << 30, pages: PAGES };
        let mut memory = Simulated { pages: BTreeMap::new(), stores_left: u64::MAX };
        publish_header(&mut memory, &spec, &ranges, PAGES).unwrap();
        Self { spec, ranges, memory }
    }

    fn turns(&self, cpu: u64) -> u64 {
        self.memory.load(vcpu_field!(cpu, turns))
    }

    fn next_page(&self, cpu: u64) -> u64 {
        PageOrder::new(&self.spec, cpu, PAGES).page_at(self.turns(cpu))
    }

    fn gpa(&self, index: u64) -> u64 {
        data_gpa(&self.ranges, index).unwrap()
    }

    /// Runs `turns` turns and then the first `stores` stores of the next.
    fn run(&mut self, cpu: u64, turns: u64, stores: u64) {
        let oracle = Oracle::new(&self.spec);
        for stores_left in (0..turns).map(|_| u64::MAX).chain([stores]) {
            let index = self.next_page(cpu);
            self.memory.stores_left = stores_left;
            let gpa = self.gpa(index);
            write_page(&mut self.memory, &oracle, cpu, index, gpa);
        }
        self.memory.stores_left = u64::MAX;
    }

    fn page(&mut self, index: u64) -> &mut Vec<u64> {
        let page = self.gpa(index) / PAGE_BYTES;
        self.memory.pages.entry(page).or_insert_with(|| vec![0; PAGE_WORDS])
    }

    fn inflight(&self, cpu: u64) -> Option<u64> {
        self.memory.load(vcpu_field!(cpu, inflight_page_plus_1)).checked_sub(1)
    }

    fn verify(&self) -> Result<super::VerifyReport, VerifyError> {
        verify(&self.spec, &mut self.memory.clone())
    }

    fn damage(&self) -> Damage {
        match self.verify() {
            Err(VerifyError::Damaged(damage)) => *damage,
            other => panic!("expected damage, found {other:?}"),
        }
    }
}

fn spec(content: Content, cpus: u64) -> WorkloadSpec {
    WorkloadSpec { content, cpus, tsc_khz: 1_000_000, ..WorkloadSpec::default() }
}

#[test]
fn a_vcpu_may_stop_at_every_store() {
    for content in [Content::Text, Content::Random, Content::Edit, Content::Zero] {
        // What a page holds before its first write does not depend on the content.
        let turns = if content == Content::Text { vec![0, PAGES + 10] } else { vec![PAGES + 10] };
        for turns in turns {
            let mut guest = Guest::new(spec(content, 2));
            guest.run(1, 7, 100); // the other vCPU is stopped in the middle
            guest.run(0, turns, 0);
            for stores in 0..=STORES_PER_TURN {
                let mut stopped = guest.clone();
                stopped.run(0, 0, stores);
                let report = stopped.verify().unwrap_or_else(|error| {
                    panic!("{content:?}, {turns} turns and {stores} stores: {error}")
                });
                assert_eq!(report.vcpus[0].turns, stopped.turns(0));
                assert_eq!(report.pages_checked, PAGES);
            }
        }
    }
}

#[test]
fn a_stale_page_is_found_and_named() {
    let mut guest = Guest::new(spec(Content::Text, 2));
    guest.run(0, 60, 0);
    let index = guest.next_page(0);
    let before = guest.page(index).clone();
    guest.run(0, 9, 300);
    assert_ne!(guest.inflight(0), Some(index));
    let behind = guest.page(index)[0] - before[0];
    *guest.page(index) = before;

    let damage = guest.damage();
    assert_eq!((damage.bad_pages, damage.ledgers.len()), (0, 1));
    let stale = damage.ledgers[0].stale.expect("one stale page explains the ledger");
    assert_eq!((stale.index, stale.gpa), (index, guest.gpa(index)));
    assert_eq!(stale.behind.unsigned_abs(), behind);
    assert!(damage.to_string().contains(&format!("data page {index}")), "{damage}");
}

#[test]
fn a_page_that_was_never_stored_is_stale() {
    let mut guest = Guest::new(spec(Content::Random, 1));
    guest.run(0, PAGES, 0);
    guest.page(13).fill(0);
    assert_eq!(guest.damage().ledgers[0].stale.unwrap().index, 13);
}

#[test]
fn swapped_pages_are_bad() {
    let mut guest = Guest::new(spec(Content::Text, 1));
    guest.run(0, PAGES, 0);
    let (left, right) = (guest.page(5).clone(), guest.page(50).clone());
    *guest.page(5) = right;
    *guest.page(50) = left;
    let damage = guest.damage();
    assert_eq!(damage.bad_pages, 2);
    assert_eq!([damage.first[0].index, damage.first[1].index], [5, 50]);
}

#[test]
fn a_lost_prefix_of_the_page_in_flight_is_bad() {
    for content in [Content::Text, Content::Random] {
        let mut guest = Guest::new(spec(content, 1));
        guest.run(0, PAGES + 5, 0);
        let index = guest.next_page(0);
        let before = guest.page(index).clone();
        guest.run(0, 0, 2 + 100);
        assert_eq!(guest.inflight(0), Some(index));
        guest.page(index)[..10].copy_from_slice(&before[..10]);
        assert_eq!(guest.damage().first[0].index, index);
    }
}

#[test]
fn a_finished_page_that_is_old_is_not_excused_by_being_in_flight() {
    for content in [Content::Text, Content::Random, Content::Edit] {
        for stores_after_words in 1..=2 {
            let mut guest = Guest::new(spec(content, 1));
            guest.run(0, PAGES + 5, 0);
            let index = guest.next_page(0);
            let before = guest.page(index).clone();
            let words = if content == Content::Edit { 2 } else { PAGE_WORDS as u64 };
            guest.run(0, 0, 2 + words + stores_after_words);
            assert_eq!((guest.inflight(0), guest.turns(0)), (Some(index), PAGES + 6));
            guest.verify().unwrap();
            *guest.page(index) = before;
            assert_eq!(guest.damage().ledgers.len(), 1, "{content:?}");
        }
    }
}

#[test]
fn a_damaged_ledger_or_counter_is_found() {
    for field in [vcpu_field!(1, ledger), vcpu_field!(1, turns)] {
        let mut guest = Guest::new(spec(Content::Edit, 2));
        guest.run(1, 80, 0);
        let value = guest.memory.load(field);
        guest.memory.store(field, value ^ (1 << 40));
        assert_eq!(guest.damage().ledgers[0].cpu, 1);
    }
}

#[test]
fn a_stale_control_page_is_found() {
    let mut guest = Guest::new(spec(Content::Text, 1));
    guest.run(0, 20, 0);
    let control = vcpu_control_gpa(0) / PAGE_BYTES;
    let before = guest.memory.pages[&control].clone();
    guest.run(0, 1, 0);
    guest.memory.pages.insert(control, before);
    guest.damage();
}

#[test]
fn an_in_flight_page_of_another_vcpu_is_refused() {
    let mut guest = Guest::new(spec(Content::Text, 2));
    guest.run(0, 20, 0);
    guest.memory.store(vcpu_field!(0, inflight_page_plus_1), 2);
    guest.damage();
}

#[test]
fn memory_without_a_workload_is_refused() {
    let mut guest = Guest::new(spec(Content::Text, 1));
    guest.memory.store(CONTROL_GPA, 0);
    let error = guest.verify().unwrap_err();
    assert!(
        matches!(error, VerifyError::Control(ControlError::NoWorkload { found: 0 })),
        "{error}"
    );
}

#[test]
fn another_workload_is_refused() {
    let guest = Guest::new(spec(Content::Text, 1));
    let other = WorkloadSpec { seed: 2, ..guest.spec };
    let error = verify(&other, &mut guest.memory.clone()).unwrap_err();
    assert!(matches!(error, VerifyError::Spec { .. }), "{error}");
    let same = WorkloadSpec { tsc_khz: 5, hot_share_ppm: 3, ..guest.spec };
    verify(&same, &mut guest.memory.clone()).expect("keys that do not matter may differ");
}

#[test]
fn edited_pages_are_those_of_a_replay() {
    let oracle = Oracle::new(&spec(Content::Edit, 1));
    for index in [0, 1, 77] {
        let mut page: Vec<u64> =
            (0..PAGE_WORDS).map(|word| oracle.page(index, 1).word(word)).collect();
        for count in 2..1200 {
            let content = oracle.page(index, count);
            let edited = content.edited_word().unwrap();
            let before = page[edited];
            (page[0], page[edited]) = (count, content.word(edited));
            assert_ne!(page[edited], before, "an edit changes something");
            assert!(
                page.iter().enumerate().all(|(word, value)| content.word(word) == *value),
                "count {count}"
            );
        }
    }
}

#[test]
fn all_words_agree_with_single_words() {
    for content in [Content::Text, Content::Random, Content::Edit, Content::Zero] {
        let page = Oracle::new(&spec(content, 1)).page(9, 700);
        let mut pairs = 0;
        page.for_each_pair(|pair, words| {
            pairs += 1;
            assert_eq!(words, [page.word(pair * 2), page.word(pair * 2 + 1)]);
            true
        });
        assert_eq!(pairs, PAGE_WORDS / 2);
    }
}

#[test]
fn populating_writes_each_page_once_and_patterns_keep_to_their_pages() {
    for pattern in [Pattern::Seq, Pattern::Uniform, Pattern::Shuffle, Pattern::Hot] {
        let spec = WorkloadSpec { pattern, ..spec(Content::Text, 3) };
        let mut seen = Vec::new();
        for cpu in 0..3 {
            let order = PageOrder::new(&spec, cpu, 1000);
            seen.extend((0..order.populate_turns()).map(|turn| order.page_at(turn)));
            let steady = order.populate_turns()..order.populate_turns() + 5000;
            assert!(
                steady.map(|turn| order.page_at(turn)).all(|page| page < 1000 && page % 3 == cpu)
            );
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..1000).collect::<Vec<_>>());
    }
}

#[test]
fn shuffled_passes_are_permutations_and_differ() {
    for data_pages in [1, 2, 3, 5, 64, 65, 1000] {
        let spec =
            WorkloadSpec { pattern: Pattern::Shuffle, populate: false, ..spec(Content::Text, 1) };
        let order = PageOrder::new(&spec, 0, data_pages);
        let pass = |number: u64| {
            (0..data_pages)
                .map(|turn| order.page_at(number * data_pages + turn))
                .collect::<Vec<_>>()
        };
        let (first, second) = (pass(0), pass(1));
        for pass in [&first, &second] {
            let mut sorted = pass.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..data_pages).collect::<Vec<_>>());
        }
        if data_pages >= 64 {
            assert_ne!(first, second);
            let steps = first.windows(2).filter(|pair| pair[0] + 1 == pair[1]).count() as u64;
            assert!(steps < data_pages / 8, "{steps} of {data_pages} follow each other");
        }
    }
}

#[test]
fn hot_pages_get_their_share_of_the_writes() {
    let spec = WorkloadSpec { pattern: Pattern::Hot, populate: false, ..spec(Content::Text, 1) };
    let order = PageOrder::new(&spec, 0, 1000);
    let mut writes = vec![0u32; 1000];
    for turn in 0..100_000 {
        writes[usize::try_from(order.page_at(turn)).unwrap()] += 1;
    }
    writes.sort_unstable_by(|left, right| right.cmp(left));
    let hot: u32 = writes[..100].iter().sum();
    assert!((89_000..91_000).contains(&hot), "{hot} of 100000 writes went to the 100 hot pages");
    assert!(writes[999] > 0, "cold pages are written too");
}

#[test]
fn specifications_are_parsed_strictly() {
    let refused = [
        ("speed=1", "unknown key `speed`"),
        ("rate", "`rate` expected pages per second"),
        ("rate=-1", "found `-1`"),
        ("rate=+1", "found `+1`"),
        ("rate=1,rate=2", "`rate` is given twice"),
        ("touch=1", "`touch` expected a size"),
        ("touch=99999999999GiB", "`touch` expected a size"),
        ("touch=1MB", "found `1MB`"),
        ("hot_share=1.1", "`hot_share` expected a share"),
        ("hot_share=.5", "`hot_share` expected a share"),
        ("hot_writes=0.1234567", "`hot_writes` expected a share"),
        ("pattern=random", "`pattern` expected seq, uniform, shuffle or hot, found `random`"),
        ("populate=true", "yes or no"),
        ("cpus=65", "from 1 to 64"),
        ("rate=1,", "unknown key ``"),
    ];
    for (text, why) in refused {
        let error = text.parse::<WorkloadSpec>().unwrap_err().to_string();
        assert!(error.contains(why), "{text}: {error}");
    }
    let spec: WorkloadSpec = "touch=1GiB,rate=max,hot_share=0.05".parse().unwrap();
    assert_eq!(
        (spec.touch_bytes, spec.rate_pages_per_s, spec.hot_share_ppm),
        (Some(1 << 30), 0, 50_000)
    );
    assert_eq!("".parse(), Ok(WorkloadSpec::default()));
    assert_eq!(WorkloadSpec::from_cmdline("console=ttyS0 quiet"), Ok(None));
    let error = WorkloadSpec::from_cmdline("quiet frazil.workload=seed=x").unwrap_err();
    assert!(matches!(error, SpecError::BadValue { key: "seed", found: "x", .. }), "{error}");
}

#[test]
fn memory_that_is_too_small_is_refused() {
    let spec: WorkloadSpec = "touch=100MiB".parse().unwrap();
    spec.check_fits(116 << 20).unwrap();
    let error = spec.check_fits(115 << 20).unwrap_err().to_string();
    assert!(error.contains("up to 101376KiB") && error.contains("found 102400KiB"), "{error}");
    WorkloadSpec::default().check_fits(31 << 20).unwrap_err();
}

#[test]
fn the_guest_is_an_executable_without_traces_of_where_it_was_built() {
    assert!(GUEST_ELF.starts_with(b"\x7fELF"));
    assert_eq!(GUEST_ELF[24..32], 0x10_0000_u64.to_le_bytes(), "entry point");
    let here = env!("CARGO_MANIFEST_DIR").as_bytes();
    assert!(!GUEST_ELF.windows(here.len()).any(|bytes| bytes == here));
}

prop_compose! {
    fn any_spec()(
        content in prop_oneof![Just(Content::Text), Just(Content::Random), Just(Content::Edit), Just(Content::Zero)],
        pattern in prop_oneof![Just(Pattern::Seq), Just(Pattern::Uniform), Just(Pattern::Shuffle), Just(Pattern::Hot)],
        (hot_share_ppm, hot_writes_ppm) in (0..=1_000_000u64, 0..=1_000_000u64),
        (seed, populate, cpus, rate_pages_per_s) in (any::<u64>(), any::<bool>(), 1..=4u64, 0..=1_000_000u64),
        (touch, stop_after_turns) in (proptest::option::of(64..1_000_000u64), proptest::option::of(any::<u64>())),
    ) -> WorkloadSpec {
        WorkloadSpec {
            touch_bytes: touch.map(|pages| pages * PAGE_BYTES),
            content, pattern, hot_share_ppm, hot_writes_ppm, seed, populate, cpus, rate_pages_per_s, stop_after_turns,
            tsc_khz: 2_000_000,
            ..WorkloadSpec::default()
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn specifications_survive_being_printed(spec in any_spec()) {
        let spec = match spec.pattern {
            Pattern::Hot => spec,
            _ => WorkloadSpec { hot_share_ppm: 100_000, hot_writes_ppm: 900_000, ..spec },
        };
        prop_assert_eq!(spec.to_string().parse(), Ok(spec));
    }

    #[test]
    fn runs_are_accepted_and_damage_is_not(
        spec in any_spec(),
        stops in proptest::collection::vec((0..120u64, 0..=STORES_PER_TURN), 4),
        index in 0..PAGES,
        bit in 0..4096 * 8usize,
    ) {
        let mut guest = Guest::new(spec);
        for (cpu, (turns, stores)) in (0..spec.cpus).zip(stops) {
            guest.run(cpu, turns, stores);
        }
        let report = guest.verify();
        prop_assert!(report.is_ok(), "{}", report.unwrap_err());
        let shared = verify_parallel(&spec, &guest.memory);
        prop_assert_eq!(shared.unwrap().writes, report.unwrap().writes);

        // In a page in flight, a flipped bit can be just what the next store would have done.
        if guest.inflight(index % spec.cpus) != Some(index) {
            guest.page(index)[bit / 64] ^= 1 << (bit % 64);
            prop_assert!(guest.verify().is_err());
            prop_assert!(verify_parallel(&spec, &guest.memory).is_err());
        }
    }
}
