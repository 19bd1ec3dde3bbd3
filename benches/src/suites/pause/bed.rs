//! A warmed-up guest with a store.

use tempfile::TempDir;

use crate::bench::{Bench, size_label};
use crate::machine::{Machine, create_store};
use crate::series::checkpoint;
use crate::suites::checkpoint::TENTH_WRITES;

/// Random text pages, 10,000 a second: 1,000 in 100 ms.
pub(super) const RANDOM_SPEC: &str = "rate=10000,pattern=uniform,content=text,report=0,gap_us=50";
/// The same, in the order of pages.
pub(super) const SEQ_SPEC: &str = "rate=10000,pattern=seq,content=text,report=0,gap_us=50";

/// A guest to take checkpoints of. Field order matters: the VM is dropped before its store's
/// folder.
pub(super) struct Bed {
    pub machine: Machine,
    pub label: String,
    _folder: TempDir,
}

impl Bed {
    /// Boots a guest with `spec`, lets it write all its memory, and takes two checkpoints: a full
    /// one, and one that catches up with what was written meanwhile.
    pub(super) fn boot(
        bench: &Bench,
        spec: &str,
        ram_bytes: u64,
        cpus: usize,
    ) -> anyhow::Result<Self> {
        let folder = bench.scratch()?;
        let store = create_store(&folder.path().join("store"))?;
        let machine = Machine::boot_cpus(spec, ram_bytes, cpus, Some(store))?;
        checkpoint(&machine.vm)?;
        checkpoint(&machine.vm)?;
        Ok(Self { machine, label: size_label(ram_bytes), _folder: folder })
    }

    /// Waits until the guest has changed a tenth of its pages: with `random`, random ones, some of
    /// them more than once; otherwise consecutive ones.
    pub(super) fn wait_tenth(&self, random: bool) -> anyhow::Result<()> {
        let pages = self.machine.data_pages;
        let writes = if random { (pages as f64 * TENTH_WRITES) as u64 } else { pages / 10 };
        self.machine.wait_turns(self.machine.turns()? + writes)?;
        Ok(())
    }
}
