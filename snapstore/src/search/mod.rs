//! Searching a region for bytes or for a regular expression, at the speed at which it can be read.
//!
//! The cores take parts of the region in order; each part's frames are decompressed once and searched. A
//! part is read together with as much of the next one as a match can reach into, and each match belongs to
//! the part it begins in. The caller gets matches in order: a bounded number of parts that are done early
//! wait. The matches are those of a single search from beginning to end: non-overlapping, leftmost first.

mod pattern;
mod positions;
mod scan;
mod sieve;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use crossbeam_channel::{Sender, bounded};

pub use pattern::{MATCH_BYTES_MAX, OPEN_MATCH_BYTES, Pattern};

use crate::error::{Result, StoreError};
use crate::page::PAGE_SIZE;
use crate::snapshot::RegionReader;
use pattern::Found;

/// Pages that a core takes at once: 2 MiB, a multiple of what frames are cut at.
const PART_PAGES: u64 = 512;
/// Parts per thread that may be done ahead of the part that is reported next.
const PARTS_AHEAD: u64 = 4;
/// Matches of a part that are found ahead; further ones are found when the part is reported. Bounds the
/// memory they take where a pattern matches nearly everywhere.
const MATCHES_AHEAD: usize = 4096;

/// A match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Match<'a> {
    /// Where it begins, in bytes from the beginning of the region.
    pub offset: u64,
    /// The bytes that matched.
    pub bytes: &'a [u8],
    /// The bytes before it: the requested context, as far as the searched range has it.
    pub before: &'a [u8],
    /// The bytes after it, likewise.
    pub after: &'a [u8],
}

/// How far a search has come.
#[derive(Debug, Default)]
pub struct SearchProgress {
    /// Pages done, zero pages included.
    pub pages_done: AtomicU64,
    /// Of those, pages that were read.
    pub pages_read: AtomicU64,
}

/// The result of a search.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SearchReport {
    /// Matches reported.
    pub matches: u64,
    /// Pages read. If the caller ended the search, some of them lie beyond the last match; pages that were
    /// not read are zero or lie beyond.
    pub pages_read: u64,
}

/// Searches the bytes `range` of `region` for `pattern` and calls `on_match` for each match, in
/// order, with up to `context` bytes (at most a page) on either side, until `on_match` breaks.
/// Matches lie within the range; what an expression looks at around them (`^`, `\b`) need not.
/// Takes some 10 MiB of memory per core.
///
/// # Errors
/// [`StoreError::Corrupt`] if a page cannot be read.
pub fn search(
    region: &RegionReader,
    range: Range<u64>,
    pattern: &Pattern,
    context: usize,
    progress: &SearchProgress,
    on_match: &mut dyn FnMut(Match<'_>) -> ControlFlow<()>,
) -> Result<SearchReport> {
    let end = range.end.min(region.pages() * PAGE_SIZE as u64);
    let bytes = range.start.min(end)..end;
    let first = bytes.start / PART_BYTES;
    let read_before = progress.pages_read.load(Ordering::Relaxed);
    let job = Job {
        region,
        pattern,
        context: context.min(PAGE_SIZE),
        bytes,
        next: AtomicU64::new(first),
        next_report: Mutex::new(first),
        part_reported: Condvar::new(),
        over: AtomicBool::new(false),
        threads: std::thread::available_parallelism().map_or(1, usize::from) as u64,
        progress,
    };
    std::thread::scope(|scope| {
        let (sender, receiver) = bounded(job.threads as usize);
        for index in 0..job.threads {
            let (job, sender) = (&job, sender.clone());
            std::thread::Builder::new()
                .name(format!("frazil-search{index}"))
                .spawn_scoped(scope, move || job.work(&sender))
                .map_err(|error| {
                    job.stop();
                    StoreError::Invalid(format!("cannot start a thread: {error}"))
                })?;
        }
        drop(sender);
        let mut reporter =
            Reporter { job: &job, on_match, end: 0, report: SearchReport::default() };
        let mut waiting = BTreeMap::new();
        let mut next = first;
        let mut outcome = Ok(ControlFlow::Continue(()));
        // Until the last thread is gone, even if the search is over: threads may be blocked in sending.
        for (number, part) in receiver {
            waiting.insert(number, part);
            while let Some(part) = waiting.remove(&next) {
                if matches!(outcome, Ok(ControlFlow::Continue(()))) {
                    outcome = part.and_then(|part| {
                        part.map_or(Ok(ControlFlow::Continue(())), |part| reporter.part(&part))
                    });
                }
                next += 1;
                job.set_next_report(next);
                if !matches!(outcome, Ok(ControlFlow::Continue(()))) {
                    job.stop();
                }
            }
        }
        let _whether_all = outcome?;
        let pages_read = progress.pages_read.load(Ordering::Relaxed) - read_before;
        Ok(SearchReport { pages_read, ..reporter.report })
    })
}

const PART_BYTES: u64 = PART_PAGES * PAGE_SIZE as u64;

/// A search, shared by all its threads.
struct Job<'a> {
    region: &'a RegionReader,
    pattern: &'a Pattern,
    context: usize,
    /// The bytes to search.
    bytes: Range<u64>,
    next: AtomicU64,
    /// The part to be reported next.
    next_report: Mutex<u64>,
    part_reported: Condvar,
    over: AtomicBool,
    threads: u64,
    progress: &'a SearchProgress,
}

