//! The device's side of a split ring, and a driver that writes anything into it.
//!
//! No chain has a byte outside guest memory, nothing but the used ring is written, and there are never more chains on
//! the way than the ring has entries.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::{pread, pwrite};
use vhost_user::memory::{Segment, Snapshot};
use vhost_user::protocol::Region;
use vhost_user::virtqueue::{Chain, Ring, RingAddresses, RingLimits, RingOptions, SplitRing, Used};

use super::support::{Input, level, memory_file, number};

/// Three regions: the first two are neighbours for the guest, and none begins or ends where a page does.
const REGIONS: [Region; 3] = [
    Region { guest_address: 0x1_0000, size: 0x1790, user_address: 0x7000_0000, file_offset: 0x410 },
    Region { guest_address: 0x1_1790, size: 0x0870, user_address: 0x7100_0000, file_offset: 0x20 },
    Region { guest_address: 0x8_0000, size: 0x0ff0, user_address: 0x7200_0000, file_offset: 0x1008 },
];
const FILE: u64 = 0x3000;

/// Where the parts of the ring are in the first region.
const TABLE: u64 = 0;
const AVAIL: u64 = 0x800;
const USED: u64 = 0xa00;
const BUFFERS: u64 = 0x1000;

const MAX_BYTES: u32 = 0x1000;

pub fn run(input: &[u8]) {
    level(|| {
        // An input ends where its bytes do, in the middle of whatever.
        let _ = play(&mut Input::new(input));
    });
}

/// Guest memory, and what should be in it.
struct World {
    files: Vec<OwnedFd>,
    contents: Vec<Vec<u8>>,
    snapshot: Arc<Snapshot>,
    /// Where the regions are in this process.
    hosts: Vec<Range<usize>>,
    avail: u16,
}

fn play(input: &mut Input<'_>) -> arbitrary::Result<()> {
    let mut world = World::new();
    let size = 1u16 << input.int_in_range(0..=6)?;
    let options = RingOptions { event_idx: input.arbitrary()?, indirect: input.arbitrary()?, ..RingOptions::default() };
    let base = number(input)? as u16;
    world.avail = base;
    world.write(0, AVAIL + 2, &base.to_le_bytes());
    world.write(0, USED + 2, &(number(input)? as u16).to_le_bytes());
    let start = REGIONS[0].user_address;
    let addresses = RingAddresses { descriptors: start + TABLE, avail: start + AVAIL, used: start + USED };
    let limits = RingLimits { max_indirect: 8, max_bytes: MAX_BYTES };
    let snapshot = Arc::clone(&world.snapshot);
    let mut ring = SplitRing::new(addresses, size, base.into(), options, limits, snapshot).unwrap();
    let mut taken: Vec<Chain> = Vec::new();
    let mut broken = false;
    while !input.is_empty() && !broken {
        match input.int_in_range(0..=9)? {
            0..=2 => world.offer(size, input)?,
            3 => world.poke(input)?,
            4 | 5 => broken = !world.take(&mut ring, &mut taken),
            6 if !taken.is_empty() => {
                let chain = taken.swap_remove(input.choose_index(taken.len())?);
                ring.push_used(Used { head: chain.head(), written: input.arbitrary()? });
            }
            7 => drop(ring.publish()),
            8 => {
                ring.disable_kicks();
                broken = ring.enable_kicks().is_err();
            }
            9 => {
                if let Some(chain) = taken.pop()
                    && !ring.unpop(chain.head())
                {
                    taken.push(chain);
                }
            }
            _ => {}
        }
        assert_eq!(usize::from(ring.in_flight()), taken.len());
        assert!(taken.len() <= usize::from(size));
    }
    world.check(USED..USED + 6 + 8 * u64::from(size));
    Ok(())
}

impl World {
    fn new() -> Self {
        let files: Vec<_> = REGIONS.iter().map(|_| memory_file(FILE)).collect();
        // Not zero, so that what is overwritten shows.
        let contents = vec![vec![0xa5; FILE as usize]; REGIONS.len()];
        for (file, bytes) in files.iter().zip(&contents) {
            assert_eq!(pwrite(file, bytes, 0).unwrap(), bytes.len());
        }
        let snapshot = Arc::new(Snapshot::from_table(&REGIONS, &files).unwrap());
        let host = |region: &Region| {
            let start = snapshot.user_pointer(region.user_address, region.size).unwrap().addr().get();
            start..start + region.size as usize
        };
        let hosts = REGIONS.iter().map(host).collect();
        let mut world = Self { files, contents, snapshot, hosts, avail: 0 };
        world.write(0, TABLE, &[0; (BUFFERS - TABLE) as usize]);
        world
    }

