//! The workload's specification: one comma-separated token such as
//! `touch=512MiB,rate=10000,pattern=uniform`, parsed strictly by the guest and by the host alike.

use core::fmt;

use super::control::{DATA_GPA_MIN, PAGE_BYTES, VCPUS_MAX};

/// What introduces the specification on the kernel command line.
pub const CMDLINE_KEY: &str = "frazil.workload=";

/// Parts per million: how shares such as `hot_share=0.1` are kept, so that no code needs floating point.
pub const PPM: u64 = 1_000_000;

/// Which page a vCPU writes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Page after page, over and over.
    Seq,
    /// Uniformly random, with replacement.
    Uniform,
    /// All pages in a random order, then all in another: none twice before each was written once.
    Shuffle,
    /// Random, with most writes going to a scattered set of hot pages.
    Hot,
}

/// What is written to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeros: the page is dirtied and stays as it was.
    Zero,
    /// Something like prose and logs, which compresses about three to one.
    Text,
    /// Incompressible.
    Random,
    /// Text at first; every later write changes one word of it in place.
    Edit,
}

/// A workload, complete with defaults. [`WorkloadSpec::parse`] reads it and `Display` writes it in full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkloadSpec {
    /// Memory to touch, bytes; `None` is all the data memory there is.
    pub touch_bytes: Option<u64>,
    /// Pages written per second by all vCPUs together; 0 is as fast as possible.
    pub rate_pages_per_s: u64,
    /// Which page comes next.
    pub pattern: Pattern,
    /// Share of the pages that are hot, parts per million (`pattern=hot`).
    pub hot_share_ppm: u64,
    /// Share of the writes that go to hot pages, parts per million (`pattern=hot`).
    pub hot_writes_ppm: u64,
    /// What is written.
    pub content: Content,
    /// Seed of all choices and contents.
    pub seed: u64,
    /// Whether every page is written once, in order and at full speed, before the steady state.
    pub populate: bool,
    /// Seconds between self checks of all memory; 0 is only on command.
    pub check_s: u64,
    /// Seconds between report lines of each vCPU; 0 is none.
    pub report_s: u64,
    /// Writes after which each vCPU stops writing and only spins.
    pub stop_after_turns: Option<u64>,
    /// Gaps longer than this are recorded, microseconds.
    pub gap_us: u64,
    /// vCPUs that take part.
    pub cpus: u64,
    /// Frequency of the time stamp counter, kHz; 0 is unknown, with which the guest does not start.
    pub tsc_khz: u64,
}

impl Default for WorkloadSpec {
    fn default() -> Self {
        Self {
            touch_bytes: None,
            rate_pages_per_s: 1000,
            pattern: Pattern::Uniform,
            hot_share_ppm: PPM / 10,
            hot_writes_ppm: PPM / 10 * 9,
            content: Content::Text,
            seed: 1,
            populate: true,
            check_s: 0,
            report_s: 1,
            stop_after_turns: None,
            gap_us: 50,
            cpus: 1,
            tsc_khz: 0,
        }
    }
}

/// Why a specification was refused; it borrows from the text that was parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecError<'a> {
    /// No such key.
    UnknownKey {
        /// What stood before the `=`.
        key: &'a str,
    },
    /// The same key twice.
    Duplicate {
        /// The key.
        key: &'a str,
    },
    /// The value of a key is not what it has to be.
    BadValue {
        /// The key.
        key: &'a str,
        /// What the key takes.
        expected: &'static str,
        /// What stood after the `=`.
        found: &'a str,
    },
}

impl fmt::Display for SpecError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownKey { key } => {
                write!(f, "workload: unknown key `{key}`; known are {KEYS}")
            }
            Self::Duplicate { key } => write!(f, "workload: `{key}` is given twice; give it once"),
            Self::BadValue { key, expected, found } => {
                write!(f, "workload: `{key}` expected {expected}, found `{found}`")
            }
        }
    }
}

