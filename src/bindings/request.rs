//! One request of a driver, file-like, for Python.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyOSError, PyResourceWarning, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyInt, PyList, PyMemoryView, PyTuple};
use rustix::io::Errno;

use super::buffer::GuestBuffer;
use super::errors;
use super::layout::Layout;
use super::reservation::{Reservation, Reserved};
use crate::backend::{Run, Vring};
use crate::memory::{Segment, for_range, transfer};
use crate::virtqueue::{Chain, Used};

/// Up to this many bytes are taken from the page cache, if they are there, by a thread that keeps the interpreter: to let
/// go of it and to take it again is as much work.
pub(super) const WITHOUT_WAITING: u64 = 16 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// With a handler; completed when that returns.
    Handled,
    /// Kept for later, by `detach` or because nobody handles the queue.
    Detached,
    Completed,
}

#[derive(Debug)]
pub(super) struct State {
    phase: Phase,
    /// The life of the ring that the chain came from; it keeps the memory of the chain. None once it is completed, but for
    /// a request that waits for the next chain of its batch.
    run: Option<Arc<Run>>,
    pub(super) chain: Chain,
    pub(super) read: u64,
    pub(super) written: u64,
    /// Buffers that were handed out, and the line that asked for them.
    lent: Lent,
}

type Lent = Vec<(Py<GuestBuffer>, Py<PyAny>, u32)>;

/// A request: what the driver wrote for the device to read, and room for what the device answers.
///
/// It is completed when its handler returns, or by :meth:`complete` if it was detached. Virtio 1.3, section 2.6.
#[pyclass(frozen, module = "vhost_user")]
#[derive(Debug)]
pub struct Request {
    vring: Arc<Vring>,
    state: Reservation<State>,
}

impl Request {
    pub(super) fn new(vring: Arc<Vring>, run: Arc<Run>, chain: Chain, detached: bool) -> Self {
        let phase = if detached { Phase::Detached } else { Phase::Handled };
        let state = State { phase, run: Some(run), chain, read: 0, written: 0, lent: Vec::new() };
        Self { vring, state: Reservation::new(state) }
    }

    /// Make a completed request into the next one of the same queue.
    ///
    /// # Safety
    /// Nobody else has the request.
    pub(super) unsafe fn renew(&self, run: &Arc<Run>, chain: Chain) {
        // SAFETY: as the caller vouches.
        let state = unsafe { self.state.alone() };
        debug_assert!(state.phase == Phase::Completed && state.lent.is_empty());
        if state.run.as_ref().is_none_or(|last| !Arc::ptr_eq(last, run)) {
            state.run = Some(Arc::clone(run));
        }
        state.phase = Phase::Handled;
        (state.read, state.written) = (0, 0);
        state.chain = chain;
    }

    /// The handler returned, and nobody has the request: as [`finish`](Self::finish), with the chain going to `spare`, and
    /// it can be made into the next one of its batch, if nothing of it is lent.
    ///
    /// # Safety
    /// Nobody else has the request.
    #[inline]
    pub(super) unsafe fn finish_alone(&self, spare: &mut Vec<Chain>) -> Option<Used> {
        // SAFETY: as the caller vouches.
        let state = unsafe { self.state.alone() };
        if state.phase != Phase::Handled || !state.lent.is_empty() {
            return None;
        }
        state.phase = Phase::Completed;
        spare.push(state.chain.take());
        Some(state.used())
    }

    /// Whether the request is completed. If it is, it keeps no memory from here on.
    ///
    /// # Safety
    /// Nobody else has the request.
    pub(super) unsafe fn rest(&self) -> bool {
        // SAFETY: as the caller vouches.
        let state = unsafe { self.state.alone() };
        if state.phase == Phase::Completed {
            state.run = None;
        }
        state.phase == Phase::Completed
    }

    /// The handler returned. What goes back to the driver, and the chain for another request, unless the request was
    /// completed or detached by then.
    pub(super) fn finish(&self, py: Python<'_>) -> Option<(Used, Chain)> {
        let mut state = self.lock(py);
        if state.phase != Phase::Handled {
            return None;
        }
        let (used, lent, _run) = state.complete();
        let chain = state.chain.take();
        drop(state);
        if !lent.is_empty() {
            report_lent(py, &lent, self.vring.index());
        }
        Some((used, chain))
    }

