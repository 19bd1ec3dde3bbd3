//! Copy-on-write by userfaultfd write-protection: memory stays unchanged for a reader while its
//! users go on writing.
//!
//! For pages that are too many to be copied while their users are stopped. They are protected
//! *before* that moment, the cut, while users run: until then, a write fault is answered at once
//! and the page noted. The cut looks only at those few pages, so its length does not depend on how
//! many are protected. After the cut, a page is copied before its protection is removed for a
//! writer; the store reads that copy, or the page itself if there is none.
//!
//! Protection belongs to a mapping: memory must be written only through the mappings given here.
//! See "Write Protect Notifications" in the Linux kernel's
//! Documentation/admin-guide/mm/userfaultfd.rst.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use userfaultfd::{FeatureFlags, RegisterMode};

use crate::error::Result;
use crate::page::{PAGE_SIZE, Page, PageSource};
use crate::page_set::PageSet;
use crate::pager::{Mapping, PagerError};
use crate::progress::WriteStats;
use crate::transaction::{RegionHandle, Transaction};
use crate::uffd::{Watch, uffd_error};

/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM` of include/uapi/linux/userfaultfd.h, Linux 5.19.
const FEATURE_WP_SHMEM: u64 = 1 << 12;
/// Pages written to the store at a time, after which their protection is removed.
const PAGES_AT_ONCE: u64 = 8192;
/// The same while a user waits for one of them.
const PAGES_AT_ONCE_IN_HASTE: u64 = 1024;
/// Pages whose protection changes under one hold of the lock, during which faulting users wait;
/// a run of few pages counts as [`RUN_PAGES_MIN`].
const PAGES_LOCKED: u64 = 1024;
const RUN_PAGES_MIN: u64 = 16;
/// The most pages released per fault, if faults come in order of address.
const CLUSTER_MAX: u64 = 64;

/// The memory to be protected, as a source of pages.
pub type Memory = Arc<dyn PageSource + Send + Sync>;

/// How faults are handled at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing is protected; any fault is a late one.
    Idle,
    /// A page about to be written is only noted.
    BeforeCut,
    /// A page about to be written is copied first.
    AfterCut,
}

struct State {
    phase: Phase,
    /// Pages whose protection was removed before the cut and not restored since.
    released: PageSet,
    /// Contents at the cut of pages that were released to writers since.
    copies: HashMap<u64, Box<Page>>,
    /// The most copies.
    copies_max: usize,
    /// Pages that users wait to write until the store has read them, since no more copies are
    /// allowed.
    wanted: PageSet,
    /// Since when users have waited for a page; also kept while the store is writing it.
    waiting: HashMap<u64, Instant>,
    /// The page after those that the last fault released, and the most that it could release.
    after_last: u64,
    cluster: u64,
}

struct Shared {
    watch: Watch,
    memory: Memory,
    /// One bit per page, set while it is protected. Changed only under the lock of `state`,
    /// together with the protection itself; read without the lock.
    protected: Vec<AtomicU64>,
    state: Mutex<State>,
    /// True once protection was given up and nobody answers faults any more.
    broken: AtomicBool,
}

/// Protects pages of some mappings on demand. Costs nothing in between.
pub struct CopyOnWrite {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for CopyOnWrite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CopyOnWrite").finish_non_exhaustive()
    }
}

impl CopyOnWrite {
    /// Prepares to protect pages of `mappings`, whose contents `memory` reads. No other userfaultfd
    /// may watch these mappings.
    ///
    /// # Errors
    /// [`PagerError::Unavailable`] if userfaultfd, or write-protection by it, is not available;
    /// others name what failed.
    pub fn new(memory: Memory, mappings: &[Mapping]) -> Result<Self, PagerError> {
        let features =
            FeatureFlags::PAGEFAULT_FLAG_WP | FeatureFlags::from_bits_retain(FEATURE_WP_SHMEM);
        let watch = Watch::new(features, RegisterMode::WRITE_PROTECT, mappings)?;
        let end = mappings.iter().map(Mapping::end_page).max();
        let words = end.unwrap_or(0).div_ceil(64) as usize;
        let shared = Arc::new(Shared {
            watch,
            memory,
            protected: std::iter::repeat_with(AtomicU64::default).take(words).collect(),
            state: Mutex::new(State {
                phase: Phase::Idle,
                released: PageSet::new(words as u64 * 64),
                copies: HashMap::new(),
                copies_max: usize::MAX,
                wanted: PageSet::new(words as u64 * 64),
                waiting: HashMap::new(),
                after_last: 0,
                cluster: 1,
            }),
            broken: AtomicBool::new(false),
        });
        let serving = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("frazil-cow".into())
            .spawn(move || serving.serve())
            .map_err(|source| PagerError::Memory { op: "start a thread", source })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Begins protection for one cut, with no pages yet. Once `copies_max` pages had to be copied,
    /// a user that writes to another one waits until the store has read it.
    #[must_use]
    pub fn begin(&self, copies_max: usize) -> Protected {
        let mut state = self.shared.lock();
        state.phase = Phase::BeforeCut;
        state.copies_max = copies_max;
        state.released.clear();
        let pages = PageSet::new(self.shared.protected.len() as u64 * 64);
        drop(state);
        Protected { shared: Arc::clone(&self.shared), pages, copied: 0, waits: Waits::default() }
    }
}

impl Drop for CopyOnWrite {
    fn drop(&mut self) {
        self.shared.watch.stop();
        if let Some(thread) = self.thread.take() {
            // The panic hook has reported a panic.
            let _joined = thread.join();
        }
    }
}

/// How often, and how long, users had to wait to write a page until the store had read it, because
/// no more pages could be copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waits {
    /// Number of waits.
    pub count: u64,
    /// Duration of the longest.
    pub longest: Duration,
}

/// The pages protected for one cut. Dropping it removes all protection.
pub struct Protected {
    shared: Arc<Shared>,
    /// Pages that the store has not read yet.
    pages: PageSet,
    copied: u64,
    waits: Waits,
}

impl std::fmt::Debug for Protected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Protected").field("pages", &self.pages.count()).finish_non_exhaustive()
    }
}

impl Protected {
    /// Protects `pages`. Their users may be running: a page written meanwhile may have lost its
    /// protection again, and appears in the caller's log of writes.
    ///
    /// # Errors
    /// [`PagerError::Uffd`] if the kernel refuses.
    pub fn protect(&mut self, pages: &PageSet) -> Result<(), PagerError> {
        self.pages.union(pages);
        let shared = &self.shared;
        // Bit and protection are set under one hold of the lock: a late answer to an old fault must
        // not come in between.
        shared.in_parts(pages, |state, first, count| {
            for page in first..first + count {
                shared.set_bit(page);
                // A writer that was released but has not written yet faults once more.
                state.released.remove(page);
            }
            shared.protect(first, count)
        })
    }

    /// Makes the cut, while users are stopped. `others` are the pages written since they were
    /// protected, which the caller copies itself. Adds to them the pages that may have been
    /// written, for the caller to copy too.
    pub fn cut(&mut self, others: &mut PageSet) {
        let mut state = self.shared.lock();
        state.phase = Phase::AfterCut;
        others.union(&state.released);
        // They may still be protected: the first write to one then removes the protection.
        for page in others.iter() {
            self.shared.clear_bit(page);
        }
        drop(state);
        self.pages.subtract(others);
    }

    /// The protected pages that the store has not read yet.
    #[must_use]
    pub fn pages(&self) -> &PageSet {
        &self.pages
    }

    /// Number of pages that had to be copied because a user wrote to them, among those that the
    /// store has read.
    #[must_use]
    pub fn copied(&self) -> u64 {
        self.copied
    }

    /// The waits of users, as far as they are over.
    #[must_use]
    pub fn waits(&self) -> Waits {
        self.waits
    }

    /// Writes the pages as they were at the cut, and removes the protection of what is written.
    ///
    /// # Errors
    /// Those of [`Transaction::write_pages`].
    pub fn write(
        &mut self,
        transaction: &mut Transaction,
        region: RegionHandle,
    ) -> Result<WriteStats> {
        let mut stats = WriteStats::default();
        while !self.pages.is_empty() {
            let part = self.next_part();
            stats += transaction.write_pages(region, &part, &*self.shared)?;
            self.release(&part);
            self.pages.subtract(&part);
        }
        Ok(stats)
    }

    /// The pages to write next: those that users wait for, then the first ones left.
    fn next_part(&self) -> PageSet {
        let none = PageSet::new(self.pages.capacity());
        let mut part = std::mem::replace(&mut self.shared.lock().wanted, none);
        let mut room = if part.is_empty() { PAGES_AT_ONCE } else { PAGES_AT_ONCE_IN_HASTE };
        for (first, count) in self.pages.runs() {
            let count = count.min(room);
            part.insert_range(first, count);
            room -= count;
            if room == 0 {
                break;
            }
        }
        part
    }

    /// Removes protection and copies of `pages`, whose contents at the cut are no longer needed.
    fn release(&mut self, pages: &PageSet) {
        let (shared, mut copied, waits) = (&self.shared, 0, &mut self.waits);
        let released = shared.in_parts(pages, |state, first, count| {
            let mut since = None;
            for page in first..first + count {
                shared.clear_bit(page);
                state.wanted.remove(page);
                copied += u64::from(state.copies.remove(&page).is_some());
                if let Some(waits_since) = state.waiting.remove(&page) {
                    waits.count += 1;
                    since = Some(since.unwrap_or(waits_since).min(waits_since));
                }
            }
            shared.unprotect(first, count);
            waits.longest =
                waits.longest.max(since.as_ref().map_or(Duration::ZERO, Instant::elapsed));
            Ok(())
        });
        debug_assert!(released.is_ok(), "taking protection away gives up instead of failing");
        self.copied += copied;
    }
}

impl Drop for Protected {
    fn drop(&mut self) {
        let left = std::mem::take(&mut self.pages);
        self.release(&left);
        let mut state = self.shared.lock();
        state.phase = Phase::Idle;
        state.released.clear();
        state.wanted.clear();
        state.waiting = HashMap::new();
        state.copies = HashMap::new();
    }
}

impl PageSource for Shared {
    /// Reads a page as it was at the cut.
    fn read_page(&self, page: u64, buf: &mut Page) -> io::Result<()> {
        self.memory.read_page(page, buf)?;
        // What was read is right if the bit is still set: the protection is removed only after the
        // bit is cleared.
        fence(Ordering::Acquire);
        if !self.bit(page) {
            let state = self.lock();
            let copy = state.copies.get(&page).ok_or_else(|| {
                io::Error::other(format!("page {page} changed after the cut and was not copied"))
            })?;
            buf.copy_from_slice(&copy[..]);
        }
        if self.broken.load(Ordering::Acquire) {
            return Err(io::Error::other("write-protecting memory failed"));
        }
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `with` for each run of `pages`, releasing the lock after a bounded number of pages.
    fn in_parts(
        &self,
        pages: &PageSet,
        mut with: impl FnMut(&mut State, u64, u64) -> Result<(), PagerError>,
    ) -> Result<(), PagerError> {
        let mut runs = pages.runs().flat_map(|(first, count)| {
            let starts = (0..count).step_by(PAGES_LOCKED as usize);
            starts.map(move |start| (first + start, (count - start).min(PAGES_LOCKED)))
        });
        loop {
            let mut state = self.lock();
            let mut room = PAGES_LOCKED;
            while room > 0 {
                let Some((first, count)) = runs.next() else { return Ok(()) };
                with(&mut state, first, count)?;
                room = room.saturating_sub(count.max(RUN_PAGES_MIN));
            }
            drop(state);
            // Let threads that wait for the lock have it: unlocking does not hand it over.
            std::thread::yield_now();
        }
    }

    fn bit(&self, page: u64) -> bool {
        self.protected
            .get(page as usize / 64)
            .is_some_and(|word| word.load(Ordering::Acquire) >> (page % 64) & 1 == 1)
    }

    fn set_bit(&self, page: u64) {
        self.protected[page as usize / 64].fetch_or(1 << (page % 64), Ordering::AcqRel);
    }

    fn clear_bit(&self, page: u64) {
        if let Some(word) = self.protected.get(page as usize / 64) {
            word.fetch_and(!(1 << (page % 64)), Ordering::AcqRel);
        }
    }

    /// The addresses and lengths at which pages `first .. first + count` are mapped.
    fn places(&self, first: u64, count: u64) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.watch.mappings.iter().filter_map(move |mapping| {
            let start = first.max(mapping.first_page);
            let end = (first + count).min(mapping.end_page());
            let pages = end.checked_sub(start).filter(|pages| *pages > 0)?;
            let offset = (start - mapping.first_page) as usize * PAGE_SIZE;
            Some((mapping.address + offset, pages as usize * PAGE_SIZE))
        })
    }

    fn protect(&self, first: u64, count: u64) -> Result<(), PagerError> {
        for (address, len) in self.places(first, count) {
            self.watch
                .uffd
                .write_protect(address as *mut _, len)
                .map_err(|error| uffd_error("write-protect memory", address, &error))?;
        }
        Ok(())
    }

    /// Removes the protection of pages, and wakes the threads that wait to write them.
    fn unprotect(&self, first: u64, count: u64) {
        for (address, len) in self.places(first, count) {
            if let Err(error) =
                self.watch.uffd.remove_write_protection(address as *mut _, len, true)
            {
                let error = uffd_error("unprotect memory", address, &error);
                self.give_up(&error.to_string());
            }
        }
    }

    /// Lets go of all memory, so that no thread waits for an answer that never comes. A checkpoint
    /// in progress fails.
    fn give_up(&self, why: &str) {
        if self.broken.swap(true, Ordering::AcqRel) {
            return;
        }
        tracing::error!(why, "copy-on-write stopped");
        if let Err(error) = self.watch.let_go() {
            tracing::error!(%error, "threads waiting to write may hang");
        }
    }

    fn serve(&self) {
        let _ending = Ending(self);
        let served = self.watch.answer_faults(|address| {
            self.fault(address);
            Ok(())
        });
        if let Err(error) = served {
            tracing::error!(%error, "cannot answer faults");
        }
    }

    /// Answers a write fault at `address`.
    fn fault(&self, address: usize) {
        let Ok((_, page)) = self.watch.place(address) else {
            return tracing::warn!(address, "fault outside registered memory");
        };
        let mut state = self.lock();
        if !self.bit(page) {
            // The store has read it meanwhile, or the caller copied it at the cut.
            return self.unprotect(page, 1);
        }
        match state.phase {
            Phase::Idle | Phase::BeforeCut => {
                state.released.insert(page);
                self.clear_bit(page);
                self.unprotect(page, 1);
            }
            Phase::AfterCut if state.copies.len() >= state.copies_max => {
                // The writer is released once the store has written this page, which it does next.
                state.wanted.insert(page);
                state.waiting.entry(page).or_insert_with(Instant::now);
            }
            Phase::AfterCut => {
                let pages = self.cluster(&mut state, page);
                for page in page..page + pages {
                    let mut copy = Box::new([0; PAGE_SIZE]);
                    if let Err(error) = self.memory.read_page(page, &mut copy) {
                        return self.give_up(&error.to_string());
                    }
                    state.copies.insert(page, copy);
                    // After copying, before removing protection: `read_page` relies on this.
                    self.clear_bit(page);
                }
                self.unprotect(page, pages);
            }
        }
    }

    /// How many pages from `page` on to release: twice as many each time while faults come in order
    /// of address, since a fault costs as much as copying a hundred pages.
    fn cluster(&self, state: &mut State, page: u64) -> u64 {
        state.cluster =
            if page == state.after_last { (state.cluster * 2).min(CLUSTER_MAX) } else { 1 };
        let pages = (page..page + state.cluster).take_while(|page| self.bit(*page)).count() as u64;
        state.after_last = page + pages;
        pages
    }
}

/// Lets go of all memory however the thread ends, so that nobody waits for it.
struct Ending<'a>(&'a Shared);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if !self.0.watch.stopped() {
            self.0.give_up("the thread that answers faults has ended");
        }
    }
}
