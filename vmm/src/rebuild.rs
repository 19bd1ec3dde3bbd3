//! Rebuilds parts of a machine from a snapshot.

use std::sync::Arc;
use std::time::Duration;

use frazil_snapstore::Snapshot;

use crate::devices::platform::{self, SavedPlatform};
use crate::devices::rtc::{self, HostClock, Rtc, TimeAfterResume};
use crate::devices::serial;
use crate::devices::vmgenid::{self, RandomGenerations, SavedVmGenId, VmGenId};
use crate::dirty::TrackerKind;
use crate::disk::{Disk, disk_name};
use crate::error::{Result, VmmError};
use crate::kvm::{Hypervisor, VmShell};
use crate::machine::{ClockPolicy, HostConfig, SavedMachine};
use crate::memory::GuestRam;
use crate::state::ChunkSet;
use crate::vcpu::Vcpu;
use crate::vcpu::saved::SavedVcpu;
use crate::virtio::IrqLine;

pub(crate) fn rtc(
    machine: &SavedMachine,
    clock: ClockPolicy,
    chunks: &mut ChunkSet,
) -> Result<Option<Rtc>> {
    if !machine.rtc {
        return Ok(None);
    }
    let time = match clock {
        ClockPolicy::Host => TimeAfterResume::Host,
        ClockPolicy::Snapshot => TimeAfterResume::Snapshot,
    };
    Rtc::restore(Box::new(HostClock), &chunks.take(rtc::CHUNK)?, time).map(Some)
}

pub(crate) fn generation(
    machine: &SavedMachine,
    shell: &VmShell,
    chunks: &mut ChunkSet,
) -> Result<Option<VmGenId>> {
    if !machine.generation {
        return Ok(None);
    }
    let saved: SavedVmGenId = chunks.take(vmgenid::CHUNK)?;
    let is_free = |gsi| gsi != serial::GSI && machine.devices.iter().all(|slot| slot.gsi != gsi);
    let line = Arc::new(IrqLine::wire(&shell.fd, saved.gsi(is_free)?)?);
    let generations = Box::new(RandomGenerations);
    VmGenId::restore(Arc::clone(&shell.ram), line, &saved, generations).map(Some)
}

pub(crate) fn disks(
    machine: &SavedMachine,
    snapshot: &Snapshot,
    chunks: &mut ChunkSet,
    host: &HostConfig,
) -> Result<Vec<Arc<Disk>>> {
    let HostConfig { disks: others, overlay, .. } = host;
    if let Some((index, _)) = others.iter().find(|(index, _)| *index >= machine.disks) {
        return Err(VmmError::Config(format!(
            "disk {index}: expected one of the machine's {}, counted from 0",
            machine.disks
        )));
    }
    let disk = |index| -> Result<Arc<Disk>> {
        let name = disk_name(index);
        let (saved, region) = (chunks.take(&name)?, snapshot.region(&name)?);
        let disk = match others.iter().find(|(other, _)| *other == index) {
            Some((_, file)) => Disk::resume_with(saved, &region, file, overlay)?,
            None => Disk::resume(saved, region, overlay)?,
        };
        Ok(Arc::new(disk))
    };
    (0..machine.disks).map(disk).collect()
}

/// Name of a vCPU's chunk.
pub(crate) fn vcpu_chunk(index: usize) -> String {
    format!("vcpu{index}")
}

pub(crate) fn vcpus(
    hypervisor: &Hypervisor,
    shell: &VmShell,
    machine: &SavedMachine,
    chunks: &mut ChunkSet,
    later: Duration,
) -> Result<Vec<Vcpu>> {
    (0..machine.cpus)
        .map(|index| {
            let name = vcpu_chunk(index);
            let mut saved: SavedVcpu = chunks.take(&name)?;
            saved.advance(later);
            Vcpu::restore(hypervisor, shell, index, &name, &saved)
        })
        .collect()
}

/// Restores the state of vCPUs and platform into a scratch VM with `ram_bytes` of RAM that never
/// runs, to find out whether KVM accepts it.
///
/// # Errors
/// [`VmmError::State`], which names the chunk that does not fit this host.
pub(crate) fn try_out(
    hypervisor: &Hypervisor,
    ram_bytes: u64,
    vcpus: &[Arc<SavedVcpu>],
    platform: &SavedPlatform,
) -> Result<()> {
    let ram = Arc::new(GuestRam::new(ram_bytes)?);
    let shell = VmShell::new(hypervisor, ram, Some(TrackerKind::Bitmap))?;
    for (index, saved) in vcpus.iter().enumerate() {
        Vcpu::restore(hypervisor, &shell, index, &vcpu_chunk(index), saved)?;
    }
    platform::restore(&shell.fd, platform.clone(), Duration::ZERO)
}
