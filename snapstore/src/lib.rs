//! The snapshot store of frazil: memory as copy-on-write page trees in append-only segments.
//!
//! A [`Store`] holds [`Snapshot`]s. A snapshot is a manifest: regions of 4 KiB pages, each a tree
//! of references that carry location *and* BLAKE3 hash, and opaque named state. A [`Transaction`]
//! writes the pages that changed and the few nodes above them; everything else is shared with the
//! parent. [`pager`] serves a snapshot's pages to a mapping through userfaultfd.
//!
//! This crate knows pages, regions and opaque state, and nothing about virtual machines.
//! `FORMAT.md` specifies the on-disk format, `DESIGN.md` gives the reasons for it.

mod catalog;
mod changes;
mod codec;
pub mod cow;
mod create;
mod delta;
mod diff;
mod elide;
mod error;
mod export;
mod extents;
mod format;
mod frame;
#[doc(hidden)]
pub mod fuzzing;
mod id;
mod index_cache;
mod journal;
mod journal_entry;
mod layout;
mod manifest;
mod map;
mod mark;
mod node;
mod numbered;
mod pack;
mod page;
mod page_set;
pub mod pager;
mod pins;
mod pipeline;
mod progress;
mod prune;
mod record;
pub mod reference;
mod repack;
pub mod retention;
pub mod search;
mod segment;
mod sift;
mod snapshot;
mod storage;
mod store;
mod transaction;
mod tree;
mod uffd;
mod verify;
mod working_set;
mod writeback;
mod writer;

pub use catalog::SnapshotInfo;
pub use diff::{DiffOptions, PageRange, RegionDiff, SnapshotDiff, StateDiff, diff, diff_region};
pub use error::{Result, StoreError};
pub use export::{ExportError, ExportProgress, export, export_at};
pub use format::{
    FORMAT_VERSION, JOURNAL_FILE, MAX_FRAME_PAGES, SEGMENT_FOLDER, STORE_FILE, pack_name,
    segment_name,
};
pub use id::{BlockRef, Hash, SnapshotId};
pub use manifest::{Manifest, RegionManifest, StateChunk, StateRef};
pub use map::{MapRange, PageKind, RegionMap, map};
pub use node::{Location, MAX_REGION_PAGES, Run};
pub use page::{PAGE_SIZE, Page, PageSource, is_zero};
pub use page_set::PageSet;
pub use progress::{Progress, WriteStats};
pub use prune::{PruneOptions, PruneProgress, PruneReport};
pub use snapshot::{RegionReader, Snapshot};
pub use storage::{DirStorage, LockError, Pin, Storage, StoreFile, WriterLock};
pub use store::{Elide, Store, StoreOptions, unix_ms};
pub use transaction::{Committed, Description, RegionHandle, Transaction};
pub use verify::{Damage, VerifyProgress, VerifyReport, verify};
pub use working_set::WorkingSet;
