//! The memory balloon (virtio 1.2, 5.5): pages that the guest lends to the host, and reports of pages
//! that it does not use. What they held is forgotten, so snapshots need not keep it.
//!
//! Queues are numbered as Linux numbers them behind MMIO, without gaps: inflate, deflate, reports.
//! A page that the guest takes back is zero, as new memory is; deflating needs nothing to be done.
//!
//! Its thread frees a piece at a time. While somebody waits for it to be still, or a vCPU for one of its queues,
//! what is left of a chain stays as it is: to free pages is only ever a favour.

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
use super::queue::{Chain, Nonsense, bit};
use super::saved::SavedDevice;
use super::worker::{Worker, doorbell, ring, serve_when_rung};
use super::{Misfit, Still, VirtioDevice};
use crate::confine::Role;
use crate::error::Result;
use crate::memory::GuestMemory;

/// The guest may take pages back when it runs out of memory (5.5.3).
const DEFLATE_ON_OOM: u64 = bit(2);
/// It may report free pages.
const REPORTING: u64 = bit(5);

const QUEUE_SIZE: u16 = 128;
const INFLATE: u16 = 0;
const QUEUES: [u16; 3] = [QUEUE_SIZE; 3];
const REPORTS: u16 = 2;

/// Where `actual` is in the configuration space, after `num_pages`.
const ACTUAL: u64 = 4;
const PAGE_BYTES: u64 = PAGE_SIZE as u64;
/// Freed without looking up: zeroing that much takes some 30 µs.
const PIECE_BYTES: u64 = 256 << 10;
/// Page numbers that are looked at in one inflating chain. Linux sends 256.
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
    /// Pages that the guest says it gave.
    actual: AtomicU32,
    gate: WorkGate,
}

impl Balloon {
    /// An empty one. `free` gets the pages.
    ///
    /// # Errors
    /// [`VmmError::Host`](crate::VmmError::Host) if there is no eventfd to be had.
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

    /// One without a thread: chains are served before a notification returns.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub(super) fn in_place(free: Arc<dyn FreePages>) -> Result<Self> {
        Ok(Self { in_place: true, ..Self::new(free)? })
    }

    /// Asks the guest for so many pages of 4 KiB in all. It gives them, or takes them back, as it can.
    /// Waits while the device must be still.
    pub fn set_target(&self, pages: u32) {
        // Not half of it in a snapshot: the wish and that the guest is to be told.
        let _work = self.parts.gate.begin();
        let before = self.parts.target.swap(pages, Ordering::AcqRel);
        if let Some(link) = self.link.get().filter(|_| before != pages) {
            link.config_changed();
        }
    }

    /// Pages of 4 KiB that the host asks for, and that the guest says it gave.
    #[must_use]
    pub fn pages(&self) -> (u32, u32) {
        (self.parts.target.load(Ordering::Acquire), self.parts.actual.load(Ordering::Acquire))
    }
}

impl Parts {
    /// Serves all queues until nothing waits, or it is to end.
    fn serve(&self, link: &Link, is_over: impl Fn() -> bool) {
        for queue in 0..QUEUES.len() as u16 {
            while !is_over() && self.serve_one(link, queue) {}
        }
    }

    /// Serves the next chain of a queue. False if there is none.
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

    /// Frees the pages whose numbers a chain has (5.5.6), neighbours together.
    fn inflate(
        &self,
        link: &Link,
        memory: &GuestMemory,
        numbers: &mut Buffers,
    ) -> Result<(), Nonsense> {
        let (mut first, mut count) = (0, 0);
        for _ in 0..(numbers.len() / 4).min(PAGES_MAX) {
            let mut number = [0; 4];
            numbers.read(memory, &mut number)?;
            let page = u64::from(u32::from_le_bytes(number));
            // What is not RAM is left out: there is nothing to forget.
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

    /// Frees the whole pages in a range of RAM, as long as nobody waits for the device or its queues.
    fn free_inside(&self, link: &Link, start: u64, len_bytes: u64) {
        let end = (start + len_bytes) / PAGE_BYTES * PAGE_BYTES;
        let mut at = start.next_multiple_of(PAGE_BYTES);
        while at < end && !self.gate.is_wanted() && !link.is_awaited() {
            let len = PIECE_BYTES.min(end - at);
            if let Err(error) = self.free.free(GuestAddress(at), len) {
                tracing::debug!(%error, "free pages are kept");
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

    /// The driver tells how many pages it gave. In the width of the field (4.2.2.2), all at once.
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
        // The link is set once, and so is this.
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

    /// The guest has its pages again (5.5.5.1).
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

    fn check(&self, saved: &SavedDevice) -> Result<(), Misfit> {
        match saved {
            SavedDevice::Balloon { .. } => Ok(()),
            other => Err(Misfit::new(self.save(), other)),
        }
    }

    fn put_back(&self, saved: &SavedDevice) -> Result<(), Misfit> {
        let SavedDevice::Balloon { target_pages, actual_pages } = saved else {
            return Err(Misfit::new(self.save(), saved));
        };
        self.parts.target.store(*target_pages, Ordering::Release);
        self.parts.actual.store(*actual_pages, Ordering::Release);
        Ok(())
    }
}
