//! `endurance`: tens of thousands of checkpoints back to back, while old ones are forgotten and
//! pruned: nothing may grow but what is kept. For the retention policy they count as 100 ms apart,
//! so 36,000 of them are an hour.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, ensure};
use frazil_snapstore::retention::{Candidate, Policy, decide};
use frazil_snapstore::{PruneOptions, PruneProgress, SnapshotId, Store};
use frazil_vmm::verify_snapshot;
use jiff::tz::TimeZone;

use crate::bench::Bench;
use crate::machine::{Machine, create_store};
use crate::metric::Metric;
use crate::series::{Series, checkpoint};
use crate::{heap, host};

/// Writes so few pages that checkpoints take most of the time.
const SPEC: &str = "rate=1000,pattern=uniform,content=text,report=0,gap_us=50";
const RAM_BYTES: u64 = 64 << 20;
const CHECKPOINTS: usize = 36_000;
const QUICK_CHECKPOINTS: usize = 300;
/// Time between checkpoints, for the policy.
const APART_MS: u64 = 100;
/// How many times a run applies the policy and prunes.
const TURNS: usize = 60;
/// Keeps as many snapshots as it ever will from a tenth of a run on. Every page changes within a
/// minute, so each of the older snapshots costs as much as a first one.
const POLICY: Policy = Policy {
    last: Some(100),
    minutely: Some(5),
    hourly: None,
    daily: None,
    weekly: None,
    monthly: None,
    yearly: None,
    within: None,
};
const MIB: f64 = (1 << 20) as f64;

/// Memory and disk space in use at one moment, in MiB.
struct Held {
    resident: f64,
    heap: f64,
    store: f64,
}

pub(crate) fn run(bench: &mut Bench) -> anyhow::Result<()> {
    let folder = bench.scratch()?;
    let path = folder.path().join("store");
    let store = create_store(&path)?;
    let machine = Machine::boot(SPEC, bench.memory_size(RAM_BYTES), Some(Arc::clone(&store)))?;
    let mut order = HashMap::from([(checkpoint(&machine.vm)?.id, 0)]);
    let count = bench.runs_in_full(CHECKPOINTS, QUICK_CHECKPOINTS);
    let (mut series, mut held) = (Series::new(), Vec::new());
    let marks = [("10pct", count / 10), ("50pct", count / 2), ("100pct", count)];
    let started = Instant::now();
    for taken in 1..=count {
        order.insert(series.take(&machine)?.id, taken as u64);
        let mark = marks.iter().find(|(_, at)| *at == taken);
        // Prune before each measurement, or it would depend on how long ago the last prune was.
        if mark.is_some() || taken.is_multiple_of((count / TURNS).max(1)) {
            keep(&store, &mut order)?;
        }
        if let Some((label, _)) = mark {
            bench.say(&format!("{taken} of {count} checkpoints"));
            held.push((*label, Held::now(&path)?));
        }
    }
    let per_s = count as f64 / started.elapsed().as_secs_f64();
    bench.emit(Metric::new("pause.endurance_checkpoints", count as f64, "checkpoints", 1))?;
    bench.emit(Metric::new("pause.endurance_per_s", per_s, "checkpoints/s", series.pause.n()))?;
    emit_held(bench, &held)?;
    series.emit_pauses(bench, "pause.endurance", None)?;
    verify_last(bench, &machine, &store)
}

impl Held {
    fn now(store: &Path) -> anyhow::Result<Self> {
        Ok(Self {
            resident: host::resident_bytes().unwrap_or(0) as f64 / MIB,
            heap: heap::live() as f64 / MIB,
            store: bytes_below(store)? as f64 / MIB,
        })
    }
}

/// Prints what was in use along the way, against what was in use after a tenth of the run: by then
/// the policy keeps as much as it ever will.
fn emit_held(bench: &mut Bench, held: &[(&str, Held)]) -> anyhow::Result<()> {
    let Some((_, tenth)) = held.first() else { return Ok(()) };
    for (label, held) in held {
        for (what, value, floor) in [
            ("rss", held.resident, tenth.resident),
            ("heap", held.heap, tenth.heap),
            ("store", held.store, tenth.store),
        ] {
            let name = format!("pause.endurance_{what}_{label}_mib");
            bench.emit(Metric::new(name, value, "MiB", 1).against(floor))?;
        }
    }
    Ok(())
}

/// Forgets the snapshots that the policy does not keep, and prunes. `order` has the sequence number
/// of each snapshot.
fn keep(store: &Arc<Store>, order: &mut HashMap<SnapshotId, u64>) -> anyhow::Result<()> {
    let candidates: Vec<Candidate> = order
        .iter()
        .map(|(id, number)| Candidate {
            id: *id,
            time_unix_ms: number * APART_MS,
            group: String::new(),
            tagged: false,
        })
        .collect();
    let verdicts = decide(&POLICY, &candidates, &TimeZone::UTC);
    let unwanted: Vec<SnapshotId> =
        verdicts.iter().filter(|verdict| !verdict.keep).map(|verdict| verdict.id).collect();
    store.forget_untagged(&unwanted)?;
    for id in &unwanted {
        order.remove(id);
    }
    store.prune(&PruneOptions::default(), &PruneProgress::default())?;
    Ok(())
}

fn verify_last(bench: &mut Bench, machine: &Machine, store: &Arc<Store>) -> anyhow::Result<()> {
    let head = machine.vm.head().context("no checkpoint was taken")?;
    let checked = verify_snapshot(&store.snapshot(head)?)?;
    ensure!(checked.is_some(), "the last snapshot is of another guest");
    let snapshots = store.snapshots().len();
    bench.emit(Metric::new("pause.endurance_kept", snapshots as f64, "snapshots", 1))
}

fn bytes_below(folder: &Path) -> anyhow::Result<u64> {
    let at = || format!("cannot read {}", folder.display());
    let mut bytes = 0;
    for entry in fs::read_dir(folder).with_context(at)? {
        let path = entry.with_context(at)?.path();
        if path.is_dir() {
            bytes += bytes_below(&path)?;
        } else {
            bytes += fs::metadata(&path).with_context(at)?.len();
        }
    }
    Ok(bytes)
}
