//! A stock Linux guest, end to end: `frazil` runs a distribution's kernel, as shipped, on KVM with
//! hardware virtualisation. KVM itself runs in a machine whose processor, AMD-V included, is
//! emulated by QEMU, so this works wherever QEMU does, ten to twenty times slower than on hardware.
//!
//! ```text
//! test ── QEMU ── kernel and KVM ── the test's script (outer.sh) ── frazil ── kernel ── guest.sh
//! ```
//!
//! A test runs a script in the outer machine and then checks what the script said. `outer.sh`
//! documents the functions that scripts can use, `guest.sh` what guests do. Lines that begin with
//! `TEST` are for the test; when the script is over, the guests' consoles follow as `CONSOLE VM
//! text` and what `frazil` said as `LOG VM text`.
//!
//! The emulated AMD-V now and then loses a timer interrupt, and a guest stands still for ever. Such
//! a run is repeated, at most twice, and the stalls are counted and reported. A run that fails in
//! any other way is never repeated.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

mod archive;
mod checkpoint;
mod machine;
mod parts;
mod who;

use archive::Archive;
pub use checkpoint::Checkpoint;
use machine::{End, Run};
use parts::Parts;
pub use who::GuestIdentity;

use crate::rng::Rng;

/// How often a stalled run is repeated.
const AGAIN_MAX: usize = 2;
/// Least size of what never changes in the guest's tmpfs, in bytes.
const KNOWN_BYTES: usize = 1 << 20;
const KNOWN_SEED: u64 = 6;

/// Kernel modules of the outer machine.
const OUTER_MODULES: [&str; 4] = ["kvm_amd", "tun", "virtio_pci", "virtio_blk"];
/// Programs of the outer machine, besides busybox and `frazil`.
const OUTER_PROGRAMS: [&str; 4] = ["mkfs.ext4", "e2fsck", "socat", "zstd"];
/// Kernel modules of guests.
const GUEST_MODULES: [&str; 6] = [
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
];
/// Programs of guests, besides busybox.
const GUEST_PROGRAMS: [&str; 3] = ["sqlite3", "e2fsck", "socat"];

/// Held while an emulated machine runs. One at a time: each takes two cores and 3 GiB.
static TURN: Mutex<()> = Mutex::new(());

/// What a script said, and what the guests did.
#[derive(Debug)]
pub struct Outcome {
    lines: Vec<String>,
    /// How many runs stalled before one completed.
    pub stalls: usize,
    /// How long the completed run took.
    pub took: Duration,
    folder: PathBuf,
}

/// Runs `script` in a machine with KVM, `frazil`, and a kernel with an initrd for guests. `name`
/// names the folder of its logs, in TARGET/tmp/linux. Returns `None` if this machine has no QEMU.
///
/// # Panics
/// If the script fails or stalls too often, with the ends of all logs; if something is missing that
/// `make setup-tests` installs.
#[must_use]
pub fn run(name: &str, script: &str) -> Option<Outcome> {
    run_with(name, script, |_parts| Vec::new())
}

