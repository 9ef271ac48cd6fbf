"""Devices that the tests serve, as small as they can be."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vhost_user as vu
from raw import DEADLINE, FrontEnd

#: The fixtures `serve` and `connect`.
Serve = Callable[[vu.Device], Path]
Connect = Callable[[Path], FrontEnd]

KERNEL = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])

#: For tests of postcopy. Nothing that could be installed would help.
needs_userfault = pytest.mark.skipif(
    KERNEL < (6, 6) or not os.access("/dev/userfaultfd", os.R_OK | os.W_OK),
    reason="needs a userfaultfd: Linux 6.6, and /dev/userfaultfd",
)


def is_listening(path: Path) -> bool:
    """Whether somebody listens there: between `bind` and `listen` a socket exists, and refuses whoever comes."""
    sockets = (line.split() for line in Path("/proc/net/unix").read_text().splitlines())
    return any(words[3] == "00010000" and words[-1] == str(path) for words in sockets)


#: A number that no device type has.
NO_TYPE = 0x7FFF


class Reverse(vu.Device, device_id=NO_TYPE):
    """Answers with what was sent, backwards, as far as there is room."""

    requestq = vu.Queue()

    @requestq.handler
    def reverse(self, request: vu.Request) -> None:
        request.write(request.read()[::-1][: request.writable])


class ReverseMany(vu.Device, device_id=NO_TYPE):
    """The same on four queues; the answer begins with the queue's index."""

    queues_ = vu.Queue.many(4)

    @queues_.handler
    def reverse(self, request: vu.Request) -> None:
        request.write(bytes([request.queue]) + request.read()[::-1])


class Hold(vu.Device, device_id=NO_TYPE):
    """Keeps every request until somebody else completes it."""

    requestq = vu.Queue()

    def __init__(self) -> None:
        self.held: list[vu.Request] = []
        self.arrived = threading.Semaphore(0)

    @requestq.handler
    def hold(self, request: vu.Request) -> None:
        self.held.append(request.detach())
        self.arrived.release()

    def next(self) -> vu.Request:
        """The next request that arrives."""
        assert self.arrived.acquire(timeout=DEADLINE)
        return self.held.pop(0)


class Diary(vu.Device, device_id=NO_TYPE):
    """Writes down which hooks were called, with what."""

    requestq = vu.Queue()
    otherq = vu.Queue()
    level = vu.config.u16(3, writable=True)
    serial = vu.config.u32(0x11223344)

    features = 1 << 5

    def __init__(self) -> None:
        self.entries: list[tuple[Any, ...]] = []

    @requestq.handler
    def reverse(self, request: vu.Request) -> None:
        request.write(request.read()[::-1])

    @otherq.handler
    def ignore(self, request: vu.Request) -> None:
        pass

    def on_start(self) -> None:
        self.entries.append(("start",))

    def on_stop(self) -> None:
        self.entries.append(("stop",))

    def on_connect(self) -> None:
        self.entries.append(("connect",))

    def on_disconnect(self, error: Exception | None) -> None:
        self.entries.append(("disconnect", error))

    def on_features(self, features: int) -> None:
        self.entries.append(("features", features))

    def on_queue_start(self, queue: vu.DeviceQueue) -> None:
        self.entries.append(("queue_start", queue.index))

    def on_queue_stop(self, queue: vu.DeviceQueue) -> None:
        self.entries.append(("queue_stop", queue.index))

    def on_config_write(self, field: vu.config.Field[Any], old: Any, new: Any) -> None:
        self.entries.append(("config_write", field.name, old, new))

    def on_reset(self) -> None:
        self.entries.append(("reset",))

    def on_queue_error(self, queue: vu.DeviceQueue, error: str) -> None:
        self.entries.append(("queue_error", queue.index, error))
