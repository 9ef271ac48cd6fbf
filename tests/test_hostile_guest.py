"""A guest sends the devices of this package whatever it likes: it is answered as virtio says, and nothing grows."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vhost_user as vu
from raw import DEADLINE, wait_until
from specimens import NO_TYPE
from vhost_user.devices import Blk, Rng, Tmp102, blk, i2c
from vhost_user.devices.console import BACKLOG, Console, StreamConsole
from vhost_user.testing import connect

SECTORS = 64


class Chip(i2c.Target, address=0x20):
    """Registers of each kind."""

    status = i2c.Register(0x00, read_only=True)
    control = i2c.Register(0x01)
    wide = i2c.Register(0x02, width=4)


class Request(NamedTuple):
    """What a guest sends: bytes in parts, and room in parts."""

    readable: list[bytes]
    writable: list[int]

    @property
    def data(self) -> bytes:
        return b"".join(self.readable)

    @property
    def room(self) -> int:
        return sum(self.writable)


# --- What each device answers -----------------------------------------------------------------------------------------


def fills(request: Request, answer: bytes) -> None:
    """Virtio 1.3, section 5.4.6: at least one byte of each buffer that has room."""
    assert len(answer) == request.room


def has_a_disk_s_status(request: Request, answer: bytes) -> None:
    """Virtio 1.3, section 5.2.6: the last byte that the driver has room for is the status."""
    if not request.room:
        assert answer == b""
        return
    assert len(answer) == request.room
    status = answer[-1:]
    assert status in (blk.S_OK, blk.S_IOERR, blk.S_UNSUPP)
    if len(request.data) < blk.HEADER.size:
        assert status == blk.S_IOERR
        return
    kind, sector = blk.HEADER.unpack_from(request.data)
    if kind not in set(blk.Type):
        assert status == blk.S_UNSUPP
    elif kind == blk.Type.IN:
        count = request.room - 1
        assert (status == blk.S_OK) == (count % 512 == 0 and sector * 512 + count <= SECTORS * 512)
    elif kind == blk.Type.OUT:
        count = len(request.data) - blk.HEADER.size
        assert (status == blk.S_OK) == (count % 512 == 0 and sector * 512 + count <= SECTORS * 512)


def has_a_bus_s_status(request: Request, answer: bytes) -> None:
    """Virtio 1.3, section 5.21.6: the last byte that the driver has room for is the status."""
    if not request.room:
        assert answer == b""
        return
    assert len(answer) == request.room
    assert answer[-1:] in (i2c.OK, i2c.ERR)
    if len(request.data) < i2c.HEADER.size:
        assert answer[-1:] == i2c.ERR
        return
    address, _ = i2c.HEADER.unpack_from(request.data)
    if address not in (0x20 << 1, 0x48 << 1):
        assert answer[-1:] == i2c.ERR


def is_empty(_request: Request, answer: bytes) -> None:
    """Virtio 1.3, section 5.3.6: nothing is written to what the driver prints."""
    assert answer == b""


SMALL = st.integers(0, 3)
SIZES = st.sampled_from([1, 2, 3, 19, 20, 21, 511, 512, 513, 1024, 4096, 5000])
DISK_HEADERS = st.builds(
    blk.HEADER.pack,
    st.sampled_from([*blk.Type, 2, 99]) | st.integers(0, 2**32 - 1),
    st.integers(0, SECTORS + 2) | st.integers(0, 2**64 - 1),
)
RANGES = st.lists(
    st.builds(
        blk.SEGMENT.pack, st.integers(0, SECTORS + 2), st.integers(0, SECTORS + 2) | st.integers(0, 2**32 - 1), SMALL
    ),
    max_size=34,
).map(b"".join)
BUS_HEADERS = st.builds(
    i2c.HEADER.pack,
    st.sampled_from([0x40, 0x90, 0x41, 0xFF00]) | st.integers(0, 2**16 - 1),
    SMALL | st.integers(0, 2**32 - 1),
)
CONTENT = st.binary(max_size=40) | SIZES.map(bytes) | RANGES


@st.composite
def requests(draw: st.DrawFn, headers: st.SearchStrategy[bytes]) -> Request:
    data = draw(headers | st.just(b"") | st.binary(max_size=20)) + draw(CONTENT | st.just(b""))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=3)))
    parts = [data[start:end] for start, end in itertools.pairwise([0, *cuts, len(data)])]
    room = draw(st.lists(SIZES, max_size=3))
    if not data and not room:
        room = [1]
    return Request(parts, room)


class Case(NamedTuple):
    make: Callable[[], vu.Device]
    queue: int
    headers: st.SearchStrategy[bytes]
    check: Callable[[Request, bytes], None]


CASES = {
    "rng": Case(Rng, 0, st.just(b""), fills),
    "disk": Case(lambda: Blk(SECTORS * 512), 0, DISK_HEADERS, has_a_disk_s_status),
    "disk past the interpreter off": Case(lambda: Plodding(SECTORS * 512), 0, DISK_HEADERS, has_a_disk_s_status),
    "bus": Case(lambda: i2c.Adapter(Tmp102(), Chip()), 0, BUS_HEADERS, has_a_bus_s_status),
    "console": Case(Console, 1, st.just(b""), is_empty),
}


class Plodding(Blk):
    """Each request goes through Python."""

    def execute(self, request: vu.Request) -> None:
        super().execute(request)


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def driver(case: Case) -> Iterator[vu.DriverQueue]:
    with connect(case.make()) as frontend:
        queue = frontend.queues[case.queue]
        queue.timeout = DEADLINE
        yield queue


def test_every_request_is_answered_as_virtio_says(
    case: Case, driver: vu.DriverQueue, caplog: pytest.LogCaptureFixture
) -> None:
    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(requests(case.headers), min_size=1, max_size=4))
    def ask(batch: list[Request]) -> None:
        under_way = [driver.submit(request.readable, request.writable) for request in batch]
        for request, completion in zip(batch, under_way, strict=True):
            case.check(request, completion.wait())

    ask()
    # What a handler raises is about the request: nothing else is logged with a traceback.
    failures = [record.exc_info[0] for record in caplog.records if record.exc_info]
    assert all(failure is not None and issubclass(failure, vu.RequestError) for failure in failures)
    assert all(record.levelno < logging.CRITICAL for record in caplog.records)


# --- What would take for ever, or fill something ----------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, i2c.M_RD], ids=["written", "read"])
def test_an_i2c_message_of_megabytes_is_refused_at_once(flags: int) -> None:
    with connect(i2c.Adapter(Chip())) as frontend:
        queue = frontend.queues[0]
        header = i2c.HEADER.pack(0x20 << 1, flags)
        data, room = (b"", 1 << 20) if flags else (bytes(1 << 20), 0)
        answer = queue.request([header, data], [room, 1] if room else 1, timeout=DEADLINE)
        assert answer[-1:] == i2c.ERR
        assert queue.request(i2c.HEADER.pack(0x20 << 1, i2c.M_RD), [1, 1]) == b"\0" + i2c.OK


def test_the_longest_i2c_message_passes() -> None:
    class Fifo(i2c.Target, address=0x21):
        auto_increment = False
        port = i2c.Register(0x00)

    with connect(i2c.Adapter(Fifo())) as frontend:
        queue = frontend.queues[0]
        queue.timeout = DEADLINE
        written = bytes(65535 - 1) + b"\7"
        assert queue.request([i2c.HEADER.pack(0x21 << 1, 0), written], 1) == i2c.OK
        answer = queue.request(i2c.HEADER.pack(0x21 << 1, i2c.M_RD), [65535, 1])
        assert answer == b"\7" * 65535 + i2c.OK


def test_buffers_without_room_do_not_keep_a_console_from_the_rest() -> None:
    console = Console()
    with connect(console) as frontend:
        receiveq = frontend.queues[0]
        receiveq.timeout = DEADLINE
        left: list[int] = []
        # Nothing is typed yet, so that they stay.
        empty = [receiveq.submit(b"no room") for _ in range(200)]
        wait_until(lambda: console.receiveq.available == 200, "the buffers")

        def begin() -> None:
            console.loop.call_soon(lambda: left.append(console.receiveq.available))
            console._is_heard = True
            console.write(b"typed")

        console.loop.call_soon(begin)
        for completion in empty:
            assert completion.wait() == b""
        assert receiveq.request(writable=8) == b"typed"
        assert left
        assert left[0] > 0


def test_a_console_that_nobody_reads_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = os.pipe()
    before = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        frontend = stack.enter_context(connect(StreamConsole(writer)))
        transmitq = frontend.queues[1]
        transmitq.timeout = DEADLINE
        transmitq.request(bytes(4 * BACKLOG))
        for _ in range(100):
            # Prints nothing; then something.
            transmitq.request(writable=1)
            transmitq.request(b"x")
    assert 1 <= caplog.text.count("nobody reads") <= 21 + time.monotonic() - before


def test_buffers_that_are_too_small_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    class Cable(vu.Device, device_id=NO_TYPE):
        receiveq = vu.Queue(backlog=3)
        transmitq = vu.Queue()

        @transmitq.handler
        def send(self, request: vu.Request) -> None:
            self.receiveq.push(request.read())

    before = time.monotonic()
    cable = Cable()
    with connect(cable, start=False) as frontend:
        transmitq = frontend.queue(1)
        transmitq.timeout = DEADLINE
        for _ in range(40):
            for _ in range(3):
                transmitq.request(b"too long")
            receiveq = frontend.queue(0)
            receiveq.submit(writable=1)
            wait_until(lambda: not cable.receiveq._backlog, "the device looks at the buffer")
            receiveq.stop()
    assert 3 <= caplog.text.count("it is dropped from the backlog") <= 21 + time.monotonic() - before
