"""A peer's descriptor that a device's state goes through.

vhost-user specification, "Migrating back-end state".
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import select
import socket
import stat
from typing import TYPE_CHECKING

from .errors import PeerTimeout, StateError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

#: How much is moved at once.
CHUNK = 1 << 16


class StateStream(io.RawIOBase):
    """Reads from `fd`, or `writes` to it, and owns it from now on; a file is used from where it is.

    Whoever waits for the peer ends when `cancelled` can be read, or after `timeout` seconds without a byte. What the
    peer does to flags that it shares does not matter.

    Raises:
        StateError: the descriptor is of a kind, or opened in a way, that cannot be used for this.
        OSError: nobody is at its other end.
    """

    def __init__(self, fd: int, writes: bool, *, cancelled: int | None = None, timeout: float | None = None) -> None:
        self._writes = writes
        self._cancelled = cancelled
        self._timeout = timeout
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
            elif stat.S_ISREG(kind):
                # Never waits, and opened again it would begin at its beginning.
                self._fd = os.dup(fd)
            elif stat.S_ISFIFO(kind):
                self._fd = _without_blocking(fd, writes)
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
        if self._cancelled is not None:
            poll.register(self._cancelled, select.POLLIN)
        ready = dict(poll.poll(None if self._timeout is None else self._timeout * 1000))
        if self._cancelled in ready:
            raise OSError(errno.ECANCELED, "the front-end is gone, or the device was stopped")
        if not ready:
            done = "read" if self._writes else "wrote"
            raise PeerTimeout(f"the device {done} nothing of its state for {self._timeout} s")

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        if self._socket is not None:
            self._socket.close()
        elif self._fd >= 0:
            os.close(self._fd)


def _without_blocking(pipe: int, writes: bool) -> int:
    flags = (os.O_WRONLY if writes else os.O_RDONLY) | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        # Another opening of the same pipe has flags of its own.
        return os.open(f"/proc/self/fd/{pipe}", flags)
    except (PermissionError, FileNotFoundError):
        # It is another user's, or there is no /proc.
        os.set_blocking(pipe, False)
        return os.dup(pipe)
