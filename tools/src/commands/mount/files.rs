//! Open files of a mounted store, and reads from them. Knows nothing of FUSE.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use frazil_snapstore::{PAGE_SIZE, RegionReader, Snapshot, SnapshotId};

use super::node::{Node, Part};
use super::view::{Attr, Entry, Refused, Result, View};

/// An open file or folder.
pub(super) enum Open {
    /// A folder's entries as of when it was opened.
    Folder(Vec<Entry>),
    Text(Attr, Arc<[u8]>),
    Region(OpenRegion),
}

/// An open region. While it is open, its snapshot stays readable even if it is forgotten and the
/// store is pruned, just as an open file that is removed does.
pub(super) struct OpenRegion {
    attr: Attr,
    reader: RegionReader,
    /// The region's path, for error messages.
    path: String,
    /// Shared by all open files of the snapshot.
    _pinned: Arc<Snapshot>,
}

/// What to seek to in a file with holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seek {
    Data,
    Hole,
}

impl Open {
    /// The attributes of a file; None for a folder.
    pub(super) fn attr(&self) -> Option<Attr> {
        match self {
            Self::Folder(_) => None,
            Self::Text(attr, _) => Some(*attr),
            Self::Region(region) => Some(region.attr),
        }
    }

    /// The path of a region; empty for anything else.
    pub(super) fn path(&self) -> &str {
        match self {
            Self::Region(region) => &region.path,
            Self::Folder(_) | Self::Text(..) => "",
        }
    }

    /// At most `len` bytes from `offset` on; fewer only at the end of the file.
    pub(super) fn read(&self, offset: u64, len: u32) -> Result<Vec<u8>> {
        match self {
            Self::Folder(_) => Err(Refused::IsAFolder),
            Self::Text(attr, text) => {
                let [start, end] = [offset, offset.saturating_add(len.into())]
                    .map(|at| at.min(attr.len_bytes) as usize);
                Ok(text[start..end].to_vec())
            }
            Self::Region(region) => region.read(offset, len),
        }
    }

    /// The first offset, from `offset` on, where data or a hole is.
    pub(super) fn seek(&self, offset: u64, what: Seek) -> Result<u64> {
        let attr = self.attr().ok_or(Refused::IsAFolder)?;
        if offset >= attr.len_bytes {
            return Err(Refused::Beyond);
        }
        let Self::Region(region) = self else {
            return Ok(if what == Seek::Data { offset } else { attr.len_bytes });
        };
        let page = offset / PAGE_SIZE as u64;
        let found = match what {
            Seek::Data => region.reader.next_contents(page)?.ok_or(Refused::Beyond)?,
            Seek::Hole => region.reader.next_zero(page)?,
        };
        let place = (found * PAGE_SIZE as u64).max(offset);
        // Every file ends with a virtual hole.
        Ok(place.min(attr.len_bytes))
    }
}

impl OpenRegion {
    fn read(&self, offset: u64, len: u32) -> Result<Vec<u8>> {
        let end = offset.saturating_add(len.into()).min(self.attr.len_bytes);
        if offset >= end {
            return Ok(Vec::new());
        }
        let page_bytes = PAGE_SIZE as u64;
        let (first, last) = (offset / page_bytes, end.div_ceil(page_bytes));
        let mut pages = vec![0; (last - first) as usize * PAGE_SIZE];
        self.reader.read_pages(first, &mut pages)?;
        pages.truncate((end - first * page_bytes) as usize);
        pages.drain(..(offset - first * page_bytes) as usize);
        Ok(pages)
    }
}

/// The open files, by handle.
#[derive(Default)]
pub(super) struct OpenFiles {
    open: Mutex<(u64, HashMap<u64, Arc<Open>>)>,
    pinned: Mutex<HashMap<SnapshotId, Weak<Snapshot>>>,
}

impl OpenFiles {
    /// Opens the file or folder `node`. Returns its handle.
    pub(super) fn open(&self, view: &View, node: Node) -> Result<u64> {
        let open = match node {
            Node::In(number, part @ (Part::Manifest | Part::Chunk(_))) => {
                let text = view.known(number)?.text(part)?;
                Open::Text(view.attr(node)?, text)
            }
            Node::In(number, Part::Region(place)) => {
                let known = view.known(number)?;
                let file = known.files.regions.get(usize::from(place)).ok_or(Refused::NotFound)?;
                let (id, name) = view.id(number)?;
                let pinned = self.pin(view, id)?;
                Open::Region(OpenRegion {
                    attr: view.attr(node)?,
                    reader: pinned.region(&file.region)?,
                    path: format!("ids/{name}/{}/{}", file.folder.name(), file.name),
                    _pinned: pinned,
                })
            }
            node => Open::Folder(view.list(node)?),
        };
        let mut files = self.files();
        files.0 += 1;
        let handle = files.0;
        files.1.insert(handle, Arc::new(open));
        Ok(handle)
    }

    /// The open file of `handle`.
    pub(super) fn get(&self, handle: u64) -> Result<Arc<Open>> {
        self.files().1.get(&handle).map(Arc::clone).ok_or(Refused::BadHandle)
    }

    pub(super) fn close(&self, handle: u64) {
        let closed = self.files().1.remove(&handle);
        // Dropped outside the lock, since its pin may go with it.
        drop(closed);
    }

    fn files(&self) -> MutexGuard<'_, (u64, HashMap<u64, Arc<Open>>)> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pin(&self, view: &View, id: SnapshotId) -> Result<Arc<Snapshot>> {
        let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(snapshot) = pinned.get(&id).and_then(Weak::upgrade) {
            return Ok(snapshot);
        }
        pinned.retain(|_, snapshot| snapshot.strong_count() > 0);
        let snapshot = Arc::new(view.store.pin(id)?);
        pinned.insert(id, Arc::downgrade(&snapshot));
        Ok(snapshot)
    }
}
