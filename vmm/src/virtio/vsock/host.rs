//! The host's end of the socket device: what the guest's ports lead to.
//!
//! As in other monitors, programs on the host connect to one Unix socket and say `CONNECT` and a
//! port of the guest; ports of the host that the guest connects to are Unix sockets beside it,
//! whose names end in an underscore and the port.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::error::{Result, VmmError};
use crate::private_socket;
use crate::virtio::event;

/// Where a guest's connections lead to and come from. All sockets are nonblocking.
pub trait HostSockets: Send + Sync + fmt::Debug {
    /// The descriptor to watch for callers, who say which of the guest's ports they want.
    fn listener(&self) -> RawFd;

    /// Accepts the next caller.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if there is none; others if it cannot be accepted.
    fn accept(&self) -> io::Result<UnixStream>;

    /// Connects to a port of the host for the guest.
    ///
    /// # Errors
    /// If nobody listens there, or the listener has no room right now.
    fn connect(&self, port: u32) -> io::Result<UnixStream>;
}

/// A Unix socket, and those beside it.
#[derive(Debug)]
pub struct UnixSockets {
    listener: UnixListener,
    path: PathBuf,
}

impl UnixSockets {
    /// Listens on `path`, for this user only. A socket that a process left behind is replaced. The
    /// sockets for ports of the host are named `path`, `_` and the port.
    ///
    /// # Errors
    /// [`VmmError::Config`] if such a name is too long for a socket; [`VmmError::Host`] if `path`
    /// cannot be listened on.
    pub fn listen(path: &Path) -> Result<Self> {
        let longest = neighbour(path, u32::MAX);
        SocketAddrUnix::new(longest.as_path()).map_err(|_too_long| {
            VmmError::Config(format!(
                "vsock: expected a path that fits a socket's name with a port appended, found {}",
                path.display()
            ))
        })?;
        let listener = private_socket::listen(path).map_err(VmmError::host(format!(
            "listen on {} for the guest's sockets (--vsock can choose another path, or none)",
            path.display()
        )))?;
        Ok(Self { listener, path: path.to_owned() })
    }
}

impl Drop for UnixSockets {
    fn drop(&mut self) {
        // The socket is ours: it could not have been bound otherwise.
        let _gone = std::fs::remove_file(&self.path);
    }
}

/// Returns the path of the socket for a port of the host.
fn neighbour(path: &Path, port: u32) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(format!("_{port}"));
    name.into()
}

impl HostSockets for UnixSockets {
    fn listener(&self) -> RawFd {
        self.listener.as_raw_fd()
    }

    fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _nameless) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let address = SocketAddrUnix::new(neighbour(&self.path, port).as_path())?;
        // The standard library's connect would block on a server that is slow to accept.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &address)?;
        Ok(socket.into())
    }
}

/// A host without sockets: nobody comes, and the guest finds nobody.
#[derive(Debug)]
pub struct Unreachable(EventFd);

impl Unreachable {
    /// # Errors
    /// [`VmmError::Host`] if the eventfd, to which nobody ever writes, cannot be created.
    pub fn new() -> Result<Self> {
        event(EFD_NONBLOCK).map(Self)
    }
}

impl HostSockets for Unreachable {
    fn listener(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    fn accept(&self) -> io::Result<UnixStream> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn connect(&self, _port: u32) -> io::Result<UnixStream> {
        Err(io::ErrorKind::ConnectionRefused.into())
    }
}

/// The longest first line of a caller, newline included: a port has up to ten digits.
const LINE_BYTES_MAX: usize = 32;

/// A program that has connected and not said yet which port it wants.
#[derive(Debug)]
pub(super) struct Caller {
    pub stream: UnixStream,
    line: Vec<u8>,
}

/// What a caller wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// To be connected to this port of the guest.
    Port(u32),
    /// The caller has not sent its whole line.
    NotYet,
    /// Nothing valid, or nothing any more.
    Nothing,
}

impl Caller {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream, line: Vec::new() }
    }

    /// Reads on, byte by byte: what comes after the line is for the guest.
    pub(super) fn listen(&mut self) -> Wish {
        use std::io::Read;
        let mut byte = [0];
        while self.line.len() < LINE_BYTES_MAX {
            match self.stream.read(&mut byte) {
                Ok(1) => self.line.push(byte[0]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Wish::NotYet,
                Ok(_) | Err(_) => return Wish::Nothing,
            }
            if byte == *b"\n" {
                return port_wanted(&self.line).map_or(Wish::Nothing, Wish::Port);
            }
        }
        Wish::Nothing
    }
}

/// Returns the port in a line such as `CONNECT 1024`.
fn port_wanted(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let asks = words.next()?.eq_ignore_ascii_case("connect");
    let digits = words.next()?;
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
    let port = digits.parse().ok().filter(|_| asks && plain)?;
    words.next().is_none().then_some(port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_name_a_port() {
        for (line, port) in [
            ("CONNECT 1024\n", Some(1024)),
            ("connect 4294967295\r\n", Some(u32::MAX)),
            ("CONNECT 0\n", Some(0)),
            ("CONNECT 4294967296\n", None),
            ("CONNECT +5\n", None),
            ("CONNECT\n", None),
            ("CONNECT 5 6\n", None),
            ("LISTEN 5\n", None),
            ("\n", None),
            ("CONNECT \u{665}\n", None),
        ] {
            assert_eq!(port_wanted(line.as_bytes()), port, "{line:?}");
        }
        assert_eq!(port_wanted(&[0xff, b'\n']), None);
    }

    #[test]
    fn paths_that_leave_no_room_for_ports_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let long = folder.path().join("x".repeat(100));
        assert!(matches!(UnixSockets::listen(&long), Err(VmmError::Config(_))));
        let path = folder.path().join("v");
        drop(UnixSockets::listen(&path).unwrap());
        assert!(!path.exists(), "it goes with its owner");
        let sockets = UnixSockets::listen(&path).unwrap();
        let none = sockets.connect(5).unwrap_err();
        assert_eq!(none.kind(), io::ErrorKind::NotFound);
        assert_eq!(sockets.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        // Listening on a path in use fails, and makes a trial connection to find out.
        assert!(matches!(UnixSockets::listen(&path), Err(VmmError::Host { .. })), "in use");
        sockets.accept().unwrap();
    }
}
