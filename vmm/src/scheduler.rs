//! Periodic checkpoints.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, Sender};

use crate::checkpoint::{CheckpointReport, CheckpointRequest};
use crate::error::{Result, VmmError};
use crate::vm::Vm;

/// Called after each periodic checkpoint.
pub type OnCheckpoint = Box<dyn Fn(&Result<CheckpointReport>) + Send>;

/// Takes a checkpoint every so often, until dropped. One that would have to start while another
/// is being written is left out and counted.
#[derive(Debug)]
pub struct Scheduler {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
    skipped: Arc<AtomicU64>,
}

impl Scheduler {
    /// Starts taking checkpoints of `vm` every `interval`.
    ///
    /// # Errors
    /// [`VmmError::Host`] if its thread cannot be started.
    pub fn start(vm: Arc<Vm>, interval: Duration, on_checkpoint: OnCheckpoint) -> Result<Self> {
        let (stop, stopped) = crossbeam_channel::bounded::<()>(0);
        let skipped = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&skipped);
        let thread = std::thread::Builder::new()
            .name("frazil-schedule".into())
            .spawn(move || {
                let mut due = Instant::now() + interval;
                while let Err(RecvTimeoutError::Timeout) =
                    stopped.recv_timeout(due.saturating_duration_since(Instant::now()))
                {
                    if vm.ended().is_some() {
                        return;
                    }
                    match vm.checkpoint_if_idle(&CheckpointRequest::default()) {
                        // Ended meanwhile: nothing failed.
                        Some(Err(_)) if vm.ended().is_some() => return,
                        Some(taken) => on_checkpoint(&taken),
                        None => {
                            counter.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    due += interval;
                    // Late: the moments that passed are left out, not made up for.
                    let now = Instant::now();
                    while due <= now {
                        due += interval;
                        counter.fetch_add(1, Ordering::Relaxed);
                        vm.count_skipped();
                    }
                }
            })
            .map_err(VmmError::host("start the scheduler's thread"))?;
        Ok(Self { stop: Some(stop), thread: Some(thread), skipped })
    }

    /// Checkpoints left out because the one before was not done in time.
    #[must_use]
    pub fn skipped(&self) -> u64 {
        self.skipped.load(Ordering::Relaxed)
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the panic hook.
            let _joined = thread.join();
        }
    }
}
