//! What the journal amounts to: the snapshots, the tags, and which files hold what.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use crate::error::Result;
use crate::id::{BlockRef, SnapshotId};
use crate::journal::{self, Cursor};
use crate::journal_entry::{Entry, MAX_LISTED, Publication};
use crate::layout::Layout;
use crate::storage::StoreFile;

/// A published snapshot, as the catalog lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// The snapshot's id.
    pub id: SnapshotId,
    /// The snapshot it was based on; if that was forgotten, the nearest ancestor that was not.
    pub parent: Option<SnapshotId>,
    /// When the snapshot was cut, in Unix milliseconds.
    pub time_unix_ms: u64,
    pub(crate) manifest: BlockRef,
    pub(crate) fingerprints: Option<BlockRef>,
}

impl SnapshotInfo {
    /// Bytes of the manifest as stored, with its record header.
    #[must_use]
    pub fn manifest_bytes(&self) -> u64 {
        u64::from(self.manifest.len)
    }
}

/// The state of the store as of where the journal was read to.
#[derive(Debug)]
pub(crate) struct Catalog {
    pub cursor: Cursor,
    snapshots: Vec<SnapshotInfo>,
    index: HashMap<SnapshotId, usize>,
    tags: BTreeMap<String, SnapshotId>,
    /// Snapshots forgotten since the journal was last rewritten, or listed there as forgotten:
    /// somebody may still be reading them.
    forgotten: HashMap<SnapshotId, SnapshotInfo>,
    /// Where the newest transaction ended: segment and offset.
    pub tail: Option<(u32, u64)>,
    /// Which files hold which blocks.
    pub layout: Arc<Layout>,
}

impl Catalog {
    pub fn new(cursor: Cursor) -> Self {
        Self {
            cursor,
            snapshots: Vec::new(),
            index: HashMap::new(),
            tags: BTreeMap::new(),
            forgotten: HashMap::new(),
            tail: None,
            layout: Arc::default(),
        }
    }

    /// Reads a whole journal.
    pub fn read(journal: &dyn StoreFile, store: [u8; 16]) -> Result<Self> {
        let mut catalog = Self::new(Cursor::start(&journal::read_header(journal, store)?));
        catalog.advance(journal)?;
        Ok(catalog)
    }

    /// The published snapshots, oldest first.
    pub fn snapshots(&self) -> &[SnapshotInfo] {
        &self.snapshots
    }

    pub fn tags(&self) -> &BTreeMap<String, SnapshotId> {
        &self.tags
    }

    pub fn find(&self, id: SnapshotId) -> Option<SnapshotInfo> {
        self.index.get(&id).map(|index| self.snapshots[*index])
    }

    /// A forgotten snapshot, whose blocks may still exist.
    pub fn find_forgotten(&self, id: SnapshotId) -> Option<SnapshotInfo> {
        self.forgotten.get(&id).copied()
    }

    /// `parent` or, if it was forgotten, its nearest ancestor that was not.
    pub fn nearest_kept(&self, mut parent: Option<SnapshotId>) -> Option<SnapshotId> {
        for _ in 0..=self.forgotten.len() {
            let Some(info) = parent.and_then(|id| self.forgotten.get(&id)) else { return parent };
            parent = info.parent;
        }
        None
    }

    /// Applies what was appended to the journal, or nothing if it is damaged.
    pub fn advance(&mut self, journal: &dyn StoreFile) -> Result<()> {
        let mut cursor = self.cursor.clone();
        let entries = cursor.advance(journal)?;
        self.cursor = cursor;
        entries.into_iter().for_each(|entry| self.take(entry));
        Ok(())
    }

    pub fn take(&mut self, entry: Entry) {
        match entry {
            Entry::Publish(publication) => self.publish(publication),
            Entry::Tag { name, target: Some(id) } => {
                self.tags.insert(name, id);
            }
            Entry::Tag { name, target: None } => {
                self.tags.remove(&name);
            }
            Entry::Forget(ids) => self.forget(&ids),
            Entry::Relayout(step) => {
                self.tail = step.tail.or(self.tail);
                Arc::make_mut(&mut self.layout).apply(&step);
            }
        }
    }

    fn publish(&mut self, publication: Publication) {
        let Publication { id, parent, manifest, time_unix_ms, tail, fingerprints } = publication;
        self.index.insert(id, self.snapshots.len());
        self.forgotten.remove(&id);
        self.snapshots.push(SnapshotInfo { id, parent, time_unix_ms, manifest, fingerprints });
        self.tail = Some(tail);
    }

    /// Removes snapshots; their children become children of the nearest ancestor that is kept.
    fn forget(&mut self, ids: &[SnapshotId]) {
        let gone: HashSet<SnapshotId> = ids.iter().copied().collect();
        let parent_of: HashMap<SnapshotId, Option<SnapshotId>> = self
            .snapshots
            .iter()
            .filter(|info| gone.contains(&info.id))
            .map(|info| (info.id, info.parent))
            .collect();
        let (gone_infos, mut kept): (Vec<_>, Vec<_>) =
            self.snapshots.drain(..).partition(|info| gone.contains(&info.id));
        for info in &mut kept {
            // Parents are older than their children, but a crafted journal could have a cycle:
            // bound the loop.
            for _ in 0..parent_of.len() {
                let Some(ancestor) = info.parent.and_then(|parent| parent_of.get(&parent)) else {
                    break;
                };
                info.parent = *ancestor;
            }
        }
        self.snapshots = kept;
        self.index =
            self.snapshots.iter().enumerate().map(|(index, info)| (info.id, index)).collect();
        self.forgotten.extend(gone_infos.into_iter().map(|info| (info.id, info)));
        self.tags.retain(|_, target| !gone.contains(target));
    }

    /// The entries of a rewritten journal with the same meaning: the layout, the `pinned` snapshots
    /// that were forgotten, the published snapshots, and the tags.
    pub fn records(&self, pinned: &[SnapshotId]) -> Vec<Entry> {
        let layout = self.layout.as_steps(self.tail).into_iter().map(Entry::Relayout);
        let tail = self.tail.unwrap_or_default();
        let publish = |info: &SnapshotInfo| {
            let SnapshotInfo { id, parent, time_unix_ms, manifest, fingerprints } = *info;
            Entry::Publish(Publication { id, parent, manifest, time_unix_ms, tail, fingerprints })
        };
        let kept = self.snapshots.iter().map(publish);
        // The new journal no longer tells which ancestors of these were forgotten.
        let relinked =
            |info: &SnapshotInfo| SnapshotInfo { parent: self.nearest_kept(info.parent), ..*info };
        let forgotten: Vec<SnapshotInfo> =
            pinned.iter().filter_map(|id| self.forgotten.get(id)).map(relinked).collect();
        let ids: Vec<SnapshotId> = forgotten.iter().map(|info| info.id).collect();
        let tags =
            self.tags.iter().map(|(name, id)| Entry::Tag { name: name.clone(), target: Some(*id) });
        // Forgotten ones come before the others, so that `latest` stays the same.
        layout
            .chain(forgotten.iter().map(publish))
            .chain(ids.chunks(MAX_LISTED).map(|ids| Entry::Forget(ids.to_vec())))
            .chain(kept)
            .chain(tags)
            .collect()
    }
}
