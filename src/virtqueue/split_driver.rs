//! The split ring, driver side.
//!
//! Owns: which descriptors are free, which chains the device has, what it gave back.
//! Virtio 1.3, section 2.7.

use std::collections::VecDeque;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::chain::Used;
use super::driver::{Driver, Element, Indirect, writable, write_table};
use super::endian::Endian;
use super::ring::{Descriptor, NEXT, Parts, RingAddresses, RingOptions, needs_event};
use super::split::{AVAIL_NO_INTERRUPT, USED_NO_NOTIFY};
use crate::error::RingError;
use crate::memory::Snapshot;

/// Where the flags and the index are in the available ring and in the used ring, in words of 16 bits.
const FLAGS: usize = 0;
const INDEX: usize = 1;
const ENTRIES: usize = 2;

/// What we remember of a descriptor, whatever the device does to the one in shared memory.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    /// The next descriptor of the chain, or of the free list.
    next: u16,
    /// Of the first descriptor of a chain: how many there are. 0 where no chain begins.
    descriptors: u16,
    /// Likewise, the last one, the available index it was added at, and how many bytes the device may write.
    last: u16,
    added_at: u16,
    writable: u64,
}

/// The driver's end of a split ring.
#[derive(Debug)]
pub struct SplitDriver<E: Endian> {
    endian: PhantomData<E>,
    parts: Parts,
    size: u16,
    event_idx: bool,
    snapshot: Arc<Snapshot>,

    slots: Box<[Slot]>,
    first_free: u16,
    free: u16,
    /// The entry to fill next, and how many of the filled ones the device can see.
    next_avail: u16,
    published: u16,
    /// The entry to look at next.
    next_used: u16,
    /// With IN_ORDER: the chains that the device has, and those of a batch that it gave back at once.
    order: Option<VecDeque<u16>>,
    batch: VecDeque<Used>,
    /// Indirect tables are put together here.
    table: Vec<u8>,
}

// SAFETY: the pointers are into shared memory that `snapshot` keeps mapped, and every method that changes anything there
// takes `&mut self`.
unsafe impl<E: Endian> Send for SplitDriver<E> {}

