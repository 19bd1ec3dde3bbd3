//! Writing a snapshot: pages in any number of rounds, then one commit that publishes all or
//! nothing.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::changes::Changes;
use crate::elide::{FrameFingerprints, encode_fingerprints};
use crate::error::{Result, StoreError};
use crate::format::{MAX_BLOB_LEN, RecordKind};
use crate::id::{BlockRef, Hash, SnapshotId};
use crate::journal_entry::{Entry, Publication};
use crate::manifest::{Manifest, RegionManifest, StateChunk, StateRef};
use crate::node::{MAX_REGION_PAGES, Node};
use crate::page::PageSource;
use crate::page_set::PageSet;
use crate::pipeline::{self, Job, Written, lock};
use crate::progress::{Progress, WriteStats};
use crate::record::RecordEncoder;
use crate::segment::SegmentWriter;
use crate::snapshot::Snapshot;
use crate::storage::{Pin, WriterLock};
use crate::store::{Store, unix_ms};
use crate::tree::{NodeSink, Tree};

/// A region of the snapshot being written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionHandle(usize);

/// Everything that goes into a snapshot besides its pages.
#[derive(Clone, Debug, Default)]
pub struct Description {
    /// The name of the VM whose state it is.
    pub name: String,
    /// The user's message.
    pub message: String,
    /// A tag to point to the snapshot.
    pub tag: Option<String>,
    /// When the snapshot was cut, in Unix milliseconds; 0 stands for the time of the commit.
    pub time_unix_ms: u64,
    /// State chunks: the machine, vCPUs, devices.
    pub state: Vec<StateChunk>,
    /// Figures to keep with the snapshot. To an object, the transaction adds what only it knows:
    /// `meta_bytes`, the bytes it appended besides frames and the manifest, and `write_us`, the
    /// time since it began, in microseconds.
    pub stats: Value,
    /// True to keep the snapshot from being pruned as long as [`Committed::pin`] lives, for a
    /// caller that continues from it.
    pub pin: bool,
}

/// A published snapshot and what it cost.
#[derive(Clone, Debug)]
pub struct Committed {
    /// The snapshot's id.
    pub id: SnapshotId,
    /// Bytes of frames, including those of pages written again in a later round.
    pub frame_bytes: u64,
    /// Bytes appended besides frames: tree nodes, state chunks, fingerprints, the manifest and
    /// headers of new segments.
    pub meta_bytes: u64,
    /// Tree nodes written.
    pub nodes: u64,
    /// Time to make the snapshot durable and publish it, in microseconds.
    pub sync_us: u64,
    /// Why the tag could not be set, if that failed: the snapshot is published all the same.
    pub tag_failure: Option<String>,
    /// The pin, if one was asked for and the medium allows it.
    pub pin: Option<Arc<dyn Pin>>,
}

/// A snapshot being written. Dropping it without [`Self::commit`] takes back all it wrote.
///
/// Only one at a time can be open per store, across all processes.
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
    /// Fingerprints of the pages written.
    fingerprints: Vec<FrameFingerprints>,
    started: Instant,
    /// True once a write failed: some of its pages are missing.
    failed: bool,
    // The last field, so that it is dropped last.
    _lock: Box<dyn WriterLock>,
}

#[derive(Debug)]
struct RegionDraft {
    name: String,
    base: Tree,
    changes: Changes,
}

impl Store {
    /// Begins a snapshot that is based on `parent` or, without a parent, starts a new line.
    ///
    /// # Errors
    /// [`StoreError::Busy`] if another transaction is open, here or in another process;
    /// [`StoreError::Latched`] after an I/O error; [`StoreError::UnknownRef`] if `parent` is
    /// neither published nor pinned.
    pub fn begin(self: &Arc<Self>, parent: Option<SnapshotId>) -> Result<Transaction> {
        let lock = self.start_writing()?;
        let open = |id| Snapshot::load(Arc::clone(self), &self.published_or_held(id)?, None);
        let parent = parent.map(open).transpose()?;
        if self.options.elide.dedup && parent.is_none() {
            // A new line may have much in common with other lines. In a line that continues, the
            // pages this handle wrote itself are the best candidates.
            self.load_fingerprints();
        }
        let segments = self.continue_segments()?;
        Ok(Transaction {
            store: Arc::clone(self),
            parent,
            regions: Vec::new(),
            progress: Arc::default(),
            segments: Some(segments),
            frame_bytes: 0,
            nodes: 0,
            fingerprints: Vec::new(),
            started: Instant::now(),
            failed: false,
            _lock: lock,
        })
    }
}

