//! Leaves nothing behind when the user interrupts a run: no scratch files, no child processes.
//!
//! Errors unwind and drop what they own; signals do not, so what must be removed is also listed
//! here.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

static LEFTOVERS: Mutex<Leftovers> = Mutex::new(Leftovers { folder: None, child: None });

struct Leftovers {
    folder: Option<PathBuf>,
    child: Option<Pid>,
}

fn leftovers() -> MutexGuard<'static, Leftovers> {
    LEFTOVERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From here on, a signal removes what is listed and ends the process.
pub(crate) fn on_signals() -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot handle signals")?;
    std::thread::Builder::new()
        .name("bench-signals".into())
        .spawn(move || {
            if let Some(signal) = signals.forever().next() {
                // The lock is kept, so that nothing more can be listed.
                let left = leftovers();
                if let Some(child) = left.child {
                    let _gone = kill_process(child, Signal::KILL);
                }
                if let Some(folder) = &left.folder {
                    let _best_effort = std::fs::remove_dir_all(folder);
                }
                std::process::exit(128 + signal);
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}

/// Lists the scratch directory for removal.
pub(crate) fn remove_at_exit(folder: &Path) {
    leftovers().folder = Some(folder.to_path_buf());
}

/// Lists the running child process to be killed; None if there is none.
pub(crate) fn kill_at_exit(child: Option<Pid>) {
    leftovers().child = child;
}
