"""Between front-ends and a back-end: every byte and every descriptor goes on as it came.

Messages are looked at on their way, and never needed to be good ones. The one thing that is not as it came is the
socket of SET_BACKEND_REQ_FD: the back-end gets one of ours, so that what it asks the front-end is seen too.
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from ..features import DeviceType
from ..server import Endpoint, PathLike
from .assemble import Assembler, Unanswered
from .model import HEADER, REQUESTS, Channel, Descriptor, Party, Record, is_unix_stream
from .rings import Follower
from .types import Types

logger = logging.getLogger(__name__)

#: Bytes that are taken from a socket at once.
CHUNK = 1 << 16
#: The kernel lets no more descriptors through at once (SCM_MAX_FD).
MAX_DESCRIPTORS = 253
SET_BACKEND_REQ_FD = REQUESTS["SET_BACKEND_REQ_FD"]

Sink = Callable[[Record], None]


class Clock:
    """Nanoseconds since 1970 that never go back."""

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.monotonic_ns()

    def __call__(self) -> int:
        return self._offset + time.monotonic_ns()


class Proxy:
    """Listens at `listen`, connects to `connect` for every front-end that comes, and tells `sink` what they say.

    Args:
        listen: where front-ends connect.
        connect: where the back-end listens.
        sink: gets every record, on the thread that runs the proxy.
        channel: also look at the channel on which the back-end asks.
        ring: also follow the rings, through the memory that the front-end shares. Nothing is ever written to it.
        once: end when the first front-end is gone.
        device: what the back-end is, which gives names to its feature bits; by default what its answers make plain.

    Raises:
        AddressInUse: somebody else listens at `listen`, or it is not a socket.
        OSError: `listen` cannot be bound.
    """

    def __init__(
        self,
        listen: PathLike,
        connect: PathLike,
        sink: Sink,
        *,
        channel: bool = True,
        ring: bool = False,
        once: bool = False,
        device: DeviceType | None = None,
    ) -> None:
        self.connect = connect
        self._sink = sink
        self._types = Types(device)
        self.channel = channel
        self.ring = ring
        self.once = once
        self.clock = Clock()
        self.selector = selectors.DefaultSelector()
        self.failures = 0
        """Front-ends that were turned away, since there was no back-end."""
        self._sessions: list[Session] = []
        self._count = 0
        self._stopping = False
        self._closing = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            undo.callback(self.selector.close)
            listener, _, _ = undo.enter_context(Endpoint(path=listen).open())
            assert listener is not None
            self._wake_up, wakes_up = socket.socketpair()
            for end in (self._wake_up, wakes_up):
                undo.enter_context(end)
            wakes_up.setblocking(False)
            self._wake_up.setblocking(False)
            self._listener = listener
            self.selector.register(wakes_up, selectors.EVENT_READ, self._woken)
            self.selector.register(listener, selectors.EVENT_READ, self._accept)
            self._closing = undo.pop_all()

    def sink(self, record: Record) -> None:
        """Tell of a record."""
        self._sink(self._types.known(record))

    def run(self) -> None:
        """Forward until `stop`, or, with `once`, until the first front-end is gone."""
        while not self._stopping:
            pauses = [session.follower.pause for session in self._sessions if session.follower]
            pause = min((pause for pause in pauses if pause is not None), default=None)
            for key, _ in self.selector.select(pause):
                key.data()
            for session in list(self._sessions):
                session.look_at_rings()
                if session.over:
                    self._sessions.remove(session)
                    self._stopping |= self.once

    @property
    def front_ends(self) -> int:
        """How many are connected."""
        return len(self._sessions)

    def stop(self) -> None:
        """End `run`. From any thread, or a signal handler."""
        self._stopping = True
        with contextlib.suppress(OSError):
            self._wake_up.send(b"!")

    def close(self) -> None:
        """Let go of everything: front-ends and back-ends see the end of their connections."""
        for session in self._sessions:
            session.close(None)
        self._sessions.clear()
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _woken(self) -> None:
        self._stopping = True

    def _accept(self) -> None:
        try:
            front_end, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            logger.warning("a front-end could not be accepted: %s", error)
            return
        self._count += 1
        with contextlib.ExitStack() as undo:
            undo.enter_context(front_end)
            back_end = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            try:
                # It must not wait here for a back-end that is busy with others.
                back_end.setblocking(False)
                back_end.connect(os.fspath(self.connect))
                back_end.setblocking(True)
            except OSError as error:
                self.failures += 1
                self._stopping |= self.once
                text = f"{os.fspath(self.connect)}: {error.strerror or error}: the front-end is turned away"
                self.sink(Record(self.clock(), self._count, "note", text=text))
                logger.error("%s; start the back-end, or choose another --connect", text)
                return
            self._sessions.append(Session(self, self._count, front_end, back_end, undo.pop_all()))


class Session:
    """One front-end and its connection to the back-end."""

    def __init__(
        self,
        proxy: Proxy,
        number: int,
        front_end: socket.socket,
        back_end: socket.socket,
        closing: contextlib.ExitStack,
    ) -> None:
        self.proxy = proxy
        self.number = number
        self.over = False
        self._pairs: list[Pair] = []
        self.follower = Follower(number, proxy.sink, proxy.clock, proxy.selector) if proxy.ring else None
        proxy.sink(Record(proxy.clock(), number, "opened"))
        self._main = Pair(self, "main", front_end, back_end, closing)
        self._pairs.append(self._main)

    def add_channel(self, front_end: socket.socket) -> int:
        """Come between the ends of a channel that the front-end offers. Returns the back-end's new end."""
        with contextlib.ExitStack() as undo:
            undo.enter_context(front_end)
            ours, theirs = socket.socketpair()
            undo.enter_context(ours)
            self._pairs.append(Pair(self, "back-end", front_end, ours, undo.pop_all()))
        return theirs.detach()

    def ended(self, pair: Pair, by: Party) -> None:
        if pair is self._main:
            self.close(by)
        elif pair in self._pairs:
            self._pairs.remove(pair)
            pair.close()
            self.proxy.sink(Record(self.proxy.clock(), self.number, "closed", "back-end", by))

    def close(self, by: Party | None) -> None:
        if self.over:
            return
        self.over = True
        self.look_at_rings(True)
        for pair in self._pairs:
            pair.close()
        if self.follower:
            self.follower.close()
        if by:
            self.proxy.sink(Record(self.proxy.clock(), self.number, "closed", "main", by))

    def look_at_rings(self, now: bool = False) -> None:
        if self.follower:
            self.follower.look(now)


