//! A little fuzzing on every run: every parser of the store over its corpus and mutations of it,
//! and virtio devices under drivers that do anything. `cargo fuzz run TARGET` in `snapstore` and
//! `vmm` fuzzes at length.
//!
//! `cargo test -p frazil-tests --test fuzz_smoke -- --ignored` writes the corpus, from a store that
//! uses every feature of the format.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use frazil_snapstore::fuzzing::TARGETS;
use frazil_tests::fixture::everything;
use frazil_tests::format_reader::{BLOCK_HEADER_LEN, FILE_HEADER_LEN, payload_of, read_segment};
use frazil_tests::rng::Rng;

const MUTATIONS: u64 = 3000;
const DRIVERS: u64 = 500;

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../snapstore/fuzz/corpus").join(target)
}

/// Mutates `bytes`: changes bytes, inserts constants or a piece of `other`, cuts.
fn mutate(rng: &mut Rng, bytes: &mut Vec<u8>, other: &[u8]) {
    for _ in 0..=rng.below(4) {
        let len = bytes.len() as u64;
        let at = rng.below(len + 1) as usize;
        match rng.below(7) {
            0 if len > 0 => bytes[at.min(len as usize - 1)] ^= 1 << rng.below(8),
            1 if len > 0 => bytes[at.min(len as usize - 1)] = rng.bits() as u8,
            2 => bytes.truncate(at),
            3 => bytes.splice(at..at, [0xFF; 9]).for_each(drop),
            4 => bytes.splice(at..at, [0; 5]).for_each(drop),
            5 => {
                let from = rng.below(other.len() as u64 + 1) as usize;
                let piece = other[from..].iter().take(rng.below(40) as usize).copied();
                let piece: Vec<u8> = piece.collect();
                bytes.splice(at..at, piece).for_each(drop);
            }
            _ => {
                let end = (at + rng.below(20) as usize).min(len as usize);
                bytes.drain(at..end).for_each(drop);
            }
        }
    }
}

#[test]
fn parsers_refuse_or_understand_whatever_they_are_given() {
    for (name, target) in TARGETS {
        let files = fs::read_dir(corpus(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut paths: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
        paths.sort();
        let seeds: Vec<Vec<u8>> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
        assert!(!seeds.is_empty(), "{name} has a corpus");
        seeds.iter().for_each(|seed| target(seed));
        let mut rng = Rng::new(1);
        for _ in 0..MUTATIONS {
            let pick = |rng: &mut Rng| &seeds[rng.below(seeds.len() as u64) as usize];
            let (mut bytes, other) = (pick(&mut rng).clone(), pick(&mut rng));
            mutate(&mut rng, &mut bytes, other);
            target(&bytes);
        }
    }
}

/// The drivers need no corpus: any bytes are something that a driver does.
#[test]
fn devices_withstand_whatever_their_drivers_do() {
    for (_, target) in frazil_vmm::virtio::fuzzing::TARGETS {
        let mut rng = Rng::new(2);
        for _ in 0..DRIVERS {
            let len = rng.below(1200);
            let bytes: Vec<u8> = (0..len).map(|_| rng.bits() as u8).collect();
            target(&bytes);
        }
    }
}

#[test]
#[ignore = "writes the corpus"]
fn write_corpus() {
    let fixture = everything();
    let mut seeds: BTreeMap<&str, Vec<Vec<u8>>> = BTreeMap::new();
    let mut add = |target, bytes: &[u8]| seeds.entry(target).or_default().push(bytes.to_vec());
    let read = |name: &str| fs::read(fixture.folder.path().join(name)).unwrap();
    for name in ["FRAZIL", "journal"].into_iter().chain(fixture.segments.iter().map(String::as_str))
    {
        add("header", &read(name)[..FILE_HEADER_LEN]);
    }
    add("journal", &read("journal")[FILE_HEADER_LEN..]);
    for name in &fixture.segments {
        let bytes = read(name);
        for record in read_segment(&bytes) {
            let block = &bytes[record.offset..record.offset + record.len];
            let target = match record.kind {
                2 => "node",
                4 => "manifest",
                5 => "delta",
                6 => "fingerprints",
                7 => "pack_index",
                _ => "record",
            };
            add("record", block);
            if target != "record" {
                add(target, &payload_of(block));
            }
            assert!(block.len() >= BLOCK_HEADER_LEN);
        }
    }
    for text in ["latest", "st@latest~3", "gold~", "3f9a", "a@b/st@", "last=10,within=2h,daily=7"] {
        add("reference", text.as_bytes());
    }
    for (target, seeds) in seeds {
        fs::create_dir_all(corpus(target)).unwrap();
        for seed in seeds {
            let name = &frazil_snapstore::Hash::of(&seed).to_string()[..16];
            fs::write(corpus(target).join(name), seed).unwrap();
        }
    }
}
