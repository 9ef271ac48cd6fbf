//! Rings: from an available index to descriptor chains, and back to used entries and a decision to notify.
//!
//! Owns where a ring stands. Uses `memory::Snapshot` for addresses. Knows nothing of messages, sockets or Python.
//! Virtio 1.3, section 2.7.

mod chain;
mod crash;
mod driver;
mod inflight;
mod ring;
mod split;
mod walk;

pub use chain::{Chain, Used};
pub use driver::{Element, Indirect, SplitDriver};
pub use inflight::{Format, InflightBuffer, InflightSlot};
pub use ring::{Ring, RingAddresses, RingLimits, RingOptions, RingPointers, Written};
pub use split::SplitRing;

/// The largest ring that a front-end may ask for. Virtio 1.3, section 2.7.
pub const MAX_QUEUE_SIZE: u16 = 32768;

#[cfg(test)]
mod tests;
