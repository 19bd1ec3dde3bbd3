//! Reads the guest's control area.

use std::io;
use std::mem::offset_of;

use super::control::{
    CONTROL_GPA, DataRange, GAP_RING_ENTRIES, Gap, Header, MAGIC, PAGE_BYTES, RANGES_MAX,
    SPEC_BYTES_MAX, STATE_RUNNING, VCPUS_MAX, VERSION, VcpuControl, data_gpa, gap_ring_gpa,
    vcpu_control_gpa,
};
use super::spec::WorkloadSpec;

/// Guest physical address of the command word: a new number stored here makes every vCPU check its
/// pages, and [`ControlView::command_done`] tells when all of them have.
pub const COMMAND_GPA: u64 = CONTROL_GPA + offset_of!(Header, command) as u64;

/// Guest memory, or a copy of it, a page at a time.
pub trait PageRead {
    /// Reads the page with number `page`, which is its guest physical address divided by 4096.
    ///
    /// # Errors
    /// If the page cannot be read.
    fn read_page(&mut self, page: u64, buf: &mut [u8; 4096]) -> io::Result<()>;
}

/// As [`PageRead`], for several threads at once.
pub trait PageReadShared: Sync {
    /// Reads the page with number `page`, which is its guest physical address divided by 4096.
    ///
    /// # Errors
    /// If the page cannot be read.
    fn read_page(&self, page: u64, buf: &mut [u8; 4096]) -> io::Result<()>;
}

/// Why the control area cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A page could not be read.
    #[error("cannot read guest memory at {gpa:#x}: {source}")]
    Read {
        /// Guest physical address.
        gpa: u64,
        /// What went wrong.
        source: io::Error,
    },
    /// There is no header: this is another guest, or it has not written the header yet.
    #[error(
        "expected the built-in workload's header at {CONTROL_GPA:#x} (first word {MAGIC:#x}), found {found:#x}; \
         the memory is another guest's, or its guest had not started yet"
    )]
    NoWorkload {
        /// The first word.
        found: u64,
    },
    /// A header field that makes no sense.
    #[error("workload header at {gpa:#x}: expected {field} to be {expected}, found {found}")]
    BadField {
        /// Guest physical address of the page.
        gpa: u64,
        /// Which field.
        field: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
}

/// The contents of the control area.
#[derive(Clone, Debug)]
pub struct ControlView {
    /// The complete specification that the guest runs by.
    pub spec: WorkloadSpec,
    /// Data pages in use.
    pub data_pages: u64,
    /// The last command given.
    pub command: u64,
    /// Each vCPU that takes part.
    pub vcpus: Vec<VcpuView>,
    ranges: Vec<DataRange>,
}

/// What one vCPU reports.
#[derive(Clone, Debug)]
pub struct VcpuView {
    /// The control page.
    pub control: VcpuControl,
    /// The last gaps recorded, oldest first.
    pub gaps: Vec<Gap>,
}

impl ControlView {
    /// Reads the control area.
    ///
    /// # Errors
    /// If the control area cannot be read, is not there, or makes no sense.
    pub fn read(memory: &mut dyn PageRead) -> Result<Self, ControlError> {
        let header = Page::read(memory, CONTROL_GPA)?;
        let found = header.word(offset_of!(Header, magic));
        if found != MAGIC {
            return Err(ControlError::NoWorkload { found });
        }
        header.field("version", offset_of!(Header, version), VERSION, VERSION)?;
        header.field("state", offset_of!(Header, state), STATE_RUNNING, STATE_RUNNING)?;
        let cpus = header.field("cpus", offset_of!(Header, cpus), 1, VCPUS_MAX)?;
        let range_count =
            header.field("range_count", offset_of!(Header, range_count), 1, RANGES_MAX as u64)?;
        let ranges: Vec<_> = (0..to_usize(range_count)).map(|index| header.range(index)).collect();
        let pages_max = ranges.iter().map(|range| range.pages).fold(0, u64::saturating_add);
        let data_pages =
            header.field("data_pages", offset_of!(Header, data_pages), cpus, pages_max)?;
        let view = Self {
            spec: header.spec()?,
            data_pages,
            command: header.word(offset_of!(Header, command)),
            vcpus: (0..cpus).map(|cpu| VcpuView::read(memory, cpu)).collect::<Result<_, _>>()?,
            ranges,
        };
        header.check("cpus", cpus, view.spec.cpus, view.spec.cpus)?;
        Ok(view)
    }

    /// Guest physical address of data page `index`, or `None` when there is no such page.
    #[must_use]
    pub fn data_gpa(&self, index: u64) -> Option<u64> {
        (index < self.data_pages).then(|| data_gpa(&self.ranges, index))?
    }

    /// Returns how many writes all vCPUs have completed.
    #[must_use]
    pub fn turns(&self) -> u64 {
        self.vcpus.iter().map(|vcpu| vcpu.control.turns).fold(0, u64::wrapping_add)
    }

