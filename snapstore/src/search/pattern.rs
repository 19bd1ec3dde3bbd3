//! What to search for.

use std::ops::Range;

use memchr::memmem::Finder;
use regex_automata::meta::{self, Regex};
use regex_automata::util::syntax;
use regex_automata::{Anchored, Input};
use regex_syntax::hir::{Hir, Look};

use super::scan::Scanner;
use super::sieve::Sieve;
use crate::error::{Result, StoreError};
use crate::page::PAGE_SIZE;

/// For an expression whose matches may be of any length: a match of up to this many bytes is certain to be
/// found; a longer one may be found whole or in pieces.
pub const OPEN_MATCH_BYTES: usize = PAGE_SIZE;
/// The longest pattern or bounded match that can be searched for, in bytes.
pub const MATCH_BYTES_MAX: usize = 64 << 10;
/// The most that any look-around looks at before or behind a match: Unicode's `\b` decodes one character.
const LOOK_BYTES: usize = 4;

/// What to search for: bytes or a regular expression.
#[derive(Debug)]
pub struct Pattern {
    engine: Engine,
    /// The longest match that is found for certain, in bytes.
    longest: usize,
    /// Whether there may be longer ones.
    is_open: bool,
    /// Bytes it looks at before a match, and behind it.
    looks: usize,
}

#[derive(Debug)]
enum Engine {
    Bytes(Box<Finder<'static>>),
    Regex {
        regex: Box<Regex>,
        /// None if the expression has bytes that must occur, which `regex` looks for by itself.
        ahead: Option<Box<Ahead>>,
    },
}

/// Tells where no match can begin, faster than the expression itself.
#[derive(Debug)]
struct Ahead {
    sieve: Option<Sieve>,
    /// For memory of which the sieve lets too much pass.
    scanner: Option<Scanner>,
}

/// Matches in order, and whether these are all.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub matches: Vec<Range<usize>>,
    pub is_all: bool,
}

impl Pattern {
    /// These bytes.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if there are none, too many, or only zeros: zero pages are not searched.
    pub fn bytes(bytes: &[u8]) -> Result<Self> {
        if bytes.is_empty() || bytes.len() > MATCH_BYTES_MAX {
            let found = bytes.len();
            return Err(invalid(format!("expected 1 to {MATCH_BYTES_MAX} bytes, found {found}")));
        }
        let engine = Engine::Bytes(Box::new(Finder::new(bytes).into_owned()));
        Self { engine, longest: bytes.len(), is_open: false, looks: 0 }.checked()
    }

    /// A regular expression in the syntax of the `regex` crate, on bytes: `.` is any byte but a line feed,
    /// classes such as `\w` are ASCII, and `^` and `$` match at the ends of lines, unless flags such as
    /// `(?s)` and `(?i)` say otherwise.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if it does not parse, can match the empty string, zeros alone or nothing at
    /// all, has an anchor to the beginning or end of all memory, or its matches are too long.
    pub fn regex(expression: &str) -> Result<Self> {
        let hir = parse(expression)?;
        let looks = hir.properties().look_set();
        if looks.contains(Look::Start) || looks.contains(Look::End) {
            let what = "expected an expression without \\A and \\z (nor ^ and $ with (?-m)): memory has no beginning and no end";
            return Err(invalid(what.into()));
        }
        let (longest, is_open) = lengths(&hir)?;
        let regex = meta::Builder::new()
            .configure(Regex::config().utf8_empty(false))
            .build_from_hir(&hir)
            .map_err(|error| invalid(format!("expected a smaller regular expression: {error}")))?;
        let ahead = (!regex.is_accelerated())
            .then(|| Box::new(Ahead { sieve: Sieve::new(&hir), scanner: Scanner::new(&hir) }));
        let engine = Engine::Regex { regex: Box::new(regex), ahead };
        let looks = if looks.is_empty() { 0 } else { LOOK_BYTES };
        Self { engine, longest, is_open, looks }.checked()
    }

    /// Refuses patterns that zeros alone match: they would be found everywhere, but zero pages are skipped.
    fn checked(self) -> Result<Self> {
        let zeros = vec![0; LOOK_BYTES + self.longest + LOOK_BYTES];
        match self.find(&zeros, LOOK_BYTES..LOOK_BYTES + self.longest, Anchored::No) {
            Some(_) => Err(invalid(
                "expected a pattern that zeros alone do not match, found one that they do: pages that are all zero are not looked at".into(),
            )),
            None => Ok(self),
        }
    }

    /// The longest match that is found for certain, in bytes.
    pub(super) fn longest(&self) -> usize {
        self.longest
    }

    /// Bytes it looks at before a match, and behind it.
    pub(super) fn looks(&self) -> usize {
        self.looks
    }

