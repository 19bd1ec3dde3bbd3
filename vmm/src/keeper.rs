//! Retention for a running VM: forgets the snapshots that a policy does not keep and reclaims their
//! space, between checkpoints.
//!
//! Forgetting is an append to the journal, and takes a turn among the checkpoints. Pruning may take
//! long, so it starts only when it pays, moves a limited amount, and gives way to a waiting
//! checkpoint. If it never finished, the store would keep growing: so each interrupted prune gives
//! the next one more time before it has to give way. The rest between prunes grows with that time,
//! so that checkpoints wait for only a small share of the time.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use frazil_snapstore::retention::{Candidate, Policy, TimeZone, decide};
use frazil_snapstore::{
    PruneOptions, PruneProgress, PruneReport, SnapshotId, SnapshotInfo, Store, StoreError,
};
use serde::{Deserialize, Serialize};

use crate::checkpoint::stored_bytes;
use crate::error::{Result, VmmError};
use crate::vm::Vm;

/// Shortest time between two applications of the policy, however many checkpoints there are.
const REST: Duration = Duration::from_secs(1);
/// Shortest rest between two prunes.
const PRUNE_REST_MIN: Duration = Duration::from_secs(5);
/// That rest is also at least this many times as long as a checkpoint may have waited for the first
/// of the two.
const PRUNE_REST_FACTOR: u32 = 10;
/// How long the prune after an interrupted one continues before it gives way. This doubles with
/// each interruption in a row.
const PATIENCE_MIN: Duration = Duration::from_millis(100);
/// The longest that a prune continues before it gives way.
const PATIENCE_MAX: Duration = Duration::from_secs(5);
/// Pruning looks at every kept snapshot, which fewer forgotten ones than this are not worth.
const PRUNE_SNAPSHOTS_MIN: u64 = 16;
/// Forgotten snapshots with this many bytes are worth a prune, however few they are.
const PRUNE_BYTES_MIN: u64 = 64 << 20;
/// The most that one prune moves; the rest is left to the next.
const PRUNE_REWRITE_MAX_BYTES: u64 = 256 << 20;
/// Unused bytes that may stay, as a share of those in use: the last ones cost most to reclaim.
const PRUNE_MAX_UNUSED: f64 = 0.25;
/// Niceness of the pruning thread. Below the maximum, since a checkpoint waits until this thread
/// has noticed that it must give way.
const PRUNE_NICENESS: i32 = 10;

/// Called after the policy was applied, if that changed anything or failed.
pub type OnKept = Box<dyn Fn(&Result<Kept>) + Send>;

/// What one application of the policy did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Snapshots forgotten.
    pub forgotten: u64,
    /// Snapshots of this VM that are left.
    pub left: u64,
    /// The prune's report, if the store was pruned.
    pub pruned: Option<PruneReport>,
}

/// What applying the policy has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepTotals {
    /// Snapshots forgotten.
    pub forgotten: u64,
    /// Prunes that were completed.
    pub prunes: u64,
    /// Bytes that they reclaimed.
    pub pruned_bytes: u64,
    /// Prunes that gave way to a checkpoint.
    pub interrupted: u64,
    /// Times that forgetting or pruning failed.
    pub failed: u64,
}

/// The part of retention that belongs to the VM.
#[derive(Debug, Default)]
pub(crate) struct Keeping {
    /// None if there is no policy.
    totals: Mutex<Option<KeepTotals>>,
    wake: Mutex<Option<Sender<()>>>,
}

impl Keeping {
    /// Tells the keeper that a snapshot was published.
    pub fn tell_published(&self) {
        let wake = self.wake.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(wake) = wake.as_ref() {
            // If the channel is full, the keeper has yet to wake for an earlier snapshot, and will
            // see both.
            let _full = wake.try_send(());
        }
    }

    fn totals(&self) -> MutexGuard<'_, Option<KeepTotals>> {
        self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, count: impl FnOnce(&mut KeepTotals)) {
        count(self.totals().get_or_insert_default());
    }
}

impl Vm {
    /// What retention has done so far, if there is a policy.
    #[must_use]
    pub fn keep_totals(&self) -> Option<KeepTotals> {
        *self.keeping.totals()
    }
}

