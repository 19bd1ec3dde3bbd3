//! Many VMs from one snapshot, pagers in processes of their own, and what happens to the rest when
//! one of them dies.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use frazil_snapstore::pager::{self, PagerOptions};
use frazil_snapstore::{Store, StoreOptions};
use frazil_tests::rng::Rng;
use frazil_tests::vm_harness::{
    Host, RunningVm, expect_sound, frazil, number, text, uffd_or_skip, wait_for, wait_populated,
};
use frazil_vmm::devices::serial::SerialOutput;
use frazil_vmm::{
    CheckpointRequest, Guest, HostConfig, Loading, MachineConfig, Vm, shared_image, verify_snapshot,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use vm_memory::{Bytes, GuestAddress};

const SMALL: &[&str] = &["--memory", "64MiB"];
const WORKLOAD: &str = "touch=16MiB,rate=4000,pattern=uniform,content=text,report=0,seed=11";
const DATA_PAGES: u64 = 4096;

/// Takes a snapshot of a guest that has written all its pages; returns the checkpoint's report.
fn snapshot(host: &Host) -> Value {
    let vm = host.run("origin", WORKLOAD, SMALL);
    vm.wait_populated();
    let report = host.json(&["checkpoint", "origin", "--exit"]);
    vm.expect_ended("suspended");
    report
}

fn kill(process: u64) {
    let pid = i32::try_from(process).ok().and_then(Pid::from_raw).expect("a process id");
    // The process may be gone already.
    let _gone = kill_process(pid, Signal::KILL);
}

/// Returns the names and process ids of the running VMs.
fn running(host: &Host) -> Vec<(String, u64)> {
    let list = host.ok(&["ps", "--json"]).json_lines();
    list.iter().map(|vm| (text(vm, "name").to_owned(), number(vm, "pid"))).collect()
}

fn wait_running(host: &Host, names: &[&str]) {
    wait_for("the clones", || {
        let running = running(host);
        names.iter().all(|name| running.iter().any(|(other, _)| other == name)).then_some(())
    });
}

/// Returns the processes that serve shared memory to this host's VMs.
fn servers(host: &Host) -> Vec<u64> {
    let folder = host.path("run").display().to_string();
    let processes = std::fs::read_dir("/proc").expect("/proc").flatten();
    let pid = |entry: &std::fs::DirEntry| entry.file_name().to_str()?.parse::<u64>().ok();
    let serves = |pid: &u64| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        line.contains("--listen") && line.contains(&folder)
    };
    processes.filter_map(|entry| pid(&entry)).filter(serves).collect()
}

#[test]
fn clones_share_a_snapshot_and_each_goes_its_own_way() {
    if !uffd_or_skip() {
        return;
    }
    let host = Host::new();
    let origin = snapshot(&host);
    let clones = host.start(&["resume", &host.at("latest"), "--clones", "3", "--name", "c"]);
    wait_running(&host, &["c-1", "c-2", "c-3"]);
    assert_eq!(servers(&host).len(), 1, "one process has the memory");
    let mut ids = Vec::new();
    for name in ["c-1", "c-2", "c-3"] {
        let report = host.json(&["checkpoint", name]);
        assert_eq!(report["parent"], origin["id"], "a branch of its own");
        assert!(number(&report, "stored_bytes") < number(&origin, "stored_bytes"), "{report}");
        ids.push(report["id"].clone());
    }
    // The death of one clone does not hurt the others.
    let victim = running(&host).into_iter().find(|(name, _)| name == "c-2").expect("it runs").1;
    kill(victim);
    for (name, parent) in [("c-1", &ids[0]), ("c-3", &ids[2])] {
        assert_eq!(&host.json(&["checkpoint", name])["parent"], parent);
    }
    // A later clone shares as well, and finds the snapshot's memory, whatever the others wrote.
    let late =
        host.start(&["resume", &host.at(text(&origin, "id")), "--clones", "1", "--name", "late"]);
    assert_eq!(servers(&host).len(), 1, "no other");
    late.wait_beyond(late.turns());
    late.verify_workload();
    let report = host.json(&["checkpoint", "late", "--exit"]);
    assert_eq!(report["parent"], origin["id"]);
    late.expect_ended("suspended");
    for name in ["c-1", "c-3"] {
        let _stopped = host.ok(&["stop", name]);
    }
    let finished = clones.wait_end();
    finished.expect_code(1).expect_says(&["1 of 3 VMs failed"]);
    assert_eq!(host.verify_all(), 7 * DATA_PAGES);
    wait_for("the memory's process to go", || servers(&host).is_empty().then_some(()));
    assert_eq!(left_by_servers(&host), [""; 0], "nothing is left of it");
    expect_sound(&host.store());
}

