//! What each region is made of: its ranges of pages, by kind.

use std::cell::Cell;
use std::io::{self, BufWriter, Write};
use std::ops::{ControlFlow, Range};

use frazil_snapstore::{
    MapRange, PAGE_SIZE, PageKind, RegionMap, RegionReader, Snapshot, StoreError,
};
use frazil_vmm::inspect::SnapshotMemory;
use frazil_vmm::memory::RAM_REGION;
use serde::ser::{Error, SerializeMap, SerializeSeq};
use serde::{Serialize, Serializer};

use super::break_on_error;
use crate::cli::InspectArgs;
use crate::output;

/// Ranges to show by default.
const RANGES: usize = 20;
const HEADER: [&str; 6] = ["FROM", "TO", "SIZE", "KIND", "STORED", "RATIO"];

pub(super) fn map(args: &InspectArgs, snapshot: &Snapshot, json: bool) -> anyhow::Result<()> {
    let names = match &args.region {
        Some(name) => vec![name.clone()],
        None => snapshot.manifest().regions.iter().map(|region| region.name.clone()).collect(),
    };
    let regions =
        names.iter().map(|name| Mapped::of(snapshot, name)).collect::<Result<Vec<_>, _>>()?;
    if json {
        return Json { snapshot, regions: &regions }.print();
    }
    outln!("snapshot {}", snapshot.id());
    for region in &regions {
        if region.show(args.ranges.unwrap_or(RANGES))?.is_break() {
            break;
        }
    }
    Ok(())
}

/// A region, and its holes.
struct Mapped {
    region: RegionReader,
    /// Pages that do not exist in the machine: the hole in RAM.
    holes: Vec<Range<u64>>,
}

/// The kind of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Pages, by how they are stored.
    Pages(PageKind),
    /// No pages at all.
    Hole,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Pages(PageKind::Zero) => "zero",
            Self::Pages(PageKind::Whole) => "data",
            Self::Pages(PageKind::Delta) => "delta",
            Self::Hole => "hole",
        }
    }
}

/// A part of a region, all of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    first: u64,
    count: u64,
    kind: Kind,
    stored_bytes: u64,
}

impl Mapped {
    fn of(snapshot: &Snapshot, name: &str) -> anyhow::Result<Self> {
        let region = snapshot.region(name)?;
        let mut holes = Vec::new();
        if name == RAM_REGION {
            let memory = SnapshotMemory::open(snapshot)?;
            let mut at = 0;
            for range in memory.ranges() {
                let first = range.gpa / PAGE_SIZE as u64;
                if first > at {
                    holes.push(at..first);
                }
                at = first + range.len_bytes / PAGE_SIZE as u64;
            }
        }
        Ok(Self { region, holes })
    }

    /// Passes the parts to `visit` in order, until it breaks. Returns the sums, with zero pages in
    /// holes not counted, and the number of pages in holes.
    fn each(
        &self,
        visit: &mut dyn FnMut(Part) -> ControlFlow<()>,
    ) -> Result<(RegionMap, u64), StoreError> {
        let mut hole_pages = 0;
        let mut map = frazil_snapstore::map(&self.region, &mut |range| {
            split(&range, &self.holes).into_iter().try_for_each(|part| {
                hole_pages += if part.kind == Kind::Hole { part.count } else { 0 };
                visit(part)
            })
        })?;
        map.zero_pages = map.zero_pages.saturating_sub(hole_pages);
        Ok((map, hole_pages))
    }

    fn show(&self, most: usize) -> anyhow::Result<ControlFlow<()>> {
        let mut ranges = 0_usize;
        let (found, hole_pages) = self.each(&mut |_| {
            ranges += 1;
            ControlFlow::Continue(())
        })?;
        let bytes = |pages: u64| output::bytes(pages * PAGE_SIZE as u64);
        let name = self.region.name();
        outln!("\nregion {name}: {}", bytes(self.region.pages() - hole_pages));
        let data = found.whole_pages + found.delta_pages;
        outln!(
            "  zero {} ({} pages), data {} ({} pages), delta {} ({} pages)",
            bytes(found.zero_pages),
            output::count(found.zero_pages),
            bytes(found.whole_pages),
            output::count(found.whole_pages),
            bytes(found.delta_pages),
            output::count(found.delta_pages),
        );
        if data > 0 {
            outln!(
                "  stored in {} frames, {}: {} of what is not zero",
                output::count(found.frames),
                output::bytes(found.stored_bytes),
                percent(found.stored_bytes, data * PAGE_SIZE as u64),
            );
        }
        let what = if name == RAM_REGION { "guest physical address" } else { "disk offset" };
        outln!("  by {what}:");
        outln!("{}", row(&HEADER.map(str::to_owned)));
        // Printed in a second pass: there may be millions, which are not kept in memory.
        let mut left = most;
        let mut flow = ControlFlow::Continue(());
        self.each(&mut |part| {
            if left == 0 {
                return ControlFlow::Break(());
            }
            left -= 1;
            flow = break_on_error(output::try_line(format_args!("{}", row(&part.columns()))));
            flow
        })?;
        let more = ranges.saturating_sub(most);
        if more > 0 && flow.is_continue() {
            outln!("  … and {} more: --ranges all prints them", output::count(more as u64));
        }
        Ok(flow)
    }
}

