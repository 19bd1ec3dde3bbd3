//! Taking a checkpoint of a running guest.
//!
//! [`Vm::checkpoint`] is the list of phases; each is a function below.

mod progress;
mod report;
mod staging;
mod throttle;

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use frazil_snapstore::cow::{CopyOnWrite, Protected};
use frazil_snapstore::{
    Description, PageSet, RegionHandle, SnapshotId, StateChunk, Store, StoreError, Transaction,
    unix_ms,
};

use crate::devices::CapturedDevices;
use crate::devices::platform::{self, CapturedPlatform};
use crate::disk::{DiskLine, FrozenDisk};
use crate::error::{Result, VmmError};
use crate::line::{AtRest, Line};
use crate::machine::MACHINE_CHUNK;
use crate::memory::RAM_REGION;
use crate::rebuild::vcpu_chunk;
use crate::state::chunk;
use crate::telemetry::Pause;
use crate::turns::Turn;
use crate::vcpu::{CapturedVcpu, Ended};
use crate::vm::{GoesOn, Vm};

pub use progress::{CheckpointProgress, ProgressReport};
pub use report::{
    CheckpointReport, CheckpointRequest, CheckpointStats, CheckpointTotals, Round, stored_bytes,
};
pub(crate) use staging::Staging;

/// With no more dirty pages than this, they are left to the pause: copying them takes about as long
/// as another harvest.
const FEW_PAGES: u64 = 32;
/// The most pages that should be left to the pause: copying them takes about a millisecond.
const CUT_PAGES_MAX: u64 = 2048;
/// Room for pages that are found only in the pause.
const CUT_ROOM_PAGES: usize = 1024;
/// The most copies of protected pages that the guest wants to change, as a multiple of the pages
/// that may be copied aside.
const COW_COPIES_FACTOR: usize = 4;
/// The most rounds: a guest that writes faster than they catch up is cut all the same.
const MAX_ROUNDS: usize = 6;
/// The `tracing` span that a checkpoint's thread is in while the guest is paused, and a vCPU's
/// thread while it reads its state in that pause.
pub const PAUSE_SPAN: &str = "pause";
/// The most room for copied pages that a VM keeps between checkpoints: 64 MiB.
const STAGING_PAGES_KEPT_MAX: usize = 16_384;

/// The state at the cut: everything the commit needs once the guest runs again.
struct Cut {
    vcpus: Vec<CapturedVcpu>,
    platform: CapturedPlatform,
    devices: CapturedDevices,
    disks: Vec<FrozenDisk>,
    /// Kept for a machine that is about to end: what its devices did after the cut would be lost,
    /// or be done again by the resumed machine.
    at_rest: AtRest,
    time_unix_ms: u64,
}

/// A checkpoint being taken.
struct Checkpoint<'a> {
    vm: &'a Vm,
    request: &'a CheckpointRequest,
    line: MutexGuard<'a, Line>,
    transaction: Transaction,
    region: RegionHandle,
    disk_regions: Vec<RegionHandle>,
    /// Pages harvested, but not yet written, copied or protected.
    waiting: PageSet,
    /// Pages left in place until they are written to the store.
    protected: Option<Protected>,
    /// The guest was stopped for `--exit` and must go on if the commit fails.
    resume_after_failure: bool,
    started: Instant,
    stats: CheckpointStats,
}

impl Vm {
    /// Takes a checkpoint. The guest runs while it is written and afterwards, unless the request
    /// says `exit`.
    ///
    /// # Errors
    /// On failure nothing is published, the guest goes on, and the pages that would have been saved
    /// are part of the next checkpoint.
    pub fn checkpoint(&self, request: &CheckpointRequest) -> Result<CheckpointReport> {
        self.checkpoint_in(&self.turns.checkpoint(), request)
    }

