//! A stream in pieces of any size, with descriptors anywhere: the messages are the same, and no descriptor is left.

use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost_user::protocol::{HEADER_SIZE, Header, MAX_PAYLOAD};
use vhost_user::transport::{Connection, Frame, Received};

use super::support::{Input, borrowed, feed, number, strange_descriptor};

pub fn run(input: &[u8]) {
    feed(input, stream);
}

fn stream(input: &mut Input<'_>) -> arbitrary::Result<()> {
    let (sender, receiver) = UnixStream::pair().unwrap();
    let mut connection = Connection::new(receiver.into()).unwrap();
    let mut sent = Vec::new();
    let mut frames = Vec::new();
    let mut over = false;
    while !over && !input.is_empty() {
        let bytes = piece(input)?;
        let descriptors = match input.int_in_range(0..=3)? {
            0 => (0..input.int_in_range(1..=9)?).map(|_| strange_descriptor(input)).collect::<Result<_, _>>()?,
            _ => Vec::new(),
        };
        if bytes.is_empty() {
            continue;
        }
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(9))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let borrowed = borrowed(&descriptors);
        if !borrowed.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
        }
        let slices = [std::io::IoSlice::new(&bytes)];
        match sendmsg(&sender, &slices, &mut control, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(count) => sent.extend_from_slice(&bytes[..count]),
            Err(Errno::AGAIN) => {}
            Err(other) => panic!("{other}"),
        }
        over = !receive(&mut connection, &mut frames);
    }
    drop(sender);
    if !over {
        receive(&mut connection, &mut frames);
    }
    let came: Vec<_> = frames.iter().map(|frame: &Frame| (frame.header, frame.payload.clone())).collect();
    assert_eq!(came, expected(&sent));
    // Nothing is waited for after the end.
    assert!(connection.receive(Instant::now()).is_err());
    Ok(())
}

/// The next bytes: a whole message, a head of one, or any.
fn piece(input: &mut Input<'_>) -> arbitrary::Result<Vec<u8>> {
    let length = input.int_in_range(0..=40)?;
    let mut bytes = Vec::new();
    if input.arbitrary()? {
        let size = if input.ratio(7u8, 8u8)? { length as u32 } else { number(input)? as u32 };
        let flags = vhost_user::protocol::Flags(number(input)? as u32);
        Header { request: input.arbitrary()?, flags, size }.encode(&mut bytes);
    }
    bytes.extend_from_slice(input.bytes(length.min(input.len()))?);
    Ok(bytes)
}

/// Whether the connection goes on.
fn receive(connection: &mut Connection, frames: &mut Vec<Frame>) -> bool {
    loop {
        match connection.try_receive() {
            Ok(Received::Frame(frame)) => frames.push(frame),
            Ok(Received::Incomplete) => return true,
            Ok(Received::Closed) | Err(_) => return false,
        }
    }
}

fn expected(mut bytes: &[u8]) -> Vec<(Header, Vec<u8>)> {
    let mut messages = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<HEADER_SIZE>() {
        let header = Header::decode(head);
        let size = header.size as usize;
        if size > MAX_PAYLOAD || size > rest.len() {
            break;
        }
        messages.push((header, rest[..size].to_vec()));
        bytes = &rest[size..];
    }
    messages
}
