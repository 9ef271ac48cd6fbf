"""The terminal of this process, as that of a guest."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from io import TextIOWrapper

from ..devices.console import Console
from ..loop import Watch
from ..queues import DeviceQueue

STDIN, STDOUT = 0, 1
CHUNK = 1 << 12

#: Ctrl-], so many times within so many seconds, is not for the guest: systemd-nspawn(1) has it so.
ESCAPE = 0x1D
ESCAPES = 3
ESCAPE_TIME = 1.0


class TerminalConsole(Console):
    """A console of a guest whose other end is the terminal of this process, between :meth:`use` and its end.

    Nothing is lost: while the guest does not read, nor is the terminal read, and the guest waits for a terminal that is
    slow. `on_escape` is called when somebody wants to get away, or the terminal is gone.
    """

    def __init__(self, on_escape: Callable[[], object]) -> None:
        columns, rows = os.get_terminal_size(STDIN)
        super().__init__(cols=columns, rows=rows)
        self._on_escape = on_escape
        self._reading: Watch | None = None
        self._in_use = False
        self._escapes: list[float] = []

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Every key but the escape is for the guest in the block, and so is the size of the window."""
        with _raw(), _calling(signal.SIGWINCH, lambda: self.loop.call_soon(self._follow_size)):
            self._in_use = True
            self.loop.call_soon(self._follow_size)
            self.loop.call_soon(self._read_if_there_is_room)
            try:
                yield
            finally:
                self._in_use = False

    def on_stop(self) -> None:
        self._stop_reading()

    def on_output(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(STDOUT, data) :]
            except BlockingIOError:
                # Whoever shares the terminal made it so.
                select.select([], [STDOUT], [])
            except OSError:
                self._escape()
                return

    def on_buffers(self, queue: DeviceQueue) -> None:
        super().on_buffers(queue)
        self._read_if_there_is_room()

    def _read_if_there_is_room(self) -> None:
        if self._reading is None and self._in_use and self._room >= CHUNK:
            self._reading = self.loop.watch(STDIN, self._read)

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def _read(self) -> None:
        try:
            data = os.read(STDIN, CHUNK) if self._in_use else b""
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or self._is_escape(data):
            self._escape()
        self.write(data)
        if not data or self._room < CHUNK:
            self._stop_reading()

    def _escape(self) -> None:
        if self._in_use:
            self._on_escape()

    def _is_escape(self, data: bytes) -> bool:
        now = time.monotonic()
        recent = [pressed for pressed in self._escapes if now - pressed < ESCAPE_TIME]
        self._escapes = recent + [now] * data.count(ESCAPE)
        return len(self._escapes) >= ESCAPES

    def _follow_size(self) -> None:
        columns, rows = os.get_terminal_size(STDIN)
        if (columns, rows) != (self.cols, self.rows):
            self.resize(columns, rows)


@contextlib.contextmanager
def _raw() -> Iterator[None]:
    """The terminal passes on every key, and prints what it gets as it is, until the end of the block."""
    before = termios.tcgetattr(STDIN)
    ours = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, TextIOWrapper) and stream.isatty()]
    try:
        # Not TCSADRAIN: a terminal that is stopped would keep us for ever.
        tty.setraw(STDIN, termios.TCSANOW)
        for stream in ours:
            # What devices print, and logs: the terminal does not return its carriage for them now.
            stream.reconfigure(newline="\r\n")
        yield
    finally:
        for stream in ours:
            stream.reconfigure(newline="\n")
        termios.tcsetattr(STDIN, termios.TCSANOW, before)


@contextlib.contextmanager
def _calling(number: signal.Signals, callback: Callable[[], object]) -> Iterator[None]:
    """`callback` is called at every signal of that number in the block."""
    before = signal.signal(number, lambda *_: callback() and None)
    try:
        yield
    finally:
        signal.signal(number, before)
