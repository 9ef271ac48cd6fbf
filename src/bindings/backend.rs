//! A device being served: its queues, its configuration space, its session, and the loop that drives them.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyBaseException, PyIndexError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};
use pyo3::{PyTraverseError, PyVisit};

use super::batch::{Failures, Origin, PATIENCE, Workspace};
use super::errors::{self, to_python};
use super::extensions::duplicate;
use super::mailbox::Mailbox;
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

/// After this the main thread looks for signals, whatever else happens.
const SIGNAL_PATIENCE: Duration = Duration::from_millis(500);

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
    /// The thread that runs the loop has this locked as long as it does. Nobody waits for it.
    state: Mutex<LoopState>,
    /// A front-end that the loop has not heard of.
    arrived: Mutex<Option<Box<Session>>>,
    /// Every queue is to be looked at.
    look_at_all: AtomicBool,
    /// How long requests that are done may wait for others of their batch, in nanoseconds.
    patience: AtomicU64,
    /// How long at most to look for requests before a sleep, in nanoseconds.
    busy_poll: AtomicU64,
    stopping: AtomicBool,
    watchers: Mutex<Callbacks>,
    timers: Mutex<HashMap<u64, Py<PyAny>>>,
    soon: Mailbox<Py<PyAny>>,
    /// Threads beside the loop's, over which the queues with a handler are spread.
    workers: Vec<Worker>,
    /// Queues that were kicked on a worker although they do not run: only the session can say what that means.
    kicked: Mailbox<u16>,
    /// What a handler on a worker raised that means the end.
    fatal: Mutex<Option<PyErr>>,
    /// Queues that broke while another thread took from them.
    broken: Mailbox<(u16, RingError)>,
    next_watcher: AtomicU32,
    /// Goes up after everything that may have changed the device.
    changes: AtomicU64,
    connected: AtomicBool,
}

/// What the loop works with.
#[derive(Debug, Default)]
struct LoopState {
    session: Option<Box<Session>>,
    events: Vec<Event>,
    /// For each queue.
    workspaces: Vec<Workspace>,
    /// Whether to look for requests before the next sleep.
    polling: Polling,
    /// Queues with more to do than one turn allows.
    pending: Vec<u16>,
    poll_timer: Option<u64>,
    /// Ends a wait on the main thread.
    signal_timer: Option<u64>,
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
            state: Mutex::new(LoopState { workspaces, ..LoopState::default() }),
            arrived: Mutex::default(),
            look_at_all: AtomicBool::new(false),
            patience: AtomicU64::new(PATIENCE.as_nanos() as u64),
            busy_poll: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            watchers: Mutex::default(),
            timers: Mutex::default(),
            soon: Mailbox::default(),
            workers,
            kicked: Mailbox::default(),
            fatal: Mutex::default(),
            broken: Mailbox::default(),
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
        self.look_at_all.store(true, Ordering::Release);
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
        let mut arrived = lock(&self.arrived);
        if self.connected() {
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
        *arrived = Some(Box::new(session));
        self.connected.store(true, Ordering::Release);
        Ok(())
    }

