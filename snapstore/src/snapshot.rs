//! Reading a snapshot: its manifest, its state chunks, its regions' pages.

use std::sync::Arc;

use crate::catalog::SnapshotInfo;
use crate::codec::{Decoded, Malformed};
use crate::error::{Result, StoreError};
use crate::format::RecordKind;
use crate::id::{Hash, SnapshotId};
use crate::manifest::{Manifest, StateChunk, StateRef};
use crate::node::{Location, MAX_REGION_PAGES, Run};
use crate::page::{PAGE_SIZE, Page};
use crate::storage::Pin;
use crate::store::Store;
use crate::tree::Tree;

/// A snapshot opened for reading.
#[derive(Clone, Debug)]
pub struct Snapshot {
    store: Arc<Store>,
    id: SnapshotId,
    manifest: Arc<Manifest>,
    pin: Option<Arc<dyn Pin>>,
    /// Segment and offset of the manifest's block: whatever was written later comes after it.
    pub(crate) written_at: (u32, u32),
}

impl Snapshot {
    pub(crate) fn load(
        store: Arc<Store>,
        info: &SnapshotInfo,
        pin: Option<Arc<dyn Pin>>,
    ) -> Result<Self> {
        let written_at = (info.manifest.segment, info.manifest.offset);
        let manifest = store.reading(|| {
            store.segments.read(&info.manifest, RecordKind::Manifest, |record| {
                let json = record.decode()?;
                let found = Hash::of(&json);
                if found != info.id {
                    return Err(Malformed::new("snapshot id", info.id, found));
                }
                parse_manifest(&json)
            })
        })?;
        Ok(Self { store, id: info.id, manifest: Arc::new(manifest), pin, written_at })
    }

    /// The snapshot's id.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// The store that holds the snapshot.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// The manifest: what the snapshot holds.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The pin that keeps the snapshot from being pruned, if it was opened by [`Store::pin`].
    #[must_use]
    pub fn pin(&self) -> Option<Arc<dyn Pin>> {
        self.pin.clone()
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
            snapshot: self.id,
            name: region.name.clone(),
            tree: Tree { root: region.root, pages: region.pages },
            _pin: self.pin.clone(),
        })
    }

    /// Reads the state chunk that `chunk` refers to.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if the chunk is damaged.
    pub fn state(&self, chunk: &StateRef) -> Result<StateChunk> {
        let body = self.store.reading(|| {
            self.store.segments.read(&chunk.body, RecordKind::Blob, |record| {
                serde_json::from_slice(&record.decode()?)
                    .map_err(|error| Malformed::new("state chunk", "JSON", error))
            })
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

fn parse_manifest(json: &[u8]) -> Decoded<Manifest> {
    let manifest: Manifest = serde_json::from_slice(json)
        .map_err(|error| Malformed::new("manifest", "a manifest in JSON", error))?;
    match manifest.regions.iter().find(|region| !(1..=MAX_REGION_PAGES).contains(&region.pages)) {
        Some(region) => Err(Malformed::new(
            "pages of a region",
            format!("1 to {MAX_REGION_PAGES}"),
            region.pages,
        )),
        None => Ok(manifest),
    }
}

/// Reads the pages of one region of a snapshot, from any thread.
#[derive(Clone, Debug)]
pub struct RegionReader {
    store: Arc<Store>,
    snapshot: SnapshotId,
    name: String,
    tree: Tree,
    _pin: Option<Arc<dyn Pin>>,
}

impl RegionReader {
    /// The region's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The id of the snapshot the region belongs to.
    #[must_use]
    pub fn snapshot(&self) -> SnapshotId {
        self.snapshot
    }

    /// The store that holds the snapshot.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// The region's size in pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.tree.pages
    }

    /// Where `page` is stored; pages the tree does not name are zero.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if a node on the way is damaged; [`StoreError::Invalid`] if `page`
    /// is beyond the region.
    pub fn locate(&self, page: u64) -> Result<Location> {
        self.check_page(page)?;
        self.tree.page(self.store.as_ref(), page)
    }

    /// The runs with contents among the pages `first .. first + count`, ascending; every other
    /// page there is zero.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if a node on the way is damaged.
    pub fn runs(&self, first: u64, count: u64) -> Result<Vec<Run>> {
        self.tree.runs(self.store.as_ref(), first, first.saturating_add(count))
    }

    /// Copies `page` into `buf`, verified.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if its frame, or a node on the way to it, is damaged;
    /// [`StoreError::Invalid`] if `page` is beyond the region.
    pub fn read_page(&self, page: u64, buf: &mut Page) -> Result<()> {
        self.store.read_location(&self.locate(page)?, buf)
    }

    /// Fills `out` with the pages from `first` on, verified.
    ///
    /// # Errors
    /// As [`Self::read_page`]; [`StoreError::Invalid`] if `out` is not a whole number of pages or
    /// reaches beyond the region.
    pub fn read_pages(&self, first: u64, out: &mut [u8]) -> Result<()> {
        let count = (out.len() / PAGE_SIZE) as u64;
        let fits = first.checked_add(count).is_some_and(|end| end <= self.tree.pages);
        if !out.len().is_multiple_of(PAGE_SIZE) || !fits {
            return Err(StoreError::Invalid(format!(
                "expected whole pages within the {} pages of region `{}`, found {} bytes from page \
                 {first}",
                self.tree.pages,
                self.name,
                out.len()
            )));
        }
        let mut at = first;
        for run in self.runs(first, count)? {
            let start = (run.first - first) as usize * PAGE_SIZE;
            let end = (run.end() - first) as usize * PAGE_SIZE;
            out[(at - first) as usize * PAGE_SIZE..start].fill(0);
            self.store.read_location(&run.location, &mut out[start..end])?;
            at = run.end();
        }
        out[(at - first) as usize * PAGE_SIZE..].fill(0);
        Ok(())
    }

    /// Copies the pages of `run` into `out`, verified.
    ///
    /// # Errors
    /// As [`Self::read_page`].
    ///
    /// # Panics
    /// If `out` is not `run.count` pages long.
    pub fn read_run(&self, run: &Run, out: &mut [u8]) -> Result<()> {
        assert_eq!(out.len() as u64, run.count * PAGE_SIZE as u64, "one page a page of the run");
        self.store.read_location(&run.location, out)
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
