//! How much of a page changes at a time, and the size of its difference against that of the page.

use frazil_snapstore::PAGE_SIZE;

use crate::bench::Bench;
use crate::codec::{self, Cores};
use crate::content::FRAME_BYTES;
use crate::metric::Metric;

const WORD_BYTES: usize = 8;
/// The most words that change in a page, for each class of edits.
const WORDS_MAX: [usize; 12] = [1, 2, 4, 8, 16, 24, 32, 40, 64, 128, 256, 512];
/// Bytes of pages compressed at a time: whole frames.
const BATCH_BYTES: usize = 64 * FRAME_BYTES;

/// Edits of pages, by the number of words that changed.
#[derive(Default)]
pub(super) struct Edits {
    classes: [Class; WORDS_MAX.len()],
}

#[derive(Default)]
struct Class {
    pages: u64,
    whole: Frames,
    difference: Frames,
}

impl Edits {
    /// Records an edit of a page.
    pub(super) fn add(&mut self, before: &[u8], after: &[u8]) -> anyhow::Result<()> {
        let words = before.chunks(WORD_BYTES).zip(after.chunks(WORD_BYTES));
        let changed = words.filter(|(before, after)| before != after).count();
        let index = WORDS_MAX.iter().position(|most| changed <= *most);
        let class = &mut self.classes[index.unwrap_or(WORDS_MAX.len() - 1)];
        class.pages += 1;
        class.whole.add(after.iter().copied())?;
        class.difference.add(before.iter().zip(after).map(|(before, after)| before ^ after))
    }

    /// Prints the share of edits that change at most so many words, and the bytes of a page's
    /// difference against those of the page. The reference to the difference's base is not
    /// included.
    pub(super) fn emit(mut self, bench: &mut Bench) -> anyhow::Result<()> {
        let total: u64 = self.classes.iter().map(|class| class.pages).sum();
        let (mut so_far, mut least) = (0, 1);
        for (class, most) in self.classes.iter_mut().zip(WORDS_MAX) {
            so_far += class.pages;
            let percent = so_far as f64 / total.max(1) as f64 * 100.0;
            let name = format!("store.images_edits_to_{most}_words");
            bench.emit(Metric::new(name, percent, "%", total))?;
            if class.pages > 0 {
                let [difference, whole] = [&mut class.difference, &mut class.whole];
                let difference = difference.bytes()? as f64 / class.pages as f64;
                let whole = whole.bytes()? as f64 / class.pages as f64;
                let name = format!("store.images_edit_{least}_{most}_words");
                let metric = Metric::new(name, difference, "bytes/page", class.pages);
                bench.emit(metric.against(whole))?;
            }
            least = most + 1;
        }
        Ok(())
    }
}

/// Counts the bytes that zstd makes of pages in frames, without keeping them.
#[derive(Default)]
struct Frames {
    raw: Vec<u8>,
    compressed: u64,
}

impl Frames {
    fn add(&mut self, page: impl Iterator<Item = u8>) -> anyhow::Result<()> {
        self.raw.extend(page.take(PAGE_SIZE));
        if self.raw.len() >= BATCH_BYTES {
            self.compress()?;
        }
        Ok(())
    }

    fn compress(&mut self) -> anyhow::Result<()> {
        self.compressed += codec::time_compress(&self.raw, Cores::All)?.1 as u64;
        self.raw.clear();
        Ok(())
    }

    fn bytes(&mut self) -> anyhow::Result<u64> {
        self.compress()?;
        Ok(self.compressed)
    }
}