impl<E: Endian> Driver for SplitDriver<E> {
    fn new(
        addresses: RingAddresses,
        size: u16,
        base: u32,
        options: RingOptions,
        snapshot: Arc<Snapshot>,
    ) -> Result<Self, RingError> {
        let base = u16::try_from(base).map_err(|_| RingError::ImpossibleBase { base, size })?;
        if !size.is_power_of_two() || size > super::MAX_QUEUE_SIZE {
            return Err(RingError::ImpossibleSize { size });
        }
        let ring = Self {
            endian: PhantomData,
            parts: Parts::resolve(addresses, size, &snapshot, options)?,
            size,
            event_idx: options.event_idx,
            snapshot,
            // With IN_ORDER it goes round and round.
            slots: (0..size).map(|index| Slot { next: (index + 1) & (size - 1), ..Slot::default() }).collect(),
            first_free: 0,
            free: size,
            next_avail: base,
            published: base,
            next_used: base,
            order: options.in_order.then(VecDeque::new),
            batch: VecDeque::new(),
            table: Vec::new(),
        };
        for part in [Self::avail, Self::used] {
            part(&ring, FLAGS).store(0, Ordering::Relaxed);
            part(&ring, INDEX).store(E::u16(base), Ordering::Relaxed);
        }
        if ring.event_idx {
            // Both sides want to hear of the first entry.
            ring.used_event().store(E::u16(base), Ordering::Relaxed);
            ring.avail_event().store(E::u16(base), Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        Ok(ring)
    }

    fn size(&self) -> u16 {
        self.size
    }

    fn free(&self) -> u16 {
        self.free
    }

    fn outstanding(&self) -> u16 {
        self.published.wrapping_sub(self.next_used)
    }

    fn base(&self) -> u32 {
        E::u16(self.used(INDEX).load(Ordering::Acquire)).into()
    }

    fn add(&mut self, elements: &[Element], indirect: Option<Indirect>) -> Result<u16, RingError> {
        let (direct, inner) = elements.split_at(indirect.map_or(elements.len(), |indirect| indirect.direct));
        let needed = direct.len() + usize::from(indirect.is_some());
        assert!(needed > 0, "a chain has at least one element");
        if needed > usize::from(self.free) {
            return Err(RingError::NoRoom { needed, free: self.free });
        }
        let continuation = match indirect {
            Some(Indirect { table, .. }) => Some(self.write_table(table, inner)?),
            None => None,
        };
        let head = self.first_free;
        let mut last = head;
        for (at, mut descriptor) in direct.iter().map(Element::descriptor).chain(continuation).enumerate() {
            last = self.first_free;
            self.first_free = self.slots[usize::from(last)].next;
            if at + 1 < needed {
                descriptor.flags |= NEXT;
                descriptor.link = self.first_free;
            }
            let words = descriptor.to_split::<E>();
            // SAFETY: `last` came from the free list, so it is less than `size`, and the table was resolved over `size`
            // entries of 16 bytes. The device does not look at an entry before a chain is published that contains it.
            unsafe {
                let entry = self.parts.descriptors.add(2 * usize::from(last));
                entry.write_volatile(words[0]);
                entry.add(1).write_volatile(words[1]);
            }
        }
        let writable = writable(elements);
        let descriptors = needed as u16;
        self.free -= descriptors;
        let slot = &mut self.slots[usize::from(head)];
        *slot = Slot { next: slot.next, descriptors, last, added_at: self.next_avail, writable };

        let entry = ENTRIES + usize::from(self.next_avail & (self.size - 1));
        self.avail(entry).store(E::u16(head), Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
        if let Some(order) = &mut self.order {
            order.push_back(head);
        }
        Ok(head)
    }

    fn publish(&mut self) -> bool {
        if self.published == self.next_avail {
            return false;
        }
        let before = std::mem::replace(&mut self.published, self.next_avail);
        self.avail(INDEX).store(E::u16(self.next_avail), Ordering::Release);
        // The device may be about to sleep: it must see the index, or we must see that it wants a kick.
        fence(Ordering::SeqCst);
        if self.event_idx {
            needs_event(E::u16(self.avail_event().load(Ordering::Relaxed)), self.next_avail, before)
        } else {
            E::u16(self.used(FLAGS).load(Ordering::Relaxed)) & USED_NO_NOTIFY == 0
        }
    }

    fn pop(&mut self) -> Result<Option<Used>, RingError> {
        if self.batch.is_empty() {
            self.take_used()?;
        }
        let Some(used) = self.batch.pop_front() else { return Ok(None) };
        let slot = &mut self.slots[usize::from(used.head)];
        self.free += std::mem::take(&mut slot.descriptors);
        if self.order.is_none() {
            let last = slot.last;
            self.slots[usize::from(last)].next = std::mem::replace(&mut self.first_free, used.head);
        }
        self.next_used = self.next_used.wrapping_add(1);
        Ok(Some(used))
    }

    fn disable_calls(&mut self) {
        // With EVENT_IDX the event index of the past does that by itself.
        if !self.event_idx {
            self.avail(FLAGS).store(E::u16(AVAIL_NO_INTERRUPT), Ordering::Relaxed);
        }
    }

    fn enable_calls(&mut self, count: u16) -> Result<bool, RingError> {
        if self.event_idx {
            let event = self.next_used.wrapping_add(count.saturating_sub(1));
            self.used_event().store(E::u16(event), Ordering::Relaxed);
        } else {
            self.avail(FLAGS).store(0, Ordering::Relaxed);
        }
        // Either the device sees the request, or we see its entry.
        fence(Ordering::SeqCst);
        Ok(self.done()? > 0)
    }
}

impl<E: Endian> SplitDriver<E> {
    /// Check the used entry that is next, if there is one, and put what it gives back into `batch`.
    fn take_used(&mut self) -> Result<(), RingError> {
        let done = self.done()?;
        if done == 0 {
            return Ok(());
        }
        let at = ENTRIES + 4 * usize::from(self.next_used & (self.size - 1));
        // SAFETY: the used ring was resolved over `size` entries of 8 bytes after its 4-byte head, and is aligned to 4.
        // The device may write concurrently: hence volatile copies, used alone.
        let (id, written) = unsafe {
            let entry = self.parts.used.add(at).cast::<u32>();
            (E::u32(entry.read_volatile()), E::u32(entry.add(1).read_volatile()))
        };
        let unpublished = self.next_avail.wrapping_sub(self.published);
        let Some((head, slot)) = u16::try_from(id).ok().and_then(|head| {
            let slot = self.slots.get(usize::from(head))?;
            let shown = self.next_avail.wrapping_sub(slot.added_at) > unpublished;
            (slot.descriptors > 0 && shown).then_some((head, slot))
        }) else {
            return Err(RingError::UsedNotSubmitted { head: id });
        };
        if u64::from(written) > slot.writable {
            return Err(RingError::UsedTooLong { head, written, writable: slot.writable });
        }
        if let Some(order) = &mut self.order {
            // The available and the used index count the same chains.
            let batch = slot.added_at.wrapping_sub(self.next_used).wrapping_add(1);
            if batch > done {
                return Err(RingError::UsedBatch { head, batch, done });
            }
            for skipped in order.drain(..usize::from(batch)).take(usize::from(batch) - 1) {
                let written = u32::try_from(self.slots[usize::from(skipped)].writable).unwrap_or(u32::MAX);
                self.batch.push_back(Used { head: skipped, written });
            }
        }
        self.batch.push_back(Used { head, written });
        Ok(())
    }

    /// How many chains were given back that were not taken yet.
    fn done(&self) -> Result<u16, RingError> {
        let to = E::u16(self.used(INDEX).load(Ordering::Acquire));
        let done = to.wrapping_sub(self.next_used);
        if done > self.outstanding() {
            return Err(RingError::UsedIndexJump { from: self.next_used, to, outstanding: self.outstanding() });
        }
        Ok(done)
    }

    /// Write `elements` as an indirect table, and return the descriptor that points to it.
    fn write_table(&mut self, address: u64, elements: &[Element]) -> Result<Descriptor, RingError> {
        self.table.clear();
        for (at, element) in elements.iter().enumerate() {
            let mut descriptor = element.descriptor();
            if at + 1 < elements.len() {
                descriptor.flags |= NEXT;
                descriptor.link = (at + 1) as u16;
            }
            self.table.extend(descriptor.to_split::<E>().into_iter().flat_map(u64::to_ne_bytes));
        }
        write_table(&self.snapshot, address, &self.table, self.first_free)
    }

    /// Word `at` of the available ring, which has its flags, its index, its entries and `used_event`.
    fn avail(&self, at: usize) -> &AtomicU16 {
        debug_assert!(at < ENTRIES + usize::from(self.size) + usize::from(self.event_idx));
        // SAFETY: the available ring was resolved over that many words, and is aligned to 2. Every caller keeps to them;
        // concurrent access is what atomics are for.
        unsafe { AtomicU16::from_ptr(self.parts.avail.add(at).as_ptr()) }
    }

    /// Word `at` of the used ring, whose entries are four words long, and which ends with `avail_event`.
    fn used(&self, at: usize) -> &AtomicU16 {
        debug_assert!(at < ENTRIES + 4 * usize::from(self.size) + usize::from(self.event_idx));
        // SAFETY: as in `avail`; the used ring is aligned to 4.
        unsafe { AtomicU16::from_ptr(self.parts.used.add(at).as_ptr()) }
    }

    /// Exists with EVENT_IDX only.
    fn used_event(&self) -> &AtomicU16 {
        self.avail(ENTRIES + usize::from(self.size))
    }

    /// Likewise.
    fn avail_event(&self) -> &AtomicU16 {
        self.used(ENTRIES + 4 * usize::from(self.size))
    }
}

impl Descriptor {
    fn to_split<E: Endian>(self) -> [u64; 2] {
        [E::u64(self.address), E::pack(self.length, self.flags, self.link)]
    }
}
