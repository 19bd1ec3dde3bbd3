//! The VMM's own writes to guest memory, which KVM does not see.

use frazil_snapstore::{PAGE_SIZE, PageSet};
use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};

use super::written::WrittenPages;

/// The pages of a range of RAM that were written through vm-memory, which reports every write here.
#[derive(Debug)]
pub struct VmmWrites(WrittenPages);

impl VmmWrites {
    /// A bitmap for `len` bytes of RAM, with nothing written yet.
    #[must_use]
    pub fn new(len: usize) -> Self {
        Self(WrittenPages::new(len.div_ceil(64 * PAGE_SIZE) as u64))
    }

    /// Moves the written pages into `dirty`, where this range's first page is `first_page`.
    pub fn harvest(&self, first_page: u64, dirty: &mut PageSet) {
        self.0.harvest(first_page, dirty);
    }
}

impl<'a> WithBitmapSlice<'a> for VmmWrites {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for VmmWrites {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len > 0 {
            let last = offset.saturating_add(len - 1);
            let pages = (offset / PAGE_SIZE) as u64..=(last / PAGE_SIZE) as u64;
            pages.for_each(|page| self.0.insert(page / 64, 1 << (page % 64)));
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.0.contains((offset / PAGE_SIZE) as u64)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}
