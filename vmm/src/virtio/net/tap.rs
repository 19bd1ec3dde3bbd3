//! A tap: the host's end of a network card.
//!
//! `unsafe` is allowed here for the ioctls that attach an open /dev/net/tun to its interface and
//! set its offloads, which no library here wraps.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::error::{Result, VmmError};

const DEVICE: &str = "/dev/net/tun";

/// Something to read frames from and write them to, one at a time, without blocking.
#[derive(Debug)]
pub struct Tap {
    file: File,
    /// The other end of the socket pair, if there is no interface.
    _other_end: Option<OwnedFd>,
}

impl Tap {
    /// Opens the tap interface `name`, which is created if it does not exist and this process may
    /// do so.
    ///
    /// # Errors
    /// [`VmmError::Config`] if `name` cannot be an interface's name; [`VmmError::Host`] if the
    /// interface cannot be opened.
    pub fn open(name: &str) -> Result<Self> {
        let mut request = interface_request(name)?;
        // Whole frames with nothing before them: no packet information, no header for offloads.
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(DEVICE)
            .map_err(VmmError::host(format!("open {DEVICE}")))?;
        // SAFETY: the descriptor is open, and the request is an `ifreq` with a terminated name that
        // lives as long as the call, which is all that TUNSETIFF reads and writes.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) } < 0 {
            let refused = VmmError::host(format!(
                "use the tap interface `{name}` (--net can choose another, or none)"
            ));
            return Err(refused(io::Error::last_os_error()));
        }
        // A persistent interface keeps the offloads of its last user, which would leave checksums
        // and segmentation to this process.
        let no_offloads: libc::c_ulong = 0;
        // SAFETY: the descriptor is open, and TUNSETOFFLOAD takes a number.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD as _, no_offloads) } < 0 {
            let error = io::Error::last_os_error();
            return Err(VmmError::host(format!("turn off offloads of the tap `{name}`"))(error));
        }
        Ok(Self { file, _other_end: None })
    }

    /// Uses an open descriptor: a tap without packet information and headers, or anything that
    /// keeps frame boundaries, such as a packet socket.
    ///
    /// # Errors
    /// [`VmmError::Host`] if it cannot be made nonblocking.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)
            .map_err(|error| VmmError::host("set up a tap")(error.into()))?;
        Ok(Self { file: File::from(fd), _other_end: None })
    }

    /// Uses no interface at all: nothing arrives, and what is sent goes nowhere.
    ///
    /// # Errors
    /// [`VmmError::Host`] if no sockets can be created.
    pub fn unplugged() -> Result<Self> {
        let kind = rustix::net::SocketType::DGRAM;
        let flags = rustix::net::SocketFlags::CLOEXEC;
        let (ours, theirs) =
            rustix::net::socketpair(rustix::net::AddressFamily::UNIX, kind, flags, None)
                .map_err(|error| VmmError::host("create sockets")(error.into()))?;
        // Nobody reads from the other end, so it is soon full, and the card drops what it sends.
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

/// Returns a request about interface `name` that is otherwise zero.
fn interface_request(name: &str) -> Result<libc::ifreq> {
    let fits = (1..libc::IFNAMSIZ).contains(&name.len());
    if !fits || !name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/') {
        return Err(VmmError::Config(format!(
            "tap: expected an interface name of at most {} characters, found {name:?}",
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

    /// Calls the ioctl `what`, which takes a number, on an open /dev/net/tun.
    fn set(file: &File, what: libc::Ioctl, value: libc::c_uint) {
        // SAFETY: the descriptor is open, and both ioctls used here take a number.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), what, libc::c_ulong::from(value)) };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
    }

    /// Returns true if the host leaves checksums to whoever reads frames from interface `name`.
    fn leaves_checksums(name: &str) -> bool {
        const ETHTOOL_GTXCSUM: u32 = 0x16;
        // `struct ethtool_value`.
        let mut value = [ETHTOOL_GTXCSUM, u32::MAX];
        let mut request = interface_request(name).unwrap();
        request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        // SAFETY: the request leads to two words, the second of which is written.
        let done =
            unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
        value[1] != 0
    }

    #[test]
    fn what_the_last_user_of_an_interface_could_do_is_left_to_the_host_again() {
        let name = format!("fz{}", std::process::id());
        let tap = match Tap::open(&name) {
            Ok(tap) => tap,
            Err(error) => {
                let is_root = rustix::process::geteuid().is_root();
                assert!(!is_root || !std::path::Path::new(DEVICE).exists(), "{error}");
                eprintln!(
                    "SKIPPED: only root makes interfaces, where there is a {DEVICE}: {error}"
                );
                return;
            }
        };
        set(&tap.file, libc::TUNSETPERSIST, 1);
        set(&tap.file, libc::TUNSETOFFLOAD, libc::TUN_F_CSUM);
        assert!(leaves_checksums(&name));
        drop(tap);
        assert!(leaves_checksums(&name), "else nothing is shown");
        let tap = Tap::open(&name).unwrap();
        assert!(!leaves_checksums(&name));
        set(&tap.file, libc::TUNSETPERSIST, 0);
    }

    #[test]
    fn names_that_are_none_are_refused() {
        for name in ["", "1234567890123456", "a/b", "tap 0", "t\u{e4}p"] {
            assert!(matches!(Tap::open(name), Err(VmmError::Config(_))), "{name:?}");
        }
        let request = interface_request("tap0").unwrap();
        assert_eq!(request.ifr_name[..5], [b't' as i8, b'a' as i8, b'p' as i8, b'0' as i8, 0]);
    }
}
