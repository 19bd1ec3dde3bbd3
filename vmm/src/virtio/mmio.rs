//! The MMIO transport: registers of a device, version 2 (virtio 1.2, 4.2.2).
//!
//! Registers are 32 bits wide and accessed as such; any other access to them reads as zeros and
//! changes nothing (4.2.2.2). The configuration space after them may be accessed in any width.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvm_ioctls::{IoEventAddress, VmFd};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as register;
use vmm_sys_util::eventfd::EventFd;

use super::link::{DRIVER_OK, FAILED, INTERRUPTS, Link, NEEDS_RESET};
use super::queue::{COMMON_FEATURES, Violation, VirtQueue, bit};
use super::saved::{CapturedVirtio, SavedQueue, SavedVirtio};
use super::{Interrupt, StateMismatch, Still, VirtioDevice};
use crate::devices::Device;
use crate::devices::mmio::MmioDevice;
use crate::error::{Result, VmmError};
use crate::memory::GuestRam;
use crate::vcpu::saved::Reg;

/// Length of a device's window in bytes.
pub const WINDOW_BYTES: u64 = 0x1000;
/// The offset in the window at which the driver writes a queue's number to notify the device.
const NOTIFY_OFFSET: u64 = register::VIRTIO_MMIO_QUEUE_NOTIFY as u64;

const CONFIG: u64 = register::VIRTIO_MMIO_CONFIG as u64;
/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "frzl". Drivers may tell vendors apart by it, and need not.
const VENDOR: u32 = 0x6c7a_7266;

const ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
const DRIVER: u8 = VIRTIO_CONFIG_S_DRIVER as u8;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;

/// Registers that select what other registers refer to.
#[derive(Debug, Default)]
struct Selectors {
    device_features: u32,
    driver_features: u32,
    queue: u32,
}

/// A device in its window. See the module documentation.
#[derive(Debug)]
pub struct VirtioMmio {
    link: Arc<Link>,
    device: Arc<dyn VirtioDevice>,
    /// Locked for each write to a register, except notifications and interrupt acknowledgements,
    /// which come from all vCPUs at once. A queue's lock is taken after this one, never before.
    selectors: Mutex<Selectors>,
}

