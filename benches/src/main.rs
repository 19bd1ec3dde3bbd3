//! `frazil-bench SUITE`: figures of frazil, each beside its limit on this machine, measured in the
//! same run.
//!
//! A figure without its limit says as much about the machine as about the program, so every suite
//! measures both and prints the ratio. Memory is warmed up before anything is timed, measurements
//! are repeated, and `n` says how often.

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
    /// The suite to run.
    suite: Suite,
    /// Print one JSON object per metric: suite, metric, value, unit, floor, ratio, n.
    #[arg(long)]
    json: bool,
    /// Also write a report to this file: all figures, their budgets, pictures, and the machine.
    #[arg(long, value_name = "FILE.html|FILE.md")]
    report: Option<PathBuf>,
    /// Guest memory sizes. Default: 1GiB for floors, clone, rewind, peers and tools; 1GiB,4GiB for
    /// checkpoint and resume; 4GiB for store; 64MiB for endurance; 4GiB or 1GiB for pause, as the
    /// names of its figures say. Of several sizes, checkpoint and resume measure each, floors takes
    /// the first, and the others take the last (store for what it writes and reads in full).
    #[arg(long, value_name = "SIZE,…", value_delimiter = ',', value_parser = size)]
    memory: Vec<u64>,
    /// Repeat every measurement N times, instead of as often as suits it; for endurance, the number
    /// of checkpoints.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    runs: Option<u32>,
    /// Use small sizes and few runs: shows that everything works, and gives no figures to rely on.
    #[arg(long)]
    quick: bool,
    /// Make only these measurements of pause, resume or store.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', value_parser = PossibleValuesParser::new(suites::pause::names().chain(suites::resume::names()).chain(suites::store::names())))]
    only: Vec<String>,
    /// Put stores and scratch files in this directory, on a disk rather than a tmpfs. Default:
    /// ./target if it exists, else the system's temporary directory.
    #[arg(long, value_name = "DIR")]
    store_dir: Option<PathBuf>,
    /// The `frazil` command to measure. Default: the one beside this program.
    #[arg(long, value_name = "PATH")]
    frazil: Option<PathBuf>,
    /// Raw dumps of one guest's RAM, in the order they were taken, for store-images.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    images: Vec<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Suite {
    /// Everything but endurance, store-frames and store-images.
    All,
    /// The limits themselves: memory, compression, hashing, KVM, userfaultfd, disk.
    Floors,
    /// Checkpoints of a running guest: throughput and size.
    Checkpoint,
    /// What a running guest pays for checkpoints: pauses as host and guest see them, work lost.
    Pause,
    /// 36,000 checkpoints back to back, with old ones forgotten and pruned: what grows. Takes ten
    /// minutes or more.
    Endurance,
    /// Resuming: first progress, sweeps of memory that is loaded lazily, eager loading.
    Resume,
    /// Many machines from one snapshot: how soon a clone is ready, what each takes.
    Clone,
    /// Taking a running guest back to a snapshot, by how much has changed since.
    Rewind,
    /// The same guest saved and resumed by QEMU, if that is installed, as its users do it.
    Peers,
    /// The store by itself, without KVM: throughput, overhead, history, verifying, pruning.
    Store,
    /// What the tools do with a snapshot's memory, without KVM: searches.
    Tools,
    /// Stores with other frame and segment sizes: the measurements behind the defaults.
    StoreFrames,
    /// The store on dumps of a real guest's RAM: what each kind of elision saves.
    StoreImages,
}

impl Suite {
    /// Whether the suite runs guests, and so needs KVM and userfaultfd.
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
    // Figures measured before a failure are printed too.
    let finished = bench.finish();
    measured.and(finished)
}

/// Runs the suites one after the other, so that each has the machine to itself. If one fails, the
/// figures of the others, which took an hour, are not lost.
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
