//! Records: the units that are compressed, hashed, stored and verified.

use std::cell::RefCell;

use crate::codec::{Decoded, Malformed};
use crate::error::{Result, StoreError};
use crate::format::{Codec, RECORD_HEADER_LEN, RecordHeader, RecordKind};
use crate::id::Hash;

/// A record ready to be appended to a segment.
#[derive(Debug)]
pub(crate) struct EncodedRecord {
    /// Header and payload.
    pub bytes: Vec<u8>,
    /// BLAKE3 of `bytes`.
    pub hash: Hash,
}

impl EncodedRecord {
    pub fn view(&self) -> RecordView<'_> {
        RecordView { bytes: &self.bytes, hash: self.hash }
    }
}

/// An [`EncodedRecord`] that borrows its bytes, such as from its encoder.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RecordView<'a> {
    pub bytes: &'a [u8],
    pub hash: Hash,
}

impl RecordView<'_> {
    fn to_record(self) -> EncodedRecord {
        EncodedRecord { bytes: self.bytes.to_vec(), hash: self.hash }
    }
}

/// Compresses and hashes records; one per thread, since a zstd context is costly to make.
pub(crate) struct RecordEncoder {
    compressor: zstd::bulk::Compressor<'static>,
    /// Holds the record being encoded.
    out: Vec<u8>,
}

impl std::fmt::Debug for RecordEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RecordEncoder").finish_non_exhaustive()
    }
}

impl RecordEncoder {
    /// An encoder at zstd `level` (negative levels are the fast ones).
    pub fn new(level: i32) -> Result<Self> {
        let compressor = zstd::bulk::Compressor::new(level)
            .map_err(|error| StoreError::io("start", "zstd", error))?;
        Ok(Self { compressor, out: Vec::new() })
    }

    /// Encodes `raw` in the encoder's own buffer, compressed if that saves at least a sixteenth.
    pub fn encode_here(&mut self, kind: RecordKind, raw: &[u8]) -> RecordView<'_> {
        self.encode_if_it_saves(kind, raw, raw.len() / 16)
    }

    /// As [`Self::encode_here`], but returns a copy.
    pub fn encode(&mut self, kind: RecordKind, raw: &[u8]) -> EncodedRecord {
        self.encode_here(kind, raw).to_record()
    }

    /// Encodes a tree node, compressed only if that saves an eighth: nodes are decoded for every
    /// look-up, so it should pay. References do not compress; pending runs shrink to a third.
    pub fn encode_node(&mut self, raw: &[u8]) -> RecordView<'_> {
        self.encode_if_it_saves(RecordKind::Node, raw, raw.len() / 8)
    }

    fn encode_if_it_saves(&mut self, kind: RecordKind, raw: &[u8], saved: usize) -> RecordView<'_> {
        let end = RECORD_HEADER_LEN + raw.len();
        if self.out.len() < end {
            self.out.resize(end, 0);
        }
        // zstd fails as soon as the output does not fit: then the data does not compress enough.
        let room = &mut self.out[RECORD_HEADER_LEN..end - saved];
        let (codec, stored_len) = match self.compressor.compress_to_buffer(raw, room) {
            Ok(stored_len) => (Codec::Zstd, stored_len),
            Err(_does_not_fit) => {
                self.out[RECORD_HEADER_LEN..end].copy_from_slice(raw);
                (Codec::Plain, raw.len())
            }
        };
        let bytes = &mut self.out[..RECORD_HEADER_LEN + stored_len];
        let hash = seal(kind, codec, raw.len(), bytes);
        RecordView { bytes, hash }
    }

    /// Encodes `raw` uncompressed.
    pub fn encode_plain(kind: RecordKind, raw: &[u8]) -> EncodedRecord {
        let mut bytes = Vec::with_capacity(RECORD_HEADER_LEN + raw.len());
        bytes.resize(RECORD_HEADER_LEN, 0);
        bytes.extend_from_slice(raw);
        let hash = seal(kind, Codec::Plain, raw.len(), &mut bytes);
        EncodedRecord { bytes, hash }
    }
}

/// Fills in the header of the record in `bytes` and returns the record's hash.
fn seal(kind: RecordKind, codec: Codec, raw_len: usize, bytes: &mut [u8]) -> Hash {
    let len = |len: usize| u32::try_from(len).expect("records are bounded far below 4 GiB");
    let stored_len = len(bytes.len() - RECORD_HEADER_LEN);
    let header = RecordHeader { kind, codec, stored_len, raw_len: len(raw_len) };
    bytes[..RECORD_HEADER_LEN].copy_from_slice(&header.encode());
    Hash::of(bytes)
}

