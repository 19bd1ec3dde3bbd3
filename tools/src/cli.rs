//! The command line, as a person types it.

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
    a_few, disk, elide, every, how_many, interval, net, other_disk, percent, serial, size, tracker,
    vsock, within, workload,
};

/// Freezes running virtual machines: a checkpoint is taken while the guest goes on and costs what
/// changed; any checkpoint can be resumed at once, its memory arriving as it is touched.
#[derive(Debug, Parser)]
#[command(name = "frazil", version, propagate_version = true, infer_subcommands = false)]
pub(crate) struct Cli {
    /// Print JSON on standard output: one object, or one a line.
    #[arg(long, global = true)]
    pub json: bool,
    /// When to print colours: `auto` is on a terminal, unless $NO_COLOR is set.
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
    /// Freeze a running VM now, and let the guest go on; with --exit, suspend it.
    Checkpoint(CheckpointArgs),
    /// Run a VM from a snapshot, or many clones of it; its memory arrives as it is touched.
    Resume(ResumeArgs),
    /// Take a running VM back to a snapshot, in place.
    Rewind(RewindArgs),
    /// List the VMs that run.
    Ps,
    /// Make a guest stand still.
    Pause(VmArg),
    /// Let a guest that stands still run on.
    Continue(VmArg),
    /// End a VM and its process.
    Stop(VmArg),
    /// Watch a running VM live: dirty rate, pauses, checkpoints, paging.
    ///
    /// `q` or Ctrl-C quits. In a pipe, or with --json, one JSON object a line is printed instead, every --interval.
    Top(TopArgs),
    /// List snapshots: when each was taken, how much it holds, what it descends from (--graph).
    Log(LogArgs),
    /// Show what a snapshot is: machine, vCPU registers, devices, memory (--heatmap draws it).
    Show(ShowArgs),
    /// Show what changed between two snapshots: memory, disks, registers, devices.
    Diff(DiffArgs),
    /// Look into a snapshot's memory: what it is made of, dumps, searches, page tables, code, stacks.
    ///
    /// Without options: what each region is made of. Nothing is run, and nothing is changed.
    Inspect(InspectArgs),
    /// Copy a snapshot's memory, one of its disks, or all of it, to a file, also for a debugger.
    Export(ExportArgs),
    /// Make a snapshot of raw memory files, such as Firecracker writes, or of disk images.
    ///
    /// Such a snapshot has no vCPUs and devices, and cannot be resumed; everything else works.
    Import(ImportArgs),
    /// Show snapshots as folders: memory, disks and state as files, for grep, strings, cmp, dd.
    ///
    /// DIR then has `latest`, `ids`, `tags` and `vms`, and every snapshot `memory/ram`, `disks/disk0`,
    /// `state/vcpu0.json`, `manifest.json`. What is read is verified; a damaged block is an I/O error,
    /// and this command says where it is. Snapshots taken or forgotten meanwhile come and go; one that
    /// is open stays. Runs until Ctrl-C or `umount DIR`.
    Mount(MountArgs),
    /// Check that snapshots are intact: everything is read, and compared with its hash.
    Verify(VerifyArgs),
    /// Take snapshots out of a store: those named, or that no rule keeps; --prune frees space.
    ///
    /// With rules, all snapshots are judged, those of each VM apart, in local time: what no rule
    /// wants is forgotten. Tagged ones always stay, and so does the newest of every VM. Without
    /// rules, the snapshots named are forgotten, all or none.
    ///
    /// They vanish at once, with their tags. Their children take the nearest ancestor that stays
    /// for parent, and lose nothing. The space comes back with --prune or `frazil prune`.
    Forget(ForgetArgs),
    /// Free the space of what no snapshot needs any more.
    ///
    /// Removes what no snapshot reaches, and rewrites files that are mostly unused. What a running
    /// VM has open stays. VMs go on meanwhile, but cannot write checkpoints. It can be interrupted
    /// at any moment, and run again.
    Prune(PruneArgs),
    /// Bring in memory for other processes; `resume` starts it.
    #[command(hide = true)]
    Pager(PagerArgs),
    /// Tell the whole story on the built-in guest: run, checkpoint, kill, resume, verify.
    Demo(DemoArgs),
    /// Print what a shell needs to complete commands and options.
    ///
    /// bash: frazil completion bash > /etc/bash_completion.d/frazil. zsh: frazil completion zsh > a
    /// folder of $fpath, as _frazil. fish: frazil completion fish > ~/.config/fish/completions/frazil.fish.
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
    /// Boot this kernel by the Linux 64-bit boot protocol, with its console on COM1: a Linux bzImage
    /// (the vmlinuz of a distribution), or an ELF64 file (its vmlinux, or a bare-metal program).
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
    /// Run the built-in guest: key=value,… of touch=SIZE, rate=PAGES_PER_S|max,
    /// pattern=seq|uniform|shuffle|hot, hot_share=0.1, hot_writes=0.9, content=zero|text|random|edit,
    /// seed=N, populate=yes|no, check=SECONDS, report=SECONDS, stop_after=TURNS, gap_us=N.
    #[arg(long, value_name = "SPEC", value_parser = workload, group = "guest")]
    pub workload: Option<WorkloadSpec>,
    /// Guest memory.
    #[arg(long, value_name = "SIZE", default_value = "512MiB", value_parser = size)]
    pub memory: u64,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: usize,
    /// A disk with the contents of FILE, which stays as it is: what the guest writes is kept beside
    /// it (see --overlay) and becomes part of every snapshot: resuming needs no file. The guest sees
    /// it as a virtio block device, /dev/vda to Linux. `,ro` makes it read-only. May be repeated.
    #[arg(long = "disk", value_name = "FILE[,ro]", value_parser = disk)]
    pub disks: Vec<DiskConfig>,
    /// Leave out the memory balloon, through which Linux says which memory it does not use, so that
    /// snapshots need not hold it. With --workload there is none.
    #[arg(long)]
    pub no_balloon: bool,
    #[command(flatten)]
    pub host: HostArgs,
}

