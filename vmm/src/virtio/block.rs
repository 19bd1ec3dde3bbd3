//! The block device (virtio 1.2, 5.2), over a [`Disk`].
//!
//! The device's own thread handles requests one at a time. It begins a disk request before it takes
//! the guest's off the queue and ends it when the answer is in guest memory: so once the disk is
//! drained, queue, memory and disk agree.

mod request;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vmm_sys_util::eventfd::EventFd;

use super::link::Link;
use super::queue::{EVENT_IDX, bit};
use super::saved::SavedDevice;
use super::worker::{Worker, doorbell, ring, serve_when_rung};
use super::{StateMismatch, Still, VirtioDevice};
use crate::confine::Role;
use crate::disk::{Disk, SECTOR_BYTES};
use crate::error::Result;
use request::Scratch;

/// Entries of the queue.
const QUEUE_SIZE: u16 = 256;
/// Maximum number of data buffers in a request: with header and status they fit the queue.
const SEGMENTS_MAX: u32 = 126;
/// Maximum bytes in one of them. A request is thus at most 8 MiB, and soon done when a checkpoint
/// waits.
const SEGMENT_BYTES_MAX: u32 = 64 << 10;
/// Maximum number of ranges that one request may discard or fill with zeros.
const RANGES_MAX: u32 = 8;
/// Maximum sectors in each of them: 256 MiB, of which every chunk of 256 KiB is looked at.
const RANGE_SECTORS_MAX: u32 = (256 << 20) / SECTOR_BYTES as u32;
/// The limits that drivers are told instead of these two: a checkpoint waits for the request in
/// flight while the guest stands still. Drivers in older snapshots were told more, and may do more.
const RANGES_TOLD: u32 = 1;
const RANGE_SECTORS_TOLD: u32 = (32 << 20) / SECTOR_BYTES as u32;
/// Physical blocks are pages of 2 to the power of this, 8, sectors: a smaller write reads first.
const PHYSICAL_BLOCK_EXP: u8 = 3;

/// A block device.
#[derive(Debug)]
pub struct Block {
    disk: Arc<Disk>,
    /// The disk's name.
    name: Arc<str>,
    doorbell: Arc<EventFd>,
    /// `Some` if requests are handled by whoever notifies, for tests that want a fixed order.
    in_place: Option<Mutex<Scratch>>,
    worker: OnceLock<Worker>,
}

impl Block {
    /// Creates the device of `disk`.
    ///
    /// # Errors
    /// [`VmmError::Host`](crate::VmmError::Host) if an eventfd cannot be created.
    pub fn new(disk: Arc<Disk>) -> Result<Self> {
        let (name, doorbell) = (disk.name().into(), doorbell(0)?);
        Ok(Self { disk, name, doorbell, in_place: None, worker: OnceLock::new() })
    }

    /// Creates a device without a thread: requests are handled before a notification returns.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub(super) fn in_place(disk: Arc<Disk>) -> Result<Self> {
        Ok(Self { in_place: Some(Mutex::default()), ..Self::new(disk)? })
    }

    /// The device's disk.
    #[must_use]
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }
}

/// Handles the requests that wait, each as a disk request of its own, so that a checkpoint can come
/// in between.
fn serve(link: &Link, disk: &Disk, scratch: &mut Scratch, is_over: impl Fn() -> bool) {
    let mut goes_on = true;
    while goes_on && !is_over() {
        let request = disk.begin();
        let more = link.with_queue(0, |queue, memory| {
            queue.mute(memory)?;
            let Some(chain) = queue.pop(memory)? else { return queue.unmute(memory) };
            let head = chain.head;
            let written = request::answer(disk, &request, memory, chain, scratch)?;
            link.give_back(queue, head, written)?;
            Ok(true)
        });
        drop(request);
        goes_on = more.unwrap_or(false);
    }
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let all = bit(blk::VIRTIO_BLK_F_SIZE_MAX)
            | bit(blk::VIRTIO_BLK_F_SEG_MAX)
            | bit(blk::VIRTIO_BLK_F_BLK_SIZE)
            | bit(blk::VIRTIO_BLK_F_TOPOLOGY)
            | bit(blk::VIRTIO_BLK_F_FLUSH)
            | EVENT_IDX;
        let own = if self.disk.is_read_only() {
            bit(blk::VIRTIO_BLK_F_RO)
        } else {
            bit(blk::VIRTIO_BLK_F_DISCARD) | bit(blk::VIRTIO_BLK_F_WRITE_ZEROES)
        };
        all | own
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    /// `struct virtio_blk_config` (5.2.4).
    fn config(&self) -> Vec<u8> {
        let sectors = self.disk.len_bytes() / SECTOR_BYTES;
        let mut config = Vec::with_capacity(60);
        config.extend(sectors.to_le_bytes());
        config.extend(SEGMENT_BYTES_MAX.to_le_bytes());
        config.extend(SEGMENTS_MAX.to_le_bytes());
        // No geometry.
        config.extend([0; 4]);
        config.extend((SECTOR_BYTES as u32).to_le_bytes());
        config.extend([PHYSICAL_BLOCK_EXP, 0]);
        config.extend((1_u16 << PHYSICAL_BLOCK_EXP).to_le_bytes());
        // No optimal I/O length, no cache mode to switch, and the number of queues is not offered.
        config.extend([0; 8]);
        config.extend(RANGE_SECTORS_TOLD.to_le_bytes());
        config.extend(RANGES_TOLD.to_le_bytes());
        config.extend((1_u32 << PHYSICAL_BLOCK_EXP).to_le_bytes());
        config.extend(RANGE_SECTORS_TOLD.to_le_bytes());
        config.extend(RANGES_TOLD.to_le_bytes());
        // Writing zeros may unmap, and does.
        config.extend([1, 0, 0, 0]);
        config
    }

    fn start(&self, link: &Arc<Link>) -> Result<()> {
        if self.in_place.is_some() {
            return Ok(());
        }
        let (link, disk) = (Arc::clone(link), Arc::clone(&self.disk));
        let worker = Worker::start(
            self.disk.name(),
            Role::Device,
            &self.doorbell,
            move |doorbell, ending| {
                let mut scratch = Scratch::default();
                serve_when_rung(link.name(), doorbell, ending, || {
                    serve(&link, &disk, &mut scratch, || ending.is_wanted());
                });
            },
        )?;
        // If the device is started twice, the second thread ends at once.
        let _first = self.worker.set(worker);
        Ok(())
    }

    fn notify(&self, link: &Link, _queue: u16) {
        let Some(scratch) = &self.in_place else { return ring(&self.doorbell) };
        let mut scratch = scratch.lock().unwrap_or_else(PoisonError::into_inner);
        serve(link, &self.disk, &mut scratch, || false);
    }

    fn doorbell(&self, _queue: u16) -> Option<&EventFd> {
        Some(&self.doorbell)
    }

    fn drain(&self, patience: Duration) -> Result<Still> {
        self.disk.drain(patience).map(Still::Disk)
    }

    fn save(&self) -> SavedDevice {
        SavedDevice::Block { disk: Arc::clone(&self.name) }
    }

    fn check(&self, saved: &SavedDevice) -> Result<(), StateMismatch> {
        saved.check_same(&self.save())
    }
}
