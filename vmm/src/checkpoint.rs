//! Taking a checkpoint of a running guest.
//!
//! [`Vm::checkpoint`] is the list of phases; each is a function below.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use frazil_snapstore::{
    Description, Page, PageSet, PageSource, Progress, RegionHandle, SnapshotId, StateChunk, Store,
    StoreError, Transaction, WriteStats, unix_ms,
};
use serde::{Deserialize, Serialize};

use crate::devices::platform::{self, CapturedPlatform};
use crate::error::{Result, VmmError};
use crate::memory::{GuestRam, RAM_REGION};
use crate::state::chunk;
use crate::turns::Turn;
use crate::vcpu::{CapturedVcpu, Ended};
use crate::vm::{Line, MACHINE_CHUNK, Vm, vcpu_chunk};

/// Pre-copy stops when a round finds no more pages than this: they are copied in the pause.
const FEW_PAGES: u64 = 256;
/// A guest that writes faster than rounds catch up is cut after so many.
const MAX_ROUNDS: usize = 6;

/// What is asked of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointRequest {
    /// What the user says about it.
    pub message: String,
    /// A tag to point to it.
    pub tag: Option<String>,
    /// End the VM once the snapshot is published.
    pub exit: bool,
}

/// One pre-copy round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    /// Pages it found dirty and wrote.
    pub pages: u64,
    /// Bytes it appended.
    pub stored_bytes: u64,
    /// How long it took, in microseconds.
    pub us: u64,
}

/// What a checkpoint came to. Kept in the snapshot's manifest, up to the commit's own figures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointStats {
    /// Bytes of RAM.
    pub ram_bytes: u64,
    /// Distinct pages that changed since the parent.
    pub dirty_pages: u64,
    /// Of what was looked at, pages that were all zero.
    pub zero_pages: u64,
    /// Pages that were what they had been before.
    #[serde(default)]
    pub equal_pages: u64,
    /// Pages that were in the store already.
    #[serde(default)]
    pub dedup_pages: u64,
    /// Pages written as the difference from what they had been.
    #[serde(default)]
    pub delta_pages: u64,
    /// Pages written while the guest ran, some of them more than once.
    pub precopied_pages: u64,
    /// Pages copied in the pause.
    pub cut_pages: u64,
    /// Bytes of compressed pages appended.
    pub frame_bytes: u64,
    /// Pre-copy rounds.
    pub rounds: Vec<Round>,
    /// From the first kick until every vCPU was on its way again, in microseconds.
    pub pause_us: u64,
    /// Of which: until every vCPU stood still with its state read.
    pub quiesce_us: u64,
    /// Of which: last harvest, copying, device state.
    pub cut_us: u64,
    /// Of which: until every vCPU was on its way again; 0 if the guest does not go on.
    pub go_on_us: u64,
    /// Pre-copy, in microseconds.
    pub precopy_us: u64,
}

/// A published checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointReport {
    /// The VM's name.
    pub vm: String,
    /// The snapshot.
    pub id: SnapshotId,
    /// The snapshot it changed.
    pub parent: Option<SnapshotId>,
    /// When it was cut, Unix milliseconds.
    pub time_unix_ms: u64,
    /// Figures kept in the manifest.
    #[serde(flatten)]
    pub stats: CheckpointStats,
    /// Bytes of tree nodes, state and manifest.
    pub meta_bytes: u64,
    /// All it took on the medium: `frame_bytes + meta_bytes`.
    pub stored_bytes: u64,
    /// Encoding the rest, writing trees and state, making durable, publishing; in microseconds.
    pub commit_us: u64,
    /// Of which making durable and publishing.
    pub sync_us: u64,
    /// From the request to the publication, in microseconds.
    pub duration_us: u64,
    /// Why the tag could not be set, if it was asked for and could not. The snapshot is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag_failure: Option<String>,
}

/// Where the checkpoint being taken is; for progress bars.
#[derive(Debug, Default)]
pub struct CheckpointProgress {
    current: Mutex<Option<Arc<Progress>>>,
}

/// How far a checkpoint has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgressReport {
    /// Pages to write, as far as is known.
    pub pages_total: u64,
    /// Pages written.
    pub pages_done: u64,
    /// Bytes appended for them.
    pub stored_bytes: u64,
    /// It is being given up.
    #[serde(default)]
    pub cancelled: bool,
}

