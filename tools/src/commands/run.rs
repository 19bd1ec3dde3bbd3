//! `frazil run` and `frazil resume`: a VM in this process, until it ends.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::Context;
use frazil_snapstore::{SnapshotId, Store, StoreOptions};
use frazil_vmm::boot::{BootSource, Kernel};
use frazil_vmm::confine;
use frazil_vmm::control::{Registration, Server, memory_socket};
use frazil_vmm::devices::serial::SerialOutput;
use frazil_vmm::disk::OverlayOptions;
use frazil_vmm::keeper::{Keeper, Kept};
use frazil_vmm::privileges::User;
use frazil_vmm::scheduler::{Schedule, ScheduleEvent, Scheduler};
use frazil_vmm::{
    CheckpointReport, ClockPolicy, Ended, Guest, HostConfig, Loading, MachineConfig, PagerPlace, Vm,
};
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::tell::EventPrinter;
use super::{
    Started, as_user, clones, default_store, find_snapshot, monotonic_ns, pager, print_json,
};
use crate::cli::{
    ClockArg, HostArgs, PagerArg, ResumeArgs, RunArgs, SerialArg, SerialInput, WorkingSetArg,
};
use crate::console::{self, Console};
use crate::output;

/// A signal that comes within this time of the first is the same one, sent twice.
const SIGNAL_ECHO: Duration = Duration::from_millis(500);
/// How long to wait for the guest's counters to be read before it runs anyway.
const FIRST_READ_PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait for a resumed workload's first progress before giving up on reporting it.
const FIRST_PROGRESS_PATIENCE: Duration = Duration::from_mins(1);

pub(crate) fn run(args: RunArgs, json: bool) -> anyhow::Result<ExitCode> {
    let RunArgs { kernel, initrd, cmdline, workload, memory, cpus, disks, no_balloon, host } = args;
    let is_kernel = kernel.is_some();
    let guest = match (kernel, workload) {
        (_, Some(spec)) => Guest::Workload(spec),
        (Some(kernel), None) => {
            Guest::Kernel(BootSource { kernel: Kernel::File(kernel), initrd, cmdline })
        }
        (None, None) => anyhow::bail!("expected --kernel FILE or --workload SPEC"),
    };
    let wants_store = host.store.is_some()
        || host.checkpoint_every.is_some()
        || !host.keep.policy().is_empty()
        || std::env::var_os("FRAZIL_STORE").is_some();
    let store_path = host.store.clone().unwrap_or_else(default_store);
    let store = if wants_store || store_path.exists() {
        Some(open_or_create(&store_path, &host)?)
    } else {
        None
    };
    let registration = Registration::enter(&vm_name(&host), host.api_socket.clone())?;
    let name = registration.record().name.clone();
    let config = MachineConfig {
        disks,
        nets: host.nets.clone(),
        // The built-in guest has no drivers for these.
        rng: is_kernel,
        balloon: is_kernel && !no_balloon,
        vsock: host.vsock.clone(),
        acpi_devices: is_kernel,
        ..MachineConfig::new(name, memory, cpus, guest)
    };
    let vm = Vm::boot(&config, host_config(&host, store, json))?;
    serve(Session {
        vm: Arc::new(vm),
        registration,
        host,
        store_path,
        json,
        paused: false,
        is_clone: false,
        first_progress: None,
    })
}

pub(crate) fn resume(args: ResumeArgs, json: bool, started: Started) -> anyhow::Result<ExitCode> {
    let (path, store, snapshot) = as_user(args.host.user.as_ref(), || {
        let (path, store, named) = find_snapshot(&args.snapshot, store_options(&args.host))?;
        // A pinned snapshot can be forgotten, but not pruned away under the VM.
        let snapshot = store.pin(args.exactly.unwrap_or(named))?;
        if let Some(user) = &args.host.user {
            user.check_writable(&path)?;
        }
        Ok((path, store, snapshot))
    })?;
    let id = snapshot.id();
    if args.clones.is_some() {
        warn_of_ignored_paging(&args, id)?;
    }
    if let Some(count) = args.clones.filter(|count| *count > 1) {
        return clones::run(&args, count, &path, id);
    }
    let loading = loading(&args, &path, id)?;
    let is_clone = args.memory_from.is_some();
    let ResumeArgs { paused, clock, disks, host, .. } = args;
    let store_path = match &host.store {
        Some(other) if *other != path => anyhow::bail!(
            "--store {}: expected the store of the snapshot, {}: a resumed VM's checkpoints go \
             there",
            other.display(),
            path.display()
        ),
        _ => path,
    };
    let registration = Registration::enter(&vm_name(&host), host.api_socket.clone())?;
    let name = registration.record().name.clone();
    let clock = match clock {
        ClockArg::Host => ClockPolicy::Host,
        ClockArg::Snapshot => ClockPolicy::Snapshot,
    };
    let config = HostConfig { clock, disks, ..host_config(&host, Some(store), json) };
    let vm = Vm::resume(&snapshot, name, config, loading)
        .with_context(|| format!("cannot resume snapshot {}", snapshot.id().short()))?;
    serve(Session {
        vm: Arc::new(vm),
        registration,
        host,
        store_path,
        json,
        paused,
        is_clone,
        first_progress: Some(started),
    })
}