impl VirtioMmio {
    /// Creates a device in its reset state. `name` is also that of its chunk.
    ///
    /// # Errors
    /// [`VmmError::Host`] if the device cannot be started.
    pub fn new(
        name: impl Into<String>,
        device: Arc<dyn VirtioDevice>,
        ram: Arc<GuestRam>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<Self> {
        let link = Arc::new(Link::new(name.into(), device.queue_sizes(), ram, interrupt));
        device.start(&link)?;
        Ok(Self { link, device, selectors: Mutex::default() })
    }

    /// Creates a device with the state `saved`. It does nothing until [`Self::go_on`].
    ///
    /// # Errors
    /// As [`Self::new`]; [`VmmError::State`] if the state is another device's or makes no sense.
    pub fn restore(
        name: impl Into<String>,
        device: Arc<dyn VirtioDevice>,
        ram: Arc<GuestRam>,
        interrupt: Arc<dyn Interrupt>,
        saved: &SavedVirtio,
    ) -> Result<Self> {
        let restored = Self::new(name, device, ram, interrupt)?;
        restored.put_back(saved)?;
        Ok(restored)
    }

    /// The device's name, and that of its chunk.
    #[must_use]
    pub fn name(&self) -> &str {
        self.link.name()
    }

    /// The number of the device's kind (5).
    #[must_use]
    pub fn device_id(&self) -> u32 {
        self.device.device_id()
    }

    /// Has KVM notify the device itself, if the device has a thread that listens: a vCPU that
    /// writes a queue's number to QueueNotify then does not leave the guest. `window` is the guest
    /// physical address of the window. This is optional: [`Self::write`] does the same.
    ///
    /// # Errors
    /// [`VmmError::Kvm`] if KVM refuses.
    pub fn wire_doorbells(&self, vm: &VmFd, window: u64) -> Result<()> {
        let notify = IoEventAddress::Mmio(window + NOTIFY_OFFSET);
        for (queue, doorbell) in self.doorbells() {
            // A `u32`, as wide as the register.
            vm.register_ioevent(doorbell, &notify, u32::from(queue))
                .map_err(VmmError::kvm("wire a virtio notification"))?;
        }
        Ok(())
    }

    /// Iterates over the queues whose notifications need no vCPU's thread, with their doorbells.
    fn doorbells(&self) -> impl Iterator<Item = (u16, &EventFd)> {
        (0..self.link.queues.len() as u16)
            .filter_map(|queue| Some((queue, self.device.doorbell(queue)?)))
    }

    /// Waits until the device touches neither memory nor queues, and keeps it so until the returned
    /// guard is dropped. The vCPUs must have stopped.
    ///
    /// # Errors
    /// [`VmmError::NotNow`], naming the device, if that takes longer than `patience`; it then goes
    /// on.
    pub fn drain(&self, patience: Duration) -> Result<Still> {
        self.device.drain(patience).map_err(|error| match error {
            VmmError::NotNow(why) => VmmError::NotNow(format!("{}: {why}", self.name())),
            other => other,
        })
    }

    /// Resumes work that was under way when the device's state was saved: what waits in its queues,
    /// and an interrupt that may not have arrived. Harmless at any other time.
    pub fn go_on(&self) {
        self.link.interrupt_again();
        self.device.go_on();
        (0..self.link.queues.len() as u16).for_each(|queue| self.notify(u32::from(queue)));
    }

    fn selectors(&self) -> MutexGuard<'_, Selectors> {
        self.selectors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn offered(&self) -> u64 {
        COMMON_FEATURES | self.device.features()
    }

    /// Handles a read at `offset` in the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            let config = self.device.config();
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            let there = config.get(start..).unwrap_or_default();
            let len = there.len().min(data.len());
            data[..len].copy_from_slice(&there[..len]);
        } else if let (Ok(data), true) = (<&mut [u8; 4]>::try_from(data), offset.is_multiple_of(4))
        {
            *data = self.read_register(offset as u32).to_le_bytes();
        }
    }

    fn read_register(&self, offset: u32) -> u32 {
        let selectors = self.selectors();
        match offset {
            register::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            register::VIRTIO_MMIO_VERSION => VERSION,
            register::VIRTIO_MMIO_DEVICE_ID => self.device.device_id(),
            register::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            register::VIRTIO_MMIO_DEVICE_FEATURES => match selectors.device_features {
                0 => self.offered() as u32,
                1 => (self.offered() >> 32) as u32,
                _ => 0,
            },
            register::VIRTIO_MMIO_QUEUE_NUM_MAX => {
                self.link.lock(selectors.queue as usize).map_or(0, |queue| queue.max_size().into())
            }
            register::VIRTIO_MMIO_QUEUE_READY => {
                self.link.lock(selectors.queue as usize).map_or(0, |queue| queue.is_ready().into())
            }
            register::VIRTIO_MMIO_INTERRUPT_STATUS => {
                self.link.interrupt_status.load(Ordering::Acquire).into()
            }
            register::VIRTIO_MMIO_STATUS => self.link.status.load(Ordering::Acquire).into(),
            // There is no shared memory: its length reads as all ones (4.2.2).
            register::VIRTIO_MMIO_SHM_LEN_LOW
            | register::VIRTIO_MMIO_SHM_LEN_HIGH
            | register::VIRTIO_MMIO_SHM_BASE_LOW
            | register::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            register::VIRTIO_MMIO_CONFIG_GENERATION => {
                self.link.config_generation.load(Ordering::Acquire)
            }
            _ => 0,
        }
    }

    /// Handles a write at `offset` in the window.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.device.write_config(offset, data);
        } else if let (Ok(data), true) = (<[u8; 4]>::try_from(data), offset.is_multiple_of(4)) {
            self.write_register(offset as u32, u32::from_le_bytes(data));
        }
    }

    fn write_register(&self, offset: u32, value: u32) {
        match offset {
            register::VIRTIO_MMIO_QUEUE_NOTIFY => return self.notify(value),
            register::VIRTIO_MMIO_INTERRUPT_ACK => {
                self.link.interrupt_status.fetch_and(!(value as u8), Ordering::AcqRel);
                return;
            }
            _ => {}
        }
        let mut selectors = self.selectors();
        match offset {
            register::VIRTIO_MMIO_DEVICE_FEATURES_SEL => selectors.device_features = value,
            register::VIRTIO_MMIO_DRIVER_FEATURES_SEL => selectors.driver_features = value,
            register::VIRTIO_MMIO_DRIVER_FEATURES => {
                self.accept_features(selectors.driver_features, value);
            }
            register::VIRTIO_MMIO_QUEUE_SEL => selectors.queue = value,
            register::VIRTIO_MMIO_QUEUE_READY => self.set_ready(selectors.queue, value),
            register::VIRTIO_MMIO_STATUS => self.set_status(&mut selectors, value),
            _ => self.set_up_queue(selectors.queue, offset, value),
        }
    }

    fn notify(&self, queue: u32) {
        let known =
            u16::try_from(queue).ok().filter(|at| usize::from(*at) < self.link.queues.len());
        if let Some(queue) = known
            && self.link.is_live()
        {
            self.device.notify(&self.link, queue);
        }
    }

    /// Takes one half of the features that the driver wants, unless it has settled them (3.1.1).
    fn accept_features(&self, half: u32, value: u32) {
        if half > 1 || self.link.status.load(Ordering::Acquire) & FEATURES_OK != 0 {
            return;
        }
        let (shift, value) = (half * 32, u64::from(value));
        let others = self.link.driver_features.load(Ordering::Acquire) & !(0xffff_ffff << shift);
        self.link.driver_features.store(others | value << shift, Ordering::Release);
    }

    /// Follows the driver through initialisation (3.1.1): bits are set in order and never cleared,
    /// other than by writing zero, which resets the device.
    fn set_status(&self, selectors: &mut Selectors, value: u32) {
        if value == 0 {
            return self.reset(selectors);
        }
        let before = self.link.status.load(Ordering::Acquire);
        let value = value as u8 & (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED);
        if before & !value & !NEEDS_RESET != 0 {
            return;
        }
        let mut gained = value & !before;
        if (before | gained) & (ACKNOWLEDGE | DRIVER) != ACKNOWLEDGE | DRIVER {
            gained &= ACKNOWLEDGE | DRIVER | FAILED;
        }
        // Unacceptable features leave the bit clear, which the driver checks (2.1).
        let wanted = self.link.driver_features.load(Ordering::Acquire);
        if wanted & !self.offered() != 0 || wanted & bit(VIRTIO_F_VERSION_1) == 0 {
            gained &= !FEATURES_OK;
        }
        if (before | gained) & FEATURES_OK == 0 {
            gained &= !DRIVER_OK;
        }
        self.link.status.fetch_or(gained, Ordering::AcqRel);
    }

    fn reset(&self, selectors: &mut Selectors) {
        self.link.status.store(0, Ordering::Release);
        for index in 0..self.link.queues.len() {
            // Waits for the device if it is working on the queue.
            if let Some(mut queue) = self.link.lock(index) {
                queue.reset();
            }
        }
        self.device.reset();
        *selectors = Selectors::default();
        self.link.interrupt_status.store(0, Ordering::Release);
        self.link.driver_features.store(0, Ordering::Release);
        // NEEDS_RESET may have been set until the last lock was taken.
        self.link.status.store(0, Ordering::Release);
    }

    /// Returns true once queues may be set up (3.1.1, step 7).
    fn has_features(&self) -> bool {
        self.link.status.load(Ordering::Acquire) & FEATURES_OK != 0
    }

    fn set_ready(&self, queue: u32, value: u32) {
        let Some(mut queue) = self.link.lock(queue as usize) else { return };
        if value & 1 == 0 {
            queue.retire();
        } else if self.has_features() && !queue.is_ready() {
            let features = self.link.driver_features.load(Ordering::Acquire);
            if let Err(violation) = queue.make_ready(features, self.link.memory()) {
                self.link.give_up(&violation);
            }
        }
    }

    /// Handles writes to the registers that describe a queue; ignored while it is in use.
    fn set_up_queue(&self, queue: u32, offset: u32, value: u32) {
        let Some(mut queue) = self.link.lock(queue as usize) else { return };
        if !self.has_features() || queue.is_ready() {
            return;
        }
        let low = |address: &mut u64| *address = *address & !0xffff_ffff | u64::from(value);
        let high = |address: &mut u64| *address = *address & 0xffff_ffff | u64::from(value) << 32;
        let registers = &mut queue.registers;
        match offset {
            register::VIRTIO_MMIO_QUEUE_NUM => {
                registers.size = u16::try_from(value).unwrap_or_default();
            }
            register::VIRTIO_MMIO_QUEUE_DESC_LOW => low(&mut registers.descriptors),
            register::VIRTIO_MMIO_QUEUE_DESC_HIGH => high(&mut registers.descriptors),
            register::VIRTIO_MMIO_QUEUE_AVAIL_LOW => low(&mut registers.driver),
            register::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => high(&mut registers.driver),
            register::VIRTIO_MMIO_QUEUE_USED_LOW => low(&mut registers.device),
            register::VIRTIO_MMIO_QUEUE_USED_HIGH => high(&mut registers.device),
            _ => {}
        }
    }

    /// Returns the device's state. The vCPUs must have stopped and the device be
    /// [still](Self::drain).
    #[must_use]
    pub fn save(&self) -> SavedVirtio {
        self.save_in(Vec::new())
    }

    /// As [`Self::save`], reusing the allocation of `queues`.
    fn save_in(&self, mut queues: Vec<SavedQueue>) -> SavedVirtio {
        let selectors = self.selectors();
        queues.clear();
        let locked = (0..self.link.queues.len()).filter_map(|index| self.link.lock(index));
        queues.extend(locked.map(|queue| queue.save()));
        SavedVirtio {
            status: self.link.status.load(Ordering::Acquire),
            interrupt_status: self.link.interrupt_status.load(Ordering::Acquire),
            config_generation: self.link.config_generation.load(Ordering::Acquire),
            device_features_sel: selectors.device_features,
            driver_features_sel: selectors.driver_features,
            driver_features: Reg(self.link.driver_features.load(Ordering::Acquire)),
            queue_sel: selectors.queue,
            queues,
            device: self.device.save(),
        }
    }

    /// Gives the device the state `saved`; guest memory is, or is about to be, what it was then.
    /// The vCPUs must have stopped and the device be [still](Self::drain). It does nothing until
    /// [`Self::go_on`].
    ///
    /// # Errors
    /// [`VmmError::State`] if `saved` is another device's or makes no sense; the device is then
    /// unchanged.
    pub fn put_back(&self, saved: &SavedVirtio) -> Result<()> {
        let queues = self.queues_of(saved).map_err(|mismatch| self.refuse(mismatch))?;
        self.device.put_back(&saved.device).map_err(|mismatch| self.refuse(mismatch))?;
        let mut selectors = self.selectors();
        *selectors = Selectors {
            device_features: saved.device_features_sel,
            driver_features: saved.driver_features_sel,
            queue: saved.queue_sel,
        };
        for (index, restored) in queues.into_iter().enumerate() {
            if let Some(mut queue) = self.link.lock(index) {
                *queue = restored;
            }
        }
        self.link.driver_features.store(saved.driver_features.0, Ordering::Release);
        self.link.interrupt_status.store(saved.interrupt_status, Ordering::Release);
        self.link.config_generation.store(saved.config_generation, Ordering::Release);
        self.link.status.store(saved.status, Ordering::Release);
        Ok(())
    }

    /// Checks that `saved` can be [put back](Self::put_back).
    ///
    /// # Errors
    /// [`VmmError::State`] if it cannot.
    pub fn check(&self, saved: &SavedVirtio) -> Result<()> {
        let checked = self.queues_of(saved).and_then(|_queues| self.device.check(&saved.device));
        checked.map_err(|mismatch| self.refuse(mismatch))
    }

    fn refuse(&self, StateMismatch { expected, found }: StateMismatch) -> VmmError {
        VmmError::State { chunk: self.name().to_owned(), expected, found }
    }

    /// Returns the queues in `saved`, if all of it fits this device.
    fn queues_of(&self, saved: &SavedVirtio) -> Result<Vec<VirtQueue>, StateMismatch> {
        let sizes: Vec<u16> = saved.queues.iter().map(|queue| queue.max_size).collect();
        if sizes != self.device.queue_sizes() {
            return Err(StateMismatch::new(self.device.queue_sizes(), sizes));
        }
        self.check_registers(saved)?;
        let features = saved.driver_features.0;
        let restore = |queue| VirtQueue::restore(queue, features, self.link.memory());
        let mismatch =
            |Violation(found)| StateMismatch { expected: "virtqueues in RAM".into(), found };
        saved.queues.iter().map(restore).collect::<Result<_, _>>().map_err(mismatch)
    }
}

