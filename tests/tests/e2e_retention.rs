//! Forgets, prunes and compares snapshots through the command line.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Arc;

use frazil_snapstore::{
    Description, PAGE_SIZE, Page, PageSet, PageSource, SnapshotId, Store, StoreError, StoreOptions,
    unix_ms,
};
use frazil_tests::vm_harness::{Finished, Host, RunningVm, kvm_or_skip, number, text, wait_for};
use serde_json::{Value, json};

const SMALL: &[&str] = &["--memory", "48MiB"];
/// Random pages do not compress, so forgotten snapshots are worth pruning.
const WORKLOAD: &str = "touch=8MiB,rate=3000,content=random,report=0,seed=9";
const PAGES: u64 = 2048;
const DAY_MS: u64 = 24 * 3600 * 1000;

fn log_ids(host: &Host) -> Vec<String> {
    let store = host.store_path().display().to_string();
    let log = host.ok(&["log", &store, "--json"]).json_lines();
    log.iter().map(|line| text(line, "id").to_owned()).collect()
}

/// Returns every file of the store, with its size in bytes.
fn files(host: &Host) -> BTreeMap<String, u64> {
    let mut out = BTreeMap::new();
    let mut folders = vec![host.store_path()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a store's folder") {
            let entry = entry.expect("an entry");
            let meta = entry.metadata().expect("it is there");
            if meta.is_dir() {
                folders.push(entry.path());
            } else {
                out.insert(entry.path().display().to_string(), meta.len());
            }
        }
    }
    out
}

/// Splits the output of `forget --json` into snapshots (id, true if kept, reasons) and totals.
fn verdicts(finished: &Finished) -> (Vec<(String, bool, Value)>, Value) {
    let mut lines = finished.json_lines();
    let totals = lines.pop().expect("totals");
    let verdict = |line: &Value| {
        let keep = line["keep"].as_bool().expect("a verdict");
        (text(line, "id").to_owned(), keep, line["reasons"].clone())
    };
    (lines.iter().map(verdict).collect(), totals)
}

/// Runs `args`, which must exit with status `code` and print every one of `says` on standard error.
#[track_caller]
fn refused(host: &Host, code: i32, args: &[&str], says: &[&str]) {
    let finished = host.frazil(args);
    finished.expect_code(code).expect_says(says);
    assert!(finished.stdout.is_empty() && !finished.stderr.contains("panicked"), "{finished:#?}");
}

/// Takes a checkpoint after a good part of memory has been written since the previous one.
fn checkpoint(host: &Host, vm: &RunningVm, more: &[&str]) -> String {
    vm.wait_beyond(vm.turns() + 700);
    let report = host.json(&[&["checkpoint", &vm.name], more].concat());
    text(&report, "id").to_owned()
}

#[test]
fn forget_by_rules_prune_and_go_on_from_what_was_kept() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let store = host.store_path().display().to_string();
    let vm = host.run("vm", WORKLOAD, SMALL);
    vm.wait_populated();
    let mut ids: Vec<String> = Vec::new();
    for tag in [None, Some("gold"), None, None, None, None] {
        let more: Vec<&str> = tag.iter().flat_map(|tag| ["--tag", tag]).collect();
        ids.push(checkpoint(&host, &vm, &more));
    }
    ids.push(checkpoint(&host, &vm, &["--exit"]));
    vm.expect_ended("suspended");

    // A dry run changes nothing.
    let before = files(&host);
    let rules = ["forget", &store, "--keep-last", "2", "--keep-yearly", "1", "--json"];
    let (said, totals) = verdicts(&host.ok(&[&rules[..], &["--dry-run", "--prune"]].concat()));
    assert_eq!(totals, json!({"forgotten": 4, "left": 3, "dry_run": true, "prune": null}));
    assert_eq!((files(&host), log_ids(&host).len()), (before, 7));
    // The real run does what the dry run said.
    let (done, totals) = verdicts(&host.ok(&rules));
    assert_eq!(totals, json!({"forgotten": 4, "left": 3, "dry_run": false, "prune": null}));
    assert_eq!(said, done);
    let expected: Vec<(String, bool, Value)> = [
        (6, true, json!(["last", "yearly"])),
        (5, true, json!(["last"])),
        (4, false, json!([])),
        (3, false, json!([])),
        (2, false, json!([])),
        (1, true, json!(["tagged"])),
        (0, false, json!([])),
    ]
    .map(|(index, keep, reasons): (usize, bool, Value)| (ids[index].clone(), keep, reasons))
    .into();
    assert_eq!(done, expected);
    let kept = [ids[6].clone(), ids[5].clone(), ids[1].clone()];
    assert_eq!(log_ids(&host), kept);
    // The parent of a snapshot is its nearest kept ancestor.
    assert_eq!(text(&host.json(&["show", &host.at("latest~2")]), "id"), ids[1]);
    refused(&host, 1, &["show", &host.at(&ids[3])], &["has that id", "frazil log"]);
    // A second run has nothing left to do.
    assert_eq!(verdicts(&host.ok(&rules)).1["forgotten"], 0);

    prune_gives_space_back(&host, &store);
    assert_eq!(log_ids(&host), kept);
    assert_eq!(host.verify_all(), 3 * PAGES);
    for (reference, parent) in [("gold", &ids[1]), (&ids[5], &ids[5])] {
        let vm = host.resume("again", reference, &["--no-fill"]);
        assert_eq!(text(&vm.started, "resumed_from"), parent);
        vm.wait_beyond(vm.turns());
        vm.verify_workload();
        let report = host.json(&["checkpoint", "again", "--exit"]);
        assert_eq!(report["parent"], json!(parent));
        vm.expect_ended("suspended");
    }
    assert_eq!(host.verify_all(), 5 * PAGES);
}

