//! How a page is written, store by store, so that a vCPU stopped at any instruction leaves memory that can be
//! checked exactly. The guest runs this on its memory, the host's tests on a simulated one.
//!
//! A write of page `p`, for the `c`-th time, makes these stores, in this order (a processor never shows its own
//! stores out of order to whoever has stopped it, and the compiler keeps volatile ones in order):
//!
//! 1. `inflight_count = c`, `inflight_page_plus_1 = p + 1`
//! 2. words 0, 1, … 511 of the page, of which those beyond some point still have the old content
//! 3. `turns += 1`, `ledger += weight(p)`
//! 4. `inflight_page_plus_1 = 0`
//!
//! So, wherever the vCPU is stopped, with `n` the sum of the counts of its pages and `w` of count times weight,
//! page `p` taken as written `c - 1` times:
//!
//! | stopped | in flight | page `p` | turns | ledger |
//! |---|---|---|---|---|
//! | before `inflight_page_plus_1` is stored, or after it is cleared | no | one count, all of it | n | w |
//! | during 2 | `p`, `c` | some prefix of count `c`, the rest of count `c - 1` | n | w |
//! | between the two stores of 3 | `p`, `c` | count `c` | n + 1 | w |
//! | between 3 and 4 | `p`, `c` | count `c` | n + 1 | w + weight(p) |
//!
//! A checker accepts these cases and no other. Any other page must match its own count exactly; if it is whole but
//! old (a page that a snapshot missed), `n` falls short of `turns` and `w` of `ledger`.

use core::fmt::{self, Write};
use core::mem::offset_of;

use super::control::{
    CONTROL_GPA, DataRange, Header, MAGIC, PAGE_BYTES, PAGE_WORDS, RANGES_MAX, SPEC_BYTES_MAX,
    STATE_RUNNING, VERSION, vcpu_field,
};
use super::oracle::Oracle;
use super::spec::WorkloadSpec;

/// Guest memory as the workload uses it: whole, aligned words at guest physical addresses, loaded and stored
/// exactly as often and in the order that the program says.
pub trait Memory {
    /// The word at `gpa`.
    fn load(&self, gpa: u64) -> u64;
    /// Stores a word at `gpa`.
    fn store(&mut self, gpa: u64, value: u64);
}

/// One turn: writes data page `index`, at `gpa`, once more.
#[inline]
pub fn write_page(memory: &mut impl Memory, oracle: &Oracle, cpu: u64, index: u64, gpa: u64) {
    let count = if oracle.counts_writes() { memory.load(gpa) + 1 } else { 1 };
    memory.store(vcpu_field!(cpu, inflight_count), count);
    memory.store(vcpu_field!(cpu, inflight_page_plus_1), index + 1);

    let content = oracle.page(index, count);
    if let Some(word) = content.edited_word() {
        memory.store(gpa, count);
        memory.store(gpa + word as u64 * 8, content.word(word));
    } else {
        content.for_each_pair(|pair, [first, second]| {
            memory.store(gpa + pair as u64 * 16, first);
            memory.store(gpa + pair as u64 * 16 + 8, second);
            true
        });
    }

    add(memory, vcpu_field!(cpu, turns), 1);
    add(memory, vcpu_field!(cpu, ledger), oracle.weight(index));
    memory.store(vcpu_field!(cpu, inflight_page_plus_1), 0);
}

fn add(memory: &mut impl Memory, gpa: u64, amount: u64) {
    let value = memory.load(gpa).wrapping_add(amount);
    memory.store(gpa, value);
}

/// Fills in the header page; the magic comes last.
///
/// # Errors
/// The specification is too long for its field.
pub fn publish_header(
    memory: &mut impl Memory,
    spec: &WorkloadSpec,
    ranges: &[DataRange; RANGES_MAX],
    data_pages: u64,
) -> fmt::Result {
    let mut text = SpecText { memory: &mut *memory, bytes: 0 };
    write!(text, "{spec}")?;
    let spec_bytes = text.bytes as u64;
    let mut set = |offset: usize, value| memory.store(CONTROL_GPA + offset as u64, value);
    set(offset_of!(Header, spec_bytes), spec_bytes);
    let used = ranges.iter().take_while(|range| range.pages != 0).count();
    set(offset_of!(Header, range_count), used as u64);
    for (index, range) in ranges.iter().enumerate() {
        set(offset_of!(Header, ranges) + index * size_of::<DataRange>(), range.gpa);
        set(offset_of!(Header, ranges) + index * size_of::<DataRange>() + 8, range.pages);
    }
    set(offset_of!(Header, version), VERSION);
    set(offset_of!(Header, cpus), spec.cpus);
    set(offset_of!(Header, tsc_khz), spec.tsc_khz);
    set(offset_of!(Header, data_pages), data_pages);
    set(offset_of!(Header, state), STATE_RUNNING);
    set(offset_of!(Header, magic), MAGIC);
    Ok(())
}

/// The text of the specification in the header page, as it grows.
struct SpecText<'a, M> {
    memory: &'a mut M,
    bytes: usize,
}

impl<M: Memory> Write for SpecText<'_, M> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if self.bytes == SPEC_BYTES_MAX {
                return Err(fmt::Error);
            }
            let gpa = CONTROL_GPA + (offset_of!(Header, spec) + self.bytes / 8 * 8) as u64;
            let shift = self.bytes % 8 * 8;
            let before = if shift == 0 { 0 } else { self.memory.load(gpa) };
            self.memory.store(gpa, before | u64::from(byte) << shift);
            self.bytes += 1;
        }
        Ok(())
    }
}

const _: () = assert!(PAGE_WORDS as u64 * 8 == PAGE_BYTES);
