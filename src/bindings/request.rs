//! One request of a driver, file-like, for Python.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyOSError, PyResourceWarning, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use pyo3::types::{PyBytes, PyList, PyMemoryView, PyTuple};
use rustix::io::Errno;

use super::buffer::GuestBuffer;
use super::errors;
use crate::backend::{Run, Vring};
use crate::memory::{Segment, for_range, transfer};
use crate::virtqueue::{Chain, Used};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// With a handler; completed when that returns.
    Handled,
    /// Kept for later, by `detach` or because nobody handles the queue.
    Detached,
    Completed,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    chain: Chain,
    read: u64,
    written: u64,
    /// Buffers that were handed out, and the line that asked for them.
    lent: Vec<(Py<GuestBuffer>, Py<PyAny>, u32)>,
}

/// A request: what the driver wrote for the device to read, and room for what the device answers.
///
/// It is completed when its handler returns, or by :meth:`complete` if it was detached. Virtio 1.3, section 2.6.
#[pyclass(frozen, module = "vhost_user")]
#[derive(Debug)]
pub struct Request {
    vring: Arc<Vring>,
    run: Arc<Run>,
    state: Mutex<State>,
}

impl Request {
    pub(super) fn new(vring: Arc<Vring>, run: Arc<Run>, chain: Chain, detached: bool) -> Self {
        let phase = if detached { Phase::Detached } else { Phase::Handled };
        Self { vring, run, state: Mutex::new(State { phase, chain, read: 0, written: 0, lent: Vec::new() }) }
    }

    /// The handler returned. What goes back to the driver, unless the request was completed or detached by then.
    pub(super) fn finish(&self, py: Python<'_>) -> Option<Used> {
        let mut state = self.lock(py);
        if state.phase != Phase::Handled {
            return None;
        }
        state.phase = Phase::Completed;
        let used = state.used();
        let lent = std::mem::take(&mut state.lent);
        drop(state);
        report_lent(py, &lent, self.vring.index());
        Some(used)
    }

    /// Give the request back to the driver's queue as if it had not been taken; or answer it, if that is too late.
    pub(super) fn put_back(&self, py: Python<'_>) {
        let mut state = self.lock(py);
        if self.vring.put_back(&self.run, &state.chain) {
            state.phase = Phase::Completed;
        } else {
            self.complete_now(py, state);
        }
    }

    /// The chain of a completed request, for another one.
    pub(super) fn recycle(&self, py: Python<'_>) -> Chain {
        std::mem::take(&mut self.lock(py).chain)
    }

    /// Wait for the state without the interpreter: whoever has it may be waiting for that.
    fn lock(&self, py: Python<'_>) -> MutexGuard<'_, State> {
        self.state.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner)
    }

    /// The same on a thread that has let go of the interpreter.
    fn lock_detached(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, if the request can still be worked on.
    fn open(&self, py: Python<'_>) -> PyResult<MutexGuard<'_, State>> {
        let state = self.lock(py);
        if state.phase == Phase::Completed {
            let index = self.vring.index();
            return Err(errors::request_completed(py, format!("queue {index}: the request was already completed")));
        }
        if !self.vring.is_current(&self.run) {
            let index = self.vring.index();
            return Err(errors::request_revoked(
                py,
                format!("queue {index}: the driver that made the request is gone; drop it"),
            ));
        }
        Ok(state)
    }

    fn complete_now(&self, py: Python<'_>, state: MutexGuard<'_, State>) {
        let mut state = state;
        state.phase = Phase::Completed;
        let used = state.used();
        let lent = std::mem::take(&mut state.lent);
        self.vring.complete(&self.run, &[used], std::slice::from_ref(&state.chain));
        drop(state);
        report_lent(py, &lent, self.vring.index());
    }

    fn lend<'py>(&self, py: Python<'py>, writable: bool) -> PyResult<Bound<'py, PyList>> {
        let state = self.open(py)?;
        let segments = if writable {
            rest_of(&state.chain, true, state.written)
        } else {
            rest_of(&state.chain, false, state.read)
        };
        drop(state);
        let (file, line) = caller(py);
        let views = PyList::empty(py);
        for segment in segments {
            let buffer = Bound::new(py, GuestBuffer::new(segment, writable, Arc::clone(&self.run)))?;
            views.append(PyMemoryView::from(buffer.as_any())?)?;
            self.lock(py).lent.push((buffer.unbind(), file.clone_ref(py), line));
        }
        Ok(views)
    }

