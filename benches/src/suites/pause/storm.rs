//! A guest that writes faster than its pages can be saved: checkpoints must still complete, pauses
//! must stay short, and a snapshot must be of a single moment.

use std::time::Instant;

use anyhow::{Context, anyhow};
use frazil_vmm::Loading;

use super::bed::Bed;
use crate::bench::{Bench, GIB};
use crate::machine::Machine;
use crate::metric::Metric;
use crate::samples::Samples;
use crate::series::Series;

/// Page after page, and two words of each once all are written: nothing changes pages faster.
const SPEC: &str = "rate=max,pattern=seq,content=edit,report=0,gap_us=50";
const WORK: &str = "pages/s (more is better)";

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let bed = Bed::boot(bench, SPEC, bench.memory_size(GIB), 1)?;
    let machine = &bed.machine;
    let (mut series, mut during, mut between) = (Series::new(), Samples::new(), Samples::new());
    for _ in 0..bench.runs(10) {
        // The first lap takes the faults that the previous checkpoint left behind.
        lap(machine)?;
        between.add(lap(machine)?);
        let (turns, started) = (machine.turns()?, Instant::now());
        series.take(machine)?;
        during.add(rate(machine.turns()? - turns, started));
        machine.vm.verify_workload()?.map_err(|damage| anyhow!("the guest's memory: {damage}"))?;
    }
    resume_and_verify(machine)?;
    let name = format!("pause.storm_{}", bed.label);
    series.emit_pauses(bench, &name, None)?;
    series.emit_writes(bench, &name)?;
    let work = Metric::new(format!("{name}_work"), during.median(), WORK, during.n());
    bench.emit(work.against(between.median()))
}

/// Lets the guest write all its pages once. Returns its pages per second.
fn lap(machine: &Machine) -> anyhow::Result<u64> {
    let (turns, started) = (machine.turns()?, Instant::now());
    let (reached, _) = machine.wait_turns(turns + machine.data_pages)?;
    Ok(rate(reached - turns, started))
}

fn rate(turns: u64, started: Instant) -> u64 {
    (turns as f64 / started.elapsed().as_secs_f64()) as u64
}

/// Resumes the last snapshot in another machine, and verifies its memory.
fn resume_and_verify(machine: &Machine) -> anyhow::Result<()> {
    let store = machine.vm.store().context("the guest has no store")?;
    let head = machine.vm.head().context("no checkpoint was taken")?;
    machine.vm.pause()?;
    let resumed = Machine::resume(&store.snapshot(head)?, Loading::Eager)?;
    resumed.vm.verify_workload()?.map_err(|damage| anyhow!("the resumed memory: {damage}"))?;
    machine.vm.go()?;
    Ok(())
}
