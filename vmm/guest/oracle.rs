//! What a page holds and which page comes next: pure functions of the specification, shared by the guest
//! that writes and the host that checks.
//!
//! Page `index` after its `count`-th write holds `count` in word 0 and a function of
//! `(seed, content, index, count)` in the others; a page never written holds zeros. With
//! `content=zero` pages hold zeros always. These functions are part of the format
//! ([`VERSION`](super::control::VERSION)): a snapshot taken by an older version is checked with them.

use core::hint::select_unpredictable;

use super::control::PAGE_WORDS;
use super::spec::{Content, PPM, Pattern, WorkloadSpec};

/// Multiples of this are well spread over 64 bits (2^64 / golden ratio).
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// Turns similar numbers into unrelated ones (the finalizer of splitmix64).
#[inline(always)]
const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// A number below `limit` from a random word; multiplication is cheaper than the remainder, and as fair.
#[inline(always)]
#[allow(clippy::cast_possible_truncation)] // the high half of the product is below `limit`
const fn below(random: u64, limit: u64) -> u64 {
    ((random as u128 * limit as u128) >> 64) as u64
}

/// The contents of pages.
#[derive(Clone, Copy, Debug)]
pub struct Oracle {
    content: Content,
    seed: u64,
}

impl Oracle {
    /// The contents that `spec` asks for.
    #[must_use]
    pub fn new(spec: &WorkloadSpec) -> Self {
        Self { content: spec.content, seed: mix(spec.seed ^ SPREAD) }
    }

    /// Whether pages carry their count, so that counts and ledgers can be checked.
    #[must_use]
    pub fn counts_writes(&self) -> bool {
        self.content != Content::Zero
    }

    /// What a page's writes add to the ledger, each. It is odd, so that no number of missing writes to one page
    /// below 2^64 goes unnoticed, and random, so that those to several pages do not cancel out.
    #[inline]
    #[must_use]
    pub fn weight(&self, index: u64) -> u64 {
        mix(self.seed.wrapping_add(!index)) | 1
    }

    /// Page `index` after its `count`-th write.
    #[inline]
    #[must_use]
    pub fn page(&self, index: u64, count: u64) -> PageContent {
        let page = mix(self.seed ^ index.wrapping_mul(SPREAD));
        let (kind, key) = match self.content {
            _ if count == 0 => (Kind::Zero, 0),
            Content::Zero => (Kind::Zero, 0),
            Content::Text => (Kind::Text, mix(page.wrapping_add(count))),
            Content::Random => (Kind::Random, mix(page.wrapping_add(count))),
            Content::Edit => (Kind::Edit, page),
        };
        let count = if kind == Kind::Zero { 0 } else { count };
        PageContent { kind, key, count }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Zero,
    Text,
    Random,
    Edit,
}

/// The 512 words of a page, computed as they are asked for.
#[derive(Clone, Copy, Debug)]
pub struct PageContent {
    kind: Kind,
    key: u64,
    count: u64,
}

impl PageContent {
    /// Word `word` of the page, below 512.
    #[inline]
    #[must_use]
    pub fn word(&self, word: usize) -> u64 {
        self.pair(word / 2)[word % 2]
    }

    /// Words `2 * pair` and `2 * pair + 1`: text comes in pieces of two words.
    #[inline(always)]
    #[must_use]
    pub fn pair(&self, pair: usize) -> [u64; 2] {
        match self.kind {
            Kind::Zero => [0, 0],
            Kind::Text => self.headed(pair, text_pair(self.key, pair)),
            Kind::Random => self.headed(pair, random_pair(self.key, pair)),
            Kind::Edit => self.headed(pair, self.edited_pair(&self.edits(), pair)),
        }
    }

    /// Calls `each(pair, words)` for the whole page, in order, until it returns false. The kind is looked at
    /// once, not 256 times: this is the inner loop of the guest and of the checker.
    #[inline(always)]
    pub fn for_each_pair(&self, each: impl FnMut(usize, [u64; 2]) -> bool) {
        match self.kind {
            Kind::Zero => every_pair(|_| [0, 0], each),
            Kind::Text => every_pair(|pair| self.headed(pair, text_pair(self.key, pair)), each),
            Kind::Random => every_pair(|pair| self.headed(pair, random_pair(self.key, pair)), each),
            Kind::Edit => {
                let edits = self.edits();
                every_pair(|pair| self.headed(pair, self.edited_pair(&edits, pair)), each);
            }
        }
    }

    /// The word that the `count`-th write changes beside word 0, when it changes no other.
    #[inline]
    #[must_use]
    #[allow(clippy::cast_possible_truncation)] // a slot is below 511
    pub fn edited_word(&self) -> Option<usize> {
        if self.kind != Kind::Edit {
            return None;
        }
        self.edits().last_slot().map(|slot| slot as usize + 1)
    }

