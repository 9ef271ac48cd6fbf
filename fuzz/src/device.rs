//! The device's side of a ring, and a driver that writes anything into it.
//!
//! No chain has a byte outside guest memory, nothing but what is the device's is written, and there are never more chains on
//! the way than the ring has entries.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::{pread, pwrite};
use vhost_user::memory::{Segment, Snapshot};
use vhost_user::protocol::Region;
use vhost_user::virtqueue::{
    Big, Chain, Little, PackedRing, Ring, RingAddresses, RingLimits, RingOptions, SplitRing, Used,
};

use super::support::{Input, feed, in_order_of, memory_file, number, two};

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

pub fn split(input: &[u8]) {
    feed(input, |input| play(false, input));
}

pub fn packed(input: &[u8]) {
    feed(input, |input| play(true, input));
}

fn play(packed: bool, input: &mut Input<'_>) -> arbitrary::Result<()> {
    let (mut world, base) = World::choose(packed, input)?;
    match world.options {
        RingOptions { packed: true, .. } => work::<PackedRing>(&mut world, base, input),
        RingOptions { big_endian: true, .. } => work::<SplitRing<Big>>(&mut world, base, input),
        _ => work::<SplitRing<Little>>(&mut world, base, input),
    }?;
    world.check();
    Ok(())
}

fn work<R: Ring>(world: &mut World, base: u32, input: &mut Input<'_>) -> arbitrary::Result<()> {
    let mut ring: R = world.start(base);
    let mut taken = Vec::new();
    while !input.is_empty() && world.act(&mut ring, &mut taken, input)? {}
    Ok(())
}

/// Guest memory with a ring, and what should be in it.
pub(super) struct World {
    pub(super) size: u16,
    pub(super) options: RingOptions,
    files: Vec<OwnedFd>,
    contents: Vec<Vec<u8>>,
    snapshot: Arc<Snapshot>,
    /// Where the regions are in this process.
    hosts: Vec<Range<usize>>,
    avail: u16,
}

impl World {
    /// A ring of any kind, and the base at which it starts.
    pub(super) fn choose(packed: bool, input: &mut Input<'_>) -> arbitrary::Result<(Self, u32)> {
        let size = if packed { input.int_in_range(1..=64)? } else { 1u16 << input.int_in_range(0..=6)? };
        let ((event_idx, big_endian), indirect) = (two(input)?, input.arbitrary()?);
        let in_order = input.ratio(1u8, 4u8)?;
        let options = RingOptions { packed, event_idx, indirect, in_order, big_endian: big_endian && !packed };
        let base = if packed { 0x8000_8000 } else { u32::from(number(input)? as u16) };
        let mut world = Self::new(size, options);
        world.avail = base as u16;
        world.write(0, AVAIL + 2, &world.in_order(world.avail.to_le_bytes()));
        world.write(0, USED + 2, &world.in_order((number(input)? as u16).to_le_bytes()));
        Ok((world, base))
    }

    fn new(size: u16, options: RingOptions) -> Self {
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
        let mut world = Self { size, options, files, contents, snapshot, hosts, avail: 0 };
        world.write(0, TABLE, &[0; (BUFFERS - TABLE) as usize]);
        world
    }

    /// The device starts.
    pub(super) fn start<R: Ring>(&self, base: u32) -> R {
        let start = REGIONS[0].user_address;
        let addresses = RingAddresses { descriptors: start + TABLE, avail: start + AVAIL, used: start + USED };
        let limits = RingLimits { max_indirect: 8, max_bytes: MAX_BYTES };
        R::new(addresses, self.size, base, self.options, limits, Arc::clone(&self.snapshot)).unwrap()
    }

