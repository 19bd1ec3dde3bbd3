//! Descriptions of a machine: as requested, as recorded in its snapshots, and how it is attached to
//! its host.

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

/// The name of the chunk that describes the machine.
pub(crate) const MACHINE_CHUNK: &str = "machine";

/// Takes the chunk that describes the machine.
///
/// # Errors
/// [`VmmError::Config`] if there is none, as in snapshots of imported files; otherwise as
/// [`ChunkSet::take`].
pub(crate) fn take_machine(chunks: &mut ChunkSet) -> Result<SavedMachine> {
    if !chunks.has(MACHINE_CHUNK) {
        return Err(VmmError::Config(
            "expected a snapshot of a machine, found one of memory or disks alone, as `frazil import` \
             makes them: without vCPUs and devices there is nothing to run. `frazil export`, `diff` and \
             `mount` show what is in it"
                .into(),
        ));
    }
    chunks.take(MACHINE_CHUNK)
}

/// The most vCPUs a machine may have: without x2APIC, APIC ids have eight bits.
pub(crate) const MAX_CPUS: usize = 254;

/// A machine to boot.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// The VM's name.
    pub name: String,
    /// Bytes of RAM.
    pub ram_bytes: u64,
    /// Number of vCPUs.
    pub cpus: usize,
    /// What the machine runs.
    pub guest: Guest,
    /// Disks; each gets a block device.
    pub disks: Vec<DiskConfig>,
    /// Network cards.
    pub nets: Vec<NetConfig>,
    /// Whether there is an entropy device.
    pub rng: bool,
    /// Whether there is a memory balloon, through which the guest reports memory it does not need.
    pub balloon: bool,
    /// The device for sockets to the host, if any.
    pub vsock: Option<VsockConfig>,
    /// Whether the ACPI tables also list a CMOS clock and a generation id, which tells the guest
    /// that it was copied or rewound.
    pub acpi_devices: bool,
}

/// A socket device of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockConfig {
    /// The guest's context id; None stands for 3 at boot, and for the snapshot's on resume.
    pub cid: Option<u32>,
    /// The Unix socket on the host that leads to the guest; None leaves guest and host unconnected.
    pub socket: Option<PathBuf>,
}

/// The default context id: the first that a guest may have.
const CID: u32 = 3;

/// A network card of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// The host's tap interface that the card is attached to; None leaves its cable unplugged.
    pub tap: Option<String>,
    /// The card's MAC address; None stands for a random one at boot, and the snapshot's on resume.
    pub mac: Option<MacAddress>,
}

impl MachineConfig {
    /// A machine without disks or other optional devices.
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

    /// The machine's virtio devices, as its snapshots will list them.
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
    /// A kernel that the user provides.
    Kernel(BootSource),
}

/// How a VM is attached to its host. Not part of the machine: it may differ on each resume.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// Where the serial port's output goes.
    pub serial: SerialOutput,
    /// Where checkpoints go, if anywhere.
    pub store: Option<Arc<Store>>,
    /// What tracks the pages that the guest writes; None chooses by the machine's size and KVM.
    pub tracker: Option<TrackerKind>,
    /// Bytes of pages that a checkpoint may copy aside; more than that is left in place and
    /// write-protected, where the host can do that.
    pub staging_bytes: u64,
    /// The largest share of the time, in percent, for which the guest is kept from running so that
    /// a checkpoint can catch up with it. This is only done if there are more pages than may be
    /// copied aside and they cannot be left in place. With 0 the guest is never throttled, and the
    /// pause is as long as it takes to copy those pages.
    pub throttle_max_percent: u8,
    /// Bytes of RAM, and as many of each disk, that a rewind point keeps in memory: a rewind does
    /// not have to read those pages from the store.
    pub rewind_cache_bytes: u64,
    /// Where the guest's disk writes are kept for as long as the machine runs.
    pub overlay: OverlayOptions,
    /// On resume only: files whose contents replace those of the disks with these numbers. Each
    /// must be as long as the disk.
    pub disks: Vec<(usize, PathBuf)>,
    /// On resume only: how the guest's clocks go on.
    pub clock: ClockPolicy,
    /// On resume only: the taps of the network cards, in order, and new addresses for those that
    /// are to have one. Cards beyond the end of this list stay as the snapshot has them.
    pub nets: Vec<NetConfig>,
    /// On resume only: where the socket device leads, if that is to change.
    pub vsock: Option<VsockConfig>,
}

