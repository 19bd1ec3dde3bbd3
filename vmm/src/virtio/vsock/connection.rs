//! A connection: a stream socket of the host at one end, credit, and who has ended what.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use rustix::net::{SendFlags, send};
use vmm_sys_util::epoll::EventSet;

use super::packet::{Header, NO_MORE_SENT, NO_MORE_TAKEN, OVER, Op};

/// Bytes that a guest may send before the host's end takes them: what a connection may take of memory.
pub(super) const BUFFER_BYTES: u32 = 64 << 10;
/// The guest is told that there is room again once this much was passed on. Less than it takes to fill
/// the buffer, so a guest that is not told yet can still send.
const TELL_BYTES: u32 = BUFFER_BYTES / 4;

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The host's end wants it; the guest has not answered.
    Requested,
    /// Both ends agreed.
    Open,
}

/// A packet that a connection has for the guest, ports and credit aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub op: Op,
    pub flags: u32,
    /// Bytes of data.
    pub len: usize,
}

/// Whether a connection goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    GoesOn,
    /// Both ends are done with it, or one of them broke it. The guest is told by a reset.
    Ends,
}

/// See the module's text.
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools)] // facts that have nothing to do with each other
pub(super) struct Connection {
    stream: UnixStream,
    phase: Phase,
    /// The guest's bytes that the host's end has not taken yet.
    unsent: VecDeque<u8>,
    /// What is known of the socket: that it has bytes, that it takes some. True if it has not been
    /// tried since it last said so.
    may_read: bool,
    may_write: bool,
    /// The host's end sends no more, and takes no more.
    host_ended: u32,
    /// Of these, what the guest was told.
    told_ended: u32,
    /// What the guest said it does no more.
    guest_ended: u32,
    /// The socket was told that the guest sends no more.
    closed_for_writing: bool,
    /// Bytes passed on to the host's end, and how many of them the guest was told of. As all counts
    /// here these go round.
    forwarded: u32,
    told_forwarded: u32,
    /// Bytes sent to the guest, what it said it passed on of them, and the room it said it has.
    sent: u32,
    guest_forwarded: u32,
    guest_room: u32,
    /// The guest has been asked for room since it had some.
    asked_for_credit: bool,
    owes_opening: bool,
    owes_credit: bool,
    /// It is in the line of those that have something for the guest.
    pub queued: bool,
}

impl Connection {
    /// One that the host's end wants, or, as [`Phase::Open`], that the guest does. `stream` does not
    /// wait. The guest is to be told.
    pub(super) fn new(stream: UnixStream, phase: Phase) -> Self {
        Self {
            stream,
            phase,
            unsent: VecDeque::new(),
            may_read: true,
            may_write: true,
            host_ended: 0,
            told_ended: 0,
            guest_ended: 0,
            closed_for_writing: false,
            forwarded: 0,
            told_forwarded: 0,
            sent: 0,
            guest_forwarded: 0,
            guest_room: 0,
            asked_for_credit: false,
            owes_opening: true,
            owes_credit: false,
            queued: false,
        }
    }

    /// True if the guest has heard of it, or it of the guest.
    pub(super) fn is_known_to_guest(&self) -> bool {
        self.phase == Phase::Open || self.has_begun()
    }

    /// True once the guest was told of it: that it is wanted, or agreed to.
    pub(super) fn has_begun(&self) -> bool {
        !self.owes_opening
    }

    /// Bytes that the guest may be sent.
    fn credit(&self) -> u32 {
        self.guest_room.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// Takes note of what happened to the socket.
    pub(super) fn woken(&mut self, events: EventSet) -> Fate {
        self.may_read |= events.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        self.may_write |= events.contains(EventSet::OUT);
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            self.host_is_gone();
            if self.phase == Phase::Requested {
                return Fate::Ends;
            }
        }
        self.flush()
    }

    /// Nobody takes what the guest sends any more. What the host's end sent before is still there.
    fn host_is_gone(&mut self) {
        self.may_read = true;
        self.host_ended |= NO_MORE_TAKEN;
        self.forwarded = self.forwarded.wrapping_add(self.unsent.len() as u32);
        self.unsent = VecDeque::new();
    }

    /// What the guest says of its room, in every packet.
    pub(super) fn note_credit(&mut self, header: &Header) {
        self.guest_room = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        if self.credit() > 0 {
            self.asked_for_credit = false;
        }
    }

    /// The guest agrees to what the host's end wants, which is told by `greeting`.
    pub(super) fn answered(&mut self, greeting: &[u8]) -> Fate {
        if self.phase != Phase::Requested || self.owes_opening {
            return Fate::Ends;
        }
        self.phase = Phase::Open;
        // The first bytes on this socket: they fit, unless its owner is gone.
        match send(&self.stream, greeting, SendFlags::NOSIGNAL) {
            Ok(len) if len == greeting.len() => Fate::GoesOn,
            _ => Fate::Ends,
        }
    }

