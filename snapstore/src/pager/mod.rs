//! Serving a region's pages to a mapping, as they are touched, through userfaultfd.
//!
//! The memory is a memfd, wrapped in an [`Image`]. The user's mapping of it is registered with
//! userfaultfd; the pager writes decoded frames to the memfd, bypassing the mapping, and then maps
//! the filled pages with `UFFDIO_CONTINUE`. A page is filled at most once, so a fill never undoes a
//! user's write.
//!
//! Several users can share an image, each with its own pager: a page filled for one is there for
//! all. They map it `MAP_PRIVATE`, so that each writes only to its own copy.
//!
//! See `Documentation/admin-guide/mm/userfaultfd.rst` in the Linux sources.

mod channel;
mod fill;
mod image;
mod remote;
mod shared;
mod stats;
mod user;

use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use userfaultfd::FeatureFlags;

use crate::error::StoreError;
use crate::page::PAGE_SIZE;
use crate::snapshot::RegionReader;
use crate::uffd;

pub use crate::uffd::keep_device;
pub use channel::{accept, connect, listen};
pub use image::Image;
pub use remote::{ImageServer, Offer, RemotePager, StartPager, serve_one};
pub use stats::PagerStats;
pub(crate) use user::User;
pub use user::{OnFailure, Seat};

/// Pages in a chunk, which is filled under one lock: 256 KiB.
pub const CHUNK_PAGES: u64 = 64;

/// `UFFD_FEATURE_MINOR_SHMEM`, for which the userfaultfd crate has no name.
const FEATURE_MINOR_SHMEM: u64 = 1 << 10;

/// Why the pager could not start or had to stop.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PagerError {
    /// userfaultfd is not available to this process.
    #[error(
        "userfaultfd is not available: {reason}; lazy resume needs Linux 5.13 or later and either \
         CAP_SYS_PTRACE, which root has, or read and write permission on /dev/userfaultfd; \
         `--eager` resumes without it"
    )]
    Unavailable {
        /// The system's error.
        reason: String,
    },
    /// A userfaultfd operation failed.
    #[error("userfaultfd cannot {op} at {address:#x}: {reason}")]
    Uffd {
        /// The attempted operation, as a verb.
        op: &'static str,
        /// The address concerned (host virtual).
        address: usize,
        /// The system's error.
        reason: String,
    },
    /// Another system call of the pager failed.
    #[error("the pager cannot {op}: {source}")]
    Memory {
        /// The attempted operation, as a verb.
        op: &'static str,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// A pager in another process failed.
    #[error("{error}")]
    Remote {
        /// The message of its error.
        error: String,
    },
    /// The snapshot could not be read.
    #[error("cannot page in page {page} of region `{region}`: {source}")]
    Store {
        /// The region.
        region: String,
        /// The page asked for, or the first of those being filled.
        page: u64,
        /// The store's error.
        #[source]
        source: StoreError,
    },
}

/// A part of a region, and its place in the memory file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Number of the first page, a multiple of [`CHUNK_PAGES`].
    pub first_page: u64,
    /// Number of pages, a multiple of [`CHUNK_PAGES`].
    pub pages: u64,
    /// Offset of the first page in the memory file, in bytes; a multiple of a chunk's length.
    pub file_offset: u64,
}

impl Extent {
    pub(crate) fn contains(&self, page: u64) -> bool {
        (self.first_page..self.first_page + self.pages).contains(&page)
    }

    /// True if the two share a page of the region or of the memory file.
    fn overlaps(&self, other: &Self) -> bool {
        let cross = |a: u64, a_len: u64, b: u64, b_len: u64| a < b + b_len && b < a + a_len;
        let (len, other_len) = (self.pages * PAGE_SIZE as u64, other.pages * PAGE_SIZE as u64);
        cross(self.first_page, self.pages, other.first_page, other.pages)
            || cross(self.file_offset, len, other.file_offset, other_len)
    }
}

