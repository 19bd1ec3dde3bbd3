//! The memory balloon (virtio 1.2, 5.5): pages that the guest lends to the host, and reports of
//! pages that it does not use. Their contents are discarded, so snapshots need not keep them.
//!
//! Queues are numbered as Linux numbers them behind MMIO, without gaps: inflate, deflate, reports.
//! A page that the guest takes back is zero, as new memory is, so deflating takes no work.
//!
//! The device's thread frees one piece at a time. If somebody waits for the device to be still, or
//! a vCPU for one of its queues, the rest of a chain is left as it is: freeing pages is optional.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use frazil_snapstore::PAGE_SIZE;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vm_memory::{Address, GuestAddress, GuestMemory as _, Permissions};
use vmm_sys_util::eventfd::EventFd;

use super::buffers::Buffers;
use super::free_pages::FreePages;
use super::gate::WorkGate;
use super::link::Link;
use super::queue::{Chain, Violation, bit};
use super::saved::SavedDevice;
use super::worker::{Worker, doorbell, ring, serve_when_rung};
use super::{StateMismatch, Still, VirtioDevice};
use crate::confine::Role;
use crate::error::Result;
use crate::memory::GuestMemory;

/// The guest may take pages back when it runs out of memory (5.5.3).
const DEFLATE_ON_OOM: u64 = bit(2);
/// The guest may report free pages.
const REPORTING: u64 = bit(5);

const QUEUE_SIZE: u16 = 128;
const INFLATE: u16 = 0;
const QUEUES: [u16; 3] = [QUEUE_SIZE; 3];
const REPORTS: u16 = 2;

/// Offset of `actual` in the configuration space, after `num_pages`.
const ACTUAL: u64 = 4;
const PAGE_BYTES: u64 = PAGE_SIZE as u64;
/// Bytes freed between two checks of whether somebody waits: zeroing that much takes some 30 µs.
const PIECE_BYTES: u64 = 256 << 10;
/// How many page numbers of one inflating chain are looked at. Linux sends 256.
const PAGES_MAX: u64 = 4096;

/// A memory balloon.
#[derive(Debug)]
pub struct Balloon {
    parts: Arc<Parts>,
    link: OnceLock<Arc<Link>>,
    doorbell: Arc<EventFd>,
    in_place: bool,
    worker: OnceLock<Worker>,
}

#[derive(Debug)]
struct Parts {
    free: Arc<dyn FreePages>,
    /// Pages that the host asks for.
    target: AtomicU32,
    /// Pages that the guest says it has given.
    actual: AtomicU32,
    gate: WorkGate,
}

impl Balloon {
    /// Creates an empty balloon that hands pages to `free`.
    ///
    /// # Errors
    /// [`VmmError::Host`](crate::VmmError::Host) if an eventfd cannot be created.
    pub fn new(free: Arc<dyn FreePages>) -> Result<Self> {
        let parts = Arc::new(Parts {
            free,
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            gate: WorkGate::default(),
        });
        let (link, worker) = (OnceLock::new(), OnceLock::new());
        Ok(Self { parts, link, doorbell: doorbell(0)?, in_place: false, worker })
    }

    /// Creates a balloon without a thread: chains are served before a notification returns.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub(super) fn in_place(free: Arc<dyn FreePages>) -> Result<Self> {
        Ok(Self { in_place: true, ..Self::new(free)? })
    }

    /// Asks the guest for `pages` pages of 4 KiB in all. It gives pages, or takes some back, as it
    /// can. Waits while the device must be still.
    pub fn set_target(&self, pages: u32) {
        // A snapshot must have the target and the notice to the guest both or not at all.
        let _work = self.parts.gate.begin();
        let before = self.parts.target.swap(pages, Ordering::AcqRel);
        if let Some(link) = self.link.get().filter(|_| before != pages) {
            link.config_changed();
        }
    }

    /// The pages of 4 KiB that the host asks for, and those that the guest says it has given.
    #[must_use]
    pub fn pages(&self) -> (u32, u32) {
        (self.parts.target.load(Ordering::Acquire), self.parts.actual.load(Ordering::Acquire))
    }
}

impl Parts {
    /// Serves all queues until nothing waits, or `is_over`.
    fn serve(&self, link: &Link, is_over: impl Fn() -> bool) {
        for queue in 0..QUEUES.len() as u16 {
            while !is_over() && self.serve_one(link, queue) {}
        }
    }

