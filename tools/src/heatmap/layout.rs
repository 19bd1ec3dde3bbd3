//! Lays a picture out from top to bottom: a title, then panels, each with a legend.

use super::grid::Grid;
use super::picture::{Anchor, Picture, Rect, Rgb, Size, Text};

/// Pixels for addresses on the left.
pub(super) const ADDRESSES: u32 = 128;
/// Pixels for times on the left.
pub(super) const TIMES: u32 = 164;
/// Pixels for labels on the right.
const RIGHT: u32 = 110;
const MARGIN: u32 = 18;
/// Pixels of a legend's square.
const SWATCH: u32 = 12;

/// An entry of a legend.
pub(super) struct Key {
    pub color: Rgb,
    pub label: String,
}

impl Key {
    pub(super) fn new(color: Rgb, label: impl Into<String>) -> Self {
        Self { color, label: label.into() }
    }
}

impl From<(Rgb, String)> for Key {
    fn from((color, label): (Rgb, String)) -> Self {
        Self { color, label }
    }
}

/// A picture that is filled from top to bottom.
pub(super) struct Page {
    picture: Picture,
    /// Pixels for labels on the left.
    left: u32,
    /// Where the next item goes.
    top: u32,
}

impl Page {
    /// `width` is that of the panels without labels; `left` is the room for labels on their left.
    pub(super) fn new(left: u32, width: u32, title: &str, lines: &[String]) -> Self {
        let picture = Picture { width: left + width + RIGHT, ..Picture::default() };
        let mut page = Self { picture, left, top: MARGIN };
        let room = (page.picture.width - 2 * MARGIN) / Size::Title.advance();
        page.picture.texts.push(Text {
            x: MARGIN,
            y: page.top,
            anchor: Anchor::Start,
            size: Size::Title,
            color: Rgb::INK,
            line: cut(title, room),
        });
        page.top += 30;
        for line in lines {
            let room = (page.picture.width - 2 * MARGIN) / Size::Text.advance();
            page.picture.text(MARGIN, page.top, Anchor::Start, cut(line, room));
            page.top += 20;
        }
        page
    }

    /// Begins a panel with its title and its legend.
    pub(super) fn heading(&mut self, heading: &str, keys: &[Key]) {
        self.top += 18;
        self.picture.text(MARGIN, self.top, Anchor::Start, heading);
        self.top += 26;
        let mut x = MARGIN;
        for key in keys {
            let width = SWATCH + 6 + key.label.chars().count() as u32 * Size::Text.advance();
            if x > MARGIN && x + width > self.picture.width - MARGIN {
                x = MARGIN;
                self.top += 22;
            }
            // With a border, or pale colours could not be seen.
            self.picture.rect(Rgb::FAINT, Rect(x, self.top + 2, SWATCH, SWATCH));
            self.picture.rect(key.color, Rect(x + 1, self.top + 3, SWATCH - 2, SWATCH - 2));
            self.picture.text(x + SWATCH + 6, self.top, Anchor::Start, &*key.label);
            x += width + 22;
        }
        self.top += 30;
    }

    pub(super) fn grid(&mut self, grid: &Grid, color_of: &dyn Fn(usize) -> Option<Rgb>) {
        self.top += grid.draw(&mut self.picture, (self.left, self.top), color_of);
        self.top += 8;
    }

    /// Draws a panel with `draw`, which gets the picture and the panel's left and top, and returns
    /// the panel's height.
    pub(super) fn draw(&mut self, draw: impl FnOnce(&mut Picture, u32, u32) -> u32) {
        self.top += draw(&mut self.picture, self.left, self.top);
        self.top += 8;
    }

    pub(super) fn finish(mut self) -> Picture {
        self.picture.height = self.top + MARGIN;
        self.picture
    }
}

/// Cuts a line off if it is longer than `room` characters.
fn cut(line: &str, room: u32) -> String {
    let room = room as usize;
    if line.chars().count() <= room {
        return line.to_owned();
    }
    let kept: String = line.chars().take(room.saturating_sub(3)).collect();
    format!("{kept}...")
}
