//! What the two ring formats have in common: where they are, what was agreed on, and what can be done with them.
//!
//! Virtio 1.3, section 2.6.

use std::fmt::Debug;
use std::ptr::NonNull;
use std::sync::Arc;

use super::chain::{Chain, Used};
use super::inflight::InflightSlot;
use super::walk::Walk;
use crate::error::RingError;
use crate::memory::{Access, IovaRange, Part, Snapshot, Unmapped, Untranslated};

/// The device's end of a running ring, in either format.
///
/// Code that works on a ring is generic over it, and the format is looked at once per batch. Every method that touches
/// the ring takes `&mut self`: it is used by one thread at a time.
pub trait Ring: Debug + Send {
    /// Start where `base` says: the word of SET_VRING_BASE and GET_VRING_BASE.
    fn new(
        addresses: RingAddresses,
        size: u16,
        base: u32,
        options: RingOptions,
        limits: RingLimits,
        snapshot: Arc<Snapshot>,
    ) -> Result<Self, RingError>
    where
        Self: Sized;

    /// The ring with a record of what is in flight. What a device before us has left in it is taken again, first and in
    /// the same order, and the record says where the ring goes on. vhost-user specification, "Inflight I/O tracking".
    fn recover(self, slot: &InflightSlot) -> Result<Self, RingError>
    where
        Self: Sized;

    /// How many of the next chains a device before us had taken already.
    fn resubmitting(&self) -> u16;

    /// What both formats have.
    fn common(&self) -> &Common;

    /// Likewise.
    fn common_mut(&mut self) -> &mut Common;

    /// The same ring over other memory, or an error that leaves it as it was.
    fn resolve(&self, snapshot: &Snapshot) -> Result<RingPointers, RingError> {
        let Common { addresses, size, options, .. } = *self.common();
        Parts::resolve(addresses, size, snapshot, options).map(RingPointers)
    }

    /// Go on over `snapshot`, from which `pointers` were resolved.
    fn move_to(&mut self, pointers: RingPointers, snapshot: Arc<Snapshot>) {
        let common = self.common_mut();
        common.parts = pointers.0;
        common.walk.snapshot = snapshot;
    }

    /// Go on at other addresses, or the same, over `snapshot`, or stay where it is with an error.
    fn relocate(&mut self, addresses: RingAddresses, snapshot: &Arc<Snapshot>) -> Result<(), RingError> {
        let common = self.common_mut();
        common.parts = Parts::resolve(addresses, common.size, snapshot, common.options)?;
        common.walk.snapshot = Arc::clone(snapshot);
        common.addresses = addresses;
        Ok(())
    }

    fn snapshot(&self) -> &Arc<Snapshot> {
        &self.common().walk.snapshot
    }

    /// Descriptors.
    fn size(&self) -> u16 {
        self.common().size
    }

    /// Call `range` with each range of guest addresses that was written to, by its start and its length. The used part is
    /// where the front-end says that it is to be logged: at `used`. Behind an IOMMU that is an I/O address, and it is
    /// where we know it to be.
    fn guest_ranges(&self, written: Written, used: u64, range: &mut dyn FnMut(u64, u64)) {
        let [descriptors, _, used_part] = &*self.common().parts.places;
        match written {
            Written::Descriptors(offset, length) => descriptors.guest_ranges(offset, length, range),
            Written::Used(offset, length) if self.snapshot().iotlb().is_some() => {
                used_part.guest_ranges(offset, length, range);
            }
            Written::Used(offset, length) => range(used.saturating_add(offset), length),
        }
    }

    /// Where the ring would go on if it stopped now, as in GET_VRING_BASE. Chains that are to be taken again, and are
    /// not where the driver's side of the ring has them, stay in the in-flight record.
    fn base(&self) -> u32;

    /// Chains taken and not given back yet.
    fn in_flight(&self) -> u16;

    /// Look how far the driver has come. Returns whether there is something to take.
    fn look(&mut self) -> Result<bool, RingError>;

    /// How many chains the driver has made available that were not taken yet.
    fn available(&mut self) -> Result<u16, RingError>;

    /// Of [`take`](Self::take): how many chains it may find now, after it has found `before`.
    fn room(&self, before: usize) -> usize;

    /// Take the next chains that the last [`look`](Self::look) may have seen, as many as there are or `chains` has room
    /// for. Returns how many. If the first of them is broken, that is the error; one behind it comes up the next time.
    fn take(&mut self, chains: &mut [Chain]) -> Result<usize, RingError>;

