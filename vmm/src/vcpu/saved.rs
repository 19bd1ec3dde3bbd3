//! The saved form of a vCPU: named fields, readable as JSON, separate from KVM's structures.

use std::time::Duration;

use kvm_bindings::{
    KVM_MP_STATE_AP_RESET_HOLD, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED,
    kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs,
    kvm_vcpu_events, kvm_xcr, kvm_xcrs,
};
use serde::{Deserialize, Serialize};

use crate::state::{HexBytes, Saved, hex_u64};

/// The time stamp counter (Intel SDM vol. 4, table 2-2).
pub(super) const MSR_IA32_TSC: u32 = 0x10;

/// Declares a saved type with the fields of a KVM structure, and both conversions. The pattern
/// names every field, so one that KVM adds breaks the build.
macro_rules! mirror {
    ($(#[$doc:meta])* $saved:ident = $kvm:ident { $($field:ident: $type:ty),* $(,)? } skip { $($skip:ident),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        #[allow(missing_docs)] // the names are those of the processor manuals
        pub struct $saved {
            $(pub $field: $type,)*
        }

        impl From<&$kvm> for $saved {
            fn from(value: &$kvm) -> Self {
                let $kvm { $($field,)* $($skip: _,)* } = *value;
                Self { $($field: $field.into(),)* }
            }
        }

        impl From<&$saved> for $kvm {
            fn from(value: &$saved) -> Self {
                let $saved { $($field,)* } = value.clone();
                #[allow(clippy::needless_update)] // padding, where there is some
                Self { $($field: $field.into(),)* ..Default::default() }
            }
        }
    };
}

/// A 64-bit register; `"0x…"` in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Reg(#[serde(with = "hex_u64")] pub u64);

impl From<u64> for Reg {
    fn from(value: u64) -> Self {
        Self(value)
    }
}

impl From<Reg> for u64 {
    fn from(value: Reg) -> Self {
        value.0
    }
}

mirror! {
    /// General registers.
    SavedRegs = kvm_regs {
        rax: Reg, rbx: Reg, rcx: Reg, rdx: Reg, rsi: Reg, rdi: Reg, rsp: Reg, rbp: Reg,
        r8: Reg, r9: Reg, r10: Reg, r11: Reg, r12: Reg, r13: Reg, r14: Reg, r15: Reg,
        rip: Reg, rflags: Reg,
    } skip {}
}

mirror! {
    /// A segment register with its hidden part.
    SavedSegment = kvm_segment {
        base: Reg, limit: u32, selector: u16, type_: u8, present: u8, dpl: u8, db: u8, s: u8,
        l: u8, g: u8, avl: u8, unusable: u8,
    } skip { padding }
}

mirror! {
    /// A descriptor table register.
    SavedTable = kvm_dtable { base: Reg, limit: u16 } skip { padding }
}

impl From<kvm_segment> for SavedSegment {
    fn from(value: kvm_segment) -> Self {
        Self::from(&value)
    }
}

impl From<SavedSegment> for kvm_segment {
    fn from(value: SavedSegment) -> Self {
        Self::from(&value)
    }
}

impl From<kvm_dtable> for SavedTable {
    fn from(value: kvm_dtable) -> Self {
        Self::from(&value)
    }
}

impl From<SavedTable> for kvm_dtable {
    fn from(value: SavedTable) -> Self {
        Self::from(&value)
    }
}

mirror! {
    /// Segment, table and control registers, and the interrupt being delivered.
    SavedSregs = kvm_sregs {
        cs: SavedSegment, ds: SavedSegment, es: SavedSegment, fs: SavedSegment, gs: SavedSegment,
        ss: SavedSegment, tr: SavedSegment, ldt: SavedSegment, gdt: SavedTable, idt: SavedTable,
        cr0: Reg, cr2: Reg, cr3: Reg, cr4: Reg, cr8: Reg, efer: Reg, apic_base: Reg,
        interrupt_bitmap: [u64; 4],
    } skip {}
}

mirror! {
    /// Debug registers.
    SavedDebugRegs = kvm_debugregs { db: [u64; 4], dr6: Reg, dr7: Reg, flags: u64 } skip { reserved }
}

/// Exceptions, interrupts, NMIs and SMIs that are pending or being delivered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // the names are KVM's
pub struct SavedEvents {
    pub exception_injected: u8,
    pub exception_nr: u8,
    pub exception_has_error_code: u8,
    pub exception_pending: u8,
    pub exception_error_code: u32,
    pub exception_has_payload: u8,
    pub exception_payload: Reg,
    pub interrupt_injected: u8,
    pub interrupt_nr: u8,
    pub interrupt_soft: u8,
    pub interrupt_shadow: u8,
    pub nmi_injected: u8,
    pub nmi_pending: u8,
    pub nmi_masked: u8,
    pub sipi_vector: u32,
    pub flags: u32,
    pub smi_smm: u8,
    pub smi_pending: u8,
    pub smi_smm_inside_nmi: u8,
    pub smi_latched_init: u8,
    pub triple_fault_pending: u8,
}

impl From<&kvm_vcpu_events> for SavedEvents {
    fn from(value: &kvm_vcpu_events) -> Self {
        let kvm_vcpu_events {
            exception,
            interrupt,
            nmi,
            sipi_vector,
            flags,
            smi,
            triple_fault,
            reserved: _,
            exception_has_payload,
            exception_payload,
        } = *value;
        Self {
            exception_injected: exception.injected,
            exception_nr: exception.nr,
            exception_has_error_code: exception.has_error_code,
            exception_pending: exception.pending,
            exception_error_code: exception.error_code,
            exception_has_payload,
            exception_payload: exception_payload.into(),
            interrupt_injected: interrupt.injected,
            interrupt_nr: interrupt.nr,
            interrupt_soft: interrupt.soft,
            interrupt_shadow: interrupt.shadow,
            nmi_injected: nmi.injected,
            nmi_pending: nmi.pending,
            nmi_masked: nmi.masked,
            sipi_vector,
            flags,
            smi_smm: smi.smm,
            smi_pending: smi.pending,
            smi_smm_inside_nmi: smi.smm_inside_nmi,
            smi_latched_init: smi.latched_init,
            triple_fault_pending: triple_fault.pending,
        }
    }
}

impl From<&SavedEvents> for kvm_vcpu_events {
    fn from(value: &SavedEvents) -> Self {
        let SavedEvents {
            exception_injected,
            exception_nr,
            exception_has_error_code,
            exception_pending,
            exception_error_code,
            exception_has_payload,
            exception_payload,
            interrupt_injected,
            interrupt_nr,
            interrupt_soft,
            interrupt_shadow,
            nmi_injected,
            nmi_pending,
            nmi_masked,
            sipi_vector,
            flags,
            smi_smm,
            smi_pending,
            smi_smm_inside_nmi,
            smi_latched_init,
            triple_fault_pending,
        } = *value;
        let mut events = Self::default();
        events.exception.injected = exception_injected;
        events.exception.nr = exception_nr;
        events.exception.has_error_code = exception_has_error_code;
        events.exception.pending = exception_pending;
        events.exception.error_code = exception_error_code;
        events.exception_has_payload = exception_has_payload;
        events.exception_payload = exception_payload.into();
        events.interrupt.injected = interrupt_injected;
        events.interrupt.nr = interrupt_nr;
        events.interrupt.soft = interrupt_soft;
        events.interrupt.shadow = interrupt_shadow;
        events.nmi.injected = nmi_injected;
        events.nmi.pending = nmi_pending;
        events.nmi.masked = nmi_masked;
        events.sipi_vector = sipi_vector;
        events.flags = flags;
        events.smi.smm = smi_smm;
        events.smi.pending = smi_pending;
        events.smi.smm_inside_nmi = smi_smm_inside_nmi;
        events.smi.latched_init = smi_latched_init;
        events.triple_fault.pending = triple_fault_pending;
        events
    }
}

/// One CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct SavedCpuid {
    pub function: u32,
    pub index: u32,
    pub flags: u32,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

impl From<&kvm_cpuid_entry2> for SavedCpuid {
    fn from(value: &kvm_cpuid_entry2) -> Self {
        let kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: _ } = *value;
        Self { function, index, flags, eax, ebx, ecx, edx }
    }
}