/// Stops the other threads if one panics: its part would never be reported, and they would wait for it.
struct StopOnPanic<'a>(&'a Job<'a>);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop();
        }
    }
}

/// A part with matches, and its bytes.
struct Part {
    /// Where `bytes` begins in the region.
    offset: u64,
    bytes: Vec<u8>,
    /// Where a match may begin.
    own: Range<usize>,
    /// The stretches of `bytes` that are searched.
    spans: Vec<Range<usize>>,
    found: Found,
}

/// A part's number and the part, or none if it has no match.
type Done = (u64, Result<Option<Part>>);

impl Job<'_> {
    fn work(&self, sender: &Sender<Done>) {
        let _stop_on_panic = StopOnPanic(self);
        let mut buffer = Vec::new();
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number * PART_BYTES >= self.bytes.end || self.over.load(Ordering::Relaxed) {
                return;
            }
            self.wait_for(number);
            let done = self.part(number, &mut buffer);
            let pages = PART_PAGES.min(self.region.pages() - number * PART_PAGES);
            self.progress.pages_done.fetch_add(pages, Ordering::Relaxed);
            if sender.send((number, done)).is_err() {
                return;
            }
        }
    }

    /// Waits until part `number` is not too far ahead of the one to be reported next.
    fn wait_for(&self, number: u64) {
        let next = self.next_report.lock().unwrap_or_else(PoisonError::into_inner);
        let too_far = |next: &mut u64| {
            number > *next + PARTS_AHEAD * self.threads && !self.over.load(Ordering::Relaxed)
        };
        drop(self.part_reported.wait_while(next, too_far).unwrap_or_else(PoisonError::into_inner));
    }

    fn set_next_report(&self, next: u64) {
        *self.next_report.lock().unwrap_or_else(PoisonError::into_inner) = next;
        self.part_reported.notify_all();
    }

    fn stop(&self) {
        // Under the lock, or a thread about to wait would miss it.
        let _lock = self.next_report.lock().unwrap_or_else(PoisonError::into_inner);
        self.over.store(true, Ordering::Relaxed);
        self.part_reported.notify_all();
    }

    /// The bytes `wanted` of the region: borrowed from `part` if it has all of them, else read again.
    fn read<'p>(&self, part: &'p Part, wanted: &Range<u64>) -> Result<Cow<'p, [u8]>> {
        let end = part.offset + part.bytes.len() as u64;
        if wanted.start >= part.offset && wanted.end <= end {
            let within = |byte: u64| (byte - part.offset) as usize;
            return Ok(Cow::Borrowed(&part.bytes[within(wanted.start)..within(wanted.end)]));
        }
        let first = wanted.start / PAGE_SIZE as u64;
        let pages = wanted.end.div_ceil(PAGE_SIZE as u64) - first;
        let mut bytes = vec![0; pages as usize * PAGE_SIZE];
        self.region.read_pages(first, &mut bytes)?;
        let skip = (wanted.start - first * PAGE_SIZE as u64) as usize;
        bytes.drain(..skip);
        bytes.truncate((wanted.end - wanted.start) as usize);
        Ok(Cow::Owned(bytes))
    }

    /// Reads and searches part `number`. `buffer` is the thread's own; a part with matches takes it along.
    fn part(&self, number: u64, buffer: &mut Vec<u8>) -> Result<Option<Part>> {
        let (first, all) = (number * PART_PAGES, self.region.pages());
        let end = (first + PART_PAGES).min(all);
        // How far a match can reach, and how far an expression looks around it.
        let (longest, looks) = (self.pattern.longest(), self.pattern.looks());
        let behind = (longest - 1 + looks).div_ceil(PAGE_SIZE) as u64;
        let before = first.min(looks.div_ceil(PAGE_SIZE) as u64);
        let pages = first - before..(end + behind).min(all);
        let offset = pages.start * PAGE_SIZE as u64;
        let within = |byte: u64| (byte.max(offset) - offset) as usize;
        let own = within(self.bytes.start.max(first * PAGE_SIZE as u64))
            ..within(self.bytes.end.min(end * PAGE_SIZE as u64));
        let mut limit = (pages.end - pages.start) as usize * PAGE_SIZE;
        if pages.end < all {
            // The region goes on: what an expression looks at behind a match must be in the buffer.
            limit -= looks;
        }
        let limit = limit.min(within(self.bytes.end));
        let runs = self.region.runs(pages.start, pages.end - pages.start)?;
        let mut spans = Spans::new(own.start..limit, longest - 1 + looks);
        for run in &runs {
            let start = (run.first - pages.start) as usize * PAGE_SIZE;
            spans.add(start..start + run.count as usize * PAGE_SIZE);
        }
        // No pattern matches zeros alone, so a match that begins here has something else near.
        let spans = spans.until(own.end);
        if spans.is_empty() {
            return Ok(None);
        }
        buffer.resize((pages.end - pages.start) as usize * PAGE_SIZE, 0);
        self.region.read_pages(pages.start, buffer)?;
        let read: u64 =
            runs.iter().filter_map(|run| run.clip(first, end)).map(|run| run.count).sum();
        self.progress.pages_read.fetch_add(read, Ordering::Relaxed);
        let found = self.pattern.find_in(buffer, &spans, own.clone(), MATCHES_AHEAD);
        if found.matches.is_empty() {
            return Ok(None);
        }
        Ok(Some(Part { offset, bytes: std::mem::take(buffer), own, spans, found }))
    }
}

