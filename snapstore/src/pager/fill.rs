//! The background fill: brings in what nobody has asked for yet, while the memory is in use.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::image::{Count, Image};
use super::{CHUNK_PAGES, PagerError, User};
use crate::page::PAGE_SIZE;

/// How many chunks after the latest fault are searched for one that is not whole: 16 MiB.
const FOLLOW_CHUNKS: u64 = 64;

/// The shared state of the threads that fill an image.
#[derive(Debug, Default)]
pub(super) struct FillState {
    users: Mutex<Vec<Weak<User>>>,
    cursor: Mutex<Cursor>,
    /// 1 + the index (counted through all extents) of the chunk after the latest fault; 0 if there
    /// was no fault since this was last taken.
    seen: AtomicU64,
    /// Number of filling threads.
    running: AtomicUsize,
    /// Rate limit of all threads together, in bytes per second; 0 is none.
    bytes_per_s: AtomicU64,
}

#[derive(Debug, Default)]
struct Cursor {
    /// The chunk to look at next.
    next: u64,
    /// When the next chunk may be filled, under a rate limit.
    due: Option<Instant>,
}

impl FillState {
    fn users(&self) -> MutexGuard<'_, Vec<Weak<User>>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True while threads are filling; they follow the users' faults.
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::Relaxed) > 0
    }
}

impl Image {
    /// Registers a user, to be told when the image is complete.
    pub(super) fn enter(&self, user: &Arc<User>) {
        self.fill.users().push(Arc::downgrade(user));
    }

    pub(super) fn leave(&self, user: &Arc<User>) {
        self.fill.users().retain(|other| !std::ptr::eq(other.as_ptr(), Arc::as_ptr(user)));
    }

    fn each_user(&self, with: impl Fn(&User)) {
        // Not under the lock: trouble with one user must not hold up the others.
        let users: Vec<Arc<User>> = self.fill.users().iter().filter_map(Weak::upgrade).collect();
        users.iter().for_each(|user| with(user));
    }

    /// The first page of chunk `index`, counted through all extents.
    fn chunk_start(&self, mut index: u64) -> u64 {
        for extent in self.extents() {
            let chunks = extent.pages / CHUNK_PAGES;
            if index < chunks {
                return extent.first_page + index * CHUNK_PAGES;
            }
            index -= chunks;
        }
        unreachable!("the cursor stays below the number of chunks")
    }

    /// Has the background fill continue after `page`, which was just asked for: what follows is
    /// likely to be wanted next.
    pub(super) fn follow(&self, page: u64) {
        let mut before = 0;
        for extent in self.extents() {
            if extent.contains(page) {
                let chunk = before + (page - extent.first_page) / CHUNK_PAGES;
                self.fill.seen.store(chunk + 2, Ordering::Relaxed);
                return;
            }
            before += extent.pages / CHUNK_PAGES;
        }
    }

    /// Starts filling in the background with `threads` threads, unless that is going on already.
    /// It ends when the image is complete or has no users left.
    ///
    /// # Errors
    /// [`PagerError::Memory`] if no thread can be started.
    pub fn fill_in_background(
        self: &Arc<Self>,
        threads: usize,
        bytes_per_s: Option<u64>,
    ) -> Result<(), PagerError> {
        self.fill.bytes_per_s.store(bytes_per_s.unwrap_or(0), Ordering::Relaxed);
        // Under the lock: see `is_left`.
        let _users = self.fill.users();
        if self.is_complete() || self.fill.is_running() {
            return Ok(());
        }
        for index in 0..threads.max(1) {
            self.fill.running.fetch_add(1, Ordering::Relaxed);
            let image = Arc::clone(self);
            let spawned = std::thread::Builder::new()
                .name(format!("frazil-fill{index}"))
                .spawn(move || image.fill_all());
            if let Err(source) = spawned {
                self.fill.running.fetch_sub(1, Ordering::Relaxed);
                if index == 0 {
                    return Err(PagerError::Memory { op: "start a thread", source });
                }
                break;
            }
        }
        Ok(())
    }

