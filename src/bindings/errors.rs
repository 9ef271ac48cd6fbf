//! The one way from the core's error to Python's exceptions, which `vhost_user.errors` defines.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

use crate::error::Error;

macro_rules! exceptions {
    ($($function:ident => $class:literal;)+) => {
        $(
            pub(super) fn $function(py: Python<'_>, message: impl Into<String>) -> PyErr {
                static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
                match CLASS.import(py, "vhost_user.errors", $class) {
                    Ok(class) => PyErr::from_type(class.clone(), (message.into(),)),
                    Err(error) => error,
                }
            }
        )+
    };
}

exceptions! {
    protocol_error => "ProtocolError";
    peer_timeout => "PeerTimeout";
    peer_closed => "PeerClosed";
    state_error => "StateError";
    request_overflow => "RequestOverflow";
    request_underflow => "RequestUnderflow";
    request_completed => "RequestCompleted";
    request_revoked => "RequestRevoked";
}

/// The exception for an error of the core.
pub(super) fn to_python(py: Python<'_>, error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::Framing(_) | Error::Refused { .. } | Error::Ring { .. } | Error::Memory(_) => {
            protocol_error(py, message)
        }
        Error::Timeout(_) => peer_timeout(py, message),
        Error::Closed(_) => peer_closed(py, message),
        Error::State(_) | Error::AnotherProcess(_) => state_error(py, message),
        Error::Interrupted => pyo3::exceptions::PyInterruptedError::new_err(message),
        Error::Os { context, source } => match source.raw_os_error() {
            Some(code) => pyo3::exceptions::PyOSError::new_err((code, format!("{context}: {source}"))),
            None => pyo3::exceptions::PyOSError::new_err(message),
        },
    }
}
