//! Scheduled checkpoints, and what a running VM does besides taking them: it keeps its snapshots to
//! a policy, skips checkpoints that the store is too slow for, and cancels one on request.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use frazil_snapstore::retention::Policy;
use frazil_snapstore::{
    Description, Page, PageSet, PageSource, SEGMENT_FOLDER, SnapshotId, Store, StoreOptions,
    unix_ms,
};
use frazil_tests::faulty_storage::{Faults, FaultyStorage};
use frazil_tests::vm_harness::{
    Host, RunningVm, expect_sound, flip_byte, kvm_or_skip, number, text, wait_for, wait_populated,
};
use frazil_vmm::devices::serial::SerialOutput;
use frazil_vmm::keeper::{Keeper, Kept};
use frazil_vmm::scheduler::{Every, Schedule, ScheduleEvent, Scheduler, SkipReason};
use frazil_vmm::{
    CheckpointReport, CheckpointRequest, Ended, Guest, HostConfig, MachineConfig, ProgressReport,
    Vm, verify_snapshot,
};
use serde_json::{Value, json};
use tempfile::TempDir;

const SMALL: &[&str] = &["--memory", "48MiB"];
/// Random pages do not compress, so forgotten snapshots are worth pruning.
const WORKLOAD: &str = "touch=4MiB,rate=2000,content=random,report=0,seed=5";
const DATA_PAGES: u64 = 1024;

/// Returns the store's snapshots, newest first, as `frazil log --json` prints them.
fn log(host: &Host) -> Vec<Value> {
    host.ok(&["log", &host.store_path().display().to_string(), "--json"]).json_lines()
}

fn keep(vm: &RunningVm) -> Value {
    vm.get("/vm")["keep"].clone()
}

#[test]
fn a_running_vm_keeps_its_snapshots_to_the_rules() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let other = host.run("other", WORKLOAD, SMALL);
    other.wait_populated();
    assert_eq!(keep(&other), Value::Null, "no rules");
    for _ in 0..4 {
        let _of_other = host.json(&["checkpoint", "other"]);
    }
    let _stopped = host.ok(&["stop", "other"]);
    other.expect_ended("stopped");

    let rules = ["--checkpoint-every", "100ms", "--keep-last", "3", "--keep-yearly", "1"];
    let mut vm = host.run("kept", WORKLOAD, &[SMALL, &rules].concat());
    vm.wait_populated();
    let gold = host.json(&["checkpoint", "kept", "--tag", "gold"]);
    let told = vm.event("kept");
    assert!(number(&told, "forgotten") > 0 && number(&told, "left") >= 3, "{told}");
    assert_eq!(text(&told, "vm"), "kept");
    // Space comes back while the VM runs.
    let kept = wait_for("a prune", || {
        let kept = keep(&vm);
        (number(&kept, "pruned_bytes") > 0).then_some(kept)
    });
    assert!(number(&kept, "prunes") > 0 && number(&kept, "failed") == 0, "{kept}");
    let api = vm.get("/openapi.json");
    let described = api["components"]["schemas"]["KeepTotals"]["properties"].as_object();
    assert!(described.expect("figures").keys().eq(kept.as_object().expect("figures").keys()));
    let (_, metrics) = vm.exchange("GET", "/metrics", "").expect("metrics");
    for name in ["forgotten_snapshots_total", "pruned_bytes_total", "failures_total 0"] {
        assert!(metrics.contains(&format!("\nfrazil_keep_{name}")), "{metrics}");
    }
    vm.verify_workload();
    let last = host.json(&["checkpoint", "kept", "--exit"]);
    vm.expect_ended("suspended");

    // Only this VM's snapshots that the rules keep are left; the other VM's are untouched.
    let log = log(&host);
    let of = |name: &str| -> Vec<&Value> {
        log.iter().filter(|snapshot| snapshot["vm"] == name).collect()
    };
    assert_eq!(of("other").len(), 4);
    let ours = of("kept");
    assert_eq!(ours.len(), 4, "the last three and the tagged one: {ours:#?}");
    assert_eq!(ours[0]["id"], last["id"]);
    assert_eq!((&ours[3]["id"], &ours[3]["tags"]), (&gold["id"], &json!(["gold"])));
    assert_eq!(host.verify_all(), 8 * DATA_PAGES);
    for (reference, parent) in [("latest", &last), ("gold", &gold)] {
        let vm = host.resume("again", reference, &["--keep-last", "1"]);
        vm.wait_beyond(vm.turns());
        vm.verify_workload();
        let report = host.json(&["checkpoint", "again", "--exit"]);
        assert_eq!(report["parent"], parent["id"]);
        vm.expect_ended("suspended");
        assert_eq!(text(&self::log(&host)[0], "vm"), "again");
    }
    let again = self::log(&host).iter().filter(|snapshot| snapshot["vm"] == "again").count();
    assert_eq!(again, 1, "the last of that name");
    expect_sound(&host.store());
}

