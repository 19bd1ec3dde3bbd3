//! A virtual machine: booting, resuming, running, pausing and ending it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use frazil_snapstore::pager::PagerStats;
use frazil_snapstore::{PAGE_SIZE, Snapshot, SnapshotId, Store};

use crate::boot::{self, BootSource, GenerationSlot, Hardware, Kernel};
use crate::checkpoint::{CheckpointProgress, CheckpointTotals};
use crate::cpuid;
use crate::devices::platform::{self, SavedPlatform};
use crate::devices::rtc::{HostClock, Rtc};
use crate::devices::serial::SerialPort;
use crate::devices::vmgenid::{self, RandomGenerations, VmGenId};
use crate::devices::{Bus, serial};
use crate::dirty::TrackerKind;
use crate::disk::Disk;
use crate::error::{Result, VmmError};
use crate::keeper::Keeping;
use crate::kvm::{Hypervisor, VmShell};
use crate::line::Line;
use crate::machine::{
    ClockPolicy, Guest, HostConfig, Loading, MAX_CPUS, MachineConfig, SavedGuest, SavedMachine,
    take_machine,
};
use crate::memory::GuestRam;
use crate::paging::{Paging, map_ram, start_loading};
use crate::rebuild;
use crate::rewind::Rewinding;
use crate::state::ChunkSet;
use crate::telemetry::Telemetry;
use crate::turns::Turns;
use crate::vcpu::{Ended, ExitCounts, Vcpu, VcpuSet};
use crate::virtio::bus::{EVENT_GSI, Surroundings, mmio_slots};
use crate::virtio::{IrqLine, VirtioBus};
use crate::workload::{ControlView, GUEST_ELF, VerifyReport, WorkloadSpec};

/// What a [`Vm`] is assembled from.
struct Parts {
    hypervisor: Hypervisor,
    shell: VmShell,
    bus: Arc<Bus>,
    vcpus: Arc<VcpuSet>,
    pager: Option<Paging>,
    disks: Vec<Arc<Disk>>,
}

/// A running virtual machine.
#[derive(Debug)]
pub struct Vm {
    name: String,
    machine: SavedMachine,
    host: HostConfig,
    started: Instant,
    resumed_from: Option<SnapshotId>,
    /// Kept open for rewinds: the process may have given up the right to open /dev/kvm by then.
    hypervisor: Hypervisor,
    // The next fields are in the order in which they must be dropped: the pager first, which
    // releases vCPUs that wait for a page so that they can end; then the vCPUs; then what they use.
    pager: Option<Paging>,
    pub(crate) vcpus: Arc<VcpuSet>,
    pub(crate) bus: Arc<Bus>,
    pub(crate) shell: VmShell,
    disks: Vec<Arc<Disk>>,
    /// The snapshot that the next one builds on. Set only while `line` is locked.
    head: Mutex<Option<SnapshotId>>,
    pub(crate) line: Mutex<Line>,
    /// True while the user wants the guest paused. Locked while vCPUs are stopped or resumed.
    pub(crate) paused: Mutex<bool>,
    /// Mirrors `paused`, for readers that must not wait for its lock.
    paused_now: AtomicBool,
    /// How often the user has paused the guest so far.
    pub(crate) pauses: AtomicU64,
    /// True while the checkpoint that ends the machine is being written.
    pub(crate) suspending: AtomicBool,
    pub(crate) progress: CheckpointProgress,
    pub(crate) totals: Mutex<CheckpointTotals>,
    pub(crate) telemetry: Telemetry,
    /// Decides who may write to the store.
    pub(crate) turns: Turns,
    pub(crate) keeping: Keeping,
    pub(crate) rewinding: Rewinding,
}

