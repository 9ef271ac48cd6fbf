"""Requests that are handed over together, pushes of many, and the pace at which a driver sees what is done."""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vhost_user as vu
from raw import NO_NOTIFY, FrontEnd, Id, Memory, Ring, wait_until
from specimens import NO_TYPE, Connect, Reverse, Serve
from vhost_user.testing import connect as connect_driver


class Together(vu.Device, device_id=NO_TYPE):
    """Answers a batch with how many it is of; those that begin with "x" it leaves."""

    requestq = vu.Queue()

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.kept: list[vu.Request] = []

    @requestq.batch_handler
    def answer(self, requests: list[vu.Request]) -> list[vu.Request]:
        self.batches.append(len(requests))
        left = []
        for at, request in enumerate(requests):
            kind = request.read(1)
            if kind == b"x":
                left.append(request)
            elif kind == b"k":
                self.kept.append(request.detach())
            elif kind == b"!":
                raise ValueError("a bad batch")
            else:
                request.write(bytes([at]))
        return left

    def on_request_error(self, request: vu.Request, error: BaseException) -> None:
        request.write(b"E")


class Leaving(Together):
    answer = Together.requestq.batch_handler(Together.answer)

    @Together.requestq.handler
    def one(self, request: vu.Request) -> None:
        request.write(b"1")


def submit(front: FrontEnd, memory: Memory, kinds: bytes) -> tuple[Ring, Callable[[int], list[bytes]]]:
    """Requests that are all there when the device looks. Gives what the driver gets for so many of them."""
    front.negotiate()
    front.share(memory)
    ring = Ring(memory, size=64)
    chains = {chain.head: chain for chain in (ring.add([bytes([kind])], [8]) for kind in kinds)}
    front.start(ring)

    def answers(count: int) -> list[bytes]:
        done = dict(ring.wait(count))
        return [chain.written(done[head]) for head, chain in chains.items() if head in done]

    return ring, answers


def test_a_batch_is_what_is_available_in_the_drivers_order(serve: Serve, connect: Connect, memory: Memory) -> None:
    device = Together()
    _, answers = submit(connect(serve(device)), memory, b"abc")
    assert answers(3) == [b"\0", b"\1", b"\2"]
    assert device.batches == [3]


def test_what_a_batch_handler_returns_goes_to_the_handler(serve: Serve, connect: Connect, memory: Memory) -> None:
    _, answers = submit(connect(serve(Leaving())), memory, b"axbx")
    assert answers(4) == [b"\0", b"1", b"\2", b"1"]


def test_more_than_64_requests_are_several_batches(serve: Serve, connect: Connect, memory: Memory) -> None:
    device = Together()
    front = connect(serve(device))
    front.negotiate()
    front.share(memory)
    ring = Ring(memory, size=256)
    # The device takes more at once when it has seen that they are quick.
    for count in (64, 250):
        heads = [ring.add_pieces([(memory.allocate(1), 1, 2)]) for _ in range(count)]
        if count == 64:
            front.start(ring)
        else:
            front.kick(ring)
        assert [head for head, _ in ring.wait(count)] == heads
    assert (max(device.batches), sum(device.batches)) == (64, 314)


