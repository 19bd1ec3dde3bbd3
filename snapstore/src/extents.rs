//! Where a region has contents and where it is zero, according to its tree: no page is read.

use std::ops::ControlFlow;

use crate::error::Result;
use crate::node::{LEAF_PAGES, Run, span_pages};
use crate::snapshot::RegionReader;

/// The most pages looked up at once: the span of a node right above the leaves.
const WINDOW_PAGES_MAX: u64 = span_pages(1);

impl RegionReader {
    /// Calls `visit` with every run with contents from page `from` on, ascending, until it breaks.
    /// Holds the runs of at most 128 MiB of the region at a time; a run that continues from one
    /// such stretch to the next comes in two parts.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`](crate::StoreError::Corrupt) if a node on the way is damaged.
    pub fn visit_runs<B>(
        &self,
        from: u64,
        mut visit: impl FnMut(Run) -> ControlFlow<B>,
    ) -> Result<Option<B>> {
        // Small at first: usually, what the caller looks for is near.
        let (mut at, mut window) = (from, LEAF_PAGES);
        while at < self.pages() {
            let end = (at / window + 1) * window;
            for run in self.runs(at, end - at)? {
                if let ControlFlow::Break(found) = visit(run) {
                    return Ok(Some(found));
                }
            }
            at = end;
            window = (window * 4).min(WINDOW_PAGES_MAX);
        }
        Ok(None)
    }

    /// The first page from `from` on that has contents, if any has.
    ///
    /// # Errors
    /// As [`Self::visit_runs`].
    pub fn next_contents(&self, from: u64) -> Result<Option<u64>> {
        self.visit_runs(from, |run| ControlFlow::Break(run.first))
    }

    /// The first page from `from` on that is zero; pages past the end of the region count as zero.
    ///
    /// # Errors
    /// As [`Self::visit_runs`].
    pub fn next_zero(&self, from: u64) -> Result<u64> {
        let mut end = from;
        let _gap = self.visit_runs(from, |run| {
            if run.first > end {
                return ControlFlow::Break(());
            }
            end = run.end();
            ControlFlow::Continue(())
        })?;
        Ok(end)
    }

    /// Number of pages with contents.
    ///
    /// # Errors
    /// As [`Self::visit_runs`].
    pub fn contents_pages(&self) -> Result<u64> {
        let mut count = 0;
        let _to_the_end = self.visit_runs(0, |run| {
            count += run.count;
            ControlFlow::<()>::Continue(())
        })?;
        Ok(count)
    }
}
