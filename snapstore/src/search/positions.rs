//! Which bytes can stand at each position of a match.
//!
//! Every match of `[0-9a-f]{4}-\w+` has a hexadecimal digit at its positions 0 to 3, a hyphen at 4 and a word
//! character at 5. Bytes that fail this are no match, and no automaton is needed to see it.

use std::ops::RangeInclusive;

use regex_syntax::hir::{Class, Hir, HirKind, Repetition};

/// Positions considered, counted from the beginning of a match: one bit of a word for each.
const POSITIONS_MAX: usize = 64;
/// The most subexpressions to visit, those of a repetition each time.
const STEPS_MAX: usize = 1 << 14;

/// A set of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ByteSet([u64; 4]);

impl ByteSet {
    fn insert(&mut self, bytes: RangeInclusive<u8>) {
        bytes.for_each(|byte| self.0[usize::from(byte >> 6)] |= 1 << (byte & 63));
    }

    pub fn contains(&self, byte: u8) -> bool {
        self.0[usize::from(byte >> 6)] >> (byte & 63) & 1 == 1
    }

    /// Its bytes as the fewest ranges, ascending.
    pub fn ranges(&self) -> Vec<RangeInclusive<u8>> {
        let mut ranges: Vec<RangeInclusive<u8>> = Vec::new();
        for byte in (0..=255).filter(|byte| self.contains(*byte)) {
            match ranges.last_mut() {
                Some(last) if *last.end() == byte - 1 => *last = *last.start()..=byte,
                _ => ranges.push(byte..=byte),
            }
        }
        ranges
    }
}

/// The bytes that can stand at each of the first positions that all matches of `hir` have: at most
/// [`POSITIONS_MAX`], and as many as its shortest match is long. None if the expression is too large.
pub(super) fn byte_sets(hir: &Hir) -> Option<Vec<ByteSet>> {
    let mut walk = Walk { sets: [ByteSet::default(); POSITIONS_MAX], steps: 0 };
    walk.advance(hir, 1)?;
    let shortest = hir.properties().minimum_len().unwrap_or(0);
    Some(walk.sets[..shortest.min(POSITIONS_MAX)].to_vec())
}

/// Goes through an expression with all positions at which a subexpression can begin, as a set of bits.
struct Walk {
    sets: [ByteSet; POSITIONS_MAX],
    steps: usize,
}

impl Walk {
    /// Notes the bytes that `hir` can match if it begins at any position of `at`, and returns the positions at
    /// which it can end. Those beyond the last are dropped.
    fn advance(&mut self, hir: &Hir, at: u64) -> Option<u64> {
        self.steps += 1;
        if self.steps > STEPS_MAX {
            return None;
        }
        if at == 0 {
            return Some(0);
        }
        match hir.kind() {
            HirKind::Empty | HirKind::Look(_) => Some(at),
            HirKind::Literal(literal) => {
                Some(literal.0.iter().fold(at, |at, byte| self.one_of([*byte..=*byte], at)))
            }
            HirKind::Class(Class::Bytes(class)) => {
                let ranges = class.ranges().iter().map(|range| range.start()..=range.end());
                Some(self.one_of(ranges, at))
            }
            HirKind::Class(class @ Class::Unicode(_)) => {
                // Encoded as UTF-8: any bytes, but only as many as the class allows.
                let longest = class.maximum_len().unwrap_or(4);
                let shortest = class.minimum_len().unwrap_or(1);
                let (mut end, mut ends) = (at, 0);
                for len in 1..=longest {
                    end = self.one_of([0..=255], end);
                    ends |= if len >= shortest { end } else { 0 };
                }
                Some(ends)
            }
            HirKind::Repetition(repetition) => self.repeat(repetition, at),
            HirKind::Capture(capture) => self.advance(&capture.sub, at),
            HirKind::Concat(parts) => parts.iter().try_fold(at, |at, part| self.advance(part, at)),
            HirKind::Alternation(parts) => {
                parts.iter().try_fold(0, |ends, part| Some(ends | self.advance(part, at)?))
            }
        }
    }

