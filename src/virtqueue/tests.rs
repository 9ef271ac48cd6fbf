//! The device side against the driver side, over memory that both map, and against bytes that no driver would write.

mod model;
mod order;
mod packed;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio_queue::{Queue, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::error::RingError;
use crate::memory::{Snapshot, access};
use crate::protocol::{Iotlb, Region};

/// What a user address has more than the guest address of the same byte.
const USER: u64 = 0x7000_0000_0000;
const DESCRIPTORS: u64 = 0x10_0000;
const AVAIL: u64 = 0x20_0000;
const USED: u64 = 0x30_0000;
const DATA: u64 = 0x40_0000;
/// Two regions meet here.
const SEAM: u64 = 0x80_0000;
/// Memory ends here, and goes on at `ISLAND`.
const END: u64 = 0x81_0000;
const ISLAND: u64 = 0x90_0000;
const REGIONS: [(u64, u64); 3] = [(DESCRIPTORS, SEAM), (SEAM, END), (ISLAND, ISLAND + 0x1000)];

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const ADDRESSES: RingAddresses =
    RingAddresses { descriptors: USER + DESCRIPTORS, avail: USER + AVAIL, used: USER + USED };
const FLAGS_ONLY: RingOptions =
    RingOptions { packed: false, event_idx: false, indirect: true, in_order: false, big_endian: false };
const EVENT_IDX: RingOptions = RingOptions { event_idx: true, ..FLAGS_ONLY };

/// The same options, in each format.
fn formats(options: RingOptions) -> [RingOptions; 3] {
    let [split, big_endian] = byte_orders(options);
    [split, RingOptions { packed: true, ..options }, big_endian]
}

/// The same options of a split ring, in each byte order.
fn byte_orders(options: RingOptions) -> [RingOptions; 2] {
    [false, true].map(|big_endian| RingOptions { big_endian, ..options })
}

/// The base of a ring of `size` after `chains` of one descriptor each.
fn base_after(chains: u32, size: u16, options: RingOptions) -> u32 {
    if !options.packed {
        return chains & 0xffff;
    }
    let (round, slot) = (chains / u32::from(size), chains % u32::from(size));
    0x1_0001 * (slot | if round % 2 == 0 { 0x8000 } else { 0 })
}

fn readable(address: u64, length: u32) -> Element {
    Element { address, length, writable: false }
}

fn writable(address: u64, length: u32) -> Element {
    Element { address, length, writable: true }
}

struct Rig {
    files: Vec<OwnedFd>,
    options: RingOptions,
    driver: Box<dyn Driver>,
    device: Box<dyn Ring>,
    memory: Arc<Snapshot>,
}

fn map(files: &[OwnedFd]) -> Arc<Snapshot> {
    let region = |(start, end): (u64, u64)| Region {
        guest_address: start,
        size: end - start,
        user_address: USER + start,
        file_offset: 0,
    };
    Arc::new(Snapshot::from_table(&REGIONS.map(region), files).unwrap())
}

fn new_driver(
    addresses: RingAddresses,
    size: u16,
    base: u32,
    options: RingOptions,
    memory: Arc<Snapshot>,
) -> Box<dyn Driver> {
    if options.packed {
        Box::new(PackedDriver::new(addresses, size, base, options, memory).unwrap())
    } else if options.big_endian {
        Box::new(SplitDriver::<Big>::new(addresses, size, base, options, memory).unwrap())
    } else {
        Box::new(SplitDriver::<Little>::new(addresses, size, base, options, memory).unwrap())
    }
}

fn new_device(
    addresses: RingAddresses,
    size: u16,
    base: u32,
    options: RingOptions,
    memory: Arc<Snapshot>,
) -> Result<Box<dyn Ring>, RingError> {
    Ok(if options.packed {
        Box::new(PackedRing::new(addresses, size, base, options, RingLimits::default(), memory)?)
    } else if options.big_endian {
        Box::new(SplitRing::<Big>::new(addresses, size, base, options, RingLimits::default(), memory)?)
    } else {
        Box::new(SplitRing::<Little>::new(addresses, size, base, options, RingLimits::default(), memory)?)
    })
}

impl Rig {
    /// A ring that has gone through `chains` of one descriptor each.
    fn new(size: u16, chains: u32, options: RingOptions) -> Self {
        let files: Vec<_> = REGIONS
            .iter()
            .map(|(start, end)| {
                let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
                ftruncate(&file, end - start).unwrap();
                file
            })
            .collect();
        let memory = map(&files);
        let base = base_after(chains, size, options);
        let driver = new_driver(ADDRESSES, size, base, options, memory.clone());
        let device = new_device(ADDRESSES, size, base, options, map(&files)).unwrap();
        Self { files, options, driver, device, memory }
    }

    fn base(&self, chains: u32) -> u32 {
        base_after(chains, self.device.size(), self.options)
    }

    fn poke(&self, address: u64, bytes: &[u8]) {
        let mut done = 0;
        let write = |segment: crate::memory::Segment| {
            // SAFETY: translated just now, and `self.memory` keeps it mapped.
            unsafe { access::write(segment.pointer.as_ptr(), &bytes[done..done + segment.length]) };
            done += segment.length;
        };
        self.memory.pieces(address, bytes.len() as u64, write).unwrap();
    }

    fn peek(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let mut done = 0;
        let read = |segment: crate::memory::Segment| {
            // SAFETY: as in `poke`.
            unsafe { access::read(segment.pointer.as_ptr(), &mut bytes[done..done + segment.length]) };
            done += segment.length;
        };
        self.memory.pieces(address, length as u64, read).unwrap();
        bytes
    }

