//! `frazil forget` and `frazil prune`: which snapshots stay, and freeing the space of the others.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context;
use frazil_snapstore::retention::{Candidate, Policy, decide};
use frazil_snapstore::{
    Manifest, PruneOptions, PruneProgress, PruneReport, SnapshotId, SnapshotInfo, Store,
    StoreError, StoreOptions, reference,
};
use jiff::tz::TimeZone;
use serde_json::{Value, json};

use super::{
    default_store, open_store, print_json, same_folder, tags_and_message, tags_by_snapshot,
};
use crate::cli::{ForgetArgs, PruneArgs, usage_error};
use crate::output;

/// How long to wait for another writer: VMs that take checkpoints hold the store for moments.
const WRITER_PATIENCE: Duration = Duration::from_secs(5);

/// A snapshot, and what happens to it.
struct Row {
    info: SnapshotInfo,
    /// None if the snapshot is damaged.
    manifest: Option<Manifest>,
    tags: Vec<String>,
    keep: bool,
    reasons: Vec<&'static str>,
}

pub(crate) fn forget(args: &ForgetArgs, json: bool) -> anyhow::Result<()> {
    let policy = args.keep.policy();
    let (folder, references) = split_targets(args)?;
    check_usage(args, &policy, &references)?;
    let store = open_store(folder)?;
    let mut rows = if policy.is_empty() {
        named(&store, &references, args.untag)?
    } else {
        judged(&store, &policy, args.name.as_deref())?
    };
    let mut ids: Vec<SnapshotId> =
        rows.iter().filter(|row| !row.keep).map(|row| row.info.id).collect();
    if !args.dry_run && !ids.is_empty() {
        if policy.is_empty() {
            patiently(|| store.forget(&ids))?;
        } else {
            // A snapshot may have been tagged since it was judged.
            ids = patiently(|| store.forget_untagged(&ids))?;
            keep_others(&mut rows, &ids);
        }
    }
    let left = store.snapshots().len() - if args.dry_run { ids.len() } else { 0 };
    print_rows(&rows, json)?;
    if !json {
        say_forgotten(&store, ids.len(), left, args);
    }
    // What pruning frees is known only after they are forgotten, so a dry run does not say.
    let pruned = if args.prune && !args.dry_run {
        let started = Instant::now();
        let options = PruneOptions::default();
        let report = prune_with_bar(&store, &options);
        if json && report.is_err() {
            // The snapshots are forgotten even though pruning failed.
            print_json(&json!({
                "forgotten": ids.len(), "left": left, "dry_run": false, "prune": null,
            }))?;
        }
        let report = report.with_context(|| {
            format!("{} snapshots were forgotten, but pruning failed", ids.len())
        })?;
        if !json {
            say_pruned(&store, &report, started.elapsed());
        }
        Some(report)
    } else {
        None
    };
    if json {
        print_json(&json!({
            "forgotten": ids.len(), "left": left, "dry_run": args.dry_run, "prune": pruned,
        }))?;
    }
    Ok(())
}

/// Marks as kept the rows that were to be forgotten but have been tagged meanwhile.
fn keep_others(rows: &mut [Row], forgotten: &[SnapshotId]) {
    for row in rows.iter_mut().filter(|row| !row.keep && !forgotten.contains(&row.info.id)) {
        (row.keep, row.reasons) = (true, vec!["tagged"]);
    }
}

/// The store's folder, if one is named, and the references to snapshots in it.
fn split_targets(args: &ForgetArgs) -> anyhow::Result<(Option<&Path>, Vec<&str>)> {
    let mut folder = args.store.as_deref();
    let mut references = Vec::new();
    for target in &args.targets {
        let (path, reference) = if !target.contains('@') && Path::new(target).is_dir() {
            (Some(target.as_str()), None)
        } else {
            let (path, reference) = reference::split(target);
            (path, Some(reference))
        };
        if let Some(path) = path.map(Path::new) {
            match folder {
                Some(known) if !same_folder(known, path) => anyhow::bail!(
                    "expected snapshots of one store, found {} and {}: forget those of each store \
                     separately",
                    known.display(),
                    path.display()
                ),
                _ => folder = Some(path),
            }
        }
        references.extend(reference);
    }
    Ok((folder, references))
}

