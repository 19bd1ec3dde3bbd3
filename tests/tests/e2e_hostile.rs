//! A VM in a hostile environment: a second writer, a full disk, a user without permissions, clients
//! that talk nonsense. The guest goes on, and the user is told what to do.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{RecvError, channel};
use std::time::Duration;

use frazil_snapstore::{Store, StoreOptions};
use frazil_tests::faulty_storage::{FaultyStorage, used_bytes};
use frazil_tests::rng::Rng;
use frazil_tests::vm_harness::{
    Finished, Host, PATIENCE, RunningVm, finish, frazil, kvm_or_skip, number, wait_for,
    wait_populated,
};
use frazil_vmm::control::Server;
use frazil_vmm::devices::serial::SerialOutput;
use frazil_vmm::{CheckpointReport, CheckpointRequest, Guest, HostConfig, MachineConfig, Vm};

const SMALL: &[&str] = &["--memory", "64MiB"];

#[test]
fn two_writers_take_turns() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let vm = host.run("patient", "touch=4MiB,rate=500,report=0", SMALL);
    vm.wait_populated();
    let _first = host.json(&["checkpoint", "patient"]);
    let store = host.store();
    let other = store.begin(None).expect("nobody writes");
    let refused = host.frazil(&["checkpoint", "patient"]);
    let holder = format!("process {}", std::process::id());
    refused.expect_code(1).expect_says(&["is being written by", &holder, "one writer at a time"]);
    // If the failed checkpoint lost its dirty pages, it would show below.
    vm.wait_beyond(vm.turns() + 100);
    drop(other);
    let report = host.json(&["checkpoint", "patient"]);
    assert!(number(&report, "dirty_pages") >= 50, "{report}");
    let totals = vm.get("/vm")["checkpoints"].clone();
    assert_eq!((number(&totals, "taken"), number(&totals, "failed")), (2, 1), "{totals}");
    let _last = host.json(&["checkpoint", "patient", "--exit"]);
    vm.expect_ended("suspended");
    assert_eq!(host.verify_all(), 3 * 1024);
}

#[test]
fn a_suspend_that_fails_leaves_the_guest_running() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let vm = host.run("stays", "touch=4MiB,rate=500,report=0", SMALL);
    vm.wait_populated();
    let store = host.store();
    let other = store.begin(None).expect("nobody writes");
    host.frazil(&["checkpoint", "stays", "--exit"]).expect_code(1).expect_says(&["being written"]);
    drop(other);
    host.frazil(&["checkpoint", "stays", "--exit", "--tag", "latest"])
        .expect_code(1)
        .expect_says(&["cannot be a tag"]);
    vm.wait_beyond(vm.turns());
    let _last = host.json(&["checkpoint", "stays", "--exit"]);
    vm.expect_ended("suspended");
}

/// A small file system, unmounted when dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    /// Mounts it at `path`; `None` if this process may not mount.
    fn mount(path: PathBuf, size: &str) -> Option<Self> {
        std::fs::create_dir(&path).expect("the scratch folder");
        let options = format!("size={size}");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "frazil-test"])
            .arg(&path)
            .output();
        mounted.is_ok_and(|output| output.status.success()).then_some(Self(path))
    }

    fn resize(&self, size: &str) {
        let options = format!("remount,size={size}");
        let status = Command::new("mount").args(["-o", &options]).arg(&self.0).status();
        assert!(status.expect("mount").success());
    }

    fn free_bytes(&self) -> u64 {
        let stat = rustix::fs::statvfs(&self.0).expect("it is mounted");
        stat.f_bavail * stat.f_frsize
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _gone = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_costs_a_checkpoint_and_no_more() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let Some(disk) = Tmpfs::mount(host.path("disk"), "128m") else {
        eprintln!(
            "NOT RUN: no permission to mount a tmpfs; \
             `a_full_medium_costs_nothing_but_the_checkpoint` has the same on a simulated one"
        );
        return;
    };
    let store = disk.0.join("store").display().to_string();
    let spec = "touch=20MiB,rate=max,pattern=uniform,content=random,report=0";
    let args = ["run", "--workload", spec, "--store", &store, "--name", "full"];
    let vm = host.start(&[&args, SMALL].concat());
    vm.wait_populated();
    let _first = host.json(&["checkpoint", "full"]);
    // From here on there is room for only a fraction of a checkpoint.
    disk.resize(&format!("{}k", (used_bytes(Path::new(&store)) >> 10) + 2048));
    let free = disk.free_bytes();
    assert!(free < 4 << 20, "{free}");
    for _ in 0..3 {
        vm.wait_beyond(vm.turns() + 5000);
        let failed = host.frazil(&["checkpoint", "full"]);
        failed.expect_code(1).expect_says(&["no space left", "are intact", "free some space"]);
        assert!(
            disk.free_bytes() >= free,
            "its space must come back: {} of {free}",
            disk.free_bytes()
        );
        vm.wait_beyond(vm.turns());
    }
    assert_eq!(host.ok(&["log", &store, "--json"]).json_lines().len(), 1);
    disk.resize("256m");
    let report = host.json(&["checkpoint", "full", "--exit"]);
    // Nearly every page was written since the first checkpoint, including those that the failed
    // checkpoints had harvested.
    assert!(number(&report, "dirty_pages") > 4500, "{report}");
    vm.expect_ended("suspended");
    let report = host.json(&["verify", &store, "--memory", "all"]);
    assert_eq!((&report["ok"], number(&report, "memory_pages_checked")), (&true.into(), 2 * 5120));
}

