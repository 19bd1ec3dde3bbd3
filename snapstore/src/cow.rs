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
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use userfaultfd::{Event, FeatureFlags, RegisterMode, Uffd, UffdBuilder};

use crate::error::Result;
use crate::page::{PAGE_SIZE, Page, PageSource};
use crate::page_set::PageSet;
use crate::pager::{Mapping, PagerError, describe, uffd_error};
use crate::progress::WriteStats;
use crate::transaction::{RegionHandle, Transaction};

/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM` of include/uapi/linux/userfaultfd.h, Linux 5.19.
const FEATURE_WP_SHMEM: u64 = 1 << 12;
/// Pages written to the store before their protection is taken away, all at once.
const PAGES_AT_ONCE: u64 = 8192;
/// Runs of pages protected while the lock is held, for which users that fault have to wait.
const RUNS_AT_ONCE: usize = 64;
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
    /// Pages whose protection was taken away before the cut.
    released: Vec<u64>,
    /// What pages contained at the cut that have been written to since.
    copies: HashMap<u64, Box<Page>>,
    /// The page after the last fault's, and how many that fault freed.
    after_last: u64,
    cluster: u64,
}

struct Shared {
    uffd: Uffd,
    memory: Memory,
    mappings: Vec<Mapping>,
    /// A bit for each page that is protected. Changed under the lock of `state` only, together with
    /// the protection itself; read without it.
    protected: Vec<AtomicU64>,
    state: Mutex<State>,
    stop: AtomicBool,
    stop_event: OwnedFd,
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
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            // Users may fault inside the kernel.
            .user_mode_only(false)
            .require_features(
                FeatureFlags::PAGEFAULT_FLAG_WP | FeatureFlags::from_bits_retain(FEATURE_WP_SHMEM),
            )
            .create()
            .map_err(|error| PagerError::Unavailable { reason: describe(&error) })?;
        for mapping in mappings {
            let address = mapping.address as *mut _;
            uffd.register_with_mode(address, mapping.len_bytes, RegisterMode::WRITE_PROTECT)
                .map_err(|error| uffd_error("register memory", mapping.address, &error))?;
        }
        let stop_event =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|error| {
                PagerError::Memory { op: "create an eventfd", source: error.into() }
            })?;
        let end = mappings.iter().map(|mapping| mapping.first_page + mapping.pages()).max();
        let words = end.unwrap_or(0).div_ceil(64) as usize;
        let shared = Arc::new(Shared {
            uffd,
            memory,
            mappings: mappings.to_vec(),
            protected: std::iter::repeat_with(AtomicU64::default).take(words).collect(),
            state: Mutex::new(State {
                phase: Phase::Idle,
                released: Vec::new(),
                copies: HashMap::new(),
                after_last: 0,
                cluster: 1,
            }),
            stop: AtomicBool::new(false),
            stop_event,
            broken: AtomicBool::new(false),
        });
        let serving = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("frazil-cow".into())
            .spawn(move || serving.serve())
            .map_err(|source| PagerError::Memory { op: "start a thread", source })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Starts protecting pages for one cut: none yet.
    #[must_use]
    pub fn begin(&self) -> Protected {
        let mut state = self.shared.lock();
        state.phase = Phase::BeforeCut;
        state.released.clear();
        let pages = PageSet::new(self.shared.protected.len() as u64 * 64);
        drop(state);
        Protected { shared: Arc::clone(&self.shared), pages, copied: 0 }
    }
}

impl Drop for CopyOnWrite {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        let _full = rustix::io::write(&self.shared.stop_event, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the panic hook.
            let _joined = thread.join();
        }
    }
}

/// The pages protected for one cut. Dropping it takes all protection away.
pub struct Protected {
    shared: Arc<Shared>,
    /// Those the store has not been given yet.
    pages: PageSet,
    copied: u64,
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
        let mut runs = pages.runs().peekable();
        while runs.peek().is_some() {
            // With the lock: a late answer to an old fault must not come between the two.
            let _state = self.shared.lock();
            for (first, count) in runs.by_ref().take(RUNS_AT_ONCE) {
                (first..first + count).for_each(|page| self.shared.set_bit(page));
                self.shared.protect(first, count)?;
            }
        }
        Ok(())
    }

    /// The cut: users stand still. `others` are pages that were written since they were protected,
    /// which the caller copies; added to them are those that may have been, for it to copy too.
    pub fn cut(&mut self, others: &mut PageSet) {
        let mut state = self.shared.lock();
        state.phase = Phase::AfterCut;
        state.released.drain(..).for_each(|page| others.insert(page));
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
            let mut part = PageSet::new(self.pages.capacity());
            let mut room = PAGES_AT_ONCE;
            for (first, count) in self.pages.runs() {
                let count = count.min(room);
                part.insert_range(first, count);
                room -= count;
                if room == 0 {
                    break;
                }
            }
            stats += transaction.write_pages(region, &part, &*self.shared)?;
            self.release(&part);
            self.pages.subtract(&part);
        }
        Ok(stats)
    }

    /// Nobody needs the contents of `pages` at the cut any more.
    fn release(&mut self, pages: &PageSet) {
        let mut runs = pages.runs().peekable();
        while runs.peek().is_some() {
            let mut state = self.shared.lock();
            for (first, count) in runs.by_ref().take(RUNS_AT_ONCE) {
                for page in first..first + count {
                    self.shared.clear_bit(page);
                    self.copied += u64::from(state.copies.remove(&page).is_some());
                }
                self.shared.unprotect(first, count);
            }
        }
    }
}

impl Drop for Protected {
    fn drop(&mut self) {
        let left = std::mem::take(&mut self.pages);
        self.release(&left);
        let mut state = self.shared.lock();
        state.phase = Phase::Idle;
        state.released = Vec::new();
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
        self.mappings.iter().filter_map(move |mapping| {
            let start = first.max(mapping.first_page);
            let end = (first + count).min(mapping.first_page + mapping.pages());
            let pages = end.checked_sub(start).filter(|pages| *pages > 0)?;
            let offset = (start - mapping.first_page) as usize * PAGE_SIZE;
            Some((mapping.address + offset, pages as usize * PAGE_SIZE))
        })
    }

    fn protect(&self, first: u64, count: u64) -> Result<(), PagerError> {
        for (address, len) in self.places(first, count) {
            self.uffd
                .write_protect(address as *mut _, len)
                .map_err(|error| uffd_error("write-protect memory", address, &error))?;
        }
        Ok(())
    }

    /// Takes protection away, and wakes those who wait for that.
    fn unprotect(&self, first: u64, count: u64) {
        for (address, len) in self.places(first, count) {
            if let Err(error) = self.uffd.remove_write_protection(address as *mut _, len, true) {
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
        for mapping in &self.mappings {
            let address = mapping.address as *mut _;
            let _gone = self.uffd.unregister(address, mapping.len_bytes);
            let _gone = self.uffd.wake(address, mapping.len_bytes);
        }
    }

    fn serve(&self) {
        let _ending = Ending(self);
        while !self.stop.load(Ordering::Acquire) {
            let mut fds = [
                PollFd::new(&self.uffd, PollFlags::IN),
                PollFd::new(&self.stop_event, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return tracing::error!(%error, "cannot wait for faults"),
            }
            loop {
                match self.uffd.read_event() {
                    Ok(Some(Event::Pagefault { addr, .. })) => self.fault(addr as usize),
                    Ok(None) => break,
                    Ok(Some(other)) => tracing::warn!(?other, "unexpected userfaultfd event"),
                    Err(error) => return tracing::error!(%error, "cannot read faults"),
                }
            }
        }
    }

    /// Somebody wants to write to the page at `address`.
    fn fault(&self, address: usize) {
        let Some(mapping) = self.mappings.iter().find(|mapping| {
            (mapping.address..mapping.address + mapping.len_bytes).contains(&address)
        }) else {
            return tracing::warn!(address, "a fault outside of registered memory");
        };
        let page = mapping.first_page + ((address - mapping.address) / PAGE_SIZE) as u64;
        let mut state = self.lock();
        if !self.bit(page) {
            // Written by the store meanwhile, or copied at the cut.
            return self.unprotect(page, 1);
        }
        match state.phase {
            Phase::Idle | Phase::BeforeCut => {
                state.released.push(page);
                self.clear_bit(page);
                self.unprotect(page, 1);
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
        if !self.0.stop.load(Ordering::Acquire) {
            self.0.give_up("the thread that answers faults has ended");
        }
    }
}
