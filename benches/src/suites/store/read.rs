//! Reading a snapshot, by single random pages and everything in order. The page cache is warm.

use std::fs::File;
use std::hint::black_box;
use std::io::Write;
use std::os::unix::fs::FileExt;

use anyhow::Context;
use frazil_snapstore::{PAGE_SIZE, RegionReader, StoreOptions};

use super::MIB;
use super::bed::Bed;
use super::pages::random_pages;
use crate::bench::Bench;
use crate::codec::{self, Cores, Unpacker};
use crate::content::FRAME_BYTES;
use crate::metric::{MIB_S, Metric};
use crate::samples::Samples;

/// Bytes read at a time when everything is read.
const PIECE_BYTES: usize = 1 << 20;

/// Options of a store whose frame cache never has the frame that is read.
pub(super) fn uncached() -> StoreOptions {
    StoreOptions { frame_cache_bytes: 1, ..StoreOptions::default() }
}

/// Measures reading one page at a time, each from a frame that is not decoded yet; the floor does
/// the same by hand, on frames of the same contents in a plain file.
pub(super) fn single(bench: &mut Bench, bed: &mut Bed, frames: &[Vec<u8>]) -> anyhow::Result<()> {
    let by_hand = FrameFile::write(bed, frames)?;
    let count = bench.sized(5000, 500);
    let numbers = random_pages(bed.pages(), count, 1);
    bed.set_options(uncached());
    let reader = bed.reader()?;
    let mut unpacker = Unpacker::new().context("zstd failed")?;
    let (mut times, mut floor) = (Samples::new(), Samples::new());
    for page in numbers {
        add_read(&reader, page, &mut times)?;
        floor.time(|| by_hand.read_page(page, &mut unpacker)).context("cannot read a frame")?;
    }
    drop(reader);
    bed.set_options(StoreOptions::default());
    for (name, quantile) in [("p50", 0.5), ("p99", 0.99)] {
        let name = format!("store.read_page_{name}_us");
        let metric = Metric::new(name, times.us(quantile), "us", times.n());
        bench.emit(metric.against(floor.us(quantile)))?;
    }
    Ok(())
}

/// Times reading `page`.
pub(super) fn add_read(
    reader: &RegionReader,
    page: u64,
    times: &mut Samples,
) -> anyhow::Result<()> {
    let mut buf = [0; PAGE_SIZE];
    times.time(|| reader.read_page(page, black_box(&mut buf)))?;
    Ok(())
}

/// Measures reading all pages in order on one core; the floor is decompressing them on one core.
pub(super) fn sequential(
    bench: &mut Bench,
    bed: &mut Bed,
    frames: &[Vec<u8>],
) -> anyhow::Result<()> {
    let (mut times, mut floor) = (Samples::new(), Samples::new());
    for _ in 0..bench.runs(3) {
        floor.add_time(codec::time_decompress(frames, Cores::One)?);
        bed.close();
        let reader = bed.reader()?;
        times.time(|| read_everything(&reader))?;
        floor.add_time(codec::time_decompress(frames, Cores::One)?);
    }
    let mib_s = times.per_second(bed.region_bytes() / MIB);
    let floor_mib_s = floor.per_second((frames.len() * FRAME_BYTES) as f64 / MIB);
    bench.emit(Metric::new("store.read_seq", mib_s, MIB_S, times.n()).against(floor_mib_s))
}

fn read_everything(reader: &RegionReader) -> anyhow::Result<()> {
    let mut buffer = vec![1; PIECE_BYTES];
    let piece_pages = (PIECE_BYTES / PAGE_SIZE) as u64;
    for first in (0..reader.pages()).step_by(PIECE_BYTES / PAGE_SIZE) {
        let pages = piece_pages.min(reader.pages() - first);
        let piece = &mut buffer[..pages as usize * PAGE_SIZE];
        reader.read_pages(first, black_box(piece))?;
    }
    Ok(())
}

/// Frames in a file, and their places.
struct FrameFile {
    file: File,
    places: Vec<(u64, usize)>,
}

impl FrameFile {
    fn write(bed: &Bed, frames: &[Vec<u8>]) -> anyhow::Result<Self> {
        let mut file = tempfile::tempfile_in(bed.folder()).context("cannot create a file")?;
        let (mut places, mut offset) = (Vec::with_capacity(frames.len()), 0);
        for frame in frames {
            file.write_all(frame).context("cannot write a scratch file")?;
            places.push((offset, frame.len()));
            offset += frame.len() as u64;
        }
        Ok(Self { file, places })
    }

    /// Reads the frame of `page`, or one that stands for it, hashes and decodes it, and copies one
    /// page.
    fn read_page(&self, page: u64, unpacker: &mut Unpacker) -> std::io::Result<()> {
        let frame_pages = (FRAME_BYTES / PAGE_SIZE) as u64;
        let (offset, len) = self.places[(page / frame_pages) as usize % self.places.len()];
        let mut stored = vec![0; len];
        self.file.read_exact_at(&mut stored, offset)?;
        black_box(blake3::hash(&stored));
        let mut buf = [0; PAGE_SIZE];
        // The last frame may be shorter than the others.
        let pages = unpacker.unpack(&stored)?;
        let slot = (page % frame_pages) as usize % (pages.len() / PAGE_SIZE).max(1);
        black_box(&mut buf).copy_from_slice(&pages[slot * PAGE_SIZE..][..PAGE_SIZE]);
        Ok(())
    }
}
