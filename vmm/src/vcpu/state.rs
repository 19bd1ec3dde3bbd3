//! Reads a vCPU's state out of KVM, and puts it into a vCPU, new or used.
//!
//! `unsafe` is allowed here for the XSAVE calls, whose buffers must be as long as KVM expects.
#![allow(unsafe_code)]

use std::sync::OnceLock;

use kvm_bindings::{
    CpuId, KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, Msrs, Xsave, kvm_debugregs,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_sync_regs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, SyncReg, VcpuFd, VmFd};

use super::saved::{MSR_IA32_TSC, SavedCpuid, SavedMsr, SavedVcpu, SavedXcr, mp_state};
use crate::error::{Result, VmmError};
use crate::state::HexBytes;

const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
const XSAVE_LEN: usize = 4096;
/// The lowest bit of CR3 that is part of the address of a page table.
const PAGE_TABLE_BIT: u64 = 1 << 12;

/// Everything KVM keeps for one vCPU, in KVM's own form, as read while the guest is stopped.
#[derive(Debug)]
pub(super) struct RawVcpu {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    debug_regs: kvm_debugregs,
    xcrs: kvm_xcrs,
    xsave: Xsave,
    lapic: kvm_lapic_state,
    msrs: Msrs,
    events: kvm_vcpu_events,
    tsc_khz: u32,
}

/// What reading the state needs, found out once: which MSRs there are, how long the XSAVE area is.
#[derive(Debug)]
pub(super) struct StateReader {
    msrs: Msrs,
    xsave_extra_words: usize,
    cpuid: Vec<SavedCpuid>,
    /// Whether KVM_RUN can leave registers in `kvm_run`.
    can_sync: bool,
    tsc_khz: OnceLock<u32>,
}

/// The parts of a vCPU's state that `kvm_run` can hold.
const SYNC_ALL: u32 = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;

impl StateReader {
    /// Finds out which of `msr_indices` this vCPU has: KVM lists some that a guest lacks.
    pub(super) fn new(
        vm: &VmFd,
        vcpu: &VcpuFd,
        msr_indices: &[u32],
        cpuid: &CpuId,
    ) -> Result<Self> {
        let mut indices = msr_indices.to_vec();
        let msrs = loop {
            let mut msrs = msr_list(&indices)?;
            let read = vcpu.get_msrs(&mut msrs).map_err(VmmError::kvm("read MSRs"))?;
            if read == indices.len() {
                break msrs;
            }
            // KVM stops at the first MSR that it cannot read.
            indices.remove(read);
        };
        let xsave_len =
            usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(XSAVE_LEN);
        Ok(Self {
            msrs,
            xsave_extra_words: (xsave_len - XSAVE_LEN).div_ceil(4),
            cpuid: cpuid.as_slice().iter().map(SavedCpuid::from).collect(),
            can_sync: vm.check_extension_int(Cap::SyncRegs) as u32 & SYNC_ALL == SYNC_ALL,
            tsc_khz: OnceLock::new(),
        })
    }

    /// Sets whether KVM_RUN leaves registers and events in `kvm_run` when it returns, if this KVM
    /// can. This is cheaper than asking: each call that reads part of a vCPU's state has to load
    /// the vCPU.
    pub(super) fn want_sync(&self, vcpu: &mut VcpuFd, wanted: bool) {
        if self.can_sync {
            for reg in [SyncReg::Register, SyncReg::SystemRegister, SyncReg::VcpuEvents] {
                if wanted { vcpu.set_sync_valid_reg(reg) } else { vcpu.clear_sync_valid_reg(reg) }
            }
        }
    }

    /// Reads the MP state. It must be read first: reading it makes KVM apply the vCPU's pending
    /// events, which may change everything else.
    pub(super) fn read_mp_state(vcpu: &VcpuFd) -> Result<kvm_mp_state> {
        vcpu.get_mp_state().map_err(VmmError::kvm("read the MP state"))
    }