    pub(super) fn write_bytes(&self, py: Python<'_>, bytes: &[u8]) -> PyResult<usize> {
        let mut state = self.open(py)?;
        let left = state.chain.writable() - state.written;
        if bytes.len() as u64 > left {
            return Err(self.overflow(py, bytes.len() as u64, left));
        }
        // SAFETY: `self.run` keeps the snapshot of the chain.
        unsafe { state.chain.write(state.written, bytes) };
        state.written += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn overflow(&self, py: Python<'_>, wanted: u64, left: u64) -> PyErr {
        errors::request_overflow(
            py,
            format!(
                "queue {}: {wanted} bytes do not fit in the {left} writable bytes that are left",
                self.vring.index()
            ),
        )
    }
}

#[pymethods]
impl Request {
    /// Index of the queue that the request came on.
    #[getter]
    fn queue(&self) -> u16 {
        self.vring.index()
    }

    /// Bytes that are left to read.
    #[getter]
    fn readable(&self, py: Python<'_>) -> u64 {
        let state = self.lock(py);
        state.chain.readable().saturating_sub(state.read)
    }

    /// Bytes of room that are left to write.
    #[getter]
    fn writable(&self, py: Python<'_>) -> u64 {
        let state = self.lock(py);
        state.chain.writable().saturating_sub(state.written)
    }

    /// Bytes written so far: what the driver will be told.
    #[getter]
    fn written(&self, py: Python<'_>) -> u64 {
        self.lock(py).written
    }

    /// Whether a device that was killed had begun with the request, or may have.
    #[getter]
    fn resubmitted(&self, py: Python<'_>) -> bool {
        self.lock(py).chain.resubmitted()
    }

    /// Whether the request was completed, or its driver is gone.
    #[getter]
    fn completed(&self, py: Python<'_>) -> bool {
        self.lock(py).phase == Phase::Completed || !self.vring.is_current(&self.run)
    }

