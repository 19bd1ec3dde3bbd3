//! One request of the guest (virtio 1.2, 5.2.6).

use virtio_bindings::virtio_blk as blk;
use vm_memory::Bytes;

use super::super::buffers::Buffers;
use super::super::queue::{Chain, Violation};
use super::{RANGE_SECTORS_MAX, RANGES_MAX, SEGMENT_BYTES_MAX, SEGMENTS_MAX};
use crate::disk::{Disk, Request, SECTOR_BYTES};
use crate::memory::GuestMemory;

/// `type`, reserved, `sector`.
const HEADER_LEN: usize = 16;
/// `sector`, `num_sectors`, `flags`.
const RANGE_LEN: usize = 16;
const DATA_BYTES_MAX: u64 = SEGMENTS_MAX as u64 * SEGMENT_BYTES_MAX as u64;
const ID_LEN: usize = blk::VIRTIO_BLK_ID_BYTES as usize;

/// A buffer for data on its way between guest memory and disk: too large for the stack, and reused.
#[derive(Debug)]
pub(super) struct Scratch(Vec<u8>);

impl Default for Scratch {
    fn default() -> Self {
        Self(vec![0; SEGMENT_BYTES_MAX as usize])
    }
}

/// Why a request fails.
enum Failure {
    /// The request is wrong, or the disk failed. The driver is told by the status.
    Io,
    /// There is no such request. The driver is told by the status.
    Unsupported,
    /// The driver broke a rule: the device stops until it is reset.
    Violation(Violation),
}

impl From<Violation> for Failure {
    fn from(violation: Violation) -> Self {
        Self::Violation(violation)
    }
}

impl From<crate::VmmError> for Failure {
    fn from(error: crate::VmmError) -> Self {
        // Not a warning: the guest can cause any number of these.
        tracing::debug!(%error, "a disk request failed");
        Self::Io
    }
}

/// Handles the request in `chain` and writes its status. Returns how many bytes were written.
///
/// # Errors
/// If the chain holds no request, or has no room for a status.
pub(super) fn answer(
    disk: &Disk,
    request: &Request<'_>,
    memory: &GuestMemory,
    chain: Chain,
    scratch: &mut Scratch,
) -> Result<u32, Violation> {
    let Chain { head: _, mut readable, mut writable } = chain;
    let mut header = [0; HEADER_LEN];
    readable.read(memory, &mut header)?;
    let place = writable
        .split_last_byte()
        .ok_or_else(|| Violation::new("a disk request with no room for its status"))?;
    let room = writable.len();
    let mut at = Data { disk, request, memory, readable, writable, scratch };
    let status = match at.carry_out(&header) {
        Ok(()) => blk::VIRTIO_BLK_S_OK,
        Err(Failure::Io) => blk::VIRTIO_BLK_S_IOERR,
        Err(Failure::Unsupported) => blk::VIRTIO_BLK_S_UNSUPP,
        Err(Failure::Violation(violation)) => return Err(violation),
    };
    let left = at.writable.len();
    memory
        .write_slice(&[status as u8], place)
        .map_err(|error| Violation::new(error.to_string()))?;
    // Only bytes written from the start without a gap count, so the status at the end counts only
    // if all before it were written. The total is below 4 GiB, as the walk along the chain ensured.
    Ok((room - left) as u32 + u32::from(left == 0))
}

fn is_erasing(kind: u32) -> bool {
    matches!(
        kind,
        blk::VIRTIO_BLK_T_DISCARD | blk::VIRTIO_BLK_T_WRITE_ZEROES | blk::VIRTIO_BLK_T_SECURE_ERASE
    )
}

/// A request's data, in guest memory and on disk.
struct Data<'a> {
    disk: &'a Disk,
    request: &'a Request<'a>,
    memory: &'a GuestMemory,
    /// The readable buffers after the header.
    readable: Buffers,
    /// The writable buffers before the status.
    writable: Buffers,
    scratch: &'a mut Scratch,
}

