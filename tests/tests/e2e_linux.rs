//! A stock Linux guest with two vCPUs: checkpoints under load, kills, and resumes after them.
//! `frazil_tests::linux` describes where the guest runs.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::OnceLock;

use frazil_tests::linux::{Checkpoint, GuestIdentity, Outcome, Tick, known_sum, run, value};
use serde_json::Value;

/// How far a guest's date may be from the host's while it runs undisturbed.
const DATE_ERROR_MAX_S: i64 = 3;

/// A guest that is all in memory: a tmpfs, two loads, the kernel itself.
const IN_MEMORY: &str = r#"
tap tap1 10.0.1.1
image /run/own original
image /run/other another
boot a 'load shell until=20' --vsock socket=/run/a.sock --net none --disk /run/own
await a '^GUEST tick'
clock a
whoami a
checkpoint a first
ticks a 2
checkpoint a second
for turn in 3 4; do
    ticks a 1
    checkpoint a a$turn
done
# The power fails in the middle of one.
ticks a 1
frazil checkpoint a >/dev/null 2>&1 &
sleep 0.4
crash a
try frazil verify /run/store >/dev/null

# The latest, and at once one more, while most of its memory was never touched.
start b resume /run/store@latest --no-fill --vsock socket=/run/b.sock
whoami b
ticks b 1
checkpoint b lazily
ticks b 2
try frazil rewind b first >/dev/null
tell rewound
whoami b
ticks b 2
checkpoint b rewound
crash b

# An older one, all at once, for which no time has passed.
start c resume /run/store@second --eager --clock snapshot --vsock socket=/run/c.sock
whoami c
ticks c 2
halt c

# Clones share what is in memory; each goes on by itself, and is a branch of its own. One of them is on
# another network, with another disk. A driver takes its card's address when it starts.
start e1 resume /run/store@rewound --clones 1 --net tap=tap1,mac=02:00:00:00:00:e1 \
    --vsock cid=101,socket=/run/e1.sock --disk 0=/run/other
start e2 resume /run/store@rewound --clones 1 --vsock cid=102,socket=/run/e2.sock
ask e1 'card=$(basename $(readlink -f /sys/class/net/eth0/device))
    echo $card >/sys/bus/virtio/drivers/virtio_net/unbind
    echo $card >/sys/bus/virtio/drivers/virtio_net/bind
    ip address add 10.0.1.2/24 dev eth0
    ip link set eth0 up
    ping -c 1 -w 30 10.0.1.1 >/dev/null && echo answered' >/run/ping
tell ping "$(cat /run/ping)" from "$(grep tap1 /proc/net/arp)"
whoami e1
whoami e2
ticks e1 2
ticks e2 2
checkpoint e2 branch
crash e2
ticks e1 1
halt e1
start f resume /run/store@branch
ticks f 2
halt f

# To its end.
start g resume /run/store@lazily
end g
try frazil verify /run/store >/dev/null
"#;

/// A database on a disk, written and synced all the time, and a connection that stays open. No
/// resume names a disk.
const DISK_AND_NETWORK: &str = r"
network
disk /run/disk
boot a 'disk net=10.0.0.2' --disk /run/disk --net tap=tap0
await a '^GUEST tick'
checkpoint a first
for tag in second third; do
    ticks a 2
    checkpoint a $tag
done
await a 'GUEST fsck clean'
ticks a 1
frazil checkpoint a >/dev/null 2>&1 &
sleep 0.4
crash a

start b resume /run/store@third
talks b
await b 'GUEST fsck clean'
checkpoint b fourth
try frazil rewind b second >/dev/null
tell rewound
talks b
halt b

# An older one; its connection is one that went on without it.
start c resume /run/store@first --no-fill
talks c
await c 'GUEST fsck clean'
checkpoint c branch
crash c

for clone in e1 e2 e3; do
    start $clone resume /run/store@fourth --clones 1 --net none
done
for clone in e1 e2 e3; do
    ticks $clone 1
    await $clone 'GUEST fsck clean'
done
checkpoint e2 private
halt e1
halt e2
halt e3