#[test]
fn continuous_checkpoints_follow_each_other_and_keep_nobody_out() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let args =
        ["--checkpoint-every", "continuous", "--checkpoint-quiet", "5ms", "--keep-last", "5"];
    let mut vm = host.run("steady", WORKLOAD, &[SMALL, &args].concat());
    let mut parent = Value::Null;
    for _ in 0..10 {
        let event = vm.event("checkpoint");
        assert_eq!(event["parent"], parent);
        parent = event["id"].clone();
    }
    for _ in 0..3 {
        let asked = host.json(&["checkpoint", "steady", "-m", "asked for"]);
        assert!(asked["id"].is_string(), "{asked}");
    }
    let totals = || vm.get("/vm")["checkpoints"].clone();
    assert_eq!((number(&totals(), "skipped"), number(&totals(), "failed")), (0, 0));
    // A guest that stands still is saved once, however long; one more may be under way already.
    let mut at_rest = 0;
    for _ in 0..2 {
        let _paused = host.ok(&["pause", "steady"]);
        let before = number(&totals(), "taken");
        std::thread::sleep(Duration::from_millis(200));
        at_rest = number(&totals(), "taken");
        assert!(at_rest <= before + 2, "{before} to {at_rest}");
        let _goes_on = host.ok(&["continue", "steady"]);
    }
    wait_for("more", || (number(&totals(), "taken") > at_rest + 3).then_some(()));
    vm.verify_workload();
    let kept = keep(&vm);
    assert_eq!(number(&kept, "failed"), 0, "{kept}");
    let _last = host.json(&["checkpoint", "steady", "--exit"]);
    vm.expect_ended("suspended");
    assert_eq!(log(&host).len(), 5, "also with checkpoints that never stop");
    host.verify_all();
}

#[test]
fn a_quiet_moment_is_waited_for_and_the_beat_is_kept() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    for (name, rate) in [("calm", "50"), ("busy", "max")] {
        let workload = format!("touch=4MiB,rate={rate},report=0");
        let args = ["--checkpoint-every", "200ms", "--checkpoint-quiet", "20ms"];
        let mut vm = host.run(name, &workload, &[SMALL, &args].concat());
        for _ in 0..3 {
            vm.event("checkpoint");
        }
        vm.verify_workload();
        let _last = host.json(&["checkpoint", name, "--exit"]);
        vm.expect_ended("suspended");
    }
    host.verify_all();
    host.frazil(&["run", "--workload", "", "--checkpoint-quiet", "1s"])
        .expect_code(2)
        .expect_says(&["--checkpoint-every"]);
}

/// A VM in this process, whose store is on a medium that can be made to fail or hang.
struct World {
    vm: Arc<Vm>,
    store: Arc<Store>,
    faults: Arc<Faults>,
    folder: TempDir,
}

impl World {
    fn new(name: &str) -> Self {
        Self::with(name, WORKLOAD)
    }

    fn with(name: &str, workload: &str) -> Self {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let (storage, faults) = FaultyStorage::new(&folder.path().join("store"));
        let options = StoreOptions::default();
        let store = Store::open_or_create_storage(Arc::new(storage), options).expect("a store");
        Self { vm: boot(name, workload, &store), store, faults, folder }
    }

    fn take(&self) -> CheckpointReport {
        self.vm.checkpoint(&CheckpointRequest::default()).expect("a checkpoint")
    }

    /// Waits until a checkpoint is being taken.
    fn wait_taking(&self) {
        wait_for("a checkpoint being taken", || self.vm.checkpoint_progress());
    }

