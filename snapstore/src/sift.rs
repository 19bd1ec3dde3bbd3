//! Looking at a page before it is written: must it be, and whole?

use std::sync::Arc;

use crate::delta::{self, Base};
use crate::elide::{Entry, Fingerprint, fingerprint};
use crate::error::Result;
use crate::id::BlockRef;
use crate::node::Location;
use crate::page::{PAGE_SIZE, Page, is_zero};
use crate::store::{Elide, Store};
use crate::tree::Tree;

/// A page that differs from its base in more words of eight bytes than this is written whole, and
/// is a base itself from then on: the differences after it are small again. See `DESIGN.md`.
const DELTA_WORDS_MAX: usize = 40;

/// What is to become of a page.
pub(crate) enum Verdict {
    /// It is zero, and in the parent too if `equal`.
    Zero { equal: bool },
    /// It is what the parent has there.
    Equal(Location),
    /// It is in the store already.
    Known(Location),
    /// It is nearly this page.
    Near(Base, Arc<Page>),
    /// It must be written.
    New(Option<Fingerprint>),
}

impl Verdict {
    /// Of a page that must be written, if it has one.
    pub fn fingerprint(self) -> Option<Fingerprint> {
        if let Self::New(fingerprint) = self { fingerprint } else { None }
    }
}

/// Judges the pages of one worker.
pub(crate) struct Sifter<'a> {
    store: &'a Store,
    parent: Tree,
    elide: Elide,
    /// The parent's pages may help at all.
    compares: bool,
    /// Pages of this batch that may be compared with the parent's where that does not seem to pay.
    probes: usize,
    /// Of this batch: which pages are zero, if that matters; fingerprints of the pages that have
    /// any; and what is known of them.
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

    /// Judges the pages `numbers`, whose contents are `raw`, one after the other in `verdicts`.
    pub fn judge(&mut self, numbers: &[u64], raw: &[u8], verdicts: &mut Vec<Verdict>) {
        self.probes = self.store.delta_gate.probes();
        let (pages, _) = raw.as_chunks::<PAGE_SIZE>();
        self.look_up(pages);
        verdicts.clear();
        for (index, (number, page)) in numbers.iter().zip(pages).enumerate() {
            verdicts.push(self.judge_page(index, *number, page));
        }
    }

    /// Looks all pages up at once: each is a miss in every cache, and they overlap.
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
        if self.compares && gate.lets_in(number, &mut self.probes) {
            // A parent that cannot be read is no reason to lose the page: it is written whole.
            let verdict = self.compare(number, page).unwrap_or_default();
            gate.tried(number, verdict.is_some());
            if let Some(verdict) = verdict {
                return verdict;
            }
        }
        Verdict::New(self.fingerprints[index])
    }

    /// Where the parent has the page; none if there is no parent, or it cannot be read.
    fn parent_location(&self, number: u64) -> Option<Location> {
        self.parent.root?;
        self.parent.page(self.store, number).ok()
    }

    /// Where in the store `entry` points, if that is a page with the same contents.
    fn holder(&self, entry: Entry, page: &Page) -> Option<Location> {
        let (frame, slot) = self.store.fingerprints.page_of(entry)?;
        self.holds(&frame, slot, page).then_some(Location::Frame { frame, slot })
    }

    /// True if slot `slot` of `frame` is there, is kept by every later prune once it is referred
    /// to, and holds `page`. The reference is resolved anew, since the cache may know frames that
    /// the store has lost.
    fn holds(&self, frame: &BlockRef, slot: u8, page: &[u8]) -> bool {
        let there = self.store.segments.resolve(frame);
        there.is_ok_and(|place| place.slots.get(slot).is_some())
            && self
                .store
                .frame(frame, false)
                .is_ok_and(|view| view.bytes(slot, 1).is_ok_and(|bytes| bytes == page))
    }

    /// Compares with what the parent has.
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
                // Else it is what it was before the parent's change.
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
