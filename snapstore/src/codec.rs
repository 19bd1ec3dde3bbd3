//! Little-endian fields and LEB128 numbers, bounds-checked.
//!
//! Everything read from a medium goes through [`Decoder`], which never reads past the end, never
//! panics, and allocates only to describe an error.

use crate::id::{BlockRef, Hash};

/// A field that did not parse: what was expected, and what was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Malformed {
    pub what: &'static str,
    pub expected: String,
    pub found: String,
}

impl Malformed {
    pub fn new(what: &'static str, expected: impl ToString, found: impl ToString) -> Self {
        Self { what, expected: expected.to_string(), found: found.to_string() }
    }
}

pub(crate) type Decoded<T> = Result<T, Malformed>;

/// Reads fields from a byte slice, in order.
#[derive(Debug)]
pub(crate) struct Decoder<'a> {
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub fn bytes(&mut self, what: &'static str, len: usize) -> Decoded<&'a [u8]> {
        let (head, tail) = self.rest.split_at_checked(len).ok_or_else(|| {
            Malformed::new(what, format!("{len} bytes"), format!("only {}", self.rest.len()))
        })?;
        self.rest = tail;
        Ok(head)
    }

    pub fn array<const N: usize>(&mut self, what: &'static str) -> Decoded<[u8; N]> {
        let bytes = self.bytes(what, N)?;
        Ok(bytes.try_into().expect("bytes() returns the length asked for"))
    }

    pub fn u8(&mut self, what: &'static str) -> Decoded<u8> {
        Ok(self.array::<1>(what)?[0])
    }

    pub fn u32(&mut self, what: &'static str) -> Decoded<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub fn u64(&mut self, what: &'static str) -> Decoded<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// An unsigned LEB128 number; any but its shortest form is an error.
    pub fn varint(&mut self, what: &'static str) -> Decoded<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8(what)?;
            let part = u64::from(byte & 0x7f);
            if shift == 63 && part > 1 {
                return Err(Malformed::new(what, "a 64-bit number", "a longer one"));
            }
            value |= part << shift;
            if byte & 0x80 == 0 {
                if byte == 0 && shift != 0 {
                    return Err(Malformed::new(what, "a number in its shortest form", "padding"));
                }
                return Ok(value);
            }
        }
        Err(Malformed::new(what, "at most 10 bytes", "more"))
    }

    pub fn hash(&mut self, what: &'static str) -> Decoded<Hash> {
        Ok(Hash(self.array(what)?))
    }

    pub fn block_ref(&mut self, what: &'static str) -> Decoded<BlockRef> {
        Ok(BlockRef {
            segment: self.u32(what)?,
            offset: self.u32(what)?,
            len: self.u32(what)?,
            hash: self.hash(what)?,
        })
    }

    /// True if nothing is left.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// Checks that nothing is left.
    pub fn finish(self, what: &'static str) -> Decoded<()> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(Malformed::new(what, "the end", format!("{} more bytes", self.rest.len())))
        }
    }
}

pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

pub(crate) fn put_block_ref(out: &mut Vec<u8>, block: &BlockRef) {
    out.extend_from_slice(&block.segment.to_le_bytes());
    out.extend_from_slice(&block.offset.to_le_bytes());
    out.extend_from_slice(&block.len.to_le_bytes());
    out.extend_from_slice(&block.hash.0);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn varints_round_trip(value in any::<u64>(), shift in 0_u32..64) {
            let value = value >> shift;
            let mut bytes = Vec::new();
            put_varint(&mut bytes, value);
            let mut decoder = Decoder::new(&bytes);
            prop_assert_eq!(decoder.varint("value"), Ok(value));
            prop_assert_eq!(decoder.finish("value"), Ok(()));
        }

        #[test]
        fn any_bytes_parse_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let mut decoder = Decoder::new(&bytes);
            while decoder.varint("value").is_ok() {}
            let _any = Decoder::new(&bytes).block_ref("reference");
        }
    }

    #[test]
    fn long_and_padded_varints_are_refused() {
        assert!(Decoder::new(&[0x80, 0x00]).varint("padded").is_err());
        assert!(Decoder::new(&[0xff; 10]).varint("too long").is_err());
        assert!(Decoder::new(&[0x80; 11]).varint("endless").is_err());
        assert!(Decoder::new(&[0x80]).varint("cut").is_err());
    }
}
