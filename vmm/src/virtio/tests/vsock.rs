//! Tests of the socket device, between a driver and Unix sockets.

mod guest;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::*;
use crate::error::VmmError;
use crate::virtio::vsock::{UnixSockets, Vsock};
use crate::virtio::{SavedDevice, SavedVirtio};
use guest::*;

#[test]
fn a_guest_connects_to_a_server_of_the_hosts() {
    let mut guest = Guest::new();
    let mut cid = [0; 8];
    guest.bed.mmio.read(0x100, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), u64::from(CID));
    let server = guest.serve(5000);
    guest.send(&packet(REQUEST, 1025, 5000));
    let response = guest.received_one();
    assert_eq!(response.kind(), (RESPONSE, 1025, 5000));
    assert_eq!((response.room, response.forwarded), (BUFFER, 0));
    let mut host = server.accept().unwrap().0;
    guest.send(&packet(RW, 1025, 5000).with(b"hello"));
    assert_eq!(read(&mut host, 5), b"hello");
    host.write_all(b"world").unwrap();
    let data = guest.received_one();
    assert_eq!((data.kind(), &data.data[..]), ((RW, 1025, 5000), &b"world"[..]));
    assert_eq!(data.forwarded, 5);
    assert_eq!(guest.vsock.connections(), 1);
    // A clean end.
    guest.send(&packet(SHUTDOWN, 1025, 5000).flags(3));
    assert_eq!(guest.received_one().kind(), (RST, 1025, 5000));
    assert!(is_over(&mut host));
    assert_eq!(guest.vsock.connections(), 0);
    // A port where nobody listens.
    guest.send(&packet(REQUEST, 1026, 5001));
    assert_eq!(guest.received_one().kind(), (RST, 1026, 5001));
}

#[test]
fn a_program_of_the_hosts_connects_to_the_guest() {
    let mut guest = Guest::new();
    let mut host = guest.call();
    host.write_all(b"CONN").unwrap();
    assert_eq!(guest.received(), []);
    host.write_all(b"ECT 52\nearly").unwrap();
    let request = guest.received_one();
    assert_eq!((request.op, request.guest_port, request.room), (REQUEST, 52, BUFFER));
    assert!(request.host_port >= 1 << 30);
    assert_eq!(guest.received(), [], "data waits for the answer");
    guest.send(&packet(RESPONSE, 52, request.host_port));
    let greeting = format!("OK {}\n", request.host_port);
    assert_eq!(read(&mut host, greeting.len()), greeting.as_bytes());
    let data = guest.received_one();
    assert_eq!((data.kind(), &data.data[..]), ((RW, 52, request.host_port), &b"early"[..]));
    assert_eq!(data.forwarded, 0, "the greeting is not the guest's");
    drop(host);
    let end = guest.received_one();
    assert_eq!((end.kind(), end.flags), ((SHUTDOWN, 52, request.host_port), 3));
    guest.send(&packet(RST, 52, request.host_port));
    assert_eq!((guest.received(), guest.vsock.connections()), (vec![], 0));
    // A caller that the guest refuses, and one that does not wait for an answer.
    let mut host = guest.call();
    host.write_all(b"CONNECT 53\n").unwrap();
    let next = guest.received_one();
    assert_ne!(next.host_port, request.host_port);
    guest.send(&packet(RST, 53, next.host_port));
    assert!(is_over(&mut host));
    let mut host = guest.call();
    host.write_all(b"CONNECT 54\n").unwrap();
    let request = guest.received_one();
    drop(host);
    assert_eq!(guest.received_one().kind(), (RST, 54, request.host_port));
    assert_eq!(guest.vsock.connections(), 0);
}

#[test]
fn callers_who_say_nothing_sensible_are_let_go() {
    let mut guest = Guest::new();
    for line in ["HELLO\n", "CONNECT x\n", "CONNECT 1 1\n", &"CONNECT ".repeat(10)] {
        let mut host = guest.call();
        host.write_all(line.as_bytes()).unwrap();
        assert_eq!(guest.received(), []);
        assert!(is_over(&mut host), "{line}");
    }
    let mut silent: Vec<UnixStream> = (0..40).map(|_| guest.call()).collect();
    guest.look();
    let gone = silent.iter_mut().map(is_over).filter(|gone| *gone).count();
    assert_eq!(gone, 8, "the oldest");
    assert!(is_over(&mut silent[0]) && !is_over(&mut silent[39]));
    silent[39].write_all(b"CONNECT 9\n").unwrap();
    assert_eq!(guest.received_one().guest_port, 9);
}

