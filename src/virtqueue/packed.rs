//! The packed ring, device side.
//!
//! Owns: where the next available descriptor is, where the next used one goes, which buffer ids are in flight, when to
//! notify. Virtio 1.3, section 2.8.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use super::chain::{Chain, Used};
use super::crash;
use super::inflight::{Copied, InflightSlot, PackedRecord, Recovered};
use super::order::Order;
use super::ring::{
    Descriptor, INDIRECT, NEXT, Parts, Ring, RingAddresses, RingLimits, RingOptions, RingPointers, WRITE, Written,
    needs_event,
};
use super::walk::{Walk, words};
use crate::error::RingError;
use crate::memory::Snapshot;

/// Of a descriptor's flags: whether it is available, or used, in the rounds in which the wrap counter is 1.
pub(super) const AVAIL: u16 = 1 << 7;
pub(super) const USED: u16 = 1 << 15;

/// The flags of an event suppression structure, whose other half is an offset and a wrap counter.
pub(super) const EVENTS_ENABLE: u16 = 0;
pub(super) const EVENTS_DISABLE: u16 = 1;
pub(super) const EVENTS_AT_DESCRIPTOR: u16 = 2;

/// In units of 16 bits: a descriptor, and where its flags are in it.
const ENTRY: usize = 8;
const FLAGS: usize = 7;

/// The base of a ring on which nothing has happened yet: both sides at the first descriptor, both wrap counters 1.
pub(super) const FRESH: u32 = 0x8000_8000;

/// Where one side is in the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) slot: u16,
    pub(super) wrap: bool,
}

impl Position {
    /// Half a base, or the first half of an event suppression structure.
    pub(super) fn from_bits(bits: u16) -> Self {
        Self { slot: bits & 0x7fff, wrap: bits & 0x8000 != 0 }
    }

    pub(super) fn bits(self) -> u16 {
        self.slot | if self.wrap { 0x8000 } else { 0 }
    }

    /// `count` descriptors further in a ring of `size`, `count <= size`.
    pub(super) fn plus(self, count: u16, size: u16) -> Self {
        let slot = u32::from(self.slot) + u32::from(count);
        if slot < size.into() {
            Self { slot: slot as u16, ..self }
        } else {
            Self { slot: (slot - u32::from(size)) as u16, wrap: !self.wrap }
        }
    }

    fn minus(self, count: u16, size: u16) -> Self {
        match self.slot.checked_sub(count) {
            Some(slot) => Self { slot, ..self },
            // Written so that it does not overflow in the largest ring.
            None => Self { slot: size - (count - self.slot), wrap: !self.wrap },
        }
    }

    /// How far `self` is ahead of `behind`. None if no ring of `size` can be like that.
    fn ahead_of(self, behind: Self, size: u16) -> Option<u16> {
        if self.slot >= size || behind.slot >= size {
            None
        } else if self.wrap == behind.wrap {
            self.slot.checked_sub(behind.slot)
        } else {
            Some(size - behind.slot.checked_sub(self.slot)?)
        }
    }

    /// The flags of a descriptor that is available here.
    pub(super) fn available(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    /// The flags of a descriptor that is used here.
    pub(super) fn used(self) -> u16 {
        if self.wrap { AVAIL | USED } else { 0 }
    }
}

/// Whether the one who wrote an event suppression structure wants to hear of `slots` descriptors that end before `end`.
/// Virtio 1.3, section 2.8.7.
pub(super) fn wants_event(suppression: u32, end: Position, slots: u16, size: u16, event_idx: bool) -> bool {
    let (event, flags) = (Position::from_bits(suppression as u16), (suppression >> 16) as u16);
    match flags & 3 {
        EVENTS_DISABLE => false,
        EVENTS_AT_DESCRIPTOR if event_idx => {
            let event = if event.wrap == end.wrap { event.slot } else { event.slot.wrapping_sub(size) };
            needs_event(event, end.slot, end.slot.wrapping_sub(slots))
        }
        // What is not defined asks for an event too many rather than for one too few.
        _ => true,
    }
}

impl Descriptor {
    fn from_packed([address, rest]: [u64; 2]) -> Self {
        let (address, rest) = (u64::from_le(address), u64::from_le(rest));
        Self { address, length: rest as u32, link: (rest >> 32) as u16, flags: (rest >> 48) as u16 }
    }
}

/// A running packed ring.
#[derive(Debug)]
pub struct PackedRing {
    parts: Parts,
    size: u16,
    options: RingOptions,
    addresses: RingAddresses,
    walk: Walk,

