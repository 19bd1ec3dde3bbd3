//! One user of an image: its mappings, and answering their faults.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use rayon::prelude::*;
use userfaultfd::RegisterMode;

use super::image::{Image, gap_around};
use super::shared::SharedWords;
use super::stats::{COUNTER_WORDS, Counters};
use super::{CHUNK_PAGES, Mapping, PagerError, PagerOptions, PagerStats, features};
use crate::error::StoreError;
use crate::node::Run;
use crate::page::PAGE_SIZE;
use crate::uffd::{Watch, uffd_error};
use crate::working_set::WorkingSet;

/// Called once, from a pager thread, when a page cannot be served. The callee must stop whatever
/// uses the memory: once it returns, threads waiting for a page are released and find zeros.
pub type OnFailure = Box<dyn Fn(&PagerError) + Send + Sync>;

/// The most chunks that sequential access fills at a time: 2 MiB.
const AHEAD_CHUNKS_MAX: u64 = 8;

/// A user's mappings, registered with a userfaultfd, and its counters: all that a pager, in any
/// process, needs to serve that user.
#[derive(Debug)]
pub struct Seat {
    watch: Watch,
    counters: Counters,
    /// True if the user is another process.
    foreign: bool,
}

impl Seat {
    /// Registers `mappings` of this process: from here on, a thread that touches them waits for a
    /// pager.
    ///
    /// # Errors
    /// [`PagerError::Unavailable`] if userfaultfd is not available; others name what failed.
    pub fn take(mappings: &[Mapping]) -> Result<Self, PagerError> {
        let mode = RegisterMode::MISSING | RegisterMode::MINOR;
        let watch = Watch::new(features(), mode, mappings)?;
        let words = SharedWords::new("frazil-counters", COUNTER_WORDS)
            .map_err(|source| PagerError::Memory { op: "create shared memory", source })?;
        Ok(Self { watch, counters: Counters(words), foreign: false })
    }

    /// The seat of a user in another process, from its userfaultfd, its mappings and its counters.
    ///
    /// # Errors
    /// [`PagerError::Memory`] if `counters` is not a file of counters.
    pub fn of(uffd: OwnedFd, mappings: &[Mapping], counters: File) -> Result<Self, PagerError> {
        let words = SharedWords::of(counters, COUNTER_WORDS)
            .map_err(|source| PagerError::Memory { op: "use the shared counters", source })?;
        let watch = Watch::of(uffd, mappings)?;
        Ok(Self { watch, counters: Counters(words), foreign: true })
    }

    /// A duplicate of the seat, for taking over if the pager that has this one dies.
    ///
    /// # Errors
    /// [`PagerError::Memory`] if there are no file descriptors left.
    pub fn try_clone(&self) -> Result<Self, PagerError> {
        let duplicate = |source| PagerError::Memory { op: "duplicate a file descriptor", source };
        let uffd = self.watch.try_clone_fd().map_err(duplicate)?;
        let counters = self.counters.0.file().try_clone().map_err(duplicate)?;
        let clone = Self::of(uffd, &self.watch.mappings, counters)?;
        Ok(Self { foreign: self.foreign, ..clone })
    }

    /// The user's mappings.
    #[must_use]
    pub fn mappings(&self) -> &[Mapping] {
        &self.watch.mappings
    }

    /// Duplicates of the userfaultfd and the file of counters, to be sent to another process.
    ///
    /// # Errors
    /// [`PagerError::Memory`] if there are no file descriptors left.
    pub fn descriptors(&self) -> Result<[OwnedFd; 2], PagerError> {
        let duplicate = |source| PagerError::Memory { op: "duplicate a file descriptor", source };
        let counters = self.counters.0.file().try_clone().map_err(duplicate)?;
        Ok([self.watch.try_clone_fd().map_err(duplicate)?, counters.into()])
    }

    /// The statistics counted in this seat and in `image`.
    #[must_use]
    pub fn stats(&self, image: &Image) -> PagerStats {
        self.counters.stats(image)
    }

