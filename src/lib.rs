//! vhost-user in Rust, and the extension module that the `vhost_user` Python package is built on.
//!
//! | module | owns |
//! |---|---|
//! | `protocol` | the wire format: bytes to typed messages |
//! | `transport` | framing and descriptors over AF_UNIX |
//! | `memory` | the guest's address space |
//! | `virtqueue` | rings, chains, notification |
//! | `backend` | the device's side of a session, and its event loop |
//! | `bindings` | what Python sees (feature `python`) |

pub mod backend;
pub mod error;
pub mod memory;
pub mod protocol;
pub mod transport;
pub mod virtqueue;

#[cfg(feature = "python")]
mod bindings;

pub use error::{Error, RingError};
