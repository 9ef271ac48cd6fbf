//! What a back-end lets its driver see beside the rings: pieces of files in the device's shared memory regions, pages to
//! notify it by, and objects that it shares by name.
//!
//! vhost-user specification, "Back-end message types".

use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::os::fd::{BorrowedFd, OwnedFd};

use super::{Frontend, lock};
use crate::error::Error;
use crate::memory::{Mapping, access};
use crate::protocol::{ShmemMap, Uuid, VringArea};

/// Objects that a back-end may announce.
const MAX_OBJECTS: usize = 1024;

/// Mappings that a back-end may ask for in each shared memory region.
const MAX_MAPPINGS: usize = 1024;

/// A piece of a file.
#[derive(Debug)]
struct Window {
    memory: Mapping,
    writable: bool,
}

#[derive(Debug, Default)]
struct SharedRegion {
    size: u64,
    /// By their offset.
    mappings: BTreeMap<u64, Window>,
}

/// Who has an object.
#[derive(Debug)]
enum Object {
    /// The back-end, which gives its file when it is asked.
    Backend,
    /// We do.
    File(OwnedFd),
}

/// What the back-end shows, and what is shown to it.
#[derive(Debug, Default)]
pub(super) struct Windows {
    regions: BTreeMap<u8, SharedRegion>,
    notifiers: BTreeMap<u32, Window>,
    objects: HashMap<Uuid, Object>,
}

impl Window {
    fn new(file: &OwnedFd, offset: u64, size: u64, writable: bool) -> Result<Self, String> {
        let map = if writable { Mapping::new } else { Mapping::read_only };
        let memory = map(file, offset, size, "the mapping").map_err(|error| error.to_string())?;
        Ok(Self { memory, writable })
    }

    fn size(&self) -> u64 {
        self.memory.len() as u64
    }

    /// Copy from here, if it is all here.
    fn read(&self, offset: u64, to: &mut [u8]) -> Option<()> {
        let from = self.pointer(offset, to.len())?;
        // SAFETY: the range is inside the mapping, which `self` keeps.
        unsafe { access::read(from, to) };
        Some(())
    }

    /// Copy to here, if there is room, and it may be written to.
    fn write(&self, offset: u64, from: &[u8]) -> Option<()> {
        let to = self.pointer(offset, from.len()).filter(|_| self.writable)?;
        // SAFETY: as in `read`; the mapping is one for writing.
        unsafe { access::write(to, from) };
        Some(())
    }

    fn pointer(&self, offset: u64, length: usize) -> Option<*mut u8> {
        let offset = usize::try_from(offset).ok()?;
        offset.checked_add(length).filter(|end| *end <= self.memory.len())?;
        // SAFETY: the offset is inside the mapping, or at its end.
        Some(unsafe { self.memory.start().add(offset) }.as_ptr())
    }
}

impl Windows {
    /// The device's regions, by their index, with their sizes.
    pub(super) fn set_regions(&mut self, sizes: &[(u8, u64)]) {
        self.regions = sizes
            .iter()
            .map(|(region, size)| (*region, SharedRegion { size: *size, mappings: BTreeMap::new() }))
            .collect();
    }

    /// The device was reset: what it mapped is gone.
    pub(super) fn unmap_all(&mut self) {
        self.regions.values_mut().for_each(|region| region.mappings.clear());
        self.notifiers.clear();
    }

