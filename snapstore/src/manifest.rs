//! The manifest: what a snapshot consists of, in self-describing JSON.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::id::{BlockRef, SnapshotId};

/// What a snapshot holds. The snapshot's id is the BLAKE3 of the manifest's JSON as stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The snapshot that this one was based on; none for the first of a line.
    pub parent: Option<SnapshotId>,
    /// When the snapshot was cut, in Unix milliseconds.
    pub time_unix_ms: u64,
    /// The name of the VM whose state it is.
    pub name: String,
    /// The user's message.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Page trees: guest memory, disks.
    pub regions: Vec<RegionManifest>,
    /// Opaque named state: the machine, vCPUs, devices.
    pub state: Vec<StateRef>,
    /// Figures about the checkpoint, as its maker chose to record them.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub stats: Value,
}

/// One region: a sequence of pages, most of them usually shared with the parent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionManifest {
    /// Unique in the snapshot.
    pub name: String,
    /// Size of the region in pages of 4 KiB; pages that no tree entry names are zero.
    pub pages: u64,
    /// Root of the page tree; none if every page is zero.
    pub root: Option<BlockRef>,
}

/// A state chunk with a reference to its body.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateRef {
    /// Unique in the snapshot: "vcpu0", "serial0".
    pub name: String,
    /// The kind of thing whose state it is.
    pub kind: String,
    /// Version of the body's layout, per kind.
    pub version: u32,
    /// Where the body is stored.
    pub body: BlockRef,
}

/// A state chunk with its body: `(name, kind, version, body)`.
#[derive(Clone, Debug, PartialEq)]
pub struct StateChunk {
    /// Unique in the snapshot: "vcpu0", "serial0".
    pub name: String,
    /// The kind of thing whose state it is.
    pub kind: String,
    /// Version of the body's layout, per kind.
    pub version: u32,
    /// The body, self-describing.
    pub body: Value,
}

impl Manifest {
    /// The region called `name`.
    #[must_use]
    pub fn region(&self, name: &str) -> Option<&RegionManifest> {
        self.regions.iter().find(|region| region.name == name)
    }
}
