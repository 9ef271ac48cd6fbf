//! The driver's side: a session, guest memory to share in it, and queues to submit to.
//!
//! Whatever may wait, or talks to the back-end, does so without the interpreter: the back-end may be a thread of the
//! same process.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyDict, PyModule};

use super::errors::to_python;
use super::extensions::duplicate;
use crate::error::Error;
use crate::frontend::{self, Allocation, Event, InflightRecord as Record, QueueOptions};
use crate::memory::Permission;
use crate::protocol::{FrontendRequest, ProtocolFeatures, Uuid, VirtioFeatures};

/// The driver's end of a session.
#[pyclass(frozen, module = "vhost_user._core")]
pub struct Frontend {
    core: Arc<frontend::Frontend>,
    interrupted: Interrupted,
}

/// What a signal handler raised while somebody waited for the back-end.
type Interrupted = Arc<Mutex<Option<PyErr>>>;

impl fmt::Debug for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.core.fmt(f)
    }
}

#[pymethods]
impl Frontend {
    #[new]
    fn new(py: Python<'_>, fd: i32, timeout: f64) -> PyResult<Self> {
        if fd < 0 {
            return Err(PyValueError::new_err("a file descriptor is not negative"));
        }
        // SAFETY: the caller gives the descriptor away (`socket.detach()`); nobody else will close it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        super::connect_logging(py)?;
        let core = frontend::Frontend::new(socket, duration(timeout)).map_err(|error| to_python(py, error))?;
        let interrupted = Interrupted::default();
        let raised = Arc::clone(&interrupted);
        core.set_patience(move || {
            Python::attach(|py| match py.check_signals() {
                Ok(()) => true,
                Err(error) => {
                    *lock(&raised) = Some(error);
                    false
                }
            })
        });
        Ok(Self { core: Arc::new(core), interrupted })
    }

    /// Everything up to where the device's features are chosen. Returns what the back-end offers: its features, its
    /// protocol features, and how many queues it has, if it tells.
    fn handshake(&self, py: Python<'_>, protocol: u64) -> PyResult<(u64, u64, Option<u64>)> {
        let offer = self.run(py, || self.core.handshake(ProtocolFeatures(protocol)))?;
        Ok((offer.features, offer.protocol.0, offer.queues))
    }

    fn set_features(&self, py: Python<'_>, features: u64) -> PyResult<()> {
        self.run(py, || self.core.set_features(features))
    }

    #[getter]
    fn features(&self) -> u64 {
        self.core.features().0
    }

    #[getter]
    fn protocol_features(&self) -> u64 {
        self.core.protocol_features().0
    }

    fn set_driver_ok(&self, py: Python<'_>) -> PyResult<()> {
        self.run(py, || self.core.set_driver_ok())
    }

    fn set_status(&self, py: Python<'_>, status: u8) -> PyResult<()> {
        self.run(py, || self.core.set_status(status))
    }

    fn status(&self, py: Python<'_>) -> PyResult<u8> {
        self.run(py, || self.core.status())
    }

    fn reset(&self, py: Python<'_>) -> PyResult<()> {
        self.run(py, || self.core.reset())
    }