    /// Checks that the guest runs, live memory and snapshot `last` are right, and the store sound.
    #[track_caller]
    fn expect_good(&self, last: SnapshotId) {
        let loops = || -> u64 {
            let view = self.vm.workload().expect("counters");
            view.vcpus.iter().map(|cpu| cpu.control.loops).sum()
        };
        let before = loops();
        wait_for("the guest to go on", || (loops() > before).then_some(()));
        let live = self.vm.verify_workload().expect("it runs").expect("live memory is right");
        assert_eq!(live.pages_checked, DATA_PAGES);
        let saved = verify_snapshot(&self.store.snapshot(last).expect("it is published"));
        assert!(saved.expect("saved memory is right").is_some());
        expect_sound(&self.store);
    }
}

fn tell_nobody(_: &ScheduleEvent<'_>) {}

/// Runs the workload until it has written each of its pages.
fn boot(name: &str, workload: &str, store: &Arc<Store>) -> Arc<Vm> {
    let config = MachineConfig::new(
        name,
        48 << 20,
        1,
        Guest::Workload(workload.parse().expect("a workload")),
    );
    let host = HostConfig::new(SerialOutput::Null, Some(Arc::clone(store)));
    let vm = Vm::boot(&config, host).expect("it boots");
    vm.go().expect("it runs");
    wait_populated(&vm);
    Arc::new(vm)
}

#[test]
fn a_store_that_hangs_costs_moments_and_nothing_else() {
    if !kvm_or_skip() {
        return;
    }
    let world = World::new("late");
    let told = Arc::new(Mutex::new(0));
    let start = || {
        let told = Arc::clone(&told);
        let tell = move |event: &ScheduleEvent<'_>| {
            if let ScheduleEvent::Skipped { count, because } = event {
                assert_eq!(*because, SkipReason::NotDone);
                *told.lock().expect("no panic") += count;
            }
        };
        let every = Every::Interval(Duration::from_millis(5));
        let schedule = Schedule { every, quiet: None };
        Scheduler::start(Arc::clone(&world.vm), schedule, Arc::new(tell)).expect("it starts")
    };
    let totals = || world.vm.checkpoint_totals();

    // The scheduler's own checkpoint hangs: those due meanwhile are counted, not made up for.
    let scheduler = start();
    wait_for("a checkpoint", || (totals().taken > 0).then_some(()));
    world.faults.hang();
    world.wait_taking();
    let before = totals();
    // The skips show while the hang lasts, which is when the user should look.
    let during =
        wait_for("skips", || Some(totals().skipped).filter(|now| *now > before.skipped + 20));
    let since_ms = |progress: ProgressReport| (progress.since_ms >= 100).then_some(());
    wait_for("its age", || world.vm.checkpoint_progress().and_then(since_ms));
    world.faults.release();
    wait_for("more", || (totals().taken > before.taken + 2).then_some(()));
    assert!(totals().skipped >= during, "none of them is taken back");
    drop(scheduler);
    assert_eq!(*told.lock().expect("no panic"), totals().skipped, "all is said in the end");

    // A requested checkpoint hangs: scheduled ones are skipped, one by one.
    world.faults.hang();
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| world.take());
        world.wait_taking();
        let before = totals();
        let scheduler = start();
        wait_for("skips", || (totals().skipped > before.skipped + 3).then_some(()));
        assert_eq!(totals().taken, before.taken, "never two at once");
        world.faults.release();
        asked.join().expect("it is published in the end");
        wait_for("more", || (totals().taken > before.taken + 1).then_some(()));
        drop(scheduler);
    });
    assert_eq!(totals().failed, 0);
    world.expect_good(world.take().id);
}

