//! Delta frames: pages stored as their difference from pages of plain frames.
//!
//! A guest often changes a few bytes of a page. The exclusive-or with the old page is then nearly
//! all zero, and compresses to little more than those bytes. A base is always a page of a plain
//! frame, never a delta itself, so reading a delta costs two frames at any depth of history.

use crate::codec::{Decoded, Decoder, Malformed, put_block_ref, put_varint};
use crate::format::MAX_FRAME_PAGES;
use crate::id::BlockRef;
use crate::page::PAGE_SIZE;

/// The page that a delta is relative to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Base {
    /// The plain frame that holds it.
    pub frame: BlockRef,
    /// Its slot in that frame.
    pub slot: u8,
}

/// Encodes the payload of a delta frame from each page's base and difference.
///
/// Layout: number of pages (1 byte), number of distinct base frames (varint), their references,
/// per page the index of its base frame (varint) and the slot (1 byte), then the differences, a
/// page each.
pub(crate) fn encode(bases: &[Base], differences: &[u8]) -> Vec<u8> {
    debug_assert!((1..=MAX_FRAME_PAGES).contains(&bases.len()));
    debug_assert_eq!(bases.len() * PAGE_SIZE, differences.len());
    let mut frames: Vec<BlockRef> = Vec::with_capacity(bases.len());
    let mut places = Vec::with_capacity(bases.len() * 2);
    for base in bases {
        let known = frames.iter().position(|frame| *frame == base.frame);
        let index = known.unwrap_or_else(|| {
            frames.push(base.frame);
            frames.len() - 1
        });
        put_varint(&mut places, index as u64);
        places.push(base.slot);
    }
    let mut out = Vec::with_capacity(
        8 + frames.len() * BlockRef::ENCODED_LEN + places.len() + differences.len(),
    );
    out.push(bases.len() as u8);
    put_varint(&mut out, frames.len() as u64);
    frames.iter().for_each(|frame| put_block_ref(&mut out, frame));
    out.extend_from_slice(&places);
    out.extend_from_slice(differences);
    out
}

/// Decodes the bases of a delta frame; also returns the offset of the differences in the payload.
pub(crate) fn decode(payload: &[u8]) -> Decoded<(Vec<Base>, usize)> {
    let mut decoder = Decoder::new(payload);
    let pages = usize::from(decoder.u8("number of pages")?);
    if !(1..=MAX_FRAME_PAGES).contains(&pages) {
        return Err(Malformed::new("number of pages", format!("1 to {MAX_FRAME_PAGES}"), pages));
    }
    let count = decoder.varint("number of base frames")?;
    if count == 0 || count > pages as u64 {
        return Err(Malformed::new("number of base frames", format!("1 to {pages}"), count));
    }
    let frames =
        (0..count).map(|_| decoder.block_ref("base frame")).collect::<Decoded<Vec<_>>>()?;
    let mut bases = Vec::with_capacity(pages);
    for _ in 0..pages {
        let index = decoder.varint("base of a page")?;
        let frame = usize::try_from(index).ok().and_then(|index| frames.get(index)).copied();
        let frame = frame.ok_or_else(|| {
            Malformed::new("base of a page", format!("below {}", frames.len()), index)
        })?;
        let slot = decoder.u8("slot of a base")?;
        if usize::from(slot) >= MAX_FRAME_PAGES {
            return Err(Malformed::new("slot of a base", format!("below {MAX_FRAME_PAGES}"), slot));
        }
        bases.push(Base { frame, slot });
    }
    decoder.bytes("differences", pages * PAGE_SIZE)?;
    decoder.finish("delta frame")?;
    Ok((bases, payload.len() - pages * PAGE_SIZE))
}

/// Turns a page into its difference from `base`, and a difference into the page.
pub(crate) fn xor(page: &mut [u8], base: &[u8]) {
    debug_assert_eq!(page.len(), base.len());
    page.iter_mut().zip(base).for_each(|(byte, base)| *byte ^= base);
}

/// How many of the page's 512 8-byte words differ.
pub(crate) fn differing_words(page: &[u8], base: &[u8]) -> usize {
    page.as_chunks::<8>().0.iter().zip(base.as_chunks::<8>().0).filter(|(a, b)| a != b).count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::node::tests::frame;

    proptest! {
        #[test]
        fn deltas_round_trip(places in proptest::collection::vec((0_u32..9, 0_u8..64), 1..65), noise in any::<u8>()) {
            let bases: Vec<Base> = places.iter().map(|(number, slot)| Base { frame: frame(*number), slot: *slot }).collect();
            let differences = vec![noise; bases.len() * PAGE_SIZE];
            let payload = encode(&bases, &differences);
            prop_assert!(payload.len() <= crate::format::MAX_DELTA_LEN);
            let (found, at) = decode(&payload).unwrap();
            prop_assert_eq!(found, bases);
            prop_assert_eq!(&payload[at..], &differences[..]);
        }

        #[test]
        fn damaged_deltas_parse_or_fail(mut payload in proptest::collection::vec(any::<u8>(), 0..200), pages in 0_u8..3) {
            payload.extend(vec![0; usize::from(pages) * PAGE_SIZE]);
            let _any = decode(&payload);
        }

        #[test]
        fn a_difference_undoes_itself(changes in proptest::collection::vec((0..PAGE_SIZE, any::<u8>()), 0..20)) {
            let base: Vec<u8> = (0..PAGE_SIZE).map(|index| index as u8).collect();
            let mut page = base.clone();
            for (at, byte) in changes {
                page[at] = byte;
            }
            let naive = (0..512).filter(|word| page[word * 8..][..8] != base[word * 8..][..8]).count();
            prop_assert_eq!(differing_words(&page, &base), naive);
            let mut difference = page.clone();
            xor(&mut difference, &base);
            xor(&mut difference, &base);
            prop_assert_eq!(difference, page);
        }
    }
}
