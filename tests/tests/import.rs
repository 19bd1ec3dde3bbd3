//! Imports files of other programs as snapshots, and exports snapshots as archives.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use frazil_snapstore::{PAGE_SIZE, is_zero};
use frazil_tests::oracle::content;
use frazil_tests::rng::Rng;
use frazil_tests::vm_harness::{Finished, Host, PATIENCE, finish, kvm_or_skip, number, text};
use serde_json::Value;

/// Writes a sparse file of `pages` pages, in which the (page, content id) of `contents` are
/// written, zeros included.
fn write_sparse(path: &Path, pages: u64, contents: &[(u64, u8)]) {
    let file = File::create(path).expect("a file");
    file.set_len(pages * PAGE_SIZE as u64).expect("it grows");
    for (page, id) in contents {
        file.write_all_at(content(*id), page * PAGE_SIZE as u64).expect("it is written");
    }
}

fn path(host: &Host, name: &str) -> String {
    host.path(name).display().to_string()
}

fn import(host: &Host, args: &[&str]) -> Value {
    let store = host.store_path().display().to_string();
    host.json(&[&["import", "--store", &store], args].concat())
}

/// Exports `region` of `reference`, and returns its contents.
fn export(host: &Host, reference: &str, region: &str) -> Vec<u8> {
    let out = path(host, "exported");
    let _done = host.ok(&["export", &host.at(reference), &out, "--region", region, "--force"]);
    fs::read(&out).expect("it is there")
}

#[test]
fn memory_comes_in_and_goes_out_again() {
    let host = Host::new();
    let memory = host.path("memory");
    let contents: Vec<(u64, u8)> =
        (0..3_000).step_by(5).map(|page| (page, (page % 36) as u8)).collect();
    write_sparse(&memory, 3_000, &contents);
    let report = import(
        &host,
        &["--memory", &path(&host, "memory"), "--name", "fc", "-m", "a text", "--tag", "in"],
    );
    assert_eq!(report["parent"], Value::Null);
    let region = &report["regions"][0];
    assert_eq!((text(region, "region"), number(region, "bytes")), ("ram", 3_000 * 4096));
    // Holes are not read.
    assert!(number(region, "pages_read") <= 600, "{report}");
    assert!(export(&host, "in", "ram") == fs::read(&memory).expect("it"));
    let shown = host.json(&["show", &host.at("in")]);
    assert_eq!((text(&shown, "vm"), text(&shown, "message")), ("fc", "a text"));
    assert_eq!(shown["state"], Value::Array(Vec::new()));
    // Other commands work on imported snapshots.
    let _log = host.ok(&["log", &host.store_path().display().to_string()]);
    let verified = host.json(&["verify", &host.store_path().display().to_string()]);
    assert_eq!(verified["ok"], true, "{verified}");
}

#[test]
fn holes_of_a_diff_are_what_did_not_change_and_zeros_in_it_are_zeros() {
    let host = Host::new();
    let mut rng = Rng::new(7);
    let pages = 2_000_u64;
    let full: Vec<(u64, u8)> = (0..pages).map(|page| (page, (rng.bits() % 36) as u8)).collect();
    write_sparse(&host.path("full"), pages, &full);
    let _first = import(&host, &["--memory", &path(&host, "full"), "--tag", "full"]);
    let mut expected = fs::read(host.path("full")).expect("it");
    for turn in 0..3_u8 {
        // Firecracker writes whole pages, in runs of any length.
        let changes: Vec<(u64, u8)> = (0..40)
            .map(|_| (rng.bits() % (pages - 8), (rng.bits() % 36) as u8))
            .flat_map(|(first, id)| {
                (first..first + 1 + u64::from(id % 5)).map(move |page| (page, id))
            })
            .chain([(u64::from(turn), 0)])
            .collect();
        write_sparse(&host.path("diff"), pages, &changes);
        for (page, id) in &changes {
            expected[*page as usize * PAGE_SIZE..][..PAGE_SIZE].copy_from_slice(content(*id));
        }
        let report = import(
            &host,
            &["--memory", &path(&host, "diff"), "--diff", "--base", &host.at("latest")],
        );
        assert_ne!(report["parent"], Value::Null);
        assert!(number(&report["regions"][0], "pages_read") < 400, "{report}");
        assert!(export(&host, "latest", "ram") == expected, "{turn}");
    }
    // Without --diff, holes are zeros.
    let _zeros = import(&host, &["--memory", &path(&host, "diff"), "--base", &host.at("latest")]);
    assert!(export(&host, "latest", "ram") == fs::read(host.path("diff")).expect("it"));
    // The same contents imported again are shared.
    let again = import(
        &host,
        &["--memory", &path(&host, "full"), "--base", &host.at("full"), "-m", "again"],
    );
    let region = &again["regions"][0];
    assert_eq!(number(region, "stored_bytes"), 0, "{again}");
}

