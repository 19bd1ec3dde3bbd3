//! Rewinding: takes a running guest back to a snapshot in place, at the cost of what changed since.
//!
//! [`Vm::rewind`] is the list of phases; each is a function below.

mod pages;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use frazil_snapstore::{DiffOptions, PageSet, Snapshot, SnapshotId, Store, diff};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use crate::checkpoint::us;
use crate::devices::platform::{self, SavedPlatform};
use crate::devices::rtc::{self, SavedRtc, TimeAfterResume};
use crate::devices::serial::{self, SavedSerial};
use crate::devices::vmgenid::{self, SavedVmGenId};
use crate::disk::{DiskLine, SavedDisk, disk_name};
use crate::error::{Result, VmmError};
use crate::line::{AtRest, Line};
use crate::machine::{SavedMachine, take_machine};
use crate::memory::RAM_REGION;
use crate::rebuild::{try_out, vcpu_chunk};
use crate::state::ChunkSet;
use crate::vcpu::Ended;
use crate::vcpu::saved::SavedVcpu;
use crate::virtio::{SavedSlot, SavedVirtio};
use crate::vm::{GoesOn, Vm};
use pages::CachedRegion;

/// Once a round reads no more pages than this, the rest is left to the pause.
const FEW_PAGES: u64 = 32;
/// The most rounds of harvesting and reading pages before the pause.
const MAX_ROUNDS: usize = 4;

/// The body of `POST /rewind`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RewindRequest {
    /// The target: a snapshot id or a unique prefix of one, a tag, or `latest`, each optionally
    /// followed by `~N`. None stands for the head.
    pub snapshot: Option<String>,
}

/// The result of a rewind. Times are in microseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RewindReport {
    /// The VM's name.
    pub vm: String,
    /// The snapshot that the guest was taken back to.
    pub id: SnapshotId,
    /// The head before that.
    pub from: Option<SnapshotId>,
    /// Pages of RAM that were put back.
    pub pages: u64,
    /// Pages, of RAM and disks, that had to be read from the store.
    pub read_pages: u64,
    /// Pages of disks that were put back.
    pub disk_pages: u64,
    /// Finding out what changed and reading it, while the guest ran.
    pub prepare_us: u64,
    /// From the first kick until every vCPU was resumed, or could be if the user has the guest
    /// paused.
    pub pause_us: u64,
    /// Of which: until every vCPU had stopped.
    pub quiesce_us: u64,
    /// Of which: the last harvest, and reading pages that were not in memory yet.
    pub harvest_us: u64,
    /// Of which: putting pages of RAM back.
    pub memory_us: u64,
    /// Of which: restoring vCPUs and devices.
    pub state_us: u64,
    /// Of which: putting pages of disks back.
    pub disks_us: u64,
    /// Of which: until every vCPU was resumed; 0 if the guest stays paused.
    pub go_on_us: u64,
    /// The whole rewind, including the wait for its turn.
    pub duration_us: u64,
}

/// Totals over the rewinds of a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RewindTotals {
    /// Rewinds done.
    pub done: u64,
    /// Rewinds that failed.
    pub failed: u64,
    /// Pages of RAM put back.
    pub pages: u64,
    /// The longest pause, in microseconds.
    pub pause_us_max: u64,
}

/// What a VM remembers of its rewinds.
#[derive(Debug, Default)]
pub(crate) struct Rewinding {
    totals: Mutex<RewindTotals>,
    /// The last target of [`Vm::rewind_to`].
    last: Mutex<Option<RewindPoint>>,
}

/// A snapshot that a VM can be taken back to: its decoded state, and pages that rewinds needed
/// before. While this exists the snapshot is not pruned, even if it is forgotten.
#[derive(Debug)]
pub struct RewindPoint {
    snapshot: Snapshot,
    machine: SavedMachine,
    vcpus: Vec<Arc<SavedVcpu>>,
    platform: SavedPlatform,
    serial: SavedSerial,
    rtc: Option<SavedRtc>,
    generation: Option<SavedVmGenId>,
    virtio: Vec<SavedVirtio>,
    ram: CachedRegion,
    disks: Vec<CachedRegion>,
    /// The last rewind found nearly all pages it needed here. The next one probably will, so it
    /// skips the preparation.
    is_warm: bool,
}

impl RewindPoint {
    /// The snapshot's id.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        self.snapshot.id()
    }
}

