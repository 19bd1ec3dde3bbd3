//! The main loop of a vCPU: write pages at the rate asked for, watch the clock, report, check.

use core::mem::offset_of;

use super::Plan;
use super::control::{
    CONTROL_GPA, GAP_RING_ENTRIES, Header, PAGE_BYTES, data_gpa, gap_ring_gpa, vcpu_field,
};
use super::machine::{Ram, pause, read_tsc};
use super::oracle::{Oracle, PageOrder};
use super::serial::say;
use super::writer::{Memory, write_page};

/// A vCPU that fell behind (it was paused, or the memory was slow) makes up for this much at most.
const CATCH_UP_MS_MAX: u64 = 10;

/// One vCPU at work.
pub struct Worker<'a> {
    plan: &'a Plan,
    cpu: u64,
    oracle: Oracle,
    order: PageOrder,
    clock: Clock,
    pace: Pace,
}

impl<'a> Worker<'a> {
    pub fn new(plan: &'a Plan, cpu: u64) -> Self {
        let spec = &plan.spec;
        let now_tsc = read_tsc();
        Self {
            plan,
            cpu,
            oracle: Oracle::new(spec),
            order: PageOrder::new(spec, cpu, plan.data_pages),
            clock: Clock::new(cpu, now_tsc, spec.gap_us * spec.tsc_khz / 1000),
            pace: Pace::new(spec.rate_pages_per_s, spec.cpus, spec.tsc_khz, now_tsc),
        }
    }

    pub fn run(mut self) -> ! {
        let spec = &self.plan.spec;
        let stop_after = spec.stop_after_turns.unwrap_or(u64::MAX);
        self.populate(stop_after);
        self.clock.resume(read_tsc());
        self.pace.restart(self.clock.last_tsc);
        let mut report = Alarm::new(spec.report_s, spec.tsc_khz, self.clock.last_tsc);
        let mut check = Alarm::new(spec.check_s, spec.tsc_khz, self.clock.last_tsc);
        let mut turn = Ram.load(vcpu_field!(self.cpu, turns));
        loop {
            let now_tsc = self.clock.look();
            let command = Ram.load(CONTROL_GPA + offset_of!(Header, command) as u64);
            if command != Ram.load(vcpu_field!(self.cpu, command_done)) {
                self.check();
                Ram.store(vcpu_field!(self.cpu, command_done), command);
            } else if check.rings(now_tsc) {
                self.check();
            } else if report.rings(now_tsc) {
                self.report();
            } else if turn < stop_after && self.pace.allows(now_tsc) {
                self.write(turn);
                turn += 1;
            } else {
                pause();
            }
        }
    }

    fn write(&mut self, turn: u64) {
        let index = self.order.page_at(turn);
        write_page(&mut Ram, &self.oracle, self.cpu, index, self.gpa(index));
    }

    /// Writes every page once, at full speed.
    fn populate(&mut self, stop_after: u64) {
        let start_tsc = read_tsc();
        let turns = self.order.populate_turns().min(stop_after);
        for turn in 0..turns {
            self.write(turn);
            self.clock.look();
        }
        Ram.store(vcpu_field!(self.cpu, populated), 1);
        let took_ms = read_tsc().wrapping_sub(start_tsc) / self.plan.spec.tsc_khz;
        if self.plan.spec.report_s != 0 {
            self.say(format_args!("populated in {took_ms} ms pages={turns}"));
        }
    }

    fn report(&mut self) {
        let field = |gpa| Ram.load(gpa);
        let (turns, loops) =
            (field(vcpu_field!(self.cpu, turns)), field(vcpu_field!(self.cpu, loops)));
        let gap_us_max = field(vcpu_field!(self.cpu, gap_max_tsc)) * 1000 / self.plan.spec.tsc_khz;
        self.say(format_args!("turns={turns} loops={loops} gap_us_max={gap_us_max}"));
    }

    /// Checks all pages of this vCPU and its ledger. Nothing is in flight here, so all must be exact.
    fn check(&mut self) {
        let (mut turns, mut ledger, mut bad_page) = (0u64, 0u64, None);
        for own in 0..self.order.own_pages() {
            let index = self.order.own_page(own);
            let gpa = self.gpa(index);
            let count = if self.oracle.counts_writes() { Ram.load(gpa) } else { 0 };
            let mut good = true;
            self.oracle.page(index, count).for_each_pair(|pair, words| {
                let at = gpa + pair as u64 * 16;
                good = [Ram.load(at), Ram.load(at + 8)] == words;
                good
            });
            if !good {
                bad_page = bad_page.or(Some(index));
            }
            turns = turns.wrapping_add(count);
            ledger = ledger.wrapping_add(self.oracle.weight(index).wrapping_mul(count));
            self.clock.look();
        }
        let expected_turns = Ram.load(vcpu_field!(self.cpu, turns));
        let expected_ledger = Ram.load(vcpu_field!(self.cpu, ledger));
        let stale =
            self.oracle.counts_writes() && (turns, ledger) != (expected_turns, expected_ledger);

        self.bump(vcpu_field!(self.cpu, checks_done));
        if bad_page.is_some() || stale {
            self.bump(vcpu_field!(self.cpu, check_failures));
        }
        let pages = self.order.own_pages();
        match bad_page {
            Some(page) => {
                let gpa = self.gpa(page);
                self.say(format_args!("check FAILED page={page} gpa={gpa:#x}"));
            }
            None if stale => {
                self.say(format_args!("check FAILED stale turns={turns}/{expected_turns}"))
            }
            None => self.say(format_args!("check ok pages={pages} turns={expected_turns}")),
        }
    }