#[test]
fn a_guest_that_always_writes_is_waited_for_and_what_that_costs_is_told() {
    if !kvm_or_skip() {
        return;
    }
    let world = World::with("busy", "touch=4MiB,rate=max,report=0");
    let told = Arc::new(Mutex::new([0_u64; 3]));
    let telling = Arc::clone(&told);
    let tell = move |event: &ScheduleEvent<'_>| {
        if let ScheduleEvent::Skipped { count, because } = event {
            telling.lock().expect("no panic")[*because as usize] += count;
        }
    };
    let every = Every::Interval(Duration::from_millis(5));
    let schedule = Schedule { every, quiet: Some(Duration::from_secs(10)) };
    let totals = || world.vm.checkpoint_totals();
    let scheduler =
        Scheduler::start(Arc::clone(&world.vm), schedule, Arc::new(tell)).expect("it starts");
    // On a busy machine the guest may not get to run for a moment, which is quiet too.
    let taken = wait_for("a while without one", || {
        let before = totals();
        std::thread::sleep(Duration::from_millis(300));
        let after = totals();
        // Skips are counted while the scheduler waits for a quiet moment.
        (after.taken == before.taken && after.skipped > before.skipped + 30).then_some(after.taken)
    });
    // A pause is a quiet moment.
    world.vm.pause().expect("it runs");
    wait_for("one", || (totals().taken > taken).then_some(()));
    world.vm.go().expect("it goes on");
    drop(scheduler);
    let [not_done, quiet, failed] = *told.lock().expect("no panic");
    assert!(quiet > 30 && failed == 0, "{quiet} for quiet, {not_done} not done");
    assert_eq!(not_done + quiet, totals().skipped, "all is said in the end");
    let id = world.take().id;
    let saved = verify_snapshot(&world.store.snapshot(id).expect("it is published"));
    assert!(saved.expect("saved memory is right").is_some());
}

#[test]
fn checkpoints_that_fail_are_not_tried_all_the_time_and_their_pauses_count() {
    if !kvm_or_skip() {
        return;
    }
    let world = World::new("full");
    let first = world.take();
    // Not even the trees of the next checkpoint fit.
    world.faults.limit(1);
    let every = Every::Interval(Duration::from_millis(5));
    let schedule = Schedule { every, quiet: None };
    let scheduler = Scheduler::start(Arc::clone(&world.vm), schedule, Arc::new(tell_nobody))
        .expect("it starts");
    let found = wait_for("failures", || {
        let found = world.vm.checkpoint_statistics();
        (found.totals.failed >= 3).then_some(found)
    });
    // The back-offs of 100 and 200 ms, in which 60 checkpoints were due.
    assert!(found.totals.skipped >= 50, "{:?}", found.totals);
    assert_eq!(found.totals.taken, 1);
    assert_eq!(found.pause_us.count, 1 + found.totals.failed, "the guest stood still each time");
    assert!(found.totals.pause_us_max >= found.pause_us.min && found.pause_us.min > 0);
    assert_eq!(found.last.expect("the first").id, first.id);
    world.faults.clear();
    wait_for("more", || (world.vm.checkpoint_totals().taken > 3).then_some(()));
    drop(scheduler);
    world.expect_good(world.take().id);
}

#[test]
fn a_checkpoint_that_the_end_overtakes_has_not_failed() {
    if !kvm_or_skip() {
        return;
    }
    let world = World::new("over");
    let last = world.take().id;
    world.vm.stop();
    // As a checkpoint whose turn comes just then.
    let refused = world.vm.checkpoint(&CheckpointRequest::default()).expect_err("it has ended");
    assert!(refused.to_string().contains("has ended"), "{refused}");
    let totals = world.vm.checkpoint_totals();
    assert_eq!((totals.taken, totals.cancelled, totals.failed), (1, 1, 0));
    assert_eq!(world.vm.head(), Some(last));
}

#[test]
fn a_scheduler_that_cannot_go_on_says_so() {
    if !kvm_or_skip() {
        return;
    }
    let world = World::new("unlucky");
    let start = |every, quiet, tell| {
        Scheduler::start(Arc::clone(&world.vm), Schedule { every, quiet }, tell)
    };
    // Intervals and waits that are out of range.
    let (ms, ages) = (Duration::from_millis(1), Duration::MAX);
    for (every, quiet) in [
        (Every::Interval(ages), None),
        (Every::Interval(Duration::ZERO), None),
        (Every::Interval(ms), Some(ages)),
        (Every::Continuous, Some(ages)),
    ] {
        let refused = start(every, quiet, Arc::new(tell_nobody)).expect_err("it is too long");
        assert!(refused.to_string().contains("at most a hundred years"), "{refused}");
    }
    let died = Arc::new(AtomicBool::new(false));
    let telling = Arc::clone(&died);
    let tell = move |event: &ScheduleEvent<'_>| match event {
        ScheduleEvent::Checkpoint(_) => panic!("on purpose"),
        ScheduleEvent::Died => telling.store(true, Ordering::SeqCst),
        ScheduleEvent::Skipped { .. } => {}
    };
    let scheduler = start(Every::Interval(ms), None, Arc::new(tell)).expect("it starts");
    wait_for("the word of it", || died.load(Ordering::SeqCst).then_some(()));
    drop(scheduler);
    world.expect_good(world.take().id);
}

