//! The notes of a core file: for each vCPU those that Linux writes for a thread, and one about the
//! kernel (include/uapi/linux/elfcore.h and arch/x86/include/asm/user_64.h in the Linux sources).

use super::linux::LinuxKernel;
use super::{GuestView, qemu_note};
use crate::vcpu::saved::{SavedRegs, SavedSregs, SavedVcpu};

const NT_PRSTATUS: u32 = 1;
const NT_FPREGSET: u32 = 2;
const NT_X86_XSTATE: u32 = 0x202;
/// The size of `struct elf_prstatus`, and the offsets of its registers, thread id and `pr_fpvalid`.
const PRSTATUS_BYTES: usize = 336;
const PRSTATUS_REGS: usize = 112;
const PRSTATUS_PID: usize = 32;
const PRSTATUS_FP_VALID: usize = 328;
/// The size of `struct user_i387_struct`, which is the legacy area of XSAVE.
const FPREGSET_BYTES: usize = 512;
/// Where debuggers look for the mask of enabled state components, in bytes that the processor
/// leaves to software.
const XSTATE_XCR0: usize = 464;

/// The CPUID leaf with the locations of state components, one per index.
const CPUID_XSTATE: u32 = 0xd;
/// The size of the legacy area and the header.
const XSTATE_BYTES_MIN: usize = 512 + 64;

/// Returns all notes. Each vCPU's notes follow its NT_PRSTATUS; QEMU's notes come after those of
/// all vCPUs, as in QEMU's own files.
pub(super) fn all(view: &GuestView, kernel: Option<&LinuxKernel>) -> Vec<u8> {
    let mut out = Vec::new();
    for (index, vcpu) in view.vcpus().iter().enumerate() {
        note(&mut out, "CORE", NT_PRSTATUS, &prstatus(index, vcpu));
        if let Some(legacy) = vcpu.xsave.0.get(..FPREGSET_BYTES) {
            note(&mut out, "CORE", NT_FPREGSET, legacy);
        }
        if let Some(state) = xstate(vcpu) {
            note(&mut out, "LINUX", NT_X86_XSTATE, &state);
        }
    }
    for vcpu in view.vcpus() {
        note(&mut out, qemu_note::NAME, 0, &qemu_note::contents(vcpu));
    }
    if let Some(kernel) = kernel {
        note(&mut out, "VMCOREINFO", 0, kernel.info.bytes());
    }
    out
}

fn note(out: &mut Vec<u8>, name: &str, kind: u32, contents: &[u8]) {
    let lens = [name.len() as u32 + 1, contents.len() as u32, kind];
    lens.iter().for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
    out.extend_from_slice(name.as_bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend_from_slice(contents);
    out.resize(out.len().next_multiple_of(4), 0);
}

fn prstatus(index: usize, vcpu: &SavedVcpu) -> Vec<u8> {
    let mut out = vec![0; PRSTATUS_BYTES];
    // Debuggers tell threads apart by this id, and 0 is not a valid one.
    out[PRSTATUS_PID..PRSTATUS_PID + 4].copy_from_slice(&(index as u32 + 1).to_le_bytes());
    for (slot, register) in registers(&vcpu.regs, &vcpu.sregs).into_iter().enumerate() {
        let at = PRSTATUS_REGS + slot * 8;
        out[at..at + 8].copy_from_slice(&register.to_le_bytes());
    }
    out[PRSTATUS_FP_VALID] = 1;
    out
}

/// The registers in the order of `struct user_regs_struct`.
fn registers(regs: &SavedRegs, sregs: &SavedSregs) -> [u64; 27] {
    let SavedRegs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    } = regs;
    let general = [r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi];
    let mut out = [0; 27];
    general.iter().zip(&mut out).for_each(|(register, slot)| *slot = u64::from(**register));
    // Not in a system call that a debugger would restart (`orig_rax`).
    out[15] = u64::MAX;
    let selector = |segment: &crate::vcpu::saved::SavedSegment| u64::from(segment.selector);
    out[16..].copy_from_slice(&[
        u64::from(*rip),
        selector(&sregs.cs),
        u64::from(*rflags),
        u64::from(*rsp),
        selector(&sregs.ss),
        u64::from(sregs.fs.base),
        u64::from(sregs.gs.base),
        selector(&sregs.ds),
        selector(&sregs.es),
        selector(&sregs.fs),
        selector(&sregs.gs),
    ]);
    out
}

/// The XSAVE area with the mask of enabled components in it, cut to the length that these need:
/// debuggers expect no more.
fn xstate(vcpu: &SavedVcpu) -> Option<Vec<u8>> {
    let xcr0 = u64::from(vcpu.xcrs.iter().find(|xcr| xcr.index == 0)?.value);
    let mut state = vcpu.xsave.0.get(..xstate_bytes(vcpu, xcr0))?.to_vec();
    let slot = state.get_mut(XSTATE_XCR0..XSTATE_XCR0 + 8)?;
    slot.copy_from_slice(&xcr0.to_le_bytes());
    Some(state)
}

/// The end of the last enabled component, according to CPUID.
fn xstate_bytes(vcpu: &SavedVcpu, xcr0: u64) -> usize {
    let components = vcpu.cpuid.iter().filter(|leaf| leaf.function == CPUID_XSTATE);
    let enabled =
        components.filter(|leaf| (2..63).contains(&leaf.index) && xcr0 >> leaf.index & 1 != 0);
    let ends = enabled.map(|leaf| leaf.eax as usize + leaf.ebx as usize);
    ends.max().unwrap_or(0).max(XSTATE_BYTES_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_padded_as_readers_expect() {
        let mut out = Vec::new();
        note(&mut out, "CORE", 1, &[7; 5]);
        assert_eq!(out.len(), 12 + 8 + 8);
        assert_eq!(out[..12], [5, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(
            (&out[12..20], &out[20..]),
            (&b"CORE\0\0\0\0"[..], &[7, 7, 7, 7, 7, 0, 0, 0][..])
        );
        let start = out.len();
        note(&mut out, "VMCOREINFO", 0, b"OSRELEASE=6");
        assert_eq!(out.len() - start, 12 + 12 + 12);
    }
}