    /// SHMEM_MAP.
    pub(super) fn map(&mut self, asked: &ShmemMap, file: &OwnedFd) -> Result<String, String> {
        let ShmemMap { file_offset, region_offset: start, size, flags, .. } = *asked;
        if flags & !ShmemMap::WRITABLE != 0 {
            return Err(format!("the flags {flags:#x} are not known; {:#x} maps for writing", ShmemMap::WRITABLE));
        }
        let region = self.region(asked.region)?;
        let page = rustix::param::page_size() as u64;
        if size == 0 || [start, size, file_offset].iter().any(|number| number % page != 0) {
            return Err(format!("{size:#x} bytes at {start:#x}, from {file_offset:#x} on, are not whole pages"));
        }
        let Some(end) = start.checked_add(size).filter(|end| *end <= region.size) else {
            return Err(format!("{size:#x} bytes at {start:#x} are outside the region, which has {:#x}", region.size));
        };
        let before = region.mappings.range(..end).next_back();
        if let Some((other, mapping)) = before.filter(|(other, mapping)| *other + mapping.size() > start) {
            return Err(format!(
                "{size:#x} bytes at {start:#x} overlap the {:#x} mapped at {other:#x}",
                mapping.size()
            ));
        }
        if region.mappings.len() >= MAX_MAPPINGS {
            return Err(format!("{MAX_MAPPINGS} mappings are in the region already"));
        }
        let writable = flags & ShmemMap::WRITABLE != 0;
        region.mappings.insert(start, Window::new(file, file_offset, size, writable)?);
        Ok(format!("region {}: {start:#x}..{end:#x}", asked.region))
    }

    /// SHMEM_UNMAP: one mapping as a whole.
    pub(super) fn unmap(&mut self, asked: &ShmemMap) -> Result<String, String> {
        let ShmemMap { region_offset: start, size, .. } = *asked;
        let region = self.region(asked.region)?;
        if region.mappings.get(&start).is_none_or(|mapping| mapping.size() != size) {
            return Err(format!("no mapping has {size:#x} bytes at {start:#x}"));
        }
        region.mappings.remove(&start);
        Ok(format!("region {}: {start:#x}..{:#x}", asked.region, start.saturating_add(size)))
    }

    /// VRING_HOST_NOTIFIER_MSG. Without a file the notifier is removed.
    pub(super) fn set_notifier(
        &mut self,
        queue: u32,
        area: &VringArea,
        file: Option<&OwnedFd>,
    ) -> Result<String, String> {
        let page = rustix::param::page_size() as u64;
        if queue > u32::from(u8::MAX) {
            return Err(format!("vhost-user can name the queues 0 to 255, not {queue}"));
        }
        let Some(file) = file else {
            self.notifiers.remove(&queue);
            return Ok(format!("queue {queue}: removed"));
        };
        if area.size != page || !area.offset.is_multiple_of(page) {
            return Err(format!("{:#x} bytes at {:#x} are not one page", area.size, area.offset));
        }
        self.notifiers.insert(queue, Window::new(file, area.offset, page, true)?);
        Ok(format!("queue {queue}: set"))
    }

    /// SHARED_OBJECT_ADD.
    pub(super) fn add_object(&mut self, uuid: Uuid) -> Result<String, String> {
        if self.objects.contains_key(&uuid) {
            return Err(format!("the object {uuid} is there already"));
        }
        if self.objects.len() >= MAX_OBJECTS {
            return Err(format!("there are {MAX_OBJECTS} objects already"));
        }
        self.objects.insert(uuid, Object::Backend);
        Ok(uuid.to_string())
    }

    /// SHARED_OBJECT_REMOVE: only by who added it.
    pub(super) fn remove_object(&mut self, uuid: Uuid) -> Result<String, String> {
        match self.objects.get(&uuid) {
            Some(Object::Backend) => {
                self.objects.remove(&uuid);
                Ok(uuid.to_string())
            }
            Some(Object::File(_)) => Err(format!("the object {uuid} is not the back-end's")),
            None => Err(format!("there is no object {uuid}")),
        }
    }

    /// SHARED_OBJECT_LOOKUP.
    pub(super) fn look_up_object(&self, uuid: Uuid) -> Result<OwnedFd, String> {
        match self.objects.get(&uuid) {
            Some(Object::File(file)) => file.try_clone().map_err(|error| format!("the object {uuid}: {error}")),
            Some(Object::Backend) => Err(format!("the back-end itself has the object {uuid}")),
            None => Err(format!("there is no object {uuid}")),
        }
    }

