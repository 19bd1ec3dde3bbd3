//! Tests of registers (virtio 1.2, 4.2.2), initialisation (3.1.1), and saving both.

use super::*;
use crate::devices::{Captured, Device};
use crate::state::ChunkSet;
use crate::virtio::rng::Rng;
use crate::virtio::{SavedDevice, SavedVirtio};

fn rng() -> Bed {
    Bed::new(Arc::new(Rng))
}

#[test]
fn a_new_device_says_what_it_is() {
    let bed = rng();
    assert_eq!([0, 4, 8].map(|offset| bed.get(offset)), [0x7472_6976, 2, 4]);
    assert_eq!((bed.status(), bed.get(0x60), bed.get(0x34), bed.get(0x44)), (0, 0, 64, 0));
    bed.set(0x14, 1);
    assert_eq!(bed.get(0x10) & 1, 1, "the modern interface");
    bed.set(0x14, 2);
    assert_eq!(bed.get(0x10), 0, "there are no more features");
    bed.set(0x30, 1);
    assert_eq!((bed.get(0x34), bed.get(0x44)), (0, 0), "there is one queue");
    assert_eq!(bed.get(0xb0), u32::MAX, "there is no shared memory");
}

#[test]
fn the_driver_goes_through_initialisation_in_order() {
    let bed = rng();
    for (written, found) in [(4, 0), (8, 0), (2, 2), (1, 2), (3, 3), (7, 3), (11, 3)] {
        bed.set(0x70, written);
        assert_eq!(bed.status(), found, "after {written}");
    }
    bed.accept(VERSION_1 | 1 << 40);
    bed.set(0x70, 11);
    assert_eq!(bed.status(), 3, "it has no feature 40");
    bed.accept(VERSION_1);
    bed.set(0x70, 11);
    assert_eq!(bed.status(), 11);
    bed.accept(VERSION_1 | INDIRECT);
    bed.set(0x70, 15);
    bed.set(0x70, 3);
    assert_eq!(bed.status(), 15, "bits are not cleared one by one");
    assert_eq!(bed.mmio.save().driver_features.0, VERSION_1, "features are settled by then");
    bed.set(0x70, 0);
    let saved = bed.mmio.save();
    assert_eq!((saved.status, saved.driver_features.0), (0, 0));
}

#[test]
fn registers_are_32_bits_wide_and_nothing_else() {
    let bed = rng();
    for len in [0, 1, 2, 3, 5, 8] {
        let mut data = vec![0xaa; len];
        bed.mmio.read(0, &mut data);
        assert!(data.iter().all(|byte| *byte == 0), "{len} bytes");
        bed.mmio.write(0x70, &vec![1; len]);
    }
    for offset in [1, 2, 0x71, 0xff, 0x100, u64::MAX, u64::MAX - 3] {
        assert_eq!(bed.get(offset), 0, "at {offset:#x}");
        bed.set(offset, 1);
    }
    assert_eq!(bed.status(), 0);
}

#[test]
fn the_configuration_space_is_read_in_any_width() {
    let (bed, _file) = block_on(&[1; 8192], false);
    let mut all = [0; 60];
    bed.mmio.read(0x100, &mut all);
    assert_eq!(all[..8], 16_u64.to_le_bytes());
    for at in 0..70 {
        for len in 0..9 {
            let mut found = vec![0xaa; len];
            bed.mmio.read(0x100 + at as u64, &mut found);
            let expected: Vec<u8> =
                (at..at + len).map(|at| all.get(at).copied().unwrap_or(0)).collect();
            assert_eq!(found, expected, "{len} bytes at {at}");
        }
    }
}

#[test]
fn queues_that_cannot_be_need_a_reset() {
    let good = queue_address(0);
    let with = |index: usize, address| {
        let mut addresses = good;
        addresses[index] = address;
        addresses
    };
    let bad = [
        (0, good),
        (3, good),
        (128, good),
        (65_552, good),
        (u32::MAX, good),
        (16, with(0, 8)),
        (16, with(1, 0x1_0001)),
        (16, with(2, 0x1_0002)),
        (16, with(0, RAM_BYTES - 16)),
        (16, with(1, 0)),
        (16, with(1, RAM_BYTES - 2)),
        (16, with(2, 3 << 30)),
        (16, with(2, u64::MAX - 3)),
    ];
    let bed = rng();
    for (entries, addresses) in bad {
        bed.set(0x70, 0);
        bed.set(0x70, 1);
        bed.set(0x70, 3);
        bed.accept(VERSION_1);
        bed.set(0x70, 11);
        bed.set(0x30, 0);
        bed.set_up_queue(entries, addresses);
        assert_eq!(bed.get(0x44), 0, "{entries} at {addresses:x?}");
        assert_eq!(bed.status(), NEEDS_RESET + 11);
        bed.set(0x70, 15 | NEEDS_RESET);
        bed.set(0x50, 0);
    }
    bed.set_up(0);
    assert_eq!(bed.status(), 15, "a reset helps");
}

