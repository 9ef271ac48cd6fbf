use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage};

use super::*;

fn pair() -> (Connection, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Connection::new(ours.into()).unwrap(), theirs)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

fn send_with_descriptors(socket: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(KERNEL_MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    assert_eq!(sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap(), bytes.len());
}

fn header(request: u32, size: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    Header { request, flags: Flags::REQUEST, size }.encode(&mut bytes);
    bytes
}

/// A pipe whose other end tells whether every copy of this end was closed.
fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
}

fn is_closed(reader: &OwnedFd) -> bool {
    matches!(rustix::io::read(reader, &mut [0; 1]), Ok(0))
}

#[test]
fn a_message_arrives_whole_when_it_is_sent_byte_by_byte() {
    let (mut ours, mut theirs) = pair();
    let mut bytes = header(18, 8);
    bytes.extend_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
    for (at, byte) in bytes.iter().enumerate() {
        theirs.write_all(&[*byte]).unwrap();
        let received = ours.try_receive().unwrap();
        if at + 1 < bytes.len() {
            assert!(matches!(received, Received::Incomplete));
        } else {
            let Received::Frame(frame) = received else { panic!("no frame after the last byte") };
            assert_eq!((frame.header.request, frame.payload), (18, vec![1, 2, 3, 4, 5, 6, 7, 8]));
        }
    }
}

#[test]
fn two_messages_in_one_write_stay_two() {
    let (mut ours, mut theirs) = pair();
    theirs.write_all(&[header(1, 0), header(3, 0)].concat()).unwrap();
    assert_eq!(ours.receive(soon()).unwrap().header.request, 1);
    assert_eq!(ours.receive(soon()).unwrap().header.request, 3);
}

#[test]
fn descriptors_belong_to_the_message_whose_first_byte_they_came_with() {
    let (mut ours, theirs) = pair();
    let (_reader, writer) = pipe();
    send_with_descriptors(&theirs, &header(12, 0), &[writer.as_fd()]);
    (&theirs).write_all(&header(1, 0)).unwrap();
    assert_eq!(ours.receive(soon()).unwrap().descriptors.len(), 1);
    assert_eq!(ours.receive(soon()).unwrap().descriptors.len(), 0);
}

#[test]
fn descriptors_on_a_later_byte_are_closed_and_reported() {
    let (mut ours, theirs) = pair();
    let (reader, writer) = pipe();
    let bytes = header(12, 0);
    (&theirs).write_all(&bytes[..4]).unwrap();
    assert!(matches!(ours.try_receive().unwrap(), Received::Incomplete));
    send_with_descriptors(&theirs, &bytes[4..], &[writer.as_fd()]);
    drop(writer);
    let frame = ours.receive(soon()).unwrap();
    assert!(frame.defect.unwrap().contains("later byte"));
    assert!(is_closed(&reader));
}

#[test]
fn as_many_descriptors_as_the_kernel_lets_through_are_all_owned() {
    let (mut ours, theirs) = pair();
    let (reader, writer) = pipe();
    let many = vec![writer.as_fd(); KERNEL_MAX_DESCRIPTORS];
    send_with_descriptors(&theirs, &header(12, 0), &many);
    let frame = ours.receive(soon()).unwrap();
    assert_eq!(frame.descriptors.len(), KERNEL_MAX_DESCRIPTORS);
    drop(frame);
    drop(writer);
    assert!(is_closed(&reader));
}

#[test]
fn an_unfinished_message_closes_its_descriptors_with_the_connection() {
    let (mut ours, theirs) = pair();
    let (reader, writer) = pipe();
    send_with_descriptors(&theirs, &header(12, 8), &[writer.as_fd()]);
    drop(writer);
    assert!(matches!(ours.try_receive().unwrap(), Received::Incomplete));
    drop(ours);
    assert!(is_closed(&reader));
}

#[test]
fn the_end_of_the_stream_is_orderly_only_between_messages() {
    let (mut ours, theirs) = pair();
    drop(theirs);
    assert!(matches!(ours.try_receive().unwrap(), Received::Closed));

    let (mut ours, mut theirs) = pair();
    theirs.write_all(&header(1, 0)[..7]).unwrap();
    drop(theirs);
    assert_eq!(ours.try_receive().unwrap_err().to_string(), "the connection ended after 7 of the 12 bytes of a header");

    let (mut ours, mut theirs) = pair();
    theirs.write_all(&header(2, 8)).unwrap();
    drop(theirs);
    assert_eq!(
        ours.try_receive().unwrap_err().to_string(),
        "the connection ended after 0 of the 8 payload bytes of request 2"
    );
}