class Pair:
    """The two ends of a channel, and what goes from one to the other."""

    def __init__(
        self,
        session: Session,
        channel: Channel,
        front_end: socket.socket,
        back_end: socket.socket,
        closing: contextlib.ExitStack,
    ) -> None:
        self._session = session
        self._closing = closing
        self._closed = False
        self._interests: dict[socket.socket, int] = {}
        unanswered = Unanswered()
        self._streams = [
            Stream(session, self, front_end, back_end, Assembler(session.number, channel, "front-end", unanswered)),
            Stream(session, self, back_end, front_end, Assembler(session.number, channel, "back-end", unanswered)),
        ]
        self._streams[0].followed = channel == "main"
        self._streams[0].intercepts = channel == "main" and session.proxy.channel
        self._streams[0].sender, self._streams[1].sender = "front-end", "back-end"
        self.watch()

    def watch(self) -> None:
        """Wait for what can go on: a stream reads when it has nothing to write."""
        wanted: dict[socket.socket, int] = {}
        for stream in self._streams:
            wanted.setdefault(stream.source, 0)
            wanted.setdefault(stream.sink, 0)
            if stream.has_pending:
                wanted[stream.sink] |= selectors.EVENT_WRITE
            elif not stream.ended:
                wanted[stream.source] |= selectors.EVENT_READ
        selector = self._session.proxy.selector
        for end, interest in wanted.items():
            before = self._interests.get(end, 0)
            if interest and before:
                if interest != before:
                    selector.modify(end, interest, self._ready)
            elif interest:
                selector.register(end, interest, self._ready)
            elif before:
                selector.unregister(end)
        self._interests = wanted

    def _ready(self) -> None:
        # Both ends may have been ready at once, and the first was the last.
        if self._closed:
            return
        for stream in self._streams:
            try:
                over = stream.move()
            except OSError as error:
                logger.info("connection %d: %s", self._session.number, error)
                over = True
            if over:
                by = stream.failed_at or stream.sender
                for each in self._streams:
                    each.finish()
                self._session.ended(self, by)
                return
        self.watch()

    def close(self) -> None:
        self._closed = True
        for end, interest in self._interests.items():
            if interest:
                self._session.proxy.selector.unregister(end)
        self._interests = {}
        for stream in self._streams:
            stream.close()
        self._closing.close()


