//! What each guest has for itself: its clocks, and what distinguishes it from its clones.

use super::{Outcome, value};

/// A guest's answer to `whoami` of `outer.sh`.
#[derive(Clone, Debug, PartialEq)]
pub struct GuestIdentity {
    /// The dates of the outer machine before the question and after the answer. All dates are in
    /// seconds since 1970.
    pub between: [i64; 2],
    /// The guest's date.
    pub date: i64,
    /// The date of the guest's CMOS clock.
    pub rtc: i64,
    /// Seconds since the guest was booted, by its monotonic clock.
    pub uptime: f64,
    /// The generation id in the guest's memory, in hexadecimal.
    pub generation: String,
    /// How many lines of the guest's ACPI tables mention the generation id's device.
    pub tables: u64,
    /// How many events of ACPI devices the guest's kernel has been notified of.
    pub events: u64,
    /// The context id that the guest's vsock driver has.
    pub cid: u32,
    /// The first word of the guest's disk.
    pub disk: String,
    /// The MAC address of the guest's network card, as its driver knows it.
    pub mac: String,
}

impl Outcome {
    /// Returns the guest's answers, in order.
    ///
    /// # Panics
    /// If an answer lacks a field.
    #[track_caller]
    #[must_use]
    pub fn identities(&self, vm: &str) -> Vec<GuestIdentity> {
        let lines = self.test_lines("who");
        lines
            .iter()
            .filter(|words| words[0] == vm)
            .map(|words| GuestIdentity::parse(words))
            .collect()
    }
}

impl GuestIdentity {
    #[track_caller]
    fn parse(words: &[&str]) -> Self {
        let word = |name: &str, offset: usize| {
            let place = words.iter().position(|word| *word == name);
            let found = place.and_then(|place| words.get(place + offset)).copied();
            found.unwrap_or_else(|| panic!("expected `{name}`, found {words:?}"))
        };
        Self {
            between: [1, 2].map(|offset| value(word("between", offset))),
            date: value(word("date", 1)),
            rtc: value(word("rtc", 1)),
            uptime: value(word("uptime", 1)),
            generation: word("generation", 1).to_owned(),
            tables: value(word("tables", 1)),
            events: value(word("events", 1)),
            cid: value(word("cid", 1)),
            disk: word("disk", 1).to_owned(),
            mac: word("mac", 1).to_owned(),
        }
    }
}
