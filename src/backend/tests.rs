//! What a front-end that migrates the guest sees of a ring, at every moment.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::{pread, pwrite, read};

use super::vring::Logging;
use super::*;
use crate::memory::crash::{survive, watch};
use crate::memory::{DirtyLog, PAGE_SIZE, Snapshot};
use crate::protocol::{Log, Region};
use crate::virtqueue::{
    Big, Chain, Driver, Element, Format, InflightBuffer, InflightSlot, Little, PackedDriver, RingAddresses, RingLimits,
    RingOptions, SplitDriver, Used,
};

const USER: u64 = 0x7000_0000_0000;
const PAGES: usize = 24;
const MEMORY: usize = PAGES * PAGE_SIZE as usize;
const DATA: u64 = 8 * PAGE_SIZE;
const SIZE: u16 = 8;
const REQUESTS: u16 = 6;
/// What the device writes to lies on two pages: some descriptors, or used entries, are on the second.
const ADDRESSES: RingAddresses =
    RingAddresses { descriptors: USER + PAGE_SIZE - 64, avail: USER + 2 * PAGE_SIZE, used: USER + 5 * PAGE_SIZE - 36 };

fn file(length: usize) -> OwnedFd {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, length as u64).unwrap();
    file
}

fn map(memory: &OwnedFd) -> Arc<Snapshot> {
    let region = Region { guest_address: 0, size: MEMORY as u64, user_address: USER, file_offset: 0 };
    Arc::new(Snapshot::from_table(&[region], &[memory.try_clone().unwrap()]).unwrap())
}

fn content(file: &OwnedFd, offset: usize, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    assert_eq!(pread(file, &mut bytes, offset as u64).unwrap(), length);
    bytes
}

/// What request number `number` is answered.
fn answer(number: u16) -> Vec<u8> {
    vec![0x10 + number as u8; 64]
}

/// A guest on its way: its driver, and what the other side has of its memory.
struct Migration {
    memory: OwnedFd,
    log: OwnedFd,
    copy: Vec<u8>,
    driver: Box<dyn Driver>,
    /// By the number of the request.
    heads: Vec<u16>,
    seen: usize,
    /// How often somebody looked.
    looks: usize,
}

impl Migration {
    /// A driver that waits for answers, and a copy of all memory.
    fn begin(options: RingOptions, base: u32) -> Self {
        let (memory, log) = (file(MEMORY), file(PAGES / 8));
        let snapshot = map(&memory);
        let mut driver: Box<dyn Driver> = if options.packed {
            Box::new(PackedDriver::new(ADDRESSES, SIZE, base, options, snapshot).unwrap())
        } else if options.big_endian {
            Box::new(SplitDriver::<Big>::new(ADDRESSES, SIZE, base, options, snapshot).unwrap())
        } else {
            Box::new(SplitDriver::<Little>::new(ADDRESSES, SIZE, base, options, snapshot).unwrap())
        };
        let heads = (0..u64::from(REQUESTS))
            .map(|number| {
                let element = Element { address: DATA + number * PAGE_SIZE, length: 64, writable: true };
                driver.add(&[element], None).unwrap()
            })
            .collect();
        let _kick = driver.publish();
        let copy = content(&memory, 0, MEMORY);
        Self { memory, log, copy, driver, heads, seen: 0, looks: 0 }
    }

    /// Copy the pages that are marked, once more.
    fn send(&mut self) {
        for (at, marks) in content(&self.log, 0, PAGES / 8).into_iter().enumerate() {
            pwrite(&self.log, &[0], at as u64).unwrap();
            for page in (0..8).filter(|bit| marks & 1 << bit != 0).map(|bit| 8 * at + bit) {
                let start = page * PAGE_SIZE as usize;
                let end = start + PAGE_SIZE as usize;
                self.copy[start..end].copy_from_slice(&content(&self.memory, start, PAGE_SIZE as usize));
            }
        }
    }

