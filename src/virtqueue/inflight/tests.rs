//! A device dies after every single store, and the one after it finds what was in flight. Then: bytes that no device
//! would write.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::super::packed::Position;
use super::super::{
    Big, Chain, Driver, Element, Little, PackedDriver, PackedRing, Ring, RingAddresses, RingLimits, RingOptions,
    SplitDriver, SplitRing, Used,
};
use super::*;
use crate::memory::crash::survive;

const USER: u64 = 0x7000_0000_0000;
const SIZE: u16 = 8;
const DATA: u64 = 0x1000;
const OPTIONS: RingOptions =
    RingOptions { packed: false, event_idx: true, indirect: false, in_order: false, big_endian: false };
const ADDRESSES: RingAddresses = RingAddresses { descriptors: USER, avail: USER + 0x200, used: USER + 0x400 };

fn guest_memory() -> Arc<Snapshot> {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 0x2000).unwrap();
    let region = Region { guest_address: 0, size: 0x2000, user_address: USER, file_offset: 0 };
    Arc::new(Snapshot::from_table(&[region], &[file]).unwrap())
}

fn buffer(format: Format, queues: u16, size: u16) -> (OwnedFd, Inflight, InflightBuffer) {
    let (file, description) = InflightBuffer::create(format, queues, size).unwrap();
    let buffer = InflightBuffer::map(&file, &description, format).unwrap();
    (file, description, buffer)
}

/// Numbers that look random, and are the same every time.
struct Dice(u32);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 8) as usize % sides
    }
}

/// A driver, and device after device on the same ring and the same record.
struct Rig<D> {
    memory: Arc<Snapshot>,
    buffer: InflightBuffer,
    size: u16,
    options: RingOptions,
    driver: D,
    /// Requests that the driver waits for, by the number that comes back.
    outstanding: BTreeMap<u16, u32>,
    /// How often each request was given back.
    completed: Vec<u32>,
    /// What is in flight, in the order in which it was taken for the first time.
    taken: Vec<u16>,
    /// Whether the device is taking a chain or putting the last one back: that one may be in flight or not, if it dies.
    changing: bool,
}

impl<D: Driver> Rig<D> {
    fn new(size: u16, base: u32, options: RingOptions) -> Self {
        let memory = guest_memory();
        let driver = D::new(ADDRESSES, size, base, options, memory.clone()).unwrap();
        let format = if options.packed { Format::Packed } else { Format::Split };
        let (_, _, buffer) = buffer(format, 2, size);
        let (outstanding, completed, taken) = Default::default();
        Self { memory, buffer, size, options, driver, outstanding, completed, taken, changing: false }
    }

    fn submit(&mut self) {
        let length = 1 + self.completed.len() as u32;
        let parts = [Element { address: DATA, length, writable: true }; 2];
        let Ok(head) = self.driver.add(&parts[..1 + self.completed.len() % 2], None) else { return };
        let _kick = self.driver.publish();
        self.outstanding.insert(head, self.completed.len() as u32);
        self.completed.push(0);
    }

    /// Take in what the device gave back.
    fn look(&mut self) {
        while let Some(used) = self.driver.pop().unwrap() {
            let request = self.outstanding.remove(&used.head).unwrap();
            assert_eq!(used.written, request, "the answer to another request");
            self.completed[request as usize] += 1;
            self.taken.retain(|head| *head != used.head);
        }
    }

    fn start<R: Ring>(&self, base: u32) -> R {
        let ring = R::new(ADDRESSES, self.size, base, self.options, RingLimits::default(), self.memory.clone());
        ring.unwrap().recover(&self.buffer.slot(1).unwrap()).unwrap()
    }

    fn take(&mut self, ring: &mut impl Ring) -> Option<u16> {
        if !ring.look().unwrap() {
            return None;
        }
        let again = ring.resubmitting() > 0;
        self.changing = !again;
        let mut chain = Chain::default();
        assert!(ring.pop(&mut chain).unwrap());
        self.changing = false;
        assert_eq!(chain.resubmitted(), again);
        let request = self.outstanding[&chain.head()];
        assert_eq!(chain.writable(), u64::from((1 + request) * (1 + request % 2)), "another chain");
        if !again {
            self.taken.push(chain.head());
        }
        Some(chain.head())
    }

