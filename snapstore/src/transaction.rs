//! Writing a snapshot: pages in rounds, then one commit that publishes all or nothing.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Result, StoreError};
use crate::format::{JOURNAL_FILE, MAX_BLOB_LEN, RecordKind, SEGMENT_FOLDER, segment_name};
use crate::id::{BlockRef, Hash, SnapshotId};
use crate::journal::{Entry, Publication};
use crate::manifest::{Manifest, RegionManifest, StateChunk, StateRef};
use crate::node::{MAX_REGION_PAGES, Node, Run, overlay};
use crate::page::{PageSet, PageSource};
use crate::pipeline::{self, Job, Progress, WriteStats};
use crate::record::RecordEncoder;
use crate::segment::SegmentWriter;
use crate::snapshot::Snapshot;
use crate::storage::WriterLock;
use crate::store::{Store, lock, unix_ms};
use crate::tree::{NodeSink, NodeSource, Tree};

/// A region of the snapshot being written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionHandle(usize);

/// What a snapshot is besides its pages.
#[derive(Clone, Debug, Default)]
pub struct Description {
    /// Whose state it is: the VM's name.
    pub name: String,
    /// What the user says about it.
    pub message: String,
    /// A tag to point to it.
    pub tag: Option<String>,
    /// When it was cut, Unix milliseconds.
    pub time_unix_ms: u64,
    /// The machine, vCPUs, devices.
    pub state: Vec<StateChunk>,
    /// Figures to keep with it.
    pub stats: Value,
}

/// A published snapshot and what publishing it came to.
#[derive(Clone, Debug)]
pub struct Committed {
    /// The snapshot.
    pub id: SnapshotId,
    /// Bytes of frames, including those of pages written again in a later round.
    pub frame_bytes: u64,
    /// Bytes of tree nodes, state chunks and the manifest.
    pub meta_bytes: u64,
    /// Tree nodes written.
    pub nodes: u64,
    /// Time to make it durable and publish it, in microseconds.
    pub sync_us: u64,
    /// Why the tag could not be set, if it could not: the snapshot is published all the same.
    pub tag_failure: Option<String>,
}

/// A snapshot being written. Dropping it without [`Self::commit`] takes back all it wrote.
///
/// One at a time per store, over all processes.
#[derive(Debug)]
pub struct Transaction {
    store: Arc<Store>,
    parent: Option<Snapshot>,
    regions: Vec<RegionDraft>,
    progress: Arc<Progress>,
    /// None once committed or rolled back.
    segments: Option<SegmentWriter>,
    frame_bytes: u64,
    nodes: u64,
    /// True once a write failed: some pages of it are missing.
    failed: bool,
    // Last, so that it is given up last.
    _lock: Box<dyn WriterLock>,
}

#[derive(Debug)]
struct RegionDraft {
    name: String,
    base: Tree,
    changes: Vec<Run>,
}

impl Store {
    /// Starts a snapshot that changes `parent`, or the first of a new line.
    ///
    /// # Errors
    /// [`StoreError::Busy`] if another transaction is open, here or in another process;
    /// [`StoreError::Latched`] after an I/O error; [`StoreError::UnknownRef`] if there is no such
    /// parent.
    pub fn begin(self: &Arc<Self>, parent: Option<SnapshotId>) -> Result<Transaction> {
        self.check_latched()?;
        let lock = lock(self.storage.as_ref())?;
        self.refresh()?;
        let parent = parent.map(|id| self.snapshot(id)).transpose()?;
        let segments = self.continue_segments()?;
        Ok(Transaction {
            store: Arc::clone(self),
            parent,
            regions: Vec::new(),
            progress: Arc::default(),
            segments: Some(segments),
            frame_bytes: 0,
            nodes: 0,
            failed: false,
            _lock: lock,
        })
    }

    /// Points tag `name` to `target`, or removes it.
    ///
    /// # Errors
    /// As [`Self::begin`]; [`StoreError::Invalid`] if `name` cannot be a tag;
    /// [`StoreError::UnknownRef`] if `target` is not published.
    pub fn set_tag(&self, name: &str, target: Option<SnapshotId>) -> Result<()> {
        crate::reference::check_tag(name)?;
        self.check_latched()?;
        let _lock = lock(self.storage.as_ref())?;
        self.refresh()?;
        target.map(|id| self.published(id)).transpose()?;
        self.append_to_journal(Entry::Tag { name: name.to_owned(), target }).map_err(|failure| {
            if failure.error.latches() || !failure.undone {
                self.writer_state().latched = Some(failure.error.to_string());
            }
            failure.error
        })
    }

