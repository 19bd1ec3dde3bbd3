//! Runs the `frazil` command as a script would, with one scratch folder per test and nothing that
//! outlives the test.
//!
//! Every wait has a limit, and a child that still runs when its test is over is killed.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use frazil_snapstore::{Store, StoreOptions, VerifyProgress};
use frazil_vmm::Vm;
use frazil_vmm::workload::VcpuView;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// How long anything may take that should take a moment. Generous, since the machine may be busy,
/// and may be slow to give guests memory: the same tests took 7 s, and 44 s right after a build.
pub const PATIENCE: Duration = Duration::from_mins(3);

/// True if guests can run here; otherwise says why not. Where it is true, nothing is skipped.
#[must_use]
pub fn kvm_or_skip() -> bool {
    if Path::new("/dev/kvm").exists() {
        return true;
    }
    eprintln!("SKIPPED: there is no /dev/kvm on this machine, and this test runs guests");
    false
}

/// True if userfaultfd is available; otherwise says why not. Where it has to be available, its
/// absence is a failure.
///
/// # Panics
/// If userfaultfd is unavailable to root, or although there is a /dev/userfaultfd.
#[must_use]
pub fn uffd_or_skip() -> bool {
    let Err(error) = frazil_snapstore::pager::probe() else { return true };
    let device = Path::new("/dev/userfaultfd").exists();
    let root = rustix::process::geteuid().is_root();
    assert!(!device && !root, "{error}");
    eprintln!("SKIPPED: neither root nor /dev/userfaultfd: {error}");
    false
}

/// Returns the `frazil` binary of this workspace, built in the profile of these tests; the
/// environment variable `FRAZIL_BIN` names another.
pub fn frazil() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| match std::env::var_os("FRAZIL_BIN") {
        Some(binary) => binary.into(),
        None => build(),
    })
}

fn build() -> PathBuf {
    // Tests are at TARGET/PROFILE/deps/NAME.
    let this = std::env::current_exe().expect("a test knows its file");
    let profile_folder = this.ancestors().nth(2).expect("tests are in TARGET/PROFILE/deps");
    let target = profile_folder.parent().expect("tests are in TARGET/PROFILE/deps");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "-p", "frazil-tools", "--target-dir"]).arg(target);
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    let status = command.current_dir(env!("CARGO_MANIFEST_DIR")).status().expect("cargo runs");
    assert!(status.success(), "frazil does not build");
    profile_folder.join("frazil")
}

/// The result of a command that has ended.
#[derive(Debug)]
pub struct Finished {
    /// Its exit status.
    pub status: ExitStatus,
    /// All of standard output.
    pub stdout: String,
    /// All of standard error.
    pub stderr: String,
}

impl Finished {
    /// Fails the test unless the exit status is `code`.
    #[track_caller]
    pub fn expect_code(&self, code: i32) -> &Self {
        assert_eq!(self.status.code(), Some(code), "{self:#?}");
        self
    }

    /// Parses standard output as JSON, one value a line.
    #[track_caller]
    #[must_use]
    pub fn json_lines(&self) -> Vec<Value> {
        let parse = |line: &str| {
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line:?}"))
        };
        self.stdout.lines().map(parse).collect()
    }

    /// Parses standard output as one JSON value.
    #[track_caller]
    #[must_use]
    pub fn json(&self) -> Value {
        let mut lines = self.json_lines();
        assert_eq!(lines.len(), 1, "expected one line of JSON: {self:#?}");
        lines.remove(0)
    }

    /// Fails the test unless standard error contains every one of `parts`.
    #[track_caller]
    pub fn expect_says(&self, parts: &[&str]) -> &Self {
        for part in parts {
            assert!(self.stderr.contains(part), "expected `{part}` on standard error: {self:#?}");
        }
        self
    }
}

/// A scratch folder with its own runtime folder for VMs, so that each test sees only its own VMs.
#[derive(Debug)]
pub struct Host {
    folder: TempDir,
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

impl Host {
    /// Makes an empty scratch folder.
    #[must_use]
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a scratch folder") }
    }

    /// Returns the path of `name` in the scratch folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Returns the path of the store that this host's VMs write to.
    #[must_use]
    pub fn store_path(&self) -> PathBuf {
        self.path("store")
    }

