//! The guest's address space: regions mapped from descriptors, and translation of addresses into pointers.
//!
//! A [`Region`] is unmapped only when its last holder lets go. A [`Snapshot`] is an immutable set of regions: a change
//! of memory makes a new one, and whoever works on the old one keeps it alive. Guest memory is never a Rust reference,
//! because the guest writes to it at any time: only raw pointers, the copies in [`access`], and atomics. A
//! [`DirtyLog`] says which pages were written to. A [`Part`] of a ring is in one piece here, also where it is scattered over
//! guest memory.
//!
//! There are three kinds of addresses. Guest addresses are what regions have, and what drivers use; with an IOMMU they
//! use I/O addresses instead, which the [`Iotlb`] leads to user addresses. User addresses are the front-end's own, by
//! which it says where rings are, unless there is an IOMMU. With GPA_ADDRESSES they are the same as guest addresses:
//! each region says so, and nothing here has to know.

pub mod access;
pub(crate) mod crash;
mod fault;
mod iotlb;
mod log;
mod mapping;
mod part;
mod region;
mod snapshot;
pub mod transfer;
mod userfault;

pub use fault::faults_seen;
pub use iotlb::{Access, Iotlb, IovaRange, Permission, Unmapped};
pub use log::{DirtyLog, PAGE_SIZE};
pub use mapping::Mapping;
pub use part::{Apart, Part};
pub use region::Region;
pub use snapshot::{OutsideMemory, Segment, Snapshot, Untranslated, for_range};
pub use userfault::{Pages, Userfault};

#[cfg(test)]
mod tests;