#[test]
fn a_cancelled_checkpoint_loses_nothing() {
    if !kvm_or_skip() {
        return;
    }
    let world = World::new("undecided");
    assert!(!world.vm.cancel_checkpoint(), "there is none");
    for round in 0..2 {
        // First all of memory, then what changed.
        world.faults.hang();
        std::thread::scope(|scope| {
            let taken = scope.spawn(|| world.vm.checkpoint(&CheckpointRequest::default()));
            world.wait_taking();
            let cancelled = scope.spawn(|| world.vm.cancel_checkpoint());
            // Depending on where it is, the checkpoint may notice before the medium answers.
            wait_for("the cancel", || {
                let noticed = |progress: ProgressReport| progress.cancelled;
                world.vm.checkpoint_progress().is_none_or(noticed).then_some(())
            });
            world.faults.release();
            assert!(cancelled.join().expect("an answer"));
            let error = taken.join().expect("no panic").expect_err("it was cancelled");
            assert!(error.is_cancelled() && error.to_string().contains("nothing was published"));
        });
        let totals = world.vm.checkpoint_totals();
        assert_eq!((totals.cancelled, totals.failed, totals.taken), (round + 1, 0, round));
        assert!(!world.vm.cancel_checkpoint(), "it is over");
        assert_eq!(world.store.snapshots().len() as u64, round);
        let report = world.take();
        assert_eq!(report.parent.is_some(), round > 0);
        if round == 0 {
            assert!(report.stats.dirty_pages >= DATA_PAGES, "{report:?}");
        }
        world.expect_good(report.id);
    }
}

#[test]
fn a_vm_being_suspended_neither_stops_nor_goes_on_but_can_change_its_mind() {
    if !kvm_or_skip() {
        return;
    }
    let world = World::new("leaving");
    let head = world.take().id;
    let suspend = || {
        let request = CheckpointRequest { exit: true, ..CheckpointRequest::default() };
        world.vm.checkpoint(&request)
    };
    for gives_up in [true, false] {
        world.faults.hang();
        std::thread::scope(|scope| {
            let suspended = scope.spawn(suspend);
            // Until the cut the guest runs, and `go` does nothing; from then on it is refused.
            let refused = wait_for("the cut", || world.vm.go().err());
            for refused in [refused, world.vm.pause().expect_err("it stands still already")] {
                assert!(refused.to_string().contains("is being suspended: wait"), "{refused}");
            }
            assert_eq!(world.vm.head(), Some(head), "until the next is published");
            // All of this counts as the guest's pause.
            std::thread::sleep(Duration::from_millis(50));
            let cancelled = gives_up.then(|| scope.spawn(|| world.vm.cancel_checkpoint()));
            if gives_up {
                wait_for("the cancel", || {
                    let noticed = |progress: ProgressReport| progress.cancelled;
                    world.vm.checkpoint_progress().is_none_or(noticed).then_some(())
                });
            }
            world.faults.release();
            let suspended = suspended.join().expect("no panic");
            if let Some(cancelled) = cancelled {
                assert!(cancelled.join().expect("an answer"));
                assert!(suspended.expect_err("given up").is_cancelled());
                assert!(!world.vm.is_paused() && world.vm.ended().is_none(), "it goes on");
                let pauses = world.vm.checkpoint_statistics().pause_us;
                assert!(pauses.count == 2 && pauses.max >= 50_000, "{pauses:?}");
            } else {
                let report = suspended.expect("published");
                assert!(report.stats.pause_us >= 50_000, "{report:?}");
                assert_eq!((report.parent, world.vm.head()), (Some(head), Some(report.id)));
                let ended = world.vm.wait_ended(Duration::from_secs(10));
                assert_eq!(ended, Some(Ended::Suspended));
                let saved = verify_snapshot(&world.store.snapshot(report.id).expect("published"));
                assert!(saved.expect("saved memory is right").is_some());
                expect_sound(&world.store);
            }
        });
    }
}

