//! Pages copied aside at memory speed, to be written to the store once the guest runs again.

use std::io;

use frazil_snapstore::{PAGE_SIZE, Page, PageSet, PageSource};

use crate::memory::GuestRam;

/// Room for copied pages. Kept from one checkpoint to the next, since touching fresh memory costs
/// more than the copy.
#[derive(Debug, Default)]
pub(crate) struct Staging {
    /// The numbers of the copied pages, in the order of copying. The last copy of a page counts.
    numbers: Vec<u64>,
    /// The contents of those pages; there may be more room here than there are numbers.
    contents: Vec<Page>,
}

impl Staging {
    /// Forgets all copies.
    pub(super) fn clear(&mut self) {
        self.numbers.clear();
    }

    /// Makes room for `pages` more pages, so that copying them neither allocates memory nor touches
    /// fresh memory.
    pub(super) fn reserve(&mut self, pages: usize) {
        let wanted = self.numbers.len() + pages;
        self.numbers.reserve(pages);
        if self.contents.len() < wanted {
            // Not zeros: the allocator could take those from the kernel without touching them.
            self.contents.resize(wanted, [0xa5; PAGE_SIZE]);
        }
    }

    /// Number of copies; a page copied twice counts twice.
    pub(super) fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Forgets all copies and adds their pages to `waiting`.
    pub(super) fn give_back(&mut self, waiting: &mut PageSet) {
        self.numbers.drain(..).for_each(|page| waiting.insert(page));
    }

    /// Copies `pages` of `ram`.
    pub(super) fn copy(&mut self, pages: &PageSet, ram: &GuestRam) -> io::Result<()> {
        for page in pages.iter() {
            let index = self.numbers.len();
            if index == self.contents.len() {
                self.reserve(1 + index / 8);
            }
            ram.read_page(page, &mut self.contents[index])?;
            self.numbers.push(page);
        }
        Ok(())
    }

    /// Returns the copies, readable by page number, and the set of their pages.
    pub(super) fn finish(&self, region_pages: u64) -> (StagedPages<'_>, PageSet) {
        let mut set = PageSet::new(region_pages);
        let mut slots: Vec<(u64, u32)> = Vec::with_capacity(self.numbers.len());
        for (slot, page) in self.numbers.iter().enumerate() {
            set.insert(*page);
            slots.push((*page, slot as u32));
        }
        slots.sort_unstable();
        // Keep the last copy of each page.
        slots.reverse();
        slots.dedup_by_key(|(page, _)| *page);
        slots.reverse();
        (StagedPages { slots, contents: &self.contents }, set)
    }

    /// Forgets all copies and frees all room beyond `pages` pages.
    pub(super) fn trim(&mut self, pages: usize) {
        self.numbers.clear();
        self.numbers.shrink_to(pages);
        self.contents.truncate(pages);
        self.contents.shrink_to(pages);
    }
}

/// Pages copied aside, as a source for the store.
#[derive(Debug)]
pub(super) struct StagedPages<'a> {
    /// Page numbers, ascending, each with the index of its contents.
    slots: Vec<(u64, u32)>,
    contents: &'a [Page],
}

impl PageSource for StagedPages<'_> {
    fn read_page(&self, page: u64, buf: &mut Page) -> io::Result<()> {
        let index = self
            .slots
            .binary_search_by_key(&page, |(page, _)| *page)
            .map_err(|_| io::Error::other(format!("page {page} was not copied")))?;
        buf.copy_from_slice(&self.contents[self.slots[index].1 as usize]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn the_last_copy_of_a_page_counts() {
        let ram = GuestRam::new(4 << 20).unwrap();
        let write = |page: u64, value: u8| {
            ram.memory().write_slice(&[value; PAGE_SIZE], GuestAddress(page * 4096)).unwrap();
        };
        let set = |pages: &[u64]| {
            let mut set = PageSet::new(ram.end_page());
            pages.iter().for_each(|page| set.insert(*page));
            set
        };
        let mut staging = Staging::default();
        for base in [1, 100] {
            staging.clear();
            staging.reserve(2);
            (0..9).for_each(|page| write(page, base));
            staging.copy(&set(&[0, 3, 5, 8]), &ram).unwrap();
            write(3, base + 1);
            write(5, base + 1);
            staging.copy(&set(&[3]), &ram).unwrap();
            // More than was reserved: slower, but not wrong.
            staging.copy(&set(&[7, 3]), &ram).unwrap();
            assert_eq!(staging.numbers.len(), 7);
            let (pages, found) = staging.finish(ram.end_page());
            assert_eq!(found, set(&[0, 3, 5, 7, 8]));
            let mut page = [0; PAGE_SIZE];
            for (number, value) in [(0, base), (3, base + 1), (5, base), (7, base), (8, base)] {
                pages.read_page(number, &mut page).unwrap();
                assert_eq!(page, [value; PAGE_SIZE], "page {number}");
            }
            assert!(pages.read_page(1, &mut page).is_err());
        }
        staging.trim(1);
        assert_eq!((staging.numbers.len(), staging.contents.len()), (0, 1));
    }
}