/// Applies a retention policy to a running VM's snapshots until dropped, and once more then.
#[derive(Debug)]
pub struct Keeper {
    vm: Arc<Vm>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Starts applying `policy`, in local time, to the snapshots that have the name of `vm`. Tagged
    /// snapshots are always kept.
    ///
    /// # Errors
    /// [`VmmError::NotNow`] if the VM has no store; [`VmmError::Host`] if the thread cannot be
    /// started.
    pub fn start(vm: Arc<Vm>, policy: Policy, on_kept: OnKept) -> Result<Self> {
        let store = vm.store().map(Arc::clone).ok_or_else(|| {
            VmmError::NotNow(format!("VM `{}` has no store to keep snapshots in", vm.name()))
        })?;
        let (stop, stopped) = crossbeam_channel::bounded::<()>(0);
        let (wake, woken) = crossbeam_channel::bounded::<()>(1);
        vm.keeping.count(|_| {});
        // There may be snapshots from before.
        let _first = wake.try_send(());
        *vm.keeping.wake.lock().unwrap_or_else(PoisonError::into_inner) = Some(wake);
        let work = Work {
            vm: Arc::clone(&vm),
            store,
            policy,
            on_kept,
            known: HashMap::new(),
            pruning: Pruning::default(),
        };
        let thread = std::thread::Builder::new()
            .name("frazil-keep".into())
            .spawn(move || work.run(&stopped, &woken))
            .map_err(VmmError::host("start the thread that applies the retention policy"))?;
        Ok(Self { vm, stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop = None;
        self.vm.turns.end_prunes();
        *self.vm.keeping.wake.lock().unwrap_or_else(PoisonError::into_inner) = None;
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the panic hook.
            let _joined = thread.join();
        }
    }
}

/// What is known of a snapshot from its manifest.
#[derive(Clone, Copy, Debug)]
struct Known {
    /// Whether it has this VM's name.
    ours: bool,
    /// Bytes that it added to the store; those that other snapshots share are not reclaimed.
    stored_bytes: u64,
}

/// The keeper's thread.
struct Work {
    vm: Arc<Vm>,
    store: Arc<Store>,
    policy: Policy,
    on_kept: OnKept,
    /// The snapshots in the store; None for those whose manifest is damaged.
    known: HashMap<SnapshotId, Option<Known>>,
    pruning: Pruning,
}

impl Work {
    fn run(mut self, stopped: &Receiver<()>, woken: &Receiver<()>) {
        loop {
            // Wakes for each snapshot, and now and then while there is something left to prune.
            crossbeam_channel::select! {
                recv(stopped) -> _ => break,
                recv(woken) -> _ => {}
                default(if self.pruning.wanted { REST } else { Duration::MAX }) => {}
            }
            self.apply(true);
            if stopped.recv_timeout(REST) != Err(RecvTimeoutError::Timeout) {
                break;
            }
        }
        // For snapshots published since then. Without pruning: somebody waits for the VM to end.
        if woken.try_recv() != Err(TryRecvError::Empty) {
            self.apply(false);
        }
    }

    /// Applies the policy and reports what that did.
    fn apply(&mut self, prune: bool) {
        let mut kept = Kept::default();
        let done = self
            .forget(&mut kept)
            .and_then(|()| if prune { self.prune_if_it_pays(&mut kept) } else { Ok(()) });
        self.vm.keeping.count(|totals| {
            totals.forgotten += kept.forgotten;
            if let Some(report) = kept.pruned {
                totals.prunes += 1;
                totals.pruned_bytes += report.bytes_before.saturating_sub(report.bytes_after);
            }
            totals.failed += u64::from(done.is_err());
        });
        if kept.forgotten > 0 || kept.pruned.is_some() {
            (self.on_kept)(&Ok(kept));
        }
        if let Err(error) = done {
            (self.on_kept)(&Err(error.into()));
        }
    }

    fn forget(&mut self, kept: &mut Kept) -> Result<(), StoreError> {
        self.store.refresh()?;
        // Reads the manifests now, before the turn, so that checkpoints do not wait for that.
        if self.judge(kept).is_empty() {
            return Ok(());
        }
        let vm = Arc::clone(&self.vm);
        let forgotten = {
            let _turn = vm.turns.short_turn();
            let doomed = self.judge(kept);
            let forgotten = self.store.forget_untagged(&doomed);
            // Another process is writing, or forgot one of them: try again next time.
            match forgotten {
                Err(StoreError::Busy { .. } | StoreError::UnknownRef { .. }) => {
                    vm.keeping.tell_published();
                    return Ok(());
                }
                other => other?,
            }
        };
        kept.forgotten = forgotten.len() as u64;
        kept.left -= kept.forgotten;
        for id in forgotten {
            if let Some(Some(known)) = self.known.remove(&id) {
                self.pruning.forgotten(known.stored_bytes);
            }
        }
        Ok(())
    }