/// A record whose bytes were checked against the hash in its reference.
#[derive(Debug)]
pub(crate) struct VerifiedRecord<'a> {
    bytes: &'a [u8],
    header: RecordHeader,
    payload: &'a [u8],
}

impl<'a> VerifiedRecord<'a> {
    /// Checks `bytes` against `hash`, and that they are a record of `kind`.
    pub fn check(bytes: &'a [u8], hash: &Hash, kind: RecordKind) -> Decoded<Self> {
        let found = Hash::of(bytes);
        if found != *hash {
            return Err(Malformed::new("hash of the record", hash, found));
        }
        let header = RecordHeader::decode(bytes)?;
        if header.kind != kind {
            return Err(Malformed::new("record kind", kind.name(), header.kind.name()));
        }
        let payload = &bytes[RECORD_HEADER_LEN..];
        if payload.len() != header.stored_len as usize {
            return Err(Malformed::new("stored length", header.stored_len, payload.len()));
        }
        Ok(Self { bytes, header, payload })
    }

    /// The whole record as stored.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Length of the decoded payload in bytes.
    pub fn raw_len(&self) -> usize {
        self.header.raw_len as usize
    }

    /// Decodes the payload into `out`, which must be [`Self::raw_len`] long.
    pub fn decode_into(&self, out: &mut [u8]) -> Decoded<()> {
        debug_assert_eq!(out.len(), self.raw_len());
        match self.header.codec {
            Codec::Plain => {
                out.copy_from_slice(self.payload);
                Ok(())
            }
            Codec::Zstd => {
                let len = decompress(self.payload, out)
                    .map_err(|error| Malformed::new("zstd payload", "a zstd frame", error))?;
                if len == out.len() {
                    Ok(())
                } else {
                    Err(Malformed::new("decoded length", out.len(), len))
                }
            }
        }
    }

    /// Decodes the payload into a new buffer.
    pub fn decode(&self) -> Decoded<Vec<u8>> {
        let mut out = vec![0; self.raw_len()];
        self.decode_into(&mut out)?;
        Ok(out)
    }
}

fn decompress(payload: &[u8], out: &mut [u8]) -> std::io::Result<usize> {
    thread_local! {
        static CONTEXT: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
    }
    CONTEXT.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = Some(zstd::bulk::Decompressor::new()?);
        }
        slot.as_mut().expect("just filled").decompress_to_buffer(payload, out)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn records_round_trip(noise in proptest::collection::vec(any::<u8>(), 0..3000), repeat in 1_usize..5) {
            let raw = noise.repeat(repeat);
            let record = RecordEncoder::new(1).unwrap().encode(RecordKind::Frame, &raw);
            prop_assert!(record.bytes.len() <= RECORD_HEADER_LEN + raw.len());
            let verified = VerifiedRecord::check(&record.bytes, &record.hash, RecordKind::Frame).unwrap();
            prop_assert_eq!(verified.decode().unwrap(), raw);
        }

        /// Bytes that hash right but mean nothing must still not panic or over-allocate.
        #[test]
        fn hostile_records_fail(mut bytes in proptest::collection::vec(any::<u8>(), RECORD_HEADER_LEN..200), forge in any::<bool>()) {
            if forge {
                let header = RecordHeader { kind: RecordKind::Node, codec: Codec::Zstd, stored_len: (bytes.len() - RECORD_HEADER_LEN) as u32, raw_len: 1 << 20 };
                bytes[..RECORD_HEADER_LEN].copy_from_slice(&header.encode());
            }
            if let Ok(record) = VerifiedRecord::check(&bytes, &Hash::of(&bytes), RecordKind::Node) {
                let _any = record.decode();
            }
        }
    }

    #[test]
    fn every_flipped_bit_of_a_record_is_seen() {
        let record =
            RecordEncoder::new(1).unwrap().encode(RecordKind::Blob, &b"frazil ".repeat(30));
        for bit in 0..record.bytes.len() * 8 {
            let mut flipped = record.bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(
                VerifiedRecord::check(&flipped, &record.hash, RecordKind::Blob).is_err(),
                "bit {bit}"
            );
        }
        assert!(VerifiedRecord::check(&record.bytes, &record.hash, RecordKind::Node).is_err());
    }
}
