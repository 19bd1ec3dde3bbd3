//! vCPUs: one thread each, which can be stopped at an instruction boundary and read.
//!
//! `unsafe` is allowed here for the signal that kicks a thread out of KVM_RUN, whose handler sets
//! `immediate_exit` in the thread's own `kvm_run`, which no wrapper can do from outside; and for
//! reading the port I/O fields of `kvm_run` that wrappers leave out.
#![allow(unsafe_code)]

mod exits;
mod gate;
pub mod saved;
mod state;

use std::cell::Cell;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{
    CpuId, KVM_EXIT_DIRTY_RING_FULL, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, register_signal_handler};

use crate::checkpoint::PAUSE_SPAN;
use crate::confine::{Role, confine};
use crate::cpuid;
use crate::devices::Bus;
use crate::dirty::DirtyRings;
use crate::error::{Result, VmmError};
use crate::kvm::{Hypervisor, VmShell};
pub use exits::ExitCounts;
use exits::{ExitCounters, port_access_bytes};
pub use gate::Ended;
use gate::{Gate, Goal, Task};
use saved::SavedVcpu;
use state::{RawVcpu, StateReader};

/// The signal that kicks a vCPU thread. `SIGRTMIN` is past the signals the C library keeps for
/// itself.
fn kick_signal() -> i32 {
    libc::SIGRTMIN() + 1
}

/// How long to wait for a kick to take effect before kicking again.
const REKICK_AFTER: Duration = Duration::from_millis(50);
/// How long the vCPUs may take to stop; a page fault that cannot be served ends the machine sooner.
const STOP_PATIENCE: Duration = Duration::from_mins(1);
/// A guest that uses kvmclock is told of pauses longer than this.
const LONG_PAUSE: Duration = Duration::from_millis(500);

thread_local! {
    /// Points to `kvm_run.immediate_exit` of the vCPU that this thread runs, or is null.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

extern "C" fn on_kick(
    _signal: libc::c_int,
    _info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: the thread sets the pointer to a field of its vCPU's kvm_run, and resets it
        // before the kvm_run is unmapped. A volatile store of a byte is allowed in a signal
        // handler.
        unsafe { flag.write_volatile(1) };
    }
}

/// A vCPU that has no thread yet.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    index: usize,
    reader: StateReader,
    rings: Option<Arc<DirtyRings>>,
}

impl Vcpu {
    /// Creates a fresh vCPU, for a machine that is about to boot.
    ///
    /// # Errors
    /// [`VmmError::Kvm`] naming what KVM refused.
    pub fn new(
        hypervisor: &Hypervisor,
        shell: &VmShell,
        index: usize,
        cpuid: &CpuId,
    ) -> Result<Self> {
        let fd = shell.fd.create_vcpu(index as u64).map_err(VmmError::kvm("create a vCPU"))?;
        fd.set_cpuid2(cpuid).map_err(VmmError::kvm("set CPUID"))?;
        let reader = StateReader::new(&shell.fd, &fd, &hypervisor.msr_indices()?, cpuid)?;
        let rings = shell.rings().cloned();
        if let Some(rings) = &rings {
            rings.add(&fd)?;
        }
        Ok(Self { fd, index, reader, rings })
    }

    /// Creates a vCPU with the state `saved`, from the chunk `chunk`.
    ///
    /// # Errors
    /// [`VmmError::State`] or [`VmmError::Kvm`] naming what does not fit this host.
    pub fn restore(
        hypervisor: &Hypervisor,
        shell: &VmShell,
        index: usize,
        chunk: &str,
        saved: &SavedVcpu,
    ) -> Result<Self> {
        let cpuid = state::restore_cpuid(chunk, &saved.cpuid)?;
        // The other vCPUs' CPUID asks for no other features.
        if index == 0 {
            cpuid::check(hypervisor, chunk, &cpuid)?;
        }
        let vcpu = Self::new(hypervisor, shell, index, &cpuid)?;
        vcpu.reader.restore(&vcpu.fd, chunk, saved)?;
        tell_of_pause(&vcpu.fd);
        Ok(vcpu)
    }

    /// KVM's handle, to set boot registers.
    pub(crate) fn fd(&self) -> &VcpuFd {
        &self.fd
    }
}

