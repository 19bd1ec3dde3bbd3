//! The MMIO bus: devices whose registers are memory to the guest.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use crate::error::{Result, VmmError};
use crate::memory::HOLE_START;

/// End of the part of the hole that devices may use. From here on are the interrupt controllers,
/// which KVM emulates, and pages that KVM needs for itself.
pub const DEVICES_END: u64 = 0xfec0_0000;

/// A device with registers on the MMIO bus. Any vCPU's thread may call it at any time.
pub trait MmioDevice: Debug + Send + Sync {
    /// Handles a read of `data.len()` bytes, 1 to 8, at `offset` bytes into its registers.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Handles a write of `data.len()` bytes, 1 to 8, at `offset` bytes into its registers.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A device, and the length of its registers in bytes.
#[derive(Debug)]
struct Window {
    len: u64,
    device: Arc<dyn MmioDevice>,
}

/// The devices by guest physical address. Built before the machine runs, and only read afterwards.
#[derive(Debug, Default)]
pub struct MmioBus {
    windows: BTreeMap<u64, Window>,
}

impl MmioBus {
    /// Adds a device with `len` bytes of registers from `base` on.
    ///
    /// # Errors
    /// [`VmmError::Config`] if the registers do not lie between [`HOLE_START`] and [`DEVICES_END`],
    /// or overlap another device's.
    pub fn add(&mut self, base: u64, len: u64, device: Arc<dyn MmioDevice>) -> Result<()> {
        let refused =
            |why: &str| VmmError::Config(format!("a device of {len:#x} bytes at {base:#x}: {why}"));
        let end = base
            .checked_add(len)
            .filter(|end| base >= HOLE_START && *end <= DEVICES_END && len > 0)
            .ok_or_else(|| {
                refused(&format!("expected addresses from {HOLE_START:#x} to {DEVICES_END:#x}"))
            })?;
        let before = self.windows.range(..end).next_back();
        if let Some((other, window)) = before
            && other + window.len > base
        {
            return Err(refused(&format!("it overlaps the one at {other:#x}")));
        }
        self.windows.insert(base, Window { len, device });
        Ok(())
    }

    /// Finds the device that owns all `len` bytes at `address`, and their offset in its registers.
    fn find(&self, address: u64, len: usize) -> Option<(&dyn MmioDevice, u64)> {
        let (base, window) = self.windows.range(..=address).next_back()?;
        let offset = address - base;
        let end = offset.checked_add(len as u64)?;
        (end <= window.len).then(|| (window.device.as_ref(), offset))
    }

    /// Handles a read. Addresses without a device read as ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Handles a write. Writes to addresses without a device are ignored.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Reads as its offset followed by its name, and records what is written.
    #[derive(Debug, Default)]
    struct Register {
        name: u8,
        written: Mutex<Vec<(u64, Vec<u8>)>>,
    }

    impl MmioDevice for Register {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.name);
            data[0] = offset as u8;
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.written.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn read(bus: &MmioBus, address: u64) -> [u8; 4] {
        let mut data = [0; 4];
        bus.read(address, &mut data);
        data
    }

    #[test]
    fn accesses_reach_the_device_that_has_the_address() {
        let [first, second] = [1, 2].map(|name| Arc::new(Register { name, ..Default::default() }));
        let mut bus = MmioBus::default();
        bus.add(HOLE_START, 0x1000, Arc::clone(&first) as _).unwrap();
        bus.add(HOLE_START + 0x1000, 0x100, Arc::clone(&second) as _).unwrap();
        assert_eq!(read(&bus, HOLE_START + 4), [4, 1, 1, 1]);
        assert_eq!(read(&bus, HOLE_START + 0x1008), [8, 2, 2, 2]);
        bus.write(HOLE_START + 0x10fc, &[7; 4]);
        assert_eq!(*second.written.lock().unwrap(), [(0xfc, vec![7; 4])]);
        assert!(first.written.lock().unwrap().is_empty());
    }

    #[test]
    fn what_nobody_has_reads_as_ones() {
        let device = Arc::new(Register::default());
        let mut bus = MmioBus::default();
        assert_eq!(read(&bus, HOLE_START), [0xff; 4]);
        bus.add(HOLE_START + 0x1000, 0x100, Arc::clone(&device) as _).unwrap();
        // Before the window, after it, half inside it, and at the end of the address space.
        for address in [HOLE_START + 0xffc, HOLE_START + 0x1100, HOLE_START + 0x10fe, u64::MAX] {
            assert_eq!(read(&bus, address), [0xff; 4], "{address:#x}");
            bus.write(address, &[0; 4]);
        }
        assert!(device.written.lock().unwrap().is_empty());
    }

    #[test]
    fn devices_keep_out_of_each_others_way_and_of_ram() {
        let device = || Arc::new(Register::default()) as Arc<dyn MmioDevice>;
        let mut bus = MmioBus::default();
        bus.add(HOLE_START + 0x1000, 0x1000, device()).unwrap();
        for (base, len) in
            [(0x1000, 0x1000), (0x1fff, 1), (0xfff, 2), (0, 0x4000), (0x1800, 0x1000)]
        {
            assert!(bus.add(HOLE_START + base, len, device()).is_err(), "{base:#x} {len:#x}");
        }
        for (base, len) in [(0, 0x1000), (HOLE_START, 0), (DEVICES_END, 1), (u64::MAX, 2)] {
            assert!(bus.add(base, len, device()).is_err(), "{base:#x} {len:#x}");
        }
        bus.add(HOLE_START, 0x1000, device()).unwrap();
        bus.add(HOLE_START + 0x2000, 1, device()).unwrap();
    }
}
