//! Against back ends that are wrong on purpose, and against our own.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::{Strategy, any, prop_assert, prop_assert_eq, proptest};
use rustix::fs::{SealFlags, fcntl_get_seals};

use super::*;
use crate::backend::{
    self, Channel, ConfigSpace, EventLoop, Extensions, Flow, Hooks, Profile, Session, Taken, Token, Vring,
};
use crate::error::{Error, RingError};
use crate::memory::Snapshot;
use crate::protocol::{
    Empty, Flags, FrontendMessage, Header, ProtocolFeatures, Region, U64, VirtioFeatures, VringAddress, VringState,
};
use crate::transport::{Connection, Frame};
use crate::virtqueue::{Chain, Little, Ring, RingAddresses, RingLimits, RingOptions, SplitRing, Used};

const FEATURES: u64 = VirtioFeatures::VERSION_1.0
    | VirtioFeatures::INDIRECT_DESC.0
    | VirtioFeatures::EVENT_IDX.0
    | VirtioFeatures::PROTOCOL_FEATURES.0;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

// A back-end that follows a script.

/// The other end of a connection, in a test's hands.
struct Peer {
    connection: Connection,
    socket: UnixStream,
}

impl Peer {
    fn receive(&mut self, request: u32) -> Frame {
        let frame = self.connection.receive(soon()).unwrap();
        assert_eq!(frame.header.request, request);
        frame
    }

    fn send(&self, request: u32, flags: u32, payload: &[u8], descriptors: &[std::os::fd::BorrowedFd<'_>]) {
        self.connection.send(request, Flags(flags), payload, descriptors, soon()).unwrap();
    }

    fn reply(&mut self, request: u32, payload: &[u8]) {
        self.receive(request);
        self.send(request, 0x5, payload, &[]);
    }

    /// The start of every session, with these protocol features.
    fn shake_hands(&mut self, protocol: ProtocolFeatures) {
        self.receive(3);
        self.reply(1, &FEATURES.to_ne_bytes());
        self.reply(15, &protocol.0.to_ne_bytes());
        self.receive(16);
    }
}

/// A front-end, and a thread that plays the back-end.
fn with_script<T: Send + 'static>(
    timeout: Duration,
    script: impl FnOnce(Peer) -> T + Send + 'static,
) -> (Arc<Frontend>, JoinHandle<T>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let frontend = Arc::new(Frontend::new(ours.into(), timeout).unwrap());
    let socket = theirs.try_clone().unwrap();
    let peer = Peer { connection: Connection::new(theirs.into()).unwrap(), socket };
    (frontend, thread::spawn(move || script(peer)))
}

/// What the front-end makes of an answer to GET_FEATURES.
fn answered(script: impl FnOnce(Peer) -> Option<Peer> + Send + 'static) -> Error {
    let (frontend, peer) = with_script(Duration::from_millis(200), script);
    let error = frontend.get_features().unwrap_err();
    let after = frontend.get_features().unwrap_err().to_string();
    assert_eq!(after, format!("GET_FEATURES: the session is over ({error})"));
    peer.join().unwrap();
    error
}

#[test]
fn a_back_end_that_hangs_costs_a_deadline() {
    let error = answered(|mut peer| {
        peer.receive(1);
        Some(peer)
    });
    assert!(matches!(error, Error::Timeout(_)), "{error}");
    assert_eq!(error.to_string(), "GET_FEATURES: the back-end did not answer in time");
}

#[test]
fn an_answer_with_other_flags_ends_the_session() {
    for flags in [0x1, 0x4, 0x6, 0x15] {
        let error = answered(move |mut peer| {
            peer.receive(1);
            peer.send(1, flags, &[0; 8], &[]);
            Some(peer)
        });
        assert!(error.to_string().starts_with("GET_FEATURES: reply: expected a reply to request 1"), "{error}");
    }
}

#[test]
fn the_flags_that_libvhost_user_answers_with_are_taken() {
    let (frontend, peer) = with_script(Duration::from_secs(5), |mut peer| {
        peer.receive(1);
        peer.send(1, 0xd, &7u64.to_ne_bytes(), &[]);
    });
    assert_eq!(frontend.get_features().unwrap(), 7);
    peer.join().unwrap();
}

#[test]
fn the_end_of_postcopy_asks_for_its_answer() {
    let (frontend, peer) = with_script(Duration::from_secs(5), |mut peer| {
        peer.shake_hands(ProtocolFeatures::PAGEFAULT | ProtocolFeatures::REPLY_ACK);
        let frame = peer.receive(30);
        peer.send(30, 0x5, &[0; 8], &[]);
        frame.header.flags
    });
    frontend.handshake(Frontend::SUPPORTED).unwrap();
    frontend.end_postcopy().unwrap();
    assert_eq!(peer.join().unwrap(), Flags(0x9));
}

#[test]
fn an_answer_to_another_request_ends_the_session() {
    let error = answered(|mut peer| {
        peer.receive(1);
        peer.send(15, 0x5, &[0; 8], &[]);
        Some(peer)
    });
    assert!(error.to_string().contains("got request 15"), "{error}");
}

