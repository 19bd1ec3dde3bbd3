//! `frazil log`: a store's snapshots, as a table or as a graph.

use std::path::Path;
use std::sync::Arc;

use frazil_snapstore::{Manifest, SnapshotId, SnapshotInfo, Store, StoreOptions};
use frazil_vmm::stored_bytes;
use serde_json::{Value, json};

use super::graph::{self, Graph};
use super::{find_snapshot, open_store, print_json, tags_and_message, tags_by_snapshot};
use crate::cli::LogArgs;
use crate::heatmap::{self, Drawn, Wanted};
use crate::output::{self, Line, style};

pub(crate) fn log(args: &LogArgs, json: bool) -> anyhow::Result<()> {
    let (store, of) = open(args.target.as_deref())?;
    let mut tags = tags_by_snapshot(&store);
    let mut tags_of = |id: SnapshotId| tags.remove(&id).unwrap_or_default();
    let limit = args.max_count.unwrap_or(usize::MAX);
    let mut newest_first: Vec<SnapshotInfo> = store.snapshots().into_iter().rev().collect();
    if let Some(of) = of {
        newest_first = line_of(&newest_first, of);
    }
    let drawn = draw(args, &store, &newest_first, limit)?;
    if json {
        for info in newest_first.iter().take(limit) {
            print_json(&json_line(info, manifest(&store, info), &tags_of(info.id)))?;
        }
        if let Some(drawn) = drawn {
            print_json(&json!({"heatmap": drawn}))?;
        }
        return Ok(());
    }
    if args.graph {
        print_graph(&store, &newest_first, limit, tags_of);
    } else {
        let mut table = output::table(
            &["SNAPSHOT", "TIME", "PARENT", "PAGES", "BYTES", "PAUSE", "VM", "WHAT"],
            &[3, 4, 5],
        );
        for info in newest_first.iter().take(limit) {
            table.add_row(row(info, manifest(&store, info), &tags_of(info.id)));
        }
        output::print_table(&table);
    }
    if let Some(drawn) = drawn {
        drawn.print_location();
    }
    Ok(())
}

/// Opens the store that `target` names. Also returns the snapshot, if it names one.
fn open(target: Option<&str>) -> anyhow::Result<(Arc<Store>, Option<SnapshotId>)> {
    match target {
        // A folder with an `@` in its name is still a folder.
        Some(target) if target.contains('@') && !Path::new(target).is_dir() => {
            let (_, store, id) = find_snapshot(target, StoreOptions::default())?;
            Ok((store, Some(id)))
        }
        target => Ok((open_store(target.map(Path::new))?, None)),
    }
}

/// Snapshot `of` and its ancestors, newest first.
fn line_of(newest_first: &[SnapshotInfo], of: SnapshotId) -> Vec<SnapshotInfo> {
    let mut next = Some(of);
    let mut line = Vec::new();
    // Parents are older than their children.
    for info in newest_first {
        if next == Some(info.id) {
            line.push(*info);
            next = info.parent;
        }
    }
    line
}

/// Draws the history of the snapshot asked for, or of the newest, if a picture is wanted.
fn draw(
    args: &LogArgs,
    store: &Arc<Store>,
    newest_first: &[SnapshotInfo],
    limit: usize,
) -> anyhow::Result<Option<Drawn>> {
    let Some(wanted) = Wanted::of(&args.picture)? else { return Ok(None) };
    let mut line = match newest_first.first() {
        Some(newest) => line_of(newest_first, newest.id),
        None => Vec::new(),
    };
    line.truncate(limit);
    line.reverse();
    heatmap::draw_history(&wanted, store, &line).map(Some)
}

/// A snapshot's manifest, or why it cannot be read.
fn manifest(store: &Arc<Store>, info: &SnapshotInfo) -> Result<Manifest, String> {
    let snapshot = store.snapshot(info.id).map_err(|error| error.to_string())?;
    Ok(snapshot.manifest().clone())
}

fn figure(manifest: &Manifest, name: &str) -> u64 {
    manifest.stats[name].as_u64().unwrap_or(0)
}

/// How long the guest was paused; `-` for an imported snapshot, which had no guest.
fn pause(manifest: &Manifest) -> String {
    manifest.stats["pause_us"].as_u64().map_or_else(|| "-".into(), output::micros)
}

fn json_line(info: &SnapshotInfo, manifest: Result<Manifest, String>, tags: &[String]) -> Value {
    match manifest {
        Ok(manifest) => json!({
            "id": info.id, "parent": info.parent, "time_unix_ms": info.time_unix_ms,
            "vm": manifest.name, "message": manifest.message, "tags": tags,
            "stored_bytes": stored_bytes(info, &manifest), "stats": manifest.stats,
        }),
        Err(error) => json!({"id": info.id, "error": error}),
    }
}

fn row(info: &SnapshotInfo, manifest: Result<Manifest, String>, tags: &[String]) -> [String; 8] {
    let parent = info.parent.map_or_else(|| "-".into(), |parent| parent.short());
    let (id, time) = (info.id.short(), output::time(info.time_unix_ms));
    match manifest {
        Ok(manifest) => [
            id,
            time,
            parent,
            output::count(figure(&manifest, "dirty_pages")),
            output::bytes(stored_bytes(info, &manifest)),
            pause(&manifest),
            manifest.name.clone(),
            tags_and_message(tags, &manifest.message),
        ],
        Err(error) => {
            let none = String::new;
            [id, time, parent, none(), none(), none(), none(), error]
        }
    }
}

/// Prints each line as soon as it is known, so that output of a long history begins at once.
fn print_graph(
    store: &Arc<Store>,
    newest_first: &[SnapshotInfo],
    limit: usize,
    mut tags_of: impl FnMut(SnapshotId) -> Vec<String>,
) {
    let nodes: Vec<_> = newest_first.iter().map(|info| (info.id, info.parent)).collect();
    let mut graph = Graph::new();
    for (index, parent) in graph::order(&nodes).into_iter().take(limit) {
        let info = &newest_first[index];
        let (line, below) = graph.draw(info.id, parent);
        graph_line(&line, info, manifest(store, info), &tags_of(info.id)).print();
        below.iter().for_each(|line| Line::new().paint(style::FAINT, line.trim_end()).print());
    }
}

/// One line, whatever the message holds. Numbers are padded, so that they line up as long as the
/// graph keeps its width.
fn graph_line(
    edges: &str,
    info: &SnapshotInfo,
    manifest: Result<Manifest, String>,
    tags: &[String],
) -> Line {
    let line = edges.chars().fold(Line::new(), |line, c| match c {
        '*' => line.paint(style::NAME, "*"),
        c => line.paint(style::FAINT, c.to_string()),
    });
    let line = line.paint(style::ID, info.id.short());
    let line = match tags {
        [] => line,
        tags => line.text(" ").paint(style::CHANGED, format!("({})", tags.join(", "))),
    };
    let line = line.text(format!("  {}  ", output::time(info.time_unix_ms)));
    match manifest {
        Ok(manifest) => line.text(format!(
            "{:>9} pages  {:>10}  {:>8}  {}  {}",
            output::count(figure(&manifest, "dirty_pages")),
            output::bytes(stored_bytes(info, &manifest)),
            pause(&manifest),
            manifest.name,
            manifest.message.lines().next().unwrap_or_default(),
        )),
        Err(error) => line.paint(style::CHANGED, error),
    }
}
