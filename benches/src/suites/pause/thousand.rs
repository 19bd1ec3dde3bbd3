//! The usual case: a thousand changed pages, ten times a second.

use std::time::Duration;

use super::bed::{Bed, RANDOM_SPEC};
use super::floor;
use crate::bench::{Bench, GIB};
use crate::metric::Metric;
use crate::series::{Beat, Series, checkpoint};

const INTERVAL: Duration = Duration::from_millis(100);

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let ram_bytes = bench.memory_size(4 * GIB);
    // Measured before there is another guest, which would take a core.
    let floor_us = floor::pause_us(bench, ram_bytes)?;
    let bed = Bed::boot(bench, RANDOM_SPEC, ram_bytes, 1)?;
    let stop_and_copy_us = floor::stop_and_copy_us(bench, &bed)?;
    let mut series = Series::new();
    checkpoint(&bed.machine.vm)?;
    let mut beat = Beat::new(INTERVAL);
    for _ in 0..bench.runs(300) {
        beat.wait();
        series.take(&bed.machine)?;
    }
    let name = format!("pause.p1000_{}", bed.label);
    series.emit_pauses(bench, &name, Some(floor_us))?;
    series.emit_writes(bench, &name)?;
    let pause = &series.pause;
    let metric = Metric::new(format!("{name}_vs_stop_and_copy"), pause.us(0.5), "us", pause.n());
    bench.emit(metric.against(stop_and_copy_us))
}