/// As [`run`], with more files in the machine: their paths there, and their contents.
///
/// # Panics
/// As [`run`].
#[must_use]
pub fn run_with(
    name: &str,
    script: &str,
    files: impl FnOnce(&Parts) -> Vec<(&'static str, Vec<u8>)>,
) -> Option<Outcome> {
    let parts = Parts::find()?;
    let base = base(&parts);
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut initrd = base.clone();
    // The kernel unpacks concatenated archives.
    let mut more = Archive::new();
    more.data("/test.sh", script.as_bytes());
    for (path, contents) in files(&parts) {
        more.data(path, &contents);
    }
    initrd.extend(more.finish());
    let folder = parts::target_folder().join("tmp/linux").join(name);
    fs::create_dir_all(&folder).expect("cargo's folder is writable");
    let path = folder.join("initrd");
    fs::write(&path, &initrd).expect("cargo's folder is writable");

    let mut stalls = 0;
    loop {
        let start = Instant::now();
        let Run { lines, end } = machine::run(&parts, &path, &folder);
        let took = start.elapsed();
        match end {
            End::Done => {
                tell(&format!("{name}: {:.1} s, {stalls} stalls", took.as_secs_f64()));
                return Some(Outcome { lines, stalls, took, folder });
            }
            End::Stalled(why) if stalls < AGAIN_MAX => {
                stalls += 1;
                tell(&format!("{name}: stall {stalls}, made again: {why}"));
            }
            End::Stalled(why) => panic!("{name} stalled {} times, last: {why}", stalls + 1),
            End::Failed(why) => panic!("{name}, after {stalls} stalls: {why}"),
        }
    }
}

/// Reports on standard error directly: the test runner captures what `eprintln!` prints, and shows
/// it only if the test fails.
fn tell(what: &str) {
    let _said = writeln!(std::io::stderr(), "stock Linux: {what}");
}

/// Returns the archive that all scripts' machines have in common. It is made once per process.
fn base(parts: &Parts) -> Vec<u8> {
    static BASE: OnceLock<Vec<u8>> = OnceLock::new();
    let make = || {
        let mut archive = Archive::new();
        Parts::program(&mut archive, "busybox");
        archive.link("/bin/sh", "busybox");
        archive.link("/bin/cat", "busybox");
        archive.script("/init", include_bytes!("outer.sh"));
        archive.script("/bin/frazil", &parts::static_frazil());
        for program in OUTER_PROGRAMS {
            Parts::program(&mut archive, program);
        }
        parts.modules(&mut archive, &OUTER_MODULES);
        archive.data("/vmlinuz", &archive::read(&parts.kernel));
        archive.data("/guest.cpio", &guest(parts));
        archive.finish()
    };
    BASE.get_or_init(make).clone()
}

/// Makes the guests' initrd.
fn guest(parts: &Parts) -> Vec<u8> {
    let mut archive = Archive::new();
    Parts::program(&mut archive, "busybox");
    archive.link("/bin/sh", "busybox");
    archive.script("/init", include_bytes!("guest.sh"));
    for program in GUEST_PROGRAMS {
        Parts::program(&mut archive, program);
    }
    parts.modules(&mut archive, &GUEST_MODULES);
    archive.data("/known", known().as_bytes());
    archive.finish()
}

/// Makes what never changes in each guest's tmpfs: lines of hexadecimal numbers that follow from a
/// seed.
fn known() -> String {
    let mut rng = Rng::new(KNOWN_SEED);
    let mut text = String::with_capacity(KNOWN_BYTES);
    while text.len() < KNOWN_BYTES {
        let end = if rng.below(8) == 0 { '\n' } else { ' ' };
        write!(text, "{:016x}{end}", rng.bits()).expect("memory");
    }
    text
}

/// Returns the SHA-256 of the guests' /known, as `sha256sum` prints it.
///
/// # Panics
/// If there is no `sha256sum`.
#[must_use]
pub fn known_sum() -> String {
    let file = tempfile::NamedTempFile::new().expect("a scratch file");
    fs::write(file.path(), known()).expect("a scratch file");
    let output = Command::new("sha256sum").arg(file.path()).output().expect("sha256sum runs");
    let text = String::from_utf8(output.stdout).expect("text");
    text.split(' ').next().expect("a sum").to_owned()
}

impl Outcome {
    /// Unpacks into `folder` the folder that the script kept.
    ///
    /// # Panics
    /// If it kept none, or there is no `tar`.
    pub fn unpack_kept(&self, folder: &Path) {
        let archive = machine::kept(&self.folder);
        let mut tar = Command::new("tar");
        let status = tar.arg("-xf").arg(&archive).arg("-C").arg(folder).status().expect("tar runs");
        assert!(status.success(), "{}: {status}", archive.display());
    }

    /// Returns the words after `key` of each line `TEST key word…`, in order.
    #[must_use]
    pub fn test_lines(&self, key: &str) -> Vec<Vec<&str>> {
        self.after("TEST", key)
    }

    /// Returns the words after `key` of the only line `TEST key word…`.
    ///
    /// # Panics
    /// If there is none, or more than one.
    #[track_caller]
    #[must_use]
    pub fn only_test_line(&self, key: &str) -> Vec<&str> {
        let mut found = self.test_lines(key);
        assert_eq!(found.len(), 1, "lines `TEST {key}`: {found:?}");
        found.remove(0)
    }

    /// Returns the words after `key` of each line `GUEST key word…` on a guest's console.
    #[must_use]
    pub fn guest_lines(&self, vm: &str, key: &str) -> Vec<Vec<&str>> {
        let prefix = format!("CONSOLE {vm} GUEST");
        self.after(&prefix, key)
    }

    /// Returns every line of a guest's console.
    #[must_use]
    pub fn console(&self, vm: &str) -> Vec<&str> {
        let prefix = format!("CONSOLE {vm} ");
        self.lines.iter().filter_map(|line| line.strip_prefix(&prefix)).collect()
    }

    fn after(&self, prefix: &str, key: &str) -> Vec<Vec<&str>> {
        let prefix = format!("{prefix} {key}");
        let rest = |line| str::strip_prefix(line, prefix.as_str());
        self.lines
            .iter()
            .filter_map(|line| rest(line.as_str()))
            .filter(|rest| rest.is_empty() || rest.starts_with(' '))
            .map(|rest| rest.split_whitespace().collect())
            .collect()
    }
}

/// What a guest reports about itself once a turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Tick {
    /// Number of the turn.
    pub number: u64,
    /// Seconds since the guest was booted, by its own clock.
    pub uptime: f64,
    /// The guest's date, in seconds since 1970.
    pub date: f64,
    /// How many rounds each of the two loads has done.
    pub rounds: [u64; 2],
    /// Rows in the guest's database; 0 if it has no disk.
    pub rows: u64,
    /// The number of the guest's current connection, counted from 1, and the last number that came
    /// back over it; zeros if there is no network.
    pub echoed: [u64; 2],
    /// 128 random bits from the guest's /dev/hwrng, or /dev/urandom if it has none.
    pub random: String,
}