/// A range of addresses at which a part of the memory file is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// Start address in the user's process (host virtual).
    pub address: usize,
    /// Length in bytes, a multiple of a chunk's length.
    pub len_bytes: usize,
    /// Offset in the memory file, in bytes.
    pub file_offset: u64,
    /// The region's page at `address`, a multiple of [`CHUNK_PAGES`].
    pub first_page: u64,
}

impl Mapping {
    /// The part of the region that is mapped there.
    #[must_use]
    pub fn extent(&self) -> Extent {
        Extent {
            first_page: self.first_page,
            pages: (self.len_bytes / PAGE_SIZE) as u64,
            file_offset: self.file_offset,
        }
    }

    /// The page after the last.
    pub(crate) fn end_page(&self) -> u64 {
        self.first_page + (self.len_bytes / PAGE_SIZE) as u64
    }

    fn address_of(&self, page: u64) -> usize {
        self.address + (page - self.first_page) as usize * PAGE_SIZE
    }
}

/// When to bring in the working set: the pages that an earlier resume wanted first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Replay {
    /// Not at all: its pages are filled when touched, like all others.
    Off,
    /// While the user is already running.
    #[default]
    Beside,
    /// Before the pager's start returns.
    Before,
}

/// How a region is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagerOptions {
    /// Number of threads that serve faults.
    pub fault_threads: usize,
    /// Fill untouched pages in the background, and let go of userfaultfd once everything is filled.
    pub background_fill: bool,
    /// Number of threads of the background fill.
    pub fill_threads: usize,
    /// Rate limit of the background fill in bytes per second; none if `None`.
    pub fill_bytes_per_s: Option<u64>,
    /// When to bring in the snapshot's working set, if it has one.
    pub replay: Replay,
    /// If no working set is replayed: how long to record the pages asked for and keep them as the
    /// working set. The background fill starts only then, since it would hide accesses.
    pub record: Option<Duration>,
    /// Map for the user what is filled in the background, so that it never faults there. Costs page
    /// tables for everything, so not for many users that share an image.
    pub maps_ahead: bool,
}

impl Default for PagerOptions {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            fault_threads: 2,
            background_fill: true,
            // The other cores are left to the guest.
            fill_threads: (cores / 2).clamp(1, 4),
            fill_bytes_per_s: None,
            replay: Replay::Beside,
            record: None,
            maps_ahead: true,
        }
    }
}

/// Serves an image to one user's mappings, until dropped or complete.
///
/// Dropping it lets go of the memory: pages not filled by then read as zero. So the user must be
/// stopped first, unless [`PagerStats::complete`] is set.
pub struct Pager {
    user: Arc<User>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl std::fmt::Debug for Pager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pager").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

/// Checks that userfaultfd is available, with the features the pager needs.
///
/// # Errors
/// [`PagerError::Unavailable`] if not.
pub fn probe() -> Result<(), PagerError> {
    uffd::open(features()).map(drop)
}

/// The features for serving `MAP_PRIVATE` and `MAP_SHARED` mappings of shared memory.
fn features() -> FeatureFlags {
    FeatureFlags::MISSING_SHMEM | FeatureFlags::from_bits_retain(FEATURE_MINOR_SHMEM)
}

impl Pager {
    /// Starts serving `region` to `mappings` of `memory`, none of which was touched yet.
    ///
    /// # Errors
    /// [`PagerError::Unavailable`] if userfaultfd is not available; others name what failed.
    pub fn start(
        region: RegionReader,
        memory: &File,
        mappings: &[Mapping],
        options: PagerOptions,
        on_failure: OnFailure,
    ) -> Result<Self, PagerError> {
        let extents: Vec<Extent> = mappings.iter().map(Mapping::extent).collect();
        let image = Arc::new(Image::new(region, memory, &extents)?);
        Self::serve(image, Seat::take(mappings)?, options, on_failure)
    }

