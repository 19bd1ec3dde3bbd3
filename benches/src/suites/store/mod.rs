//! `store`: the snapshot store by itself, against zstd, BLAKE3 and the disk on the same bytes.
//!
//! No guest runs and no KVM is needed. Pages are text-like and unlike each other, made for little
//! more than a copy; a figure and its floor take turns, since the machine is noisy. What a commit
//! appends is measured from outside, as the growth of the store's files.

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

/// Measures on stores of its own.
type Measure = fn(&mut Bench, &Pool) -> anyhow::Result<()>;
/// By name.
const MEASUREMENTS: [(&str, &str, Measure); 6] = [
    ("write", "a store written in full, read, verified, then changed", measure_one_store),
    ("scale", "commits and diffs of a large region", scale::measure),
    ("depth", "deep histories", depth::measure),
    ("elide", "what is not stored twice", elide::measure),
    ("prune", "pruning", prune::measure),
    ("heap", "memory for a large region", |bench, _pool| heap::measure(bench)),
];
/// Measures a store that is there; beside it, what zstd makes of the same contents.
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

/// What is measured on one and the same store: written in full, read, verified, then changed.
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

/// What the tools do with a snapshot's memory.
pub(crate) fn run_tools(bench: &mut Bench) -> anyhow::Result<()> {
    search::measure(bench, &Pool::text())
}

/// On dumps of a guest's RAM, in the order in which they were taken.
pub(crate) fn run_images(bench: &mut Bench, images: &[PathBuf]) -> anyhow::Result<()> {
    images::measure(bench, images)
}
