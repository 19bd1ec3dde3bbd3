//! The manifest: what a snapshot is, in JSON that explains itself.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::id::{BlockRef, SnapshotId};

/// What a snapshot holds. Its id is the BLAKE3 of this, as JSON bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The snapshot this one changed, none for the first of a line.
    pub parent: Option<SnapshotId>,
    /// When the snapshot was cut, Unix milliseconds.
    pub time_unix_ms: u64,
    /// Whose state it is: the VM's name.
    pub name: String,
    /// What the user said about it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Page trees: guest memory, disks.
    pub regions: Vec<RegionManifest>,
    /// Opaque named state: the machine, vCPUs, devices.
    pub state: Vec<StateRef>,
    /// Figures of the checkpoint that made it, as its maker chose to record them.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub stats: Value,
}

/// One region: a sequence of pages, most of them usually shared with the parent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionManifest {
    /// Unique in the snapshot.
    pub name: String,
    /// Number of 4 KiB pages the region ranges over; pages that no tree entry names are zero.
    pub pages: u64,
    /// Root of the page tree; none if every page is zero.
    pub root: Option<BlockRef>,
}

/// A state chunk, and where its body is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateRef {
    /// Unique in the snapshot: "vcpu0", "serial0".
    pub name: String,
    /// What kind of thing it is the state of.
    pub kind: String,
    /// Version of the body's layout, per kind.
    pub version: u32,
    /// The body.
    pub body: BlockRef,
}

/// A state chunk with its body: `(name, kind, version, body)`.
#[derive(Clone, Debug, PartialEq)]
pub struct StateChunk {
    /// Unique in the snapshot: "vcpu0", "serial0".
    pub name: String,
    /// What kind of thing it is the state of.
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