    fn get_config<'py>(&self, py: Python<'py>, offset: u32, size: usize) -> PyResult<Bound<'py, PyBytes>> {
        self.run(py, || self.core.get_config(offset, size)).map(|bytes| PyBytes::new(py, &bytes))
    }

    fn set_config(&self, py: Python<'_>, offset: u32, data: PyBackedBytes) -> PyResult<()> {
        self.run(py, || self.core.set_config(offset, &data))
    }

    fn send_rarp(&self, py: Python<'_>, mac: [u8; 6]) -> PyResult<()> {
        self.run(py, || self.core.send_rarp(mac))
    }

    fn set_mtu(&self, py: Python<'_>, mtu: u64) -> PyResult<()> {
        self.run(py, || self.core.set_mtu(mtu))
    }

    fn create_crypto_session(&self, py: Python<'_>, operation: u64, parameters: PyBackedBytes) -> PyResult<u64> {
        let parameters = <[u8; 1056]>::try_from(&parameters[..])
            .map_err(|_| PyValueError::new_err(format!("a session has 1056 bytes, not {}", parameters.len())))?;
        self.run(py, || self.core.create_crypto_session(operation, parameters))
    }

    fn close_crypto_session(&self, py: Python<'_>, session: u64) -> PyResult<()> {
        self.run(py, || self.core.close_crypto_session(session))
    }

    fn set_gpu_socket(&self, py: Python<'_>, fd: i32) -> PyResult<()> {
        let socket = duplicate(fd)?;
        self.run(py, || self.core.set_gpu_socket(socket.as_fd()))
    }

    /// The file of an object, which the caller owns.
    fn get_shared_object(&self, py: Python<'_>, uuid: [u8; 16]) -> PyResult<Option<i32>> {
        let file = self.run(py, || self.core.get_shared_object(Uuid(uuid)))?;
        Ok(file.map(IntoRawFd::into_raw_fd))
    }

    /// Bytes of each shared memory region, by its index.
    fn shared_memory(&self) -> HashMap<u8, u64> {
        self.core.shared_memory().into_iter().collect()
    }

    /// Where something is mapped in a shared memory region: offset, size, and whether it may be written to.
    fn mappings(&self, region: u8) -> Vec<(u64, u64, bool)> {
        self.core.mappings(region)
    }

    fn read_shared_memory<'py>(
        &self,
        py: Python<'py>,
        region: u8,
        offset: u64,
        size: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let read = |to: &mut [u8]| self.core.read_shared_memory(region, offset, to);
        PyBytes::new_with(py, size, |to| read(to).map_err(|error| to_python(py, error)))
    }

    fn write_shared_memory(&self, py: Python<'_>, region: u8, offset: u64, data: PyBackedBytes) -> PyResult<()> {
        self.core.write_shared_memory(region, offset, &data).map_err(|error| to_python(py, error))
    }

    /// The queues that the back-end gave a page for.
    fn host_notifiers(&self) -> Vec<u32> {
        self.core.host_notifiers()
    }

    fn notify_host(&self, py: Python<'_>, queue: u32) -> PyResult<()> {
        self.core.notify_host(queue).map_err(|error| to_python(py, error))
    }

    /// The objects that the back-end shares.
    fn shared_objects(&self) -> Vec<[u8; 16]> {
        self.core.shared_objects().into_iter().map(|uuid| uuid.0).collect()
    }

    fn provide_shared_object(&self, py: Python<'_>, uuid: [u8; 16], fd: i32) -> PyResult<()> {
        let file = duplicate(fd)?;
        self.core.provide_shared_object(Uuid(uuid), file.as_fd()).map_err(|error| to_python(py, error))
    }

    /// Share these memories, and no others any more.
    fn share(&self, py: Python<'_>, memories: Vec<Py<Memory>>) -> PyResult<()> {
        let memories: Vec<_> = memories.iter().map(|memory| Arc::clone(&memory.get().core)).collect();
        self.run(py, || self.core.share(&memories))
    }

    /// Share memory of which pages are missing: they are provided by what this returns.
    fn share_late(&self, py: Python<'_>, memories: Vec<Py<Memory>>) -> PyResult<LatePages> {
        let memories: Vec<_> = memories.iter().map(|memory| Arc::clone(&memory.get().core)).collect();
        self.run(py, || self.core.share_late(&memories)).map(|core| LatePages { core })
    }

    fn begin_postcopy(&self, py: Python<'_>) -> PyResult<()> {
        self.run(py, || self.core.begin_postcopy())
    }

    fn end_postcopy(&self, py: Python<'_>) -> PyResult<()> {
        self.run(py, || self.core.end_postcopy())
    }

    /// Have the back-end make a record of what is in flight.
    fn get_inflight(&self, py: Python<'_>, queues: u16, queue_size: u16) -> PyResult<InflightRecord> {
        self.run(py, || self.core.get_inflight(queues, queue_size)).map(|core| InflightRecord { core })
    }

    /// Have the back-end use a record from now on.
    fn set_inflight(&self, py: Python<'_>, record: &InflightRecord) -> PyResult<()> {
        self.run(py, || self.core.set_inflight(&record.core))
    }

    /// Map I/O addresses: the device is told when it asks. `permission` is 1 (read), 2 (write) or 3 (both).
    fn map(&self, py: Python<'_>, iova: u64, guest_address: u64, size: u64, permission: u8) -> PyResult<()> {
        let permission = Permission::from_bits(permission)
            .ok_or_else(|| PyValueError::new_err(format!("a permission is 1, 2 or 3, not {permission}")))?;
        self.run(py, || self.core.map(iova, guest_address, size, permission))
    }

    /// Take I/O addresses back.
    fn unmap(&self, py: Python<'_>, iova: u64, size: u64) -> PyResult<()> {
        self.run(py, || self.core.unmap(iova, size))
    }

    /// Make the device forget I/O addresses, which stay mapped.
    fn invalidate(&self, py: Python<'_>, iova: u64, size: u64) -> PyResult<()> {
        self.run(py, || self.core.invalidate(iova, size))
    }

    /// How often the device has asked where an I/O address is.
    #[getter]
    fn iotlb_misses(&self) -> u64 {
        self.core.iotlb_misses()
    }

    /// What the back-end says unasked, as its kind and its text. None if it says nothing for `timeout` seconds.
    fn next_event(&self, py: Python<'_>, timeout: f64) -> PyResult<Option<(&'static str, String)>> {
        let event = self.run(py, || self.core.next_event(deadline(timeout)))?;
        Ok(event.map(|event| match event {
            Event::ConfigChanged => ("config_changed", String::new()),
            Event::HostNotifier(which) => ("host_notifier", which),
            Event::SharedObject(which) => ("shared_object", which),
            Event::SharedMemory(where_) => ("shared_memory", where_),
            Event::Refused(reason) => ("refused", reason),
            Event::ChannelClosed(reason) => ("channel_closed", reason),
        }))
    }

    /// Send any request with any payload at any time. Returns the payload of the answer, None if there is none.
    fn exchange<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        payload: PyBackedBytes,
        descriptors: Vec<i32>,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let row = FrontendRequest::TABLE.iter().find(|row| row.name == name);
        let request = row.and_then(|row| FrontendRequest::from_id(row.id).ok());
        let request = request.ok_or_else(|| PyValueError::new_err(format!("there is no request {name:?}")))?;
        if descriptors.iter().any(|number| *number < 0) {
            return Err(PyValueError::new_err("a file descriptor is not negative"));
        }
        // SAFETY: the caller keeps them open during the call; one that is not open makes sendmsg fail.
        let borrow = |number: &i32| unsafe { BorrowedFd::borrow_raw(*number) };
        let answer = self.run(py, || {
            let descriptors: Vec<_> = descriptors.iter().map(borrow).collect();
            self.core.exchange_payload(request, &payload, &descriptors)
        })?;
        Ok(answer.map(|reply| PyBytes::new(py, &reply.payload)))
    }

    fn set_log(&self, py: Python<'_>, log: &DirtyLog) -> PyResult<()> {
        self.run(py, || self.core.set_log(&log.core))
    }

    fn set_log_fd(&self, py: Python<'_>, fd: i32) -> PyResult<()> {
        let event = borrowed(&fd)?;
        self.run(py, || self.core.set_log_descriptor(event))
    }

    fn log_buffers(&self, py: Python<'_>, on: bool) -> PyResult<()> {
        self.run(py, || self.core.log_buffers(on))
    }

    /// Returns the descriptor that the back-end wants to use instead, which is the caller's to close.
    fn transfer_state(&self, py: Python<'_>, save: bool, fd: i32) -> PyResult<Option<i32>> {
        let file = borrowed(&fd)?;
        let own = self.run(py, || self.core.transfer_state(save, file))?;
        Ok(own.map(IntoRawFd::into_raw_fd))
    }

    fn check_state(&self, py: Python<'_>) -> PyResult<()> {
        self.run(py, || self.core.check_state())
    }

    /// End the session: whoever waits is told.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.core.close());
    }

    /// Whether this is a child that was forked from the process that drives the device. It leaves it alone.
    #[getter]
    fn forked(&self) -> bool {
        self.core.is_forked()
    }

    /// The socket to the back-end.
    fn fileno(&self) -> i32 {
        self.core.socket().as_raw_fd()
    }
}

