//! QEMU with the built-in guest, on this host's KVM.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use frazil_snapstore::PAGE_SIZE;
use frazil_vmm::workload::control::vcpu_control_gpa;
use frazil_vmm::workload::{ControlView, GUEST_ELF, PageRead, WorkloadSpec};
use rustix::process::Pid;
use serde_json::json;

use super::qmp::Monitor;
use crate::cleanup;
use crate::raw_guest::PATIENCE;

/// The program, and the one that makes images for `savevm`.
const QEMU: &str = "qemu-system-x86_64";
const QEMU_IMG: &str = "qemu-img";
/// The name of the snapshot in the image.
const SAVED: &str = "saved";
/// No limit in effect: a file is not a network.
const BANDWIDTH_MAX_BYTES_S: u64 = 64 << 30;
/// How often to look at the progress of the guest, or of a migration.
const POLL: Duration = Duration::from_micros(500);

/// How QEMU saves a running machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Into a qcow2 image; the machine is paused meanwhile.
    SaveVm,
    /// Migration to a file: rounds of copying, then the machine is paused for the rest.
    Migrate,
    /// Migration to a file with the capability `background-snapshot`: memory as it was at the
    /// start, with pages that are about to be written saved first.
    Background,
}

impl Way {
    pub(super) const ALL: [Self; 3] = [Self::SaveVm, Self::Migrate, Self::Background];

    /// The name in metrics.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::SaveVm => "savevm",
            Self::Migrate => "migrate",
            Self::Background => "background",
        }
    }
}

/// The costs of saving a machine.
#[derive(Debug)]
pub(super) struct Saved {
    /// Time between the events STOP and RESUME.
    pub pause: Duration,
    /// From the command until QEMU reports that it is done. QEMU does not wait for the disk.
    pub duration: Duration,
    /// Disk space that the files take.
    pub bytes: u64,
}

/// The version of QEMU on this machine, if it is installed.
pub(crate) fn version() -> Option<String> {
    let output = Command::new(QEMU).arg("--version").output().ok()?;
    let said = String::from_utf8_lossy(&output.stdout);
    said.lines().next().map(|line| line.trim_start_matches("QEMU emulator version ").to_owned())
}

/// A guest's memory, read through its process's memory.
#[derive(Debug)]
struct Memory {
    file: File,
    /// The address of the guest's memory in the process.
    base: u64,
}

impl PageRead for Memory {
    fn read_page(&mut self, page: u64, buf: &mut [u8; PAGE_SIZE]) -> std::io::Result<()> {
        self.file.read_exact_at(buf, self.base + page * PAGE_SIZE as u64)
    }
}

/// A QEMU process, killed when dropped.
#[derive(Debug)]
pub(super) struct Qemu {
    child: Child,
    monitor: Monitor,
    memory: Memory,
    folder: PathBuf,
}

impl Qemu {
    /// Boots the built-in guest, and waits until it has written every page.
    pub(super) fn boot(folder: &Path, spec: &WorkloadSpec, ram_bytes: u64) -> anyhow::Result<Self> {
        let kernel = folder.join("guest.elf");
        fs::write(&kernel, GUEST_ELF).context("cannot write the guest's kernel")?;
        let image = image(folder);
        let bytes = (ram_bytes + (1 << 30)).to_string();
        let made = Command::new(QEMU_IMG)
            .args(["create", "-q", "-f", "qcow2"])
            .args([image.as_os_str(), OsStr::new(&bytes)])
            .output()
            .with_context(|| format!("cannot run {QEMU_IMG}"))?;
        ensure!(
            made.status.success(),
            "{QEMU_IMG} failed: {}",
            String::from_utf8_lossy(&made.stderr).trim()
        );
        let mut command = command(folder, ram_bytes);
        command.arg("-kernel").arg(kernel).arg("-append").arg(spec.to_cmdline());
        let mut qemu = Self::start(command, folder)?;
        let started = Instant::now();
        while qemu.view().map_or(true, |view| !view.populated()) {
            qemu.check_alive()?;
            ensure!(started.elapsed() < PATIENCE, "QEMU's guest does not start");
            std::thread::sleep(POLL);
        }
        Ok(qemu)
    }

    /// Resumes the machine saved in `folder` by `way`. Returns the time from before the process is
    /// started until the guest makes progress.
    pub(super) fn resume(folder: &Path, way: Way, ram_bytes: u64) -> anyhow::Result<Duration> {
        let started = Instant::now();
        let mut command = command(folder, ram_bytes);
        match way {
            Way::SaveVm => command.args(["-loadvm", SAVED]),
            Way::Migrate | Way::Background => {
                command.arg("-incoming").arg(format!("exec:cat {}", quoted(&stream(folder))?))
            }
        };
        let mut qemu = Self::start(command, folder)?;
        // Memory also changes while it is being loaded, so wait until the guest runs.
        while qemu.monitor.command("query-status", &json!({}))?["running"] != true {
            qemu.check_alive()?;
            ensure!(started.elapsed() < PATIENCE, "QEMU's guest does not resume");
            std::thread::sleep(POLL);
        }
        let from = qemu.turns()?;
        while qemu.turns()? == from {
            qemu.check_alive()?;
            ensure!(started.elapsed() < PATIENCE, "QEMU's guest makes no progress");
            std::thread::sleep(POLL);
        }
        Ok(started.elapsed())
    }

