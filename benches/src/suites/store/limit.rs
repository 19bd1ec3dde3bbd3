//! The best that zstd and the disk could do with the pages a store is given.

use std::io;
use std::ops::Range;
use std::path::Path;

use anyhow::Context;
use frazil_snapstore::{PageSet, PageSource};

use super::MIB;
use super::pages::{append, contents};
use crate::codec::{self, Cores};
use crate::content::FRAME_PAGES;
use crate::samples::Samples;
use crate::suites::floors;

/// The most pages sampled of those written: 512 MiB.
pub(super) const WRITE_SAMPLE_PAGES: u64 = 128 << 10;
/// The most pages sampled of those read: 256 MiB.
pub(super) const READ_SAMPLE_PAGES: u64 = 64 << 10;

/// The slower of zstd on all cores and the disk, in raw bytes: zstd in frames of the default size
/// and nothing else; the disk writing as many bytes as zstd leaves, and making them durable.
pub(super) struct WriteLimit {
    raw: Vec<u8>,
    zstd: Samples,
    disk: Samples,
}

impl WriteLimit {
    /// For the pages `numbers` of `source`, or the first of them if there are many.
    pub(super) fn new(
        source: &dyn PageSource,
        numbers: impl Iterator<Item = u64>,
    ) -> anyhow::Result<Self> {
        let raw = contents(source, numbers.take(WRITE_SAMPLE_PAGES as usize))
            .context("cannot make pages")?;
        Ok(Self { raw, zstd: Samples::new(), disk: Samples::new() })
    }

    /// Measures once more, with the disk of `folder`.
    pub(super) fn measure(&mut self, folder: &Path) -> anyhow::Result<()> {
        let (took, stored_len) = codec::time_compress(&self.raw, Cores::All)?;
        self.zstd.add_time(took);
        self.disk.add_time(floors::sequential_write(folder, stored_len)?);
        Ok(())
    }

    /// The limit in MiB/s.
    pub(super) fn mib_s(&self) -> f64 {
        let mib = self.raw.len() as f64 / MIB;
        self.zstd.per_second(mib).min(self.disk.per_second(mib))
    }
}

/// The first `count` pages of `source` in frames compressed by zstd.
pub(super) fn stored_frames(source: &dyn PageSource, count: u64) -> anyhow::Result<Vec<Vec<u8>>> {
    codec::compress(&contents(source, 0..count).context("cannot make pages")?)
}

/// The length of `dirty` compressed by zstd, in the frames that a store would make.
pub(super) fn compressed_len(source: &dyn PageSource, dirty: &PageSet) -> anyhow::Result<u64> {
    let numbers: Vec<u64> = dirty.iter().collect();
    codec::compressed_len(&frames(&numbers), |frame, raw| -> io::Result<()> {
        numbers[frame.clone()].iter().try_for_each(|page| append(source, *page, raw))
    })
}

/// Cuts pages into frames as the store does: a frame ends when it is full, or at a multiple of the
/// frame size if it is at least half full.
fn frames(numbers: &[u64]) -> Vec<Range<usize>> {
    let mut frames = Vec::new();
    let mut start = 0;
    for (index, page) in numbers.iter().enumerate() {
        let len = index - start;
        let aligned = page.is_multiple_of(FRAME_PAGES as u64);
        if len == FRAME_PAGES || (aligned && len >= FRAME_PAGES.div_ceil(2)) {
            frames.push(start..index);
            start = index;
        }
    }
    if start < numbers.len() {
        frames.push(start..numbers.len());
    }
    frames
}