    /// Unregisters the mappings from userfaultfd: missing pages read as zero from here on.
    ///
    /// # Errors
    /// [`PagerError::Uffd`] if the kernel refuses; threads waiting for a page may then hang.
    pub fn let_go(&self) -> Result<(), PagerError> {
        self.watch.let_go()
    }
}

/// A user being served.
pub(crate) struct User {
    pub image: Arc<Image>,
    pub options: PagerOptions,
    seat: Seat,
    failure: OnceLock<Arc<PagerError>>,
    on_failure: OnFailure,
    /// Set before the mappings are unregistered: faults in flight need no answer from then on.
    letting_go: AtomicBool,
    /// The pages asked for, while the working set is recorded.
    recorded: Mutex<Option<WorkingSet>>,
    /// Held while threads other than the user's own pager's, such as those of the background fill,
    /// map pages for it.
    ahead_lock: Mutex<()>,
}

impl std::fmt::Debug for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("User").field("seat", &self.seat).finish_non_exhaustive()
    }
}

impl User {
    pub fn new(
        image: Arc<Image>,
        seat: Seat,
        options: PagerOptions,
        on_failure: OnFailure,
    ) -> Result<Self, PagerError> {
        let inside = |mapping: &Mapping| image.holds(&mapping.extent());
        if let Some(mapping) = seat.mappings().iter().find(|mapping| !inside(mapping)) {
            return Err(PagerError::Store {
                region: image.region().name().to_owned(),
                page: mapping.first_page,
                source: StoreError::Invalid(format!(
                    "expected a mapping that is part of the image, found {mapping:?}"
                )),
            });
        }
        // A pager that died may have read faults and not answered them: have them fault again.
        seat.watch.wake_all()?;
        let (failure, letting_go) = Default::default();
        // Recorded from the first fault on; dropped if a working set turns out to exist.
        let recorded = Mutex::new(options.record.map(|_| WorkingSet::default()));
        let ahead_lock = Mutex::default();
        Ok(Self { image, options, seat, failure, on_failure, letting_go, recorded, ahead_lock })
    }

    pub fn stats(&self) -> PagerStats {
        self.seat.stats(&self.image)
    }

    pub fn failure(&self) -> Option<Arc<PagerError>> {
        self.failure.get().cloned()
    }

    /// Tells the threads that answer the user's faults to end.
    pub fn stop(&self) {
        self.seat.watch.stop();
    }

