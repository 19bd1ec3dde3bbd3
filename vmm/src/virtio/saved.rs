//! What a snapshot keeps of a virtio device.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Misfit;
use super::net::MacAddress;
use crate::devices::Captured;
use crate::error::Result;
use crate::state::{Saved, chunk};
use crate::vcpu::saved::Reg;
use frazil_snapstore::StateChunk;

/// A device behind the MMIO transport: registers, queues, and what is its kind's own. What of it lies
/// in guest memory is saved with that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedVirtio {
    /// The Status register.
    pub status: u8,
    /// The InterruptStatus register.
    pub interrupt_status: u8,
    /// The ConfigGeneration register.
    pub config_generation: u32,
    /// The DeviceFeaturesSel register.
    pub device_features_sel: u32,
    /// The DriverFeaturesSel register.
    pub driver_features_sel: u32,
    /// What the driver wrote to DriverFeatures, all of it.
    pub driver_features: Reg,
    /// The QueueSel register.
    pub queue_sel: u32,
    /// Its virtqueues.
    pub queues: Vec<SavedQueue>,
    /// The rest.
    pub device: SavedDevice,
}

impl Saved for SavedVirtio {
    const KIND: &'static str = "virtio.mmio";
    const VERSION: u32 = 1;
}

/// A virtqueue: the twin of virtio-queue's state, without what the device's features tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedQueue {
    /// The most entries it may have.
    pub max_size: u16,
    /// Entries it has.
    pub size: u16,
    /// The driver says it may be used.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub descriptors: Reg,
    /// Guest physical address of the driver area, the available ring.
    pub driver: Reg,
    /// Guest physical address of the device area, the used ring.
    pub device: Reg,
    /// The next entry of the available ring to look at, not reduced to the queue's size.
    pub next_avail: u16,
    /// The next entry of the used ring to fill, not reduced either.
    pub next_used: u16,
}

/// What a kind of device keeps besides its registers and queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum SavedDevice {
    /// Nothing: its disk has a chunk of its own.
    Block {
        /// The disk's name. Shared, so that nothing is allocated when it is captured.
        disk: Arc<str>,
    },
    /// Nothing.
    Rng {},
    /// A network card. Its tap is the host's.
    Net {
        /// Its address.
        mac: MacAddress,
    },
    /// A memory balloon.
    Balloon {
        /// Pages of 4 KiB that the host asks for.
        target_pages: u32,
        /// Pages that the guest says it gave.
        actual_pages: u32,
    },
    /// A socket device. Its connections end where it is restored.
    Vsock {
        /// The guest's context id.
        guest_cid: u32,
    },
}

impl SavedDevice {
    /// Of a device that has nothing that changes: fails unless this is the state of one like `ours`.
    pub(super) fn check_same(&self, ours: &Self) -> Result<(), Misfit> {
        if self == ours { Ok(()) } else { Err(Misfit::new(ours, self)) }
    }
}

/// A device's state with the name of its chunk, copied while the guest stood still.
#[derive(Clone, Debug)]
pub struct CapturedVirtio {
    /// The device's, and the chunk's.
    pub name: String,
    /// Its state.
    pub saved: SavedVirtio,
}

impl Captured for CapturedVirtio {
    fn chunk(&self) -> Result<Option<StateChunk>> {
        chunk(&self.name, &self.saved).map(Some)
    }
}
