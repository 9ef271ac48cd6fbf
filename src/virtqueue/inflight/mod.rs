//! The in-flight record: which requests a device has taken and not given back, in memory that outlives the device.
//!
//! The front-end keeps the memory. A back-end that was killed finds in it, when it is started again, what it had begun.
//!
//! | file | owns |
//! |---|---|
//! | `mod` | the shared memory, and where in it the record of each queue is |
//! | `split`, `packed` | the record of one queue: what is written when, and what it says after a crash |
//!
//! A record survives the death of the process after any store. That needs the stores in their order, and nothing else:
//! memory is coherent after a process has died. What a record says is not trusted: a peer may have changed it.
//!
//! vhost-user specification, "Inflight I/O tracking".

mod packed;
mod split;

use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

pub(super) use packed::{Copied, PackedRecord, Recovered};
pub(super) use split::SplitRecord;

use crate::error::{Error, RingError};
use crate::memory::Snapshot;
use crate::memory::crash;
use crate::protocol::{Inflight, Region};

/// Records begin at multiples of this.
const ALIGNMENT: u64 = 64;

/// What both kinds of records begin with: features (none are defined), a version, and the number of entries.
const VERSION: usize = 8;
const ENTRIES: usize = 10;

/// The version of a record in use; 0 is one that nobody has used yet.
const IN_USE: u16 = 1;

/// For which kind of ring a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Split,
    Packed,
}

impl Format {
    /// Bytes from one record to the next, for queues of `size` entries.
    #[must_use]
    pub fn stride(self, size: u16) -> u64 {
        let (head, entry) = match self {
            Self::Split => (split::HEAD, split::ENTRY),
            Self::Packed => (packed::HEAD, packed::ENTRY),
        };
        (head as u64 + entry as u64 * u64::from(size)).next_multiple_of(ALIGNMENT)
    }

    fn check(self, queues: u16, size: u16) -> Result<(), String> {
        if queues == 0 {
            return Err("it is for 0 queues".to_owned());
        }
        let fits = size <= super::MAX_QUEUE_SIZE && (self == Self::Packed && size > 0 || size.is_power_of_two());
        if fits {
            return Ok(());
        }
        let (kind, power) = match self {
            Self::Split => ("split", "a power of two"),
            Self::Packed => ("packed", "a size"),
        };
        Err(format!("queue_size is {size}; a {kind} ring needs {power} up to {}", super::MAX_QUEUE_SIZE))
    }
}

/// The records of all queues of a device, in one piece of shared memory.
#[derive(Debug)]
pub struct InflightBuffer {
    /// The only region begins at address 0.
    memory: Arc<Snapshot>,
    format: Format,
    queues: u16,
    queue_size: u16,
}

impl InflightBuffer {
    /// Make the file that GET_INFLIGHT_FD hands out: of zeros, and sealed, so that nobody can take it away again.
    pub fn create(format: Format, queues: u16, queue_size: u16) -> Result<(OwnedFd, Inflight), Error> {
        format.check(queues, queue_size).map_err(Error::State)?;
        let size = u64::from(queues) * format.stride(queue_size);
        let file = memfd_create("vhost-user-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(Error::os("making the in-flight record"))?;
        ftruncate(&file, size).map_err(Error::os(format!("making an in-flight record of {size} bytes")))?;
        fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)
            .map_err(Error::os("sealing the in-flight record"))?;
        Ok((file, Inflight { size, offset: 0, queues, queue_size, padding: 0 }))
    }

    /// Map what SET_INFLIGHT_FD brings. The file may be closed afterwards.
    ///
    /// Fails if the file or the announced size is too small for the queues, or the offset not a multiple of 8.
    pub fn map(file: &OwnedFd, description: &Inflight, format: Format) -> Result<Self, String> {
        let Inflight { size, offset, queues, queue_size, .. } = *description;
        format.check(queues, queue_size)?;
        let needed = u64::from(queues) * format.stride(queue_size);
        if size < needed {
            return Err(format!(
                "mmap_size is {size}; the records of {queues} queues with {queue_size} entries have {needed} bytes"
            ));
        }
        if offset % 8 != 0 {
            return Err(format!("mmap_offset is {offset:#x}; it must be a multiple of 8"));
        }
        let region = Region { guest_address: 0, size: needed, user_address: 0, file_offset: offset };
        let file = file.as_fd().try_clone_to_owned().map_err(|error| error.to_string())?;
        let memory = Snapshot::from_table(&[region], &[file]).map_err(|error| format!("the record's file: {error}"))?;
        Ok(Self { memory: Arc::new(memory), format, queues, queue_size })
    }