const KEYS: &str = "touch, rate, pattern, hot_share, hot_writes, content, seed, populate, check, report, \
     stop_after, gap_us, cpus, tsc_khz";

impl WorkloadSpec {
    /// Parses `text`; an empty text is the default workload.
    ///
    /// # Errors
    /// The first key that is unknown, repeated, or has a value that does not fit.
    pub fn parse(text: &str) -> Result<Self, SpecError<'_>> {
        let mut spec = Self::default();
        for (index, item) in items(text).enumerate() {
            let (key, value) = item.split_once('=').unwrap_or((item, ""));
            if items(text).take(index).any(|other| other.split('=').next() == Some(key)) {
                return Err(SpecError::Duplicate { key });
            }
            spec.set(key, value)?;
        }
        Ok(spec)
    }

    /// The specification on a kernel command line, if there is one.
    ///
    /// # Errors
    /// As [`WorkloadSpec::parse`].
    #[allow(dead_code)] // only the guest reads command lines
    pub fn from_cmdline(cmdline: &str) -> Result<Option<Self>, SpecError<'_>> {
        let mut words = cmdline.split_ascii_whitespace();
        words.find_map(|word| word.strip_prefix(CMDLINE_KEY)).map(Self::parse).transpose()
    }

    /// Pages of data memory to use out of `available`, or `None` when `touch` asks for more.
    #[must_use]
    pub fn data_pages(&self, available: u64) -> Option<u64> {
        let wanted = self.touch_bytes.map_or(available, |bytes| bytes / PAGE_BYTES);
        (wanted <= available).then_some(wanted)
    }

    fn set<'a>(&mut self, key: &'a str, value: &'a str) -> Result<(), SpecError<'a>> {
        let bad = |expected| SpecError::BadValue { key, expected, found: value };
        let number = |min, max, expected| parse_number(value, min, max).ok_or(bad(expected));
        let ppm = || parse_share_ppm(value).ok_or(bad("a share from 0 to 1 such as 0.1"));
        match key {
            "touch" => {
                let touch_bytes = parse_size_bytes(value).filter(|bytes| {
                    *bytes >= PAGE_BYTES * VCPUS_MAX && bytes.is_multiple_of(PAGE_BYTES)
                });
                self.touch_bytes =
                    Some(touch_bytes.ok_or(bad(
                        "a size of 256KiB or more, in whole 4KiB pages, such as 512MiB",
                    ))?);
            }
            "rate" if value == "max" => self.rate_pages_per_s = 0,
            "rate" => {
                self.rate_pages_per_s =
                    number(0, 1_000_000_000, "pages per second, up to 1000000000, or max")?;
            }
            "pattern" => {
                self.pattern =
                    named(value, &PATTERNS).ok_or(bad("seq, uniform, shuffle or hot"))?;
            }
            "hot_share" => self.hot_share_ppm = ppm()?,
            "hot_writes" => self.hot_writes_ppm = ppm()?,
            "content" => {
                self.content = named(value, &CONTENTS).ok_or(bad("zero, text, random or edit"))?;
            }
            "seed" => self.seed = number(0, u64::MAX, "a number below 2^64")?,
            "populate" => {
                self.populate =
                    named(value, &[("yes", true), ("no", false)]).ok_or(bad("yes or no"))?;
            }
            "check" => self.check_s = number(0, 1_000_000, "seconds between checks, 0 for none")?,
            "report" => {
                self.report_s = number(0, 1_000_000, "seconds between reports, 0 for none")?;
            }
            "stop_after" => self.stop_after_turns = Some(number(0, u64::MAX, "a number of turns")?),
            "gap_us" => self.gap_us = number(1, 1_000_000_000, "microseconds, 1 or more")?,
            "cpus" => self.cpus = number(1, VCPUS_MAX, "a number of vCPUs from 1 to 64")?,
            "tsc_khz" => {
                self.tsc_khz =
                    number(1000, 1_000_000_000, "the TSC frequency in kHz, such as 2445000")?;
            }
            _ => return Err(SpecError::UnknownKey { key }),
        }
        Ok(())
    }
}

