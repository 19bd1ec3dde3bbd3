//! What a guest has for its own: its clocks, and what tells it from its clones.

use super::{Outcome, value};

/// A guest, as it saw itself when it was asked (`whoami` in `outer.sh`).
#[derive(Clone, Debug, PartialEq)]
pub struct Who {
    /// The date of the machine around it before it was asked and after it had answered, in seconds since
    /// 1970, as all dates here.
    pub between: [i64; 2],
    /// Its date.
    pub date: i64,
    /// The date that its CMOS clock has.
    pub rtc: i64,
    /// Seconds since it was booted, on its monotonic clock.
    pub uptime: f64,
    /// The generation id that it finds in its memory, in hexadecimal.
    pub generation: String,
    /// Lines of its ACPI tables that tell of that.
    pub tables: u64,
    /// Events of ACPI devices that its kernel was told of.
    pub events: u64,
    /// The context id that its driver of sockets has.
    pub cid: u32,
    /// The first word of its disk.
    pub disk: String,
    /// The address of its network card, as the driver knows it.
    pub mac: String,
}

impl Outcome {
    /// What a guest answered each time that it was asked.
    ///
    /// # Panics
    /// If an answer lacks something.
    #[track_caller]
    #[must_use]
    pub fn who(&self, vm: &str) -> Vec<Who> {
        let told = self.told("who");
        told.iter().filter(|words| words[0] == vm).map(|words| Who::parse(words)).collect()
    }
}

impl Who {
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