    /// Allocates room for the state of a vCPU, so that nothing is allocated while the guest stands
    /// still.
    pub(super) fn room(&self) -> Result<Box<RawVcpu>> {
        let xsave = Xsave::new(self.xsave_extra_words).map_err(|error| {
            VmmError::Config(format!("cannot allocate the XSAVE area: {error:?}"))
        })?;
        Ok(Box::new(RawVcpu {
            mp_state: kvm_mp_state::default(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            debug_regs: kvm_debugregs::default(),
            xcrs: kvm_xcrs::default(),
            xsave,
            lapic: kvm_lapic_state::default(),
            msrs: self.msrs.clone(),
            events: kvm_vcpu_events::default(),
            tsc_khz: 0,
        }))
    }

    /// Reads the state of a vCPU that has left KVM_RUN after [`Self::read_mp_state`] and
    /// [`Self::want_sync`], and has done nothing since. The MSRs are read after the LAPIC, since
    /// the TSC deadline timer belongs to both.
    pub(super) fn read(
        &self,
        vcpu: &VcpuFd,
        mp_state: kvm_mp_state,
        into: &mut RawVcpu,
    ) -> Result<()> {
        let RawVcpu {
            mp_state: mp_state_room,
            regs,
            sregs,
            debug_regs,
            xcrs,
            xsave,
            lapic,
            msrs,
            events,
            tsc_khz,
        } = into;
        *mp_state_room = mp_state;
        (*regs, *sregs, *events) = self.read_synced(vcpu)?;
        self.read_xsave(vcpu, xsave)?;
        *xcrs = vcpu.get_xcrs().map_err(VmmError::kvm("read extended control registers"))?;
        *debug_regs = vcpu.get_debug_regs().map_err(VmmError::kvm("read debug registers"))?;
        *lapic = vcpu.get_lapic().map_err(VmmError::kvm("read the local APIC"))?;
        let expected = msrs.as_slice().len();
        let read = vcpu.get_msrs(msrs).map_err(VmmError::kvm("read MSRs"))?;
        if read != expected {
            let index = msrs.as_slice()[read].index;
            return Err(VmmError::State {
                chunk: "vcpu".into(),
                expected: format!("MSR {index:#x} to be readable, as before"),
                found: "that KVM refuses to read it".into(),
            });
        }
        // Only this VMM changes the frequency, and only before the vCPU starts.
        *tsc_khz = *self.tsc_khz.get_or_init(|| vcpu.get_tsc_khz().unwrap_or(0));
        Ok(())
    }

    fn read_synced(&self, vcpu: &VcpuFd) -> Result<(kvm_regs, kvm_sregs, kvm_vcpu_events)> {
        if self.can_sync {
            let kvm_sync_regs { regs, sregs, events } = vcpu.sync_regs();
            return Ok((regs, sregs, events));
        }
        let regs = vcpu.get_regs().map_err(VmmError::kvm("read registers"))?;
        let sregs = vcpu.get_sregs().map_err(VmmError::kvm("read segment registers"))?;
        let events = vcpu.get_vcpu_events().map_err(VmmError::kvm("read pending events"))?;
        Ok((regs, sregs, events))
    }

    fn read_xsave(&self, vcpu: &VcpuFd, xsave: &mut Xsave) -> Result<()> {
        if self.xsave_extra_words == 0 {
            let plain = vcpu.get_xsave().map_err(VmmError::kvm("read the XSAVE area"))?;
            // SAFETY: only the fixed part is replaced; the length of the extra part stays zero.
            unsafe { xsave.as_mut_fam_struct() }.xsave.region = plain.region;
        } else {
            // SAFETY: the buffer is as long as KVM_CAP_XSAVE2 said.
            unsafe { vcpu.get_xsave2(xsave) }.map_err(VmmError::kvm("read the XSAVE area"))?;
        }
        Ok(())
    }

    /// Puts `saved` into a vCPU whose CPUID is set already.
    pub(super) fn restore(&self, vcpu: &VcpuFd, chunk: &str, saved: &SavedVcpu) -> Result<()> {
        restore(vcpu, chunk, saved, self.xsave_extra_words)
    }

    /// Checks that `saved` has the CPUID of this vCPU, which is fixed once the vCPU has run.
    pub(super) fn check_cpuid(&self, chunk: &str, saved: &SavedVcpu) -> Result<()> {
        if saved.cpuid == self.cpuid {
            return Ok(());
        }
        Err(VmmError::State {
            chunk: chunk.to_owned(),
            expected: "the CPUID that this vCPU runs with, which can no longer change".into(),
            found: "another: resume the snapshot instead".into(),
        })
    }

    /// Replaces the state of vCPU `index`, which has run and has nothing pending, with `saved`.
    pub(super) fn replace(&self, vcpu: &VcpuFd, index: usize, saved: &SavedVcpu) -> Result<()> {
        // Applies the vCPU's pending events (INIT, SIPI), so that none comes afterwards.
        Self::read_mp_state(vcpu)?;
        // The page tables were changed behind the vCPU's back. CR3 may be the same as before, and
        // KVM forgets its translations only when CR3 changes.
        let mut elsewhere: kvm_sregs = (&saved.sregs).into();
        elsewhere.cr3 ^= PAGE_TABLE_BIT;
        vcpu.set_sregs(&elsewhere).map_err(VmmError::kvm("set segment registers"))?;
        self.restore(vcpu, &format!("vcpu{index}"), saved)
    }

    /// Converts what was read to its saved form.
    pub(super) fn save(&self, raw: &RawVcpu) -> SavedVcpu {
        let fixed = raw.xsave.as_fam_struct_ref().xsave.region;
        let words = fixed.iter().chain(raw.xsave.as_slice());
        SavedVcpu {
            mp_state: raw.mp_state.mp_state,
            tsc_khz: raw.tsc_khz,
            regs: (&raw.regs).into(),
            sregs: (&raw.sregs).into(),
            debug_regs: (&raw.debug_regs).into(),
            xcrs: SavedXcr::all(&raw.xcrs),
            xsave: HexBytes(words.flat_map(|word| word.to_le_bytes()).collect()),
            lapic: HexBytes(raw.lapic.regs.iter().map(|byte| *byte as u8).collect()),
            msrs: raw
                .msrs
                .as_slice()
                .iter()
                .map(|msr| SavedMsr { index: u64::from(msr.index).into(), value: msr.data.into() })
                .collect(),
            events: (&raw.events).into(),
            cpuid: self.cpuid.clone(),
        }
    }
}

fn msr_list(indices: &[u32]) -> Result<Msrs> {
    let entries: Vec<_> =
        indices.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
    Msrs::from_entries(&entries)
        .map_err(|error| VmmError::Config(format!("cannot make a list of MSRs: {error:?}")))
}

/// Converts the CPUID leaves of a saved vCPU to KVM's form.
pub(super) fn restore_cpuid(chunk: &str, saved: &[SavedCpuid]) -> Result<CpuId> {
    let entries: Vec<_> = saved.iter().map(Into::into).collect();
    CpuId::from_entries(&entries).map_err(|_| too_many(chunk, "CPUID leaves", saved.len()))
}

/// The error for a list that is longer than KVM takes.
fn too_many(chunk: &str, what: &str, found: usize) -> VmmError {
    VmmError::State {
        chunk: chunk.to_owned(),
        expected: format!("no more {what} than KVM takes"),
        found: found.to_string(),
    }
}

/// Puts `saved` into a vCPU whose CPUID is set already. Where the order matters:
/// - SREGS before the LAPIC: they hold the APIC base, which decides the LAPIC's mode;
/// - XSAVE and XCRS, in either order, after SREGS, whose CR4 enables them;
/// - the LAPIC before the MSRs: the deadline timer needs the timer mode;
/// - the TSC before the TSC deadline;
/// - the events after everything that may clear one; the MP state last, since it lets the vCPU go.
fn restore(vcpu: &VcpuFd, chunk: &str, saved: &SavedVcpu, extra_words: usize) -> Result<()> {
    let wrong = |expected: &str, found: String| VmmError::State {
        chunk: chunk.to_owned(),
        expected: expected.to_owned(),
        found,
    };
    let refuses = |what: &'static str| {
        move |error: kvm_ioctls::Error| wrong(what, format!("values that KVM refuses: {error}"))
    };
    let host_khz = vcpu.get_tsc_khz().unwrap_or(0);
    if saved.tsc_khz != 0 && saved.tsc_khz != host_khz {
        // Without TSC scaling KVM refuses, and the guest's clocks run at the host's rate.
        if let Err(error) = vcpu.set_tsc_khz(saved.tsc_khz) {
            tracing::warn!(saved = saved.tsc_khz, host_khz, %error, "the guest's TSC will run at another rate");
        }
    }
    vcpu.set_sregs(&(&saved.sregs).into()).map_err(refuses("valid segment registers"))?;
    vcpu.set_regs(&(&saved.regs).into()).map_err(refuses("valid registers"))?;
    restore_xsave(vcpu, &saved.xsave, extra_words)
        .map_err(|found| wrong("an XSAVE area that this host accepts", found))?;
    let xcrs = SavedXcr::restore(&saved.xcrs)
        .map_err(|found| wrong("extended control registers", found))?;
    vcpu.set_xcrs(&xcrs).map_err(refuses("valid extended control registers"))?;
    vcpu.set_debug_regs(&(&saved.debug_regs).into()).map_err(refuses("valid debug registers"))?;
    let mut lapic = kvm_lapic_state::default();
    if saved.lapic.0.len() != lapic.regs.len() {
        return Err(wrong(
            &format!("{} bytes of local APIC", lapic.regs.len()),
            saved.lapic.0.len().to_string(),
        ));
    }
    lapic.regs.iter_mut().zip(&saved.lapic.0).for_each(|(slot, byte)| *slot = *byte as _);
    vcpu.set_lapic(&lapic).map_err(refuses("valid local APIC registers"))?;
    restore_msrs(vcpu, chunk, &saved.msrs)?;
    vcpu.set_vcpu_events(&(&saved.events).into()).map_err(refuses("valid pending events"))?;
    let mp_state = mp_state(saved.mp_state)
        .ok_or_else(|| wrong("a valid MP state", saved.mp_state.to_string()))?;
    vcpu.set_mp_state(mp_state).map_err(refuses("a valid MP state"))
}

