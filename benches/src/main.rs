//! `frazil-bench SUITE`: what frazil reaches, and beside each figure the limit it is held
//! against, measured in the same run.
//!
//! A figure without its limit says as much about the machine as about the program; so every suite
//! measures both, and prints the ratio. Memory is warmed before it is timed, whatever is timed is
//! timed several times, and `n` says how often.

mod bench;
mod cleanup;
mod codec;
mod content;
mod heap;
mod host;
mod machine;
mod metric;
mod raw;
mod raw_guest;
mod report;
mod samples;
mod series;
mod suites;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::ensure;
use clap::builder::PossibleValuesParser;
use clap::{Parser, ValueEnum};

use bench::{Bench, Settings};

/// Measures frazil against the limits of this machine. Progress goes to standard error.
#[derive(Debug, Parser)]
#[command(name = "frazil-bench", version)]
struct Cli {
    /// What to measure.
    suite: Suite,
    /// Print one JSON object a metric: suite, metric, value, unit, floor, ratio, n.
    #[arg(long)]
    json: bool,
    /// Write all figures with budgets, pictures and what they were measured on to this file, too.
    #[arg(long, value_name = "FILE.html|FILE.md")]
    report: Option<PathBuf>,
    /// Guest memory sizes. Default: 1GiB for floors, clone, rewind and tools, 4GiB for store, 1GiB,4GiB for
    /// checkpoint and resume, 64MiB for endurance, and 4GiB or 1GiB for pause, as its figures are called. Of
    /// several, store takes the last, for what it writes and reads in full; so do pause and
    /// endurance.
    #[arg(long, value_name = "SIZE,…", value_delimiter = ',', value_parser = size)]
    memory: Vec<u64>,
    /// Repeat every measurement so often instead of as often as suits it; endurance takes so many
    /// checkpoints.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    runs: Option<u32>,
    /// Small sizes and few runs: shows that everything works, and gives no figures to rely on.
    #[arg(long)]
    quick: bool,
    /// Of pause, resume or store, only these measurements.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', value_parser = PossibleValuesParser::new(suites::pause::names().chain(suites::resume::names()).chain(suites::store::names())))]
    only: Vec<String>,
    /// Put stores and scratch files below this directory. Default: ./target if there is one, else
    /// the system's temporary directory. Wants a disk, not a tmpfs.
    #[arg(long, value_name = "DIR")]
    store_dir: Option<PathBuf>,
    /// The `frazil` command to measure. Default: the one beside this program.
    #[arg(long, value_name = "PATH")]
    frazil: Option<PathBuf>,
    /// Raw dumps of one guest's RAM, in the order in which they were taken, for store-images.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    images: Vec<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Suite {
    /// Everything but endurance, store-frames and store-images.
    All,
    /// The limits themselves: memory, compression, hashing, KVM, userfaultfd, disk.
    Floors,
    /// Taking checkpoints of a running guest: throughput, bytes.
    Checkpoint,
    /// What a running guest pays for checkpoints: pauses as host and guest see them, work lost.
    Pause,
    /// 36,000 checkpoints back to back, old ones forgotten and pruned: what grows. Ten minutes.
    Endurance,
    /// Resuming: first progress, sweeping memory that comes lazily, loading it eagerly.
    Resume,
    /// Many machines from one snapshot: how soon one is ready, what each takes.
    Clone,
    /// Taking a running guest back to a snapshot, by how much it has changed since.
    Rewind,
    /// The same guest in QEMU, if that is installed, as its users save and resume it.
    Peers,
    /// The store by itself, without KVM: throughput, overhead, history, verifying, pruning.
    Store,
    /// What the tools do with a snapshot's memory, without KVM: searching it.
    Tools,
    /// Stores with other frame and segment sizes: the measurement behind the defaults.
    StoreFrames,
    /// The store on dumps of a real guest's RAM: what each kind of elision saves.
    StoreImages,
}

impl Suite {
    /// Whether it runs guests, and so wants KVM and userfaultfd.
    fn runs_guests(self) -> bool {
        match self {
            Self::All
            | Self::Floors
            | Self::Checkpoint
            | Self::Pause
            | Self::Endurance
            | Self::Resume
            | Self::Clone
            | Self::Rewind
            | Self::Peers => true,
            Self::Store | Self::Tools | Self::StoreFrames | Self::StoreImages => false,
        }
    }
}

fn size(text: &str) -> Result<u64, String> {
    parse_size::Config::new()
        .with_binary()
        .parse_size(text)
        .map_err(|error| format!("expected a size such as 512MiB or 4GiB ({error})"))
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("frazil-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let Cli { suite, json, report, memory, runs, quick, only, store_dir, frazil, images } = cli;
    if cfg!(debug_assertions) {
        eprintln!("frazil-bench: warning: built without --release; the figures mean nothing");
    }
    if suite.runs_guests() {
        host::check()?;
    }
    cleanup::on_signals()?;
    let runs = runs.map(|runs| runs as usize);
    let settings = Settings { memory_bytes: memory, runs, quick, only };
    let mut bench = Bench::new(settings, json, store_dir.as_deref(), report)?;
    let measured = match suite {
        Suite::All => all(&mut bench, frazil.as_deref()),
        Suite::Floors => suites::floors::run(&mut bench),
        Suite::Checkpoint => suites::checkpoint::run(&mut bench),
        Suite::Pause => suites::pause::run(&mut bench),
        Suite::Endurance => suites::endurance::run(&mut bench),
        Suite::Resume => suites::resume::run(&mut bench, frazil),
        Suite::Clone => suites::clone::run(&mut bench),
        Suite::Rewind => suites::rewind::run(&mut bench),
        Suite::Peers => suites::peers::run(&mut bench, frazil),
        Suite::Store => suites::store::run(&mut bench),
        Suite::Tools => suites::store::run_tools(&mut bench),
        Suite::StoreFrames => suites::store::run_frames(&mut bench),
        Suite::StoreImages => suites::store::run_images(&mut bench, &images),
    };
    // What was measured is told in any case.
    let finished = bench.finish();
    measured.and(finished)
}

/// One after the other: each has the machine to itself. One that fails does not take the figures of the
/// others with it, which took an hour.
fn all(bench: &mut Bench, frazil: Option<&Path>) -> anyhow::Result<()> {
    type Run<'a> = &'a dyn Fn(&mut Bench) -> anyhow::Result<()>;
    let frazil = || frazil.map(Path::to_owned);
    let suites: [(&str, Run<'_>); 9] = [
        ("floors", &suites::floors::run),
        ("store", &suites::store::run),
        ("checkpoint", &suites::checkpoint::run),
        ("pause", &suites::pause::run),
        ("resume", &|bench| suites::resume::run(bench, frazil())),
        ("clone", &suites::clone::run),
        ("rewind", &suites::rewind::run),
        ("tools", &suites::store::run_tools),
        ("peers", &|bench| suites::peers::run(bench, frazil())),
    ];
    let mut failed = Vec::new();
    for (name, run) in suites {
        if let Err(error) = run(bench) {
            bench.fail(name, &error);
            failed.push(name);
        }
    }
    ensure!(failed.is_empty(), "not measured: {}", failed.join(", "));
    Ok(())
}
