//! From pages to appended frames: all cores read, sift and compress; one thread appends.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender};

use crate::error::{Result, StoreError};
use crate::format::RecordKind;
use crate::node::{Location, Run};
use crate::page::{PAGE_SIZE, Page, PageSource, is_zero};
use crate::record::{EncodedRecord, RecordEncoder};
use crate::segment::SegmentWriter;

/// How far writing pages has come; shared with whoever draws a progress bar or cancels.
#[derive(Debug, Default)]
pub struct Progress {
    /// Pages to write, as far as is known.
    pub pages_total: AtomicU64,
    /// Pages read, compressed and appended.
    pub pages_done: AtomicU64,
    /// Bytes appended for them.
    pub stored_bytes: AtomicU64,
    cancelled: AtomicBool,
}

impl Progress {
    /// Makes the transaction that reports here fail at its next step.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(StoreError::Cancelled(
                "the checkpoint was cancelled; nothing was published".into(),
            ));
        }
        Ok(())
    }
}

/// What writing a batch of pages came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteStats {
    /// Pages read from the source.
    pub pages: u64,
    /// Pages found all zero, which take no frame.
    pub zero_pages: u64,
    /// Frames appended.
    pub frames: u64,
    /// Bytes of those frames as stored, headers included.
    pub stored_bytes: u64,
}

impl std::ops::AddAssign for WriteStats {
    fn add_assign(&mut self, other: Self) {
        self.pages += other.pages;
        self.zero_pages += other.zero_pages;
        self.frames += other.frames;
        self.stored_bytes += other.stored_bytes;
    }
}

/// What one write needs to know.
pub(crate) struct Job<'a> {
    pub region: &'a str,
    pub pages: &'a [u64],
    pub source: &'a dyn PageSource,
    pub frame_pages: usize,
    pub compression_level: i32,
    pub progress: &'a Progress,
}

/// A compressed frame on its way to the appender.
struct Frame {
    /// None if every page of the batch is zero.
    record: Option<EncodedRecord>,
    /// Page numbers in slot order.
    pages: Vec<u64>,
    zero_pages: Vec<u64>,
}

/// Writes the pages of `job`, and returns where they are as sorted runs.
pub(crate) fn write(
    pool: &rayon::ThreadPool,
    segments: &mut SegmentWriter,
    job: &Job<'_>,
) -> Result<(Vec<Run>, WriteStats)> {
    let batches = cut_batches(job.pages, job.frame_pages);
    let workers = pool.current_num_threads();
    // Enough frames in flight to ride out a slow write, few enough to bound memory.
    let (frames, appender) = crossbeam_channel::bounded(4 * workers);
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let appended = pool.in_place_scope(|scope| {
        for _ in 0..workers {
            let (frames, next, batches, failure) = (frames.clone(), &next, &batches, &failure);
            scope.spawn(move |_| {
                if let Err(error) = compress_batches(job, batches, next, &frames) {
                    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                }
            });
        }
        drop(frames);
        // By value: when appending fails, the workers must see the channel closed, or they wait in
        // it for ever.
        append_frames(segments, appender, job.progress)
    });
    if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    appended
}

/// Cuts ascending page numbers into batches of at most `frame_pages`. Batches end on multiples of
/// `frame_pages` where they are half full, so that dense memory gets aligned frames, and scattered
/// pages full ones.
fn cut_batches(pages: &[u64], frame_pages: usize) -> Vec<Range<usize>> {
    let mut batches = Vec::with_capacity(pages.len() / frame_pages + 1);
    let mut start = 0;
    for (index, page) in pages.iter().enumerate() {
        let len = index - start;
        let aligned = page.is_multiple_of(frame_pages as u64);
        if len == frame_pages || (aligned && len >= frame_pages.div_ceil(2)) {
            batches.push(start..index);
            start = index;
        }
    }
    if start < pages.len() {
        batches.push(start..pages.len());
    }
    batches
}

