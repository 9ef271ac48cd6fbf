"""The state of a device on its way to or from a front-end, on a thread of its own."""

from __future__ import annotations

import io
import logging
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from ._complaints import report
from ._state_stream import CHUNK, StateStream
from .errors import StateError

if TYPE_CHECKING:
    from ._core import Complaints
    from .device import Device

logger = logging.getLogger("vhost_user.device")


class Transfer:
    """Saves or loads the state of `device` through `fd`, which is owned from now on; `over` is called at the end.

    A failure is logged, unless `complaints` has too many of them already.

    Raises:
        StateError: the descriptor is of a kind, or opened in a way, that cannot be used for this.
        OSError: nobody is at its other end.
    """

    def __init__(self, device: Device, saves: bool, fd: int, complaints: Complaints, over: Callable[[], None]) -> None:
        self.failure: str | None = None
        self._abandoned = False
        self._device = device
        self._saves = saves
        self._complaints = complaints
        self._over = over
        self._cancelled = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._stream = StateStream(fd, saves, cancelled=self._cancelled)
        except BaseException:
            os.close(self._cancelled)
            raise
        self._ended = threading.Event()
        #: So that nobody writes to the eventfd when it is closed.
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"vhost-user state of {device!r}", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def cancel(self) -> None:
        """Make the thread end as soon as it waits for the front-end."""
        with self._lock:
            if not self._ended.is_set():
                self._abandoned = True
                os.eventfd_write(self._cancelled, 1)

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            if self._saves:
                self._save()
            else:
                self._load()
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            name, doing = type(self._device).__name__, "saving" if self._saves else "loading"
            if self._abandoned:
                text = "%s: %s its state was given up"
                report(logger, self._complaints, text, name, doing, level=logging.WARNING)
            else:
                report(logger, self._complaints, "%s: %s its state failed", name, doing, error=error)
        finally:
            self._stream.close()
            with self._lock:
                os.close(self._cancelled)
                self._ended.set()
            self._over()

    def _save(self) -> None:
        # Not in a `with`, which would write again after a failure.
        file = io.BufferedWriter(self._stream, CHUNK)
        self._device.on_save_state(file)
        file.flush()

    def _load(self) -> None:
        file = io.BufferedReader(self._stream, CHUNK)
        self._device.on_load_state(file)
        # To the end, in any case: the front-end writes it all before it asks what became of it.
        left = 0
        while data := file.read1(CHUNK):
            left += len(data)
        if left:
            raise StateError(f"the device left {left} bytes of its state unread: its on_load_state() is another one's")
