//! Pages that somebody else provides when they are touched: userfaultfd(2), which libc does not describe.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::OnceLock;

use rustix::io::{Errno, read};

use crate::error::Error;

const API: u64 = 0xaa;
const MISSING: u64 = 1;
const ON_SHARED_MEMORY: u64 = 1 << 5;
const POISONS: u64 = 1 << 14;

const IOCTL_API: u32 = 0xc018_aa3f;
const IOCTL_REGISTER: u32 = 0xc020_aa00;
const IOCTL_UNREGISTER: u32 = 0x8010_aa01;
const IOCTL_WAKE: u32 = 0x8010_aa02;
const IOCTL_COPY: u32 = 0xc028_aa03;
const IOCTL_POISON: u32 = 0xc020_aa08;
/// Of /dev/userfaultfd.
const IOCTL_NEW: u32 = 0xaa00;

/// What a range has to support once it is registered: COPY, and POISON.
const NEEDED: u64 = 1 << 3 | 1 << 8;

/// The event of a page that is missing, and how many bytes an event has.
const PAGE_FAULT: u8 = 0x12;
const EVENT: usize = 32;

/// Whole pages of `page` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    pub start: NonNull<u8>,
    pub length: usize,
    pub page: usize,
}

/// A userfaultfd. Whoever touches a missing page of a range that is registered with it waits, in the kernel, until
/// somebody who holds a copy of it provides the page; or until nobody holds one any more, and then finds zeroes.
#[derive(Debug)]
pub struct Userfault {
    descriptor: OwnedFd,
}

/// How the structures of all calls begin.
#[repr(C)]
#[derive(Default)]
struct Range {
    start: u64,
    length: u64,
}

impl From<Pages> for Range {
    fn from(pages: Pages) -> Self {
        Self { start: pages.start.addr().get() as u64, length: pages.length as u64 }
    }
}

#[repr(C)]
#[derive(Default)]
struct ApiCall {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct RegisterCall {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct CopyCall {
    to: u64,
    from: u64,
    length: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
#[derive(Default)]
struct PoisonCall {
    range: Range,
    mode: u64,
    updated: i64,
}

impl Userfault {
    /// Whether this process may open one that is of use: the kernel has to let it wait for pages in system calls as well
    /// (CAP_SYS_PTRACE, vm.unprivileged_userfaultfd or access to /dev/userfaultfd), and to know UFFDIO_POISON (Linux 6.6).
    #[must_use]
    pub fn is_available() -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        *AVAILABLE.get_or_init(|| Self::open().is_ok())
    }

    pub fn open() -> Result<Self, Error> {
        let descriptor = open().map_err(|source| Error::Os {
            context: "opening a userfaultfd; this needs CAP_SYS_PTRACE, access to /dev/userfaultfd, or \
                      vm.unprivileged_userfaultfd=1"
                .to_owned(),
            source,
        })?;
        let this = Self { descriptor };
        let mut call = ApiCall { api: API, features: ON_SHARED_MEMORY | POISONS, ioctls: 0 };
        // SAFETY: UFFDIO_API reads and writes a structure of this layout.
        unsafe { this.call(IOCTL_API, &mut call) }.map_err(Error::os("UFFDIO_API, which has to know UFFDIO_POISON"))?;
        Ok(this)
    }

    /// One that another process has opened for its memory.
    #[must_use]
    pub fn of_peer(descriptor: OwnedFd) -> Self {
        Self { descriptor }
    }

    /// Have whoever touches a missing one of `pages` wait for it.
    pub fn register(&self, pages: Pages) -> Result<(), Error> {
        let refused = || format!("waiting for the pages of {:#x} bytes of guest memory", pages.length);
        // SAFETY: the pages are mapped shared memory; how soon they are there changes nothing else.
        let _ = unsafe { libc::madvise(pages.start.as_ptr().cast(), pages.length, libc::MADV_NOHUGEPAGE) };
        let mut call = RegisterCall { range: pages.into(), mode: MISSING, ioctls: 0 };
        // SAFETY: UFFDIO_REGISTER reads and writes a structure of this layout.
        unsafe { self.call(IOCTL_REGISTER, &mut call) }.map_err(Error::os(refused()))?;
        if call.ioctls & NEEDED == NEEDED {
            return Ok(());
        }
        self.unregister(pages)?;
        Err(Error::Memory(format!(
            "{} is not possible: the kernel has neither UFFDIO_COPY nor UFFDIO_POISON for such files, or one of them; \
             use a memfd, or a file in /dev/shm",
            refused()
        )))
    }

