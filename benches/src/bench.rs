//! What every suite needs: settings, a scratch directory, and output for metrics.

use std::path::{Path, PathBuf};

use anyhow::Context;
use tempfile::TempDir;

use crate::metric::{Metric, Output};
use crate::report::{Picture, Report};
use crate::samples::Samples;
use crate::{cleanup, host};

pub(crate) const GIB: u64 = 1 << 30;
const QUICK_BYTES: u64 = 64 << 20;
/// Memory the host must have free besides that of guests.
const SPARE_BYTES: u64 = GIB / 2;

/// The user's choices.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Guest memory sizes; empty for the suite's defaults.
    pub memory_bytes: Vec<u64>,
    /// How often to repeat each measurement; None for as often as suits it.
    pub runs: Option<usize>,
    /// Small sizes and few runs.
    pub quick: bool,
    /// The measurements to make; empty for all.
    pub only: Vec<String>,
}

/// A run of a suite.
#[derive(Debug)]
pub(crate) struct Bench {
    settings: Settings,
    output: Output,
    report: Option<Report>,
    file_system: String,
    scratch: TempDir,
}

impl Bench {
    /// Creates a scratch directory, and reports where.
    pub(crate) fn new(
        settings: Settings,
        json: bool,
        store_dir: Option<&Path>,
        report: Option<PathBuf>,
    ) -> anyhow::Result<Self> {
        let report = report.map(|path| Report::new(path, settings.quick)).transpose()?;
        let base = store_dir.map_or_else(default_scratch, Path::to_path_buf);
        std::fs::create_dir_all(&base)
            .with_context(|| format!("cannot create {}", base.display()))?;
        let scratch = tempfile::Builder::new()
            .prefix("frazil-bench-")
            .tempdir_in(&base)
            .with_context(|| format!("cannot create a directory in {}", base.display()))?;
        cleanup::remove_at_exit(scratch.path());
        let file_system = host::file_system(scratch.path())?;
        eprintln!("frazil-bench: stores in {} ({file_system})", base.display());
        if file_system == host::TMPFS {
            eprintln!(
                "frazil-bench: warning: a tmpfs is not a disk: give --store-dir on a real one"
            );
        }
        Ok(Self { settings, output: Output::new(json), report, file_system, scratch })
    }

    /// Guest memory sizes to measure at; by default, the first `most` of the usual ones.
    pub(crate) fn memory_sizes(&self, most: usize) -> Vec<u64> {
        match &self.settings.memory_bytes[..] {
            [] if self.settings.quick => vec![QUICK_BYTES],
            [] => [GIB, 4 * GIB].into_iter().take(most).collect(),
            given => given.to_vec(),
        }
    }

    /// Memory of a guest that has `usual_bytes` by default; of several sizes asked for, the last.
    pub(crate) fn memory_size(&self, usual_bytes: u64) -> u64 {
        let usual = self.sized(usual_bytes, usual_bytes.min(QUICK_BYTES));
        self.settings.memory_bytes.last().copied().unwrap_or(usual)
    }

    /// Whether to make the measurement `name`.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.settings.only.is_empty() || self.settings.only.iter().any(|only| only == name)
    }

    /// How often to measure something that is usually measured `usual` times.
    pub(crate) fn runs(&self, usual: usize) -> usize {
        let quick = if self.settings.quick { usual.min(3) } else { usual };
        self.settings.runs.unwrap_or(quick)
    }

    /// Like [`Self::runs`], but `quick` times in a quick run.
    pub(crate) fn runs_in_full(&self, usual: usize, quick: usize) -> usize {
        self.settings.runs.unwrap_or(self.sized(usual, quick))
    }

    /// `usual`, or `quick` in a quick run.
    pub(crate) fn sized<T>(&self, usual: T, quick: T) -> T {
        if self.settings.quick { quick } else { usual }
    }

    /// Whether the host has memory for guests of `guest_bytes`; if not, reports that `name` is left
    /// out.
    pub(crate) fn has_room(&self, name: &str, guest_bytes: u64) -> bool {
        let wanted = guest_bytes + SPARE_BYTES;
        // If the host does not say, assume that there is enough.
        let available = host::available_bytes().unwrap_or(wanted);
        if available < wanted {
            self.say(&format!(
                "{name}: skipped: it needs {} MiB of memory, and {} MiB are free",
                wanted >> 20,
                available >> 20
            ));
        }
        available >= wanted
    }

    /// A new directory, removed at the end of the run at the latest.
    pub(crate) fn scratch(&self) -> anyhow::Result<TempDir> {
        tempfile::tempdir_in(self.scratch.path()).with_context(|| {
            format!("cannot create a directory in {}", self.scratch.path().display())
        })
    }

    /// Reports progress on standard error.
    #[allow(clippy::unused_self)] // so that progress needs a run, and may go through a bar one day
    pub(crate) fn say(&self, what: &str) {
        eprintln!("frazil-bench: {what}");
    }

    /// Prints a metric.
    pub(crate) fn emit(&mut self, metric: Metric) -> anyhow::Result<()> {
        self.output.emit(metric)
    }

    /// Prints median and 99th percentile of times as `NAME_p50_us` and `NAME_p99_us`.
    pub(crate) fn emit_times(&mut self, name: &str, times: &Samples) -> anyhow::Result<()> {
        self.emit(Metric::new(format!("{name}_p50_us"), times.us(0.5), "us", times.n()))?;
        self.emit(Metric::new(format!("{name}_p99_us"), times.us(0.99), "us", times.n()))
    }

    /// Adds the distribution of `samples`, which are times, to a picture of the report, if there is
    /// one.
    pub(crate) fn draw(&mut self, picture: Picture, name: &str, samples: &Samples) {
        if let Some(report) = &mut self.report {
            report.add_curve(picture, name, samples);
        }
    }

    /// Reports that `suite` could not be measured, on standard error and in the report.
    pub(crate) fn fail(&mut self, suite: &str, error: &anyhow::Error) {
        self.say(&format!("{suite}: failed, skipped: {error:#}"));
        if let Some(report) = &mut self.report {
            report.add_failure(suite, format!("{error:#}"));
        }
    }

    /// Prints what is left to print, writes the report, and removes the scratch directory.
    pub(crate) fn finish(self) -> anyhow::Result<()> {
        if !self.output.rows().is_empty() {
            self.output.finish()?;
            if let Some(report) = &self.report {
                report.write(self.output.rows(), &self.file_system)?;
            }
        }
        let path = self.scratch.path().to_path_buf();
        self.scratch.close().with_context(|| format!("cannot remove {}", path.display()))
    }
}

fn default_scratch() -> PathBuf {
    let target = PathBuf::from("target");
    if target.is_dir() { target } else { std::env::temp_dir() }
}

/// A memory size as used in metrics' names: `1g`, `64m`.
pub(crate) fn size_label(bytes: u64) -> String {
    if bytes.is_multiple_of(GIB) {
        format!("{}g", bytes / GIB)
    } else {
        format!("{}m", bytes >> 20)
    }
}
