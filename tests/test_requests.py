"""What a handler can do with a request, and what happens to requests that are not handled well."""

from __future__ import annotations

import array
import asyncio
import gc
import hashlib
import logging
import os
import re
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import vhost_user as vu
import vhost_user.testing
from raw import DEADLINE, PROTOCOL_FEATURES, VERSION_1, Chain, FrontEnd, Id, Memory, Ring, wait_until
from specimens import NO_TYPE, Connect, Hold, Reverse, Serve


@dataclass
class Driver:
    """A driver whose requests the device holds until the test completes them."""

    device: Hold
    front: FrontEnd
    ring: Ring

    def send(self, readable: list[bytes], writable: list[int]) -> tuple[vu.Request, Chain]:
        chain = self.ring.add(readable, writable)
        self.front.kick(self.ring)
        return self.device.next(), chain

    def answer(self, chain: Chain) -> bytes:
        """What the driver got."""
        [(head, length)] = self.ring.wait()
        assert head == chain.head
        return chain.written(length)


@pytest.fixture
def driver(serve: Serve, connect: Connect, memory: Memory) -> Iterator[Driver]:
    device = Hold()
    front = connect(serve(device))
    ring = start(front, memory)
    yield Driver(device, front, ring)
    device.held.clear()


def start(front: FrontEnd, memory: Memory, size: int = 64) -> Ring:
    front.negotiate(PROTOCOL_FEATURES | VERSION_1)
    front.share(memory)
    ring = Ring(memory, size=size)
    front.start(ring)
    return ring


# --- Reading ----------------------------------------------------------------------------------------------------------


def test_a_request_reads_like_a_file(driver: Driver) -> None:
    request, _ = driver.send([b"abc", b"", b"defg"], [])
    assert (request.queue, request.readable, request.writable) == (0, 7, 0)
    assert request.read(2) == b"ab"
    assert request.read(3) == b"cde"
    assert request.readable == 2
    assert request.read() == b"fg"
    assert request.read() == request.read(5) == b""
    request.complete()


def test_readinto_fills_what_there_is_room_for(driver: Driver) -> None:
    request, _ = driver.send([b"abc", b"defgh"], [])
    room = bytearray(5)
    assert request.readinto(room) == 5
    assert room == b"abcde"
    numbers = array.array("H", [0, 0])
    assert request.readinto(numbers) == 3
    assert numbers.tobytes() == b"fgh\0"
    assert request.readinto(bytearray()) == 0
    request.complete()


def test_readinto_needs_a_buffer_that_can_be_written(driver: Driver) -> None:
    request, _ = driver.send([b"abc"], [])
    with pytest.raises(ValueError, match="writable"):
        request.readinto(bytes(3))
    with pytest.raises(ValueError, match="contiguous"):
        request.readinto(memoryview(bytearray(6))[::2])
    assert request.readable == 3
    request.complete()


def test_unpack_reads_a_structure(driver: Driver) -> None:
    request, _ = driver.send([b"\x01\x02", b"\x03\x04\x05\x06\x07"], [])
    assert request.unpack("<HI") == (0x0201, 0x06050403)
    assert request.unpack(struct.Struct("B")) == (7,)
    request.complete()


def test_what_was_unpacked_stays_as_it_is_when_more_is_unpacked(driver: Driver) -> None:
    form = struct.Struct("<B2s")
    request, _ = driver.send([b"\1ab\2cd\3ef\4gh\5ij"], [])
    first = request.unpack(form)
    places = {first: 1}
    second, third = request.unpack(form), request.unpack(form)
    assert (first, second, third) == ((1, b"ab"), (2, b"cd"), (3, b"ef"))
    assert hash(request.unpack(form)) == hash((4, b"gh"))
    assert hash(request.unpack(form)) == hash((5, b"ij"))
    assert places == {(1, b"ab"): 1}
    request.complete()


