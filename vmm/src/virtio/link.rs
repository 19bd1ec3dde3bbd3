//! What the transport and its device share: status, interrupt, queues.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

use super::Interrupt;
use super::queue::{Violation, VirtQueue};
use crate::memory::{GuestMemory, GuestRam};

pub(super) const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
pub(super) const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
pub(super) const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;

const USED_BUFFER: u8 = VIRTIO_MMIO_INT_VRING as u8;
const CONFIG_CHANGE: u8 = VIRTIO_MMIO_INT_CONFIG as u8;
/// All interrupt reasons that are used.
pub(super) const INTERRUPTS: u8 = USED_BUFFER | CONFIG_CHANGE;

/// How long a device's thread keeps away from queues while a vCPU wants one.
const GIVES_WAY_FOR: Duration = Duration::from_micros(50);

/// The part of a device that the transport and the device's own threads share.
///
/// A queue is worked on only under its lock, and a device gives chains back, or gives up, only
/// under such a lock: so once a reset has held each of them, nothing from before it is left.
#[derive(Debug)]
pub struct Link {
    name: String,
    ram: Arc<GuestRam>,
    interrupt: Arc<dyn Interrupt>,
    pub(super) status: AtomicU8,
    pub(super) interrupt_status: AtomicU8,
    pub(super) config_generation: AtomicU32,
    /// The features that the driver has accepted so far.
    pub(super) driver_features: AtomicU64,
    pub(super) queues: Vec<Mutex<VirtQueue>>,
    /// How many vCPUs wait for a queue that the device is working on.
    awaited: AtomicU32,
    /// Whether a broken rule was logged: only the first is, or the guest could fill the host's log.
    told: AtomicBool,
}

impl Link {
    pub(super) fn new(
        name: String,
        queue_sizes: &[u16],
        ram: Arc<GuestRam>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Self {
        Self {
            name,
            ram,
            interrupt,
            status: AtomicU8::new(0),
            interrupt_status: AtomicU8::new(0),
            config_generation: AtomicU32::new(0),
            driver_features: AtomicU64::new(0),
            queues: queue_sizes.iter().map(|size| Mutex::new(VirtQueue::new(*size))).collect(),
            awaited: AtomicU32::new(0),
            told: AtomicBool::new(false),
        }
    }

    /// The device's name, which is that of its chunk.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn memory(&self) -> &GuestMemory {
        self.ram.memory()
    }

    /// Returns true from DRIVER_OK until a reset, unless one side has given up.
    #[must_use]
    pub fn is_live(&self) -> bool {
        let status = self.status.load(Ordering::Acquire);
        status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK
    }

    /// Locks a queue for the transport. A device that is working on it is done soon: see
    /// [`Self::is_awaited`].
    pub(super) fn lock(&self, index: usize) -> Option<MutexGuard<'_, VirtQueue>> {
        let queue = self.queues.get(index)?;
        Some(match queue.try_lock() {
            Ok(queue) => queue,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                self.awaited.fetch_add(1, Ordering::AcqRel);
                let queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
                self.awaited.fetch_sub(1, Ordering::AcqRel);
                queue
            }
        })
    }

    /// Returns true while a vCPU waits for a queue. It cannot be stopped meanwhile, so a device
    /// then skips what it can.
    pub(super) fn is_awaited(&self) -> bool {
        self.awaited.load(Ordering::Acquire) > 0
    }

    /// Runs `work` on a queue, under its lock, if the device is live and the queue is ready. If
    /// `work` finds a violation, the device stops until the driver resets it. Returns `None` if
    /// `work` was not run or failed.
    pub(super) fn with_queue<T>(
        &self,
        index: u16,
        work: impl FnOnce(&mut VirtQueue, &GuestMemory) -> Result<T, Violation>,
    ) -> Option<T> {
        let queue = self.queues.get(usize::from(index))?;
        if self.is_awaited() {
            // The lock is not fair: this thread would get it again and again.
            std::thread::sleep(GIVES_WAY_FOR);
        }
        let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.is_live() || !queue.is_ready() {
            return None;
        }
        work(&mut queue, self.memory()).map_err(|violation| self.give_up(&violation)).ok()
    }

    /// Stops the device until it is reset, as the driver broke a rule (2.1.2). Called under a
    /// queue's lock, or the one that orders writes to registers.
    pub(super) fn give_up(&self, violation: &Violation) {
        let before = self.status.fetch_or(NEEDS_RESET, Ordering::AcqRel);
        if !self.told.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                device = self.name,
                nonsense = %violation,
                "a virtio device stops until it is reset"
            );
        }
        if before & DRIVER_OK != 0 {
            self.interrupt(CONFIG_CHANGE);
        }
    }

    /// Gives a chain back to the driver, with an interrupt if it wants one.
    pub(super) fn give_back(
        &self,
        queue: &mut VirtQueue,
        head: u16,
        written: u32,
    ) -> Result<(), Violation> {
        if queue.give_back(self.memory(), head, written)? {
            self.interrupt(USED_BUFFER);
        }
        Ok(())
    }

    /// Tells the driver that the contents of the configuration space have changed.
    pub(super) fn config_changed(&self) {
        self.config_generation.fetch_add(1, Ordering::AcqRel);
        if self.is_live() {
            self.interrupt(CONFIG_CHANGE);
        }
    }

    fn interrupt(&self, reason: u8) {
        // Set the reason first: the driver looks for it as soon as it is interrupted.
        self.interrupt_status.fetch_or(reason, Ordering::AcqRel);
        self.interrupt.raise();
    }

    /// Interrupts once more for reasons that the driver has not acknowledged yet: the interrupt
    /// itself may have been on its way when the state was saved.
    pub(super) fn interrupt_again(&self) {
        if self.interrupt_status.load(Ordering::Acquire) != 0 {
            self.interrupt.raise();
        }
    }
}
