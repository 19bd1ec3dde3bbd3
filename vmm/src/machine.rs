//! What a machine is: as it is asked for, as its snapshots list it, and how it meets its host.

use std::path::PathBuf;
use std::sync::Arc;

use frazil_snapstore::Store;
use frazil_snapstore::pager::{Image, PagerOptions};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::boot::BootSource;
use crate::devices::serial::SerialOutput;
use crate::dirty::TrackerKind;
use crate::disk::{DiskConfig, OverlayOptions};
use crate::error::{Result, VmmError};
use crate::privileges::User;
use crate::state::{ChunkSet, Saved, never_written};
use crate::virtio::bus::lay_out;
use crate::virtio::net::MacAddress;
use crate::virtio::{SavedSlot, SlotDevice};
use crate::workload::WorkloadSpec;

/// The chunk that lists the machine.
pub(crate) const MACHINE_CHUNK: &str = "machine";

/// Takes the chunk that lists the machine.
///
/// # Errors
/// [`VmmError::Config`] if there is none, as in snapshots of imported files; those of
/// [`ChunkSet::take`].
pub(crate) fn take_machine(chunks: &mut ChunkSet) -> Result<SavedMachine> {
    if !chunks.has(MACHINE_CHUNK) {
        return Err(VmmError::Config(
            "expected a snapshot of a machine, found one of memory or disks alone, as `frazil import` \
             makes them: without vCPUs and devices there is nothing to run. `frazil export`, `diff` and \
             `mount` give what is in it"
                .into(),
        ));
    }
    chunks.take(MACHINE_CHUNK)
}

/// The most vCPUs: APIC ids are eight bits without x2APIC.
pub(crate) const MAX_CPUS: usize = 254;

/// A machine to boot.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// Its name.
    pub name: String,
    /// Bytes of RAM.
    pub ram_bytes: u64,
    /// Number of vCPUs.
    pub cpus: usize,
    /// What it runs.
    pub guest: Guest,
    /// Its disks; each has a block device.
    pub disks: Vec<DiskConfig>,
    /// Its network cards.
    pub nets: Vec<NetConfig>,
    /// Give it an entropy device.
    pub rng: bool,
    /// Give it a memory balloon, through which it says which memory it does not need.
    pub balloon: bool,
    /// Give it sockets that lead to the host.
    pub vsock: Option<VsockConfig>,
    /// Give it what its tables tell of besides: a CMOS clock, and a generation id, by which it notices
    /// that it was copied or taken back.
    pub acpi_devices: bool,
}

/// A socket device to run a machine with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockConfig {
    /// The guest's context id; none is 3, or that of the snapshot.
    pub cid: Option<u32>,
    /// The host's Unix socket that leads to the guest; none is a host that cannot be reached.
    pub socket: Option<PathBuf>,
}

/// The context id of a guest that is not given another: the first that a guest may have.
const CID: u32 = 3;

/// A network card to run a machine with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// The host's tap interface that it is on; none is a card without a cable.
    pub tap: Option<String>,
    /// Its address; a random one if there is none here.
    pub mac: Option<MacAddress>,
}

impl MachineConfig {
    /// A machine without disks and other devices that are not on every machine.
    #[must_use]
    pub fn new(name: impl Into<String>, ram_bytes: u64, cpus: usize, guest: Guest) -> Self {
        Self {
            name: name.into(),
            ram_bytes,
            cpus,
            guest,
            disks: Vec::new(),
            nets: Vec::new(),
            rng: false,
            balloon: false,
            vsock: None,
            acpi_devices: false,
        }
    }

    /// Its virtio devices, as its snapshots will list them.
    ///
    /// # Errors
    /// [`VmmError::Config`] if there are too many.
    pub(crate) fn devices(&self) -> Result<Vec<SavedSlot>> {
        let mut devices = Vec::new();
        for disk in 0..self.disks.len() {
            devices.push((format!("block{disk}"), SlotDevice::Block { disk }));
        }
        for (index, NetConfig { tap, mac }) in self.nets.iter().enumerate() {
            let mac = mac.map_or_else(MacAddress::random, Ok)?;
            devices.push((format!("net{index}"), SlotDevice::Net { tap: tap.clone(), mac }));
        }
        let others = [
            (self.rng, "rng", SlotDevice::Rng {}),
            (self.balloon, "balloon", SlotDevice::Balloon {}),
        ];
        for (wanted, name, device) in others {
            if wanted {
                devices.push((name.to_owned(), device));
            }
        }
        if let Some(VsockConfig { cid, socket }) = &self.vsock {
            let (cid, socket) = (cid.unwrap_or(CID), socket.clone());
            devices.push(("vsock".to_owned(), SlotDevice::Vsock { cid, socket }));
        }
        lay_out(devices)
    }
}

