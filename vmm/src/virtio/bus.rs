//! The virtio devices of a machine: which there are, where the guest finds them, how each is built.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::balloon::Balloon;
use super::block::Block;
use super::net::{MacAddress, Net, Tap};
use super::rng::Rng;
use super::vsock::{self, UnixSockets, Unreachable, Vsock};
use super::{IrqLine, SavedVirtio, Still, VirtioDevice, VirtioMmio, WINDOW_BYTES, ZeroedPages};
use crate::boot::MmioSlot;
use crate::devices::mmio::{DEVICES_END, MmioBus};
use crate::disk::Disk;
use crate::error::{Result, VmmError};
use crate::kvm::VmShell;
use crate::memory::HOLE_START;
use crate::state::ChunkSet;
use crate::vcpu::saved::Reg;

/// Inputs of the IOAPIC that devices may use: first those beyond the 8259As', then those without a
/// fixed use on a PC.
const GSIS: [u32; 15] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11, 12, 15];
/// The input that tells a guest of a new generation; on a PC, that of power management.
pub(crate) const EVENT_GSI: u32 = 9;
/// The longest device name accepted from a snapshot.
const NAME_LEN_MAX: usize = 32;

/// A device as the machine's chunk lists it. From this and the device's own chunk it is rebuilt,
/// even by a program that would place a new one elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedSlot {
    /// The device's name, and that of its chunk.
    pub name: String,
    /// What the device is.
    pub device: SlotDevice,
    /// Guest physical address of its registers.
    pub base: Reg,
    /// The input of the IOAPIC that it interrupts through.
    pub gsi: u32,
}

/// What a device is, and what it is built from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum SlotDevice {
    /// A block device.
    Block {
        /// The index of its disk among those of the machine.
        disk: usize,
    },
    /// A network card.
    Net {
        /// The host's tap interface that the card was last on; `None` is a card without a cable.
        tap: Option<String>,
        /// The card's address.
        mac: MacAddress,
    },
    /// The entropy device.
    Rng {},
    /// A memory balloon.
    Balloon {},
    /// A socket device.
    Vsock {
        /// The guest's context id.
        cid: u32,
        /// The host's Unix socket that last led to it; `None` is a host that cannot be reached.
        socket: Option<PathBuf>,
    },
}

impl SavedSlot {
    /// Returns true if a guest that has `self` does not notice when given `other` instead: cables
    /// do not count, nor do addresses of network cards and sockets, which drivers read once.
    #[must_use]
    pub fn is_like(&self, other: &Self) -> bool {
        let kinds = match (&self.device, &other.device) {
            (SlotDevice::Net { .. }, SlotDevice::Net { .. })
            | (SlotDevice::Vsock { .. }, SlotDevice::Vsock { .. }) => true,
            (ours, theirs) => ours == theirs,
        };
        kinds && (&self.name, self.base, self.gsi) == (&other.name, other.base, other.gsi)
    }
}

/// Gives each of the named `devices` a place in the guest's address space and an interrupt.
///
/// # Errors
/// [`VmmError::Config`] if there are more devices than interrupts.
pub(crate) fn lay_out(devices: Vec<(String, SlotDevice)>) -> Result<Vec<SavedSlot>> {
    if devices.len() > GSIS.len() {
        return Err(VmmError::Config(format!(
            "disks, network cards and other virtio devices: expected at most {} in all, found {}",
            GSIS.len(),
            devices.len()
        )));
    }
    let windows = (HOLE_START..).step_by(WINDOW_BYTES as usize);
    let slots = devices.into_iter().zip(windows).zip(GSIS);
    Ok(slots
        .map(|(((name, device), base), gsi)| SavedSlot { name, device, base: Reg(base), gsi })
        .collect())
}

/// Returns what the machine's ACPI tables tell the guest of `slots`.
pub(crate) fn mmio_slots(slots: &[SavedSlot]) -> Vec<MmioSlot> {
    let told = |slot: &SavedSlot| MmioSlot { base: slot.base.0, len: WINDOW_BYTES, gsi: slot.gsi };
    slots.iter().map(told).collect()
}

