//! The command line.

mod files;
mod help;
mod inspect;
pub(crate) mod parse;

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
pub(crate) use files::{
    CompletionArgs, ExportArgs, ExportFormat, Gap, HeatmapArgs, ImportArgs, ManArgs, MountArgs,
};
use frazil_snapstore::retention::Policy;
use frazil_snapstore::{Elide, SnapshotId};
use frazil_vmm::dirty::TrackerKind;
use frazil_vmm::disk::DiskConfig;
use frazil_vmm::privileges::User;
use frazil_vmm::scheduler::Every;
use frazil_vmm::workload::WorkloadSpec;
use frazil_vmm::{NetConfig, VsockConfig};
pub(crate) use help::{command, usage_error, visible};
pub(crate) use inspect::InspectArgs;
pub(crate) use parse::Span;
use parse::{
    at_least_one, disk, disk_replacement, elide, every, interval, net, number_or_all, percent,
    serial, size, tracker, vsock, within, workload,
};

/// Freezes running virtual machines: a checkpoint is taken while the guest keeps running and costs
/// only what has changed; any checkpoint can be resumed at once, its memory loaded as it is
/// touched.
#[derive(Debug, Parser)]
#[command(name = "frazil", version, propagate_version = true, infer_subcommands = false)]
pub(crate) struct Cli {
    /// Print JSON on standard output: one object, or one per line.
    #[arg(long, global = true)]
    pub json: bool,
    /// When to print colours; `auto`: on a terminal, unless $NO_COLOR is set.
    #[arg(long, global = true, value_enum, value_name = "WHEN", default_value = "auto")]
    pub color: ColorArg,
    #[command(subcommand)]
    pub command: Command,
}

/// When to print colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ColorArg {
    Auto,
    Always,
    Never,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boot a guest and run it until it ends.
    Run(RunArgs),
    /// Save a running VM as a snapshot and let it run on; with --exit, suspend it.
    Checkpoint(CheckpointArgs),
    /// Start a VM from a snapshot, or many clones of it; memory is loaded as the guest touches it.
    Resume(ResumeArgs),
    /// Take a running VM back to a snapshot, in place.
    Rewind(RewindArgs),
    /// List running VMs.
    Ps,
    /// Pause a guest: its vCPUs stop until `frazil continue`.
    Pause(VmArg),
    /// Let a paused guest run again.
    Continue(VmArg),
    /// End a VM and its process.
    Stop(VmArg),
    /// Watch a running VM live: dirty rate, pauses, checkpoints, paging.
    ///
    /// `q` or Ctrl-C quits. In a pipe, or with --json, prints one JSON object per line instead,
    /// every --interval.
    Top(TopArgs),
    /// List snapshots: when each was taken, how much it holds, what it descends from (--graph).
    Log(LogArgs),
    /// Show what a snapshot holds: machine, vCPU registers, devices, memory (--heatmap draws it).
    Show(ShowArgs),
    /// Show what changed between two snapshots: memory, disks, registers, devices.
    Diff(DiffArgs),
    /// Examine a snapshot's memory: what it is made of, dumps, searches, page tables, code, stacks.
    ///
    /// Without options, shows what each region is made of. The guest is not run, and nothing is
    /// changed.
    Inspect(InspectArgs),
    /// Write a snapshot's memory, one disk or everything to a file, or a core file for a debugger.
    Export(ExportArgs),
    /// Make a snapshot from raw memory files, such as Firecracker's, or from disk images.
    ///
    /// Without --keep-state the snapshot has no vCPUs or devices and cannot be resumed; everything
    /// else works.
    Import(ImportArgs),
    /// Mount snapshots as folders: memory, disks and state as files, for grep, strings, cmp, dd.
    ///
    /// DIR then has `latest`, `ids`, `tags` and `vms`, and every snapshot `memory/ram`,
    /// `disks/disk0`, `state/vcpu0.json`, `manifest.json`. Everything that is read is verified; a
    /// damaged block is an I/O error, and this command says where it is. Snapshots taken or
    /// forgotten meanwhile appear and disappear; memory and disks that are open stay readable. Runs
    /// until Ctrl-C or `umount DIR`.
    Mount(MountArgs),
    /// Check that snapshots are intact: read everything and compare it with its hash.
    Verify(VerifyArgs),
    /// Remove snapshots from a store: those named, or those no rule keeps; --prune frees space.
    ///
    /// With rules, all snapshots are judged, each VM's separately, in local time: those that no
    /// rule keeps are forgotten. Tagged snapshots always stay, and so does the newest of every VM.
    /// Without rules, the snapshots named are forgotten, all or none.
    ///
    /// Forgotten snapshots disappear at once, with their tags. Their children get the nearest
    /// remaining ancestor as their parent, and lose nothing. The space is freed by --prune or
    /// `frazil prune`.
    Forget(ForgetArgs),
    /// Free the space that no snapshot needs any more.
    ///
    /// Removes data that no snapshot reaches, and rewrites files that are mostly unused. Data that
    /// a running VM has open stays. VMs keep running meanwhile, but cannot write checkpoints.
    /// Pruning can be interrupted at any moment, and run again.
    Prune(PruneArgs),
    /// Load memory for VMs in other processes; started by `resume`.
    #[command(hide = true)]
    Pager(PagerArgs),
    /// Show frazil at work on the built-in guest: run, checkpoint, kill, resume, verify.
    Demo(DemoArgs),
    /// Print the completion script for a shell.
    ///
    /// bash: frazil completion bash > /etc/bash_completion.d/frazil. zsh: frazil completion zsh >
    /// _frazil, in a folder of $fpath. fish: frazil completion fish >
    /// ~/.config/fish/completions/frazil.fish.
    Completion(CompletionArgs),
    /// Write man pages: frazil(1) and one for each command.
    Man(ManArgs),
}

