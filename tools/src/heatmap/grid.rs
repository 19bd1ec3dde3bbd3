//! A region as a grid of cells, labelled with addresses.

use frazil_snapstore::PAGE_SIZE;

use super::picture::{Anchor, Picture, Rect, Rgb};
use crate::output;

/// Width of a row of cells in pixels, roughly.
const ROW_WIDTH: u32 = 1024;
/// The least number of cells, if the region has that many pages.
const CELLS_MIN: u64 = 8192;
/// A cell has at most this many pages, 2 MiB ...
const CELL_PAGES_MAX: u64 = 512;
/// ... unless there would be more cells than this.
const CELLS_MAX: u64 = 512 * 512;
/// Cells get smaller if the grid would be higher than this, in pixels.
const HEIGHT_MAX: u64 = 640;
/// The least pixels between two address labels.
const LABEL_GAP: u32 = 30;

/// The layout of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grid {
    /// Pages in the region.
    pub pages: u64,
    /// Pages per cell; the last cell may have fewer.
    pub cell_pages: u64,
    /// Cells per row.
    pub columns: u32,
}

impl Grid {
    pub(super) fn of(pages: u64) -> Self {
        let pages = pages.max(1);
        let fine = pages.div_ceil(CELLS_MIN).next_power_of_two().min(CELL_PAGES_MAX);
        let cell_pages = fine.max(pages.div_ceil(CELLS_MAX).next_power_of_two());
        let cells = pages.div_ceil(cell_pages);
        let mut columns = 128;
        let height =
            |columns: u32| cells.div_ceil(u64::from(columns)) * u64::from(ROW_WIDTH / columns);
        while columns < 512 && height(columns) > HEIGHT_MAX {
            columns *= 2;
        }
        Self { pages, cell_pages, columns }
    }

    pub(super) fn cells(&self) -> usize {
        self.pages.div_ceil(self.cell_pages) as usize
    }

    /// The number of pages in cell `index`.
    pub(super) fn pages_of(&self, index: usize) -> u64 {
        self.cell_pages.min(self.pages - index as u64 * self.cell_pages)
    }

    /// Calls `add` with each cell that has some of the pages `first .. first + count`, and how
    /// many.
    pub(super) fn spread(&self, first: u64, count: u64, mut add: impl FnMut(usize, u64)) {
        let end = first.saturating_add(count).min(self.pages);
        let mut at = first;
        while at < end {
            let cell = at / self.cell_pages;
            let next = ((cell + 1) * self.cell_pages).min(end);
            add(cell as usize, next - at);
            at = next;
        }
    }

    fn cell_px(&self) -> u32 {
        (ROW_WIDTH / self.columns).max(1)
    }

    fn rows(&self) -> u32 {
        (self.cells() as u64).div_ceil(u64::from(self.columns)) as u32
    }

    fn row_bytes(&self) -> u64 {
        u64::from(self.columns) * self.cell_pages * PAGE_SIZE as u64
    }

    pub(super) fn width_px(&self) -> u32 {
        self.columns * self.cell_px()
    }

    /// Bytes of memory per cell.
    pub(super) fn cell_bytes(&self) -> u64 {
        self.cell_pages * PAGE_SIZE as u64
    }

    /// Draws the cells with their top left corner at `(left, top)`, and the addresses of rows on
    /// both sides. Returns the height. A cell without a colour is left blank.
    pub(super) fn draw(
        &self,
        picture: &mut Picture,
        (left, top): (u32, u32),
        color_of: &dyn Fn(usize) -> Option<Rgb>,
    ) -> u32 {
        let grid_top = top + self.draw_columns(picture, left, top);
        let px = self.cell_px();
        // A gap between cells where there is room for one.
        let side = if px >= 6 { px - 1 } else { px };
        // Sorted by colour, which makes files small.
        let mut cells: Vec<(Rgb, Rect)> = (0..self.cells())
            .filter_map(|index| {
                let (row, column) = (index as u32 / self.columns, index as u32 % self.columns);
                let rect = Rect(left + column * px, grid_top + row * px, side, side);
                Some((color_of(index)?, rect))
            })
            .collect();
        if side == px {
            // Without gaps, neighbours of the same colour become one rectangle, which makes files
            // smaller still.
            cells.dedup_by(|(color, next), (before, all)| {
                let joins = color == before && next.1 == all.1 && next.0 == all.0 + all.2;
                all.2 += if joins { next.2 } else { 0 };
                joins
            });
        }
        cells.sort_by_key(|(color, _)| *color);
        cells.into_iter().for_each(|(color, rect)| picture.rect(color, rect));
        self.draw_rows(picture, left, grid_top);
        grid_top + self.rows() * px - top
    }