/// Returns the memory processes' files in the folder of running VMs.
fn left_by_servers(host: &Host) -> Vec<String> {
    let entries = std::fs::read_dir(host.path("run")).expect("the folder of running VMs").flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("memory-")).collect()
}

/// Returns the socket on which the memory process of the newest snapshot listens.
fn memory_socket(host: &Host) -> PathBuf {
    let id = host.store().latest().expect("a snapshot").id;
    host.path("run").join(format!("memory-{}.socket", id.short()))
}

#[test]
fn a_memory_process_that_fails_takes_its_socket_away() {
    if !uffd_or_skip() {
        return;
    }
    let host = Host::new();
    let _origin = snapshot(&host);
    let socket = memory_socket(&host);
    let log = format!("{}.log", socket.display());
    std::fs::create_dir(&log).expect("in the way");
    let args = ["pager", "--listen", &socket.display().to_string(), &host.at("latest")];
    host.frazil(&args).expect_code(1).expect_says(&[&log]);
    std::fs::remove_dir(&log).expect("it is there still");
    assert_eq!(left_by_servers(&host), [""; 0]);
}

#[test]
fn a_memory_process_short_of_file_descriptors_serves_on() {
    if !uffd_or_skip() {
        return;
    }
    let host = Host::new();
    let _origin = snapshot(&host);
    let socket = memory_socket(&host);
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -S -n 40; ulimit -H -n 64; exec \"$0\" \"$@\""]).arg(frazil());
    command.arg("pager").arg("--listen").arg(&socket).arg(host.at("latest"));
    host.surround(&mut command);
    let server = RunningVm::spawn(command);
    wait_for("it to listen", || pager::connect(&socket).ok());
    let found = servers(&host);
    let of_process = |what: &str| PathBuf::from(format!("/proc/{}/{what}", found[0]));
    let limits = std::fs::read_to_string(of_process("limits")).expect("it lives");
    let limit = limits.lines().find(|line| line.starts_with("Max open files")).expect("a limit");
    assert_eq!(limit.split_whitespace().nth(3), Some("64"), "it takes all it may have: {limit}");
    // Clients that connect and then do nothing.
    let crowd: Vec<_> = (0..80).map(|_| pager::connect(&socket).expect("it listens")).collect();
    let open = || std::fs::read_dir(of_process("fd")).map_or(0, Iterator::count);
    wait_for("it to have none left", || {
        assert_eq!(servers(&host), found, "it lives: {}", server.stderr());
        (open() >= 64).then_some(())
    });
    std::thread::sleep(Duration::from_millis(500));
    drop(crowd);
    let vm = host.start(&["resume", &host.at("latest"), "--clones", "1", "--name", "late"]);
    assert_eq!(servers(&host), found, "by the same");
    vm.wait_beyond(vm.turns() + 100);
    vm.verify_workload();
}

#[test]
fn clones_that_start_at_once_share_and_end_with_their_command() {
    if !uffd_or_skip() {
        return;
    }
    let host = Host::new();
    let _origin = snapshot(&host);
    let start = |name: &str| {
        let at = host.at("latest");
        let args = ["resume", &at, "--clones", "2", "--name", name, "--json"];
        RunningVm::spawn(host.command(&args))
    };
    let commands = [start("a"), start("b")];
    wait_running(&host, &["a-1", "a-2", "b-1", "b-2"]);
    assert_eq!(servers(&host).len(), 1, "whoever came second found the first");
    // The memory process stays for the other command's clones, and delays neither command's end.
    for command in commands {
        command.signal(Signal::TERM);
        command.wait_end().expect_code(0);
    }
    assert_eq!(running(&host), [], "all of them have ended");
}

#[test]
fn a_working_set_is_there_before_the_guest_runs_whoever_brings_it_in() {
    if !uffd_or_skip() {
        return;
    }
    let host = Host::new();
    let origin = snapshot(&host);
    let id = text(&origin, "id");
    let vm = host.resume("first", id, &["--record-working-set", "300ms", "--no-fill"]);
    let file = host.store_path().join(format!("working-set-{id}"));
    wait_for("the working set", || file.exists().then_some(()));
    let _stopped = host.ok(&["stop", "first"]);
    vm.expect_ended("stopped");
    for place in ["internal", "external"] {
        let args = ["--pager", place, "--working-set", "before", "--no-fill", "--paused"];
        let vm = host.resume(place, id, &args);
        let pager = &vm.get("/vm")["pager"];
        // The guest touched 4,000 pages a second for 300 ms, in frames of up to 16 pages.
        assert!(number(pager, "filled_pages") > 500, "{pager}");
        let _goes = host.ok(&["continue", place]);
        vm.wait_beyond(vm.turns() + 100);
        vm.verify_workload();
        let _stopped = host.ok(&["stop", place]);
        vm.expect_ended("stopped");
    }
}

