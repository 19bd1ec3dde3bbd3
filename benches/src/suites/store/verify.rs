//! Verifying a snapshot: every stored byte is read, hashed and decoded.

use std::time::{Duration, Instant};

use anyhow::ensure;
use frazil_snapstore::{PAGE_SIZE, VerifyProgress, verify};

use super::MIB;
use super::bed::Bed;
use crate::bench::Bench;
use crate::codec::{self, Cores};
use crate::content::FRAME_BYTES;
use crate::metric::{MIB_S, Metric};
use crate::samples::Samples;

/// Measures with the files dropped from the page cache, against the slower of processor and disk;
/// and with them cached, against the processor. The disk reads all the store's files, also
/// uncached; the processor hashes and decodes frames of the same contents.
pub(super) fn measure(bench: &mut Bench, bed: &mut Bed, frames: &[Vec<u8>]) -> anyhow::Result<()> {
    let none = Samples::new();
    let (mut cold, mut warm, mut cpu, mut disk) = (none.clone(), none.clone(), none.clone(), none);
    for _ in 0..bench.runs(3) {
        cpu.add_time(codec::time_check(frames, Cores::All)?);
        bed.evict()?;
        disk.add_time(bed.read_files()?);
        bed.evict()?;
        cold.add_time(verify_head(bed)?);
        cpu.add_time(codec::time_check(frames, Cores::All)?);
        warm.add_time(verify_head(bed)?);
    }
    let mib = bed.region_bytes() / MIB;
    let cpu_mib_s = cpu.per_second((frames.len() * FRAME_BYTES) as f64 / MIB);
    // The disk reads stored bytes; its speed is stated in the pages they stand for.
    let floor = cpu_mib_s.min(disk.per_second(mib));
    let metric = Metric::new("store.verify", cold.per_second(mib), MIB_S, cold.n());
    bench.emit(metric.against(floor))?;
    let metric = Metric::new("store.verify_warm", warm.per_second(mib), MIB_S, warm.n());
    bench.emit(metric.against(cpu_mib_s))
}

/// Verifies the newest snapshot through a new handle. Returns the time.
fn verify_head(bed: &mut Bed) -> anyhow::Result<Duration> {
    bed.close();
    let (store, head) = (bed.store()?, bed.head()?);
    let started = Instant::now();
    let report = verify(&store, &[head], &VerifyProgress::default())?;
    let took = started.elapsed();
    if let Some(damage) = report.damage.first() {
        anyhow::bail!("the store is damaged: {}", damage.error);
    }
    let expected = bed.pages() * PAGE_SIZE as u64;
    ensure!(
        report.page_bytes == expected,
        "verify: expected {expected} bytes of pages, found {}",
        report.page_bytes
    );
    Ok(took)
}