impl CheckpointProgress {
    fn set(&self, progress: Option<Arc<Progress>>) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = progress;
    }

    /// Makes the checkpoint being taken fail, if one is.
    pub fn cancel(&self) {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.iter().for_each(|progress| progress.cancel());
    }

    /// How far the checkpoint being taken has come, if one is.
    #[must_use]
    pub fn report(&self) -> Option<ProgressReport> {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.as_ref().map(|progress| ProgressReport {
            pages_total: progress.pages_total.load(Ordering::Relaxed),
            pages_done: progress.pages_done.load(Ordering::Relaxed),
            stored_bytes: progress.stored_bytes.load(Ordering::Relaxed),
            cancelled: progress.is_cancelled(),
        })
    }
}

/// What a VM's checkpoints came to together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointTotals {
    /// Published.
    pub taken: u64,
    /// Failed; the dirty pages went into the next one.
    pub failed: u64,
    /// Given up because somebody asked for that; the same goes for their pages.
    #[serde(default)]
    pub cancelled: u64,
    /// Periodic ones left out because the one before was not done.
    pub skipped: u64,
    /// Pages written.
    pub pages: u64,
    /// Bytes written.
    pub stored_bytes: u64,
    /// The longest pause, in microseconds.
    pub pause_us_max: u64,
}

/// What stood still at the cut: all that the commit needs, so that the guest can go on.
struct Cut {
    vcpus: Vec<CapturedVcpu>,
    platform: CapturedPlatform,
    devices: Vec<StateChunk>,
    time_unix_ms: u64,
}

/// A checkpoint being taken.
struct Checkpoint<'a> {
    vm: &'a Vm,
    request: &'a CheckpointRequest,
    line: MutexGuard<'a, Line>,
    transaction: Transaction,
    region: RegionHandle,
    /// Pages harvested and not written yet.
    waiting: PageSet,
    /// The guest stands still for `--exit`: it must go on if the commit fails.
    resume_after_failure: bool,
    started: Instant,
    stats: CheckpointStats,
}

impl Vm {
    /// Takes a checkpoint; the guest goes on while it is written, and afterwards.
    ///
    /// # Errors
    /// Nothing is published then, the guest goes on, and the pages that would have been saved are
    /// part of the next checkpoint.
    pub fn checkpoint(&self, request: &CheckpointRequest) -> Result<CheckpointReport> {
        self.checkpoint_in(&self.turns.checkpoint(), request)
    }

    fn checkpoint_in(
        &self,
        turn: &Turn<'_>,
        request: &CheckpointRequest,
    ) -> Result<CheckpointReport> {
        let taken = Checkpoint::begin(self, request, turn.since).and_then(|mut checkpoint| {
            checkpoint.precopy()?;
            let cut = checkpoint.quiesce_cut_and_go_on()?;
            checkpoint.commit(cut)
        });
        self.progress.set(None);
        let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        match &taken {
            Ok(report) => {
                totals.taken += 1;
                totals.pages += report.stats.precopied_pages + report.stats.cut_pages;
                totals.stored_bytes += report.stored_bytes;
                totals.pause_us_max = totals.pause_us_max.max(report.stats.pause_us);
                self.telemetry.record(report);
                turn.published();
                self.keeping.published();
            }
            Err(error) if error.is_cancelled() => totals.cancelled += 1,
            Err(_) => totals.failed += 1,
        }
        taken
    }

    /// As [`Self::checkpoint`], or None, counted as skipped, if one is being taken already.
    pub fn checkpoint_if_idle(
        &self,
        request: &CheckpointRequest,
    ) -> Option<Result<CheckpointReport>> {
        let turn = self.turns.checkpoint_if_none();
        if turn.is_none() {
            self.count_skipped(1);
        }
        turn.map(|turn| self.checkpoint_in(&turn, request))
    }

    /// Has the checkpoint that is being taken given up, and waits until it is: the guest goes on,
    /// and the pages are part of the next one. False if there is none, or it was published before
    /// it could be stopped.
    #[must_use]
    pub fn cancel_checkpoint(&self) -> bool {
        self.turns.cancel_checkpoint(|| self.progress.cancel())
    }

    /// How far the checkpoint being taken has come, if one is.
    #[must_use]
    pub fn checkpoint_progress(&self) -> Option<ProgressReport> {
        self.progress.report()
    }

