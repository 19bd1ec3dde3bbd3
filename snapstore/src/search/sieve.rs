//! Where matches may begin, judged by the bytes that can stand at a few of their positions.
//!
//! Checking whether bytes lie in one of a few ranges takes a few vector instructions for 16 bytes or more, and no
//! load waits for another. So the positions that exclude most are checked, each for many starts at once; a sample of
//! the memory decides which positions these are. The regular expression is then tried at each start that passes.

use std::ops::{Range, RangeInclusive};

use regex_syntax::hir::Hir;

use super::positions::{ByteSet, byte_sets};

/// Starts that are checked together: several vectors full, and few enough that often none passes the first
/// checks, which spares the others.
const BLOCK: usize = 64;
/// The most ranges of a set of bytes; those of other sets are joined, so that they let more pass, not less.
const RANGES_MAX: usize = 4;
/// The most positions to check.
const CHECKS_MAX: usize = 4;
/// Bytes sampled to estimate how many starts a check lets pass.
const SAMPLES: usize = 1024;
/// At most one start in so many may pass. If more do, trying each costs more than an automaton for all.
const STARTS_PER_PASS: usize = 256;
/// So many more may pass, wherever they are.
const PASSES_MIN: usize = 256;

/// What all matches of an expression have in common.
#[derive(Debug)]
pub(super) struct Sieve {
    /// The bytes that can stand at each position.
    positions: Vec<Position>,
}

#[derive(Debug)]
struct Position {
    offset: usize,
    ranges: ByteRanges,
}

/// At most [`RANGES_MAX`] ranges of bytes: the first of each, and how many follow it.
type ByteRanges = Vec<(u8, u8)>;

/// The starts that passed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Sifted {
    /// Where matches may begin, ascending.
    pub starts: Vec<usize>,
    /// Starts from here on were not checked, because too many pass.
    pub done: usize,
}

impl Sieve {
    /// None if any byte can stand at every position of a match of `hir`, or that takes too long to find out.
    pub(super) fn new(hir: &Hir) -> Option<Self> {
        let position = |(offset, set): (usize, ByteSet)| {
            let ranges = joined(set.ranges());
            (ranges != [(0, 255)]).then_some(Position { offset, ranges })
        };
        let positions: Vec<_> =
            byte_sets(hir)?.into_iter().enumerate().filter_map(position).collect();
        (!positions.is_empty()).then_some(Self { positions })
    }

    /// Where in `starts` matches that end by `end` may begin.
    pub(super) fn sift(&self, bytes: &[u8], starts: Range<usize>, end: usize) -> Sifted {
        let mut sifted = Sifted { starts: Vec::new(), done: starts.start };
        let Some(checks) = self.checks(&bytes[starts.start..end]) else { return sifted };
        let reach = checks.iter().map(|check| check.offset).max().unwrap_or(0);
        let stop = starts.end.min(end.saturating_sub(reach));
        while sifted.done + BLOCK <= stop {
            let at = sifted.done;
            if sifted.starts.len() > (at - starts.start) / STARTS_PER_PASS + PASSES_MIN {
                return sifted;
            }
            if let Some(passed) = pass(bytes, at, &checks) {
                let passed = passed.iter().enumerate().filter(|(_, passed)| **passed != 0);
                sifted.starts.extend(passed.map(|(start, _)| at + start));
            }
            sifted.done += BLOCK;
        }
        let passes = |start: &usize| {
            checks.iter().all(|check| is_within(bytes[start + check.offset], &check.ranges))
        };
        sifted.starts.extend((sifted.done..stop).filter(passes));
        sifted.done = starts.end;
        sifted
    }

    /// The positions to check, most selective first. None if they would let too many starts pass.
    fn checks(&self, bytes: &[u8]) -> Option<Vec<&Position>> {
        // Odd, or all samples would be from the same few places of their pages.
        let step = (bytes.len() / SAMPLES) | 1;
        let mut counts = [0_usize; 256];
        bytes.iter().step_by(step).for_each(|byte| counts[usize::from(*byte)] += 1);
        let samples = bytes.len().div_ceil(step).max(1);
        let share = |position: &Position| {
            let within = |(first, more): &(u8, u8)| {
                let range = usize::from(*first)..=usize::from(*first) + usize::from(*more);
                counts[range].iter().sum::<usize>()
            };
            position.ranges.iter().map(within).sum::<usize>().max(1) as f64 / samples as f64
        };
        let mut left: Vec<_> =
            self.positions.iter().map(|position| (share(position), position)).collect();
        let (mut checks, mut passing) = (Vec::<&Position>::new(), 1.0);
        while checks.len() < CHECKS_MAX && passing > 0.1 / STARTS_PER_PASS as f64 {
            // Among equals the one farthest from those chosen: neighbouring bytes tend to be alike.
            let distance = |position: &Position| {
                checks.iter().map(|check| check.offset.abs_diff(position.offset)).min()
            };
            let best = left.iter().enumerate().min_by(|(_, a), (_, b)| {
                a.0.total_cmp(&b.0).then_with(|| distance(b.1).cmp(&distance(a.1)))
            });
            let Some((index, _)) = best else { break };
            let (share, position) = left.swap_remove(index);
            passing *= share;
            checks.push(position);
        }
        (passing < 1.0 / STARTS_PER_PASS as f64).then_some(checks)
    }
}

