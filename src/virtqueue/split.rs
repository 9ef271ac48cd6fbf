//! The split ring, device side.
//!
//! Owns: where the next available entry is, what was published, when to notify.
//! Virtio 1.3, section 2.7.

use std::collections::VecDeque;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::chain::{Chain, Draft, Used};
use super::endian::Endian;
use super::inflight::{InflightSlot, SplitRecord};
use super::order::Order;
use super::ring::{
    Common, Descriptor, INDIRECT, NEXT, NO_CHAIN, Ring, RingAddresses, RingLimits, RingOptions, Written, needs_event,
};
use super::walk::{Walk, chain_too_long, words};
use crate::error::RingError;
use crate::memory::Snapshot;
use crate::memory::crash;

pub(super) const AVAIL_NO_INTERRUPT: u16 = 1;
pub(super) const USED_NO_NOTIFY: u16 = 1;

impl Descriptor {
    fn from_split<E: Endian>([address, rest]: [u64; 2]) -> Self {
        let (length, flags, link) = E::unpack(rest);
        Self { address: E::u64(address), length, flags, link }
    }
}

/// A running split ring.
#[derive(Debug)]
pub struct SplitRing<E: Endian> {
    endian: PhantomData<E>,
    common: Common,

    /// The entry to take next, and how far the driver had come when we last looked.
    next_avail: u16,
    avail: u16,
    /// The entry to fill next, and how many of the filled ones the driver can see.
    next_used: u16,
    published: u16,
    /// What `published` was when we last decided whether to notify; None before the first time.
    decided: Option<u16>,
    /// Whether it has changed since.
    undecided: bool,
    /// Chains taken and not given back.
    in_flight: u16,
    /// The chain that was taken last, while it may still be put back, or `NO_CHAIN`.
    last_taken: u32,

    /// Whether there is an order or a record: one question for the two of them.
    keeps_account: bool,
    order: Option<Order>,

    /// What outlives this process of the above, if the front-end gave memory for it.
    record: Option<Box<Recorded>>,
}

#[derive(Debug)]
struct Recorded {
    record: SplitRecord,
    /// Chains that a device before us had taken: they come before what is available.
    resubmit: VecDeque<u16>,
    /// Whether the chain that was taken last was one of them.
    last_was_one: bool,
}

// SAFETY: the pointers are into shared memory that `common.walk.snapshot` keeps mapped, and the ring is used by one thread at a
// time: every method that touches them takes `&mut self`.
unsafe impl<E: Endian> Send for SplitRing<E> {}

impl<E: Endian> Ring for SplitRing<E> {
    /// The used index is the one that the ring itself says.
    fn new(
        addresses: RingAddresses,
        size: u16,
        base: u32,
        options: RingOptions,
        limits: RingLimits,
        snapshot: Arc<Snapshot>,
    ) -> Result<Self, RingError> {
        if !size.is_power_of_two() || size > super::MAX_QUEUE_SIZE {
            return Err(RingError::ImpossibleSize { size });
        }
        let base = u16::try_from(base).map_err(|_| RingError::ImpossibleBase { base, size })?;
        let mut ring = Self {
            endian: PhantomData,
            common: Common::new(addresses, size, options, limits, snapshot)?,
            next_avail: base,
            avail: base,
            next_used: 0,
            published: 0,
            decided: None,
            undecided: false,
            in_flight: 0,
            last_taken: NO_CHAIN,
            keeps_account: options.in_order,
            order: options.in_order.then(Order::default),
            record: None,
        };
        ring.next_used = E::u16(ring.used_index().load(Ordering::Relaxed));
        ring.published = ring.next_used;
        Ok(ring)
    }

    fn recover(mut self, slot: &InflightSlot) -> Result<Self, RingError> {
        let (record, resubmit) = SplitRecord::open(slot, self.common.size, self.next_used)?;
        self.next_avail = self.next_used.wrapping_add(resubmit.len() as u16);
        self.avail = self.next_avail;
        self.keeps_account = true;
        self.record = Some(Box::new(Recorded { record, resubmit, last_was_one: false }));
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
        let Some(recorded) = &self.record else { return self.next_avail.into() };
        let base = self.next_avail.wrapping_sub(recorded.resubmit.len() as u16);
        let is_there = (0..).zip(&recorded.resubmit).all(|(at, head)| self.head_at(base.wrapping_add(at)) == *head);
        if is_there { base.into() } else { self.next_avail.into() }
    }

    fn in_flight(&self) -> u16 {
        self.in_flight
    }

    fn look(&mut self) -> Result<bool, RingError> {
        Ok(self.available()? > 0)
    }

