//! A hostile driver, for fuzzers: whatever it does to registers and rings, no device may panic, run
//! forever, or write anywhere but where it was allowed to.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use frazil_snapstore::PAGE_SIZE;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, SeekFrom, memfd_create, seek};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vm_memory::{Bytes, GuestAddress};

use super::balloon::Balloon;
use super::block::Block;
use super::free_pages::FreePages;
use super::link::NEEDS_RESET;
use super::net::{Net, Tap};
use super::rng::Rng;
use super::vsock::{HostSockets, Vsock};
use super::{Interrupt, SavedDevice, VirtioDevice, VirtioMmio, WINDOW_BYTES};
use crate::devices::Device;
use crate::devices::mmio::MmioBus;
use crate::devices::rtc::{self, HostClock, Rtc as CmosClock};
use crate::disk::{Disk, DiskConfig, OverlayOptions};
use crate::memory::{GuestRam, HOLE_START};

/// Length of RAM in bytes: the least a machine can have.
const RAM_BYTES: u64 = 2 << 20;
/// Where the driver's structures are, one page each; the rest of the arena is data.
const ARENA: u64 = 0x1_0000;
const TABLE: u64 = ARENA;
const INDIRECT: u64 = ARENA + 0x1000;
const AVAIL: u64 = ARENA + 0x2000;
const USED: u64 = ARENA + 0x3000;
const DATA: u64 = ARENA + 0x4000;
const ARENA_LEN: usize = 16 * PAGE_SIZE;
/// Bad addresses: misaligned, at the end of RAM, in the hole, at the end of the address space.
const BAD: [u64; 4] = [TABLE + 1, RAM_BYTES - 8, 3 << 30, u64::MAX - 7];
/// Where packets of the socket device are received.
const RECEIVED: u64 = DATA + 0xa000;
/// Bytes of a page that are compared at once.
const PIECE_BYTES: usize = 64;
/// Entries of each queue: few, so that chains run into each other.
const ENTRIES: u16 = 8;

/// A fuzz target and its name.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: [Target; 6] = [
    ("buses", buses),
    ("virtio_block", |bytes| drive(block(), bytes)),
    ("virtio_rng", |bytes| drive(Arc::new(Rng), bytes)),
    ("virtio_net", |bytes| drive(net(), bytes)),
    ("virtio_balloon", |bytes| drive(balloon(), bytes)),
    ("virtio_vsock", |bytes| drive(vsock(), bytes)),
];

/// Returns the target `name`, for the fuzzer's programs.
///
/// # Panics
/// If there is no such target.
#[must_use]
pub fn target(name: &str) -> fn(&[u8]) {
    let found = TARGETS.iter().find(|(other, _)| *other == name);
    found.unwrap_or_else(|| panic!("there is no target {name}")).1
}

/// An interrupt that goes nowhere.
#[derive(Debug)]
struct Unwired;

impl Interrupt for Unwired {
    fn raise(&self) {}
}

/// Checks the pages that it is given, and leaves them as they are.
#[derive(Debug)]
struct Inspector;

impl FreePages for Inspector {
    fn free(&self, address: GuestAddress, len_bytes: u64) -> std::io::Result<()> {
        let page = PAGE_SIZE as u64;
        assert!(address.0.is_multiple_of(page) && len_bytes.is_multiple_of(page), "whole pages");
        assert!(len_bytes > 0 && address.0 + len_bytes <= RAM_BYTES, "inside RAM");
        Ok(())
    }
}

fn balloon() -> Arc<dyn VirtioDevice> {
    Arc::new(Balloon::in_place(Arc::new(Inspector)).expect("an eventfd"))
}

/// The guest's context id.
const CID: u32 = 3;
/// How many programs call the guest.
const CALLERS: usize = 2;

/// Servers on ports below 4, one of which hangs up at once, and programs that call ports 0 and 1.
#[derive(Debug)]
struct Neighbours {
    callers: OwnedFd,
    called: AtomicUsize,
    /// The other ends, which send something but never read.
    ends: Mutex<Vec<UnixStream>>,
}

