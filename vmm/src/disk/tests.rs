//! Tests of a disk by itself: its bytes against plain files, freezing among threads, media that
//! fail. The `tests` room tests, with a store, what snapshots hold of disks.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use frazil_snapstore::{PAGE_SIZE, Page, PageSource};
use rustix::fs::{MemfdFlags, memfd_create};
use tempfile::NamedTempFile;

use super::overlay::Medium;
use super::*;

const PATIENCE: Duration = Duration::from_secs(20);
const SECTOR: usize = SECTOR_BYTES as usize;

fn config(file: &NamedTempFile) -> DiskConfig {
    DiskConfig { file: file.path().to_owned(), read_only: false, serial: None }
}

fn file_of(contents: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(contents).unwrap();
    file
}

/// Returns `len` bytes that differ from page to page and from sector to sector.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    (0..len as u64)
        .map(|at| ((at / 8 + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8 | 1)
        .collect()
}

fn dirty(disk: &Disk) -> Vec<u64> {
    let mut set = PageSet::new(disk.pages());
    disk.harvest(&mut set);
    set.iter().collect()
}

fn set_of(disk: &Disk, pages: impl IntoIterator<Item = u64>) -> PageSet {
    let mut set = PageSet::new(disk.pages());
    pages.into_iter().for_each(|page| set.insert(page));
    set
}

fn read_all(disk: &Disk) -> Vec<u8> {
    let mut out = vec![0xaa; disk.len_bytes() as usize];
    disk.begin().read_at(0, &mut out).unwrap();
    out
}

fn page_of(frozen: &FrozenDisk, page: u64) -> Page {
    let mut buf = [0xaa; PAGE_SIZE];
    frozen.read_page(page, &mut buf).unwrap();
    buf
}

/// A memory file that can run full, after some number of writes or at once.
#[derive(Debug)]
struct Failing {
    file: File,
    full: AtomicBool,
    /// Writes that still succeed.
    left: AtomicU64,
    len_bytes: AtomicU64,
}

impl Failing {
    fn check(&self) -> io::Result<()> {
        let one_less = |left: u64| left.checked_sub(1);
        let left = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less);
        if self.full.load(Ordering::SeqCst) || left.is_err() {
            return Err(rustix::io::Errno::NOSPC.into());
        }
        Ok(())
    }
}

impl Medium for Arc<Failing> {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        // Like a full disk, write a part.
        let half = &bytes[..bytes.len() / 2];
        self.check().or_else(|error| self.file.write_all_at(half, offset).and(Err(error)))?;
        self.file.write_all_at(bytes, offset)
    }

    fn punch(&self, offset: u64, len_bytes: u64) -> io::Result<()> {
        self.check()?;
        Medium::punch(&self.file, offset, len_bytes)
    }

    fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        self.len_bytes.store(len_bytes, Ordering::SeqCst);
        self.file.set_len(len_bytes)
    }
}

/// Returns a disk on `file` whose overlay can be made to fail, with room for `kept_pages_max` kept
/// pages in memory.
fn failing_disk(file: &NamedTempFile, kept_pages_max: u64) -> (Arc<Disk>, Arc<Failing>) {
    let base = BaseFile::open(file.path()).unwrap();
    let saved = SavedDisk {
        region: "disk7".into(),
        sectors: base.len_bytes / SECTOR_BYTES,
        read_only: false,
        serial: String::new(),
    };
    let medium = Arc::new(Failing {
        file: File::from(memfd_create("disk-test", MemfdFlags::CLOEXEC).unwrap()),
        full: AtomicBool::new(false),
        left: AtomicU64::new(u64::MAX),
        len_bytes: AtomicU64::new(0),
    });
    let overlay =
        Overlay::on(Box::new(Arc::clone(&medium)), "/nowhere".into(), saved.pages()).unwrap();
    (Arc::new(Disk::on(saved, Base::File(base), overlay, kept_pages_max)), medium)
}