/// Keeps the guest's watchdogs from taking a pause for a lockup (`KVM_KVMCLOCK_CTRL`).
fn tell_of_pause(vcpu: &VcpuFd) {
    // A guest without kvmclock cannot be told.
    let _has_none = vcpu.kvmclock_ctrl();
}

/// A stopped vCPU's state as read, to be encoded once the guest runs again.
#[derive(Debug)]
pub struct CapturedVcpu {
    raw: Box<RawVcpu>,
    reader: Arc<StateReader>,
}

impl CapturedVcpu {
    /// Returns the saved form of the state.
    #[must_use]
    pub fn save(&self) -> SavedVcpu {
        self.reader.save(&self.raw)
    }
}

/// Hands over a vCPU's state: first the room for it, then what the thread captured.
#[derive(Debug, Default)]
struct CaptureSlot {
    room: Option<Box<RawVcpu>>,
    captured: Option<Result<Box<RawVcpu>>>,
}

/// Hands a vCPU's thread a state to restore, and holds the result.
#[derive(Debug, Default)]
struct RestoreSlot {
    wanted: Option<Arc<SavedVcpu>>,
    done: Option<Result<()>>,
}

#[derive(Debug)]
struct VcpuThread {
    join: JoinHandle<()>,
    reader: Arc<StateReader>,
    capturing: Arc<Mutex<CaptureSlot>>,
    restoring: Arc<Mutex<RestoreSlot>>,
}

impl VcpuThread {
    fn capturing(&self) -> MutexGuard<'_, CaptureSlot> {
        lock(&self.capturing)
    }
}

/// Locks a slot. Poisoning is ignored: a panic leaves nothing in a slot half done.
fn lock<T>(slot: &Mutex<T>) -> MutexGuard<'_, T> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All vCPUs of a machine, and their threads.
#[derive(Debug)]
pub struct VcpuSet {
    gate: Arc<Gate>,
    exits: Arc<ExitCounters>,
    threads: Vec<VcpuThread>,
}

impl VcpuSet {
    /// Starts a thread for each vCPU. They are parked until [`Self::resume`].
    ///
    /// # Errors
    /// [`VmmError::Host`] if a thread cannot be started or the signal handler cannot be registered.
    pub fn start(vcpus: Vec<Vcpu>, bus: &Arc<Bus>) -> Result<Self> {
        register_signal_handler(kick_signal(), on_kick).map_err(|error| VmmError::Host {
            op: "register a signal handler".into(),
            source: std::io::Error::from_raw_os_error(error.errno()),
        })?;
        let gate = Arc::new(Gate::new(vcpus.len()));
        let exits = Arc::<ExitCounters>::default();
        let mut threads = Vec::with_capacity(vcpus.len());
        for vcpu in vcpus {
            let (capturing, restoring) = (Arc::default(), Arc::default());
            let reader = Arc::new(vcpu.reader);
            let thread = RunningVcpu {
                reader: Arc::clone(&reader),
                rings: vcpu.rings,
                fd: vcpu.fd,
                index: vcpu.index,
                gate: Arc::clone(&gate),
                bus: Arc::clone(bus),
                exits: Arc::clone(&exits),
                capturing: Arc::clone(&capturing),
                restoring: Arc::clone(&restoring),
                settled: false,
            };
            let join = std::thread::Builder::new()
                .name(format!("frazil-vcpu{}", vcpu.index))
                .spawn(move || thread.run())
                .map_err(VmmError::host("start a vCPU thread"))?;
            threads.push(VcpuThread { join, reader, capturing, restoring });
        }
        Ok(Self { gate, exits, threads })
    }

    /// Stops every vCPU at an instruction boundary, with half-done exits finished.
    ///
    /// # Errors
    /// [`VmmError::NotNow`] if the machine has ended, or a vCPU does not stop within a minute.
    pub fn pause(&self) -> Result<()> {
        self.gate.set_goal(Goal::Park { task: Task::Nothing });
        self.kick_until(|patience| self.gate.wait_parked(patience))
    }

