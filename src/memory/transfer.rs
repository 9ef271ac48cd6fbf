//! Files straight into guest memory, and back: no copy in between, and nothing of ours looks at the bytes.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

use super::snapshot::{Segment, for_range};

/// The most pieces that one system call takes (IOV_MAX), and how many need no allocation.
const MAX_PIECES: usize = 1024;
const FEW_PIECES: usize = 8;

const NO_PIECE: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

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
        unsafe {
            match pieces {
                // The kernel has less to look at.
                [piece] => libc::pread(file.as_raw_fd(), piece.iov_base, piece.iov_len, at),
                pieces => libc::preadv(file.as_raw_fd(), pieces.as_ptr(), pieces.len() as i32, at),
            }
        }
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
        unsafe {
            match pieces {
                [piece] => libc::pwrite(file.as_raw_fd(), piece.iov_base, piece.iov_len, at),
                pieces => libc::pwritev(file.as_raw_fd(), pieces.as_ptr(), pieces.len() as i32, at),
            }
        }
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
    let (mut few, mut many) = ([NO_PIECE; FEW_PIECES], Vec::new());
    let pieces = if segments.len() <= FEW_PIECES {
        &mut few[..]
    } else {
        many.resize(segments.len().min(MAX_PIECES), NO_PIECE);
        &mut many[..]
    };
    while done < count {
        let mut number = 0;
        for_range(segments, start + done, (count - done) as usize, |piece| {
            if let Some(place) = pieces.get_mut(number) {
                *place = libc::iovec { iov_base: piece.pointer.as_ptr().cast(), iov_len: piece.length };
                number += 1;
            }
        });
        let at = offset.checked_add(done).and_then(|at| i64::try_from(at).ok()).ok_or(Errno::OVERFLOW)?;
        match step(&pieces[..number], at) {
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
