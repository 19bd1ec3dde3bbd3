//! What people and Prometheus see of a running VM: `GET /metrics`, `GET /checkpoints/statistics`,
//! `frazil top`, and `frazil log --graph`.

use std::collections::{BTreeMap, HashSet};
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use frazil_tests::vm_harness::{
    Host, PATIENCE, RunningVm, finish, kvm_or_skip, number, text, wait_for,
};
use serde_json::Value;

const QUIET: &str = "touch=8MiB,rate=400,report=0";

/// A sample: its labels in order, and its value.
type Sample = (Vec<(String, String)>, f64);

/// A family of metrics as exposed.
#[derive(Debug, Default)]
struct Family {
    kind: String,
    /// The samples by their full names, of which a histogram has several.
    samples: BTreeMap<String, Vec<Sample>>,
}

/// A page of metrics, parsed as strictly as the format allows.
struct Metrics(BTreeMap<String, Family>);

#[track_caller]
fn check_name(name: &str) {
    let first = |c: char| c.is_ascii_alphabetic() || c == '_' || c == ':';
    assert!(name.starts_with(first), "{name:?}");
    assert!(name.chars().all(|c| first(c) || c.is_ascii_digit()), "{name:?}");
}

/// Parses `name="value",…}` including the brace; returns the labels and the rest of the line.
#[track_caller]
fn parse_labels(mut line: &str) -> (Vec<(String, String)>, &str) {
    let mut labels = Vec::new();
    loop {
        let (name, rest) = line.split_once("=\"").expect("a label and its value");
        check_name(name);
        let (mut value, mut chars) = (String::new(), rest.char_indices());
        let end = loop {
            match chars.next().expect("a closing quotation mark") {
                (at, '"') => break at,
                (_, '\\') => match chars.next().expect("an escaped character").1 {
                    'n' => value.push('\n'),
                    c @ ('\\' | '"') => value.push(c),
                    other => panic!("unknown escape {other:?} in {rest:?}"),
                },
                (_, c) => value.push(c),
            }
        };
        labels.push((name.to_owned(), value));
        let after = &rest[end + 1..];
        if let Some(after) = after.strip_prefix('}') {
            return (labels, after);
        }
        line = after.strip_prefix(',').expect("another label, or the end");
    }
}

impl Metrics {
    #[track_caller]
    fn parse(page: &str) -> Self {
        assert!(page.ends_with('\n'), "the last line must end");
        let mut families: BTreeMap<String, Family> = BTreeMap::new();
        let (mut current, mut described) = (String::new(), String::new());
        for line in page.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').expect("a name and a text");
                check_name(name);
                assert!(!help.is_empty() && !families.contains_key(name), "{line}");
                name.clone_into(&mut described);
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect("a name and a type");
                assert_eq!(name, described, "HELP comes right before TYPE");
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                let family = Family { kind: kind.to_owned(), ..Family::default() };
                assert!(families.insert(name.to_owned(), family).is_none(), "{name} twice");
                name.clone_into(&mut current);
            } else {
                let at = line.find(['{', ' ']).expect("a name and a value");
                let (name, rest) = line.split_at(at);
                check_name(name);
                let (labels, rest) = match rest.strip_prefix('{') {
                    Some(rest) => parse_labels(rest),
                    None => (Vec::new(), rest),
                };
                let value = rest.strip_prefix(' ').expect("a blank before the value");
                let value: f64 = value.parse().expect("a number");
                let family = families.get_mut(&current).expect("HELP and TYPE come first");
                let suffix = name.strip_prefix(&current).expect("samples stand with their family");
                let suffixes: &[&str] = match family.kind.as_str() {
                    "histogram" => &["_bucket", "_sum", "_count"],
                    _ => &[""],
                };
                assert!(suffixes.contains(&suffix), "{line}");
                family.samples.entry(name.to_owned()).or_default().push((labels, value));
            }
        }
        let metrics = Self(families);
        metrics.check();
        metrics
    }

    #[track_caller]
    fn check(&self) {
        for (name, family) in &self.0 {
            assert!(!family.samples.is_empty(), "{name} has no sample");
            assert_eq!(name.ends_with("_total"), family.kind == "counter", "{name}");
            for (sample, values) in &family.samples {
                let unique: HashSet<_> = values.iter().map(|(labels, _)| labels).collect();
                assert_eq!(unique.len(), values.len(), "{sample}: the same labels twice");
                let fine = |value: f64| value.is_finite() && value >= 0.0;
                assert!(values.iter().all(|(_, value)| fine(*value)), "{sample}: {values:?}");
            }
            if family.kind == "histogram" {
                self.check_histogram(name);
            }
        }
    }

    #[track_caller]
    fn check_histogram(&self, name: &str) {
        let buckets = &self.0[name].samples[&format!("{name}_bucket")];
        let mut before = (f64::NEG_INFINITY, 0.0);
        for (labels, count) in buckets {
            assert_eq!((labels.len(), labels[0].0.as_str()), (1, "le"), "{name}");
            let le: f64 = labels[0].1.parse().expect("a bound");
            assert!(le > before.0, "{name}: bounds ascend");
            assert!(*count >= before.1, "{name}: buckets are cumulative");
            before = (le, *count);
        }
        assert!(before.0.is_infinite(), "{name}: the last bucket takes all");
        assert!((before.1 - self.value(&format!("{name}_count"), &[])).abs() < 0.5, "{name}");
        let _sum = self.value(&format!("{name}_sum"), &[]);
    }

    #[track_caller]
    fn value(&self, sample: &str, labels: &[(&str, &str)]) -> f64 {
        let found = self.0.values().find_map(|family| family.samples.get(sample));
        let found = found.unwrap_or_else(|| panic!("no sample {sample}"));
        let wanted: Vec<(String, String)> =
            labels.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        let value = found.iter().find(|(labels, _)| *labels == wanted);
        value.unwrap_or_else(|| panic!("no {labels:?} of {sample}: {found:?}")).1
    }

    /// Returns the value of a sample, which must be a whole number.
    #[track_caller]
    fn count(&self, sample: &str, labels: &[(&str, &str)]) -> u64 {
        let value = self.value(sample, labels);
        assert!(value.fract() == 0.0, "{sample}: {value}");
        value as u64
    }
}

