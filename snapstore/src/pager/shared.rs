//! Words in memory that several processes may share: which pages are filled, and what was counted.
//!
//! A pager that dies must leave behind what it knew, so that another can go on where it stopped. So
//! both are kept in memory files, which live as long as anybody has them.
//!
//! `unsafe` is allowed here because this module owns the raw pointer: whatever it points to is only
//! ever accessed as atomics.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::sync::atomic::AtomicU64;

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create,
};

const WORD_BYTES: usize = 8;

/// A number of words in a memory file whose length is fixed: nobody can cut it short, which would
/// kill those who look at it.
#[derive(Debug)]
pub(super) struct SharedWords {
    map: MmapRaw,
    file: File,
    count: usize,
}

impl SharedWords {
    /// `count` words, all zero.
    pub fn new(name: &str, count: usize) -> io::Result<Self> {
        let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
        ftruncate(&file, (count.max(1) * WORD_BYTES) as u64)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Self::of(file, count)
    }

    /// The words that another process made.
    ///
    /// # Errors
    /// `InvalidData` if it is not `count` words long, or its length is not fixed.
    pub fn of(file: File, count: usize) -> io::Result<Self> {
        let len = check(&file, count)?;
        let map = MmapOptions::new().len(len).map_raw(&file)?;
        Ok(Self { map, file, count })
    }

    /// The same, only to be read.
    ///
    /// # Errors
    /// As [`Self::of`].
    pub fn of_read_only(file: File, count: usize) -> io::Result<Self> {
        let len = check(&file, count)?;
        let map = MmapOptions::new().len(len).map_raw_read_only(&file)?;
        Ok(Self { map, file, count })
    }

    /// The memory file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// A word. Of those that are only to be read, whoever writes to it is killed.
    pub fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.count, "word {index} of {}", self.count);
        // Mappings begin with a page.
        #[allow(clippy::cast_ptr_alignment)]
        let words = self.map.as_mut_ptr().cast::<u64>();
        // SAFETY: the index was just checked to be inside the mapping, which lives as long as
        // `self`, is aligned to pages and cannot be cut short (sealed); whoever else has it
        // accesses it through this type too, or is a process whose writes are as good as atomic.
        unsafe { AtomicU64::from_ptr(words.add(index)) }
    }
}

/// Checks that `file` is `count` words long and stays so; returns its length in bytes.
fn check(file: &File, count: usize) -> io::Result<usize> {
    let len = count.max(1) * WORD_BYTES;
    let fixed = fcntl_get_seals(file)?.contains(SealFlags::SHRINK);
    if fixed && file.metadata()?.len() == len as u64 {
        return Ok(len);
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        format!("expected {count} words of shared memory of fixed length"),
    ))
}
