//! Pruning: removes files that no snapshot reaches, and rewrites those that are largely unused.
//!
//! [`Store::prune`] lists the phases. Each step that removes or rewrites files is a commit of its
//! own: a pack is durable before the journal names it, and what it replaces is removed afterwards.
//! So pruning can be interrupted anywhere and run again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::catalog::{Catalog, SnapshotInfo};
use crate::error::{Result, StoreError};
use crate::format::{
    FILE_HEADER_LEN, FORMAT_VERSION, FileHeader, FileKind, JOURNAL_FILE, JOURNAL_NEW_FILE,
    MAX_SEGMENT_LEN, RecordKind, SEGMENT_FOLDER,
};
use crate::id::{BlockRef, SnapshotId};
use crate::journal::Cursor;
use crate::journal_entry::{Entry, MAX_LISTED};
use crate::layout::Relayout;
use crate::mark::{Marked, Marker};
use crate::repack;
use crate::store::{Store, unix_ms};

/// How far pruning goes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PruneOptions {
    /// Unused bytes that may remain, as a share of the bytes in use.
    pub max_unused: f64,
    /// The most bytes to write to packs; with 0, only files without anything in use are removed.
    pub max_rewrite_bytes: u64,
    /// Change nothing, only report what would be done.
    pub dry_run: bool,
}

impl Default for PruneOptions {
    fn default() -> Self {
        Self { max_unused: 0.05, max_rewrite_bytes: u64::MAX, dry_run: false }
    }
}

/// How far pruning has come.
#[derive(Debug, Default)]
pub struct PruneProgress {
    /// Snapshots whose blocks are to be marked.
    pub snapshots_total: AtomicU64,
    /// Snapshots marked.
    pub snapshots_done: AtomicU64,
    /// Bytes in use to be written to packs.
    pub rewrite_bytes_total: AtomicU64,
    /// Bytes of these already written.
    pub rewrite_bytes_done: AtomicU64,
    cancelled: AtomicBool,
}

impl PruneProgress {
    /// Makes the prune that reports here end at its next step. Steps done stay done.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// True once [`Self::cancel`] was called.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.is_cancelled() {
            return Err(StoreError::Cancelled("pruning stopped; nothing was lost".into()));
        }
        Ok(())
    }
}

/// What pruning did, or would do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PruneReport {
    /// Snapshots whose blocks are kept.
    pub snapshots: u64,
    /// Of these, forgotten ones that a process has pinned.
    pub pinned: u64,
    /// Bytes of all segments and packs beforehand.
    pub bytes_before: u64,
    /// Of these, bytes in use, estimated without reading the blocks.
    pub bytes_live: u64,
    /// Of these, bytes not in use.
    pub bytes_unused: u64,
    /// Bytes of all segments and packs afterwards; an estimate if nothing was changed.
    pub bytes_after: u64,
    /// Files removed that held nothing in use.
    pub segments_removed: u64,
    /// Files whose blocks in use were moved into packs.
    pub segments_rewritten: u64,
    /// Files that could not be rewritten, because something in use in them is damaged (or is more
    /// than the index of a pack can list).
    pub segments_skipped: u64,
    /// Bytes of the packs written.
    pub bytes_rewritten: u64,
    /// True if nothing was changed.
    pub dry_run: bool,
}

/// A block in use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Item {
    pub block: BlockRef,
    pub kind: RecordKind,
    /// For a frame, bit n is set if slot n is in use.
    pub slots: u64,
}

/// A segment or pack, and its blocks in use.
#[derive(Debug)]
pub(crate) struct Source {
    pub key: (FileKind, u32),
    pub total_bytes: u64,
    pub live_bytes: u64,
    /// Sorted by name.
    pub items: Vec<Item>,
}

impl Source {
    fn unused_bytes(&self) -> u64 {
        self.total_bytes.saturating_sub(self.live_bytes)
    }

    /// The segments that the items were first written to.
    pub fn segments(&self) -> BTreeSet<u32> {
        self.items.iter().map(|item| item.block.segment).collect()
    }
}

