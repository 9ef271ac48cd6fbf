"""The loop of a device: descriptors and timers of its own, on the thread that runs its handlers."""

from __future__ import annotations

import time
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ._core import Backend


class HasFileno(Protocol):
    """Anything with a descriptor: a file, a socket."""

    def fileno(self) -> int: ...


class Watch:
    """A descriptor that is being watched."""

    def __init__(self, backend: Backend, fd: int, callback: Callable[[], object], *, read: bool, write: bool) -> None:
        self._backend = backend
        self._fd = fd
        current = _late_bound(callback)
        self._id: int | None = backend.watch(fd, lambda _readable, _writable: current(), read, write)

    def close(self) -> None:
        """Stop watching. Do it before the descriptor is closed."""
        if self._id is not None:
            self._backend.unwatch(self._id, self._fd)
            self._id = None


class Timer:
    """A call in the future."""

    def __init__(self, backend: Backend, delay: float, callback: Callable[[], object]) -> None:
        self._backend = backend
        self._id = backend.call_later(delay, _late_bound(callback))

    def cancel(self) -> None:
        """Forget the call. Nothing happens if it was made already."""
        self._backend.cancel(self._id)


class Loop:
    """What `Device.loop` is. An exception in a callback is logged, and the loop goes on."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def watch(
        self, file: int | HasFileno, callback: Callable[[], object], *, read: bool = True, write: bool = False
    ) -> Watch:
        """Call `callback()` whenever `file` is readable (or writable, with `write`), until the watch is closed.

        Raises:
            OSError: the descriptor is closed, watched already, or of a kind that is always ready, such as a disk file.
        """
        return Watch(self._backend, file if isinstance(file, int) else file.fileno(), callback, read=read, write=write)

    def time(self) -> float:
        """The time that `call_later` counts, in seconds: this process's monotonic clock, or that of a simulation."""
        return time.monotonic()

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        """Call `callback()` once, in `delay` seconds."""
        return Timer(self._backend, delay, callback)

    def call_soon(self, callback: Callable[[], object]) -> None:
        """Call `callback()` once, soon. From any thread."""
        self._backend.call_soon(_late_bound(callback))


def _late_bound(callback: Callable[[], object]) -> Callable[[], object]:
    """A method is looked up when it is called: until then its object may have got another class, with new code."""
    if not isinstance(callback, types.MethodType):
        return callback
    owner, name = callback.__self__, callback.__name__
    if getattr(owner, name, None) != callback:
        return callback

    def call() -> object:
        return getattr(owner, name, callback)()

    return call