    /// What its checkpoints came to so far.
    #[must_use]
    pub fn checkpoint_totals(&self) -> CheckpointTotals {
        *self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn count_skipped(&self, count: u64) {
        self.totals.lock().unwrap_or_else(PoisonError::into_inner).skipped += count;
    }

    /// The snapshot that the next checkpoint changes; None while one is being taken.
    #[must_use]
    pub fn head(&self) -> Option<SnapshotId> {
        self.line.try_lock().ok().and_then(|line| line.head)
    }
}

impl<'a> Checkpoint<'a> {
    fn begin(vm: &'a Vm, request: &'a CheckpointRequest, started: Instant) -> Result<Self> {
        vm.check_alive()?;
        let store = vm.store().ok_or_else(|| {
            VmmError::NotNow(format!("VM `{}` has no store: run it with --store DIR", vm.name()))
        })?;
        if let Some(tag) = &request.tag {
            frazil_snapstore::reference::check_tag(tag)?;
        }
        let line = vm.line.lock().unwrap_or_else(PoisonError::into_inner);
        let mut transaction = begin_transaction(store, line.head)?;
        let region = transaction.region(RAM_REGION, vm.ram().end_page())?;
        vm.progress.set(Some(transaction.progress()));
        if vm.turns.is_cancelled() {
            vm.progress.cancel();
        }
        let stats = CheckpointStats { ram_bytes: vm.ram().len_bytes(), ..CheckpointStats::new() };
        let waiting = PageSet::new(line.since_head.capacity());
        let resume_after_failure = false;
        Ok(Self {
            vm,
            request,
            line,
            transaction,
            region,
            waiting,
            resume_after_failure,
            started,
            stats,
        })
    }

    /// Phase 1, the guest runs: writes what is dirty, then what became dirty meanwhile, as long
    /// as that gets less.
    fn precopy(&mut self) -> Result<()> {
        let mut previous = u64::MAX;
        let started = Instant::now();
        for round in 0..MAX_ROUNDS {
            let mut fresh = PageSet::new(self.line.since_head.capacity());
            self.line.harvest(&mut fresh)?;
            // The first round writes all that the parent lacks, also what an earlier checkpoint
            // harvested and failed to publish.
            let pages = if round == 0 { self.line.since_head.clone() } else { fresh };
            let count = pages.count();
            if count <= FEW_PAGES || count > previous / 2 {
                // Another round does not pay: what this one found waits for the cut.
                self.waiting = pages;
                break;
            }
            let round_started = Instant::now();
            let written =
                self.transaction.write_pages(self.region, &pages, self.vm.ram().as_ref())?;
            self.stats.precopied(written, round_started.elapsed());
            previous = count;
        }
        self.stats.precopy_us = us(started.elapsed());
        Ok(())
    }

    /// Phases 2 to 4. Whatever happens, a guest that ran goes on running, unless it is to exit
    /// and the cut succeeded.
    fn quiesce_cut_and_go_on(&mut self) -> Result<Cut> {
        let mut paused = self.vm.paused();
        let pause_started = Instant::now();
        let quiesced = self.vm.vcpus.pause(true);
        self.stats.quiesce_us = us(pause_started.elapsed());
        let cut_started = Instant::now();
        let cut = quiesced.and_then(|()| self.cut());
        self.stats.cut_us = us(cut_started.elapsed());
        self.resume_after_failure = self.request.exit && cut.is_ok() && !*paused;
        if self.resume_after_failure {
            // For everybody else it stands still by the user's wish from here on.
            self.vm.set_paused(&mut paused, true);
        } else if !*paused {
            let go_on_started = Instant::now();
            self.vm.vcpus.resume();
            self.stats.go_on_us = us(go_on_started.elapsed());
        }
        self.stats.pause_us = us(pause_started.elapsed());
        cut
    }

    /// Phase 3, the guest stands still.
    fn cut(&mut self) -> Result<Cut> {
        // Into the set that is there: nothing is allocated for it in the pause.
        self.line.harvest(&mut self.waiting)?;
        let left = std::mem::take(&mut self.waiting);
        self.stats.cut_pages = left.count();
        self.line.staged.copy(left, self.vm.ram()).map_err(VmmError::host("copy guest pages"))?;
        Ok(Cut {
            vcpus: self.vm.vcpus.take_captured()?,
            platform: platform::capture(&self.vm.shell.fd)?,
            devices: self.vm.bus.snapshot()?,
            time_unix_ms: unix_ms(),
        })
    }

    /// Phase 5, the guest runs.
    fn commit(self, cut: Cut) -> Result<CheckpointReport> {
        let (vm, request, resume) = (self.vm, self.request, self.resume_after_failure);
        let taken = self.publish(cut);
        match &taken {
            Ok(_) if request.exit => vm.vcpus.end(Ended::Suspended),
            Err(_) if resume => vm.go()?,
            _ => {}
        }
        taken
    }

