//! A snapshot as files: what `frazil mount` shows and `frazil export --format tar` writes.
//!
//! ```text
//! manifest.json       a description of the snapshot
//! memory/ram          guest memory: byte N is guest physical address N
//! disks/disk0         each disk, as long as the disk is
//! state/vcpu0.json    each state chunk: name, kind, version, body
//! ```

use std::borrow::Cow;
use std::fmt::Write;

use anyhow::Context;
use frazil_snapstore::{PAGE_SIZE, RegionReader, Snapshot};
use frazil_vmm::disk::SavedDisk;
use frazil_vmm::state::{ChunkSet, Saved};
use serde_json::json;

/// The longest name that Linux file systems take, in bytes.
const NAME_LEN_MAX: usize = 255;

/// The folders of a snapshot that hold more files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Folder {
    Memory,
    Disks,
    State,
}

impl Folder {
    pub(crate) const ALL: [Self; 3] = [Self::Memory, Self::Disks, Self::State];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Disks => "disks",
            Self::State => "state",
        }
    }
}

/// The name of the manifest's file.
pub(crate) const MANIFEST_FILE: &str = "manifest.json";

/// A region as a file.
#[derive(Clone, Debug)]
pub(crate) struct RegionFile {
    /// [`Folder::Memory`] or [`Folder::Disks`].
    pub folder: Folder,
    /// The name of the file.
    pub name: String,
    /// The name of the region.
    pub region: String,
}

/// The files of one snapshot.
#[derive(Debug)]
pub(crate) struct SnapshotFiles {
    pub snapshot: Snapshot,
    /// In the order of the manifest.
    pub regions: Vec<RegionFile>,
    /// Names of the state files, in the manifest's order of chunks.
    pub state: Vec<String>,
}

impl SnapshotFiles {
    pub(crate) fn new(snapshot: Snapshot) -> Self {
        let manifest = snapshot.manifest();
        let regions = manifest
            .regions
            .iter()
            .map(|region| {
                let is_disk = manifest
                    .state
                    .iter()
                    .any(|chunk| chunk.name == region.name && chunk.kind == SavedDisk::KIND);
                RegionFile {
                    folder: if is_disk { Folder::Disks } else { Folder::Memory },
                    name: file_name(&region.name).into_owned(),
                    region: region.name.clone(),
                }
            })
            .collect();
        let state =
            manifest.state.iter().map(|chunk| file_name(&format!("{}.json", chunk.name)).into());
        let state = state.collect();
        Self { snapshot, regions, state }
    }

    /// The length of a region's file in bytes.
    ///
    /// # Errors
    /// Those of the store, if the chunk with a disk's length cannot be read.
    pub(crate) fn len_bytes(&self, file: &RegionFile) -> anyhow::Result<u64> {
        region_len_bytes(&self.snapshot, &self.snapshot.region(&file.region)?)
    }

    /// The contents of [`MANIFEST_FILE`].
    ///
    /// # Errors
    /// If it cannot be encoded.
    pub(crate) fn manifest_json(&self) -> anyhow::Result<Vec<u8>> {
        let mut manifest = serde_json::to_value(self.snapshot.manifest())?;
        manifest["id"] = json!(self.snapshot.id());
        pretty(&manifest)
    }

    /// The contents of the file of state chunk `index`.
    ///
    /// # Errors
    /// If there is no such chunk; those of the store, if it cannot be read.
    pub(crate) fn state_json(&self, index: usize) -> anyhow::Result<Vec<u8>> {
        let chunk = self.snapshot.manifest().state.get(index).context("no such state chunk")?;
        let chunk = self.snapshot.state(chunk)?;
        pretty(&json!({
            "name": chunk.name, "kind": chunk.kind, "version": chunk.version, "body": chunk.body,
        }))
    }
}

fn pretty(value: &serde_json::Value) -> anyhow::Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    Ok(text)
}

/// The length of a region's file in bytes: a disk may end inside its last page.
///
/// # Errors
/// Those of the store; if the disk's state chunk is invalid.
pub(crate) fn region_len_bytes(snapshot: &Snapshot, region: &RegionReader) -> anyhow::Result<u64> {
    let pages_bytes = region.pages() * PAGE_SIZE as u64;
    let chunk = snapshot.manifest().state.iter().find(|chunk| chunk.name == region.name());
    let Some(chunk) = chunk else { return Ok(pages_bytes) };
    let disk: SavedDisk = ChunkSet::new(vec![snapshot.state(chunk)?])?.take(region.name())?;
    Ok(disk.len_bytes().min(pages_bytes))
}

/// Turns `name` into a valid file name: invalid characters are written as in `%2F`. Different names
/// stay different.
pub(crate) fn file_name(name: &str) -> Cow<'_, str> {
    let plain = |byte: u8| byte > b' ' && !matches!(byte, b'/' | b'%' | 0x7f);
    if !name.is_empty()
        && !name.starts_with('.')
        && name.len() <= NAME_LEN_MAX
        && name.bytes().all(plain)
    {
        return Cow::Borrowed(name);
    }
    let mut out = String::with_capacity(name.len() + 8);
    for (at, c) in name.char_indices() {
        if (at == 0 && c == '.') || (c.is_ascii() && !plain(c as u8)) {
            let _to_memory = write!(out, "%{:02X}", c as u32);
        } else {
            out.push(c);
        }
    }
    if out.is_empty() {
        out.push('%');
    }
    if out.len() > NAME_LEN_MAX {
        // Keep what fits, and add a hash that sets it apart from names that begin alike.
        let hash = frazil_snapstore::Hash::of(name.as_bytes()).short();
        let room = NAME_LEN_MAX - hash.len() - 1;
        let cut = (0..=room).rev().find(|at| out.is_char_boundary(*at)).unwrap_or(0);
        out.truncate(cut);
        let _to_memory = write!(out, "%{hash}");
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_name_becomes_one_that_a_file_can_have() {
        assert_eq!(file_name("web-1"), "web-1");
        assert_eq!(file_name("a/b%c"), "a%2Fb%25c");
        assert_eq!(file_name(".."), "%2E.");
        assert_eq!(file_name(".hidden"), "%2Ehidden");
        assert_eq!(file_name("two words\n"), "two%20words%0A");
        assert_eq!(file_name("größe"), "größe");
        let names = ["", "%", "%2F", "/", ".", "%2E", "é".repeat(200).as_str(), &"é".repeat(201)]
            .map(|name| file_name(name).into_owned());
        for name in &names {
            assert!((1..=NAME_LEN_MAX).contains(&name.len()) && !name.contains('/'), "{name}");
        }
        assert_eq!(names.iter().collect::<HashSet<_>>().len(), names.len(), "{names:?}");
    }
}