#[test]
fn clones_go_on_when_the_process_that_has_their_memory_is_killed() {
    if !uffd_or_skip() {
        return;
    }
    let host = Host::new();
    let origin = snapshot(&host);
    for round in 0..3 {
        // Only touched pages are loaded, so most are still missing.
        let args = ["resume", &host.at(text(&origin, "id")), "--clones", "1", "--no-fill"];
        let vms: Vec<RunningVm> = (0..2)
            .map(|index| {
                host.start(&[&args[..], &["--name", &format!("k{round}-{index}")]].concat())
            })
            .collect();
        std::thread::sleep(Duration::from_millis(round * 20));
        servers(&host).into_iter().for_each(kill);
        for vm in &vms {
            wait_for("it to be noticed", || {
                (number(&vm.get("/vm"), "pager_deaths") == 1).then_some(())
            });
            vm.wait_beyond(vm.turns() + 500);
            vm.verify_workload();
        }
        for (index, vm) in vms.into_iter().enumerate() {
            let report = host.json(&["checkpoint", &format!("k{round}-{index}"), "--exit"]);
            assert_eq!(report["parent"], origin["id"]);
            vm.expect_ended("suspended");
        }
    }
    assert_eq!(host.verify_all(), 7 * DATA_PAGES);
}

#[test]
fn a_pager_that_is_killed_again_and_again_is_replaced() {
    if !uffd_or_skip() {
        return;
    }
    let host = Host::new();
    let origin = snapshot(&host);
    let mut rng = Rng::new(3);
    for fill in [&["--no-fill"][..], &["--fill-rate", "8MiB"]] {
        let args = ["--pager", "external", "--working-set", "off"];
        let vm = host.resume("vm", text(&origin, "id"), &[&args[..], fill].concat());
        let mut killed = 0;
        while killed < 12 {
            std::thread::sleep(Duration::from_millis(rng.below(60)));
            let status = vm.get("/vm");
            if status["pager"]["complete"] == true {
                break;
            }
            if let Some(process) = status["pager_process"].as_u64() {
                kill(process);
                killed += 1;
            }
        }
        assert!(killed > 3, "it was complete after {killed}");
        vm.wait_beyond(vm.turns() + 200);
        vm.verify_workload();
        assert!(number(&vm.get("/vm"), "pager_deaths") > 0);
        let report = host.json(&["checkpoint", "vm", "--exit"]);
        assert_eq!(report["parent"], origin["id"]);
        vm.expect_ended("suspended");
    }
    assert_eq!(host.verify_all(), 3 * DATA_PAGES);
}

/// A policy may forget the snapshot that a VM was resumed from: the VM pins it, for its pagers too.
#[test]
fn a_pager_is_replaced_though_its_snapshot_was_forgotten() {
    if !uffd_or_skip() {
        return;
    }
    let host = Host::new();
    let origin = snapshot(&host);
    let id = text(&origin, "id");
    let args = ["--pager", "external", "--working-set", "off", "--no-fill"];
    let vm = host.resume("vm", id, &args);
    let process = || vm.get("/vm")["pager_process"].as_u64();
    let mut last = process().expect("a process");
    for deaths in 1..=2 {
        kill(last);
        wait_for("it to be noticed", || {
            (number(&vm.get("/vm"), "pager_deaths") == deaths).then_some(())
        });
        // If the VM's own process had taken over, no pager would be replaced any more.
        last = wait_for("another", || process().filter(|process| *process != last));
        vm.wait_beyond(vm.turns() + 100);
        if deaths == 1 {
            let _forgotten = host.ok(&["forget", &host.at(id), "--prune"]);
        }
    }
    vm.verify_workload();
    let _stopped = host.ok(&["stop", "vm"]);
    vm.expect_ended("stopped");
}

/// Takes a snapshot of a VM, and returns the devices that the snapshot lists.
fn devices(host: &Host, name: &str) -> Value {
    let report = host.json(&["checkpoint", name]);
    let shown = host.json(&["show", &host.at(text(&report, "id"))]);
    let state = shown["state"].as_array().expect("chunks");
    let machine = state.iter().find(|chunk| chunk["name"] == "machine").expect("the machine's");
    machine["body"]["devices"].clone()
}

