//! Pictures of one snapshot, and of the difference of two.

use std::ops::{ControlFlow, Range};

use frazil_snapstore::{DiffOptions, PAGE_SIZE, RegionDiff, RegionReader, Snapshot, diff_region};

use super::colors::{self, Steps};
use super::grid::{Grid, short_bytes};
use super::layout::{ADDRESSES, Key, Page};
use super::picture::Rgb;
use super::survey::{Contents, changed};
use super::{Drawn, Wanted, describe, hole, percent, region};
use crate::output;

/// Where the steps of the scale begin: average bytes stored for a page.
const STORED_STEPS: [u64; 8] = [1, 128, 256, 512, 1024, 1536, 2048, 3072];

/// Draws the kind of each part of a region of `snapshot`, and the space it takes in the store.
/// Changes are relative to `parent`, if there is one.
///
/// # Errors
/// Those of the store; if the picture cannot be written.
pub(crate) fn draw_snapshot(
    wanted: &Wanted,
    snapshot: &Snapshot,
    parent: Option<&Snapshot>,
) -> anyhow::Result<Drawn> {
    let region = region(snapshot, wanted)?;
    let grid = Grid::of(region.pages());
    let contents = Contents::of(&region, &grid)?;
    let diff = parent
        .map(|parent| diff_region(parent, snapshot, region.name(), DiffOptions::default()))
        .transpose()?;
    let new = diff.as_ref().map_or_else(|| contents.pages.clone(), |diff| changed(diff, &grid));
    let hole = hole(snapshot, &region);

    let manifest = snapshot.manifest();
    let title =
        format!("{} of {}, {}", region.name(), manifest.name, output::time(manifest.time_unix_ms));
    let lines =
        [snapshot_line(snapshot, parent), shares(&region, &contents, diff.as_ref(), &hole)?];
    let mut page = Page::new(ADDRESSES, grid.width_px(), &title, &lines);
    page.heading(
        &format!(
            "What each {} holds: the stronger the colour, the more of its pages",
            short_bytes(grid.cell_bytes())
        ),
        &kind_keys(parent.is_some(), !hole.is_empty()),
    );
    page.grid(&grid, &|cell| {
        let share = |pages: u64| pages as f64 / grid.pages_of(cell) as f64;
        if is_inside(&grid, cell, &hole) {
            return None;
        }
        Some(match (new[cell], contents.pages[cell]) {
            (0, 0) => colors::ZERO,
            (0, pages) => colors::shared(share(pages)),
            (new, _) => colors::new(share(new)),
        })
    });
    let steps = Steps::at(&STORED_STEPS, PAGE_SIZE as u64);
    let mut keys = vec![Key::new(colors::ZERO, "zero")];
    keys.extend(steps.legend().into_iter().map(Key::from));
    page.heading("Bytes that a page of 4,096 bytes takes in the store, on average", &keys);
    page.grid(&grid, &|cell| {
        if is_inside(&grid, cell, &hole) {
            return None;
        }
        let pages = contents.pages[cell];
        let stored = (contents.stored_bytes[cell] / pages.max(1) as f64).ceil() as u64;
        Some(if pages == 0 { colors::ZERO } else { steps.color(stored.max(1)) })
    });
    wanted.write(&page.finish(), grid.cell_bytes())
}

fn snapshot_line(snapshot: &Snapshot, parent: Option<&Snapshot>) -> String {
    let message = snapshot.manifest().message.lines().next().unwrap_or_default();
    let parent = parent
        .map_or_else(|| "no parent".to_owned(), |parent| format!("parent {}", parent.id().short()));
    format!("snapshot {}  {parent}  {message}", snapshot.id().short()).trim_end().to_owned()
}

/// The region's size, by kind, on one line.
fn shares(
    region: &RegionReader,
    contents: &Contents,
    diff: Option<&RegionDiff>,
    hole: &Range<u64>,
) -> anyhow::Result<String> {
    let all = region.pages() - (hole.end - hole.start);
    let zero = all.saturating_sub(contents.pages_sum);
    let of = |pages: u64| {
        format!("{} ({})", output::bytes(pages * PAGE_SIZE as u64), percent(pages, all))
    };
    let kinds = match diff {
        None => format!("not zero {}", of(contents.pages_sum)),
        Some(diff) => {
            let new = overlap(region, diff)?;
            format!(
                "shared with the parent {}   changed {}",
                of(contents.pages_sum - new),
                of(diff.changed_pages)
            )
        }
    };
    Ok(format!(
        "{}: zero {}   {kinds}   takes {} in the store in total",
        output::bytes(all * PAGE_SIZE as u64),
        of(zero),
        output::bytes(contents.stored_bytes_sum)
    ))
}

