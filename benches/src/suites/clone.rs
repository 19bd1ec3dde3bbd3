//! `clone`: many machines from one snapshot, in this process: how soon a clone is ready, and the
//! memory it takes.
//!
//! Memory is what the kernel calls anonymous: heap, stacks, and copies of the guest pages that a
//! clone has written. The snapshot's own pages are shared, and not counted.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use frazil_snapstore::pager::{Image, PagerOptions};
use frazil_snapstore::{PAGE_SIZE, Snapshot, Store};
use frazil_vmm::devices::serial::SerialOutput;
use frazil_vmm::{CheckpointRequest, HostConfig, Loading, Vm, shared_image, verify_snapshot};

use super::floors;
use crate::bench::{Bench, GIB};
use crate::machine::{Machine, create_store};
use crate::metric::Metric;
use crate::samples::Samples;
use crate::{heap, host};

/// A guest that makes scattered writes, seldom enough that a hundred of them can run.
const SPEC: &str = "rate=200,pattern=uniform,content=edit,report=0,seed=5";
/// The guest touches this fraction of its memory: 64 MiB of 1 GiB.
const TOUCHED: u64 = 16;
const CLONES: usize = 100;
const MIB: f64 = (1 << 20) as f64;
const PROGRESS_PATIENCE: Duration = Duration::from_mins(2);

pub(crate) fn run(bench: &mut Bench) -> anyhow::Result<()> {
    let ram_bytes = bench.memory_size(GIB);
    let folder = bench.scratch()?;
    bench.say("taking the snapshot");
    let store = create_store(&folder.path().join("store"))?;
    let spec = format!("{SPEC},touch={}", ram_bytes / TOUCHED);
    let machine = Machine::boot(&spec, ram_bytes, Some(Arc::clone(&store)))?;
    let id = machine.vm.checkpoint(&CheckpointRequest::default())?.id;
    drop(machine);
    let snapshot = store.snapshot(id)?;
    let image = shared_image(&snapshot)?;
    image.load_all().context("cannot load the snapshot")?;
    bench.say("one clone after the other");
    ready(bench, &snapshot, &image, ram_bytes)?;
    let clones = bench.sized(CLONES, 5);
    bench.say(&format!("{clones} clones at a time"));
    many(bench, &store, &snapshot, &image, clones)
}

fn clone(
    snapshot: &Snapshot,
    image: &Arc<Image>,
    store: Option<&Arc<Store>>,
) -> anyhow::Result<Vm> {
    let host = HostConfig::new(SerialOutput::Null, store.cloned());
    let loading = Loading::Shared(Arc::clone(image), PagerOptions::default());
    Ok(Vm::resume(snapshot, "clone".into(), host, loading)?)
}

/// Measures how long a clone of a resident snapshot takes until it can run, and until its guest
/// makes progress.
fn ready(
    bench: &mut Bench,
    snapshot: &Snapshot,
    image: &Arc<Image>,
    ram_bytes: u64,
) -> anyhow::Result<()> {
    let (mut ready, mut progress, mut floor) = (Samples::new(), Samples::new(), Samples::new());
    for _ in 0..bench.runs(40) {
        // The floor is measured in turns with the clones, since the machine is noisy.
        floor.add_time(Duration::from_secs_f64(
            floors::create_empty_vms(ram_bytes, 1)?.ms(0.5) / 1e3,
        ));
        let started = Instant::now();
        let vm = clone(snapshot, image, None)?;
        ready.add_time(started.elapsed());
        let before = loops(&vm)?;
        vm.go()?;
        wait_progress(&vm, before, Duration::ZERO)?;
        progress.add_time(started.elapsed());
    }
    for (name, times) in [("ready", &ready), ("first_progress", &progress)] {
        let metric = Metric::new(format!("clone.{name}"), times.ms(0.5), "ms", times.n());
        bench.emit(metric.against(floor.ms(0.5)))?;
        let metric = Metric::new(format!("clone.{name}_p99"), times.ms(0.99), "ms", times.n());
        bench.emit(metric.against(floor.ms(0.99)))?;
    }
    Ok(())
}

fn many(
    bench: &mut Bench,
    store: &Arc<Store>,
    snapshot: &Snapshot,
    image: &Arc<Image>,
    clones: usize,
) -> anyhow::Result<()> {
    let anonymous = || {
        host::anonymous_bytes()
            .context("the kernel does not report this process's anonymous memory")
    };
    let (before, host_before) = (anonymous()?, host::available_bytes());
    let heap_before = heap::live();
    let started = Instant::now();
    let mut vms = Vec::with_capacity(clones);
    let mut loops_before = Vec::with_capacity(clones);
    for _ in 0..clones {
        let vm = clone(snapshot, image, Some(store))?;
        loops_before.push(loops(&vm)?);
        vms.push(vm);
    }
    let built = started.elapsed();
    vms.iter().try_for_each(Vm::go)?;
    for (vm, before) in vms.iter().zip(loops_before) {
        wait_progress(vm, before, Duration::from_micros(200))?;
    }
    let running = started.elapsed();
    vms.iter().try_for_each(Vm::pause)?;
    let (after, host_after) = (anonymous()?, host::available_bytes());
    let heap = heap::live().saturating_sub(heap_before) as f64 / MIB;
    let mut dirty_pages = 0;
    for vm in &vms {
        let report = vm.checkpoint(&CheckpointRequest::default())?;
        dirty_pages += report.stats.dirty_pages;
        let checked = verify_snapshot(&store.snapshot(report.id)?)?;
        ensure!(checked.is_some(), "a clone's snapshot is of another guest");
    }
    let dirty = dirty_pages as f64 * PAGE_SIZE as f64 / MIB;
    let extra = after.saturating_sub(before) as f64 / MIB - dirty;
    let n = clones as u64;
    let name = |what: &str| format!("clone.{what}_{clones}");
    bench.emit(Metric::new(name("private_mib"), extra, "MiB", n).beyond(dirty))?;
    bench.emit(Metric::new(name("dirty_mib"), dirty, "MiB", n))?;
    bench.emit(Metric::new(name("heap_mib"), heap, "MiB", n))?;
    if let (Some(before), Some(after)) = (host_before, host_after) {
        let taken = before.saturating_sub(after) as f64 / MIB - dirty;
        bench.emit(Metric::new(name("host_mib"), taken, "MiB", n).beyond(dirty))?;
    }
    for (what, took) in [("all_built_ms", built), ("all_running_ms", running)] {
        bench.emit(Metric::new(name(what), took.as_secs_f64() * 1e3, "ms", n))?;
    }
    Ok(())
}

fn loops(vm: &Vm) -> anyhow::Result<u64> {
    Ok(vm.workload()?.vcpus.iter().map(|vcpu| vcpu.control.loops).fold(0, u64::wrapping_add))
}

fn wait_progress(vm: &Vm, before: u64, poll: Duration) -> anyhow::Result<()> {
    let until = Instant::now() + PROGRESS_PATIENCE;
    while loops(vm)? == before {
        ensure!(vm.ended().is_none() && Instant::now() < until, "a clone makes no progress");
        if !poll.is_zero() {
            std::thread::sleep(poll);
        }
    }
    Ok(())
}
