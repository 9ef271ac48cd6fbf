//! A batch of requests on its way through Python handlers.
//!
//! Owns the objects that are used again for the next batch: requests that nobody kept, chains, lists.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyList, PyType};
use pyo3::{PyTraverseError, PyVisit, ffi};

use super::disk::{Blocks, Wait};
use super::has_lock;
use super::request::Request;
use crate::backend::{Lead, Run, Show, TOGETHER, Taken, Turnaround, Vring};
use crate::virtqueue::{Chain, Used};

/// How long requests that are done may wait for others of their batch before the driver sees them.
pub(super) const PATIENCE: Duration = Duration::from_micros(200);

/// The most requests that a batch handler gets at once. What they have is still in the processor's caches when they are done.
const PART: usize = 64;

/// Who takes the requests of a queue together, and who takes those one by one that are left then; before them, `blocks()`
/// may say what is done without them.
#[pyclass(frozen, module = "vhost_user._core")]
#[derive(Debug)]
pub struct BatchHandler {
    together: Option<Py<PyAny>>,
    each: Option<Py<PyAny>>,
    blocks: Option<Py<PyAny>>,
    /// Whose `blocks()` it is, if that is a method.
    device: Option<Py<PyAny>>,
}

#[pymethods]
impl BatchHandler {
    #[new]
    fn new(py: Python<'_>, together: Option<Py<PyAny>>, each: Option<Py<PyAny>>, blocks: Option<Py<PyAny>>) -> Self {
        let device = blocks.as_ref().and_then(|blocks| blocks.getattr(py, "__self__").ok());
        Self { together, each, blocks, device }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        [&self.together, &self.each, &self.blocks, &self.device]
            .into_iter()
            .flatten()
            .try_for_each(|handler| visit.call(handler))
    }
}

/// What the batches of one queue are worked on with. Nothing in it keeps a driver's memory between two batches.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    pub(super) chains: Vec<Chain>,
    pub(super) spare: Vec<Chain>,
    used: Vec<Used>,
    /// Completed requests that nobody else has.
    requests: Vec<Py<Request>>,
    /// How many of them, from the first on, keep no memory.
    at_rest: usize,
    share: Share,
    turnaround: Turnaround,
    /// What `blocks()` has returned, and when that was, as `Origin::changes` counts.
    blocks: Option<(u64, Py<Blocks>)>,
}

/// How many requests of a queue are handled before the others, and the front-end, are looked at.
#[derive(Debug)]
struct Share {
    requests: usize,
}

impl Default for Share {
    fn default() -> Self {
        Self { requests: 64 }
    }
}

impl Share {
    /// What so few requests cost is not worth a look at the clock.
    const FEW: usize = 8;
    const MOST: usize = 256;
    const LONG: Duration = Duration::from_millis(4);

    fn begin(&self, requests: usize) -> Option<Instant> {
        (requests > Self::FEW).then(Instant::now)
    }

    /// Of requests that take long there are fewer: longer than the driver may wait for them, if that is more.
    fn end(&mut self, begin: Option<Instant>, patience: Duration) {
        let Some(duration) = begin.map(|begin| begin.elapsed()) else { return };
        let long = Self::LONG.max(patience);
        if duration > long {
            self.requests = (self.requests / 2).max(Self::FEW);
        } else if duration < long / 4 {
            self.requests = (self.requests * 2).min(Self::MOST);
        }
    }
}

/// The queue that a batch came on, the life of its ring, and how long what is done may wait.
#[derive(Clone, Copy)]
pub(super) struct Origin<'a> {
    pub(super) vring: &'a Arc<Vring>,
    pub(super) run: &'a Arc<Run>,
    pub(super) patience: Duration,
    /// When it was taken.
    pub(super) taken: Instant,
    /// Another number after each change of the device that the core has heard of.
    pub(super) changes: &'a AtomicU64,
}

/// Who hears of a request that failed.
pub(super) trait Failures {
    fn request_failed(&mut self, request: &Py<Request>, error: &PyErr);
}

impl Workspace {
    /// Let `handler` work on the chains that were taken in `run`, and give back what is done.
    pub(super) fn handle(
        &mut self,
        py: Python<'_>,
        origin: Origin<'_>,
        handler: &Py<PyAny>,
        failures: &mut dyn Failures,
    ) -> PyResult<()> {
        let begin = self.share.begin(self.chains.len());
        let result = match handler.bind(py).cast::<BatchHandler>() {
            Ok(handler) => self.handle_batch(py, origin, handler.get(), failures),
            Err(_) => self.handle_each(py, origin, handler, failures),
        };
        self.show(origin);
        self.let_go_of_memory();
        self.share.end(begin, origin.patience);
        result
    }

