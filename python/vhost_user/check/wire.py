"""A front-end that does exactly what a check tells it, also nonsense: messages, guest memory and split rings by hand.

It shares no code with `vhost_user.Frontend`, which would not send what checks have to send, and whose own mistakes a
check could not see. Every wait has a deadline. vhost-user specification, "Message Specification"; Virtio 1.3, 2.7.
"""

from __future__ import annotations

import contextlib
import enum
import mmap
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .._core import messages

HEADER = struct.Struct("=III")
VERSION = 0x1
REPLY = 0x4
NEED_REPLY = 0x8

NEXT, WRITE, INDIRECT = 1, 2, 4

#: Ids by name, and names by id, of what a front-end may send.
IDS = {info.name: info.id for info in messages() if info.channel == "main"}
NAMES = {number: name for name, number in IDS.items()}


class Feature(enum.IntFlag):
    """Bits of GET_FEATURES that checks care for."""

    LOG_ALL = 1 << 26
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32


class Protocol(enum.IntFlag):
    """Bits of GET_PROTOCOL_FEATURES that checks care for."""

    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16


class Closed(Exception):
    """The back-end closed the connection where it should have answered."""


class Silent(Exception):
    """The back-end did not do in time what it should have done."""


class Answer(NamedTuple):
    """A message of the back-end."""

    request: int
    flags: int
    payload: bytes
    descriptors: int

    @property
    def u64(self) -> int:
        """Its payload as a number, or -1 if that has not eight bytes."""
        return int(struct.unpack("=Q", self.payload)[0]) if len(self.payload) == 8 else -1

    def __str__(self) -> str:
        shown = self.payload[:24].hex(" ") + (" …" if len(self.payload) > 24 else "")
        more = f", {self.descriptors} descriptors" if self.descriptors else ""
        size = len(self.payload)
        return (
            f"{NAMES.get(self.request, self.request)} flags {self.flags:#x} size {size}{more}: {shown or 'no payload'}"
        )