start f resume /run/store@branch --net none
ticks f 2
await f 'GUEST fsck clean'
halt f
try frazil verify /run/store >/dev/null
";

/// Fails the test unless ticks follow each other without a gap, and clocks and loads never go back.
#[track_caller]
fn expect_in_order(vm: &str, ticks: &[Tick]) {
    for pair in ticks.windows(2) {
        assert_eq!(pair[1].number, pair[0].number + 1, "{vm}: {pair:?}");
        assert!(pair[1].uptime > pair[0].uptime, "{vm}: {pair:?}");
        assert!(pair[1].date >= pair[0].date, "{vm}: {pair:?}");
        assert!(pair[1].rounds >= pair[0].rounds, "{vm}: {pair:?}");
        assert!(pair[1].rows >= pair[0].rows, "{vm}: {pair:?}");
        assert!(pair[1].echoed >= pair[0].echoed, "{vm}: {pair:?}");
        assert!(pair[1].random != pair[0].random, "{vm}: {pair:?}");
    }
    // The first ones may fall between two rounds.
    if let [first, .., last] = ticks
        && ticks.len() > 3
    {
        assert!(last.rounds > first.rounds || last.rows > first.rows, "{vm}: {first:?}, {last:?}");
    }
}

/// Fails the test unless a guest went on from a tick in `from`, in order and without any error.
#[track_caller]
fn expect_goes_on(outcome: &Outcome, vm: &str, from: &RangeInclusive<u64>) {
    outcome.expect_well(vm);
    let ticks = outcome.ticks(vm);
    assert!(from.contains(&ticks[0].number), "{vm}: expected {from:?}, found {:?}", ticks[0]);
    expect_in_order(vm, &ticks);
}

/// Fails the test unless the clocks of resumed guests are right: the date is the host's, or goes on
/// from the snapshot's, and the monotonic clock has advanced as much as the date.
#[track_caller]
fn expect_clocks(outcome: &Outcome) {
    let only = |vm: &str| outcome.identities(vm).remove(0);
    let near = |what: &str, found: i64, [from, to]: [i64; 2]| {
        let range = from - DATE_ERROR_MAX_S..=to + DATE_ERROR_MAX_S;
        assert!(range.contains(&found), "{what}: expected {range:?}, found {found}");
    };
    let [first, resumed] = ["a", "b"].map(only);
    for (vm, who) in [("a", &first), ("b", &resumed)] {
        near(&format!("{vm}'s date"), who.date, who.between);
        near(&format!("{vm}'s CMOS clock"), who.rtc, who.between);
    }
    let passed = (resumed.uptime - first.uptime) as i64;
    near("b's monotonic clock", passed, [resumed.date - first.date; 2]);

    // With `--clock snapshot`, the date goes on from that of the cut.
    let late = only("c");
    let cut_ms = Checkpoint::find(outcome, "second").report["time_unix_ms"].as_i64();
    let cut = cut_ms.expect("a time") / 1000;
    let started = outcome.test_lines("started");
    let started = started.iter().find(|words| words[0] == "c").expect("it was started");
    let ran_max = late.between[1] - value::<i64>(started[2]);
    assert!(cut + ran_max + 2 * DATE_ERROR_MAX_S < late.between[0], "the dates can be told apart");
    near("c's date", late.date, [cut, cut + ran_max]);
    near("c's CMOS clock", late.rtc, [cut, cut + ran_max]);
    let passed = (late.uptime - first.uptime) as i64;
    near("c's monotonic clock", passed, [late.date - first.date; 2]);
}