impl Vm {
    /// Builds a machine and loads its guest. The guest stays paused until [`Self::go`].
    ///
    /// # Errors
    /// If KVM or the host refuses something, or the guest's files cannot be loaded.
    pub fn boot(config: &MachineConfig, host: HostConfig) -> Result<Self> {
        let hypervisor = Hypervisor::open()?;
        check_cpus(&hypervisor, config.cpus)?;
        let ram = Arc::new(GuestRam::new(config.ram_bytes)?);
        let shell = VmShell::new(&hypervisor, ram, host.tracker)?;
        let mut vcpus = Vec::with_capacity(config.cpus);
        for index in 0..config.cpus {
            let cpuid = cpuid::for_vcpu(&hypervisor, index, config.cpus)?;
            let vcpu = Vcpu::new(&hypervisor, &shell, index, &cpuid)?;
            boot::set_local_apic(vcpu.fd())?;
            vcpus.push(vcpu);
        }
        let tsc_khz = vcpus[0].fd().get_tsc_khz().unwrap_or(0);
        let (source, guest) = boot_source(config, tsc_khz)?;
        let devices = config.devices()?;
        let slots = mmio_slots(&devices);
        let generation = config
            .acpi_devices
            .then_some(GenerationSlot { address: vmgenid::ADDRESS, gsi: EVENT_GSI });
        let hardware =
            Hardware { cpus: config.cpus, slots: &slots, generation, rtc: config.acpi_devices };
        let entry = boot::load_on(&source, &shell.ram, &hardware)?;
        boot::set_boot_registers(vcpus[0].fd(), entry)?;
        let disks = config
            .disks
            .iter()
            .enumerate()
            .map(|(index, disk)| Ok(Arc::new(Disk::open(index, disk, &host.overlay)?)));
        let disks = disks.collect::<Result<Vec<_>>>()?;
        let around = Surroundings { shell: &shell, disks: &disks, punch: true };
        let virtio = VirtioBus::boot(&devices, &around)?;
        let machine = SavedMachine {
            ram_bytes: config.ram_bytes,
            cpus: config.cpus,
            guest,
            disks: disks.len(),
            devices,
            rtc: config.acpi_devices,
            generation: config.acpi_devices,
        };
        let rtc = config.acpi_devices.then(|| Rtc::new(Box::new(HostClock)));
        let generation = config.acpi_devices.then(|| {
            let line = Arc::new(IrqLine::wire(&shell.fd, EVENT_GSI)?);
            VmGenId::new(Arc::clone(&shell.ram), line, EVENT_GSI, Box::new(RandomGenerations))
        });
        let serial = SerialPort::new(&shell.fd, &host.serial)?;
        let bus = Arc::new(Bus::new(serial, rtc, generation.transpose()?, virtio));
        let vcpus = Arc::new(VcpuSet::start(vcpus, &bus)?);
        let parts = Parts { hypervisor, shell, bus, vcpus, pager: None, disks };
        Ok(Self::assemble(config.name.clone(), machine, host, parts))
    }