/// Opens or creates the store of a VM that runs as the user of `host`; what is created belongs to
/// that user.
fn open_or_create(path: &Path, host: &HostArgs) -> anyhow::Result<Arc<Store>> {
    if let Some(user) = &host.user {
        user.make_folder(path)?;
    }
    as_user(host.user.as_ref(), || {
        let store = Store::open_or_create(path, store_options(host))?;
        if let Some(user) = &host.user {
            user.check_writable(path)?;
        }
        Ok(store)
    })
}

/// Warns of paging options that have no effect: shared memory is loaded as the first VM asked.
fn warn_of_ignored_paging(args: &ResumeArgs, id: SnapshotId) -> anyhow::Result<()> {
    let given = [
        ("--no-fill", args.no_fill),
        ("--fill-rate", args.fill_rate.is_some()),
        ("--working-set", args.working_set != WorkingSetArg::Auto),
        ("--record-working-set", args.record_working_set.is_some()),
    ];
    let given: Vec<&str> = given.iter().filter(|(_, is)| *is).map(|(name, _)| *name).collect();
    if !given.is_empty() && frazil_snapstore::pager::connect(&memory_socket(id)?).is_ok() {
        errln!(
            "frazil: ignored: {}: running VMs already share the memory of snapshot {}, loaded as \
             the first of them asked",
            given.join(", "),
            id.short()
        );
    }
    Ok(())
}

/// How to load the memory of a resumed VM.
fn loading(args: &ResumeArgs, store: &Path, id: SnapshotId) -> anyhow::Result<Loading> {
    if args.eager {
        return Ok(Loading::Eager);
    }
    if let Some(socket) = &args.memory_from {
        end_with_parent()?;
        return Ok(Loading::Joined(socket.clone()));
    }
    if args.clones.is_some() {
        return clones::share_memory(args, store, id).map(Loading::Joined);
    }
    let options =
        pager::options(args.no_fill, args.fill_rate, args.working_set, args.record_working_set);
    let place = match args.pager {
        PagerArg::Internal => PagerPlace::Here,
        PagerArg::External => PagerPlace::Process {
            // Another user may have no access to this program's path.
            program: match &args.host.user {
                Some(_) => PathBuf::from("/proc/self/exe"),
                None => std::env::current_exe().context("cannot find the path of this program")?,
            },
            user: args.host.user.clone(),
        },
    };
    Ok(Loading::Lazy(options, place))
}

/// Ends this process, one of several clones, with the process that started it.
fn end_with_parent() -> anyhow::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
        .context("cannot ask for a signal when the process that started this one ends")
}

/// Switches to the user that `host` names, once everything that needs root is open.
fn settle(host: &HostArgs, is_clone: bool) -> anyhow::Result<()> {
    let Some(user) = &host.user else { return Ok(()) };
    user.settle()?;
    // A process that switches users loses its parent-death signal.
    if is_clone { end_with_parent() } else { Ok(()) }
}

/// A VM and what belongs to it while this process runs.
struct Session {
    vm: Arc<Vm>,
    registration: Registration,
    host: HostArgs,
    store_path: PathBuf,
    json: bool,
    paused: bool,
    is_clone: bool,
    first_progress: Option<Started>,
}

