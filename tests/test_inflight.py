"""The in-flight record: what a device had begun is found by the one after it. Looked at from outside, byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import mmap
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vhost_user as vu
from raw import (
    MQ,
    NEED_REPLY,
    PROTOCOL_FEATURES,
    REPLY,
    REPLY_ACK,
    RESET_DEVICE,
    VERSION_1,
    FrontEnd,
    Id,
    Memory,
    Ring,
    u64,
    vring_state,
    wait_until,
)
from specimens import Connect, Hold, Reverse, Serve

INFLIGHT_SHMFD = 1 << 12
GET_VRING_BASE_INFLIGHT = 1 << 20
GET_VRING_BASE_SKIP_DRAIN = 1 << 23
PROTOCOL = REPLY_ACK | MQ | RESET_DEVICE | INFLIGHT_SHMFD | GET_VRING_BASE_INFLIGHT | GET_VRING_BASE_SKIP_DRAIN

GET_INFLIGHT_FD = 31
SET_INFLIGHT_FD = 32
SKIP_DRAIN = 45

SIZE = 16
STRIDE = 16 + 16 * SIZE + 48


def description(size: int = 0, offset: int = 0, queues: int = 1, queue_size: int = SIZE) -> bytes:
    return struct.pack("=QQHHI", size, offset, queues, queue_size, 0)


class Record:
    """The record of a split ring, as the specification lays it out."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.map = mmap.mmap(descriptor, 0)

    @property
    def head(self) -> tuple[int, ...]:
        """Features, version, desc_num, last_batch_head, used_idx."""
        return struct.unpack_from("=QHHHH", self.map)

    @property
    def marked(self) -> list[int]:
        """The descriptors in flight, in the order of their counters."""
        entries = [struct.unpack_from("=B5xHQ", self.map, 16 + 16 * at) for at in range(SIZE)]
        marked = [(counter, at) for at, (inflight, _, counter) in enumerate(entries) if inflight]
        return [at for _, at in sorted(marked)]

    def close(self) -> None:
        self.map.close()
        os.close(self.descriptor)


def new_record(front: FrontEnd) -> Record:
    """Have the device make one, and use it."""
    front.send(GET_INFLIGHT_FD, description())
    reply = front.receive()
    assert (reply.request, reply.flags, reply.payload) == (GET_INFLIGHT_FD, REPLY, description(STRIDE))
    [descriptor] = reply.descriptors
    record = front.own(Record(descriptor))
    use(front, record)
    return record


def use(front: FrontEnd, record: Record) -> None:
    front.send(SET_INFLIGHT_FD, description(STRIDE), [record.descriptor], flags=NEED_REPLY)
    assert front.receive().payload == u64(0)


@pytest.fixture
def hold() -> Hold:
    return Hold()


@pytest.fixture
def front(serve: Serve, connect: Connect, hold: Hold, memory: Memory) -> FrontEnd:
    """Connected to a device that holds its requests; features and memory are there."""
    return set_up(connect(serve(hold)), memory)


def set_up(front: FrontEnd, memory: Memory) -> FrontEnd:
    front.negotiate(PROTOCOL_FEATURES | VERSION_1, PROTOCOL)
    front.share(memory)
    return front


def submit(front: FrontEnd, ring: Ring, count: int) -> list[int]:
    heads = [ring.add([b"work"], [4]).head for _ in range(count)]
    front.kick(ring)
    return heads


# --- The messages -----------------------------------------------------------------------------------------------------


def test_a_record_is_a_sealed_file_of_zeros(front: FrontEnd) -> None:
    front.send(GET_INFLIGHT_FD, description())
    [descriptor] = front.receive().descriptors
    record = front.own(Record(descriptor))
    assert record.map[:] == bytes(STRIDE)
    seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    assert seals == fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def test_there_is_no_record_before_the_features_say_for_which_rings(serve: Serve, connect: Connect) -> None:
    front = connect(serve(Reverse()))
    front.send(GET_INFLIGHT_FD, description())
    assert front.is_closed()


