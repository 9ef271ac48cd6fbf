//! What the requests of a disk ask for most of the time, without Python: blocks between a file and guest memory.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use super::request::{FileDescriptor, Request};
use crate::memory::transfer;

/// The header of a request, and the types of those that read and write. Virtio 1.3, section 5.2.6.
const HEADER: u64 = 16;
const IN: u32 = 0;
const OUT: u32 = 1;
const OK: u8 = 0;

const SECTOR: u64 = 512;

/// Do what those of `requests` ask for that read whole sectors of a disk of that many, or, with `writes`, write them, and
/// write their status; but begin none after so many seconds, for which the driver waits for the first. Returns the others,
/// untouched, and those that did not go well: for somebody who can say why.
#[pyfunction]
pub fn transfer_blocks(
    py: Python<'_>,
    requests: Vec<Py<Request>>,
    file: FileDescriptor,
    sectors: u64,
    writes: bool,
    seconds: f64,
) -> Vec<Py<Request>> {
    let patience = Duration::try_from_secs_f64(seconds).unwrap_or_default();
    py.detach(|| {
        let begin = Instant::now();
        let mut late = false;
        let mut left = Vec::new();
        for (at, request) in requests.into_iter().enumerate() {
            // A request is far longer than a look at the clock.
            late = late || at > 0 && begin.elapsed() > patience;
            if late || transfer_one(request.get(), file.borrow(), sectors, writes).is_none() {
                left.push(request);
            }
        }
        left
    })
}

fn transfer_one(request: &Request, file: BorrowedFd<'_>, sectors: u64, writes: bool) -> Option<()> {
    let mut state = request.open_detached().ok()?;
    let mut header = [0; HEADER as usize];
    // SAFETY: a state that is open has its run, which keeps the snapshot of the chain.
    let length = unsafe { state.chain.read(0, &mut header) };
    if state.read > 0 || state.written > 0 || length < header.len() {
        return None;
    }
    let number = u128::from_le_bytes(header);
    let (kind, sector) = (number as u32, (number >> 64) as u64);
    let (readable, writable) = (state.chain.readable(), state.chain.writable());
    let status = writable.checked_sub(1)?;
    let count = if kind == IN { status } else { readable - HEADER };
    let end = sector.checked_add(count / SECTOR)?;
    if !count.is_multiple_of(SECTOR) || end > sectors {
        return None;
    }
    let offset = sector * SECTOR;
    // SAFETY: as above.
    let done = unsafe {
        match kind {
            IN => transfer::from_file(state.chain.writable_segments(), 0, count, file, offset),
            OUT if writes => transfer::to_file(state.chain.readable_segments(), HEADER, count, file, offset),
            _ => return None,
        }
    };
    if done != Ok(count) {
        return None;
    }
    // SAFETY: as above.
    unsafe { state.chain.write(status, &[OK]) };
    (state.read, state.written) = (readable, writable);
    Some(())
}