    /// Builds the machine that `snapshot` holds. The guest stays paused until [`Self::go`].
    ///
    /// # Errors
    /// If KVM or the host refuses something; [`VmmError::State`] if the saved state does not fit;
    /// store and pager errors.
    pub fn resume(
        snapshot: &Snapshot,
        name: String,
        host: HostConfig,
        loading: Loading,
    ) -> Result<Self> {
        let mut chunks = ChunkSet::new(snapshot.states()?)?;
        let mut machine = take_machine(&mut chunks)?;
        machine.plug(&host.nets, host.vsock.as_ref())?;
        let hypervisor = Hypervisor::open()?;
        check_cpus(&hypervisor, machine.cpus)?;
        // Holes may only be punched in memory that is neither shared nor filled by a pager.
        let punch = matches!(loading, Loading::Eager);
        let (ram, pending) = map_ram(&machine, snapshot, loading)?;
        let shell = VmShell::new(&hypervisor, Arc::new(ram), host.tracker)?;
        // Before any state is set: setting it makes KVM itself touch guest memory (kvmclock, page
        // tables).
        let late = Arc::new(OnceLock::new());
        let pager = start_loading(snapshot, &shell.ram, pending, &late)?;
        let platform = SavedPlatform::take(&mut chunks)?;
        let later = match host.clock {
            ClockPolicy::Host => platform.age(),
            ClockPolicy::Snapshot => Duration::ZERO,
        };
        let vcpus = rebuild::vcpus(&hypervisor, &shell, &machine, &mut chunks, later)?;
        platform::restore(&shell.fd, platform, later)?;
        let serial = SerialPort::restore(&shell.fd, &host.serial, chunks.take(serial::CHUNK)?)?;
        let disks = rebuild::disks(&machine, snapshot, &mut chunks, &host)?;
        let around = Surroundings { shell: &shell, disks: &disks, punch };
        let virtio = VirtioBus::resume(&machine.devices, &around, &mut chunks)?;
        let rtc = rebuild::rtc(&machine, host.clock, &mut chunks)?;
        let generation = rebuild::generation(&machine, &shell, &mut chunks)?;
        chunks.finish()?;
        let bus = Arc::new(Bus::new(serial, rtc, generation, virtio));
        let vcpus = Arc::new(VcpuSet::start(vcpus, &bus)?);
        late.get_or_init(|| Arc::downgrade(&vcpus));
        // The pager may have failed before there were vCPUs that it could stop.
        if let Some(failure) = pager.as_ref().and_then(Paging::failure) {
            return Err(VmmError::NotNow(failure.to_string()));
        }
        let parts = Parts { hypervisor, shell, bus, vcpus, pager, disks };
        let mut vm = Self::assemble(name, machine, host, parts);
        vm.resumed_from = Some(snapshot.id());
        // The next checkpoint shares all untouched pages with this snapshot, resident or not.
        vm.set_head(snapshot.id());
        vm.line.get_mut().unwrap_or_else(PoisonError::into_inner).head_pin = snapshot.pin();
        Ok(vm)
    }

    fn assemble(name: String, machine: SavedMachine, host: HostConfig, parts: Parts) -> Self {
        let Parts { hypervisor, shell, bus, vcpus, pager, disks } = parts;
        let line = Line::new(&shell, &disks);
        Self {
            name,
            machine,
            host,
            started: Instant::now(),
            resumed_from: None,
            hypervisor,
            pager,
            vcpus,
            bus,
            shell,
            disks,
            head: Mutex::new(None),
            line: Mutex::new(line),
            paused: Mutex::new(true),
            paused_now: AtomicBool::new(true),
            pauses: AtomicU64::new(0),
            suspending: AtomicBool::new(false),
            progress: CheckpointProgress::default(),
            totals: Mutex::default(),
            telemetry: Telemetry::default(),
            turns: Turns::default(),
            keeping: Keeping::default(),
            rewinding: Rewinding::default(),
        }
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// [`VmmError::NotNow`] if the VM has ended.
    pub fn go(&self) -> Result<()> {
        self.check_alive()?;
        let mut paused = self.paused();
        self.check_not_suspending()?;
        if *paused {
            self.set_paused(&mut paused, false);
            // Devices of a resumed machine wait for this.
            self.bus.go_on();
            self.vcpus.resume();
        }
        Ok(())
    }

    /// Pauses the guest at an instruction boundary until [`Self::go`].
    ///
    /// # Errors
    /// [`VmmError::NotNow`] if the VM has ended.
    pub fn pause(&self) -> Result<()> {
        self.check_alive()?;
        let mut paused = self.paused();
        self.check_not_suspending()?;
        if !*paused {
            self.stop_vcpus()?;
            self.set_paused(&mut paused, true);
        }
        Ok(())
    }

    /// Runs `with` while the guest is paused.
    ///
    /// # Errors
    /// [`VmmError::NotNow`] if the VM has ended.
    pub fn while_paused<T>(&self, with: impl FnOnce() -> T) -> Result<T> {
        self.check_alive()?;
        let paused = self.paused();
        if *paused {
            return Ok(with());
        }
        self.stop_vcpus()?;
        let _goes_on = GoesOn(&self.vcpus);
        Ok(with())
    }

    /// Fails while the VM's last checkpoint is being written: it may then neither pause nor go on.
    fn check_not_suspending(&self) -> Result<()> {
        if self.suspending.load(Ordering::Acquire) {
            return Err(VmmError::NotNow(format!(
                "VM `{}` is being suspended: wait for that, or cancel its checkpoint",
                self.name
            )));
        }
        Ok(())
    }

    /// Stops all vCPUs, or on failure none of them.
    fn stop_vcpus(&self) -> Result<()> {
        self.vcpus.pause().inspect_err(|_| self.vcpus.resume())
    }

    pub(crate) fn set_paused(&self, paused: &mut bool, value: bool) {
        *paused = value;
        self.pauses.fetch_add(u64::from(value), Ordering::Release);
        self.paused_now.store(value, Ordering::Release);
    }

    /// Ends the VM. A checkpoint that is being written is cancelled.
    pub fn stop(&self) {
        self.progress.cancel();
        self.vcpus.end(Ended::Stopped);
    }

    /// Waits for the VM to end; returns None if it still runs after `patience`.
    #[must_use]
    pub fn wait_ended(&self, patience: Duration) -> Option<Ended> {
        self.vcpus.wait_ended(patience)
    }

    /// Waits, for a limited time, until the guest's serial output has reached its destination.
    /// Later output is dropped.
    pub fn finish_output(&self) {
        self.bus.serial().finish_output();
    }

    /// Queues `bytes` for the guest to read from its serial port; returns how many of them, from
    /// the first on, there was room for.
    #[must_use]
    pub fn serial_input(&self, bytes: &[u8]) -> usize {
        self.bus.serial().input(bytes)
    }

    /// Why the VM ended, if it did.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        self.vcpus.ended()
    }