    /// While the guest runs, allocates room for the states that [`Self::pause_and_capture`] reads.
    ///
    /// # Errors
    /// [`VmmError::Config`] if it cannot be allocated.
    pub fn prepare_capture(&self) -> Result<()> {
        self.threads.iter().try_for_each(|thread| {
            // A capture that failed may have left something behind.
            let room = Some(thread.reader.room()?);
            *thread.capturing() = CaptureSlot { room, captured: None };
            Ok(())
        })
    }

    /// As [`Self::pause`], after which each thread goes on to read its own vCPU's state into the
    /// room that [`Self::prepare_capture`] made; [`Self::take_captured`] waits for that.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub fn pause_and_capture(&self) -> Result<()> {
        self.gate.set_goal(Goal::Park { task: Task::Capture });
        self.kick_until(|patience| self.gate.wait_stopped(patience))
    }

    fn kick_until(&self, reached: impl Fn(Duration) -> bool) -> Result<()> {
        let started = Instant::now();
        loop {
            self.kick();
            if reached(REKICK_AFTER) {
                break;
            }
            if started.elapsed() > STOP_PATIENCE {
                return Err(VmmError::NotNow("the vCPUs did not stop within a minute".into()));
            }
        }
        match self.gate.ended() {
            None => Ok(()),
            Some(ended) => Err(VmmError::NotNow(format!("the VM has ended: {ended:?}"))),
        }
    }

    /// Lets the vCPUs run; returns once all of their threads have left the gate.
    pub fn resume(&self) {
        self.gate.set_goal(Goal::Run);
        self.gate.wait_unparked(STOP_PATIENCE);
    }

    /// Waits until the states that [`Self::pause_and_capture`] asked for are read, and adds them to
    /// `captured`.
    ///
    /// # Errors
    /// The error of a vCPU's thread that could not read its state; [`VmmError::NotNow`] if the
    /// machine ended.
    pub fn take_captured(&self, captured: &mut Vec<CapturedVcpu>) -> Result<()> {
        if !self.gate.wait_parked(STOP_PATIENCE) || self.gate.ended().is_some() {
            return Err(VmmError::NotNow(
                "the vCPUs ended while their state was being read".into(),
            ));
        }
        let nothing = || VmmError::NotNow("a vCPU's state was not captured".into());
        self.threads.iter().try_for_each(|thread| {
            let raw = thread.capturing().captured.take().ok_or_else(nothing)??;
            captured.push(CapturedVcpu { raw, reader: Arc::clone(&thread.reader) });
            Ok(())
        })
    }

    /// Checks that each vCPU can be given the state at its index in `states`: the CPUID that it
    /// runs with cannot be changed any more.
    ///
    /// # Errors
    /// [`VmmError::State`] naming the first vCPU that cannot.
    pub fn check_states(&self, states: &[Arc<SavedVcpu>]) -> Result<()> {
        for (index, (thread, state)) in self.threads.iter().zip(states).enumerate() {
            thread.reader.check_cpuid(&format!("vcpu{index}"), state)?;
        }
        Ok(())
    }

    /// Gives each vCPU the state at its index in `states`. The vCPUs must stand still after
    /// [`Self::pause`], and stay so.
    ///
    /// # Errors
    /// What KVM refused: some vCPUs may have the new state by then, so none may run.
    /// [`VmmError::NotNow`] if the machine ends meanwhile.
    pub fn restore(&self, states: &[Arc<SavedVcpu>]) -> Result<()> {
        for (thread, state) in self.threads.iter().zip(states) {
            let wanted = Some(Arc::clone(state));
            *lock(&thread.restoring) = RestoreSlot { wanted, done: None };
        }
        // No kick: the threads wait in the gate, and a signal would only get in KVM's way.
        self.gate.set_goal(Goal::Park { task: Task::Restore });
        if !self.gate.wait_parked(STOP_PATIENCE) || self.gate.ended().is_some() {
            return Err(VmmError::NotNow("the vCPUs ended while their state was being set".into()));
        }
        let nothing = || VmmError::NotNow("a vCPU's state was not set".into());
        self.threads
            .iter()
            .try_for_each(|thread| lock(&thread.restoring).done.take().ok_or_else(nothing)?)
    }

    /// Ends the machine.
    pub fn end(&self, reason: Ended) {
        self.gate.end(reason);
        self.kick();
    }

    /// Returns why the machine ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        self.gate.ended()
    }

    /// Waits for the machine's end; returns `None` if it has not ended after `patience`.
    #[must_use]
    pub fn wait_ended(&self, patience: Duration) -> Option<Ended> {
        let ended = self.gate.wait_ended(patience);
        if ended.is_some() {
            // A vCPU that ended the machine did not kick the others.
            self.kick();
        }
        ended
    }

    /// Returns how often the vCPUs left the guest.
    #[must_use]
    pub fn exits(&self) -> ExitCounts {
        self.exits.counts()
    }

    /// The number of vCPUs.
    #[must_use]
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    fn kick(&self) {
        for thread in &self.threads {
            // A thread that has ended needs no kick.
            let _gone = thread.join.kill(kick_signal());
        }
    }
}

