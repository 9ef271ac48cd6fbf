//! The wire format: bytes to typed messages and back.
//!
//! One row of the table in `requests` describes a message completely; the decoder, the validator, the names in errors
//! and traces, and the table in the documentation all read it. Nothing here knows of sockets, memory or Python.
//!
//! vhost-user specification, "Message Specification".

mod features;
mod header;
mod layout;
mod payload;
mod requests;
#[cfg(test)]
pub(crate) mod tests;

pub use features::{ProtocolFeatures, VirtioFeatures};
pub use header::{Flags, HEADER_SIZE, Header, MAX_DESCRIPTORS, MAX_PAYLOAD};
pub use layout::{Field, Layout, Shape, Value};
pub use payload::{
    Config, CryptoSession, DeviceState, Empty, Ignored, Inflight, Iotlb, Log, LogBase, MemoryTable, Payload, Region,
    ShmemConfig, ShmemMap, SingleRegion, U64, Uuid, VringAddress, VringArea, VringDescriptor, VringState,
};
pub use requests::{
    Answer, BackendMessage, BackendRequest, Descriptors, FrontendMessage, FrontendRequest, Gate, Info, Rings,
};
