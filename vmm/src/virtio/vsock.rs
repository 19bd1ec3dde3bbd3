//! The socket device (virtio 1.2, 5.10): stream connections between programs in the guest and
//! programs on the host, where they end in [`HostSockets`].
//!
//! A thread moves packets, each through a gate that a checkpoint shuts: a packet is then either in
//! guest memory and given back, or untouched. Connections are not part of a snapshot, as their host
//! ends are not: a machine that goes on after a checkpoint keeps them; one that is resumed or
//! rewound begins without any, and its driver is told so by the event for this (5.10.6.7). The
//! driver then reads its context id again, so a clone may have another.
//!
//! Connections made before the driver handles the event are dropped by it with the rest, without a
//! word. So neither side begins anything new until the driver has given the event's buffer back,
//! which it does afterwards. A driver that never does so is waited for only for a limited time.

mod connection;
mod host;
mod packet;
mod table;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::gate::WorkGate;
use super::link::Link;
use super::queue::{Chain, EVENT_IDX, Violation};
use super::saved::SavedDevice;
use super::worker::{Ending, Worker, doorbell, ring};
use super::{StateMismatch, Still, VirtioDevice};
use crate::confine::Role;
use crate::error::{Result, VmmError};
use connection::BUFFER_BYTES;
pub use host::{HostSockets, UnixSockets, Unreachable};
use packet::{HEADER_BYTES, HOST_CID, Header, Op};
use table::{News, Table};

const QUEUE_SIZE: u16 = 256;
const QUEUES: [u16; 3] = [QUEUE_SIZE; 3];
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const EVENTS: u16 = 2;

/// `struct virtio_vsock_event` with `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const TRANSPORT_RESET: [u8; 4] = [0; 4];
/// The number by which epoll reports the doorbell.
const DOORBELL: u64 = 0;
/// Packets moved each way before sockets, whose owners wait meanwhile, are looked at again.
const PACKETS_AT_ONCE: usize = 64;
/// Events taken from epoll at once.
const EVENTS_AT_ONCE: usize = 32;

/// A socket device.
#[derive(Debug)]
pub struct Vsock {
    /// Dropped first, so that the thread's share of `parts` is never the last: the thread is not
    /// allowed to remove the host's socket.
    worker: OnceLock<Worker>,
    parts: Arc<Parts>,
    cid: u32,
    doorbell: Arc<EventFd>,
    /// Room for a packet, if packets are moved before a notification returns, for tests that want a
    /// fixed order.
    in_place: Option<Mutex<Vec<u8>>>,
}

/// The part of the device that its thread uses.
#[derive(Debug)]
struct Parts {
    gate: WorkGate,
    epoll: Arc<Epoll>,
    /// Locked after the gate and a queue, never before.
    table: Mutex<Table>,
}

impl Vsock {
    /// Creates the device of the guest with the context id `cid`, whose connections lead to
    /// `sockets`.
    ///
    /// # Errors
    /// [`VmmError::Config`] if a guest cannot have the id `cid`; [`VmmError::Host`] if file
    /// descriptors cannot be created.
    pub fn new(cid: u32, sockets: Arc<dyn HostSockets>) -> Result<Self> {
        if !is_guest_cid(cid) {
            return Err(VmmError::Config(format!(
                "vsock: expected {}, found {cid}",
                expected_cid()
            )));
        }
        let listen = || -> io::Result<Arc<Parts>> {
            let epoll = Arc::new(Epoll::new()?);
            let table = Mutex::new(Table::new(cid, sockets, Arc::clone(&epoll))?);
            Ok(Arc::new(Parts { gate: WorkGate::default(), epoll, table }))
        };
        let parts = listen().map_err(VmmError::host("watch sockets"))?;
        let doorbell = doorbell(EFD_NONBLOCK)?;
        Ok(Self { parts, cid, doorbell, in_place: None, worker: OnceLock::new() })
    }

    /// Creates a device without a thread: packets are moved, and sockets looked at, before a
    /// notification returns.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub(super) fn in_place(cid: u32, sockets: Arc<dyn HostSockets>) -> Result<Self> {
        Ok(Self { in_place: Some(Mutex::new(scratch())), ..Self::new(cid, sockets)? })
    }

    /// Sets how long to wait for a driver that does not show that it knows of the end of all
    /// connections.
    #[cfg(test)]
    pub(super) fn set_patience(&self, patience: Duration) {
        self.parts.table().set_patience(patience);
    }

    /// The guest's context id.
    #[must_use]
    pub fn cid(&self) -> u32 {
        self.cid
    }

    /// The number of connections.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.parts.table().len()
    }
}