    /// Returns `STORE@reference`.
    #[must_use]
    pub fn at(&self, reference: &str) -> String {
        format!("{}@{reference}", self.store_path().display())
    }

    /// Opens the store in this process.
    #[must_use]
    pub fn store(&self) -> Arc<Store> {
        Store::open(&self.store_path(), StoreOptions::default()).expect("the store opens")
    }

    /// Returns the command `frazil` with `args`, not yet started.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(frazil());
        command.args(args);
        self.surround(&mut command);
        command
    }

    /// Sets `command`'s working directory, environment and standard input for this host.
    pub fn surround(&self, command: &mut Command) {
        command
            .current_dir(self.folder.path())
            .env("FRAZIL_RUNTIME_DIR", self.path("run"))
            .env_remove("FRAZIL_STORE")
            .env_remove("FRAZIL_LOG")
            .stdin(Stdio::null());
    }

    /// Runs `frazil` with `args` to its end.
    #[track_caller]
    #[must_use]
    pub fn frazil(&self, args: &[&str]) -> Finished {
        finish(self.command(args), PATIENCE)
    }

    /// As [`Self::frazil`]; fails the test unless the exit status is 0.
    #[track_caller]
    #[must_use]
    pub fn ok(&self, args: &[&str]) -> Finished {
        let finished = self.frazil(args);
        finished.expect_code(0);
        finished
    }

    /// As [`Self::ok`] with `--json`; returns the one value that the command prints.
    #[track_caller]
    #[must_use]
    pub fn json(&self, args: &[&str]) -> Value {
        self.ok(&[args, &["--json"]].concat()).json()
    }

    /// Runs the built-in workload as VM `name`, with checkpoints going to this host's store.
    #[track_caller]
    #[must_use]
    pub fn run(&self, name: &str, workload: &str, more: &[&str]) -> RunningVm {
        let store = self.store_path().display().to_string();
        let args = ["run", "--workload", workload, "--store", &store, "--name", name];
        self.start(&[&args, more].concat())
    }

    /// Resumes `reference` of this host's store as VM `name`.
    #[track_caller]
    #[must_use]
    pub fn resume(&self, name: &str, reference: &str, more: &[&str]) -> RunningVm {
        let at = self.at(reference);
        self.start(&[&["resume", &at, "--name", name], more].concat())
    }

    /// Starts `frazil` with `args` and `--json`, and waits until the VM says it has started.
    #[track_caller]
    #[must_use]
    pub fn start(&self, args: &[&str]) -> RunningVm {
        let mut vm = RunningVm::spawn(self.command(&[args, &["--json"]].concat()));
        let started = vm.event("started");
        vm.name = started["vm"].as_str().expect("a name").to_owned();
        vm.socket = started["socket"].as_str().expect("a socket").into();
        vm.started = started;
        vm
    }

    /// Fails the test unless everything in the store verifies, including the memory of every
    /// snapshot against the workload's oracle. Returns how many pages of memory were compared.
    #[track_caller]
    pub fn verify_all(&self) -> u64 {
        let store = self.store_path().display().to_string();
        let report = self.json(&["verify", &store, "--memory", "all"]);
        assert_eq!(report["ok"], true, "{report}");
        number(&report, "memory_pages_checked")
    }
}

/// Returns a number field of a JSON object.
#[track_caller]
#[must_use]
pub fn number(object: &Value, field: &str) -> u64 {
    object[field].as_u64().unwrap_or_else(|| panic!("expected a number `{field}` in {object}"))
}

/// Returns a string field of a JSON object.
#[track_caller]
#[must_use]
pub fn text<'a>(object: &'a Value, field: &str) -> &'a str {
    object[field].as_str().unwrap_or_else(|| panic!("expected a string `{field}` in {object}"))
}

/// Runs `command` to its end; kills it and fails the test if that takes longer than `patience`.
#[track_caller]
#[must_use]
pub fn finish(mut command: Command, patience: Duration) -> Finished {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let child = child.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let pid = Pid::from_child(&child);
    let (done, waiting) = channel();
    std::thread::spawn(move || {
        // The test may have given up.
        let _gone = done.send(child.wait_with_output());
    });
    let Ok(output) = waiting.recv_timeout(patience) else {
        let _gone = kill_process(pid, Signal::KILL);
        panic!("{command:?} hangs: killed after {patience:?}");
    };
    let Output { status, stdout, stderr } = output.expect("its output can be read");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    Finished { status, stdout: text(stdout), stderr: text(stderr) }
}

