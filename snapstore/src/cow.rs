//! Memory that stays as it is for a reader while its users go on writing: userfaultfd's
//! write-protection as copy-on-write.
//!
//! For pages too many to be copied while their users stand still. They are protected *before*
//! that moment, the cut, while users run: who writes to one by then is let go on at once, and the
//! page noted. At the cut only those few are looked at, so its length does not depend on how many
//! pages are protected. From the cut on a page is copied before its protection is taken away for
//! whoever wants to write to it; the store reads that copy, or the page itself if there is none.
//!
//! Protection belongs to a mapping: memory must be written through the mappings given here only.
//! See "Write Protect Notifications" in the Linux kernel's Documentation/admin-guide/mm/userfaultfd.rst.

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
/// Pages written to the store before their protection is taken away, all at once.
const PAGES_AT_ONCE: u64 = 8192;
/// The same while somebody waits for one of them.
const PAGES_AT_ONCE_IN_HASTE: u64 = 1024;
/// Pages whose protection changes while the lock is held, for which users that fault have to wait;
/// a run of few counts as [`RUN_PAGES_MIN`].
const PAGES_LOCKED: u64 = 1024;
const RUN_PAGES_MIN: u64 = 16;
/// Pages freed at a fault, if faults come in order of address.
const CLUSTER_MAX: u64 = 64;

/// Where memory is and how it is read.
pub type Memory = Arc<dyn PageSource + Send + Sync>;

/// What faults mean at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing is protected; a fault is a late one.
    Idle,
    /// A page that is written to is only noted.
    BeforeCut,
    /// A page that is written to is copied first.
    AfterCut,
}

struct State {
    phase: Phase,
    /// Pages whose protection was taken away before the cut, and not made again since.
    released: PageSet,
    /// What pages contained at the cut that have been written to since.
    copies: HashMap<u64, Box<Page>>,
    /// The most of them.
    copies_max: usize,
    /// Pages that somebody waits for until the store has them, since there are so many copies.
    wanted: PageSet,
    /// Since when they do; also once the store has begun with them.
    waiting: HashMap<u64, Instant>,
    /// The page after the last fault's, and how many that fault freed.
    after_last: u64,
    cluster: u64,
}

struct Shared {
    watch: Watch,
    memory: Memory,
    /// A bit for each page that is protected. Changed under the lock of `state` only, together with
    /// the protection itself; read without it.
    protected: Vec<AtomicU64>,
    state: Mutex<State>,
    /// Protection is gone and nobody answers faults any more.
    broken: AtomicBool,
}

/// Protects pages of some mappings when asked to. Costs nothing meanwhile.
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
    /// Gets ready to protect pages of `mappings`, which `memory` reads. No other userfaultfd may
    /// watch them.
    ///
    /// # Errors
    /// [`PagerError::Unavailable`] if there is no userfaultfd that can; others name what failed.
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

    /// Starts protecting pages for one cut: none yet. Once `copies_max` pages had to be copied,
    /// whoever wants to write to another waits until the store has it.
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
            // A panic was reported by the panic hook.
            let _joined = thread.join();
        }
    }
}

/// Times that somebody had to wait with a change to a page until the store had it, because as many
/// pages were copied as may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waits {
    /// How many.
    pub count: u64,
    /// The longest.
    pub longest: Duration,
}

/// The pages protected for one cut. Dropping it takes all protection away.
pub struct Protected {
    shared: Arc<Shared>,
    /// Those the store has not been given yet.
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
    /// Protects `pages`. Their users may be running: what they write meanwhile is noted by whoever
    /// tracks writes, and may not be protected any more.
    ///
    /// # Errors
    /// What userfaultfd refuses.
    pub fn protect(&mut self, pages: &PageSet) -> Result<(), PagerError> {
        self.pages.union(pages);
        let shared = &self.shared;
        // With the lock: a late answer to an old fault must not come between the two.
        shared.in_parts(pages, |state, first, count| {
            for page in first..first + count {
                shared.set_bit(page);
                // Whoever was let go and has not written yet faults once more.
                state.released.remove(page);
            }
            shared.protect(first, count)
        })
    }

