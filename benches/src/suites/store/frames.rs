//! Frames of 4 to 64 pages: larger ones compress better, but make single pages cost more.

use frazil_snapstore::StoreOptions;

use super::MIB;
use super::bed::Bed;
use super::pages::{Pool, all, random_pages};
use super::read::{add_read, uncached};
use crate::bench::Bench;
use crate::content::FRAME_PAGES;
use crate::metric::{MIB_S, Metric};
use crate::samples::Samples;

const SIZES: [usize; 5] = [4, 8, FRAME_PAGES, 32, 64];
const PAGES: u64 = 128 << 10;

/// The figures of one frame size.
struct Figures {
    frame_pages: usize,
    write: Samples,
    read: Samples,
    /// Total length of the store's files.
    stored: u64,
}

/// Frame sizes take turns; the floor is the figure of the default size.
pub(super) fn measure(bench: &mut Bench, pool: &Pool) -> anyhow::Result<()> {
    let pages = bench.sized(PAGES, PAGES / 32);
    let mut all_figures = SIZES.map(|frame_pages| {
        let (write, read) = (Samples::new(), Samples::new());
        Figures { frame_pages, write, read, stored: 0 }
    });
    for _ in 0..bench.runs(3) {
        for figures in &mut all_figures {
            measure_size(bench, pool, pages, figures)?;
        }
    }
    let mut by_default = [0.0; 3];
    for figures in &all_figures {
        if figures.frame_pages == FRAME_PAGES {
            by_default = figures.values(pages);
        }
    }
    for figures in &all_figures {
        let names = [("share", "stored/raw"), ("write_mib_s", MIB_S), ("read_p50_us", "us")];
        let counts = [1, figures.write.n(), figures.read.n()];
        let values = figures.values(pages);
        for (index, (what, unit)) in names.into_iter().enumerate() {
            let name = format!("store.frame_pages_{}_{what}", figures.frame_pages);
            let metric = Metric::new(name, values[index], unit, counts[index]);
            bench.emit(metric.against(by_default[index]))?;
        }
    }
    Ok(())
}

impl Figures {
    /// The stored share, the write throughput in MiB/s, and the time to read one page in
    /// microseconds.
    fn values(&self, pages: u64) -> [f64; 3] {
        let raw = pages as f64 * frazil_snapstore::PAGE_SIZE as f64;
        [self.stored as f64 / raw, self.write.per_second(raw / MIB), self.read.us(0.5)]
    }
}

/// Writes a store and reads single pages of it, without decoded frames in the cache.
fn measure_size(
    bench: &Bench,
    pool: &Pool,
    pages: u64,
    figures: &mut Figures,
) -> anyhow::Result<()> {
    let frame_pages = figures.frame_pages;
    let mut bed = Bed::new(bench, pages, StoreOptions { frame_pages, ..StoreOptions::default() })?;
    figures.write.add_time(bed.commit(&all(pages), &pool.at(1))?);
    figures.stored = bed.stored_bytes()?;
    bed.set_options(uncached());
    let reader = bed.reader()?;
    for page in random_pages(pages, bench.sized(2000, 200), 1) {
        add_read(&reader, page, &mut figures.read)?;
    }
    Ok(())
}
