//! `frazil mount` through the kernel: what everyday tools see, and how mounts end.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use frazil_snapstore::{PAGE_SIZE, PruneOptions, PruneProgress, Store, StoreOptions};
use frazil_tests::format_reader::{BLOCK_HEADER_LEN, Record, payload_of, read_segment};
use frazil_tests::mounted::{Mounted, has_helper};
use frazil_tests::oracle::{Edit, Model, content, take};
use frazil_tests::vm_harness::{Finished, Host, finish, number, text, wait_for};
use rustix::fs::SeekFrom;
use rustix::process::Signal;

/// True if this user can mount here; says why not otherwise.
fn fuse_or_skip() -> bool {
    let device = fs::OpenOptions::new().read(true).write(true).open("/dev/fuse");
    let why = match device {
        Err(error) => format!("/dev/fuse cannot be opened ({error})"),
        // Containers may have the device without the right to mount.
        Ok(_) if rustix::process::geteuid().is_root() && !may_mount() => {
            "root may not mount here (CAP_SYS_ADMIN is missing)".to_owned()
        }
        Ok(_) if !rustix::process::geteuid().is_root() && !has_helper() => {
            "neither root nor fusermount3".to_owned()
        }
        Ok(_) => return true,
    };
    eprintln!("SKIPPED: {why}, and this test mounts");
    false
}

fn may_mount() -> bool {
    const CAP_SYS_ADMIN: u64 = 21;
    let status = fs::read_to_string("/proc/self/status").expect("there is always one");
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("it is there");
    let caps = u64::from_str_radix(line.trim(), 16).expect("hex digits");
    caps >> CAP_SYS_ADMIN & 1 == 1
}

/// A store with one region of memory and a disk, and the model of its contents.
struct Bed {
    host: Host,
    store: Arc<Store>,
    model: Model,
    steps: u64,
}

const PAGES: usize = 6000;

impl Bed {
    fn new() -> Self {
        let host = Host::new();
        let store = Store::open_or_create(&host.store_path(), StoreOptions::default());
        let regions = [("disk".to_owned(), vec![0; 40]), ("ram".to_owned(), vec![0; PAGES])];
        let model = Model { regions: regions.into() };
        Self { store: store.expect("a store"), host, model, steps: 0 }
    }

    /// Takes a snapshot with these pages of memory changed; returns its short id.
    fn take(&mut self, pages: impl IntoIterator<Item = (u64, u8)>) -> String {
        let parent = self.store.latest().map(|info| info.id);
        let rounds = vec![("ram".to_owned(), pages.into_iter().collect())];
        let edit = Edit { rounds, step: self.steps };
        self.steps += 1;
        let taken = take(&self.store, parent, &mut self.model, &edit).expect("it works");
        taken.id.short()
    }

    /// Takes a snapshot in which every seventh page and a long stretch are set, to contents of all
    /// kinds.
    fn take_first(&mut self) -> String {
        let pages = (0..PAGES as u64).step_by(7).chain(2_000..2_600);
        self.take(pages.map(|page| (page, 1 + (page % 30) as u8)).collect::<Vec<_>>())
    }

    fn memory(&self) -> Vec<u8> {
        self.model.regions["ram"].iter().flat_map(|id| content(*id)).copied().collect()
    }

    fn mount(&self) -> Mounted {
        let folder = self.host.path("mnt");
        // An existing folder may have a dead file system on it, and then cannot even be examined.
        let _there_already = fs::create_dir(&folder);
        mount_at(&self.host, &folder)
    }
}

fn mount_at(host: &Host, folder: &Path) -> Mounted {
    let mut command = host.command(&["mount", "--json"]);
    command.arg(host.store_path()).arg(folder);
    Mounted::start(command, folder)
}

fn run(program: &str, args: &[&str]) -> Finished {
    let mut command = Command::new(program);
    command.args(args);
    finish(command, frazil_tests::vm_harness::PATIENCE)
}

fn is_mounted(folder: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("there is always one");
    let folder = folder.to_str().expect("UTF-8");
    mounts.lines().any(|line| line.split(' ').nth(4) == Some(folder))
}

