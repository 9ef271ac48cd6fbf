"""What a trace consists of: one type of record, whatever shows it, stores it or reads it back."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import struct
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from .._core import DecodedMessage, decode, messages
from ..features import UNKNOWN, DeviceType

#: "main" carries the front-end's requests, "back-end" those of the back-end.
Channel = Literal["main", "back-end"]
Party = Literal["front-end", "back-end"]
#: Messages; bytes that are no message, or a part of one; a connection's begin and end; requests in a ring and their
#: completion; what the tracer itself has to say.
Event = Literal["opened", "message", "bytes", "closed", "request", "completion", "note"]

#: Request, flags and size, in the byte order of the machine. vhost-user specification, "Header".
HEADER = struct.Struct("=III")
NEED_REPLY = 0x8

#: The front-end's requests by name.
REQUESTS = {info.name: info.id for info in messages() if info.channel == "main"}


@dataclass(frozen=True)
class Descriptor:
    """A file descriptor that came along: what is behind it."""

    kind: str
    """ "memfd", "file", "eventfd", "socket", "pipe", or what the system calls it."""
    size: int | None = None
    """Bytes, of what has a size."""
    name: str = ""
    """Of a memfd or file."""
    offset: int = 0
    """The byte of the message that it came with. Every good message has them with its first."""

    @classmethod
    def of(cls, number: int) -> Descriptor:
        """What is behind an open descriptor."""
        found = os.fstat(number)
        try:
            name = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            name = ""
        if stat.S_ISSOCK(found.st_mode):
            return cls("socket")
        if stat.S_ISFIFO(found.st_mode):
            # Who opens the other end anew has to know which end this is.
            access = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
            return cls("pipe", name="read" if access == os.O_RDONLY else "write")
        if name.startswith("anon_inode:"):
            return cls(name.removeprefix("anon_inode:").strip("[]"))
        if stat.S_ISREG(found.st_mode):
            name = name.removesuffix(" (deleted)")
            if name.startswith("/memfd:"):
                return cls("memfd", found.st_size, name.removeprefix("/memfd:"))
            return cls("file", found.st_size, name)
        return cls("other", name=name)


@dataclass(frozen=True)
class Buffer:
    """A part of guest memory that a descriptor of a ring names."""

    address: int
    """Guest address."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Activity:
    """What happened in a ring. Virtio 1.3, sections 2.7 and 2.8."""

    queue: int
    index: int
    """The number of the request in the ring, modulo 65536; in a packed ring, of those that were seen."""
    head: int
    """Its first descriptor."""
    readable: tuple[Buffer, ...] = ()
    writable: tuple[Buffer, ...] = ()
    indirect: bool = False
    written: int | None = None
    """Bytes that the device says it wrote, in a completion."""
    data: bytes = b""
    """The first bytes that the driver sent, or the device wrote."""
    late: bool = False
    """It was done when it was looked at: the driver may have changed descriptors and bytes since."""
    wish: str = ""
    """In a packed ring, what event suppression said of the kick, or call, for it: "off", or "at N/W", a descriptor and
    its wrap counter; empty where each is wanted."""


