//! All connections of a socket device, and which of them have something for the guest.
//!
//! What a guest can make the host keep is bounded: connections, the bytes each holds from the
//! guest, and refusals, beyond whose limit no more packets are taken from the guest.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::rand::{GetRandomFlags, getrandom};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{BUFFER_BYTES, Connection, Fate, Outgoing, Phase};
use super::host::{Caller, HostSockets, Wish};
use super::packet::{HOST_CID, Header, Op, Ports, STREAM};

/// Maximum number of connections. With their buffers, 16 MiB.
pub(super) const CONNECTIONS_MAX: usize = 256;
/// Maximum number of callers that have not said yet what they want; with one more, the oldest is
/// dropped.
pub(super) const CALLERS_MAX: usize = 32;
/// How many refusals may wait for the guest to make room for them before no more of its packets are
/// taken.
pub(super) const RESETS_MAX: usize = 256;
/// Lowest port that the host's end of a caller's connection gets; those below are for servers.
const CALLERS_PORTS: u32 = 1 << 30;

/// How long nothing new is begun with a driver that does not show that it knows of the end of all
/// connections. Few programs wait longer for a connection; a guest whose memory comes back page by
/// page on a busy host was seen to take five seconds.
const NEWS_PATIENCE: Duration = Duration::from_secs(20);

/// The number by which epoll reports the listening socket; all others have higher numbers, which
/// are never reused.
const LISTENER: u64 = 1;

/// Whether the driver knows that all earlier connections are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum News {
    /// It knows, or there were none.
    Known,
    /// It is to be told as soon as it has a buffer for the event.
    Owed,
    /// It was told, while `waiting` other buffers waited. It drops its connections before it gives
    /// the buffer back, so it has dropped them once more buffers wait.
    Told { waiting: u16 },
}

/// See the module documentation.
#[derive(Debug)]
pub(super) struct Table {
    cid: u64,
    sockets: Arc<dyn HostSockets>,
    epoll: Arc<Epoll>,
    connections: BTreeMap<u64, (Ports, Connection)>,
    ports: BTreeMap<Ports, u64>,
    callers: BTreeMap<u64, Caller>,
    /// Connections that may have something for the guest, in the order of their turns.
    line: VecDeque<u64>,
    resets: VecDeque<Header>,
    next_number: u64,
    next_port: u32,
    /// A caller may be waiting to be accepted.
    may_accept: bool,
    /// Until the news is known nothing new is begun: the driver would drop it, too.
    pub news: News,
    /// When waiting for that ends; `None` until the guest runs.
    patience_until: Option<Instant>,
    patience: Duration,
}

impl Table {
    /// Creates the table of the guest `cid`. `epoll` reports what happens to the sockets.
    pub(super) fn new(
        cid: u32,
        sockets: Arc<dyn HostSockets>,
        epoll: Arc<Epoll>,
    ) -> io::Result<Self> {
        watch(&epoll, sockets.listener(), LISTENER, EventSet::IN)?;
        Ok(Self {
            cid: cid.into(),
            sockets,
            epoll,
            connections: BTreeMap::new(),
            ports: BTreeMap::new(),
            callers: BTreeMap::new(),
            line: VecDeque::new(),
            resets: VecDeque::new(),
            next_number: LISTENER + 1,
            next_port: any_port(),
            may_accept: true,
            news: News::Known,
            patience_until: None,
            patience: NEWS_PATIENCE,
        })
    }

    /// The number of connections.
    pub(super) fn len(&self) -> usize {
        self.connections.len()
    }

    /// Ends all connections, of which the driver is yet to be told.
    pub(super) fn end_all(&mut self) {
        self.clear();
        self.news = News::Owed;
    }

    /// Called when the guest goes on: starts the time it has to learn the news, unless something
    /// was already begun without waiting longer.
    pub(super) fn go_on(&mut self) {
        if !self.connections.values().any(|(_, connection)| connection.has_begun()) {
            self.patience_until = Some(Instant::now() + self.patience);
        }
    }

    /// Notes that the driver is told the news now, while `waiting` other buffers for events wait.
    pub(super) fn note_told(&mut self, waiting: u16) {
        self.end_begun();
        self.news = News::Told { waiting };
        self.go_on();
    }

    /// Notes that the driver knows the news.
    pub(super) fn note_known(&mut self) {
        self.end_begun();
        self.news = News::Known;
    }

