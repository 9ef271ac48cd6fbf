"""A recorded front-end, against a back-end of today: the same messages, and are the answers the same?

What cannot be the same is made anew: memory of the recorded size, full of zeros, eventfds and sockets. Rings are as if
they had run up to their base, and stay empty: no driver is there who would make requests.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Self

from ..errors import PeerTimeout, StateError
from ..features import UNKNOWN, DeviceType
from .assemble import Assembler, Unanswered
from .model import HEADER, NEED_REPLY, REQUESTS, Descriptor, Record
from .proxy import Source
from .rings import Memory as SharedMemory
from .rings import NotThere, Region
from .types import Types

#: Seconds in which nothing more may come after the last message.
QUIET = 0.05
#: Answers that tell how far a ring got, which is nowhere without a driver.
PROGRESS = {REQUESTS["GET_VRING_BASE"], REQUESTS["GET_VRING_BASE_SKIP_DRAIN"]}
VRING_STATE = struct.Struct("=II")
ANSWER_FLAGS = 0x5


@dataclass(frozen=True)
class Difference:
    """Where the back-end did not do as recorded."""

    number: int
    """Of the message that it is about, counted from 1."""
    recorded: Record | None
    """The answer that was recorded, if there was one."""
    came: Record | None
    """The one that came, if one did."""
    text: str

    def __str__(self) -> str:
        return f"message {self.number}: {self.text}"


@dataclass
class Outcome:
    """What a replay came to."""

    messages: int = 0
    """How many were sent."""
    answers: int = 0
    """How many answers were the recorded ones."""
    differences: list[Difference] = field(default_factory=list)


@dataclass
class _Step:
    """Something that the front-end sent, and the answer that it got."""

    sent: Record
    answer: Record | None = None


def replay(
    records: Iterable[Record],
    connect: str | os.PathLike[str],
    *,
    connection: int | None = None,
    timeout: float = 5.0,
    show: Callable[[Record], None] = lambda record: None,
    device: DeviceType | None = None,
) -> Outcome:
    """Send what the front-end of a recorded connection sent, and compare the answers.

    The next message is sent when the recorded answer came. What the back-end asks on its own channel is answered as the
    front-end did, or with success, and not compared: it is not told when to ask.

    Args:
        records: a trace.
        connect: where the back-end listens.
        connection: which connection of the trace (default: the first).
        timeout: seconds that the back-end has for an answer.
        show: gets every record of the new session.
        device: what both back-ends are, which gives names to their feature bits; by default what their answers make
            plain.

    Raises:
        StateError: the trace has no such connection.
        OSError: there is no back-end.
    """
    recorded = Types(device)
    steps, channel_answers, ended_by_back_end = _plan(map(recorded.known, records), connection)
    outcome = Outcome()
    with _Player(connect, timeout, show, channel_answers, Types(device)) as player:
        for number, step in enumerate(steps, 1):
            outcome.messages += 1
            difference = player.play(number, step)
            if difference:
                outcome.differences.append(difference)
            elif step.answer:
                outcome.answers += 1
            if player.over:
                break
        else:
            extra = player.end(len(steps), ended_by_back_end)
            outcome.differences += [extra] if extra else []
    before = next((step.answer.device for step in reversed(steps) if step.answer), UNKNOWN)
    outcome.differences = [_told_again(each, before, player.device) for each in outcome.differences]
    return outcome


def _plan(records: Iterable[Record], connection: int | None) -> tuple[list[_Step], list[Record], bool]:
    steps: list[_Step] = []
    open_steps: list[_Step] = []
    channel_answers: list[Record] = []
    ended_by_back_end = False
    for record in records:
        connection = record.connection if connection is None else connection
        if record.connection != connection:
            continue
        if record.channel == "back-end":
            if record.event == "message" and record.is_answer:
                channel_answers.append(record)
        elif record.event == "closed":
            ended_by_back_end = record.sender == "back-end"
        elif record.event in ("message", "bytes") and record.sender == "front-end":
            steps.append(_Step(record))
            if record.event == "message":
                open_steps.append(steps[-1])
        elif record.event == "message":
            # Answers come in the order of the requests, some of which have none.
            while open_steps:
                step = open_steps.pop(0)
                if step.sent.header[0] == record.header[0]:
                    step.answer = record
                    break
    if not steps:
        which = "no connection" if connection is None else f"no message of a front-end in connection {connection}"
        raise StateError(f"the trace has {which}")
    return steps, channel_answers, ended_by_back_end


class _Player:
    """The front-end's side of the new session."""

    def __init__(
        self,
        connect: str | os.PathLike[str],
        timeout: float,
        show: Callable[[Record], None],
        channel_answers: list[Record],
        types: Types,
    ) -> None:
        self.over = False
        self.device = UNKNOWN
        self._types = types
        self._timeout = timeout
        self._show = show
        self._closing = contextlib.ExitStack()
        self._rings = _Rings()
        self._unanswered = Unanswered()
        self._back_end = Assembler(1, "main", "back-end", self._unanswered)
        self._came: list[Record] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._source = Source(self._socket)
        with contextlib.ExitStack() as undo:
            undo.enter_context(self._socket)
            self._socket.settimeout(timeout)
            try:
                self._socket.connect(os.fspath(connect))
            except OSError as error:
                raise type(error)(error.errno, error.strerror, os.fspath(connect)) from None
            undo.callback(self._source.close)
            undo.callback(self._rings.close)
            self._channels = _Channels(channel_answers, show)
            undo.callback(self._channels.close)
            self._closing = undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def play(self, number: int, step: _Step) -> Difference | None:
        """Send a message, and wait for its answer if one was recorded."""
        sent = replace(step.sent, time=time.time_ns(), connection=1, latency=None)
        name = sent.decoded.name if sent.event == "message" else "bytes that are no message"
        self._show(sent)
        with contextlib.ExitStack() as ours:
            descriptors = [self._make(descriptor, sent, ours) for descriptor in sent.descriptors]
            if sent.event == "message":
                self._unanswered.asked(sent.header[0], sent.time)
                self._rings.saw(sent, descriptors)
            try:
                self._send(sent, descriptors)
            except TimeoutError:
                return self._ends(number, step, f"{name}: the back-end does not read it")
            except OSError:
                return self._ends(number, step, f"{name}: the back-end closed the connection before it")
        if step.answer is None:
            return None
        try:
            came = self._receive()
        except PeerTimeout:
            return self._ends(number, step, f"{name}: no answer within {self._timeout:g} s")
        if came is None:
            return self._ends(number, step, f"{name}: the back-end closed the connection instead of answering")
        text = _compare(name, step.answer, came)
        return Difference(number, step.answer, came, text) if text else None

    def end(self, number: int, ended_by_back_end: bool) -> Difference | None:
        """Everything was sent: does the back-end end it, or say more?"""
        try:
            came = self._receive(self._timeout if ended_by_back_end else QUIET)
        except PeerTimeout:
            text = "the back-end goes on, where it closed the connection" if ended_by_back_end else ""
            return Difference(number, None, None, text) if text else None
        if came is None:
            text = "" if ended_by_back_end else "the back-end closed the connection, where it went on"
            return Difference(number, None, None, text) if text else None
        return Difference(number, None, came, f"{came.decoded.name}: an answer came where none was recorded")

    def _ends(self, number: int, step: _Step, text: str) -> Difference:
        self.over = True
        return Difference(number, step.answer, None, text)

    def _send(self, sent: Record, descriptors: list[int]) -> None:
        # Descriptors that came with a later byte go with it again.
        starts = sorted({0, *(descriptor.offset for descriptor in sent.descriptors)})
        for start, end in zip(starts, [*starts[1:], len(sent.data)], strict=True):
            mine = [
                number
                for descriptor, number in zip(sent.descriptors, descriptors, strict=True)
                if descriptor.offset == start
            ]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", mine))] if mine else []
            count = self._socket.sendmsg([sent.data[start:end]], rights, socket.MSG_NOSIGNAL)
            if start + count < end:
                self._socket.sendall(sent.data[start + count : end])

    def _receive(self, timeout: float | None = None) -> Record | None:
        """The next message of the back-end, or None at the end of the connection.

        Raises:
            PeerTimeout: none came in time.
        """
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        while not self._came:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._socket], [], [], left)[0]:
                raise PeerTimeout("the back-end did not answer in time")
            try:
                data, numbers = self._source.read()
            except ConnectionResetError:
                return None
            if not data:
                return None
            shown = [Descriptor.of(number) for number in numbers]
            for number in numbers:
                os.close(number)
            for record in map(self._types.known, self._back_end.feed(data, shown, time.time_ns())):
                self.device = record.device
                self._show(record)
                self._came.append(record)
        return self._came.pop(0)

    def _make(self, descriptor: Descriptor, sent: Record, ours: contextlib.ExitStack) -> int:
        """A descriptor of the same kind, which is closed on our side once it was sent."""
        match descriptor.kind:
            case "eventfd":
                number = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            case "socket":
                mine, theirs = socket.socketpair()
                is_channel = sent.event == "message" and sent.header[0] == REQUESTS["SET_BACKEND_REQ_FD"]
                self._channels.add(mine, answering=is_channel)
                number = theirs.detach()
            case "pipe":
                ends = os.pipe()
                number, other = ends if descriptor.name == "read" else ends[::-1]
                self._closing.callback(os.close, other)
            case _:
                number = os.memfd_create("replayed", os.MFD_CLOEXEC)
                ours.callback(os.close, number)
                try:
                    os.truncate(number, descriptor.size or 0)
                except OSError as error:
                    raise StateError(f"memory of {descriptor.size} bytes cannot be made: {error.strerror}") from None
                return number
        ours.callback(os.close, number)
        return number