/// If there are more small packs than this, they are merged.
const SMALL_PACKS_MAX: usize = 16;
/// The most blocks that several files together may put into one pack, so that its index stays
/// readable.
const ITEMS_MAX: usize = 1 << 20;
/// The journal is rewritten if at least so many of its records are obsolete, and these are at least
/// a quarter of all.
const STALE_RECORDS_MIN: usize = 8;

impl Store {
    /// Frees the space of what no snapshot reaches. Readers can go on meanwhile; writers find the
    /// store busy.
    ///
    /// # Errors
    /// As [`Store::begin`]; [`StoreError::Cancelled`] after [`PruneProgress::cancel`]. If a
    /// snapshot's tree cannot be read in full, nobody knows what it reaches, so nothing is removed:
    /// [`StoreError::Corrupt`] or [`StoreError::Missing`] says what is wrong. Forget that snapshot
    /// first.
    pub fn prune(
        self: &Arc<Self>,
        options: &PruneOptions,
        progress: &PruneProgress,
    ) -> Result<PruneReport> {
        let _lock = self.start_writing()?;
        // The blocks of a torn record may be all that is left of a snapshot: leave the segments
        // from the old tail on alone in this run.
        let doubtful = self.catalog().tail.unwrap_or_default().0;
        let doubtful = (self.torn_journal_bytes() > 0).then_some(doubtful);
        if doubtful.is_some() && !options.dry_run {
            self.keep_doubtful_blocks()?;
        }
        let mut report = PruneReport { dry_run: options.dry_run, ..PruneReport::default() };
        let pinned = self.pinned_and_forgotten()?;
        let marked = self.mark(&pinned, progress, &mut report)?;
        let sources = self.sources(&marked, &mut report)?;
        drop(marked);
        let (left_alone, sources): (Vec<Source>, Vec<Source>) =
            sources.into_iter().partition(|source| {
                source.key.0 == FileKind::Segment
                    && doubtful.is_some_and(|from| source.key.1 >= from)
            });
        let (dead, live): (Vec<Source>, Vec<Source>) =
            sources.into_iter().partition(|source| source.items.is_empty());
        let (chosen, mut kept) = self.choose(live, options);
        kept.extend(left_alone);
        report.segments_removed = dead.len() as u64;
        report.segments_rewritten = chosen.len() as u64;
        let bytes =
            |sources: &[Source], of: fn(&Source) -> u64| sources.iter().map(of).sum::<u64>();
        let rewrite = bytes(&chosen, |source| source.live_bytes);
        progress.rewrite_bytes_total.store(rewrite, Ordering::Relaxed);
        report.bytes_rewritten = rewrite;
        report.bytes_after = rewrite + bytes(&kept, |source| source.total_bytes);
        if options.dry_run {
            return Ok(report);
        }
        let tidied = if doubtful.is_some() { Ok(()) } else { self.remove_orphans().map(drop) };
        let in_use: BTreeSet<String> =
            self.snapshots().iter().chain(&pinned).map(|info| info.id.to_string()).collect();
        self.remove_working_sets(|id| in_use.contains(id));
        let pruned = tidied
            .and_then(|()| self.remove_dead(&dead))
            .and_then(|()| self.rewrite(chosen, progress, &mut report))
            .and_then(|()| self.rewrite_journal(&pinned));
        if let Err(error) = &pruned
            && error.latches()
        {
            self.writer_state().latched.get_or_insert(error.to_string());
        }
        pruned?;
        report.bytes_after = self.segment_lengths()?.values().sum();
        Ok(report)
    }

    fn pinned_and_forgotten(&self) -> Result<Vec<SnapshotInfo>> {
        let pinned = self.pinned()?;
        let catalog = self.catalog();
        Ok(pinned.iter().filter_map(|id| catalog.find_forgotten(*id)).collect())
    }

