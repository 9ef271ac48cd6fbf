//! What one call does with each of many requests.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};

use super::layout::Layout;
use super::request::{Request, Source};

/// As `Request.read`, of each of `requests`.
#[pyfunction]
pub fn read_each<'py>(requests: &Bound<'py, PyList>, size: i64) -> PyResult<Bound<'py, PyList>> {
    let py = requests.py();
    let read = requests.iter().map(|request| request.cast::<Request>()?.get().read(py, size));
    PyList::new(py, read.collect::<PyResult<Vec<_>>>()?)
}

/// As `Request.unpack`, of each of `requests`.
#[pyfunction]
pub fn unpack_each<'py>(requests: &Bound<'py, PyList>, format: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyList>> {
    let py = requests.py();
    Layout::with(format, |layout| {
        let values = requests.iter().map(|request| request.cast::<Request>()?.get().unpack_layout(py, layout, false));
        PyList::new(py, values.collect::<PyResult<Vec<_>>>()?)
    })
}

/// As `Request.write`, to each of `requests`: the same bytes, or those of a list that has some for each.
#[pyfunction]
pub fn write_each(requests: &Bound<'_, PyList>, data: &Bound<'_, PyAny>) -> PyResult<()> {
    let py = requests.py();
    if let Ok(list) = data.cast::<PyList>() {
        return in_step(requests, list, |request, item| request.write_source(py, &Source::new(item)?).map(drop));
    }
    let source = Source::new(data)?;
    requests.iter().try_for_each(|request| request.cast::<Request>()?.get().write_source(py, &source).map(drop))
}

/// As `Request.write_tail`, likewise.
#[pyfunction]
pub fn write_tail_each(requests: &Bound<'_, PyList>, data: &Bound<'_, PyAny>) -> PyResult<()> {
    let py = requests.py();
    if let Ok(list) = data.cast::<PyList>() {
        return in_step(requests, list, |request, item| {
            request.write_tail(py, item.cast::<PyBytes>()?.as_bytes()).map(drop)
        });
    }
    let bytes = data.cast::<PyBytes>()?.as_bytes();
    requests.iter().try_for_each(|request| request.cast::<Request>()?.get().write_tail(py, bytes))
}

fn in_step<'py>(
    requests: &Bound<'py, PyList>,
    items: &Bound<'py, PyList>,
    work: impl Fn(&Request, &Bound<'py, PyAny>) -> PyResult<()>,
) -> PyResult<()> {
    let (count, given) = (requests.len(), items.len());
    if count != given {
        return Err(PyValueError::new_err(format!(
            "{given} items were given for {count} requests; one for each is needed"
        )));
    }
    requests.iter().zip(items).try_for_each(|(request, item)| work(request.cast::<Request>()?.get(), &item))
}
