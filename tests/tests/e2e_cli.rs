//! The `frazil` command on real KVM, used only through its command line and control socket, as by a
//! script.

use frazil_tests::vm_harness::{
    Host, RunningVm, kvm_or_skip, number, text, uffd_or_skip, wait_for,
};
use rustix::process::Signal;
use serde_json::Value;

const QUIET: &str = "touch=8MiB,rate=400,report=0";

/// Checks the JSON of a checkpoint, and returns the snapshot's id.
#[track_caller]
fn check_report(report: &Value, vm: &str, parent: Option<&str>) -> String {
    assert_eq!(text(report, "vm"), vm);
    assert_eq!(report["parent"].as_str(), parent, "{report}");
    assert_eq!(text(report, "id").len(), 64);
    let field = |name| number(report, name);
    assert!(field("dirty_pages") > 0 && field("pause_us") > 0 && field("time_unix_ms") > 0);
    assert_eq!(field("stored_bytes"), field("frame_bytes") + field("meta_bytes"), "{report}");
    let written = field("precopied_pages") + field("commit_pages");
    assert!(written >= field("dirty_pages"), "{report}");
    let kept = field("staged_pages") + field("cut_pages") + field("protected_pages");
    assert!(kept >= field("commit_pages"), "{report}");
    assert!(field("duration_us") >= field("pause_us") && field("commit_us") >= field("sync_us"));
    let rounds = report["rounds"].as_array().expect("rounds");
    let precopied: u64 = rounds.iter().map(|round| number(round, "pages")).sum();
    assert_eq!(precopied, field("precopied_pages"), "{report}");
    text(report, "id").to_owned()
}

#[test]
fn a_session_from_run_to_suspend_and_resume() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let vm = host.run("day", "touch=16MiB,rate=400,seed=5", &["--memory", "64MiB"]);
    assert_eq!(vm.started["resumed_from"], Value::Null);
    vm.wait_populated();
    let status = host.json(&["ps"]);
    assert_eq!((text(&status, "name"), text(&status, "state")), ("day", "running"));
    assert_eq!(number(&status["machine"], "ram_bytes"), 64 << 20);
    assert_eq!(number(&status, "pid"), number(&vm.started, "pid"));

    let first = host.json(&["checkpoint", "day", "--message", "the first", "--tag", "gold"]);
    let first_id = check_report(&first, "day", None);
    assert!(number(&first, "dirty_pages") >= 4096, "all of a new guest is new: {first}");
    let second = host.json(&["checkpoint", "day"]);
    let second_id = check_report(&second, "day", Some(&first_id));
    assert!(number(&second, "dirty_pages") < 2000, "only what changed: {second}");
    let third = host.json(&["checkpoint", "day", "--message", "third"]);
    let third_id = check_report(&third, "day", Some(&second_id));
    assert_eq!(text(&host.json(&["ps"]), "head"), third_id);

    pause_and_continue(&host, &vm);
    look_at_the_store(&host, [&first_id, &second_id, &third_id], [&first, &second, &third]);

    let last = host.json(&["checkpoint", "day", "--exit"]);
    let last_id = check_report(&last, "day", Some(&third_id));
    assert!(number(&last, "pause_us") >= number(&last, "commit_us"), "it waits for that: {last}");
    vm.expect_ended("suspended");
    assert!(host.ok(&["ps", "--json"]).stdout.is_empty());
    resume_goes_on(&host, &last_id);
}

fn pause_and_continue(host: &Host, vm: &RunningVm) {
    assert_eq!(host.json(&["pause", "day"])["state"], "paused");
    let before = vm.get("/workload");
    std::thread::sleep(std::time::Duration::from_millis(150));
    assert_eq!(vm.get("/workload"), before, "a paused guest must stand still");
    assert_eq!(host.json(&["ps"])["state"], "paused");
    assert_eq!(host.json(&["continue", "day"])["state"], "running");
    vm.wait_beyond(number(&before, "turns"));
    assert_eq!(host.json(&["ps"])["state"], "running");
}