/// Returns true if a guest may have the context id `cid`: one without a special meaning (5.10.4).
pub(super) fn is_guest_cid(cid: u32) -> bool {
    u64::from(cid) > HOST_CID && cid != u32::MAX
}

/// Describes the ids that a guest may have, for error messages.
pub(super) fn expected_cid() -> String {
    format!("a context id from {} to {}", HOST_CID + 1, u32::MAX - 1)
}

/// Allocates room for the longest packet.
fn scratch() -> Vec<u8> {
    vec![0; HEADER_BYTES + BUFFER_BYTES as usize]
}

impl Parts {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread's main loop: waits for the doorbell and for sockets.
    fn run(&self, link: &Link, doorbell: &EventFd, ending: &Ending) {
        if let Err(error) = self.move_packets(link, doorbell, ending) {
            tracing::error!(device = link.name(), %error, "a socket device stopped working");
        }
    }

    fn move_packets(&self, link: &Link, doorbell: &EventFd, ending: &Ending) -> io::Result<()> {
        let bell = EpollEvent::new(EventSet::IN, DOORBELL);
        self.epoll.ctl(ControlOperation::Add, doorbell.as_raw_fd(), bell)?;
        let mut scratch = scratch();
        // A device that is given a state does nothing until it is told to go on, even if callers
        // come.
        let (mut rang, mut is_done) = (false, true);
        while !ending.is_wanted() {
            if let Err(error) = self.look(if is_done { self.wait_ms() } else { 0 })
                && error.kind() != io::ErrorKind::Interrupted
            {
                return Err(error);
            }
            rang |= doorbell.read().is_ok();
            is_done = !rang || self.serve(link, &mut scratch);
        }
        Ok(())
    }

    /// Returns for how long there is nothing to do if nothing happens, in milliseconds; -1 is for
    /// ever.
    fn wait_ms(&self) -> i32 {
        // Rounded down, the thread would spin for the rest.
        let rounded_up = |left: Duration| i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
        self.table().holds_for().map_or(-1, rounded_up)
    }

    /// Waits for sockets and the doorbell, for `timeout_ms` milliseconds or, if -1, for ever.
    /// Returns true if any had events.
    fn look(&self, timeout_ms: i32) -> io::Result<bool> {
        let mut events = [EpollEvent::default(); EVENTS_AT_ONCE];
        let count = self.epoll.wait(timeout_ms, &mut events)?;
        self.table().woken(&events[..count]);
        Ok(count > 0)
    }

    /// Moves packets in both directions. Returns true if nothing is left to be moved.
    fn serve(&self, link: &Link, scratch: &mut [u8]) -> bool {
        (0..PACKETS_AT_ONCE).any(|_| {
            let told = self.tell_news(link);
            let received = self.receive_next(link, scratch);
            let sent = self.transmit_next(link, scratch);
            !(told || received || sent)
        })
    }

    /// Tells the driver that its connections are gone, unless it has been told, and checks whether
    /// it knows. Returns true if that made progress.
    fn tell_news(&self, link: &Link) -> bool {
        let _work = self.gate.begin();
        if self.table().news == News::Known {
            return false;
        }
        let came = link.with_queue(EVENTS, |queue, memory| {
            // Checked again under the lock: a driver that was reset meanwhile knows.
            let news = self.table().news;
            if news == News::Known {
                return Ok(false);
            }
            if let News::Told { waiting } = news {
                let knows = queue.waiting(memory)? > waiting;
                if knows {
                    self.table().note_known();
                }
                return Ok(knows);
            }
            let Some(Chain { head, readable: _, mut writable }) = queue.pop(memory)? else {
                // A buffer added meanwhile is found by trying again.
                return queue.unmute(memory);
            };
            writable.write(memory, &TRANSPORT_RESET)?;
            // The driver cannot give the buffer back before it gets it below, so that is not
            // missed.
            queue.ask_for_next(memory)?;
            self.table().note_told(queue.waiting(memory)?);
            link.give_back(queue, head, TRANSPORT_RESET.len() as u32)?;
            Ok(true)
        });
        came.unwrap_or(false)
    }