    /// A device at work: chains are taken, put back, and given back in any order and in batches.
    fn work(&mut self, ring: &mut impl Ring, dice: &mut Dice, rounds: usize) {
        let mut held: Vec<u16> = Vec::new();
        for _ in 0..rounds {
            for _ in 0..dice.roll(4) {
                self.submit();
            }
            for _ in 0..dice.roll(4) {
                held.extend(self.take(ring));
            }
            let again = ring.resubmitting() > 0;
            if dice.roll(4) == 0
                && let Some(head) = self.take(ring)
            {
                self.changing = !again;
                assert!(ring.unpop(head));
                self.changing = false;
                if !again {
                    self.taken.pop();
                }
            }
            let batch: Vec<_> =
                (0..dice.roll(held.len() + 1)).map(|_| held.swap_remove(dice.roll(held.len()))).collect();
            self.give_back(ring, &batch);
        }
        while let Some(head) = self.take(ring) {
            held.push(head);
        }
        self.give_back(ring, &held);
    }

    fn give_back(&mut self, ring: &mut impl Ring, batch: &[u16]) {
        for head in batch {
            ring.push_used(Used { head: *head, written: self.outstanding[head] });
        }
        let _call = ring.publish();
        self.look();
    }

    /// The device died. The next one must find exactly what was in flight.
    fn recover<R: Ring>(&mut self, base: u32) -> R {
        self.look();
        // It may die while it recovers, too, and the one after it.
        let mut probe: R = (0..).find_map(|points| survive(points, || self.start(base))).unwrap();
        let waiting = usize::from(probe.available().unwrap());
        assert_eq!(waiting, self.outstanding.len(), "in flight or available: nothing else");
        let mut found = Vec::new();
        while probe.resubmitting() > 0 {
            let mut chain = Chain::default();
            assert!(probe.pop(&mut chain).unwrap());
            found.push(chain.head());
        }
        if std::mem::take(&mut self.changing) && found.len() != self.taken.len() {
            if found.len() < self.taken.len() {
                self.taken.pop();
            } else {
                self.taken.extend(found.last());
            }
        }
        assert_eq!(found, self.taken, "what was found, and what was in flight");
        self.start(base)
    }
}

/// Let a device die after every store, and the one after it, too.
fn die_everywhere<D: Driver, R: Ring>(size: u16, base: u32, options: RingOptions, seed: u32) {
    let mut deaths = 0;
    for points in 0.. {
        let mut rig = Rig::<D>::new(size, base, options);
        let mut dice = Dice(seed);
        let mut ring: R = rig.start(base);
        let mut lived = survive(points, || rig.work(&mut ring, &mut dice, 6)).is_some();
        let at_once = lived;
        for second in [points % 23, points % 61] {
            if !lived {
                deaths += 1;
                ring = rig.recover(base);
                lived = survive(second, || rig.work(&mut ring, &mut dice, 3)).is_some();
            }
        }
        if !lived {
            ring = rig.recover(base);
        }
        rig.work(&mut ring, &mut dice, 3);
        assert!(rig.outstanding.is_empty(), "lost: {:?}", rig.outstanding);
        assert!(rig.completed.iter().all(|times| *times == 1), "doubled: {:?}", rig.completed);
        if at_once {
            break;
        }
    }
    assert!(deaths > 50, "{deaths} deaths with the seed {seed}");
}

#[test]
fn nothing_is_lost_or_doubled_whenever_a_device_on_a_split_ring_dies() {
    for seed in 0..12 {
        let options = RingOptions { in_order: seed % 3 == 2, ..OPTIONS };
        let base = u32::from(0u16.wrapping_sub(seed as u16));
        if seed % 4 == 3 {
            die_everywhere::<SplitDriver<Big>, SplitRing<Big>>(SIZE, base, options, seed);
        } else {
            die_everywhere::<SplitDriver<Little>, SplitRing<Little>>(SIZE, base, options, seed);
        }
    }
}

#[test]
fn nothing_is_lost_or_doubled_whenever_a_device_on_a_packed_ring_dies() {
    for seed in 0..12 {
        let options = RingOptions { packed: true, in_order: seed % 3 == 2, ..OPTIONS };
        let size = [SIZE, 5, 3, 7][seed as usize % 4];
        die_everywhere::<PackedDriver, PackedRing>(size, 0x8000_8000, options, seed);
    }
}

/// A record of a packed ring with 8 entries, of which a chain of two descriptors, and then one of one, are in flight.
fn packed_in_use(slot: &InflightSlot) {
    let (mut record, _) = PackedRecord::open(slot, SIZE, Position::from_bits(0x8000), |_| true).unwrap();
    record.taken(&[Copied::default(); 2]).unwrap();
    record.taken(&[Copied::default()]).unwrap();
}

fn packed_error(change: impl FnOnce(&Cells)) -> String {
    let (_, _, buffer) = buffer(Format::Packed, 1, SIZE);
    let slot = buffer.slot(0).unwrap();
    packed_in_use(&slot);
    change(&slot.cells);
    PackedRecord::open(&slot, SIZE, Position::from_bits(0x8000), |_| true).unwrap_err().to_string()
}