    /// The first write fills the page; only those after it are edits.
    #[inline]
    fn edits(&self) -> Edits {
        Edits::new(self.key, self.count.saturating_sub(1))
    }

    #[inline(always)]
    fn headed(&self, pair: usize, [first, second]: [u64; 2]) -> [u64; 2] {
        [if pair == 0 { self.count } else { first }, second]
    }

    #[inline(always)]
    fn edited_pair(&self, edits: &Edits, pair: usize) -> [u64; 2] {
        let mut words = text_pair(self.key, pair);
        for (half, word) in words.iter_mut().enumerate() {
            let slot = (pair as u64 * 2 + half as u64).saturating_sub(1); // word 0 is not for edits: see `headed`
            let (edited, edit) = edits.last_of(slot);
            *word = select_unpredictable(
                edited,
                letters(mix(self.key ^ edit.wrapping_mul(SPREAD))),
                *word,
            );
        }
        words
    }
}

#[inline(always)]
fn every_pair(words: impl Fn(usize) -> [u64; 2], mut each: impl FnMut(usize, [u64; 2]) -> bool) {
    for pair in 0..PAGE_WORDS / 2 {
        if !each(pair, words(pair)) {
            return;
        }
    }
}

#[inline(always)]
fn random_pair(key: u64, pair: usize) -> [u64; 2] {
    let first = key.wrapping_add((2 * pair as u64).wrapping_mul(SPREAD));
    [mix(first), mix(first.wrapping_add(SPREAD))]
}

/// Eight bytes of the corpus from a skewed choice of places, so that some pieces are frequent and most are rare,
/// and eight bytes more: in 7 of 16 cases a number (in letters), which compresses badly, as in logs; in 6 another
/// piece; and in 3 the text goes on.
#[inline(always)]
#[allow(clippy::cast_possible_truncation)] // below CORPUS_WORDS
fn text_pair(key: u64, pair: usize) -> [u64; 2] {
    let random = mix(key.wrapping_add((pair as u64).wrapping_mul(SPREAD)));
    let skewed = (random >> 32) * (random & 0xffff_ffff);
    let place = below(skewed, CORPUS_WORDS as u64 - 1) as usize;
    let elsewhere = below(random.wrapping_mul(SPREAD), CORPUS_WORDS as u64) as usize;
    let case = random >> 4 & 15; // bits that `letters` does not show
    let second = CORPUS[select_unpredictable(case < 13, elsewhere, place + 1)];
    [CORPUS[place], select_unpredictable(case < 7, letters(random), second)]
}

/// Eight letters from `a` to `p`.
#[inline(always)]
const fn letters(random: u64) -> u64 {
    (random & 0x0f0f_0f0f_0f0f_0f0f) + 0x6161_6161_6161_6161
}

const CORPUS_TEXT: &[u8] = include_bytes!("corpus.txt");
const CORPUS_WORDS: usize = CORPUS_TEXT.len() / 8;

static CORPUS: [u64; CORPUS_WORDS] = {
    let (words, _) = CORPUS_TEXT.as_chunks::<8>();
    let mut corpus = [0; CORPUS_WORDS];
    let mut index = 0;
    while index < CORPUS_WORDS {
        corpus[index] = u64::from_le_bytes(words[index]);
        index += 1;
    }
    corpus
};

// Edits walk over the 511 slots (words 1 to 511) with a stride that is coprime to 511, so 511 edits in a row
// hit each slot once, and the last edit of a slot follows from its place in the walk without a search.
const SLOTS: u64 = PAGE_WORDS as u64 - 1;
const EDIT_STRIDE: u64 = 197;
const EDIT_STRIDE_INVERSE: u64 = 428;
const _: () = assert!(EDIT_STRIDE * EDIT_STRIDE_INVERSE % SLOTS == 1);

/// The edits of a page so far.
#[derive(Clone, Copy, Debug)]
struct Edits {
    /// Slot of the first edit.
    start: u64,
    /// Edits in whole walks over all slots, not counting the last walk.
    walk: u64,
    /// Edits in the last walk: 1 to 511, or 0 before the first edit.
    reached: u64,
}

impl Edits {
    #[inline]
    fn new(key: u64, edits: u64) -> Self {
        let walk = edits.saturating_sub(1) / SLOTS * SLOTS;
        Self { start: key % SLOTS, walk, reached: edits - walk }
    }

    /// The slot that the last edit hit.
    #[inline]
    fn last_slot(&self) -> Option<u64> {
        let place = self.reached.checked_sub(1)?;
        Some((place * EDIT_STRIDE + self.start) % SLOTS)
    }

