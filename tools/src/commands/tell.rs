//! What a VM's process reports while the VM runs: events with `--json`, sentences otherwise. Each
//! names the VM, since with `--clones` many share one output.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use frazil_vmm::keeper::Kept;
use frazil_vmm::scheduler::{ScheduleEvent, SkipReason};
use frazil_vmm::{CheckpointReport, Vm, VmmError};
use serde_json::{Value, json};

use crate::output;

/// How often a recurring failure is reported.
const REPEAT_AFTER: Duration = Duration::from_secs(10);

/// Reports what happens to one VM.
#[derive(Clone)]
pub(super) struct EventPrinter {
    vm: Arc<Vm>,
    json: bool,
}

impl EventPrinter {
    pub(super) fn new(vm: &Arc<Vm>, json: bool) -> Self {
        Self { vm: Arc::clone(vm), json }
    }

    /// Prints an event of this name with the fields of `event`.
    fn event(&self, name: &str, mut event: Value) {
        event["event"] = Value::from(name);
        event["vm"] = Value::from(self.vm.name());
        outln!("{event}");
    }

    /// Reports that something failed; repetitions of the same failure only every `REPEAT_AFTER`.
    fn complain(&self, what: &'static str, error: &str) {
        static LAST: Mutex<BTreeMap<&str, (String, Instant)>> = Mutex::new(BTreeMap::new());
        let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
        let repeated = last
            .get(what)
            .is_some_and(|(said, when)| said == error && when.elapsed() < REPEAT_AFTER);
        if !repeated {
            last.insert(what, (error.to_owned(), Instant::now()));
            errln!("frazil: VM `{}`: {what}, the guest goes on: {error}", self.vm.name());
        }
    }

    /// Reports a checkpoint that was taken, or why it was not.
    pub(super) fn checkpoint(&self, taken: &frazil_vmm::Result<CheckpointReport>) {
        match taken {
            Ok(report) if self.json => {
                if let Ok(event) = serde_json::to_value(report) {
                    self.event("checkpoint", event);
                }
            }
            Ok(_) => {}
            Err(error) if self.json => {
                if self.was_given_up(error) {
                    self.event("checkpoint_cancelled", json!({}));
                } else {
                    self.event("checkpoint_failed", json!({"error": error.to_string()}));
                }
            }
            // The VM has ended, so nobody misses the checkpoint.
            Err(_) if self.vm.ended().is_some() => {}
            Err(error) if error.is_cancelled() => {
                self.complain("checkpoint not taken", &error.to_string());
            }
            Err(error) => self.complain("checkpoint failed", &error.to_string()),
        }
    }

    /// True if the VM counts the checkpoint as cancelled rather than failed.
    fn was_given_up(&self, error: &VmmError) -> bool {
        error.is_cancelled() || self.vm.ended().is_some()
    }

    /// Reports an event of the scheduler.
    pub(super) fn schedule(&self, event: &ScheduleEvent<'_>) {
        match event {
            ScheduleEvent::Checkpoint(taken) => self.checkpoint(taken),
            ScheduleEvent::Skipped { count, because } if self.json => {
                self.event("checkpoints_skipped", json!({"count": count, "because": because}));
            }
            ScheduleEvent::Skipped { count, because } => errln!(
                "frazil: VM `{}`: {} checkpoint{} skipped because {}",
                self.vm.name(),
                output::count(*count),
                if *count == 1 { "" } else { "s" },
                match because {
                    SkipReason::NotDone =>
                        "another was still being taken: the store is slower than \
                         --checkpoint-every asks for",
                    SkipReason::Quiet =>
                        "another was waiting for a quiet moment: --checkpoint-quiet lets it wait \
                         longer than --checkpoint-every",
                    SkipReason::Failed =>
                        "the previous one did not succeed: the next is tried after a delay",
                }
            ),
            ScheduleEvent::Died if self.json => self.event("checkpoints_stopped", json!({})),
            ScheduleEvent::Died => errln!(
                "frazil: VM `{}`: --checkpoint-every takes no more checkpoints, the guest goes on: \
                 this is a bug",
                self.vm.name()
            ),
        }
    }

    /// Reports that the retention rules were applied, or why they could not be.
    pub(super) fn kept(&self, kept: &frazil_vmm::Result<Kept>) {
        match kept {
            Ok(Kept { forgotten, left, pruned }) if self.json => {
                self.event("kept", json!({"forgotten": forgotten, "left": left, "prune": pruned}));
            }
            Ok(_) => {}
            Err(error) if self.json => {
                self.event("keep_failed", json!({"error": error.to_string()}));
            }
            Err(error) => {
                self.complain("cannot apply the rules for keeping snapshots", &error.to_string());
            }
        }
    }
}
