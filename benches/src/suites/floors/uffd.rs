//! userfaultfd without a store: one thread touches pages, another maps them.

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use frazil_snapstore::PAGE_SIZE;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FallocateFlags, fallocate};
use userfaultfd::{Event, FeatureFlags, RegisterMode, Uffd, UffdBuilder};

use super::super::resume::{beside, touch_all};
use crate::bench::Bench;
use crate::codec::Unpacker;
use crate::content::FRAME_PAGES;
use crate::metric::Metric;
use crate::raw::SharedMemory;
use crate::samples::Samples;

/// `UFFD_FEATURE_MINOR_SHMEM`, which the userfaultfd crate has no name for.
const FEATURE_MINOR_SHMEM: u64 = 1 << 10;

/// How to answer a fault.
#[derive(Clone, Copy, Debug)]
enum Answer {
    /// The pages are in the memfd: `UFFDIO_CONTINUE` for this many at a time.
    Continue { pages: usize },
    /// There are no pages: `UFFDIO_COPY` one.
    Copy,
}

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let answers = [
        ("continue_1", Answer::Continue { pages: 1 }, bench.sized(8192, 1024)),
        ("continue_64", Answer::Continue { pages: 64 }, bench.sized(65536, 4096)),
        ("continue_512", Answer::Continue { pages: 512 }, bench.sized(65536, 4096)),
        ("copy_1", Answer::Copy, bench.sized(8192, 1024)),
    ];
    // The host hands memory out lazily, and the first to use it pays: pay before timing.
    let warm = SharedMemory::new(
        answers.map(|(_, _, pages)| pages).into_iter().fold(0, usize::max) * PAGE_SIZE,
    )?;
    allocate(&warm)?;
    drop(warm);
    for (name, answer, pages) in answers {
        let mut times = Samples::new();
        for _ in 0..bench.runs(5) {
            times.add_time(sweep(answer, pages)?);
        }
        let us = times.us(0.5) / pages as f64;
        let metric = format!("floors.uffd_{name}_us_per_page");
        bench.emit(Metric::new(metric, us, "us/page", times.n()))?;
    }
    Ok(())
}

/// Touches `pages` pages in order while another thread answers the faults.
fn sweep(answer: Answer, pages: usize) -> anyhow::Result<Duration> {
    let memory = SharedMemory::new(pages * PAGE_SIZE)?;
    if matches!(answer, Answer::Continue { .. }) {
        allocate(&memory)?;
    }
    let uffd = watch(&memory)?;
    answering(
        &uffd,
        &memory,
        |page| answer.give(&uffd, &memory, page),
        || {
            let started = Instant::now();
            (0..pages).for_each(|page| memory.touch(page));
            started.elapsed()
        },
    )
}

/// Touches the pages `places` of a memory file, in the order of `order`, while a thread takes each
/// fault, unpacks the frame that begins there and maps it. Returns the time of each touch.
pub(crate) fn uffd_unpack(
    frames: &[Vec<u8>],
    places: &[u64],
    order: impl Fn(usize) -> usize,
) -> anyhow::Result<Vec<Duration>> {
    let pages = places.iter().max().map_or(0, |page| *page as usize + FRAME_PAGES);
    let memory = SharedMemory::new(pages * PAGE_SIZE)?;
    let uffd = watch(&memory)?;
    let at: HashMap<u64, usize> = places.iter().copied().zip(0..).collect();
    let mut unpacker = Unpacker::new().context("cannot set up zstd")?;
    let unpack = |page: usize| {
        let frame = at.get(&(page as u64)).context("a fault on a page that nobody touches")?;
        let raw = unpacker.unpack(&frames[*frame]).context("cannot unpack a frame")?;
        memory.file().write_all_at(raw, (page * PAGE_SIZE) as u64).context("cannot write")?;
        map(&uffd, &memory, page, raw.len())
    };
    answering(&uffd, &memory, unpack, || {
        touch_all(&memory, places.len(), |index| places[order(index)])
    })
}

impl Answer {
    fn give(self, uffd: &Uffd, memory: &SharedMemory, page: usize) -> anyhow::Result<()> {
        match self {
            Self::Copy => memory.uffd_copy(uffd, &[1; PAGE_SIZE], page),
            Self::Continue { pages } => map(uffd, memory, page - page % pages, pages * PAGE_SIZE),
        }
    }
}

/// Maps part of the memory file, from page `first` on, by `UFFDIO_CONTINUE`.
fn map(uffd: &Uffd, memory: &SharedMemory, first: usize, len_bytes: usize) -> anyhow::Result<()> {
    let address = (memory.address() + first * PAGE_SIZE) as *mut _;
    uffd.r#continue(address, len_bytes, true).context("UFFDIO_CONTINUE failed")?;
    Ok(())
}

/// A userfaultfd that receives the faults on all pages of `memory` that are missing or not mapped.
fn watch(memory: &SharedMemory) -> anyhow::Result<Uffd> {
    let uffd = open()?;
    uffd.register_with_mode(
        memory.address() as *mut _,
        memory.len_bytes(),
        RegisterMode::MISSING | RegisterMode::MINOR,
    )
    .context("cannot register memory with userfaultfd")?;
    Ok(uffd)
}

/// Runs `with` while a thread answers the faults on `memory`, by page number.
fn answering<T>(
    uffd: &Uffd,
    memory: &SharedMemory,
    mut answer: impl FnMut(usize) -> anyhow::Result<()> + Send,
    with: impl FnOnce() -> T,
) -> anyhow::Result<T> {
    let serve = |done: &AtomicBool| {
        let served =
            answer_faults(uffd, done, |address| answer((address - memory.address()) / PAGE_SIZE));
        if served.is_err() {
            // Otherwise the touching thread would wait for ever.
            let _let_go = uffd.unregister(memory.address() as *mut _, memory.len_bytes());
        }
        served
    };
    beside(serve, with)
}

/// Takes faults until `done`, and calls `answer` with the address of each fault's page.
pub(crate) fn answer_faults(
    uffd: &Uffd,
    done: &AtomicBool,
    mut answer: impl FnMut(usize) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let patience = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
    while !done.load(Ordering::Relaxed) {
        poll(&mut [PollFd::new(uffd, PollFlags::IN)], Some(&patience)).context("poll failed")?;
        while let Some(event) = uffd.read_event().context("cannot read a fault")? {
            let Event::Pagefault { addr, .. } = event else {
                return Err(anyhow!("unexpected userfaultfd event {event:?}"));
            };
            answer(addr as usize & !(PAGE_SIZE - 1))?;
        }
    }
    Ok(())
}

fn allocate(memory: &SharedMemory) -> anyhow::Result<()> {
    fallocate(memory.file(), FallocateFlags::empty(), 0, memory.len_bytes() as u64)
        .context("cannot allocate memory")
}

/// A userfaultfd that also receives faults in the kernel, as when it runs a guest.
pub(crate) fn open() -> anyhow::Result<Uffd> {
    UffdBuilder::new()
        .close_on_exec(true)
        .non_blocking(true)
        .user_mode_only(false)
        .require_features(
            FeatureFlags::MISSING_SHMEM | FeatureFlags::from_bits_retain(FEATURE_MINOR_SHMEM),
        )
        .create()
        .context("userfaultfd is not available")
}