    /// Write a descriptor as a broken driver would.
    fn describe(&self, table: u64, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let bytes = if self.options.big_endian {
            [&address.to_be_bytes()[..], &length.to_be_bytes(), &flags.to_be_bytes(), &next.to_be_bytes()].concat()
        } else {
            [&address.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
        };
        self.poke(table + 16 * u64::from(index), &bytes);
    }

    /// 16 bits in a split ring.
    fn word(&self, value: u16) -> [u8; 2] {
        if self.options.big_endian { value.to_be_bytes() } else { value.to_le_bytes() }
    }

    /// Make descriptor 0 of a split ring available, whatever is in it, and let the device look at it.
    fn provoke(&mut self) -> RingError {
        self.poke(AVAIL + 2, &self.word(1));
        self.poke(AVAIL + 4, &self.word(0));
        self.refusal()
    }

    /// The same for a chain that the driver's half puts together, in either format.
    fn provoke_with(&mut self, elements: &[Element], indirect: Option<Indirect>) -> RingError {
        self.driver.add(elements, indirect).unwrap();
        let _kick = self.driver.publish();
        self.refusal()
    }

    /// What the device says of a chain that cannot be.
    fn refusal(&mut self) -> RingError {
        let state = |rig: &Self| {
            let used = [rig.peek(DESCRIPTORS, 16 * usize::from(rig.device.size())), rig.peek(USED, 64)];
            (rig.device.base(), rig.device.in_flight(), used)
        };
        let before = state(self);
        assert_eq!(self.device.available(), Ok(1));
        let error = self.device.pop(&mut Chain::default()).unwrap_err();
        let _call = self.device.publish();
        assert_eq!(state(self), before, "a refused chain was taken, or answered");
        error
    }

    fn submit(&mut self, elements: &[Element], indirect: Option<Indirect>) -> u16 {
        let head = self.driver.add(elements, indirect).unwrap();
        let _kick = self.driver.publish();
        head
    }

    fn take(&mut self) -> Chain {
        let mut chain = Chain::default();
        assert!(self.device.available().unwrap() > 0);
        assert!(self.device.pop(&mut chain).unwrap());
        chain
    }

    fn complete(&mut self, head: u16, written: u32) -> bool {
        self.device.push_used(Used { head, written });
        self.device.publish()
    }

    /// One request of one byte, all the way.
    fn round(&mut self) {
        self.submit(&[writable(DATA, 1)], None);
        let head = self.take().head();
        self.complete(head, 1);
        assert_eq!(self.driver.pop(), Ok(Some(Used { head, written: 1 })));
    }
}

fn lengths(segments: &[crate::memory::Segment]) -> Vec<usize> {
    segments.iter().map(|segment| segment.length).collect()
}

fn contents(chain: &Chain) -> Vec<u8> {
    let mut bytes = vec![0; chain.readable() as usize];
    // SAFETY: the ring that filled the chain, and its snapshot, live as long as the test.
    assert_eq!(unsafe { chain.read(0, &mut bytes) }, bytes.len());
    bytes
}

fn fill(chain: &Chain, bytes: &[u8]) {
    // SAFETY: as in `contents`.
    assert_eq!(unsafe { chain.write(0, bytes) }, bytes.len());
}

#[test]
fn chains_carry_bytes_both_ways_direct_indirect_and_mixed() {
    for options in formats(FLAGS_ONLY) {
        let table = DATA + 0x1000;
        for indirect in [None, Some(Indirect { table, direct: 0 }), Some(Indirect { table, direct: 1 })] {
            let mut rig = Rig::new(8, 0, options);
            rig.poke(DATA, b"ask");
            rig.poke(ISLAND, b"ing");
            let elements =
                [readable(DATA, 3), readable(ISLAND, 3), writable(DATA + 0x100, 2), writable(DATA + 0x200, 4)];
            let head = rig.submit(&elements, indirect);
            let chain = rig.take();
            assert_eq!((chain.head(), chain.readable(), chain.writable()), (head, 6, 6));
            assert_eq!(contents(&chain), b"asking");
            fill(&chain, b"answer");
            rig.complete(head, 6);
            assert_eq!(rig.driver.pop(), Ok(Some(Used { head, written: 6 })));
            assert_eq!((rig.peek(DATA + 0x100, 2), rig.peek(DATA + 0x200, 4)), (b"an".to_vec(), b"swer".to_vec()));
            assert_eq!(rig.driver.free(), 8);
        }
    }
}

#[test]
fn a_buffer_over_adjacent_regions_has_a_segment_in_each() {
    for options in formats(FLAGS_ONLY) {
        let mut rig = Rig::new(4, 0, options);
        rig.poke(SEAM - 3, b"sewn up");
        rig.submit(&[readable(SEAM - 3, 7), writable(SEAM - 1, 2)], None);
        let chain = rig.take();
        assert_eq!((lengths(chain.readable_segments()), lengths(chain.writable_segments())), (vec![3, 4], vec![1, 1]));
        assert_eq!(contents(&chain), b"sewn up");
    }
}

#[test]
fn an_indirect_table_may_lie_over_two_regions() {
    for options in formats(FLAGS_ONLY) {
        for offset in [8, 16, 17, 31] {
            let mut rig = Rig::new(4, 0, options);
            rig.poke(DATA, b"ab");
            let indirect = Indirect { table: SEAM - offset, direct: 0 };
            rig.submit(&[readable(DATA, 1), readable(DATA + 1, 1), writable(DATA, 5)], Some(indirect));
            let chain = rig.take();
            assert_eq!((contents(&chain), chain.writable()), (b"ab".to_vec(), 5));
        }
    }
}

#[test]
fn a_batch_is_seen_at_once_and_given_back_in_any_order() {
    for options in formats(EVENT_IDX) {
        let mut rig = Rig::new(8, 0, options);
        let heads: Vec<_> = (0..6).map(|_| rig.driver.add(&[writable(DATA, 9)], None).unwrap()).collect();
        assert_eq!(rig.device.available(), Ok(0), "added, but not published");
        assert!(rig.driver.publish());
        assert!(!rig.driver.publish(), "nothing new");
        assert_eq!(rig.device.available(), Ok(6));
        let taken: Vec<_> = heads.iter().map(|_| rig.take().head()).collect();
        assert_eq!(taken, heads);
        assert_eq!((rig.device.in_flight(), rig.driver.free(), rig.driver.outstanding()), (6, 2, 6));
        let order = [heads[3], heads[0], heads[5], heads[1], heads[4], heads[2]];
        for (written, head) in (0..).zip(order) {
            rig.device.push_used(Used { head, written });
        }
        assert_eq!(rig.driver.pop(), Ok(None), "filled, but not published");
        assert!(rig.device.publish());
        for (written, head) in (0..).zip(order) {
            assert_eq!(rig.driver.pop(), Ok(Some(Used { head, written })));
        }
        assert_eq!((rig.device.in_flight(), rig.driver.free(), rig.driver.outstanding()), (0, 8, 0));
    }
}

#[test]
fn chains_are_taken_as_many_at_once_as_there_is_room_for() {
    for options in formats(EVENT_IDX) {
        let mut rig = Rig::new(8, 0, options);
        let heads: Vec<_> = (1..=7).map(|length| rig.driver.add(&[writable(DATA, length)], None).unwrap()).collect();
        let _kick = rig.driver.publish();
        assert!(rig.device.look().unwrap());
        let mut chains: [Chain; 4] = Default::default();
        assert_eq!(rig.device.take(&mut []), Ok(0));
        assert_eq!(rig.device.take(&mut chains[..3]), Ok(3));
        assert_eq!(chains.each_ref().map(Chain::writable), [1, 2, 3, 0]);
        assert_eq!(rig.device.take(&mut chains), Ok(4));
        assert_eq!(
            chains.each_ref().map(|chain| (chain.head(), chain.writable())),
            [3, 4, 5, 6].map(|at| (heads[at], 1 + at as u64))
        );
        assert_eq!(rig.device.take(&mut chains), Ok(0));
        assert_eq!(rig.device.in_flight(), 7);
        assert!(rig.device.unpop(heads[6]), "it was taken last");
        assert_eq!((rig.device.take(&mut chains), chains[0].head()), (Ok(1), heads[6]));
        let used: Vec<_> =
            (0..).zip(&heads).map(|(written, head)| Used { head: *head, written: written % 2 }).collect();
        rig.device.fill_used(&used);
        assert!(rig.device.publish());
        for used in used {
            assert_eq!(rig.driver.pop(), Ok(Some(used)));
        }
        assert_eq!((rig.device.in_flight(), rig.driver.free()), (0, 8));
    }
}

#[test]
fn what_comes_before_a_broken_chain_is_taken_and_the_error_comes_up_again() {
    for options in formats(FLAGS_ONLY) {
        let mut rig = Rig::new(8, 0, options);
        for elements in [[readable(DATA, 1), writable(DATA, 1)], [writable(DATA, 2), readable(DATA, 2)]] {
            rig.submit(&elements, None);
        }
        assert!(rig.device.look().unwrap());
        let mut chains: [Chain; 3] = Default::default();
        assert_eq!((rig.device.take(&mut chains), chains[0].writable()), (Ok(1), 1));
        for _ in 0..2 {
            let broken = rig.device.take(&mut chains[1..]);
            assert!(matches!(broken, Err(RingError::ReadableAfterWritable { .. })), "{broken:?}");
            assert_eq!((chains[1].readable_segments().len(), chains[1].writable()), (0, 0), "half a chain");
        }
        assert_eq!(rig.device.in_flight(), 1);
    }
}

#[test]
fn a_chain_that_is_used_again_has_nothing_of_the_longer_one_before() {
    for options in formats(FLAGS_ONLY) {
        let mut rig = Rig::new(8, 0, options);
        let mut chain = Chain::default();
        for count in [5, 1, 3, 4, 2, 7] {
            let elements: Vec<_> = (1..=count).map(|length| writable(DATA, length)).collect();
            let head = rig.submit(&elements, None);
            assert!(rig.device.look().unwrap());
            assert!(rig.device.pop(&mut chain).unwrap());
            assert_eq!(lengths(chain.writable_segments()), (1..=count as usize).collect::<Vec<_>>());
            rig.complete(head, 0);
            rig.driver.pop().unwrap().unwrap();
        }
    }
}

#[test]
fn every_size_is_filled_and_emptied_around_the_end_of_the_index() {
    for options in formats(EVENT_IDX) {
        for size in (0..=15).map(|shift| 1u16 << shift) {
            let mut rig = Rig::new(size, 65_535 - u32::from(size / 2), options);
            for _ in 0..2 {
                for _ in 0..size {
                    rig.driver.add(&[writable(DATA, 1)], None).unwrap();
                }
                let full = rig.driver.add(&[writable(DATA, 1)], None);
                assert_eq!(full, Err(RingError::NoRoom { needed: 1, free: 0 }));
                assert!(rig.driver.publish());
                assert_eq!(rig.device.available(), Ok(size));
                let mut chain = Chain::default();
                let mut heads = Vec::new();
                while rig.device.pop(&mut chain).unwrap() {
                    heads.push(chain.head());
                }
                for head in heads.iter().rev() {
                    rig.device.push_used(Used { head: *head, written: 1 });
                }
                let _call = rig.device.publish();
                for head in heads.into_iter().rev() {
                    assert_eq!(rig.driver.pop(), Ok(Some(Used { head, written: 1 })));
                }
                assert_eq!(rig.device.enable_kicks(), Ok(false));
            }
        }
    }
}

#[test]
fn the_indices_run_past_65536() {
    for options in [FLAGS_ONLY, EVENT_IDX].map(formats).concat() {
        let mut rig = Rig::new(4, 0, options);
        for _ in 0..70_000 {
            rig.round();
        }
        assert_eq!(rig.device.base(), rig.base(70_000));
    }
}

#[test]
fn a_ring_restarts_where_it_was_with_what_is_waiting() {
    for options in formats(EVENT_IDX) {
        let mut rig = Rig::new(4, 65_533, options);
        for _ in 0..5 {
            rig.round();
        }
        let head = rig.submit(&[writable(DATA, 3)], None);
        let base = rig.device.base();
        assert_eq!((base, rig.driver.base()), (rig.base(65_538), rig.base(65_538)));
        rig.device = new_device(ADDRESSES, 4, base, options, map(&rig.files)).unwrap();
        assert_eq!(rig.device.available(), Ok(1));
        assert_eq!(rig.take().head(), head);
        assert!(rig.complete(head, 3), "the first completion after a start always notifies");
        assert_eq!(rig.driver.pop(), Ok(Some(Used { head, written: 3 })));
        rig.round();
    }
}

#[test]
fn kicks_are_asked_for_by_event_index() {
    for options in formats(EVENT_IDX) {
        let mut rig = Rig::new(8, 65_535, options);
        assert_eq!(rig.device.enable_kicks(), Ok(false));
        rig.driver.add(&[writable(DATA, 1)], None).unwrap();
        assert!(rig.driver.publish(), "the device sleeps");
        rig.device.disable_kicks();
        rig.driver.add(&[writable(DATA, 1)], None).unwrap();
        assert!(!rig.driver.publish(), "the device is awake");
        assert_eq!(rig.device.enable_kicks(), Ok(true), "two came meanwhile");
        rig.take();
        rig.take();
        assert_eq!(rig.device.enable_kicks(), Ok(false));
        rig.driver.add(&[writable(DATA, 1)], None).unwrap();
        rig.driver.add(&[writable(DATA, 1)], None).unwrap();
        assert!(rig.driver.publish(), "the event is inside the batch");
    }
}

#[test]
fn kicks_are_asked_for_by_flag_without_event_idx() {
    for options in formats(FLAGS_ONLY) {
        let mut rig = Rig::new(8, 0, options);
        rig.device.disable_kicks();
        rig.driver.add(&[writable(DATA, 1)], None).unwrap();
        assert!(!rig.driver.publish());
        assert_eq!(rig.device.enable_kicks(), Ok(true));
        rig.driver.add(&[writable(DATA, 1)], None).unwrap();
        assert!(rig.driver.publish());
    }
}

#[test]
fn calls_are_asked_for_by_event_index() {
    for options in formats(EVENT_IDX) {
        let mut rig = Rig::new(8, 65_534, options);
        rig.round();
        let heads: Vec<_> = (0..5).map(|_| rig.submit(&[writable(DATA, 1)], None)).collect();
        heads.iter().for_each(|_| drop(rig.take()));
        assert_eq!(rig.driver.enable_calls(3), Ok(false));
        assert!(!rig.complete(heads[0], 0));
        assert!(!rig.complete(heads[1], 0));
        assert!(rig.complete(heads[2], 0), "the third is the one");
        assert!(!rig.complete(heads[3], 0));
        assert!(!rig.device.publish(), "nothing new");
        assert_eq!(rig.driver.enable_calls(1), Ok(true), "four came meanwhile");
        while rig.driver.pop().unwrap().is_some() {}
        assert_eq!(rig.driver.enable_calls(1), Ok(false));
        assert!(rig.complete(heads[4], 0));
    }
}

#[test]
fn calls_are_asked_for_by_flag_without_event_idx() {
    for options in formats(FLAGS_ONLY) {
        let mut rig = Rig::new(8, 0, options);
        let heads: Vec<_> = (0..3).map(|_| rig.submit(&[writable(DATA, 1)], None)).collect();
        heads.iter().for_each(|_| drop(rig.take()));
        assert!(rig.complete(heads[0], 0));
        rig.driver.disable_calls();
        assert!(!rig.complete(heads[1], 0));
        assert_eq!(rig.driver.enable_calls(1), Ok(true));
        assert!(rig.complete(heads[2], 0));
    }
}

#[test]
fn what_is_shown_without_a_notification_is_decided_upon_later() {
    for options in formats(EVENT_IDX) {
        let mut rig = Rig::new(8, 65_534, options);
        rig.round();
        let heads: Vec<_> = (0..4).map(|_| rig.submit(&[writable(DATA, 1)], None)).collect();
        heads.iter().for_each(|_| drop(rig.take()));
        assert_eq!(rig.driver.enable_calls(2), Ok(false));
        for head in &heads[..3] {
            rig.device.push_used(Used { head: *head, written: 0 });
            rig.device.show();
            assert_eq!(rig.driver.pop(), Ok(Some(Used { head: *head, written: 0 })));
        }
        assert_eq!(rig.device.decide(), Some(true), "the second is the one, and two followed it");
        assert_eq!(rig.device.decide(), None, "nothing new");
        rig.device.push_used(Used { head: heads[3], written: 0 });
        rig.device.show();
        assert_eq!(rig.device.decide(), Some(false), "it was told");
    }
}

#[test]
fn a_ring_that_goes_round_unnoticed_notifies_whoever_waits() {
    for options in formats(EVENT_IDX) {
        let mut rig = Rig::new(4, 0, options);
        rig.round();
        assert_eq!(rig.driver.enable_calls(1), Ok(false));
        for _ in 0..9 {
            let head = rig.submit(&[writable(DATA, 1)], None);
            drop(rig.take());
            rig.device.push_used(Used { head, written: 0 });
            rig.device.show();
            assert!(rig.driver.pop().unwrap().is_some());
        }
        assert_eq!(rig.device.decide(), Some(true));
    }
}

#[test]
fn a_chain_that_is_given_back_unused_is_taken_again() {
    for options in formats(EVENT_IDX) {
        let mut rig = Rig::new(4, 65_535, options);
        let first = rig.submit(&[writable(DATA, 1)], None);
        let second = rig.submit(&[writable(DATA, 2)], None);
        assert_eq!((rig.take().head(), rig.take().head()), (first, second));
        assert!(!rig.device.unpop(first), "not the last one");
        assert!(rig.device.unpop(second));
        assert!(!rig.device.unpop(second), "put back already");
        assert_eq!((rig.device.base() & 0xffff, rig.device.in_flight()), (rig.base(65_536) & 0xffff, 1));
        assert_eq!(rig.take().head(), second);
    }
}

#[test]
fn a_chain_that_is_done_is_not_given_back_unused() {
    for options in formats(EVENT_IDX) {
        let mut rig = Rig::new(4, 0, options);
        let head = rig.submit(&[writable(DATA, 1)], None);
        drop(rig.take());
        rig.device.push_used(Used { head, written: 0 });
        assert!(!rig.device.unpop(head));
        assert_eq!(rig.device.in_flight(), 0);
    }
}

#[test]
fn a_ring_moves_to_other_memory_and_goes_on() {
    for options in formats(EVENT_IDX) {
        let mut rig = Rig::new(4, 0, options);
        let head = rig.submit(&[writable(DATA, 3)], None);
        let old = rig.device.snapshot().clone();
        let chain = rig.take();
        let new = map(&rig.files);
        let pointers = rig.device.resolve(&new).unwrap();
        rig.device.move_to(pointers, new);
        fill(&chain, b"old");
        drop((chain, old));
        rig.complete(head, 3);
        assert_eq!(rig.driver.pop(), Ok(Some(Used { head, written: 3 })));
        assert_eq!(rig.peek(DATA, 3), b"old");
        rig.round();
    }
}

/// The same memory as it is for a device behind an IOMMU: every page of a ring, and of `DATA`, is a region of its own, and
/// none is next to the one that follows it.
fn scattered(files: &[OwnedFd]) -> Arc<Snapshot> {
    const PAGE: u64 = 0x1000;
    let starts = [DESCRIPTORS, AVAIL, USED, DATA];
    let pages: Vec<u64> = starts.into_iter().flat_map(|start| (0..4).map(move |page| start + page * PAGE)).collect();
    let place = |at: usize| 0x1000_0000 - 2 * PAGE * at as u64;
    let regions: Vec<_> = pages
        .iter()
        .enumerate()
        .map(|(at, page)| Region {
            guest_address: place(at),
            size: PAGE,
            user_address: place(at),
            file_offset: page - REGIONS[0].0,
        })
        .collect();
    let files: Vec<_> = regions.iter().map(|_| files[0].try_clone().unwrap()).collect();
    let memory = Snapshot::from_table(&regions, &files).unwrap().behind(Some(Arc::default()));
    for (at, page) in pages.iter().enumerate() {
        for iova in [*page, USER + page] {
            let user_address = place(at);
            let told = Iotlb { iova, size: PAGE, user_address, permission: 3, kind: Iotlb::UPDATE, padding: [0; 6] };
            memory.map(&told).unwrap();
        }
    }
    Arc::new(memory)
}

#[test]
fn a_ring_on_scattered_pages_goes_round_like_any_other() {
    for options in [FLAGS_ONLY, EVENT_IDX].into_iter().flat_map(formats) {
        let mut rig = Rig::new(512, 0, options);
        rig.device = new_device(ADDRESSES, 512, rig.base(0), options, scattered(&rig.files)).unwrap();
        for _ in 0..3 * 512 {
            rig.round();
        }
    }
}

#[test]
fn a_ring_stays_where_it_was_if_the_other_memory_does_not_hold_it() {
    for options in formats(EVENT_IDX) {
        let mut rig = Rig::new(4, 0, options);
        let gone = Region {
            guest_address: DESCRIPTORS,
            size: SEAM - DESCRIPTORS,
            user_address: USER + DESCRIPTORS,
            file_offset: 0,
        };
        let without = rig.memory.without(&gone).unwrap();
        assert!(matches!(rig.device.resolve(&without), Err(RingError::MemoryGone(_))));
        rig.round();
    }
}

#[test]
fn the_extent_of_a_ring_is_inside_memory_to_the_last_byte() {
    let rig = Rig::new(8, 0, EVENT_IDX);
    let start = |part: fn(&mut RingAddresses) -> &mut u64, extent: u64, event_idx: bool| {
        let mut addresses = ADDRESSES;
        *part(&mut addresses) = USER + END - extent;
        let options = RingOptions { event_idx, ..FLAGS_ONLY };
        SplitRing::<Little>::new(addresses, 8, 0, options, RingLimits::default(), rig.memory.clone()).map(drop)
    };
    let descriptors: fn(&mut RingAddresses) -> &mut u64 = |addresses| &mut addresses.descriptors;
    let avail: fn(&mut RingAddresses) -> &mut u64 = |addresses| &mut addresses.avail;
    let used: fn(&mut RingAddresses) -> &mut u64 = |addresses| &mut addresses.used;
    for (part, extent, event_idx) in
        [(descriptors, 128, true), (avail, 20, false), (avail, 22, true), (used, 68, false), (used, 72, true)]
    {
        assert_eq!(start(part, extent, event_idx), Ok(()));
        let alignment = if extent == 128 { 16 } else { 4 };
        assert!(matches!(start(part, extent - alignment, event_idx), Err(RingError::MemoryGone(_))));
    }
    let unaligned = RingAddresses { avail: ADDRESSES.avail + 1, ..ADDRESSES };
    assert!(unaligned.check_alignment(false).unwrap_err().contains("available ring"));
    let across = RingAddresses { descriptors: USER + SEAM - 16, ..ADDRESSES };
    assert!(
        SplitRing::<Little>::new(across, 8, 0, FLAGS_ONLY, RingLimits::default(), rig.memory.clone()).is_err(),
        "adjacent in the guest, not here"
    );
}

#[test]
fn a_ring_is_laid_out_as_the_kernel_lays_it_out() {
    let offsets = crate::protocol::tests::run_c(
        "#include <stddef.h>
         #include <stdio.h>
         #include <linux/virtio_ring.h>
         int main(void) {
             struct vring ring;
             static char memory[65536] __attribute__((aligned(4096)));
             vring_init(&ring, 8, memory, 4);
             #define AT(part) printf(\"%zu \", (size_t)((char *)&(part) - memory))
             AT(ring.desc[1].addr); AT(ring.desc[1].len); AT(ring.desc[1].flags); AT(ring.desc[1].next);
             AT(ring.avail->flags); AT(ring.avail->idx); AT(ring.avail->ring[1]); AT(vring_used_event(&ring));
             AT(ring.used->flags); AT(ring.used->idx); AT(ring.used->ring[1].id); AT(ring.used->ring[1].len);
             AT(vring_avail_event(&ring));
             printf(\"%d %d %d\", VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_DESC_F_INDIRECT);
             return 0;
         }",
    );
    for options in byte_orders(EVENT_IDX) {
        let mut rig = Rig::new(8, 0, options);
        let start = u64::try_from(offsets[8]).unwrap();
        let avail = u64::try_from(offsets[4]).unwrap();
        let addresses =
            RingAddresses { descriptors: USER + DATA, avail: USER + DATA + avail, used: USER + DATA + start };
        rig.driver = new_driver(addresses, 8, 0, options, rig.memory.clone());
        rig.device = new_device(addresses, 8, 0, options, map(&rig.files)).unwrap();
        // Descriptor 0, then 1 and 2, of which the device gives back the second chain second.
        rig.submit(&[readable(0x40_1111, 0x22)], None);
        rig.submit(&[writable(0x40_3333, 0x44), writable(0x40_3333, 0x55)], None);
        let heads = [rig.take().head(), rig.take().head()];
        rig.device.disable_kicks();
        assert_eq!(rig.device.enable_kicks(), Ok(false));
        rig.complete(heads[0], 0);
        rig.complete(heads[1], 0x66);
        rig.driver.enable_calls(7).unwrap();

        let word = |at: usize, length: usize| {
            let mut bytes = rig.peek(DATA + offsets[at] as u64, length);
            if options.big_endian {
                bytes.reverse();
            }
            bytes.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
        };
        let [next, write, indirect] = [offsets[13], offsets[14], offsets[15]].map(|flag| flag as u64);
        assert_eq!([next, write, indirect], [NEXT, WRITE, INDIRECT].map(u64::from));
        assert_eq!([word(0, 8), word(1, 4), word(2, 2), word(3, 2)], [0x40_3333, 0x44, next | write, 2]);
        assert_eq!([word(4, 2), word(5, 2), word(6, 2), word(7, 2)], [0, 2, 1, 6]);
        assert_eq!([word(8, 2), word(9, 2), word(10, 4), word(11, 4), word(12, 2)], [0, 2, 1, 0x66, 2]);
    }
}

// What a hostile driver writes: design.md's table, a test a row.

#[test]
fn a_loop_is_refused() {
    for size in [1, 2, 8] {
        let mut rig = Rig::new(size, 0, FLAGS_ONLY);
        for index in 0..size {
            rig.describe(DESCRIPTORS, index, DATA, 1, NEXT, (index + 1) % size);
        }
        assert_eq!(rig.provoke(), RingError::ChainTooLong { head: 0, limit: u32::from(size) });
    }
}

#[test]
fn a_loop_in_an_indirect_table_is_refused() {
    for options in byte_orders(FLAGS_ONLY) {
        let mut rig = Rig::new(8, 0, options);
        rig.describe(DESCRIPTORS, 0, DATA, 48, INDIRECT, 0);
        (0..3).for_each(|index| rig.describe(DATA, index, DATA, 1, NEXT, (index + 1) % 3));
        assert_eq!(rig.provoke(), RingError::ChainTooLong { head: 0, limit: 3 });
    }
}

#[test]
fn a_next_out_of_range_is_refused() {
    for options in byte_orders(FLAGS_ONLY) {
        let mut rig = Rig::new(8, 0, options);
        for next in [8, u16::MAX] {
            rig.describe(DESCRIPTORS, 0, DATA, 1, NEXT, next);
            assert_eq!(rig.provoke(), RingError::NextOutOfRange { descriptor: 0, next, size: 8 });
        }
        rig.describe(DESCRIPTORS, 0, DATA, 32, INDIRECT, 0);
        rig.describe(DATA, 0, DATA, 1, NEXT, 2);
        assert_eq!(rig.provoke(), RingError::NextOutOfRange { descriptor: 0, next: 2, size: 2 });
    }
}

#[test]
fn a_table_inside_a_table_is_refused() {
    for options in byte_orders(FLAGS_ONLY) {
        let mut rig = Rig::new(8, 0, options);
        rig.describe(DESCRIPTORS, 0, DATA, 32, INDIRECT, 0);
        rig.describe(DATA, 0, DATA, 1, NEXT, 1);
        rig.describe(DATA, 1, DATA, 16, INDIRECT, 0);
        assert_eq!(rig.provoke(), RingError::NestedIndirect { descriptor: 1 });
    }
}

#[test]
fn indirect_with_next_is_refused() {
    for options in byte_orders(FLAGS_ONLY) {
        let mut rig = Rig::new(8, 0, options);
        rig.describe(DESCRIPTORS, 0, DATA, 16, INDIRECT | NEXT, 1);
        assert_eq!(rig.provoke(), RingError::IndirectWithNext { descriptor: 0, flags: INDIRECT | NEXT });
    }
}

#[test]
fn a_table_of_no_possible_length_is_refused() {
    for options in byte_orders(FLAGS_ONLY) {
        let mut rig = Rig::new(8, 0, options);
        for length in [0, 1, 15, 17, 1025 * 16, u32::MAX, 0xffff_fff0] {
            rig.describe(DESCRIPTORS, 0, DATA, length, INDIRECT, 0);
            assert_eq!(rig.provoke(), RingError::IndirectLength { descriptor: 0, length, limit: 16384 });
        }
    }
}

#[test]
fn the_longest_table_has_1024_entries() {
    for options in formats(FLAGS_ONLY) {
        let mut rig = Rig::new(1, 0, options);
        rig.submit(&[writable(DATA, 1); 1024], Some(Indirect { table: DATA + 0x1000, direct: 0 }));
        assert_eq!(rig.take().writable(), 1024);
    }
}

#[test]
fn the_direction_of_a_descriptor_that_points_to_a_table_means_nothing() {
    for options in byte_orders(FLAGS_ONLY) {
        let mut rig = Rig::new(8, 0, options);
        rig.describe(DESCRIPTORS, 0, DATA, 16, INDIRECT | WRITE, 0);
        rig.describe(DATA, 0, DATA, 5, 0, 0);
        rig.poke(AVAIL + 2, &[rig.word(1), rig.word(0)].concat());
        assert_eq!(rig.take().readable(), 5);
    }
}

#[test]
fn a_table_that_was_not_negotiated_is_refused() {
    let mut rig = Rig::new(8, 0, RingOptions { indirect: false, ..FLAGS_ONLY });
    let error = rig.provoke_with(&[writable(DATA, 1)], Some(Indirect { table: DATA, direct: 0 }));
    assert_eq!(error, RingError::IndirectNotNegotiated { descriptor: 0 });
}

#[test]
fn readable_after_writable_is_refused() {
    for options in formats(FLAGS_ONLY) {
        let table = DATA + 0x1000;
        for indirect in [None, Some(Indirect { table, direct: 0 }), Some(Indirect { table, direct: 1 })] {
            for length in [1, 0] {
                let mut rig = Rig::new(8, 0, options);
                let error = rig.provoke_with(&[writable(DATA, length), readable(DATA, 1)], indirect);
                let descriptor = if indirect == Some(Indirect { table, direct: 1 }) { 0 } else { 1 };
                assert_eq!(error, RingError::ReadableAfterWritable { descriptor }, "length {length}, {indirect:?}");
            }
        }
    }
}

#[test]
fn an_index_that_jumps_is_refused() {
    for options in byte_orders(FLAGS_ONLY) {
        let mut rig = Rig::new(8, 65_530, options);
        for to in [65_530u16.wrapping_add(9), 65_529] {
            rig.poke(AVAIL + 2, &rig.word(to));
            assert_eq!(rig.device.available(), Err(RingError::IndexJump { from: 65_530, to, free: 8 }));
            assert_eq!(rig.device.enable_kicks(), Err(RingError::IndexJump { from: 65_530, to, free: 8 }));
        }
        assert!(!rig.device.pop(&mut Chain::default()).unwrap(), "the jump was not taken over");
    }
}

#[test]
fn more_than_fits_while_requests_are_in_flight_is_refused() {
    for options in byte_orders(FLAGS_ONLY) {
        let mut rig = Rig::new(8, 0, options);
        let heads: Vec<_> = (0..3).map(|_| rig.submit(&[writable(DATA, 1)], None)).collect();
        heads.iter().for_each(|_| drop(rig.take()));
        rig.poke(AVAIL + 2, &rig.word(9u16));
        assert_eq!(rig.device.available(), Err(RingError::IndexJump { from: 3, to: 9, free: 5 }));
        rig.complete(heads[0], 0);
        assert_eq!(rig.device.available(), Ok(6));
    }
}

#[test]
fn a_head_out_of_range_is_refused() {
    for options in byte_orders(FLAGS_ONLY) {
        let mut rig = Rig::new(8, 0, options);
        for head in [8u16, u16::MAX] {
            rig.poke(AVAIL + 2, &[&rig.word(1u16)[..], &rig.word(head)].concat());
            assert_eq!(rig.device.available(), Ok(1));
            assert_eq!(rig.device.pop(&mut Chain::default()), Err(RingError::HeadOutOfRange { head, size: 8 }));
        }
    }
}

#[test]
fn a_range_outside_memory_is_refused_even_by_one_byte() {
    for options in formats(FLAGS_ONLY) {
        for (start, length) in [
            (END - 1, 2),
            (DESCRIPTORS - 1, 2),
            (ISLAND + 0xfff, 2),
            (END, 1),
            (SEAM - 1, (END - SEAM) as u32 + 2),
            (u64::MAX, 1),
            (u64::MAX, u32::MAX),
            (u64::MAX - 15, 16),
        ] {
            for direct in [Some(1), None] {
                let mut rig = Rig::new(8, 0, options);
                let indirect = direct.map(|_| Indirect { table: DATA, direct: 0 });
                let error = rig.provoke_with(&[writable(start, length)], indirect);
                let expected_end = u128::from(start) + u128::from(length);
                let RingError::OutsideMemory { descriptor: 0, start: told, end, memory } = error else {
                    panic!("{start:#x}, {length:#x}: {error}")
                };
                assert_eq!((told, end), (start, expected_end));
                assert!(memory.contains("0x100000..0x800000, 0x800000..0x810000, 0x900000"));
            }
        }
    }
}

#[test]
fn a_table_outside_memory_is_refused() {
    for options in byte_orders(FLAGS_ONLY) {
        let mut rig = Rig::new(8, 0, options);
        for start in [END - 31, u64::MAX - 31, u64::MAX] {
            rig.describe(DESCRIPTORS, 0, start, 32, INDIRECT, 0);
            let error = rig.provoke();
            assert!(matches!(error, RingError::OutsideMemory { descriptor: 0, start: told, .. } if told == start));
        }
    }
}

#[test]
fn a_chain_of_four_gibibytes_is_refused() {
    for options in formats(FLAGS_ONLY) {
        let mut rig = Rig::new(4, 0, options);
        let (table, piece) = (DATA, 0x40_0000);
        let error = rig.provoke_with(&[writable(DATA, piece); 1024], Some(Indirect { table, direct: 0 }));
        assert_eq!(error, RingError::ChainTooLarge { head: 0, bytes: 1 << 32, limit: u32::MAX });
        let mut just_fits = [writable(DATA, piece); 1024];
        just_fits[5].length -= 1;
        let mut rig = Rig::new(4, 0, options);
        rig.submit(&just_fits, Some(Indirect { table, direct: 0 }));
        assert_eq!(rig.take().writable(), u64::from(u32::MAX));
    }
}

// What a hostile device writes.

#[test]
fn the_driver_refuses_what_it_did_not_submit() {
    let mut rig = Rig::new(8, 0, FLAGS_ONLY);
    let head = rig.submit(&[writable(DATA, 4), writable(DATA, 4)], None);
    for id in [7, 8, 1 << 16, u32::MAX, u32::from(head) + 1] {
        rig.poke(USED + 2, &[&[1, 0][..], &id.to_le_bytes(), &[0; 4]].concat());
        assert_eq!(rig.driver.pop(), Err(RingError::UsedNotSubmitted { head: id }));
    }
    assert_eq!((rig.driver.outstanding(), rig.driver.free()), (1, 6));
}

#[test]
fn the_driver_refuses_a_second_completion() {
    for options in byte_orders(FLAGS_ONLY) {
        let mut rig = Rig::new(8, 0, options);
        let first = rig.submit(&[writable(DATA, 4)], None);
        rig.submit(&[writable(DATA, 4)], None);
        rig.complete(first, 4);
        rig.complete(first, 4);
        assert_eq!(rig.driver.pop(), Ok(Some(Used { head: first, written: 4 })));
        assert_eq!(rig.driver.pop(), Err(RingError::UsedNotSubmitted { head: first.into() }));
    }
}

#[test]
fn the_driver_refuses_a_chain_that_the_device_cannot_have_seen() {
    for options in byte_orders(FLAGS_ONLY) {
        let mut rig = Rig::new(8, 0, options);
        rig.submit(&[writable(DATA, 4)], None);
        let hidden = rig.driver.add(&[writable(DATA, 4)], None).unwrap();
        rig.complete(hidden, 0);
        assert_eq!(rig.driver.pop(), Err(RingError::UsedNotSubmitted { head: hidden.into() }));
    }
}

#[test]
fn the_driver_refuses_more_bytes_than_it_offered() {
    for options in byte_orders(FLAGS_ONLY) {
        let mut rig = Rig::new(8, 0, options);
        let head = rig.submit(&[readable(DATA, 100), writable(DATA, 3), writable(DATA, 4)], None);
        rig.complete(head, 8);
        assert_eq!(rig.driver.pop(), Err(RingError::UsedTooLong { head, written: 8, writable: 7 }));
    }
}

#[test]
fn the_driver_refuses_a_used_index_that_jumps() {
    let mut rig = Rig::new(8, 65_535, FLAGS_ONLY);
    rig.submit(&[writable(DATA, 4)], None);
    for to in [1u16, 9, 65_534] {
        rig.poke(USED + 2, &to.to_le_bytes());
        let error = RingError::UsedIndexJump { from: 65_535, to, outstanding: 1 };
        assert_eq!((rig.driver.pop(), rig.driver.enable_calls(1)), (Err(error.clone()), Err(error)));
    }
}

#[test]
fn the_driver_believes_nothing_that_the_device_scribbles_over_the_ring() {
    for options in byte_orders(EVENT_IDX) {
        let mut rig = Rig::new(8, 0, options);
        let head = rig.submit(&[writable(DATA, 1), writable(DATA, 1), writable(DATA, 1)], None);
        rig.take();
        rig.poke(DESCRIPTORS, &[0xff; 128]);
        rig.poke(AVAIL, &[0xff; 22]);
        rig.complete(head, 3);
        assert_eq!(rig.driver.pop(), Ok(Some(Used { head, written: 3 })));
        let all: Vec<_> = (0..8).map(|_| rig.driver.add(&[writable(DATA, 1)], None).unwrap()).collect();
        let distinct: std::collections::BTreeSet<_> = all.into_iter().collect();
        assert_eq!(distinct, (0..8).collect());
    }
}

// Properties.

/// The lengths of a chain's parts, and how many elements stay out of the indirect table, if there is one.
#[derive(Clone, Debug)]
struct Shape {
    readable: Vec<u32>,
    writable: Vec<u32>,
    direct: Option<usize>,
}

impl Shape {
    const SPACE: u64 = 0x1000;

    /// The elements, one after the other in the `place`th piece of memory, whose end is kept for the table. The pieces
    /// lie around the seam of two regions.
    fn lay_out(&self, place: u64) -> (Vec<Element>, Option<Indirect>) {
        let mut address = SEAM - 0x8000 + place % 16 * Self::SPACE + 0x80;
        let table = address + Self::SPACE - 0x200;
        let mut element = |length: &u32, writable| {
            address += u64::from(*length);
            Element { address: address - u64::from(*length), length: *length, writable }
        };
        let mut elements: Vec<_> = self.readable.iter().map(|length| element(length, false)).collect();
        elements.extend(self.writable.iter().map(|length| element(length, true)));
        let indirect = self.direct.map(|direct| Indirect { table, direct: direct % elements.len() });
        (elements, indirect)
    }

    fn readable(&self) -> u32 {
        self.readable.iter().sum()
    }

    fn writable(&self) -> u32 {
        self.writable.iter().sum()
    }
}

fn shape() -> impl Strategy<Value = Shape> {
    let lengths = || prop::collection::vec(1..200u32, 0..5);
    (lengths(), lengths(), any::<Option<usize>>())
        .prop_filter("a chain has an element", |(readable, writable, _)| !readable.is_empty() || !writable.is_empty())
        .prop_map(|(readable, writable, direct)| Shape { readable, writable, direct })
}

#[derive(Clone, Debug)]
enum Step {
    Submit(Shape),
    Take,
    PutBack,
    Complete(prop::sample::Index),
    Reap,
    DeviceSleeps,
    DriverSleeps,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => shape().prop_map(Step::Submit),
        4 => Just(Step::Take),
        1 => Just(Step::PutBack),
        4 => any::<prop::sample::Index>().prop_map(Step::Complete),
        3 => Just(Step::Reap),
        1 => Just(Step::DeviceSleeps),
        1 => Just(Step::DriverSleeps),
    ]
}

/// A ring of any format, of a size that it may have.
fn ring() -> impl Strategy<Value = (u16, RingOptions)> {
    (1..20u16, any::<[bool; 4]>()).prop_map(|(size, [packed, event_idx, in_order, big_endian])| {
        let size = if packed { size } else { size.next_power_of_two() };
        (size, RingOptions { packed, event_idx, in_order, big_endian, ..FLAGS_ONLY })
    })
}

fn pattern(seed: u64, length: u32) -> Vec<u8> {
    (0..u64::from(length)).map(|at| (seed.wrapping_mul(31).wrapping_add(at * 7)) as u8).collect()
}

proptest! {
    #[test]
    fn what_one_side_sends_the_other_receives_and_nobody_oversleeps(
        steps in prop::collection::vec(step(), 1..120),
        (size, options) in ring(),
        base in any::<u16>(),
    ) {
        let mut rig = Rig::new(size, base.into(), options);
        let (mut submitted, mut taken, mut completed) = (Vec::new(), Vec::new(), Vec::new());
        // With IN_ORDER: what the device was given and the driver has not seen, and whether it is done.
        let mut order = Vec::new();
        let (mut device_sleeps, mut driver_sleeps) = (false, false);
        for (number, step) in (0u64..).zip(steps) {
            match step {
                Step::Submit(shape) => {
                    let (elements, indirect) = shape.lay_out(number);
                    let waiting = order.iter().map(|(request, _)| request);
                    let in_use = submitted.iter().chain(&taken).chain(&completed).chain(waiting);
                    if in_use.map(|(_, _, number): &(u16, Shape, u64)| number % 16).any(|place| place == number % 16) {
                        continue;
                    }
                    let bytes = pattern(number, shape.readable());
                    rig.poke(elements[0].address, &bytes);
                    match rig.driver.add(&elements, indirect) {
                        Ok(head) => submitted.push((head, shape, number)),
                        Err(error) => {
                            let full = matches!(error, RingError::NoRoom { needed, free } if needed > free.into());
                            prop_assert!(full);
                            continue;
                        }
                    }
                    let kick = rig.driver.publish();
                    prop_assert!(kick || !device_sleeps);
                    device_sleeps = false;
                }
                Step::Take => {
                    prop_assert_eq!(rig.device.available(), Ok(submitted.len() as u16));
                    if submitted.is_empty() {
                        continue;
                    }
                    let (head, shape, number) = submitted.remove(0);
                    let chain = rig.take();
                    prop_assert_eq!(chain.head(), head);
                    prop_assert_eq!(contents(&chain), pattern(number, shape.readable()));
                    prop_assert_eq!(chain.writable(), u64::from(shape.writable()));
                    fill(&chain, &pattern(number + 1000, shape.writable()));
                    if options.in_order {
                        order.push(((head, shape.clone(), number), false));
                    }
                    taken.push((head, shape, number));
                }
                Step::PutBack => {
                    let latest = taken.last().map(|(head, _, _)| *head);
                    if latest.is_some_and(|head| rig.device.unpop(head)) {
                        submitted.insert(0, taken.pop().unwrap());
                        order.pop();
                        device_sleeps = false;
                    }
                }
                Step::Complete(which) => {
                    if taken.is_empty() {
                        continue;
                    }
                    let (head, shape, number) = taken.remove(which.index(taken.len()));
                    let call = rig.complete(head, shape.writable());
                    let before = completed.len();
                    if options.in_order {
                        order.iter_mut().filter(|((other, _, _), _)| *other == head).for_each(|(_, done)| *done = true);
                        let ready = order.iter().take_while(|(_, done)| *done).count();
                        completed.extend(order.drain(..ready).map(|(request, _)| request));
                    } else {
                        completed.push((head, shape, number));
                    }
                    if completed.len() > before {
                        prop_assert!(call || !driver_sleeps);
                        driver_sleeps = false;
                    } else {
                        prop_assert!(!call, "there is nothing to see");
                    }
                }
                Step::Reap => {
                    for (head, shape, number) in completed.drain(..) {
                        prop_assert_eq!(rig.driver.pop(), Ok(Some(Used { head, written: shape.writable() })));
                        if let Some(first) = shape.lay_out(number).0.iter().find(|element| element.writable) {
                            let bytes = rig.peek(first.address, shape.writable() as usize);
                            prop_assert_eq!(bytes, pattern(number + 1000, shape.writable()));
                        }
                    }
                    prop_assert_eq!(rig.driver.pop(), Ok(None));
                }
                Step::DeviceSleeps => {
                    device_sleeps = !rig.device.enable_kicks().unwrap();
                    prop_assert_eq!(device_sleeps, submitted.is_empty());
                }
                Step::DriverSleeps => {
                    driver_sleeps = !rig.driver.enable_calls(1).unwrap();
                    prop_assert_eq!(driver_sleeps, completed.is_empty());
                }
            }
            prop_assert_eq!(usize::from(rig.device.in_flight()), taken.len());
        }
    }

    /// Somebody else's reading of the same bytes.
    #[test]
    fn rust_vmm_sees_the_same_chains(shapes in prop::collection::vec(shape(), 1..16), base in any::<u16>()) {
        let mut rig = Rig::new(128, base.into(), FLAGS_ONLY);
        let guest: GuestMemoryMmap = GuestMemoryMmap::from_ranges_with_files(REGIONS.iter().zip(&rig.files).map(
            |((start, end), file)| {
                let file = File::from(file.try_clone().unwrap());
                (GuestAddress(*start), (end - start) as usize, Some(FileOffset::new(file, 0)))
            },
        )).unwrap();
        let mut theirs = Queue::new(128).unwrap();
        theirs.try_set_desc_table_address(GuestAddress(DESCRIPTORS)).unwrap();
        theirs.try_set_avail_ring_address(GuestAddress(AVAIL)).unwrap();
        theirs.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        theirs.set_next_avail(base);
        theirs.set_ready(true);

        for (number, shape) in (0..).zip(&shapes) {
            let (elements, indirect) = shape.lay_out(number);
            rig.driver.add(&elements, indirect).unwrap();
        }
        let _kick = rig.driver.publish();
        for (number, shape) in (0..).zip(&shapes) {
            let chain = rig.take();
            let descriptors = theirs.pop_descriptor_chain(&guest).unwrap();
            prop_assert_eq!(chain.head(), descriptors.head_index());
            let (mut readable, mut writable, mut elements) = (0, 0, Vec::new());
            for descriptor in descriptors {
                let (address, length) = (descriptor.addr().0, descriptor.len());
                elements.push(Element { address, length, writable: descriptor.is_write_only() });
                *(if descriptor.is_write_only() { &mut writable } else { &mut readable }) += u64::from(length);
            }
            prop_assert_eq!((chain.readable(), chain.writable()), (readable, writable));
            prop_assert_eq!(elements, shape.lay_out(number).0);
        }
        prop_assert_eq!(rig.device.available(), Ok(0));
        prop_assert!(theirs.pop_descriptor_chain(&guest).is_none());
    }

    /// Whatever bytes are in the ring, looking at them ends, and ends inside memory.
    #[test]
    fn random_bytes_never_do_worse_than_an_error(
        table in prop::collection::vec((0..0x20u64, 0..0x120u32, 0..8u16, 0..10u16), 16),
        wild in any::<(u64, u32, u16, u16)>(),
        heads in prop::collection::vec(0..9u16, 8),
        index in 0..10u16,
        big_endian in any::<bool>(),
    ) {
        let mut rig = Rig::new(8, 0, RingOptions { big_endian, ..EVENT_IDX });
        for (at, (address, length, flags, next)) in (0..).zip(table) {
            let table = if at < 8 { DESCRIPTORS } else { DATA };
            rig.describe(table, at % 8, DATA + 16 * address, length, flags, next);
        }
        rig.describe(DATA, 7, wild.0, wild.1, wild.2, wild.3);
        rig.poke(AVAIL + 4, &heads.iter().flat_map(|head| rig.word(*head)).collect::<Vec<_>>());
        rig.poke(AVAIL + 2, &rig.word(index));
        let Ok(count) = rig.device.available() else { return Ok(()) };
        let mut chain = Chain::default();
        for _ in 0..count {
            match rig.device.pop(&mut chain) {
                Ok(took) => {
                    prop_assert!(took);
                    prop_assert_eq!(contents(&chain).len() as u64, chain.readable());
                }
                Err(_) => break,
            }
        }
    }
}
