//! Commands that talk to a running VM: checkpoint, rewind, ps, pause, continue, stop.

use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use frazil_snapstore::reference;
use frazil_vmm::control::api::{CancelReport, Done, RunState, VmStatus};
use frazil_vmm::control::{Client, find, list};
use frazil_vmm::{
    CheckpointReport, CheckpointRequest, ProgressReport, RewindReport, RewindRequest,
};
use serde_json::json;

use super::{print_json, same_folder};
use crate::cli::{CheckpointArgs, RewindArgs, VmArg};
use crate::output;

/// How long a VM may take to answer a short request.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a VM may take to end after it was told to stop.
const STOP_PATIENCE: Duration = Duration::from_secs(30);

fn client(vm: &str) -> anyhow::Result<Client> {
    Ok(Client::new(find(vm)?, Some(PATIENCE)))
}

pub(crate) fn checkpoint(args: CheckpointArgs, json: bool) -> anyhow::Result<()> {
    let CheckpointArgs { vm, message, tag, exit, cancel } = args;
    if cancel {
        return cancel_checkpoint(&vm, json);
    }
    let record = find(&vm)?;
    let watcher = Client::new(record.clone(), Some(PATIENCE));
    let patient = Client::new(record, None);
    let request = CheckpointRequest { message, tag, exit };
    let (done, report) = mpsc::channel();
    std::thread::spawn(move || {
        // The receiver waits as long as the request takes.
        let _sent = done.send(patient.post::<CheckpointReport>("/checkpoints", &request));
    });
    let bar = output::progress_bar("checkpoint", "pages");
    let report = loop {
        match report.recv_timeout(Duration::from_millis(100)) {
            Ok(report) => break report,
            Err(mpsc::RecvTimeoutError::Disconnected) => anyhow::bail!("the request was lost"),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                if let Ok(Some(progress)) =
                    watcher.get::<Option<ProgressReport>>("/checkpoints/progress")
                {
                    bar.set_length(progress.pages_total);
                    bar.set_position(progress.pages_done);
                }
            }
        }
    };
    bar.finish_and_clear();
    let report = report?;
    if exit {
        wait_gone(&vm)?;
    }
    if let Some(failure) = &report.tag_failure {
        errln!(
            "frazil: snapshot {} was published, but its tag was not set: {failure}",
            report.id.short()
        );
    }
    if json {
        return print_json(&report);
    }
    let CheckpointReport { stats, .. } = &report;
    outln!(
        "{}  {} pages, {} stored (RAM {}), pause {}, {} in all{}",
        report.id.short(),
        output::count(stats.dirty_pages),
        output::bytes(report.stored_bytes),
        output::bytes(stats.ram_bytes),
        output::micros(stats.pause_us),
        output::micros(report.duration_us),
        if exit { "; the VM has ended" } else { "" },
    );
    Ok(())
}

fn cancel_checkpoint(vm: &str, json: bool) -> anyhow::Result<()> {
    // The answer comes once the checkpoint is over, which may have to wait for the disk.
    let CancelReport { cancelled } = Client::new(find(vm)?, None).put("/checkpoints/cancel")?;
    if json {
        return print_json(&json!({"vm": vm, "cancelled": cancelled}));
    }
    outln!(
        "{vm}: {}",
        if cancelled {
            "the checkpoint is cancelled, the guest goes on; the next checkpoint includes its pages"
        } else {
            "there was no checkpoint to cancel"
        }
    );
    Ok(())
}