/// Bytes of data memory in a machine with `memory_bytes` of RAM: what lies above the guest's own part.
#[must_use]
#[allow(dead_code)] // the guest goes by the E820 table instead
pub fn data_bytes_available(memory_bytes: u64) -> u64 {
    memory_bytes.saturating_sub(DATA_GPA_MIN)
}

const PATTERNS: [(&str, Pattern); 4] = [
    ("seq", Pattern::Seq),
    ("uniform", Pattern::Uniform),
    ("shuffle", Pattern::Shuffle),
    ("hot", Pattern::Hot),
];
const CONTENTS: [(&str, Content); 4] = [
    ("zero", Content::Zero),
    ("text", Content::Text),
    ("random", Content::Random),
    ("edit", Content::Edit),
];

fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').filter(|_| !text.is_empty())
}

fn named<T: Copy>(value: &str, names: &[(&str, T)]) -> Option<T> {
    names.iter().find(|(name, _)| *name == value).map(|(_, named)| *named)
}

fn name_of<T: Copy + PartialEq>(value: T, names: &[(&'static str, T)]) -> &'static str {
    names.iter().find(|(_, named)| *named == value).map_or("?", |(name, _)| name)
}

/// Digits only: `parse` alone would also take a sign.
fn parse_number(value: &str, min: u64, max: u64) -> Option<u64> {
    let digits = value.bytes().all(|byte| byte.is_ascii_digit());
    let number = value.parse().ok()?;
    (digits && min <= number && number <= max).then_some(number)
}

fn parse_size_bytes(value: &str) -> Option<u64> {
    let (digits, shift) = [("KiB", 10), ("MiB", 20), ("GiB", 30)]
        .iter()
        .find_map(|(unit, shift)| Some((value.strip_suffix(unit)?, *shift)))
        .unwrap_or((value, 0));
    parse_number(digits, 0, u64::MAX >> shift).map(|number| number << shift)
}

/// `0`, `1`, or a fraction with up to six digits.
fn parse_share_ppm(value: &str) -> Option<u64> {
    let (whole, fraction) = value.split_once('.').unwrap_or((value, "0"));
    let mut ppm = parse_number(whole, 0, 1)? * PPM;
    let mut unit_ppm = PPM;
    for digit in fraction.bytes() {
        unit_ppm /= 10;
        let digit = digit.is_ascii_digit().then(|| u64::from(digit - b'0'))?;
        ppm += digit * unit_ppm;
    }
    (!fraction.is_empty() && fraction.len() <= 6 && ppm <= PPM).then_some(ppm)
}

struct Share(u64);

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:06}", self.0 / PPM, self.0 % PPM)
    }
}

/// The whole specification, in the form that [`WorkloadSpec::parse`] reads.
impl fmt::Display for WorkloadSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(touch_bytes) = self.touch_bytes {
            write!(f, "touch={touch_bytes},")?;
        }
        match self.rate_pages_per_s {
            0 => f.write_str("rate=max")?,
            rate => write!(f, "rate={rate}")?,
        }
        write!(f, ",pattern={}", name_of(self.pattern, &PATTERNS))?;
        if self.pattern == Pattern::Hot {
            let (share, writes) = (Share(self.hot_share_ppm), Share(self.hot_writes_ppm));
            write!(f, ",hot_share={share},hot_writes={writes}")?;
        }
        write!(f, ",content={},seed={}", name_of(self.content, &CONTENTS), self.seed)?;
        write!(f, ",populate={}", if self.populate { "yes" } else { "no" })?;
        write!(f, ",check={},report={},gap_us={}", self.check_s, self.report_s, self.gap_us)?;
        if let Some(turns) = self.stop_after_turns {
            write!(f, ",stop_after={turns}")?;
        }
        write!(f, ",cpus={}", self.cpus)?;
        match self.tsc_khz {
            0 => Ok(()),
            tsc_khz => write!(f, ",tsc_khz={tsc_khz}"),
        }
    }
}
