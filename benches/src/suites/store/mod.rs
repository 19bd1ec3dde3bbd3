//! `store`: the snapshot store by itself, against zstd, BLAKE3 and the disk on the same bytes.
//!
//! No guest runs, and KVM is not needed. Pages are like text, all different, and cost little more
//! to make than a copy. A figure and its floor are measured in turns, since the machine is noisy.
//! What a commit appends is measured from outside, as the growth of the store's files.

mod bed;
mod depth;
mod dumps;
mod edits;
mod elide;
mod frames;
mod heap;
mod images;
mod incremental;
mod limit;
mod pages;
mod prune;
mod read;
mod scale;
mod search;
mod segments;
mod verify;
mod write;

use std::path::PathBuf;

use crate::bench::Bench;
use crate::content::FRAME_PAGES;

use bed::Bed;
use pages::Pool;

const MIB: f64 = (1 << 20) as f64;

/// A measurement on stores of its own.
type Measure = fn(&mut Bench, &Pool) -> anyhow::Result<()>;
/// Name, description, measurement.
const MEASUREMENTS: [(&str, &str, Measure); 6] = [
    ("write", "a store written in full, read, verified, then changed", measure_one_store),
    ("scale", "commits and diffs of a large region", scale::measure),
    ("depth", "deep histories", depth::measure),
    ("elide", "what is not stored twice", elide::measure),
    ("prune", "pruning", prune::measure),
    ("heap", "memory for a large region", |bench, _pool| heap::measure(bench)),
];
/// A measurement on an existing store; given frames of the same contents compressed by zstd.
type MeasureBed = fn(&mut Bench, &mut Bed, &[Vec<u8>]) -> anyhow::Result<()>;

pub(crate) fn run(bench: &mut Bench) -> anyhow::Result<()> {
    let pool = Pool::text();
    for (name, what, measure) in MEASUREMENTS {
        if bench.wants(name) {
            bench.say(&format!("{name}: {what}"));
            measure(bench, &pool)?;
        }
    }
    Ok(())
}

/// Names for `--only`.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    MEASUREMENTS.iter().map(|(name, ..)| *name)
}

/// Measurements on one and the same store: written in full, read, verified, then changed.
fn measure_one_store(bench: &mut Bench, pool: &Pool) -> anyhow::Result<()> {
    bench.say("writing a first snapshot");
    let mut bed = write::full(bench, pool)?;
    let frames = limit::stored_frames(&pool.at(1), bed.pages().min(limit::READ_SAMPLE_PAGES))?;
    let measurements: [(&str, MeasureBed); 3] = [
        ("reading single pages", read::single),
        ("reading everything", read::sequential),
        ("verifying", verify::measure),
    ];
    for (name, measure) in measurements {
        bench.say(name);
        measure(bench, &mut bed, &frames)?;
    }
    drop(frames);
    bench.say("writing what changed");
    incremental::measure(bench, &mut bed, pool)
}

pub(crate) fn run_frames(bench: &mut Bench) -> anyhow::Result<()> {
    bench.say(&format!("frames of other sizes than {FRAME_PAGES} pages"));
    let pool = Pool::text();
    frames::measure(bench, &pool)?;
    bench.say("segments of other sizes");
    segments::measure(bench, &pool)
}

/// Measures the tools' work on a snapshot's memory.
pub(crate) fn run_tools(bench: &mut Bench) -> anyhow::Result<()> {
    search::measure(bench, &Pool::text())
}

/// Measures on dumps of a guest's RAM, in the order they were taken.
pub(crate) fn run_images(bench: &mut Bench, images: &[PathBuf]) -> anyhow::Result<()> {
    images::measure(bench, images)
}
