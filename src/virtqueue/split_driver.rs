//! The split ring, driver side.
//!
//! Owns what the format decides: where entries are, and what an index means. Virtio 1.3, section 2.7.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::chain::Used;
use super::driver::{Common, Driver, Element, Indirect};
use super::endian::Endian;
use super::ring::{Descriptor, NEXT, RingAddresses, RingOptions, needs_event};
use super::split::{AVAIL_NO_INTERRUPT, USED_NO_NOTIFY};
use crate::error::RingError;
use crate::memory::Snapshot;

/// Where the flags and the index are in the available ring and in the used ring, in words of 16 bits.
const FLAGS: usize = 0;
const INDEX: usize = 1;
const ENTRIES: usize = 2;

/// The driver's end of a split ring.
#[derive(Debug)]
pub struct SplitDriver<E: Endian> {
    endian: PhantomData<E>,
    common: Common,
}

// SAFETY: the pointers are into shared memory that `common` keeps mapped, and every method that changes anything there
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
        let ring = Self { endian: PhantomData, common: Common::new(addresses, size, base, options, snapshot)? };
        for part in [Self::avail, Self::used] {
            part(&ring, FLAGS).store(0, Ordering::Relaxed);
            part(&ring, INDEX).store(E::u16(base), Ordering::Relaxed);
        }
        if ring.common.event_idx {
            // Both sides want to hear of the first entry.
            ring.used_event().store(E::u16(base), Ordering::Relaxed);
            ring.avail_event().store(E::u16(base), Ordering::Relaxed);
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
        E::u16(self.used(INDEX).load(Ordering::Acquire)).into()
    }

    fn add(&mut self, elements: &[Element], indirect: Option<Indirect>) -> Result<u16, RingError> {
        let head = self.common.first_free();
        let entry = |mut descriptor: Descriptor, next: Option<u16>| {
            if let Some(next) = next {
                descriptor.flags |= NEXT;
                descriptor.link = next;
            }
            descriptor.to_split::<E>()
        };
        let (needed, descriptors) = self.common.begin(elements, indirect, head, entry)?;
        let mut last = head;
        for mut descriptor in descriptors {
            last = self.common.take_slot();
            if descriptor.flags & NEXT != 0 {
                descriptor.link = self.common.first_free();
            }
            let words = descriptor.to_split::<E>();
            // SAFETY: `last` came from the free list, so it is less than `size`, and the table was resolved over `size`
            // entries of 16 bytes. The device does not look at an entry before a chain is published that contains it.
            unsafe {
                let entry = self.common.parts.descriptors.add(2 * usize::from(last));
                entry.write_volatile(words[0]);
                entry.add(1).write_volatile(words[1]);
            }
        }
        let entry = ENTRIES + usize::from(self.common.added & (self.common.size - 1));
        self.avail(entry).store(E::u16(head), Ordering::Relaxed);
        self.common.add(head, last, needed, elements);
        Ok(head)
    }

    fn publish(&mut self) -> bool {
        let added = self.common.added;
        let before = std::mem::replace(&mut self.common.shown, added);
        if before == added {
            return false;
        }
        self.avail(INDEX).store(E::u16(added), Ordering::Release);
        // The device may be about to sleep: it must see the index, or we must see that it wants a kick.
        fence(Ordering::SeqCst);
        if self.common.event_idx {
            needs_event(E::u16(self.avail_event().load(Ordering::Relaxed)), added, before)
        } else {
            E::u16(self.used(FLAGS).load(Ordering::Relaxed)) & USED_NO_NOTIFY == 0
        }
    }

    fn look(&mut self) -> Result<(), RingError> {
        let done = self.done()?;
        if done == 0 {
            return Ok(());
        }
        let at = ENTRIES + 4 * usize::from(self.common.taken & (self.common.size - 1));
        // SAFETY: the used ring was resolved over `size` entries of 8 bytes after its 4-byte head, and is aligned to 4.
        // The device may write concurrently: hence volatile copies, used alone.
        let (id, written) = unsafe {
            let entry = self.common.parts.used.add(at).cast::<u32>();
            (E::u32(entry.read_volatile()), E::u32(entry.add(1).read_volatile()))
        };
        let (head, slot) = self.common.submitted(id)?;
        // The available and the used index count the same chains.
        let batch = slot.added_at.wrapping_sub(self.common.taken).wrapping_add(1);
        if self.common.order.is_some() && batch > done {
            return Err(RingError::UsedBatch { head, batch, done });
        }
        self.common.give_back(Used { head, written })
    }

    fn disable_calls(&mut self) {
        // With EVENT_IDX the event index of the past does that by itself.
        if !self.common.event_idx {
            self.avail(FLAGS).store(E::u16(AVAIL_NO_INTERRUPT), Ordering::Relaxed);
        }
    }

    fn enable_calls(&mut self, count: u16) -> Result<bool, RingError> {
        if self.common.event_idx {
            let event = self.common.taken.wrapping_add(count.saturating_sub(1));
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
    /// How many chains were given back that were not taken yet.
    fn done(&self) -> Result<u16, RingError> {
        let to = E::u16(self.used(INDEX).load(Ordering::Acquire));
        let done = to.wrapping_sub(self.common.taken);
        if done > self.outstanding() {
            return Err(RingError::UsedIndexJump { from: self.common.taken, to, outstanding: self.outstanding() });
        }
        Ok(done)
    }

    /// Word `at` of the available ring, which has its flags, its index, its entries and `used_event`.
    fn avail(&self, at: usize) -> &AtomicU16 {
        debug_assert!(at < ENTRIES + usize::from(self.common.size) + usize::from(self.common.event_idx));
        // SAFETY: the available ring was resolved over that many words, and is aligned to 2. Every caller keeps to them;
        // concurrent access is what atomics are for.
        unsafe { AtomicU16::from_ptr(self.common.parts.avail.add(at).as_ptr()) }
    }

    /// Word `at` of the used ring, whose entries are four words long, and which ends with `avail_event`.
    fn used(&self, at: usize) -> &AtomicU16 {
        debug_assert!(at < ENTRIES + 4 * usize::from(self.common.size) + usize::from(self.common.event_idx));
        // SAFETY: as in `avail`; the used ring is aligned to 4.
        unsafe { AtomicU16::from_ptr(self.common.parts.used.add(at).as_ptr()) }
    }

    /// Exists with EVENT_IDX only.
    fn used_event(&self) -> &AtomicU16 {
        self.avail(ENTRIES + usize::from(self.common.size))
    }

    /// Likewise.
    fn avail_event(&self) -> &AtomicU16 {
        self.used(ENTRIES + 4 * usize::from(self.common.size))
    }
}

impl Descriptor {
    fn to_split<E: Endian>(self) -> [u64; 2] {
        [E::u64(self.address), E::pack(self.length, self.flags, self.link)]
    }
}
