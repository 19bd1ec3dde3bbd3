//! `frazil export --format tar`: all of a snapshot as one archive, its zeros left out.
//!
//! Regions are sparse files in the POSIX format that GNU tar calls 1.0 ("Storing Sparse Files" in its
//! manual): a list of extents, then their data. GNU tar, bsdtar and Python's `tarfile` unpack them.

use std::fmt::Write as _;
use std::io::{self, BufWriter, IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use frazil_snapstore::{PAGE_SIZE, RegionReader};
use rayon::prelude::*;
use serde_json::json;
use tar::{Builder, EntryType, Header};

use super::{open_snapshot, print_json};
use crate::cli::ExportArgs;
use crate::output;
use crate::snapshot_files::{Folder, MANIFEST_FILE, RegionFile, SnapshotFiles, file_name};

/// Eleven octal digits.
const HEADER_SIZE_MAX: u64 = (1 << 33) - 1;
const PAGE_BYTES: u64 = PAGE_SIZE as u64;
/// Blocks of an archive.
const BLOCK_BYTES: usize = 512;
/// Pages decompressed at once, by all cores: 16 MiB.
const BATCH_PAGES: u64 = 4096;
/// Of them, those that one core does in a row.
const PART_PAGES: u64 = 256;
/// Standard output.
const STDOUT: &str = "-";

pub(super) fn export(args: &ExportArgs, json: bool) -> anyhow::Result<()> {
    let (_, snapshot) = open_snapshot(&args.snapshot)?;
    let files = SnapshotFiles::new(snapshot)?;
    let started = Instant::now();
    let to_stdout = args.file.as_os_str() == STDOUT;
    let bytes = if to_stdout {
        if io::stdout().is_terminal() {
            bail!("expected an archive to go to a file or a pipe, found a terminal");
        }
        write(&files, io::stdout()).context("cannot export")?
    } else {
        let folder = args.file.parent().filter(|folder| !folder.as_os_str().is_empty());
        let file = tempfile::NamedTempFile::new_in(folder.unwrap_or_else(|| Path::new(".")));
        let file = file.with_context(|| format!("cannot export to {}", args.file.display()))?;
        let bytes = write(&files, file.as_file())
            .with_context(|| format!("cannot export to {}", args.file.display()))?;
        file.as_file().sync_all()?;
        file.persist(&args.file)?;
        bytes
    };
    if to_stdout {
        return Ok(());
    }
    if json {
        return print_json(&json!({
            "snapshot": files.snapshot.id(), "format": "tar", "file": args.file, "bytes": bytes,
            "duration_us": started.elapsed().as_micros() as u64,
        }));
    }
    outln!(
        "{}: {} of {} regions and {} state files, in {:.2} s",
        args.file.display(),
        output::bytes(bytes),
        files.regions.len(),
        files.state.len(),
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Writes the archive, and returns how long it is.
fn write(files: &SnapshotFiles, out: impl Write + Send) -> anyhow::Result<u64> {
    let done = AtomicU64::new(0);
    let regions = files
        .regions
        .iter()
        .map(|file| {
            let reader = files.snapshot.region(&file.region)?;
            let extents = Extents::of(&reader, file.len_bytes)?;
            Ok((file, reader, extents))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let bar = output::progress_bar("export", "pages");
    bar.set_length(regions.iter().map(|(_, _, extents)| extents.pages()).sum());
    std::thread::scope(|scope| {
        let write = scope.spawn(|| write_all(files, &regions, out, &done));
        while !write.is_finished() {
            bar.set_position(done.load(Ordering::Relaxed));
            std::thread::sleep(Duration::from_millis(20));
        }
        bar.finish_and_clear();
        write.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn write_all(
    files: &SnapshotFiles,
    regions: &[(&RegionFile, RegionReader, Extents)],
    out: impl Write,
    done: &AtomicU64,
) -> anyhow::Result<u64> {
    let manifest = files.snapshot.manifest();
    let archive = Archive {
        top: format!("{}-{}", file_name(&manifest.name), files.snapshot.id().short()),
        mtime: manifest.time_unix_ms / 1000,
    };
    let mut builder = Builder::new(Counted { inner: BufWriter::new(out), bytes: 0 });
    archive.text(&mut builder, MANIFEST_FILE, &files.manifest_json()?)?;
    for (index, name) in files.state.iter().enumerate() {
        let path = format!("{}/{name}", Folder::State.name());
        archive.text(&mut builder, &path, &files.state_json(index)?)?;
    }
    for (file, reader, extents) in regions {
        let path = format!("{}/{}", file.folder.name(), file.name);
        archive.region(&mut builder, &path, file.len_bytes, (reader, extents), done)?;
    }
    let mut counted = builder.into_inner()?;
    counted.flush()?;
    Ok(counted.bytes)
}

/// What all entries of an archive have in common.
struct Archive {
    top: String,
    mtime: u64,
}

impl Archive {
    fn header(&self, len: u64) -> Header {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::Regular);
        // Memory holds secrets.
        header.set_mode(0o600);
        header.set_mtime(self.mtime);
        header.set_size(len);
        header
    }

    fn text(&self, out: &mut Builder<impl Write>, path: &str, text: &[u8]) -> io::Result<()> {
        let mut header = self.header(text.len() as u64);
        out.append_data(&mut header, format!("{}/{path}", self.top), text)
    }

    fn region(
        &self,
        out: &mut Builder<impl Write>,
        path: &str,
        len_bytes: u64,
        (reader, extents): (&RegionReader, &Extents),
        done: &AtomicU64,
    ) -> anyhow::Result<()> {
        let map = extents.map();
        let size = map.len() as u64 + extents.data_bytes();
        let real = [len_bytes.to_string(), size.to_string()];
        let full = format!("{}/{path}", self.top);
        // Of what fits the header itself there must be no other size: Python's tarfile takes it for the
        // size of the file.
        let beyond = (size > HEADER_SIZE_MAX).then_some(("size", real[1].as_bytes()));
        let sparse = [
            ("GNU.sparse.major", &b"1"[..]),
            ("GNU.sparse.minor", &b"0"[..]),
            ("GNU.sparse.name", full.as_bytes()),
            ("GNU.sparse.realsize", real[0].as_bytes()),
        ];
        out.append_pax_extensions(beyond.into_iter().chain(sparse))?;
        let mut header = self.header(size);
        // What those see who know nothing of sparse files. Names that are too long for the header are
        // in the extension.
        if header.set_path(format!("GNUSparseFile.0/{path}")).is_err() {
            header.set_path("GNUSparseFile.0/region")?;
        }
        header.set_cksum();
        let mut contents =
            Contents { reader, extents, at: 0, inside: 0, part: map, read: 0, failed: None, done };
        let appended = out.append(&header, &mut contents);
        if let Some(error) = contents.failed {
            return Err(error.into());
        }
        Ok(appended?)
    }
}

/// What of a region is not zero.
struct Extents {
    /// First byte and length, ascending.
    list: Vec<(u64, u64)>,
    len_bytes: u64,
}

impl Extents {
    fn of(reader: &RegionReader, len_bytes: u64) -> frazil_snapstore::Result<Self> {
        let mut list: Vec<(u64, u64)> = Vec::new();
        reader.visit_runs(0, |run| {
            let start = run.first * PAGE_BYTES;
            if start >= len_bytes {
                return ControlFlow::Break(());
            }
            let len = (run.count * PAGE_BYTES).min(len_bytes - start);
            match list.last_mut() {
                Some((first, before)) if *first + *before == start => *before += len,
                _ => list.push((start, len)),
            }
            ControlFlow::Continue(())
        })?;
        Ok(Self { list, len_bytes })
    }

    fn data_bytes(&self) -> u64 {
        self.list.iter().map(|(_, len)| len).sum()
    }

    fn pages(&self) -> u64 {
        self.data_bytes().div_ceil(PAGE_BYTES)
    }

    /// The list, as it stands before the data: numbers on lines of their own, filled up to a block.
    fn map(&self) -> Vec<u8> {
        // A hole at the end is told by an extent of nothing.
        let ends_with_data =
            self.list.last().is_some_and(|(start, len)| start + len == self.len_bytes);
        let end = (!ends_with_data).then_some((self.len_bytes, 0));
        let mut text = format!("{}\n", self.list.len() + usize::from(end.is_some()));
        for (start, len) in self.list.iter().copied().chain(end) {
            let _to_memory = write!(text, "{start}\n{len}\n");
        }
        let mut map = text.into_bytes();
        map.resize(map.len().next_multiple_of(BLOCK_BYTES), 0);
        map
    }
}

/// The list of extents and then their data, decompressed a batch at a time.
struct Contents<'a> {
    reader: &'a RegionReader,
    extents: &'a Extents,
    /// The extent that comes next, and how many of its pages were read.
    at: usize,
    inside: u64,
    /// What is there already, and how much of it was read.
    part: Vec<u8>,
    read: usize,
    /// Why reading stopped.
    failed: Option<frazil_snapstore::StoreError>,
    done: &'a AtomicU64,
}

impl Contents<'_> {
    /// Reads the next extents, on all cores, and of a long one as much as a batch may hold.
    fn next_batch(&mut self) -> frazil_snapstore::Result<()> {
        let mut parts = Vec::new();
        let mut room = BATCH_PAGES;
        while let Some((start, len)) = self.extents.list.get(self.at).filter(|_| room > 0) {
            let pages = len.div_ceil(PAGE_BYTES);
            let count = (pages - self.inside).min(room).min(PART_PAGES);
            let bytes = (count * PAGE_BYTES).min(len - self.inside * PAGE_BYTES);
            parts.push((start / PAGE_BYTES + self.inside, count, bytes as usize));
            room -= count;
            self.inside += count;
            if self.inside == pages {
                self.at += 1;
                self.inside = 0;
            }
        }
        let read = |(first, count, bytes): &(u64, u64, usize)| {
            let mut pages = vec![0; *count as usize * PAGE_SIZE];
            self.reader.read_pages(*first, &mut pages)?;
            pages.truncate(*bytes);
            Ok(pages)
        };
        let parts: Vec<Vec<u8>> =
            parts.par_iter().map(read).collect::<frazil_snapstore::Result<_>>()?;
        self.part = parts.concat();
        self.read = 0;
        self.done.fetch_add((self.part.len() as u64).div_ceil(PAGE_BYTES), Ordering::Relaxed);
        Ok(())
    }
}

impl Read for Contents<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.read == self.part.len() && self.at < self.extents.list.len() {
            self.next_batch().map_err(|error| {
                let told = io::Error::other(error.to_string());
                self.failed = Some(error);
                told
            })?;
        }
        let len = out.len().min(self.part.len() - self.read);
        out[..len].copy_from_slice(&self.part[self.read..self.read + len]);
        self.read += len;
        Ok(len)
    }
}

/// Counts what is written.
struct Counted<W> {
    inner: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
