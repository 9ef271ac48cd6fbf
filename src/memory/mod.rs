//! The guest's address space: regions mapped from descriptors, and translation of addresses into pointers.
//!
//! A [`Region`] is unmapped only when its last holder lets go. A [`Snapshot`] is an immutable set of regions: a change
//! of memory makes a new one, and whoever works on the old one keeps it alive. Guest memory is never a Rust reference,
//! because the guest writes to it at any time: only raw pointers, the copies in [`access`], and atomics.

pub mod access;
mod fault;
mod region;
mod snapshot;
pub mod transfer;

pub use fault::faults_seen;
pub use region::Region;
pub use snapshot::{OutsideMemory, Segment, Snapshot, for_range};

#[cfg(test)]
mod tests;
