//! Arguments of what makes files of snapshots, and snapshots of files.

use std::path::PathBuf;

use clap::{ArgGroup, Args, ValueEnum, ValueHint};
use clap_complete::Shell;

use super::parse::size;

#[derive(Debug, Args)]
pub(crate) struct MountArgs {
    /// The store.
    #[arg(value_hint = ValueHint::DirPath)]
    pub store: PathBuf,
    /// Where: an empty folder.
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub folder: PathBuf,
    /// Let other users look at it too. Without root, /etc/fuse.conf must allow that
    /// (`user_allow_other`).
    #[arg(long)]
    pub allow_other: bool,
}

/// A heatmap besides what is printed.
#[derive(Debug, Args)]
#[command(next_help_heading = "Picture")]
pub(crate) struct HeatmapArgs {
    /// Draw memory as a picture, too: FILE.png or FILE.svg, with a cell for every 2 MiB or less.
    #[arg(long, value_name = "FILE")]
    pub heatmap: Option<PathBuf>,
    /// The region that is drawn: `ram`, or a disk: `disk0` and so on.
    #[arg(long, value_name = "NAME", default_value = "ram", requires = "heatmap")]
    pub heatmap_region: String,
}

/// Where guest memory has a gap that a file of it does not have, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gap {
    pub start_page: u64,
    pub end_page: u64,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("files").required(true).multiple(true))]
pub(crate) struct ImportArgs {
    /// A raw memory file: byte N is guest physical address N. It becomes the region `ram`. What is a
    /// hole in it is zero, and is not read.
    #[arg(long, value_name = "FILE", group = "files")]
    pub memory: Option<PathBuf>,
    /// A raw disk image, or a block device. It becomes `disk0`; repeated, `disk1` and so on.
    #[arg(long = "disk", value_name = "FILE", group = "files")]
    pub disks: Vec<PathBuf>,
    /// The snapshot that the new one changes: what is as it is there is shared with it, and regions that
    /// are not imported are taken over.
    #[arg(long, value_name = "SNAP")]
    pub base: Option<String>,
    /// Take holes of the memory file for what did not change since --base, as in Firecracker's diff
    /// snapshots.
    #[arg(long, requires = "base", requires = "memory")]
    pub diff: bool,
    /// The file has no bytes for this part of guest memory, where devices are: what comes behind START
    /// in the file is at END. Firecracker of 2025 and later: 3GiB..4GiB; before: 3328MiB..4GiB.
    #[arg(long, value_name = "START..END", value_parser = gap, requires = "memory")]
    pub gap: Option<Gap>,
    /// Keep the vCPUs and devices of --base, so that the new snapshot can be resumed: right if its
    /// memory was exported, changed a little, and comes back.
    #[arg(long, requires = "base")]
    pub keep_state: bool,
    /// The store, made if it is missing. Default: that of --base, else $FRAZIL_STORE, else
    /// ./frazil-store.
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Whose state it is. Default: as --base says, else the first file's name.
    #[arg(long, value_name = "VM")]
    pub name: Option<String>,
    /// Say what it is.
    #[arg(long, short, value_name = "TEXT", default_value = "")]
    pub message: String,
    /// Point this tag to it.
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
    /// Where, made if it is missing: `man -l DIR/frazil.1` shows them, and so does `man frazil` where
    /// DIR is the man1 of a folder of $MANPATH.
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub folder: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// STORE@REF.
    pub snapshot: String,
    /// The file, which must not be there yet, or `-` for standard output (raw and tar). What is zero takes
    /// no space in a file.
    pub file: PathBuf,
    /// What `raw` writes: `ram`, where byte N of the file is guest physical address N, or a disk: `disk0`
    /// and so on.
    #[arg(long, value_name = "NAME", default_value = "ram")]
    pub region: String,
    /// How.
    #[arg(long, value_enum, default_value = "raw")]
    pub format: ExportFormat,
    /// Replace the file if it is there, once the new one is whole.
    #[arg(long)]
    pub force: bool,
}

impl ExportArgs {
    /// True if there is no file.
    pub(crate) fn to_stdout(&self) -> bool {
        self.file.as_os_str() == "-"
    }
}

/// What an exported file looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExportFormat {
    /// The contents of a region and nothing else.
    Raw,
    /// All regions, state and manifest as an archive, sparse for tar programs of today.
    Tar,
    /// Memory and vCPUs as an ELF core file, which gdb opens, and crash and drgn if the guest is Linux.
    ElfCore,
}
