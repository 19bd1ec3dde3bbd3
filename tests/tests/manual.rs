//! The command's help, man pages, shell completion and colours.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use frazil_snapstore::{Store, StoreOptions};
use frazil_tests::oracle::{Edit, Model, take};
use frazil_tests::vm_harness::{Host, PATIENCE, finish, frazil};

/// Returns the commands that `frazil help` lists.
fn commands(help: &str) -> Vec<&str> {
    let listed = help.split("common arguments and options").next().expect("it is there");
    let lines = listed.lines().filter_map(|line| line.strip_prefix("   "));
    lines.map(|line| line.split_whitespace().next().expect("a name")).collect()
}

#[test]
fn help_is_the_same_however_it_is_asked_for_and_every_command_has_its_own() {
    let host = Host::new();
    let help = host.ok(&["help"]).stdout;
    assert_eq!(host.ok(&["--help"]).stdout, help);
    assert_eq!(host.ok(&["-h"]).stdout, help);
    assert!(!help.contains('\u{1b}'), "no colours in a pipe: {help:?}");
    let commands = commands(&help);
    assert!(commands.len() > 20, "{commands:?}");
    for command in commands.iter().filter(|command| **command != "help") {
        let own = host.ok(&["help", command]).stdout;
        assert!(own.contains("Usage: ") && own.contains(command), "{command}: {own}");
    }
    assert!(!commands.contains(&"pager"), "that is for frazil itself");
    host.frazil(&[]).expect_code(2);
    host.frazil(&["nonsense"]).expect_code(2).expect_says(&["nonsense"]);
}