class _Rings:
    """Makes the memory of rings look as if they had run up to their base."""

    def __init__(self) -> None:
        self._memory = SharedMemory()
        self._addresses: dict[int, tuple[int, int]] = {}
        self._bases: dict[int, int] = {}

    def saw(self, record: Record, descriptors: list[int]) -> None:
        decoded = record.decoded
        if record.problem:
            return
        fields = decoded.fields
        match decoded.name:
            case "SET_MEM_TABLE":
                self._memory.close()
                self._share(fields["regions"], descriptors)
            case "ADD_MEM_REG":
                self._share([fields["region"]], descriptors)
            case "SET_VRING_ADDR":
                self._addresses[fields["index"]] = fields["used"], fields["avail"]
                self._advance(fields["index"])
            case "SET_VRING_BASE":
                self._bases[fields["index"]] = fields["num"]
                self._advance(fields["index"])

    def close(self) -> None:
        self._memory.close()

    def _share(self, regions: list[dict[str, int]], descriptors: list[int]) -> None:
        for region, descriptor in zip(regions, descriptors, strict=True):
            self._memory.regions.append(
                Region(
                    region["guest_address"],
                    region["size"],
                    region["user_address"],
                    region["file_offset"],
                    os.dup(descriptor),
                )
            )
        for index in self._addresses:
            self._advance(index)

    def _advance(self, index: int) -> None:
        base = struct.pack("<H", self._bases.get(index, 0) & 0xFFFF)
        for part in self._addresses.get(index, ()):
            with contextlib.suppress(NotThere, OSError):
                region, offset = self._memory.find(part + 2, user=True)
                os.pwrite(region.descriptor, base, offset)


