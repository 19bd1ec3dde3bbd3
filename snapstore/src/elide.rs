//! What need not be written: the index that finds pages already in the store, and the gate that
//! decides which pages to compare with the parent's.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock};

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::codec::{Decoded, Decoder, Malformed, put_block_ref, put_varint};
use crate::format::MAX_FRAME_PAGES;
use crate::id::BlockRef;

/// A short hash of a page. Equal fingerprints are only a hint: contents are compared before
/// anything is left out, so the hash need not be strong.
pub(crate) type Fingerprint = u32;

/// The fingerprint of a page in the store whose UUID is `seed`. Seeded, so that a guest cannot
/// prepare pages that collide in every store.
pub(crate) fn fingerprint(page: &[u8], seed: [u8; 16]) -> Fingerprint {
    let seed = u64::from_le_bytes(seed[..8].try_into().expect("eight bytes"));
    xxh3_64_with_seed(page, seed) as Fingerprint
}

/// Entries per bucket; a new one replaces the oldest.
const WAYS: usize = 8;
/// Buckets allocated together, when the first of them is needed.
const CHUNK_BUCKETS: usize = 64;
/// Bytes of an entry, and its share of the table of frames (16 pages to a frame).
const ENTRY_LEN: u64 = 8 + 3;

/// An index from fingerprints to pages in the store, in a fixed amount of memory.
///
/// The pages of a batch are looked up together, under one lock, so that their cache misses overlap:
/// nearly every bucket comes from memory. Entries are hints. One that is out of date, or lost
/// because two threads wrote to its bucket at once, does no harm: the page that an entry points to
/// is read and compared.
#[derive(Debug)]
pub(crate) struct FingerprintIndex {
    chunks: RwLock<Chunks>,
    frames: RwLock<FrameRing>,
    buckets: usize,
    /// Set once the store's own fingerprints were loaded.
    pub loaded: AtomicBool,
}

type Chunks = Vec<OnceLock<Box<[Bucket; CHUNK_BUCKETS]>>>;

/// A cache line of entries, the newest first.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Bucket([AtomicU64; WAYS]);

/// Fingerprint (32 bits), 1 + index of the frame (26 bits) and slot (6 bits); 0 is none.
pub(crate) type Entry = u64;

const FRAME_BITS: u32 = 26;

/// The frames that entries point to; new ones overwrite the oldest.
#[derive(Debug)]
struct FrameRing {
    frames: Vec<BlockRef>,
    most: usize,
    next: usize,
}

impl Bucket {
    fn find(&self, fingerprint: Fingerprint) -> Option<Entry> {
        let entries = self.0.iter().map(|entry| entry.load(Ordering::Relaxed));
        entries.filter(|entry| *entry != 0).find(|entry| is_of(*entry, fingerprint))
    }

    /// Inserts `entry` before the others, dropping one with the same fingerprint or, from a full
    /// bucket, the oldest.
    fn insert(&self, entry: Entry, fingerprint: Fingerprint) {
        let mut moving = entry;
        for place in &self.0 {
            let old = place.load(Ordering::Relaxed);
            place.store(moving, Ordering::Relaxed);
            if old == 0 || is_of(old, fingerprint) {
                return;
            }
            moving = old;
        }
    }
}

fn is_of(entry: Entry, fingerprint: Fingerprint) -> bool {
    (entry >> 32) as Fingerprint == fingerprint
}

impl FingerprintIndex {
    pub fn new(memory_bytes: u64) -> Self {
        let entries = (memory_bytes / ENTRY_LEN).clamp(WAYS as u64, 1 << 32) as usize;
        let buckets = entries / WAYS;
        // One less than fits 26 bits, since 0 stands for none.
        let most = (entries / 16).clamp(1, (1 << FRAME_BITS) - 1);
        Self {
            chunks: RwLock::new(empty_chunks(buckets)),
            frames: RwLock::new(FrameRing { frames: Vec::new(), most, next: 0 }),
            buckets,
            loaded: AtomicBool::new(false),
        }
    }

    /// The chunk of a fingerprint, and its bucket in it.
    fn place(&self, fingerprint: Fingerprint) -> (usize, usize) {
        let bucket = fingerprint as usize % self.buckets;
        (bucket / CHUNK_BUCKETS, bucket % CHUNK_BUCKETS)
    }

    /// Looks up `fingerprints`; stores the newest entry for each in `found`, in the same order.
    pub fn find(&self, fingerprints: &[Option<Fingerprint>], found: &mut Vec<Option<Entry>>) {
        let chunks = self.chunks.read().unwrap_or_else(PoisonError::into_inner);
        found.clear();
        found.extend(fingerprints.iter().map(|fingerprint| {
            let (chunk, bucket) = self.place((*fingerprint)?);
            chunks[chunk].get()?[bucket].find((*fingerprint)?)
        }));
    }