fn prune_gives_space_back(host: &Host, store: &str) {
    let before = files(host);
    let planned = host.json(&["prune", store, "--dry-run"]);
    assert_eq!((&planned["dry_run"], number(&planned, "snapshots")), (&json!(true), 3));
    assert_eq!(files(host), before, "--dry-run changes nothing");
    let kept_as_it_is = host.json(&["prune", store, "--max-rewrite", "0"]);
    assert_eq!(number(&kept_as_it_is, "bytes_rewritten"), 0, "{kept_as_it_is}");
    let pruned = host.json(&["prune", store, "--max-unused", "0%"]);
    let field = |name| number(&pruned, name);
    assert_eq!(field("bytes_live") + field("bytes_unused"), field("bytes_before"), "{pruned}");
    // Three checkpoints of about 700 random pages are gone.
    assert!(field("bytes_after") + (1 << 20) < field("bytes_before"), "{pruned}");
    let total = |files: &BTreeMap<String, u64>| files.values().sum::<u64>();
    let freed = total(&before) - total(&files(host));
    assert!(freed > 1 << 20, "{freed} bytes of files are gone: {pruned}");
    let again = host.json(&["prune", store]);
    assert_eq!(number(&again, "bytes_after"), field("bytes_after"), "nothing to do: {again}");
}

#[test]
fn what_a_running_vm_goes_on_from_can_be_forgotten_and_pruned() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let store = host.store_path().display().to_string();
    let vm = host.run("head", WORKLOAD, SMALL);
    vm.wait_populated();
    let first = checkpoint(&host, &vm, &[]);
    let _gone = host.ok(&["forget", &host.at("latest"), "--prune"]);
    assert!(log_ids(&host).is_empty(), "{first} was forgotten");
    let second = checkpoint(&host, &vm, &["--exit"]);
    vm.expect_ended("suspended");
    assert_eq!(host.verify_all(), PAGES);
    // A resumed VM reads from its snapshot although that was forgotten.
    let vm = host.resume("reader", "latest", &["--no-fill"]);
    let gone = host.ok(&["forget", &host.at(&second)]);
    assert!(gone.stdout.contains("1 snapshots forgotten, 0 left"), "{gone:#?}");
    let pruned = host.json(&["prune", &store, "--max-unused", "0%"]);
    assert_eq!((number(&pruned, "snapshots"), number(&pruned, "pinned")), (1, 1), "{pruned}");
    vm.verify_workload();
    let third = checkpoint(&host, &vm, &["--exit"]);
    vm.expect_ended("suspended");
    assert_eq!(log_ids(&host), [third]);
    let _pruned = host.json(&["prune", &store, "--max-unused", "0%"]);
    assert_eq!(host.verify_all(), PAGES);
}

/// Returns every page that differs, found by reading both snapshots in full.
fn pages_that_differ(store: &Arc<Store>, a: &str, b: &str) -> BTreeSet<u64> {
    let region = |id: &str| {
        let id: SnapshotId = id.parse().expect("an id");
        store.snapshot(id).and_then(|snapshot| snapshot.region("ram")).expect("RAM")
    };
    let (a, b) = (region(a), region(b));
    assert_eq!(a.pages(), b.pages());
    let (mut left, mut right): (Page, Page) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    let differs = |page: &u64| {
        a.read_page(*page, &mut left).expect("a good page");
        b.read_page(*page, &mut right).expect("a good page");
        left != right
    };
    (0..a.pages()).filter(differs).collect()
}

