//! Writing a first snapshot: every page of a guest.

use frazil_snapstore::{PAGE_SIZE, StoreOptions};

use super::MIB;
use super::bed::Bed;
use super::limit::WriteLimit;
use super::pages::{Pool, all};
use crate::bench::Bench;
use crate::metric::{MIB_S, Metric};
use crate::samples::Samples;

/// Writes a new store each time, from begin to durable commit. Returns the last one.
pub(super) fn full(bench: &mut Bench, pool: &Pool) -> anyhow::Result<Bed> {
    let bytes = bench.memory_sizes(2).last().copied().unwrap_or_default();
    let pages = (bytes / PAGE_SIZE as u64).max(1);
    let (dirty, source) = (all(pages), pool.at(1));
    let mut limit = WriteLimit::new(&source, dirty.iter())?;
    let mut times = Samples::new();
    let mut left = bench.runs(3);
    let bed = loop {
        let mut bed = Bed::new(bench, pages, StoreOptions::default())?;
        limit.measure(bed.folder())?;
        times.add_time(bed.commit(&dirty, &source)?);
        limit.measure(bed.folder())?;
        left = left.saturating_sub(1);
        if left == 0 {
            break bed;
        }
    };
    let mib_s = times.per_second(bed.region_bytes() / MIB);
    bench.emit(Metric::new("store.full_write", mib_s, MIB_S, times.n()).against(limit.mib_s()))?;
    Ok(bed)
}