    /// The frame and slot that an entry points to.
    pub fn page_of(&self, entry: Entry) -> Option<(BlockRef, u8)> {
        let index = (entry >> 6) as usize & ((1 << FRAME_BITS) - 1);
        let frames = self.frames.read().unwrap_or_else(PoisonError::into_inner);
        Some((*frames.frames.get(index.checked_sub(1)?)?, entry as u8 & 63))
    }

    /// The most pages that the index can hold.
    pub fn capacity(&self) -> usize {
        self.buckets * WAYS
    }

    /// Empties the index.
    pub fn clear(&self) {
        *self.chunks.write().unwrap_or_else(PoisonError::into_inner) = empty_chunks(self.buckets);
        let mut ring = self.frames.write().unwrap_or_else(PoisonError::into_inner);
        (ring.frames, ring.next) = (Vec::new(), 0);
        self.loaded.store(false, Ordering::Relaxed);
    }

    /// Adds the pages of a frame, in slot order.
    pub fn insert(&self, frame: BlockRef, fingerprints: &[Fingerprint]) {
        let index = {
            let mut ring = self.frames.write().unwrap_or_else(PoisonError::into_inner);
            let at = ring.next;
            ring.next = (at + 1) % ring.most;
            match ring.frames.get_mut(at) {
                Some(old) => *old = frame,
                None => ring.frames.push(frame),
            }
            at as u64 + 1
        };
        let chunks = self.chunks.read().unwrap_or_else(PoisonError::into_inner);
        for (slot, fingerprint) in fingerprints.iter().enumerate() {
            let entry = u64::from(*fingerprint) << 32 | index << 6 | slot as u64;
            let (chunk, bucket) = self.place(*fingerprint);
            let buckets =
                chunks[chunk].get_or_init(|| Box::new([(); _].map(|()| Bucket::default())));
            buckets[bucket].insert(entry, *fingerprint);
        }
    }
}

fn empty_chunks(buckets: usize) -> Chunks {
    std::iter::repeat_with(OnceLock::new).take(buckets.div_ceil(CHUNK_BUCKETS)).collect()
}

/// A frame and the fingerprints of its pages.
pub(crate) type FrameFingerprints = (BlockRef, Vec<Fingerprint>);

/// Layout: number of frames (varint), then per frame its reference, its number of pages (1 byte),
/// and a fingerprint per page (4 bytes).
pub(crate) fn encode_fingerprints(frames: &[FrameFingerprints]) -> Vec<u8> {
    let pages: usize = frames.iter().map(|(_, list)| list.len()).sum();
    let mut out = Vec::with_capacity(10 + frames.len() * 45 + pages * 4);
    put_varint(&mut out, frames.len() as u64);
    for (frame, fingerprints) in frames {
        put_block_ref(&mut out, frame);
        out.push(fingerprints.len() as u8);
        fingerprints.iter().for_each(|hash| out.extend_from_slice(&hash.to_le_bytes()));
    }
    out
}

pub(crate) fn decode_fingerprints(bytes: &[u8]) -> Decoded<Vec<FrameFingerprints>> {
    let mut decoder = Decoder::new(bytes);
    let count = decoder.varint("number of frames")?;
    let most = bytes.len() as u64 / (BlockRef::ENCODED_LEN as u64 + 5);
    if count > most {
        return Err(Malformed::new("number of frames", format!("at most {most}"), count));
    }
    let mut frames = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let frame = decoder.block_ref("frame")?;
        let pages = usize::from(decoder.u8("number of pages")?);
        if !(1..=MAX_FRAME_PAGES).contains(&pages) {
            let expected = format!("1 to {MAX_FRAME_PAGES}");
            return Err(Malformed::new("number of pages", expected, pages));
        }
        let fingerprints = (0..pages).map(|_| decoder.u32("fingerprint"));
        frames.push((frame, fingerprints.collect::<Decoded<Vec<_>>>()?));
    }
    decoder.finish("fingerprints")?;
    Ok(frames)
}

