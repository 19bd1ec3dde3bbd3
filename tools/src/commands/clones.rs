//! `frazil resume --clones N`: many VMs from one snapshot that share its memory.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, ensure};
use frazil_snapstore::SnapshotId;
use frazil_vmm::control::memory_socket;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::cli::parse::{self, numbered_net};
use crate::cli::{ResumeArgs, WorkingSetArg};

/// Makes sure that a process serves the snapshot's memory, for this VM and others; returns its
/// socket. That process ends when nobody needs it any more.
pub(crate) fn share_memory(
    args: &ResumeArgs,
    store: &Path,
    id: SnapshotId,
) -> anyhow::Result<PathBuf> {
    let socket = memory_socket(id)?;
    let mut command = Command::new(this_program()?);
    command.arg("pager").arg("--listen").arg(&socket);
    if args.no_fill {
        command.arg("--no-fill");
    }
    if let Some(user) = &args.host.user {
        command.arg("--user").arg(user.spec());
    }
    if let Some(rate) = args.fill_rate {
        command.arg("--fill-rate").arg(rate.to_string());
    }
    match args.working_set {
        WorkingSetArg::Auto => {}
        WorkingSetArg::Before => drop(command.args(["--working-set", "before"])),
        WorkingSetArg::Off => drop(command.args(["--working-set", "off"])),
    }
    if let Some(time) = args.record_working_set {
        command.arg("--record-working-set").arg(humantime::format_duration(time).to_string());
    }
    command.arg(reference(store, id));
    // In a process group of its own, so that Ctrl-C reaches only the VMs.
    command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut server = command.spawn().context("cannot start the process that shares memory")?;
    let stdout =
        server.stdout.take().context("the process that shares memory has no standard output")?;
    let mut line = String::new();
    BufReader::new(stdout)
        .read_line(&mut line)
        .context("cannot read from the process that shares memory")?;
    ensure!(line == "ready\n", "the process that shares the snapshot's memory did not start");
    // Reaps the process when it ends.
    std::thread::Builder::new().name("frazil-reaper".into()).spawn(move || {
        let _status = server.wait();
    })?;
    Ok(socket)
}

/// Runs `count` VMs, each in a process of its own, until all have ended.
pub(crate) fn run(
    args: &ResumeArgs,
    count: u32,
    store: &Path,
    id: SnapshotId,
) -> anyhow::Result<ExitCode> {
    ensure!(
        args.host.api_socket.is_none(),
        "--api-socket: {count} VMs cannot share a socket: leave it out, and each gets its own, see \
         `frazil ps`"
    );
    let socket = share_memory(args, store, id)?;
    let base = args.host.name.clone().unwrap_or_else(|| format!("vm-{}", std::process::id()));
    let program = this_program()?;
    let common = common_arguments();
    let running = Running::default();
    // Before the first VM starts: a signal that arrives while they start is for all of them.
    running.pass_signals_on()?;
    let mut clones = Clones(Vec::new());
    for index in 1..=count {
        let mut command = Command::new(&program);
        command.args(numbered(&common, index)).arg("--name").arg(format!("{base}-{index}"));
        command.arg("--memory-from").arg(&socket).arg("--exactly").arg(id.to_string());
        let child = command.stdin(Stdio::null()).spawn();
        clones.0.push(child.with_context(|| format!("cannot start {base}-{index}"))?);
        if !running.add(clones.0.last().map(Pid::from_child)) {
            break;
        }
    }
    let mut failed = 0;
    for (index, child) in (1..).zip(&mut clones.0) {
        let status = running.wait(child)?;
        failed += u32::from(!status.success());
        // Anything else the VM reports itself.
        if let Some(signal) = status.signal() {
            errln!("frazil: VM `{base}-{index}` was killed by signal {signal}");
        }
    }
    clones.0.clear();
    if failed > 0 {
        errln!("frazil: {failed} of {count} VMs failed");
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The VMs' processes, which do not outlive this one unless it is killed.
struct Clones(Vec<Child>);

/// The processes that may be sent signals, and whether a signal was passed on.
#[derive(Clone, Default)]
struct Running(Arc<Mutex<(Vec<Pid>, bool)>>);

impl Running {
    fn lock(&self) -> MutexGuard<'_, (Vec<Pid>, bool)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pass_signals_on(&self) -> anyhow::Result<()> {
        let mut signals =
            Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot handle signals")?;
        let running = self.clone();
        std::thread::Builder::new().name("frazil-signals".into()).spawn(move || {
            for _ in signals.forever() {
                let mut running = running.lock();
                running.1 = true;
                for pid in &running.0 {
                    let _gone = kill_process(*pid, Signal::TERM);
                }
            }
        })?;
        Ok(())
    }

    /// Adds a process. False if a signal was passed on: it, too, was told to end.
    fn add(&self, pid: Option<Pid>) -> bool {
        let mut running = self.lock();
        running.0.extend(pid);
        if running.1 {
            for pid in &running.0 {
                let _gone = kill_process(*pid, Signal::TERM);
            }
        }
        !running.1
    }

    /// Waits for a process, and removes it before it is reaped: from then on its pid may be
    /// another's.
    fn wait(&self, child: &mut Child) -> anyhow::Result<ExitStatus> {
        let pid = Pid::from_child(child);
        let ended = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        while let Err(error) = waitid(WaitId::Pid(pid), ended) {
            ensure!(error == rustix::io::Errno::INTR, "cannot wait for a VM: {error}");
        }
        self.lock().0.retain(|other| *other != pid);
        child.wait().context("cannot wait for a VM")
    }
}

impl Drop for Clones {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _gone = child.kill();
            let _waited = child.wait();
        }
    }
}

