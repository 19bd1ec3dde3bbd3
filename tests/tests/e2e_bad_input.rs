//! Wrong arguments and damaged stores: each gives a clear error, quickly, with the right exit
//! status.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use frazil_snapstore::{Description, Store, StoreError, StoreOptions, segment_name};
use frazil_tests::vm_harness::{Finished, Host, flip_byte, kvm_or_skip, number, text, wait_for};

const SMALL: &[&str] = &["--memory", "48MiB"];
const WORKLOAD: &str = "touch=4MiB,rate=500,report=0,content=random";

/// Makes a host whose store has two snapshots of a guest: a full one and an incremental one.
fn host_with_store() -> Host {
    let host = Host::new();
    let vm = host.run("maker", WORKLOAD, SMALL);
    vm.wait_populated();
    let _first = host.json(&["checkpoint", "maker"]);
    vm.wait_beyond(vm.turns());
    let _last = host.json(&["checkpoint", "maker", "--exit"]);
    vm.expect_ended("suspended");
    host
}

fn copy_store(from: &Host) -> Host {
    let to = Host::new();
    let copied = std::process::Command::new("cp")
        .arg("-r")
        .args([from.store_path(), to.store_path()])
        .status()
        .expect("cp");
    assert!(copied.success());
    to
}

/// Runs `args`, which must fail with status 1 within 15 s and print every one of `says` on standard
/// error.
#[track_caller]
fn refused(host: &Host, args: &[&str], says: &[&str]) -> Finished {
    let started = Instant::now();
    let finished = host.frazil(args);
    let took = started.elapsed();
    finished.expect_code(1).expect_says(says).expect_says(&["frazil: "]);
    assert!(took < Duration::from_secs(15), "{args:?} took {took:?}");
    assert!(!finished.stderr.contains("panicked"), "{finished:#?}");
    finished
}

#[test]
fn what_is_no_store_is_said_to_be_none() {
    let host = Host::new();
    let path = |name: &str| host.path(name).display().to_string();
    std::fs::write(path("file"), "x").expect("the scratch folder");
    std::fs::create_dir(path("foreign")).expect("the scratch folder");
    std::fs::write(path("foreign/letter"), "dear").expect("the scratch folder");
    std::fs::create_dir(path("empty")).expect("the scratch folder");
    for name in ["file", "foreign", "empty", "missing"] {
        let place = path(name);
        for args in [
            vec!["log", &place],
            vec!["verify", &place],
            vec!["show", &format!("{place}@latest")],
            vec!["resume", &format!("{place}@latest")],
        ] {
            refused(&host, &args, &[&place, "is not a frazil store: expected", "found", "--store"]);
        }
    }
    // Looking for a store must not create one.
    assert_eq!(std::fs::read_dir(path("empty")).expect("it is there").count(), 0);
    assert!(!Path::new(&path("missing")).exists());
    // And running a VM must not write into a folder that is something else.
    for (name, found) in [("file", "found a file"), ("foreign", "`letter`")] {
        let args = ["run", "--workload", WORKLOAD, "--store", &path(name)];
        refused(&host, &args, &["is not a frazil store", found]);
    }
}

#[test]
fn references_that_name_nothing() {
    if !kvm_or_skip() {
        return;
    }
    let host = host_with_store();
    let names = |reference: &str, says: &[&str]| {
        for command in ["show", "resume", "verify"] {
            refused(&host, &[command, &host.at(reference)], says);
        }
    };
    names("silver", &["no snapshot `silver`", "expected `latest`, a tag", "frazil log"]);
    names("deadbeef", &["no snapshot `deadbeef`", "none of its 2 snapshots"]);
    names("latest~7", &["no snapshot `latest~7`", "has only 1 ancestors"]);
    names("latest~x", &["expected a number after `~`, found `x`"]);
    names("ab", &["at least 4 digits"]);
    for bad in ["latest", "deadbeef", "a b", ""] {
        let vm = host.resume("t", "latest", SMALL_RESUME);
        refused(&host, &["checkpoint", "t", "--tag", bad], &["cannot be a tag: expected"]);
        drop(vm);
    }
}

const SMALL_RESUME: &[&str] = &["--paused"];

