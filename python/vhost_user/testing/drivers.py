"""A typed driver for each device that the package has.

    with vu.Frontend.connect("/tmp/disk.sock") as frontend:
        print(BlkDriver(frontend.negotiate()).capacity)

They work with any back-end of the type.
"""

from __future__ import annotations

import contextlib
import struct
from collections import deque
from collections.abc import Iterator
from typing import Any, ClassVar, Self

from ..device import Device
from ..devices import blk, i2c
from ..errors import ProtocolError, VhostUserError
from ..frontend import Completion, DriverQueue, Frontend
from ..queues import Buffer
from .connection import connect


class RequestFailed(VhostUserError):
    """The device answered that it could not do what was asked. `status` is its answer."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Driver:
    """Works with a negotiated `frontend`, whose queues it starts unless they were."""

    #: How many queues the driver uses.
    QUEUES: ClassVar[int] = 1

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend
        self.queues: list[DriverQueue] = frontend.queues or frontend.start_queues(self.QUEUES)

    @classmethod
    @contextlib.contextmanager
    def connect(cls, device: Device, **options: Any) -> Iterator[Self]:
        """A device in this process, as in :func:`vhost_user.testing.connect`, and this driver of it."""
        with connect(device, **options) as frontend:
            yield cls(frontend)


class RngDriver(Driver):
    """Virtio 1.3, section 5.4."""

    def read(self, size: int) -> bytes:
        """`size` random bytes, in as many requests as the device needs.

        Raises:
            ProtocolError: the device answered without a byte.
        """
        data = b""
        while len(data) < size:
            part = self.queues[0].request(writable=size - len(data))
            if not part:
                raise ProtocolError("queue 0: the device gave no byte; it has to give at least one")
            data += part
        return data


class BlkDriver(Driver):
    """Virtio 1.3, section 5.2. Sectors have 512 bytes; `queue` chooses one of several queues.

    Requests raise:
        RequestFailed: the device answered with an error, or that it does not support the request.
        ProtocolError: the answer has another length than it must have.
    """

    @property
    def capacity(self) -> int:
        """The size of the disk, in sectors."""
        (sectors,) = struct.unpack("<Q", self.frontend.read_config(8))
        return int(sectors)

    def read(self, sector: int, size: int, *, queue: int = 0) -> bytes:
        """Read `size` bytes from `sector` on."""
        return self.execute(blk.Type.IN, sector, room=size, queue=queue)

    def write(self, sector: int, data: Buffer, *, queue: int = 0) -> None:
        """Write `data` from `sector` on."""
        self.execute(blk.Type.OUT, sector, data, queue=queue)

    def flush(self, *, queue: int = 0) -> None:
        """Wait until everything that was written is safe."""
        self.execute(blk.Type.FLUSH, queue=queue)

    def discard(self, sector: int, sectors: int, *, queue: int = 0) -> None:
        """Say that the content of a range is not needed any more."""
        self.execute(blk.Type.DISCARD, data=blk.SEGMENT.pack(sector, sectors, 0), queue=queue)

    def write_zeroes(self, sector: int, sectors: int, *, unmap: bool = False, queue: int = 0) -> None:
        """Make a range zero; with `unmap`, its space may be freed."""
        flags = blk.SEGMENT_UNMAP if unmap else 0
        self.execute(blk.Type.WRITE_ZEROES, data=blk.SEGMENT.pack(sector, sectors, flags), queue=queue)

    def get_id(self) -> str:
        """The serial number of the disk."""
        return self.execute(blk.Type.GET_ID, room=blk.ID_BYTES).rstrip(b"\0").decode()

    def execute(self, kind: int, sector: int = 0, data: Buffer = b"", room: int = 0, *, queue: int = 0) -> bytes:
        """Any request: a header, `data`, room for as many bytes, and for the status. Returns what came in the room."""
        answer = self.queues[queue].request([blk.HEADER.pack(kind, sector), data], [room, 1])
        if len(answer) != room + 1:
            raise ProtocolError(f"queue {queue}: the device wrote {len(answer)} bytes, expected {room} and a status")
        if answer[-1:] != blk.S_OK:
            name = blk.Type(kind).name if kind in list(blk.Type) else f"request {kind}"
            raise RequestFailed(f"{name} at sector {sector}: the status is {answer[-1]}", answer[-1])
        return answer[:-1]


class ConsoleDriver(Driver):
    """Virtio 1.3, section 5.3. The device has `buffers` of `size` bytes to type into."""

    QUEUES = 2

    def __init__(self, frontend: Frontend, *, buffers: int = 4, size: int = 4096) -> None:
        super().__init__(frontend)
        self._size = size
        self._typed = b""
        self._buffers: deque[Completion] = deque()
        for _ in range(buffers):
            self._offer()

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        cols, rows = struct.unpack("<HH", self.frontend.read_config(4))
        return cols, rows

    def read(self, size: int, timeout: float | None = None) -> bytes:
        """What the device typed next: `size` bytes, each buffer of which may take `timeout` seconds."""
        while len(self._typed) < size:
            self._receive(timeout)
        data, self._typed = self._typed[:size], self._typed[size:]
        return data

    def read_line(self, timeout: float | None = None) -> bytes:
        """What the device typed up to the next newline, which belongs to it."""
        while b"\n" not in self._typed:
            self._receive(timeout)
        return self.read(self._typed.index(b"\n") + 1)

    def write(self, data: Buffer) -> None:
        """Print `data`, and wait until the device has taken it."""
        self.queues[1].request(data)

    def _receive(self, timeout: float | None) -> None:
        self._typed += self._buffers[0].wait(timeout)
        self._buffers.popleft()
        self._offer()

    def _offer(self) -> None:
        self._buffers.append(self.queues[0].submit(writable=self._size))


class I2cDriver(Driver):
    """Virtio 1.3, section 5.21."""

    def transfer(self, address: int, *messages: Buffer | int) -> list[bytes]:
        """One transfer with the target at a 7-bit `address`, of messages that follow each other without a stop.

        Bytes are written; of a number, as many bytes are read. Returns what was read, by message. No message at all
        makes one of no bytes, which only looks whether there is a target.

        Raises:
            RequestFailed: the target, or the adapter, did not acknowledge a message.
        """
        queue = self.queues[0]
        submitted = []
        for at, message in enumerate(messages or [b""]):
            flags = i2c.FAIL_NEXT if at + 1 < len(messages) else 0
            if isinstance(message, int):
                parts = [i2c.HEADER.pack(address << 1, flags | i2c.M_RD)]
                submitted.append((message, queue.submit(parts, [message, 1])))
            else:
                submitted.append((0, queue.submit([i2c.HEADER.pack(address << 1, flags), message], 1)))
        answers = [(size, completion.wait()) for size, completion in submitted]
        for at, (size, answer) in enumerate(answers):
            if len(answer) != size + 1:
                raise ProtocolError(f"queue 0: the device wrote {len(answer)} bytes, expected {size} and a status")
            if answer[-1:] != i2c.OK:
                what = f"message {at + 1} of {len(answers)} to {address:#04x}"
                raise RequestFailed(f"{what} was not acknowledged", answer[-1])
        return [answer[:-1] for size, answer in answers if size]
