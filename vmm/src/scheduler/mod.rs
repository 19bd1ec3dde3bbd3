//! Scheduled checkpoints: at intervals or back to back and, if wanted, at moments in which the
//! guest writes little.
//!
//! `plan` and `quiet` decide what to do when, without reading a clock; the thread below reads the
//! clock and acts.

mod plan;
mod quiet;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use frazil_snapstore::PageSet;
use serde::Serialize;

use crate::checkpoint::{CheckpointReport, CheckpointRequest};
use crate::error::{Result, VmmError};
use crate::vm::Vm;

pub(crate) use plan::Beat;
use plan::{LeftOut, Outcome, Plan, Skips};
use quiet::{LOOK_EVERY, Quiet};

/// How often to take a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Every {
    /// At a fixed beat: checkpoints that fall due while another is being taken are left out.
    Interval(Duration),
    /// Each as soon as the one before is published.
    Continuous,
}

/// The longest interval, and the longest wait for a quiet moment: a hundred years. Adding much more
/// to a clock's time could overflow.
pub const TIME_MAX: Duration = Duration::from_hours(36_525 * 24);

/// When to take checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// How often.
    pub every: Every,
    /// How long a checkpoint that is due may wait for a moment in which the guest writes little;
    /// after that it is taken anyway.
    pub quiet: Option<Duration>,
}

/// Why checkpoints that were due were left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SkipReason {
    /// Another was being taken: the one before, or one that somebody asked for.
    NotDone,
    /// The one before was waiting for a quiet moment.
    Quiet,
    /// The one before failed or was cancelled: the next is tried after a while.
    Failed,
}

/// What the scheduler reports.
#[derive(Debug)]
pub enum ScheduleEvent<'a> {
    /// A checkpoint was taken, or failed.
    Checkpoint(&'a Result<CheckpointReport>),
    /// Checkpoints were left out since the last such event. Reported at once, then only every so
    /// often, and once more at the end.
    Skipped {
        /// How many were left out for this reason.
        count: u64,
        /// The reason.
        because: SkipReason,
    },
    /// The scheduler failed: no more checkpoints are taken, and the guest goes on.
    Died,
}