fn this_program() -> anyhow::Result<PathBuf> {
    std::env::current_exe().context("cannot find the path of this program")
}

fn reference(store: &Path, id: SnapshotId) -> OsString {
    let mut reference = store.as_os_str().to_owned();
    reference.push(format!("@{id}"));
    reference
}

/// The `common` arguments for the clone `index`: `{clone}` becomes its number in those of taps,
/// sockets and disks.
fn numbered(common: &[OsString], index: u32) -> Vec<OsString> {
    type Number = fn(&str, u32) -> String;
    const OF_EACH: [(&str, Number); 3] =
        [("--net", numbered_net), ("--vsock", parse::numbered), ("--disk", parse::numbered)];
    // Set if the previous argument was such a flag, and this one is its value.
    let mut of_next: Option<Number> = None;
    let number = |argument: &OsString| {
        let of_this = of_next.take();
        let text = argument.to_str()?;
        if let Some(number) = of_this {
            return Some(number(text, index).into());
        }
        let (flag, value) =
            text.split_once('=').map_or((text, None), |(flag, value)| (flag, Some(value)));
        let (_, number) = OF_EACH.into_iter().find(|(other, _)| *other == flag)?;
        if value.is_none() {
            of_next = Some(number);
        }
        value.map(|value| format!("{flag}={}", number(value, index)).into())
    };
    let numbers: Vec<Option<OsString>> = common.iter().map(number).collect();
    numbers.into_iter().zip(common).map(|(new, old)| new.unwrap_or_else(|| old.clone())).collect()
}

/// This process's arguments without those that differ from clone to clone.
fn common_arguments() -> Vec<OsString> {
    let mut common = Vec::new();
    let mut given = std::env::args_os().skip(1);
    let mut serial = false;
    while let Some(argument) = given.next() {
        let text = argument.to_string_lossy();
        serial |= text == "--serial" || text.starts_with("--serial=");
        if text == "--clones" || text == "--name" {
            given.next();
        } else if !text.starts_with("--clones=") && !text.starts_with("--name=") {
            common.push(argument);
        }
    }
    if !serial {
        // On one terminal, the VMs would write into each other's lines.
        common.extend(["--serial", "null"].map(OsString::from));
    }
    common
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_each_clones_own_is_numbered() {
        let of = |arguments: &str, index| {
            let arguments: Vec<OsString> = arguments.split(' ').map(OsString::from).collect();
            numbered(&arguments, index).join(OsString::from(" ").as_os_str()).into_string()
        };
        let given = "resume {clone}@{clone} --net tap=t{clone},mac=02:00:00:00:{clone} --net=none --vsock=cid=9{clone},socket={clone} \
                     --disk 0={clone} --serial {clone}";
        let expected = "resume {clone}@{clone} --net tap=t2,mac=02:00:00:00:00:02 --net=none \
                        --vsock=cid=92,socket=2 --disk 0=2 --serial {clone}";
        assert_eq!(of(given, 2), Ok(expected.to_owned()));
    }
}