impl Vm {
    /// Prepares for taking this VM back to `snapshot`, any number of times.
    ///
    /// # Errors
    /// [`VmmError::NotNow`] if the VM has no store; [`VmmError::Config`] if the snapshot is of
    /// another machine; [`VmmError::State`] if its state does not fit; store errors.
    pub fn rewind_point(&self, snapshot: &Snapshot) -> Result<RewindPoint> {
        self.point_at(snapshot.id())
    }

    fn point_at(&self, id: SnapshotId) -> Result<RewindPoint> {
        let snapshot = self.rewind_store()?.pin_held(id)?;
        let mut chunks = ChunkSet::new(snapshot.states()?)?;
        let machine = take_machine(&mut chunks)?;
        check_machine(self, id, &machine)?;
        let vcpus = (0..machine.cpus).map(|index| Ok(Arc::new(chunks.take(&vcpu_chunk(index))?)));
        let vcpus = vcpus.collect::<Result<Vec<_>>>()?;
        self.vcpus.check_states(&vcpus)?;
        let platform = SavedPlatform::take(&mut chunks)?;
        try_out(self.hypervisor(), machine.ram_bytes, &vcpus, &platform)?;
        let serial: SavedSerial = chunks.take(serial::CHUNK)?;
        serial.check()?;
        let max = self.rewind_cache_pages();
        let ram = snapshot.region(RAM_REGION)?;
        if ram.pages() != self.ram().end_page() {
            return Err(other_machine(
                self,
                id,
                "pages of RAM",
                self.ram().end_page(),
                ram.pages(),
            ));
        }
        let mut disks = Vec::with_capacity(machine.disks);
        for (index, disk) in self.disks().iter().enumerate() {
            let saved: SavedDisk = chunks.take(&disk_name(index))?;
            if saved != *disk.saved() {
                let (ours, theirs) = (format!("{:?}", disk.saved()), format!("{saved:?}"));
                return Err(other_machine(self, id, disk.name(), ours, theirs));
            }
            disks.push(CachedRegion::new(snapshot.region(disk.name())?, max));
        }
        let virtio = self.bus.virtio().take_saved(&mut chunks)?;
        let (rtc, generation) = self.take_clock_and_generation(&mut chunks)?;
        chunks.finish()?;
        let ram = CachedRegion::new(ram, max);
        Ok(RewindPoint {
            snapshot,
            machine,
            vcpus,
            platform,
            serial,
            rtc,
            generation,
            virtio,
            ram,
            disks,
            is_warm: false,
        })
    }

    fn take_clock_and_generation(
        &self,
        chunks: &mut ChunkSet,
    ) -> Result<(Option<SavedRtc>, Option<SavedVmGenId>)> {
        let rtc = self.bus.rtc().map(|_ours| {
            let saved: SavedRtc = chunks.take(rtc::CHUNK)?;
            saved.check().map(|_bytes| saved)
        });
        let rtc = rtc.transpose()?;
        let generation = self.bus.generation().map(|ours| {
            let saved: SavedVmGenId = chunks.take(vmgenid::CHUNK)?;
            ours.check(&saved).map(|()| saved)
        });
        Ok((rtc, generation.transpose()?))
    }

    fn rewind_store(&self) -> Result<&Arc<Store>> {
        self.store().ok_or_else(|| {
            VmmError::NotNow(format!(
                "VM `{}` has no store to rewind from: run it with --store DIR",
                self.name()
            ))
        })
    }

    /// Takes the guest back to `point`, from wherever it is. It runs on from there, or stays
    /// paused if it was. The next checkpoint builds on that snapshot.
    ///
    /// # Errors
    /// On failure the guest goes on as before, unless its memory had begun to change: then the VM
    /// ends, and [`Vm::ended`] says why.
    pub fn rewind(&self, point: &mut RewindPoint) -> Result<RewindReport> {
        let turn = self.turns.rewind();
        let done = Rewind::begin(self, point, turn.since).and_then(|mut rewind| {
            rewind.prepare()?;
            rewind.pause_and_rewind()
        });
        let mut totals = self.rewinding.totals.lock().unwrap_or_else(PoisonError::into_inner);
        match &done {
            Ok(report) => {
                totals.done += 1;
                totals.pages += report.pages;
                totals.pause_us_max = totals.pause_us_max.max(report.pause_us);
            }
            Err(_) => totals.failed += 1,
        }
        done
    }

