//! The split ring, device side.
//!
//! Owns: where the next available entry is, what was published, when to notify.
//! Virtio 1.3, section 2.7.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::chain::{Chain, Used};
use crate::error::RingError;
use crate::memory::{Segment, Snapshot};

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;
pub(super) const AVAIL_NO_INTERRUPT: u16 = 1;
pub(super) const USED_NO_NOTIFY: u16 = 1;

const DESCRIPTOR_SIZE: u64 = 16;

/// Where the front-end put the three parts of a ring, in its user addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    pub descriptors: u64,
    pub avail: u64,
    pub used: u64,
}

impl RingAddresses {
    /// Refuse what no ring may have, whatever the memory: parts that are not aligned. Virtio 1.3, section 2.7.
    pub fn check_alignment(&self) -> Result<(), String> {
        for (name, address, alignment) in
            [("descriptor table", self.descriptors, 16), ("available ring", self.avail, 2), ("used ring", self.used, 4)]
        {
            if address % alignment != 0 {
                return Err(format!("the {name} is at {address:#x}; it must be aligned to {alignment} bytes"));
            }
        }
        Ok(())
    }
}

/// What driver and device agreed on for a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingOptions {
    pub event_idx: bool,
    /// Whether chains may be in indirect tables.
    pub indirect: bool,
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

#[derive(Clone, Copy)]
pub(super) struct Descriptor {
    pub(super) address: u64,
    pub(super) length: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

impl Descriptor {
    fn from_words(address: u64, rest: u64) -> Self {
        let (address, rest) = (u64::from_le(address), u64::from_le(rest));
        Self { address, length: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }
}

/// Host pointers to the parts of one ring, each valid over its whole extent while the snapshot lives.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parts {
    pub(super) descriptors: NonNull<u64>,
    pub(super) avail: NonNull<u16>,
    pub(super) used: NonNull<u16>,
}

impl Parts {
    pub(super) fn resolve(
        addresses: RingAddresses,
        size: u16,
        snapshot: &Snapshot,
        event_idx: bool,
    ) -> Result<Self, RingError> {
        let event = if event_idx { 2 } else { 0 };
        let entries = u64::from(size);
        let part = |name: &str, address: u64, length: u64, alignment: usize| {
            // The guest's address was checked, but a region may begin anywhere in its file.
            snapshot.user_pointer(address, length).filter(|pointer| pointer.addr().get() % alignment == 0).ok_or_else(|| {
                RingError::MemoryGone(format!(
                    "the {name} at user addresses {address:#x}..{:#x} is not aligned, or not inside one region of guest \
                     memory ({})",
                    u128::from(address) + u128::from(length),
                    snapshot.describe_user()
                ))
            })
        };
        Ok(Self {
            descriptors: part("descriptor table", addresses.descriptors, DESCRIPTOR_SIZE * entries, 16)?.cast(),
            avail: part("available ring", addresses.avail, 4 + 2 * entries + event, 2)?.cast(),
            used: part("used ring", addresses.used, 4 + 8 * entries + event, 4)?.cast(),
        })
    }
}

/// A running split ring.
#[derive(Debug)]
pub struct SplitRing {
    parts: Parts,
    size: u16,
    options: RingOptions,
    limits: RingLimits,
    addresses: RingAddresses,
    snapshot: Arc<Snapshot>,

    /// The entry to take next, and how far the driver had come when we last looked.
    next_avail: u16,
    avail: u16,
    /// The entry to fill next, and how many of the filled ones the driver can see.
    next_used: u16,
    published: u16,
    /// What `published` was when we last decided whether to notify; None before the first time.
    decided: Option<u16>,
    /// Chains taken and not given back.
    in_flight: u16,
    /// The chain that was taken last, while it may still be put back.
    last_taken: Option<u16>,

    /// Indirect tables are copied here before they are looked at.
    table: Vec<u8>,
}

// SAFETY: the pointers are into shared memory that `snapshot` keeps mapped, and the ring is used by one thread at a
// time: every method that touches them takes `&mut self`.
unsafe impl Send for SplitRing {}

impl SplitRing {
    /// Start at available index `base`, and at the used index that the ring itself says.
    ///
    /// `size` must be a power of two up to [`super::MAX_QUEUE_SIZE`].
    pub fn new(
        addresses: RingAddresses,
        size: u16,
        base: u16,
        options: RingOptions,
        snapshot: Arc<Snapshot>,
    ) -> Result<Self, RingError> {
        debug_assert!(size.is_power_of_two() && size <= super::MAX_QUEUE_SIZE);
        let parts = Parts::resolve(addresses, size, &snapshot, options.event_idx)?;
        let mut ring = Self {
            parts,
            size,
            options,
            limits: RingLimits::default(),
            addresses,
            snapshot,
            next_avail: base,
            avail: base,
            next_used: 0,
            published: 0,
            decided: None,
            in_flight: 0,
            last_taken: None,
            table: Vec::new(),
        };
        ring.next_used = u16::from_le(ring.used_index().load(Ordering::Relaxed));
        ring.published = ring.next_used;
        Ok(ring)
    }

