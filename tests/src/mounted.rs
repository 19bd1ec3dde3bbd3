//! A `frazil mount` in another process.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::vm_harness::{number, text, wait_for};

/// True if `fusermount3` is installed, with which users other than root mount.
#[must_use]
pub fn has_helper() -> bool {
    Command::new("fusermount3").arg("-V").output().is_ok()
}

/// A running `frazil mount`; killed and unmounted when dropped.
#[derive(Debug)]
pub struct Mounted {
    /// The process.
    pub child: Child,
    /// The mount point.
    pub folder: PathBuf,
    stdout: BufReader<ChildStdout>,
}

impl Mounted {
    /// Starts `command`, a `frazil mount --json` at `folder`, and waits until it has mounted.
    ///
    /// # Panics
    /// If it does not mount, with what it printed on standard error; if it reports another process
    /// id or folder than its own.
    #[must_use]
    pub fn start(mut command: Command, folder: &Path) -> Self {
        let spawned = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.expect("it starts");
        let mut stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut line = String::new();
        stdout.read_line(&mut line).expect("it says something");
        if line.is_empty() {
            let output = child.wait_with_output().expect("it ended");
            panic!("{}", String::from_utf8_lossy(&output.stderr));
        }
        let said: Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(number(&said, "pid"), u64::from(child.id()));
        assert_eq!(text(&said, "folder"), folder.canonicalize().expect("it").to_str().expect("it"));
        Self { child, folder: folder.to_owned(), stdout }
    }

    /// Returns the path of `name` in the mounted folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Sends the process a signal.
    ///
    /// # Panics
    /// If the process has ended.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it is there");
    }

    /// Waits for the process to end; returns its exit code and its standard error.
    ///
    /// # Panics
    /// If it does not end, or printed more than one object.
    pub fn end(&mut self) -> (Option<i32>, String) {
        let status = wait_for("the end of frazil mount", || self.child.try_wait().expect("ours"));
        let mut said = String::new();
        let mut stderr = self.child.stderr.take().expect("a pipe");
        stderr.read_to_string(&mut said).expect("UTF-8");
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).expect("UTF-8");
        assert_eq!(rest, "", "one object and no more");
        (status.code(), said)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _reaped = self.child.wait();
        let _unmounted_already =
            Command::new("umount").args(["-l", "-q"]).arg(&self.folder).status();
    }
}
