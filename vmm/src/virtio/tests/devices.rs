//! Tests of the entropy device and the balloon.

use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::{Receiver, channel};

use super::*;
use crate::virtio::balloon::Balloon;
use crate::virtio::rng::Rng;
use crate::virtio::{FreePages, SavedDevice};

#[test]
fn random_bytes_fill_the_buffer_and_no_more() {
    let bed = Bed::new(Arc::new(Rng));
    bed.set_up(0);
    let mut ring = Ring::new(0);
    ring.add(&bed, &[(DATA, 100, true), (DATA + 5000, 28, true)]);
    ring.add(&bed, &[(DATA + 0x8000, 1 << 20, true)]);
    ring.add(&bed, &[(DATA, 0, true)]);
    ring.add(&bed, &[(DATA, 64, false)]);
    ring.kick(&bed);
    let lens: Vec<u32> = std::iter::from_fn(|| ring.used(&bed)).map(|(_, len)| len).collect();
    assert_eq!(lens, [128, 4096, 0, 0]);
    let (first, second) = (bed.read(DATA, 100), bed.read(DATA + 5000, 28));
    assert!(first.iter().any(|byte| *byte != 0) && second.iter().any(|byte| *byte != 0));
    assert_eq!(bed.read(DATA + 100, 4900), [0; 4900]);
    assert_eq!(bed.read(DATA + 0x9000, 4096), [0; 4096]);
    assert!(matches!(bed.mmio.save().device, SavedDevice::Rng {}));
}

/// Remembers what was freed.
#[derive(Debug, Default)]
struct Freed(Mutex<Vec<(u64, u64)>>);

impl FreePages for Freed {
    fn free(&self, address: GuestAddress, len_bytes: u64) -> std::io::Result<()> {
        self.0.lock().unwrap().push((address.0, len_bytes));
        Ok(())
    }
}

fn balloon() -> (Bed, Arc<Balloon>, Arc<Freed>) {
    let freed = Arc::<Freed>::default();
    let balloon = Arc::new(Balloon::in_place(Arc::clone(&freed) as _).unwrap());
    let bed = Bed::new(Arc::clone(&balloon) as _);
    bed.set_up(1 << 2 | 1 << 5);
    (bed, balloon, freed)
}

#[test]
fn inflated_pages_are_freed_together() {
    let (bed, _balloon, freed) = balloon();
    let mut ring = Ring::new(0);
    // Three in a row, one alone, one past RAM, one in the hole, one past all addresses, two in a
    // row.
    let pages = [5_u32, 6, 7, 40, 1024, 0xc_0000, u32::MAX, 1022, 1023];
    bed.write(DATA, &pages.map(u32::to_le_bytes).concat());
    ring.add(&bed, &[(DATA, 20, false), (DATA + 20, 17, false)]);
    ring.kick(&bed);
    assert!(ring.used(&bed).is_some());
    assert_eq!(
        *freed.0.lock().unwrap(),
        [(0x5000, 0x3000), (0x2_8000, 0x1000), (0x3f_e000, 0x2000)]
    );
    let mut deflate = Ring::new(1);
    deflate.add(&bed, &[(DATA, 12, false)]);
    deflate.kick(&bed);
    assert!(deflate.used(&bed).is_some());
    assert_eq!(freed.0.lock().unwrap().len(), 3);
}

#[test]
fn reported_pages_are_freed_whole() {
    let (bed, _balloon, freed) = balloon();
    let mut ring = Ring::new(2);
    ring.add(
        &bed,
        &[(0x10_0000, 0x6_0000, true), (0x20_0800, 0x2000, true), (0x30_0001, 4096, true)],
    );
    ring.kick(&bed);
    assert_eq!(ring.used(&bed), Some((0, 0)));
    let expected = [(0x10_0000, 0x4_0000), (0x14_0000, 0x2_0000), (0x20_1000, 0x1000)];
    assert_eq!(*freed.0.lock().unwrap(), expected);
}

#[test]
fn the_host_asks_and_the_guest_tells() {
    let (bed, balloon, _freed) = balloon();
    let generation = bed.get(0xfc);
    balloon.set_target(1000);
    balloon.set_target(1000);
    assert_eq!((bed.get(0x100), bed.get(0x104)), (1000, 0));
    assert_eq!((bed.get(0xfc), bed.get(0x60)), (generation + 1, 2));
    bed.set(0x104, 600);
    // The driver can write neither the target nor half of a field.
    bed.set(0x100, 1);
    bed.mmio.write(0x104, &[9, 9]);
    assert_eq!(balloon.pages(), (1000, 600));
    let saved = bed.mmio.save();
    bed.set(0x104, 700);
    balloon.set_target(0);
    bed.mmio.put_back(&saved).unwrap();
    assert_eq!((balloon.pages(), bed.mmio.save()), ((1000, 600), saved));
    bed.set(0x70, 0);
    assert_eq!(balloon.pages(), (1000, 0), "a reset gives the pages back");
}

#[test]
fn a_balloon_with_a_thread_is_still_when_it_must_be() {
    let freed = Arc::<Freed>::default();
    let bed = Bed::new(Arc::new(Balloon::new(Arc::clone(&freed) as _).unwrap()));
    bed.set_up(1 << 5);
    let mut ring = Ring::new(2);
    let still = bed.mmio.drain(PATIENCE).unwrap();
    ring.add(&bed, &[(0x10_0000, 0x1000, true)]);
    ring.kick(&bed);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((ring.used(&bed), bed.mmio.save().queues[2].next_avail), (None, 0));
    drop(still);
    ring.wait_used(&bed);
    assert_eq!(*freed.0.lock().unwrap(), [(0x10_0000, 0x1000)]);
}

/// Frees a piece each time it is allowed to.
#[derive(Debug)]
struct Slow {
    begun: AtomicUsize,
    lets: Mutex<Receiver<()>>,
}

impl FreePages for Slow {
    fn free(&self, _address: GuestAddress, _len_bytes: u64) -> std::io::Result<()> {
        self.begun.fetch_add(1, Ordering::SeqCst);
        // Fails if nobody is left to allow it.
        let _over = self.lets.lock().unwrap().recv();
        Ok(())
    }
}

#[test]
fn a_vcpu_does_not_wait_until_all_pages_are_freed() {
    const PIECES: usize = 12;
    let (let_one, lets) = channel();
    let slow = Arc::new(Slow { begun: AtomicUsize::new(0), lets: Mutex::new(lets) });
    let bed = Bed::new(Arc::new(Balloon::new(Arc::clone(&slow) as _).unwrap()));
    bed.set_up(1 << 5);
    let mut ring = Ring::new(2);
    ring.add(&bed, &[(DATA, PIECES as u32 * (256 << 10), true)]);
    ring.kick(&bed);
    let begun = || slow.begun.load(Ordering::SeqCst);
    let until = Instant::now() + PATIENCE;
    while begun() == 0 {
        assert!(Instant::now() < until, "nothing is freed");
        std::thread::sleep(Duration::from_millis(1));
    }
    let busy = bed.mmio.drain(Duration::ZERO).unwrap_err().to_string();
    assert!(busy.contains("virtio0: it is still busy"), "{busy}");
    std::thread::scope(|scope| {
        let reset = scope.spawn(|| bed.set(0x70, 0));
        // Each piece takes long.
        while !reset.is_finished() && begun() < PIECES {
            std::thread::sleep(Duration::from_millis(100));
            let_one.send(()).unwrap();
        }
        drop(let_one);
    });
    assert!(begun() < PIECES, "all of them were freed first");
}
