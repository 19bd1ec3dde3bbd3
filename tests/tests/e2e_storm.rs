//! Guests that write faster than pages can be saved: pages are left in place, copy-on-write, and
//! every snapshot is memory as it was at its cut.

use std::sync::Arc;

use frazil_snapstore::pager::PagerOptions;
use frazil_tests::populated::{Populated, populated};
use frazil_tests::vm_harness::{kvm_or_skip, uffd_or_skip};
use frazil_vmm::devices::serial::SerialOutput;
use frazil_vmm::dirty::TrackerKind;
use frazil_vmm::{CheckpointRequest, CheckpointStats, HostConfig, Loading, Vm, verify_snapshot};

/// Far less than the guests make dirty, in bytes.
const SMALL_STAGING_BYTES: u64 = 2 << 20;

/// Takes checkpoints of a guest with two vCPUs that writes to 64 MiB as fast as it can; verifies
/// each.
fn storm(pattern: &str, tracker: TrackerKind, staging_bytes: u64) -> Vec<CheckpointStats> {
    let load = format!("touch=64MiB,rate=max,pattern={pattern},content=text");
    let Populated { folder: _folder, store, vm } = populated(&load, 2, |_, _, host| {
        (host.tracker, host.staging_bytes) = (Some(tracker), staging_bytes);
    });
    let mut all = Vec::new();
    for round in 0..4 {
        let report = vm.checkpoint(&CheckpointRequest::default()).expect("a checkpoint");
        let snapshot = store.snapshot(report.id).expect("the snapshot");
        if let Err(error) = verify_snapshot(&snapshot) {
            panic!("{pattern}, {tracker}, round {round}: {error}: {:?}", report.stats);
        }
        all.push(report.stats);
    }
    vm.verify_workload().expect("it is asked").expect("the guest's own memory is right");
    all
}

fn sum(all: &[CheckpointStats], of: impl Fn(&CheckpointStats) -> u64) -> u64 {
    all.iter().map(of).sum()
}

#[test]
fn what_is_too_much_to_copy_is_left_in_place() {
    if !kvm_or_skip() || !uffd_or_skip() {
        return;
    }
    for (pattern, tracker) in [
        ("uniform", TrackerKind::Ring),
        ("seq", TrackerKind::ManualBitmap),
        ("hot", TrackerKind::Bitmap),
    ] {
        let all = storm(pattern, tracker, 1 << 20);
        let protected = sum(&all, |stats| stats.protected_pages);
        assert!(protected > 3_000, "{pattern}: {protected} pages were left in place");
        let copied = sum(&all, |stats| stats.cow_pages);
        assert!(copied > 100, "{pattern}: {copied} pages were copied for the guest");
    }
}

/// Memory that is still being paged in cannot be left in place. The guest is slowed down instead,
/// so that neither the pause nor the number of pages copied aside grows with the number of dirty
/// pages.
#[test]
fn a_guest_whose_pages_cannot_be_left_in_place_is_slowed_down() {
    if !kvm_or_skip() || !uffd_or_skip() {
        return;
    }
    let load = "touch=64MiB,rate=max,pattern=seq,content=edit";
    let Populated { folder: _folder, store, vm } =
        populated(load, 1, |_, _, host| host.staging_bytes = SMALL_STAGING_BYTES);
    let taken = vm.checkpoint(&CheckpointRequest { exit: true, ..Default::default() });
    let snapshot = store.snapshot(taken.expect("a checkpoint").id).expect("the snapshot");
    drop(vm);
    let options = PagerOptions { background_fill: false, ..PagerOptions::default() };
    let host = HostConfig {
        staging_bytes: SMALL_STAGING_BYTES,
        ..HostConfig::new(SerialOutput::Null, Some(Arc::clone(&store)))
    };
    let vm = Vm::resume(&snapshot, "lazy".into(), host, Loading::lazy(options)).expect("resumes");
    vm.go().expect("it runs");
    for round in 0..3 {
        std::thread::sleep(std::time::Duration::from_millis(500));
        let pager = vm.pager_stats().expect("a pager");
        assert!(!pager.complete, "else nothing is shown: {pager:?}");
        let report = vm.checkpoint(&CheckpointRequest::default()).expect("a checkpoint");
        let stats = report.stats;
        assert_eq!(stats.protected_pages, 0, "{stats:?}");
        assert!(stats.dirty_pages > 4 * SMALL_STAGING_BYTES / 4096, "{stats:?}");
        // A checkpoint is cut when at most 2,048 dirty pages remain; how many are added depends on
        // how soon the guest can be stopped then.
        assert!(stats.cut_pages < stats.dirty_pages / 2, "{stats:?}");
        assert!(stats.throttled_us > 0 && stats.throttle_percent >= 50, "{stats:?}");
        verify_snapshot(&store.snapshot(report.id).expect("the snapshot"))
            .unwrap_or_else(|error| panic!("round {round}: {error}: {stats:?}"));
        eprintln!("{stats:?}");
    }
    vm.verify_workload().expect("it is asked").expect("the guest's own memory is right");
}

/// With room for everything, pages are copied aside, and copied again or protected if the guest
/// writes to them as fast as they are copied.
#[test]
fn what_can_be_copied_is_copied() {
    if !kvm_or_skip() {
        return;
    }
    let all = storm("uniform", TrackerKind::Ring, 256 << 20);
    let staged = sum(&all, |stats| stats.staged_pages);
    assert!(staged > 10_000, "{staged} pages were copied aside");
}