#[test]
fn what_lies_above_the_gap_is_put_there() {
    let host = Host::new();
    // A small guest with a gap from page 100 to page 300.
    write_sparse(&host.path("memory"), 250, &[(0, 3), (99, 6), (100, 9), (249, 12)]);
    let _done = import(&host, &["--memory", &path(&host, "memory"), "--gap", "400KiB..1200KiB"]);
    let found = export(&host, "latest", "ram");
    assert_eq!(found.len(), 450 * PAGE_SIZE);
    let set: Vec<usize> =
        (0..450).filter(|page| !is_zero(&found[page * PAGE_SIZE..][..PAGE_SIZE])).collect();
    assert_eq!(set, [0, 99, 300, 449]);
    assert!(found[300 * PAGE_SIZE..][..PAGE_SIZE] == content(9)[..]);
    write_sparse(&host.path("diff"), 250, &[(101, 15), (249, 0)]);
    let _done = import(
        &host,
        &[
            "--memory",
            &path(&host, "diff"),
            "--gap",
            "400KiB..1200KiB",
            "--diff",
            "--base",
            &host.at("latest"),
        ],
    );
    let found = export(&host, "latest", "ram");
    let set: Vec<usize> =
        (0..450).filter(|page| !is_zero(&found[page * PAGE_SIZE..][..PAGE_SIZE])).collect();
    assert_eq!(set, [0, 99, 300, 301]);
}

#[test]
fn disks_come_in_as_long_as_they_are() {
    let host = Host::new();
    let disks = [vec![1_u8; 3 * 4096 + 512], vec![2; 4096]];
    for (index, disk) in disks.iter().enumerate() {
        fs::write(host.path(&format!("d{index}")), disk).expect("a file");
    }
    let report = import(&host, &["--disk", &path(&host, "d0"), "--disk", &path(&host, "d1")]);
    assert_eq!(report["regions"].as_array().expect("a list").len(), 2);
    for (region, disk) in ["disk0", "disk1"].iter().zip(&disks) {
        assert!(export(&host, "latest", region) == *disk, "{region}");
    }
    // Importing memory on top of them keeps the disks.
    write_sparse(&host.path("memory"), 10, &[(1, 3)]);
    let _done = import(&host, &["--memory", &path(&host, "memory"), "--base", &host.at("latest")]);
    assert!(export(&host, "latest", "disk0") == disks[0]);
    assert_eq!(export(&host, "latest", "ram").len(), 10 * PAGE_SIZE);
}

#[test]
fn what_cannot_be_imported_is_refused_with_a_reason() {
    let host = Host::new();
    let store = host.store_path().display().to_string();
    let frazil = |args: &[&str]| -> Finished {
        host.frazil(&[&["import", "--store", &store], args].concat())
    };
    fs::write(host.path("odd"), [1; 5000]).expect("a file");
    fs::write(host.path("none"), []).expect("a file");
    write_sparse(&host.path("small"), 10, &[(1, 3)]);
    write_sparse(&host.path("large"), 11, &[(1, 3)]);
    fs::write(host.path("dense"), vec![1; 40960]).expect("a file");
    let at = |name: &str| path(&host, name);
    frazil(&[]).expect_code(2);
    frazil(&["--memory", &at("small"), "--diff"]).expect_code(2).expect_says(&["--base"]);
    frazil(&["--memory", &at("small"), "--gap", "4GiB..3GiB"]).expect_code(2);
    frazil(&["--memory", &at("odd")]).expect_code(1).expect_says(&["4096", "5000"]);
    frazil(&["--disk", &at("odd")]).expect_code(1).expect_says(&["512", "5000"]);
    frazil(&["--memory", &at("none")]).expect_code(1).expect_says(&["found 0"]);
    frazil(&["--memory", &at("missing")]).expect_code(1).expect_says(&["missing"]);
    assert!(!host.store_path().exists(), "nothing is made for what cannot be imported");
    let _first = import(&host, &["--memory", &at("small")]);
    let base = host.at("latest");
    let refused = frazil(&["--memory", &at("large"), "--base", &base, "--diff"]);
    refused.expect_code(1).expect_says(&["large", "10 pages", "11"]);
    let refused = frazil(&["--memory", &at("dense"), "--base", &base, "--diff"]);
    refused.expect_code(1).expect_says(&["sparse", "without holes"]);
    assert_eq!(host.store().snapshots().len(), 1);
    // An imported snapshot cannot be resumed.
    let resumed = host.frazil(&["resume", &base, "--name", "x"]);
    resumed.expect_code(1).expect_says(&["import", "nothing to run"]);
    let cloned = host.frazil(&["resume", &base, "--name", "x", "--clones", "2"]);
    cloned.expect_code(1).expect_says(&["nothing to run"]);
}

