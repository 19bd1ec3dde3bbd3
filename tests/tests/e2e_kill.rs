//! SIGKILL at random moments, a hundred times over, each VM resumed from what the previous one left
//! behind.
//!
//! `FRAZIL_KILL_SEED` repeats a run's choices, `FRAZIL_KILL_ROUNDS` sets the number of kills.

use std::time::Duration;

use frazil_snapstore::{
    SEGMENT_FOLDER, SnapshotId, Store, StoreOptions, VerifyProgress, segment_name,
};
use frazil_tests::format_reader::read_journal;
use frazil_tests::memory_copy::workload_of;
use frazil_tests::rng::Rng;
use frazil_tests::vm_harness::{
    Host, RunningVm, expect_sound, kvm_or_skip, number, text, wait_for,
};

const WORKLOAD: &str = "touch=16MiB,rate=20000,pattern=uniform,content=text,report=0,seed=9";
const EVERY: &[&str] = &["--checkpoint-every", "100ms"];

fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect("a number"))
}

fn seed() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    from_env("FRAZIL_KILL_SEED", since.expect("after 1970").as_nanos() as u64)
}

/// True if the killed writer was in the middle of a checkpoint: the segments hold more than the
/// journal's newest record covers, or the journal ends in a partial record.
fn was_writing(host: &Host) -> bool {
    let journal = std::fs::read(host.store_path().join("journal")).expect("the journal");
    let state = read_journal(&journal);
    let (segment, end) = state.tail.unwrap_or((0, 0));
    let len = |number| {
        std::fs::metadata(host.store_path().join(segment_name(number))).map_or(0, |file| file.len())
    };
    state.len < journal.len() || len(segment) > end || len(segment + 1) > 0
}

/// Checks that the store left by the killed VM is sound, the new snapshots are whole, and the
/// newest one's memory is what the guest wrote. Returns the newest snapshot and the number of
/// snapshots.
fn check_store(host: &Host, known: usize, round: u64) -> (SnapshotId, usize) {
    let store = Store::open(&host.store_path(), StoreOptions::default())
        .unwrap_or_else(|error| panic!("round {round}: {error}"));
    let torn = store.torn_journal_bytes();
    let infos = store.snapshots();
    assert!(infos.len() >= known, "round {round}: published snapshots are gone");
    let fresh: Vec<_> = infos[known..].iter().map(|info| info.id).collect();
    let report =
        frazil_snapstore::verify(&store, &fresh, &VerifyProgress::default()).expect("a walk");
    // A record cut short by the kill is reported, but loses nothing.
    let damage: Vec<_> = report.damage.iter().filter(|damage| damage.snapshot.is_some()).collect();
    assert!(damage.is_empty(), "round {round}: {damage:#?}");
    assert_eq!(report.damage.len() - damage.len(), usize::from(torn > 0), "{report:#?}");
    let latest = *infos.last().expect("a snapshot");
    let snapshot = store.snapshot(latest.id).expect("the newest");
    let checked = frazil_vmm::verify_snapshot(&snapshot);
    let checked = checked.unwrap_or_else(|error| panic!("round {round}: {error}"));
    assert_eq!(checked.expect("the workload").pages_checked, 4096);
    (latest.id, infos.len())
}

fn turns_in(host: &Host, id: SnapshotId) -> u64 {
    let snapshot = host.store().snapshot(id).expect("it is published");
    workload_of(&snapshot).expect("the workload runs").turns()
}

fn run_and_kill(vm: RunningVm, rng: &mut Rng) {
    std::thread::sleep(Duration::from_millis(50 + rng.below(550)));
    vm.kill_9();
}

#[test]
fn a_hundred_kills_lose_nothing_that_was_published() {
    if !kvm_or_skip() {
        return;
    }
    let (seed, rounds) = (seed(), from_env("FRAZIL_KILL_ROUNDS", 100));
    println!("FRAZIL_KILL_SEED={seed} repeats this run");
    let mut rng = Rng::new(seed);
    let host = Host::new();
    let mut first = host.run("victim", WORKLOAD, &[&["--memory", "48MiB"], EVERY].concat());
    first.wait_populated();
    // There has to be something to resume.
    let _taken = first.event("checkpoint");
    run_and_kill(first, &mut rng);
    let (mut hits, mut known) = (0, 0);
    for round in 0..rounds {
        hits += u64::from(was_writing(&host));
        let (id, count) = check_store(&host, known, round);
        known = count;
        let saved_turns = turns_in(&host, id);
        let mut args = EVERY.to_vec();
        match rng.below(4) {
            0 => args.push("--no-fill"),
            1 => args.push("--eager"),
            _ => {}
        }
        let vm = host.resume("victim", "latest", &args);
        assert_eq!(text(&vm.started, "resumed_from"), id.to_string(), "round {round}");
        let turns = vm.turns();
        assert!(turns >= saved_turns, "round {round}: {turns} after {saved_turns}");
        run_and_kill(vm, &mut rng);
    }
    println!("{hits} of {rounds} kills hit a checkpoint; {known} snapshots");
    // About a third visibly do: what was still in memory leaves no trace.
    assert!(hits * 8 >= rounds, "too few kills hit a checkpoint: {hits} of {rounds}");
    assert!(known as u64 * 2 > rounds, "too few checkpoints: {known}");
    nothing_is_left_over(&host);
}

/// Checks that one more checkpoint clears away what the last killed writer left. Since that may be
/// little, adds what a writer killed in the middle of a large checkpoint would leave.
fn nothing_is_left_over(host: &Host) {
    let journal = std::fs::read(host.store_path().join("journal")).expect("the journal");
    let (segment, _) = read_journal(&journal).tail.expect("a snapshot");
    let path = |number| host.store_path().join(segment_name(number));
    let newest = std::fs::File::options().write(true).open(path(segment)).expect("it");
    newest.set_len(newest.metadata().expect("it").len() + (64 << 20)).expect("room");
    std::fs::copy(path(1), path(segment + 1)).expect("room");
    let vm = host.resume("last", "latest", &[]);
    vm.wait_beyond(vm.turns());
    wait_for("the pager to be done", || (vm.get("/vm")["pager"]["complete"] == true).then_some(()));
    vm.verify_workload();
    let report = host.json(&["checkpoint", "last", "--exit"]);
    assert!(number(&report, "dirty_pages") > 0, "{report}");
    vm.expect_ended("suspended");
    let journal = std::fs::read(host.store_path().join("journal")).expect("the journal");
    let state = read_journal(&journal);
    assert_eq!(state.len, journal.len());
    let (segment, end) = state.tail.expect("a snapshot");
    let folder = host.store_path().join(SEGMENT_FOLDER);
    let count = std::fs::read_dir(folder).expect("segments").count() as u64;
    assert_eq!(count, u64::from(segment), "segments are numbered from 1 without gaps");
    let len = std::fs::metadata(host.store_path().join(segment_name(segment))).expect("it").len();
    assert_eq!(len, end, "nothing behind what is published");
    let store = host.store();
    expect_sound(&store);
    assert_eq!(store.torn_journal_bytes(), 0);
}