    /// Whether the request waits for its handler to return.
    pub(super) fn is_handled(&self, py: Python<'_>) -> bool {
        self.lock(py).phase == Phase::Handled
    }

    /// Wait for the state without the interpreter: whoever has it may be waiting for that.
    #[inline(always)]
    fn lock(&self, py: Python<'_>) -> Reserved<'_, State> {
        self.state.try_reserve(py).unwrap_or_else(|| self.state.reserve(py))
    }

    /// The state, if the request can still be worked on.
    #[inline(always)]
    fn open(&self, py: Python<'_>) -> PyResult<Reserved<'_, State>> {
        let state = self.lock(py);
        if state.is_current(&self.vring) { Ok(state) } else { Err(self.is_over(py, state)) }
    }

    #[cold]
    #[inline(never)]
    fn is_over(&self, py: Python<'_>, state: Reserved<'_, State>) -> PyErr {
        let is_completed = state.phase == Phase::Completed;
        drop(state);
        let index = self.vring.index();
        if is_completed {
            errors::request_completed(py, format!("queue {index}: the request was already completed"))
        } else {
            errors::request_revoked(py, format!("queue {index}: the driver that made the request is gone; drop it"))
        }
    }

    fn complete_now(&self, py: Python<'_>, state: Reserved<'_, State>) {
        let mut state = state;
        let (used, lent, run) = state.complete();
        if let Some(run) = run {
            self.vring.complete(&run, &[used], std::slice::from_ref(&state.chain));
        }
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
        // `open` gave it to us with its run.
        let Some(run) = state.run.clone() else { return Ok(PyList::empty(py)) };
        drop(state);
        let (file, line) = caller(py);
        let views = PyList::empty(py);
        for segment in segments {
            let buffer = Bound::new(py, GuestBuffer::new(segment, writable, Arc::clone(&run)))?;
            views.append(PyMemoryView::from(buffer.as_any())?)?;
            self.lock(py).lent.push((buffer.unbind(), file.clone_ref(py), line));
        }
        Ok(views)
    }

    fn overflow(&self, py: Python<'_>, wanted: u64, left: u64) -> PyErr {
        overflow(py, self.vring.index(), wanted, left)
    }

    /// The values of `layout`; in the last tuple again, if that is `expendable` and nobody has it.
    pub(super) fn unpack_layout<'py>(
        &self,
        py: Python<'py>,
        layout: &Layout,
        expendable: bool,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let size = layout.size();
        let mut state = self.open(py)?;
        let left = state.chain.readable() - state.read;
        if size as u64 > left {
            drop(state);
            return Err(self.underflow(py, size, left));
        }
        layout.read(py, expendable, |bytes| {
            // SAFETY: `state.run` keeps the snapshot of the chain.
            unsafe { state.chain.read(state.read, bytes) };
            state.read += size as u64;
            drop(state);
        })
    }

    #[cold]
    fn underflow(&self, py: Python<'_>, wanted: usize, left: u64) -> PyErr {
        let index = self.vring.index();
        errors::request_underflow(py, format!("queue {index}: {wanted} bytes are needed, {left} are left to read"))
    }

    pub(super) fn write_source(&self, py: Python<'_>, source: &Source<'_, '_>) -> PyResult<usize> {
        let mut state = self.open(py)?;
        let left = state.chain.writable() - state.written;
        if source.len() as u64 > left {
            drop(state);
            return Err(self.overflow(py, source.len() as u64, left));
        }
        // SAFETY: `state.run` keeps the snapshot of the chain, and there is room.
        let done = unsafe { source.copy_to(&state.chain, state.written) };
        state.written += done as u64;
        Ok(done)
    }

    // --- The methods that `direct` gives the class -------------------------------------------------------------------

    pub(super) fn read<'py>(&self, py: Python<'py>, size: i64) -> PyResult<Bound<'py, PyBytes>> {
        let mut state = self.open(py)?;
        let left = state.chain.readable() - state.read;
        let length = u64::try_from(size).map_or(left, |size| size.min(left));
        let bytes = PyBytes::new_with(py, length as usize, |bytes| {
            // SAFETY: `state.run` keeps the snapshot of the chain.
            unsafe { state.chain.read(state.read, bytes) };
            Ok(())
        })?;
        state.read += length;
        Ok(bytes)
    }

    pub(super) fn write(&self, py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<usize> {
        self.write_source(py, &Source::new(data)?)
    }

    /// Write `data` into the last writable bytes: where many device types have their status.
    pub(super) fn write_tail(&self, py: Python<'_>, data: &[u8]) -> PyResult<()> {
        let mut state = self.open(py)?;
        let total = state.chain.writable();
        let length = data.len() as u64;
        let Some(start) = total.checked_sub(length).filter(|start| *start >= state.written) else {
            return Err(self.overflow(py, length, total - state.written));
        };
        // SAFETY: `state.run` keeps the snapshot of the chain.
        unsafe { state.chain.write(start, data) };
        state.written = total;
        Ok(())
    }

    pub(super) fn unpack<'py>(&self, py: Python<'py>, format: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyTuple>> {
        Layout::with(format, |layout| self.unpack_layout(py, layout, true))
    }
}

