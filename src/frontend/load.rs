//! Load: the same kind of request again and again, as fast as the device completes them, and what that took.
//!
//! Everything that a request needs is made before the first one. A queue that is loaded is used by nobody else.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::{Errno, read};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime};

use super::queue::{AnyDriver, on_driver, place};
use super::{Allocation, Queue};
use crate::error::{Error, RingError};
use crate::virtqueue::{Driver, Element, Indirect};

/// How often a load looks whether it is to stop.
const SLICE: Duration = Duration::from_millis(50);

/// How long a look takes that finds nothing.
const GLANCE: Duration = Duration::from_millis(1);

/// How many calls are left in their eventfd before they are taken out: a full one would block who writes.
const UNREAD: u32 = 1 << 10;

/// Of a disk: a sector; the header of a request, and the types of those that read and write; and a status that none has.
const SECTOR: u32 = 512;
const HEADER: u32 = 16;
const DISK_IN: u32 = 0;
const DISK_OUT: u32 = 1;
const NO_STATUS: u8 = 0xff;

const PAGE: u64 = 4096;

/// What the requests are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Chains of parts of these sizes. What the device may read is zero.
    Chain { readable: Vec<u32>, writable: Vec<u32> },
    /// Blocks of a disk, from its start: one after the other or, `random`, anywhere. Reads and writes mixed are half of
    /// each. Virtio 1.3, section 5.2.6.
    Disk { reads: bool, writes: bool, random: bool, block: u32, blocks: u64 },
}

#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// How long to go on.
    pub runtime: Duration,
    /// How long a device may take that completes nothing.
    pub timeout: Duration,
    /// Look for completions all the time instead of waiting for a notification.
    pub poll: bool,
}

/// What other threads see of a load, and how they end it.
#[derive(Debug, Default)]
pub struct Control {
    requests: AtomicU64,
    stopped: AtomicBool,
}

/// What a load has seen.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub elapsed: Duration,
    /// Completed requests, whatever their status.
    pub requests: u64,
    /// Bytes that the device took and gave. Of a disk: blocks of requests that succeeded, without headers.
    pub sent: u64,
    pub received: u64,
    /// How often a disk answered with each status but 0.
    pub errors: BTreeMap<u8, u64>,
    /// From the submission of each request to where its completion was seen, in nanoseconds.
    pub latency: Histogram,
}