fn check_usage(args: &ForgetArgs, policy: &Policy, references: &[&str]) -> Result<(), clap::Error> {
    let wrong = |message: &str| Err(usage_error("forget", message));
    match (references.first(), policy.is_empty()) {
        (None, true) => wrong(
            "expected snapshots to forget (STORE@REF), or rules for what to keep, such as \
             --keep-last 10 --keep-daily 7, found neither: `frazil log` lists the snapshots",
        ),
        (Some(reference), false) => wrong(&format!(
            "expected either snapshots to forget or rules for what to keep, found both; if \
             `{reference}` is meant to be the store: there is no such folder"
        )),
        (Some(_), true) if args.name.is_some() => wrong(
            "--name goes with rules for what to keep, such as --keep-last 10, not with snapshots \
             to forget",
        ),
        (None, false) if args.untag => {
            wrong("--untag goes with snapshots to forget; rules never forget tagged ones")
        }
        _ => Ok(()),
    }
}

/// The store's snapshots, oldest first, all marked as kept.
fn rows(store: &Arc<Store>) -> Vec<Row> {
    let mut tags = tags_by_snapshot(store);
    let row = |info: SnapshotInfo| Row {
        info,
        manifest: store.snapshot(info.id).ok().map(|snapshot| snapshot.manifest().clone()),
        tags: tags.remove(&info.id).unwrap_or_default(),
        keep: true,
        reasons: Vec::new(),
    };
    store.snapshots().into_iter().map(row).collect()
}

/// The snapshots that `references` name, marked as forgotten.
fn named(store: &Arc<Store>, references: &[&str], untag: bool) -> anyhow::Result<Vec<Row>> {
    let mut ids = Vec::new();
    for reference in references {
        ids.push(store.resolve(reference)?.id);
    }
    let mut rows = rows(store);
    rows.retain(|row| ids.contains(&row.info.id));
    for row in &mut rows {
        row.keep = false;
        anyhow::ensure!(
            untag || row.tags.is_empty(),
            "snapshot {} has the tag `{}`, which protects it: give --untag to forget it anyway; \
             nothing was forgotten",
            row.info.id.short(),
            row.tags.join("`, `")
        );
    }
    Ok(rows)
}

/// All snapshots, or those of one VM, judged by `policy`.
fn judged(store: &Arc<Store>, policy: &Policy, name: Option<&str>) -> anyhow::Result<Vec<Row>> {
    let mut rows = rows(store);
    if let Some(name) = name {
        let of_vm = |row: &Row| row.manifest.as_ref().is_some_and(|found| found.name == name);
        anyhow::ensure!(
            rows.iter().any(of_vm),
            "{} has no snapshot of VM `{name}`: `frazil log` lists those it has",
            store.describe()
        );
        rows.retain(of_vm);
    }
    let candidate = |row: &Row| {
        Some(Candidate {
            id: row.info.id,
            time_unix_ms: row.info.time_unix_ms,
            group: row.manifest.as_ref()?.name.clone(),
            tagged: !row.tags.is_empty(),
        })
    };
    let candidates: Vec<Candidate> = rows.iter().filter_map(candidate).collect();
    let mut verdicts = decide(policy, &candidates, &TimeZone::system()).into_iter();
    for row in &mut rows {
        // A damaged snapshot's VM is unknown: a person has to decide.
        let verdict = row.manifest.as_ref().and_then(|_| verdicts.next());
        (row.keep, row.reasons) = verdict
            .map_or_else(|| (true, vec!["damaged"]), |verdict| (verdict.keep, verdict.reasons));
    }
    Ok(rows)
}

fn print_rows(rows: &[Row], json: bool) -> anyhow::Result<()> {
    let mut table = output::table(&["SNAPSHOT", "TIME", "VM", "VERDICT", "WHY", "WHAT"], &[]);
    for row in rows.iter().rev() {
        let Row { info, manifest, tags, keep, reasons } = row;
        if json {
            print_json(&json!({
                "id": info.id, "time_unix_ms": info.time_unix_ms,
                "vm": manifest.as_ref().map(|manifest| &manifest.name), "tags": tags,
                "keep": keep, "reasons": reasons,
            }))?;
            continue;
        }
        let (vm, message) = manifest
            .as_ref()
            .map_or(("", ""), |manifest| (manifest.name.as_str(), manifest.message.as_str()));
        table.add_row([
            info.id.short(),
            output::time(info.time_unix_ms),
            vm.to_owned(),
            if *keep { "keep" } else { "forget" }.to_owned(),
            reasons.join(", "),
            tags_and_message(tags, message),
        ]);
    }
    if !json && !rows.is_empty() {
        output::print_table(&table);
    }
    Ok(())
}

