//! How many lines of a log a driver is worth.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use pyo3::prelude::*;

use crate::backend;

/// Lets the first lines of one kind into a log, and then one in a second.
#[pyclass(frozen, module = "vhost_user._core")]
#[derive(Debug, Default)]
pub struct Complaints(Mutex<backend::Complaints>);

#[pymethods]
impl Complaints {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// How many lines were left out since the last one, if there may be another now; None if there may not, and this one
    /// is left out as well.
    fn due(&self) -> Option<u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).due(Instant::now())
    }
}