    /// Takes the guest back to the snapshot that `reference` names in the VM's store; None stands
    /// for the head. The rewind point is kept for the next call.
    ///
    /// # Errors
    /// As [`Self::rewind_point`] and [`Self::rewind`]; [`VmmError::NotNow`] if there is no head
    /// yet.
    pub fn rewind_to(&self, reference: Option<&str>) -> Result<RewindReport> {
        self.check_alive()?;
        let store = self.rewind_store()?;
        let id = match reference {
            Some(reference) => {
                store.refresh()?;
                store.resolve(reference)?.id
            }
            None => self.head().ok_or_else(|| {
                VmmError::NotNow(format!(
                    "VM `{}` has no snapshot to go back to yet: take a checkpoint first",
                    self.name()
                ))
            })?,
        };
        let mut last = self.rewinding.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_ref().is_none_or(|point| point.id() != id) {
            *last = Some(self.point_at(id)?);
        }
        let point = last.as_mut().ok_or_else(|| VmmError::NotNow("no rewind point".into()))?;
        self.rewind(point)
    }

    /// Totals over the VM's rewinds so far.
    #[must_use]
    pub fn rewind_totals(&self) -> RewindTotals {
        *self.rewinding.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fails unless `found`, the machine of snapshot `id`, is that of `vm`.
fn check_machine(vm: &Vm, id: SnapshotId, found: &SavedMachine) -> Result<()> {
    let ours = vm.machine();
    let wrong = |what: &str, ours: &dyn std::fmt::Debug, found: &dyn std::fmt::Debug| {
        Err(other_machine(vm, id, what, format!("{ours:?}"), format!("{found:?}")))
    };
    if ours.ram_bytes != found.ram_bytes {
        return wrong("bytes of RAM", &ours.ram_bytes, &found.ram_bytes);
    }
    if ours.cpus != found.cpus {
        return wrong("vCPUs", &ours.cpus, &found.cpus);
    }
    if ours.disks != found.disks {
        return wrong("disks", &ours.disks, &found.disks);
    }
    let alike = |(ours, found): (&SavedSlot, &SavedSlot)| ours.is_like(found);
    if ours.devices.len() != found.devices.len()
        || !ours.devices.iter().zip(&found.devices).all(alike)
    {
        return wrong("devices", &ours.devices, &found.devices);
    }
    if (ours.rtc, ours.generation) != (found.rtc, found.generation) {
        return wrong("clock and generation id", &ours, &found);
    }
    if ours.guest != found.guest {
        return wrong("guest", &ours.guest, &found.guest);
    }
    Ok(())
}

fn other_machine(
    vm: &Vm,
    id: SnapshotId,
    what: &str,
    ours: impl std::fmt::Display,
    theirs: impl std::fmt::Display,
) -> VmmError {
    VmmError::Config(format!(
        "snapshot {} belongs to another machine, not to VM `{}`: {what}: expected {ours}, found \
         {theirs}; resume it instead",
        id.short(),
        vm.name()
    ))
}

/// A rewind in progress.
struct Rewind<'a> {
    vm: &'a Vm,
    point: &'a mut RewindPoint,
    line: MutexGuard<'a, Line>,
    /// Pages of RAM in which the target differs from the head.
    apart: PageSet,
    /// The same for each disk.
    disks_apart: Vec<PageSet>,
    /// Pages of RAM to put back, as far as they are known.
    pages: PageSet,
    /// The same for each disk.
    disk_pages: Vec<PageSet>,
    started: Instant,
    report: RewindReport,
}

impl<'a> Rewind<'a> {
    fn begin(vm: &'a Vm, point: &'a mut RewindPoint, started: Instant) -> Result<Self> {
        vm.check_alive()?;
        // The point may be another VM's.
        check_machine(vm, point.id(), &point.machine)?;
        if !Arc::ptr_eq(vm.rewind_store()?, point.snapshot.store()) {
            return Err(VmmError::Config(format!(
                "snapshot {} is not in the store of VM `{}`",
                point.id().short(),
                vm.name()
            )));
        }
        let line = vm.line.lock().unwrap_or_else(PoisonError::into_inner);
        let mut apart = PageSet::new(vm.ram().end_page());
        let mut disks_apart: Vec<_> =
            vm.disks().iter().map(|disk| PageSet::new(disk.pages())).collect();
        let head = vm.head();
        if head != Some(point.id()) {
            find_apart(vm, head, point, &mut apart, &mut disks_apart)?;
        }
        let report = RewindReport {
            vm: vm.name().to_owned(),
            id: point.id(),
            from: head,
            pages: 0,
            read_pages: 0,
            disk_pages: 0,
            prepare_us: 0,
            pause_us: 0,
            quiesce_us: 0,
            harvest_us: 0,
            memory_us: 0,
            state_us: 0,
            disks_us: 0,
            go_on_us: 0,
            duration_us: 0,
        };
        let (pages, disk_pages) = (apart.clone(), disks_apart.clone());
        Ok(Self { vm, point, line, apart, disks_apart, pages, disk_pages, started, report })
    }

