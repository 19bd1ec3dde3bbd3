//! The product under test: a `Vm` with the built-in guest.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use frazil_snapstore::{Snapshot, Store, StoreOptions};
use frazil_vmm::devices::serial::SerialOutput;
use frazil_vmm::workload::ControlView;
use frazil_vmm::{Guest, HostConfig, Loading, MachineConfig, Vm};

use crate::raw_guest::{data_pages, turns, wait_turns};

/// A VM that runs the built-in guest on one vCPU.
#[derive(Debug)]
pub(crate) struct Machine {
    /// The VM.
    pub vm: Vm,
    /// Pages its guest works on.
    pub data_pages: u64,
}

impl Machine {
    /// Boots the built-in guest and waits until it has written every page once.
    pub(crate) fn boot(
        spec: &str,
        ram_bytes: u64,
        store: Option<Arc<Store>>,
    ) -> anyhow::Result<Self> {
        let config = MachineConfig {
            name: "bench".into(),
            ram_bytes,
            cpus: 1,
            guest: Guest::Workload(spec.parse()?),
        };
        let vm = Vm::boot(&config, HostConfig::new(SerialOutput::Null, store))?;
        vm.go()?;
        let machine = Self { vm, data_pages: data_pages(ram_bytes) };
        machine.wait_turns(machine.data_pages)?;
        Ok(machine)
    }

    /// Resumes `snapshot`; the guest stands still.
    pub(crate) fn resume(snapshot: &Snapshot, loading: Loading) -> anyhow::Result<Self> {
        let host = HostConfig::new(SerialOutput::Null, None);
        let vm = Vm::resume(snapshot, "bench".into(), host, loading)?;
        let data_pages = data_pages(vm.machine().ram_bytes);
        Ok(Self { vm, data_pages })
    }

    /// Pages the guest has written so far.
    pub(crate) fn turns(&self) -> anyhow::Result<u64> {
        turns(self.vm.ram())
    }

    /// Waits until the guest has written `target` pages; returns how many it has and when.
    pub(crate) fn wait_turns(&self, target: u64) -> anyhow::Result<(u64, Instant)> {
        wait_turns(self.vm.ram(), target, || self.vm.ended().is_none())
    }

    /// What the guest says of itself.
    pub(crate) fn view(&self) -> anyhow::Result<ControlView> {
        Ok(self.vm.workload()?)
    }
}

/// Creates a store at `path`.
pub(crate) fn create_store(path: &Path) -> anyhow::Result<Arc<Store>> {
    Store::open_or_create(path, StoreOptions::default())
        .with_context(|| format!("cannot create a store in {}", path.display()))
}
