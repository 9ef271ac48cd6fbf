//! What the requests of a disk ask for most of the time, without Python: blocks between a file and guest memory.

use std::os::fd::BorrowedFd;
use std::ptr::null_mut;

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};
use pyo3::{PyTraverseError, PyVisit};
use rustix::fs::fstatfs;

use super::request::{FileDescriptor, WITHOUT_WAITING};
use crate::memory::transfer;
use crate::virtqueue::{Chain, Used};

/// The header of a request, and the types of those that read and write. Virtio 1.3, section 5.2.6.
const HEADER: u64 = 16;
const IN: u32 = 0;
const OUT: u32 = 1;
const OK: u8 = 0;

const SECTOR: u64 = 512;

/// The `f_type` of tmpfs.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Whether to wait for a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    Never,
    IfNeedBe,
}

/// A disk of so many sectors in `file`, which has to stay open. Reads, and with `writes` writes, need nobody else.
#[pyclass(frozen, module = "vhost_user")]
#[derive(Debug)]
pub struct Blocks {
    file: FileDescriptor,
    sectors: u64,
    writes: bool,
    /// Whether all of it is in memory: nobody ever waits for it.
    in_memory: bool,
    /// As long as these attributes of a device are these objects, it has these blocks.
    lasting: Option<Vec<(Py<PyString>, Py<PyAny>)>>,
}

#[pymethods]
impl Blocks {
    #[new]
    #[pyo3(signature = (file, sectors, writes, *, lasting = None))]
    fn new(file: FileDescriptor, sectors: u64, writes: bool, lasting: Option<Vec<(Py<PyString>, Py<PyAny>)>>) -> Self {
        // What is asked for each batch may not cost a system call.
        let in_memory =
            lasting.is_some() && fstatfs(file.borrow()).is_ok_and(|system| system.f_type as u64 == TMPFS_MAGIC);
        Self { file, sectors, writes, in_memory, lasting }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.lasting.iter().flatten().try_for_each(|(_, object)| visit.call(object))
    }
}

impl Blocks {
    /// Whether `device`, which has had these blocks, need not be asked whether it still has.
    pub(super) fn last(&self, device: &Bound<'_, PyAny>) -> bool {
        let Some(lasting) = &self.lasting else { return false };
        let py = device.py();
        // SAFETY: the device is an object that we hold; what comes back is a new reference, or null with an exception set.
        let own =
            unsafe { Bound::from_owned_ptr_or_err(py, ffi::PyObject_GenericGetDict(device.as_ptr(), null_mut())) };
        let Some(own) = own.ok().and_then(|own| own.cast_into::<PyDict>().ok()) else { return false };
        let class = device.get_type();
        lasting.iter().all(|(name, object)| {
            let found = match own.get_item(name) {
                Ok(None) => class.getattr(name).ok(),
                found => found.ok().flatten(),
            };
            found.is_some_and(|found| found.is(object))
        })
    }

    /// Do what a request asks for that reads or writes whole sectors of the disk, and write its status. None of every
    /// other, and of one that did not go well: that is for somebody who can say why. What would have to `wait`, and may not,
    /// is one of those.
    ///
    /// # Safety
    /// The snapshot under which the chain was filled must be alive.
    pub(super) unsafe fn transfer(&self, chain: &Chain, wait: Wait) -> Option<Used> {
        let mut header = [0; HEADER as usize];
        // SAFETY: as the caller vouches.
        if unsafe { chain.read(0, &mut header) } < header.len() {
            return None;
        }
        let number = u128::from_le_bytes(header);
        let (kind, sector) = (number as u32, (number >> 64) as u64);
        let (readable, writable) = (chain.readable(), chain.writable());
        let status = writable.checked_sub(1)?;
        let count = if kind == IN { status } else { readable - HEADER };
        let end = sector.checked_add(count / SECTOR)?;
        if !count.is_multiple_of(SECTOR) || end > self.sectors {
            return None;
        }
        let (file, offset): (BorrowedFd<'_>, _) = (self.file.borrow(), sector * SECTOR);
        if wait == Wait::Never && count > WITHOUT_WAITING {
            return None;
        }
        let may_wait = wait == Wait::IfNeedBe || self.in_memory;
        // SAFETY: as the caller vouches.
        let done = unsafe {
            match kind {
                IN if may_wait => transfer::from_file(chain.writable_segments(), 0, count, file, offset).ok(),
                IN => transfer::from_cache(chain.writable_segments(), 0, count, file, offset),
                OUT if self.writes && may_wait => {
                    transfer::to_file(chain.readable_segments(), HEADER, count, file, offset).ok()
                }
                _ => return None,
            }
        };
        if done != Some(count) {
            return None;
        }
        // SAFETY: as the caller vouches.
        unsafe { chain.write(status, &[OK]) };
        // A chain holds no more bytes than this can say; that was checked when it was taken.
        Some(Used { head: chain.head(), written: writable as u32 })
    }
}
