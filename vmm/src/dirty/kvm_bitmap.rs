//! KVM's dirty bitmaps, one per memory slot.

use std::sync::Arc;

use frazil_snapstore::{PAGE_SIZE, PageSet};
use kvm_ioctls::VmFd;

use super::ioctls::{clear_dirty_log, get_dirty_log};
use super::{DirtyTracker, TrackerKind};
use crate::error::Result;
use crate::memory::GuestRam;

/// Number of dirty pages after which a call that protects pages ends: KVM holds its MMU lock during
/// the call, and vCPUs that fault wait for that lock.
const CLEAR_PAGES_MAX: u32 = 4096;

/// A tracker that reads KVM's dirty bitmaps.
///
/// With manual protection, reading only copies the bits; clearing them, which protects the pages
/// again, is done by separate calls, in parts, while the guest runs. At the cut nothing is cleared:
/// the next harvest reports those few pages again, and the store finds out which are unchanged. Hot
/// pages are among them, and leaving those unprotected spares the guest a fault for each.
#[derive(Debug)]
pub struct KvmBitmap {
    vm: Arc<VmFd>,
    slots: Vec<Slot>,
    manual: bool,
    /// The VM's slots refer to this memory, so it must be dropped last.
    _ram: Arc<GuestRam>,
}

#[derive(Debug)]
struct Slot {
    first_page: u64,
    pages: u64,
    /// A buffer for the slot's bits, reused so that harvests do not allocate.
    bits: Vec<u64>,
}

impl KvmBitmap {
    /// Tracks the slots of `vm`, which are the ranges of `ram` in their order. `manual` says that
    /// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` is enabled.
    #[must_use]
    pub fn new(vm: Arc<VmFd>, ram: &Arc<GuestRam>, manual: bool) -> Self {
        let slots = ram.mapped_ranges().map(|(range, _)| {
            let pages = range.len_bytes / PAGE_SIZE as u64;
            let bits = vec![0; pages.div_ceil(64) as usize];
            Slot { first_page: range.gpa / PAGE_SIZE as u64, pages, bits }
        });
        Self { slots: slots.collect(), vm, manual, _ram: Arc::clone(ram) }
    }

    fn read(&mut self, slot: usize, dirty: &mut PageSet) -> Result<()> {
        let Slot { first_page, bits, .. } = &mut self.slots[slot];
        get_dirty_log(&self.vm, slot as u32, bits)?;
        dirty.insert_words(*first_page, bits);
        Ok(())
    }

    /// Clears the bits that [`Self::read`] read, which makes KVM track those pages again.
    fn clear(&self, slot: usize) -> Result<()> {
        let Slot { pages, bits, .. } = &self.slots[slot];
        for words in parts(bits) {
            let first = words.start as u64 * 64;
            let end = (words.end as u64 * 64).min(*pages);
            clear_dirty_log(&self.vm, slot as u32, first, end - first, &bits[words])?;
        }
        Ok(())
    }
}

impl DirtyTracker for KvmBitmap {
    fn harvest(&mut self, dirty: &mut PageSet) -> Result<()> {
        for slot in 0..self.slots.len() {
            self.read(slot, dirty)?;
            if self.manual {
                self.clear(slot)?;
            }
        }
        Ok(())
    }

    fn harvest_at_cut(&mut self, dirty: &mut PageSet) -> Result<()> {
        (0..self.slots.len()).try_for_each(|slot| self.read(slot, dirty))
    }

    fn kind(&self) -> TrackerKind {
        if self.manual { TrackerKind::ManualBitmap } else { TrackerKind::Bitmap }
    }
}

/// Splits `bits` into ranges of words that begin and end with a non-zero word, each with at most
/// little more than [`CLEAR_PAGES_MAX`] set bits. Few long ranges are better than many short ones:
/// each call that protects a page interrupts every vCPU once.
fn parts(bits: &[u64]) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
    let mut occupied =
        bits.iter().enumerate().filter(|(_, word)| **word != 0).map(|(index, _)| index);
    std::iter::from_fn(move || {
        let start = occupied.next()?;
        let (mut end, mut pages) = (start + 1, bits[start].count_ones());
        while pages < CLEAR_PAGES_MAX
            && let Some(index) = occupied.next()
        {
            end = index + 1;
            pages += bits[index].count_ones();
        }
        Some(start..end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_what_is_set_and_are_bounded() {
        let mut bits = vec![0_u64; 4000];
        assert_eq!(parts(&bits).count(), 0);
        for index in (7..4000).step_by(3) {
            bits[index] = u64::MAX >> (index % 64);
        }
        let found: Vec<_> = parts(&bits).collect();
        let mut covered = vec![0_u64; 4000];
        for words in &found {
            let pages: u32 = bits[words.clone()].iter().map(|word| word.count_ones()).sum();
            assert!(pages < CLEAR_PAGES_MAX + 64, "{pages}");
            covered[words.clone()].copy_from_slice(&bits[words.clone()]);
        }
        assert!(found.len() > 4);
        assert_eq!(covered, bits);
    }
}
