//! From descriptors to a chain: translation, directions and limits, which are the same in both formats.
//!
//! Virtio 1.3, sections 2.7.5 and 2.8.5.

use std::sync::Arc;

use super::chain::Draft;
use super::ring::{DESCRIPTOR_SIZE, Descriptor, INDIRECT, NEXT, RingLimits, WRITE};
use crate::error::RingError;
use crate::memory::{Access, Segment, Snapshot, Unmapped, Untranslated};

/// What a ring needs to follow a chain.
#[derive(Debug)]
pub(super) struct Walk {
    pub(super) snapshot: Arc<Snapshot>,
    indirect: bool,
    limits: RingLimits,
    /// Indirect tables are copied here before they are looked at.
    table: Vec<u8>,
}

impl Walk {
    pub(super) fn new(snapshot: Arc<Snapshot>, indirect: bool, limits: RingLimits) -> Self {
        Self { snapshot, indirect, limits, table: Vec::new() }
    }

    /// Add the buffer of a descriptor to the chain if it is one as most are. False, and nothing happened, if it is not, or
    /// may not be there, or is a table: what then is to be done is out of line, so that it costs nothing here.
    #[inline(always)]
    pub(super) fn add_simple(&self, descriptor: Descriptor, draft: &mut Draft<'_>) -> bool {
        let Descriptor { address, length, flags, .. } = descriptor;
        if flags & INDIRECT != 0 {
            return false;
        }
        match self.snapshot.direct_piece(address, length.into()) {
            Some(segment) => draft.push_simple(segment, flags & WRITE != 0, self.limits.max_bytes),
            None => false,
        }
    }

    /// Add the buffer of a descriptor to the chain. `index` is where the descriptor is, for errors.
    #[inline(always)]
    pub(super) fn add<'a>(
        &self,
        index: u16,
        descriptor: Descriptor,
        mut draft: Draft<'a>,
    ) -> Result<Draft<'a>, Box<RingError>> {
        if self.add_simple(descriptor, &mut draft) { Ok(draft) } else { self.add_any(index, descriptor, draft) }
    }

    #[cold]
    #[inline(never)]
    fn add_any<'a>(
        &self,
        index: u16,
        descriptor: Descriptor,
        mut draft: Draft<'a>,
    ) -> Result<Draft<'a>, Box<RingError>> {
        if !draft.may_go_on(descriptor.flags & WRITE != 0) {
            return Err(readable_after_writable(index));
        }
        if let Err(reason) = draft.push_buffer(&self.snapshot, descriptor.address, descriptor.length) {
            return Err(self.untranslated(reason, index, descriptor));
        }
        if draft.bytes() > u64::from(self.limits.max_bytes) {
            return Err(self.too_large(draft.head(), draft.bytes()));
        }
        Ok(draft)
    }

    /// Check and copy the table that a descriptor with INDIRECT points to, and let `follow` add what is in it, which ends
    /// the chain.
    #[inline(never)]
    pub(super) fn indirect<'a>(
        &mut self,
        outer: u16,
        descriptor: Descriptor,
        draft: Draft<'a>,
        follow: impl FnOnce(&Self, &[[u8; DESCRIPTOR_SIZE as usize]], Draft<'a>) -> Result<(), Box<RingError>>,
    ) -> Result<(), Box<RingError>> {
        if !self.indirect {
            return Err(Box::new(RingError::IndirectNotNegotiated { descriptor: outer }));
        }
        if descriptor.flags & NEXT != 0 {
            let flags = descriptor.flags & (INDIRECT | NEXT);
            return Err(Box::new(RingError::IndirectWithNext { descriptor: outer, flags }));
        }
        let limit = self.limits.max_indirect * DESCRIPTOR_SIZE as u32;
        let length = descriptor.length;
        if length == 0 || !length.is_multiple_of(DESCRIPTOR_SIZE as u32) || length > limit {
            return Err(Box::new(RingError::IndirectLength { descriptor: outer, length, limit }));
        }
        let mut table = std::mem::take(&mut self.table);
        table.clear();
        table.resize(length as usize, 0);
        let mut copied = 0;
        let copy = |segment: Segment| {
            let piece = &mut table[copied..copied + segment.length];
            // SAFETY: the segment was translated just now, and `self.snapshot` keeps it mapped.
            unsafe { crate::memory::access::read(segment.pointer.as_ptr(), piece) };
            copied += segment.length;
        };
        let result = self
            .snapshot
            .resolve(descriptor.address, u64::from(length), Access::Read, copy)
            .map_err(|reason| self.untranslated(reason, outer, descriptor))
            .and_then(|()| follow(self, table.as_chunks().0, draft));
        self.table = table;
        result
    }

    #[cold]
    #[inline(never)]
    fn too_large(&self, head: u16, bytes: u64) -> Box<RingError> {
        Box::new(RingError::ChainTooLarge { head, bytes, limit: self.limits.max_bytes })
    }

    #[cold]
    #[inline(never)]
    fn untranslated(&self, reason: Untranslated, index: u16, descriptor: Descriptor) -> Box<RingError> {
        Box::new(untranslated(reason, &self.snapshot, index, descriptor.address, descriptor.length))
    }
}

#[cold]
#[inline(never)]
fn readable_after_writable(descriptor: u16) -> Box<RingError> {
    Box::new(RingError::ReadableAfterWritable { descriptor })
}

/// The error of a descriptor whose buffer, or table, is nowhere.
#[cold]
pub(super) fn untranslated(
    reason: Untranslated,
    snapshot: &Snapshot,
    descriptor: u16,
    start: u64,
    length: u32,
) -> RingError {
    match reason {
        Untranslated::Iommu(Unmapped::Miss { iova, access }) => {
            RingError::NotMapped { iova, writable: access == Access::Write }
        }
        Untranslated::Iommu(Unmapped::Denied { iova, access }) => {
            RingError::NotPermitted { descriptor, iova, writable: access == Access::Write }
        }
        Untranslated::Outside | Untranslated::Scattered(_) => RingError::OutsideMemory {
            descriptor,
            start,
            end: u128::from(start) + u128::from(length),
            memory: snapshot.describe(),
        },
    }
}

/// The two words of a descriptor in a table.
pub(super) fn words(entry: &[u8; DESCRIPTOR_SIZE as usize]) -> [u64; 2] {
    [0, 8].map(|start| u64::from_ne_bytes(std::array::from_fn(|byte| entry[start + byte])))
}

#[cold]
#[inline(never)]
pub(super) fn chain_too_long(head: u16, limit: u32) -> Box<RingError> {
    Box::new(RingError::ChainTooLong { head, limit })
}