    /// Whether an edit has hit `slot`, and the last that did: in the last walk if that has come so far, or else in
    /// the one before, if there was one.
    #[inline(always)]
    fn last_of(&self, slot: u64) -> (bool, u64) {
        let place = (slot + SLOTS - self.start) * EDIT_STRIDE_INVERSE % SLOTS;
        let reached = place < self.reached;
        let edit = (self.walk + place).wrapping_sub(select_unpredictable(reached, 0, SLOTS));
        (reached || self.walk > 0, edit)
    }
}

/// The pages of one vCPU, and the order in which it writes them. Pages are dealt out in turn: vCPU `cpu` has
/// the data indices `cpu`, `cpu + cpus`, `cpu + 2 * cpus`, …
#[derive(Clone, Copy, Debug)]
pub struct PageOrder {
    pattern: Pattern,
    key: u64,
    cpu: u64,
    cpus: u64,
    /// Pages of this vCPU.
    own_pages: u64,
    /// The first so many turns populate.
    populate_turns: u64,
    hot_pages: u64,
    hot_writes_ppm: u64,
    /// Coprime to `own_pages`: multiplication by it scatters the hot pages.
    stride: u64,
}

impl PageOrder {
    /// The order in which vCPU `cpu` writes its share of `data_pages` pages. Each vCPU has a page or more:
    /// the smallest `touch` is one page for each of the most vCPUs there can be.
    #[must_use]
    pub fn new(spec: &WorkloadSpec, cpu: u64, data_pages: u64) -> Self {
        let own_pages = (data_pages + spec.cpus - 1 - cpu) / spec.cpus;
        let hot_pages = (own_pages * spec.hot_share_ppm / PPM).clamp(1, own_pages.max(1));
        Self {
            pattern: spec.pattern,
            key: mix(mix(spec.seed ^ SPREAD).wrapping_add(cpu)),
            cpu,
            cpus: spec.cpus,
            own_pages,
            populate_turns: if spec.populate { own_pages } else { 0 },
            hot_pages,
            hot_writes_ppm: spec.hot_writes_ppm,
            stride: coprime_near(own_pages, own_pages / 8 * 5 + 1),
        }
    }

    /// Pages of this vCPU.
    #[must_use]
    pub fn own_pages(&self) -> u64 {
        self.own_pages
    }

    /// Turns that populate, before the pattern begins.
    #[must_use]
    pub fn populate_turns(&self) -> u64 {
        self.populate_turns
    }

    /// Data index of the `own`-th page of this vCPU.
    #[inline]
    #[must_use]
    pub fn own_page(&self, own: u64) -> u64 {
        own * self.cpus + self.cpu
    }

    /// Data index of the page that turn `turn` writes, counted from 0.
    #[inline]
    #[must_use]
    pub fn page_at(&self, turn: u64) -> u64 {
        let own = if turn < self.populate_turns {
            turn
        } else if self.pattern == Pattern::Seq {
            (turn - self.populate_turns) % self.own_pages
        } else if self.pattern == Pattern::Shuffle {
            self.shuffled(turn - self.populate_turns)
        } else {
            let random = mix(self.key ^ turn.wrapping_mul(SPREAD));
            if self.pattern == Pattern::Hot {
                self.hot_or_cold(random)
            } else {
                below(random, self.own_pages)
            }
        };
        self.own_page(own)
    }

    /// A Feistel cipher on the place within the pass, keyed by the pass, again and again until the
    /// result is a place: a permutation of the pages without a table of them.
    fn shuffled(&self, turn: u64) -> u64 {
        let half_bits = (u64::BITS - (self.own_pages - 1).leading_zeros()).div_ceil(2).max(1);
        let mask = (1 << half_bits) - 1;
        let key = mix(self.key ^ (turn / self.own_pages).wrapping_mul(SPREAD));
        let mut place = turn % self.own_pages;
        loop {
            let (mut left, mut right) = (place >> half_bits, place & mask);
            for round in 0..4 {
                (left, right) = (right, left ^ (mix(key ^ (right << 2 | round)) & mask));
            }
            place = left << half_bits | right;
            if place < self.own_pages {
                return place;
            }
        }
    }

    fn hot_or_cold(&self, random: u64) -> u64 {
        let cold_pages = self.own_pages - self.hot_pages;
        let place = mix(random);
        let rank = if below(random, PPM) < self.hot_writes_ppm || cold_pages == 0 {
            below(place, self.hot_pages)
        } else {
            self.hot_pages + below(place, cold_pages)
        };
        rank * self.stride % self.own_pages
    }
}

/// The first number from `start` on that has no factor in common with `number`.
fn coprime_near(number: u64, start: u64) -> u64 {
    let gcd = |mut a: u64, mut b: u64| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    // The prime factors of `number` are few: one of the next hundred numbers has none of them.
    (start..start + 100).find(|candidate| gcd(number, *candidate) <= 1).unwrap_or(1)
}