impl From<&SavedCpuid> for kvm_cpuid_entry2 {
    fn from(value: &SavedCpuid) -> Self {
        let SavedCpuid { function, index, flags, eax, ebx, ecx, edx } = *value;
        Self { function, index, flags, eax, ebx, ecx, edx, padding: [0; 3] }
    }
}

/// One model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedMsr {
    /// Its number; `"0x…"` in JSON.
    pub index: Reg,
    /// Its value.
    pub value: Reg,
}

/// One extended control register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedXcr {
    /// Its number.
    pub index: u32,
    /// Its value.
    pub value: Reg,
}

impl SavedXcr {
    pub(super) fn all(xcrs: &kvm_xcrs) -> Vec<Self> {
        let used = (xcrs.nr_xcrs as usize).min(xcrs.xcrs.len());
        xcrs.xcrs[..used]
            .iter()
            .map(|xcr| Self { index: xcr.xcr, value: xcr.value.into() })
            .collect()
    }

    pub(super) fn restore(saved: &[Self]) -> Result<kvm_xcrs, String> {
        let mut xcrs = kvm_xcrs::default();
        if saved.len() > xcrs.xcrs.len() {
            return Err(format!(
                "{} of them, more than the {} that KVM takes",
                saved.len(),
                xcrs.xcrs.len()
            ));
        }
        xcrs.nr_xcrs = saved.len() as u32;
        for (slot, xcr) in xcrs.xcrs.iter_mut().zip(saved) {
            *slot = kvm_xcr { xcr: xcr.index, reserved: 0, value: xcr.value.into() };
        }
        Ok(xcrs)
    }
}