#[track_caller]
fn scrape(vm: &RunningVm) -> Metrics {
    let (head, body) = vm.exchange("GET", "/metrics", "").expect("the VM answers");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    let kind = head
        .lines()
        .filter_map(|line| line.split_once(": "))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-type"));
    assert_eq!(kind.expect("a type").1, "text/plain; version=0.0.4; charset=utf-8");
    Metrics::parse(&body)
}

#[test]
fn metrics_are_what_prometheus_reads_and_what_the_vm_says_elsewhere() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let vm = host.run("meter", QUIET, &["--memory", "48MiB", "--cpus", "2"]);
    vm.wait_populated();
    let none = scrape(&vm);
    assert_eq!(none.count("frazil_checkpoint_pause_seconds_count", &[]), 0);
    assert!(!none.0.contains_key("frazil_dirty_pages_per_second"), "nothing is known yet");
    assert!(!none.0.contains_key("frazil_pager_fault_seconds"), "it was not resumed");
    let reports: Vec<Value> = (0..5).map(|_| host.json(&["checkpoint", "meter"])).collect();
    let (status, _) =
        vm.http("POST", "/checkpoints", r#"{"tag": "no tag"}"#).expect("the VM answers");
    assert!(status >= 400, "this one fails: {status}");
    let seen = scrape(&vm);

    let sum = |name: &str| reports.iter().map(|report| number(report, name)).sum::<u64>();
    for (result, count) in [("taken", 5), ("failed", 1), ("skipped", 0)] {
        assert_eq!(seen.count("frazil_checkpoints_total", &[("result", result)]), count);
    }
    for (name, field) in [
        ("frazil_checkpoint_pause_seconds", "pause_us"),
        ("frazil_checkpoint_quiesce_seconds", "quiesce_us"),
        ("frazil_checkpoint_cut_seconds", "cut_us"),
        ("frazil_checkpoint_duration_seconds", "duration_us"),
    ] {
        assert_eq!(seen.count(&format!("{name}_count"), &[]), 5);
        let us = seen.value(&format!("{name}_sum"), &[]) * 1e6;
        assert!((us - sum(field) as f64).abs() < 0.5, "{name}: {us}");
    }
    assert_eq!(seen.count("frazil_checkpoint_dirty_pages_sum", &[]), sum("dirty_pages"));
    let written = |phase| seen.count("frazil_checkpoint_pages_total", &[("phase", phase)]);
    assert_eq!(written("precopy"), sum("precopied_pages"));
    assert_eq!(written("commit"), sum("commit_pages"));
    let kept = |how| seen.count("frazil_checkpoint_kept_pages_total", &[("how", how)]);
    for (how, field) in [("staged", "staged_pages"), ("cut", "cut_pages"), ("cow", "cow_pages")] {
        assert_eq!(kept(how), sum(field), "{how}");
    }
    let stored = |kind| seen.count("frazil_checkpoint_stored_bytes_total", &[("kind", kind)]);
    assert_eq!(stored("frames") + stored("meta"), sum("stored_bytes"));
    let pause = "frazil_checkpoint_pause_seconds";
    let bounds = &seen.0[pause].samples[&format!("{pause}_bucket")];
    assert_eq!((bounds[0].0[0].1.as_str(), bounds[15].0[0].1.as_str()), ("0.00001", "1"));

    assert_eq!(seen.count("frazil_memory_bytes", &[]), 48 << 20);
    assert!(seen.count("frazil_memory_allocated_bytes", &[]) >= 8 << 20);
    assert_eq!(seen.count("frazil_vcpus", &[]), 2);
    assert_eq!(seen.count("frazil_vm_state", &[("state", "running")]), 1);
    assert!(seen.value("frazil_dirty_pages_per_second", &[]) > 0.0);
    let cut_s = seen.value("frazil_last_checkpoint_timestamp_seconds", &[]);
    assert!((cut_s * 1e3 - number(&reports[4], "time_unix_ms") as f64).abs() < 1.0);
    let kicked = |page: &Metrics| page.count("frazil_vcpu_exits_total", &[("cause", "kicked")]);
    assert!(kicked(&seen) >= kicked(&none) + 10, "each of five stopped two vCPUs");

    statistics_are_as_described(&vm, &reports);
    let _stopped = host.ok(&["stop", "meter"]);
    vm.expect_ended("stopped");
}

