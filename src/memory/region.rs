//! One mapped piece of guest memory.

use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::fs::{FileType, fstat, fstatfs};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use super::fault;
use crate::error::Error;
use crate::protocol;

const HUGETLBFS_MAGIC: u64 = 0x958458f6;

/// A mapped region. It is unmapped when it is dropped, and nobody drops it while a snapshot, a request or a Python
/// buffer still holds it.
#[derive(Debug)]
pub struct Region {
    description: protocol::Region,
    /// Where `description.guest_address` is in this process.
    host: NonNull<u8>,
    mapping: NonNull<u8>,
    mapping_length: usize,
    watched: &'static fault::Watched,
}

// SAFETY: a Region is an address range. It hands out raw pointers, and what is read or written through them is shared
// with another process in any case.
unsafe impl Send for Region {}
// SAFETY: as above; no method changes the Region.
unsafe impl Sync for Region {}

impl Region {
    /// Map `description` from `file`, which may be closed afterwards.
    ///
    /// Fails if the region is empty, wraps around, or passes the end of its file.
    pub fn map(description: protocol::Region, file: impl AsFd) -> Result<Self, Error> {
        let protocol::Region { guest_address, size, user_address, file_offset } = description;
        let refuse =
            |reason: &str| Err(Error::Memory(format!("the region at guest address {guest_address:#x} {reason}")));
        if size == 0 {
            return refuse("has no bytes");
        }
        if guest_address.checked_add(size).is_none() || user_address.checked_add(size).is_none() {
            return refuse(&format!("has {size:#x} bytes, which passes the end of the address space"));
        }
        let Some(file_end) = file_offset.checked_add(size).filter(|end| i64::try_from(*end).is_ok()) else {
            return refuse(&format!("has {size:#x} bytes from offset {file_offset:#x}, which no file can hold"));
        };
        let stat = fstat(&file).map_err(Error::os("fstat of a memory region's descriptor"))?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && (stat.st_size as u64) < file_end {
            return refuse(&format!(
                "needs bytes {file_offset:#x}..{file_end:#x} of its file, which has {:#x}",
                stat.st_size
            ));
        }
        let page = page_size(&file);
        let slack = file_offset % page as u64;
        let Some(length) = usize::try_from(size + slack).ok().and_then(|bytes| bytes.checked_next_multiple_of(page))
        else {
            return refuse(&format!("has {size:#x} bytes, more than this process can map"));
        };
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing.
        let mapping = unsafe {
            mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &file,
                file_offset - slack,
            )
        }
        .map_err(Error::os(format!("mapping the region at guest address {guest_address:#x}")))?;
        // SAFETY: the range was mapped just now. A core dump without the guest's memory is a preference: errors are fine.
        let _ = unsafe { madvise(mapping, length, Advice::LinuxDontDump) };
        let start = mapping as usize;
        let mapping = NonNull::new(mapping.cast::<u8>())
            .ok_or_else(|| Error::Memory("the kernel mapped a region at address 0".to_owned()))?;
        // SAFETY: `slack < page <= length`, so the pointer stays inside the mapping.
        let host = unsafe { mapping.add(slack as usize) };
        let watched = fault::watch(start, start + length, page);
        Ok(Self { description, host, mapping, mapping_length: length, watched })
    }

    #[must_use]
    pub fn description(&self) -> protocol::Region {
        self.description
    }

    #[must_use]
    pub fn start(&self) -> u64 {
        self.description.guest_address
    }

    /// The first address after the region. It was checked to be one.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.description.guest_address + self.description.size
    }

    /// Whether the file behind the region shrank while it was mapped.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.watched.is_lost()
    }

    /// Where the region begins in this process.
    pub(super) fn host(&self) -> NonNull<u8> {
        self.host
    }

    /// The pointer for the byte at `offset` from the region's start.
    ///
    /// # Safety
    /// `offset` must be less than the region's size.
    pub(super) unsafe fn pointer(&self, offset: u64) -> NonNull<u8> {
        // SAFETY: the caller vouches that the offset is inside the region, and the whole region is mapped.
        unsafe { self.host.add(offset as usize) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.watched.forget();
        // SAFETY: the range is the one that `map` made. Whoever holds a pointer into it holds the Region as well.
        if let Err(errno) = unsafe { munmap(self.mapping.as_ptr().cast(), self.mapping_length) } {
            log::error!("munmap of guest memory failed: {errno}");
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
