//! Printing for people.

use std::fmt::Arguments;
use std::io::Write;
use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};
use indicatif::{BinaryBytes, ProgressBar, ProgressStyle};
use jiff::{Timestamp, tz::TimeZone};

/// As `println!`, but a reader that went away (`frazil log | head`) is no reason to panic: least
/// of all in a process that runs a VM.
macro_rules! outln {
    ($($arg:tt)*) => {
        $crate::output::line(format_args!($($arg)*))
    };
}

/// Prints a line on standard output, if anybody listens.
pub(crate) fn line(text: Arguments<'_>) {
    let _nobody_listens = writeln!(std::io::stdout(), "{text}");
}

/// A table without lines, its columns two spaces apart.
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

/// Prints a table, without the blanks at the ends of lines.
pub(crate) fn print_table(table: &Table) {
    outln!("{}", table.trim_fmt());
}

/// "12.3 MiB".
pub(crate) fn bytes(bytes: u64) -> String {
    BinaryBytes(bytes).to_string()
}

/// "1,234,567".
pub(crate) fn count(count: u64) -> String {
    indicatif::HumanCount(count).to_string()
}

/// "843 µs", "12.3 ms", "1.20 s".
pub(crate) fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}

/// "2026-01-31 12:00:00.123", local time.
pub(crate) fn time(unix_ms: u64) -> String {
    let time = i64::try_from(unix_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    time.map_or_else(
        || format!("{unix_ms} ms"),
        |time| {
            time.to_zoned_datetime(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S%.3f").to_string()
        },
    )
}

/// A bar on the terminal, nothing in a pipe.
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