fn serve(session: Session) -> anyhow::Result<ExitCode> {
    let Session { vm, mut registration, host, store_path, json, paused, is_clone, first_progress } =
        session;
    stop_on_signals(&vm)?;
    let console = start_console(&vm, &host, json)?;
    let printer = EventPrinter::new(&vm, json);
    let server_printer = printer.clone();
    let on_event =
        move |taken: &frazil_vmm::Result<CheckpointReport>| server_printer.checkpoint(taken);
    let server = Server::start(Arc::clone(&vm), &registration.record().socket, Arc::new(on_event))?;
    // From here on the VM can be reached, and told to end.
    registration.announce()?;
    settle(&host, is_clone)?;
    announce(&vm, &registration, &store_path, &host, json, console.as_ref())?;
    if let Some(started) = first_progress {
        watch_first_progress(&vm, started, json);
    }
    // A VM that was told to end before it could start has not failed.
    if !paused
        && let Err(error) = vm.go()
        && vm.ended().is_none()
    {
        return Err(error.into());
    }
    let scheduler = start_scheduler(&vm, &host, &printer)?;
    let keeper = start_keeper(&vm, &host, printer)?;
    let ended = loop {
        if let Some(ended) = vm.wait_ended(Duration::from_hours(1)) {
            break ended;
        }
    };
    drop(scheduler);
    // Gives answers on their way, such as to the request that ended the VM, a moment to go out; the
    // line of a suspending checkpoint precedes that of the end.
    drop(server);
    // There are no more checkpoints: the keeper's last pass is final.
    drop(keeper);
    vm.finish_output();
    drop(console);
    let totals = vm.checkpoint_totals();
    let code = say_ended(&vm, &ended, json)?;
    if !json && totals.taken + totals.failed + totals.cancelled + totals.skipped > 0 {
        errln!(
            "frazil: VM `{}`: {} checkpoints ({} failed, {} cancelled, {} skipped), {} pages, {} stored, longest pause {}",
            vm.name(),
            totals.taken,
            totals.failed,
            totals.cancelled,
            totals.skipped,
            output::count(totals.pages),
            output::bytes(totals.stored_bytes),
            output::micros(totals.pause_us_max)
        );
    }
    drop(registration);
    Ok(code)
}

fn start_console(vm: &Arc<Vm>, host: &HostArgs, json: bool) -> anyhow::Result<Option<Console>> {
    match host.serial_input {
        SerialInput::None => Ok(None),
        SerialInput::Stdin => Console::start(vm).map(Some),
        SerialInput::Auto => {
            let wanted = !json && matches!(host.serial, SerialArg::Stdio);
            if wanted && console::is_in_foreground() {
                Console::start(vm).map(Some)
            } else {
                Ok(None)
            }
        }
    }
}

fn start_scheduler(
    vm: &Arc<Vm>,
    host: &HostArgs,
    printer: &EventPrinter,
) -> anyhow::Result<Option<Scheduler>> {
    let Some(every) = host.checkpoint_every else { return Ok(None) };
    let schedule = Schedule { every, quiet: host.checkpoint_quiet };
    let printer = printer.clone();
    let on_event = move |event: &ScheduleEvent<'_>| printer.schedule(event);
    Ok(Some(Scheduler::start(Arc::clone(vm), schedule, Arc::new(on_event))?))
}

fn start_keeper(
    vm: &Arc<Vm>,
    host: &HostArgs,
    printer: EventPrinter,
) -> anyhow::Result<Option<Keeper>> {
    let policy = host.keep.policy();
    if policy.is_empty() {
        return Ok(None);
    }
    let on_event = move |kept: &frazil_vmm::Result<Kept>| printer.kept(kept);
    Ok(Some(Keeper::start(Arc::clone(vm), policy, Box::new(on_event))?))
}

fn vm_name(host: &HostArgs) -> String {
    host.name.clone().unwrap_or_else(|| format!("vm-{}", std::process::id()))
}

fn store_options(host: &HostArgs) -> StoreOptions {
    StoreOptions {
        compression_level: host.compression,
        elide: host.elide,
        ..StoreOptions::default()
    }
}

fn host_config(host: &HostArgs, store: Option<Arc<Store>>, json: bool) -> HostConfig {
    if host.no_seccomp {
        confine::turn_off();
    }
    let serial = match &host.serial {
        SerialArg::Stdio if json => SerialOutput::Stderr,
        SerialArg::Stdio => SerialOutput::Stdout,
        SerialArg::Null => SerialOutput::Null,
        SerialArg::File(path) => SerialOutput::File(path.clone()),
    };
    HostConfig {
        tracker: host.dirty_tracking,
        staging_bytes: host.staging,
        throttle_max_percent: (host.throttle * 100.0).round().min(99.0) as u8,
        overlay: OverlayOptions { folder: host.overlay.clone(), ..OverlayOptions::default() },
        nets: host.nets.clone(),
        vsock: host.vsock.clone(),
        ..HostConfig::new(serial, store)
    }
}

/// Ctrl-C and `kill` end the VM as `frazil stop` does; a second signal ends the process at once.
fn stop_on_signals(vm: &Arc<Vm>) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot handle signals")?;
    let vm = Arc::downgrade(vm);
    std::thread::Builder::new().name("frazil-signals".into()).spawn(move || {
        let mut first: Option<Instant> = None;
        for signal in signals.forever() {
            // `timeout` and terminals send a signal twice: to the process and to its group.
            let again = first.get_or_insert_with(Instant::now).elapsed() > SIGNAL_ECHO;
            match vm.upgrade() {
                Some(vm) if !again => vm.stop(),
                _ if again => {
                    console::give_terminal_back();
                    std::process::exit(128 + signal)
                }
                _ => {}
            }
        }
    })?;
    Ok(())
}

