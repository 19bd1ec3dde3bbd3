//! Tests of the block device, against a copy of its disk's bytes.

use std::sync::atomic::AtomicBool;

use proptest::prelude::*;

use super::*;
use crate::virtio::Still;
use frazil_snapstore::PageSet;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const SECTOR: usize = 512;
/// Where headers and status bytes are.
const HEADERS: u64 = 2 << 20;
const STATUS: u64 = HEADERS + 0x1000;

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// Makes a request with the given data buffers. Returns its status and the used length.
fn request(bed: &Bed, ring: &mut Ring, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
    bed.write(HEADERS, &header(kind, sector));
    bed.write(STATUS, &[0xaa]);
    let mut buffers = vec![(HEADERS, 16, false)];
    buffers.extend(data);
    buffers.push((STATUS, 1, true));
    let head = ring.add(bed, &buffers);
    ring.kick(bed);
    let (id, len) = ring.wait_used(bed);
    assert_eq!(id, u32::from(head));
    (bed.read(STATUS, 1)[0], len)
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn what_is_written_is_read_in_any_pieces() {
    let mut disk = noise(64 * SECTOR, 1);
    let (bed, _file) = block_on(&disk, false);
    bed.set_up(INDIRECT | 1 << 9);
    let mut ring = Ring::new(0);
    let bytes = noise(5 * SECTOR, 2);
    bed.write(DATA, &bytes);
    let pieces = [(DATA, 700, false), (DATA + 700, 0, false), (DATA + 700, 1860, false)];
    assert_eq!(request(&bed, &mut ring, OUT, 3, &pieces), (OK, 1));
    disk[3 * SECTOR..8 * SECTOR].copy_from_slice(&bytes);
    assert_eq!(request(&bed, &mut ring, FLUSH, 0, &[]), (OK, 1));
    let pieces = [(DATA + 9000, 1, true), (DATA + 9001, 4000, true), (DATA + 13_001, 28_767, true)];
    assert_eq!(request(&bed, &mut ring, IN, 0, &pieces), (OK, 64 * 512 + 1));
    assert_eq!(bed.read(DATA + 9000, disk.len()), disk);
    assert_eq!(request(&bed, &mut ring, GET_ID, 0, &[(DATA, 20, true)]), (OK, 21));
    assert_eq!(bed.read(DATA, 20), b"s-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    let mut written = PageSet::new(bed.ram.end_page());
    bed.ram.harvest_vmm_writes(&mut written);
    assert!(written.contains((DATA + 9000) / 4096), "dirty tracking sees it");
}

#[test]
fn discarded_sectors_and_zeros_read_as_zeros() {
    let mut disk = noise(64 * SECTOR, 1);
    let (bed, _file) = block_on(&disk, false);
    bed.set_up(0);
    let mut ring = Ring::new(0);
    let ranges = [range(8, 8, 0), range(20, 3, 0)].concat();
    bed.write(DATA, &ranges);
    assert_eq!(request(&bed, &mut ring, DISCARD, 0, &[(DATA, 32, false)]), (OK, 1));
    bed.write(DATA, &range(40, 2, 1));
    assert_eq!(request(&bed, &mut ring, WRITE_ZEROES, 0, &[(DATA, 16, false)]), (OK, 1));
    for (sector, sectors) in [(8, 8), (20, 3), (40, 2)] {
        disk[sector * SECTOR..(sector + sectors) * SECTOR].fill(0);
    }
    assert_eq!(request(&bed, &mut ring, IN, 0, &[(DATA, 32_768, true)]), (OK, 32_769));
    assert_eq!(bed.read(DATA, disk.len()), disk);
    let refused = [
        (DISCARD, range(0, 1, 1), UNSUPP),
        (WRITE_ZEROES, range(0, 1, 2), UNSUPP),
        (DISCARD, range(64, 1, 0), IOERR),
        (DISCARD, range(u64::MAX, 1, 0), IOERR),
        (DISCARD, range(0, u32::MAX, 0), IOERR),
        // The whole request fails if one range does.
        (DISCARD, [range(0, 1, 0), range(63, 2, 0)].concat(), IOERR),
        (WRITE_ZEROES, [range(0, 1, 0), range(0, 1, 2)].concat(), UNSUPP),
        (DISCARD, vec![0; 15], IOERR),
        (WRITE_ZEROES, vec![0; 16 * 9], IOERR),
    ];
    for (kind, bytes, status) in refused {
        bed.write(DATA, &bytes);
        let data = [(DATA, bytes.len() as u32, false)];
        assert_eq!(request(&bed, &mut ring, kind, 0, &data), (status, 1), "{bytes:?}");
    }
    assert_eq!(request(&bed, &mut ring, IN, 0, &[(DATA, 32_768, true)]), (OK, 32_769));
    assert_eq!(bed.read(DATA, disk.len()), disk);
}

#[test]
fn drivers_are_told_to_ask_for_less_than_is_done() {
    let (bed, _file) = block_on(&noise(64 * SECTOR, 1), false);
    bed.set_up(0);
    // Sectors in a range and number of ranges, for discards and for zeros.
    for at in [0x124, 0x130] {
        let told = u64::from(bed.get(at)) * u64::from(bed.get(at + 4)) * SECTOR as u64;
        assert!((1 << 20..=32 << 20).contains(&told), "{told} bytes, while a guest stands still");
    }
    // A guest saved after it was told more may do so.
    bed.write(DATA, &vec![range(0, 64, 0); 8].concat());
    let data = [(DATA, 16 * 8, false)];
    assert_eq!(request(&bed, &mut Ring::new(0), DISCARD, 0, &data), (OK, 1));
}

#[test]
fn a_read_only_disk_is_read_and_not_written() {
    let disk = noise(16 * SECTOR, 1);
    let (bed, _file) = block_on(&disk, true);
    let offered = bed.get(0x10);
    assert_eq!(offered & (1 << 5 | 1 << 13 | 1 << 14), 1 << 5);
    bed.set_up(1 << 5);
    let mut ring = Ring::new(0);
    bed.write(DATA, &range(0, 1, 0));
    for kind in [OUT, DISCARD, WRITE_ZEROES] {
        let len = if kind == OUT { 512 } else { 16 };
        assert_eq!(request(&bed, &mut ring, kind, 0, &[(DATA, len, false)]), (IOERR, 1));
    }
    assert_eq!(request(&bed, &mut ring, IN, 0, &[(DATA, 8192, true)]), (OK, 8193));
    assert_eq!(bed.read(DATA, disk.len()), disk);
}

#[test]
fn requests_that_are_wrong_fail_and_change_nothing() {
    let disk = noise(16 * SECTOR, 1);
    let (bed, _file) = block_on(&disk, false);
    bed.set_up(0);
    let mut ring = Ring::new(0);
    bed.write(DATA, &[0x55; 9000]);
    let wrong = [
        (IN, 16, 512, true),
        (IN, 15, 1024, true),
        (IN, u64::MAX, 512, true),
        (IN, u64::MAX / 512, 512, true),
        (IN, 0, 511, true),
        (OUT, 15, 1024, false),
        (OUT, u64::MAX, 512, false),
        (OUT, 0, 513, false),
    ];
    for (kind, sector, len, writable) in wrong {
        let (status, used) = request(&bed, &mut ring, kind, sector, &[(DATA, len, writable)]);
        assert_eq!((status, used), (IOERR, u32::from(!writable)), "{kind} at {sector}");
    }
    assert_eq!(request(&bed, &mut ring, GET_ID, 0, &[(DATA, 19, true)]), (IOERR, 0));
    assert_eq!(request(&bed, &mut ring, 77, 0, &[]), (UNSUPP, 1));
    assert_eq!(bed.read(DATA, 9000), [0x55; 9000], "no buffer was written");
    assert_eq!(request(&bed, &mut ring, IN, 0, &[]), (OK, 1), "nothing is read in no time");
    assert_eq!(request(&bed, &mut ring, IN, 0, &[(DATA, 8192, true)]), (OK, 8193));
    assert_eq!(bed.read(DATA, disk.len()), disk);
    assert_eq!(bed.status(), 15);
}

#[test]
fn a_saved_state_among_requests_loses_none() {
    let disk = noise(64 * SECTOR, 1);
    let (bed, _file) = block_on(&disk, false);
    bed.set_up(EVENT_IDX);
    let mut ring = Ring::new(0);
    assert_eq!(request(&bed, &mut ring, IN, 0, &[(DATA, 512, true)]), (OK, 513));
    // The device is not notified of these.
    bed.write(HEADERS, &header(IN, 7));
    for at in [0, 4096] {
        let data = (DATA + at, 1024, true);
        ring.add(&bed, &[(HEADERS, 16, false), data, (STATUS, 1, true)]);
    }
    let saved = bed.mmio.save();
    let memory = bed.read(0, RAM_BYTES as usize);
    bed.mmio.go_on();
    for _ in 0..2 {
        ring.used(&bed).unwrap();
    }
    // Go back to the saved state, and do it again.
    bed.write(0, &memory);
    bed.mmio.put_back(&saved).unwrap();
    ring.next_used = 1;
    assert_eq!(ring.used(&bed), None);
    bed.mmio.go_on();
    for at in [0, 4096] {
        ring.used(&bed).unwrap();
        assert_eq!(bed.read(DATA + at, 1024), disk[7 * SECTOR..9 * SECTOR]);
    }
    assert_eq!(request(&bed, &mut ring, IN, 0, &[(DATA, 512, true)]), (OK, 513));
}

/// Queue and memory agree whenever the device is still.
#[test]
fn a_device_that_is_still_has_each_request_whole_or_not_at_all() {
    let (disk, _file) = disk_of(&noise(64 * SECTOR, 1), false);
    let bed = Bed::new(Arc::new(Block::new(disk).unwrap()));
    bed.set_up(0);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut ring = Ring::new(0);
            for round in 0..400_u64 {
                bed.write(DATA, &noise(2048, round));
                let data = [(DATA, 2048, false)];
                assert_eq!(request(&bed, &mut ring, OUT, round % 60, &data), (OK, 1));
            }
            done.store(true, Ordering::SeqCst);
        });
        let mut stills = 0;
        while !done.load(Ordering::SeqCst) {
            let still: Still = bed.mmio.drain(PATIENCE).unwrap();
            let saved = bed.mmio.save().queues[0];
            let used = bed.read_u16(queue_address(0)[2] + 2);
            assert_eq!((saved.next_used, saved.next_avail), (used, used), "what was begun is done");
            let before = bed.mmio.save();
            std::thread::sleep(Duration::from_micros(300));
            assert_eq!(bed.mmio.save(), before, "it is still");
            drop(still);
            stills += 1;
        }
        assert!(stills > 0);
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Reads, writes and discards any sectors in any pieces, and compares with a copy; memory
    /// outside the buffers to write stays as it is.
    #[test]
    fn any_requests_agree_with_a_copy_of_the_disk(
        requests in prop::collection::vec((0_u8..4, 0_u64..40, 1_usize..12, 1_u32..5000), 1..24),
    ) {
        let mut copy = noise(40 * SECTOR, 9);
        let (bed, _file) = block_on(&copy, false);
        bed.set_up(INDIRECT | EVENT_IDX);
        let mut ring = Ring::new(0);
        for (at, (kind, sector, sectors, cut)) in requests.into_iter().enumerate() {
            let (start, len) = (sector as usize * SECTOR, sectors * SECTOR);
            let cut = cut.min(len as u32);
            let fits = start + len <= copy.len();
            let status = if fits { OK } else { IOERR };
            let given = noise(len, at as u64 + 50);
            let guard = noise(64, 3);
            bed.write(DATA - 64, &guard);
            bed.write(DATA, &given);
            bed.write(DATA + len as u64, &guard);
            let (first, second) = ((DATA, cut), (DATA + u64::from(cut), len as u32 - cut));
            let pieces = |write| [(first.0, first.1, write), (second.0, second.1, write)];
            match kind {
                0 => {
                    prop_assert_eq!(request(&bed, &mut ring, IN, sector, &pieces(true)).0, status);
                    let expected = if fits { &copy[start..start + len] } else { &given };
                    prop_assert_eq!(&bed.read(DATA, len), expected);
                }
                1 | 2 => {
                    prop_assert_eq!(request(&bed, &mut ring, OUT, sector, &pieces(false)).0, status);
                    prop_assert_eq!(&bed.read(DATA, len), &given);
                    if fits {
                        copy[start..start + len].copy_from_slice(&given);
                    }
                }
                _ => {
                    bed.write(DATA, &range(sector, sectors as u32, 0));
                    let data = [(DATA, 16, false)];
                    prop_assert_eq!(request(&bed, &mut ring, DISCARD, 0, &data).0, status);
                    if fits {
                        copy[start..start + len].fill(0);
                    }
                    continue;
                }
            }
            prop_assert_eq!(&bed.read(DATA - 64, 64), &guard);
            prop_assert_eq!(&bed.read(DATA + len as u64, 64), &guard);
        }
    }
}