@pytest.mark.parametrize(
    "bad",
    [
        description(STRIDE - 1),
        description(STRIDE, offset=8),
        description(STRIDE, offset=4),
        description(STRIDE, offset=(1 << 64) - 8),
        description((1 << 64) - 1, offset=1 << 12),
        description(STRIDE, queues=0),
        description(2 * STRIDE, queues=2),
        description(1 << 62, queues=0xFFFF, queue_size=0x8000),
        description(STRIDE, queue_size=0),
        description(STRIDE, queue_size=12),
        description(STRIDE, queue_size=32),
        description(1 << 32, queue_size=0xFFFF),
    ],
)
def test_a_description_that_cannot_be_is_refused_and_changes_nothing(
    front: FrontEnd, memory: Memory, bad: bytes
) -> None:
    record = new_record(front)
    front.send(SET_INFLIGHT_FD, bad, [record.descriptor], flags=NEED_REPLY)
    assert front.receive().payload != u64(0)
    front.start(Ring(memory))
    front.tell(Id.SET_OWNER)
    assert record.head == (0, 1, SIZE, 0, 0), "the record from before is in use"


def test_a_record_needs_its_file(front: FrontEnd) -> None:
    front.send(SET_INFLIGHT_FD, description(STRIDE), flags=NEED_REPLY)
    assert front.receive().payload != u64(0)
    left, right = socket.socketpair()
    with left, right:
        front.send(SET_INFLIGHT_FD, description(STRIDE), [left.fileno()], flags=NEED_REPLY)
        assert front.receive().payload != u64(0)


def test_a_record_does_not_change_under_a_running_ring(front: FrontEnd, memory: Memory) -> None:
    record = new_record(front)
    front.start(Ring(memory))
    front.send(SET_INFLIGHT_FD, description(STRIDE), [record.descriptor], flags=NEED_REPLY)
    assert front.receive().payload != u64(0)


@pytest.mark.parametrize(
    "protocol",
    [GET_VRING_BASE_INFLIGHT, GET_VRING_BASE_SKIP_DRAIN | INFLIGHT_SHMFD, GET_VRING_BASE_SKIP_DRAIN],
)
def test_features_that_need_a_record_are_refused_without_it(serve: Serve, connect: Connect, protocol: int) -> None:
    front = connect(serve(Reverse()))
    assert front.ask(Id.SET_PROTOCOL_FEATURES, u64(REPLY_ACK | protocol)) != 0
    assert front.ask(Id.SET_PROTOCOL_FEATURES, u64(PROTOCOL)) == 0


# --- What is written --------------------------------------------------------------------------------------------------


def test_the_record_says_what_the_device_has(front: FrontEnd, hold: Hold, memory: Memory) -> None:
    record = new_record(front)
    ring = Ring(memory)
    front.start(ring)
    heads = submit(front, ring, 4)
    requests = [hold.next() for _ in heads]
    assert record.marked == heads
    assert not any(request.resubmitted for request in requests)
    requests[2].complete()
    requests[0].complete()
    ring.wait(2)
    wait_until(lambda: record.marked == [heads[1], heads[3]], "the record is in step")
    assert record.head == (0, 1, SIZE, heads[0], 2)
    requests[1].complete()
    requests[3].complete()
    assert front.stop(ring) == 4
    assert (record.marked, record.head[4]) == ([], 4)


def test_the_next_device_begins_with_what_was_in_flight(
    front: FrontEnd, hold: Hold, serve: Serve, connect: Connect, memory: Memory
) -> None:
    record = new_record(front)
    ring = Ring(memory)
    front.start(ring)
    heads = submit(front, ring, 4)
    requests = [hold.next() for _ in heads]
    requests[1].complete()
    ring.wait()
    wait_until(lambda: len(record.marked) == 3, "the record is in step")
    # The first device hangs; for its driver it might as well be dead.
    other = Hold()
    second = set_up(connect(serve(other)), memory)
    use(second, record)
    # The used index: what QEMU says for a device that died.
    second.start(ring, base=1)
    found = [other.next() for _ in range(3)]
    assert all(request.resubmitted for request in found)
    assert [request.read() for request in found] == [b"work"] * 3
    [new] = submit(second, ring, 1)
    fresh = other.next()
    assert not fresh.resubmitted
    assert record.marked == [heads[0], heads[2], heads[3], new]
    for request in (*found, fresh):
        request.complete()
    assert [head for head, _ in ring.wait(4)] == [heads[0], heads[2], heads[3], new]
    assert record.marked == []
    # The first has to let go of its ring in the end.
    for request in requests:
        if not request.completed:
            request.complete()