    fn mark(
        self: &Arc<Self>,
        pinned: &[SnapshotInfo],
        progress: &PruneProgress,
        report: &mut PruneReport,
    ) -> Result<Marked> {
        let published = self.snapshots();
        report.snapshots = (published.len() + pinned.len()) as u64;
        report.pinned = pinned.len() as u64;
        progress.snapshots_total.store(report.snapshots, Ordering::Relaxed);
        let is_cancelled = || progress.is_cancelled();
        let mut marker = Marker::new(self, &is_cancelled);
        // Newest first, as the marker expects.
        for info in published.iter().rev().chain(pinned) {
            progress.check()?;
            marker.snapshot(info);
            progress.snapshots_done.fetch_add(1, Ordering::Relaxed);
        }
        let mut marked = marker.finish();
        progress.check()?;
        match marked.obstacles.pop() {
            Some(obstacle) => Err(obstacle.error),
            None => Ok(marked),
        }
    }

    fn segment_lengths(&self) -> Result<BTreeMap<(FileKind, u32), u64>> {
        let layout = self.segments.layout();
        let last = self.catalog().tail.map_or(0, |(last, _)| last);
        let counts = |(kind, number): &(FileKind, u32)| match kind {
            FileKind::Pack => layout.packs.contains_key(number),
            _ => *number <= last && !layout.is_retired(*number),
        };
        let mut lengths = BTreeMap::new();
        for key in self.segment_files()?.into_iter().filter(counts) {
            let name = crate::segment::file_name(key);
            let len = self.storage.open(&name, false).and_then(|file| file.len_bytes());
            lengths.insert(key, len.map_err(|error| StoreError::io("read", name, error))?);
        }
        Ok(lengths)
    }

    /// The existing files, with what is in use of each.
    fn sources(&self, marked: &Marked, report: &mut PruneReport) -> Result<Vec<Source>> {
        let mut sources: BTreeMap<(FileKind, u32), Source> = self
            .segment_lengths()?
            .into_iter()
            .map(|(key, total_bytes)| {
                (key, Source { key, total_bytes, live_bytes: 0, items: Vec::new() })
            })
            .collect();
        let item = |kind| move |block: &BlockRef| Item { block: *block, kind, slots: u64::MAX };
        let frames = marked.frames.iter().map(|usage| Item {
            block: usage.frame,
            kind: crate::frame::kind_of(usage.delta),
            slots: usage.slots,
        });
        let items = frames
            .chain(marked.nodes.iter().map(item(RecordKind::Node)))
            .chain(marked.chunks.iter().map(|(block, _)| block).map(item(RecordKind::Blob)))
            .chain(marked.manifests.iter().map(item(RecordKind::Manifest)))
            .chain(
                marked
                    .fingerprints
                    .iter()
                    .map(|(block, _)| block)
                    .map(item(RecordKind::Fingerprints)),
            );
        for item in items {
            let (key, bytes) = repack::live_bytes(self, &item)?;
            // A missing file is damage: there is nothing to move.
            if let Some(source) = sources.get_mut(&key) {
                source.live_bytes += bytes;
                source.items.push(item);
            }
        }
        let layout = self.segments.layout();
        for source in sources.values_mut().filter(|source| !source.items.is_empty()) {
            let index = layout.packs.get(&source.key.1).filter(|_| source.key.0 == FileKind::Pack);
            source.live_bytes +=
                FILE_HEADER_LEN as u64 + index.map_or(0, |index| u64::from(index.len));
        }
        for source in sources.values_mut() {
            source.items.sort_unstable_by_key(|item| (item.block.segment, item.block.offset));
            report.bytes_before += source.total_bytes;
            report.bytes_live += source.live_bytes.min(source.total_bytes);
        }
        report.bytes_unused = report.bytes_before - report.bytes_live;
        Ok(sources.into_values().collect())
    }