fn compress_batches(
    job: &Job<'_>,
    batches: &[Range<usize>],
    next: &AtomicUsize,
    frames: &Sender<Frame>,
) -> Result<()> {
    let mut encoder = RecordEncoder::new(job.compression_level)
        .map_err(|error| StoreError::io("start", "zstd", error))?;
    let mut raw = Vec::with_capacity(job.frame_pages * PAGE_SIZE);
    loop {
        job.progress.check()?;
        // One at a time and in order, so that the segment's order is nearly the region's.
        let Some(batch) = batches.get(next.fetch_add(1, Ordering::Relaxed)) else { return Ok(()) };
        let frame = compress(job, &job.pages[batch.clone()], &mut encoder, &mut raw)?;
        if frames.send(frame).is_err() {
            // The appender failed and has its own error to tell.
            return Ok(());
        }
    }
}

fn compress(
    job: &Job<'_>,
    pages: &[u64],
    encoder: &mut RecordEncoder,
    raw: &mut Vec<u8>,
) -> Result<Frame> {
    let mut frame =
        Frame { record: None, pages: Vec::with_capacity(pages.len()), zero_pages: Vec::new() };
    raw.clear();
    for &page in pages {
        let start = raw.len();
        raw.resize(start + PAGE_SIZE, 0);
        let slot: &mut Page = (&mut raw[start..]).try_into().expect("resized by a page");
        job.source.read_page(page, slot).map_err(|source| StoreError::Source {
            region: job.region.to_owned(),
            page,
            source,
        })?;
        if is_zero(slot) {
            raw.truncate(start);
            frame.zero_pages.push(page);
        } else {
            frame.pages.push(page);
        }
    }
    if !raw.is_empty() {
        frame.record = Some(encoder.encode(RecordKind::Frame, raw));
    }
    Ok(frame)
}

fn append_frames(
    segments: &mut SegmentWriter,
    frames: Receiver<Frame>,
    progress: &Progress,
) -> Result<(Vec<Run>, WriteStats)> {
    let mut runs = Vec::new();
    let mut stats = WriteStats::default();
    for Frame { record, pages, zero_pages } in frames {
        stats.pages += (pages.len() + zero_pages.len()) as u64;
        stats.zero_pages += zero_pages.len() as u64;
        progress.pages_done.fetch_add((pages.len() + zero_pages.len()) as u64, Ordering::Relaxed);
        for page in zero_pages {
            let zero = Run { first: page, count: 1, location: Location::Zero };
            crate::node::push_run(&mut runs, zero);
        }
        if let Some(record) = record {
            let frame = segments.append(&record)?;
            stats.frames += 1;
            stats.stored_bytes += record.bytes.len() as u64;
            progress.stored_bytes.fetch_add(record.bytes.len() as u64, Ordering::Relaxed);
            for (slot, page) in pages.into_iter().enumerate() {
                let slot = u8::try_from(slot).expect("a frame has at most 64 pages");
                crate::node::push_run(
                    &mut runs,
                    Run { first: page, count: 1, location: Location::Frame { frame, slot } },
                );
            }
        }
    }
    // Frames arrive in the order they were done; zero pages went in one by one.
    runs.sort_unstable_by_key(|run| run.first);
    let sorted = runs.len();
    let mut joined = Vec::with_capacity(sorted);
    runs.into_iter().for_each(|run| crate::node::push_run(&mut joined, run));
    Ok((joined, stats))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn batches_cover_every_page_once(pages in proptest::collection::btree_set(0_u64..2000, 0..500), frame_pages in 1_usize..64) {
            let pages: Vec<u64> = pages.into_iter().collect();
            let batches = cut_batches(&pages, frame_pages);
            let mut next = 0;
            for batch in &batches {
                prop_assert_eq!(batch.start, next);
                prop_assert!(!batch.is_empty() && batch.len() <= frame_pages);
                next = batch.end;
            }
            prop_assert_eq!(next, pages.len());
        }
    }

    #[test]
    fn dense_pages_get_aligned_frames() {
        let pages: Vec<u64> = (3..100).collect();
        let batches = cut_batches(&pages, 16);
        assert!(
            batches[1..].iter().all(|batch| pages[batch.start].is_multiple_of(16)),
            "{batches:?}"
        );
    }
}
