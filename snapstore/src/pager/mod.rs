//! Serving a region's pages to a mapping, as they are touched, through userfaultfd.
//!
//! The memory is a memfd. Its user's mapping is registered with userfaultfd; the pager decodes
//! frames straight into a mapping of its own of the same memfd, and maps what it filled with
//! `UFFDIO_CONTINUE`. A page is filled at most once, so nothing its user wrote is ever undone.
//!
//! See `Documentation/admin-guide/mm/userfaultfd.rst` in the Linux sources.

mod alias;
mod fill;

use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use userfaultfd::{FeatureFlags, RegisterMode};

use crate::error::StoreError;
use crate::page::PAGE_SIZE;
use crate::snapshot::RegionReader;
use crate::uffd::{self, Watch};
use fill::Filler;

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
         root (CAP_SYS_PTRACE) or read and write permission on /dev/userfaultfd; `--eager` resumes \
         without it"
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

/// A range of addresses whose memory is pages of the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    pub(crate) fn pages(&self) -> u64 {
        (self.len_bytes / PAGE_SIZE) as u64
    }

    /// True if a page of the region, or of the memory file, is in both: each page has one place.
    fn overlaps(&self, other: &Self) -> bool {
        let cross = |a: u64, a_len: u64, b: u64, b_len: u64| a < b + b_len && b < a + a_len;
        let (len, other_len) = (self.len_bytes as u64, other.len_bytes as u64);
        cross(self.first_page, self.pages(), other.first_page, other.pages())
            || cross(self.file_offset, len, other.file_offset, other_len)
    }
}

/// How a region is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagerOptions {
    /// Threads that serve faults.
    pub fault_threads: usize,
    /// Fill what nobody asked for in the background, and let go of userfaultfd when all is there.
    pub background_fill: bool,
}

impl Default for PagerOptions {
    fn default() -> Self {
        Self { fault_threads: 2, background_fill: true }
    }
}

/// What the pager did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PagerStats {
    /// Faults answered.
    pub faults: u64,
    /// Time spent answering them, in microseconds.
    pub fault_us_total: u64,
    /// The slowest, in microseconds.
    pub fault_us_max: u64,
    /// Pages whose contents came from the store.
    pub filled_pages: u64,
    /// Pages mapped as zero because somebody touched them.
    pub zero_pages: u64,
    /// Pages with contents in the store, when all are filled; 0 until that is known.
    pub total_pages: u64,
    /// True once everything is resident and userfaultfd was let go.
    pub complete: bool,
}

impl PagerStats {
    /// Pages that need no fault any more. Until all is there, zero pages that nobody touched are
    /// not among them.
    #[must_use]
    pub fn resident_pages(&self) -> u64 {
        self.filled_pages + self.zero_pages
    }
}

/// Called once, from a pager thread, when a page cannot be served. The callee has to stop the users
/// of the memory: once it returns, those who wait for a page are let go and find zeros.
pub type OnFailure = Box<dyn Fn(&PagerError) + Send + Sync>;

pub(crate) struct Shared {
    watch: Watch,
    filler: Filler,
    failure: OnceLock<Arc<PagerError>>,
    on_failure: OnFailure,
    counters: Counters,
    /// Set before userfaultfd is let go of: faults in flight need no answer from then on.
    letting_go: AtomicBool,
    complete: AtomicBool,
}

#[derive(Debug, Default)]
struct Counters {
    faults: AtomicU64,
    fault_us_total: AtomicU64,
    fault_us_max: AtomicU64,
    filled_pages: AtomicU64,
    zero_pages: AtomicU64,
    total_pages: AtomicU64,
}