/// What a machine runs.
#[derive(Clone, Debug)]
pub enum Guest {
    /// The built-in workload.
    Workload(WorkloadSpec),
    /// A kernel of the user's.
    Kernel(BootSource),
}

/// How a VM meets its host; not part of the machine, and free to differ on each resume.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// Where the serial port's output goes.
    pub serial: SerialOutput,
    /// Where its checkpoints go, if anywhere.
    pub store: Option<Arc<Store>>,
    /// What keeps track of the pages the guest writes; None is what suits the machine.
    pub tracker: Option<TrackerKind>,
    /// Memory that a checkpoint may take to copy pages aside; what is more is left in place and
    /// protected, where the host can do that.
    pub staging_bytes: u64,
    /// The largest share of the time, in percent, for which a guest is kept from running while a
    /// checkpoint catches up with it, where its pages are more than may be copied aside and cannot be
    /// left in place. 0 is never: then the pause is as long as it takes to copy them.
    pub throttle_max_percent: u8,
    /// Memory in which a point to rewind to keeps pages of RAM, and as much of each disk: those that
    /// are there when the guest is taken back are not read from the store.
    pub rewind_cache_bytes: u64,
    /// Where what the guest writes to its disks is kept until it is in a snapshot, and beyond.
    pub overlay: OverlayOptions,
    /// For a machine that is resumed: disks by their numbers, and files that they have the contents of
    /// instead of what the snapshot has. Each is as long as the disk was.
    pub disks: Vec<(usize, PathBuf)>,
    /// For a machine that is resumed: how its clocks go on.
    pub clock: ClockPolicy,
    /// For a machine that is resumed: what its network cards are on, in their order, and their
    /// addresses where they are to be others. Those that are not listed are as the snapshot has them.
    pub nets: Vec<NetConfig>,
    /// For a machine that is resumed: what its sockets lead to, if to something else than before.
    pub vsock: Option<VsockConfig>,
}

/// What checkpoints copy aside by default.
pub const STAGING_BYTES: u64 = 64 << 20;

/// For how much of the time a guest is kept from running at the most, by default.
pub const THROTTLE_MAX_PERCENT: u8 = 97;

/// What a point to rewind to keeps of each region by default.
pub const REWIND_CACHE_BYTES: u64 = 256 << 20;

impl HostConfig {
    /// Output to `serial`, checkpoints to `store`, the rest as suits the machine.
    #[must_use]
    pub fn new(serial: SerialOutput, store: Option<Arc<Store>>) -> Self {
        Self {
            serial,
            store,
            tracker: None,
            staging_bytes: STAGING_BYTES,
            throttle_max_percent: THROTTLE_MAX_PERCENT,
            rewind_cache_bytes: REWIND_CACHE_BYTES,
            overlay: OverlayOptions::default(),
            disks: Vec::new(),
            clock: ClockPolicy::default(),
            nets: Vec::new(),
            vsock: None,
        }
    }
}

/// How memory comes back on resume.
#[derive(Clone, Debug)]
pub enum Loading {
    /// As it is touched, brought in by a pager.
    Lazy(PagerOptions, PagerPlace),
    /// All of it before the guest runs.
    Eager,
    /// As it is touched by whichever clone touches it first: all that have the image share it, and
    /// copy the pages that they write. See [`shared_image`](crate::shared_image).
    Shared(Arc<Image>, PagerOptions),
    /// The same, with an image that another process serves at this socket.
    Joined(PathBuf),
}

impl Loading {
    /// As it is touched, brought in by a pager in this process.
    #[must_use]
    pub fn lazy(options: PagerOptions) -> Self {
        Self::Lazy(options, PagerPlace::Here)
    }
}