    /// Serves the next chain of a queue. Returns false if there is none.
    fn serve_one(&self, link: &Link, index: u16) -> bool {
        let _work = self.gate.begin();
        let served = link.with_queue(index, |queue, memory| {
            let Some(Chain { head, mut readable, writable }) = queue.pop(memory)? else {
                return Ok(false);
            };
            match index {
                INFLATE => self.inflate(link, memory, &mut readable)?,
                REPORTS => writable.parts().for_each(|(start, len)| {
                    self.free_inside(link, start.raw_value(), u64::from(len));
                }),
                _ => {}
            }
            link.give_back(queue, head, 0)?;
            Ok(true)
        });
        served.unwrap_or(false)
    }

    /// Frees the pages whose numbers are in a chain (5.5.6), adjacent ones together.
    fn inflate(
        &self,
        link: &Link,
        memory: &GuestMemory,
        numbers: &mut Buffers,
    ) -> Result<(), Violation> {
        let (mut first, mut count) = (0, 0);
        for _ in 0..(numbers.len() / 4).min(PAGES_MAX) {
            let mut number = [0; 4];
            numbers.read(memory, &mut number)?;
            let page = u64::from(u32::from_le_bytes(number));
            // Pages outside RAM are left out: there is nothing to free.
            let start = GuestAddress(page * PAGE_BYTES);
            if !memory.check_range(start, PAGE_SIZE, Permissions::Write) {
                continue;
            }
            if page != first + count {
                self.free_inside(link, first * PAGE_BYTES, count * PAGE_BYTES);
                (first, count) = (page, 0);
            }
            count += 1;
        }
        self.free_inside(link, first * PAGE_BYTES, count * PAGE_BYTES);
        Ok(())
    }

    /// Frees the whole pages in a range of RAM until somebody waits for the device or a queue.
    fn free_inside(&self, link: &Link, start: u64, len_bytes: u64) {
        let end = (start + len_bytes) / PAGE_BYTES * PAGE_BYTES;
        let mut at = start.next_multiple_of(PAGE_BYTES);
        while at < end && !self.gate.is_wanted() && !link.is_awaited() {
            let len = PIECE_BYTES.min(end - at);
            if let Err(error) = self.free.free(GuestAddress(at), len) {
                tracing::debug!(%error, "cannot release the guest's free pages");
            }
            at += len;
        }
    }
}

impl VirtioDevice for Balloon {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        DEFLATE_ON_OOM | REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    /// `struct virtio_balloon_config` (5.5.4), as far as its features go.
    fn config(&self) -> Vec<u8> {
        let (target, actual) = self.pages();
        [target.to_le_bytes(), actual.to_le_bytes()].concat()
    }

    /// The driver tells how many pages it has given, in one write as wide as the field (4.2.2.2).
    fn write_config(&self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(value)) = (offset, data.try_into()) {
            self.parts.actual.store(u32::from_le_bytes(value), Ordering::Release);
        }
    }

    fn start(&self, link: &Arc<Link>) -> Result<()> {
        if self.link.set(Arc::clone(link)).is_err() || self.in_place {
            return Ok(());
        }
        let (parts, link) = (Arc::clone(&self.parts), Arc::clone(link));
        let name = link.name().to_owned();
        let worker =
            Worker::start(&name, Role::Device, &self.doorbell, move |doorbell, ending| {
                let serve = || parts.serve(&link, || ending.is_wanted());
                serve_when_rung(link.name(), doorbell, ending, serve);
            })?;
        // Never set before: the link is set only once.
        let _first = self.worker.set(worker);
        Ok(())
    }

    fn notify(&self, link: &Link, _queue: u16) {
        if self.in_place {
            self.parts.serve(link, || false);
        } else {
            ring(&self.doorbell);
        }
    }

    fn doorbell(&self, _queue: u16) -> Option<&EventFd> {
        Some(&self.doorbell)
    }

    /// After a reset, the guest has all its pages again (5.5.5.1).
    fn reset(&self) {
        self.parts.actual.store(0, Ordering::Release);
    }

    fn drain(&self, patience: Duration) -> Result<Still> {
        self.parts.gate.shut(patience)
    }

    fn save(&self) -> SavedDevice {
        let (target_pages, actual_pages) = self.pages();
        SavedDevice::Balloon { target_pages, actual_pages }
    }

    fn check(&self, saved: &SavedDevice) -> Result<(), StateMismatch> {
        match saved {
            SavedDevice::Balloon { .. } => Ok(()),
            other => Err(StateMismatch::new(self.save(), other)),
        }
    }

    fn put_back(&self, saved: &SavedDevice) -> Result<(), StateMismatch> {
        let SavedDevice::Balloon { target_pages, actual_pages } = saved else {
            return Err(StateMismatch::new(self.save(), saved));
        };
        self.parts.target.store(*target_pages, Ordering::Release);
        self.parts.actual.store(*actual_pages, Ordering::Release);
        Ok(())
    }
}