/// Restores the XSAVE area. `extra_words` is how much longer this VM's area is than the fixed part:
/// KVM reads that many.
fn restore_xsave(vcpu: &VcpuFd, saved: &HexBytes, extra_words: usize) -> Result<(), String> {
    let (words, rest) = saved.0.as_chunks::<4>();
    let most = XSAVE_LEN + extra_words * 4;
    if !rest.is_empty() || saved.0.len() < XSAVE_LEN || saved.0.len() > most {
        return Err(format!("{} bytes, where it takes {XSAVE_LEN} to {most}", saved.0.len()));
    }
    let mut words: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
    // A shorter area has fewer features in use; the rest are in their initial state, zero.
    words.resize(most / 4, 0);
    let (fixed, extra) = words.split_at(XSAVE_LEN / 4);
    let mut xsave = Xsave::new(extra.len()).map_err(|error| format!("{error:?}"))?;
    // SAFETY: only the fixed part is replaced; the length of the extra part stays as it is.
    unsafe { xsave.as_mut_fam_struct() }.xsave.region.copy_from_slice(fixed);
    xsave.as_mut_slice().copy_from_slice(extra);
    let set = if extra.is_empty() {
        // SAFETY: KVM reads only the fixed part.
        unsafe { vcpu.set_xsave(&xsave.as_fam_struct_ref().xsave) }
    } else {
        // SAFETY: the buffer is as long as KVM_CAP_XSAVE2 said.
        unsafe { vcpu.set_xsave2(&xsave) }
    };
    set.map_err(|error| format!("{} bytes, which KVM refuses: {error}", saved.0.len()))
}