    /// Send what is marked; what the driver has been told by now must have been sent by then.
    fn look(&mut self) {
        self.looks += 1;
        let mut told = Vec::new();
        while let Some(used) = self.driver.pop().unwrap() {
            told.push(used.head);
        }
        self.send();
        for head in told {
            let number = self.heads.iter().position(|other| *other == head).unwrap() as u16;
            let start = DATA as usize + usize::from(number) * PAGE_SIZE as usize;
            assert_eq!(
                self.copy[start..start + 64],
                answer(number),
                "the driver knows of an answer that is not marked"
            );
            self.seen += 1;
        }
    }

    /// Whether the other side has everything.
    fn check(&self, when: &str) {
        for page in 0..PAGES {
            let start = page * PAGE_SIZE as usize;
            let ours = content(&self.memory, start, PAGE_SIZE as usize);
            assert!(self.copy[start..start + ours.len()] == ours, "page {page} was written to after its mark: {when}");
        }
    }
}

/// A device that logs everything, and has begun.
fn device(migration: &Migration, memory: &Arc<Snapshot>, options: RingOptions, base: u32) -> Vring {
    device_with_record(migration, memory, options, base, None)
}

/// Likewise, with a record of what is in flight.
fn device_with_record(
    migration: &Migration,
    memory: &Arc<Snapshot>,
    options: RingOptions,
    base: u32,
    record: Option<InflightSlot>,
) -> Vring {
    let vring = Vring::new(0, SIZE, RingLimits::default(), EventLoop::new().unwrap().wakeup());
    let description = Log { size: PAGES as u64 / 8, offset: 0 };
    let log = Some(Arc::new(DirtyLog::map(description, &migration.log).unwrap()));
    let logging = Logging { log, buffers: true, call: None };
    vring.set_options(options);
    vring.set_logging(&logging);
    vring.set_record(record);
    vring.set_size(SIZE.into()).unwrap();
    vring.set_base(base).unwrap();
    vring.set_addresses(ADDRESSES, Some(ADDRESSES.used - USER)).unwrap();
    vring.set_kick(None, |_| {}, |_| {});
    vring.set_enabled(true);
    vring.try_start(memory).unwrap();
    vring
}

/// How a device gives back what it took.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// First one request, then the others.
    AtOnce,
    /// The ring may not be touched until all are done.
    Held,
    /// Taken, written to and given back in one go.
    Filled,
}

/// Take what there is, and answer it.
fn work(vring: &Vring, memory: &Arc<Snapshot>, way: Way) {
    let mut number = 0;
    let mut write = |chain: &Chain| {
        // SAFETY: `memory` is the snapshot under which the chain was filled.
        assert_eq!(unsafe { chain.write(0, &answer(number)) }, 64);
        number += 1;
        64
    };
    if let Way::Filled = way {
        assert_eq!(vring.fill(usize::from(SIZE), |chain| Some(write(chain))).count, usize::from(REQUESTS));
        return;
    }
    let mut chains = Vec::new();
    let Taken::Chains(run) = vring.take(usize::from(SIZE), &mut chains, &mut Vec::new()) else { panic!("no chains") };
    assert_eq!(chains.len(), usize::from(REQUESTS));
    let used: Vec<_> = chains.iter().map(|chain| Used { head: chain.head(), written: write(chain) }).collect();
    vring.set_enabled(!matches!(way, Way::Held));
    assert!(vring.complete(&run, &used[..1], &chains[..1]));
    assert!(vring.complete(&run, &used[1..], &chains[1..]));
    vring.set_enabled(true);
    vring.try_start(memory).unwrap();
}

/// Every ring format, both ways to suppress notifications, and rings that begin at 0 or go over their end.
fn rings() -> impl Iterator<Item = (RingOptions, u32)> {
    let formats = [(false, false, [0, 5]), (false, true, [0, 5]), (true, false, [0x8000_8000, 0x8005_8005])];
    formats.into_iter().flat_map(|(packed, big_endian, bases)| {
        [false, true].into_iter().flat_map(move |event_idx| {
            let options = RingOptions { packed, big_endian, event_idx, ..RingOptions::default() };
            bases.map(move |base| (options, base))
        })
    })
}

