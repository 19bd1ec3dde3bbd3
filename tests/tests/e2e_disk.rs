//! Disks of a running machine: at every cut, memory and disk are captured at the same instant.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use frazil_snapstore::pager::PagerOptions;
use frazil_snapstore::{PAGE_SIZE, Snapshot, SnapshotId, Store, StoreOptions};
use frazil_tests::vm_harness::{kvm_or_skip, wait_for};
use frazil_vmm::devices::serial::SerialOutput;
use frazil_vmm::disk::{DiskConfig, disk_name};
use frazil_vmm::memory::RAM_REGION;
use frazil_vmm::{
    CheckpointRequest, Guest, HostConfig, Loading, MachineConfig, Vm, verify_snapshot,
};
use vm_memory::{Bytes, GuestAddress};

/// Guest memory that the built-in guest leaves alone: one page per queue for its answers.
const ANSWERS_GPA: u64 = 0x5_0000;
const QUEUES: u64 = 3;
const DISK_BYTES: u64 = 5 << 20;

/// Returns the address of a queue's answer.
fn answer(number: u64) -> GuestAddress {
    GuestAddress(ANSWERS_GPA + number * PAGE_SIZE as u64)
}

/// Returns how many requests of a queue have been answered so far.
fn answered(vm: &Vm, number: u64) -> u64 {
    vm.ram().memory().read_obj(answer(number)).expect("RAM")
}

/// Acts as a device's queue: each request writes to the disk, then an answer to guest memory. The
/// request's number is written to both.
fn queue(vm: &Vm, number: u64, stop: &AtomicBool) {
    let disk = &vm.disks()[0];
    while !stop.load(Ordering::Relaxed) {
        let request = disk.begin();
        let turn = answered(vm, number) + 1;
        // Cycles through 100 of the queue's pages, and always writes its first page too.
        let page = number + QUEUES * (turn % 100);
        let mut sector = [0; 512];
        sector[..8].copy_from_slice(&turn.to_le_bytes());
        for page in [number, page] {
            request.write_at(page * PAGE_SIZE as u64, &sector).expect("it is written");
        }
        vm.ram().memory().write_obj(turn, answer(number)).expect("RAM");
        drop(request);
        if turn.is_multiple_of(64) {
            std::thread::yield_now();
        }
    }
}

fn word(snapshot: &Snapshot, region: &str, page: u64) -> u64 {
    let mut contents = [0; PAGE_SIZE];
    let region = snapshot.region(region).expect("the region");
    region.read_page(page, &mut contents).expect("a page");
    u64::from_le_bytes(contents[..8].try_into().expect("eight bytes"))
}

/// Checks that the disk in snapshot `id` has what memory says it has. Returns how many requests
/// were done at the cut.
fn check(store: &Arc<Store>, id: SnapshotId) -> u64 {
    let snapshot = store.snapshot(id).expect("the snapshot");
    let mut done = 0;
    for number in 0..QUEUES {
        let answered = word(&snapshot, RAM_REGION, ANSWERS_GPA / PAGE_SIZE as u64 + number);
        done += answered;
        if answered == 0 {
            continue;
        }
        let newest = number + QUEUES * (answered % 100);
        assert_eq!(word(&snapshot, &disk_name(0), number), answered, "queue {number}: its page");
        assert_eq!(
            word(&snapshot, &disk_name(0), newest),
            answered,
            "queue {number}: page {newest}"
        );
    }
    verify_snapshot(&snapshot).expect("the guest's memory is right");
    done
}

/// Stops the queues when dropped, also if the test panics.
struct Stopping<'a>(&'a AtomicBool);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Takes `count` checkpoints while queues are at work, and checks each. Returns the last.
fn checkpoints(vm: &Vm, store: &Arc<Store>, count: usize) -> SnapshotId {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stopping = Stopping(&stop);
        for number in 0..QUEUES {
            let stop = &stop;
            scope.spawn(move || queue(vm, number, stop));
        }
        // Requests done in the snapshot that the VM was resumed from do not count.
        let mut before = (0..QUEUES).map(|number| answered(vm, number)).sum();
        let mut last = None;
        for _ in 0..count {
            // Waits for something to save: checkpoints may come faster than queues get a core.
            wait_for("a request", || {
                ((0..QUEUES).map(|number| answered(vm, number)).sum::<u64>() > before).then_some(())
            });
            let report = vm.checkpoint(&CheckpointRequest::default()).expect("a checkpoint");
            assert!(report.stats.disk_pages > 0, "{report:?}");
            let done = check(store, report.id);
            assert!(done > before, "time goes on");
            (before, last) = (done, Some(report.id));
        }
        last.expect("at least one")
    })
}

