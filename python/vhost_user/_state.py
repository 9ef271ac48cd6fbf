"""The state of a device on its way to or from a front-end, on a thread of its own."""

from __future__ import annotations

import errno
import fcntl
import io
import logging
import os
import select
import socket
import stat
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from ._complaints import report
from .errors import StateError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from ._core import Complaints
    from .device import Device

logger = logging.getLogger("vhost_user.device")

CHUNK = 1 << 16


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
            self._stream = _Stream(fd, saves, self._cancelled)
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


class _Stream(io.RawIOBase):
    """The front-end's descriptor: whoever waits for it can be cancelled, and its flags are left alone."""

    def __init__(self, fd: int, writes: bool, cancelled: int) -> None:
        self._writes = writes
        self._cancelled = cancelled
        self._socket: socket.socket | None = None
        # Nothing is open if this raises, and the object is closed all the same when it goes.
        self._fd = -1
        try:
            kind = os.fstat(fd).st_mode
            access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
            if access not in (os.O_RDWR, os.O_WRONLY if writes else os.O_RDONLY):
                raise StateError(f"the descriptor for the device's state cannot be {'written' if writes else 'read'}")
            if stat.S_ISSOCK(kind):
                self._socket = socket.socket(fileno=os.dup(fd))
                self._fd = self._socket.fileno()
            elif stat.S_ISFIFO(kind) or stat.S_ISREG(kind):
                # Another opening of the same file has flags of its own.
                flags = (os.O_WRONLY if writes else os.O_RDONLY) | os.O_NONBLOCK | os.O_CLOEXEC
                self._fd = os.open(f"/proc/self/fd/{fd}", flags)
            else:
                raise StateError("the descriptor for the device's state is neither a pipe, a socket nor a file")
        finally:
            os.close(fd)

    def readable(self) -> bool:
        return not self._writes

    def writable(self) -> bool:
        return self._writes

    def readinto(self, buffer: WriteableBuffer) -> int:
        while True:
            self._wait(select.POLLIN)
            try:
                if self._socket is not None:
                    return self._socket.recv_into(buffer, 0, socket.MSG_DONTWAIT)
                return os.readv(self._fd, [buffer])
            except BlockingIOError:
                pass

    def write(self, data: ReadableBuffer) -> int:
        while True:
            self._wait(select.POLLOUT)
            try:
                if self._socket is not None:
                    return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                return os.write(self._fd, data)
            except BlockingIOError:
                pass

    def _wait(self, what: int) -> None:
        poll = select.poll()
        poll.register(self._fd, what)
        poll.register(self._cancelled, select.POLLIN)
        ready = dict(poll.poll())
        if self._cancelled in ready:
            raise OSError(errno.ECANCELED, "the front-end is gone, or the device was stopped")

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        if self._socket is not None:
            self._socket.close()
        elif self._fd >= 0:
            os.close(self._fd)
