"""A console: /dev/hvc0 in a Linux guest. Virtio 1.3, section 5.3.

    class Recorder(Console):
        def on_output(self, data: bytes) -> None:
            print(data)

    console = Recorder()
    with console.start("/tmp/console.sock"):
        console.write(b"uname -a\n")
        ...

`PtyConsole` and `SocketConsole` are for people and programs outside; `StreamConsole` is for any other descriptor.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import tty
import weakref
from collections.abc import Callable
from contextlib import ExitStack

from .. import config
from .._complaints import report
from .._core import Complaints, Request
from ..device import Device
from ..errors import ProtocolError, QueueFull, RequestRevoked
from ..ids import DeviceId
from ..loop import HasFileno, Loop, Watch
from ..queues import DeviceQueue, Queue
from ..server import Endpoint, PathLike

F_SIZE = 1 << 0

#: Bytes that are kept for a side that does not take them.
BACKLOG = 1 << 16

#: Buffers that are filled before others have their turn: a driver may offer ever more, and without room.
TURN = 64

#: Seconds for which Linux throws away what is typed, after it has set up the queue for it, and without saying so.
DEAF = 0.1

logger = logging.getLogger(__name__)


class Console(Device, device_id=DeviceId.CONSOLE):
    """A terminal of `cols` by `rows` characters: :meth:`write` types, and :meth:`on_output` gets what is printed."""

    cols = config.u16()
    rows = config.u16()
    max_nr_ports = config.u32()
    emerg_wr = config.u32()

    features = F_SIZE

    receiveq = Queue()
    transmitq = Queue()

    def __init__(self, *, cols: int = 80, rows: int = 24) -> None:
        self.cols = cols
        self.rows = rows
        self._lock = threading.Lock()
        self._typed = bytearray()
        self._is_heard = False

    def write(self, data: bytes) -> None:
        """Type `data`. From any thread.

        What the driver has no buffer for, since it is not there yet or nobody in the guest reads, is kept: up to 64
        KiB, and from one guest to the next.

        Raises:
            QueueFull: it would be more. Nothing was typed.
        """
        with self._lock:
            if len(data) > self._room:
                raise QueueFull(f"{len(self._typed)} bytes wait for a guest that does not read; {len(data)} do not fit")
            self._type(data)

    def resize(self, cols: int, rows: int) -> None:
        """Change the size of the terminal, and tell the driver. From any thread."""
        with self.config_update():
            self.cols = cols
            self.rows = rows

    def on_output(self, data: bytes) -> None:
        """The guest printed `data`. Do not linger: Linux keeps its processor busy until this returns."""

    @transmitq.handler
    def take_output(self, request: Request) -> None:
        self.on_output(request.read())

    def on_queue_start(self, queue: DeviceQueue) -> None:
        if queue is self.receiveq:
            self.loop.call_later(DEAF, self._listen)

    def on_queue_stop(self, queue: DeviceQueue) -> None:
        if queue is self.receiveq:
            self._is_heard = False

    def on_buffers(self, queue: DeviceQueue) -> None:
        with self._lock:
            self._type(b"")

    def _listen(self) -> None:
        self._is_heard = True
        self.on_buffers(self.receiveq)

    @property
    def _room(self) -> int:
        return BACKLOG - len(self._typed)

    def _type(self, data: bytes) -> None:
        """Fill as many of the driver's buffers as are needed, or there."""
        self._typed += data
        # What a driver that breaks its queue, or goes away at this very moment, does not get is for the next one.
        with contextlib.suppress(ProtocolError, RequestRevoked):
            for _ in range(TURN):
                if not self._typed or not self._is_heard or not (buffer := self.receiveq.take()):
                    return
                count = buffer.write(self._typed[: buffer.writable])
                buffer.complete()
                del self._typed[:count]
            self.loop.call_soon(lambda: self.on_buffers(self.receiveq))


