//! Messages between a pager and the process whose memory it serves: JSON with file descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix, SocketFlags,
    SocketType, bind, recvmsg, sendmsg, shutdown, socketpair,
};
use serde::{Deserialize, Serialize};

use super::{Extent, Mapping, PagerOptions};
use crate::id::SnapshotId;

/// The version of the messages. Both ends must have the same: they are one program.
pub(super) const VERSION: u32 = 1;
const MESSAGE_MAX: usize = 32 << 10;
/// The most file descriptors in a message.
const FDS_MAX: usize = 4;

/// A message. Brackets list the file descriptors sent with it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Message {
    /// To a pager for one user: what to serve. [memory, filled, userfaultfd, counters]
    Serve {
        version: u32,
        store: PathBuf,
        snapshot: SnapshotId,
        region: String,
        extents: Vec<Extent>,
        mappings: Vec<Mapping>,
        options: PagerOptions,
    },
    /// From a server of an image: the image. [memory, filled; both read-only]
    Offer { version: u32, snapshot: SnapshotId, region: String, extents: Vec<Extent> },
    /// To a server of an image: the seat to serve. [userfaultfd, counters]
    Sit { mappings: Vec<Mapping> },
    /// From a pager: faults are answered from here on. If `replays`, [`Self::Replayed`] follows,
    /// which the user may want to wait for.
    Ready { replays: bool },
    /// From a pager: the working set, if there is one, is filled.
    Replayed,
    /// From a pager: a page cannot be served.
    Failed { error: String },
    /// From a pager: the image is complete, and the memory was let go of.
    Complete,
}

/// Listens for users of an image at `path`, which must not exist.
///
/// # Errors
/// The system's.
pub fn listen(path: &Path) -> io::Result<OwnedFd> {
    let listener = socket(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC)?;
    bind(&listener, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&listener, 128)?;
    Ok(listener)
}

/// Waits for the next user to connect to `listener`; none after `patience` or a signal.
///
/// # Errors
/// The system's.
pub fn accept(listener: &OwnedFd, patience: Duration) -> io::Result<Option<OwnedFd>> {
    let patience = Timespec::try_from(patience).map_err(io::Error::other)?;
    let mut fds = [PollFd::new(listener, PollFlags::IN)];
    match poll(&mut fds, Some(&patience)) {
        Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(None),
        Ok(_) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(Some(rustix::net::accept_with(listener, SocketFlags::CLOEXEC)?))
}

/// Connects to the server of an image that listens at `path`.
///
/// # Errors
/// The system's: `NotFound` or `ConnectionRefused` if there is none.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    let connection = socket(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC)?;
    rustix::net::connect(&connection, &SocketAddrUnix::new(path)?)?;
    Ok(connection)
}

fn socket(family: AddressFamily, kind: SocketType, flags: SocketFlags) -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(family, kind, flags, None)?)
}

/// One end of a connection.
#[derive(Debug)]
pub(super) struct Channel(OwnedFd);

impl Channel {
    pub fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Creates both ends of a connection; the second is for another process.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self(ours), theirs))
    }

    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Ends the connection: anyone waiting for a message, at either end, finds that none comes.
    pub fn close(&self) {
        let _gone = shutdown(&self.0, Shutdown::Both);
    }

    pub fn send(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("too many file descriptors for a message"));
        }
        sendmsg(
            &self.0,
            &[IoSlice::new(&bytes)],
            &mut control,
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        )?;
        Ok(())
    }

    /// Waits for the next message; none if the other end is gone.
    pub fn receive(&self) -> io::Result<Option<(Message, Vec<OwnedFd>)>> {
        let mut bytes = vec![0; MESSAGE_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.0, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                other => break other?,
            }
        };
        let fds: Vec<OwnedFd> = control
            .drain()
            .filter_map(|part| match part {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        if received.bytes == 0 {
            return Ok(None);
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is too long"));
        }
        let message = serde_json::from_slice(&bytes[..received.bytes])
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(Some((message, fds)))
    }

    /// Waits for a message or the end of the connection; false after `patience` or a signal.
    pub fn wait(&self, patience: Duration) -> io::Result<bool> {
        let patience = Timespec::try_from(patience).map_err(io::Error::other)?;
        let mut fds = [PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::IN)];
        match poll(&mut fds, Some(&patience)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => Ok(false),
            Ok(_) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for [`Message::Ready`]; returns whether [`Message::Replayed`] follows.
    pub fn wait_ready(&self, patience: Duration) -> io::Result<bool> {
        if !self.wait(patience)? {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the pager does not answer"));
        }
        match self.receive()? {
            Some((Message::Ready { replays }, _)) => Ok(replays),
            Some((Message::Failed { error }, _)) => Err(io::Error::other(error)),
            Some((other, _)) => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("unexpected message {other:?}"),
            )),
            None => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the pager has ended")),
        }
    }
}

impl Channel {
    /// Waits for [`Message::Replayed`], as long as the pager lives.
    pub fn wait_replayed(&self) -> io::Result<()> {
        match self.receive()? {
            Some((Message::Replayed, _)) => Ok(()),
            Some((Message::Failed { error }, _)) => Err(io::Error::other(error)),
            Some((other, _)) => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("unexpected message {other:?}"),
            )),
            None => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the pager has ended")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn messages_and_descriptors_arrive_and_nonsense_is_refused() {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel::new(theirs);
        let null = File::open("/dev/null").unwrap();
        ours.send(&Message::Sit { mappings: Vec::new() }, &[null.as_fd(), null.as_fd()]).unwrap();
        assert!(theirs.wait(Duration::ZERO).unwrap());
        let (message, fds) = theirs.receive().unwrap().unwrap();
        assert!(matches!(message, Message::Sit { .. }) && fds.len() == 2);
        rustix::net::send(&ours.0, b"{\"message\":\"replayed\",\"x\":1", SendFlags::empty())
            .unwrap();
        assert!(theirs.receive().is_err());
        rustix::net::send(&ours.0, &vec![b' '; MESSAGE_MAX + 1], SendFlags::empty()).unwrap();
        assert!(theirs.receive().is_err());
        ours.send(&Message::Failed { error: "why".into() }, &[]).unwrap();
        assert!(theirs.wait_ready(Duration::ZERO).unwrap_err().to_string().contains("why"));
        assert!(!theirs.wait(Duration::ZERO).unwrap());
        drop(ours);
        assert!(theirs.receive().unwrap().is_none());
        assert!(theirs.wait_ready(Duration::ZERO).is_err());
    }
}
