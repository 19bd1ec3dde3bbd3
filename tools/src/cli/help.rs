//! `frazil help`: the commands, grouped by what people want to do.

use std::fmt::Write;

use clap::builder::StyledStr;
use clap::error::ErrorKind;
use clap::{Command, CommandFactory};

use super::Cli;

/// What people want to do, and the commands for it.
const GROUPS: [(&str, &[&str]); 5] = [
    ("run and watch guests", &["run", "ps", "top", "pause", "continue", "stop"]),
    (
        "take snapshots of a running guest, and go back to any of them",
        &["checkpoint", "resume", "rewind"],
    ),
    (
        "look into snapshots: what happened when, what changed, and whether all is intact",
        &["log", "show", "diff", "inspect", "verify"],
    ),
    ("get memory and disks out as files, and in", &["export", "mount", "import"]),
    ("free space", &["forget", "prune"]),
];
/// Commands that nobody needs every day.
const MORE: (&str, &[&str]) = ("others", &["demo", "completion", "man", "help"]);

/// The width of the column of command names.
const NAME_COLUMNS: usize = 12;

/// The command line, with `frazil help` in groups.
pub(crate) fn command() -> Command {
    let mut command = Cli::command();
    // This adds the `help` command.
    command.build();
    let help = grouped(&command);
    Cli::command().override_help(help)
}

fn grouped(command: &Command) -> StyledStr {
    let styles = command.get_styles();
    let (header, literal) = (styles.get_header(), styles.get_literal());
    let mut help = StyledStr::new();
    let about = command.get_long_about().or(command.get_about()).cloned().unwrap_or_default();
    let _to_memory = write!(
        help,
        "{}\n\n{header}Usage:{header:#} {literal}frazil{literal:#} COMMAND [ARGUMENTS]\n",
        wrapped(&about.to_string(), 90)
    );
    for (title, names) in GROUPS.iter().chain([&MORE]) {
        let _to_memory = write!(help, "\n{header}{title}{header:#}\n");
        for name in *names {
            let about = command.find_subcommand(name).and_then(Command::get_about);
            let about = about.map(ToString::to_string).unwrap_or_default();
            let _to_memory = writeln!(
                help,
                "   {literal}{name:<NAME_COLUMNS$}{literal:#}{}",
                about.trim_end_matches('.')
            );
        }
    }
    let _to_memory = write!(
        help,
        "\n{header}common arguments and options{header:#}\n   \
         {literal}VM{literal:#}          the name of a running VM\n   \
         {literal}SNAP{literal:#}        STORE@REF: an id or its first digits, a tag, or `latest`; `latest~2` is two before it\n   \
         {literal}STORE{literal:#}       a folder; default: $FRAZIL_STORE, else ./frazil-store\n   \
         {literal}--json{literal:#}      print JSON: one object, or one per line\n   \
         {literal}--color{literal:#}     auto, always or never; $NO_COLOR is respected\n\n\
         `frazil help COMMAND` describes a command in full; so does its man page (`frazil man DIR` writes them).\n"
    );
    help
}

/// Breaks `text` into lines of at most `width` characters.
fn wrapped(text: &str, width: usize) -> String {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("there is always one");
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines.join("\n")
}

/// The commands and arguments meant for people; hidden ones are for frazil itself.
pub(crate) fn visible() -> Command {
    let mut all = command();
    // This adds `help`, so that `strip` can take `help help` out: nobody needs help with help, and
    // where it is offered, fish offers nothing else after `help`.
    all.build();
    strip(&all, "frazil")
}

fn strip(command: &Command, name: &str) -> Command {
    // Arguments that building adds to every command again.
    const OF_ALL: [&str; 2] = ["help", "version"];
    let mut out = Command::new(name.to_owned()).disable_help_subcommand(true);
    if let Some(about) = command.get_about() {
        out = out.about(about.clone());
    }
    if let Some(version) = command.get_version() {
        out = out.version(version.to_owned());
    }
    let args = command.get_arguments().filter(|arg| !arg.is_hide_set());
    out.args(args.filter(|arg| !OF_ALL.contains(&arg.get_id().as_str())).cloned()).subcommands(
        command
            .get_subcommands()
            .filter(|inner| !inner.is_hide_set())
            .filter(|inner| (name, inner.get_name()) != ("help", "help"))
            .map(|inner| strip(inner, inner.get_name())),
    )
}

/// An error for arguments of `command` that are wrong only in combination.
pub(crate) fn usage_error(command: &str, message: &str) -> clap::Error {
    let mut all = Cli::command();
    all.build();
    match all.find_subcommand_mut(command) {
        Some(command) => command.error(ErrorKind::ArgumentConflict, message),
        None => all.error(ErrorKind::ArgumentConflict, message),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        command().debug_assert();
        visible().debug_assert();
    }

    #[test]
    fn every_command_is_in_one_group() {
        let mut all = Cli::command();
        all.build();
        let there: BTreeSet<&str> = all
            .get_subcommands()
            .filter(|command| !command.is_hide_set())
            .map(Command::get_name)
            .collect();
        let grouped: Vec<&str> =
            GROUPS.iter().chain([&MORE]).flat_map(|(_, names)| names.iter().copied()).collect();
        assert_eq!(grouped.iter().copied().collect::<BTreeSet<_>>(), there);
        assert_eq!(grouped.len(), there.len(), "none is in two");
    }

    /// Clap turns `{n}` into a line break.
    #[test]
    fn no_help_means_something_else_to_clap() {
        let mut all = Cli::command();
        all.build();
        for command in all.get_subcommands() {
            for argument in command.get_arguments() {
                for help in [argument.get_help(), argument.get_long_help()].into_iter().flatten() {
                    let help = help.to_string();
                    assert!(!help.contains("{n}"), "{}: {help}", command.get_name());
                }
            }
        }
    }

    /// Words that a person looks for in `frazil help`, and the command they must lead to.
    #[test]
    fn help_alone_leads_to_the_command() {
        let help = command().render_help().to_string();
        for (words, name) in [
            ("changed", "diff"),
            ("when", "log"),
            ("how much", "log"),
            ("intact", "verify"),
            ("memory", "export"),
            ("back", "rewind"),
            ("folders", "mount"),
            ("space", "prune"),
            ("Watch", "top"),
            ("clones", "resume"),
            ("suspend", "checkpoint"),
        ] {
            let line = help.lines().find(|line| line.trim_start().starts_with(&format!("{name} ")));
            let line = line.unwrap_or_else(|| panic!("{name} is not in\n{help}"));
            assert!(line.to_lowercase().contains(&words.to_lowercase()), "{words}: {line}");
        }
        for line in help.lines() {
            assert!(line.chars().count() <= 110, "{line}");
        }
    }
}
