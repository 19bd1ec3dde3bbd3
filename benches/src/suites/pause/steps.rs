//! The costs of a checkpoint by how much has changed since the last one: the time until it is
//! published may grow, the pause must not.

use super::bed::{Bed, RANDOM_SPEC};
use super::floor;
use crate::bench::{Bench, GIB};
use crate::series::Series;

/// Writes between two checkpoints, and the number of checkpoints.
const STEPS: [(u64, usize); 5] = [(10, 60), (100, 60), (1000, 60), (10_000, 20), (100_000, 5)];
/// The number of steps in a quick run, whose guest is small.
const QUICK_STEPS: usize = 3;

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let bed = Bed::boot(bench, RANDOM_SPEC, bench.memory_size(GIB), 1)?;
    // Not a limit but a yardstick: stop-and-copy does not depend on what has changed.
    let stop_and_copy_us = floor::stop_and_copy_us(bench, &bed)?;
    for (writes, checkpoints) in STEPS.into_iter().take(bench.sized(STEPS.len(), QUICK_STEPS)) {
        let mut series = Series::new();
        for _ in 0..bench.runs(checkpoints) {
            bed.machine.wait_turns(bed.machine.turns()? + writes)?;
            series.take(&bed.machine)?;
        }
        series.emit_step(
            bench,
            &format!("pause.after_{writes}_{}", bed.label),
            stop_and_copy_us,
        )?;
    }
    Ok(())
}
