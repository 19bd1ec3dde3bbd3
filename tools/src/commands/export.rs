//! `frazil export`.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use frazil_snapstore::{ExportProgress, PAGE_SIZE, RegionReader, Snapshot};
use frazil_vmm::memory::RAM_REGION;
use serde_json::json;

use super::{export_tar, open_snapshot, print_json};
use crate::cli::{ExportArgs, ExportFormat, usage_error};
use crate::output;
use crate::snapshot_files::region_len_bytes;

pub(crate) fn export(args: &ExportArgs, json: bool) -> anyhow::Result<()> {
    if args.format == ExportFormat::Tar && args.region != RAM_REGION {
        let wrong =
            format!("--format tar is of all regions: --region {} has no part in it", args.region);
        return Err(usage_error("export", &wrong).into());
    }
    let is_file = args.file.as_os_str() != "-" || args.format == ExportFormat::Raw;
    if is_file && !args.force && args.file.symlink_metadata().is_ok() {
        bail!("{}: expected no such file, found one: --force replaces it", args.file.display());
    }
    match args.format {
        ExportFormat::Raw => export_raw(args, json),
        ExportFormat::Tar => export_tar::export(args, json),
    }
}

fn export_raw(args: &ExportArgs, json: bool) -> anyhow::Result<()> {
    let (_, snapshot) = open_snapshot(&args.snapshot)?;
    let region = find_region(&snapshot, &args.region)?;
    let len_bytes = region_len_bytes(&snapshot, &region)?;
    let started = Instant::now();
    let progress = ExportProgress::default();
    write_file(&args.file, &region, len_bytes, &progress)
        .with_context(|| format!("cannot export to {}", args.file.display()))?;
    let written = progress.pages_written.load(Ordering::Relaxed);
    if json {
        return print_json(&json!({
            "snapshot": snapshot.id(), "region": region.name(), "file": args.file, "bytes": len_bytes,
            "pages_written": written, "duration_us": started.elapsed().as_micros() as u64,
        }));
    }
    outln!(
        "{}: {} of `{}`, {} pages that are not zero, in {:.2} s",
        args.file.display(),
        output::bytes(len_bytes),
        region.name(),
        output::count(written),
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

fn find_region(snapshot: &Snapshot, name: &str) -> anyhow::Result<RegionReader> {
    let regions = &snapshot.manifest().regions;
    if !regions.iter().any(|region| region.name == name) {
        let names: Vec<_> = regions.iter().map(|region| region.name.as_str()).collect();
        bail!("--region {name}: expected one of {}", names.join(", "));
    }
    Ok(snapshot.region(name)?)
}

/// Writes beside the file and puts it in its place when it is whole.
fn write_file(
    path: &Path,
    region: &RegionReader,
    len_bytes: u64,
    progress: &ExportProgress,
) -> anyhow::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let file = tempfile::NamedTempFile::new_in(folder.unwrap_or_else(|| Path::new(".")))?;
    let bar = output::progress_bar("export", "pages");
    bar.set_length(len_bytes.div_ceil(PAGE_SIZE as u64));
    std::thread::scope(|scope| {
        let write =
            scope.spawn(|| frazil_snapstore::export(region, file.as_file(), len_bytes, progress));
        while !write.is_finished() {
            bar.set_position(progress.pages_done.load(Ordering::Relaxed));
            std::thread::sleep(Duration::from_millis(20));
        }
        bar.finish_and_clear();
        write.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}