    /// The ring with limits of its own.
    #[must_use]
    pub fn with_limits(self, limits: RingLimits) -> Self {
        Self { limits, ..self }
    }

    /// The same ring over other memory, or an error that leaves it as it was.
    pub fn resolve(&self, snapshot: &Snapshot) -> Result<RingPointers, RingError> {
        Parts::resolve(self.addresses, self.size, snapshot, self.options.event_idx).map(RingPointers)
    }

    /// Go on over `snapshot`, from which `pointers` were resolved.
    pub fn move_to(&mut self, pointers: RingPointers, snapshot: Arc<Snapshot>) {
        self.parts = pointers.0;
        self.snapshot = snapshot;
    }

    /// Go on at other addresses in the same memory, or stay where it is with an error.
    pub fn relocate(&mut self, addresses: RingAddresses) -> Result<(), RingError> {
        self.parts = Parts::resolve(addresses, self.size, &self.snapshot, self.options.event_idx)?;
        self.addresses = addresses;
        Ok(())
    }

    #[must_use]
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The available index that the next chain will be taken from.
    #[must_use]
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Chains taken and not given back yet.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// How many chains the driver has made available that were not taken yet.
    pub fn available(&mut self) -> Result<u16, RingError> {
        let avail = u16::from_le(self.avail_index().load(Ordering::Acquire));
        let waiting = avail.wrapping_sub(self.next_avail);
        if waiting > self.size - self.in_flight {
            let free = self.size - self.in_flight;
            return Err(RingError::IndexJump { from: self.next_avail, to: avail, free });
        }
        self.avail = avail;
        Ok(waiting)
    }