    /// Phase 1, while the guest runs: finds out what changed and reads the pages that the point
    /// does not hold, so that little is left for the pause.
    fn prepare(&mut self) -> Result<()> {
        if self.point.is_warm && self.apart.is_empty() {
            return Ok(());
        }
        let started = Instant::now();
        for _ in 0..MAX_ROUNDS {
            let mut found = PageSet::new(self.pages.capacity());
            self.line.harvest(&mut found)?;
            let read = self.fetch()?;
            if read <= FEW_PAGES {
                break;
            }
        }
        self.report.prepare_us = us(started.elapsed());
        Ok(())
    }

    /// Reads the changed pages that the point does not hold, as far as it has room; returns how
    /// many it read.
    fn fetch(&mut self) -> Result<u64> {
        self.pages.union(&self.line.since_head);
        self.pages.union(&self.apart);
        let mut read = self.point.ram.fetch(&self.pages)?;
        for (index, disk) in self.line.disks.iter_mut().enumerate() {
            disk.harvest();
            self.disk_pages[index].union(disk.since_head());
            self.disk_pages[index].union(&self.disks_apart[index]);
            read += self.point.disks[index].fetch(&self.disk_pages[index])?;
        }
        self.report.read_pages += read;
        Ok(read)
    }

    /// Phases 2 to 6. A guest that ran goes on whatever happens, unless its memory is torn.
    fn pause_and_rewind(mut self) -> Result<RewindReport> {
        let paused = self.vm.paused();
        let pause_started = Instant::now();
        let goes_on = (!*paused).then(|| GoesOn(&self.vm.vcpus));
        self.vm.vcpus.pause()?;
        self.report.quiesce_us = us(pause_started.elapsed());
        let at_rest = self.last_look()?;
        // From here on there is no way back. On a panic this is dropped before `goes_on`, so that a
        // torn guest does not run.
        let torn = EndsTorn(self.vm);
        if let Err(error) = self.change(&at_rest) {
            let detail = format!(
                "a rewind to snapshot {} failed and left its memory half changed: {error}",
                self.point.id().short()
            );
            self.vm.vcpus.end(Ended::Failed { detail: detail.clone() });
            return Err(VmmError::NotNow(format!("VM `{}` has ended: {detail}", self.vm.name())));
        }
        drop(at_rest);
        drop(torn);
        self.vm.bus.go_on();
        let go_on_started = Instant::now();
        if let Some(goes_on) = goes_on {
            drop(goes_on);
            self.report.go_on_us = us(go_on_started.elapsed());
        }
        self.point.is_warm = self.report.read_pages <= FEW_PAGES;
        self.report.pause_us = us(pause_started.elapsed());
        self.report.duration_us = us(self.started.elapsed());
        Ok(self.report)
    }

    /// Phase 3, while the guest is paused: finds the last changed pages, and reads those that the
    /// point has room for.
    fn last_look(&mut self) -> Result<AtRest> {
        let started = Instant::now();
        let mut at_rest = AtRest::room(&self.line, &self.vm.bus);
        self.line.drain(&self.vm.bus, &mut at_rest)?;
        let mut found = PageSet::new(self.pages.capacity());
        // Not the harvest of a checkpoint's cut: that may leave pages unprotected, which would then
        // be reported and put back every time. Protecting them is cheaper now than while vCPUs run,
        // which have to be interrupted for it.
        self.line.harvest(&mut found)?;
        self.fetch()?;
        self.report.harvest_us = us(started.elapsed());
        Ok(at_rest)
    }