/// Serves one region to the mappings of one memory file, until dropped or complete.
///
/// Dropping it lets go of the memory: pages not filled by then read as zero. So its user must be
/// stopped first, unless [`PagerStats::complete`].
pub struct Pager {
    shared: Arc<Shared>,
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
        let mode = RegisterMode::MISSING | RegisterMode::MINOR;
        let watch = Watch::new(features(), mode, mappings)?;
        let shared = Arc::new(Shared {
            watch,
            filler: Filler::new(region, memory, mappings)?,
            failure: OnceLock::new(),
            on_failure,
            counters: Counters::default(),
            letting_go: AtomicBool::new(false),
            complete: AtomicBool::new(false),
        });
        let pager = Self { shared, threads: Mutex::default() };
        for index in 0..options.fault_threads.max(1) {
            pager.spawn(&format!("frazil-fault{index}"), Shared::serve_faults)?;
        }
        if options.background_fill {
            pager.spawn("frazil-fill", Shared::fill_all)?;
        }
        Ok(pager)
    }

    fn spawn(&self, name: &str, run: fn(&Shared)) -> Result<(), PagerError> {
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || run(&shared))
            .map_err(|source| PagerError::Memory { op: "start a thread", source })?;
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }

    /// What the pager did so far.
    #[must_use]
    pub fn stats(&self) -> PagerStats {
        let counters = &self.shared.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PagerStats {
            faults: get(&counters.faults),
            fault_us_total: get(&counters.fault_us_total),
            fault_us_max: get(&counters.fault_us_max),
            filled_pages: get(&counters.filled_pages),
            zero_pages: get(&counters.zero_pages),
            total_pages: get(&counters.total_pages),
            complete: self.shared.complete.load(Ordering::Acquire),
        }
    }

    /// Why the pager stopped serving, if it did.
    #[must_use]
    pub fn failure(&self) -> Option<Arc<PagerError>> {
        self.shared.failure.get().cloned()
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.shared.watch.stop();
        let threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            // A panic in a pager thread was reported by the panic hook; nothing is left to do.
            let _joined = thread.join();
        }
    }
}

impl Shared {
    fn fail(&self, error: PagerError) {
        let error = Arc::new(error);
        if self.failure.set(Arc::clone(&error)).is_ok() {
            tracing::error!(%error, "the pager stops");
            (self.on_failure)(&error);
            // Whoever waits for a page would wait for ever. The user was told, so nothing that
            // comes of the zero pages they find now will be kept.
            if let Err(error) = self.let_go() {
                tracing::error!(%error, "those who wait for a page may hang");
            }
        }
        self.watch.stop();
    }

    /// Gives the memory back to the kernel: pages that are missing read as zero from here on.
    fn let_go(&self) -> Result<(), PagerError> {
        self.letting_go.store(true, Ordering::Release);
        self.watch.let_go()
    }

    fn serve_faults(&self) {
        let served = self.watch.answer_faults(|address| {
            let started = Instant::now();
            self.serve(address)?;
            self.count_fault(started);
            Ok(())
        });
        if let Err(error) = served {
            self.fail(error);
        }
    }

    fn count_fault(&self, started: Instant) {
        let us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.counters.faults.fetch_add(1, Ordering::Relaxed);
        self.counters.fault_us_total.fetch_add(us, Ordering::Relaxed);
        self.counters.fault_us_max.fetch_max(us, Ordering::Relaxed);
    }

    /// Makes the page at `address` resident, its frame first, then the rest of its chunk.
    fn serve(&self, address: usize) -> Result<(), PagerError> {
        let (mapping, page) = self.watch.place(address)?;
        self.filler.serve(mapping, page, self)
    }

    /// Fills every page with contents, then lets go of userfaultfd.
    fn fill_all(&self) {
        let mut total_pages = 0;
        for mapping in &self.watch.mappings {
            let chunks = mapping.pages() / CHUNK_PAGES;
            for chunk in 0..chunks {
                if self.watch.stopped() {
                    return;
                }
                match self.filler.fill_chunk(
                    mapping,
                    mapping.first_page + chunk * CHUNK_PAGES,
                    self,
                ) {
                    Ok(pages) => total_pages += pages,
                    Err(error) => return self.fail(error),
                }
            }
        }
        self.counters.total_pages.store(total_pages, Ordering::Relaxed);
        // Pages that are still missing are zero in the snapshot, and so they are without us.
        if let Err(error) = self.let_go() {
            return self.fail(error);
        }
        self.complete.store(true, Ordering::Release);
        self.watch.stop();
    }
}

/// Brings in all of `region` at once, into memory that nobody uses yet. Needs no userfaultfd.
///
/// # Errors
/// [`PagerError::Store`] if a page cannot be read; [`PagerError::Memory`] if the memory cannot
/// be mapped.
pub fn load(region: &RegionReader, memory: &File, mappings: &[Mapping]) -> Result<(), PagerError> {
    let filler = Filler::new(region.clone(), memory, mappings)?;
    for mapping in mappings {
        filler.load(mapping)?;
    }
    Ok(())
}