#[test]
fn each_side_of_a_connection_ends_by_itself() {
    let mut guest = Guest::new();
    let mut host = guest.connected(7, 70);
    host.write_all(b"last words").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    let packets = guest.received();
    assert_eq!((packets[0].op, &packets[0].data[..]), (RW, &b"last words"[..]));
    assert_eq!((packets[1].op, packets[1].flags), (SHUTDOWN, 2), "it sends no more");
    guest.send(&packet(RW, 7, 70).with(b"still here"));
    assert_eq!(read(&mut host, 10), b"still here");
    guest.send(&packet(SHUTDOWN, 7, 70).flags(2));
    assert!(is_over(&mut host));
    // Neither end sends any more, so nothing is left of the connection.
    let end = guest.received_one();
    assert_eq!((end.op, end.flags), (SHUTDOWN, 3));
    guest.send(&packet(RST, 7, 70));
    assert_eq!(guest.vsock.connections(), 0);
    // A guest that takes no more is sent no more; one that sends after saying it would not is cut
    // off.
    let mut host = guest.connected(8, 80);
    guest.send(&packet(SHUTDOWN, 8, 80).flags(1));
    assert!(host.write_all(b"to nobody").is_err());
    assert_eq!(guest.received(), []);
    guest.send(&packet(RW, 8, 80).with(b"x"));
    assert_eq!(read(&mut host, 1), b"x");
    guest.send(&packet(SHUTDOWN, 8, 80).flags(2));
    assert_eq!(guest.received_one().kind(), (RST, 8, 80));
    guest.send(&packet(RW, 8, 80).with(b"x"));
    assert_eq!(guest.received_one().kind(), (RST, 8, 80));
}