#[test]
fn everyday_tools_find_what_is_there() {
    if !fuse_or_skip() {
        return;
    }
    let mut bed = Bed::new();
    let id = bed.take_first();
    let mounted = bed.mount();
    let memory = bed.memory();
    let ram = mounted.path("latest/memory/ram");
    assert!(fs::read(&ram).expect("it reads") == memory);
    let plain = bed.host.path("plain");
    fs::write(&plain, &memory).expect("a file");
    let (ram, plain) = (ram.to_str().expect("it"), plain.to_str().expect("it"));
    run("cmp", &[ram, plain]).expect_code(0);
    // A part from the middle, in blocks that are not page-sized.
    let part = bed.host.path("part").display().to_string();
    let of = format!("of={part}");
    let args = [&format!("if={ram}"), &of, "bs=1000", "skip=2500", "count=700", "status=none"];
    run("dd", &args).expect_code(0);
    assert!(fs::read(&part).expect("it") == memory[2_500_000..3_200_000]);
    // grep finds the same in both files: a page filled with one byte, five equal bytes amid noise.
    let grep = |path: &str, pattern: &str| run("grep", &["-c", "-a", "-P", pattern, path]).stdout;
    for pattern in [r"\x16{8}", r"\x19{5}"] {
        let expected = grep(plain, pattern);
        assert_ne!(expected.trim(), "0", "{pattern}");
        assert_eq!(grep(ram, pattern), expected, "{pattern}");
    }
    let listed = run("ls", &["-R", mounted.folder.to_str().expect("it")]);
    for part in [id.as_str(), "manifest.json", "ram", "disk", "each.json", "latest"] {
        assert!(listed.stdout.contains(part), "{part} in {}", listed.stdout);
    }
    let state = fs::read(mounted.path("latest/state/each.json")).expect("it reads");
    let state: serde_json::Value = serde_json::from_slice(&state).expect("JSON");
    assert_eq!((text(&state, "kind"), number(&state["body"], "step")), ("test", 0));
    let refused = File::create(mounted.path("latest/memory/new")).expect_err("it is read-only");
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    assert!(File::options().write(true).open(ram).is_err());
}

#[test]
fn files_are_sparse_where_memory_is_zero() {
    if !fuse_or_skip() {
        return;
    }
    let mut bed = Bed::new();
    let _id = bed.take_first();
    let mounted = bed.mount();
    let path = mounted.path("latest/memory/ram");
    let contents = &bed.model.regions["ram"];
    let set = contents.iter().filter(|id| **id != 0).count();
    let file = File::open(&path).expect("it opens");
    let stat = file.metadata().expect("it is there");
    assert_eq!(stat.len(), (PAGES * PAGE_SIZE) as u64);
    assert_eq!(stat.blocks() * 512, (set * PAGE_SIZE) as u64);
    let seek = |whence| rustix::fs::seek(&file, whence).map(|at| at as usize / PAGE_SIZE);
    for from in [0, 1, 6, 7, 2_000, 2_300, 2_600, 5_990] {
        let at = (from * PAGE_SIZE) as u64;
        let next = |data: bool| (from..PAGES).find(|page| (contents[*page] != 0) == data);
        assert_eq!(seek(SeekFrom::Data(at)).ok(), next(true), "{from}");
        assert_eq!(seek(SeekFrom::Hole(at)).expect("there is one"), next(false).unwrap_or(PAGES));
    }
    let copy = bed.host.path("copy").display().to_string();
    run("cp", &["--sparse=auto", path.to_str().expect("it"), &copy]).expect_code(0);
    assert!(fs::read(&copy).expect("it") == bed.memory());
    let taken = fs::metadata(&copy).expect("it").blocks() * 512;
    assert!(taken < stat.len() / 2, "{taken} bytes of {}", stat.len());
}

#[test]
fn many_read_at_once() {
    if !fuse_or_skip() {
        return;
    }
    let mut bed = Bed::new();
    let _id = bed.take_first();
    let mounted = bed.mount();
    let (memory, path) = (&bed.memory(), &mounted.path("latest/memory/ram"));
    std::thread::scope(|scope| {
        for reader in 0..8_usize {
            scope.spawn(move || {
                let file = File::open(path).expect("it opens");
                let mut buf = vec![0; 70_001];
                for turn in 0..60 {
                    let at = (reader * 977 + turn * 7919) * 61 % (memory.len() - buf.len());
                    file.read_exact_at(&mut buf, at as u64).expect("it reads");
                    assert!(buf == memory[at..at + buf.len()], "{reader}, {turn}");
                }
            });
        }
    });
}

