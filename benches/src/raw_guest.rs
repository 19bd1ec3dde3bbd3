//! The built-in guest on a bare machine: one vCPU in a thread, with access to KVM's handle.
//!
//! A `Vm` keeps its handle to itself, and rightly so; but the floors of a checkpoint are ioctls on
//! it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use frazil_snapstore::{PAGE_SIZE, PageSet};
use frazil_vmm::boot::{self, BootSource, Kernel};
use frazil_vmm::dirty::{DirtyRings, DirtyTracker, TrackerKind};
use frazil_vmm::kvm::{Hypervisor, VmShell};
use frazil_vmm::memory::GuestRam;
use frazil_vmm::workload::control::vcpu_control_gpa;
use frazil_vmm::workload::{GUEST_ELF, WorkloadSpec};
use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// How often to look at the guest's progress.
const POLL: Duration = Duration::from_micros(100);
/// How long a guest may make no progress before it is given up.
pub(crate) const PATIENCE: Duration = Duration::from_mins(5);

/// How long to wait before kicking again: a kick just before the thread enters the guest is lost.
const REKICK_AFTER: Duration = Duration::from_millis(50);
/// How long to spin before sleeping between looks.
const SPIN: Duration = Duration::from_millis(5);

const LINE_STATUS_PORT: u16 = 0x3fd;
const TRANSMITTER_EMPTY: u8 = 0x60;

/// A running guest.
#[derive(Debug)]
pub(crate) struct RawGuest {
    shell: VmShell,
    meeting: Arc<Meeting>,
    vcpu: Option<JoinHandle<anyhow::Result<VcpuFd>>>,
    data_pages: u64,
}

impl RawGuest {
    /// Boots the built-in guest with `spec` and lets it run; `prepare` may prepare its RAM first.
    pub(crate) fn start(
        spec: &str,
        ram_bytes: u64,
        prepare: impl FnOnce(&GuestRam) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        Self::start_tracked(spec, ram_bytes, Some(TrackerKind::Bitmap), prepare)
    }

    /// Like [`Self::start`]; `kind` is the tracker of the guest's writes, None the one a `Vm` would
    /// have.
    pub(crate) fn start_tracked(
        spec: &str,
        ram_bytes: u64,
        kind: Option<TrackerKind>,
        prepare: impl FnOnce(&GuestRam) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let hypervisor = Hypervisor::open()?;
        let ram = Arc::new(GuestRam::new(ram_bytes)?);
        prepare(&ram)?;
        let shell = VmShell::new(&hypervisor, ram, kind)?;
        let vcpu = shell.fd.create_vcpu(0).context("KVM refused a vCPU")?;
        vcpu.set_cpuid2(&hypervisor.supported_cpuid()?).context("KVM refused CPUID")?;
        let rings = shell.rings().cloned();
        if let Some(rings) = &rings {
            rings.add(&vcpu)?;
        }
        boot::set_local_apic(&vcpu)?;
        let mut spec: WorkloadSpec = spec.parse()?;
        spec.tsc_khz = vcpu.get_tsc_khz().context("KVM reports no TSC frequency")?.into();
        spec.check_fits(ram_bytes)?;
        let source = BootSource {
            kernel: Kernel::Builtin(GUEST_ELF),
            initrd: None,
            cmdline: spec.to_cmdline(),
        };
        let entry = boot::load(&source, &shell.ram, 1, &[])?;
        boot::set_boot_registers(&vcpu, entry)?;
        register_signal_handler(kick_signal(), on_kick).context("cannot handle a signal")?;
        let meeting = Arc::new(Meeting::default());
        let met = Arc::clone(&meeting);
        let vcpu = std::thread::Builder::new()
            .name("bench-vcpu".into())
            .spawn(move || run(vcpu, &met, rings.as_deref()))
            .context("cannot start a thread")?;
        let data_pages = spec.data_pages(data_pages(ram_bytes)).unwrap_or(0);
        Ok(Self { shell, meeting, vcpu: Some(vcpu), data_pages })
    }

