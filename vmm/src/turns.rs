//! Takes turns at writing to the store: a VM's checkpoints one after the other, and its
//! housekeeping between them.
//!
//! The store admits one writer at a time, and tells a second one that it is busy. Within one
//! process that would needlessly lose a checkpoint, so its writers queue here. The queue is first
//! come, first served, so that back-to-back checkpoints cannot starve other writers.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use frazil_snapstore::PruneProgress;

/// The queue of a VM's writers.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The next ticket to hand out.
    next: u64,
    /// The ticket whose turn it is.
    now: u64,
    /// Checkpoints that are being taken or are waiting.
    checkpoints: usize,
    /// The checkpoint that is being taken.
    taking: Option<Arc<Taking>>,
    /// The prune that is running, and the time from which it gives way.
    prune: Option<(Arc<PruneProgress>, Instant)>,
    no_more_prunes: bool,
}

/// What has happened to a checkpoint.
#[derive(Debug, Default)]
struct Taking {
    cancelled: AtomicBool,
    published: AtomicBool,
}

/// A writer's turn, until dropped.
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    turns: &'a Turns,
    /// When the turn was requested.
    pub since: Instant,
    /// None if this is not a checkpoint's turn.
    taking: Option<Arc<Taking>>,
}

impl Turns {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the turn of a checkpoint. A prune gives way to it.
    pub fn checkpoint(&self) -> Turn<'_> {
        self.take_checkpoint(self.lock())
    }

    /// Like [`Self::checkpoint`], but returns None if a checkpoint is being taken or is waiting.
    pub fn checkpoint_if_none(&self) -> Option<Turn<'_>> {
        let state = self.lock();
        (state.checkpoints == 0).then(|| self.take_checkpoint(state))
    }

    fn take_checkpoint(&self, mut state: MutexGuard<'_, State>) -> Turn<'_> {
        let (since, taking) = (Instant::now(), Arc::new(Taking::default()));
        state.checkpoints += 1;
        let mut state = self.wait_for_turn(state, true);
        state.taking = Some(Arc::clone(&taking));
        Turn { turns: self, since, taking: Some(taking) }
    }

    /// Waits for a turn for something short. A prune does not give way to it.
    pub fn short_turn(&self) -> Turn<'_> {
        let since = Instant::now();
        drop(self.wait_for_turn(self.lock(), false));
        Turn { turns: self, since, taking: None }
    }

    /// Waits for the turn of a rewind. A prune gives way to it.
    pub fn rewind(&self) -> Turn<'_> {
        let since = Instant::now();
        drop(self.wait_for_turn(self.lock(), true));
        Turn { turns: self, since, taking: None }
    }

    /// Waits for the turn of a prune. Waiting checkpoints and rewinds cancel it through `progress`,
    /// but not before it has had `patience`. None after [`Self::end_prunes`].
    pub fn prune(&self, progress: &Arc<PruneProgress>, patience: Duration) -> Option<Turn<'_>> {
        let turn = self.short_turn();
        let mut state = self.lock();
        if state.no_more_prunes {
            // Dropping the turn takes the lock.
            drop(state);
            return None;
        }
        state.prune = Some((Arc::clone(progress), Instant::now() + patience));
        // Those who wait have to learn when the prune gives way.
        self.changed.notify_all();
        Some(turn)
    }

    /// Cancels the running prune, if any, and lets no other begin.
    pub fn end_prunes(&self) {
        let mut state = self.lock();
        state.no_more_prunes = true;
        state.prune.iter().for_each(|(progress, _)| progress.cancel());
    }

    /// Takes a ticket and waits for its turn; cancels a prune in the meantime if it `interrupts`.
    fn wait_for_turn<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        interrupts: bool,
    ) -> MutexGuard<'a, State> {
        let ticket = state.next;
        state.next += 1;
        while state.now != ticket {
            let prune = state.prune.as_ref().filter(|_| interrupts);
            let left = prune.map(|(progress, until)| {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    progress.cancel();
                }
                left
            });
            state = match left {
                Some(left) if !left.is_zero() => {
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
                _ => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
        state
    }

    /// True if the checkpoint that is being taken was cancelled.
    pub fn is_cancelled(&self) -> bool {
        let state = self.lock();
        state.taking.as_ref().is_some_and(|taking| taking.cancelled.load(Ordering::Relaxed))
    }

    /// Cancels the checkpoint that is being taken, by calling `cancel`, and waits until it is over.
    /// Returns false if there is none, or it was published all the same.
    pub fn cancel_checkpoint(&self, cancel: impl FnOnce()) -> bool {
        let mut state = self.lock();
        let Some(taking) = state.taking.clone() else { return false };
        taking.cancelled.store(true, Ordering::Relaxed);
        // Under the lock, so that this cannot cancel the next checkpoint instead.
        cancel();
        while state.taking.as_ref().is_some_and(|now| Arc::ptr_eq(now, &taking)) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        !taking.published.load(Ordering::Relaxed)
    }
}

