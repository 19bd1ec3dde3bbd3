//! `frazil`: runs, checkpoints, resumes and inspects virtual machines.
//!
//! This crate is thin: it parses, calls the libraries and prints. Results go to standard output,
//! everything else to standard error. Exit status: 0, 1 after an error, 2 after wrong usage.

#[macro_use]
mod output;
mod cli;
mod commands;
mod console;
mod demo;
mod heatmap;
mod new_file;
mod snapshot_files;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::FromArgMatches;
use tracing_subscriber::EnvFilter;

use cli::{Cli, Command};

fn main() -> ExitCode {
    let started = commands::Started::now();
    let cli = match Cli::from_arg_matches(&cli::command().get_matches()) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    output::set_color(cli.color);
    let filter = EnvFilter::try_from_env("FRAZIL_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(output::color_on(std::io::stderr().is_terminal()))
        // It would report them on standard error, which is what failed.
        .log_internal_errors(false)
        .init();
    match run(cli, started) {
        Ok(code) => match output::not_printed() {
            None => code,
            Some(error) => {
                errln!("frazil: cannot write to standard output: {error}");
                ExitCode::FAILURE
            }
        },
        Err(error) => {
            if let Some(usage) = error.downcast_ref::<clap::Error>() {
                usage.exit();
            }
            // Names and guests' messages in the error come from elsewhere.
            errln!("frazil: {}", output::plain(&output::error(&error)));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli, started: commands::Started) -> anyhow::Result<ExitCode> {
    let json = cli.json;
    let done = |()| ExitCode::SUCCESS;
    match cli.command {
        Command::Run(args) => commands::run::run(args, json),
        Command::Resume(args) => commands::run::resume(args, json, started),
        Command::Checkpoint(args) => commands::control::checkpoint(args, json).map(done),
        Command::Rewind(args) => commands::control::rewind(&args, json).map(done),
        Command::Ps => commands::control::ps(json).map(done),
        Command::Pause(vm) => commands::control::pause(&vm, json).map(done),
        Command::Continue(vm) => commands::control::go(&vm, json).map(done),
        Command::Stop(vm) => commands::control::stop(&vm, json).map(done),
        Command::Top(args) => commands::top::top(&args, json).map(done),
        Command::Log(args) => commands::log::log(&args, json).map(done),
        Command::Show(args) => commands::show::show(&args, json).map(done),
        Command::Diff(args) => commands::diff::diff(&args, json).map(done),
        Command::Inspect(args) => commands::inspect::inspect(&args, json).map(done),
        Command::Export(args) => commands::export::export(&args, json).map(done),
        Command::Import(args) => commands::import::import(&args, json).map(done),
        Command::Mount(args) => commands::mount::mount(&args, json).map(done),
        Command::Verify(args) => commands::verify::verify(&args, json),
        Command::Forget(args) => commands::retention::forget(&args, json).map(done),
        Command::Prune(args) => commands::retention::prune(&args, json).map(done),
        Command::Pager(args) => commands::pager::pager(&args).map(done),
        Command::Completion(args) => commands::manual::completion(&args).map(done),
        Command::Man(args) => commands::manual::man(&args, json).map(done),
        Command::Demo(args) => demo::demo(&args, json).map(done),
    }
}