#[test]
fn an_answer_of_another_size_ends_the_session() {
    for size in [0, 4, 9] {
        let error = answered(move |mut peer| {
            peer.reply(1, &vec![0; size]);
            Some(peer)
        });
        let expected = format!("GET_FEATURES: the reply makes no sense: expected 8 bytes of payload, got {size}");
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn an_answer_that_is_cut_ends_the_session() {
    for (bytes, told) in [(7, "7 of the 12 bytes of a header"), (15, "3 of the 8 payload bytes")] {
        let error = answered(move |mut peer| {
            peer.receive(1);
            let mut message = Vec::new();
            Header { request: 1, flags: Flags::ANSWER, size: 8 }.encode(&mut message);
            message.extend_from_slice(&[0; 8]);
            rustix::io::write(&peer.socket, &message[..bytes]).unwrap();
            None
        });
        assert!(error.to_string().starts_with("GET_FEATURES: ") && error.to_string().contains(told), "{error}");
    }
}

#[test]
fn a_back_end_that_closes_instead_of_answering_is_told_apart() {
    let error = answered(|mut peer| {
        peer.receive(1);
        None
    });
    assert_eq!(error.to_string(), "GET_FEATURES: the back-end closed the connection");
}

#[test]
fn descriptors_where_none_belong_are_closed_and_end_the_session() {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let error = answered(move |mut peer| {
        peer.receive(1);
        peer.send(1, 0x5, &[0; 8], &[writer.as_fd(), writer.as_fd()]);
        Some(peer)
    });
    assert_eq!(error.to_string(), "GET_FEATURES: the reply has 2 descriptors, expected none");
    assert_eq!(rustix::io::read(&reader, &mut [0; 1]), Ok(0), "one of them is still open");
}

#[test]
fn a_payload_without_end_is_not_waited_for() {
    let error = answered(|mut peer| {
        peer.receive(1);
        let mut message = Vec::new();
        Header { request: 1, flags: Flags::ANSWER, size: u32::MAX }.encode(&mut message);
        rustix::io::write(&peer.socket, &message).unwrap();
        Some(peer)
    });
    assert!(matches!(error, Error::Framing(_)), "{error}");
}

#[test]
fn a_refusal_names_the_message_and_the_session_goes_on() {
    let (frontend, peer) = with_script(Duration::from_secs(5), |mut peer| {
        peer.shake_hands(ProtocolFeatures::REPLY_ACK);
        let frame = peer.receive(2);
        assert_eq!(frame.header.flags, Flags::REQUEST_NEED_REPLY);
        peer.send(2, 0x5, &22u64.to_ne_bytes(), &[]);
        peer.reply(1, &FEATURES.to_ne_bytes());
    });
    let offer = frontend.handshake(Frontend::SUPPORTED).unwrap();
    assert_eq!((offer.features, offer.protocol), (FEATURES, ProtocolFeatures::REPLY_ACK));
    let error = frontend.set_features(FEATURES).unwrap_err();
    assert_eq!(error.to_string(), "SET_FEATURES: the back-end refused it with 0x16");
    assert_eq!(frontend.features(), VirtioFeatures::default());
    assert_eq!(frontend.get_features().unwrap(), FEATURES);
    peer.join().unwrap();
}

#[test]
fn nothing_is_acknowledged_unless_that_was_negotiated() {
    let (frontend, peer) = with_script(Duration::from_secs(5), |mut peer| {
        peer.shake_hands(ProtocolFeatures::default());
        assert_eq!(peer.receive(2).header.flags, Flags::REQUEST);
    });
    frontend.handshake(Frontend::SUPPORTED).unwrap();
    frontend.set_features(FEATURES).unwrap();
    peer.join().unwrap();
    let error = frontend.get_config(0, 4).unwrap_err();
    assert_eq!(error.to_string(), "GET_CONFIG needs the protocol feature CONFIG, which was not negotiated");
}

#[test]
fn a_configuration_of_another_size_or_place_is_refused() {
    let config = |offset: u32, bytes: &[u8]| {
        [&offset.to_ne_bytes()[..], &(bytes.len() as u32).to_ne_bytes(), &[0; 4], bytes].concat()
    };
    for (payload, told) in [
        (vec![], "GET_CONFIG: the back-end answered with an error"),
        (config(4, &[]), "GET_CONFIG: the back-end answered with no bytes"),
        (config(4, &[1, 2]), "GET_CONFIG: asked for 3 bytes at 4, got 2 at 4"),
        (config(0, &[1, 2, 3]), "GET_CONFIG: asked for 3 bytes at 4, got 3 at 0"),
        (vec![0; 5], "GET_CONFIG: expected at least 12 bytes of payload, got 5"),
    ] {
        let (frontend, peer) = with_script(Duration::from_secs(5), move |mut peer| {
            peer.shake_hands(ProtocolFeatures::CONFIG);
            peer.reply(24, &payload);
        });
        frontend.handshake(Frontend::SUPPORTED).unwrap();
        assert_eq!(frontend.get_config(4, 3).unwrap_err().to_string(), told);
        peer.join().unwrap();
    }
}

#[test]
fn a_device_that_clears_features_ok_refuses_the_features() {
    let (frontend, peer) = with_script(Duration::from_secs(5), |mut peer| {
        peer.shake_hands(ProtocolFeatures::STATUS);
        peer.receive(2);
        assert_eq!(peer.receive(39).payload, 0xbu64.to_ne_bytes());
        peer.reply(40, &3u64.to_ne_bytes());
    });
    frontend.handshake(Frontend::SUPPORTED).unwrap();
    assert!(frontend.set_features(FEATURES).unwrap_err().to_string().contains("its status is 0x3"));
    peer.join().unwrap();
}

/// The back-end's side of a channel, after a handshake that opens one.
fn channel(peer: &mut Peer, protocol: ProtocolFeatures) -> Connection {
    peer.shake_hands(protocol | ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::REPLY_ACK);
    let socket = peer.receive(21).descriptors.remove(0);
    peer.send(21, 0x5, &[0; 8], &[]);
    Connection::new(socket).unwrap()
}

#[test]
fn the_back_ends_requests_are_served_while_an_answer_is_awaited() {
    let (frontend, peer) = with_script(Duration::from_secs(5), |mut peer| {
        let mut channel = channel(&mut peer, ProtocolFeatures::CONFIG);
        peer.receive(1);
        for request in [2, 2] {
            channel.send(request, Flags::REQUEST_NEED_REPLY, &[], &[], soon()).unwrap();
            let ack = channel.receive(soon()).unwrap();
            assert_eq!((ack.header.request, ack.header.flags, ack.payload), (request, Flags::ANSWER, vec![0; 8]));
        }
        peer.send(1, 0x5, &[0; 8], &[]);
        (peer, channel)
    });
    frontend.handshake(Frontend::SUPPORTED).unwrap();
    frontend.get_features().unwrap();
    let _open = peer.join().unwrap();
    assert_eq!(frontend.next_event(soon()).unwrap(), Some(Event::ConfigChanged));
    assert_eq!(frontend.next_event(Instant::now()).unwrap(), None, "twice the same is once");
}

#[test]
fn requests_that_make_no_sense_are_refused_and_reported() {
    let (frontend, peer) = with_script(Duration::from_secs(5), |mut peer| {
        let mut channel = channel(&mut peer, ProtocolFeatures::default());
        let requests: [(u32, &[u8]); 5] = [(2, &[]), (2, &[1]), (99, &[]), (9, &[0; 40]), (4, &[0; 8])];
        for (request, payload) in requests {
            channel.send(request, Flags::REQUEST_NEED_REPLY, payload, &[], soon()).unwrap();
            let ack = channel.receive(soon()).unwrap();
            assert_eq!((ack.header.request, ack.payload), (request, 1u64.to_ne_bytes().to_vec()));
        }
        channel.send(2, Flags::ANSWER, &[], &[], soon()).unwrap();
        peer
    });
    frontend.handshake(Frontend::SUPPORTED).unwrap();
    let event = || frontend.next_event(soon()).unwrap().unwrap();
    let refused = |reason: &str| Event::Refused(reason.to_owned());
    assert_eq!(event(), refused("BACKEND_CONFIG_CHANGE_MSG: it was not negotiated"));
    assert_eq!(event(), refused("BACKEND_CONFIG_CHANGE_MSG: expected no payload, got 1 bytes"));
    assert_eq!(event(), refused("unknown request 99 of the back-end; the highest known is 10"));
    assert_eq!(event(), refused("BACKEND_SHMEM_MAP: expected 1 descriptors, got 0"));
    assert_eq!(event(), refused("BACKEND_VRING_CALL: it was not negotiated"));
    assert!(matches!(event(), Event::ChannelClosed(reason) if reason.contains("request 2 has the flags 0x5")));
    let peer = peer.join().unwrap();
    drop(peer);
    let error = frontend.next_event(soon()).unwrap_err();
    assert!(matches!(error, Error::Closed(_)), "{error}");
}

#[test]
fn a_flood_of_requests_costs_the_channel_and_no_answer() {
    let (frontend, peer) = with_script(Duration::from_secs(5), |mut peer| {
        let channel = channel(&mut peer, ProtocolFeatures::CONFIG);
        peer.receive(1);
        for number in 0u32.. {
            // Alternately, so that each one counts.
            let request = if number % 2 == 0 { 2 } else { 99 };
            if channel.send(request, Flags::REQUEST, &[], &[], soon()).is_err() {
                break;
            }
        }
        peer.send(1, 0x5, &[0; 8], &[]);
        peer
    });
    frontend.handshake(Frontend::SUPPORTED).unwrap();
    frontend.get_features().unwrap();
    let _open = peer.join().unwrap();
    let events = std::iter::from_fn(|| frontend.next_event(Instant::now()).unwrap());
    assert!(matches!(events.last().unwrap(), Event::ChannelClosed(reason) if reason.contains("more than 1024")));
}

#[test]
fn memory_goes_over_by_slots_or_as_a_table() {
    let layout = [(0x10_0000, 0x2000), (0x10_2000, 0x1000), (0x80_0000, 0x1000)];
    let memory = Arc::new(Memory::with_layout(&layout).unwrap());
    let regions: Vec<Region> = memory.regions().map(|(region, _)| region).collect();
    let (frontend, peer) = with_script(Duration::from_secs(5), |mut peer| {
        peer.shake_hands(ProtocolFeatures::default());
        peer.receive(5)
    });
    frontend.handshake(Frontend::SUPPORTED).unwrap();
    frontend.share(std::slice::from_ref(&memory)).unwrap();
    let frame = peer.join().unwrap();
    let message = FrontendMessage::decode(crate::protocol::FrontendRequest::SetMemTable, &frame.payload, 3).unwrap();
    assert!(matches!(message, FrontendMessage::SetMemTable(table) if table.regions == regions));
    let seals = fcntl_get_seals(&frame.descriptors[0]).unwrap();
    assert!(seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL));
    drop(frontend);

    let (frontend, peer) = with_script(Duration::from_secs(5), |mut peer| {
        peer.shake_hands(ProtocolFeatures::CONFIGURE_MEM_SLOTS);
        let mut requests = Vec::new();
        while let Ok(frame) = peer.connection.receive(soon()) {
            requests.push((frame.header.request, frame.descriptors.len()));
            if frame.header.request == 36 {
                peer.send(36, 0x5, &3u64.to_ne_bytes(), &[]);
            }
        }
        requests
    });
    frontend.handshake(Frontend::SUPPORTED).unwrap();
    let share = |memories: &[&Arc<Memory>]| {
        let memories: Vec<_> = memories.iter().map(|memory| Arc::clone(memory)).collect();
        frontend.share(&memories)
    };
    let one = Arc::new(Memory::with_layout(&[(0x90_0000, 0x1000)]).unwrap());
    share(&[&memory]).unwrap();
    assert!(share(&[&memory, &one]).unwrap_err().to_string().contains("4 regions to share; the back-end takes 3"));
    share(&[&one]).unwrap();
    share(&[&one, &one]).unwrap();
    assert_eq!(Arc::strong_count(&memory), 1, "the front-end holds what it does not share");
    let (slots, add, remove) = ((36, 0), (37, 1), (38, 0));
    drop(frontend);
    let expected = [slots, add, add, add, slots, slots, remove, remove, remove, add, slots];
    assert_eq!(peer.join().unwrap(), expected);
}

// A device that follows a script: what it does to its ring.

/// The eventfds that came with a queue.
struct Notifications {
    kick: OwnedFd,
    call: OwnedFd,
    error: OwnedFd,
}

/// A queue that was started, and a device on the other side that maps what it was given.
fn scripted_queue(
    size: u16,
    indirect: bool,
    device: impl FnOnce(&mut SplitRing<Little>, Notifications, Peer) + Send + 'static,
) -> (Queue, JoinHandle<()>) {
    let (frontend, peer) = with_script(Duration::from_secs(5), move |mut peer| {
        peer.shake_hands(ProtocolFeatures::default());
        peer.receive(2);
        let frame = peer.receive(5);
        let table = FrontendMessage::decode(crate::protocol::FrontendRequest::SetMemTable, &frame.payload, 1).unwrap();
        let FrontendMessage::SetMemTable(table) = table else { unreachable!() };
        let snapshot = Arc::new(Snapshot::from_table(&table.regions, &frame.descriptors).unwrap());
        peer.receive(8);
        peer.receive(10);
        let frame = peer.receive(9);
        let address: VringAddress = crate::protocol::Payload::decode(&frame.payload).unwrap();
        let [call, error, kick] = [13, 14, 12].map(|id| peer.receive(id).descriptors.remove(0));
        peer.receive(18);
        let VringAddress { descriptors: table, avail, used, .. } = address;
        let addresses = RingAddresses { descriptors: table, avail, used };
        let options = RingOptions { event_idx: true, indirect: true, ..RingOptions::default() };
        let mut ring = SplitRing::<Little>::new(addresses, size, 0, options, RingLimits::default(), snapshot).unwrap();
        device(&mut ring, Notifications { kick, call, error }, peer);
    });
    frontend.handshake(Frontend::SUPPORTED).unwrap();
    frontend.set_features(FEATURES).unwrap();
    let memory = Arc::new(Memory::new(1 << 20).unwrap());
    frontend.share(std::slice::from_ref(&memory)).unwrap();
    let queue = Queue::new(frontend, memory, 0, QueueOptions { size, base: 0, indirect, big_endian: false }).unwrap();
    queue.start().unwrap();
    (queue, peer)
}

fn take(ring: &mut SplitRing<Little>) -> Chain {
    let mut chain = Chain::default();
    while ring.available().unwrap() == 0 {
        thread::sleep(Duration::from_millis(1));
    }
    assert!(ring.pop(&mut chain).unwrap());
    chain
}

#[test]
fn a_queue_that_starts_is_kicked_for_back_ends_that_wait_for_it() {
    let (_queue, peer) = scripted_queue(4, true, |_, notifications, _| {
        assert_eq!(rustix::io::read(&notifications.kick, &mut [0; 8]), Ok(8));
    });
    peer.join().unwrap();
}

#[test]
fn a_device_that_lies_about_lengths_or_requests_is_found_out() {
    type Lie = (fn(u16) -> Used, fn(&RingError) -> bool);
    let lies: [Lie; 3] = [
        (|head| Used { head, written: 11 }, |error| matches!(error, RingError::UsedTooLong { written: 11, .. })),
        (|head| Used { head: head + 1, written: 0 }, |error| matches!(error, RingError::UsedNotSubmitted { .. })),
        (|_| Used { head: 60_000, written: 0 }, |error| matches!(error, RingError::UsedNotSubmitted { .. })),
    ];
    for (lie, is_expected) in lies {
        let (queue, peer) = scripted_queue(4, true, move |ring, notifications, _| {
            let head = take(ring).head();
            ring.push_used(lie(head));
            let _call = ring.publish();
            rustix::io::write(&notifications.call, &1u64.to_ne_bytes()).unwrap();
        });
        let token = queue.submit(&[b"?"], &[10]).unwrap();
        for error in [queue.wait(Some(token), soon()).unwrap_err(), queue.submit(&[b"?"], &[]).unwrap_err()] {
            assert!(matches!(&error, Error::Ring { queue: 0, reason } if is_expected(reason)), "{error}");
        }
        peer.join().unwrap();
    }
}

#[test]
fn a_second_completion_is_found_out() {
    let (queue, peer) = scripted_queue(4, true, |ring, notifications, _| {
        let head = take(ring).head();
        take(ring);
        ring.push_used(Used { head, written: 0 });
        ring.push_used(Used { head, written: 0 });
        let _call = ring.publish();
        rustix::io::write(&notifications.call, &1u64.to_ne_bytes()).unwrap();
    });
    let first = queue.submit(&[b"1"], &[]).unwrap();
    let second = queue.submit(&[b"2"], &[]).unwrap();
    assert_eq!(queue.wait(Some(first), soon()).unwrap(), Completion { token: first, data: vec![] });
    let error = queue.wait(Some(second), soon()).unwrap_err();
    assert!(error.to_string().starts_with("queue 0: the used ring returns descriptor"), "{error}");
    peer.join().unwrap();
}

#[test]
fn a_device_that_hangs_costs_a_deadline_and_one_that_dies_does_not() {
    let (hold, held) = std::sync::mpsc::channel::<()>();
    let (queue, peer) = scripted_queue(4, true, move |_, _, _peer| {
        let _ = held.recv();
    });
    let token = queue.submit(&[b"?"], &[]).unwrap();
    let error = queue.wait(Some(token), Instant::now() + Duration::from_millis(30)).unwrap_err();
    assert_eq!(error.to_string(), "queue 0: the device did not complete the request in time");
    drop(hold);
    let error = queue.wait(Some(token), soon()).unwrap_err();
    assert!(matches!(error, Error::Closed(_)), "{error}");
    peer.join().unwrap();
}

#[test]
fn a_ring_that_the_back_end_gave_up_is_not_waited_for() {
    let (queue, peer) = scripted_queue(4, true, |ring, notifications, _| {
        let head = take(ring).head();
        ring.push_used(Used { head, written: 0 });
        let _call = ring.publish();
        rustix::io::write(&notifications.error, &1u64.to_ne_bytes()).unwrap();
        thread::sleep(Duration::from_millis(100));
    });
    let done = queue.submit(&[b"done"], &[]).unwrap();
    let lost = queue.submit(&[b"lost"], &[]).unwrap();
    let error = queue.wait(Some(lost), soon()).unwrap_err();
    assert!(matches!(error, Error::Ring { queue: 0, reason: RingError::ReportedBroken }), "{error}");
    assert_eq!(queue.poll(Some(done)).unwrap(), Some(Completion { token: done, data: vec![] }));
    peer.join().unwrap();
}

#[test]
fn what_cannot_be_submitted_is_refused_with_the_reason() {
    let (queue, peer) = scripted_queue(2, false, |ring, _, _| {
        take(ring);
    });
    let refusal = |readable: &[&[u8]], writable: &[usize]| queue.submit(readable, writable).unwrap_err().to_string();
    assert_eq!(refusal(&[b""], &[0]), "queue 0: a request needs at least one byte, of either kind");
    let needed = "queue 0: a request of 3 descriptors does not fit; 2 of 2 are free";
    assert_eq!(refusal(&[b"a", b"b"], &[1]), needed);
    assert!(refusal(&[], &[2 << 20]).contains("no room for 2097152 bytes"));
    assert!(refusal(&[b"a"], &[usize::MAX]).contains("too large"));
    queue.submit(&[b"a"], &[1]).unwrap();
    assert!(refusal(&[b"a"], &[]).contains("0 of 2 are free"));
    let error = queue.wait(Some(77), soon()).unwrap_err();
    assert_eq!(error.to_string(), "queue 0: there is no request 77 to wait for");
    peer.join().unwrap();
}

#[test]
fn memory_is_given_back_whole() {
    let memory = Arc::new(Memory::with_layout(&[(0x1000, 0x1000), (0x2000, 0x1000)]).unwrap());
    let halves = || (memory.allocate(0x1000, 64).unwrap(), memory.allocate(0x1000, 64).unwrap());
    for low_first in [true, false] {
        let (low, high) = halves();
        assert!(memory.allocate(1, 1).is_err());
        let (first, second) = if low_first { (low, high) } else { (high, low) };
        drop(first);
        drop(second);
        assert!(memory.allocate(0x1001, 1).is_err(), "no piece lies over two regions");
    }
    let pieces: Vec<_> = (0..10).map(|_| memory.allocate(100, 256).unwrap()).collect();
    assert!(pieces.iter().all(|piece| piece.address() % 256 == 0 && piece.len() >= 100));
    let (even, odd): (Vec<_>, Vec<_>) = pieces.into_iter().enumerate().partition(|(at, _)| at % 2 == 0);
    drop(odd);
    drop(even);
    let _both = halves();
}

#[test]
fn guest_memory_is_read_and_written_over_regions_and_not_beyond() {
    let memory = Memory::with_layout(&[(0x1000, 0x1000), (0x2000, 0x1000)]).unwrap();
    memory.write(0x1ffe, b"seam").unwrap();
    let mut bytes = [0; 4];
    memory.read(0x1ffe, &mut bytes).unwrap();
    assert_eq!(&bytes, b"seam");
    assert!(memory.read(0x2ffd, &mut bytes).unwrap_err().to_string().contains("not inside guest memory"));
    assert!(memory.write(0xfff, &bytes).is_err());
}

// Our own back-end.

/// A device that answers with what it was asked, backwards.
struct Echo {
    wakeup: backend::Wakeup,
    over: Arc<AtomicBool>,
    config: Arc<ConfigSpace>,
    channel: Arc<Channel>,
    thread: Option<JoinHandle<()>>,
}

struct Quiet;

impl Extensions for Quiet {}

impl Hooks for Quiet {
    fn features_negotiated(&mut self, _features: u64) {}
    fn queue_started(&mut self, _queue: u16) {}
    fn queue_stopping(&mut self, _queue: u16) {}
    fn queue_broke(&mut self, _queue: u16, _error: &RingError) {}
    fn config_written(&mut self, _offset: u32, bytes: &[u8]) -> Result<(), String> {
        if bytes == b"bad" { Err("not this".to_owned()) } else { Ok(()) }
    }
    fn device_reset(&mut self) {}
}

impl Echo {
    fn serve(socket: UnixStream, queues: u16) -> Self {
        let events = Arc::new(EventLoop::new().unwrap());
        let wakeup = events.wakeup();
        let vrings: Arc<[_]> = (0..queues)
            .map(|index| Arc::new(Vring::new(index, 1024, RingLimits::default(), events.wakeup())))
            .collect();
        let config = Arc::new(ConfigSpace::new(b"configuration".to_vec()));
        let channel = Arc::new(Channel::new(Arc::clone(&events)));
        let profile = Profile { has_config: true, ..Profile::default() };
        let session =
            Session::new(socket.into(), profile, vrings.clone(), config.clone(), channel.clone(), events.clone());
        let mut session = session.unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let stop = over.clone();
        let answers = channel.clone();
        let run = move || {
            let mut hooks = Quiet;
            let mut happened = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                events.wait(Some(Duration::from_millis(500)), &mut happened).unwrap();
                let mut flow = Flow::Continue;
                for event in happened.drain(..) {
                    match event {
                        backend::Event::Ready { token: Token::Session, .. } => {
                            flow = session.on_ready(&mut hooks).unwrap_or(Flow::Ended);
                        }
                        backend::Event::Ready { token: Token::Channel, .. } => answers.on_ready(),
                        backend::Event::Ready { token: Token::Queue(queue), .. } => session.on_kick(queue, &mut hooks),
                        _ => {}
                    }
                }
                answers.settle();
                if flow == Flow::Ended || session.resume(&mut hooks).unwrap_or(Flow::Ended) == Flow::Ended {
                    return;
                }
                while session.next_ready().is_some() {}
                vrings.iter().for_each(|vring| echo(vring));
            }
        };
        Self { wakeup, over, config, channel, thread: Some(thread::spawn(run)) }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        self.wakeup.wake();
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join)
            && !thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

/// Complete what is there in the opposite order.
fn echo(vring: &Vring) {
    let (mut chains, mut spare) = (Vec::new(), Vec::new());
    while let Taken::Chains(run) = vring.take(16, &mut chains, &mut spare) {
        while let Some(chain) = chains.pop() {
            let mut bytes = vec![0; chain.readable() as usize];
            // SAFETY: `run` holds the snapshot under which the chain was taken.
            unsafe { chain.read(0, &mut bytes) };
            bytes.reverse();
            // SAFETY: as above.
            let written = unsafe { chain.write(0, &bytes) } as u32;
            vring.complete(&run, &[Used { head: chain.head(), written }], &[chain]);
        }
    }
}

fn connect(queues: u16, protocol: ProtocolFeatures) -> (Arc<Frontend>, Echo) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let echo = Echo::serve(theirs, queues);
    let frontend = Arc::new(Frontend::new(ours.into(), Duration::from_secs(5)).unwrap());
    let offer = frontend.handshake(protocol).unwrap();
    assert_eq!(offer.queues.unwrap_or(queues.into()), u64::from(queues));
    (frontend, echo)
}

