//! Formats of Python's `struct` module, read straight into a tuple.
//!
//! A handler unpacks the same header in every request: the layout of the last format is kept, and what can be read without
//! the `struct` module is.

use std::cell::Cell;

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBool, PyBytes, PyString, PyTuple};
use pyo3::{IntoPyObjectExt, ffi, intern};

use super::has_lock;

/// Larger layouts, of which there are few, go to the `struct` module.
const MAX_SIZE: usize = 64;

/// What a format describes.
pub(super) struct Layout {
    /// The format, as a string or a `struct.Struct`. That it is kept makes its address its identity.
    format: Py<PyAny>,
    size: usize,
    /// None if only `structure` can read it.
    fields: Option<Box<[Field]>>,
    /// The `struct.Struct`.
    structure: Py<PyAny>,
    /// The last values. If nobody has them any more, the next ones are put in their place: most handlers unpack a tuple into
    /// variables at once.
    last: Cell<Option<Py<PyTuple>>>,
}

/// A value, and how many bytes from the start of the layout it is.
struct Field {
    offset: usize,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    Unsigned { bytes: usize, big: bool },
    Signed { bytes: usize, big: bool },
    Bool,
    Bytes { count: usize },
}

thread_local! {
    static LAST: Cell<Option<Box<Layout>>> = const { Cell::new(None) };
}

impl Layout {
    /// Do something with the layout of `format`.
    pub(super) fn with<'py, T>(format: &Bound<'py, PyAny>, work: impl FnOnce(&Self) -> PyResult<T>) -> PyResult<T> {
        LAST.with(|last| {
            // What this calls may get here again, and finds nothing then.
            let known = last.take().filter(|layout| layout.format.is(format));
            let layout = known.map_or_else(|| Self::new(format).map(Box::new), Ok)?;
            let result = work(&layout);
            last.set(Some(layout));
            result
        })
    }

    fn new(format: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = format.py();
        let structure = if format.hasattr(intern!(py, "unpack_from"))? {
            format.clone()
        } else {
            py.import(intern!(py, "struct"))?.call_method1(intern!(py, "Struct"), (format,))?
        };
        let size: usize = structure.getattr(intern!(py, "size"))?.extract()?;
        let text = structure.getattr(intern!(py, "format"))?;
        let fields = text.cast::<PyString>().ok().and_then(|text| fields(text.to_str().ok()?));
        let fields = fields.filter(|(_, end)| *end == size && size <= MAX_SIZE).map(|(fields, _)| fields.into());
        let (format, structure) = (format.clone().unbind(), structure.unbind());
        Ok(Self { format, size, fields, structure, last: Cell::new(None) })
    }

    /// Bytes.
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// The values of bytes that `fill` provides; in the last tuple again, if that is `expendable` and nobody has it.
    pub(super) fn read<'py>(
        &self,
        py: Python<'py>,
        expendable: bool,
        fill: impl FnOnce(&mut [u8]),
    ) -> PyResult<Bound<'py, PyTuple>> {
        let Some(fields) = &self.fields else {
            let bytes = PyBytes::new_with(py, self.size, |bytes| {
                fill(bytes);
                Ok(())
            })?;
            let values = self.structure.bind(py).call_method1(intern!(py, "unpack"), (bytes,))?;
            return Ok(values.cast_into()?);
        };
        let mut space = Space([0; MAX_SIZE + WORD]);
        fill(&mut space.0[..self.size]);
        let last = if expendable { self.last.take().filter(|last| may_be_replaced(py, last)) } else { None };
        let values = match last {
            Some(last) => last.into_bound(py),
            // SAFETY: a tuple of some length, or null with an exception set.
            None => unsafe {
                let new = ffi::PyTuple_New(fields.len() as ffi::Py_ssize_t);
                Bound::from_owned_ptr_or_err(py, new)?.cast_into_unchecked()
            },
        };
        for (at, field) in (0..).zip(fields) {
            let value = field.value(py, &space)?;
            // SAFETY: nobody else has the tuple, which has a place for each field. The value is given away, and what was
            // in its place is a number, a bool or bytes: that it goes runs no other code.
            if unsafe { ffi::PyTuple_SetItem(values.as_ptr(), at, value.into_ptr()) } != 0 {
                return Err(PyErr::fetch(py));
            }
        }
        if expendable {
            self.last.set(Some(values.clone().unbind()));
        }
        Ok(values)
    }
}

