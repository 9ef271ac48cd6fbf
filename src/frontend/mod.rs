//! The driver's side of a session: the handshake, memory to share, and queues that submit requests.
//!
//! | file | owns |
//! |---|---|
//! | `extensions` | messages that only some devices take |
//! | `session` | one connection: requests, their answers, and what the back-end asks meanwhile |
//! | `memory` | guest memory that this process makes, and what is free of it |
//! | `log` | which pages of that memory a back-end wrote to |
//! | `queue` | one ring with its notifications and the requests that are under way |
//! | `iommu` | what a device is told of I/O addresses |
//! | `load` | the same request again and again on such rings, and how long each took |
//! | `postcopy` | pages that a back-end is given when it touches them |
//! | `windows` | what a back-end shows beside the rings |
//!
//! The back end is the one that is not trusted here: every answer has a deadline, and is checked. Everything can be
//! used from several threads at once. Nothing here knows of Python.

mod extensions;
mod iommu;
mod load;
mod log;
mod memory;
mod postcopy;
mod queue;
mod session;
mod windows;

pub use iommu::IO_OFFSET;
pub use load::{Control, Histogram, LoadOptions, Tally, Workload, load};
pub use log::DirtyLog;
pub use memory::{Allocation, Memory};
pub use postcopy::LatePages;
pub use queue::{Completion, Queue, QueueOptions};
pub use session::{Event, Frontend, InflightRecord, Offer, Reply};

use std::sync::{Mutex, MutexGuard, PoisonError};

/// No state here is left half changed by a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
