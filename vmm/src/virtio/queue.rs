//! A virtqueue as its device sees it (virtio 1.2, 2.7): registers until the driver says it is
//! ready, rings in guest memory from then on.
//!
//! Before anything is done with a chain, it is walked once and each of its buffers checked to lie
//! in RAM: what the guest changes afterwards can affect what is in the buffers, not where they are.

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory as _, Permissions};

use super::buffers::Buffers;
use super::saved::SavedQueue;
use crate::memory::GuestMemory;
use crate::vcpu::saved::Reg;

/// Returns the bit of a feature number.
pub(super) const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// The features that every device here offers: the modern interface and indirect descriptors.
pub(super) const COMMON_FEATURES: u64 = bit(VIRTIO_F_VERSION_1) | bit(VIRTIO_RING_F_INDIRECT_DESC);

/// The feature by which each side says from which entry on it wants to be notified or interrupted
/// (2.7.7.2, 2.7.10).
pub(super) const EVENT_IDX: u64 = bit(VIRTIO_RING_F_EVENT_IDX);

/// A guest's violation of the specification, after which its device cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation(pub(super) String);

impl Violation {
    pub(super) fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<virtio_queue::Error> for Violation {
    fn from(error: virtio_queue::Error) -> Self {
        Self(error.to_string())
    }
}

/// The contents of a queue's registers. They are checked when the queue becomes ready, not before,
/// since addresses arrive in halves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct QueueRegisters {
    /// Number of entries; 0 if the driver wrote a number out of range.
    pub size: u16,
    /// Guest physical addresses of the three parts.
    pub descriptors: u64,
    pub driver: u64,
    pub device: u64,
}

/// A descriptor chain taken off a queue.
#[derive(Debug)]
pub(super) struct Chain {
    /// The index of its first descriptor, by which it is given back.
    pub head: u16,
    /// What the device may read.
    pub readable: Buffers,
    /// What the device may write, after the readable part.
    pub writable: Buffers,
}

/// A queue. See the module documentation.
#[derive(Debug)]
pub struct VirtQueue {
    max_size: u16,
    pub(super) registers: QueueRegisters,
    /// `Some` while the queue is ready.
    ring: Option<Queue>,
}

impl VirtQueue {
    /// Creates a queue of at most `max_size` entries, a power of two up to 32,768.
    pub(super) fn new(max_size: u16) -> Self {
        let registers = QueueRegisters { size: max_size, descriptors: 0, driver: 0, device: 0 };
        Self { max_size, registers, ring: None }
    }

    pub(super) fn max_size(&self) -> u16 {
        self.max_size
    }

    pub(super) fn is_ready(&self) -> bool {
        self.ring.is_some()
    }

    /// Resets the queue to its state after power-on.
    pub(super) fn reset(&mut self) {
        *self = Self::new(self.max_size);
    }

    /// Takes the queue out of use.
    pub(super) fn retire(&mut self) {
        self.ring = None;
    }

    /// Puts the queue that the registers describe to use.
    pub(super) fn make_ready(
        &mut self,
        features: u64,
        memory: &GuestMemory,
    ) -> Result<(), Violation> {
        self.ring = Some(self.ring_at(features, 0, 0, memory)?);
        Ok(())
    }

