//! The socket device (virtio 1.2, 5.10): stream connections between programs of the guest and of the
//! host, whose ends there are [`HostSockets`].
//!
//! A thread moves packets. Each is moved through a gate that a checkpoint shuts: it is then in guest
//! memory and given back, or has not been looked at. Connections are not part of a snapshot, as their
//! other ends are not: a machine that goes on after a checkpoint keeps them, one that is resumed or
//! rewound begins without any, and its driver is told so by the event that is there for this (5.10.6.7).
//! It then looks up its context id again, so a clone may have another.
//!
//! What a driver takes in before it hears of the event it drops with the rest, without a word. So nothing new
//! is begun, by either side, until it has given the event's buffer back, which it does behind that; a
//! driver that never does is waited for, but not for ever.

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
use super::queue::{Chain, EVENT_IDX, Nonsense};
use super::saved::SavedDevice;
use super::worker::{Ending, Worker, doorbell, ring};
use super::{Misfit, Still, VirtioDevice};
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
/// What epoll says of the doorbell.
const DOORBELL: u64 = 0;
/// Packets each way before sockets are looked at again, whose owners wait meanwhile.
const PACKETS_AT_ONCE: usize = 64;
/// Events that are taken from epoll at once.
const EVENTS_AT_ONCE: usize = 32;

/// A socket device.
#[derive(Debug)]
pub struct Vsock {
    /// Goes first: what the thread has of the rest goes with it, and it may not take away the host's socket.
    worker: OnceLock<Worker>,
    parts: Arc<Parts>,
    cid: u32,
    doorbell: Arc<EventFd>,
    /// Room for a packet, where packets are moved before a notification returns, for tests that want one thing
    /// after the other.
    in_place: Option<Mutex<Vec<u8>>>,
}

/// What the thread works with.
#[derive(Debug)]
struct Parts {
    gate: WorkGate,
    epoll: Arc<Epoll>,
    /// Locked after the gate and a queue, never before.
    table: Mutex<Table>,
}

impl Vsock {
    /// The device of the guest with the context id `cid`, whose connections lead to `sockets`.
    ///
    /// # Errors
    /// [`VmmError::Config`] if that is no id for a guest; [`VmmError::Host`] if there are no file
    /// descriptors to be had.
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
        let parts = listen().map_err(VmmError::host("listen to sockets"))?;
        let doorbell = doorbell(EFD_NONBLOCK)?;
        Ok(Self { parts, cid, doorbell, in_place: None, worker: OnceLock::new() })
    }

    /// One without a thread: packets are moved, and sockets looked at, before a notification returns.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub(super) fn in_place(cid: u32, sockets: Arc<dyn HostSockets>) -> Result<Self> {
        Ok(Self { in_place: Some(Mutex::new(scratch())), ..Self::new(cid, sockets)? })
    }

    /// Has it wait no longer than `patience` for a driver that does not show that it heard of the end of all
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

    /// Connections there are.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.parts.table().len()
    }
}

/// True if a guest may have the context id `cid`: not one with a meaning of its own (5.10.4).
pub(super) fn is_guest_cid(cid: u32) -> bool {
    u64::from(cid) > HOST_CID && cid != u32::MAX
}

/// Which ids those are, in words.
pub(super) fn expected_cid() -> String {
    format!("a context id from {} to {}", HOST_CID + 1, u32::MAX - 1)
}

/// Room for the longest packet.
fn scratch() -> Vec<u8> {
    vec![0; HEADER_BYTES + BUFFER_BYTES as usize]
}

impl Parts {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread: waits for the doorbell and for sockets.
    fn run(&self, link: &Link, doorbell: &EventFd, ending: &Ending) {
        if let Err(error) = self.move_packets(link, doorbell, ending) {
            tracing::error!(device = link.name(), %error, "a socket device stands still");
        }
    }

