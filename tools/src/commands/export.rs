//! `frazil export`.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, bail};
use frazil_snapstore::search::SearchProgress;
use frazil_snapstore::{ExportProgress, PAGE_SIZE, RegionReader, Snapshot};
use frazil_vmm::inspect::{CoreReport, GuestView, write_core};
use frazil_vmm::memory::RAM_REGION;
use serde_json::{Value, json};

use super::export_stream::{self, Contents, Extents, WRITE_BYTES};
use super::{export_tar, open_snapshot, print_json};
use crate::cli::{ExportArgs, ExportFormat, usage_error};
use crate::new_file::NewFile;
use crate::output;
use crate::snapshot_files::region_len_bytes;

pub(crate) fn export(args: &ExportArgs, json: bool) -> anyhow::Result<()> {
    let all = match args.format {
        ExportFormat::Raw => None,
        ExportFormat::Tar => Some("--format tar exports all regions"),
        ExportFormat::ElfCore => Some("--format elf-core exports the whole machine"),
    };
    if let Some(all) = all.filter(|_| args.region != RAM_REGION) {
        let wrong = format!("{all}: leave out --region {}", args.region);
        return Err(usage_error("export", &wrong).into());
    }
    let make = match args.format {
        ExportFormat::Raw if args.to_stdout() => return raw_to_stdout(args),
        ExportFormat::ElfCore if args.to_stdout() => {
            let wrong = "--format elf-core: expected a file, found `-`: a core file has holes, and \
                         is not written in order";
            return Err(usage_error("export", wrong).into());
        }
        ExportFormat::Raw => raw,
        ExportFormat::ElfCore => elf_core,
        ExportFormat::Tar => return export_tar::export(args, json),
    };
    let (_, snapshot) = open_snapshot(&args.snapshot)?;
    let started = Instant::now();
    let exported = make(args, &snapshot)?;
    if json {
        let mut object = json!({
            "snapshot": snapshot.id(), "region": args.region, "file": args.file, "bytes": exported.bytes,
            "pages_written": exported.pages_written, "duration_us": started.elapsed().as_micros() as u64,
        });
        if let (Some(object), Some(more)) = (object.as_object_mut(), exported.more.as_object()) {
            object.extend(more.clone());
        }
        return print_json(&object);
    }
    outln!(
        "{}: {}{}, {} not zero, in {:.2} s",
        args.file.display(),
        output::bytes(exported.bytes),
        exported.what,
        output::counted(exported.pages_written, "page"),
        started.elapsed().as_secs_f64()
    );
    exported.notes.iter().for_each(|note| outln!("  {note}"));
    Ok(())
}

/// The result of an export.
struct Exported {
    bytes: u64,
    pages_written: u64,
    /// For people, after the size.
    what: String,
    /// For people, one line each.
    notes: Vec<String>,
    /// Further fields of the JSON output.
    more: Value,
}

fn raw(args: &ExportArgs, snapshot: &Snapshot) -> anyhow::Result<Exported> {
    let region = find_region(snapshot, &args.region)?;
    let bytes = region_len_bytes(snapshot, &region)?;
    let progress = ExportProgress::default();
    let pages = bytes.div_ceil(PAGE_SIZE as u64);
    write_file(args, pages, &progress.pages_done, |file| {
        Ok(frazil_snapstore::export(&region, file, bytes, &progress)?)
    })?;
    Ok(Exported {
        bytes,
        pages_written: progress.pages_written.load(Ordering::Relaxed),
        what: format!(" of `{}`", region.name()),
        notes: Vec::new(),
        more: Value::Null,
    })
}

fn elf_core(args: &ExportArgs, snapshot: &Snapshot) -> anyhow::Result<Exported> {
    let view = GuestView::open(snapshot)?;
    let progress = ExportProgress::default();
    let pages = view.machine().ram_bytes / PAGE_SIZE as u64;
    let report = write_file(args, pages, &progress.pages_done, |file| {
        Ok(write_core(&view, file, &SearchProgress::default(), &progress)?)
    })?;
    let CoreReport { file_bytes, loads, all_mapped, kernel, direct_map } = report;
    let map = direct_map.map(|base| format!("{base:#x}"));
    let mut notes = vec![match &kernel {
        Some(kernel) => format!("Linux {}, for crash, drgn and gdb", kernel.info.release()),
        None => "no Linux kernel found in memory: for gdb only".to_owned(),
    }];
    if !all_mapped {
        let what = "too much is mapped: gdb sees part of it by virtual address, and all by \
                    physical address";
        notes.push(what.to_owned());
    }
    let cpus = view.vcpus().len();
    Ok(Exported {
        bytes: file_bytes,
        pages_written: progress.pages_written.load(Ordering::Relaxed),
        what: format!(", {}", output::counted(cpus as u64, "vCPU")),
        notes,
        more: json!({
            "format": "elf-core", "cpus": cpus, "loads": loads, "all_mapped": all_mapped,
            "kernel": kernel.map(|kernel| json!({
                "release": kernel.info.release(), "offset_bytes": kernel.offset_bytes,
                "vmcoreinfo_gpa": format!("{:#x}", kernel.note_gpa),
            })),
            "direct_map": map,
        }),
    })
}

fn find_region(snapshot: &Snapshot, name: &str) -> anyhow::Result<RegionReader> {
    let regions = &snapshot.manifest().regions;
    if !regions.iter().any(|region| region.name == name) {
        let names: Vec<_> = regions.iter().map(|region| region.name.as_str()).collect();
        bail!("--region {name}: expected one of {}", names.join(", "));
    }
    Ok(snapshot.region(name)?)
}

/// Has `write` write the file, and gives it its name once it is complete.
fn write_file<T: Send>(
    args: &ExportArgs,
    pages: u64,
    pages_done: &AtomicU64,
    write: impl FnOnce(&File) -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    let file = NewFile::create(&args.file, args.force, NewFile::PRIVATE)?;
    let written = output::with_progress_bar("export", "pages", pages, pages_done, || {
        write(file.file()).with_context(|| format!("cannot export to {}", args.file.display()))
    })?;
    file.publish()?;
    Ok(written)
}

/// Writes a region as a plain stream of bytes, zeros included: a pipe has no holes.
fn raw_to_stdout(args: &ExportArgs) -> anyhow::Result<()> {
    let (_, snapshot) = open_snapshot(&args.snapshot)?;
    let region = find_region(&snapshot, &args.region)?;
    let mut out = BufWriter::with_capacity(WRITE_BYTES, export_stream::stdout("a region")?);
    let extents = Extents::all(region_len_bytes(&snapshot, &region)?);
    let done = AtomicU64::new(0);
    output::with_progress_bar("export", "pages", extents.pages(), &done, || {
        let mut contents = Contents::new(&region, &extents, Vec::new(), &done);
        let copied = io::copy(&mut contents, &mut out).and_then(|_| out.flush());
        match (contents.failed, copied) {
            (Some(error), _) => Err(error.into()),
            (None, Ok(())) => Ok(()),
            (None, Err(error)) => Err(error).context("cannot write to standard output"),
        }
    })
}