/// Everything KVM keeps for one vCPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedVcpu {
    /// KVM's multiprocessing state: runnable, halted, waiting for SIPI, …
    pub mp_state: u32,
    /// Frequency of the guest's TSC in kHz, 0 if KVM could not tell.
    pub tsc_khz: u32,
    /// General registers.
    pub regs: SavedRegs,
    /// Segment, table and control registers.
    pub sregs: SavedSregs,
    /// Debug registers.
    pub debug_regs: SavedDebugRegs,
    /// Extended control registers.
    pub xcrs: Vec<SavedXcr>,
    /// The XSAVE area (Intel SDM vol. 1, 13.4): FPU, SSE, AVX and whatever else there is.
    pub xsave: HexBytes,
    /// The local APIC's register page.
    pub lapic: HexBytes,
    /// Model-specific registers, in the order KVM lists them.
    pub msrs: Vec<SavedMsr>,
    /// Events that are pending or being delivered.
    pub events: SavedEvents,
    /// The CPUID leaves.
    pub cpuid: Vec<SavedCpuid>,
}

impl SavedVcpu {
    /// Advances the TSC by `later`.
    pub(crate) fn advance(&mut self, later: Duration) {
        let ticks = later.as_nanos().saturating_mul(self.tsc_khz.into()) / 1_000_000;
        for msr in self.msrs.iter_mut().filter(|msr| msr.index.0 == u64::from(MSR_IA32_TSC)) {
            msr.value.0 = msr.value.0.wrapping_add(ticks as u64);
        }
    }
}

impl Saved for SavedVcpu {
    const KIND: &'static str = "kvm.vcpu";
    const VERSION: u32 = 1;
}

/// Converts a saved MP state to KVM's form; `None` if no processor of a PC is ever in that state,
/// which KVM does not check.
pub(super) fn mp_state(saved: u32) -> Option<kvm_mp_state> {
    let known = [
        KVM_MP_STATE_RUNNABLE,
        KVM_MP_STATE_UNINITIALIZED,
        KVM_MP_STATE_INIT_RECEIVED,
        KVM_MP_STATE_HALTED,
        KVM_MP_STATE_SIPI_RECEIVED,
        KVM_MP_STATE_AP_RESET_HOLD,
    ];
    known.contains(&saved).then_some(kvm_mp_state { mp_state: saved })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_round_trip_through_json() {
        let regs = kvm_regs { rax: u64::MAX, rip: 0x10_0000, rflags: 2, ..Default::default() };
        let json = serde_json::to_string(&SavedRegs::from(&regs)).unwrap();
        assert!(json.contains("\"rip\":\"0x100000\""), "{json}");
        let back: SavedRegs = serde_json::from_str(&json).unwrap();
        assert_eq!(kvm_regs::from(&back), regs);
    }

    #[test]
    fn events_and_sregs_round_trip() {
        let mut events = kvm_vcpu_events {
            sipi_vector: 3,
            flags: 9,
            exception_payload: 1 << 60,
            ..Default::default()
        };
        events.exception.nr = 14;
        events.triple_fault.pending = 1;
        assert_eq!(kvm_vcpu_events::from(&SavedEvents::from(&events)), events);
        let mut sregs =
            kvm_sregs { cr3: 0x9000, interrupt_bitmap: [1, 2, 3, 4], ..Default::default() };
        sregs.cs.type_ = 11;
        sregs.gdt.limit = 0x27;
        assert_eq!(kvm_sregs::from(&SavedSregs::from(&sregs)), sregs);
    }
}
