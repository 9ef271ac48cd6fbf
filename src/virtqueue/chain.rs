//! A descriptor chain, translated: the readable pieces of guest memory, then the writable ones.

use std::ptr::NonNull;

use crate::memory::{Access, IovaRange, Segment, Snapshot, Untranslated, access, for_range};

/// Segments that a chain has room for without an allocation: a header, data and a status. With them it fills little more
/// than a cache line, and a batch of chains stays in the fastest cache.
const FEW: usize = 3;

/// One buffer that the driver made available. It is filled by a ring and may be reused for the next one.
///
/// The segments are valid as long as the memory snapshot of the ring that filled it; whoever keeps a chain keeps that.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    resubmitted: bool,
    /// How many segments there are, and how many of them the device may read; the rest it may write.
    count: u32,
    readable_segments: u32,
    /// Bytes: a limit that is checked keeps them below 4 GiB.
    readable: u32,
    writable: u32,
    few: [Segment; FEW],
    more: Option<Box<More>>,
}

/// What most chains do not have.
#[derive(Debug, Default)]
struct More {
    /// All segments, if they are more than `few` has room for.
    segments: Vec<Segment>,
    /// With an IOMMU, the I/O addresses that the segments come from.
    mapped: Vec<IovaRange>,
}

/// What goes back to the driver: the chain that is done, and how many bytes were written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    pub head: u16,
    pub written: u32,
}

impl Chain {
    /// The index by which the driver knows the chain.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that the driver wrote for the device.
    #[must_use]
    pub fn readable(&self) -> u64 {
        self.readable.into()
    }

    /// Bytes that the device may write for the driver.
    #[must_use]
    pub fn writable(&self) -> u64 {
        self.writable.into()
    }

    #[must_use]
    pub fn readable_segments(&self) -> &[Segment] {
        &self.segments()[..self.readable_segments as usize]
    }

    #[must_use]
    pub fn writable_segments(&self) -> &[Segment] {
        &self.segments()[self.readable_segments as usize..]
    }

    fn segments(&self) -> &[Segment] {
        match (self.few.get(..self.count as usize), &self.more) {
            (Some(few), _) => few,
            (None, Some(more)) => &more.segments,
            (None, None) => &[],
        }
    }

    /// The I/O addresses that the segments come from. None without an IOMMU.
    #[must_use]
    pub fn mapped(&self) -> &[IovaRange] {
        self.more.as_ref().map_or(&[], |more| &more.mapped)
    }

    /// Copy from the readable part, starting at byte `offset` of it. Returns how many bytes there were.
    ///
    /// # Safety
    /// The snapshot under which the chain was filled must be alive.
    #[inline]
    pub unsafe fn read(&self, offset: u64, to: &mut [u8]) -> usize {
        if let Some(pointer) = within_first(self.readable_segments(), offset, to.len()) {
            // SAFETY: as in `read_pieces`.
            unsafe { access::read(pointer.as_ptr(), to) };
            return to.len();
        }
        // SAFETY: as the caller vouches.
        unsafe { self.read_pieces(offset, to) }
    }

    /// # Safety
    /// As for [`read`](Self::read).
    #[inline(never)]
    unsafe fn read_pieces(&self, offset: u64, to: &mut [u8]) -> usize {
        let mut done = 0;
        for_range(self.readable_segments(), offset, to.len(), |segment| {
            // SAFETY: the ring translated the segment, and the caller keeps the snapshot alive.
            unsafe { access::read(segment.pointer.as_ptr(), &mut to[done..done + segment.length]) };
            done += segment.length;
        });
        done
    }

    /// Copy into the writable part, starting at byte `offset` of it. Returns how many bytes fitted.
    ///
    /// # Safety
    /// The snapshot under which the chain was filled must be alive.
    #[inline]
    pub unsafe fn write(&self, offset: u64, from: &[u8]) -> usize {
        if let Some(pointer) = within_first(self.writable_segments(), offset, from.len()) {
            // SAFETY: as in `read_pieces`.
            unsafe { access::write(pointer.as_ptr(), from) };
            return from.len();
        }
        // SAFETY: as the caller vouches.
        unsafe { self.write_pieces(offset, from) }
    }

    /// # Safety
    /// As for [`write`](Self::write).
    #[inline(never)]
    unsafe fn write_pieces(&self, offset: u64, from: &[u8]) -> usize {
        let mut done = 0;
        for_range(self.writable_segments(), offset, from.len(), |segment| {
            // SAFETY: as in `read_pieces`.
            unsafe { access::write(segment.pointer.as_ptr(), &from[done..done + segment.length]) };
            done += segment.length;
        });
        done
    }

    /// Whether a device that was killed had taken it already, and may have begun to work on it.
    #[must_use]
    pub fn resubmitted(&self) -> bool {
        self.resubmitted
    }

    pub(super) fn set_resubmitted(&mut self) {
        self.resubmitted = true;
    }

