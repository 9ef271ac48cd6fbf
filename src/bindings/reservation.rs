//! A lock for what hardly ever two threads want at once.

use std::cell::UnsafeCell;
use std::fmt::{self, Debug, Formatter};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use pyo3::Python;

use super::has_lock;

/// How long to sleep until a thread that has the value for long, because it moves file data, may be done.
const NAP: Duration = Duration::from_micros(50);

/// Looks before the first nap.
const LOOKS: u32 = 100;

/// A value that one thread at a time may use. Only a thread that has the interpreter can take it, and may let go of the
/// interpreter then. Where the interpreter has a lock, to take it is a look and a store; else it is an atomic exchange. To
/// let go of it is a store: those who wait have to look again and again.
pub(super) struct Reservation<T> {
    taken: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: only the thread that has set `taken` uses the value; Acquire and Release order what they do with it. No two
// threads set it at once: see `try_reserve`.
unsafe impl<T: Send> Sync for Reservation<T> {}

impl<T> Reservation<T> {
    pub(super) fn new(value: T) -> Self {
        Self { taken: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    /// The value, unless another thread has it.
    #[inline(always)]
    pub(super) fn try_reserve(&self, py: Python<'_>) -> Option<Reserved<'_, T>> {
        let is_taken = if has_lock(py) {
            // Nobody else sets it between the look and the store: who has the interpreter's lock is here, alone.
            let is_taken = self.taken.load(Ordering::Acquire);
            if !is_taken {
                self.taken.store(true, Ordering::Relaxed);
            }
            is_taken
        } else {
            self.taken.swap(true, Ordering::Acquire)
        };
        if is_taken { None } else { Some(Reserved { of: self }) }
    }

    /// The value, when no other thread has it. It is waited for without the interpreter, for which whoever has the value
    /// may be waiting.
    #[cold]
    pub(super) fn reserve(&self, py: Python<'_>) -> Reserved<'_, T> {
        let (taken, mut looks) = (&self.taken, 0);
        loop {
            if let Some(reserved) = self.try_reserve(py) {
                return reserved;
            }
            py.detach(|| {
                while taken.load(Ordering::Relaxed) {
                    looks += 1;
                    if looks < LOOKS { std::hint::spin_loop() } else { thread::sleep(NAP) }
                }
            });
        }
    }

    /// The value, for who knows that nobody else has any of it.
    ///
    /// # Safety
    /// No other thread may use the reservation before the result is gone, and this one has no [`Reserved`].
    #[expect(clippy::mut_from_ref, reason = "that is what the caller vouches for")]
    pub(super) unsafe fn alone(&self) -> &mut T {
        debug_assert!(!self.taken.load(Ordering::Relaxed));
        // SAFETY: as the caller vouches.
        unsafe { &mut *self.value.get() }
    }

    pub(super) fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }
}

impl<T> Debug for Reservation<T> {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let text = if self.taken.load(Ordering::Relaxed) { "<reserved>" } else { "<free>" };
        formatter.write_str(text)
    }
}

/// The right to use the value, until it is dropped.
pub(super) struct Reserved<'a, T> {
    of: &'a Reservation<T>,
}

// SAFETY: it is a unique reference to the value.
unsafe impl<T: Sync> Sync for Reserved<'_, T> {}

impl<T> Deref for Reserved<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: whoever set `taken` has the value alone until it is cleared, which is when this is dropped.
        unsafe { &*self.of.value.get() }
    }
}

impl<T> DerefMut for Reserved<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`, and this is the only reference to the right.
        unsafe { &mut *self.of.value.get() }
    }
}

impl<T> Drop for Reserved<'_, T> {
    #[inline]
    fn drop(&mut self) {
        self.of.taken.store(false, Ordering::Release);
    }
}
