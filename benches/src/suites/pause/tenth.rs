//! Many changes between two checkpoints: a tenth of memory, at random and in the order of pages.

use super::bed::{Bed, RANDOM_SPEC, SEQ_SPEC};
use super::floor;
use crate::bench::{Bench, GIB};
use crate::series::Series;

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let ram_bytes = bench.memory_size(4 * GIB);
    for (name, spec, random) in [("dirty10", RANDOM_SPEC, true), ("dirty10_seq", SEQ_SPEC, false)] {
        let bed = Bed::boot(bench, spec, ram_bytes, 1)?;
        // Not a limit but a yardstick: pages copied before the pause are not read in it.
        let floor_us = floor::stop_and_copy_us(bench, &bed)?;
        let mut series = Series::new();
        for _ in 0..bench.runs(12) {
            bed.wait_tenth(random)?;
            series.take(&bed.machine)?;
        }
        let name = format!("pause.{name}_{}", bed.label);
        series.emit_pauses(bench, &name, Some(floor_us))?;
        series.emit_writes(bench, &name)?;
    }
    Ok(())
}
