"""A device and its driver in one process, and what has to be in order afterwards."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TextIO

from .._core import Memory, ProtocolFeature
from ..device import Device
from ..errors import PeerClosed, ProtocolError, VhostUserError
from ..frontend import TIMEOUT, Frontend
from ..server import Server

#: Seconds in which a device has to answer what it has taken, when its test is over.
GRACE = 1.0

LEAKED = "a buffer of a completed request is still in use"
DROPPED = "a request was dropped without complete()"


class Leftovers(AssertionError):
    """Something was left over after a test: a request that nobody answered, or a buffer that nobody let go."""


@contextlib.contextmanager
def connect(
    device: Device,
    *,
    features: int | None = None,
    protocol: ProtocolFeature | None = None,
    memory: Memory | None = None,
    timeout: float = TIMEOUT,
    start: bool = True,
    negotiate: bool = True,
    iommu: bool = False,
) -> Iterator[Frontend]:
    """Serve `device` in a thread, connect to it by a socket pair, and be its driver until the end of the block.

    `features` and `protocol` are as for :meth:`Frontend.negotiate`, `memory` is shared instead of 16 MiB, and `timeout`
    is how many seconds a message or a request may take. All queues of the device are started, in the sizes that it
    declares. With ``start=False`` they are not, and with ``negotiate=False`` nothing was sent at all. With `iommu` the
    device is put behind an IOMMU, whatever its :attr:`Device.iommu` says: all that it is given are I/O addresses.

    Raises, at the end:
        Leftovers: the device has not answered a request that it has taken, dropped one, or kept a buffer of one beyond
            its completion. How the block ended otherwise comes first.
        BaseException: whatever ended the device's thread.
    """
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack:
        leftovers = stack.enter_context(_reported())
        stack.enter_context(contextlib.closing(ours))
        if iommu:
            device.iommu = True
        server = device.start(fd=theirs.detach())
        stack.callback(_stop, server)
        with Frontend(ours, timeout=timeout) as frontend:
            if negotiate:
                frontend.negotiate(features, protocol, iommu=iommu)
                if memory is not None:
                    frontend.share(memory)
                if start:
                    for queue in device.queues:
                        frontend.queue(queue.index, queue.size)
            yield frontend
            leftovers += _unanswered(device, frontend)
        _stop(server)
    if leftovers:
        raise Leftovers("\n".join(leftovers))


def _stop(server: Server) -> None:
    # Who breaks the protocol on purpose knows how the connection ended; and a device that is waited for may answer a
    # driver that has just gone.
    with contextlib.suppress(ProtocolError, PeerClosed):
        server.stop()


def _unanswered(device: Device, frontend: Frontend) -> list[str]:
    """Take the queues away from the device, and see what it has not given back."""
    if frontend.closed:
        return []
    handled = [
        queue
        for declaration in {**device._handlers, **device._batch_handlers}
        for queue in device._runtime.queues_of(declaration)
    ]
    _wait_until(lambda: not any(queue.available for queue in handled if queue.status == "running"))
    if any(queue.in_flight for queue in device.queues):
        # A device that keeps buffers for later gives them back when it is told to stop. It may never answer to that.
        stopping = threading.Thread(target=_stop_queues, args=[frontend], daemon=True)
        stopping.start()
        _wait_until(lambda: not any(queue.in_flight for queue in device.queues))
        if not any(queue.in_flight for queue in device.queues):
            # Nobody hangs up on an answer that is on its way.
            stopping.join(GRACE)
    return [
        f"queue {queue.index} ({queue.name}): {queue.in_flight} requests were taken and not completed; "
        "call complete() on what was detached, in on_queue_stop() at the latest"
        for queue in device.queues
        if queue.in_flight
    ]


def _wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + GRACE
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)


def _stop_queues(frontend: Frontend) -> None:
    for queue in frontend.queues:
        # The connection is gone, if there is something wrong.
        with contextlib.suppress(VhostUserError):
            queue.stop()


@contextlib.contextmanager
def _reported() -> Iterator[list[str]]:
    """What the core reports of requests and buffers, from whichever thread."""
    listener = _Listener()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def listen(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if LEAKED in str(message):
                listener.reports.append(f"{filename}:{lineno}: {message}")
            else:
                show(message, category, filename, lineno, file, line)

        warnings.filterwarnings("always", f".*{LEAKED}", ResourceWarning)
        warnings.showwarning = listen
        logger = logging.getLogger("vhost_user")
        logger.addHandler(listener)
        try:
            yield listener.reports
        finally:
            logger.removeHandler(listener)
            warnings.showwarning = show


class _Listener(logging.Handler):
    """Hears of requests that were dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if DROPPED in record.getMessage():
            self.reports.append(record.getMessage())