    fn region(&mut self, index: u8) -> Result<&mut SharedRegion, String> {
        self.regions.get_mut(&index).ok_or_else(|| format!("the device has no shared memory region {index}"))
    }
}

impl Frontend {
    /// Bytes of each shared memory region of the device, with its index.
    #[must_use]
    pub fn shared_memory(&self) -> Vec<(u8, u64)> {
        lock(&self.windows).regions.iter().map(|(region, shared)| (*region, shared.size)).collect()
    }

    /// Where something is mapped in a shared memory region: offset, size, and whether it may be written to.
    #[must_use]
    pub fn mappings(&self, region: u8) -> Vec<(u64, u64, bool)> {
        let windows = lock(&self.windows);
        let mappings = windows.regions.get(&region).into_iter().flat_map(|region| &region.mappings);
        mappings.map(|(offset, mapping)| (*offset, mapping.size(), mapping.writable)).collect()
    }

    /// Copy from a shared memory region, within one mapping.
    pub fn read_shared_memory(&self, region: u8, offset: u64, to: &mut [u8]) -> Result<(), Error> {
        let size = to.len();
        self.on_mapping(region, offset, |mapping, offset| mapping.read(offset, to))
            .ok_or_else(|| not_mapped(region, offset, size, "nothing is mapped there"))
    }

    /// Copy to a shared memory region, within one mapping.
    pub fn write_shared_memory(&self, region: u8, offset: u64, from: &[u8]) -> Result<(), Error> {
        self.on_mapping(region, offset, |mapping, offset| mapping.write(offset, from))
            .ok_or_else(|| not_mapped(region, offset, from.len(), "nothing is mapped there for writing"))
    }

    fn on_mapping(&self, region: u8, offset: u64, work: impl FnOnce(&Window, u64) -> Option<()>) -> Option<()> {
        let windows = lock(&self.windows);
        let (start, mapping) = windows.regions.get(&region)?.mappings.range(..=offset).next_back()?;
        work(mapping, offset - start)
    }

    /// The queues that the back-end gave a page for, to be notified by.
    #[must_use]
    pub fn host_notifiers(&self) -> Vec<u32> {
        lock(&self.windows).notifiers.keys().copied().collect()
    }

    /// Notify a queue as a driver does on the device's own page: by its index.
    pub fn notify_host(&self, queue: u32) -> Result<(), Error> {
        let windows = lock(&self.windows);
        let written = windows.notifiers.get(&queue).and_then(|page| page.write(0, &(queue as u16).to_le_bytes()));
        written.ok_or_else(|| Error::State(format!("queue {queue} has no host notifier")))
    }

    /// The objects that the back-end shares.
    #[must_use]
    pub fn shared_objects(&self) -> Vec<Uuid> {
        let windows = lock(&self.windows);
        let of_backend = windows.objects.iter().filter(|(_, object)| matches!(object, Object::Backend));
        of_backend.map(|(uuid, _)| *uuid).collect()
    }

    /// Let the back-end look an object up. It replaces one that was provided before.
    pub fn provide_shared_object(&self, uuid: Uuid, file: BorrowedFd<'_>) -> Result<(), Error> {
        let file = file.try_clone_to_owned();
        let file = file.map_err(|source| Error::Os { context: "dup of a shared object".to_owned(), source })?;
        let objects = &mut lock(&self.windows).objects;
        if matches!(objects.get(&uuid), Some(Object::Backend)) {
            return Err(Error::State(format!("the object {uuid} is the back-end's")));
        }
        objects.insert(uuid, Object::File(file));
        Ok(())
    }
}

fn not_mapped(region: impl Display, offset: u64, size: usize, why: &str) -> Error {
    Error::State(format!("{size} bytes at {offset:#x} of the shared memory region {region}: {why}"))
}
