//! Writing changes: how fast, and how many bytes more than zstd makes of them.
//!
//! The additional bytes are those of all commits of a kind together: a change to the tree may wait
//! in the root until more changes make it worthwhile to rewrite the nodes below.

use frazil_snapstore::{PAGE_SIZE, PageSet};

use super::MIB;
use super::bed::Bed;
use super::limit::{self, WriteLimit};
use super::pages::{Pool, contiguous, scattered_anywhere};
use crate::bench::Bench;
use crate::metric::{MIB_S, Metric};
use crate::samples::Samples;

/// Picks the pages of the region to change completely, another set each turn.
type Pick = fn(pages: u64, turn: u64) -> PageSet;

/// A kind of commit.
struct Kind {
    /// The name in the metric of its overhead.
    name: &'static str,
    /// The metric of its throughput, if it is measured.
    throughput: Option<&'static str>,
    runs: usize,
    pick: Pick,
}

/// Small commits first, on a store that has not been changed yet.
const KINDS: [Kind; 3] = [
    Kind {
        name: "p1000",
        throughput: None,
        runs: 20,
        pick: |pages, turn| scattered_anywhere(pages, 1000, turn),
    },
    Kind {
        name: "contig",
        throughput: Some("store.incr_write_contig"),
        runs: 5,
        pick: |pages, turn| contiguous(pages, turn % 10 * (pages / 10), (pages / 10).max(1)),
    },
    Kind {
        name: "scattered",
        throughput: Some("store.incr_write"),
        runs: 5,
        pick: |pages, turn| scattered_anywhere(pages, (pages / 10).max(1), !turn),
    },
];

pub(super) fn measure(bench: &mut Bench, bed: &mut Bed, pool: &Pool) -> anyhow::Result<()> {
    for kind in KINDS {
        measure_kind(bench, bed, pool, &kind)?;
    }
    Ok(())
}

fn measure_kind(bench: &mut Bench, bed: &mut Bed, pool: &Pool, kind: &Kind) -> anyhow::Result<()> {
    let mut limit =
        WriteLimit::new(&pool.at(bed.next_version()), (kind.pick)(bed.pages(), 0).iter())?;
    let mut times = Samples::new();
    let (mut pages, mut appended, mut compressed) = (0, 0, 0);
    for turn in 0..bench.runs(kind.runs) as u64 {
        let dirty = (kind.pick)(bed.pages(), turn);
        let source = pool.at(bed.next_version());
        if kind.throughput.is_some() {
            limit.measure(bed.folder())?;
        }
        let before = bed.stored_bytes()?;
        times.add_time(bed.commit(&dirty, &source)?);
        appended += bed.stored_bytes()?.saturating_sub(before);
        compressed += limit::compressed_len(&source, &dirty)?;
        pages = dirty.count();
    }
    if let Some(name) = kind.throughput {
        limit.measure(bed.folder())?;
        let mib_s = times.per_second(pages as f64 * PAGE_SIZE as f64 / MIB);
        bench.emit(Metric::new(name, mib_s, MIB_S, times.n()).against(limit.mib_s()))?;
    }
    emit_overhead(bench, kind.name, appended, compressed, times.n())
}

fn emit_overhead(
    bench: &mut Bench,
    name: &str,
    appended: u64,
    compressed: u64,
    n: u64,
) -> anyhow::Result<()> {
    let name = format!("store.overhead_{name}");
    let (appended, compressed) = (appended as f64 / n as f64, compressed as f64 / n as f64);
    let percent = (appended / compressed - 1.0) * 100.0;
    bench.emit(Metric::new(name.clone(), percent, "%", n).beyond(compressed))?;
    bench.emit(Metric::new(format!("{name}_bytes"), appended, "bytes", n).against(compressed))
}