    /// As the driver does, at an offset of a region.
    fn write(&mut self, region: usize, at: u64, bytes: &[u8]) {
        let at = REGIONS[region].file_offset + at;
        pwrite(&self.files[region], bytes, at).unwrap();
        self.contents[region][at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    /// A chain, which may be malformed, in descriptors of the ring or in a table.
    fn offer(&mut self, size: u16, input: &mut Input<'_>) -> arbitrary::Result<()> {
        let head = input.int_in_range(0..=size - 1)?;
        let indirect = input.ratio(1u8, 4u8)?;
        let count: u16 = input.int_in_range(1..=if indirect { 9 } else { 5 })?;
        let table = BUFFERS + 16 * input.int_in_range(0..=24u64)?;
        for at in 0..count {
            let address = if input.ratio(15u8, 16u8)? {
                let region = input.choose(&REGIONS)?;
                region.guest_address + input.int_in_range(0..=region.size)?
            } else {
                number(input)?
            };
            let length = if input.ratio(15u8, 16u8)? { input.int_in_range(0..=0x300)? } else { number(input)? as u32 };
            let usual = if at + 1 == count { 0 } else { 1 } | if input.arbitrary()? { 2 } else { 0 };
            let flags = if input.ratio(15u8, 16u8)? { usual } else { input.int_in_range(0..=7)? };
            let (index, next) = if indirect { (at, at + 1) } else { ((head + at) % size, (head + at + 1) % size) };
            let next = if input.ratio(15u8, 16u8)? { next } else { input.arbitrary()? };
            let place = if indirect { table } else { TABLE } + 16 * u64::from(index);
            self.write(0, place, &descriptor(address, length, flags, next));
        }
        if indirect {
            let length = if input.ratio(7u8, 8u8)? { 16 * u32::from(count) } else { number(input)? as u32 };
            let address = REGIONS[0].guest_address + table;
            let flags = if input.ratio(15u8, 16u8)? { 4 } else { 5 };
            self.write(0, TABLE + 16 * u64::from(head), &descriptor(address, length, flags, 0));
        }
        let named = if input.ratio(15u8, 16u8)? { head } else { input.arbitrary()? };
        self.write(0, AVAIL + 4 + 2 * u64::from(self.avail % size), &named.to_le_bytes());
        self.avail = self.avail.wrapping_add(if input.ratio(15u8, 16u8)? { 1 } else { number(input)? as u16 });
        self.write(0, AVAIL + 2, &self.avail.to_le_bytes());
        Ok(())
    }

    fn poke(&mut self, input: &mut Input<'_>) -> arbitrary::Result<()> {
        // Not into the used ring: what the device has there is looked at in the end.
        let at = input.int_in_range(0..=USED - 8)?;
        let value = number(input)?;
        self.write(0, at, &value.to_le_bytes());
        self.avail = u16::from_le_bytes(std::array::from_fn(|byte| {
            self.contents[0][(REGIONS[0].file_offset + AVAIL + 2) as usize + byte]
        }));
        Ok(())
    }

    /// Take what is available. False if the ring broke.
    fn take(&self, ring: &mut SplitRing, taken: &mut Vec<Chain>) -> bool {
        let Ok(available) = ring.available() else { return false };
        for _ in 0..available {
            let mut chain = Chain::default();
            match ring.pop(&mut chain) {
                Ok(found) => assert!(found, "{available} were available"),
                Err(_) => return false,
            }
            self.check_chain(&chain, ring.size());
            taken.push(chain);
        }
        assert!(!ring.pop(&mut Chain::default()).unwrap());
        true
    }

    fn check_chain(&self, chain: &Chain, size: u16) {
        assert!(chain.head() < size);
        let is_inside = |segment: &Segment| {
            let start = segment.pointer.addr().get();
            self.hosts.iter().any(|host| host.start <= start && start + segment.length <= host.end)
        };
        assert!(chain.readable_segments().iter().chain(chain.writable_segments()).all(is_inside));
        let bytes = |segments: &[Segment]| segments.iter().map(|segment| segment.length as u64).sum::<u64>();
        assert_eq!(bytes(chain.readable_segments()), chain.readable());
        assert_eq!(bytes(chain.writable_segments()), chain.writable());
        assert!(chain.readable() + chain.writable() <= u64::from(MAX_BYTES));
        let mut copy = vec![0; chain.readable() as usize + 1];
        // SAFETY: the ring holds the snapshot.
        let read = unsafe { chain.read(0, &mut copy) };
        assert_eq!(read as u64, chain.readable());
    }

    /// Nothing was written by the device but what is `used` of the first region.
    fn check(&self, used: Range<u64>) {
        for (at, (file, expected)) in self.files.iter().zip(&self.contents).enumerate() {
            let mut found = vec![0; expected.len()];
            assert_eq!(pread(file, &mut found, 0).unwrap(), expected.len());
            let skipped = if at == 0 {
                (REGIONS[0].file_offset + used.start) as usize..(REGIONS[0].file_offset + used.end) as usize
            } else {
                0..0
            };
            assert!(found[..skipped.start] == expected[..skipped.start], "region {at}: written before the used ring");
            assert!(found[skipped.end..] == expected[skipped.end..], "region {at}: written after the used ring");
        }
    }
}

fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> Vec<u8> {
    [&address.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
}
