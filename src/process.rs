//! Which process this is. A child that was forked has its parent's descriptors, and its shared memory, but not its threads:
//! what its parent made it leaves alone.

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How often a process was forked on the way from the one that loaded this code to this one.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// The process that made something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process(u32);

impl Process {
    #[must_use]
    pub fn current() -> Self {
        static IS_TOLD: AtomicBool = AtomicBool::new(false);
        if !IS_TOLD.swap(true, Ordering::Relaxed) {
            // SAFETY: `on_fork` may run in a forked child: it only adds to an atomic. This code is never unloaded.
            unsafe { libc::pthread_atfork(None, None, Some(on_fork)) };
        }
        Self(FORKS.load(Ordering::Relaxed))
    }

    /// Whether this is it, and not a child that was forked since.
    #[inline]
    #[must_use]
    pub fn is_current(self) -> bool {
        self.0 == FORKS.load(Ordering::Relaxed)
    }
}

extern "C" fn on_fork() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// A lock for a whole process. Who is forked has its own, with a new value: a thread that it does not have may hold its
/// parent's.
#[derive(Debug)]
pub struct ProcessLock<T>(AtomicPtr<Own<T>>);

#[derive(Debug)]
struct Own<T> {
    process: Process,
    value: Mutex<T>,
}

impl<T: Default + 'static> ProcessLock<T> {
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicPtr::new(std::ptr::null_mut()))
    }

    pub fn lock(&self) -> MutexGuard<'_, T> {
        loop {
            let found = self.0.load(Ordering::Acquire);
            // SAFETY: it is null, or a box that was leaked below.
            if let Some(own) = unsafe { found.as_ref() }.filter(|own| own.process.is_current()) {
                return own.value.lock().unwrap_or_else(PoisonError::into_inner);
            }
            // The parent's stays where it is: once for each generation.
            let own = Box::into_raw(Box::new(Own { process: Process::current(), value: Mutex::default() }));
            if self.0.compare_exchange(found, own, Ordering::AcqRel, Ordering::Acquire).is_err() {
                // SAFETY: it was made two lines above, and nobody else has seen it.
                drop(unsafe { Box::from_raw(own) });
            }
        }
    }
}

impl<T: Default + 'static> Default for ProcessLock<T> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_another_process_and_finds_no_lock_held() {
        static LOCK: ProcessLock<Vec<u8>> = ProcessLock::new();
        let process = Process::current();
        let mut held = LOCK.lock();
        held.push(1);
        // SAFETY: the child does nothing that needs a thread that it does not have, and ends without unwinding.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let is_new = !process.is_current() && Process::current().is_current() && LOCK.lock().is_empty();
            // SAFETY: it ends this process, and runs nothing else.
            unsafe { libc::_exit(if is_new { 0 } else { 1 }) };
        }
        let mut status = 0;
        // SAFETY: `status` is ours to write.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0);
        assert!(process.is_current());
        drop(held);
        assert_eq!(*LOCK.lock(), [1]);
    }
}