/// What devices are built from.
pub(crate) struct Surroundings<'a> {
    pub shell: &'a VmShell,
    pub disks: &'a [Arc<Disk>],
    /// Whether memory that the guest does not need may be given back to the host: see
    /// [`ZeroedPages::new`].
    pub punch: bool,
}

/// The virtio devices of a machine, on its MMIO bus.
#[derive(Debug, Default)]
pub struct VirtioBus {
    mmio: MmioBus,
    devices: Vec<Arc<VirtioMmio>>,
}

impl VirtioBus {
    /// Builds the devices of a machine that boots.
    ///
    /// # Errors
    /// What KVM or the host refuses.
    pub(crate) fn boot(slots: &[SavedSlot], around: &Surroundings<'_>) -> Result<Self> {
        Self::attach(slots, around, |_| Ok(None))
    }

    /// Builds the devices of a machine that is resumed, with the states in `chunks`. They do
    /// nothing until [`Self::go_on`].
    ///
    /// # Errors
    /// As [`Self::boot`]; [`VmmError::State`] if the snapshot's list or states make no sense.
    pub(crate) fn resume(
        slots: &[SavedSlot],
        around: &Surroundings<'_>,
        chunks: &mut ChunkSet,
    ) -> Result<Self> {
        check(slots)?;
        Self::attach(slots, around, |name| chunks.take(name).map(Some))
    }

    fn attach(
        slots: &[SavedSlot],
        around: &Surroundings<'_>,
        mut saved: impl FnMut(&str) -> Result<Option<SavedVirtio>>,
    ) -> Result<Self> {
        let mut bus = Self::default();
        for slot in slots {
            let device = build(slot, around)?;
            let line = Arc::new(IrqLine::wire(&around.shell.fd, slot.gsi)?);
            let ram = Arc::clone(&around.shell.ram);
            let device = Arc::new(match saved(&slot.name)? {
                None => VirtioMmio::new(&slot.name, device, ram, line)?,
                Some(state) => VirtioMmio::restore(&slot.name, device, ram, line, &state)?,
            });
            device.wire_doorbells(&around.shell.fd, slot.base.0)?;
            bus.mmio.add(slot.base.0, WINDOW_BYTES, Arc::clone(&device) as _)?;
            bus.devices.push(device);
        }
        Ok(bus)
    }

    /// The MMIO bus that the devices are on.
    #[must_use]
    pub fn mmio(&self) -> &MmioBus {
        &self.mmio
    }

    /// Waits until no device touches memory or queues, and keeps it so until the guards added to
    /// `still` are dropped. The vCPUs must have stopped.
    ///
    /// # Errors
    /// [`VmmError::NotNow`] if that takes longer than `patience` in all.
    pub(crate) fn drain(&self, patience: Duration, still: &mut Vec<Still>) -> Result<()> {
        let until = Instant::now() + patience;
        let left = || until.saturating_duration_since(Instant::now());
        self.devices.iter().try_for_each(|device| {
            still.push(device.drain(left())?);
            Ok(())
        })
    }

    /// Iterates over the devices.
    pub(crate) fn devices(&self) -> impl ExactSizeIterator<Item = &VirtioMmio> {
        self.devices.iter().map(AsRef::as_ref)
    }

    /// Takes each device's saved state from `chunks`.
    ///
    /// # Errors
    /// [`VmmError::State`] if the states do not fit the devices.
    pub(crate) fn take_saved(&self, chunks: &mut ChunkSet) -> Result<Vec<SavedVirtio>> {
        let take = |device: &Arc<VirtioMmio>| {
            let saved = chunks.take(device.name())?;
            device.check(&saved)?;
            Ok(saved)
        };
        self.devices.iter().map(take).collect()
    }