impl Drop for VcpuSet {
    fn drop(&mut self) {
        self.end(Ended::Stopped);
        for thread in self.threads.drain(..) {
            while !thread.join.is_finished() {
                let _gone = thread.join.kill(kick_signal());
                std::thread::sleep(Duration::from_millis(1));
            }
            // A panic was reported by the panic hook, and ended the machine.
            let _joined = thread.join.join();
        }
    }
}

struct RunningVcpu {
    fd: VcpuFd,
    index: usize,
    reader: Arc<StateReader>,
    rings: Option<Arc<DirtyRings>>,
    gate: Arc<Gate>,
    bus: Arc<Bus>,
    exits: Arc<ExitCounters>,
    capturing: Arc<Mutex<CaptureSlot>>,
    restoring: Arc<Mutex<RestoreSlot>>,
    /// True if no exit is pending: KVM_RUN last returned because it was interrupted.
    settled: bool,
}

/// The outcome of one entry into the guest.
enum Turn {
    Again,
    /// Kicked: look at the gate.
    Kicked,
    End(Ended),
}

/// Takes a vCPU's thread out of the gate, however the thread ends.
struct Leaving(Arc<Gate>);

impl Drop for Leaving {
    fn drop(&mut self) {
        if std::thread::panicking() {
            IMMEDIATE_EXIT.set(std::ptr::null_mut());
            self.0.end(Ended::Failed { detail: "a vCPU's thread panicked".into() });
        }
        self.0.leave();
    }
}

impl RunningVcpu {
    fn run(mut self) {
        let _leaving = Leaving(Arc::clone(&self.gate));
        if let Err(error) = confine(Role::Vcpu) {
            self.gate.end(self.failed(&error.to_string()));
        }
        IMMEDIATE_EXIT.set(&raw mut self.fd.get_kvm_run().immediate_exit);
        loop {
            match self.gate.goal() {
                (Goal::Run, _) => match self.turn() {
                    Turn::Again | Turn::Kicked => {}
                    Turn::End(reason) => self.gate.end(reason),
                },
                (Goal::Park { task }, epoch) => self.park(task, epoch),
                (Goal::Exit, _) => break,
            }
        }
        IMMEDIATE_EXIT.set(std::ptr::null_mut());
    }

    /// Runs the guest until it is kicked, or ends.
    fn turn(&mut self) -> Turn {
        loop {
            match self.enter() {
                Turn::Again => {}
                other => return other,
            }
        }
    }

    fn park(&mut self, task: Task, epoch: u64) {
        if let Some(reason) = self.finish_exit() {
            self.gate.end(reason);
        } else if task != Task::Nothing && self.gate.wait_all_stopped(epoch) {
            match task {
                Task::Nothing => {}
                Task::Capture => {
                    let _pause = tracing::trace_span!(PAUSE_SPAN).entered();
                    let captured = self.capture();
                    lock(&self.capturing).captured = Some(captured);
                }
                Task::Restore => self.restore(),
            }
        }
        let parked = Instant::now();
        self.gate.park(epoch);
        if parked.elapsed() > LONG_PAUSE {
            tell_of_pause(&self.fd);
        }
    }

    /// Gives the vCPU the state in its slot. Its last exit has been finished.
    fn restore(&mut self) {
        let mut slot = lock(&self.restoring);
        if let Some(saved) = slot.wanted.take() {
            slot.done = Some(self.reader.replace(&self.fd, self.index, &saved));
        }
    }

