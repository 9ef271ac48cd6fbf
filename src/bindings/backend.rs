//! A device being served: its queues, its configuration space, its session, and the loop that drives them.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyBaseException, PyIndexError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};
use pyo3::{PyTraverseError, PyVisit};

use super::batch::{Failures, Origin, PATIENCE, Workspace};
use super::errors::{self, to_python};
use super::extensions::duplicate;
use super::request::{Request, Source, overflow};
use super::worker::Worker;
use crate::backend::{
    Channel, ConfigSpace, Direction, Event, EventLoop, Filled, Flow, Granted, Hooks, Interest, Polling, Profile,
    Session, Taken, Token, Vring, VringStatus,
};
use crate::error::{Error, RingError};
use crate::protocol::{BackendMessage, BackendRequest, ProtocolFeatures, ShmemConfig, VirtioFeatures};
use crate::virtqueue::{MAX_QUEUE_SIZE, RingLimits};

/// How often a ring without a kick descriptor is looked at, while it is busy and while it is not.
const POLL_BUSY: Duration = Duration::from_micros(50);
const POLL_IDLE: Duration = Duration::from_millis(1);
/// Looks in vain after which a ring counts as idle.
const POLLS_UNTIL_IDLE: u32 = 200;

/// Longer than this, Ctrl-C would not be noticed.
const MAX_BUSY_POLL: Duration = Duration::from_secs(1);

/// Seconds after which the main thread looks for signals, whatever else happens.
const SIGNAL_PATIENCE: f64 = 0.5;

type Callbacks = HashMap<u32, Py<PyAny>>;
type Handlers = Vec<Option<Py<PyAny>>>;

/// One device, served to one front-end after another.
#[pyclass(frozen, module = "vhost_user._core")]
#[derive(Debug)]
pub struct Backend {
    /// `vhost_user._runtime.Runtime`, or whatever has its methods.
    runtime: Py<PyAny>,
    /// For each queue the callable that takes its requests, or None.
    handlers: Mutex<Handlers>,
    profile: Profile,
    vrings: Arc<[Arc<Vring>]>,
    config: Arc<ConfigSpace>,
    channel: Arc<Channel>,
    events: Arc<EventLoop>,
    /// Only the thread that dispatches takes it, so that no other thread ever waits for it.
    inner: Mutex<Inner>,
    /// How long requests that are done may wait for others of their batch, in nanoseconds.
    patience: AtomicU64,
    /// How long at most to look for requests before a sleep, in nanoseconds.
    busy_poll: AtomicU64,
    dispatching: AtomicBool,
    stopping: AtomicBool,
    watchers: Mutex<Callbacks>,
    timers: Mutex<HashMap<u64, Py<PyAny>>>,
    soon: Mutex<Vec<Py<PyAny>>>,
    /// Threads beside the loop's, over which the queues with a handler are spread.
    workers: Vec<Worker>,
    /// Queues that were kicked on a worker although they do not run: only the session can say what that means.
    kicked: Mutex<Vec<u16>>,
    /// What a handler on a worker raised that means the end.
    fatal: Mutex<Option<PyErr>>,
    /// Queues that broke while another thread took from them.
    broken: Mutex<Vec<(u16, RingError)>>,
    next_watcher: AtomicU32,
    /// Goes up after everything that may have changed the device.
    changes: AtomicU64,
    connected: AtomicBool,
}

#[derive(Debug, Default)]
struct Inner {
    session: Option<Box<Session>>,
    events: Vec<Event>,
    /// For each queue.
    workspaces: Vec<Workspace>,
    /// Whether to look for requests before the next sleep.
    polling: Polling,
    /// Queues with more to do than one turn allows.
    pending: Vec<u16>,
    poll_timer: Option<u64>,
    polls_in_vain: u32,
}

/// `vhost_user._runtime.Offer`: what a device offers to a front-end.
#[derive(Debug, FromPyObject)]
struct Offer {
    features: u64,
    transport: u64,
    protocol: u64,
    gpu_socket: bool,
    /// Bytes of each shared memory region, by its index.
    shared_memory: HashMap<u8, u64>,
}

impl Offer {
    fn profile(&self, has_config: bool) -> Profile {
        let size = |region| self.shared_memory.get(&(region as u8)).copied().unwrap_or(0);
        Profile {
            device_features: self.features,
            transport_features: VirtioFeatures(self.transport),
            has_config,
            extensions: ProtocolFeatures(self.protocol),
            takes_gpu_socket: self.gpu_socket,
            shared_memory: Arc::new(ShmemConfig::new(std::array::from_fn(size))),
        }
    }
}

