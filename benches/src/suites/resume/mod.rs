//! `resume`: how soon a guest runs again, and its costs while its memory is loaded.

mod faults;
mod others;
mod progress;
mod sweeps;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, ensure};
use frazil_snapstore::{Snapshot, Store, StoreOptions};
use frazil_vmm::{CheckpointRequest, Loading};
use tempfile::TempDir;

pub(crate) use faults::{beside, touch_all};
pub(crate) use progress::resume_once;

use crate::bench::{Bench, GIB, size_label};
use crate::codec::{self, Cores};
use crate::content;
use crate::machine::{Machine, create_store};
use crate::metric::{MIB_S, Metric};
use crate::samples::Samples;

/// Text pages; once all are written, two words of each page in order, without a pause.
const SEQ: &str = "rate=max,pattern=seq,content=edit,report=0";
/// The same, each page once per lap and in random order.
const SHUFFLE: &str = "rate=max,pattern=shuffle,content=edit,report=0";
/// Writes that make ten pages between two checkpoints.
const EDITS: &str = "rate=1000,pattern=uniform,content=edit,report=0";
/// The number of checkpoints in a deep history.
const DEPTH: usize = 1000;
const MIB: f64 = (1 << 20) as f64;

/// A snapshot to resume.
struct Bed {
    frazil: PathBuf,
    folder: TempDir,
    snapshot: Snapshot,
    label: String,
    ram_bytes: u64,
}

type Measure = fn(&mut Bench, &Bed) -> anyhow::Result<()>;

/// Measurements made at each memory size.
const OF_SIZES: [&str; 5] = ["progress", "faults", "eager", "sweep", "others"];
/// Measurements made once.
const ONCE: [&str; 3] = ["working_set", "deep", "large"];

/// Names for `--only`.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    OF_SIZES.into_iter().chain(ONCE)
}

pub(crate) fn run(bench: &mut Bench, frazil: Option<PathBuf>) -> anyhow::Result<()> {
    let frazil = find_frazil(frazil)?;
    let sizes = bench.memory_sizes(2);
    if OF_SIZES.into_iter().any(|name| bench.wants(name)) {
        for ram_bytes in &sizes {
            measure_size(bench, &frazil, *ram_bytes)?;
        }
    }
    if bench.wants("working_set") {
        bench.say("a working set");
        faults::working_set(bench)?;
    }
    let smallest = sizes.iter().copied().min().unwrap_or(GIB);
    if bench.wants("deep") {
        let depth = bench.sized(DEPTH, 20);
        bench.say(&format!("a history of {depth} checkpoints"));
        let bed = Bed::at_depth(bench, frazil.clone(), smallest, depth)?;
        progress::first_progress(bench, &bed)?;
    }
    let ram_bytes = bench.sized(16 * GIB, smallest);
    if bench.wants("large") && bench.has_room("large", ram_bytes) {
        let label = size_label(ram_bytes);
        bench.say(&format!("{label}: taking the snapshot"));
        let bed = Bed::new(bench, frazil, SEQ, ram_bytes, label)?;
        progress::first_progress(bench, &bed)?;
    }
    Ok(())
}

fn measure_size(bench: &mut Bench, frazil: &Path, ram_bytes: u64) -> anyhow::Result<()> {
    let label = size_label(ram_bytes);
    let bed = |bench: &mut Bench, spec, what: &str| {
        bench.say(&format!("{label}: taking a snapshot of a guest that writes {what}"));
        Bed::new(bench, frazil.to_owned(), spec, ram_bytes, label.clone())
    };
    let seq = bed(bench, SEQ, "page after page")?;
    let steps: [(&str, Measure); 4] = [
        ("progress", progress::first_progress),
        ("faults", |bench, bed| faults::single(bench, &bed.snapshot)),
        ("eager", eager),
        ("sweep", |bench, bed| sweeps::measure(bench, bed, "seq")),
    ];
    for (name, measure) in steps {
        if !bench.wants(name) {
            continue;
        }
        bench.say(&format!("{label}: {name}"));
        measure(bench, &seq)?;
    }
    if !(bench.wants("sweep") || bench.wants("others")) {
        return Ok(());
    }
    let shuffle = bed(bench, SHUFFLE, "in random order")?;
    if bench.wants("sweep") {
        sweeps::measure(bench, &shuffle, "random")?;
    }
    // One fault per page takes half a minute for 1 GiB.
    if bench.wants("others") && ram_bytes <= GIB {
        bench.say(&format!("{label}: resuming as other VMMs do"));
        others::measure(bench, &seq, &shuffle)?;
    }
    Ok(())
}

