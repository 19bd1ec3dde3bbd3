//! The same guest resumed as others do it, from uncompressed memory that is ready in a file: by
//! mapping that file privately, and by a userfaultfd whose handler copies one page per fault.
//!
//! Each starts where `Vm::resume` does, in this process: a command would add the same to all of
//! them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::Context;
use frazil_snapstore::PAGE_SIZE;
use frazil_snapstore::pager::{Image, Mapping, PagerOptions};
use frazil_vmm::memory::{RAM_REGION, ram_extents};
use frazil_vmm::{Loading, shared_image};
use rustix::fs::{FallocateFlags, fallocate};
use userfaultfd::{RegisterMode, Uffd};

use super::{Bed, beside, sweeps};
use crate::bench::Bench;
use crate::machine::Machine;
use crate::metric::Metric;
use crate::raw;
use crate::samples::Samples;
use crate::suites::floors;

/// How a guest is resumed.
#[derive(Clone, Copy, Debug)]
enum ResumeMethod {
    Ours,
    MapPrivate,
    UffdCopy,
}

const METHODS: [(&str, ResumeMethod, usize); 3] = [
    ("lazy", ResumeMethod::Ours, 3),
    ("map_private", ResumeMethod::MapPrivate, 3),
    ("uffd_copy", ResumeMethod::UffdCopy, 1),
];

pub(super) fn measure(bench: &mut Bench, seq: &Bed, shuffle: &Bed) -> anyhow::Result<()> {
    for (order, bed) in [("seq", seq), ("random", shuffle)] {
        let raw = RawMemory::of(bed)?;
        let floor_ms = sweeps::populated(bed, bench.runs(3))?.ms(0.5);
        for (name, method, usual) in METHODS {
            let (mut ready, mut swept) = (Samples::new(), Samples::new());
            for _ in 0..bench.runs(usual) {
                let (first, all) = raw.resume(bed, method)?;
                ready.add_time(first);
                swept.add_time(all);
            }
            let n = ready.n();
            let metric = |what: &str| bed.metric(&format!("{name}_{what}"));
            if order == "seq" {
                bench.emit(Metric::new(metric("ready"), ready.ms(0.5), "ms", n))?;
            }
            let sweep = Metric::new(metric(&format!("sweep_{order}")), swept.ms(0.5), "ms", n);
            bench.emit(sweep.against(floor_ms))?;
        }
    }
    Ok(())
}

/// A snapshot's memory in a file, and in an image that has none of it.
struct RawMemory {
    /// The memory in `file`: mapped privately, it becomes the guest's memory.
    full: Arc<Image>,
    file: File,
    /// An image that claims to be complete, but whose memory is emptied: every page is missing.
    hollow: Arc<Image>,
}

impl RawMemory {
    fn of(bed: &Bed) -> anyhow::Result<Self> {
        let path = bed.folder.path().join("memory");
        let file = File::options().read(true).write(true).create_new(true).open(&path);
        let file = file.with_context(|| format!("cannot create {}", path.display()))?;
        file.set_len(bed.ram_bytes).context("cannot grow the memory file")?;
        let region = bed.snapshot.region(RAM_REGION)?;
        let full = Image::new(region, &file, &ram_extents(bed.ram_bytes))?;
        full.load_all().context("cannot load the snapshot")?;
        file.sync_all().context("cannot write the memory file")?;
        let hollow = shared_image(&bed.snapshot)?;
        hollow.load_all().context("cannot load the snapshot")?;
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(hollow.memory(), punch, 0, bed.ram_bytes).context("cannot empty a memfd")?;
        Ok(Self { full: Arc::new(full), file, hollow })
    }

    /// Returns the times until the guest makes progress, and until it has written every page.
    fn resume(&self, bed: &Bed, method: ResumeMethod) -> anyhow::Result<(Duration, Duration)> {
        let complete = |image| Loading::Shared(Arc::clone(image), PagerOptions::default());
        let loading = match method {
            ResumeMethod::Ours => Loading::lazy(PagerOptions::default()),
            ResumeMethod::MapPrivate => complete(&self.full),
            ResumeMethod::UffdCopy => complete(&self.hollow),
        };
        let started = Instant::now();
        let machine = Machine::resume(&bed.snapshot, loading)?;
        let run = || {
            let (first, swept) = machine.go_for(machine.data_pages)?;
            Ok((first - started, swept))
        };
        if !matches!(method, ResumeMethod::UffdCopy) {
            return run();
        }
        let uffd = floors::open_uffd()?;
        for mapping in machine.vm.ram().mappings() {
            uffd.register_with_mode(
                mapping.address as *mut _,
                mapping.len_bytes,
                RegisterMode::MISSING,
            )
            .context("cannot register guest memory with userfaultfd")?;
        }
        let serve = |done: &AtomicBool| {
            let served = floors::answer_faults(&uffd, done, |at| self.copy_in(&uffd, &machine, at));
            if served.is_err() {
                // Otherwise the guest would wait for ever.
                machine.vm.stop();
            }
            served
        };
        beside(serve, run)?
    }

    /// Copies the faulting page at `address` from the file to the guest.
    fn copy_in(&self, uffd: &Uffd, machine: &Machine, address: usize) -> anyhow::Result<()> {
        let inside = |mapping: Mapping| {
            let offset = address.checked_sub(mapping.address)?;
            (offset < mapping.len_bytes).then(|| mapping.file_offset + offset as u64)
        };
        let offset = machine.vm.ram().mappings().into_iter().find_map(inside);
        let mut page = [0; PAGE_SIZE];
        self.file
            .read_exact_at(&mut page, offset.context("a fault outside guest memory")?)
            .context("cannot read memory")?;
        raw::uffd_copy_to_guest(machine.vm.ram(), uffd, &page, address)
    }
}
