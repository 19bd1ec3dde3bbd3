//! Virtio devices (virtio 1.2) behind the MMIO transport, modern interface only.
//!
//! [`VirtioMmio`] is the transport: a window of registers that the guest reads and writes, and that
//! a checkpoint captures. Behind it is a [`VirtioDevice`]: [`block`], [`rng`], [`net`], [`balloon`]
//! or [`vsock`]. Both share a [`Link`]. The [`bus`] holds the devices of a machine.
//!
//! Devices access guest memory only through vm-memory, which refuses addresses outside RAM and
//! notes writes, so that the next checkpoint has them. A driver that breaks the specification's
//! rules gets DEVICE_NEEDS_RESET, and nothing happens until it resets the device.

pub mod balloon;
pub mod block;
mod buffers;
pub mod bus;
pub mod free_pages;
pub mod fuzzing;
mod gate;
mod link;
mod mmio;
pub mod net;
mod queue;
pub mod rng;
mod saved;
#[cfg(test)]
mod tests;
pub mod vsock;
mod worker;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::disk::Drained;
use crate::error::{Result, VmmError};
pub use bus::{SavedSlot, SlotDevice, VirtioBus};
pub use free_pages::{FreePages, ZeroedPages};
pub use gate::Shut;
pub use link::Link;
pub use mmio::{VirtioMmio, WINDOW_BYTES};
pub use queue::Violation;
pub use saved::{CapturedVirtio, SavedDevice, SavedQueue, SavedVirtio};

/// Creates an eventfd to wait for or, with `EFD_NONBLOCK`, to poll. It may be an interrupt of the
/// guest, so programs that this process starts, such as pagers, do not inherit it.
///
/// # Errors
/// [`VmmError::Host`] if it cannot be created.
pub(crate) fn event(flags: i32) -> Result<EventFd> {
    EventFd::new(flags | EFD_CLOEXEC).map_err(VmmError::host("create an eventfd"))
}

/// How a device interrupts its guest.
pub trait Interrupt: Send + Sync + fmt::Debug {
    /// Raises the interrupt. One may stand for several, since a register holds the reasons.
    fn raise(&self);
}

/// An interrupt line of KVM's interrupt controllers, edge-triggered.
#[derive(Debug)]
pub struct IrqLine(EventFd);

impl IrqLine {
    /// Wires up line `gsi` of `vm`.
    ///
    /// # Errors
    /// [`VmmError::Host`] or [`VmmError::Kvm`] if that fails.
    pub fn wire(vm: &VmFd, gsi: u32) -> Result<Self> {
        let event = event(EFD_NONBLOCK)?;
        vm.register_irqfd(&event, gsi).map_err(VmmError::kvm("wire a virtio interrupt"))?;
        Ok(Self(event))
    }
}

impl Interrupt for IrqLine {
    fn raise(&self) {
        // Fails if the counter is full: an interrupt is pending then anyway.
        let _pending = self.0.write(1);
    }
}

/// Keeps a device still: it touches neither guest memory nor its queues until this is dropped.
#[derive(Debug)]
#[must_use]
pub enum Still {
    /// The device only works in vCPUs' threads.
    WithTheVcpus,
    /// The device's thread waits at its gate.
    Shut(Shut),
    /// The device's thread waits for its disk.
    Disk(Drained),
}

/// An error: a saved state belongs to another device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateMismatch {
    /// What the device has.
    pub expected: String,
    /// What the state has.
    pub found: String,
}

impl StateMismatch {
    pub(crate) fn new(expected: impl fmt::Debug, found: impl fmt::Debug) -> Self {
        Self { expected: format!("{expected:?}"), found: format!("{found:?}") }
    }
}

/// A device as its transport sees it. Its methods are called from several threads.
pub trait VirtioDevice: Send + Sync + fmt::Debug {
    /// The device's number in the specification's list (5).
    fn device_id(&self) -> u32;

    /// The features it offers, besides those common to all devices.
    fn features(&self) -> u64;

    /// The maximum number of entries of each of its queues.
    fn queue_sizes(&self) -> &[u16];

    /// The contents of its configuration space.
    fn config(&self) -> Vec<u8>;

    /// Handles a write by the driver to the configuration space; by default it is ignored.
    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    /// Makes the device ready to serve queues. Called once, before any method but those above.
    ///
    /// # Errors
    /// [`VmmError::Host`] if a thread cannot be started.
    fn start(&self, _link: &Arc<Link>) -> Result<()> {
        Ok(())
    }

    /// Called when the driver has added something to a queue, or may have before a state was put
    /// back.
    fn notify(&self, link: &Link, queue: u16);

    /// The eventfd that does the same as [`Self::notify`] when written to, for devices with a
    /// thread.
    fn doorbell(&self, _queue: u16) -> Option<&EventFd> {
        None
    }

    /// Called when the driver resets the device. No queue is ready any more.
    fn reset(&self) {}

    /// Waits until the device is still. The vCPUs must have stopped.
    ///
    /// # Errors
    /// [`VmmError::NotNow`] if that takes longer than `patience`; the device then goes on.
    fn drain(&self, patience: Duration) -> Result<Still>;

    /// Returns the state besides registers and queues. Called while the guest stands still, so it
    /// must not allocate.
    fn save(&self) -> SavedDevice;

    /// Checks that `saved` can be [put back](Self::put_back).
    ///
    /// # Errors
    /// If it is the state of another device.
    fn check(&self, saved: &SavedDevice) -> Result<(), StateMismatch>;

    /// Gives the device the state `saved`. The default is for devices whose state never changes.
    ///
    /// # Errors
    /// As [`Self::check`]; the device is then unchanged.
    fn put_back(&self, saved: &SavedDevice) -> Result<(), StateMismatch> {
        self.check(saved)
    }

    /// Called when the guest goes on. After that, the device is [notified](Self::notify) of each
    /// queue.
    fn go_on(&self) {}
}
