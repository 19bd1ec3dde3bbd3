//! The shape of the sources: which room may depend on which, how long files may be, that
//! dependencies and unsafe code give their reasons. Limits go down, never up.

use std::fs;
use std::path::{Path, PathBuf};

/// The most lines a source file may have.
const FILE_LINES_MAX: usize = 600;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate is in the workspace")
        .to_path_buf()
}

fn sources(folder: &Path, out: &mut Vec<PathBuf>) {
    let entries =
        fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    for entry in entries {
        let path = entry.expect("a readable folder").path();
        if path.is_dir() {
            // The fuzz targets are a workspace of their own.
            if !path.ends_with("target") {
                sources(&path, out);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            out.push(path);
        }
    }
}

fn room(name: &str) -> Vec<PathBuf> {
    let mut out = Vec::new();
    sources(&root().join(name), &mut out);
    assert!(!out.is_empty(), "{name} has sources");
    out
}

#[test]
fn files_fit_a_sitting() {
    let rooms = ["snapstore", "vmm", "tools", "benches", "tests"];
    let long: Vec<String> = rooms
        .iter()
        .flat_map(|name| room(name))
        .filter_map(|path| {
            let lines = fs::read_to_string(&path).expect("readable").lines().count();
            (lines > FILE_LINES_MAX).then(|| format!("{} has {lines} lines", path.display()))
        })
        .collect();
    assert!(long.is_empty(), "at most {FILE_LINES_MAX} lines: {long:#?}");
}

#[test]
fn arrows_go_one_way() {
    let forbidden = [
        ("snapstore", &["frazil-vmm", "frazil-tools", "kvm-", "vm-memory"][..]),
        ("vmm", &["frazil-tools"][..]),
    ];
    for (name, crates) in forbidden {
        let manifest = fs::read_to_string(root().join(name).join("Cargo.toml")).expect("readable");
        for dependency in crates {
            let found = manifest.lines().find(|line| line.starts_with(dependency));
            assert!(found.is_none(), "{name} must not depend on {dependency}: {found:?}");
        }
    }
}

#[test]
fn the_store_knows_nothing_of_machines() {
    for path in room("snapstore") {
        let text = fs::read_to_string(&path).expect("readable").to_lowercase();
        for word in ["kvm", "virtio", "kernel image"] {
            assert!(!text.contains(word), "{} mentions {word}", path.display());
        }
    }
}

#[test]
fn unsafe_is_only_where_it_says_why() {
    for path in ["snapstore", "vmm", "tools", "benches", "tests"].iter().flat_map(|name| room(name))
    {
        let text = fs::read_to_string(&path).expect("readable");
        let opts_in = text.lines().any(|line| line == "#![allow(unsafe_code)]");
        let says_why = text
            .lines()
            .take_while(|line| line.starts_with("//!"))
            .any(|line| line.contains("`unsafe`"));
        assert!(!opts_in || says_why, "{} allows unsafe code and does not say why", path.display());
    }
}

#[test]
fn every_dependency_says_why_it_is_there() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).expect("readable");
    let section = manifest.split("[workspace.dependencies]").nth(1).expect("a section");
    let section = section.split("\n[").next().expect("its end");
    for line in section.lines().filter(|line| line.contains(" = ")) {
        let ours = line.starts_with("frazil-");
        assert!(ours || line.contains("# "), "no reason: {line}");
        assert!(ours || line.contains("\"="), "not pinned: {line}");
    }
}