    /// Ends what was begun after waiting for the driver in vain: it drops that with the rest.
    fn end_begun(&mut self) {
        let begun = |(number, (_, connection)): (&u64, &(Ports, Connection))| {
            connection.has_begun().then_some(*number)
        };
        let begun: Vec<u64> = self.connections.iter().filter_map(begun).collect();
        begun.into_iter().for_each(|number| self.settle(number, Fate::Ends));
    }

    /// Sets how long to wait for a driver that does not learn the news, for tests.
    #[cfg(test)]
    pub(super) fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// Returns for how much longer nothing new is begun, unless the driver shows sooner that it
    /// knows the news; `None` if anything may be begun.
    pub(super) fn holds_for(&self) -> Option<Duration> {
        if self.news == News::Known {
            return None;
        }
        let Some(until) = self.patience_until else { return Some(self.patience) };
        until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }

    /// Ends all connections, without a word to the guest.
    pub(super) fn clear(&mut self) {
        self.connections.clear();
        self.ports.clear();
        self.line.clear();
        self.resets.clear();
        self.news = News::Known;
        self.patience_until = None;
        // If ports repeated, a guest that does not know yet could take new connections for old
        // ones.
        self.next_port = any_port();
    }

    /// Returns true while no more packets may be taken from the guest.
    pub(super) fn is_full(&self) -> bool {
        self.resets.len() >= RESETS_MAX
    }

    /// Returns true if [`Self::outgoing`] may have something.
    pub(super) fn has_outgoing(&self) -> bool {
        !self.resets.is_empty() || !self.line.is_empty() && self.holds_for().is_none()
    }

    /// Handles what epoll reported.
    pub(super) fn woken(&mut self, events: &[EpollEvent]) {
        for event in events {
            let number = event.data();
            if number == LISTENER {
                self.may_accept = true;
            } else if self.callers.contains_key(&number) {
                self.hear(number);
            } else if let Some((_, connection)) = self.connections.get_mut(&number) {
                let fate = connection.woken(event.event_set());
                self.settle(number, fate);
            }
        }
        self.accept();
    }

    /// Accepts the callers that wait.
    fn accept(&mut self) {
        while self.may_accept {
            match self.sockets.accept() {
                Ok(stream) => {
                    let Some(number) = self.watch(&stream) else { continue };
                    self.callers.insert(number, Caller::new(stream));
                    if self.callers.len() > CALLERS_MAX {
                        self.callers.pop_first();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.may_accept = false,
                Err(error) => {
                    // The caller's fault or this process's, which tries again at the next event.
                    tracing::debug!(%error, "cannot accept a vsock connection");
                    return;
                }
            }
        }
    }

    /// Has epoll watch a socket, and returns its number. On `None`, if epoll cannot, the caller
    /// drops the socket.
    fn watch(&mut self, stream: &UnixStream) -> Option<u64> {
        let number = self.next_number;
        self.next_number += 1;
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP;
        match watch(&self.epoll, stream.as_raw_fd(), number, events) {
            Ok(()) => Some(number),
            Err(error) => {
                tracing::debug!(%error, "cannot watch a vsock connection");
                None
            }
        }
    }

    /// Handles what a caller has sent.
    fn hear(&mut self, number: u64) {
        let Some(mut caller) = self.callers.remove(&number) else { return };
        match caller.listen() {
            Wish::Port(guest) if self.connections.len() < CONNECTIONS_MAX => {
                let ports = Ports { host: self.free_port(guest), guest };
                self.open(number, ports, Connection::new(caller.stream, Phase::Requested));
            }
            Wish::NotYet => {
                self.callers.insert(number, caller);
            }
            // The caller learns of it as its socket is closed.
            Wish::Port(_) | Wish::Nothing => {}
        }
    }

    /// Returns a port for the host's end of a connection to the port `guest`.
    fn free_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            self.next_port = CALLERS_PORTS | (self.next_port.wrapping_add(1) % CALLERS_PORTS);
            if !self.ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    fn open(&mut self, number: u64, ports: Ports, connection: Connection) {
        self.connections.insert(number, (ports, connection));
        self.ports.insert(ports, number);
        self.settle(number, Fate::GoesOn);
    }

    /// Ends a connection or queues it for its turn, after something happened to it.
    fn settle(&mut self, number: u64, fate: Fate) {
        if fate == Fate::Ends {
            if let Some(header) = self.remove(number) {
                self.resets.push_back(header);
            }
        } else if let Some((_, connection)) = self.connections.get_mut(&number)
            && connection.wants_turn()
            && !std::mem::replace(&mut connection.queued, true)
        {
            self.line.push_back(number);
        }
    }

    /// Forgets a connection. Returns the packet that tells the guest of its end, if it has to know.
    fn remove(&mut self, number: u64) -> Option<Header> {
        let (ports, connection) = self.connections.remove(&number)?;
        self.ports.remove(&ports);
        connection.is_known_to_guest().then(|| self.header(ports, Op::Reset))
    }

    /// Returns the header of a packet for the guest, without length, flags and credit.
    fn header(&self, ports: Ports, op: Op) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind: STREAM,
            op: op as u16,
            ..Header::default()
        }
    }

