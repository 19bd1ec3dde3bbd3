//! A userfaultfd over some mappings, and the loop that answers its faults until told to stop.
//!
//! `unsafe` is allowed here for three things: treating a file descriptor sent by another process as
//! a userfaultfd, having the kernel copy a page, and opening a userfaultfd by the system call or an
//! already open device (the userfaultfd crate only opens the device by itself).
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Updater, ioctl, opcode};
use rustix::mm::UserfaultfdFlags;
use userfaultfd::{Event, FeatureFlags, RegisterMode, Uffd, UffdBuilder};

use crate::page::PAGE_SIZE;
use crate::pager::{Mapping, PagerError};

/// Opens a userfaultfd with `features`.
pub(crate) fn open(features: FeatureFlags) -> Result<Uffd, PagerError> {
    if let Some(device) = DEVICE.get() {
        return open_by_device(device, features).map_err(|errno| PagerError::Unavailable {
            reason: format!("cannot create one through the open /dev/userfaultfd: {errno}"),
        });
    }
    let opened = UffdBuilder::new()
        .close_on_exec(true)
        .non_blocking(true)
        // vCPUs fault in kernel mode.
        .user_mode_only(false)
        .require_features(features)
        .create();
    opened
        .or_else(|error| match &error {
            // No permission for the device; with CAP_SYS_PTRACE the system call works without it.
            userfaultfd::Error::OpenDevUserfaultfd(refused)
                if refused.kind() == io::ErrorKind::PermissionDenied =>
            {
                open_by_call(features).map_err(|_| error)
            }
            _ => Err(error),
        })
        .map_err(|error| PagerError::Unavailable { reason: describe(&error) })
}

/// The open device, if it is [kept](keep_device).
static DEVICE: OnceLock<File> = OnceLock::new();

/// Opens /dev/userfaultfd, if permitted, and keeps it: for a process that will have dropped its
/// privileges by the time it needs a userfaultfd. Otherwise does nothing.
pub fn keep_device() {
    if let Ok(device) = File::options().read(true).write(true).open("/dev/userfaultfd") {
        let _kept_already = DEVICE.set(device);
    }
}

/// `struct uffdio_api`.
#[repr(C)]
struct Handshake {
    api: u64,
    features: u64,
    ioctls: u64,
}

const UFFD_API: u64 = 0xAA;
const UFFDIO_API: Opcode = opcode::read_write::<Handshake>(0xAA, 0x3F);
/// `USERFAULTFD_IOC_NEW`: takes flags, returns a descriptor.
const USERFAULTFD_IOC_NEW: Opcode = opcode::none(0xAA, 0x00);

fn open_by_call(features: FeatureFlags) -> rustix::io::Result<Uffd> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: the new userfaultfd watches nothing yet.
    let fd = unsafe { rustix::mm::userfaultfd(flags) }?;
    shake_hands(fd, features)
}

/// `USERFAULTFD_IOC_NEW` on the device.
struct New(UserfaultfdFlags);

// SAFETY: the operation neither reads nor writes any of our memory.
unsafe impl Ioctl for New {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        USERFAULTFD_IOC_NEW
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.0.bits() as usize)
    }

    unsafe fn output_from_ptr(
        new: IoctlOutput,
        _argument: *mut c_void,
    ) -> rustix::io::Result<OwnedFd> {
        // SAFETY: the operation did not fail, so it returned a new descriptor that nobody else
        // owns.
        Ok(unsafe { OwnedFd::from_raw_fd(new) })
    }
}

fn open_by_device(device: &File, features: FeatureFlags) -> rustix::io::Result<Uffd> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: the descriptor is the device's, and the operation is one of that device.
    let fd = unsafe { ioctl(device, New(flags)) }?;
    shake_hands(fd, features)
}

