//! The writing side of a store: appending to the journal, continuing the newest segment, and
//! clearing away what crashed writers left behind.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::elide::decode_fingerprints;
use crate::error::{Result, StoreError};
use crate::format::{
    FileKind, JOURNAL_FILE, JOURNAL_NEW_FILE, PIN_FOLDER, RecordKind, SEGMENT_FOLDER, parse_name,
    segment_name,
};
use crate::id::{BlockRef, SnapshotId};
use crate::journal_entry::{Entry, MAX_LISTED};
use crate::layout::Relayout;
use crate::segment::SegmentWriter;
use crate::storage::{StoreFile, WriterLock};
use crate::store::{Store, lock};

impl Store {
    /// Points tag `name` to `target`, or removes it.
    ///
    /// # Errors
    /// As [`Self::begin`]; [`StoreError::Invalid`] if `name` cannot be a tag;
    /// [`StoreError::UnknownRef`] if `target` is not published.
    pub fn set_tag(&self, name: &str, target: Option<SnapshotId>) -> Result<()> {
        crate::reference::check_tag(name)?;
        let _lock = self.start_writing()?;
        target.map(|id| self.published(id)).transpose()?;
        self.record(Entry::Tag { name: name.to_owned(), target })
    }

    /// Removes snapshots, and the tags that point to them, from the catalog. Their children become
    /// children of the nearest ancestor that is kept. [`Self::prune`] frees the space.
    ///
    /// # Errors
    /// As [`Self::begin`]; [`StoreError::UnknownRef`] if any of `ids` is not published; then none
    /// is forgotten.
    pub fn forget(&self, ids: &[SnapshotId]) -> Result<()> {
        let _lock = self.start_writing()?;
        self.forget_published(ids)
    }

    /// As [`Self::forget`], but spares snapshots that have a tag by now. Returns those forgotten.
    ///
    /// # Errors
    /// As [`Self::forget`].
    pub fn forget_untagged(&self, ids: &[SnapshotId]) -> Result<Vec<SnapshotId>> {
        let _lock = self.start_writing()?;
        let tagged: HashSet<SnapshotId> = self.tags().into_values().collect();
        let ids: Vec<SnapshotId> = ids.iter().copied().filter(|id| !tagged.contains(id)).collect();
        self.forget_published(&ids)?;
        Ok(ids)
    }

    fn forget_published(&self, ids: &[SnapshotId]) -> Result<()> {
        let mut distinct = HashSet::new();
        for id in ids {
            self.published(*id)?;
        }
        let ids: Vec<SnapshotId> = ids.iter().copied().filter(|id| distinct.insert(*id)).collect();
        ids.chunks(MAX_LISTED).try_for_each(|ids| self.record(Entry::Forget(ids.to_vec())))
    }

    /// Appends `entry` to the journal, durably. The caller holds the writer lock.
    pub(crate) fn record(&self, entry: Entry) -> Result<()> {
        self.keep_doubtful_blocks()?;
        self.record_as_it_is(entry)
    }

    fn record_as_it_is(&self, entry: Entry) -> Result<()> {
        self.append_to_journal(entry).map_err(|failure| {
            if failure.error.latches() || !failure.undone {
                self.writer_state().latched = Some(failure.error.to_string());
            }
            failure.error
        })
    }

    /// If the journal ends in a torn record, moves the tail past all existing blocks. The next
    /// append cuts off that record; but it may be a damaged one that was durable, and its blocks
    /// all that is left of a snapshot.
    pub(crate) fn keep_doubtful_blocks(&self) -> Result<()> {
        if self.torn_journal_bytes() == 0 {
            return Ok(());
        }
        let files = self.segment_files()?;
        let segments = files.iter().filter(|(kind, _)| *kind == FileKind::Segment);
        let Some(last) = segments.map(|(_, number)| *number).max() else { return Ok(()) };
        let tail = self.catalog().tail.unwrap_or_default();
        let name = segment_name(last);
        let len = self.storage.open(&name, false).and_then(|file| file.len_bytes());
        let len = len.map_err(|error| StoreError::io("read", name, error))?;
        let next_pack = self.segments.layout().next_pack;
        let step = Relayout { tail: Some(tail.max((last, len))), next_pack, ..Relayout::default() };
        self.record_as_it_is(Entry::Relayout(step))
    }

