//! `frazil import`: other programs' files as a snapshot.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use frazil_snapstore::{
    Committed, Description, PAGE_SIZE, Page, PageSet, PageSource, Snapshot, StateChunk, Store,
    StoreOptions, Transaction, WriteStats, reference,
};
use frazil_vmm::disk::{DISK_MAX_BYTES, SECTOR_BYTES, SavedDisk, disk_name};
use frazil_vmm::memory::{HOLE_END, HOLE_START, RAM_MAX_BYTES, RAM_REGION};
use frazil_vmm::state::{Saved, chunk};
use rustix::fs::SeekFrom;
use serde_json::{Value, json};

use super::{default_store, print_json, same_folder};
use crate::cli::{Gap, ImportArgs};
use crate::new_file::kind_name;
use crate::output;

const PAGE_BYTES: u64 = PAGE_SIZE as u64;
/// The end of the largest machine's memory, which has a hole for devices.
const MEMORY_MAX_BYTES: u64 = RAM_MAX_BYTES + (HOLE_END - HOLE_START);

pub(crate) fn import(args: &ImportArgs, json: bool) -> anyhow::Result<()> {
    let started = Instant::now();
    let sources = open_sources(args)?;
    let (store, base) = open_store(args)?;
    let mut transaction = store.begin(base.as_ref().map(Snapshot::id))?;
    let mut written = Vec::with_capacity(sources.len());
    for source in &sources {
        let pages = source.pages_to_write(base.as_ref(), args.diff)?;
        let region = transaction
            .region(&source.region, source.region_pages())
            .with_context(|| format!("cannot import {}", source.path.display()))?;
        let stats = with_progress(&mut transaction, |transaction| {
            transaction.write_pages(region, &pages, source)
        });
        // If the file shrank, reading it failed: this check gives the reason.
        source.check_unchanged()?;
        written.push(stats?);
    }
    sources.iter().try_for_each(Source::check_unchanged)?;
    let state = state(&mut transaction, base.as_ref(), &sources, args.keep_state)?;
    let described = describe(args, base.as_ref(), &sources, &written, state);
    let committed = transaction.commit(described)?;
    if let Some(failure) = &committed.tag_failure {
        errln!("frazil: the snapshot was published, but its tag was not set: {failure}");
    }
    print_result(&store, base.as_ref(), &sources, &written, &committed, started.elapsed(), json)
}

fn open_store(args: &ImportArgs) -> anyhow::Result<(Arc<Store>, Option<Snapshot>)> {
    let options = StoreOptions { compression_level: args.compression, ..StoreOptions::default() };
    let Some(base) = &args.base else {
        let path = args.store.clone().unwrap_or_else(default_store);
        return Ok((Store::open_or_create(&path, options)?, None));
    };
    let (named, reference) = reference::split(base);
    let path = match (named.map(Path::new), &args.store) {
        (Some(named), Some(store)) if !same_folder(named, store) => {
            bail!("--base {base}: expected a snapshot of --store, {}", store.display())
        }
        (Some(named), _) => named.to_path_buf(),
        (None, store) => store.clone().unwrap_or_else(default_store),
    };
    let store = Store::open(&path, options)?;
    let base = store.pin(store.resolve(reference)?.id)?;
    Ok((store, Some(base)))
}

/// A file, and the region it becomes.
struct Source {
    path: PathBuf,
    file: File,
    /// As returned by [`written()`]; None for a device.
    written: Option<(i64, i64, u64)>,
    len_bytes: u64,
    region: String,
    /// For memory: the gap that the region has and the file leaves out.
    gap: Option<Gap>,
    is_disk: bool,
}

fn open_sources(args: &ImportArgs) -> anyhow::Result<Vec<Source>> {
    let memory = args.memory.iter().map(|path| (path, RAM_REGION.to_owned(), args.gap, false));
    let disks = args.disks.iter().enumerate();
    let disks = disks.map(|(index, path)| (path, disk_name(index), None, true));
    memory
        .chain(disks)
        .map(|(path, region, gap, is_disk)| Source::open(path, region, gap, is_disk))
        .collect()
}

/// Bytes at the start of a file by which formats are recognised.
const FORMAT_BYTES: u64 = 8;
/// Disk formats that are not raw.
const DISK_FORMATS: &[(&[u8], &str)] = &[
    (b"QFI\xfb", "a qcow2 image (`qemu-img convert -O raw`)"),
    (b"KDMV", "a VMDK image (`qemu-img convert -O raw`)"),
    (b"vhdxfile", "a VHDX image (`qemu-img convert -O raw`)"),
    (b"conectix", "a VHD image (`qemu-img convert -O raw`)"),
];
/// Memory formats that are not raw.
const MEMORY_FORMATS: &[(&[u8], &str)] = &[
    (b"\x7fELF", "an ELF core file"),
    (b"KDUMP   ", "a kdump file"),
    (b"QEVM", "a QEMU migration stream"),
];