impl Frontend {
    /// Do something without the interpreter.
    fn run<T: Send>(&self, py: Python<'_>, work: impl FnOnce() -> Result<T, Error> + Send) -> PyResult<T> {
        py.detach(work).map_err(|error| self.to_python(py, error))
    }

    fn to_python(&self, py: Python<'_>, error: Error) -> PyErr {
        match error {
            Error::Interrupted => lock(&self.interrupted).take().unwrap_or_else(|| to_python(py, Error::Interrupted)),
            other => to_python(py, other),
        }
    }
}

/// Guest memory that this process makes, to be shared with a back-end.
#[pyclass(frozen, module = "vhost_user")]
#[derive(Debug)]
pub struct Memory {
    core: Arc<frontend::Memory>,
    /// What was given out by `allocate`, for as long as the memory lives.
    given: Mutex<Vec<Allocation>>,
}

#[pymethods]
impl Memory {
    #[new]
    #[pyo3(signature = (size = None, *, regions = None))]
    fn new(py: Python<'_>, size: Option<u64>, regions: Option<Vec<(u64, u64)>>) -> PyResult<Self> {
        let core = match (size, regions) {
            (Some(size), None) => frontend::Memory::new(size),
            (None, Some(regions)) => frontend::Memory::with_layout(&regions),
            _ => return Err(PyValueError::new_err("memory has a size, or regions")),
        };
        let core = Arc::new(core.map_err(|error| to_python(py, error))?);
        Ok(Self { core, given: Mutex::default() })
    }

