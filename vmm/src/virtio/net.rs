//! The network card (virtio 1.2, 5.1): one pair of queues, frames to and from a tap.
//!
//! There are no offloads: every frame is whole, with its checksum, and fits one of the driver's
//! buffers. Frames that the driver has no room for wait in the tap, where the host drops those
//! beyond its limit.
//!
//! A thread moves frames, each through a gate that a checkpoint shuts: a frame is then either in
//! guest memory and given back, or untouched. What was sent stays sent, even after a rewind; a
//! clone has the address of the machine it was cloned from.

mod tap;

use std::fmt;
use std::io;
use std::os::fd::AsRawFd as _;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::gate::WorkGate;
use super::link::Link;
use super::queue::{Chain, EVENT_IDX, Violation, bit};
use super::saved::SavedDevice;
use super::worker::{Ending, Worker, doorbell, ring};
use super::{StateMismatch, Still, VirtioDevice};
use crate::confine::Role;
use crate::error::{Result, VmmError};
pub use tap::Tap;

const QUEUE_SIZE: u16 = 256;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// `struct virtio_net_hdr` (5.1.6): no flags, no segmentation, one buffer.
const HEADER: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
/// Frames sent before checking whether some arrived, so that a guest that sends without end still
/// receives.
const SENT_AT_ONCE: usize = 8;
/// The longest frame: 64 KiB and an Ethernet header with a VLAN tag.
const FRAME_BYTES_MAX: usize = (64 << 10) + 18;

/// The address of a network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// Returns a random locally administered address, which is assigned to nobody (IEEE 802, 8.4).
    ///
    /// # Errors
    /// [`VmmError::Host`] if no random bytes are available.
    pub fn random() -> Result<Self> {
        const LOCAL: u8 = 2;
        const GROUP: u8 = 1;
        let mut bytes = [0; 6];
        getrandom(&mut bytes, GetRandomFlags::empty())
            .map_err(|error| VmmError::host("get random bytes")(error.into()))?;
        bytes[0] = bytes[0] & !GROUP | LOCAL;
        Ok(Self(bytes))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, rest @ ..] = self.0;
        write!(f, "{first:02x}")?;
        rest.iter().try_for_each(|byte| write!(f, ":{byte:02x}"))
    }
}

impl From<MacAddress> for String {
    fn from(address: MacAddress) -> Self {
        address.to_string()
    }
}

impl TryFrom<String> for MacAddress {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wrong = || format!("expected an address such as 02:00:00:00:00:01, found `{text}`");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        // A group address is only a destination: no card has one.
        if parts.next().is_some() || bytes[0] & 1 != 0 {
            return Err(wrong());
        }
        Ok(Self(bytes))
    }
}

/// What a network card has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetStats {
    /// Frames that the guest got.
    pub received: u64,
    /// Frames that the tap took.
    pub sent: u64,
    /// Frames that were too long for the driver's buffer, or that the tap did not take.
    pub dropped: u64,
}

/// A network card.
#[derive(Debug)]
pub struct Net {
    card: Arc<Card>,
    mac: MacAddress,
    doorbell: Arc<EventFd>,
    /// Room for a frame, if frames are moved before a notification returns.
    in_place: Option<Mutex<Vec<u8>>>,
    worker: OnceLock<Worker>,
}

/// The part of the card that its thread uses.
#[derive(Debug)]
struct Card {
    tap: Tap,
    gate: WorkGate,
    received: AtomicU64,
    sent: AtomicU64,
    dropped: AtomicU64,
}

/// Allocates room for the longest frame.
fn room() -> Vec<u8> {
    vec![0; HEADER.len() + FRAME_BYTES_MAX]
}

/// The outcome of an attempt to move a frame.
enum Moved {
    One,
    /// There is no frame to move.
    NoFrame,
    /// There is no chain to put a frame in, or the device is not live.
    NoChain,
}

