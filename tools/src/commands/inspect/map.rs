//! What each region is made of.

use std::ops::ControlFlow;

use frazil_snapstore::{MapRange, PAGE_SIZE, PageKind, RegionReader, Snapshot};
use frazil_vmm::memory::RAM_REGION;
use serde_json::{Value, json};

use super::super::print_json;
use crate::cli::InspectArgs;
use crate::output;

pub(super) fn map(args: &InspectArgs, snapshot: &Snapshot, json: bool) -> anyhow::Result<()> {
    let names = match &args.region {
        Some(name) => vec![name.clone()],
        None => snapshot.manifest().regions.iter().map(|region| region.name.clone()).collect(),
    };
    let regions = names.iter().map(|name| snapshot.region(name)).collect::<Result<Vec<_>, _>>()?;
    if json {
        let regions = regions.iter().map(region_json).collect::<anyhow::Result<Vec<_>>>()?;
        return print_json(&json!({"snapshot": snapshot.id(), "regions": regions}));
    }
    outln!("snapshot {}", snapshot.id());
    regions.iter().try_for_each(|region| show(region, args.ranges))
}

fn kind(kind: PageKind) -> &'static str {
    match kind {
        PageKind::Zero => "zero",
        PageKind::Whole => "data",
        PageKind::Delta => "delta",
    }
}

fn region_json(region: &RegionReader) -> anyhow::Result<Value> {
    let mut ranges = Vec::new();
    let found = frazil_snapstore::map(region, &mut |range: MapRange| {
        let MapRange { first, count, kind: kind_of, stored_bytes } = range;
        ranges.push(json!([first, count, kind(kind_of), stored_bytes]));
        ControlFlow::Continue(())
    })?;
    Ok(json!({
        "name": region.name(), "pages": region.pages(), "zero_pages": found.zero_pages,
        "data_pages": found.whole_pages, "delta_pages": found.delta_pages, "frames": found.frames,
        "stored_bytes": found.stored_bytes, "ranges": ranges,
    }))
}

fn show(region: &RegionReader, most: usize) -> anyhow::Result<()> {
    let mut table = output::table(&["  FROM", "TO", "SIZE", "KIND", "STORED", "RATIO"], &[2, 4, 5]);
    let mut shown = 0;
    let found = frazil_snapstore::map(region, &mut |range| {
        if shown < most {
            shown += 1;
            table.add_row(row(&range));
        }
        ControlFlow::Continue(())
    })?;
    let bytes = |pages: u64| pages * PAGE_SIZE as u64;
    outln!("\nregion {}: {}", region.name(), output::bytes(bytes(region.pages())));
    let data = found.whole_pages + found.delta_pages;
    outln!(
        "  zero {} ({} pages), data {} ({} pages), as differences {} ({} pages)",
        output::bytes(bytes(found.zero_pages)),
        output::count(found.zero_pages),
        output::bytes(bytes(found.whole_pages)),
        output::count(found.whole_pages),
        output::bytes(bytes(found.delta_pages)),
        output::count(found.delta_pages),
    );
    if data > 0 {
        outln!(
            "  stored in {} frames, {}: {} of what is not zero",
            output::count(found.frames),
            output::bytes(found.stored_bytes),
            percent(found.stored_bytes, bytes(data)),
        );
    }
    let what = if region.name() == RAM_REGION { "guest physical" } else { "bytes of the disk" };
    outln!("  by {what}:");
    output::print_table(&table);
    let more = found.ranges.saturating_sub(shown as u64);
    if more > 0 {
        outln!("  … and {} more: --ranges all", output::count(more));
    }
    Ok(())
}

fn row(range: &MapRange) -> [String; 6] {
    let (first, len) = (range.first * PAGE_SIZE as u64, range.count * PAGE_SIZE as u64);
    let is_zero = range.kind == PageKind::Zero;
    let stored = |text: String| if is_zero { "-".to_owned() } else { text };
    [
        format!("  {first:#014x}"),
        format!("{:#014x}", first + len - 1),
        output::bytes(len),
        kind(range.kind).to_owned(),
        stored(output::bytes(range.stored_bytes)),
        stored(percent(range.stored_bytes, len)),
    ]
}

fn percent(part: u64, whole: u64) -> String {
    format!("{:.1} %", part as f64 / whole as f64 * 100.0)
}