fn look_at_the_store(host: &Host, ids: [&str; 3], reports: [&Value; 3]) {
    let store = host.store_path().display().to_string();
    let log = host.ok(&["log", &store, "--json"]).json_lines();
    let found: Vec<&str> = log.iter().map(|line| text(line, "id")).collect();
    assert_eq!(found, [ids[2], ids[1], ids[0]], "newest first");
    let parents: Vec<Option<&str>> = log.iter().map(|line| line["parent"].as_str()).collect();
    assert_eq!(parents, [Some(ids[1]), Some(ids[0]), None]);
    assert_eq!(log[2]["tags"], serde_json::json!(["gold"]));
    for (line, report) in log.iter().rev().zip(reports) {
        assert_eq!(line["stored_bytes"], report["stored_bytes"], "{line}");
        let stats = &line["stats"];
        assert!(number(stats, "meta_bytes") < number(report, "meta_bytes"), "without its own");
        let write_us = number(stats, "write_us");
        assert!(write_us > 0 && write_us <= number(report, "duration_us"), "{line}");
    }
    assert_eq!((text(&log[2], "message"), text(&log[0], "message")), ("the first", "third"));
    assert_eq!(host.ok(&["log", &store, "--json", "-n", "1"]).json_lines().len(), 1);

    for (reference, id) in
        [("latest", ids[2]), ("", ids[2]), ("latest~1", ids[1]), ("latest~2", ids[0])]
            .into_iter()
            .chain([("gold", ids[0]), (&ids[1][..12], ids[1]), (ids[0], ids[0])])
    {
        let shown = host.json(&["show", &host.at(reference)]);
        assert_eq!(text(&shown, "id"), id, "{reference}");
    }
    let shown = host.json(&["show", &host.at("gold")]);
    assert_eq!(shown["regions"][0]["pages"], 64 * 256);
    let chunks: Vec<&str> =
        shown["state"].as_array().expect("state").iter().map(|chunk| text(chunk, "name")).collect();
    for name in ["machine", "vcpu0", "serial0"] {
        assert!(chunks.contains(&name), "{name} in {chunks:?}");
    }
    let report = host.json(&["verify", &store]);
    assert_eq!((&report["ok"], &report["snapshots"]), (&Value::Bool(true), &3.into()), "{report}");
    assert_eq!(number(&report, "memory_pages_checked"), 4096);
    assert_eq!(host.verify_all(), 3 * 4096);
}

fn resume_goes_on(host: &Host, last_id: &str) {
    let mut vm = host.resume("night", "latest", &["--paused"]);
    assert_eq!(text(&vm.started, "resumed_from"), last_id);
    // The guest is as it was at the cut: the counters are the snapshot's, not those of a new boot.
    let at_cut = vm.turns();
    assert!(at_cut >= 4096, "{at_cut}");
    assert_eq!(vm.turns(), at_cut, "--paused leaves it standing");
    assert_eq!(host.json(&["continue", "night"])["state"], "running");
    vm.wait_beyond(at_cut);
    vm.event("first_progress");
    assert_eq!(number(&vm.verify_workload(), "pages_checked"), 4096);
    let report = host.json(&["checkpoint", "night"]);
    check_report(&report, "night", Some(last_id));
    assert!(number(&report, "dirty_pages") < 2000, "incremental: {report}");
    assert_eq!(host.json(&["stop", "night"])["state"], "ended");
    vm.expect_ended("stopped");
    assert_eq!(host.verify_all(), 5 * 4096);
}

/// Runs a VM, suspends it, resumes it lazily without filling, suspends it again, and verifies
/// everything.
fn round_trip(content: &str, pattern: &str, cpus: &str) {
    let host = Host::new();
    let spec = format!(
        "touch=4MiB,rate=2000,report=0,seed=7,hot_share=0.05,content={content},pattern={pattern}"
    );
    let vm = host.run("trip", &spec, &["--memory", "48MiB", "--cpus", cpus]);
    vm.wait_populated();
    let what = format!("{content} {pattern} {cpus}");
    let before = vm.turns();
    let _first = host.json(&["checkpoint", "trip"]);
    vm.wait_beyond(before);
    let _last = host.json(&["checkpoint", "trip", "--exit"]);
    vm.expect_ended("suspended");
    let vm = host.resume("trip", "latest", &["--no-fill"]);
    let resumed = vm.turns();
    assert!(resumed >= before, "{what}: {resumed} after {before}");
    vm.wait_beyond(resumed);
    // Most pages have not been touched since the resume, and must be in the snapshot all the same.
    let report = host.json(&["checkpoint", "trip"]);
    assert!(number(&report, "dirty_pages") > 0, "{what}: {report}");
    vm.verify_workload();
    let _last = host.json(&["checkpoint", "trip", "--exit"]);
    vm.expect_ended("suspended");
    assert_eq!(host.verify_all(), 4 * 1024, "{what}");
}