#[test]
fn a_disk_of_an_odd_length_reads_as_its_file_and_leaves_it_alone() {
    // Two pages, five sectors of a third.
    let contents = noise(2 * PAGE_SIZE + 5 * SECTOR, 1);
    let file = file_of(&contents);
    let folder = tempfile::tempdir().unwrap();
    for folder in [None, Some(folder.path().to_owned())] {
        let options = OverlayOptions { folder, ..OverlayOptions::default() };
        let disk = Arc::new(Disk::open(3, &config(&file), &options).unwrap());
        assert_eq!((disk.name(), disk.serial(), disk.pages()), ("disk3", "disk3", 3));
        assert_eq!(dirty(&disk), [0, 1, 2], "all of the file counts as written");
        assert_eq!(read_all(&disk), contents);
        let mut expected = contents.clone();
        for (sector, sectors) in [(20, 1), (6, 4), (15, 6), (0, 1)] {
            let bytes = noise(sectors * SECTOR, sector as u64 + 100);
            expected[sector * SECTOR..][..bytes.len()].copy_from_slice(&bytes);
            disk.begin().write_at((sector * SECTOR) as u64, &bytes).unwrap();
            assert_eq!(read_all(&disk), expected);
        }
        let mut some = vec![0; 7 * SECTOR];
        disk.begin().read_at(5 * SECTOR_BYTES, &mut some).unwrap();
        assert_eq!(some, expected[5 * SECTOR..12 * SECTOR]);
        disk.begin().flush().unwrap();
        let frozen = disk.drain(PATIENCE).unwrap().freeze(set_of(&disk, [2])).unwrap();
        let last = page_of(&frozen, 2);
        assert_eq!(last[..5 * SECTOR], expected[2 * PAGE_SIZE..]);
        assert_eq!(last[5 * SECTOR..], [0; 3 * SECTOR], "padded with zeros");
    }
    assert_eq!(std::fs::read(file.path()).unwrap(), contents);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "overlays have no name");
}

#[test]
fn requests_that_cannot_be_are_refused() {
    let file = file_of(&noise(3 * SECTOR, 1));
    let mut config = config(&file);
    let disk = Disk::open(0, &config, &OverlayOptions::default()).unwrap();
    let _all = dirty(&disk);
    let request = disk.begin();
    for (offset, len) in [(0, 100), (100, 512), (1024, 1024), (1536, 512), (u64::MAX - 511, 512)] {
        let error = request.write_at(offset, &vec![1; len]).unwrap_err().to_string();
        assert!(error.contains("of disk0"), "{error}");
        assert!(request.read_at(offset, &mut vec![0; len]).is_err());
        assert!(request.write_zeroes(offset, len as u64).is_err());
    }
    for offset in [0, 512, 1536] {
        request.read_at(offset, &mut []).unwrap();
        request.write_at(offset, &[]).unwrap();
        request.write_zeroes(offset, 0).unwrap();
    }
    assert!(dirty(&disk).is_empty(), "nothing was written");
    config.read_only = true;
    let disk = Disk::open(0, &config, &OverlayOptions::default()).unwrap();
    let error = disk.begin().write_at(0, &[1; 512]).unwrap_err().to_string();
    assert_eq!(error, "cannot write 512 bytes at 0 of disk0: the disk is read-only");
    assert!(disk.begin().write_zeroes(0, 512).is_err());
    assert_eq!(dirty(&disk), [0], "a checkpoint has it all the same");
}

#[test]
fn files_that_are_no_disks_are_refused() {
    let options = OverlayOptions::default();
    for contents in [&[][..], &[0; 100], &[0; 513]] {
        let file = file_of(contents);
        let error = Disk::open(0, &config(&file), &options).unwrap_err();
        assert!(matches!(error, VmmError::Config(_)), "{error}");
    }
    let file = file_of(&[0; 512]);
    let folder = tempfile::tempdir().unwrap();
    let not_a_file = DiskConfig { file: folder.path().to_owned(), ..config(&file) };
    assert!(Disk::open(0, &not_a_file, &options).is_err());
    let long = DiskConfig { serial: Some("123456789012345678901".into()), ..config(&file) };
    assert!(matches!(Disk::open(0, &long, &options), Err(VmmError::Config(_))));
    let nowhere = OverlayOptions { folder: Some(folder.path().join("none")), ..options };
    assert!(matches!(Disk::open(0, &config(&file), &nowhere), Err(VmmError::Host { .. })));
}

