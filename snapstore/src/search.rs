//! Searching a region for bytes or for a regular expression, at the speed at which it can be read.
//!
//! All cores take parts of the region in order, decompress each part's frames once, and search. A part is
//! read with as much of the next one as a match may reach into; each match belongs to the part that it
//! begins in. The caller gets matches in order: parts that are done early wait, a bounded number of them.
//! What is found is what one search from the beginning to the end would find, matches that overlap
//! an earlier one left out.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use crossbeam_channel::{Sender, bounded};
use memchr::memmem::Finder;
use regex_automata::Input;
use regex_automata::meta::{self, Regex};
use regex_automata::util::syntax;
use regex_syntax::hir::Look;

use crate::error::{Result, StoreError};
use crate::page::PAGE_SIZE;
use crate::snapshot::RegionReader;

/// Pages that a core takes at once: 2 MiB, a multiple of what frames are cut at.
const PART_PAGES: u64 = 512;
/// Of an expression without a longest match, so many bytes of a match are found for certain.
pub const OPEN_MATCH_BYTES: usize = PAGE_SIZE;
/// The longest match that can be searched for.
pub const MATCH_BYTES_MAX: usize = 64 << 10;
/// Parts that may be done before the one that is next to be told, for each thread.
const AHEAD: u64 = 4;

/// What is searched for.
#[derive(Debug)]
pub struct Pattern {
    engine: Engine,
    /// The longest match, in bytes.
    longest: usize,
    /// It looks at what is before a match, and behind it.
    looks_around: bool,
}

#[derive(Debug)]
enum Engine {
    Bytes(Box<Finder<'static>>),
    Regex(Box<Regex>),
}

impl Pattern {
    /// These bytes.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if there are none, too many, or only zeros: pages that are zero are not
    /// looked at.
    pub fn bytes(bytes: &[u8]) -> Result<Self> {
        if bytes.is_empty() || bytes.len() > MATCH_BYTES_MAX {
            let found = bytes.len();
            return Err(invalid(format!("expected 1 to {MATCH_BYTES_MAX} bytes, found {found}")));
        }
        let engine = Engine::Bytes(Box::new(Finder::new(bytes).into_owned()));
        Self { engine, longest: bytes.len(), looks_around: false }.checked()
    }

    /// A regular expression of crate `regex`'s syntax, on bytes: `.` is any of them but a line feed,
    /// classes such as `\w` are ASCII, `^` and `$` are at the ends of lines. `(?s)`, `(?i)` and so on
    /// change that.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if it is none, or matches nothing at all, zeros alone, or the beginning or
    /// end of all memory.
    pub fn regex(expression: &str) -> Result<Self> {
        let config = syntax::Config::new().unicode(false).utf8(false).multi_line(true);
        let hir = syntax::parse_with(expression, &config)
            .map_err(|error| invalid(format!("expected a regular expression: {error}")))?;
        let properties = hir.properties();
        let looks = properties.look_set();
        if looks.contains(Look::Start) || looks.contains(Look::End) {
            let what =
                "expected an expression without \\A and \\z: memory has no beginning and no end";
            return Err(invalid(what.into()));
        }
        let longest = match properties.maximum_len() {
            Some(0) => return Err(nothing_at_all()),
            Some(longest) if longest > MATCH_BYTES_MAX => {
                let most = format!("expected matches of at most {MATCH_BYTES_MAX} bytes");
                return Err(invalid(format!(
                    "{most}, found an expression that can match {longest}"
                )));
            }
            Some(longest) => longest,
            None => OPEN_MATCH_BYTES,
        };
        let engine = meta::Builder::new()
            .configure(Regex::config().utf8_empty(false))
            .build_from_hir(&hir)
            .map_err(|error| invalid(format!("expected a smaller regular expression: {error}")))?;
        let engine = Engine::Regex(Box::new(engine));
        Self { engine, longest, looks_around: !looks.is_empty() }.checked()
    }

    /// Refuses what would be found nearly everywhere, and not where it is looked for.
    fn checked(self) -> Result<Self> {
        let zeros = vec![0; self.longest + 1];
        match self.find(&zeros, 0..zeros.len()) {
            Some(found) if found.is_empty() => Err(nothing_at_all()),
            Some(_) => Err(invalid(
                "expected a pattern that zeros alone do not match, found one that they do: pages that are all zero are not looked at".into(),
            )),
            None => Ok(self),
        }
    }

