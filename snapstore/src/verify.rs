//! Verifying: reads everything that snapshots refer to, and reports damage.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use crate::codec::Malformed;
use crate::elide::decode_fingerprints;
use crate::error::{Result, StoreError};
use crate::format::RecordKind;
use crate::frame::{Frame, FrameView, kind_of};
use crate::id::{BlockRef, SnapshotId};
use crate::mark::{FrameUse, Marked, Marker, Obstacle};
use crate::pack::slots_of;
use crate::segment::Physical;
use crate::store::Store;

/// How far verification has come.
#[derive(Debug, Default)]
pub struct VerifyProgress {
    /// Frames to check.
    pub frames_total: AtomicU64,
    /// Frames checked.
    pub frames_done: AtomicU64,
    /// Stored bytes of the frames checked.
    pub stored_bytes: AtomicU64,
}

/// Something that failed its check.
#[derive(Debug)]
pub struct Damage {
    /// What is damaged, where, and what was expected and found.
    pub error: StoreError,
    /// The newest snapshot that reaches it; none for damage to the journal.
    pub snapshot: Option<SnapshotId>,
}

/// The result of verification.
#[derive(Debug, Default)]
pub struct VerifyReport {
    /// Snapshots checked.
    pub snapshots: u64,
    /// Distinct tree nodes read.
    pub nodes: u64,
    /// Distinct frames read and decoded.
    pub frames: u64,
    /// Distinct state chunks read.
    pub chunks: u64,
    /// Stored bytes of everything read.
    pub stored_bytes: u64,
    /// Decoded bytes of the frames.
    pub page_bytes: u64,
    /// What failed its check.
    pub damage: Vec<Damage>,
}

/// Reads and checks every block that `snapshots`, oldest first, can reach, each once.
///
/// # Errors
/// As [`Store::refresh`]. Damage is not an error, but is in the report.
pub fn verify(
    store: &Arc<Store>,
    snapshots: &[SnapshotId],
    progress: &VerifyProgress,
) -> Result<VerifyReport> {
    let before = store.segments.layout();
    let report = verify_once(store, snapshots, progress);
    let missing = |damage: &Damage| {
        matches!(damage.error, StoreError::Missing { .. } | StoreError::UnknownRef { .. })
    };
    if report.damage.iter().any(missing) {
        store.refresh()?;
        if *before != *store.segments.layout() {
            // Somebody pruned meanwhile, and the missing blocks were moved.
            return Ok(verify_once(store, snapshots, progress));
        }
    }
    Ok(report)
}

fn verify_once(
    store: &Arc<Store>,
    snapshots: &[SnapshotId],
    progress: &VerifyProgress,
) -> VerifyReport {
    let mut report = VerifyReport { snapshots: snapshots.len() as u64, ..VerifyReport::default() };
    report.damage.extend(torn_journal(store));
    // Bypass the caches, which may hold good copies of what the medium has lost.
    store.nodes.clear();
    store.frames.clear();
    store.segments.close_all();
    let mut marker = Marker::as_stored(store);
    // Newest first: damage is attributed to the first snapshot visited.
    for id in snapshots.iter().rev() {
        match store.published(*id) {
            Ok(info) => marker.snapshot(&info),
            Err(error) => report.damage.push(Damage { error, snapshot: Some(*id) }),
        }
    }
    let Marked { snapshots, frames, nodes, chunks, manifests, fingerprints, obstacles } =
        marker.finish();
    let found =
        |obstacle: Obstacle| Damage { error: obstacle.error, snapshot: Some(obstacle.snapshot) };
    // Delta frames are checked below, with all frames.
    report.damage.extend(obstacles.into_iter().filter(|found| !found.is_frame).map(found));
    report.nodes = nodes.len() as u64;
    report.chunks = chunks.len() as u64;
    let owned = chunks.iter().chain(&fingerprints).map(|(block, _)| block);
    let read = nodes.iter().chain(&manifests).chain(owned);
    report.stored_bytes = read.map(|block| u64::from(block.len)).sum();
    // The marker has read nodes and manifests; the rest is read here.
    let damage = |parsed: Result<()>, index: u32| {
        let snapshot = snapshots.get(index as usize).copied();
        parsed.err().map(|error| Damage { error, snapshot })
    };
    for (block, index) in &chunks {
        report.damage.extend(damage(read_chunk(store, block), *index));
    }
    for (block, index) in &fingerprints {
        let parsed = store.segments.read(block, RecordKind::Fingerprints, |record| {
            decode_fingerprints(&record.decode()?).map(drop)
        });
        report.damage.extend(damage(parsed, *index));
    }
    check_frames(store, &frames, &snapshots, progress, &mut report);
    report
}

