//! Where vCPU threads meet the threads that stop them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum Ended {
    /// Somebody asked for the end.
    Stopped,
    /// Suspended to a snapshot with `checkpoint --exit`.
    Suspended,
    /// The guest reset its machine.
    GuestReset,
    /// The guest powered off its machine.
    PoweredOff,
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
    /// Stop at an instruction boundary, and do `task` once all vCPUs have.
    Park {
        task: Task,
    },
    Exit,
}

/// What a thread does with its own vCPU, which no other thread may touch, once all have stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    Nothing,
    /// Read the vCPU's state.
    Capture,
    /// Give the vCPU another state.
    Restore,
}

/// How long to spin before going to sleep: longer than any wait in a checkpoint's pause, since
/// being woken up would take longer than anything else in it.
const SPIN_AT_MOST: Duration = Duration::from_micros(400);

#[derive(Debug)]
struct Inner {
    goal: Goal,
    /// Counts goals, so that a thread parks once for each.
    epoch: u64,
    progress: Progress,
}

/// How far the threads have come towards the goal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Progress {
    /// Threads parked for this goal, not counting those still asleep from the one before.
    parked: u16,
    /// Threads whose vCPU has stopped for this goal.
    stopped: u16,
    /// Threads that wait in the gate, whichever goal brought them there.
    waiting: u16,
    /// Threads that have not left for good.
    alive: u16,
}

impl Progress {
    fn to_bits(self) -> u64 {
        [self.parked, self.stopped, self.waiting, self.alive]
            .iter()
            .fold(0, |bits, part| bits << 16 | u64::from(*part))
    }

    fn from_bits(bits: u64) -> Self {
        let part = |index: u32| (bits >> (48 - 16 * index)) as u16;
        Self { parked: part(0), stopped: part(1), waiting: part(2), alive: part(3) }
    }
}

impl Inner {
    fn change(&mut self, goal: Goal) {
        if self.goal != Goal::Exit {
            self.goal = goal;
            self.epoch += 1;
            self.progress.parked = 0;
            self.progress.stopped = 0;
        }
    }
}

/// See the module documentation.
///
/// Everything is decided under the lock. The atomics `epoch` and `progress` mirror what is under it
/// for threads that spin: once they see a change, they lock and look again.
#[derive(Debug)]
pub(super) struct Gate {
    inner: Mutex<Inner>,
    /// Set under the lock and read without it, so that asking how the machine is does not hold up
    /// the threads that stop it.
    ended: OnceLock<Ended>,
    /// vCPU threads wait here for another goal, or for each other.
    goal_changed: Condvar,
    /// The threads that stop them wait here for vCPU threads to arrive or leave.
    moved: Condvar,
    epoch: AtomicU64,
    progress: AtomicU64,
    /// Whether to spin: only on hosts with a core for every vCPU thread and one more. Elsewhere
    /// spinning would keep the threads that are waited for from running.
    spins: bool,
}

