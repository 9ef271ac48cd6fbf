//! The dirty log: which pages of guest memory the device wrote to, for a front-end that migrates the guest.
//!
//! A bitmap that the front-end shares: it clears bits while we set them, hence atomics. vhost-user specification,
//! "Migration".

use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use super::crash;
use super::mapping::Mapping;
use super::snapshot::{Segment, Snapshot};
use crate::error::Error;
use crate::protocol;

/// Bytes of guest memory for which there is one bit.
pub const PAGE_SIZE: u64 = 4096;

/// A bit for each page from guest address 0 on, in a file of the front-end.
#[derive(Debug)]
pub struct DirtyLog {
    mapping: Mapping,
    /// Something was to be marked beyond the end, and nobody was told yet; and somebody was.
    overflowed: AtomicBool,
    reported: AtomicBool,
}

impl DirtyLog {
    /// Map the log that SET_LOG_BASE describes from `file`, which may be closed afterwards.
    pub fn map(log: protocol::Log, file: impl AsFd) -> Result<Self, Error> {
        let mapping = Mapping::new(file, log.offset, log.size, "the dirty log")?;
        Ok(Self { mapping, overflowed: AtomicBool::new(false), reported: AtomicBool::new(false) })
    }

    /// Mark the pages of `length` bytes at a guest address. What is beyond the end of the log is left out, and
    /// remembered for [`complaint`](Self::complaint).
    ///
    /// The marks are there for whoever sees anything that is stored with release afterwards.
    pub fn mark(&self, address: u64, length: u64) {
        if length == 0 {
            return;
        }
        let mut pages = pages_of(address, length);
        let last = self.pages() - 1;
        if *pages.end() > last {
            self.overflowed.store(true, Ordering::Relaxed);
            if *pages.start() > last {
                return;
            }
            pages = *pages.start()..=last;
        }
        for page in pages {
            // SAFETY: `page <= last`, so its byte is one of the `len` bytes of the mapping, which `self` keeps. The
            // front-end may clear bits of it at the same time: hence an atomic, and nothing of ours has another view.
            let byte = unsafe { AtomicU8::from_ptr(self.mapping.start().add((page / 8) as usize).as_ptr()) };
            byte.fetch_or(1 << (page % 8), Ordering::Release);
            crash::point();
        }
    }

    /// Mark what a device may have written through `segments` of `memory`.
    pub fn mark_segments(&self, memory: &Snapshot, segments: &[Segment]) {
        for segment in segments {
            if let Some(address) = memory.guest_address(segment.pointer) {
                self.mark(address, segment.length as u64);
            }
        }
    }

    /// Pages that there are bits for, at least eight.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.mapping.len() as u64 * 8
    }

    /// Whether the file shrank while it was mapped: its marks are lost.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.mapping.is_lost()
    }

    /// Once, if the device wrote to pages that the log has no bits for: what to tell people.
    #[must_use]
    pub fn complaint(&self) -> Option<String> {
        if !self.overflowed.load(Ordering::Relaxed) || self.reported.swap(true, Ordering::Relaxed) {
            return None;
        }
        Some(format!(
            "the device wrote beyond guest address {:#x}, where the front-end's dirty log of {} bytes ends: such writes \
             will be missing after a migration",
            self.pages() * PAGE_SIZE,
            self.mapping.len()
        ))
    }
}

fn pages_of(address: u64, length: u64) -> RangeInclusive<u64> {
    address / PAGE_SIZE..=address.saturating_add(length - 1) / PAGE_SIZE
}
