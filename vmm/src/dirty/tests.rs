//! Checks every tracker on a real KVM against an oracle: a copy of memory, compared byte by byte.

use std::sync::Arc;
use std::time::Duration;

use frazil_snapstore::{PAGE_SIZE, Page, PageSet, PageSource};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::serial::SerialOutput;
use crate::{Guest, HostConfig, MachineConfig, Vm};

const KINDS: [TrackerKind; 3] = [TrackerKind::Ring, TrackerKind::ManualBitmap, TrackerKind::Bitmap];

/// True if guests can run here; otherwise prints that the test is skipped.
fn kvm_or_skip() -> bool {
    let there = std::path::Path::new("/dev/kvm").exists();
    if !there {
        eprintln!("SKIPPED: there is no /dev/kvm on this machine, and this test runs guests");
    }
    there
}

fn boot(kind: TrackerKind, ram_bytes: u64, cpus: usize, spec: &str) -> Vm {
    let config =
        MachineConfig::new("tracked", ram_bytes, cpus, Guest::Workload(spec.parse().unwrap()));
    let host = HostConfig { tracker: Some(kind), ..HostConfig::new(SerialOutput::Null, None) };
    Vm::boot(&config, host).unwrap()
}

/// A copy of all of RAM, and the pages reported since the last [`Self::check`].
struct Oracle<'a> {
    vm: &'a Vm,
    copy: Vec<Page>,
    reported: PageSet,
}

impl<'a> Oracle<'a> {
    fn new(vm: &'a Vm) -> Self {
        let pages = vm.ram().end_page();
        let copy = vec![[0; PAGE_SIZE]; pages as usize];
        Self { vm, copy, reported: PageSet::new(pages) }
    }

    fn harvest(&mut self) {
        self.vm.line.lock().unwrap().tracker.harvest(&mut self.reported).unwrap();
    }

    fn harvest_at_cut(&mut self) {
        self.vm.line.lock().unwrap().tracker.harvest_at_cut(&mut self.reported).unwrap();
    }

    /// Checks that every page that differs from the copy was reported, and updates the copy. The
    /// guest must be stopped and the last harvest done. Returns how many pages differed and how
    /// many were reported.
    fn check(&mut self) -> (u64, u64) {
        let (mut differed, mut now) = (0, [0; PAGE_SIZE]);
        for (page, copy) in self.copy.iter_mut().enumerate() {
            self.vm.ram().read_page(page as u64, &mut now).unwrap();
            if now != *copy {
                assert!(self.reported.contains(page as u64), "page {page} changed unnoticed");
                differed += 1;
                *copy = now;
            }
        }
        let reported = self.reported.count();
        self.reported.clear();
        (differed, reported)
    }
}

/// Two vCPUs write without pause to more pages than a ring has entries, while harvests come at any
/// moment.
#[test]
fn every_page_that_changed_is_reported() {
    if !kvm_or_skip() {
        return;
    }
    for kind in KINDS {
        let vm = boot(kind, 96 << 20, 2, "rate=0,pattern=uniform,content=edit,report=0");
        assert_eq!(vm.line.lock().unwrap().tracker.kind(), kind);
        vm.ram().memory().write_slice(&[1; 3], GuestAddress(0x7_7ffe)).unwrap();
        let mut oracle = Oracle::new(&vm);
        let mut most = 0;
        for round in 0..12 {
            vm.go().unwrap();
            for _ in 0..round % 4 {
                std::thread::sleep(Duration::from_millis(round));
                oracle.harvest();
            }
            // Long enough to fill a ring, now and then.
            std::thread::sleep(Duration::from_millis(if round % 5 == 0 { 400 } else { 5 }));
            vm.pause().unwrap();
            // The VMM's own writes are reported too.
            let gpa = GuestAddress(0x7_8000 + round * 4096);
            vm.ram().memory().write_slice(&[round as u8 + 1; 9], gpa).unwrap();
            oracle.harvest_at_cut();
            assert!(oracle.reported.contains(gpa.0 / 4096), "{kind}: what the VMM wrote");
            let (differed, _) = oracle.check();
            most = most.max(differed);
        }
        assert!(most > 5000, "{kind}: the guest wrote little: {most} pages at most");
        let was_full = vm.vcpus.exits().ring_full > 0;
        assert_eq!(was_full, kind == TrackerKind::Ring, "{kind}: rings that were full");
    }
}

/// Only written pages are reported, except those that a harvest at the cut left untracked.
#[test]
fn no_page_is_reported_for_nothing() {
    if !kvm_or_skip() {
        return;
    }
    for kind in KINDS {
        let vm = boot(kind, 64 << 20, 1, "touch=8MiB,rate=20000,content=edit,report=0");
        let mut oracle = Oracle::new(&vm);
        for _ in 0..5 {
            vm.go().unwrap();
            std::thread::sleep(Duration::from_millis(30));
            vm.pause().unwrap();
            oracle.harvest();
            let (differed, reported) = oracle.check();
            assert!(differed > 0 && reported <= differed + 64, "{kind}: {reported} for {differed}");
            // The guest is paused.
            oracle.harvest();
            assert!(oracle.reported.is_empty(), "{kind}: reported twice");
            oracle.harvest_at_cut();
            assert!(oracle.reported.is_empty(), "{kind}: reported at the cut");
        }
        // After a harvest at the cut its pages may be reported once more, but not twice.
        vm.go().unwrap();
        std::thread::sleep(Duration::from_millis(30));
        vm.pause().unwrap();
        oracle.harvest_at_cut();
        let first = oracle.check().1;
        oracle.harvest();
        assert!(oracle.reported.count() <= first, "{kind}");
        oracle.check();
        oracle.harvest();
        assert!(oracle.reported.is_empty(), "{kind}: reported for ever");
    }
}

/// Kicks come while a full ring is being emptied, which KVM leaves half done when a signal is
/// pending.
#[test]
fn kicks_at_any_moment_lose_no_page() {
    if !kvm_or_skip() {
        return;
    }
    let vm = boot(TrackerKind::Ring, 96 << 20, 1, "rate=0,pattern=seq,content=edit,report=0");
    let mut oracle = Oracle::new(&vm);
    for round in 0..40 {
        for _ in 0..25 {
            vm.go().unwrap();
            std::thread::sleep(Duration::from_micros(500 * (round % 7)));
            vm.pause().unwrap();
        }
        oracle.harvest_at_cut();
        oracle.check();
    }
    assert!(vm.vcpus.exits().ring_full > 10, "{:?}", vm.vcpus.exits());
}

#[test]
fn what_the_vmm_writes_while_it_is_harvested_is_not_lost() {
    let writes = Arc::new(VmmWrites::new(512 << 20));
    let pages = (512_u64 << 20) / PAGE_SIZE as u64;
    let mut found = PageSet::new(pages);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2_u64)
            .map(|half| {
                let writes = Arc::clone(&writes);
                scope.spawn(move || {
                    use vm_memory::bitmap::Bitmap;
                    // Each page once, so that no later write can set a lost bit again.
                    for index in 0..pages / 2 {
                        let page = index * 2 + half;
                        writes.mark_dirty(page as usize * PAGE_SIZE + 17, 1);
                    }
                })
            })
            .collect();
        while threads.iter().any(|thread| !thread.is_finished()) {
            writes.harvest(0, &mut found);
        }
    });
    writes.harvest(0, &mut found);
    assert_eq!(found.count(), pages);
}