    /// Bytes of the guest's; `len` of them, of which `data` has none if they are too many.
    pub(super) fn data(&mut self, len: u32, data: &[u8]) -> Fate {
        let fits = data.len() as u64 == u64::from(len)
            && self.unsent.len() + data.len() <= BUFFER_BYTES as usize;
        if self.phase != Phase::Open || self.guest_ended & NO_MORE_SENT != 0 || !fits {
            return Fate::Ends;
        }
        if self.host_ended & NO_MORE_TAKEN != 0 {
            // Sent before the guest knew.
            self.forwarded = self.forwarded.wrapping_add(len);
        } else {
            let direct = if self.unsent.is_empty() { self.write(data) } else { 0 };
            self.unsent.reserve_exact(data.len() - direct);
            self.unsent.extend(&data[direct..]);
        }
        self.flush()
    }

    /// The guest ends one side or both.
    pub(super) fn guest_ends(&mut self, flags: u32) -> Fate {
        if self.phase != Phase::Open {
            return Fate::Ends;
        }
        self.guest_ended |= flags & OVER;
        if self.guest_ended & NO_MORE_TAKEN != 0 {
            // It fails if the other end is gone, which is as good.
            let _gone = self.stream.shutdown(Shutdown::Read);
        }
        self.flush()
    }

    /// The guest wants to know how much room there is.
    pub(super) fn asked_for_credit(&mut self) {
        self.owes_credit = true;
    }

    /// Writes to the socket what it takes; how many bytes that was.
    fn write(&mut self, data: &[u8]) -> usize {
        let mut at = 0;
        while at < data.len() && self.may_write && self.host_ended & NO_MORE_TAKEN == 0 {
            match send(&self.stream, &data[at..], SendFlags::NOSIGNAL) {
                Ok(len) => at += len,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => self.may_write = false,
                Err(_gone) => {
                    self.host_is_gone();
                    at = data.len();
                }
            }
        }
        self.forwarded = self.forwarded.wrapping_add(at as u32);
        at
    }

    /// Passes on what waits, and ends what is to end behind it.
    fn flush(&mut self) -> Fate {
        while self.may_write && !self.unsent.is_empty() {
            let mut waiting = std::mem::take(&mut self.unsent);
            let written = self.write(waiting.as_slices().0);
            waiting.drain(..written);
            if self.host_ended & NO_MORE_TAKEN != 0 {
                self.forwarded = self.forwarded.wrapping_add(waiting.len() as u32);
            } else {
                self.unsent = waiting;
            }
        }
        if self.unsent.is_empty() {
            // Not the room of the most there ever was.
            self.unsent = VecDeque::new();
            if self.guest_ended & NO_MORE_SENT != 0 && !self.closed_for_writing {
                self.closed_for_writing = true;
                // As above.
                let _gone = self.stream.shutdown(Shutdown::Write);
            }
        }
        self.owes_credit |= self.forwarded.wrapping_sub(self.told_forwarded) >= TELL_BYTES;
        if self.guest_ended == OVER && self.unsent.is_empty() {
            return Fate::Ends;
        }
        Fate::GoesOn
    }

    /// True if [`Self::next`] may have something.
    pub(super) fn wants_turn(&self) -> bool {
        let open = self.phase == Phase::Open;
        let reads = self.may_read
            && self.host_ended & NO_MORE_SENT == 0
            && (self.credit() > 0 || !self.asked_for_credit);
        let ends = self.host_ended & !self.told_ended != 0;
        self.owes_opening || open && (self.owes_credit || reads || ends)
    }

    /// The next packet for the guest, of which `data` gets the bytes.
    pub(super) fn next(&mut self, data: &mut [u8]) -> Option<Outgoing> {
        let bare = |op| Some(Outgoing { op, flags: 0, len: 0 });
        if self.owes_opening {
            self.owes_opening = false;
            return bare(if self.phase == Phase::Requested { Op::Request } else { Op::Response });
        }
        if self.phase == Phase::Requested {
            return None;
        }
        if self.owes_credit {
            return bare(Op::CreditUpdate);
        }
        if self.guest_ended & NO_MORE_TAKEN != 0 {
            // What the host's end sent goes nowhere; that it has ended is still told.
            if self.host_ended & NO_MORE_TAKEN != 0 {
                self.host_ended |= NO_MORE_SENT;
            }
            self.may_read = false;
        }
        while self.may_read && self.host_ended & NO_MORE_SENT == 0 {
            let most = (self.credit() as usize).min(data.len());
            if most == 0 {
                if std::mem::replace(&mut self.asked_for_credit, true) {
                    break;
                }
                return bare(Op::CreditRequest);
            }
            match self.stream.read(&mut data[..most]) {
                Ok(0) => self.host_ended |= NO_MORE_SENT,
                Ok(len) => {
                    self.sent = self.sent.wrapping_add(len as u32);
                    return Some(Outgoing { op: Op::Data, flags: 0, len });
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.may_read = false,
                Err(_gone) => {
                    self.host_is_gone();
                    self.host_ended = OVER;
                }
            }
        }
        if self.host_ended & !self.told_ended != 0 {
            self.told_ended = self.host_ended;
            return Some(Outgoing { op: Op::Shutdown, flags: self.told_ended, len: 0 });
        }
        None
    }

    /// Bytes passed on, for a packet that tells the guest.
    pub(super) fn tell_forwarded(&mut self) -> u32 {
        self.owes_credit = false;
        self.told_forwarded = self.forwarded;
        self.forwarded
    }
}
