//! The entropy device (virtio 1.2, 5.4): random bytes from the host's kernel.
//!
//! It works in the thread of the vCPU that notifies it, so it stands still when the vCPUs do. It
//! has nothing to save. Clones of a snapshot get different bytes from it, which is what it is for;
//! a guest that was rewound gets other bytes than before.

use std::time::Duration;

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::link::Link;
use super::queue::{Chain, Violation, VirtQueue};
use super::saved::SavedDevice;
use super::{StateMismatch, Still, VirtioDevice};
use crate::error::Result;
use crate::memory::GuestMemory;

/// Entries of the queue.
const QUEUE_SIZE: u16 = 64;
/// Maximum bytes given per request. A driver that wants more asks again; its vCPU runs in between.
const BYTES_MAX: usize = 4096;

/// The entropy device.
#[derive(Debug, Default)]
pub struct Rng;

impl VirtioDevice for Rng {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn notify(&self, link: &Link, queue: u16) {
        link.with_queue(queue, |queue, memory| {
            // Only those that wait now: later ones bring their own notifications, which are never
            // muted here.
            for _ in 0..queue.waiting(memory)? {
                fill_next(link, queue, memory)?;
            }
            Ok(())
        });
    }

    fn drain(&self, _patience: Duration) -> Result<Still> {
        Ok(Still::WithTheVcpus)
    }

    fn save(&self) -> SavedDevice {
        SavedDevice::Rng {}
    }

    fn check(&self, saved: &SavedDevice) -> Result<(), StateMismatch> {
        saved.check_same(&self.save())
    }
}

fn fill_next(link: &Link, queue: &mut VirtQueue, memory: &GuestMemory) -> Result<(), Violation> {
    let Some(Chain { head, readable: _, mut writable }) = queue.pop(memory)? else { return Ok(()) };
    let mut bytes = [0; BYTES_MAX];
    let wanted = writable.len().min(BYTES_MAX as u64) as usize;
    // The device may give fewer bytes than asked for. Once the host has booted there are some.
    let given = getrandom(&mut bytes[..wanted], GetRandomFlags::empty()).unwrap_or(0);
    writable.write(memory, &bytes[..given])?;
    link.give_back(queue, head, given as u32)
}
