//! Writes pictures as PNG.

use std::collections::HashMap;
use std::io::Write;

use noto_sans_mono_bitmap::{FontWeight, RasterHeight, RasterizedChar, get_raster};
use png::{BitDepth, ColorType, Compression, Encoder, Filter};

use super::picture::{Picture, Rect, Rgb, Size, Text};

/// Writes `picture` to `out`.
///
/// # Errors
/// Those of `out`.
pub(super) fn write(picture: &Picture, out: &mut dyn Write) -> anyhow::Result<()> {
    let mut canvas = Canvas::new(picture.width, picture.height);
    for (color, rects) in &picture.rects {
        rects.iter().for_each(|rect| canvas.fill(*rect, *color));
    }
    picture.texts.iter().for_each(|text| canvas.write(text));
    let mut encoder = Encoder::new(out, picture.width, picture.height);
    encoder.set_depth(BitDepth::Eight);
    encoder.set_compression(Compression::High);
    // Rows are flat and alike: filters would only add noise.
    encoder.set_filter(Filter::NoFilter);
    let pixels = if let Some((palette, pixels)) = indexed(&canvas.bytes) {
        encoder.set_color(ColorType::Indexed);
        encoder.set_palette(palette);
        pixels
    } else {
        encoder.set_color(ColorType::Rgb);
        canvas.bytes
    };
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&pixels)?;
    writer.finish()?;
    Ok(())
}

/// A palette and one byte per pixel, which takes half the space; None if there are too many
/// colours.
fn indexed(bytes: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let (colors, _) = bytes.as_chunks::<3>();
    let (mut palette, mut numbers) = (Vec::new(), HashMap::new());
    let mut pixels = Vec::with_capacity(colors.len());
    for color in colors {
        let number = *numbers.entry(color).or_insert_with(|| {
            palette.extend_from_slice(color);
            palette.len() / 3 - 1
        });
        pixels.push(u8::try_from(number).ok()?);
    }
    Some((palette, pixels))
}

struct Canvas {
    width: u32,
    height: u32,
    bytes: Vec<u8>,
}

impl Canvas {
    fn new(width: u32, height: u32) -> Self {
        Self { width, height, bytes: vec![0xff; width as usize * height as usize * 3] }
    }

    fn fill(&mut self, Rect(left, top, width, height): Rect, color: Rgb) {
        for y in top..top.saturating_add(height).min(self.height) {
            for x in left..left.saturating_add(width).min(self.width) {
                self.pixel(x, y, color, 255);
            }
        }
    }

    /// Blends `color` over a pixel, with `cover` of 255 as its opacity.
    fn pixel(&mut self, x: u32, y: u32, color: Rgb, cover: u8) {
        if x >= self.width || y >= self.height {
            return;
        }
        let at = (y as usize * self.width as usize + x as usize) * 3;
        let below = Rgb(self.bytes[at], self.bytes[at + 1], self.bytes[at + 2]);
        let Rgb(red, green, blue) = below.towards(color, f64::from(cover) / 255.0);
        self.bytes[at..at + 3].copy_from_slice(&[red, green, blue]);
    }

    fn write(&mut self, text: &Text) {
        let (weight, height) = match text.size {
            Size::Text => (FontWeight::Regular, RasterHeight::Size16),
            Size::Title => (FontWeight::Bold, RasterHeight::Size20),
        };
        for (index, c) in (0_u32..).zip(text.line.chars()) {
            let left = text.left() + index * text.size.advance();
            // Characters that the font lacks are shown as `?`.
            let glyph = get_raster(c, weight, height).or_else(|| get_raster('?', weight, height));
            for (y, row) in (text.y..).zip(glyph.iter().flat_map(RasterizedChar::rows)) {
                for (x, cover) in (left..).zip(row.iter()) {
                    // In 16 shades: more would not be seen, and take space.
                    self.pixel(x, y, text.color, cover / 17 * 17);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use noto_sans_mono_bitmap::get_raster_width;

    use super::*;

    #[test]
    fn text_is_as_wide_as_it_is_said_to_be() {
        for (size, weight, height) in [
            (Size::Text, FontWeight::Regular, RasterHeight::Size16),
            (Size::Title, FontWeight::Bold, RasterHeight::Size20),
        ] {
            assert_eq!(get_raster_width(weight, height), size.advance() as usize);
            assert_eq!(height.val(), size.line() as usize);
        }
        for c in "0x 4.00 GiB µ · × é?".chars() {
            assert!(get_raster(c, FontWeight::Regular, RasterHeight::Size16).is_some(), "{c}");
        }
    }

    #[test]
    fn more_colours_than_a_palette_has_are_kept() {
        let few: Vec<u8> = (0..=255).flat_map(|shade| [shade, 0, 7]).collect();
        let (palette, pixels) = indexed(&few).unwrap();
        assert_eq!((palette, pixels), (few.clone(), (0..=255).collect()));
        assert_eq!(indexed(&[few, vec![9, 9, 9]].concat()), None);
    }

    #[test]
    fn what_is_drawn_can_be_read_back() {
        let mut picture = Picture { width: 40, height: 30, ..Picture::default() };
        picture.rect(Rgb(1, 2, 3), Rect(10, 5, 4, 3));
        // A rectangle beyond the edge is cut off.
        picture.rect(Rgb(9, 9, 9), Rect(38, 28, 100, 100));
        picture.text(0, 0, super::super::picture::Anchor::Start, "I");
        let mut bytes = Vec::new();
        write(&picture, &mut bytes).unwrap();
        let mut decoder = png::Decoder::new(std::io::Cursor::new(bytes));
        decoder.set_transformations(png::Transformations::EXPAND);
        let mut reader = decoder.read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((info.width, info.height), (40, 30));
        let at = |x: usize, y: usize| &pixels[(y * 40 + x) * 3..][..3];
        assert_eq!((at(10, 5), at(13, 7)), (&[1, 2, 3][..], &[1, 2, 3][..]));
        assert_eq!((at(9, 5), at(14, 7), at(13, 8)), (&[255; 3][..], &[255; 3][..], &[255; 3][..]));
        assert_eq!(at(39, 29), [9, 9, 9]);
        let inked = (0..16).any(|y| (0..7).any(|x| at(x, y)[0] < 128));
        assert!(inked, "there is a letter");
    }
}