def test_a_device_reset_forgets_what_was_in_flight(front: FrontEnd, hold: Hold, memory: Memory) -> None:
    record = new_record(front)
    ring = Ring(memory)
    front.start(ring)
    submit(front, ring, 2)
    old = [hold.next(), hold.next()]
    assert len(record.marked) == 2
    front.tell(Id.RESET_DEVICE)
    assert all(request.completed for request in old)
    ring.clear()
    front.start(ring)
    submit(front, ring, 1)
    new = hold.next()
    assert not new.resubmitted
    assert len(record.marked) == 1
    new.complete()


@pytest.mark.parametrize(
    ("at", "value", "error"),
    [
        (8, b"\x02\x00", "the in-flight record: version is 2; 0 and 1 are known"),
        (10, b"\x20\x00", "the in-flight record: desc_num is 32, the ring has 16"),
        (12, b"\x10\x00", "the in-flight record: last_batch_head is 16, the ring has 16 entries"),
        (16 + 16 * 3, b"\x09", "the in-flight record: entry 3: inflight is 9; it must be 0 or 1"),
    ],
)
def test_a_record_that_was_tampered_with_breaks_its_queue_and_says_why(
    front: FrontEnd, hold: Hold, memory: Memory, caplog: pytest.LogCaptureFixture, at: int, value: bytes, error: str
) -> None:
    record = new_record(front)
    ring = Ring(memory)
    front.start(ring)
    assert front.stop(ring) == 0
    record.map[at : at + len(value)] = value
    broken = front.set_error(ring)
    with caplog.at_level(logging.ERROR):
        front.set_kick(ring)
        assert broken.came()
        front.tell(Id.SET_OWNER)
    assert f"queue 0: {error}" in caplog.text


# --- Stopping at once -------------------------------------------------------------------------------------------------


def test_a_ring_is_suspended_at_once_and_takes_up_what_it_had_begun(
    front: FrontEnd, hold: Hold, memory: Memory
) -> None:
    record = new_record(front)
    ring = Ring(memory)
    front.start(ring)
    heads = submit(front, ring, 2)
    old = [hold.next(), hold.next()]
    assert front.get(SKIP_DRAIN, vring_state(0)) == vring_state(0, 2)
    assert record.marked == heads
    assert all(request.completed for request in old)
    with pytest.raises(vu.RequestRevoked):
        old[0].complete()
    assert ring.used_index == 0
    front.start(ring, base=2)
    again = [hold.next(), hold.next()]
    assert all(request.resubmitted for request in again)
    del old
    for request in again:
        request.complete()
    assert [head for head, _ in ring.wait(2)] == heads


@pytest.mark.parametrize("is_recorded", [False, True])
def test_only_requests_that_nobody_will_find_again_are_complained_of(
    front: FrontEnd, hold: Hold, memory: Memory, caplog: pytest.LogCaptureFixture, is_recorded: bool
) -> None:
    if is_recorded:
        new_record(front)
    ring = Ring(memory)
    front.start(ring)
    submit(front, ring, 1)
    request = hold.next()
    # As QEMU begins to stop a ring.
    assert front.ask(Id.SET_VRING_ENABLE, vring_state(0, 0)) == 0
    assert ("complete what you hold" in caplog.text) is not is_recorded
    request.complete()


@pytest.mark.parametrize("can_choose", [False, True])
def test_whoever_takes_up_requests_and_cannot_choose_when_never_waits_for_them(
    serve: Serve, connect: Connect, hold: Hold, memory: Memory, can_choose: bool
) -> None:
    front = connect(serve(hold))
    front.negotiate(PROTOCOL_FEATURES | VERSION_1, PROTOCOL if can_choose else PROTOCOL & ~GET_VRING_BASE_SKIP_DRAIN)
    front.share(memory)
    record = new_record(front)
    ring = Ring(memory)
    front.start(ring)
    heads = submit(front, ring, 2)
    held = [hold.next(), hold.next()]
    front.send(Id.GET_VRING_BASE, vring_state(0))
    if can_choose:
        assert front.is_silent()
        for request in held:
            request.complete()
    assert front.reply_to(Id.GET_VRING_BASE) == vring_state(0, 2)
    assert record.marked == ([] if can_choose else heads)
    assert ring.used_index == (2 if can_choose else 0)


