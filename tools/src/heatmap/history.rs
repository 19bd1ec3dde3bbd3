//! Pictures of a history of snapshots: which memory changed how often, and when.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::bail;
use frazil_snapstore::{
    DiffOptions, PAGE_SIZE, RegionReader, Snapshot, SnapshotInfo, Store, diff_region,
};
use rayon::prelude::*;

use super::colors::{self, Steps};
use super::grid::{Grid, short_bytes};
use super::layout::{Key, Page, TIMES};
use super::picture::{Anchor, Picture, Rect, Rgb};
use super::survey::Contents;
use super::{Drawn, Wanted, describe, hole, region};
use crate::output;

/// The most columns of memory side by side, and the pixels that they take together.
const COLUMNS_MAX: u64 = 1024;
/// The most rows: with more snapshots than this, several share one.
const ROWS_MAX: usize = 256;
/// Pixels that all rows take together, if there are enough rows.
const HEIGHT: u32 = 512;
const ROW_HEIGHT_MAX: u32 = 18;
/// The least pixels between two labels of times.
const LABEL_GAP: u32 = 18;

/// The figures of a history, summed up as they are drawn.
struct Sums {
    /// For each cell, the number of snapshots that changed it.
    often: Vec<u64>,
    /// For each row and column, the most pages that any one snapshot changed.
    when: Vec<Vec<u64>>,
    changed_pages: u64,
}

/// Draws which memory the snapshots of `line` changed, each compared with the one before. They are
/// in order, oldest first.
///
/// # Errors
/// Those of the store; if there are fewer than two snapshots; if the picture cannot be written.
pub(crate) fn draw_history(
    wanted: &Wanted,
    store: &Arc<Store>,
    line: &[SnapshotInfo],
) -> anyhow::Result<Drawn> {
    let [first, .., last] = line else {
        bail!("--heatmap: expected a history of two or more snapshots, found {}", line.len());
    };
    let (first, last) = (store.snapshot(first.id)?, store.snapshot(last.id)?);
    let region = region(&last, wanted)?;
    let grid = Grid::of(region.pages());
    let timeline = Timeline::of(region.pages(), line.len() - 1);
    let sums = compare_all(store, line, &region, &grid, &timeline)?;
    let contents = Contents::of(&region, &grid)?;
    let hole = hole(&last, &region);

    let title = format!("{} of {}: what changed when", region.name(), last.manifest().name);
    let lines = [
        format!("from  {}", describe(&first)),
        format!("to    {}", describe(&last)),
        format!(
            "{} after the first changed {}, {} each on average",
            output::counted(line.len() as u64 - 1, "snapshot"),
            output::counted(sums.changed_pages, "page"),
            output::bytes(sums.changed_pages * PAGE_SIZE as u64 / (line.len() as u64 - 1))
        ),
    ];
    let mut page = Page::new(TIMES, COLUMNS_MAX as u32, &title, &lines);
    let steps = Steps::to(sums.often.iter().copied().max().unwrap_or(0));
    let mut keys =
        vec![Key::new(colors::ZERO, "never, zero"), Key::new(colors::UNCHANGED, "never")];
    keys.extend(steps.legend().into_iter().map(Key::from));
    let heading = format!("How many snapshots changed each {}", short_bytes(grid.cell_bytes()));
    page.heading(&heading, &keys);
    page.grid(&grid, &|cell| {
        let first = cell as u64 * grid.cell_pages;
        match (sums.often[cell], contents.pages[cell]) {
            _ if hole.contains(&first) => None,
            (0, 0) => Some(colors::ZERO),
            (0, _) => Some(colors::UNCHANGED),
            (times, _) => Some(steps.color(times)),
        }
    });
    timeline.draw(&mut page, line, &sums.when);
    wanted.write(&page.finish(), grid.cell_bytes())
}