/// Lets a disk request outlast the pause, so that the checkpoint fails; the guest must go on and
/// the next checkpoint must be whole. Returns the next snapshot.
fn a_failure_in_the_pause_costs_the_checkpoint_alone(
    vm: &Vm,
    store: &Arc<Store>,
    head: SnapshotId,
) -> SnapshotId {
    let loops = || -> u64 {
        let view = vm.workload().expect("counters");
        view.vcpus.iter().map(|cpu| cpu.control.loops).sum()
    };
    let before = vm.checkpoint_statistics();
    let request = vm.disks()[0].begin();
    let page = 1000;
    request.write_at(page * PAGE_SIZE as u64, &[7; 512]).expect("it is written");
    let failed = vm.checkpoint(&CheckpointRequest::default()).expect_err("the disk does not rest");
    assert!(failed.to_string().contains("requests are still in flight"), "{failed}");
    let after = vm.checkpoint_statistics();
    assert_eq!(after.totals.failed, before.totals.failed + 1);
    // The guest stood still while the checkpoint waited for the request.
    assert_eq!(after.pause_us.count, before.pause_us.count + 1);
    assert!(after.totals.pause_us_max >= 1_000_000, "{:?}", after.totals);
    assert_eq!((vm.head(), vm.is_paused(), vm.ended()), (Some(head), false, None));
    let stood_at = loops();
    wait_for("the guest to go on", || (loops() > stood_at).then_some(()));
    drop(request);
    vm.verify_workload().expect("it runs").expect("live memory is right");
    // Nothing that the failed checkpoint had collected is missing from the next.
    let report = vm.checkpoint(&CheckpointRequest::default()).expect("a checkpoint");
    assert_eq!(report.parent, Some(head));
    let snapshot = store.snapshot(report.id).expect("the snapshot");
    assert_eq!(word(&snapshot, &disk_name(0), page), u64::from_le_bytes([7; 8]));
    verify_snapshot(&snapshot).expect("the guest's memory is right");
    report.id
}

fn host(store: &Arc<Store>) -> HostConfig {
    HostConfig::new(SerialOutput::Null, Some(Arc::clone(store)))
}

#[test]
fn memory_and_disk_agree_at_every_cut() {
    if !kvm_or_skip() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("disk.img");
    let base: Vec<u8> = (0..DISK_BYTES).map(|index| (index / 512) as u8).collect();
    std::fs::write(&file, &base).expect("a disk");
    let store = Store::open_or_create(&folder.path().join("store"), StoreOptions::default())
        .expect("a store");
    let config = MachineConfig {
        disks: vec![DiskConfig { file: file.clone(), read_only: false, serial: None }],
        ..MachineConfig::new(
            "disks",
            48 << 20,
            1,
            Guest::Workload("touch=8MiB,rate=4000,report=0".parse().expect("a workload")),
        )
    };
    let vm = Vm::boot(&config, host(&store)).expect("it boots");
    vm.go().expect("it runs");
    let first = checkpoints(&vm, &store, 12);
    let first = a_failure_in_the_pause_costs_the_checkpoint_alone(&vm, &store, first);
    vm.stop();
    drop(vm);
    assert!(std::fs::read(&file).expect("the disk") == base, "the file stays as it is");
    // The file is not needed any more: the snapshot has all of it.
    std::fs::remove_file(&file).expect("it was there");

    for branch in 0..2 {
        let vm = resume(&store, first, branch == 0);
        let mut sector = [0; 512];
        let request = vm.disks()[0].begin();
        request.read_at(DISK_BYTES - 512, &mut sector).expect("it is read");
        drop(request);
        assert_eq!(sector[..], base[base.len() - 512..], "what nobody wrote to");
        vm.go().expect("it runs");
        let last = checkpoints(&vm, &store, 6);
        assert_eq!(store.snapshot(last).expect("it").region("disk0").expect("it").pages(), 1280);
    }
}

fn resume(store: &Arc<Store>, id: SnapshotId, lazy: bool) -> Vm {
    let snapshot = store.pin(id).expect("the snapshot");
    let loading = if lazy { Loading::lazy(PagerOptions::default()) } else { Loading::Eager };
    Vm::resume(&snapshot, "again".into(), host(store), loading).expect("it resumes")
}

/// Returns the contents of disk 0 in a snapshot.
fn disk_of(store: &Arc<Store>, id: SnapshotId) -> Vec<u8> {
    let region = store.snapshot(id).expect("it").region(&disk_name(0)).expect("a disk");
    let mut contents = vec![0; region.pages() as usize * PAGE_SIZE];
    region.read_pages(0, &mut contents).expect("pages");
    contents
}