/// The time of a file's last write, and its length; None for a device.
fn written(file: &File) -> io::Result<Option<(i64, i64, u64)>> {
    let metadata = file.metadata()?;
    let when = || (metadata.mtime(), metadata.mtime_nsec(), metadata.len());
    Ok(metadata.is_file().then(when))
}

impl Source {
    fn open(path: &Path, region: String, gap: Option<Gap>, is_disk: bool) -> anyhow::Result<Self> {
        let what = path.display();
        let failed = || format!("cannot import {what}");
        // Checked before opening: opening a pipe that nobody writes to would block.
        let kind = path.metadata().with_context(failed)?.file_type();
        ensure!(
            kind.is_file() || kind.is_block_device(),
            "{what}: expected a file or a block device, found {}: write what comes from a pipe to \
             a file first",
            kind_name(kind)
        );
        let file = File::open(path).with_context(failed)?;
        let written = written(&file).with_context(failed)?;
        // Seeking works for block devices too, whose metadata has no length.
        let len_bytes = rustix::fs::seek(&file, SeekFrom::End(0)).with_context(failed)?;
        let (unit, most) =
            if is_disk { (SECTOR_BYTES, DISK_MAX_BYTES) } else { (PAGE_BYTES, MEMORY_MAX_BYTES) };
        ensure!(
            (1..=most).contains(&len_bytes) && len_bytes.is_multiple_of(unit),
            "{what}: expected a multiple of {unit} bytes, at most {most}, found {len_bytes}: is it a raw {}?",
            if is_disk {
                "disk image (`qemu-img convert -O raw` makes one)"
            } else {
                "memory file"
            }
        );
        let source = Self { path: path.to_owned(), file, written, len_bytes, region, gap, is_disk };
        let end_bytes = source.region_pages().saturating_mul(PAGE_BYTES);
        ensure!(
            is_disk || end_bytes <= most,
            "--gap: expected memory to end at {} at most, found {}",
            output::bytes(most),
            output::bytes(end_bytes)
        );
        if let Some(format) = source.other_format().with_context(failed)? {
            errln!(
                "frazil: {}: starts like {format}, but is imported as raw bytes",
                output::plain(&what.to_string())
            );
        }
        Ok(source)
    }

