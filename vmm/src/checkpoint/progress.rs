//! How far a checkpoint has come.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use frazil_snapstore::Progress;
use serde::{Deserialize, Serialize};

/// Where the checkpoint being taken is; for progress bars.
#[derive(Debug, Default)]
pub struct CheckpointProgress {
    current: Mutex<Option<Arc<Progress>>>,
}

/// How far a checkpoint has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgressReport {
    /// Pages to write, as far as is known.
    pub pages_total: u64,
    /// Pages written.
    pub pages_done: u64,
    /// Bytes appended for them.
    pub stored_bytes: u64,
    /// It is being given up.
    #[serde(default)]
    pub cancelled: bool,
}

impl CheckpointProgress {
    pub(super) fn set(&self, progress: Option<Arc<Progress>>) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = progress;
    }

    /// Makes the checkpoint being taken fail, if one is.
    pub fn cancel(&self) {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.iter().for_each(|progress| progress.cancel());
    }

    /// How far the checkpoint being taken has come, if one is.
    #[must_use]
    pub fn report(&self) -> Option<ProgressReport> {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.as_ref().map(|progress| ProgressReport {
            pages_total: progress.pages_total.load(Ordering::Relaxed),
            pages_done: progress.pages_done.load(Ordering::Relaxed),
            stored_bytes: progress.stored_bytes.load(Ordering::Relaxed),
            cancelled: progress.is_cancelled(),
        })
    }
}