#[test]
fn what_is_no_file_is_refused_and_nothing_is_waited_for() {
    let host = Host::new();
    let store = host.store_path().display().to_string();
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, host.path("pipe"), kind, mode, 0).expect("a pipe");
    fs::create_dir(host.path("folder")).expect("a folder");
    for which in ["--memory", "--disk"] {
        for (name, says) in
            [("pipe", "a pipe"), ("folder", "a folder"), ("/dev/zero", "a character device")]
        {
            let refused = host.frazil(&["import", "--store", &store, which, name]);
            refused.expect_code(1).expect_says(&["expected a file", says]);
        }
    }
    write_sparse(&host.path("small"), 10, &[(1, 3)]);
    let gap = ["import", "--store", &store, "--memory", "small", "--gap", "4KiB..1000TiB"];
    host.frazil(&gap).expect_code(1).expect_says(&["--gap", "16.00 TiB"]);
    assert!(!host.store_path().exists());
    // A guest may have written a qcow2 header to a raw disk, but more likely the file is qcow2.
    fs::write(host.path("disk"), [&b"QFI\xfb"[..], &[0; 4092]].concat()).expect("a file");
    let warned = host.ok(&["import", "--store", &store, "--disk", "disk"]);
    warned.expect_says(&["disk", "qcow2", "raw"]);
    let silent = host.ok(&["import", "--store", &store, "--memory", "small"]);
    assert_eq!(silent.stderr, "");
}

#[test]
fn a_file_that_is_written_meanwhile_is_refused() {
    let host = Host::new();
    // Noise takes long enough to import.
    let contents: Vec<(u64, u8)> = (0..40_000).map(|page| (page, 3 * (page % 8) as u8)).collect();
    write_sparse(&host.path("memory"), 40_000, &contents);
    let file = File::options().write(true).open(host.path("memory")).expect("it");
    let store = host.store_path().display().to_string();
    let mut import = host.command(&["import", "--store", &store, "--memory", "memory"]);
    let mut child = import.stderr(std::process::Stdio::piped()).spawn().expect("it starts");
    let mut id = 0;
    while child.try_wait().expect("ours").is_none() {
        file.write_all_at(content(id), 39_999 * 4096).expect("it is written");
        id = (id + 1) % 30;
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let output = child.wait_with_output().expect("it ended");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("memory") && said.contains("written while it was read"), "{said}");
    assert_eq!(host.store().snapshots().len(), 0);
}

#[test]
fn memory_that_was_changed_outside_runs_again() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let vm = host.run("patched", "touch=4MiB,rate=100,report=0", &["--memory", "32MiB"]);
    vm.wait_populated();
    let _taken = host.json(&["checkpoint", "patched", "--exit"]);
    let out = path(&host, "ram");
    let _done = host.ok(&["export", &host.at("latest"), &out]);
    let base = host.at("latest");
    let report =
        import(&host, &["--memory", &out, "--base", &base, "--keep-state", "-m", "as it was"]);
    // Nothing is stored twice.
    assert_eq!(number(&report["regions"][0], "stored_bytes"), 0, "{report}");
    let resumed = host.resume("again", "latest", &[]);
    resumed.wait_beyond(resumed.turns());
    drop(resumed);
    // Without its machine there is nothing to run.
    let _bare = import(&host, &["--memory", &out, "--base", &base, "-m", "memory alone"]);
    host.frazil(&["resume", &host.at("latest")]).expect_code(1).expect_says(&["nothing to run"]);
}

