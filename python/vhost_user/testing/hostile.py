"""What no good driver would send: malformed chains, half messages, and messages at the wrong time.

For the last of these :meth:`Frontend.exchange` is enough, with ``connect(device, negotiate=False)``.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from .._core import REQUESTS
from ..errors import PeerClosed, PeerTimeout, ProtocolError
from ..frontend import TIMEOUT, Frontend
from ..queues import Buffer

#: Flags of a descriptor. Virtio 1.3, section 2.7.5.
NEXT = 1
WRITE = 2
INDIRECT = 4

HEADER = struct.Struct("=III")
DESCRIPTOR = struct.Struct("<QIHH")
VERSION = 1

#: Seconds between two looks at a ring, for those who may not be notified.
SLICE = 0.01


def message(request: str, payload: Buffer = b"", *, flags: int = VERSION, size: int | None = None) -> bytes:
    """The bytes of a message, to be cut or changed before :func:`send`.

    `size` is what the header says of the payload, if that is not the truth; bit 3 of `flags` asks for an
    acknowledgement, which nobody will read.
    """
    return HEADER.pack(REQUESTS[request], flags, len(payload) if size is None else size) + bytes(payload)


def send(frontend: Frontend, data: Buffer, descriptors: Sequence[int] = ()) -> None:
    """Send these bytes on the connection, with these descriptors, whatever they are.

    Raises:
        PeerClosed: the back-end closed the connection before it had all of them.
    """
    rest = bytes(data)
    with socket.socket(fileno=os.dup(frontend.fileno())) as connection:
        connection.settimeout(TIMEOUT)
        try:
            rest = rest[socket.send_fds(connection, [rest], list(descriptors)) :]
            if rest:
                connection.sendall(rest)
        except ConnectionError as error:
            raise PeerClosed(f"the back-end closed the connection ({error.strerror})") from None


class RawQueue:
    """A split ring of which every field can be written, in the memory of a negotiated `frontend`. It is started.

        with connect(device, start=False) as driver, RawQueue(driver) as ring:
            ring.describe(0, ring.put(b"?"), 1, flags=hostile.NEXT, next=0)
            ring.offer(0)
            assert ring.wait_broken()

    Nothing is checked, and nothing of what the device does is believed. Virtio 1.3, section 2.7.
    """

    def __init__(self, frontend: Frontend, index: int = 0, size: int = 8, *, base: int = 0) -> None:
        memory = self.memory = frontend.memory
        self.size = size
        self.descriptors = memory.allocate(16 * size)
        self.avail = memory.allocate(6 + 2 * size)
        self.used = memory.allocate(6 + 8 * size)
        self._next_avail = base
        self._next_used = base
        for part in (self.avail, self.used):
            memory.write(part + 2, struct.pack("<H", base))
        self._kick, self._call, self._error = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(3))
        addresses = [memory.user_address(part) for part in (self.descriptors, self.used, self.avail)]
        try:
            for request, payload, descriptors in [
                ("SET_VRING_NUM", struct.pack("=II", index, size), []),
                ("SET_VRING_BASE", struct.pack("=II", index, base), []),
                ("SET_VRING_ADDR", struct.pack("=IIQQQQ", index, 0, *addresses, 0), []),
                ("SET_VRING_CALL", struct.pack("=Q", index), [self._call]),
                ("SET_VRING_ERR", struct.pack("=Q", index), [self._error]),
                ("SET_VRING_KICK", struct.pack("=Q", index), [self._kick]),
                ("SET_VRING_ENABLE", struct.pack("=II", index, 1), []),
            ]:
                if frontend.exchange(request, payload, descriptors) not in (None, bytes(8)):
                    raise ProtocolError(f"{request}: the back-end refused it")
        except BaseException:
            self.close()
            raise

    def put(self, data: Buffer) -> int:
        """Put `data` somewhere in guest memory. Returns its guest address."""
        address = self.memory.allocate(len(data))
        self.memory.write(address, bytes(data))
        return address

    def describe(self, at: int, address: int, length: int, flags: int = 0, next: int = 0) -> None:  # noqa: A002
        """Write descriptor `at` of the table."""
        self.memory.write(self.descriptors + 16 * at, DESCRIPTOR.pack(address, length, flags, next))

    def offer(self, *heads: int) -> None:
        """Make chains available, by the descriptor that each begins with, and notify the device."""
        for head in heads:
            self.memory.write(self.avail + 4 + 2 * (self._next_avail % self.size), struct.pack("<H", head))
            self._next_avail = (self._next_avail + 1) % (1 << 16)
        self.set_available(self._next_avail)

    def set_available(self, index: int) -> None:
        """Write the available index, whatever is in the ring, and notify the device."""
        self.memory.write(self.avail + 2, struct.pack("<H", index))
        os.eventfd_write(self._kick, 1)

    def wait_used(self, timeout: float = TIMEOUT) -> tuple[int, int]:
        """The next chain that the device has given back: its first descriptor, and how many bytes it says it wrote.

        Raises:
            PeerTimeout: there is none within `timeout` seconds.
        """
        end = time.monotonic() + timeout
        # With EVENT_IDX, this is where the device looks before it notifies; it may have looked already.
        self.memory.write(self.avail + 4 + 2 * self.size, struct.pack("<H", self._next_used))
        while struct.unpack("<H", self.memory.read(self.used + 2, 2)) == (self._next_used,):
            left = end - time.monotonic()
            if left <= 0:
                raise PeerTimeout(f"the device gave nothing back within {timeout} s")
            _signalled(self._call, min(left, SLICE))
        entry = self.memory.read(self.used + 4 + 8 * (self._next_used % self.size), 8)
        self._next_used = (self._next_used + 1) % (1 << 16)
        head, written = struct.unpack("<II", entry)
        return head, written

    def wait_broken(self, timeout: float = TIMEOUT) -> bool:
        """Whether the device says within `timeout` seconds that the queue is broken."""
        return _signalled(self._error, timeout)

    def close(self) -> None:
        """Close the descriptors that the device was notified by. The queue itself stays as it is."""
        for event in (self._kick, self._call, self._error):
            os.close(event)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _signalled(event: int, timeout: float) -> bool:
    if not select.select([event], [], [], max(0.0, timeout))[0]:
        return False
    os.eventfd_read(event)
    return True