    /// Chooses the files to rewrite: those with the largest unused share first, until few enough
    /// unused bytes are left or the limit of bytes to write is reached; and small packs, if they
    /// are many. Returns the files chosen and the others.
    fn choose(&self, mut live: Vec<Source>, options: &PruneOptions) -> (Vec<Source>, Vec<Source>) {
        let share =
            |source: &Source| source.unused_bytes() as f64 / source.total_bytes.max(1) as f64;
        live.sort_by(|a, b| share(b).total_cmp(&share(a)));
        let in_use: u64 = live.iter().map(|source| source.live_bytes).sum();
        let mut unused: u64 = live.iter().map(Source::unused_bytes).sum();
        let most = (in_use as f64 * options.max_unused.max(0.0)) as u64;
        let small = self.options.segment_max_bytes / 4;
        let is_small =
            |source: &Source| source.key.0 == FileKind::Pack && source.total_bytes < small;
        let too_many = live.iter().filter(|source| is_small(source)).count() > SMALL_PACKS_MAX;
        let mut room = options.max_rewrite_bytes;
        live.into_iter().partition(|source| {
            let wanted =
                (unused > most && source.unused_bytes() > 0) || (too_many && is_small(source));
            if !wanted || source.live_bytes > room {
                return false;
            }
            room -= source.live_bytes;
            unused -= source.unused_bytes();
            true
        })
    }

    /// Removes files that hold nothing in use.
    fn remove_dead(&self, dead: &[Source]) -> Result<()> {
        for part in dead.chunks(MAX_LISTED) {
            let of = |kind| {
                let keys = part.iter().map(|source| source.key);
                keys.filter(move |key| key.0 == kind).map(|key| key.1).collect()
            };
            let step = Relayout {
                dropped: of(FileKind::Segment),
                retired_packs: of(FileKind::Pack),
                ..self.relayout()
            };
            self.record(Entry::Relayout(step))?;
            self.remove_files(part)?;
        }
        Ok(())
    }

    fn remove_files(&self, sources: &[Source]) -> Result<()> {
        sources.iter().try_for_each(|source| self.remove_file(source.key))?;
        self.storage
            .sync_names(SEGMENT_FOLDER)
            .map_err(|error| StoreError::io("sync", SEGMENT_FOLDER, error))
    }

    /// A relayout that changes nothing.
    fn relayout(&self) -> Relayout {
        let catalog = self.catalog();
        let next_pack = catalog.layout.next_pack.max(1);
        Relayout { tail: catalog.tail, next_pack, ..Relayout::default() }
    }

    /// Writes what is in use of `chosen` into packs, one pack at a time, and removes the files.
    fn rewrite(
        self: &Arc<Self>,
        mut chosen: Vec<Source>,
        progress: &PruneProgress,
        report: &mut PruneReport,
    ) -> Result<()> {
        chosen.sort_unstable_by_key(|source| source.segments().first().copied());
        (report.segments_rewritten, report.bytes_rewritten) = (0, 0);
        while !chosen.is_empty() {
            progress.check()?;
            let count = self.sources_of_one_pack(&chosen);
            let mut group: Vec<Source> = chosen.drain(..count).collect();
            while !group.is_empty() {
                let step = self.relayout();
                let step = Relayout { next_pack: step.next_pack.max(self.unused_pack()?), ..step };
                match repack::write_pack(self, step.next_pack, &group, progress) {
                    Ok((index, bytes)) => {
                        self.adopt(index, &group, step)?;
                        report.segments_rewritten += group.len() as u64;
                        report.bytes_rewritten += bytes;
                        break;
                    }
                    // Something in use is damaged, or an index cannot list it all: leave that file
                    // as it is, and go on with the others.
                    Err(repack::Failure { error, source: Some(index) }) => {
                        tracing::warn!(%error, "a file was left unchanged");
                        group.remove(index);
                        report.segments_skipped += 1;
                    }
                    Err(repack::Failure { error, source: None }) => return Err(error),
                }
            }
        }
        Ok(())
    }

    fn sources_of_one_pack(&self, sources: &[Source]) -> usize {
        let (mut bytes, mut total_bytes, mut segments, mut items) = (0, 0, 0, 0);
        let fits = sources.iter().take_while(|source| {
            bytes += source.live_bytes;
            // `live_bytes` is an estimate: up to all of the file may be in use.
            total_bytes += source.total_bytes;
            segments += source.segments().len();
            items += source.items.len();
            bytes <= self.options.segment_max_bytes
                && total_bytes <= MAX_SEGMENT_LEN
                && segments <= MAX_LISTED
                && items <= ITEMS_MAX
        });
        fits.count().max(1)
    }

