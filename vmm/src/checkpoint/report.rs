//! Requests for checkpoints, and reports of them.

use std::time::Duration;

use frazil_snapstore::{Manifest, SnapshotId, SnapshotInfo, WriteStats};
use serde::{Deserialize, Serialize};

use super::us;

/// A request for a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointRequest {
    /// The user's description of the snapshot.
    pub message: String,
    /// A tag for the snapshot.
    pub tag: Option<String>,
    /// End the VM once the snapshot is published.
    pub exit: bool,
}

/// One pre-copy round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    /// Dirty pages written in this round.
    pub pages: u64,
    /// Bytes appended to the store.
    pub stored_bytes: u64,
    /// How long the round took, in microseconds.
    pub us: u64,
}

/// Statistics of a checkpoint. The snapshot's manifest holds them too, without the commit's own
/// figures.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointStats {
    /// Bytes of RAM.
    pub ram_bytes: u64,
    /// Distinct pages that changed since the parent.
    pub dirty_pages: u64,
    /// Pages that were all zeros.
    pub zero_pages: u64,
    /// Pages whose contents were unchanged.
    #[serde(default)]
    pub equal_pages: u64,
    /// Pages that were in the store already.
    #[serde(default)]
    pub dedup_pages: u64,
    /// Pages written as the difference from their former contents.
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
    /// Of those, pages that were copied.
    #[serde(default)]
    pub cow_pages: u64,
    /// Times that a vCPU waited until such a page was written to the store, because no more copies
    /// were allowed.
    #[serde(default)]
    pub cow_waits: u64,
    /// The longest such wait, in microseconds. It is not part of the pause.
    #[serde(default)]
    pub cow_wait_us_max: u64,
    /// Pages written after the cut: those copied aside, those copied in the pause, and those left
    /// in place.
    #[serde(default)]
    pub commit_pages: u64,
    /// How long the guest was throttled in all so that the checkpoint could catch up with it, where
    /// pages could not be left in place; in microseconds.
    #[serde(default)]
    pub throttled_us: u64,
    /// The largest share of the time for which it was kept from running, in percent.
    #[serde(default)]
    pub throttle_percent: u8,
    /// Pages of disks written.
    #[serde(default)]
    pub disk_pages: u64,
    /// Bytes of compressed pages appended.
    pub frame_bytes: u64,
    /// Pre-copy rounds.
    pub rounds: Vec<Round>,
    /// From the first kick until every vCPU was resumed, in microseconds. If the guest does not go
    /// on, until the publication; but in the manifest, which is written earlier, until the cut.
    pub pause_us: u64,
    /// Of which: until every vCPU had stopped.
    pub quiesce_us: u64,
    /// Of which: last harvest, copying, state of vCPUs and devices.
    pub cut_us: u64,
    /// Of which: until every vCPU was resumed; 0 if the guest does not go on.
    pub go_on_us: u64,
    /// Pre-copy, in microseconds.
    pub precopy_us: u64,
    /// Copying aside, and protecting or throttling if there is too much to copy; in microseconds.
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
    /// The snapshot that it builds on.
    pub parent: Option<SnapshotId>,
    /// Time of the cut, in Unix milliseconds.
    pub time_unix_ms: u64,
    /// The statistics that the manifest holds too.
    #[serde(flatten)]
    pub stats: CheckpointStats,
    /// Bytes of tree nodes, state and manifest.
    pub meta_bytes: u64,
    /// Everything added to the store: `frame_bytes + meta_bytes`.
    pub stored_bytes: u64,
    /// Encoding the remaining pages, writing trees and state, syncing and publishing; in
    /// microseconds.
    pub commit_us: u64,
    /// Of which: syncing and publishing.
    pub sync_us: u64,
    /// From the request to the publication, in microseconds.
    pub duration_us: u64,
    /// Why the requested tag could not be set, if so. The snapshot is published all the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag_failure: Option<String>,
}

/// Totals over a VM's checkpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointTotals {
    /// Checkpoints published.
    pub taken: u64,
    /// Checkpoints that failed; their dirty pages are part of the next one.
    pub failed: u64,
    /// Checkpoints that were cancelled or that the VM's end cut short; their dirty pages are part
    /// of the next one.
    #[serde(default)]
    pub cancelled: u64,
    /// Periodic checkpoints skipped because the one before was not done, was waiting for a quiet
    /// moment, or had failed; including those that are being missed right now.
    pub skipped: u64,
    /// Pages written.
    pub pages: u64,
    /// Bytes written.
    pub stored_bytes: u64,
    /// The longest pause, in microseconds, including those of checkpoints that failed afterwards.
    pub pause_us_max: u64,
}

/// Bytes that a snapshot added to its store, as in its report: frames, nodes, state and manifest.
/// Manifests of old snapshots do not list nodes and state, which are then not counted.
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
