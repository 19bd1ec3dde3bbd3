//! Where no match can be, for expressions without bytes that must occur.
//!
//! A DFA for such an expression takes every byte, and each step waits for the load of the step before: four or
//! five cycles. A core can have many loads in flight, so several stretches of memory are walked in turns, one
//! byte of each at a time. The DFA only tells whether a stretch has a match; the exact matches are found by
//! searching the few stretches that have one.

use regex_automata::dfa::{Automaton, StartKind, dense};
use regex_automata::nfa::thompson::{self, WhichCaptures};
use regex_automata::util::primitives::StateID;
use regex_automata::{Anchored, Input};
use regex_syntax::hir::Hir;
use std::array;
use std::ops::Range;

/// Stretches that are walked in turns.
const LANES: usize = 4;
/// Bytes of a stretch: few enough for all stretches to stay in a core's cache.
const LANE_BYTES: usize = 32 << 10;
/// But at least this many times the longest match: as much behind each stretch is walked twice.
const LANE_MATCHES: usize = 32;
/// The largest DFA. A larger one does not fit into a core's cache, and a lazily built one is faster.
const DFA_BYTES_MAX: usize = 512 << 10;
/// The most memory that building the DFA may take.
const BUILDING_BYTES_MAX: usize = 4 << 20;
/// Lanes after which it is decided whether scanning ahead pays.
const LANES_TRIED: usize = 16;

/// An expression's DFA.
#[derive(Debug)]
pub(super) struct Scanner {
    dfa: dense::DFA<Vec<u32>>,
}

/// A stretch of memory: matches that begin in `starts` are looked for up to byte `end`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Lane {
    starts: Range<usize>,
    end: usize,
}

impl Scanner {
    /// None if the DFA is too large, or cannot express `hir`.
    pub(super) fn new(hir: &Hir) -> Option<Self> {
        let config = thompson::Config::new()
            .utf8(false)
            .which_captures(WhichCaptures::None)
            .nfa_size_limit(Some(BUILDING_BYTES_MAX));
        let nfa = thompson::Compiler::new().configure(config).build_from_hir(hir).ok()?;
        let config = dense::Config::new()
            .start_kind(StartKind::Unanchored)
            .accelerate(false)
            .dfa_size_limit(Some(DFA_BYTES_MAX))
            .determinize_size_limit(Some(BUILDING_BYTES_MAX));
        let dfa = dense::Builder::new().configure(config).build_from_nfa(&nfa).ok()?;
        Some(Self { dfa })
    }

    /// Where in `starts` matches of at most `longest` bytes that end by `end` may begin, as ascending ranges;
    /// none begins elsewhere. Look-arounds see the bytes around. `is_open` if longer matches may be found, too.
    pub(super) fn candidates(
        &self,
        bytes: &[u8],
        starts: Range<usize>,
        end: usize,
        longest: usize,
        is_open: bool,
    ) -> Vec<Range<usize>> {
        if starts.len() < 2 * LANES * longest {
            return vec![starts];
        }
        let lane_bytes = LANE_BYTES.max(LANE_MATCHES * longest);
        let mut found = Vec::new();
        let mut tried = 0;
        let mut at = starts.start;
        while at < starts.end {
            // Where matches are everywhere, scanning ahead only costs time.
            if tried >= LANES_TRIED && found.len() * 2 > tried {
                found.push(at..starts.end);
                break;
            }
            let len = (starts.end - at).div_ceil(LANES).min(lane_bytes);
            let lanes: [Lane; LANES] = array::from_fn(|lane| {
                let start = (at + lane * len).min(starts.end);
                let stop = (start + len).min(starts.end);
                Lane { starts: start..stop, end: (stop + longest).min(end).max(stop) }
            });
            for (lane, hit) in lanes.iter().zip(self.look(bytes, &lanes)) {
                let Some(hit) = hit else { continue };
                // The DFA reports the first match to end, so a match of bounded length began near `hit`.
                let first = if is_open { 0 } else { hit.saturating_sub(longest) };
                found.push(first.max(lane.starts.start)..lane.starts.end);
            }
            tried += LANES;
            at = lanes[LANES - 1].starts.end;
        }
        found.retain(|range| !range.is_empty());
        found
    }

    /// For each lane, the byte at which the DFA reports a match, or gives up.
    fn look(&self, bytes: &[u8], lanes: &[Lane; LANES]) -> [Option<usize>; LANES] {
        let begin = |lane: &Lane| {
            let input = Input::new(bytes).span(lane.starts.start..lane.end).anchored(Anchored::No);
            self.dfa.start_state_forward(&input).ok()
        };
        let begun = [begin(&lanes[0]), begin(&lanes[1]), begin(&lanes[2]), begin(&lanes[3])];
        let [Some(a), Some(b), Some(c), Some(d)] = begun else {
            return array::from_fn(|lane| Some(lanes[lane].starts.start));
        };
        let mut states = [a, b, c, d];
        let together = lanes.iter().map(|lane| lane.end - lane.starts.start).min().unwrap_or(0);
        let done = self.together(bytes, lanes, &mut states, together);
        array::from_fn(|lane| {
            let Lane { starts, end } = &lanes[lane];
            // Nothing begins in an empty lane.
            if starts.is_empty() {
                None
            } else {
                self.alone(bytes, starts.start + done, *end, states[lane])
            }
        })
    }

    /// Walks `count` bytes of each lane, or until one reaches a state that needs a look; returns how many were
    /// walked. `states` are then those before the next byte.
    fn together(
        &self,
        bytes: &[u8],
        lanes: &[Lane; LANES],
        states: &mut [StateID; LANES],
        count: usize,
    ) -> usize {
        let dfa = &self.dfa;
        let [a, b, c, d]: [&[u8]; LANES] =
            array::from_fn(|lane| &bytes[lanes[lane].starts.start..][..count]);
        let [mut sa, mut sb, mut sc, mut sd] = *states;
        let mut done = 0;
        for (((a, b), c), d) in a.iter().zip(b).zip(c).zip(d) {
            let next = [
                dfa.next_state(sa, *a),
                dfa.next_state(sb, *b),
                dfa.next_state(sc, *c),
                dfa.next_state(sd, *d),
            ];
            // Without short circuit: one branch instead of four.
            let [a, b, c, d] = next.map(|state| dfa.is_special_state(state));
            if a | b | c | d {
                break;
            }
            [sa, sb, sc, sd] = next;
            done += 1;
        }
        *states = [sa, sb, sc, sd];
        done
    }

    /// Walks `bytes[at..end]` from `state` on.
    fn alone(&self, bytes: &[u8], at: usize, end: usize, state: StateID) -> Option<usize> {
        let dfa = &self.dfa;
        let mut state = state;
        for (index, byte) in (at..).zip(&bytes[at..end]) {
            state = dfa.next_state(state, *byte);
            if dfa.is_special_state(state) {
                return Some(index);
            }
        }
        // A DFA reports a match one byte late, having looked at what follows.
        let last = match bytes.get(end) {
            Some(byte) => dfa.next_state(state, *byte),
            None => dfa.next_eoi_state(state),
        };
        dfa.is_special_state(last).then_some(end)
    }
}