#[test]
fn archives_have_everything_and_are_sparse() {
    let host = Host::new();
    let contents: Vec<(u64, u8)> =
        (0..9_000).step_by(3).map(|page| (page, 2 + (page % 30) as u8)).collect();
    write_sparse(&host.path("memory"), 20_000, &contents);
    fs::write(host.path("disk"), vec![5_u8; 6 * 4096 + 512]).expect("a file");
    let report = import(
        &host,
        &["--memory", &path(&host, "memory"), "--disk", &path(&host, "disk"), "--name", "a vm"],
    );
    let id = text(&report, "id")[..12].to_owned();
    let archive = path(&host, "all.tar");
    let report = host.json(&["export", &host.at("latest"), &archive, "--format", "tar"]);
    let len = fs::metadata(&archive).expect("it").len();
    assert_eq!(number(&report, "bytes"), len);
    assert!(len < 16 << 20, "3,000 pages and no zeros: {len}");
    host.frazil(&["export", &host.at("latest"), &archive, "--format", "tar"])
        .expect_code(1)
        .expect_says(&["--force"]);
    host.frazil(&["export", &host.at("latest"), "x.tar", "--format", "tar", "--region", "disk0"])
        .expect_code(2)
        .expect_says(&["all regions"]);
    let piped = host.command(&["export", &host.at("latest"), "-", "--format", "tar"]).output();
    assert!(piped.expect("it runs").stdout == fs::read(&archive).expect("it"));

    let unpacked = host.path("unpacked");
    fs::create_dir(&unpacked).expect("a folder");
    let mut tar = Command::new("tar");
    tar.args(["-x", "-f", &archive, "-C"]).arg(&unpacked);
    finish(tar, PATIENCE).expect_code(0);
    let top = unpacked.join(format!("a%20vm-{id}"));
    assert!(
        fs::read(top.join("memory/ram")).expect("it") == fs::read(host.path("memory")).expect("it")
    );
    assert!(
        fs::read(top.join("disks/disk0")).expect("it") == fs::read(host.path("disk")).expect("it")
    );
    let taken =
        std::os::unix::fs::MetadataExt::blocks(&fs::metadata(top.join("memory/ram")).expect("it"))
            * 512;
    assert!(taken < 14 << 20, "{taken}");
    let manifest = fs::read(top.join("manifest.json")).expect("it");
    let manifest: Value = serde_json::from_slice(&manifest).expect("JSON");
    assert!(text(&manifest, "id").starts_with(&id));
    let disk: Value =
        serde_json::from_slice(&fs::read(top.join("state/disk0.json")).expect("it")).expect("JSON");
    assert_eq!(number(&disk["body"], "sectors"), 49);
    let python = "import sys, tarfile\n\
        for m in tarfile.open(sys.argv[1]): print(m.name.split('/', 1)[1], m.size, m.issparse())";
    let mut list = Command::new("python3");
    list.args(["-c", python, &archive]);
    let Ok(listed) = list.output() else {
        eprintln!("SKIPPED: there is no python3, whose tarfile would read the archive too");
        return;
    };
    let listed = String::from_utf8(listed.stdout).expect("UTF-8");
    assert!(listed.contains(&format!("memory/ram {} True", 20_000 * PAGE_SIZE)), "{listed}");
}

#[test]
fn an_archive_of_a_vm_with_any_name_can_be_unpacked() {
    let host = Host::new();
    write_sparse(&host.path("memory"), 300, &[(1, 5), (299, 8)]);
    for (turn, name) in ["../../up", &"a long name ".repeat(30), "漢字", " "].iter().enumerate() {
        let _done = import(&host, &["--memory", &path(&host, "memory"), "--name", name]);
        let archive = path(&host, &format!("{turn}.tar"));
        let _done = host.ok(&["export", &host.at("latest"), &archive, "--format", "tar"]);
        let unpacked = host.path(&format!("unpacked {turn}"));
        fs::create_dir(&unpacked).expect("a folder");
        let mut tar = Command::new("tar");
        tar.args(["-x", "-f", &archive, "-C"]).arg(&unpacked);
        finish(tar, PATIENCE).expect_code(0);
        let mut tops = fs::read_dir(&unpacked).expect("it").map(|top| top.expect("it").path());
        let top = tops.next().expect("one folder");
        assert!(tops.next().is_none());
        let memory = fs::read(top.join("memory/ram")).expect("it is there");
        assert!(memory == fs::read(host.path("memory")).expect("it"), "{name}");
    }
}