#[pymethods]
impl Backend {
    #[new]
    #[pyo3(signature = (runtime, queue_sizes, max_requests, handlers, offer, config, workers = 0))]
    #[expect(clippy::too_many_arguments, reason = "each is a part of what a device is, and none goes with another")]
    fn new(
        runtime: Py<PyAny>,
        queue_sizes: Vec<u16>,
        max_requests: Vec<u32>,
        handlers: Handlers,
        offer: Offer,
        config: Vec<u8>,
        workers: usize,
        py: Python<'_>,
    ) -> PyResult<Self> {
        if queue_sizes.len() != handlers.len() || queue_sizes.len() != max_requests.len() {
            return Err(PyValueError::new_err("every queue needs a size, a limit and a handler or None"));
        }
        if let Some(size) = queue_sizes.iter().find(|size| !size.is_power_of_two() || **size > MAX_QUEUE_SIZE) {
            return Err(PyValueError::new_err(format!("a queue cannot have {size} entries")));
        }
        super::connect_logging(py)?;
        let events = Arc::new(EventLoop::new().map_err(|error| to_python(py, error))?);
        let workers = (0..workers).map(|_| Worker::new()).collect::<Result<Vec<_>, _>>();
        let workers = workers.map_err(|error| to_python(py, error))?;
        let vrings = (0u16..)
            .zip(queue_sizes.iter().zip(max_requests))
            .map(|(index, (size, max_bytes))| {
                let limits = RingLimits { max_bytes, ..RingLimits::default() };
                let vring = Vring::new(index, *size, limits, events.wakeup());
                let is_handled = handlers.get(usize::from(index)).is_some_and(Option::is_some);
                match worker_of(&workers, index).filter(|_| is_handled) {
                    Some(worker) => Arc::new(vring.kicking(Arc::clone(worker.events()))),
                    None => Arc::new(vring),
                }
            })
            .collect();
        let workspaces = queue_sizes.iter().map(|_| Workspace::default()).collect();
        Ok(Self {
            runtime,
            handlers: Mutex::new(handlers),
            profile: offer.profile(!config.is_empty()),
            vrings,
            config: Arc::new(ConfigSpace::new(config)),
            channel: Arc::new(Channel::new(Arc::clone(&events))),
            events,
            inner: Mutex::new(Inner { workspaces, ..Inner::default() }),
            patience: AtomicU64::new(PATIENCE.as_nanos() as u64),
            busy_poll: AtomicU64::new(0),
            dispatching: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            watchers: Mutex::default(),
            timers: Mutex::default(),
            soon: Mutex::default(),
            workers,
            kicked: Mutex::default(),
            fatal: Mutex::default(),
            broken: Mutex::default(),
            next_watcher: AtomicU32::new(0),
            changes: AtomicU64::new(0),
            connected: AtomicBool::new(false),
        })
    }

    /// Other handlers, from the next batch of requests on. What is available gets a look from them. Only on the loop's
    /// thread.
    fn set_handlers(&self, handlers: Handlers) -> PyResult<()> {
        if handlers.len() != self.vrings.len() {
            return Err(PyValueError::new_err("every queue needs a handler or None"));
        }
        let old = std::mem::replace(&mut *lock(&self.handlers), handlers);
        drop(old);
        lock(&self.inner).pending = self.vrings.iter().map(|vring| vring.index()).collect();
        self.events.wakeup().wake();
        Ok(())
    }

    /// Serve the front-end at the other end of `fd`, which is owned from now on. Only on the loop's thread.
    fn connect(&self, py: Python<'_>, fd: i32) -> PyResult<()> {
        if fd < 0 {
            return Err(PyValueError::new_err("a file descriptor is not negative"));
        }
        // SAFETY: the caller gives the descriptor away (`socket.detach()`); nobody else will close it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut inner = self.inner.try_lock().map_err(|_| errors::state_error(py, "connect() during a dispatch"))?;
        if inner.session.is_some() {
            return Err(errors::state_error(py, "the device already serves a front-end"));
        }
        let session = Session::new(
            socket,
            self.profile.clone(),
            Arc::clone(&self.vrings),
            Arc::clone(&self.config),
            Arc::clone(&self.channel),
            Arc::clone(&self.events),
        )
        .map_err(|error| to_python(py, error))?;
        inner.session = Some(Box::new(session));
        self.connected.store(true, Ordering::Release);
        Ok(())
    }