    /// Pages that are still missing are zeroes from now on. Whoever waits for one goes on.
    pub fn unregister(&self, pages: Pages) -> Result<(), Error> {
        // SAFETY: UFFDIO_UNREGISTER reads a structure of this layout.
        unsafe { self.call(IOCTL_UNREGISTER, &mut Range::from(pages)) }.map_err(Error::os("UFFDIO_UNREGISTER"))
    }

    /// Pages that are still missing never come: an access to one is a SIGBUS, which [`fault`](super::fault) handles, and
    /// EFAULT in a system call. Nobody takes zeroes for what the page should have had.
    pub fn poison(&self, pages: Pages) -> Result<(), Error> {
        let (end, page) = (pages.start.addr().get() + pages.length, pages.page);
        let mut at = pages.start.addr().get();
        while at < end {
            let range = Range { start: at as u64, length: (end - at) as u64 };
            let mut call = PoisonCall { range, ..PoisonCall::default() };
            // SAFETY: UFFDIO_POISON reads and writes a structure of this layout. What it makes of missing pages is what
            // `fault` expects of shared memory.
            let result = unsafe { self.call(IOCTL_POISON, &mut call) };
            let done = usize::try_from(call.updated).unwrap_or(0);
            at += done;
            match result {
                Ok(()) if done > 0 => {}
                Err(Errno::AGAIN | Errno::INTR) => {}
                // A page that is there.
                Err(Errno::EXIST) => at += if done == 0 { page } else { 0 },
                Ok(()) => return Err(Error::Memory("UFFDIO_POISON did nothing".to_owned())),
                Err(errno) => return Err(Error::os("UFFDIO_POISON")(errno)),
            }
        }
        Ok(())
    }

    /// Put whole pages at an address of the process that opened this. Returns false if there is one already: it stays.
    pub fn copy(&self, to: u64, from: &[u8]) -> Result<bool, Error> {
        let (mut done, length) = (0, from.len() as u64);
        while done < length {
            let source = from.as_ptr().addr() as u64 + done;
            let mut call = CopyCall { to: to + done, from: source, length: length - done, ..CopyCall::default() };
            // SAFETY: UFFDIO_COPY reads and writes a structure of this layout, and reads `from`, which is borrowed.
            let result = unsafe { self.call(IOCTL_COPY, &mut call) };
            done += u64::try_from(call.copied).unwrap_or(0);
            match result {
                Ok(()) | Err(Errno::AGAIN | Errno::INTR) => {}
                Err(Errno::EXIST) => {
                    // Whoever came too late for it may wait still.
                    let mut range = Range { start: to, length };
                    // SAFETY: UFFDIO_WAKE reads a structure of this layout.
                    unsafe { self.call(IOCTL_WAKE, &mut range) }.map_err(Error::os("UFFDIO_WAKE"))?;
                    return Ok(false);
                }
                Err(errno) => return Err(Error::os(format!("UFFDIO_COPY of {length:#x} bytes to {to:#x}"))(errno)),
            }
        }
        Ok(true)
    }

    /// The address of a page that somebody waits for, who was not heard of before.
    pub fn next_fault(&self) -> Result<Option<u64>, Error> {
        let mut event = [0; EVENT];
        loop {
            match read(&self.descriptor, &mut event) {
                Ok(EVENT) if event[0] == PAGE_FAULT => {
                    let mut address = [0; 8];
                    address.copy_from_slice(&event[16..24]);
                    return Ok(Some(u64::from_ne_bytes(address)));
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(Error::os("reading a userfaultfd")(errno)),
            }
        }
    }

    pub fn try_clone(&self) -> Result<OwnedFd, Error> {
        self.descriptor.try_clone().map_err(|source| Error::Os { context: "dup of a userfaultfd".to_owned(), source })
    }

    /// # Safety
    /// `request` must be one for an `A`, and what it does be sound.
    unsafe fn call<A>(&self, request: u32, argument: &mut A) -> Result<(), Errno> {
        // SAFETY: as the caller vouches.
        let result = unsafe { libc::ioctl(self.descriptor.as_raw_fd(), request as _, std::ptr::from_mut(argument)) };
        if result >= 0 {
            return Ok(());
        }
        Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

fn open() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the system call takes flags and makes a descriptor.
    let opened = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) } as i32;
    let descriptor = match opened {
        0.. => opened,
        _ => {
            let refusal = io::Error::last_os_error();
            let Ok(device) = std::fs::File::options().read(true).write(true).open("/dev/userfaultfd") else {
                return Err(refusal);
            };
            // SAFETY: the request takes flags and makes a descriptor.
            unsafe { libc::ioctl(device.as_raw_fd(), IOCTL_NEW as _, flags) }
        }
    };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was made just now, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
