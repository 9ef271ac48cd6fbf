//! The packed ring, device side.
//!
//! Owns: where the next available descriptor is, where the next used one goes, which buffer ids are in flight, when to
//! notify. Virtio 1.3, section 2.8.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

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
    fn from_packed([address, half]: [u64; 2]) -> Self {
        let length = u64::from_le(half) as u32;
        Self { address: u64::from_le(address), length, link: Self::id(half), flags: Self::flags(half) }
    }

    /// The buffer id, which is in the second half.
    fn id(half: u64) -> u16 {
        (u64::from_le(half) >> 32) as u16
    }

    /// The flags, which are in the second half.
    fn flags(half: u64) -> u16 {
        (u64::from_le(half) >> 48) as u16
    }
}

/// A chain in the ring: its buffer id, the descriptor behind it, and how many are free from there on.
struct Found {
    id: u16,
    end: usize,
    left: usize,
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
    /// The id of the chain that was taken last, which may be put back if it is in flight, or `NO_CHAIN`.
    last_taken: u32,

    /// Whether there is an order or a record: one question for the two of them.
    keeps_account: bool,
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
            keeps_account: options.in_order,
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
        self.keeps_account = true;
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
        let chains = &mut chains[again..];
        let taken = if self.keeps_account { self.take_next::<true>(chains) } else { self.take_next::<false>(chains) };
        match taken {
            Ok(count) => Ok(again + count),
            Err(error) if again == 0 => Err(*error),
            Err(_) => Ok(again),
        }
    }

    fn unpop(&mut self, head: u16) -> bool {
        if self.last_taken != u32::from(head) {
            return false;
        }
        self.last_taken = NO_CHAIN;
        let descriptors = std::mem::take(&mut self.chains[usize::from(head)]);
        if descriptors == 0 {
            return false;
        }
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
        if self.keeps_account {
            used.iter().for_each(|used| self.account(*used));
        } else {
            self.write_used(used);
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

    /// Say in the record, and in the order, that a chain was taken whose descriptors were copied.
    #[inline(never)]
    fn note_taken(&mut self, id: u16) -> Result<(), Box<RingError>> {
        if let Some(recorded) = &mut self.record {
            recorded.entries[usize::from(id)] = recorded.record.taken(&recorded.copied)?;
            recorded.last_was_one = false;
        }
        if let Some(order) = &mut self.order {
            order.taken(id);
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

    /// Take what the driver has made available. `ACCOUNT` is `keeps_account`: who keeps none has no trace of it here.
    fn take_next<const ACCOUNT: bool>(&mut self, chains: &mut [Chain]) -> Result<usize, Box<RingError>> {
        let size = usize::from(self.common.size);
        let (mut slot, mut free) = (usize::from(self.avail.slot), size - usize::from(self.taken));
        let mut available = self.avail.available();
        let (mut count, mut last_taken) = (0, self.last_taken);
        for chain in chains {
            // The flags that are looked at are the ones that count: they are not read again.
            let half = self.second_half(slot).load(Ordering::Acquire);
            if Descriptor::flags(half) & (AVAIL | USED) != available {
                break;
            }
            let Found { id, end, left } = match self.follow::<ACCOUNT>(slot, half, free, chain) {
                Ok(found) => found,
                Err(error) if count == 0 => return Err(error),
                Err(_) => break,
            };
            last_taken = id.into();
            // The end of a chain is behind its start, unless the ring's end is between them.
            if end <= slot {
                available ^= AVAIL | USED;
            }
            (slot, free) = (end, left);
            count += 1;
        }
        self.avail = Position { slot: slot as u16, wrap: available == AVAIL };
        (self.taken, self.last_taken) = ((size - free) as u16, last_taken);
        self.in_flight += count as u16;
        Ok(count)
    }

    /// Put the chain together that begins at a descriptor which is available, and whose second half is `half`. `free`
    /// descriptors are free.
    #[inline(always)]
    fn follow<const ACCOUNT: bool>(
        &mut self,
        start: usize,
        half: u64,
        free: usize,
        chain: &mut Chain,
    ) -> Result<Found, Box<RingError>> {
        let is_recorded = ACCOUNT && self.record.is_some();
        let found = if Descriptor::flags(half) & INDIRECT != 0 && !is_recorded && free > 0 {
            self.walk_table(start, half, chain)?;
            Found { id: Descriptor::id(half), end: self.behind(start), left: free - 1 }
        } else {
            self.walk(Draft::new(chain, start as u16), start, half, free, is_recorded)?
        };
        let id = found.id;
        match self.chains.get_mut(usize::from(id)) {
            Some(descriptors @ 0) => *descriptors = (free - found.left) as u16,
            _ => return Err(self.bad_id(start as u16, id)),
        }
        if ACCOUNT && let Err(error) = self.note_taken(id) {
            self.chains[usize::from(id)] = 0;
            return Err(error);
        }
        chain.set_head(id);
        Ok(found)
    }

    #[inline(always)]
    fn walk(
        &mut self,
        mut draft: Draft<'_>,
        start: usize,
        mut half: u64,
        free: usize,
        is_recorded: bool,
    ) -> Result<Found, Box<RingError>> {
        // Most chains of one descriptor are done here, where nothing is known to be before it.
        let only = Descriptor::from_packed([self.address(start), half]);
        if only.flags & NEXT == 0 && !is_recorded && free > 0 && self.common.walk.add_simple(only, &mut draft) {
            draft.finish();
            return Ok(Found { id: only.link, end: self.behind(start), left: free - 1 });
        }
        let (mut slot, mut left) = (start, free);
        loop {
            let address = self.address(slot);
            let descriptor = Descriptor::from_packed([address, half]);
            if is_recorded || left == 0 || !self.common.walk.add_simple(descriptor, &mut draft) {
                // In parts: the whole would be in memory from then on.
                let Found { id, end, left } = self.walk_on(draft, slot, address, half, left, free)?;
                return Ok(Found { id, end, left });
            }
            left -= 1;
            slot = self.behind(slot);
            if descriptor.flags & NEXT == 0 {
                draft.finish();
                return Ok(Found { id: descriptor.link, end: slot, left });
            }
            half = self.second_half(slot).load(Ordering::Relaxed);
        }
    }

    /// A chain that begins with a table has nothing else.
    #[inline(never)]
    fn walk_table(&mut self, start: usize, half: u64, chain: &mut Chain) -> Result<(), Box<RingError>> {
        let descriptor = Descriptor::from_packed([self.address(start), half]);
        self.common.walk.indirect(start as u16, descriptor, Draft::new(chain, start as u16), follow_table)
    }

    /// Go on at a descriptor that is not a simple one, or with a record, which has a copy of them all.
    #[cold]
    #[inline(never)]
    fn walk_on(
        &mut self,
        mut draft: Draft<'_>,
        mut slot: usize,
        address: u64,
        half: u64,
        mut left: usize,
        free: usize,
    ) -> Result<Found, Box<RingError>> {
        let mut descriptor = Descriptor::from_packed([address, half]);
        if let Some(recorded) = &mut self.record {
            recorded.copied.clear();
        }
        while left > 0 {
            left -= 1;
            if let Some(recorded) = &mut self.record {
                let Descriptor { address, length, link: id, flags } = descriptor;
                recorded.copied.push(Copied { address, length, id, flags });
            }
            let found = Found { id: descriptor.link, end: self.behind(slot), left };
            if descriptor.flags & INDIRECT != 0 {
                self.common.walk.indirect(slot as u16, descriptor, draft, follow_table)?;
                return Ok(found);
            }
            draft = self.common.walk.add(slot as u16, descriptor, draft)?;
            if descriptor.flags & NEXT == 0 {
                draft.finish();
                return Ok(found);
            }
            slot = found.end;
            descriptor = Descriptor::from_packed([self.address(slot), self.second_half(slot).load(Ordering::Relaxed)]);
        }
        Err(chain_too_long(draft.head(), free as u32))
    }

    /// Write a used descriptor for a chain that is done, and those that have waited for it, and say so in the record.
    #[inline(never)]
    fn account(&mut self, used: Used) {
        if self.last_taken == u32::from(used.head) {
            self.last_taken = NO_CHAIN;
        }
        match self.order.take() {
            None => self.record_used(used),
            Some(mut order) => {
                order.done(used, |used| self.record_used(used));
                self.order = Some(order);
            }
        }
    }

    fn record_used(&mut self, used: Used) {
        let was_in_flight = self.write_used(std::slice::from_ref(&used)) > 0;
        if was_in_flight && let Some(recorded) = &mut self.record {
            recorded.record.completed(recorded.entries[usize::from(used.head)]);
        }
    }

    /// Write the next used descriptors: all of them but, of the first of a batch, what shows it and those behind it.
    /// Returns how many descriptors of the ring they stand for.
    fn write_used(&mut self, used: &[Used]) -> u16 {
        let (mut slot, mut shown) = (usize::from(self.used.slot), self.used.used());
        let mut rest = used.iter();
        if self.hidden.is_none() {
            let first = rest.find(|used| self.write_half(**used, USED, &mut slot, &mut shown));
            self.hidden = first.map(|first| (self.used.slot, self.used.used() | written_flag(*first)));
        }
        for used in rest {
            self.write_half(*used, 0, &mut slot, &mut shown);
        }
        let end = Position { slot: slot as u16, wrap: shown != 0 };
        let slots = end.ahead_of(self.used, self.common.size).unwrap_or(0);
        self.used = end;
        self.taken -= slots;
        if let Some(undecided) = &mut self.undecided {
            *undecided = undecided.saturating_add(slots);
        }
        slots
    }

    /// Write the half of a used descriptor that says something, at `slot`, with `hidden` flags the other way round, and
    /// step over the descriptors that it stands for. Returns whether there are any, which a chain that was taken has.
    #[inline(always)]
    fn write_half(&mut self, used: Used, hidden: u16, slot: &mut usize, shown: &mut u16) -> bool {
        let descriptors = match self.chains.get_mut(usize::from(used.head)).map(std::mem::take) {
            Some(descriptors) if descriptors > 0 => usize::from(descriptors),
            _ => return false,
        };
        let flags = (*shown | written_flag(used)) ^ hidden;
        let half = u64::from(used.written) | u64::from(used.head) << 32 | u64::from(flags) << 48;
        self.second_half(*slot).store(half.to_le(), Ordering::Relaxed);
        crash::point();
        *slot += descriptors;
        let size = usize::from(self.common.size);
        if *slot >= size {
            *slot -= size;
            *shown ^= AVAIL | USED;
        }
        true
    }

    /// The address of a descriptor, `slot < size`.
    #[inline(always)]
    fn address(&self, slot: usize) -> u64 {
        // SAFETY: the ring was resolved over `size` entries of 16 bytes. The guest may write concurrently: hence a
        // volatile copy, used alone.
        unsafe { self.common.parts.descriptors.add(2 * slot).read_volatile() }
    }

    /// The slot behind another one.
    #[inline(always)]
    fn behind(&self, slot: usize) -> usize {
        if slot + 1 < usize::from(self.common.size) { slot + 1 } else { 0 }
    }

    /// The length, the buffer id and the flags of a descriptor, `slot < size`. They are read and written at once.
    #[inline(always)]
    fn second_half(&self, slot: usize) -> &AtomicU64 {
        // SAFETY: the second half of an entry of 16 bytes that was resolved, aligned to 16; concurrent access is what
        // atomics are for.
        unsafe { AtomicU64::from_ptr(self.common.parts.descriptors.add(2 * slot + 1).as_ptr()) }
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

/// Of a used descriptor: the flag that something was written to the chain.
fn written_flag(used: Used) -> u16 {
    if used.written > 0 { WRITE } else { 0 }
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
        draft = walk.add(first, descriptor, draft)?;
    }
    draft.finish();
    Ok(id)
}

/// Add what is in an indirect table: every entry, one after the other.
fn follow_table(walk: &Walk, entries: &[[u8; 16]], mut draft: Draft<'_>) -> Result<(), Box<RingError>> {
    for (index, entry) in (0..).zip(entries) {
        let inner = Descriptor::from_packed(words(entry));
        if inner.flags & INDIRECT != 0 {
            return Err(Box::new(RingError::NestedIndirect { descriptor: index }));
        }
        draft = walk.add(index, inner, draft)?;
    }
    draft.finish();
    Ok(())
}
