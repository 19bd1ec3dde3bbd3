//! The pause must depend on what changed, not on the size of memory.

use std::time::Duration;

use anyhow::ensure;

use super::bed::{Bed, RANDOM_SPEC};
use crate::bench::{Bench, GIB};
use crate::metric::Metric;
use crate::series::{Beat, Series};

const LARGE_BYTES: u64 = 16 * GIB;
const SMALL_BYTES: u64 = GIB;
const INTERVAL: Duration = Duration::from_millis(100);
/// Checkpoints of one guest before switching to the other.
const TURN: usize = 10;

/// Memory that each guest works on: the same for both, so that they change as much.
pub(super) fn touch_bytes(bench: &Bench) -> u64 {
    bench.sized(512 << 20, 32 << 20)
}

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let (large, small) = match (boot(bench, LARGE_BYTES), boot(bench, SMALL_BYTES)) {
        (Ok(large), Ok(small)) => (large, small),
        (Err(error), _) | (_, Err(error)) => {
            bench.say(&format!("scale: skipped: cannot run two such guests: {error:#}"));
            return Ok(());
        }
    };
    let (mut large_series, mut small_series) = (Series::new(), Series::new());
    for _ in 0..bench.runs(300).div_ceil(TURN) {
        let checkpoints = bench.runs(TURN).min(TURN);
        take(&large, &mut large_series, checkpoints)?;
        take(&small, &mut small_series, checkpoints)?;
    }
    let (large_us, small_us) = (large_series.pause.us(0.5), small_series.pause.us(0.5));
    let metric = Metric::new("pause.scale_16g_1g", large_us, "us", large_series.pause.n());
    bench.emit(metric.against(small_us))?;
    large_series.emit_pauses(bench, "pause.scale_16g", None)?;
    small_series.emit_pauses(bench, "pause.scale_1g", None)
}

/// Boots a guest, and pauses it until its turn.
fn boot(bench: &Bench, ram_bytes: u64) -> anyhow::Result<Bed> {
    let spec = format!("{RANDOM_SPEC},touch={}", touch_bytes(bench));
    let bed = Bed::boot(bench, &spec, ram_bytes, 1)?;
    let found = bed.machine.vm.ram().len_bytes();
    ensure!(found == ram_bytes, "expected {ram_bytes} bytes of RAM, found {found}");
    bed.machine.vm.pause()?;
    Ok(bed)
}

/// Takes checkpoints of one guest while the other is paused and leaves the cores to it.
fn take(bed: &Bed, series: &mut Series, checkpoints: usize) -> anyhow::Result<()> {
    bed.machine.vm.go()?;
    let mut beat = Beat::new(INTERVAL);
    for _ in 0..checkpoints {
        beat.wait();
        series.take(&bed.machine)?;
    }
    bed.machine.vm.pause()?;
    Ok(())
}