#[derive(Debug, Args)]
pub(crate) struct VmArg {
    /// The VM's name, or the path of its control socket.
    pub vm: String,
}

/// Where a guest's serial output goes.
#[derive(Clone, Debug)]
pub(crate) enum SerialArg {
    Stdio,
    Null,
    File(PathBuf),
}

/// What a guest reads from its serial port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SerialInput {
    Auto,
    Stdin,
    None,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("guest").required(true))]
pub(crate) struct RunArgs {
    /// Boot this kernel by the Linux 64-bit boot protocol, with its console on COM1: a Linux
    /// bzImage (a distribution's vmlinuz), or an ELF64 file (a vmlinux, or a bare-metal program).
    #[arg(long, value_name = "FILE", group = "guest")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk for --kernel.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Command line for --kernel.
    #[arg(
        long,
        value_name = "STR",
        requires = "kernel",
        default_value = "console=ttyS0 reboot=k panic=1"
    )]
    pub cmdline: String,
    /// Run the built-in guest; SPEC is a comma-separated list of touch=SIZE, rate=PAGES_PER_S|max,
    /// pattern=seq|uniform|shuffle|hot, hot_share=0.1, hot_writes=0.9,
    /// content=zero|text|random|edit, seed=N, populate=yes|no, check=SECONDS, report=SECONDS,
    /// stop_after=TURNS, gap_us=N.
    #[arg(long, value_name = "SPEC", value_parser = workload, group = "guest")]
    pub workload: Option<WorkloadSpec>,
    /// Size of guest memory.
    #[arg(long, value_name = "SIZE", default_value = "512MiB", value_parser = size)]
    pub memory: u64,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: usize,
    /// Add a disk with the contents of FILE, which is never written: what the guest writes is kept
    /// separately (see --overlay) and becomes part of every snapshot, so that resuming needs no
    /// file. The guest sees a virtio block device (/dev/vda in Linux). `,ro` makes it read-only.
    /// May be repeated.
    #[arg(long = "disk", value_name = "FILE[,ro]", value_parser = disk)]
    pub disks: Vec<DiskConfig>,
    /// Leave out the memory balloon, through which Linux reports unused memory so that snapshots
    /// need not hold it. With --workload there is none.
    #[arg(long)]
    pub no_balloon: bool,
    #[command(flatten)]
    pub host: HostArgs,
}

