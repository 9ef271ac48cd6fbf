//! The driver's side of a ring, and a device that writes anything into it.
//!
//! What comes back was given away, comes back once, and is not longer than there was room; no descriptor is lost.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::{pread, pwrite};
use vhost_user::memory::Snapshot;
use vhost_user::protocol::Region;
use vhost_user::virtqueue::{
    Big, Driver, Element, Indirect, Little, PackedDriver, RingAddresses, RingOptions, SplitDriver, Used,
};

use super::support::{Input, feed, in_order_of, memory_file, number, two};

const REGION: Region = Region { guest_address: 0x1_0000, size: 0x2ff0, user_address: 0x7000_0000, file_offset: 0x10 };
const FILE: u64 = 0x4000;

const TABLE: u64 = 0;
const AVAIL: u64 = 0x400;
const USED: u64 = 0x500;
const END: u64 = 0x800;
/// Where indirect tables are put, one for each descriptor that they begin with.
const TABLES: u64 = 0x1000;
const TABLE_ROOM: u64 = 0x80;

/// A chain that the device has.
struct Given {
    descriptors: u16,
    writable: u64,
}

pub fn split(input: &[u8]) {
    feed(input, |input| play(false, input));
}

pub fn packed(input: &[u8]) {
    feed(input, |input| play(true, input));
}

fn play(packed: bool, input: &mut Input<'_>) -> arbitrary::Result<()> {
    let size = if packed { input.int_in_range(1..=32)? } else { 1u16 << input.int_in_range(0..=5)? };
    let ((event_idx, big_endian), in_order) = (two(input)?, input.ratio(1u8, 4u8)?);
    let options = RingOptions { packed, event_idx, indirect: true, in_order, big_endian: big_endian && !packed };
    match options {
        RingOptions { packed: true, .. } => work::<PackedDriver>(size, options, input),
        RingOptions { big_endian: true, .. } => work::<SplitDriver<Big>>(size, options, input),
        _ => work::<SplitDriver<Little>>(size, options, input),
    }
}

fn work<D: Driver>(size: u16, options: RingOptions, input: &mut Input<'_>) -> arbitrary::Result<()> {
    let file = memory_file(FILE);
    let marked = vec![0xa5; FILE as usize];
    pwrite(&file, &marked, 0).unwrap();
    let snapshot = Arc::new(Snapshot::from_table(&[REGION], std::slice::from_ref(&file)).unwrap());
    let base = if options.packed { 0x8000_8000 } else { u32::from(number(input)? as u16) };
    let start = REGION.user_address;
    let addresses = RingAddresses { descriptors: start + TABLE, avail: start + AVAIL, used: start + USED };
    let mut driver = D::new(addresses, size, base, options, snapshot).unwrap();
    let mut device = Device { file, size, options, used: base as u16 };
    let mut given = BTreeMap::new();
    let mut hidden = Vec::new();
    while !input.is_empty() {
        match input.int_in_range(0..=8)? {
            0..=2 => add(&mut driver, &mut given, &mut hidden, input)?,
            3 => {
                let _ = driver.publish();
                hidden.clear();
            }
            4..=6 => device.give_back(&given, input)?,
            7 => device.write(input.int_in_range(0..=END - 8)?, &number(input)?.to_le_bytes()),
            _ => {
                driver.disable_calls();
                let _ = driver.enable_calls(input.arbitrary()?);
            }
        }
        if !take(&mut driver, &mut given, &hidden) {
            break;
        }
        let away: u16 = given.values().map(|chain: &Given| chain.descriptors).sum();
        assert_eq!(driver.free() + away, size);
        assert!(driver.outstanding() <= size);
    }
    let mut found = vec![0; FILE as usize];
    pread(&device.file, &mut found, 0).unwrap();
    let (end, tables) = ((REGION.file_offset + END) as usize, (REGION.file_offset + TABLES) as usize);
    let behind = tables + TABLE_ROOM as usize * usize::from(size);
    assert!(found[end..tables] == marked[end..tables], "written behind the ring");
    assert!(found[behind..] == marked[behind..], "written behind the tables");
    assert!(found[..REGION.file_offset as usize] == marked[..REGION.file_offset as usize], "written before the region");
    Ok(())
}

