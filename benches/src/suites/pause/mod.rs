//! `pause`: the costs of checkpoints to a running guest, and how near they are to the least
//! possible.
//!
//! Pauses are reported twice: as the host sees them, from the first kick until every vCPU runs
//! again; and as `gap`, the longest time for which the guest could not look at its own clock
//! meanwhile. That includes whatever else kept the vCPU from its core.
//!
//! Before anything is timed, every guest writes all its memory and two checkpoints are taken, so
//! that memory, page tables and the store's buffers are warm.

mod bed;
mod cpus;
mod floor;
mod scale;
mod steps;
mod storm;
mod tenth;
mod thousand;
mod throughput;
mod work;

use crate::bench::{Bench, GIB};

struct Measurement {
    name: &'static str,
    what: &'static str,
    /// Memory that its guests touch, in bytes.
    touched_bytes: fn(&Bench) -> u64,
    measure: fn(&mut Bench) -> anyhow::Result<()>,
}

const MEASUREMENTS: [Measurement; 8] = [
    Measurement {
        name: "p1000",
        what: "1,000 pages a checkpoint, ten a second",
        touched_bytes: |bench| bench.memory_size(4 * GIB),
        measure: thousand::measure,
    },
    Measurement {
        name: "dirty10",
        what: "a tenth of memory a checkpoint",
        touched_bytes: |bench| bench.memory_size(4 * GIB),
        measure: tenth::measure,
    },
    Measurement {
        name: "steps",
        what: "from ten to 100,000 writes between two checkpoints",
        touched_bytes: |bench| bench.memory_size(GIB),
        measure: steps::measure,
    },
    Measurement {
        name: "storm",
        what: "a guest that writes as fast as it can",
        touched_bytes: |bench| 2 * bench.memory_size(GIB),
        measure: storm::measure,
    },
    Measurement {
        name: "scale",
        what: "the same changes in a large and in a small guest",
        touched_bytes: |bench| 2 * scale::touch_bytes(bench),
        measure: scale::measure,
    },
    Measurement {
        name: "guest_work",
        what: "the guest's work under checkpoints",
        touched_bytes: |_bench| 2 * work::RAM_BYTES,
        measure: work::measure,
    },
    Measurement {
        name: "cpus4",
        what: "four vCPUs",
        touched_bytes: |bench| bench.memory_size(GIB),
        measure: cpus::measure,
    },
    Measurement {
        name: "incr_vs_store",
        what: "writing a tenth of memory while the guest runs",
        touched_bytes: |bench| bench.memory_size(GIB),
        measure: throughput::measure,
    },
];

/// Names for `--only`.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    MEASUREMENTS.iter().map(|measurement| measurement.name)
}

pub(crate) fn run(bench: &mut Bench) -> anyhow::Result<()> {
    for Measurement { name, what, touched_bytes, measure } in &MEASUREMENTS {
        if !bench.wants(name) {
            continue;
        }
        if !bench.has_room(name, touched_bytes(bench)) {
            continue;
        }
        bench.say(&format!("{name}: {what}"));
        measure(bench)?;
    }
    Ok(())
}
