//! What is not stored twice, by kind of elision: bytes per page with it and without.

use frazil_snapstore::{Elide, PageSet, PageSource, StoreOptions};

use super::bed::Bed;
use super::pages::{Edited, Pool, Zeros, all, contiguous, scattered_anywhere};
use crate::bench::Bench;
use crate::metric::Metric;

const UNIT: &str = "bytes/page";

pub(super) fn measure(bench: &mut Bench, pool: &Pool) -> anyhow::Result<()> {
    small_edits(bench, pool)?;
    equal(bench, pool)?;
    second_line(bench, pool)?;
    zero(bench, pool)
}

/// A store of text with these switches.
fn bed(bench: &Bench, pool: &Pool, elide: Elide) -> anyhow::Result<Bed> {
    let pages = bench.sized(16 << 10, 2 << 10);
    let options = StoreOptions { elide, ..StoreOptions::default() };
    let mut bed = Bed::new(bench, pages, options)?;
    bed.commit(&all(pages), &pool.at(0))?;
    Ok(bed)
}

/// Measures 1 to 8 changed words in every page of a hot quarter, commit after commit: differences
/// from pages that are themselves differences must not add up.
fn small_edits(bench: &mut Bench, pool: &Pool) -> anyhow::Result<()> {
    let on = edited_bytes(bench, pool, Elide { delta: true, ..Elide::NONE })?;
    let off = edited_bytes(bench, pool, Elide::NONE)?;
    let n = edit_rounds(bench);
    bench.emit(Metric::new("store.delta_small_edit", on, UNIT, n).against(off))
}

fn edit_rounds(bench: &Bench) -> u64 {
    bench.runs(16) as u64
}

fn edited_bytes(bench: &Bench, pool: &Pool, elide: Elide) -> anyhow::Result<f64> {
    let mut bed = bed(bench, pool, elide)?;
    let hot = scattered_anywhere(bed.pages(), bed.pages() / 4, 1);
    let mut bytes = 0;
    for edits in 1..=edit_rounds(bench) {
        bytes += bed.commit_growth(&hot, &Edited { base: pool.at(0), edits })?;
    }
    Ok(bytes as f64 / (edit_rounds(bench) * hot.count()) as f64)
}

/// Measures pages that were rewritten with the contents they had.
fn equal(bench: &mut Bench, pool: &Pool) -> anyhow::Result<()> {
    let bytes = |elide| -> anyhow::Result<f64> {
        let mut bed = bed(bench, pool, elide)?;
        let dirty = scattered_anywhere(bed.pages(), bed.pages() / 4, 2);
        growth(&mut bed, &dirty, &pool.at(0))
    };
    let (on, off) = (bytes(Elide { equal: true, ..Elide::NONE })?, bytes(Elide::NONE)?);
    bench.emit(Metric::new("store.elide_equal", on, UNIT, 1).against(off))
}

/// Measures a second branch of snapshots with the contents of the first, through a new handle that
/// does not know them.
fn second_line(bench: &mut Bench, pool: &Pool) -> anyhow::Result<()> {
    let bytes = |elide| -> anyhow::Result<f64> {
        let mut bed = bed(bench, pool, elide)?;
        bed.close();
        bed.start_over();
        let dirty = all(bed.pages());
        growth(&mut bed, &dirty, &pool.at(0))
    };
    let (on, off) = (bytes(Elide { dedup: true, ..Elide::NONE })?, bytes(Elide::NONE)?);
    bench.emit(Metric::new("store.elide_dedup", on, UNIT, 1).against(off))
}

/// Measures a guest that turns pages into zeros.
fn zero(bench: &mut Bench, pool: &Pool) -> anyhow::Result<()> {
    let bytes = |elide| -> anyhow::Result<f64> {
        let mut bed = bed(bench, pool, elide)?;
        let dirty = contiguous(bed.pages(), bed.pages() / 4, bed.pages() / 4);
        growth(&mut bed, &dirty, &Zeros)
    };
    let (on, off) = (bytes(Elide { zero: true, ..Elide::NONE })?, bytes(Elide::NONE)?);
    bench.emit(Metric::new("store.elide_zero", on, UNIT, 1).against(off))
}

/// Bytes per page that committing `dirty` appends.
fn growth(bed: &mut Bed, dirty: &PageSet, source: &dyn PageSource) -> anyhow::Result<f64> {
    Ok(bed.commit_growth(dirty, source)? as f64 / dirty.count() as f64)
}
