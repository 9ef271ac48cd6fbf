//! What the two ring formats have in common on the driver's side.
//!
//! Owns: which chains the device has, and what it gave back. Nothing that it can write is trusted: what it gives back is
//! checked against what was submitted, which is kept in private memory.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::sync::Arc;

use super::chain::Used;
use super::ring::{Descriptor, INDIRECT, NEXT, Parts, RingAddresses, RingOptions, WRITE};
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

    /// What both formats have.
    fn common(&self) -> &Common;

    /// Likewise.
    fn common_mut(&mut self) -> &mut Common;

    fn size(&self) -> u16 {
        self.common().size
    }

    /// Descriptors that the next chain may have.
    fn free(&self) -> u16 {
        self.common().free
    }

    /// Chains that the device was shown and has not given back, as far as we looked.
    fn outstanding(&self) -> u16 {
        self.common().outstanding()
    }

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
    fn pop(&mut self) -> Result<Option<Used>, RingError> {
        if self.common().returned.is_empty() {
            self.look()?;
        }
        Ok(self.common_mut().take_returned())
    }

    /// Check what the device gave back next, if it gave back anything. Of [`pop`](Self::pop), which asks for it when all
    /// that was checked before is taken.
    fn look(&mut self) -> Result<(), RingError>;

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

/// What the driver's end of a ring of either format has.
#[derive(Debug)]
pub struct Common {
    pub(super) parts: Parts,
    pub(super) size: u16,
    pub(super) event_idx: bool,
    snapshot: Arc<Snapshot>,

    /// By descriptor in a split ring, by buffer id in a packed one.
    pub(super) slots: Box<[Slot]>,
    first_free: u16,
    /// Descriptors that are free.
    free: u16,
    /// How many chains were added, shown to the device, and taken back: in a split ring, the indices of the entries.
    pub(super) added: u16,
    pub(super) shown: u16,
    pub(super) taken: u16,
    /// With IN_ORDER: the chains that the device has.
    pub(super) order: Option<VecDeque<u16>>,
    /// What it gave back that was checked and not taken yet.
    pub(super) returned: VecDeque<Used>,
    /// Indirect tables are put together here.
    table: Vec<u8>,
}

/// What we remember of a chain, by its first descriptor or its buffer id, whatever the device does to shared memory.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Slot {
    /// The next descriptor of the chain, or of the free list; the next free id.
    next: u16,
    /// How many descriptors the chain has. 0 where none begins.
    pub(super) descriptors: u16,
    /// Its last slot: in a packed ring it has one only.
    last: u16,
    /// How many chains were added before it.
    pub(super) added_at: u16,
    /// How many bytes the device may write.
    pub(super) writable: u64,
}

impl Common {
    /// `index` is where the count of chains starts.
    pub(super) fn new(
        addresses: RingAddresses,
        size: u16,
        index: u16,
        options: RingOptions,
        snapshot: Arc<Snapshot>,
    ) -> Result<Self, RingError> {
        Ok(Self {
            parts: Parts::resolve(addresses, size, &snapshot, options)?,
            size,
            event_idx: options.event_idx,
            snapshot,
            // With IN_ORDER it goes round and round.
            slots: (0..size).map(|at| Slot { next: (at + 1) % size, ..Slot::default() }).collect(),
            first_free: 0,
            free: size,
            added: index,
            shown: index,
            taken: index,
            order: options.in_order.then(VecDeque::new),
            returned: VecDeque::new(),
            table: Vec::new(),
        })
    }

    pub(super) fn outstanding(&self) -> u16 {
        self.shown.wrapping_sub(self.taken)
    }

