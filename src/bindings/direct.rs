//! The methods of a request that handlers call most, as the interpreter likes them best.
//!
//! It calls each with the request, whose type it has checked, and the argument, or with a few. What PyO3 wraps methods in
//! takes arguments by name too, and costs as much as a small request itself.

use std::ffi::{CStr, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use pyo3::exceptions::PyTypeError;
use pyo3::panic::PanicException;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};
use pyo3::{Borrowed, IntoPyObjectExt, PyTypeInfo, ffi};

use super::request::Request;

type Object = *mut ffi::PyObject;

struct Methods<const N: usize>([ffi::PyMethodDef; N]);

// SAFETY: nobody writes to the definitions, and what they point to is static.
unsafe impl<const N: usize> Sync for Methods<N> {}

static METHODS: Methods<4> = Methods([
    with_one(c"unpack", c"unpack($self, format, /)\n--\n\n", unpack),
    with_one(c"write", c"write($self, data, /)\n--\n\n", write),
    with_one(c"write_tail", c"write_tail($self, data, /)\n--\n\n", write_tail),
    ffi::PyMethodDef {
        ml_name: c"read".as_ptr(),
        ml_meth: ffi::PyMethodDefPointer { PyCFunctionFast: read },
        ml_flags: ffi::METH_FASTCALL,
        ml_doc: c"read($self, size=-1, /)\n--\n\n".as_ptr(),
    },
]);

const fn with_one(name: &'static CStr, signature: &'static CStr, method: ffi::PyCFunction) -> ffi::PyMethodDef {
    let (ml_name, ml_doc): (*const c_char, *const c_char) = (name.as_ptr(), signature.as_ptr());
    let ml_meth = ffi::PyMethodDefPointer { PyCFunction: method };
    ffi::PyMethodDef { ml_name, ml_meth, ml_flags: ffi::METH_O, ml_doc }
}

/// Give the class its methods.
pub fn add_methods(py: Python<'_>) -> PyResult<()> {
    let class = Request::type_object(py);
    for method in &METHODS.0 {
        // SAFETY: the definition is static and is only read; what comes back is a new reference, or null with an exception
        // set. The functions expect requests, and the descriptor sees to that.
        let descriptor = unsafe {
            let definition = ptr::from_ref(method).cast_mut();
            Bound::from_owned_ptr_or_err(py, ffi::PyDescr_NewMethod(class.as_type_ptr(), definition))?
        };
        // SAFETY: the name is static.
        let name = unsafe { CStr::from_ptr(method.ml_name) };
        class.setattr(PyString::new(py, &name.to_string_lossy()), descriptor)?;
    }
    Ok(())
}

unsafe extern "C" fn unpack(request: Object, format: Object) -> Object {
    // SAFETY: the interpreter calls this with a request and an object, both of which it holds.
    unsafe { call_with(request, format, |request, py, format| Ok(request.unpack(py, format)?.into_ptr())) }
}

unsafe extern "C" fn write(request: Object, data: Object) -> Object {
    // SAFETY: as in `unpack`.
    unsafe {
        call_with(request, data, |request, py, data| Ok(request.write(py, data)?.into_bound_py_any(py)?.into_ptr()))
    }
}

unsafe extern "C" fn write_tail(request: Object, data: Object) -> Object {
    // SAFETY: as in `unpack`.
    unsafe {
        call_with(request, data, |request, py, data| {
            request.write_tail(py, data.cast::<PyBytes>()?.as_bytes())?;
            Ok(py.None().into_ptr())
        })
    }
}

unsafe extern "C" fn read(request: Object, arguments: *mut Object, count: ffi::Py_ssize_t) -> Object {
    let work = |request: &Request, py: Python<'_>| {
        let size = match count {
            0 => -1,
            // SAFETY: there is one argument, which the interpreter holds.
            1 => unsafe { Borrowed::from_ptr(py, *arguments) }.extract()?,
            _ => return Err(PyTypeError::new_err(format!("read() takes one argument at most; {count} were given"))),
        };
        Ok(request.read(py, size)?.into_ptr())
    };
    // SAFETY: as in `unpack`.
    unsafe { call(request, work) }
}

/// # Safety
/// As for [`call`], and `argument` is an object that somebody holds meanwhile.
#[inline(always)]
unsafe fn call_with(
    request: Object,
    argument: Object,
    work: impl for<'py> FnOnce(&Request, Python<'py>, &Bound<'py, PyAny>) -> PyResult<Object>,
) -> Object {
    // SAFETY: as the caller vouches.
    unsafe { call(request, |request, py| work(request, py, &Borrowed::from_ptr(py, argument))) }
}

/// Do something with a request for the interpreter: a new reference, or null with an exception set.
///
/// # Safety
/// The thread has the interpreter, and `request` is a [`Request`] that somebody holds meanwhile.
#[inline(always)]
unsafe fn call(request: Object, work: impl for<'py> FnOnce(&Request, Python<'py>) -> PyResult<Object>) -> Object {
    // SAFETY: as the caller vouches. PyO3 does not know that it has the interpreter; references that it is given to drop
    // without a token wait until it does, and nothing else depends on that.
    let (py, request) = unsafe {
        let py = Python::assume_attached();
        (py, Borrowed::from_ptr(py, request).cast_unchecked::<Request>())
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| work(request.get(), py)));
    match outcome {
        Ok(Ok(result)) => result,
        Ok(Err(error)) => raise(py, error),
        Err(_) => raise(py, PanicException::new_err(("a method of a request panicked",))),
    }
}

#[cold]
fn raise(py: Python<'_>, error: PyErr) -> Object {
    error.restore(py);
    ptr::null_mut()
}