    /// Handle what has happened, waiting for it up to `timeout` seconds (None: as long as it takes). Returns whether
    /// the loop goes on.
    #[pyo3(signature = (timeout = None))]
    fn dispatch(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
        self.check_process(py)?;
        if self.dispatching.swap(true, Ordering::Acquire) {
            return Err(errors::state_error(py, "the loop of the device is running already"));
        }
        let result = self.turn(py, timeout.map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or_default()));
        self.dispatching.store(false, Ordering::Release);
        result
    }

    /// Run the loop until :meth:`stop`.
    fn run(&self, py: Python<'_>) -> PyResult<()> {
        // Python handles signals on the main thread. One that comes between the last look at them and the wait, or on
        // another thread, does not end the wait.
        let is_main = rustix::thread::gettid() == rustix::process::getpid();
        let timeout = is_main.then_some(SIGNAL_PATIENCE);
        while self.dispatch(py, timeout)? {}
        Ok(())
    }

    /// Whether this is a child that was forked from the process that serves the device. It leaves it alone.
    #[getter]
    fn forked(&self) -> bool {
        !self.events.process().is_current()
    }

    /// Whether :meth:`dispatch` would find something to do that :meth:`fileno` does not tell of.
    #[getter]
    fn busy(&self) -> bool {
        !lock(&self.inner).pending.is_empty()
    }

    /// Whether the front-end has acknowledged everything that was said to it unasked.
    #[getter]
    fn settled(&self) -> bool {
        self.channel.is_idle()
    }

    /// The loop's own descriptor: readable while :meth:`dispatch` has something to do.
    fn fileno(&self) -> i32 {
        self.events.as_fd().as_raw_fd()
    }

    /// End the loop, after requests in flight are done. From any thread.
    fn stop(&self) {
        if self.forked() {
            return;
        }
        self.stopping.store(true, Ordering::Release);
        self.events.wakeup().wake();
    }

    /// Be the worker `index` of the device, on this thread, until :meth:`stop_workers`. What goes wrong ends the loop.
    fn work(&self, py: Python<'_>, index: usize) -> PyResult<()> {
        let worker = self.workers.get(index);
        let worker =
            worker.ok_or_else(|| PyIndexError::new_err(format!("there are {} workers", self.workers.len())))?;
        match worker.run(py, self) {
            // A handler forked: what it raised in the child, if anything, has nobody else to go to.
            _ if self.forked() => Err(lock(&self.fatal).take().unwrap_or_else(|| another_process(py))),
            Err(error) => {
                self.end_with(to_python(py, error));
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// End the workers, each after the requests that it has begun with. From any thread.
    fn stop_workers(&self) {
        self.workers.iter().for_each(Worker::stop);
    }

    /// Whether a front-end is connected.
    #[getter]
    fn connected(&self) -> bool {
        self.connected.load(Ordering::Acquire) && !self.forked()
    }

    /// Call `callback(readable, writable)` while `fd` is ready. Returns what :meth:`unwatch` takes.
    fn watch(&self, py: Python<'_>, fd: i32, callback: Py<PyAny>, readable: bool, writable: bool) -> PyResult<u32> {
        let id = self.next_watcher.fetch_add(1, Ordering::Relaxed);
        lock(&self.watchers).insert(id, callback);
        let result = self.events.watch(borrow(&fd)?, Token::Device(id), Interest { readable, writable });
        result.map(|()| id).map_err(|error| {
            let callback = lock(&self.watchers).remove(&id);
            drop(callback);
            to_python(py, error)
        })
    }

    /// Stop watching `fd`, before it is closed.
    fn unwatch(&self, id: u32, fd: i32) {
        if let Ok(fd) = borrow(&fd) {
            self.events.forget(fd);
        }
        let callback = lock(&self.watchers).remove(&id);
        drop(callback);
    }

    /// Call `callback()` in `delay` seconds. Returns what :meth:`cancel` takes.
    fn call_later(&self, delay: f64, callback: Py<PyAny>) -> PyResult<u64> {
        let due = Duration::try_from_secs_f64(delay.max(0.0)).ok().and_then(|delay| Instant::now().checked_add(delay));
        let due = due.ok_or_else(|| PyValueError::new_err(format!("a timer cannot be due in {delay} s")))?;
        let mut timers = lock(&self.timers);
        let id = self.events.add_timer(due);
        timers.insert(id, callback);
        Ok(id)
    }

    fn cancel(&self, id: u64) {
        self.events.cancel_timer(id);
        let callback = lock(&self.timers).remove(&id);
        drop(callback);
    }

    /// Call `callback()` on the loop's thread, soon.
    fn call_soon(&self, callback: Py<PyAny>) {
        lock(&self.soon).push(callback);
        self.events.wakeup().wake();
    }

    /// Bytes of the configuration space.
    fn config_read<'py>(&self, py: Python<'py>, offset: usize, length: usize) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.config.read(offset, length))
    }

    /// Replace bytes of the configuration space.
    fn config_write(&self, offset: usize, data: &[u8]) -> PyResult<()> {
        self.config.write(offset, data).map_err(PyIndexError::new_err)?;
        self.count_change();
        Ok(())
    }

    /// Tell the driver that the configuration space changed.
    fn config_changed(&self) {
        self.channel.config_changed();
    }

    /// Let requests that are done wait for others of their batch, for so many seconds.
    fn set_patience(&self, seconds: f64) -> PyResult<()> {
        let patience =
            Duration::try_from_secs_f64(seconds).map_err(|error| PyValueError::new_err(error.to_string()))?;
        self.patience.store(u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        Ok(())
    }

    /// Look for requests for up to so many seconds before going to sleep: as long as that, if it was worth it lately.
    fn set_busy_poll(&self, seconds: f64) -> PyResult<()> {
        let most = Duration::try_from_secs_f64(seconds).ok().filter(|most| *most <= MAX_BUSY_POLL);
        let most = most.ok_or_else(|| {
            PyValueError::new_err(format!("busy polling takes from 0 to {} s, not {seconds}", MAX_BUSY_POLL.as_secs()))
        })?;
        self.busy_poll.store(most.as_nanos() as u64, Ordering::Relaxed);
        lock(&self.inner).polling = self.polling();
        Ok(())
    }

    /// Ask the front-end for something. `then(descriptor, error)` is called on the loop's thread, with a descriptor that
    /// belongs to it, or with what went wrong.
    fn ask(&self, py: Python<'_>, name: &str, payload: &[u8], descriptors: Vec<i32>, then: Py<PyAny>) -> PyResult<()> {
        let row = BackendRequest::TABLE.iter().find(|row| row.name == name);
        let request = row.and_then(|row| BackendRequest::from_id(row.id).ok());
        let request = request.ok_or_else(|| PyValueError::new_err(format!("there is no request {name:?}")))?;
        let message = BackendMessage::decode(request, payload, descriptors.len());
        let message = message.map_err(|error| to_python(py, error))?;
        let files = descriptors.into_iter().map(duplicate).collect::<PyResult<_>>()?;
        let then = move |outcome: Result<Granted, Error>| Python::attach(|py| answered(py, &then, outcome));
        self.channel.request(message, files, Box::new(then)).map_err(|error| to_python(py, error))
    }

    /// Whether the calling thread is the loop's.
    #[getter]
    fn is_this_thread(&self) -> bool {
        self.events.is_this_thread()
    }

    /// The next request of a queue that has no handler, or None. From any thread.
    fn take(&self, py: Python<'_>, queue: usize) -> PyResult<Option<Request>> {
        let vring = self.vring(queue)?;
        let mut chains = Vec::with_capacity(1);
        match vring.take(1, &mut chains, &mut Vec::new()) {
            Taken::Chains(run) => Ok(chains.pop().map(|chain| Request::new(Arc::clone(vring), run, chain, true))),
            Taken::Nothing | Taken::NotRunning => Ok(None),
            Taken::Broken(reason) => Err(self.broke(py, vring, reason)),
        }
    }

    /// Fill the next request of a queue with `data` and complete it. False if there is none now.
    fn push(&self, py: Python<'_>, queue: usize, data: &Bound<'_, PyAny>) -> PyResult<bool> {
        let source = Source::new(data)?;
        self.push_sources(py, queue, std::slice::from_ref(&source)).map(|count| count > 0)
    }

    /// Fill the next requests of a queue, one with each of `data`, and complete them together. Returns how many there
    /// were.
    fn push_many(&self, py: Python<'_>, queue: usize, data: &Bound<'_, PyList>) -> PyResult<usize> {
        let data: Vec<_> = data.iter().collect();
        let mut sources = Vec::with_capacity(data.len());
        for item in &data {
            match Source::new(item) {
                Ok(source) => sources.push(source),
                Err(error) => {
                    let count = self.push_sources(py, queue, &sources)?;
                    return if count < sources.len() { Ok(count) } else { Err(error) };
                }
            }
        }
        self.push_sources(py, queue, &sources)
    }

    /// Requests that a driver has made available on a queue and nobody has taken.
    fn available(&self, queue: usize) -> PyResult<usize> {
        self.vring(queue).map(|vring| vring.available())
    }

    /// Requests that the device has taken from a queue and not completed.
    fn in_flight(&self, queue: usize) -> PyResult<usize> {
        self.vring(queue).map(|vring| vring.in_flight())
    }

    /// "stopped", "disabled", "running" or "broken".
    fn status(&self, queue: usize) -> PyResult<&'static str> {
        self.vring(queue).map(|vring| match vring.status() {
            VringStatus::Stopped => "stopped",
            VringStatus::Disabled => "disabled",
            VringStatus::Running => "running",
            VringStatus::Broken => "broken",
        })
    }

    /// Whether a queue has the rings of a legacy driver on a big-endian machine.
    fn is_big_endian(&self, queue: usize) -> PyResult<bool> {
        self.vring(queue).map(|vring| vring.is_big_endian())
    }

    /// A device that keeps a watch or a timer makes a cycle: device, watch, this, runtime, device.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.runtime)?;
        // Whoever has a lock now is using this object: missing what it keeps only makes it live longer.
        if let Ok(handlers) = self.handlers.try_lock() {
            handlers.iter().flatten().try_for_each(|handler| visit.call(handler))?;
        }
        if let Ok(watchers) = self.watchers.try_lock() {
            watchers.values().try_for_each(|callback| visit.call(callback))?;
        }
        if let Ok(timers) = self.timers.try_lock() {
            timers.values().try_for_each(|callback| visit.call(callback))?;
        }
        if let Ok(soon) = self.soon.try_lock() {
            soon.iter().try_for_each(|callback| visit.call(callback))?;
        }
        Ok(())
    }

    /// Counters of a queue, by name.
    fn statistics<'py>(&self, py: Python<'py>, queue: usize) -> PyResult<Bound<'py, PyDict>> {
        let statistics = &self.vring(queue)?.statistics;
        let counters = PyDict::new(py);
        for (name, counter) in [
            ("requests", &statistics.requests),
            ("bytes_read", &statistics.bytes_read),
            ("bytes_written", &statistics.bytes_written),
            ("kicks", &statistics.kicks),
            ("calls", &statistics.calls),
            ("calls_suppressed", &statistics.calls_suppressed),
            ("errors", &statistics.errors),
            ("iotlb_misses", &statistics.iotlb_misses),
            ("iotlb_invalidations", &statistics.iotlb_invalidations),
        ] {
            counters.set_item(name, counter.load(Ordering::Relaxed))?;
        }
        Ok(counters)
    }
}

