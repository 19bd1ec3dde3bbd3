//! Throttling: keeps a guest from running for a share of the time, where nothing else lets a
//! checkpoint catch up with it, because it has too many dirty pages to copy aside and they cannot
//! be left in place. The user sets the limit, and the statistics say how long the guest was held.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread::Thread;
use std::time::{Duration, Instant};

use super::{CUT_PAGES_MAX, Checkpoint, us};
use crate::error::{Result, VmmError};
use crate::vm::Vm;

/// How long the guest is held at a time: as long as a checkpoint's pause may be.
const STAND: Duration = Duration::from_millis(4);
/// The longest that it is held at a time. It is held for longer than [`STAND`] on a host so busy
/// that stopping it again takes a while; otherwise it would run for more than its share.
const STAND_MAX: Duration = Duration::from_millis(250);
/// Shares of the time, in percent, that are tried one after the other, up to the user's limit.
const STEPS: [u8; 4] = [50, 75, 90, 97];
/// Rounds at the limit before the checkpoint leaves the remaining pages to the pause.
const TRIES_AT_LIMIT: usize = 4;

/// Holds a guest again and again.
#[derive(Debug, Default)]
struct Throttle {
    percent: AtomicU8,
    stood_us: AtomicU64,
    is_over: AtomicBool,
}

impl Throttle {
    /// The thread's work. It ends by itself when the machine does.
    fn run(&self, vm: &Vm) {
        // How long the guest must still be held for the time that it ran, which on a busy host is
        // longer than intended.
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
            // Lets the guest run until it owes `STAND` again.
            let more = STAND.saturating_sub(owed);
            std::thread::park_timeout(more * (100 - percent) / percent.max(1));
        }
    }
}

/// Ends the throttling thread, however the work beside it ends.
struct Over<'a>(&'a Throttle, &'a Thread);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.is_over.store(true, Ordering::Release);
        // Ends its sleep early.
        self.1.unpark();
    }
}

impl Checkpoint<'_> {
    /// For when pages cannot be left in place and are too many to copy in the pause: writes dirty
    /// pages to the store or copies them aside, and throttles the guest until that catches up.
    pub(super) fn slow_down_and_copy(&mut self) -> Result<()> {
        let vm = self.vm;
        let limit = vm.throttle_max_percent();
        if limit == 0 {
            // The user prefers a long pause.
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

    /// Writes and copies pages until few enough are left for the pause, or the limit does not
    /// suffice.
    fn catch_up(&mut self, throttle: &Throttle, limit: u8) -> Result<()> {
        let steps = STEPS.into_iter().filter(|step| *step < limit);
        for percent in steps.chain(std::iter::repeat_n(limit, TRIES_AT_LIMIT)) {
            throttle.percent.store(percent, Ordering::Release);
            if self.line.staging.len() as u64 > self.vm.staging_pages() {
                // Staging is full: the copied pages are written to the store like the rest.
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
            "a checkpoint cannot catch up with the guest: the pause will be longer"
        );
        Ok(())
    }
}