/// Decides which pages to compare with the parent's: reading the parent's page costs more than
/// compressing a new one, and with most workloads it is in vain.
///
/// Pages with small edits are near each other, so each area of memory is judged by itself, by how
/// useful comparing was there. Areas about which nothing is known yet share one judgement. When a
/// probe in an area found useless turns out useful, all such areas count as unknown again.
#[derive(Debug)]
pub(crate) struct DeltaGate {
    /// Per area, the age as of its last comparison in the high byte, and its credit in the low one:
    /// [`UNKNOWN`], [`NO_CREDIT`], or [`NO_CREDIT`] + how many more useless comparisons it may
    /// have.
    areas: Box<[AtomicU16]>,
    /// Incremented to make all areas without credit unknown again.
    age: AtomicU8,
    /// In this window, first comparisons of areas in the high half, and the useful ones of these in
    /// the low half.
    score: AtomicU64,
    /// True while pages of unknown areas are not compared.
    skips_unknown: AtomicBool,
    batches: AtomicU64,
}

/// Pages per area.
const AREA_PAGES: u64 = 64;
/// Number of areas judged by themselves: 16 GiB of memory; areas further on share with these.
const AREAS: usize = 1 << 16;
/// The credit of an area about which nothing is known.
const UNKNOWN: u8 = 0;
/// The credit of an area that is not worth comparing.
const NO_CREDIT: u8 = 1;
/// The credit of an area after its first comparison, if that was useless.
const FIRST_CREDIT: u8 = NO_CREDIT + 3;
/// The most credit, which bounds how long usefulness is remembered.
const MOST_CREDIT: u8 = NO_CREDIT + 24;

/// Where comparing does not pay, one batch in so many is probed.
const PROBE_EVERY: u64 = 32;
/// Pages compared in such a batch.
const PROBE_PAGES: usize = 2;
/// Unknown areas compared before they are judged together.
const WINDOW: u64 = 32;
/// Comparing pays if one page in so many is useful: that saves about what the others cost.
const USEFUL_SHARE: u8 = 6;

impl Default for DeltaGate {
    fn default() -> Self {
        Self {
            areas: std::iter::repeat_with(AtomicU16::default).take(AREAS).collect(),
            age: AtomicU8::new(0),
            score: AtomicU64::new(0),
            skips_unknown: AtomicBool::new(false),
            batches: AtomicU64::new(0),
        }
    }
}

impl DeltaGate {
    /// How many pages of the next batch may be compared although it does not seem to pay.
    pub fn probes(&self) -> usize {
        let batch = self.batches.fetch_add(1, Ordering::Relaxed);
        if batch.is_multiple_of(PROBE_EVERY) { PROBE_PAGES } else { 0 }
    }

    /// True if page `number` should be compared with the parent's; may use up one of `probes`.
    pub fn should_compare(&self, number: u64, probes: &mut usize) -> bool {
        let pays = match self.credit_of(number) {
            UNKNOWN => !self.skips_unknown.load(Ordering::Relaxed),
            credit => credit > NO_CREDIT,
        };
        let probe = !pays && *probes > 0;
        *probes -= usize::from(probe);
        pays || probe
    }

    /// Records whether comparing page `number` was useful.
    pub fn record(&self, number: u64, useful: bool) {
        let before = self.credit_of(number);
        let skips_unknown = self.skips_unknown.load(Ordering::Relaxed);
        if before == UNKNOWN {
            self.judge_unknown(skips_unknown, useful);
        } else if before == NO_CREDIT && useful {
            self.age.fetch_add(1, Ordering::Relaxed);
            self.compare_unknown();
        }
        // Threads may overwrite each other's credit, which is only a guess anyway.
        let credit = match (before, useful) {
            (_, true) => (before.max(NO_CREDIT) + USEFUL_SHARE - 1).min(MOST_CREDIT),
            // A useless probe says little about the rest of its area.
            (UNKNOWN, false) => {
                if skips_unknown {
                    UNKNOWN
                } else {
                    FIRST_CREDIT
                }
            }
            (_, false) => (before - 1).max(NO_CREDIT),
        };
        let age = self.age.load(Ordering::Relaxed);
        self.area(number).store(u16::from_be_bytes([age, credit]), Ordering::Relaxed);
    }

    fn credit_of(&self, number: u64) -> u8 {
        let [age, credit] = self.area(number).load(Ordering::Relaxed).to_be_bytes();
        let old = credit == NO_CREDIT && age != self.age.load(Ordering::Relaxed);
        if old { UNKNOWN } else { credit }
    }

    fn compare_unknown(&self) {
        self.score.store(0, Ordering::Relaxed);
        self.skips_unknown.store(false, Ordering::Relaxed);
    }

    fn judge_unknown(&self, skips_unknown: bool, useful: bool) {
        if skips_unknown {
            if useful {
                self.compare_unknown();
            }
            return;
        }
        let score = self.score.fetch_add(1 << 32 | u64::from(useful), Ordering::Relaxed);
        let (tried, found) = ((score >> 32) + 1, (score & 0xffff_ffff) + u64::from(useful));
        if tried >= WINDOW {
            self.skips_unknown.store(found * u64::from(USEFUL_SHARE) < tried, Ordering::Relaxed);
            self.score.store(0, Ordering::Relaxed);
        }
    }