fn every_content_and_pattern(cpus: &str) {
    if !kvm_or_skip() {
        return;
    }
    for content in ["zero", "text", "random", "edit"] {
        for pattern in ["seq", "uniform", "hot"] {
            round_trip(content, pattern, cpus);
        }
    }
}

#[test]
fn every_content_and_pattern_on_one_vcpu() {
    every_content_and_pattern("1");
}

#[test]
fn every_content_and_pattern_on_two_vcpus() {
    every_content_and_pattern("2");
}

#[test]
fn a_chain_of_lazy_resumes_keeps_what_nobody_touched() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let vm = host.run("chain", "touch=32MiB,rate=100,report=0,seed=3", &["--memory", "64MiB"]);
    vm.wait_populated();
    let mut parent = text(&host.json(&["checkpoint", "chain", "--exit"]), "id").to_owned();
    vm.expect_ended("suspended");
    for depth in 0..5 {
        let vm = host.resume("chain", "latest", &["--no-fill"]);
        assert_eq!(text(&vm.started, "resumed_from"), parent);
        vm.wait_beyond(vm.turns() + 3);
        let pager = vm.get("/vm")["pager"].clone();
        // Otherwise the test would prove nothing: many of the 8192 pages must still be missing.
        assert!(number(&pager, "filled_pages") < 6000, "depth {depth}: {pager}");
        assert_eq!(pager["complete"], false);
        let report = host.json(&["checkpoint", "chain", "--exit"]);
        parent = check_report(&report, "chain", Some(&parent));
        assert!(number(&report, "dirty_pages") < 1000, "depth {depth}: {report}");
        vm.expect_ended("suspended");
    }
    assert_eq!(host.verify_all(), 6 * 8192);
}

#[test]
fn an_older_snapshot_resumed_makes_a_branch() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let vm = host.run("trunk", QUIET, &["--memory", "64MiB"]);
    vm.wait_populated();
    let base = text(&host.json(&["checkpoint", "trunk", "--tag", "base"]), "id").to_owned();
    vm.wait_beyond(vm.turns() + 50);
    let tip = text(&host.json(&["checkpoint", "trunk"]), "id").to_owned();
    let tip_turns = vm.turns();
    // Two live VMs that descend from one snapshot, taking turns with one store.
    let branch = host.resume("branch", "base", &["--eager"]);
    assert_eq!(branch.get("/vm")["pager"], Value::Null, "--eager needs no pager");
    let on_branch = host.json(&["checkpoint", "branch", "--tag", "side"]);
    check_report(&on_branch, "branch", Some(&base));
    check_report(&host.json(&["checkpoint", "trunk"]), "trunk", Some(&tip));
    vm.wait_beyond(tip_turns);
    branch.verify_workload();
    assert_eq!(host.ok(&["ps", "--json"]).json_lines().len(), 2);
    assert_eq!(text(&host.json(&["show", &host.at("side~1")]), "id"), base);
    for (vm, name) in [(vm, "trunk"), (branch, "branch")] {
        let _stopped = host.ok(&["stop", name]);
        vm.expect_ended("stopped");
    }
    assert_eq!(host.verify_all(), 4 * 2048);
}