    /// Phases 4 and 5, while the guest is paused: puts the target's memory, state and disks back.
    fn change(&mut self, at_rest: &AtRest) -> Result<()> {
        let memory_started = Instant::now();
        self.put_memory_back()?;
        self.report.memory_us = us(memory_started.elapsed());
        let state_started = Instant::now();
        // vCPUs first, as on resume: the interrupt controllers may send to their local APICs.
        self.vm.vcpus.restore(&self.point.vcpus)?;
        // The guest's clock goes back too.
        platform::restore(&self.vm.shell.fd, self.point.platform.clone(), Duration::ZERO)?;
        self.vm.bus.serial().rewind(self.point.serial.clone())?;
        if let (Some(mut rtc), Some(saved)) = (self.vm.bus.rtc(), &self.point.rtc) {
            rtc.put_back(saved, TimeAfterResume::Snapshot)?;
        }
        if let (Some(ours), Some(saved)) = (self.vm.bus.generation(), &self.point.generation) {
            ours.put_back(saved)?;
        }
        self.vm.bus.virtio().put_back(&self.point.virtio)?;
        self.report.state_us = us(state_started.elapsed());
        let disks_started = Instant::now();
        for (index, drained) in at_rest.disks.iter().enumerate() {
            let (line, pages) = (&self.line.disks[index], &self.disk_pages[index]);
            let put = |page, contents: &_| line.put_back(drained, page, contents);
            self.report.read_pages += self.point.disks[index].each(pages, put)?;
            self.report.disk_pages += pages.count();
        }
        self.report.disks_us = us(disks_started.elapsed());
        self.become_the_target();
        Ok(())
    }

    fn put_memory_back(&mut self) -> Result<()> {
        let ram = self.vm.ram();
        self.report.pages = self.pages.count();
        self.report.read_pages += self.point.ram.each(&self.pages, |page, contents| {
            let at = GuestAddress(page * frazil_snapstore::PAGE_SIZE as u64);
            ram.memory().write_slice(contents, at).map_err(|error| VmmError::Host {
                op: format!("put page {page} of guest memory back"),
                source: std::io::Error::other(error),
            })
        })?;
        // Discards the notes of our own writes. There are no others since the last harvest:
        // requests are drained and no vCPU runs.
        ram.harvest_vmm_writes(&mut PageSet::new(self.pages.capacity()));
        Ok(())
    }

    /// Makes the target the head. Memory and disks are equal to it now, so no page is dirty. What
    /// KVM wrote while its state was set is in its dirty log, and found by the next harvest.
    fn become_the_target(&mut self) {
        self.vm.set_head(self.point.id());
        self.line.head_pin = self.point.snapshot.pin();
        self.line.since_head.clear();
        self.line.disks.iter_mut().for_each(DiskLine::rewound);
    }
}

/// Ends the VM if this thread panics while it changes the guest's memory.
struct EndsTorn<'a>(&'a Vm);

impl Drop for EndsTorn<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let detail = "a rewind panicked and left memory half changed".into();
            self.0.vcpus.end(Ended::Failed { detail });
        }
    }
}

/// Finds the pages in which `point` and `head` differ. Without a head, all pages that were not
/// written are zero.
fn find_apart(
    vm: &Vm,
    head: Option<SnapshotId>,
    point: &RewindPoint,
    apart: &mut PageSet,
    disks_apart: &mut [PageSet],
) -> Result<()> {
    let Some(head) = head else {
        point.ram.add_contents(apart)?;
        // That holds for disks too: the data of the file that a disk was opened with counts as
        // written, and the rest of it is holes.
        let disks = point.disks.iter().zip(disks_apart);
        return disks.into_iter().try_for_each(|(disk, apart)| disk.add_contents(apart));
    };
    let head = vm.rewind_store()?.pin_held(head)?;
    for region in diff(&head, &point.snapshot, DiffOptions::default())?.regions {
        let set = match region.name.as_str() {
            RAM_REGION => Some(&mut *apart),
            name => vm
                .disks()
                .iter()
                .position(|disk| disk.name() == name)
                .map(|index| &mut disks_apart[index]),
        };
        if let Some(set) = set {
            region.ranges.iter().for_each(|range| set.insert_range(range.first, range.count));
        }
    }
    Ok(())
}
