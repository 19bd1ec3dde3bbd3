//! What must not grow with the region: committing 1,000 pages, and finding out which they were.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use frazil_snapstore::{DiffOptions, PAGE_SIZE, PageSet, SnapshotId, StoreOptions, diff};

use super::bed::Bed;
use super::pages::{Pool, scattered};
use crate::bench::Bench;
use crate::metric::Metric;
use crate::samples::Samples;
use crate::suites::resume::find_frazil;

const DIRTY_PAGES: u64 = 1000;
/// Of this many pages ...
const STRIDE_PAGES: u64 = 64;
/// ... this many are written, with next to nothing on them: a full tree that is written quickly.
const FILLED_PAGES: u64 = 16;

pub(super) fn measure(bench: &mut Bench, pool: &Pool) -> anyhow::Result<()> {
    let (large, small) = bench.sized((16 << 30, 1 << 30), (256 << 20, 16 << 20));
    let (mut large, mut small) = (filled(bench, large)?, filled(bench, small)?);
    let (mut times, mut floor) = (Samples::new(), Samples::new());
    let mut before = large.head()?;
    for turn in 0..bench.runs(50) as u64 {
        floor.add_time(commit(&mut small, pool, turn)?);
        before = large.head()?;
        times.add_time(commit(&mut large, pool, turn)?);
    }
    let metric = Metric::new("store.commit_scale_16g_1g", times.ms(0.5), "ms", times.n());
    bench.emit(metric.against(floor.ms(0.5)))?;
    // Now and then, changes that wait in the root move down the tree.
    let metric = Metric::new("store.commit_scale_16g_1g_p90", times.ms(0.9), "ms", times.n());
    bench.emit(metric.against(floor.ms(0.9)))?;

    let mut times = Samples::new();
    for _ in 0..bench.runs(20) {
        times.add_time(diff_from(&mut large, before)?);
    }
    bench.emit(Metric::new("store.diff_16g_ms", times.ms(0.5), "ms", times.n()))?;
    large.close();
    match find_frazil(None) {
        Ok(frazil) => as_processes(bench, &frazil, &large, before),
        Err(missing) => {
            bench.say(&format!("diffs as processes: skipped: {missing}"));
            Ok(())
        }
    }
}

/// Measures the same as users do it: a `frazil diff` process that prints everything, and one that
/// also draws a picture; against a process that only starts.
fn as_processes(
    bench: &mut Bench,
    frazil: &Path,
    bed: &Bed,
    parent: SnapshotId,
) -> anyhow::Result<()> {
    let at = |id: SnapshotId| format!("{}@{id}", bed.folder().join("store").display());
    let (a, b) = (at(parent), at(bed.head()?));
    let picture = bed.folder().join("diff.png").display().to_string();
    let diff = ["diff", &a, &b, "--ranges", "all"];
    let runs: [(&str, &[&str]); 2] = [
        ("store.diff_process_16g_ms", &diff),
        ("store.heatmap_process_16g_ms", &[&diff[..], &["--heatmap", &picture]].concat()),
    ];
    for (name, args) in runs {
        let (mut times, mut floor) = (Samples::new(), Samples::new());
        for _ in 0..bench.runs(20) {
            floor.add_time(run(frazil, &["--version"])?);
            times.add_time(run(frazil, args)?);
        }
        let metric = Metric::new(name, times.ms(0.5), "ms", times.n());
        bench.emit(metric.against(floor.ms(0.5)))?;
    }
    Ok(())
}

/// Runs `frazil` to its end. Returns the time.
fn run(frazil: &Path, args: &[&str]) -> anyhow::Result<Duration> {
    let mut command = Command::new(frazil);
    command.args(args).stdin(Stdio::null());
    let started = Instant::now();
    let output = command.output().context("cannot run frazil")?;
    let took = started.elapsed();
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && !output.stdout.is_empty(), "frazil {args:?}: {said}");
    Ok(took)
}

/// A store for a region of `bytes`, with a quarter of its pages written, evenly spread.
fn filled(bench: &Bench, bytes: u64) -> anyhow::Result<Bed> {
    let pages = bytes / PAGE_SIZE as u64;
    let mut bed = Bed::new(bench, pages, StoreOptions::default())?;
    let mut filled = PageSet::new(pages);
    for first in (0..pages).step_by(STRIDE_PAGES as usize) {
        filled.insert_range(first, FILLED_PAGES);
    }
    bed.commit(&filled, &Pool::sparse().at(0))?;
    Ok(bed)
}

/// Commits text to some of the pages that are written. Returns the time.
fn commit(bed: &mut Bed, pool: &Pool, turn: u64) -> anyhow::Result<Duration> {
    let choices = bed.pages() / STRIDE_PAGES * FILLED_PAGES;
    let place = |page| page / FILLED_PAGES * STRIDE_PAGES + page % FILLED_PAGES;
    let dirty = scattered(bed.pages(), DIRTY_PAGES, turn, choices, place);
    bed.commit(&dirty, &pool.at(bed.next_version()))
}

/// Compares the newest snapshot with its parent, through a new handle with no nodes in memory.
/// Returns the time, which includes loading both snapshots.
fn diff_from(bed: &mut Bed, parent: SnapshotId) -> anyhow::Result<Duration> {
    bed.close();
    let (store, head) = (bed.store()?, bed.head()?);
    let started = Instant::now();
    let (a, b) = (store.snapshot(parent)?, store.snapshot(head)?);
    let found = diff(&a, &b, DiffOptions::default())?;
    let took = started.elapsed();
    let changed: u64 = found.regions.iter().map(|region| region.changed_pages).sum();
    let ranges = found.regions.iter().flat_map(|region| &region.ranges);
    let in_ranges: u64 = ranges.map(|range| range.count).sum();
    ensure!(
        (changed, in_ranges) == (DIRTY_PAGES, DIRTY_PAGES),
        "diff: expected {DIRTY_PAGES} changed pages, found {changed}, and {in_ranges} in ranges"
    );
    Ok(took)
}
