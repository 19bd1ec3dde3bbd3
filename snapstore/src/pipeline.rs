//! From pages to appended frames: all cores read, sift and compress; one thread appends.
//!
//! Memory is bounded by what is in flight, and by 16 bytes for each run of changed pages.

use std::iter::Peekable;
use std::sync::{Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender};

use crate::changes::{Changes, ChangesBuilder};
use crate::delta::{self, Base};
use crate::elide::{Fingerprint, FrameFingerprints};
use crate::error::{Result, StoreError};
use crate::format::RecordKind;
use crate::id::BlockRef;
use crate::node::{Location, Run};
use crate::page::{PAGE_SIZE, PageSet, PageSource};
use crate::progress::{Progress, WriteStats};
use crate::record::{EncodedRecord, RecordEncoder};
use crate::segment::SegmentWriter;
use crate::sift::{Sifter, Verdict};
use crate::store::Store;
use crate::tree::Tree;

/// What one write needs to know.
pub(crate) struct Job<'a> {
    pub store: &'a Store,
    pub region: &'a str,
    pub pages: &'a PageSet,
    pub source: &'a dyn PageSource,
    /// The region as the parent has it.
    pub parent: Tree,
    pub progress: &'a Progress,
}

/// What one write came to.
#[derive(Default)]
pub(crate) struct Written {
    /// Where the pages are now.
    pub changes: Changes,
    /// Pages that are what they are in the parent, and where that is.
    pub equal: Changes,
    pub stats: WriteStats,
    /// Of the pages in new frames, if they are kept.
    pub fingerprints: Vec<FrameFingerprints>,
}

/// Pages gathered for one frame.
#[derive(Default)]
struct Gathered {
    raw: Vec<u8>,
    pages: Vec<u64>,
    fingerprints: Vec<Fingerprint>,
    bases: Vec<Base>,
}

/// A compressed frame, or a delta frame, on its way to the appender.
struct Frame {
    record: EncodedRecord,
    delta: bool,
    /// Page numbers in slot order.
    pages: Vec<u64>,
    fingerprints: Vec<Fingerprint>,
}

/// What a worker has to tell.
enum Output {
    Frame(Frame),
    /// Pages that need no frame, `true` for those equal to the parent's; and how many of them
    /// were what.
    Found(Vec<(Run, bool)>, WriteStats),
}

/// Compressed frames a worker may be ahead of the appender.
const FRAMES_IN_FLIGHT: usize = 64;

/// Writes the pages of `job`, and returns where they are.
pub(crate) fn write(segments: &mut SegmentWriter, job: &Job<'_>) -> Result<Written> {
    let pool = &job.store.pool;
    let frame_pages = job.store.options.frame_pages;
    let batches = Mutex::new(Batches { pages: job.pages.iter().peekable(), frame_pages });
    let workers = pool.current_num_threads();
    // Enough frames in flight to ride out a slow write, few enough to bound memory.
    let (outputs, appender) = crossbeam_channel::bounded(FRAMES_IN_FLIGHT * workers);
    // Their memory comes back: new pages from the system cost more than filling them.
    let (used, spare) = crossbeam_channel::bounded(FRAMES_IN_FLIGHT * workers);
    let failure = Mutex::new(None);
    let appended = pool.in_place_scope(|scope| {
        for _ in 0..workers {
            let (outputs, spare) = (outputs.clone(), spare.clone());
            let (batches, failure) = (&batches, &failure);
            scope.spawn(move |_| {
                let worked =
                    Worker::new(job, outputs, spare).and_then(|mut worker| worker.run(batches));
                if let Err(error) = worked {
                    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                }
            });
        }
        drop(outputs);
        // By value: when appending fails, the workers must see the channel closed, or they wait in
        // it for ever.
        append(segments, appender, &used, job)
    });
    if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    appended
}

/// Cuts ascending page numbers into batches of at most `frame_pages`. Batches end on multiples of
/// `frame_pages` where they are half full, so that dense memory gets aligned frames, and scattered
/// pages full ones.
struct Batches<I: Iterator<Item = u64>> {
    pages: Peekable<I>,
    frame_pages: usize,
}

impl<I: Iterator<Item = u64>> Batches<I> {
    /// Fills `batch` with the next one; empty at the end.
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

struct Worker<'a> {
    job: &'a Job<'a>,
    outputs: Sender<Output>,
    spare: Receiver<Vec<u8>>,
    encoder: RecordEncoder,
    sifter: Sifter<'a>,
    plain: Gathered,
    delta: Gathered,
}

impl<'a> Worker<'a> {
    fn new(job: &'a Job<'a>, outputs: Sender<Output>, spare: Receiver<Vec<u8>>) -> Result<Self> {
        let encoder = RecordEncoder::new(job.store.options.compression_level)?;
        let sifter = Sifter::new(job.store, job.parent);
        let (plain, delta) = Default::default();
        Ok(Self { job, outputs, spare, encoder, sifter, plain, delta })
    }

