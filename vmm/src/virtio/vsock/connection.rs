//! A connection: the stream socket of its host end, credit, and which directions have ended.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use rustix::net::{SendFlags, send};
use vmm_sys_util::epoll::EventSet;

use super::packet::{Header, NO_MORE_SENT, NO_MORE_TAKEN, OVER, Op};

/// How many bytes a guest may send before the host's end takes them, which bounds a connection's
/// memory.
pub(super) const BUFFER_BYTES: u32 = 64 << 10;
/// The guest is told that there is room again once this much has been passed on: less than the
/// buffer's size, so that a guest that has not been told yet can still send.
const TELL_BYTES: u32 = BUFFER_BYTES / 4;

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The host's end asked for it; the guest has not answered.
    Requested,
    /// Both ends have agreed.
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
    /// Both ends are done, or one of them broke the connection. The guest is told by a reset.
    Ends,
}

/// See the module documentation.
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools)] // independent facts
pub(super) struct Connection {
    stream: UnixStream,
    phase: Phase,
    /// The guest's bytes that the host's end has not taken yet.
    unsent: VecDeque<u8>,
    /// Whether the socket may have bytes, and may take some: true from an event until an attempt
    /// fails.
    may_read: bool,
    may_write: bool,
    /// What the host's end no longer does, as flags of [`Op::Shutdown`].
    host_ended: u32,
    /// Which of these flags the guest was told.
    told_ended: u32,
    /// What the guest said it no longer does.
    guest_ended: u32,
    /// The socket has been shut down for writing, as the guest sends no more.
    closed_for_writing: bool,
    /// Bytes passed on to the host's end, and how many of them the guest was told of. Like all
    /// counts here, these wrap around.
    forwarded: u32,
    told_forwarded: u32,
    /// Bytes sent to the guest, how many of them it said it has passed on, and how large it said
    /// its buffer is.
    sent: u32,
    guest_forwarded: u32,
    guest_room: u32,
    /// The guest has been asked for credit since it last gave some.
    asked_for_credit: bool,
    owes_opening: bool,
    owes_credit: bool,
    /// The connection is in the line of those that have something for the guest.
    pub queued: bool,
}

impl Connection {
    /// Creates a connection that the host's end asked for or, if [`Phase::Open`], the guest.
    /// `stream` must be nonblocking. The guest is yet to be told.
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

    /// Returns true if the guest asked for the connection or was told of it.
    pub(super) fn is_known_to_guest(&self) -> bool {
        self.phase == Phase::Open || self.has_begun()
    }

    /// Returns true once the guest was told of the connection: that it is wanted, or agreed to.
    pub(super) fn has_begun(&self) -> bool {
        !self.owes_opening
    }

    /// Returns how many bytes may be sent to the guest.
    fn credit(&self) -> u32 {
        self.guest_room.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// Handles events of the socket.
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

    /// Notes that nobody takes what the guest sends any more. What the host's end has sent can
    /// still be read.
    fn host_is_gone(&mut self) {
        self.may_read = true;
        self.host_ended |= NO_MORE_TAKEN;
        self.forwarded = self.forwarded.wrapping_add(self.unsent.len() as u32);
        self.unsent = VecDeque::new();
    }

    /// Notes what the guest says of its room, in every packet.
    pub(super) fn note_credit(&mut self, header: &Header) {
        self.guest_room = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        if self.credit() > 0 {
            self.asked_for_credit = false;
        }
    }

    /// Handles the guest's agreement to a connection that the host's end asked for, which is told
    /// by `greeting`.
    pub(super) fn answered(&mut self, greeting: &[u8]) -> Fate {
        if self.phase != Phase::Requested || self.owes_opening {
            return Fate::Ends;
        }
        self.phase = Phase::Open;
        // These are the first bytes on this socket: they fit, unless its owner is gone.
        match send(&self.stream, greeting, SendFlags::NOSIGNAL) {
            Ok(len) if len == greeting.len() => Fate::GoesOn,
            _ => Fate::Ends,
        }
    }

    /// Handles `len` bytes from the guest. `data` has them, or is empty if they are too many.
    pub(super) fn data(&mut self, len: u32, data: &[u8]) -> Fate {
        let fits = data.len() as u64 == u64::from(len)
            && self.unsent.len() + data.len() <= BUFFER_BYTES as usize;
        if self.phase != Phase::Open || self.guest_ended & NO_MORE_SENT != 0 || !fits {
            return Fate::Ends;
        }
        if self.host_ended & NO_MORE_TAKEN != 0 {
            // The guest sent these bytes before it knew.
            self.forwarded = self.forwarded.wrapping_add(len);
        } else {
            let direct = if self.unsent.is_empty() { self.write(data) } else { 0 };
            self.unsent.reserve_exact(data.len() - direct);
            self.unsent.extend(&data[direct..]);
        }
        self.flush()
    }

    /// Handles the guest's end of one or both directions.
    pub(super) fn guest_ends(&mut self, flags: u32) -> Fate {
        if self.phase != Phase::Open {
            return Fate::Ends;
        }
        self.guest_ended |= flags & OVER;
        if self.guest_ended & NO_MORE_TAKEN != 0 {
            // Fails if the other end is gone, which is as good.
            let _gone = self.stream.shutdown(Shutdown::Read);
        }
        self.flush()
    }

    /// Notes that the guest wants to know how much room there is.
    pub(super) fn asked_for_credit(&mut self) {
        self.owes_credit = true;
    }

    /// Writes as much of `data` as the socket takes; returns how many bytes are done with.
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

    /// Passes on waiting bytes, then ends what is to end after them.
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
            // Frees the room of the longest backlog.
            self.unsent = VecDeque::new();
            if self.guest_ended & NO_MORE_SENT != 0 && !self.closed_for_writing {
                self.closed_for_writing = true;
                // Fails if the other end is gone, which is as good.
                let _gone = self.stream.shutdown(Shutdown::Write);
            }
        }
        self.owes_credit |= self.forwarded.wrapping_sub(self.told_forwarded) >= TELL_BYTES;
        if self.guest_ended == OVER && self.unsent.is_empty() {
            return Fate::Ends;
        }
        Fate::GoesOn
    }

    /// Returns true if [`Self::next`] may have something.
    pub(super) fn wants_turn(&self) -> bool {
        let open = self.phase == Phase::Open;
        let reads = self.may_read
            && self.host_ended & NO_MORE_SENT == 0
            && (self.credit() > 0 || !self.asked_for_credit);
        let ends = self.host_ended & !self.told_ended != 0;
        self.owes_opening || open && (self.owes_credit || reads || ends)
    }

    /// Returns the next packet for the guest, and puts its bytes into `data`.
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
            // What the host's end sends goes nowhere, but the guest is still told when it has
            // ended.
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

    /// Returns the count of bytes passed on, for a packet that tells it to the guest.
    pub(super) fn tell_forwarded(&mut self) -> u32 {
        self.owes_credit = false;
        self.told_forwarded = self.forwarded;
        self.forwarded
    }
}
