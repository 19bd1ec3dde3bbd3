//! From pages to appended frames: all cores read, sift, compress and append.
//!
//! Each core takes the next batch, and appends a finished frame under a lock, which costs a copy
//! and now and then a write of what was gathered. Nothing is in flight between threads: memory is
//! bounded by a frame or two per core, and 16 bytes for each run of changed pages.

use std::iter::Peekable;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::changes::{Changes, ChangesBuilder};
use crate::delta::{self, Base};
use crate::elide::{Fingerprint, FrameFingerprints};
use crate::error::{Result, StoreError};
use crate::format::RecordKind;
use crate::node::{Location, Run};
use crate::page::{PAGE_SIZE, PageSource};
use crate::page_set::PageSet;
use crate::progress::{Progress, WriteStats};
use crate::record::RecordEncoder;
use crate::segment::SegmentWriter;
use crate::sift::{Sifter, Verdict};
use crate::store::Store;
use crate::tree::Tree;

/// The input of one write.
pub(crate) struct Job<'a> {
    pub store: &'a Store,
    pub region: &'a str,
    pub pages: &'a PageSet,
    pub source: &'a dyn PageSource,
    /// The region's tree in the parent.
    pub parent: Tree,
    pub progress: &'a Progress,
}

/// The result of one write.
#[derive(Default)]
pub(crate) struct Written {
    /// Where the changed pages are now.
    pub changes: Changes,
    /// Pages found equal to the parent's, and where the parent has them.
    pub equal: Changes,
    pub stats: WriteStats,
    /// Fingerprints of the pages in new frames, if there are any.
    pub fingerprints: Vec<FrameFingerprints>,
}

/// Pages gathered for one frame.
#[derive(Default)]
struct Gathered {
    /// The contents of the pages, possibly followed by leftovers of an earlier frame.
    raw: Vec<u8>,
    pages: Vec<u64>,
    fingerprints: Vec<Fingerprint>,
    bases: Vec<Base>,
}

impl Gathered {
    fn push(&mut self, page: u64, raw: &[u8]) {
        self.raw.truncate(self.pages.len() * PAGE_SIZE);
        self.raw.extend_from_slice(raw);
        self.pages.push(page);
    }

    fn raw(&self) -> &[u8] {
        &self.raw[..self.pages.len() * PAGE_SIZE]
    }

    fn clear(&mut self) {
        // Keep the bytes of `raw`: zeroing them before the next read would be a waste.
        let Self { raw: _, pages, fingerprints, bases } = self;
        pages.clear();
        fingerprints.clear();
        bases.clear();
    }
}

/// Writes the pages of `job`; returns where they are now.
pub(crate) fn write(segments: &mut SegmentWriter, job: &Job<'_>) -> Result<Written> {
    let frame_pages = job.store.options.frame_pages;
    let shared = Shared {
        job,
        batches: Mutex::new(Batches { pages: job.pages.iter().peekable(), frame_pages }),
        output: Mutex::new(Output::new(segments)),
        failed: AtomicBool::new(false),
    };
    let worked = job.store.pool.broadcast(|_| {
        let worked = Worker::new(&shared).and_then(|mut worker| worker.run());
        shared.failed.fetch_or(worked.is_err(), Ordering::Relaxed);
        worked
    });
    worked.into_iter().collect::<Result<()>>()?;
    Ok(shared.output.into_inner().unwrap_or_else(PoisonError::into_inner).finish())
}

/// The state shared by the workers of one write.
struct Shared<'a, I: Iterator<Item = u64>> {
    job: &'a Job<'a>,
    batches: Mutex<Batches<I>>,
    output: Mutex<Output<'a>>,
    /// True once a worker failed: the others need not go on.
    failed: AtomicBool,
}

/// Where frames are appended, and the results so far.
struct Output<'a> {
    segments: &'a mut SegmentWriter,
    changes: ChangesBuilder,
    equal: ChangesBuilder,
    stats: WriteStats,
    fingerprints: Vec<FrameFingerprints>,
}

impl<'a> Output<'a> {
    fn new(segments: &'a mut SegmentWriter) -> Self {
        let (changes, equal, stats, fingerprints) = Default::default();
        Self { segments, changes, equal, stats, fingerprints }
    }

    fn finish(self) -> Written {
        Written {
            changes: self.changes.finish(),
            equal: self.equal.finish(),
            stats: self.stats,
            fingerprints: self.fingerprints,
        }
    }
}