/// Returns the pages that `diff --json` lists, which must be in order and without duplicates.
#[track_caller]
fn pages_listed(region: &Value) -> BTreeSet<u64> {
    let ranges = region["ranges"].as_array().expect("ranges");
    let pages: Vec<u64> = ranges
        .iter()
        .flat_map(|range| {
            let (first, count) = (range[0].as_u64().expect("first"), range[1].as_u64());
            first..first + count.expect("count")
        })
        .collect();
    assert!(pages.windows(2).all(|pair| pair[0] < pair[1]), "{region}");
    let ends = ranges.windows(2).all(|pair| {
        pair[0][0].as_u64().unwrap() + pair[0][1].as_u64().unwrap() < pair[1][0].as_u64().unwrap()
    });
    assert!(ends, "ranges that touch are one: {region}");
    assert_eq!(number(region, "changed_pages"), pages.len() as u64);
    assert_eq!(number(region, "changed_bytes"), (pages.len() * PAGE_SIZE) as u64);
    pages.into_iter().collect()
}

#[test]
fn diff_lists_exactly_what_changed() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    // `edit` changes little of a page, so pages are stored as deltas.
    let spec = "touch=4MiB,rate=500,content=edit,pattern=uniform,report=0,seed=4";
    let vm = host.run("vm", spec, SMALL);
    vm.wait_populated();
    let take = |more: &[&str]| {
        vm.wait_beyond(vm.turns() + 60);
        text(&host.json(&[&["checkpoint", "vm"], more].concat()), "id").to_owned()
    };
    let ids = [take(&["--tag", "one"]), take(&[]), take(&["--message", "the last"])];
    let _paused = host.ok(&["pause", "vm"]);
    let still = [take_now(&host), take_now(&host)];
    let _stopped = host.ok(&["stop", "vm"]);
    vm.expect_ended("stopped");

    let store = host.store();
    for (a, b) in [(0, 1), (1, 2), (0, 2), (2, 0)] {
        let (a, b) = (&ids[a], &ids[b]);
        let expected = pages_that_differ(&store, a, b);
        assert!(expected.len() > 10 && expected.len() < 1100, "{}", expected.len());
        let exact = host.json(&["diff", &host.at(a), b, "--exact"]);
        assert_eq!((text(&exact, "a"), text(&exact, "b")), (&**a, &**b));
        let ram = &exact["regions"][0];
        assert_eq!(text(ram, "name"), "ram");
        assert_eq!((number(ram, "pages_a"), number(ram, "pages_b")), (48 * 256, 48 * 256));
        assert_eq!(pages_listed(ram), expected);
        let quick = host.json(&["diff", &host.at(a), &host.at(b)]);
        let quick = &quick["regions"][0];
        assert!(pages_listed(quick).is_superset(&expected), "{quick}");
        assert!(number(quick, "stored_bytes") > 0, "{quick}");
        state_is_as_shown(&host, a, b, &exact);
    }
    // A guest that stood still.
    let same = host.json(&["diff", &host.at(&still[0]), &still[1], "--exact"]);
    assert_eq!(same["regions"][0]["ranges"], json!([]), "{same}");
    let itself = host.json(&["diff", &host.at("latest"), "latest"]);
    assert_eq!((&itself["regions"][0]["changed_pages"], &itself["state"]), (&json!(0), &json!([])));
    diff_for_people(&host, &ids, &pages_that_differ(&store, &ids[0], &ids[2]));
}

fn take_now(host: &Host) -> String {
    text(&host.json(&["checkpoint", "vm"]), "id").to_owned()
}

/// Compares the state changes that `diff` lists with what `show` prints for both snapshots.
fn state_is_as_shown(host: &Host, a: &str, b: &str, diff: &Value) {
    let bodies = |id: &str| -> BTreeMap<String, Value> {
        let shown = host.json(&["show", &host.at(id)]);
        let chunks = shown["state"].as_array().expect("state");
        chunks.iter().map(|chunk| (text(chunk, "name").to_owned(), chunk["body"].clone())).collect()
    };
    let (old, new) = (bodies(a), bodies(b));
    let expected: BTreeSet<&String> = old.keys().filter(|name| old[*name] != new[*name]).collect();
    let state = diff["state"].as_array().expect("state");
    let listed: BTreeSet<String> =
        state.iter().map(|chunk| text(chunk, "name").to_owned()).collect();
    assert!(listed.iter().eq(expected), "{diff}");
    let vcpu = state.iter().find(|chunk| chunk["name"] == "vcpu0").expect("it ran in between");
    assert_eq!(vcpu["change"], "changed");
    let fields = vcpu["fields"].as_array().expect("fields");
    for (register, old) in old["vcpu0"]["regs"].as_object().expect("registers") {
        let new = &new["vcpu0"]["regs"][register];
        let path = format!("regs.{register}");
        let field = fields.iter().find(|field| field["path"] == *path);
        let expected = (old != new).then(|| json!({"path": path, "old": old, "new": new}));
        assert_eq!(field, expected.as_ref(), "{path}");
    }
    // The time stamp counter, by its MSR number.
    assert!(fields.iter().any(|field| field["path"] == "msrs[0x10].value"), "{vcpu}");
}