/// Polls `reached` until it returns a value; fails the test after [`PATIENCE`].
#[track_caller]
pub fn wait_for<T>(what: &str, mut reached: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = reached() {
            return value;
        }
        assert!(Instant::now() < until, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until every vCPU of the built-in workload has written each of its pages, in a VM of this
/// process.
#[track_caller]
pub fn wait_populated(vm: &Vm) {
    let until = Instant::now() + PATIENCE;
    loop {
        let view = vm.workload();
        let populated = |cpu: &VcpuView| cpu.control.populated != 0;
        if view.as_ref().is_ok_and(|view| view.vcpus.iter().all(populated)) {
            return;
        }
        if Instant::now() > until {
            // Everything there is to know about a hang: the next one may be a long time off.
            let cpus =
                view.map(|view| view.vcpus.into_iter().map(|cpu| cpu.control).collect::<Vec<_>>());
            panic!(
                "populated: not within {PATIENCE:?}: {}, {:?}, {:?}, {:?}; ended: {:?}, paused: {}",
                vm.dirty_tracking(),
                cpus,
                vm.exit_counts(),
                vm.machine(),
                vm.ended(),
                vm.is_paused()
            );
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A `frazil run` or `frazil resume` in another process; killed when dropped.
#[derive(Debug)]
pub struct RunningVm {
    child: Child,
    lines: Receiver<String>,
    /// Lines of standard output taken from `lines` so far.
    seen: Vec<String>,
    stderr: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
    /// The VM's name.
    pub name: String,
    /// The VM's control socket.
    pub socket: PathBuf,
    /// The `started` line that the command printed.
    pub started: Value,
}

impl RunningVm {
    /// Starts `command` without waiting for any output.
    #[must_use]
    pub fn spawn(mut command: Command) -> Self {
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("frazil starts");
        let (line, lines) = channel();
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let out = std::thread::spawn(move || {
            for text in stdout.lines().map_while(Result::ok) {
                // The test may have dropped the receiver.
                let _gone = line.send(text);
            }
        });
        let stderr = Arc::new(Mutex::new(String::new()));
        let (collected, pipe) = (Arc::clone(&stderr), child.stderr.take().expect("a pipe"));
        let err = std::thread::spawn(move || {
            for text in BufReader::new(pipe).lines().map_while(Result::ok) {
                let mut all = collected.lock().unwrap_or_else(PoisonError::into_inner);
                all.push_str(&text);
                all.push('\n');
            }
        });
        Self {
            child,
            lines,
            seen: Vec::new(),
            stderr,
            readers: vec![out, err],
            name: String::new(),
            socket: PathBuf::new(),
            started: Value::Null,
        }
    }

    /// Returns what was written to standard error so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.stderr.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for the next line with this `event`, skipping others.
    #[track_caller]
    pub fn event(&mut self, event: &str) -> Value {
        let until = Instant::now() + PATIENCE;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    let value: Value = serde_json::from_str(&line)
                        .unwrap_or_else(|error| panic!("{error} in {line:?}"));
                    self.seen.push(line);
                    if value["event"] == event {
                        return value;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("no `{event}` within {PATIENCE:?}"),
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("it ended without `{event}`: {:?}\n{}", self.seen, self.stderr())
                }
            }
        }
    }

    /// Sends one HTTP request to the control socket; returns the status and the body.
    ///
    /// # Errors
    /// If the connection fails, or the answer is not HTTP.
    pub fn http(&self, method: &str, path: &str, body: &str) -> std::io::Result<(u16, Value)> {
        let (head, body) = self.exchange(method, path, body)?;
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        Ok((status, serde_json::from_str(&body).unwrap_or(Value::Null)))
    }

    /// As [`Self::http`]; returns the head and the body of the answer as text.
    ///
    /// # Errors
    /// If the connection fails, or the answer is not HTTP.
    pub fn exchange(
        &self,
        method: &str,
        path: &str,
        body: &str,
    ) -> std::io::Result<(String, String)> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let len = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len}\r\n\r\n{body}"
        )?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| {
            std::io::Error::other(format!("expected an HTTP answer, found {answer:?}"))
        })?;
        Ok((head.to_owned(), body.to_owned()))
    }

    /// Sends `GET path`; fails the test unless the status is 200.
    #[track_caller]
    #[must_use]
    pub fn get(&self, path: &str) -> Value {
        let (status, value) = self.http("GET", path, "").expect("the VM answers");
        assert_eq!(status, 200, "{path}: {value}");
        value
    }

    /// Returns how many pages the built-in workload has written.
    #[track_caller]
    #[must_use]
    pub fn turns(&self) -> u64 {
        number(&self.get("/workload"), "turns")
    }

    /// Returns the loop turns of all vCPUs of the built-in workload.
    #[track_caller]
    #[must_use]
    pub fn loops(&self) -> u64 {
        let status = self.get("/workload");
        status["vcpus"].as_array().expect("vCPUs").iter().map(|cpu| number(cpu, "loops")).sum()
    }

    /// Waits until every vCPU of the built-in workload has written each of its pages.
    #[track_caller]
    pub fn wait_populated(&self) {
        wait_for("populated", || {
            let (status, workload) = self
                .http("GET", "/workload", "")
                .unwrap_or_else(|error| panic!("{error}; it said: {}", self.stderr()));
            // 409: the guest has not got so far yet.
            let vcpus = workload["vcpus"].as_array().filter(|_| status == 200)?;
            vcpus.iter().all(|cpu| cpu["populated"] == true).then_some(())
        });
    }

    /// Waits until the guest has written more pages than `turns`.
    #[track_caller]
    pub fn wait_beyond(&self, turns: u64) {
        wait_for("progress", || (self.turns() > turns).then_some(()));
    }

    /// Fails the test unless all live memory is what the guest must have written; returns the
    /// report.
    #[track_caller]
    pub fn verify_workload(&self) -> Value {
        let (status, verified) = self.http("POST", "/workload/verify", "").expect("the VM answers");
        assert_eq!((status, &verified["ok"]), (200, &Value::Bool(true)), "{verified}");
        verified
    }

    /// Sends `signal` to the process.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it is there");
    }

    /// True if the process has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("it is our child").is_some()
    }

    /// Kills the process, as a power cut would as far as a process can tell.
    pub fn kill_9(mut self) {
        self.child.kill().expect("it is our child");
        self.child.wait().expect("it is our child");
    }

    /// Waits for the process to end.
    #[track_caller]
    #[must_use]
    pub fn wait_end(mut self) -> Finished {
        let what = format!("the end of VM `{}`", self.name);
        let status = wait_for(&what, || self.child.try_wait().expect("it is our child"));
        for reader in self.readers.drain(..) {
            reader.join().expect("reading its output");
        }
        let rest = self.lines.try_iter();
        let stdout =
            self.seen.drain(..).chain(rest).fold(String::new(), |all, line| all + &line + "\n");
        Finished { status, stdout, stderr: self.stderr() }
    }

    /// Waits for the process to end; fails the test unless it exits with status 0 and its last line
    /// is an `ended` event with this `reason`.
    #[track_caller]
    pub fn expect_ended(self, reason: &str) {
        let finished = self.wait_end();
        let lines = finished.expect_code(0).json_lines();
        let ended = lines.last().expect("a last line");
        assert_eq!(
            (&ended["event"], &ended["reason"]),
            (&"ended".into(), &reason.into()),
            "{finished:#?}"
        );
    }
}

impl Drop for RunningVm {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}

/// Fails the test unless every block of every snapshot of `store` verifies.
#[track_caller]
pub fn expect_sound(store: &Arc<Store>) {
    let ids: Vec<_> = store.snapshots().iter().map(|info| info.id).collect();
    let report = frazil_snapstore::verify(store, &ids, &VerifyProgress::default()).expect("a walk");
    assert!(report.damage.is_empty(), "{:#?}", report.damage);
}

/// Changes the byte at `offset` in a file.
pub fn flip_byte(path: &Path, offset: u64) {
    use std::os::unix::fs::FileExt;
    let file = File::options().read(true).write(true).open(path).expect("the file opens");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("the byte is there");
    file.write_all_at(&[byte[0] ^ 0x55], offset).expect("it can be written");
}
