//! Where a process may be killed: after each store that another process can see.
//!
//! Tests let it die there, or look at what the other process sees; nothing of this is in other builds.

#[cfg(not(test))]
#[inline(always)]
pub(crate) fn point() {}

#[cfg(test)]
pub(crate) use at::{point, survive, watch};

#[cfg(test)]
mod at {
    use std::cell::{Cell, RefCell};
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

    thread_local! {
        static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
        static WATCHER: RefCell<Option<Box<dyn FnMut()>>> = const { RefCell::new(None) };
    }

    struct Killed;

    pub fn point() {
        match LEFT.get() {
            Some(0) => {
                LEFT.set(None);
                resume_unwind(Box::new(Killed));
            }
            Some(left) => LEFT.set(Some(left - 1)),
            None => {}
        }
        // Taken away meanwhile: what it does has no points of its own.
        if let Some(mut watcher) = WATCHER.take() {
            watcher();
            WATCHER.set(Some(watcher));
        }
    }

    /// Do `work`, unless it is killed at the point number `after`, from 0 on. None if it was.
    pub fn survive<T>(after: u32, work: impl FnOnce() -> T) -> Option<T> {
        LEFT.set(Some(after));
        let outcome = catch_unwind(AssertUnwindSafe(work));
        LEFT.set(None);
        match outcome {
            Ok(value) => Some(value),
            Err(reason) if reason.is::<Killed>() => None,
            Err(reason) => resume_unwind(reason),
        }
    }

    /// Do `work`, and call `watcher` at each point of it.
    pub fn watch<T>(watcher: impl FnMut() + 'static, work: impl FnOnce() -> T) -> T {
        WATCHER.set(Some(Box::new(watcher)));
        let outcome = work();
        WATCHER.set(None);
        outcome
    }
}
