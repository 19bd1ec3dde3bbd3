//! `rewind`: taking a running guest back to a snapshot, in place, by how much has changed since.

use std::time::Instant;

use anyhow::ensure;
use frazil_snapstore::PAGE_SIZE;
use frazil_vmm::{CheckpointRequest, RewindPoint, RewindReport};

use crate::bench::{Bench, GIB, size_label};
use crate::machine::{Machine, create_store};
use crate::metric::Metric;
use crate::samples::Samples;

/// Writes random text pages, fast enough to change many of them soon.
const SPEC: &str = "rate=40000,pattern=uniform,content=text,report=0";
/// The design's budget is this, and a microsecond per page.
const BUDGET_US: f64 = 1000.0;
/// Pages that the guest writes between two rewinds.
const PAGES: [u64; 3] = [100, 1000, 10_000];
/// The number of pages that the design's budget is stated for.
const NAMED_PAGES: u64 = 1000;
/// A part of the time a rewind takes.
type Part = (&'static str, fn(&RewindReport) -> u64);
const PARTS: [Part; 5] = [
    ("prepare", |report| report.prepare_us),
    ("harvest", |report| report.harvest_us),
    ("memory", |report| report.memory_us),
    ("state", |report| report.state_us),
    ("go_on", |report| report.go_on_us),
];
/// Rewinds that are not measured, to warm up.
const WARM_UP: usize = 5;
/// Rewinds in a row, after which the guest's memory is checked.
const IN_A_ROW: usize = 1000;

pub(crate) fn run(bench: &mut Bench) -> anyhow::Result<()> {
    let ram_bytes = bench.memory_size(GIB);
    let label = size_label(ram_bytes);
    bench.say(&format!("{label}: taking the snapshot"));
    let folder = bench.scratch()?;
    let store = create_store(&folder.path().join("store"))?;
    let machine = Machine::boot(SPEC, ram_bytes, Some(store.clone()))?;
    let id = machine.vm.checkpoint(&CheckpointRequest::default())?.id;
    let mut point = machine.vm.rewind_point(&store.snapshot(id)?)?;
    state(bench, &machine, &mut point)?;
    for pages in PAGES {
        bench.say(&format!("{label}: {pages} pages"));
        latency(bench, &machine, &mut point, pages)?;
    }
    in_a_row(bench, &machine, &mut point)
}

/// Measures rewinds of next to no pages: stopping, the state of vCPUs and devices, and going on.
fn state(bench: &mut Bench, machine: &Machine, point: &mut RewindPoint) -> anyhow::Result<()> {
    let (mut state, mut whole) = (Samples::new(), Samples::new());
    machine.vm.rewind(point)?;
    for _ in 0..bench.runs(100) {
        let report = machine.vm.rewind(point)?;
        state.add(report.state_us * 1000);
        whole.add(report.pause_us * 1000);
    }
    bench.emit(Metric::new("rewind.state_us", state.us(0.5), "us", state.n()))?;
    bench.emit(Metric::new("rewind.idle_pause_us", whole.us(0.5), "us", whole.n()))
}

fn latency(
    bench: &mut Bench,
    machine: &Machine,
    point: &mut RewindPoint,
    pages: u64,
) -> anyhow::Result<()> {
    let (mut whole, mut pause, mut found) = (Samples::new(), Samples::new(), Samples::new());
    let (mut read, mut put_back) = (0, 0);
    let mut parts = PARTS.map(|_| Samples::new());
    // The first rewinds find out which pages the guest writes from here, and read them, while it
    // writes on.
    for round in 0..bench.runs(30) + WARM_UP {
        machine.wait_turns(machine.turns()? + pages)?;
        let started = Instant::now();
        let report = machine.vm.rewind(point)?;
        let took = started.elapsed();
        if round >= WARM_UP {
            whole.add_time(took);
            pause.add(report.pause_us * 1000);
            found.add(report.pages);
            for ((_, of), times) in PARTS.iter().zip(&mut parts) {
                times.add(of(&report) * 1000);
            }
            (read, put_back) = (read + report.read_pages, put_back + report.pages);
        }
    }
    let n = whole.n();
    let name = format!("rewind.latency_{pages}");
    let budget = BUDGET_US + found.median();
    if pages == NAMED_PAGES {
        let metric = Metric::new("rewind.latency", whole.us(0.5), "us", n);
        bench.emit(metric.against(budget))?;
    }
    bench.emit(Metric::new(format!("{name}_us"), whole.us(0.5), "us", n).against(budget))?;
    let p99 = Metric::new(format!("{name}_p99_us"), whole.us(0.99), "us", n);
    bench.emit(p99.against(budget))?;
    let floor = memcpy_us(bench, found.median() as usize);
    bench.emit(Metric::new(format!("{name}_pause_us"), pause.us(0.5), "us", n).against(floor))?;
    for ((part, _), times) in PARTS.iter().zip(&parts) {
        bench.emit(Metric::new(format!("{name}_{part}_us"), times.us(0.5), "us", n))?;
    }
    bench.emit(Metric::new(format!("rewind.pages_{pages}"), found.median(), "pages", n))?;
    let share = read as f64 * 100.0 / put_back.max(1) as f64;
    bench.emit(Metric::new(format!("rewind.read_{pages}"), share, "% of pages", n))
}

/// The median time of copying as many pages from one buffer to another.
fn memcpy_us(bench: &Bench, pages: usize) -> f64 {
    let (from, mut to) = (vec![1_u8; pages * PAGE_SIZE], vec![0_u8; pages * PAGE_SIZE]);
    let mut times = Samples::new();
    for _ in 0..bench.runs(30) {
        times.time(|| to.copy_from_slice(std::hint::black_box(&from)));
        std::hint::black_box(&to);
    }
    times.us(0.5)
}

fn in_a_row(bench: &mut Bench, machine: &Machine, point: &mut RewindPoint) -> anyhow::Result<()> {
    bench.say("rewinds in a row");
    let mut times = Samples::new();
    for _ in 0..bench.runs_in_full(IN_A_ROW, 100) {
        machine.wait_turns(machine.turns()? + 10)?;
        let done = times.time(|| machine.vm.rewind(point));
        done?;
    }
    let verified = machine.vm.verify_workload()?;
    ensure!(verified.is_ok(), "after all rewinds memory is wrong: {verified:?}");
    bench.emit(Metric::new("rewind.in_a_row", times.n() as f64, "rewinds, verified", 1))?;
    bench.emit(Metric::new("rewind.in_a_row_us", times.us(0.5), "us", times.n()))
}