fn diff_for_people(host: &Host, ids: &[String; 3], pages: &BTreeSet<u64>) {
    let all = host.ok(&["diff", &host.at("one"), &ids[2], "--exact", "--ranges", "all"]).stdout;
    for part in ["[one]", "the last", "vcpu0: changed", "msrs[0x10]", &ids[0][..12]] {
        assert!(all.contains(part), "expected `{part}`: {all}");
    }
    let address = |text: &str| {
        text.strip_prefix("0x").and_then(|digits| u64::from_str_radix(digits, 16).ok())
    };
    let listed: BTreeSet<u64> = all
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (from, to) = (address(words.next()?)?, address(words.next()?)?);
            Some(from / 4096..(to + 1) / 4096)
        })
        .flatten()
        .collect();
    assert_eq!(listed, *pages, "{all}");
    let few = host.ok(&["diff", &host.at("one"), &ids[2], "--ranges", "3"]).stdout;
    assert!(few.contains("ranges more: --ranges all prints them"), "{few}");
    assert_eq!(few.lines().filter(|line| line.starts_with("  0x")).count(), 3, "{few}");
}

/// Pages full of one byte.
struct Filled(u8);

impl PageSource for Filled {
    fn read_page(&self, _page: u64, buf: &mut Page) -> std::io::Result<()> {
        buf.fill(self.0);
        Ok(())
    }
}

/// Makes a store without a machine, from (VM, age in days, tag), oldest first. Returns the ids.
fn store_of(host: &Host, snapshots: &[(&str, u64, Option<&str>)]) -> Vec<String> {
    let path = host.store_path();
    let store = Store::open_or_create(&path, StoreOptions::default()).expect("a store");
    let now = unix_ms();
    let mut parent: Option<SnapshotId> = None;
    let commit = |(index, (vm, days, tag)): (usize, &(&str, u64, Option<&str>))| {
        let mut pages = PageSet::new(1);
        pages.insert(0);
        // Children of other tests hold our lock for a moment, between fork and exec.
        let mut transaction = wait_for("the writer lock", || match store.begin(parent) {
            Err(StoreError::Busy { .. }) => None,
            begun => Some(begun.expect("a good store")),
        });
        let region = transaction.region("disk", 1).expect("a region");
        transaction.write_pages(region, &pages, &Filled(index as u8 + 1)).expect("written");
        let description = Description {
            name: (*vm).to_owned(),
            time_unix_ms: now - days * DAY_MS,
            tag: tag.map(str::to_owned),
            ..Description::default()
        };
        let id = transaction.commit(description).expect("committed").id;
        parent = Some(id);
        id.to_string()
    };
    snapshots.iter().enumerate().map(commit).collect()
}

