//! What other threads leave for the loop.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A list that anybody adds to, and that costs next to nothing to look at while it is empty.
#[derive(Debug)]
pub(super) struct Mailbox<T> {
    /// Set after something was added, and before it is taken.
    has_some: AtomicBool,
    items: Mutex<Vec<T>>,
}

impl<T> Default for Mailbox<T> {
    fn default() -> Self {
        Self { has_some: AtomicBool::new(false), items: Mutex::default() }
    }
}

impl<T> Mailbox<T> {
    pub(super) fn push(&self, item: T) {
        let mut items = self.items.lock().unwrap_or_else(PoisonError::into_inner);
        items.push(item);
        self.has_some.store(true, Ordering::Release);
    }

    /// Everything that was added before the loop was woken up.
    pub(super) fn take(&self) -> Vec<T> {
        if !self.has_some.load(Ordering::Acquire) {
            return Vec::new();
        }
        let mut items = self.items.lock().unwrap_or_else(PoisonError::into_inner);
        self.has_some.store(false, Ordering::Relaxed);
        std::mem::take(&mut items)
    }

    /// The list itself, unless another thread works on it.
    pub(super) fn try_look(&self) -> Option<MutexGuard<'_, Vec<T>>> {
        self.items.try_lock().ok()
    }
}