    /// The first match in `bytes[span]`; what is around that is looked at.
    fn find(&self, bytes: &[u8], span: Range<usize>) -> Option<Range<usize>> {
        match &self.engine {
            Engine::Bytes(finder) => {
                let at = span.start + finder.find(&bytes[span])?;
                Some(at..at + finder.needle().len())
            }
            Engine::Regex(regex) => {
                let found = regex.find(Input::new(bytes).span(span))?;
                Some(found.range())
            }
        }
    }
}

fn invalid(what: String) -> StoreError {
    StoreError::Invalid(format!("search: {what}"))
}

fn nothing_at_all() -> StoreError {
    invalid(
        "expected an expression with something to find, found one that matches nothing at all"
            .into(),
    )
}

/// Something that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Match<'a> {
    /// Byte of the region that it begins at.
    pub offset: u64,
    /// What matched.
    pub bytes: &'a [u8],
    /// What is before it, as much as was asked for and is in the region.
    pub before: &'a [u8],
    /// What is behind it.
    pub after: &'a [u8],
}

/// How far searching has come.
#[derive(Debug, Default)]
pub struct SearchProgress {
    /// Pages that are done, zero or not.
    pub pages_done: AtomicU64,
    /// Of them, pages that were read.
    pub pages_read: AtomicU64,
}

/// What a search came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SearchReport {
    /// Matches told.
    pub matches: u64,
    /// Pages that were read; the others are zero, or behind the last match that was wanted.
    pub pages_read: u64,
}

/// Searches the bytes `range` of `region` for `pattern` and tells what is found, in order, with `context`
/// bytes before and behind it (at most a page), until `tell` has had enough. Memory: some 10 MiB a core.
///
/// # Errors
/// [`StoreError::Corrupt`] if a page cannot be read.
pub fn search(
    region: &RegionReader,
    range: Range<u64>,
    pattern: &Pattern,
    context: usize,
    progress: &SearchProgress,
    tell: &mut dyn FnMut(Match<'_>) -> ControlFlow<()>,
) -> Result<SearchReport> {
    let end = range.end.min(region.pages() * PAGE_SIZE as u64);
    let bytes = range.start.min(end)..end;
    let first = bytes.start / PART_BYTES;
    let job = Job {
        region,
        pattern,
        context: context.min(PAGE_SIZE),
        bytes,
        next: AtomicU64::new(first),
        told: Mutex::new(first),
        one_told: Condvar::new(),
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
        let mut teller = Teller { job: &job, tell, end: 0, report: SearchReport::default() };
        let mut waiting = BTreeMap::new();
        let mut next = first;
        let mut outcome = Ok(ControlFlow::Continue(()));
        // Until the last thread is gone: even if this one has had enough.
        for (number, part) in receiver {
            waiting.insert(number, part);
            while let Some(part) = waiting.remove(&next) {
                if matches!(outcome, Ok(ControlFlow::Continue(()))) {
                    outcome = part.and_then(|part| {
                        part.map_or(Ok(ControlFlow::Continue(())), |part| teller.part(&part))
                    });
                }
                next += 1;
                job.tell(next);
                if !matches!(outcome, Ok(ControlFlow::Continue(()))) {
                    job.stop();
                }
            }
        }
        let _whether_all = outcome?;
        let pages_read = progress.pages_read.load(Ordering::Relaxed);
        Ok(SearchReport { pages_read, ..teller.report })
    })
}

const PART_BYTES: u64 = PART_PAGES * PAGE_SIZE as u64;

/// A search that all threads work at.
struct Job<'a> {
    region: &'a RegionReader,
    pattern: &'a Pattern,
    context: usize,
    /// What is searched.
    bytes: Range<u64>,
    next: AtomicU64,
    /// The part that is to be told next.
    told: Mutex<u64>,
    one_told: Condvar,
    over: AtomicBool,
    threads: u64,
    progress: &'a SearchProgress,
}

/// Lets the others stop if a thread panics: its part is never told.
struct Alarm<'a>(&'a Job<'a>);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop();
        }
    }
}

/// A part with matches, and its bytes.
struct Part {
    /// Byte of the region that `bytes` begins at.
    offset: u64,
    bytes: Vec<u8>,
    /// Where a match may begin.
    own: Range<usize>,
    /// What of `bytes` is searched.
    spans: Vec<Range<usize>>,
    matches: Vec<Range<usize>>,
}

/// A part's number, and what came of it: nothing if there is no match.
type Done = (u64, Result<Option<Part>>);