def test_requests_left_to_nobody_have_failed(
    serve: Serve, connect: Connect, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    _, answers = submit(connect(serve(Together())), memory, b"ax")
    assert answers(2) == [b"\0", b"E"]
    assert "the queue has no handler that takes them one by one" in caplog.text


def test_a_batch_handler_that_raises_fails_those_that_were_not_completed(
    serve: Serve, connect: Connect, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    device = Together()
    _, answers = submit(connect(serve(device)), memory, b"k!c")
    assert answers(2) == [b"E", b"E"]
    assert device.requestq.statistics.errors == 2
    assert [record.levelno for record in caplog.records].count(logging.ERROR) == 2
    device.kept.pop().complete()


def test_a_request_of_a_batch_may_be_kept_and_is_not_used_for_another(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    device = Together()
    front = connect(serve(device))
    ring, answers = submit(front, memory, b"kb")
    assert answers(1) == [b"\1"]
    ring.add([b"a"], [8])
    front.kick(ring)
    ring.wait()
    [kept] = device.kept
    assert (kept.completed, kept.written) == (False, 0)
    kept.write(b"late")
    kept.complete()
    [(_, length)] = ring.wait()
    assert length == 4


def test_a_completed_request_that_somebody_keeps_stays_completed(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    seen: list[vu.Request] = []

    class Remember(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()

        @requestq.handler
        def remember(self, request: vu.Request) -> None:
            seen.append(request)

    device = Remember()
    _, answers = submit(connect(serve(device)), memory, b"abcd")
    answers(4)
    wait_until(lambda: len(seen) == 4, "all are handled")
    assert len({id(request) for request in seen}) == 4
    assert all(request.completed for request in seen)
    with pytest.raises(vu.RequestCompleted):
        seen[0].write(b"x")
    seen.clear()


def test_a_handler_of_a_subclass_replaces_the_batch_handler_of_its_base(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    class Own(Together):
        @Together.requestq.handler
        def own(self, request: vu.Request) -> None:
            request.write(b"own")

    device = Own()
    _, answers = submit(connect(serve(device)), memory, b"a")
    assert (answers(1), device.batches) == ([b"own"], [])


def test_a_batch_handler_is_not_a_coroutine() -> None:
    with pytest.raises(vu.DeclarationError, match="cannot be an `async def`"):

        class Wrong(vu.Device, device_id=NO_TYPE):
            requestq = vu.Queue()

            @requestq.batch_handler
            async def answer(self, requests: list[vu.Request]) -> None: ...


def test_a_driver_sees_what_is_done_while_a_slow_handler_works_on_the_rest(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    go_on = threading.Event()

    class Slow(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()

        @requestq.handler
        def work(self, request: vu.Request) -> None:
            # Longer than the driver is made to wait for others.
            threading.Event().wait(0.005)
            if request.read(1) == b"z":
                go_on.wait(20)

    _, answers = submit(connect(serve(Slow())), memory, b"aaz")
    assert len(answers(2)) == 2
    go_on.set()


# --- What is done with all of a batch ---------------------------------------------------------------------------------

HEADER = struct.Struct("<HH")


class Columns(vu.Device, device_id=NO_TYPE):
    """Lets a test say what is done with a batch."""

    requestq = vu.Queue()

    def __init__(self, work: Callable[[vu.Batch], object]) -> None:
        self.work = work
        self.seen: list[object] = []

    @requestq.batch_handler
    def handle(self, batch: vu.Batch) -> None:
        try:
            self.seen.append(self.work(batch))
        except Exception as error:
            self.seen.append(error)


@pytest.fixture
def columns(serve: Serve, connect: Connect, memory: Memory) -> Callable[..., tuple[object, list[bytes]]]:
    """Let a device do something with a batch of requests, which hold such data and have room for 8 bytes. Gives what
    that returned, and what the driver gets."""

    def run(work: Callable[[vu.Batch], object], *data: bytes) -> tuple[object, list[bytes]]:
        device = Columns(work)
        front = connect(serve(device))
        front.negotiate()
        front.share(memory)
        ring = Ring(memory, size=64)
        chains = {chain.head: chain for chain in (ring.add([each], [8]) for each in data)}
        front.start(ring)
        done = dict(ring.wait(len(data)))
        return device.seen[0], [chain.written(done[head]) for head, chain in chains.items()]

    return run


Run = Callable[..., tuple[object, list[bytes]]]


def test_a_batch_is_a_list_of_requests(columns: Run) -> None:
    seen, _ = columns(lambda batch: (isinstance(batch, list), [type(each) for each in batch]), b"a", b"b")
    assert seen == (True, [vu.Request, vu.Request])


def test_a_batch_reads_from_each_request(columns: Run) -> None:
    seen, _ = columns(lambda batch: (batch.read(1), batch.read()), b"abc", b"de")
    assert seen == ([b"a", b"d"], [b"bc", b"e"])


@pytest.mark.parametrize("layout", [HEADER, "<HH", "@HH"])
def test_a_batch_unpacks_each_request_from_where_it_is(columns: Run, layout: str | struct.Struct) -> None:
    seen, _ = columns(
        lambda batch: (batch.unpack(layout), batch.unpack("<B")), HEADER.pack(1, 2) + b"\3", HEADER.pack(4, 5) + b"\6"
    )
    assert seen == ([(1, 2), (4, 5)], [(3,), (6,)])


def test_a_batch_writes_the_same_to_each_request(columns: Run) -> None:
    _, answers = columns(lambda batch: batch.write(bytearray(b"xy")), b"a", b"b")
    assert answers == [b"xy", b"xy"]


def test_a_batch_writes_to_each_request_its_own(columns: Run) -> None:
    _, answers = columns(lambda batch: batch.write([b"x", memoryview(b"yz")]), b"a", b"b")
    assert answers == [b"x", b"yz"]


@pytest.mark.parametrize(("tail", "ends"), [(b"!", b"!!"), ([b"1", b"2"], b"12")])
def test_a_batch_writes_the_last_bytes_of_each_request(columns: Run, tail: bytes | list[bytes], ends: bytes) -> None:
    _, answers = columns(lambda batch: batch.write_tail(tail), b"a", b"b")
    assert [len(answer) for answer in answers] == [8, 8]
    assert b"".join(answer[-1:] for answer in answers) == ends


@pytest.mark.parametrize("method", ["write", "write_tail"])
def test_a_list_that_has_not_one_item_for_each_request_writes_nothing(columns: Run, method: str) -> None:
    seen, answers = columns(lambda batch: getattr(batch, method)([b"x"]), b"a", b"b")
    assert isinstance(seen, ValueError)
    assert "1 items were given for 2 requests" in str(seen)
    assert answers == [b"", b""]


def test_a_part_of_a_batch_is_a_batch(columns: Run) -> None:
    _, answers = columns(
        lambda batch: vu.Batch(request for request in batch if request.read(1) == b"w").write(b"!"), b"w", b"r", b"w"
    )
    assert answers == [b"!", b"", b"!"]


def test_a_request_that_is_too_short_stops_a_batch_where_it_is(columns: Run) -> None:
    seen, _ = columns(lambda batch: batch.unpack(HEADER), b"1234", b"123")
    assert isinstance(seen, vu.RequestUnderflow)
    assert "4 bytes are needed, 3 are left" in str(seen)


def test_a_batch_with_a_completed_request_is_refused(columns: Run) -> None:
    def complete_and_write(batch: vu.Batch) -> None:
        batch[0].complete()
        batch.write(b"x")

    seen, answers = columns(complete_and_write, b"a", b"b")
    assert isinstance(seen, vu.RequestCompleted)
    assert answers == [b"", b""]


def test_what_is_no_request_is_refused(columns: Run) -> None:
    seen, _ = columns(lambda batch: vu.Batch([*batch, "x"]).read(), b"a")  # type: ignore[list-item]
    assert isinstance(seen, TypeError)


# --- Bursts -----------------------------------------------------------------------------------------------------------


class Source(vu.Device, device_id=NO_TYPE):
    rxq = vu.Queue(backlog=1)


@pytest.fixture
def source(serve: Serve, connect: Connect, memory: Memory) -> tuple[Source, FrontEnd, Ring]:
    device = Source()
    front = connect(serve(device))
    front.negotiate()
    front.share(memory)
    ring = Ring(memory, size=16)
    front.start(ring)
    # The answer to one message may come before what that starts has begun, but not the answer to the next.
    front.get_u64(Id.GET_FEATURES)
    return device, front, ring


def test_many_pushes_fill_the_buffers_that_there_are_and_call_once(source: tuple[Source, FrontEnd, Ring]) -> None:
    device, _, ring = source
    chains = [ring.add([], [4]) for _ in range(3)]
    before = device.rxq.statistics
    assert device.rxq.push_many([b"1", bytearray(b"22"), memoryview(b"333"), b"4444"]) == 3
    assert ring.wait(3) == [(chain.head, at + 1) for at, chain in enumerate(chains)]
    assert [chain.written(at + 1) for at, chain in enumerate(chains)] == [b"1", b"22", b"333"]
    after = device.rxq.statistics
    assert after.calls + after.calls_suppressed - before.calls - before.calls_suppressed == 1
    assert device.rxq.push_many(iter([b"5"])) == 0


def test_an_item_that_is_too_long_ends_a_push_of_many_and_keeps_its_buffer(
    source: tuple[Source, FrontEnd, Ring],
) -> None:
    device, _, ring = source
    first, second = ring.add([], [4]), ring.add([], [4])
    with pytest.raises(vu.RequestOverflow, match="5 bytes do not fit in the 4"):
        device.rxq.push_many([b"1", b"12345", b"2"])
    assert ring.wait() == [(first.head, 1)]
    assert device.rxq.push_many([b"2"]) == 1
    assert ring.wait() == [(second.head, 1)]


def test_a_buffer_that_is_too_short_stays_the_drivers(source: tuple[Source, FrontEnd, Ring]) -> None:
    device, _, ring = source
    ring.add([], [4])
    with pytest.raises(vu.RequestOverflow, match="5 bytes do not fit in the 4"):
        device.rxq.push_many([b"12345"])
    assert (device.rxq.available, device.rxq.in_flight) == (1, 0)
    assert device.rxq.statistics.requests == 0


def test_a_push_counts_as_a_request(source: tuple[Source, FrontEnd, Ring]) -> None:
    device, _, ring = source
    for _ in range(3):
        ring.add([b"read"], [4])
    device.rxq.push(b"1")
    device.rxq.push_many([b"22", b"333"])
    ring.wait(3)
    seen = device.rxq.statistics
    assert (seen.requests, seen.bytes_read, seen.bytes_written) == (3, 12, 6)


def test_a_chain_that_breaks_the_ring_is_told_by_the_next_push(source: tuple[Source, FrontEnd, Ring]) -> None:
    device, _, ring = source
    good = ring.add([], [4])
    ring.add_pieces([(0x10, 4, 2)])
    assert device.rxq.push_many([b"1", b"2"]) == 1
    assert ring.wait() == [(good.head, 1)]
    with pytest.raises(vu.ProtocolError, match="outside guest memory"):
        device.rxq.push(b"2")


def test_what_is_no_buffer_ends_a_push_of_many(source: tuple[Source, FrontEnd, Ring]) -> None:
    device, _, ring = source
    chain = ring.add([], [4])
    ring.add([], [4])
    with pytest.raises(TypeError):
        device.rxq.push_many([b"1", "text"])  # type: ignore[list-item]
    assert ring.wait() == [(chain.head, 1)]
    assert device.rxq.available == 1


# --- Polling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_device_that_polls_needs_no_kick_while_it_does(
    serve: Serve, connect: Connect, memory: Memory, workers: int
) -> None:
    device = Reverse()
    device.busy_poll = 1.0
    device.workers = workers
    front = connect(serve(device))
    front.negotiate()
    front.share(memory)
    ring = Ring(memory, size=16)
    front.start(ring)
    # The first ones wake it up; from then on it looks by itself.
    for _ in range(50):
        ring.add([b"ab"], [2])
        front.kick(ring)
        ring.wait()

    def needs_no_kick() -> bool:
        for _ in range(20):
            ring.add([b"ab"], [2])
            try:
                ring.wait(timeout=2)
            except AssertionError:
                # The driver took so long that the device went to sleep.
                front.kick(ring)
                ring.wait()
                return False
        return True

    assert any(needs_no_kick() for _ in range(10))


def test_a_device_that_polls_sleeps_after_a_while_and_is_woken_by_a_kick(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    device = Reverse()
    device.busy_poll = 0.001
    front = connect(serve(device))
    front.negotiate()
    front.share(memory)
    ring = Ring(memory, size=16)
    front.start(ring)
    for _ in range(3):
        ring.add([b"ab"], [2])
        wait_until(lambda: ring.used_flags & NO_NOTIFY == 0, "kicks are wanted")
        front.kick(ring)
        ring.wait()


def test_a_device_whose_requests_are_far_apart_sleeps_in_between(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    seen = []

    class Clock(Reverse):
        busy_poll = 0.02

        @Reverse.requestq.handler
        def handle(self, request: vu.Request) -> None:
            seen.append(time.thread_time())

    front = connect(serve(Clock()))
    front.negotiate()
    front.share(memory)
    ring = Ring(memory, size=16)
    front.start(ring)
    for _ in range(11):
        ring.add([b"ab"], [2])
        front.kick(ring)
        ring.wait()
        time.sleep(0.05)
    # It looked for the second one in vain: ten looks are 0.2 s of CPU time.
    assert seen[-1] - seen[0] < 0.1


@pytest.mark.parametrize("seconds", [-1.0, 1.5, float("nan")])
def test_busy_polling_is_limited(tmp_path: Path, seconds: float) -> None:
    device = Reverse()
    device.busy_poll = seconds
    with pytest.raises(ValueError, match="busy polling takes from 0 to 1 s"):
        device.serve(tmp_path / "device.sock")


# --- Formats ----------------------------------------------------------------------------------------------------------

CODES = st.tuples(st.sampled_from(["", "0", "1", "2", "7", "11"]), st.sampled_from("xcbB?hHiIlLqQsefd")).map("".join)


class Unpack(vu.Device, device_id=NO_TYPE):
    requestq = vu.Queue()

    def __init__(self) -> None:
        self.format: str | struct.Struct = ""
        self.values: tuple[object, ...] = ()
        self.left = 0

    @requestq.handler
    def unpack(self, request: vu.Request) -> None:
        self.values = request.unpack(self.format)
        self.left = request.readable


def test_every_format_is_read_as_by_the_struct_module() -> None:
    device = Unpack()
    with connect_driver(device) as driver:
        queue = driver.queues[0]

        # On a busy machine anything may take long.
        @settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
        @given(
            order=st.sampled_from(["<", ">", "!", "=", "@", ""]),
            codes=st.lists(CODES, max_size=6),
            data=st.binary(min_size=528, max_size=528),
            compiled=st.booleans(),
        )
        def check(order: str, codes: list[str], data: bytes, compiled: bool) -> None:
            text = order + "".join(codes)
            layout = struct.Struct(text)
            device.format = layout if compiled else text
            queue.request(data, 1)
            # A NaN equals nothing, but its bytes do.
            assert repr(device.values) == repr(layout.unpack_from(data))
            assert device.left == len(data) - layout.size

        check()


class Stuck(vu.Device, device_id=NO_TYPE):
    """Answers the first of two requests at once, and the second when it is let."""

    requestq = vu.Queue()
    busy_poll = 0.0

    def __init__(self) -> None:
        self.released = threading.Event()
        self.seen = 0

    @requestq.handler
    def answer(self, request: vu.Request) -> None:
        self.seen += 1
        if self.seen == 2:
            assert self.released.wait(20)


def test_a_driver_sees_what_is_done_while_the_rest_of_its_batch_is_worked_on(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    device = Stuck()
    front = connect(serve(device))
    front.negotiate()
    front.share(memory)
    ring = Ring(memory, size=16)
    heads = [ring.add([], [1]).head for _ in range(2)]
    front.start(ring)
    try:
        assert ring.wait(1) == [(heads[0], 0)]
    finally:
        device.released.set()
    assert ring.wait(1) == [(heads[1], 0)]


class Patient(vu.Device, device_id=NO_TYPE):
    """Notes how much the driver has seen at each call."""

    requestq = vu.Queue()
    busy_poll = 0.0
    batch_patience = 20.0

    def __init__(self) -> None:
        self.ring: Ring | None = None
        self.shown: list[int] = []

    @requestq.handler
    def answer(self, request: vu.Request) -> None:
        if self.ring:
            self.shown.append(self.ring.used_index)


class PatientTogether(Patient):
    @Patient.requestq.batch_handler
    def answer_all(self, batch: vu.Batch) -> None:
        if self.ring:
            self.shown.append(self.ring.used_index)


@pytest.mark.parametrize(("kind", "calls"), [(Patient, 128), (PatientTogether, 2)])
def test_a_driver_that_needs_a_batch_whole_sees_none_of_it_before(
    serve: Serve, connect: Connect, memory: Memory, kind: type[Patient], calls: int
) -> None:
    device = kind()
    front = connect(serve(device))
    front.negotiate()
    front.share(memory)
    ring = Ring(memory, size=256)
    chain = ring.add_pieces([(memory.allocate(1), 1, 2)])
    ring.offer(*[chain] * 191)
    # Twice as many are taken at once when these were quick, for a device with so much patience.
    ring.avail_index = 64
    front.start(ring)
    ring.wait(64)
    device.ring = ring
    ring.avail_index = 192
    front.kick(ring)
    ring.wait(128)
    assert device.shown == [64] * calls