fn start(frontend: &Arc<Frontend>, index: u8, features: u64, options: QueueOptions) -> Queue {
    frontend.set_features(features).unwrap();
    let memory = Arc::new(Memory::with_layout(&[(0x10_0000, 1 << 20), (0x20_0000, 1 << 20)]).unwrap());
    frontend.share(std::slice::from_ref(&memory)).unwrap();
    let queue = Queue::new(frontend.clone(), memory, index, options).unwrap();
    queue.start().unwrap();
    frontend.set_driver_ok().unwrap();
    queue
}

const OPTIONS: QueueOptions = QueueOptions { size: 64, base: 0, indirect: true, big_endian: false };

#[test]
fn a_request_goes_there_and_back_whatever_was_negotiated() {
    for features in [FEATURES, FEATURES & !VirtioFeatures::EVENT_IDX.0, VirtioFeatures::VERSION_1.0] {
        for protocol in [Frontend::SUPPORTED, ProtocolFeatures::default(), ProtocolFeatures::CONFIGURE_MEM_SLOTS] {
            for (base, indirect, end) in [(0, true, 3), (65_535, false, 2)] {
                let (frontend, _echo) = connect(1, protocol);
                let queue = start(&frontend, 0, features, QueueOptions { base, indirect, ..OPTIONS });
                for _ in 0..3 {
                    let token = queue.submit(&[b"desserts", b"?"], &[3, 6]).unwrap();
                    assert_eq!(
                        queue.wait(Some(token), soon()).unwrap(),
                        Completion { token, data: b"?stressed".into() }
                    );
                }
                assert_eq!(queue.stop().unwrap(), end);
            }
        }
    }
}

