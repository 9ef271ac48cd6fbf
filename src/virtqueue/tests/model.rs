//! Publishing and going to sleep, in every order that the memory model allows: loom tries them all.
//!
//! The rings themselves lie in memory that is shared with others, where no checker can follow. What is checked here is
//! what both sides do there: the stores, loads and fences of `split.rs`, `packed.rs` and their drivers, with the same
//! arithmetic. It is the same both ways: who publishes is a driver that may kick or a device that may call, and who
//! sleeps is the other one.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};
use loom::thread;

use crate::virtqueue::packed::{Position, wants_event};
use crate::virtqueue::ring::needs_event;

const ENTRIES: usize = 2;
const AT_DESCRIPTOR: u32 = 2 << 16;

#[derive(Clone, Copy, Debug)]
enum Format {
    SplitFlag,
    SplitEventIndex,
    PackedFlag,
    PackedEvent,
}

struct Memory {
    entries: [UnsafeCell<usize>; ENTRIES],
    /// Of a split ring.
    index: AtomicU16,
    /// Of a packed one.
    flags: [AtomicU16; ENTRIES],
    /// What the one who sleeps wants: a flag, an event index, or an event suppression structure.
    events: AtomicU32,
}

impl Format {
    fn is_packed(self) -> bool {
        matches!(self, Self::PackedFlag | Self::PackedEvent)
    }

    /// Where a packed ring of as many descriptors is.
    fn position(entry: usize) -> Position {
        Position::from_bits(0x8000).plus(entry as u16, ENTRIES as u16)
    }

    fn memory(self) -> Memory {
        let asleep_before = match self {
            Self::SplitFlag => 1,
            Self::SplitEventIndex => u32::from(u16::MAX),
            Self::PackedFlag => 1 << 16,
            // The last descriptor of the round before.
            Self::PackedEvent => (ENTRIES as u32 - 1) | AT_DESCRIPTOR,
        };
        Memory {
            entries: [UnsafeCell::new(0), UnsafeCell::new(0)],
            index: AtomicU16::new(0),
            flags: [AtomicU16::new(0), AtomicU16::new(0)],
            events: AtomicU32::new(asleep_before),
        }
    }

    fn show(self, memory: &Memory, entry: usize) {
        if self.is_packed() {
            memory.flags[entry].store(Self::position(entry).available(), Ordering::Release);
        } else {
            memory.index.store(entry as u16 + 1, Ordering::Release);
        }
    }

    fn is_visible(self, memory: &Memory, entry: usize) -> bool {
        if self.is_packed() {
            memory.flags[entry].load(Ordering::Acquire) == Self::position(entry).available()
        } else {
            memory.index.load(Ordering::Acquire) != entry as u16
        }
    }

    /// Ask to be woken for `entry`, the next.
    fn ask(self, memory: &Memory, entry: usize) {
        let wish = match self {
            Self::SplitFlag | Self::PackedFlag => 0,
            Self::SplitEventIndex => entry as u32,
            Self::PackedEvent => u32::from(Self::position(entry).bits()) | AT_DESCRIPTOR,
        };
        memory.events.store(wish, Ordering::Relaxed);
    }

    fn stay_awake(self, memory: &Memory) {
        match self {
            Self::SplitFlag => memory.events.store(1, Ordering::Relaxed),
            Self::PackedFlag => memory.events.store(1 << 16, Ordering::Relaxed),
            Self::SplitEventIndex | Self::PackedEvent => {}
        }
    }

    /// Whether the other one wants to be woken, after `entry` was shown.
    fn wants(self, memory: &Memory, entry: usize) -> bool {
        let events = memory.events.load(Ordering::Relaxed);
        match self {
            Self::SplitFlag => events == 0,
            Self::SplitEventIndex => needs_event(events as u16, entry as u16 + 1, entry as u16),
            Self::PackedFlag | Self::PackedEvent => {
                wants_event(events, Self::position(entry + 1), 1, ENTRIES as u16, true)
            }
        }
    }
}

/// Publish everything. Returns how much had been published when the other one was last woken.
fn publish(format: Format, memory: &Memory, fenced: bool) -> usize {
    let mut woken_at = 0;
    for entry in 0..ENTRIES {
        // SAFETY: nobody looks at it before it is shown, or loom complains.
        memory.entries[entry].with_mut(|value| unsafe { *value = entry + 1 });
        format.show(memory, entry);
        if fenced {
            fence(Ordering::SeqCst);
        }
        if format.wants(memory, entry) {
            woken_at = entry + 1;
        }
    }
    woken_at
}

/// Take what is there until there is nothing. Returns how much was taken before going to sleep.
fn take(format: Format, memory: &Memory, fenced: bool) -> usize {
    for entry in 0..ENTRIES {
        if !format.is_visible(memory, entry) {
            format.ask(memory, entry);
            if fenced {
                fence(Ordering::SeqCst);
            }
            if !format.is_visible(memory, entry) {
                return entry;
            }
            format.stay_awake(memory);
        }
        // SAFETY: it is visible, so it is not written any more, or loom complains.
        assert_eq!(memory.entries[entry].with(|value| unsafe { *value }), entry + 1);
    }
    ENTRIES
}

fn nobody_oversleeps(format: Format, fenced: bool) {
    loom::model(move || {
        let memory = Arc::new(format.memory());
        let theirs = Arc::clone(&memory);
        let publisher = thread::spawn(move || publish(format, &theirs, fenced));
        let taken = take(format, &memory, fenced);
        let woken_at = publisher.join().unwrap();
        assert!(taken == ENTRIES || woken_at > taken, "{format:?}: asleep after {taken}, last woken at {woken_at}");
    });
}

#[test]
fn a_flag_of_a_split_ring_loses_no_notification() {
    nobody_oversleeps(Format::SplitFlag, true);
}

#[test]
fn an_event_index_of_a_split_ring_loses_no_notification() {
    nobody_oversleeps(Format::SplitEventIndex, true);
}

#[test]
fn a_flag_of_a_packed_ring_loses_no_notification() {
    nobody_oversleeps(Format::PackedFlag, true);
}

#[test]
fn an_event_of_a_packed_ring_loses_no_notification() {
    nobody_oversleeps(Format::PackedEvent, true);
}

#[test]
#[should_panic(expected = "asleep after")]
fn without_fences_a_split_ring_would_lose_notifications() {
    nobody_oversleeps(Format::SplitEventIndex, false);
}

#[test]
#[should_panic(expected = "asleep after")]
fn without_fences_a_packed_ring_would_lose_notifications() {
    nobody_oversleeps(Format::PackedEvent, false);
}

#[test]
fn a_batch_of_a_packed_ring_is_seen_whole_once_its_first_descriptor_is() {
    loom::model(|| {
        let memory = Arc::new(Format::PackedEvent.memory());
        let theirs = Arc::clone(&memory);
        let publisher = thread::spawn(move || {
            for entry in 0..ENTRIES {
                // SAFETY: as in `publish`.
                theirs.entries[entry].with_mut(|value| unsafe { *value = entry + 1 });
            }
            theirs.flags[1].store(Format::position(1).available(), Ordering::Relaxed);
            theirs.flags[0].store(Format::position(0).available(), Ordering::Release);
        });
        if Format::PackedEvent.is_visible(&memory, 0) {
            for entry in 0..ENTRIES {
                assert!(Format::PackedEvent.is_visible(&memory, entry));
                // SAFETY: as in `take`.
                assert_eq!(memory.entries[entry].with(|value| unsafe { *value }), entry + 1);
            }
        }
        publisher.join().unwrap();
    });
}