    /// The descriptors of a chain without their links, and how many they are. The indirect table is written; `entry`
    /// makes an entry of it, which the next one follows, if there is one. `at` is where the chain begins, for errors.
    pub(super) fn begin<'a>(
        &mut self,
        elements: &'a [Element],
        indirect: Option<Indirect>,
        at: u16,
        entry: fn(Descriptor, Option<u16>) -> [u64; 2],
    ) -> Result<(u16, impl Iterator<Item = Descriptor> + use<'a>), RingError> {
        let (direct, inner) = elements.split_at(indirect.map_or(elements.len(), |indirect| indirect.direct));
        let needed = direct.len() + usize::from(indirect.is_some());
        assert!(needed > 0, "a chain has at least one element");
        if needed > usize::from(self.free) {
            return Err(RingError::NoRoom { needed, free: self.free });
        }
        let mut continuation = None;
        if let Some(Indirect { table, .. }) = indirect {
            self.table.clear();
            for (position, element) in (1..).zip(inner) {
                let next = (position < inner.len()).then_some(position as u16);
                self.table.extend(entry(element.descriptor(), next).into_iter().flat_map(u64::to_ne_bytes));
            }
            continuation = Some(write_table(&self.snapshot, table, &self.table, at)?);
        }
        let descriptors = direct.iter().map(Element::descriptor).chain(continuation).zip(1..);
        let descriptors = descriptors.map(move |(mut descriptor, position)| {
            descriptor.flags |= if position < needed { NEXT } else { 0 };
            descriptor
        });
        Ok((needed as u16, descriptors))
    }

    pub(super) fn first_free(&self) -> u16 {
        self.first_free
    }

    /// Take a slot that is free. There is one for every descriptor.
    pub(super) fn take_slot(&mut self) -> u16 {
        let slot = self.first_free;
        self.first_free = self.slots[usize::from(slot)].next;
        slot
    }

    /// Remember a chain, the slots of which were taken from `head` to `last`.
    pub(super) fn add(&mut self, head: u16, last: u16, descriptors: u16, elements: &[Element]) {
        let writable =
            elements.iter().filter(|element| element.writable).map(|element| u64::from(element.length)).sum();
        let slot = &mut self.slots[usize::from(head)];
        *slot = Slot { next: slot.next, descriptors, last, added_at: self.added, writable };
        self.free -= descriptors;
        self.added = self.added.wrapping_add(1);
        if let Some(order) = &mut self.order {
            order.push_back(head);
        }
    }

    /// The chain that the device gives back by `id`, if it was shown one of that name.
    pub(super) fn submitted(&self, id: u32) -> Result<(u16, &Slot), RingError> {
        let hidden = self.added.wrapping_sub(self.shown);
        let head = u16::try_from(id).ok();
        head.and_then(|head| Some((head, self.slots.get(usize::from(head))?)))
            .filter(|(_, slot)| slot.descriptors > 0 && self.added.wrapping_sub(slot.added_at) > hidden)
            .ok_or(RingError::UsedNotSubmitted { head: id })
    }

    /// A chain that was submitted is given back; with IN_ORDER, those before it are, too.
    pub(super) fn give_back(&mut self, last: Used) -> Result<(), RingError> {
        let Used { head, written } = last;
        let slot = self.slots[usize::from(head)];
        if u64::from(written) > slot.writable {
            return Err(RingError::UsedTooLong { head, written, writable: slot.writable });
        }
        if let Some(order) = &mut self.order {
            let skipped = usize::from(slot.added_at.wrapping_sub(self.taken));
            for head in order.drain(..=skipped).take(skipped) {
                let written = u32::try_from(self.slots[usize::from(head)].writable).unwrap_or(u32::MAX);
                self.returned.push_back(Used { head, written });
            }
        }
        self.returned.push_back(last);
        Ok(())
    }

    fn take_returned(&mut self) -> Option<Used> {
        let used = self.returned.pop_front()?;
        let slot = &mut self.slots[usize::from(used.head)];
        self.free += std::mem::take(&mut slot.descriptors);
        if self.order.is_none() {
            let last = slot.last;
            self.slots[usize::from(last)].next = std::mem::replace(&mut self.first_free, used.head);
        }
        self.taken = self.taken.wrapping_add(1);
        Some(used)
    }
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
