"""An entropy source. Virtio 1.3, section 5.4."""

from __future__ import annotations

import os
from collections.abc import Callable

from .._core import Request
from ..device import Device
from ..ids import DeviceId
from ..queues import Queue


class Rng(Device, device_id=DeviceId.RNG):
    """Fills the driver's buffers with what `source(count)` returns: at least one byte, and at most `count`.

    After an answer without any, Linux does not ask again.
    """

    requestq = Queue()

    def __init__(self, source: Callable[[int], bytes] = os.urandom) -> None:
        self.source = source

    @requestq.handler
    def fill(self, request: Request) -> None:
        request.write(self.source(request.writable))
