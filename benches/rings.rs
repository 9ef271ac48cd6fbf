//! What a descriptor chain costs, device side: taken from the available ring, walked and checked, and given back.
//!
//! Ours, against a loop over raw pointers that does the least that can be done, and against rust-vmm's virtio-queue. A
//! figure is for a batch: divide by 256 for a chain.

mod rig;

use std::hint::black_box;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rig::{AVAIL, BATCH, DESCRIPTORS, Rig, SIZE, USED};
use vhost_user::virtqueue::{
    Chain, Driver, Little, PackedDriver, PackedRing, Ring, RingLimits, RingOptions, SplitDriver, SplitRing, Used,
};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

criterion_group!(benches, split, floor, virtio_queue, refilled);
criterion_main!(benches);

fn split(criterion: &mut Criterion) {
    for (descriptors, regions) in [(1, 1), (3, 1), (1, 4), (3, 4), (1, 64), (3, 64)] {
        let mut rig = Rig::new(descriptors, regions);
        let options = RingOptions { indirect: true, ..RingOptions::default() };
        let ring = SplitRing::<Little>::new(
            Rig::addresses(),
            SIZE,
            0,
            options,
            RingLimits::default(),
            Arc::clone(&rig.memory),
        );
        let mut ring = ring.expect("a ring that is in memory");
        let mut chains: Vec<Chain> = (0..BATCH).map(|_| Chain::default()).collect();
        let mut used = Vec::new();
        measure(criterion, &format!("split/{descriptors} descriptors/{regions} regions"), || {
            rig.submit();
            assert_eq!(ring.available(), Ok(BATCH));
            assert_eq!(ring.take(&mut chains), Ok(BATCH.into()));
            give_back(&mut ring, &chains, &mut used);
            black_box(ring.publish());
        });
    }
}

fn give_back(ring: &mut impl Ring, chains: &[Chain], used: &mut Vec<Used>) {
    used.clear();
    used.extend(chains.iter().map(|chain| Used { head: chain.head(), written: chain.writable() as u32 }));
    ring.fill_used(used);
}

/// Both formats with a driver that fills the ring again, which is not counted: in a packed ring it has to.
fn refilled(criterion: &mut Criterion) {
    for descriptors in [1, 3] {
        refill::<SplitRing<Little>, SplitDriver<Little>>(
            criterion,
            "refilled split",
            descriptors,
            RingOptions::default(),
        );
        let options = RingOptions { packed: true, ..RingOptions::default() };
        refill::<PackedRing, PackedDriver>(criterion, "refilled packed", descriptors, options);
    }
}

fn refill<R: Ring, D: Driver>(criterion: &mut Criterion, name: &str, descriptors: usize, options: RingOptions) {
    let rig = Rig::new(descriptors, 1);
    let driver = D::new(Rig::addresses(), SIZE, 0, options, Arc::clone(&rig.memory));
    let mut driver = driver.expect("a ring that is in memory");
    let limits = RingLimits::default();
    let ring = R::new(Rig::addresses(), SIZE, driver.base(), options, limits, Arc::clone(&rig.memory));
    let mut ring = ring.expect("a ring that is in memory");
    let mut chains: Vec<Chain> = (0..BATCH).map(|_| Chain::default()).collect();
    let mut used = Vec::new();
    let mut group = criterion.benchmark_group("ring");
    group.throughput(Throughput::Elements(BATCH.into()));
    group.bench_function(format!("{name}/{descriptors} descriptors/1 regions"), |bencher| {
        bencher.iter_custom(|rounds| {
            let mut elapsed = Duration::ZERO;
            for _ in 0..rounds {
                for at in 0..BATCH {
                    driver.add(&Rig::elements(descriptors, at), None).expect("room for a chain");
                }
                black_box(driver.publish());
                let begin = Instant::now();
                assert!(ring.look().expect("a good ring"));
                assert_eq!(ring.take(&mut chains), Ok(BATCH.into()));
                give_back(&mut ring, &chains, &mut used);
                black_box(ring.publish());
                elapsed += begin.elapsed();
                for _ in 0..BATCH {
                    driver.pop().expect("a good device").expect("a chain that was given back");
                }
            }
            elapsed
        });
    });
    group.finish();
}