#[test]
fn snapshots_come_and_go_while_it_is_mounted() {
    if !fuse_or_skip() {
        return;
    }
    let mut bed = Bed::new();
    let first = bed.take_first();
    let mounted = bed.mount();
    let latest = |mounted: &Mounted| {
        let target = fs::read_link(mounted.path("latest")).expect("a link");
        target.file_name().expect("a name").to_str().expect("UTF-8").to_owned()
    };
    assert_eq!(latest(&mounted), first);
    let before = bed.memory();
    let open = File::open(mounted.path("latest/memory/ram")).expect("it opens");
    let second = bed.take((0..600).map(|page| (page, 5)).collect::<Vec<_>>());
    assert_eq!(latest(&mounted), second);
    assert!(fs::read(mounted.path("latest/memory/ram")).expect("it reads") == bed.memory());
    bed.store.set_tag("later", bed.store.latest().map(|info| info.id)).expect("it works");
    assert!(mounted.path("tags/later/memory/ram").exists());
    bed.store.set_tag("later", None).expect("it works");
    assert!(!mounted.path("tags/later").exists());

    let id = bed.store.snapshots()[0].id;
    bed.store.forget(&[id]).expect("it works");
    let all = PruneOptions { max_unused: 0.0, ..PruneOptions::default() };
    bed.store.prune(&all, &PruneProgress::default()).expect("it works");
    let names: Vec<_> = fs::read_dir(mounted.path("ids"))
        .expect("it")
        .map(|e| e.expect("it").file_name())
        .collect();
    assert_eq!(names, [second.as_str()]);
    assert!(fs::metadata(mounted.path("ids").join(&first).join("memory/ram")).is_err());
    // The open file of the forgotten snapshot still has everything, though none of it had been
    // read.
    let mut all_of_it = vec![0; before.len()];
    open.read_exact_at(&mut all_of_it, 0).expect("it reads");
    assert!(all_of_it == before);
}

#[test]
fn a_damaged_block_is_an_io_error_and_is_named() {
    if !fuse_or_skip() {
        return;
    }
    let mut bed = Bed::new();
    // Content 3 is noise, stored as it is.
    let _id = bed.take([(10, 3), (5_000, 4)]);
    let segments = bed.host.store_path().join("segments");
    let segment = fs::read_dir(&segments).expect("it").next().expect("one").expect("it").path();
    let mut bytes = fs::read(&segment).expect("it");
    let noise = &content(3)[..64];
    let at = bytes.windows(64).position(|window| window == noise).expect("it is there");
    bytes[at + 17] ^= 0x20;
    fs::write(&segment, bytes).expect("it");
    let mut mounted = bed.mount();
    let file = File::open(mounted.path("latest/memory/ram")).expect("it opens");
    let mut page = [1; PAGE_SIZE];
    let error = file.read_exact_at(&mut page, 10 * PAGE_SIZE as u64).expect_err("it is damaged");
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    // The page beside the damaged one can still be read.
    file.read_exact_at(&mut page, 9 * PAGE_SIZE as u64).expect("it is zero");
    assert_eq!(page, [0; PAGE_SIZE]);
    drop(file);
    mounted.signal(Signal::INT);
    let (code, said) = mounted.end();
    assert_eq!(code, Some(0), "{said}");
    for part in ["memory/ram", "segments/", "offset", "damaged"] {
        assert!(said.contains(part), "{part} in {said}");
    }
}

#[test]
fn it_ends_when_it_is_told_to_and_when_it_is_unmounted() {
    if !fuse_or_skip() {
        return;
    }
    let mut bed = Bed::new();
    let _id = bed.take([(0, 5)]);
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let mut mounted = bed.mount();
        assert!(is_mounted(&mounted.folder));
        mounted.signal(signal);
        assert_eq!(mounted.end(), (Some(0), String::new()), "{signal:?}");
        assert!(!is_mounted(&mounted.folder));
    }
    let mut mounted = bed.mount();
    if rustix::process::geteuid().is_root() {
        run("umount", &[mounted.folder.to_str().expect("it")]).expect_code(0);
        assert_eq!(mounted.end(), (Some(0), String::new()));
    } else {
        mounted.signal(Signal::INT);
        let _ended = mounted.end();
    }
}

#[test]
fn a_folder_in_use_goes_out_of_sight_and_serves_those_who_are_there() {
    if !fuse_or_skip() {
        return;
    }
    let mut bed = Bed::new();
    let _id = bed.take_first();
    let mut mounted = bed.mount();
    let memory = bed.memory();
    let open = File::open(mounted.path("latest/memory/ram")).expect("it opens");
    mounted.signal(Signal::TERM);
    wait_for("out of sight", || (!is_mounted(&mounted.folder)).then_some(()));
    let mut all = vec![0; memory.len()];
    open.read_exact_at(&mut all, 0).expect("it still reads");
    assert!(all == memory);
    assert!(mounted.child.try_wait().expect("ours").is_none(), "it goes on");
    drop(open);
    let (code, said) = mounted.end();
    assert_eq!(code, Some(0), "{said}");
    if rustix::process::geteuid().is_root() {
        assert!(said.contains("in use"), "{said}");
    }
}

