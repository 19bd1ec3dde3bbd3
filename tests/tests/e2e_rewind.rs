//! Rewinds running guests to snapshots in place: each time all memory is what the guest had written
//! by then, and what it does afterwards is right as well.

use std::sync::Arc;
use std::time::Duration;

use frazil_snapstore::pager::PagerOptions;
use frazil_snapstore::{PAGE_SIZE, PruneOptions, PruneProgress, SnapshotId, Store, StoreOptions};
use frazil_tests::memory_copy::MemoryCopy;
use frazil_tests::rng::Rng;
use frazil_tests::vm_harness::{
    Host, expect_sound, kvm_or_skip, number, text, uffd_or_skip, wait_for, wait_populated,
};
use frazil_vmm::devices::serial::SerialOutput;
use frazil_vmm::dirty::TrackerKind;
use frazil_vmm::disk::DiskConfig;
use frazil_vmm::{
    CheckpointRequest, Guest, HostConfig, Loading, MachineConfig, RewindPoint, Vm, verify_snapshot,
};
use serde_json::Value;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

const SPEC: &str = "touch=8MiB,rate=20000,report=0";
const RAM_BYTES: u64 = 48 << 20;

/// A guest that has written all its pages, and the store of its checkpoints.
struct Bed {
    vm: Vm,
    store: Arc<Store>,
    _folder: TempDir,
}

fn host(store: &Arc<Store>) -> HostConfig {
    HostConfig::new(SerialOutput::Null, Some(Arc::clone(store)))
}

impl Bed {
    fn new(cpus: usize, tracker: Option<TrackerKind>) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open_or_create(&folder.path().join("store"), StoreOptions::default())
            .expect("a store");
        let guest = Guest::Workload(SPEC.parse().expect("a workload"));
        let config = MachineConfig::new("rewind", RAM_BYTES, cpus, guest);
        let vm = Vm::boot(&config, HostConfig { tracker, ..host(&store) }).expect("it boots");
        vm.go().expect("it runs");
        wait_populated(&vm);
        Self { vm, store, _folder: folder }
    }

    fn point(&self, id: SnapshotId) -> RewindPoint {
        self.vm.rewind_point(&self.store.snapshot(id).expect("it")).expect("a point")
    }
}

fn checkpoint(vm: &Vm) -> SnapshotId {
    vm.checkpoint(&CheckpointRequest::default()).expect("a checkpoint").id
}

fn turns(vm: &Vm) -> u64 {
    vm.workload().expect("the workload").turns()
}

fn run_on(vm: &Vm, more: u64) {
    let from = turns(vm);
    wait_for("progress", || {
        assert_eq!(vm.ended(), None);
        (turns(vm) >= from + more).then_some(())
    });
}

fn verify(vm: &Vm) {
    vm.verify_workload().expect("it can be verified").expect("memory is right");
}

/// Verifies a snapshot's memory, and returns how many writes the workload had done.
fn verified_writes(store: &Arc<Store>, id: SnapshotId) -> u64 {
    verify_snapshot(&store.snapshot(id).expect("it")).expect("it is right").expect("ours").writes
}

/// Fails the test unless all memory of `vm`, which stands still, is that of snapshot `id`.
fn expect_is(vm: &Vm, store: &Arc<Store>, id: SnapshotId) {
    let region = store.snapshot(id).expect("it").region("ram").expect("RAM");
    let (mut stored, mut live) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    for page in 0..region.pages() {
        region.read_page(page, &mut stored).expect("a page");
        frazil_snapstore::PageSource::read_page(vm.ram().as_ref(), page, &mut live).expect("RAM");
        assert_eq!(stored, live, "page {page}");
    }
}

/// Takes a checkpoint, which must be a small change on top of `id` and verify. Returns its id.
fn expect_incremental(bed: &Bed, id: SnapshotId) -> SnapshotId {
    let report = bed.vm.checkpoint(&CheckpointRequest::default()).expect("a checkpoint");
    assert_eq!(report.parent, Some(id));
    assert!(report.stats.dirty_pages < RAM_BYTES / PAGE_SIZE as u64 / 2, "{report:?}");
    verified_writes(&bed.store, report.id);
    report.id
}