#[derive(Debug, Args)]
pub(crate) struct HostArgs {
    /// Name to control the VM by; `vm-PID` if none is given.
    #[arg(long, value_name = "VM")]
    pub name: Option<String>,
    /// Store for checkpoints, created if it is missing. Default: that of the snapshot, else
    /// $FRAZIL_STORE, else ./frazil-store.
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Keep what the guest writes to its disks in an unnamed file in this folder, instead of in
    /// memory.
    #[arg(long, value_name = "DIR")]
    pub overlay: Option<PathBuf>,
    /// Add a network card on the host's tap interface NAME, or, with `none`, one that is not
    /// connected. May be repeated. A resumed VM keeps its cards: the options then say, in the
    /// cards' order, what each is connected to now; cards without an option stay as they were.
    /// `{clone}` is the VM's number with --clones, 1 without: as such in NAME, as two bytes in
    /// ADDRESS (02:00:00:00:{clone}).
    #[arg(long = "net", value_name = "tap=NAME[,mac=ADDRESS]|none", value_parser = net)]
    pub nets: Vec<NetConfig>,
    /// Add a socket device between guest and host. A host program that connects to the Unix socket
    /// PATH and sends `CONNECT PORT` reaches that port of the guest; a guest program that connects
    /// to port N of the host reaches the Unix socket PATH_N. CID is the guest's context id, 3 if
    /// none is given. A resumed VM keeps its device: the option then says where it leads now, or,
    /// with `none`, that it leads nowhere. `{clone}` is the VM's number with --clones, 1 without.
    #[arg(long, value_name = "[cid=CID,]socket=PATH|none", value_parser = vsock)]
    pub vsock: Option<VsockConfig>,
    /// How to track the pages the guest writes: `ring`, `manual-bitmap` or `bitmap`. Default: what
    /// suits the machine and this KVM.
    #[arg(long, value_name = "HOW", value_parser = tracker)]
    pub dirty_tracking: Option<TrackerKind>,
    /// Memory a checkpoint may use to copy pages aside while the guest runs. Pages beyond that stay
    /// in place, write-protected until they are saved: the guest has to wait before it changes one,
    /// while that page is copied or, once four times this much was copied, until it is saved
    /// (`cow_waits` in statistics and metrics).
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = size)]
    pub staging: u64,
    /// Stop the guest for up to this share of the time while a checkpoint catches up with it, where
    /// more than --staging is dirty and pages cannot stay in place: this host has no userfaultfd,
    /// or memory is still being paged in. With 0% the guest instead pauses until all those pages
    /// are copied, and the copies take as much memory.
    #[arg(long, value_name = "PERCENT", default_value = "97%", value_parser = percent)]
    pub throttle: f64,
    /// Take a checkpoint at this interval, or, with `continuous`, as soon as the previous one is
    /// published. One that is due while another is being taken is skipped.
    #[arg(long, value_name = "TIME|continuous", value_parser = every)]
    pub checkpoint_every: Option<Every>,
    /// Let a due checkpoint wait up to this long for a moment in which the guest writes little, to
    /// shorten its pause.
    #[arg(long, value_name = "TIME", value_parser = interval, requires = "checkpoint_every")]
    pub checkpoint_quiet: Option<Duration>,
    /// zstd level for checkpoints: 1 to 22, or -1 to -100 for the fast ones.
    #[arg(long, value_name = "LEVEL", default_value_t = 1, allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-100..=22))]
    pub compression: i32,
    /// What checkpoints may leave out: `all`, `none`, or a list of `zero` (pages that are all
    /// zero), `equal` (pages rewritten with what was there), `dedup` (pages that are in the store
    /// already), `delta` (the unchanged part of pages that changed little).
    #[arg(long, value_name = "LIST", default_value = "all", value_parser = elide)]
    pub elide: Elide,
    /// Path of the control socket.
    #[arg(long, value_name = "PATH")]
    pub api_socket: Option<PathBuf>,
    /// Where the guest's serial output goes: `stdio`, `null`, or a file to append to. With --json,
    /// `stdio` is standard error.
    #[arg(long, value_name = "WHERE", default_value = "stdio", value_parser = serial)]
    pub serial: SerialArg,
    /// What the guest reads from its serial port: `auto`, the terminal, if frazil is in its
    /// foreground and --serial is stdio, without --json; `stdin`, standard input, whatever it is;
    /// `none`, nothing. On a terminal all keys go to the guest, Ctrl-C too, except Ctrl-A: then `x`
    /// ends the VM and `h` shows more.
    #[arg(long, value_enum, value_name = "WHAT", default_value = "auto")]
    pub serial_input: SerialInput,
    /// Switch to this user, with its groups or the one given, once everything that needs root is
    /// open (KVM, taps, userfaultfd, the files of --kernel and --disk). An external pager and the
    /// process that holds the memory of --clones do the same. For a start as root. The store
    /// belongs to that user, and is created for it if it is missing.
    #[arg(long, value_name = "NAME|UID[:GROUP|GID]")]
    pub user: Option<User>,
    /// Do not confine the threads that a guest can reach with seccomp filters, for kernels that
    /// have none.
    #[arg(long)]
    pub no_seccomp: bool,
    /// Rules for the snapshots with this VM's name, applied while it runs.
    #[command(flatten)]
    pub keep: KeepArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ResumeArgs {
    /// The snapshot, as STORE@REF. REF is an id or a unique prefix, a tag, or `latest`, each with
    /// ~N for its N-th ancestor. STORE defaults to $FRAZIL_STORE, then ./frazil-store.
    pub snapshot: String,
    /// Load all memory before the guest runs. Needs no userfaultfd.
    #[arg(long)]
    pub eager: bool,
    /// Load memory only when it is touched; by default the rest follows in the background.
    #[arg(long, conflicts_with = "eager")]
    pub no_fill: bool,
    /// Start N VMs, named NAME-1, NAME-2 and so on, each in a process of its own. They share the
    /// snapshot's memory, with each other and with VMs started this way later: a page that one of
    /// them touches is loaded for all, and what one writes is its own. The first of them decides
    /// how memory is loaded (--no-fill, --fill-rate, --working-set, --record-working-set). With N
    /// above 1, serial output is discarded unless --serial says where it goes.
    #[arg(long, value_name = "N", conflicts_with = "eager", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub clones: Option<u32>,
    /// The process that loads memory from the store.
    #[arg(long, value_enum, default_value = "internal", conflicts_with_all = ["eager", "clones"])]
    pub pager: PagerArg,
    /// Load at most this many bytes per second in the background.
    #[arg(long, value_name = "SIZE", value_parser = size, conflicts_with_all = ["eager", "no_fill"])]
    pub fill_rate: Option<u64>,
    /// What to do with the pages that were touched first the last time: `auto` loads them beside
    /// the running guest; `before` loads them before the guest runs; either records them for a
    /// second if none are recorded yet. `off` does neither.
    #[arg(long, value_enum, default_value = "auto", conflicts_with = "eager")]
    pub working_set: WorkingSetArg,
    /// Record anew, for this long, which pages are touched, and keep that with the snapshot.
    #[arg(long, value_name = "TIME", value_parser = interval, conflicts_with_all = ["eager", "working_set"])]
    pub record_working_set: Option<Duration>,
    /// How the guest's clocks continue. `host`: moved on by the time since the checkpoint, so that
    /// the time of day is right. `snapshot`: from where they were, so that the guest sees no gap.
    #[arg(long, value_enum, default_value = "host")]
    pub clock: ClockArg,
    /// Give disk N, 0 being the first (/dev/vda in Linux), the contents of FILE instead of the
    /// snapshot's. FILE must be as long as the disk, and is never written. For a disk that the
    /// guest is not using at that moment. May be repeated. `{clone}` is the VM's number with
    /// --clones, 1 without.
    #[arg(long = "disk", value_name = "N=FILE", value_parser = disk_replacement)]
    pub disks: Vec<(usize, PathBuf)>,
    /// Leave the guest paused.
    #[arg(long)]
    pub paused: bool,
    /// The socket of the process that holds the snapshot's memory.
    #[arg(long, value_name = "PATH", hide = true)]
    pub memory_from: Option<PathBuf>,
    /// The snapshot to resume, whatever the name given refers to by now.
    #[arg(long, value_name = "ID", hide = true)]
    pub exactly: Option<SnapshotId>,
    #[command(flatten)]
    pub host: HostArgs,
}

