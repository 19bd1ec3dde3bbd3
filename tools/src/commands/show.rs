//! `frazil show`: what a snapshot is.

use std::fmt::Write;

use frazil_snapstore::{Manifest, StateChunk, Store};
use serde_json::{Value, json};

use super::{open_snapshot, print_json};
use crate::cli::ShowArgs;
use crate::output;

pub(crate) fn show(args: &ShowArgs, json: bool) -> anyhow::Result<()> {
    let (_, snapshot) = open_snapshot(&args.snapshot)?;
    let manifest = snapshot.manifest();
    let states = snapshot.states()?;
    // As `log` has it: if the one it was taken on was forgotten, the nearest ancestor that was not.
    let parent = snapshot.store().resolve(&snapshot.id().to_string())?.parent;
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
            .map(|region| json!({"name": region.name, "pages": region.pages, "root": region.root}))
            .collect();
        let state: Vec<Value> = states
            .iter()
            .map(|chunk| json!({"name": chunk.name, "kind": chunk.kind, "version": chunk.version, "body": chunk.body}))
            .collect();
        return print_json(&json!({
            "id": snapshot.id(), "parent": parent, "time_unix_ms": manifest.time_unix_ms,
            "vm": manifest.name, "message": manifest.message, "tags": tags,
            "regions": regions, "state": state, "stats": manifest.stats,
        }));
    }
    outln!("snapshot  {}", snapshot.id());
    outln!("parent    {}", parent.map_or_else(|| "none".into(), |parent| parent.to_string()));
    outln!("time      {}", output::time(manifest.time_unix_ms));
    outln!("vm        {}", manifest.name);
    if !manifest.message.is_empty() {
        outln!("message   {}", manifest.message);
    }
    if !tags.is_empty() {
        outln!("tags      {}", tags.join(", "));
    }
    show_regions(snapshot.store(), manifest);
    show_stats(&manifest.stats);
    states.iter().for_each(show_chunk);
    Ok(())
}

fn show_regions(store: &Store, manifest: &Manifest) {
    outln!("\nregions in {}", store.describe());
    for region in &manifest.regions {
        let root = region
            .root
            .map_or_else(|| "all zero".to_owned(), |root| format!("root {}", root.hash.short()));
        outln!("  {:<8} {} pages, {root}", region.name, output::count(region.pages));
    }
}

fn show_stats(stats: &Value) {
    let Some(stats) = stats.as_object() else { return };
    outln!("\ncheckpoint");
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

/// Values of more than a line are for `--json`.
const LONGEST_VALUE: usize = 100;

fn show_chunk(chunk: &StateChunk) {
    outln!("\n{} ({} version {})", chunk.name, chunk.kind, chunk.version);
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

/// Registers, as many to a line as fit; what is longer has a line of its own.
fn show_fields(fields: &serde_json::Map<String, Value>, indent: &str) {
    lines_of(fields).iter().for_each(|line| outln!("{indent}{line}"));
}

/// Columns of a name and its value; two blanks at least are between two of them.
const FIELD_COLUMNS: usize = 28;
/// Columns of a name, if it is no longer.
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