#[test]
fn every_tracker_and_any_number_of_vcpus_go_back_and_on() {
    if !kvm_or_skip() {
        return;
    }
    for (cpus, tracker) in [
        (1, TrackerKind::Ring),
        (1, TrackerKind::ManualBitmap),
        (2, TrackerKind::Bitmap),
        (3, TrackerKind::Ring),
    ] {
        let bed = Bed::new(cpus, Some(tracker));
        let id = checkpoint(&bed.vm);
        let then = verified_writes(&bed.store, id);
        let mut point = bed.point(id);
        for _ in 0..5 {
            run_on(&bed.vm, 300);
            bed.vm.pause().expect("it stops");
            let before = turns(&bed.vm);
            let report = bed.vm.rewind(&mut point).expect("it goes back");
            assert!(bed.vm.is_paused(), "it stands still as before");
            assert!(report.pages > 0 && (report.id, report.from) == (id, Some(id)), "{report:?}");
            let now = turns(&bed.vm);
            assert!(now < before && now.abs_diff(then) <= cpus as u64, "{then}: {before} to {now}");
            expect_is(&bed.vm, &bed.store, id);
            bed.vm.go().expect("it runs");
            run_on(&bed.vm, 100);
            verify(&bed.vm);
        }
        expect_incremental(&bed, id);
    }
}

#[test]
fn a_thousand_in_a_row() {
    if !kvm_or_skip() {
        return;
    }
    let bed = Bed::new(1, None);
    let id = checkpoint(&bed.vm);
    let mut point = bed.point(id);
    let mut read = 0;
    for round in 0..1000 {
        if round % 10 == 0 {
            run_on(&bed.vm, 20);
        }
        read += bed.vm.rewind(&mut point).expect("it goes back").read_pages;
        if round % 100 == 99 {
            verify(&bed.vm);
        }
    }
    let totals = bed.vm.rewind_totals();
    assert_eq!((totals.done, totals.failed), (1000, 0));
    assert!(read < totals.pages, "{read} read of {}", totals.pages);
    run_on(&bed.vm, 100);
    verify(&bed.vm);
    expect_incremental(&bed, id);
}

#[test]
fn ancestors_and_siblings() {
    if !kvm_or_skip() {
        return;
    }
    let bed = Bed::new(1, None);
    let mut line = vec![checkpoint(&bed.vm)];
    for _ in 0..3 {
        run_on(&bed.vm, 400);
        line.push(checkpoint(&bed.vm));
    }
    run_on(&bed.vm, 200);
    // To the oldest, and a branch from there.
    let report = bed.vm.rewind_to(Some("latest~3")).expect("it goes back");
    assert_eq!((report.id, report.from), (line[0], Some(line[3])));
    run_on(&bed.vm, 200);
    verify(&bed.vm);
    let branch = expect_incremental(&bed, line[0]);
    // To and fro between the branches.
    for id in [line[3], branch, line[1], line[3]] {
        bed.vm.pause().expect("it stops");
        bed.vm.rewind_to(Some(&id.to_string())).expect("it goes there");
        expect_is(&bed.vm, &bed.store, id);
        assert_eq!(bed.vm.head(), Some(id));
        bed.vm.go().expect("it runs");
        run_on(&bed.vm, 100);
        verify(&bed.vm);
    }
    expect_incremental(&bed, line[3]);
    expect_sound(&bed.store);
}