impl Turn<'_> {
    /// Records that this turn's checkpoint was published.
    pub fn record_published(&self) {
        self.taking.iter().for_each(|taking| taking.published.store(true, Ordering::Relaxed));
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.turns.lock();
        state.now += 1;
        state.prune = None;
        if self.taking.is_some() {
            state.taking = None;
            state.checkpoints -= 1;
        }
        self.turns.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    /// Yields to other threads until the state has `reached` a condition.
    fn wait_until(turns: &Turns, reached: impl Fn(&State) -> bool) {
        while !reached(&turns.lock()) {
            thread::yield_now();
        }
    }

    #[test]
    fn turns_are_taken_in_the_order_in_which_they_were_asked_for() {
        let turns = Turns::default();
        let (said, heard) = channel();
        let first = turns.checkpoint();
        thread::scope(|scope| {
            for index in 0..8_u64 {
                let (said, turns) = (said.clone(), &turns);
                scope.spawn(move || {
                    let turn = if index % 3 == 1 { turns.short_turn() } else { turns.checkpoint() };
                    said.send(index).unwrap();
                    drop(turn);
                });
                wait_until(turns, |state| state.next == index + 2);
            }
            assert!(heard.try_recv().is_err(), "nobody overtakes");
            drop(first);
        });
        assert_eq!(heard.try_iter().collect::<Vec<_>>(), (0..8).collect::<Vec<_>>());
    }

    #[test]
    fn a_second_checkpoint_is_left_out_or_waits_as_its_caller_likes() {
        let turns = Turns::default();
        let one = turns.checkpoint_if_none().expect("the first");
        assert!(turns.checkpoint_if_none().is_none());
        drop(one);
        let short_turn = turns.short_turn();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| turns.checkpoint_if_none().is_some());
            wait_until(&turns, |state| state.checkpoints == 1);
            assert!(turns.checkpoint_if_none().is_none(), "one waits");
            drop(short_turn);
            assert!(waiting.join().unwrap(), "housekeeping is waited for");
        });
    }

    #[test]
    fn a_prune_gives_way_to_a_checkpoint_and_to_nobody_else() {
        let turns = Turns::default();
        let progress = Arc::new(PruneProgress::default());
        let turn = turns.prune(&progress, Duration::ZERO).expect("a turn");
        thread::scope(|scope| {
            scope.spawn(|| turns.short_turn());
            wait_until(&turns, |state| state.next == 2);
            assert!(!progress.is_cancelled());
            scope.spawn(|| turns.checkpoint());
            while !progress.is_cancelled() {
                thread::yield_now();
            }
            drop(turn);
        });
        turns.end_prunes();
        assert!(turns.prune(&progress, Duration::ZERO).is_none());
        drop(turns.checkpoint());
    }

    #[test]
    fn the_end_does_not_wait_for_a_patient_prune() {
        let turns = Turns::default();
        let progress = Arc::new(PruneProgress::default());
        let _turn = turns.prune(&progress, Duration::from_hours(1)).expect("a turn");
        assert!(!progress.is_cancelled());
        turns.end_prunes();
        assert!(progress.is_cancelled());
    }

    #[test]
    fn cancelling_tells_whether_there_was_one_and_what_became_of_it() {
        let turns = Turns::default();
        assert!(!turns.cancel_checkpoint(|| panic!("there is none")));
        for published in [false, true] {
            let turn = turns.checkpoint();
            thread::scope(|scope| {
                let cancelled = scope.spawn(|| turns.cancel_checkpoint(|| {}));
                while !turns.is_cancelled() {
                    thread::yield_now();
                }
                if published {
                    turn.record_published();
                }
                drop(turn);
                assert_eq!(cancelled.join().unwrap(), !published);
            });
        }
        let _next = turns.checkpoint();
        assert!(!turns.is_cancelled(), "it was the one before");
    }
}
