//! Keeping a guest from running for a share of the time, where nothing else lets a checkpoint catch up
//! with it: its pages are too many to be copied aside and cannot be left in place. It is done openly:
//! the user sets the limit, and the statistics say how long the guest stood still.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread::Thread;
use std::time::{Duration, Instant};

use super::{CUT_PAGES_MAX, Checkpoint, us};
use crate::error::{Result, VmmError};
use crate::vm::Vm;

/// A guest stands for so long at once: as long as a checkpoint's pause may be.
const STAND: Duration = Duration::from_millis(4);
/// And for so long at the most, on a host so busy that it takes a while to stop it again: else it would
/// run for more than its share.
const STAND_MAX: Duration = Duration::from_millis(250);
/// Shares of the time, in percent, that are tried one after the other, up to the user's limit.
const STEPS: [u8; 4] = [50, 75, 90, 97];
/// Tries at the limit before a checkpoint takes what is left as it is.
const TRIES_AT_LIMIT: usize = 4;

/// Has a guest stand still again and again.
#[derive(Debug, Default)]
struct Throttle {
    percent: AtomicU8,
    stood_us: AtomicU64,
    is_over: AtomicBool,
}

impl Throttle {
    /// The thread. It ends by itself when the machine does.
    fn run(&self, vm: &Vm) {
        // What it is to stand for what it ran, which on a busy host is longer than it was let.
        let mut owed = STAND;
        let mut ran_since = Instant::now();
        while !self.is_over.load(Ordering::Acquire) {
            let stand = owed.min(STAND_MAX);
            let stood = vm.while_paused(|| {
                let began = Instant::now();
                std::thread::sleep(stand);
                (began - ran_since, began.elapsed())
            });
            let Ok((ran, stood)) = stood else { return };
            ran_since = Instant::now();
            self.stood_us.fetch_add(us(stood), Ordering::AcqRel);
            let percent = u32::from(self.percent.load(Ordering::Acquire)).min(99);
            owed = (owed + ran * percent / (100 - percent)).saturating_sub(stood);
            // Until it owes as much again.
            let more = STAND.saturating_sub(owed);
            std::thread::park_timeout(more * (100 - percent) / percent.max(1));
        }
    }
}

/// Ends the thread, however the work beside it ends.
struct Over<'a>(&'a Throttle, &'a Thread);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.is_over.store(true, Ordering::Release);
        // Nobody waits for the guest to have had its share.
        self.1.unpark();
    }
}

impl Checkpoint<'_> {
    /// Where pages cannot be left in place and are more than may be copied in the pause: writes, and
    /// then copies, what is dirty, and slows the guest down until that catches up with it.
    pub(super) fn slow_down_and_copy(&mut self) -> Result<()> {
        let vm = self.vm;
        let limit = vm.throttle_max_percent();
        if limit == 0 {
            // The user rather has it pause.
            return Ok(());
        }
        let throttle =
            Throttle { percent: AtomicU8::new(limit.min(STEPS[0])), ..Throttle::default() };
        let caught_up = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("frazil-throttle".into())
                .spawn_scoped(scope, || throttle.run(vm))
                .map_err(VmmError::host("start a thread"))?;
            let _over = Over(&throttle, thread.thread());
            self.catch_up(&throttle, limit)
        });
        self.stats.throttled_us = throttle.stood_us.load(Ordering::Acquire);
        self.stats.throttle_percent = throttle.percent.load(Ordering::Acquire);
        caught_up
    }

    /// Until little enough waits to be copied in the pause, or the limit does not suffice.
    fn catch_up(&mut self, throttle: &Throttle, limit: u8) -> Result<()> {
        let steps = STEPS.into_iter().filter(|step| *step < limit);
        for percent in steps.chain(std::iter::repeat_n(limit, TRIES_AT_LIMIT)) {
            throttle.percent.store(percent, Ordering::Release);
            if self.line.staging.len() as u64 > self.vm.staging_pages() {
                // No more memory than that: what was copied is written like the rest.
                self.line.staging.give_back(&mut self.waiting);
            }
            if self.waiting.count() > self.vm.staging_pages() {
                self.precopy_round()?;
            }
            let pages = self.waiting.count();
            if pages <= self.vm.staging_pages() {
                self.line.staging.reserve(pages as usize);
                self.copy_aside()?;
            }
            if self.waiting.count() <= CUT_PAGES_MAX {
                return Ok(());
            }
        }
        let left = self.waiting.count();
        tracing::warn!(
            left,
            limit,
            "a checkpoint does not catch up with the guest, which stands still for it"
        );
        Ok(())
    }
}