/// How the clocks of a resumed guest go on: kvmclock and the TSC, which its time of day and its
/// monotonic clock both come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClockPolicy {
    /// As if it had stood still meanwhile: the time of day is right, and all timers that would have
    /// expired do.
    #[default]
    Host,
    /// From where they were: the guest does not notice, and its time of day is late.
    Snapshot,
}

/// Where a machine's pager runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PagerPlace {
    /// In the machine's process.
    Here,
    /// In a process of its own: this program is run with the argument `pager`. Another is started if
    /// it dies.
    Process {
        /// The program.
        program: PathBuf,
        /// The user that it goes on as, by the argument `--user`.
        user: Option<User>,
    },
}

/// The machine, as its snapshots list it: with this and the other chunks it is built again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedMachine {
    /// Bytes of RAM.
    pub ram_bytes: u64,
    /// Number of vCPUs.
    pub cpus: usize,
    /// What was booted.
    pub guest: SavedGuest,
    /// Number of disks; each has a chunk and a region of its own, `disk0` and so on.
    pub disks: usize,
    /// Its virtio devices; each has a chunk of its own.
    pub devices: Vec<SavedSlot>,
    /// It has a CMOS clock, in the chunk `rtc`.
    pub rtc: bool,
    /// It has a generation id, in the chunk `vmgenid`.
    pub generation: bool,
}

/// What was booted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum SavedGuest {
    /// The built-in workload.
    Workload {
        /// Its specification, with the machine's CPUs and TSC frequency.
        spec: String,
    },
    /// A kernel of the user's.
    Kernel {
        /// The file it was loaded from.
        kernel: String,
        /// The initial RAM disk's file.
        initrd: Option<String>,
        /// Its command line.
        cmdline: String,
    },
}

impl Saved for SavedMachine {
    const KIND: &'static str = "frazil.machine";
    const VERSION: u32 = 3;

    fn upgrade(version: u32, mut body: Value) -> std::result::Result<Value, String> {
        match version {
            // There were no disks.
            1 => {
                body["disks"] = Value::from(0);
                Ok(body)
            }
            // There were disks, and no devices that a guest could have seen them through.
            2 => {
                body["devices"] = Value::Array(Vec::new());
                body["rtc"] = Value::from(false);
                body["generation"] = Value::from(false);
                Ok(body)
            }
            _ => Err(never_written(version)),
        }
    }
}

impl SavedMachine {
    /// Puts network cards on what `nets` says, in their order, and has sockets lead to what `vsock` says.
    ///
    /// # Errors
    /// [`VmmError::Config`] if there are fewer cards, or no sockets.
    pub(crate) fn plug(&mut self, nets: &[NetConfig], vsock: Option<&VsockConfig>) -> Result<()> {
        if let Some(wanted) = vsock {
            let found = self.devices.iter_mut().find_map(|slot| match &mut slot.device {
                SlotDevice::Vsock { cid, socket } => Some((cid, socket)),
                _ => None,
            });
            let (cid, socket) = found.ok_or_else(|| {
                VmmError::Config("vsock: the snapshot's machine has no socket device".into())
            })?;
            socket.clone_from(&wanted.socket);
            *cid = wanted.cid.unwrap_or(*cid);
        }
        let cards = self.devices.iter_mut().filter_map(|slot| match &mut slot.device {
            SlotDevice::Net { tap, mac } => Some((tap, mac)),
            _ => None,
        });
        let mut cards = cards.collect::<Vec<_>>();
        if nets.len() > cards.len() {
            return Err(VmmError::Config(format!(
                "network cards: expected at most the machine's {}, found {}",
                cards.len(),
                nets.len()
            )));
        }
        for ((tap, mac), net) in cards.iter_mut().zip(nets) {
            tap.clone_from(&net.tap);
            if let Some(other) = net.mac {
                **mac = other;
            }
        }
        Ok(())
    }

    /// The built-in workload's specification, if the machine runs it.
    #[must_use]
    pub fn workload(&self) -> Option<WorkloadSpec> {
        match &self.guest {
            SavedGuest::Workload { spec } => spec.parse().ok(),
            SavedGuest::Kernel { .. } => None,
        }
    }
}
