//! Checks the whole memory of a stopped workload: each page against its own count, and the counts
//! against the ledgers. `vmm/guest/writer.rs` argues why that is enough.

use std::fmt;
use std::io;
use std::ops::Range;

use rayon::prelude::*;

use super::control::{PAGE_BYTES, PAGE_WORDS};
use super::oracle::{Oracle, PageContent, PageOrder};
use super::spec::WorkloadSpec;
use super::view::{ControlError, ControlView, PageRead, PageReadShared, to_usize};

/// How many bad pages an error describes; it counts all of them.
const BAD_PAGES_MAX: usize = 8;
/// Data pages that a thread checks at a time.
const CHUNK_PAGES: u64 = 4096;

/// What was checked, and how far the guest had come.
#[derive(Clone, Debug)]
pub struct VerifyReport {
    /// Data pages checked.
    pub pages_checked: u64,
    /// Writes completed by all vCPUs.
    pub writes: u64,
    /// Where each vCPU was.
    pub vcpus: Vec<VcpuReport>,
}

/// Where one vCPU was.
#[derive(Clone, Copy, Debug)]
pub struct VcpuReport {
    /// Writes completed.
    pub turns: u64,
    /// The page that it was in the middle of writing.
    pub inflight: Option<InflightReport>,
}

/// A page that was being written when the vCPU was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightReport {
    /// Data index.
    pub index: u64,
    /// The count that the write gives it.
    pub count: u64,
    /// How many words, from the start, have their new value.
    pub words_new: usize,
}

/// Why the memory is not what the workload wrote.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The control area is unusable.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The guest runs by another specification.
    #[error("expected the workload `{expected}`, found `{found}` in the guest's header")]
    Spec {
        /// The specification given.
        expected: Box<WorkloadSpec>,
        /// The guest's specification.
        found: Box<WorkloadSpec>,
    },
    /// A data page could not be read.
    #[error("cannot read guest memory at {gpa:#x}: {source}")]
    Read {
        /// Guest physical address.
        gpa: u64,
        /// What went wrong.
        source: io::Error,
    },
    /// Pages are wrong, or missing writes.
    #[error("{0}")]
    Damaged(Box<Damage>),
}

/// All that is wrong with the memory.
#[derive(Debug, Default)]
pub struct Damage {
    /// Pages that do not match their own count.
    pub bad_pages: u64,
    /// The first of them.
    pub first: Vec<BadPage>,
    /// vCPUs whose pages are whole but do not add up: some pages are older than they should be.
    pub ledgers: Vec<BadLedger>,
}

/// A page with contents that it should never have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadPage {
    /// Guest physical address.
    pub gpa: u64,
    /// Data index.
    pub index: u64,
    /// The count that the page claims or, if it was in flight, that it was getting.
    pub count: u64,
    /// The first wrong word.
    pub word: usize,
    /// What the word should be.
    pub expected: u64,
    /// What it is.
    pub found: u64,
}

/// A vCPU whose pages do not add up to what it wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadLedger {
    /// Index of the vCPU.
    pub cpu: u64,
    /// Writes that the vCPU completed.
    pub turns: u64,
    /// Writes that its pages show.
    pub found_turns: u64,
    /// The stale page, if a single one explains the difference.
    pub stale: Option<StalePage>,
}

/// A page that is whole but older (or newer) than it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StalePage {
    /// Guest physical address.
    pub gpa: u64,
    /// Data index.
    pub index: u64,
    /// Writes that are missing; negative if there are too many.
    pub behind: i64,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the workload's memory is damaged: {} bad pages", self.bad_pages)?;
        for page in &self.first {
            let BadPage { gpa, index, count, word, expected, found } = page;
            write!(f, "; gpa {gpa:#x} (data page {index}, write {count}): word {word} ")?;
            write!(f, "expected {expected:#018x}, found {found:#018x}")?;
        }
        if self.bad_pages > self.first.len() as u64 {
            write!(f, "; …")?;
        }
        for BadLedger { cpu, turns, found_turns, stale } in &self.ledgers {
            write!(
                f,
                "; vCPU {cpu}: expected its pages to show {turns} writes, found {found_turns}"
            )?;
            match stale {
                Some(StalePage { gpa, index, behind }) => {
                    write!(f, ": gpa {gpa:#x} (data page {index}) is {behind} writes behind")?;
                }
                None => f.write_str(", and no single page accounts for it")?,
            }
        }
        Ok(())
    }
}

/// Checks the memory of a workload stopped at any instruction: every data page and every ledger.
/// `spec` is what the guest was started with; `tsc_khz` may differ.
///
/// # Errors
/// If the control area is missing or of another workload, or memory cannot be read or is damaged.
pub fn verify(spec: &WorkloadSpec, memory: &mut dyn PageRead) -> Result<VerifyReport, VerifyError> {
    let checker = Checker::new(spec, memory)?;
    let scan = checker.scan(0..checker.view.data_pages, memory)?;
    checker.judge(scan)
}