fn torn_journal(store: &Store) -> Option<Damage> {
    let torn = store.torn_journal_bytes();
    let error = StoreError::Corrupt {
        file: crate::format::JOURNAL_FILE.into(),
        offset: store.catalog().cursor.end,
        what: "journal".into(),
        expected: "a whole record or the end".into(),
        found: format!(
            "{torn} bytes that are neither: an append cut short by a crash, or damage to the newest snapshot's record"
        ),
    };
    (torn > 0).then_some(Damage { error, snapshot: None })
}

fn read_chunk(store: &Store, block: &BlockRef) -> Result<()> {
    store.segments.read(block, RecordKind::Blob, |record| {
        serde_json::from_slice::<serde_json::Value>(&record.decode()?)
            .map(drop)
            .map_err(|error| Malformed::new("state chunk", "JSON", error))
    })
}

/// A record, and the frames that are in it.
struct Batch<'a> {
    place: Physical,
    uses: &'a [(Physical, FrameUse)],
}

fn check_frames(
    store: &Arc<Store>,
    frames: &[FrameUse],
    snapshots: &[SnapshotId],
    progress: &VerifyProgress,
    report: &mut VerifyReport,
) {
    report.frames = frames.len() as u64;
    progress.frames_total.store(report.frames, Ordering::Relaxed);
    let damage = |error, usage: &FrameUse| Damage {
        error,
        snapshot: snapshots.get(usage.snapshot as usize).copied(),
    };
    let mut placed = Vec::with_capacity(frames.len());
    for usage in frames {
        match store.segments.resolve(&usage.frame) {
            Ok(place) => placed.push((place, *usage)),
            Err(error) => report.damage.push(damage(error, usage)),
        }
    }
    // Read records in the order of the medium, each once, though several frames may share one.
    placed.sort_by_key(|(place, _)| (place.file, place.position));
    let same = |a: &(Physical, FrameUse), b: &(Physical, FrameUse)| {
        (a.0.file, a.0.position, a.0.hash) == (b.0.file, b.0.position, b.0.hash)
    };
    let batches: Vec<Batch<'_>> =
        placed.chunk_by(same).map(|uses| Batch { place: uses[0].0, uses }).collect();
    let page_bytes = AtomicU64::new(0);
    let stored_bytes = AtomicU64::new(0);
    let found: Vec<Damage> = store.pool.install(|| {
        batches
            .par_iter()
            .flat_map_iter(|batch| {
                let checked = check_batch(store, batch);
                progress.frames_done.fetch_add(batch.uses.len() as u64, Ordering::Relaxed);
                progress.stored_bytes.fetch_add(u64::from(batch.place.len), Ordering::Relaxed);
                stored_bytes.fetch_add(u64::from(batch.place.len), Ordering::Relaxed);
                page_bytes
                    .fetch_add(checked.as_ref().map_or(0, |(bytes, _)| *bytes), Ordering::Relaxed);
                match checked {
                    Ok((_, wrong)) => wrong,
                    Err(error) => vec![(error, batch.uses[0].1)],
                }
            })
            .map(|(error, usage)| damage(error, &usage))
            .collect()
    });
    report.stored_bytes += stored_bytes.into_inner();
    report.page_bytes = page_bytes.into_inner();
    report.damage.extend(found);
}

/// Reads a record; returns the bytes of its pages, and errors for uses of slots it does not have.
fn check_batch(store: &Store, batch: &Batch<'_>) -> Result<(u64, Vec<(StoreError, FrameUse)>)> {
    let delta = batch.uses[0].1.delta;
    let frame = store
        .segments
        .read_at(&batch.place, kind_of(delta), |record| Frame::decode(record, delta))?;
    let frame = Arc::new(frame);
    let bytes = frame.pages.len() as u64;
    let mut wrong = Vec::new();
    for (place, usage) in batch.uses {
        let view = FrameView::new(usage.frame, *place, Arc::clone(&frame));
        let bad = slots_of(usage.slots).find_map(|slot| view.bytes(slot, 1).err());
        wrong.extend(bad.map(|error| (error, *usage)));
    }
    Ok((bytes, wrong))
}
