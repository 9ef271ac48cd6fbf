"""What a person, and a program, reads: lines of text, and JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TextIO

from .model import NEED_REPLY, Activity, Buffer, Descriptor, Record, to_json

#: The first numbers that are easier to read in hexadecimal.
HEXADECIMAL = 0x10000
#: Bytes of a longer value that are shown.
SHOWN = 16

DIM, RED, GREEN, CYAN, PLAIN = "\x1b[2m", "\x1b[31m", "\x1b[32m", "\x1b[36m", "\x1b[0m"


class Lines:
    """One line for each record: seconds since the first, connection, direction, name, values, descriptors, latency.

    ``->`` goes to the back-end, ``<-`` to the front-end; ``=>`` and ``<=`` are a driver's requests and their completion
    in a ring. A ``?`` after a name asks for an acknowledgement. What is wrong comes last, after a ``!``.
    """

    def __init__(self, out: TextIO, *, colour: bool = False) -> None:
        self._out = out
        self._colour = colour
        self._start: int | None = None

    def __call__(self, record: Record) -> None:
        if self._start is None:
            self._start = record.time
        seconds = (record.time - self._start) / 1e9
        when = self._paint(DIM, f"{seconds:11.6f} {record.connection:>2}")
        self._out.write(f"{when}  {self._text(record)}".rstrip() + "\n")
        self._out.flush()

    def _text(self, record: Record) -> str:
        match record.event:
            case "message":
                return self._message(record)
            case "bytes":
                shown = f"{len(record.data)} bytes {_hexadecimal(record.data)}"
                return f"{_arrow(record)}  {shown}{_descriptors(record.descriptors)}{self._wrong(record.text)}"
            case "opened":
                return self._paint(DIM, "    connected")
            case "closed":
                what = "the channel" if record.channel == "back-end" else "the connection"
                return self._paint(DIM, f"    the {record.sender} closed {what}")
            case "note":
                return "    " + self._paint(RED, record.text)
        assert record.activity is not None
        return self._activity(record, record.activity)

    def _message(self, record: Record) -> str:
        decoded = record.decoded
        asks = not decoded.answer and record.header[1] & NEED_REPLY
        name = decoded.name + ("?" if asks else "")
        colour = GREEN if decoded.answer else CYAN
        if decoded.acknowledgement and list(decoded.fields) == ["value"]:
            value = decoded.fields["value"]
            values = "ok" if value == 0 else self._paint(RED, f"failed ({value})")
        else:
            values = _values(record.fields)
        line = f"{_arrow(record)}  {self._paint(colour, f'{name:<25}')} {values}"
        return line + _descriptors(record.descriptors) + _latency(record) + self._wrong(record.problem)

    def _activity(self, record: Record, activity: Activity) -> str:
        what = f"queue {activity.queue} #{activity.index}"
        if record.event == "request":
            parts = [_sizes("readable", activity.readable), _sizes("writable", activity.writable)]
            parts += ["indirect"] * activity.indirect
        else:
            parts = [f"{activity.written} bytes written"]
        if activity.wish:
            parts.append(f"{'kicks' if record.event == 'request' else 'calls'} {activity.wish}")
        values = ", ".join(filter(None, [*parts, "seen late" if activity.late else ""]))
        line = f"{_arrow(record)}  {self._paint(CYAN if record.event == 'request' else GREEN, f'{what:<25}')} {values}"
        if activity.data:
            line += f"  {_hexadecimal(activity.data)}"
        return line + _latency(record) + self._wrong(record.text)

    def _wrong(self, problem: str | None) -> str:
        return self._paint(RED, f"  ! {problem}") if problem else ""

    def _paint(self, colour: str, text: str) -> str:
        return f"{colour}{text}{PLAIN}" if self._colour and text else text


class JsonLines:
    """One JSON object a line for each record. docs/tracing.md describes them."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def __call__(self, record: Record) -> None:
        self._out.write(json.dumps(to_json(record)) + "\n")
        self._out.flush()


def _arrow(record: Record) -> str:
    forth, back = ("=>", "<=") if record.activity else ("->", "<-")
    return forth if record.sender == "front-end" else back


def _values(fields: dict[str, Any]) -> str:
    if "names" in fields:
        return " ".join([_value(fields["value"]), *fields["names"]])
    if list(fields) == ["value"]:
        return _value(fields["value"])
    return " ".join(f"{name}={_value(value)}" for name, value in fields.items())


def _value(value: Any) -> str:
    match value:
        case int():
            return f"{value:#x}" if value >= HEXADECIMAL else str(value)
        case bytes():
            return _hexadecimal(value) or "-"
        case dict():
            return f"{{{_values(value)}}}"
        case list():
            while value and value[-1] == 0:
                value = value[:-1]
            return f"[{' '.join(map(_value, value))}]"
    return str(value)


def _hexadecimal(data: bytes) -> str:
    return data[:SHOWN].hex() + ("..." if len(data) > SHOWN else "")


def _descriptors(descriptors: Sequence[Descriptor]) -> str:
    return f"  [{', '.join(map(_descriptor, descriptors))}]" if descriptors else ""


def _descriptor(descriptor: Descriptor) -> str:
    return descriptor.kind if descriptor.size is None else f"{descriptor.kind} {_size(descriptor.size)}"


def _latency(record: Record) -> str:
    if record.latency is None:
        return ""
    microseconds = record.latency / 1000
    return f"  ({microseconds:.0f} us)" if microseconds < 10_000 else f"  ({microseconds / 1000:.1f} ms)"


def _sizes(name: str, buffers: Sequence[Buffer]) -> str:
    return f"{name} {'+'.join(str(buffer.size) for buffer in buffers)}" if buffers else ""


def _size(count: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count} bytes"
