//! What requests and answers hold.

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
    /// The user made it stand still.
    Paused,
    /// It has ended; the process is about to.
    Ended,
}

/// `GET /vm`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Its name.
    pub name: String,
    /// The process that runs it.
    pub pid: u32,
    /// Whether the guest runs.
    pub state: RunState,
    /// Why it ended, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended: Option<Ended>,
    /// The machine.
    pub machine: SavedMachine,
    /// The store its checkpoints go to.
    pub store: Option<String>,
    /// The snapshot it was resumed from.
    pub resumed_from: Option<SnapshotId>,
    /// The snapshot that the next checkpoint changes; none before the first.
    pub head: Option<SnapshotId>,
    /// What keeps track of the pages that the guest writes.
    pub dirty_tracking: TrackerKind,
    /// Time since it was booted or resumed, in milliseconds.
    pub uptime_ms: u64,
    /// Its checkpoints so far.
    pub checkpoints: CheckpointTotals,
    /// The checkpoint being taken.
    pub checkpoint_in_progress: Option<ProgressReport>,
    /// Its rewinds so far.
    pub rewinds: RewindTotals,
    /// What keeping its snapshots to a policy came to, if there is one.
    pub keep: Option<KeepTotals>,
    /// What the pager did, if memory comes lazily.
    pub pager: Option<PagerStats>,
    /// The process of its pager, if that is another than the machine's and the machine started it.
    pub pager_process: Option<u32>,
    /// Pagers that died, and whose place another took.
    pub pager_deaths: u64,
    /// Serial output dropped because nobody read it in time, in bytes.
    pub serial_dropped_bytes: u64,
}

impl VmStatus {
    /// The status of `vm` now.
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

/// One vCPU of the built-in workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkloadCpu {
    /// Pages written so far.
    pub turns: u64,
    /// Turns of its loop so far; they advance also while it waits for its rate.
    pub loops: u64,
    /// True once it has written every page of its share once.
    pub populated: bool,
    /// The largest gap between two loop turns, in microseconds: the pause as the guest feels it.
    pub gap_us_max: u64,
    /// How often a gap was longer than the workload's `gap_us`.
    pub gaps: u64,
    /// The newest of those gaps, `[TSC at its end, microseconds]`.
    pub recent_gaps: Vec<(u64, u64)>,
    /// Self checks that found all as it must be.
    pub checks_done: u64,
    /// Self checks that did not.
    pub check_failures: u64,
}

/// `GET /workload`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkloadStatus {
    /// Data pages in use.
    pub data_pages: u64,
    /// Pages written so far by all vCPUs.
    pub turns: u64,
    /// Each vCPU.
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

/// `POST /workload/verify`.
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

/// `PUT /checkpoints/cancel`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelReport {
    /// True if a checkpoint was being taken and was given up: it will not be published. False if
    /// there was none, or it was published before it could be stopped.
    pub cancelled: bool,
}

/// The answer to a request that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiError {
    /// What went wrong and what to do.
    pub error: String,
}

/// The answer to a request with nothing to say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// Whether the guest runs now.
    pub state: RunState,
}
