//! Tests of the network card, with a socket that keeps packet boundaries as its tap.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::{Mutex, PoisonError};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::*;
use crate::virtio::net::{MacAddress, Net, NetStats, Tap};

const RX: u16 = 0;
const TX: u16 = 1;
const HEADER: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);

/// Returns a tap and the host's end of it.
fn tap() -> (Tap, File) {
    let (host, tap) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    (Tap::from_fd(tap).unwrap(), File::from(host))
}

/// Returns a card that is set up, and the host's end of its tap.
fn card() -> (Bed, Arc<Net>, File) {
    let (tap, host) = tap();
    let net = Arc::new(Net::new(MAC, tap).unwrap());
    let bed = Bed::new(Arc::clone(&net) as _);
    let mut address = [0; 6];
    bed.mmio.read(0x100, &mut address);
    assert_eq!(address, MAC.0);
    bed.set_up(1 << 5 | EVENT_IDX);
    (bed, net, host)
}

#[test]
fn frames_go_both_ways() {
    let (bed, net, mut host) = card();
    let (mut rx, mut tx) = (Ring::new(RX), Ring::new(TX));
    let frame = noise(1514, 1);
    bed.write(DATA, &[&[0; 12], &frame[..]].concat());
    tx.add(&bed, &[(DATA, 12, false), (DATA + 12, 1514, false)]);
    tx.kick(&bed);
    tx.wait_used(&bed);
    let mut found = vec![0; 2000];
    let len = host.read(&mut found).unwrap();
    assert_eq!(found[..len], frame);
    // Frames that arrive before there is room for them wait.
    for round in 0..5 {
        host.write_all(&noise(60 + round, round as u64)).unwrap();
    }
    for round in 0..5_u64 {
        let at = DATA + 0x1_0000 + round * 4096;
        rx.add(&bed, &[(at, 12, true), (at + 12, 1514, true)]);
        rx.kick(&bed);
    }
    for round in 0..5_usize {
        let (_, len) = rx.wait_used(&bed);
        assert_eq!(len as usize, 12 + 60 + round);
        let found = bed.read(DATA + 0x1_0000 + round as u64 * 4096, len as usize);
        assert_eq!(found, [&HEADER[..], &noise(60 + round, round as u64)].concat());
    }
    assert_eq!(net.stats(), NetStats { received: 5, sent: 1, dropped: 0 });
}

/// Records to which queues chains come back, in order.
#[derive(Debug)]
struct Order {
    ram: Arc<GuestRam>,
    /// The queues in order, and each one's used index.
    seen: Mutex<(Vec<u16>, [u16; 2])>,
}

impl Interrupt for Order {
    fn raise(&self) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        for queue in [RX, TX] {
            let index = GuestAddress(queue_address(queue)[2] + 2);
            let used: u16 = self.ram.memory().read_obj(index).unwrap();
            if std::mem::replace(&mut seen.1[usize::from(queue)], used) != used {
                seen.0.push(queue);
            }
        }
    }
}

#[test]
fn who_sends_without_end_is_sent_to_as_well() {
    let (tap, mut host) = tap();
    let ram = Arc::new(GuestRam::new(RAM_BYTES).unwrap());
    let order = Arc::new(Order { ram: Arc::clone(&ram), seen: Mutex::default() });
    let net = Arc::new(Net::in_place(MAC, tap).unwrap());
    let mmio = VirtioMmio::new("net0", net, Arc::clone(&ram), Arc::clone(&order) as _).unwrap();
    let bed = Bed { ram, interrupts: Arc::default(), mmio };
    // Without event indices, there is an interrupt for each chain.
    bed.set_up(1 << 5);
    let (mut rx, mut tx) = (Ring::new(RX), Ring::new(TX));
    host.write_all(&[7; 60]).unwrap();
    rx.add(&bed, &[(DATA, 100, true)]);
    for _ in 0..ENTRIES {
        tx.add(&bed, &[(DATA + 0x1000, 100, false)]);
    }
    tx.kick(&bed);
    let seen = order.seen.lock().unwrap();
    let place = seen.0.iter().position(|queue| *queue == RX).expect("it arrives");
    assert!(place < usize::from(ENTRIES) - 1, "behind {place} that were sent");
    assert_eq!(seen.0.len(), usize::from(ENTRIES) + 1);
}

#[test]
fn what_does_not_fit_is_dropped() {
    let (bed, net, mut host) = card();
    let (mut rx, mut tx) = (Ring::new(RX), Ring::new(TX));
    rx.add(&bed, &[(DATA, 100, true)]);
    rx.kick(&bed);
    host.write_all(&[1; 300]).unwrap();
    host.write_all(&[2; 88]).unwrap();
    assert_eq!(rx.wait_used(&bed).1, 100, "the one that fits");
    assert_eq!(bed.read(DATA + 12, 88), [2; 88]);
    // Only a header, and more than the longest frame.
    tx.add(&bed, &[(DATA, 12, false)]);
    tx.add(&bed, &[(DATA, 1 << 20, false)]);
    tx.kick(&bed);
    tx.wait_used(&bed);
    tx.wait_used(&bed);
    assert_eq!(net.stats(), NetStats { received: 1, sent: 0, dropped: 3 });
    assert_eq!(bed.status(), 15);
    tx.add(&bed, &[(DATA, 11, false)]);
    tx.kick(&bed);
    let until = Instant::now() + PATIENCE;
    while bed.status() & NEEDS_RESET == 0 {
        assert!(Instant::now() < until, "half a header stops it");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn nothing_is_received_while_the_card_is_still() {
    let (bed, net, mut host) = card();
    let mut rx = Ring::new(RX);
    rx.add(&bed, &[(DATA, 2000, true)]);
    rx.kick(&bed);
    let still = bed.mmio.drain(PATIENCE).unwrap();
    let saved = bed.mmio.save();
    host.write_all(&[7; 64]).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((rx.used(&bed), bed.mmio.save()), (None, saved.clone()));
    // As a rewind does.
    bed.mmio.put_back(&saved).unwrap();
    drop(still);
    bed.mmio.go_on();
    assert_eq!(rx.wait_used(&bed).1, 76);
    drop(host);
    let still = bed.mmio.drain(PATIENCE).unwrap();
    drop(still);
    assert_eq!(net.stats().received, 1);
}
