//! Tests with drivers that break the rules.

use proptest::prelude::*;

use super::*;
use crate::virtio::fuzzing::TARGETS;

const HEADER: u64 = 2 << 20;
const STATUS: u64 = HEADER + 64;

/// Returns a block device that is set up; its memory has a header, of zeros, that reads sector 0.
fn bed() -> (Bed, NamedTempFile) {
    let (bed, file) = block_on(&noise(8192, 1), false);
    bed.set_up(INDIRECT);
    (bed, file)
}

/// Checks that the device stops at what `break_it` does, says so, and works again after a reset.
fn breaks(what: &str, break_it: impl FnOnce(&Bed, &mut Ring)) {
    let (bed, _file) = bed();
    let mut ring = Ring::new(0);
    break_it(&bed, &mut ring);
    ring.kick(&bed);
    assert_eq!(bed.status(), 15 | NEEDS_RESET, "{what}");
    assert_eq!(bed.get(0x60) & 2, 2, "{what}: it tells the driver");
    assert_eq!(ring.used(&bed), None, "{what}");
    ring.kick(&bed);
    bed.mmio.go_on();
    assert_eq!(ring.used(&bed), None, "{what}: nothing happens until it is reset");
    bed.write(queue_address(0)[0], &vec![0; 0xa000]);
    bed.set_up(INDIRECT);
    let mut ring = Ring::new(0);
    ring.add(&bed, &[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    ring.kick(&bed);
    assert_eq!(ring.used(&bed).map(|(_, len)| len), Some(513), "{what}");
}

#[test]
fn chains_that_cannot_be_stop_the_device() {
    let table = queue_address(0)[0];
    let put = |bed: &Bed, index, address, len, flags, next| {
        Ring::put(bed, table, index, address, len, flags, next);
    };
    breaks("a chain that is a circle", |bed, ring| {
        put(bed, 0, HEADER, 16, NEXT, 1);
        put(bed, 1, DATA, 512, NEXT, 0);
        ring.offer(bed, 0);
    });
    breaks("a chain that ends outside the table", |bed, ring| {
        put(bed, 0, HEADER, 16, NEXT, ENTRIES);
        ring.offer(bed, 0);
    });
    breaks("a head outside the table", |bed, ring| ring.offer(bed, ENTRIES));
    breaks("a head far outside the table", |bed, ring| ring.offer(bed, u16::MAX));
    breaks("more chains than entries", |bed, ring| {
        ring.next_avail = ENTRIES + 1;
        ring.offer(bed, 0);
    });
    for (address, len) in [
        (RAM_BYTES, 16),
        (RAM_BYTES - 8, 16),
        (0, u32::MAX),
        (u64::MAX, 16),
        (u64::MAX - 15, 16),
        (3 << 30, 1),
    ] {
        breaks(&format!("{len} bytes at {address:#x}"), |bed, ring| {
            ring.add(bed, &[(HEADER, 16, false), (address, len, true), (STATUS, 1, true)]);
        });
    }
    breaks("a buffer to read after one to write", |bed, ring| {
        ring.add(bed, &[(HEADER, 16, false), (STATUS, 1, true), (DATA, 512, false)]);
    });
    breaks("no header", |bed, ring| {
        ring.add(bed, &[(STATUS, 1, true)]);
    });
    breaks("half a header", |bed, ring| {
        ring.add(bed, &[(HEADER, 8, false), (STATUS, 1, true)]);
    });
    breaks("no status", |bed, ring| {
        ring.add(bed, &[(HEADER, 16, false)]);
    });
    breaks("a status of no bytes", |bed, ring| {
        ring.add(bed, &[(HEADER, 16, false), (STATUS, 0, true)]);
    });
}

#[test]
fn indirect_tables_are_followed_once_and_no_further() {
    const TABLE: u64 = 0x30_0000;
    let (bed, _file) = bed();
    let mut ring = Ring::new(0);
    Ring::put(&bed, TABLE, 0, HEADER, 16, NEXT, 2);
    Ring::put(&bed, TABLE, 2, DATA, 1024, NEXT | WRITE, 1);
    Ring::put(&bed, TABLE, 1, STATUS, 1, WRITE, 0);
    Ring::put(&bed, queue_address(0)[0], 5, TABLE, 48, 4, 0);
    ring.offer(&bed, 5);
    ring.kick(&bed);
    assert_eq!(ring.used(&bed), Some((5, 1025)));
    assert_eq!(bed.read(DATA, 1024), noise(8192, 1)[..1024]);
    for (what, address, len, inner) in [
        ("in itself", TABLE, 48, 4),
        ("a circle", TABLE, 48, NEXT),
        ("of an odd length", TABLE, 47, 0),
        ("of no length", TABLE, 0, 0),
        ("too long", TABLE, u32::MAX - 15, 0),
        ("outside RAM", RAM_BYTES, 48, 0),
        ("at the end of everything", u64::MAX - 47, 48, 0),
    ] {
        breaks(&format!("a table {what}"), |bed, ring| {
            Ring::put(bed, TABLE, 0, TABLE, 16, inner, 0);
            Ring::put(bed, queue_address(0)[0], 0, address, len, 4, 0);
            ring.offer(bed, 0);
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Any registers, any rings: devices do not panic, do not run forever, and write only where
    /// they may.
    #[test]
    fn no_driver_makes_a_device_do_what_it_must_not(
        bytes in prop::collection::vec(any::<u8>(), 0..600),
        // Steps that mostly make chains.
        likely in prop::collection::vec((4_u8..12, prop::collection::vec(any::<u8>(), 12)), 0..40),
    ) {
        let likely: Vec<u8> =
            likely.into_iter().flat_map(|(step, rest)| [vec![step], rest].concat()).collect();
        for (_, target) in TARGETS {
            target(&bytes);
            target(&likely);
        }
    }
}