    /// The descriptor to take next, and the one to use next.
    avail: Position,
    used: Position,
    /// Descriptors from the one to the other: those of chains that were taken and not given back.
    taken: u16,
    /// How many descriptors the chain in flight with each buffer id has; 0 where there is none.
    chains: Box<[u16]>,
    in_flight: u16,
    /// The id of the chain that was taken last, while it may still be put back.
    last_taken: Option<u16>,
    order: Option<Order>,

    /// The first used descriptor that the driver cannot see yet, and the flags that will show it and those behind it.
    hidden: Option<(u16, u16)>,
    /// Used descriptors since we last decided whether to notify; None before the first time.
    undecided: Option<u16>,
    /// Whether the driver was shown any since.
    shown: bool,

    /// What outlives this process of the above, if the front-end gave memory for it.
    record: Option<Box<Recorded>>,
}

#[derive(Debug)]
struct Recorded {
    record: PackedRecord,
    /// Chains that a device before us had taken, by their first entry: they come before what is available.
    resubmit: VecDeque<u16>,
    /// Whether the chain that was taken last was one of them.
    last_was_one: bool,
    /// The first entry of the chain in flight with each buffer id.
    entries: Box<[u16]>,
    /// The descriptors of the chain that is being taken.
    copied: Vec<Copied>,
}

// SAFETY: the pointers are into shared memory that `walk.snapshot` keeps mapped, and the ring is used by one thread at a
// time: every method that touches them takes `&mut self`.
unsafe impl Send for PackedRing {}

impl Ring for PackedRing {
    fn new(
        addresses: RingAddresses,
        size: u16,
        base: u32,
        options: RingOptions,
        limits: RingLimits,
        snapshot: Arc<Snapshot>,
    ) -> Result<Self, RingError> {
        if size == 0 || size > super::MAX_QUEUE_SIZE {
            return Err(RingError::ImpossibleSize { size });
        }
        let parts = Parts::resolve(addresses, size, &snapshot, options)?;
        let mut ring = Self {
            parts,
            size,
            options,
            addresses,
            walk: Walk::new(snapshot, options.indirect, limits),
            avail: Position::from_bits(FRESH as u16),
            used: Position::from_bits(FRESH as u16),
            taken: 0,
            chains: vec![0; size.into()].into(),
            in_flight: 0,
            last_taken: None,
            order: options.in_order.then(Order::default),
            hidden: None,
            undecided: None,
            shown: false,
            record: None,
        };
        (ring.avail, ring.used) = ring.understand(base);
        let impossible = RingError::ImpossibleBase { base, size };
        ring.taken = ring.avail.ahead_of(ring.used, size).ok_or(impossible)?;
        Ok(ring)
    }

    fn recover(mut self, slot: &InflightSlot) -> Result<Self, RingError> {
        let (record, Recovered { used, avail, resubmit }) =
            PackedRecord::open(slot, self.size, self.used, |at| self.is_available(at))?;
        (self.used, self.avail) = (used, avail);
        self.taken = avail.ahead_of(used, self.size).unwrap_or(0);
        self.hide_unpublished();
        let entries = vec![0; self.size.into()].into();
        let resubmit = resubmit.into();
        self.record = Some(Box::new(Recorded { record, resubmit, last_was_one: false, entries, copied: Vec::new() }));
        Ok(self)
    }

    fn resubmitting(&self) -> u16 {
        self.record.as_ref().map_or(0, |recorded| recorded.resubmit.len() as u16)
    }

    fn resolve(&self, snapshot: &Snapshot) -> Result<RingPointers, RingError> {
        Parts::resolve(self.addresses, self.size, snapshot, self.options).map(RingPointers)
    }

    fn move_to(&mut self, pointers: RingPointers, snapshot: Arc<Snapshot>) {
        self.parts = pointers.0;
        self.walk.snapshot = snapshot;
    }

    fn relocate(&mut self, addresses: RingAddresses) -> Result<(), RingError> {
        self.parts = Parts::resolve(addresses, self.size, &self.walk.snapshot, self.options)?;
        self.addresses = addresses;
        Ok(())
    }

    fn snapshot(&self) -> &Arc<Snapshot> {
        &self.walk.snapshot
    }