#[test]
fn who_resumes_can_put_another_disk_in() {
    if !kvm_or_skip() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open_or_create(&folder.path().join("store"), StoreOptions::default())
        .expect("a store");
    // Holes, data and zeros in one image replace holes and data in the other.
    let image = |name: &str, pages: &[(u64, u8)]| {
        let path = folder.path().join(name);
        let file = std::fs::File::create(&path).expect("a file");
        file.set_len(DISK_BYTES).expect("a length");
        for (page, value) in pages {
            let bytes = [*value; PAGE_SIZE];
            std::os::unix::fs::FileExt::write_all_at(&file, &bytes, page * PAGE_SIZE as u64)
                .expect("a page");
        }
        path
    };
    let (one, other) = (
        image("one", &[(0, 1), (1, 1), (2, 1), (700, 1)]),
        image("other", &[(1, 2), (2, 1), (3, 0), (900, 2)]),
    );
    let config = MachineConfig {
        disks: vec![DiskConfig { file: one.clone(), read_only: false, serial: None }],
        ..MachineConfig::new(
            "disks",
            48 << 20,
            1,
            Guest::Workload("touch=1MiB,rate=100,report=0".parse().expect("a workload")),
        )
    };
    let vm = Vm::boot(&config, host(&store)).expect("it boots");
    let checkpoint = |vm: &Vm| vm.checkpoint(&CheckpointRequest::default()).expect("one").id;
    let first = checkpoint(&vm);
    drop(vm);
    let resume = |disks| {
        let snapshot = store.pin(first).expect("the snapshot");
        let host = HostConfig { disks, ..host(&store) };
        Vm::resume(&snapshot, "again".into(), host, Loading::Eager)
    };
    let bytes = |path: &Path| std::fs::read(path).expect("a file");
    let vm = resume(vec![(0, other.clone())]).expect("it resumes");
    let mut page = [0; PAGE_SIZE];
    for (number, value) in [(0, 0), (1, 2), (2, 1), (700, 0), (900, 2)] {
        vm.disks()[0].begin().read_at(number * PAGE_SIZE as u64, &mut page).expect("it is read");
        assert_eq!(page, [value; PAGE_SIZE], "page {number}");
    }
    let second = checkpoint(&vm);
    assert!(disk_of(&store, second) == bytes(&other), "what it has now");
    assert!(disk_of(&store, first) == bytes(&one), "what it had");
    // A rewind to either snapshot leaves nothing of the other's disk behind.
    vm.rewind_to(Some(&first.to_string())).expect("a rewind");
    assert!(disk_of(&store, checkpoint(&vm)) == bytes(&one));
    vm.rewind_to(Some(&second.to_string())).expect("a rewind");
    assert!(disk_of(&store, checkpoint(&vm)) == bytes(&other));
    drop(vm);

    let says = |disks, parts: &[&str]| {
        let error = resume(disks).expect_err("an error").to_string();
        parts.iter().for_each(|part| assert!(error.contains(part), "`{part}` in: {error}"));
    };
    let short = folder.path().join("short");
    std::fs::write(&short, [1; 512]).expect("a file");
    says(vec![(0, short)], &["short", "expected 5242880 bytes", "`disk0`", "found 512"]);
    says(vec![(1, other)], &["disk 1", "one of the machine's 1, counted from 0"]);
    says(vec![(0, folder.path().join("nowhere"))], &["nowhere"]);
}

/// Wrong `--disk` arguments of `frazil run` and `frazil resume`.
#[test]
fn wrong_disk_arguments_are_refused() {
    if !kvm_or_skip() {
        return;
    }
    let host = frazil_tests::vm_harness::Host::new();
    let workload = ["--workload", "touch=4MiB,rate=100,report=0", "--memory", "32MiB"];
    let run = |disk: &str| {
        let mut args = vec!["run", "--name", "odd", "--disk", disk];
        args.extend(workload);
        host.frazil(&args)
    };
    let odd = host.path("odd.img");
    std::fs::write(&odd, [1; 700]).expect("a file");
    run(path(&odd)).expect_code(1).expect_says(&["disk", "odd.img", "512"]);
    run(path(&host.path("nowhere.img"))).expect_code(1).expect_says(&["nowhere.img"]);
    run(",ro").expect_code(2).expect_says(&["FILE,ro"]);
    for wrong in ["disk0=x", "0=", "odd.img"] {
        let resume = ["resume", "x@latest", "--disk", wrong];
        host.frazil(&resume).expect_code(2).expect_says(&["such as 0=FILE"]);
    }
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a readable name")
}
