//! Pictures of guest memory: of one snapshot, the kind of each part; of two, what differs; of a
//! history, what changed when.
//!
//! They are made from page trees alone: no page is read, and the time taken depends on the trees,
//! not on the size of the guest.

mod colors;
mod grid;
mod history;
mod layout;
mod picture;
mod png;
mod snapshots;
mod survey;
mod svg;

use std::ffi::OsStr;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use frazil_snapstore::{PAGE_SIZE, RegionReader, Snapshot};
use frazil_vmm::SavedMachine;
use frazil_vmm::memory::{HOLE_END, HOLE_START, RAM_REGION};
use frazil_vmm::state::Saved;
use serde::Serialize;

pub(crate) use self::history::draw_history;
use self::picture::Picture;
pub(crate) use self::snapshots::{draw_diff, draw_snapshot};
use crate::cli::HeatmapArgs;
use crate::new_file::NewFile;
use crate::output;

/// A picture that was drawn.
#[derive(Debug, Serialize)]
pub(crate) struct Drawn {
    /// The picture's file.
    pub file: PathBuf,
    /// The region that it shows.
    pub region: String,
    /// Bytes of memory per cell.
    pub cell_bytes: u64,
    pub width: u32,
    pub height: u32,
}

impl Drawn {
    /// Prints where the picture is, for people.
    pub(crate) fn print_location(&self) {
        outln!(
            "\nheatmap of {} in {}: {} per cell",
            self.region,
            self.file.display(),
            output::bytes(self.cell_bytes)
        );
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Png,
    Svg,
}

/// A picture that is asked for: its file, and the region to show.
#[derive(Debug)]
pub(crate) struct Wanted {
    file: PathBuf,
    format: Format,
    region: String,
}

impl Wanted {
    /// The picture that `args` ask for, if any.
    ///
    /// # Errors
    /// If the file's extension is not that of a known format.
    pub(crate) fn of(args: &HeatmapArgs) -> anyhow::Result<Option<Self>> {
        let Some(file) = &args.heatmap else { return Ok(None) };
        let format = format(file)?;
        Ok(Some(Self { file: file.clone(), format, region: args.heatmap_region.clone() }))
    }

    fn write(&self, picture: &Picture, cell_bytes: u64) -> anyhow::Result<Drawn> {
        self.try_write(picture).with_context(|| format!("cannot draw {}", self.file.display()))?;
        let Picture { width, height, .. } = *picture;
        Ok(Drawn {
            file: self.file.clone(),
            region: self.region.clone(),
            cell_bytes,
            width,
            height,
        })
    }

    fn try_write(&self, picture: &Picture) -> anyhow::Result<()> {
        let file = NewFile::create(&self.file, true, NewFile::SHARED)?;
        let mut out = BufWriter::new(file.file());
        match self.format {
            Format::Png => png::write(picture, &mut out)?,
            Format::Svg => svg::write(picture, &mut out)?,
        }
        out.into_inner().map_err(std::io::IntoInnerError::into_error)?;
        file.publish()
    }
}

fn format(file: &Path) -> anyhow::Result<Format> {
    let extension = file.extension().map(OsStr::to_ascii_lowercase);
    match extension.as_ref().and_then(|extension| extension.to_str()) {
        Some("png") => Ok(Format::Png),
        Some("svg") => Ok(Format::Svg),
        _ => bail!("--heatmap {}: expected a file whose name ends in .png or .svg", file.display()),
    }
}

/// The region of `snapshot` to draw.
fn region(snapshot: &Snapshot, wanted: &Wanted) -> anyhow::Result<RegionReader> {
    snapshot.region(&wanted.region).context("--heatmap-region")
}

/// Pages of a region where the machine has no memory: the hole for devices below 4 GiB.
fn hole(snapshot: &Snapshot, region: &RegionReader) -> std::ops::Range<u64> {
    let page = PAGE_SIZE as u64;
    let has_machine =
        snapshot.manifest().state.iter().any(|chunk| chunk.kind == SavedMachine::KIND);
    if region.name() == RAM_REGION && has_machine && region.pages() > HOLE_END / page {
        HOLE_START / page..HOLE_END / page
    } else {
        0..0
    }
}

/// A share such as "12 %"; one of nearly nothing or nearly all is shown as such.
fn percent(part: u64, whole: u64) -> String {
    match 100.0 * part as f64 / whole.max(1) as f64 {
        0.0 => "0 %".to_owned(),
        share if share < 0.1 => "< 0.1 %".to_owned(),
        share if share >= 99.95 && part < whole => "> 99.9 %".to_owned(),
        share if share < 10.0 || (share >= 99.5 && part < whole) => format!("{share:.1} %"),
        share => format!("{share:.0} %"),
    }
}

/// A snapshot on one line.
fn describe(snapshot: &Snapshot) -> String {
    let manifest = snapshot.manifest();
    let message = manifest.message.lines().next().unwrap_or_default();
    let line = format!(
        "{}  {}  {}  {message}",
        snapshot.id().short(),
        output::time(manifest.time_unix_ms),
        manifest.name
    );
    line.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_says_which_kind_of_picture() {
        assert_eq!(format(Path::new("a/b.png")).unwrap(), Format::Png);
        assert_eq!(format(Path::new("x.SVG")).unwrap(), Format::Svg);
        for other in ["x.jpg", "png", ".png", "x"] {
            let error = format(Path::new(other)).unwrap_err().to_string();
            assert!(error.contains(".png or .svg"), "{error}");
        }
    }

    #[test]
    fn shares_are_neither_nothing_nor_all_by_rounding() {
        assert_eq!(
            [(0, 9), (1, 100_000), (1, 20), (1, 2), (2, 2)].map(|(part, of)| percent(part, of)),
            ["0 %", "< 0.1 %", "5.0 %", "50 %", "100 %"]
        );
        assert_eq!(
            [(99_999, 100_000), (997, 1_000), (99, 100)].map(|(part, of)| percent(part, of)),
            ["> 99.9 %", "99.7 %", "99 %"]
        );
    }
}
