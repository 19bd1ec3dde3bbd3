//! Read access to the machine in a snapshot.

use frazil_snapstore::{PAGE_SIZE, RegionReader, Snapshot};

use super::memory::SnapshotMemory;
use super::{AddressSpace, InspectError, Result};
use crate::error::VmmError;
use crate::machine::{MACHINE_CHUNK, SavedMachine};
use crate::memory::{RAM_MAX_BYTES, RAM_REGION, RamRange, ram_ranges};
use crate::rebuild::vcpu_chunk;
use crate::state::ChunkSet;
use crate::vcpu::saved::SavedVcpu;

/// How a vCPU decodes instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeMode {
    /// Real mode, virtual-8086 mode, or a 16-bit segment.
    Bits16,
    /// A 32-bit segment.
    Bits32,
    /// Long mode.
    Bits64,
}

impl CodeMode {
    /// The number of bits: 16, 32 or 64.
    #[must_use]
    pub fn bits(self) -> u32 {
        match self {
            Self::Bits16 => 16,
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }

    /// The size of a stack word, in bytes.
    #[must_use]
    pub fn word_bytes(self) -> usize {
        self.bits() as usize / 8
    }
}

/// The machine in a snapshot: its memory and its vCPUs.
#[derive(Debug)]
pub struct GuestView {
    memory: SnapshotMemory,
    machine: SavedMachine,
    vcpus: Vec<SavedVcpu>,
}

const RFLAGS_VM: u64 = 1 << 17;
const EFER_LMA: u64 = 1 << 10;

impl SnapshotMemory {
    /// The RAM in `snapshot`: the ranges that its machine has, or, in a snapshot of memory alone,
    /// the whole region.
    ///
    /// # Errors
    /// [`InspectError::Machine`] if the region does not fit the machine; store errors, including
    /// that there is no RAM.
    pub fn open(snapshot: &Snapshot) -> Result<Self> {
        let region = snapshot.region(RAM_REGION)?;
        let chunk = snapshot.manifest().state.iter().find(|chunk| chunk.name == MACHINE_CHUNK);
        let ranges = if let Some(chunk) = chunk {
            let mut chunks = ChunkSet::new(vec![snapshot.state(chunk)?])?;
            ranges_of(&chunks.take(MACHINE_CHUNK)?, &region)?
        } else {
            let len_bytes = region.pages() * PAGE_SIZE as u64;
            vec![RamRange { gpa: 0, len_bytes, file_offset: 0 }]
        };
        Ok(Self::new(region, ranges))
    }
}

/// The ranges of RAM of `machine`, whose contents are in `region`.
fn ranges_of(machine: &SavedMachine, region: &RegionReader) -> Result<Vec<RamRange>> {
    let ram_bytes = machine.ram_bytes;
    let ranges = ram_ranges(ram_bytes.min(RAM_MAX_BYTES));
    let end_page = ranges.last().map_or(0, |last| (last.gpa + last.len_bytes) / PAGE_SIZE as u64);
    if (1..=RAM_MAX_BYTES).contains(&ram_bytes) && end_page == region.pages() {
        return Ok(ranges);
    }
    let found = format!("{ram_bytes} bytes");
    let expected = format!("as much RAM as region `{RAM_REGION}` has, {} pages", region.pages());
    Err(VmmError::State { chunk: MACHINE_CHUNK.into(), expected, found }.into())
}

impl GuestView {
    /// Reads the machine in `snapshot`, but not the chunks of its devices.
    ///
    /// # Errors
    /// [`InspectError::NoMachine`] if the snapshot holds no machine; [`InspectError::Machine`] if a
    /// required chunk is missing or too new, or does not fit the memory; store errors.
    pub fn open(snapshot: &Snapshot) -> Result<Self> {
        let mut chunks = ChunkSet::new(snapshot.states()?)?;
        if !chunks.has(MACHINE_CHUNK) {
            return Err(InspectError::NoMachine);
        }
        let machine: SavedMachine = chunks.take(MACHINE_CHUNK)?;
        let vcpus = (0..machine.cpus)
            .map(|index| chunks.take(&vcpu_chunk(index)))
            .collect::<Result<Vec<_>, _>>()?;
        let region = snapshot.region(RAM_REGION)?;
        let ranges = ranges_of(&machine, &region)?;
        Ok(Self { memory: SnapshotMemory::new(region, ranges), machine, vcpus })
    }

