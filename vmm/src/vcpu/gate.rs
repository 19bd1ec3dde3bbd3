//! Where vCPU threads and those who stop them meet.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum Ended {
    /// Somebody asked for it.
    Stopped,
    /// Suspended to a snapshot with `checkpoint --exit`.
    Suspended,
    /// The guest reset or powered off its machine.
    GuestReset,
    /// The guest crashed: a triple fault.
    GuestCrashed {
        /// Where, as far as is known.
        detail: String,
    },
    /// The machine cannot go on.
    Failed {
        /// Why.
        detail: String,
    },
}

/// What vCPU threads should be doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Goal {
    Run,
    /// Stop at an instruction boundary; with `capture`, read the state too.
    Park {
        capture: bool,
    },
    Exit,
}

#[derive(Debug)]
struct Inner {
    goal: Goal,
    /// Counts goals, so that a thread parks once for each.
    epoch: u64,
    /// Threads parked for this goal: one that is still asleep from the goal before is not.
    parked: usize,
    /// Threads whose vCPU has stopped for this goal.
    stopped: usize,
    /// Threads asleep in the gate, whichever goal brought them there.
    asleep: usize,
    alive: usize,
    ended: Option<Ended>,
}

impl Inner {
    fn change(&mut self, goal: Goal) {
        if self.goal != Goal::Exit {
            self.goal = goal;
            self.epoch += 1;
            self.parked = 0;
            self.stopped = 0;
        }
    }
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Gate {
    inner: Mutex<Inner>,
    /// Threads wait here for another goal.
    goal_changed: Condvar,
    /// Those who stop them wait here for threads to arrive or leave.
    moved: Condvar,
}

impl Gate {
    /// A gate for `threads` vCPU threads, which start parked.
    pub(super) fn new(threads: usize) -> Self {
        Self {
            inner: Mutex::new(Inner {
                goal: Goal::Park { capture: false },
                epoch: 0,
                parked: 0,
                stopped: 0,
                asleep: 0,
                alive: threads,
                ended: None,
            }),
            goal_changed: Condvar::new(),
            moved: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn goal(&self) -> (Goal, u64) {
        let inner = self.lock();
        (inner.goal, inner.epoch)
    }

    /// Sets the goal. Exit is final.
    pub(super) fn set_goal(&self, goal: Goal) {
        self.lock().change(goal);
        self.goal_changed.notify_all();
    }

    /// Called by a vCPU thread that has stopped for `epoch`: waits until all have, so that nothing
    /// one of them still does, an interrupt to another vCPU say, is missing from what is read
    /// afterwards. False if the goal has changed.
    pub(super) fn wait_all_stopped(&self, epoch: u64) -> bool {
        let mut inner = self.lock();
        if inner.epoch == epoch {
            inner.stopped += 1;
            self.goal_changed.notify_all();
        }
        while inner.epoch == epoch && inner.stopped < inner.alive {
            inner = self.goal_changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.epoch == epoch
    }

    /// Called by a vCPU thread that has stopped for `epoch`: waits for another goal.
    pub(super) fn park(&self, epoch: u64) {
        let mut inner = self.lock();
        if inner.epoch != epoch {
            return;
        }
        inner.parked += 1;
        inner.asleep += 1;
        self.moved.notify_all();
        while inner.epoch == epoch {
            inner = self.goal_changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.asleep -= 1;
        drop(inner);
        self.moved.notify_all();
    }

    /// Called by a vCPU thread as its last act.
    pub(super) fn leave(&self) {
        self.lock().alive -= 1;
        self.moved.notify_all();
        self.goal_changed.notify_all();
    }

    /// Waits until all threads are parked; false if that took longer than `patience`.
    pub(super) fn wait_parked(&self, patience: Duration) -> bool {
        self.wait(patience, |inner| inner.parked == inner.alive)
    }

    /// Waits until all threads have left the gate; false if that took longer than `patience`.
    pub(super) fn wait_unparked(&self, patience: Duration) -> bool {
        self.wait(patience, |inner| inner.asleep == 0 || inner.goal != Goal::Run)
    }

    fn wait(&self, patience: Duration, reached: impl Fn(&Inner) -> bool) -> bool {
        let until = Instant::now() + patience;
        let mut inner = self.lock();
        while !reached(&inner) {
            let Some(left) = until.checked_duration_since(Instant::now()) else { return false };
            inner = self.moved.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Ends the machine, for the first reason given.
    pub(super) fn end(&self, reason: Ended) {
        let mut inner = self.lock();
        inner.ended.get_or_insert(reason);
        inner.change(Goal::Exit);
        drop(inner);
        self.goal_changed.notify_all();
        self.moved.notify_all();
    }

    pub(super) fn ended(&self) -> Option<Ended> {
        self.lock().ended.clone()
    }

    /// Waits for the machine's end; None if it goes on after `patience`.
    pub(super) fn wait_ended(&self, patience: Duration) -> Option<Ended> {
        self.wait(patience, |inner| inner.ended.is_some());
        self.ended()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// A thread that does what a vCPU's does at the gate, and counts its captures.
    fn thread(gate: &Arc<Gate>, captures: &Arc<AtomicU64>) -> std::thread::JoinHandle<()> {
        let (gate, captures) = (Arc::clone(gate), Arc::clone(captures));
        std::thread::spawn(move || {
            loop {
                match gate.goal() {
                    (Goal::Run, _) => std::thread::yield_now(),
                    (Goal::Park { capture }, epoch) => {
                        captures.fetch_add(u64::from(capture), Ordering::SeqCst);
                        gate.park(epoch);
                    }
                    (Goal::Exit, _) => return gate.leave(),
                }
            }
        })
    }

    #[test]
    fn threads_that_stand_still_stop_again_for_another_goal() {
        let gate = Arc::new(Gate::new(3));
        let captures = Arc::default();
        let threads: Vec<_> = (0..3).map(|_| thread(&gate, &captures)).collect();
        assert!(gate.wait_parked(PATIENCE));
        for round in 1..=300 {
            // Parked already, as in a VM that the user paused.
            gate.set_goal(Goal::Park { capture: true });
            assert!(gate.wait_parked(PATIENCE));
            assert_eq!(
                captures.load(Ordering::SeqCst),
                3 * round,
                "every thread captured before the wait ended"
            );
            if round % 3 == 0 {
                gate.set_goal(Goal::Run);
                assert!(gate.wait_unparked(PATIENCE));
                gate.set_goal(Goal::Park { capture: false });
                assert!(gate.wait_parked(PATIENCE));
            }
        }
        gate.end(Ended::GuestReset);
        gate.end(Ended::Stopped);
        assert_eq!(gate.wait_ended(PATIENCE), Some(Ended::GuestReset), "the first reason counts");
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert!(gate.wait_parked(PATIENCE), "nobody is left to wait for");
    }
}
