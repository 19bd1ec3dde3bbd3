//! `--user`: VMs started as root go on as another user, and can do everything that other VMs can.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use frazil_tests::vm_harness::{Host, RunningVm, number, text, uffd_or_skip, wait_for};
use rustix::process::{Pid, Signal, kill_process};

/// A user that no host has, so that nothing belongs to it by accident.
const UID: u32 = 54_321;
const GID: u32 = 12_345;
const USER: &str = "54321:12345";
const SMALL: &[&str] = &["--memory", "64MiB", "--user", USER];
const WORKLOAD: &str = "touch=16MiB,rate=4000,pattern=uniform,report=0";

fn root_or_skip() -> bool {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: not root, and this test is of programs that stop being root");
        return false;
    }
    uffd_or_skip()
}

/// Makes a host whose folder every user can enter.
fn open_host() -> Host {
    let host = Host::new();
    fs::set_permissions(host.path(""), fs::Permissions::from_mode(0o755)).expect("it is ours");
    host
}

/// Returns /proc's `status` of each thread of a process.
fn statuses(process: u64) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{process}/task")).expect("it runs").flatten();
    threads.filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok()).collect()
}

/// Fails the test unless every thread of `process` runs as the user, cannot become another, and has
/// no capabilities.
#[track_caller]
fn expect_user(process: u64) {
    let statuses = statuses(process);
    assert!(!statuses.is_empty(), "{process} runs");
    // One of the threads may be KVM's kernel thread, which never runs a program.
    let ours = statuses.iter().filter(|status| !status.starts_with("Name:\tkvm-"));
    for status in ours {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a field");
            line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(field("Uid:"), vec![UID.to_string(); 4], "{status}");
        assert_eq!(field("Gid:"), vec![GID.to_string(); 4], "{status}");
        assert_eq!(field("Groups:"), [GID.to_string()], "{status}");
        for capabilities in ["CapEff:", "CapPrm:", "CapAmb:"] {
            assert_eq!(field(capabilities), ["0000000000000000"], "{status}");
        }
    }
}

/// Returns everything in `folder`, at any depth.
fn everything(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder").flatten().map(|entry| entry.path());
    let deeper = |path: PathBuf| {
        let below = if path.is_dir() { everything(&path) } else { Vec::new() };
        below.into_iter().chain([path])
    };
    entries.flat_map(deeper).collect()
}

#[track_caller]
fn expect_store_of_user(host: &Host) {
    for path in everything(&host.store_path()) {
        let found = path.symlink_metadata().expect("it is there");
        assert_eq!((found.uid(), found.gid()), (UID, GID), "{}", path.display());
    }
}

fn process(vm: &RunningVm) -> u64 {
    number(&vm.started, "pid")
}

/// Returns the processes, besides the VMs, that serve shared memory to this host's VMs.
fn servers(host: &Host) -> Vec<u64> {
    let folder = host.path("run").display().to_string();
    let pid = |entry: fs::DirEntry| entry.file_name().to_str()?.parse::<u64>().ok();
    let serves = |pid: &u64| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        line.contains("--listen") && line.contains(&folder)
    };
    fs::read_dir("/proc").expect("/proc").flatten().filter_map(pid).filter(serves).collect()
}

fn kill(process: u64) {
    let pid = i32::try_from(process).ok().and_then(Pid::from_raw).expect("a process id");
    kill_process(pid, Signal::KILL).expect("it runs");
}

#[test]
fn all_that_a_vm_does_it_does_as_that_user() {
    if !root_or_skip() {
        return;
    }
    let host = open_host();
    fs::write(host.path("disk"), vec![5; 1 << 20]).expect("the folder is ours");
    // Readable by root only, as the files behind devices may be.
    fs::set_permissions(host.path("disk"), fs::Permissions::from_mode(0o600)).expect("ours");
    let disk = host.path("disk").display().to_string();
    let vm = host.run("a", WORKLOAD, &[SMALL, &["--disk", &disk]].concat());
    assert_eq!(text(&vm.started, "user"), USER);
    vm.wait_populated();
    expect_user(process(&vm));
    // If the first checkpoint cannot copy everything aside, it write-protects memory by a
    // userfaultfd of its own.
    let first = host.json(&["checkpoint", "a", "--tag", "first"]);
    assert!(number(&first, "dirty_pages") > 4096, "{first}");
    vm.wait_beyond(vm.turns());
    let _done = host.json(&["checkpoint", "a", "--tag", "second"]);
    let _done = host.json(&["rewind", "a", "first"]);
    vm.verify_workload();
    let _done = host.json(&["checkpoint", "a", "--tag", "third", "--exit"]);
    vm.expect_ended("suspended");
    expect_store_of_user(&host);
    // What the VM left in root's folder is removed by the next command that looks.
    assert!(host.ok(&["ps", "--json"]).stdout.is_empty());
    assert_eq!(fs::read_dir(host.path("run")).expect("it is there").count(), 0);
    host.verify_all();
}