    /// After [`Self::stop`], waits until no other thread is mapping pages for this user.
    pub fn wait_alone(&self) {
        drop(self.ahead_lock.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub fn fail(&self, error: &Arc<PagerError>) {
        if self.failure.set(Arc::clone(error)).is_ok() {
            tracing::error!(%error, "the pager failed");
            (self.on_failure)(error);
            // Threads waiting for a page would wait for ever. `on_failure` has stopped the user,
            // so nothing computed from the zero pages they find now is kept. A user in another
            // process lets go itself, after stopping its threads.
            if !self.seat.foreign
                && let Err(error) = self.let_go()
            {
                tracing::error!(%error, "threads waiting for a page may hang");
            }
        }
        self.stop();
    }

    fn let_go(&self) -> Result<(), PagerError> {
        self.letting_go.store(true, Ordering::Release);
        self.seat.let_go()
    }

    /// Called when the image is complete, by a thread that tells all its users.
    pub fn image_complete(&self) {
        // Users in other processes are left to the threads that serve them: what they passed as a
        // userfaultfd may be anything.
        if !self.seat.foreign {
            self.let_go_complete();
        }
    }

    /// Lets go of the memory because the image is complete: pages still missing are zero in the
    /// snapshot, and without a pager they read as zero too.
    pub fn let_go_complete(&self) {
        match self.let_go() {
            Ok(()) => {
                self.seat.counters.set_let_go();
                self.stop();
            }
            Err(error) => self.fail(&Arc::new(error)),
        }
    }

    /// Starts the background fill, if the options ask for it.
    pub fn begin_to_fill(&self) -> Result<(), PagerError> {
        let PagerOptions { background_fill, fill_threads, fill_bytes_per_s, .. } = self.options;
        if background_fill {
            self.image.fill_in_background(fill_threads, fill_bytes_per_s)?;
        }
        Ok(())
    }

    /// Fills and maps a working set, on all cores.
    pub fn replay(&self, set: &WorkingSet) -> Result<(), PagerError> {
        set.ranges.par_iter().try_for_each(|(first, count)| self.fill_and_map_range(*first, *count))
    }

    /// The body of the replay thread: [`Self::replay`], then starts the background fill.
    pub fn replay_beside(&self, set: &WorkingSet) {
        if let Err(error) = self.replay(set).and_then(|()| self.begin_to_fill()) {
            self.fail(&Arc::new(error));
        }
    }

    /// The body of the recording thread: waits as long as the options say, saves the pages asked
    /// for as the snapshot's working set, then starts the background fill.
    pub fn record(&self) {
        self.seat.watch.wait_stopped(self.options.record.unwrap_or_default());
        let set = self.lock_recorded().take().unwrap_or_default();
        let region = self.image.region();
        if set.pages() > 0
            && let Err(error) =
                region.store().save_working_set(region.snapshot(), region.name(), &set)
        {
            // The next resume records again.
            tracing::info!(%error, "the working set was not saved");
        }
        if !self.seat.watch.stopped()
            && let Err(error) = self.begin_to_fill()
        {
            self.fail(&Arc::new(error));
        }
    }

    fn lock_recorded(&self) -> MutexGuard<'_, Option<WorkingSet>> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops recording the pages asked for.
    pub fn forget_recorded(&self) {
        *self.lock_recorded() = None;
    }

    fn note(&self, first: u64, count: u64) {
        if self.options.record.is_some()
            && let Some(set) = self.lock_recorded().as_mut()
        {
            set.push(first, count);
        }
    }

    /// Fills and maps `count` pages from `first` on, zero pages too, as if they had been touched.
    fn fill_and_map_range(&self, first: u64, count: u64) -> Result<(), PagerError> {
        for mapping in self.seat.mappings() {
            let start = first.max(mapping.first_page);
            let end = first.saturating_add(count).min(mapping.end_page());
            let mut at = start;
            while at < end && !self.seat.watch.stopped() {
                let part_end = end.min(at - at % CHUNK_PAGES + CHUNK_PAGES);
                self.image.fill_part(at, part_end)?;
                self.map(mapping, at, part_end - at, Holes::Skipped)?;
                at = part_end;
            }
        }
        Ok(())
    }

    pub fn serve_faults(&self) {
        let served = self.seat.watch.answer_faults(|address| {
            let started = Instant::now();
            let (mapping, page) = self.seat.watch.place(address)?;
            let near = self.serve(mapping, page)?;
            self.seat.counters.count_fault(started.elapsed());
            self.image.follow(page);
            self.read_ahead(mapping, page, near)
        });
        if let Err(error) = served {
            self.fail(&Arc::new(error));
        }
    }

    /// Answers a fault on `page`: fills and maps its run or, if it is filled already, maps the
    /// filled pages around it. Returns true if anything in its chunk had been filled before.
    fn serve(&self, mapping: &Mapping, page: u64) -> Result<bool, PagerError> {
        if !self.image.is_writable() {
            return self.serve_by_copy(mapping, page).map(|()| true);
        }
        let mut chunk = if let Some(chunk) = self.image.try_chunk(page) {
            chunk
        } else {
            self.help(mapping, page)?;
            self.image.chunk(page)
        };
        if chunk.has(page) {
            // Filled for another user, or the kernel has dropped the page-table entry since
            // (reclaim, migration, a punched hole): waking alone would make it fault for ever.
            self.image.allocate(&chunk, page, 1)?;
            let around = chunk.filled_around(page);
            drop(chunk);
            self.note(page, 1);
            self.map(mapping, around.first, around.count, Holes::Skipped)?;
            return Ok(true);
        }
        let near = !chunk.is_empty();
        let runs = self.image.runs_of(chunk.first)?;
        let run = match runs.iter().find(|run| (run.first..run.end()).contains(&page)) {
            Some(run) => {
                self.image.fill(&mut chunk, run)?;
                *run
            }
            None => self.image.fill_zero(&mut chunk, page, &runs)?,
        };
        drop(chunk);
        self.note(run.first, run.count);
        self.map(mapping, run.first, run.count, Holes::Refused)?;
        Ok(near)
    }

    /// Answers a fault on `page` of an image that nobody fills any more: maps filled pages, and
    /// gives the user private copies of others.
    fn serve_by_copy(&self, mapping: &Mapping, page: u64) -> Result<(), PagerError> {
        let chunk = self.image.chunk(page);
        if chunk.has(page) {
            let around = chunk.filled_around(page);
            return self.map(mapping, around.first, around.count, Holes::Skipped);
        }
        let runs = self.image.runs_of(chunk.first)?;
        drop(chunk);
        let run = runs.iter().find(|run| (run.first..run.end()).contains(&page)).copied();
        let run = run.unwrap_or_else(|| gap_around(page, &runs));
        self.image.decoded(&run, |contents| self.copy(mapping, &run, contents))
    }

    /// Gives the user private copies of the pages of `run` that are not mapped, and wakes it.
    fn copy(&self, mapping: &Mapping, run: &Run, contents: &[u8]) -> Result<(), PagerError> {
        for (page, contents) in (run.first..).zip(contents.chunks_exact(PAGE_SIZE)) {
            let address = mapping.address_of(page);
            loop {
                match self.seat.watch.copy(address, contents) {
                    Ok(()) => break,
                    Err(errno) if errno == EEXIST => {
                        self.wake(mapping, page, 1)?;
                        break;
                    }
                    Err(errno) if errno == EAGAIN => std::thread::yield_now(),
                    Err(ENOENT | ESRCH) if self.seat.watch.stopped() => return Ok(()),
                    Err(errno) => {
                        let reason = io::Error::from_raw_os_error(errno).to_string();
                        return Err(PagerError::Uffd { op: "copy a page", address, reason });
                    }
                }
            }
        }
        Ok(())
    }

    /// Called while another thread holds the lock of the wanted chunk. If that may be the
    /// background fill, which also wakes the waiting user, does the next chunk rather than wait.
    fn help(&self, mapping: &Mapping, page: u64) -> Result<(), PagerError> {
        let next = page - page % CHUNK_PAGES + CHUNK_PAGES;
        if self.options.maps_ahead && self.image.fill.is_running() && next < mapping.end_page() {
            self.fill_and_map(mapping, next)?;
        }
        Ok(())
    }

    /// If something in the chunk of `page` was filled before (`near`), or the previous chunk is
    /// whole, fills and maps the rest of the chunk and the next ones, as many in all as there are
    /// whole chunks right before it (at least one, at most [`AHEAD_CHUNKS_MAX`]): sequential access
    /// soon gets 2 MiB at a time, random access pays for one run. With the background fill running,
    /// does only the one chunk.
    fn read_ahead(&self, mapping: &Mapping, page: u64, near: bool) -> Result<(), PagerError> {
        if !self.image.is_writable() {
            return Ok(());
        }
        let first = page - page % CHUNK_PAGES;
        let before = |back: &u64| first.checked_sub(back * CHUNK_PAGES);
        let is_behind = |back: &u64| before(back).is_some_and(|page| self.image.is_whole(page));
        let behind = (1..=AHEAD_CHUNKS_MAX).take_while(is_behind).count() as u64;
        if !near && behind == 0 {
            return Ok(());
        }
        // The background fill follows faults, and does the next chunks.
        let chunks = if self.image.fill.is_running() { 1 } else { behind.max(1) };
        let end = mapping.end_page();
        for (index, first) in (first..end).step_by(CHUNK_PAGES as usize).enumerate() {
            let others_wait = index > 0 && self.seat.watch.is_due();
            if index as u64 == chunks || self.seat.watch.stopped() || others_wait {
                break;
            }
            self.fill_and_map(mapping, first)?;
        }
        Ok(())
    }

    fn fill_and_map(&self, mapping: &Mapping, first: u64) -> Result<(), PagerError> {
        if self.image.is_whole(first) {
            return Ok(());
        }
        let runs = self.image.runs_of(first)?;
        for run in &runs {
            self.note(run.first, run.count);
            let mut chunk = self.image.chunk(first);
            self.image.fill(&mut chunk, run)?;
            drop(chunk);
            self.map(mapping, run.first, run.count, Holes::Refused)?;
        }
        let chunk = self.image.chunk(first);
        self.image.set_whole(&chunk);
        Ok(())
    }

    /// Maps `run`, filled in the background, if the options ask for it.
    pub fn map_ahead(&self, run: &Run) {
        if !self.options.maps_ahead {
            return;
        }
        let _lock = self.ahead_lock.lock().unwrap_or_else(PoisonError::into_inner);
        if self.seat.watch.stopped() {
            return;
        }
        let mapping = self.seat.mappings().iter().find(|map| map.extent().contains(run.first));
        if let Some(mapping) = mapping
            && let Err(error) = self.map(mapping, run.first, run.count, Holes::Refused)
        {
            self.fail(&Arc::new(error));
        }
    }

    /// Maps `count` filled pages for the user, and wakes the threads waiting for them.
    fn map(
        &self,
        mapping: &Mapping,
        first: u64,
        count: u64,
        holes: Holes,
    ) -> Result<(), PagerError> {
        let mut page = first;
        let end = first + count;
        while page < end {
            let address = mapping.address_of(page);
            let len = (end - page) as usize * PAGE_SIZE;
            match self.seat.watch.uffd.r#continue(address as *mut _, len, true) {
                Ok(mapped) => page += mapped / PAGE_SIZE as u64,
                Err(userfaultfd::Error::SystemError(errno)) => match errno as i32 {
                    // A racing fault has mapped it already: success, but this call woke nobody.
                    EEXIST => {
                        self.wake(mapping, page, 1)?;
                        page += 1;
                    }
                    // A hole was punched there since it was filled.
                    EFAULT if holes == Holes::Skipped => page += 1,
                    // The address space is being changed: try again.
                    EAGAIN => std::thread::yield_now(),
                    // The mappings were unregistered, which woke everybody; or the user is gone.
                    ENOENT if self.letting_go.load(Ordering::Acquire) => return Ok(()),
                    ENOENT | ESRCH if self.seat.watch.stopped() => return Ok(()),
                    _ => {
                        let error = userfaultfd::Error::SystemError(errno);
                        return Err(uffd_error("map pages", address, &error));
                    }
                },
                Err(error) => return Err(uffd_error("map pages", address, &error)),
            }
        }
        Ok(())
    }

    fn wake(&self, mapping: &Mapping, first: u64, count: u64) -> Result<(), PagerError> {
        let address = mapping.address_of(first);
        self.seat
            .watch
            .uffd
            .wake(address as *mut _, count as usize * PAGE_SIZE)
            .map_err(|error| uffd_error("wake threads", address, &error))
    }
}

/// How [`User::map`] treats pages that were filled but are no longer in the memory file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holes {
    /// As an error.
    Refused,
    /// Not mapped: a user that wants one will fault on it.
    Skipped,
}

const EEXIST: i32 = rustix::io::Errno::EXIST.raw_os_error();
const EAGAIN: i32 = rustix::io::Errno::AGAIN.raw_os_error();
const EFAULT: i32 = rustix::io::Errno::FAULT.raw_os_error();
const ENOENT: i32 = rustix::io::Errno::NOENT.raw_os_error();
const ESRCH: i32 = rustix::io::Errno::SRCH.raw_os_error();