#[test]
fn each_clone_is_given_what_is_its_own() {
    if !uffd_or_skip() {
        return;
    }
    let host = Host::new();
    let socket = |name: &str| host.path(name).display().to_string();
    let own = format!("socket={}", socket("v"));
    let vm = host.run("origin", WORKLOAD, &["--memory", "64MiB", "--net", "none", "--vsock", &own]);
    vm.wait_populated();
    let _report = host.json(&["checkpoint", "origin", "--exit"]);
    vm.expect_ended("suspended");
    let (at, others) =
        (host.at("latest"), format!("cid=10{{clone}},socket={}", socket("v{clone}")));
    let given = ["--net", "none,mac=02:00:00:00:{clone}", "--vsock", &others];
    for (count, names) in [("2", &["c-1", "c-2"][..]), ("1", &["one"])] {
        let name = names[0].split('-').next().expect("a name");
        let resume = ["resume", &at, "--clones", count, "--name", name];
        let clones = host.start(&[&resume[..], &given].concat());
        wait_running(&host, names);
        for (number, name) in (1..).zip(names) {
            assert!(host.path(&format!("v{number}")).exists(), "{name} listens");
            let devices = devices(&host, name);
            assert_eq!(devices[0]["device"]["mac"], format!("02:00:00:00:00:0{number}"));
            assert_eq!(devices[1]["device"]["cid"], 100 + number, "{devices}");
            let _stopped = host.ok(&["stop", name]);
        }
        clones.wait_end().expect_code(0);
        assert!(!host.path("v1").exists() && !host.path("v{clone}").exists());
    }
}

#[test]
fn wrong_ways_to_clone_are_refused() {
    if !uffd_or_skip() {
        return;
    }
    let host = Host::new();
    let _origin = snapshot(&host);
    let at = host.at("latest");
    for wrong in [
        &["--clones", "0"][..],
        &["--clones", "2", "--eager"],
        &["--clones", "2", "--pager", "external"],
        &["--fill-rate", "1MiB", "--no-fill"],
        &["--pager", "somewhere"],
    ] {
        host.frazil(&[&["resume", &at], wrong].concat()).expect_code(2);
    }
    let socket = host.path("socket").display().to_string();
    host.frazil(&["resume", &at, "--clones", "2", "--api-socket", &socket])
        .expect_code(1)
        .expect_says(&["--api-socket", "each gets its own"]);
    let nobody = host.path("nobody").display().to_string();
    host.frazil(&["resume", &at, "--memory-from", &nobody]).expect_code(1).expect_says(&[&nobody]);
}

fn boot(folder: &std::path::Path, ram_bytes: u64, workload: &str) -> Vm {
    let store = Store::open_or_create(folder, StoreOptions::default()).expect("a store");
    let guest = Guest::Workload(workload.parse().expect("a workload"));
    let config = MachineConfig::new("origin", ram_bytes, 1, guest);
    let vm = Vm::boot(&config, HostConfig::new(SerialOutput::Null, Some(store))).expect("it boots");
    vm.go().expect("it runs");
    wait_populated(&vm);
    vm
}

fn loops(vm: &Vm) -> u64 {
    let view = vm.workload().expect("counters");
    view.vcpus.iter().map(|cpu| cpu.control.loops).sum()
}

#[test]
fn clones_in_one_process_share_and_verify() {
    if !uffd_or_skip() {
        return;
    }
    let scratch = tempfile::tempdir().expect("a scratch folder");
    let origin = boot(&scratch.path().join("store"), 64 << 20, WORKLOAD);
    let id = origin.checkpoint(&CheckpointRequest::default()).expect("a checkpoint").id;
    let store = Arc::clone(origin.store().expect("its store"));
    drop(origin);
    let snapshot = store.snapshot(id).expect("published");
    let image = shared_image(&snapshot).expect("an image");
    let clones: Vec<Vm> = (0..8)
        .map(|index| {
            let host = HostConfig::new(SerialOutput::Null, Some(Arc::clone(&store)));
            let loading = Loading::Shared(Arc::clone(&image), PagerOptions::default());
            let vm = Vm::resume(&snapshot, format!("c{index}"), host, loading).expect("a clone");
            vm.go().expect("it runs");
            vm
        })
        .collect();
    for vm in &clones {
        let before = loops(vm);
        wait_for("a clone to run", || (loops(vm) > before + 1000).then_some(()));
    }
    // A value of its own for each, on the same page behind the workload's data.
    let page = (64_u64 << 20) / 4096 - 5;
    for (number, vm) in (1_u64..).zip(&clones) {
        vm.ram().memory().write_obj(number, GuestAddress(page * 4096)).expect("it is RAM");
    }
    for (number, vm) in (1_u64..).zip(&clones) {
        vm.verify_workload().expect("it runs").expect("its memory is right");
        let report = vm.checkpoint(&CheckpointRequest::default()).expect("a checkpoint");
        assert_eq!(report.parent, Some(id));
        let taken = store.snapshot(report.id).expect("published");
        let saved = verify_snapshot(&taken);
        assert!(saved.expect("saved memory is right").is_some());
        let (mut own, mut expected) = ([0; 4096], [0; 4096]);
        expected[..8].copy_from_slice(&number.to_le_bytes());
        taken.region("ram").and_then(|ram| ram.read_page(page, &mut own)).expect("its page");
        assert!(own == expected, "clone {number} saved what another wrote: {:?}", &own[..8]);
    }
    drop(clones);
    expect_sound(&store);
}

