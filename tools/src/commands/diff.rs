//! `frazil diff`: what differs between two snapshots of a store.

mod print;
mod registers;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use frazil_snapstore::{
    DiffOptions, PAGE_SIZE, RegionDiff, Snapshot, StateChunk, StateDiff, reference,
};
use serde::Serialize;
use serde_json::{Value, json};

use super::{open_snapshot, print_json, same_folder};
use crate::cli::DiffArgs;
use crate::heatmap::{self, Wanted};

/// A field of a state chunk that differs.
#[derive(Debug, PartialEq, Serialize)]
struct FieldDiff {
    /// For example `regs.rip` or `msrs[0x10].value`.
    path: String,
    /// None if A does not have the field.
    #[serde(skip_serializing_if = "Option::is_none")]
    old: Option<Value>,
    /// None if B does not have the field.
    #[serde(skip_serializing_if = "Option::is_none")]
    new: Option<Value>,
}

pub(crate) fn diff(args: &DiffArgs, json: bool) -> anyhow::Result<()> {
    let (a, b) = open_both(&args.a, &args.b)?;
    let options = DiffOptions { exact: args.exact };
    let found = frazil_snapstore::diff(&a, &b, options)?;
    let wanted = Wanted::of(&args.picture)?;
    let drawn = wanted.map(|wanted| heatmap::draw_diff(&wanted, &a, &b, options)).transpose()?;
    if json {
        let regions: Vec<Value> = found.regions.iter().map(region_json).collect();
        let state: Vec<Value> = found.state.iter().map(state_json).collect();
        return print_json(&json!({
            "a": a.id(), "b": b.id(), "exact": args.exact, "regions": regions, "state": state,
            "heatmap": drawn,
        }));
    }
    print::print(&a, &b, &found, args.ranges);
    if let Some(drawn) = drawn {
        drawn.print_location();
    }
    Ok(())
}

fn open_both(a: &str, b: &str) -> anyhow::Result<(Snapshot, Snapshot)> {
    let (path, first) = open_snapshot(a)?;
    let (other, reference) = reference::split(b);
    if let Some(other) = other.map(Path::new).filter(|other| !same_folder(other, &path)) {
        anyhow::bail!(
            "expected two snapshots of the same store, found one of {} and one of {}: what they \
             share is known only within a store",
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
    let fields = fields(state);
    let registers = print::named_registers(&fields);
    json!({
        "name": state.name, "change": change(state), "fields": fields, "registers": registers,
    })
}

fn change(state: &StateDiff) -> &'static str {
    match (&state.a, &state.b) {
        (None, _) => "added",
        (_, None) => "removed",
        _ => "changed",
    }
}

/// The fields that differ; none for a chunk that only one of the snapshots has.
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
            let names: BTreeSet<&PartName<'_>> = old.keys().chain(new.keys()).collect();
            for name in names {
                let path = match name {
                    PartName::Field(name) if path.is_empty() => (*name).to_owned(),
                    PartName::Field(name) => format!("{path}.{name}"),
                    PartName::Item(index) => format!("{path}[{index}]"),
                    PartName::Keyed(key) => format!("{path}[{key}]"),
                };
                compare(&path, old.get(name).copied(), new.get(name).copied(), out);
            }
        }
        _ => out.push(FieldDiff { path: path.to_owned(), old: old.cloned(), new: new.cloned() }),
    }
}

/// The name of a part of a value.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum PartName<'a> {
    Field(&'a str),
    Item(usize),
    /// An item that has a number of its own, as model-specific registers do.
    Keyed(String),
}

/// The parts of an object or a list by name; None for any other value.
fn parts(value: &Value) -> Option<BTreeMap<PartName<'_>, &Value>> {
    match value {
        Value::Object(fields) => {
            Some(fields.iter().map(|(name, value)| (PartName::Field(name), value)).collect())
        }
        Value::Array(items) => {
            let keyed: BTreeMap<PartName<'_>, &Value> = items
                .iter()
                .filter_map(|item| Some((PartName::Keyed(plain(item.get("index")?)), item)))
                .collect();
            // Keys are only of use if each item has a different one.
            if keyed.len() == items.len() {
                return Some(keyed);
            }
            Some(
                items
                    .iter()
                    .enumerate()
                    .map(|(index, item)| (PartName::Item(index), item))
                    .collect(),
            )
        }
        _ => None,
    }
}

/// A string without its quotes; anything else as JSON.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
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
        // Two items with the same number: only their places tell them apart.
        let twice = json!([msr("1", 1), msr("1", 2)]);
        let other = json!([msr("1", 1), msr("1", 3)]);
        assert_eq!(diff_of(&twice, &other), [("[1].value".into(), Some(json!(2)), Some(json!(3)))]);
        assert_eq!(diff_of(&json!([]), &json!([5])), [("[0]".into(), None, Some(json!(5)))]);
        assert_eq!(
            diff_of(&json!(1), &json!({})),
            [(String::new(), Some(json!(1)), Some(json!({})))]
        );
    }
}
