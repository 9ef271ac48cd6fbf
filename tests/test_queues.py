"""Queues that the device fills by itself, and what a queue tells about itself."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

import vhost_user as vu
from raw import DEADLINE, NO_INTERRUPT, NO_NOTIFY, FrontEnd, Id, Memory, Ring, vring_state, wait_until
from specimens import NO_TYPE, Connect, Hold, Reverse, Serve


class Source(vu.Device, device_id=NO_TYPE):
    """Nobody handles its queues: it pushes and takes."""

    rxq = vu.Queue()
    patientq = vu.Queue(backlog=3)


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def front(serve: Serve, connect: Connect, source: Source) -> FrontEnd:
    return connect(serve(source))


def start(front: FrontEnd, memory: Memory, index: int = 0, size: int = 16) -> Ring:
    if index == 0:
        front.negotiate()
        front.share(memory)
    ring = Ring(memory, index, size=size)
    front.start(ring)
    # The answer to one message may come before what that starts has begun, but not the answer to the next.
    front.get_u64(Id.GET_FEATURES)
    return ring


# --- Pushing ----------------------------------------------------------------------------------------------------------


def test_a_push_fills_the_next_buffer_of_the_driver_and_calls_it(
    front: FrontEnd, source: Source, memory: Memory
) -> None:
    ring = start(front, memory)
    call = front.set_call(ring)
    first, second = ring.add([], [8]), ring.add([], [4, 4])
    assert call.came()
    source.rxq.push(b"one")
    source.rxq.push(bytearray(b"and two"))
    assert ring.wait(2) == [(first.head, 3), (second.head, 7)]
    assert (first.written(3), second.written(7)) == (b"one", b"and two")
    assert call.came()


def test_a_push_without_a_buffer_is_refused(front: FrontEnd, source: Source, memory: Memory) -> None:
    with pytest.raises(vu.QueueFull, match=r"queue 0 \(rxq\) is stopped: the driver has offered no buffer"):
        source.rxq.push(b"early")
    ring = start(front, memory)
    with pytest.raises(vu.QueueFull, match=r"queue 0 \(rxq\) is running"):
        source.rxq.push(b"early")
    ring.add([], [8])
    source.rxq.push(b"in time")
    assert len(ring.wait()) == 1


def test_a_push_that_is_too_long_is_refused_and_the_buffer_is_used_by_the_next(
    front: FrontEnd, source: Source, memory: Memory
) -> None:
    ring = start(front, memory)
    chain = ring.add([], [4])
    for data in (b"12345", bytearray(b"12345")):
        with pytest.raises(vu.RequestOverflow, match="queue 0: 5 bytes do not fit in the 4"):
            source.rxq.push(data)
    assert (source.rxq.available, source.rxq.statistics.requests) == (1, 0)
    source.rxq.push(b"1234")
    assert ring.wait() == [(chain.head, 4)]
    assert source.rxq.statistics == vu.QueueStatistics(requests=1, bytes_written=4, kicks=0, calls_suppressed=1)


def test_a_push_waits_for_a_buffer(front: FrontEnd, source: Source, memory: Memory) -> None:
    ring = start(front, memory)
    chains = []

    def offer() -> None:
        time.sleep(0.05)
        chains.append(ring.add([], [8]))
        front.kick(ring)

    driver = threading.Thread(target=offer)
    driver.start()
    source.rxq.push(b"late", timeout=DEADLINE)
    driver.join()
    assert ring.wait() == [(chains[0].head, 4)]


def test_a_push_waits_for_the_driver_to_start_the_queue(front: FrontEnd, source: Source, memory: Memory) -> None:
    pushing = threading.Thread(target=source.rxq.push, args=[b"data"], kwargs={"timeout": None})
    pushing.start()
    front.negotiate()
    front.share(memory)
    ring = Ring(memory)
    ring.add([], [8])
    front.start(ring)
    assert len(ring.wait()) == 1
    pushing.join()


def test_a_push_gives_up_when_its_time_is_over(front: FrontEnd, source: Source, memory: Memory) -> None:
    ring = start(front, memory)
    before = time.monotonic()
    with pytest.raises(vu.QueueFull):
        source.rxq.push(b"data", timeout=0.1)
    assert time.monotonic() - before >= 0.1
    ring.add([], [8])
    front.kick(ring)
    front.tell(Id.SET_OWNER)
    # Nothing is left of it.
    assert ring.take() == []


def test_a_driver_is_asked_to_kick_when_a_push_found_no_buffer(front: FrontEnd, source: Source, memory: Memory) -> None:
    ring = start(front, memory)
    for _ in range(3):
        ring.add([], [8])
        source.rxq.push(b"data")
        with pytest.raises(vu.QueueFull):
            source.rxq.push(b"more")
        assert ring.used_flags & NO_NOTIFY == 0


def test_a_backlog_keeps_what_comes_too_early_in_order(front: FrontEnd, source: Source, memory: Memory) -> None:
    for number in range(3):
        source.patientq.push(b"%d" % number)
    with pytest.raises(vu.QueueFull, match="the backlog of 3 is full"):
        source.patientq.push(b"3")
    start(front, memory)
    ring = start(front, memory, 1)
    chains = [ring.add([], [8]) for _ in range(2)]
    front.kick(ring)
    assert ring.wait(2) == [(chains[0].head, 1), (chains[1].head, 1)]
    assert [chain.written(1) for chain in chains] == [b"0", b"1"]
    # What is kept goes before what is new.
    source.patientq.push(b"4")
    chains = [ring.add([], [8]) for _ in range(2)]
    front.kick(ring)
    ring.wait(2)
    assert [chain.written(1) for chain in chains] == [b"2", b"4"]


def test_what_does_not_fit_is_dropped_from_the_backlog_with_a_message(
    front: FrontEnd, source: Source, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    source.patientq.push(b"far too long")
    source.patientq.push(b"ok")
    start(front, memory)
    ring = start(front, memory, 1)
    chain = ring.add([], [4])
    front.kick(ring)
    assert ring.wait() == [(chain.head, 2)]
    assert chain.written(2) == b"ok"
    assert "12 bytes do not fit in the 4 writable bytes that are left; it is dropped from the backlog" in caplog.text


def test_a_backlog_outlives_the_front_end(serve: Serve, source: Source, memory: Memory) -> None:
    path = serve(source)
    with FrontEnd(path) as front:
        start(front, memory)
    source.patientq.push(b"still here")
    with FrontEnd(path) as front:
        memory.write(memory.guest, bytes(memory.size))
        start(front, memory)
        ring = start(front, memory, 1)
        chain = ring.add([], [16])
        front.kick(ring)
        [(_, length)] = ring.wait()
        assert chain.written(length) == b"still here"


def test_many_threads_push_at_once(front: FrontEnd, source: Source, memory: Memory) -> None:
    ring = start(front, memory, size=256)
    chains = [ring.add([], [4]) for _ in range(200)]
    front.kick(ring)
    wait_until(lambda: source.rxq.available == 200, "the buffers")

    def push(first: int) -> None:
        for number in range(first, first + 50):
            source.rxq.push(b"%03d" % number)

    pushers = [threading.Thread(target=push, args=[first]) for first in range(0, 200, 50)]
    for pusher in pushers:
        pusher.start()
    for pusher in pushers:
        pusher.join()
    entries = ring.wait(200)
    assert [head for head, _ in entries] == [chain.head for chain in chains]
    pushed = [chain.written(3) for chain in chains]
    assert sorted(pushed) == [b"%03d" % number for number in range(200)]
    # Each thread's pushes keep their order.
    for first in range(0, 200, 50):
        own = [data for data in pushed if first <= int(data) < first + 50]
        assert own == sorted(own)


def test_pushes_wait_while_buffers_come_one_by_one(front: FrontEnd, source: Source, memory: Memory) -> None:
    ring = start(front, memory)
    pushers = [
        threading.Thread(target=source.rxq.push, args=[b"%d" % number], kwargs={"timeout": DEADLINE})
        for number in range(8)
    ]
    for pusher in pushers:
        pusher.start()
    pushed = set()
    for _ in range(8):
        chain = ring.add([], [4])
        front.kick(ring)
        [(_, length)] = ring.wait()
        pushed.add(chain.written(length))
    for pusher in pushers:
        pusher.join()
    assert pushed == {b"%d" % number for number in range(8)}


def test_a_push_to_a_broken_ring_says_so(front: FrontEnd, source: Source, memory: Memory) -> None:
    ring = start(front, memory)
    error = front.set_error(ring)
    ring.offer(99)
    with pytest.raises(vu.ProtocolError, match="queue 0: the available ring names descriptor 99"):
        source.rxq.push(b"data")
    assert error.came()
    assert source.rxq.status == "broken"
    with pytest.raises(vu.QueueFull, match="is broken"):
        source.rxq.push(b"data")


def test_a_push_after_the_device_was_stopped_is_refused(
    source: Source, memory: Memory, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("socket") / "source.sock"
    with source.start(path), FrontEnd(path) as front:
        ring = start(front, memory)
        ring.add([], [8])
    with pytest.raises(vu.QueueFull, match=r"queue 0 \(rxq\) is stopped"):
        source.rxq.push(b"data")
    assert ring.take() == []


# --- Taking -----------------------------------------------------------------------------------------------------------


def test_requests_of_a_queue_without_a_handler_are_taken(front: FrontEnd, source: Source, memory: Memory) -> None:
    assert source.rxq.take() is None
    ring = start(front, memory)
    assert source.rxq.take() is None
    chain = ring.add([b"abc"], [8])
    request = source.rxq.take()
    assert request is not None
    assert source.rxq.take() is None
    assert (source.rxq.available, source.rxq.in_flight) == (0, 1)
    request.write(request.read()[::-1])
    request.complete()
    assert ring.wait() == [(chain.head, 3)]
    assert source.rxq.in_flight == 0


def test_taking_from_a_broken_ring_raises(front: FrontEnd, source: Source, memory: Memory) -> None:
    ring = start(front, memory)
    ring.offer(99)
    with pytest.raises(vu.ProtocolError, match="queue 0: the available ring names descriptor 99"):
        source.rxq.take()
    assert source.rxq.take() is None


def test_a_ring_that_breaks_in_other_hands_is_reported_on_the_devices_thread(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    told: list[tuple[str, threading.Thread]] = []

    class Teller(Source, device_id=NO_TYPE):
        def on_queue_error(self, queue: vu.DeviceQueue, error: str) -> None:
            told.append(("error", threading.current_thread()))

        def on_queue_stop(self, queue: vu.DeviceQueue) -> None:
            told.append(("stop", threading.current_thread()))

    teller = Teller()
    ring = start(connect(serve(teller)), memory)
    ring.offer(99)
    with pytest.raises(vu.ProtocolError):
        teller.rxq.take()
    wait_until(lambda: len(told) == 2, "the device is told")
    assert [what for what, _ in told] == ["error", "stop"]
    assert threading.current_thread() not in [thread for _, thread in told]


# --- What a queue tells -----------------------------------------------------------------------------------------------


def test_the_status_follows_the_states_of_the_ring(front: FrontEnd, source: Source, memory: Memory) -> None:
    queue = source.rxq
    assert queue.status == "stopped"
    ring = start(front, memory)
    assert queue.status == "running"
    assert repr(queue) == "<queue 0 (rxq), running>"
    front.enable(ring, on=False)
    assert queue.status == "disabled"
    front.enable(ring)
    assert queue.status == "running"
    front.stop(ring)
    assert queue.status == "stopped"


def test_available_and_in_flight_count_requests(serve: Serve, connect: Connect, memory: Memory) -> None:
    device = Hold()
    front = connect(serve(device))
    ring = start(front, memory)
    for _ in range(5):
        ring.add([], [1])
    front.kick(ring)
    requests = [device.next() for _ in range(5)]
    assert (device.requestq.available, device.requestq.in_flight) == (0, 5)
    for left in range(4, -1, -1):
        requests.pop().complete()
        assert device.requestq.in_flight == left


def test_statistics_count_what_happened(serve: Serve, connect: Connect, memory: Memory) -> None:
    device = Reverse()
    path = serve(device)
    for round_ in (1, 2):
        with FrontEnd(path) as front:
            memory.write(memory.guest, bytes(memory.size))
            ring = start(front, memory)
            call = front.set_call(ring)
            assert call.came()
            for _ in range(3):
                front.exchange(ring, b"12345", 4)
                assert call.came()
            ring.avail_flags = NO_INTERRUPT
            front.exchange(ring, b"12345", 4)
            front.get(Id.GET_VRING_BASE, vring_state(0))
        statistics = device.requestq.statistics
        assert statistics == vu.QueueStatistics(
            requests=4 * round_,
            bytes_read=20 * round_,
            bytes_written=16 * round_,
            kicks=statistics.kicks,
            calls=3 * round_,
            calls_suppressed=round_,
        )
        assert 1 <= statistics.kicks <= 4 * round_
    with pytest.raises(AttributeError):
        statistics.requests = 0  # type: ignore[misc]


def test_statistics_are_kept_when_the_device_is_stopped_and_started_again(tmp_path: Path, memory: Memory) -> None:
    device = Reverse()
    for round_ in (1, 2):
        with device.start(tmp_path / "again.sock"), FrontEnd(tmp_path / "again.sock") as front:
            memory.write(memory.guest, bytes(memory.size))
            ring = start(front, memory)
            front.exchange(ring, b"12345", 4)
            assert device.requestq.statistics.requests == round_
        assert device.requestq.statistics.requests == round_
        assert device.requestq.statistics.bytes_read == 5 * round_