#[test]
fn signals_and_stop_end_a_vm_cleanly() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let vm = host.run("ends", QUIET, &["--memory", "48MiB"]);
        vm.signal(signal);
        vm.expect_ended("stopped");
        assert!(host.ok(&["ps", "--json"]).stdout.is_empty(), "{signal:?}");
    }
    // Also while the VM is paused, and while it is paging in.
    let vm = host.run("ends", QUIET, &["--memory", "48MiB"]);
    vm.wait_populated();
    let _taken = host.json(&["checkpoint", "ends", "--exit"]);
    vm.expect_ended("suspended");
    for more in [&["--paused"][..], &["--no-fill"], &[]] {
        let vm = host.resume("ends", "latest", more);
        vm.signal(Signal::TERM);
        vm.expect_ended("stopped");
    }
}

#[test]
fn a_paused_vm_is_checkpointed_and_stays_paused() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let vm = host.run("still", QUIET, &["--memory", "64MiB", "--cpus", "2"]);
    vm.wait_populated();
    let _paused = host.ok(&["pause", "still"]);
    let before = vm.get("/workload");
    let first = text(&host.json(&["checkpoint", "still"]), "id").to_owned();
    let second = host.json(&["checkpoint", "still"]);
    assert_eq!(second["parent"].as_str(), Some(first.as_str()));
    assert_eq!(number(&second, "dirty_pages"), 0, "nothing ran in between: {second}");
    assert_eq!(vm.get("/workload"), before);
    assert_eq!(host.json(&["ps"])["state"], "paused");
    let found = vm.get("/checkpoints/statistics");
    assert_eq!(number(&found["totals"], "taken"), 2);
    assert_eq!(number(&found["pause_us"], "count"), 0, "it stood still anyway: {found}");
    let _last = host.json(&["checkpoint", "still", "--exit"]);
    vm.expect_ended("suspended");
    let vm = host.resume("still", "latest", &["--paused", "--no-fill"]);
    assert_eq!(vm.turns(), number(&before, "turns"));
    let _untouched = host.json(&["checkpoint", "still", "--exit"]);
    vm.expect_ended("suspended");
    assert_eq!(host.verify_all(), 4 * 2048);
}

/// The answer to the request that ends a VM must arrive, however quickly the process exits.
#[test]
fn stop_and_suspend_are_answered_every_time() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    for round in 0..12 {
        let vm = host.run("brief", "touch=1MiB,rate=100,report=0", &["--memory", "48MiB"]);
        let command: &[&str] =
            if round % 2 == 0 { &["stop", "brief"] } else { &["checkpoint", "brief", "--exit"] };
        let finished = host.frazil(command);
        assert_eq!(finished.status.code(), Some(0), "round {round}: {finished:#?}");
        vm.expect_ended(if round % 2 == 0 { "stopped" } else { "suspended" });
    }
}

#[test]
fn periodic_checkpoints_come_at_their_rate_and_are_printed() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let mut vm = host.run("clock", QUIET, &["--memory", "48MiB", "--checkpoint-every", "100ms"]);
    let mut parent: Option<String> = None;
    for _ in 0..6 {
        let event = vm.event("checkpoint");
        parent = Some(check_report(&event, "clock", parent.as_deref()));
    }
    let totals = wait_for("totals", || Some(vm.get("/vm")["checkpoints"].clone()));
    assert!(number(&totals, "taken") >= 6 && number(&totals, "failed") == 0, "{totals}");
    let _stopped = host.ok(&["stop", "clock"]);
    vm.expect_ended("stopped");
    host.verify_all();
}

