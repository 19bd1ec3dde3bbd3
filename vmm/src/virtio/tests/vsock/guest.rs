//! A driver of the socket device, and the programs on the host around it.

use std::io::{ErrorKind, Read};
use std::os::unix::net::{UnixListener, UnixStream};

use tempfile::TempDir;

use crate::virtio::tests::*;
use crate::virtio::vsock::{HostSockets, UnixSockets, Vsock};

pub const CID: u32 = 3;
pub const RX: u64 = DATA;
pub const RX_BYTES: u32 = 44 + 4096;
pub const TX: u64 = 2 << 20;
pub const EVENT: u64 = 3 << 20;
pub const BUFFER: u32 = 64 << 10;

pub const REQUEST: u16 = 1;
pub const RESPONSE: u16 = 2;
pub const RST: u16 = 3;
pub const SHUTDOWN: u16 = 4;
pub const RW: u16 = 5;
pub const CREDIT_UPDATE: u16 = 6;
pub const CREDIT_REQUEST: u16 = 7;

/// A packet, without the fields that are the same in all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    pub op: u16,
    pub flags: u32,
    pub guest_port: u32,
    pub host_port: u32,
    pub room: u32,
    pub forwarded: u32,
    pub data: Vec<u8>,
}

/// Returns a packet from the guest, which has plenty of room.
pub fn packet(op: u16, guest_port: u32, host_port: u32) -> Packet {
    let (flags, room, forwarded) = (0, 1 << 20, 0);
    Packet { op, flags, guest_port, host_port, room, forwarded, data: Vec::new() }
}

impl Packet {
    pub fn with(mut self, data: &[u8]) -> Self {
        self.data = data.to_vec();
        self
    }

    pub fn flags(mut self, flags: u32) -> Self {
        self.flags = flags;
        self
    }

    pub fn credit(mut self, room: u32, forwarded: u32) -> Self {
        (self.room, self.forwarded) = (room, forwarded);
        self
    }

    pub fn header(&self, from: u64, to: u64) -> Vec<u8> {
        let mut bytes = [from, to].map(u64::to_le_bytes).concat();
        let words = [self.guest_port, self.host_port, self.data.len() as u32];
        bytes.extend(words.map(u32::to_le_bytes).concat());
        bytes.extend([1, self.op].map(u16::to_le_bytes).concat());
        bytes.extend([self.flags, self.room, self.forwarded].map(u32::to_le_bytes).concat());
        bytes
    }

    /// Parses a packet that the guest received.
    pub fn parse(cid: u32, bytes: &[u8]) -> Self {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!([0, 4, 8, 12].map(word), [2, 0, cid, 0], "from the host to the guest");
        assert_eq!(word(24) as usize, bytes.len() - 44, "its length");
        Self {
            op: (word(28) >> 16) as u16,
            flags: word(32),
            host_port: word(16),
            guest_port: word(20),
            room: word(36),
            forwarded: word(40),
            data: bytes[44..].to_vec(),
        }
    }

    pub fn kind(&self) -> (u16, u32, u32) {
        (self.op, self.guest_port, self.host_port)
    }
}

pub struct Guest {
    pub bed: Bed,
    pub vsock: Arc<Vsock>,
    pub rx: Ring,
    pub tx: Ring,
    pub events: Ring,
    pub folder: TempDir,
}

impl Guest {
    /// Creates a guest whose device works in place, with as many receive buffers as fit.
    pub fn new() -> Self {
        let mut guest = Self::without_buffers(Vsock::in_place);
        (0..ENTRIES).for_each(|_| guest.offer(RX_BYTES));
        guest
    }

    pub fn without_buffers(
        vsock: impl FnOnce(u32, Arc<dyn HostSockets>) -> crate::Result<Vsock>,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let sockets = UnixSockets::listen(&folder.path().join("v")).unwrap();
        let vsock = Arc::new(vsock(CID, Arc::new(sockets)).unwrap());
        let bed = Bed::new(Arc::clone(&vsock) as _);
        bed.set_up(EVENT_IDX);
        let [rx, tx, events] = [0, 1, 2].map(Ring::new);
        let mut guest = Self { bed, vsock, rx, tx, events, folder };
        guest.offer_event();
        guest
    }

    /// Gives the device a buffer for an event.
    pub fn offer_event(&mut self) {
        self.events.add(&self.bed, &[(EVENT, 4, true)]);
        self.events.kick(&self.bed);
    }

    /// Gives the device a buffer for a packet, each at an address of its own.
    pub fn offer(&mut self, len: u32) {
        let slot = u64::from(self.rx.next_descriptor % ENTRIES);
        self.rx.add(&self.bed, &[(RX + slot * 0x2000, len, true)]);
        self.rx.kick(&self.bed);
    }

    /// Makes the device look at its sockets.
    pub fn look(&self) {
        self.bed.mmio.go_on();
    }

    pub fn send_raw(&mut self, header: &[u8], data: &[u8]) {
        self.bed.write(TX, header);
        self.bed.write(TX + 64, data);
        let header = (TX, header.len() as u32, false);
        if data.is_empty() {
            self.tx.add(&self.bed, &[header]);
        } else {
            self.tx.add(&self.bed, &[header, (TX + 64, data.len() as u32, false)]);
        }
        self.tx.kick(&self.bed);
    }

    /// Sends a packet, which the device takes at once.
    pub fn send(&mut self, packet: &Packet) {
        self.send_raw(&packet.header(CID.into(), 2), &packet.data);
        assert!(self.tx.used(&self.bed).is_some(), "{packet:?} was not taken");
    }

    /// Returns the packets that have arrived, and offers new buffers for them.
    pub fn received(&mut self) -> Vec<Packet> {
        self.look();
        let mut packets = Vec::new();
        while let Some((slot, len)) = self.rx.used(&self.bed) {
            let bytes = self.bed.read(RX + u64::from(slot) * 0x2000, len as usize);
            packets.push(Packet::parse(self.vsock.cid(), &bytes));
            self.offer(RX_BYTES);
        }
        packets
    }

    pub fn received_one(&mut self) -> Packet {
        let mut packets = self.received();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }

    /// Listens on a port of the host.
    pub fn serve(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.folder.path().join(format!("v_{port}"))).unwrap()
    }

    /// Connects to the guest's socket, without sending anything.
    pub fn call(&self) -> UnixStream {
        UnixStream::connect(self.folder.path().join("v")).unwrap()
    }

    /// Makes a connection that the guest asks for; returns the host's end of it.
    pub fn connected(&mut self, guest_port: u32, host_port: u32) -> UnixStream {
        let server = self.serve(host_port);
        self.send(&packet(REQUEST, guest_port, host_port));
        assert_eq!(self.received_one().kind(), (RESPONSE, guest_port, host_port));
        server.accept().unwrap().0
    }
}

pub fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Returns true if the other end is closed and nothing is left to read.
pub fn is_over(stream: &mut UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let found = stream.read(&mut [0]);
    stream.set_nonblocking(false).unwrap();
    match found {
        Ok(len) => len == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}