#[pymethods]
impl Request {
    /// Index of the queue that the request came on.
    #[getter]
    pub(super) fn queue(&self) -> u16 {
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
        !self.lock(py).is_current(&self.vring)
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
            // SAFETY: the segment is mapped as long as `state.run`; `target` has `len_bytes` bytes, of which the pieces
            // use disjoint parts in order, and the export keeps it alive. Python code that writes to it at the same
            // time gets a mixture, as with any buffer.
            unsafe { std::ptr::copy(segment.pointer.as_ptr(), target.add(done), segment.length) };
            done += segment.length;
        });
        state.read += done as u64;
        Ok(done)
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
        let mut state = self.open(py)?;
        let left = state.chain.writable() - state.written;
        let count = count.unwrap_or(left);
        if count > left {
            return Err(self.overflow(py, count, left));
        }
        if count <= WITHOUT_WAITING {
            let segments = state.chain.writable_segments();
            // SAFETY: `state.run` keeps the snapshot of the chain.
            let done = unsafe { transfer::from_cache(segments, state.written, count, file.borrow(), offset) };
            if done == Some(count) {
                state.written += count;
                return Ok(count);
            }
        }
        let transfer = move || {
            let segments = state.chain.writable_segments();
            // SAFETY: `state.run` keeps the snapshot of the chain, and is there as long as we have the state.
            let done = unsafe { transfer::from_file(segments, state.written, count, file.borrow(), offset) }?;
            state.written += done;
            Ok(done)
        };
        py.detach(transfer).map_err(|errno| failed("reading a file into a request", errno))
    }

    #[pyo3(signature = (file, offset, count = None))]
    fn copy_to_file(&self, py: Python<'_>, file: FileDescriptor, offset: u64, count: Option<u64>) -> PyResult<u64> {
        let mut state = self.open(py)?;
        let left = state.chain.readable() - state.read;
        let count = count.unwrap_or(left);
        if count > left {
            let index = self.vring.index();
            return Err(errors::request_underflow(
                py,
                format!("queue {index}: {count} bytes are needed, {left} are left"),
            ));
        }
        let transfer = move || {
            let segments = state.chain.readable_segments();
            // SAFETY: as in `copy_from_file`.
            let done = unsafe { transfer::to_file(segments, state.read, count, file.borrow(), offset) }?;
            state.read += done;
            Ok(done)
        };
        py.detach(transfer).map_err(|errno| failed("writing a request to a file", errno))
    }

    /// Keep the request after the handler returns: complete it later, from any thread.
    fn detach(slf: Bound<'_, Self>) -> PyResult<Bound<'_, Self>> {
        slf.get().open(slf.py())?.phase = Phase::Detached;
        Ok(slf)
    }

    fn complete(&self, py: Python<'_>) -> PyResult<()> {
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
        let state = self.state.get_mut();
        if state.phase == Phase::Completed {
            return;
        }
        if let Some(run) = state.run.take().filter(|run| self.vring.is_current(run)) {
            // The driver would wait for ever.
            let used = state.used();
            self.vring.complete(&run, &[used], std::slice::from_ref(&state.chain));
            self.vring.count_error();
            log::warn!(
                "queue {}: a request was dropped without complete(); it was answered with {} bytes",
                self.vring.index(),
                used.written
            );
        }
    }
}