/// A VM's reports of skipped checkpoints add up to its own count, give the reason, and name the VM:
/// with `--clones`, many VMs share one output.
#[test]
fn what_is_left_out_is_told_in_full_and_nothing_fails_at_the_end() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    for round in 0..4 {
        let mut vm = host.run("hasty", QUIET, &["--memory", "48MiB", "--checkpoint-every", "1ms"]);
        assert_eq!(vm.event("checkpoints_skipped")["vm"], "hasty");
        (0..round).for_each(|_| drop(vm.event("checkpoint")));
        let _stopped = host.ok(&["stop", "hasty"]);
        let finished = vm.wait_end();
        let lines = finished.expect_code(0).json_lines();
        let ended = lines.last().expect("a last line");
        let totals = &ended["checkpoints"];
        assert_eq!((text(ended, "event"), number(totals, "failed")), ("ended", 0), "{ended}");
        let told: Vec<&Value> =
            lines.iter().filter(|line| line["event"] == "checkpoints_skipped").collect();
        assert!(told.iter().all(|line| line["because"] == "not_done"), "{told:?}");
        let told: u64 = told.iter().map(|line| number(line, "count")).sum();
        assert_eq!(told, number(totals, "skipped"), "{ended}");
    }
    // The same in plain text, whose lines must name the VM as well.
    let store = host.store_path().display().to_string();
    let args = ["--memory", "48MiB", "--serial", "null", "--checkpoint-every", "1ms"];
    let run = ["run", "--workload", QUIET, "--store", &store, "--name", "plain"];
    let vm = RunningVm::spawn(host.command(&[&run[..], &args].concat()));
    wait_for("a line", || vm.stderr().contains("skipped because").then_some(()));
    let _stopped = host.ok(&["stop", "plain"]);
    let finished = vm.wait_end();
    finished.expect_code(0).expect_says(&["skipped because another was still being taken"]);
    let lines: Vec<&str> = finished.stderr.lines().collect();
    assert!(lines.iter().all(|line| line.contains("VM `plain`")), "{lines:#?}");
    assert!(finished.stderr.contains("checkpoints (0 failed"), "{lines:#?}");
}

#[test]
fn text_in_a_pipe_has_no_escape_codes_and_says_the_same() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let store = host.store_path().display().to_string();
    let vm = host.run("plain", QUIET, &["--memory", "48MiB", "--serial", "null"]);
    vm.wait_populated();
    let base = host.at("latest");
    let outputs = [
        host.ok(&["checkpoint", "plain", "--message", "hello"]),
        host.ok(&["ps"]),
        host.ok(&["log", &store]),
        host.ok(&["show", &base]),
        host.ok(&["verify", &store]),
        host.ok(&["pause", "plain"]),
        host.ok(&["continue", "plain"]),
        host.ok(&["stop", "plain"]),
    ];
    for (output, says) in outputs
        .iter()
        .zip(["pages", "plain", "hello", "snapshot", "all good", "paused", "running", "ended"])
    {
        assert!(output.stdout.contains(says), "expected `{says}`: {output:#?}");
        let all = format!("{}{}", output.stdout, output.stderr);
        let odd = all.chars().find(|c| c.is_control() && *c != '\n');
        assert_eq!(odd, None, "{all:?}");
    }
    vm.expect_ended("stopped");
}

#[test]
fn what_is_too_much_to_be_copied_aside_is_written_in_rounds() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let args = ["--memory", "64MiB", "--staging", "1MiB"];
    let vm = host.run("rounds", "touch=16MiB,rate=400,report=0", &args);
    vm.wait_populated();
    let first = host.json(&["checkpoint", "rounds"]);
    check_report(&first, "rounds", None);
    let rounds = first["rounds"].as_array().expect("rounds");
    assert!(!rounds.is_empty() && number(&first, "precopied_pages") >= 4096, "{first}");
    for round in rounds {
        assert!(number(round, "pages") > 0 && number(round, "us") > 0, "{first}");
        assert!(number(round, "stored_bytes") <= number(&first, "frame_bytes"), "{first}");
    }
    // What changed since the first checkpoint fits.
    let second = host.json(&["checkpoint", "rounds"]);
    assert_eq!(second["rounds"], serde_json::json!([]), "{second}");
    let _last = host.json(&["checkpoint", "rounds", "--exit"]);
    vm.expect_ended("suspended");
    assert_eq!(host.verify_all(), 3 * 4096);
}

#[test]
fn times_that_no_clock_can_add_are_wrong_usage() {
    let host = Host::new();
    let run = ["run", "--workload", "touch=1MiB"];
    let (ages, even_more) = ("300000000000years", "500000000000years");
    let all: [Vec<&str>; 4] = [
        [&run[..], &["--checkpoint-every", even_more]].concat(),
        [&run[..], &["--checkpoint-every", "1s", "--checkpoint-quiet", ages]].concat(),
        vec!["top", "vm", "--interval", even_more],
        vec!["resume", "st@latest", "--record-working-set", even_more],
    ];
    for args in all {
        host.frazil(&args).expect_code(2).expect_says(&["at most 100years"]);
    }
}

