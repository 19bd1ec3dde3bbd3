//! What people read of the command before they use it: help, man pages, completion; and its colours.

use std::fs;
use std::process::Command;

use frazil_snapstore::{Store, StoreOptions};
use frazil_tests::oracle::{Edit, Model, take};
use frazil_tests::vm_harness::Host;

/// Everything that `frazil help` lists, as its lines have it.
fn commands(help: &str) -> Vec<&str> {
    let listed = help.split("what is the same everywhere").next().expect("it is there");
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
    let folder = host.path("man/man1").display().to_string();
    let written = host.json(&["man", &folder]);
    let help = host.ok(&["help"]).stdout;
    for command in commands(&help).into_iter().filter(|command| *command != "help") {
        let page = format!("frazil-{command}.1");
        let text = fs::read_to_string(host.path("man/man1").join(&page)).expect("it is there");
        assert!(text.contains(".TH ") && text.contains(command), "{page}");
        let listed = written["pages"].as_array().expect("a list");
        assert!(listed.iter().any(|listed| *listed == page), "{written}");
    }
    assert!(!host.path("man/man1/frazil-pager.1").exists());
}

#[test]
fn shells_complete_what_people_may_use() {
    let host = Host::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = host.ok(&["completion", shell]).stdout;
        assert!(script.contains("checkpoint") && script.contains("heatmap"), "{shell}");
        assert!(!script.contains("memory-from"), "{shell}: hidden options are not for people");
    }
    let script = host.path("frazil.bash");
    fs::write(&script, host.ok(&["completion", "bash"]).stdout).expect("a file");
    let asked = "source \"$1\"; COMP_WORDS=(frazil mo); COMP_CWORD=1; _frazil frazil mo frazil; \
                 echo \"${COMPREPLY[@]}\"";
    let answer = Command::new("bash").args(["-c", asked, "-"]).arg(&script).output();
    let answer = answer.expect("there is a bash");
    assert_eq!(String::from_utf8_lossy(&answer.stdout).trim(), "mount", "{answer:?}");
    host.frazil(&["completion", "tcsh"]).expect_code(2).expect_says(&["bash"]);
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
        // Nothing but the colours is different.
        let mut rest = String::new();
        for (index, part) in colored.split('\u{1b}').enumerate() {
            let text = if index == 0 { part } else { part.split_once('m').expect("a colour").1 };
            rest.push_str(text);
        }
        assert_eq!(rest, plain, "{args:?}");
    }
}
