//! The record of a split ring: a mark for each descriptor at which a chain in flight begins.

use std::collections::VecDeque;

use super::{Cells, ENTRIES, Format, IN_USE, InflightSlot, VERSION, flag, refuse};
use crate::error::RingError;

/// The head: after what all records have, the chain that was given back last, and how far the used ring had come when
/// the marks were right.
pub(super) const HEAD: usize = 16;
const LAST_BATCH_HEAD: usize = 12;
const USED_INDEX: usize = 14;

/// An entry, and the fields in it.
pub(super) const ENTRY: usize = 16;
const INFLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// The record of a running split ring.
#[derive(Debug)]
pub struct SplitRecord {
    cells: Cells,
    next_counter: u64,
    last_batch_head: u16,
    /// Chains given back that the driver does not see yet.
    batch: Vec<u16>,
}

impl SplitRecord {
    /// Open the record of a ring of `size` entries whose used index is `used`.
    ///
    /// Returns the chains that were in flight, in the order in which they were taken: whoever starts the ring has to
    /// work on them again. The available index to go on at is `used` and as many more.
    pub fn open(slot: &InflightSlot, size: u16, used: u16) -> Result<(Self, VecDeque<u16>), RingError> {
        let (cells, in_use) = slot.open(Format::Split, size)?;
        let mut record = Self { cells, next_counter: 0, last_batch_head: 0, batch: Vec::new() };
        if !in_use {
            record.begin(size, used);
            return Ok((record, VecDeque::new()));
        }
        let mut marked = Vec::new();
        for head in 0..size {
            if flag(&record.cells, entry(head) + INFLIGHT, head)? {
                marked.push((record.cells.u64(entry(head) + COUNTER), head));
            }
        }
        let last = record.cells.u16(LAST_BATCH_HEAD);
        if last >= size {
            return Err(refuse(format!("last_batch_head is {last}, the ring has {size} entries")));
        }
        record.last_batch_head = last;
        let recorded = record.cells.u16(USED_INDEX);
        let unsure = used.wrapping_sub(recorded);
        // Without a mark there is nothing to be unsure of: the driver may have begun anew since.
        if unsure != 0 && !marked.is_empty() {
            if unsure > size {
                return Err(refuse(format!(
                    "used_idx is {recorded}, the used ring is at {used}; a ring of {size} entries cannot be so far ahead"
                )));
            }
            for head in record.last_batch(unsure, size)? {
                record.cells.set_u8(entry(head) + INFLIGHT, 0);
                marked.retain(|(_, other)| *other != head);
            }
        }
        if unsure != 0 {
            record.cells.set_u16(USED_INDEX, used);
        }
        marked.sort_unstable();
        record.next_counter = marked.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok((record, marked.into_iter().map(|(_, head)| head).collect()))
    }

    /// Nothing is in flight. Whoever dies before the version is written begins anew.
    fn begin(&self, size: u16, used: u16) {
        for head in 0..size {
            self.cells.set_u8(entry(head) + INFLIGHT, 0);
        }
        self.cells.set_u16(LAST_BATCH_HEAD, 0);
        self.cells.set_u16(USED_INDEX, used);
        self.cells.set_u16(ENTRIES, size);
        self.cells.set_u16(VERSION, IN_USE);
    }

    /// The `count` chains that were given back last.
    fn last_batch(&self, count: u16, size: u16) -> Result<Vec<u16>, RingError> {
        let mut batch = Vec::with_capacity(count.into());
        let mut head = self.last_batch_head;
        for _ in 0..count {
            if head >= size {
                return Err(refuse(format!("a next in the last batch is {head}, the ring has {size} entries")));
            }
            batch.push(head);
            head = self.cells.u16(entry(head) + NEXT);
        }
        Ok(batch)
    }

    /// The chain at `head` is in flight: to be said before anybody works on it. `head` must be below the ring's size.
    pub fn taken(&mut self, head: u16) {
        self.cells.set_u64(entry(head) + COUNTER, self.next_counter);
        self.next_counter = self.next_counter.wrapping_add(1);
        self.cells.set_u8(entry(head) + INFLIGHT, 1);
    }

    /// The chain at `head` was given back to the available ring.
    pub fn put_back(&mut self, head: u16) {
        self.cells.set_u8(entry(head) + INFLIGHT, 0);
    }

    /// The chain at `head` will be in the used ring with the next batch.
    pub fn completed(&mut self, head: u16) {
        self.batch.push(head);
    }

    /// The batch is about to be published: until it is, its chains are still in flight.
    pub fn before_publish(&mut self) {
        for head in &self.batch {
            self.cells.set_u16(entry(*head) + NEXT, self.last_batch_head);
            self.last_batch_head = *head;
            self.cells.set_u16(LAST_BATCH_HEAD, *head);
        }
    }

    /// The batch was published, and the used index is `used`.
    pub fn after_publish(&mut self, used: u16) {
        for head in self.batch.drain(..) {
            self.cells.set_u8(entry(head) + INFLIGHT, 0);
        }
        self.cells.set_u16(USED_INDEX, used);
    }
}

fn entry(head: u16) -> usize {
    HEAD + ENTRY * usize::from(head)
}