    #[getter]
    fn regions(&self) -> Vec<(u64, u64)> {
        self.core.regions().map(|(region, _)| (region.guest_address, region.size)).collect()
    }

    fn read<'py>(&self, py: Python<'py>, address: u64, size: usize) -> PyResult<Bound<'py, PyBytes>> {
        PyBytes::new_with(py, size, |to| self.core.read(address, to).map_err(|error| to_python(py, error)))
    }

    fn write(&self, py: Python<'_>, address: u64, data: PyBackedBytes) -> PyResult<()> {
        self.core.write(address, &data).map_err(|error| to_python(py, error))
    }

    #[pyo3(signature = (size, alignment = 16))]
    fn allocate(&self, py: Python<'_>, size: u64, alignment: u64) -> PyResult<u64> {
        if !alignment.is_power_of_two() {
            return Err(PyValueError::new_err(format!("an alignment is a power of two, not {alignment}")));
        }
        let allocation = self.core.allocate(size, alignment).map_err(|error| to_python(py, error))?;
        let address = allocation.address();
        lock(&self.given).push(allocation);
        Ok(address)
    }

    #[staticmethod]
    fn user_address(address: u64) -> u64 {
        frontend::Memory::user_address(address)
    }

    fn __repr__(&self) -> String {
        format!("<Memory: {}>", self.core.snapshot().describe())
    }
}

/// Memory in which a back-end notes which requests it has begun, so that the next one finds them if it dies: what
/// :meth:`vhost_user.Frontend.get_inflight` returns. vhost-user specification, "Inflight I/O tracking".
#[pyclass(frozen, module = "vhost_user")]
#[derive(Debug)]
pub struct InflightRecord {
    core: Record,
}

#[pymethods]
impl InflightRecord {
    /// How many queues it is for.
    #[getter]
    fn queues(&self) -> u16 {
        self.core.description.queues
    }

    /// Entries of the largest queue that it is for.
    #[getter]
    fn queue_size(&self) -> u16 {
        self.core.description.queue_size
    }

    /// Bytes.
    #[getter]
    fn size(&self) -> u64 {
        self.core.description.size
    }

    /// Where it begins in its file.
    #[getter]
    fn offset(&self) -> u64 {
        self.core.description.offset
    }

    /// The descriptor of its file.
    fn fileno(&self) -> i32 {
        self.core.file.as_raw_fd()
    }

    fn __repr__(&self) -> String {
        format!("<InflightRecord: {} queues of {} entries>", self.queues(), self.queue_size())
    }
}

