//! What is searched for.

use std::ops::Range;

use memchr::memmem::Finder;
use regex_automata::Input;
use regex_automata::meta::{self, Regex};
use regex_automata::util::syntax;
use regex_syntax::hir::{Hir, Look};

use super::scan::Scanner;
use crate::error::{Result, StoreError};
use crate::page::PAGE_SIZE;

/// Of an expression without a longest match, so many bytes of a match are found for certain; longer ones may
/// be found, whole or in pieces.
pub const OPEN_MATCH_BYTES: usize = PAGE_SIZE;
/// The longest match that can be searched for.
pub const MATCH_BYTES_MAX: usize = 64 << 10;
/// As much as anything looks at before a match or behind it: `\b` of Unicode, which decodes a character.
const LOOK_BYTES: usize = 4;

/// What is searched for.
#[derive(Debug)]
pub struct Pattern {
    engine: Engine,
    /// The longest match that is found for certain, in bytes.
    longest: usize,
    /// There may be longer ones.
    is_open: bool,
    /// Bytes that it looks at before a match, and behind it.
    looks: usize,
}

#[derive(Debug)]
enum Engine {
    Bytes(Box<Finder<'static>>),
    Regex {
        regex: Box<Regex>,
        /// If there is nothing better to look for first.
        scanner: Option<Box<Scanner>>,
    },
}

/// Matches, and whether there may be more of them behind the last.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub matches: Vec<Range<usize>>,
    pub is_all: bool,
}

impl Pattern {
    /// These bytes.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if there are none, too many, or only zeros: pages that are zero are not
    /// looked at.
    pub fn bytes(bytes: &[u8]) -> Result<Self> {
        if bytes.is_empty() || bytes.len() > MATCH_BYTES_MAX {
            let found = bytes.len();
            return Err(invalid(format!("expected 1 to {MATCH_BYTES_MAX} bytes, found {found}")));
        }
        let engine = Engine::Bytes(Box::new(Finder::new(bytes).into_owned()));
        Self { engine, longest: bytes.len(), is_open: false, looks: 0 }.checked()
    }

    /// A regular expression of crate `regex`'s syntax, on bytes: `.` is any of them but a line feed,
    /// classes such as `\w` are ASCII, `^` and `$` are at the ends of lines. `(?s)`, `(?i)` and so on
    /// change that.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if it is none, matches nothing at all, zeros alone, or the beginning or
    /// end of all memory, or what it matches is too long.
    pub fn regex(expression: &str) -> Result<Self> {
        let config = syntax::Config::new().unicode(false).utf8(false).multi_line(true);
        let hir = syntax::parse_with(expression, &config)
            .map_err(|error| invalid(format!("expected a regular expression: {error}")))?;
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
        let scanner = if regex.is_accelerated() { None } else { Scanner::new(&hir) };
        let engine = Engine::Regex { regex: Box::new(regex), scanner: scanner.map(Box::new) };
        let looks = if looks.is_empty() { 0 } else { LOOK_BYTES };
        Self { engine, longest, is_open, looks }.checked()
    }

    /// Refuses what would be found nearly everywhere, and not where it is looked for.
    fn checked(self) -> Result<Self> {
        let zeros = vec![0; LOOK_BYTES + self.longest + LOOK_BYTES];
        match self.find(&zeros, LOOK_BYTES..LOOK_BYTES + self.longest) {
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

    /// Bytes that it looks at before a match, and behind it.
    pub(super) fn looks(&self) -> usize {
        self.looks
    }

    /// It is looked ahead for where matches may be.
    #[cfg(test)]
    pub(super) fn looks_ahead(&self) -> bool {
        matches!(&self.engine, Engine::Regex { scanner: Some(_), .. })
    }

    /// The first match in `bytes[span]`; what is around that is looked at.
    fn find(&self, bytes: &[u8], span: Range<usize>) -> Option<Range<usize>> {
        match &self.engine {
            Engine::Bytes(finder) => {
                let at = span.start + finder.find(&bytes[span])?;
                Some(at..at + finder.needle().len())
            }
            Engine::Regex { regex, .. } => {
                let found = regex.find(Input::new(bytes).span(span))?;
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
        // Or nothing would keep it from going through all that is behind `starts`.
        let near = (starts.end.saturating_add(self.longest) - 1).min(end);
        let found = self.find(bytes, starts.start..near)?;
        if found.start >= starts.end {
            return None;
        }
        if self.is_open && found.end == near && near < end {
            // It may go on.
            return self.find(bytes, found.start..end);
        }
        Some(found)
    }

    /// Adds to `found` the matches that begin in `starts` and end by `end`, each behind the one before, until
    /// there are `most`.
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

    /// Where in `starts` matches may begin.
    fn candidates(&self, bytes: &[u8], starts: Range<usize>, end: usize) -> Vec<Range<usize>> {
        match &self.engine {
            Engine::Regex { scanner: Some(scanner), .. } => {
                scanner.candidates(bytes, starts, end, self.longest, self.is_open)
            }
            _ => vec![starts],
        }
    }
}

/// The longest match of an expression that is found for certain, and whether there may be longer ones.
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
