//! The built-in guest, and what a host can learn from its memory.
//!
//! The guest (`vmm/guest`) is a small kernel that writes pages at a given rate, in a given order
//! and with given contents, all of which follow from its [`WorkloadSpec`]. So its memory can be
//! checked by itself: [`verify()`] finds any page of a stopped machine, or of a snapshot, that is
//! damaged, misplaced or *older than it should be*, without anything to compare with.
//! `vmm/guest/writer.rs` explains how, and why this holds even for a machine stopped in the middle
//! of a write.
//!
//! The guest boots like any other kernel: load [`GUEST_ELF`] and enter it by the 64-bit Linux boot
//! protocol, with `frazil.workload=` and the specification on the command line.

use std::str::FromStr;

// The guest is built from these files too, so neither side can drift from the other.
#[path = "../../guest/control.rs"]
#[allow(unused_imports, unused_macros, dead_code)] // only the guest uses some of it
pub mod control;
#[path = "../../guest/oracle.rs"]
#[allow(clippy::inline_always)] // the guest's speed is that of these few functions
pub mod oracle;
#[path = "../../guest/spec.rs"]
pub mod spec;
#[cfg(test)]
#[path = "../../guest/writer.rs"]
mod writer;

mod verify;
mod view;

#[cfg(test)]
mod tests;

pub use spec::WorkloadSpec;
pub use verify::{
    BadLedger, BadPage, Damage, InflightReport, StalePage, VcpuReport, VerifyError, VerifyReport,
    verify, verify_parallel,
};
pub use view::{COMMAND_GPA, ControlError, ControlView, PageRead, PageReadShared, VcpuView};

#[repr(C, align(4096))]
struct Aligned<T: ?Sized>(T);

const ALIGNED_ELF: &Aligned<[u8]> =
    &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf")));

/// The built-in guest: a static ELF executable, page-aligned.
pub const GUEST_ELF: &[u8] = &ALIGNED_ELF.0;

/// An invalid workload specification: which key, what was expected and what was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidSpec(String);

impl FromStr for WorkloadSpec {
    type Err = InvalidSpec;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text).map_err(|error| InvalidSpec(error.to_string()))
    }
}

impl WorkloadSpec {
    /// Returns the argument for the guest's kernel command line. [`cpus`](Self::cpus) and
    /// [`tsc_khz`](Self::tsc_khz) must be those of the machine.
    #[must_use]
    pub fn to_cmdline(&self) -> String {
        format!("{}{self}", spec::CMDLINE_KEY)
    }

    /// Checks that a machine with `memory_bytes` of RAM has room for what `touch` asks for.
    ///
    /// # Errors
    /// If the machine has less than that, or less than the guest always needs.
    pub fn check_fits(&self, memory_bytes: u64) -> Result<(), InvalidSpec> {
        const MEMORY_BYTES_MIN: u64 = 32 << 20;
        if memory_bytes < MEMORY_BYTES_MIN {
            let found = memory_bytes >> 10;
            return Err(InvalidSpec(format!(
                "workload: expected 32MiB of memory or more, found {found}KiB"
            )));
        }
        let available = spec::data_bytes_available(memory_bytes) / control::PAGE_BYTES;
        match self.data_pages(available) {
            Some(_) => Ok(()),
            None => Err(InvalidSpec(format!(
                "workload: `touch` expected up to {}KiB (memory less 16MiB), found {}KiB; give the machine more memory",
                available << 2,
                self.touch_bytes.unwrap_or(0) >> 10
            ))),
        }
    }
}