/// Fails the test unless `found` has exactly the properties that the API's description lists.
#[track_caller]
fn expect_described(api: &Value, schema: &str, found: &Value) {
    let described = api["components"]["schemas"][schema]["properties"].as_object().expect("some");
    let found: HashSet<&String> = found.as_object().expect("an object").keys().collect();
    assert_eq!(found, described.keys().collect(), "{schema}");
}

fn statistics_are_as_described(vm: &RunningVm, reports: &[Value]) {
    let api = vm.get("/openapi.json");
    let found = vm.get("/checkpoints/statistics");
    expect_described(&api, "CheckpointStatistics", &found);
    expect_described(&api, "CheckpointTotals", &found["totals"]);
    expect_described(&api, "CheckpointSums", &found["sums"]);
    expect_described(&api, "Distribution", &found["pause_us"]);
    expect_described(&api, "Bucket", &found["pause_us"]["buckets"][0]);
    assert_eq!(found["last"], reports[4]);
    let pauses = reports.iter().map(|report| number(report, "pause_us"));
    let (shortest, longest) = (pauses.clone().min().unwrap_or(0), pauses.max().unwrap_or(0));
    // To within 1/500, since histograms are exact to about a thousandth.
    let near = |name: &str, us: u64| number(&found["pause_us"], name).abs_diff(us) <= us / 500;
    assert!(near("min", shortest) && near("max", longest) && near("p99", longest), "{found}");
}

#[test]
fn a_lazily_resumed_vm_tells_what_is_resident() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let vm = host.run("lazy", QUIET, &["--memory", "48MiB"]);
    vm.wait_populated();
    let _last = host.json(&["checkpoint", "lazy", "--exit"]);
    vm.expect_ended("suspended");
    let vm = host.resume("lazy", "latest", &["--no-fill"]);
    vm.wait_beyond(vm.turns() + 50);
    let seen = scrape(&vm);
    assert!(seen.count("frazil_pager_fault_seconds_count", &[]) > 0);
    assert!(seen.value("frazil_pager_fault_seconds_sum", &[]) > 0.0);
    let resident = seen.count("frazil_pager_resident_bytes", &[]);
    assert!(resident > 0 && resident <= 48 << 20, "{resident}");
    assert_eq!(seen.count("frazil_pager_complete", &[]), 0);
    let line = host.json(&["top", "lazy", "--count", "1"]);
    assert!(number(&line["pager"], "faults") > 0, "{line}");
    let share = line["pager"]["resident_share"].as_f64().expect("a share");
    assert!(share > 0.0 && share < 1.0, "{share}");
    let _stopped = host.ok(&["stop", "lazy"]);
    vm.expect_ended("stopped");
}