/// Splits a range at holes, which become parts of their own.
fn split(range: &MapRange, holes: &[Range<u64>]) -> Vec<Part> {
    let MapRange { first, count, kind, stored_bytes } = *range;
    let end = first + count;
    let part = |pages: Range<u64>, kind| Part {
        first: pages.start,
        count: pages.end - pages.start,
        kind,
        stored_bytes: if kind == Kind::Hole { 0 } else { stored_bytes },
    };
    let kind = Kind::Pages(kind);
    // Data stored in a hole is shown as data.
    if kind != Kind::Pages(PageKind::Zero) {
        return vec![part(first..end, kind)];
    }
    let mut parts = Vec::new();
    let mut at = first;
    for hole in holes {
        let hole = hole.start.max(at)..hole.end.min(end);
        if hole.is_empty() {
            continue;
        }
        if at < hole.start {
            parts.push(part(at..hole.start, kind));
        }
        at = hole.end;
        parts.push(part(hole, Kind::Hole));
    }
    if at < end {
        parts.push(part(at..end, kind));
    }
    parts
}

impl Part {
    fn columns(&self) -> [String; 6] {
        let (first, len) = (self.first * PAGE_SIZE as u64, self.count * PAGE_SIZE as u64);
        let is_stored = matches!(self.kind, Kind::Pages(PageKind::Whole | PageKind::Delta));
        let stored = |text: String| if is_stored { text } else { "-".to_owned() };
        [
            format!("{first:#014x}"),
            format!("{:#014x}", first + len - 1),
            output::bytes(len),
            self.kind.name().to_owned(),
            stored(output::bytes(self.stored_bytes)),
            stored(percent(self.stored_bytes, len)),
        ]
    }
}

/// Formats a row. Column widths are fixed, since rows are printed without knowing the others.
fn row(columns: &[String; 6]) -> String {
    let [from, to, size, kind, stored, ratio] = columns;
    format!("  {from:<14}  {to:<14}  {size:>12}  {kind:<5}  {stored:>12}  {ratio:>8}")
}

fn percent(part: u64, whole: u64) -> String {
    format!("{:.1} %", part as f64 / whole as f64 * 100.0)
}

/// The JSON output. Ranges are written as they are found.
struct Json<'a> {
    snapshot: &'a Snapshot,
    regions: &'a [Mapped],
}

impl Json<'_> {
    fn print(&self) -> anyhow::Result<()> {
        let mut out = BufWriter::new(io::stdout().lock());
        let printed = serde_json::to_writer(&mut out, self).map_err(io::Error::from);
        match printed.and_then(|()| writeln!(out)).and_then(|()| out.flush()) {
            // Nobody reads the output any more.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            printed => Ok(printed?),
        }
    }
}

impl Serialize for Json<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("snapshot", &self.snapshot.id())?;
        map.serialize_entry("regions", self.regions)?;
        map.end()
    }
}

impl Serialize for Mapped {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("name", &output::plain(self.region.name()))?;
        map.serialize_entry("pages", &self.region.pages())?;
        let sums = Cell::default();
        map.serialize_entry("ranges", &Ranges { mapped: self, sums: &sums })?;
        let (found, hole_pages) = sums.take();
        map.serialize_entry("zero_pages", &found.zero_pages)?;
        map.serialize_entry("data_pages", &found.whole_pages)?;
        map.serialize_entry("delta_pages", &found.delta_pages)?;
        map.serialize_entry("hole_pages", &hole_pages)?;
        map.serialize_entry("frames", &found.frames)?;
        map.serialize_entry("stored_bytes", &found.stored_bytes)?;
        map.end()
    }
}

struct Ranges<'a> {
    mapped: &'a Mapped,
    /// The sums of the ranges, set once the ranges are written.
    sums: &'a Cell<(RegionMap, u64)>,
}

impl Serialize for Ranges<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(None)?;
        let mut written = Ok(());
        let sums = self.mapped.each(&mut |Part { first, count, kind, stored_bytes }| {
            written = list.serialize_element(&(first, count, kind.name(), stored_bytes));
            if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        written?;
        self.sums.set(sums.map_err(S::Error::custom)?);
        list.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_cut_out_of_what_is_zero() {
        let of = |range: Range<u64>, kind, holes: &[Range<u64>]| -> Vec<(u64, u64, &str)> {
            let (first, count) = (range.start, range.end - range.start);
            let parts = split(&MapRange { first, count, kind, stored_bytes: 7 }, holes);
            parts.iter().map(|part| (part.first, part.count, part.kind.name())).collect()
        };
        let hole = std::slice::from_ref(&(300..400));
        for (range, expected) in [
            (0..500, vec![(0, 300, "zero"), (300, 100, "hole"), (400, 100, "zero")]),
            (0..300, vec![(0, 300, "zero")]),
            (299..301, vec![(299, 1, "zero"), (300, 1, "hole")]),
            (300..400, vec![(300, 100, "hole")]),
            (350..360, vec![(350, 10, "hole")]),
            (399..401, vec![(399, 1, "hole"), (400, 1, "zero")]),
            (400..500, vec![(400, 100, "zero")]),
        ] {
            assert_eq!(of(range.clone(), PageKind::Zero, hole), expected, "{range:?}");
        }
        // Data in a hole is not hidden.
        assert_eq!(of(0..500, PageKind::Whole, hole), [(0, 500, "data")]);
        assert_eq!(of(0..9, PageKind::Zero, &[]), [(0, 9, "zero")]);
    }
}
