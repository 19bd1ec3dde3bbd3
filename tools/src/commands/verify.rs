//! `frazil verify`.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use frazil_snapstore::{SnapshotId, Store, StoreError, VerifyProgress, VerifyReport};
use serde_json::json;

use super::{open_snapshot, open_store, print_json};
use crate::cli::{MemoryCheck, VerifyArgs};
use crate::output;

pub(crate) fn verify(args: &VerifyArgs, json: bool) -> anyhow::Result<ExitCode> {
    let (store, ids) = match args.target.as_deref() {
        Some(target) if target.contains('@') => {
            let (_, snapshot) = open_snapshot(target)?;
            (Arc::clone(snapshot.store()), vec![snapshot.id()])
        }
        path => {
            let store = open_store(path.map(std::path::Path::new))?;
            let ids = store.snapshots().iter().map(|info| info.id).collect();
            (store, ids)
        }
    };
    let started = Instant::now();
    let report = check_blocks(&store, &ids)?;
    let mut damage: Vec<(Option<SnapshotId>, String)> =
        report.damage.iter().map(|damage| (damage.snapshot, damage.error.to_string())).collect();
    let memory_pages = check_memory(&store, &ids, args.memory, &mut damage);
    if json {
        let damage: Vec<_> = damage
            .iter()
            .map(|(snapshot, error)| json!({"snapshot": snapshot, "error": error}))
            .collect();
        print_json(&json!({
            "ok": damage.is_empty(), "snapshots": report.snapshots, "nodes": report.nodes, "frames": report.frames,
            "chunks": report.chunks, "stored_bytes": report.stored_bytes, "page_bytes": report.page_bytes,
            "memory_pages_checked": memory_pages, "damage": damage, "duration_us": started.elapsed().as_micros() as u64,
        }))?;
    } else {
        for (snapshot, error) in &damage {
            let under = snapshot.map_or_else(String::new, |id| format!("{}: ", id.short()));
            errln!("frazil: {under}{error}");
        }
        print_summary(&store, &report, memory_pages, damage.len(), started.elapsed());
    }
    Ok(if damage.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn check_blocks(store: &Arc<Store>, ids: &[SnapshotId]) -> Result<VerifyReport, StoreError> {
    let progress = VerifyProgress::default();
    let bar = output::progress_bar("verify", "frames");
    std::thread::scope(|scope| {
        let check = scope.spawn(|| frazil_snapstore::verify(store, ids, &progress));
        while !check.is_finished() {
            bar.set_length(progress.frames_total.load(Ordering::Relaxed));
            bar.set_position(progress.frames_done.load(Ordering::Relaxed));
            std::thread::sleep(Duration::from_millis(20));
        }
        bar.finish_and_clear();
        check.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Checks memory against the workload's oracle. Returns the number of pages checked.
fn check_memory(
    store: &Arc<Store>,
    ids: &[SnapshotId],
    which: MemoryCheck,
    damage: &mut Vec<(Option<SnapshotId>, String)>,
) -> u64 {
    let chosen = match which {
        MemoryCheck::None => &[],
        MemoryCheck::Newest => &ids[ids.len().saturating_sub(1)..],
        MemoryCheck::All => ids,
    };
    let mut pages = 0;
    for id in chosen {
        let checked = store
            .snapshot(*id)
            .map_err(Into::into)
            .and_then(|snapshot| frazil_vmm::verify_snapshot(&snapshot));
        match checked {
            Ok(Some(report)) => pages += report.pages_checked,
            Ok(None) => {}
            Err(error) => damage.push((Some(*id), error.to_string())),
        }
    }
    pages
}

fn print_summary(
    store: &Store,
    report: &VerifyReport,
    memory_pages: u64,
    damaged: usize,
    took: Duration,
) {
    let memory = if memory_pages > 0 {
        format!("; {} pages of guest memory hold what the guest wrote", output::count(memory_pages))
    } else {
        String::new()
    };
    let verdict =
        if damaged == 0 { format!("all good{memory}") } else { format!("{damaged} DAMAGED") };
    outln!(
        "{}: {} snapshots, {} frames, {} tree nodes, {} state chunks, {} read ({} of pages) in {}: {verdict}",
        store.describe(),
        output::count(report.snapshots),
        output::count(report.frames),
        output::count(report.nodes),
        output::count(report.chunks),
        output::bytes(report.stored_bytes),
        output::bytes(report.page_bytes),
        output::micros(took.as_micros() as u64),
    );
}
