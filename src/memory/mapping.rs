//! A piece of a peer's file in this process.

use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::fs::{FileType, fstat, fstatfs};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use super::fault;
use super::userfault::Pages;
use crate::error::Error;

const HUGETLBFS_MAGIC: u64 = 0x958458f6;

/// Shared memory that survives whatever the peer does to its file: see [`fault`]. It is unmapped when it is dropped.
#[derive(Debug)]
pub struct Mapping {
    /// The first byte that was asked for.
    start: NonNull<u8>,
    length: usize,
    /// What is really mapped: whole pages.
    pages: NonNull<u8>,
    pages_length: usize,
    page: usize,
    watched: &'static fault::Watched,
}

// SAFETY: a Mapping is an address range. It hands out raw pointers, and what is read or written through them is shared
// with another process in any case.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method changes the Mapping.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Map `size` bytes from `offset` on of `file`, which may be closed afterwards. `what` begins the text of errors.
    ///
    /// Fails if there are no bytes, or the file does not have them.
    pub fn new(file: impl AsFd, offset: u64, size: u64, what: &str) -> Result<Self, Error> {
        Self::with_protection(file, offset, size, what, ProtFlags::READ | ProtFlags::WRITE)
    }

    /// The same to be read only, from a file that may be open for that only: nothing must be written to it.
    pub fn read_only(file: impl AsFd, offset: u64, size: u64, what: &str) -> Result<Self, Error> {
        Self::with_protection(file, offset, size, what, ProtFlags::READ)
    }

    fn with_protection(
        file: impl AsFd,
        offset: u64,
        size: u64,
        what: &str,
        protection: ProtFlags,
    ) -> Result<Self, Error> {
        let refuse = |reason: &str| Err(Error::Memory(format!("{what} {reason}")));
        if size == 0 {
            return refuse("has no bytes");
        }
        let Some(end) = offset.checked_add(size).filter(|end| i64::try_from(*end).is_ok()) else {
            return refuse(&format!("has {size:#x} bytes from offset {offset:#x}, which no file can hold"));
        };
        let stat = fstat(&file).map_err(Error::os(format!("fstat of the descriptor of {what}")))?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && (stat.st_size as u64) < end {
            return refuse(&format!("needs bytes {offset:#x}..{end:#x} of its file, which has {:#x}", stat.st_size));
        }
        let page = page_size(&file);
        let slack = offset % page as u64;
        let length = usize::try_from(size + slack).ok().and_then(|bytes| bytes.checked_next_multiple_of(page));
        let Some(pages_length) = length else {
            return refuse(&format!("has {size:#x} bytes, more than this process can map"));
        };
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing.
        let mapped = unsafe {
            mmap(
                std::ptr::null_mut(),
                pages_length,
                protection,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &file,
                offset - slack,
            )
        }
        .map_err(Error::os(format!("mapping {what}")))?;
        // SAFETY: the range was mapped just now. A core dump without the guest's memory is a preference: errors are fine.
        let _ = unsafe { madvise(mapped, pages_length, Advice::LinuxDontDump) };
        let first = mapped as usize;
        let pages = NonNull::new(mapped.cast::<u8>())
            .ok_or_else(|| Error::Memory(format!("the kernel mapped {what} at address 0")))?;
        // SAFETY: `slack < page <= pages_length`, so the pointer stays inside the mapping.
        let start = unsafe { pages.add(slack as usize) };
        let watched = fault::watch(first, first + pages_length, page, None);
        Ok(Self { start, length: size as usize, pages, pages_length, page, watched })
    }

    /// The first byte of those that were asked for; all of them can be accessed.
    #[must_use]
    pub fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Bytes, as many as were asked for.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// There is no empty one.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// All that is mapped, and in which units.
    pub(super) fn pages(&self) -> Pages {
        Pages { start: self.pages, length: self.pages_length, page: self.page }
    }

    /// Who watches it.
    pub(super) fn watched(&self) -> &'static fault::Watched {
        self.watched
    }

    /// Whether the file shrank while it was mapped.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.watched.is_lost()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.watched.forget();
        // SAFETY: the range is the one that `new` made. Whoever holds a pointer into it holds the Mapping as well.
        if let Err(errno) = unsafe { munmap(self.pages.as_ptr().cast(), self.pages_length) } {
            log::error!("munmap of shared memory failed: {errno}");
        }
    }
}

/// The granularity of mappings of `file`: larger than the system's for huge pages.
fn page_size(file: impl AsFd) -> usize {
    match fstatfs(file) {
        Ok(stat) if stat.f_type as u64 == HUGETLBFS_MAGIC => stat.f_bsize as usize,
        _ => rustix::param::page_size(),
    }
}
