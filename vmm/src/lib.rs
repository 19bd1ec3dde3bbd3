//! frazil's virtual machine: KVM, RAM in a memfd, vCPUs, devices, dirty tracking, and snapshots
//! of all of it taken while the guest runs.
//!
//! [`Vm::boot`] builds a machine, [`Vm::checkpoint`] saves it to a store while it runs, and
//! [`Vm::resume`] rebuilds it from nothing but a snapshot, loading its memory as it is touched.
//! Pages, trees and segments belong to `frazil_snapstore`; this crate never sees a byte of the
//! store's format. `DESIGN.md` explains who owns what and in which order things happen.

pub mod boot;
pub mod checkpoint;
pub mod confine;
pub mod control;
mod cpuid;
pub mod devices;
pub mod dirty;
pub mod disk;
mod error;
pub mod inspect;
pub mod keeper;
pub mod kvm;
mod line;
mod machine;
pub mod memory;
mod paging;
mod private_socket;
pub mod privileges;
mod rebuild;
mod rewind;
pub mod scheduler;
pub mod state;
pub mod telemetry;
mod turns;
pub mod vcpu;
pub mod virtio;
mod vm;
pub mod workload;
mod workload_memory;

pub use checkpoint::{
    CheckpointReport, CheckpointRequest, CheckpointStats, CheckpointTotals, ProgressReport, Round,
    stored_bytes,
};
pub use error::{Result, VmmError};
pub use machine::{
    ClockPolicy, Guest, HostConfig, Loading, MachineConfig, NetConfig, PagerPlace,
    REWIND_CACHE_BYTES, STAGING_BYTES, SavedGuest, SavedMachine, THROTTLE_MAX_PERCENT, VsockConfig,
};
pub use paging::shared_image;
pub use rewind::{RewindPoint, RewindReport, RewindRequest, RewindTotals};
pub use vcpu::Ended;
pub use vm::Vm;
pub use workload_memory::{saved_machine, verify_snapshot};
