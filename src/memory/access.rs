//! Copies between guest memory and ours.
//!
//! The guest may write while we copy. A copy is taken once, checked, and only the copy is used; a torn value is then
//! no worse than a wrong one.

use std::ptr;

/// Up to this many bytes are copied word by word, each read exactly once.
const SMALL: usize = 64;

const WORD: usize = size_of::<u64>();

/// A word, wherever it lies.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Word(u64);

/// Copy guest memory at `from` into `to`.
///
/// # Safety
/// `from` must be valid for reads of `to.len()` bytes, in a mapping that stays alive during the call.
pub unsafe fn read(from: *const u8, to: &mut [u8]) {
    if to.len() <= SMALL {
        let (words, bytes) = to.as_chunks_mut::<WORD>();
        let whole = words.len() * WORD;
        for (at, word) in words.iter_mut().enumerate() {
            // SAFETY: the word ends before `whole <= to.len()`, the caller vouches for that many bytes, and a Word may lie
            // anywhere.
            *word = unsafe { from.add(at * WORD).cast::<Word>().read_volatile() }.0.to_ne_bytes();
        }
        for (at, byte) in bytes.iter_mut().enumerate() {
            // SAFETY: `whole + at < to.len()`, and the caller vouches for that many bytes.
            *byte = unsafe { from.add(whole + at).read_volatile() };
        }
    } else {
        // SAFETY: the caller vouches for `from`; `to` is ours and guest memory is never a Rust object, so they cannot
        // overlap. The copy reads bytes that the guest may be changing: it is opaque to the compiler behind the raw
        // pointer, and nothing is derived from the source again.
        unsafe { ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) }
    }
}

/// Copy `from` into guest memory at `to`.
///
/// # Safety
/// `to` must be valid for writes of `from.len()` bytes, in a mapping that stays alive during the call.
pub unsafe fn write(to: *mut u8, from: &[u8]) {
    if from.len() <= SMALL {
        let (words, bytes) = from.as_chunks::<WORD>();
        let whole = words.len() * WORD;
        for (at, word) in words.iter().enumerate() {
            // SAFETY: as in `read`.
            unsafe { to.add(at * WORD).cast::<Word>().write_volatile(Word(u64::from_ne_bytes(*word))) };
        }
        for (at, byte) in bytes.iter().enumerate() {
            // SAFETY: `whole + at < from.len()`, and the caller vouches for that many bytes.
            unsafe { to.add(whole + at).write_volatile(*byte) };
        }
    } else {
        // SAFETY: as in `read`, with the direction turned around.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }
}
