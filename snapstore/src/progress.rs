//! Progress and statistics of writing pages.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::{Result, StoreError};

/// How far writing pages has come; shared with threads that show progress or cancel.
#[derive(Debug, Default)]
pub struct Progress {
    /// Pages to write, as far as known.
    pub pages_total: AtomicU64,
    /// Pages finished, whether they had to be written or not.
    pub pages_done: AtomicU64,
    /// Bytes appended for these pages.
    pub stored_bytes: AtomicU64,
    cancelled: AtomicBool,
}

impl Progress {
    /// Makes the transaction that reports here fail at its next step.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// True once [`Self::cancel`] was called.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.is_cancelled() {
            return Err(StoreError::Cancelled(
                "the checkpoint stopped; nothing was published".into(),
            ));
        }
        Ok(())
    }

    pub(crate) fn advance(&self, before: &WriteStats, now: &WriteStats) {
        self.pages_done.fetch_add(now.pages - before.pages, Ordering::Relaxed);
        self.stored_bytes.fetch_add(now.stored_bytes - before.stored_bytes, Ordering::Relaxed);
    }
}

/// Statistics of writing pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteStats {
    /// Pages read from the source.
    pub pages: u64,
    /// Pages found all zero, which take no frame.
    pub zero_pages: u64,
    /// Pages found equal to the parent's, which are not written.
    pub equal_pages: u64,
    /// Pages found elsewhere in the store, and referred to there.
    pub dedup_pages: u64,
    /// Pages written as the difference from an older page.
    pub delta_pages: u64,
    /// Frames and delta frames appended.
    pub frames: u64,
    /// Stored bytes of these frames, record headers included.
    pub stored_bytes: u64,
    /// Of these, bytes of delta frames.
    pub delta_bytes: u64,
}

impl WriteStats {
    pub(crate) fn count_frame(&mut self, stored_bytes: u32, pages: usize, delta: bool) {
        self.pages += pages as u64;
        self.frames += 1;
        self.stored_bytes += u64::from(stored_bytes);
        if delta {
            self.delta_pages += pages as u64;
            self.delta_bytes += u64::from(stored_bytes);
        }
    }
}

impl std::ops::AddAssign for WriteStats {
    fn add_assign(&mut self, other: Self) {
        let Self {
            pages,
            zero_pages,
            equal_pages,
            dedup_pages,
            delta_pages,
            frames,
            stored_bytes,
            delta_bytes,
        } = other;
        self.pages += pages;
        self.zero_pages += zero_pages;
        self.equal_pages += equal_pages;
        self.dedup_pages += dedup_pages;
        self.delta_pages += delta_pages;
        self.frames += frames;
        self.stored_bytes += stored_bytes;
        self.delta_bytes += delta_bytes;
    }
}
