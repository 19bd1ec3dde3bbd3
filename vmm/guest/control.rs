//! The layout of the guest's memory below 16 MiB, shared by the guest and the host.
//!
//! | gpa | what |
//! |---|---|
//! | `0x008000` | real-mode start of the other vCPUs |
//! | `0x100000` | the image |
//! | `0x200000` | control area: header page, then for each vCPU a control page and a gap page |
//! | `0x300000` | stacks, 16 KiB for each vCPU |
//! | `0x400000` | page directories for RAM above the first GiB |
//! | `0x1000000` | data pages, and on through the RAM entries of the E820 table |
//!
//! Every field is a little-endian `u64`, stored whole, so the host sees no half-written one.

use core::mem::{offset_of, size_of};

/// Bytes of a page.
pub const PAGE_BYTES: u64 = 4096;
/// Words of eight bytes in a page.
pub const PAGE_WORDS: usize = 512;
/// vCPUs the guest has room for.
pub const VCPUS_MAX: u64 = 64;
/// Where the control area is.
pub const CONTROL_GPA: u64 = 0x20_0000;
/// Where data pages begin.
pub const DATA_GPA_MIN: u64 = 16 << 20;
/// First word of the header: `frazilwl`, little-endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"frazilwl");
/// Version of this layout and of the page contents.
pub const VERSION: u64 = 1;
/// RAM ranges the header has room for.
pub const RANGES_MAX: usize = 16;
/// Bytes the header has for the text of the specification.
pub const SPEC_BYTES_MAX: usize = 512;
/// Entries of a gap ring.
pub const GAP_RING_ENTRIES: u64 = 256;

/// `Header::state`: the guest is setting itself up.
pub const STATE_BOOTING: u64 = 1;
/// `Header::state`: the vCPUs are at work.
pub const STATE_RUNNING: u64 = 2;
/// `Header::state`: the guest gave up; the reason is on the serial port.
pub const STATE_FAILED: u64 = 3;

/// A run of data pages: consecutive data indices at consecutive guest physical addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DataRange {
    /// Address of the first page.
    pub gpa: u64,
    /// Pages in the run.
    pub pages: u64,
}

/// The header page at [`CONTROL_GPA`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// [`MAGIC`], stored last when the header is complete.
    pub magic: u64,
    /// [`VERSION`].
    pub version: u64,
    /// One of the `STATE_` constants.
    pub state: u64,
    /// vCPUs that take part.
    pub cpus: u64,
    /// TSC frequency, kHz.
    pub tsc_khz: u64,
    /// Data pages in use.
    pub data_pages: u64,
    /// Written by the host: a new number asks every vCPU for a self check.
    pub command: u64,
    /// vCPU that is printing, plus one; 0 is nobody.
    pub serial_owner: u64,
    /// Entries of `ranges` in use.
    pub range_count: u64,
    /// Where the data pages are, by data index.
    pub ranges: [DataRange; RANGES_MAX],
    /// Bytes of `spec` in use.
    pub spec_bytes: u64,
    /// The specification in full, as text.
    pub spec: [u64; SPEC_BYTES_MAX / 8],
}

/// The control page of one vCPU; only that vCPU writes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuControl {
    /// Completed writes: the progress counter.
    pub turns: u64,
    /// Sum of the weights of the pages written, once for each write, wrapping.
    pub ledger: u64,
    /// Data index of the page being written, plus one; 0 is none.
    pub inflight_page_plus_1: u64,
    /// The count that the page being written will have.
    pub inflight_count: u64,
    /// Turns of the main loop; goes on when the rate limit holds writes back.
    pub loops: u64,
    /// TSC at the last look at the clock.
    pub last_tsc: u64,
    /// Longest time between two looks at the clock, TSC ticks.
    pub gap_max_tsc: u64,
    /// Gaps above the threshold; the ring holds the last [`GAP_RING_ENTRIES`].
    pub gap_count: u64,
    /// Self checks completed.
    pub checks_done: u64,
    /// Self checks that found something wrong.
    pub check_failures: u64,
    /// The last `Header::command` that this vCPU has carried out.
    pub command_done: u64,
    /// 1 once every page of this vCPU has been written, or at once with `populate=no`.
    pub populated: u64,
}

/// An entry of a gap ring.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gap {
    /// TSC at the end of the gap.
    pub tsc: u64,
    /// Length, TSC ticks.
    pub gap_tsc: u64,
}

/// Address of the control page of vCPU `cpu`.
#[must_use]
pub const fn vcpu_control_gpa(cpu: u64) -> u64 {
    CONTROL_GPA + PAGE_BYTES + cpu * 2 * PAGE_BYTES
}

/// Address of a field of the control page of a vCPU, for the modules beside this one:
/// `vcpu_field!(cpu, turns)`.
macro_rules! vcpu_field {
    ($cpu:expr, $field:ident) => {
        super::control::vcpu_control_gpa($cpu)
            + core::mem::offset_of!(super::control::VcpuControl, $field) as u64
    };
}
pub(crate) use vcpu_field;

/// Address of the gap page of vCPU `cpu`.
#[must_use]
pub const fn gap_ring_gpa(cpu: u64) -> u64 {
    vcpu_control_gpa(cpu) + PAGE_BYTES
}

/// Address of data page `index`, or `None` past the last range.
#[must_use]
pub fn data_gpa(ranges: &[DataRange], mut index: u64) -> Option<u64> {
    for range in ranges {
        if index < range.pages {
            return Some(range.gpa + index * PAGE_BYTES);
        }
        index -= range.pages;
    }
    None
}

// Hosts find these fields by offset, in snapshots as old as the format.
const _: () = {
    assert!(size_of::<Header>() == 848 && size_of::<Header>() as u64 <= PAGE_BYTES);
    assert!(offset_of!(Header, magic) == 0);
    assert!(offset_of!(Header, command) == 48);
    assert!(offset_of!(Header, range_count) == 64);
    assert!(offset_of!(Header, ranges) == 72);
    assert!(offset_of!(Header, spec_bytes) == 328);
    assert!(offset_of!(Header, spec) == 336);
    assert!(size_of::<VcpuControl>() == 96);
    assert!(offset_of!(VcpuControl, turns) == 0);
    assert!(offset_of!(VcpuControl, inflight_page_plus_1) == 16);
    assert!(offset_of!(VcpuControl, loops) == 32);
    assert!(offset_of!(VcpuControl, gap_count) == 56);
    assert!(offset_of!(VcpuControl, populated) == 88);
    assert!(size_of::<Gap>() as u64 * GAP_RING_ENTRIES == PAGE_BYTES);
    assert!(gap_ring_gpa(VCPUS_MAX - 1) + PAGE_BYTES <= 0x30_0000);
};