/// How a resumed guest's clocks go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ClockArg {
    Host,
    Snapshot,
}

/// Where a VM's pager runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PagerArg {
    /// In the VM's process.
    Internal,
    /// In a separate process, which is replaced if it dies.
    External,
}

/// What to do with the pages that were touched first the last time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WorkingSetArg {
    Auto,
    Before,
    Off,
}

#[derive(Debug, Args)]
pub(crate) struct PagerArgs {
    /// Switch to this user.
    #[arg(long, value_name = "USER")]
    pub user: Option<User>,
    /// Serve the memory of this snapshot to the VMs that connect, instead of to the one VM on
    /// standard input.
    #[arg(requires = "listen")]
    pub snapshot: Option<String>,
    /// The socket at which VMs connect.
    #[arg(long, value_name = "PATH", requires = "snapshot")]
    pub listen: Option<PathBuf>,
    /// Load memory only when it is touched.
    #[arg(long)]
    pub no_fill: bool,
    /// Load at most this many bytes per second in the background.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub fill_rate: Option<u64>,
    #[arg(long, value_enum, default_value = "auto")]
    pub working_set: WorkingSetArg,
    #[arg(long, value_name = "TIME", value_parser = interval)]
    pub record_working_set: Option<Duration>,
}

#[derive(Debug, Args)]
pub(crate) struct RewindArgs {
    /// The VM's name, or the path of its control socket.
    pub vm: String,
    /// A snapshot of the same machine in the VM's store: an id or a unique prefix, a tag, or
    /// `latest`, each with ~N for its N-th ancestor, optionally after STORE@. Default: the one the
    /// VM took or was restored from last.
    pub snapshot: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct CheckpointArgs {
    /// The VM's name, or the path of its control socket.
    pub vm: String,
    /// Describe the snapshot.
    #[arg(long, short, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub message: String,
    /// Point this tag at the snapshot.
    #[arg(long, value_name = "TAG")]
    pub tag: Option<String>,
    /// End the VM once the snapshot is published (suspend).
    #[arg(long)]
    pub exit: bool,
    /// Cancel the checkpoint that is being taken instead, whoever asked for it. The guest keeps
    /// running, and its pages are part of the next one.
    #[arg(long, conflicts_with_all = ["message", "tag", "exit"])]
    pub cancel: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LogArgs {
    /// The store, or STORE@REF for only that snapshot and its ancestors. Default: $FRAZIL_STORE,
    /// then ./frazil-store.
    #[arg(value_name = "STORE|SNAP")]
    pub target: Option<String>,
    /// Draw how snapshots descend from each other, like `git log --graph`: children before parents,
    /// the newest branch first. With --json nothing is drawn, and nothing changes.
    #[arg(long)]
    pub graph: bool,
    /// List at most N snapshots.
    #[arg(long, short = 'n', value_name = "N", visible_alias = "limit")]
    pub max_count: Option<usize>,
    #[command(flatten)]
    pub picture: HeatmapArgs,
}

#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// The VM's name, or the path of its control socket.
    pub vm: String,
    /// How often to sample the VM.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = interval)]
    pub interval: Duration,
    /// Stop after N samples.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    /// The snapshot, as STORE@REF.
    #[arg(default_value = "latest")]
    pub snapshot: String,
    #[command(flatten)]
    pub picture: HeatmapArgs,
}

/// Which snapshots' memory `verify` compares with the built-in workload's oracle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum MemoryCheck {
    /// The newest snapshot looked at.
    Newest,
    /// Every snapshot.
    All,
    /// Only check that everything can be read back as it was written.
    None,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// A store, for all its snapshots, or STORE@REF for one. Default: $FRAZIL_STORE, then
    /// ./frazil-store.
    pub target: Option<String>,
    /// For guests that run the built-in workload: check memory page by page against what the guest
    /// must have written.
    #[arg(long, value_enum, default_value = "newest")]
    pub memory: MemoryCheck,
}