fn restore_msrs(vcpu: &VcpuFd, chunk: &str, saved: &[SavedMsr]) -> Result<()> {
    let rank = |index: u32| match index {
        MSR_IA32_TSC => 1,
        MSR_IA32_TSC_DEADLINE => 2,
        _ => 0,
    };
    let entry = |msr: &SavedMsr| {
        let index = u32::try_from(msr.index.0).map_err(|_| VmmError::State {
            chunk: chunk.to_owned(),
            expected: "a 32-bit MSR number".into(),
            found: format!("{:#x}", msr.index.0),
        })?;
        Ok(kvm_msr_entry { index, data: msr.value.0, ..Default::default() })
    };
    let mut entries = saved.iter().map(entry).collect::<Result<Vec<_>>>()?;
    entries.sort_by_key(|entry| rank(entry.index));
    let mut rest = entries.as_slice();
    while !rest.is_empty() {
        let msrs = Msrs::from_entries(rest).map_err(|_| too_many(chunk, "MSRs", rest.len()))?;
        let set = vcpu.set_msrs(&msrs).map_err(VmmError::kvm("set MSRs"))?;
        if set == rest.len() {
            break;
        }
        // KVM stopped at an MSR that it refuses to set. That is no loss if the vCPU has the value
        // anyway.
        let refused = rest[set];
        let mut now = msr_list(&[refused.index])?;
        let read = vcpu.get_msrs(&mut now).map_err(VmmError::kvm("read MSRs"))?;
        let value = now.as_slice()[0].data;
        if read != 1 || value != refused.data {
            return Err(VmmError::State {
                chunk: chunk.to_owned(),
                expected: format!("MSR {:#x} to take {:#x}", refused.index, refused.data),
                found: format!(
                    "that KVM refuses (it holds {value:#x}): this host's KVM or processor differs"
                ),
            });
        }
        rest = &rest[set + 1..];
    }
    Ok(())
}
