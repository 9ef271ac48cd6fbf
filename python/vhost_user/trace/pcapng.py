"""Traces as pcapng files: Wireshark's format, with packets of the link type that is for one's own use (147, USER0).

A packet is a pseudo-header, descriptors, and what was sent, all in the byte order of the machine, as messages are:

| at | bytes | field |
|---|---|---|
| 0 | 2 | version: 1; 256 tells that the other byte order was meant |
| 2 | 1 | event: 0 message, 1 bytes that are no whole message, 2 opened, 3 closed, 4 a note (text) |
| 3 | 1 | direction: 0 from the front-end, 1 from the back-end |
| 4 | 1 | channel: 0 main, 1 the back-end's requests |
| 5 | 1 | reserved |
| 6 | 2 | number of descriptors |
| 8 | 4 | connection: 1 for the first |
| 12 | 4 | what the back-end is taken for: a virtio device type; 0 where that was not plain yet |
| 16 | 16 each | descriptors: kind (1), reserved (3), which byte of the message it came with (4), its size (8) |
| then | | the message, header and payload |

Kinds are 0 other, 1 memfd, 2 file, 3 eventfd, 4 socket, 5 the reading end of a pipe, 6 the writing one. What
happens in rings is not in such a file. draft-ietf-opsawg-pcapng.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from typing import IO

from ..features import TYPES, UNKNOWN
from .model import Channel, Descriptor, Event, Party, Record

LINK_TYPE = 147
VERSION = 1
PSEUDO_HEADER = struct.Struct("=HBBBxHII")
DESCRIPTOR = struct.Struct("=B3xIQ")

EVENTS: list[Event] = ["message", "bytes", "opened", "closed", "note"]
PARTIES: list[Party] = ["front-end", "back-end"]
CHANNELS: list[Channel] = ["main", "back-end"]
#: Kinds of descriptors, and the name that tells the ends of a pipe apart.
KINDS = [(kind, "") for kind in ("other", "memfd", "file", "eventfd", "socket")] + [("pipe", "read"), ("pipe", "write")]

SECTION, INTERFACE, PACKET = 0x0A0D0D0A, 1, 6
MAGIC = 0x1A2B3C4D
END_OF_OPTIONS, COMMENT = 0, 1
INTERFACE_RESOLUTION, PACKET_FLAGS = 9, 2
NANOSECONDS = 9
INBOUND, OUTBOUND = 1, 2
#: No block of ours comes near.
LONGEST_BLOCK = 1 << 24
FOREIGN = f"this is no pcapng file of a {sys.byteorder}-endian machine"


class Writer:
    """Writes every record that it is called with, but those of rings."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._block(SECTION, struct.pack("=IHHq", MAGIC, 1, 0, -1))
        self._block(
            INTERFACE,
            struct.pack("=HHI", LINK_TYPE, 0, 0)
            + _option(INTERFACE_RESOLUTION, bytes([NANOSECONDS]))
            + _option(END_OF_OPTIONS),
        )

    def __call__(self, record: Record) -> None:
        if record.event not in EVENTS:
            return
        packet = encode(record)
        flags = OUTBOUND if record.sender == "front-end" else INBOUND
        head = struct.pack("=IIIII", 0, record.time >> 32, record.time & 0xFFFFFFFF, len(packet), len(packet))
        options = _option(PACKET_FLAGS, struct.pack("=I", flags))
        if record.text and record.event != "note":
            options += _option(COMMENT, record.text.encode())
        self._block(PACKET, head + _padded(packet) + options + _option(END_OF_OPTIONS))

    def _block(self, kind: int, body: bytes) -> None:
        size = struct.pack("=I", len(body) + 12)
        self._out.write(struct.pack("=I", kind) + size + body + size)
        self._out.flush()


def encode(record: Record) -> bytes:
    """A record as a packet."""
    header = PSEUDO_HEADER.pack(
        VERSION,
        EVENTS.index(record.event),
        PARTIES.index(record.sender),
        CHANNELS.index(record.channel),
        len(record.descriptors),
        record.connection,
        record.device.id,
    )
    descriptors = b"".join(
        DESCRIPTOR.pack(_kind(descriptor), descriptor.offset, descriptor.size or 0) for descriptor in record.descriptors
    )
    return header + descriptors + (record.text.encode() if record.event == "note" else record.data)


def _kind(descriptor: Descriptor) -> int:
    name = descriptor.name if descriptor.kind == "pipe" else ""
    return KINDS.index((descriptor.kind, name)) if (descriptor.kind, name) in KINDS else 0


def decode(packet: bytes, time: int) -> Record:
    """The record that a packet is.

    Raises:
        ValueError: it is none of ours, or of a machine with another byte order.
    """
    try:
        version, event, direction, channel, count, connection, device = PSEUDO_HEADER.unpack_from(packet)
        if version != VERSION:
            raise ValueError(f"a packet has the version {version}; {VERSION} was expected")
        end = PSEUDO_HEADER.size + count * DESCRIPTOR.size
        if len(packet) < end:
            raise ValueError(f"a packet of {len(packet)} bytes is too short for {count} descriptors")
        descriptors = tuple(_descriptor(*item) for item in DESCRIPTOR.iter_unpack(packet[PSEUDO_HEADER.size : end]))
        data = packet[end:]
        is_note = EVENTS[event] == "note"
        return Record(
            time,
            connection,
            EVENTS[event],
            CHANNELS[channel],
            PARTIES[direction],
            b"" if is_note else data,
            descriptors,
            text=data.decode(errors="replace") if is_note else "",
            device=TYPES.get(device, UNKNOWN),
        )
    except (struct.error, IndexError):
        raise ValueError("a packet has no pseudo-header that can be understood") from None


def _descriptor(kind: int, offset: int, size: int) -> Descriptor:
    name, end = KINDS[kind]
    return Descriptor(name, size if name in ("memfd", "file") else None, end, offset)


def read(file: IO[bytes]) -> Iterator[Record]:
    """The records of a file.

    Raises:
        ValueError: it is no pcapng file of this machine's byte order, or has packets of another link type.
    """
    link_types: list[int] = []
    for kind, body in _blocks(file):
        try:
            if kind == SECTION:
                if struct.unpack_from("=I", body)[0] != MAGIC:
                    raise ValueError(FOREIGN)
                link_types = []
            elif kind == INTERFACE:
                link_types.append(struct.unpack_from("=H", body)[0])
            elif kind == PACKET:
                interface, high, low, captured, _ = struct.unpack_from("=IIIII", body)
                if interface >= len(link_types) or link_types[interface] != LINK_TYPE:
                    raise ValueError(f"a packet is not of the link type {LINK_TYPE}, as those of vhost-user are")
                yield decode(body[20 : 20 + captured], high << 32 | low)
        except struct.error:
            raise ValueError("a block is too short for what it is") from None


def _blocks(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    while head := file.read(8):
        if len(head) < 8:
            raise ValueError("the file ends within a block")
        kind, size = struct.unpack("=II", head)
        if not 12 <= size <= LONGEST_BLOCK or size % 4:
            raise ValueError(FOREIGN)
        body = file.read(size - 8)
        if len(body) < size - 8:
            raise ValueError("the file ends within a block")
        yield kind, body[:-4]


def _option(code: int, value: bytes = b"") -> bytes:
    return struct.pack("=HH", code, len(value)) + _padded(value)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