    fn area(&self, number: u64) -> &AtomicU16 {
        &self.areas[(number / AREA_PAGES) as usize % AREAS]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::node::tests::frame;

    proptest! {
        #[test]
        fn the_newest_place_of_a_fingerprint_is_found(frames in proptest::collection::vec(proptest::collection::vec(0_u32..200, 1..16), 1..40)) {
            let index = FingerprintIndex::new(1 << 20);
            let mut oracle = HashMap::new();
            for (number, fingerprints) in frames.iter().enumerate() {
                index.insert(frame(number as u32), fingerprints);
                for (slot, fingerprint) in fingerprints.iter().enumerate() {
                    oracle.insert(*fingerprint, (frame(number as u32), slot as u8));
                }
            }
            let fingerprints: Vec<_> = (0..200).map(Some).chain([None]).collect();
            let mut found = Vec::new();
            index.find(&fingerprints, &mut found);
            for (fingerprint, entry) in fingerprints.iter().zip(found) {
                let expected = fingerprint.and_then(|fingerprint| oracle.get(&fingerprint));
                prop_assert_eq!(entry.and_then(|entry| index.page_of(entry)), expected.copied());
            }
        }

        #[test]
        fn fingerprints_round_trip(frames in proptest::collection::vec((0_u32..9, proptest::collection::vec(any::<u32>(), 1..65)), 0..9), cut in any::<prop::sample::Index>()) {
            let frames: Vec<FrameFingerprints> = frames.into_iter().map(|(number, list)| (frame(number), list)).collect();
            let bytes = encode_fingerprints(&frames);
            prop_assert_eq!(decode_fingerprints(&bytes), Ok(frames));
            prop_assert!(decode_fingerprints(&bytes[..cut.index(bytes.len())]).is_err());
        }
    }

    #[test]
    fn a_small_index_forgets_and_stays_small() {
        let index = FingerprintIndex::new(0);
        for number in 0..100_000_u32 {
            index.insert(frame(number % 1000), &[number.wrapping_mul(2_654_435_761)]);
        }
        assert_eq!(index.chunks.read().unwrap().len(), 1);
        assert_eq!(index.frames.read().unwrap().frames.len(), 1);
    }

    /// Passes `pages` through the gate as a write does; returns how many were compared, and how
    /// many of those were useful.
    fn look(
        gate: &DeltaGate,
        pages: impl Iterator<Item = u64>,
        useful: impl Fn(u64) -> bool,
    ) -> (u64, u64) {
        let (mut tried, mut found) = (0, 0);
        for batch in pages.collect::<Vec<_>>().chunks(16) {
            let mut probes = gate.probes();
            for page in batch {
                if gate.should_compare(*page, &mut probes) {
                    gate.record(*page, useful(*page));
                    tried += 1;
                    found += u64::from(useful(*page));
                }
            }
        }
        (tried, found)
    }

    #[test]
    fn where_nothing_comes_of_it_only_probes_are_looked_at() {
        let gate = DeltaGate::default();
        let (tried, _) = look(&gate, 0..1 << 16, |_| false);
        let probes = (1 << 16) / 16 / PROBE_EVERY * PROBE_PAGES as u64;
        assert!(
            (probes..=WINDOW * u64::from(FIRST_CREDIT) + probes).contains(&tried),
            "{tried}, {probes} of them probes"
        );
    }

    #[test]
    fn where_everything_comes_of_it_all_is_looked_at() {
        assert_eq!(look(&DeltaGate::default(), 0..5000, |_| true), (5000, 5000));
    }

    #[test]
    fn areas_are_judged_by_themselves() {
        let gate = DeltaGate::default();
        // One area in eight is worth comparing: one page in eight is below the share that pays.
        let useful = |page: u64| (page / AREA_PAGES).is_multiple_of(8);
        let pages = AREA_PAGES * 64;
        for _ in 0..60 {
            look(&gate, 0..pages, useful);
        }
        let (tried, found) = look(&gate, 0..pages, useful);
        assert_eq!(found, pages / 8, "every page that is worth it");
        assert!(tried < pages / 4, "{tried} of {pages} looked at");
        // Once it is no longer worth it, comparing stops.
        look(&gate, 0..pages, |_| false);
        assert!(look(&gate, 0..pages, |_| false).0 < pages / 100 + WINDOW);
    }
}