impl Gate {
    /// Creates a gate for `threads` vCPU threads, which start parked.
    pub(super) fn new(threads: usize) -> Self {
        let alive = u16::try_from(threads).expect("a machine has at most 254 vCPUs");
        let progress = Progress { alive, ..Progress::default() };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            inner: Mutex::new(Inner {
                goal: Goal::Park { task: Task::Nothing },
                epoch: 0,
                progress,
            }),
            ended: OnceLock::new(),
            goal_changed: Condvar::new(),
            moved: Condvar::new(),
            epoch: AtomicU64::new(0),
            progress: AtomicU64::new(progress.to_bits()),
            spins: threads < cores,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Updates what spinning threads see, and unlocks.
    fn unlock(&self, inner: MutexGuard<'_, Inner>) {
        self.epoch.store(inner.epoch, Ordering::Release);
        self.progress.store(inner.progress.to_bits(), Ordering::Release);
        drop(inner);
    }

    pub(super) fn goal(&self) -> (Goal, u64) {
        let inner = self.lock();
        (inner.goal, inner.epoch)
    }

    /// Sets the goal. Exit is final.
    pub(super) fn set_goal(&self, goal: Goal) {
        let mut inner = self.lock();
        inner.change(goal);
        self.unlock(inner);
        self.goal_changed.notify_all();
        self.moved.notify_all();
    }

    /// Called by a vCPU thread that has stopped for `epoch`: waits until all have, so that the
    /// states read afterwards include everything that the others still did, such as sending an
    /// interrupt to this vCPU. Returns false if the goal has changed.
    pub(super) fn wait_all_stopped(&self, epoch: u64) -> bool {
        let mut inner = self.lock();
        if inner.epoch == epoch {
            inner.progress.stopped += 1;
        }
        self.unlock(inner);
        self.goal_changed.notify_all();
        self.moved.notify_all();
        self.spin_until(|| {
            let Progress { stopped, alive, .. } = self.seen();
            stopped >= alive || self.epoch.load(Ordering::Acquire) != epoch
        });
        let mut inner = self.lock();
        while inner.epoch == epoch && inner.progress.stopped < inner.progress.alive {
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
        inner.progress.parked += 1;
        inner.progress.waiting += 1;
        self.unlock(inner);
        self.moved.notify_all();
        self.spin_until(|| self.epoch.load(Ordering::Acquire) != epoch);
        let mut inner = self.lock();
        while inner.epoch == epoch {
            inner = self.goal_changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.progress.waiting -= 1;
        self.unlock(inner);
        self.moved.notify_all();
    }

    /// Called by a vCPU thread as its last act.
    pub(super) fn leave(&self) {
        let mut inner = self.lock();
        inner.progress.alive -= 1;
        self.unlock(inner);
        self.moved.notify_all();
        self.goal_changed.notify_all();
    }

    /// Waits until the vCPUs of all threads have stopped, though the threads may still be reading
    /// them. Returns false if that takes longer than `patience`.
    pub(super) fn wait_stopped(&self, patience: Duration) -> bool {
        self.wait(patience, |progress| progress.stopped == progress.alive)
    }

    /// Waits until all threads are parked; returns false if that takes longer than `patience`.
    pub(super) fn wait_parked(&self, patience: Duration) -> bool {
        self.wait(patience, |progress| progress.parked == progress.alive)
    }

    /// Waits until all threads have left the gate, or somebody sets another goal. Returns false if
    /// that takes longer than `patience`.
    pub(super) fn wait_unparked(&self, patience: Duration) -> bool {
        let epoch = self.epoch.load(Ordering::Acquire);
        self.wait(patience, |progress| {
            progress.waiting == 0 || self.epoch.load(Ordering::Acquire) != epoch
        })
    }

    fn wait(&self, patience: Duration, reached: impl Fn(Progress) -> bool) -> bool {
        self.spin_until(|| reached(self.seen()));
        let until = Instant::now() + patience;
        let mut inner = self.lock();
        while !reached(inner.progress) {
            let Some(left) = until.checked_duration_since(Instant::now()) else { return false };
            inner = self.moved.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn seen(&self) -> Progress {
        Progress::from_bits(self.progress.load(Ordering::Acquire))
    }

    /// Spins until `reached`, for a limited time and only if there is a core for it.
    fn spin_until(&self, reached: impl Fn() -> bool) {
        if !self.spins {
            return;
        }
        let started = Instant::now();
        while !reached() && started.elapsed() < SPIN_AT_MOST {
            std::hint::spin_loop();
        }
    }

    /// Ends the machine. Of several reasons, the first stands.
    pub(super) fn end(&self, reason: Ended) {
        let mut inner = self.lock();
        // Fails if there is a reason already.
        let _one_before = self.ended.set(reason);
        inner.change(Goal::Exit);
        self.unlock(inner);
        self.goal_changed.notify_all();
        self.moved.notify_all();
    }

    pub(super) fn ended(&self) -> Option<Ended> {
        self.ended.get().cloned()
    }

    /// Waits for the machine's end; returns `None` if it has not ended after `patience`.
    pub(super) fn wait_ended(&self, patience: Duration) -> Option<Ended> {
        let until = Instant::now() + patience;
        let mut inner = self.lock();
        while self.ended.get().is_none() {
            let left = until.checked_duration_since(Instant::now())?;
            inner = self.moved.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        self.ended()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// Starts a thread that uses the gate as a vCPU's thread does, and counts its captures.
    fn thread(gate: &Arc<Gate>, captures: &Arc<AtomicU64>) -> std::thread::JoinHandle<()> {
        let (gate, captures) = (Arc::clone(gate), Arc::clone(captures));
        std::thread::spawn(move || {
            loop {
                match gate.goal() {
                    (Goal::Run, _) => std::thread::yield_now(),
                    (Goal::Park { task }, epoch) => {
                        captures.fetch_add(u64::from(task == Task::Capture), Ordering::SeqCst);
                        gate.park(epoch);
                    }
                    (Goal::Exit, _) => return gate.leave(),
                }
            }
        })
    }

    #[test]
    fn whether_it_has_ended_can_be_asked_while_the_gate_is_locked() {
        let gate = Arc::new(Gate::new(1));
        let asked = |gate: &Arc<Gate>| {
            let gate = Arc::clone(gate);
            let (tell, told) = std::sync::mpsc::channel();
            std::thread::spawn(move || tell.send(gate.ended()));
            told.recv_timeout(PATIENCE).expect("an answer")
        };
        let held = gate.lock();
        assert_eq!(asked(&gate), None);
        drop(held);
        gate.end(Ended::Stopped);
        let _held = gate.lock();
        assert_eq!(asked(&gate), Some(Ended::Stopped));
    }

    #[test]
    fn threads_that_stand_still_stop_again_for_another_goal() {
        let gate = Arc::new(Gate::new(3));
        let captures = Arc::default();
        let threads: Vec<_> = (0..3).map(|_| thread(&gate, &captures)).collect();
        assert!(gate.wait_parked(PATIENCE));
        for round in 1..=300 {
            // The threads are parked already, as in a VM that the user paused.
            gate.set_goal(Goal::Park { task: Task::Capture });
            assert!(gate.wait_parked(PATIENCE));
            assert_eq!(
                captures.load(Ordering::SeqCst),
                3 * round,
                "every thread captured before the wait ended"
            );
            if round % 3 == 0 {
                gate.set_goal(Goal::Run);
                assert!(gate.wait_unparked(PATIENCE));
                gate.set_goal(Goal::Park { task: Task::Nothing });
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