impl VirtioMmio {
    /// Checks that a driver can have brought the registers to what `saved` says: see
    /// [`Self::set_status`].
    fn check_registers(&self, saved: &SavedVirtio) -> Result<(), StateMismatch> {
        let wrong = |expected: &str, found: String| {
            Err(StateMismatch { expected: expected.to_owned(), found })
        };
        let (status, features) = (saved.status, saved.driver_features.0);
        let known = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED | NEEDS_RESET;
        // Each bit, with those that must be set before it.
        let steps = [(FEATURES_OK, ACKNOWLEDGE | DRIVER), (DRIVER_OK, FEATURES_OK)];
        let in_order = |(bit, before): (u8, u8)| status & bit == 0 || status & before == before;
        if status & !known != 0 || !steps.into_iter().all(in_order) {
            return wrong("a status that a driver can reach", format!("{status:#x}"));
        }
        if saved.interrupt_status & !INTERRUPTS != 0 {
            return wrong(
                &format!("interrupt status bits among {INTERRUPTS:#x}"),
                format!("{:#x}", saved.interrupt_status),
            );
        }
        let settled = status & FEATURES_OK != 0;
        if settled && (features & !self.offered() != 0 || features & bit(VIRTIO_F_VERSION_1) == 0) {
            let expected = format!(
                "features among {:#x}, including {:#x}",
                self.offered(),
                bit(VIRTIO_F_VERSION_1)
            );
            return wrong(&expected, format!("{features:#x}"));
        }
        match saved.queues.iter().position(|queue| queue.ready && !settled) {
            Some(queue) => {
                wrong("no queue in use before the features are settled", format!("queue {queue}"))
            }
            None => Ok(()),
        }
    }
}

impl MmioDevice for VirtioMmio {
    fn read(&self, offset: u64, data: &mut [u8]) {
        Self::read(self, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        Self::write(self, offset, data);
    }
}

impl Device for VirtioMmio {
    type State = CapturedVirtio;

    /// The device need not be [still](Self::drain) if the result is only there to be overwritten.
    fn state(&self) -> CapturedVirtio {
        CapturedVirtio { name: self.name().to_owned(), saved: self.save() }
    }

    /// The device must be [still](Self::drain).
    fn capture(&self, into: &mut CapturedVirtio) {
        into.saved = self.save_in(std::mem::take(&mut into.saved.queues));
    }
}
