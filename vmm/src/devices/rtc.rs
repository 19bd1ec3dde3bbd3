//! The clock of a PC: an MC146818 at ports 0x70 and 0x71, with 128 bytes, the first of which hold
//! the time.
//!
//! The time is the host's, or the host's at a constant offset if the machine continues with a
//! snapshot's time. It cannot be set: the host's clock is right already, so what a guest writes to
//! the time registers is ignored. There are no alarms and no interrupt, and guests are told of
//! none.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use jiff::tz::Offset;
use serde::{Deserialize, Serialize};

use super::{Captured, Device};
use crate::error::{Result, VmmError};
use crate::state::{HexBytes, Saved, chunk};
use frazil_snapstore::StateChunk;

/// The port that selects a byte. Bit 7 is a PC's NMI switch.
pub const INDEX: u16 = 0x70;
/// The port to read or write the selected byte.
pub const DATA: u16 = 0x71;
/// The byte that holds the century, as given in the guest's ACPI tables.
pub const CENTURY: u8 = 0x32;
/// The name of its chunk.
pub const CHUNK: &str = "rtc";

const BYTES: usize = 128;
const SECONDS: u8 = 0;
const MINUTES: u8 = 2;
const HOURS: u8 = 4;
const WEEKDAY: u8 = 6;
const DAY: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const REGISTER_A: u8 = 10;
const REGISTER_B: u8 = 11;
const REGISTER_C: u8 = 12;
const REGISTER_D: u8 = 13;

/// Register A: set when the time is about to change.
const UPDATE_IN_PROGRESS: u8 = 0x80;
/// Register A: its other bits as on a PC, a 32,768 Hz time base and a periodic rate of 1,024 Hz.
const RATES: u8 = 0x26;
/// Register B: the time stands still; it is binary, not BCD; hours run to 24, not 12.
const SET: u8 = 0x80;
const BINARY: u8 = 4;
const HOURS_24: u8 = 2;
/// Register D: the battery is good.
const VALID: u8 = 0x80;
/// How long before the time changes [`UPDATE_IN_PROGRESS`] is set.
const NOTICE: Duration = Duration::from_micros(244);
/// Set in the hours register in the afternoon, on a 12-hour clock.
const AFTERNOON: u8 = 0x80;

/// Where the time comes from.
pub trait WallClock: Send + Sync + fmt::Debug {
    /// Returns the time since the beginning of 1970, UTC.
    fn since_epoch(&self) -> Duration;
}

/// The host's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostClock;

impl WallClock for HostClock {
    fn since_epoch(&self) -> Duration {
        // A host clock before 1970 was never set.
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
    }
}

/// What time it is for a guest that continues from a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeAfterResume {
    /// The host's time.
    Host,
    /// The snapshot's time, as if none had passed.
    Snapshot,
}

/// The clock.
#[derive(Debug)]
pub struct Rtc {
    clock: Box<dyn WallClock>,
    /// The guest's time relative to `clock`.
    offset: ClockOffset,
    index: u8,
    /// What was written, except to bytes that hold the time or the clock's status.
    bytes: [u8; BYTES],
}

/// The difference between two times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ClockOffset {
    Ahead(Duration),
    Behind(Duration),
}

impl ClockOffset {
    const NONE: Self = Self::Ahead(Duration::ZERO);

    /// The offset that leads from `clock` to `guest`.
    fn between(clock: Duration, guest: Duration) -> Self {
        match guest.checked_sub(clock) {
            Some(ahead) => Self::Ahead(ahead),
            None => Self::Behind(clock.saturating_sub(guest)),
        }
    }

    fn applied_to(self, clock: Duration) -> Duration {
        match self {
            Self::Ahead(by) => clock.saturating_add(by),
            Self::Behind(by) => clock.saturating_sub(by),
        }
    }
}

/// Returns true if `port` is one of the clock's two.
#[must_use]
pub fn owns(port: u16) -> bool {
    matches!(port, INDEX | DATA)
}

impl Rtc {
    /// Creates a clock with the time of `clock`, as after power-on.
    #[must_use]
    pub fn new(clock: Box<dyn WallClock>) -> Self {
        let mut bytes = [0; BYTES];
        (bytes[usize::from(REGISTER_A)], bytes[usize::from(REGISTER_B)]) = (RATES, HOURS_24);
        Self { clock, offset: ClockOffset::NONE, index: 0, bytes }
    }