    fn publish(mut self, cut: Cut) -> Result<CheckpointReport> {
        let commit_started = Instant::now();
        let staged = &self.line.staged;
        let written = self.transaction.write_pages(self.region, &staged.set, staged)?;
        self.stats.count(&written);
        self.stats.dirty_pages = self.line.since_head.count();
        let description = Description {
            name: self.vm.name().to_owned(),
            message: self.request.message.clone(),
            tag: self.request.tag.clone(),
            time_unix_ms: cut.time_unix_ms,
            state: encode_state(self.vm, &cut)?,
            stats: serde_json::to_value(&self.stats)
                .map_err(|error| VmmError::Config(format!("cannot encode statistics: {error}")))?,
            pin: true,
        };
        let committed = self.transaction.commit(description)?;
        let parent = self.line.head.replace(committed.id);
        self.line.head_pin = committed.pin;
        // Only now: the snapshot that holds them is published. Whatever the guest wrote since the
        // cut is still in KVM's log, and what the VMM wrote in its own.
        self.line.since_head.clear();
        self.line.staged.trim();
        Ok(CheckpointReport {
            vm: self.vm.name().to_owned(),
            id: committed.id,
            parent,
            time_unix_ms: cut.time_unix_ms,
            meta_bytes: committed.meta_bytes,
            stored_bytes: committed.frame_bytes + committed.meta_bytes,
            commit_us: us(commit_started.elapsed()),
            sync_us: committed.sync_us,
            tag_failure: committed.tag_failure,
            duration_us: us(self.started.elapsed()),
            stats: self.stats,
        })
    }
}

impl CheckpointStats {
    fn new() -> Self {
        Self {
            ram_bytes: 0,
            dirty_pages: 0,
            zero_pages: 0,
            equal_pages: 0,
            dedup_pages: 0,
            delta_pages: 0,
            precopied_pages: 0,
            cut_pages: 0,
            frame_bytes: 0,
            rounds: Vec::new(),
            pause_us: 0,
            quiesce_us: 0,
            cut_us: 0,
            go_on_us: 0,
            precopy_us: 0,
        }
    }

    fn precopied(&mut self, written: WriteStats, took: Duration) {
        self.rounds.push(Round {
            pages: written.pages,
            stored_bytes: written.stored_bytes,
            us: us(took),
        });
        self.precopied_pages += written.pages;
        self.count(&written);
    }

    fn count(&mut self, written: &WriteStats) {
        self.zero_pages += written.zero_pages;
        self.equal_pages += written.equal_pages;
        self.dedup_pages += written.dedup_pages;
        self.delta_pages += written.delta_pages;
        self.frame_bytes += written.stored_bytes;
    }
}

/// Starts a transaction; after an I/O error in an earlier one, on a store looked at afresh.
fn begin_transaction(store: &Arc<Store>, parent: Option<SnapshotId>) -> Result<Transaction> {
    match store.begin(parent) {
        Err(error @ StoreError::Latched { .. }) => {
            tracing::warn!(%error, "reopening the store");
            store.reopen()?;
            Ok(store.begin(parent)?)
        }
        other => Ok(other?),
    }
}

fn encode_state(vm: &Vm, cut: &Cut) -> Result<Vec<StateChunk>> {
    let mut chunks = vec![chunk(MACHINE_CHUNK, vm.machine())?];
    for (index, vcpu) in cut.vcpus.iter().enumerate() {
        chunks.push(chunk(&vcpu_chunk(index), &vcpu.save())?);
    }
    chunks.extend(cut.platform.save()?);
    chunks.extend(cut.devices.iter().cloned());
    Ok(chunks)
}

/// Pages copied in the pause. Kept from one checkpoint to the next, since fresh memory costs more
/// than the copy.
#[derive(Debug, Default)]
pub(crate) struct StagedPages {
    set: PageSet,
    numbers: Vec<u64>,
    contents: Vec<Page>,
}

/// What a VM keeps of it between checkpoints at the most: 64 MiB.
const STAGED_PAGES_KEPT_MAX: usize = 16_384;

impl StagedPages {
    fn copy(&mut self, set: PageSet, ram: &GuestRam) -> io::Result<()> {
        self.numbers.clear();
        self.numbers.extend(set.iter());
        self.set = set;
        if self.contents.len() < self.numbers.len() {
            self.contents.resize(self.numbers.len(), [0; frazil_snapstore::PAGE_SIZE]);
        }
        for (number, page) in self.numbers.iter().zip(&mut self.contents) {
            ram.read_page(*number, page)?;
        }
        Ok(())
    }

    fn trim(&mut self) {
        self.contents.truncate(STAGED_PAGES_KEPT_MAX);
        self.contents.shrink_to(STAGED_PAGES_KEPT_MAX);
    }
}

impl PageSource for StagedPages {
    fn read_page(&self, page: u64, buf: &mut Page) -> io::Result<()> {
        let index = self
            .numbers
            .binary_search(&page)
            .map_err(|_| io::Error::other(format!("page {page} was not copied")))?;
        buf.copy_from_slice(&self.contents[index]);
        Ok(())
    }
}

fn us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