    fn available(&mut self) -> Result<u16, RingError> {
        let avail = E::u16(self.avail_index().load(Ordering::Acquire));
        let waiting = avail.wrapping_sub(self.next_avail);
        let again = self.resubmitting();
        let free = self.common.size - self.order.as_ref().map_or(self.in_flight, Order::waiting) - again;
        if waiting > free {
            return Err(RingError::IndexJump { from: self.next_avail, to: avail, free });
        }
        self.avail = avail;
        Ok(waiting + again)
    }

    fn room(&self, _: usize) -> usize {
        usize::from(self.avail.wrapping_sub(self.next_avail)) + usize::from(self.resubmitting())
    }

    fn take(&mut self, chains: &mut [Chain]) -> Result<usize, RingError> {
        let again = if self.resubmitting() > 0 { self.take_again(chains)? } else { 0 };
        let first = self.next_avail;
        let ready = self.avail.wrapping_sub(first);
        let mut next = first;
        for chain in chains[again..].iter_mut().take(ready.into()) {
            let head = match self.follow(next, chain) {
                Ok(head) => head,
                Err(error) if again == 0 && next == first => return Err(*error),
                Err(_) => break,
            };
            next = next.wrapping_add(1);
            if self.keeps_account {
                self.note_taken(head);
            }
            self.last_taken = head.into();
        }
        let taken = next.wrapping_sub(first);
        self.next_avail = next;
        self.in_flight += taken;
        Ok(again + usize::from(taken))
    }

    fn unpop(&mut self, head: u16) -> bool {
        if self.last_taken != u32::from(head) {
            return false;
        }
        self.last_taken = NO_CHAIN;
        self.in_flight -= 1;
        if let Some(order) = &mut self.order {
            order.put_back();
        }
        if let Some(recorded) = &mut self.record {
            if recorded.last_was_one {
                recorded.resubmit.push_front(head);
                return true;
            }
            recorded.record.put_back(head);
        }
        self.next_avail = self.next_avail.wrapping_sub(1);
        true
    }

    fn fill_used(&mut self, used: &[Used]) {
        self.in_flight = self.in_flight.saturating_sub(u16::try_from(used.len()).unwrap_or(u16::MAX));
        let (mut next, mut last_taken) = (self.next_used, self.last_taken);
        for used in used {
            if last_taken == u32::from(used.head) {
                last_taken = NO_CHAIN;
            }
            if self.keeps_account {
                self.next_used = next;
                self.account(*used);
                next = self.next_used;
            } else {
                self.write_used(next, *used);
                next = next.wrapping_add(1);
            }
        }
        (self.next_used, self.last_taken) = (next, last_taken);
    }

    fn show(&mut self) {
        if self.published == self.next_used {
            return;
        }
        self.published = self.next_used;
        self.undecided = true;
        if let Some(recorded) = &mut self.record {
            recorded.record.before_publish();
        }
        self.used_index().store(E::u16(self.next_used), Ordering::Release);
        crash::point();
        if let Some(recorded) = &mut self.record {
            recorded.record.after_publish(self.next_used);
        }
    }

    fn decide(&mut self) -> Option<bool> {
        if !std::mem::take(&mut self.undecided) {
            return None;
        }
        // The driver may be about to sleep: it must see the index, or we must see that it wants a notification.
        fence(Ordering::SeqCst);
        let since = self.decided.replace(self.published);
        Some(if self.common.options.event_idx {
            let event = E::u16(self.used_event().load(Ordering::Relaxed));
            since.is_none_or(|since| needs_event(event, self.published, since))
        } else {
            E::u16(self.avail_flags().load(Ordering::Relaxed)) & AVAIL_NO_INTERRUPT == 0
        })
    }

    fn unpublished(&self) -> [Written; 3] {
        let count = u64::from(self.next_used.wrapping_sub(self.published));
        if count == 0 {
            return [Written::Used(0, 0); 3];
        }
        let size = u64::from(self.common.size);
        let first = u64::from(self.published & (self.common.size - 1));
        let before_end = count.min(size - first);
        let after = (count - before_end).min(size);
        [Written::Used(0, 4), Written::Used(4 + 8 * first, 8 * before_end), Written::Used(4, 8 * after)]
    }

    fn kick_suppression(&self) -> Written {
        if self.common.options.event_idx {
            Written::Used(4 + 8 * u64::from(self.common.size), 2)
        } else {
            Written::Used(0, 2)
        }
    }

    fn disable_kicks(&mut self) {
        // With EVENT_IDX the event index of the past does that by itself.
        if !self.common.options.event_idx {
            self.used_flags().store(E::u16(USED_NO_NOTIFY), Ordering::Relaxed);
            crash::point();
        }
    }

