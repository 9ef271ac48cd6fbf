//! Frames over an AF_UNIX stream socket: a header, a payload, and the descriptors that came with the header.
//!
//! Owns partial reads and writes, and every descriptor from the moment of recvmsg. Knows nothing of what a message means.
//!
//! vhost-user specification, "Message Specification" and "Communication".

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketType, recvmsg, sendmsg, sockopt,
};

use crate::error::Error;
use crate::protocol::{Flags, HEADER_SIZE, Header};

/// The kernel lets no more descriptors than this through in one message (SCM_MAX_FD), so that a buffer of this size is
/// truncated only when the process has no descriptors left.
const KERNEL_MAX_DESCRIPTORS: usize = 253;

/// One message as it came: framed, not yet understood.
#[derive(Debug)]
pub struct Frame {
    pub header: Header,
    pub payload: Vec<u8>,
    pub descriptors: Vec<OwnedFd>,
    /// What was wrong with its descriptors, if anything: the frame is intact, but the message must be refused.
    pub defect: Option<String>,
}

/// The outcome of a read that does not wait.
#[derive(Debug)]
pub enum Received {
    Frame(Frame),
    /// The rest of the message has not come yet.
    Incomplete,
    /// The peer closed the connection between two messages.
    Closed,
}

/// One end of a channel.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    head: [u8; HEADER_SIZE],
    /// The header in `head`, once it is whole.
    header: Option<Header>,
    payload: Vec<u8>,
    /// Bytes received of `head`, or of `payload` once there is a header.
    received: usize,
    descriptors: Vec<OwnedFd>,
    defect: Option<String>,
    /// What the socket has had no room for yet.
    unsent: VecDeque<Unsent>,
}