/// Compares each snapshot with the one before, on all cores.
fn compare_all(
    store: &Arc<Store>,
    line: &[SnapshotInfo],
    region: &RegionReader,
    grid: &Grid,
    timeline: &Timeline,
) -> anyhow::Result<Sums> {
    let sums = Mutex::new(Sums {
        often: vec![0; grid.cells()],
        when: vec![vec![0; timeline.columns]; timeline.rows],
        changed_pages: 0,
    });
    let done = AtomicU64::new(0);
    let compare = |index: usize| -> anyhow::Result<()> {
        let open =
            |info: &SnapshotInfo| -> anyhow::Result<Snapshot> { Ok(store.snapshot(info.id)?) };
        let (a, b) = (open(&line[index])?, open(&line[index + 1])?);
        let diff = diff_region(&a, &b, region.name(), DiffOptions::default())?;
        let mut cells = super::survey::changed(&diff, grid);
        cells.iter_mut().for_each(|pages| *pages = (*pages).min(1));
        let mut columns = vec![0; timeline.columns];
        for range in &diff.ranges {
            timeline.spread(range.first, range.count, &mut columns);
        }
        let mut sums = sums.lock().unwrap_or_else(PoisonError::into_inner);
        sums.changed_pages += diff.changed_pages;
        sums.often.iter_mut().zip(cells).for_each(|(sum, changed)| *sum += changed);
        let row = &mut sums.when[timeline.row_of(index)];
        row.iter_mut().zip(columns).for_each(|(most, pages)| *most = (*most).max(pages));
        done.fetch_add(1, Ordering::Relaxed);
        Ok(())
    };
    let count = line.len() - 1;
    let bar = output::progress_bar("compare", "snapshots");
    bar.set_length(count as u64);
    std::thread::scope(|scope| {
        let all = scope.spawn(|| (0..count).into_par_iter().try_for_each(compare));
        while !all.is_finished() {
            bar.set_position(done.load(Ordering::Relaxed));
            std::thread::sleep(Duration::from_millis(5));
        }
        bar.finish_and_clear();
        all.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    Ok(sums.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// A chart of changes: memory from left to right, time from top to bottom.
struct Timeline {
    pages: u64,
    column_pages: u64,
    columns: usize,
    rows: usize,
    snapshots: usize,
}

impl Timeline {
    fn of(pages: u64, snapshots: usize) -> Self {
        let column_pages = pages.div_ceil(COLUMNS_MAX).max(1);
        let columns = pages.div_ceil(column_pages) as usize;
        Self { pages, column_pages, columns, rows: snapshots.min(ROWS_MAX), snapshots }
    }

    fn row_of(&self, snapshot: usize) -> usize {
        snapshot * self.rows / self.snapshots
    }

    /// The first snapshot of a row.
    fn first_of(&self, row: usize) -> usize {
        (row * self.snapshots).div_ceil(self.rows)
    }

    fn spread(&self, first: u64, count: u64, columns: &mut [u64]) {
        let end = first.saturating_add(count).min(self.pages);
        let mut at = first;
        while at < end {
            let column = at / self.column_pages;
            let next = ((column + 1) * self.column_pages).min(end);
            columns[column as usize] += next - at;
            at = next;
        }
    }

    fn draw(&self, page: &mut Page, line: &[SnapshotInfo], when: &[Vec<u64>]) {
        let most = when.iter().flatten().copied().max().unwrap_or(0);
        let steps = Steps::to(most);
        let mut keys = vec![Key::new(colors::ZERO, "none")];
        keys.extend(steps.legend().into_iter().map(Key::from));
        let each = match self.snapshots.div_ceil(self.rows) {
            1 => "one snapshot per row".to_owned(),
            several => {
                format!("up to {several} snapshots per row, showing the highest count")
            }
        };
        let column = short_bytes(self.column_pages * PAGE_SIZE as u64);
        page.heading(
            &format!("Pages changed in each {column}, from the first snapshot to the last: {each}"),
            &keys,
        );
        page.draw(|picture, left, top| {
            let top_of_rows = top + self.draw_addresses(picture, left, top);
            let height = (HEIGHT / self.rows.max(1) as u32).clamp(2, ROW_HEIGHT_MAX);
            self.draw_cells(picture, (left, top_of_rows, height), when, &steps);
            self.draw_times(picture, (left, top_of_rows, height), line);
            top_of_rows + self.rows as u32 * height - top
        });
    }

    fn px(&self) -> u32 {
        (COLUMNS_MAX as usize / self.columns) as u32
    }

    fn draw_addresses(&self, picture: &mut Picture, left: u32, top: u32) -> u32 {
        let width = self.columns as u32 * self.px();
        let mut before = None;
        for eighth in 0..8 {
            let x = left + width * eighth / 8;
            let address = self.pages * u64::from(eighth) / 8 * PAGE_SIZE as u64;
            // With fewer than eight pages, some addresses are the same.
            if before.replace(address) == Some(address) {
                continue;
            }
            picture.faint(x, top, Anchor::Start, format!("{address:#x}"));
            picture.rect(Rgb::FAINT, Rect(x, top + 16, 1, 4));
        }
        22
    }

    fn draw_cells(
        &self,
        picture: &mut Picture,
        (left, top, height): (u32, u32, u32),
        when: &[Vec<u64>],
        steps: &Steps,
    ) {
        let px = self.px();
        let width = self.columns as u32 * px;
        picture.rect(colors::ZERO, Rect(left, top, width, self.rows as u32 * height));
        let gap = u32::from(height >= 6);
        let mut cells = Vec::new();
        for (y, row) in (top..).step_by(height as usize).zip(when) {
            for (x, pages) in
                (left..).step_by(px as usize).zip(row).filter(|(_, pages)| **pages > 0)
            {
                cells.push((steps.color(*pages), Rect(x, y, px, height - gap)));
            }
        }
        cells.sort_by_key(|(color, _)| *color);
        cells.into_iter().for_each(|(color, rect)| picture.rect(color, rect));
    }

    /// Labels rows, or every so many of them, with their time and their first snapshot.
    fn draw_times(
        &self,
        picture: &mut Picture,
        (left, top, height): (u32, u32, u32),
        line: &[SnapshotInfo],
    ) {
        let right = left + self.columns as u32 * self.px();
        let every = LABEL_GAP.div_ceil(height) as usize;
        let [first, last] =
            [line.first(), line.last()].map(|info| info.map_or(0, |info| info.time_unix_ms));
        let fast = last.saturating_sub(first) < self.rows as u64 * 1000;
        for row in (0..self.rows).step_by(every) {
            // The first snapshot of the line has no row: it is only compared with.
            let Some(info) = line.get(self.first_of(row) + 1) else { continue };
            let middle = top + row as u32 * height + height / 2;
            let y = middle.saturating_sub(8);
            let time = time_label(info.time_unix_ms, fast);
            picture.rect(Rgb::FAINT, Rect(left - 6, middle, 5, 1));
            picture.text(left - 10, y, Anchor::End, time);
            picture.faint(right + 6, y, Anchor::Start, info.id.short());
        }
    }
}

/// A time to the second; with `fast`, when several would be the same, to the millisecond and
/// without the date, which the lines at the top show.
fn time_label(unix_ms: u64, fast: bool) -> String {
    let time = output::time(unix_ms);
    let (whole, _) = time.split_once('.').unwrap_or((time.as_str(), ""));
    match time.split_once(' ') {
        Some((_, clock)) if fast => clock.to_owned(),
        _ => whole.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_snapshot_has_a_row_and_every_row_a_snapshot() {
        for snapshots in [1, 2, 255, 256, 257, 1000, 10_000] {
            let timeline = Timeline::of(1000, snapshots);
            let mut counts = vec![0; timeline.rows];
            (0..snapshots).for_each(|snapshot| counts[timeline.row_of(snapshot)] += 1);
            let most = snapshots.div_ceil(timeline.rows);
            assert!(counts.iter().all(|count| (1..=most).contains(count)), "{snapshots}");
            for row in 0..timeline.rows {
                let first = timeline.first_of(row);
                assert_eq!(timeline.row_of(first), row, "{snapshots}");
                assert!(first == 0 || timeline.row_of(first - 1) == row - 1, "{snapshots}");
            }
        }
    }

    #[test]
    fn times_are_as_exact_as_they_must_be() {
        let (exact, rough) =
            (time_label(1_700_000_000_123, true), time_label(1_700_000_000_123, false));
        assert!(exact.ends_with(":20.123") && exact.len() == 12, "{exact}");
        assert!(rough.starts_with("2023-11-1") && rough.ends_with(":20"), "{rough}");
    }

    #[test]
    fn pages_are_in_their_columns() {
        let timeline = Timeline::of(10_000, 1);
        let mut columns = vec![0; timeline.columns];
        timeline.spread(9, 12, &mut columns);
        timeline.spread(9_999, 5, &mut columns);
        assert_eq!(timeline.column_pages, 10);
        assert_eq!((columns[0], columns[1], columns[2], columns[999]), (1, 10, 1, 1));
        assert_eq!(columns.iter().sum::<u64>(), 13);
    }
}
