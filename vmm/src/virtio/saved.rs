//! What a snapshot saves of a virtio device.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::StateMismatch;
use super::net::MacAddress;
use crate::devices::Captured;
use crate::error::Result;
use crate::state::{Saved, chunk};
use crate::vcpu::saved::Reg;
use frazil_snapstore::StateChunk;

/// A device behind the MMIO transport: registers, queues, and what is specific to its kind. The
/// rings are saved with guest memory, where they lie.
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
    /// All that the driver wrote to DriverFeatures.
    pub driver_features: Reg,
    /// The QueueSel register.
    pub queue_sel: u32,
    /// The device's virtqueues.
    pub queues: Vec<SavedQueue>,
    /// What is specific to the device's kind.
    pub device: SavedDevice,
}

impl Saved for SavedVirtio {
    const KIND: &'static str = "virtio.mmio";
    const VERSION: u32 = 1;
}

/// A virtqueue: virtio-queue's state, without what follows from the device's features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedQueue {
    /// The maximum number of entries.
    pub max_size: u16,
    /// The number of entries.
    pub size: u16,
    /// True if the driver has put the queue to use.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub descriptors: Reg,
    /// Guest physical address of the driver area, the available ring.
    pub driver: Reg,
    /// Guest physical address of the device area, the used ring.
    pub device: Reg,
    /// The next entry of the available ring to look at, not reduced modulo the queue's size.
    pub next_avail: u16,
    /// The next entry of the used ring to fill, not reduced either.
    pub next_used: u16,
}

/// What a kind of device saves besides its registers and queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum SavedDevice {
    /// A block device. Its disk has a chunk of its own.
    Block {
        /// The disk's name. Shared, so that nothing is allocated when it is captured.
        disk: Arc<str>,
    },
    /// The entropy device, which has nothing to save.
    Rng {},
    /// A network card. Its tap belongs to the host.
    Net {
        /// The card's address.
        mac: MacAddress,
    },
    /// A memory balloon.
    Balloon {
        /// Pages of 4 KiB that the host asks for.
        target_pages: u32,
        /// Pages that the guest says it has given.
        actual_pages: u32,
    },
    /// A socket device. Its connections end when it is restored.
    Vsock {
        /// The guest's context id.
        guest_cid: u32,
    },
}

impl SavedDevice {
    /// For a device whose state never changes: fails unless this state equals `ours`.
    pub(super) fn check_same(&self, ours: &Self) -> Result<(), StateMismatch> {
        if self == ours { Ok(()) } else { Err(StateMismatch::new(ours, self)) }
    }
}

/// A device's state with the name of its chunk, copied while the guest stands still.
#[derive(Clone, Debug)]
pub struct CapturedVirtio {
    /// The name of the device and of its chunk.
    pub name: String,
    /// The device's state.
    pub saved: SavedVirtio,
}

impl Captured for CapturedVirtio {
    fn chunk(&self) -> Result<Option<StateChunk>> {
        chunk(&self.name, &self.saved).map(Some)
    }
}
