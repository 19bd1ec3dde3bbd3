//! QEMU's monitor: commands and events, one JSON object per line (QEMU's docs/interop/qmp-spec).

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

/// How long QEMU may take to listen.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// How long a command may take: `savevm` writes all memory before it answers.
const ANSWER_PATIENCE: Duration = Duration::from_mins(10);
const POLL: Duration = Duration::from_millis(1);

/// Something that happened to the machine.
#[derive(Debug)]
struct Event {
    name: String,
    /// QEMU's time of the event, in microseconds since 1970.
    at_us: u64,
}

/// A connection to a QEMU.
#[derive(Debug)]
pub(super) struct Monitor {
    stream: BufReader<UnixStream>,
    events: Vec<Event>,
}

impl Monitor {
    /// Connects once QEMU listens on `socket`; `alive` fails if waiting is in vain.
    pub(super) fn connect(
        socket: &Path,
        mut alive: impl FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let started = Instant::now();
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if started.elapsed() > START_PATIENCE => {
                    return Err(error).context("QEMU does not listen on its monitor");
                }
                Err(_) => alive()?,
            }
            std::thread::sleep(POLL);
        };
        stream.set_read_timeout(Some(ANSWER_PATIENCE)).context("cannot set a timeout")?;
        let mut monitor = Self { stream: BufReader::new(stream), events: Vec::new() };
        let greeting = monitor.line()?;
        ensure!(
            greeting.get("QMP").is_some(),
            "QEMU's monitor: expected a greeting, found {greeting}"
        );
        monitor.command("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Runs a command, and returns its result.
    pub(super) fn command(&mut self, name: &str, arguments: &Value) -> anyhow::Result<Value> {
        let request = json!({ "execute": name, "arguments": arguments });
        writeln!(self.stream.get_mut(), "{request}").context("cannot write to QEMU's monitor")?;
        loop {
            let answer = self.line()?;
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                bail!("QEMU refused `{name}`: {}", error["desc"].as_str().unwrap_or("no reason"));
            }
            self.note(&answer);
        }
    }

    /// Runs a command of the human monitor, and returns its output.
    pub(super) fn human(&mut self, line: &str) -> anyhow::Result<String> {
        let said = self.command("human-monitor-command", &json!({ "command-line": line }))?;
        Ok(said.as_str().unwrap_or_default().trim().to_owned())
    }

    /// Forgets all events so far.
    pub(super) fn forget_events(&mut self) {
        self.events.clear();
    }

    /// How long the machine was paused since the events were last forgotten, if it was and runs
    /// again.
    pub(super) fn stood_still(&self) -> Option<Duration> {
        let at = |name: &str| self.events.iter().find(|event| event.name == name);
        let us = at("RESUME")?.at_us.checked_sub(at("STOP")?.at_us)?;
        Some(Duration::from_micros(us))
    }

    fn note(&mut self, message: &Value) {
        let time = &message["timestamp"];
        let (Some(name), Some(seconds), Some(us)) =
            (message["event"].as_str(), time["seconds"].as_u64(), time["microseconds"].as_u64())
        else {
            return;
        };
        self.events.push(Event { name: name.to_owned(), at_us: seconds * 1_000_000 + us });
    }

    fn line(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => bail!("QEMU has ended"),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                bail!("QEMU's monitor has said nothing for {ANSWER_PATIENCE:?}")
            }
            Err(error) => return Err(error).context("cannot read from QEMU's monitor"),
        }
        serde_json::from_str(&line)
            .with_context(|| format!("QEMU's monitor: expected JSON, found {line}"))
    }
}