#[derive(Debug, Args)]
pub(crate) struct HostArgs {
    /// Name to control it by; `vm-PID` if none is given.
    #[arg(long, value_name = "VM")]
    pub name: Option<String>,
    /// Store for its checkpoints, made if it is missing. Default: that of the snapshot, else
    /// $FRAZIL_STORE, else ./frazil-store.
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Keep what the guest writes to its disks in a file without a name in this folder, instead of
    /// in memory.
    #[arg(long, value_name = "DIR")]
    pub overlay: Option<PathBuf>,
    /// A network card on the host's tap interface NAME, or `none` for one without a cable. May be
    /// repeated. A resumed machine has the cards it had: this says what they are on now, in their
    /// order; without it, on what they were. `{clone}` is the number of the VM with --clones, 1 without: as it is
    /// in NAME, as two bytes in ADDRESS (02:00:00:00:{clone}).
    #[arg(long = "net", value_name = "tap=NAME[,mac=ADDRESS]|none", value_parser = net)]
    pub nets: Vec<NetConfig>,
    /// A socket device that leads to the host: who connects to the Unix socket PATH and says
    /// `CONNECT PORT` reaches that port of the guest's; port N of the host's, to the guest, is the Unix
    /// socket PATH_N. CID is the guest's context id, 3 if none is given. A resumed machine that has
    /// one: where it leads to now, or nowhere with `none`; `{clone}` is the number of the VM with --clones, 1
    /// without.
    #[arg(long, value_name = "[cid=CID,]socket=PATH|none", value_parser = vsock)]
    pub vsock: Option<VsockConfig>,
    /// What keeps track of the pages the guest writes. Default: what suits the machine and this KVM.
    #[arg(long, value_name = "HOW", value_parser = tracker)]
    pub dirty_tracking: Option<TrackerKind>,
    /// Memory that a checkpoint may take to copy pages aside while the guest runs. What is more
    /// stays in place, write-protected until it is written: the guest waits a little before it can
    /// change such a page, while it is copied; and for as long as writing takes once four times as
    /// much was copied (`cow_waits` in statistics and metrics).
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = size)]
    pub staging: u64,
    /// Keep the guest from running for up to this share of the time while a checkpoint catches up with
    /// it, where more than --staging is dirty and pages cannot stay in place: this host has no
    /// userfaultfd, or memory is still being paged in. With 0% it stands still for as long as it takes
    /// to copy them, and they take as much memory.
    #[arg(long, value_name = "PERCENT", default_value = "97%", value_parser = percent)]
    pub throttle: f64,
    /// Take a checkpoint this often, or the next as soon as the one before is published. What is
    /// due while one is being taken is left out.
    #[arg(long, value_name = "TIME|continuous", value_parser = every)]
    pub checkpoint_every: Option<Every>,
    /// Let a checkpoint that is due wait up to so long for a moment in which the guest writes
    /// little, so that it stands still for less.
    #[arg(long, value_name = "TIME", value_parser = interval, requires = "checkpoint_every")]
    pub checkpoint_quiet: Option<Duration>,
    /// zstd level for checkpoints: 1 to 22, or -1 to -100 for the fast ones.
    #[arg(long, value_name = "LEVEL", default_value_t = 1, allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-100..=22))]
    pub compression: i32,
    /// What checkpoints need not write: `all`, `none`, or some of `zero` (pages that are all
    /// zero), `equal` (pages rewritten with what was there), `dedup` (pages that are in the store
    /// already), `delta` (what little changes of a page does not touch).
    #[arg(long, value_name = "LIST", default_value = "all", value_parser = elide)]
    pub elide: Elide,
    /// Put the control socket here.
    #[arg(long, value_name = "PATH")]
    pub api_socket: Option<PathBuf>,
    /// Guest's serial output: `stdio`, `null`, or a file to append to. With --json `stdio` is
    /// standard error.
    #[arg(long, value_name = "WHERE", default_value = "stdio", value_parser = serial)]
    pub serial: SerialArg,
    /// What the guest reads from its serial port: `auto` is the terminal, where there is one in the
    /// foreground and --serial is stdio; `stdin` is standard input, whatever it is; `none`. On a
    /// terminal all keys are the guest's, Ctrl-C too, but Ctrl-A: then `x` ends the VM, `h` shows more.
    #[arg(long, value_enum, value_name = "WHAT", default_value = "auto")]
    pub serial_input: SerialInput,
    /// Once what only root may have is open (KVM, taps, userfaultfd, the files of --kernel and --disk),
    /// go on as this user, with its groups or the one given; as are an external pager and the process
    /// that has the memory of --clones. For a start as root. The store is that user's, and made for it if
    /// there is none.
    #[arg(long, value_name = "NAME|UID[:GROUP|GID]")]
    pub user: Option<User>,
    /// Do not confine the threads that a guest can reach with seccomp filters, for kernels without.
    #[arg(long)]
    pub no_seccomp: bool,
    /// Applied to the snapshots with this VM's name, while it runs.
    #[command(flatten)]
    pub keep: KeepArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ResumeArgs {
    /// STORE@REF: a snapshot id or a unique prefix, a tag, `latest`, each with ~N for its N-th
    /// ancestor. The store defaults to $FRAZIL_STORE, then ./frazil-store.
    pub snapshot: String,
    /// Load all memory before the guest runs. Needs no userfaultfd.
    #[arg(long)]
    pub eager: bool,
    /// Fetch memory only when it is touched; by default the rest follows in the background.
    #[arg(long, conflicts_with = "eager")]
    pub no_fill: bool,
    /// Run so many VMs from it, called NAME-1, NAME-2 and so on, in processes of their own. They share
    /// the snapshot's memory, and so do those that are started later in this way: what one of them
    /// touches is there for all, and what one writes is its own. How memory comes in (--no-fill,
    /// --fill-rate, --working-set, --record-working-set) is for the first of them to say. Of more than
    /// one, serial output goes nowhere unless --serial says where.
    #[arg(long, value_name = "N", conflicts_with = "eager", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub clones: Option<u32>,
    /// Bring memory in from this process, or from one of its own that is replaced if it dies.
    #[arg(long, value_enum, default_value = "internal", conflicts_with_all = ["eager", "clones"])]
    pub pager: PagerArg,
    /// Bring in so many bytes a second in the background, at the most.
    #[arg(long, value_name = "SIZE", value_parser = size, conflicts_with_all = ["eager", "no_fill"])]
    pub fill_rate: Option<u64>,
    /// What was touched first the last time: `auto` brings it in beside the guest, or takes note of
    /// it for a second if nobody has yet; `before` has it there before the guest runs; `off` does
    /// neither.
    #[arg(long, value_enum, default_value = "auto", conflicts_with = "eager")]
    pub working_set: WorkingSetArg,
    /// Take note anew of what is touched, for so long, and keep that with the snapshot.
    #[arg(long, value_name = "TIME", value_parser = interval, conflicts_with_all = ["eager", "working_set"])]
    pub record_working_set: Option<Duration>,
    /// How the guest's clocks go on. `host`: by as much as has passed since the checkpoint, so that its time
    /// of day is right. `snapshot`: from where they were, so that it does not notice.
    #[arg(long, value_enum, default_value = "host")]
    pub clock: ClockArg,
    /// What disk N has from now on, 0 being the first (/dev/vda to Linux), instead of what the snapshot
    /// has: the contents of FILE, which is as long and stays as it is. For a disk that the guest does not
    /// use at that moment. May be repeated. `{clone}` is the number of the VM with --clones, 1 without.
    #[arg(long = "disk", value_name = "N=FILE", value_parser = other_disk)]
    pub disks: Vec<(usize, PathBuf)>,
    /// Leave the guest standing still.
    #[arg(long)]
    pub paused: bool,
    /// The socket of the process that has the snapshot's memory.
    #[arg(long, value_name = "PATH", hide = true)]
    pub memory_from: Option<PathBuf>,
    /// The snapshot that is meant, whatever its name means by now.
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
    /// In a process of its own.
    External,
}