/// Fails the test unless each guest that goes on from a snapshot has a new generation id and its
/// kernel is notified, and clones have what they were given, or else what the snapshot has.
#[track_caller]
fn expect_identities(outcome: &Outcome) {
    let asked: Vec<GuestIdentity> =
        ["a", "b", "c", "e1", "e2"].iter().flat_map(|vm| outcome.identities(vm)).collect();
    let [a, b, rewound, c, e1, e2] = &asked[..] else { panic!("{asked:#?}") };
    let generations: BTreeSet<&str> = asked.iter().map(|who| who.generation.as_str()).collect();
    assert_eq!(generations.len(), asked.len(), "{asked:#?}");
    for who in &asked {
        assert_eq!((who.generation.len(), who.tables), (32, 1), "{who:?}");
    }
    // Debian's kernel has no driver for the generation id, but one for the events of ACPI devices.
    assert_eq!(a.events, 0, "{a:?}");
    for who in [b, rewound, c, e1, e2] {
        assert!(who.events > 0, "{who:?}");
    }
    assert_eq!([a, b, rewound, c, e1, e2].map(|who| who.cid), [3, 3, 3, 3, 101, 102]);
    let (own, other) = ("original", "another");
    assert_eq!(
        [a, b, rewound, c, e1, e2].map(|who| who.disk.as_str()),
        [own, own, own, own, other, own]
    );
    let address = "02:00:00:00:00:e1";
    assert_eq!((e1.mac.as_str(), &e2.mac), (address, &a.mac));
    let ping = outcome.only_test_line("ping").join(" ");
    assert!(ping.contains("answered") && ping.contains(address), "{ping}");
}

#[test]
fn memory_and_processors_go_on() {
    let Some(outcome) = run("in-memory", IN_MEMORY) else { return };
    let at = |tag: &str| Checkpoint::find(&outcome, tag);

    let up = outcome.guest_lines("a", "up");
    assert_eq!(up[0][1..3], ["cpus", "2"], "{up:?}");
    assert_eq!(outcome.guest_lines("a", "known"), [[known_sum()]]);
    expect_goes_on(&outcome, "a", &(1..=1));
    let [_, here, there] = outcome.only_test_line("clock")[..] else { panic!("a clock") };
    let error = value::<i64>(here) - value::<i64>(there);
    assert!(error.abs() <= DATE_ERROR_MAX_S, "the guest's date is {error} s behind");

    // The checkpoint during which power failed may or may not have been published.
    let last = outcome.ticks("a").pop().expect("a tick").number;
    let latest = *at("a4").next().start()..=last + 2;
    outcome.expect_well("b");
    let b = outcome.ticks("b");
    let back = b.windows(2).position(|pair| pair[1].number < pair[0].number).expect("a rewind") + 1;
    assert!(latest.contains(&b[0].number), "expected {latest:?}, found {:?}", b[0]);
    expect_in_order("b", &b[..back]);
    assert!(at("first").next().contains(&b[back].number), "{:?}", b[back]);
    expect_in_order("b", &b[back..]);

    for (vm, tag) in
        [("c", "second"), ("e1", "rewound"), ("e2", "rewound"), ("f", "branch"), ("g", "lazily")]
    {
        expect_goes_on(&outcome, vm, &at(tag).next());
    }
    assert_eq!(outcome.guest_lines("g", "off").len(), 1, "{:#?}", outcome.console("g"));
    assert_eq!(outcome.test_lines("ended").pop().expect("the last one"), ["g", "0"]);

    expect_clocks(&outcome);
    expect_identities(&outcome);

    // Pages that were not touched are not written again, also after a lazy resume.
    let pages = |tag: &str| at(tag).report["dirty_pages"].as_u64().expect("a number");
    assert!(pages("lazily") < pages("first") / 2, "{} of {}", pages("lazily"), pages("first"));
}

/// Fails the test unless `vm`'s guest has at least the rows that the guest of `from` had reported
/// before the checkpoint.
#[track_caller]
fn expect_rows(outcome: &Outcome, vm: &str, from: &str, checkpoint: &Checkpoint) {
    let [before, _] = checkpoint.ticks;
    let ticks = outcome.ticks(from);
    // Stops at the first later tick: after a rewind, the same ticks may come again with other rows.
    let before = ticks.iter().take_while(|tick| tick.number <= before);
    let told = before.map(|tick| tick.rows).max().expect("a tick before the checkpoint");
    let found = outcome.ticks(vm)[0].rows;
    assert!(told > 0 && found >= told, "{vm}: {found} rows, {told} were told of");
}

