//! Serving a region's pages to a mapping, as they are touched, through userfaultfd.
//!
//! The memory is a memfd, an [`Image`]. Its user's mapping is registered with userfaultfd; the pager
//! writes decoded frames to the memfd, past the mapping, and maps what it filled with
//! `UFFDIO_CONTINUE`. A page is filled at most once, so nothing its user wrote is ever undone.
//!
//! Several users can share an image, each with a pager: what one of them waits for is there for all.
//! Those map it `MAP_PRIVATE`, so that what one writes is its own.
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

/// Pages that are filled under one lock: 256 KiB.
pub const CHUNK_PAGES: u64 = 64;

/// `UFFD_FEATURE_MINOR_SHMEM`, which the userfaultfd crate has no name for.
const FEATURE_MINOR_SHMEM: u64 = 1 << 10;

/// Why the pager could not start, or had to stop.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PagerError {
    /// userfaultfd cannot be had at all.
    #[error(
        "userfaultfd is not available: {reason}; lazy resume needs Linux 5.13 or later and either \
         CAP_SYS_PTRACE, which root has, or read and write permission on /dev/userfaultfd; \
         `--eager` resumes without it"
    )]
    Unavailable {
        /// What the system said.
        reason: String,
    },
    /// A userfaultfd operation failed.
    #[error("userfaultfd cannot {op} at {address:#x}: {reason}")]
    Uffd {
        /// What was tried, as a verb.
        op: &'static str,
        /// The address it was tried at.
        address: usize,
        /// What the system said.
        reason: String,
    },
    /// A memory operation of the pager's own failed.
    #[error("the pager cannot {op}: {source}")]
    Memory {
        /// What was tried, as a verb.
        op: &'static str,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// A pager in another process failed.
    #[error("{error}")]
    Remote {
        /// What it said.
        error: String,
    },
    /// The snapshot could not be read.
    #[error("cannot page in page {page} of region `{region}`: {source}")]
    Store {
        /// The region.
        region: String,
        /// The page that was asked for, or the first of those being filled.
        page: u64,
        /// What is wrong with the store.
        #[source]
        source: StoreError,
    },
}

/// A part of a region, and where in the memory file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Its first page, a multiple of [`CHUNK_PAGES`].
    pub first_page: u64,
    /// How many pages, whole chunks of [`CHUNK_PAGES`].
    pub pages: u64,
    /// Where the first is in the memory file, in bytes; whole chunks again.
    pub file_offset: u64,
}

impl Extent {
    pub(crate) fn contains(&self, page: u64) -> bool {
        (self.first_page..self.first_page + self.pages).contains(&page)
    }

    /// True if a page of the region, or of the memory file, is in both: each page has one place.
    fn overlaps(&self, other: &Self) -> bool {
        let cross = |a: u64, a_len: u64, b: u64, b_len: u64| a < b + b_len && b < a + a_len;
        let (len, other_len) = (self.pages * PAGE_SIZE as u64, other.pages * PAGE_SIZE as u64);
        cross(self.first_page, self.pages, other.first_page, other.pages)
            || cross(self.file_offset, len, other.file_offset, other_len)
    }
}

/// A range of addresses whose memory is pages of the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// Where the user mapped it (host virtual address).
    pub address: usize,
    /// Length in bytes, whole chunks of [`CHUNK_PAGES`] pages.
    pub len_bytes: usize,
    /// Where the memory is in the memory file, in bytes.
    pub file_offset: u64,
    /// The region's page at `address`, a multiple of [`CHUNK_PAGES`].
    pub first_page: u64,
}

impl Mapping {
    /// What is mapped there.
    #[must_use]
    pub fn extent(&self) -> Extent {
        Extent {
            first_page: self.first_page,
            pages: (self.len_bytes / PAGE_SIZE) as u64,
            file_offset: self.file_offset,
        }
    }

    /// The page after its last.
    pub(crate) fn end_page(&self) -> u64 {
        self.first_page + (self.len_bytes / PAGE_SIZE) as u64
    }

    fn address_of(&self, page: u64) -> usize {
        self.address + (page - self.first_page) as usize * PAGE_SIZE
    }
}