/// The `frazil` command to measure: by default, the one beside this program.
///
/// # Errors
/// If there is no such file.
pub(crate) fn find_frazil(given: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    let path = match given {
        Some(path) => path,
        None => std::env::current_exe()
            .context("cannot find the path of this program")?
            .with_file_name("frazil"),
    };
    ensure!(
        path.is_file(),
        "no `frazil` at {}: build it (cargo build --release --bin frazil) or give --frazil PATH",
        path.display()
    );
    Ok(path)
}

impl Bed {
    /// Takes a snapshot of a guest with the workload `spec`, once it has written all its memory.
    fn new(
        bench: &Bench,
        frazil: PathBuf,
        spec: &str,
        ram_bytes: u64,
        label: String,
    ) -> anyhow::Result<Self> {
        Self::after(bench, frazil, spec, ram_bytes, label, |machine| {
            machine.vm.pause()?;
            machine
                .vm
                .checkpoint(&CheckpointRequest::default())
                .context("the checkpoint failed")?;
            Ok(())
        })
    }

    /// Takes `depth` snapshots of a working guest, for the last of them to be resumed.
    fn at_depth(
        bench: &Bench,
        frazil: PathBuf,
        ram_bytes: u64,
        depth: usize,
    ) -> anyhow::Result<Self> {
        Self::after(bench, frazil, EDITS, ram_bytes, "deep".to_owned(), |machine| {
            for _ in 0..depth {
                machine.vm.checkpoint(&CheckpointRequest::default())?;
            }
            Ok(())
        })
    }

    fn after(
        bench: &Bench,
        frazil: PathBuf,
        spec: &str,
        ram_bytes: u64,
        label: String,
        checkpoint: impl FnOnce(&Machine) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let folder = bench.scratch()?;
        let path = folder.path().join("store");
        let machine = Machine::boot(spec, ram_bytes, Some(create_store(&path)?))?;
        checkpoint(&machine)?;
        drop(machine);
        let store: Arc<Store> = Store::open(&path, StoreOptions::default())?;
        let latest = store.latest().context("the store has no snapshot")?;
        let snapshot = store.snapshot(latest.id)?;
        Ok(Self { frazil, folder, snapshot, label, ram_bytes })
    }

    /// The name of a metric: with the memory size as a suffix, except for 1 GiB.
    fn metric(&self, what: &str) -> String {
        match self.label.as_str() {
            "1g" => format!("resume.{what}"),
            label => format!("resume.{what}_{label}"),
        }
    }
}

/// Measures loading all memory before the guest runs, against decompressing it on all cores.
fn eager(bench: &mut Bench, bed: &Bed) -> anyhow::Result<()> {
    let mut times = Samples::new();
    let mut raw = Vec::new();
    for run in 0..=bench.runs(3) {
        let started = Instant::now();
        let machine = Machine::resume(&bed.snapshot, Loading::Eager)?;
        let took = started.elapsed();
        if run == 0 {
            // Warms up the memory that the next run gets.
            raw = content::sample(machine.vm.ram(), bench.sized(128 << 20, 8 << 20))?;
        } else {
            times.add_time(took);
        }
    }
    let unzstd = codec::decompress_times(&codec::compress(&raw)?, Cores::All, bench.runs(5))?;
    let floor = unzstd.per_second(raw.len() as f64 / MIB);
    let mib_s = times.per_second(bed.ram_bytes as f64 / MIB);
    let name = format!("resume.eager_{}", bed.label);
    bench.emit(Metric::new(format!("{name}_ms"), times.ms(0.5), "ms", times.n()))?;
    bench.emit(Metric::new(format!("{name}_mib_s"), mib_s, MIB_S, times.n()).against(floor))
}
