//! Prints a diff for people: first a summary, then each region and each chunk of state.

use std::collections::BTreeMap;
use std::io::IsTerminal;

use frazil_snapstore::{PAGE_SIZE, PageRange, RegionDiff, Snapshot, SnapshotDiff, StateDiff};
use frazil_vmm::disk::{SECTOR_BYTES, SavedDisk};
use frazil_vmm::state::Saved;
use serde_json::Value;

use super::registers::{name_of, registers};
use super::{FieldDiff, change, changed_bytes, fields, plain};
use crate::commands::{tags_and_message, tags_by_snapshot};
use crate::output::{self, Line, style};

/// Longer values than this are only in the `--json` output.
const LONGEST_VALUE: usize = 60;
/// The most columns that field names may take before values get out of line.
const NAME_COLUMNS_MAX: usize = 52;
/// Columns of a region's map.
const MAP_COLUMNS: u64 = 64;

pub(super) fn print(a: &Snapshot, b: &Snapshot, found: &SnapshotDiff, ranges: usize) {
    print_header("A", a);
    print_header("B", b);
    print_summary(found);
    let is_disk = |name: &str| {
        let mut state = b.manifest().state.iter().chain(&a.manifest().state);
        state.any(|chunk| chunk.name == name && chunk.kind == SavedDisk::KIND)
    };
    for region in &found.regions {
        print_region(region, ranges, is_disk(&region.name));
    }
    found.state.iter().for_each(print_state);
}

fn print_header(side: &str, snapshot: &Snapshot) {
    let manifest = snapshot.manifest();
    let tags = tags_by_snapshot(snapshot.store()).remove(&snapshot.id()).unwrap_or_default();
    let style = if side == "A" { style::OLD } else { style::NEW };
    Line::new()
        .paint(style, side)
        .text("  ")
        .paint(style::ID, snapshot.id().short())
        .text(format!(
            "  {}  {}  {}",
            output::time(manifest.time_unix_ms),
            manifest.name,
            tags_and_message(&tags, &manifest.message)
        ))
        .print();
}

/// Prints the whole diff in a few lines.
fn print_summary(found: &SnapshotDiff) {
    outln!("");
    for region in &found.regions {
        let pages = region.pages_b.or(region.pages_a).unwrap_or(0);
        let line = Line::new().text("  ").paint(style::NAME, &region.name).pad(14);
        if region.changed_pages == 0 {
            line.paint(style::FAINT, "unchanged").print();
            continue;
        }
        let share = match 100.0 * region.changed_pages as f64 / pages.max(1) as f64 {
            little if little < 0.01 => "less than 0.01".to_owned(),
            much if much >= 99.995 && region.changed_pages < pages => "more than 99.99".to_owned(),
            share => format!("{share:.2}"),
        };
        line.paint(style::CHANGED, output::counted(region.changed_pages, "page"))
            .text(format!(" of {}, {share} %, ", output::count(pages)))
            .text(output::bytes(changed_bytes(region)))
            .print();
    }
    for state in &found.state {
        let line = Line::new().text("  ").paint(style::NAME, &state.name).pad(14);
        let line = match change(state) {
            "changed" => {
                let count = fields(state).len();
                line.paint(style::CHANGED, output::counted(count as u64, "field"))
            }
            change => line.paint(style::CHANGED, change),
        };
        line.print();
    }
    if found.state.is_empty() {
        Line::new()
            .text("  ")
            .paint(style::NAME, "state")
            .pad(14)
            .paint(style::FAINT, "unchanged: vCPUs and devices")
            .print();
    }
}

fn print_region(region: &RegionDiff, most: usize, is_disk: bool) {
    if region.changed_pages == 0 {
        return;
    }
    let of = match (region.pages_a, region.pages_b) {
        (Some(a), Some(b)) if a != b => {
            format!("{} in A, {} in B", output::counted(a, "page"), output::count(b))
        }
        (Some(pages), Some(_)) => output::counted(pages, "page"),
        (Some(pages), None) => format!("{}, only in A", output::counted(pages, "page")),
        (None, pages) => {
            format!("{}, only in B", output::counted(pages.unwrap_or(0), "page"))
        }
    };
    outln!("");
    Line::new()
        .paint(style::HEADING, &region.name)
        .text(format!(
            " ({of}): {} {}, {}, in {}; {} of frames in B",
            output::counted(region.changed_pages, "page"),
            if region.changed_pages == 1 { "differs" } else { "differ" },
            output::bytes(changed_bytes(region)),
            output::counted(region.ranges.len() as u64, "range"),
            output::bytes(region.stored_bytes)
        ))
        .print();
    // In a pipe nobody would look at it.
    if std::io::stdout().is_terminal() {
        print_map(region);
    }
    if most > 0 {
        print_ranges(region, most, is_disk);
    }
    if region.ranges.len() > most {
        outln!(
            "  and {} more: --ranges all prints them, --heatmap draws them",
            output::counted((region.ranges.len() - most) as u64, "range")
        );
    }
}

