//! Sweeps: a guest writes to every page as soon as it is resumed.

use anyhow::Context;
use frazil_snapstore::pager::{PagerOptions, PagerStats};
use frazil_vmm::Loading;

use super::Bed;
use crate::bench::Bench;
use crate::machine::Machine;
use crate::metric::Metric;
use crate::raw;
use crate::samples::Samples;

/// Measures sweeps in the order of `bed`'s guest, which is named `order`: with memory that is
/// loaded lazily, with and without background fill, against memory that is resident.
pub(super) fn measure(bench: &mut Bench, bed: &Bed, order: &str) -> anyhow::Result<()> {
    let lazy = |background_fill| {
        Loading::lazy(PagerOptions { background_fill, ..PagerOptions::default() })
    };
    let runs = bench.runs(3);
    let populated = populated(bed, runs)?;
    let (filled, _) = sweep(bed, &lazy(true), runs)?;
    let (touched, stats) = sweep(bed, &lazy(false), runs)?;
    let floor_ms = populated.ms(0.5);
    for (name, times) in [("", &filled), ("_no_fill", &touched)] {
        let name = bed.metric(&format!("sweep_{order}{name}"));
        bench.emit(Metric::new(name, times.ms(0.5), "ms", times.n()).against(floor_ms))?;
    }
    let name = bed.metric(&format!("sweep_{order}_populated"));
    bench.emit(Metric::new(name, floor_ms, "ms", populated.n()))?;

    let stats = stats.context("a VM that was resumed lazily has no pager")?;
    let name = |what: &str| bed.metric(&format!("sweep_{order}_{what}"));
    let mean_us = stats.fault_us_total as f64 / stats.faults.max(1) as f64;
    let pages_per_fault = stats.resident_pages() as f64 / stats.faults.max(1) as f64;
    bench.emit(Metric::new(name("faults"), stats.faults as f64, "faults", 1))?;
    bench.emit(Metric::new(name("pages_per_fault"), pages_per_fault, "pages", stats.faults))?;
    bench.emit(Metric::new(name("fault_mean_us"), mean_us, "us", stats.faults))?;
    bench.emit(Metric::new(name("fault_max_us"), stats.fault_us_max as f64, "us", stats.faults))
}

/// Times of sweeps of memory that is resident, and in the host's page tables.
pub(super) fn populated(bed: &Bed, runs: usize) -> anyhow::Result<Samples> {
    let mut times = Samples::new();
    for _ in 0..runs {
        let machine = Machine::resume(&bed.snapshot, Loading::Eager)?;
        // Loading leaves the host's page tables empty.
        raw::populate(machine.vm.ram())?;
        times.add_time(machine.go_for(machine.data_pages)?.1);
    }
    Ok(times)
}

/// Times of `runs` sweeps, each in a new VM, and the pager's statistics of the last one.
fn sweep(
    bed: &Bed,
    loading: &Loading,
    runs: usize,
) -> anyhow::Result<(Samples, Option<PagerStats>)> {
    let mut times = Samples::new();
    let mut stats = None;
    for _ in 0..runs {
        let machine = Machine::resume(&bed.snapshot, loading.clone())?;
        times.add_time(machine.go_for(machine.data_pages)?.1);
        stats = machine.vm.pager_stats();
    }
    Ok((times, stats))
}