    fn bump(&self, gpa: u64) {
        Ram.store(gpa, Ram.load(gpa) + 1);
    }

    fn say(&mut self, text: core::fmt::Arguments<'_>) {
        let (cpu, clock) = (self.cpu, &mut self.clock);
        say(cpu, &mut || _ = clock.look(), format_args!("cpu {cpu} {text}"));
    }

    #[inline]
    fn gpa(&self, index: u64) -> u64 {
        let first = self.plan.ranges[0];
        if index < first.pages {
            return first.gpa + index * PAGE_BYTES;
        }
        // An index is below the number of data pages, so it has an address.
        data_gpa(&self.plan.ranges, index).unwrap_or(first.gpa)
    }
}

/// Looks at the clock and remembers when it could not for a while: then this vCPU was not running.
struct Clock {
    cpu: u64,
    last_tsc: u64,
    threshold_tsc: u64,
    loops: u64,
    gap_max_tsc: u64,
    gap_count: u64,
}

impl Clock {
    fn new(cpu: u64, now_tsc: u64, threshold_tsc: u64) -> Self {
        Self { cpu, last_tsc: now_tsc, threshold_tsc, loops: 0, gap_max_tsc: 0, gap_count: 0 }
    }

    /// One turn of the loop. Returns the time.
    #[inline]
    fn look(&mut self) -> u64 {
        let now_tsc = read_tsc();
        // A resumed machine may have a clock that was set back; that is no gap.
        let gap_tsc = now_tsc.saturating_sub(self.last_tsc);
        self.last_tsc = now_tsc;
        self.loops += 1;
        Ram.store(vcpu_field!(self.cpu, loops), self.loops);
        Ram.store(vcpu_field!(self.cpu, last_tsc), now_tsc);
        if gap_tsc > self.threshold_tsc {
            self.record(now_tsc, gap_tsc);
        }
        now_tsc
    }

    #[cold]
    fn record(&mut self, now_tsc: u64, gap_tsc: u64) {
        let entry = gap_ring_gpa(self.cpu) + self.gap_count % GAP_RING_ENTRIES * 16;
        Ram.store(entry, now_tsc);
        Ram.store(entry + 8, gap_tsc);
        self.gap_count += 1;
        Ram.store(vcpu_field!(self.cpu, gap_count), self.gap_count);
        if gap_tsc > self.gap_max_tsc {
            self.gap_max_tsc = gap_tsc;
            Ram.store(vcpu_field!(self.cpu, gap_max_tsc), gap_tsc);
        }
    }

    /// Goes on from `now_tsc`, and forgets the longest gap: those of the populating are not of interest.
    fn resume(&mut self, now_tsc: u64) {
        self.last_tsc = now_tsc;
        self.gap_max_tsc = 0;
        Ram.store(vcpu_field!(self.cpu, gap_max_tsc), 0);
    }
}

/// When the next write is due. Time is in 256ths of a TSC tick since `start_tsc`, so that a rate whose period
/// is not a whole number of ticks is met all the same.
struct Pace {
    start_tsc: u64,
    due: u64,
    period: u64,
    behind_max: u64,
}

impl Pace {
    fn new(rate_pages_per_s: u64, cpus: u64, tsc_khz: u64, now_tsc: u64) -> Self {
        let period = (tsc_khz * 1000 * 256 * cpus).checked_div(rate_pages_per_s).unwrap_or(0);
        Self { start_tsc: now_tsc, due: 0, period, behind_max: CATCH_UP_MS_MAX * tsc_khz * 256 }
    }

    fn restart(&mut self, now_tsc: u64) {
        self.start_tsc = now_tsc;
        self.due = 0;
    }

    #[inline]
    fn allows(&mut self, now_tsc: u64) -> bool {
        if self.period == 0 {
            return true;
        }
        let now = now_tsc.saturating_sub(self.start_tsc) * 256;
        if now < self.due {
            if self.due - now > 2 * self.period {
                self.restart(now_tsc); // the clock was set back
            }
            return false;
        }
        self.due = self.due.max(now.saturating_sub(self.behind_max)) + self.period;
        true
    }
}

/// Rings every so many seconds; never, with a period of 0.
struct Alarm {
    last_tsc: u64,
    period_tsc: u64,
}

impl Alarm {
    fn new(period_s: u64, tsc_khz: u64, now_tsc: u64) -> Self {
        Self { last_tsc: now_tsc, period_tsc: period_s * tsc_khz * 1000 }
    }

    #[inline]
    fn rings(&mut self, now_tsc: u64) -> bool {
        let rings =
            self.period_tsc != 0 && now_tsc.saturating_sub(self.last_tsc) >= self.period_tsc;
        if rings || now_tsc < self.last_tsc {
            self.last_tsc = now_tsc;
        }
        rings
    }
}
