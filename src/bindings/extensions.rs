//! What a device implements beyond what every device has: the methods of `vhost_user._runtime.Runtime` for it.

use std::os::fd::{BorrowedFd, IntoRawFd, OwnedFd};

use pyo3::prelude::*;
use pyo3::types::{PyAny, PyBytes};

use super::backend::Caller;
use crate::backend::Extensions;
use crate::protocol::{CryptoSession, Uuid};

impl Extensions for Caller<'_, '_> {
    fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), String> {
        let mac = PyBytes::new(self.py, &mac);
        self.ask("extension", ("on_rarp", mac), done)
    }

    fn set_mtu(&mut self, mtu: u16) -> Result<(), String> {
        self.ask("extension", ("on_mtu", mtu), done)
    }

    fn create_crypto_session(&mut self, session: &CryptoSession) -> Result<i64, String> {
        let parameters = PyBytes::new(self.py, &session.parameters);
        let arguments = ("_create_session", session.operation, parameters);
        self.ask("extension", arguments, |number| number.extract())
    }

    fn close_crypto_session(&mut self, session: u64) -> Result<(), String> {
        self.ask("extension", ("close_session", session), done)
    }

    fn set_gpu_socket(&mut self, socket: OwnedFd) -> Result<(), String> {
        // The first thing that is done there is to make a Python socket of it.
        self.ask("extension", ("_set_gpu_socket", socket.into_raw_fd()), done)
    }

    fn shared_object(&mut self, uuid: Uuid) -> Result<Option<OwnedFd>, String> {
        let uuid = PyBytes::new(self.py, &uuid.0);
        let file = |number: Bound<'_, PyAny>| number.extract::<Option<i32>>()?.map(duplicate).transpose();
        self.ask("extension", ("_shared_object", uuid), file)
    }
}

fn done(_: Bound<'_, PyAny>) -> PyResult<()> {
    Ok(())
}

/// A descriptor of its own for the file that `number` names.
pub(super) fn duplicate(number: i32) -> PyResult<OwnedFd> {
    if number < 0 {
        return Err(pyo3::exceptions::PyValueError::new_err("a file descriptor is not negative"));
    }
    // SAFETY: whoever names a descriptor here holds the file open during the call; a closed number makes dup fail.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    Ok(borrowed.try_clone_to_owned()?)
}