    /// The VM's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The machine as its snapshots describe it.
    #[must_use]
    pub fn machine(&self) -> &SavedMachine {
        &self.machine
    }

    /// The store that checkpoints go to, if there is one.
    #[must_use]
    pub fn store(&self) -> Option<&Arc<Store>> {
        self.host.store.as_ref()
    }

    /// The snapshot that the VM was resumed from, if it was.
    #[must_use]
    pub fn resumed_from(&self) -> Option<SnapshotId> {
        self.resumed_from
    }

    /// The snapshot that the next checkpoint builds on; None before the first checkpoint.
    #[must_use]
    pub fn head(&self) -> Option<SnapshotId> {
        *self.head.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes `id` the head and returns the previous head.
    pub(crate) fn set_head(&self, id: SnapshotId) -> Option<SnapshotId> {
        self.head.lock().unwrap_or_else(PoisonError::into_inner).replace(id)
    }

    /// The kind of tracker that records which pages the guest writes.
    #[must_use]
    pub fn dirty_tracking(&self) -> TrackerKind {
        self.shell.tracker_kind()
    }

    /// Time since the VM was built.
    #[must_use]
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// True while the user wants the guest paused.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        // Not `paused`: its lock is held for as long as somebody inspects a paused guest.
        self.paused_now.load(Ordering::Acquire)
    }

    /// What the pager has done so far, if there is one.
    #[must_use]
    pub fn pager_stats(&self) -> Option<PagerStats> {
        self.pager.as_ref().map(Paging::stats)
    }

    /// The id of the pager's process, if the pager runs in another one, and how many such processes
    /// have died.
    #[must_use]
    pub fn pager_process(&self) -> (Option<u32>, u64) {
        self.pager.as_ref().map_or((None, 0), Paging::process)
    }

    /// How often the vCPUs left the guest, by reason.
    #[must_use]
    pub fn exit_counts(&self) -> ExitCounts {
        self.vcpus.exits()
    }

    /// The VM's disks, for the devices that serve them.
    #[must_use]
    pub fn disks(&self) -> &[Arc<Disk>] {
        &self.disks
    }

