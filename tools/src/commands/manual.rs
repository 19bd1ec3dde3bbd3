//! `frazil completion` and `frazil man`: shell completion and man pages, made from the definition
//! of the command line.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write};

use anyhow::Context;
use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Inline, Roff, bold, roman};
use serde_json::json;

use super::print_json;
use crate::cli::{CompletionArgs, ManArgs, visible};

/// Man page sections on what concerns all commands: names, and what they mean.
const COMMON: &[(&str, &[(&str, &str)])] = &[
    (
        "NAMES",
        &[
            ("VM", "The name of a running VM, or the path of its control socket."),
            (
                "SNAP",
                "STORE@REF, or REF in the default store. REF is an id, its first four or more \
                 digits, a tag, or `latest`; with `~2` after it, two snapshots before that.",
            ),
            ("STORE", "A folder. Default: $FRAZIL_STORE, else ./frazil-store."),
        ],
    ),
    (
        "ENVIRONMENT",
        &[
            ("FRAZIL_STORE", "The default store."),
            (
                "FRAZIL_RUNTIME_DIR",
                "The folder of running VMs' control sockets. Default: $XDG_RUNTIME_DIR/frazil; if \
                 that is not set, /run/frazil for root and /tmp/frazil-UID for other users.",
            ),
            (
                "FRAZIL_LOG",
                "What to log on standard error, as a filter of the `tracing` crates: `warn`, \
                 `debug`, `frazil_vmm=trace`. Default: warn.",
            ),
            ("NO_COLOR", "If set and not empty, output is not coloured; see https://no-color.org."),
        ],
    ),
    (
        "EXIT STATUS",
        &[
            ("0", "Success."),
            ("1", "Something failed, as reported on standard error; or damage was found."),
            ("2", "The command line is wrong."),
        ],
    ),
];

pub(crate) fn completion(args: &CompletionArgs) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut visible(), "frazil", &mut script);
    if args.shell == Shell::Fish {
        script.extend_from_slice(fish_positionals(&visible()).as_bytes());
    }
    match io::stdout().write_all(&script) {
        // `frazil completion bash | head`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("cannot write to standard output"),
    }
}

/// Completions for the values of positional arguments, which `clap_complete` leaves out for fish.
fn fish_positionals(command: &Command) -> String {
    let mut lines = String::new();
    for command in command.get_subcommands() {
        let name = command.get_name();
        for values in command.get_positionals().map(clap::Arg::get_possible_values) {
            let values: Vec<&str> =
                values.iter().map(clap::builder::PossibleValue::get_name).collect();
            if !values.is_empty() {
                let _to_memory = writeln!(
                    lines,
                    "complete -c frazil -n \"__fish_frazil_using_subcommand {name}\" -f -a \"{}\"",
                    values.join(" ")
                );
            }
        }
    }
    lines
}

pub(crate) fn man(args: &ManArgs, json: bool) -> anyhow::Result<()> {
    let failed = || format!("cannot write man pages to {}", args.folder.display());
    fs::create_dir_all(&args.folder).with_context(failed)?;
    let mut all = crate::cli::command().disable_help_subcommand(true);
    all.build();
    let commands = all.get_subcommands().filter(|command| !command.is_hide_set());
    let pages: Vec<(String, Vec<u8>)> = [&all]
        .into_iter()
        .chain(commands)
        .map(|command| page(command, &all))
        .collect::<io::Result<_>>()
        .with_context(failed)?;
    for (name, text) in &pages {
        fs::write(args.folder.join(name), text).with_context(failed)?;
    }
    if json {
        let pages: Vec<&String> = pages.iter().map(|(name, _)| name).collect();
        return print_json(&json!({"folder": args.folder, "pages": pages}));
    }
    outln!("{}: {} man pages; start with frazil.1", args.folder.display(), pages.len());
    Ok(())
}

/// The file name and the text of the man page of `command`, which is `all` or one of its
/// subcommands.
fn page(command: &Command, all: &Command) -> io::Result<(String, Vec<u8>)> {
    let is_all = command.get_name() == all.get_name();
    // No date, so that the same source makes the same pages; but an empty argument in its place, or
    // the next one would be taken for it.
    let version = all.get_version().unwrap_or_default();
    let man = Man::new(command.clone());
    let name = man.get_filename();
    let title = name.trim_end_matches(".1").to_uppercase();
    let mut text =
        format!(".TH \"{title}\" \"1\" \"\" \"frazil {version}\" \"frazil manual\"\n").into_bytes();
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    let mut more = Roff::default();
    if is_all {
        man.render_subcommands_section(&mut text)?;
        for (heading, entries) in COMMON {
            more.control("SH", [*heading]);
            for (name, what) in *entries {
                more.control("TP", []);
                more.text([bold(*name)]);
                more.text([roman(*what)]);
            }
        }
    } else {
        more.control("SH", ["SEE ALSO"]);
        let see: Vec<Inline> = vec![
            bold("frazil"),
            roman("(1): names of VMs and snapshots, environment, exit status"),
        ];
        more.text(see);
    }
    more.to_writer(&mut text)?;
    Ok((name, text))
}