/// Default of [`HostConfig::staging_bytes`].
pub const STAGING_BYTES: u64 = 64 << 20;

/// Default of [`HostConfig::throttle_max_percent`].
pub const THROTTLE_MAX_PERCENT: u8 = 97;

/// Default of [`HostConfig::rewind_cache_bytes`].
pub const REWIND_CACHE_BYTES: u64 = 256 << 20;

impl HostConfig {
    /// Sends serial output to `serial` and checkpoints to `store`; everything else is the default.
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

/// How memory is loaded on resume.
#[derive(Clone, Debug)]
pub enum Loading {
    /// A pager loads each page when it is touched.
    Lazy(PagerOptions, PagerPlace),
    /// All of memory is loaded before the guest runs.
    Eager,
    /// Each page is loaded when any clone first touches it: all clones of the image share its
    /// pages, and copy those that they write. See [`shared_image`](crate::shared_image).
    Shared(Arc<Image>, PagerOptions),
    /// Like `Shared`, with an image that another process serves at this socket.
    Joined(PathBuf),
}

impl Loading {
    /// Loading by a pager in this process.
    #[must_use]
    pub fn lazy(options: PagerOptions) -> Self {
        Self::Lazy(options, PagerPlace::Here)
    }
}

/// How kvmclock and the TSC of a resumed guest go on; the guest derives its time of day and its
/// monotonic clock from them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClockPolicy {
    /// As if the guest had only been paused: its time of day is right, and timers that came due in
    /// the meantime expire.
    #[default]
    Host,
    /// From where they were: the guest sees no gap, and its time of day is late.
    Snapshot,
}

/// Where a machine's pager runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PagerPlace {
    /// In the machine's process.
    Here,
    /// In a process of its own, started as `program pager`. It is replaced if it dies.
    Process {
        /// The program.
        program: PathBuf,
        /// The user that the process switches to, passed as `--user`.
        user: Option<User>,
    },
}

/// The machine as its snapshots describe it: this and the other chunks suffice to rebuild it.
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
    /// Virtio devices; each has a chunk of its own.
    pub devices: Vec<SavedSlot>,
    /// Whether there is a CMOS clock; its chunk is `rtc`.
    pub rtc: bool,
    /// Whether there is a generation id; its chunk is `vmgenid`.
    pub generation: bool,
}

/// What was booted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum SavedGuest {
    /// The built-in workload.
    Workload {
        /// The workload's specification, with the machine's number of CPUs and TSC frequency.
        spec: String,
    },
    /// A kernel that the user provided.
    Kernel {
        /// The file that the kernel was loaded from.
        kernel: String,
        /// The initial RAM disk's file.
        initrd: Option<String>,
        /// The kernel's command line.
        cmdline: String,
    },
}

impl Saved for SavedMachine {
    const KIND: &'static str = "frazil.machine";
    const VERSION: u32 = 3;

    fn upgrade(version: u32, mut body: Value) -> std::result::Result<Value, String> {
        match version {
            // Machines had no disks.
            1 => {
                body["disks"] = Value::from(0);
                Ok(body)
            }
            // Machines had disks, but no devices through which a guest could see them.
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
    /// Attaches the network cards, in order, to what `nets` says and the socket device to what
    /// `vsock` says.
    ///
    /// # Errors
    /// [`VmmError::Config`] if the machine has fewer cards, or no socket device.
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
