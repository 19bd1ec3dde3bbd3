//! Page contents to measure with: those that the built-in guest writes, and samples of a guest's
//! RAM.

use anyhow::Context;
use frazil_snapstore::PAGE_SIZE;
use frazil_vmm::memory::GuestRam;
use frazil_vmm::workload::WorkloadSpec;
use frazil_vmm::workload::oracle::Oracle;
use frazil_vmm::workload::spec::Content;
use vm_memory::{Bytes, GuestAddress};

/// Pages per frame, as in a store by default.
pub(crate) const FRAME_PAGES: usize = 16;
/// Bytes per frame.
pub(crate) const FRAME_BYTES: usize = FRAME_PAGES * PAGE_SIZE;

/// `pages` pages as the built-in guest writes them.
pub(crate) fn generate(content: Content, pages: usize) -> Vec<u8> {
    let oracle = Oracle::new(&WorkloadSpec { content, ..WorkloadSpec::default() });
    let mut bytes = vec![0; pages * PAGE_SIZE];
    for (index, page) in bytes.chunks_exact_mut(PAGE_SIZE).enumerate() {
        oracle.page(index as u64, 1).for_each_pair(|pair, [first, second]| {
            page[pair * 16..][..8].copy_from_slice(&first.to_le_bytes());
            page[pair * 16 + 8..][..8].copy_from_slice(&second.to_le_bytes());
            true
        });
    }
    bytes
}

/// About `bytes` of a guest's RAM, in frames spread evenly over all of it.
pub(crate) fn sample(ram: &GuestRam, bytes: usize) -> anyhow::Result<Vec<u8>> {
    let total = ram.len_bytes();
    let stride = (total / bytes as u64).max(1) * FRAME_BYTES as u64;
    let mut out = Vec::with_capacity(bytes);
    for (range, _) in ram.mapped_ranges() {
        let mut offset = 0;
        while offset + FRAME_BYTES as u64 <= range.len_bytes {
            let start = out.len();
            out.resize(start + FRAME_BYTES, 0);
            ram.memory()
                .read_slice(&mut out[start..], GuestAddress(range.gpa + offset))
                .context("cannot read guest memory")?;
            offset += stride;
        }
    }
    Ok(out)
}