    #[pyo3(signature = (size = -1, /), text_signature = "($self, size=-1, /)")]
    fn read<'py>(&self, py: Python<'py>, size: i64) -> PyResult<Bound<'py, PyBytes>> {
        let mut state = self.open(py)?;
        let left = state.chain.readable() - state.read;
        let length = u64::try_from(size).map_or(left, |size| size.min(left));
        let bytes = PyBytes::new_with(py, length as usize, |bytes| {
            // SAFETY: `self.run` keeps the snapshot of the chain.
            unsafe { state.chain.read(state.read, bytes) };
            Ok(())
        })?;
        state.read += length;
        Ok(bytes)
    }

    fn readinto(&self, py: Python<'_>, buffer: &Bound<'_, PyAny>) -> PyResult<usize> {
        let buffer = PyUntypedBuffer::get(buffer)?;
        let target = contiguous(&buffer)?;
        if buffer.readonly() {
            return Err(PyValueError::new_err("readinto needs a writable buffer"));
        }
        let mut state = self.open(py)?;
        let mut done = 0;
        for_range(state.chain.readable_segments(), state.read, buffer.len_bytes(), |segment| {
            // SAFETY: the segment is mapped as long as `self.run`; `target` has `len_bytes` bytes, of which the pieces
            // use disjoint parts in order, and the export keeps it alive. Python code that writes to it at the same
            // time gets a mixture, as with any buffer.
            unsafe { std::ptr::copy(segment.pointer.as_ptr(), target.add(done), segment.length) };
            done += segment.length;
        });
        state.read += done as u64;
        Ok(done)
    }

    pub(super) fn write(&self, py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<usize> {
        if let Ok(bytes) = data.cast::<PyBytes>() {
            return self.write_bytes(py, bytes.as_bytes());
        }
        let buffer = PyUntypedBuffer::get(data)?;
        let source = contiguous(&buffer)?;
        let length = buffer.len_bytes();
        let mut state = self.open(py)?;
        let left = state.chain.writable() - state.written;
        if length as u64 > left {
            return Err(self.overflow(py, length as u64, left));
        }
        let mut done = 0;
        for_range(state.chain.writable_segments(), state.written, length, |segment| {
            // SAFETY: as in `readinto`, with the direction turned around.
            unsafe { std::ptr::copy(source.add(done), segment.pointer.as_ptr(), segment.length) };
            done += segment.length;
        });
        state.written += done as u64;
        Ok(done)
    }

    /// Write `data` into the last writable bytes: where many device types have their status.
    fn write_tail(&self, py: Python<'_>, data: &[u8]) -> PyResult<()> {
        let mut state = self.open(py)?;
        let total = state.chain.writable();
        let length = data.len() as u64;
        let Some(start) = total.checked_sub(length).filter(|start| *start >= state.written) else {
            return Err(self.overflow(py, length, total - state.written));
        };
        // SAFETY: `self.run` keeps the snapshot of the chain.
        unsafe { state.chain.write(start, data) };
        state.written = total;
        Ok(())
    }

    fn unpack<'py>(&self, py: Python<'py>, format: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyTuple>> {
        let module = py.import(intern!(py, "struct"))?;
        let layout = if format.hasattr(intern!(py, "unpack_from"))? {
            format.clone()
        } else {
            module.call_method1(intern!(py, "Struct"), (format,))?
        };
        let size: u64 = layout.getattr(intern!(py, "size"))?.extract()?;
        let left = self.readable(py);
        if size > left {
            return Err(errors::request_underflow(
                py,
                format!("queue {}: {size} bytes are needed, {left} are left to read", self.vring.index()),
            ));
        }
        let bytes = self.read(py, size as i64)?;
        Ok(layout.call_method1(intern!(py, "unpack"), (bytes,))?.cast_into()?)
    }

    fn skip(&self, py: Python<'_>, count: u64) -> PyResult<()> {
        let mut state = self.open(py)?;
        let left = state.chain.readable() - state.read;
        if count > left {
            let index = self.vring.index();
            return Err(errors::request_underflow(py, format!("queue {index}: cannot skip {count} of {left} bytes")));
        }
        state.read += count;
        Ok(())
    }

    fn readable_buffers<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        self.lend(py, false)
    }

    fn writable_buffers<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        self.lend(py, true)
    }

    /// Count `count` bytes as written through :meth:`writable_buffers`.
    fn commit(&self, py: Python<'_>, count: u64) -> PyResult<()> {
        let mut state = self.open(py)?;
        let left = state.chain.writable() - state.written;
        if count > left {
            return Err(self.overflow(py, count, left));
        }
        state.written += count;
        Ok(())
    }

    #[pyo3(signature = (file, offset, count = None))]
    fn copy_from_file(&self, py: Python<'_>, file: FileDescriptor, offset: u64, count: Option<u64>) -> PyResult<u64> {
        let state = self.open(py)?;
        let left = state.chain.writable() - state.written;
        let count = count.unwrap_or(left);
        if count > left {
            return Err(self.overflow(py, count, left));
        }
        drop(state);
        py.detach(|| {
            let mut state = self.lock_detached();
            let segments = state.chain.writable_segments();
            // SAFETY: `self.run` keeps the snapshot of the chain.
            let done = unsafe { transfer::from_file(segments, state.written, count, file.borrow(), offset) }?;
            state.written += done;
            Ok(done)
        })
        .map_err(|errno| os_error("reading a file into a request", errno))
    }

    #[pyo3(signature = (file, offset, count = None))]
    fn copy_to_file(&self, py: Python<'_>, file: FileDescriptor, offset: u64, count: Option<u64>) -> PyResult<u64> {
        let state = self.open(py)?;
        let left = state.chain.readable() - state.read;
        let count = count.unwrap_or(left);
        if count > left {
            let index = self.vring.index();
            return Err(errors::request_underflow(
                py,
                format!("queue {index}: {count} bytes are needed, {left} are left"),
            ));
        }
        drop(state);
        py.detach(|| {
            let mut state = self.lock_detached();
            let segments = state.chain.readable_segments();
            // SAFETY: `self.run` keeps the snapshot of the chain.
            let done = unsafe { transfer::to_file(segments, state.read, count, file.borrow(), offset) }?;
            state.read += done;
            Ok(done)
        })
        .map_err(|errno| os_error("writing a request to a file", errno))
    }

    /// Keep the request after the handler returns: complete it later, from any thread.
    fn detach(slf: Bound<'_, Self>) -> PyResult<Bound<'_, Self>> {
        slf.get().open(slf.py())?.phase = Phase::Detached;
        Ok(slf)
    }

    pub(super) fn complete(&self, py: Python<'_>) -> PyResult<()> {
        let state = self.open(py)?;
        self.complete_now(py, state);
        Ok(())
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        let state = self.lock(py);
        let phase = match state.phase {
            Phase::Handled => "",
            Phase::Detached => ", detached",
            Phase::Completed => ", completed",
        };
        format!(
            "<Request on queue {}: {} bytes left to read, {} left to write{phase}>",
            self.vring.index(),
            state.chain.readable().saturating_sub(state.read),
            state.chain.writable().saturating_sub(state.written)
        )
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if state.phase != Phase::Completed && self.vring.is_current(&self.run) {
            // The driver would wait for ever.
            let used = state.used();
            self.vring.complete(&self.run, &[used], std::slice::from_ref(&state.chain));
            self.vring.count_error();
            log::warn!(
                "queue {}: a request was dropped without complete(); it was answered with {} bytes",
                self.vring.index(),
                used.written
            );
        }
    }
}