class Wire:
    """The main channel. It keeps `log`, the last of what was said."""

    def __init__(self, path: str, timeout: float) -> None:
        self.timeout = timeout
        self.log: deque[str] = deque(maxlen=8)
        self.protocol = 0
        """The protocol features that were negotiated."""
        self.queues: int | None = None
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket.settimeout(timeout)
            self.socket.connect(path)
        except BaseException:
            self.socket.close()
            raise

    def send(
        self,
        request: str | int,
        payload: bytes = b"",
        descriptors: Sequence[int] = (),
        *,
        flags: int = VERSION,
        size: int | None = None,
    ) -> None:
        """Send a message. `size` is what its header says, if that is not the truth."""
        number = IDS[request] if isinstance(request, str) else request
        size = len(payload) if size is None else size
        more = f", {len(descriptors)} descriptors" if descriptors else ""
        shown = payload[:40].hex(" ") + (" …" if len(payload) > 40 else "")
        self.log.append(f"-> {request} flags {flags:#x} size {size}{more}: {shown or 'no payload'}")
        self.send_bytes(HEADER.pack(number, flags, size) + payload, descriptors)

    def send_bytes(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send bytes as they are.

        Raises:
            Closed: the back-end has closed the connection.
            Silent: it does not read.
        """
        try:
            sent = socket.send_fds(self.socket, [data], list(descriptors)) if descriptors else self.socket.send(data)
            if sent < len(data):
                self.socket.sendall(data[sent:])
        except TimeoutError:
            raise Silent(f"the back-end did not read for {self.timeout:g} s") from None
        except OSError as error:
            raise Closed(f"the back-end closed the connection ({error.strerror})") from None

    def receive(self) -> Answer:
        """The next message.

        Raises:
            Closed: the back-end closed the connection.
            Silent: nothing came in time.
        """
        deadline = time.monotonic() + self.timeout
        head, descriptors = self._read(HEADER.size, deadline)
        request, flags, size = HEADER.unpack(head)
        # Nobody sends more; a garbled header is not waited for.
        payload, more = self._read(min(size, 1 << 16), deadline) if size else (b"", 0)
        answer = Answer(request, flags, payload, descriptors + more)
        self.log.append(f"<- {answer}")
        return answer

    def _read(self, size: int, deadline: float) -> tuple[bytes, int]:
        data, descriptors = b"", 0
        while len(data) < size:
            if not select.select([self.socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self.log.append(f"<- nothing for {self.timeout:g} s" if not data else f"<- only {data.hex(' ')}")
                raise Silent(f"the back-end did not answer within {self.timeout:g} s")
            try:
                piece, received, _, _ = socket.recv_fds(self.socket, size - len(data), 16)
            except OSError as error:
                self.log.append(f"<- {error.strerror}")
                raise Closed(f"the back-end closed the connection ({error.strerror})") from None
            for descriptor in received:
                os.close(descriptor)
            descriptors += len(received)
            if not piece:
                self.log.append("<- end of the connection")
                raise Closed("the back-end closed the connection")
            data += piece
        return data, descriptors

    def is_quiet(self, seconds: float) -> bool:
        """Whether nothing comes for a while, be it the end."""
        return not select.select([self.socket], [], [], seconds)[0]

    def ask(
        self, request: str | int, payload: bytes = b"", descriptors: Sequence[int] = (), *, flags: int = VERSION
    ) -> Answer:
        """Send a request that is always answered, and wait for the answer."""
        self.send(request, payload, descriptors, flags=flags)
        return self.receive()

    def acknowledged(self, request: str | int, payload: bytes = b"", descriptors: Sequence[int] = ()) -> int:
        """Send a request with NEED_REPLY. Returns its acknowledgement: 0 if it was accepted."""
        return self.ask(request, payload, descriptors, flags=VERSION | NEED_REPLY).u64

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()


class Notifier:
    """An eventfd for kicks, calls and errors."""

    def __init__(self) -> None:
        self.descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def signal(self) -> None:
        """Notify the other side."""
        os.eventfd_write(self.descriptor, 1)

    def came(self, timeout: float) -> bool:
        """Whether a notification comes within `timeout` seconds; it is taken."""
        if not select.select([self.descriptor], [], [], timeout)[0]:
            return False
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)
        return True

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)


class Memory:
    """A region of guest memory in a memfd, at different guest, user and file addresses."""

    def __init__(
        self, size: int = 1 << 18, *, guest: int = 0x4000_0000, user: int = 0x7F55_0000_0000, offset: int = 0
    ) -> None:
        self.size = size
        self.guest = guest
        self.user = user
        self.offset = offset
        self.descriptor = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.truncate(self.descriptor, offset + size)
        self._map = mmap.mmap(self.descriptor, offset + size)
        self._free = guest

    def region(self, **other: int) -> bytes:
        """How the protocol describes it; with `other`, not quite."""
        words = {"guest": self.guest, "size": self.size, "user": self.user, "offset": self.offset} | other
        return struct.pack("=QQQQ", *words.values())

    def allocate(self, size: int, alignment: int = 16) -> int:
        """The guest address of bytes that nobody has yet."""
        address = -(-self._free // alignment) * alignment
        assert address + size <= self.guest + self.size, "a check wants more guest memory than there is"
        self._free = address + size
        return address

    def read(self, address: int, size: int) -> bytes:
        """What is at a guest address."""
        at = address - self.guest + self.offset
        return self._map[at : at + size]

    def write(self, address: int, data: bytes) -> None:
        """Change what is at a guest address."""
        at = address - self.guest + self.offset
        self._map[at : at + len(data)] = data

    def to_user(self, address: int) -> int:
        """The user address of a guest address."""
        return address - self.guest + self.user

    def close(self) -> None:
        """Unmap it here; the back-end may have it still."""
        self._map.close()
        os.close(self.descriptor)


class Chain(NamedTuple):
    """A request in a ring."""

    head: int
    writable: list[tuple[int, int]]


class Ring:
    """The driver's side of a split ring, field by field."""

    def __init__(self, memory: Memory, index: int, size: int = 16, base: int = 0) -> None:
        self.memory = memory
        self.index = index
        self.size = size
        self.descriptors = memory.allocate(16 * size, 16)
        self.avail = memory.allocate(6 + 2 * size, 2)
        self.used = memory.allocate(6 + 8 * size, 4)
        self.kick = Notifier()
        self.call = Notifier()
        self.error = Notifier()
        self._next = 0
        self.avail_index = base
        self._set(self.used + 2, base)
        self.seen = base

    def address_payload(self, **other: int) -> bytes:
        """The payload of SET_VRING_ADDR."""
        to_user = self.memory.to_user
        parts = {"descriptors": to_user(self.descriptors), "used": to_user(self.used), "avail": to_user(self.avail)}
        return struct.pack("=IIQQQQ", self.index, 0, *(parts | other).values(), 0)

    # --- Fields -----------------------------------------------------------------------------------------------------

    @property
    def avail_index(self) -> int:
        """Where the driver will put the next head."""
        return self._get(self.avail + 2)

    @avail_index.setter
    def avail_index(self, value: int) -> None:
        self._set(self.avail + 2, value)

    @property
    def used_index(self) -> int:
        """Where the device will put the next used entry."""
        return self._get(self.used + 2)

    def set_avail_flags(self, flags: int) -> None:
        """1: notifications are not wanted."""
        self._set(self.avail, flags)

    @property
    def used_flags(self) -> int:
        """1: kicks are not wanted."""
        return self._get(self.used)

    def set_used_event(self, index: int) -> None:
        """With EVENT_IDX: the used index after which a notification is wanted."""
        self._set(self.avail + 4 + 2 * self.size, index)

    @property
    def avail_event(self) -> int:
        """With EVENT_IDX: the available index after which a kick is wanted."""
        return self._get(self.used + 4 + 8 * self.size)

    def _get(self, address: int) -> int:
        return int.from_bytes(self.memory.read(address, 2), "little")

    def _set(self, address: int, value: int) -> None:
        self.memory.write(address, (value & 0xFFFF).to_bytes(2, "little"))

    # --- Requests ---------------------------------------------------------------------------------------------------

    def add(
        self,
        readable: Sequence[bytes] = (),
        writable: Sequence[int] = (),
        *,
        indirect: bool = False,
        memory: Memory | None = None,
    ) -> Chain:
        """Offer a chain with one descriptor for each piece."""
        memory = memory or self.memory
        pieces = []
        for data in readable:
            pieces.append((memory.allocate(len(data)), len(data), 0))
            memory.write(pieces[-1][0], data)
        room = [(memory.allocate(size), size) for size in writable]
        head = self.add_pieces([*pieces, *((address, size, WRITE) for address, size in room)], indirect=indirect)
        return Chain(head, room)

    def add_pieces(self, pieces: Sequence[tuple[int, int, int]], *, indirect: bool = False) -> int:
        """Offer a chain of (address, length, flags). Returns its head."""
        if indirect:
            last = len(pieces) - 1
            rows = (
                struct.pack("<QIHH", address, size, flags | (NEXT if at < last else 0), at + 1 if at < last else 0)
                for at, (address, size, flags) in enumerate(pieces)
            )
            table = b"".join(rows)
            address = self.memory.allocate(len(table))
            self.memory.write(address, table)
            return self.add_pieces([(address, len(table), INDIRECT)])
        slots = [(self._next + at) % self.size for at in range(len(pieces))]
        self._next = (self._next + len(pieces)) % self.size
        for at, (address, size, flags) in enumerate(pieces):
            is_last = at == len(pieces) - 1
            self.set_descriptor(
                slots[at], address, size, flags | (0 if is_last else NEXT), 0 if is_last else slots[at + 1]
            )
        self.offer(slots[0])
        return slots[0]

    def set_descriptor(self, slot: int, address: int, size: int, flags: int = 0, following: int = 0) -> None:
        """Write a descriptor, whatever it says."""
        self.memory.write(self.descriptors + 16 * slot, struct.pack("<QIHH", address, size, flags, following))

    def offer(self, head: int) -> None:
        """Make a head available, be it good or not."""
        self._set(self.avail + 4 + 2 * (self.avail_index % self.size), head)
        self.avail_index += 1

    def take(self) -> list[tuple[int, int]]:
        """The used entries that were not seen yet: head, and bytes written."""
        entries: list[tuple[int, int]] = []
        while self.seen != self.used_index and len(entries) <= self.size:
            head, length = struct.unpack("<II", self.memory.read(self.used + 4 + 8 * (self.seen % self.size), 8))
            entries.append((head, length))
            self.seen = (self.seen + 1) & 0xFFFF
        return entries

    def wait(self, count: int, timeout: float) -> list[tuple[int, int]]:
        """Up to `count` used entries, or more if more come: as many as there are in time."""
        entries: list[tuple[int, int]] = []

        def enough() -> bool:
            entries.extend(self.take())
            return len(entries) >= count

        wait_until(enough, timeout)
        return entries

    def data(self, chain: Chain) -> bytes:
        """What is in the room of a chain."""
        return b"".join(self.memory.read(address, size) for address, size in chain.writable)

    def close(self) -> None:
        """Close its descriptors."""
        for notifier in (self.kick, self.call, self.error):
            notifier.close()


def wait_until(condition: Callable[[], object], timeout: float) -> bool:
    """Whether `condition()` becomes true within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    pause = 0.0001
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.002)
    return True


def vring_state(index: int, number: int = 0) -> bytes:
    """The payload of most messages about a ring."""
    return struct.pack("=II", index, number)


def u64(value: int) -> bytes:
    """A payload of one number."""
    return struct.pack("=Q", value)


def config(offset: int, data: bytes, *, size: int | None = None, flags: int = 0) -> bytes:
    """The payload of GET_CONFIG and SET_CONFIG; `size` is what it says, if that is not the truth."""
    return struct.pack("=III", offset, len(data) if size is None else size, flags) + data
