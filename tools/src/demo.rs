//! `frazil demo`: runs, kills and resumes the built-in guest, with the same commands a user has.
//!
//! Every step is a real process and a real kill. The demo fails if any page of the guest's memory
//! is not what the guest must have written.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use frazil_snapstore::{Store, StoreOptions, VerifyProgress};
use frazil_vmm::control::api::{VmStatus, WorkloadStatus, WorkloadVerified};
use frazil_vmm::control::{Client, find};
use frazil_vmm::{CheckpointReport, CheckpointRequest, ProgressReport};
use serde_json::{Value, json};

use crate::cli::DemoArgs;
use crate::commands::{monotonic_ns, print_json};
use crate::output;

/// How long any one step may take.
const PATIENCE: Duration = Duration::from_mins(2);
/// Time from one checkpoint to the next: ten a second.
const INTERVAL: Duration = Duration::from_millis(100);
/// How many checkpoints to try to catch in the middle: some are too quick.
const KILL_ATTEMPTS: u32 = 5;
/// Memory that the workload leaves to the guest itself.
const GUEST_OWN_BYTES: u64 = 64 << 20;

/// What the demo found, in the order of its steps.
#[derive(Debug, Default, serde::Serialize)]
struct Figures {
    memory_bytes: u64,
    checkpoints: usize,
    full_stored_bytes: u64,
    full_us: u64,
    incremental_stored_bytes_p50: u64,
    incremental_pages_p50: u64,
    pause_us_p50: u64,
    pause_us_p99: u64,
    killed_at_pages: u64,
    killed_of_pages: u64,
    first_progress_us: u64,
    turns_before_kill: u64,
    turns_resumed: u64,
    pages_verified: u64,
    after_resume_pages: u64,
    after_resume_stored_bytes: u64,
    store_bytes: u64,
}

pub(crate) fn demo(args: &DemoArgs, json: bool) -> anyhow::Result<()> {
    ensure!(args.memory > 2 * GUEST_OWN_BYTES, "--memory: expected more than 128MiB for the demo");
    ensure!(args.checkpoints >= 2, "--checkpoints: expected at least 2");
    let scratch = tempfile::Builder::new()
        .prefix("frazil-demo-")
        .tempdir()
        .context("cannot create a scratch folder")?;
    let store = args.store.clone().unwrap_or_else(|| scratch.path().join("store"));
    ensure!(
        !store.exists(),
        "--store {}: expected a folder that does not exist yet, so that the figures are the demo's own",
        store.display()
    );
    let mut demo = Demo {
        args,
        json,
        store,
        figures: Figures { memory_bytes: args.memory, ..Figures::default() },
    };
    let vm = demo.start_guest()?;
    demo.take_checkpoints(&vm)?;
    demo.kill_in_the_middle(vm)?;
    let resumed = demo.resume_the_last()?;
    demo.verify_every_page(&resumed)?;
    demo.checkpoint_again(&resumed)?;
    demo.verify_the_store(resumed)?;
    demo.print()
}

struct Demo<'a> {
    args: &'a DemoArgs,
    json: bool,
    store: PathBuf,
    figures: Figures,
}

/// A VM in a process of its own, killed if the demo ends early.
struct VmProcess {
    child: Child,
    name: String,
    client: Client,
    events: Receiver<Value>,
}

