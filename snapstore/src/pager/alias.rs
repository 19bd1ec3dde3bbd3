//! The pager's own mapping of the memory it fills.
//!
//! `unsafe` is allowed here because this module owns the raw pointer: a page that was never
//! filled is in no page table of its users, so until it is handed over nobody else can touch it.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use memmap2::{Advice, MmapOptions, MmapRaw};

/// A shared mapping of a whole memory file.
#[derive(Debug)]
pub(super) struct Alias {
    map: MmapRaw,
}

impl Alias {
    pub(super) fn new(memory: &File, len_bytes: usize) -> io::Result<Self> {
        Ok(Self { map: MmapOptions::new().len(len_bytes).map_raw(memory)? })
    }

    /// Hands the bytes `offset .. offset + len` to `with` for filling.
    ///
    /// The caller holds the lock of the pages' chunk, and none of them was filled before.
    pub(super) fn fill<T>(
        &self,
        offset: usize,
        len: usize,
        with: impl FnOnce(&mut [u8]) -> T,
    ) -> T {
        let end = offset.checked_add(len).expect("offsets are below the mapping's length");
        assert!(end <= self.map.len(), "{offset}+{len} is outside the mapping");
        // All page-table entries at once instead of a fault for each page. Kernels before 5.14
        // refuse, and fault.
        let _unpopulated = self.map.advise_range(Advice::PopulateWrite, offset, len);
        // SAFETY: the range was just checked to be inside the mapping, which lives as long as
        // `self`. Nobody else refers to these bytes: pages that were not filled are mapped
        // nowhere else (userfaultfd holds every access back), and two fillers exclude each other
        // by the chunk's lock.
        let bytes =
            unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().add(offset), len) };
        with(bytes)
    }
}
