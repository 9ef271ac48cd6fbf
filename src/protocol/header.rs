//! The 12 bytes that precede every payload, on the main channel and on the back-end channel alike.

use std::fmt;

use crate::error::Error;

/// Bytes of a header on the wire.
pub const HEADER_SIZE: usize = 12;

/// The longest payload accepted, in bytes: rust-vmm's limit, and more than any message needs.
pub const MAX_PAYLOAD: usize = 4096;

/// The most descriptors that one message may carry: one for each region of SET_MEM_TABLE.
pub const MAX_DESCRIPTORS: usize = 8;

/// The header's flag word.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Flags(pub u32);

impl Flags {
    const VERSION_MASK: u32 = 0x3;
    const VERSION: u32 = 0x1;
    const REPLY: u32 = 0x4;
    const NEED_REPLY: u32 = 0x8;

    /// A request that wants no acknowledgement.
    pub const REQUEST: Self = Self(Self::VERSION);
    /// A request that wants one.
    pub const REQUEST_NEED_REPLY: Self = Self(Self::VERSION | Self::NEED_REPLY);
    /// Every reply. QEMU, User-Mode Linux and DPDK compare with exactly this word.
    pub const ANSWER: Self = Self(Self::VERSION | Self::REPLY);

    #[must_use]
    pub fn need_reply(self) -> bool {
        self.0 & Self::NEED_REPLY != 0
    }

    fn is_reply(self) -> bool {
        self.0 & Self::REPLY != 0
    }

    fn is_known(self) -> bool {
        self.0 & Self::VERSION_MASK == Self::VERSION
            && self.0 & !(Self::VERSION_MASK | Self::REPLY | Self::NEED_REPLY) == 0
    }
}

impl fmt::Debug for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A decoded header. Its integers are in the host's byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub request: u32,
    pub flags: Flags,
    pub size: u32,
}

impl Header {
    #[must_use]
    pub fn decode(bytes: &[u8; HEADER_SIZE]) -> Self {
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Self { request: word(0), flags: Flags(word(4)), size: word(8) }
    }

    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.request.to_ne_bytes());
        out.extend_from_slice(&self.flags.0.to_ne_bytes());
        out.extend_from_slice(&self.size.to_ne_bytes());
    }

    /// Refuse a header after which the stream cannot be followed: the payload would be longer than any message's.
    pub fn check_size(&self) -> Result<(), Error> {
        if self.size as usize > MAX_PAYLOAD {
            return Err(Error::Framing(format!(
                "a message (request {}) announces {} bytes of payload; at most {MAX_PAYLOAD} are accepted",
                self.request, self.size
            )));
        }
        Ok(())
    }

    /// Refuse what is not a request of version 1.
    pub fn check_request(&self) -> Result<(), Error> {
        if !self.flags.is_known() || self.flags.is_reply() {
            return Err(Error::Framing(format!(
                "request {} has the flags {:?}; a request has 0x1, or 0x9 to ask for an acknowledgement",
                self.request, self.flags
            )));
        }
        Ok(())
    }

    /// Refuse what is not an answer to `request`. NEED_REPLY is tolerated: libvhost-user leaves it set.
    pub fn check_reply(&self, request: u32, name: &'static str) -> Result<(), Error> {
        if !self.flags.is_known() || !self.flags.is_reply() || self.request != request {
            return Err(Error::Framing(format!(
                "{name}: expected a reply to request {request} with the flags 0x5, got request {} with {:?}",
                self.request, self.flags
            )));
        }
        Ok(())
    }
}
