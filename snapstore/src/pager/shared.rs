//! Words in memory that several processes may share: marks of filled pages, and counters.
//!
//! Both must survive a pager that dies, so that another can go on where it stopped. So they are
//! kept in memory files, which live as long as any process has them open.
//!
//! `unsafe` is allowed here because this module owns the raw pointer and accesses what it points to
//! only as atomics.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::sync::atomic::AtomicU64;

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create,
};

const WORD_BYTES: usize = 8;

/// Words in a memory file whose length is sealed: truncating it would raise SIGBUS in processes
/// that map it.
#[derive(Debug)]
pub(super) struct SharedWords {
    map: MmapRaw,
    file: File,
    count: usize,
}

impl SharedWords {
    /// Creates a memory file of `count` words, all zero.
    pub fn new(name: &str, count: usize) -> io::Result<Self> {
        let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
        ftruncate(&file, (count.max(1) * WORD_BYTES) as u64)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Self::of(file, count)
    }

    /// Maps a file of words that was created elsewhere, such as by another process.
    ///
    /// # Errors
    /// `InvalidData` if it is not `count` words long, or can be truncated.
    pub fn of(file: File, count: usize) -> io::Result<Self> {
        let len = check(&file, count)?;
        let map = MmapOptions::new().len(len).map_raw(&file)?;
        Ok(Self { map, file, count })
    }

    /// As [`Self::of`], mapped read-only.
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

    /// The word at `index`. Writing to one that is mapped read-only raises SIGSEGV.
    pub fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.count, "word {index} of {}", self.count);
        // Mappings are aligned to pages.
        #[allow(clippy::cast_ptr_alignment)]
        let words = self.map.as_mut_ptr().cast::<u64>();
        // SAFETY: the index was just checked to be inside the mapping, which lives as long as
        // `self`, is aligned to pages and cannot be truncated (sealed). Everyone else accesses it
        // through this type too, or is another process, whose writes are as good as atomic.
        unsafe { AtomicU64::from_ptr(words.add(index)) }
    }
}

/// Checks that `file` is `count` words long and cannot be truncated; returns its length in bytes.
fn check(file: &File, count: usize) -> io::Result<usize> {
    let len = count.max(1) * WORD_BYTES;
    let fixed = fcntl_get_seals(file)?.contains(SealFlags::SHRINK);
    if fixed && file.metadata()?.len() == len as u64 {
        return Ok(len);
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        format!("expected fixed-length shared memory of {count} words"),
    ))
}
