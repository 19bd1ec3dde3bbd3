//! A guest that runs the built-in workload in this process and has written each of its pages.

use std::path::Path;
use std::sync::Arc;

use frazil_snapstore::{Store, StoreOptions};
use frazil_vmm::devices::serial::SerialOutput;
use frazil_vmm::{Guest, HostConfig, MachineConfig, Vm};
use tempfile::TempDir;

use crate::vm_harness::wait_populated;

/// Size of the guest's RAM in bytes; the tests' workloads touch 64 MiB of it.
const RAM_BYTES: u64 = 96 << 20;

/// A populated guest. The fields are in the order in which they have to be dropped.
#[derive(Debug)]
pub struct Populated {
    /// The running VM.
    pub vm: Vm,
    /// The store for its checkpoints.
    pub store: Arc<Store>,
    /// The scratch folder, which holds the store.
    pub folder: TempDir,
}

/// Boots `workload` on `cpus` vCPUs and waits until it has written each of its pages. `change`
/// adapts the configurations of machine and host, and gets the scratch folder, for disks.
///
/// # Panics
/// If the guest does not get that far.
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
