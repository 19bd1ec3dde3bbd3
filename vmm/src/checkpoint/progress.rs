//! The progress of a checkpoint.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use frazil_snapstore::Progress;
use serde::{Deserialize, Serialize};

/// Tracks the checkpoint being taken, for progress bars and for cancelling it.
#[derive(Debug, Default)]
pub struct CheckpointProgress {
    current: Mutex<Option<(Arc<Progress>, Instant)>>,
}

/// The progress of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgressReport {
    /// Pages to write, as far as is known.
    pub pages_total: u64,
    /// Pages written.
    pub pages_done: u64,
    /// Bytes appended for them.
    pub stored_bytes: u64,
    /// Time since the checkpoint was begun, in milliseconds.
    #[serde(default)]
    pub since_ms: u64,
    /// The checkpoint is being cancelled.
    #[serde(default)]
    pub cancelled: bool,
}

impl CheckpointProgress {
    pub(super) fn set(&self, progress: Option<Arc<Progress>>) {
        let current = progress.map(|progress| (progress, Instant::now()));
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = current;
    }

    /// Makes the checkpoint being taken fail, if one is.
    pub fn cancel(&self) {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.iter().for_each(|(progress, _)| progress.cancel());
    }

    /// The progress of the checkpoint being taken, if there is one.
    #[must_use]
    pub fn report(&self) -> Option<ProgressReport> {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.as_ref().map(|(progress, begun)| ProgressReport {
            pages_total: progress.pages_total.load(Ordering::Relaxed),
            pages_done: progress.pages_done.load(Ordering::Relaxed),
            stored_bytes: progress.stored_bytes.load(Ordering::Relaxed),
            since_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            cancelled: progress.is_cancelled(),
        })
    }
}
