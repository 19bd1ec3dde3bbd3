//! zstd on frames, on one core or all: the limit of checkpoints, stores and eager resumes.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::Context;
use rayon::prelude::*;

use crate::content::FRAME_BYTES;
use crate::samples::Samples;

/// The default compression level of stores.
const LEVEL: i32 = 1;
/// Frames a worker takes at a time, to make the cost of its zstd context negligible.
const FRAMES_MIN: usize = 64;

/// How many cores to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cores {
    One,
    All,
}

struct Packer {
    zstd: zstd::bulk::Compressor<'static>,
    out: Vec<u8>,
}

impl Packer {
    fn new() -> std::io::Result<Self> {
        let out = vec![0; zstd::zstd_safe::compress_bound(FRAME_BYTES)];
        Ok(Self { zstd: zstd::bulk::Compressor::new(LEVEL)?, out })
    }

    fn pack(&mut self, frame: &[u8]) -> std::io::Result<&[u8]> {
        let len = self.zstd.compress_to_buffer(frame, &mut self.out)?;
        Ok(&self.out[..len])
    }
}

/// Decompresses frames of the default size.
pub(crate) struct Unpacker {
    zstd: zstd::bulk::Decompressor<'static>,
    out: Vec<u8>,
}

impl Unpacker {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self { zstd: zstd::bulk::Decompressor::new()?, out: vec![0; FRAME_BYTES] })
    }

    /// The pages of `frame`, valid until the next call.
    pub(crate) fn unpack(&mut self, frame: &[u8]) -> std::io::Result<&[u8]> {
        let len = self.zstd.decompress_to_buffer(frame, &mut self.out)?;
        Ok(&self.out[..len])
    }
}

/// Compresses `raw` in frames and discards the result. Returns the time and the compressed length.
pub(crate) fn time_compress(raw: &[u8], cores: Cores) -> anyhow::Result<(Duration, usize)> {
    let started = Instant::now();
    let len: std::io::Result<usize> = match cores {
        Cores::One => {
            let mut packer = Packer::new()?;
            raw.chunks(FRAME_BYTES).map(|frame| packer.pack(frame).map(<[u8]>::len)).sum()
        }
        Cores::All => raw
            .par_chunks(FRAME_BYTES)
            .with_min_len(FRAMES_MIN)
            .map_init(Packer::new, |packer, frame| match packer {
                Ok(packer) => packer.pack(frame).map(<[u8]>::len),
                Err(error) => Err(std::io::Error::other(error.to_string())),
            })
            .sum(),
    };
    Ok((started.elapsed(), len.context("zstd failed")?))
}

/// The frames of `raw`, compressed.
pub(crate) fn compress(raw: &[u8]) -> anyhow::Result<Vec<Vec<u8>>> {
    let mut packer = Packer::new()?;
    raw.chunks(FRAME_BYTES)
        .map(|frame| Ok(packer.pack(frame).context("zstd failed")?.to_vec()))
        .collect()
}

/// Compressed length of `frames`, on all cores; `read` reads each into an empty buffer.
pub(crate) fn compressed_len<T: Sync>(
    frames: &[T],
    read: impl Fn(&T, &mut Vec<u8>) -> std::io::Result<()> + Sync,
) -> anyhow::Result<u64> {
    let len: std::io::Result<u64> = frames
        .par_iter()
        .with_min_len(FRAMES_MIN)
        .map_init(
            || (Packer::new(), Vec::new()),
            |(packer, raw), frame| {
                raw.clear();
                read(frame, raw)?;
                match packer {
                    Ok(packer) => packer.pack(raw).map(|packed| packed.len() as u64),
                    Err(error) => Err(std::io::Error::other(error.to_string())),
                }
            },
        )
        .sum();
    len.context("zstd failed")
}

/// Decompresses `frames` and discards the result. Returns the time.
pub(crate) fn time_decompress(frames: &[Vec<u8>], cores: Cores) -> anyhow::Result<Duration> {
    time_unpacking(frames, cores, |unpacker, frame| unpacker.unpack(frame).map(|_pages| ()))
}

/// Hashes `frames` as stored and decompresses them, in one pass. Returns the time.
pub(crate) fn time_check(frames: &[Vec<u8>], cores: Cores) -> anyhow::Result<Duration> {
    time_unpacking(frames, cores, |unpacker, frame| {
        black_box(blake3::hash(frame));
        unpacker.unpack(frame).map(|_pages| ())
    })
}

fn time_unpacking(
    frames: &[Vec<u8>],
    cores: Cores,
    work: impl Fn(&mut Unpacker, &[u8]) -> std::io::Result<()> + Sync,
) -> anyhow::Result<Duration> {
    let started = Instant::now();
    let done: std::io::Result<()> = match cores {
        Cores::One => {
            let mut unpacker = Unpacker::new()?;
            frames.iter().try_for_each(|frame| work(&mut unpacker, frame))
        }
        Cores::All => frames
            .par_iter()
            .with_min_len(FRAMES_MIN)
            .map_init(Unpacker::new, |unpacker, frame| match unpacker {
                Ok(unpacker) => work(unpacker, frame),
                Err(error) => Err(std::io::Error::other(error.to_string())),
            })
            .collect(),
    };
    done.context("zstd failed")?;
    Ok(started.elapsed())
}

/// Repeats [`time_compress`] after one warm-up. Returns the times and the compressed length.
pub(crate) fn compress_times(
    raw: &[u8],
    cores: Cores,
    runs: usize,
) -> anyhow::Result<(Samples, usize)> {
    let mut times = Samples::new();
    let (_, len) = time_compress(raw, cores)?;
    for _ in 0..runs {
        times.add_time(time_compress(raw, cores)?.0);
    }
    Ok((times, len))
}

/// Repeats [`time_decompress`] after one warm-up.
pub(crate) fn decompress_times(
    frames: &[Vec<u8>],
    cores: Cores,
    runs: usize,
) -> anyhow::Result<Samples> {
    let mut times = Samples::new();
    time_decompress(frames, cores)?;
    for _ in 0..runs {
        times.add_time(time_decompress(frames, cores)?);
    }
    Ok(times)
}
