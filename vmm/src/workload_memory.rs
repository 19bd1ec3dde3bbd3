//! Checking live memory and snapshots with the built-in workload's oracle.

use std::io;

use frazil_snapstore::{PageSource, RegionReader, Snapshot};

use crate::error::{Result, VmmError};
use crate::machine::{MACHINE_CHUNK, SavedMachine, take_machine};
use crate::memory::{GuestRam, RAM_REGION};
use crate::state::ChunkSet;
use crate::workload::{PageRead, PageReadShared, VerifyReport, verify_parallel};

/// A guest's live RAM; reading a page that is not loaded yet loads it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Live<'a>(pub &'a GuestRam);

impl PageReadShared for Live<'_> {
    fn read_page(&self, page: u64, buf: &mut [u8; 4096]) -> io::Result<()> {
        PageSource::read_page(self.0, page, buf)
    }
}

impl PageRead for Live<'_> {
    fn read_page(&mut self, page: u64, buf: &mut [u8; 4096]) -> io::Result<()> {
        PageSource::read_page(self.0, page, buf)
    }
}

struct Stored(RegionReader);

impl PageReadShared for Stored {
    fn read_page(&self, page: u64, buf: &mut [u8; 4096]) -> io::Result<()> {
        self.0.read_page(page, buf).map_err(io::Error::other)
    }
}

/// The machine that `snapshot` holds.
///
/// # Errors
/// [`VmmError::Config`] if the snapshot holds no machine; [`VmmError::State`] if the chunk cannot
/// be read; store errors.
pub fn saved_machine(snapshot: &Snapshot) -> Result<SavedMachine> {
    take_machine(&mut ChunkSet::new(snapshot.states()?)?)
}

/// Checks every page of `snapshot` against the built-in workload's oracle. Returns `None` if its
/// guest runs something else, or it holds no machine.
///
/// # Errors
/// [`VmmError::State`], which says which pages are not what the guest wrote; store errors.
pub fn verify_snapshot(snapshot: &Snapshot) -> Result<Option<VerifyReport>> {
    let is_of_a_machine = snapshot.manifest().state.iter().any(|chunk| chunk.name == MACHINE_CHUNK);
    if !is_of_a_machine {
        return Ok(None);
    }
    let Some(spec) = saved_machine(snapshot)?.workload() else { return Ok(None) };
    let memory = Stored(snapshot.region(RAM_REGION)?);
    verify_parallel(&spec, &memory).map(Some).map_err(|error| VmmError::State {
        chunk: RAM_REGION.into(),
        expected: "the memory that the built-in workload must have written".into(),
        found: error.to_string(),
    })
}