    fn start(mut command: Command, folder: &Path) -> anyhow::Result<Self> {
        let errors = File::create(folder.join("stderr")).context("cannot create a scratch file")?;
        let socket = folder.join("monitor");
        let _none = fs::remove_file(&socket);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .with_context(|| format!("cannot run {QEMU}"))?;
        cleanup::kill_at_exit(Some(Pid::from_child(&child)));
        let connected = Monitor::connect(&socket, || alive(&mut child, folder));
        let found = connected.and_then(|mut monitor| Ok((memory(&child, &mut monitor)?, monitor)));
        match found {
            Ok((memory, monitor)) => Ok(Self { child, monitor, memory, folder: folder.to_owned() }),
            Err(error) => {
                end(&mut child);
                Err(error)
            }
        }
    }

    fn check_alive(&mut self) -> anyhow::Result<()> {
        alive(&mut self.child, &self.folder)
    }

    /// The guest's own counters.
    pub(super) fn view(&mut self) -> anyhow::Result<ControlView> {
        Ok(ControlView::read(&mut self.memory)?)
    }

    fn turns(&self) -> anyhow::Result<u64> {
        let mut word = [0; 8];
        // The progress counter is the control page's first field.
        let at = self.memory.base + vcpu_control_gpa(0);
        self.memory.file.read_exact_at(&mut word, at).context("cannot read QEMU's memory")?;
        Ok(u64::from_le_bytes(word))
    }

    /// Saves the machine, which runs on afterwards.
    pub(super) fn save(&mut self, way: Way) -> anyhow::Result<Saved> {
        self.monitor.forget_events();
        let file = match way {
            Way::SaveVm => image(&self.folder),
            Way::Migrate | Way::Background => stream(&self.folder),
        };
        let before = taken_bytes(&file);
        let started = Instant::now();
        match way {
            Way::SaveVm => {
                let said = self.monitor.human(&format!("savevm {SAVED}"))?;
                ensure!(said.is_empty(), "QEMU's savevm failed: {said}");
            }
            Way::Migrate | Way::Background => self.migrate(way, &file)?,
        }
        let duration = started.elapsed();
        if way == Way::Migrate {
            // Migration leaves the machine paused.
            self.monitor.command("cont", &json!({}))?;
        }
        // Wait until the events have arrived.
        while self.monitor.stood_still().is_none() {
            self.monitor.command("query-status", &json!({}))?;
            ensure!(started.elapsed() < PATIENCE, "QEMU does not report that its guest runs again");
            std::thread::sleep(POLL);
        }
        let pause = self.monitor.stood_still().context("QEMU's guest was never paused")?;
        Ok(Saved { pause, duration, bytes: taken_bytes(&file).saturating_sub(before) })
    }

    fn migrate(&mut self, way: Way, file: &Path) -> anyhow::Result<()> {
        let background = json!({
            "capability": "background-snapshot", "state": way == Way::Background,
        });
        let capabilities = json!({ "capabilities": [background] });
        self.monitor.command("migrate-set-capabilities", &capabilities)?;
        let fast = json!({ "max-bandwidth": BANDWIDTH_MAX_BYTES_S });
        self.monitor.command("migrate-set-parameters", &fast)?;
        let uri = format!("exec:cat > {}", quoted(file)?);
        self.monitor.command("migrate", &json!({ "uri": uri }))?;
        let started = Instant::now();
        loop {
            let state = self.monitor.command("query-migrate", &json!({}))?;
            match state["status"].as_str().unwrap_or_default() {
                "completed" => return Ok(()),
                "failed" | "cancelled" => bail!("QEMU's migration to a file failed: {state}"),
                _ => {}
            }
            ensure!(started.elapsed() < PATIENCE, "QEMU's migration to a file does not finish");
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

fn end(child: &mut Child) {
    let _gone = child.kill();
    let _waited = child.wait();
    cleanup::kill_at_exit(None);
}

fn alive(child: &mut Child, folder: &Path) -> anyhow::Result<()> {
    let Some(status) = child.try_wait().context("cannot wait for QEMU")? else { return Ok(()) };
    let said = fs::read_to_string(folder.join("stderr")).unwrap_or_default();
    bail!("QEMU ended with {status}; it said: {}", said.trim())
}

/// Finds the guest's memory in its process.
fn memory(child: &Child, monitor: &mut Monitor) -> anyhow::Result<Memory> {
    let said = monitor.human("gpa2hva 0")?;
    let base = said.rsplit_once("0x").and_then(|(_, hex)| u64::from_str_radix(hex, 16).ok());
    let base = base.with_context(|| format!("QEMU does not report where its memory is: {said}"))?;
    let path = format!("/proc/{}/mem", child.id());
    let file = File::open(&path).with_context(|| format!("cannot open {path}"))?;
    Ok(Memory { file, base })
}

/// The command line of the machine, without a CPU feature that KVM may list and then refuse to set.
fn command(folder: &Path, ram_bytes: u64) -> Command {
    let mut command = Command::new(QEMU);
    command
        .args(["-M", "q35", "-accel", "kvm", "-cpu", "host,-arch-capabilities", "-smp", "1"])
        .args(["-m", &format!("{}M", ram_bytes >> 20)])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-serial", "null", "-drive"])
        .arg(format!("if=none,id=vm,format=qcow2,file={}", image(folder).display()))
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", folder.join("monitor").display()));
    command
}

fn image(folder: &Path) -> PathBuf {
    folder.join("vm.qcow2")
}

fn stream(folder: &Path) -> PathBuf {
    folder.join("vm.migration")
}

/// Quotes a path for the shell that QEMU starts.
fn quoted(path: &Path) -> anyhow::Result<String> {
    let text = path.to_str().filter(|text| !text.contains('\''));
    let text = text.with_context(|| {
        format!("{}: expected a path in UTF-8 without single quotes", path.display())
    })?;
    Ok(format!("'{text}'"))
}

/// The disk space that a file takes.
fn taken_bytes(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |file| file.blocks() * 512)
}