const DEPTH: usize = 1000;

/// A VM is resumed, touched a little and saved again, a thousand times over: each time, most pages
/// were never loaded.
#[test]
fn a_long_line_of_half_resumed_machines_verifies() {
    if !uffd_or_skip() {
        return;
    }
    let scratch = tempfile::tempdir().expect("a scratch folder");
    let workload = "touch=16MiB,rate=200,pattern=uniform,content=text,report=0,seed=4";
    let origin = boot(&scratch.path().join("store"), 64 << 20, workload);
    let mut id = origin.checkpoint(&CheckpointRequest::default()).expect("a checkpoint").id;
    let store = Arc::clone(origin.store().expect("its store"));
    drop(origin);
    for depth in 1..=DEPTH {
        let host = HostConfig::new(SerialOutput::Null, Some(Arc::clone(&store)));
        let options = PagerOptions { background_fill: false, ..PagerOptions::default() };
        let snapshot = store.pin(id).expect("published");
        let vm = Vm::resume(&snapshot, "line".into(), host, Loading::lazy(options));
        let vm = vm.expect("it resumes");
        let before = loops(&vm);
        vm.go().expect("it runs");
        wait_for("progress", || (loops(&vm) > before).then_some(()));
        let report = vm.checkpoint(&CheckpointRequest { exit: true, ..Default::default() });
        let report = report.expect("a checkpoint");
        assert_eq!(report.parent, Some(id), "{depth}");
        id = report.id;
        let resident = vm.pager_stats().expect("a pager").filled_pages;
        assert!(resident < DATA_PAGES / 2, "{depth}: {resident} pages were brought in");
    }
    let saved = verify_snapshot(&store.snapshot(id).expect("published"));
    assert_eq!(
        saved.expect("saved memory is right").expect("a workload").pages_checked,
        DATA_PAGES
    );
    expect_sound(&store);
}

/// Returns how many bytes the RAM of the VM in process `pid` takes, however its parts are mapped.
fn ram_taken(pid: u64) -> u64 {
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").flatten();
    let is_ram = |path: &PathBuf| {
        let target = std::fs::read_link(path);
        target.is_ok_and(|target| target.to_string_lossy().contains("memfd:frazil-ram"))
    };
    let taken = |path: PathBuf| std::fs::metadata(path).ok().map(|file| (file.ino(), file));
    let files: BTreeMap<_, _> =
        files.map(|entry| entry.path()).filter(is_ram).filter_map(taken).collect();
    files.values().map(|file| file.blocks() * 512).sum()
}

#[test]
fn a_large_guest_takes_what_it_touches() {
    if !uffd_or_skip() {
        return;
    }
    let host = Host::new();
    let workload = "touch=256MiB,rate=200,pattern=uniform,content=text,report=0,seed=11";
    let vm = host.run("large", workload, &["--memory", "16GiB"]);
    vm.wait_populated();
    let _report = host.json(&["checkpoint", "large", "--exit"]);
    vm.expect_ended("suspended");
    let vm = host.resume("again", "latest", &["--no-fill", "--working-set", "off"]);
    // These touch about as many frames of 64 KiB.
    vm.wait_beyond(vm.turns() + 200);
    let _paused = host.ok(&["pause", "again"]);
    let filled = number(&vm.get("/vm")["pager"], "filled_pages") * 4096;
    let taken = ram_taken(number(&vm.started, "pid"));
    assert!(filled > 2 << 20 && filled < 96 << 20, "{filled} bytes of 256 MiB were brought in");
    assert!(taken >= filled && taken < 128 << 20, "{filled} bytes, which take {taken}");
    vm.verify_workload();
    let taken = ram_taken(number(&vm.started, "pid"));
    assert!((256 << 20..384 << 20).contains(&taken), "256 MiB of 16 GiB take {taken} bytes");
}
