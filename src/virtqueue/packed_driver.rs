//! The packed ring, driver side.
//!
//! Owns what the format decides: where descriptors are, and what their flags say. Virtio 1.3, section 2.8.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use super::chain::Used;
use super::driver::{Common, Driver, Element, Indirect};
use super::packed::{AVAIL, EVENTS_AT_DESCRIPTOR, EVENTS_DISABLE, EVENTS_ENABLE, FRESH, Position, USED, wants_event};
use super::ring::{Descriptor, RingAddresses, RingOptions, WRITE};
use crate::error::RingError;
use crate::memory::Snapshot;

/// The driver's end of a packed ring.
#[derive(Debug)]
pub struct PackedDriver {
    common: Common,
    /// The descriptor to fill next.
    next: Position,
    /// The first descriptor that the device cannot see yet, the flags that will show it and those behind it, and how
    /// many these are.
    hidden: Option<(u16, u16)>,
    hidden_slots: u16,
    /// The descriptor to look at next.
    used: Position,
}

// SAFETY: the pointers are into shared memory that `common` keeps mapped, and every method that changes anything there
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
        let common = Common::new(addresses, size, 0, options, snapshot)?;
        let ring = Self { common, next: start, hidden: None, hidden_slots: 0, used: start };
        for slot in 0..size {
            // Used in the round before the one that the slot comes up in next.
            let before = Position { slot, wrap: (slot < start.slot) == start.wrap };
            ring.flags(slot).store(before.used().to_le(), Ordering::Relaxed);
        }
        // Both sides want to hear of the first descriptor.
        let events = if ring.common.event_idx { EVENTS_AT_DESCRIPTOR } else { EVENTS_ENABLE };
        for part in [Self::driver_events, Self::device_events] {
            part(&ring).store(suppression(start, events), Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        Ok(ring)
    }

    fn common(&self) -> &Common {
        &self.common
    }

    fn common_mut(&mut self) -> &mut Common {
        &mut self.common
    }

    fn base(&self) -> u32 {
        let mut at = self.used;
        let mut in_order = self.common.order.iter().flatten();
        let mut left = self.outstanding();
        while left > 0 && self.is_used(at) {
            let (id, _) = self.used_element(at);
            let Some(slot) = u16::try_from(id).ok().and_then(|id| self.common.slots.get(usize::from(id))) else {
                break;
            };
            let mut descriptors = slot.descriptors;
            if self.common.order.is_some() {
                // The entry stands for everything up to its chain.
                for before in in_order.by_ref().take_while(|before| u32::from(**before) != id) {
                    descriptors = descriptors.saturating_add(self.common.slots[usize::from(*before)].descriptors);
                }
            }
            if descriptors == 0 || descriptors > self.common.size {
                break;
            }
            at = at.plus(descriptors, self.common.size);
            left -= 1;
        }
        u32::from(at.bits()) | u32::from(at.bits()) << 16
    }

    fn add(&mut self, elements: &[Element], indirect: Option<Indirect>) -> Result<u16, RingError> {
        // An indirect table has no links: every entry counts.
        let entry = |Descriptor { address, length, flags, .. }, _| {
            [address.to_le(), (u64::from(length) | u64::from(flags) << 48).to_le()]
        };
        let (needed, descriptors) = self.common.begin(elements, indirect, self.next.slot, entry)?;
        // Every chain has a descriptor, and there are as many ids as descriptors: one is free.
        let id = self.common.take_slot();
        for descriptor in descriptors {
            self.write(Descriptor { link: id, ..descriptor });
        }
        self.hidden_slots += needed;
        self.common.add(id, id, needed, elements);
        Ok(id)
    }

    fn publish(&mut self) -> bool {
        let Some((first, flags)) = self.hidden.take() else { return false };
        self.common.shown = self.common.added;
        let slots = std::mem::take(&mut self.hidden_slots);
        self.flags(first).store(flags.to_le(), Ordering::Release);
        // The device may be about to sleep: it must see the descriptor, or we must see that it wants a kick.
        fence(Ordering::SeqCst);
        let suppression = u32::from_le(self.device_events().load(Ordering::Relaxed));
        wants_event(suppression, self.next, slots, self.common.size, self.common.event_idx)
    }

    fn look(&mut self) -> Result<(), RingError> {
        if !self.is_used(self.used) {
            return Ok(());
        }
        let (id, written) = self.used_element(self.used);
        let (head, slot) = self.common.submitted(id)?;
        // Of a chain that nothing was written to, the length means nothing: DPDK leaves the driver's there. Others write a
        // length and forget the flag. Virtio 1.3, section 2.8.5.
        let is_written = u16::from_le(self.flags(self.used.slot).load(Ordering::Relaxed)) & WRITE != 0;
        let written = if u64::from(written) > slot.writable && !is_written { 0 } else { written };
        self.common.give_back(Used { head, written })?;
        for used in &self.common.returned {
            let descriptors = self.common.slots[usize::from(used.head)].descriptors;
            self.used = self.used.plus(descriptors, self.common.size);
        }
        Ok(())
    }

    fn disable_calls(&mut self) {
        // With EVENT_IDX the event of the past does that by itself.
        if !self.common.event_idx {
            self.driver_events().store(suppression(self.used, EVENTS_DISABLE), Ordering::Relaxed);
        }
    }

    fn enable_calls(&mut self, count: u16) -> Result<bool, RingError> {
        let flags = if self.common.event_idx { EVENTS_AT_DESCRIPTOR } else { EVENTS_ENABLE };
        let event = self.used.plus(count.saturating_sub(1).min(self.common.size - 1), self.common.size);
        self.driver_events().store(suppression(event, flags), Ordering::Relaxed);
        // Either the device sees the request, or we see its descriptor.
        fence(Ordering::SeqCst);
        Ok(!self.common.returned.is_empty() || self.is_used(self.used))
    }
}

impl PackedDriver {
    fn is_used(&self, at: Position) -> bool {
        u16::from_le(self.flags(at.slot).load(Ordering::Acquire)) & (AVAIL | USED) == at.used()
    }

    /// The id and the length of a used descriptor.
    fn used_element(&self, at: Position) -> (u32, u32) {
        // SAFETY: a position is less than `size`, and the ring was resolved over `size` entries of 16 bytes. The device
        // may write concurrently: hence volatile copies, used alone.
        unsafe {
            let entry = self.common.parts.descriptors.cast::<u32>().add(4 * usize::from(at.slot));
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
            let entry = self.common.parts.descriptors.add(2 * usize::from(slot));
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
        self.next = self.next.plus(1, self.common.size);
    }

    /// The flags of a descriptor, `slot < size`.
    fn flags(&self, slot: u16) -> &AtomicU16 {
        // SAFETY: the last two bytes of an entry that was resolved; concurrent access is what atomics are for.
        unsafe { AtomicU16::from_ptr(self.common.parts.descriptors.cast().add(8 * usize::from(slot) + 7).as_ptr()) }
    }

    fn driver_events(&self) -> &AtomicU32 {
        // SAFETY: the structure was resolved over its 4 bytes, and is aligned to them.
        unsafe { AtomicU32::from_ptr(self.common.parts.avail.cast().as_ptr()) }
    }

    fn device_events(&self) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(self.common.parts.used.cast().as_ptr()) }
    }
}

/// An event suppression structure, as it is in memory.
fn suppression(event: Position, flags: u16) -> u32 {
    (u32::from(event.bits()) | u32::from(flags) << 16).to_le()
}