#[test]
fn an_ambiguous_prefix_lists_what_it_fits() {
    let host = Host::new();
    let store =
        Store::open_or_create(&host.store_path(), StoreOptions::default()).expect("a store");
    // Among a few hundred ids, two share their first four digits.
    let mut seen = HashMap::new();
    let (first, second) = (1..5000)
        .find_map(|time_unix_ms| {
            // Children of other tests hold our lock for a moment, between fork and exec.
            let transaction = wait_for("the writer lock", || match store.begin(None) {
                Err(StoreError::Busy { .. }) => None,
                begun => Some(begun.expect("a good store")),
            });
            let description = Description { time_unix_ms, ..Description::default() };
            let id = transaction.commit(description).expect("an empty snapshot").id.to_string();
            seen.insert(id[..4].to_owned(), id.clone()).map(|other| (other, id))
        })
        .expect("a collision");
    let says = ["is ambiguous in", &first[..6], &second[..6], "give more digits"];
    refused(&host, &["show", &host.at(&first[..4])], &says);
    for id in [first, second] {
        assert_eq!(text(&host.json(&["show", &host.at(&id[..40])]), "id"), id);
    }
}

#[test]
fn wrong_arguments_are_usage_errors() {
    let host = Host::new();
    for (args, says) in [
        (&["run"][..], "--workload"),
        (&["run", "--workload", "touch=banana"], "`touch` expected a size of 256KiB or more"),
        (&["run", "--workload", "speed=9"], "unknown key `speed`; known are touch, rate"),
        (&["run", "--workload", "seed=1,seed=2"], "`seed` is given twice"),
        (&["run", "--workload", "", "--memory", "lots"], "expected a size such as 512MiB"),
        (
            &["run", "--workload", "", "--checkpoint-every", "0s"],
            "expected a time longer than zero",
        ),
        (&["run", "--workload", "", "--checkpoint-every", "often"], "expected a time such as"),
        (&["run", "--workload", "", "--cpus", "many"], "invalid value 'many'"),
        (&["run", "--workload", "", "--kernel", "x"], "cannot be used with"),
        (&["run", "--workload", "", "--compression", "99"], "99 is not in -100..=22"),
        (&["resume", "x", "--eager", "--no-fill"], "cannot be used with"),
        (&["resume"], "SNAPSHOT"),
        (&["freeze"], "unrecognized subcommand"),
        (&[], "Usage"),
    ] {
        host.frazil(args).expect_code(2).expect_says(&[says]);
    }
}

#[test]
fn machines_that_cannot_be() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let run = |more: &[&str], says: &[&str]| {
        let args = [&["run", "--workload", "touch=4MiB"], more].concat();
        refused(&host, &args, says);
    };
    run(&["--memory", "0"], &["memory: expected a multiple of 2 MiB", "found 0 bytes"]);
    run(&["--memory", "33MiB"], &["memory: expected a multiple of 2 MiB", "found 34603008"]);
    run(&["--memory", "64TiB"], &["up to 16 TiB"]);
    run(&["--memory", "2MiB"], &["expected 32MiB of memory or more, found 2048KiB"]);
    run(&["--cpus", "0"], &["cpus: expected 1 to", "found 0"]);
    run(&["--cpus", "5000"], &["cpus: expected 1 to", "found 5000"]);
    run(&["--name", "a/b"], &["name: expected", "found `a/b`"]);
    run(&["--name", ""], &["name: expected"]);
    let much = ["run", "--workload", "touch=1GiB", "--memory", "64MiB"];
    refused(&host, &much, &["`touch` expected up to 49152KiB", "give the machine more memory"]);
}

