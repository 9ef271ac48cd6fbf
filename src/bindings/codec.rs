//! The message tables and the decoder, for those who show messages.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};

use crate::error::Error;
use crate::protocol::{
    Answer, BackendMessage, BackendRequest, Descriptors, Field, Flags, FrontendMessage, FrontendRequest, Gate, Header,
    Info, Layout, ProtocolFeatures, Rings, Shape, Value, VirtioFeatures,
};

const MAIN: &str = "main";
const BACKEND: &str = "back-end";

/// A row of a message table.
#[pyclass(frozen, get_all, module = "vhost_user._core")]
#[derive(Debug)]
pub struct MessageInfo {
    channel: &'static str,
    id: u32,
    name: &'static str,
    payload: &'static str,
    descriptors: &'static str,
    gate: String,
    answer: &'static str,
    answered: String,
    rings: &'static str,
    bits: Option<Vec<(u32, &'static str)>>,
}

/// A message, by names and values.
#[pyclass(frozen, get_all, module = "vhost_user._core")]
#[derive(Debug)]
pub struct DecodedMessage {
    name: String,
    answer: bool,
    acknowledgement: bool,
    fields: Py<PyDict>,
    problem: Option<String>,
}

/// Both message tables.
#[pyfunction]
pub fn messages() -> Vec<MessageInfo> {
    let frontend = FrontendRequest::TABLE.iter().map(|info| (MAIN, info));
    frontend.chain(BackendRequest::TABLE.iter().map(|info| (BACKEND, info))).map(describe).collect()
}

fn describe((channel, info): (&'static str, &Info)) -> MessageInfo {
    let (answer, answered) = match info.answer {
        Answer::Ack => ("U64", "asked".to_owned()),
        Answer::Reply(payload) | Answer::ReplyAndFile(payload) => (payload, "always".to_owned()),
        Answer::ReplyWith(feature, payload) => (payload, feature.to_string()),
    };
    MessageInfo {
        channel,
        id: info.id,
        name: info.name,
        payload: info.payload,
        descriptors: match info.descriptors {
            Descriptors::None => "none",
            Descriptors::One => "one",
            Descriptors::AtMostOne => "at most one",
            Descriptors::Described => "as described",
        },
        gate: match info.gate {
            Gate::Always => "always".to_owned(),
            Gate::ProtocolFeatures => "PROTOCOL_FEATURES".to_owned(),
            Gate::Protocol(feature) => feature.to_string(),
            Gate::AccessPlatform => "ACCESS_PLATFORM".to_owned(),
            Gate::Gpu => "device type".to_owned(),
        },
        answer,
        answered,
        rings: match info.rings {
            Rings::None => "none",
            Rings::One => "one",
            Rings::All => "all",
        },
        bits: (channel == MAIN).then(|| bits(info.id)).flatten().map(<[_]>::to_vec),
    }
}

/// The names of the bits of a front-end's request that is about features.
fn bits(id: u32) -> Option<&'static [(u32, &'static str)]> {
    use FrontendRequest::{GetFeatures, GetProtocolFeatures, SetFeatures, SetProtocolFeatures};
    match FrontendRequest::from_id(id).ok()? {
        GetFeatures | SetFeatures => Some(VirtioFeatures::NAMES),
        GetProtocolFeatures | SetProtocolFeatures => Some(ProtocolFeatures::NAMES),
        _ => None,
    }
}

/// Name, exact size if it is for that only, and fields.
type PayloadLayout<'py> = (&'static str, Option<usize>, Bound<'py, PyList>);

/// The layout of every payload.
#[pyfunction]
pub fn payloads(py: Python<'_>) -> PyResult<Vec<PayloadLayout<'_>>> {
    let mut found = Vec::new();
    for layout in Layout::ALL {
        found.push((layout.name, None, field_list(py, layout.fields)?));
        if let Some((size, fields)) = layout.other {
            found.push((layout.name, Some(size), field_list(py, fields)?));
        }
    }
    Ok(found)
}

fn field_list<'py>(py: Python<'py>, fields: &[Field]) -> PyResult<Bound<'py, PyList>> {
    let list = PyList::empty(py);
    for field in fields {
        let (shape, parts) = match field.shape {
            Shape::Unsigned => ("unsigned", PyList::empty(py)),
            Shape::Signed => ("signed", PyList::empty(py)),
            Shape::Bytes => ("bytes", PyList::empty(py)),
            Shape::Words => ("words", PyList::empty(py)),
            Shape::Bits(parts) => ("bits", PyList::new(py, parts)?),
            Shape::Structure(fields) => ("structure", field_list(py, fields)?),
            Shape::Structures(fields) => ("structures", field_list(py, fields)?),
            Shape::Padding => ("padding", PyList::empty(py)),
        };
        list.append((field.name, field.offset, field.size, shape, parts))?;
    }
    Ok(list)
}

