//! Exports that cannot be completed: they say why, and leave nothing that could be taken for a
//! whole one.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use frazil_snapstore::{Store, StoreOptions};
use frazil_tests::format_reader::{BLOCK_HEADER_LEN, payload_of, read_segment};
use frazil_tests::oracle::{Edit, Model, content, take};
use frazil_tests::vm_harness::{Host, PATIENCE, finish};

const PAGES: usize = 6_000;

struct Bed {
    host: Host,
    store: Arc<Store>,
    model: Model,
}

impl Bed {
    /// Makes a store with one snapshot: memory, another region, two state chunks.
    fn new() -> Self {
        let host = Host::new();
        let store = Store::open_or_create(&host.store_path(), StoreOptions::default());
        let store = store.expect("a store");
        let regions = [("ram".to_owned(), vec![0; PAGES]), ("second".to_owned(), vec![0; 40])];
        let mut model = Model { regions: regions.into() };
        let ram = (0..PAGES as u64).step_by(3).map(|page| (page, 1 + (page % 29) as u8)).collect();
        let rounds = vec![("ram".to_owned(), ram), ("second".to_owned(), vec![(7, 30)])];
        let _taken = take(&store, None, &mut model, &Edit { rounds, step: 0 }).expect("it works");
        Self { host, store, model }
    }

    fn memory(&self) -> Vec<u8> {
        self.model.regions["ram"].iter().flat_map(|id| content(*id)).copied().collect()
    }

    fn at(&self) -> String {
        self.host.at("latest")
    }

    fn segment(&self) -> PathBuf {
        let mut all = fs::read_dir(self.host.store_path().join("segments")).expect("a folder");
        all.next().expect("one").expect("it").path()
    }

    /// Damages the first record whose payload satisfies `is_it`.
    fn damage(&self, is_it: impl Fn(&[u8]) -> bool) {
        let path = self.segment();
        let mut bytes = fs::read(&path).expect("it");
        let records = read_segment(&bytes);
        let record = records
            .iter()
            .find(|record| is_it(&payload_of(&bytes[record.offset..record.end()])))
            .expect("there is one");
        bytes[record.offset + BLOCK_HEADER_LEN + 5] ^= 0x10;
        fs::write(&path, bytes).expect("it");
    }

    /// Returns the names of what the host's folder holds besides the store and the runtime folder.
    fn leavings(&self) -> Vec<String> {
        let names = fs::read_dir(self.host.path("")).expect("a folder");
        let names = names.map(|entry| entry.expect("it").file_name().into_string().expect("UTF-8"));
        let mut names: Vec<String> =
            names.filter(|name| name != "store" && name != "run").collect();
        names.sort();
        names
    }
}

fn has(payload: &[u8], part: &[u8]) -> bool {
    payload.windows(part.len()).any(|window| window == part)
}

#[test]
fn damage_is_named_and_no_file_is_left() {
    let bed = Bed::new();
    // Content 3 is noise, stored as it is.
    bed.damage(|payload| has(payload, &content(3)[..64]));
    fs::write(bed.host.path("old"), "what was there").expect("a file");
    let at = bed.at();
    for (file, more) in [("new", &[][..]), ("old", &["--force"])] {
        for format in ["raw", "tar"] {
            let args = [&["export", &at, file, "--format", format], more].concat();
            let refused = bed.host.frazil(&args);
            refused.expect_code(1).expect_says(&["segments/", "offset", file]);
            assert_eq!(bed.leavings(), ["old"]);
        }
    }
    assert_eq!(fs::read_to_string(bed.host.path("old")).expect("it"), "what was there");
    // What is not damaged can still be exported.
    let _done = bed.host.ok(&["export", &bed.at(), "second", "--region", "second"]);
    let piped = bed.host.command(&["export", &bed.at(), "-"]).stderr(Stdio::piped()).output();
    let piped = piped.expect("it runs");
    assert_eq!(piped.status.code(), Some(1));
    assert!(bed.memory().starts_with(&piped.stdout) && piped.stdout.len() < bed.memory().len());
    assert!(String::from_utf8_lossy(&piped.stderr).contains("segments/"), "{piped:?}");
}

#[test]
fn an_archive_that_is_cut_off_does_not_look_whole() {
    let bed = Bed::new();
    bed.damage(|payload| has(payload, b"\"text\"") && has(payload, b"\"step\":0"));
    let mut export = bed.host.command(&["export", &bed.at(), "-", "--format", "tar"]);
    let exported = export.output().expect("it runs");
    assert_eq!(exported.status.code(), Some(1), "{exported:?}");
    // An archive ends with two blocks of zeros.
    let whole = exported.stdout.len() >= 1024
        && exported.stdout[exported.stdout.len() - 1024..].iter().all(|byte| *byte == 0);
    assert!(!whole, "{} bytes", exported.stdout.len());
}