impl Net {
    /// Creates a card with the address `mac` on `tap`.
    ///
    /// # Errors
    /// [`VmmError::Host`] if an eventfd cannot be created.
    pub fn new(mac: MacAddress, tap: Tap) -> Result<Self> {
        let card = Card {
            tap,
            gate: WorkGate::default(),
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        };
        let (card, doorbell) = (Arc::new(card), doorbell(EFD_NONBLOCK)?);
        Ok(Self { card, mac, doorbell, in_place: None, worker: OnceLock::new() })
    }

    /// Creates a card without a thread: frames are moved before a notification returns.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub(super) fn in_place(mac: MacAddress, tap: Tap) -> Result<Self> {
        Ok(Self { in_place: Some(Mutex::new(room())), ..Self::new(mac, tap)? })
    }

    /// Returns what the card has done since it was created.
    #[must_use]
    pub fn stats(&self) -> NetStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Card { received, sent, dropped, .. } = &*self.card;
        NetStats { received: get(received), sent: get(sent), dropped: get(dropped) }
    }
}

impl Card {
    /// The thread's main loop: waits for the doorbell and, while the driver has room, for frames.
    fn run(&self, link: &Link, doorbell: &EventFd, ending: &Ending) {
        if let Err(error) = self.move_frames(link, doorbell, ending) {
            tracing::error!(device = link.name(), %error, "a network card stopped working");
        }
    }