/// Guest memory of a back-end that waits for each page that is missing.
#[pyclass(frozen, module = "vhost_user._core")]
#[derive(Debug)]
pub struct LatePages {
    core: frontend::LatePages,
}

#[pymethods]
impl LatePages {
    /// Readable when there may be a page that is wanted.
    fn fileno(&self) -> i32 {
        self.core.as_fd().as_raw_fd()
    }

    /// The guest address of a page that the back-end waits for.
    fn wanted(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        self.core.wanted().map_err(|error| to_python(py, error))
    }

    /// Provide whole pages. Returns false if the first one is there already.
    fn provide(&self, py: Python<'_>, guest_address: u64, data: PyBackedBytes) -> PyResult<bool> {
        py.detach(|| self.core.provide(guest_address, &data)).map_err(|error| to_python(py, error))
    }
}

/// Which pages of guest memory a back-end wrote to.
#[pyclass(frozen, module = "vhost_user")]
#[derive(Debug)]
pub struct DirtyLog {
    core: frontend::DirtyLog,
}

#[pymethods]
impl DirtyLog {
    #[new]
    #[pyo3(signature = (*memories, pages = None))]
    fn new(py: Python<'_>, memories: Vec<Py<Memory>>, pages: Option<u64>) -> PyResult<Self> {
        let memories: Vec<_> = memories.iter().map(|memory| Arc::clone(&memory.get().core)).collect();
        let core = match pages {
            Some(pages) if memories.is_empty() => frontend::DirtyLog::new(pages),
            None if !memories.is_empty() => frontend::DirtyLog::of(&memories),
            _ => return Err(PyValueError::new_err("a log is for memories, or has a number of pages")),
        };
        Ok(Self { core: core.map_err(|error| to_python(py, error))? })
    }

    fn take(&self) -> Vec<u64> {
        self.core.take()
    }

    #[getter]
    fn pages(&self) -> u64 {
        self.core.pages()
    }

    fn __repr__(&self) -> String {
        format!("<DirtyLog of {} pages>", self.core.pages())
    }
}

/// The driver's end of one queue.
#[pyclass(frozen, module = "vhost_user._core")]
#[derive(Debug)]
pub struct FrontendQueue {
    frontend: Mutex<Py<Frontend>>,
    core: frontend::Queue,
}

#[pymethods]
impl FrontendQueue {
    #[new]
    fn new(
        frontend: Bound<'_, Frontend>,
        memory: &Memory,
        index: u8,
        size: u16,
        base: u32,
        indirect: bool,
        big_endian: bool,
    ) -> PyResult<Self> {
        let options = QueueOptions { size, base, indirect, big_endian };
        let session = Arc::clone(&frontend.get().core);
        let core = frontend::Queue::new(session, Arc::clone(&memory.core), index, options);
        let core = core.map_err(|error| to_python(frontend.py(), error))?;
        Ok(Self { core, frontend: Mutex::new(frontend.unbind()) })
    }

    fn start(&self, py: Python<'_>) -> PyResult<()> {
        self.frontend(py).get().run(py, || self.core.start())
    }

    fn log_used(&self, py: Python<'_>, on: bool) -> PyResult<()> {
        self.frontend(py).get().run(py, || self.core.log_used(on))
    }

    fn enable(&self, py: Python<'_>, enable: bool) -> PyResult<()> {
        self.frontend(py).get().run(py, || self.core.enable(enable))
    }

    fn stop(&self, py: Python<'_>) -> PyResult<u32> {
        self.frontend(py).get().run(py, || self.core.stop())
    }

    /// Take the queue away at once: what the device has taken stays in the in-flight record.
    fn suspend(&self, py: Python<'_>) -> PyResult<u32> {
        self.frontend(py).get().run(py, || self.core.suspend())
    }

    /// Go on in another session, with the requests that are under way.
    fn move_to(&self, frontend: Py<Frontend>) {
        self.core.move_to(Arc::clone(&frontend.get().core));
        let old = std::mem::replace(&mut *lock(&self.frontend), frontend);
        drop(old);
    }

    fn kick(&self, py: Python<'_>) -> PyResult<()> {
        self.frontend(py).get().run(py, || self.core.kick())
    }

