//! Guest memory that this process makes and shares, and an allocator for it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::lock;
use crate::error::Error;
use crate::memory::{Segment, Snapshot, access};
use crate::protocol::Region;

/// Where guest memory begins if nobody says otherwise, and what user addresses have more than guest addresses. The three
/// address spaces differ, so that nobody confuses them and gets away with it.
const START: u64 = 0x4000_0000;
const USER: u64 = 0x7000_0000_0000;

const PAGE: u64 = 4096;
/// Allocations do not share a cache line.
const GRANULE: u64 = 64;

/// An address space made of sealed memory files: a back-end may rely on their size.
#[derive(Debug)]
pub struct Memory {
    snapshot: Arc<Snapshot>,
    regions: Vec<Region>,
    files: Vec<OwnedFd>,
    /// By address, never reaching over the end of a region.
    free: Mutex<Vec<Extent>>,
}

#[derive(Clone, Copy, Debug)]
struct Extent {
    start: u64,
    end: u64,
}

impl Memory {
    /// One region of `bytes`, rounded up to whole pages.
    pub fn new(bytes: u64) -> Result<Self, Error> {
        Self::with_layout(&[(START, bytes.next_multiple_of(PAGE))])
    }

    /// A region for each guest address and size, which must be multiples of the page size.
    pub fn with_layout(layout: &[(u64, u64)]) -> Result<Self, Error> {
        let mut regions = Vec::new();
        let mut files = Vec::new();
        for &(guest_address, size) in layout {
            if guest_address % PAGE != 0 || size % PAGE != 0 || guest_address > USER {
                return Err(Error::State(format!(
                    "a region of {size:#x} bytes at guest address {guest_address:#x}: both must be multiples of {PAGE}, \
                     and the address at most {USER:#x}"
                )));
            }
            let file = memfd_create("guest-memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
                .map_err(Error::os("making a memory file"))?;
            ftruncate(&file, size).map_err(Error::os(format!("making a memory file of {size:#x} bytes")))?;
            fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)
                .map_err(Error::os("sealing a memory file"))?;
            regions.push(Region { guest_address, size, user_address: USER + guest_address, file_offset: 0 });
            files.push(file);
        }
        let snapshot = Arc::new(Snapshot::from_table(&regions, &files)?);
        let mut free: Vec<_> = layout.iter().map(|&(start, size)| Extent { start, end: start + size }).collect();
        free.sort_by_key(|extent| extent.start);
        Ok(Self { snapshot, regions, files, free: Mutex::new(free) })
    }

    /// What a back-end is told, with the file of each region.
    pub fn regions(&self) -> impl ExactSizeIterator<Item = (Region, BorrowedFd<'_>)> {
        self.regions.iter().copied().zip(self.files.iter().map(AsFd::as_fd))
    }

    #[must_use]
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// By which user address a back-end is told of a guest address.
    #[must_use]
    pub fn user_address(guest_address: u64) -> u64 {
        USER + guest_address
    }

    /// Take `bytes` at a multiple of `alignment`, a power of two, in one region. What was there before is still there.
    pub fn allocate(self: &Arc<Self>, bytes: u64, alignment: u64) -> Result<Allocation, Error> {
        let mut free = lock(&self.free);
        let length = bytes.clamp(1, u64::MAX / 2).next_multiple_of(GRANULE);
        let fit = |extent: &Extent| {
            let start = extent.start.checked_next_multiple_of(alignment.max(GRANULE))?;
            let end = start.checked_add(length)?;
            (end <= extent.end).then_some((start, end))
        };
        let Some((at, (start, end))) = free.iter().enumerate().find_map(|(at, extent)| Some((at, fit(extent)?))) else {
            let left: u64 = free.iter().map(|extent| extent.end - extent.start).sum();
            return Err(Error::State(format!("no room for {bytes} bytes in shared memory, of which {left} are free")));
        };
        let before = Extent { end: start, ..free[at] };
        let after = Extent { start: end, ..free[at] };
        free.splice(at..=at, [before, after].into_iter().filter(|extent| extent.start < extent.end));
        let pointer = self.snapshot.user_pointer(Self::user_address(start), length);
        let pointer = pointer.ok_or_else(|| Error::Memory("the allocator left its memory".to_owned()))?;
        let segment = Segment { pointer, length: length as usize };
        Ok(Allocation { memory: Arc::clone(self), address: start, segment })
    }

    fn release(&self, mut extent: Extent) {
        let mut free = lock(&self.free);
        let is_border = |address| self.regions.iter().any(|region| region.guest_address == address);
        let mut at = free.partition_point(|other| other.start < extent.start);
        if free.get(at).is_some_and(|next| next.start == extent.end) && !is_border(extent.end) {
            extent.end = free.remove(at).end;
        }
        if at > 0 && free[at - 1].end == extent.start && !is_border(extent.start) {
            at -= 1;
            extent.start = free.remove(at).start;
        }
        free.insert(at, extent);
    }

    /// Copy from guest memory, wherever that is.
    pub fn read(&self, address: u64, to: &mut [u8]) -> Result<(), Error> {
        let length = to.len();
        let mut done = 0;
        let copy = |segment: Segment| {
            // SAFETY: the segment was translated just now, and `self.snapshot` keeps it mapped.
            unsafe { access::read(segment.pointer.as_ptr(), &mut to[done..done + segment.length]) };
            done += segment.length;
        };
        let translated = self.snapshot.pieces(address, length as u64, copy);
        translated.map_err(|_| self.outside(address, length))
    }

    /// Copy to guest memory, wherever that is.
    pub fn write(&self, address: u64, from: &[u8]) -> Result<(), Error> {
        let mut done = 0;
        let copy = |segment: Segment| {
            // SAFETY: as in `read`.
            unsafe { access::write(segment.pointer.as_ptr(), &from[done..done + segment.length]) };
            done += segment.length;
        };
        let translated = self.snapshot.pieces(address, from.len() as u64, copy);
        translated.map_err(|_| self.outside(address, from.len()))
    }

    fn outside(&self, address: u64, length: usize) -> Error {
        let memory = self.snapshot.describe();
        Error::Memory(format!("{length} bytes at guest address {address:#x} are not inside guest memory ({memory})"))
    }
}

/// A contiguous piece of guest memory. It is free again when this is dropped: do that after the device is done with it.
#[derive(Debug)]
pub struct Allocation {
    memory: Arc<Memory>,
    address: u64,
    segment: Segment,
}

impl Allocation {
    /// The guest address.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes, at least as many as were asked for.
    #[must_use]
    pub fn len(&self) -> usize {
        self.segment.length
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Copy to `offset`. Panics if that is not inside.
    pub fn write(&self, offset: usize, from: &[u8]) {
        assert!(offset <= self.segment.length && from.len() <= self.segment.length - offset);
        // SAFETY: the range is inside the segment, as was just checked, and `self.memory` keeps it mapped.
        unsafe { access::write(self.segment.pointer.add(offset).as_ptr(), from) }
    }

    /// Append `length` bytes from `offset` on to `to`. Panics if those are not inside.
    pub fn read(&self, offset: usize, length: usize, to: &mut Vec<u8>) {
        assert!(offset <= self.segment.length && length <= self.segment.length - offset);
        let start = to.len();
        to.resize(start + length, 0);
        // SAFETY: as in `write`.
        unsafe { access::read(self.segment.pointer.add(offset).as_ptr(), &mut to[start..]) }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        self.memory.release(Extent { start: self.address, end: self.address + self.segment.length as u64 });
    }
}