    fn enable_kicks(&mut self) -> Result<bool, RingError> {
        if self.common.options.event_idx {
            self.avail_event().store(E::u16(self.next_avail), Ordering::Relaxed);
        } else {
            self.used_flags().store(0, Ordering::Relaxed);
        }
        crash::point();
        // Either the driver sees the request, or we see its entry.
        fence(Ordering::SeqCst);
        Ok(self.available()? > 0)
    }
}

impl<E: Endian> SplitRing<E> {
    /// Take chains that the record holds. They have their marks, and their places in the available ring are behind us.
    #[cold]
    #[inline(never)]
    fn take_again(&mut self, chains: &mut [Chain]) -> Result<usize, RingError> {
        let mut taken = 0;
        for chain in chains {
            let Some(head) = self.record.as_ref().and_then(|recorded| recorded.resubmit.front().copied()) else {
                break;
            };
            match self.walk(head, chain) {
                Ok(()) => {}
                Err(error) if taken == 0 => return Err(*error),
                Err(_) => break,
            }
            chain.set_resubmitted();
            if let Some(recorded) = &mut self.record {
                recorded.resubmit.pop_front();
                recorded.last_was_one = true;
            }
            if let Some(order) = &mut self.order {
                order.taken(head);
            }
            self.last_taken = head.into();
            self.in_flight += 1;
            taken += 1;
        }
        Ok(taken)
    }

    /// Say in the record and in the order that a chain was taken.
    #[inline(never)]
    fn note_taken(&mut self, head: u16) {
        if let Some(recorded) = &mut self.record {
            recorded.record.taken(head);
            recorded.last_was_one = false;
        }
        if let Some(order) = &mut self.order {
            order.taken(head);
        }
    }

    /// Fill used entries for a chain that is done, and those that have waited for it, and say so in the record.
    #[inline(never)]
    fn account(&mut self, used: Used) {
        match self.order.take() {
            None => self.record_used(used),
            Some(mut order) => {
                order.done(used, |used| self.record_used(used));
                self.order = Some(order);
            }
        }
    }