    /// Take what is available, as much as the others allow.
    pub(super) fn take(&mut self, vring: &Vring) -> Taken {
        vring.take(self.share.requests, &mut self.chains, &mut self.spare)
    }

    fn handle_each(
        &mut self,
        py: Python<'_>,
        origin: Origin<'_>,
        handler: &Py<PyAny>,
        failures: &mut dyn Failures,
    ) -> PyResult<()> {
        let mut chains = std::mem::take(&mut self.chains);
        let mut lead = self.turnaround.begin(origin.taken, origin.patience, chains.len());
        for chain in chains.drain(..) {
            let request = self.request(py, origin, chain)?;
            self.call(py, handler, &request, failures);
            self.finish_and_keep(py, request);
            self.give_back(origin, &mut lead);
            if !origin.vring.is_ours() {
                // The handler forked, and this is the child: the others are its parent's.
                break;
            }
        }
        self.chains = chains;
        Ok(())
    }

    fn handle_batch(
        &mut self,
        py: Python<'_>,
        origin: Origin<'_>,
        handler: &BatchHandler,
        failures: &mut dyn Failures,
    ) -> PyResult<()> {
        let transferred = match &handler.blocks {
            Some(blocks) => self.transfer(py, origin, blocks, handler.device.as_ref()),
            None => Ok(()),
        };
        let handled = match (&handler.together, &handler.each) {
            _ if self.chains.is_empty() => Ok(()),
            (Some(together), _) => self.handle_together(py, origin, together, handler, failures),
            (None, Some(each)) => self.handle_each(py, origin, each, failures),
            (None, None) => Ok(()),
        };
        transferred.and(handled)
    }

    /// Let what `blocks` returns do what it can of the chains, without the interpreter. The others are left.
    fn transfer(
        &mut self,
        py: Python<'_>,
        origin: Origin<'_>,
        blocks: &Py<PyAny>,
        device: Option<&Py<PyAny>>,
    ) -> PyResult<()> {
        // What changes meanwhile is a reason to ask again. The chains were taken before, and who makes one after a change
        // has the change taken into account.
        let changes = origin.changes.load(Ordering::Acquire);
        let lasts = |known: &(u64, Py<Blocks>)| {
            known.0 == changes && device.is_some_and(|device| known.1.get().last(device.bind(py)))
        };
        let (at, blocks) = match self.blocks.take().filter(lasts) {
            Some(known) => known,
            None => {
                let blocks = blocks.bind(py).call0()?;
                if blocks.is_none() {
                    return Ok(());
                }
                (changes, blocks.cast_into::<Blocks>()?.unbind())
            }
        };
        let kept = blocks.get();
        // To let go of the interpreter and to take it again is as much work as a small request.
        if self.chains.len() == 1 {
            self.transfer_each(origin, kept, Wait::Never);
        }
        if !self.chains.is_empty() {
            py.detach(|| self.transfer_each(origin, kept, Wait::IfNeedBe));
        }
        self.blocks = Some((at, blocks));
        Ok(())
    }

    fn transfer_each(&mut self, origin: Origin<'_>, blocks: &Blocks, wait: Wait) {
        let mut chains = std::mem::take(&mut self.chains);
        let mut left = Vec::new();
        let mut lead = self.turnaround.begin(origin.taken, origin.patience, chains.len());
        for chain in chains.drain(..) {
            // SAFETY: the run keeps the snapshot of its chains.
            match unsafe { blocks.transfer(&chain, wait) } {
                Some(used) => {
                    self.used.push(used);
                    self.spare.push(chain);
                }
                None => left.push(chain),
            }
            self.give_back(origin, &mut lead);
        }
        self.chains = if left.is_empty() { chains } else { left };
    }

    fn handle_together(
        &mut self,
        py: Python<'_>,
        origin: Origin<'_>,
        together: &Py<PyAny>,
        handler: &BatchHandler,
        failures: &mut dyn Failures,
    ) -> PyResult<()> {
        let mut chains = std::mem::take(&mut self.chains);
        let mut rest = chains.drain(..);
        let mut notified = Instant::now();
        while !rest.as_slice().is_empty() {
            let requests = rest.by_ref().take(PART).map(|chain| self.request(py, origin, chain));
            let requests = requests.collect::<PyResult<Vec<_>>>()?;
            self.handle_part(py, origin, together, handler, requests, failures)?;
            if notified.elapsed() >= origin.patience {
                self.publish(origin);
                notified = Instant::now();
            } else if origin.patience < TOGETHER {
                // A driver that looks for them, and can take one without the other, makes new ones meanwhile.
                self.show(origin);
            }
        }
        drop(rest);
        self.chains = chains;
        Ok(())
    }

