//! Reading everything that snapshots refer to, and telling what does not check.

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

/// How far verifying has come.
#[derive(Debug, Default)]
pub struct VerifyProgress {
    /// Frames to check.
    pub frames_total: AtomicU64,
    /// Frames checked.
    pub frames_done: AtomicU64,
    /// Bytes of those frames as stored.
    pub stored_bytes: AtomicU64,
}

/// Something that did not check.
#[derive(Debug)]
pub struct Damage {
    /// What, where, expected and found.
    pub error: StoreError,
    /// A snapshot it was found under, the newest if it is in several; none for damage to the
    /// journal.
    pub snapshot: Option<SnapshotId>,
}

/// What verifying found.
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
    /// Bytes of everything read, as stored.
    pub stored_bytes: u64,
    /// Bytes of the frames when decoded.
    pub page_bytes: u64,
    /// What did not check.
    pub damage: Vec<Damage>,
}

/// Reads and checks every block that `snapshots` can reach, each once.
///
/// # Errors
/// Damage is in the report; an error is only what keeps the walk from going on at all.
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
            // Somebody pruned meanwhile, and it was moved.
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
    // Past the caches, which may hold a good copy of what the medium has lost.
    store.nodes.clear();
    store.frames.clear();
    store.segments.close();
    let mut marker = Marker::as_stored(store);
    // The newest first: see there.
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
    // Frames are read below, each once.
    report.damage.extend(obstacles.into_iter().filter(|found| !found.is_frame).map(found));
    report.nodes = nodes.len() as u64;
    report.chunks = chunks.len() as u64;
    let owned = chunks.iter().chain(&fingerprints).map(|(block, _)| block);
    let read = nodes.iter().chain(&manifests).chain(owned);
    report.stored_bytes = read.map(|block| u64::from(block.len)).sum();
    // Nodes and manifests were read on the way.
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
            "{torn} bytes that are none: an append cut short by a crash, or damage to the newest snapshot's record"
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

/// A record of a file, and the frames that are in it.
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
    // In the order of the medium, and each record once, though several frames may share it.
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

/// Reads a record; returns the bytes of its pages, and what refers to slots that are not there.
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