#[test]
fn half_resident_guests_go_back_too() {
    if !kvm_or_skip() || !uffd_or_skip() {
        return;
    }
    let bed = Bed::new(1, None);
    let first = checkpoint(&bed.vm);
    run_on(&bed.vm, 500);
    let second = checkpoint(&bed.vm);
    let Bed { vm, store, _folder: folder } = bed;
    drop(vm);
    let lazy = Loading::lazy(PagerOptions { background_fill: false, ..PagerOptions::default() });
    let snapshot = store.pin(second).expect("it");
    let vm = Vm::resume(&snapshot, "lazy".into(), host(&store), lazy).expect("it resumes");
    vm.go().expect("it runs");
    let bed = Bed { vm, store, _folder: folder };
    for id in [second, first, second] {
        std::thread::sleep(Duration::from_millis(20));
        bed.vm.rewind_to(Some(&id.to_string())).expect("it goes back");
        assert!(!bed.vm.pager_stats().expect("a pager").complete);
    }
    run_on(&bed.vm, 100);
    expect_incremental(&bed, second);
    bed.vm.pause().expect("it stops");
    bed.vm.rewind_to(Some(&first.to_string())).expect("it goes back");
    expect_is(&bed.vm, &bed.store, first);
    verify(&bed.vm);
}

#[test]
fn disks_go_back_with_memory() {
    if !kvm_or_skip() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("disk.img");
    std::fs::write(&file, vec![7; 1 << 20]).expect("a disk");
    let store = Store::open_or_create(&folder.path().join("store"), StoreOptions::default())
        .expect("a store");
    let guest = Guest::Workload(SPEC.parse().expect("a workload"));
    let disks = vec![DiskConfig { file, read_only: false, serial: None }];
    let config = MachineConfig { disks, ..MachineConfig::new("disks", RAM_BYTES, 1, guest) };
    let vm = Vm::boot(&config, host(&store)).expect("it boots");
    vm.go().expect("it runs");
    wait_populated(&vm);
    let disk = |page: u64| {
        let mut sector = [0; 512];
        vm.disks()[0].begin().read_at(page * 4096, &mut sector).expect("it is read");
        sector[0]
    };
    let write = |page: u64, value: u8| {
        vm.disks()[0].begin().write_at(page * 4096, &[value; 4096]).expect("it is written");
    };
    write(1, 1);
    let first = checkpoint(&vm);
    write(1, 2);
    write(2, 2);
    let second = checkpoint(&vm);
    write(2, 3);
    write(9, 3);
    let report = vm.rewind_to(None).expect("it goes back");
    assert_eq!((report.id, report.disk_pages), (second, 2));
    assert_eq!([1, 2, 3, 9].map(disk), [2, 2, 7, 7]);
    write(3, 0);
    vm.rewind_to(Some(&first.to_string())).expect("it goes back");
    assert_eq!([1, 2, 3, 9].map(disk), [1, 7, 7, 7]);
    write(4, 4);
    let third = vm.checkpoint(&CheckpointRequest::default()).expect("a checkpoint");
    assert_eq!((third.parent, third.stats.disk_pages), (Some(first), 1));
    let region = store.snapshot(third.id).expect("it").region("disk0").expect("the disk");
    let mut page = [0; PAGE_SIZE];
    for (number, value) in [(1, 1), (2, 7), (4, 4), (9, 7)] {
        region.read_page(number, &mut page).expect("a page");
        assert_eq!(page, [value; PAGE_SIZE], "page {number}");
    }
    verify(&vm);
}

/// A policy may forget the head of a running VM. The VM pins it, so it can still be rewound to, and
/// from.
#[test]
fn a_head_that_was_forgotten_is_a_place_still() {
    if !kvm_or_skip() {
        return;
    }
    let bed = Bed::new(1, None);
    let first = checkpoint(&bed.vm);
    run_on(&bed.vm, 200);
    let head = checkpoint(&bed.vm);
    bed.store.forget(&[head]).expect("it is forgotten");
    bed.store.prune(&PruneOptions::default(), &PruneProgress::default()).expect("it is pruned");
    run_on(&bed.vm, 200);
    bed.vm.pause().expect("it stops");
    let before = turns(&bed.vm);
    assert_eq!(bed.vm.rewind_to(None).expect("it goes back").id, head);
    assert!(turns(&bed.vm) < before, "it went back");
    verify(&bed.vm);
    assert_eq!(bed.vm.rewind_to(Some(&first.to_string())).expect("it goes back").id, first);
    expect_is(&bed.vm, &bed.store, first);
    // Nothing pins the old head any more.
    assert!(bed.vm.rewind_to(Some(&head.to_string())).is_err());
    bed.vm.go().expect("it goes on");
    run_on(&bed.vm, 200);
    expect_incremental(&bed, first);
    verify(&bed.vm);
}