#[test]
fn many_requests_complete_in_any_order_and_many_times_over() {
    let (frontend, _echo) = connect(1, Frontend::SUPPORTED);
    let queue = start(&frontend, 0, FEATURES, OPTIONS);
    let mut under_way = BTreeMap::new();
    let mut completed = 0;
    for number in 0u32..20_000 {
        let bytes = number.to_be_bytes();
        let token = queue.submit(&[&bytes], &[100]).unwrap();
        under_way.insert(token, number.to_le_bytes().to_vec());
        while under_way.len() > 48 {
            let completion = queue.wait(None, soon()).unwrap();
            assert_eq!(under_way.remove(&completion.token).unwrap(), completion.data);
            completed += 1;
        }
    }
    while !under_way.is_empty() {
        let completion = queue.wait(None, soon()).unwrap();
        assert_eq!(under_way.remove(&completion.token).unwrap(), completion.data);
        completed += 1;
    }
    assert_eq!((completed, queue.outstanding()), (20_000, 0));
}

#[test]
fn threads_wait_for_their_own_requests_while_others_submit() {
    let (frontend, _echo) = connect(1, Frontend::SUPPORTED);
    let queue = start(&frontend, 0, FEATURES, OPTIONS);
    let begin = Instant::now();
    let deadline = begin + Duration::from_secs(60);
    thread::scope(|scope| {
        for worker in 0u64..8 {
            let queue = &queue;
            scope.spawn(move || {
                for number in 0u64..500 {
                    let bytes = (worker << 32 | number).to_be_bytes();
                    let token = queue.submit(&[&bytes], &[8]).unwrap();
                    let completion = queue.wait(Some(token), deadline).unwrap();
                    assert_eq!(completion.data, (worker << 32 | number).to_le_bytes());
                }
            });
        }
    });
    assert!(begin.elapsed() < Duration::from_secs(30), "somebody was not woken before the deadline");
    assert!(rustix::io::read(queue.call_descriptor(), &mut [0; 8]).is_err(), "a waiter left the notification behind");
}

