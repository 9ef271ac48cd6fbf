//! The split ring, device side.
//!
//! Owns: where the next available entry is, what was published, when to notify.
//! Virtio 1.3, section 2.7.

use std::collections::VecDeque;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::chain::{Chain, Used};
use super::crash;
use super::endian::Endian;
use super::inflight::{InflightSlot, SplitRecord};
use super::order::Order;
use super::ring::{
    Descriptor, INDIRECT, NEXT, Parts, Ring, RingAddresses, RingLimits, RingOptions, RingPointers, Written, needs_event,
};
use super::walk::{Walk, words};
use crate::error::RingError;
use crate::memory::Snapshot;

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
    parts: Parts,
    size: u16,
    options: RingOptions,
    addresses: RingAddresses,
    walk: Walk,

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
    /// The chain that was taken last, while it may still be put back.
    last_taken: Option<u16>,
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

// SAFETY: the pointers are into shared memory that `walk.snapshot` keeps mapped, and the ring is used by one thread at a
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
        let parts = Parts::resolve(addresses, size, &snapshot, options)?;
        let mut ring = Self {
            endian: PhantomData,
            parts,
            size,
            options,
            addresses,
            walk: Walk::new(snapshot, options.indirect, limits),
            next_avail: base,
            avail: base,
            next_used: 0,
            published: 0,
            decided: None,
            undecided: false,
            in_flight: 0,
            last_taken: None,
            order: options.in_order.then(Order::default),
            record: None,
        };
        ring.next_used = E::u16(ring.used_index().load(Ordering::Relaxed));
        ring.published = ring.next_used;
        Ok(ring)
    }

    fn recover(mut self, slot: &InflightSlot) -> Result<Self, RingError> {
        let (record, resubmit) = SplitRecord::open(slot, self.size, self.next_used)?;
        self.next_avail = self.next_used.wrapping_add(resubmit.len() as u16);
        self.avail = self.next_avail;
        self.record = Some(Box::new(Recorded { record, resubmit, last_was_one: false }));
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
        let free = self.size - self.order.as_ref().map_or(self.in_flight, Order::waiting) - again;
        if waiting > free {
            return Err(RingError::IndexJump { from: self.next_avail, to: avail, free });
        }
        self.avail = avail;
        Ok(waiting + again)
    }

    fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        if let Some(recorded) = &self.record
            && let Some(head) = recorded.resubmit.front().copied()
        {
            return self.pop_again(head, chain).map(|()| true);
        }
        if self.next_avail == self.avail {
            return Ok(false);
        }
        let head = self.head_at(self.next_avail);
        if head >= self.size {
            return Err(RingError::HeadOutOfRange { head, size: self.size });
        }
        chain.start(head);
        self.walk(head, chain)?;
        if let Some(recorded) = &mut self.record {
            recorded.record.taken(head);
            recorded.last_was_one = false;
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        self.count_taken(head);
        Ok(true)
    }

    fn unpop(&mut self, head: u16) -> bool {
        if self.last_taken.take_if(|last| *last == head).is_none() {
            return false;
        }
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
        Some(if self.options.event_idx {
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
        let size = u64::from(self.size);
        let first = u64::from(self.published & (self.size - 1));
        let before_end = count.min(size - first);
        let after = (count - before_end).min(size);
        [Written::Used(0, 4), Written::Used(4 + 8 * first, 8 * before_end), Written::Used(4, 8 * after)]
    }

    fn kick_suppression(&self) -> Written {
        if self.options.event_idx { Written::Used(4 + 8 * u64::from(self.size), 2) } else { Written::Used(0, 2) }
    }

    fn disable_kicks(&mut self) {
        // With EVENT_IDX the event index of the past does that by itself.
        if !self.options.event_idx {
            self.used_flags().store(E::u16(USED_NO_NOTIFY), Ordering::Relaxed);
        }
    }

    fn enable_kicks(&mut self) -> Result<bool, RingError> {
        if self.options.event_idx {
            self.avail_event().store(E::u16(self.next_avail), Ordering::Relaxed);
        } else {
            self.used_flags().store(0, Ordering::Relaxed);
        }
        // Either the driver sees the request, or we see its entry.
        fence(Ordering::SeqCst);
        Ok(self.available()? > 0)
    }
}

impl<E: Endian> SplitRing<E> {
    /// Take a chain that the record holds. It has its mark, and its place in the available ring is behind us.
    #[cold]
    fn pop_again(&mut self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        chain.start(head);
        self.walk(head, chain)?;
        chain.set_resubmitted();
        if let Some(recorded) = &mut self.record {
            recorded.resubmit.pop_front();
            recorded.last_was_one = true;
        }
        self.count_taken(head);
        Ok(())
    }

    fn count_taken(&mut self, head: u16) {
        self.in_flight += 1;
        self.last_taken = Some(head);
        if let Some(order) = &mut self.order {
            order.taken(head);
        }
    }

    fn fill_used(&mut self, used: Used) {
        let slot = usize::from(self.next_used & (self.size - 1));
        // SAFETY: `slot < size`, and the used ring was resolved over `size` entries of 8 bytes after its 4-byte head.
        // Its alignment of 4 makes the two stores aligned. The driver does not look before the index says so.
        unsafe {
            let entry = self.parts.used.add(2 + 4 * slot).cast::<u32>();
            entry.write_volatile(E::u32(used.head.into()));
            crash::point();
            entry.add(1).write_volatile(E::u32(used.written));
            crash::point();
        }
        if let Some(recorded) = &mut self.record {
            recorded.record.completed(used.head);
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Entry `index` of the available ring.
    fn head_at(&self, index: u16) -> u16 {
        let slot = usize::from(index & (self.size - 1));
        // SAFETY: `slot < size`, and the available ring was resolved over `2 + size` entries at least. The copy is used.
        E::u16(unsafe { self.parts.avail.add(2 + slot).read_volatile() })
    }

    fn walk(&mut self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        let mut index = head;
        for _ in 0..self.size {
            // SAFETY: `index < size` (the head was checked, and so is every `next` below), and the table was resolved
            // over `size` entries of 16 bytes. The guest may write concurrently: hence volatile copies, used alone.
            let descriptor = unsafe {
                let entry = self.parts.descriptors.add(2 * usize::from(index));
                Descriptor::from_split::<E>([entry.read_volatile(), entry.add(1).read_volatile()])
            };
            if descriptor.flags & INDIRECT != 0 {
                return self.walk.indirect(index, descriptor, chain, follow_table::<E>);
            }
            self.walk.add(index, descriptor, chain)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            if descriptor.link >= self.size {
                let size = u32::from(self.size);
                return Err(RingError::NextOutOfRange { descriptor: index, next: descriptor.link, size });
            }
            index = descriptor.link;
        }
        Err(RingError::ChainTooLong { head, limit: u32::from(self.size) })
    }

    fn avail_flags(&self) -> &AtomicU16 {
        // SAFETY: offset 0 of the available ring, resolved and aligned to 2; concurrent access is what atomics are for.
        unsafe { AtomicU16::from_ptr(self.parts.avail.as_ptr()) }
    }

    fn avail_index(&self) -> &AtomicU16 {
        // SAFETY: offset 2 of the available ring; as above.
        unsafe { AtomicU16::from_ptr(self.parts.avail.add(1).as_ptr()) }
    }

    fn used_event(&self) -> &AtomicU16 {
        // SAFETY: behind the available ring's `size` entries; resolved as part of it, because EVENT_IDX was negotiated.
        unsafe { AtomicU16::from_ptr(self.parts.avail.add(2 + usize::from(self.size)).as_ptr()) }
    }

    fn used_flags(&self) -> &AtomicU16 {
        // SAFETY: offset 0 of the used ring, resolved and aligned to 4.
        unsafe { AtomicU16::from_ptr(self.parts.used.as_ptr()) }
    }

    fn used_index(&self) -> &AtomicU16 {
        // SAFETY: offset 2 of the used ring; as above.
        unsafe { AtomicU16::from_ptr(self.parts.used.add(1).as_ptr()) }
    }

    fn avail_event(&self) -> &AtomicU16 {
        // SAFETY: behind the used ring's `size` entries; resolved as part of it, because EVENT_IDX was negotiated.
        unsafe { AtomicU16::from_ptr(self.parts.used.add(2 + 4 * usize::from(self.size)).as_ptr()) }
    }
}

/// Add what is in an indirect table, in the order of its links.
fn follow_table<E: Endian>(walk: &mut Walk, entries: &[[u8; 16]], chain: &mut Chain) -> Result<(), RingError> {
    let mut index = 0;
    for _ in 0..entries.len() {
        let inner = Descriptor::from_split::<E>(words(&entries[usize::from(index)]));
        if inner.flags & INDIRECT != 0 {
            return Err(RingError::NestedIndirect { descriptor: index });
        }
        walk.add(index, inner, chain)?;
        if inner.flags & NEXT == 0 {
            return Ok(());
        }
        if usize::from(inner.link) >= entries.len() {
            let size = entries.len() as u32;
            return Err(RingError::NextOutOfRange { descriptor: index, next: inner.link, size });
        }
        index = inner.link;
    }
    Err(RingError::ChainTooLong { head: chain.head(), limit: entries.len() as u32 })
}