/// What has the other end of the ring.
struct Device {
    file: OwnedFd,
    size: u16,
    options: RingOptions,
    /// The used index, or the slot and the wrap counter of a packed ring.
    used: u16,
}

impl Device {
    /// Give a chain back that it has, for the most part.
    fn give_back(&mut self, given: &BTreeMap<u16, Given>, input: &mut Input<'_>) -> arbitrary::Result<()> {
        let known: Vec<u16> = given.keys().copied().collect();
        let id: u32 = match input.int_in_range(0..=7)? {
            0 => input.arbitrary()?,
            1 => input.int_in_range(0..=u32::from(self.size))?,
            _ if known.is_empty() => 0,
            _ => u32::from(*input.choose(&known)?),
        };
        let length = if input.ratio(7u8, 8u8)? { input.int_in_range(0..=40)? } else { input.arbitrary::<u32>()? };
        let strange = input.ratio(1u8, 16u8)?;
        if self.options.packed {
            let (slot, wrap) = (self.used & 0x7fff, self.used & 0x8000);
            let flags: u16 = if strange {
                input.arbitrary()?
            } else if wrap != 0 {
                0x8080
            } else {
                0
            };
            let words = [length.to_le_bytes(), (id & 0xffff | u32::from(flags) << 16).to_le_bytes()].concat();
            self.write(16 * u64::from(slot % self.size) + 8, &words);
            let count = given.get(&(id as u16)).map_or(1, |chain| chain.descriptors);
            let next = slot + count;
            self.used = if next < self.size { next | wrap } else { ((next - self.size) % self.size) | (wrap ^ 0x8000) };
        } else {
            let slot = u64::from(self.used % self.size);
            self.write(
                USED + 4 + 8 * slot,
                &[self.in_order(id.to_le_bytes()), self.in_order(length.to_le_bytes())].concat(),
            );
            self.used = self.used.wrapping_add(if strange { input.arbitrary()? } else { 1 });
            self.write(USED + 2, &self.in_order(self.used.to_le_bytes()));
        }
        Ok(())
    }

    fn in_order<const N: usize>(&self, little: [u8; N]) -> [u8; N] {
        in_order_of(self.options, little)
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        pwrite(&self.file, bytes, REGION.file_offset + at).unwrap();
    }
}

fn add(
    driver: &mut impl Driver,
    given: &mut BTreeMap<u16, Given>,
    hidden: &mut Vec<u16>,
    input: &mut Input<'_>,
) -> arbitrary::Result<()> {
    let elements = (0..input.int_in_range(1..=6)?)
        .map(|_| {
            let length = if input.ratio(15u8, 16u8)? { input.int_in_range(0..=64)? } else { input.arbitrary()? };
            Ok(Element { address: input.arbitrary()?, length, writable: input.arbitrary()? })
        })
        .collect::<arbitrary::Result<Vec<_>>>()?;
    let free_before = driver.free();
    let indirect = if input.arbitrary()? {
        let slot = input.int_in_range(0..=u64::from(driver.size()) - 1)?;
        let direct = input.int_in_range(0..=elements.len() - 1)?;
        Some(Indirect { table: REGION.guest_address + TABLES + TABLE_ROOM * slot, direct })
    } else {
        None
    };
    let needed = indirect.map_or(elements.len(), |indirect| indirect.direct + 1);
    match driver.add(&elements, indirect) {
        Ok(head) => {
            assert_eq!(driver.free(), free_before - needed as u16);
            let writable = elements.iter().filter(|element| element.writable);
            let writable = writable.map(|element| u64::from(element.length)).sum();
            let before = given.insert(head, Given { descriptors: needed as u16, writable });
            assert!(before.is_none(), "descriptor {head} was given away");
            hidden.push(head);
        }
        Err(_) => assert!(needed > usize::from(free_before)),
    }
    Ok(())
}

/// Take everything that came back. False if the device cannot be believed any more.
fn take(driver: &mut impl Driver, given: &mut BTreeMap<u16, Given>, hidden: &[u16]) -> bool {
    loop {
        match driver.pop() {
            Ok(None) => return true,
            Err(_) => return false,
            Ok(Some(Used { head, written })) => {
                assert!(!hidden.contains(&head), "descriptor {head} was not shown to the device");
                let chain = given.remove(&head).expect("a chain that the device did not have");
                assert!(u64::from(written) <= chain.writable);
            }
        }
    }
}