    fn size(&self) -> u16 {
        self.size
    }

    fn descriptors(&self) -> Option<u64> {
        self.walk.snapshot.guest_address(self.parts.descriptors.cast())
    }

    fn base(&self) -> u32 {
        u32::from(self.avail.bits()) | u32::from(self.used.bits()) << 16
    }

    fn in_flight(&self) -> u16 {
        self.in_flight
    }

    fn look(&mut self) -> Result<bool, RingError> {
        Ok(self.resubmitting() > 0 || self.is_available(self.avail))
    }

    fn available(&mut self) -> Result<u16, RingError> {
        let (mut at, mut left, mut count) = (self.avail, self.size - self.taken, self.resubmitting());
        while left > 0 && self.is_available(at) {
            count += 1;
            let mut goes_on = true;
            // A chain that does not fit is an error when it is taken.
            while goes_on && left > 0 {
                goes_on = self.flags(at.slot).load(Ordering::Relaxed) & NEXT.to_le() != 0;
                at = at.plus(1, self.size);
                left -= 1;
            }
        }
        Ok(count)
    }

    fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        if let Some(recorded) = &self.record
            && let Some(first) = recorded.resubmit.front().copied()
        {
            return self.pop_again(first, chain).map(|()| true);
        }
        if !self.is_available(self.avail) {
            return Ok(false);
        }
        chain.start(self.avail.slot);
        let (id, descriptors) = self.follow(chain)?;
        self.check_id(self.avail.slot, id)?;
        if let Some(recorded) = &mut self.record {
            recorded.entries[usize::from(id)] = recorded.record.taken(&recorded.copied)?;
            recorded.last_was_one = false;
        }
        chain.set_head(id);
        self.avail = self.avail.plus(descriptors, self.size);
        self.taken += descriptors;
        self.count_taken(id, descriptors);
        Ok(true)
    }

    fn unpop(&mut self, head: u16) -> bool {
        if self.last_taken.take_if(|last| *last == head).is_none() {
            return false;
        }
        let descriptors = std::mem::take(&mut self.chains[usize::from(head)]);
        self.in_flight -= 1;
        if let Some(order) = &mut self.order {
            order.put_back();
        }
        if let Some(recorded) = &mut self.record {
            let first = recorded.entries[usize::from(head)];
            if recorded.last_was_one {
                recorded.resubmit.push_front(first);
                return true;
            }
            recorded.record.put_back(first);
        }
        self.avail = self.avail.minus(descriptors, self.size);
        self.taken -= descriptors;
        true
    }

    fn push_used(&mut self, used: Used) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.last_taken.take_if(|last| *last == used.head);
        match self.order.take() {
            None => self.fill_used(used),
            Some(mut order) => {
                order.done(used, |used| self.fill_used(used));
                self.order = Some(order);
            }
        }
    }

    fn show(&mut self) {
        let Some((first, flags)) = self.hidden.take() else { return };
        if let Some(recorded) = &mut self.record {
            recorded.record.before_publish(self.used);
        }
        self.shown = true;
        self.flags(first).store(flags.to_le(), Ordering::Release);
        crash::point();
        if let Some(recorded) = &mut self.record {
            recorded.record.after_publish();
        }
    }

    fn decide(&mut self) -> Option<bool> {
        if !std::mem::take(&mut self.shown) {
            return None;
        }
        // The driver may be about to sleep: it must see the descriptor, or we must see that it wants a notification.
        fence(Ordering::SeqCst);
        let suppression = u32::from_le(self.driver_events().load(Ordering::Relaxed));
        // Who went once round the ring has passed whatever the driver waits for.
        let Some(slots) = self.undecided.replace(0).filter(|slots| *slots < self.size) else {
            return Some((suppression >> 16) as u16 & 3 != EVENTS_DISABLE);
        };
        Some(wants_event(suppression, self.used, slots, self.size, self.options.event_idx))
    }

    fn unpublished(&self) -> [Written; 3] {
        let nothing = Written::Descriptors(0, 0);
        let Some((first, _)) = self.hidden else { return [nothing; 3] };
        let slots = |from: u16, to: u16| Written::Descriptors(16 * u64::from(from), 16 * u64::from(to - from));
        if first < self.used.slot {
            [slots(first, self.used.slot), nothing, nothing]
        } else {
            [slots(first, self.size), slots(0, self.used.slot), nothing]
        }
    }

    fn kick_suppression(&self) -> Written {
        Written::Used(0, 4)
    }

    fn disable_kicks(&mut self) {
        // With EVENT_IDX the event of the past does that by itself.
        if !self.options.event_idx {
            self.set_device_events(EVENTS_DISABLE);
        }
    }

    fn enable_kicks(&mut self) -> Result<bool, RingError> {
        self.set_device_events(if self.options.event_idx { EVENTS_AT_DESCRIPTOR } else { EVENTS_ENABLE });
        // Either the driver sees the request, or we see its descriptor.
        fence(Ordering::SeqCst);
        self.look()
    }
}