    /// Take the next chain that the last [`available`](Self::available) counted. False if there is none left.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        if self.next_avail == self.avail {
            return Ok(false);
        }
        let slot = usize::from(self.next_avail & (self.size - 1));
        // SAFETY: `slot < size`, and the available ring was resolved over `2 + size` entries at least. The copy is used.
        let head = u16::from_le(unsafe { self.parts.avail.add(2 + slot).read_volatile() });
        if head >= self.size {
            return Err(RingError::HeadOutOfRange { head, size: self.size });
        }
        chain.start(head);
        self.walk(head, chain)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        self.in_flight += 1;
        self.last_taken = Some(head);
        Ok(true)
    }

    /// Give the chain that was taken last back to the available ring, as if it had not been taken. False, and nothing
    /// happens, if `head` is not the one that was taken last.
    pub fn unpop(&mut self, head: u16) -> bool {
        if self.last_taken.take_if(|last| *last == head).is_none() {
            return false;
        }
        self.next_avail = self.next_avail.wrapping_sub(1);
        self.in_flight -= 1;
        true
    }

    /// Fill the next used entry. The driver sees it after [`publish`](Self::publish).
    pub fn push_used(&mut self, used: Used) {
        let slot = usize::from(self.next_used & (self.size - 1));
        // SAFETY: `slot < size`, and the used ring was resolved over `size` entries of 8 bytes after its 4-byte head.
        // Its alignment of 4 makes the two stores aligned. The driver does not look before the index says so.
        unsafe {
            let entry = self.parts.used.add(2 + 4 * slot).cast::<u32>();
            entry.write_volatile(u32::from(used.head).to_le());
            entry.add(1).write_volatile(used.written.to_le());
        }
        self.next_used = self.next_used.wrapping_add(1);
        self.in_flight = self.in_flight.saturating_sub(1);
        self.last_taken.take_if(|last| *last == used.head);
    }

    /// Show the driver every used entry that was filled. Returns whether it wants to be notified.
    #[must_use]
    pub fn publish(&mut self) -> bool {
        if self.published == self.next_used {
            return false;
        }
        self.published = self.next_used;
        self.used_index().store(self.next_used.to_le(), Ordering::Release);
        // The driver may be about to sleep: it must see the index, or we must see that it wants a notification.
        fence(Ordering::SeqCst);
        let since = self.decided.replace(self.next_used);
        if self.options.event_idx {
            let event = u16::from_le(self.used_event().load(Ordering::Relaxed));
            since.is_none_or(|since| needs_event(event, self.next_used, since))
        } else {
            u16::from_le(self.avail_flags().load(Ordering::Relaxed)) & AVAIL_NO_INTERRUPT == 0
        }
    }

    /// Ask the driver not to kick: the ring is being looked at anyway.
    pub fn disable_kicks(&mut self) {
        // With EVENT_IDX the event index of the past does that by itself.
        if !self.options.event_idx {
            self.used_flags().store(USED_NO_NOTIFY.to_le(), Ordering::Relaxed);
        }
    }

    /// Ask the driver to kick for the next chain. Returns whether one came before it could know.
    pub fn enable_kicks(&mut self) -> Result<bool, RingError> {
        if self.options.event_idx {
            self.avail_event().store(self.next_avail.to_le(), Ordering::Relaxed);
        } else {
            self.used_flags().store(0, Ordering::Relaxed);
        }
        // Either the driver sees the request, or we see its entry.
        fence(Ordering::SeqCst);
        Ok(self.available()? > 0)
    }

    fn walk(&mut self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        let mut index = head;
        for _ in 0..self.size {
            // SAFETY: `index < size` (the head was checked, and so is every `next` below), and the table was resolved
            // over `size` entries of 16 bytes. The guest may write concurrently: hence volatile copies, used alone.
            let descriptor = unsafe {
                let entry = self.parts.descriptors.add(2 * usize::from(index));
                Descriptor::from_words(entry.read_volatile(), entry.add(1).read_volatile())
            };
            if descriptor.flags & INDIRECT != 0 {
                return self.walk_indirect(index, descriptor, chain);
            }
            self.add(index, descriptor, chain)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            if descriptor.next >= self.size {
                let size = u32::from(self.size);
                return Err(RingError::NextOutOfRange { descriptor: index, next: descriptor.next, size });
            }
            index = descriptor.next;
        }
        Err(RingError::ChainTooLong { head, limit: u32::from(self.size) })
    }

    fn walk_indirect(&mut self, outer: u16, descriptor: Descriptor, chain: &mut Chain) -> Result<(), RingError> {
        if !self.options.indirect {
            return Err(RingError::IndirectNotNegotiated { descriptor: outer });
        }
        if descriptor.flags & NEXT != 0 {
            return Err(RingError::IndirectWithNext { descriptor: outer, flags: descriptor.flags });
        }
        let limit = self.limits.max_indirect * DESCRIPTOR_SIZE as u32;
        let length = descriptor.length;
        if length == 0 || !length.is_multiple_of(DESCRIPTOR_SIZE as u32) || length > limit {
            return Err(RingError::IndirectLength { descriptor: outer, length, limit });
        }
        let mut table = std::mem::take(&mut self.table);
        let result = self.walk_table(outer, descriptor, &mut table, chain);
        self.table = table;
        result
    }

    fn walk_table(
        &mut self,
        outer: u16,
        descriptor: Descriptor,
        table: &mut Vec<u8>,
        chain: &mut Chain,
    ) -> Result<(), RingError> {
        table.clear();
        table.resize(descriptor.length as usize, 0);
        let mut copied = 0;
        let copy = |segment: Segment| {
            let piece = &mut table[copied..copied + segment.length];
            // SAFETY: the segment was translated just now, and `self.snapshot` keeps it mapped.
            unsafe { crate::memory::access::read(segment.pointer.as_ptr(), piece) };
            copied += segment.length;
        };
        self.snapshot
            .pieces(descriptor.address, u64::from(descriptor.length), copy)
            .map_err(|_| self.outside(outer, descriptor))?;

        let (entries, _) = table.as_chunks::<{ DESCRIPTOR_SIZE as usize }>();
        let mut index = 0;
        for _ in 0..entries.len() {
            let entry = &entries[usize::from(index)];
            let word = |at: usize| u64::from_ne_bytes(std::array::from_fn(|byte| entry[at + byte]));
            let inner = Descriptor::from_words(word(0), word(8));
            if inner.flags & INDIRECT != 0 {
                return Err(RingError::NestedIndirect { descriptor: index });
            }
            self.add(index, inner, chain)?;
            if inner.flags & NEXT == 0 {
                return Ok(());
            }
            if usize::from(inner.next) >= entries.len() {
                let size = entries.len() as u32;
                return Err(RingError::NextOutOfRange { descriptor: index, next: inner.next, size });
            }
            index = inner.next;
        }
        Err(RingError::ChainTooLong { head: chain.head(), limit: entries.len() as u32 })
    }

    #[inline]
    fn add(&mut self, index: u16, descriptor: Descriptor, chain: &mut Chain) -> Result<(), RingError> {
        let writable = descriptor.flags & WRITE != 0;
        if !chain.may_go_on(writable) {
            return Err(RingError::ReadableAfterWritable { descriptor: index });
        }
        self.snapshot
            .pieces(descriptor.address, u64::from(descriptor.length), |segment| {
                chain.push_segment(segment, writable);
            })
            .map_err(|_| self.outside(index, descriptor))?;
        let bytes = chain.readable() + chain.writable();
        if bytes > u64::from(self.limits.max_bytes) {
            return Err(RingError::ChainTooLarge { head: chain.head(), bytes, limit: self.limits.max_bytes });
        }
        Ok(())
    }

    #[cold]
    fn outside(&self, index: u16, descriptor: Descriptor) -> RingError {
        RingError::OutsideMemory {
            descriptor: index,
            start: descriptor.address,
            end: u128::from(descriptor.address) + u128::from(descriptor.length),
            memory: self.snapshot.describe(),
        }
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

/// Where a ring would be in another snapshot. Only [`SplitRing::move_to`] can use it.
#[derive(Debug)]
pub struct RingPointers(Parts);

/// Whether going from `old` to `new` passes `event`. Virtio 1.3, section 2.7.7.2.
pub(super) fn needs_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