    /// Pages that the guest works on.
    pub(crate) fn data_pages(&self) -> u64 {
        self.data_pages
    }

    /// KVM's handle.
    pub(crate) fn vm(&self) -> &VmFd {
        &self.shell.fd
    }

    /// Pages that the guest has written so far, counted once per write.
    pub(crate) fn turns(&self) -> anyhow::Result<u64> {
        turns(&self.shell.ram)
    }

    /// Waits until the guest has written `turns` pages. Returns how many it has written, and the
    /// time.
    pub(crate) fn wait_turns(&self, turns: u64) -> anyhow::Result<(u64, Instant)> {
        wait_turns(&self.shell.ram, turns, || {
            self.vcpu.as_ref().is_some_and(|vcpu| !vcpu.is_finished())
        })
    }

    /// Time the guest takes to write each of its pages once, with nothing else going on.
    pub(crate) fn lap(&self) -> anyhow::Result<Duration> {
        let (first, started) = (self.turns()?, Instant::now());
        let (last, ended) = self.wait_turns(first + self.data_pages)?;
        // Progress is seen a little late, when the guest is further on: scale the time.
        Ok((ended - started).mul_f64(self.data_pages as f64 / (last - first) as f64))
    }

    /// Reads and clears KVM's dirty log. Returns the time of the system calls and the number of
    /// pages.
    pub(crate) fn dirty_log(&self) -> anyhow::Result<(Duration, u64)> {
        let mut dirty = PageSet::new(self.shell.ram.end_page());
        let mut took = Duration::ZERO;
        for (slot, (range, _)) in self.shell.ram.mapped_ranges().enumerate() {
            let started = Instant::now();
            let words = self.vm().get_dirty_log(slot as u32, range.len_bytes as usize);
            took += started.elapsed();
            let words = words.context("KVM refused to read the dirty log")?;
            dirty.insert_words(range.gpa / PAGE_SIZE as u64, &words);
        }
        Ok((took, dirty.count()))
    }

    /// The tracker of the guest's writes.
    pub(crate) fn tracker(&self) -> Box<dyn DirtyTracker> {
        self.shell.tracker()
    }

    /// An empty set with room for all pages of the guest.
    pub(crate) fn no_pages(&self) -> PageSet {
        PageSet::new(self.shell.ram.end_page())
    }

    /// Kicks the vCPU out of the guest, and keeps it out until [`Self::release`].
    pub(crate) fn hold(&self) -> anyhow::Result<()> {
        self.meeting.hold.store(true, Ordering::Release);
        let held = || self.meeting.held.load(Ordering::Acquire);
        while !held() {
            self.kick()?;
            wait_until(REKICK_AFTER, held);
        }
        Ok(())
    }

    /// Lets the vCPU go on. Returns when it is about to enter the guest.
    pub(crate) fn release(&self) {
        self.meeting.hold.store(false, Ordering::Release);
        wait_until(PATIENCE, || !self.meeting.held.load(Ordering::Acquire));
    }

    fn kick(&self) -> anyhow::Result<()> {
        let vcpu = self.vcpu.as_ref().filter(|vcpu| !vcpu.is_finished());
        let vcpu = vcpu.context("the guest has ended")?;
        vcpu.kill(kick_signal()).context("cannot send a signal to a thread")
    }

    /// Stops the guest for good.
    pub(crate) fn stop(&mut self) -> anyhow::Result<VcpuFd> {
        self.meeting.end.store(true, Ordering::Release);
        while self.kick().is_ok() {
            std::thread::sleep(POLL);
        }
        let vcpu = self.vcpu.take().context("the guest was already stopped")?;
        vcpu.join().map_err(|_panic| anyhow!("the vCPU's thread panicked"))?
    }
}

