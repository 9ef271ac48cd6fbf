//! What a fuzzer does with its input: one module for each target, with what has to be true afterwards.
//!
//! `cargo fuzz` looks for inputs; `cargo test` replays those that are kept in `corpus/`. Nothing here needs a nightly
//! compiler.

pub mod backend;
pub mod codec;
pub mod frontend;
pub mod split_device;
pub mod split_driver;
mod support;
pub mod transport;

pub type Target = fn(&[u8]);

/// The targets by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("backend", backend::run),
    ("codec", codec::run),
    ("frontend", frontend::run),
    ("split_device", split_device::run),
    ("split_driver", split_driver::run),
    ("transport", transport::run),
];
