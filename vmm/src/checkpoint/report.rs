//! What a checkpoint is asked for, and what it came to.

use std::time::Duration;

use frazil_snapstore::{Manifest, SnapshotId, SnapshotInfo, WriteStats};
use serde::{Deserialize, Serialize};

use super::us;

/// What is asked of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointRequest {
    /// What the user says about it.
    pub message: String,
    /// A tag to point to it.
    pub tag: Option<String>,
    /// End the VM once the snapshot is published.
    pub exit: bool,
}

/// One pre-copy round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    /// Pages it found dirty and wrote.
    pub pages: u64,
    /// Bytes it appended.
    pub stored_bytes: u64,
    /// How long it took, in microseconds.
    pub us: u64,
}

/// What a checkpoint came to. Kept in the snapshot's manifest, up to the commit's own figures.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointStats {
    /// Bytes of RAM.
    pub ram_bytes: u64,
    /// Distinct pages that changed since the parent.
    pub dirty_pages: u64,
    /// Of what was looked at, pages that were all zero.
    pub zero_pages: u64,
    /// Pages that were what they had been before.
    #[serde(default)]
    pub equal_pages: u64,
    /// Pages that were in the store already.
    #[serde(default)]
    pub dedup_pages: u64,
    /// Pages written as the difference from what they had been.
    #[serde(default)]
    pub delta_pages: u64,
    /// Pages written before the cut, some of them more than once.
    pub precopied_pages: u64,
    /// Pages copied aside before the cut, some of them more than once.
    #[serde(default)]
    pub staged_pages: u64,
    /// Pages copied in the pause.
    pub cut_pages: u64,
    /// Pages left in place at the cut, to be copied only if the guest is about to change them.
    #[serde(default)]
    pub protected_pages: u64,
    /// Of those, pages copied because it was.
    #[serde(default)]
    pub cow_pages: u64,
    /// Times that a vCPU waited until such a page was written, because as many were copied as may be.
    #[serde(default)]
    pub cow_waits: u64,
    /// The longest of them, in microseconds. It is not part of the pause.
    #[serde(default)]
    pub cow_wait_us_max: u64,
    /// Pages written after the cut: those copied aside, those copied in the pause, and those left
    /// in place.
    #[serde(default)]
    pub commit_pages: u64,
    /// Where pages could not be left in place: how long the guest stood still, a little at a time,
    /// so that the checkpoint could catch up with it; in microseconds.
    #[serde(default)]
    pub throttled_us: u64,
    /// The largest share of the time for which it did, in percent.
    #[serde(default)]
    pub throttle_percent: u8,
    /// Pages of disks written.
    #[serde(default)]
    pub disk_pages: u64,
    /// Bytes of compressed pages appended.
    pub frame_bytes: u64,
    /// Pre-copy rounds.
    pub rounds: Vec<Round>,
    /// From the first kick until every vCPU was on its way again, in microseconds. If the guest does
    /// not go on, until it was published; in the manifest, which is written before, until the cut.
    pub pause_us: u64,
    /// Of which: until every vCPU stood still.
    pub quiesce_us: u64,
    /// Of which: last harvest, copying, state of vCPUs and devices.
    pub cut_us: u64,
    /// Of which: until every vCPU was on its way again; 0 if the guest does not go on.
    pub go_on_us: u64,
    /// Pre-copy, in microseconds.
    pub precopy_us: u64,
    /// Copying aside, and protecting what is too much for that; in microseconds.
    #[serde(default)]
    pub stage_us: u64,
}

/// A published checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointReport {
    /// The VM's name.
    pub vm: String,
    /// The snapshot.
    pub id: SnapshotId,
    /// The snapshot it changed.
    pub parent: Option<SnapshotId>,
    /// When it was cut, Unix milliseconds.
    pub time_unix_ms: u64,
    /// Figures kept in the manifest.
    #[serde(flatten)]
    pub stats: CheckpointStats,
    /// Bytes of tree nodes, state and manifest.
    pub meta_bytes: u64,
    /// All it took on the medium: `frame_bytes + meta_bytes`.
    pub stored_bytes: u64,
    /// Encoding the rest, writing trees and state, making durable, publishing; in microseconds.
    pub commit_us: u64,
    /// Of which making durable and publishing.
    pub sync_us: u64,
    /// From the request to the publication, in microseconds.
    pub duration_us: u64,
    /// Why the tag could not be set, if it was asked for and could not. The snapshot is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag_failure: Option<String>,
}

/// What a VM's checkpoints came to together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointTotals {
    /// Published.
    pub taken: u64,
    /// Failed; the dirty pages went into the next one.
    pub failed: u64,
    /// Given up because somebody asked for that, or the VM ended; the same goes for their pages.
    #[serde(default)]
    pub cancelled: u64,
    /// Periodic ones left out: the one before was not done, waited for a quiet moment, or had failed.
    /// Those that are being missed just now are among them.
    pub skipped: u64,
    /// Pages written.
    pub pages: u64,
    /// Bytes written.
    pub stored_bytes: u64,
    /// The longest pause, in microseconds; also of one that failed once the guest had stood still.
    pub pause_us_max: u64,
}

/// Bytes that a snapshot added to its store, as its report had it: frames, nodes, state and the
/// manifest. Snapshots of before manifests told of the nodes lack those.
#[must_use]
pub fn stored_bytes(info: &SnapshotInfo, manifest: &Manifest) -> u64 {
    let figure = |name: &str| manifest.stats[name].as_u64().unwrap_or(0);
    figure("frame_bytes") + figure("meta_bytes") + info.manifest_bytes()
}

impl CheckpointStats {
    pub(super) fn precopied(&mut self, written: WriteStats, took: Duration) {
        self.rounds.push(Round {
            pages: written.pages,
            stored_bytes: written.stored_bytes,
            us: us(took),
        });
        self.precopied_pages += written.pages;
        self.count(&written);
    }

    pub(super) fn committed(&mut self, written: &WriteStats) {
        self.commit_pages += written.pages;
        self.count(written);
    }

    pub(super) fn count(&mut self, written: &WriteStats) {
        self.zero_pages += written.zero_pages;
        self.equal_pages += written.equal_pages;
        self.dedup_pages += written.dedup_pages;
        self.delta_pages += written.delta_pages;
        self.frame_bytes += written.stored_bytes;
    }
}