#[test]
fn what_is_exported_to_standard_output_is_what_a_file_would_have() {
    let bed = Bed::new();
    let piped = bed.host.command(&["export", &bed.at(), "-"]).output().expect("it runs");
    assert!(piped.status.success() && piped.stdout == bed.memory(), "{:?}", piped.status);
    let second = bed.host.command(&["export", &bed.at(), "-", "--region", "second"]).output();
    assert_eq!(second.expect("it runs").stdout.len(), 40 * 4096);
    assert_eq!(bed.leavings(), [""; 0], "and there is no file `-`");
    bed.host
        .frazil(&["export", &bed.at(), "-", "--format", "elf-core"])
        .expect_code(2)
        .expect_says(&["expected a file", "`-`"]);
    // A reader that goes away ends the export.
    let mut export = bed.host.command(&["export", &bed.at(), "-"]);
    export.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = export.spawn().expect("it starts");
    let mut start = [0; 4096];
    let mut stdout = child.stdout.take().expect("a pipe");
    stdout.read_exact(&mut start).expect("it writes");
    drop(stdout);
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("standard output"), "{output:?}");
}

#[test]
fn a_full_disk_is_an_error_and_so_is_a_full_standard_output() {
    let bed = Bed::new();
    let full = || File::options().write(true).open("/dev/full").expect("it is everywhere");
    let store = bed.host.store_path().display().to_string();
    let at = bed.at();
    for args in [
        &["export", &at, "-"][..],
        &["export", &at, "-", "--format", "tar"],
        &["log", &store],
        &["log", &store, "--graph"],
        &["show", &at, "--json"],
        &["completion", "fish"],
    ] {
        let mut command = bed.host.command(args);
        let output = command.stdout(full()).stderr(Stdio::piped()).output().expect("it runs");
        assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("No space left"), "{args:?}: {said}");
    }
    // A full standard error does not change the exit status.
    let mut command = bed.host.command(&["show", "nothing@latest"]);
    let status = command.stderr(full()).status().expect("it runs");
    assert_eq!(status.code(), Some(1));
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: not root, and a small file system must be mounted for the rest");
        return;
    }
    let small = bed.host.path("small");
    fs::create_dir(&small).expect("a folder");
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", "size=1m", "frazil-test"]).arg(&small);
    if finish(mount, PATIENCE).status.code() != Some(0) {
        eprintln!("SKIPPED: root may not mount here");
        return;
    }
    let file = small.join("file").display().to_string();
    let refused =
        ["raw", "tar"].map(|format| bed.host.frazil(&["export", &at, &file, "--format", format]));
    let left = fs::read_dir(&small).expect("it").count();
    let mut unmount = Command::new("umount");
    unmount.arg("-l").arg(&small);
    finish(unmount, PATIENCE).expect_code(0);
    assert_eq!(left, 0);
    for refused in refused {
        refused.expect_code(1).expect_says(&["No space left", &file]);
    }
}

#[test]
fn only_files_are_replaced_and_only_those_that_may_be() {
    let bed = Bed::new();
    let at = |name: &str| bed.host.path(name);
    let latest = bed.at();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        at("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .expect("a pipe");
    fs::create_dir(at("folder")).expect("a folder");
    symlink("/dev/null", at("null")).expect("a link");
    for format in ["raw", "tar", "elf-core"] {
        for (name, says) in
            [("pipe", "a pipe"), ("folder", "a folder"), ("null", "a character device")]
        {
            let args = ["export", &latest, name, "--force", "--format", format];
            let refused = bed.host.frazil(&args);
            // For `elf-core` the error may be that the oracle's snapshots have no machine.
            refused.expect_code(1);
            assert!(format == "elf-core" || refused.stderr.contains(says), "{refused:#?}");
        }
    }
    assert!(at("pipe").symlink_metadata().expect("it").file_type().is_fifo());
    assert!(at("null").symlink_metadata().expect("it").is_symlink());
    assert!(fs::metadata("/dev/null").expect("it").file_type().is_char_device());
    // The file that a link leads to is replaced, and only its owner may read it.
    fs::write(at("file"), "old").expect("a file");
    symlink("file", at("link")).expect("a link");
    let _done = bed.host.ok(&["export", &bed.at(), "link", "--force"]);
    assert!(at("link").symlink_metadata().expect("it").is_symlink());
    assert!(fs::read(at("file")).expect("it") == bed.memory());
    assert_eq!(fs::metadata(at("file")).expect("it").permissions().mode() & 0o777, 0o600);
    drop(bed.store);
}