/// Runs `frazil` with `args` as an unprivileged user, after the shell commands `before`, in a mount
/// namespace of its own. A VM that starts is stopped after a second.
fn as_nobody(host: &Host, before: &str, args: &[&str]) -> Finished {
    as_nobody_with("", host, before, args)
}

/// As `as_nobody`, with more arguments `rights` for `setpriv`.
fn as_nobody_with(rights: &str, host: &Host, before: &str, args: &[&str]) -> Finished {
    // The binary is copied to where the user can reach it.
    std::fs::set_permissions(host.path(""), PermissionsExt::from_mode(0o777)).expect("ours");
    let binary = host.path("frazil-copy");
    if !binary.exists() {
        std::fs::copy(frazil(), &binary).expect("a copy");
    }
    let user = format!("setpriv --reuid=65534 --regid=65534 --clear-groups {rights}");
    let script = format!(
        "set -e; {before} exec {user} timeout --foreground --preserve-status --signal=TERM 1 \"$0\" \"$@\""
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script]).arg(&binary).args(args);
    host.surround(&mut command);
    command.env("FRAZIL_RUNTIME_DIR", host.path("run-of-nobody"));
    finish(command, PATIENCE)
}

/// Shell commands that put a node that everybody may open at /dev/kvm.
const KVM_FOR_ALL: &str = "rm -f kvm; mknod kvm c 10 232; chmod 666 kvm; \
     mount --bind kvm /dev/kvm;";
/// Shell commands that put a node that only root may open at /dev/kvm.
const KVM_FOR_ROOT: &str = "rm -f kvm; mknod kvm c 10 232; chmod 600 kvm; \
     mount --bind kvm /dev/kvm;";

#[test]
fn without_rights_one_is_told_which() {
    if !kvm_or_skip() {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("NOT RUN: only root can become another user");
        return;
    }
    let host = Host::new();
    let vm = host.run("roots", "touch=4MiB,rate=100,report=0", SMALL);
    vm.wait_populated();
    let _taken = host.json(&["checkpoint", "roots", "--exit"]);
    vm.expect_ended("suspended");
    let run = ["run", "--workload", "touch=4MiB", "--memory", "64MiB"];
    as_nobody(&host, KVM_FOR_ROOT, &run).expect_code(1).expect_says(&[
        "cannot use KVM: no permission to open /dev/kvm",
        "group that owns it (usually `kvm`)",
    ]);
    resume_without_userfaultfd(&host);
}

fn resume_without_userfaultfd(host: &Host) {
    let open = |path: &Path, mode| {
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("ours");
    };
    let store = host.store_path();
    open(&store.join("lock"), 0o666);
    let hide = format!("{KVM_FOR_ALL} mount --bind /dev/null /dev/userfaultfd;");
    let at = host.at("latest");
    as_nobody(host, &hide, &["resume", &at]).expect_code(1).expect_says(&[
        "userfaultfd is not available",
        "CAP_SYS_PTRACE",
        "/dev/userfaultfd",
        "--eager",
    ]);
    // The remedies that the message names: `--eager`, or the capability.
    let closed = format!(
        "{KVM_FOR_ALL} rm -f closed; install -m 600 /dev/null closed; \
         test ! -e /dev/userfaultfd || mount --bind closed /dev/userfaultfd;"
    );
    let capable = "--inh-caps=+sys_ptrace --ambient-caps=+sys_ptrace";
    for user in [
        as_nobody(host, &hide, &["resume", &at, "--eager", "--json"]),
        as_nobody_with(capable, host, &closed, &["resume", &at, "--json"]),
    ] {
        let lines = user.expect_code(0).json_lines();
        assert_eq!(lines[0]["event"], "started", "{user:#?}");
        assert_eq!(lines.last().expect("a line")["reason"], "stopped", "{user:#?}");
    }
}

