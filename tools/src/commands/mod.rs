//! The commands, and what several of them share.

pub(crate) mod clones;
pub(crate) mod control;
pub(crate) mod diff;
pub(crate) mod export;
mod export_stream;
mod export_tar;
mod graph;
pub(crate) mod import;
pub(crate) mod inspect;
pub(crate) mod log;
pub(crate) mod manual;
pub(crate) mod mount;
pub(crate) mod pager;
pub(crate) mod retention;
pub(crate) mod run;
pub(crate) mod show;
mod tell;
pub(crate) mod top;
pub(crate) mod verify;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use frazil_snapstore::{Snapshot, SnapshotId, Store, StoreOptions, reference};
use frazil_vmm::privileges::User;
use rustix::time::{ClockId, clock_gettime};

/// When this process entered `main`, on the system-wide monotonic clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Started {
    pub monotonic_ns: u64,
}

impl Started {
    pub(crate) fn now() -> Self {
        Self { monotonic_ns: monotonic_ns() }
    }
}

/// The current time, on a clock that all processes of this host share.
pub(crate) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The store that a command uses if none is named.
pub(crate) fn default_store() -> PathBuf {
    std::env::var_os("FRAZIL_STORE").map_or_else(|| PathBuf::from("frazil-store"), PathBuf::from)
}

/// Opens an existing store.
pub(crate) fn open_store(path: Option<&Path>) -> anyhow::Result<Arc<Store>> {
    let path = path.map_or_else(default_store, Path::to_path_buf);
    Ok(Store::open(&path, StoreOptions::default())?)
}

/// Finds the snapshot that `STORE@REF` names. Returns the store's path, the store, and the
/// snapshot's id.
pub(crate) fn find_snapshot(
    text: &str,
    options: StoreOptions,
) -> anyhow::Result<(PathBuf, Arc<Store>, SnapshotId)> {
    let (path, reference) = reference::split(text);
    let path = path.map_or_else(default_store, PathBuf::from);
    let store = Store::open(&path, options)?;
    let id = store.resolve(reference)?.id;
    Ok((path, store, id))
}

/// Runs `with`, which opens files, with the rights of `user`, if one is given.
pub(crate) fn as_user<T>(
    user: Option<&User>,
    with: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    match user {
        None => with(),
        Some(user) => user.act_as(with)?.with_context(|| format!("as user `{}`", user.spec())),
    }
}

/// Opens the snapshot that `STORE@REF` names, for reading. Returns the store's path and the
/// snapshot.
pub(crate) fn open_snapshot(text: &str) -> anyhow::Result<(PathBuf, Snapshot)> {
    let (path, store, id) = find_snapshot(text, StoreOptions::default())?;
    Ok((path, store.snapshot(id)?))
}

/// True if both paths lead to the same folder.
pub(crate) fn same_folder(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => a == b,
    }
}

/// The tags of every snapshot that has any.
pub(crate) fn tags_by_snapshot(store: &Store) -> BTreeMap<SnapshotId, Vec<String>> {
    let mut tags: BTreeMap<SnapshotId, Vec<String>> = BTreeMap::new();
    for (tag, id) in store.tags() {
        tags.entry(id).or_default().push(tag);
    }
    tags
}

/// A snapshot's tags and message, for people: `[tag] message`.
pub(crate) fn tags_and_message(tags: &[String], message: &str) -> String {
    let tags = tags.iter().map(|tag| format!("[{tag}]"));
    let parts: Vec<String> =
        tags.chain([message.to_owned()]).filter(|part| !part.is_empty()).collect();
    parts.join(" ")
}

/// Prints `value` as one line of JSON.
pub(crate) fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    outln!("{}", serde_json::to_string(value)?);
    Ok(())
}