#[test]
fn an_endless_payload_is_refused_before_it_is_read() {
    let (mut ours, mut theirs) = pair();
    theirs.write_all(&header(1, u32::MAX)).unwrap();
    assert!(matches!(ours.try_receive(), Err(Error::Framing(_))));
}

#[test]
fn an_empty_control_message_is_no_descriptor() {
    let (mut ours, theirs) = pair();
    let bytes = header(1, 0);
    // The safe wrappers cannot build a control message without descriptors, which User-Mode Linux and DPDK do send.
    let mut control = [0u64; 2];
    let mut vector = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: an all-zero msghdr is a valid value; the pointers set below outlive the call that reads them.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: the control buffer is 16 aligned bytes, the size of one header, which is what is written.
    unsafe {
        let head = libc::CMSG_FIRSTHDR(&raw const message);
        (*head).cmsg_len = libc::CMSG_LEN(0) as usize;
        (*head).cmsg_level = libc::SOL_SOCKET;
        (*head).cmsg_type = libc::SCM_RIGHTS;
        assert_eq!(libc::sendmsg(theirs.as_raw_fd(), &raw const message, 0), bytes.len() as isize);
    }
    let frame = ours.receive(soon()).unwrap();
    assert!(frame.descriptors.is_empty() && frame.defect.is_none());
}

#[test]
fn a_peer_that_does_not_answer_costs_a_deadline() {
    let (mut ours, _theirs) = pair();
    let error = ours.receive(Instant::now() + Duration::from_millis(20)).unwrap_err();
    assert!(matches!(error, Error::Timeout(_)));
}

#[test]
fn a_peer_that_does_not_read_costs_a_deadline() {
    let (ours, mut theirs) = pair();
    let payload = vec![0; 4096];
    let error = loop {
        let deadline = Instant::now() + Duration::from_millis(20);
        if let Err(error) = ours.send(1, Flags::ANSWER, &payload, &[], deadline) {
            break error;
        }
    };
    assert!(matches!(error, Error::Timeout(_)));
    theirs.read_exact(&mut [0; HEADER_SIZE]).unwrap();
}

#[test]
fn a_message_larger_than_the_socket_buffer_is_sent_in_parts() {
    let (ours, theirs) = pair();
    sockopt::set_socket_send_buffer_size(&ours, 4096).unwrap();
    let mut theirs = Connection::new(theirs.into()).unwrap();
    let (_reader, writer) = pipe();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..64 {
                ours.send(5, Flags::REQUEST, &[7; 4096], &[writer.as_fd()], soon()).unwrap();
            }
        });
        for _ in 0..64 {
            let frame = theirs.receive(soon()).unwrap();
            assert_eq!((frame.payload.len(), frame.descriptors.len(), frame.defect), (4096, 1, None));
        }
    });
}

#[test]
fn only_a_unix_stream_socket_is_taken() {
    let (reader, _writer) = pipe();
    assert!(matches!(Connection::new(reader), Err(Error::State(_))));
}

#[test]
fn what_has_to_wait_goes_out_later_with_its_own_descriptors() {
    let (mut ours, theirs) = pair();
    let mut peer = Connection::new(theirs.into()).unwrap();
    let large = vec![7; crate::protocol::MAX_PAYLOAD];
    let mut sent = 1;
    while ours.try_send(1, Flags::ANSWER, &large, Vec::new()).unwrap() {
        sent += 1;
    }
    let (reader, writer) = pipe();
    assert!(!ours.try_send(2, Flags::ANSWER, b"with a file", vec![writer]).unwrap());

    for _ in 0..sent {
        let frame = peer.receive(soon()).unwrap();
        assert_eq!((frame.header.request, frame.payload.len(), frame.descriptors.len()), (1, large.len(), 0));
        ours.flush().unwrap();
    }
    let frame = peer.receive(soon()).unwrap();
    assert_eq!((frame.header.request, &frame.payload[..], frame.descriptors.len()), (2, &b"with a file"[..], 1));
    assert!(!is_closed_nonblocking(&reader));
    drop(frame);
    assert!(is_closed(&reader));
}

fn is_closed_nonblocking(reader: &OwnedFd) -> bool {
    rustix::io::ioctl_fionbio(reader, true).unwrap();
    is_closed(reader)
}