    /// Takes a packet from the guest. `data` has the bytes after the header if the packet carries
    /// data, and no more than any connection takes; otherwise it is empty.
    pub(super) fn incoming(&mut self, header: &Header, data: &[u8]) {
        // Not from this guest, or not for this host: there is nobody to answer.
        if header.src_cid != self.cid || header.dst_cid != HOST_CID {
            return;
        }
        let ports = header.ports();
        let number = self.ports.get(&ports).copied();
        let found = number.and_then(|number| self.connections.get_mut(&number));
        let (Some(number), Some((_, connection)), STREAM) = (number, found, header.kind) else {
            match (header.kind, header.op()) {
                (_, Some(Op::Reset)) => {}
                (STREAM, Some(Op::Request)) => self.requested(header),
                _ => self.resets.push_back(header.refusal()),
            }
            return;
        };
        connection.note_credit(header);
        let fate = match header.op() {
            Some(Op::Response) => connection.answered(format!("OK {}\n", ports.host).as_bytes()),
            Some(Op::Shutdown) => connection.guest_ends(header.flags),
            Some(Op::Data) => connection.data(header.len, data),
            Some(Op::CreditUpdate) => Fate::GoesOn,
            Some(Op::CreditRequest) => {
                connection.asked_for_credit();
                Fate::GoesOn
            }
            Some(Op::Reset) => {
                self.remove(number);
                return;
            }
            // A request for ports in use, or an unknown operation.
            Some(Op::Request) | None => Fate::Ends,
        };
        self.settle(number, fate);
    }

    /// Handles the guest's request for a connection.
    fn requested(&mut self, header: &Header) {
        let room = self.connections.len() < CONNECTIONS_MAX;
        let stream = room.then(|| self.sockets.connect(header.dst_port).ok()).flatten();
        let opened = stream.and_then(|stream| Some((self.watch(&stream)?, stream)));
        let Some((number, stream)) = opened else {
            self.resets.push_back(header.refusal());
            return;
        };
        let mut connection = Connection::new(stream, Phase::Open);
        connection.note_credit(header);
        self.open(number, header.ports(), connection);
    }

    /// Returns the next packet for the guest, and puts its bytes into `data`.
    pub(super) fn outgoing(&mut self, data: &mut [u8]) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        // All connections in the line are new since then, and the driver would drop what they begin
        // with.
        if self.holds_for().is_some() {
            return None;
        }
        while let Some(number) = self.line.pop_front() {
            let Some((ports, connection)) = self.connections.get_mut(&number) else { continue };
            let ports = *ports;
            connection.queued = false;
            let Some(Outgoing { op, flags, len }) = connection.next(data) else { continue };
            let fwd_cnt = connection.tell_forwarded();
            // If it has more, it goes to the end of the line.
            self.settle(number, Fate::GoesOn);
            let header = self.header(ports, op);
            return Some(Header {
                flags,
                len: len as u32,
                buf_alloc: BUFFER_BYTES,
                fwd_cnt,
                ..header
            });
        }
        None
    }
}

/// Has `epoll` report each change once.
fn watch(epoll: &Epoll, fd: RawFd, number: u64, events: EventSet) -> io::Result<()> {
    let event = EpollEvent::new(events | EventSet::EDGE_TRIGGERED, number);
    epoll.ctl(ControlOperation::Add, fd, event)
}

/// Returns a random port for the first caller, so that ports differ from the last time's.
fn any_port() -> u32 {
    let mut bytes = [0; 4];
    // Without random bytes, ports always begin at the same one.
    let _len = getrandom(&mut bytes, GetRandomFlags::NONBLOCK);
    CALLERS_PORTS | (u32::from_le_bytes(bytes) % CALLERS_PORTS)
}