    /// True if the image has no users left. Then this thread is counted as ended, so that a new
    /// user starts another one.
    fn is_left(&self) -> bool {
        let users = self.fill.users();
        let left = nobody_left(&users);
        if left {
            self.fill.running.fetch_sub(1, Ordering::Relaxed);
        }
        left
    }

    fn fill_all(&self) {
        loop {
            if self.is_left() {
                return;
            }
            let Some(first) = self.next_chunk() else { break };
            if let Err(error) = self.fill_chunk(first) {
                let error = Arc::new(error);
                self.each_user(|user| user.fail(&error));
                break;
            }
        }
        self.fill.running.fetch_sub(1, Ordering::Relaxed);
    }

    /// The first page of the chunk to fill next, or none if the image is complete. The thread that
    /// finds it complete tells all users.
    fn next_chunk(&self) -> Option<u64> {
        let chunks = self.chunks();
        let mut cursor = self.fill.cursor.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_complete() {
            return None;
        }
        let seen = self.fill.seen.swap(0, Ordering::Relaxed);
        // Follow a fault only to where something is missing, so that faults elsewhere do not keep
        // the fill from going round.
        let near = seen.checked_sub(1).and_then(|from| self.lacking(from, FOLLOW_CHUNKS));
        // A chunk can become whole behind a scan in progress, so only the count tells that all are.
        let found = loop {
            if self.whole_chunks() == chunks {
                self.set_filled();
                drop(cursor);
                self.each_user(User::image_complete);
                return None;
            }
            if let Some(index) = near.or_else(|| self.lacking(cursor.next, chunks)) {
                break index;
            }
            std::thread::yield_now();
        };
        cursor.next = (found + 1) % chunks;
        self.wait_until_due(&mut cursor);
        Some(self.chunk_start(found))
    }

    /// The first chunk not known to be whole among `count` from `from` on, counted through all
    /// extents and wrapping around at the end.
    fn lacking(&self, from: u64, count: u64) -> Option<u64> {
        let chunks = self.chunks();
        (from..from + count.min(chunks))
            .map(|index| index % chunks)
            .find(|index| !self.is_whole(self.chunk_start(*index)))
    }

    /// Sleeps until the next chunk may be filled, under a rate limit.
    fn wait_until_due(&self, cursor: &mut Cursor) {
        let rate = self.fill.bytes_per_s.load(Ordering::Relaxed);
        if rate == 0 {
            return;
        }
        let mut now = Instant::now();
        let due = cursor.due.unwrap_or(now);
        // Sleep under the lock, so that the other threads wait as well; a little at a time, since
        // the last user may leave meanwhile.
        while now < due && !nobody_left(&self.fill.users()) {
            std::thread::sleep((due - now).min(Duration::from_millis(100)));
            now = Instant::now();
        }
        let chunk_bytes = CHUNK_PAGES as f64 * PAGE_SIZE as f64;
        cursor.due = Some(due.max(now) + Duration::from_secs_f64(chunk_bytes / rate as f64));
    }

    /// Fills what is missing of the chunk that starts at `first`, and maps it for the users that
    /// ask for that.
    fn fill_chunk(&self, first: u64) -> Result<(), PagerError> {
        let runs = self.runs_of(first)?;
        let mut chunk = self.chunk(first);
        for run in &runs {
            self.fill(&mut chunk, run)?;
            // After each run, not at the end: somebody may be waiting for this one.
            self.each_user(|user| user.map_ahead(run));
        }
        self.set_whole(&chunk);
        Ok(())
    }

    /// Marks the image as complete: the pages filled by now are all pages with contents.
    fn set_filled(&self) {
        let filled = self.count(Count::Filled).load(Ordering::Relaxed);
        self.count(Count::Total).store(filled, Ordering::Relaxed);
        self.set_complete();
    }
}

fn nobody_left(users: &[Weak<User>]) -> bool {
    users.iter().all(|user| user.strong_count() == 0)
}