/// Whether nobody else has `values`, and nobody can tell them from new ones. From Python 3.14 on a tuple keeps its hash.
fn may_be_replaced(py: Python<'_>, values: &Py<PyTuple>) -> bool {
    static KEEPS_HASH: PyOnceLock<bool> = PyOnceLock::new();
    // SAFETY: the tuple is alive: we have a reference to it. With the interpreter's lock the count is as it is.
    has_lock(py)
        && !KEEPS_HASH.get_or_init(py, || py.version_info() >= (3, 14))
        && unsafe { ffi::Py_REFCNT(values.as_ptr()) } == 1
}

impl Field {
    fn value<'py>(&self, py: Python<'py>, space: &Space) -> PyResult<Bound<'py, PyAny>> {
        match self.kind {
            Kind::Unsigned { bytes, big } => space.number(self.offset, bytes, big).into_bound_py_any(py),
            Kind::Signed { bytes, big } => {
                let unused = 64 - 8 * bytes as u32;
                ((space.number(self.offset, bytes, big) << unused) as i64 >> unused).into_bound_py_any(py)
            }
            Kind::Bool => Ok(PyBool::new(py, space.0[self.offset] != 0).to_owned().into_any()),
            Kind::Bytes { count } => Ok(PyBytes::new(py, &space.0[self.offset..self.offset + count]).into_any()),
        }
    }
}

/// The bytes of a layout, and a word after them: at each of them begins one.
struct Space([u8; MAX_SIZE + WORD]);

const WORD: usize = size_of::<u64>();

impl Space {
    /// The number of 1 to 8 bytes at `offset`.
    fn number(&self, offset: usize, bytes: usize, big: bool) -> u64 {
        let mut word = [0; WORD];
        word.copy_from_slice(&self.0[offset..offset + WORD]);
        let unused = 64 - 8 * bytes as u32;
        if big { u64::from_be_bytes(word) >> unused } else { u64::from_le_bytes(word) << unused >> unused }
    }
}

/// The fields of a format of standard sizes, and how many bytes they have; None for what is left to the `struct` module.
fn fields(format: &str) -> Option<(Vec<Field>, usize)> {
    let big = match format.chars().next()? {
        '<' => false,
        '>' | '!' => true,
        _ => return None,
    };
    let (mut fields, mut offset, mut count) = (Vec::new(), 0usize, None);
    for code in format[1..].chars() {
        if let Some(digit) = code.to_digit(10) {
            count = Some(count.unwrap_or(0usize).checked_mul(10)?.checked_add(digit as usize)?);
            continue;
        }
        let repeat = count.take();
        let (kind, bytes) = match code {
            'x' => {
                offset = offset.checked_add(repeat.unwrap_or(1))?;
                continue;
            }
            's' => {
                let count = repeat.unwrap_or(1);
                fields.push(Field { offset, kind: Kind::Bytes { count } });
                offset = offset.checked_add(count)?;
                continue;
            }
            'c' => (Kind::Bytes { count: 1 }, 1),
            '?' => (Kind::Bool, 1),
            'B' => (Kind::Unsigned { bytes: 1, big }, 1),
            'b' => (Kind::Signed { bytes: 1, big }, 1),
            'H' => (Kind::Unsigned { bytes: 2, big }, 2),
            'h' => (Kind::Signed { bytes: 2, big }, 2),
            'I' | 'L' => (Kind::Unsigned { bytes: 4, big }, 4),
            'i' | 'l' => (Kind::Signed { bytes: 4, big }, 4),
            'Q' => (Kind::Unsigned { bytes: 8, big }, 8),
            'q' => (Kind::Signed { bytes: 8, big }, 8),
            _ => return None,
        };
        for _ in 0..repeat.unwrap_or(1) {
            if offset > MAX_SIZE {
                return None;
            }
            fields.push(Field { offset, kind });
            offset += bytes;
        }
    }
    Some((fields, offset))
}
