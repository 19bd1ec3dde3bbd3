//! Memory that writing a large guest takes, beside the guest's own.

use frazil_snapstore::{PAGE_SIZE, PageSet, StoreOptions};

use super::MIB;
use super::bed::Bed;
use super::pages::Pool;
use crate::bench::Bench;
use crate::heap;
use crate::metric::Metric;

/// What it may take at most, with every default.
const BUDGET_MIB: f64 = 256.0;
const COMMITS: u64 = 2;

/// Every second page is dirty, the worst there is for whoever keeps track of runs: of a first
/// snapshot, and of one on top of it. Rust's heap at its peak, opening the store and its caches
/// included; zstd's contexts (about a MiB a core) are not in it.
pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let pages = bench.sized(16 << 30, 256 << 20) / PAGE_SIZE as u64;
    let mut dirty = PageSet::new(pages);
    (0..pages).step_by(2).for_each(|page| dirty.insert(page));
    let pool = Pool::sparse();
    let mut bed = Bed::new(bench, pages, StoreOptions::default())?;
    let (committed, peak) = heap::peak_of(|| -> anyhow::Result<()> {
        for version in 1..=COMMITS {
            bed.commit(&dirty, &pool.at(version))?;
        }
        Ok(())
    });
    committed?;
    let metric = Metric::new("store.heap_16g_mib", peak as f64 / MIB, "MiB", COMMITS);
    bench.emit(metric.against(BUDGET_MIB))
}