impl Outcome {
    /// Returns the ticks of a guest in order. A last line that was cut short is left out.
    ///
    /// # Panics
    /// If any other line is not a whole tick, or there is no tick at all.
    #[track_caller]
    #[must_use]
    pub fn ticks(&self, vm: &str) -> Vec<Tick> {
        let mut lines = self.guest_lines(vm, "tick");
        // The last line may be cut short where the guest ended.
        lines.pop_if(|words| {
            !words.contains(&"random") || words.last().is_some_and(|word| word.len() != 32)
        });
        let ticks: Vec<Tick> = lines.iter().map(|words| Tick::parse(words)).collect();
        assert!(!ticks.is_empty(), "{vm} never ticked: {:#?}", self.console(vm));
        ticks
    }
}

impl Tick {
    #[track_caller]
    fn parse(words: &[&str]) -> Self {
        let field = |name: &str, offset: usize| {
            let place = words.iter().position(|word| *word == name);
            place
                .and_then(|place| words.get(place + offset))
                .copied()
                .unwrap_or_else(|| panic!("expected `{name}` in a tick, found {words:?}"))
        };
        Self {
            number: value(words.first().expect("a number")),
            uptime: value(field("uptime", 1)),
            date: value(field("date", 1)),
            rounds: [1, 2].map(|offset| value(field("rounds", offset))),
            rows: value(field("rows", 1)),
            echoed: [1, 2].map(|offset| value(field("echoed", offset))),
            random: field("random", 1).to_owned(),
        }
    }
}

/// Parses a number that a script or a guest said.
///
/// # Panics
/// If `word` is not a number.
#[track_caller]
#[must_use]
pub fn value<T: FromStr>(word: &str) -> T {
    word.parse().unwrap_or_else(|_| panic!("expected a number, found {word:?}"))
}
