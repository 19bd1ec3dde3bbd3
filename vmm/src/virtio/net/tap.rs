//! A tap: the host's end of a network card.
//!
//! `unsafe` is allowed here for the one ioctl that gives an open /dev/net/tun its interface, which no
//! library here wraps.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::error::{Result, VmmError};

const DEVICE: &str = "/dev/net/tun";

/// Something that frames are read from and written to, one at a time, without waiting.
#[derive(Debug)]
pub struct Tap {
    file: File,
    /// What a tap that is none writes to.
    _other_end: Option<OwnedFd>,
}

impl Tap {
    /// The tap interface `name`, which is made if it is not there and this process may do that.
    ///
    /// # Errors
    /// [`VmmError::Config`] if that is no name of an interface; [`VmmError::Host`] if the interface
    /// cannot be had.
    pub fn open(name: &str) -> Result<Self> {
        let mut request = interface_request(name)?;
        // Whole frames and nothing before them: no packet information, no header with offloads.
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(DEVICE)
            .map_err(VmmError::host(format!("open {DEVICE}")))?;
        // SAFETY: the descriptor is open, and the request an `ifreq` with a terminated name that lives
        // as long as the call, which is all that TUNSETIFF reads and writes.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) } < 0 {
            let refused = VmmError::host(format!(
                "use the tap interface `{name}` (--net puts the card on another, or on none)"
            ));
            return Err(refused(io::Error::last_os_error()));
        }
        Ok(Self { file, _other_end: None })
    }

    /// What somebody else opened: a tap without packet information and headers, or anything that keeps
    /// frames apart, such as a socket for packets.
    ///
    /// # Errors
    /// [`VmmError::Host`] if it cannot be kept from waiting.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)
            .map_err(|error| VmmError::host("set up a tap")(error.into()))?;
        Ok(Self { file: File::from(fd), _other_end: None })
    }

    /// No interface at all: nothing arrives, and what is sent goes nowhere.
    ///
    /// # Errors
    /// [`VmmError::Host`] if there are no sockets to be had.
    pub fn unplugged() -> Result<Self> {
        let kind = rustix::net::SocketType::DGRAM;
        let flags = rustix::net::SocketFlags::CLOEXEC;
        let (ours, theirs) =
            rustix::net::socketpair(rustix::net::AddressFamily::UNIX, kind, flags, None)
                .map_err(|error| VmmError::host("create sockets")(error.into()))?;
        // Nobody reads there, so the card soon finds that there is no room for what it sends.
        Ok(Self { _other_end: Some(theirs), ..Self::from_fd(ours)? })
    }

    pub(super) fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(frame)
    }

    pub(super) fn write(&self, frame: &[u8]) -> io::Result<usize> {
        (&self.file).write(frame)
    }

    pub(super) fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// A request about interface `name`, the rest of it zero.
fn interface_request(name: &str) -> Result<libc::ifreq> {
    let fits = (1..libc::IFNAMSIZ).contains(&name.len());
    if !fits || !name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/') {
        return Err(VmmError::Config(format!(
            "tap: expected the name of an interface, of at most {} letters, found {name:?}",
            libc::IFNAMSIZ - 1
        )));
    }
    // SAFETY: the structure is plain numbers and characters, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_none_are_refused() {
        for name in ["", "1234567890123456", "a/b", "tap 0", "t\u{e4}p"] {
            assert!(matches!(Tap::open(name), Err(VmmError::Config(_))), "{name:?}");
        }
        let request = interface_request("tap0").unwrap();
        assert_eq!(request.ifr_name[..5], [b't' as i8, b'a' as i8, b'p' as i8, b'0' as i8, 0]);
    }
}
