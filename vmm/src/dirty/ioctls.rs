//! The ioctls of dirty tracking that kvm-ioctls lacks, or wraps with a new buffer for each call.
//!
//! `unsafe` is allowed here because these ioctls hand KVM buffers to read and fill.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;

use kvm_bindings::{
    kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use crate::error::{Result, VmmError};

/// The numbers of the ioctls, from the kernel's include/uapi/linux/kvm.h.
#[allow(missing_docs)] // the macros take none
mod nr {
    use kvm_bindings::{KVMIO, kvm_clear_dirty_log, kvm_dirty_log};
    use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr};

    ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
    ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
    ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
}

/// Copies the dirty bits of memory slot `slot` into `bits`, which must have one bit for each of the
/// slot's pages, in whole words. Also clears KVM's bits unless manual protection is enabled.
pub(super) fn get_dirty_log(vm: &VmFd, slot: u32, bits: &mut [u64]) -> Result<()> {
    let log = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: bits.as_mut_ptr().cast() },
    };
    // SAFETY: KVM writes a bit for each page of the slot, in whole words. `bits` has room for them:
    // trackers size it from the same ranges that the slots were made from.
    let ret = unsafe { ioctl_with_ref(vm, nr::KVM_GET_DIRTY_LOG(), &log) };
    done(ret, "read the dirty log")
}

/// Clears the dirty bits of slot `slot` that are set in `bits`, and protects those pages again. The
/// first bit stands for page `first_page`, a multiple of 64. Manual protection only.
pub(super) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first_page: u64,
    pages: u64,
    bits: &[u64],
) -> Result<()> {
    assert!(pages <= bits.len() as u64 * 64, "a bit for each page");
    let mut log = kvm_clear_dirty_log {
        slot,
        num_pages: pages as u32,
        first_page,
        // KVM only reads them.
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: bits.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: KVM reads `pages` bits from `bits`, which has them, by the assertion.
    let ret = unsafe { ioctl_with_mut_ref(vm, nr::KVM_CLEAR_DIRTY_LOG(), &mut log) };
    done(ret, "clear the dirty log")
}

/// Makes KVM reset the ring entries that were taken, and track their pages again; returns how many
/// entries it reset.
///
/// Signals are blocked meanwhile: when one is pending, KVM (Linux 6.16 and later) stops half-way
/// without an error, and does not track some of the pages whose entries it has already recycled.
pub(super) fn reset_dirty_rings(vm: &VmFd) -> Result<u64> {
    let _signals = SignalsHeld::new();
    // SAFETY: this ioctl has no argument, and touches nothing but KVM's own state and the rings.
    let ret = unsafe { ioctl_with_val(vm, nr::KVM_RESET_DIRTY_RINGS(), 0) };
    done(ret, "reset the dirty rings")?;
    Ok(ret as u64)
}

/// Blocks all signals to this thread that can be blocked, until dropped.
struct SignalsHeld(libc::sigset_t);

impl SignalsHeld {
    fn new() -> Self {
        let mut all = MaybeUninit::uninit();
        let mut before = MaybeUninit::uninit();
        // SAFETY: both sets are filled in before they are read, by calls that cannot fail with
        // valid pointers and a valid `how`.
        unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
            Self(before.assume_init())
        }
    }
}

impl Drop for SignalsHeld {
    fn drop(&mut self) {
        // SAFETY: the set is this thread's former mask, which `new` initialized.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut())
        };
    }
}

fn done(ret: i32, op: &'static str) -> Result<()> {
    if ret < 0 { Err(VmmError::kvm(op)(kvm_ioctls::Error::last())) } else { Ok(()) }
}