/// What becomes of the pages that were touched first the last time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WorkingSetArg {
    Auto,
    Before,
    Off,
}

#[derive(Debug, Args)]
pub(crate) struct PagerArgs {
    /// Go on as this user.
    #[arg(long, value_name = "USER")]
    pub user: Option<User>,
    /// Serve the memory of this snapshot to the VMs that connect, instead of one VM at standard input.
    #[arg(requires = "listen")]
    pub snapshot: Option<String>,
    /// Where they connect.
    #[arg(long, value_name = "PATH", requires = "snapshot")]
    pub listen: Option<PathBuf>,
    /// Fetch memory only when it is touched.
    #[arg(long)]
    pub no_fill: bool,
    /// Bring in so many bytes a second in the background, at the most.
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
    /// A snapshot of its machine in its store: an id or a unique prefix, a tag, `latest`, each with ~N
    /// for its N-th ancestor, and STORE@ before it if you like. By default the one it took or came
    /// from last.
    pub snapshot: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct CheckpointArgs {
    /// The VM's name, or the path of its control socket.
    pub vm: String,
    /// Say what it is.
    #[arg(long, short, value_name = "TEXT", default_value = "")]
    pub message: String,
    /// Point this tag to it.
    #[arg(long, value_name = "TAG")]
    pub tag: Option<String>,
    /// End the VM once it is published (suspend).
    #[arg(long)]
    pub exit: bool,
    /// Give up the checkpoint that is being taken instead, whoever asked for it. The guest goes
    /// on, and its pages are part of the next one.
    #[arg(long, conflicts_with_all = ["message", "tag", "exit"])]
    pub cancel: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LogArgs {
    /// The store, or STORE@REF: only that snapshot and what it descends from. Default: $FRAZIL_STORE,
    /// then ./frazil-store.
    #[arg(value_name = "STORE|SNAP")]
    pub target: Option<String>,
    /// Draw how snapshots descend from each other, as `git log --graph` does: children before
    /// parents, the newest line first. With --json nothing is drawn, and nothing changes.
    #[arg(long)]
    pub graph: bool,
    /// At most so many.
    #[arg(long, short = 'n', value_name = "N", visible_alias = "limit")]
    pub max_count: Option<usize>,
    #[command(flatten)]
    pub picture: HeatmapArgs,
}

#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// The VM's name, or the path of its control socket.
    pub vm: String,
    /// How often to look.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = interval)]
    pub interval: Duration,
    /// Stop after so many looks.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    /// STORE@REF.
    #[arg(default_value = "latest")]
    pub snapshot: String,
    #[command(flatten)]
    pub picture: HeatmapArgs,
}

/// What of guest memory `verify` compares with the built-in workload's oracle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum MemoryCheck {
    /// The newest snapshot looked at.
    Newest,
    /// Every snapshot.
    All,
    /// None: only that everything can be read back as it was written.
    None,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// A store (all its snapshots), or STORE@REF (that one). Default: $FRAZIL_STORE, then
    /// ./frazil-store.
    pub target: Option<String>,
    /// Of guests that run the built-in workload, check memory page by page against what the guest
    /// must have written.
    #[arg(long, value_enum, default_value = "newest")]
    pub memory: MemoryCheck,
}