    /// Takes the writer lock, then reads what others published before.
    pub(crate) fn start_writing(&self) -> Result<Box<dyn WriterLock>> {
        if let Some(cause) = &self.writer_state().latched {
            return Err(StoreError::Latched { store: self.describe(), cause: cause.clone() });
        }
        let lock = lock(self.storage.as_ref())?;
        self.refresh()?;
        Ok(lock)
    }

    /// The snapshots that are pinned by any process.
    pub(crate) fn pinned(&self) -> Result<HashSet<SnapshotId>> {
        let names =
            self.storage.pinned().map_err(|error| StoreError::io("list", PIN_FOLDER, error))?;
        // Other files in that folder are not pins.
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Loads the store's fingerprints into the index, newest snapshots first, until it is full.
    /// Does so only once.
    pub(crate) fn load_fingerprints(&self) {
        if self.fingerprints.loaded.swap(true, Ordering::Relaxed) {
            return;
        }
        let blocks: Vec<BlockRef> =
            self.catalog().snapshots().iter().rev().filter_map(|info| info.fingerprints).collect();
        let mut lists = Vec::new();
        let mut room = self.fingerprints.capacity();
        for block in blocks {
            let read = self.reading(|| {
                self.segments.read(&block, RecordKind::Fingerprints, |record| {
                    decode_fingerprints(&record.decode()?)
                })
            });
            // Without them, some pages are written needlessly, but nothing is lost.
            let Ok(frames) = read else { continue };
            let pages: usize = frames.iter().map(|(_, list)| list.len()).sum();
            lists.push(frames);
            room = room.saturating_sub(pages);
            if room == 0 {
                break;
            }
        }
        // Insert the oldest first: of equal pages, the newest is to be found.
        for (frame, fingerprints) in lists.into_iter().rev().flatten() {
            self.fingerprints.insert(frame, &fingerprints);
        }
    }

    /// A writer that appends after the newest published snapshot. First clears away what a crashed
    /// writer left there.
    pub(crate) fn continue_segments(&self) -> Result<SegmentWriter> {
        let (tail, torn) = {
            let catalog = self.catalog();
            (catalog.tail, catalog.cursor.torn_bytes)
        };
        let abandon_tail = self.writer_state().abandon_tail;
        let mut last_used = tail.map_or(0, |(last, _)| last);
        // A torn newest record may be a damaged one that was durable, and its blocks all that is
        // left of a snapshot: leave them alone. Otherwise clean up, even if this handle has before:
        // another process may have crashed since.
        let mut newest = None;
        if torn == 0 {
            newest = self.remove_orphans()?;
        } else {
            let files = self.segment_files()?;
            let segments = files.iter().filter(|(kind, _)| *kind == FileKind::Segment);
            last_used = segments.map(|(_, number)| *number).fold(last_used, u32::max);
        }
        let mut go_on = None;
        if let Some((number, end)) = tail
            && !abandon_tail
            && torn == 0
            && end < self.options.segment_max_bytes
        {
            go_on = newest.filter(|_| self.can_go_on(number)).map(|file| (number, end, file));
        }
        let next = last_used.checked_add(1).ok_or_else(|| {
            StoreError::Invalid(format!("{} has used up all segment numbers", self.describe()))
        })?;
        Ok(SegmentWriter::new(
            Arc::clone(&self.storage),
            self.uuid,
            self.options.segment_max_bytes,
            go_on,
            next,
        ))
    }

    /// True if the newest segment can be appended to: it was not pruned away, and its header is
    /// intact (otherwise nothing in it could be read back).
    fn can_go_on(&self, number: u32) -> bool {
        let layout = self.segments.layout();
        !layout.is_retired(number) && self.segments.file((FileKind::Segment, number)).is_ok()
    }

    /// Removes what no published snapshot can refer to: everything past the tail, pruned files, and
    /// unfinished packs and journals; nothing if the journal is torn. Returns the newest segment,
    /// if it exists and now ends at the tail.
    pub(crate) fn remove_orphans(&self) -> Result<Option<Arc<dyn StoreFile>>> {
        if self.torn_journal_bytes() > 0 {
            return Ok(None);
        }
        let layout = self.segments.layout();
        let last = self.catalog().tail.map_or(0, |(last, _)| last);
        let is_orphan = |(kind, number): (FileKind, u32)| match kind {
            FileKind::Pack => !layout.packs.contains_key(&number),
            _ => number > last || layout.is_retired(number),
        };
        for key in self.segment_files()?.into_iter().filter(|key| is_orphan(*key)) {
            self.remove_file(key)?;
        }
        self.remove_new_journal()?;
        self.cut_tail()
    }

    /// Removes an unfinished rewritten journal, if there is one.
    pub(crate) fn remove_new_journal(&self) -> Result<()> {
        match self.storage.remove(JOURNAL_NEW_FILE) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(StoreError::io("remove", JOURNAL_NEW_FILE, error))
            }
            _ => Ok(()),
        }
    }

    /// Cuts the newest segment at the tail. Returns it, unless it is missing or too short.
    fn cut_tail(&self) -> Result<Option<Arc<dyn StoreFile>>> {
        let Some((number, end)) = self.catalog().tail else { return Ok(None) };
        let name = segment_name(number);
        let file = match self.storage.open(&name, true) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file.map_err(|error| StoreError::io("open", name.clone(), error))?,
        };
        let len = file.len_bytes().map_err(|error| StoreError::io("read", name.clone(), error))?;
        if len > end {
            file.set_len(end).map_err(|error| StoreError::io("truncate", name, error))?;
        }
        // A shorter one has lost published data, which `verify` reports: never append to it.
        Ok((len >= end).then_some(file))
    }

    pub(crate) fn remove_file(&self, key: (FileKind, u32)) -> Result<()> {
        self.segments.close_file(key);
        let name = crate::segment::file_name(key);
        self.storage.remove(&name).map_err(|error| StoreError::io("remove", name, error))
    }

    /// The segments and packs that exist, sorted.
    pub(crate) fn segment_files(&self) -> Result<Vec<(FileKind, u32)>> {
        let names = self
            .storage
            .list(SEGMENT_FOLDER)
            .map_err(|error| StoreError::io("list", SEGMENT_FOLDER, error))?;
        let mut files: Vec<_> = names.iter().filter_map(|name| parse_name(name)).collect();
        files.sort_unstable();
        Ok(files)
    }

    pub(crate) fn append_to_journal(&self, entry: Entry) -> Result<(), PublishFailure> {
        let cursor = self.catalog().cursor.clone();
        let (bytes, after) = cursor.encode_next(&entry);
        let certain = |error| PublishFailure { error, undone: true };
        let file = self.open_journal(true).map_err(certain)?;
        if cursor.torn_bytes > 0 {
            file.set_len(cursor.end)
                .map_err(|error| certain(StoreError::io("truncate", JOURNAL_FILE, error)))?;
        }
        let written = file
            .write_all_at(&bytes, cursor.end)
            .map_err(|error| StoreError::io("append to", JOURNAL_FILE, error))
            .and_then(|()| {
                file.sync().map_err(|error| StoreError::io("sync", JOURNAL_FILE, error))
            });
        if let Err(error) = written {
            // Take the record back, durably, or nobody knows whether it was published.
            let undone = file.set_len(cursor.end).and_then(|()| file.sync()).is_ok();
            return Err(PublishFailure { error, undone });
        }
        self.appended(entry, after);
        Ok(())
    }
}

/// A journal append that failed.
pub(crate) struct PublishFailure {
    pub error: StoreError,
    /// True if it is certain that nothing was published.
    pub undone: bool,
}