#[derive(Debug, Args)]
pub(crate) struct DiffArgs {
    /// The first snapshot, usually the older, as STORE@REF.
    pub a: String,
    /// The second, as STORE@REF, or just REF in the same store.
    pub b: String,
    /// Compare contents: pages rewritten with what was there before do not count. Reads them all.
    #[arg(long)]
    pub exact: bool,
    /// Print at most N ranges of each region, or `all`. With --json it is always all.
    #[arg(long, value_name = "N|all", default_value = "20", value_parser = number_or_all)]
    pub ranges: usize,
    #[command(flatten)]
    pub picture: HeatmapArgs,
}

/// Which snapshots to keep, as in `restic forget`: one stays if any rule keeps it. Tagged ones
/// always stay.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Rules: which of a VM's snapshots to keep")]
pub(crate) struct KeepArgs {
    /// The newest N.
    #[arg(long = "keep-last", value_name = "N", value_parser = at_least_one())]
    pub last: Option<u32>,
    /// The newest of each of the last N minutes that have one.
    #[arg(long = "keep-minutely", value_name = "N", value_parser = at_least_one())]
    pub minutely: Option<u32>,
    /// The newest of each of the last N hours that have one.
    #[arg(long = "keep-hourly", value_name = "N", value_parser = at_least_one())]
    pub hourly: Option<u32>,
    /// The newest of each of the last N days that have one.
    #[arg(long = "keep-daily", value_name = "N", value_parser = at_least_one())]
    pub daily: Option<u32>,
    /// The newest of each of the last N ISO weeks that have one.
    #[arg(long = "keep-weekly", value_name = "N", value_parser = at_least_one())]
    pub weekly: Option<u32>,
    /// The newest of each of the last N months that have one.
    #[arg(long = "keep-monthly", value_name = "N", value_parser = at_least_one())]
    pub monthly: Option<u32>,
    /// The newest of each of the last N years that have one.
    #[arg(long = "keep-yearly", value_name = "N", value_parser = at_least_one())]
    pub yearly: Option<u32>,
    /// All that are less than TIME older than the newest: 90m, 2h, 1d12h, 6w.
    #[arg(long = "keep-within", value_name = "TIME", value_parser = within)]
    pub within: Option<Duration>,
}

