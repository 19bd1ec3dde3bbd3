//! The buffers of a descriptor chain, read or written from the start.

use std::collections::VecDeque;

use vm_memory::{Address, Bytes, GuestAddress};

use super::queue::Violation;
use crate::memory::GuestMemory;

/// Buffers known to lie in guest RAM, which are used up in order.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    parts: VecDeque<(GuestAddress, u32)>,
    /// Bytes left.
    len: u64,
    /// True once a buffer was added, even an empty one.
    any: bool,
}

impl Buffers {
    /// Adds a buffer at the end.
    pub(super) fn push(&mut self, address: GuestAddress, len: u32) {
        self.any = true;
        if len > 0 {
            self.parts.push_back((address, len));
            self.len += u64::from(len);
        }
    }

    /// Returns true if no buffer was ever added.
    pub(super) fn is_untouched(&self) -> bool {
        !self.any
    }

    /// Bytes left.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Iterates over the parts left.
    pub(super) fn parts(&self) -> impl Iterator<Item = (GuestAddress, u32)> + '_ {
        self.parts.iter().copied()
    }

    /// Takes the last byte off the end.
    pub(super) fn split_last_byte(&mut self) -> Option<GuestAddress> {
        let (address, len) = self.parts.back_mut()?;
        *len -= 1;
        let last = address.unchecked_add(u64::from(*len));
        if *len == 0 {
            self.parts.pop_back();
        }
        self.len -= 1;
        Some(last)
    }

    /// Fills `out`.
    ///
    /// # Errors
    /// If fewer bytes are left.
    pub(super) fn read(&mut self, memory: &GuestMemory, out: &mut [u8]) -> Result<(), Violation> {
        self.each(out.len(), |address, range| {
            memory.read_slice(&mut out[range], address).map_err(not_in_ram)
        })
    }

    /// Writes `bytes`; the write is noted for the next checkpoint.
    ///
    /// # Errors
    /// If less room is left.
    pub(super) fn write(&mut self, memory: &GuestMemory, bytes: &[u8]) -> Result<(), Violation> {
        self.each(bytes.len(), |address, range| {
            memory.write_slice(&bytes[range], address).map_err(not_in_ram)
        })
    }

    /// Uses up `len` bytes, calling `part` with the address of each part and its range within them.
    fn each(
        &mut self,
        len: usize,
        mut part: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Result<(), Violation>,
    ) -> Result<(), Violation> {
        if self.len < len as u64 {
            return Err(Violation::new("buffers that are too short"));
        }
        let mut at = 0;
        while at < len {
            let Some((address, left)) = self.parts.front_mut() else { break };
            let count = (*left as usize).min(len - at);
            part(*address, at..at + count)?;
            *address = address.unchecked_add(count as u64);
            *left -= count as u32;
            if *left == 0 {
                self.parts.pop_front();
            }
            at += count;
        }
        self.len -= len as u64;
        Ok(())
    }
}

fn not_in_ram(error: vm_memory::GuestMemoryError) -> Violation {
    Violation::new(format!("a buffer that is not in RAM: {error}"))
}
