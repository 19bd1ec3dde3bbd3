//! Virtio devices (virtio 1.2) behind the MMIO transport, modern interface only.
//!
//! [`VirtioMmio`] is the transport: a window of registers that the guest reads and writes, and what a
//! checkpoint captures. Behind it is a [`VirtioDevice`]: [`block`], [`rng`], [`net`], [`balloon`] or
//! [`vsock`]. Both meet in the [`Link`]. The [`bus`] is where a machine has its devices.
//!
//! All of a guest's memory is reached through vm-memory, which refuses what lies outside and notes
//! what is written, so that the next checkpoint has it. A driver that breaks the specification's rules
//! gets DEVICE_NEEDS_RESET, and nothing happens until it resets the device.

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
pub use queue::Nonsense;
pub use saved::{CapturedVirtio, SavedDevice, SavedQueue, SavedVirtio};

/// A counter that somebody waits for, or, with `EFD_NONBLOCK`, polls. Programs that are started, such as
/// pagers, do not have it: it may be an interrupt of the guest's.
///
/// # Errors
/// [`VmmError::Host`].
pub(crate) fn event(flags: i32) -> Result<EventFd> {
    EventFd::new(flags | EFD_CLOEXEC).map_err(VmmError::host("create an eventfd"))
}

/// How a device interrupts its guest.
pub trait Interrupt: Send + Sync + fmt::Debug {
    /// Interrupts it. Once for several times is enough: why is in a register.
    fn raise(&self);
}

/// An interrupt line of KVM's interrupt controllers, edge-triggered.
#[derive(Debug)]
pub struct IrqLine(EventFd);

impl IrqLine {
    /// Line `gsi` of `vm`.
    ///
    /// # Errors
    /// [`VmmError::Host`] or [`VmmError::Kvm`] if it cannot be had.
    pub fn wire(vm: &VmFd, gsi: u32) -> Result<Self> {
        let event = event(EFD_NONBLOCK)?;
        vm.register_irqfd(&event, gsi).map_err(VmmError::kvm("wire a virtio interrupt"))?;
        Ok(Self(event))
    }
}

impl Interrupt for IrqLine {
    fn raise(&self) {
        // It fails when its counter is full: an interrupt is pending anyway.
        let _pending = self.0.write(1);
    }
}

/// Keeps a device still: it touches neither guest memory nor its queues until this is dropped.
#[derive(Debug)]
#[must_use]
pub enum Still {
    /// It only ever does anything in a vCPU's thread.
    WithTheVcpus,
    /// Its thread waits at its gate.
    Shut(Shut),
    /// Its thread waits for its disk.
    Disk(Drained),
}

/// A saved state that is another device's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misfit {
    /// What there is.
    pub expected: String,
    /// What the state has.
    pub found: String,
}

impl Misfit {
    pub(crate) fn new(expected: impl fmt::Debug, found: impl fmt::Debug) -> Self {
        Self { expected: format!("{expected:?}"), found: format!("{found:?}") }
    }
}

/// A device, as its transport sees it. Everything is called from several threads.
pub trait VirtioDevice: Send + Sync + fmt::Debug {
    /// Its number in the specification's list (5).
    fn device_id(&self) -> u32;

    /// The features it offers, besides those that all have.
    fn features(&self) -> u64;

    /// The most entries of each of its queues.
    fn queue_sizes(&self) -> &[u16];

    /// What its configuration space reads as.
    fn config(&self) -> Vec<u8>;

    /// The driver wrote to its configuration space; ignored where nothing can be written.
    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    /// Makes it ready to serve queues. Called once, before anything else but what is above.
    ///
    /// # Errors
    /// [`VmmError::Host`] if a thread cannot be had.
    fn start(&self, _link: &Arc<Link>) -> Result<()> {
        Ok(())
    }

    /// The driver added something to a queue, or a state was put back and there may be something.
    fn notify(&self, link: &Link, queue: u16);

    /// What does the same as [`Self::notify`] when it is written to, for devices with a thread.
    fn doorbell(&self, _queue: u16) -> Option<&EventFd> {
        None
    }

    /// The driver reset it. No queue is ready any more.
    fn reset(&self) {}

    /// Waits until it is still. The vCPUs have stopped.
    ///
    /// # Errors
    /// [`VmmError::NotNow`] if that takes longer than `patience`; the device goes on then.
    fn drain(&self, patience: Duration) -> Result<Still>;

    /// What it has besides registers and queues. Called while the guest stands still: asks for no memory.
    fn save(&self) -> SavedDevice;

    /// Fails unless `saved` can be [put back](Self::put_back).
    ///
    /// # Errors
    /// If that is the state of another device.
    fn check(&self, saved: &SavedDevice) -> Result<(), Misfit>;

    /// Becomes what `saved` says, or stays as it is. As it stands here, for devices of which nothing
    /// changes.
    ///
    /// # Errors
    /// As [`Self::check`].
    fn put_back(&self, saved: &SavedDevice) -> Result<(), Misfit> {
        self.check(saved)
    }

    /// The guest runs from here on. It is [notified](Self::notify) of each queue behind that.
    fn go_on(&self) {}
}
