//! Whether saving changes is slower while the guest runs than while it is paused.
//!
//! A checkpoint of a paused guest is only the store writing the same kind of pages. But it has all
//! cores, while a running guest takes one of them: so it is measured a second time with another
//! guest spinning on a core, which compares equal numbers of cores.

use super::bed::{Bed, RANDOM_SPEC};
use crate::bench::{Bench, GIB};
use crate::machine::Machine;
use crate::metric::{MIB_S, Metric};
use crate::series::{Series, checkpoint};

/// A guest that does little but look at its clock.
const IDLE_SPEC: &str = "rate=1,content=zero,report=0";
const MIB: f64 = (1 << 20) as f64;

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let bed = Bed::boot(bench, RANDOM_SPEC, bench.memory_size(GIB), 1)?;
    let other = Machine::boot(IDLE_SPEC, 64 << 20, None)?;
    other.vm.pause()?;
    let (mut running, mut alone, mut beside) = (Series::new(), Series::new(), Series::new());
    for _ in 0..bench.runs(10) {
        bed.wait_tenth(true)?;
        running.take(&bed.machine)?;
        bed.wait_tenth(true)?;
        checkpoint_paused(&bed, &mut alone)?;
        bed.wait_tenth(true)?;
        // The guest gives up its core, and the other guest takes it.
        bed.machine.vm.pause()?;
        other.vm.go()?;
        checkpoint_paused(&bed, &mut beside)?;
        other.vm.pause()?;
    }
    let (value, n) = (running.changed_bytes_per_s() / MIB, running.duration.n());
    for (name, floor) in [("incr_vs_store", &alone), ("incr_vs_store_beside_guest", &beside)] {
        let metric = Metric::new(format!("pause.{name}"), value, MIB_S, n);
        bench.emit(metric.against(floor.changed_bytes_per_s() / MIB))?;
    }
    Ok(())
}

/// Takes a checkpoint while the guest is paused.
fn checkpoint_paused(bed: &Bed, series: &mut Series) -> anyhow::Result<()> {
    bed.machine.vm.pause()?;
    series.add(&checkpoint(&bed.machine.vm)?);
    bed.machine.vm.go()?;
    Ok(())
}
