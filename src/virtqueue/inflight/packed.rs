//! The record of a packed ring: copies of the descriptors in flight, because a ring's slot may be written over before
//! its request is done.
//!
//! Free entries are a list. What changes while requests are taken or given back is kept twice, and what is "old" counts
//! until the change is complete.

use super::super::packed::Position;
use super::{Cells, ENTRIES, Format, IN_USE, InflightSlot, VERSION, flag, refuse};
use crate::error::RingError;

/// The head: after what all records have, the list of free entries and the place of the next used descriptor, each as
/// it is and as it was.
pub(super) const HEAD: usize = 32;
const FREE_HEAD: usize = 12;
const OLD_FREE_HEAD: usize = 14;
/// Used index, old used index, used wrap counter and old used wrap counter. They are stored at once: there is no moment
/// at which an index goes with the other wrap counter.
const USED: usize = 16;

/// An entry, and the fields in it. The first of a chain says whether it is in flight, when it was taken, which entry
/// is the chain's last, and how many there are.
pub(super) const ENTRY: usize = 32;
const INFLIGHT: usize = 0;
const NEXT: usize = 2;
const LAST: usize = 4;
const NUMBER: usize = 6;
const COUNTER: usize = 8;
const ID: usize = 16;
/// Flags, and the length in the upper half of the word that begins with the id.
const ADDRESS: usize = 24;

/// A descriptor as it was in the ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    pub address: u64,
    pub length: u32,
    pub id: u16,
    pub flags: u16,
}

/// What a record says when its ring starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// Where the next used descriptor goes, and where the next available one is.
    pub used: Position,
    pub avail: Position,
    /// The first entry of each chain that is in flight, in the order in which they were taken.
    pub resubmit: Vec<u16>,
}

/// The record of a running packed ring.
#[derive(Debug)]
pub struct PackedRecord {
    cells: Cells,
    size: u16,
    next_counter: u64,
    used: Position,
    /// The lists as they should be, whatever a peer writes: of free entries, and of the entries of each chain.
    next: Box<[u16]>,
    free_head: u16,
    free: u16,
    /// Of the first entry of a chain: how many it has, and the last of them.
    chains: Box<[(u16, u16)]>,
    /// Chains given back that the driver does not see yet.
    batch: Vec<u16>,
}

impl PackedRecord {
    /// Open the record of a ring of `size` entries. `used` is where its next used descriptor goes if nobody has used
    /// the record yet; otherwise the record knows better.
    ///
    /// `is_available` tells whether the descriptor in a slot is one that the driver made available in the lap that the
    /// wrap counter names: then it was not given back.
    pub fn open(
        slot: &InflightSlot,
        size: u16,
        used: Position,
        is_available: impl FnOnce(Position) -> bool,
    ) -> Result<(Self, Recovered), RingError> {
        let (cells, in_use) = slot.open(Format::Packed, size)?;
        let mut record = Self {
            cells,
            size,
            next_counter: 0,
            used,
            next: (1..=size).collect(),
            free_head: 0,
            free: size,
            chains: vec![(0, 0); size.into()].into_boxed_slice(),
            batch: Vec::new(),
        };
        if !in_use {
            record.begin();
            return Ok((record, Recovered { used, avail: used, resubmit: Vec::new() }));
        }
        record.settle(is_available)?;
        let mut seen = record.read_free_list()?;
        let is_free = seen.clone();
        let mut resubmit = Vec::new();
        let mut taken = 0;
        for first in 0..size {
            let marked = flag(&record.cells, entry(first) + INFLIGHT, first)?;
            if marked && is_free[usize::from(first)] {
                record.cells.set_u8(entry(first) + INFLIGHT, 0);
            } else if marked {
                taken += record.read_chain(first, &mut seen)?;
                resubmit.push((record.cells.u64(entry(first) + COUNTER), first));
            }
        }
        if taken + u32::from(record.free) != u32::from(size) {
            let free = record.free;
            return Err(refuse(format!(
                "{taken} entries are in flight and {free} are free; together they must be {size}"
            )));
        }
        resubmit.sort_unstable();
        record.next_counter = resubmit.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        let used = record.used;
        let avail = used.plus(taken as u16, size);
        let resubmit = resubmit.into_iter().map(|(_, first)| first).collect();
        Ok((record, Recovered { used, avail, resubmit }))
    }