    fn checkpoint_in(
        &self,
        turn: &Turn<'_>,
        request: &CheckpointRequest,
    ) -> Result<CheckpointReport> {
        let mut pause = None;
        let taken = Checkpoint::begin(self, request, turn.since).and_then(|mut checkpoint| {
            checkpoint.precopy()?;
            let room = checkpoint.make_room()?;
            checkpoint.stage()?;
            let at_rest = self.is_paused();
            let cut = checkpoint.quiesce_cut_and_go_on(room);
            // The pause counts even if the checkpoint failed, unless the guest was paused anyway.
            pause = (!at_rest).then(|| Pause::of(&checkpoint.stats));
            let cut_at = Instant::now();
            let mut taken = checkpoint.commit(cut?);
            if let Some(pause) = pause.as_mut().filter(|_| request.exit) {
                // The guest stayed stopped until the commit was over.
                pause.us += taken.as_ref().map_or_else(|_| us(cut_at.elapsed()), |it| it.commit_us);
                taken.iter_mut().for_each(|report| report.stats.pause_us = pause.us);
            }
            taken
        });
        self.progress.set(None);
        self.line
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .staging
            .trim(STAGING_PAGES_KEPT_MAX);
        let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pause) = pause {
            totals.pause_us_max = totals.pause_us_max.max(pause.us);
            self.telemetry.record_pause(pause);
        }
        match &taken {
            Ok(report) => {
                totals.taken += 1;
                totals.pages += report.stats.precopied_pages + report.stats.commit_pages;
                totals.stored_bytes += report.stored_bytes;
                self.telemetry.record(report);
                turn.record_published();
                self.keeping.tell_published();
            }
            // Whatever the error, once the VM has ended the checkpoint counts as cancelled.
            Err(error) if error.is_cancelled() || self.ended().is_some() => totals.cancelled += 1,
            Err(_) => totals.failed += 1,
        }
        taken
    }

    /// As [`Self::checkpoint`], but returns None and counts a skipped checkpoint if one is being
    /// taken or is waiting already.
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

    /// Cancels the checkpoint that is being taken and waits until it is over: the guest goes on,
    /// and the pages are part of the next checkpoint. Returns false if there is none, or it was
    /// published before it could be cancelled.
    #[must_use]
    pub fn cancel_checkpoint(&self) -> bool {
        self.turns.cancel_checkpoint(|| self.progress.cancel())
    }

    /// The progress of the checkpoint being taken, if there is one.
    #[must_use]
    pub fn checkpoint_progress(&self) -> Option<ProgressReport> {
        self.progress.report()
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
        let mut line = vm.line.lock().unwrap_or_else(PoisonError::into_inner);
        let head = vm.head();
        if let (Some(id), None) = (head, &line.head_pin) {
            // The head could not be pinned when it was published. Without a pin it may be pruned.
            line.head_pin = store.pin(id)?.pin();
        }
        let mut transaction = begin_transaction(store, head)?;
        let region = transaction.region(RAM_REGION, vm.ram().end_page())?;
        let disk_regions = line
            .disks
            .iter()
            .map(|disk| disk.region(&mut transaction))
            .collect::<Result<Vec<_>>>()?;
        vm.progress.set(Some(transaction.progress()));
        if vm.turns.is_cancelled() {
            vm.progress.cancel();
        }
        let stats =
            CheckpointStats { ram_bytes: vm.ram().len_bytes(), ..CheckpointStats::default() };
        let waiting = PageSet::new(line.since_head.capacity());
        let resume_after_failure = false;
        Ok(Self {
            vm,
            request,
            line,
            transaction,
            region,
            disk_regions,
            waiting,
            protected: None,
            resume_after_failure,
            started,
            stats,
        })
    }

    /// Phase 1, while the guest runs: writes dirty pages to the store, as long as there are more
    /// than may be copied aside and each round at least halves them.
    fn precopy(&mut self) -> Result<()> {
        let started = Instant::now();
        self.line.harvest(&mut self.waiting)?;
        // All pages that the parent lacks, including those that an earlier checkpoint harvested and
        // failed to publish.
        self.waiting.union(&self.line.since_head);
        for _ in 0..MAX_ROUNDS {
            let pages = self.waiting.count();
            if pages <= self.vm.staging_pages() {
                break;
            }
            self.precopy_round()?;
            if self.waiting.count() > pages / 2 {
                // Another round would leave about as many again.
                break;
            }
        }
        self.stats.precopy_us = us(started.elapsed());
        Ok(())
    }

    /// Writes the waiting pages to the store, then harvests those dirtied in the meantime.
    fn precopy_round(&mut self) -> Result<()> {
        // Nobody needs this checkpoint if the machine has ended.
        self.vm.check_alive()?;
        let started = Instant::now();
        let ram = self.vm.ram().as_ref();
        let written = self.transaction.write_pages(self.region, &self.waiting, ram)?;
        self.stats.precopied(written, started.elapsed());
        self.waiting.clear();
        self.line.harvest(&mut self.waiting)
    }

    /// Phase 2, while the guest runs: copies the remaining pages aside, which is so fast that the
    /// guest dirties next to nothing in the meantime. If they are too many, protects them in place;
    /// where that is impossible, throttles the guest.
    fn stage(&mut self) -> Result<()> {
        let started = Instant::now();
        let pages = self.waiting.count();
        self.line.staging.clear();
        let few = pages <= self.vm.staging_pages();
        if few {
            self.line.staging.reserve(pages as usize);
            self.copy_aside()?;
        }
        // Either too many pages from the start, or the guest writes as fast as we copy.
        let too_many = !few || self.waiting.count() > CUT_PAGES_MAX;
        if too_many && !self.protect()? {
            self.slow_down_and_copy()?;
        }
        // Nothing is allocated in the pause, unless it finds more pages than this.
        self.line.staging.reserve(self.waiting.count() as usize + CUT_ROOM_PAGES);
        self.stats.stage_us = us(started.elapsed());
        Ok(())
    }

    /// Copies the waiting pages, then those dirtied in the meantime, for as long as each round at
    /// least halves them.
    fn copy_aside(&mut self) -> Result<()> {
        loop {
            let pages = self.waiting.count();
            self.copy_waiting()?;
            self.stats.staged_pages += pages;
            self.line.harvest(&mut self.waiting)?;
            let found = self.waiting.count();
            if found <= FEW_PAGES || found > pages / 2 {
                return Ok(());
            }
        }
    }

    /// Copies all waiting pages aside.
    fn copy_waiting(&mut self) -> Result<()> {
        self.line
            .staging
            .copy(&self.waiting, self.vm.ram())
            .map_err(VmmError::host("copy guest pages"))?;
        self.waiting.clear();
        Ok(())
    }

    /// Protects the waiting pages, then those dirtied in the meantime, until few are left or they
    /// no longer halve. Returns false if this host cannot protect pages.
    fn protect(&mut self) -> Result<bool> {
        let Some(cow) = self.vm.copy_on_write(&mut self.line.cow) else { return Ok(false) };
        let mut protected = cow.begin(self.vm.staging_pages() as usize * COW_COPIES_FACTOR);
        let mut handed = PageSet::new(self.waiting.capacity());
        for round in 1.. {
            let pages = self.waiting.count();
            handed.union(&self.waiting);
            if let Err(error) = protected.protect(&self.waiting) {
                // Pages protected so far are released, and wait again.
                tracing::warn!(%error, "cannot leave pages in place");
                self.line.cow = CowState::Unavailable;
                self.waiting = handed;
                return Ok(false);
            }
            self.waiting.clear();
            if round > MAX_ROUNDS {
                // The last pages found are protected; those dirtied since are left to the cut.
                break;
            }
            self.line.harvest(&mut self.waiting)?;
            let found = self.waiting.count();
            if found <= FEW_PAGES || found <= CUT_PAGES_MAX && found > pages / 2 {
                break;
            }
        }
        self.protected = Some(protected);
        Ok(true)
    }

    /// While the guest runs: allocates memory for the state that the cut will capture, so that
    /// nothing has to be allocated in the pause.
    fn make_room(&mut self) -> Result<Cut> {
        let vm = self.vm;
        vm.vcpus.prepare_capture()?;
        self.line.disks.iter_mut().for_each(DiskLine::prepare);
        Ok(Cut {
            vcpus: Vec::with_capacity(vm.vcpus.count()),
            platform: CapturedPlatform::default(),
            devices: vm.bus.room(),
            disks: Vec::with_capacity(self.line.disks.len()),
            at_rest: AtRest::room(&self.line, &vm.bus),
            time_unix_ms: 0,
        })
    }

    /// Phases 3 to 5. A guest that ran goes on whatever happens, unless it is to exit and the cut
    /// succeeded.
    fn quiesce_cut_and_go_on(&mut self, mut room: Cut) -> Result<Cut> {
        let mut paused = self.vm.paused();
        let pause_started = Instant::now();
        let _pause = tracing::trace_span!(PAUSE_SPAN).entered();
        // Resumes the vCPUs however this ends, even by a panic.
        let goes_on = (!*paused).then(|| GoesOn(&self.vm.vcpus));
        let quiesced = self.vm.vcpus.pause_and_capture();
        self.stats.quiesce_us = us(pause_started.elapsed());
        let cut_started = Instant::now();
        let cut = quiesced.and_then(|()| self.cut(&mut room));
        // Before the guest goes on, even after a failed cut.
        if cut.is_err() || !self.request.exit {
            room.at_rest.let_go();
        }
        self.stats.cut_us = us(cut_started.elapsed());
        if self.request.exit && cut.is_ok() {
            // The guest stays stopped until the commit is done, and nobody may resume it.
            self.vm.suspending.store(true, Ordering::Release);
            self.resume_after_failure = goes_on.is_some();
            std::mem::forget(goes_on);
            self.vm.set_paused(&mut paused, true);
        } else {
            let go_on_started = Instant::now();
            drop(goes_on);
            self.stats.go_on_us = us(go_on_started.elapsed());
        }
        self.stats.pause_us = us(pause_started.elapsed());
        cut.map(|()| room)
    }

    /// Phase 4, while the guest is paused: captures its state and the last dirty pages.
    fn cut(&mut self, cut: &mut Cut) -> Result<()> {
        // No request is in flight from here on, so memory, devices and disks agree.
        self.line.drain(&self.vm.bus, &mut cut.at_rest)?;
        // The set and the room for copies exist already: nothing is allocated.
        self.line.harvest_at_cut(&mut self.waiting)?;
        if let Some(protected) = &mut self.protected {
            protected.cut(&mut self.waiting);
        }
        self.stats.cut_pages = self.waiting.count();
        self.copy_waiting()?;
        for (disk, drained) in self.line.disks.iter_mut().zip(&cut.at_rest.disks) {
            cut.disks.push(disk.cut(drained)?);
        }
        // In the meantime each vCPU's thread reads its own state.
        cut.platform = platform::capture(&self.vm.shell.fd)?;
        self.vm.bus.capture(&mut cut.devices);
        self.vm.vcpus.take_captured(&mut cut.vcpus)?;
        cut.time_unix_ms = unix_ms();
        Ok(())
    }

    /// Phase 6, while the guest runs: writes and publishes the snapshot.
    fn commit(self, cut: Cut) -> Result<CheckpointReport> {
        let (vm, request, resume) = (self.vm, self.request, self.resume_after_failure);
        let taken = self.publish(cut);
        if taken.is_ok() && request.exit {
            vm.vcpus.end(Ended::Suspended);
        }
        vm.suspending.store(false, Ordering::Release);
        if taken.is_err()
            && resume
            && let Err(error) = vm.go()
        {
            // The VM has ended in the meantime, and why says more than the checkpoint's error.
            tracing::info!(%error, "cannot let the guest continue");
        }
        taken
    }

    /// Writes the protected pages, first because the guest may be waiting to change them, then the
    /// copied ones and those of disks.
    fn write_rest(&mut self, cut: &Cut) -> Result<()> {
        let (staged, mut set) = self.line.staging.finish(self.vm.ram().end_page());
        if let Some(mut protected) = self.protected.take() {
            // A page that was copied and dirtied again before it was protected: the copy is stale.
            set.subtract(protected.pages());
            self.stats.protected_pages = protected.pages().count();
            let written = protected.write(&mut self.transaction, self.region)?;
            self.stats.committed(&written);
            self.stats.cow_pages = protected.copied();
            self.stats.cow_waits = protected.waits().count;
            self.stats.cow_wait_us_max = us(protected.waits().longest);
        }
        let written = self.transaction.write_pages(self.region, &set, &staged)?;
        self.stats.committed(&written);
        for (disk, region) in cut.disks.iter().zip(&self.disk_regions) {
            let written = disk.write_to(&mut self.transaction, *region)?;
            self.stats.disk_pages += written.pages;
            self.stats.count(&written);
        }
        Ok(())
    }

    fn publish(mut self, cut: Cut) -> Result<CheckpointReport> {
        let commit_started = Instant::now();
        self.write_rest(&cut)?;
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
        let parent = self.vm.set_head(committed.id);
        self.line.head_pin = committed.pin;
        // Only now that the snapshot holding these pages is published. What was written since the
        // cut is still in KVM's log and the VMM's bitmap.
        self.line.since_head.clear();
        for (disk, frozen) in self.line.disks.iter_mut().zip(&cut.disks) {
            disk.record_published(frozen);
        }
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

/// A VM's means of leaving pages in place, write-protected.
#[derive(Debug, Default)]
pub(crate) enum CowState {
    /// Not needed so far.
    #[default]
    Unknown,
    Ready(CopyOnWrite),
    /// This host does not offer it, or it failed.
    Unavailable,
}

impl Vm {
    /// What write-protects pages of RAM, created on first use. None where userfaultfd is not
    /// usable, or while a pager watches the same memory.
    fn copy_on_write<'a>(&self, state: &'a mut CowState) -> Option<&'a CopyOnWrite> {
        if self.pager_stats().is_some_and(|pager| !pager.complete) {
            return None;
        }
        if matches!(state, CowState::Unknown) {
            let memory = Arc::clone(self.ram());
            *state = match CopyOnWrite::new(memory, &self.ram().mappings()) {
                Ok(cow) => CowState::Ready(cow),
                Err(error) => {
                    tracing::warn!(%error, "pages will be copied aside instead of left in place");
                    CowState::Unavailable
                }
            };
        }
        match state {
            CowState::Ready(cow) => Some(cow),
            CowState::Unknown | CowState::Unavailable => None,
        }
    }
}

/// Begins a transaction. If an earlier one met an I/O error, reopens the store first.
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
    chunks.extend(cut.devices.save()?);
    for disk in vm.disks() {
        chunks.push(chunk(disk.name(), disk.saved())?);
    }
    Ok(chunks)
}

pub(crate) fn us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