impl Job<'_> {
    fn work(&self, sender: &Sender<Done>) {
        let _alarm = Alarm(self);
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

    /// Waits until part `number` is not too far ahead of what was told.
    fn wait_for(&self, number: u64) {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let too_far = |told: &mut u64| {
            number > *told + AHEAD * self.threads && !self.over.load(Ordering::Relaxed)
        };
        drop(self.one_told.wait_while(told, too_far).unwrap_or_else(PoisonError::into_inner));
    }

    fn tell(&self, next: u64) {
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) = next;
        self.one_told.notify_all();
    }

    fn stop(&self) {
        // Under the lock, or who is about to wait would miss it.
        let _told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        self.over.store(true, Ordering::Relaxed);
        self.one_told.notify_all();
    }

    fn region_bytes(&self) -> u64 {
        self.region.pages() * PAGE_SIZE as u64
    }

    /// The bytes `wanted` of the region: those of `part`, or read again where it ends.
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

    /// Reads and searches part `number`. `buffer` is the thread's, and goes with the part if something
    /// was found.
    fn part(&self, number: u64, buffer: &mut Vec<u8>) -> Result<Option<Part>> {
        let (first, all) = (number * PART_PAGES, self.region.pages());
        let end = (first + PART_PAGES).min(all);
        // What a match reaches into, and what an expression looks at around it.
        let looks = usize::from(self.pattern.looks_around);
        let behind = (self.pattern.longest - 1 + looks).div_ceil(PAGE_SIZE) as u64;
        let before = first.min(looks as u64);
        let pages = first - before..(end + behind).min(all);
        let offset = pages.start * PAGE_SIZE as u64;
        let within = |byte: u64| (byte.max(offset) - offset) as usize;
        let own = within(self.bytes.start.max(first * PAGE_SIZE as u64))
            ..within(self.bytes.end.min(end * PAGE_SIZE as u64));
        let limit = within(self.bytes.end).min(((pages.end - pages.start) as usize) * PAGE_SIZE);
        let runs = self.region.runs(pages.start, pages.end - pages.start)?;
        let mut spans = Spans::new(own.start..limit, self.pattern.longest - 1);
        for run in &runs {
            let start = (run.first - pages.start) as usize * PAGE_SIZE;
            spans.add(start..start + run.count as usize * PAGE_SIZE);
        }
        // A match that begins here has something that is not zero near.
        let spans = spans.until(own.end);
        if spans.is_empty() {
            return Ok(None);
        }
        buffer.resize((pages.end - pages.start) as usize * PAGE_SIZE, 0);
        self.region.read_pages(pages.start, buffer)?;
        let read: u64 =
            runs.iter().filter_map(|run| run.clip(first, end)).map(|run| run.count).sum();
        self.progress.pages_read.fetch_add(read, Ordering::Relaxed);
        let matches = self.pattern.find_all(buffer, &spans, own.start, own.end);
        if matches.is_empty() {
            return Ok(None);
        }
        Ok(Some(Part { offset, bytes: std::mem::take(buffer), own, spans, matches }))
    }
}

impl Pattern {
    /// All matches that begin in `from .. end`, within `spans`.
    fn find_all(
        &self,
        bytes: &[u8],
        spans: &[Range<usize>],
        from: usize,
        end: usize,
    ) -> Vec<Range<usize>> {
        let mut found = Vec::new();
        let mut at = from;
        for span in spans {
            at = at.max(span.start);
            while at < span.end.min(end) {
                match self.find(bytes, at..span.end) {
                    Some(next) if next.start < end => {
                        at = next.end.max(next.start + 1);
                        found.push(next);
                    }
                    _ => break,
                }
            }
        }
        found
    }
}

/// What has contents, and what is so near to it that a match could reach into it.
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

    /// Those that begin before `end`.
    fn until(mut self, end: usize) -> Vec<Range<usize>> {
        self.found.retain(|span| span.start < end);
        self.found
    }
}

/// Tells matches in order.
struct Teller<'a, 'b> {
    job: &'a Job<'a>,
    tell: &'b mut dyn FnMut(Match<'_>) -> ControlFlow<()>,
    /// Byte of the region behind the last match.
    end: u64,
    report: SearchReport,
}

impl Teller<'_, '_> {
    fn part(&mut self, part: &Part) -> Result<ControlFlow<()>> {
        let first = part.offset + part.matches[0].start as u64;
        if first >= self.end {
            return self.all(part, &part.matches);
        }
        // One from the part before reaches beyond the first here: what follows is searched from its end.
        let from = (self.end - part.offset) as usize;
        let again = self.job.pattern.find_all(&part.bytes, &part.spans, from, part.own.end);
        self.all(part, &again)
    }

    fn all(&mut self, part: &Part, matches: &[Range<usize>]) -> Result<ControlFlow<()>> {
        for found in matches {
            let offset = part.offset + found.start as u64;
            self.end = part.offset + found.end as u64;
            let around = offset.saturating_sub(self.job.context as u64)
                ..(self.end + self.job.context as u64).min(self.job.region_bytes());
            let bytes = self.job.read(part, &around)?;
            let (before, rest) = bytes.split_at((offset - around.start) as usize);
            let (bytes, after) = rest.split_at(found.len());
            self.report.matches += 1;
            let flow = (self.tell)(Match { offset, bytes, before, after });
            if flow.is_break() {
                return Ok(flow);
            }
        }
        Ok(ControlFlow::Continue(()))
    }
}
