//! The packed ring, device side.
//!
//! Owns: where the next available descriptor is, where the next used one goes, which buffer ids are in flight, when to
//! notify. Virtio 1.3, section 2.8.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use super::chain::{Chain, Draft, Used};
use super::inflight::{Copied, InflightSlot, PackedRecord, Recovered};
use super::order::Order;
use super::ring::{
    Common, Descriptor, INDIRECT, NEXT, NO_CHAIN, Ring, RingAddresses, RingLimits, RingOptions, WRITE, Written,
    needs_event,
};
use super::walk::{Walk, chain_too_long, words};
use crate::error::RingError;
use crate::memory::Snapshot;
use crate::memory::crash;

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
    common: Common,

    /// The descriptor to take next, and the one to use next.
    avail: Position,
    used: Position,
    /// Descriptors from the one to the other: those of chains that were taken and not given back.
    taken: u16,
    /// How many descriptors the chain in flight with each buffer id has; 0 where there is none.
    chains: Box<[u16]>,
    in_flight: u16,
    /// The id of the chain that was taken last, while it may still be put back, or `NO_CHAIN`.
    last_taken: u32,
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

// SAFETY: the pointers are into shared memory that `common.walk.snapshot` keeps mapped, and the ring is used by one thread at a
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
        let mut ring = Self {
            common: Common::new(addresses, size, options, limits, snapshot)?,
            avail: Position::from_bits(FRESH as u16),
            used: Position::from_bits(FRESH as u16),
            taken: 0,
            chains: vec![0; size.into()].into(),
            in_flight: 0,
            last_taken: NO_CHAIN,
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
            PackedRecord::open(slot, self.common.size, self.used, |at| self.is_available(at))?;
        (self.used, self.avail) = (used, avail);
        self.taken = avail.ahead_of(used, self.common.size).unwrap_or(0);
        self.hide_unpublished();
        let entries = vec![0; self.common.size.into()].into();
        let resubmit = resubmit.into();
        self.record = Some(Box::new(Recorded { record, resubmit, last_was_one: false, entries, copied: Vec::new() }));
        Ok(self)
    }

    fn resubmitting(&self) -> u16 {
        self.record.as_ref().map_or(0, |recorded| recorded.resubmit.len() as u16)
    }

    fn common(&self) -> &Common {
        &self.common
    }

    fn common_mut(&mut self) -> &mut Common {
        &mut self.common
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
        let (mut at, mut left, mut count) = (self.avail, self.common.size - self.taken, self.resubmitting());
        while left > 0 && self.is_available(at) {
            count += 1;
            let mut goes_on = true;
            // A chain that does not fit is an error when it is taken.
            while goes_on && left > 0 {
                goes_on = self.flags(at.slot).load(Ordering::Relaxed) & NEXT.to_le() != 0;
                at = at.plus(1, self.common.size);
                left -= 1;
            }
        }
        Ok(count)
    }

    /// What is there is found out by taking it: twice as much each time.
    fn room(&self, before: usize) -> usize {
        before.max(1)
    }

    fn take(&mut self, chains: &mut [Chain]) -> Result<usize, RingError> {
        let again = if self.resubmitting() > 0 { self.take_again(chains)? } else { 0 };
        let (mut count, mut at, mut free) = (again, self.avail, self.common.size - self.taken);
        for chain in &mut chains[again..] {
            if !self.is_available(at) {
                break;
            }
            let (id, descriptors) = match self.follow(at, free, chain) {
                Ok(found) => found,
                Err(error) if count == 0 => return Err(*error),
                Err(_) => break,
            };
            chain.set_head(id);
            self.chains[usize::from(id)] = descriptors;
            self.last_taken = id.into();
            if let Some(order) = &mut self.order {
                order.taken(id);
            }
            at = at.plus(descriptors, self.common.size);
            free -= descriptors;
            count += 1;
        }
        self.avail = at;
        self.taken = self.common.size - free;
        self.in_flight += (count - again) as u16;
        Ok(count)
    }

    fn unpop(&mut self, head: u16) -> bool {
        if self.last_taken != u32::from(head) {
            return false;
        }
        self.last_taken = NO_CHAIN;
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
        self.avail = self.avail.minus(descriptors, self.common.size);
        self.taken -= descriptors;
        true
    }

    fn fill_used(&mut self, used: &[Used]) {
        self.in_flight = self.in_flight.saturating_sub(u16::try_from(used.len()).unwrap_or(u16::MAX));
        let (mut end, mut slots) = (self.used, 0);
        for used in used {
            if self.last_taken == u32::from(used.head) {
                self.last_taken = NO_CHAIN;
            }
            let descriptors =
                if self.order.is_none() { self.write_used(end, *used) } else { self.write_in_order(end, *used) };
            end = end.plus(descriptors, self.common.size);
            slots += descriptors;
        }
        self.used = end;
        self.taken -= slots;
        if let Some(undecided) = &mut self.undecided {
            *undecided = undecided.saturating_add(slots);
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
        let Some(slots) = self.undecided.replace(0).filter(|slots| *slots < self.common.size) else {
            return Some((suppression >> 16) as u16 & 3 != EVENTS_DISABLE);
        };
        Some(wants_event(suppression, self.used, slots, self.common.size, self.common.options.event_idx))
    }

    fn unpublished(&self) -> [Written; 3] {
        let nothing = Written::Descriptors(0, 0);
        let Some((first, _)) = self.hidden else { return [nothing; 3] };
        let slots = |from: u16, to: u16| Written::Descriptors(16 * u64::from(from), 16 * u64::from(to - from));
        if first < self.used.slot {
            [slots(first, self.used.slot), nothing, nothing]
        } else {
            [slots(first, self.common.size), slots(0, self.used.slot), nothing]
        }
    }

    fn kick_suppression(&self) -> Written {
        Written::Used(0, 4)
    }

    fn disable_kicks(&mut self) {
        // With EVENT_IDX the event of the past does that by itself.
        if !self.common.options.event_idx {
            self.set_device_events(EVENTS_DISABLE);
        }
    }

    fn enable_kicks(&mut self) -> Result<bool, RingError> {
        self.set_device_events(if self.common.options.event_idx { EVENTS_AT_DESCRIPTOR } else { EVENTS_ENABLE });
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
        (0..self.common.size).any(|slot| u16::from_le(self.flags(slot).load(Ordering::Relaxed)) & USED != 0)
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
            at = at.plus(1, self.common.size);
        }
    }

    #[inline(never)]
    fn note_descriptor(&mut self, address: u64, length: u32, flags: u16, id: u16) {
        if let Some(recorded) = &mut self.record {
            recorded.copied.push(Copied { address, length, id, flags });
        }
    }

    #[inline(never)]
    fn note_used(&mut self, id: u16) {
        if let Some(recorded) = &mut self.record {
            recorded.record.completed(recorded.entries[usize::from(id)]);
        }
    }

    /// Say in the record that a chain was taken whose descriptors were copied.
    #[inline(never)]
    fn note_taken(&mut self, id: u16) -> Result<(), Box<RingError>> {
        if let Some(recorded) = &mut self.record {
            recorded.entries[usize::from(id)] = recorded.record.taken(&recorded.copied)?;
            recorded.last_was_one = false;
        }
        Ok(())
    }

    /// Take chains that the record holds. Their places in the ring are behind us, and may be others' by now.
    #[cold]
    #[inline(never)]
    fn take_again(&mut self, chains: &mut [Chain]) -> Result<usize, RingError> {
        let mut taken = 0;
        for chain in chains {
            let first = self.record.as_ref().and_then(|recorded| recorded.resubmit.front().copied());
            let Some(first) = first else { break };
            match self.take_recorded(first, chain) {
                Ok(()) => taken += 1,
                Err(error) if taken == 0 => return Err(*error),
                Err(_) => break,
            }
        }
        Ok(taken)
    }

    fn take_recorded(&mut self, first: u16, chain: &mut Chain) -> Result<(), Box<RingError>> {
        let Some(recorded) = &mut self.record else { return Ok(()) };
        recorded.copied.clear();
        recorded.copied.extend(recorded.record.descriptors(first));
        let descriptors = recorded.copied.len() as u16;
        let id = replay(&mut self.common.walk, first, &recorded.copied, chain)?;
        if self.chains.get(usize::from(id)) != Some(&0) {
            return Err(self.bad_id(first, id));
        }
        if let Some(recorded) = &mut self.record {
            recorded.resubmit.pop_front();
            recorded.last_was_one = true;
            recorded.entries[usize::from(id)] = first;
        }
        chain.set_head(id);
        chain.set_resubmitted();
        self.chains[usize::from(id)] = descriptors;
        self.in_flight += 1;
        self.last_taken = id.into();
        if let Some(order) = &mut self.order {
            order.taken(id);
        }
        Ok(())
    }

    /// Why the chain at a descriptor may not have a buffer id.
    #[cold]
    #[inline(never)]
    fn bad_id(&self, descriptor: u16, id: u16) -> Box<RingError> {
        let size = self.common.size;
        Box::new(if id < size {
            RingError::IdInFlight { descriptor, id }
        } else {
            RingError::IdOutOfRange { descriptor, id, size }
        })
    }

    /// Put the chain together that begins at a descriptor which is available, where `free` descriptors are. Returns its
    /// buffer id, and how many descriptors it takes in the ring.
    #[inline(always)]
    fn follow(&mut self, start: Position, free: u16, chain: &mut Chain) -> Result<(u16, u16), Box<RingError>> {
        let (id, descriptors) = self.walk(start, free, chain)?;
        if self.chains.get(usize::from(id)) != Some(&0) {
            return Err(self.bad_id(start.slot, id));
        }
        if self.record.is_some() {
            self.note_taken(id)?;
        }
        Ok((id, descriptors))
    }

    #[inline(always)]
    fn walk(&mut self, start: Position, free: u16, chain: &mut Chain) -> Result<(u16, u16), Box<RingError>> {
        let mut draft = Draft::new(chain, start.slot);
        let mut slot = start.slot;
        let keeps_record = self.record.is_some();
        if let Some(recorded) = &mut self.record {
            recorded.copied.clear();
        }
        for count in 1..=free {
            // SAFETY: a slot is less than `size`, and the ring was resolved over `size` entries of 16 bytes. The
            // guest may write concurrently: hence volatile copies, used alone.
            let descriptor = unsafe {
                let entry = self.common.parts.descriptors.add(2 * usize::from(slot));
                Descriptor::from_packed([entry.read_volatile(), entry.add(1).read_volatile()])
            };
            if keeps_record {
                self.note_descriptor(descriptor.address, descriptor.length, descriptor.flags, descriptor.link);
            }
            if descriptor.flags & INDIRECT != 0 {
                self.common.walk.indirect(slot, descriptor, draft, follow_table)?;
                return Ok((descriptor.link, count));
            }
            self.common.walk.add(slot, descriptor, &mut draft)?;
            if descriptor.flags & NEXT == 0 {
                draft.finish();
                return Ok((descriptor.link, count));
            }
            slot = if slot + 1 < self.common.size { slot + 1 } else { 0 };
        }
        Err(chain_too_long(start.slot, free.into()))
    }

    /// Write used descriptors from `start` on for a chain that is done, and those that have waited for it. Returns how
    /// many descriptors they have.
    #[inline(never)]
    fn write_in_order(&mut self, start: Position, used: Used) -> u16 {
        let mut slots = 0;
        if let Some(mut order) = self.order.take() {
            order.done(used, |used| slots += self.write_used(start.plus(slots, self.common.size), used));
            self.order = Some(order);
        }
        slots
    }

    /// Write the used descriptor `at`: all of it but, if it is the first of a batch, what shows it. Returns how many
    /// descriptors the chain has.
    #[inline(always)]
    fn write_used(&mut self, at: Position, used: Used) -> u16 {
        let descriptors = self.chains.get_mut(usize::from(used.head)).map_or(0, std::mem::take);
        if descriptors == 0 {
            return 0;
        }
        let flags = at.used() | if used.written > 0 { WRITE } else { 0 };
        // SAFETY: as in `walk`; the length, aligned to 4, and the id, aligned to 2, are the third quarter of the entry
        // and half of the fourth. The driver does not look before the flags say so.
        unsafe {
            let entry = self.common.parts.descriptors.cast::<u32>().add(4 * usize::from(at.slot));
            entry.add(2).write_volatile(used.written.to_le());
            crash::point();
            entry.add(3).cast::<u16>().write_volatile(used.head.to_le());
            crash::point();
        }
        if self.record.is_some() {
            self.note_used(used.head);
        }
        if self.hidden.is_none() {
            self.hidden = Some((at.slot, flags));
        } else {
            self.flags(at.slot).store(flags.to_le(), Ordering::Relaxed);
            crash::point();
        }
        descriptors
    }

    /// The flags of a descriptor, `slot < size`.
    fn flags(&self, slot: u16) -> &AtomicU16 {
        // SAFETY: the last two bytes of an entry that was resolved; concurrent access is what atomics are for.
        unsafe {
            AtomicU16::from_ptr(self.common.parts.descriptors.cast().add(ENTRY * usize::from(slot) + FLAGS).as_ptr())
        }
    }

    fn driver_events(&self) -> &AtomicU32 {
        // SAFETY: the structure was resolved over its 4 bytes, and is aligned to them.
        unsafe { AtomicU32::from_ptr(self.common.parts.avail.cast().as_ptr()) }
    }

    /// Ask the driver for kicks: never, always, or from the next descriptor on.
    fn set_device_events(&self, flags: u16) {
        let suppression = u32::from(self.avail.bits()) | u32::from(flags) << 16;
        // SAFETY: as in `driver_events`.
        let events = unsafe { AtomicU32::from_ptr(self.common.parts.used.cast().as_ptr()) };
        events.store(suppression.to_le(), Ordering::Relaxed);
        crash::point();
    }
}