impl Neighbours {
    fn pair(&self, says: &str, stays: bool) -> io::Result<UnixStream> {
        let (mut end, stream) = UnixStream::pair()?;
        end.write_all(says.as_bytes())?;
        stream.set_nonblocking(true)?;
        if stays {
            self.ends.lock().unwrap_or_else(PoisonError::into_inner).push(end);
        }
        Ok(stream)
    }
}

impl HostSockets for Neighbours {
    fn listener(&self) -> RawFd {
        self.callers.as_raw_fd()
    }

    fn accept(&self) -> io::Result<UnixStream> {
        let called = self.called.fetch_add(1, Ordering::Relaxed);
        if called >= CALLERS {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.pair(&format!("CONNECT {called}\nhello"), true)
    }

    fn connect(&self, port: u32) -> io::Result<UnixStream> {
        if port < 4 { self.pair("hello", port > 0) } else { Err(io::ErrorKind::NotFound.into()) }
    }
}

fn vsock() -> Arc<dyn VirtioDevice> {
    let callers = eventfd(1, EventfdFlags::CLOEXEC).expect("an eventfd");
    let neighbours =
        Arc::new(Neighbours { callers, called: AtomicUsize::new(0), ends: Mutex::default() });
    Arc::new(Vsock::in_place(CID, neighbours).expect("epoll"))
}

/// A card for which some frames wait, and whose other end is closed.
fn net() -> Arc<dyn VirtioDevice> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::DGRAM, flags, None).expect("sockets");
    for frame in [&[1; 60][..], &[2; 1514], &[3; 14]] {
        rustix::io::write(&theirs, frame).expect("room");
    }
    let mac = "02:00:00:00:00:01".parse().expect("an address");
    let tap = Tap::from_fd(ours).expect("a socket");
    Arc::new(Net::in_place(mac, tap).expect("an eventfd"))
}

/// The contents of the disk, which never change.
fn base() -> File {
    let memfd = memfd_create("fuzz-disk", MemfdFlags::CLOEXEC).expect("a memfd");
    let file = File::from(memfd);
    file.write_all_at(&vec![0xee; 64 << 10], 0).expect("room");
    file
}

fn block() -> Arc<dyn VirtioDevice> {
    static BASE: OnceLock<File> = OnceLock::new();
    let file = format!("/proc/self/fd/{}", BASE.get_or_init(base).as_raw_fd()).into();
    let config = DiskConfig { file, read_only: false, serial: None };
    let disk = Disk::open(0, &config, &OverlayOptions::default()).expect("a disk");
    Arc::new(Block::in_place(Arc::new(disk)).expect("an eventfd"))
}

/// The bytes that determine what the driver does next; zeros when they run out.
struct Bytestream<'a>(&'a [u8]);

impl Bytestream<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// Picks one of `of`.
    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::from(self.byte()) % of.len()]
    }

    /// A number below `limit`.
    fn below(&mut self, limit: u32) -> u32 {
        u32::from(u16::from_le_bytes([self.byte(), self.byte()])) % limit
    }
}

struct Driver<'a> {
    bytes: Bytestream<'a>,
    ram: Arc<GuestRam>,
    mmio: VirtioMmio,
    /// The arena's contents if only the driver writes to it.
    shadow: Vec<u8>,
    /// Which bytes of the arena devices may write.
    given: Vec<bool>,
    next_avail: u16,
}

