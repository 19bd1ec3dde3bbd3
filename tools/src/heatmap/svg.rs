//! Writes pictures as SVG.

use std::io::Write;

use super::picture::{Anchor, Picture, Rect, Rgb, Size};

/// Writes `picture` to `out`.
///
/// # Errors
/// Those of `out`.
pub(super) fn write(picture: &Picture, out: &mut dyn Write) -> anyhow::Result<()> {
    let Picture { width, height, rects, texts } = picture;
    writeln!(
        out,
        r#"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="'Noto Sans Mono','DejaVu Sans Mono',monospace" shape-rendering="crispEdges">"#
    )?;
    writeln!(out, r##"<rect width="{width}" height="{height}" fill="#ffffff"/>"##)?;
    for (color, rects) in rects {
        write!(out, r#"<path fill="{}" d=""#, hex(*color))?;
        for Rect(x, y, width, height) in rects {
            write!(out, "M{x} {y}h{width}v{height}h-{width}z")?;
        }
        writeln!(out, r#""/>"#)?;
    }
    for text in texts {
        let advance = text.size.advance();
        // The characters of monospaced fonts are about 0.6 of the font size wide.
        let (weight, size) = match text.size {
            Size::Text => ("normal", f64::from(advance) / 0.6),
            Size::Title => ("bold", f64::from(advance) / 0.6),
        };
        // With another font, of another width, text at least stays on the right side.
        let anchor = match text.anchor {
            Anchor::Start => "start",
            Anchor::End => "end",
        };
        let baseline = f64::from(text.y) + f64::from(text.size.line()) * 0.78;
        writeln!(
            out,
            r#"<text x="{}" y="{baseline:.1}" font-size="{size:.1}" font-weight="{weight}" text-anchor="{anchor}" fill="{}" xml:space="preserve">{}</text>"#,
            text.x,
            hex(text.color),
            escaped(&text.line)
        )?;
    }
    writeln!(out, "</svg>")?;
    Ok(())
}

fn hex(Rgb(r, g, b): Rgb) -> String {
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// Escapes text for XML, and replaces characters that XML does not allow: names and messages may
/// hold anything.
fn escaped(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '&' => "&amp;".to_owned(),
            '<' => "&lt;".to_owned(),
            '>' => "&gt;".to_owned(),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => "?".to_owned(),
            c => c.to_string(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_vm_is_called_is_text_and_nothing_else() {
        let mut picture = Picture { width: 10, height: 10, ..Picture::default() };
        picture.rect(Rgb(0xd5, 0x5e, 0), Rect(1, 2, 3, 4));
        picture.text(9, 0, Anchor::End, "<&>\u{1b}\u{7}");
        let mut out = Vec::new();
        write(&picture, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains(r##"<path fill="#d55e00" d="M1 2h3v4h-3z"/>"##), "{text}");
        assert!(text.contains(">&lt;&amp;&gt;??</text>"), "{text}");
        assert!(text.starts_with("<svg ") && text.ends_with("</svg>\n"), "{text}");
    }
}