impl Transaction {
    /// Adds region `name` to the new snapshot. Until written, its pages are those of the parent's
    /// region of that name, or zero if the parent has none. The parent's regions that are not added
    /// are not part of the new snapshot.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if the parent's region has another size, the name was used before,
    /// or `pages` is 0 or above [`MAX_REGION_PAGES`].
    pub fn region(&mut self, name: &str, pages: u64) -> Result<RegionHandle> {
        let inherited = self.parent.as_ref().and_then(|parent| parent.manifest().region(name));
        if let Some(region) = inherited
            && region.pages != pages
        {
            return Err(StoreError::Invalid(format!(
                "region `{name}`: expected {} pages, as in the parent snapshot, found {pages}",
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
        self.regions.push(RegionDraft { name: name.to_owned(), base, changes: Changes::default() });
        Ok(RegionHandle(self.regions.len() - 1))
    }

    /// The progress, through which other threads can watch or cancel.
    #[must_use]
    pub fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    /// Reads `pages` from `source` and appends them compressed. May be called many times: later
    /// contents of a page replace earlier ones.
    ///
    /// # Errors
    /// After any error the transaction can only be dropped.
    pub fn write_pages(
        &mut self,
        region: RegionHandle,
        pages: &PageSet,
        source: &dyn PageSource,
    ) -> Result<WriteStats> {
        self.progress.pages_total.fetch_add(pages.count(), Ordering::Relaxed);
        let already_failed = std::mem::replace(&mut self.failed, true);
        let draft = &mut self.regions[region.0];
        if let Some(last) = pages.last().filter(|last| *last >= draft.base.pages) {
            return Err(StoreError::Invalid(format!(
                "page {last} is beyond region `{}`, which has {} pages",
                draft.name, draft.base.pages
            )));
        }
        let job = Job {
            store: &self.store,
            region: &draft.name,
            pages,
            source,
            parent: draft.base,
            progress: &self.progress,
        };
        let segments = self.segments.as_mut().expect("held until commit");
        let Written { changes, equal, stats, fingerprints } = pipeline::write(segments, &job)?;
        self.failed = already_failed;
        let reverted = draft.changes.overlapping_runs_of(equal);
        draft.changes = std::mem::take(&mut draft.changes).overlay(changes).overlay(reverted);
        self.frame_bytes += stats.stored_bytes;
        self.keep_fingerprints(fingerprints);
        Ok(stats)
    }

    /// Keeps `fingerprints` to be stored at commit, as many as [`FINGERPRINTS_LEN_MAX`] allows.
    fn keep_fingerprints(&mut self, fingerprints: Vec<FrameFingerprints>) {
        let len = |(_, list): &FrameFingerprints| BlockRef::ENCODED_LEN + 1 + list.len() * 4;
        let mut room = FINGERPRINTS_LEN_MAX - self.fingerprints.iter().map(len).sum::<usize>();
        self.fingerprints.extend(fingerprints.into_iter().take_while(|frame| {
            let fits = len(frame) <= room;
            room = room.saturating_sub(len(frame));
            fits
        }));
    }

    /// Writes trees, state and manifest, makes everything durable, and publishes the snapshot.
    ///
    /// # Errors
    /// After any error, nothing is published and what was written is taken back, as far as the
    /// medium allows. An I/O error (other than a full disk) latches the store.
    /// [`StoreError::Invalid`] if an earlier write of pages failed: the snapshot would lack them.
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
            return Err(StoreError::Invalid(
                "cannot commit a snapshot after a failed write: start over".into(),
            ));
        }
        if let Some(tag) = &description.tag {
            crate::reference::check_tag(tag)?;
        }
        let regions = self.write_trees()?;
        let state = self.write_state(&description.state)?;
        let fingerprints = self.write_fingerprints()?;
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
            stats: self.with_figures(description.stats),
        };
        let json = encode_json(&manifest, "the manifest")?;
        let block = self.put_blob(RecordKind::Manifest, &json, "manifest")?;
        let id = Hash::of(&json);
        // Snapshots with equal manifests would share an id; in practice, time or stats differ.
        if self.store.find(id).is_some() {
            return Err(StoreError::Invalid(format!(
                "snapshot {} was already published",
                id.short()
            )));
        }
        self.progress.check()?;
        let syncing = Instant::now();
        let segments = self.segments.as_mut().expect("held until commit");
        let tail = segments.sync().inspect_err(|_| {
            // A full disk latches nothing, but what a failed sync left of this segment is in doubt.
            self.store.writer_state().abandon_tail = true;
        })?;
        let meta_bytes = segments.appended_bytes() - self.frame_bytes;
        // Checked again: the caller may have cancelled during a slow sync.
        self.progress.check()?;
        // Pinned before it is published, so that it can at no time be pruned.
        let pin = description.pin.then(|| self.store.pin_name(id)).flatten();
        // The same parent that the catalog shows for a snapshot whose parent is forgotten later.
        let parent = self.store.catalog().nearest_kept(manifest.parent);
        self.publish(Publication {
            id,
            parent,
            manifest: block,
            time_unix_ms: manifest.time_unix_ms,
            tail,
            fingerprints,
        })?;
        let sync_us = micros(syncing.elapsed());
        // Still under the writer lock, so that no other writer comes in between.
        let tag_failure = description.tag.and_then(|name| {
            let entry = Entry::Tag { name, target: Some(id) };
            self.store.record(entry).err().map(|error| error.to_string())
        });
        Ok(Committed {
            id,
            frame_bytes: self.frame_bytes,
            meta_bytes,
            nodes: self.nodes,
            sync_us,
            tag_failure,
            pin,
        })
    }

    /// Adds the transaction's own figures to `stats`, as far as they are known before the manifest
    /// is written.
    fn with_figures(&self, mut stats: Value) -> Value {
        if let Some(stats) = stats.as_object_mut() {
            let appended = self.segments.as_ref().map_or(0, SegmentWriter::appended_bytes);
            let meta_bytes = appended.saturating_sub(self.frame_bytes);
            stats.insert("meta_bytes".into(), meta_bytes.into());
            stats.insert("write_us".into(), micros(self.started.elapsed()).into());
        }
        stats
    }

    fn write_trees(&mut self) -> Result<Vec<RegionManifest>> {
        let mut regions = Vec::with_capacity(self.regions.len());
        let store = &*self.store;
        let sink = NodeAppender {
            store,
            segments: Mutex::new(self.segments.as_mut().expect("held until commit")),
            encoders: Mutex::default(),
            nodes: AtomicU64::new(0),
        };
        for draft in std::mem::take(&mut self.regions) {
            let apply = || draft.base.apply(store, &sink, store.flush_policy, &draft.changes);
            let tree = store.pool.install(apply)?;
            regions.push(RegionManifest { name: draft.name, pages: tree.pages, root: tree.root });
        }
        self.nodes += sink.nodes.into_inner();
        Ok(regions)
    }

    fn write_fingerprints(&mut self) -> Result<Option<BlockRef>> {
        let fingerprints = std::mem::take(&mut self.fingerprints);
        if fingerprints.is_empty() {
            return Ok(None);
        }
        let payload = encode_fingerprints(&fingerprints);
        // Fingerprints do not compress.
        let record = RecordEncoder::encode_plain(RecordKind::Fingerprints, &payload);
        self.segments.as_mut().expect("held until commit").append(record.view()).map(Some)
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

    /// Appends a blob, or returns the reference to the parent's state chunk if it has the same one.
    fn put_blob(&mut self, kind: RecordKind, json: &[u8], what: &str) -> Result<BlockRef> {
        if json.len() > MAX_BLOB_LEN {
            return Err(StoreError::Invalid(format!(
                "{what}: expected at most {MAX_BLOB_LEN} bytes, found {}",
                json.len()
            )));
        }
        let mut encoder = RecordEncoder::new(1)?;
        let record = encoder.encode(kind, json);
        let known = self
            .parent
            .iter()
            .flat_map(|parent| &parent.manifest().state)
            .find(|chunk| chunk.body.hash == record.hash);
        match known {
            Some(chunk) => Ok(chunk.body),
            None => self.segments.as_mut().expect("held until commit").append(record.view()),
        }
    }

    fn publish(&mut self, publication: Publication) -> Result<()> {
        self.store.append_to_journal(Entry::Publish(publication)).map_err(|failure| {
            if !failure.undone {
                // The record may have been read, so the snapshot's data must stay. If the record is
                // not there, the next writer removes the data.
                self.segments = None;
                self.store.forget_contents();
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
        self.store.forget_contents();
        if let Err(error) = segments.roll_back(&self.store.segments) {
            // The next writer clears away what could not be taken back; it does not append to a
            // segment in doubt.
            tracing::warn!(%error, "could not roll back an unfinished transaction");
            // Close the new segments: their numbers will be given to other files.
            self.store.segments.close_all();
            self.store.writer_state().abandon_tail = true;
        }
        if let Some(cause) = latch {
            self.store.writer_state().latched = Some(cause);
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The most bytes of fingerprints that one snapshot stores: enough for 18 GiB of pages.
const FINGERPRINTS_LEN_MAX: usize = 32 << 20;

/// Encodes `value` as JSON and checks that it can be read back: the parser has limits, such as
/// the depth of nesting, that the serializer does not have.
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

/// Encodes nodes on any thread and appends them.
struct NodeAppender<'a> {
    store: &'a Store,
    segments: Mutex<&'a mut SegmentWriter>,
    /// Encoders not in use.
    encoders: Mutex<Vec<RecordEncoder>>,
    nodes: AtomicU64,
}

impl NodeSink for NodeAppender<'_> {
    fn put(&self, node: Node) -> Result<BlockRef> {
        let spare = lock(&self.encoders).pop();
        let mut encoder = match spare {
            Some(encoder) => encoder,
            // Nodes are mostly hashes and small numbers: a low level does as well as any.
            None => RecordEncoder::new(1)?,
        };
        let record = encoder.encode_node(&node.encode());
        let block = lock(&self.segments).append(record)?;
        lock(&self.encoders).push(encoder);
        self.store.nodes.insert(block.hash, Arc::new(node));
        self.nodes.fetch_add(1, Ordering::Relaxed);
        Ok(block)
    }
}