/// Makes accesses of any width to any address and port.
fn buses(bytes: &[u8]) {
    let ram = Arc::new(GuestRam::new(RAM_BYTES).expect("memory"));
    let mut bus = MmioBus::default();
    let device = |device| {
        let made = VirtioMmio::new("fuzz", device, Arc::clone(&ram), Arc::new(Unwired));
        Arc::new(made.expect("a device"))
    };
    // Two windows side by side, and one after a gap.
    for (window, device) in
        [(0, device(Arc::new(Rng))), (1, device(balloon())), (3, device(vsock()))]
    {
        let base = HOLE_START + window * WINDOW_BYTES;
        bus.add(base, WINDOW_BYTES, device).expect("room on the bus");
    }
    let mut clock = CmosClock::new(Box::new(HostClock));
    let mut bytes = Bytestream(bytes);
    while !bytes.0.is_empty() {
        let near = HOLE_START + u64::from(bytes.below(5 * WINDOW_BYTES as u32));
        let far = u64::from(bytes.word()) << 32 | u64::from(bytes.word());
        let address = bytes.pick(&[near, near, near, far]);
        let width = 1 + bytes.below(8) as usize;
        let mut data: Vec<u8> = (0..width).map(|_| bytes.byte()).collect();
        match bytes.byte() % 4 {
            0 => bus.read(address, &mut data),
            1 => bus.write(address, &data),
            2 => clock.write(rtc::INDEX + u16::from(data[0] & 1), data[width - 1]),
            _ => drop(clock.read(rtc::INDEX + u16::from(data[0] & 1))),
        }
    }
    let saved = clock.state();
    clock.put_back(&saved, rtc::TimeAfterResume::Snapshot).expect("its own state");
}

thread_local! {
    /// All-zero RAM, kept from run to run: creating it takes longer than many a run.
    static RAM: Cell<Option<Arc<GuestRam>>> = const { Cell::new(None) };
}

/// Lets `bytes` drive a device.
///
/// # Panics
/// If the device does what no device may.
fn drive(device: Arc<dyn VirtioDevice>, bytes: &[u8]) {
    let ram = RAM.take().unwrap_or_else(|| Arc::new(GuestRam::new(RAM_BYTES).expect("memory")));
    let mmio = VirtioMmio::new("fuzz", device, Arc::clone(&ram), Arc::new(Unwired));
    let mut driver = Driver {
        bytes: Bytestream(bytes),
        ram,
        mmio: mmio.expect("a device"),
        shadow: vec![0; ARENA_LEN],
        given: vec![false; ARENA_LEN],
        next_avail: 0,
    };
    // The used ring is the device's to write.
    driver.give(USED, PAGE_SIZE as u32);
    driver.set_up();
    while !driver.bytes.0.is_empty() {
        driver.step();
    }
    driver.check();
    // The check found zeros everywhere else.
    driver.shadow.fill(0);
    driver.ram.memory().write_slice(&driver.shadow, GuestAddress(ARENA)).expect("in RAM");
    RAM.set(Some(driver.ram));
}