#[test]
fn rules_judge_every_vm_apart() {
    let host = Host::new();
    let store = host.store_path().display().to_string();
    let list =
        [("a", 40, None), ("b", 30, None), ("a", 20, Some("t")), ("a", 1, None), ("b", 0, None)];
    let ids = store_of(&host, &list);
    let forgotten = |args: &[&str]| -> Vec<usize> {
        let finished = host.ok(&[&["forget", "--store", &store, "-n", "--json"], args].concat());
        let (list, totals) = verdicts(&finished);
        let gone: Vec<usize> = list
            .iter()
            .filter(|(_, keep, _)| !keep)
            .map(|(id, ..)| ids.iter().position(|known| known == id).expect("one of ours"))
            .collect();
        assert_eq!(number(&totals, "forgotten"), gone.len() as u64);
        assert_eq!(number(&totals, "left"), (ids.len() - gone.len()) as u64);
        gone
    };
    assert_eq!(forgotten(&["--keep-last", "1"]), [1, 0]);
    assert_eq!(forgotten(&["--keep-last", "1", "--name", "b"]), [1]);
    assert_eq!(forgotten(&["--keep-daily", "2"]), [0]);
    assert_eq!(forgotten(&["--keep-within", "5w"]), [0]);
    assert_eq!(forgotten(&["--keep-within", "4w", "--keep-daily", "3"]), [0_usize; 0]);
    assert_eq!(forgotten(&["latest~4", "latest"]), [4, 0]);
    // Plain text, with the store in the environment, and as an argument.
    let mut command = host.command(&["forget", "--keep-last", "1", "--name", "a"]);
    command.env("FRAZIL_STORE", &store);
    let said = frazil_tests::vm_harness::finish(command, frazil_tests::vm_harness::PATIENCE);
    for part in ["VERDICT", "tagged", "[t]", "1 snapshots forgotten, 4 left", "frazil prune"] {
        assert!(said.expect_code(0).stdout.contains(part), "expected `{part}`: {said:#?}");
    }
    let said = host.ok(&["forget", &store, "t", "--untag", "--prune"]).stdout;
    assert!(said.contains("1 snapshots forgotten, 3 left") && said.contains("freed"), "{said}");
    assert_eq!(log_ids(&host).len(), 3);
    assert!(host.store().tags().is_empty(), "a tag goes with its snapshot");
    let said = host.ok(&["prune", &store, "--dry-run"]).stdout;
    assert!(said.contains("would be removed") && said.contains("nothing changed"), "{said}");
}

#[test]
fn forget_prune_and_diff_refuse_what_they_cannot_do() {
    let host = Host::new();
    let store = host.store_path().display().to_string();
    let ids = store_of(&host, &[("a", 2, Some("gold")), ("a", 1, None), ("b", 0, None)]);
    let other = Host::new();
    let elsewhere = store_of(&other, &[("a", 0, None)]);
    let there = other.at(&elsewhere[0]);
    let latest = host.at("latest");
    let before = files(&host);
    for (args, says) in [
        (
            &["forget", &store][..],
            &["expected snapshots to forget", "--keep-last 10", "frazil log"][..],
        ),
        (&["forget"], &["expected snapshots to forget"]),
        (&["forget", &store, "--name", "a"], &["expected snapshots to forget"]),
        (&["forget", &latest, "--keep-last", "1"], &["either snapshots to forget or rules"]),
        (&["forget", "nowhere", "--keep-last", "1"], &["`nowhere`", "no such folder"]),
        (&["forget", &latest, "--name", "a"], &["--name goes with rules"]),
        (&["forget", &store, "--keep-last", "1", "--untag"], &["--untag goes with"]),
        (&["forget", &store, "--keep-last", "0"], &["--keep-last", "1.."]),
        (&["forget", &store, "--keep-daily", "many"], &["--keep-daily"]),
        (&["forget", &store, "--keep-within", "1mo"], &["months and years differ"]),
        (&["forget", &store, "--keep-within", "0s"], &["longer than zero"]),
        (&["prune", &store, "--max-unused", "5"], &["expected a share such as 5%"]),
        (&["prune", &store, "--max-unused=-5%"], &["expected a share such as 5%"]),
        (&["prune", &store, "--max-rewrite", "much"], &["expected a size"]),
        (&["diff", &latest], &["<B>"]),
        (&["diff", &latest, "latest", "--ranges", "some"], &["expected a number or `all`"]),
        (&["run", "--workload", "", "--elide", "some"], &["zero,equal,dedup,delta", "`some`"]),
    ] {
        refused(&host, 2, args, says);
    }
    for (args, says) in [
        (&["forget", &host.at("gold")][..], &["the tag `gold`", "--untag", "nothing was"][..]),
        (&["forget", &host.at(&ids[2]), &ids[0]], &["the tag `gold`", "nothing was forgotten"]),
        (&["forget", &host.at(&ids[2]), "silver"], &["silver", "frazil log"]),
        (&["forget", &latest, &there], &["expected snapshots of one store"]),
        (&["forget", &store, &there], &["expected snapshots of one store"]),
        (&["forget", &store, "--keep-last", "1", "--name", "c"], &["no snapshot of VM `c`"]),
        (&["forget", "nowhere@latest"], &["is not a frazil store"]),
        (&["prune", "nowhere"], &["is not a frazil store"]),
        (&["diff", &latest, &there], &["expected two snapshots of the same store"]),
        (&["diff", &latest, "silver"], &["silver", "frazil log"]),
        (&["diff", "nowhere@latest", "latest"], &["is not a frazil store"]),
    ] {
        refused(&host, 1, args, says);
    }
    assert_eq!(files(&host), before, "nothing that is refused changes anything");
    assert_eq!(log_ids(&host).len(), 3);
}
