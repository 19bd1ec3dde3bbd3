//! Memory that writing a large guest takes, besides the guest's own.

use frazil_snapstore::{PAGE_SIZE, PageSet, StoreOptions};

use super::MIB;
use super::bed::Bed;
use super::pages::Pool;
use crate::bench::Bench;
use crate::heap;
use crate::metric::Metric;

/// The most that it may take, with default options.
const BUDGET_MIB: f64 = 256.0;
const COMMITS: u64 = 2;

/// Every second page is dirty, the worst case for structures that keep runs: in a first snapshot,
/// and in one on top of it. Counts Rust's heap at its peak, including opening the store and its
/// caches, but not zstd's contexts (about a MiB per core).
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