/// Random lives: runs, checkpoints, rewinds to any snapshot, writes by the VMM, while the guest
/// runs or stands still. `FRAZIL_PROPERTY_SEED` runs a single one.
#[test]
fn random_lives() {
    if !kvm_or_skip() {
        return;
    }
    let given = std::env::var("FRAZIL_PROPERTY_SEED").ok().and_then(|seed| seed.parse().ok());
    let seeds = given.map_or(0..3, |seed: u64| seed..seed + 1);
    for seed in seeds {
        let trackers = [TrackerKind::Ring, TrackerKind::ManualBitmap, TrackerKind::Bitmap];
        let bed = Bed::new(1 + seed as usize % 2, Some(trackers[seed as usize % 3]));
        let mut rng = Rng::new(seed);
        let mut known = vec![checkpoint(&bed.vm)];
        for step in 0..60 {
            let at = format!("seed {seed}, step {step}");
            match rng.below(6) {
                0 => std::thread::sleep(Duration::from_millis(rng.below(20))),
                1 => known.push(checkpoint(&bed.vm)),
                2 => bed.vm.pause().expect(&at),
                3 => bed.vm.go().expect(&at),
                4 => {
                    // Behind the guest's data.
                    let page = RAM_BYTES / PAGE_SIZE as u64 - 1 - rng.below(50);
                    let address = GuestAddress(page * PAGE_SIZE as u64);
                    bed.vm.ram().memory().write_obj(rng.bits(), address).expect(&at);
                }
                _ => {
                    let id = known[rng.below(known.len() as u64) as usize];
                    bed.vm.rewind_to(Some(&id.to_string())).expect(&at);
                    if bed.vm.is_paused() {
                        let stored = MemoryCopy::of_snapshot(&bed.store.snapshot(id).expect(&at));
                        let apart = stored.differences(&MemoryCopy::of_ram(bed.vm.ram()));
                        assert_eq!(apart, [0_usize; 0], "{at}");
                    }
                }
            }
        }
        bed.vm.pause().expect("it stops");
        let last = checkpoint(&bed.vm);
        let stored = MemoryCopy::of_snapshot(&bed.store.snapshot(last).expect("it"));
        let apart = stored.differences(&MemoryCopy::of_ram(bed.vm.ram()));
        assert_eq!(apart, [0_usize; 0], "seed {seed}: the last checkpoint has all of memory");
        verify(&bed.vm);
        expect_sound(&bed.store);
    }
}

#[test]
fn what_cannot_be_is_said_and_the_guest_goes_on() {
    if !kvm_or_skip() {
        return;
    }
    let bed = Bed::new(1, None);
    let says = |reference: Option<&str>, parts: &[&str]| {
        let error = bed.vm.rewind_to(reference).expect_err("it cannot be").to_string();
        parts.iter().for_each(|part| assert!(error.contains(part), "`{part}` in: {error}"));
    };
    says(None, &["no snapshot to go back to", "checkpoint"]);
    let own = checkpoint(&bed.vm);
    says(Some("nonsense"), &["nonsense"]);
    says(Some("latest~7"), &["latest~7"]);
    for (ram_bytes, cpus, what) in [(RAM_BYTES * 2, 1, "RAM"), (RAM_BYTES, 2, "vCPUs")] {
        let guest = Guest::Workload("touch=1MiB,report=0".parse().expect("a workload"));
        let config = MachineConfig::new("other", ram_bytes, cpus, guest);
        let other = Vm::boot(&config, host(&bed.store)).expect("it boots");
        let id = checkpoint(&other);
        says(Some(&id.to_string()), &["another machine", what, "resume"]);
    }
    run_on(&bed.vm, 50);
    verify(&bed.vm);
    assert_eq!(bed.vm.head(), Some(own));
    let snapshot = bed.store.snapshot(own).expect("it");
    let alone = HostConfig::new(SerialOutput::Null, None);
    let storeless =
        Vm::resume(&snapshot, "alone".into(), alone, Loading::Eager).expect("it resumes");
    let error = storeless.rewind_to(None).expect_err("no store").to_string();
    assert!(error.contains("no store"), "{error}");
}

