//! Segments of other sizes: smaller ones leave less for a prune to rewrite, larger ones make fewer
//! files.

use std::time::Instant;

use anyhow::ensure;
use frazil_snapstore::{PruneOptions, PruneProgress, StoreOptions};

use super::MIB;
use super::bed::Bed;
use super::pages::{Pool, all, scattered_anywhere};
use crate::bench::Bench;
use crate::metric::{MIB_S, Metric};
use crate::samples::Samples;

const SIZES_MIB: [u64; 4] = [16, 64, 256, 1024];
const PAGES: u64 = 256 << 10;
/// Commits of a tenth each; the older half of the snapshots is forgotten.
const COMMITS: u64 = 10;

pub(super) fn measure(bench: &mut Bench, pool: &Pool) -> anyhow::Result<()> {
    let pages = bench.sized(PAGES, PAGES / 64);
    for size_mib in SIZES_MIB {
        let options = StoreOptions { segment_max_bytes: size_mib << 20, ..StoreOptions::default() };
        let mut bed = Bed::new(bench, pages, options)?;
        let mut write = Samples::new();
        write.add_time(bed.commit(&all(pages), &pool.at(1))?);
        for _ in 0..COMMITS {
            let version = bed.next_version();
            bed.commit(&scattered_anywhere(pages, pages / 10, version), &pool.at(version))?;
        }
        let store = bed.store()?;
        let infos = store.snapshots();
        let old: Vec<_> = infos.iter().take(infos.len() / 2).map(|info| info.id).collect();
        store.forget(&old)?;
        let started = Instant::now();
        let report = store.prune(&PruneOptions::default(), &PruneProgress::default())?;
        let took = started.elapsed();
        ensure!(
            store.snapshots().len() == infos.len() - old.len(),
            "forgetting some snapshots forgot others"
        );
        let name = |what: &str| format!("store.segment_{size_mib}_{what}");
        let mib_s = write.per_second(bed.region_bytes() / MIB);
        bench.emit(Metric::new(name("write_mib_s"), mib_s, MIB_S, 1))?;
        let live = report.bytes_live as f64;
        let rewritten = report.bytes_rewritten as f64;
        bench.emit(Metric::new(name("prune_rewritten"), rewritten, "bytes", 1).against(live))?;
        bench.emit(
            Metric::new(name("prune_left"), report.bytes_after as f64, "bytes", 1).against(live),
        )?;
        bench.emit(Metric::new(name("prune_ms"), took.as_secs_f64() * 1e3, "ms", 1))?;
    }
    Ok(())
}
