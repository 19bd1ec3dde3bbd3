//! `frazil mount` by a user other than root, through `fusermount3`, which is allowed to mount.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use frazil_snapstore::{Store, StoreOptions};
use frazil_tests::mounted::{Mounted, has_helper};
use frazil_tests::oracle::{Edit, Model, content, take};
use frazil_tests::vm_harness::{Finished, Host, PATIENCE, finish, frazil};
use rustix::process::Signal;

/// The user `nobody` on most systems: the helper needs a user with a name.
const UID: u32 = 65_534;

/// True if this test can become another user who can mount; otherwise says why not.
fn helper_or_skip() -> bool {
    let why = if !rustix::process::geteuid().is_root() {
        "not root, who alone can be somebody else"
    } else if !has_helper() {
        "there is no fusermount3 (package fuse3; `make setup-tests` brings it)"
    } else if fs::metadata("/dev/fuse").map_or(0, |device| device.permissions().mode()) & 6 != 6 {
        "/dev/fuse is not for all"
    } else {
        return true;
    };
    eprintln!("SKIPPED: {why}, and this test mounts as nobody");
    false
}

struct Bed {
    host: Host,
    /// A copy of `frazil` that user nobody can reach.
    program: PathBuf,
    memory: Vec<u8>,
}

impl Bed {
    /// Makes a host whose store belongs to user nobody, with one snapshot.
    fn new() -> Self {
        let host = Host::new();
        let store = Store::open_or_create(&host.store_path(), StoreOptions::default());
        let mut model = Model { regions: [("ram".to_owned(), vec![0; 500])].into() };
        let pages = (0..500).step_by(3).map(|page| (page, 1 + (page % 30) as u8)).collect();
        let edit = Edit { rounds: vec![("ram".to_owned(), pages)], step: 0 };
        let _taken = take(&store.expect("a store"), None, &mut model, &edit).expect("it works");
        let memory = model.regions["ram"].iter().flat_map(|id| content(*id)).copied().collect();
        let program = host.path("frazil");
        fs::copy(frazil(), &program).expect("it is copied");
        fs::create_dir(host.path("mnt")).expect("a folder");
        give(&host.path(""));
        Self { host, program, memory }
    }

    /// Returns the command `program`, run as user nobody.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        self.host.surround(&mut command);
        command.uid(UID).gid(UID);
        command
    }

    fn read(&self, name: &str) -> Vec<u8> {
        let output = self.command(Path::new("cat")).arg(self.host.path(name)).output();
        let output = output.expect("it runs");
        assert!(output.status.success(), "{output:?}");
        output.stdout
    }

    fn mount(&self) -> Mounted {
        let mut command = self.command(&self.program);
        command.args(["mount", "store", "mnt", "--json"]);
        Mounted::start(command, &self.host.path("mnt"))
    }

    fn refused(&self, args: &[&str]) -> Finished {
        let mut command = self.command(&self.program);
        command.args(args);
        finish(command, PATIENCE)
    }
}

/// Gives `path` and everything in it to user nobody.
fn give(path: &Path) {
    chown(path, Some(UID), Some(UID)).expect("root may");
    if path.is_dir() {
        fs::read_dir(path).expect("a folder").flatten().for_each(|entry| give(&entry.path()));
    }
}

#[test]
fn nobody_mounts_and_reads_and_unmounts() {
    if !helper_or_skip() {
        return;
    }
    let bed = Bed::new();
    let mut mounted = bed.mount();
    assert!(bed.read("mnt/latest/memory/ram") == bed.memory);
    mounted.signal(Signal::TERM);
    let (code, said) = mounted.end();
    assert_eq!(code, Some(0), "{said}");
    let left = fs::read_dir(bed.host.path("mnt")).expect("it is unmounted").count();
    assert_eq!(left, 0);
    // The next mount clears away what a killed one left, without root.
    let mut killed = bed.mount();
    killed.signal(Signal::KILL);
    let (code, _) = killed.end();
    assert_eq!(code, None);
    let mut again = bed.mount();
    assert!(bed.read("mnt/latest/memory/ram") == bed.memory);
    again.signal(Signal::INT);
    let (code, said) = again.end();
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn what_nobody_may_not_do_is_said() {
    if !helper_or_skip() {
        return;
    }
    let bed = Bed::new();
    fs::create_dir(bed.host.path("roots")).expect("a folder");
    let refused = bed.refused(&["mount", "store", "roots"]);
    refused.expect_code(1).expect_says(&["cannot mount on", "roots"]);
    let conf = fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
    if conf.lines().any(|line| line.trim() == "user_allow_other") {
        eprintln!("SKIPPED: /etc/fuse.conf lets everybody use --allow-other");
        return;
    }
    let refused = bed.refused(&["mount", "store", "mnt", "--allow-other"]);
    refused.expect_code(1).expect_says(&["--allow-other", "/etc/fuse.conf", "user_allow_other"]);
}
