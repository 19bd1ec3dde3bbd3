//! Counts how often, and why, vCPUs exit to user space. Exits that KVM handles itself are not seen.

use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, kvm_run};
use kvm_ioctls::VcpuExit;

/// Counters shared by all vCPUs of a machine.
#[derive(Debug, Default)]
pub(super) struct ExitCounters {
    port_io: AtomicU64,
    mmio: AtomicU64,
    kicked: AtomicU64,
    ring_full: AtomicU64,
    other: AtomicU64,
}

/// Exits of all vCPUs since the machine was built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExitCounts {
    /// For an access to an I/O port.
    pub port_io: u64,
    /// For an access outside RAM: to a device on the MMIO bus, or to nothing.
    pub mmio: u64,
    /// Because somebody wanted the vCPU to stop, or a signal came.
    pub kicked: u64,
    /// Because the vCPU's dirty ring was full.
    pub ring_full: u64,
    /// For anything else.
    pub other: u64,
}

/// Returns the width in bytes of one port access. A string instruction (`rep insb`) makes many
/// accesses to the same port in one exit, and no wrapper tells how wide they are.
///
/// # Safety
/// `run` must be that of a vCPU that has just left KVM_RUN for port I/O.
pub(super) unsafe fn port_access_bytes(run: *const kvm_run) -> usize {
    // SAFETY: as the caller guarantees; such an exit fills this member of the union.
    let size = unsafe { (&raw const (*run).__bindgen_anon_1.io.size).read_volatile() };
    usize::from(size).max(1)
}

impl ExitCounters {
    pub(super) fn count(&self, exit: &Result<VcpuExit<'_>, kvm_ioctls::Error>) {
        let counter = match exit {
            Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => &self.port_io,
            Ok(VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..)) => &self.mmio,
            Ok(VcpuExit::Intr) => &self.kicked,
            Err(error) if error.errno() == libc::EINTR => &self.kicked,
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => &self.ring_full,
            _ => &self.other,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn counts(&self) -> ExitCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ExitCounts {
            port_io: get(&self.port_io),
            mmio: get(&self.mmio),
            kicked: get(&self.kicked),
            ring_full: get(&self.ring_full),
            other: get(&self.other),
        }
    }
}
