//! Rings: from an available index to descriptor chains, and back to used entries and a decision to notify.
//!
//! Owns where a ring stands. Uses `memory::Snapshot` for addresses. Knows nothing of messages, sockets or Python.
//! Virtio 1.3, sections 2.6 to 2.8.

mod chain;
mod driver;
mod endian;
mod inflight;
mod order;
mod packed;
mod packed_driver;
mod ring;
mod split;
mod split_driver;
mod walk;

pub use chain::{Chain, Used};
pub use driver::{Driver, Element, Indirect};
pub use endian::{Big, Endian, Little};
pub use inflight::{Format, InflightBuffer, InflightSlot};
pub use packed::PackedRing;
pub use packed_driver::PackedDriver;
pub use ring::{Ring, RingAddresses, RingLimits, RingOptions, RingPointers, Written};
pub use split::SplitRing;
pub use split_driver::SplitDriver;

/// The largest ring that a front-end may ask for. Virtio 1.3, section 2.7.
pub const MAX_QUEUE_SIZE: u16 = 32768;

#[cfg(test)]
mod tests;