def test_what_is_not_there_cannot_be_unpacked_or_skipped(driver: Driver) -> None:
    request, _ = driver.send([b"abc"], [])
    with pytest.raises(vu.RequestUnderflow, match="queue 0: 4 bytes are needed, 3 are left to read"):
        request.unpack("<I")
    with pytest.raises(vu.RequestUnderflow, match="cannot skip 4 of 3 bytes"):
        request.skip(4)
    assert request.read() == b"abc"
    request.complete()


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda request: request.unpack(), id="no argument"),
        pytest.param(lambda request: request.unpack("B", "B"), id="two arguments"),
        pytest.param(lambda request: request.unpack(format="B"), id="an argument by name"),
        pytest.param(lambda request: request.unpack(3), id="no format"),
        pytest.param(lambda request: request.read(1, 2), id="two sizes"),
        pytest.param(lambda request: request.read("1"), id="no size"),
        pytest.param(lambda request: request.write("text"), id="text"),
        pytest.param(lambda request: request.write_tail("text"), id="text for the tail"),
        pytest.param(lambda request: type(request).unpack(object(), "B"), id="no request"),
        pytest.param(lambda request: type(request).read(bytearray(1)), id="another reader"),
    ],
)
def test_a_wrong_argument_is_a_type_error_and_nothing_is_read_or_written(
    driver: Driver, call: Callable[[Any], object]
) -> None:
    request, _ = driver.send([b"abc"], [4])
    with pytest.raises(TypeError):
        call(request)
    assert (request.readable, request.writable) == (3, 4)


def test_calls_keep_none_of_what_they_are_given_or_return(driver: Driver) -> None:
    form, data = struct.Struct("<H"), bytes([7])
    request, _ = driver.send([bytes(4000)], [2000])
    request.unpack(form)
    before = [sys.getrefcount(each) for each in (form, data, request)]
    for _ in range(100):
        assert request.unpack(form) == (0,)
        assert request.read(2) + request.read(0) == bytes(2)
        assert request.write(data) == 1
        with pytest.raises(vu.RequestOverflow):
            request.write(bytes(5000))
    assert [sys.getrefcount(each) for each in (form, data, request)] == before


def test_skip_passes_over_bytes(driver: Driver) -> None:
    request, _ = driver.send([b"ab", b"cdef"], [])
    request.skip(3)
    assert request.read(1) == b"d"
    request.skip(2)
    assert request.readable == 0
    request.complete()


# --- Writing ----------------------------------------------------------------------------------------------------------


def test_a_request_writes_like_a_file(driver: Driver) -> None:
    request, chain = driver.send([], [2, 0, 3, 10])
    assert request.write(b"abc") == 3
    assert (request.written, request.writable) == (3, 12)
    assert request.write(bytearray(b"def")) == 3
    assert request.write(memoryview(b"ghi")) == 3
    assert request.write(array.array("B", b"jk")) == 2
    assert request.write(b"") == 0
    request.complete()
    assert driver.answer(chain) == b"abcdefghijk"


def test_what_does_not_fit_is_not_written_at_all(driver: Driver) -> None:
    request, chain = driver.send([], [4])
    for data in (b"12345", bytearray(b"12345"), array.array("I", [1, 2])):
        with pytest.raises(
            vu.RequestOverflow, match=rf"{len(memoryview(data).cast('B'))} bytes do not fit in the 4 wr"
        ):
            request.write(data)
    assert request.written == 0
    request.write(b"ok")
    request.complete()
    assert driver.answer(chain) == b"ok"


def test_the_status_goes_to_the_tail(driver: Driver) -> None:
    request, chain = driver.send([], [4, 3])
    request.write(b"ab")
    request.write_tail(b"XYZ")
    assert (request.written, request.writable) == (7, 0)
    request.complete()
    assert driver.answer(chain) == b"ab\0\0XYZ"


def test_a_tail_does_not_overwrite_what_was_written(driver: Driver) -> None:
    request, chain = driver.send([], [4])
    request.write(b"abc")
    with pytest.raises(vu.RequestOverflow):
        request.write_tail(b"XY")
    request.write_tail(b"X")
    request.complete()
    assert driver.answer(chain) == b"abcX"


# --- In place ---------------------------------------------------------------------------------------------------------


def test_buffers_show_what_is_left_where_it_is(driver: Driver, tmp_path: Path) -> None:
    request, chain = driver.send([b"abc", b"def"], [3, 5])
    request.read(1)
    readable = request.readable_buffers()
    assert [bytes(view) for view in readable] == [b"bc", b"def"]
    assert hashlib.sha256(readable[1]).digest() == hashlib.sha256(b"def").digest()
    request.write(b"x")
    writable = request.writable_buffers()
    assert [len(view) for view in writable] == [2, 5]
    (tmp_path / "file").write_bytes(b"12345")
    with open(tmp_path / "file", "rb") as file:
        request.commit(os.preadv(file.fileno(), writable, 0))
    del readable, writable
    assert (request.readable, request.written) == (5, 6)
    request.complete()
    assert driver.answer(chain) == b"x12345"


