//! While a checkpoint pauses a guest, no thread involved allocates memory: the allocator's lock, or
//! the kernel's for fresh pages, may be held by a thread that is in no hurry.
//!
//! `unsafe` is allowed here for the watching allocator. It serves the whole process, so this test
//! is in a file of its own.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

use frazil_tests::populated::populated;
use frazil_tests::vm_harness::{kvm_or_skip, uffd_or_skip};
use frazil_vmm::checkpoint::PAUSE_SPAN;
use frazil_vmm::dirty::TrackerKind;
use frazil_vmm::disk::DiskConfig;
use frazil_vmm::{CheckpointRequest, CheckpointStats};
use tracing::span;

thread_local! {
    /// True while this thread is in a pause.
    static IN_PAUSE: Cell<bool> = const { Cell::new(false) };
}
/// How often a thread has entered a pause.
static PAUSES: AtomicUsize = AtomicUsize::new(0);
/// Number of allocations during pauses.
static ASKED: AtomicUsize = AtomicUsize::new(0);
/// Size of the last such allocation, in bytes.
static LAST_BYTES: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, which notes allocations during pauses.
struct Watching;

fn note(layout: Layout) {
    if IN_PAUSE.get() {
        ASKED.fetch_add(1, Ordering::SeqCst);
        LAST_BYTES.store(layout.size(), Ordering::SeqCst);
    }
}

// SAFETY: every call goes to the system allocator with the same arguments; `note` allocates
// nothing.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout);
        // SAFETY: the caller upholds the trait's contract, which is the system allocator's too.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above; the memory came from the system allocator.
        unsafe { System.dealloc(pointer, layout) };
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

/// Subscribes to the spans of pauses, and to nothing else.
struct Pauses;

impl tracing::Subscriber for Pauses {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.name() == PAUSE_SPAN
    }

    fn new_span(&self, _attributes: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _span: &span::Id, _values: &span::Record<'_>) {}

    fn record_follows_from(&self, _span: &span::Id, _follows: &span::Id) {}

    fn event(&self, _event: &tracing::Event<'_>) {}

    fn enter(&self, _span: &span::Id) {
        IN_PAUSE.set(true);
        PAUSES.fetch_add(1, Ordering::SeqCst);
    }

    fn exit(&self, _span: &span::Id) {
        IN_PAUSE.set(false);
    }
}

/// Takes four checkpoints of a guest with two vCPUs and all devices that need nothing from the
/// host.
fn checkpoints(load: &str, tracker: TrackerKind, staging_bytes: u64) -> Vec<CheckpointStats> {
    let guest = populated(load, 2, |folder, config, host| {
        let file = folder.join("disk.img");
        std::fs::File::create(&file).and_then(|disk| disk.set_len(8 << 20)).expect("a disk");
        config.disks = vec![DiskConfig { file, read_only: false, serial: None }];
        (host.tracker, host.staging_bytes) = (Some(tracker), staging_bytes);
    });
    let take = |_| guest.vm.checkpoint(&CheckpointRequest::default()).expect("a checkpoint").stats;
    (0..4).map(take).collect()
}

#[test]
fn nothing_is_allocated_while_the_guest_stands_still() {
    if !kvm_or_skip() || !uffd_or_skip() {
        return;
    }
    tracing::subscriber::set_global_default(Pauses).expect("there is none yet");
    IN_PAUSE.set(true);
    drop(std::hint::black_box(Box::new(7_u64)));
    IN_PAUSE.set(false);
    assert_eq!((ASKED.swap(0, Ordering::SeqCst), LAST_BYTES.load(Ordering::SeqCst)), (1, 8));

    let steady = "touch=64MiB,rate=2000,pattern=uniform,content=text";
    let storm = "touch=64MiB,rate=max,pattern=uniform,content=text";
    for tracker in [TrackerKind::Ring, TrackerKind::ManualBitmap, TrackerKind::Bitmap] {
        for (load, staging_bytes) in [(steady, 64 << 20), (storm, 1 << 20)] {
            let before = PAUSES.load(Ordering::SeqCst);
            let all = checkpoints(load, tracker, staging_bytes);
            // The checkpoint's thread, and one per vCPU.
            assert_eq!(PAUSES.load(Ordering::SeqCst) - before, 3 * all.len());
            let (asked, bytes) = (ASKED.load(Ordering::SeqCst), LAST_BYTES.load(Ordering::SeqCst));
            assert_eq!(asked, 0, "{load}, {tracker}: the last time {bytes} bytes: {all:#?}");
            // Both ways to cut are used: pages copied, and pages protected in place.
            let protected: u64 = all.iter().map(|stats| stats.protected_pages).sum();
            assert!(protected > 0 || load == steady, "{all:#?}");
        }
    }
}
