//! Kick, call and error descriptors.
//!
//! An eventfd is the usual kind, but only "reads and writes of 8 bytes" is promised: User-Mode Linux passes socket
//! ends and blocking eventfds. Nothing here blocks on a peer's descriptor for longer than a moment, nor changes its flags,
//! which the peer shares.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat, readlink};
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev2, read};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::channel::{Channel, Notification};
use super::guard::Guarded;
use crate::process::Process;

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

/// Whether it is an eventfd. What cannot be told is none.
fn is_eventfd(descriptor: &OwnedFd) -> bool {
    let link = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
    readlink(link, Vec::new()).is_ok_and(|target| target.as_bytes() == b"anon_inode:[eventfd]")
}

/// Kicks of an eventfd that are left in it, and the most that as few of them may have added to it.
const UNREAD: u32 = 1 << 10;
const MODEST: u64 = 1 << 40;

/// Of another descriptor as much is read for one event as fits in the usual socket or pipe, where kicks are 8 bytes. What
/// has no end is left.
const READS: usize = 512;
const AT_ONCE: usize = 512;

/// What became of a kick descriptor that was ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kicked {
    Yes,
    /// Somebody else read it first.
    No,
    /// It will never kick again: the peer closed it, or it is of a kind that cannot be read.
    Dead,
}

/// Where a driver's kicks come from. It is to be watched for edges, and consumed after each.
///
/// Every write to an eventfd is an edge, whatever was in it before, so that it need not be read. But a full one would block
/// who writes: it is read now and then, and always once a large number came.
#[derive(Debug)]
pub struct Kick {
    process: Process,
    descriptor: OwnedFd,
    kind: Kind,
    is_eventfd: bool,
    /// Whether only small numbers came.
    is_modest: bool,
    /// How many more kicks need not be read.
    spared: u32,
}

impl Kick {
    pub fn new(descriptor: OwnedFd) -> Self {
        Self {
            process: Process::current(),
            kind: kind_of(&descriptor),
            is_eventfd: is_eventfd(&descriptor),
            is_modest: true,
            spared: 0,
            descriptor,
        }
    }

    /// The descriptor became readable.
    pub fn consume(&mut self) -> Kicked {
        if self.spared > 0 {
            self.spared -= 1;
            return Kicked::Yes;
        }
        if self.is_eventfd { self.consume_counter() } else { self.consume_stream() }
    }

    fn consume_counter(&mut self) -> Kicked {
        let mut count = [0; 8];
        let outcome = self.read(&mut count);
        if outcome == Ok(count.len()) {
            self.is_modest &= u64::from_ne_bytes(count) <= MODEST;
            self.spared = if self.is_modest { UNREAD } else { 0 };
        }
        kicked(outcome)
    }

    fn consume_stream(&self) -> Kicked {
        let mut space = [0; AT_ONCE];
        let first = kicked(self.read(&mut space));
        if first == Kicked::Yes {
            (1..READS).take_while(|_| matches!(self.read(&mut space), Ok(1..))).for_each(drop);
        }
        first
    }

    fn read(&self, space: &mut [u8]) -> Result<usize, Errno> {
        match self.kind {
            Kind::Socket => recv(&self.descriptor, space, RecvFlags::DONTWAIT).map(|(count, _)| count),
            // What did not block when it came may by now.
            Kind::NonBlocking | Kind::Blocking => {
                match preadv2(&self.descriptor, &mut [IoSliceMut::new(space)], u64::MAX, ReadWriteFlags::NOWAIT) {
                    Err(Errno::OPNOTSUPP) if is_ready(&self.descriptor, PollFlags::IN) => read(&self.descriptor, space),
                    Err(Errno::OPNOTSUPP) => Err(Errno::AGAIN),
                    other => other,
                }
            }
        }
    }
}

fn kicked(outcome: Result<usize, Errno>) -> Kicked {
    match outcome {
        Ok(0) => Kicked::Dead,
        Ok(_) => Kicked::Yes,
        Err(Errno::AGAIN | Errno::INTR) => Kicked::No,
        Err(_) => Kicked::Dead,
    }
}