    /// A format other than raw that the file looks like. That is no error: a guest may have written
    /// the same bytes to its memory or disk.
    fn other_format(&self) -> io::Result<Option<&'static str>> {
        let mut start = vec![0; self.len_bytes.min(FORMAT_BYTES) as usize];
        self.file.read_exact_at(&mut start, 0)?;
        let known = if self.is_disk { DISK_FORMATS } else { MEMORY_FORMATS };
        Ok(known.iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, name)| *name))
    }

    /// # Errors
    /// If the file was written since it was opened: what was read is not of one moment.
    fn check_unchanged(&self) -> anyhow::Result<()> {
        let what = self.path.display();
        let now = written(&self.file).with_context(|| format!("cannot import {what}"))?;
        ensure!(
            now == self.written,
            "{what}: expected a file that does not change, found that it was written while it was \
             read: try again when its writer is done"
        );
        Ok(())
    }

    fn region_pages(&self) -> u64 {
        self.page_of(self.len_bytes.div_ceil(PAGE_BYTES) - 1) + 1
    }

    /// The page of the region for page `in_file` of the file.
    fn page_of(&self, in_file: u64) -> u64 {
        match self.gap {
            Some(gap) if in_file >= gap.start_page => in_file - gap.start_page + gap.end_page,
            _ => in_file,
        }
    }

    /// The page of the file for page `in_region` of the region; None in the gap.
    fn page_in_file(&self, in_region: u64) -> Option<u64> {
        match self.gap {
            Some(gap) if in_region >= gap.end_page => {
                Some(in_region - gap.end_page + gap.start_page)
            }
            Some(gap) if in_region >= gap.start_page => None,
            _ => Some(in_region),
        }
    }

    /// The pages that the new snapshot does not take from its base: those the file has data for
    /// and, if its holes are zeros, those in its holes that are not zero in the base.
    fn pages_to_write(&self, base: Option<&Snapshot>, diff: bool) -> anyhow::Result<PageSet> {
        let mut pages = PageSet::new(self.region_pages());
        let mut holes = false;
        // The offsets of all edges of holes, ORed together.
        let mut edges = 0;
        let mut at = 0;
        while at < self.len_bytes {
            let Some((start, end)) = self.next_data(at)? else {
                holes = true;
                break;
            };
            holes |= start > at;
            edges |= start | if end < self.len_bytes { end } else { 0 };
            let (first, last) = (start / PAGE_BYTES, (end - 1) / PAGE_BYTES);
            // In two parts, if the gap is in between.
            let split = self.gap.map_or(last + 1, |gap| gap.start_page.clamp(first, last + 1));
            for (first, end) in [(first, split), (split, last + 1)] {
                if first < end {
                    pages.insert_range(self.page_of(first), end - first);
                }
            }
            at = end;
        }
        if diff && !self.is_disk {
            ensure!(
                holes,
                "{}: expected a sparse file with holes where nothing changed, found one without \
                 holes: whatever copied it filled them with zeros (`cp --sparse=never`, `cat`, \
                 some archivers); if the file holds all of memory, leave out --diff",
                self.path.display()
            );
            self.check_grain(edges)?;
            return Ok(pages);
        }
        let base = base.filter(|base| base.manifest().region(&self.region).is_some());
        if let Some(base) = base {
            let region = base.region(&self.region)?;
            let len = pages.capacity();
            region.visit_runs(0, |run| {
                let end = run.end().min(len);
                pages.insert_range(run.first.min(end), end - run.first.min(end));
                std::ops::ControlFlow::<()>::Continue(())
            })?;
        }
        Ok(pages)
    }

    /// # Errors
    /// If the file system tracks holes in units larger than a page: unwritten pages beside written
    /// ones would be taken for zeros. `edges` is the OR of the offsets at which holes begin or end.
    fn check_grain(&self, edges: u64) -> anyhow::Result<()> {
        let what = self.path.display();
        let metadata = self.file.metadata().with_context(|| format!("cannot import {what}"))?;
        let block_bytes = metadata.blksize();
        ensure!(
            !is_coarse(edges, block_bytes),
            "{what}: expected holes of single pages, found a file system that tracks holes in \
             units of {}: pages next to changed ones would become zero; write the file to ext4, \
             XFS or tmpfs",
            output::bytes(block_bytes)
        );
        Ok(())
    }

    /// The next range of bytes from `at` on that is not a hole, if there is one.
    fn next_data(&self, at: u64) -> anyhow::Result<Option<(u64, u64)>> {
        let failed = || format!("cannot look for holes in {}", self.path.display());
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            // A block device, or a file system without holes: everything is data.
            Err(rustix::io::Errno::INVAL) => return Ok(Some((at, self.len_bytes))),
            Err(error) => return Err(error).with_context(failed),
        };
        let end = rustix::fs::seek(&self.file, SeekFrom::Hole(start)).with_context(failed)?;
        ensure!(start >= at && end > start, "{} changed while it was read", self.path.display());
        Ok((start < self.len_bytes).then_some((start, end.min(self.len_bytes))))
    }
}

/// True if holes whose edges have these offsets, ORed together, consist of whole blocks larger than
/// a page. Some file systems report large blocks and still track holes by the page.
fn is_coarse(edges: u64, block_bytes: u64) -> bool {
    block_bytes > PAGE_BYTES && edges != 0 && edges.is_multiple_of(block_bytes)
}

impl PageSource for Source {
    fn read_page(&self, page: u64, buf: &mut Page) -> io::Result<()> {
        let offset = self.page_in_file(page).map(|page| page * PAGE_BYTES);
        let Some(offset) = offset.filter(|offset| *offset < self.len_bytes) else {
            buf.fill(0);
            return Ok(());
        };
        // A disk may end inside its last page.
        let len = (self.len_bytes - offset).min(PAGE_BYTES) as usize;
        self.file.read_exact_at(&mut buf[..len], offset)?;
        buf[len..].fill(0);
        Ok(())
    }
}

