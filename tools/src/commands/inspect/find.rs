//! `frazil inspect --search` and `--regex`.

use std::cell::Cell;
use std::ops::{ControlFlow, Range};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use frazil_snapstore::search::{Match, Pattern, SearchProgress, SearchReport, search};
use frazil_snapstore::{PAGE_SIZE, RegionReader, Snapshot, StoreError};
use frazil_vmm::inspect::SnapshotMemory;
use frazil_vmm::memory::RAM_REGION;
use serde_json::json;

use super::{break_on_error, hex, printable};
use crate::cli::InspectArgs;
use crate::output;

/// Bytes to show before and after a match, by default.
const CONTEXT_BYTES: u16 = 16;

pub(super) fn find(args: &InspectArgs, snapshot: &Snapshot, json: bool) -> anyhow::Result<()> {
    let pattern = match (&args.search, &args.regex) {
        (Some(what), _) => Pattern::bytes(&bytes_of(what)?)?,
        (None, Some(expression)) => Pattern::regex(expression)?,
        (None, None) => bail!("expected --search or --regex"),
    };
    let region = snapshot.region(args.region.as_deref().unwrap_or(RAM_REGION))?;
    let started = Instant::now();
    let report = run(args, &region, &parts(snapshot, &region)?, &pattern, json)?;
    if !json {
        errln!(
            "{} matches; {} of `{}` searched in {}",
            output::count(report.matches),
            output::bytes(report.pages_read * PAGE_SIZE as u64),
            region.name(),
            output::micros(started.elapsed().as_micros() as u64),
        );
    }
    Ok(())
}

/// The parts of `region` to search, in bytes: for memory, the ranges of RAM. Nothing is found in
/// the holes between them, and no match spans a hole.
fn parts(snapshot: &Snapshot, region: &RegionReader) -> anyhow::Result<Vec<Range<u64>>> {
    if region.name() != RAM_REGION {
        return Ok(std::iter::once(0..region.pages() * PAGE_SIZE as u64).collect());
    }
    let memory = SnapshotMemory::open(snapshot)?;
    let ranges = memory.ranges().iter();
    Ok(ranges.map(|range| range.gpa..range.gpa + range.len_bytes).collect())
}

/// The bytes to search for, from the argument of `--search`.
fn bytes_of(what: &str) -> anyhow::Result<Vec<u8>> {
    if let Some(digits) = what.strip_prefix("hex:") {
        return hex_bytes(digits).with_context(|| format!("--search {what}"));
    }
    if let Some(text) = what.strip_prefix("utf16:") {
        return Ok(text.encode_utf16().flat_map(u16::to_le_bytes).collect());
    }
    Ok(what.strip_prefix("text:").unwrap_or(what).as_bytes().to_vec())
}

fn hex_bytes(digits: &str) -> anyhow::Result<Vec<u8>> {
    let digits: Vec<char> = digits.chars().filter(|c| !matches!(c, ' ' | ':' | '_')).collect();
    let values: Option<Vec<u32>> = digits.iter().map(|digit| digit.to_digit(16)).collect();
    match values {
        Some(values) if values.len() % 2 == 0 => {
            Ok(values.chunks(2).map(|pair| (pair[0] << 4 | pair[1]) as u8).collect())
        }
        _ => bail!("expected pairs of hex digits, such as hex:dead_beef"),
    }
}

fn run(
    args: &InspectArgs,
    region: &RegionReader,
    parts: &[Range<u64>],
    pattern: &Pattern,
    json: bool,
) -> anyhow::Result<SearchReport> {
    let progress = SearchProgress::default();
    let bar = output::progress_bar("search", "pages");
    bar.set_length(parts.iter().map(|part| (part.end - part.start) / PAGE_SIZE as u64).sum());
    let most = args.max_count.unwrap_or(u64::MAX);
    let mut count = 0;
    let (done, wait) = crossbeam_channel::bounded::<()>(0);
    let report = std::thread::scope(|scope| {
        let (bar, progress) = (&bar, &progress);
        scope.spawn(move || {
            while let Err(crossbeam_channel::RecvTimeoutError::Timeout) =
                wait.recv_timeout(Duration::from_millis(50))
            {
                bar.set_position(progress.pages_done.load(Ordering::Relaxed));
            }
        });
        let context = args.context.unwrap_or(CONTEXT_BYTES).into();
        let is_over = Cell::new(false);
        let mut on_match = |found: Match<'_>| {
            count += 1;
            let printed = bar.suspend(|| print(region, &found, json));
            is_over.set(count >= most || break_on_error(printed).is_break());
            if is_over.get() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let report = parts.iter().try_fold(SearchReport::default(), |sum, part| {
            if is_over.get() {
                return Ok(sum);
            }
            let found = search(region, part.clone(), pattern, context, progress, &mut on_match)?;
            Ok(add(sum, found))
        });
        drop(done);
        report
    });
    bar.finish_and_clear();
    report.map_err(|error: StoreError| error.into())
}

fn add(a: SearchReport, b: SearchReport) -> SearchReport {
    let (matches, pages_read) = (a.matches + b.matches, a.pages_read + b.pages_read);
    SearchReport { matches, pages_read }
}

fn print(region: &RegionReader, found: &Match<'_>, json: bool) -> std::io::Result<()> {
    let Match { offset, bytes, before, after } = *found;
    if json {
        let place = if region.name() == RAM_REGION { "gpa" } else { "offset" };
        let object = json!({
            "region": region.name(), place: format!("{offset:#x}"), "len": bytes.len(),
            "match": hex(bytes), "text": String::from_utf8_lossy(bytes),
            "before": hex(before), "after": hex(after),
        });
        return output::try_line(format_args!("{object}"));
    }
    let text = [before, bytes, after].map(printable);
    output::try_line(format_args!("{offset:#014x}  {}[{}]{}", text[0], text[1], text[2]))
}
