//! `frazil export --format tar`: a whole snapshot as one archive, with zeros left out.
//!
//! Regions are sparse files in the POSIX format that GNU tar calls 1.0 ("Storing Sparse Files" in
//! its manual): a list of extents, then their data. GNU tar, bsdtar and Python's `tarfile` unpack
//! them.

use std::fmt::Write as _;
use std::io::{self, BufWriter, Write};
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use anyhow::Context;
use frazil_snapstore::RegionReader;
use serde_json::json;
use tar::{Builder, EntryType, Header};

use super::export_stream::{self, Contents, Extents, WRITE_BYTES};
use super::{open_snapshot, print_json};
use crate::cli::ExportArgs;
use crate::new_file::NewFile;
use crate::output;
use crate::snapshot_files::{Folder, MANIFEST_FILE, RegionFile, SnapshotFiles, file_name};

/// The largest size that a header can hold: eleven octal digits.
const HEADER_SIZE_MAX: u64 = (1 << 33) - 1;
/// Size of an archive's blocks.
const BLOCK_BYTES: usize = 512;

pub(super) fn export(args: &ExportArgs, json: bool) -> anyhow::Result<()> {
    let (_, snapshot) = open_snapshot(&args.snapshot)?;
    let files = SnapshotFiles::new(snapshot);
    let started = Instant::now();
    if args.to_stdout() {
        let stdout = export_stream::stdout("an archive")?;
        return write(&files, stdout).map(drop).context("cannot export to standard output");
    }
    let file = NewFile::create(&args.file, args.force, NewFile::PRIVATE)?;
    let bytes = write(&files, file.file())
        .with_context(|| format!("cannot export to {}", args.file.display()))?;
    file.publish()?;
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

/// Writes the archive. Returns its length in bytes.
fn write(files: &SnapshotFiles, out: impl Write + Send) -> anyhow::Result<u64> {
    let done = AtomicU64::new(0);
    let regions = files
        .regions
        .iter()
        .map(|file| {
            let reader = files.snapshot.region(&file.region)?;
            let extents = Extents::of(&reader, files.len_bytes(file)?)?;
            Ok((file, reader, extents))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let pages = regions.iter().map(|(_, _, extents)| extents.pages()).sum();
    output::with_progress_bar("export", "pages", pages, &done, || {
        let mut builder = Builder::new(Archived::new(out));
        let written = write_all(files, &regions, &mut builder, &done);
        if written.is_err() {
            // Otherwise the builder would end the archive as if it were complete.
            builder.get_mut().give_up();
        }
        written?;
        let mut archived = builder.into_inner()?;
        archived.flush()?;
        Ok(archived.bytes)
    })
}

fn write_all(
    files: &SnapshotFiles,
    regions: &[(&RegionFile, RegionReader, Extents)],
    builder: &mut Builder<impl Write>,
    done: &AtomicU64,
) -> anyhow::Result<()> {
    let manifest = files.snapshot.manifest();
    let top = format!("{}-{}", manifest.name, files.snapshot.id().short());
    let archive =
        Archive { top: file_name(&top).into_owned(), mtime: manifest.time_unix_ms / 1000 };
    archive.text(builder, MANIFEST_FILE, &files.manifest_json()?)?;
    for (index, name) in files.state.iter().enumerate() {
        let path = format!("{}/{name}", Folder::State.name());
        archive.text(builder, &path, &files.state_json(index)?)?;
    }
    for (file, reader, extents) in regions {
        let path = format!("{}/{}", file.folder.name(), file.name);
        archive.region(builder, &path, (reader, extents), done)?;
    }
    Ok(())
}

/// What all entries of an archive share.
struct Archive {
    top: String,
    mtime: u64,
}

impl Archive {
    fn header(&self, len: u64) -> Header {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::Regular);
        // Memory may hold secrets.
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
        (reader, extents): (&RegionReader, &Extents),
        done: &AtomicU64,
    ) -> anyhow::Result<()> {
        let map = map(extents);
        let size = map.len() as u64 + extents.data_bytes();
        let real = [extents.len_bytes.to_string(), size.to_string()];
        let full = format!("{}/{path}", self.top);
        // A size that fits the header must not be in the extension as well: Python's tarfile would
        // take it for the size of the file.
        let beyond = (size > HEADER_SIZE_MAX).then_some(("size", real[1].as_bytes()));
        let sparse = [
            ("GNU.sparse.major", &b"1"[..]),
            ("GNU.sparse.minor", &b"0"[..]),
            ("GNU.sparse.name", full.as_bytes()),
            ("GNU.sparse.realsize", real[0].as_bytes()),
        ];
        out.append_pax_extensions(beyond.into_iter().chain(sparse))?;
        let mut header = self.header(size);
        // The name that programs without sparse support see. Names too long for the header are in
        // the extension.
        if header.set_path(format!("GNUSparseFile.0/{path}")).is_err() {
            header.set_path("GNUSparseFile.0/region")?;
        }
        header.set_cksum();
        let mut contents = Contents::new(reader, extents, map, done);
        let appended = out.append(&header, &mut contents);
        if let Some(error) = contents.failed {
            return Err(error.into());
        }
        Ok(appended?)
    }
}

/// The list of extents that precedes the data: numbers on lines of their own, padded to a block.
fn map(extents: &Extents) -> Vec<u8> {
    // An empty extent marks a hole at the end.
    let ends_with_data =
        extents.list.last().is_some_and(|(start, len)| start + len == extents.len_bytes);
    let end = (!ends_with_data).then_some((extents.len_bytes, 0));
    let mut text = format!("{}\n", extents.list.len() + usize::from(end.is_some()));
    for (start, len) in extents.list.iter().copied().chain(end) {
        let _to_memory = write!(text, "{start}\n{len}\n");
    }
    let mut map = text.into_bytes();
    map.resize(map.len().next_multiple_of(BLOCK_BYTES), 0);
    map
}

/// The archive's destination: counts the bytes written, and can cut the archive off.
struct Archived<W: Write> {
    inner: BufWriter<W>,
    bytes: u64,
    given_up: bool,
}

impl<W: Write> Archived<W> {
    fn new(out: W) -> Self {
        Self { inner: BufWriter::with_capacity(WRITE_BYTES, out), bytes: 0, given_up: false }
    }

    /// Makes all further writes fail.
    fn give_up(&mut self) {
        self.given_up = true;
    }
}

impl<W: Write> Write for Archived<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.given_up {
            return Err(io::Error::other("the archive was abandoned"));
        }
        let written = self.inner.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