/// Load every queue from a thread of its own, with up to `depth` requests under way on each.
pub fn load(
    queues: &[&Queue],
    workload: &Workload,
    depth: u16,
    options: LoadOptions,
    control: &Control,
) -> Result<Tally, Error> {
    let count = queues.len() as u64;
    let jobs =
        queues.iter().zip(0..).map(|(queue, at)| Job::new(queue, workload, depth, Walk::new(workload, at, count)));
    let mut jobs = jobs.collect::<Result<Vec<_>, _>>()?;
    let outcomes: Vec<_> = thread::scope(|scope| {
        let start = |job: &mut Job<'_>| job.run(options, control).inspect_err(|_| control.stop());
        let threads: Vec<_> = jobs.iter_mut().map(|job| scope.spawn(move || start(job))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    let mut total = Tally::default();
    for outcome in outcomes {
        total.merge(&outcome?);
    }
    Ok(total)
}

impl Tally {
    fn merge(&mut self, other: &Self) {
        self.elapsed = self.elapsed.max(other.elapsed);
        self.requests += other.requests;
        self.sent += other.sent;
        self.received += other.received;
        for (status, count) in &other.errors {
            *self.errors.entry(*status).or_default() += count;
        }
        self.latency.merge(&other.latency);
    }
}

impl Control {
    /// Submit nothing more.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// Requests that were completed so far.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }
}

/// One queue, and the requests that go round on it.
struct Job<'a> {
    queue: &'a Queue,
    indirect: bool,
    slots: Vec<Slot>,
    /// Which slot the chain at each descriptor is.
    by_head: Box<[u16]>,
    /// Of a disk: where the next request goes.
    walk: Option<Walk>,
    tally: Tally,
    errors: [u64; 256],
    /// Room for a status.
    status: Vec<u8>,
}

impl<'a> Job<'a> {
    fn new(queue: &'a Queue, workload: &Workload, depth: u16, walk: Option<Walk>) -> Result<Self, Error> {
        let (readable, writable) = match workload {
            Workload::Chain { readable, writable } => (&readable[..], &writable[..]),
            Workload::Disk { block, .. } => (&[HEADER, *block][..], &[1][..]),
        };
        let count = readable.len() + writable.len();
        let indirect = queue.indirect() && count > 1;
        let descriptors = if indirect { 1 } else { count };
        if descriptors * usize::from(depth) > usize::from(queue.size()) {
            let (index, size) = (queue.index(), queue.size());
            return Err(Error::State(format!(
                "queue {index}: {depth} requests of {descriptors} descriptors do not fit; it has {size}"
            )));
        }
        let table = if indirect { 16 * count } else { 0 };
        let slot = |_| Slot::new(queue, readable, writable, table, walk.is_some());
        Ok(Self {
            queue,
            indirect,
            slots: (0..depth).map(slot).collect::<Result<_, _>>()?,
            by_head: vec![0; queue.size().into()].into(),
            walk,
            tally: Tally::default(),
            errors: [0; 256],
            status: Vec::with_capacity(1),
        })
    }

    fn run(&mut self, options: LoadOptions, control: &Control) -> Result<Tally, Error> {
        let queue = self.queue;
        let mut under_way = self.slots.len();
        let mut bell = Bell::new(queue)?;
        let begin = Instant::now();
        for slot in 0..self.slots.len() {
            let kick = queue.with_ring(|ring| {
                if options.poll {
                    ring.disable_calls();
                }
                on_driver!(ring, ring => self.submit(ring, slot, begin))
            })?;
            if kick {
                queue.kick()?;
            }
        }
        let end = begin + options.runtime;
        let (mut over, mut last, mut looked) = (false, begin, begin);
        while under_way > 0 {
            let (came, now, kick) = queue.with_ring(|ring| on_driver!(ring, ring => self.turn(ring, over)))?;
            if kick {
                queue.kick()?;
            }
            if over {
                under_way -= came;
            } else {
                control.requests.fetch_add(came as u64, Ordering::Relaxed);
                over = now >= end || control.stopped.load(Ordering::Relaxed);
                self.tally.elapsed = now - begin;
            }
            if came > 0 {
                last = now;
            }
            if came > 0 && options.poll || under_way == 0 {
                continue;
            }
            if now - last > options.timeout {
                let (index, seconds) = (queue.index(), options.timeout.as_secs_f64());
                return Err(Error::Timeout(format!(
                    "queue {index}: the device has {under_way} requests, and completed none of them within {seconds} s"
                )));
            }
            if !options.poll {
                bell.wait()?;
            } else if now - last.max(looked) > SLICE {
                // Who looks at nothing but the ring does not see that the back-end is gone.
                looked = now;
                queue.wait_for_call(now + GLANCE)?;
                queue.with_ring(|ring| {
                    ring.disable_calls();
                    Ok(())
                })?;
            } else {
                std::hint::spin_loop();
            }
        }
        self.tally.errors = (0..=u8::MAX).zip(self.errors).filter(|(_, count)| *count > 0).collect();
        Ok(std::mem::take(&mut self.tally))
    }

    /// Take what the device has completed, at most as many requests as there are slots, and submit as many again unless it
    /// is `over`, until the device wants a kick. Returns how many those are, when it saw the last, and whether to kick.
    ///
    /// The device sees each as soon as it is there, as it does of most drivers, and of libblkio: one that is about to sleep
    /// need not, and one that sleeps wakes up while the others are made.
    fn turn(&mut self, ring: &mut impl Driver, over: bool) -> Result<(usize, Instant, bool), RingError> {
        let mut seen: Option<Instant> = None;
        let mut came = 0;
        let mut kick = false;
        while !kick
            && came < self.slots.len()
            && let Some(used) = ring.pop()?
        {
            let slot = usize::from(self.by_head[usize::from(used.head)]);
            // Those that were there together came together. One that was submitted since came later.
            let now = seen.filter(|seen| self.slots[slot].submitted < *seen).unwrap_or_else(Instant::now);
            seen = Some(now);
            came += 1;
            if !over {
                self.account(slot, used.written, now);
                kick = self.submit(ring, slot, now)?;
            }
        }
        Ok((came, seen.unwrap_or_else(Instant::now), kick))
    }

    fn account(&mut self, slot: usize, written: u32, now: Instant) {
        let slot = &self.slots[slot];
        self.tally.requests += 1;
        self.tally.latency.record((now - slot.submitted).as_nanos() as u64);
        if self.walk.is_none() {
            self.tally.sent += slot.readable;
            self.tally.received += u64::from(written);
            return;
        }
        self.status.clear();
        slot.buffer.read(slot.last, 1, &mut self.status);
        let bytes = slot.readable - u64::from(HEADER);
        match self.status[0] {
            0 if slot.reads => self.tally.received += bytes,
            0 => self.tally.sent += bytes,
            status => self.errors[usize::from(status)] += 1,
        }
    }

    /// Show a request to the device. Returns whether it wants a kick.
    fn submit(&mut self, ring: &mut impl Driver, at: usize, now: Instant) -> Result<bool, RingError> {
        let slot = &mut self.slots[at];
        if let Some(walk) = &mut self.walk {
            let (reads, sector) = walk.step();
            slot.reads = reads;
            let kind = if reads { DISK_IN } else { DISK_OUT };
            slot.buffer.write(slot.first, &(u128::from(kind) | u128::from(sector) << 64).to_le_bytes());
            slot.buffer.write(slot.last, &[NO_STATUS]);
        }
        let elements = if slot.reads { &slot.read_elements } else { &slot.elements };
        let indirect = self.indirect.then_some(Indirect { table: slot.address, direct: 0 });
        slot.submitted = now;
        let head = ring.add(elements, indirect)?;
        self.by_head[usize::from(head)] = at as u16;
        Ok(ring.publish())
    }
}

/// Waits for a queue with one system call each time: calls are watched for edges and left in their eventfd, and a timer
/// that goes on by itself takes the place of a timeout.
struct Bell<'a> {
    queue: &'a Queue,
    epoll: OwnedFd,
    timer: OwnedFd,
    unread: u32,
}

impl<'a> Bell<'a> {
    const CALL: u64 = 0;
    const TIMER: u64 = 1;
    const OTHER: u64 = 2;

    fn new(queue: &'a Queue) -> Result<Self, Error> {
        let made = || Error::os("making what a load waits for");
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(made())?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags).map_err(made())?;
        let slice = Timespec { tv_sec: 0, tv_nsec: i64::from(SLICE.subsec_nanos()) };
        let regular = Itimerspec { it_interval: slice, it_value: slice };
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &regular).map_err(made())?;
        epoll::add(&epoll, &timer, EventData::new_u64(Self::TIMER), EventFlags::IN).map_err(made())?;
        let edges = EventFlags::IN | EventFlags::ET;
        epoll::add(&epoll, queue.call_descriptor(), EventData::new_u64(Self::CALL), edges).map_err(made())?;
        queue.watch_other(&epoll, EventData::new_u64(Self::OTHER)).map_err(made())?;
        Ok(Self { queue, epoll, timer, unread: 0 })
    }

    /// Wait for the device to complete something, for a slice at most: it need not have.
    fn wait(&mut self) -> Result<(), Error> {
        if self.queue.with_ring(|ring| ring.enable_calls(1))? {
            return Ok(());
        }
        let mut space = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; 4];
        let (ready, _) = match epoll::wait(&self.epoll, &mut space, None) {
            Err(Errno::INTR) => return Ok(()),
            other => other.map_err(Error::os("waiting for the back-end"))?,
        };
        let mut is_call_alone = true;
        for event in ready {
            is_call_alone &= event.data.u64() == Self::CALL;
            if event.data.u64() == Self::TIMER {
                let _ = read(&self.timer, &mut [0; 8]);
            }
        }
        self.unread += 1;
        if is_call_alone && self.unread < UNREAD {
            return self.queue.with_ring(|ring| {
                ring.disable_calls();
                Ok(())
            });
        }
        // It takes the calls out, too.
        self.unread = 0;
        self.queue.wait_for_call(Instant::now() + GLANCE)
    }
}