#[test]
fn a_packed_record_that_no_device_writes_is_refused_with_its_field() {
    const fn entry(at: usize) -> usize {
        32 + 32 * at
    }
    type Change = fn(&Cells);
    let changes: [(Change, &str); 13] = [
        (|record| record.set_u16(8, 7), "version is 7; 0 and 1 are known"),
        (|record| record.set_u16(10, 4), "desc_num is 4, the ring has 8"),
        (|record| record.set_u16(12, 9), "free_head is 9, the ring has 8 entries"),
        (|record| record.set_u16(14, 0xffff), "old_free_head is 65535, the ring has 8 entries"),
        (|record| record.set_u16(16, 8), "used_idx is 8, the ring has 8 entries"),
        (|record| record.set_u16(18, 8), "old_used_idx is 8, the ring has 8 entries"),
        (|record| record.set_u8(20, 2), "used_wrap_counter is 2; it must be 0 or 1"),
        (|record| record.set_u8(entry(7), 3), "entry 7: inflight is 3; it must be 0 or 1"),
        (|record| record.set_u16(entry(5) + 2, 9), "entry 5: next is 9, the ring has 8 entries"),
        (|record| record.set_u16(entry(5) + 2, 3), "entry 3: the list of free entries comes here twice"),
        (|record| record.set_u16(entry(0) + 4, 6), "entry 0: last is 6; following next leads to 1"),
        (|record| record.set_u16(entry(0) + 6, 0), "entry 0: num is 0, the ring has 8 entries"),
        (
            |record| {
                record.set_u16(entry(0) + 2, 2);
                record.set_u16(entry(0) + 4, 2);
            },
            "entry 2: it is free, or in two chains, one of them that of entry 2",
        ),
    ];
    for (change, error) in changes {
        let seen = packed_error(change);
        assert!(seen.contains(error), "{seen} instead of {error}");
    }
    let lost = packed_error(|record| record.set_u8(entry(2), 0));
    assert!(lost.contains("2 entries are in flight and 5 are free; together they must be 8"), "{lost}");
}

#[test]
fn random_bytes_in_a_record_never_do_worse_than_an_error() {
    let mut dice = Dice(7);
    for round in 0..4_000 {
        let format = if round % 2 == 0 { Format::Split } else { Format::Packed };
        let (_, _, buffer) = buffer(format, 1, SIZE);
        let slot = buffer.slot(0).unwrap();
        if format == Format::Split {
            split_in_use(&slot)
        } else {
            packed_in_use(&slot)
        }
        for _ in 0..=dice.roll(4) {
            slot.cells.set_u8(dice.roll(slot.cells.length), dice.roll(10) as u8);
        }
        if format == Format::Split {
            let Ok((mut record, found)) = SplitRecord::open(&slot, SIZE, 100) else { continue };
            found.iter().for_each(|head| record.completed(*head));
            record.before_publish();
            record.after_publish(101);
        } else {
            let opened = PackedRecord::open(&slot, SIZE, Position::from_bits(0x8000), |_| dice.roll(2) == 0);
            let Ok((mut record, found)) = opened else { continue };
            found.resubmit.iter().for_each(|first| record.completed(*first));
            let _ = record.taken(&[Copied::default(); 2]);
            record.before_publish(found.avail);
            record.after_publish();
            while record.taken(&[Copied::default(); 3]).is_ok() {}
        }
    }
}

/// A record of a split ring with 8 entries whose used index is 100, of which the chains 3 and 5 are in flight.
fn split_in_use(slot: &InflightSlot) {
    let (mut record, _) = SplitRecord::open(slot, SIZE, 100).unwrap();
    record.taken(5);
    record.taken(3);
}

fn split_error(change: impl FnOnce(&Cells)) -> String {
    let (_, _, buffer) = buffer(Format::Split, 1, SIZE);
    let slot = buffer.slot(0).unwrap();
    split_in_use(&slot);
    change(&slot.cells);
    SplitRecord::open(&slot, SIZE, 100).unwrap_err().to_string()
}

