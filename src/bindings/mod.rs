//! Thin classes over the core, for the `vhost_user` Python package.
//!
//! Every class is frozen: what changes is behind a lock or an atomic, so that a free-threaded interpreter can use them
//! too. No lock of the core is held while Python runs, but for the one of the thread that runs a device's loop, for which
//! nobody waits; and none is waited for that a thread without the interpreter might hold for long.

mod backend;
mod batch;
mod buffer;
mod codec;
mod complaints;
mod direct;
mod disk;
mod errors;
mod extensions;
mod frontend;
mod layout;
mod load;
mod mailbox;
mod request;
mod reservation;
mod together;
mod worker;

pub use backend::Backend;
pub use batch::BatchHandler;
pub use buffer::GuestBuffer;
pub use codec::{DecodedMessage, MessageInfo, decode, messages, payloads};
pub use complaints::Complaints;
pub use direct::add_methods;
pub use disk::Blocks;
pub use frontend::{DirtyLog, Frontend, FrontendQueue, InflightRecord, LatePages, Memory, add_tables};
pub use load::{Load, LoadResult};
pub use request::Request;
pub use together::{read_each, unpack_each, write_each, write_tail_each};

/// Whether the interpreter has a lock, so that only one thread at a time runs what has a [`pyo3::Python`].
///
/// The free-threaded build has none, not even when it says that it does: it takes one while it imports an extension
/// module, say, and lets go of it again.
#[inline]
fn has_lock(py: pyo3::Python<'_>) -> bool {
    use pyo3::types::PyAnyMethods;

    static HAS_LOCK: pyo3::sync::PyOnceLock<bool> = pyo3::sync::PyOnceLock::new();
    *HAS_LOCK.get_or_init(py, || {
        let flags = py.import("sys").and_then(|sys| sys.getattr("abiflags")?.extract::<String>());
        flags.is_ok_and(|flags| !flags.contains('t'))
    })
}

/// Send the core's log records to Python's `logging`, below the logger "vhost_user". A session begins with it: nothing
/// is logged before there is one, and `logging` takes longer to import than the core.
fn connect_logging(py: pyo3::Python<'_>) -> pyo3::PyResult<()> {
    static CONNECTED: pyo3::sync::PyOnceLock<()> = pyo3::sync::PyOnceLock::new();
    CONNECTED.get_or_try_init(py, || {
        let installed = pyo3_log::Logger::new(py, pyo3_log::Caching::Loggers)?.install();
        // Another copy of the core in this process has done it already.
        drop(installed);
        Ok::<(), pyo3::PyErr>(())
    })?;
    choose_log_level(py)
}

/// Make records of single messages only if somebody wants them now: to ask Python for each would run its signal handlers
/// in the middle of a message, and lose a KeyboardInterrupt.
fn choose_log_level(py: pyo3::Python<'_>) -> pyo3::PyResult<()> {
    use pyo3::types::PyAnyMethods;

    let logging = py.import("logging")?;
    let logger = logging.call_method1("getLogger", ("vhost_user",))?;
    let wanted = logger.call_method1("isEnabledFor", (logging.getattr("DEBUG")?,))?.is_truthy()?;
    log::set_max_level(if wanted { log::LevelFilter::Debug } else { log::LevelFilter::Info });
    Ok(())
}