/// As [`verify`], on all cores.
///
/// # Errors
/// As [`verify`].
pub fn verify_parallel(
    spec: &WorkloadSpec,
    memory: &dyn PageReadShared,
) -> Result<VerifyReport, VerifyError> {
    let checker = Checker::new(spec, &mut Shared(memory))?;
    let data_pages = checker.view.data_pages;
    let scan = (0..data_pages.div_ceil(CHUNK_PAGES))
        .into_par_iter()
        .map(|chunk| {
            let start = chunk * CHUNK_PAGES;
            checker.scan(start..data_pages.min(start + CHUNK_PAGES), &mut Shared(memory))
        })
        .try_reduce(|| Scan::new(checker.view.vcpus.len()), |left, right| Ok(left.merge(right)))?;
    checker.judge(scan)
}

struct Shared<'a>(&'a dyn PageReadShared);

impl PageRead for Shared<'_> {
    fn read_page(&mut self, page: u64, buf: &mut [u8; 4096]) -> io::Result<()> {
        self.0.read_page(page, buf)
    }
}

struct Checker {
    view: ControlView,
    oracle: Oracle,
}

/// The findings of a scan over some pages.
struct Scan {
    bad_pages: u64,
    first: Vec<BadPage>,
    vcpus: Vec<Tally>,
}

/// What a scan found in the pages of one vCPU. A write in flight does not count.
#[derive(Clone, Copy, Default)]
struct Tally {
    turns: u64,
    ledger: u64,
    bad_pages: u64,
    inflight: Option<InflightReport>,
}

impl Scan {
    fn new(vcpus: usize) -> Self {
        Self { bad_pages: 0, first: Vec::new(), vcpus: vec![Tally::default(); vcpus] }
    }

    fn merge(mut self, other: Self) -> Self {
        self.bad_pages += other.bad_pages;
        self.first.extend(other.first);
        self.first.sort_by_key(|page| page.index);
        self.first.truncate(BAD_PAGES_MAX);
        for (tally, more) in self.vcpus.iter_mut().zip(other.vcpus) {
            tally.turns = tally.turns.wrapping_add(more.turns);
            tally.ledger = tally.ledger.wrapping_add(more.ledger);
            tally.bad_pages += more.bad_pages;
            tally.inflight = tally.inflight.or(more.inflight);
        }
        self
    }
}

impl Checker {
    fn new(spec: &WorkloadSpec, memory: &mut dyn PageRead) -> Result<Self, VerifyError> {
        let view = ControlView::read(memory)?;
        // Compared as text, which omits keys that do not matter to this workload.
        let expected = WorkloadSpec { tsc_khz: view.spec.tsc_khz, ..*spec };
        if expected.to_string() != view.spec.to_string() {
            return Err(VerifyError::Spec {
                expected: Box::new(expected),
                found: Box::new(view.spec),
            });
        }
        Ok(Self { oracle: Oracle::new(spec), view })
    }

    fn scan(&self, indices: Range<u64>, memory: &mut dyn PageRead) -> Result<Scan, VerifyError> {
        let mut scan = Scan::new(self.view.vcpus.len());
        let mut bytes = [0; 4096];
        for index in indices {
            let gpa = self.gpa(index);
            memory
                .read_page(gpa / PAGE_BYTES, &mut bytes)
                .map_err(|source| VerifyError::Read { gpa, source })?;
            let cpu = to_usize(index % self.view.spec.cpus);
            match self.check_page(index, cpu, &bytes) {
                Ok((count, inflight)) => {
                    let tally = &mut scan.vcpus[cpu];
                    tally.turns = tally.turns.wrapping_add(count);
                    tally.ledger =
                        tally.ledger.wrapping_add(self.oracle.weight(index).wrapping_mul(count));
                    tally.inflight = tally.inflight.or(inflight);
                }
                Err(bad) => {
                    scan.bad_pages += 1;
                    scan.vcpus[cpu].bad_pages += 1;
                    if scan.first.len() < BAD_PAGES_MAX {
                        scan.first.push(bad);
                    }
                }
            }
        }
        Ok(scan)
    }

    /// Returns how often the page was written, not counting a write in flight, and that write.
    fn check_page(
        &self,
        index: u64,
        cpu: usize,
        bytes: &[u8; 4096],
    ) -> Result<(u64, Option<InflightReport>), BadPage> {
        if !self.oracle.counts_writes() {
            return self.check_whole(index, 0, bytes).map(|()| (0, None));
        }
        let control = &self.view.vcpus[cpu].control;
        if control.inflight_page_plus_1 == index + 1 {
            let inflight = self.check_inflight(index, control.inflight_count, bytes)?;
            return Ok((inflight.count - 1, Some(inflight)));
        }
        let count = word_of(bytes, 0);
        self.check_whole(index, count, bytes).map(|()| (count, None))
    }

    fn check_whole(&self, index: u64, count: u64, bytes: &[u8; 4096]) -> Result<(), BadPage> {
        match first_difference(&self.oracle.page(index, count), bytes) {
            None => Ok(()),
            Some(word) => Err(self.bad_page(index, count, word, bytes)),
        }
    }