/// Called from the scheduler's thread.
pub type OnEvent = Arc<dyn Fn(&ScheduleEvent<'_>) + Send + Sync>;

impl Schedule {
    fn check(&self) -> Result<()> {
        let interval = match self.every {
            Every::Interval(interval) => Some(interval),
            Every::Continuous => None,
        };
        for time in [interval, self.quiet].into_iter().flatten() {
            if time.is_zero() || time > TIME_MAX {
                return Err(VmmError::Config(format!(
                    "checkpoint schedule: expected times above zero and at most a hundred years, \
                     found {time:?}"
                )));
            }
        }
        Ok(())
    }
}

/// Takes checkpoints by a [`Schedule`] until dropped: never two at once, and none that would have
/// to wait for the one before. Those left out are counted in the VM's totals, but not made up for.
#[derive(Debug)]
pub struct Scheduler {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Scheduler {
    /// Starts taking checkpoints of `vm` by `schedule`.
    ///
    /// # Errors
    /// [`VmmError::Config`] if a time is zero or longer than [`TIME_MAX`]; [`VmmError::Host`] if
    /// the scheduler's thread cannot be started.
    pub fn start(vm: Arc<Vm>, schedule: Schedule, on_event: OnEvent) -> Result<Self> {
        schedule.check()?;
        let (stop, stopped) = crossbeam_channel::bounded::<()>(0);
        let work = Work {
            plan: Plan::new(schedule.every, Instant::now()),
            vm,
            schedule,
            on_event: Arc::clone(&on_event),
            skips: Skips::default(),
            quiet: Quiet::default(),
            saved_at_rest: None,
        };
        let thread = std::thread::Builder::new()
            .name("frazil-schedule".into())
            .spawn(move || {
                // The panic hook has printed the panic's message.
                if catch_unwind(AssertUnwindSafe(|| work.run(&stopped))).is_err() {
                    on_event(&ScheduleEvent::Died);
                }
            })
            .map_err(VmmError::host("start the scheduler's thread"))?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // If the thread panicked, it has reported that.
            let _joined = thread.join();
        }
    }
}

/// Waits until `until`; returns false if the scheduler is to stop.
fn wait(stopped: &Receiver<()>, until: Instant) -> bool {
    let left = until.saturating_duration_since(Instant::now());
    stopped.recv_timeout(left) == Err(RecvTimeoutError::Timeout)
}

impl Vm {
    /// While the guest is paused by the user, returns a number that is unique to this pause.
    fn pause_number(&self) -> Option<u64> {
        // Read before `is_paused`: if stale, the number matches no later pause.
        let pauses = self.pauses.load(Ordering::Acquire);
        self.is_paused().then_some(pauses)
    }
}

/// The scheduler's thread.
struct Work {
    vm: Arc<Vm>,
    schedule: Schedule,
    on_event: OnEvent,
    plan: Plan,
    skips: Skips,
    quiet: Quiet,
    /// The last pause by the user during which the guest was saved.
    saved_at_rest: Option<u64>,
}

impl Work {
    fn run(mut self, stopped: &Receiver<()>) {
        while wait(stopped, self.plan.due()) && self.vm.ended().is_none() {
            let at_rest = self.vm.pause_number();
            if at_rest.is_some() && at_rest == self.saved_at_rest {
                // A snapshot takes up room even if nothing has changed.
                let _at_rest = self.plan.advance(Outcome::Resting, Instant::now());
                continue;
            }
            // From here on, missed checkpoints are counted, however long this one takes.
            self.vm.expect_beat(self.plan.beat());
            if !self.wait_for_quiet(stopped) {
                break;
            }
            let begun = Instant::now();
            let request = CheckpointRequest::default();
            let taken = match self.schedule.every {
                Every::Interval(_) => self.vm.checkpoint_if_idle(&request),
                // Waits for one that somebody asked for: there is no beat to miss.
                Every::Continuous => Some(self.vm.checkpoint(&request)),
            };
            if matches!(&taken, Some(Err(_)) if self.vm.ended().is_some()) {
                // The VM ended meanwhile, which is no failure.
                break;
            }
            self.saved_at_rest = at_rest.filter(|_| matches!(&taken, Some(Ok(_))));
            self.report_outcome(taken.as_ref(), begun);
        }
        let mut rest = self.skips.take_unreported();
        rest.not_done += self.vm.end_beat();
        self.report_skips(rest);
    }

    /// Counts and reports the outcome of the checkpoint that was due, and began at `begun`.
    fn report_outcome(&mut self, taken: Option<&Result<CheckpointReport>>, begun: Instant) {
        let now = Instant::now();
        taken.iter().for_each(|taken| (self.on_event)(&ScheduleEvent::Checkpoint(taken)));
        let outcome = match taken {
            Some(Ok(_)) => Outcome::Taken,
            Some(Err(_)) => Outcome::Failed,
            None => Outcome::LeftOut,
        };
        let quiet = self.schedule.quiet.map_or(0, |_| self.plan.missed(begun));
        let missed = self.plan.missed(now);
        let all = self.plan.advance(outcome, now);
        self.vm.count_beat(all);
        let left_out = LeftOut {
            // A due one left out itself is in the totals already (`checkpoint_if_idle`).
            not_done: missed - quiet + u64::from(outcome == Outcome::LeftOut),
            quiet,
            failed: all - missed,
        };
        let to_report = self.skips.add(left_out, now);
        self.report_skips(to_report);
    }

    fn report_skips(&self, left_out: LeftOut) {
        for (because, count) in left_out.reasons() {
            (self.on_event)(&ScheduleEvent::Skipped { count, because });
        }
    }

    /// Waits until the guest writes little or patience runs out; returns false if the scheduler is
    /// to stop.
    fn wait_for_quiet(&mut self, stopped: &Receiver<()>) -> bool {
        let Some(patience) = self.schedule.quiet else { return true };
        let until = Instant::now() + patience;
        let mut seen = PageSet::new(self.vm.ram().end_page());
        // The first look discards what was written before now.
        let mut look = || self.vm.look(&mut seen);
        if look().is_none() {
            return true;
        }
        loop {
            let next = Instant::now() + LOOK_EVERY;
            if next > until {
                return true;
            }
            if !wait(stopped, next) {
                return false;
            }
            match look() {
                Some(pages) if !self.quiet.is_now(pages) => {}
                _ => return true,
            }
        }
    }
}