impl Pattern {
    /// Non-overlapping matches within `spans` that begin in `starts`, in order: all of them, or the first
    /// `most`.
    fn find_in(
        &self,
        bytes: &[u8],
        spans: &[Range<usize>],
        starts: Range<usize>,
        most: usize,
    ) -> Found {
        let mut found = Found { matches: Vec::new(), is_all: true };
        for span in spans {
            let at = found.matches.last().map_or(starts.start, |last| last.end).max(span.start);
            let stop = span.end.min(starts.end);
            if at < stop && found.is_all {
                self.find_all(bytes, at..stop, span.end, most, &mut found);
            }
        }
        found
    }
}

/// The stretches that have contents, extended by as much as a match could reach into them from outside.
struct Spans {
    limits: Range<usize>,
    reach: usize,
    found: Vec<Range<usize>>,
}

impl Spans {
    fn new(limits: Range<usize>, reach: usize) -> Self {
        Self { limits, reach, found: Vec::new() }
    }

    fn add(&mut self, contents: Range<usize>) {
        let start = contents.start.saturating_sub(self.reach).max(self.limits.start);
        let end = (contents.end + self.reach).min(self.limits.end);
        match self.found.last_mut() {
            Some(last) if last.end >= start => last.end = last.end.max(end),
            _ if start < end => self.found.push(start..end),
            _ => {}
        }
    }

    /// The spans that begin before `end`.
    fn until(mut self, end: usize) -> Vec<Range<usize>> {
        self.found.retain(|span| span.start < end);
        self.found
    }
}

/// Reports matches in order.
struct Reporter<'a, 'b> {
    job: &'a Job<'a>,
    on_match: &'b mut dyn FnMut(Match<'_>) -> ControlFlow<()>,
    /// Where the last match ended, in bytes from the beginning of the region.
    end: u64,
    report: SearchReport,
}

impl Reporter<'_, '_> {
    /// Reports a part's matches. A match of the previous part may reach into this one and overlap matches
    /// found here: those are dropped, and what they in turn had hidden is searched for.
    fn part(&mut self, part: &Part) -> Result<ControlFlow<()>> {
        let mut at = part.own.start.max((self.end.max(part.offset) - part.offset) as usize);
        let mut ahead = part.found.matches.iter();
        let mut covered = at;
        let mut next = ahead.next();
        loop {
            while let Some(hidden) = next.filter(|found| found.start < at) {
                covered = hidden.end;
                next = ahead.next();
            }
            let shown = (at < covered).then(|| self.search(part, at..covered)).flatten();
            let found = match (shown, next) {
                (Some(shown), _) => shown,
                (None, Some(known)) => {
                    let known = known.clone();
                    next = ahead.next();
                    known
                }
                (None, None) if part.found.is_all => return Ok(ControlFlow::Continue(())),
                // There are more than were found ahead.
                (None, None) => match self.search(part, at.max(covered)..part.own.end) {
                    Some(found) => found,
                    None => return Ok(ControlFlow::Continue(())),
                },
            };
            at = found.end;
            let flow = self.report_match(part, &found)?;
            if flow.is_break() {
                return Ok(flow);
            }
        }
    }

    /// The first match of `part` that begins in `starts`.
    fn search(&self, part: &Part, starts: Range<usize>) -> Option<Range<usize>> {
        let end = starts.end.min(part.own.end);
        let first = part.spans.partition_point(|span| span.end <= starts.start);
        part.spans[first..].iter().find_map(|span| {
            let starts = starts.start.max(span.start)..span.end.min(end);
            self.job.pattern.find_from(&part.bytes, starts, span.end)
        })
    }

    fn report_match(&mut self, part: &Part, found: &Range<usize>) -> Result<ControlFlow<()>> {
        let offset = part.offset + found.start as u64;
        self.end = part.offset + found.end as u64;
        let context = self.job.context as u64;
        let around = offset.saturating_sub(context).max(self.job.bytes.start)
            ..(self.end + context).min(self.job.bytes.end);
        let bytes = self.job.read(part, &around)?;
        let (before, rest) = bytes.split_at((offset - around.start) as usize);
        let (bytes, after) = rest.split_at(found.len());
        self.report.matches += 1;
        Ok((self.on_match)(Match { offset, bytes, before, after }))
    }
}