/// A message, or the rest of one. Its descriptors go with its first byte.
#[derive(Debug)]
struct Unsent {
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Connection {
    /// Take over a connected AF_UNIX stream socket.
    pub fn new(socket: OwnedFd) -> Result<Self, Error> {
        let is_unix_stream = sockopt::socket_domain(&socket).is_ok_and(|domain| domain == AddressFamily::UNIX)
            && sockopt::socket_type(&socket).is_ok_and(|kind| kind == SocketType::STREAM);
        if !is_unix_stream {
            return Err(Error::State("the descriptor is not an AF_UNIX stream socket".to_owned()));
        }
        Ok(Self {
            socket,
            head: [0; HEADER_SIZE],
            header: None,
            payload: Vec::new(),
            received: 0,
            descriptors: Vec::new(),
            defect: None,
            unsent: VecDeque::new(),
        })
    }

    /// Whether the peer is gone. What it sent before may still be there.
    #[must_use]
    pub fn is_hung_up(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut ends = [PollFd::new(&self.socket, PollFlags::empty())];
        poll(&mut ends, Some(&now)).is_ok() && ends[0].revents().contains(PollFlags::HUP)
    }

    /// Read what is there, without waiting.
    pub fn try_receive(&mut self) -> Result<Received, Error> {
        loop {
            if let Some(header) = self.header
                && self.received == self.payload.len()
            {
                self.header = None;
                self.received = 0;
                return Ok(Received::Frame(Frame {
                    header,
                    payload: std::mem::take(&mut self.payload),
                    descriptors: std::mem::take(&mut self.descriptors),
                    defect: self.defect.take(),
                }));
            }
            match self.read_some() {
                Ok(0) if self.header.is_none() && self.received == 0 => return Ok(Received::Closed),
                Ok(0) => return Err(self.cut_off()),
                Ok(count) => self.received += count,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Ok(Received::Incomplete),
                Err(Errno::CONNRESET) if self.header.is_none() && self.received == 0 => return Ok(Received::Closed),
                Err(errno) => return Err(Error::os("reading a message")(errno)),
            }
            if self.header.is_none() && self.received == HEADER_SIZE {
                let header = Header::decode(&self.head);
                header.check_size()?;
                self.payload = vec![0; header.size as usize];
                self.received = 0;
                self.header = Some(header);
            }
        }
    }

    /// Read one message, waiting for it until `deadline`.
    pub fn receive(&mut self, deadline: Instant) -> Result<Frame, Error> {
        loop {
            match self.try_receive()? {
                Received::Frame(frame) => return Ok(frame),
                Received::Closed => return Err(Error::Closed("the peer closed the connection".to_owned())),
                Received::Incomplete => wait_for(self.socket.as_fd(), PollFlags::IN, deadline)?,
            }
        }
    }

    /// Send a message in one sendmsg, without waiting; what does not fit is left for [`flush`](Self::flush). Returns
    /// whether everything was sent.
    pub fn try_send(
        &mut self,
        request: u32,
        flags: Flags,
        payload: &[u8],
        descriptors: Vec<OwnedFd>,
    ) -> Result<bool, Error> {
        self.unsent.push_back(Unsent { bytes: assemble(request, flags, payload), descriptors });
        self.flush()
    }

    /// Send what is left of earlier messages, without waiting. Returns whether everything was sent.
    pub fn flush(&mut self) -> Result<bool, Error> {
        while let Some(Unsent { bytes, descriptors }) = self.unsent.front_mut() {
            let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            match send_some(self.socket.as_fd(), bytes, &borrowed)? {
                Some(count) if count == bytes.len() => drop(self.unsent.pop_front()),
                Some(count) => {
                    bytes.drain(..count);
                    descriptors.clear();
                }
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Whether nothing is left to be sent.
    #[must_use]
    pub fn is_flushed(&self) -> bool {
        self.unsent.is_empty()
    }

    /// Send a message in one sendmsg, with descriptors; what does not fit at once follows without the descriptors.
    pub fn send(
        &self,
        request: u32,
        flags: Flags,
        payload: &[u8],
        descriptors: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(), Error> {
        let bytes = assemble(request, flags, payload);
        let mut sent = 0;
        while sent < bytes.len() {
            let descriptors = if sent == 0 { descriptors } else { &[] };
            match send_some(self.socket.as_fd(), &bytes[sent..], descriptors)? {
                Some(count) => sent += count,
                None => wait_for(self.socket.as_fd(), PollFlags::OUT, deadline)?,
            }
        }
        Ok(())
    }

    fn read_some(&mut self) -> Result<usize, Errno> {
        let first = self.header.is_none() && self.received == 0;
        let target =
            if self.header.is_none() { &mut self.head[self.received..] } else { &mut self.payload[self.received..] };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(KERNEL_MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let message = recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(target)],
            &mut control,
            RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
        )?;
        let mut came = 0;
        for item in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = item {
                for descriptor in descriptors {
                    came += 1;
                    // Descriptors on a later byte are dropped, which closes them, here and now.
                    if first {
                        self.descriptors.push(descriptor);
                    }
                }
            }
        }
        if came > 0 && !first {
            self.defect = Some(format!("{came} descriptors came with a later byte than the first of the message"));
        }
        if message.flags.contains(ReturnFlags::CTRUNC) {
            self.descriptors.clear();
            self.defect =
                Some("descriptors were lost on the way: this process has no room for more (ulimit -n)".to_owned());
        }
        Ok(message.bytes)
    }

    fn cut_off(&self) -> Error {
        Error::Framing(match self.header {
            None => format!("the connection ended after {} of the {HEADER_SIZE} bytes of a header", self.received),
            Some(header) => format!(
                "the connection ended after {} of the {} payload bytes of request {}",
                self.received, header.size, header.request
            ),
        })
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn assemble(request: u32, flags: Flags, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_SIZE + payload.len());
    Header { request, flags, size: payload.len() as u32 }.encode(&mut bytes);
    bytes.extend_from_slice(payload);
    bytes
}

/// Send what the socket has room for, with the descriptors. None if that is nothing at all.
fn send_some(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<Option<usize>, Error> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(crate::protocol::MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Error::State(format!("{} descriptors do not fit in one message", descriptors.len())));
    }
    loop {
        match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(count) => return Ok(Some(count)),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(errno) => return Err(send_error(errno)),
        }
    }
}

fn send_error(errno: Errno) -> Error {
    match errno {
        Errno::PIPE | Errno::CONNRESET => {
            Error::Closed("the peer closed the connection before it read everything".to_owned())
        }
        errno => Error::os("sending a message")(errno),
    }
}

/// Wait until `socket` is ready for `what`, or has failed (which the next call on it tells).
fn wait_for(socket: BorrowedFd<'_>, what: PollFlags, deadline: Instant) -> Result<(), Error> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left == Duration::ZERO {
            let doing = if what == PollFlags::IN { "send" } else { "read" };
            return Err(Error::Timeout(format!("the peer did not {doing} a message in time")));
        }
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut [PollFd::from_borrowed_fd(socket, what)], Some(&timeout)) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(Error::os("waiting for the peer")(errno)),
        }
    }
}

#[cfg(test)]
mod tests;
