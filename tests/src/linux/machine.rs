//! One run of an emulated machine: what its script says, and how the run ends.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::parts::Parts;

/// A machine that is silent for this long has stalled. A script that waits for a guest says so more
/// often.
const QUIET_MAX: Duration = Duration::from_secs(75);
/// The longest that a run may take.
const RUN_MAX: Duration = Duration::from_mins(12);
/// The largest archive that a script can leave behind, in bytes.
const KEPT_BYTES_MAX: u64 = 1 << 30;
/// How many lines from the end of each log a failure shows.
const TAIL_LINES: usize = 60;

/// How a run ended.
#[derive(Debug)]
pub(super) enum End {
    /// The script ran to its end.
    Done,
    /// Something stood still silently: the emulated processor now and then loses an interrupt.
    Stalled(String),
    /// Anything else.
    Failed(String),
}

/// A finished run.
#[derive(Debug)]
pub(super) struct Run {
    /// What the script said, line by line.
    pub(super) lines: Vec<String>,
    /// How it ended.
    pub(super) end: End,
}

/// Kills the emulator when dropped.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _gone = self.0.wait();
    }
}

/// Returns the file of the machine's disk, on which the script can leave an archive.
pub(super) fn kept(folder: &Path) -> PathBuf {
    folder.join("kept.tar")
}

/// Runs `initrd` to its end in a machine with emulated AMD-V. The logs in `folder` are
/// `script.log`, what the script writes to the second serial port; `kernel.log`, what the kernel
/// writes to the first; and `qemu.log`, QEMU's standard error.
pub(super) fn run(parts: &Parts, initrd: &Path, folder: &Path) -> Run {
    let kernel_log = folder.join("kernel.log");
    let disk = File::create(kept(folder)).expect("the folder is writable");
    disk.set_len(KEPT_BYTES_MAX).expect("files may have holes");
    let errors = File::create(folder.join("qemu.log")).expect("the folder is writable");
    let mut command = Command::new(&parts.qemu);
    // One processor, which the guests' vCPUs share. With two, QEMU 7.2 now and then delivers an
    // interrupt between a guest's exit and the loading of the kernel's own GS, where none can occur
    // on hardware, and that kills the kernel or the guest.
    command
        .args(["-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm", "-smp", "1", "-m", "3072"])
        .args(["-nodefaults", "-display", "none", "-no-reboot", "-serial"])
        .arg(format!("file:{}", kernel_log.display()))
        .args(["-serial", "stdio", "-append"])
        // A periodic timer: the emulated processor now and then loses an interrupt, and a lost
        // one-shot is never followed by another.
        .arg("console=ttyS0 quiet panic=-1 mitigations=off nohz=off highres=off")
        // The disk for what the script keeps.
        .arg("-drive")
        .arg(format!("file={},if=virtio,format=raw", kept(folder).display()))
        .arg("-kernel")
        .arg(&parts.kernel)
        .arg("-initrd")
        .arg(initrd)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors);
    let mut qemu = Qemu(command.spawn().expect("QEMU starts"));
    let lines = lines_of(&mut qemu.0);
    let mut script = ScriptLog::new(&folder.join("script.log"));
    let mut end = listen(&lines, &mut script);
    drop(qemu);
    if let End::Failed(why) | End::Stalled(why) = &mut end {
        why.push_str(&tails(folder, &["kernel.log", "qemu.log", "script.log"]));
    }
    Run { lines: script.lines, end }
}

fn lines_of(child: &mut Child) -> Receiver<String> {
    let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
    let (line, lines) = channel();
    std::thread::spawn(move || {
        // Firmware and guests may write bytes that are not UTF-8.
        for bytes in stdout.split(b'\n').map_while(Result::ok) {
            let text = String::from_utf8_lossy(&bytes).trim_end_matches('\r').to_owned();
            if line.send(text).is_err() {
                return;
            }
        }
    });
    lines
}

/// The lines said so far, also logged to a file, each with the time since the start.
struct ScriptLog {
    lines: Vec<String>,
    log: File,
    start: Instant,
}

impl ScriptLog {
    fn new(log: &Path) -> Self {
        let log = File::create(log).expect("the folder is writable");
        Self { lines: Vec::new(), log, start: Instant::now() }
    }

    fn add(&mut self, line: String) {
        writeln!(self.log, "{:7.2} {line}", self.start.elapsed().as_secs_f64())
            .expect("the folder is writable");
        self.lines.push(line);
    }
}

fn listen(lines: &Receiver<String>, script: &mut ScriptLog) -> End {
    let mut trouble = None;
    loop {
        let left = RUN_MAX.saturating_sub(script.start.elapsed());
        match lines.recv_timeout(QUIET_MAX.min(left)) {
            Ok(line) => {
                // The first one counts; the lines after it only add details.
                if let Some(why) = line.strip_prefix("TEST failed ") {
                    trouble.get_or_insert_with(|| End::Failed(why.to_owned()));
                } else if let Some(who) = line.strip_prefix("TEST stalled ") {
                    trouble.get_or_insert_with(|| End::Stalled(who.to_owned()));
                }
                let over = line == "TEST over";
                script.add(line);
                if over {
                    return trouble.unwrap_or(End::Done);
                }
            }
            Err(RecvTimeoutError::Timeout) if script.start.elapsed() >= RUN_MAX => {
                return trouble
                    .unwrap_or_else(|| End::Failed(format!("not done within {RUN_MAX:?}")));
            }
            Err(RecvTimeoutError::Timeout) => {
                let last = script.lines.last().map_or("nothing", String::as_str);
                let why = format!("the machine said nothing for {QUIET_MAX:?}, and before: {last}");
                return trouble.unwrap_or(End::Stalled(why));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return trouble.unwrap_or_else(|| {
                    End::Failed("the machine went off before its script was over".to_owned())
                });
            }
        }
    }
}

fn tails(folder: &Path, names: &[&str]) -> String {
    let tail = |path: &PathBuf| {
        let bytes = fs::read(path).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    };
    names
        .iter()
        .map(|name| folder.join(name))
        .map(|path| format!("\n--- the end of {} ---\n{}", path.display(), tail(&path)))
        .collect()
}
