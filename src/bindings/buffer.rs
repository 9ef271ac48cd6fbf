//! Guest memory as a Python buffer.

use std::ffi::c_int;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;

use crate::backend::Run;
use crate::memory::Segment;

/// A contiguous piece of guest memory that Python may look at, and write to if the device may.
///
/// It owns a share of the mapping: whatever is made from it, a memoryview, a slice, a numpy array, keeps it and with
/// it the mapping, so that nothing can dangle, however long it lives.
#[pyclass(frozen, module = "vhost_user._core")]
#[derive(Debug)]
pub struct GuestBuffer {
    segment: Segment,
    writable: bool,
    /// How many exports are alive.
    exports: AtomicUsize,
    /// Keeps the mapping.
    _run: Arc<Run>,
}

// SAFETY: a GuestBuffer is an address range and a count; the memory is shared with another process in any case.
unsafe impl Sync for GuestBuffer {}

impl GuestBuffer {
    pub(super) fn new(segment: Segment, writable: bool, run: Arc<Run>) -> Self {
        Self { segment, writable, exports: AtomicUsize::new(0), _run: run }
    }

    pub(super) fn is_exported(&self) -> bool {
        self.exports.load(Ordering::Relaxed) > 0
    }
}

#[pymethods]
impl GuestBuffer {
    fn __len__(&self) -> usize {
        self.segment.length
    }

    fn __repr__(&self) -> String {
        let access = if self.writable { "writable" } else { "read-only" };
        format!("<GuestBuffer of {} bytes, {access}>", self.segment.length)
    }

    /// # Safety
    /// `view` is the interpreter's, to be filled in.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        if view.is_null() {
            return Err(PyBufferError::new_err("the view is null"));
        }
        let this = slf.get();
        // SAFETY: `view` is valid by the protocol. The bytes are mapped as long as this object lives, and FillInfo gives
        // the view a reference to it. A request for a writable view of a read-only buffer is refused by FillInfo.
        let result = unsafe {
            ffi::PyBuffer_FillInfo(
                view,
                slf.as_ptr(),
                this.segment.pointer.as_ptr().cast(),
                this.segment.length as ffi::Py_ssize_t,
                c_int::from(!this.writable),
                flags,
            )
        };
        if result != 0 {
            // SAFETY: a view without an owner is what the protocol asks for on failure.
            unsafe { (*view).obj = ptr::null_mut() };
            return Err(PyErr::fetch(slf.py()));
        }
        this.exports.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// # Safety
    /// `_view` was filled by `__getbuffer__`.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.exports.fetch_sub(1, Ordering::Relaxed);
    }
}