@dataclass(frozen=True)
class Record:
    """Something that happened in a traced connection."""

    time: int
    """Nanoseconds since 1970."""
    connection: int
    """1 for the first."""
    event: Event
    channel: Channel = "main"
    sender: Party = "front-end"
    """Who sent it; who closed the connection; who moved in the ring."""
    data: bytes = b""
    """As on the wire, with the header."""
    descriptors: tuple[Descriptor, ...] = ()
    latency: int | None = None
    """Nanoseconds since the request that this answers or completes."""
    text: str = ""
    """What there is to say about anything but a message."""
    activity: Activity | None = None
    device: DeviceType = field(default=UNKNOWN, compare=False)
    """What the back-end is taken for, which gives names to feature bits."""

    @cached_property
    def header(self) -> tuple[int, int, int]:
        """Request, flags, and bytes of payload, of a message."""
        request, flags, size = HEADER.unpack_from(self.data)
        return request, flags, size

    @property
    def payload(self) -> bytes:
        return self.data[HEADER.size :]

    @cached_property
    def decoded(self) -> DecodedMessage:
        """A message by names and values."""
        request, flags, _ = self.header
        return decode(self.channel, self.sender, request, flags, self.payload, len(self.descriptors))

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The values of a message by name. Bits of features have the names of the device type."""
        fields = self.decoded.fields
        if self.decoded.name in ("GET_FEATURES", "SET_FEATURES") and "names" in fields:
            return fields | {"names": self.device.feature_names(fields["value"])}
        return fields

    @property
    def problem(self) -> str | None:
        """What is wrong, if anything is."""
        if self.event != "message":
            return self.text or None if self.event == "bytes" else None
        late = [descriptor.offset for descriptor in self.descriptors if descriptor.offset]
        if late:
            return f"a descriptor came with byte {late[0]} of the message; they belong to its first"
        return self.decoded.problem

    @property
    def is_answer(self) -> bool:
        return self.event == "message" and (self.sender == "back-end") == (self.channel == "main")


def to_json(record: Record) -> dict[str, Any]:
    """A record as JSON has it. What `from_json` needs, and a message also decoded."""
    item: dict[str, Any] = {
        "time_ns": record.time,
        "connection": record.connection,
        "event": record.event,
        "channel": record.channel,
        "from": record.sender,
    }
    if record.event == "message":
        request, flags, _ = record.header
        item |= {
            "request": request,
            "name": record.decoded.name,
            "flags": flags,
            "answer": record.decoded.answer,
            "fields": _plain(record.fields),
            "problem": record.problem,
        }
    if record.text:
        item["text"] = record.text
    if record.event in ("message", "bytes"):
        item["descriptors"] = [_described(descriptor) for descriptor in record.descriptors]
        item["data"] = record.data.hex()
    if record.latency is not None:
        item["latency_ns"] = record.latency
    if activity := record.activity:
        item |= {key: value for key, value in vars(activity).items() if value not in (None, "")}
        item["readable"] = [vars(buffer) for buffer in activity.readable]
        item["writable"] = [vars(buffer) for buffer in activity.writable]
        item["data"] = activity.data.hex()
    return item


def from_json(item: dict[str, Any]) -> Record:
    """The record that `to_json` wrote.

    Raises:
        KeyError, TypeError, ValueError: it wrote another thing.
    """
    activity = None
    if item["event"] in ("request", "completion"):
        activity = Activity(
            queue=item["queue"],
            index=item["index"],
            head=item["head"],
            readable=tuple(Buffer(**buffer) for buffer in item["readable"]),
            writable=tuple(Buffer(**buffer) for buffer in item["writable"]),
            indirect=item["indirect"],
            written=item.get("written"),
            data=bytes.fromhex(item["data"]),
            late=item["late"],
            wish=item.get("wish", ""),
        )
    return Record(
        time=int(item["time_ns"]),
        connection=int(item["connection"]),
        event=item["event"],
        channel=item["channel"],
        sender=item["from"],
        data=b"" if activity else bytes.fromhex(item.get("data", "")),
        descriptors=tuple(Descriptor(**descriptor) for descriptor in item.get("descriptors", [])),
        latency=item.get("latency_ns"),
        text=item.get("text", ""),
        activity=activity,
    )


def _described(descriptor: Descriptor) -> dict[str, Any]:
    blank = Descriptor(descriptor.kind)
    said = {key: value for key, value in vars(descriptor).items() if value != getattr(blank, key)}
    return {"kind": descriptor.kind} | said


def _plain(value: Any) -> Any:
    match value:
        case bytes():
            return value.hex()
        case dict():
            return {name: _plain(item) for name, item in value.items()}
        case list():
            return [_plain(item) for item in value]
    return value


def is_unix_stream(number: int) -> bool:
    """Whether a descriptor is what SET_BACKEND_REQ_FD takes."""
    with contextlib.suppress(OSError):
        again = socket.socket(fileno=os.dup(number))
        with again:
            return again.family == socket.AF_UNIX and again.type == socket.SOCK_STREAM
    return False
