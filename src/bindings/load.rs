//! Load on queues, from threads that never see the interpreter.

use std::collections::BTreeMap;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::FrontendQueue;
use super::errors::to_python;
use super::frontend::duration;
use crate::frontend::{Control, LoadOptions, Tally, Workload, load};

/// The same requests again and again on some queues.
#[pyclass(frozen, module = "vhost_user._core")]
#[derive(Debug)]
pub struct Load {
    queues: Vec<Py<FrontendQueue>>,
    depth: u16,
    workload: Workload,
    control: Control,
}

#[pymethods]
impl Load {
    /// Requests with parts of these sizes.
    #[staticmethod]
    fn chains(queues: Vec<Py<FrontendQueue>>, depth: u16, readable: Vec<u32>, writable: Vec<u32>) -> PyResult<Self> {
        if readable.is_empty() && writable.is_empty() || readable.iter().chain(&writable).any(|size| *size == 0) {
            return Err(PyValueError::new_err("a chain has at least one part, and none of no bytes"));
        }
        Self::new(queues, depth, Workload::Chain { readable, writable })
    }

    /// Requests for blocks of a disk.
    #[staticmethod]
    fn disk(
        queues: Vec<Py<FrontendQueue>>,
        depth: u16,
        reads: bool,
        writes: bool,
        random: bool,
        block: u32,
        blocks: u64,
    ) -> PyResult<Self> {
        if block == 0 || !block.is_multiple_of(512) || blocks == 0 || !(reads || writes) {
            return Err(PyValueError::new_err("blocks are whole sectors, and there is at least one to read or write"));
        }
        Self::new(queues, depth, Workload::Disk { reads, writes, random, block, blocks })
    }

    /// Go on for so many seconds, or until `stop`. An error if the device completes nothing for `timeout` seconds.
    fn run(&self, py: Python<'_>, seconds: f64, timeout: f64, poll: bool) -> PyResult<LoadResult> {
        let options = LoadOptions { runtime: duration(seconds), timeout: duration(timeout), poll };
        let outcome = py.detach(|| {
            let queues: Vec<_> = self.queues.iter().map(|queue| queue.get().core()).collect();
            load(&queues, &self.workload, self.depth, options, &self.control)
        });
        outcome.map(|tally| LoadResult { tally }).map_err(|error| to_python(py, error))
    }

    /// Submit nothing more: `run` returns when the device has completed what it has.
    fn stop(&self) {
        self.control.stop();
    }

    /// Requests that were completed so far.
    #[getter]
    fn requests(&self) -> u64 {
        self.control.requests()
    }
}

impl Load {
    fn new(queues: Vec<Py<FrontendQueue>>, depth: u16, workload: Workload) -> PyResult<Self> {
        if depth == 0 || queues.is_empty() {
            return Err(PyValueError::new_err("there is at least one request on at least one queue"));
        }
        Ok(Self { queues, depth, workload, control: Control::default() })
    }
}

/// What a load has seen.
#[pyclass(frozen, module = "vhost_user._core")]
#[derive(Debug)]
pub struct LoadResult {
    tally: Tally,
}

#[pymethods]
impl LoadResult {
    #[getter]
    fn seconds(&self) -> f64 {
        self.tally.elapsed.as_secs_f64()
    }

    #[getter]
    fn requests(&self) -> u64 {
        self.tally.requests
    }

    #[getter]
    fn sent(&self) -> u64 {
        self.tally.sent
    }

    #[getter]
    fn received(&self) -> u64 {
        self.tally.received
    }

    #[getter]
    fn errors(&self) -> BTreeMap<u8, u64> {
        self.tally.errors.clone()
    }

    /// Of the latencies, in nanoseconds: the value that `percent` of them are not above.
    fn percentile(&self, percent: f64) -> Option<u64> {
        self.tally.latency.percentile(percent)
    }

    #[getter]
    fn mean(&self) -> Option<f64> {
        self.tally.latency.mean()
    }

    #[getter]
    fn least(&self) -> Option<u64> {
        self.tally.latency.least()
    }
}
