//! A part of a ring: in one piece in this process, whatever it is in guest memory.
//!
//! Behind an IOMMU a driver's memory is contiguous for its device alone: Linux takes any pages for a ring. Those are mapped
//! a second time, side by side, so that nobody who works on a ring has to know.

use std::fmt;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::mm::{MapFlags, MremapFlags, ProtFlags, mmap_anonymous, mremap_fixed, munmap};

use super::fault;
use super::region::Region;
use super::snapshot::Segment;

/// Where a part of a ring is. Its pointer is valid as long as the part and the snapshot that made it.
#[derive(Debug)]
pub struct Part {
    pointer: NonNull<u8>,
    /// The guest address and the length of each piece.
    pieces: Box<[(u64, u64)]>,
    /// If there are several.
    _joined: Option<Joined>,
}

// SAFETY: a Part is address ranges. It hands out raw pointers, and what is read or written through them is shared with
// another process in any case.
unsafe impl Send for Part {}
// SAFETY: as above; no method changes the Part.
unsafe impl Sync for Part {}

impl Part {
    /// Of `pieces`, in their order, each with its region. There is at least one.
    pub(super) fn new(pieces: &[(Arc<Region>, Segment)]) -> Result<Self, Apart> {
        let guest = |(region, segment): &(Arc<Region>, Segment)| {
            let offset = region.offset_of(segment.pointer).unwrap_or_default();
            (region.start() + offset, segment.length as u64)
        };
        let (pointer, joined) = match pieces {
            [(_, only)] => (only.pointer, None),
            several => {
                let joined = Joined::new(several)?;
                (joined.start, Some(joined))
            }
        };
        Ok(Self { pointer, pieces: pieces.iter().map(guest).collect(), _joined: joined })
    }

    /// The first byte.
    #[must_use]
    pub fn pointer(&self) -> NonNull<u8> {
        self.pointer
    }

    /// Call `range` with each range of guest addresses that `length` bytes from `offset` on have: where it begins, and its
    /// length.
    pub fn guest_ranges(&self, mut offset: u64, mut length: u64, mut range: impl FnMut(u64, u64)) {
        for (address, size) in &self.pieces {
            if offset < *size && length > 0 {
                let here = length.min(size - offset);
                range(address + offset, here);
                length -= here;
                offset = 0;
            } else {
                offset = offset.saturating_sub(*size);
            }
        }
    }
}

/// Why pieces of memory cannot be put side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Apart {
    /// They do not begin and end where pages do.
    NotPages,
    /// A page of theirs has that many bytes, and they are smaller.
    LargePages(usize),
    Refused(Errno),
}

impl fmt::Display for Apart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotPages => f.write_str("in pieces that are not whole pages"),
            Self::LargePages(size) => write!(f, "in pieces smaller than its pages of {size:#x} bytes"),
            Self::Refused(errno) => write!(f, "and the kernel does not map it a second time: {errno}"),
        }
    }
}

/// Pieces of regions, mapped a second time, side by side.
#[derive(Debug)]
struct Joined {
    /// The first byte that was asked for.
    start: NonNull<u8>,
    /// What is reserved, and in the end mapped.
    pages: NonNull<u8>,
    pages_length: usize,
    watched: Vec<&'static fault::Watched>,
    /// Whoever finds a page lost tells of it here.
    _regions: Vec<Arc<Region>>,
}

impl Joined {
    fn new(pieces: &[(Arc<Region>, Segment)]) -> Result<Self, Apart> {
        let page = rustix::param::page_size();
        let slack = pieces.first().map_or(0, |(_, segment)| segment.pointer.addr().get() % page);
        let mut end = slack;
        for (at, (region, segment)) in pieces.iter().enumerate() {
            if region.pages().page != page {
                return Err(Apart::LargePages(region.pages().page));
            }
            // Every piece but the first one begins with a page, and with that all but the last one end with one.
            if at > 0 && !(end | segment.pointer.addr().get()).is_multiple_of(page) {
                return Err(Apart::NotPages);
            }
            end += segment.length;
        }
        let pages_length = end.next_multiple_of(page);
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing.
        let reserved = unsafe {
            mmap_anonymous(ptr::null_mut(), pages_length, ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE)
        }
        .map_err(Apart::Refused)?;
        let pages = NonNull::new(reserved.cast::<u8>()).ok_or(Apart::Refused(Errno::NOMEM))?;
        // SAFETY: `slack < page <= pages_length`, so the pointer stays inside the mapping.
        let start = unsafe { pages.add(slack) };
        let regions = pieces.iter().map(|(region, _)| Arc::clone(region)).collect();
        let mut joined = Self { start, pages, pages_length, watched: Vec::new(), _regions: regions };
        let mut at = 0;
        for (region, segment) in pieces {
            let before = segment.pointer.addr().get() % page;
            let length = (before + segment.length).next_multiple_of(page);
            // SAFETY: the segment is in the region, and whole pages are mapped for it: so are the bytes before it in its
            // first page, and those after it in its last one.
            let from = unsafe { segment.pointer.sub(before) };
            // SAFETY: the lengths of the pieces add up to `pages_length`: all but the last one end with a page, or the sum
            // is rounded up with the last one.
            let to = unsafe { pages.add(at) };
            // SAFETY: as for `from`; and `to` is ours, with that many bytes left.
            unsafe { alias(from, to, length, page) }.map_err(Apart::Refused)?;
            let first = to.addr().get();
            joined.watched.push(fault::watch(first, first + length, page, Some(region.watched())));
            at += length;
        }
        Ok(joined)
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        for watched in &self.watched {
            watched.forget();
        }
        // SAFETY: the range is the one that `new` made. Whoever holds a pointer into it holds the part as well.
        if let Err(errno) = unsafe { munmap(self.pages.as_ptr().cast(), self.pages_length) } {
            log::error!("munmap of a ring failed: {errno}");
        }
    }
}

/// Map `length` bytes of shared memory at `from` a second time at `to`, instead of what is there.
///
/// # Safety
/// `from` and `length` are whole pages of `page` bytes that are mapped, and stay so during the call; `length` bytes at `to`
/// are mapped, and nobody has a pointer into them.
unsafe fn alias(from: NonNull<u8>, to: NonNull<u8>, length: usize, page: usize) -> Result<(), Errno> {
    for at in (0..length).step_by(page) {
        // Pages that come when somebody touches them (postcopy) come here: at `to` nobody would bring them.
        // SAFETY: `at < length`, and the caller vouches for these bytes.
        let _ = unsafe { from.add(at).read_volatile() };
    }
    // A mapping that is moved, and has no size, is shared memory that stays where it is as well: mremap(2).
    // SAFETY: the caller vouches for both ranges; what is replaced at `to` was reserved for this.
    unsafe { mremap_fixed(from.as_ptr().cast(), 0, length, MremapFlags::MAYMOVE, to.as_ptr().cast()) }.map(drop)
}