#[test]
fn kernels_that_are_none() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let file = |name: &str, bytes: &[u8]| -> String {
        std::fs::write(host.path(name), bytes).expect("the scratch folder");
        host.path(name).display().to_string()
    };
    let mut bzimage = vec![0; 4096];
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    let mut foreign = vec![0; 4096];
    foreign[..6].copy_from_slice(b"\x7fELF\x02\x01");
    foreign[18] = 183;
    let mut empty_elf = foreign.clone();
    empty_elf[18] = 62;
    let run = |kernel: &str, says: &[&str]| {
        let says = [says, &["cannot boot", kernel]].concat();
        refused(&host, &["run", "--kernel", kernel, "--memory", "32MiB"], &says);
    };
    run(&host.path("nowhere").display().to_string(), &["expected a readable file", "No such file"]);
    run(&host.path("").display().to_string(), &["expected"]);
    run(
        &file("script", b"#!/bin/sh\n"),
        &["expected an ELF64 executable for x86-64", "something else"],
    );
    run(&file("empty", b""), &["expected an ELF64 executable"]);
    run(&file("bzImage", &bzimage), &["a Linux bzImage for x86-64", "boot protocol 0.0"]);
    run(&file("arm", &foreign), &["an ELF file for another machine"]);
    run(&file("hollow", &empty_elf), &["expected"]);
    // A good kernel with a missing initrd, or with too long a command line.
    let kernel = file("kernel", frazil_vmm::workload::GUEST_ELF);
    let initrd = host.path("nowhere").display().to_string();
    let args = ["run", "--kernel", &kernel, "--initrd", &initrd, "--memory", "32MiB"];
    refused(&host, &args, &["cannot boot", &initrd, "No such file"]);
    let long = "x".repeat(5000);
    let args = ["run", "--kernel", &kernel, "--cmdline", &long, "--memory", "32MiB"];
    refused(&host, &args, &["the command line", "2047"]);
}

/// The first page of the workload's data.
const DATA_GPA: u64 = 16 << 20;
/// The page with the counters of the workload's first vCPU, which the VMM itself reads on resume.
const CONTROL_GPA: u64 = 0x20_1000;

/// Returns the segment's path, the offset, and the segment's name of the frame that holds the page
/// at `gpa` in the newest snapshot.
fn frame_of(host: &Host, gpa: u64) -> (PathBuf, u64, String) {
    let store = host.store();
    let id = store.latest().expect("a snapshot").id;
    let region = store.snapshot(id).and_then(|snapshot| snapshot.region("ram")).expect("RAM");
    let page = gpa / 4096;
    let (frame, _) =
        region.locate(page).expect("the tree is good").block().expect("the guest wrote the page");
    let name = segment_name(frame.segment);
    (host.store_path().join(&name), u64::from(frame.offset), name)
}

/// Fails the test unless every way to resume fails and names the segment, whenever the damage is
/// met.
fn resume_fails(host: &Host, name: &str) {
    let at = host.at("latest");
    for more in [
        &["--eager"][..],
        &["--no-fill"],
        &[],
        &["--pager", "external", "--no-fill"],
        &["--pager", "external"],
        &["--clones", "1", "--no-fill"],
        &["--clones", "2"],
    ] {
        let args = [&["resume", &at, "--name", "hurt"], more].concat();
        refused(host, &args, &[name, "is damaged at offset"]);
        assert!(host.ok(&["ps", "--json"]).stdout.is_empty(), "nothing is left of it");
    }
}

#[test]
fn a_damaged_frame_is_never_shown_to_a_guest() {
    if !kvm_or_skip() {
        return;
    }
    let good = host_with_store();
    let host = copy_store(&good);
    let (segment, offset, name) = frame_of(&host, DATA_GPA);
    flip_byte(&segment, offset + 20);
    let store = host.store_path().display().to_string();
    let place = format!("{name} is damaged at offset {offset}");
    refused(&host, &["verify", &store], &[&place, "expected", "found"]);
    let json = host.frazil(&["verify", &store, "--json"]);
    let report = json.expect_code(1).json();
    assert_eq!(report["ok"], false);
    let damage = report["damage"].as_array().expect("a list");
    assert!(text(&damage[0], "error").contains(&place), "{report}");
    assert!(damage.iter().any(|damage| damage["snapshot"].is_string()), "{report}");
    resume_fails(&host, &name);
    // What is not damaged can still be read.
    assert_eq!(host.ok(&["log", &store, "--json"]).json_lines().len(), 2);
}

#[test]
fn damage_that_the_vmm_itself_meets_ends_the_vm_too() {
    if !kvm_or_skip() {
        return;
    }
    let good = host_with_store();
    let host = copy_store(&good);
    let (segment, offset, name) = frame_of(&host, CONTROL_GPA);
    flip_byte(&segment, offset + 20);
    resume_fails(&host, &name);
}