#[test]
fn holes_are_left_out_and_discards_of_them_are_nothing() {
    const PAGES: u64 = 1000;
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(PAGES * PAGE_BYTES).unwrap();
    file.as_file().write_all_at(&noise(PAGE_SIZE, 1), 300 * PAGE_BYTES).unwrap();
    let disk = Disk::open(0, &config(&file), &OverlayOptions::default()).unwrap();
    assert_eq!(dirty(&disk), [300], "holes are zero as they are");
    disk.begin().write_at(700 * PAGE_BYTES + 512, &[7; 512]).unwrap();
    assert_eq!(dirty(&disk), [700]);
    disk.begin().write_zeroes(0, PAGES * PAGE_BYTES).unwrap();
    assert_eq!(dirty(&disk), [300, 700], "only what held something");
    assert!(read_all(&disk).iter().all(|byte| *byte == 0));
}

#[test]
fn zeros_stop_where_they_should() {
    let mut expected = noise(9 * PAGE_SIZE + SECTOR, 1);
    let file = file_of(&expected);
    let disk = Disk::open(0, &config(&file), &OverlayOptions::default()).unwrap();
    for (sector, sectors) in [(3, 2), (7, 18), (30, 1), (40, 33), (0, 1)] {
        expected[sector * SECTOR..][..sectors * SECTOR].fill(0);
        let (offset, len_bytes) = ((sector * SECTOR) as u64, (sectors * SECTOR) as u64);
        disk.begin().write_zeroes(offset, len_bytes).unwrap();
        assert!(read_all(&disk) == expected, "{sectors} sectors from {sector} on");
    }
}

#[test]
fn what_is_frozen_is_kept_below_as_zeros_in_memory_or_in_a_slot() {
    let contents = noise(6 * PAGE_SIZE, 1);
    let file = file_of(&contents);
    let (disk, medium) = failing_disk(&file, 1);
    disk.begin().write_at(PAGE_BYTES, &[1; PAGE_SIZE]).unwrap();
    disk.begin().write_at(2 * PAGE_BYTES, &[2; PAGE_SIZE]).unwrap();
    disk.begin().write_at(3 * PAGE_BYTES, &[3; PAGE_SIZE]).unwrap();
    disk.begin().write_zeroes(4 * PAGE_BYTES, PAGE_BYTES).unwrap();
    let frozen = disk.drain(PATIENCE).unwrap().freeze(set_of(&disk, 0..5)).unwrap();
    let busy = disk.drain(PATIENCE).unwrap().freeze(set_of(&disk, 0..5)).unwrap_err();
    assert!(busy.to_string().contains("not done with its pages"), "{busy}");
    for round in 10..12 {
        disk.begin().write_at(0, &vec![round; 6 * PAGE_SIZE]).unwrap();
        assert_eq!(frozen.kept_pages(), 5, "once each, and no page that was not frozen");
        assert_eq!(page_of(&frozen, 0), contents[..PAGE_SIZE]);
        for page in 1..4 {
            assert_eq!(page_of(&frozen, page), [page as u8; PAGE_SIZE]);
        }
        assert_eq!(page_of(&frozen, 4), [0; PAGE_SIZE]);
        assert!(frozen.read_page(5, &mut [0; PAGE_SIZE]).is_err(), "not frozen");
        assert!(frozen.read_page(500, &mut [0; PAGE_SIZE]).is_err(), "not there");
    }
    let own_len = 6 * PAGE_BYTES;
    assert_eq!(medium.file.metadata().unwrap().len(), own_len + 2 * PAGE_BYTES, "two slots");
    disk.begin().write_at(2 * PAGE_BYTES, &[13; PAGE_SIZE]).unwrap();
    assert_eq!(page_of(&frozen, 2), [2; PAGE_SIZE]);
    drop(frozen);
    assert_eq!(medium.file.metadata().unwrap().len(), own_len, "slots are given back");
    assert_eq!(disk.contents.kept_count(), 0);
    let frozen = disk.drain(PATIENCE).unwrap().freeze(set_of(&disk, 0..5)).unwrap();
    assert_eq!(page_of(&frozen, 2), [13; PAGE_SIZE]);
}

