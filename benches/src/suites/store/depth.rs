//! What must not grow with history: the time to open a store and read random pages.

use frazil_snapstore::StoreOptions;

use super::bed::Bed;
use super::pages::{Pool, all, scattered_anywhere};
use crate::bench::Bench;
use crate::metric::Metric;
use crate::samples::Samples;

/// Pages of each region, all of them in use.
const PAGES: u64 = 64 << 10;
/// Pages that each commit of the history changes.
const DIRTY_PAGES: u64 = 64;

/// A deep store and one with a single snapshot, of as many pages, take turns.
pub(super) fn measure(bench: &mut Bench, pool: &Pool) -> anyhow::Result<()> {
    let pages = bench.sized(PAGES, PAGES / 16);
    let mut flat = Bed::new(bench, pages, StoreOptions::default())?;
    flat.commit(&all(pages), &pool.at(1))?;
    let mut deep = Bed::new(bench, pages, StoreOptions::default())?;
    deep.commit(&all(pages), &pool.at(1))?;
    // A quick run goes to a fraction of the depth, and gives no figures to rely on.
    for (depth, quick_depth) in [(1000, 50), (10_000, 0)] {
        let target = bench.sized(depth, quick_depth);
        if target > 0 {
            bench.say(&format!("a history of {target} snapshots"));
            deepen(&mut deep, pool, target)?;
            compare(bench, &mut deep, &mut flat, depth)?;
        }
    }
    Ok(())
}

/// Commits until there are `depth` snapshots.
fn deepen(bed: &mut Bed, pool: &Pool, depth: u64) -> anyhow::Result<()> {
    while bed.next_version() <= depth {
        let version = bed.next_version();
        let dirty = scattered_anywhere(bed.pages(), DIRTY_PAGES, version);
        bed.commit(&dirty, &pool.at(version))?;
    }
    Ok(())
}

fn compare(bench: &mut Bench, deep: &mut Bed, flat: &mut Bed, depth: u64) -> anyhow::Result<()> {
    let reads = bench.sized(10_000, 1000);
    let (mut times, mut floor) = (Samples::new(), Samples::new());
    // Brings both stores into the page cache.
    flat.open_and_read(reads, 0)?;
    deep.open_and_read(reads, 0)?;
    for turn in 1..=bench.runs(5) as u64 {
        floor.add_time(flat.open_and_read(reads, turn)?);
        times.add_time(deep.open_and_read(reads, turn)?);
    }
    let metric = Metric::new(format!("store.depth_{depth}_1"), times.ms(0.5), "ms", times.n());
    bench.emit(metric.against(floor.ms(0.5)))
}
