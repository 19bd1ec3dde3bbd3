//! `frazil show`: what a snapshot holds.

use std::fmt::Write;

use frazil_snapstore::{
    DiffOptions, PAGE_SIZE, RegionManifest, Snapshot, SnapshotId, StateChunk, diff_region,
};
use serde_json::{Value, json};

use super::{open_snapshot, print_json};
use crate::cli::ShowArgs;
use crate::heatmap::{self, Drawn, Wanted};
use crate::output::{self, Line, style};

pub(crate) fn show(args: &ShowArgs, json: bool) -> anyhow::Result<()> {
    let (_, snapshot) = open_snapshot(&args.snapshot)?;
    let manifest = snapshot.manifest();
    let states = snapshot.states()?;
    // As in `log`: if the snapshot's parent was forgotten, its nearest ancestor that was not.
    let parent = snapshot.store().resolve(&snapshot.id().to_string())?.parent;
    let drawn = draw(args, &snapshot, parent)?;
    let tags: Vec<String> = snapshot
        .store()
        .tags()
        .into_iter()
        .filter(|(_, id)| *id == snapshot.id())
        .map(|(tag, _)| tag)
        .collect();
    if json {
        let regions: Vec<Value> = manifest
            .regions
            .iter()
            .map(|region| {
                let Sums { contents_pages, changed_pages } = sums(&snapshot, parent, region);
                json!({
                    "name": region.name, "pages": region.pages, "root": region.root,
                    "contents_pages": contents_pages, "changed_pages": changed_pages,
                })
            })
            .collect();
        let state: Vec<Value> = states
            .iter()
            .map(|chunk| json!({"name": chunk.name, "kind": chunk.kind, "version": chunk.version, "body": chunk.body}))
            .collect();
        return print_json(&json!({
            "id": snapshot.id(), "parent": parent, "time_unix_ms": manifest.time_unix_ms,
            "vm": manifest.name, "message": manifest.message, "tags": tags,
            "regions": regions, "state": state, "stats": manifest.stats, "heatmap": drawn,
        }));
    }
    let label = |label: &str| Line::new().paint(style::FAINT, label).pad(10);
    label("snapshot").paint(style::ID, snapshot.id().to_string()).print();
    label("parent").text(parent.map_or_else(|| "none".into(), |parent| parent.to_string())).print();
    label("time").text(output::time(manifest.time_unix_ms)).print();
    label("vm").paint(style::NAME, &manifest.name).print();
    if !manifest.message.is_empty() {
        label("message").text(&manifest.message).print();
    }
    if !tags.is_empty() {
        label("tags").paint(style::CHANGED, tags.join(", ")).print();
    }
    show_regions(&snapshot, parent);
    show_stats(&manifest.stats);
    states.iter().for_each(show_chunk);
    if let Some(drawn) = drawn {
        drawn.print_location();
    }
    Ok(())
}

/// Draws the snapshot, if a picture is wanted.
fn draw(
    args: &ShowArgs,
    snapshot: &Snapshot,
    parent: Option<SnapshotId>,
) -> anyhow::Result<Option<Drawn>> {
    let Some(wanted) = Wanted::of(&args.picture)? else { return Ok(None) };
    let parent = parent.map(|parent| snapshot.store().snapshot(parent)).transpose()?;
    heatmap::draw_snapshot(&wanted, snapshot, parent.as_ref()).map(Some)
}

/// Figures from a region's tree; None for what cannot be read.
struct Sums {
    contents_pages: Option<u64>,
    /// Pages changed since the parent; None without one.
    changed_pages: Option<u64>,
}

fn sums(snapshot: &Snapshot, parent: Option<SnapshotId>, region: &RegionManifest) -> Sums {
    let contents = snapshot.region(&region.name).and_then(|region| region.contents_pages());
    let changed = parent.and_then(|parent| {
        let parent = snapshot.store().snapshot(parent).ok()?;
        let options = DiffOptions::default();
        Some(diff_region(&parent, snapshot, &region.name, options).ok()?.changed_pages)
    });
    Sums { contents_pages: contents.ok(), changed_pages: changed }
}

fn show_regions(snapshot: &Snapshot, parent: Option<SnapshotId>) {
    outln!("");
    let store = snapshot.store().describe();
    Line::new().paint(style::HEADING, "regions").text(format!(" in {store}")).print();
    for region in &snapshot.manifest().regions {
        let size = |pages: u64| output::bytes(pages.saturating_mul(PAGE_SIZE as u64));
        let line = Line::new().text("  ").paint(style::NAME, &region.name).pad(12);
        let Some(root) = region.root else {
            line.text(format!("{}, all zero", size(region.pages))).print();
            continue;
        };
        let Sums { contents_pages, changed_pages } = sums(snapshot, parent, region);
        let contents = contents_pages
            .map_or_else(|| "damaged".to_owned(), |pages| format!("{} not zero", size(pages)));
        let changed = changed_pages.map_or_else(String::new, |pages| {
            format!(", {} changed since the parent", size(pages))
        });
        line.text(format!("{}, {contents}{changed}", size(region.pages)))
            .paint(style::FAINT, format!("  root {}", root.hash.short()))
            .print();
    }
}