fn announce(
    vm: &Vm,
    registration: &Registration,
    store_path: &Path,
    host: &HostArgs,
    json: bool,
    console: Option<&Console>,
) -> anyhow::Result<()> {
    let user = host.user.as_ref().map(User::spec);
    let record = registration.record();
    let store = vm.store().map(|_| store_path.display().to_string());
    if json {
        return print_json(&json!({
            "event": "started", "vm": record.name, "pid": record.pid, "socket": record.socket,
            "store": store, "ram_bytes": vm.machine().ram_bytes, "cpus": vm.machine().cpus,
            "resumed_from": vm.resumed_from(), "user": user,
        }));
    }
    errln!(
        "frazil: VM `{}` with {} and {} vCPU{}{}{}; `frazil stop {}` or {} ends it",
        record.name,
        output::bytes(vm.machine().ram_bytes),
        vm.machine().cpus,
        if vm.machine().cpus == 1 { "" } else { "s" },
        store.map_or_else(|| ", no store".to_owned(), |store| format!(", checkpoints to {store}")),
        user.map_or_else(String::new, |user| format!(", as user {user}")),
        record.name,
        if console.is_some_and(Console::is_terminal) { "Ctrl-A x" } else { "Ctrl-C" },
    );
    Ok(())
}

/// Reports when the built-in guest of a resumed VM makes its first progress.
fn watch_first_progress(vm: &Arc<Vm>, started: Started, json: bool) {
    // Reading the guest's counters may need its memory to be loaded, so never do it on the thread
    // that has to notice that the VM has failed.
    let (ready, read) = mpsc::channel();
    let vm = Arc::downgrade(vm);
    let watch = move || {
        let before = vm.upgrade().and_then(|vm| vm.workload().ok()).map(|view| loops(&view));
        let _gone = ready.send(());
        let Some(before) = before else { return };
        let until = Instant::now() + FIRST_PROGRESS_PATIENCE;
        while let Some(vm) = vm.upgrade().filter(|_| Instant::now() < until) {
            if vm.workload().is_ok_and(|view| loops(&view) != before) {
                let now = monotonic_ns();
                let ms = (now - started.monotonic_ns) as f64 / 1e6;
                if json {
                    outln!(
                        "{}",
                        json!({"event": "first_progress", "vm": vm.name(), "ms": ms, "monotonic_ns": now})
                    );
                } else {
                    errln!(
                        "frazil: the guest of VM `{}` made progress {ms:.1} ms after this process started",
                        vm.name()
                    );
                }
                return;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    };
    // Without the thread, only the message is missing.
    let _unwatched = std::thread::Builder::new().name("frazil-progress".into()).spawn(watch);
    // The guest should not run before its counters are read; if they cannot be, the VM ends.
    let _read_or_late = read.recv_timeout(FIRST_READ_PATIENCE);
}

fn loops(view: &frazil_vmm::workload::ControlView) -> u64 {
    view.vcpus.iter().map(|cpu| cpu.control.loops).fold(0, u64::wrapping_add)
}

fn say_ended(vm: &Vm, ended: &Ended, json: bool) -> anyhow::Result<ExitCode> {
    if json {
        let mut event = serde_json::to_value(ended)?;
        event["event"] = Value::from("ended");
        event["vm"] = Value::from(vm.name());
        event["checkpoints"] = serde_json::to_value(vm.checkpoint_totals())?;
        print_json(&event)?;
    }
    let name = vm.name();
    let (code, message) = match ended {
        Ended::Stopped => (ExitCode::SUCCESS, format!("VM `{name}` was stopped")),
        Ended::Suspended => {
            (ExitCode::SUCCESS, format!("VM `{name}` is suspended; `frazil resume` continues it"))
        }
        Ended::GuestReset => {
            (ExitCode::SUCCESS, format!("the guest of VM `{name}` reset its machine"))
        }
        Ended::PoweredOff => {
            (ExitCode::SUCCESS, format!("the guest of VM `{name}` powered its machine off"))
        }
        Ended::GuestCrashed { detail } => {
            (ExitCode::FAILURE, format!("the guest of VM `{name}` crashed: {detail}"))
        }
        Ended::Failed { detail } => {
            (ExitCode::FAILURE, format!("VM `{name}` cannot go on: {detail}"))
        }
    };
    if !json || code == ExitCode::FAILURE {
        errln!("frazil: {message}");
    }
    Ok(code)
}