def test_without_a_record_nothing_is_left_behind(front: FrontEnd, hold: Hold, memory: Memory) -> None:
    ring = Ring(memory)
    front.start(ring)
    submit(front, ring, 1)
    request = hold.next()
    front.send(SKIP_DRAIN, vring_state(0))
    assert front.is_silent()
    request.complete()
    assert front.reply_to(SKIP_DRAIN) == vring_state(0, 1)
    assert ring.used_index == 1


# --- The driver's half ------------------------------------------------------------------------------------------------

#: Makes a process that serves a device for each line that it reads; the process that served the last one was killed.
NURSERY = """
import os, sys, time
import vhost_user as vu

class Count(vu.Device, device_id=0x7FFF):
    requestq = vu.Queue()
    packed_rings = "packed" in sys.argv
    iommu = "iommu" in sys.argv

    @requestq.handler
    def count(self, request):
        number = request.read(8)
        os.write(log, number + bytes([request.resubmitted]))
        if not any(number) and not request.resubmitted:
            time.sleep(1000)
        time.sleep(number[0] % 5 / 10000)
        request.write(number * (request.writable // 8))

path, log = sys.argv[1], os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        Count().serve(path)
        os._exit(0)
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""


class Nursery:
    """Devices in processes of their own, one after the other."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.path = folder / "count.sock"
        self.iommu = "iommu" in options
        self._log = folder / "count.log"
        command = [sys.executable, "-c", NURSERY, str(self.path), str(self._log), *options]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._device: int | None = None

    def start(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._device = int(self._process.stdout.readline())

    def kill(self) -> None:
        assert self._process.stdout
        if self._device is not None:
            os.kill(self._device, signal.SIGKILL)
            assert self._process.stdout.readline() == "dead\n"
            self._device = None

    @property
    def log(self) -> list[tuple[int, bool]]:
        """Which requests the handler was given, and whether as resubmitted ones."""
        return [(number, bool(again)) for number, again in struct.iter_unpack("=QB", self._log.read_bytes())]

    def close(self) -> None:
        self.kill()
        with self._process:
            assert self._process.stdin
            self._process.stdin.close()
        self.path.unlink(missing_ok=True)


@pytest.fixture(params=[(), ("packed",)], ids=["split", "packed"])
def nursery(level: None, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Nursery]:
    with contextlib.closing(Nursery(tmp_path, *request.param)) as nursery:
        yield nursery


def patiently(nursery: Nursery, frontend: vu.Frontend | None = None) -> vu.Frontend:
    """Connect, or again, as soon as the device listens."""
    deadline = time.monotonic() + 30
    while True:
        try:
            if frontend is None:
                return vu.Frontend.connect(nursery.path, timeout=30)
            frontend.reconnect(keep_queues=True)
            return frontend
        except (FileNotFoundError, ConnectionRefusedError):
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.mark.parametrize(
    "nursery",
    [(), ("packed",), ("iommu",), ("packed", "iommu")],
    ids=["split", "packed", "split-iommu", "packed-iommu"],
    indirect=True,
)
def test_every_request_completes_once_however_often_the_device_is_killed(nursery: Nursery) -> None:
    dice = random.Random(20)
    nursery.start()
    with patiently(nursery) as frontend:
        frontend.negotiate(iommu=nursery.iommu)
        frontend.set_inflight(frontend.get_inflight(1, 64))
        queue = frontend.queue(0, 64)
        under_way: dict[int, vu.Completion] = {}
        completed: Counter[int] = Counter()
        submitted = 0

        def take_in() -> None:
            for number, completion in list(under_way.items()):
                if completion.done:
                    assert completion.data == struct.pack("=Q", number) * (1 + number % 3)
                    completed[number] += 1
                    del under_way[number]

        def begun() -> bool:
            # The device may have to ask where the request is: whoever waits answers.
            with contextlib.suppress(vu.PeerTimeout):
                under_way[0].wait(0.01)
            return bool(nursery.log)

        for life in range(40):
            # A life: it takes some requests, and dies anywhere; the first one with a request in hand.
            if life == 0:
                under_way[0] = queue.submit(struct.pack("=Q", 0), [8])
                submitted = 1
                wait_until(begun, "it has begun with the first request")
            end = time.monotonic() + dice.random() * 0.03
            while time.monotonic() < end:
                while len(under_way) < 24:
                    room = 8 * (1 + submitted % 3)
                    under_way[submitted] = queue.submit(struct.pack("=Q", submitted), [8] * (room // 8))
                    submitted += 1
                take_in()
            nursery.kill()
            nursery.start()
            patiently(nursery, frontend)
        for number, completion in under_way.items():
            assert completion.wait(30) == struct.pack("=Q", number) * (1 + number % 3)
            completed[number] += 1
        assert bool(frontend.iotlb_misses) == nursery.iommu
        frontend.close()
    assert completed == Counter(range(submitted)), "each once"
    executed = Counter(number for number, _ in nursery.log)
    assert executed.keys() == completed.keys(), "each at least once"
    afresh = Counter(number for number, again in nursery.log if not again)
    assert max(afresh.values()) == 1, "a second time only when the device is told so"
    assert executed.total() > submitted, "no device was killed with a request in hand"


def test_whoever_waits_when_the_device_dies_is_told_and_may_wait_again(nursery: Nursery) -> None:
    nursery.start()
    with patiently(nursery) as frontend:
        frontend.negotiate()
        record = frontend.get_inflight(queues=1, queue_size=256)
        assert (record.queues, record.queue_size, record.offset) == (1, 256, 0)
        assert os.fstat(record.fileno()).st_size == record.size
        frontend.set_inflight(record)
        queue = frontend.queue(0)
        nursery.kill()
        called: list[vu.Completion] = []
        completion = queue.submit(struct.pack("=Q", 7), 8)
        completion.add_done_callback(called.append)
        with pytest.raises(vu.PeerClosed, match=r"survives it: reconnect\(keep_queues=True\)"):
            completion.wait()
        assert not completion.done
        assert completion.error is None
        with pytest.raises(ConnectionRefusedError):
            frontend.reconnect(keep_queues=True)
        nursery.start()
        patiently(nursery, frontend)

        async def result() -> bytes:
            return await completion

        assert asyncio.run(result()) == completion.wait() == struct.pack("=Q", 7)
        wait_until(lambda: called == [completion], "the callback")
        assert queue.request(struct.pack("=Q", 8), 8) == struct.pack("=Q", 8)


def test_a_driver_suspends_a_queue_and_lets_it_go_on(serve: Serve, hold: Hold) -> None:
    with vu.Frontend.connect(serve(hold)) as frontend:
        frontend.negotiate()
        frontend.set_inflight(frontend.get_inflight(1))
        queue = frontend.queue(0)
        completion = queue.submit(b"work", 4)
        begun = hold.next()
        assert queue.suspend() == 1
        assert not queue.running
        assert begun.completed
        queue.start()
        request = hold.next()
        assert request.resubmitted
        request.write(b"done")
        request.complete()
        assert completion.wait() == b"done"


def test_a_record_needs_its_feature(serve: Serve) -> None:
    with vu.Frontend.connect(serve(Reverse())) as frontend:
        frontend.negotiate(protocol=vu.ProtocolFeature.REPLY_ACK)
        with pytest.raises(vu.StateError, match="GET_INFLIGHT_FD needs the protocol feature INFLIGHT_SHMFD"):
            frontend.get_inflight(1)


def test_the_page_on_reconnecting_shows_what_works(level: None, tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs/reconnecting.md").read_text()
    example = page.split("```python\n")[1].split("```")[0].replace("/run/disk.sock", str(tmp_path / "device.sock"))
    with Reverse().start(tmp_path / "device.sock"):
        names: dict[str, Any] = {"vu": vu}
        exec(example, names)
        names["frontend"].close()
    assert names["answer"] == b"krow"
