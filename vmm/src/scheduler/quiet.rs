//! Moments in which the guest writes little. A checkpoint taken in one has less to copy while the
//! guest stands still.
//!
//! The measure is the number of pages written within [`LOOK_EVERY`], as dirty tracking finds them.
//! A look is a harvest. It loses nothing, since the pages it finds join those that the head lacks;
//! but they are watched anew, so each look costs the guest a fault for every page that it writes
//! again. Hence only a checkpoint that waits for a quiet moment looks.

use std::sync::TryLockError;
use std::time::Duration;

use frazil_snapstore::PageSet;

use crate::vm::Vm;

/// The time between two looks.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(2);
/// So few pages count as quiet, whatever is usual.
const FEW_PAGES: u64 = 4;
/// This share of the usual number of pages counts as quiet, too.
const QUIET_SHARE: f64 = 0.5;
/// The weight of a new look in the moving average, which thus covers about a hundred milliseconds
/// of looks.
const NEW_SHARE: f64 = 0.05;

/// Tells quiet from busy moments by what is usual for this guest.
#[derive(Debug, Default)]
pub(super) struct Quiet {
    /// Moving average of the pages that a look finds, over all looks, including those of earlier
    /// waits.
    usual: Option<f64>,
}

impl Quiet {
    /// Returns true if a look that found `pages` pages found a quiet moment. A guest that always
    /// writes the same amount has none, and a change that lasts becomes usual.
    pub fn is_now(&mut self, pages: u64) -> bool {
        let found = pages as f64;
        let usual = *self.usual.get_or_insert(found);
        self.usual = Some(usual + (found - usual) * NEW_SHARE);
        pages <= FEW_PAGES || found <= usual * QUIET_SHARE
    }
}

impl Vm {
    /// Returns how many pages were written since the last look or checkpoint, using `seen` as a
    /// scratch set. `None` if that is unknown: a checkpoint is being taken, or dirty tracking
    /// fails.
    pub(super) fn look(&self, seen: &mut PageSet) -> Option<u64> {
        let mut line = match self.line.try_lock() {
            Ok(line) => line,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        seen.clear();
        line.harvest(seen).ok()?;
        Some(seen.count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bursts_are_waited_out() {
        let mut quiet = Quiet::default();
        assert!(!quiet.is_now(1000), "nothing to compare with");
        let found: Vec<bool> = [900, 1100, 200, 1000, 3].map(|pages| quiet.is_now(pages)).into();
        assert_eq!(found, [false, false, true, false, true]);
    }

    #[test]
    fn a_guest_that_never_rests_has_no_quiet_moment() {
        let mut quiet = Quiet::default();
        assert!((0..1000).all(|n| !quiet.is_now(500 + n % 7)));
    }

    #[test]
    fn an_idle_guest_is_quiet_at_once() {
        let mut quiet = Quiet::default();
        assert!((0..=FEW_PAGES).all(|pages| quiet.is_now(pages)));
    }

    #[test]
    fn what_lasts_becomes_usual() {
        let mut quiet = Quiet::default();
        assert!((0..100).all(|_| !quiet.is_now(10_000)));
        let calmer = (0..200).take_while(|_| quiet.is_now(1_000)).count();
        assert!((10..150).contains(&calmer), "{calmer}");
        assert!(!quiet.is_now(1_000));
        assert!(!quiet.is_now(10_000));
    }
}