/// Bytes that Python code gave us. To get at them, and to let go of them, may run more of it: no lock may be held then.
pub(super) enum Source<'a, 'py> {
    Bytes(&'a Bound<'py, PyBytes>),
    Buffer(PyUntypedBuffer),
}

impl<'a, 'py> Source<'a, 'py> {
    pub(super) fn new(data: &'a Bound<'py, PyAny>) -> PyResult<Self> {
        if let Ok(bytes) = data.cast::<PyBytes>() {
            return Ok(Self::Bytes(bytes));
        }
        let buffer = PyUntypedBuffer::get(data)?;
        contiguous(&buffer)?;
        Ok(Self::Buffer(buffer))
    }

    /// Bytes.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.as_bytes().len(),
            Self::Buffer(buffer) => buffer.len_bytes(),
        }
    }

    /// Copy everything into a chain, from byte `start` of its writable part on. Returns how many bytes that were.
    ///
    /// # Safety
    /// The snapshot under which the chain was filled must be alive.
    pub(super) unsafe fn copy_to(&self, chain: &Chain, start: u64) -> usize {
        match self {
            // SAFETY: as the caller vouches.
            Self::Bytes(bytes) => unsafe { chain.write(start, bytes.as_bytes()) },
            Self::Buffer(buffer) => {
                let source: *const u8 = buffer.buf_ptr().cast();
                let mut done = 0;
                for_range(chain.writable_segments(), start, buffer.len_bytes(), |segment| {
                    // SAFETY: as in `readinto`, with the direction turned around.
                    unsafe { std::ptr::copy(source.add(done), segment.pointer.as_ptr(), segment.length) };
                    done += segment.length;
                });
                done
            }
        }
    }
}

#[cold]
pub(super) fn overflow(py: Python<'_>, queue: u16, wanted: u64, left: u64) -> PyErr {
    errors::request_overflow(
        py,
        format!("queue {queue}: {wanted} bytes do not fit in the {left} writable bytes that are left"),
    )
}

impl State {
    /// Whether the request can be worked on: neither completed, nor of a driver that is gone.
    fn is_current(&self, vring: &Vring) -> bool {
        self.phase != Phase::Completed && self.run.as_ref().is_some_and(|run| vring.is_current(run))
    }

    /// Nobody works on the request any more. What goes back to the driver, and what is to be let go of without the lock.
    fn complete(&mut self) -> (Used, Lent, Option<Arc<Run>>) {
        self.phase = Phase::Completed;
        (self.used(), std::mem::take(&mut self.lent), self.run.take())
    }

    fn used(&self) -> Used {
        // A chain holds no more bytes than this can say; that was checked when it was taken.
        Used { head: self.chain.head(), written: self.written as u32 }
    }
}

/// Why a transfer between a file and a request did not take place.
fn failed(doing: &str, errno: Errno) -> PyErr {
    PyOSError::new_err((errno.raw_os_error(), format!("{doing}: {errno}")))
}

/// A descriptor, or something with a fileno().
#[derive(Debug)]
pub struct FileDescriptor(i32);

impl FileDescriptor {
    pub(super) fn borrow(&self) -> BorrowedFd<'_> {
        // SAFETY: the caller of the method holds the file open; a number that was closed makes the system call fail.
        unsafe { BorrowedFd::borrow_raw(self.0) }
    }
}

impl<'py> FromPyObject<'_, 'py> for FileDescriptor {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let number: i32 = if object.is_instance_of::<PyInt>() {
            object.extract()?
        } else {
            object.call_method0(intern!(object.py(), "fileno"))?.extract()?
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
