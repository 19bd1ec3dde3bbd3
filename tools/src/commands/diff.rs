//! `frazil diff`: what differs between two snapshots of a store.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use frazil_snapstore::{
    DiffOptions, PAGE_SIZE, PageRange, RegionDiff, Snapshot, StateChunk, StateDiff, reference,
};
use serde::Serialize;
use serde_json::{Value, json};

use super::{open_snapshot, print_json, same_folder, tags_by_snapshot, what};
use crate::cli::DiffArgs;
use crate::output;

/// Values of more than this are for `--json`.
const LONGEST_VALUE: usize = 60;

/// A field of a state chunk that differs.
#[derive(Debug, PartialEq, Serialize)]
struct FieldDiff {
    /// `regs.rip`, `msrs[0x10].value`.
    path: String,
    /// None: A does not have it.
    #[serde(skip_serializing_if = "Option::is_none")]
    old: Option<Value>,
    /// None: B does not have it.
    #[serde(skip_serializing_if = "Option::is_none")]
    new: Option<Value>,
}

pub(crate) fn diff(args: &DiffArgs, json: bool) -> anyhow::Result<()> {
    let (a, b) = open_both(&args.a, &args.b)?;
    let found = frazil_snapstore::diff(&a, &b, DiffOptions { exact: args.exact })?;
    if json {
        let regions: Vec<Value> = found.regions.iter().map(region_json).collect();
        let state: Vec<Value> = found.state.iter().map(state_json).collect();
        return print_json(&json!({
            "a": a.id(), "b": b.id(), "exact": args.exact, "regions": regions, "state": state,
        }));
    }
    print_header("A", &a);
    print_header("B", &b);
    found.regions.iter().for_each(|region| print_region(region, args.ranges));
    found.state.iter().for_each(print_state);
    if found.state.is_empty() {
        outln!("\nno state differs");
    }
    Ok(())
}

fn open_both(a: &str, b: &str) -> anyhow::Result<(Snapshot, Snapshot)> {
    let (path, first) = open_snapshot(a)?;
    let (other, reference) = reference::split(b);
    if let Some(other) = other.map(Path::new).filter(|other| !same_folder(other, &path)) {
        anyhow::bail!(
            "expected two snapshots of one store, found one of {} and one of {}: only in one \
             store can it be told what they share",
            path.display(),
            other.display()
        );
    }
    let store = Arc::clone(first.store());
    let second = store.snapshot(store.resolve(reference)?.id)?;
    Ok((first, second))
}

fn region_json(region: &RegionDiff) -> Value {
    let ranges: Vec<[u64; 2]> =
        region.ranges.iter().map(|range| [range.first, range.count]).collect();
    json!({
        "name": region.name, "pages_a": region.pages_a, "pages_b": region.pages_b,
        "changed_pages": region.changed_pages, "changed_bytes": changed_bytes(region),
        "stored_bytes": region.stored_bytes, "ranges": ranges,
    })
}

fn changed_bytes(region: &RegionDiff) -> u64 {
    region.changed_pages.saturating_mul(PAGE_SIZE as u64)
}

fn state_json(state: &StateDiff) -> Value {
    json!({"name": state.name, "change": change(state), "fields": fields(state)})
}

fn change(state: &StateDiff) -> &'static str {
    match (&state.a, &state.b) {
        (None, _) => "added",
        (_, None) => "removed",
        _ => "changed",
    }
}

/// The fields that differ; of a chunk that only one has, none.
fn fields(state: &StateDiff) -> Vec<FieldDiff> {
    let mut out = Vec::new();
    if let (Some(a), Some(b)) = (&state.a, &state.b) {
        let envelope = |chunk: &StateChunk| [Value::from(&*chunk.kind), chunk.version.into()];
        for ((name, old), new) in ["$kind", "$version"].iter().zip(envelope(a)).zip(envelope(b)) {
            compare(name, Some(&old), Some(&new), &mut out);
        }
        compare("", Some(&a.body), Some(&b.body), &mut out);
    }
    out
}

fn compare(path: &str, old: Option<&Value>, new: Option<&Value>, out: &mut Vec<FieldDiff>) {
    match (old.map(parts), new.map(parts)) {
        _ if old == new => {}
        (Some(Some(old)), Some(Some(new))) => {
            let names: BTreeSet<&Part<'_>> = old.keys().chain(new.keys()).collect();
            for name in names {
                let path = match name {
                    Part::Field(name) if path.is_empty() => (*name).to_owned(),
                    Part::Field(name) => format!("{path}.{name}"),
                    Part::Item(index) => format!("{path}[{index}]"),
                    Part::Keyed(key) => format!("{path}[{key}]"),
                };
                compare(&path, old.get(name).copied(), new.get(name).copied(), out);
            }
        }
        _ => out.push(FieldDiff { path: path.to_owned(), old: old.cloned(), new: new.cloned() }),
    }
}

/// What a part of a value is called.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part<'a> {
    Field(&'a str),
    Item(usize),
    /// An item that says its number: model-specific registers do.
    Keyed(String),
}

