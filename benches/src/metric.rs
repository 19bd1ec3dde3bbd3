//! A figure, and printing figures.

use std::io::Write;

use anyhow::Context;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;

use crate::report::budgets::{Judged, judge};

/// A figure, with the limit it is held against.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Metric {
    suite: String,
    #[serde(rename = "metric")]
    name: String,
    value: f64,
    unit: &'static str,
    floor: Option<f64>,
    ratio: Option<f64>,
    n: u64,
}

/// The unit of a throughput: a ratio below 1 is a loss.
pub(crate) const MIB_S: &str = "MiB/s (more is better)";

impl Metric {
    /// A figure `suite.name`, the median of `n` values unless the name says otherwise.
    pub(crate) fn new(name: impl Into<String>, value: f64, unit: &'static str, n: u64) -> Self {
        let name = name.into();
        let suite = name.split('.').next().unwrap_or_default().to_owned();
        Self { suite, name, value: rounded(value), unit, floor: None, ratio: None, n }
    }

    /// Adds the limit, in the same unit, measured in the same run.
    pub(crate) fn against(mut self, floor: f64) -> Self {
        self.ratio = (floor > 0.0).then(|| rounded(self.value / floor));
        self.floor = Some(rounded(floor));
        self
    }

    /// Adds the limit in another unit than the value, which is the share beyond it: there is no
    /// ratio.
    pub(crate) fn beyond(mut self, floor: f64) -> Self {
        self.floor = Some(rounded(floor));
        self
    }
}

impl Metric {
    pub(crate) fn suite(&self) -> &str {
        &self.suite
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn value(&self) -> f64 {
        self.value
    }

    pub(crate) fn unit(&self) -> &'static str {
        self.unit
    }

    pub(crate) fn floor(&self) -> Option<f64> {
        self.floor
    }

    pub(crate) fn ratio(&self) -> Option<f64> {
        self.ratio
    }

    pub(crate) fn n(&self) -> u64 {
        self.n
    }

    /// True if more is better, up to the floor.
    pub(crate) fn is_throughput(&self) -> bool {
        self.unit == MIB_S
    }
}

/// Rounds to four digits: more would only pretend precision.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return 0.0;
    }
    let digits = 3 - value.abs().log10().floor() as i32;
    // The scale is a whole number, which a float holds exactly.
    let scale = 10_f64.powi(digits.abs());
    if digits < 0 { (value / scale).round() * scale } else { (value * scale).round() / scale }
}

/// Prints figures: at once as JSON lines, or as a table at the end.
#[derive(Debug)]
pub(crate) struct Output {
    json: bool,
    rows: Vec<Metric>,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json, rows: Vec::new() }
    }

    pub(crate) fn emit(&mut self, metric: Metric) -> anyhow::Result<()> {
        if self.json {
            print_line(&serde_json::to_string(&metric)?)?;
        }
        self.rows.push(metric);
        Ok(())
    }

    /// All figures so far.
    pub(crate) fn rows(&self) -> &[Metric] {
        &self.rows
    }

    /// Prints the table, unless figures are printed as JSON.
    pub(crate) fn finish(&self) -> anyhow::Result<()> {
        if self.json {
            return Ok(());
        }
        let mut table = Table::new();
        table
            .load_style(presets::NOTHING)
            .set_content_arrangement(ContentArrangement::Disabled)
            .set_header(["metric", "value", "floor", "ratio", "n", "unit", "budget"]);
        for row in &self.rows {
            let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), plain);
            table.add_row([
                row.name.clone(),
                plain(row.value),
                number(row.floor),
                number(row.ratio),
                row.n.to_string(),
                row.unit.to_owned(),
                budget(row),
            ]);
        }
        for column in 1..=4 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        print_line(&format!("{table}\n\n{LEGEND}"))
    }
}

/// The budgets of a metric, and whether they are met.
fn budget(metric: &Metric) -> String {
    let said =
        |judged: Judged| format!("{} {}", judged.budget, if judged.met { "met" } else { "MISSED" });
    judge(metric).into_iter().map(said).collect::<Vec<_>>().join(", ")
}

/// Unlike `println!`, fails instead of panicking if the reader is gone.
fn print_line(line: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{line}").context("cannot write to standard output")
}

/// A number without exponent and without insignificant digits.
pub(crate) fn plain(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

pub(crate) const LEGEND: &str = "value  median of n, unless the name says _p90 or _p99 (percentiles) or _max
floor  the limit, measured in this run: raw copy, raw system call, zstd on the same bytes, disk
ratio  value / floor; the nearer to 1 the better, for throughputs and for times
pause  the floor of p1000: kick + state + the cheapest dirty log; of dirty10, and of after_N (N pages
       written since the previous checkpoint): stop-and-copy of the same guest; of gap (the pause as
       the guest sees it): the pause; of scale: the 1 GiB guest; of guest_work (pages/s): the dirty
       log only read as often; of storm_work: no checkpoint in progress; of incr_vs_store: the guest
       paused; of endurance: after a tenth of the run
resume the floor of first_progress: creating an empty VM; of fault: raw userfaultfd + unpacking the
       same frame; of sweep: the same in resident memory; lazy is ours, map_private and uffd_copy are
       other VMMs' ways: the memory in a raw file, mapped, or copied page by page on faults
rewind the floor of latency: the budget, 1 ms plus 1 us per page restored; of its pause: memcpy of as
       many pages
peers  the floor of QEMU's and of dump's (all memory to a file, raw, while the guest is paused): what
       frazil needs for the same guest's first snapshot, and to resume it; neither waits for the disk;
       dump, savevm and migrate stop the guest's clock: there is no gap to report
store  the floor of commit_scale: at 1 GiB; of depth: at depth 1; of delta and elide: switched off;
       of prune: a new store of just that snapshot; of overhead (%): bytes of zstd on the same pages;
       of heap: the budget; of frame_pages: the default size
tools  the floor of search: decompressing the same frames on all cores, and nothing else
images means over n snapshots, per changed page; the floor of bytes: everything off; of n_: pages
       written; of step_: pages changed; of edit_: zstd on the pages instead of the differences
1g 4g  bytes of guest memory (m: MiB); p1000: 1,000 pages written per checkpoint; dirty10: 10 %
page   4096 bytes; MB is 10^6 bytes, MiB 2^20";
