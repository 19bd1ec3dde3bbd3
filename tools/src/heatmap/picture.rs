//! A picture in no particular format: rectangles and lines of text, in pixels.

/// Red, green, blue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rgb(pub u8, pub u8, pub u8);

impl Rgb {
    /// Text.
    pub(super) const INK: Self = Self(0x20, 0x24, 0x28);
    /// Less important text.
    pub(super) const FAINT: Self = Self(0x6a, 0x70, 0x76);

    /// The colour `share` of the way from this one to `other`.
    pub(super) fn towards(self, other: Self, share: f64) -> Self {
        let mix = |a: u8, b: u8| {
            (f64::from(a) + (f64::from(b) - f64::from(a)) * share.clamp(0.0, 1.0)).round() as u8
        };
        Self(mix(self.0, other.0), mix(self.1, other.1), mix(self.2, other.2))
    }
}

/// A rectangle: left, top, width, height.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rect(pub u32, pub u32, pub u32, pub u32);

/// The size of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Size {
    Text,
    Title,
}

impl Size {
    /// Pixels from one character to the next.
    pub(super) fn advance(self) -> u32 {
        match self {
            Self::Text => 7,
            Self::Title => 9,
        }
    }

    /// Pixels from one line to the next.
    pub(super) fn line(self) -> u32 {
        match self {
            Self::Text => 16,
            Self::Title => 20,
        }
    }
}

/// Which end of a text its `x` is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Anchor {
    Start,
    End,
}

/// A line of text; `y` is its upper edge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Text {
    pub x: u32,
    pub y: u32,
    pub anchor: Anchor,
    pub size: Size,
    pub color: Rgb,
    pub line: String,
}

impl Text {
    /// The text's left edge.
    pub(super) fn left(&self) -> u32 {
        let width = self.line.chars().count() as u32 * self.size.advance();
        match self.anchor {
            Anchor::Start => self.x,
            Anchor::End => self.x.saturating_sub(width),
        }
    }
}

/// A picture.
#[derive(Clone, Debug, Default)]
pub(super) struct Picture {
    pub width: u32,
    pub height: u32,
    /// Rectangles by colour, drawn in this order.
    pub rects: Vec<(Rgb, Vec<Rect>)>,
    pub texts: Vec<Text>,
}

impl Picture {
    pub(super) fn text(&mut self, x: u32, y: u32, anchor: Anchor, text: impl Into<String>) {
        self.texts.push(Text {
            x,
            y,
            anchor,
            size: Size::Text,
            color: Rgb::INK,
            line: text.into(),
        });
    }

    /// Like [`Self::text`], for less important text.
    pub(super) fn faint(&mut self, x: u32, y: u32, anchor: Anchor, text: impl Into<String>) {
        self.text(x, y, anchor, text);
        if let Some(last) = self.texts.last_mut() {
            last.color = Rgb::FAINT;
        }
    }

    pub(super) fn rect(&mut self, color: Rgb, rect: Rect) {
        match self.rects.last_mut() {
            Some((last, rects)) if *last == color => rects.push(rect),
            _ => self.rects.push((color, vec![rect])),
        }
    }
}
