//! The packed ring, driver side.
//!
//! Owns: which descriptors and buffer ids are free, which chains the device has, what it gave back. Virtio 1.3, section
//! 2.8.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use super::chain::Used;
use super::driver::{Driver, Element, Indirect, writable, write_table};
use super::packed::{AVAIL, EVENTS_AT_DESCRIPTOR, EVENTS_DISABLE, EVENTS_ENABLE, FRESH, Position, USED, wants_event};
use super::ring::{Descriptor, NEXT, Parts, RingAddresses, RingOptions, WRITE};
use crate::error::RingError;
use crate::memory::Snapshot;

/// What we remember of a buffer id.
#[derive(Clone, Copy, Debug, Default)]
struct Buffer {
    /// Of one that is free: the next of those.
    next: u16,
    /// How many descriptors the chain has. 0 where there is none.
    descriptors: u16,
    /// How many chains were added before it, and how many bytes the device may write.
    added_at: u16,
    writable: u64,
}

/// The driver's end of a packed ring.
#[derive(Debug)]
pub struct PackedDriver {
    parts: Parts,
    size: u16,
    event_idx: bool,
    snapshot: Arc<Snapshot>,

    buffers: Box<[Buffer]>,
    first_free: u16,
    /// Descriptors that are free.
    free: u16,
    /// The descriptor to fill next, and how many chains were added, and shown.
    next: Position,
    added: u16,
    published: u16,
    /// The first descriptor that the device cannot see yet, the flags that will show it and those behind it, and how
    /// many these are.
    hidden: Option<(u16, u16)>,
    hidden_slots: u16,
    /// The descriptor to look at next, and how many chains were taken back.
    used: Position,
    returned: u16,
    /// With IN_ORDER: the chains that the device has, and those of a batch that it gave back at once.
    order: Option<VecDeque<u16>>,
    batch: VecDeque<Used>,
    /// Indirect tables are put together here.
    table: Vec<u8>,
}

// SAFETY: the pointers are into shared memory that `snapshot` keeps mapped, and every method that changes anything there
// takes `&mut self`.
unsafe impl Send for PackedDriver {}

