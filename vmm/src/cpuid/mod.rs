//! The CPUID leaves of each vCPU of a new machine, and the check that this host supports those of a
//! saved one.

mod features;

use kvm_bindings::CpuId;

use crate::error::{Result, VmmError};
use crate::kvm::Hypervisor;

const HYPERVISOR_BIT: u32 = 1 << 31;
const TSC_DEADLINE_BIT: u32 = 1 << 24;
// No nested virtualization: its state is not part of snapshots.
const VMX_BIT: u32 = 1 << 5;
const SVM_BIT: u32 = 1 << 2;

/// The CPUID leaves of vCPU `index` of `cpus`: the host's features, with APIC ids and topology of
/// that vCPU (Intel SDM vol. 2A, CPUID).
///
/// # Errors
/// If KVM cannot list its features.
pub fn for_vcpu(hypervisor: &Hypervisor, index: usize, cpus: usize) -> Result<CpuId> {
    let mut cpuid = hypervisor.supported_cpuid()?;
    let apic_id = index as u32;
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => {
                entry.ecx |= HYPERVISOR_BIT | TSC_DEADLINE_BIT;
                entry.ecx &= !VMX_BIT;
                entry.ebx = entry.ebx & 0xffff | (cpus as u32) << 16 | apic_id << 24;
            }
            // One thread per core, all cores in one package.
            0xb | 0x1f => {
                let levels =
                    [(0, 1, 1), (usize::BITS - (cpus.max(1) - 1).leading_zeros(), cpus as u32, 2)];
                let (shift, count, kind) =
                    levels.get(entry.index as usize).copied().unwrap_or((0, 0, 0));
                (entry.eax, entry.ebx, entry.ecx, entry.edx) =
                    (shift, count, kind << 8 | entry.index, apic_id);
            }
            0x8000_0001 => entry.ecx &= !SVM_BIT,
            0x8000_001e => entry.eax = apic_id,
            _ => {}
        }
    }
    Ok(cpuid)
}

/// Fails unless this host's processor and KVM have all features in `saved`, the leaves of a saved
/// vCPU: the guest detected them once and uses them.
///
/// # Errors
/// [`VmmError::State`] for `chunk`, which names what is missing; if KVM cannot list its features.
pub fn check(hypervisor: &Hypervisor, chunk: &str, saved: &CpuId) -> Result<()> {
    let missing = features::missing(saved, &hypervisor.supported_cpuid()?);
    if missing.is_empty() {
        return Ok(());
    }
    Err(VmmError::State {
        chunk: chunk.to_owned(),
        expected: "a host whose processor and KVM have all features that the guest saw".into(),
        found: format!(
            "one that lacks {}: resume on a host like the one it was saved on",
            missing.join(", ")
        ),
    })
}