def test_readable_buffers_are_read_only(driver: Driver) -> None:
    request, _ = driver.send([b"abc"], [])
    [view] = request.readable_buffers()
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 1
    del view
    request.complete()


def test_more_than_the_room_cannot_be_committed(driver: Driver) -> None:
    request, chain = driver.send([], [4])
    with pytest.raises(vu.RequestOverflow):
        request.commit(5)
    request.commit(3)
    with pytest.raises(vu.RequestOverflow):
        request.commit(2)
    request.complete()
    assert driver.answer(chain) == bytes(3)


def test_a_buffer_that_outlives_its_request_is_safe_and_reported_with_the_line_that_took_it(
    driver: Driver, memory: Memory
) -> None:
    request, _ = driver.send([b"abc"], [4])
    [view] = request.readable_buffers()
    [room] = request.writable_buffers()
    line = sys._getframe().f_lineno - 2
    piece = view[1:]
    with pytest.warns(ResourceWarning, match="queue 0: a buffer of a completed request is still in use") as caught:
        request.complete()
    assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, line), (__file__, line + 1)]

    # The memory stays mapped, even when the front-end takes it away and leaves.
    driver.front.close()
    wait_until(lambda: not driver.device.connected, "the end of the session")
    assert bytes(view) + bytes(piece) == b"abcbc"
    room[:] = b"late"
    assert memory.read(memory.guest, memory.size).count(b"late") == 1


def test_a_buffer_that_was_let_go_of_is_not_reported(driver: Driver) -> None:
    request, _ = driver.send([b"abc"], [4])
    with request.readable_buffers()[0] as view:
        assert bytes(view) == b"abc"
    request.writable_buffers()
    request.complete()


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    return path


def test_a_file_is_copied_into_a_request(driver: Driver, file: Path) -> None:
    request, chain = driver.send([], [1, 2, 30])
    with open(file, "rb") as opened:
        assert request.copy_from_file(opened, 2, 4) == 4
        assert request.copy_from_file(opened.fileno(), 0, 2) == 2
        # Less than there is room for: the file ends.
        assert request.copy_from_file(opened, 5) == 5
        assert request.copy_from_file(opened, 100) == 0
        with pytest.raises(vu.RequestOverflow, match="23 bytes do not fit in the 22"):
            request.copy_from_file(opened, 0, 23)
    assert request.written == 11
    request.complete()
    assert driver.answer(chain) == b"23450156789"


def test_a_request_is_copied_into_a_file(driver: Driver, file: Path) -> None:
    request, _ = driver.send([b"ab", b"cdef"], [])
    with open(file, "r+b") as opened:
        assert request.copy_to_file(opened, 8, 3) == 3
        with pytest.raises(vu.RequestUnderflow, match="4 bytes are needed, 3 are left"):
            request.copy_to_file(opened, 0, 4)
        assert request.copy_to_file(opened, 0) == 3
    assert request.readable == 0
    assert file.read_bytes() == b"def34567abc"
    request.complete()


def test_a_file_that_cannot_be_used_is_an_error_of_the_system(driver: Driver, file: Path) -> None:
    request, chain = driver.send([b"abc"], [4])
    with open(file, "rb") as opened, pytest.raises(OSError, match="Bad file descriptor"):
        request.copy_to_file(opened, 0)
    with open(file, "ab") as opened, pytest.raises(OSError, match="Bad file descriptor"):
        request.copy_from_file(opened, 0)
    with pytest.raises(ValueError, match="not negative"):
        request.copy_from_file(-1, 0)
    with pytest.raises(AttributeError):
        request.copy_from_file("file", 0)  # type: ignore[arg-type]
    assert (request.readable, request.written) == (3, 0)
    request.complete()
    assert driver.answer(chain) == b""