    /// Returns the number by which `wait` will name the request.
    fn submit(&self, py: Python<'_>, readable: Vec<PyBackedBytes>, writable: Vec<usize>) -> PyResult<u64> {
        let readable: Vec<&[u8]> = readable.iter().map(|part| &**part).collect();
        if self.core.is_in_band() {
            // The device may be a thread of this process, and has to acknowledge the kick.
            return self.frontend(py).get().run(py, || self.core.submit(&readable, &writable));
        }
        self.core.submit(&readable, &writable).map_err(|error| to_python(py, error))
    }

    /// Requests that are done, by number, with what the device wrote; at least one, waiting for it up to `timeout`
    /// seconds. None came if there is none then. Every request is returned once.
    fn wait<'py>(&self, py: Python<'py>, timeout: f64) -> PyResult<Vec<(u64, Bound<'py, PyBytes>)>> {
        let frontend = self.frontend(py);
        let done = py.detach(|| {
            let first = match self.core.poll(None)? {
                Some(completion) => completion,
                None if timeout <= 0.0 => return Ok(Vec::new()),
                None => match self.core.wait(None, deadline(timeout)) {
                    Err(Error::Timeout(_)) => return Ok(Vec::new()),
                    other => other?,
                },
            };
            let mut done = vec![first];
            // A ring that broke says so the next time.
            while let Ok(Some(completion)) = self.core.poll(None) {
                done.push(completion);
            }
            Ok(done)
        });
        let done = done.map_err(|error| frontend.get().to_python(py, error))?;
        Ok(done.into_iter().map(|completion| (completion.token, PyBytes::new(py, &completion.data))).collect())
    }

    #[getter]
    fn outstanding(&self) -> u16 {
        self.core.outstanding()
    }

    /// User addresses of the descriptor table, the available ring and the used ring.
    #[getter]
    fn addresses(&self) -> (u64, u64, u64) {
        let addresses = self.core.addresses();
        (addresses.descriptors, addresses.avail, addresses.used)
    }
}

impl FrontendQueue {
    fn frontend(&self, py: Python<'_>) -> Py<Frontend> {
        lock(&self.frontend).clone_ref(py)
    }

    pub(super) fn core(&self) -> &frontend::Queue {
        &self.core
    }
}

/// The tables of the protocol, for Python: `ProtocolFeature` and `TransportFeature`, and `REQUESTS`.
pub fn add_tables(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    let flags = py.import("enum")?.getattr("IntFlag")?;
    let names = PyDict::new(py);
    names.set_item("module", "vhost_user")?;
    for (name, table, documentation) in [
        ("ProtocolFeature", ProtocolFeatures::NAMES, "What GET_PROTOCOL_FEATURES and SET_PROTOCOL_FEATURES exchange."),
        (
            "TransportFeature",
            VirtioFeatures::NAMES,
            "Feature bits that are not a device type's. Virtio 1.3, section 6.",
        ),
    ] {
        let members: Vec<(&str, u64)> = table.iter().map(|(bit, name)| (*name, 1 << bit)).collect();
        let class = flags.call((name, members), Some(&names))?;
        class.setattr("__doc__", documentation)?;
        module.add(name, class)?;
    }
    let requests = PyDict::new(py);
    for row in FrontendRequest::TABLE {
        requests.set_item(row.name, row.id)?;
    }
    module.add("IO_OFFSET", frontend::IO_OFFSET)?;
    module.add("REQUESTS", requests)
}

fn borrowed(number: &i32) -> PyResult<BorrowedFd<'_>> {
    if *number < 0 {
        return Err(PyValueError::new_err("a file descriptor is not negative"));
    }
    // SAFETY: the caller keeps it open during the call; one that is not open makes sendmsg fail.
    Ok(unsafe { BorrowedFd::borrow_raw(*number) })
}

fn deadline(seconds: f64) -> Instant {
    Instant::now() + duration(seconds)
}

/// As much as an Instant can take: a century is for ever.
pub(super) fn duration(seconds: f64) -> Duration {
    const FOREVER: f64 = 3.2e9;
    Duration::try_from_secs_f64(seconds.min(FOREVER)).unwrap_or_default()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