#[test]
fn paging_that_was_settled_by_another_clone_is_said_to_be_ignored() {
    if !kvm_or_skip() || !uffd_or_skip() {
        return;
    }
    let host = Host::new();
    let vm = host.run("first", QUIET, &["--memory", "48MiB"]);
    vm.wait_populated();
    let _taken = host.json(&["checkpoint", "first", "--exit"]);
    vm.expect_ended("suspended");
    let clone = |name, more: &[&str]| {
        let vm = host.resume(name, "latest", &[&["--clones", "1"][..], more].concat());
        let said = vm.stderr();
        (vm, said)
    };
    let (_one, said) = clone("one", &["--no-fill"]);
    assert!(!said.contains("ignored"), "it is the first: {said}");
    let (_two, said) = clone("two", &[]);
    assert!(!said.contains("ignored"), "it wants nothing else: {said}");
    let args = ["--fill-rate", "1MiB", "--working-set", "off"];
    let (three, _) = clone("three", &args);
    let ignored = "ignored: --fill-rate, --working-set:";
    wait_for("the word of it", || three.stderr().contains(ignored).then_some(()));
}

#[test]
fn log_lines_in_a_pipe_have_no_escape_codes() {
    if !kvm_or_skip() || !uffd_or_skip() {
        return;
    }
    let host = Host::new();
    let vm = host.run("logs", QUIET, &["--memory", "48MiB"]);
    vm.wait_populated();
    let _taken = host.json(&["checkpoint", "logs", "--exit"]);
    vm.expect_ended("suspended");
    let vm = host.resume("logs", "latest", &["--pager", "external", "--no-fill"]);
    let pager = number(&vm.get("/vm"), "pager_process");
    let pager = rustix::process::Pid::from_raw(pager as i32).expect("a process");
    rustix::process::kill_process(pager, Signal::KILL).expect("it is there");
    let said = wait_for("a warning", || Some(vm.stderr()).filter(|said| said.contains("has died")));
    assert!(said.contains("WARN") && !said.contains('\u{1b}'), "{said:?}");
    let _stopped = host.ok(&["stop", "logs"]);
    vm.expect_ended("stopped");
}

#[test]
fn ram_above_the_hole_is_saved_and_comes_back() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    // A few random pages out of all memory, some of which lie above 4 GiB.
    let spec = "rate=3000,pattern=uniform,populate=no,report=0,seed=11";
    let vm = host.run("big", spec, &["--memory", "5GiB", "--cpus", "2"]);
    wait_for("the guest's start", || {
        vm.http("GET", "/workload", "").ok().filter(|(status, _)| *status == 200)
    });
    vm.wait_beyond(1500);
    let first = host.json(&["checkpoint", "big", "--exit"]);
    assert_eq!(number(&first, "ram_bytes"), 5 << 30);
    vm.expect_ended("suspended");
    let pages_above = |reference: &str| {
        let store = host.store();
        let id = store.resolve(reference).expect("it is there").id;
        let region = store.snapshot(id).and_then(|found| found.region("ram")).expect("RAM");
        assert_eq!(region.pages(), 6 << 18, "5 GiB and the hole");
        let runs = region.runs(4 << 18, 2 << 18).expect("runs");
        assert!(region.runs(3 << 18, 1 << 18).expect("runs").is_empty(), "the hole has no pages");
        runs.iter().map(|run| run.count).sum::<u64>()
    };
    let above = pages_above("latest");
    assert!(above > 200, "two of five pages lie above the hole: {above}");
    let vm = host.resume("big", "latest", &["--no-fill"]);
    vm.wait_beyond(vm.turns() + 500);
    let second = host.json(&["checkpoint", "big", "--exit"]);
    assert!(number(&second, "dirty_pages") < 100_000, "{second}");
    vm.expect_ended("suspended");
    assert!(pages_above("latest") > above);
    assert_eq!(host.verify_all(), 2 * ((5 << 18) - 4096));
}
