//! Reading everything that snapshots refer to, and telling what does not check.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use crate::error::{Result, StoreError};
use crate::format::RecordKind;
use crate::id::{BlockRef, SnapshotId};
use crate::node::{Location, root_level};
use crate::page::PAGE_SIZE;
use crate::store::{Store, check_frame_len};
use crate::tree::NodeSource;

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
    /// Snapshots it was found under; empty for damage to the store's own files. A frame names the
    /// first snapshot that refers to it.
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

struct FrameUse {
    frame: BlockRef,
    slots: u64,
    snapshot: SnapshotId,
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
    let mut walk =
        Walk { store, report: VerifyReport::default(), seen: HashSet::new(), frames: Vec::new() };
    let torn = store.torn_journal_bytes();
    if torn > 0 {
        let error = StoreError::Corrupt {
            file: crate::format::JOURNAL_FILE.into(),
            offset: store.catalog().cursor.end,
            what: "journal".into(),
            expected: "a whole record or the end".into(),
            found: format!(
                "{torn} bytes that are none: an append cut short by a crash, or damage to the newest snapshot's record"
            ),
        };
        walk.report.damage.push(Damage { error, snapshot: None });
    }
    for id in snapshots {
        walk.snapshot(*id);
    }
    let Walk { mut report, mut frames, .. } = walk;
    // In the order of the medium; slots that several nodes name are checked together.
    frames.sort_unstable_by_key(|usage| (usage.frame.segment, usage.frame.offset));
    frames.dedup_by(|later, first| {
        let same = later.frame == first.frame;
        if same {
            first.slots = first.slots.max(later.slots);
        }
        same
    });
    check_frames(store, &frames, progress, &mut report);
    Ok(report)
}

fn check_frames(
    store: &Store,
    frames: &[FrameUse],
    progress: &VerifyProgress,
    report: &mut VerifyReport,
) {
    progress.frames_total.store(frames.len() as u64, Ordering::Relaxed);
    let page_bytes = AtomicU64::new(0);
    let damage: Vec<Damage> = store.pool.install(|| {
        frames
            .par_iter()
            .filter_map(|usage| {
                let checked = check_frame(store, usage);
                progress.frames_done.fetch_add(1, Ordering::Relaxed);
                progress.stored_bytes.fetch_add(u64::from(usage.frame.len), Ordering::Relaxed);
                match checked {
                    Ok(bytes) => {
                        page_bytes.fetch_add(bytes, Ordering::Relaxed);
                        None
                    }
                    Err(error) => Some(Damage { error, snapshot: Some(usage.snapshot) }),
                }
            })
            .collect()
    });
    report.frames = frames.len() as u64;
    report.stored_bytes += frames.iter().map(|usage| u64::from(usage.frame.len)).sum::<u64>();
    report.page_bytes = page_bytes.into_inner();
    report.damage.extend(damage);
}

fn check_frame(store: &Store, usage: &FrameUse) -> Result<u64> {
    let pages = store.segments.read(&usage.frame, RecordKind::Frame, |record| {
        check_frame_len(record.raw_len())?;
        record.decode()
    })?;
    crate::snapshot::slot_bytes(&usage.frame, &pages, 0, usage.slots)?;
    debug_assert_eq!(pages.len() % PAGE_SIZE, 0);
    Ok(pages.len() as u64)
}

struct Walk<'a> {
    store: &'a Arc<Store>,
    report: VerifyReport,
    /// Blocks whose bytes and everything below were looked at.
    seen: HashSet<BlockRef>,
    frames: Vec<FrameUse>,
}

impl Walk<'_> {
    fn damaged(&mut self, error: StoreError, snapshot: SnapshotId) {
        self.report.damage.push(Damage { error, snapshot: Some(snapshot) });
    }

    fn snapshot(&mut self, id: SnapshotId) {
        self.report.snapshots += 1;
        let snapshot = match self.store.snapshot(id) {
            Ok(snapshot) => snapshot,
            Err(error) => return self.damaged(error, id),
        };
        for chunk in &snapshot.manifest().state {
            if self.seen.insert(chunk.body) {
                self.report.chunks += 1;
                self.report.stored_bytes += u64::from(chunk.body.len);
                if let Err(error) = snapshot.state(chunk) {
                    self.damaged(error, id);
                }
            }
        }
        for region in &snapshot.manifest().regions {
            if let Some(root) = &region.root {
                self.node(root, root_level(region.pages), 0, id);
            }
        }
    }

    fn node(&mut self, block: &BlockRef, level: u8, first: u64, id: SnapshotId) {
        if !self.seen.insert(*block) {
            return;
        }
        self.report.nodes += 1;
        self.report.stored_bytes += u64::from(block.len);
        // Past the cache, which may hold a good copy of what the medium has lost.
        self.store.nodes.remove(&block.hash);
        let node = match self.store.node(block, level, first) {
            Ok(node) => node,
            Err(error) => return self.damaged(error, id),
        };
        for run in &node.runs {
            if let Location::Frame { frame, slot } = run.location {
                let slots = u64::from(slot) + run.count;
                // Runs of one frame usually stand together.
                match self.frames.last_mut() {
                    Some(last) if last.frame == frame => last.slots = last.slots.max(slots),
                    _ => self.frames.push(FrameUse { frame, slots, snapshot: id }),
                }
            }
        }
        for (index, child) in &node.children {
            let (first, level) = node.child_place(*index);
            self.node(child, level, first, id);
        }
    }
}