class _Channels:
    """Our ends of the sockets that the back-end got: those of its requests are answered, by a thread."""

    def __init__(self, answers: list[Record], show: Callable[[Record], None]) -> None:
        self._answers = answers
        self._show = show
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def add(self, mine: socket.socket, *, answering: bool) -> None:
        self._sockets.append(mine)
        if answering:
            thread = threading.Thread(target=self._answer, args=(mine,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()

    def _answer(self, channel: socket.socket) -> None:
        assembler = Assembler(1, "back-end", "back-end", Unanswered())
        for data, numbers in _arrivals(channel):
            shown = [Descriptor.of(number) for number in numbers]
            for number in numbers:
                os.close(number)
            for record in assembler.feed(data, shown, time.time_ns()):
                self._show(record)
                if record.event == "message" and record.header[1] & NEED_REPLY:
                    with contextlib.suppress(OSError):
                        channel.sendall(self._answer_to(record.header[0]))

    def _answer_to(self, request: int) -> bytes:
        for answer in self._answers:
            if answer.header[0] == request:
                self._answers.remove(answer)
                return answer.data
        return HEADER.pack(request, ANSWER_FLAGS, 8) + bytes(8)


def _arrivals(channel: socket.socket) -> Iterator[tuple[bytes, list[int]]]:
    source = Source(channel)
    while True:
        select.select([channel], [], [])
        try:
            data, numbers = source.read()
        except (BlockingIOError, InterruptedError):
            continue
        except OSError:
            return
        if not data:
            return
        yield data, numbers


def _compare(name: str, recorded: Record, came: Record) -> str:
    """How an answer differs from the recorded one, or nothing."""
    if came.event != "message":
        return f"{name}: {came.text}"
    expected, got = recorded.header, came.header
    if got[0] != expected[0]:
        return f"{name}: the answer is one to {came.decoded.name}"
    if got[1] != expected[1]:
        return f"{name}: the answer has the flags {got[1]:#x}; recorded was {expected[1]:#x}"
    if len(came.descriptors) != len(recorded.descriptors):
        return f"{name}: the answer has {len(came.descriptors)} descriptors; recorded were {len(recorded.descriptors)}"
    ours, theirs = came.payload, recorded.payload
    if expected[0] in PROGRESS:
        ours, theirs = (payload[: VRING_STATE.size // 2] for payload in (ours, theirs))
    if ours != theirs:
        return f"{name}: the answer differs: {_differing(recorded, came)}"
    return ""


def _differing(recorded: Record, came: Record) -> str:
    """The values that differ, or the names of bits that do."""
    before, after = recorded.fields, came.fields
    if "names" in before and "names" in after:
        was, now = _bits(before), _bits(after)
        gone = [f"-{name}" for bit, name in was.items() if bit not in now]
        new = [f"+{name}" for bit, name in now.items() if bit not in was]
        return " ".join(gone + new)
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return (
        ", ".join(f"{name} is {_short(after.get(name))}, recorded was {_short(before.get(name))}" for name in names)
        or f"{len(came.payload)} bytes, recorded were {len(recorded.payload)}"
    )


def _bits(fields: dict[str, Any]) -> dict[int, str]:
    """The names of the bits that are set."""
    bits = (bit for bit in range(64) if fields["value"] >> bit & 1)
    return dict(zip(bits, fields["names"], strict=True))


def _told_again(difference: Difference, before: DeviceType, now: DeviceType) -> Difference:
    """With the names of feature bits that were not known in time; of one that is not known they are the other's."""
    recorded, came = difference.recorded, difference.came
    if recorded is None or came is None or came.event != "message":
        return difference
    recorded = replace(recorded, device=now if before is UNKNOWN else before)
    came = replace(came, device=before if now is UNKNOWN else now)
    text = _compare(recorded.decoded.name, recorded, came)
    return replace(difference, recorded=recorded, came=came, text=text)


def _short(value: object) -> str:
    text = value.hex() if isinstance(value, bytes) else "nothing" if value is None else str(value)
    return text if len(text) <= 64 else text[:64] + "..."