    /// The machine's memory.
    #[must_use]
    pub fn memory(&self) -> &SnapshotMemory {
        &self.memory
    }

    /// The machine's description.
    #[must_use]
    pub fn machine(&self) -> &SavedMachine {
        &self.machine
    }

    /// The saved state of each vCPU.
    #[must_use]
    pub fn vcpus(&self) -> &[SavedVcpu] {
        &self.vcpus
    }

    /// The state of vCPU `index`.
    ///
    /// # Errors
    /// [`InspectError::NoSuchVcpu`].
    pub fn vcpu(&self, index: usize) -> Result<&SavedVcpu> {
        let cpus = self.vcpus.len();
        self.vcpus.get(index).ok_or(InspectError::NoSuchVcpu { index, cpus })
    }

    /// The address space of vCPU `index`.
    ///
    /// # Errors
    /// [`InspectError::NoSuchVcpu`].
    pub fn space(&self, index: usize) -> Result<AddressSpace> {
        Ok(AddressSpace::of(self.vcpu(index)?))
    }

    /// How vCPU `index` decodes instructions.
    ///
    /// # Errors
    /// [`InspectError::NoSuchVcpu`].
    pub fn code_mode(&self, index: usize) -> Result<CodeMode> {
        let SavedVcpu { sregs, regs, .. } = self.vcpu(index)?;
        let protected = u64::from(sregs.cr0) & 1 != 0 && u64::from(regs.rflags) & RFLAGS_VM == 0;
        Ok(match (u64::from(sregs.efer) & EFER_LMA != 0, sregs.cs.l != 0, sregs.cs.db != 0) {
            (true, true, _) => CodeMode::Bits64,
            (_, _, true) if protected => CodeMode::Bits32,
            _ => CodeMode::Bits16,
        })
    }

    /// The virtual address of the next instruction of vCPU `index`, including its code segment's
    /// base.
    ///
    /// # Errors
    /// [`InspectError::NoSuchVcpu`].
    pub fn next_instruction(&self, index: usize) -> Result<u64> {
        let vcpu = self.vcpu(index)?;
        self.linear(index, vcpu.sregs.cs.base.into(), vcpu.regs.rip.into())
    }

    /// The virtual address of the top of the stack of vCPU `index`, including its stack segment's
    /// base.
    ///
    /// # Errors
    /// [`InspectError::NoSuchVcpu`].
    pub fn stack_top(&self, index: usize) -> Result<u64> {
        let vcpu = self.vcpu(index)?;
        self.linear(index, vcpu.sregs.ss.base.into(), vcpu.regs.rsp.into())
    }

    /// What to add to an instruction pointer of vCPU `index` to get a virtual address.
    ///
    /// # Errors
    /// [`InspectError::NoSuchVcpu`].
    pub fn code_base(&self, index: usize) -> Result<u64> {
        let base = self.vcpu(index)?.sregs.cs.base.into();
        Ok(if self.code_mode(index)? == CodeMode::Bits64 { 0 } else { base })
    }

    /// Adds a segment's base to `offset`. In 64-bit code that base is 0; elsewhere addresses have
    /// 32 bits.
    fn linear(&self, index: usize, base: u64, offset: u64) -> Result<u64> {
        Ok(match self.code_mode(index)? {
            CodeMode::Bits64 => offset,
            CodeMode::Bits16 | CodeMode::Bits32 => base.wrapping_add(offset) & 0xffff_ffff,
        })
    }
}
