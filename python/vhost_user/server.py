"""Where a device is served: sockets that are made, found or inherited, and a device in a thread of its own."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import math
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from . import _runtime
from .errors import AddressInUse, StateError

if TYPE_CHECKING:
    from pathlib import Path

    from .device import Device

PathLike = str | os.PathLike[str]
Address = str

#: What fits in a socket address.
MAX_PATH = 107
SYSTEMD_FIRST_FD = 3
#: Seconds after which who waits for a device looks for signals, whatever else happens.
SIGNAL_PATIENCE = 0.5


class Endpoint:
    """How front ends reach the device: exactly one of a path to listen at, a descriptor, and a path to connect to."""

    def __init__(
        self,
        path: PathLike | None = None,
        fd: int | None = None,
        connect: PathLike | None = None,
        mode: int = 0o600,
    ) -> None:
        ways = [way for way in (path, fd, connect) if way is not None]
        if len(ways) > 1:
            raise StateError("choose one of a path, a descriptor, and a path to connect to")
        self.path = path
        self.fd = fd
        self.connect = connect
        self.mode = mode

    @contextlib.contextmanager
    def open(self) -> Iterator[tuple[socket.socket | None, socket.socket | None, Address]]:
        """A listening socket, or a connected one, and its name; closed and cleaned up afterwards."""
        # Takes as long to import as the rest of the package together.
        from pathlib import Path

        if self.path is not None:
            with _listening(Path(self.path), self.mode) as listener:
                yield listener, None, os.fspath(self.path)
        elif self.connect is not None:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                _with_path(connection.connect, Path(self.connect))
                yield None, connection, os.fspath(self.connect)
        else:
            fd = systemd_descriptor() if self.fd is None else self.fd
            with _inherited(fd) as inherited:
                listens = inherited.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if listens:
                    inherited.setblocking(False)
                yield (inherited, None, f"fd {fd}") if listens else (None, inherited, f"fd {fd}")


def systemd_descriptor() -> int:
    """The one socket that systemd passed to this process (sd_listen_fds(3)).

    Raises:
        StateError: none was passed, or several.
    """
    mine = os.environ.get("LISTEN_PID") == str(os.getpid())
    count = int(os.environ.get("LISTEN_FDS", "0")) if mine else 0
    if count != 1:
        raise StateError(
            "say where to serve the device: a socket path, fd=, or connect="
            if count == 0
            else f"systemd passed {count} sockets; a device needs one"
        )
    return SYSTEMD_FIRST_FD


@contextlib.contextmanager
def _inherited(fd: int) -> Iterator[socket.socket]:
    """The socket `fd`, closed afterwards. What is refused stays the caller's, and open."""
    try:
        inherited = socket.socket(fileno=fd)
    except OSError as error:
        raise StateError(f"descriptor {fd} is not a socket ({error.strerror})") from None
    if inherited.family != socket.AF_UNIX or inherited.type != socket.SOCK_STREAM:
        inherited.detach()
        raise StateError(f"descriptor {fd} is not a UNIX stream socket")
    with inherited:
        os.set_inheritable(fd, False)
        yield inherited


@contextlib.contextmanager
def _listening(path: Path, mode: int) -> Iterator[socket.socket]:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    process = os.getpid()
    with listener:
        listener.setblocking(False)
        # The kernel gives the file the permissions of the socket, so that nobody can connect before they are right.
        os.fchmod(listener.fileno(), mode)
        with _locked(path.parent):
            # Whoever waits for the socket to be there may connect at once: it gets its name when it listens.
            unfinished = path.with_name(f".{path.name}")
            if len(os.fsencode(unfinished)) > MAX_PATH:
                unfinished = path
            for each in {path, unfinished}:
                _remove_stale(each)
            _with_path(lambda _: listener.bind(os.fspath(unfinished)), path)
            os.chmod(unfinished, mode)
            ours = _identity(unfinished)
            listener.listen()
            os.rename(unfinished, path)
        try:
            yield listener
        finally:
            # A child that a handler forked has no say in it.
            with contextlib.suppress(FileNotFoundError), _locked(path.parent):
                if os.getpid() == process and _identity(path) == ours:
                    path.unlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time decides who listens in a folder."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _remove_stale(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise AddressInUse(errno.EADDRINUSE, "the file is not a socket; remove it, or choose another path", str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            _with_path(probe.connect, path)
        except ConnectionRefusedError:
            path.unlink()
            return
        except (BlockingIOError, PermissionError):
            pass
    raise AddressInUse(
        errno.EADDRINUSE, "another process is listening there; stop it, or choose another path", str(path)
    )


def _with_path(call: object, path: Path) -> None:
    """Bind or connect, with an error that names the path."""
    assert callable(call)
    length = len(os.fsencode(path))
    if length > MAX_PATH:
        raise OSError(errno.ENAMETOOLONG, f"a socket path has at most {MAX_PATH} bytes, not {length}", str(path))
    try:
        call(os.fspath(path))
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino


class Server:
    """A device that is served in a thread of its own: what :meth:`Device.start` returns.

    Leaving its ``with`` block stops it. What ended the thread unexpectedly is raised by :meth:`stop` and :meth:`wait`.
    """

    def __init__(self, device: Device, endpoint: Endpoint, once: bool) -> None:
        self.device = device
        self._endpoint = endpoint
        self._once = once
        #: A child that this process forks has no such thread.
        self._process = os.getpid()
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"vhost-user {type(device).__name__}", daemon=True)
        self._thread.start()
        try:
            self._ready.wait()
        except BaseException:
            # Ctrl-C: nobody gets this object, so nobody else can stop the device.
            self.stop()
            raise
        if self._failure or self._ended.is_set():
            self.wait()
        # A daemon thread must not be caught inside the core when the interpreter goes away.
        atexit.register(self.stop)

    @property
    def address(self) -> Address | None:
        """Where the device is served."""
        return self.device.address

    @property
    def running(self) -> bool:
        """Whether the device is still being served, by this process."""
        return os.getpid() == self._process and not self._ended.is_set()

    def stop(self) -> None:
        """Stop serving, after requests in flight are done. From any thread but the device's own.

        A handler that does not return keeps it waiting: after some seconds a warning says which.

        Raises:
            StateError: this is the device's own thread, which cannot wait for itself, but may call `Device.stop`.
            BaseException: whatever ended the thread before, if anything did.
        """
        if threading.current_thread() is self._thread:
            raise StateError("the device's own thread cannot wait for the device's end; call Device.stop() instead")
        since = time.monotonic()
        while self.running:
            self.device.stop()
            self._ended.wait(0.05)
            if time.monotonic() - since > _runtime.STOP_REMINDER and self.running:
                self.device._runtime.remind_of_handlers()
        self.wait()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the device is not served any more. Returns False if that takes more than `timeout` seconds.

        Raises:
            BaseException: whatever ended the thread, if it did not end well.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        # A signal that comes just before a wait, or on another thread, does not end it: it is looked at between two.
        while self.running and not self._ended.wait(min(SIGNAL_PATIENCE, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                return False
        # Not Thread.join(): Python 3.11 takes a thread for dead once an exception, say Ctrl-C, has ended its join().
        self._thread.join()
        atexit.unregister(self.stop)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        runtime = self.device._runtime
        try:
            if runtime.has_coroutines:
                import asyncio

                asyncio.run(runtime.serve_async(self._endpoint, self._once, self._ready.set))
            else:
                runtime.serve(self._endpoint, self._once, self._ready.set)
        except BaseException as error:
            self._failure = error
        finally:
            self._ended.set()
            self._ready.set()