def test_a_request_of_thousands_of_pieces_is_copied_whole(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    device = Hold()
    front = connect(serve(device))
    with Memory(1 << 22) as memory:
        ring = start(front, memory, size=4096)
        chain = ring.add([b"%07d\n" % number for number in range(2000)], [8] * 2000)
        front.kick(ring)
        request = device.next()
        with open(tmp_path / "file", "w+b") as file:
            assert request.copy_to_file(file, 0) == 16000
            assert request.copy_from_file(file, 0) == 16000
        request.complete()
        [(_, length)] = ring.wait()
        assert chain.written(length) == b"".join(b"%07d\n" % number for number in range(2000))


# --- The end of a request ---------------------------------------------------------------------------------------------


Action = Callable[[vu.Request], object]

ACTIONS: dict[str, Action] = {
    "read": lambda request: request.read(),
    "read of nothing": lambda request: request.read(0),
    "readinto": lambda request: request.readinto(bytearray(1)),
    "unpack": lambda request: request.unpack("B"),
    "skip": lambda request: request.skip(0),
    "write": lambda request: request.write(b""),
    "write of a bytearray": lambda request: request.write(bytearray()),
    "write_tail": lambda request: request.write_tail(b""),
    "commit": lambda request: request.commit(0),
    "readable_buffers": lambda request: request.readable_buffers(),
    "writable_buffers": lambda request: request.writable_buffers(),
    "copy_from_file": lambda request: request.copy_from_file(0, 0, 0),
    "copy_to_file": lambda request: request.copy_to_file(0, 0, 0),
    "detach": lambda request: request.detach(),
    "complete": lambda request: request.complete(),
}


@pytest.mark.parametrize("action", [pytest.param(action, id=name) for name, action in ACTIONS.items()])
def test_a_completed_request_is_the_driver_s_again(driver: Driver, action: Action) -> None:
    request, chain = driver.send([b"abc"], [4])
    request.complete()
    assert request.completed
    with pytest.raises(vu.RequestCompleted, match="queue 0: the request was already completed"):
        action(request)
    assert driver.answer(chain) == b""
    assert driver.ring.used_index == 1


def test_a_request_whose_driver_is_gone_is_revoked(driver: Driver) -> None:
    request, _ = driver.send([b"abc"], [4])
    # A driver that resets the device does not wait for ever for what the device holds.
    driver.front.tell(Id.RESET_DEVICE)
    assert request.completed
    for action in ACTIONS.values():
        with pytest.raises(vu.RequestRevoked, match="queue 0: the driver that made the request is gone"):
            action(request)
    assert driver.ring.used_index == 0


def test_a_request_is_completed_from_another_thread(driver: Driver) -> None:
    request, chain = driver.send([b"abc"], [4])

    def work() -> None:
        request.write(request.read()[::-1])
        request.complete()

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert driver.answer(chain) == b"cba"


def test_many_threads_complete_requests_at_once(driver: Driver) -> None:
    calls = driver.front.set_call(driver.ring)
    chains = [driver.ring.add([b"%02d" % number], [4]) for number in range(32)]
    driver.front.kick(driver.ring)
    requests = [driver.device.next() for _ in chains]

    def work(request: vu.Request) -> None:
        request.write(request.read() * 2)
        request.complete()

    workers = [threading.Thread(target=work, args=[request]) for request in requests]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    lengths = dict(driver.ring.wait(32))
    assert [chain.written(lengths[chain.head]) for chain in chains] == [b"%02d" % number * 2 for number in range(32)]
    assert calls.came()


def test_two_threads_take_each_piece_of_a_request_once(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    size = 256 << 10
    pieces = [bytes([index]) * size for index in range(64)]
    device = Hold()
    front = connect(serve(device))
    memory = front.own(Memory(32 << 20))
    request, _ = Driver(device, front, start(front, memory)).send([b"".join(pieces)], [])
    path = tmp_path / "file"

    def work() -> None:
        with path.open("wb") as file:
            for index in range(32):
                assert request.copy_to_file(file, size * index, size) == size

    worker = threading.Thread(target=work)
    worker.start()
    taken = [request.read(size) for _ in range(32)]
    worker.join()
    written = path.read_bytes()
    taken += [written[at : at + size] for at in range(0, len(written), size)]
    assert sorted(taken) == pieces
    request.complete()


def test_of_two_threads_that_complete_a_request_one_is_told(driver: Driver) -> None:
    for _ in range(20):
        request, _ = driver.send([], [1])
        barrier = threading.Barrier(2)
        failures: list[Exception] = []

        def work(request: vu.Request, barrier: threading.Barrier, failures: list[Exception]) -> None:
            barrier.wait(DEADLINE)
            try:
                request.complete()
            except vu.RequestCompleted as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=[request, barrier, failures]) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(failures) == 1
        assert len(driver.ring.wait()) == 1


def test_a_request_that_is_dropped_is_answered_with_a_warning(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    request, chain = driver.send([], [4])
    request.write(b"ab")
    del request
    gc.collect()
    assert driver.answer(chain) == b"ab"
    assert "queue 0: a request was dropped without complete(); it was answered with 2 bytes" in caplog.text
    assert driver.device.requestq.statistics.errors == 1


def test_a_request_says_what_it_is(driver: Driver) -> None:
    request, _ = driver.send([b"abc"], [4])
    assert repr(request) == "<Request on queue 0: 3 bytes left to read, 4 left to write, detached>"
    request.complete()
    assert repr(request) == "<Request on queue 0: 3 bytes left to read, 4 left to write, completed>"


# --- Handlers ---------------------------------------------------------------------------------------------------------


def test_a_handler_that_raises_is_logged_with_its_traceback_and_the_device_goes_on(
    serve: Serve, connect: Connect, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    class Clumsy(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()

        @requestq.handler
        def divide(self, request: vu.Request) -> None:
            request.write(b"%d" % (100 // request.unpack("B")[0]))

    device = Clumsy()
    front = connect(serve(device))
    ring = start(front, memory)
    assert front.exchange(ring, b"\0", 8) == b""
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.name == "vhost_user.device"
    assert record.getMessage().startswith("Clumsy: queue 0: the handler failed on <Request on queue 0")
    assert "ZeroDivisionError" in caplog.text
    assert "request.unpack" in caplog.text
    assert front.exchange(ring, b"\x05", 8) == b"20"
    assert device.requestq.statistics.errors == 1


def test_a_device_answers_for_its_failed_handler(serve: Serve, connect: Connect, memory: Memory) -> None:
    class Status(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()

        @requestq.handler
        def fail(self, request: vu.Request) -> None:
            request.write(b"half")
            raise ValueError("no")

        def on_request_error(self, request: vu.Request, error: BaseException) -> None:
            assert isinstance(error, ValueError)
            request.write_tail(b"\x01")

    front = connect(serve(Status()))
    ring = start(front, memory)
    assert front.exchange(ring, b"", 8) == b"half\0\0\0\x01"


def test_a_failing_answer_for_a_failed_handler_is_logged_too(
    serve: Serve, connect: Connect, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    class Hopeless(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()

        @requestq.handler
        def fail(self, request: vu.Request) -> None:
            raise ValueError("first")

        def on_request_error(self, request: vu.Request, error: BaseException) -> None:
            raise ValueError("second")

    front = connect(serve(Hopeless()))
    ring = start(front, memory)
    assert front.exchange(ring, b"", 8) == b""
    assert front.exchange(ring, b"", 8) == b""
    assert caplog.text.count("ValueError: first") >= 2
    assert caplog.text.count("ValueError: second") == 2


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


def test_a_flood_of_failing_requests_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    class Clumsy(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()

        @requestq.handler
        def fail(self, request: vu.Request) -> None:
            raise ValueError("not today")

        def on_request_error(self, request: vu.Request, error: BaseException) -> None:
            raise OSError("nor tomorrow")

    device = Clumsy()
    before = time.monotonic()
    with vhost_user.testing.connect(device) as frontend:
        for _ in range(1000):
            assert frontend.queues[0].request(writable=1) == b""
        assert device.requestq.statistics.errors == 1000
        lines = errors(caplog)
        assert 20 <= len(lines) <= 21 + time.monotonic() - before
        assert "ValueError: not today" in caplog.text
        assert "OSError: nor tomorrow" in caplog.text
        # Whoever fails when the flood is over is logged again, and counts the others.
        time.sleep(1.1)
        frontend.queues[0].request(writable=1)
        lines = errors(caplog)
    unsaid = sum(map(int, re.findall(r"\(and (\d+) errors before it that were not logged\)", "\n".join(lines))))
    assert len(lines) + unsaid in (2001, 2002)


def test_a_handler_may_complete_its_request_itself_and_fail_afterwards(
    serve: Serve, connect: Connect, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    class Eager(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()

        @requestq.handler
        def answer(self, request: vu.Request) -> None:
            request.write(b"done")
            request.complete()
            raise ValueError("too late")

    front = connect(serve(Eager()))
    ring = start(front, memory)
    for used in (1, 2, 3):
        assert front.exchange(ring, b"", 8) == b"done"
        assert ring.used_index == used
    # The driver has its answer before the handler fails.
    wait_until(lambda: caplog.text.count("ValueError: too late") == 3, "three failures in the log")


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_an_exception_that_means_the_end_ends_serving_after_requests_in_flight_are_done(
    memory: Memory, tmp_path: Path, end: type[BaseException]
) -> None:
    class Last(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()
        held: vu.Request | None = None

        @requestq.handler
        def work(self, request: vu.Request) -> None:
            if request.read() == b"end":
                raise end
            if self.held is None:
                self.held = request.detach()

    device = Last()
    server = device.start(tmp_path / "last.sock")
    with FrontEnd(tmp_path / "last.sock") as front:
        ring = start(front, memory)
        ring.add([b"keep"], [4])
        ring.add([b"end"], [4])
        front.kick(ring)
        wait_until(lambda: device.held, "the request is held")
        # The one that raised is answered; the device waits for the other one.
        assert len(ring.wait()) == 1
        assert server.running
        assert device.held is not None
        device.held.complete()
        assert len(ring.wait()) == 1
        with pytest.raises(end):
            server.wait(5)
    assert not server.running


def test_async_handlers_run_at_the_same_time_and_complete_in_any_order(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    class Meeting(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()

        def __init__(self) -> None:
            self.guests: dict[int, asyncio.Event] = {}

        @requestq.handler
        async def meet(self, request: vu.Request) -> None:
            """Leave when all four are there, the last one first."""
            [number] = request.unpack("B")
            self.guests[number] = asyncio.Event()
            if len(self.guests) == 4:
                self.guests[3].set()
            await self.guests[number].wait()
            request.write(bytes([number]))
            request.complete()
            if number:
                self.guests[number - 1].set()

    front = connect(serve(Meeting()))
    ring = start(front, memory)
    chains = [ring.add([bytes([number])], [1]) for number in range(4)]
    front.kick(ring)
    assert ring.wait(4) == [(chain.head, 1) for chain in reversed(chains)]
    assert [chain.written(1) for chain in chains] == [b"\0", b"\1", b"\2", b"\3"]


def test_an_async_handler_that_raises_is_logged_and_answered(
    serve: Serve, connect: Connect, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    class Clumsy(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()

        @requestq.handler
        async def fail(self, request: vu.Request) -> None:
            await asyncio.sleep(0)
            raise ValueError("not today")

        def on_request_error(self, request: vu.Request, error: BaseException) -> None:
            request.write(b"sorry")

    front = connect(serve(Clumsy()))
    ring = start(front, memory)
    assert front.exchange(ring, b"", 8) == b"sorry"
    assert front.exchange(ring, b"", 8) == b"sorry"
    assert "ValueError: not today" in caplog.text


def test_serve_async_serves_within_a_running_loop_and_ends_when_it_is_cancelled(memory: Memory, tmp_path: Path) -> None:
    path = tmp_path / "async.sock"
    threads: list[threading.Thread] = []

    class Here(Reverse, device_id=NO_TYPE):
        @Reverse.requestq.handler
        def reverse(self, request: vu.Request) -> None:
            threads.append(threading.current_thread())
            super().reverse(request)

    def use() -> bytes:
        with FrontEnd(path) as front:
            return front.exchange(start(front, memory), b"abc", 8)

    async def main() -> None:
        device = Here()
        serving = asyncio.create_task(device.serve_async(path))
        while not path.exists():
            await asyncio.sleep(0.001)
        assert await asyncio.to_thread(use) == b"cba"
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert not path.exists()

    asyncio.run(main())
    assert threads == [threading.main_thread()]


def test_serve_async_ends_when_the_device_is_stopped_from_another_thread(tmp_path: Path, level: None) -> None:
    class Brief(Reverse, device_id=NO_TYPE):
        def on_start(self) -> None:
            # To stop a device that is not served does nothing.
            self.timer = threading.Timer(0.05, self.stop)
            self.timer.start()

    async def main() -> None:
        device = Brief()
        await asyncio.wait_for(device.serve_async(tmp_path / "async.sock"), DEADLINE)
        device.timer.join()

    asyncio.run(main())


def test_stopping_waits_for_async_handlers(memory: Memory, tmp_path: Path) -> None:
    class Slow(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()

        @requestq.handler
        async def work(self, request: vu.Request) -> None:
            await asyncio.sleep(0.2)
            request.write(b"done")

    device = Slow()
    server = device.start(tmp_path / "slow.sock")
    with FrontEnd(tmp_path / "slow.sock") as front:
        ring = start(front, memory)
        chain = ring.add([], [8])
        front.kick(ring)
        wait_until(lambda: device.requestq.in_flight, "the request is being worked on")
        server.stop()
        [(_, length)] = ring.take()
        assert chain.written(length) == b"done"