    fn run<I: Iterator<Item = u64>>(&mut self, batches: &Mutex<Batches<I>>) -> Result<()> {
        let mut batch = Vec::new();
        loop {
            self.job.progress.check()?;
            // One at a time and in order, so that the segment's order is nearly the region's.
            batches.lock().unwrap_or_else(PoisonError::into_inner).next(&mut batch);
            if batch.is_empty() {
                break;
            }
            // A closed channel: the appender failed and has its own error to tell.
            if !self.sift(&batch)? {
                return Ok(());
            }
        }
        if self.emit_plain() {
            self.emit_delta();
        }
        Ok(())
    }

    /// Reads a batch, and compresses what must be written. False if nobody listens any more.
    fn sift(&mut self, batch: &[u64]) -> Result<bool> {
        let frame_pages = self.job.store.options.frame_pages;
        let (mut found, mut stats) = (Vec::new(), WriteStats::default());
        self.sifter.start_batch();
        for &page in batch {
            let start = self.plain.raw.len();
            self.read(page)?;
            let verdict = self.sifter.judge(page, &self.plain.raw[start..]);
            let mut keep = |location, equal| {
                found.push((Run { first: page, count: 1, location }, equal));
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
                    let (plain, delta) = (&self.plain.raw[start..], &mut self.delta);
                    delta.raw.extend_from_slice(plain);
                    let at = delta.raw.len() - PAGE_SIZE;
                    delta::xor(&mut delta.raw[at..], contents.as_slice());
                    delta.pages.push(page);
                    delta.bases.push(base);
                }
                Verdict::New(fingerprint) => {
                    self.plain.pages.push(page);
                    self.plain.fingerprints.extend(fingerprint);
                }
            }
            self.plain.raw.truncate(self.plain.pages.len() * PAGE_SIZE);
            let full = (self.plain.pages.len() == frame_pages && !self.emit_plain())
                || (self.delta.pages.len() == frame_pages && !self.emit_delta());
            if full {
                return Ok(false);
            }
        }
        self.sifter.end_batch();
        // What is left of a thinned batch goes with the next.
        if self.plain.pages.len() >= frame_pages.div_ceil(2) && !self.emit_plain() {
            return Ok(false);
        }
        Ok(found.is_empty() || self.outputs.send(Output::Found(found, stats)).is_ok())
    }

    fn read(&mut self, page: u64) -> Result<()> {
        let raw = &mut self.plain.raw;
        let start = raw.len();
        raw.resize(start + PAGE_SIZE, 0);
        let slot = (&mut raw[start..]).try_into().expect("resized by a page");
        self.job.source.read_page(page, slot).map_err(|source| StoreError::Source {
            region: self.job.region.to_owned(),
            page,
            source,
        })
    }

    fn emit_plain(&mut self) -> bool {
        let Gathered { raw, pages, fingerprints, .. } = &mut self.plain;
        if pages.is_empty() {
            return true;
        }
        let spare = self.spare.try_recv().unwrap_or_default();
        let record = self.encoder.encode_into(RecordKind::Frame, raw, spare);
        raw.clear();
        let (pages, fingerprints) = (std::mem::take(pages), std::mem::take(fingerprints));
        let frame = Frame { record, delta: false, pages, fingerprints };
        self.outputs.send(Output::Frame(frame)).is_ok()
    }

    fn emit_delta(&mut self) -> bool {
        let Gathered { raw, pages, bases, .. } = &mut self.delta;
        if pages.is_empty() {
            return true;
        }
        let record = self.encoder.encode(RecordKind::Delta, &delta::encode(bases, raw));
        raw.clear();
        bases.clear();
        let pages = std::mem::take(pages);
        let frame = Frame { record, delta: true, pages, fingerprints: Vec::new() };
        self.outputs.send(Output::Frame(frame)).is_ok()
    }
}

fn append(
    segments: &mut SegmentWriter,
    outputs: Receiver<Output>,
    used: &Sender<Vec<u8>>,
    job: &Job<'_>,
) -> Result<Written> {
    let (mut changes, mut equal) = (ChangesBuilder::default(), ChangesBuilder::default());
    let mut written = Written::default();
    for output in outputs {
        let before = written.stats;
        match output {
            Output::Found(runs, stats) => {
                written.stats += stats;
                written.stats.pages += runs.len() as u64;
                for (run, same) in runs {
                    if same { equal.push(&run) } else { changes.push(&run) }
                }
            }
            Output::Frame(frame) => {
                let block = segments.append(&frame.record)?;
                written.stats.count_frame(block.len, frame.pages.len(), frame.delta);
                push_pages(&mut changes, block, &frame);
                if !frame.fingerprints.is_empty() {
                    job.store.fingerprints.insert(block, &frame.fingerprints);
                    written.fingerprints.push((block, frame.fingerprints));
                }
                // Nobody needs it if there are enough.
                let _freed = used.try_send(frame.record.bytes);
            }
        }
        job.progress.advance(&before, &written.stats);
    }
    written.changes = changes.finish();
    written.equal = equal.finish();
    Ok(written)
}

fn push_pages(changes: &mut ChangesBuilder, frame: BlockRef, from: &Frame) {
    for (slot, page) in from.pages.iter().enumerate() {
        let slot = u8::try_from(slot).expect("a frame has at most 64 pages");
        let location = if from.delta {
            Location::Delta { frame, slot }
        } else {
            Location::Frame { frame, slot }
        };
        changes.push(&Run { first: *page, count: 1, location });
    }
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