    /// Starts serving `image` to the user in `seat`.
    ///
    /// # Errors
    /// [`PagerError::Store`] if a mapping of the seat is not part of the image; others name what
    /// failed.
    pub fn serve(
        image: Arc<Image>,
        seat: Seat,
        options: PagerOptions,
        on_failure: OnFailure,
    ) -> Result<Self, PagerError> {
        let pager = Self::start_answering(image, seat, options, on_failure)?;
        pager.begin()?;
        Ok(pager)
    }

    /// Starts answering faults only; [`Self::begin`] starts the rest.
    pub(crate) fn start_answering(
        image: Arc<Image>,
        seat: Seat,
        options: PagerOptions,
        on_failure: OnFailure,
    ) -> Result<Self, PagerError> {
        let user = Arc::new(User::new(image, seat, options, on_failure)?);
        let pager = Self { user, threads: Mutex::default() };
        pager.user.image.enter(&pager.user);
        if pager.user.image.is_complete() {
            // There is no fill any more that would report completion.
            pager.user.let_go_complete();
            return Ok(pager);
        }
        for index in 0..options.fault_threads.max(1) {
            pager.spawn(&format!("frazil-fault{index}"), User::serve_faults)?;
        }
        Ok(pager)
    }

    /// Starts what goes on besides answering faults: replaying or recording the working set, and
    /// the background fill.
    pub(crate) fn begin(&self) -> Result<(), PagerError> {
        if self.user.image.is_complete() {
            return Ok(());
        }
        let options = self.user.options;
        let region = self.user.image.region();
        let set = match options.replay {
            Replay::Off => None,
            Replay::Beside | Replay::Before => {
                region.store().working_set(region.snapshot(), region.name())
            }
        };
        if set.is_some() {
            self.user.forget_recorded();
        }
        match set {
            Some(set) if options.replay == Replay::Before => {
                self.user.replay(&set)?;
                self.user.begin_to_fill()
            }
            Some(set) => self.spawn("frazil-replay", move |user| user.replay_beside(&set)),
            None if options.record.is_some() => self.spawn("frazil-record", User::record),
            None => self.user.begin_to_fill(),
        }
    }

    fn spawn(
        &self,
        name: &str,
        run: impl FnOnce(&User) + Send + 'static,
    ) -> Result<(), PagerError> {
        let user = Arc::clone(&self.user);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || run(&user))
            .map_err(|source| PagerError::Memory { op: "start a thread", source })?;
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }

    pub(crate) fn options(&self) -> PagerOptions {
        self.user.options
    }

    /// The image that is served.
    #[must_use]
    pub fn image(&self) -> &Arc<Image> {
        &self.user.image
    }

    /// Lets go of the memory if the image is complete.
    pub(crate) fn let_go_if_complete(&self) {
        if self.user.image.is_complete() && !self.user.stats().complete {
            self.user.let_go_complete();
        }
    }

    /// What the pager has done so far.
    #[must_use]
    pub fn stats(&self) -> PagerStats {
        self.user.stats()
    }

    /// Why the pager stopped serving, if it did.
    #[must_use]
    pub fn failure(&self) -> Option<Arc<PagerError>> {
        self.user.failure()
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.user.stop();
        self.user.image.leave(&self.user);
        self.user.wait_alone();
        let threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            // The panic hook has reported a panic in a pager thread; nothing is left to do.
            let _joined = thread.join();
        }
    }
}

/// Fills all of `memory` from `region` at once. Nobody may use it yet. Needs no userfaultfd.
///
/// # Errors
/// [`PagerError::Store`] if a page cannot be read; [`PagerError::Memory`] if the memory cannot
/// be written.
pub fn load_memory(
    region: &RegionReader,
    memory: &File,
    mappings: &[Mapping],
) -> Result<(), PagerError> {
    let extents: Vec<Extent> = mappings.iter().map(Mapping::extent).collect();
    Image::new(region.clone(), memory, &extents)?.load_all()
}