    /// The cut: users stand still. `others` are pages that were written since they were protected,
    /// which the caller copies; added to them are those that may have been, for it to copy too.
    pub fn cut(&mut self, others: &mut PageSet) {
        let mut state = self.shared.lock();
        state.phase = Phase::AfterCut;
        others.union(&state.released);
        // Still protected, as likely as not: the first to write to one takes that away.
        for page in others.iter() {
            self.shared.clear_bit(page);
        }
        drop(state);
        self.pages.subtract(others);
    }

    /// The pages that are protected, as far as the store has not read them.
    #[must_use]
    pub fn pages(&self) -> &PageSet {
        &self.pages
    }

    /// Pages that were copied because their users wanted to write to them.
    #[must_use]
    pub fn copied(&self) -> u64 {
        self.copied
    }

    /// How often its users had to wait, as far as that is over.
    #[must_use]
    pub fn waits(&self) -> Waits {
        self.waits
    }

    /// Writes the pages as they were at the cut, and takes the protection away from what is
    /// written. Returns what that came to.
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

    /// What is written next: what somebody waits for, and then from the front.
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

    /// Nobody needs the contents of `pages` at the cut any more.
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
    /// A page as it was at the cut.
    fn read_page(&self, page: u64, buf: &mut Page) -> io::Result<()> {
        self.memory.read_page(page, buf)?;
        // The copy is right if the page is protected still: protection goes after the bit.
        fence(Ordering::Acquire);
        if !self.bit(page) {
            let state = self.lock();
            let copy = state.copies.get(&page).ok_or_else(|| {
                io::Error::other(format!("page {page} changed after the cut: no copy was made"))
            })?;
            buf.copy_from_slice(&copy[..]);
        }
        if self.broken.load(Ordering::Acquire) {
            return Err(io::Error::other("the write-protection of memory failed"));
        }
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `with` each run of `pages`, a bounded number of them each time the lock is taken.
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
            // To those who wait for the lock: it is not handed over.
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

    /// The parts of mappings that pages `first .. first + count` are at: address and length.
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

    /// Takes protection away, and wakes those who wait for that.
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

    /// Lets go of all memory, so that nobody waits for an answer that never comes. The checkpoint
    /// that reads it fails.
    fn give_up(&self, why: &str) {
        if self.broken.swap(true, Ordering::AcqRel) {
            return;
        }
        tracing::error!(why, "copy-on-write ends");
        if let Err(error) = self.watch.let_go() {
            tracing::error!(%error, "those who wait to write may hang");
        }
    }

    fn serve(&self) {
        let _ending = Ending(self);
        let served = self.watch.answer_faults(|address| {
            self.fault(address);
            Ok(())
        });
        if let Err(error) = served {
            tracing::error!(%error, "faults cannot be answered");
        }
    }

    /// Somebody wants to write to the page at `address`.
    fn fault(&self, address: usize) {
        let Ok((_, page)) = self.watch.place(address) else {
            return tracing::warn!(address, "a fault outside of registered memory");
        };
        let mut state = self.lock();
        if !self.bit(page) {
            // Written by the store meanwhile, or copied at the cut.
            return self.unprotect(page, 1);
        }
        match state.phase {
            Phase::Idle | Phase::BeforeCut => {
                state.released.insert(page);
                self.clear_bit(page);
                self.unprotect(page, 1);
            }
            Phase::AfterCut if state.copies.len() >= state.copies_max => {
                // It is let go on by the writing of this page, which comes next.
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
                    // After the copy and before the protection goes, as `read_page` wants it.
                    self.clear_bit(page);
                }
                self.unprotect(page, pages);
            }
        }
    }

    /// How many pages from `page` on to free: more and more of them as long as faults come in the
    /// order of addresses, since a fault costs as much as copying a hundred pages.
    fn cluster(&self, state: &mut State, page: u64) -> u64 {
        state.cluster =
            if page == state.after_last { (state.cluster * 2).min(CLUSTER_MAX) } else { 1 };
        let pages = (page..page + state.cluster).take_while(|page| self.bit(*page)).count() as u64;
        state.after_last = page + pages;
        pages
    }
}

/// However the thread ends, nobody may wait for it.
struct Ending<'a>(&'a Shared);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if !self.0.watch.stopped() {
            self.0.give_up("the thread that answers faults has ended");
        }
    }
}