/// The number of pages that differ and are not zero.
fn overlap(region: &RegionReader, diff: &RegionDiff) -> frazil_snapstore::Result<u64> {
    let mut ranges = diff.ranges.iter().peekable();
    let mut sum = 0;
    region.visit_runs(0, |run| {
        while ranges.next_if(|range| range.first + range.count <= run.first).is_some() {}
        for range in ranges.clone().take_while(|range| range.first < run.end()) {
            let end = run.end().min(range.first + range.count);
            sum += end.saturating_sub(run.first.max(range.first));
        }
        ControlFlow::<()>::Continue(())
    })?;
    Ok(sum)
}

fn kind_keys(has_parent: bool, has_hole: bool) -> Vec<Key> {
    let mut keys = vec![Key::new(colors::ZERO, "zero")];
    if has_parent {
        keys.push(Key::new(colors::shared(0.1), "shared with the parent: some"));
        keys.push(Key::new(colors::shared(1.0), "all"));
        keys.push(Key::new(colors::new(0.1), "changed since the parent: some"));
        keys.push(Key::new(colors::new(1.0), "all"));
    } else {
        keys.push(Key::new(colors::new(0.1), "not zero, all new as there is no parent: some"));
        keys.push(Key::new(colors::new(1.0), "all"));
    }
    if has_hole {
        keys.push(Key::new(colors::HOLE, "no memory: the hole for devices"));
    }
    keys
}

/// True if the whole cell is in `pages`.
fn is_inside(grid: &Grid, cell: usize, pages: &Range<u64>) -> bool {
    let first = cell as u64 * grid.cell_pages;
    pages.contains(&first) && first + grid.pages_of(cell) <= pages.end
}

/// Draws where a region differs between `a` and `b`.
///
/// # Errors
/// Those of the store; if the picture cannot be written.
pub(crate) fn draw_diff(
    wanted: &Wanted,
    a: &Snapshot,
    b: &Snapshot,
    options: DiffOptions,
) -> anyhow::Result<Drawn> {
    let region = region(b, wanted)?;
    let grid = Grid::of(region.pages());
    let diff = diff_region(a, b, region.name(), options)?;
    let (changed, contents) = (changed(&diff, &grid), Contents::of(&region, &grid)?);
    let hole = hole(b, &region);
    let title = format!("{}: what changed from A to B", region.name());
    let all = region.pages() - (hole.end - hole.start);
    let lines = [
        format!("A  {}", describe(a)),
        format!("B  {}", describe(b)),
        format!(
            "{} of {} differ, {} ({}), in {}",
            output::count(diff.changed_pages),
            output::counted(all, "page"),
            output::bytes(diff.changed_pages * PAGE_SIZE as u64),
            percent(diff.changed_pages, all),
            output::counted(diff.ranges.len() as u64, "range")
        ),
    ];
    let mut page = Page::new(ADDRESSES, grid.width_px(), &title, &lines);
    let steps = Steps::to(grid.cell_pages);
    let mut keys = vec![
        Key::new(colors::ZERO, "not changed, zero"),
        Key::new(colors::UNCHANGED, "not changed"),
    ];
    keys.extend(steps.legend().into_iter().map(Key::from));
    if !hole.is_empty() {
        keys.push(Key::new(colors::HOLE, "no memory: the hole for devices"));
    }
    page.heading(
        &format!(
            "Pages of 4 KiB that differ, of the {} in each {}",
            output::count(grid.cell_pages),
            short_bytes(grid.cell_bytes())
        ),
        &keys,
    );
    page.grid(&grid, &|cell| match (changed[cell], contents.pages[cell]) {
        _ if is_inside(&grid, cell, &hole) => None,
        (0, 0) => Some::<Rgb>(colors::ZERO),
        (0, _) => Some(colors::UNCHANGED),
        (pages, _) => Some(steps.color(pages)),
    });
    wanted.write(&page.finish(), grid.cell_bytes())
}