impl Data<'_> {
    fn carry_out(&mut self, header: &[u8; HEADER_LEN]) -> Result<(), Failure> {
        let kind = le32(header, 0);
        let sector = le64(header, 8);
        match kind {
            blk::VIRTIO_BLK_T_IN => self.read_disk(sector),
            blk::VIRTIO_BLK_T_OUT => self.write_disk(sector),
            blk::VIRTIO_BLK_T_FLUSH => Ok(self.request.flush()?),
            blk::VIRTIO_BLK_T_GET_ID => self.tell_serial(),
            _ if self.disk.is_read_only() && is_erasing(kind) => Err(Failure::Io),
            // Holes are as good as zeros, so the flag that allows them changes nothing.
            blk::VIRTIO_BLK_T_WRITE_ZEROES => {
                self.zero_ranges(blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)
            }
            blk::VIRTIO_BLK_T_DISCARD => self.zero_ranges(0),
            _ => Err(Failure::Unsupported),
        }
    }

    /// Returns the offset of `sector`, if `data_bytes` is a valid length and fits the disk from
    /// there on: a request is refused as a whole or not at all.
    fn place(&self, sector: u64, data_bytes: u64) -> Result<u64, Failure> {
        if !data_bytes.is_multiple_of(SECTOR_BYTES) || data_bytes > DATA_BYTES_MAX {
            return Err(Failure::Io);
        }
        Ok(self.part(sector, data_bytes)?.0)
    }

    /// Returns the offset and length of `len_bytes` bytes from `sector` on, if they lie in the
    /// disk.
    fn part(&self, sector: u64, len_bytes: u64) -> Result<(u64, u64), Failure> {
        let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Failure::Io)?;
        let end = offset.checked_add(len_bytes).ok_or(Failure::Io)?;
        if end > self.disk.len_bytes() { Err(Failure::Io) } else { Ok((offset, len_bytes)) }
    }

    fn read_disk(&mut self, sector: u64) -> Result<(), Failure> {
        let mut offset = self.place(sector, self.writable.len())?;
        while self.writable.len() > 0 {
            let len = self.writable.len().min(self.scratch.0.len() as u64) as usize;
            let bytes = &mut self.scratch.0[..len];
            self.request.read_at(offset, bytes)?;
            self.writable.write(self.memory, bytes)?;
            offset += len as u64;
        }
        Ok(())
    }

    fn write_disk(&mut self, sector: u64) -> Result<(), Failure> {
        let mut offset = self.place(sector, self.readable.len())?;
        while self.readable.len() > 0 {
            let len = self.readable.len().min(self.scratch.0.len() as u64) as usize;
            let bytes = &mut self.scratch.0[..len];
            self.readable.read(self.memory, bytes)?;
            self.request.write_at(offset, bytes)?;
            offset += len as u64;
        }
        Ok(())
    }

    fn tell_serial(&mut self) -> Result<(), Failure> {
        let serial = self.disk.serial();
        let mut id = [0; ID_LEN];
        let len = serial.len().min(ID_LEN);
        id[..len].copy_from_slice(&serial.as_bytes()[..len]);
        if self.writable.len() < ID_LEN as u64 {
            return Err(Failure::Io);
        }
        Ok(self.writable.write(self.memory, &id)?)
    }

    /// Handles discards and writes of zeros: discarded ranges read as zeros, too.
    fn zero_ranges(&mut self, allowed_flags: u32) -> Result<(), Failure> {
        let len = self.readable.len();
        if !len.is_multiple_of(RANGE_LEN as u64) || len > u64::from(RANGES_MAX) * RANGE_LEN as u64 {
            return Err(Failure::Io);
        }
        let count = (len / RANGE_LEN as u64) as usize;
        let mut ranges = [(0, 0); RANGES_MAX as usize];
        for range in &mut ranges[..count] {
            let mut bytes = [0; RANGE_LEN];
            self.readable.read(self.memory, &mut bytes)?;
            let (sector, sectors, flags) = (le64(&bytes, 0), le32(&bytes, 8), le32(&bytes, 12));
            if flags & !allowed_flags != 0 {
                return Err(Failure::Unsupported);
            }
            if sectors > RANGE_SECTORS_MAX {
                return Err(Failure::Io);
            }
            *range = self.part(sector, u64::from(sectors) * SECTOR_BYTES)?;
        }
        for (offset, len_bytes) in &ranges[..count] {
            self.request.write_zeroes(*offset, *len_bytes)?;
        }
        Ok(())
    }
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at + 4)) << 32 | u64::from(le32(bytes, at))
}