#[test]
fn man_pages_are_written_for_every_command() {
    let host = Host::new();
    let folder = host.path("man/man1");
    fs::create_dir_all(&folder).expect("a folder");
    fs::write(folder.join("frazil-else.1"), "somebody else's").expect("a file");
    let written = host.json(&["man", folder.to_str().expect("UTF-8")]);
    let help = host.ok(&["help"]).stdout;
    let mut expected = vec!["frazil.1".to_owned()];
    for command in commands(&help).into_iter().filter(|command| *command != "help") {
        let page = format!("frazil-{command}.1");
        let text = fs::read_to_string(folder.join(&page)).expect("it is there");
        let title = format!(".TH \"FRAZIL-{}\" \"1\"", command.to_uppercase());
        assert!(text.contains(&title) && text.contains("SEE ALSO"), "{page}");
        expected.push(page);
    }
    assert!(!folder.join("frazil-pager.1").exists());
    let mut listed: Vec<&str> = written["pages"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(serde_json::Value::as_str)
        .collect();
    listed.sort_unstable();
    expected.sort();
    assert_eq!(listed, expected, "what was written, and nothing that was there");
    let all = fs::read_to_string(folder.join("frazil.1")).expect("it is there");
    for part in ["ENVIRONMENT", "FRAZIL_STORE", "NO_COLOR", "EXIT STATUS", "SNAP"] {
        assert!(all.contains(part), "{part}");
    }
    for page in expected {
        let Some(said) = shell("man", &["-l", folder.join(&page).to_str().expect("UTF-8")]) else {
            return;
        };
        assert!(said.contains("frazil manual") && said.contains("frazil 0"), "{page}: {said}");
    }
}

/// Runs `program`; returns its standard output, or `None` if it is not installed.
fn shell(program: &str, args: &[&str]) -> Option<String> {
    let mut command = Command::new(program);
    command.args(args).env("MANWIDTH", "80").env("MANPAGER", "cat");
    if Command::new(program).arg("--version").output().is_err() {
        eprintln!("SKIPPED: there is no {program} here; `make setup-tests` brings the shells");
        return None;
    }
    let finished = finish(command, PATIENCE);
    finished.expect_code(0);
    assert_eq!(finished.stderr, "", "{program}");
    Some(finished.stdout)
}

/// Command lines, and what a tab completes each to.
const COMPLETIONS: [(&str, &str); 5] = [
    ("mo", "mount"),
    ("export x y --format e", "export x y --format elf-core"),
    ("help ex", "help export"),
    ("completion z", "completion zsh"),
    ("show x --heatmap-", "show x --heatmap-region"),
];

/// Types each command line and a tab into an interactive zsh, which then prints the completed line.
const ZSH: &str = r#"
zmodload zsh/zpty
zpty z zsh -f -i
said=
until_line() { while zpty -r z said; do [[ $said == $1* ]] && return; done }
zpty -w z "PS1=; fpath=($1 \$fpath); autoload -Uz compinit; compinit -u -D; print -r -- rea''dy"
until_line ready
shift
for typed in $@; do
    zpty -w -n z "frazil $typed"$'\t\C-aprint -r -- ok: \n'
    until_line ok:
    print -r -- ${${said#ok: frazil }%%[[:space:]]#}
done
zpty -d z
"#;

fn script(host: &Host, shell: &str, name: &str) -> String {
    let path = host.path(name);
    fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    let script = host.ok(&["completion", shell]).stdout;
    assert!(script.contains("checkpoint") && script.contains("heatmap"), "{shell}");
    assert!(!script.contains("memory-from"), "{shell}: hidden options are not for people");
    fs::write(&path, script).expect("a file");
    path.display().to_string()
}

#[test]
fn bash_completes_what_people_may_use() {
    let host = Host::new();
    let script = script(&host, "bash", "frazil.bash");
    let asked = "source \"$1\"; COMP_WORDS=(frazil ${@:2}); COMP_CWORD=$(($# - 1)); \
                 _frazil frazil \"${COMP_WORDS[-1]}\" \"${COMP_WORDS[-2]}\"; echo \"${COMPREPLY[@]}\"";
    for (typed, completed) in COMPLETIONS {
        let words: Vec<&str> = typed.split(' ').collect();
        let Some(said) = shell("bash", &[&["-c", asked, "-", &script], &words[..]].concat()) else {
            return;
        };
        let last = completed.split(' ').next_back().expect("a word");
        assert_eq!(said.trim(), last, "{typed}");
    }
    host.frazil(&["completion", "tcsh"]).expect_code(2).expect_says(&["bash"]);
}

#[test]
fn zsh_completes_what_people_may_use() {
    let host = Host::new();
    let script = script(&host, "zsh", "functions/_frazil");
    let folder = script.trim_end_matches("/_frazil");
    let typed = COMPLETIONS.map(|(typed, _)| typed);
    let args = [&["-f", "-c", ZSH, "-", folder], &typed[..]].concat();
    let Some(said) = shell("zsh", &args) else { return };
    let completed: Vec<&str> =
        said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    assert_eq!(completed, COMPLETIONS.map(|(_, completed)| completed));
}

#[test]
fn fish_completes_what_people_may_use() {
    let host = Host::new();
    let script = script(&host, "fish", "frazil.fish");
    for (typed, completed) in COMPLETIONS {
        let asked = format!("source {script}; complete -C 'frazil {typed}'");
        let Some(said) = shell("fish", &["--no-config", "-c", &asked]) else { return };
        let offered: Vec<&str> =
            said.lines().map(|line| line.split('\t').next().expect("a word")).collect();
        let last = completed.split(' ').next_back().expect("a word");
        assert_eq!(offered, [last], "{typed}");
    }
}

/// Returns all files in `folder`, at any depth, by their paths relative to `from`.
fn files(folder: &Path, from: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("it").path());
    let mut found: Vec<String> = entries
        .flat_map(|path| {
            if path.is_dir() {
                files(&path, from)
            } else {
                vec![path.strip_prefix(from).expect("below").display().to_string()]
            }
        })
        .collect();
    found.sort();
    found
}

#[test]
fn make_install_puts_everything_in_place() {
    let host = Host::new();
    // As if built already: the program in a release folder, and make told not to run `build`.
    let release = host.path("target dir/release");
    fs::create_dir_all(&release).expect("a folder");
    fs::copy(frazil(), release.join("frazil")).expect("it is copied");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let mut make = Command::new("make");
    make.args(["-s", "-o", "build", "install", "PREFIX=/usr"])
        .arg(format!("DESTDIR={}", host.path("root dir").display()))
        .env("CARGO_TARGET_DIR", host.path("target dir"))
        .env_remove("MAKEFLAGS")
        .current_dir(source);
    if Command::new("make").arg("--version").output().is_err() {
        eprintln!("SKIPPED: there is no make here");
        return;
    }
    finish(make, PATIENCE).expect_code(0);
    let root = host.path("root dir");
    let installed = files(&root, &root);
    for file in [
        "usr/bin/frazil",
        "usr/share/man/man1/frazil.1",
        "usr/share/man/man1/frazil-export.1",
        "usr/share/bash-completion/completions/frazil",
        "usr/share/zsh/site-functions/_frazil",
        "usr/share/fish/vendor_completions.d/frazil.fish",
    ] {
        assert!(installed.iter().any(|installed| installed == file), "{file} in {installed:?}");
    }
    assert_eq!(fs::metadata(root.join("usr/bin/frazil")).expect("it").mode() & 0o777, 0o755);
}

#[test]
fn colours_are_for_those_who_want_them() {
    let host = Host::new();
    let store =
        Store::open_or_create(&host.store_path(), StoreOptions::default()).expect("a store");
    let mut model = Model { regions: [("ram".to_owned(), vec![0; 100])].into() };
    let mut parent = None;
    for step in 0..2 {
        let edit = Edit { rounds: vec![("ram".into(), vec![(step, 5)])], step };
        parent = Some(take(&store, parent, &mut model, &edit).expect("it works").id);
    }
    let at = host.at("latest");
    let older = host.at("latest~1");
    for args in [&["diff", &older, "latest"][..], &["show", &at], &["log", &at, "--graph"]] {
        let plain = host.ok(args).stdout;
        assert!(!plain.contains('\u{1b}'), "{args:?}: {plain:?}");
        let with = |color: &str| host.ok(&[args, &["--color", color]].concat()).stdout;
        assert_eq!(with("never"), plain);
        let colored = with("always");
        assert!(colored.contains("\u{1b}[") && colored.contains("\u{1b}[0m"), "{args:?}");
        // Only the colours differ.
        let mut rest = String::new();
        for (index, part) in colored.split('\u{1b}').enumerate() {
            let text = if index == 0 { part } else { part.split_once('m').expect("a colour").1 };
            rest.push_str(text);
        }
        assert_eq!(rest, plain, "{args:?}");
    }
}