impl KeepArgs {
    pub(crate) fn policy(self) -> Policy {
        let Self { last, minutely, hourly, daily, weekly, monthly, yearly, within } = self;
        Policy { last, minutely, hourly, daily, weekly, monthly, yearly, within }
    }
}

#[derive(Debug, Args)]
pub(crate) struct ForgetArgs {
    /// Snapshots to forget, as STORE@REF, or as REF alone in the same store. The path of an
    /// existing folder names the store. (For a tag with a folder's name, write `@TAG`.)
    #[arg(value_name = "STORE|SNAP")]
    pub targets: Vec<String>,
    /// The store. Default: that of the snapshots, else $FRAZIL_STORE, else ./frazil-store.
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Judge only the snapshots of this VM.
    #[arg(long, value_name = "VM")]
    pub name: Option<String>,
    /// Forget the snapshots named even if they are tagged, that is, meant to be kept.
    #[arg(long)]
    pub untag: bool,
    /// Print what would be forgotten, and change nothing.
    #[arg(long, short = 'n')]
    pub dry_run: bool,
    /// Free the space as well, as `frazil prune` does.
    #[arg(long)]
    pub prune: bool,
    #[command(flatten)]
    pub keep: KeepArgs,
}

#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// The store. Default: $FRAZIL_STORE, then ./frazil-store.
    pub store: Option<PathBuf>,
    /// Leave this much unused, as a share of what is in use, rather than rewrite more.
    #[arg(long, value_name = "PERCENT", default_value = "5%", value_parser = percent)]
    pub max_unused: f64,
    /// Rewrite at most this much; 0 only removes files that nothing needs.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_rewrite: Option<u64>,
    /// zstd level for rewritten data: 1 to 22, or -1 to -100 for the fast ones. Use the level that
    /// `run` used: data written at a higher level would grow.
    #[arg(long, value_name = "LEVEL", default_value_t = 1, allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-100..=22))]
    pub compression: i32,
    /// Print what would be done, and change nothing.
    #[arg(long, short = 'n')]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Size of guest memory.
    #[arg(long, value_name = "SIZE", default_value = "512MiB", value_parser = size)]
    pub memory: u64,
    /// Number of checkpoints to take.
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub checkpoints: usize,
    /// Keep the store in this folder, which must not exist yet.
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
}