    /// Creates a clock with the state `saved`.
    ///
    /// # Errors
    /// [`VmmError::State`] if `saved` makes no sense.
    pub fn restore(
        clock: Box<dyn WallClock>,
        saved: &SavedRtc,
        time: TimeAfterResume,
    ) -> Result<Self> {
        let mut restored = Self::new(clock);
        restored.put_back(saved, time)?;
        Ok(restored)
    }

    /// Gives the clock the state `saved`.
    ///
    /// # Errors
    /// As [`Self::restore`]; the clock is then unchanged.
    pub fn put_back(&mut self, saved: &SavedRtc, time: TimeAfterResume) -> Result<()> {
        let bytes = saved.check()?;
        let SavedRtc { unix_seconds, nanoseconds, index, bytes: _ } = saved;
        self.offset = match time {
            TimeAfterResume::Host => ClockOffset::NONE,
            TimeAfterResume::Snapshot => ClockOffset::between(
                self.clock.since_epoch(),
                Duration::new(*unix_seconds, *nanoseconds),
            ),
        };
        (self.index, self.bytes) = (index & 0x7f, bytes);
        Ok(())
    }

    /// Returns the guest's time since the beginning of 1970, UTC.
    #[must_use]
    pub fn since_epoch(&self) -> Duration {
        self.offset.applied_to(self.clock.since_epoch())
    }

    /// Handles a write of one byte.
    pub fn write(&mut self, port: u16, value: u8) {
        if port == INDEX {
            self.index = value & 0x7f;
            return;
        }
        match self.index {
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | REGISTER_C | REGISTER_D | CENTURY => {}
            REGISTER_A => self.bytes[usize::from(REGISTER_A)] = value & !UPDATE_IN_PROGRESS,
            index => self.bytes[usize::from(index)] = value,
        }
    }

    /// Handles a read of one byte.
    #[must_use]
    pub fn read(&self, port: u16) -> u8 {
        // The index cannot be read back.
        if port == INDEX {
            return 0xff;
        }
        let now = self.since_epoch();
        let as_written = self.bytes[usize::from(self.index)];
        match self.index {
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | CENTURY => self.time(now),
            REGISTER_A => {
                let soon = now.subsec_nanos() >= 1_000_000_000 - NOTICE.subsec_nanos();
                let stands = self.register_b() & SET != 0;
                as_written | if soon && !stands { UPDATE_IN_PROGRESS } else { 0 }
            }
            // There are no interrupts.
            REGISTER_C => 0,
            REGISTER_D => VALID,
            _ => as_written,
        }
    }

    fn register_b(&self) -> u8 {
        self.bytes[usize::from(REGISTER_B)]
    }

    /// Returns the time register that the index selects, as of `now`.
    fn time(&self, now: Duration) -> u8 {
        let encode = |value: i16| {
            let value = value as u8;
            if self.register_b() & BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
        };
        let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        // If the host's clock is off by thousands of years, any time will do.
        let time = Offset::UTC.to_datetime(Timestamp::from_second(seconds).unwrap_or_default());
        match self.index {
            SECONDS => encode(time.second().into()),
            MINUTES => encode(time.minute().into()),
            HOURS if self.register_b() & HOURS_24 != 0 => encode(time.hour().into()),
            HOURS => {
                let afternoon = if time.hour() >= 12 { AFTERNOON } else { 0 };
                let hour = (i16::from(time.hour()) + 11) % 12 + 1;
                encode(hour) | afternoon
            }
            // Sunday is day 1.
            WEEKDAY => encode(time.weekday().to_sunday_one_offset().into()),
            DAY => encode(time.day().into()),
            MONTH => encode(time.month().into()),
            YEAR => encode(time.year() % 100),
            _ => encode(time.year() / 100),
        }
    }
}

impl Device for Rtc {
    type State = SavedRtc;

    fn state(&self) -> SavedRtc {
        let mut saved = SavedRtc {
            unix_seconds: 0,
            nanoseconds: 0,
            index: 0,
            bytes: HexBytes(self.bytes.to_vec()),
        };
        self.capture(&mut saved);
        saved
    }

    fn capture(&self, into: &mut SavedRtc) {
        let now = self.since_epoch();
        let SavedRtc { unix_seconds, nanoseconds, index, bytes } = into;
        *unix_seconds = now.as_secs();
        *nanoseconds = now.subsec_nanos();
        *index = self.index;
        bytes.0.copy_from_slice(&self.bytes);
    }
}