#[test]
fn data_is_marked_before_the_driver_knows_of_it_and_the_ring_after_it_was_written_to() {
    for (options, base) in rings() {
        for way in [Way::AtOnce, Way::Held, Way::Filled] {
            let migration = Migration::begin(options, base);
            let memory = map(&migration.memory);
            let vring = device(&migration, &memory, options, base);
            let migration = Rc::new(RefCell::new(migration));
            let look = || {
                let migration = Rc::clone(&migration);
                move || migration.borrow_mut().look()
            };
            watch(look(), || work(&vring, &memory, way));
            {
                let mut migration = migration.borrow_mut();
                migration.look();
                assert_eq!(migration.seen, usize::from(REQUESTS));
                assert!(migration.looks > usize::from(REQUESTS), "somebody looked in between");
                migration.check(&format!("{options:?}, {base:#x}, {way:?}"));
            }
            // There is nothing more: it asks for kicks.
            let taken = watch(look(), || vring.take(1, &mut Vec::new(), &mut Vec::new()));
            assert!(matches!(taken, Taken::Nothing));
            let mut migration = migration.borrow_mut();
            migration.look();
            migration.check(&format!("{options:?}, {base:#x}, asking for kicks"));
        }
    }
}

/// Kill a device at the point number `after`, and let another one go on. Returns whether the first one survived.
fn kill(options: RingOptions, base: u32, way: Way, after: u32) -> bool {
    let mut migration = Migration::begin(options, base);
    let memory = map(&migration.memory);
    let format = if options.packed { Format::Packed } else { Format::Split };
    let (file, description) = InflightBuffer::create(format, 1, SIZE).unwrap();
    let record = InflightBuffer::map(&file, &description, format).unwrap();
    let start = || device_with_record(&migration, &memory, options, base, record.slot(0));
    let survived = survive(after, || work(&start(), &memory, way)).is_some();
    start().fill(usize::from(SIZE), |chain| {
        let number = migration.heads.iter().position(|head| *head == chain.head()).unwrap();
        // SAFETY: `memory` is the snapshot under which the chain was filled.
        Some(unsafe { chain.write(0, &answer(number as u16)) } as u32)
    });
    migration.look();
    assert_eq!(migration.seen, usize::from(REQUESTS));
    migration.check(&format!("{options:?}, {base:#x}, {way:?}, killed after {after}"));
    survived
}

#[test]
fn what_a_killed_device_did_not_mark_of_the_ring_is_marked_by_the_next() {
    for (options, base) in rings() {
        for way in [Way::AtOnce, Way::Filled] {
            let mut after = 0;
            while !kill(options, base, way, after) {
                after += 1;
            }
            assert!(after > u32::from(REQUESTS), "it could die at many points");
        }
    }
}

#[test]
fn a_ring_is_concluded_with_one_notification_and_a_request_to_kick_once_nothing_is_left() {
    for (options, base) in rings() {
        for kick in [false, true] {
            let mut migration = Migration::begin(options, base);
            let memory = map(&migration.memory);
            let vring = device(&migration, &memory, options, base);
            let calls = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
            vring.set_call(Some(calls.try_clone().unwrap()));
            let count = || {
                let mut count = [0; 8];
                read(&calls, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
            };
            assert_eq!(count(), 1, "the driver may have missed something");

            let serve = |max| {
                let mut chains = Vec::new();
                let Taken::Chains(run) = vring.take(max, &mut chains, &mut Vec::new()) else { panic!("no chains") };
                let used: Vec<_> = chains.iter().map(|chain| Used { head: chain.head(), written: 0 }).collect();
                assert!(vring.complete_quietly(&run, &used, &chains));
            };
            serve(1);
            assert!(vring.conclude(kick), "there are others");
            assert_eq!(count(), 0, "{options:?}");
            serve(REQUESTS.into());
            assert!(!vring.conclude(kick));
            assert_eq!(count(), 1, "{options:?}");
            assert!(!vring.conclude(kick));
            assert_eq!(count(), 0, "{options:?}");

            while migration.driver.pop().unwrap().is_some() {}
            migration.driver.add(&[Element { address: DATA, length: 64, writable: true }], None).unwrap();
            assert_eq!(migration.driver.publish(), kick, "{options:?}");
            assert!(vring.conclude(kick), "one has come");
        }
    }
}