impl Driver for PackedDriver {
    /// `size` may be anything up to [`super::MAX_QUEUE_SIZE`]. Base 0 is that of a fresh ring, 0x80008000.
    fn new(
        addresses: RingAddresses,
        size: u16,
        base: u32,
        options: RingOptions,
        snapshot: Arc<Snapshot>,
    ) -> Result<Self, RingError> {
        if size == 0 || size > super::MAX_QUEUE_SIZE {
            return Err(RingError::ImpossibleSize { size });
        }
        let word = if base == 0 { FRESH } else { base };
        let (start, used) = (Position::from_bits(word as u16), Position::from_bits((word >> 16) as u16));
        if start != used || start.slot >= size {
            return Err(RingError::ImpossibleBase { base, size });
        }
        let ring = Self {
            parts: Parts::resolve(addresses, size, &snapshot, options)?,
            size,
            event_idx: options.event_idx,
            snapshot,
            buffers: (0..size).map(|id| Buffer { next: id.wrapping_add(1), ..Buffer::default() }).collect(),
            first_free: 0,
            free: size,
            next: start,
            added: 0,
            published: 0,
            hidden: None,
            hidden_slots: 0,
            used: start,
            returned: 0,
            order: options.in_order.then(VecDeque::new),
            batch: VecDeque::new(),
            table: Vec::new(),
        };
        for slot in 0..size {
            // Used in the round before the one that the slot comes up in next.
            let before = Position { slot, wrap: (slot < start.slot) == start.wrap };
            ring.flags(slot).store(before.used().to_le(), Ordering::Relaxed);
        }
        // Both sides want to hear of the first descriptor.
        let events = if ring.event_idx { EVENTS_AT_DESCRIPTOR } else { EVENTS_ENABLE };
        for part in [Self::driver_events, Self::device_events] {
            part(&ring).store(suppression(start, events), Ordering::Relaxed);
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
        self.published.wrapping_sub(self.returned)
    }

    fn base(&self) -> u32 {
        let mut at = self.used;
        let mut in_order = self.order.iter().flatten();
        let mut left = self.outstanding();
        while left > 0 && self.is_used(at) {
            let (id, _) = self.used_element(at);
            let Some(buffer) = u16::try_from(id).ok().and_then(|id| self.buffers.get(usize::from(id))) else { break };
            let mut descriptors = buffer.descriptors;
            if self.order.is_some() {
                // The entry stands for everything up to its chain.
                for before in in_order.by_ref().take_while(|before| u32::from(**before) != id) {
                    descriptors = descriptors.saturating_add(self.buffers[usize::from(*before)].descriptors);
                }
            }
            if descriptors == 0 || descriptors > self.size {
                break;
            }
            at = at.plus(descriptors, self.size);
            left -= 1;
        }
        u32::from(at.bits()) | u32::from(at.bits()) << 16
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
        // Every chain has a descriptor, and there are as many ids as descriptors: one is free.
        let id = self.first_free;
        for (at, mut descriptor) in direct.iter().map(Element::descriptor).chain(continuation).enumerate() {
            descriptor.link = id;
            if at + 1 < needed {
                descriptor.flags |= NEXT;
            }
            self.write(descriptor);
        }
        let descriptors = needed as u16;
        self.free -= descriptors;
        self.hidden_slots += descriptors;
        let buffer = &mut self.buffers[usize::from(id)];
        self.first_free = buffer.next;
        *buffer = Buffer { next: 0, descriptors, added_at: self.added, writable: writable(elements) };
        self.added = self.added.wrapping_add(1);
        if let Some(order) = &mut self.order {
            order.push_back(id);
        }
        Ok(id)
    }

    fn publish(&mut self) -> bool {
        let Some((first, flags)) = self.hidden.take() else { return false };
        self.published = self.added;
        let slots = std::mem::take(&mut self.hidden_slots);
        self.flags(first).store(flags.to_le(), Ordering::Release);
        // The device may be about to sleep: it must see the descriptor, or we must see that it wants a kick.
        fence(Ordering::SeqCst);
        let suppression = u32::from_le(self.device_events().load(Ordering::Relaxed));
        wants_event(suppression, self.next, slots, self.size, self.event_idx)
    }

    fn pop(&mut self) -> Result<Option<Used>, RingError> {
        if self.batch.is_empty() && self.is_used(self.used) {
            self.take_used()?;
        }
        let Some(used) = self.batch.pop_front() else { return Ok(None) };
        let buffer = &mut self.buffers[usize::from(used.head)];
        self.free += std::mem::take(&mut buffer.descriptors);
        buffer.next = std::mem::replace(&mut self.first_free, used.head);
        self.returned = self.returned.wrapping_add(1);
        Ok(Some(used))
    }

    fn disable_calls(&mut self) {
        // With EVENT_IDX the event of the past does that by itself.
        if !self.event_idx {
            self.driver_events().store(suppression(self.used, EVENTS_DISABLE), Ordering::Relaxed);
        }
    }

    fn enable_calls(&mut self, count: u16) -> Result<bool, RingError> {
        let flags = if self.event_idx { EVENTS_AT_DESCRIPTOR } else { EVENTS_ENABLE };
        let event = self.used.plus(count.saturating_sub(1).min(self.size - 1), self.size);
        self.driver_events().store(suppression(event, flags), Ordering::Relaxed);
        // Either the device sees the request, or we see its descriptor.
        fence(Ordering::SeqCst);
        Ok(!self.batch.is_empty() || self.is_used(self.used))
    }
}

impl PackedDriver {
    /// Check the used descriptor that is next, and put what it gives back into `batch`.
    fn take_used(&mut self) -> Result<(), RingError> {
        let (head, written) = self.used_element(self.used);
        let unpublished = self.added.wrapping_sub(self.published);
        let buffer = u16::try_from(head).ok().and_then(|id| Some((id, self.buffers.get(usize::from(id))?)));
        let Some((id, buffer)) = buffer
            .filter(|(_, buffer)| buffer.descriptors > 0 && self.added.wrapping_sub(buffer.added_at) > unpublished)
        else {
            return Err(RingError::UsedNotSubmitted { head });
        };
        // Of a chain that nothing was written to, the length means nothing: DPDK leaves the driver's there. Others write a
        // length and forget the flag. Virtio 1.3, section 2.8.5.
        let is_written = u16::from_le(self.flags(self.used.slot).load(Ordering::Relaxed)) & WRITE != 0;
        let too_long = u64::from(written) > buffer.writable;
        let written = if too_long && !is_written { 0 } else { written };
        if too_long && is_written {
            return Err(RingError::UsedTooLong { head: id, written, writable: buffer.writable });
        }
        let last = Used { head: id, written };
        if let Some(order) = &mut self.order {
            while let Some(id) = order.pop_front().filter(|id| *id != last.head) {
                let written = u32::try_from(self.buffers[usize::from(id)].writable).unwrap_or(u32::MAX);
                self.batch.push_back(Used { head: id, written });
            }
        }
        self.batch.push_back(last);
        for used in &self.batch {
            self.used = self.used.plus(self.buffers[usize::from(used.head)].descriptors, self.size);
        }
        Ok(())
    }

