//! Devices that die and are started again, and an in-flight record that somebody writes to meanwhile.
//!
//! Whatever is in the record, a ring starts or says what is wrong with it; nothing is written beside the record of the
//! queue, nor to guest memory but the ring; and what is taken again is in guest memory.

use std::ops::Range;
use std::os::fd::OwnedFd;

use rustix::io::{pread, pwrite};
use vhost_user::protocol::Inflight;
use vhost_user::virtqueue::{Big, Format, InflightBuffer, Little, PackedRing, Ring, RingOptions, SplitRing};

use super::device::World;
use super::support::{Input, feed, memory_file, number};

/// The queue with the ring, between two others.
const QUEUE: u16 = 1;
const QUEUES: u16 = 3;
const FILE: u64 = 0x3000;

pub fn split(input: &[u8]) {
    feed(input, |input| play(false, input));
}

pub fn packed(input: &[u8]) {
    feed(input, |input| play(true, input));
}

fn play(packed: bool, input: &mut Input<'_>) -> arbitrary::Result<()> {
    let (mut world, base) = World::choose(packed, input)?;
    let mut record = Record::new(packed, world.size);
    match world.options {
        RingOptions { packed: true, .. } => live::<PackedRing>(&mut world, &mut record, base, input),
        RingOptions { big_endian: true, .. } => live::<SplitRing<Big>>(&mut world, &mut record, base, input),
        _ => live::<SplitRing<Little>>(&mut world, &mut record, base, input),
    }?;
    world.check();
    record.check();
    Ok(())
}

/// One device after another.
fn live<R: Ring>(world: &mut World, record: &mut Record, base: u32, input: &mut Input<'_>) -> arbitrary::Result<()> {
    while !input.is_empty() {
        for _ in 0..input.int_in_range(0..=3)? {
            record.poke(input)?;
        }
        let Some(buffer) = record.hand_over(input)? else { continue };
        let Some(slot) = buffer.slot(QUEUE) else { continue };
        let Ok(mut ring) = world.start::<R>(base).recover(&slot) else {
            if input.arbitrary()? {
                slot.clear();
            }
            continue;
        };
        assert!(ring.resubmitting() <= world.size);
        let mut taken = Vec::new();
        for _ in 0..input.int_in_range(0..=15)? {
            if !world.act(&mut ring, &mut taken, input)? {
                break;
            }
        }
    }
    Ok(())
}

/// The file of a front-end, and what should be in it.
struct Record {
    file: OwnedFd,
    format: Format,
    /// What a front-end says of it.
    good: Inflight,
    contents: Vec<u8>,
    /// Where the queue's record is or was.
    own: Vec<Range<u64>>,
}

impl Record {
    fn new(packed: bool, size: u16) -> Self {
        let format = if packed { Format::Packed } else { Format::Split };
        let length = u64::from(QUEUES) * format.stride(size);
        let good = Inflight { size: length, offset: 0x40, queues: QUEUES, queue_size: size, padding: 0 };
        Self { file: memory_file(FILE), format, good, contents: vec![0; FILE as usize], own: Vec::new() }
    }

    /// SET_INFLIGHT_FD. None if it is refused.
    fn hand_over(&mut self, input: &mut Input<'_>) -> arbitrary::Result<Option<InflightBuffer>> {
        let mut said = self.good;
        match input.int_in_range(0..=31)? {
            0 => said.size = number(input)?,
            1 => said.offset = number(input)?,
            2 => said.queues = number(input)? as u16,
            3 => said.queue_size = number(input)? as u16,
            _ => {}
        }
        let Ok(buffer) = InflightBuffer::map(&self.file, &said, self.format) else { return Ok(None) };
        let stride = self.format.stride(said.queue_size);
        let start = said.offset + u64::from(QUEUE) * stride;
        self.own.push(start..start + stride);
        Ok(Some(buffer))
    }

    /// A field of the record gets another value: for the most part of its head or one of its first entries, and one that
    /// is about right.
    fn poke(&mut self, input: &mut Input<'_>) -> arbitrary::Result<()> {
        let stride = self.format.stride(self.good.queue_size);
        let offset = match input.int_in_range(0..=7)? {
            // What is behind features, version and number of entries.
            0..=3 => 12 + 2 * input.int_in_range(0..=5)?,
            4..=6 => 2 * input.int_in_range(0..=stride.min(0x100) / 2 - 1)?,
            _ => input.int_in_range(0..=stride - 1)?,
        };
        let at = self.good.offset + u64::from(QUEUE) * stride + offset;
        let size = u64::from(self.good.queue_size);
        let value = match input.int_in_range(0..=3)? {
            0 => number(input)?,
            1 => input.int_in_range(0..=size + 1)?,
            // A little more or less than it is.
            _ => {
                let mut now = [0; 2];
                pread(&self.file, &mut now, at).unwrap();
                (u64::from(u16::from_ne_bytes(now)) + input.int_in_range(0..=2 * size)?).wrapping_sub(size)
            }
        };
        let bytes = &value.to_ne_bytes()[..*input.choose(&[1, 2, 2, 8])?];
        pwrite(&self.file, bytes, at).unwrap();
        self.contents[at as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    /// Nothing was written beside it.
    fn check(&self) {
        let mut found = vec![0; self.contents.len()];
        assert_eq!(pread(&self.file, &mut found, 0).unwrap(), found.len());
        for own in &self.own {
            let own = own.start as usize..own.end as usize;
            found[own.clone()].copy_from_slice(&self.contents[own]);
        }
        assert!(found == self.contents, "something was written beside the record");
    }
}