fn show_stats(stats: &Value) {
    let Some(stats) = stats.as_object() else { return };
    outln!("");
    let imported = stats.get("imported").is_some();
    Line::new().paint(style::HEADING, if imported { "import" } else { "checkpoint" }).print();
    for (name, value) in stats {
        let text = match (name.rsplit('_').next(), value.as_u64()) {
            (Some("us"), Some(us)) => output::micros(us),
            (Some("bytes"), Some(bytes)) => output::bytes(bytes),
            (_, Some(count)) => output::count(count),
            (_, None) => value.to_string(),
        };
        outln!(
            "  {:<16} {text}",
            name.trim_end_matches("_us").trim_end_matches("_bytes").replace('_', " ")
        );
    }
}

/// Longer values than this are only in the `--json` output.
const LONGEST_VALUE: usize = 100;

fn show_chunk(chunk: &StateChunk) {
    outln!("");
    Line::new()
        .paint(style::HEADING, &chunk.name)
        .paint(style::FAINT, format!(" ({} version {})", chunk.kind, chunk.version))
        .print();
    show_value(&chunk.body, "  ");
}

fn show_value(value: &Value, indent: &str) {
    let Some(fields) = value.as_object() else { return };
    for (name, value) in fields {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        match value {
            Value::Object(inner)
                if inner.values().all(|value| !value.is_object()) && text.len() > LONGEST_VALUE =>
            {
                outln!("{indent}{name}");
                show_fields(inner, &format!("{indent}  "));
            }
            Value::Object(_) if text.len() > LONGEST_VALUE => {
                outln!("{indent}{name}");
                show_value(value, &format!("{indent}  "));
            }
            Value::Array(items) if text.len() > LONGEST_VALUE => {
                outln!("{indent}{name}: {} items", items.len());
            }
            Value::String(digits) if digits.len() > LONGEST_VALUE => {
                outln!("{indent}{name}: {} bytes", digits.len() / 2);
            }
            _ => outln!("{indent}{name}: {text}"),
        }
    }
}

/// Prints registers and other fields, as many to a line as fit; longer ones have a line of their
/// own.
fn show_fields(fields: &serde_json::Map<String, Value>, indent: &str) {
    lines_of(fields).iter().for_each(|line| outln!("{indent}{line}"));
}

/// Columns of a name and its value, with at least two blanks after them.
const FIELD_COLUMNS: usize = 28;
/// Columns of a name, unless it is longer.
const NAME_COLUMNS: usize = 6;
/// Fields to a line.
const FIELDS_PER_LINE: usize = 4;

fn lines_of(fields: &serde_json::Map<String, Value>) -> Vec<String> {
    let (mut lines, mut line, mut on_line) = (Vec::new(), String::new(), 0);
    let mut end = |line: &mut String, on_line: &mut usize| {
        if *on_line > 0 {
            lines.push(std::mem::take(line).trim_end().to_owned());
            *on_line = 0;
        }
    };
    for (name, value) in fields {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let text = format!("{name:<NAME_COLUMNS$} {value}");
        let is_long = text.chars().count() + 2 > FIELD_COLUMNS;
        if is_long {
            end(&mut line, &mut on_line);
        }
        let _to_memory = write!(line, "{text:<FIELD_COLUMNS$}");
        on_line += 1;
        if is_long || on_line == FIELDS_PER_LINE {
            end(&mut line, &mut on_line);
        }
    }
    end(&mut line, &mut on_line);
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values_stand_apart_and_long_ones_alone() {
        let fields = serde_json::json!({
            "r8": "0x0123456789abcdef", "r9": "0x0", "rflags": "0x2", "rip": "0x1", "rsp": "0x8",
            "cmdline": "console=ttyS0 reboot=k panic=1 quiet", "initrd": "/inner.cpio",
            "error_code": 0,
        });
        let lines = lines_of(fields.as_object().unwrap());
        let all = lines.join("\n");
        for (name, value) in fields.as_object().unwrap() {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let at = all.find(&format!("{name} ")).unwrap_or_else(|| panic!("{name} in\n{all}"));
            let rest = all[at + name.len()..].trim_start_matches(' ');
            assert!(rest.starts_with(&value), "{name}:\n{all}");
            let after = &rest[value.len()..];
            assert!(
                after.is_empty() || after.starts_with('\n') || after.starts_with("  "),
                "{all}"
            );
        }
        let alone = "cmdline console=ttyS0 reboot=k panic=1 quiet";
        assert!(lines.iter().any(|line| line == alone), "{all}");
        assert!(lines.len() < 6, "short ones share lines:\n{all}");
    }
}