    fn handle_part(
        &mut self,
        py: Python<'_>,
        origin: Origin<'_>,
        together: &Py<PyAny>,
        handler: &BatchHandler,
        requests: Vec<Py<Request>>,
        failures: &mut dyn Failures,
    ) -> PyResult<()> {
        let batch = batch_class(py)?.call1((PyList::new(py, &requests)?,))?;
        let outcome = call(py, together, &batch);
        drop(batch);
        let left = match outcome {
            Ok(left) if left.is_none() => Ok(Vec::new()),
            Ok(left) => left.extract::<Vec<Py<Request>>>(),
            Err(error) => Err(error),
        };
        match left {
            Ok(left) if left.is_empty() => {}
            Ok(left) => self.handle_left(py, origin, &requests, &left, handler, failures),
            Err(error) => {
                for request in requests.iter().filter(|request| request.get().is_handled(py)) {
                    failures.request_failed(request, &error);
                }
            }
        }
        for request in requests {
            self.finish_and_keep(py, request);
        }
        Ok(())
    }

    /// Work on those of `requests` one by one that are `left`. The others are done.
    fn handle_left(
        &mut self,
        py: Python<'_>,
        origin: Origin<'_>,
        requests: &[Py<Request>],
        left: &[Py<Request>],
        handler: &BatchHandler,
        failures: &mut dyn Failures,
    ) {
        let mut addresses: Vec<_> = left.iter().map(Py::as_ptr).collect();
        addresses.sort_unstable();
        for request in requests.iter().filter(|request| addresses.binary_search(&request.as_ptr()).is_err()) {
            self.finish(py, request);
        }
        self.publish(origin);
        let mut lead = self.turnaround.begin(Instant::now(), origin.patience, left.len());
        for request in left.iter().filter(|request| request.get().is_handled(py)) {
            if let Some(each) = &handler.each {
                self.call(py, each, request, failures);
                self.finish(py, request);
            } else {
                let text = "a batch handler returned requests, but the queue has no handler that takes them one by one";
                failures.request_failed(request, &PyTypeError::new_err(text));
                self.finish(py, request);
            }
            self.give_back(origin, &mut lead);
        }
    }

    fn call(&self, py: Python<'_>, handler: &Py<PyAny>, request: &Py<Request>, failures: &mut dyn Failures) {
        if let Err(error) = call(py, handler, request.bind(py).as_any()) {
            failures.request_failed(request, &error);
        }
    }

    /// A request for `chain`: one that nobody has any more, or a new one.
    fn request(&mut self, py: Python<'_>, origin: Origin<'_>, chain: Chain) -> PyResult<Py<Request>> {
        if let Some(request) = self.requests.pop() {
            self.at_rest = self.at_rest.min(self.requests.len());
            // SAFETY: those that are kept are ours alone.
            unsafe { request.get().renew(origin.run, chain) };
            return Ok(request);
        }
        Py::new(py, Request::new(Arc::clone(origin.vring), Arc::clone(origin.run), chain, false))
    }

    /// The handler returned: the request is done, unless it was detached.
    fn finish(&mut self, py: Python<'_>, request: &Py<Request>) {
        if let Some((used, chain)) = request.get().finish(py) {
            self.used.push(used);
            self.spare.push(chain);
        }
    }

    /// The same, and keep the request for the next one if nobody else has it.
    fn finish_and_keep(&mut self, py: Python<'_>, request: Py<Request>) {
        if !is_ours_alone(py, &request) {
            return self.finish(py, &request);
        }
        // SAFETY: it is ours alone.
        if let Some(used) = unsafe { request.get().finish_alone(&mut self.spare) } {
            self.used.push(used);
            self.requests.push(request);
            return;
        }
        self.finish(py, &request);
        // SAFETY: what `finish` may have run has no way to get the request, as it had none before.
        if unsafe { request.get().rest() } {
            self.requests.push(request);
        }
    }