/// Which of the [`BLOCK`] starts from `at` on pass all `checks`: those with a non-zero byte. None if none does.
fn pass(bytes: &[u8], at: usize, checks: &[&Position]) -> Option<[u8; BLOCK]> {
    let mut passed = [1; BLOCK];
    for check in checks {
        let (block, _) = bytes[at + check.offset..].split_first_chunk::<BLOCK>()?;
        match check.ranges[..] {
            [a] => keep(&mut passed, block, [a]),
            [a, b] => keep(&mut passed, block, [a, b]),
            [a, b, c] => keep(&mut passed, block, [a, b, c]),
            [a, b, c, d] => keep(&mut passed, block, [a, b, c, d]),
            _ => unreachable!("joined() leaves 1 to {RANGES_MAX} ranges"),
        }
        if passed.iter().fold(0, |any, passed| any | passed) == 0 {
            return None;
        }
    }
    Some(passed)
}

/// Clears those of `passed` whose byte is in none of `ranges`. Simple enough for the compiler to vectorise.
fn keep<const RANGES: usize>(
    passed: &mut [u8; BLOCK],
    bytes: &[u8; BLOCK],
    ranges: [(u8, u8); RANGES],
) {
    for (passed, byte) in passed.iter_mut().zip(bytes) {
        *passed &= u8::from(is_within(*byte, &ranges));
    }
}

/// Without a branch for each range, which would keep the compiler from vectorising [`keep`].
fn is_within(byte: u8, ranges: &[(u8, u8)]) -> bool {
    ranges.iter().fold(false, |any, (first, more)| any | (byte.wrapping_sub(*first) <= *more))
}

/// `ranges` with those nearest to each other joined, until they are few enough.
fn joined(mut ranges: Vec<RangeInclusive<u8>>) -> ByteRanges {
    while ranges.len() > RANGES_MAX {
        let gap = |pair: &usize| ranges[*pair + 1].start() - ranges[*pair].end();
        let nearest = (0..ranges.len() - 1).min_by_key(gap).unwrap_or(0);
        let next = ranges.remove(nearest + 1);
        ranges[nearest] = *ranges[nearest].start()..=*next.end();
    }
    ranges.iter().map(|range| (*range.start(), range.end() - range.start())).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::pattern::parse;
    use super::*;

    fn sieve(expression: &str) -> Option<Sieve> {
        Sieve::new(&parse(expression).expect("an expression"))
    }

    proptest! {
        /// What passes are the starts of matches, for an expression that is nothing but byte sets.
        #[test]
        fn no_match_is_missed_and_all_is_checked(
            bytes in proptest::collection::vec(prop_oneof![20 => Just(b'.'), 1 => Just(b'x'), 1 => b'0'..=b'9'], 0..3000),
            plants in proptest::collection::vec(0_usize..3000, 0..8),
            (from, short) in (0_usize..300, 0_usize..300),
        ) {
            let mut bytes = bytes;
            for at in plants {
                if let Some(place) = bytes.get_mut(at..at + 7) {
                    place.copy_from_slice(b"12x34y5");
                }
            }
            let from = from.min(bytes.len());
            let end = bytes.len().saturating_sub(short / 2).max(from);
            let to = end.saturating_sub(short / 3).max(from);
            let sifted = sieve("[0-9]{2}[x-z][0-9]{2}[x-z][0-9]").expect("a sieve").sift(&bytes, from..to, end);
            // Few bytes are no sample to rely on.
            prop_assume!(sifted.done == to);
            let is_match = |start: &usize| {
                let digit = |at: usize| bytes[start + at].is_ascii_digit();
                let letter = |at: usize| (b'x'..=b'z').contains(&bytes[start + at]);
                start + 7 <= end && [0, 1, 3, 4, 6].into_iter().all(digit) && letter(2) && letter(5)
            };
            let matches: Vec<_> = (from..to).filter(is_match).collect();
            prop_assert!(matches.iter().all(|start| sifted.starts.contains(start)));
            prop_assert!(sifted.starts.is_sorted());
            prop_assert!(sifted.starts.len() <= matches.len() + bytes.len() / 8);
        }
    }

    #[test]
    fn what_passes_too_often_is_left() {
        let text: Vec<u8> =
            (0..100_000_u32).map(|at| b"0123456789abcdef"[at as usize * 7 % 16]).collect();
        let all = 0..text.len();
        // Judged by the sample.
        let sifted = sieve("[0-9][0-9a-f]").expect("a sieve").sift(&text, all.clone(), text.len());
        assert_eq!(sifted, Sifted { starts: Vec::new(), done: 0 });
        // Judged by what passed: all matches are in one place.
        let zeros = sieve("0{5}").expect("a sieve");
        assert_eq!(zeros.sift(&text, all.clone(), text.len()).done, text.len());
        let mut text = text;
        text[40_000..48_000].fill(b'0');
        let done = zeros.sift(&text, all, text.len()).done;
        assert!((40_000..48_000).contains(&done), "{done}");
        // Nothing is known of these.
        assert!(sieve("(?s).{3}").is_none());
        assert!(sieve("(?s).*x?").is_none());
    }

    #[test]
    fn many_ranges_become_few_that_have_all_their_bytes() {
        let ranges = joined(vec![1..=2, 5..=5, 8..=20, 30..=30, 90..=95, 97..=99, 255..=255]);
        assert_eq!(ranges, [(1, 19), (30, 0), (90, 9), (255, 0)]);
    }
}
