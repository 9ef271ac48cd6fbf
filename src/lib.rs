//! vhost-user in Rust, and the extension module that the `vhost_user` Python package is built on.
//!
//! | module | owns |
//! |---|---|
//! | `protocol` | the wire format: bytes to typed messages |
//! | `transport` | framing and descriptors over AF_UNIX |
//! | `memory` | the guest's address space |
//! | `process` | what a forked child leaves to its parent |
//! | `virtqueue` | rings, chains, notification |
//! | `backend` | the device's side of a session, and its event loop |
//! | `frontend` | the driver's side of a session, and the queues that it submits to |
//! | `bindings` | what Python sees (feature `python`) |

pub mod backend;
pub mod error;
pub mod frontend;
pub mod memory;
pub mod process;
pub mod protocol;
pub mod transport;
pub mod virtqueue;

#[cfg(feature = "python")]
mod bindings;

pub use error::{Error, RingError};

/// The extension module `vhost_user._core`.
#[cfg(feature = "python")]
#[pyo3::pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use super::bindings::{
        Backend, BatchHandler, Blocks, Complaints, DecodedMessage, DirtyLog, Frontend, FrontendQueue, GuestBuffer,
        InflightRecord, LatePages, Load, LoadResult, Memory, MessageInfo, Request, decode, messages, payloads,
        read_each, unpack_each, write_each, write_tail_each,
    };

    #[pymodule_init]
    fn init(module: &pyo3::Bound<'_, pyo3::types::PyModule>) -> pyo3::PyResult<()> {
        super::bindings::add_methods(module.py())?;
        super::bindings::add_tables(module)
    }
}