#[test]
fn cancelling_from_the_command_line() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    // Slow compression leaves time to cancel.
    let workload = "touch=24MiB,rate=max,content=text,report=0";
    let mut vm = host.run("vm", workload, &["--memory", "48MiB", "--compression", "19"]);
    vm.wait_populated();
    assert_eq!(
        host.json(&["checkpoint", "vm", "--cancel"]),
        json!({"vm": "vm", "cancelled": false})
    );
    let finished = wait_for("one that is caught in time", || {
        std::thread::scope(|scope| {
            let taken = scope.spawn(|| host.frazil(&["checkpoint", "vm"]));
            wait_for("it to begin", || {
                let begun = !vm.get("/checkpoints/progress").is_null() || taken.is_finished();
                begun.then_some(())
            });
            let (status, answer) = vm.http("PUT", "/checkpoints/cancel", "").expect("an answer");
            assert_eq!(status, 200, "{answer}");
            let finished = taken.join().expect("no panic");
            (answer["cancelled"] == true).then_some(finished)
        })
    });
    finished.expect_code(1).expect_says(&["cancelled", "nothing was published"]);
    assert_eq!(vm.event("checkpoint_cancelled")["vm"], "vm");
    assert_eq!(number(&vm.get("/vm")["checkpoints"], "cancelled"), 1);
    vm.verify_workload();
    host.frazil(&["checkpoint", "vm", "--cancel", "--exit"])
        .expect_code(2)
        .expect_says(&["cannot be used with"]);
    let _last = host.json(&["checkpoint", "vm", "--exit"]);
    vm.expect_ended("suspended");
    host.verify_all();
    let vm = host.resume("vm", "latest", &["--serial", "null"]);
    vm.wait_beyond(vm.turns());
    vm.verify_workload();
}

/// Pages full of one byte.
struct Filled(u8);

impl PageSource for Filled {
    fn read_page(&self, _page: u64, buf: &mut Page) -> std::io::Result<()> {
        buf.fill(self.0);
        Ok(())
    }
}

/// Takes a snapshot of another VM, and damages its manifest.
fn damaged_snapshot(world: &World) -> SnapshotId {
    let mut pages = PageSet::new(1);
    pages.insert(0);
    let mut transaction = world.store.begin(None).expect("nobody writes");
    let region = transaction.region("disk", 1).expect("a region");
    transaction.write_pages(region, &pages, &Filled(7)).expect("written");
    let description =
        Description { name: "other".into(), time_unix_ms: unix_ms(), ..Description::default() };
    let id = transaction.commit(description).expect("committed").id;
    let segment = world.folder.path().join("store").join(SEGMENT_FOLDER);
    let segment = std::fs::read_dir(segment).expect("segments").next().expect("one").expect("it");
    // The manifest is the last thing a transaction writes.
    let len = segment.metadata().expect("its length").len();
    flip_byte(&segment.path(), len - 8);
    assert!(world.store.snapshot(id).is_err(), "it is damaged");
    id
}

#[test]
fn a_prune_that_fails_is_told_and_stops_neither_forgetting_nor_checkpoints() {
    if !kvm_or_skip() {
        return;
    }
    let world = World::new("kept");
    let damaged = damaged_snapshot(&world);
    let told = Arc::new(Mutex::new(Vec::new()));
    let telling = Arc::clone(&told);
    let tell = move |kept: &frazil_vmm::Result<Kept>| {
        if let Err(error) = kept {
            telling.lock().expect("no panic").push(error.to_string());
        }
    };
    let policy: Policy = "last=2".parse().expect("rules");
    let keeper = Keeper::start(Arc::clone(&world.vm), policy, Box::new(tell)).expect("it starts");
    let kept = || world.vm.keep_totals().expect("there are rules");
    wait_for("a prune that fails", || {
        let _more = world.take();
        (kept().failed > 0).then_some(())
    });
    let last: Vec<SnapshotId> = [world.take().id, world.take().id].into();
    drop(keeper);
    assert!(kept().forgotten > 10 && kept().prunes == 0, "{:?}", kept());
    let told = told.lock().expect("no panic");
    assert!(told.len() as u64 == kept().failed, "{told:?}");
    // What becomes of a snapshot that cannot be read is up to the user.
    let left: BTreeSet<SnapshotId> = world.store.snapshots().iter().map(|info| info.id).collect();
    assert_eq!(left, last.iter().copied().chain([damaged]).collect());
    assert_eq!(world.vm.checkpoint_totals().failed, 0);
    world.store.forget(&[damaged]).expect("it can be forgotten");
    world.expect_good(last[1]);
}