/// Prints the region on one line: the higher the bar, the more of that part has changed.
fn print_map(region: &RegionDiff) {
    let pages = region.pages_a.max(region.pages_b).unwrap_or(1).max(1);
    Line::new()
        .text("  0 ")
        .paint(style::FAINT, "[")
        .paint(style::CHANGED, map(&region.ranges, pages))
        .paint(style::FAINT, "]")
        .text(format!(" {}", output::bytes(pages.saturating_mul(PAGE_SIZE as u64))))
        .print();
}

fn map(ranges: &[PageRange], pages: u64) -> String {
    const HEIGHTS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let columns = MAP_COLUMNS.min(pages);
    let start =
        |column: u64| (u128::from(column) * u128::from(pages)).div_ceil(columns.into()) as u64;
    let mut changed = vec![0_u64; columns as usize];
    for range in ranges {
        let end = range.first.saturating_add(range.count).min(pages);
        let mut at = range.first;
        while at < end {
            let column = (u128::from(at) * u128::from(columns) / u128::from(pages)) as u64;
            let next = start(column + 1).min(end);
            changed[column as usize] += next - at;
            at = next;
        }
    }
    let symbol = |(column, changed): (u64, u64)| {
        let all = start(column + 1) - start(column);
        match changed {
            0 => ' ',
            // A logarithmic scale shows one page of thousands, and still tells half from all.
            some => {
                let share = ((some + 1) as f64).log2() / ((all + 1) as f64).log2();
                HEIGHTS[((share * 8.0).ceil() as usize).clamp(1, 8) - 1]
            }
        }
    };
    (0..columns).zip(changed).map(symbol).collect()
}

fn print_ranges(region: &RegionDiff, most: usize, is_disk: bool) {
    let mut headers = vec!["  FROM", "TO", "PAGES", "BYTES"];
    if is_disk {
        headers.push("SECTORS");
    }
    let mut table = output::table(&headers, &[2, 3]);
    for range in region.ranges.iter().take(most) {
        let mut row = range_row(*range).to_vec();
        if is_disk {
            row.push(sectors(*range));
        }
        table.add_row(row);
    }
    output::print_table(&table);
}

/// A range in bytes; in guest memory, these are guest-physical addresses.
fn range_row(range: PageRange) -> [String; 4] {
    let start = range.first.saturating_mul(PAGE_SIZE as u64);
    let bytes = range.count.saturating_mul(PAGE_SIZE as u64);
    let last = start.saturating_add(bytes).saturating_sub(1);
    [
        format!("  {start:#014x}"),
        format!("{last:#014x}"),
        output::count(range.count),
        output::bytes(bytes),
    ]
}

/// A range of a disk in sectors, as the guest's tools count: the first and the last.
fn sectors(range: PageRange) -> String {
    let per_page = PAGE_SIZE as u64 / SECTOR_BYTES;
    let first = range.first.saturating_mul(per_page);
    let end = range.first.saturating_add(range.count).saturating_mul(per_page);
    format!("{first}-{}", end.saturating_sub(1))
}

fn print_state(state: &StateDiff) {
    outln!("");
    Line::new().paint(style::HEADING, &state.name).text(format!(": {}", change(state))).print();
    let rows: Vec<[String; 3]> = fields(state).iter().flat_map(rows).collect();
    let longest = rows.iter().map(|[name, ..]| name.chars().count()).max().unwrap_or(0);
    let column = longest.min(NAME_COLUMNS_MAX) + 4;
    for [name, old, new] in rows {
        Line::new()
            .text(format!("  {name}"))
            .pad(column)
            .paint(style::OLD, old)
            .text(" -> ")
            .paint(style::NEW, new)
            .print();
    }
}

/// The rows of a field that differs: one, or one per register if the field keeps registers as
/// bytes.
fn rows(field: &FieldDiff) -> Vec<[String; 3]> {
    if let (Some(old), Some(new)) = (&field.old, &field.new) {
        let registers = registers(&field.path, old, new);
        if !registers.is_empty() {
            let row = |register: super::registers::Register| {
                [format!("{}.{}", field.path, register.name), register.old, register.new]
            };
            return registers.into_iter().map(row).collect();
        }
    }
    let name = match name_of(&field.path) {
        Some(name) => format!("{} ({name})", field.path.trim_end_matches(".value")),
        None => field.path.clone(),
    };
    let [old, new] = brief(field.old.as_ref(), field.new.as_ref());
    vec![[name, old, new]]
}