    /// Pages of each region that a rewind point may keep in memory.
    pub(crate) fn rewind_cache_pages(&self) -> usize {
        (self.host.rewind_cache_bytes / PAGE_SIZE as u64) as usize
    }

    /// The largest share of the time, in percent, that the guest may be throttled for.
    pub(crate) fn throttle_max_percent(&self) -> u8 {
        self.host.throttle_max_percent.min(99)
    }

    /// How many pages a checkpoint may copy aside.
    pub(crate) fn staging_pages(&self) -> u64 {
        self.host.staging_bytes / PAGE_SIZE as u64
    }

    pub(crate) fn hypervisor(&self) -> &Hypervisor {
        &self.hypervisor
    }

    /// The guest's RAM.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.shell.ram
    }

    /// The progress of the built-in workload, read from live memory.
    ///
    /// # Errors
    /// [`VmmError::NotNow`] if the guest runs something else, or has not set up its control pages
    /// yet.
    pub fn workload(&self) -> Result<ControlView> {
        self.workload_spec()?;
        ControlView::read(&mut crate::workload_memory::Live(self.ram()))
            .map_err(|error| VmmError::NotNow(format!("cannot read the workload: {error}")))
    }

    /// Pauses the guest and checks all of its memory against the workload's oracle.
    ///
    /// # Errors
    /// [`VmmError::NotNow`] if the guest runs something else; the oracle's findings are the inner
    /// error.
    pub fn verify_workload(&self) -> Result<Result<VerifyReport, String>> {
        let spec = self.workload_spec()?;
        let memory = crate::workload_memory::Live(self.ram());
        self.while_paused(|| {
            crate::workload::verify_parallel(&spec, &memory).map_err(|error| error.to_string())
        })
    }

    fn workload_spec(&self) -> Result<WorkloadSpec> {
        self.machine.workload().ok_or_else(|| {
            VmmError::NotNow(format!("VM `{}` does not run the built-in workload", self.name))
        })
    }

    pub(crate) fn paused(&self) -> MutexGuard<'_, bool> {
        self.paused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn check_alive(&self) -> Result<()> {
        match self.vcpus.ended() {
            None => Ok(()),
            Some(ended) => {
                Err(VmmError::NotNow(format!("VM `{}` has ended: {ended:?}", self.name)))
            }
        }
    }
}

/// Resumes the vCPUs when dropped.
pub(crate) struct GoesOn<'a>(pub &'a VcpuSet);

impl Drop for GoesOn<'_> {
    fn drop(&mut self) {
        self.0.resume();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.vcpus.end(Ended::Stopped);
    }
}

fn check_cpus(hypervisor: &Hypervisor, cpus: usize) -> Result<()> {
    let most = hypervisor.max_cpus().min(MAX_CPUS);
    if (1..=most).contains(&cpus) {
        return Ok(());
    }
    Err(VmmError::Config(format!("cpus: expected 1 to {most}, found {cpus}")))
}

fn boot_source(config: &MachineConfig, tsc_khz: u32) -> Result<(BootSource, SavedGuest)> {
    match &config.guest {
        Guest::Workload(spec) => {
            let mut spec = *spec;
            spec.cpus = config.cpus as _;
            spec.tsc_khz = u64::from(tsc_khz);
            spec.check_fits(config.ram_bytes)
                .map_err(|error| VmmError::Config(error.to_string()))?;
            let source = BootSource {
                kernel: Kernel::Builtin(GUEST_ELF),
                initrd: None,
                cmdline: spec.to_cmdline(),
            };
            Ok((source, SavedGuest::Workload { spec: spec.to_string() }))
        }
        Guest::Kernel(source) => {
            let kernel = match &source.kernel {
                Kernel::File(path) => path.display().to_string(),
                Kernel::Builtin(_) => "built-in".to_owned(),
            };
            let initrd = source.initrd.as_ref().map(|path| path.display().to_string());
            let saved = SavedGuest::Kernel { kernel, initrd, cmdline: source.cmdline.clone() };
            Ok((source.clone(), saved))
        }
    }
}
