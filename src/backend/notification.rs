//! Kick, call and error descriptors.
//!
//! An eventfd is the usual kind, but only "reads and writes of 8 bytes" is promised: User-Mode Linux passes socket
//! ends and blocking eventfds. Nothing here ever blocks on a peer's descriptor, nor changes its flags, which the peer
//! shares.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::io::{Errno, ReadWriteFlags, preadv2, read, write};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::channel::{Channel, Notification};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Socket,
    NonBlocking,
    Blocking,
}

fn kind_of(descriptor: &OwnedFd) -> Kind {
    let is_socket = fstat(descriptor).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket);
    if is_socket {
        Kind::Socket
    } else if fcntl_getfl(descriptor).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK)) {
        Kind::NonBlocking
    } else {
        Kind::Blocking
    }
}

fn is_ready(descriptor: &OwnedFd, what: PollFlags) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut [PollFd::new(descriptor, what)], Some(&now)), Ok(count) if count > 0)
}

/// What reading a kick descriptor found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kicked {
    Yes,
    /// Somebody else read it first.
    No,
    /// It will never kick again: the peer closed it, or it is of a kind that cannot be read.
    Dead,
}

/// Where a driver's kicks come from.
#[derive(Debug)]
pub struct Kick {
    descriptor: OwnedFd,
    kind: Kind,
}

impl Kick {
    pub fn new(descriptor: OwnedFd) -> Self {
        Self { kind: kind_of(&descriptor), descriptor }
    }

    pub fn consume(&self) -> Kicked {
        let mut buffer = [0u8; 8];
        let result = match self.kind {
            Kind::Socket => recv(&self.descriptor, &mut buffer, RecvFlags::DONTWAIT).map(|(count, _)| count),
            Kind::NonBlocking => read(&self.descriptor, &mut buffer),
            Kind::Blocking => {
                match preadv2(&self.descriptor, &mut [IoSliceMut::new(&mut buffer)], u64::MAX, ReadWriteFlags::NOWAIT) {
                    Err(Errno::OPNOTSUPP) if is_ready(&self.descriptor, PollFlags::IN) => {
                        read(&self.descriptor, &mut buffer)
                    }
                    Err(Errno::OPNOTSUPP) => Err(Errno::AGAIN),
                    other => other,
                }
            }
        };
        match result {
            Ok(0) => Kicked::Dead,
            Ok(_) => Kicked::Yes,
            Err(Errno::AGAIN | Errno::INTR) => Kicked::No,
            Err(_) => Kicked::Dead,
        }
    }
}

impl AsFd for Kick {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Where the driver wants to be told that buffers were used, or that a ring broke.
#[derive(Debug)]
pub enum Call {
    Descriptor(Notifier),
    /// In-band: a message of ours says so.
    Message {
        channel: Arc<Channel>,
        notification: Notification,
    },
}

impl Call {
    pub fn new(descriptor: OwnedFd) -> Self {
        Self::Descriptor(Notifier { kind: kind_of(&descriptor), descriptor })
    }

    /// Never waits, and cannot fail: whoever cannot be told has no use for it.
    pub fn signal(&self) {
        match self {
            Self::Descriptor(notifier) => notifier.signal(),
            Self::Message { channel, notification } => channel.notify(*notification),
        }
    }
}

/// A peer's descriptor to write to.
#[derive(Debug)]
pub struct Notifier {
    descriptor: OwnedFd,
    kind: Kind,
}

impl Notifier {
    /// Write 8 bytes, once. A full descriptor has unread notifications, and a closed one has no reader: neither is an
    /// error of ours.
    fn signal(&self) {
        let one = 1u64.to_ne_bytes();
        let _ = match self.kind {
            Kind::Socket => send(&self.descriptor, &one, SendFlags::NOSIGNAL | SendFlags::DONTWAIT),
            Kind::NonBlocking => write(&self.descriptor, &one),
            Kind::Blocking if is_ready(&self.descriptor, PollFlags::OUT) => write(&self.descriptor, &one),
            Kind::Blocking => Ok(0),
        };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::io::dup;
    use rustix::pipe::pipe;

    use super::*;

    #[test]
    fn a_kick_is_read_once_from_every_kind_of_descriptor_without_ever_waiting() {
        let (socket, socket_end) = UnixStream::pair().unwrap();
        let (pipe_end, pipe_writer) = pipe().unwrap();
        let blocking = eventfd(0, EventfdFlags::empty()).unwrap();
        let non_blocking = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let pairs: [(OwnedFd, OwnedFd); 4] = [
            (socket.into(), socket_end.into()),
            (pipe_end, pipe_writer),
            (dup(&blocking).unwrap(), blocking),
            (dup(&non_blocking).unwrap(), non_blocking),
        ];
        for (ours, theirs) in pairs {
            let kick = Kick::new(ours);
            assert_eq!(kick.consume(), Kicked::No, "{:?}", kick.kind);
            assert_eq!(write(&theirs, &1u64.to_ne_bytes()), Ok(8));
            assert_eq!(kick.consume(), Kicked::Yes, "{:?}", kick.kind);
            assert_eq!(kick.consume(), Kicked::No, "{:?}", kick.kind);
        }
    }

    #[test]
    fn a_kick_descriptor_that_was_closed_is_dead() {
        let (socket, end) = UnixStream::pair().unwrap();
        drop(end);
        assert_eq!(Kick::new(socket.into()).consume(), Kicked::Dead);
        let (_reader, writer) = pipe().unwrap();
        assert_eq!(Kick::new(writer).consume(), Kicked::Dead);
    }

    #[test]
    fn a_call_is_eight_bytes_and_a_full_or_closed_one_does_not_block_or_kill() {
        let (socket, end) = UnixStream::pair().unwrap();
        let call = Call::new(socket.into());
        call.signal();
        assert_eq!(recv(&end, &mut [0u8; 16], RecvFlags::DONTWAIT).unwrap().0, 8);
        for _ in 0..100_000 {
            call.signal();
        }
        drop(end);
        call.signal();

        let (reader, writer) = pipe().unwrap();
        let call = Call::new(writer);
        for _ in 0..100_000 {
            call.signal();
        }
        drop(reader);

        let full = eventfd(0, EventfdFlags::empty()).unwrap();
        write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        Call::new(full).signal();
    }
}
