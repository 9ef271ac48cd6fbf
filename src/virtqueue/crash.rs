//! Where a process may be killed: after each store that another process can see.
//!
//! Tests let it die there; nothing of this is in other builds.

#[cfg(not(test))]
#[inline(always)]
pub(super) fn point() {}

#[cfg(test)]
pub(super) use at::{point, survive};

#[cfg(test)]
mod at {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

    thread_local! {
        static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
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
}