    fn move_packets(&self, link: &Link, doorbell: &EventFd, ending: &Ending) -> io::Result<()> {
        let bell = EpollEvent::new(EventSet::IN, DOORBELL);
        self.epoll.ctl(ControlOperation::Add, doorbell.as_raw_fd(), bell)?;
        let mut scratch = scratch();
        // A device that is given a state does nothing until it is told to go on, whoever calls.
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

    /// For how long there is nothing to do if nothing happens, in milliseconds; -1 is for ever.
    fn wait_ms(&self) -> i32 {
        // Not a moment less, or it would look again and again for that long.
        let rounded_up = |left: Duration| i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
        self.table().holds_for().map_or(-1, rounded_up)
    }

    /// Waits for sockets and the doorbell, for so many milliseconds or for ever. True if there were any.
    fn look(&self, timeout_ms: i32) -> io::Result<bool> {
        let mut events = [EpollEvent::default(); EVENTS_AT_ONCE];
        let count = self.epoll.wait(timeout_ms, &mut events)?;
        self.table().woken(&events[..count]);
        Ok(count > 0)
    }

    /// Moves packets in both directions. True if nothing is left to be moved.
    fn serve(&self, link: &Link, scratch: &mut [u8]) -> bool {
        (0..PACKETS_AT_ONCE).any(|_| {
            let told = self.tell_news(link);
            let received = self.receive_next(link, scratch);
            let sent = self.transmit_next(link, scratch);
            !(told || received || sent)
        })
    }

    /// Tells the driver that its connections are gone, if it does not know, and looks whether it does.
    /// True if something came of it.
    fn tell_news(&self, link: &Link) -> bool {
        let _work = self.gate.begin();
        if self.table().news == News::Known {
            return false;
        }
        let came = link.with_queue(EVENTS, |queue, memory| {
            // Once more: a driver that was reset meanwhile knows.
            let news = self.table().news;
            if news == News::Known {
                return Ok(false);
            }
            if let News::Told { waiting } = news {
                let knows = queue.waiting(memory)? > waiting;
                if knows {
                    self.table().is_known();
                }
                return Ok(knows);
            }
            let Some(Chain { head, readable: _, mut writable }) = queue.pop(memory)? else {
                // One that came meanwhile is found by trying again.
                return queue.unmute(memory);
            };
            writable.write(memory, &TRANSPORT_RESET)?;
            // It cannot give back what it has not got yet, so none is missed.
            queue.ask_for_next(memory)?;
            self.table().tell(queue.waiting(memory)?);
            link.give_back(queue, head, TRANSPORT_RESET.len() as u32)?;
            Ok(true)
        });
        came.unwrap_or(false)
    }

    /// Gives the guest a packet. False if there is none, or no room for it.
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
            // Without room for data there would be no end of it.
            if writable.len() <= HEADER_BYTES as u64 {
                return Err(Nonsense::new("a buffer that is too short for a packet"));
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

    /// Takes a packet from the guest. False if there is none, or refusals have to be told first.
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
                return Err(Nonsense::new("a packet that is longer than its buffers"));
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

    /// Streams are what there is without any of its own.
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
        // One that is started twice has its second thread ended at once.
        let _first = self.worker.set(worker);
        Ok(())
    }

    fn notify(&self, link: &Link, _queue: u16) {
        let Some(scratch) = &self.in_place else { return ring(&self.doorbell) };
        let mut scratch = scratch.lock().unwrap_or_else(PoisonError::into_inner);
        // Each may lead to the other.
        while self.parts.look(0).unwrap_or(false) || !self.parts.serve(link, &mut scratch) {}
    }

    fn doorbell(&self, _queue: u16) -> Option<&EventFd> {
        Some(&self.doorbell)
    }

    /// The driver knows that connections do not outlast it.
    fn reset(&self) {
        self.parts.table().clear();
    }

    fn drain(&self, patience: Duration) -> Result<Still> {
        self.parts.gate.shut(patience)
    }

    fn save(&self) -> SavedDevice {
        SavedDevice::Vsock { guest_cid: self.cid }
    }

    /// The context id stays its own: who restores a device says which one it has.
    fn check(&self, saved: &SavedDevice) -> Result<(), Misfit> {
        match saved {
            SavedDevice::Vsock { guest_cid: _ } => Ok(()),
            other => Err(Misfit::new(self.save(), other)),
        }
    }

    fn put_back(&self, saved: &SavedDevice) -> Result<(), Misfit> {
        self.check(saved)?;
        self.parts.table().forget();
        Ok(())
    }

    fn go_on(&self) {
        self.parts.table().go_on();
    }
}