    /// What waits for the next batch keeps nothing of the driver's.
    fn let_go_of_memory(&mut self) {
        for request in &self.requests[self.at_rest..] {
            // SAFETY: those that are kept are ours alone.
            unsafe { request.get().rest() };
        }
        self.at_rest = self.requests.len();
    }

    /// Another request is done: give it back with others, if it is time.
    fn give_back(&mut self, origin: Origin<'_>, lead: &mut Lead) {
        match self.turnaround.after_one(lead, || origin.vring.available() > 0) {
            None => {}
            Some(Show::Quietly) => self.show(origin),
            Some(Show::Notify) => self.publish(origin),
        }
    }

    /// Give back what is done, and notify the driver of it.
    fn publish(&mut self, origin: Origin<'_>) {
        if !self.hand_over(origin, Vring::complete) {
            origin.vring.notify();
        }
    }

    /// Notify the driver of what was given back to it.
    pub(super) fn notify(&mut self, vring: &Vring) {
        self.turnaround.notified(Instant::now);
        vring.notify();
    }

    /// Give back what is done. The driver is notified later.
    fn show(&mut self, origin: Origin<'_>) {
        self.hand_over(origin, Vring::complete_quietly);
    }

    /// Give back what is done, in one of the ways to do that. Returns whether there is anything.
    fn hand_over(&mut self, origin: Origin<'_>, complete: fn(&Vring, &Run, &[Used], &[Chain]) -> bool) -> bool {
        if self.used.is_empty() {
            return false;
        }
        // Each came with its chain.
        let chains = &self.spare[self.spare.len() - self.used.len()..];
        complete(origin.vring, origin.run, &self.used, chains);
        self.used.clear();
        true
    }
}

/// `vhost_user.Batch`, a list.
fn batch_class(py: Python<'_>) -> PyResult<&Bound<'_, PyType>> {
    static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    CLASS.import(py, "vhost_user.queues", "Batch")
}

/// Call with one argument, for which no tuple is made.
fn call<'py>(py: Python<'py>, callable: &Py<PyAny>, argument: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let null = std::ptr::null_mut::<ffi::PyObject>();
    let result = match vectorcall() {
        Some(vectorcall) => {
            // A bound method puts its object in front, and takes it away again.
            let mut arguments = [null, argument.as_ptr()];
            // SAFETY: both are objects that we hold references to, there is one argument, and a place before it.
            unsafe { vectorcall(callable.as_ptr(), arguments.as_mut_ptr().add(1), 1 | ARGUMENTS_OFFSET, null) }
        }
        // SAFETY: both are objects that we hold references to, and the arguments end with a null.
        None => unsafe { ffi::PyObject_CallFunctionObjArgs(callable.as_ptr(), argument.as_ptr(), null) },
    };
    // SAFETY: the result of either is a new reference, or null with an exception set.
    unsafe { Bound::from_owned_ptr_or_err(py, result) }
}

type Vectorcall = unsafe extern "C" fn(
    *mut ffi::PyObject,
    *const *mut ffi::PyObject,
    usize,
    *mut ffi::PyObject,
) -> *mut ffi::PyObject;

/// PY_VECTORCALL_ARGUMENTS_OFFSET: the place before the arguments may be used.
const ARGUMENTS_OFFSET: usize = 1 << (usize::BITS - 1);

/// `PyObject_Vectorcall`, which belongs to the stable ABI from Python 3.12 on. Python 3.11 has it, too, but does not say so
/// to those who ask for a stable ABI: hence by name.
fn vectorcall() -> Option<Vectorcall> {
    static VECTORCALL: OnceLock<Option<Vectorcall>> = OnceLock::new();
    *VECTORCALL.get_or_init(|| {
        // SAFETY: the name ends with a null.
        let function = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"PyObject_Vectorcall".as_ptr()) };
        // SAFETY: that is the signature of the function of this name in every version that has it, and a null is None.
        unsafe { std::mem::transmute::<*mut libc::c_void, Option<Vectorcall>>(function) }
    })
}

/// Whether nobody else has `request`, and nobody can get it: there are no weak references to requests, and the garbage
/// collector does not know them, so that every way to it begins with a reference.
///
/// Whoever has the interpreter's lock sees the count as it is, after all that others did before they let go of theirs.
/// Without that lock it has two parts, which other threads change while we add them up: there, nobody is alone.
fn is_ours_alone(py: Python<'_>, request: &Py<Request>) -> bool {
    // SAFETY: the object is alive: we have a reference to it.
    has_lock(py) && unsafe { ffi::Py_REFCNT(request.as_ptr()) } == 1
}
