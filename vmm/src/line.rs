//! Where a machine stands in its line of snapshots, and what the last of them lacks.

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

/// How long what devices and disks are doing may take to be done while the guest stands still, all
/// together.
const DRAIN_PATIENCE: Duration = Duration::from_secs(1);

/// Keeps devices and disks from doing anything.
#[derive(Debug)]
pub(crate) struct AtRest {
    /// The disks, in the order of the machine.
    pub disks: Vec<Drained>,
    devices: Vec<Still>,
}

impl AtRest {
    /// Keeps nobody, and has room for all.
    pub(crate) fn room(line: &Line, bus: &Bus) -> Self {
        let devices = bus.virtio().devices().len();
        Self { disks: Vec::with_capacity(line.disks.len()), devices: Vec::with_capacity(devices) }
    }

    /// Lets all of them go on.
    pub(crate) fn let_go(&mut self) {
        self.disks.clear();
        self.devices.clear();
    }
}

/// Where the VM stands in its line of snapshots. Locked for the length of a checkpoint.
#[derive(Debug)]
pub(crate) struct Line {
    /// Keeps the snapshot that the next one changes in the store, forgotten or not: they share. None if
    /// that could not be had yet.
    pub head_pin: Option<Arc<dyn Pin>>,
    /// Pages written since the VM's head, as far as they were harvested. They leave the set only when a
    /// snapshot that holds them is published, so a failed checkpoint loses none.
    pub since_head: PageSet,
    /// The same for each disk.
    pub disks: Vec<DiskLine>,
    pub tracker: AllWrites,
    /// Room for pages that are copied aside.
    pub staging: Staging,
    /// For pages that are too many for that.
    pub cow: CowState,
}

impl Line {
    /// The line of a machine that no snapshot holds yet: all it has ever written counts.
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

    /// Adds the pages written since the last harvest to `pages`, and to those the head lacks.
    pub(crate) fn harvest(&mut self, pages: &mut PageSet) -> Result<()> {
        let harvested = self.tracker.harvest(pages);
        // Also after an error: what was read is cleared in KVM.
        self.since_head.union(pages);
        harvested
    }

    /// The same at the cut, while no vCPU runs.
    pub(crate) fn harvest_at_cut(&mut self, pages: &mut PageSet) -> Result<()> {
        let harvested = self.tracker.harvest_at_cut(pages);
        self.since_head.union(pages);
        harvested
    }

    /// Has what devices and disks are doing done, and nothing else begin until `at_rest` lets go of them.
    ///
    /// # Errors
    /// [`VmmError::NotNow`](crate::VmmError::NotNow) if that is not so in [`DRAIN_PATIENCE`], all
    /// together; they go on then.
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