#[derive(Debug, Args)]
pub(crate) struct DiffArgs {
    /// STORE@REF: the older one, usually.
    pub a: String,
    /// STORE@REF, or just REF in the same store.
    pub b: String,
    /// Compare contents: pages rewritten with what was there before do not count. Reads them all.
    #[arg(long)]
    pub exact: bool,
    /// Print at most so many ranges of a region, or `all`. With --json it is always all.
    #[arg(long, value_name = "N|all", default_value = "20", value_parser = how_many)]
    pub ranges: usize,
    #[command(flatten)]
    pub picture: HeatmapArgs,
}

/// Which snapshots stay, as `restic forget` has it: one stays if any rule wants it. Tagged ones
/// always do.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Rules: of a VM's snapshots, keep")]
pub(crate) struct KeepArgs {
    /// The newest N.
    #[arg(long = "keep-last", value_name = "N", value_parser = a_few())]
    pub last: Option<u32>,
    /// The newest of each of the last N minutes that have one.
    #[arg(long = "keep-minutely", value_name = "N", value_parser = a_few())]
    pub minutely: Option<u32>,
    /// The newest of each of the last N hours that have one.
    #[arg(long = "keep-hourly", value_name = "N", value_parser = a_few())]
    pub hourly: Option<u32>,
    /// The newest of each of the last N days that have one.
    #[arg(long = "keep-daily", value_name = "N", value_parser = a_few())]
    pub daily: Option<u32>,
    /// The newest of each of the last N ISO weeks that have one.
    #[arg(long = "keep-weekly", value_name = "N", value_parser = a_few())]
    pub weekly: Option<u32>,
    /// The newest of each of the last N months that have one.
    #[arg(long = "keep-monthly", value_name = "N", value_parser = a_few())]
    pub monthly: Option<u32>,
    /// The newest of each of the last N years that have one.
    #[arg(long = "keep-yearly", value_name = "N", value_parser = a_few())]
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
    /// Snapshots to forget, as STORE@REF, or REF alone in the same store; and a folder that is
    /// there names the store. (A tag called like a folder is `@TAG`.)
    #[arg(value_name = "STORE|SNAP")]
    pub targets: Vec<String>,
    /// The store. Default: that of the snapshots, else $FRAZIL_STORE, else ./frazil-store.
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Judge only snapshots of this VM.
    #[arg(long, value_name = "VM")]
    pub name: Option<String>,
    /// Forget the snapshots named even if they have tags, by which somebody meant to keep them.
    #[arg(long)]
    pub untag: bool,
    /// Say what would be forgotten, and change nothing.
    #[arg(long, short = 'n')]
    pub dry_run: bool,
    /// Give back the space as well, as `frazil prune` does.
    #[arg(long)]
    pub prune: bool,
    #[command(flatten)]
    pub keep: KeepArgs,
}

#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// The store. Default: $FRAZIL_STORE, then ./frazil-store.
    pub store: Option<PathBuf>,
    /// Leave so much unused, as a share of what is in use, rather than rewrite more.
    #[arg(long, value_name = "PERCENT", default_value = "5%", value_parser = percent)]
    pub max_unused: f64,
    /// Rewrite at most so much; 0 only removes files that nobody needs.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_rewrite: Option<u64>,
    /// zstd level for what is rewritten: 1 to 22, or -1 to -100 for the fast ones. As with `run`: what was
    /// written at a higher one would grow.
    #[arg(long, value_name = "LEVEL", default_value_t = 1, allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-100..=22))]
    pub compression: i32,
    /// Say what would be done, and change nothing.
    #[arg(long, short = 'n')]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Guest memory.
    #[arg(long, value_name = "SIZE", default_value = "512MiB", value_parser = size)]
    pub memory: u64,
    /// Checkpoints to take.
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub checkpoints: usize,
    /// Keep the store here.
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
}
