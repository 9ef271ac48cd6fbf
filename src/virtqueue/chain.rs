//! A descriptor chain, translated: the readable pieces of guest memory, then the writable ones.

use crate::memory::{Access, IovaRange, Segment, Snapshot, Untranslated, access, for_range};

/// One buffer that the driver made available. It is filled by a ring and may be reused for the next one.
///
/// The segments are valid as long as the memory snapshot of the ring that filled it; whoever keeps a chain keeps that.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    /// How many of the segments the device may read; the rest it may write.
    readable_segments: usize,
    readable: u64,
    writable: u64,
    /// Whether a writable descriptor was seen, be it an empty one.
    writing: bool,
    /// With an IOMMU, the I/O addresses that the segments come from.
    mapped: Vec<IovaRange>,
    resubmitted: bool,
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
        self.readable
    }

    /// Bytes that the device may write for the driver.
    #[must_use]
    pub fn writable(&self) -> u64 {
        self.writable
    }

    #[must_use]
    pub fn readable_segments(&self) -> &[Segment] {
        &self.segments[..self.readable_segments]
    }

    #[must_use]
    pub fn writable_segments(&self) -> &[Segment] {
        &self.segments[self.readable_segments..]
    }

    /// The I/O addresses that the segments come from. None without an IOMMU.
    #[must_use]
    pub fn mapped(&self) -> &[IovaRange] {
        &self.mapped
    }

    /// Copy from the readable part, starting at byte `offset` of it. Returns how many bytes there were.
    ///
    /// # Safety
    /// The snapshot under which the chain was filled must be alive.
    pub unsafe fn read(&self, offset: u64, to: &mut [u8]) -> usize {
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
    pub unsafe fn write(&self, offset: u64, from: &[u8]) -> usize {
        let mut done = 0;
        for_range(self.writable_segments(), offset, from.len(), |segment| {
            // SAFETY: as in `read`.
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

    pub(super) fn start(&mut self, head: u16) {
        self.head = head;
        self.segments.clear();
        self.readable_segments = 0;
        self.readable = 0;
        self.writable = 0;
        self.writing = false;
        self.mapped.clear();
        self.resubmitted = false;
    }

    /// The index by which the driver knows the chain, where that is the last that is known.
    pub(super) fn set_head(&mut self, head: u16) {
        self.head = head;
    }

    /// Whether a descriptor of this direction may follow: a readable one may not follow a writable one.
    pub(super) fn may_go_on(&mut self, writable: bool) -> bool {
        self.writing |= writable;
        writable == self.writing
    }

    /// Append the buffer of a descriptor: `length` bytes at the driver's `address`.
    #[inline]
    pub(super) fn push_buffer(
        &mut self,
        snapshot: &Snapshot,
        address: u64,
        length: u32,
        writable: bool,
    ) -> Result<(), Untranslated> {
        if snapshot.iotlb().is_none() {
            return Ok(snapshot.pieces(address, length.into(), |segment| self.push_segment(segment, writable))?);
        }
        self.push_mapped(snapshot, address, length, writable)
    }

    #[inline(never)]
    fn push_mapped(&mut self, snapshot: &Snapshot, iova: u64, length: u32, writable: bool) -> Result<(), Untranslated> {
        let access = Access::to_descriptor(writable);
        snapshot.resolve(iova, length.into(), access, |segment| self.push_segment(segment, writable))?;
        self.mapped.extend(IovaRange::new(iova, length.into()));
        Ok(())
    }

    #[inline]
    fn push_segment(&mut self, segment: Segment, writable: bool) {
        self.segments.push(segment);
        if writable {
            self.writable += segment.length as u64;
        } else {
            self.readable_segments += 1;
            self.readable += segment.length as u64;
        }
    }
}
