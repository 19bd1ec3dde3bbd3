//! Devices, and the buses that lead to them.

pub mod i8042;
pub mod mmio;
pub mod platform;
pub mod power;
pub mod rtc;
pub mod serial;
pub mod vmgenid;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use frazil_snapstore::StateChunk;

use crate::error::Result;
use crate::vcpu::Ended;
use crate::virtio::{CapturedVirtio, VirtioBus};
use i8042::I8042;
use power::Power;
use rtc::{Rtc, SavedRtc};
use serial::{SavedSerial, SerialPort};
use vmgenid::{SavedVmGenId, VmGenId};

/// A device as checkpoints see it. To restore one, each type has its own constructor.
pub trait Device {
    /// The state to save, or [`Stateless`] if there is none. There is no default: each device
    /// decides.
    type State: Captured;

    /// Returns the current state. This also allocates what [`Self::capture`] later fills.
    fn state(&self) -> Self::State;

    /// Overwrites `into`, an earlier state of this device, with the current one. The vCPUs stand
    /// still and wait, so nothing is encoded or allocated here.
    fn capture(&self, into: &mut Self::State);
}

/// A device's state, copied while the guest stands still and encoded once it runs again.
pub trait Captured: Send + std::fmt::Debug {
    /// Encodes the state as a chunk, if there is any.
    ///
    /// # Errors
    /// If it cannot be encoded.
    fn chunk(&self) -> Result<Option<StateChunk>>;
}

/// The state of a device that has none: a new device is as good as the old one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stateless;

impl Captured for Stateless {
    fn chunk(&self) -> Result<Option<StateChunk>> {
        Ok(None)
    }
}

/// The state of every device of a machine.
#[derive(Debug)]
pub struct CapturedDevices {
    serial: SavedSerial,
    keyboard: Stateless,
    power: Stateless,
    rtc: Option<SavedRtc>,
    generation: Option<SavedVmGenId>,
    virtio: Vec<CapturedVirtio>,
}

impl CapturedDevices {
    /// Encodes the devices' chunks.
    ///
    /// # Errors
    /// The error of the first device whose state cannot be encoded.
    pub fn save(&self) -> Result<Vec<StateChunk>> {
        let Self { serial, keyboard, power, rtc, generation, virtio } = self;
        let some = rtc.iter().map(|it| it as &dyn Captured);
        let some = some.chain(generation.iter().map(|it| it as _));
        let with_ports: [&dyn Captured; 3] = [serial, keyboard, power];
        let all = with_ports.into_iter().chain(some).chain(virtio.iter().map(|it| it as _));
        all.filter_map(|state| state.chunk().transpose()).collect()
    }
}

/// The buses of a machine: port I/O, where ports without a device read as ones, and MMIO, with the
/// virtio devices.
#[derive(Debug)]
pub struct Bus {
    serial: Mutex<SerialPort>,
    /// The serial port's own counter, for readers that must not wait for the port's lock.
    serial_dropped_bytes: Arc<AtomicU64>,
    keyboard: I8042,
    power: Power,
    rtc: Option<Mutex<Rtc>>,
    generation: Option<VmGenId>,
    virtio: VirtioBus,
}

impl Bus {
    /// Puts together COM1, the keyboard controller, the sleep registers and the clock on port I/O,
    /// the generation id in memory, and `virtio`.
    #[must_use]
    pub fn new(
        serial: SerialPort,
        rtc: Option<Rtc>,
        generation: Option<VmGenId>,
        virtio: VirtioBus,
    ) -> Self {
        Self {
            serial_dropped_bytes: serial.dropped_bytes(),
            serial: Mutex::new(serial),
            keyboard: I8042,
            power: Power,
            rtc: rtc.map(Mutex::new),
            generation,
            virtio,
        }
    }

    /// Bytes of serial output dropped because nobody read them in time.
    #[must_use]
    pub fn serial_dropped_bytes(&self) -> u64 {
        self.serial_dropped_bytes.load(Ordering::Relaxed)
    }

    /// The serial port.
    pub fn serial(&self) -> MutexGuard<'_, SerialPort> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The clock, if there is one.
    pub fn rtc(&self) -> Option<MutexGuard<'_, Rtc>> {
        self.rtc.as_ref().map(|rtc| rtc.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The generation id, if there is one.
    #[must_use]
    pub fn generation(&self) -> Option<&VmGenId> {
        self.generation.as_ref()
    }

    /// Makes each device resume what was under way when its state was saved, and the guest check
    /// whether its generation is new. Harmless at any other time.
    pub(crate) fn go_on(&self) {
        self.virtio.go_on();
        if let Some(generation) = &self.generation {
            generation.go_on();
        }
    }

    /// The virtio devices.
    #[must_use]
    pub fn virtio(&self) -> &VirtioBus {
        &self.virtio
    }

    /// Handles a write to a port. Devices on the bus are eight bits wide: wider accesses touch
    /// consecutive ports. Returns how the machine ended if the write ends it.
    pub fn pio_write(&self, port: u16, data: &[u8]) -> Option<Ended> {
        let mut ended = None;
        for (offset, value) in data.iter().enumerate() {
            let port = port.wrapping_add(offset as u16);
            if let Some(register) = serial::register(port) {
                self.serial().write(register, *value);
            } else if i8042::owns(port) {
                ended = ended.or(self.keyboard.write(port, *value));
            } else if power::owns(port) {
                ended = ended.or(self.power.write(port, *value));
            } else if rtc::owns(port)
                && let Some(mut rtc) = self.rtc()
            {
                rtc.write(port, *value);
            }
        }
        ended
    }

    /// Handles a read from a port.
    pub fn pio_read(&self, port: u16, data: &mut [u8]) {
        for (offset, value) in data.iter_mut().enumerate() {
            let port = port.wrapping_add(offset as u16);
            *value = if let Some(register) = serial::register(port) {
                self.serial().read(register)
            } else if i8042::owns(port) {
                self.keyboard.read(port)
            } else if power::owns(port) {
                self.power.read(port)
            } else if rtc::owns(port)
                && let Some(rtc) = self.rtc()
            {
                rtc.read(port)
            } else {
                0xff
            };
        }
    }

    /// Returns the current state of every device, for [`Self::capture`] to overwrite.
    #[must_use]
    pub fn room(&self) -> CapturedDevices {
        CapturedDevices {
            serial: self.serial().state(),
            keyboard: self.keyboard.state(),
            power: self.power.state(),
            rtc: self.rtc().map(|rtc| rtc.state()),
            generation: self.generation.as_ref().map(VmGenId::state),
            virtio: self.virtio.devices().map(Device::state).collect(),
        }
    }

    /// Overwrites `into`, an earlier state of this machine, with the current state of every device.
    /// The vCPUs must have stopped and the virtio devices be still. Allocates only for serial input
    /// that the guest has not read.
    pub fn capture(&self, into: &mut CapturedDevices) {
        let CapturedDevices { serial, keyboard, power, rtc, generation, virtio } = into;
        self.serial().capture(serial);
        self.keyboard.capture(keyboard);
        self.power.capture(power);
        if let (Some(ours), Some(into)) = (self.rtc(), rtc) {
            ours.capture(into);
        }
        if let (Some(ours), Some(into)) = (&self.generation, generation) {
            ours.capture(into);
        }
        self.virtio.devices().zip(virtio).for_each(|(device, into)| device.capture(into));
    }
}
