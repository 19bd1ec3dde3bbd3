//! Requests in flight, and how a checkpoint waits for them.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use frazil_snapstore::PageSet;

use super::Disk;
use super::freeze::FrozenDisk;
use crate::error::{Result, VmmError};

#[derive(Debug, Default)]
struct Counts {
    in_flight: u64,
    /// How many callers want the disk to stand still.
    drains: u64,
}

/// Counts requests in flight, and holds new ones back while a disk, or another device, has to stand
/// still.
#[derive(Debug, Default)]
pub(crate) struct RequestGate {
    counts: Mutex<Counts>,
    changed: Condvar,
}

impl RequestGate {
    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a request; waits while none may begin.
    pub(crate) fn enter(&self) {
        let mut counts = self.lock();
        while counts.drains > 0 {
            counts = self.changed.wait(counts).unwrap_or_else(PoisonError::into_inner);
        }
        counts.in_flight += 1;
    }

    /// Ends a request.
    pub(crate) fn leave(&self) {
        let mut counts = self.lock();
        counts.in_flight -= 1;
        if counts.in_flight == 0 && counts.drains > 0 {
            drop(counts);
            self.changed.notify_all();
        }
    }

    /// Waits for requests to end, and returns how many are still in flight after `patience`. Only
    /// if that is 0, which is success, are new ones held back until [`Self::reopen`].
    pub(crate) fn drain(&self, patience: Duration) -> u64 {
        let until = Instant::now() + patience;
        let mut counts = self.lock();
        counts.drains += 1;
        while counts.in_flight > 0 {
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                let in_flight = counts.in_flight;
                drop(counts);
                self.reopen();
                return in_flight;
            };
            let woken = self.changed.wait_timeout(counts, left);
            counts = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        0
    }

    /// Returns true from the beginning of a drain until the gate is reopened.
    pub(crate) fn is_wanted(&self) -> bool {
        self.lock().drains > 0
    }

    pub(crate) fn reopen(&self) {
        self.lock().drains -= 1;
        self.changed.notify_all();
    }
}

/// A request in flight. A checkpoint waits until it is dropped, so a device begins it before it
/// takes the guest's request off its queue, and keeps it until the answer is in guest memory.
///
/// A thread that holds one must not begin another: a checkpoint in between would wait for the
/// first, and the second for the checkpoint.
#[derive(Debug)]
pub struct Request<'a> {
    disk: &'a Disk,
}

impl Disk {
    /// Begins a request; waits while the disk stands still for a checkpoint.
    #[must_use]
    pub fn begin(&self) -> Request<'_> {
        self.requests.enter();
        Request { disk: self }
    }

    /// Waits until no request is in flight, and holds new ones back until the returned guard is
    /// dropped.
    ///
    /// # Errors
    /// [`VmmError::NotNow`] if some take longer than `patience`; requests then go on as before.
    pub fn drain(self: &Arc<Self>, patience: Duration) -> Result<Drained> {
        match self.requests.drain(patience) {
            0 => Ok(Drained { disk: Arc::clone(self) }),
            in_flight => Err(VmmError::NotNow(format!(
                "{}: {in_flight} requests are still in flight after {patience:?}",
                self.name()
            ))),
        }
    }
}

impl Request<'_> {
    /// Fills `buf` from byte `offset` on.
    ///
    /// # Errors
    /// [`VmmError::Host`] if the range is not inside the disk, not whole sectors, or cannot be
    /// read.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len() as u64;
        let read = self.check(offset, len).and_then(|()| self.disk.contents.read(offset, buf));
        read.map_err(self.failed("read", offset, len))
    }

    /// Writes `bytes` at byte `offset`.
    ///
    /// # Errors
    /// [`VmmError::Host`] if the range is not inside the disk or not whole sectors, if the disk is
    /// read-only, or if the bytes cannot be stored, such as when the overlay's file system is full.
    /// Each sector of a failed write holds either its old or its new contents; what a checkpoint
    /// reads is unaffected.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let len = bytes.len() as u64;
        let written = self
            .check(offset, len)
            .and_then(|()| self.check_writable())
            .and_then(|()| self.disk.contents.write(offset, bytes));
        written.map_err(self.failed("write", offset, len))
    }

    /// Zeros `len_bytes` bytes from byte `offset` on, and frees their space. Serves discards too:
    /// discarded bytes may read as anything, and zeros cost nothing.
    ///
    /// # Errors
    /// As [`Self::write_at`].
    pub fn write_zeroes(&self, offset: u64, len_bytes: u64) -> Result<()> {
        let written = self
            .check(offset, len_bytes)
            .and_then(|()| self.check_writable())
            .and_then(|()| self.disk.contents.zero(offset, len_bytes));
        written.map_err(self.failed("write zeros to", offset, len_bytes))
    }

    /// Makes completed writes survive a power loss of the guest. There is nothing to do: the
    /// overlay is part of the machine, as RAM is, and what outlasts the machine is its snapshots.
    ///
    /// # Errors
    /// None today.
    #[allow(clippy::unused_self, clippy::unnecessary_wraps)] // devices pass its result to the guest
    pub fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn check(&self, offset: u64, len_bytes: u64) -> io::Result<()> {
        let invalid = |found: String| Err(io::Error::new(io::ErrorKind::InvalidInput, found));
        if !(offset | len_bytes).is_multiple_of(super::SECTOR_BYTES) {
            return invalid(format!("expected whole sectors of {} bytes", super::SECTOR_BYTES));
        }
        let end = offset.checked_add(len_bytes);
        if end.is_none_or(|end| end > self.disk.len_bytes()) {
            return invalid(format!("the disk has {} bytes", self.disk.len_bytes()));
        }
        Ok(())
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.disk.is_read_only() {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the disk is read-only"));
        }
        Ok(())
    }

    fn failed(
        &self,
        verb: &str,
        offset: u64,
        len_bytes: u64,
    ) -> impl FnOnce(io::Error) -> VmmError {
        let name = self.disk.name();
        VmmError::host(format!("{verb} {len_bytes} bytes at {offset} of {name}"))
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        self.disk.requests.leave();
    }
}

/// A disk that stands still: no request is in flight, and none begins while this lives.
#[derive(Debug)]
pub struct Drained {
    disk: Arc<Disk>,
}

impl Drained {
    /// Freezes the contents of `pages`: until the returned value is dropped or thawed, it reads
    /// them as they are now, whatever requests do. Takes no longer for many pages than for one.
    ///
    /// # Errors
    /// [`VmmError::NotNow`] if an earlier checkpoint is not done with its pages.
    pub fn freeze(&self, pages: impl Into<Arc<PageSet>>) -> Result<FrozenDisk> {
        FrozenDisk::new(&self.disk, pages.into())
    }

    /// The disk.
    #[must_use]
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        self.disk.requests.reopen();
    }
}