/// Cuts ascending page numbers into batches of at most `frame_pages`. A batch that is at least half
/// full ends before a multiple of `frame_pages`, so that dense memory gets aligned frames, and
/// scattered pages get full ones.
struct Batches<I: Iterator<Item = u64>> {
    pages: Peekable<I>,
    frame_pages: usize,
}

impl<I: Iterator<Item = u64>> Batches<I> {
    /// Replaces `batch` by the next one; it is empty at the end.
    fn next(&mut self, batch: &mut Vec<u64>) {
        batch.clear();
        while let Some(page) = self.pages.peek() {
            let len = batch.len();
            let aligned = page.is_multiple_of(self.frame_pages as u64);
            if len == self.frame_pages || (aligned && len >= self.frame_pages.div_ceil(2)) {
                return;
            }
            batch.push(*page);
            self.pages.next();
        }
    }
}

struct Worker<'w, 'a, I: Iterator<Item = u64>> {
    shared: &'w Shared<'a, I>,
    encoder: RecordEncoder,
    sifter: Sifter<'a>,
    /// The contents of the current batch, and the verdicts on its pages.
    raw: Vec<u8>,
    verdicts: Vec<Verdict>,
    plain: Gathered,
    delta: Gathered,
}

impl<'w, 'a, I: Iterator<Item = u64>> Worker<'w, 'a, I> {
    fn new(shared: &'w Shared<'a, I>) -> Result<Self> {
        let job = shared.job;
        let encoder = RecordEncoder::new(job.store.options.compression_level)?;
        let sifter = Sifter::new(job.store, job.parent);
        let (raw, verdicts, plain, delta) = Default::default();
        Ok(Self { shared, encoder, sifter, raw, verdicts, plain, delta })
    }

    fn run(&mut self) -> Result<()> {
        let mut batch = Vec::new();
        // The worker that failed returns the error.
        while !self.shared.failed.load(Ordering::Relaxed) {
            self.shared.job.progress.check()?;
            // Batches are handed out one at a time and in order, so that the segment's order is
            // nearly the region's.
            lock(&self.shared.batches).next(&mut batch);
            if batch.is_empty() {
                self.append(RecordKind::Frame)?;
                return self.append(RecordKind::Delta);
            }
            self.sift(&batch)?;
        }
        Ok(())
    }

    /// Reads and sifts a batch, and appends what must be written.
    fn sift(&mut self, batch: &[u64]) -> Result<()> {
        self.read(batch)?;
        let mut verdicts = std::mem::take(&mut self.verdicts);
        self.sifter.judge(batch, &self.raw, &mut verdicts);
        let all_new = verdicts.iter().all(|verdict| matches!(verdict, Verdict::New(_)));
        if all_new && self.plain.pages.is_empty() {
            // By far the most frequent case: the batch as read is the frame.
            std::mem::swap(&mut self.plain.raw, &mut self.raw);
            self.plain.pages.extend_from_slice(batch);
            self.plain.fingerprints.extend(verdicts.drain(..).filter_map(Verdict::fingerprint));
        } else {
            self.gather(batch, &mut verdicts)?;
        }
        self.verdicts = verdicts;
        // Less than half a frame waits for pages of the next batch.
        if self.plain.pages.len() >= self.shared.job.store.options.frame_pages.div_ceil(2) {
            self.append(RecordKind::Frame)?;
        }
        Ok(())
    }

    /// Distributes the pages of a batch by their verdicts.
    fn gather(&mut self, batch: &[u64], verdicts: &mut Vec<Verdict>) -> Result<()> {
        let frame_pages = self.shared.job.store.options.frame_pages;
        let (mut found, mut stats) = (Vec::new(), WriteStats::default());
        for (index, (page, verdict)) in batch.iter().zip(verdicts.drain(..)).enumerate() {
            let raw = &self.raw[index * PAGE_SIZE..][..PAGE_SIZE];
            let mut keep = |location, equal| {
                found.push((Run { first: *page, count: 1, location }, equal));
            };
            match verdict {
                Verdict::Zero { equal } => {
                    stats.zero_pages += 1;
                    keep(Location::Zero, equal);
                }
                Verdict::Equal(location) => {
                    stats.equal_pages += 1;
                    keep(location, true);
                }
                Verdict::Known(location) => {
                    stats.dedup_pages += 1;
                    keep(location, false);
                }
                Verdict::Near(base, contents) => {
                    self.delta.push(*page, raw);
                    let at = self.delta.raw.len() - PAGE_SIZE;
                    delta::xor(&mut self.delta.raw[at..], contents.as_slice());
                    self.delta.bases.push(base);
                }
                Verdict::New(fingerprint) => {
                    self.plain.push(*page, raw);
                    self.plain.fingerprints.extend(fingerprint);
                }
            }
            if self.plain.pages.len() == frame_pages {
                self.append(RecordKind::Frame)?;
            }
            if self.delta.pages.len() == frame_pages {
                self.append(RecordKind::Delta)?;
            }
        }
        self.note(&found, stats);
        Ok(())
    }