fn shake_hands(fd: OwnedFd, features: FeatureFlags) -> rustix::io::Result<Uffd> {
    let mut asked = Handshake { api: UFFD_API, features: features.bits(), ioctls: 0 };
    // SAFETY: the operation gets the structure that it reads and writes. The descriptor is an
    // owned userfaultfd that watches nothing yet, and is given to nobody else.
    unsafe {
        ioctl(&fd, Updater::<UFFDIO_API, Handshake>::new(&mut asked))?;
        Ok(Uffd::from_raw_fd(fd.into_raw_fd()))
    }
}

/// The message of `error` with its cause, which the crate's `Display` leaves out.
fn describe(error: &userfaultfd::Error) -> String {
    match error {
        userfaultfd::Error::SystemError(errno) => errno.to_string(),
        other => other.to_string(),
    }
}

pub(crate) fn uffd_error(
    op: &'static str,
    address: usize,
    error: &userfaultfd::Error,
) -> PagerError {
    PagerError::Uffd { op, address, reason: describe(error) }
}

/// A userfaultfd, the mappings it watches, and the signal for its threads to stop.
#[derive(Debug)]
pub(crate) struct Watch {
    pub uffd: Uffd,
    pub mappings: Vec<Mapping>,
    stop: AtomicBool,
    stop_event: OwnedFd,
}

impl Watch {
    /// Watches `mappings` for faults of `mode`.
    pub fn new(
        features: FeatureFlags,
        mode: RegisterMode,
        mappings: &[Mapping],
    ) -> Result<Self, PagerError> {
        let uffd = open(features)?;
        for mapping in mappings {
            uffd.register_with_mode(mapping.address as *mut _, mapping.len_bytes, mode)
                .map_err(|error| uffd_error("register memory", mapping.address, &error))?;
        }
        Self::assemble(uffd, mappings)
    }