    /// The snapshots of this VM that the policy does not keep.
    fn judge(&mut self, kept: &mut Kept) -> Vec<SnapshotId> {
        let infos = self.store.snapshots();
        let there: HashSet<SnapshotId> = infos.iter().map(|info| info.id).collect();
        self.known.retain(|id, _| there.contains(id));
        let tagged: HashSet<SnapshotId> = self.store.tags().into_values().collect();
        let mut candidates = Vec::new();
        for info in &infos {
            let name = self.vm.name();
            let known = self.known.entry(info.id).or_insert_with(|| read(&self.store, info, name));
            if known.is_some_and(|known| known.ours) {
                candidates.push(Candidate {
                    id: info.id,
                    time_unix_ms: info.time_unix_ms,
                    group: name.to_owned(),
                    tagged: tagged.contains(&info.id),
                });
            }
        }
        kept.left = candidates.len() as u64;
        let verdicts = decide(&self.policy, &candidates, &TimeZone::system());
        verdicts.iter().filter(|verdict| !verdict.keep).map(|verdict| verdict.id).collect()
    }

    fn prune_if_it_pays(&mut self, kept: &mut Kept) -> Result<(), StoreError> {
        let now = Instant::now();
        if !self.pruning.is_due(self.store.snapshots().len() as u64, now) {
            return Ok(());
        }
        let patience = self.pruning.patience();
        let progress = Arc::new(PruneProgress::default());
        let Some(turn) = self.vm.turns.prune(&progress, patience) else { return Ok(()) };
        let pruned = prune_nicely(&self.store, &progress);
        drop(turn);
        let end = match &pruned {
            Ok(report) => {
                kept.pruned = Some(*report);
                PruneEnd::Done { bytes_after: report.bytes_after }
            }
            Err(StoreError::Cancelled(_)) => {
                self.vm.keeping.count(|totals| totals.interrupted += 1);
                PruneEnd::Interrupted
            }
            Err(StoreError::Busy { .. }) => PruneEnd::Busy,
            Err(_) => PruneEnd::Failed,
        };
        self.pruning.ended(end, Instant::now());
        match end {
            PruneEnd::Failed => pruned.map(drop),
            _ => Ok(()),
        }
    }
}

fn read(store: &Arc<Store>, info: &SnapshotInfo, name: &str) -> Option<Known> {
    // Whose a damaged snapshot is cannot be known: a person has to decide about it.
    let snapshot = store.snapshot(info.id).ok()?;
    let manifest = snapshot.manifest();
    Some(Known { ours: manifest.name == name, stored_bytes: stored_bytes(info, manifest) })
}

/// Prunes in a thread of its own, at low priority.
fn prune_nicely(store: &Arc<Store>, progress: &PruneProgress) -> Result<PruneReport, StoreError> {
    let options = PruneOptions {
        max_unused: PRUNE_MAX_UNUSED,
        max_rewrite_bytes: PRUNE_REWRITE_MAX_BYTES,
        dry_run: false,
    };
    std::thread::scope(|scope| {
        let prune = || {
            // On Linux this affects only the calling thread. If it fails, the thread keeps its
            // priority.
            let _as_nice_as_may_be = rustix::process::nice(PRUNE_NICENESS);
            store.prune(&options, progress)
        };
        let spawned =
            std::thread::Builder::new().name("frazil-prune".into()).spawn_scoped(scope, prune);
        match spawned {
            Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            Err(error) => {
                Err(StoreError::Invalid(format!("cannot start a thread to prune: {error}")))
            }
        }
    })
}

/// How a prune ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PruneEnd {
    Done {
        bytes_after: u64,
    },
    Interrupted,
    /// Another process was writing.
    Busy,
    Failed,
}

/// Decides when to prune, without pruning itself.
#[derive(Debug, Default)]
struct Pruning {
    /// Snapshots forgotten since the last prune that completed or failed.
    snapshots: u64,
    /// Bytes that they had added to the store.
    bytes: u64,
    /// Size of the store after the last completed prune, in bytes.
    bytes_after: u64,
    /// Whether there is enough to gain, as of the last [`Self::is_due`].
    wanted: bool,
    interrupted_in_a_row: u32,
    not_before: Option<Instant>,
}

impl Pruning {
    fn forgotten(&mut self, stored_bytes: u64) {
        self.snapshots += 1;
        self.bytes += stored_bytes;
    }