fn virtio_queue(criterion: &mut Criterion) {
    for (descriptors, regions) in [(1, 1), (3, 1), (1, 4), (3, 4), (1, 64), (3, 64)] {
        let mut rig = Rig::new(descriptors, regions);
        let memory = memory_of(&rig);
        let mut queue = Queue::new(SIZE).expect("a queue");
        queue.set_desc_table_address(Some(DESCRIPTORS as u32), Some(0));
        queue.set_avail_ring_address(Some(AVAIL as u32), Some(0));
        queue.set_used_ring_address(Some(USED as u32), Some(0));
        queue.set_ready(true);
        assert!(queue.is_valid(&memory));
        let mut heads = Vec::with_capacity(BATCH.into());
        measure(criterion, &format!("virtio-queue/{descriptors} descriptors/{regions} regions"), || {
            rig.submit();
            heads.clear();
            for chain in queue.iter(&memory).expect("an available ring") {
                let head = chain.head_index();
                let mut written = 0;
                for descriptor in chain {
                    let address = descriptor.addr();
                    let region = memory.find_region(address).expect("a buffer in memory");
                    let offset = address.unchecked_offset_from(region.start_addr());
                    assert!(offset + u64::from(descriptor.len()) <= region.len());
                    written += if descriptor.is_write_only() { descriptor.len() } else { 0 };
                }
                heads.push((head, written));
            }
            assert_eq!(heads.len(), usize::from(BATCH));
            for (head, written) in &heads {
                queue.add_used(&memory, *head, *written).expect("a used ring");
            }
            black_box(queue.needs_notification(&memory).expect("an available ring"));
        });
    }
}

fn floor(criterion: &mut Criterion) {
    for descriptors in [1, 3] {
        let mut rig = Rig::new(descriptors, 1);
        let mut floor = Floor::new(&rig);
        measure(criterion, &format!("floor/{descriptors} descriptors/1 regions"), || {
            rig.submit();
            assert_eq!(black_box(floor.round()), usize::from(BATCH));
        });
    }
}

fn measure(criterion: &mut Criterion, name: &str, mut round: impl FnMut()) {
    let mut group = criterion.benchmark_group("ring");
    group.throughput(Throughput::Elements(BATCH.into()));
    group.bench_function(name, |bencher| bencher.iter(&mut round));
    group.finish();
}

/// The same memory for rust-vmm's crates.
fn memory_of(rig: &Rig) -> GuestMemoryMmap {
    let ranges: Vec<_> = rig
        .regions()
        .map(|(region, file)| {
            let file = FileOffset::new(file, region.file_offset);
            (GuestAddress(region.guest_address), region.size as usize, Some(file))
        })
        .collect();
    GuestMemoryMmap::from_ranges_with_files(ranges).expect("memory that can be mapped")
}

/// The least that a device can do which does not trust its driver: one region, one bounds check for each buffer, no
/// error to tell, nothing kept but the pieces of the chains.
struct Floor {
    base: *mut u8,
    size: u64,
    next_avail: u16,
    next_used: u16,
    pieces: Vec<(NonNull<u8>, u32)>,
    done: Vec<(u16, u32)>,
}

impl Floor {
    fn new(rig: &Rig) -> Self {
        let size = rig.memory.size();
        let room = 3 * usize::from(BATCH);
        let (pieces, done) = (Vec::with_capacity(room), Vec::with_capacity(room));
        Self { base: rig.pointer(0), size, next_avail: 0, next_used: 0, pieces, done }
    }

    #[inline(never)]
    fn round(&mut self) -> usize {
        self.pieces.clear();
        self.done.clear();
        // SAFETY: the three parts of the ring lie in the region at `base`, at these offsets; indices into them are masked
        // or checked; the rig keeps them mapped.
        unsafe {
            let avail = self.base.add(AVAIL as usize).cast::<u16>();
            let used = self.base.add(USED as usize).cast::<u16>();
            let table = self.base.add(DESCRIPTORS as usize).cast::<u64>();
            let index = u16::from_le(AtomicU16::from_ptr(avail.add(1)).load(Ordering::Acquire));
            while self.next_avail != index {
                let head = u16::from_le(avail.add(2 + usize::from(self.next_avail % SIZE)).read_volatile());
                self.next_avail = self.next_avail.wrapping_add(1);
                let (mut at, mut written) = (head, 0);
                loop {
                    if at >= SIZE {
                        return 0;
                    }
                    let entry = table.add(2 * usize::from(at));
                    let (address, rest) =
                        (u64::from_le(entry.read_volatile()), u64::from_le(entry.add(1).read_volatile()));
                    let length = rest as u32;
                    if address >= self.size || u64::from(length) > self.size - address {
                        return 0;
                    }
                    self.pieces.push((NonNull::new_unchecked(self.base.add(address as usize)), length));
                    written += if rest >> 32 & 2 != 0 { length } else { 0 };
                    if rest >> 32 & 1 == 0 {
                        break;
                    }
                    at = (rest >> 48) as u16;
                }
                self.done.push((head, written));
            }
            for (head, written) in &self.done {
                let entry = used.add(2 + 4 * usize::from(self.next_used % SIZE)).cast::<u32>();
                entry.write_volatile(u32::from(*head).to_le());
                entry.add(1).write_volatile(written.to_le());
                self.next_used = self.next_used.wrapping_add(1);
            }
            AtomicU16::from_ptr(used.add(1)).store(self.next_used.to_le(), Ordering::Release);
            fence(Ordering::SeqCst);
            black_box(AtomicU16::from_ptr(avail).load(Ordering::Relaxed));
        }
        self.done.len()
    }
}
