//! The product under test: a `Vm` with the built-in guest.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use frazil_snapstore::{Snapshot, Store, StoreOptions};
use frazil_vmm::devices::serial::SerialOutput;
use frazil_vmm::workload::{ControlView, WorkloadSpec};
use frazil_vmm::{Guest, HostConfig, Loading, MachineConfig, Vm};

use crate::raw_guest::{data_pages, turns, wait_turns};

/// How often to look at other vCPUs' progress.
const POLL: Duration = Duration::from_millis(1);

/// A VM that runs the built-in guest.
#[derive(Debug)]
pub(crate) struct Machine {
    /// The VM.
    pub vm: Vm,
    /// Pages that its guest works on.
    pub data_pages: u64,
}

impl Machine {
    /// Boots the built-in guest on one vCPU and waits until it has written every page once.
    pub(crate) fn boot(
        spec: &str,
        ram_bytes: u64,
        store: Option<Arc<Store>>,
    ) -> anyhow::Result<Self> {
        Self::boot_cpus(spec, ram_bytes, 1, store)
    }

    /// Like [`Self::boot`], with `cpus` vCPUs.
    pub(crate) fn boot_cpus(
        spec: &str,
        ram_bytes: u64,
        cpus: usize,
        store: Option<Arc<Store>>,
    ) -> anyhow::Result<Self> {
        let spec: WorkloadSpec = spec.parse()?;
        let data_pages = spec.data_pages(data_pages(ram_bytes)).unwrap_or(0);
        let config = MachineConfig::new("bench", ram_bytes, cpus, Guest::Workload(spec));
        let vm = Vm::boot(&config, HostConfig::new(SerialOutput::Null, store))?;
        vm.go()?;
        let machine = Self { vm, data_pages };
        // vCPU 0's share; the other vCPUs may need a little longer for theirs.
        machine.wait_turns(data_pages / cpus as u64)?;
        while machine.view()?.vcpus.iter().any(|vcpu| vcpu.control.populated == 0) {
            ensure!(machine.vm.ended().is_none(), "the guest ended while it populated its memory");
            std::thread::sleep(POLL);
        }
        Ok(machine)
    }

    /// Resumes `snapshot`, with the guest paused.
    pub(crate) fn resume(snapshot: &Snapshot, loading: Loading) -> anyhow::Result<Self> {
        let host = HostConfig::new(SerialOutput::Null, None);
        let vm = Vm::resume(snapshot, "bench".into(), host, loading)?;
        let data_pages = data_pages(vm.machine().ram_bytes);
        Ok(Self { vm, data_pages })
    }

    /// Pages that vCPU 0 of the guest has written so far.
    pub(crate) fn turns(&self) -> anyhow::Result<u64> {
        turns(self.vm.ram())
    }

    /// Waits until vCPU 0 has written `target` pages. Returns how many it has written, and the
    /// time.
    pub(crate) fn wait_turns(&self, target: u64) -> anyhow::Result<(u64, Instant)> {
        wait_turns(self.vm.ram(), target, || self.vm.ended().is_none())
    }

    /// Starts the guest. Returns the time of its first progress, and how long `turns` turns take
    /// it.
    pub(crate) fn go_for(&self, turns: u64) -> anyhow::Result<(Instant, Duration)> {
        let from = self.turns()?;
        let started = Instant::now();
        self.vm.go()?;
        let (_, first) = self.wait_turns(from + 1)?;
        let (to, ended) = self.wait_turns(from + turns)?;
        // Progress is seen a little late, when the guest is further on: scale the time.
        Ok((first, (ended - started).mul_f64(turns as f64 / (to - from) as f64)))
    }

    /// The guest's own counters.
    pub(crate) fn view(&self) -> anyhow::Result<ControlView> {
        Ok(self.vm.workload()?)
    }
}

/// Creates a store at `path`.
pub(crate) fn create_store(path: &Path) -> anyhow::Result<Arc<Store>> {
    Store::open_or_create(path, StoreOptions::default())
        .with_context(|| format!("cannot create a store in {}", path.display()))
}