    /// Creates the ring that the registers describe, at the positions `next_avail` and `next_used`.
    fn ring_at(
        &self,
        features: u64,
        next_avail: u16,
        next_used: u16,
        memory: &GuestMemory,
    ) -> Result<Queue, Violation> {
        let QueueRegisters { size, descriptors, driver, device } = self.registers;
        let ring = Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail,
            next_used,
            event_idx_enabled: features & EVENT_IDX != 0,
            size,
            ready: true,
            desc_table: descriptors,
            avail_ring: driver,
            used_ring: device,
        })?;
        // virtio-queue takes a driver area at 0 for one that was not set.
        if driver == 0 || !ring.is_valid(memory) {
            return Err(Violation::new("a virtqueue that is not in RAM"));
        }
        Ok(ring)
    }

    pub(super) fn save(&self) -> SavedQueue {
        let QueueRegisters { size, descriptors, driver, device } = self.registers;
        let (next_avail, next_used) = match self.ring.as_ref().map(Queue::state) {
            // The fields left out follow from the registers and the features.
            Some(QueueState {
                next_avail,
                next_used,
                max_size: _,
                event_idx_enabled: _,
                size: _,
                ready: _,
                desc_table: _,
                avail_ring: _,
                used_ring: _,
            }) => (next_avail, next_used),
            None => (0, 0),
        };
        SavedQueue {
            max_size: self.max_size,
            size,
            ready: self.is_ready(),
            descriptors: Reg(descriptors),
            driver: Reg(driver),
            device: Reg(device),
            next_avail,
            next_used,
        }
    }

    /// Creates a queue with the state `saved`.
    pub(super) fn restore(
        saved: &SavedQueue,
        features: u64,
        memory: &GuestMemory,
    ) -> Result<Self, Violation> {
        let SavedQueue {
            max_size,
            size,
            ready,
            descriptors: Reg(descriptors),
            driver: Reg(driver),
            device: Reg(device),
            next_avail,
            next_used,
        } = *saved;
        let mut queue = Self::new(max_size);
        queue.registers = QueueRegisters { size, descriptors, driver, device };
        if ready {
            queue.ring = Some(queue.ring_at(features, next_avail, next_used, memory)?);
        }
        Ok(queue)
    }

    fn ring(&mut self) -> Result<&mut Queue, Violation> {
        self.ring.as_mut().ok_or_else(|| Violation::new("a virtqueue that is not ready"))
    }

    /// Returns how many chains wait.
    pub(super) fn waiting(&mut self, memory: &GuestMemory) -> Result<u16, Violation> {
        let ring = self.ring()?;
        let end = ring.avail_idx(memory, Ordering::Acquire)?;
        let waiting = end.0.wrapping_sub(ring.next_avail());
        if waiting > ring.size() {
            return Err(Violation::new("more chains than the virtqueue has room for"));
        }
        Ok(waiting)
    }

    /// Takes the next chain off the queue.
    pub(super) fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, Violation> {
        let ring = self.ring()?;
        let size = ring.size();
        let Some(descriptors) = ring.iter(memory)?.next() else { return Ok(None) };
        let head = descriptors.head_index();
        let (mut readable, mut writable) = (Buffers::default(), Buffers::default());
        let (mut count, mut ended) = (0, false);
        for descriptor in descriptors {
            count += 1;
            if count > size {
                return Err(Violation::new("a chain longer than its virtqueue"));
            }
            ended = !descriptor.has_next();
            let (side, access) = if descriptor.is_write_only() {
                (&mut writable, Permissions::Write)
            } else if writable.is_untouched() {
                (&mut readable, Permissions::Read)
            } else {
                return Err(Violation::new("a buffer to read after one to write"));
            };
            let (address, len) = (descriptor.addr(), descriptor.len());
            if len > 0 && !memory.check_range(address, len as usize, access) {
                return Err(Violation::new("a buffer that is not in RAM"));
            }
            side.push(address, len);
        }
        // The walk also ends where it would leave the table, or when the chain goes in circles.
        if !ended {
            return Err(Violation::new("a chain that leads nowhere"));
        }
        Ok(Some(Chain { head, readable, writable }))
    }

    /// Puts the last chain taken back on the queue, untouched.
    pub(super) fn put_back(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.go_to_previous_position();
        }
    }

    /// Gives a chain back to the driver, with `written` bytes in its writable part. Returns true if
    /// the driver wants an interrupt for it.
    pub(super) fn give_back(
        &mut self,
        memory: &GuestMemory,
        head: u16,
        written: u32,
    ) -> Result<bool, Violation> {
        let ring = self.ring()?;
        ring.add_used(memory, head, written)?;
        Ok(ring.needs_notification(memory)?)
    }

    /// Asks the driver not to notify the device of chains that it adds. This is only a hint.
    pub(super) fn mute(&mut self, memory: &GuestMemory) -> Result<(), Violation> {
        Ok(self.ring()?.disable_notification(memory)?)
    }

    /// Asks the driver to notify the device of the next chain it adds, even while others wait. With
    /// event indices it notifies only of the entry asked for, which otherwise is the next one that
    /// the device takes.
    pub(super) fn ask_for_next(&mut self, memory: &GuestMemory) -> Result<(), Violation> {
        let ring = self.ring()?;
        if !ring.event_idx_enabled() {
            return Ok(());
        }
        let next = ring.avail_idx(memory, Ordering::Acquire)?;
        // `avail_event` follows the entries (2.7.8).
        let place = GuestAddress(ring.used_ring())
            .checked_add(4 + 8 * u64::from(ring.size()))
            .ok_or_else(|| Violation::new("a virtqueue that is not in RAM"))?;
        memory
            .store(next.0.to_le(), place, Ordering::Release)
            .map_err(|error| Violation::new(error.to_string()))
    }

    /// Asks the driver to notify the device again. Returns true if it has added a chain since the
    /// last look, of which it may not have notified the device.
    pub(super) fn unmute(&mut self, memory: &GuestMemory) -> Result<bool, Violation> {
        Ok(self.ring()?.enable_notification(memory)?)
    }
}
