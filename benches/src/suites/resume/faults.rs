//! Part of `resume`: single faults, and a recorded working set.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use frazil_snapstore::pager::{Extent, Image, Mapping, Pager, PagerOptions, Replay, Seat};
use frazil_snapstore::{PAGE_SIZE, Snapshot};
use frazil_vmm::memory::RAM_REGION;
use frazil_vmm::{CheckpointRequest, Loading};

use crate::bench::Bench;
use crate::codec;
use crate::content::FRAME_PAGES;
use crate::machine::{Machine, create_store};
use crate::metric::Metric;
use crate::raw::{self, SharedMemory};
use crate::report::Picture;
use crate::samples::Samples;
use crate::suites::floors;

/// Distance between the pages touched, so that no two are in one chunk.
const STRIDE_PAGES: u64 = 128;

/// Measures touches of scattered pages, against a thread that only takes the fault, unpacks the
/// same frame from memory and maps it.
pub(super) fn single(bench: &mut Bench, snapshot: &Snapshot) -> anyhow::Result<()> {
    let region = snapshot.region(RAM_REGION)?;
    // Below the hole, where pages have the same places in the memory file as in the guest.
    let pages = region.pages().min((3 << 30) / PAGE_SIZE as u64);
    let mut places: Vec<u64> = (0..pages).step_by(STRIDE_PAGES as usize).skip(64).collect();
    places.truncate(bench.sized(2000, 100));
    let mut frames = Vec::with_capacity(places.len());
    let mut contents = vec![0; FRAME_PAGES * PAGE_SIZE];
    for page in &places {
        region.read_pages(*page, &mut contents)?;
        frames.extend(codec::compress(&contents)?);
    }
    // Neighbouring pages may share work: touch them far apart in time.
    let order = |index: usize| index * 617 % places.len();
    let (mut ours, mut floor) = (Samples::new(), Samples::new());
    for run in 0..bench.runs(4) {
        let options =
            PagerOptions { background_fill: false, replay: Replay::Off, ..PagerOptions::default() };
        let memory = SharedMemory::new(pages as usize * PAGE_SIZE)?;
        let extent = Extent { first_page: 0, pages, file_offset: 0 };
        let image = Image::new(region.clone(), memory.file(), &[extent])?;
        let mapping = Mapping {
            address: memory.address(),
            len_bytes: memory.len_bytes(),
            file_offset: 0,
            first_page: 0,
        };
        let seat = Seat::take(&[mapping])?;
        let pager = Pager::serve(Arc::new(image), seat, options, Box::new(|_| {}))?;
        let touched = touch_all(&memory, places.len(), |index| places[order(index)]);
        drop(pager);
        // The first run warms the page cache for the store, and gets memory from the host.
        let warm = run > 0;
        let bare = floors::uffd_unpack(&frames, &places, order)?;
        if warm {
            touched.into_iter().for_each(|time| ours.add_time(time));
            bare.into_iter().for_each(|time| floor.add_time(time));
        }
    }
    bench.draw(Picture::Faults, "frazil", &ours);
    bench.draw(Picture::Faults, "a bare userfaultfd and zstd", &floor);
    for (name, quantile) in [("p50", 0.5), ("p99", 0.99)] {
        let metric = Metric::new(format!("resume.fault_{name}"), ours.us(quantile), "us", ours.n());
        bench.emit(metric.against(floor.us(quantile)))?;
    }
    Ok(())
}

/// Touches the pages `page(0 .. count)`. Returns the time of each touch.
pub(crate) fn touch_all(
    memory: &SharedMemory,
    count: usize,
    page: impl Fn(usize) -> u64,
) -> Vec<Duration> {
    let touch = |index| {
        let started = Instant::now();
        memory.touch(page(index) as usize);
        let took = started.elapsed();
        // Let the pager finish the rest of its work, which is not part of this fault.
        std::thread::sleep(Duration::from_micros(300));
        took
    };
    (0..count).map(touch).collect()
}

/// A guest that uses part of its memory; the time it takes for as much work as was recorded is
/// measured.
const SPEC: &str = "touch=128MiB,rate=max,pattern=uniform,content=edit,report=0,seed=8";
const RECORD: Duration = Duration::from_secs(1);

pub(super) fn working_set(bench: &mut Bench) -> anyhow::Result<()> {
    let folder = bench.scratch()?;
    let store = create_store(&folder.path().join("store"))?;
    let ram_bytes = bench.sized(1 << 30, 256 << 20);
    let machine = Machine::boot(SPEC, ram_bytes, Some(Arc::clone(&store)))?;
    let id = machine.vm.checkpoint(&CheckpointRequest::default())?.id;
    drop(machine);
    let snapshot = store.snapshot(id)?;
    let options = |replay, record| {
        let options = PagerOptions { background_fill: false, ..PagerOptions::default() };
        Loading::lazy(PagerOptions { replay, record, ..options })
    };
    let turns = bench.sized(60_000, 2000);
    let recorded = Machine::resume(&snapshot, options(Replay::Off, Some(RECORD)))?;
    recorded.go_for(turns)?;
    std::thread::sleep(RECORD);
    let set = wait_recorded(&store, id)?;
    drop(recorded);
    let (mut replayed, mut resident, mut lazy) = (Samples::new(), Samples::new(), Samples::new());
    for _ in 0..bench.runs(5) {
        let eager = Machine::resume(&snapshot, Loading::Eager)?;
        raw::populate(eager.vm.ram())?;
        resident.add_time(eager.go_for(turns)?.1);
        drop(eager);
        let machine = Machine::resume(&snapshot, options(Replay::Before, None))?;
        replayed.add_time(machine.go_for(turns)?.1);
        drop(machine);
        let machine = Machine::resume(&snapshot, options(Replay::Off, None))?;
        lazy.add_time(machine.go_for(turns)?.1);
    }
    let floor = resident.ms(0.5);
    for (name, times) in [("working_set", &replayed), ("working_set_none", &lazy)] {
        let metric = Metric::new(format!("resume.{name}"), times.ms(0.5), "ms", times.n());
        bench.emit(metric.against(floor))?;
    }
    let mib = set as f64 * PAGE_SIZE as f64 / (1 << 20) as f64;
    bench.emit(Metric::new("resume.working_set_mib", mib, "MiB", 1))
}

fn wait_recorded(
    store: &frazil_snapstore::Store,
    id: frazil_snapstore::SnapshotId,
) -> anyhow::Result<u64> {
    for _ in 0..200 {
        if let Some(set) = store.working_set(id, RAM_REGION) {
            return Ok(set.pages());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(anyhow!("the working set was not saved"))
}

/// Runs `with` while a thread runs `serve`, which ends once its flag is set.
pub(crate) fn beside<T>(
    serve: impl FnOnce(&AtomicBool) -> anyhow::Result<()> + Send,
    with: impl FnOnce() -> T,
) -> anyhow::Result<T> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let server = scope.spawn(|| serve(&done));
        let result = with();
        done.store(true, Ordering::Relaxed);
        server
            .join()
            .map_err(|_panic| anyhow!("the fault thread panicked"))?
            .context("faults were not served")?;
        Ok(result)
    })
}
