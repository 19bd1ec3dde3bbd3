//! Looking at a page before it is written: must it be, and whole?

use std::sync::Arc;

use crate::delta::{self, Base};
use crate::elide::{Fingerprint, fingerprint};
use crate::error::Result;
use crate::id::BlockRef;
use crate::node::Location;
use crate::page::{Page, is_zero};
use crate::store::{Elide, Store};
use crate::tree::Tree;

/// A page that differs from its base in more words of eight bytes than this is written whole, and is
/// a base itself from then on: the differences after it are small again. See `DESIGN.md`.
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

/// Judges the pages of one worker.
pub(crate) struct Sifter<'a> {
    store: &'a Store,
    parent: Tree,
    elide: Elide,
    /// Pages of this batch that may still be compared with the parent's.
    tries_left: usize,
    tried: usize,
    useful: usize,
}

impl<'a> Sifter<'a> {
    pub fn new(store: &'a Store, parent: Tree) -> Self {
        let elide = store.options.elide;
        Self { store, parent, elide, tries_left: 0, tried: 0, useful: 0 }
    }

    pub fn start_batch(&mut self) {
        let compares = self.parent.root.is_some() && (self.elide.equal || self.elide.delta);
        self.tries_left = if compares { self.store.delta_gate.pages_to_try() } else { 0 };
        (self.tried, self.useful) = (0, 0);
    }

    pub fn end_batch(&self) {
        self.store.delta_gate.tried(self.tried, self.useful);
    }

    pub fn judge(&mut self, number: u64, page: &[u8]) -> Verdict {
        if self.elide.zero && is_zero(page) {
            let equal = self.elide.equal
                && self.parent_location(number).is_some_and(|found| found == Location::Zero);
            return Verdict::Zero { equal };
        }
        let mut hash = None;
        if self.elide.dedup {
            let fingerprint = fingerprint(page, self.store.uuid);
            hash = Some(fingerprint);
            if let Some(location) = self.known(fingerprint, page) {
                let same = self.elide.equal && self.parent_location(number) == Some(location);
                return if same { Verdict::Equal(location) } else { Verdict::Known(location) };
            }
        }
        if self.tries_left > 0 {
            self.tries_left -= 1;
            self.tried += 1;
            // A parent that cannot be read is no reason to lose the page: it is written whole.
            if let Ok(Some(verdict)) = self.compare(number, page) {
                self.useful += 1;
                return verdict;
            }
        }
        Verdict::New(hash)
    }

    /// Where the parent has the page; none if there is no parent, or it cannot be read.
    fn parent_location(&self, number: u64) -> Option<Location> {
        self.parent.root?;
        self.parent.page(self.store, number).ok()
    }

    /// Where in the store a page with the same contents is.
    fn known(&self, fingerprint: Fingerprint, page: &[u8]) -> Option<Location> {
        let (frame, slot) = self.store.fingerprints.find(fingerprint)?;
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