    fn check_latched(&self) -> Result<()> {
        match &self.writer_state().latched {
            Some(cause) => {
                Err(StoreError::Latched { store: self.describe(), cause: cause.clone() })
            }
            None => Ok(()),
        }
    }

    /// Where to append: after the newest published snapshot, with what a crashed writer left
    /// behind it cleared away.
    fn continue_segments(&self) -> Result<SegmentWriter> {
        let (tail, torn) = {
            let catalog = self.catalog();
            (catalog.tail, catalog.cursor.torn_bytes)
        };
        let abandon_tail = self.writer_state().abandon_tail;
        let numbers = self.segment_numbers()?;
        let mut last_used = tail.map_or(0, |(last, _)| last);
        // A torn newest record may be damage to one that was durable. Its data is then all that is
        // left of it: leave it alone. Else every writer looks, even one that tidied up before: the
        // one that crashed may have been another process.
        if torn == 0 {
            let orphans = numbers
                .iter()
                .copied()
                .filter(|number| tail.is_none_or(|(last, _)| *number > last));
            for number in orphans {
                self.segments.forget(number);
                let name = segment_name(number);
                self.storage
                    .remove(&name)
                    .map_err(|error| StoreError::io("remove", name, error))?;
            }
        } else {
            last_used = numbers.iter().copied().fold(last_used, u32::max);
        }
        let mut go_on = None;
        if let Some((number, end)) = tail
            && !abandon_tail
            && torn == 0
            && end < self.options.segment_max_bytes
            // One that is missing, or whose header is damaged, could not be read back.
            && self.segments.file(number).is_ok()
        {
            let name = segment_name(number);
            let file = self
                .storage
                .open(&name, true)
                .map_err(|error| StoreError::io("open", name.clone(), error))?;
            let len =
                file.len_bytes().map_err(|error| StoreError::io("read", name.clone(), error))?;
            if len > end {
                file.set_len(end).map_err(|error| StoreError::io("truncate", name, error))?;
            }
            // A shorter one has lost published data: `verify` tells; never append to it.
            go_on = (len >= end).then_some((number, end, file));
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

    fn segment_numbers(&self) -> Result<HashSet<u32>> {
        let names = self
            .storage
            .list(SEGMENT_FOLDER)
            .map_err(|error| StoreError::io("list", SEGMENT_FOLDER, error))?;
        Ok(names
            .iter()
            .filter_map(|name| {
                let number = u32::from_str_radix(name.strip_suffix(".seg")?, 16).ok()?;
                // Only names we would have given: the others are somebody else's files.
                (segment_name(number).strip_prefix(SEGMENT_FOLDER)?.strip_prefix('/')? == name)
                    .then_some(number)
            })
            .collect())
    }

    fn append_to_journal(&self, entry: Entry) -> Result<(), PublishFailure> {
        let cursor = self.catalog().cursor.clone();
        let (bytes, after) = cursor.encode_next(&entry);
        let certain = |error| PublishFailure { error, undone: true };
        let file = self
            .storage
            .open(JOURNAL_FILE, true)
            .map_err(|error| certain(StoreError::io("open", JOURNAL_FILE, error)))?;
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
struct PublishFailure {
    error: StoreError,
    /// True if it is certain that nothing was published.
    undone: bool,
}

impl Transaction {
    /// Names a region of the new snapshot. Its pages are the parent's region of that name until
    /// written, or zero if the parent has none. Regions of the parent that are not named here are
    /// not part of the new snapshot.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if the parent's region has another size, or the name was used.
    pub fn region(&mut self, name: &str, pages: u64) -> Result<RegionHandle> {
        let inherited = self.parent.as_ref().and_then(|parent| parent.manifest().region(name));
        if let Some(region) = inherited
            && region.pages != pages
        {
            return Err(StoreError::Invalid(format!(
                "region `{name}` has {} pages in the parent snapshot, {pages} now: regions keep their size",
                region.pages
            )));
        }
        if pages == 0 || pages > MAX_REGION_PAGES {
            return Err(StoreError::Invalid(format!(
                "region `{name}`: expected 1 to {MAX_REGION_PAGES} pages, found {pages}"
            )));
        }
        if self.regions.iter().any(|region| region.name == name) {
            return Err(StoreError::Invalid(format!("region `{name}` is named twice")));
        }
        let base = Tree { root: inherited.and_then(|region| region.root), pages };
        self.regions.push(RegionDraft { name: name.to_owned(), base, changes: Vec::new() });
        Ok(RegionHandle(self.regions.len() - 1))
    }

    /// Where others can watch, or cancel.
    #[must_use]
    pub fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    /// Reads `pages` from `source`, and appends them compressed. May be called many times: what
    /// is written later counts.
    ///
    /// # Errors
    /// After any error the transaction can only be dropped.
    pub fn write_pages(
        &mut self,
        region: RegionHandle,
        pages: &PageSet,
        source: &dyn PageSource,
    ) -> Result<WriteStats> {
        let pages: Vec<u64> = pages.iter().collect();
        self.progress
            .pages_total
            .fetch_add(pages.len() as u64, std::sync::atomic::Ordering::Relaxed);
        let already_failed = std::mem::replace(&mut self.failed, true);
        let draft = &mut self.regions[region.0];
        if let Some(last) = pages.last().filter(|last| **last >= draft.base.pages) {
            return Err(StoreError::Invalid(format!(
                "page {last} is beyond region `{}`, which has {} pages",
                draft.name, draft.base.pages
            )));
        }
        let options = &self.store.options;
        let job = Job {
            region: &draft.name,
            pages: &pages,
            source,
            frame_pages: options.frame_pages,
            compression_level: options.compression_level,
            progress: &self.progress,
        };
        let segments = self.segments.as_mut().expect("held until commit");
        let (runs, stats) = pipeline::write(&self.store.pool, segments, &job)?;
        self.failed = already_failed;
        draft.changes = overlay(&draft.changes, &runs);
        self.frame_bytes += stats.stored_bytes;
        Ok(stats)
    }

    /// Writes trees, state and manifest, makes everything durable, and publishes the snapshot.
    ///
    /// # Errors
    /// Nothing is published then, and what was written is taken back. After an I/O error (not a
    /// full disk) the store is latched. [`StoreError::Invalid`] if writing pages failed before:
    /// the snapshot would lack them.
    pub fn commit(mut self, description: Description) -> Result<Committed> {
        let committed = self.try_commit(description);
        match &committed {
            Ok(_) => self.segments = None,
            Err(error) => self.roll_back(error.latches().then(|| error.to_string())),
        }
        committed
    }

    fn try_commit(&mut self, description: Description) -> Result<Committed> {
        self.progress.check()?;
        if self.failed {
            return Err(StoreError::Invalid("a snapshot some of whose pages could not be written cannot be committed; start over".into()));
        }
        if let Some(tag) = &description.tag {
            crate::reference::check_tag(tag)?;
        }
        let regions = self.write_trees()?;
        let state = self.write_state(&description.state)?;
        let manifest = Manifest {
            parent: self.parent.as_ref().map(Snapshot::id),
            time_unix_ms: if description.time_unix_ms == 0 {
                unix_ms()
            } else {
                description.time_unix_ms
            },
            name: description.name,
            message: description.message,
            regions,
            state,
            stats: description.stats,
        };
        let json = encode_json(&manifest, "the manifest")?;
        let block = self.put_blob(RecordKind::Manifest, &json, "manifest")?;
        let id = Hash::of(&json);
        // Two snapshots with equal manifests would share an id; their time or stats differ in practice.
        if self.store.find(id).is_some() {
            return Err(StoreError::Invalid(format!(
                "snapshot {} was published already",
                id.short()
            )));
        }
        self.progress.check()?;
        let syncing = Instant::now();
        let segments = self.segments.as_mut().expect("held until commit");
        let tail = segments.sync()?;
        let meta_bytes = segments.appended_bytes() - self.frame_bytes;
        self.publish(Publication {
            id,
            parent: manifest.parent,
            manifest: block,
            time_unix_ms: manifest.time_unix_ms,
            tail,
        })?;
        let sync_us = u64::try_from(syncing.elapsed().as_micros()).unwrap_or(u64::MAX);
        // Still under the writer lock, so that nobody comes between.
        let tag_failure = description.tag.and_then(|name| {
            let entry = Entry::Tag { name, target: Some(id) };
            self.store.append_to_journal(entry).err().map(|failure| failure.error.to_string())
        });
        Ok(Committed {
            id,
            frame_bytes: self.frame_bytes,
            meta_bytes,
            nodes: self.nodes,
            sync_us,
            tag_failure,
        })
    }

    fn write_trees(&mut self) -> Result<Vec<RegionManifest>> {
        let mut regions = Vec::with_capacity(self.regions.len());
        for draft in std::mem::take(&mut self.regions) {
            let policy = self.store.flush_policy;
            let tree = draft.base.apply(self, policy, &draft.changes)?;
            regions.push(RegionManifest { name: draft.name, pages: tree.pages, root: tree.root });
        }
        Ok(regions)
    }

    fn write_state(&mut self, chunks: &[StateChunk]) -> Result<Vec<StateRef>> {
        let mut names = HashSet::new();
        let mut refs = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            if !names.insert(&chunk.name) {
                return Err(StoreError::Invalid(format!(
                    "state chunk `{}` is saved twice",
                    chunk.name
                )));
            }
            let json = encode_json(&chunk.body, &format!("state chunk `{}`", chunk.name))?;
            let body = self.put_blob(RecordKind::Blob, &json, &chunk.name)?;
            refs.push(StateRef {
                name: chunk.name.clone(),
                kind: chunk.kind.clone(),
                version: chunk.version,
                body,
            });
        }
        Ok(refs)
    }

    /// Appends a blob, unless the parent has the same one.
    fn put_blob(&mut self, kind: RecordKind, json: &[u8], what: &str) -> Result<BlockRef> {
        if json.len() > MAX_BLOB_LEN {
            return Err(StoreError::Invalid(format!(
                "{what} has {} bytes, at most {MAX_BLOB_LEN} can be stored",
                json.len()
            )));
        }
        let mut encoder =
            RecordEncoder::new(1).map_err(|error| StoreError::io("start", "zstd", error))?;
        let record = encoder.encode(kind, json);
        let known = self
            .parent
            .iter()
            .flat_map(|parent| &parent.manifest().state)
            .find(|chunk| chunk.body.hash == record.hash);
        match known {
            Some(chunk) => Ok(chunk.body),
            None => self.segments.as_mut().expect("held until commit").append(&record),
        }
    }

    fn publish(&mut self, publication: Publication) -> Result<()> {
        self.store.append_to_journal(Entry::Publish(publication)).map_err(|failure| {
            if !failure.undone {
                // Somebody may see it as published: its data must stay.
                self.segments = None;
                self.store.writer_state().latched = Some(failure.error.to_string());
            }
            failure.error
        })?;
        // The tail is what this handle has just written, no longer the segment in doubt.
        self.store.writer_state().abandon_tail = false;
        Ok(())
    }

    fn roll_back(&mut self, latch: Option<String>) {
        let Some(segments) = self.segments.take() else { return };
        if let Err(error) = segments.roll_back(&self.store.segments) {
            // What could not be taken back is cleared away by the next writer.
            tracing::warn!(%error, "could not take back an unfinished transaction");
        }
        if let Some(cause) = latch {
            self.store.writer_state().latched = Some(cause);
        }
    }
}

/// JSON that is certain to be readable: the parser has limits, such as the depth of nesting, that
/// the printer does not have.
fn encode_json<T: Serialize + DeserializeOwned>(value: &T, what: &str) -> Result<Vec<u8>> {
    serde_json::to_vec(value)
        .and_then(|json| serde_json::from_slice::<T>(&json).map(|_readable| json))
        .map_err(|error| StoreError::Invalid(format!("cannot encode {what}: {error}")))
}

impl Drop for Transaction {
    fn drop(&mut self) {
        self.roll_back(None);
    }
}

impl NodeSource for Transaction {
    fn node(&self, block: &BlockRef, level: u8, first: u64) -> Result<Arc<Node>> {
        self.store.node(block, level, first)
    }
}

impl NodeSink for Transaction {
    fn put(&mut self, node: Node) -> Result<BlockRef> {
        // Nodes are mostly hashes: compressing them gains little and costs every look-up.
        let record = RecordEncoder::encode_plain(RecordKind::Node, &node.encode());
        let block = self.segments.as_mut().expect("held until commit").append(&record)?;
        self.store.nodes.insert(block.hash, Arc::new(node));
        self.nodes += 1;
        Ok(block)
    }
}
