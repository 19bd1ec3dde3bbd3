//! Memory of a real guest, from dumps: what each kind of elision makes of its changes.
//!
//! The first dump is the first snapshot; for each later one, the pages that differ from the
//! previous dump are written, which is the least a dirty log reports. Then all of that again, with
//! as many pages more that do not differ: a log cannot tell a written page from a changed one.
//! Bytes are the growth of the store's files, nodes and manifests included.

use std::path::PathBuf;

use frazil_snapstore::{Elide, PageSet, SnapshotId, StoreOptions, WriteStats};

use super::bed::Bed;
use super::dumps::{self, Dump, Step};
use super::edits::Edits;
use super::pages::all;
use crate::bench::Bench;
use crate::metric::Metric;

const UNIT: &str = "bytes/page";
const COUNT_UNIT: &str = "pages/step";
/// Pages of each dump to use in a quick run.
const QUICK_PAGES: u64 = 32 << 10;

/// The first is what the others are compared with, the last is the default.
const SETTINGS: [(&str, Elide); 6] = [
    ("off", Elide::NONE),
    ("zero", Elide { zero: true, ..Elide::NONE }),
    ("equal", Elide { equal: true, ..Elide::NONE }),
    ("dedup", Elide { dedup: true, ..Elide::NONE }),
    ("delta", Elide { delta: true, ..Elide::NONE }),
    ("all", Elide { zero: true, equal: true, dedup: true, delta: true }),
];

/// Which pages a dirty log reports.
struct Log {
    name: &'static str,
    dirty: fn(&Step) -> &PageSet,
}

const LOGS: [Log; 2] = [
    Log { name: "changed", dirty: |step| &step.changed },
    Log { name: "doubled", dirty: |step| &step.doubled },
];

/// The size of a sequence of snapshots.
#[derive(Default)]
struct Line {
    /// Bytes of the first snapshot.
    first_bytes: u64,
    first_stats: WriteStats,
    /// Bytes of the other snapshots together.
    bytes: u64,
    stats: WriteStats,
}

pub(super) fn measure(bench: &mut Bench, paths: &[PathBuf]) -> anyhow::Result<()> {
    let dumps = dumps::open(paths, bench.sized(u64::MAX, QUICK_PAGES))?;
    bench.say("comparing dumps");
    let mut edits = Edits::default();
    let mut steps = Vec::with_capacity(dumps.len() - 1);
    for pair in dumps.windows(2) {
        steps.push(Step::between(&pair[0], &pair[1], |before, after| edits.add(before, after))?);
    }
    emit_steps(bench, &steps)?;
    edits.emit(bench)?;
    for log in &LOGS {
        measure_log(bench, &dumps, &steps, log)?;
    }
    Ok(())
}

/// Prints what changes, independently of the store; the floor is the pages changed in the same
/// step.
fn emit_steps(bench: &mut Bench, steps: &[Step]) -> anyhow::Result<()> {
    for (number, step) in (1..).zip(steps) {
        let name = format!("store.images_step_{number}");
        let changed = step.changed.count() as f64;
        bench.emit(Metric::new(format!("{name}_changed"), changed, "pages", 1))?;
        let counts = [
            ("appeared", step.appeared),
            ("cleared", step.cleared),
            ("doubled", step.doubled.count()),
            ("not_zero", step.filled),
        ];
        for (what, pages) in counts {
            let metric = Metric::new(format!("{name}_{what}"), pages as f64, "pages", 1);
            bench.emit(metric.against(changed))?;
        }
    }
    Ok(())
}

fn measure_log(bench: &mut Bench, dumps: &[Dump], steps: &[Step], log: &Log) -> anyhow::Result<()> {
    // Bytes with everything off: per page of the first snapshot, and per changed page.
    let mut off = None;
    let changed: u64 = steps.iter().map(|step| step.changed.count()).sum();
    for (name, elide) in SETTINGS {
        bench.say(&format!("{} pages, elision: {name}", log.name));
        let line = write(bench, dumps, steps, log, elide)?;
        let first = line.first_bytes as f64 / dumps::pages(dumps) as f64;
        let later = line.bytes as f64 / changed.max(1) as f64;
        let (first_off, later_off) = *off.get_or_insert((first, later));
        // The first snapshot is the same for both logs.
        if log.name == LOGS[0].name {
            emit_bytes(bench, &format!("store.images_first_{name}"), first, first_off, 1)?;
            emit_counts(bench, &format!("store.images_first_{name}"), &line.first_stats, 1)?;
        }
        let name = format!("store.images_{}_{name}", log.name);
        let n = steps.len() as u64;
        emit_bytes(bench, &name, later, later_off, n)?;
        emit_counts(bench, &name, &line.stats, n)?;
    }
    Ok(())
}

/// Prints bytes per page, and the share saved compared to everything off.
fn emit_bytes(bench: &mut Bench, name: &str, bytes: f64, off: f64, n: u64) -> anyhow::Result<()> {
    bench.emit(Metric::new(name, bytes, UNIT, n).against(off))?;
    let saved = (1.0 - bytes / off) * 100.0;
    bench.emit(Metric::new(format!("{name}_saved"), saved, "%", n).beyond(off))
}

/// Prints the pages that were not written whole, by reason: the mean of `n` snapshots, against all
/// pages written.
fn emit_counts(bench: &mut Bench, name: &str, stats: &WriteStats, n: u64) -> anyhow::Result<()> {
    let counts = [
        ("zero", stats.zero_pages),
        ("equal", stats.equal_pages),
        ("dedup", stats.dedup_pages),
        ("delta", stats.delta_pages),
    ];
    let mean = |pages: u64| pages as f64 / n as f64;
    for (what, pages) in counts {
        if pages > 0 {
            let metric = Metric::new(format!("{name}_n_{what}"), mean(pages), COUNT_UNIT, n);
            bench.emit(metric.against(mean(stats.pages)))?;
        }
    }
    if stats.delta_pages > 0 {
        let bytes = stats.delta_bytes as f64 / stats.delta_pages as f64;
        bench.emit(Metric::new(format!("{name}_per_delta"), bytes, UNIT, stats.delta_pages))?;
    }
    Ok(())
}

/// Writes all dumps to a new store. With every switch on, reads all of it again and compares.
fn write(
    bench: &Bench,
    dumps: &[Dump],
    steps: &[Step],
    log: &Log,
    elide: Elide,
) -> anyhow::Result<Line> {
    let pages = dumps::pages(dumps);
    let options = StoreOptions { elide, ..StoreOptions::default() };
    let mut bed = Bed::new(bench, pages, options)?;
    let mut line = Line::default();
    let mut ids: Vec<SnapshotId> = Vec::with_capacity(dumps.len());
    line.first_stats = bed.commit_counted(&all(pages), &dumps[0])?.1;
    line.first_bytes = bed.stored_bytes()?;
    ids.push(bed.head()?);
    for (step, dump) in steps.iter().zip(&dumps[1..]) {
        line.stats += bed.commit_counted((log.dirty)(step), dump)?.1;
        ids.push(bed.head()?);
    }
    line.bytes = bed.stored_bytes()?.saturating_sub(line.first_bytes);
    if elide == Elide::default() {
        // Through a new handle with nothing in memory, to read what was written.
        bed.close();
        for (id, dump) in ids.into_iter().zip(dumps) {
            dump.expect_in(&bed.reader_of(id)?)?;
        }
    }
    Ok(line)
}