impl Drop for VmProcess {
    fn drop(&mut self) {
        // It is gone already if all went well.
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}

impl VmProcess {
    fn start(name: &str, args: &[&str]) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find the path of this program")?;
        let mut child = Command::new(program)
            .args(args)
            .args(["--name", name, "--json", "--serial", "null"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a VM process")?;
        let stdout = child.stdout.take().context("the VM process has no output")?;
        let (sender, events) = mpsc::channel();
        std::thread::spawn(move || {
            let lines = BufReader::new(stdout).lines().map_while(Result::ok);
            for event in lines.filter_map(|line| serde_json::from_str::<Value>(&line).ok()) {
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
        let record = find_soon(name, &mut child)?;
        let vm = Self {
            child,
            name: name.to_owned(),
            client: Client::new(record, Some(PATIENCE)),
            events,
        };
        vm.event("started")?;
        Ok(vm)
    }

    /// Waits for an event of kind `kind`.
    fn event(&self, kind: &str) -> anyhow::Result<Value> {
        loop {
            let event = self.events.recv_timeout(PATIENCE).with_context(|| {
                format!(
                    "VM `{}` ended or stopped responding before `{kind}`: see its errors above",
                    self.name
                )
            })?;
            if event["event"] == kind {
                return Ok(event);
            }
        }
    }

    fn checkpoint(&self, message: &str) -> anyhow::Result<CheckpointReport> {
        let request =
            CheckpointRequest { message: message.to_owned(), ..CheckpointRequest::default() };
        Ok(self.client.post("/checkpoints", &request)?)
    }

    fn turns(&self) -> anyhow::Result<u64> {
        Ok(self.client.get::<WorkloadStatus>("/workload")?.turns)
    }
}

fn find_soon(name: &str, child: &mut Child) -> anyhow::Result<frazil_vmm::control::VmRecord> {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Ok(record) = find(name)
            && record.socket.exists()
        {
            return Ok(record);
        }
        if let Some(status) = child.try_wait()? {
            bail!("VM `{name}` did not start ({status}): see its error above");
        }
        ensure!(Instant::now() < until, "VM `{name}` did not start within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Demo<'_> {
    fn say(&self, text: &str) {
        if !self.json {
            outln!("{text}");
        }
    }

    fn store_text(&self) -> &str {
        self.store.to_str().unwrap_or("frazil-store")
    }

    fn name(kind: &str) -> String {
        format!("demo-{kind}-{}", std::process::id())
    }

    fn start_guest(&self) -> anyhow::Result<VmProcess> {
        let touch = self.args.memory - GUEST_OWN_BYTES;
        let workload = format!("touch={touch},rate=20000,pattern=hot,content=text,seed=7,report=0");
        let memory = self.args.memory.to_string();
        self.say(&format!(
            "1. A guest with {} of memory writes 20,000 pages a second, most of them to a hot tenth.",
            output::bytes(self.args.memory)
        ));
        let vm = VmProcess::start(
            &Self::name("run"),
            &["run", "--workload", &workload, "--memory", &memory, "--store", self.store_text()],
        )?;
        let until = Instant::now() + PATIENCE;
        loop {
            let workload = vm.client.get::<WorkloadStatus>("/workload");
            if workload.is_ok_and(|workload| workload.vcpus.iter().all(|cpu| cpu.populated)) {
                return Ok(vm);
            }
            ensure!(
                Instant::now() < until,
                "the guest did not fill its memory within {PATIENCE:?}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn take_checkpoints(&mut self, vm: &VmProcess) -> anyhow::Result<()> {
        self.say(&format!(
            "2. {} checkpoints, ten a second, while it runs.",
            self.args.checkpoints
        ));
        let full = vm.checkpoint("full")?;
        let bar = output::progress_bar("   checkpoints", "taken");
        bar.set_length(self.args.checkpoints as u64);
        let mut reports = Vec::with_capacity(self.args.checkpoints);
        for _ in 0..self.args.checkpoints {
            let due = Instant::now() + INTERVAL;
            reports.push(vm.checkpoint("")?);
            bar.inc(1);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        bar.finish_and_clear();
        let pauses = sorted(reports.iter().map(|report| report.stats.pause_us));
        let figures = &mut self.figures;
        figures.checkpoints = reports.len();
        figures.full_stored_bytes = full.stored_bytes;
        figures.full_us = full.duration_us;
        figures.pause_us_p50 = percentile(&pauses, 50);
        figures.pause_us_p99 = percentile(&pauses, 99);
        figures.incremental_stored_bytes_p50 =
            percentile(&sorted(reports.iter().map(|report| report.stored_bytes)), 50);
        figures.incremental_pages_p50 =
            percentile(&sorted(reports.iter().map(|report| report.stats.dirty_pages)), 50);
        Ok(())
    }

    /// Lets the guest dirty many pages, starts a checkpoint, and kills the process while the
    /// checkpoint is being written. If one completes before it can be caught, tries again.
    fn kill_in_the_middle(&mut self, mut vm: VmProcess) -> anyhow::Result<()> {
        for attempt in 1..=KILL_ATTEMPTS {
            std::thread::sleep(attempt * 5 * INTERVAL);
            self.figures.turns_before_kill = vm.turns()?;
            let Some((caught, answer)) = catch_in_the_middle(&mut vm)? else { continue };
            if answer.is_ok() {
                bail!("the checkpoint was published while its process was being killed: try again");
            }
            self.figures.killed_at_pages = caught.pages_done;
            self.figures.killed_of_pages = caught.pages_total;
            self.say(&format!(
                "3. SIGKILL in the middle of the next one, when {} of {} pages were written.",
                output::count(caught.pages_done),
                output::count(caught.pages_total)
            ));
            return Ok(());
        }
        bail!("{KILL_ATTEMPTS} checkpoints were all done before they could be interrupted")
    }

    fn resume_the_last(&mut self) -> anyhow::Result<VmProcess> {
        let spawned_ns = monotonic_ns();
        let target = format!("{}@latest", self.store_text());
        let vm = VmProcess::start(&Self::name("resume"), &["resume", &target])?;
        let event = vm.event("first_progress")?;
        let seen_ns = event["monotonic_ns"]
            .as_u64()
            .context("the event `first_progress` has no `monotonic_ns`")?;
        self.figures.first_progress_us = seen_ns.saturating_sub(spawned_ns) / 1000;
        self.say("4. The last complete checkpoint, resumed in a new process; memory arrives as it is touched.");
        Ok(vm)
    }

    fn verify_every_page(&mut self, vm: &VmProcess) -> anyhow::Result<()> {
        self.figures.turns_resumed = vm.turns()?;
        let verified: WorkloadVerified = vm.client.post("/workload/verify", &json!({}))?;
        if let Some(damage) = verified.damage {
            bail!("the resumed guest's memory does not hold what the guest wrote: {damage}");
        }
        self.figures.pages_verified = verified.pages_checked;
        self.say(&format!(
            "5. All {} pages hold what the guest wrote.",
            output::count(verified.pages_checked)
        ));
        Ok(())
    }

    fn checkpoint_again(&mut self, vm: &VmProcess) -> anyhow::Result<()> {
        let report = vm.checkpoint("after resume")?;
        ensure!(
            report.parent.is_some(),
            "expected the resumed VM's checkpoint to have a parent, found none"
        );
        self.figures.after_resume_pages = report.stats.dirty_pages;
        self.figures.after_resume_stored_bytes = report.stored_bytes;
        let status: VmStatus = vm.client.get("/vm")?;
        ensure!(
            status.head == Some(report.id),
            "expected the new checkpoint to be the VM's head, found another"
        );
        self.say("6. A checkpoint of the resumed guest is incremental again.");
        Ok(())
    }

    fn verify_the_store(&mut self, vm: VmProcess) -> anyhow::Result<()> {
        vm.client.put::<Value>("/vm/stop")?;
        vm.event("ended")?;
        drop(vm);
        let store = Store::open(&self.store, StoreOptions::default())?;
        let ids: Vec<_> = store.snapshots().iter().map(|info| info.id).collect();
        let report = frazil_snapstore::verify(&store, &ids, &VerifyProgress::default())?;
        if let Some(damage) = report.damage.first() {
            bail!("the store is damaged: {}", damage.error);
        }
        for id in [ids[0], ids[ids.len() - 1]] {
            check_oracle(&store, id)?;
        }
        self.figures.store_bytes = report.stored_bytes;
        self.say(&format!(
            "7. The store's {} snapshots verify: every frame and tree node matches its hash.\n",
            ids.len()
        ));
        Ok(())
    }

    fn print(&self) -> anyhow::Result<()> {
        let figures = &self.figures;
        if self.json {
            return print_json(figures);
        }
        let share = |bytes: u64| {
            let percent = bytes as f64 * 100.0 / figures.memory_bytes as f64;
            format!("{} ({percent:.1} % of RAM)", output::bytes(bytes))
        };
        let pages = |bytes: u64, pages: u64| {
            format!("{} for {} changed pages", share(bytes), output::count(pages))
        };
        let pauses = format!(
            "{} / {}",
            output::micros(figures.pause_us_p50),
            output::micros(figures.pause_us_p99)
        );
        let rows = [
            ("guest memory", output::bytes(figures.memory_bytes)),
            ("pause for a checkpoint, p50 / p99", pauses),
            (
                "the first checkpoint, all of memory",
                format!(
                    "{} in {}",
                    share(figures.full_stored_bytes),
                    output::micros(figures.full_us)
                ),
            ),
            (
                "a later one, p50",
                pages(figures.incremental_stored_bytes_p50, figures.incremental_pages_p50),
            ),
            (
                "resume: process start to first guest progress",
                output::micros(figures.first_progress_us),
            ),
            (
                "pages verified after the kill",
                format!("{}, all good", output::count(figures.pages_verified)),
            ),
            (
                "a checkpoint after the resume",
                pages(figures.after_resume_stored_bytes, figures.after_resume_pages),
            ),
            ("the store, all snapshots together", share(figures.store_bytes)),
        ];
        let mut table = output::table(&["WHAT", "FIGURE"], &[]);
        rows.into_iter().for_each(|(what, figure)| {
            table.add_row([what.to_owned(), figure]);
        });
        output::print_table(&table);
        if self.args.store.is_some() {
            outln!(
                "\nThe store is in {}: try `frazil log {0}` and `frazil show {0}@latest`.",
                self.store.display()
            );
        }
        Ok(())
    }
}

type Caught = (ProgressReport, frazil_vmm::Result<CheckpointReport>);

/// Starts a checkpoint and kills the process as soon as some of its pages are written; None if it
/// completed first.
fn catch_in_the_middle(vm: &mut VmProcess) -> anyhow::Result<Option<Caught>> {
    let asked = {
        let client = vm.client.clone();
        let request = CheckpointRequest::default();
        std::thread::spawn(move || client.post::<CheckpointReport>("/checkpoints", &request))
    };
    let until = Instant::now() + PATIENCE;
    let caught = loop {
        if let Ok(Some(progress)) = vm.client.get::<Option<ProgressReport>>("/checkpoints/progress")
            && progress.pages_done > 0
        {
            break progress;
        }
        if asked.is_finished() {
            return Ok(None);
        }
        ensure!(Instant::now() < until, "the checkpoint made no progress within {PATIENCE:?}");
    };
    // SIGKILL: the process gets no chance to clean up.
    vm.child.kill().context("cannot kill the VM process")?;
    vm.child.wait()?;
    let answer = asked.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    Ok(Some((caught, answer)))
}

fn check_oracle(store: &Arc<Store>, id: frazil_snapstore::SnapshotId) -> anyhow::Result<()> {
    let snapshot = store.snapshot(id)?;
    let report = frazil_vmm::verify_snapshot(&snapshot)?;
    ensure!(
        report.is_some(),
        "snapshot {}: expected one of the built-in guest, found another",
        id.short()
    );
    Ok(())
}

fn sorted(values: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut values: Vec<u64> = values.collect();
    values.sort_unstable();
    values
}

/// The smallest value that at least `percent` % of the values do not exceed.
fn percentile(sorted: &[u64], percent: usize) -> u64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(0)
}