#[test]
fn a_truncated_segment_is_named() {
    if !kvm_or_skip() {
        return;
    }
    let good = host_with_store();
    let host = copy_store(&good);
    let (segment, offset, name) = frame_of(&host, DATA_GPA);
    let file = std::fs::File::options().write(true).open(segment).expect("the segment");
    file.set_len(offset + 10).expect("it can be cut");
    let store = host.store_path().display().to_string();
    refused(&host, &["verify", &store], &[&name, "truncated"]);
    refused(&host, &["resume", &host.at("latest")], &[&name, "truncated"]);
    let host = copy_store(&good);
    std::fs::remove_file(host.store_path().join(&name)).expect("the segment");
    refused(
        &host,
        &[
            "verify",
            &store.replace(
                &good.store_path().display().to_string(),
                &host.store_path().display().to_string(),
            ),
        ],
        &[&name],
    );
    refused(&host, &["resume", &host.at("latest")], &[&name, "no such file"]);
}

#[test]
fn an_altered_journal_is_never_believed() {
    if !kvm_or_skip() {
        return;
    }
    let good = host_with_store();
    let store_of = |host: &Host| host.store_path().display().to_string();
    // A flip in the header or in the first of two records is damage.
    for offset in [20, 64 + 30, 64 + 100] {
        let host = copy_store(&good);
        flip_byte(&host.store_path().join("journal"), offset);
        for args in [&["log", &store_of(&host)][..], &["resume", &host.at("latest")]] {
            refused(&host, args, &["journal is damaged at offset", "expected", "found"]);
        }
    }
    // A flip in the newest record looks like an append cut short; `verify` reports it.
    let host = copy_store(&good);
    let journal = host.store_path().join("journal");
    let len = std::fs::metadata(&journal).expect("the journal").len();
    flip_byte(&journal, len - 5);
    assert_eq!(host.ok(&["log", &store_of(&host), "--json"]).json_lines().len(), 1);
    refused(&host, &["verify", &store_of(&host)], &["journal is damaged at offset", "cut short"]);
    // The journal is missing.
    std::fs::remove_file(&journal).expect("the journal");
    refused(&host, &["log", &store_of(&host)], &["journal"]);
}

#[test]
fn a_store_of_a_later_format_is_refused() {
    let host = Host::new();
    drop(Store::open_or_create(&host.store_path(), StoreOptions::default()));
    let path = host.store_path().display().to_string();
    assert_eq!(host.ok(&["log", &path, "--json"]).stdout, "");
    refused(&host, &["resume", &host.at("latest")], &["no snapshot `latest`", "no snapshots yet"]);
    flip_byte(&host.store_path().join("FRAZIL"), 40);
    refused(&host, &["log", &path], &["FRAZIL"]);
}

#[test]
fn vms_that_are_not_there() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    for command in ["checkpoint", "pause", "continue", "stop"] {
        refused(
            &host,
            &[command, "nobody"],
            &["no running VM `nobody`", "none is running", "frazil ps"],
        );
    }
    let socket = host.path("no.sock").display().to_string();
    refused(&host, &["pause", &socket], &["no running VM", "No such file"]);
    let vm = host.run("taken", WORKLOAD, SMALL);
    let pid = number(&vm.started, "pid").to_string();
    let again = ["run", "--workload", WORKLOAD, "--name", "taken", "--memory", "48MiB"];
    refused(
        &host,
        &again,
        &["a VM `taken` is already running", &pid, "--name", "frazil stop taken"],
    );
    refused(&host, &["pause", "other"], &["no running VM `other`", "running: taken"]);
    // Without a store there is nothing to checkpoint to.
    let bare = host.start(&["run", "--workload", WORKLOAD, "--name", "bare", "--memory", "48MiB"]);
    refused(&host, &["checkpoint", "bare"], &["has no store", "--store DIR"]);
    drop(bare);
    // A killed VM leaves its socket and its file behind; the next command that looks removes them.
    let socket = vm.socket.clone();
    vm.kill_9();
    assert!(socket.exists());
    refused(&host, &["stop", "taken"], &["no running VM `taken`"]);
    assert!(host.ok(&["ps", "--json"]).stdout.is_empty());
    assert_eq!(std::fs::read_dir(host.path("run")).expect("it is there").count(), 0);
    let vm = host.run("taken", WORKLOAD, SMALL);
    let _stopped = host.ok(&["stop", "taken"]);
    vm.expect_ended("stopped");
}
