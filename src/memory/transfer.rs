//! Files straight into guest memory, and back: no copy in between, and nothing of ours looks at the bytes.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

use super::snapshot::{Segment, for_range};

/// The most pieces that one system call takes (IOV_MAX).
const MAX_PIECES: usize = 1024;

/// Fill `count` bytes of `segments`, from byte `start` on, from `offset` of a file. Returns how many there were: fewer
/// only at the end of the file.
///
/// # Safety
/// The snapshot that made the segments must be alive.
pub unsafe fn from_file(
    segments: &[Segment],
    start: u64,
    count: u64,
    file: BorrowedFd<'_>,
    offset: u64,
) -> Result<u64, Errno> {
    transfer(segments, start, count, offset, |pieces, at| {
        // SAFETY: the pieces are mapped, as the caller vouches; the kernel answers EFAULT where their file is gone.
        unsafe { libc::preadv(file.as_raw_fd(), pieces.as_ptr(), pieces.len() as i32, at) }
    })
}

/// Fill `count` bytes of `segments`, from byte `start` on, with what the page cache has from `offset` of a file on. None if
/// it does not have all of it, or cannot be asked: what was filled then is to be filled again.
///
/// # Safety
/// The snapshot that made the segments must be alive.
pub unsafe fn from_cache(
    segments: &[Segment],
    start: u64,
    count: u64,
    file: BorrowedFd<'_>,
    offset: u64,
) -> Option<u64> {
    let mut asked = false;
    let done = transfer(segments, start, count, offset, |pieces, at| {
        if std::mem::replace(&mut asked, true) {
            return 0;
        }
        // SAFETY: as in `from_file`.
        unsafe { libc::preadv2(file.as_raw_fd(), pieces.as_ptr(), pieces.len() as i32, at, libc::RWF_NOWAIT) }
    });
    done.ok().filter(|done| *done == count)
}

/// Write `count` bytes of `segments`, from byte `start` on, to `offset` of a file. Returns how many were written.
///
/// # Safety
/// The snapshot that made the segments must be alive.
pub unsafe fn to_file(
    segments: &[Segment],
    start: u64,
    count: u64,
    file: BorrowedFd<'_>,
    offset: u64,
) -> Result<u64, Errno> {
    transfer(segments, start, count, offset, |pieces, at| {
        // SAFETY: as in `from_file`; the kernel only reads the pieces.
        unsafe { libc::pwritev(file.as_raw_fd(), pieces.as_ptr(), pieces.len() as i32, at) }
    })
}

fn transfer(
    segments: &[Segment],
    start: u64,
    count: u64,
    offset: u64,
    mut step: impl FnMut(&[libc::iovec], i64) -> isize,
) -> Result<u64, Errno> {
    let mut done = 0;
    let mut pieces: Vec<libc::iovec> = Vec::with_capacity(segments.len().min(MAX_PIECES));
    while done < count {
        pieces.clear();
        for_range(segments, start + done, (count - done) as usize, |piece| {
            if pieces.len() < MAX_PIECES {
                pieces.push(libc::iovec { iov_base: piece.pointer.as_ptr().cast(), iov_len: piece.length });
            }
        });
        let at = offset.checked_add(done).and_then(|at| i64::try_from(at).ok()).ok_or(Errno::OVERFLOW)?;
        match step(&pieces, at) {
            0 => break,
            moved if moved > 0 => done += moved as u64,
            _ => match Errno::from_io_error(&std::io::Error::last_os_error()) {
                Some(Errno::INTR) => {}
                errno => return Err(errno.unwrap_or(Errno::IO)),
            },
        }
    }
    Ok(done)
}
