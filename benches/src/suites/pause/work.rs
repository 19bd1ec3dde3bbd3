//! How much work a guest gets done under checkpoints.
//!
//! Its vCPU writes without a pause, nearly always to the same 160 pages and now and then to one of
//! 16,000 others: the longer the interval, the more pages a checkpoint has to save, up to what this
//! host's cores can do. The floor is the same guest on a bare machine whose dirty log is read as
//! often, which causes as many faults; so the difference is the cost of the pauses, and of copying
//! and compressing beside the guest. The two take turns, so that neither benefits from drift.

use std::time::{Duration, Instant};

use frazil_vmm::dirty::DirtyTracker;

use super::bed::Bed;
use crate::bench::Bench;
use crate::machine::Machine;
use crate::metric::Metric;
use crate::raw_guest::RawGuest;
use crate::samples::Samples;
use crate::series::{Beat, checkpoint};

pub(super) const RAM_BYTES: u64 = 128 << 20;
const SPEC: &str = "rate=max,pattern=hot,touch=64MiB,hot_share=0.01,hot_writes=0.995,content=text,\
                    report=0,gap_us=50";
const RATES: [u32; 3] = [10, 40, 100];
const WORK: &str = "pages/s (more is better)";

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let bed = Bed::boot(bench, SPEC, RAM_BYTES, 1)?;
    bed.machine.vm.pause()?;
    let bare = RawGuest::start_tracked(SPEC, RAM_BYTES, None, |_ram| Ok(()))?;
    bare.wait_turns(bare.data_pages())?;
    bare.hold()?;
    for rate in RATES {
        at_rate(bench, &bed.machine, &bare, rate)?;
    }
    Ok(())
}

fn at_rate(bench: &mut Bench, machine: &Machine, bare: &RawGuest, rate: u32) -> anyhow::Result<()> {
    let (interval, length) = (
        Duration::from_secs(1) / rate,
        bench.sized(Duration::from_secs(5), Duration::from_secs(1)),
    );
    let (mut work, mut floor, mut taken) = (Samples::new(), Samples::new(), Samples::new());
    let mut tracker = bare.tracker();
    for _ in 0..bench.runs(6) {
        let (pages_per_s, per_s) = checkpointed(machine, interval, length)?;
        work.add(pages_per_s);
        taken.add(per_s);
        floor.add(harvested(bare, tracker.as_mut(), interval, length)?);
    }
    let name = format!("pause.guest_work_{rate}hz");
    let metric = Metric::new(&name, work.median(), WORK, work.n()).against(floor.median());
    bench.emit(metric)?;
    let metric = Metric::new(format!("{name}_taken"), taken.median(), "checkpoints/s", taken.n());
    bench.emit(metric.against(rate.into()))
}

/// Takes checkpoints for a while. Returns the pages the guest wrote per second, and the checkpoints
/// per second.
fn checkpointed(
    machine: &Machine,
    interval: Duration,
    length: Duration,
) -> anyhow::Result<(u64, u64)> {
    machine.vm.go()?;
    let (turns, started) = (machine.turns()?, Instant::now());
    let mut beat = Beat::new(interval);
    let mut taken = 0;
    while started.elapsed() < length {
        beat.wait();
        checkpoint(&machine.vm)?;
        taken += 1;
    }
    let (turns, seconds) = (machine.turns()? - turns, started.elapsed().as_secs_f64());
    machine.vm.pause()?;
    Ok(((turns as f64 / seconds) as u64, (f64::from(taken) / seconds).round() as u64))
}

/// Reads the dirty log for a while and ignores it. Returns the pages the guest wrote per second.
fn harvested(
    bare: &RawGuest,
    tracker: &mut dyn DirtyTracker,
    interval: Duration,
    length: Duration,
) -> anyhow::Result<u64> {
    let mut dirty = bare.no_pages();
    bare.release();
    let (turns, started) = (bare.turns()?, Instant::now());
    let mut beat = Beat::new(interval);
    while started.elapsed() < length {
        beat.wait();
        tracker.harvest(&mut dirty)?;
        dirty.clear();
    }
    let (turns, seconds) = (bare.turns()? - turns, started.elapsed().as_secs_f64());
    bare.hold()?;
    Ok((turns as f64 / seconds) as u64)
}
