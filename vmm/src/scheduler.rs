//! Periodic checkpoints.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, Sender};

use crate::checkpoint::{CheckpointReport, CheckpointRequest};
use crate::error::{Result, VmmError};
use crate::vm::Vm;

/// Called after each periodic checkpoint.
pub type OnCheckpoint = Box<dyn Fn(&Result<CheckpointReport>) + Send>;

/// Takes a checkpoint every so often, until dropped. One that would have to start while another
/// is being written is left out, and counted among the VM's totals.
#[derive(Debug)]
pub struct Scheduler {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Scheduler {
    /// Starts taking checkpoints of `vm` every `interval`.
    ///
    /// # Errors
    /// [`VmmError::Host`] if its thread cannot be started.
    pub fn start(vm: Arc<Vm>, interval: Duration, on_checkpoint: OnCheckpoint) -> Result<Self> {
        let (stop, stopped) = crossbeam_channel::bounded::<()>(0);
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
                        None => {}
                    }
                    due += interval;
                    // Late: the moments that passed are left out, not made up for.
                    let now = Instant::now();
                    while due <= now {
                        due += interval;
                        vm.count_skipped();
                    }
                }
            })
            .map_err(VmmError::host("start the scheduler's thread"))?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
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