#[test]
fn protected_pages_are_had_without_root() {
    if !root_or_skip() {
        return;
    }
    let host = open_host();
    let storm = "touch=48MiB,rate=max,report=0";
    let arguments = ["--memory", "96MiB", "--staging", "1MiB", "--user", USER];
    let vm = host.run("storm", storm, &arguments);
    vm.wait_populated();
    expect_user(process(&vm));
    let report = host.json(&["checkpoint", "storm"]);
    // With a userfaultfd, which /dev/userfaultfd gives to whoever has it open, the guest need not
    // be slowed down.
    if Path::new("/dev/userfaultfd").exists() {
        assert_eq!(number(&report, "throttled_us"), 0, "{report}");
    }
    vm.verify_workload();
}

#[test]
fn resumed_vms_their_pagers_and_clones_are_that_user_too() {
    if !root_or_skip() {
        return;
    }
    let host = open_host();
    let origin = host.run("origin", WORKLOAD, SMALL);
    origin.wait_populated();
    let _taken = host.json(&["checkpoint", "origin", "--exit"]);
    origin.expect_ended("suspended");

    for pager in ["internal", "external"] {
        let vm = host.resume("r", "latest", &["--user", USER, "--pager", pager, "--no-fill"]);
        expect_user(process(&vm));
        if pager == "external" {
            let pager_of = |vm: &RunningVm| vm.get("/vm")["pager_process"].as_u64();
            let first = pager_of(&vm).expect("a process of its own");
            expect_user(first);
            kill(first);
            let next = wait_for("another pager", || pager_of(&vm).filter(|now| *now != first));
            expect_user(next);
        }
        vm.wait_beyond(vm.turns());
        vm.verify_workload();
        let _taken = host.json(&["checkpoint", "r", "--exit"]);
        vm.expect_ended("suspended");
    }

    let at = host.at("latest");
    let clones = ["resume", &at, "--clones", "2", "--name", "c", "--user", USER];
    let clones = RunningVm::spawn(host.command(&clones));
    let running = wait_for("the clones", || {
        let list = host.ok(&["ps", "--json"]).json_lines();
        (list.len() == 2).then_some(list)
    });
    for vm in &running {
        expect_user(number(vm, "pid"));
        let id = host.json(&["checkpoint", text(vm, "name")]);
        assert!(id["id"].is_string(), "{id}");
    }
    let [server] = servers(&host)[..] else { panic!("one process has the memory") };
    expect_user(server);
    // The clones go on without it.
    kill(server);
    for vm in &running {
        let _taken = host.json(&["checkpoint", text(vm, "name"), "--exit"]);
    }
    clones.wait_end().expect_code(0);
    expect_store_of_user(&host);
    host.verify_all();
    assert!(host.ok(&["ps", "--json"]).stdout.is_empty());
    let names: Vec<_> = everything(&host.path("run"));
    assert!(names.iter().all(|name| name.extension().is_some_and(|end| end == "log")), "{names:?}");
}

#[test]
fn what_cannot_be_is_said_before_a_guest_runs() {
    if !root_or_skip() {
        return;
    }
    let host = open_host();
    let run = ["run", "--workload", "touch=1MiB,report=0", "--memory", "48MiB"];
    let store = host.store_path().display().to_string();
    for (user, says) in [
        ("root", "a user other than root"),
        ("no-such-user", "a user of this host, found `no-such-user`"),
        ("54321", "expected 54321:GID"),
    ] {
        host.frazil(&[&run[..], &["--user", user]].concat()).expect_code(2).expect_says(&[says]);
    }
    // A store that belongs to root is refused.
    let vm = host.run("mine", "touch=1MiB,report=0", &["--memory", "48MiB"]);
    let _taken = host.json(&["checkpoint", "mine", "--exit"]);
    vm.expect_ended("suspended");
    let theirs = [&run[..], &["--store", &store, "--user", USER]].concat();
    let says = ["as user `54321:12345`", &store, "chown -R 54321:12345"];
    host.frazil(&theirs).expect_code(1).expect_says(&says);
    let resume = ["resume", &host.at("latest"), "--user", USER];
    host.frazil(&resume).expect_code(1).expect_says(&says);
    // Given to the user, it works.
    for path in everything(&host.store_path()).into_iter().chain([host.store_path()]) {
        std::os::unix::fs::lchown(path, Some(UID), Some(GID)).expect("root may");
    }
    let vm = host.resume("theirs", "latest", &["--user", USER]);
    expect_user(process(&vm));
    let _taken = host.json(&["checkpoint", "theirs", "--exit"]);
    vm.expect_ended("suspended");
    expect_store_of_user(&host);
}