impl Backend {
    fn check_process(&self, py: Python<'_>) -> PyResult<()> {
        if self.forked() { Err(another_process(py)) } else { Ok(()) }
    }

    fn vring(&self, queue: usize) -> PyResult<&Arc<Vring>> {
        self.vrings.get(queue).ok_or_else(|| {
            PyIndexError::new_err(format!("queue {queue} does not exist; there are {}", self.vrings.len()))
        })
    }

    /// Fill a request with each of `sources`, as long as there are any. Returns how many there were.
    fn push_sources(&self, py: Python<'_>, queue: usize, sources: &[Source<'_, '_>]) -> PyResult<usize> {
        let vring = self.vring(queue)?;
        let mut too_long = None;
        let mut next = sources.iter();
        let Filled { count, broken } = vring.fill(sources.len(), |chain| {
            let source = next.next()?;
            if source.len() as u64 > chain.writable() {
                too_long = Some((source.len() as u64, chain.writable()));
                return None;
            }
            // SAFETY: the ring keeps the snapshot of a chain that it shows us, and the chain has room.
            Some(unsafe { source.copy_to(chain, 0) } as u32)
        });
        if let Some(reason) = broken {
            return Err(self.broke(py, vring, reason));
        }
        match too_long {
            Some((wanted, left)) => Err(overflow(py, vring.index(), wanted, left)),
            None => Ok(count),
        }
    }