#[test]
fn a_full_overlay_fails_the_write_and_nothing_else() {
    let contents = noise(8 * PAGE_SIZE, 1);
    let file = file_of(&contents);
    let (disk, medium) = failing_disk(&file, 0);
    disk.begin().write_at(0, &[1; PAGE_SIZE]).unwrap();
    let frozen = disk.drain(PATIENCE).unwrap().freeze(set_of(&disk, 0..4)).unwrap();
    let _all = dirty(&disk);
    let fails = |offset: u64, len: usize| {
        let error = disk.begin().write_at(offset, &vec![9; len]).unwrap_err();
        let VmmError::Host { op, source } = error else { panic!("{error}") };
        assert_eq!(op, format!("write {len} bytes at {offset} of disk7"));
        assert_eq!(source.kind(), io::ErrorKind::StorageFull);
        let text = source.to_string();
        assert!(text.starts_with("the disk's overlay in /nowhere: No space left"), "{text}");
    };
    medium.full.store(true, Ordering::SeqCst);
    // The old contents cannot be kept: the new ones are refused.
    fails(0, PAGE_SIZE);
    assert!(dirty(&disk).is_empty(), "nothing changed");
    // Here no old contents need be kept, but the new ones find no room.
    fails(PAGE_BYTES, 3 * PAGE_SIZE);
    fails(5 * PAGE_BYTES + 512, 512);
    assert!(disk.begin().write_zeroes(6 * PAGE_BYTES, PAGE_BYTES).is_err());
    assert_eq!(dirty(&disk), [1, 2, 3, 5, 6], "who knows what a failed write left");
    let check = |read: &dyn Fn(u64) -> Page| {
        assert_eq!(read(0), [1; PAGE_SIZE]);
        (1..4).for_each(|page| {
            assert_eq!(read(page), contents[page as usize * PAGE_SIZE..][..PAGE_SIZE]);
        });
    };
    check(&|page| page_of(&frozen, page));
    let live = read_all(&disk);
    check(&|page| live[page as usize * PAGE_SIZE..][..PAGE_SIZE].try_into().unwrap());
    assert_eq!(live[4 * PAGE_SIZE..], contents[4 * PAGE_SIZE..]);
    // There is room again, but only for the slot: the page may have changed, but not what is kept.
    medium.full.store(false, Ordering::SeqCst);
    medium.left.store(1, Ordering::SeqCst);
    fails(0, PAGE_SIZE);
    assert_eq!(dirty(&disk), [0]);
    check(&|page| page_of(&frozen, page));
    medium.left.store(u64::MAX, Ordering::SeqCst);
    disk.begin().write_at(0, &vec![9; 8 * PAGE_SIZE]).unwrap();
    check(&|page| page_of(&frozen, page));
    assert!(read_all(&disk).iter().all(|byte| *byte == 9));
}

#[test]
fn a_file_that_lost_its_end_is_an_error() {
    let file = file_of(&noise(4 * PAGE_SIZE, 1));
    let disk = Disk::open(0, &config(&file), &OverlayOptions::default()).unwrap();
    file.as_file().set_len(PAGE_BYTES).unwrap();
    disk.begin().read_at(0, &mut [0; PAGE_SIZE]).unwrap();
    let error = disk.begin().read_at(PAGE_BYTES, &mut [0; PAGE_SIZE]).unwrap_err().to_string();
    assert!(error.contains(&file.path().display().to_string()), "{error}");
    assert!(disk.begin().write_at(PAGE_BYTES, &[1; 512]).is_err(), "the rest of the page is lost");
}

#[test]
fn a_drain_waits_for_requests_and_holds_new_ones_back() {
    let file = file_of(&[1; PAGE_SIZE]);
    let disk = Arc::new(Disk::open(0, &config(&file), &OverlayOptions::default()).unwrap());
    let request = disk.begin();
    let error = disk.drain(Duration::from_millis(10)).unwrap_err();
    assert!(matches!(error, VmmError::NotNow(_)), "{error}");
    drop(disk.begin());
    std::thread::scope(|scope| {
        let drain = scope.spawn(|| disk.drain(PATIENCE).unwrap());
        request.write_at(0, &[2; 512]).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert!(!drain.is_finished(), "a request is in flight");
        drop(request);
        let drained = drain.join().unwrap();
        let late = scope.spawn(|| disk.begin().write_at(0, &[3; 512]).unwrap());
        std::thread::sleep(Duration::from_millis(20));
        assert!(!late.is_finished(), "the disk stands still");
        let frozen = drained.freeze(set_of(&disk, [0])).unwrap();
        drop(drained);
        late.join().unwrap();
        assert_eq!(page_of(&frozen, 0)[..SECTOR], [2; 512]);
        assert_eq!(read_all(&disk)[..SECTOR], [3; 512]);
    });
}