fn connect(vm: &RunningVm) -> UnixStream {
    let stream = UnixStream::connect(&vm.socket).expect("it listens");
    stream.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
    stream.set_write_timeout(Some(Duration::from_secs(5))).expect("a timeout");
    stream
}

#[test]
fn nonsense_on_the_socket_stops_nobody() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let mut vm = host.run("calm", "touch=4MiB,rate=500,report=0", SMALL);
    vm.wait_populated();
    let mut rng = Rng::new(4);
    let mut kept = Vec::new();
    for _ in 0..60 {
        let mut garbage: Vec<u8> = (0..rng.below(3000)).map(|_| rng.bits() as u8).collect();
        if rng.chance(4) {
            garbage.splice(0..0, *b"POST /checkpoints HTTP/1.1\r\n");
        }
        let mut stream = connect(&vm);
        // The server may hang up in the middle.
        let _refused = stream.write_all(&garbage);
        if rng.chance(4) {
            kept.push(stream);
        }
    }
    for half in [
        "G",
        "GET /vm",
        "GET /vm HTTP/1.1\r\n",
        "GET /vm HTTP/1.1\r\nHost: x\r\nContent-Le",
        "POST /checkpoints HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n{",
        "POST /checkpoints HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\n{",
    ] {
        for _ in 0..5 {
            let mut stream = connect(&vm);
            stream.write_all(half.as_bytes()).expect("it is read");
            kept.push(stream);
        }
    }
    kept.extend((0..150).map(|_| connect(&vm)));
    // Despite all those connections, proper requests are answered.
    let before = vm.turns();
    vm.wait_beyond(before);
    let _taken = host.json(&["checkpoint", "calm"]);
    assert_eq!(host.json(&["pause", "calm"])["state"], "paused");
    assert_eq!(host.json(&["continue", "calm"])["state"], "running");
    drop(kept);
    assert!(!vm.has_ended());
    vm.verify_workload();
    let _stopped = host.ok(&["stop", "calm"]);
    vm.expect_ended("stopped");
    host.verify_all();
}

#[test]
fn requests_that_are_wrong_are_told_so() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let vm = host.run("strict", "touch=4MiB,rate=500,report=0", SMALL);
    vm.wait_populated();
    for (method, path, body, expected, says) in [
        ("GET", "/nowhere", "", 404, "nothing at /nowhere"),
        ("DELETE", "/vm", "", 405, "DELETE is not allowed on /vm"),
        ("POST", "/checkpoints", "{", 400, "expected a checkpoint request"),
        ("POST", "/checkpoints", r#"{"mesage":"x"}"#, 400, "unknown field `mesage`"),
        ("POST", "/checkpoints", r#"{"exit":"yes"}"#, 400, "expected a boolean"),
        ("POST", "/checkpoints", r#"{"tag":"a b"}"#, 400, "cannot be a tag"),
    ] {
        let (status, answer) = vm.http(method, path, body).expect("an answer");
        assert_eq!(status, expected, "{method} {path}: {answer}");
        let error = answer["error"].as_str().unwrap_or_default();
        assert!(error.contains(says), "{method} {path}: {answer}");
    }
    let huge = format!(r#"{{"message":"{}"}}"#, "x".repeat(1 << 20));
    // The server may hang up on the body; an answer, if there is one, says why.
    if let Ok((status, answer)) = vm.http("POST", "/checkpoints", &huge) {
        assert_eq!(status, 413, "{answer}");
    }
    let mut stream = connect(&vm);
    let lie = "POST /checkpoints HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n";
    stream.write_all(lie.as_bytes()).expect("it is read");
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).expect("an answer, without reading a body that long");
    assert_eq!(&answer, b"HTTP/1.1 413");
    assert!(
        host.ok(&["log", &host.store_path().display().to_string(), "--json"]).stdout.is_empty()
    );
    vm.wait_beyond(vm.turns());
}

#[test]
fn a_slow_reader_of_the_console_does_not_stop_the_guest() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let fifo = host.path("console");
    let made = Command::new("mkfifo").arg(&fifo).status().expect("mkfifo");
    assert!(made.success());
    // The FIFO is open at both ends, and never read.
    let _end = std::fs::File::options().read(true).write(true).open(&fifo).expect("the pipe");
    let spec = "touch=1MiB,rate=500,report=1";
    let vm =
        host.run("loud", spec, &["--memory", "48MiB", "--serial", &fifo.display().to_string()]);
    vm.wait_populated();
    let target = vm.turns() + 1500;
    wait_for("three seconds of work", || (vm.turns() > target).then_some(()));
    let _stopped = host.ok(&["stop", "loud"]);
    vm.expect_ended("stopped");
}

/// Sends a request, and leaves its answer to be read from the returned stream.
fn ask(socket: &Path, method: &str, path: &str) -> UnixStream {
    let mut stream = UnixStream::connect(socket).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n");
    stream.write_all(head.as_bytes()).expect("it is read");
    stream
}

/// Reads the status of the answer.
fn status(mut stream: UnixStream) -> u16 {
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).expect("an answer");
    let answer = std::str::from_utf8(&answer).expect("text");
    answer.strip_prefix("HTTP/1.1 ").and_then(|status| status.parse().ok()).expect("a status")
}