/// Decode a message that `sender` sent on `channel`. It never fails: what is wrong is the result's `problem`.
#[pyfunction]
pub fn decode(
    py: Python<'_>,
    channel: &str,
    sender: &str,
    request: u32,
    flags: u32,
    payload: &[u8],
    descriptors: usize,
) -> PyResult<DecodedMessage> {
    let sent_by_backend = match sender {
        "front-end" => false,
        BACKEND => true,
        other => return Err(PyValueError::new_err(format!("a sender is a front-end or a back-end, not {other:?}"))),
    };
    let by_backend = match channel {
        MAIN => false,
        BACKEND => true,
        other => return Err(PyValueError::new_err(format!("a channel is main or back-end, not {other:?}"))),
    };
    let answer = sent_by_backend != by_backend;
    let table = if by_backend { BackendRequest::TABLE } else { FrontendRequest::TABLE };
    let Some(info) = table.iter().find(|info| info.id == request) else {
        let problem = check(by_backend, request, payload, descriptors).err();
        return unknown(py, request, answer, payload, problem);
    };

    let payload_name = if answer { answer_payload(info.answer, payload.len()) } else { info.payload };
    let layout = Layout::named(payload_name)
        .ok_or_else(|| PyValueError::new_err(format!("the payload {payload_name} has no layout")))?;
    let (values, rest) = layout.read(payload);
    let fields = structure(py, &values)?;
    let names = if by_backend || answer == (info.answer == Answer::Ack) { None } else { bits(request) };
    if let (Some(names), [(_, Value::Unsigned(word))]) = (names, &values[..]) {
        fields.set_item("names", bit_names(names, *word))?;
    }
    if !rest.is_empty() {
        fields.set_item("rest", PyBytes::new(py, rest))?;
    }

    let header = Header { request, flags: Flags(flags), size: payload.len() as u32 };
    let checked = if answer {
        header.check_reply(request, info.name).map_err(reason).and_then(|()| check_answer(layout, payload))
    } else {
        header.check_request().and_then(|()| check(by_backend, request, payload, descriptors)).map_err(reason)
    };
    Ok(DecodedMessage {
        name: info.name.to_owned(),
        answer,
        acknowledgement: answer
            && !matches!(info.answer, Answer::Reply(_) | Answer::ReplyAndFile(_))
            && payload_name == "U64",
        fields: fields.unbind(),
        problem: checked.err(),
    })
}

fn unknown(
    py: Python<'_>,
    request: u32,
    answer: bool,
    payload: &[u8],
    problem: Option<Error>,
) -> PyResult<DecodedMessage> {
    let fields = PyDict::new(py);
    if !payload.is_empty() {
        fields.set_item("payload", PyBytes::new(py, payload))?;
    }
    Ok(DecodedMessage {
        name: format!("request {request}"),
        answer,
        acknowledgement: false,
        fields: fields.unbind(),
        problem: problem.map(reason),
    })
}

fn check_answer(layout: &Layout, payload: &[u8]) -> Result<(), String> {
    if payload.is_empty() && !layout.fields.is_empty() {
        return Err("an answer without a payload: the request was refused".to_owned());
    }
    (layout.check)(payload)
}

/// What an answer of so many bytes has to be.
fn answer_payload(answer: Answer, size: usize) -> &'static str {
    match answer {
        Answer::Ack => "U64",
        Answer::Reply(payload) | Answer::ReplyAndFile(payload) => payload,
        // Without the feature it is an acknowledgement.
        Answer::ReplyWith(..) if size == size_of::<u64>() => "U64",
        Answer::ReplyWith(_, payload) => payload,
    }
}

fn check(by_backend: bool, request: u32, payload: &[u8], descriptors: usize) -> Result<(), Error> {
    if by_backend {
        BackendMessage::decode(BackendRequest::from_id(request)?, payload, descriptors).map(drop)
    } else {
        FrontendMessage::decode(FrontendRequest::from_id(request)?, payload, descriptors).map(drop)
    }
}

/// The name of the message is shown anyway.
fn reason(error: Error) -> String {
    match error {
        Error::Refused { reason, .. } => reason,
        other => other.to_string(),
    }
}

fn bit_names(names: &[(u32, &'static str)], word: u64) -> Vec<String> {
    let name = |bit| match names.iter().find(|(known, _)| *known == bit) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("bit {bit}"),
    };
    (0..u64::BITS).filter(|bit| word & (1 << bit) != 0).map(name).collect()
}

fn structure<'py>(py: Python<'py>, values: &[(&'static str, Value)]) -> PyResult<Bound<'py, PyDict>> {
    let fields = PyDict::new(py);
    for (name, value) in values {
        fields.set_item(name, to_python(py, value)?)?;
    }
    Ok(fields)
}

fn to_python<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::Unsigned(number) => number.into_pyobject(py)?.into_any(),
        Value::Signed(number) => number.into_pyobject(py)?.into_any(),
        Value::Bytes(bytes) => PyBytes::new(py, bytes).into_any(),
        Value::List(values) => {
            let values = values.iter().map(|value| to_python(py, value)).collect::<PyResult<Vec<_>>>()?;
            PyList::new(py, values)?.into_any()
        }
        Value::Structure(values) => structure(py, values)?.into_any(),
    })
}