/// Calls `write`, with a progress bar on a terminal.
fn with_progress(
    transaction: &mut Transaction,
    write: impl FnOnce(&mut Transaction) -> frazil_snapstore::Result<WriteStats> + Send,
) -> anyhow::Result<WriteStats> {
    let progress = transaction.progress();
    let bar = output::progress_bar("import", "pages");
    let stats = std::thread::scope(|scope| {
        let write = scope.spawn(|| write(transaction));
        while !write.is_finished() {
            bar.set_length(progress.pages_total.load(Ordering::Relaxed));
            bar.set_position(progress.pages_done.load(Ordering::Relaxed));
            std::thread::sleep(Duration::from_millis(10));
        }
        bar.finish_and_clear();
        write.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    Ok(stats)
}

/// Takes the regions that were not imported from the base. Returns the new snapshot's state: that
/// of its disks and, with `keep_state`, everything the base has.
fn state(
    transaction: &mut Transaction,
    base: Option<&Snapshot>,
    sources: &[Source],
    keep_state: bool,
) -> anyhow::Result<Vec<StateChunk>> {
    let imported = |region: &str| sources.iter().any(|source| source.region == region);
    let mut state = Vec::new();
    if let Some(base) = base {
        let kept = base.manifest().regions.iter().filter(|region| !imported(&region.name));
        for region in kept {
            transaction.region(&region.name, region.pages)?;
        }
        for saved in &base.manifest().state {
            let is_disk = saved.kind == SavedDisk::KIND;
            // With `keep_state`, a disk keeps its state whatever its new contents.
            let stays = keep_state || (is_disk && !imported(&saved.name));
            if stays {
                state.push(base.state(saved)?);
            }
        }
    }
    for source in sources.iter().filter(|source| source.is_disk) {
        let disk = SavedDisk {
            region: source.region.clone(),
            sectors: source.len_bytes / SECTOR_BYTES,
            read_only: false,
            serial: source.region.clone(),
        };
        match state.iter().find(|chunk: &&StateChunk| chunk.name == source.region) {
            None => state.push(chunk(&source.region, &disk)?),
            Some(kept) => ensure!(
                kept.body["sectors"] == disk.sectors,
                "{}: expected a disk of {} sectors, as in the state that --keep-state keeps, found \
                 {}",
                source.path.display(),
                kept.body["sectors"],
                disk.sectors
            ),
        }
    }
    Ok(state)
}

fn describe(
    args: &ImportArgs,
    base: Option<&Snapshot>,
    sources: &[Source],
    written: &[WriteStats],
    state: Vec<StateChunk>,
) -> Description {
    let sum = |figure: fn(&WriteStats) -> u64| written.iter().map(figure).sum::<u64>();
    let stem = || {
        let stem = sources.first().and_then(|source| source.path.file_stem());
        stem.map_or_else(|| "imported".into(), |stem| stem.to_string_lossy().into_owned())
    };
    let name = args.name.clone().or_else(|| base.map(|base| base.manifest().name.clone()));
    Description {
        name: name.unwrap_or_else(stem),
        message: args.message.clone(),
        tag: args.tag.clone(),
        time_unix_ms: 0,
        state,
        stats: json!({
            "imported": true,
            // As in checkpoints: pages that differ from before.
            "dirty_pages": sum(|stats| stats.pages - stats.equal_pages),
            "zero_pages": sum(|stats| stats.zero_pages),
            "equal_pages": sum(|stats| stats.equal_pages),
            "dedup_pages": sum(|stats| stats.dedup_pages),
            "delta_pages": sum(|stats| stats.delta_pages),
            "frame_bytes": sum(|stats| stats.stored_bytes),
        }),
        pin: false,
    }
}

fn print_result(
    store: &Store,
    base: Option<&Snapshot>,
    sources: &[Source],
    written: &[WriteStats],
    committed: &Committed,
    took: Duration,
    json: bool,
) -> anyhow::Result<()> {
    let stored_bytes = committed.frame_bytes + committed.meta_bytes;
    if json {
        let regions: Vec<Value> = sources
            .iter()
            .zip(written)
            .map(|(source, stats)| {
                json!({
                    "region": source.region, "file": source.path, "bytes": source.len_bytes,
                    "pages_read": stats.pages, "zero_pages": stats.zero_pages,
                    "equal_pages": stats.equal_pages, "stored_bytes": stats.stored_bytes,
                })
            })
            .collect();
        return print_json(&json!({
            "id": committed.id, "parent": base.map(Snapshot::id), "store": store.describe(),
            "regions": regions, "stored_bytes": stored_bytes,
            "duration_us": took.as_micros() as u64,
        }));
    }
    for (source, stats) in sources.iter().zip(written) {
        outln!(
            "{} is `{}`: {}, {} pages read, of which {} zero, {} unchanged",
            source.path.display(),
            source.region,
            output::bytes(source.len_bytes),
            output::count(stats.pages),
            output::count(stats.zero_pages),
            output::count(stats.equal_pages)
        );
    }
    outln!(
        "snapshot {}: {} in {:.2} s",
        committed.id,
        output::bytes(stored_bytes),
        took.as_secs_f64()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_of_large_blocks_are_told_from_those_of_pages() {
        assert!(!is_coarse(0x3000 | 0x8000, 4096));
        assert!(!is_coarse(0x3000 | 0x20000, 128 << 10), "told by the page");
        assert!(is_coarse(0x20000 | 0x60000, 128 << 10));
        assert!(!is_coarse(0, 128 << 10), "nothing but a hole");
        assert!(!is_coarse(0x20000, 512));
    }
}