/// True if an answer arrives within 50 ms.
fn is_answered(stream: &UnixStream) -> bool {
    let mut byte = [0];
    stream.set_read_timeout(Some(Duration::from_millis(50))).expect("a timeout");
    let answered = rustix::net::recv(stream, &mut byte, rustix::net::RecvFlags::PEEK).is_ok();
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    answered
}

#[test]
fn requests_that_wait_keep_nobody_else_out() {
    if !kvm_or_skip() {
        return;
    }
    let folder = tempfile::tempdir().expect("a scratch folder");
    let (storage, faults) = FaultyStorage::new(&folder.path().join("store"));
    let store = Store::open_or_create_storage(Arc::new(storage), StoreOptions::default());
    let workload = "touch=4MiB,rate=500,report=0".parse().expect("a workload");
    let config = MachineConfig::new("asked", 48 << 20, 1, Guest::Workload(workload));
    let host = HostConfig::new(SerialOutput::Null, Some(store.expect("a store")));
    let vm = Arc::new(Vm::boot(&config, host).expect("it boots"));
    vm.go().expect("it runs");
    wait_populated(&vm);
    let socket = folder.path().join("socket");
    let nobody = |_: &frazil_vmm::Result<CheckpointReport>| {};
    let server = Server::start(Arc::clone(&vm), &socket, Arc::new(nobody)).expect("it listens");
    let refused = |waiting: &[UnixStream]| -> usize {
        waiting.iter().filter(|stream| is_answered(stream)).count()
    };

    // While one caller keeps the guest paused, many request that it continue.
    std::thread::scope(|scope| {
        let ((begins, begun), (done, wait)) = (channel::<()>(), channel::<()>());
        let guest = &vm;
        let look = move || begins.send(()).map_err(|_| RecvError).and_then(|()| wait.recv());
        let looking = scope.spawn(move || guest.while_paused(look));
        begun.recv().expect("it stands still");
        let waiting: Vec<_> = (0..45).map(|_| ask(&socket, "PUT", "/vm/continue")).collect();
        wait_for("those who are too many", || (refused(&waiting) == 37).then_some(()));
        assert_eq!(status(ask(&socket, "GET", "/vm")), 200);
        assert_eq!(status(ask(&socket, "GET", "/metrics")), 200);
        done.send(()).expect("it waits");
        let mut found: Vec<u16> = waiting.into_iter().map(status).collect();
        found.sort_unstable();
        assert_eq!((found[7], found[8]), (200, 503), "{found:?}");
        looking.join().expect("no panic").expect("it runs").expect("it was told");
    });

    // The store hangs: checkpoints wait for each other, and many requests cancel one.
    faults.hang();
    std::thread::scope(|scope| {
        let taking = scope.spawn(|| vm.checkpoint(&CheckpointRequest::default()));
        wait_for("a checkpoint being taken", || vm.checkpoint_progress());
        let posted: Vec<_> = (0..45).map(|_| ask(&socket, "POST", "/checkpoints")).collect();
        wait_for("those who are too many", || (refused(&posted) >= 37).then_some(()));
        let waiting: Vec<_> = (0..45).map(|_| ask(&socket, "PUT", "/checkpoints/cancel")).collect();
        // Depending on where the checkpoint is, it may notice the cancellation before the medium
        // answers, and the next one begins.
        wait_for("those who are too many", || (refused(&waiting) >= 37).then_some(()));
        assert_eq!(status(ask(&socket, "GET", "/vm")), 200);
        assert_eq!(status(ask(&socket, "PUT", "/vm/stop")), 200);
        assert!(vm.ended().is_some());
        faults.release();
        let _given_up = taking.join().expect("no panic").expect_err("it was cancelled");
        for stream in waiting.into_iter().chain(posted) {
            let _any = status(stream);
        }
    });
    drop(server);
}