    /// True if it is time to prune: there must be enough to gain for looking at all `kept`
    /// snapshots, and the rest after the last prune must be over.
    fn is_due(&mut self, kept: u64, now: Instant) -> bool {
        self.wanted = self.snapshots > 0
            && (self.snapshots >= kept.max(PRUNE_SNAPSHOTS_MIN)
                || self.bytes >= PRUNE_BYTES_MIN.max(self.bytes_after / 4));
        self.wanted && self.not_before.is_none_or(|then| then <= now)
    }

    /// How long the next prune continues before it gives way.
    fn patience(&self) -> Duration {
        match self.interrupted_in_a_row {
            0 => Duration::ZERO,
            n => (PATIENCE_MIN * 2_u32.saturating_pow(n - 1).min(1 << 16)).min(PATIENCE_MAX),
        }
    }

    fn ended(&mut self, end: PruneEnd, now: Instant) {
        let rest = (self.patience() * PRUNE_REST_FACTOR).max(PRUNE_REST_MIN);
        match end {
            PruneEnd::Interrupted => {
                self.interrupted_in_a_row = self.interrupted_in_a_row.saturating_add(1);
            }
            PruneEnd::Busy => {}
            // A failed prune is not retried until there is as much to gain once more.
            PruneEnd::Failed => *self = Self { bytes_after: self.bytes_after, ..Self::default() },
            PruneEnd::Done { bytes_after } => *self = Self { bytes_after, ..Self::default() },
        }
        self.not_before = Some(now + rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pruning_waits_until_there_is_enough_to_gain() {
        let now = Instant::now();
        let mut pruning = Pruning::default();
        assert!(!pruning.is_due(0, now), "nothing was forgotten");
        for _ in 0..PRUNE_SNAPSHOTS_MIN - 1 {
            pruning.forgotten(10);
        }
        assert!(!pruning.is_due(3, now), "a few small ones");
        pruning.forgotten(10);
        assert!(pruning.is_due(3, now));
        assert!(!pruning.is_due(1000, now), "many are kept, and all would be looked at");
        pruning.forgotten(PRUNE_BYTES_MIN);
        assert!(pruning.is_due(1000, now), "a large one is worth it alone");
        pruning.ended(PruneEnd::Done { bytes_after: 8 * PRUNE_BYTES_MIN }, now);
        pruning.forgotten(PRUNE_BYTES_MIN);
        assert!(!pruning.is_due(1000, now + PRUNE_REST_MIN), "little of a large store");
        pruning.forgotten(PRUNE_BYTES_MIN);
        assert!(!pruning.is_due(1000, now), "it was just pruned");
        assert!(pruning.is_due(1000, now + PRUNE_REST_MIN));
    }

    #[test]
    fn one_that_is_interrupted_again_and_again_gets_through_and_others_do_not_wait_often() {
        let mut now = Instant::now();
        let mut pruning = Pruning::default();
        (0..PRUNE_SNAPSHOTS_MIN).for_each(|_| pruning.forgotten(10));
        let mut before = Duration::ZERO;
        assert_eq!(pruning.patience(), before, "the first gives way at once");
        for _ in 0..100 {
            assert!(pruning.is_due(1, now));
            let patience = pruning.patience();
            assert!((before..=PATIENCE_MAX).contains(&patience));
            before = patience;
            pruning.ended(PruneEnd::Interrupted, now);
            let rest = (patience * PRUNE_REST_FACTOR).max(PRUNE_REST_MIN);
            assert!(!pruning.is_due(1, now + rest.mul_f64(0.99)));
            now += rest;
        }
        assert_eq!(pruning.patience(), PATIENCE_MAX);
        pruning.ended(PruneEnd::Busy, now);
        assert_eq!(pruning.patience(), PATIENCE_MAX, "nothing was learnt");
        pruning.ended(PruneEnd::Done { bytes_after: 1 }, now);
        assert_eq!(pruning.patience(), Duration::ZERO);
    }

    #[test]
    fn one_that_failed_is_not_tried_again_at_once() {
        let now = Instant::now();
        let mut pruning = Pruning::default();
        (0..PRUNE_SNAPSHOTS_MIN).for_each(|_| pruning.forgotten(10));
        pruning.ended(PruneEnd::Failed, now);
        let later = now + Duration::from_hours(1);
        assert!(!pruning.is_due(1, later) && !pruning.wanted);
        (0..PRUNE_SNAPSHOTS_MIN).for_each(|_| pruning.forgotten(10));
        assert!(pruning.is_due(1, later));
    }
}
