//! Tests of devices and their transport, driven as a guest's driver should, and as it should not.

mod block;
mod devices;
mod hostile;
mod kvm;
mod net;
mod transport;
mod vsock;

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress};

use super::block::Block;
use super::{Interrupt, VirtioDevice, VirtioMmio};
use crate::disk::{Disk, DiskConfig, OverlayOptions};
use crate::memory::GuestRam;

const PATIENCE: Duration = Duration::from_secs(20);
const RAM_BYTES: u64 = 4 << 20;
/// Entries of each queue in these tests.
const ENTRIES: u16 = 16;
/// Where buffers are.
const DATA: u64 = 1 << 20;

const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;
const INDIRECT: u64 = 1 << 28;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

const NEEDS_RESET: u32 = 64;

/// Counts interrupts.
#[derive(Debug, Default)]
struct Count(AtomicU32);

impl Interrupt for Count {
    fn raise(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A device with memory around it.
struct Bed {
    ram: Arc<GuestRam>,
    interrupts: Arc<Count>,
    mmio: VirtioMmio,
}

impl Bed {
    fn new(device: Arc<dyn VirtioDevice>) -> Self {
        let ram = Arc::new(GuestRam::new(RAM_BYTES).unwrap());
        let interrupts = Arc::<Count>::default();
        let mmio =
            VirtioMmio::new("virtio0", device, Arc::clone(&ram), Arc::clone(&interrupts) as _);
        Self { ram, interrupts, mmio: mmio.unwrap() }
    }

    fn get(&self, offset: u64) -> u32 {
        let mut data = [0xaa; 4];
        self.mmio.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&self, offset: u64, value: u32) {
        self.mmio.write(offset, &value.to_le_bytes());
    }

    fn status(&self) -> u32 {
        self.get(0x70)
    }

    fn accept(&self, features: u64) {
        for half in 0..2 {
            self.set(0x24, half);
            self.set(0x20, (features >> (32 * half)) as u32);
        }
    }

    /// Initialises the device, with queue `n` at `queue_address(n)`.
    fn set_up(&self, features: u64) {
        self.set(0x70, 0);
        self.set(0x70, 1);
        self.set(0x70, 3);
        self.accept(features | VERSION_1);
        self.set(0x70, 11);
        assert_eq!(self.status(), 11, "the device takes the features");
        for queue in 0.. {
            self.set(0x30, queue);
            if self.get(0x34) == 0 {
                break;
            }
            self.set_up_queue(ENTRIES.into(), queue_address(queue as u16));
            assert_eq!(self.get(0x44), 1, "queue {queue} is ready");
        }
        self.set(0x70, 15);
        assert_eq!(self.status(), 15);
    }

    fn set_up_queue(&self, entries: u32, addresses: [u64; 3]) {
        self.set(0x38, entries);
        for (offset, address) in [0x80, 0x90, 0xa0].into_iter().zip(addresses) {
            self.set(offset, address as u32);
            self.set(offset + 4, (address >> 32) as u32);
        }
        self.set(0x44, 1);
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.ram.memory().write_slice(bytes, GuestAddress(address)).unwrap();
    }

    fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.ram.memory().read_slice(&mut out, GuestAddress(address)).unwrap();
        out
    }

    fn read_u16(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.read(address, 2).try_into().unwrap())
    }
}

/// Returns the addresses of a queue's descriptors, driver area and device area.
fn queue_address(queue: u16) -> [u64; 3] {
    let base = 0x1_0000 * (u64::from(queue) + 1);
    [base, base + 0x4000, base + 0x8000]
}

/// A driver's end of a queue.
struct Ring {
    queue: u16,
    /// Descriptors are used in order, wrapping around.
    next_descriptor: u16,
    next_avail: u16,
    next_used: u16,
}

/// Address, length, writable.
type Buffer = (u64, u32, bool);

impl Ring {
    fn new(queue: u16) -> Self {
        Self { queue, next_descriptor: 0, next_avail: 0, next_used: 0 }
    }

    fn put(bed: &Bed, table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        bed.write(table + u64::from(index) * 16, &bytes);
    }

    /// Makes a chain of `buffers` available without notifying the device. Returns its head.
    fn add(&mut self, bed: &Bed, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor % ENTRIES;
        for (at, (address, len, writable)) in buffers.iter().enumerate() {
            let index = self.next_descriptor % ENTRIES;
            self.next_descriptor += 1;
            let last = at + 1 == buffers.len();
            let flags = if last { 0 } else { NEXT } | if *writable { WRITE } else { 0 };
            let next = self.next_descriptor % ENTRIES;
            Self::put(bed, queue_address(self.queue)[0], index, *address, *len, flags, next);
        }
        self.offer(bed, head);
        head
    }

    /// Makes the chain at `head` available.
    fn offer(&mut self, bed: &Bed, head: u16) {
        let avail = queue_address(self.queue)[1];
        bed.write(avail + 4 + u64::from(self.next_avail % ENTRIES) * 2, &head.to_le_bytes());
        self.next_avail = self.next_avail.wrapping_add(1);
        bed.write(avail + 2, &self.next_avail.to_le_bytes());
    }

    fn kick(&self, bed: &Bed) {
        bed.set(0x50, self.queue.into());
    }

    /// Returns the next chain that came back, and how much was written to it.
    fn used(&mut self, bed: &Bed) -> Option<(u32, u32)> {
        let used = queue_address(self.queue)[2];
        if bed.read_u16(used + 2) == self.next_used {
            return None;
        }
        let at = used + 4 + u64::from(self.next_used % ENTRIES) * 8;
        self.next_used = self.next_used.wrapping_add(1);
        let word = |at| u32::from_le_bytes(bed.read(at, 4).try_into().unwrap());
        Some((word(at), word(at + 4)))
    }

    /// As [`Self::used`], but waits for it, for devices with a thread.
    fn wait_used(&mut self, bed: &Bed) -> (u32, u32) {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(used) = self.used(bed) {
                return used;
            }
            assert!(Instant::now() < until, "nothing comes back; status {}", bed.status());
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    (0..len as u64)
        .map(|at| ((at / 8 + seed * 77_777).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8 | 1)
        .collect()
}

fn disk_of(contents: &[u8], read_only: bool) -> (Arc<Disk>, NamedTempFile) {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(contents).unwrap();
    let config = DiskConfig { file: file.path().to_owned(), read_only, serial: Some("s-1".into()) };
    (Arc::new(Disk::open(0, &config, &OverlayOptions::default()).unwrap()), file)
}

fn block_on(contents: &[u8], read_only: bool) -> (Bed, NamedTempFile) {
    let (disk, file) = disk_of(contents, read_only);
    (Bed::new(Arc::new(Block::in_place(disk).unwrap())), file)
}