    fn capture(&mut self) -> Result<Box<RawVcpu>> {
        let room = lock(&self.capturing).room.take();
        let mut raw = room.map_or_else(|| self.reader.room(), Ok)?;
        let mp_state = StateReader::read_mp_state(&self.fd)?;
        self.reader.want_sync(&mut self.fd, true);
        self.settled = false;
        let ended = self.finish_exit();
        self.reader.want_sync(&mut self.fd, false);
        if let Some(reason) = ended {
            self.gate.end(reason.clone());
            return Err(VmmError::NotNow(format!("the VM has ended: {reason:?}")));
        }
        self.reader.read(&self.fd, mp_state, &mut raw)?;
        Ok(raw)
    }

    /// Finishes a pending exit: a vCPU that left KVM_RUN for I/O is in the middle of an
    /// instruction, which entering again with `immediate_exit` completes without starting another.
    /// A vCPU that was interrupted has none pending.
    fn finish_exit(&mut self) -> Option<Ended> {
        while !self.settled {
            self.fd.set_kvm_immediate_exit(1);
            if let Turn::End(reason) = self.enter() {
                return Some(reason);
            }
        }
        None
    }

    fn enter(&mut self) -> Turn {
        self.settled = false;
        let run: *const _ = self.fd.get_kvm_run();
        let exit = self.fd.run();
        self.exits.count(&exit);
        match exit {
            Ok(VcpuExit::IoOut(port, data)) => {
                // SAFETY: the vCPU has just left KVM_RUN for port I/O.
                let accesses = data.chunks(unsafe { port_access_bytes(run) });
                let ends = accesses.filter_map(|access| self.bus.pio_write(port, access));
                // Every access is carried out, even after one that ends the machine.
                ends.reduce(|first, _| first).map_or(Turn::Again, Turn::End)
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                // SAFETY: as above.
                let accesses = data.chunks_mut(unsafe { port_access_bytes(run) });
                accesses.for_each(|access| self.bus.pio_read(port, access));
                Turn::Again
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.bus.virtio().mmio().read(address, data);
                Turn::Again
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.bus.virtio().mmio().write(address, data);
                Turn::Again
            }
            Ok(VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => Turn::Again,
            Ok(VcpuExit::Intr) => self.kicked(),
            Ok(VcpuExit::Shutdown) => Turn::End(self.crashed("triple fault")),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => {
                Turn::End(self.crashed("the guest reported a crash"))
            }
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => Turn::End(Ended::PoweredOff),
            Ok(VcpuExit::SystemEvent(..)) => Turn::End(Ended::GuestReset),
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => self.relieve_rings(),
            Ok(other) => {
                let exit = format!("{other:?}");
                Turn::End(self.failed(&format!("unexpected exit {exit}")))
            }
            Err(error) => match error.errno() {
                libc::EINTR => self.kicked(),
                libc::EAGAIN => Turn::Again,
                _ => Turn::End(self.failed(&format!("KVM_RUN failed: {error}"))),
            },
        }
    }

    /// Makes room in the dirty rings: KVM lets the vCPU go on once its ring is not full.
    fn relieve_rings(&self) -> Turn {
        match self.rings.as_ref().map(|rings| rings.relieve()) {
            Some(Ok(())) => Turn::Again,
            Some(Err(error)) => Turn::End(self.failed(&error.to_string())),
            None => Turn::End(self.failed("KVM reports a full dirty ring, but none is in use")),
        }
    }

    fn kicked(&mut self) -> Turn {
        // Cleared before the gate is looked at: a kick after that look sets the flag again.
        self.fd.set_kvm_immediate_exit(0);
        // KVM finishes a pending exit before it checks for interruptions.
        self.settled = true;
        Turn::Kicked
    }

    fn crashed(&self, what: &str) -> Ended {
        Ended::GuestCrashed { detail: format!("vCPU {}: {what} {}", self.index, self.place()) }
    }

    fn failed(&self, what: &str) -> Ended {
        Ended::Failed { detail: format!("vCPU {}: {what} {}", self.index, self.place()) }
    }

    fn place(&self) -> String {
        match self.fd.get_regs() {
            Ok(regs) => format!("at rip {:#x}, rsp {:#x}", regs.rip, regs.rsp),
            Err(error) => format!("at an unknown address ({error})"),
        }
    }
}
