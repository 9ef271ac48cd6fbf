//! One mapped piece of guest memory.

use std::os::fd::AsFd;
use std::ptr::NonNull;

use super::fault;
use super::mapping::Mapping;
use super::userfault::Pages;
use crate::error::Error;
use crate::protocol;

/// A mapped region. It is unmapped when it is dropped, and nobody drops it while a snapshot, a request or a Python
/// buffer still holds it.
#[derive(Debug)]
pub struct Region {
    description: protocol::Region,
    mapping: Mapping,
}

impl Region {
    /// Map `description` from `file`, which may be closed afterwards.
    ///
    /// Fails if the region is empty, wraps around, or passes the end of its file.
    pub fn map(description: protocol::Region, file: impl AsFd) -> Result<Self, Error> {
        let protocol::Region { guest_address, size, user_address, file_offset } = description;
        let name = format!("the region at guest address {guest_address:#x}");
        if guest_address.checked_add(size).is_none() || user_address.checked_add(size).is_none() {
            return Err(Error::Memory(format!(
                "{name} has {size:#x} bytes, which passes the end of the address space"
            )));
        }
        let mapping = Mapping::new(file, file_offset, size, &name)?;
        Ok(Self { description, mapping })
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
        self.mapping.is_lost()
    }

    /// The pages that it is in.
    #[must_use]
    pub fn pages(&self) -> Pages {
        self.mapping.pages()
    }

    /// Who watches it.
    pub(super) fn watched(&self) -> &'static fault::Watched {
        self.mapping.watched()
    }

    /// Where the region begins in this process.
    pub(super) fn host(&self) -> NonNull<u8> {
        self.mapping.start()
    }

    /// The pointer for the byte at `offset` from the region's start.
    ///
    /// # Safety
    /// `offset` must be less than the region's size.
    pub(super) unsafe fn pointer(&self, offset: u64) -> NonNull<u8> {
        // SAFETY: the caller vouches that the offset is inside the region, and the whole region is mapped.
        unsafe { self.mapping.start().add(offset as usize) }
    }

    /// Where in the region the byte at `pointer` is, if it is there.
    pub(super) fn offset_of(&self, pointer: NonNull<u8>) -> Option<u64> {
        let offset = pointer.addr().get().checked_sub(self.mapping.start().addr().get())?;
        (offset < self.mapping.len()).then_some(offset as u64)
    }
}
