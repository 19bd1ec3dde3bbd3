//! Reading a snapshot: its manifest, its state chunks, its regions' pages.

use std::sync::Arc;

use crate::codec::Malformed;
use crate::error::{Result, StoreError};
use crate::format::{RecordKind, segment_name};
use crate::id::{BlockRef, Hash, SnapshotId};
use crate::manifest::{Manifest, StateChunk, StateRef};
use crate::node::{Location, Run};
use crate::page::{PAGE_SIZE, Page};
use crate::store::{SnapshotInfo, Store, check_frame_len};
use crate::tree::Tree;

/// A snapshot opened for reading.
#[derive(Clone, Debug)]
pub struct Snapshot {
    store: Arc<Store>,
    id: SnapshotId,
    manifest: Arc<Manifest>,
}

impl Snapshot {
    pub(crate) fn load(store: Arc<Store>, info: &SnapshotInfo) -> Result<Self> {
        let manifest = store.segments.read(&info.manifest, RecordKind::Manifest, |record| {
            let json = record.decode()?;
            let found = Hash::of(&json);
            if found != info.id {
                return Err(Malformed::new("snapshot id", info.id, found));
            }
            serde_json::from_slice::<Manifest>(&json)
                .map_err(|error| Malformed::new("manifest", "JSON of a manifest", error))
        })?;
        Ok(Self { store, id: info.id, manifest: Arc::new(manifest) })
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// The store it is in.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// What it holds.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The region called `name`.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if the snapshot has none of that name.
    pub fn region(&self, name: &str) -> Result<RegionReader> {
        let region = self.manifest.region(name).ok_or_else(|| {
            let names: Vec<_> =
                self.manifest.regions.iter().map(|region| region.name.as_str()).collect();
            StoreError::Invalid(format!(
                "snapshot {} has no region `{name}`; it has {}",
                self.id.short(),
                names.join(", ")
            ))
        })?;
        Ok(RegionReader {
            store: Arc::clone(&self.store),
            name: region.name.clone(),
            tree: Tree { root: region.root, pages: region.pages },
        })
    }

    /// Reads the state chunk that `chunk` refers to.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if it is damaged.
    pub fn state(&self, chunk: &StateRef) -> Result<StateChunk> {
        let body = self.store.segments.read(&chunk.body, RecordKind::Blob, |record| {
            serde_json::from_slice(&record.decode()?)
                .map_err(|error| Malformed::new("state chunk", "JSON", error))
        })?;
        Ok(StateChunk {
            name: chunk.name.clone(),
            kind: chunk.kind.clone(),
            version: chunk.version,
            body,
        })
    }

    /// Reads every state chunk, in the manifest's order.
    ///
    /// # Errors
    /// As [`Self::state`].
    pub fn states(&self) -> Result<Vec<StateChunk>> {
        self.manifest.state.iter().map(|chunk| self.state(chunk)).collect()
    }
}

/// Reads the pages of one region of a snapshot, from any thread.
#[derive(Clone, Debug)]
pub struct RegionReader {
    store: Arc<Store>,
    name: String,
    tree: Tree,
}

impl RegionReader {
    /// The region's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of pages the region ranges over.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.tree.pages
    }

    /// Where `page` is; pages the tree does not name are zero.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if a node on the way is damaged.
    pub fn locate(&self, page: u64) -> Result<Location> {
        self.check_page(page)?;
        self.tree.page(self.store.as_ref(), page)
    }

    /// The runs with contents among the pages `first .. first + count`, ascending; every other
    /// page there is zero.
    ///
    /// # Errors
    /// As [`Self::locate`].
    pub fn runs(&self, first: u64, count: u64) -> Result<Vec<Run>> {
        self.tree.runs(self.store.as_ref(), first, first.saturating_add(count))
    }

    /// Copies `page` into `buf`, verified.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if it, or a node on the way to it, is damaged.
    pub fn read_page(&self, page: u64, buf: &mut Page) -> Result<()> {
        match self.locate(page)? {
            Location::Zero => buf.fill(0),
            Location::Frame { frame, slot } => {
                let pages = self.store.frame(&frame)?;
                buf.copy_from_slice(slot_bytes(&frame, &pages, slot, 1)?);
            }
        }
        Ok(())
    }

    /// The decoded bytes of `run`: `run.count` pages, verified. `None` for zero pages.
    ///
    /// # Errors
    /// As [`Self::read_page`].
    pub fn read_run<T>(&self, run: &Run, with: impl FnOnce(&[u8]) -> T) -> Result<Option<T>> {
        match run.location {
            Location::Zero => Ok(None),
            Location::Frame { frame, slot } => {
                let pages = self.store.frame(&frame)?;
                Ok(Some(with(slot_bytes(&frame, &pages, slot, run.count)?)))
            }
        }
    }

    /// Decodes a whole frame straight into `out`, verified, without the cache: for a reader that
    /// wants every page of it. Returns false, with `out` untouched, if the frame is not exactly
    /// as long as `out`.
    ///
    /// # Errors
    /// As [`Self::read_page`].
    pub fn read_whole_frame(&self, frame: &BlockRef, out: &mut [u8]) -> Result<bool> {
        self.store.segments.read(frame, RecordKind::Frame, |record| {
            check_frame_len(record.raw_len())?;
            if record.raw_len() != out.len() {
                return Ok(false);
            }
            record.decode_into(out).map(|()| true)
        })
    }

    fn check_page(&self, page: u64) -> Result<()> {
        if page < self.tree.pages {
            return Ok(());
        }
        Err(StoreError::Invalid(format!(
            "page {page} is beyond region `{}`, which has {} pages",
            self.name, self.tree.pages
        )))
    }
}

/// The bytes of `count` slots from `slot` on; a reference beyond the frame's end is damage.
pub(crate) fn slot_bytes<'a>(
    frame: &BlockRef,
    pages: &'a [u8],
    slot: u8,
    count: u64,
) -> Result<&'a [u8]> {
    let start = usize::from(slot) * PAGE_SIZE;
    let end = usize::try_from(count)
        .ok()
        .and_then(|count| count.checked_mul(PAGE_SIZE))
        .and_then(|len| start.checked_add(len));
    end.and_then(|end| pages.get(start..end)).ok_or_else(|| StoreError::Corrupt {
        file: segment_name(frame.segment),
        offset: u64::from(frame.offset),
        what: "frame: slots a tree node refers to".into(),
        expected: format!("slots {slot} to {}", u64::from(slot) + count),
        found: format!("{} pages", pages.len() / PAGE_SIZE),
    })
}