#[test]
fn what_a_kill_leaves_is_cleared_away_by_the_next() {
    if !fuse_or_skip() {
        return;
    }
    let mut bed = Bed::new();
    let _id = bed.take([(0, 5)]);
    let mut mounted = bed.mount();
    mounted.signal(Signal::KILL);
    let (code, _) = mounted.end();
    assert_eq!(code, None);
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let gone = fs::metadata(mounted.path("latest")).expect_err("nobody answers");
    assert_eq!(gone.raw_os_error(), Some(rustix::io::Errno::NOTCONN.raw_os_error()));
    let mut again = bed.mount();
    assert!(again.path("latest/memory/ram").exists());
    again.signal(Signal::INT);
    let (code, said) = again.end();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("had died"), "{said}");
}

#[test]
fn where_it_cannot_be_mounted_it_says_why() {
    let mut bed = Bed::new();
    let _id = bed.take([(0, 5)]);
    let store = bed.host.store_path().display().to_string();
    let at = |name: &str| bed.host.path(name).display().to_string();
    bed.host.frazil(&["mount", &at("nothing"), &at("x")]).expect_code(1).expect_says(&["nothing"]);
    bed.host.frazil(&["mount", &store]).expect_code(2);
    if !fuse_or_skip() {
        bed.host.frazil(&["mount", &store, &at("x")]).expect_code(1);
        return;
    }
    let refused = bed.host.frazil(&["mount", &store, &at("x")]);
    refused.expect_code(1).expect_says(&["expected a folder", "mkdir"]);
    fs::write(bed.host.path("file"), "x").expect("a file");
    let refused = bed.host.frazil(&["mount", &store, &at("file")]);
    refused.expect_code(1).expect_says(&["expected a folder"]);
    // The scratch folder is not empty, and a folder in the store is not outside it.
    let refused = bed.host.frazil(&["mount", &store, &at("")]);
    refused.expect_code(1).expect_says(&["empty"]);
    fs::create_dir(bed.host.store_path().join("inside")).expect("a folder");
    let refused = bed.host.frazil(&["mount", &store, &format!("{store}/inside")]);
    refused.expect_code(1).expect_says(&["neither contains nor is in the store"]);
    let mounted = bed.mount();
    let refused = bed.host.frazil(&["mount", &store, mounted.folder.to_str().expect("UTF-8")]);
    refused.expect_code(1).expect_says(&["already mounted"]);
}

#[test]
fn damage_to_what_says_how_long_a_disk_is_is_of_that_disk() {
    if !fuse_or_skip() {
        return;
    }
    let host = Host::new();
    fs::write(host.path("memory"), content(5)).expect("a file");
    fs::write(host.path("disk"), content(8)).expect("a file");
    let store = host.store_path().display().to_string();
    let _done = host.ok(&["import", "--store", &store, "--memory", "memory", "--disk", "disk"]);
    let segments = host.store_path().join("segments");
    let segment = fs::read_dir(&segments).expect("it").next().expect("one").expect("it").path();
    let mut bytes = fs::read(&segment).expect("it");
    let records = read_segment(&bytes);
    let is_disk = |record: &&Record| {
        let payload = payload_of(&bytes[record.offset..record.end()]);
        payload.windows(9).any(|window| window == b"\"sectors\"")
    };
    let record = *records.iter().find(is_disk).expect("there is one");
    bytes[record.offset + BLOCK_HEADER_LEN + 5] ^= 0x10;
    fs::write(&segment, bytes).expect("it");
    fs::create_dir(host.path("mnt")).expect("a folder");
    let mounted = mount_at(&host, &host.path("mnt"));
    assert!(fs::read(mounted.path("latest/memory/ram")).expect("it reads") == content(5));
    assert!(fs::read_dir(mounted.path("latest/disks")).expect("it is listed").count() == 1);
    for damaged in ["latest/disks/disk0", "latest/state/disk0.json"] {
        let error = fs::read(mounted.path(damaged)).expect_err("nobody knows how long it is");
        assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()), "{damaged}");
    }
}