#[test]
fn a_split_record_that_no_device_writes_is_refused_with_its_field() {
    assert_eq!(split_error(|record| record.set_u16(8, 2)), "the in-flight record: version is 2; 0 and 1 are known");
    assert_eq!(split_error(|record| record.set_u16(10, 16)), "the in-flight record: desc_num is 16, the ring has 8");
    assert_eq!(
        split_error(|record| record.set_u16(12, 8)),
        "the in-flight record: last_batch_head is 8, the ring has 8 entries"
    );
    assert_eq!(
        split_error(|record| record.set_u8(16 + 16 * 7, 2)),
        "the in-flight record: entry 7: inflight is 2; it must be 0 or 1"
    );
    assert_eq!(
        split_error(|record| record.set_u16(14, 91)),
        "the in-flight record: used_idx is 91, the used ring is at 100; a ring of 8 entries cannot be so far ahead"
    );
    let next_outside = split_error(|record| {
        record.set_u16(14, 98);
        record.set_u16(12, 3);
        record.set_u16(16 + 16 * 3 + 6, 0xffff);
    });
    assert_eq!(next_outside, "the in-flight record: a next in the last batch is 65535, the ring has 8 entries");
}

#[test]
fn a_split_record_is_taken_up_in_the_order_of_its_counters() {
    let (file, description, buffer) = buffer(Format::Split, 1, SIZE);
    split_in_use(&buffer.slot(0).unwrap());
    // Another process maps the same file.
    let buffer = InflightBuffer::map(&file, &description, Format::Split).unwrap();
    let (_, found) = SplitRecord::open(&buffer.slot(0).unwrap(), SIZE, 100).unwrap();
    assert_eq!(found, [5, 3]);
}

#[test]
fn a_driver_that_began_anew_finds_an_old_record_in_its_way_only_if_something_is_in_flight() {
    let (_, _, buffer) = buffer(Format::Split, 1, SIZE);
    let slot = buffer.slot(0).unwrap();
    SplitRecord::open(&slot, SIZE, 40_000).unwrap();
    assert!(SplitRecord::open(&slot, SIZE, 0).is_ok_and(|(_, found)| found.is_empty()), "nothing was in flight");
    split_in_use(&slot);
    assert!(SplitRecord::open(&slot, SIZE, 0).is_err());
    slot.clear();
    assert!(SplitRecord::open(&slot, SIZE, 0).is_ok_and(|(_, found)| found.is_empty()), "it was cleared");
}

#[test]
fn the_size_of_a_record_is_that_of_the_specification() {
    for (format, size, bytes) in [
        (Format::Split, 128, 16 + 16 * 128 + 48),
        (Format::Split, 1, 64),
        (Format::Split, 4, 128),
        (Format::Packed, 128, 32 + 32 * 128 + 32),
        (Format::Packed, 1, 64),
        (Format::Packed, 5, 192),
    ] {
        assert_eq!(format.stride(size), bytes, "{format:?} {size}");
    }
    let (_, description, buffer) = buffer(Format::Split, 3, 16);
    let wanted = Inflight { size: 3 * 320, offset: 0, queues: 3, queue_size: 16, padding: 0 };
    assert_eq!((description, buffer.queues()), (wanted, 3));
    assert!(buffer.slot(2).is_some() && buffer.slot(3).is_none());
}

#[test]
fn a_buffer_that_is_too_small_or_askew_is_refused() {
    let (file, good) = InflightBuffer::create(Format::Split, 2, 128).unwrap();
    let refusal = |change: fn(&mut Inflight)| {
        let mut bad = good;
        change(&mut bad);
        InflightBuffer::map(&file, &bad, Format::Split).unwrap_err()
    };
    assert_eq!(
        refusal(|bad| bad.size -= 1),
        "mmap_size is 4223; the records of 2 queues with 128 entries have 4224 bytes"
    );
    assert_eq!(refusal(|bad| bad.offset = 4), "mmap_offset is 0x4; it must be a multiple of 8");
    assert!(refusal(|bad| bad.offset = 8).contains("needs bytes 0x8..0x1088 of its file, which has 0x1080"));
    assert!(refusal(|bad| bad.offset = u64::MAX - 7).contains("which no file can hold"));
    assert_eq!(refusal(|bad| bad.queues = 0), "it is for 0 queues");
    assert_eq!(refusal(|bad| bad.queue_size = 0), "queue_size is 0; a split ring needs a power of two up to 32768");
    assert_eq!(refusal(|bad| bad.queue_size = 96), "queue_size is 96; a split ring needs a power of two up to 32768");
    let packed = InflightBuffer::map(&file, &good, Format::Packed).unwrap_err();
    assert_eq!(packed, "mmap_size is 4224; the records of 2 queues with 128 entries have 8320 bytes");
}

#[test]
fn a_record_fits_its_ring_or_is_refused() {
    let (_, _, split) = buffer(Format::Split, 1, SIZE);
    let error = |format, size| split.slot(0).unwrap().open(format, size).unwrap_err().to_string();
    assert_eq!(error(Format::Split, 16), "the in-flight record: it has room for 8 entries, the ring has 16");
    assert_eq!(error(Format::Packed, 8), "the in-flight record: it is for split rings, the ring is packed");
}