/// The named parts of an object or a list; none of anything else.
fn parts(value: &Value) -> Option<BTreeMap<Part<'_>, &Value>> {
    match value {
        Value::Object(fields) => {
            Some(fields.iter().map(|(name, value)| (Part::Field(name), value)).collect())
        }
        Value::Array(items) => {
            let keyed: BTreeMap<Part<'_>, &Value> = items
                .iter()
                .filter_map(|item| Some((Part::Keyed(plain(item.get("index")?)), item)))
                .collect();
            // Keys are of use if every item has one of its own.
            if keyed.len() == items.len() {
                return Some(keyed);
            }
            Some(items.iter().enumerate().map(|(index, item)| (Part::Item(index), item)).collect())
        }
        _ => None,
    }
}

/// A string without quotes, anything else as JSON.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn print_header(side: &str, snapshot: &Snapshot) {
    let manifest = snapshot.manifest();
    let tags = tags_by_snapshot(snapshot.store()).remove(&snapshot.id()).unwrap_or_default();
    let line = format!(
        "{side}  {}  {}  {}  {}",
        snapshot.id().short(),
        output::time(manifest.time_unix_ms),
        manifest.name,
        what(&tags, &manifest.message)
    );
    outln!("{}", line.trim_end());
}

fn print_region(region: &RegionDiff, most: usize) {
    let name = &region.name;
    let of = match (region.pages_a, region.pages_b) {
        (Some(a), Some(b)) if a != b => {
            format!("{} pages in A, {} in B", output::count(a), output::count(b))
        }
        (Some(pages), Some(_)) => format!("{} pages", output::count(pages)),
        (Some(pages), None) => format!("{} pages, only in A", output::count(pages)),
        (None, pages) => format!("{} pages, only in B", output::count(pages.unwrap_or(0))),
    };
    if region.changed_pages == 0 {
        outln!("\n{name} ({of}): the same");
        return;
    }
    outln!(
        "\n{name} ({of}): {} pages differ, {}, in {} ranges; {} of frames in B",
        output::count(region.changed_pages),
        output::bytes(changed_bytes(region)),
        output::count(region.ranges.len() as u64),
        output::bytes(region.stored_bytes)
    );
    let mut table = output::table(&["  FROM", "TO", "PAGES", "BYTES"], &[2, 3]);
    for range in region.ranges.iter().take(most) {
        table.add_row(range_row(*range));
    }
    if most > 0 {
        output::print_table(&table);
    }
    if region.ranges.len() > most {
        outln!(
            "  and {} ranges more: --ranges all prints them",
            output::count((region.ranges.len() - most) as u64)
        );
    }
}

/// A range in bytes: guest-physical addresses, where the region is guest memory.
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

fn print_state(state: &StateDiff) {
    outln!("\n{}: {}", state.name, change(state));
    let mut table = output::table(&["  FIELD", "A", "B"], &[]);
    let fields = fields(state);
    for field in &fields {
        let [old, new] = brief(field.old.as_ref(), field.new.as_ref());
        table.add_row([format!("  {}", field.path), old, new]);
    }
    if !fields.is_empty() {
        output::print_table(&table);
    }
}

/// Both values, so short that they fit a line.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn diff_of(old: &Value, new: &Value) -> Vec<(String, Option<Value>, Option<Value>)> {
        let mut out = Vec::new();
        compare("", Some(old), Some(new), &mut out);
        out.into_iter().map(|field| (field.path, field.old, field.new)).collect()
    }

    #[test]
    fn fields_are_named_by_their_path() {
        let old = json!({"regs": {"rip": "0x1", "rax": "0x0"}, "gone": null, "same": [1, 2]});
        let new = json!({"regs": {"rip": "0x2", "rax": "0x0"}, "added": true, "same": [1, 2]});
        assert_eq!(
            diff_of(&old, &new),
            [
                ("added".into(), None, Some(json!(true))),
                ("gone".into(), Some(Value::Null), None),
                ("regs.rip".into(), Some(json!("0x1")), Some(json!("0x2"))),
            ]
        );
    }

    #[test]
    fn items_are_named_by_what_they_say_or_by_their_place() {
        let msr = |index: &str, value: u8| json!({"index": index, "value": value});
        let old = json!({"msrs": [msr("0x10", 1), msr("0x1b", 2)], "db": [0, 1]});
        let new =
            json!({"msrs": [msr("0x1b", 2), msr("0x10", 3), msr("0x20", 4)], "db": [0, 2, 3]});
        assert_eq!(
            diff_of(&old, &new),
            [
                ("db[1]".into(), Some(json!(1)), Some(json!(2))),
                ("db[2]".into(), None, Some(json!(3))),
                ("msrs[0x10].value".into(), Some(json!(1)), Some(json!(3))),
                ("msrs[0x20]".into(), None, Some(msr("0x20", 4))),
            ]
        );
        // Two of one number: only their places tell them apart.
        let twice = json!([msr("1", 1), msr("1", 2)]);
        let other = json!([msr("1", 1), msr("1", 3)]);
        assert_eq!(diff_of(&twice, &other), [("[1].value".into(), Some(json!(2)), Some(json!(3)))]);
        assert_eq!(diff_of(&json!([]), &json!([5])), [("[0]".into(), None, Some(json!(5)))]);
        assert_eq!(
            diff_of(&json!(1), &json!({})),
            [(String::new(), Some(json!(1)), Some(json!({})))]
        );
    }

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
        let _no_overflow = range_row(PageRange { first: u64::MAX, count: u64::MAX });
    }
}
