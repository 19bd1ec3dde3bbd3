//! Printing for people.

use std::borrow::Cow;
use std::fmt::{Arguments, Write as _};
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};
use indicatif::{BinaryBytes, ProgressBar, ProgressStyle};
use jiff::{Timestamp, tz::TimeZone};

use crate::cli::ColorArg;

/// Like `println!`, but does not panic when the reader goes away (`frazil log | head`), least of
/// all in a process that runs a VM.
macro_rules! outln {
    ($($arg:tt)*) => {
        $crate::output::line(format_args!($($arg)*))
    };
}

/// Like `eprintln!`, but does not panic when standard error cannot be written.
macro_rules! errln {
    ($($arg:tt)*) => {
        $crate::output::error_line(format_args!($($arg)*))
    };
}

/// Prints a line on standard error, ignoring errors.
pub(crate) fn error_line(text: Arguments<'_>) {
    let _nobody_listens = writeln!(std::io::stderr(), "{text}");
}

/// Prints a line on standard output; a failure other than a reader that went away is kept for
/// `not_printed`.
pub(crate) fn line(text: Arguments<'_>) {
    let _nobody_listens = try_line(text);
}

/// Like [`line()`], for callers that stop when nobody reads any more.
pub(crate) fn try_line(text: Arguments<'_>) -> std::io::Result<()> {
    remember_failure(writeln!(std::io::stdout(), "{}", plain(&text.to_string())))
}

/// The first error that kept output from being printed.
static NOT_PRINTED: Mutex<Option<std::io::Error>> = Mutex::new(None);

/// Remembers why output could not be printed, unless a reader or a terminal went away: the command
/// goes on, but must not end as if all had been well.
fn remember_failure(printed: std::io::Result<()>) -> std::io::Result<()> {
    let Err(error) = printed else { return Ok(()) };
    let kind = error.kind();
    if kind != std::io::ErrorKind::BrokenPipe && !std::io::stdout().is_terminal() {
        NOT_PRINTED.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }
    Err(kind.into())
}