/// Ends the writers even if a check fails, since a scope waits for its threads.
struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Writers change frozen pages as fast as they can while several readers read them.
#[test]
fn what_is_frozen_stands_still_under_hammering_writers() {
    const PAGES: u64 = 300;
    let file = file_of(&noise(PAGES as usize * PAGE_SIZE, 1));
    let options = OverlayOptions { folder: None, kept_pages_max: 40 };
    let disk = Arc::new(Disk::open(0, &config(&file), &options).unwrap());
    let done = AtomicBool::new(false);
    let hammer = |seed: u64| {
        let mut at = seed;
        while !done.load(Ordering::Relaxed) {
            at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let sector = (at >> 33) % (PAGES * 8 - 40);
            let sectors = if at >> 60 == 0 { 40 } else { 1 + (at >> 57) % 9 };
            let request = disk.begin();
            if at >> 62 == 0 {
                request.write_zeroes(sector * SECTOR_BYTES, sectors * SECTOR_BYTES).unwrap();
            } else {
                let bytes = vec![(at >> 40) as u8; sectors as usize * SECTOR];
                request.write_at(sector * SECTOR_BYTES, &bytes).unwrap();
            }
        }
    };
    std::thread::scope(|scope| {
        let _end = EndOnDrop(&done);
        (0..2).for_each(|seed| drop(scope.spawn(move || hammer(seed))));
        for round in 0..30 {
            let (frozen, expected) = {
                let drained = disk.drain(PATIENCE).unwrap();
                let mut all = vec![0; PAGES as usize * PAGE_SIZE];
                disk.contents.read(0, &mut all).unwrap();
                let pages = (0..PAGES).filter(|page| page % 5 != round % 5);
                (drained.freeze(set_of(&disk, pages)).unwrap(), all)
            };
            let check = || {
                // Wait until some pages have changed; others change while they are read.
                let patience = Instant::now() + PATIENCE;
                while frozen.kept_pages() < 50 && Instant::now() < patience {
                    std::thread::yield_now();
                }
                for page in frozen.pages().iter() {
                    let wanted = &expected[page as usize * PAGE_SIZE..][..PAGE_SIZE];
                    assert!(page_of(&frozen, page) == wanted, "page {page} in round {round}");
                }
            };
            std::thread::scope(|readers| (0..2).for_each(|_| drop(readers.spawn(check))));
        }
    });
    assert_eq!(disk.contents.kept_count(), 0);
}

/// The cost of the pause depends on what was written, not on the size of the disk.
#[test]
fn a_large_disk_is_cut_as_fast_as_a_small_one() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 40).unwrap();
    let disk = Arc::new(Disk::open(0, &config(&file), &OverlayOptions::default()).unwrap());
    let mut line = DiskLine::new(Arc::clone(&disk));
    for page in 0..1000 {
        disk.begin().write_at(page * 97 * PAGE_BYTES, &[1; 512]).unwrap();
    }
    let fastest = (0..5_u64).map(|round| {
        line.prepare();
        disk.begin().write_at((1 << 39) + round * (1 << 30), &[2; 512]).unwrap();
        let started = Instant::now();
        let frozen = line.cut(&disk.drain(PATIENCE).unwrap()).unwrap();
        let pause = started.elapsed();
        assert_eq!(frozen.pages().count(), 1001 + round);
        pause
    });
    let fastest = fastest.min().unwrap();
    println!("a disk of 1 TiB was cut in {fastest:?}");
    // A set of the disk's pages takes 32 MiB: a pass over one would take milliseconds.
    assert!(fastest < Duration::from_millis(2), "{fastest:?}");
}