    /// Take one chain. False if there is none left.
    #[inline]
    fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        Ok(self.take(std::slice::from_mut(chain))? > 0)
    }

    /// Give the chain that was taken last back to the driver's side, as if it had not been taken. False, and nothing
    /// happens, if `head` is not the one that was taken last.
    fn unpop(&mut self, head: u16) -> bool;

    /// Fill the next used entries. The driver sees them after [`show`](Self::show).
    fn fill_used(&mut self, used: &[Used]);

    /// Fill one of them.
    #[inline]
    fn push_used(&mut self, used: Used) {
        self.fill_used(std::slice::from_ref(&used));
    }

    /// Show the driver every used entry that was filled. Returns whether it wants to be notified.
    #[must_use]
    fn publish(&mut self) -> bool {
        self.show();
        self.decide().unwrap_or(false)
    }

    /// Show the driver every used entry that was filled. It may sleep until somebody [decides](Self::decide).
    fn show(&mut self);

    /// Whether the driver wants to be notified of what it was shown since this was asked last. None of nothing.
    #[must_use]
    fn decide(&mut self) -> Option<bool>;

    /// What the next [`show`](Self::show) shows, for a log of what was written. Too much is better than too little.
    fn unpublished(&self) -> [Written; 3] {
        let size = u64::from(self.size());
        [Written::Descriptors(0, DESCRIPTOR_SIZE * size), Written::Used(0, 6 + 8 * size), Written::Used(0, 0)]
    }

    /// Where [`disable_kicks`](Self::disable_kicks) and [`enable_kicks`](Self::enable_kicks) write, likewise.
    fn kick_suppression(&self) -> Written {
        Written::Used(0, 6 + 8 * u64::from(self.size()))
    }

    /// All that the device may ever write to.
    fn whole(&self) -> [Written; 2] {
        let Common { size, options, .. } = *self.common();
        let [descriptors, _, used] = part_lengths(size, options);
        [Written::Used(0, used), Written::Descriptors(0, if options.packed { descriptors } else { 0 })]
    }

    /// Ask the driver not to kick: the ring is being looked at anyway.
    fn disable_kicks(&mut self);

    /// Ask the driver to kick for the next chain. Returns whether one came before it could know.
    fn enable_kicks(&mut self) -> Result<bool, RingError>;
}

/// What a running ring of either format has.
#[derive(Debug)]
pub struct Common {
    pub(super) parts: Parts,
    pub(super) walk: Walk,
    addresses: RingAddresses,
    pub(super) options: RingOptions,
    pub(super) size: u16,
}

impl Common {
    pub(super) fn new(
        addresses: RingAddresses,
        size: u16,
        options: RingOptions,
        limits: RingLimits,
        snapshot: Arc<Snapshot>,
    ) -> Result<Self, RingError> {
        let parts = Parts::resolve(addresses, size, &snapshot, options)?;
        Ok(Self { parts, walk: Walk::new(snapshot, options.indirect, limits), addresses, options, size })
    }
}

/// Where the front-end put the three parts of a ring, in its user addresses, or with an IOMMU in I/O addresses. Of a packed ring, `avail` is the driver's
/// event suppression structure and `used` the device's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    pub descriptors: u64,
    pub avail: u64,
    pub used: u64,
}

impl RingAddresses {
    /// Refuse what no ring of the format may have, whatever the memory: parts that are not aligned. Virtio 1.3, sections
    /// 2.7 and 2.8.10.1.
    pub fn check_alignment(&self, packed: bool) -> Result<(), String> {
        let addresses = [self.descriptors, self.avail, self.used];
        for ((name, alignment), address) in part_names(packed).into_iter().zip(addresses) {
            if address % alignment != 0 {
                return Err(format!("the {name} is at {address:#x}; it must be aligned to {alignment} bytes"));
            }
        }
        Ok(())
    }
}

impl RingAddresses {
    /// Whether the ring has any of these I/O addresses.
    #[must_use]
    pub fn overlap(&self, size: u16, options: RingOptions, range: IovaRange) -> bool {
        let addresses = [self.descriptors, self.avail, self.used];
        let mut parts = addresses.into_iter().zip(part_lengths(size, options));
        parts.any(|(address, length)| IovaRange::new(address, length).is_none_or(|part| part.overlaps(range)))
    }
}

/// A piece of a ring that the device has written to: an offset and a length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// In the part that SET_VRING_ADDR calls the used ring.
    Used(u64, u64),
    /// In the descriptors, where the device of a packed ring answers.
    Descriptors(u64, u64),
}

/// What driver and device agreed on for a ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingOptions {
    /// Which of the two formats it has.
    pub packed: bool,
    pub event_idx: bool,
    /// Whether chains may be in indirect tables.
    pub indirect: bool,
    /// Whether chains are given back in the order in which they were made available.
    pub in_order: bool,
    /// Whether a split ring is that of a legacy driver on a big-endian machine.
    pub big_endian: bool,
}