/// Why some output did not reach its destination, such as a full disk.
pub(crate) fn not_printed() -> Option<std::io::Error> {
    NOT_PRINTED.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Returns `text` with everything that a terminal would obey rather than show replaced by JSON
/// escapes: names and messages may come from elsewhere. JSON stays valid JSON.
pub(crate) fn plain(text: &str) -> Cow<'_, str> {
    let obeyed = |c: char| {
        (c.is_control() && c != '\n')
            // Characters that change the direction of text.
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(obeyed) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if obeyed(c) {
            let _to_memory = write!(out, "\\u{:04x}", u32::from(c));
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

/// When to print colours: the current [`ColorArg`].
static COLOR: AtomicU8 = AtomicU8::new(AUTO);
const AUTO: u8 = 0;
const ALWAYS: u8 = 1;
const NEVER: u8 = 2;

/// Sets when to print colours from here on.
pub(crate) fn set_color(color: ColorArg) {
    let color = match color {
        ColorArg::Auto => AUTO,
        ColorArg::Always => ALWAYS,
        ColorArg::Never => NEVER,
    };
    COLOR.store(color, Ordering::Relaxed);
}

/// True if colours are wanted, given whether the output is a terminal.
pub(crate) fn color_on(is_terminal: bool) -> bool {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let dumb = || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    match COLOR.load(Ordering::Relaxed) {
        ALWAYS => true,
        NEVER => false,
        // https://no-color.org
        _ => is_terminal && !set("NO_COLOR") && !dumb(),
    }
}

/// The styles of the parts of a line. Old and new values are yellow and cyan: red and green look
/// alike to one man in twelve.
pub(crate) mod style {
    use anstyle::{AnsiColor, Style};

    pub(crate) const HEADING: Style = Style::new().bold();
    pub(crate) const FAINT: Style = Style::new().dimmed();
    pub(crate) const ID: Style = AnsiColor::Yellow.on_default();
    pub(crate) const NAME: Style = AnsiColor::Blue.on_default().bold();
    pub(crate) const OLD: Style = AnsiColor::Yellow.on_default();
    pub(crate) const NEW: Style = AnsiColor::Cyan.on_default();
    pub(crate) const CHANGED: Style = AnsiColor::Magenta.on_default().bold();
}

/// A line with coloured parts, where colours are wanted. What a terminal would obey is escaped, as
/// by [`plain()`]: the only escape codes printed are the colours.
#[derive(Clone, Debug, Default)]
pub(crate) struct Line {
    plain: String,
    painted: String,
}

impl Line {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn text(mut self, text: impl AsRef<str>) -> Self {
        let text = plain(text.as_ref());
        self.plain.push_str(&text);
        self.painted.push_str(&text);
        self
    }

    pub(crate) fn paint(mut self, style: anstyle::Style, text: impl AsRef<str>) -> Self {
        let text = plain(text.as_ref());
        self.plain.push_str(&text);
        let _to_memory = write!(self.painted, "{style}{text}{style:#}");
        self
    }

    /// Pads with blanks up to column `columns`; adds at least one.
    pub(crate) fn pad(self, columns: usize) -> Self {
        let blanks = columns.saturating_sub(self.plain.chars().count()).max(1);
        self.text(" ".repeat(blanks))
    }

    pub(crate) fn print(&self) {
        let mut out = std::io::stdout();
        let line = if color_on(out.is_terminal()) { &self.painted } else { &self.plain };
        let _nobody_listens = remember_failure(writeln!(out, "{}", line.trim_end()));
    }
}

/// A table without rules, its columns two spaces apart.
pub(crate) fn table(headers: &[&str], right_aligned: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(headers);
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right_aligned.contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// Prints a table without trailing blanks.
pub(crate) fn print_table(table: &Table) {
    outln!("{}", table.trim_fmt());
}

/// A size such as "12.3 MiB".
pub(crate) fn bytes(bytes: u64) -> String {
    BinaryBytes(bytes).to_string()
}

/// A count such as "1,234,567".
pub(crate) fn count(count: u64) -> String {
    indicatif::HumanCount(count).to_string()
}

/// A count and its noun: "1 page", "1,234 pages".
pub(crate) fn counted(count: u64, what: &str) -> String {
    let s = if count == 1 { "" } else { "s" };
    format!("{} {what}{s}", self::count(count))
}

/// A duration such as "843 µs", "12.3 ms", "1.20 s".
pub(crate) fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}

/// Local time, such as "2026-01-31 12:00:00.123".
pub(crate) fn time(unix_ms: u64) -> String {
    let time = i64::try_from(unix_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    time.map_or_else(
        || format!("{unix_ms} ms"),
        |time| {
            time.to_zoned_datetime(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S%.3f").to_string()
        },
    )
}

/// An error with its context and its causes. The libraries' errors include their cause in their own
/// text, since JSON and the control socket have nothing else; a cause that is already in the text
/// is not repeated.
pub(crate) fn error(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

/// A progress bar on a terminal; nothing in a pipe.
pub(crate) fn progress_bar(what: &'static str, unit: &str) -> ProgressBar {
    let bar = ProgressBar::new(0);
    let template =
        format!("{{prefix}} [{{bar:30}}] {{human_pos}}/{{human_len}} {unit} {{elapsed}}");
    let style =
        ProgressStyle::with_template(&template).expect("a valid template").progress_chars("=> ");
    bar.set_style(style);
    bar.set_prefix(what);
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// Does `work`, with a progress bar on a terminal that shows `done` out of `total`.
pub(crate) fn with_progress_bar<T: Send>(
    what: &'static str,
    unit: &str,
    total: u64,
    done: &AtomicU64,
    work: impl FnOnce() -> T + Send,
) -> T {
    let bar = progress_bar(what, unit);
    bar.set_length(total);
    std::thread::scope(|scope| {
        let work = scope.spawn(work);
        while !work.is_finished() {
            bar.set_position(done.load(Ordering::Relaxed));
            std::thread::sleep(Duration::from_millis(10));
        }
        bar.finish_and_clear();
        work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use frazil_snapstore::StoreError;
    use frazil_snapstore::pager::PagerError;
    use frazil_vmm::VmmError;

    #[test]
    fn errors_are_told_with_their_causes_and_each_cause_once() {
        let io = || std::io::Error::other("the medium says no");
        let store = || StoreError::Io { op: "read", file: "seg".into(), source: io() };
        let pager = PagerError::Store { region: "ram".into(), page: 7, source: store() };
        let op = "watch".to_owned();
        let all: [anyhow::Error; 6] = [
            store().into(),
            StoreError::Source { region: "ram".into(), page: 7, source: io() }.into(),
            PagerError::Memory { op: "map", source: io() }.into(),
            VmmError::Host { op, source: io() }.into(),
            VmmError::from(store()).into(),
            VmmError::from(pager).into(),
        ];
        for error in all {
            // JSON gets nothing but this text.
            assert!(error.to_string().contains("the medium says no"), "{error}");
            let told = super::error(&error.context("cannot resume"));
            assert!(told.starts_with("cannot resume: "), "{told}");
            assert_eq!(told.matches("the medium says no").count(), 1, "{told}");
            assert!(told.matches("cannot read seg").count() <= 1, "{told}");
        }
        let plain = anyhow::Error::new(io()).context("cannot start").context("cannot go on");
        assert_eq!(super::error(&plain), "cannot go on: cannot start: the medium says no");
    }

    #[test]
    fn colours_are_all_that_a_line_makes_a_terminal_do() {
        let line = Line::new().text("a\u{1b}[31m").paint(style::NEW, "b\u{7}").pad(20).text("c");
        assert_eq!(line.plain, "a\\u001b[31mb\\u0007  c");
        assert_eq!(line.painted.matches('\u{1b}').count(), 2, "{:?}", line.painted);
        let padded = Line::new().paint(style::OLD, "ab").pad(4).text("c");
        assert_eq!(padded.plain, "ab  c");
    }

    #[test]
    fn what_a_terminal_would_obey_is_shown() {
        assert!(matches!(plain("naïve — ok\n"), Cow::Borrowed(_)));
        assert_eq!(plain("a\u{1b}[31mb\u{7}\u{9b}2J\r"), "a\\u001b[31mb\\u0007\\u009b2J\\u000d");
        assert_eq!(plain("x\u{202e}y"), "x\\u202ey");
        let json = serde_json::to_string("\u{9b}\u{7f}\u{202e}\u{1b}").unwrap();
        let back: String = serde_json::from_str(&plain(&json)).unwrap();
        assert_eq!(back, "\u{9b}\u{7f}\u{202e}\u{1b}");
    }
}