#[test]
fn a_queue_is_set_up_before_it_is_used_and_stopped_by_the_driver() {
    let bed = rng();
    bed.set_up_queue(16, queue_address(0));
    assert_eq!(bed.get(0x44), 0, "not before the features are settled");
    bed.set_up(0);
    bed.set(0x30, 0);
    bed.set(0x80, 0xdead_0000);
    assert_eq!(bed.mmio.save().queues[0].descriptors.0, queue_address(0)[0]);
    let mut ring = Ring::new(0);
    ring.add(&bed, &[(DATA, 64, true)]);
    bed.set(0x44, 0);
    assert_eq!(bed.get(0x44), 0);
    ring.kick(&bed);
    assert_eq!(ring.used(&bed), None, "it is stopped");
    bed.set(0x50, 7);
    bed.set(0x50, u32::MAX);
    assert_eq!(bed.status(), 15, "notifications of no queue are ignored");
}

#[test]
fn interrupts_stay_until_they_are_acknowledged() {
    let bed = rng();
    bed.set_up(0);
    let mut ring = Ring::new(0);
    ring.add(&bed, &[(DATA, 64, true)]);
    ring.kick(&bed);
    assert_eq!((bed.get(0x60), bed.interrupts.0.load(Ordering::SeqCst)), (1, 1));
    bed.mmio.go_on();
    assert_eq!(bed.interrupts.0.load(Ordering::SeqCst), 2, "it may have been lost");
    bed.set(0x64, 2);
    assert_eq!(bed.get(0x60), 1);
    bed.set(0x64, 1);
    assert_eq!(bed.get(0x60), 0);
    bed.mmio.go_on();
    assert_eq!(bed.interrupts.0.load(Ordering::SeqCst), 2);
}

#[test]
fn a_saved_device_goes_on_where_it_was() {
    let bed = rng();
    let mut captured = bed.mmio.state();
    bed.set_up(INDIRECT);
    let mut ring = Ring::new(0);
    // Past the end of the ring, and with three chains of which the device was not notified.
    for _ in 0..40 {
        ring.add(&bed, &[(DATA, 8, true)]);
        ring.kick(&bed);
        ring.used(&bed).unwrap();
    }
    for _ in 0..3 {
        ring.add(&bed, &[(DATA, 8, true)]);
    }
    bed.mmio.capture(&mut captured);
    let chunk = captured.chunk().unwrap().expect("it has state");
    assert_eq!((chunk.name.as_str(), chunk.kind.as_str()), ("virtio0", "virtio.mmio"));
    let saved: SavedVirtio = ChunkSet::new(vec![chunk]).unwrap().take("virtio0").unwrap();
    assert_eq!(saved, bed.mmio.save());
    let restored = VirtioMmio::restore(
        "virtio0",
        Arc::new(Rng),
        Arc::clone(&bed.ram),
        Arc::clone(&bed.interrupts) as _,
        &saved,
    );
    let bed = Bed { mmio: restored.unwrap(), ..bed };
    assert_eq!(bed.mmio.save(), saved);
    assert_eq!(ring.used(&bed), None, "it stands still");
    bed.mmio.go_on();
    for _ in 0..3 {
        ring.used(&bed).unwrap();
    }
    assert_eq!(ring.used(&bed), None);
    ring.add(&bed, &[(DATA, 8, true)]);
    ring.kick(&bed);
    ring.used(&bed).unwrap();
}

#[test]
fn the_state_of_another_device_is_refused() {
    let bed = rng();
    bed.set_up(0);
    let saved = bed.mmio.save();
    let change = |change: &dyn Fn(&mut SavedVirtio)| {
        let mut other = saved.clone();
        change(&mut other);
        let error = bed.mmio.put_back(&other).unwrap_err().to_string();
        assert!(error.contains("virtio0"), "{error}");
        assert_eq!(bed.mmio.save(), saved, "it is as it was");
    };
    change(&|other| other.queues.clear());
    change(&|other| other.queues[0].max_size = 128);
    change(&|other| other.queues[0].size = 5);
    change(&|other| other.queues[0].device = crate::vcpu::saved::Reg(RAM_BYTES));
    change(&|other| other.driver_features = crate::vcpu::saved::Reg(VERSION_1 | 1 << 50));
    change(&|other| other.device = SavedDevice::Balloon { target_pages: 0, actual_pages: 0 });
}