    /// The index by which the driver knows the chain, where that is the last that is known.
    pub(super) fn set_head(&mut self, head: u16) {
        self.head = head;
    }

    /// The chain, and an empty one in its place: what an empty one has no use for is not written.
    #[must_use]
    #[inline]
    pub fn take(&mut self) -> Self {
        let taken = Self { more: self.more.take(), ..*self };
        (self.count, self.readable_segments) = (0, 0);
        (self.readable, self.writable) = (0, 0);
        taken
    }

    #[cold]
    #[inline(never)]
    fn push_more(&mut self, segment: Segment) {
        let segments = &mut self.more.get_or_insert_default().segments;
        if segments.is_empty() {
            segments.extend(self.few);
        }
        segments.push(segment);
    }
}

/// Where `length` bytes from `offset` on are, if they are all in the first segment: a header, or a status by itself.
#[inline]
fn within_first(segments: &[Segment], offset: u64, length: usize) -> Option<NonNull<u8>> {
    let first = segments.first()?;
    let offset = usize::try_from(offset).ok()?;
    let is_within = offset.checked_add(length).is_some_and(|end| end <= first.length);
    // SAFETY: the offset is within the segment, or at its end.
    is_within.then(|| unsafe { first.pointer.add(offset) })
}

impl Default for Chain {
    fn default() -> Self {
        let nowhere = Segment { pointer: NonNull::dangling(), length: 0 };
        Self {
            head: 0,
            resubmitted: false,
            count: 0,
            readable_segments: 0,
            readable: 0,
            writable: 0,
            few: [nowhere; FEW],
            more: None,
        }
    }
}

/// A chain that is being put together. What changes with every descriptor is here, in registers.
pub(super) struct Draft<'a> {
    chain: &'a mut Chain,
    /// Segments and bytes, and those of them that are readable.
    count: u32,
    readable_segments: u32,
    bytes: u64,
    readable: u32,
    /// Whether a writable descriptor was seen, be it an empty one.
    writing: bool,
}

impl<'a> Draft<'a> {
    #[inline(always)]
    pub(super) fn new(chain: &'a mut Chain, head: u16) -> Self {
        chain.head = head;
        chain.resubmitted = false;
        (chain.count, chain.readable_segments) = (0, 0);
        (chain.readable, chain.writable) = (0, 0);
        if let Some(more) = &mut chain.more {
            more.segments.clear();
            more.mapped.clear();
        }
        Self { chain, count: 0, readable_segments: 0, bytes: 0, readable: 0, writing: false }
    }

    pub(super) fn head(&self) -> u16 {
        self.chain.head
    }

    /// Bytes, readable and writable together.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Append a buffer as most are: in one piece, where the chain has room for it, and no more than `limit` bytes with
    /// those before it. False, and nothing happened, of any other.
    #[inline(always)]
    pub(super) fn push_simple(&mut self, segment: Segment, writable: bool, limit: u32) -> bool {
        let bytes = self.bytes + segment.length as u64;
        if bytes > limit.into() || !writable && self.writing {
            return false;
        }
        let Some(place) = self.chain.few.get_mut(self.count as usize) else { return false };
        *place = segment;
        self.count += 1;
        self.bytes = bytes;
        self.end(writable);
        true
    }

    /// Whether a descriptor of this direction may follow: a readable one may not follow a writable one.
    pub(super) fn may_go_on(&mut self, writable: bool) -> bool {
        self.writing |= writable;
        writable == self.writing
    }

    /// Append the buffer of a descriptor that may follow: `length` bytes at the driver's `address`.
    pub(super) fn push_buffer(&mut self, snapshot: &Snapshot, address: u64, length: u32) -> Result<(), Untranslated> {
        let access = Access::to_descriptor(self.writing);
        snapshot.resolve(address, length.into(), access, |segment| self.push(segment))?;
        if snapshot.iotlb().is_some() {
            self.chain.more.get_or_insert_default().mapped.extend(IovaRange::new(address, length.into()));
        }
        self.bytes += u64::from(length);
        self.end(self.writing);
        Ok(())
    }

    fn push(&mut self, segment: Segment) {
        match self.chain.few.get_mut(self.count as usize) {
            Some(place) => *place = segment,
            None => self.chain.push_more(segment),
        }
        self.count += 1;
    }

    /// What was appended is the end of the readable part, or of the writable one.
    #[inline(always)]
    fn end(&mut self, writable: bool) {
        if writable {
            self.writing = true;
        } else {
            (self.readable_segments, self.readable) = (self.count, self.bytes as u32);
        }
    }

    /// The chain has no more descriptors, and was found to be no longer than the limit.
    #[inline(always)]
    pub(super) fn finish(self) {
        (self.chain.count, self.chain.readable_segments) = (self.count, self.readable_segments);
        (self.chain.readable, self.chain.writable) = (self.readable, self.bytes as u32 - self.readable);
    }
}