#[test]
fn a_guest_is_sent_no_more_than_it_has_room_for() {
    let mut guest = Guest::new();
    let server = guest.serve(70);
    guest.send(&packet(REQUEST, 7, 70).credit(10, 0));
    guest.received_one();
    let mut host = server.accept().unwrap().0;
    let text = noise(10_000, 3);
    host.write_all(&text).unwrap();
    let packets = guest.received();
    assert_eq!((packets[0].op, &packets[0].data[..]), (RW, &text[..10]));
    assert_eq!((packets[1].op, packets.len()), (CREDIT_REQUEST, 2));
    assert_eq!(guest.received(), [], "it asks once");
    guest.send(&packet(CREDIT_UPDATE, 7, 70).credit(10, 4));
    assert_eq!(guest.received()[0].data, text[10..14]);
    // Less room than is in use, and more passed on than was sent.
    guest.send(&packet(CREDIT_UPDATE, 7, 70).credit(3, 10));
    guest.send(&packet(CREDIT_UPDATE, 7, 70).credit(3, 1 << 31));
    assert_eq!(guest.received(), []);
    guest.send(&packet(CREDIT_UPDATE, 7, 70).credit(u32::MAX, 14));
    let data: Vec<u8> = guest.received().into_iter().flat_map(|packet| packet.data).collect();
    assert_eq!(data, text[14..], "in packets that fit its buffers");
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_is_cut() {
    let mut guest = Guest::new();
    let mut host = guest.connected(7, 70);
    let piece = noise(BUFFER as usize / 2, 4);
    // Until the socket takes no more, and the buffer is full.
    let mut sent = 0;
    let end = loop {
        guest.send(&packet(RW, 7, 70).with(&piece));
        sent += piece.len();
        assert!(sent < 16 << 20, "there is no end of it");
        if let Some(end) = guest.received().into_iter().find(|packet| packet.op == RST) {
            break end;
        }
    };
    assert_eq!((end.kind(), guest.vsock.connections()), ((RST, 7, 70), 0));
    let mut found = Vec::new();
    let ended = host.read_to_end(&mut found);
    assert!(ended.is_ok() && found.len() < sent, "{ended:?}");
    assert!(found.chunks(piece.len()).all(|chunk| *chunk == piece[..chunk.len()]));
    // Too much at once, without having sent anything before.
    let _host = guest.connected(8, 80);
    guest.send(&packet(RW, 8, 80).with(&vec![1; BUFFER as usize + 1]));
    assert_eq!(guest.received_one().kind(), (RST, 8, 80));
}

#[test]
fn a_guest_that_keeps_to_its_credit_loses_nothing() {
    let mut guest = Guest::new();
    let mut host = guest.connected(7, 70);
    host.set_nonblocking(true).unwrap();
    let text = noise(3 << 20, 5);
    let (mut sent, mut forwarded, mut found) = (0, 0, Vec::<u8>::new());
    let mut piece = vec![0; 100_000];
    while found.len() < text.len() {
        let room = (BUFFER as usize - (sent - forwarded)).min(text.len() - sent);
        if room > 0 {
            let len = room.min(5000);
            guest.send(&packet(RW, 7, 70).with(&text[sent..sent + len]));
            sent += len;
        } else {
            guest.send(&packet(CREDIT_REQUEST, 7, 70));
            // The host is slow: it reads only when the guest waits for it.
            let len = host.read(&mut piece).unwrap();
            found.extend(&piece[..len]);
        }
        for packet in guest.received() {
            assert_eq!(packet.op, CREDIT_UPDATE);
            forwarded = packet.forwarded as usize;
        }
        assert!(forwarded <= sent && found.len() <= sent);
    }
    assert!(found == text);
    assert!(sent - forwarded < BUFFER as usize / 2, "it is told without asking");
}

#[test]
fn refusals_wait_until_there_is_room_and_no_more_is_taken_meanwhile() {
    let mut guest = Guest::without_buffers(Vsock::in_place);
    let mut taken = 0;
    loop {
        let lost = packet(RW, 1, 2);
        guest.send_raw(&lost.header(CID.into(), 2), &[]);
        if guest.tx.used(&guest.bed).is_none() {
            break;
        }
        taken += 1;
        assert!(taken < 10_000, "there is no end of it");
    }
    assert_eq!(taken, 256);
    for _ in 0..ENTRIES {
        guest.offer(RX_BYTES);
    }
    let mut refused = 0;
    while let Some(more) = Some(guest.received().len()).filter(|more| *more > 0) {
        refused += more;
    }
    assert!(guest.tx.used(&guest.bed).is_some(), "it goes on by itself");
    assert_eq!(refused, 257);
    // Resets are never answered.
    for _ in 0..1000 {
        guest.send(&packet(RST, 1, 2));
    }
    assert_eq!(guest.received(), []);
}

#[test]
fn there_are_only_so_many_connections() {
    let mut guest = Guest::new();
    let server = guest.serve(70);
    let mut hosts = Vec::new();
    for guest_port in 0..256 {
        guest.send(&packet(REQUEST, guest_port, 70));
        assert_eq!(guest.received_one().op, RESPONSE);
        hosts.push(server.accept().unwrap().0);
    }
    guest.send(&packet(REQUEST, 1000, 70));
    assert_eq!(guest.received_one().kind(), (RST, 1000, 70));
    let mut caller = guest.call();
    caller.write_all(b"CONNECT 5\n").unwrap();
    assert_eq!(guest.received(), []);
    assert!(is_over(&mut caller));
    guest.send(&packet(RST, 0, 70));
    assert!(is_over(&mut hosts[0]));
    guest.send(&packet(REQUEST, 1000, 70));
    assert_eq!(guest.received_one().kind(), (RESPONSE, 1000, 70));
    assert_eq!(guest.vsock.connections(), 256);
    // A driver that starts again ends all at once.
    guest.bed.set(0x70, 0);
    assert_eq!(guest.vsock.connections(), 0);
    assert!(hosts[1..].iter_mut().all(is_over));
}

#[test]
fn packets_that_fit_nothing_are_refused_or_dropped() {
    let mut guest = Guest::new();
    // Packets for others, or from others.
    for (from, to) in [(CID.into(), 3), (CID.into(), u64::MAX), (4, 2), (0, 2)] {
        guest.send_raw(&packet(REQUEST, 1, 70).header(from, to), &[]);
        assert!(guest.tx.used(&guest.bed).is_some());
    }
    assert_eq!(guest.received(), []);
    for op in [0, RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 8, u16::MAX] {
        guest.send(&packet(op, 1, 70).with(b"?"));
        assert_eq!(guest.received_one().kind(), (RST, 1, 70), "{op}");
    }
    // An invalid packet ends its connection.
    for op in [0, REQUEST, RESPONSE, 8] {
        let mut host = guest.connected(1, 70);
        guest.send(&packet(op, 1, 70));
        assert_eq!(guest.received_one().kind(), (RST, 1, 70), "{op}");
        assert!(is_over(&mut host), "{op}");
        std::fs::remove_file(guest.folder.path().join("v_70")).unwrap();
    }
    for op in [RW, SHUTDOWN, REQUEST] {
        let mut host = guest.call();
        host.write_all(b"CONNECT 5\n").unwrap();
        let port = guest.received_one().host_port;
        guest.send(&packet(op, 5, port).flags(3));
        assert_eq!(guest.received_one().kind(), (RST, 5, port), "{op} instead of an answer");
        assert!(is_over(&mut host));
    }
    // Sequenced packets are not offered: the answer is of that type, too.
    let mut header = packet(REQUEST, 1, 70).header(CID.into(), 2);
    header[28] = 2;
    guest.send_raw(&header, &[]);
    guest.look();
    let (slot, _) = guest.rx.used(&guest.bed).unwrap();
    let answer = guest.bed.read(RX + u64::from(slot) * 0x2000, 44);
    assert_eq!((answer[28], answer[30]), (2, RST as u8));
    assert_eq!((guest.bed.status(), guest.vsock.connections()), (15, 0));
}

#[test]
fn nonsense_stops_the_device() {
    let breaks = |what: &str, break_it: &dyn Fn(&mut Guest)| {
        let mut guest = Guest::without_buffers(Vsock::in_place);
        break_it(&mut guest);
        assert_eq!(guest.bed.status(), 15 | NEEDS_RESET, "{what}");
    };
    let header = |len: u32| {
        let mut header = packet(RW, 1, 2).header(CID.into(), 2);
        header[24..28].copy_from_slice(&len.to_le_bytes());
        header
    };
    breaks("half a header", &|guest| guest.send_raw(&header(0)[..43], &[]));
    breaks("a packet without its data", &|guest| guest.send_raw(&header(5), b"four"));
    breaks("a packet of everything", &|guest| guest.send_raw(&header(u32::MAX), b"four"));
    breaks("no room for a packet", &|guest| {
        guest.offer(44);
        guest.send(&packet(RW, 1, 2));
        guest.look();
    });
    breaks("no room for an event", &|guest| {
        let saved = guest.bed.mmio.save();
        guest.bed.write(queue_address(2)[0] + 8, &3_u32.to_le_bytes());
        guest.bed.mmio.put_back(&saved).unwrap();
        guest.look();
    });
}

#[test]
fn connections_end_where_a_snapshot_is_restored() {
    let mut guest = Guest::new();
    let mut host = guest.connected(7, 70);
    let mut caller = guest.call();
    caller.write_all(b"CONNECT 5\n").unwrap();
    let port = guest.received_one().host_port;
    let still = guest.bed.mmio.drain(PATIENCE).unwrap();
    let saved = guest.bed.mmio.save();
    drop(still);
    assert_eq!(saved.device, SavedDevice::Vsock { guest_cid: CID });
    // A machine that goes on keeps its connections.
    host.write_all(b"x").unwrap();
    assert_eq!(guest.received_one().data, b"x");
    assert_eq!(guest.events.used(&guest.bed), None);
    let saved = SavedVirtio { queues: guest.bed.mmio.save().queues, ..saved };
    guest.bed.mmio.put_back(&saved).unwrap();
    assert_eq!((guest.vsock.connections(), guest.bed.mmio.save()), (0, saved.clone()));
    assert!(is_over(&mut host) && is_over(&mut caller));
    assert_eq!(guest.events.used(&guest.bed), None, "nothing happens before it goes on");
    guest.bed.mmio.go_on();
    assert_eq!(guest.events.used(&guest.bed), Some((0, 4)));
    assert_eq!(guest.bed.read(EVENT, 4), [0; 4], "its connections are gone");
    guest.bed.mmio.go_on();
    assert_eq!(guest.events.used(&guest.bed), None, "it is told once");
    for (guest_port, host_port) in [(7, 70), (5, port)] {
        guest.send(&packet(RW, guest_port, host_port).with(b"?"));
        assert_eq!(guest.received_one().kind(), (RST, guest_port, host_port));
    }
    // If the driver has no room for the event, the event waits.
    guest.bed.mmio.put_back(&guest.bed.mmio.save()).unwrap();
    guest.bed.mmio.go_on();
    guest.offer_event();
    assert!(guest.events.used(&guest.bed).is_some());
}

#[test]
fn nothing_new_begins_before_the_driver_knows_that_all_is_gone() {
    let mut guest = Guest::new();
    // One more buffer than needed: others wait when the event's comes back.
    guest.offer_event();
    let mut lost = guest.connected(7, 70);
    guest.bed.mmio.put_back(&guest.bed.mmio.save()).unwrap();
    assert!(is_over(&mut lost));
    let mut caller = guest.call();
    caller.write_all(b"CONNECT 5\nhello").unwrap();
    let server = guest.serve(80);
    guest.bed.mmio.go_on();
    assert!(guest.events.used(&guest.bed).is_some(), "it is told");
    guest.send(&packet(REQUEST, 8, 80));
    let mut host = server.accept().unwrap().0;
    assert_eq!(guest.received(), [], "it would drop them with the rest");
    // The driver may be told what is over: there is nothing to drop.
    guest.send(&packet(RW, 7, 70).with(b"?"));
    assert_eq!(guest.received_one().kind(), (RST, 7, 70));
    let asked_for = queue_address(2)[2] + 4 + 8 * u64::from(ENTRIES);
    assert_eq!(guest.bed.read_u16(asked_for), guest.events.next_avail, "it says so of the next");
    guest.offer_event();
    let begun = guest.received();
    let [request, response] = &begun[..] else { panic!("{begun:?}") };
    assert_eq!((request.op, request.guest_port), (REQUEST, 5));
    assert_eq!(response.kind(), (RESPONSE, 8, 80));
    guest.send(&packet(RESPONSE, 5, request.host_port));
    assert_eq!(guest.received_one().data, b"hello");
    guest.send(&packet(RW, 8, 80).with(b"there"));
    assert_eq!(read(&mut host, 5), b"there");
}

#[test]
fn a_driver_that_hears_nothing_is_not_waited_for_for_ever() {
    let mut guest = Guest::new();
    guest.vsock.set_patience(Duration::ZERO);
    guest.bed.mmio.put_back(&guest.bed.mmio.save()).unwrap();
    let mut caller = guest.call();
    caller.write_all(b"CONNECT 5\n").unwrap();
    assert_eq!(guest.received_one().kind().0, REQUEST);
    let mut host = guest.connected(7, 70);
    // What has begun is not held up again if the guest is stopped and goes on.
    guest.vsock.set_patience(PATIENCE);
    host.write_all(b"on").unwrap();
    assert_eq!(guest.received_one().data, b"on");
    guest.vsock.set_patience(Duration::ZERO);
    assert_eq!(guest.vsock.connections(), 2);
    // The driver learned the news after all, and has dropped its connections.
    assert!(guest.events.used(&guest.bed).is_some());
    guest.offer_event();
    assert!(guest.received().iter().all(|packet| packet.op == RST));
    assert_eq!(guest.vsock.connections(), 0);
    assert!(is_over(&mut host) && is_over(&mut caller));
    drop(guest.connected(8, 80));
    // The same if it gets the event only then.
    guest.bed.mmio.put_back(&guest.bed.mmio.save()).unwrap();
    guest.look();
    assert!(guest.events.used(&guest.bed).is_some());
    guest.bed.mmio.put_back(&guest.bed.mmio.save()).unwrap();
    let mut host = guest.connected(9, 90);
    guest.offer_event();
    assert!(guest.events.used(&guest.bed).is_some());
    assert_eq!((guest.vsock.connections(), is_over(&mut host)), (0, true));
}

#[test]
fn a_device_with_a_thread_notices_by_itself_that_it_waited_long_enough() {
    let mut guest = Guest::without_buffers(Vsock::new);
    guest.vsock.set_patience(Duration::from_millis(1));
    let still = guest.bed.mmio.drain(PATIENCE).unwrap();
    guest.bed.mmio.put_back(&guest.bed.mmio.save()).unwrap();
    let mut caller = guest.call();
    caller.write_all(b"CONNECT 5\n").unwrap();
    guest.offer(RX_BYTES);
    drop(still);
    guest.bed.mmio.go_on();
    let (slot, len) = guest.rx.wait_used(&guest.bed);
    let bytes = guest.bed.read(RX + u64::from(slot) * 0x2000, len as usize);
    assert_eq!(Packet::parse(CID, &bytes).op, REQUEST);
}

#[test]
fn a_clone_may_have_another_context_id() {
    let guest = Guest::new();
    let saved = guest.bed.mmio.save();
    let folder = tempfile::tempdir().unwrap();
    let sockets = Arc::new(UnixSockets::listen(&folder.path().join("v")).unwrap());
    let clone = Arc::new(Vsock::in_place(99, Arc::clone(&sockets) as _).unwrap());
    let Guest { bed, vsock: _, rx, tx, events, folder: _original } = guest;
    let (ram, interrupts) = (bed.ram, bed.interrupts);
    let (own_ram, own_interrupts) = (Arc::clone(&ram), Arc::clone(&interrupts) as _);
    let mmio =
        VirtioMmio::restore("virtio0", Arc::clone(&clone) as _, own_ram, own_interrupts, &saved);
    let bed = Bed { ram, interrupts, mmio: mmio.unwrap() };
    let mut guest = Guest { bed, vsock: clone, rx, tx, events, folder };
    guest.bed.mmio.go_on();
    assert!(guest.events.used(&guest.bed).is_some());
    guest.offer_event();
    assert_eq!(guest.bed.get(0x100), 99);
    let _server = guest.serve(70);
    guest.send(&packet(REQUEST, 1, 70));
    assert_eq!(guest.received(), [], "it has not looked yet");
    guest.send_raw(&packet(REQUEST, 1, 70).header(99, 2), &[]);
    assert_eq!(guest.received_one().kind(), (RESPONSE, 1, 70));
    assert_eq!(guest.bed.mmio.save().device, SavedDevice::Vsock { guest_cid: 99 });
    for cid in [0, 1, 2, u32::MAX] {
        let refused = Vsock::new(cid, Arc::clone(&sockets) as _);
        assert!(matches!(refused, Err(VmmError::Config(_))), "{cid}");
    }
}

#[test]
fn a_device_with_a_thread_moves_packets_unless_it_must_be_still() {
    let mut guest = Guest::without_buffers(Vsock::new);
    let still = guest.bed.mmio.drain(PATIENCE).unwrap();
    let saved = guest.bed.mmio.save();
    let mut host = guest.call();
    host.write_all(b"CONNECT 5\nhello").unwrap();
    guest.offer(RX_BYTES);
    guest.offer(RX_BYTES);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((guest.rx.used(&guest.bed), guest.bed.mmio.save()), (None, saved));
    drop(still);
    let next = |guest: &mut Guest| {
        let (slot, len) = guest.rx.wait_used(&guest.bed);
        let bytes = guest.bed.read(RX + u64::from(slot) * 0x2000, len as usize);
        Packet::parse(CID, &bytes)
    };
    let request = next(&mut guest);
    assert_eq!(request.op, REQUEST);
    let answer = packet(RESPONSE, 5, request.host_port);
    guest.send_raw(&answer.header(CID.into(), 2), &[]);
    assert_eq!(next(&mut guest).data, b"hello");
    let greeting = format!("OK {}\n", request.host_port);
    assert_eq!(read(&mut host, greeting.len()), greeting.as_bytes());
    guest.tx.wait_used(&guest.bed);
    // Bytes from the host wake the thread as well.
    guest.offer(RX_BYTES);
    host.write_all(b"again").unwrap();
    assert_eq!(next(&mut guest).data, b"again");
}