#[test]
fn disk_and_network_go_on() {
    let Some(outcome) = run("disk-and-network", DISK_AND_NETWORK) else { return };
    let at = |tag: &str| Checkpoint::find(&outcome, tag);

    expect_goes_on(&outcome, "a", &(1..=1));
    let connections: Vec<u64> = outcome.ticks("a").iter().map(|tick| tick.echoed[0]).collect();
    assert!(connections.iter().all(|number| *number == 1), "{connections:?}");

    outcome.expect_well("b");
    let b = outcome.ticks("b");
    let back = b.windows(2).position(|pair| pair[1].number < pair[0].number).expect("a rewind") + 1;
    assert!(at("third").next().contains(&b[0].number), "{:?}", b[0]);
    expect_in_order("b", &b[..back]);
    assert!(at("second").next().contains(&b[back].number), "{:?}", b[back]);
    expect_in_order("b", &b[back..]);
    expect_rows(&outcome, "b", "a", &at("third"));

    expect_goes_on(&outcome, "c", &at("first").next());
    for clone in ["e1", "e2", "e3"] {
        expect_goes_on(&outcome, clone, &at("fourth").next());
        expect_rows(&outcome, clone, "b", &at("fourth"));
    }
    expect_goes_on(&outcome, "f", &at("branch").next());
    expect_rows(&outcome, "f", "c", &at("branch"));

    let last = |vm: &str| outcome.ticks(vm).pop().expect("a tick").random;
    let random = ["e1", "e2", "e3"].map(last);
    assert!(
        random[0] != random[1] && random[1] != random[2] && random[0] != random[2],
        "{random:?}"
    );
}

/// A guest that uses everything a machine can have: the state chunks of its snapshots, and its
/// memory's size raw and compressed by zstd.
const EVERYTHING: &str = r#"
network
disk /run/disk
boot a 'load shell disk net=10.0.0.2' --disk /run/disk --net tap=tap0 --vsock socket=/run/a.sock
await a '^GUEST tick'
ask a date >/run/date
checkpoint a first
ticks a 2
checkpoint a second
ticks a 1
checkpoint a third
frazil stop a
tell chunks "$(frazil show /run/store@third --json)"
for tag in first second third; do
    try frazil export /run/store@$tag /run/raw >/dev/null
    tell size $tag raw "$(stat -c %s /run/raw)" zstd "$(zstd -3 -c /run/raw | wc -c)"
    rm /run/raw
done
end a
"#;

/// Runs `EVERYTHING` once per process.
fn everything() -> Option<&'static Outcome> {
    static RUN: OnceLock<Option<Outcome>> = OnceLock::new();
    RUN.get_or_init(|| run("everything", EVERYTHING)).as_ref()
}

/// Prints the README's figures for such a guest.
#[test]
#[ignore = "measures, and takes minutes"]
fn sizes_of_snapshots() {
    let Some(outcome) = everything() else { return };
    for words in outcome.test_lines("size") {
        let [tag, "raw", raw, "zstd", zstd] = words[..] else { panic!("{words:?}") };
        let report = Checkpoint::find(outcome, tag).report;
        println!("{tag}: memory {raw}, zstd -3 {zstd}, report {report}");
    }
}

/// Writes the chunks that `golden_chunks.rs` reads, as this frazil saves them. Run it when a
/// chunk's version goes up: it adds files of new versions, and never changes those that exist.
#[test]
#[ignore = "writes golden chunks of the present versions"]
fn write_golden_chunks() {
    let Some(outcome) = everything() else { return };
    let shown: Value =
        serde_json::from_str(&outcome.only_test_line("chunks").join(" ")).expect("JSON");
    for chunk in shown["state"].as_array().expect("chunks") {
        let (name, version) = (&chunk["name"], &chunk["version"]);
        let name = format!("{}-v{version}.json", name.as_str().expect("a name"));
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden-chunks").join(name);
        if !path.exists() {
            std::fs::write(&path, format!("{chunk:#}\n")).expect("a golden file");
        }
    }
}
