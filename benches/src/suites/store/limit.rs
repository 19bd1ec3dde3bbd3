//! What zstd and the disk could do at best with the pages a store is given.

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

/// Pages, at most, that stand for all that are written: 512 MiB.
pub(super) const WRITE_SAMPLE_PAGES: u64 = 128 << 10;
/// Pages, at most, that stand for all that are read: 256 MiB.
pub(super) const READ_SAMPLE_PAGES: u64 = 64 << 10;

/// min(zstd on all cores, disk), in raw bytes: zstd in frames of the default size and nothing
/// else; the disk writing as many bytes as zstd leaves, and making them durable.
pub(super) struct WriteLimit {
    raw: Vec<u8>,
    zstd: Samples,
    disk: Samples,
}

impl WriteLimit {
    /// For `numbers` of `source`, or the first of them if they are many.
    pub(super) fn new(
        source: &dyn PageSource,
        numbers: impl Iterator<Item = u64>,
    ) -> anyhow::Result<Self> {
        let raw = contents(source, numbers.take(WRITE_SAMPLE_PAGES as usize))
            .context("cannot make pages")?;
        Ok(Self { raw, zstd: Samples::new(), disk: Samples::new() })
    }

    /// Measures once more, in `folder`.
    pub(super) fn measure(&mut self, folder: &Path) -> anyhow::Result<()> {
        let (took, stored_len) = codec::time_compress(&self.raw, Cores::All)?;
        self.zstd.add_time(took);
        self.disk.add_time(floors::sequential_write(folder, stored_len)?);
        Ok(())
    }

    /// The limit.
    pub(super) fn mib_s(&self) -> f64 {
        let mib = self.raw.len() as f64 / MIB;
        self.zstd.per_second(mib).min(self.disk.per_second(mib))
    }
}

/// The first `count` pages of `source` as zstd leaves them, in frames.
pub(super) fn stored_frames(source: &dyn PageSource, count: u64) -> anyhow::Result<Vec<Vec<u8>>> {
    codec::compress(&contents(source, 0..count).context("cannot make pages")?)
}

/// Bytes of zstd of `dirty`, in the frames that a store would make of it.
pub(super) fn compressed_len(source: &dyn PageSource, dirty: &PageSet) -> anyhow::Result<u64> {
    let numbers: Vec<u64> = dirty.iter().collect();
    codec::compressed_len(&frames(&numbers), |frame, raw| -> io::Result<()> {
        numbers[frame.clone()].iter().try_for_each(|page| append(source, *page, raw))
    })
}

/// As the store cuts pages into frames: full ones, that end where a full one would in memory
/// without gaps, if they are half full there.
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
