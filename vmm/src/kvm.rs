//! KVM itself: opening it, checking its capabilities, and the bare VM with its memory slots.
//!
//! `unsafe` is allowed here because handing guest memory to KVM is only sound while the mapping
//! lives, and this module keeps the two together.
#![allow(unsafe_code)]

use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MAX_CPUID_ENTRIES,
    KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_dirty_gfn, kvm_enable_cap, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::dirty::{DirtyRings, DirtyTracker, KvmBitmap, SMALL_RAM_BYTES, TrackerKind};
use crate::error::{Result, VmmError};
use crate::memory::GuestRam;

/// Bounds on the entries of a dirty ring, which has one entry for every 16 pages of RAM and at most
/// as many as this KVM allows.
const RING_ENTRIES: std::ops::RangeInclusive<u64> = 4096..=65_536;

/// Address of three pages below 4 GiB that KVM needs for itself on Intel processors.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// Memory type range registers (Intel SDM vol. 3A, 12.11), which KVM emulates but does not list.
const MTRRS: [std::ops::RangeInclusive<u32>; 5] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff];

/// An open /dev/kvm that has all capabilities frazil needs.
#[derive(Debug)]
pub struct Hypervisor {
    kvm: Kvm,
}

impl Hypervisor {
    /// Opens /dev/kvm and checks its capabilities.
    ///
    /// # Errors
    /// [`VmmError::NoKvm`], which says what is missing and what to do.
    pub fn open() -> Result<Self> {
        let kvm = Kvm::new().map_err(|error| match error.errno() {
            libc::ENOENT => VmmError::NoKvm {
                found: "there is no /dev/kvm".into(),
                advice: "load kvm_intel or kvm_amd (modprobe), enable virtualization in the firmware, \
                         or, inside a VM, nested virtualization",
            },
            libc::EACCES | libc::EPERM => VmmError::NoKvm {
                found: "no permission to open /dev/kvm".into(),
                advice: "add yourself to the group that owns it (usually `kvm`), or run as root",
            },
            _ => VmmError::NoKvm {
                found: format!("opening /dev/kvm failed: {error}"),
                advice: "check `dmesg` for what KVM says",
            },
        })?;
        if kvm.get_api_version() != 12 {
            return Err(VmmError::NoKvm {
                found: format!("KVM API version {}", kvm.get_api_version()),
                advice: "use a Linux kernel with the stable API, version 12",
            });
        }
        let needed = [
            (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
            (Cap::Pit2, "KVM_CAP_PIT2"),
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
            (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
            (Cap::Xsave, "KVM_CAP_XSAVE"),
            (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
        ];
        let missing: Vec<_> = needed
            .iter()
            .filter(|(cap, _)| !kvm.check_extension(*cap))
            .map(|(_, name)| *name)
            .collect();
        if !missing.is_empty() {
            return Err(VmmError::NoKvm {
                found: format!("this KVM lacks {}", missing.join(", ")),
                advice: "use a newer Linux kernel",
            });
        }
        Ok(Self { kvm })
    }

    /// The CPUID leaves this host can give a guest.
    ///
    /// # Errors
    /// [`VmmError::Kvm`].
    pub fn supported_cpuid(&self) -> Result<CpuId> {
        self.kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(VmmError::kvm("list CPUID features"))
    }

    /// Indices of the MSRs that make up a vCPU's state.
    ///
    /// # Errors
    /// [`VmmError::Kvm`].
    pub fn msr_indices(&self) -> Result<Vec<u32>> {
        let list = self.kvm.get_msr_index_list().map_err(VmmError::kvm("list MSRs"))?;
        let mut indices = list.as_slice().to_vec();
        indices
            .extend(MTRRS.into_iter().flatten().filter(|index| !list.as_slice().contains(index)));
        Ok(indices)
    }

    /// The most vCPUs a VM may have.
    #[must_use]
    pub fn max_cpus(&self) -> usize {
        self.kvm.get_max_vcpus()
    }
}

/// A VM with memory and interrupt controllers, and no vCPUs yet.
#[derive(Debug)]
pub struct VmShell {
    /// KVM's handle. Whoever keeps a clone of it must also keep one of `ram`, and drop that last.
    pub fd: Arc<VmFd>,
    /// The memory that the slots refer to.
    pub ram: Arc<GuestRam>,
    /// What tracks the guest's writes to `ram`.
    tracking: Tracking,
}

#[derive(Debug)]
enum Tracking {
    Rings(Arc<DirtyRings>),
    Bitmap { manual: bool },
}

impl VmShell {
    /// Creates a VM over `ram`, with the in-kernel interrupt controllers and timer. Writes are
    /// tracked from the first instruction: by `tracker`, or by what suits the size of RAM and this
    /// KVM.
    ///
    /// # Errors
    /// [`VmmError::Kvm`], which names what KVM refused; [`VmmError::Config`] if this KVM lacks
    /// `tracker`.
    pub fn new(
        hypervisor: &Hypervisor,
        ram: Arc<GuestRam>,
        tracker: Option<TrackerKind>,
    ) -> Result<Self> {
        let fd = hypervisor.kvm.create_vm().map_err(VmmError::kvm("create a VM"))?;
        let fd = Arc::new(fd);
        // Before there are slots: KVM would give them bitmaps.
        let tracking = track(&fd, &ram, tracker)?;
        fd.set_tss_address(TSS_ADDRESS).map_err(VmmError::kvm("set the TSS address"))?;
        // Slots before devices: once there are devices, adding a slot waits milliseconds for
        // readers of KVM's buses.
        for (slot, (range, address)) in ram.mapped_ranges().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: KVM_MEM_LOG_DIRTY_PAGES,
                guest_phys_addr: range.gpa,
                memory_size: range.len_bytes,
                userspace_addr: address as u64,
            };
            // SAFETY: the mapping belongs to `ram`, which every holder of the VM's handle keeps
            // alive; it is as long as the slot says, and no other slot covers it.
            unsafe { fd.set_user_memory_region(region) }
                .map_err(VmmError::kvm("add a memory slot"))?;
        }
        fd.create_irq_chip().map_err(VmmError::kvm("create the interrupt controllers"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(VmmError::kvm("create the timer"))?;
        Ok(Self { fd, ram, tracking })
    }

    /// The dirty rings: each new vCPU's ring is to be added, and they must be emptied whenever one
    /// is full. None if bitmaps track writes.
    #[must_use]
    pub fn rings(&self) -> Option<&Arc<DirtyRings>> {
        match &self.tracking {
            Tracking::Rings(rings) => Some(rings),
            Tracking::Bitmap { .. } => None,
        }
    }

    /// The kind of tracker in use.
    #[must_use]
    pub fn tracker_kind(&self) -> TrackerKind {
        match &self.tracking {
            Tracking::Rings(_) => TrackerKind::Ring,
            Tracking::Bitmap { manual: true } => TrackerKind::ManualBitmap,
            Tracking::Bitmap { manual: false } => TrackerKind::Bitmap,
        }
    }

    /// A tracker that reports the guest's writes. Have only one: each write is reported once.
    #[must_use]
    pub fn tracker(&self) -> Box<dyn DirtyTracker> {
        match &self.tracking {
            Tracking::Rings(rings) => Box::new(Arc::clone(rings)),
            Tracking::Bitmap { manual } => {
                Box::new(KvmBitmap::new(Arc::clone(&self.fd), &self.ram, *manual))
            }
        }
    }
}

/// Enables the tracker `wanted`. Without one, takes the first that this KVM offers of: rings
/// (except for small machines), bitmaps with manual protection, bitmaps without.
fn track(vm: &Arc<VmFd>, ram: &Arc<GuestRam>, wanted: Option<TrackerKind>) -> Result<Tracking> {
    let refused = |kind: TrackerKind| {
        VmmError::Config(format!("this KVM cannot track writes by {kind}: choose another tracker"))
    };
    match wanted {
        Some(kind @ TrackerKind::Ring) => enable_rings(vm, ram)?.ok_or_else(|| refused(kind)),
        Some(kind @ TrackerKind::ManualBitmap) => {
            if enable_manual_protect(vm)? {
                Ok(Tracking::Bitmap { manual: true })
            } else {
                Err(refused(kind))
            }
        }
        Some(TrackerKind::Bitmap) => Ok(Tracking::Bitmap { manual: false }),
        None => {
            if ram.len_bytes() > SMALL_RAM_BYTES
                && let Some(rings) = enable_rings(vm, ram)?
            {
                return Ok(rings);
            }
            Ok(Tracking::Bitmap { manual: enable_manual_protect(vm)? })
        }
    }
}

fn enable_rings(vm: &Arc<VmFd>, ram: &Arc<GuestRam>) -> Result<Option<Tracking>> {
    // The older capability promises the same order of accesses, though only on x86.
    let Some((cap, len_max)) = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING]
        .map(|cap| (cap, vm.check_extension_raw(cap.into())))
        .into_iter()
        .find(|(_, len_max)| *len_max > 0)
    else {
        return Ok(None);
    };
    let entry_len = size_of::<kvm_dirty_gfn>() as u64;
    let wanted = (ram.end_page() / 16).next_power_of_two();
    let wanted = wanted.clamp(*RING_ENTRIES.start(), *RING_ENTRIES.end());
    let entries = wanted.min(len_max as u64 / entry_len);
    let args = [entries * entry_len, 0, 0, 0];
    vm.enable_cap(&kvm_enable_cap { cap, args, ..Default::default() })
        .map_err(VmmError::kvm("enable dirty rings"))?;
    let rings = DirtyRings::new(Arc::clone(vm), ram, entries as u32);
    Ok(Some(Tracking::Rings(Arc::new(rings))))
}

/// Enables manual protection of the dirty log; returns false if this KVM lacks it.
///
/// `KVM_DIRTY_LOG_INITIALLY_SET` stays off: it reports every page as dirty at first, to save the
/// fault on the first write to each. Our pages are tracked from the first instruction, so pages
/// that nobody touched would be saved as changed.
fn enable_manual_protect(vm: &VmFd) -> Result<bool> {
    let cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
    let offered = vm.check_extension_raw(cap.into());
    if offered & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE as i32 == 0 {
        return Ok(false);
    }
    let args = [u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE), 0, 0, 0];
    vm.enable_cap(&kvm_enable_cap { cap, args, ..Default::default() })
        .map_err(VmmError::kvm("enable manual protection of the dirty log"))?;
    Ok(true)
}
