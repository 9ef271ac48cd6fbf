"""What a device asks its front-end, and what that says."""

from __future__ import annotations

import os
from concurrent.futures import Future
from typing import TYPE_CHECKING

from ..errors import StateError
from ..loop import HasFileno

if TYPE_CHECKING:
    from .._core import Backend
    from ..device import Device


class Answer(Future["int | None"]):
    """What the front-end will say to something that a device asked.

    Wait for it with ``result(timeout)`` on another thread than the device's own, which has to receive it; there, use
    ``add_done_callback``, or ``await asyncio.wrap_future(answer)`` in a coroutine. It fails with ProtocolError if the
    front-end refuses, with PeerTimeout if it does not answer, and with PeerClosed if it is gone. The result is a file
    descriptor, which belongs to the caller, if that is what was asked for, and else None.
    """

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._backend = backend

    def result(self, timeout: float | None = None) -> int | None:
        if self._backend.is_this_thread and not self.done():
            raise StateError("the device's own thread cannot wait for an answer that it has to receive")
        return super().result(timeout)

    def _settle(self, descriptor: int | None, error: Exception | None) -> None:
        if not self.set_running_or_notify_cancel():
            if descriptor is not None:
                os.close(descriptor)
        elif error is None:
            self.set_result(descriptor)
        else:
            self.set_exception(error)


def ask(device: Device, request: str, payload: bytes, *files: int | HasFileno) -> Answer:
    """Ask the front-end for something, by a request of the back-end. From any thread."""
    backend = device._runtime.backend
    answer = Answer(backend)
    descriptors = [file if isinstance(file, int) else file.fileno() for file in files]
    backend.ask(request, payload, descriptors, answer._settle)
    return answer