    /// The device hears of a ring that broke where it hears of everything else: on the loop's thread.
    fn broke(&self, py: Python<'_>, vring: &Vring, reason: RingError) -> PyErr {
        lock(&self.broken).push((vring.index(), reason.clone()));
        self.events.wakeup().wake();
        to_python(py, Error::Ring { queue: vring.index(), reason })
    }

    /// A worker, whose loop is `events`, heard of a kick of its `queue`.
    pub(super) fn kicked(&self, queue: u16, events: &EventLoop) {
        let Some(vring) = self.vrings.get(usize::from(queue)) else { return };
        vring.on_kick(|kick| events.forget(kick));
        if !vring.is_active() {
            lock(&self.kicked).push(queue);
            self.wake();
        }
    }

    /// Raise `error` on the loop's thread.
    pub(super) fn end_with(&self, error: PyErr) {
        let later = lock(&self.fatal).replace(error);
        drop(later);
        self.wake();
    }

    /// What is known of the device may not be true any more.
    fn count_change(&self) {
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// Make the loop look at everything.
    pub(super) fn wake(&self) {
        self.events.wakeup().wake();
    }

    /// The thread for a queue, if that is not the loop's.
    fn worker(&self, vring: &Vring) -> Option<&Worker> {
        worker_of(&self.workers, vring.index()).filter(|_| vring.has_worker())
    }

    /// For a thread that is to look for requests.
    pub(super) fn polling(&self) -> Polling {
        Polling::new(Duration::from_nanos(self.busy_poll.load(Ordering::Relaxed)))
    }

    pub(super) fn vrings(&self) -> &[Arc<Vring>] {
        &self.vrings
    }

    /// One turn of the loop.
    fn turn(&self, py: Python<'_>, timeout: Option<Duration>) -> PyResult<bool> {
        let (mut events, before, mut polling) = {
            let mut inner = lock(&self.inner);
            (std::mem::take(&mut inner.events), inner.pending.clone(), inner.polling)
        };
        let waited = py.detach(|| polling.wait(&self.events, &self.vrings, &before, timeout, &mut events));
        let looked = waited.map_err(|error| to_python(py, error))?;
        lock(&self.inner).polling = polling;
        let polls = polling.is_due() && timeout.is_none_or(|timeout| !timeout.is_zero());
        let mut turn = Turn { backend: self, py, polls, fatal: py.check_signals().err() };
        if !self.workers.is_empty() {
            turn.hear_workers();
        }
        turn.call_soon();
        turn.report_broken();
        for event in events.drain(..) {
            turn.on_event(event);
        }
        if self.forked() {
            return Err(turn.end_of_child());
        }
        self.channel.settle();
        let pending = {
            let mut inner = lock(&self.inner);
            inner.events = events;
            std::mem::take(&mut inner.pending)
        };
        turn.look_at_pending(pending, if looked { &before } else { &[] });
        if self.forked() {
            return Err(turn.end_of_child());
        }
        turn.with_session(|session, hooks| session.resume(hooks));
        turn.schedule_polling();
        if let Some(error) = turn.fatal {
            return Err(error);
        }
        if self.stopping.load(Ordering::Acquire) {
            return self.wind_up(py);
        }
        Ok(true)
    }

    /// The loop was asked to stop: end the session, and then the loop.
    fn wind_up(&self, py: Python<'_>) -> PyResult<bool> {
        let mut turn = Turn::new(self, py, false);
        turn.with_session(
            |session, hooks| if session.is_ending() { Ok(Flow::Continue) } else { session.end(hooks, None) },
        );
        if let Some(error) = turn.fatal {
            return Err(error);
        }
        let goes_on = self.connected();
        if !goes_on {
            // Whoever waits for the front-end is told that it is gone.
            self.channel.settle();
            self.stopping.store(false, Ordering::Release);
        }
        Ok(goes_on)
    }
}

/// What one turn of the loop works with.
pub(super) struct Turn<'a, 'py> {
    backend: &'a Backend,
    pub(super) py: Python<'py>,
    /// Whether rings are looked at after the turn, and need not kick before.
    polls: bool,
    /// KeyboardInterrupt or SystemExit: raised when the turn is over, after what was begun is done.
    fatal: Option<PyErr>,
}

impl<'a, 'py> Turn<'a, 'py> {
    pub(super) fn new(backend: &'a Backend, py: Python<'py>, polls: bool) -> Self {
        Self { backend, py, polls, fatal: None }
    }

