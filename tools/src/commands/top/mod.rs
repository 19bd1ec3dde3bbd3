//! `frazil top`: watches a running VM.
//!
//! On a terminal, a view that is redrawn after every sample; otherwise, or with `--json`, one JSON
//! object per line. Both ask the VM's control socket and nothing else.

mod sample;
mod screen;
mod view;

use std::io::IsTerminal;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use frazil_vmm::Ended;
use frazil_vmm::control::api::RunState;
use frazil_vmm::control::{Client, VmRecord, find};
use serde_json::json;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::cli::TopArgs;
use crate::output;
use sample::Sample;

/// How long a VM may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take to notice a signal.
const SIGNAL_PATIENCE: Duration = Duration::from_millis(100);

pub(crate) fn top(args: &TopArgs, json: bool) -> anyhow::Result<()> {
    let mut watched = Watched::new(&args.vm)?;
    let quit = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&quit)).context("cannot handle signals")?;
    }
    // Sampled before taking over the terminal: a VM that does not answer is an error like any
    // other.
    let first = match watched.look() {
        Look::Seen(sample) => sample,
        Look::Ended(why) => return say_ended(&args.vm, why.as_ref(), json),
        Look::Silent(error) => anyhow::bail!(error),
    };
    let outcome = if json || !std::io::stdout().is_terminal() {
        print_lines(watched, *first, args, &quit)?
    } else {
        screen::show(watched, *first, args, &quit)?
    };
    match outcome {
        Outcome::Done => Ok(()),
        Outcome::Ended(why) => {
            say_ended(&args.vm, why.as_ref(), json || !std::io::stdout().is_terminal())
        }
    }
}

/// How watching ended.
enum Outcome {
    /// The user quit, saw as many samples as asked for, or no longer reads them.
    Done,
    /// The VM has ended; with the reason, if it was still there to give it.
    Ended(Option<Ended>),
}

fn say_ended(vm: &str, why: Option<&Ended>, json: bool) -> anyhow::Result<()> {
    if json {
        let mut line = json!({"vm": vm, "state": "ended"});
        if let Some(why) = why {
            line["ended"] = serde_json::to_value(why)?;
        }
        return super::print_json(&line);
    }
    let why = match why {
        None | Some(Ended::Stopped) => String::new(),
        Some(Ended::Suspended) => ": it is suspended; `frazil resume` continues it".to_owned(),
        Some(Ended::GuestReset) => ": its guest reset the machine".to_owned(),
        Some(Ended::PoweredOff) => ": its guest powered the machine off".to_owned(),
        Some(Ended::GuestCrashed { detail } | Ended::Failed { detail }) => format!(": {detail}"),
    };
    outln!("VM `{vm}` has ended{why}");
    Ok(())
}

/// The result of looking at a VM.
enum Look {
    Seen(Box<Sample>),
    /// The VM's process lives but does not answer; with the error.
    Silent(String),
    Ended(Option<Ended>),
}

/// A VM that is sampled repeatedly.
struct Watched {
    record: VmRecord,
    client: Client,
    /// The process that ran the VM when it was first seen: a different one is another VM of that
    /// name.
    pid: Option<u32>,
}

impl Watched {
    fn new(vm: &str) -> anyhow::Result<Self> {
        let record = find(vm)?;
        let client = Client::new(record.clone(), Some(PATIENCE));
        Ok(Self { record, client, pid: None })
    }

    fn look(&mut self) -> Look {
        match Sample::take(&self.client) {
            Ok(sample) if self.pid.is_some_and(|pid| pid != sample.status.pid) => Look::Ended(None),
            Ok(sample) if sample.status.state == RunState::Ended => {
                Look::Ended(sample.status.ended)
            }
            Ok(sample) => {
                self.pid = Some(sample.status.pid);
                Look::Seen(Box::new(sample))
            }
            // A VM that was never seen cannot have ended.
            Err(_) if self.pid.is_some() && self.is_gone() => Look::Ended(None),
            Err(error) => Look::Silent(error.to_string()),
        }
    }

    fn is_gone(&self) -> bool {
        if self.record.name.contains('/') {
            return UnixStream::connect(&self.record.socket).is_err();
        }
        find(&self.record.name).map_or(true, |record| record.pid != self.record.pid)
    }
}

/// Sleeps until `due`, or until `quit` is set.
fn sleep_until(due: Instant, quit: &AtomicBool) {
    while !quit.load(Ordering::Relaxed) {
        let left = due.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        std::thread::sleep(left.min(SIGNAL_PATIENCE));
    }
}

/// The time of the next look; looks that are overdue are skipped.
fn next_due(due: Instant, interval: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(interval).map_or(now, |latest| (due + interval).clamp(now, latest))
}

fn print_lines(
    mut watched: Watched,
    first: Sample,
    args: &TopArgs,
    quit: &AtomicBool,
) -> anyhow::Result<Outcome> {
    let mut due = Instant::now();
    let mut look = Look::Seen(Box::new(first));
    let (mut previous, mut lines) = (None, 0);
    loop {
        match look {
            Look::Seen(sample) => {
                let line = serde_json::to_string(&sample.line(previous.as_deref()))?;
                // Nobody reads the output any more.
                if output::try_line(format_args!("{line}")).is_err() {
                    return Ok(Outcome::Done);
                }
                previous = Some(sample);
                lines += 1;
            }
            Look::Silent(error) => errln!("frazil: {}", output::plain(&error)),
            Look::Ended(why) => return Ok(Outcome::Ended(why)),
        }
        if args.count == Some(lines) {
            return Ok(Outcome::Done);
        }
        due = next_due(due, args.interval);
        sleep_until(due, quit);
        if quit.load(Ordering::Relaxed) {
            return Ok(Outcome::Done);
        }
        look = watched.look();
    }
}