    /// Whether every vCPU has carried out the last command.
    #[must_use]
    pub fn command_done(&self) -> bool {
        self.vcpus.iter().all(|vcpu| vcpu.control.command_done == self.command)
    }

    /// Returns how many self-checks of all vCPUs found something wrong.
    #[must_use]
    pub fn check_failures(&self) -> u64 {
        self.vcpus.iter().map(|vcpu| vcpu.control.check_failures).sum()
    }

    /// Whether every page has been written once, unless the specification says not to.
    #[must_use]
    pub fn populated(&self) -> bool {
        self.vcpus.iter().all(|vcpu| vcpu.control.populated == 1)
    }

    /// Converts TSC ticks to microseconds, rounding down.
    #[must_use]
    pub fn tsc_to_us(&self, tsc: u64) -> u64 {
        u64::try_from(u128::from(tsc) * 1000 / u128::from(self.spec.tsc_khz.max(1)))
            .unwrap_or(u64::MAX)
    }
}

impl VcpuView {
    fn read(memory: &mut dyn PageRead, cpu: u64) -> Result<Self, ControlError> {
        let page = Page::read(memory, vcpu_control_gpa(cpu))?;
        let control = VcpuControl {
            turns: page.word(offset_of!(VcpuControl, turns)),
            ledger: page.word(offset_of!(VcpuControl, ledger)),
            inflight_page_plus_1: page.word(offset_of!(VcpuControl, inflight_page_plus_1)),
            inflight_count: page.word(offset_of!(VcpuControl, inflight_count)),
            loops: page.word(offset_of!(VcpuControl, loops)),
            last_tsc: page.word(offset_of!(VcpuControl, last_tsc)),
            gap_max_tsc: page.word(offset_of!(VcpuControl, gap_max_tsc)),
            gap_count: page.word(offset_of!(VcpuControl, gap_count)),
            checks_done: page.word(offset_of!(VcpuControl, checks_done)),
            check_failures: page.word(offset_of!(VcpuControl, check_failures)),
            command_done: page.word(offset_of!(VcpuControl, command_done)),
            populated: page.word(offset_of!(VcpuControl, populated)),
        };
        let ring = Page::read(memory, gap_ring_gpa(cpu))?;
        let oldest = control.gap_count.saturating_sub(GAP_RING_ENTRIES);
        let gaps = (oldest..control.gap_count).map(|gap| {
            let at = to_usize(gap % GAP_RING_ENTRIES) * size_of::<Gap>();
            Gap {
                tsc: ring.word(at + offset_of!(Gap, tsc)),
                gap_tsc: ring.word(at + offset_of!(Gap, gap_tsc)),
            }
        });
        Ok(Self { control, gaps: gaps.collect() })
    }
}

/// A page of the control area, with its address for errors.
struct Page {
    gpa: u64,
    bytes: [u8; 4096],
}

impl Page {
    fn read(memory: &mut dyn PageRead, gpa: u64) -> Result<Self, ControlError> {
        let mut bytes = [0; 4096];
        match memory.read_page(gpa / PAGE_BYTES, &mut bytes) {
            Ok(()) => Ok(Self { gpa, bytes }),
            Err(source) => Err(ControlError::Read { gpa, source }),
        }
    }

    fn word(&self, offset: usize) -> u64 {
        self.bytes[offset..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    fn range(&self, index: usize) -> DataRange {
        let at = offset_of!(Header, ranges) + index * size_of::<DataRange>();
        DataRange {
            gpa: self.word(at + offset_of!(DataRange, gpa)),
            pages: self.word(at + offset_of!(DataRange, pages)),
        }
    }

    fn field(
        &self,
        field: &'static str,
        offset: usize,
        min: u64,
        max: u64,
    ) -> Result<u64, ControlError> {
        self.check(field, self.word(offset), min, max)
    }

    fn check(
        &self,
        field: &'static str,
        value: u64,
        min: u64,
        max: u64,
    ) -> Result<u64, ControlError> {
        if (min..=max).contains(&value) {
            return Ok(value);
        }
        let expected = if min == max { min.to_string() } else { format!("from {min} to {max}") };
        Err(self.bad_field(field, expected, value.to_string()))
    }

    fn bad_field(&self, field: &'static str, expected: String, found: String) -> ControlError {
        ControlError::BadField { gpa: self.gpa, field, expected, found }
    }

    fn spec(&self) -> Result<WorkloadSpec, ControlError> {
        let bytes =
            self.field("spec_bytes", offset_of!(Header, spec_bytes), 0, SPEC_BYTES_MAX as u64)?;
        let text = &self.bytes[offset_of!(Header, spec)..][..to_usize(bytes)];
        let text = String::from_utf8_lossy(text);
        text.parse().map_err(|error| {
            self.bad_field("spec", format!("a valid specification ({error})"), text.to_string())
        })
    }
}

/// Converts a number known to be small.
pub(super) fn to_usize(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