    /// What ends a child that a handler, or a hook, has forked.
    fn end_of_child(self) -> PyErr {
        self.fatal.unwrap_or_else(|| another_process(self.py))
    }

    /// What is to be raised after the turn.
    pub(super) fn into_fatal(self) -> Option<PyErr> {
        self.fatal
    }

    /// What workers leave to the loop.
    fn hear_workers(&mut self) {
        if let Some(error) = lock(&self.backend.fatal).take() {
            self.fatal.get_or_insert(error);
        }
        for queue in std::mem::take(&mut *lock(&self.backend.kicked)) {
            self.with_session(|session, hooks| {
                session.on_kick(queue, hooks);
                Ok(Flow::Continue)
            });
        }
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Ready { token: Token::Session, .. } => {
                self.with_session(|session, hooks| session.on_ready(hooks));
            }
            Event::Ready { token: Token::Channel, .. } => self.backend.channel.on_ready(),
            Event::Ready { token: Token::Queue(queue), .. } => {
                self.with_session(|session, hooks| {
                    session.on_kick(queue, hooks);
                    Ok(Flow::Continue)
                });
                // A ring that is being polled does not need the kick.
                let polled = self.polls && lock(&self.backend.inner).pending.contains(&queue);
                if !polled {
                    self.process(queue);
                }
            }
            Event::Ready { token: Token::Device(id), readable, writable } => {
                let callback = lock(&self.backend.watchers).get(&id).map(|callback| callback.clone_ref(self.py));
                if let Some(callback) = callback {
                    let result = callback.call1(self.py, (readable, writable));
                    self.survive(result.map(drop), "a watcher");
                }
            }
            Event::Timer(id) if lock(&self.backend.inner).poll_timer.take_if(|poll| *poll == id).is_some() => {
                for queue in self.polled_queues() {
                    self.process(queue);
                }
            }
            Event::Timer(id) => {
                let callback = lock(&self.backend.timers).remove(&id);
                if let Some(callback) = callback {
                    let result = callback.call0(self.py);
                    self.survive(result.map(drop), "a timer");
                }
            }
        }
    }

    fn call_soon(&mut self) {
        let callbacks = std::mem::take(&mut *lock(&self.backend.soon));
        for callback in callbacks {
            let result = callback.call0(self.py);
            self.survive(result.map(drop), "a callback");
        }
    }

    fn report_broken(&mut self) {
        for (queue, error) in std::mem::take(&mut *lock(&self.backend.broken)) {
            self.with_session(|session, hooks| {
                session.queue_broke(queue, &error, hooks);
                Ok(Flow::Continue)
            });
        }
    }