#[test]
fn a_queue_stops_and_goes_on_where_it_was() {
    let (frontend, _echo) = connect(2, Frontend::SUPPORTED);
    let queue = start(&frontend, 1, FEATURES, OPTIONS);
    for round in 0..20 {
        let token = queue.submit(&[b"ab"], &[2]).unwrap();
        let base = queue.stop().unwrap();
        let done = queue.poll(Some(token)).unwrap();
        assert_eq!(base, round + u32::from(done.is_some()), "a request is done, or still there for the next start");
        queue.start().unwrap();
        let completion = done.unwrap_or_else(|| queue.wait(Some(token), soon()).unwrap());
        assert_eq!(completion.data, b"ba");
    }
    queue.enable(false).unwrap();
    let token = queue.submit(&[b"ab"], &[2]).unwrap();
    assert!(matches!(queue.wait(None, Instant::now() + Duration::from_millis(30)), Err(Error::Timeout(_))));
    queue.enable(true).unwrap();
    assert_eq!(queue.wait(None, soon()).unwrap().token, token);
    frontend.reset().unwrap();
    let token = queue.submit(&[b"ab"], &[2]).unwrap();
    assert!(queue.wait(Some(token), Instant::now() + Duration::from_millis(30)).is_err());
    queue.start().unwrap();
    assert_eq!(queue.wait(Some(token), soon()).unwrap().data, b"ba");
}

