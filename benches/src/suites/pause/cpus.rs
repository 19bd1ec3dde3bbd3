//! Several vCPUs, perhaps more than the host has cores. There is no floor, since the host decides
//! which of them run when.

use std::time::Duration;

use super::bed::{Bed, RANDOM_SPEC};
use crate::bench::{Bench, GIB};
use crate::series::{Beat, Series};

const CPUS: usize = 4;
const INTERVAL: Duration = Duration::from_millis(100);

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let bed = Bed::boot(bench, RANDOM_SPEC, bench.memory_size(GIB), CPUS)?;
    let mut series = Series::new();
    let mut beat = Beat::new(INTERVAL);
    for _ in 0..bench.runs(300) {
        beat.wait();
        series.take(&bed.machine)?;
    }
    series.emit_pauses(bench, "pause.cpus4", None)
}