    /// Do something with the session, if there is one, then look at the queues that it made ready.
    fn with_session(&mut self, action: impl FnOnce(&mut Session, &mut dyn Hooks) -> Result<Flow, Error>) {
        let Some(mut session) = lock(&self.backend.inner).session.take() else { return };
        let outcome = action(&mut session, self);
        let mut ready = Vec::new();
        while let Some(queue) = session.next_ready() {
            ready.push(queue);
        }
        let reason = match outcome {
            Ok(Flow::Continue) => {
                lock(&self.backend.inner).session = Some(session);
                for queue in ready {
                    self.process(queue);
                }
                return;
            }
            Ok(Flow::Ended) => None,
            Err(error) => Some(to_python(self.py, error)),
        };
        drop(session);
        self.backend.connected.store(false, Ordering::Release);
        self.tell("session_ended", (reason,));
    }

    /// Handle what is available on a queue, up to a batch, or let its worker do so.
    fn process(&mut self, queue: u16) {
        let Some(vring) = self.backend.vrings.get(usize::from(queue)) else { return };
        if let Some(worker) = self.backend.worker(vring) {
            if vring.available() > 0 {
                lock(&self.backend.inner).polls_in_vain = 0;
            }
            worker.hand_over(queue);
            return;
        }
        let mut workspace = std::mem::take(&mut lock(&self.backend.inner).workspaces[usize::from(queue)]);
        let again = self.work(queue, &mut workspace);
        let mut inner = lock(&self.backend.inner);
        inner.workspaces[usize::from(queue)] = workspace;
        if again && !inner.pending.contains(&queue) {
            inner.pending.push(queue);
        }
    }

    /// Handle what is available on a queue of this thread, up to a batch. Returns whether there may be more.
    pub(super) fn work(&mut self, queue: u16, workspace: &mut Workspace) -> bool {
        let Some(vring) = self.backend.vrings.get(usize::from(queue)) else { return false };
        let handler = lock(&self.backend.handlers)
            .get(usize::from(queue))
            .and_then(|handler| handler.as_ref().map(|handler| handler.clone_ref(self.py)));
        let Some(handler) = handler else {
            // The device takes from this queue by itself, and may have been waiting for buffers.
            if vring.available() > 0 {
                self.tell("buffers_available", (queue,));
            }
            return false;
        };
        let patience = Duration::from_nanos(self.backend.patience.load(Ordering::Relaxed));
        let changes = &self.backend.changes;
        let begin = Instant::now();
        let mut handled = false;
        loop {
            match workspace.take(vring) {
                Taken::Chains(run) => {
                    let result =
                        workspace.handle(self.py, Origin { vring, run: &run, patience, changes }, &handler, self);
                    self.survive(result, "making a request");
                    handled = true;
                }
                Taken::Nothing | Taken::NotRunning => break,
                Taken::Broken(error) => {
                    lock(&self.backend.broken).push((queue, error));
                    self.backend.wake();
                    break;
                }
            }
            // What came meanwhile needs no turn of its own, nor the driver a notification before it.
            if self.fatal.is_some() || vring.available() == 0 || begin.elapsed() >= patience.min(PATIENCE) {
                break;
            }
        }
        workspace.notify(vring);
        if handled {
            lock(&self.backend.inner).polls_in_vain = 0;
        }
        // The driver is asked to kick when nothing is left: by a ring that is being polled, later.
        handled && (self.polls || vring.rest())
    }

    /// Look again at queues where there was something. One that is being polled is not, unless something came: a look that
    /// finds nothing asks the driver to kick. It is when it was `looked` at for long enough.
    fn look_at_pending(&mut self, pending: Vec<u16>, looked: &[u16]) {
        if pending.is_empty() {
            return;
        }
        let is_due = |queue: &u16| {
            !self.polls || looked.contains(queue) || self.backend.vrings[usize::from(*queue)].available() > 0
        };
        let (now, later): (Vec<_>, Vec<_>) = pending.into_iter().partition(is_due);
        lock(&self.backend.inner).pending.extend(later);
        for queue in now {
            self.process(queue);
        }
    }

    /// Look again at rings that cannot kick: soon while they are busy, less often when they are not.
    fn schedule_polling(&mut self) {
        let mut inner = lock(&self.backend.inner);
        let polled = inner.session.as_ref().map(|session| session.polled_queues()).unwrap_or_default();
        if inner.poll_timer.is_some() || polled.is_empty() {
            return;
        }
        inner.polls_in_vain = inner.polls_in_vain.saturating_add(1);
        let after = if inner.polls_in_vain < POLLS_UNTIL_IDLE { POLL_BUSY } else { POLL_IDLE };
        inner.poll_timer = Some(self.backend.events.add_timer(Instant::now() + after));
    }

    fn polled_queues(&self) -> Vec<u16> {
        lock(&self.backend.inner).session.as_ref().map(|session| session.polled_queues()).unwrap_or_default()
    }

    /// Call a method of the runtime.
    fn tell(&mut self, method: &str, arguments: impl pyo3::call::PyCallArgs<'py>) {
        let result = self.backend.runtime.bind(self.py).call_method1(method, arguments);
        self.backend.count_change();
        self.survive(result.map(drop), method);
    }

