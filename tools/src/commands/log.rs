//! `frazil log`: a store's snapshots, as a table or as a graph.

use std::sync::Arc;

use frazil_snapstore::{Manifest, SnapshotId, SnapshotInfo, Store};
use frazil_vmm::stored_bytes;
use serde_json::{Value, json};

use super::graph::{self, Graph};
use super::{open_store, print_json, tags_by_snapshot, what};
use crate::cli::LogArgs;
use crate::output;

pub(crate) fn log(args: &LogArgs, json: bool) -> anyhow::Result<()> {
    let store = open_store(args.store.as_deref())?;
    let mut tags = tags_by_snapshot(&store);
    let mut tags_of = |id: SnapshotId| tags.remove(&id).unwrap_or_default();
    let limit = args.max_count.unwrap_or(usize::MAX);
    let newest_first: Vec<SnapshotInfo> = store.snapshots().into_iter().rev().collect();
    if json {
        for info in newest_first.iter().take(limit) {
            print_json(&json_line(info, manifest(&store, info), &tags_of(info.id)))?;
        }
    } else if args.graph {
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
    Ok(())
}

/// A snapshot's manifest, or what is wrong with it.
fn manifest(store: &Arc<Store>, info: &SnapshotInfo) -> Result<Manifest, String> {
    let snapshot = store.snapshot(info.id).map_err(|error| error.to_string())?;
    Ok(snapshot.manifest().clone())
}

fn figure(manifest: &Manifest, name: &str) -> u64 {
    manifest.stats[name].as_u64().unwrap_or(0)
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
            output::micros(figure(&manifest, "pause_us")),
            manifest.name.clone(),
            what(tags, &manifest.message),
        ],
        Err(error) => {
            let none = String::new;
            [id, time, parent, none(), none(), none(), none(), error]
        }
    }
}

/// Prints each line as soon as it is known: a long history starts at once.
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
        outln!("{line}{}", graph_line(info, manifest(store, info), &tags_of(info.id)));
        below.iter().for_each(|line| outln!("{}", line.trim_end()));
    }
}

/// One line, whatever the message is. Figures are padded, so that they stand below each other as
/// long as the graph keeps its width.
fn graph_line(info: &SnapshotInfo, manifest: Result<Manifest, String>, tags: &[String]) -> String {
    let id = info.id.short();
    let tags = if tags.is_empty() { String::new() } else { format!(" ({})", tags.join(", ")) };
    let time = output::time(info.time_unix_ms);
    let line = match manifest {
        Ok(manifest) => format!(
            "{id}{tags}  {time}  {:>9} pages  {:>10}  {:>8}  {}  {}",
            output::count(figure(&manifest, "dirty_pages")),
            output::bytes(stored_bytes(info, &manifest)),
            output::micros(figure(&manifest, "pause_us")),
            manifest.name,
            manifest.message.lines().next().unwrap_or_default(),
        ),
        Err(error) => format!("{id}{tags}  {time}  {error}"),
    };
    line.trim_end().to_owned()
}