/// Memory for one request, and the one that it is used for now.
struct Slot {
    buffer: Allocation,
    /// As the device knows it.
    address: u64,
    /// As a chain, or as a write to a disk.
    elements: Vec<Element>,
    /// As a read of a disk.
    read_elements: Vec<Element>,
    /// Bytes that the device may read of `elements`.
    readable: u64,
    /// Where the first and the last element are in `buffer`.
    first: usize,
    last: usize,
    reads: bool,
    submitted: Instant,
}

impl Slot {
    fn new(queue: &Queue, readable: &[u32], writable: &[u32], table: usize, is_disk: bool) -> Result<Self, Error> {
        let mut places = Vec::new();
        let mut end = table;
        for length in readable.iter().chain(writable) {
            let start = place(end, *length as usize);
            places.push(start);
            end = start + *length as usize;
        }
        let buffer = queue.memory().allocate(end as u64, PAGE)?;
        let address = queue.device_address(&buffer);
        buffer.write(0, &vec![0; end]);
        if is_disk {
            // A disk that compresses, or looks for zeroes, must not have it easier.
            let mut random = Random::new(address);
            let data: Vec<u8> = (0..readable[1]).map(|_| random.next() as u8).collect();
            buffer.write(places[1], &data);
        }
        let sizes = readable.iter().map(|length| (*length, false)).chain(writable.iter().map(|length| (*length, true)));
        let elements: Vec<_> = sizes
            .zip(&places)
            .map(|((length, writable), at)| Element { address: address + *at as u64, length, writable })
            .collect();
        let mut read_elements = elements.clone();
        if is_disk {
            read_elements[1].writable = true;
        }
        let readable = readable.iter().map(|length| u64::from(*length)).sum();
        let (first, last) = (places[0], places[places.len() - 1]);
        Ok(Self {
            buffer,
            address,
            elements,
            read_elements,
            readable,
            first,
            last,
            reads: false,
            submitted: Instant::now(),
        })
    }
}

