//! What the two ring formats have in common on the driver's side.
//!
//! Nothing that the device can write is trusted: what it gives back is checked against what was submitted, which is kept
//! in private memory.

use std::fmt::Debug;
use std::sync::Arc;

use super::chain::Used;
use super::ring::{Descriptor, INDIRECT, RingAddresses, RingOptions, WRITE};
use super::walk::untranslated;
use crate::error::RingError;
use crate::memory::{Access, Segment, Snapshot, access};

/// The driver's end of a ring, in either format.
pub trait Driver: Debug + Send {
    /// Lay out an empty ring, which the device is to start at `base`, the word of SET_VRING_BASE.
    fn new(
        addresses: RingAddresses,
        size: u16,
        base: u32,
        options: RingOptions,
        snapshot: Arc<Snapshot>,
    ) -> Result<Self, RingError>
    where
        Self: Sized;

    fn size(&self) -> u16;

    /// Descriptors that the next chain may have.
    fn free(&self) -> u16;

    /// Chains that the device was shown and has not given back, as far as we looked.
    fn outstanding(&self) -> u16;

    /// Where a device has to start that is to take every chain it has not given back. Of a packed ring that is so only
    /// if those that it gave back are the oldest.
    fn base(&self) -> u32;

    /// Put a chain together. The device sees it after [`publish`](Self::publish), and gives it back by the number
    /// returned here, which is less than the ring's size. Elements may be in any order: what the specification forbids
    /// is the device's to refuse.
    fn add(&mut self, elements: &[Element], indirect: Option<Indirect>) -> Result<u16, RingError>;

    /// Show the device every chain that was added. Returns whether it wants to be kicked.
    #[must_use]
    fn publish(&mut self) -> bool;

    /// Take the next chain that the device gave back. After an error the device cannot be trusted with this ring.
    ///
    /// With IN_ORDER it need not say how many bytes it wrote to any but the last of several: those count as full.
    fn pop(&mut self) -> Result<Option<Used>, RingError>;

    /// Ask the device not to notify: the ring is being looked at anyway.
    fn disable_calls(&mut self);

    /// Ask the device to notify when it has given back `count` more chains, or sooner if they have more than one
    /// descriptor in a packed ring; without EVENT_IDX, at the next one. Returns whether one was given back already.
    fn enable_calls(&mut self, count: u16) -> Result<bool, RingError>;
}

/// One buffer of a chain, by the address that the device gets: its guest address, or with an IOMMU its I/O address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Element {
    pub address: u64,
    /// Bytes.
    pub length: u32,
    pub writable: bool,
}

/// How a chain goes on in an indirect table: with all but its first `direct` elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Indirect {
    /// Address of room for the table, likewise, with 16 bytes for an element.
    pub table: u64,
    pub direct: usize,
}

impl Element {
    pub(super) fn descriptor(&self) -> Descriptor {
        let flags = if self.writable { WRITE } else { 0 };
        Descriptor { address: self.address, length: self.length, flags, link: 0 }
    }
}

/// How many of the bytes of a chain the device may write.
pub(super) fn writable(elements: &[Element]) -> u64 {
    elements.iter().filter(|element| element.writable).map(|element| u64::from(element.length)).sum()
}

/// Write an indirect table, and return the descriptor that points to it. `descriptor` is where that will be, for errors.
pub(super) fn write_table(
    snapshot: &Snapshot,
    address: u64,
    table: &[u8],
    descriptor: u16,
) -> Result<Descriptor, RingError> {
    let length = table.len();
    let mut written = 0;
    let write = |segment: Segment| {
        // SAFETY: the segment was translated just now, and `snapshot` keeps it mapped.
        unsafe { access::write(segment.pointer.as_ptr(), &table[written..written + segment.length]) };
        written += segment.length;
    };
    snapshot
        .resolve(address, length as u64, Access::Read, write)
        .map_err(|reason| untranslated(reason, snapshot, descriptor, address, length as u32))?;
    Ok(Descriptor { address, length: length as u32, flags: INDIRECT, link: 0 })
}
