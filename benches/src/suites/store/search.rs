//! Searching a snapshot's memory, as `frazil inspect --search` and `--regex` do.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::ensure;
use frazil_snapstore::search::{Pattern, SearchProgress, search};
use frazil_snapstore::{PAGE_SIZE, StoreOptions};

use super::bed::Bed;
use super::pages::{Pool, all};
use super::{MIB, limit};
use crate::bench::Bench;
use crate::codec::{self, Cores};
use crate::content::FRAME_BYTES;
use crate::metric::{MIB_S, Metric};
use crate::samples::Samples;

/// Bytes that occur nowhere, so that all of memory is searched.
const NOWHERE: &[u8] = b"no such sentence";
/// Expressions that nothing matches: one with literal bytes that a match must have, one without.
const EXPRESSIONS: [(&str, &str); 2] =
    [("search_regex", "no such (sentence|word)s?"), ("search_regex_open", "[0-9a-f]{24}[G-Z]")];

/// The floor is decompressing the same frames on all cores, and nothing else.
pub(super) fn measure(bench: &mut Bench, pool: &Pool) -> anyhow::Result<()> {
    let bytes = bench.memory_sizes(1).last().copied().unwrap_or_default();
    let pages = (bytes / PAGE_SIZE as u64).max(1);
    let source = pool.at(1);
    let mut bed = Bed::new(bench, pages, StoreOptions::default())?;
    bench.say("writing a snapshot to search");
    bed.commit(&all(pages), &source)?;
    let frames = limit::stored_frames(&source, pages.min(limit::READ_SAMPLE_PAGES))?;
    let mut patterns = vec![("search", Pattern::bytes(NOWHERE)?)];
    for (name, expression) in EXPRESSIONS {
        patterns.push((name, Pattern::regex(expression)?));
    }
    for (name, pattern) in patterns {
        bench.say(name);
        let (mut ours, mut floor) = (Samples::new(), Samples::new());
        for _ in 0..bench.runs(5) {
            floor.add_time(codec::time_decompress(&frames, Cores::All)?);
            ours.add_time(time_search(&mut bed, &pattern)?);
        }
        let mib = bed.region_bytes() / MIB;
        let metric = Metric::new(format!("tools.{name}"), ours.per_second(mib), MIB_S, ours.n());
        let floor = floor.per_second((frames.len() * FRAME_BYTES) as f64 / MIB);
        bench.emit(metric.against(floor))?;
    }
    Ok(())
}

/// Searches the newest snapshot through a new handle, with nothing cached. Returns the time.
fn time_search(bed: &mut Bed, pattern: &Pattern) -> anyhow::Result<Duration> {
    bed.close();
    let region = bed.reader()?;
    let started = Instant::now();
    let all = 0..u64::MAX;
    let report = search(&region, all, pattern, 16, &SearchProgress::default(), &mut |_| {
        ControlFlow::Continue(())
    })?;
    let took = started.elapsed();
    ensure!(
        (report.matches, report.pages_read) == (0, bed.pages()),
        "search: expected no match in {} pages, found {} in {}",
        bed.pages(),
        report.matches,
        report.pages_read
    );
    Ok(took)
}