impl PackedRing {
    /// Where `base` says that both sides are. Some front ends know half of it, or send 0 for a fresh ring.
    fn understand(&self, base: u32) -> (Position, Position) {
        let avail = Position::from_bits(base as u16);
        match (base >> 16) as u16 {
            0 if base == 0 && !self.was_ever_used() => {
                (Position::from_bits(FRESH as u16), Position::from_bits(FRESH as u16))
            }
            0 if avail.wrap => (avail, avail),
            used => (avail, Position::from_bits(used)),
        }
    }

    /// Whether the ring was gone around before. In the first round no descriptor has the bit that says used, until a
    /// device sets it; in a ring where both wrap counters are 0 some have.
    fn was_ever_used(&self) -> bool {
        (0..self.size).any(|slot| u16::from_le(self.flags(slot).load(Ordering::Relaxed)) & USED != 0)
    }

    fn is_available(&self, at: Position) -> bool {
        u16::from_le(self.flags(at.slot).load(Ordering::Acquire)) & (AVAIL | USED) == at.available()
    }

    /// What a device before us has filled and not published must not come to light with what we publish.
    fn hide_unpublished(&self) {
        let mut at = self.used;
        for _ in 0..self.taken {
            if u16::from_le(self.flags(at.slot).load(Ordering::Relaxed)) & (AVAIL | USED) == at.used() {
                self.flags(at.slot).store(at.available().to_le(), Ordering::Relaxed);
                crash::point();
            }
            at = at.plus(1, self.size);
        }
    }

    /// Take a chain that the record holds. Its place in the ring is behind us, and may be another's by now.
    #[cold]
    fn pop_again(&mut self, first: u16, chain: &mut Chain) -> Result<(), RingError> {
        let Some(recorded) = &mut self.record else { return Ok(()) };
        chain.start(first);
        chain.set_resubmitted();
        recorded.copied.clear();
        recorded.copied.extend(recorded.record.descriptors(first));
        let descriptors = recorded.copied.len() as u16;
        let mut id = 0;
        for (left, copied) in (0..descriptors).rev().zip(&recorded.copied) {
            let Copied { address, length, id: link, flags } = *copied;
            let descriptor = Descriptor { address, length, flags, link };
            if (flags & NEXT == 0) != (left == 0) {
                let reason = format!("entry {first}: the flags of its descriptors end the chain elsewhere than num");
                return Err(RingError::InflightRecord(reason));
            }
            if flags & INDIRECT == 0 {
                self.walk.add(first, descriptor, chain)?;
            } else {
                self.walk.indirect(first, descriptor, chain, follow_table)?;
            }
            id = link;
        }
        self.check_id(first, id)?;
        if let Some(recorded) = &mut self.record {
            recorded.resubmit.pop_front();
            recorded.last_was_one = true;
            recorded.entries[usize::from(id)] = first;
        }
        chain.set_head(id);
        self.count_taken(id, descriptors);
        Ok(())
    }

    /// Whether the chain at a descriptor may have a buffer id.
    fn check_id(&self, descriptor: u16, id: u16) -> Result<(), RingError> {
        match self.chains.get(usize::from(id)) {
            Some(0) => Ok(()),
            Some(_) => Err(RingError::IdInFlight { descriptor, id }),
            None => Err(RingError::IdOutOfRange { descriptor, id, size: self.size }),
        }
    }

    fn count_taken(&mut self, id: u16, descriptors: u16) {
        self.chains[usize::from(id)] = descriptors;
        self.in_flight += 1;
        self.last_taken = Some(id);
        if let Some(order) = &mut self.order {
            order.taken(id);
        }
    }