    fn record_used(&mut self, used: Used) {
        self.write_used(self.next_used, used);
        if let Some(recorded) = &mut self.record {
            recorded.record.completed(used.head);
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Fill entry `index` of the used ring.
    #[inline(always)]
    fn write_used(&self, index: u16, used: Used) {
        let slot = usize::from(index & (self.common.size - 1));
        // SAFETY: `slot < size`, and the used ring was resolved over `size` entries of 8 bytes after its 4-byte head.
        // Its alignment of 4 makes the two stores aligned. The driver does not look before the index says so.
        unsafe {
            let entry = self.common.parts.used.add(2 + 4 * slot).cast::<u32>();
            entry.write_volatile(E::u32(used.head.into()));
            crash::point();
            entry.add(1).write_volatile(E::u32(used.written));
            crash::point();
        }
    }

    /// Entry `index` of the available ring.
    #[inline(always)]
    fn head_at(&self, index: u16) -> u16 {
        let slot = usize::from(index & (self.common.size - 1));
        // SAFETY: `slot < size`, and the available ring was resolved over `2 + size` entries at least. The copy is used.
        E::u16(unsafe { self.common.parts.avail.add(2 + slot).read_volatile() })
    }

    /// Put the chain together that entry `index` of the available ring names. Returns its head.
    #[inline(always)]
    fn follow(&mut self, index: u16, chain: &mut Chain) -> Result<u16, Box<RingError>> {
        let head = self.head_at(index);
        if head >= self.common.size {
            return Err(self.head_out_of_range(head));
        }
        self.walk(head, chain)?;
        Ok(head)
    }

    /// Put the chain at `head` together, which is less than `size`.
    #[inline(always)]
    fn walk(&mut self, head: u16, chain: &mut Chain) -> Result<(), Box<RingError>> {
        let size = self.common.size;
        let [mut address, mut half] = self.descriptor(head);
        if Descriptor::from_split::<E>([address, half]).flags & INDIRECT != 0 {
            return self.walk_table(head, address, half, chain);
        }
        let mut draft = Draft::new(chain, head);
        let mut index = head;
        for left in (1..=size).rev() {
            let descriptor = Descriptor::from_split::<E>([address, half]);
            if !self.common.walk.add_simple(descriptor, &mut draft) {
                return self.walk_on(draft, index, address, half, left);
            }
            if descriptor.flags & NEXT == 0 {
                draft.finish();
                return Ok(());
            }
            if descriptor.link >= size {
                return Err(next_out_of_range(index, descriptor.link, size.into()));
            }
            index = descriptor.link;
            [address, half] = self.descriptor(index);
        }
        Err(chain_too_long(head, size.into()))
    }

    /// A chain that begins with a table has nothing else.
    #[inline(never)]
    fn walk_table(&mut self, head: u16, address: u64, half: u64, chain: &mut Chain) -> Result<(), Box<RingError>> {
        let descriptor = Descriptor::from_split::<E>([address, half]);
        self.common.walk.indirect(head, descriptor, Draft::new(chain, head), follow_table::<E>)
    }

    /// Go on at a descriptor that is not a simple one. The chain may have `left` more, and this is one of them.
    #[cold]
    #[inline(never)]
    fn walk_on(
        &mut self,
        mut draft: Draft<'_>,
        mut index: u16,
        address: u64,
        half: u64,
        left: u16,
    ) -> Result<(), Box<RingError>> {
        let mut descriptor = Descriptor::from_split::<E>([address, half]);
        let size = self.common.size;
        for _ in 0..left {
            if descriptor.flags & INDIRECT != 0 {
                return self.common.walk.indirect(index, descriptor, draft, follow_table::<E>);
            }
            draft = self.common.walk.add(index, descriptor, draft)?;
            if descriptor.flags & NEXT == 0 {
                draft.finish();
                return Ok(());
            }
            if descriptor.link >= size {
                return Err(next_out_of_range(index, descriptor.link, size.into()));
            }
            index = descriptor.link;
            descriptor = Descriptor::from_split::<E>(self.descriptor(index));
        }
        Err(chain_too_long(draft.head(), size.into()))
    }

    /// Entry `index` of the descriptor table, which is less than `size`.
    #[inline(always)]
    fn descriptor(&self, index: u16) -> [u64; 2] {
        // SAFETY: `index < size`, and the table was resolved over `size` entries of 16 bytes. The guest may write
        // concurrently: hence volatile copies, used alone.
        unsafe {
            let entry = self.common.parts.descriptors.add(2 * usize::from(index));
            [entry.read_volatile(), entry.add(1).read_volatile()]
        }
    }

    #[cold]
    #[inline(never)]
    fn head_out_of_range(&self, head: u16) -> Box<RingError> {
        Box::new(RingError::HeadOutOfRange { head, size: self.common.size })
    }

    fn avail_flags(&self) -> &AtomicU16 {
        // SAFETY: offset 0 of the available ring, resolved and aligned to 2; concurrent access is what atomics are for.
        unsafe { AtomicU16::from_ptr(self.common.parts.avail.as_ptr()) }
    }

    fn avail_index(&self) -> &AtomicU16 {
        // SAFETY: offset 2 of the available ring; as above.
        unsafe { AtomicU16::from_ptr(self.common.parts.avail.add(1).as_ptr()) }
    }

    fn used_event(&self) -> &AtomicU16 {
        // SAFETY: behind the available ring's `size` entries; resolved as part of it, because EVENT_IDX was negotiated.
        unsafe { AtomicU16::from_ptr(self.common.parts.avail.add(2 + usize::from(self.common.size)).as_ptr()) }
    }

    fn used_flags(&self) -> &AtomicU16 {
        // SAFETY: offset 0 of the used ring, resolved and aligned to 4.
        unsafe { AtomicU16::from_ptr(self.common.parts.used.as_ptr()) }
    }

    fn used_index(&self) -> &AtomicU16 {
        // SAFETY: offset 2 of the used ring; as above.
        unsafe { AtomicU16::from_ptr(self.common.parts.used.add(1).as_ptr()) }
    }

    fn avail_event(&self) -> &AtomicU16 {
        // SAFETY: behind the used ring's `size` entries; resolved as part of it, because EVENT_IDX was negotiated.
        unsafe { AtomicU16::from_ptr(self.common.parts.used.add(2 + 4 * usize::from(self.common.size)).as_ptr()) }
    }
}

/// Add what is in an indirect table, in the order of its links.
fn follow_table<E: Endian>(walk: &Walk, entries: &[[u8; 16]], mut draft: Draft<'_>) -> Result<(), Box<RingError>> {
    let mut index = 0;
    for _ in 0..entries.len() {
        let inner = Descriptor::from_split::<E>(words(&entries[usize::from(index)]));
        if inner.flags & INDIRECT != 0 {
            return Err(Box::new(RingError::NestedIndirect { descriptor: index }));
        }
        draft = walk.add(index, inner, draft)?;
        if inner.flags & NEXT == 0 {
            draft.finish();
            return Ok(());
        }
        if usize::from(inner.link) >= entries.len() {
            return Err(next_out_of_range(index, inner.link, entries.len() as u32));
        }
        index = inner.link;
    }
    Err(chain_too_long(draft.head(), entries.len() as u32))
}

#[cold]
#[inline(never)]
fn next_out_of_range(descriptor: u16, next: u16, size: u32) -> Box<RingError> {
    Box::new(RingError::NextOutOfRange { descriptor, next, size })
}