impl Drop for RawGuest {
    fn drop(&mut self) {
        if self.vcpu.is_some() {
            // How the guest ended is of no interest any more.
            let _ended = self.stop();
        }
    }
}

/// Synchronises the vCPU's thread with whoever stops it. Both spin, which is fastest.
#[derive(Debug, Default)]
struct Meeting {
    hold: AtomicBool,
    held: AtomicBool,
    end: AtomicBool,
}

impl Meeting {
    /// Called by the vCPU's thread outside the guest.
    fn attend(&self) {
        if self.hold.load(Ordering::Acquire) {
            self.held.store(true, Ordering::Release);
            let gone_on = || !self.hold.load(Ordering::Acquire) || self.end.load(Ordering::Acquire);
            wait_until(Duration::MAX, gone_on);
            self.held.store(false, Ordering::Release);
        }
    }
}

/// Waits until `reached` is true, or for `patience`.
fn wait_until(patience: Duration, reached: impl Fn() -> bool) {
    let started = Instant::now();
    while !reached() && started.elapsed() < patience {
        if started.elapsed() < SPIN {
            std::hint::spin_loop();
        } else {
            std::thread::sleep(POLL);
        }
    }
}

/// The signal that kicks the vCPU's thread. Not the one of `Vm`, whose handler does more.
fn kick_signal() -> libc::c_int {
    SIGRTMIN() + 2
}

/// Does nothing: a kick only has to interrupt KVM_RUN.
extern "C" fn on_kick(
    _signal: libc::c_int,
    _info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
}

fn run(mut vcpu: VcpuFd, meeting: &Meeting, rings: Option<&DirtyRings>) -> anyhow::Result<VcpuFd> {
    while !meeting.end.load(Ordering::Acquire) {
        match vcpu.run() {
            // The only device is a serial port that accepts everything and sends nothing.
            Ok(VcpuExit::IoIn(LINE_STATUS_PORT, data)) => data.fill(TRANSMITTER_EMPTY),
            Ok(VcpuExit::IoIn(_, data)) => data.fill(0xff),
            Ok(VcpuExit::IoOut(..) | VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..)) => {}
            Ok(VcpuExit::Intr) => meeting.attend(),
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                rings.context("KVM reports a full dirty ring, but there is none")?.relieve()?;
            }
            Ok(other) => return Err(anyhow!("the guest ended with {other:?}")),
            Err(error) if error.errno() == libc::EINTR => meeting.attend(),
            Err(error) => return Err(error).context("KVM_RUN failed"),
        }
    }
    Ok(vcpu)
}

/// Pages that the built-in guest works on, in a machine with `ram_bytes` of RAM.
pub(crate) fn data_pages(ram_bytes: u64) -> u64 {
    frazil_vmm::workload::spec::data_bytes_available(ram_bytes) / PAGE_SIZE as u64
}

/// Pages that vCPU 0 has written so far, from its control page.
pub(crate) fn turns(ram: &GuestRam) -> anyhow::Result<u64> {
    // The progress counter is the control page's first field.
    ram.memory()
        .load(GuestAddress(vcpu_control_gpa(0)), Ordering::Relaxed)
        .context("cannot read the guest's progress")
}

/// Waits until vCPU 0 has written `target` pages. Returns how many it has written, and the time.
pub(crate) fn wait_turns(
    ram: &GuestRam,
    target: u64,
    alive: impl Fn() -> bool,
) -> anyhow::Result<(u64, Instant)> {
    let (mut last, mut moved) = (turns(ram)?, Instant::now());
    loop {
        let now = turns(ram)?;
        if now >= target {
            return Ok((now, Instant::now()));
        }
        ensure!(alive(), "the guest ended after {now} of {target} pages");
        if now != last {
            (last, moved) = (now, Instant::now());
        }
        ensure!(
            moved.elapsed() < PATIENCE,
            "the guest has been stuck after {now} of {target} pages for {} s",
            PATIENCE.as_secs()
        );
        std::thread::sleep(POLL);
    }
}