    /// Gives each device the state that [`Self::take_saved`] found for it. The vCPUs must have
    /// stopped and the devices be [still](Self::drain); they do nothing until [`Self::go_on`].
    ///
    /// # Errors
    /// [`VmmError::State`] if one does not fit.
    pub(crate) fn put_back(&self, saved: &[SavedVirtio]) -> Result<()> {
        self.devices.iter().zip(saved).try_for_each(|(device, saved)| device.put_back(saved))
    }

    /// Makes each device resume what was under way when its state was saved. Harmless at any other
    /// time.
    pub(crate) fn go_on(&self) {
        self.devices.iter().for_each(|device| device.go_on());
    }
}

/// Refuses a list that no machine can have had, since it comes from a file.
fn check(slots: &[SavedSlot]) -> Result<()> {
    for (index, slot) in slots.iter().enumerate() {
        let wrong = |expected: String, found: String| {
            Err(VmmError::State { chunk: slot.name.clone(), expected, found })
        };
        let printable = slot.name.bytes().all(|byte| byte.is_ascii_graphic());
        if !printable || slot.name.is_empty() || slot.name.len() > NAME_LEN_MAX {
            let expected = format!("a device name of 1 to {NAME_LEN_MAX} printable characters");
            return wrong(expected, format!("{:?}", slot.name));
        }
        let taken = |other: &SavedSlot| other.gsi == slot.gsi;
        if !GSIS.contains(&slot.gsi) || slots[..index].iter().any(taken) {
            let expected = format!("an interrupt of its own, one of {GSIS:?}");
            return wrong(expected, slot.gsi.to_string());
        }
        let windows = HOLE_START..=DEVICES_END - WINDOW_BYTES;
        let base = slot.base.0;
        let taken = |other: &SavedSlot| other.base == slot.base;
        if !base.is_multiple_of(WINDOW_BYTES)
            || !windows.contains(&base)
            || slots[..index].iter().any(taken)
        {
            let expected = format!(
                "an address with {WINDOW_BYTES:#x} bytes of its own from {HOLE_START:#x} to {DEVICES_END:#x}"
            );
            return wrong(expected, format!("{base:#x}"));
        }
        let taken = |other: &SavedSlot| {
            let same_disk =
                matches!(slot.device, SlotDevice::Block { .. }) && other.device == slot.device;
            same_disk || other.name == slot.name
        };
        if let Some(other) = slots[..index].iter().find(|other| taken(other)) {
            let expected = "a device with its own name and disk".to_owned();
            return wrong(expected, format!("those of {}", other.name));
        }
        if let SlotDevice::Vsock { cid, .. } = slot.device
            && !vsock::is_guest_cid(cid)
        {
            return wrong(vsock::expected_cid(), cid.to_string());
        }
    }
    Ok(())
}

fn build(slot: &SavedSlot, around: &Surroundings<'_>) -> Result<Arc<dyn VirtioDevice>> {
    Ok(match &slot.device {
        SlotDevice::Block { disk } => {
            let found = around.disks.get(*disk).ok_or_else(|| VmmError::State {
                chunk: slot.name.clone(),
                expected: format!("one of the machine's {} disks", around.disks.len()),
                found: format!("disk {disk}"),
            })?;
            Arc::new(Block::new(Arc::clone(found))?)
        }
        SlotDevice::Net { tap, mac } => {
            let tap = match tap {
                Some(name) => Tap::open(name)?,
                None => Tap::unplugged()?,
            };
            Arc::new(Net::new(*mac, tap)?)
        }
        SlotDevice::Rng {} => Arc::new(Rng),
        SlotDevice::Balloon {} => {
            let free = ZeroedPages::new(Arc::clone(&around.shell.ram), around.punch);
            Arc::new(Balloon::new(Arc::new(free))?)
        }
        SlotDevice::Vsock { cid, socket: Some(path) } => {
            Arc::new(Vsock::new(*cid, Arc::new(UnixSockets::listen(path)?))?)
        }
        SlotDevice::Vsock { cid, socket: None } => {
            Arc::new(Vsock::new(*cid, Arc::new(Unreachable::new()?))?)
        }
    })
}