    /// Records pages that need no frame, with `true` for those equal to the parent's.
    fn note(&self, found: &[(Run, bool)], stats: WriteStats) {
        if found.is_empty() {
            return;
        }
        let mut output = lock(&self.shared.output);
        let before = output.stats;
        output.stats += stats;
        output.stats.pages += found.len() as u64;
        for (run, same) in found {
            if *same { output.equal.push(run) } else { output.changes.push(run) }
        }
        self.shared.job.progress.advance(&before, &output.stats);
    }

    /// Reads the pages of a batch.
    fn read(&mut self, batch: &[u64]) -> Result<()> {
        self.raw.resize(batch.len() * PAGE_SIZE, 0);
        let (slots, _) = self.raw.as_chunks_mut();
        for (page, slot) in batch.iter().zip(slots) {
            self.shared.job.source.read_page(*page, slot).map_err(|source| StoreError::Source {
                region: self.shared.job.region.to_owned(),
                page: *page,
                source,
            })?;
        }
        Ok(())
    }

    /// Appends a frame or delta frame of the pages gathered for it, if there are any.
    fn append(&mut self, kind: RecordKind) -> Result<()> {
        let delta = kind == RecordKind::Delta;
        let gathered = if delta { &mut self.delta } else { &mut self.plain };
        if gathered.pages.is_empty() {
            return Ok(());
        }
        let record = if delta {
            self.encoder.encode_here(kind, &delta::encode(&gathered.bases, gathered.raw()))
        } else {
            self.encoder.encode_here(kind, gathered.raw())
        };
        let mut output = lock(&self.shared.output);
        let frame = output.segments.append(record)?;
        let before = output.stats;
        output.stats.count_frame(frame.len, gathered.pages.len(), delta);
        self.shared.job.progress.advance(&before, &output.stats);
        for (slot, page) in gathered.pages.iter().enumerate() {
            let slot = u8::try_from(slot).expect("a frame has at most 64 pages");
            let location = if delta {
                Location::Delta { frame, slot }
            } else {
                Location::Frame { frame, slot }
            };
            output.changes.push(&Run { first: *page, count: 1, location });
        }
        let fingerprints = std::mem::take(&mut gathered.fingerprints);
        if !fingerprints.is_empty() {
            self.shared.job.store.fingerprints.insert(frame, &fingerprints);
            output.fingerprints.push((frame, fingerprints));
        }
        drop(output);
        gathered.clear();
        Ok(())
    }
}

/// Locks a mutex even if it is poisoned: for data that is consistent after every step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cut(pages: &[u64], frame_pages: usize) -> Vec<Vec<u64>> {
        let mut batches = Batches { pages: pages.iter().copied().peekable(), frame_pages };
        let mut out = Vec::new();
        loop {
            let mut batch = Vec::new();
            batches.next(&mut batch);
            if batch.is_empty() {
                return out;
            }
            out.push(batch);
        }
    }

    proptest! {
        #[test]
        fn batches_cover_every_page_once(pages in proptest::collection::btree_set(0_u64..2000, 0..500), frame_pages in 1_usize..64) {
            let pages: Vec<u64> = pages.into_iter().collect();
            let batches = cut(&pages, frame_pages);
            prop_assert!(batches.iter().all(|batch| batch.len() <= frame_pages));
            prop_assert_eq!(batches.concat(), pages);
        }
    }

    #[test]
    fn dense_pages_get_aligned_frames() {
        let pages: Vec<u64> = (3..100).collect();
        let batches = cut(&pages, 16);
        assert!(batches[1..].iter().all(|batch| batch[0].is_multiple_of(16)), "{batches:?}");
    }
}
