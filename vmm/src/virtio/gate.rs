//! Lets a device's thread work one piece at a time, and holds it while the device must be still.

use std::sync::Arc;
use std::time::Duration;

use super::Still;
use crate::disk::RequestGate;
use crate::error::{Result, VmmError};

/// The gate of a device. A block device uses that of its disk instead.
#[derive(Clone, Debug, Default)]
pub(super) struct WorkGate(Arc<RequestGate>);

/// A piece of work under way. A thread may have only one at a time.
#[derive(Debug)]
pub(super) struct Work<'a>(&'a RequestGate);

impl Drop for Work<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl WorkGate {
    /// Begins a piece of work; waits while the device must be still.
    pub(super) fn begin(&self) -> Work<'_> {
        self.0.enter();
        Work(&self.0)
    }

    /// Returns true while somebody wants the device to be still.
    pub(super) fn is_wanted(&self) -> bool {
        self.0.is_wanted()
    }

    /// Waits until no work is under way, and keeps any from beginning until the returned guard is
    /// dropped.
    ///
    /// # Errors
    /// [`VmmError::NotNow`] if that takes longer than `patience`. The transport adds the device's
    /// name.
    pub(super) fn shut(&self, patience: Duration) -> Result<Still> {
        match self.0.drain(patience) {
            0 => Ok(Still::Shut(Shut(Arc::clone(&self.0)))),
            _ => Err(VmmError::NotNow(format!("it is still busy after {patience:?}"))),
        }
    }
}

/// Keeps the gate shut until dropped.
#[derive(Debug)]
pub struct Shut(Arc<RequestGate>);

impl Drop for Shut {
    fn drop(&mut self) {
        self.0.reopen();
    }
}
