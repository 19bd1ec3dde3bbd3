//! The commands, and what several of them share.

pub(crate) mod control;
pub(crate) mod run;
pub(crate) mod store;
pub(crate) mod verify;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use frazil_snapstore::{Snapshot, Store, StoreOptions, reference};
use rustix::time::{ClockId, clock_gettime};

/// When this process started to run our code, on the system-wide monotonic clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Started {
    pub monotonic_ns: u64,
}

impl Started {
    pub(crate) fn now() -> Self {
        Self { monotonic_ns: monotonic_ns() }
    }
}

/// Now, on the clock that all processes of this host share.
pub(crate) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The store a command works on if it names none.
pub(crate) fn default_store() -> PathBuf {
    std::env::var_os("FRAZIL_STORE").map_or_else(|| PathBuf::from("frazil-store"), PathBuf::from)
}

/// Opens an existing store.
pub(crate) fn open_store(path: Option<&Path>) -> anyhow::Result<Arc<Store>> {
    let path = path.map_or_else(default_store, Path::to_path_buf);
    Ok(Store::open(&path, StoreOptions::default())?)
}

/// Finds the snapshot that `STORE@REF` names.
pub(crate) fn open_snapshot(
    text: &str,
    options: StoreOptions,
) -> anyhow::Result<(PathBuf, Snapshot)> {
    let (path, reference) = reference::split(text);
    let path = path.map_or_else(default_store, PathBuf::from);
    let store = Store::open(&path, options)?;
    let info = store.resolve(reference)?;
    Ok((path, store.snapshot(info.id)?))
}

/// Prints `value` as one line of JSON.
pub(crate) fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    outln!("{}", serde_json::to_string(value)?);
    Ok(())
}