#[test]
fn whoever_waits_on_the_descriptor_is_woken() {
    let (frontend, _echo) = connect(1, Frontend::SUPPORTED);
    let queue = start(&frontend, 0, FEATURES, OPTIONS);
    for _ in 0..100 {
        assert!(!queue.arm().unwrap());
        let token = queue.submit(&[b"ab"], &[2]).unwrap();
        let call = queue.call_descriptor();
        frontend.wait([call], soon()).unwrap();
        assert_eq!(queue.poll(None).unwrap().unwrap().token, token);
    }
}

#[test]
fn configuration_is_read_written_and_announced() {
    let (frontend, echo) = connect(1, Frontend::SUPPORTED);
    let _queue = start(&frontend, 0, FEATURES, OPTIONS);
    assert_eq!(frontend.get_config(3, 5).unwrap(), b"figur");
    assert_eq!(frontend.get_config(11, 4).unwrap(), b"on\0\0");
    frontend.set_config(0, b"ok!").unwrap();
    let error = frontend.set_config(0, b"bad").unwrap_err();
    assert!(matches!(error, Error::Refused { message: "SET_CONFIG", .. }), "{error}");
    assert!(frontend.set_config(0, &[0; 5000]).unwrap_err().to_string().contains("at most 4084"));
    echo.config.write(0, b"C").unwrap();
    echo.channel.config_changed();
    assert_eq!(frontend.next_event(soon()).unwrap(), Some(Event::ConfigChanged));
    assert_eq!(frontend.get_config(0, 3).unwrap()[0], b'C');
}