/// Both values, shortened to fit a line.
fn brief(old: Option<&Value>, new: Option<&Value>) -> [String; 2] {
    if let (Some(Value::String(old)), Some(Value::String(new))) = (old, new)
        && old.len().max(new.len()) > LONGEST_VALUE
    {
        let pairs = |text: &str| text.as_bytes().chunks(2).map(<[u8]>::to_vec).collect::<Vec<_>>();
        let (old, new) = (pairs(old), pairs(new));
        let same = old.iter().zip(&new).filter(|(old, new)| old == new).count();
        let differ = old.len().max(new.len()) - same;
        return [format!("{} bytes", old.len()), format!("{} bytes, {differ} differ", new.len())];
    }
    [old, new].map(|value| match value {
        None => "-".to_owned(),
        Some(Value::Array(items)) if value.map(plain).unwrap_or_default().len() > LONGEST_VALUE => {
            format!("{} items", items.len())
        }
        Some(value) => shorten(plain(value)),
    })
}

fn shorten(text: String) -> String {
    if text.chars().count() <= LONGEST_VALUE {
        return text;
    }
    text.chars().take(LONGEST_VALUE).chain(['…']).collect()
}

/// The registers of the fields that keep them as bytes, for `--json`: by path, then by name.
pub(super) fn named_registers(
    fields: &[FieldDiff],
) -> BTreeMap<String, BTreeMap<String, [String; 2]>> {
    let mut out = BTreeMap::new();
    for field in fields {
        if let (Some(old), Some(new)) = (&field.old, &field.new) {
            let found = registers(&field.path, old, new);
            if !found.is_empty() {
                let by_name = found.into_iter().map(|found| (found.name, [found.old, found.new]));
                out.insert(field.path.clone(), by_name.collect());
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn long_values_are_counted() {
        let bytes = |last: &str| Value::from("00".repeat(100) + last);
        assert_eq!(
            brief(Some(&bytes("01")), Some(&bytes("02"))),
            ["101 bytes".to_owned(), "101 bytes, 1 differ".to_owned()]
        );
        assert_eq!(brief(None, Some(&json!(7))), ["-".to_owned(), "7".to_owned()]);
        let [old, new] = brief(Some(&json!(vec![1000; 100])), Some(&json!("é".repeat(61))));
        assert_eq!((old.as_str(), new.chars().count()), ("100 items", 61));
    }

    #[test]
    fn ranges_are_bytes_with_the_last_one_in() {
        let row = range_row(PageRange { first: 0x100, count: 2 });
        assert_eq!(row[..2], ["  0x000000100000".to_owned(), "0x000000101fff".to_owned()]);
        assert_eq!(sectors(PageRange { first: 1, count: 2 }), "8-23");
        let huge = PageRange { first: u64::MAX, count: u64::MAX };
        let _no_overflow = (range_row(huge), sectors(huge), map(&[huge], 100));
    }

    #[test]
    fn maps_show_a_page_of_many_and_where_it_is() {
        let range = |first, count| PageRange { first, count };
        let drawn = map(&[range(0, 1), range(1 << 19, 1 << 14)], 1 << 20);
        assert_eq!(drawn.chars().count(), 64);
        assert_eq!((drawn.chars().next(), drawn.chars().nth(32)), (Some('▁'), Some('█')));
        assert_eq!(drawn.chars().filter(|c| *c == ' ').count(), 62);
        assert_eq!(map(&[range(2, 1)], 3), "  █");
    }

    #[test]
    fn fields_are_told_by_the_names_of_registers() {
        let field = |path: &str, old: Value, new: Value| FieldDiff {
            path: path.into(),
            old: Some(old),
            new: Some(new),
        };
        let msr = field("msrs[0x10].value", json!("0x1"), json!("0x2"));
        assert_eq!(rows(&msr), [["msrs[0x10] (IA32_TIME_STAMP_COUNTER)", "0x1", "0x2"]]);
        let (old, new) = ("00".repeat(1024), "00".repeat(0x80) + "10" + &"00".repeat(1024 - 0x81));
        let lapic = field("lapic", json!(old), json!(new));
        assert_eq!(rows(&lapic), [["lapic.tpr", "0x0", "0x10"]]);
        let named = named_registers(&[msr, lapic]);
        assert_eq!(json!(named), json!({"lapic": {"tpr": ["0x0", "0x10"]}}));
    }
}