    /// Labels the columns at each eighth of a row with their offsets. Returns the height.
    fn draw_columns(&self, picture: &mut Picture, left: u32, top: u32) -> u32 {
        picture.faint(left - 10, top, Anchor::End, "address");
        for eighth in 0..8 {
            let x = left + self.width_px() * eighth / 8;
            let into = self.row_bytes() / 8 * u64::from(eighth);
            // The region is shorter than a row.
            if into >= self.pages * PAGE_SIZE as u64 {
                break;
            }
            picture.faint(x, top, Anchor::Start, format!("+{}", short_bytes(into)));
            picture.rect(Rgb::FAINT, Rect(x, top + 16, 1, 4));
        }
        22
    }

    /// Labels rows, or every so many of them, with the address they begin at.
    fn draw_rows(&self, picture: &mut Picture, left: u32, top: u32) {
        let px = self.cell_px();
        let every = LABEL_GAP.div_ceil(px).next_power_of_two();
        let right = left + self.width_px();
        for row in (0..self.rows()).step_by(every as usize) {
            let address = u64::from(row) * self.row_bytes();
            let middle = top + row * px + px / 2;
            let y = middle.saturating_sub(8);
            picture.rect(Rgb::FAINT, Rect(left - 6, middle, 5, 1));
            picture.text(left - 10, y, Anchor::End, format!("{address:#x}"));
            picture.faint(right + 6, y, Anchor::Start, short_bytes(address));
        }
    }
}

/// A size without needless digits: "64 MiB", "1.5 GiB".
pub(super) fn short_bytes(bytes: u64) -> String {
    let text = output::bytes(bytes);
    let Some((number, unit)) = text.split_once(' ') else { return text };
    if !number.contains('.') {
        return text;
    }
    format!("{} {unit}", number.trim_end_matches('0').trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GIB: u64 = (1 << 30) / PAGE_SIZE as u64;

    #[test]
    fn cells_are_of_2_mib_or_less_and_fill_a_screen() {
        for (pages, cell_bytes, columns) in [
            (GIB / 4, 32 << 10, 128),
            (5 * GIB, 1 << 20, 128),
            (17 * GIB, 2 << 20, 128),
            (64 * GIB, 2 << 20, 256),
            (513 * GIB, 4 << 20, 512),
        ] {
            let grid = Grid::of(pages);
            assert_eq!((grid.cell_bytes(), grid.columns), (cell_bytes, columns), "{pages}");
        }
        for pages in [1, 2, 100, 8192, 8193, GIB, 17 * GIB, 16 << 28] {
            let grid = Grid::of(pages);
            assert!(grid.cell_pages <= CELL_PAGES_MAX || grid.cells() > CELLS_MAX as usize / 2);
            assert!(grid.cells() <= CELLS_MAX as usize && grid.width_px() == ROW_WIDTH);
            assert!(grid.rows() * grid.cell_px() <= 1100, "{pages}: {grid:?}");
        }
    }

    #[test]
    fn every_cell_has_its_colour_whether_neighbours_are_joined_or_not() {
        for pages in [1, 300, 9_000, 20 * GIB, 513 * GIB + 7] {
            let grid = Grid::of(pages);
            let color_of = |cell: usize| match cell % 11 {
                0 => None,
                1..4 => Some(Rgb(1, 0, 0)),
                _ => Some(Rgb((cell / 1000 % 200) as u8, 0, 0)),
            };
            let mut picture = Picture::default();
            grid.draw(&mut picture, (200, 0), &color_of);
            let mut found = vec![None; grid.cells()];
            let px = grid.cell_px();
            for (color, rects) in picture.rects.iter().filter(|(color, _)| *color != Rgb::FAINT) {
                for Rect(x, y, width, _) in rects {
                    for step in 0..width.div_ceil(px) {
                        let row = (y - 22) / px;
                        let cell = (row * grid.columns + (x - 200) / px + step) as usize;
                        assert_eq!(found[cell].replace(*color), None, "{cell} of {pages}");
                    }
                }
            }
            assert!((0..grid.cells()).all(|cell| found[cell] == color_of(cell)), "{pages}");
        }
    }

    #[test]
    fn sizes_are_short() {
        assert_eq!(short_bytes(64 << 20), "64 MiB");
        assert_eq!(short_bytes(3 << 29), "1.5 GiB");
        assert_eq!(short_bytes(0), "0 B");
    }

    proptest! {
        #[test]
        fn every_page_is_in_the_cell_that_it_is_in(
            pages in 1..3_000_000_u64,
            first in 0..3_000_000_u64,
            count in 0..5_000_u64,
        ) {
            let grid = Grid::of(pages);
            let mut found = vec![0; grid.cells()];
            grid.spread(first, count, |cell, pages| found[cell] += pages);
            let mut expected = vec![0; grid.cells()];
            for page in (first..first + count).filter(|page| *page < pages) {
                expected[(page / grid.cell_pages) as usize] += 1;
            }
            prop_assert_eq!(found, expected);
            let sum: u64 = (0..grid.cells()).map(|cell| grid.pages_of(cell)).sum();
            prop_assert_eq!(sum, pages);
        }
    }
}
