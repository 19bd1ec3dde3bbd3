//! Copying, compressing and hashing pages.

use std::hint::black_box;

use frazil_snapstore::PAGE_SIZE;
use frazil_vmm::workload::spec::Content;

use crate::bench::Bench;
use crate::codec::{self, Cores};
use crate::content::{self, FRAME_BYTES};
use crate::metric::Metric;
use crate::raw::SharedMemory;
use crate::samples::Samples;

const CONTENTS: [(&str, Content); 2] = [("text", Content::Text), ("random", Content::Random)];

/// Copies guest RAM (a mapped memfd) to a buffer, as in a pause.
pub(super) fn copy(bench: &mut Bench) -> anyhow::Result<()> {
    let len = bench.sized(256 << 20, 16 << 20);
    let pages = len / PAGE_SIZE;
    let memory = SharedMemory::new(len)?;
    (0..pages).for_each(|page| memory.touch(page));
    let mut buffer = vec![1; len];
    memory.copy_out(0, &mut buffer);
    let mut times = Samples::new();
    for _ in 0..bench.runs(10) {
        times.time(|| memory.copy_out(0, black_box(&mut buffer)));
    }
    let us = times.us(0.5) / pages as f64;
    bench.emit(Metric::new("floors.memcpy_us_per_page", us, "us/page", times.n()))
}

/// zstd level 1 on frames of 16 pages, both ways.
pub(super) fn compression(bench: &mut Bench) -> anyhow::Result<()> {
    let len = bench.sized(128 << 20, 8 << 20);
    let runs = bench.runs(5);
    for (name, content) in CONTENTS {
        let raw = content::generate(content, len / PAGE_SIZE);
        for (cores_name, cores) in [("core", Cores::One), ("all", Cores::All)] {
            let (times, stored) = codec::compress_times(&raw, cores, runs)?;
            emit_codec(bench, &format!("zstd_{name}_{cores_name}"), &times, raw.len())?;
            if cores == Cores::One {
                let share = stored as f64 / raw.len() as f64;
                let metric = format!("floors.zstd_{name}_stored_share");
                bench.emit(Metric::new(metric, share, "stored/raw", 1))?;
            }
        }
        let frames = codec::compress(&raw)?;
        for (cores_name, cores) in [("core", Cores::One), ("all", Cores::All)] {
            let times = codec::decompress_times(&frames, cores, runs)?;
            emit_codec(bench, &format!("unzstd_{name}_{cores_name}"), &times, raw.len())?;
        }
    }
    Ok(())
}

fn emit_codec(bench: &mut Bench, name: &str, times: &Samples, len: usize) -> anyhow::Result<()> {
    let mb_s = times.per_second(len as f64 / 1e6);
    let us = times.us(0.5) / (len / PAGE_SIZE) as f64;
    bench.emit(Metric::new(format!("floors.{name}_mb_s"), mb_s, "MB/s", times.n()))?;
    bench.emit(Metric::new(format!("floors.{name}_us_per_page"), us, "us/page", times.n()))
}

/// BLAKE3 on one core: of raw frames, and of frames as stored (compressed).
pub(super) fn hashing(bench: &mut Bench) -> anyhow::Result<()> {
    let raw = content::generate(Content::Text, bench.sized(64 << 20, 4 << 20) / PAGE_SIZE);
    let whole: Vec<Vec<u8>> = raw.chunks(FRAME_BYTES).map(<[u8]>::to_vec).collect();
    let stored = codec::compress(&raw)?;
    for (name, frames) in [("frame", whole), ("stored_frame", stored)] {
        let len: usize = frames.iter().map(Vec::len).sum();
        let mut times = Samples::new();
        for _ in 0..bench.runs(10) {
            times.time(|| {
                for frame in &frames {
                    black_box(blake3::hash(frame));
                }
            });
        }
        let mb_s = times.per_second(len as f64 / 1e6);
        let metric = format!("floors.blake3_{name}_core_mb_s");
        bench.emit(Metric::new(metric, mb_s, "MB/s", times.n()))?;
    }
    Ok(())
}