pub(crate) fn rewind(args: &RewindArgs, json: bool) -> anyhow::Result<()> {
    let record = find(&args.vm)?;
    let snapshot = match args.snapshot.as_deref().map(reference::split) {
        Some((Some(store), reference)) => {
            let status: VmStatus = Client::new(record.clone(), Some(PATIENCE)).get("/vm")?;
            check_store(&status, store)?;
            Some(reference.to_owned())
        }
        Some((None, reference)) => Some(reference.to_owned()),
        None => None,
    };
    // The request waits for a checkpoint that is being taken.
    let report: RewindReport =
        Client::new(record, None).post("/rewind", &RewindRequest { snapshot })?;
    if json {
        return print_json(&report);
    }
    outln!(
        "{}: back at {}, {} pages restored, pause {}, {} in all",
        args.vm,
        report.id.short(),
        output::count(report.pages + report.disk_pages),
        output::micros(report.pause_us),
        output::micros(report.duration_us),
    );
    Ok(())
}

/// Fails unless `store` is the one the VM's checkpoints go to: a VM can only be rewound to those.
fn check_store(status: &VmStatus, store: &str) -> anyhow::Result<()> {
    let own = status.store.as_deref().map(|own| own.trim_start_matches("store "));
    if own.is_some_and(|own| same_folder(Path::new(own), Path::new(store))) {
        return Ok(());
    }
    anyhow::bail!(
        "VM `{}`: expected a snapshot of the VM's own store ({}), found one of {store}",
        status.name,
        own.unwrap_or("it has none")
    )
}

pub(crate) fn ps(json: bool) -> anyhow::Result<()> {
    let mut table = output::table(
        &["NAME", "PID", "STATE", "MEMORY", "VCPUS", "UPTIME", "CHECKPOINTS", "STORE"],
        &[1, 3, 4, 5, 6],
    );
    for record in list()? {
        let status = Client::new(record.clone(), Some(PATIENCE)).get::<VmStatus>("/vm");
        match (&status, json) {
            (Ok(status), true) => print_json(status)?,
            (Err(error), true) => print_json(
                &json!({"name": record.name, "pid": record.pid, "error": error.to_string()}),
            )?,
            (Ok(status), false) => {
                table.add_row([
                    status.name.clone(),
                    status.pid.to_string(),
                    state_name(status.state).to_owned(),
                    output::bytes(status.machine.ram_bytes),
                    status.machine.cpus.to_string(),
                    humantime::format_duration(Duration::from_secs(status.uptime_ms / 1000))
                        .to_string(),
                    status.checkpoints.taken.to_string(),
                    status.store.as_deref().unwrap_or("-").trim_start_matches("store ").to_owned(),
                ]);
            }
            (Err(_), false) => {
                table.add_row([record.name, record.pid.to_string(), "no answer".into()]);
            }
        }
    }
    if !json {
        output::print_table(&table);
    }
    Ok(())
}

pub(crate) fn state_name(state: RunState) -> &'static str {
    match state {
        RunState::Running => "running",
        RunState::Paused => "paused",
        RunState::Ended => "ended",
    }
}

pub(crate) fn pause(args: &VmArg, json: bool) -> anyhow::Result<()> {
    say(&args.vm, client(&args.vm)?.put("/vm/pause")?, json)
}

pub(crate) fn go(args: &VmArg, json: bool) -> anyhow::Result<()> {
    say(&args.vm, client(&args.vm)?.put("/vm/continue")?, json)
}

pub(crate) fn stop(args: &VmArg, json: bool) -> anyhow::Result<()> {
    let done: Done = client(&args.vm)?.put("/vm/stop")?;
    wait_gone(&args.vm)?;
    say(&args.vm, done, json)
}

/// Waits until the VM's name is free again, as scripts expect of a command that ends it.
fn wait_gone(vm: &str) -> anyhow::Result<()> {
    let until = Instant::now() + STOP_PATIENCE;
    while !vm.contains('/') && find(vm).is_ok() {
        if Instant::now() > until {
            anyhow::bail!(
                "VM `{vm}` was told to end, but is still running after {STOP_PATIENCE:?}: look at \
                 its process"
            );
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn say(vm: &str, done: Done, json: bool) -> anyhow::Result<()> {
    if json {
        return print_json(&json!({"vm": vm, "state": done.state}));
    }
    outln!("{vm}: {}", state_name(done.state));
    Ok(())
}
