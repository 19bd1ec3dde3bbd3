//! The bodies of answers.

use serde::{Deserialize, Serialize};

use frazil_snapstore::SnapshotId;
use frazil_snapstore::pager::PagerStats;

use crate::checkpoint::{CheckpointTotals, ProgressReport};
use crate::dirty::TrackerKind;
use crate::keeper::KeepTotals;
use crate::machine::SavedMachine;
use crate::rewind::RewindTotals;
use crate::vcpu::Ended;
use crate::vm::Vm;
use crate::workload::VerifyReport;

/// Whether the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// The guest runs.
    Running,
    /// The user has paused the guest.
    Paused,
    /// The VM has ended; its process is about to.
    Ended,
}

/// The answer to `GET /vm`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmStatus {
    /// The VM's name.
    pub name: String,
    /// The id of the process that runs it.
    pub pid: u32,
    /// Whether the guest runs.
    pub state: RunState,
    /// Why the VM ended, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended: Option<Ended>,
    /// The machine.
    pub machine: SavedMachine,
    /// The store that checkpoints go to, if there is one.
    pub store: Option<String>,
    /// The snapshot that the VM was resumed from, if it was.
    pub resumed_from: Option<SnapshotId>,
    /// The snapshot that the next checkpoint builds on; none before the first checkpoint.
    pub head: Option<SnapshotId>,
    /// The kind of tracker that records which pages the guest writes.
    pub dirty_tracking: TrackerKind,
    /// Time since the VM was booted or resumed, in milliseconds.
    pub uptime_ms: u64,
    /// Totals over its checkpoints.
    pub checkpoints: CheckpointTotals,
    /// The checkpoint being taken, if there is one.
    pub checkpoint_in_progress: Option<ProgressReport>,
    /// Totals over its rewinds.
    pub rewinds: RewindTotals,
    /// What its retention policy has done so far, if it has one.
    pub keep: Option<KeepTotals>,
    /// What the pager has done so far, if there is one.
    pub pager: Option<PagerStats>,
    /// The id of the pager's process, if the machine started one for it.
    pub pager_process: Option<u32>,
    /// How many such processes died and were replaced.
    pub pager_deaths: u64,
    /// Serial output dropped because nobody read it in time, in bytes.
    pub serial_dropped_bytes: u64,
}

impl VmStatus {
    /// The present status of `vm`.
    #[must_use]
    pub fn of(vm: &Vm) -> Self {
        let ended = vm.ended();
        let state = match (&ended, vm.is_paused()) {
            (Some(_), _) => RunState::Ended,
            (None, true) => RunState::Paused,
            (None, false) => RunState::Running,
        };
        let (pager_process, pager_deaths) = vm.pager_process();
        Self {
            name: vm.name().to_owned(),
            pid: std::process::id(),
            state,
            ended,
            machine: vm.machine().clone(),
            store: vm.store().map(|store| store.describe()),
            resumed_from: vm.resumed_from(),
            head: vm.head(),
            dirty_tracking: vm.dirty_tracking(),
            uptime_ms: u64::try_from(vm.uptime().as_millis()).unwrap_or(u64::MAX),
            checkpoints: vm.checkpoint_totals(),
            checkpoint_in_progress: vm.checkpoint_progress(),
            rewinds: vm.rewind_totals(),
            keep: vm.keep_totals(),
            pager: vm.pager_stats(),
            pager_process,
            pager_deaths,
            serial_dropped_bytes: vm.bus.serial_dropped_bytes(),
        }
    }
}

/// The state of one vCPU of the built-in workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkloadCpu {
    /// Pages written so far.
    pub turns: u64,
    /// Iterations of its loop so far, including those in which it only waits for its rate.
    pub loops: u64,
    /// True once it has written every page of its share.
    pub populated: bool,
    /// The largest gap between two iterations, in microseconds: the pause as the guest feels it.
    pub gap_us_max: u64,
    /// How often a gap was longer than the workload's `gap_us`.
    pub gaps: u64,
    /// The newest of those gaps, each as `[TSC at its end, microseconds]`.
    pub recent_gaps: Vec<(u64, u64)>,
    /// Self checks that passed.
    pub checks_done: u64,
    /// Self checks that failed.
    pub check_failures: u64,
}

/// The answer to `GET /workload`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkloadStatus {
    /// Data pages in use.
    pub data_pages: u64,
    /// Pages written so far by all vCPUs.
    pub turns: u64,
    /// The vCPUs.
    pub vcpus: Vec<WorkloadCpu>,
}

impl From<&crate::workload::ControlView> for WorkloadStatus {
    fn from(view: &crate::workload::ControlView) -> Self {
        let vcpus = view
            .vcpus
            .iter()
            .map(|cpu| WorkloadCpu {
                turns: cpu.control.turns,
                loops: cpu.control.loops,
                populated: cpu.control.populated != 0,
                gap_us_max: view.tsc_to_us(cpu.control.gap_max_tsc),
                gaps: cpu.control.gap_count,
                recent_gaps: cpu
                    .gaps
                    .iter()
                    .map(|gap| (gap.tsc, view.tsc_to_us(gap.gap_tsc)))
                    .collect(),
                checks_done: cpu.control.checks_done,
                check_failures: cpu.control.check_failures,
            })
            .collect();
        Self { data_pages: view.data_pages, turns: view.turns(), vcpus }
    }
}

/// The answer to `POST /workload/verify`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadVerified {
    /// True if every page holds what the guest must have written.
    pub ok: bool,
    /// Pages compared.
    pub pages_checked: u64,
    /// Writes that the vCPUs' ledgers account for.
    pub writes: u64,
    /// What is wrong, if anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damage: Option<String>,
}

impl From<Result<VerifyReport, String>> for WorkloadVerified {
    fn from(result: Result<VerifyReport, String>) -> Self {
        match result {
            Ok(report) => Self {
                ok: true,
                pages_checked: report.pages_checked,
                writes: report.writes,
                damage: None,
            },
            Err(damage) => Self { ok: false, pages_checked: 0, writes: 0, damage: Some(damage) },
        }
    }
}

/// The answer to `PUT /checkpoints/cancel`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelReport {
    /// True if a checkpoint was being taken and was cancelled: it will not be published. False if
    /// there was none, or it was published before it could be cancelled.
    pub cancelled: bool,
}

/// The answer to a request that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiError {
    /// What went wrong and what to do.
    pub error: String,
}

/// The answer to a request that changes the run state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// Whether the guest runs now.
    pub state: RunState,
}