    fn repeat(&mut self, repetition: &Repetition, at: u64) -> Option<u64> {
        let mut end = at;
        let mut ends = if repetition.min == 0 { at } else { 0 };
        for times in 1..=repetition.max.unwrap_or(u32::MAX) {
            let before = end;
            end = self.advance(&repetition.sub, end)?;
            if times < repetition.min {
                // All ends lie beyond the last position, or only empty matches are left to repeat.
                if end == 0 || end == before {
                    return Some(end);
                }
                continue;
            }
            // A repetition that begins where an earlier one began ends where that one's successors end.
            if end | ends == ends {
                break;
            }
            ends |= end;
        }
        Some(ends)
    }

    /// Notes that a byte of `ranges` can stand at any position of `at`; returns the positions behind it.
    fn one_of(&mut self, ranges: impl IntoIterator<Item = RangeInclusive<u8>>, at: u64) -> u64 {
        let mut set = ByteSet::default();
        ranges.into_iter().for_each(|range| set.insert(range));
        for (position, known) in self.sets.iter_mut().enumerate() {
            if at >> position & 1 == 1 {
                known.0.iter_mut().zip(set.0).for_each(|(known, more)| *known |= more);
            }
        }
        at << 1
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::pattern::parse;
    use super::*;

    fn sets(expression: &str) -> Vec<ByteSet> {
        byte_sets(&parse(expression).expect("an expression")).expect("sets")
    }

    fn shown(set: &ByteSet) -> String {
        let range = |range: &RangeInclusive<u8>| {
            let (first, last) = (char::from(*range.start()), char::from(*range.end()));
            if first == last { first.to_string() } else { format!("{first}-{last}") }
        };
        set.ranges().iter().map(range).collect()
    }

    #[test]
    fn every_position_has_the_bytes_that_can_stand_there() {
        for (expression, expected) in [
            ("[0-9a-f]{3}-", vec!["0-9a-f", "0-9a-f", "0-9a-f", "-"]),
            ("a(?:b|cd)?e", vec!["a", "b-ce"]),
            ("[ab]+x[0-9]{2}", vec!["a-b", "a-bx", "0-9a-bx", "0-9a-bx"]),
            (r"^\b(x{2,3}|y*)z{2}", vec!["x-z", "x-z"]),
            ("(?:(?:a?)*b)*c", vec!["a-c"]),
            ("(?:a?){3}bb", vec!["a-b", "a-b"]),
        ] {
            let found: Vec<_> = sets(expression).iter().map(shown).collect();
            assert_eq!(found, expected, "{expression}");
        }
        assert_eq!(sets("a{1000}b").len(), POSITIONS_MAX);
    }

    fn is_left(expression: &str) -> bool {
        byte_sets(&parse(expression).expect("an expression")).is_none()
    }

    #[test]
    fn only_large_expressions_are_left() {
        let nested = (0..40).fold("a".to_owned(), |inner, _| format!("(?:b?{inner}|c){{0,7}}"));
        assert!(!is_left(&format!("{nested}d")));
        let branches: Vec<_> = (0..STEPS_MAX).map(|number| format!("{number}[ab]")).collect();
        assert!(is_left(&branches.join("|")));
    }

    const EXPRESSIONS: [&str; 8] = [
        "[0-9a-f]{24}[G-Z]",
        "(ab|c[de]{2,5})+f",
        "(?:x?y*z{0,3}){2}[0-9]",
        "a{70}b",
        "(?u)[α-ω]{2}x",
        "(?-u)[^a-y]{1,3}(?:a|[0-9]+)",
        "(?i-u)key=[a-z0-9+/]{8,}",
        "(?:(?:a?b?){2,4}c){3}",
    ];

    proptest! {
        /// The oracle makes strings that match, and asks for none of the code above.
        #[test]
        fn every_match_has_only_bytes_that_can_stand_there(
            (expression, text) in (0..EXPRESSIONS.len()).prop_flat_map(|number| {
                let made = proptest::string::bytes_regex(EXPRESSIONS[number]).expect("a generator");
                (Just(EXPRESSIONS[number]), made)
            })
        ) {
            let sets = sets(expression);
            prop_assert!(text.len() >= sets.len());
            for (position, (byte, set)) in text.iter().zip(&sets).enumerate() {
                prop_assert!(set.contains(*byte), "{} at {} in {:?}", expression, position, text);
            }
        }
    }
}