/// The state of the clock, and the guest's time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedRtc {
    /// The guest's time, in seconds since the beginning of 1970, UTC.
    pub unix_seconds: u64,
    /// The nanoseconds of that time, less than a second.
    pub nanoseconds: u32,
    /// The number of the selected byte.
    pub index: u8,
    /// All 128 bytes; those that hold the time are zero.
    pub bytes: HexBytes,
}

impl SavedRtc {
    /// Checks the state and returns its bytes.
    ///
    /// # Errors
    /// [`VmmError::State`] if it makes no sense.
    pub(crate) fn check(&self) -> Result<[u8; BYTES]> {
        let wrong = |expected: String, found: String| VmmError::State {
            chunk: CHUNK.into(),
            expected,
            found,
        };
        let Self { unix_seconds: _, nanoseconds, index: _, bytes: HexBytes(bytes) } = self;
        if *nanoseconds >= 1_000_000_000 {
            return Err(wrong("less than a second".into(), format!("{nanoseconds} ns")));
        }
        let found = || format!("{} bytes", bytes.len());
        bytes.as_slice().try_into().map_err(|_| wrong(format!("{BYTES} bytes"), found()))
    }
}

impl Saved for SavedRtc {
    const KIND: &'static str = "mc146818";
    const VERSION: u32 = 1;
}

