//! Forgetting a long history: the space left, against a new store with only what was kept.

use std::io;
use std::time::Instant;

use anyhow::{bail, ensure};
use frazil_snapstore::{
    PAGE_SIZE, Page, PageSource, PruneOptions, PruneProgress, RegionReader, StoreOptions,
    VerifyProgress, verify,
};

use super::bed::Bed;
use super::pages::{Pool, all, scattered_anywhere};
use crate::bench::Bench;
use crate::metric::Metric;

const COMMITS: u64 = 200;
const DIRTY_PAGES: u64 = 1000;
const PAGES: u64 = 32 << 10;

pub(super) fn measure(bench: &mut Bench, pool: &Pool) -> anyhow::Result<()> {
    let pages = bench.sized(PAGES, PAGES / 8);
    let mut bed = Bed::new(bench, pages, StoreOptions::default())?;
    bed.commit(&all(pages), &pool.at(1))?;
    for _ in 0..bench.sized(COMMITS, 20) {
        let version = bed.next_version();
        let dirty = scattered_anywhere(pages, DIRTY_PAGES, version);
        bed.commit(&dirty, &pool.at(version))?;
    }
    // Prune as a later writer would, with nothing in memory.
    bed.close();
    let (prune_ms, rewritten) = forget_all_but_last(&mut bed)?;

    let mut fresh = Bed::new(bench, pages, StoreOptions::default())?;
    let kept = Kept::read(&bed.reader()?, pages)?;
    let fresh_ms = fresh.commit(&all(pages), &kept)?.as_secs_f64() * 1e3;
    let (bytes, fresh_bytes) = (bed.stored_bytes()? as f64, fresh.stored_bytes()? as f64);
    bench.emit(Metric::new("store.prune_size", bytes, "bytes", 1).against(fresh_bytes))?;
    bench.emit(Metric::new("store.prune_ms", prune_ms, "ms", 1).against(fresh_ms))?;
    bench.emit(Metric::new("store.prune_rewritten", rewritten, "bytes", 1).against(fresh_bytes))
}

/// Returns the time of forgetting and pruning in ms, and the bytes that were rewritten.
fn forget_all_but_last(bed: &mut Bed) -> anyhow::Result<(f64, f64)> {
    let (store, head) = (bed.store()?, bed.head()?);
    let old: Vec<_> =
        store.snapshots().iter().map(|info| info.id).filter(|id| *id != head).collect();
    let started = Instant::now();
    store.forget(&old)?;
    let report = store.prune(&PruneOptions::default(), &PruneProgress::default())?;
    let took = started.elapsed();
    ensure!(store.snapshots().len() == 1, "forgetting all but one left more than one");
    let checked = verify(&store, &[head], &VerifyProgress::default())?;
    if let Some(damage) = checked.damage.first() {
        bail!("pruning damaged the snapshot that was kept: {}", damage.error);
    }
    Ok((took.as_secs_f64() * 1e3, report.bytes_rewritten as f64))
}

/// The pages of a snapshot, to be written to another store.
struct Kept(Vec<u8>);

impl Kept {
    fn read(region: &RegionReader, pages: u64) -> anyhow::Result<Self> {
        let mut bytes = vec![0; pages as usize * PAGE_SIZE];
        region.read_pages(0, &mut bytes)?;
        Ok(Self(bytes))
    }
}

impl PageSource for Kept {
    fn read_page(&self, page: u64, buf: &mut Page) -> io::Result<()> {
        let start = page as usize * PAGE_SIZE;
        let bytes = self.0.get(start..start + PAGE_SIZE).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }
}