    /// Whether it has a sieve, and whether it has a scanner.
    #[cfg(test)]
    pub(super) fn looks_ahead(&self) -> (bool, bool) {
        match &self.engine {
            Engine::Regex { ahead: Some(ahead), .. } => {
                (ahead.sieve.is_some(), ahead.scanner.is_some())
            }
            _ => (false, false),
        }
    }

    /// The first match in `bytes[span]`, or, if `anchored`, the one at its very beginning. Look-arounds see
    /// the bytes around the span.
    fn find(&self, bytes: &[u8], span: Range<usize>, anchored: Anchored) -> Option<Range<usize>> {
        match &self.engine {
            Engine::Bytes(finder) => {
                // A span to be anchored to is never longer than the bytes, so they fit only there.
                let at = span.start + finder.find(&bytes[span])?;
                Some(at..at + finder.needle().len())
            }
            Engine::Regex { regex, .. } => {
                let found = regex.find(Input::new(bytes).span(span).anchored(anchored))?;
                Some(found.range())
            }
        }
    }

    /// The first match that begins in `starts` and ends by `end`.
    pub(super) fn find_from(
        &self,
        bytes: &[u8],
        starts: Range<usize>,
        end: usize,
    ) -> Option<Range<usize>> {
        if starts.is_empty() {
            return None;
        }
        // Without a limit, the search would go on through everything behind `starts`.
        let near = (starts.end.saturating_add(self.longest) - 1).min(end);
        let anchored = if starts.len() == 1 { Anchored::Yes } else { Anchored::No };
        let found = self.find(bytes, starts.start..near, anchored)?;
        if found.start >= starts.end {
            return None;
        }
        if self.is_open && found.end == near && near < end {
            // The limit may have cut it short.
            return self.find(bytes, found.start..end, Anchored::Yes);
        }
        Some(found)
    }

    /// Adds to `found` the non-overlapping matches that begin in `starts` and end by `end`, in order, until
    /// it holds `most`.
    pub(super) fn find_all(
        &self,
        bytes: &[u8],
        starts: Range<usize>,
        end: usize,
        most: usize,
        found: &mut Found,
    ) {
        let mut at = starts.start;
        for starts in self.candidates(bytes, starts, end) {
            at = at.max(starts.start);
            while at < starts.end {
                if found.matches.len() >= most {
                    found.is_all = false;
                    return;
                }
                let Some(next) = self.find_from(bytes, at..starts.end, end) else { break };
                at = next.end;
                found.matches.push(next);
            }
        }
    }

    /// Where in `starts` matches may begin, as ascending ranges.
    fn candidates(&self, bytes: &[u8], starts: Range<usize>, end: usize) -> Vec<Range<usize>> {
        let Engine::Regex { ahead: Some(ahead), .. } = &self.engine else { return vec![starts] };
        let mut found = Vec::new();
        let mut rest = starts;
        if let Some(sieve) = &ahead.sieve {
            let sifted = sieve.sift(bytes, rest.clone(), end);
            found.extend(sifted.starts.iter().map(|start| *start..start + 1));
            rest.start = sifted.done;
        }
        match &ahead.scanner {
            _ if rest.is_empty() => {}
            Some(scanner) => {
                found.extend(scanner.candidates(bytes, rest, end, self.longest, self.is_open));
            }
            None => found.push(rest),
        }
        found
    }
}

/// Parses an expression as [`Pattern::regex`] takes it.
pub(super) fn parse(expression: &str) -> Result<Hir> {
    let config = syntax::Config::new().unicode(false).utf8(false).multi_line(true);
    syntax::parse_with(expression, &config)
        .map_err(|error| invalid(format!("expected a regular expression: {error}")))
}

/// The longest match of an expression that is certain to be found, and whether there may be longer ones.
fn lengths(hir: &Hir) -> Result<(usize, bool)> {
    let properties = hir.properties();
    let most = |most: usize, found: usize| {
        let what = format!("expected matches of at most {most} bytes");
        Err(invalid(format!("{what}, found an expression whose matches have {found}")))
    };
    match (properties.minimum_len(), properties.maximum_len()) {
        (None, _) => Err(invalid(
            "expected an expression that something matches, found one that nothing does".into(),
        )),
        (Some(0), _) => Err(invalid(
            "expected an expression with something to find, found one that also matches nothing at all, at every place (instead of `x*` write `x+`)".into(),
        )),
        (_, Some(longest)) if longest > MATCH_BYTES_MAX => most(MATCH_BYTES_MAX, longest),
        (_, Some(longest)) => Ok((longest, false)),
        (Some(shortest), None) if shortest > OPEN_MATCH_BYTES => most(OPEN_MATCH_BYTES, shortest),
        (_, None) => Ok((OPEN_MATCH_BYTES, true)),
    }
}

fn invalid(what: String) -> StoreError {
    StoreError::Invalid(format!("search: {what}"))
}