    /// Add everything that the next chain has. Returns its buffer id, and how many descriptors it takes in the ring.
    fn follow(&mut self, chain: &mut Chain) -> Result<(u16, u16), RingError> {
        let free = self.size - self.taken;
        let mut at = self.avail;
        if let Some(recorded) = &mut self.record {
            recorded.copied.clear();
        }
        for count in 1..=free {
            // SAFETY: a position is less than `size`, and the ring was resolved over `size` entries of 16 bytes. The
            // guest may write concurrently: hence volatile copies, used alone.
            let descriptor = unsafe {
                let entry = self.parts.descriptors.add(2 * usize::from(at.slot));
                Descriptor::from_packed([entry.read_volatile(), entry.add(1).read_volatile()])
            };
            if let Some(recorded) = &mut self.record {
                let Descriptor { address, length, flags, link: id } = descriptor;
                recorded.copied.push(Copied { address, length, id, flags });
            }
            if descriptor.flags & INDIRECT != 0 {
                self.walk.indirect(at.slot, descriptor, chain, follow_table)?;
                return Ok((descriptor.link, count));
            }
            self.walk.add(at.slot, descriptor, chain)?;
            if descriptor.flags & NEXT == 0 {
                return Ok((descriptor.link, count));
            }
            at = at.plus(1, self.size);
        }
        Err(RingError::ChainTooLong { head: self.avail.slot, limit: free.into() })
    }

    /// Write the next used descriptor: all of it but, if it is the first of a batch, what shows it.
    fn fill_used(&mut self, used: Used) {
        let Some(descriptors) = self.chains.get_mut(usize::from(used.head)).map(std::mem::take) else { return };
        if descriptors == 0 {
            return;
        }
        let slot = self.used.slot;
        let flags = self.used.used() | if used.written > 0 { WRITE } else { 0 };
        // SAFETY: as in `follow`; the length, aligned to 4, and the id, aligned to 2, are the third quarter of the entry
        // and half of the fourth. The driver does not look before the flags say so.
        unsafe {
            let entry = self.parts.descriptors.cast::<u32>().add(4 * usize::from(slot));
            entry.add(2).write_volatile(used.written.to_le());
            crash::point();
            entry.add(3).cast::<u16>().write_volatile(used.head.to_le());
            crash::point();
        }
        if let Some(recorded) = &mut self.record {
            recorded.record.completed(recorded.entries[usize::from(used.head)]);
        }
        if self.hidden.is_none() {
            self.hidden = Some((slot, flags));
        } else {
            self.flags(slot).store(flags.to_le(), Ordering::Relaxed);
            crash::point();
        }
        self.used = self.used.plus(descriptors, self.size);
        self.taken -= descriptors;
        if let Some(slots) = &mut self.undecided {
            *slots = slots.saturating_add(descriptors);
        }
    }

    /// The flags of a descriptor, `slot < size`.
    fn flags(&self, slot: u16) -> &AtomicU16 {
        // SAFETY: the last two bytes of an entry that was resolved; concurrent access is what atomics are for.
        unsafe { AtomicU16::from_ptr(self.parts.descriptors.cast().add(ENTRY * usize::from(slot) + FLAGS).as_ptr()) }
    }

    fn driver_events(&self) -> &AtomicU32 {
        // SAFETY: the structure was resolved over its 4 bytes, and is aligned to them.
        unsafe { AtomicU32::from_ptr(self.parts.avail.cast().as_ptr()) }
    }

    /// Ask the driver for kicks: never, always, or from the next descriptor on.
    fn set_device_events(&self, flags: u16) {
        let suppression = u32::from(self.avail.bits()) | u32::from(flags) << 16;
        // SAFETY: as in `driver_events`.
        let events = unsafe { AtomicU32::from_ptr(self.parts.used.cast().as_ptr()) };
        events.store(suppression.to_le(), Ordering::Relaxed);
    }
}

/// Add what is in an indirect table: every entry, one after the other.
fn follow_table(walk: &mut Walk, entries: &[[u8; 16]], chain: &mut Chain) -> Result<(), RingError> {
    for (index, entry) in (0..).zip(entries) {
        let inner = Descriptor::from_packed(words(entry));
        if inner.flags & INDIRECT != 0 {
            return Err(RingError::NestedIndirect { descriptor: index });
        }
        walk.add(index, inner, chain)?;
    }
    Ok(())
}
