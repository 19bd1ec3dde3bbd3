//! Sifting: decides for each page whether it must be written, and whether as a whole.

use std::sync::Arc;

use crate::delta::{self, Base};
use crate::elide::{Entry, Fingerprint, fingerprint};
use crate::error::Result;
use crate::id::BlockRef;
use crate::node::Location;
use crate::page::{PAGE_SIZE, Page, is_zero};
use crate::store::{Elide, Store};
use crate::tree::Tree;

/// A page that differs from its base in more 8-byte words than this is written whole. From then on
/// it is a base itself, so later differences are small again. See `DESIGN.md`.
const DELTA_WORDS_MAX: usize = 40;

/// What to do with a page.
pub(crate) enum Verdict {
    /// The page is zero; if `equal`, it is zero in the parent too.
    Zero { equal: bool },
    /// The page is the same as in the parent, which has it at this location.
    Equal(Location),
    /// The page is in the store already, at this location.
    Known(Location),
    /// The page is nearly the same as this base, whose contents follow.
    Near(Base, Arc<Page>),
    /// The page must be written; its fingerprint, if it has one.
    New(Option<Fingerprint>),
}

impl Verdict {
    /// The fingerprint of a page that must be written, if it has one.
    pub fn fingerprint(self) -> Option<Fingerprint> {
        if let Self::New(fingerprint) = self { fingerprint } else { None }
    }
}

/// Judges the pages of one worker.
pub(crate) struct Sifter<'a> {
    store: &'a Store,
    parent: Tree,
    elide: Elide,
    /// True if pages can be compared with the parent's at all.
    compares: bool,
    /// How many more pages of this batch may be compared although it does not seem to pay.
    probes: usize,
    /// For the pages of this batch: whether they are zero (if zero pages are elided), their
    /// fingerprints (if they have any), and the entries found for these.
    zero: Vec<bool>,
    fingerprints: Vec<Option<Fingerprint>>,
    known: Vec<Option<Entry>>,
}

impl<'a> Sifter<'a> {
    pub fn new(store: &'a Store, parent: Tree) -> Self {
        let elide = store.options.elide;
        let compares = parent.root.is_some() && (elide.equal || elide.delta);
        let (zero, fingerprints, known) = Default::default();
        Self { store, parent, elide, compares, probes: 0, zero, fingerprints, known }
    }

    /// Judges the pages `numbers`, whose contents are in `raw`; stores the results in `verdicts`,
    /// in the same order.
    pub fn judge(&mut self, numbers: &[u64], raw: &[u8], verdicts: &mut Vec<Verdict>) {
        self.probes = self.store.delta_gate.probes();
        let (pages, _) = raw.as_chunks::<PAGE_SIZE>();
        self.look_up(pages);
        verdicts.clear();
        for (index, (number, page)) in numbers.iter().zip(pages).enumerate() {
            verdicts.push(self.judge_page(index, *number, page));
        }
    }

    /// Looks up all pages at once, so that their cache misses overlap.
    fn look_up(&mut self, pages: &[Page]) {
        let (elide, seed) = (self.elide, self.store.uuid);
        self.zero.clear();
        self.zero.extend(pages.iter().map(|page| elide.zero && is_zero(page)));
        self.fingerprints.clear();
        self.fingerprints.extend(
            pages
                .iter()
                .zip(&self.zero)
                .map(|(page, zero)| (elide.dedup && !zero).then(|| fingerprint(page, seed))),
        );
        self.store.fingerprints.find(&self.fingerprints, &mut self.known);
    }

    fn judge_page(&mut self, index: usize, number: u64, page: &Page) -> Verdict {
        if self.zero[index] {
            let equal = self.elide.equal
                && self.parent_location(number).is_some_and(|found| found == Location::Zero);
            return Verdict::Zero { equal };
        }
        if let Some(location) = self.known[index].and_then(|entry| self.holder(entry, page)) {
            let same = self.elide.equal && self.parent_location(number) == Some(location);
            return if same { Verdict::Equal(location) } else { Verdict::Known(location) };
        }
        let gate = &self.store.delta_gate;
        if self.compares && gate.should_compare(number, &mut self.probes) {
            // If the parent cannot be read, the page is written whole.
            let verdict = self.compare(number, page).unwrap_or_default();
            gate.record(number, verdict.is_some());
            if let Some(verdict) = verdict {
                return verdict;
            }
        }
        Verdict::New(self.fingerprints[index])
    }

    /// Where the parent has page `number`; none if there is no parent, or its tree cannot be read.
    fn parent_location(&self, number: u64) -> Option<Location> {
        self.parent.root?;
        self.parent.page(self.store, number).ok()
    }

    /// The location that `entry` points to, if the page there has the same contents.
    fn holder(&self, entry: Entry, page: &Page) -> Option<Location> {
        let (frame, slot) = self.store.fingerprints.page_of(entry)?;
        self.holds(&frame, slot, page).then_some(Location::Frame { frame, slot })
    }

    /// True if slot `slot` of `frame` exists in the store, so that every later prune keeps it once
    /// it is referred to, and holds `page`. Resolves the reference anew, since the cache may hold
    /// frames that the store has lost.
    fn holds(&self, frame: &BlockRef, slot: u8, page: &[u8]) -> bool {
        let there = self.store.segments.resolve(frame);
        there.is_ok_and(|place| place.slots.get(slot).is_some())
            && self
                .store
                .frame(frame, false)
                .is_ok_and(|view| view.bytes(slot, 1).is_ok_and(|bytes| bytes == page))
    }

    /// Compares a page with the parent's; none if it must be written whole.
    fn compare(&self, number: u64, page: &[u8]) -> Result<Option<Verdict>> {
        let location = self.parent.page(self.store, number)?;
        let base = match location {
            Location::Zero => return Ok(None),
            Location::Frame { frame, slot } => Base { frame, slot },
            Location::Delta { frame, slot } => {
                let view = self.store.frame(&frame, true)?;
                let base = view.base(slot)?;
                let mut contents = *self.store.base_page(&base)?;
                delta::xor(&mut contents, view.bytes(slot, 1)?);
                if self.elide.equal && contents == page {
                    return Ok(Some(Verdict::Equal(location)));
                }
                base
            }
        };
        let contents = self.store.base_page(&base)?;
        match delta::differing_words(page, contents.as_slice()) {
            0 if self.elide.equal => {
                let found = Location::Frame { frame: base.frame, slot: base.slot };
                // Otherwise the page is again what it was before the parent changed it.
                let same = found == location;
                Ok(Some(if same { Verdict::Equal(found) } else { Verdict::Known(found) }))
            }
            words if self.elide.delta && words <= DELTA_WORDS_MAX => {
                Ok(Some(Verdict::Near(base, contents)))
            }
            _ => Ok(None),
        }
    }
}
