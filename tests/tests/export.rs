//! Exports regions as plain files.

use std::os::unix::fs::MetadataExt;

use frazil_snapstore::{ExportProgress, PAGE_SIZE, Store, export};
use frazil_tests::oracle::{Edit, Model, content, small_options, take};
use frazil_tests::storage_sim::SimStorage;
use frazil_tests::vm_harness::{Host, kvm_or_skip, number, text};

/// Takes a snapshot of 20,000 pages, of which every seventh and a long stretch have contents.
fn model_of_a_snapshot() -> (std::sync::Arc<Store>, frazil_snapstore::SnapshotId, Model) {
    let storage = SimStorage::default();
    let store = Store::open_or_create_storage(std::sync::Arc::new(storage), small_options())
        .expect("a store");
    let mut model = Model { regions: [("ram".to_owned(), vec![0; 20_000])].into() };
    let here_and_there = (0..20_000).step_by(7).chain(5_000..5_600);
    let pages = here_and_there.map(|page| (page, 1 + (page % 9) as u8)).collect();
    let edit = Edit { rounds: vec![("ram".into(), pages)], step: 1 };
    let taken = take(&store, None, &mut model, &edit).expect("a snapshot");
    (store, taken.id, model)
}

#[test]
fn files_have_what_regions_have_and_holes_where_they_are_zero() {
    let (store, id, model) = model_of_a_snapshot();
    let region = store.snapshot(id).expect("it").region("ram").expect("it");
    let folder = tempfile::tempdir().expect("a folder");
    // The whole region, and all but the end of the last page.
    for len in [20_000 * PAGE_SIZE, 15_001 * PAGE_SIZE - 700] {
        let path = folder.path().join("ram.raw");
        let file = std::fs::File::create(&path).expect("a file");
        let progress = ExportProgress::default();
        export(&region, &file, len as u64, &progress).expect("it is written");
        let found = std::fs::read(&path).expect("it");
        assert_eq!(found.len(), len);
        for (page, bytes) in found.chunks(PAGE_SIZE).enumerate() {
            let expected = &content(model.regions["ram"][page])[..bytes.len()];
            assert!(bytes == expected, "page {page} of {len} bytes");
        }
        let pages = len.div_ceil(PAGE_SIZE);
        let written = model.regions["ram"][..pages].iter().filter(|id| **id != 0).count();
        let counted = progress.pages_written.load(std::sync::atomic::Ordering::Relaxed);
        assert!(counted >= written as u64 && counted < pages as u64 / 3, "{counted} of {written}");
        let taken_bytes = file.metadata().expect("it").blocks() * 512;
        assert!(taken_bytes < len as u64 / 3, "{taken_bytes} of {len}");
    }
    let file = tempfile::tempfile().expect("a file");
    let beyond = export(&region, &file, 20_000 * PAGE_SIZE as u64 + 1, &ExportProgress::default());
    assert!(beyond.expect_err("too long").to_string().contains("20000 pages"));
}

#[test]
fn the_command_gives_memory_and_disks_back() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let image = host.path("disk.img");
    // Not a whole number of pages: the exported file is as long as the disk.
    let contents: Vec<u8> = (0..3 * PAGE_SIZE + 512).map(|at| (at / 100) as u8).collect();
    std::fs::write(&image, &contents).expect("a file");
    let vm = host.run(
        "export",
        "touch=4MiB,rate=100,report=0",
        &["--memory", "32MiB", "--disk", &image.display().to_string()],
    );
    vm.wait_populated();
    let _taken = host.json(&["checkpoint", "export", "--exit"]);
    let at = host.at("latest");
    let [disk, ram] = ["disk.raw", "ram.raw"].map(|name| host.path(name).display().to_string());
    let report = host.json(&["export", &at, &disk, "--region", "disk0"]);
    assert_eq!(
        (text(&report, "region"), number(&report, "bytes")),
        ("disk0", contents.len() as u64)
    );
    assert_eq!(std::fs::read(&disk).expect("it"), contents);
    let report = host.json(&["export", &at, &ram]);
    assert_eq!(number(&report, "bytes"), 32 << 20);
    // The built-in guest's page tables and data are not zero.
    assert!(number(&report, "pages_written") > 1024, "{report}");
    assert_eq!(std::fs::metadata(&ram).expect("it").len(), 32 << 20);
    host.frazil(&["export", &at, &ram]).expect_code(1).expect_says(&["ram.raw", "--force"]);
    assert_eq!(number(&host.json(&["export", &at, &ram, "--force"]), "bytes"), 32 << 20);
    let none =
        host.frazil(&["export", &at, &host.path("x").display().to_string(), "--region", "disk7"]);
    none.expect_code(1).expect_says(&["disk7", "ram", "disk0"]);
    assert!(!host.path("x").exists(), "nothing is left behind");
}
