//! Where a machine stands in its line of snapshots, and which of its pages the last one lacks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use frazil_snapstore::{PageSet, Pin};

use crate::checkpoint::{CowState, Staging};
use crate::devices::Bus;
use crate::dirty::{AllWrites, DirtyTracker};
use crate::disk::{Disk, DiskLine, Drained};
use crate::error::Result;
use crate::kvm::VmShell;
use crate::virtio::Still;

/// How long all devices and disks together may take to finish their work while the guest is paused.
const DRAIN_PATIENCE: Duration = Duration::from_secs(1);

/// Keeps devices and disks at rest.
#[derive(Debug)]
pub(crate) struct AtRest {
    /// The drained disks, in the machine's order.
    pub disks: Vec<Drained>,
    devices: Vec<Still>,
}

impl AtRest {
    /// Holds nothing yet, but has room for all devices and disks.
    pub(crate) fn room(line: &Line, bus: &Bus) -> Self {
        let devices = bus.virtio().devices().len();
        Self { disks: Vec::with_capacity(line.disks.len()), devices: Vec::with_capacity(devices) }
    }

    /// Lets all devices and disks go on.
    pub(crate) fn let_go(&mut self) {
        self.disks.clear();
        self.devices.clear();
    }
}

/// Where the VM stands in its line of snapshots. Locked for the length of a checkpoint.
#[derive(Debug)]
pub(crate) struct Line {
    /// Keeps the head in the store even if it is forgotten: the next snapshot shares pages with it.
    /// None if there is no such pin yet.
    pub head_pin: Option<Arc<dyn Pin>>,
    /// Pages harvested since the VM's head. They leave the set only when a snapshot that holds them
    /// is published, so a failed checkpoint loses none.
    pub since_head: PageSet,
    /// The same for each disk.
    pub disks: Vec<DiskLine>,
    pub tracker: AllWrites,
    /// Room for pages that are copied aside.
    pub staging: Staging,
    /// State for protecting pages in place, when there are too many to copy aside.
    pub cow: CowState,
}

impl Line {
    /// The line of a machine without snapshots: everything it has ever written counts.
    pub(crate) fn new(shell: &VmShell, disks: &[Arc<Disk>]) -> Self {
        Self {
            head_pin: None,
            since_head: PageSet::new(shell.ram.end_page()),
            disks: disks.iter().map(|disk| DiskLine::new(Arc::clone(disk))).collect(),
            tracker: AllWrites::new(shell.tracker(), Arc::clone(&shell.ram)),
            staging: Staging::default(),
            cow: CowState::default(),
        }
    }

    /// Adds the pages written since the last harvest to `pages` and to `since_head`.
    pub(crate) fn harvest(&mut self, pages: &mut PageSet) -> Result<()> {
        let harvested = self.tracker.harvest(pages);
        // Also after an error: KVM has already forgotten the pages that were read.
        self.since_head.union(pages);
        harvested
    }

    /// Like [`Self::harvest`], at the cut, while no vCPU runs.
    pub(crate) fn harvest_at_cut(&mut self, pages: &mut PageSet) -> Result<()> {
        let harvested = self.tracker.harvest_at_cut(pages);
        self.since_head.union(pages);
        harvested
    }

    /// Waits until devices and disks have finished their work, and keeps them from beginning more
    /// until `at_rest` lets them go.
    ///
    /// # Errors
    /// [`VmmError::NotNow`](crate::VmmError::NotNow) if that takes longer than [`DRAIN_PATIENCE`]
    /// in all; they go on then.
    pub(crate) fn drain(&self, bus: &Bus, at_rest: &mut AtRest) -> Result<()> {
        let until = Instant::now() + DRAIN_PATIENCE;
        let left = || until.saturating_duration_since(Instant::now());
        let AtRest { disks, devices } = at_rest;
        let drained = bus.virtio().drain(left(), devices).and_then(|()| {
            self.disks.iter().try_for_each(|disk| {
                disks.push(disk.disk().drain(left())?);
                Ok(())
            })
        });
        if drained.is_err() {
            at_rest.let_go();
        }
        drained
    }
}
