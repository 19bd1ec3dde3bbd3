//! The disk under the store: streaming writes, and small durable appends.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use frazil_snapstore::PAGE_SIZE;
use frazil_vmm::workload::spec::Content;

use crate::bench::Bench;
use crate::content;
use crate::metric::Metric;
use crate::samples::Samples;

const BLOCK_BYTES: usize = 1 << 20;

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let folder = bench.scratch()?;
    let len = bench.sized(256 << 20, 8 << 20);
    let mut times = Samples::new();
    for _ in 0..bench.runs(5) {
        times.add_time(sequential_write(folder.path(), len)?);
    }
    let mb_s = times.per_second(len as f64 / 1e6);
    bench.emit(Metric::new("floors.disk_write_mb_s", mb_s, "MB/s", times.n()))?;

    let block = content::generate(Content::Random, 1);
    let (data, journal) = (create(folder.path(), "data")?, create(folder.path(), "journal")?);
    let (mut append, mut commit) = (Samples::new(), Samples::new());
    for _ in 0..bench.runs(200) {
        append.time(|| append_durably(&data, &block))?;
    }
    // As in a store's commit: first the data, then the journal that refers to it.
    for _ in 0..bench.runs(200) {
        commit.time(|| {
            append_durably(&data, &block).and_then(|()| append_durably(&journal, &block))
        })?;
    }
    bench.emit_times("floors.disk_append_4k", &append)?;
    bench.emit_times("floors.disk_commit_2_files", &commit)
}

/// Writes `len` incompressible bytes to a file and makes it durable. Returns the time.
pub(crate) fn sequential_write(folder: &Path, len: usize) -> anyhow::Result<Duration> {
    let block = content::generate(Content::Random, BLOCK_BYTES / PAGE_SIZE);
    let mut file = create(folder, "stream")?;
    let started = Instant::now();
    for _ in 0..len.div_ceil(BLOCK_BYTES) {
        file.write_all(&block).context("cannot write a scratch file")?;
    }
    file.sync_data().context("cannot sync a scratch file")?;
    let took = started.elapsed();
    std::fs::remove_file(folder.join("stream")).context("cannot remove a scratch file")?;
    Ok(took)
}

fn create(folder: &Path, name: &str) -> anyhow::Result<File> {
    let path = folder.join(name);
    File::create(&path).with_context(|| format!("cannot create {}", path.display()))
}

fn append_durably(mut file: &File, block: &[u8]) -> anyhow::Result<()> {
    file.write_all(block).context("cannot write a scratch file")?;
    file.sync_data().context("cannot sync a scratch file")
}