#[test]
fn memory_is_replaced_while_a_queue_runs() {
    for protocol in [Frontend::SUPPORTED, ProtocolFeatures::REPLY_ACK] {
        let (frontend, _echo) = connect(1, protocol);
        frontend.set_features(FEATURES).unwrap();
        let memory = Arc::new(Memory::new(1 << 20).unwrap());
        frontend.share(std::slice::from_ref(&memory)).unwrap();
        let queue = Queue::new(frontend.clone(), memory.clone(), 0, OPTIONS).unwrap();
        queue.start().unwrap();
        for _ in 0..10 {
            let token = queue.submit(&[b"ab"], &[2]).unwrap();
            let more = Arc::new(Memory::with_layout(&[(0x1000, 0x1000)]).unwrap());
            frontend.share(&[memory.clone(), more]).unwrap();
            assert_eq!(queue.wait(Some(token), soon()).unwrap().data, b"ba");
        }
    }
}

#[test]
fn any_message_can_be_sent_at_any_time() {
    let (frontend, _echo) = connect(1, Frontend::SUPPORTED);
    let message = FrontendMessage::SetVringNum(VringState { index: 7, num: 3 });
    let answer = frontend.exchange(&message, &[]).unwrap().unwrap().payload;
    assert_ne!(answer, [0; 8], "there is no queue 7");
    let answer = frontend.exchange(&FrontendMessage::GetFeatures(Empty), &[]).unwrap().unwrap().payload;
    assert_eq!(answer.len(), 8);
    let answer = frontend.exchange(&FrontendMessage::SetStatus(U64(1)), &[]).unwrap().unwrap().payload;
    assert_eq!(answer, [0; 8]);
}

