//! What several targets need: descriptors of every kind, and a look at what is left over.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Once;
use std::time::{Duration, Instant};

use arbitrary::Unstructured;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, Mode, OFlags, ftruncate, memfd_create, open};
use rustix::pipe::pipe;
use vhost_user::virtqueue::RingOptions;

/// What decodes an input.
pub type Input<'a> = Unstructured<'a>;

/// What this process has open and mapped of guest memory.
#[derive(Debug, PartialEq, Eq)]
pub struct Belongings {
    descriptors: usize,
    mappings: usize,
}

impl Belongings {
    pub fn now() -> Self {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        Self {
            descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
            mappings: maps.lines().filter(|line| line.contains(MEMORY)).count(),
        }
    }
}

/// Run a target, after which there has to be as much as before: soon, as the thread that looks after writes to peers may
/// have their descriptors just then.
pub fn level(target: impl FnOnce()) {
    ignore_broken_pipes();
    let before = Belongings::now();
    target();
    let deadline = Instant::now() + Duration::from_secs(1);
    while Belongings::now() != before && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(Belongings::now(), before, "something was left over");
}

/// Run a target that decodes its input as it goes on. It ends where the bytes do, in the middle of whatever.
pub fn feed(input: &[u8], target: impl FnOnce(&mut Input<'_>) -> arbitrary::Result<()>) {
    level(|| {
        let _ = target(&mut Input::new(input));
    });
}

/// As Python does: a peer's descriptor may be a pipe that nobody reads.
fn ignore_broken_pipes() {
    static ONCE: Once = Once::new();
    // SAFETY: no handler is installed, and nothing here wants this signal.
    ONCE.call_once(|| unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
    });
}

/// Of memory files that peers send.
const MEMORY: &str = "memfd:fuzzed";

pub fn memory_file(size: u64) -> OwnedFd {
    let file = memfd_create("fuzzed", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, size).unwrap();
    file
}

pub fn event(flags: EventfdFlags) -> OwnedFd {
    eventfd(0, flags | EventfdFlags::CLOEXEC).unwrap()
}

/// Something to send instead of what the peer expects.
pub fn strange_descriptor(input: &mut Input<'_>) -> arbitrary::Result<OwnedFd> {
    Ok(match input.int_in_range(0..=8)? {
        0 => event(EventfdFlags::NONBLOCK),
        1 => event(EventfdFlags::empty()),
        2 => UnixStream::pair().unwrap().0.into(),
        3 => pipe().unwrap().0,
        4 => pipe().unwrap().1,
        5 => memory_file(0),
        6 => memory_file(input.int_in_range(0..=0x3000)?),
        7 => open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap(),
        _ => open("/", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap(),
    })
}

/// A number at which something begins or ends, a small one, or any.
pub fn number(input: &mut Input<'_>) -> arbitrary::Result<u64> {
    const EDGES: [u64; 12] =
        [0, 1, 0x0fff, 0x1000, 0x7fff, 0x8000, 0xffff, 0x1_0000, 0xffff_ffff, 1 << 63, u64::MAX - 0xfff, u64::MAX];
    Ok(match input.int_in_range(0..=3)? {
        0 => *input.choose(&EDGES)?,
        1 | 2 => input.int_in_range(0..=300)?,
        _ => input.arbitrary()?,
    })
}

/// Two decisions, of one byte.
pub fn two(input: &mut Input<'_>) -> arbitrary::Result<(bool, bool)> {
    let byte: u8 = input.arbitrary()?;
    Ok((byte & 1 != 0, byte & 2 != 0))
}

/// The bytes of a number in the order that a ring has them in.
pub fn in_order_of<const N: usize>(options: RingOptions, mut little: [u8; N]) -> [u8; N] {
    if options.big_endian {
        little.reverse();
    }
    little
}

/// Copies of descriptors, as a message takes them.
pub fn borrowed(descriptors: &[OwnedFd]) -> Vec<std::os::fd::BorrowedFd<'_>> {
    descriptors.iter().map(AsFd::as_fd).collect()
}