    /// Either side does something. False once the ring is broken.
    pub(super) fn act(
        &mut self,
        ring: &mut impl Ring,
        taken: &mut Vec<Chain>,
        input: &mut Input<'_>,
    ) -> arbitrary::Result<bool> {
        let mut broken = false;
        match input.int_in_range(0..=9)? {
            0..=2 if self.options.packed => self.offer_packed(input)?,
            0..=2 => self.offer(input)?,
            3 => self.poke(input)?,
            4 | 5 => broken = !self.take(ring, taken),
            6 if !taken.is_empty() => {
                let chain = taken.swap_remove(input.choose_index(taken.len())?);
                ring.push_used(Used { head: chain.head(), written: input.arbitrary()? });
            }
            7 => {
                let _ = ring.publish();
            }
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
        // In order, a chain is on its way until those before it are done.
        assert!(if self.options.in_order {
            ring.in_flight() as usize >= taken.len()
        } else {
            ring.in_flight() as usize == taken.len()
        });
        assert!(ring.in_flight() <= self.size);
        Ok(!broken)
    }

    fn in_order<const N: usize>(&self, little: [u8; N]) -> [u8; N] {
        in_order_of(self.options, little)
    }

    fn descriptor(&self, address: u64, length: u32, flags: u16, next: u16) -> Vec<u8> {
        let (address, length) = (self.in_order(address.to_le_bytes()), self.in_order(length.to_le_bytes()));
        let (flags, next) = (self.in_order(flags.to_le_bytes()), self.in_order(next.to_le_bytes()));
        [&address[..], &length, &flags, &next].concat()
    }

    /// As the driver does, at an offset of a region.
    fn write(&mut self, region: usize, at: u64, bytes: &[u8]) {
        let at = REGIONS[region].file_offset + at;
        pwrite(&self.files[region], bytes, at).unwrap();
        self.contents[region][at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    /// A chain, which may be malformed, in descriptors of the ring or in a table.
    fn offer(&mut self, input: &mut Input<'_>) -> arbitrary::Result<()> {
        let size = self.size;
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
            self.write(0, place, &self.descriptor(address, length, flags, next));
        }
        if indirect {
            let length = if input.ratio(7u8, 8u8)? { 16 * u32::from(count) } else { number(input)? as u32 };
            let address = REGIONS[0].guest_address + table;
            let flags = if input.ratio(15u8, 16u8)? { 4 } else { 5 };
            self.write(0, TABLE + 16 * u64::from(head), &self.descriptor(address, length, flags, 0));
        }
        let named = if input.ratio(15u8, 16u8)? { head } else { input.arbitrary()? };
        self.write(0, AVAIL + 4 + 2 * u64::from(self.avail % size), &self.in_order(named.to_le_bytes()));
        self.avail = self.avail.wrapping_add(if input.ratio(15u8, 16u8)? { 1 } else { number(input)? as u16 });
        self.write(0, AVAIL + 2, &self.in_order(self.avail.to_le_bytes()));
        Ok(())
    }

    /// The same in a packed ring, at the next descriptors.
    fn offer_packed(&mut self, input: &mut Input<'_>) -> arbitrary::Result<()> {
        let size = self.size;
        let indirect = input.ratio(1u8, 4u8)?;
        let count: u16 = input.int_in_range(1..=5)?;
        let table = BUFFERS + 16 * input.int_in_range(0..=24u64)?;
        let id: u16 = if input.ratio(15u8, 16u8)? { input.int_in_range(0..=size - 1)? } else { input.arbitrary()? };
        for at in 0..count {
            let region = input.choose(&REGIONS)?;
            let near = region.guest_address + input.int_in_range(0..=region.size)?;
            let address = if input.ratio(15u8, 16u8)? { near } else { number(input)? };
            let length = if input.ratio(15u8, 16u8)? { input.int_in_range(0..=0x300)? } else { number(input)? as u32 };
            let more = if at + 1 == count { 0 } else { 1 };
            let usual = more | if input.arbitrary()? { 2 } else { 0 };
            let flags: u16 = if input.ratio(15u8, 16u8)? { usual } else { input.int_in_range(0..=7)? };
            if indirect {
                self.write(0, table + 16 * u64::from(at), &self.descriptor(address, length, 0, flags));
            } else {
                self.put_packed(address, length, id, flags);
            }
        }
        if indirect {
            let length = if input.ratio(7u8, 8u8)? { 16 * u32::from(count) } else { number(input)? as u32 };
            self.put_packed(REGIONS[0].guest_address + table, length, id, 4);
        }
        Ok(())
    }

    /// One descriptor, available.
    fn put_packed(&mut self, address: u64, length: u32, id: u16, flags: u16) {
        let size = self.size;
        let (slot, wrap) = (self.avail & 0x7fff, self.avail & 0x8000);
        let available = if wrap != 0 { 0x80 } else { 0x8000 };
        self.write(0, TABLE + 16 * u64::from(slot % size), &self.descriptor(address, length, id, flags | available));
        self.avail = if slot + 1 < size { (slot + 1) | wrap } else { wrap ^ 0x8000 };
    }

    fn poke(&mut self, input: &mut Input<'_>) -> arbitrary::Result<()> {
        // Not into the used ring: what the device has there is looked at in the end.
        let at = input.int_in_range(0..=USED - 8)?;
        let value = number(input)?;
        self.write(0, at, &value.to_le_bytes());
        if self.options.packed {
            return Ok(());
        }
        let at = (REGIONS[0].file_offset + AVAIL + 2) as usize;
        self.avail = u16::from_le_bytes(self.in_order([self.contents[0][at], self.contents[0][at + 1]]));
        Ok(())
    }

    /// Take what is available. False if the ring broke.
    fn take(&self, ring: &mut impl Ring, taken: &mut Vec<Chain>) -> bool {
        if ring.look().is_err() {
            return false;
        }
        loop {
            let mut chain = Chain::default();
            match ring.pop(&mut chain) {
                Ok(true) => {}
                Ok(false) => return true,
                Err(_) => return false,
            }
            self.check_chain(&chain, ring.size());
            taken.push(chain);
        }
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

    /// Nothing was written by the device but its parts of the ring, which are in the first region.
    pub(super) fn check(&self) {
        let size = u64::from(self.size);
        let (table, own) = if self.options.packed { (16 * size, 4) } else { (0, 6 + 8 * size) };
        let own = [TABLE..TABLE + table, USED..USED + own];
        for (region, (file, expected)) in self.files.iter().zip(&self.contents).enumerate() {
            let mut found = vec![0; expected.len()];
            assert_eq!(pread(file, &mut found, 0).unwrap(), expected.len());
            for part in own.iter().filter(|_| region == 0) {
                let part = (REGIONS[0].file_offset + part.start) as usize..(REGIONS[0].file_offset + part.end) as usize;
                found[part.clone()].copy_from_slice(&expected[part]);
            }
            assert!(found == *expected, "region {region}: something else was written");
        }
    }
}
