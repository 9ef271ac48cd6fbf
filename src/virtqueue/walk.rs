//! From descriptors to a chain: translation, directions and limits, which are the same in both formats.
//!
//! Virtio 1.3, sections 2.7.5 and 2.8.5.

use std::sync::Arc;

use super::chain::Chain;
use super::ring::{DESCRIPTOR_SIZE, Descriptor, INDIRECT, NEXT, RingLimits, WRITE};
use crate::error::RingError;
use crate::memory::{Segment, Snapshot};

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

    /// Add what a descriptor points to to the chain. `index` is where the descriptor is, for errors.
    #[inline]
    pub(super) fn add(&mut self, index: u16, descriptor: Descriptor, chain: &mut Chain) -> Result<(), RingError> {
        let writable = descriptor.flags & WRITE != 0;
        if !chain.may_go_on(writable) {
            return Err(RingError::ReadableAfterWritable { descriptor: index });
        }
        self.snapshot
            .pieces(descriptor.address, u64::from(descriptor.length), |segment| {
                chain.push_segment(segment, writable);
            })
            .map_err(|_| self.outside(index, descriptor))?;
        let bytes = chain.readable() + chain.writable();
        if bytes > u64::from(self.limits.max_bytes) {
            return Err(RingError::ChainTooLarge { head: chain.head(), bytes, limit: self.limits.max_bytes });
        }
        Ok(())
    }

    /// Check and copy the table that a descriptor with INDIRECT points to, and let `follow` add what is in it.
    pub(super) fn indirect(
        &mut self,
        outer: u16,
        descriptor: Descriptor,
        chain: &mut Chain,
        follow: impl FnOnce(&mut Self, &[[u8; DESCRIPTOR_SIZE as usize]], &mut Chain) -> Result<(), RingError>,
    ) -> Result<(), RingError> {
        if !self.indirect {
            return Err(RingError::IndirectNotNegotiated { descriptor: outer });
        }
        if descriptor.flags & NEXT != 0 {
            return Err(RingError::IndirectWithNext { descriptor: outer, flags: descriptor.flags & (INDIRECT | NEXT) });
        }
        let limit = self.limits.max_indirect * DESCRIPTOR_SIZE as u32;
        let length = descriptor.length;
        if length == 0 || !length.is_multiple_of(DESCRIPTOR_SIZE as u32) || length > limit {
            return Err(RingError::IndirectLength { descriptor: outer, length, limit });
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
            .pieces(descriptor.address, u64::from(length), copy)
            .map_err(|_| self.outside(outer, descriptor))
            .and_then(|()| follow(self, table.as_chunks().0, chain));
        self.table = table;
        result
    }

    #[cold]
    fn outside(&self, index: u16, descriptor: Descriptor) -> RingError {
        RingError::OutsideMemory {
            descriptor: index,
            start: descriptor.address,
            end: u128::from(descriptor.address) + u128::from(descriptor.length),
            memory: self.snapshot.describe(),
        }
    }
}

/// The two words of a descriptor in a table.
pub(super) fn words(entry: &[u8; DESCRIPTOR_SIZE as usize]) -> [u64; 2] {
    [0, 8].map(|start| u64::from_ne_bytes(std::array::from_fn(|byte| entry[start + byte])))
}
