//! Arguments of the commands that turn snapshots into files and files into snapshots.

use std::path::PathBuf;

use clap::{ArgGroup, Args, ValueEnum, ValueHint};
use clap_complete::Shell;

use super::parse::size;

#[derive(Debug, Args)]
pub(crate) struct MountArgs {
    /// The store.
    #[arg(value_hint = ValueHint::DirPath)]
    pub store: PathBuf,
    /// Where to mount it: an empty folder.
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub folder: PathBuf,
    /// Give other users access too. Without root, /etc/fuse.conf must allow that
    /// (`user_allow_other`).
    #[arg(long)]
    pub allow_other: bool,
}

/// A heatmap, in addition to what is printed.
#[derive(Debug, Args)]
#[command(next_help_heading = "Picture")]
pub(crate) struct HeatmapArgs {
    /// Also draw memory as a picture, FILE.png or FILE.svg, with a cell for every 2 MiB or less.
    #[arg(long, value_name = "FILE")]
    pub heatmap: Option<PathBuf>,
    /// The region to draw: `ram`, or a disk: `disk0` and so on.
    #[arg(long, value_name = "NAME", default_value = "ram", requires = "heatmap")]
    pub heatmap_region: String,
}

/// A gap in guest memory that a memory file leaves out, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gap {
    pub start_page: u64,
    pub end_page: u64,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("files").required(true).multiple(true))]
pub(crate) struct ImportArgs {
    /// A raw memory file: byte N is guest physical address N. It becomes the region `ram`. Holes
    /// are zeros, and are not read.
    #[arg(long, value_name = "FILE", group = "files")]
    pub memory: Option<PathBuf>,
    /// A raw disk image, or a block device. It becomes `disk0`; further ones become `disk1` and so
    /// on.
    #[arg(long = "disk", value_name = "FILE", group = "files")]
    pub disks: Vec<PathBuf>,
    /// The snapshot that the new one is a change of: unchanged pages are shared with it, and
    /// regions that are not imported are taken from it.
    #[arg(long, value_name = "SNAP")]
    pub base: Option<String>,
    /// Take holes in the memory file as unchanged since --base, as in Firecracker's diff snapshots.
    #[arg(long, requires = "base", requires = "memory")]
    pub diff: bool,
    /// The part of guest memory, reserved for devices, that the file leaves out: what follows START
    /// in the file is at END in memory. Firecracker of 2025 and later: 3GiB..4GiB; before:
    /// 3328MiB..4GiB.
    #[arg(long, value_name = "START..END", value_parser = gap, requires = "memory")]
    pub gap: Option<Gap>,
    /// Keep the vCPUs and devices of --base, so that the new snapshot can be resumed. For memory
    /// that was exported, changed a little, and is now imported again.
    #[arg(long, requires = "base")]
    pub keep_state: bool,
    /// The store, created if it is missing. Default: that of --base, else $FRAZIL_STORE, else
    /// ./frazil-store.
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Name of the VM that the snapshot is of. Default: that of --base, else the first file's name.
    #[arg(long, value_name = "VM")]
    pub name: Option<String>,
    /// Describe the snapshot.
    #[arg(long, short, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub message: String,
    /// Point this tag at the snapshot.
    #[arg(long, value_name = "TAG")]
    pub tag: Option<String>,
    /// zstd level: 1 to 22, or -1 to -100 for the fast ones.
    #[arg(long, value_name = "LEVEL", default_value_t = 1, allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-100..=22))]
    pub compression: i32,
}

fn gap(text: &str) -> Result<Gap, String> {
    const PAGE_BYTES: u64 = frazil_snapstore::PAGE_SIZE as u64;
    let (start, end) = text.split_once("..").ok_or("expected START..END, such as 3GiB..4GiB")?;
    let (start, end) = (size(start)?, size(end)?);
    let in_order = 0 < start && start < end;
    if !in_order || !start.is_multiple_of(PAGE_BYTES) || !end.is_multiple_of(PAGE_BYTES) {
        return Err("expected two multiples of 4 KiB, the first less than the second".into());
    }
    Ok(Gap { start_page: start / PAGE_BYTES, end_page: end / PAGE_BYTES })
}

#[derive(Debug, Args)]
pub(crate) struct CompletionArgs {
    /// The shell.
    #[arg(value_enum)]
    pub shell: Shell,
}

#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Folder for the pages, created if it is missing. `man -l DIR/frazil.1` shows one, and so does
    /// `man frazil` if DIR is the man1 folder of a folder in $MANPATH.
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub folder: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// The snapshot, as STORE@REF.
    pub snapshot: String,
    /// The file, which must not exist yet, or `-` for standard output (raw and tar). Zeros take no
    /// space in a file.
    pub file: PathBuf,
    /// The region that `raw` writes: `ram`, where byte N of the file is guest physical address N,
    /// or a disk: `disk0` and so on.
    #[arg(long, value_name = "NAME", default_value = "ram")]
    pub region: String,
    /// The format of the file.
    #[arg(long, value_enum, default_value = "raw")]
    pub format: ExportFormat,
    /// Replace an existing file, once the new one is complete.
    #[arg(long)]
    pub force: bool,
}

impl ExportArgs {
    /// True if the export goes to standard output.
    pub(crate) fn to_stdout(&self) -> bool {
        self.file.as_os_str() == "-"
    }
}

/// The format of an exported file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExportFormat {
    /// The contents of one region and nothing else.
    Raw,
    /// All regions, state and manifest as an archive, sparse for current tar programs.
    Tar,
    /// Memory and vCPUs as an ELF core file, for gdb, and for crash and drgn if the guest is Linux.
    ElfCore,
}