impl Captured for SavedRtc {
    fn chunk(&self) -> Result<Option<StateChunk>> {
        chunk(CHUNK, self).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::state::ChunkSet;

    /// A clock set by hand, in nanoseconds.
    #[derive(Clone, Debug)]
    struct Manual(Arc<AtomicU64>);

    impl Manual {
        fn at(seconds: u64) -> Self {
            Self(Arc::new(AtomicU64::new(seconds * 1_000_000_000)))
        }

        fn advance(&self, by: Duration) {
            self.0.fetch_add(by.as_nanos() as u64, Ordering::SeqCst);
        }
    }

    impl WallClock for Manual {
        fn since_epoch(&self) -> Duration {
            Duration::from_nanos(self.0.load(Ordering::SeqCst))
        }
    }

    /// Friday, 2024-03-01, 23:59:58 UTC, the day after a leap day.
    const FRIDAY: u64 = 1_709_337_598;

    fn rtc(clock: &Manual) -> Rtc {
        Rtc::new(Box::new(clock.clone()))
    }

    fn get(rtc: &mut Rtc, index: u8) -> u8 {
        rtc.write(INDEX, index);
        rtc.read(DATA)
    }

    fn set(rtc: &mut Rtc, index: u8, value: u8) {
        rtc.write(INDEX, index);
        rtc.write(DATA, value);
    }

    /// Century, year, month, day, weekday, hours, minutes, seconds.
    fn time(rtc: &mut Rtc) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|index| get(rtc, index))
    }

    #[test]
    fn the_time_is_the_hosts_in_decimal_or_binary() {
        let clock = Manual::at(FRIDAY);
        let mut rtc = rtc(&clock);
        assert_eq!(get(&mut rtc, REGISTER_B), HOURS_24, "as firmware leaves it");
        assert_eq!(time(&mut rtc), [0x20, 0x24, 0x03, 0x01, 0x06, 0x23, 0x59, 0x58]);
        set(&mut rtc, REGISTER_B, HOURS_24 | BINARY);
        assert_eq!(time(&mut rtc), [20, 24, 3, 1, 6, 23, 59, 58]);
        clock.advance(Duration::from_secs(2));
        assert_eq!(time(&mut rtc), [20, 24, 3, 2, 7, 0, 0, 0]);
        clock.advance(Duration::from_hours(24));
        assert_eq!(get(&mut rtc, WEEKDAY), 1, "Sunday");
    }

    #[test]
    fn hours_may_go_to_twelve() {
        let midnight = FRIDAY / 86_400 * 86_400;
        for (hour, expected) in
            [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)]
        {
            let mut rtc = rtc(&Manual::at(midnight + hour * 3600));
            set(&mut rtc, REGISTER_B, 0);
            assert_eq!(get(&mut rtc, HOURS), expected, "{hour} in decimal");
            set(&mut rtc, REGISTER_B, BINARY);
            let digits = (expected & 0x7f) / 16 * 10 + expected % 16;
            let binary = digits | (expected & AFTERNOON);
            assert_eq!(get(&mut rtc, HOURS), binary, "{hour} in binary");
        }
    }

    #[test]
    fn a_change_is_told_before_it_comes() {
        let clock = Manual::at(FRIDAY);
        let mut rtc = rtc(&clock);
        assert_eq!(get(&mut rtc, REGISTER_A), RATES);
        clock.advance(Duration::from_micros(1_000_000 - 245));
        assert_eq!(get(&mut rtc, REGISTER_A), RATES);
        clock.advance(Duration::from_micros(1));
        assert_eq!(get(&mut rtc, REGISTER_A), RATES | UPDATE_IN_PROGRESS);
        set(&mut rtc, REGISTER_B, HOURS_24 | SET);
        assert_eq!(get(&mut rtc, REGISTER_A), RATES, "none comes while it is being set");
        set(&mut rtc, REGISTER_B, HOURS_24);
        assert_eq!(get(&mut rtc, SECONDS), 0x58);
        clock.advance(Duration::from_micros(244));
        assert_eq!((get(&mut rtc, REGISTER_A), get(&mut rtc, SECONDS)), (RATES, 0x59));
    }

    #[test]
    fn it_is_not_set_but_keeps_what_else_is_written() {
        let mut rtc = rtc(&Manual::at(FRIDAY));
        let before = time(&mut rtc);
        for index in 0..=0xff {
            set(&mut rtc, index, 0x55);
        }
        // Register B now asks for binary and hours up to 12.
        assert_eq!(get(&mut rtc, REGISTER_B), 0x55);
        set(&mut rtc, REGISTER_B, HOURS_24);
        assert_eq!(time(&mut rtc), before);
        assert_eq!([1, 3, 5, 14, 0x31, 0x33, 0x7f].map(|index| get(&mut rtc, index)), [0x55; 7]);
        assert_eq!(get(&mut rtc, REGISTER_A), 0x55);
        assert_eq!((get(&mut rtc, REGISTER_C), get(&mut rtc, REGISTER_D)), (0, VALID));
        rtc.write(INDEX, 0x80 | SECONDS);
        assert_eq!((rtc.read(DATA), rtc.read(INDEX)), (0x58, 0xff), "bit 7 is not the index's");
        assert!(owns(0x70) && owns(0x71) && !owns(0x6f) && !owns(0x72));
    }

    #[test]
    fn it_goes_on_with_the_hosts_time_or_the_snapshots() {
        let clock = Manual::at(FRIDAY);
        let mut old = rtc(&clock);
        set(&mut old, 0x40, 7);
        clock.advance(Duration::from_millis(300));
        let state = old.state().chunk().unwrap().expect("it has state");
        let mut chunks = ChunkSet::new(vec![state]).unwrap();
        let saved: SavedRtc = chunks.take(CHUNK).unwrap();
        // A host whose clock is later, or earlier.
        for elsewhere in [Manual::at(FRIDAY + 1_000_000), Manual::at(5)] {
            let restore = |time| Rtc::restore(Box::new(elsewhere.clone()), &saved, time).unwrap();
            let host = restore(TimeAfterResume::Host);
            assert_eq!(host.since_epoch(), elsewhere.since_epoch());
            let mut then = restore(TimeAfterResume::Snapshot);
            assert_eq!(then.state(), saved);
            elsewhere.advance(Duration::from_secs(1));
            assert_eq!(then.since_epoch(), clock.since_epoch() + Duration::from_secs(1));
            assert_eq!((then.read(DATA), get(&mut then, SECONDS)), (7, 0x59));
            // A snapshot of the restored clock, restored in turn with the host's time.
            let again = Rtc::restore(Box::new(clock.clone()), &then.state(), TimeAfterResume::Host);
            assert_eq!(again.unwrap().since_epoch(), clock.since_epoch());
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_and_changes_nothing() {
        let mut rtc = rtc(&Manual::at(FRIDAY));
        let good = rtc.state();
        for bad in [
            SavedRtc { bytes: HexBytes(vec![0; 127]), ..good.clone() },
            SavedRtc { nanoseconds: 1_000_000_000, ..good.clone() },
        ] {
            assert!(rtc.put_back(&bad, TimeAfterResume::Snapshot).is_err());
            assert_eq!(rtc.state(), good);
        }
        // The latest possible time must not fail.
        let last = SavedRtc { unix_seconds: u64::MAX, ..good };
        rtc.put_back(&last, TimeAfterResume::Snapshot).unwrap();
        let _any = time(&mut rtc);
    }
}