class StreamConsole(Console):
    """A console with a stream at its other end: `file` is a descriptor, or has one, which becomes non-blocking.

    The last 64 KiB that the stream does not take are kept for it. While as much waits for the guest, the stream is not
    read. Whoever opened the file may close it: the console has a descriptor of its own.
    """

    def __init__(self, file: int | HasFileno | None = None, *, cols: int = 80, rows: int = 24) -> None:
        super().__init__(cols=cols, rows=rows)
        self._stream: _Stream | None = None
        self._printed = bytearray()
        self._losses = Complaints()
        if file is not None:
            self._stream = _Stream(os.dup(file if isinstance(file, int) else file.fileno()))

    def on_start(self) -> None:
        self._exchange()

    def on_stop(self) -> None:
        if self._stream is not None:
            self._stream.stop_waiting()

    def on_output(self, data: bytes) -> None:
        self._printed += data
        self._exchange()
        excess = len(self._printed) - BACKLOG
        if excess > 0:
            del self._printed[:excess]
            text = "nobody reads what the guest prints; its last %d bytes are kept"
            report(logger, self._losses, text, BACKLOG, level=logging.WARNING)

    def on_stream_end(self) -> None:
        """Whoever was at the other end of the stream is gone."""

    def on_buffers(self, queue: DeviceQueue) -> None:
        was_full = self._room <= 0
        super().on_buffers(queue)
        if was_full:
            self._exchange()

    def _exchange(self) -> None:
        """Move what can be moved now, and wait for the rest."""
        stream = self._stream
        if stream is None:
            return
        try:
            del self._printed[: stream.write(self._printed)]
            if self._room > 0:
                data = stream.read(self._room)
                with self._lock:
                    self._type(data)
        except OSError:
            self._end_stream(stream)
        else:
            stream.wait(self.loop, self._ready, read=self._room > 0, write=bool(self._printed))

    def _ready(self) -> None:
        # After the end of its input, and with nothing to tell it, only a stream that is gone is ready for something.
        if self._stream is not None and self._stream.at_end and not self._printed:
            self._end_stream(self._stream)
        else:
            self._exchange()

    def _end_stream(self, stream: _Stream) -> None:
        stream.close()
        self._stream = None
        self.on_stream_end()


class PtyConsole(StreamConsole):
    """A console in a pseudo-terminal, to be opened with screen, picocom or the like. `name` is its path."""

    def __init__(self, *, cols: int = 80, rows: int = 24) -> None:
        ours, theirs = os.openpty()
        try:
            super().__init__(ours, cols=cols, rows=rows)
        finally:
            os.close(ours)
        # It stays open, so that the terminal is there while nobody else has it open.
        weakref.finalize(self, os.close, theirs)
        # What is printed is not to come back as typed.
        tty.setraw(theirs)
        self.name = os.ttyname(theirs)


class SocketConsole(StreamConsole):
    """A console at a UNIX socket at `path`, with permissions `mode`. Clients are served one after the other.

    A client first gets the end of what was printed before it came.
    """

    def __init__(self, path: PathLike, *, mode: int = 0o600, cols: int = 80, rows: int = 24) -> None:
        super().__init__(cols=cols, rows=rows)
        self.path = path
        self.mode = mode
        self._served = ExitStack()
        self._accepting: Watch | None = None

    def on_start(self) -> None:
        listener, _, _ = self._served.enter_context(Endpoint(path=self.path, mode=self.mode).open())
        assert listener is not None
        self._listener = listener
        self.on_stream_end()

    def on_stop(self) -> None:
        if self._accepting is not None:
            self._accepting.close()
            self._accepting = None
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._served.close()

    def on_stream_end(self) -> None:
        self._accepting = self.loop.watch(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            # It has gone again.
            return
        # The others wait until this one is gone.
        if self._accepting is not None:
            self._accepting.close()
            self._accepting = None
        self._stream = _Stream(connection.detach())
        self._exchange()


class _Stream:
    """A non-blocking descriptor, and what is waited for on it."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self.at_end = False
        self._fd = fd
        self._close = weakref.finalize(self, os.close, fd)
        self._watch: Watch | None = None
        self._interest: tuple[bool, bool] | None = None

    def read(self, most: int) -> bytes:
        """What is there, which may be nothing.

        Raises:
            OSError: the stream is gone.
        """
        if self.at_end:
            return b""
        try:
            data = os.read(self._fd, most)
        except BlockingIOError:
            return b""
        self.at_end = not data
        return data

    def write(self, data: bytearray) -> int:
        """Returns how many bytes the stream took.

        Raises:
            OSError: the stream is gone.
        """
        try:
            return os.write(self._fd, data) if data else 0
        except BlockingIOError:
            return 0

    def wait(self, loop: Loop, callback: Callable[[], object], *, read: bool, write: bool) -> None:
        """Call `callback` when there is something to read or room to write. Once all was read, when it is gone."""
        interest = (read and not self.at_end, write)
        if interest == self._interest:
            return
        self.stop_waiting()
        if any(interest) or self.at_end:
            self._watch = loop.watch(self._fd, callback, read=interest[0], write=interest[1])
            self._interest = interest

    def stop_waiting(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch = None
        self._interest = None

    def close(self) -> None:
        self.stop_waiting()
        self._close()