#[test]
fn top_prints_lines_in_a_pipe_until_the_vm_ends() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let vm = host.run("watched", QUIET, &["--memory", "48MiB", "--checkpoint-every", "100ms"]);
    vm.wait_populated();
    wait_for("a checkpoint", || (number(&vm.get("/vm")["checkpoints"], "taken") > 1).then_some(()));
    let lines = host.ok(&["top", "watched", "--interval", "400ms", "--count", "3"]).json_lines();
    assert_eq!(lines.len(), 3);
    assert_eq!(lines[0]["checkpoints_per_s"], Value::Null, "one look makes no rate");
    for line in &lines {
        assert_eq!((text(line, "vm"), text(line, "state")), ("watched", "running"));
        assert!(line["dirty_pages_per_s"].as_f64().is_some_and(|rate| rate > 0.0), "{line}");
    }
    assert!(lines[2]["interval_ms"].as_f64().is_some_and(|ms| ms >= 100.0), "{}", lines[2]);
    let taken = |line: &Value| number(&line["checkpoints"], "taken");
    assert!(taken(&lines[2]) > taken(&lines[0]));

    let watching = host.command(&["top", "watched", "--interval", "100ms", "--json"]);
    let watching = std::thread::spawn(move || finish(watching, PATIENCE));
    std::thread::sleep(std::time::Duration::from_millis(300));
    let _stopped = host.ok(&["stop", "watched"]);
    vm.expect_ended("stopped");
    let finished = watching.join().expect("it is watched to its end");
    let lines = finished.expect_code(0).json_lines();
    assert_eq!(text(lines.last().expect("a last line"), "state"), "ended");
    host.frazil(&["top", "watched"]).expect_code(1).expect_says(&["watched", "frazil ps"]);
}

/// Returns the command `frazil` with `args`, on a terminal of 80 by 24.
fn on_a_terminal(host: &Host, args: &str) -> Command {
    let frazil = frazil_tests::vm_harness::frazil().display();
    let mut command = Command::new("script");
    let line = format!("stty rows 24 cols 80 && exec '{frazil}' {args}");
    command.args(["-q", "-e", "-c", &line, "/dev/null"]);
    host.surround(&mut command);
    command.env("TERM", "xterm-256color");
    command
}

/// Fails the test unless `screen` enters the alternate screen, and in the end leaves it and shows
/// the cursor.
#[track_caller]
fn expect_terminal_restored(screen: &str) {
    let (taken, given) = (screen.find("\u{1b}[?1049h"), screen.rfind("\u{1b}[?1049l"));
    assert!(taken.is_some() && taken < given, "{screen:?}");
    let cursor = (screen.rfind("\u{1b}[?25l"), screen.rfind("\u{1b}[?25h"));
    assert!(cursor.0 < cursor.1, "the cursor stays hidden: {screen:?}");
}

#[test]
fn top_draws_on_a_terminal_and_q_gives_it_back() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let vm = host.run("drawn", QUIET, &["--memory", "48MiB"]);
    vm.wait_populated();
    let _taken = host.json(&["checkpoint", "drawn"]);
    let mut command = on_a_terminal(&host, "top drawn --interval 100ms --count 300");
    let started = std::time::Instant::now();
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let Ok(mut child) = child else {
        eprintln!("SKIPPED: there is no `script` to make a terminal with");
        return;
    };
    let (mut keys, mut out) = (child.stdin.take().expect("a pipe"), child.stdout.take());
    let (mut screen, mut part) = (Vec::new(), [0; 4096]);
    let mut asked = false;
    // If `q` does not end the view, it goes on to its count, which takes half a minute.
    while let Some(len) = out.as_mut().and_then(|out| out.read(&mut part).ok()).filter(|n| *n > 0) {
        screen.extend_from_slice(&part[..len]);
        if !asked && String::from_utf8_lossy(&screen).contains("quits") {
            keys.write_all(b"q").expect("a key");
            asked = true;
        }
    }
    assert!(child.wait().expect("it is ours").success());
    assert!(started.elapsed().as_secs() < 25, "`q` did not end it");
    let screen = String::from_utf8_lossy(&screen).into_owned();
    assert!(screen.contains("p50") && screen.contains("drawn"), "{screen:?}");
    expect_terminal_restored(&screen);
    let _stopped = host.ok(&["stop", "drawn"]);
    vm.expect_ended("stopped");
}