    /// Watches `mappings` of the process that registered them with the userfaultfd `fd`.
    pub fn of(fd: OwnedFd, mappings: &[Mapping]) -> Result<Self, PagerError> {
        // Whatever it is, reading it must not block.
        let flags = fcntl_getfl(&fd).map(|flags| flags | OFlags::NONBLOCK);
        flags.and_then(|flags| fcntl_setfl(&fd, flags)).map_err(|error| PagerError::Memory {
            op: "use a file descriptor",
            source: error.into(),
        })?;
        // SAFETY: the descriptor is owned, and given to nobody else. If it is not a userfaultfd,
        // its first operation fails, as it would if the watched process were gone.
        let uffd = unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) };
        Self::assemble(uffd, mappings)
    }

    fn assemble(uffd: Uffd, mappings: &[Mapping]) -> Result<Self, PagerError> {
        let stop_event =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|error| {
                PagerError::Memory { op: "create an eventfd", source: error.into() }
            })?;
        Ok(Self { uffd, mappings: mappings.to_vec(), stop: AtomicBool::new(false), stop_event })
    }

    /// Duplicates the userfaultfd.
    pub fn try_clone_fd(&self) -> io::Result<OwnedFd> {
        self.uffd.as_fd().try_clone_to_owned()
    }

    /// Maps a copy of `contents`, one page, at `address`, and wakes the threads waiting for it.
    ///
    /// # Errors
    /// The system's error number: `EEXIST` if a page is mapped there already.
    pub fn copy(&self, address: usize, contents: &[u8]) -> Result<(), i32> {
        assert_eq!(contents.len(), PAGE_SIZE, "a page at a time");
        // SAFETY: the source is a slice of that many bytes. The kernel checks that the destination
        // is memory watched by this userfaultfd, in whatever process, and touches nothing else.
        let copied =
            unsafe { self.uffd.copy(contents.as_ptr().cast(), address as *mut _, PAGE_SIZE, true) };
        match copied {
            Ok(_) => Ok(()),
            Err(userfaultfd::Error::CopyFailed(errno) | userfaultfd::Error::SystemError(errno)) => {
                Err(errno as i32)
            }
            Err(userfaultfd::Error::PartiallyCopied(_)) => {
                Err(rustix::io::Errno::AGAIN.raw_os_error())
            }
            Err(_) => Err(rustix::io::Errno::INVAL.raw_os_error()),
        }
    }

    /// Wakes all waiting threads; those that still miss a page fault again, and are reported again.
    pub fn wake_all(&self) -> Result<(), PagerError> {
        self.mappings.iter().try_for_each(|mapping| {
            self.uffd
                .wake(mapping.address as *mut _, mapping.len_bytes)
                .map_err(|error| uffd_error("wake threads", mapping.address, &error))
        })
    }

    /// True if a fault is waiting to be read.
    pub fn is_due(&self) -> bool {
        let mut fds = [PollFd::new(&self.uffd, PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(poll(&mut fds, Some(&now)), Ok(1..))
    }

    /// Tells every thread that answers faults to end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        // Wakes every polling thread: nobody reads the counter, so it stays readable.
        let _full = rustix::io::write(&self.stop_event, &1_u64.to_ne_bytes());
    }

    /// Waits until [`Self::stop`] is called, for at most `patience`.
    pub fn wait_stopped(&self, patience: Duration) {
        let until = Instant::now() + patience;
        while !self.stopped() {
            let left = until.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(&self.stop_event, PollFlags::IN)];
            let Ok(left) = left.try_into() else { return };
            if matches!(poll(&mut fds, Some(&left)), Ok(0)) {
                return;
            }
        }
    }

    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// The mapping that contains `address`, and the page at that address.
    pub fn place(&self, address: usize) -> Result<(&Mapping, u64), PagerError> {
        self.mappings
            .iter()
            .find(|mapping| {
                (mapping.address..mapping.address + mapping.len_bytes).contains(&address)
            })
            .map(|mapping| {
                (mapping, mapping.first_page + ((address - mapping.address) / PAGE_SIZE) as u64)
            })
            .ok_or_else(|| PagerError::Uffd {
                op: "serve a fault",
                address,
                reason: "the address is in no registered mapping".into(),
            })
    }

    /// Unregisters all mappings and wakes all waiting threads; returns the first failure.
    pub fn let_go(&self) -> Result<(), PagerError> {
        let mut done = Ok(());
        for mapping in &self.mappings {
            let address = mapping.address as *mut _;
            let unregistered = self
                .uffd
                .unregister(address, mapping.len_bytes)
                .map_err(|error| uffd_error("unregister memory", mapping.address, &error));
            // The kernel wakes waiting threads before it unregisters: one that faults again in
            // between would wait for ever without another wake-up.
            let woken = self
                .uffd
                .wake(address, mapping.len_bytes)
                .map_err(|error| uffd_error("wake threads", mapping.address, &error));
            done = done.and(unregistered).and(woken);
        }
        done
    }

    /// Passes the address of each fault to `answer`, until told to stop or something fails.
    pub fn answer_faults(
        &self,
        mut answer: impl FnMut(usize) -> Result<(), PagerError>,
    ) -> Result<(), PagerError> {
        while !self.stopped() {
            let mut fds = [
                PollFd::new(&self.uffd, PollFlags::IN),
                PollFd::new(&self.stop_event, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    return Err(PagerError::Memory { op: "poll", source: error.into() });
                }
            }
            if fds[0].revents().intersects(PollFlags::ERR | PollFlags::NVAL) {
                let gone = io::Error::from(io::ErrorKind::BrokenPipe);
                return Err(PagerError::Memory { op: "poll a userfaultfd", source: gone });
            }
            while !self.stopped() {
                match self.uffd.read_event() {
                    Ok(Some(Event::Pagefault { addr, .. })) => answer(addr as usize)?,
                    // Another thread took it.
                    Ok(None) => break,
                    Ok(Some(other)) => tracing::warn!(?other, "unexpected userfaultfd event"),
                    Err(error) => return Err(uffd_error("read events", 0, &error)),
                }
            }
        }
        Ok(())
    }
}