impl Driver<'_> {
    fn register(&self, offset: u64, value: u32) {
        self.mmio.write(offset, &value.to_le_bytes());
    }

    /// Sets up the device, as a driver should.
    fn set_up(&mut self) {
        self.register(0x70, 0);
        self.register(0x70, 1);
        self.register(0x70, 3);
        for half in [0, 1] {
            self.register(0x14, half);
            let mut offered = [0; 4];
            self.mmio.read(0x10, &mut offered);
            self.register(0x24, half);
            self.register(0x20, u32::from_le_bytes(offered));
        }
        self.register(0x70, 11);
        // All queues are in one place: only one is notified at a time.
        for queue in 0..3 {
            self.register(0x30, queue);
            self.register(0x38, u32::from(ENTRIES));
            for (offset, address) in [(0x80, TABLE), (0x90, AVAIL), (0xa0, USED)] {
                self.register(offset, address as u32);
                self.register(offset + 4, (address >> 32) as u32);
            }
            self.register(0x44, 1);
        }
        self.register(0x70, 15);
        self.write(AVAIL, &[0; 4]);
        self.next_avail = 0;
    }

    fn step(&mut self) {
        match self.bytes.byte() % 12 {
            0 => self.set_up(),
            1 => self.write_register(),
            2 => {
                let (offset, width) = (self.bytes.below(0x200), self.bytes.below(9));
                self.mmio.read(u64::from(offset), &mut vec![0; width as usize]);
            }
            3 => {
                let (offset, width) = (self.bytes.below(0x200), self.bytes.below(9));
                let data: Vec<u8> = (0..width).map(|_| self.bytes.byte()).collect();
                // `write_register` sets the queues' addresses, to values that the check knows.
                if !(0x80..0xa8).contains(&offset) {
                    self.mmio.write(u64::from(offset), &data);
                }
            }
            4 | 5 => self.put_descriptor(),
            6 => self.make_available(),
            7 => {
                let (at, len) = (self.bytes.below(11 * 4096), self.bytes.below(24));
                let data: Vec<u8> = (0..len).map(|_| self.bytes.byte()).collect();
                self.write(DATA + u64::from(at), &data);
            }
            8..=10 if self.mmio.device_id() == VIRTIO_ID_VSOCK => self.put_packets(),
            8..=10 => self.put_request(),
            _ if self.bytes.byte().is_multiple_of(2) => self.forge(),
            _ => {
                let saved = self.mmio.save();
                self.mmio.check(&saved).expect("its own state");
                self.mmio.put_back(&saved).expect("its own state");
                assert_eq!(self.mmio.save(), saved);
                self.mmio.go_on();
            }
        }
    }

    /// Puts back a forged state: the device must take it as it is, or refuse it and change nothing.
    fn forge(&mut self) {
        let before = self.mmio.save();
        let mut forged = before.clone();
        for _ in 0..=self.bytes.byte() % 3 {
            let byte = self.bytes.byte();
            let queues = forged.queues.len();
            let queue = &mut forged.queues[usize::from(byte) % queues];
            match self.bytes.byte() % 9 {
                0 => forged.status = byte,
                1 => forged.interrupt_status = byte,
                2 => forged.driver_features.0 ^= 1 << (byte % 64),
                3 => forged.queue_sel = byte.into(),
                4 => queue.ready = !queue.ready,
                5 => queue.size = byte.into(),
                6 => queue.max_size = byte.into(),
                7 => drop(forged.queues.pop()),
                _ => forged.device = SavedDevice::Rng {},
            }
            if forged.queues.is_empty() {
                break;
            }
        }
        let checked = self.mmio.check(&forged).is_ok();
        let taken = self.mmio.put_back(&forged).is_ok();
        assert_eq!(checked, taken, "{forged:?}");
        let mut expected = if taken { forged } else { before };
        // Only queues that are ready have a position.
        for queue in expected.queues.iter_mut().filter(|queue| !queue.ready) {
            (queue.next_avail, queue.next_used) = (0, 0);
        }
        assert_eq!(self.mmio.save(), expected);
        self.mmio.go_on();
    }

    fn write_register(&mut self) {
        let offsets = [0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x90, 0xa0, 0x20, 0x104];
        let offset = offsets[self.bytes.below(offsets.len() as u32) as usize];
        let good = match offset {
            0x80 => TABLE,
            0x90 => AVAIL,
            0xa0 => USED,
            0x104 => u64::from(self.bytes.word()),
            _ => u64::from(self.bytes.byte()),
        };
        let pick = self.bytes.below(8) as usize;
        let value = BAD.get(pick).copied().filter(|_| offset != 0x50).unwrap_or(good);
        self.register(offset, value as u32);
        if (0x80..0x100).contains(&offset) {
            self.register(offset + 4, (value >> 32) as u32);
        }
    }

    /// Puts a descriptor into one of the two tables: of data, of a table, or of a bad address.
    fn put_descriptor(&mut self) {
        let table = if self.bytes.byte().is_multiple_of(3) { INDIRECT } else { TABLE };
        let index = self.bytes.below(u32::from(ENTRIES));
        let flags = (self.bytes.byte() % 8) as u16;
        let next = self.bytes.below(u32::from(ENTRIES) + 1) as u16;
        let (mut address, mut len) = match self.bytes.byte() % 8 {
            0 => (BAD[self.bytes.below(4) as usize], self.bytes.word()),
            pick => (
                DATA + u64::from(self.bytes.below(11 * 4096)),
                [0, 1, 16, 512, 1024, 20, 4096][usize::from(pick) - 1],
            ),
        };
        if flags & 4 != 0 {
            (address, len) = (INDIRECT, [0, 16, 32, 128, 129][self.bytes.below(5) as usize]);
        } else if flags & 2 != 0 {
            self.give(address, len);
        }
        self.descriptor(table, index, address, len, [flags, next]);
    }

    fn descriptor(&mut self, table: u64, index: u32, address: u64, len: u32, rest: [u16; 2]) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(rest.into_iter().flat_map(u16::to_le_bytes));
        self.write(table + u64::from(index) * 16, &bytes);
    }

    /// Offers a chain that is a block request, or nearly; to other devices, it is buffers to fill
    /// or free.
    fn put_request(&mut self) {
        let kind = [0, 1, 4, 8, 11, 13, 3, 14][self.bytes.below(8) as usize];
        let sector = self.bytes.below(150);
        let at = DATA + u64::from(self.bytes.below(8 * 4096));
        let len = [0, 512, 1024, 4096, 16, 20, 32, 511][self.bytes.below(8) as usize];
        let writes = matches!(kind, 0 | 8) != (self.bytes.byte() % 16 == 15);
        let header: Vec<u8> = [kind, 0, sector, 0].into_iter().flat_map(u32::to_le_bytes).collect();
        self.write(DATA, &header);
        let status = DATA + 0xa000;
        self.descriptor(TABLE, 0, DATA, 16, [1, 1]);
        if writes {
            self.give(at, len);
        }
        self.descriptor(TABLE, 1, at, len, [if writes { 3 } else { 1 }, 2]);
        self.give(status, 1);
        self.descriptor(TABLE, 2, status, 1, [2, 0]);
        self.offer(0, 1);
        let queue = u32::from(self.bytes.byte() % 3);
        self.register(0x50, queue);
    }

    /// Sends some packets, valid or nearly, each together with room to receive one.
    fn put_packets(&mut self) {
        for _ in 0..=self.bytes.byte() % 16 {
            if self.mmio.save().status & NEEDS_RESET != 0 {
                self.set_up();
            }
            self.put_packet();
        }
    }

    fn put_packet(&mut self) {
        let (own, host, other) = (u64::from(CID), 2_u64, u64::from(self.bytes.byte()));
        let mostly = [own, host];
        let cids = self.bytes.pick(&[mostly, mostly, mostly, mostly, [other, host], [own, other]]);
        // The ports of the last packet that arrived, with which to answer callers.
        let mut arrived = [0; 8];
        let memory = self.ram.memory();
        memory.read_slice(&mut arrived, GuestAddress(RECEIVED + 16)).expect("in RAM");
        let [found_host, found_guest] =
            [0, 4].map(|at| u32::from_le_bytes(std::array::from_fn(|byte| arrived[at + byte])));
        let guest_port = self.bytes.pick(&[0, 0, 1, 2, found_guest, found_guest]);
        let host_port = self.bytes.pick(&[0, 1, 1, 2, found_host, found_host]);
        let len = self.bytes.pick(&[0, 1, 512, 4096, 0x8000, 0x8000, 0x8000, u32::MAX]);
        let kind = self.bytes.pick(&[1, 1, 1, 1, 1, 1, 1, 2_u16]);
        let op = self.bytes.pick(&[1, 1, 1, 2, 5, 5, 5, 5, 5, 5, 6, 6, 7, 4, 4, 3, 0, 8_u16]);
        let flags = u32::from(self.bytes.byte() % 8);
        let room = self.bytes.pick(&[0, 3, 100, 1 << 20, 1 << 20, u32::MAX]);
        let forwarded = u32::from(self.bytes.byte() % 8);
        let mut header = cids.map(u64::to_le_bytes).concat();
        header.extend([guest_port, host_port, len].map(u32::to_le_bytes).concat());
        header.extend([kind, op].map(u16::to_le_bytes).concat());
        header.extend([flags, room, forwarded].map(u32::to_le_bytes).concat());
        self.write(DATA, &header);
        self.descriptor(TABLE, 0, DATA, 44, [1, 1]);
        self.descriptor(TABLE, 1, DATA, len.min(0xa000), [1, 2]);
        // All queues share the same chains, so there has to be a buffer to write, too.
        let to_receive = self.bytes.pick(&[4096, 4096, 4096, 4096, 45, 300, 300, 44]);
        self.give(RECEIVED, to_receive);
        self.descriptor(TABLE, 2, RECEIVED, to_receive, [2, 0]);
        self.offer(0, 1);
        let queue = u32::from(self.bytes.byte() % 3);
        self.register(0x50, queue);
    }

    /// Makes some chain available, and usually notifies the device.
    fn make_available(&mut self) {
        let head = self.bytes.below(u32::from(ENTRIES) + 1) as u16;
        // Now and then more than there are.
        let count = [1, 1, 1, 2, 77][self.bytes.below(5) as usize];
        self.offer(head, count);
        let queue = u32::from(self.bytes.byte() % 4);
        if queue < 3 {
            self.register(0x50, queue);
        }
    }

    /// Makes `head` available and, if `count` is above 1, whatever is in the entries after it.
    fn offer(&mut self, head: u16, count: u16) {
        let slot = u64::from(self.next_avail % ENTRIES);
        self.write(AVAIL + 4 + slot * 2, &head.to_le_bytes());
        self.next_avail = self.next_avail.wrapping_add(count);
        let index = self.next_avail.to_le_bytes();
        self.write(AVAIL + 2, &index);
    }

    fn write(&mut self, address: u64, bytes: &[u8]) {
        self.ram.memory().write_slice(bytes, GuestAddress(address)).expect("in RAM");
        self.shadow[(address - ARENA) as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    /// Notes that devices may write here.
    fn give(&mut self, address: u64, len: u32) {
        let start = address.checked_sub(ARENA).and_then(|start| usize::try_from(start).ok());
        let end = start.and_then(|start| start.checked_add(len as usize));
        // A range that does not lie in RAM is not written at all.
        if let (Some(start), Some(end)) = (start, end)
            && let Some(given) = self.given.get_mut(start..end)
        {
            given.fill(true);
        }
    }

    fn check(&self) {
        let mut at = 0;
        // Most of RAM is untouched, and so a hole, which need not be read, and must not be filled
        // by that.
        while let Ok(start) = seek(self.ram.memfd(), SeekFrom::Data(at)) {
            at = seek(self.ram.memfd(), SeekFrom::Hole(start)).expect("an end");
            (start..at).step_by(PAGE_SIZE).for_each(|page| self.check_page(page));
        }
    }

    fn check_page(&self, page: u64) {
        let mut found = [0; PAGE_SIZE];
        self.ram.memory().read_slice(&mut found, GuestAddress(page)).expect("in RAM");
        let in_arena = page.checked_sub(ARENA).map(|at| at as usize).filter(|at| *at < ARENA_LEN);
        let Some(start) = in_arena else {
            assert!(found == [0; PAGE_SIZE], "written outside the arena, in the page at {page:#x}");
            return;
        };
        let shadow = &self.shadow[start..start + PAGE_SIZE];
        if found == *shadow {
            return;
        }
        // A fuzzer traces each comparison, so equal pieces are not compared byte by byte.
        let pieces = found.chunks(PIECE_BYTES).zip(shadow.chunks(PIECE_BYTES)).enumerate();
        for (piece, _) in pieces.filter(|(_, (found, shadow))| found != shadow) {
            for at in piece * PIECE_BYTES..(piece + 1) * PIECE_BYTES {
                let is_right = self.given[start + at] || found[at] == shadow[at];
                assert!(is_right, "written at {:#x} of the arena, which was not given", start + at);
            }
        }
    }
}