#[test]
fn a_hostile_vm_gets_no_escape_code_to_the_terminal() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let vm = host.run("model", QUIET, &["--memory", "48MiB"]);
    vm.wait_populated();
    let mut status = vm.get("/vm");
    status["name"] = "\u{1b}]0;owned\u{7}\u{1b}[31mevil\u{9b}2J".into();
    status["store"] = "\u{1b}[41mstore".into();
    let statistics = vm.get("/checkpoints/statistics");
    let socket = host.path("hostile.sock");
    let listener = UnixListener::bind(&socket).expect("a socket");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let (mut asked, mut byte) = (String::new(), [0]);
            while !asked.ends_with("\r\n\r\n") && stream.read(&mut byte).is_ok_and(|len| len > 0) {
                asked.push(char::from(byte[0]));
            }
            let body = if asked.starts_with("GET /vm ") { &status } else { &statistics };
            let (body, head) = (body.to_string(), "HTTP/1.1 200 OK\r\nContent-Length:");
            let _gone = write!(stream, "{head} {}\r\n\r\n{body}", body.len());
        }
    });
    let args = format!("top {} --interval 100ms --count 2", socket.display());
    if let Ok(probe) = Command::new("script").arg("--version").output()
        && probe.status.success()
    {
        let drawn = finish(on_a_terminal(&host, &args), PATIENCE);
        let screen = &drawn.expect_code(0).stdout;
        expect_terminal_restored(screen);
        assert!(screen.contains("evil"), "{screen:?}");
        for raw in ["\u{1b}]0", "\u{7}", "\u{1b}[41m", "\u{9b}"] {
            assert!(!screen.contains(raw), "{raw:?} in {screen:?}");
        }
    } else {
        eprintln!("SKIPPED in part: there is no `script` to make a terminal with");
    }
    let line = host.json(&["top", &socket.display().to_string(), "--count", "1"]);
    assert_eq!(text(&line, "vm"), "\u{1b}]0;owned\u{7}\u{1b}[31mevil\u{9b}2J", "as it is, in JSON");
    let _stopped = host.ok(&["stop", "model"]);
    vm.expect_ended("stopped");
}

#[test]
fn the_graph_shows_where_a_clone_left_the_line() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let store = host.store_path().display().to_string();
    let vm = host.run("trunk", QUIET, &["--memory", "48MiB", "--serial", "null"]);
    vm.wait_populated();
    let id = |report: &Value| text(report, "id")[..12].to_owned();
    let base = id(&host.json(&["checkpoint", "trunk", "--tag", "base"]));
    let tip = id(&host.json(&["checkpoint", "trunk", "--message", "\u{1b}[2Jtip\nand more"]));
    let clone = host.resume("clone", "base", &["--no-fill"]);
    let side = id(&host.json(&["checkpoint", "clone"]));
    let drawn = host.ok(&["log", &store, "--graph"]).stdout;
    let lines: Vec<&str> = drawn.lines().collect();
    assert_eq!(lines.len(), 4, "{drawn}");
    assert!(lines[0].starts_with(&format!("* {side}  ")), "{drawn}");
    assert!(lines[1].starts_with(&format!("| * {tip}  ")), "{drawn}");
    assert!(lines[1].ends_with("trunk  \\u001b[2Jtip"), "{drawn}");
    assert_eq!(lines[2], "|/");
    assert!(lines[3].starts_with(&format!("* {base} (base)  ")), "{drawn}");
    assert!(lines[3].contains(" pages  "), "{drawn}");
    let newest = host.ok(&["log", &store, "--graph", "--limit", "1"]).stdout;
    assert_eq!(newest.lines().collect::<Vec<_>>(), lines[..1]);
    let plain = host.ok(&["log", &store, "--json"]).stdout;
    assert_eq!(host.ok(&["log", &store, "--json", "--graph"]).stdout, plain);
    for (vm, name) in [(vm, "trunk"), (clone, "clone")] {
        let _stopped = host.ok(&["stop", name]);
        vm.expect_ended("stopped");
    }
}