/// What the device puts up with, whatever the driver may do.
#[derive(Clone, Copy, Debug)]
pub struct RingLimits {
    /// The longest indirect table, in descriptors.
    pub max_indirect: u32,
    /// Bytes in a chain, readable and writable together.
    pub max_bytes: u32,
}

impl Default for RingLimits {
    /// QEMU's limit on tables, and what a used entry can say.
    fn default() -> Self {
        Self { max_indirect: 1024, max_bytes: u32::MAX }
    }
}

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

/// Where the head of a chain may be: none. It is more than any head.
pub(super) const NO_CHAIN: u32 = u32::MAX;

pub(super) const DESCRIPTOR_SIZE: u64 = 16;

/// What the formats have of a descriptor, in different places.
#[derive(Clone, Copy)]
pub(super) struct Descriptor {
    pub(super) address: u64,
    pub(super) length: u32,
    pub(super) flags: u16,
    /// The next descriptor in a split ring, the buffer id in a packed one.
    pub(super) link: u16,
}

/// Host pointers to the parts of one ring, each valid over its whole extent while this and the snapshot live.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) descriptors: NonNull<u64>,
    pub(super) avail: NonNull<u16>,
    pub(super) used: NonNull<u16>,
    /// Where these come from, in this order. Elsewhere: a ring that is worked on does not look at it.
    places: Box<[Part; 3]>,
}

impl Parts {
    pub(super) fn resolve(
        addresses: RingAddresses,
        size: u16,
        snapshot: &Snapshot,
        options: RingOptions,
    ) -> Result<Self, RingError> {
        let lengths = part_lengths(size, options);
        let names = part_names(options.packed);
        let part = |at: usize, address, access| resolve_part(snapshot, names[at], address, lengths[at], access);
        // A device gives back chains in the descriptors of a packed ring; it only reads those of a split one.
        let descriptors = Access::to_descriptor(options.packed);
        let places = Box::new([
            part(0, addresses.descriptors, descriptors)?,
            part(1, addresses.avail, Access::Read)?,
            part(2, addresses.used, Access::Write)?,
        ]);
        let [descriptors, avail, used] = [&places[0], &places[1], &places[2]].map(Part::pointer);
        Ok(Self { descriptors: descriptors.cast(), avail: avail.cast(), used: used.cast(), places })
    }
}

/// Where a part of a ring is in this process.
fn resolve_part(
    snapshot: &Snapshot,
    (name, alignment): (&str, u64),
    address: u64,
    length: u64,
    access: Access,
) -> Result<Part, RingError> {
    let end = u128::from(address) + u128::from(length);
    let reason = match snapshot.ring_part(address, length, access) {
        // The guest's address was checked, but a region may begin anywhere in its file.
        Ok(part) if (part.pointer().addr().get() as u64).is_multiple_of(alignment) => return Ok(part),
        Err(Untranslated::Iommu(Unmapped::Miss { iova, access })) => {
            return Err(RingError::NotMapped { iova, writable: access == Access::Write });
        }
        Err(Untranslated::Iommu(Unmapped::Denied { iova, .. })) => {
            format!(
                "the {name} at I/O addresses {address:#x}..{end:#x} is for {access}, which {iova:#x} is not mapped for"
            )
        }
        Err(Untranslated::Scattered(reason)) => {
            format!("the {name} at I/O addresses {address:#x}..{end:#x} is scattered over guest memory, {reason}")
        }
        Ok(_) | Err(Untranslated::Outside) => format!(
            "the {name} at user addresses {address:#x}..{end:#x} is not aligned, or not inside one region of guest \
             memory ({})",
            snapshot.describe_user()
        ),
    };
    Err(RingError::MemoryGone(reason))
}

/// Where a ring would be in another snapshot. Only [`Ring::move_to`] can use it.
#[derive(Debug)]
pub struct RingPointers(pub(super) Parts);

/// What the parts are called, and how they are aligned.
fn part_names(packed: bool) -> [(&'static str, u64); 3] {
    if packed {
        [("descriptor ring", 16), ("driver event suppression structure", 4), ("device event suppression structure", 4)]
    } else {
        [("descriptor table", 16), ("available ring", 2), ("used ring", 4)]
    }
}

/// How many bytes the parts have.
fn part_lengths(size: u16, options: RingOptions) -> [u64; 3] {
    let event = if options.event_idx { 2 } else { 0 };
    let entries = u64::from(size);
    let (avail, used) = if options.packed { (4, 4) } else { (4 + 2 * entries + event, 4 + 8 * entries + event) };
    [DESCRIPTOR_SIZE * entries, avail, used]
}

/// Whether going from `old` to `new` passes `event`. Virtio 1.3, section 2.7.7.2.
pub(super) fn needs_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