    /// Checks a page in flight, which is new up to some word and old from there on. If such a word
    /// exists, the first word that is not new is one.
    fn check_inflight(
        &self,
        index: u64,
        count: u64,
        bytes: &[u8; 4096],
    ) -> Result<InflightReport, BadPage> {
        let Some(count_before) = count.checked_sub(1) else {
            // The guest counts from 1: the control page is damaged, so the data page cannot be
            // judged.
            return Err(BadPage { count: 0, ..self.bad_page(index, 1, 0, bytes) });
        };
        let words_new =
            first_difference(&self.oracle.page(index, count), bytes).unwrap_or(PAGE_WORDS);
        let before = self.oracle.page(index, count_before);
        let bad = (words_new..PAGE_WORDS).find(|word| word_of(bytes, *word) != before.word(*word));
        match bad {
            None => Ok(InflightReport { index, count, words_new }),
            Some(word) => Err(BadPage {
                expected: before.word(word),
                ..self.bad_page(index, count, word, bytes)
            }),
        }
    }

    fn bad_page(&self, index: u64, count: u64, word: usize, bytes: &[u8; 4096]) -> BadPage {
        let expected = self.oracle.page(index, count).word(word);
        BadPage { gpa: self.gpa(index), index, count, word, expected, found: word_of(bytes, word) }
    }

    /// Compares what the pages show with what the vCPUs say they did.
    fn judge(&self, scan: Scan) -> Result<VerifyReport, VerifyError> {
        let mut damage =
            Damage { bad_pages: scan.bad_pages, first: scan.first, ledgers: Vec::new() };
        for (cpu, tally) in (0..).zip(&scan.vcpus) {
            // With a bad page nothing adds up, which need not be reported twice.
            if self.oracle.counts_writes() && tally.bad_pages == 0 {
                damage.ledgers.extend(self.check_ledger(cpu, tally));
            }
        }
        if damage.bad_pages != 0 || !damage.ledgers.is_empty() {
            return Err(VerifyError::Damaged(Box::new(damage)));
        }
        let vcpus = self.view.vcpus.iter().zip(&scan.vcpus);
        Ok(VerifyReport {
            pages_checked: self.view.data_pages,
            writes: self.view.turns(),
            vcpus: vcpus
                .map(|(vcpu, tally)| VcpuReport {
                    turns: vcpu.control.turns,
                    inflight: tally.inflight,
                })
                .collect(),
        })
    }

    fn check_ledger(&self, cpu: u64, tally: &Tally) -> Option<BadLedger> {
        let control = &self.view.vcpus[to_usize(cpu)].control;
        let missing_turns = control.turns.wrapping_sub(tally.turns);
        let missing_ledger = control.ledger.wrapping_sub(tally.ledger);
        // A page in flight that is not among this vCPU's was not checked as such, and excuses
        // nothing.
        let stray = control.inflight_page_plus_1 != 0 && tally.inflight.is_none();
        let accepted = match tally.inflight {
            _ if stray => false,
            Some(inflight) if inflight.words_new == PAGE_WORDS && missing_turns == 1 => {
                missing_ledger == 0 || missing_ledger == self.oracle.weight(inflight.index)
            }
            _ => missing_turns == 0 && missing_ledger == 0,
        };
        (!accepted).then(|| BadLedger {
            cpu,
            turns: control.turns,
            found_turns: tally.turns,
            stale: self.find_stale(cpu, missing_turns, missing_ledger),
        })
    }

    /// Returns the first page whose missing writes alone would explain the ledger, if there is one.
    fn find_stale(&self, cpu: u64, missing_turns: u64, missing_ledger: u64) -> Option<StalePage> {
        if missing_turns == 0 {
            return None;
        }
        let order = PageOrder::new(&self.view.spec, cpu, self.view.data_pages);
        (0..order.own_pages())
            .map(|own| order.own_page(own))
            .find(|index| self.oracle.weight(*index).wrapping_mul(missing_turns) == missing_ledger)
            .map(|index| StalePage {
                gpa: self.gpa(index),
                index,
                behind: missing_turns.cast_signed(),
            })
    }

    fn gpa(&self, index: u64) -> u64 {
        // Callers pass indices of this workload, all of which have an address.
        self.view.data_gpa(index).unwrap_or(u64::MAX)
    }
}

fn word_of(bytes: &[u8; 4096], word: usize) -> u64 {
    bytes[word * 8..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// Returns the first word that differs from `content`.
fn first_difference(content: &PageContent, bytes: &[u8; 4096]) -> Option<usize> {
    let (pairs, _) = bytes.as_chunks::<16>();
    let mut difference = None;
    content.for_each_pair(|pair, [first, second]| {
        let found = u128::from_le_bytes(pairs[pair]);
        let wrong = found ^ (u128::from(first) | u128::from(second) << 64);
        if wrong != 0 {
            difference = Some(pair * 2 + usize::from(wrong.trailing_zeros() >= 64));
        }
        wrong == 0
    });
    difference
}