    /// Call a method of the runtime for an answer. What it raises refuses what the front-end asked for.
    pub(super) fn ask<T>(
        &mut self,
        method: &str,
        arguments: impl pyo3::call::PyCallArgs<'py>,
        answer: impl FnOnce(Bound<'py, PyAny>) -> PyResult<T>,
    ) -> Result<T, String> {
        let result = self.backend.runtime.bind(self.py).call_method1(method, arguments).and_then(answer);
        self.backend.count_change();
        result.map_err(|error| {
            let text = error.value(self.py).to_string();
            self.survive(Err(error), method);
            text
        })
    }

    /// An exception outside of any request is reported, and the loop goes on; one that means the end is kept.
    fn survive(&mut self, result: PyResult<()>, what: &str) {
        let Err(error) = result else { return };
        if is_fatal(self.py, &error) {
            self.fatal.get_or_insert(error);
        } else {
            let value = with_traceback(self.py, &error);
            let reported = self.backend.runtime.bind(self.py).call_method1("callback_failed", (what, value));
            if let Err(second) = reported {
                second.write_unraisable(self.py, None);
            }
        }
    }
}

impl Failures for Turn<'_, '_> {
    fn request_failed(&mut self, request: &Py<Request>, error: &PyErr) {
        if self.backend.forked() {
            // The request is the parent's, and so is the device.
            self.fatal.get_or_insert_with(|| error.clone_ref(self.py));
            return;
        }
        let queue = request.get().queue();
        self.backend.vrings[usize::from(queue)].count_error();
        self.tell("request_failed", (queue, request, with_traceback(self.py, error)));
        if is_fatal(self.py, error) {
            self.fatal.get_or_insert_with(|| error.clone_ref(self.py));
        }
    }
}

impl Hooks for Turn<'_, '_> {
    fn features_negotiated(&mut self, features: u64) {
        self.tell("features_negotiated", (features,));
    }

    fn queue_started(&mut self, queue: u16) {
        self.tell("queue_started", (queue,));
    }

    fn queue_stopping(&mut self, queue: u16) {
        self.tell("queue_stopping", (queue,));
    }

    fn queue_broke(&mut self, queue: u16, error: &RingError) {
        self.tell("queue_broke", (queue, error.to_string()));
    }

    fn config_written(&mut self, offset: u32, bytes: &[u8]) -> Result<(), String> {
        let bytes = PyBytes::new(self.py, bytes);
        self.ask("config_written", (offset, bytes), |_| Ok(()))
    }

    fn device_reset(&mut self) {
        self.tell("device_reset", ());
    }

    fn begin_transfer(&mut self, direction: Direction, file: OwnedFd) -> Result<(), String> {
        // The first thing that is done there is to keep it from being lost.
        let arguments = (direction == Direction::Save, file.into_raw_fd());
        self.ask("begin_transfer", arguments, |_| Ok(()))
    }

    fn transferred(&mut self) -> Option<Result<(), String>> {
        match self.ask("transferred", (), |failure| failure.extract::<Option<String>>()) {
            Ok(None) => None,
            Ok(Some(failure)) if failure.is_empty() => Some(Ok(())),
            Ok(Some(failure)) | Err(failure) => Some(Err(failure)),
        }
    }

    fn abandon_transfer(&mut self) {
        self.tell("abandon_transfer", ());
    }
}

/// Tell `then` what the front-end said.
fn answered(py: Python<'_>, then: &Py<PyAny>, outcome: Result<Granted, Error>) {
    let result = match outcome {
        Ok(granted) => then.call1(py, (granted.descriptor.map(IntoRawFd::into_raw_fd), py.None())),
        Err(error) => then.call1(py, (py.None(), to_python(py, error).into_value(py))),
    };
    if let Err(error) = result {
        error.write_unraisable(py, Some(then.bind(py)));
    }
}

fn another_process(py: Python<'_>) -> PyErr {
    to_python(py, Error::AnotherProcess("the device that is being served"))
}

/// The exception object of an error. Python 3.11 keeps the traceback apart until somebody puts them together.
fn with_traceback(py: Python<'_>, error: &PyErr) -> Py<PyBaseException> {
    error.clone_ref(py).into_value(py)
}

fn is_fatal(py: Python<'_>, error: &PyErr) -> bool {
    !error.is_instance_of::<pyo3::exceptions::PyException>(py)
}

/// The thread for the queue `index`, if it has a handler and there are any.
fn worker_of(workers: &[Worker], index: u16) -> Option<&Worker> {
    usize::from(index).checked_rem(workers.len()).and_then(|at| workers.get(at))
}

fn borrow(fd: &i32) -> PyResult<std::os::fd::BorrowedFd<'_>> {
    if *fd < 0 {
        return Err(PyValueError::new_err("a file descriptor is not negative"));
    }
    // SAFETY: the caller holds the file open during the call; a closed number makes epoll_ctl fail.
    Ok(unsafe { std::os::fd::BorrowedFd::borrow_raw(*fd) })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
