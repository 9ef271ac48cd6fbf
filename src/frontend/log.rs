//! The dirty log, from the side of those who read it: pages that a back-end wrote to.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::Memory;
use crate::error::Error;
use crate::memory::{Mapping, PAGE_SIZE};
use crate::protocol::Log;

const WORD: u64 = 8;

/// A bit for each page from guest address 0 on, which a back-end sets while somebody here clears them.
#[derive(Debug)]
pub struct DirtyLog {
    file: OwnedFd,
    mapping: Mapping,
}

impl DirtyLog {
    /// A log of as many pages, and a few more.
    pub fn new(pages: u64) -> Result<Self, Error> {
        let bytes = pages.div_ceil(8).max(1).next_multiple_of(WORD);
        let file = memfd_create("guest-log", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(Error::os("making a file for a dirty log"))?;
        ftruncate(&file, bytes).map_err(Error::os(format!("making a dirty log of {bytes:#x} bytes")))?;
        fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)
            .map_err(Error::os("sealing a dirty log"))?;
        let mapping = Mapping::new(&file, 0, bytes, "the dirty log")?;
        Ok(Self { file, mapping })
    }

    /// A log that reaches to the end of these memories.
    pub fn of(memories: &[Arc<Memory>]) -> Result<Self, Error> {
        let regions = memories.iter().flat_map(|memory| memory.regions());
        let end = regions.map(|(region, _)| region.guest_address + region.size).max().unwrap_or(0);
        Self::new(end.div_ceil(PAGE_SIZE))
    }

    /// Clear the log. Returns the pages that were marked, by number, in order.
    ///
    /// A page that is written to meanwhile is in this answer or in the next one.
    #[must_use]
    pub fn take(&self) -> Vec<u64> {
        let mut pages = Vec::new();
        for at in 0..self.mapping.len() / WORD as usize {
            // SAFETY: the word is in the mapping, whose length is a multiple of its size and which begins at a page. The
            // back-end may set bits at the same time: hence an atomic.
            let word = unsafe { AtomicU64::from_ptr(self.mapping.start().add(at * WORD as usize).cast().as_ptr()) };
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut marks = u64::from_le(word.swap(0, Ordering::AcqRel));
            while marks != 0 {
                pages.push(at as u64 * 64 + u64::from(marks.trailing_zeros()));
                marks &= marks - 1;
            }
        }
        pages
    }

    /// Pages that it has bits for.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.mapping.len() as u64 * 8
    }

    /// The payload of SET_LOG_BASE, and what comes with it.
    pub(super) fn description(&self) -> (Log, BorrowedFd<'_>) {
        (Log { size: self.mapping.len() as u64, offset: 0 }, self.file.as_fd())
    }
}