    /// Gives the guest a packet. Returns false if there is none, or no room for it.
    fn receive_next(&self, link: &Link, scratch: &mut [u8]) -> bool {
        let _work = self.gate.begin();
        if !self.table().has_outgoing() {
            return false;
        }
        let received = link.with_queue(RECEIVE, |queue, memory| {
            queue.mute(memory)?;
            let Some(Chain { head, readable: _, mut writable }) = queue.pop(memory)? else {
                return queue.unmute(memory);
            };
            // Without room for data, none could ever be delivered.
            if writable.len() <= HEADER_BYTES as u64 {
                return Err(Violation::new("a buffer that is too short for a packet"));
            }
            let room = writable.len().min(scratch.len() as u64) as usize;
            let Some(header) = self.table().outgoing(&mut scratch[HEADER_BYTES..room]) else {
                queue.put_back();
                return Ok(false);
            };
            let len = HEADER_BYTES + header.len as usize;
            scratch[..HEADER_BYTES].copy_from_slice(&header.to_bytes());
            writable.write(memory, &scratch[..len])?;
            link.give_back(queue, head, len as u32)?;
            Ok(true)
        });
        received.unwrap_or(false)
    }

    /// Takes a packet from the guest. Returns false if there is none, or if refusals must be
    /// delivered first.
    fn transmit_next(&self, link: &Link, scratch: &mut [u8]) -> bool {
        let _work = self.gate.begin();
        if self.table().is_full() {
            return false;
        }
        let sent = link.with_queue(TRANSMIT, |queue, memory| {
            queue.mute(memory)?;
            let Some(Chain { head, mut readable, writable: _ }) = queue.pop(memory)? else {
                return queue.unmute(memory);
            };
            let mut bytes = [0; HEADER_BYTES];
            readable.read(memory, &mut bytes)?;
            let header = Header::from_bytes(&bytes);
            if u64::from(header.len) > readable.len() {
                return Err(Violation::new("a packet that is longer than its buffers"));
            }
            let wanted = header.op() == Some(Op::Data) && header.len <= BUFFER_BYTES;
            let data = &mut scratch[..if wanted { header.len as usize } else { 0 }];
            readable.read(memory, data)?;
            self.table().incoming(&header, data);
            link.give_back(queue, head, 0)?;
            Ok(true)
        });
        sent.unwrap_or(false)
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    /// Streams need no feature bits of the device's own.
    fn features(&self) -> u64 {
        EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    /// `struct virtio_vsock_config` (5.10.4).
    fn config(&self) -> Vec<u8> {
        u64::from(self.cid).to_le_bytes().to_vec()
    }

    fn start(&self, link: &Arc<Link>) -> Result<()> {
        if self.in_place.is_some() {
            return Ok(());
        }
        let (parts, link) = (Arc::clone(&self.parts), Arc::clone(link));
        let name = link.name().to_owned();
        let worker =
            Worker::start(&name, Role::Sockets, &self.doorbell, move |doorbell, ending| {
                parts.run(&link, doorbell, ending);
            })?;
        // If the device is started twice, the second thread ends at once.
        let _first = self.worker.set(worker);
        Ok(())
    }

    fn notify(&self, link: &Link, _queue: u16) {
        let Some(scratch) = &self.in_place else { return ring(&self.doorbell) };
        let mut scratch = scratch.lock().unwrap_or_else(PoisonError::into_inner);
        // Each may make work for the other.
        while self.parts.look(0).unwrap_or(false) || !self.parts.serve(link, &mut scratch) {}
    }

    fn doorbell(&self, _queue: u16) -> Option<&EventFd> {
        Some(&self.doorbell)
    }

    /// Ends all connections, without an event: the driver knows that none outlasts a reset.
    fn reset(&self) {
        self.parts.table().clear();
    }

    fn drain(&self, patience: Duration) -> Result<Still> {
        self.parts.gate.shut(patience)
    }

    fn save(&self) -> SavedDevice {
        SavedDevice::Vsock { guest_cid: self.cid }
    }

    /// The device keeps its own context id, which whoever restores it chooses.
    fn check(&self, saved: &SavedDevice) -> Result<(), StateMismatch> {
        match saved {
            SavedDevice::Vsock { guest_cid: _ } => Ok(()),
            other => Err(StateMismatch::new(self.save(), other)),
        }
    }

    fn put_back(&self, saved: &SavedDevice) -> Result<(), StateMismatch> {
        self.check(saved)?;
        self.parts.table().end_all();
        Ok(())
    }

    fn go_on(&self) {
        self.parts.table().go_on();
    }
}
