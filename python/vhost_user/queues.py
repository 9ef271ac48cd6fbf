"""Queues: how a class declares them, and what a device does with them while it runs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, overload

from ._core import Complaints, Request, read_each, unpack_each, write_each, write_tail_each
from .errors import DeclarationError, QueueFull, RequestOverflow

if TYPE_CHECKING:
    from struct import Struct

    from ._core import Backend
    from .device import Device

Buffer = bytes | bytearray | memoryview
Handler = TypeVar("Handler", bound=Callable[..., object])
Piece = TypeVar("Piece", bound=Buffer)

MAX_SIZE = 32768

#: Bytes in a request by default: more than the block layer or a file system asks for, and no danger to the host.
MAX_REQUEST = 64 << 20


class Queue:
    """A queue of a device class. The order of declaration is the queue's index.

    `size` is the number of entries that a driver is advised to use, a power of two up to 32768; the front-end decides.
    `backlog` is how many pushes are kept while the driver has no buffer for them. `max_request` is how many bytes a
    request may hold, to read and to write together: a driver that asks for more breaks its queue, so that a handler
    may allocate what a request announces.
    """

    name: str

    def __init__(self, size: int = 256, *, backlog: int = 0, max_request: int = MAX_REQUEST) -> None:
        if size < 1 or size > MAX_SIZE or size & (size - 1):
            raise DeclarationError(f"a queue has a power of two of entries up to {MAX_SIZE}, not {size}")
        if backlog < 0:
            raise DeclarationError(f"a backlog cannot be negative, as {backlog} is")
        if not 0 < max_request < 1 << 32:
            raise DeclarationError(f"a request holds from 1 to 4294967295 bytes, not {max_request}")
        self.size = size
        self.backlog = backlog
        self.max_request = max_request

    @staticmethod
    def many(count: int | str, size: int = 256, *, backlog: int = 0, max_request: int = MAX_REQUEST) -> QueueArray:
        """Several queues in a row, alike. `count` is their number, or the name of the attribute that holds it."""
        return QueueArray(count, size, backlog=backlog, max_request=max_request)

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, device: None, owner: type) -> Queue: ...

    @overload
    def __get__(self, device: Device, owner: type) -> DeviceQueue: ...

    def __get__(self, device: Device | None, owner: type) -> Queue | DeviceQueue:
        if device is None:
            return self
        return device._runtime.queues_of(self)[0]

    def __set__(self, device: Device, value: object) -> None:
        raise AttributeError(f"{self.name} is a queue of the device; it cannot be replaced")

    def handler(self, method: Handler) -> Handler:
        """Call `method(self, request)` for every request on the queue. It may be an ``async def``."""
        method.__vhost_user_queue__ = self  # type: ignore[attr-defined]
        return method

    def batch_handler(self, method: Handler) -> Handler:
        """Call `method(self, batch)` with all requests that are available on the queue, up to 64: a :class:`Batch`.

        They are completed together when it returns, but for those that were detached. It may return a list of those
        that it leaves to the queue's :meth:`handler`, which then gets them one by one. If it raises, every request that
        is not completed by then has failed. It is not an ``async def``. A subclass that declares a handler of its own
        for the queue replaces it, too.
        """
        method.__vhost_user_batches__ = self  # type: ignore[attr-defined]
        return method

    def blocks(self, method: Handler) -> Handler:
        """Call `method(self)` for every batch of requests; the :class:`Blocks` that it returns does what it can.

        One that is lasting is kept for the next batches, as long as what it says of the device is true.

        For disks: plain reads and writes of a file then need neither a handler nor the interpreter. Other requests are
        left to the handlers that there are, and so are all if it returns None. A subclass that declares a handler of
        its own for the queue replaces it, too.
        """
        method.__vhost_user_blocks__ = self  # type: ignore[attr-defined]
        return method

    def count_for(self, device: Device) -> int:
        """How many queues this declaration makes on `device`."""
        return 1

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {getattr(self, 'name', '?')}>"


class QueueArray(Queue):
    """Several queues in a row, from :meth:`Queue.many`."""

    def __init__(self, count: int | str, size: int = 256, *, backlog: int = 0, max_request: int = MAX_REQUEST) -> None:
        super().__init__(size, backlog=backlog, max_request=max_request)
        if isinstance(count, int) and count < 0:
            raise DeclarationError(f"{count} queues cannot be")
        self.count = count

    @overload  # type: ignore[override]
    def __get__(self, device: None, owner: type) -> QueueArray: ...

    @overload
    def __get__(self, device: Device, owner: type) -> list[DeviceQueue]: ...

    def __get__(self, device: Device | None, owner: type) -> QueueArray | list[DeviceQueue]:
        if device is None:
            return self
        return device._runtime.queues_of(self)

    def count_for(self, device: Device) -> int:
        if isinstance(self.count, int):
            return self.count
        count = getattr(device, self.count, None)
        if not isinstance(count, int) or count < 0:
            raise DeclarationError(f"{type(device).__name__}.{self.count} is {count!r}; it must be a number of queues")
        return count


class Batch(list[Request]):
    """Requests that are worked on together: a list of them, and what one call does with each.

    A batch handler gets one, and any requests make another: ``Batch(request for request in batch if ...)``. What a
    method raises is about the first request with which it cannot do its work; those before it were read or written.
    """

    __slots__ = ()

    def read(self, size: int = -1, /) -> list[bytes]:
        """What :meth:`Request.read` returns for each."""
        return read_each(self, size)

    def unpack(self, format: str | Struct) -> list[tuple[Any, ...]]:  # noqa: A002
        """What :meth:`Request.unpack` returns for each.

        Raises:
            RequestUnderflow: the driver sent fewer bytes in one of them.
        """
        return unpack_each(self, format)

    def write(self, data: Buffer | list[Piece]) -> None:
        """Write to each what :meth:`Request.write` would: the same `data`, or the items of a list, one for each.

        Raises:
            RequestOverflow: one of them has less room.
            ValueError: the list has not one item for each request. Nothing was written.
        """
        write_each(self, data)

    def write_tail(self, data: bytes | list[bytes]) -> None:
        """Write into the last bytes of each what :meth:`Request.write_tail` would: the same, or the items of a list.

        Raises:
            RequestOverflow: the bytes before were written already in one of them.
            ValueError: the list has not one item for each request. Nothing was written.
        """
        write_tail_each(self, data)


class QueueStatistics(NamedTuple):
    """Counters of a queue, since the device was made."""

    requests: int = 0
    """Requests taken from the driver."""
    bytes_read: int = 0
    """Bytes that drivers offered to be read."""
    bytes_written: int = 0
    """Bytes that the device wrote."""
    kicks: int = 0
    """Notifications that came."""
    calls: int = 0
    """Notifications that were sent."""
    calls_suppressed: int = 0
    """Notifications that the driver did not want."""
    errors: int = 0
    """Handlers that failed, requests that nobody answered, and rings that broke."""
    iotlb_misses: int = 0
    """How often the front-end was asked where an I/O address is; see :attr:`Device.iommu`."""
    iotlb_invalidations: int = 0
    """How often it took some back, of whichever queue."""


class DeviceQueue:
    """A queue of one device. Every method may be called from any thread."""

    def __init__(self, name: str, index: int, declaration: Queue) -> None:
        self.name = name
        self.index = index
        self.size = declaration.size
        self.max_request = declaration.max_request
        self._backlog_limit = declaration.backlog
        self._backlog: deque[bytes] = deque()
        self._misfits = Complaints()
        self._backend: Backend | None = None
        #: The counters of earlier times in which the device was served.
        self._earlier = QueueStatistics()
        # Both are the same lock: to take it by itself costs less.
        self._lock = threading.RLock()
        self._buffers = threading.Condition(self._lock)

    @property
    def status(self) -> str:
        """ "stopped", "disabled", "running" or "broken". vhost-user specification, "Ring states"."""
        return self._backend.status(self.index) if self._backend else "stopped"

    @property
    def byteorder(self) -> Literal["little", "big"]:
        """In which byte order the driver is: "big" for legacy drivers on big-endian machines.

        Always "little" unless the device sets :attr:`Device.cross_endian`. It is known when the queue starts, and good
        for ``int.from_bytes``; for :mod:`struct`, "little" is ``<`` and "big" is ``>``.
        """
        return "big" if self._backend and self._backend.is_big_endian(self.index) else "little"

    @property
    def available(self) -> int:
        """Requests that the driver has made available and nobody has taken."""
        return self._backend.available(self.index) if self._backend else 0

    @property
    def in_flight(self) -> int:
        """Requests that the device has taken and not completed."""
        return self._backend.in_flight(self.index) if self._backend else 0

    @property
    def statistics(self) -> QueueStatistics:
        """Counters of the queue."""
        if self._backend is None:
            return self._earlier
        now = self._backend.statistics(self.index)
        return QueueStatistics(**{name: getattr(self._earlier, name) + count for name, count in now.items()})

    def take(self) -> Request | None:
        """The next request, detached, or None if the driver has made none available.

        For queues without a handler.

        Raises:
            ProtocolError: the driver broke the ring.
        """
        return self._backend.take(self.index) if self._backend else None

    def push(self, data: Buffer, *, timeout: float | None = 0) -> None:
        """Fill the next buffer of the driver with `data`, and complete it. For queues without a handler.

        Waits for a buffer up to `timeout` seconds (None: as long as it takes), which only other threads than the
        device's own may do. What comes too early for the driver is kept if the queue was declared with a backlog.

        Raises:
            QueueFull: there is no buffer and no room in the backlog. Nothing was pushed.
            RequestOverflow: `data` is longer than the driver's buffer. Nothing was pushed.
            ProtocolError: the driver broke the ring.
        """
        with self._lock:
            if not self._backlog and self._push_now(data):
                return
            if len(self._backlog) < self._backlog_limit:
                self._backlog.append(bytes(data))
                return
            if timeout != 0 and self._buffers.wait_for(lambda: self._push_now(data), timeout):
                return
        raise QueueFull(
            f"queue {self.index} ({self.name}) is {self.status}: the driver has offered no buffer"
            + (f", and the backlog of {self._backlog_limit} is full" if self._backlog_limit else "")
        )

    def push_many(self, items: Iterable[Buffer]) -> int:
        """Fill the driver's next buffers with `items`, one with each, and complete them together.

        The driver is notified once. For queues without a handler; what waits in the backlog goes first.

        Returns how many were pushed: fewer than there are if the driver has no more buffers. The rest is the caller's.

        Raises:
            RequestOverflow: an item is longer than the driver's buffer. Those before it were pushed.
            ProtocolError: the driver broke the ring.
        """
        with self._lock:
            if self._backlog or self._backend is None:
                return 0
            return self._backend.push_many(self.index, items if isinstance(items, list) else list(items))

    def _push_now(self, data: Buffer) -> bool:
        return self._backend is not None and self._backend.push(self.index, data)

    def _attach(self, backend: Backend | None) -> None:
        self._earlier = self.statistics
        self._backend = backend

    def _leave_to_parent(self) -> None:
        """This process was forked: a thread that it does not have may hold the lock."""
        self._lock = threading.RLock()
        self._buffers = threading.Condition(self._lock)
        self._backlog.clear()

    def _on_buffers(self) -> None:
        """The driver has made buffers available: they go to whoever came first."""
        with self._lock:
            while self._backlog:
                try:
                    if not self._push_now(self._backlog[0]):
                        break
                except RequestOverflow as error:
                    import logging

                    from ._complaints import report

                    logger = logging.getLogger(__name__)
                    report(logger, self._misfits, "%s; it is dropped from the backlog", error)
                self._backlog.popleft()
            if not self._backlog:
                self._buffers.notify_all()

    def __repr__(self) -> str:
        return f"<queue {self.index} ({self.name}), {self.status}>"


def build(device: Device, declarations: list[Queue]) -> Iterator[tuple[Queue, list[DeviceQueue]]]:
    """The queues of `device`, in the order of their indices."""
    index = 0
    for declaration in declarations:
        count = declaration.count_for(device)
        is_array = isinstance(declaration, QueueArray)
        names = [f"{declaration.name}[{at}]" if is_array else declaration.name for at in range(count)]
        yield declaration, [DeviceQueue(name, index + at, declaration) for at, name in enumerate(names)]
        index += count