    /// Handle what has happened, waiting for it up to `timeout` seconds (None: as long as it takes). Returns whether
    /// the loop goes on.
    #[pyo3(signature = (timeout = None))]
    fn dispatch(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
        let mut state = self.enter(py)?;
        let timeout = timeout.map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or_default());
        self.turn(py, &mut state, timeout)
    }

    /// Run the loop until :meth:`stop`.
    fn run(&self, py: Python<'_>) -> PyResult<()> {
        // Python handles signals on the main thread. One that comes between the last look at them and the wait, or on
        // another thread, does not end the wait.
        let is_main = rustix::thread::gettid() == rustix::process::getpid();
        let mut state = self.enter(py)?;
        loop {
            // A timeout would be armed and disarmed in each turn.
            if is_main && state.signal_timer.is_none() {
                state.signal_timer = Some(self.events.add_timer(Instant::now() + SIGNAL_PATIENCE));
            }
            if !self.turn(py, &mut state, None)? {
                return Ok(());
            }
        }
    }

    /// Whether this is a child that was forked from the process that serves the device. It leaves it alone.
    #[getter]
    fn forked(&self) -> bool {
        !self.events.process().is_current()
    }

    /// Whether :meth:`dispatch` would find something to do that :meth:`fileno` does not tell of.
    #[getter]
    fn busy(&self) -> bool {
        let has_pending = self.try_state().is_some_and(|state| !state.pending.is_empty());
        has_pending || self.look_at_all.load(Ordering::Relaxed)
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
        self.soon.push(callback);
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
        if let Some(soon) = self.soon.try_look() {
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
        self.broken.push((vring.index(), reason.clone()));
        self.events.wakeup().wake();
        to_python(py, Error::Ring { queue: vring.index(), reason })
    }

    /// A worker, whose loop is `events`, heard of a kick of its `queue`.
    pub(super) fn kicked(&self, queue: u16, events: &EventLoop) {
        let Some(vring) = self.vrings.get(usize::from(queue)) else { return };
        vring.on_kick(|kick| events.forget(kick));
        if !vring.is_active() {
            self.kicked.push(queue);
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

    /// How long at most to look for requests before a sleep.
    pub(super) fn busy_poll(&self) -> Duration {
        Duration::from_nanos(self.busy_poll.load(Ordering::Relaxed))
    }

    pub(super) fn vrings(&self) -> &[Arc<Vring>] {
        &self.vrings
    }

    /// Run the loop on this thread, as long as what is returned is kept.
    fn enter(&self, py: Python<'_>) -> PyResult<MutexGuard<'_, LoopState>> {
        self.check_process(py)?;
        let state = self.try_state();
        let state = state.ok_or_else(|| errors::state_error(py, "the loop of the device is running already"))?;
        self.events.enter();
        Ok(state)
    }

    /// What the loop works with, unless it runs.
    fn try_state(&self) -> Option<MutexGuard<'_, LoopState>> {
        match self.state.try_lock() {
            Ok(state) => Some(state),
            Err(TryLockError::Poisoned(state)) => Some(state.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// One turn of the loop.
    fn turn(&self, py: Python<'_>, state: &mut LoopState, timeout: Option<Duration>) -> PyResult<bool> {
        let mut events = std::mem::take(&mut state.events);
        let before = state.pending.clone();
        state.polling.set_most(self.busy_poll());
        let waited = py.detach(|| state.polling.wait(&self.events, &self.vrings, &before, timeout, &mut events));
        let looked = waited.map_err(|error| to_python(py, error))?;
        let polls = state.polling.is_due() && timeout.is_none_or(|timeout| !timeout.is_zero());
        let mut turn = Turn { caller: Caller::new(self, py, polls), state };
        turn.caller.fatal = py.check_signals().err();
        if !self.workers.is_empty() {
            turn.hear_workers();
        }
        turn.call_soon();
        turn.report_broken();
        for event in events.drain(..) {
            turn.on_event(event);
        }
        turn.state.events = events;
        if self.forked() {
            return Err(turn.caller.end_of_child());
        }
        self.channel.settle();
        turn.look_at_pending(if looked { &before } else { &[] });
        if self.forked() {
            return Err(turn.caller.end_of_child());
        }
        turn.with_session(|session, hooks| session.resume(hooks));
        turn.schedule_polling();
        if let Some(error) = turn.caller.fatal.take() {
            return Err(error);
        }
        if self.stopping.load(Ordering::Acquire) {
            return turn.wind_up();
        }
        Ok(true)
    }
}

/// What one turn of the loop works with.
struct Turn<'a, 'py> {
    caller: Caller<'a, 'py>,
    state: &'a mut LoopState,
}

impl Turn<'_, '_> {
    /// The loop was asked to stop: end the session, and then the loop.
    fn wind_up(&mut self) -> PyResult<bool> {
        self.with_session(
            |session, hooks| if session.is_ending() { Ok(Flow::Continue) } else { session.end(hooks, None) },
        );
        if let Some(error) = self.caller.fatal.take() {
            return Err(error);
        }
        let backend = self.caller.backend;
        let goes_on = backend.connected();
        if !goes_on {
            // Whoever waits for the front-end is told that it is gone.
            backend.channel.settle();
            backend.stopping.store(false, Ordering::Release);
        }
        Ok(goes_on)
    }

    /// What workers leave to the loop.
    fn hear_workers(&mut self) {
        let backend = self.caller.backend;
        if let Some(error) = lock(&backend.fatal).take() {
            self.caller.fatal.get_or_insert(error);
        }
        for queue in backend.kicked.take() {
            self.on_kick(queue);
        }
    }

    fn on_event(&mut self, event: Event) {
        let backend = self.caller.backend;
        match event {
            Event::Ready { token: Token::Session, .. } => {
                self.with_session(|session, hooks| session.on_ready(hooks));
            }
            Event::Ready { token: Token::Channel, .. } => backend.channel.on_ready(),
            Event::Ready { token: Token::Queue(queue), .. } => {
                self.on_kick(queue);
                // A ring that is being polled does not need the kick.
                let polled = self.caller.polls && self.state.pending.contains(&queue);
                if !polled {
                    self.process(queue);
                }
            }
            Event::Ready { token: Token::Device(id), readable, writable } => {
                let callback = lock(&backend.watchers).get(&id).map(|callback| callback.clone_ref(self.caller.py));
                if let Some(callback) = callback {
                    let result = callback.call1(self.caller.py, (readable, writable));
                    self.caller.survive(result.map(drop), "a watcher");
                }
            }
            Event::Timer(id) if self.state.poll_timer.take_if(|poll| *poll == id).is_some() => {
                for queue in self.polled_queues() {
                    self.process(queue);
                }
            }
            Event::Timer(id) if self.state.signal_timer.take_if(|timer| *timer == id).is_some() => {}
            Event::Timer(id) => {
                let callback = lock(&backend.timers).remove(&id);
                if let Some(callback) = callback {
                    let result = callback.call0(self.caller.py);
                    self.caller.survive(result.map(drop), "a timer");
                }
            }
        }
    }

    fn on_kick(&mut self, queue: u16) {
        self.with_session(|session, hooks| {
            session.on_kick(queue, hooks);
            Ok(Flow::Continue)
        });
    }

    fn call_soon(&mut self) {
        for callback in self.caller.backend.soon.take() {
            let result = callback.call0(self.caller.py);
            self.caller.survive(result.map(drop), "a callback");
        }
    }

    fn report_broken(&mut self) {
        for (queue, error) in self.caller.backend.broken.take() {
            self.with_session(|session, hooks| {
                session.queue_broke(queue, &error, hooks);
                Ok(Flow::Continue)
            });
        }
    }

    /// Do something with the session, if there is one, then look at the queues that it made ready.
    fn with_session(&mut self, action: impl FnOnce(&mut Session, &mut dyn Hooks) -> Result<Flow, Error>) {
        let arrived = || lock(&self.caller.backend.arrived).take();
        let Some(mut session) = self.state.session.take().or_else(arrived) else { return };
        let outcome = action(&mut session, &mut self.caller);
        let mut ready = Vec::new();
        while let Some(queue) = session.next_ready() {
            ready.push(queue);
        }
        let reason = match outcome {
            Ok(Flow::Continue) => {
                self.state.session = Some(session);
                for queue in ready {
                    self.process(queue);
                }
                return;
            }
            Ok(Flow::Ended) => None,
            Err(error) => Some(to_python(self.caller.py, error)),
        };
        drop(session);
        self.caller.backend.connected.store(false, Ordering::Release);
        self.caller.tell("session_ended", (reason,));
    }

    /// Handle what is available on a queue, up to a batch, or let its worker do so.
    fn process(&mut self, queue: u16) {
        let Some(vring) = self.caller.backend.vrings.get(usize::from(queue)) else { return };
        if let Some(worker) = self.caller.backend.worker(vring) {
            if vring.available() > 0 {
                self.state.polls_in_vain = 0;
            }
            worker.hand_over(queue);
            return;
        }
        let worked = self.caller.work(queue, &mut self.state.workspaces[usize::from(queue)]);
        if worked != Worked::Nothing {
            self.state.polls_in_vain = 0;
        }
        if worked == Worked::More && !self.state.pending.contains(&queue) {
            self.state.pending.push(queue);
        }
    }

    /// Look again at queues where there was something. One that is being polled is not, unless something came: a look that
    /// finds nothing asks the driver to kick. It is when it was `looked` at for long enough.
    fn look_at_pending(&mut self, looked: &[u16]) {
        let backend = self.caller.backend;
        if backend.look_at_all.load(Ordering::Relaxed) && backend.look_at_all.swap(false, Ordering::Acquire) {
            self.state.pending = backend.vrings.iter().map(|vring| vring.index()).collect();
        }
        if self.state.pending.is_empty() {
            return;
        }
        let polls = self.caller.polls;
        let is_due =
            |queue: &u16| !polls || looked.contains(queue) || backend.vrings[usize::from(*queue)].available() > 0;
        let (now, later): (Vec<_>, Vec<_>) = std::mem::take(&mut self.state.pending).into_iter().partition(is_due);
        self.state.pending = later;
        for queue in now {
            self.process(queue);
        }
    }

    /// Look again at rings that cannot kick: soon while they are busy, less often when they are not.
    fn schedule_polling(&mut self) {
        if self.state.poll_timer.is_some() || self.polled_queues().is_empty() {
            return;
        }
        self.state.polls_in_vain = self.state.polls_in_vain.saturating_add(1);
        let after = if self.state.polls_in_vain < POLLS_UNTIL_IDLE { POLL_BUSY } else { POLL_IDLE };
        self.state.poll_timer = Some(self.caller.backend.events.add_timer(Instant::now() + after));
    }

    fn polled_queues(&self) -> Vec<u16> {
        self.state.session.as_ref().map(|session| session.polled_queues()).unwrap_or_default()
    }
}

/// What came of a look at a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Worked {
    /// There was nothing.
    Nothing,
    /// What there was is done, and the driver was asked to kick.
    All,
    /// There may be more.
    More,
}

/// Calls Python, for a turn of a loop: handlers, callbacks and hooks. What they raise is reported.
pub(super) struct Caller<'a, 'py> {
    backend: &'a Backend,
    pub(super) py: Python<'py>,
    /// Whether rings are looked at after the turn, and need not kick before.
    polls: bool,
    /// KeyboardInterrupt or SystemExit: raised when the turn is over, after what was begun is done.
    fatal: Option<PyErr>,
}

impl<'a, 'py> Caller<'a, 'py> {
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

    /// Handle what is available on a queue of this thread, up to a batch.
    pub(super) fn work(&mut self, queue: u16, workspace: &mut Workspace) -> Worked {
        let Some(vring) = self.backend.vrings.get(usize::from(queue)) else { return Worked::Nothing };
        let handler = lock(&self.backend.handlers)
            .get(usize::from(queue))
            .and_then(|handler| handler.as_ref().map(|handler| handler.clone_ref(self.py)));
        let Some(handler) = handler else {
            // The device takes from this queue by itself, and may have been waiting for buffers.
            if vring.available() > 0 {
                self.tell("buffers_available", (queue,));
            }
            return Worked::Nothing;
        };
        let patience = Duration::from_nanos(self.backend.patience.load(Ordering::Relaxed));
        let changes = &self.backend.changes;
        let begin = Instant::now();
        let mut taken = begin;
        let mut worked = Worked::Nothing;
        loop {
            match workspace.take(vring) {
                Taken::Chains(run) => {
                    let origin = Origin { vring, run: &run, patience, taken, changes };
                    let result = workspace.handle(self.py, origin, &handler, self);
                    self.survive(result, "making a request");
                    worked = Worked::More;
                }
                Taken::Nothing | Taken::NotRunning => break,
                Taken::Broken(error) => {
                    self.backend.broken.push((queue, error));
                    self.backend.wake();
                    break;
                }
            }
            if self.fatal.is_some() {
                break;
            }
            // What came meanwhile needs no turn of its own, nor the driver a notification before it. It is asked to kick
            // when nothing is left: by a ring that is being polled, later.
            if !vring.conclude(!self.polls) {
                return if self.polls { Worked::More } else { Worked::All };
            }
            taken = Instant::now();
            if taken - begin >= patience.min(PATIENCE) {
                break;
            }
        }
        workspace.notify(vring);
        worked
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

impl Failures for Caller<'_, '_> {
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

impl Hooks for Caller<'_, '_> {
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