    fn is_used(&self, at: Position) -> bool {
        u16::from_le(self.flags(at.slot).load(Ordering::Acquire)) & (AVAIL | USED) == at.used()
    }

    /// The id and the length of a used descriptor.
    fn used_element(&self, at: Position) -> (u32, u32) {
        // SAFETY: a position is less than `size`, and the ring was resolved over `size` entries of 16 bytes. The device
        // may write concurrently: hence volatile copies, used alone.
        unsafe {
            let entry = self.parts.descriptors.cast::<u32>().add(4 * usize::from(at.slot));
            let id = u16::from_le(entry.add(3).cast::<u16>().read_volatile());
            (id.into(), u32::from_le(entry.add(2).read_volatile()))
        }
    }

    /// Write the next descriptor: all of it but, if it is the first of a batch, what shows it.
    fn write(&mut self, descriptor: Descriptor) {
        let slot = self.next.slot;
        let flags = descriptor.flags | self.next.available();
        // SAFETY: as in `used_element`; the device does not look before the flags say so.
        unsafe {
            let entry = self.parts.descriptors.add(2 * usize::from(slot));
            entry.write_volatile(descriptor.address.to_le());
            let rest = entry.add(1).cast::<u32>();
            rest.write_volatile(descriptor.length.to_le());
            rest.add(1).cast::<u16>().write_volatile(descriptor.link.to_le());
        }
        if self.hidden.is_none() {
            self.hidden = Some((slot, flags));
        } else {
            self.flags(slot).store(flags.to_le(), Ordering::Relaxed);
        }
        self.next = self.next.plus(1, self.size);
    }

    /// An indirect table has no links: every entry counts.
    fn write_table(&mut self, address: u64, elements: &[Element]) -> Result<Descriptor, RingError> {
        self.table.clear();
        for element in elements {
            let descriptor = element.descriptor();
            let rest = u64::from(descriptor.length) | u64::from(descriptor.flags) << 48;
            let words = [descriptor.address.to_le(), rest.to_le()];
            self.table.extend(words.into_iter().flat_map(u64::to_ne_bytes));
        }
        write_table(&self.snapshot, address, &self.table, self.next.slot)
    }

    /// The flags of a descriptor, `slot < size`.
    fn flags(&self, slot: u16) -> &AtomicU16 {
        // SAFETY: the last two bytes of an entry that was resolved; concurrent access is what atomics are for.
        unsafe { AtomicU16::from_ptr(self.parts.descriptors.cast().add(8 * usize::from(slot) + 7).as_ptr()) }
    }

    fn driver_events(&self) -> &AtomicU32 {
        // SAFETY: the structure was resolved over its 4 bytes, and is aligned to them.
        unsafe { AtomicU32::from_ptr(self.parts.avail.cast().as_ptr()) }
    }

    fn device_events(&self) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(self.parts.used.cast().as_ptr()) }
    }
}

/// An event suppression structure, as it is in memory.
fn suppression(event: Position, flags: u16) -> u32 {
    (u32::from(event.bits()) | u32::from(flags) << 16).to_le()
}
