//! What only packed rings have: buffer ids, wrap counters, and what an independent reader makes of the same memory.

use super::*;
use crate::virtqueue::packed::{Position, wants_event};

const PACKED: RingOptions = RingOptions { packed: true, ..EVENT_IDX };
const AVAILABLE: u16 = 1 << 7;
const USED_BIT: u16 = 1 << 15;

impl Rig {
    /// Write a descriptor of a packed ring as a broken driver would.
    fn describe_packed(&self, table: u64, index: u16, address: u64, length: u32, id: u16, flags: u16) {
        self.describe(table, index, address, length, id, flags);
    }

    fn flags(&self, slot: u16) -> u16 {
        let bytes = self.peek(DESCRIPTORS + 16 * u64::from(slot) + 14, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    /// Let the device say that the buffer `id` is used, whether it has it or not.
    fn pretend_used(&self, slot: u16, id: u16, written: u32) {
        self.describe_packed(DESCRIPTORS, slot, 0, written, id, AVAILABLE | USED_BIT | WRITE);
    }
}

#[test]
fn a_packed_ring_is_laid_out_as_the_kernel_lays_it_out() {
    let offsets = crate::protocol::tests::run_c(
        "#include <stddef.h>
         #include <stdio.h>
         #include <linux/virtio_ring.h>
         int main(void) {
             #define AT(part) printf(\"%zu \", offsetof(struct vring_packed_desc, part))
             AT(addr); AT(len); AT(id); AT(flags);
             printf(\"%zu \", sizeof(struct vring_packed_desc));
             printf(\"%zu %zu \", offsetof(struct vring_packed_desc_event, off_wrap),
                    offsetof(struct vring_packed_desc_event, flags));
             printf(\"%d %d %d \", 1 << VRING_PACKED_DESC_F_AVAIL, 1 << VRING_PACKED_DESC_F_USED,
                    1 << VRING_PACKED_EVENT_F_WRAP_CTR);
             printf(\"%d\", VRING_PACKED_EVENT_FLAG_DESC);
             return 0;
         }",
    );
    let mut rig = Rig::new(3, 0, PACKED);
    rig.submit(&[readable(0x40_1111, 0x22)], None);
    rig.submit(&[writable(0x40_3333, 0x44), writable(0x40_5555, 0x66)], None);
    let word = |address: u64, length: usize| {
        rig.peek(address, length).iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
    };
    let offset = |at: usize| u64::try_from(offsets[at]).unwrap();
    let second = DESCRIPTORS + offset(4);
    let next_write = u64::from(NEXT | WRITE);
    assert_eq!((word(second + offset(0), 8), word(second + offset(1), 4)), (0x40_3333, 0x44));
    assert_eq!((word(second + offset(2), 2), word(second + offset(3), 2)), (1, next_write | offset(7)));
    let ids = [rig.take().head(), rig.take().head()];
    rig.complete(ids[0], 0);
    rig.complete(ids[1], 0x77);
    assert_eq!(rig.device.enable_kicks(), Ok(false));
    let word = |address: u64, length: usize| {
        rig.peek(address, length).iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
    };
    assert_eq!((word(second + offset(1), 4), word(second + offset(2), 2)), (0x77, 1));
    assert_eq!(word(second + offset(3), 2), u64::from(WRITE) | offset(7) | offset(8));
    // Three descriptors further is where the ring began, in the second round.
    assert_eq!((word(USED + offset(5), 2), word(USED + offset(6), 2)), (0, offset(10)));
    assert_eq!(offset(9), 1 << 15, "where the wrap counter is");
}

#[test]
fn the_extent_of_a_packed_ring_is_inside_memory_to_the_last_byte() {
    let rig = Rig::new(7, 0, PACKED);
    let start = |addresses| new_device(addresses, 7, 0, PACKED, rig.memory.clone()).map(drop);
    let end = USER + END;
    for good in [
        RingAddresses { descriptors: end - 112, ..ADDRESSES },
        RingAddresses { avail: end - 4, ..ADDRESSES },
        RingAddresses { used: end - 4, ..ADDRESSES },
    ] {
        assert_eq!((start(good), good.check_alignment(true)), (Ok(()), Ok(())));
    }
    for bad in [
        RingAddresses { descriptors: end - 96, ..ADDRESSES },
        RingAddresses { avail: end, ..ADDRESSES },
        RingAddresses { used: end, ..ADDRESSES },
        RingAddresses { avail: end - 6, ..ADDRESSES },
    ] {
        assert!(matches!(start(bad), Err(RingError::MemoryGone(_))), "{bad:x?}");
    }
    let unaligned = RingAddresses { avail: ADDRESSES.avail + 2, ..ADDRESSES };
    assert_eq!(unaligned.check_alignment(false), Ok(()));
    assert!(unaligned.check_alignment(true).unwrap_err().contains("driver event suppression"));
}

#[test]
fn every_size_is_gone_around_with_chains_that_lie_across_the_end() {
    for size in (2..=40).chain([255, 257, 1000, 32_767, 32_768]) {
        let mut rig = Rig::new(size, 0, PACKED);
        let pair = [readable(DATA, 1), writable(DATA, 1)];
        for _ in 0..if size > 100 { u32::from(size) + 3 } else { 3 * u32::from(size) } {
            let id = rig.submit(&pair, None);
            let chain = rig.take();
            assert_eq!((chain.head(), chain.readable(), chain.writable()), (id, 1, 1));
            rig.complete(id, 1);
            assert_eq!(rig.driver.pop(), Ok(Some(Used { head: id, written: 1 })));
            assert_eq!((rig.driver.pop(), rig.device.available()), (Ok(None), Ok(0)));
            assert_eq!(rig.device.base(), rig.driver.base());
        }
    }
}

#[test]
fn a_batch_is_shown_by_the_flags_of_its_first_descriptor_which_come_last() {
    let mut rig = Rig::new(4, 0, PACKED);
    let ids: Vec<_> = (0..3).map(|_| rig.driver.add(&[writable(DATA, 9)], None).unwrap()).collect();
    assert_eq!([rig.flags(0), rig.flags(1), rig.flags(2)], [0, AVAILABLE | WRITE, AVAILABLE | WRITE]);
    let _kick = rig.driver.publish();
    assert_eq!(rig.flags(0), AVAILABLE | WRITE);
    for id in &ids {
        rig.take();
        assert!(rig.device.in_flight() > 0, "{id}");
    }
    for id in ids {
        rig.device.push_used(Used { head: id, written: 9 });
    }
    let used = AVAILABLE | USED_BIT | WRITE;
    assert_eq!([rig.flags(0), rig.flags(1), rig.flags(2)], [AVAILABLE | WRITE, used, used]);
    let _call = rig.device.publish();
    assert_eq!(rig.flags(0), used);
}

#[test]
fn a_batch_stays_hidden_when_what_comes_first_in_it_was_never_taken() {
    let mut rig = Rig::new(4, 0, PACKED);
    let ids = [1, 2].map(|length| rig.submit(&[writable(DATA, length)], None));
    drop((rig.take(), rig.take()));
    let used = [u16::MAX, ids[1], ids[0]].map(|head| Used { head, written: 1 });
    rig.device.fill_used(&used);
    assert_eq!(rig.driver.pop(), Ok(None));
    rig.device.show();
    assert_eq!([(); 3].map(|()| rig.driver.pop().unwrap()), [Some(used[1]), Some(used[2]), None]);
}

#[test]
fn a_base_says_where_both_sides_are() {
    let rig = Rig::new(6, 0, PACKED);
    let base = |base| new_device(ADDRESSES, 6, base, PACKED, rig.memory.clone()).map(|ring| ring.base());
    assert_eq!(base(0x8000_8000), Ok(0x8000_8000));
    assert_eq!(base(0x0003_0005), Ok(0x0003_0005), "two descriptors are in flight");
    assert_eq!(base(0x8004_0001), Ok(0x8004_0001), "three are, around the end");
    assert_eq!(base(0x0002_8002), Ok(0x0002_8002), "all six are");
    for impossible in [0x8006_8000, 0x8000_8006, 0x0003_0002, 0x8001_0002, 0xffff_ffff] {
        assert_eq!(base(impossible), Err(RingError::ImpossibleBase { base: impossible, size: 6 }));
    }
}

#[test]
fn a_front_end_that_knows_half_of_the_base_is_understood() {
    let rig = Rig::new(6, 0, PACKED);
    let base = |base| new_device(ADDRESSES, 6, base, PACKED, rig.memory.clone()).unwrap().base();
    assert_eq!(base(0), 0x8000_8000, "nothing happened on this ring");
    assert_eq!(base(0x8000), 0x8000_8000);
    assert_eq!(base(0x8003), 0x8003_8003);
}

#[test]
fn base_zero_is_itself_in_a_ring_that_was_gone_around() {
    for shape in [1, 2, 3] {
        let mut rig = Rig::new(6, 0, PACKED);
        for _ in 0..6 / shape {
            let id = rig.submit(&[writable(DATA, 1), writable(DATA, 1), writable(DATA, 1)][..shape], None);
            rig.take();
            rig.complete(id, 0);
            assert_eq!(rig.driver.pop(), Ok(Some(Used { head: id, written: 0 })));
        }
        assert_eq!((rig.device.base(), rig.driver.base()), (0, 0));
        rig.device = new_device(ADDRESSES, 6, 0, PACKED, map(&rig.files)).unwrap();
        assert_eq!(rig.device.base(), 0);
        let id = rig.submit(&[writable(DATA, 1)], None);
        assert_eq!(rig.take().head(), id);
    }
}

#[test]
fn what_was_given_back_early_does_not_move_the_base_of_the_driver_too_far() {
    let mut rig = Rig::new(8, 0, PACKED);
    let pair = [writable(DATA, 1), writable(DATA, 1)];
    let ids = [rig.submit(&pair, None), rig.submit(&pair, None), rig.submit(&pair, None)];
    ids.iter().for_each(|_| drop(rig.take()));
    assert_eq!(rig.driver.base(), 0x8000_8000);
    rig.complete(ids[0], 0);
    assert_eq!(rig.driver.base(), 0x8002_8002);
    rig.complete(ids[1], 0);
    rig.complete(ids[2], 0);
    assert_eq!((rig.driver.base(), rig.device.base()), (0x8006_8006, 0x8006_8006));
}

// What a hostile driver writes.

#[test]
fn a_chain_longer_than_what_is_free_is_refused() {
    let mut rig = Rig::new(5, 0, PACKED);
    for slot in 0..5 {
        rig.describe_packed(DESCRIPTORS, slot, DATA, 1, 0, AVAILABLE | NEXT);
    }
    assert_eq!(rig.refusal(), RingError::ChainTooLong { head: 0, limit: 5 });

    let mut rig = Rig::new(5, 0, PACKED);
    rig.submit(&[readable(DATA, 1), readable(DATA, 1)], None);
    rig.take();
    for slot in 2..5 {
        rig.describe_packed(DESCRIPTORS, slot, DATA, 1, 3, AVAILABLE | NEXT);
    }
    assert_eq!(rig.refusal(), RingError::ChainTooLong { head: 2, limit: 3 });
}

#[test]
fn descriptors_that_are_in_flight_are_not_available_again() {
    let mut rig = Rig::new(2, 0, PACKED);
    rig.submit(&[readable(DATA, 1), readable(DATA, 1)], None);
    rig.take();
    rig.describe_packed(DESCRIPTORS, 0, DATA, 1, 1, USED_BIT);
    assert_eq!(rig.device.available(), Ok(0));
    assert_eq!(rig.device.pop(&mut Chain::default()), Err(RingError::ChainTooLong { head: 0, limit: 0 }));
}

#[test]
fn a_buffer_id_out_of_range_is_refused() {
    let mut rig = Rig::new(5, 0, PACKED);
    for id in [5, u16::MAX] {
        rig.describe_packed(DESCRIPTORS, 0, DATA, 1, id, AVAILABLE);
        assert_eq!(rig.refusal(), RingError::IdOutOfRange { descriptor: 0, id, size: 5 });
    }
    rig.describe_packed(DESCRIPTORS, 0, DATA, 1, u16::MAX, AVAILABLE | NEXT);
    rig.describe_packed(DESCRIPTORS, 1, DATA, 1, 4, AVAILABLE);
    assert_eq!(rig.take().head(), 4, "that of the last descriptor is the one that counts");
}

#[test]
fn a_buffer_id_that_is_in_flight_is_refused() {
    let mut rig = Rig::new(5, 0, PACKED);
    let id = rig.submit(&[writable(DATA, 1)], None);
    rig.take();
    rig.describe_packed(DESCRIPTORS, 1, DATA, 1, id, AVAILABLE);
    assert_eq!(rig.refusal(), RingError::IdInFlight { descriptor: 1, id });
    rig.complete(id, 0);
    assert_eq!(rig.take().head(), id, "it is free again");
}

#[test]
fn tables_that_cannot_be_are_refused_in_a_packed_ring() {
    let mut rig = Rig::new(8, 0, PACKED);
    rig.describe_packed(DESCRIPTORS, 0, DATA, 16, 0, AVAILABLE | INDIRECT | NEXT);
    assert_eq!(rig.refusal(), RingError::IndirectWithNext { descriptor: 0, flags: INDIRECT | NEXT });
    for length in [0, 1, 15, 17, 1025 * 16, u32::MAX, 0xffff_fff0] {
        rig.describe_packed(DESCRIPTORS, 0, DATA, length, 0, AVAILABLE | INDIRECT);
        assert_eq!(rig.refusal(), RingError::IndirectLength { descriptor: 0, length, limit: 16384 });
    }
    rig.describe_packed(DESCRIPTORS, 0, DATA, 32, 0, AVAILABLE | INDIRECT);
    rig.describe_packed(DATA, 1, DATA, 16, 0, INDIRECT);
    assert_eq!(rig.refusal(), RingError::NestedIndirect { descriptor: 1 });
    for start in [END - 31, u64::MAX - 31, u64::MAX] {
        rig.describe_packed(DESCRIPTORS, 0, start, 32, 0, AVAILABLE | INDIRECT);
        assert!(matches!(rig.refusal(), RingError::OutsideMemory { descriptor: 0, start: told, .. } if told == start));
    }
    let mut rig = Rig::new(8, 0, RingOptions { indirect: false, ..PACKED });
    let error = rig.provoke_with(&[writable(DATA, 1)], Some(Indirect { table: DATA, direct: 0 }));
    assert_eq!(error, RingError::IndirectNotNegotiated { descriptor: 0 });
}

#[test]
fn the_entries_of_a_table_are_not_linked() {
    let mut rig = Rig::new(8, 0, PACKED);
    rig.describe_packed(DESCRIPTORS, 0, DATA, 48, 3, AVAILABLE | INDIRECT | WRITE);
    rig.describe_packed(DATA, 0, DATA, 1, 7, 0);
    rig.describe_packed(DATA, 1, DATA, 2, 0, NEXT);
    rig.describe_packed(DATA, 2, DATA, 4, 9, WRITE | NEXT | AVAILABLE);
    let chain = rig.take();
    assert_eq!((chain.head(), chain.readable(), chain.writable()), (3, 3, 4));
    assert_eq!(rig.device.base(), 0x8000_8001, "a table takes one descriptor of the ring");
}

// What a hostile device writes.

#[test]
fn the_driver_of_a_packed_ring_refuses_what_it_did_not_submit() {
    for in_order in [false, true] {
        let mut rig = Rig::new(8, 0, RingOptions { in_order, ..PACKED });
        let id = rig.submit(&[writable(DATA, 4), writable(DATA, 4)], None);
        let hidden = rig.driver.add(&[writable(DATA, 4)], None).unwrap();
        for other in [7, 8, u16::MAX, hidden] {
            rig.pretend_used(0, other, 0);
            assert_eq!(rig.driver.pop(), Err(RingError::UsedNotSubmitted { head: other.into() }));
        }
        rig.pretend_used(0, id, 9);
        assert_eq!(rig.driver.pop(), Err(RingError::UsedTooLong { head: id, written: 9, writable: 8 }));
        assert_eq!((rig.driver.outstanding(), rig.driver.free()), (1, 5));
        rig.pretend_used(0, id, 8);
        assert_eq!(rig.driver.pop(), Ok(Some(Used { head: id, written: 8 })));
        rig.pretend_used(2, id, 8);
        assert_eq!(rig.driver.pop(), Err(RingError::UsedNotSubmitted { head: id.into() }), "a second time");
    }
}

#[test]
fn the_length_of_a_chain_that_was_not_written_to_means_nothing() {
    let mut rig = Rig::new(8, 0, PACKED);
    let id = rig.submit(&[writable(DATA, 4)], None);
    rig.describe_packed(DESCRIPTORS, 0, 0, 9, id, AVAILABLE | USED_BIT);
    assert_eq!(rig.driver.pop(), Ok(Some(Used { head: id, written: 0 })));
}

#[test]
fn the_driver_of_a_packed_ring_believes_nothing_that_the_device_scribbles_over_it() {
    for byte in [0x00, 0x55, 0x80, 0xff] {
        let mut rig = Rig::new(8, 0, PACKED);
        let id = rig.submit(&[writable(DATA, 1), writable(DATA, 1), writable(DATA, 1)], None);
        rig.take();
        rig.poke(DESCRIPTORS, &[byte; 128]);
        rig.poke(USED, &[byte; 4]);
        let base = rig.driver.base();
        assert!(base & 0x7fff < 8 && base >> 16 & 0x7fff < 8);
        let _error = rig.driver.pop();
        rig.complete(id, 3);
        assert_eq!(rig.driver.pop(), Ok(Some(Used { head: id, written: 3 })));
        let all: Vec<_> = (0..8).map(|_| rig.driver.add(&[writable(DATA, 1)], None).unwrap()).collect();
        let distinct: std::collections::BTreeSet<_> = all.into_iter().collect();
        assert_eq!(distinct, (0..8).collect());
    }
}

#[test]
fn what_a_publication_writes_is_known_before_it() {
    let mut rig = Rig::new(5, 0, PACKED);
    let nothing = Written::Descriptors(0, 0);
    assert_eq!(rig.device.unpublished(), [nothing; 3]);
    let pair = [writable(DATA, 1), writable(DATA, 1)];
    for expected in [
        [Written::Descriptors(0, 32), nothing, nothing],
        [Written::Descriptors(32, 32), nothing, nothing],
        [Written::Descriptors(64, 16), Written::Descriptors(0, 16), nothing],
    ] {
        let id = rig.submit(&pair, None);
        rig.take();
        rig.device.push_used(Used { head: id, written: 0 });
        assert_eq!(rig.device.unpublished(), expected);
        let _call = rig.device.publish();
        assert_eq!(rig.driver.pop(), Ok(Some(Used { head: id, written: 0 })));
    }
    let mut ranges = Vec::new();
    rig.device.guest_ranges(Written::Descriptors(16, 32), 0, &mut |start, length| ranges.push((start, length)));
    assert_eq!(ranges, [(DESCRIPTORS + 16, 32)]);
}

// Oracles.

#[test]
fn an_event_is_wanted_where_going_there_step_by_step_passes_it() {
    for size in 1..=7u16 {
        let positions = (0..size).flat_map(|slot| [true, false].map(|wrap| Position { slot, wrap }));
        for start in positions.clone() {
            for event in positions.clone() {
                for slots in 1..=size {
                    let mut at = start;
                    let mut passed = false;
                    for _ in 0..slots {
                        passed |= at == event;
                        at = if at.slot + 1 < size {
                            Position { slot: at.slot + 1, ..at }
                        } else {
                            Position { slot: 0, wrap: !at.wrap }
                        };
                    }
                    let suppression = u32::from(event.bits()) | 2 << 16;
                    let wanted = wants_event(suppression, at, slots, size, true);
                    assert_eq!(wanted, passed, "{start:?} and {slots} of {size}, event at {event:?}");
                    assert!(wants_event(suppression, at, slots, size, false), "2 means nothing without EVENT_IDX");
                    assert!(wants_event(u32::from(event.bits()), at, slots, size, true));
                    assert!(!wants_event(u32::from(event.bits()) | 1 << 16, at, slots, size, true));
                }
            }
        }
    }
}

/// One side's reading of a packed ring, as slow and as simple as the text has it: nothing but the memory, a position and
/// a wrap counter. Virtio 1.3, section 2.8.
struct Reader {
    slot: u64,
    wrap: bool,
    size: u64,
}

impl Reader {
    fn new(size: u16) -> Self {
        Self { slot: 0, wrap: true, size: size.into() }
    }

    fn step(&mut self) {
        self.slot += 1;
        if self.slot == self.size {
            (self.slot, self.wrap) = (0, !self.wrap);
        }
    }

    /// Address, length, id and flags.
    fn entry(rig: &Rig, address: u64) -> (u64, u32, u16, u16) {
        let bytes = rig.peek(address, 16);
        let number =
            |from: usize, to: usize| bytes[from..to].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        (number(0, 8), number(8, 12) as u32, number(12, 14) as u16, number(14, 16) as u16)
    }

    /// The next chain for a device: its id, its elements, and how many descriptors it takes.
    fn available(&mut self, rig: &Rig) -> Option<(u16, Vec<Element>, u16)> {
        let here = |reader: &Self| Self::entry(rig, DESCRIPTORS + 16 * reader.slot);
        let (avail, used) = (here(self).3 & AVAILABLE != 0, here(self).3 & USED_BIT != 0);
        if avail != self.wrap || used == self.wrap {
            return None;
        }
        let (mut elements, mut count) = (Vec::new(), 0);
        loop {
            let (address, length, id, flags) = here(self);
            self.step();
            count += 1;
            let mut add = |(address, length, _, flags): (u64, u32, u16, u16)| {
                elements.push(Element { address, length, writable: flags & WRITE != 0 });
            };
            if flags & INDIRECT != 0 {
                (0..u64::from(length) / 16).for_each(|at| add(Self::entry(rig, address + 16 * at)));
            } else {
                add((address, length, id, flags));
            }
            if flags & NEXT == 0 {
                return Some((id, elements, count));
            }
        }
    }

    /// The next chain that a driver gets back, of which it knows how many descriptors it has.
    fn used(&mut self, rig: &Rig, descriptors: impl Fn(u16) -> u16) -> Option<(u16, u32)> {
        let (_, length, id, flags) = Self::entry(rig, DESCRIPTORS + 16 * self.slot);
        if (flags & AVAILABLE != 0) != self.wrap || (flags & USED_BIT != 0) != self.wrap {
            return None;
        }
        (0..descriptors(id)).for_each(|_| self.step());
        Some((id, length))
    }
}

proptest! {
    #[test]
    fn a_slow_reader_sees_the_same_packed_ring(
        rounds in prop::collection::vec((prop::collection::vec(shape(), 1..5), any::<u64>()), 1..20),
        size in 1..24u16,
        in_order in any::<bool>(),
    ) {
        let mut rig = Rig::new(size, 0, RingOptions { in_order, ..PACKED });
        let (mut device, mut driver) = (Reader::new(size), Reader::new(size));
        for (shapes, mut luck) in rounds {
            let mut sent = Vec::new();
            for (place, shape) in (0..).zip(&shapes) {
                let (elements, indirect) = shape.lay_out(place);
                if let Ok(id) = rig.driver.add(&elements, indirect) {
                    sent.push((id, elements));
                }
            }
            let _kick = rig.driver.publish();
            let mut taken = Vec::new();
            for (id, elements) in &sent {
                let (their_id, their_elements, descriptors) = device.available(&rig).unwrap();
                let chain = rig.take();
                prop_assert_eq!((chain.head(), their_id), (*id, *id));
                prop_assert_eq!(&their_elements, elements);
                let writable: u64 = elements.iter().filter(|it| it.writable).map(|it| u64::from(it.length)).sum();
                prop_assert_eq!(chain.writable(), writable);
                taken.push((*id, descriptors, writable as u32));
            }
            prop_assert!(device.available(&rig).is_none());
            prop_assert_eq!(rig.device.available(), Ok(0));
            let mut left = taken.clone();
            let mut given = Vec::new();
            while !left.is_empty() {
                let (id, _, written) = left.remove((luck % left.len() as u64) as usize);
                luck /= 5;
                rig.complete(id, written);
                given.push((id, written));
            }
            if in_order {
                given = taken.iter().map(|(id, _, written)| (*id, *written)).collect();
            }
            let descriptors = |id| taken.iter().find(|(other, _, _)| *other == id).unwrap().1;
            for (id, written) in given {
                prop_assert_eq!(driver.used(&rig, descriptors), Some((id, written)));
                prop_assert_eq!(rig.driver.pop(), Ok(Some(Used { head: id, written })));
            }
            prop_assert!(driver.used(&rig, descriptors).is_none());
            prop_assert_eq!(rig.driver.pop(), Ok(None));
        }
    }

    /// Whatever bytes are in the ring, looking at them ends, and ends inside memory.
    #[test]
    fn random_bytes_in_a_packed_ring_never_do_worse_than_an_error(
        table in prop::collection::vec((0..0x20u64, 0..0x120u32, 0..9u16, 0..8u16, any::<bool>()), 14),
        wild in any::<(u64, u32, u16, u16)>(),
        base in any::<u32>(),
        completes in any::<bool>(),
    ) {
        let mut rig = Rig::new(7, 0, PACKED);
        for (at, (address, length, id, flags, available)) in (0..).zip(table) {
            let table = if at < 7 { DESCRIPTORS } else { DATA };
            let wrap = if available { AVAILABLE } else { USED_BIT };
            rig.describe_packed(table, at % 7, DATA + 16 * address, length, id, flags | wrap);
        }
        rig.describe_packed(DATA, 6, wild.0, wild.1, wild.2, wild.3);
        if let Ok(device) = new_device(ADDRESSES, 7, base, PACKED, map(&rig.files)) {
            rig.device = device;
        }
        let mut chain = Chain::default();
        for _ in 0..30 {
            let Ok(count) = rig.device.available() else { break };
            prop_assert!(count <= 7);
            match rig.device.pop(&mut chain) {
                Ok(false) => break,
                Ok(true) => {
                    prop_assert_eq!(contents(&chain).len() as u64, chain.readable());
                    prop_assert!(chain.head() < 7 && rig.device.in_flight() <= 7);
                    if completes {
                        rig.complete(chain.head(), 0);
                    }
                }
                Err(_) => break,
            }
        }
        let _error = rig.driver.pop();
    }
}