    /// The record of a queue, if there is one for it.
    #[must_use]
    pub fn slot(&self, queue: u16) -> Option<InflightSlot> {
        if queue >= self.queues {
            return None;
        }
        let stride = self.format.stride(self.queue_size);
        let start = self.memory.user_pointer(u64::from(queue) * stride, stride)?;
        let cells = Cells { start, length: stride as usize, _memory: Arc::clone(&self.memory) };
        Some(InflightSlot { cells, format: self.format, queue_size: self.queue_size })
    }

    /// How many queues it has records for.
    #[must_use]
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// Whether the file behind it was shrunk while it was mapped.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.memory.lost_region().is_some()
    }
}

/// Where the record of one queue is. A ring that starts opens it.
#[derive(Clone, Debug)]
pub struct InflightSlot {
    cells: Cells,
    format: Format,
    queue_size: u16,
}

impl InflightSlot {
    /// Forget what was in flight: the driver that waited for it is gone.
    pub fn clear(&self) {
        self.cells.set_u16(VERSION, 0);
    }

    /// The record, for a ring of `size` entries. Returns whether anybody has used it.
    fn open(&self, format: Format, size: u16) -> Result<(Cells, bool), RingError> {
        if format != self.format {
            return Err(refuse(format!("it is for {:?} rings, the ring is {format:?}", self.format).to_lowercase()));
        }
        if size > self.queue_size {
            return Err(refuse(format!("it has room for {} entries, the ring has {size}", self.queue_size)));
        }
        let cells = self.cells.clone();
        let used = match cells.u16(VERSION) {
            0 => false,
            IN_USE => true,
            other => return Err(refuse(format!("version is {other}; 0 and {IN_USE} are known"))),
        };
        let entries = cells.u16(ENTRIES);
        if used && entries != size {
            return Err(refuse(format!("desc_num is {entries}, the ring has {size}")));
        }
        Ok((cells, used))
    }
}

fn refuse(reason: String) -> RingError {
    RingError::InflightRecord(reason)
}

/// A flag of an entry that says whether it is in flight.
fn flag(cells: &Cells, at: usize, entry: u16) -> Result<bool, RingError> {
    match cells.u8(at) {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(refuse(format!("entry {entry}: inflight is {other}; it must be 0 or 1"))),
    }
}

/// Integers in shared memory, in the host's byte order. Each store is seen after the ones before it.
#[derive(Clone, Debug)]
struct Cells {
    start: NonNull<u8>,
    length: usize,
    _memory: Arc<Snapshot>,
}

// SAFETY: the pointer is into shared memory that `_memory` keeps mapped, and is used for atomic accesses only.
unsafe impl Send for Cells {}
// SAFETY: as above.
unsafe impl Sync for Cells {}

impl Cells {
    fn u8(&self, at: usize) -> u8 {
        self.byte(at).load(Ordering::Relaxed)
    }

    fn u16(&self, at: usize) -> u16 {
        self.half(at).load(Ordering::Relaxed)
    }

    fn u64(&self, at: usize) -> u64 {
        self.long(at).load(Ordering::Relaxed)
    }

    fn set_u8(&self, at: usize, value: u8) {
        self.byte(at).store(value, Ordering::Release);
        crash::point();
    }

    fn set_u16(&self, at: usize, value: u16) {
        self.half(at).store(value, Ordering::Release);
        crash::point();
    }

    fn set_u64(&self, at: usize, value: u64) {
        self.long(at).store(value, Ordering::Release);
        crash::point();
    }

    fn byte(&self, at: usize) -> &AtomicU8 {
        // SAFETY: `pointer` checks that the byte is inside; concurrent access is what atomics are for.
        unsafe { AtomicU8::from_ptr(self.pointer(at, 1).as_ptr()) }
    }

    fn half(&self, at: usize) -> &AtomicU16 {
        // SAFETY: as in `byte`; `pointer` checks the alignment as well.
        unsafe { AtomicU16::from_ptr(self.pointer(at, 2).cast().as_ptr()) }
    }

    fn long(&self, at: usize) -> &AtomicU64 {
        // SAFETY: as in `half`.
        unsafe { AtomicU64::from_ptr(self.pointer(at, 8).cast().as_ptr()) }
    }

    /// Where `size` bytes at `at` are. Offsets are multiples of their size, and entries below what was opened: no byte
    /// of a peer decides.
    #[inline]
    fn pointer(&self, at: usize, size: usize) -> NonNull<u8> {
        assert!(at + size <= self.length && at.is_multiple_of(size), "outside the in-flight record");
        // SAFETY: inside the `length` bytes that were mapped at `start`, which is a multiple of 8: see `map`.
        unsafe { self.start.add(at) }
    }
}

#[cfg(test)]
mod tests;
