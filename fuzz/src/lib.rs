//! What a fuzzer does with its input: one module for each target, with what has to be true afterwards.
//!
//! `cargo fuzz` looks for inputs; `cargo test` replays those that are kept in `corpus/`. Nothing here needs a nightly
//! compiler.

pub mod backend;
pub mod codec;
pub mod device;
pub mod dirty_log;
pub mod driver;
pub mod frontend;
pub mod inflight;
pub mod iotlb;
mod support;
pub mod transport;

pub type Target = fn(&[u8]);

/// The targets by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("backend", backend::run),
    ("codec", codec::run),
    ("dirty_log", dirty_log::run),
    ("frontend", frontend::run),
    ("iotlb", iotlb::run),
    ("packed_device", device::packed),
    ("packed_driver", driver::packed),
    ("packed_inflight", inflight::packed),
    ("split_device", device::split),
    ("split_driver", driver::split),
    ("split_inflight", inflight::split),
    ("transport", transport::run),
];