/// Returns the fields that differ between the states of two snapshots, as `chunk: field`.
fn state_fields(host: &Host, a: &str, b: &str) -> Vec<String> {
    let found = host.json(&["diff", &host.at(a), &host.at(b)]);
    let mut all = Vec::new();
    for state in found["state"].as_array().expect("a list") {
        let fields = state["fields"].as_array().expect("a list");
        assert_eq!(state["change"], "changed", "{state}");
        let name = |field: &Value| format!("{}: {}", text(state, "name"), text(field, "path"));
        all.extend(fields.iter().map(name));
    }
    all
}

/// A machine that was rewound and has not run since is saved with the state it was rewound to.
#[test]
fn processors_and_interrupt_controllers_go_back_too() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let vm =
        host.run("state", "touch=8MiB,rate=4000,report=0", &["--memory", "32MiB", "--cpus", "2"]);
    vm.wait_populated();
    let first = host.json(&["checkpoint", "state"]);
    for _ in 0..5 {
        vm.wait_beyond(vm.turns() + 400);
        let _paused = host.ok(&["pause", "state"]);
        let there = host.json(&["checkpoint", "state"]);
        let moved = state_fields(&host, text(&first, "id"), text(&there, "id"));
        for cpu in ["vcpu0", "vcpu1"] {
            let elsewhere = |field: &String| field.starts_with(cpu) && field.contains("regs.");
            assert!(moved.iter().any(elsewhere), "{cpu} was elsewhere: {moved:#?}");
        }
        let _back = host.ok(&["rewind", "state", text(&first, "id")]);
        let again = host.json(&["checkpoint", "state"]);
        let apart = state_fields(&host, text(&first, "id"), text(&again, "id"));
        // Times are not taken back.
        let time = |field: &String| {
            field.ends_with(": msrs[0x10].value")
                || field.starts_with("pit: ") && field.ends_with(".count_load_time")
                || field == "clock: kvmclock_ns"
                || field == "clock: realtime_ns"
        };
        let apart: Vec<String> = apart.into_iter().filter(|field| !time(field)).collect();
        assert_eq!(apart, [""; 0]);
        let _goes = host.ok(&["continue", "state"]);
    }
    vm.verify_workload();
}

#[test]
fn the_command_takes_a_vm_back() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let vm = host.run("back", "touch=8MiB,rate=4000,report=0", &["--memory", "32MiB"]);
    vm.wait_populated();
    host.frazil(&["rewind", "back"]).expect_code(1).expect_says(&["no snapshot"]);
    let first = host.json(&["checkpoint", "back", "--tag", "gold"]);
    let then = vm.turns();
    vm.wait_beyond(then + 400);
    let second = host.json(&["checkpoint", "back"]);
    vm.wait_beyond(then + 800);
    let at = host.at("latest~1");
    for reference in ["gold", &at, &text(&first, "id")[..12]] {
        let report = host.json(&["rewind", "back", reference]);
        assert_eq!(report["id"], first["id"]);
        assert!(number(&report, "pages") > 0 && number(&report, "pause_us") > 0);
        vm.verify_workload();
    }
    assert_eq!(host.json(&["rewind", "back"])["id"], first["id"], "the head is where it went");
    assert!(host.ok(&["rewind", "back", "latest"]).stdout.contains(&text(&second, "id")[..8]));
    host.frazil(&["rewind", "back", "nothing"]).expect_code(1).expect_says(&["nothing"]);
    host.frazil(&["rewind", "back", "/elsewhere@latest"])
        .expect_code(1)
        .expect_says(&["own store", "/elsewhere"]);
    assert_eq!(number(&vm.get("/vm")["rewinds"], "done"), 5);
    let third = host.json(&["checkpoint", "back"]);
    assert_eq!(third["parent"], second["id"]);
    vm.verify_workload();
    assert!(host.verify_all() > 0);
}
