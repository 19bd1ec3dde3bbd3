//! A guest that writes faster than anybody can save: checkpoints must end all the same, pauses must
//! stay short, and what is saved must be one moment of it.

use std::time::Instant;

use anyhow::{Context, anyhow};
use frazil_vmm::Loading;

use super::bed::Bed;
use crate::bench::{Bench, GIB};
use crate::machine::Machine;
use crate::metric::Metric;
use crate::samples::Samples;
use crate::series::Series;

/// Page after page, two words of each once all are written: no other guest changes pages as fast.
const SPEC: &str = "rate=max,pattern=seq,content=edit,report=0,gap_us=50";
const WORK: &str = "pages/s (more is better)";

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let bed = Bed::boot(bench, SPEC, bench.memory_size(GIB), 1)?;
    let machine = &bed.machine;
    let (mut series, mut during, mut between) = (Series::new(), Samples::new(), Samples::new());
    for _ in 0..bench.runs(10) {
        // The first lap pays for the faults that the checkpoint before has left behind.
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

/// The guest writes all its pages once; how many a second.
fn lap(machine: &Machine) -> anyhow::Result<u64> {
    let (turns, started) = (machine.turns()?, Instant::now());
    let (reached, _) = machine.wait_turns(turns + machine.data_pages)?;
    Ok(rate(reached - turns, started))
}

fn rate(turns: u64, started: Instant) -> u64 {
    (turns as f64 / started.elapsed().as_secs_f64()) as u64
}

/// The last snapshot, in a machine of its own.
fn resume_and_verify(machine: &Machine) -> anyhow::Result<()> {
    let store = machine.vm.store().context("the guest has no store")?;
    let head = machine.vm.head().context("no checkpoint was taken")?;
    machine.vm.pause()?;
    let resumed = Machine::resume(&store.snapshot(head)?, Loading::Eager)?;
    resumed.vm.verify_workload()?.map_err(|damage| anyhow!("the resumed memory: {damage}"))?;
    machine.vm.go()?;
    Ok(())
}