#[test]
fn whoever_waits_is_told_that_the_session_was_closed() {
    let (hold, held) = std::sync::mpsc::channel::<()>();
    let (queue, peer) = scripted_queue(4, true, move |_, _, _peer| {
        let _ = held.recv();
    });
    let token = queue.submit(&[b"?"], &[]).unwrap();
    let frontend = queue.frontend();
    let waiter = thread::spawn(move || queue.wait(Some(token), soon()).unwrap_err());
    frontend.close();
    assert!(matches!(waiter.join().unwrap(), Error::Closed(text) if text.starts_with("queue 0")));
    let error = frontend.get_features().unwrap_err();
    assert_eq!(error.to_string(), "GET_FEATURES: the session is over (it was closed on this side)");
    drop(hold);
    peer.join().unwrap();
}

#[test]
fn a_wait_ends_when_patience_does() {
    let (frontend, peer) = with_script(Duration::from_secs(60), |mut peer| {
        peer.receive(1);
        peer
    });
    let asked = AtomicBool::new(false);
    frontend.set_patience(move || !asked.swap(true, Ordering::Relaxed));
    assert!(matches!(frontend.get_features(), Err(Error::Interrupted)));
    peer.join().unwrap();
}

// Load.

#[test]
fn a_load_goes_on_for_its_time_and_accounts_for_every_byte() {
    for (features, indirect) in [(FEATURES, true), (VirtioFeatures::VERSION_1.0, false)] {
        for poll in [false, true] {
            let (frontend, _echo) = connect(1, Frontend::SUPPORTED);
            let queue = start(&frontend, 0, features, QueueOptions { indirect, ..OPTIONS });
            let workload = Workload::Chain { readable: vec![3, 5000], writable: vec![7] };
            let runtime = Duration::from_millis(200);
            let options = LoadOptions { runtime, timeout: Duration::from_secs(5), poll };
            let control = Control::default();
            let tally = load(&[&queue], &workload, 16, options, &control).unwrap();
            assert!(tally.elapsed >= runtime && tally.requests > 16, "{tally:?}");
            assert_eq!((tally.sent, tally.received), (5003 * tally.requests, 7 * tally.requests));
            assert_eq!((control.requests(), queue.outstanding()), (tally.requests, 0));
            let percentile = |percent| tally.latency.percentile(percent).unwrap();
            assert!(tally.latency.least().unwrap() <= percentile(50.0) && percentile(50.0) <= percentile(100.0));
        }
    }
}

#[test]
fn a_load_ends_when_it_is_told_to() {
    let (frontend, _echo) = connect(1, Frontend::SUPPORTED);
    let queue = start(&frontend, 0, FEATURES, OPTIONS);
    let control = Control::default();
    let workload = Workload::Chain { readable: vec![1], writable: vec![1] };
    let begin = Instant::now();
    let options = LoadOptions { runtime: Duration::from_secs(60), timeout: Duration::from_secs(5), poll: false };
    thread::scope(|scope| {
        let running = scope.spawn(|| load(&[&queue], &workload, 1, options, &control).unwrap());
        while control.requests() == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        control.stop();
        assert!(running.join().unwrap().requests > 0);
    });
    assert!(begin.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_device_that_hangs_or_dies_ends_a_load() {
    for (dies, poll) in [(false, false), (false, true), (true, false), (true, true)] {
        let (hold, held) = std::sync::mpsc::channel::<()>();
        let (queue, peer) = scripted_queue(4, true, move |ring, _, peer| {
            take(ring);
            if dies {
                drop(peer);
            } else {
                let _ = held.recv();
            }
        });
        let workload = Workload::Chain { readable: vec![1], writable: vec![1] };
        let timeout = Duration::from_millis(if dies { 5000 } else { 100 });
        let options = LoadOptions { runtime: Duration::from_secs(60), timeout, poll };
        let begin = Instant::now();
        let error = load(&[&queue], &workload, 3, options, &Control::default()).unwrap_err();
        assert!(begin.elapsed() < Duration::from_secs(4));
        if dies {
            assert!(matches!(error, Error::Closed(_)), "{error}");
        } else {
            let told = "queue 0: the device has 3 requests, and completed none of them within 0.1 s";
            assert_eq!(error.to_string(), told);
        }
        drop(hold);
        peer.join().unwrap();
    }
}

proptest! {
    #[test]
    fn a_percentile_is_the_value_or_up_to_a_64th_more(
        mut values in vec((any::<u64>(), 0..64u32).prop_map(|(value, shift)| value >> shift), 1..200),
        percent in 0.0..=100.0f64,
        split in 0..200usize,
    ) {
        let (mut histogram, mut other) = (Histogram::default(), Histogram::default());
        for (at, value) in values.iter().enumerate() {
            if at < split { &mut histogram } else { &mut other }.record(*value);
        }
        histogram.merge(&other);
        values.sort_unstable();
        let rank = ((percent / 100.0 * values.len() as f64).ceil() as usize).max(1);
        let (exact, told) = (values[rank - 1], histogram.percentile(percent).unwrap());
        prop_assert!(exact <= told && told - exact <= exact / 64, "{told} instead of {exact}");
        prop_assert_eq!(histogram.percentile(100.0), values.last().copied());
        prop_assert_eq!(histogram.least(), Some(values[0]));
        let sum: u128 = values.iter().map(|value| u128::from(*value)).sum();
        prop_assert_eq!(histogram.mean(), Some(sum as f64 / values.len() as f64));
    }
}

#[test]
fn nothing_has_no_percentile() {
    let histogram = Histogram::default();
    assert_eq!((histogram.percentile(50.0), histogram.mean(), histogram.least()), (None, None, None));
}

const _: fn() = || {
    fn is_shared_between_threads<T: Send + Sync>() {}
    is_shared_between_threads::<Frontend>();
    is_shared_between_threads::<Queue>();
    is_shared_between_threads::<Memory>();
};
