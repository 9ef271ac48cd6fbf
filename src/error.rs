//! What can go wrong, in words that tell the person what was expected, what came, and on which message or queue.

use std::io;

/// The one error of the core. `bindings` turns it into Python exceptions.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The byte stream cannot be followed any further: the connection has to close.
    #[error("{0}")]
    Framing(String),

    /// One message is refused. It changed nothing, and the connection may go on.
    #[error("{message}: {reason}")]
    Refused { message: &'static str, reason: String },

    /// A ring cannot be used any further; the others go on.
    #[error("queue {queue}: {reason}")]
    Ring { queue: u16, reason: RingError },

    /// Guest memory that was promised is not there.
    #[error("{0}")]
    Memory(String),

    /// The peer did not answer, or did not read, in time.
    #[error("{0}")]
    Timeout(String),

    /// The peer closed the connection between two messages.
    #[error("{0}")]
    Closed(String),

    /// The caller asked for something that cannot be done now.
    #[error("{0}")]
    State(String),

    /// What was asked for is another process's to do: this one was forked from it.
    #[error("{0} belongs to another process, which this one was forked from; make another one")]
    AnotherProcess(&'static str),

    /// Somebody did not want to wait any longer.
    #[error("interrupted while waiting for the peer")]
    Interrupted,

    #[error("{context}: {source}")]
    Os { context: String, source: io::Error },
}

impl Error {
    /// For `map_err` on a system call: `what` names the call and what it was for.
    pub fn os(context: impl Into<String>) -> impl FnOnce(rustix::io::Errno) -> Self {
        let context = context.into();
        move |errno| Self::Os { context, source: errno.into() }
    }
}

/// Why a ring broke, with the descriptor or the index that broke it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    #[error("the available index went from {from} to {to}, but the ring has room for {free} more")]
    IndexJump { from: u16, to: u16, free: u16 },

    #[error("the available ring names descriptor {head}; the table has {size}")]
    HeadOutOfRange { head: u16, size: u16 },

    #[error("descriptor {descriptor} goes on with descriptor {next}; the table has {size}")]
    NextOutOfRange { descriptor: u16, next: u16, size: u32 },

    #[error("the chain at descriptor {head} has more than {limit} descriptors: it loops, or is too long")]
    ChainTooLong { head: u16, limit: u32 },

    #[error("descriptor {descriptor} spans {start:#x}..{end:#x}, outside guest memory ({memory})")]
    OutsideMemory { descriptor: u16, start: u64, end: u128, memory: String },

    /// Not an error of the ring yet: the front-end has to be asked.
    #[error("I/O address {iova:#x} is not mapped (for {})", doing(*writable))]
    NotMapped { iova: u64, writable: bool },

    #[error("I/O address {iova:#x} is not mapped (for {}): {reason}", doing(*writable))]
    Untranslated { iova: u64, writable: bool, reason: String },

    #[error("descriptor {descriptor} is for {}, which I/O address {iova:#x} is not mapped for", doing(*writable))]
    NotPermitted { descriptor: u16, iova: u64, writable: bool },

    #[error("descriptor {descriptor} is readable but follows a writable one")]
    ReadableAfterWritable { descriptor: u16 },

    #[error("descriptor {descriptor} has the flags {flags:#x}: INDIRECT must not be combined with NEXT")]
    IndirectWithNext { descriptor: u16, flags: u16 },

    #[error("descriptor {descriptor} of an indirect table is itself INDIRECT")]
    NestedIndirect { descriptor: u16 },

    #[error("descriptor {descriptor} is INDIRECT, which the driver did not negotiate")]
    IndirectNotNegotiated { descriptor: u16 },

    #[error(
        "the indirect table of descriptor {descriptor} has {length} bytes; a multiple of 16 up to {limit} is needed"
    )]
    IndirectLength { descriptor: u16, length: u32, limit: u32 },

    #[error("the chain at descriptor {head} holds {bytes} bytes or more; the queue takes {limit}")]
    ChainTooLarge { head: u16, bytes: u64, limit: u32 },

    #[error(
        "the chain at descriptor {descriptor} has the buffer id {id}; ids are less than {size}, as many as entries"
    )]
    IdOutOfRange { descriptor: u16, id: u16, size: u16 },

    #[error("the chain at descriptor {descriptor} has the buffer id {id}, which another chain in flight has")]
    IdInFlight { descriptor: u16, id: u16 },

    #[error("a ring cannot have {size} entries: a split one has a power of two up to 32768, a packed one 1 to 32768")]
    ImpossibleSize { size: u16 },

    #[error("the ring of {size} entries cannot start at base {base:#x}")]
    ImpossibleBase { base: u32, size: u16 },

    #[error("the memory of the ring is gone: {0}")]
    MemoryGone(String),

    #[error("the in-flight record: {0}")]
    InflightRecord(String),

    #[error("a chain of {needed} descriptors does not fit: {free} are free")]
    NoRoom { needed: usize, free: u16 },

    #[error("the used index went from {from} to {to}, but the device has {outstanding} chains")]
    UsedIndexJump { from: u16, to: u16, outstanding: u16 },

    #[error("the used ring gives back {batch} chains by returning descriptor {head}, but its index tells of {done}")]
    UsedBatch { head: u16, batch: u16, done: u16 },

    #[error("the used ring returns descriptor {head}, where no chain begins that the device has")]
    UsedNotSubmitted { head: u32 },

    #[error(
        "the used ring says that {written} bytes were written to the chain at descriptor {head}, which has {writable}"
    )]
    UsedTooLong { head: u16, written: u32, writable: u64 },

    #[error("the back-end reports that the ring is broken")]
    ReportedBroken,
}

/// What the device does with a buffer.
fn doing(writable: bool) -> &'static str {
    if writable { "writing" } else { "reading" }
}
