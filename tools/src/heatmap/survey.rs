//! What there is to draw of a region, cell by cell; from page trees, without reading any page.

use std::collections::HashMap;
use std::ops::ControlFlow;

use frazil_snapstore::{BlockRef, RegionDiff, RegionReader, Result};

use super::grid::Grid;

/// The contents of a region in a snapshot.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// For each cell, the pages that are not zero.
    pub pages: Vec<u64>,
    /// For each cell, the bytes that those take in the store. A frame's bytes are shared evenly
    /// among the pages of this snapshot that are in it.
    pub stored_bytes: Vec<f64>,
    /// Pages that are not zero, in all cells.
    pub pages_sum: u64,
    /// Bytes of all frames that hold any of them.
    pub stored_bytes_sum: u64,
}

impl Contents {
    pub(super) fn of(region: &RegionReader, grid: &Grid) -> Result<Self> {
        let mut pages_of: HashMap<BlockRef, u64> = HashMap::new();
        let mut found = Self {
            pages: vec![0; grid.cells()],
            stored_bytes: vec![0.0; grid.cells()],
            ..Self::default()
        };
        each_run(region, |first, count, frame| {
            *pages_of.entry(frame).or_default() += count;
            grid.spread(first, count, |cell, pages| found.pages[cell] += pages);
        })?;
        each_run(region, |first, count, frame| {
            let bytes = f64::from(frame.len) / pages_of[&frame] as f64;
            grid.spread(first, count, |cell, pages| {
                found.stored_bytes[cell] += bytes * pages as f64;
            });
        })?;
        found.pages_sum = found.pages.iter().sum();
        found.stored_bytes_sum = pages_of.keys().map(|frame| u64::from(frame.len)).sum();
        Ok(found)
    }
}

fn each_run(region: &RegionReader, mut visit: impl FnMut(u64, u64, BlockRef)) -> Result<()> {
    region.visit_runs(0, |run| {
        if let Some((frame, _)) = run.location.block() {
            visit(run.first, run.count, frame);
        }
        ControlFlow::<()>::Continue(())
    })?;
    Ok(())
}

/// For each cell, the pages that differ.
pub(super) fn changed(diff: &RegionDiff, grid: &Grid) -> Vec<u64> {
    let mut cells = vec![0; grid.cells()];
    for range in &diff.ranges {
        grid.spread(range.first, range.count, |cell, pages| cells[cell] += pages);
    }
    cells
}