impl State {
    fn used(&self) -> Used {
        // A chain holds no more bytes than this can say; that was checked when it was taken.
        Used { head: self.chain.head(), written: self.written as u32 }
    }
}

/// A descriptor, or something with a fileno().
#[derive(Debug)]
struct FileDescriptor(i32);

impl FileDescriptor {
    fn borrow(&self) -> BorrowedFd<'_> {
        // SAFETY: the caller of the method holds the file open; a number that was closed makes the system call fail.
        unsafe { BorrowedFd::borrow_raw(self.0) }
    }
}

impl<'py> FromPyObject<'_, 'py> for FileDescriptor {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let number: i32 = match object.extract() {
            Ok(number) => number,
            Err(_) => object.call_method0(intern!(object.py(), "fileno"))?.extract()?,
        };
        if number < 0 { Err(PyValueError::new_err("a file descriptor is not negative")) } else { Ok(Self(number)) }
    }
}

fn rest_of(chain: &Chain, writable: bool, from: u64) -> Vec<Segment> {
    let segments = if writable { chain.writable_segments() } else { chain.readable_segments() };
    let mut rest = Vec::with_capacity(segments.len());
    for_range(segments, from, usize::MAX, |segment| rest.push(segment));
    rest
}

fn contiguous(buffer: &PyUntypedBuffer) -> PyResult<*mut u8> {
    if buffer.is_c_contiguous() {
        Ok(buffer.buf_ptr().cast())
    } else {
        Err(PyValueError::new_err("the buffer is not contiguous; copy it with bytes() first"))
    }
}

fn os_error(doing: &str, errno: Errno) -> PyErr {
    PyOSError::new_err((errno.raw_os_error(), format!("{doing}: {errno}")))
}

/// The Python line that is running: its code object, and its number.
fn caller(py: Python<'_>) -> (Py<PyAny>, u32) {
    let frame = || -> PyResult<(Py<PyAny>, u32)> {
        let frame = py.import(intern!(py, "sys"))?.call_method0(intern!(py, "_getframe"))?;
        let line = frame.getattr(intern!(py, "f_lineno"))?.extract()?;
        Ok((frame.getattr(intern!(py, "f_code"))?.unbind(), line))
    };
    frame().unwrap_or_else(|_| (py.None(), 0))
}

/// Tell of buffers that outlive their request: what they show belongs to the driver again.
fn report_lent(py: Python<'_>, lent: &[(Py<GuestBuffer>, Py<PyAny>, u32)], queue: u16) {
    for (_, code, line) in lent.iter().filter(|(buffer, _, _)| buffer.get().is_exported()) {
        let warn = || -> PyResult<()> {
            let message = format!(
                "queue {queue}: a buffer of a completed request is still in use; the driver may change what it shows. \
                 Copy it, or let go of it before the request completes"
            );
            let file = code.bind(py).getattr(intern!(py, "co_filename"))?;
            let category = py.get_type::<PyResourceWarning>();
            py.import(intern!(py, "warnings"))?.call_method1("warn_explicit", (message, category, file, *line))?;
            Ok(())
        };
        if let Err(error) = warn() {
            error.write_unraisable(py, None);
        }
    }
}
