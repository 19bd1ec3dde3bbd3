//! Initial RAM disks: cpio archives in the format that Linux unpacks (`newc`). The same contents
//! always give the same bytes.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const DATA: u32 = 0o100_644;
const LINK: u32 = 0o120_777;

/// An archive in the making. All its entries belong to root and are dated 1970.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    there: BTreeSet<PathBuf>,
}

impl Archive {
    /// An empty archive.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a file with `contents` at the absolute `path`.
    ///
    /// # Panics
    /// If there is something at `path` already.
    pub fn data(&mut self, path: &str, contents: &[u8]) {
        self.enter(Path::new(path), DATA, contents);
    }

    /// As [`Self::data`], but makes the file executable.
    ///
    /// # Panics
    /// If there is something at `path` already.
    pub fn script(&mut self, path: &str, contents: &[u8]) {
        self.enter(Path::new(path), PROGRAM, contents);
    }

    /// Adds a symbolic link to `target` at `path`.
    ///
    /// # Panics
    /// If there is something at `path` already.
    pub fn link(&mut self, path: &str, target: &str) {
        self.enter(Path::new(path), LINK, target.as_bytes());
    }

    /// Adds this machine's program `from` at `path`, and the libraries it is linked with, where it
    /// looks for them.
    ///
    /// # Panics
    /// If it cannot be read, or needs libraries that are missing.
    pub fn program(&mut self, path: &str, from: &Path) {
        self.enter(Path::new(path), PROGRAM, &read(from));
        for library in libraries(from) {
            if !self.there.contains(&library) {
                let contents = read(&library);
                self.enter(&library, PROGRAM, &contents);
            }
        }
    }

    /// Returns the archive's bytes.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.record("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn enter(&mut self, path: &Path, mode: u32, contents: &[u8]) {
        let mut folders: Vec<&Path> = path.ancestors().skip(1).collect();
        folders.pop(); // the root needs no entry
        for folder in folders.into_iter().rev() {
            if self.there.insert(folder.to_owned()) {
                self.record(name(folder), FOLDER, &[]);
            }
        }
        assert!(self.there.insert(path.to_owned()), "{} is there already", path.display());
        self.record(name(path), mode, contents);
    }

    fn record(&mut self, name: &str, mode: u32, contents: &[u8]) {
        let links = if mode == FOLDER { 2 } else { 1 };
        let number = u32::try_from(self.there.len()).expect("few files");
        let size = u32::try_from(contents.len()).expect("small files");
        let name_size = u32::try_from(name.len() + 1).expect("short names");
        self.bytes.extend_from_slice(b"070701");
        // Inode, mode, user, group, links, time, size, two device numbers, name's size, no
        // checksum.
        for field in [number, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

fn name(path: &Path) -> &str {
    path.to_str().expect("UTF-8").trim_start_matches('/')
}

/// Reads a file of this machine.
pub(super) fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Returns the libraries that `ldd` says `program` is linked with; none if it is static.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().expect("ldd, a part of every libc");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(!text.contains("not found"), "{}: {text}", program.display());
    // `libz.so.1 => /lib/libz.so.1 (0x7f…)`, `/lib64/ld-linux-x86-64.so.2 (0x7f…)`
    text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_what_cpio_reads() {
        let mut archive = Archive::new();
        archive.data("/a/b/odd", b"12345");
        archive.script("/init", b"#!/bin/sh\n");
        archive.link("/a/link", "b/odd");
        let bytes = archive.finish();
        let text = String::from_utf8(bytes).expect("nothing but text in it");
        let names: Vec<&str> = text
            .split("070701")
            .skip(1)
            .map(|record| record[104..].split('\0').next().expect("a name"))
            .collect();
        assert_eq!(names, ["a", "a/b", "a/b/odd", "init", "a/link", "TRAILER!!!"]);
        assert_eq!(text.len() % 4, 0);
        // Header and name, 110 + 8 bytes, are padded to 120.
        assert!(text.contains("a/b/odd\x00\x00\x0012345"), "{text:?}");
        assert!(text.contains("12345\x00\x00\x00070701"), "{text:?}");
    }
}