impl Drop for Kick {
    /// Who has an eventfd afterwards, say a front-end that does the work itself, should not take what was left in it for a
    /// kick. In a forked child it is its parent's.
    fn drop(&mut self) {
        if self.is_eventfd && self.process.is_current() {
            let _ = self.read(&mut [0; 8]);
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
        let (kind, is_eventfd) = (kind_of(&descriptor), is_eventfd(&descriptor));
        Self::Descriptor(Notifier { kind, is_eventfd, guarded: Guarded::new(descriptor) })
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
    guarded: Arc<Guarded>,
    kind: Kind,
    is_eventfd: bool,
}

impl Notifier {
    /// Write 8 bytes, once. A full descriptor has unread notifications, and a closed one has no reader: neither is an
    /// error of ours.
    fn signal(&self) {
        let one = 1u64.to_ne_bytes();
        let descriptor = self.guarded.descriptor();
        match self.kind {
            Kind::Socket => drop(send(descriptor, &one, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)),
            Kind::NonBlocking if self.is_eventfd => self.guarded.write(&one),
            Kind::NonBlocking | Kind::Blocking => {
                let written = pwritev2(descriptor, &[IoSlice::new(&one)], u64::MAX, ReadWriteFlags::NOWAIT);
                if written == Err(Errno::OPNOTSUPP) && is_ready(descriptor, PollFlags::OUT) {
                    self.guarded.write(&one);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::fcntl_setfl;
    use rustix::io::{dup, write};
    use rustix::pipe::pipe;

    use super::*;

    #[test]
    fn the_first_kick_is_read_from_every_kind_of_descriptor_without_ever_waiting() {
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
            let mut kick = Kick::new(ours);
            assert_eq!(kick.consume(), Kicked::No, "{:?}", kick.kind);
            assert_eq!(write(&theirs, &1u64.to_ne_bytes()), Ok(8));
            assert_eq!(kick.consume(), Kicked::Yes, "{:?}", kick.kind);
            assert!(!is_ready(&kick.descriptor, PollFlags::IN), "{:?}", kick.kind);
        }
    }

    #[test]
    fn a_stream_is_emptied_by_one_kick_but_not_one_that_has_no_end() {
        let (socket, end) = UnixStream::pair().unwrap();
        let mut kick = Kick::new(socket.into());
        for _ in 0..200 {
            assert_eq!(write(&end, &1u64.to_ne_bytes()), Ok(8));
        }
        assert_eq!(kick.consume(), Kicked::Yes);
        assert_eq!(kick.consume(), Kicked::No);

        let zeroes = rustix::fs::open("/dev/zero", OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
        assert_eq!(Kick::new(zeroes).consume(), Kicked::Yes);
    }

    #[test]
    fn kicks_of_an_eventfd_are_left_in_it_and_taken_out_now_and_then_and_at_the_end() {
        let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let mut kick = Kick::new(dup(&event).unwrap());
        let mut most = 0;
        for _ in 0..3 * u64::from(UNREAD) {
            write(&event, &1u64.to_ne_bytes()).unwrap();
            assert_eq!(kick.consume(), Kicked::Yes);
            let mut left = [0; 8];
            if read(&event, &mut left).is_ok() {
                write(&event, &left).unwrap();
            }
            most = most.max(u64::from_ne_bytes(left));
        }
        assert_eq!(most, u64::from(UNREAD));
        drop(kick);
        assert_eq!(read(&event, &mut [0; 8]), Err(Errno::AGAIN));
    }

    #[test]
    fn an_eventfd_that_large_numbers_are_added_to_is_never_full() {
        let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let mut kick = Kick::new(dup(&event).unwrap());
        for _ in 0..3 {
            for number in [u64::MAX - 1, 1] {
                assert_eq!(write(&event, &number.to_ne_bytes()), Ok(8));
                assert_eq!(kick.consume(), Kicked::Yes);
            }
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

    #[test]
    fn a_descriptor_that_is_made_to_block_holds_nobody_up_for_long() {
        for end in ["eventfd", "pipe"] {
            let (theirs, ours, filling) = match end {
                "eventfd" => {
                    let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
                    (dup(&event).unwrap(), event, (u64::MAX - 1).to_ne_bytes().to_vec())
                }
                _ => {
                    let (reader, writer) = pipe().unwrap();
                    fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
                    (reader, writer, vec![0; 1 << 16])
                }
            };
            let writer = dup(&ours).unwrap();
            let call = Call::new(ours);
            write(&writer, &filling).unwrap();
            fcntl_setfl(&writer, OFlags::empty()).unwrap();
            call.signal();
            call.signal();
            drop(theirs);
        }
        let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let mut kick = Kick::new(dup(&event).unwrap());
        fcntl_setfl(&event, OFlags::empty()).unwrap();
        assert_eq!(kick.consume(), Kicked::No);
    }
}