    fn move_frames(&self, link: &Link, doorbell: &EventFd, ending: &Ending) -> io::Result<()> {
        let epoll = Epoll::new()?;
        let event = |fd, set| (fd, EpollEvent::new(set, fd as u64));
        let (bell, bell_event) = event(doorbell.as_raw_fd(), EventSet::IN);
        epoll.ctl(ControlOperation::Add, bell, bell_event)?;
        let mut frame = room();
        let mut events = [EpollEvent::default(); 2];
        // `is_waited_for`: epoll watches the tap, only while the driver has room for its frames.
        let (mut is_waited_for, mut is_gone, mut has_more) = (false, false, false);
        let (tap, tap_event) = event(self.tap.as_raw_fd(), EventSet::IN);
        while !ending.is_wanted() {
            let count = match epoll.wait(if has_more { 0 } else { -1 }, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let gone = EventSet::ERROR | EventSet::HANG_UP;
            let lost = |event: &EpollEvent| event.fd() == tap && event.event_set().intersects(gone);
            if events[..count].iter().any(lost) && !is_gone {
                tracing::error!(device = link.name(), "the tap is gone: no more frames arrive");
                is_gone = true;
            }
            // Fails if nobody rang.
            let _rings = doorbell.read();
            has_more = self.send_some(link, &mut frame);
            let wants = !is_gone && self.receive_all(link, &mut frame, || ending.is_wanted());
            if wants != is_waited_for {
                let change = if wants { ControlOperation::Add } else { ControlOperation::Delete };
                epoll.ctl(change, tap, tap_event)?;
                is_waited_for = wants;
            }
        }
        Ok(())
    }

    /// Receives frames until there are none, or no room. Returns true if there is room.
    fn receive_all(&self, link: &Link, frame: &mut [u8], is_over: impl Fn() -> bool) -> bool {
        while !is_over() {
            match self.receive_next(link, frame) {
                Moved::One => {}
                Moved::NoFrame => return true,
                Moved::NoChain => return false,
            }
            // Otherwise a guest that receives without end could never send.
            self.send_next(link, frame);
        }
        false
    }

    fn receive_next(&self, link: &Link, frame: &mut [u8]) -> Moved {
        let _work = self.gate.begin();
        let moved = link.with_queue(RECEIVE, |queue, memory| {
            queue.mute(memory)?;
            let Some(Chain { head, readable: _, mut writable }) = queue.pop(memory)? else {
                // A chain added meanwhile is found by trying again.
                return Ok(if queue.unmute(memory)? { Moved::One } else { Moved::NoChain });
            };
            let len = match self.tap.read(&mut frame[HEADER.len()..]) {
                Ok(len) if len > 0 => HEADER.len() + len,
                Ok(_) => {
                    queue.put_back();
                    return Ok(Moved::NoFrame);
                }
                Err(error) => {
                    queue.put_back();
                    if error.kind() != io::ErrorKind::WouldBlock {
                        tracing::debug!(%error, "cannot read a frame from the tap");
                    }
                    return Ok(Moved::NoFrame);
                }
            };
            if writable.len() < len as u64 {
                queue.put_back();
                self.dropped.fetch_add(1, Ordering::Relaxed);
                return Ok(Moved::One);
            }
            frame[..HEADER.len()].copy_from_slice(&HEADER);
            writable.write(memory, &frame[..len])?;
            self.received.fetch_add(1, Ordering::Relaxed);
            link.give_back(queue, head, len as u32)?;
            Ok(Moved::One)
        });
        moved.unwrap_or(Moved::NoChain)
    }

    /// Sends waiting frames, but not too many at once. Returns true if there may be more.
    fn send_some(&self, link: &Link, frame: &mut [u8]) -> bool {
        (0..SENT_AT_ONCE).all(|_| self.send_next(link, frame))
    }

    /// Sends the next frame. Returns false if there is none.
    fn send_next(&self, link: &Link, frame: &mut [u8]) -> bool {
        let _work = self.gate.begin();
        let sent = link.with_queue(TRANSMIT, |queue, memory| {
            queue.mute(memory)?;
            let Some(Chain { head, mut readable, writable: _ }) = queue.pop(memory)? else {
                return queue.unmute(memory);
            };
            let len = readable.len();
            if len < HEADER.len() as u64 {
                return Err(Violation::new("a frame without its header"));
            }
            let whole = frame.get_mut(..usize::try_from(len).unwrap_or(usize::MAX));
            let taken = match whole {
                Some(whole) if whole.len() > HEADER.len() => {
                    readable.read(memory, whole)?;
                    self.tap.write(&whole[HEADER.len()..]).is_ok()
                }
                _ => false,
            };
            let counter = if taken { &self.sent } else { &self.dropped };
            counter.fetch_add(1, Ordering::Relaxed);
            link.give_back(queue, head, 0)?;
            Ok(true)
        });
        sent.unwrap_or(false)
    }
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        bit(VIRTIO_NET_F_MAC) | EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    /// `struct virtio_net_config` (5.1.4), as far as its features go.
    fn config(&self) -> Vec<u8> {
        self.mac.0.to_vec()
    }

    fn start(&self, link: &Arc<Link>) -> Result<()> {
        if self.in_place.is_some() {
            return Ok(());
        }
        let (card, link) = (Arc::clone(&self.card), Arc::clone(link));
        let name = link.name().to_owned();
        let worker =
            Worker::start(&name, Role::Device, &self.doorbell, move |doorbell, ending| {
                card.run(&link, doorbell, ending);
            })?;
        // If the device is started twice, the second thread ends at once.
        let _first = self.worker.set(worker);
        Ok(())
    }

    fn notify(&self, link: &Link, _queue: u16) {
        let Some(frame) = &self.in_place else { return ring(&self.doorbell) };
        let mut frame = frame.lock().unwrap_or_else(PoisonError::into_inner);
        let mut has_more = true;
        while has_more {
            has_more = self.card.send_some(link, &mut frame);
            self.card.receive_all(link, &mut frame, || false);
        }
    }

    fn doorbell(&self, _queue: u16) -> Option<&EventFd> {
        Some(&self.doorbell)
    }

    fn drain(&self, patience: Duration) -> Result<Still> {
        self.card.gate.shut(patience)
    }

    fn save(&self) -> SavedDevice {
        SavedDevice::Net { mac: self.mac }
    }

    fn check(&self, saved: &SavedDevice) -> Result<(), StateMismatch> {
        // The address is this host's choice, as the tap is.
        match saved {
            SavedDevice::Net { .. } => Ok(()),
            other => Err(StateMismatch::new(self.save(), other)),
        }
    }
}
