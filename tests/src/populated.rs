//! A guest that runs the built-in workload in this process and has written each of its pages.

use std::path::Path;
use std::sync::Arc;

use frazil_snapstore::{Store, StoreOptions};
use frazil_vmm::devices::serial::SerialOutput;
use frazil_vmm::{Guest, HostConfig, MachineConfig, Vm};
use tempfile::TempDir;

use crate::vm_harness::wait_populated;

/// Bytes of its RAM: workloads that are run here touch 64 MiB of it.
const RAM_BYTES: u64 = 96 << 20;

/// See the module's text. The parts in the order in which they have to go.
#[derive(Debug)]
pub struct Populated {
    /// The machine, which runs.
    pub vm: Vm,
    /// Where its checkpoints go.
    pub store: Arc<Store>,
    /// Where that is.
    pub folder: TempDir,
}

/// Boots `workload` on `cpus` vCPUs, as `change` wants its machine and how that meets its host; that also
/// gets a scratch folder, for disks.
///
/// # Panics
/// If that does not work.
#[track_caller]
#[must_use]
pub fn populated(
    workload: &str,
    cpus: usize,
    change: impl FnOnce(&Path, &mut MachineConfig, &mut HostConfig),
) -> Populated {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open_or_create(&folder.path().join("store"), StoreOptions::default())
        .expect("a store");
    let guest = Guest::Workload(format!("{workload},report=0").parse().expect("a workload"));
    let mut config = MachineConfig::new("populated", RAM_BYTES, cpus, guest);
    let mut host = HostConfig::new(SerialOutput::Null, Some(Arc::clone(&store)));
    change(folder.path(), &mut config, &mut host);
    let vm = Vm::boot(&config, host).expect("it boots");
    vm.go().expect("it runs");
    wait_populated(&vm);
    Populated { vm, store, folder }
}