/// Which block of a disk comes next.
#[derive(Debug)]
struct Walk {
    reads: bool,
    writes: bool,
    is_random: bool,
    sectors: u64,
    blocks: u64,
    next: u64,
    random: Random,
}

impl Walk {
    /// The walk of one of several `jobs`. They begin in different places, and every time in the same.
    fn new(workload: &Workload, job: u64, jobs: u64) -> Option<Self> {
        let Workload::Disk { reads, writes, random, block, blocks } = *workload else { return None };
        let (sectors, next) = (u64::from(block / SECTOR), blocks / jobs * job);
        Some(Self { reads, writes, is_random: random, sectors, blocks, next, random: Random::new(job) })
    }

    /// Whether to read, and the sector.
    fn step(&mut self) -> (bool, u64) {
        let block = if self.is_random {
            ((u128::from(self.random.next()) * u128::from(self.blocks)) >> 64) as u64
        } else {
            let following = if self.next + 1 < self.blocks { self.next + 1 } else { 0 };
            std::mem::replace(&mut self.next, following)
        };
        let reads = self.reads && (!self.writes || self.random.next() >> 63 == 0);
        (reads, block * self.sectors)
    }
}

/// SplitMix64, by Steele, Lea and Flood: "Fast splittable pseudorandom number generators", 2014.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }
}

/// How often each value came, to within a part in 64: each power of two is divided into that many buckets.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Box<[u64]>,
    total: u64,
    sum: u128,
    least: u64,
    most: u64,
}

/// Of the buckets into which a power of two is divided.
const BITS: u32 = 6;
const BUCKETS: usize = (65 - BITS as usize) << BITS;

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS].into(), total: 0, sum: 0, least: u64::MAX, most: 0 }
    }
}

impl Histogram {
    pub fn record(&mut self, value: u64) {
        self.counts[bucket(value)] += 1;
        self.total += 1;
        self.sum += u128::from(value);
        self.least = self.least.min(value);
        self.most = self.most.max(value);
    }

    pub fn merge(&mut self, other: &Self) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(count, more)| *count += more);
        self.total += other.total;
        self.sum += other.sum;
        self.least = self.least.min(other.least);
        self.most = self.most.max(other.most);
    }

    /// The value that `percent` of all are not above, or up to a 64th more. None of none.
    #[must_use]
    pub fn percentile(&self, percent: f64) -> Option<u64> {
        let rank = ((percent / 100.0 * self.total as f64).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        let at = self.counts.iter().position(|count| {
            seen += count;
            seen >= rank
        })?;
        Some(upper_end(at).clamp(self.least, self.most))
    }

    #[must_use]
    pub fn mean(&self) -> Option<f64> {
        (self.total > 0).then(|| self.sum as f64 / self.total as f64)
    }

    #[must_use]
    pub fn least(&self) -> Option<u64> {
        (self.total > 0).then_some(self.least)
    }
}

fn bucket(value: u64) -> usize {
    let shift = (u64::BITS - value.leading_zeros()).saturating_sub(BITS + 1);
    ((shift as usize) << BITS) + (value >> shift) as usize
}

/// The largest value in a bucket.
fn upper_end(bucket: usize) -> u64 {
    let shift = (bucket >> BITS).saturating_sub(1);
    let within = (bucket - (shift << BITS)) as u128;
    (((within + 1) << shift) - 1) as u64
}