    /// Nothing is in flight. Whoever dies before the version is written begins anew.
    fn begin(&self) {
        for (at, next) in (0u16..).zip(&self.next) {
            self.cells.set_u8(entry(at) + INFLIGHT, 0);
            self.cells.set_u16(entry(at) + NEXT, *next);
        }
        self.cells.set_u16(FREE_HEAD, 0);
        self.cells.set_u16(OLD_FREE_HEAD, 0);
        self.store_used(self.used, self.used);
        self.cells.set_u16(ENTRIES, self.size);
        self.cells.set_u16(VERSION, IN_USE);
    }

    /// Complete the change that was under way if the driver could see it, and undo it otherwise.
    fn settle(&mut self, is_available: impl FnOnce(Position) -> bool) -> Result<(), RingError> {
        let free_head = self.list_index("free_head", FREE_HEAD)?;
        let old_free_head = self.list_index("old_free_head", OLD_FREE_HEAD)?;
        let word = self.cells.u64(USED).to_ne_bytes();
        let index = |at: usize| u16::from_ne_bytes([word[at], word[at + 1]]);
        let used = self.position("used", index(0), word[4])?;
        let old_used = self.position("old_used", index(2), word[5])?;
        if used != old_used && !is_available(old_used) {
            self.used = used;
            self.free_head = free_head;
            self.cells.set_u16(OLD_FREE_HEAD, free_head);
        } else {
            self.used = old_used;
            self.free_head = old_free_head;
            self.cells.set_u16(FREE_HEAD, old_free_head);
        }
        self.store_used(self.used, self.used);
        Ok(())
    }

    /// The place of an entry, or the number of entries for the end of the list.
    fn list_index(&self, name: &str, at: usize) -> Result<u16, RingError> {
        let index = self.cells.u16(at);
        if index <= self.size { Ok(index) } else { Err(refuse(self.too_high(name, index))) }
    }

    fn position(&self, name: &str, slot: u16, wrap: u8) -> Result<Position, RingError> {
        match wrap {
            _ if slot >= self.size => Err(refuse(self.too_high(&format!("{name}_idx"), slot))),
            0 | 1 => Ok(Position { slot, wrap: wrap == 1 }),
            other => Err(refuse(format!("{name}_wrap_counter is {other}; it must be 0 or 1"))),
        }
    }

    fn too_high(&self, name: &str, index: u16) -> String {
        format!("{name} is {index}, the ring has {} entries", self.size)
    }

    /// Which entries are free.
    fn read_free_list(&mut self) -> Result<Vec<bool>, RingError> {
        let mut is_free = vec![false; self.size.into()];
        self.free = 0;
        let mut at = self.free_head;
        while at != self.size {
            if std::mem::replace(&mut is_free[usize::from(at)], true) {
                return Err(refuse(format!("entry {at}: the list of free entries comes here twice")));
            }
            self.free += 1;
            self.next[usize::from(at)] = self.list_index(&format!("entry {at}: next"), entry(at) + NEXT)?;
            at = self.next[usize::from(at)];
        }
        Ok(is_free)
    }

    /// Take over the list of a chain's entries, none of which may have been seen. Returns how many there are.
    fn read_chain(&mut self, first: u16, seen: &mut [bool]) -> Result<u32, RingError> {
        let number = self.cells.u16(entry(first) + NUMBER);
        if number == 0 || number > self.size {
            return Err(refuse(format!("entry {first}: num is {number}, the ring has {} entries", self.size)));
        }
        let mut at = first;
        for left in (0..number).rev() {
            if seen.get_mut(usize::from(at)).is_none_or(|seen| std::mem::replace(seen, true)) {
                return Err(refuse(format!(
                    "entry {at}: it is free, or in two chains, one of them that of entry {first}"
                )));
            }
            if left > 0 {
                self.next[usize::from(at)] = self.list_index(&format!("entry {at}: next"), entry(at) + NEXT)?;
                at = self.next[usize::from(at)];
            }
        }
        let last = self.cells.u16(entry(first) + LAST);
        if last != at {
            return Err(refuse(format!("entry {first}: last is {last}; following next leads to {at}")));
        }
        self.chains[usize::from(first)] = (number, last);
        Ok(number.into())
    }