    /// Makes a finished pack replace `sources`.
    fn adopt(&self, index: BlockRef, sources: &[Source], step: Relayout) -> Result<()> {
        let moved: BTreeSet<u32> = sources.iter().flat_map(Source::segments).collect();
        let packs = sources.iter().filter(|source| source.key.0 == FileKind::Pack);
        let step = Relayout {
            next_pack: index.segment + 1,
            pack: Some(index),
            moved: moved.into_iter().collect(),
            retired_packs: packs.map(|source| source.key.1).collect(),
            ..step
        };
        let number = index.segment;
        self.record(Entry::Relayout(step)).inspect_err(|_| {
            // If it is certain that the journal does not name the pack, free its space.
            if self.writer_state().latched.is_none() {
                let _left_behind = self.remove_file((FileKind::Pack, number));
            }
        })?;
        // Append another record, so that damage to the first is never taken for a torn append: the
        // pack would then be removed as an orphan, although its sources are gone.
        self.record(Entry::Relayout(self.relayout()))?;
        self.remove_files(sources)
    }

    /// A number above those of all existing packs, even orphans.
    fn unused_pack(&self) -> Result<u32> {
        let files = self.segment_files()?;
        let packs = files.iter().filter(|(kind, _)| *kind == FileKind::Pack);
        Ok(packs.map(|(_, number)| number.saturating_add(1)).max().unwrap_or(1))
    }

    /// Rewrites the journal if much of it is obsolete.
    fn rewrite_journal(&self, pinned: &[SnapshotInfo]) -> Result<()> {
        let pinned: Vec<SnapshotId> = pinned.iter().map(|info| info.id).collect();
        let (entries, generation) = {
            let catalog = self.catalog();
            let entries = catalog.records(&pinned);
            let stale = (catalog.cursor.records() as usize).saturating_sub(entries.len());
            if stale < STALE_RECORDS_MIN || stale * 3 < entries.len() {
                return Ok(());
            }
            (entries, catalog.cursor.generation())
        };
        let header = FileHeader {
            kind: FileKind::Journal,
            version: FORMAT_VERSION,
            number: generation.wrapping_add(1),
            store: self.uuid,
            created_unix_ms: unix_ms(),
        };
        let mut cursor = Cursor::start(&header.encode());
        let mut bytes = header.encode().to_vec();
        for entry in &entries {
            let (record, after) = cursor.encode_next(entry);
            bytes.extend_from_slice(&record);
            cursor = after;
        }
        self.replace_journal(&bytes)
    }

    fn replace_journal(&self, bytes: &[u8]) -> Result<()> {
        let failed = |op| move |error| StoreError::io(op, JOURNAL_NEW_FILE, error);
        // A crash may have left one, which is still there if the journal was torn.
        self.remove_new_journal()?;
        let file = self.storage.create(JOURNAL_NEW_FILE).map_err(failed("create"))?;
        let written = file
            .write_all_at(bytes, 0)
            .map_err(failed("write"))
            .and_then(|()| file.sync().map_err(failed("sync")));
        if let Err(error) = written {
            // If it stays, it is an orphan, which the next writer removes.
            let _left_behind = self.remove_new_journal();
            return Err(error);
        }
        // Until the folder is synced, a crash may leave either journal: nothing may be appended
        // before.
        let replaced = self
            .storage
            .rename(JOURNAL_NEW_FILE, JOURNAL_FILE)
            .and_then(|()| self.storage.sync_names(""));
        if let Err(error) = replaced {
            self.writer_state().latched = Some(format!("while replacing the journal: {error}"));
            return Err(StoreError::io("replace", JOURNAL_FILE, error));
        }
        let file = self.open_journal(false)?;
        self.replaced(Catalog::read(file.as_ref(), self.uuid)?);
        Ok(())
    }
}