/// When the pages that were wanted first the last time are brought in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Replay {
    /// When they are touched, as all others.
    Off,
    /// While the user runs already.
    #[default]
    Beside,
    /// Before anything else: the pager starts when they are there.
    Before,
}

/// How a region is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagerOptions {
    /// Threads that serve faults.
    pub fault_threads: usize,
    /// Fill what nobody asked for in the background, and let go of userfaultfd when all is there.
    pub background_fill: bool,
    /// Threads that do so.
    pub fill_threads: usize,
    /// Bytes a second that they bring in; None is as many as they can.
    pub fill_bytes_per_s: Option<u64>,
    /// Bring in the working set that the snapshot has, if it has one.
    pub replay: Replay,
    /// If it has none: take note for so long of what is asked for, keep that as the working set, and
    /// only then fill in the background, which would hide it.
    pub record: Option<Duration>,
    /// Map what is filled in the background for the user, who then finds it without a fault of any
    /// kind. Costs page tables for all of it, so not for many who share an image.
    pub maps_ahead: bool,
}

impl Default for PagerOptions {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            fault_threads: 2,
            background_fill: true,
            // The others are the guest's.
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
/// Dropping it lets go of the memory: pages not filled by then read as zero. So its user must be
/// stopped first, unless [`PagerStats::complete`].
pub struct Pager {
    user: Arc<User>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl std::fmt::Debug for Pager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pager").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

/// Checks that userfaultfd is there with what the pager needs.
///
/// # Errors
/// [`PagerError::Unavailable`].
pub fn probe() -> Result<(), PagerError> {
    uffd::open(features()).map(drop)
}

/// `MAP_PRIVATE` and `MAP_SHARED` mappings of shared memory are both served by these.
fn features() -> FeatureFlags {
    FeatureFlags::MISSING_SHMEM | FeatureFlags::from_bits_retain(FEATURE_MINOR_SHMEM)
}

impl Pager {
    /// Starts serving `region` to `mappings` of `memory`, of which nothing was touched yet.
    ///
    /// # Errors
    /// [`PagerError::Unavailable`] if userfaultfd cannot be had; others name what failed.
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
    /// [`PagerError::Store`] if what is mapped there is not in the image; others name what failed.
    pub fn serve(
        image: Arc<Image>,
        seat: Seat,
        options: PagerOptions,
        on_failure: OnFailure,
    ) -> Result<Self, PagerError> {
        let pager = Self::attend(image, seat, options, on_failure)?;
        pager.begin()?;
        Ok(pager)
    }

    /// Starts answering faults, and nothing else before [`Self::begin`].
    pub(crate) fn attend(
        image: Arc<Image>,
        seat: Seat,
        options: PagerOptions,
        on_failure: OnFailure,
    ) -> Result<Self, PagerError> {
        let user = Arc::new(User::new(image, seat, options, on_failure)?);
        let pager = Self { user, threads: Mutex::default() };
        pager.user.image.enter(&pager.user);
        if pager.user.image.is_complete() {
            // Nobody would tell it.
            pager.user.let_go_complete();
            return Ok(pager);
        }
        for index in 0..options.fault_threads.max(1) {
            pager.spawn(&format!("frazil-fault{index}"), User::serve_faults)?;
        }
        Ok(pager)
    }

    /// What is brought in without being asked for.
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

    /// The image it serves.
    #[must_use]
    pub fn image(&self) -> &Arc<Image> {
        &self.user.image
    }

    /// Lets go of the memory if all of it is there.
    pub(crate) fn look_complete(&self) {
        if self.user.image.is_complete() && !self.user.stats().complete {
            self.user.let_go_complete();
        }
    }

    /// What the pager did so far.
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
            // A panic in a pager thread was reported by the panic hook; nothing is left to do.
            let _joined = thread.join();
        }
    }
}

/// Brings in all of `region` at once, into memory that nobody uses yet. Needs no userfaultfd.
///
/// # Errors
/// [`PagerError::Store`] if a page cannot be read; [`PagerError::Memory`] if the memory cannot
/// be mapped.
pub fn load(region: &RegionReader, memory: &File, mappings: &[Mapping]) -> Result<(), PagerError> {
    let extents: Vec<Extent> = mappings.iter().map(Mapping::extent).collect();
    Image::new(region.clone(), memory, &extents)?.load()
}