    /// A chain of these descriptors is in flight: to be said before anybody works on it. Returns its first entry, by
    /// which the record knows it.
    ///
    /// Fails if there are more descriptors than entries are free, which a driver that keeps to its ring cannot bring
    /// about.
    pub fn taken(&mut self, descriptors: &[Copied]) -> Result<u16, RingError> {
        let first = self.free_head;
        if descriptors.is_empty() || descriptors.len() > usize::from(self.free) {
            return Err(refuse(format!("{} descriptors to add, {} entries are free", descriptors.len(), self.free)));
        }
        let cells = &self.cells;
        cells.set_u16(entry(first) + NUMBER, 0);
        cells.set_u64(entry(first) + COUNTER, self.next_counter);
        cells.set_u8(entry(first) + INFLIGHT, 1);
        self.next_counter = self.next_counter.wrapping_add(1);
        let mut last = first;
        for (number, descriptor) in (1u16..).zip(descriptors) {
            last = self.free_head;
            let [id, flags] = [descriptor.id, descriptor.flags].map(u16::to_ne_bytes);
            let length = descriptor.length.to_ne_bytes();
            let word = [id[0], id[1], flags[0], flags[1], length[0], length[1], length[2], length[3]];
            cells.set_u64(entry(last) + ID, u64::from_ne_bytes(word));
            cells.set_u64(entry(last) + ADDRESS, descriptor.address);
            cells.set_u16(entry(first) + NUMBER, number);
            self.free_head = self.next[usize::from(last)];
            cells.set_u16(FREE_HEAD, self.free_head);
        }
        cells.set_u16(entry(first) + LAST, last);
        // From here on the entries are not free any more, and the chain is in flight.
        cells.set_u16(OLD_FREE_HEAD, self.free_head);
        let number = descriptors.len() as u16;
        self.free -= number;
        self.chains[usize::from(first)] = (number, last);
        Ok(first)
    }

    /// The descriptors of a chain in flight. They are not trusted any more than those in the ring.
    pub fn descriptors(&self, first: u16) -> impl Iterator<Item = Copied> {
        let (number, _) = self.chains.get(usize::from(first)).copied().unwrap_or_default();
        let mut at = first;
        (0..number).map(move |_| {
            let word = self.cells.u64(entry(at) + ID).to_ne_bytes();
            let copied = Copied {
                address: self.cells.u64(entry(at) + ADDRESS),
                length: u32::from_ne_bytes([word[4], word[5], word[6], word[7]]),
                id: u16::from_ne_bytes([word[0], word[1]]),
                flags: u16::from_ne_bytes([word[2], word[3]]),
            };
            at = self.next[usize::from(at)];
            copied
        })
    }

    /// The chain was given back to the driver's ring, as if it had not been taken. It is the one that was taken last.
    pub fn put_back(&mut self, first: u16) {
        self.release(first);
        self.cells.set_u16(OLD_FREE_HEAD, self.free_head);
        self.cells.set_u8(entry(first) + INFLIGHT, 0);
    }

    /// The chain will be among the used descriptors with the next batch.
    pub fn completed(&mut self, first: u16) {
        self.batch.push(first);
    }

    /// The batch is about to be published, by one store: until then its chains are still in flight. `used` is where
    /// the next used descriptor goes after it.
    pub fn before_publish(&mut self, used: Position) {
        for at in 0..self.batch.len() {
            self.release(self.batch[at]);
        }
        self.store_used(used, self.used);
        self.used = used;
    }

    /// The batch was published.
    pub fn after_publish(&mut self) {
        for first in self.batch.drain(..) {
            self.cells.set_u8(entry(first) + INFLIGHT, 0);
        }
        self.cells.set_u16(OLD_FREE_HEAD, self.free_head);
        self.store_used(self.used, self.used);
    }

    /// Put the entries of a chain in front of the free ones.
    fn release(&mut self, first: u16) {
        let (number, last) = std::mem::take(&mut self.chains[usize::from(first)]);
        debug_assert!(number > 0, "entry {first} is not in flight");
        if number == 0 {
            return;
        }
        self.next[usize::from(last)] = self.free_head;
        self.cells.set_u16(entry(last) + NEXT, self.free_head);
        self.free_head = first;
        self.cells.set_u16(FREE_HEAD, first);
        self.free += number;
    }

    fn store_used(&self, used: Position, old: Position) {
        let ([used_low, used_high], [old_low, old_high]) = (used.slot.to_ne_bytes(), old.slot.to_ne_bytes());
        let word = [used_low, used_high, old_low, old_high, used.wrap.into(), old.wrap.into(), 0, 0];
        self.cells.set_u64(USED, u64::from_ne_bytes(word));
    }
}

fn entry(at: u16) -> usize {
    HEAD + ENTRY * usize::from(at)
}