class Stream:
    """One direction of a channel."""

    followed = False
    intercepts = False
    sender: Party = "front-end"

    def __init__(
        self, session: Session, pair: Pair, source: socket.socket, sink: socket.socket, assembler: Assembler
    ) -> None:
        self.source = source
        self.sink = sink
        self._reader = Source(source)
        self.ended = False
        self.failed_at: Party | None = None
        self._session = session
        self._assembler = assembler
        self._data = b""
        self._descriptors: list[int] = []
        #: Copies of memory descriptors, for those who follow the rings.
        self._kept: list[int] = []

    @property
    def has_pending(self) -> bool:
        return bool(self._data)

    def move(self) -> bool:
        """Read and write what can be. Returns whether the connection is over."""
        while True:
            if self._data and not self._send():
                return False
            if self.ended:
                # The peer may have closed one direction only.
                return hung_up(self.source) or hung_up(self.sink)
            try:
                data, numbers = self._reader.read()
            except (BlockingIOError, InterruptedError):
                return False
            except ConnectionResetError:
                data, numbers = b"", []
            if not data:
                self.ended = True
                if hung_up(self.source):
                    return True
                with contextlib.suppress(OSError):
                    self.sink.shutdown(socket.SHUT_WR)
                return False
            self._data, self._descriptors = data, numbers
            self._look()

    def finish(self) -> None:
        """The connection is over: what is left of a message is all there is."""
        for record in self._assembler.end(self._session.proxy.clock()):
            self._session.proxy.sink(record)

    def close(self) -> None:
        self._reader.close()
        for number in (*self._descriptors, *self._kept):
            os.close(number)
        self._descriptors, self._kept = [], []

    def _send(self) -> bool:
        """Write what is pending. Returns whether that was all."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self._descriptors))]
        try:
            sent = self.sink.sendmsg(
                [self._data], rights if self._descriptors else [], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
            )
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            self.failed_at = "back-end" if self.sender == "front-end" else "front-end"
            raise
        self._data = self._data[sent:]
        for number in self._descriptors:
            os.close(number)
        self._descriptors = []
        return not self._data

    def _look(self) -> None:
        """See what goes by, before it goes on."""
        session, now = self._session, self._session.proxy.clock()
        shown = [Descriptor.of(number) for number in self._descriptors]
        if session.follower and self.followed:
            self._kept += [os.dup(number) for number in self._descriptors]
        if self.intercepts and self._begins_with(SET_BACKEND_REQ_FD) and len(self._descriptors) == 1:
            (offered,) = self._descriptors
            if is_unix_stream(offered):
                self._descriptors = [session.add_channel(socket.socket(fileno=offered))]
        for record in self._assembler.feed(self._data, shown, now):
            session.proxy.sink(record)
            if session.follower:
                mine, self._kept = self._kept[: len(record.descriptors)], self._kept[len(record.descriptors) :]
                session.follower.saw(record, mine)

    def _begins_with(self, request: int) -> bool:
        whole = self._assembler.at_boundary and len(self._data) >= HEADER.size
        return whole and HEADER.unpack_from(self._data)[0] == request


class Source:
    """Reads a socket so that every byte keeps its own descriptors.

    A recvmsg hands out descriptors with bytes that were sent before them, and a peek tells of those that come later: by
    them it is known whether there are any, and then bytes are taken one by one to find theirs.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._ahead: tuple[bytes, list[int]] = (b"", [])

    def read(self) -> tuple[bytes, list[int]]:
        """What is there up to the next byte that has descriptors; those that it returns came with the first byte.

        Raises:
            BlockingIOError: nothing is there.
        """
        (data, numbers), self._ahead = self._ahead, (b"", [])
        while len(data) < CHUNK:
            try:
                there, has_descriptors = self._peek()
                if not has_descriptors:
                    return data + (self._end.recv(len(there), socket.MSG_DONTWAIT) if there else b""), numbers
                byte, came = self._take()
            except (BlockingIOError, InterruptedError, ConnectionResetError):
                if data:
                    break
                raise
            if came and data:
                self._ahead = byte, came
                break
            data, numbers = data + byte, numbers or came
        return data, numbers

    def close(self) -> None:
        """Let go of descriptors that nobody took. The socket stays open."""
        for number in self._ahead[1]:
            os.close(number)
        self._ahead = (b"", [])

    def _peek(self) -> tuple[bytes, bool]:
        """What is there, and whether descriptors come with any of it."""
        # Room for control data, but not for a single descriptor: the kernel tells that there are some, and keeps them.
        data, _, flags, _ = self._end.recvmsg(CHUNK, socket.CMSG_LEN(0), socket.MSG_PEEK | socket.MSG_DONTWAIT)
        return data, bool(flags & socket.MSG_CTRUNC)

    def _take(self) -> tuple[bytes, list[int]]:
        numbers = array.array("i")
        room = socket.CMSG_SPACE(MAX_DESCRIPTORS * numbers.itemsize)
        byte, ancillary, flags, _ = self._end.recvmsg(1, room, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
        for level, kind, rights in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers.frombytes(rights[: len(rights) - len(rights) % numbers.itemsize])
        if flags & socket.MSG_CTRUNC:
            logger.error("descriptors were lost on the way: this process has no room for more (ulimit -n)")
        return byte, list(numbers)


def hung_up(end: socket.socket) -> bool:
    """Whether the peer of a socket is gone, rather than only done with sending."""
    poll = select.poll()
    poll.register(end, 0)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))


@contextlib.contextmanager
def running(proxy: Proxy) -> Iterator[Proxy]:
    """Run a proxy in a thread of its own, for the length of a ``with`` block."""
    thread = threading.Thread(target=proxy.run, name="vhost-user trace", daemon=True)
    with proxy:
        thread.start()
        try:
            yield proxy
        finally:
            proxy.stop()
            thread.join()