/// Put a chain together from what the record has of it, at its entry `first`. Returns its buffer id.
fn replay(walk: &mut Walk, first: u16, copied: &[Copied], chain: &mut Chain) -> Result<u16, Box<RingError>> {
    let mut draft = Draft::new(chain, first);
    let mut id = 0;
    for (left, copied) in (0..copied.len()).rev().zip(copied) {
        let Copied { address, length, id: link, flags } = *copied;
        let descriptor = Descriptor { address, length, flags, link };
        if (flags & NEXT == 0) != (left == 0) {
            let reason = format!("entry {first}: the flags of its descriptors end the chain elsewhere than num");
            return Err(Box::new(RingError::InflightRecord(reason)));
        }
        id = link;
        if flags & INDIRECT != 0 {
            return walk.indirect(first, descriptor, draft, follow_table).map(|()| id);
        }
        walk.add(first, descriptor, &mut draft)?;
    }
    draft.finish();
    Ok(id)
}

/// Add what is in an indirect table: every entry, one after the other.
fn follow_table(walk: &Walk, entries: &[[u8; 16]], draft: &mut Draft<'_>) -> Result<(), Box<RingError>> {
    for (index, entry) in (0..).zip(entries) {
        let inner = Descriptor::from_packed(words(entry));
        if inner.flags & INDIRECT != 0 {
            return Err(Box::new(RingError::NestedIndirect { descriptor: index }));
        }
        walk.add(index, inner, draft)?;
    }
    Ok(())
}