fn say_forgotten(store: &Store, forgotten: usize, left: usize, args: &ForgetArgs) {
    let (forgotten, left) = (output::count(forgotten as u64), output::count(left as u64));
    let place = store.describe();
    if args.dry_run {
        outln!("{place}: {forgotten} snapshots would be forgotten, {left} left; nothing changed");
    } else if args.prune {
        outln!("{place}: {forgotten} snapshots forgotten, {left} left");
    } else {
        outln!(
            "{place}: {forgotten} snapshots forgotten, {left} left; `frazil prune` frees their \
             space"
        );
    }
}

pub(crate) fn prune(args: &PruneArgs, json: bool) -> anyhow::Result<()> {
    let path = args.store.clone().unwrap_or_else(default_store);
    let settings = StoreOptions { compression_level: args.compression, ..StoreOptions::default() };
    let store = Store::open(&path, settings)?;
    let options = PruneOptions {
        max_unused: args.max_unused,
        max_rewrite_bytes: args.max_rewrite.unwrap_or(u64::MAX),
        dry_run: args.dry_run,
    };
    let started = Instant::now();
    let report = prune_with_bar(&store, &options)?;
    if json {
        let mut object = serde_json::to_value(report)?;
        object["duration_us"] = Value::from(started.elapsed().as_micros() as u64);
        print_json(&object)?;
    } else {
        say_pruned(&store, &report, started.elapsed());
    }
    Ok(())
}

fn prune_with_bar(store: &Arc<Store>, options: &PruneOptions) -> Result<PruneReport, StoreError> {
    let progress = PruneProgress::default();
    std::thread::scope(|scope| {
        let prune = scope.spawn(|| patiently(|| store.prune(options, &progress)));
        let mark = output::progress_bar("mark", "snapshots");
        while !prune.is_finished() && progress.rewrite_bytes_total.load(Ordering::Relaxed) == 0 {
            mark.set_length(progress.snapshots_total.load(Ordering::Relaxed));
            mark.set_position(progress.snapshots_done.load(Ordering::Relaxed));
            std::thread::sleep(Duration::from_millis(20));
        }
        mark.finish_and_clear();
        let rewrite = output::progress_bar("rewrite", "bytes");
        while !prune.is_finished() {
            rewrite.set_length(progress.rewrite_bytes_total.load(Ordering::Relaxed));
            rewrite.set_position(progress.rewrite_bytes_done.load(Ordering::Relaxed));
            std::thread::sleep(Duration::from_millis(20));
        }
        rewrite.finish_and_clear();
        prune.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn say_pruned(store: &Store, report: &PruneReport, took: Duration) {
    let PruneReport { snapshots, pinned, bytes_before, bytes_after, .. } = *report;
    if report.segments_skipped > 0 {
        errln!(
            "frazil: {} files were left alone, because data in use in them is damaged: `frazil \
             verify` says what",
            output::count(report.segments_skipped)
        );
    }
    let (would, so_far) =
        if report.dry_run { ("would be ", "; nothing changed") } else { ("", "") };
    let in_use = if pinned > 0 {
        format!(" ({} of them forgotten, but in use)", output::count(pinned))
    } else {
        String::new()
    };
    outln!(
        "{}: {} snapshots{in_use} need {} of {}; {} files {would}removed, {} {would}rewritten \
         ({}); {} {would}freed, {} left, in {}{so_far}",
        store.describe(),
        output::count(snapshots),
        output::bytes(report.bytes_live),
        output::bytes(bytes_before),
        output::count(report.segments_removed),
        output::count(report.segments_rewritten),
        output::bytes(report.bytes_rewritten),
        output::bytes(bytes_before.saturating_sub(bytes_after)),
        output::bytes(bytes_after),
        output::micros(took.as_micros() as u64),
    );
}

/// Calls `act`, retrying for a while if another process is writing to the store.
fn patiently<T>(mut act: impl FnMut() -> Result<T, StoreError>) -> Result<T, StoreError> {
    let started = Instant::now();
    loop {
        match act() {
            Err(StoreError::Busy { .. }) if started.elapsed() < WRITER_PATIENCE => {
                std::thread::sleep(Duration::from_millis(5));
            }
            other => return other,
        }
    }
}
