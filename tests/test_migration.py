"""What a front-end that migrates a guest may rely on: the dirty log.

vhost-user specification, "Migration".
"""

from __future__ import annotations

import itertools
import os
import struct
import threading

import pytest

import vhost_user as vu
from raw import (
    LOG_ALL,
    LOG_SHMFD,
    MQ,
    NEED_REPLY,
    PROTOCOL_FEATURES,
    REPLY_ACK,
    VERSION_1,
    WRITE,
    Eventfd,
    FrontEnd,
    Id,
    Log,
    Memory,
    Ring,
    u64,
    wait_until,
)
from specimens import NO_TYPE, Connect, Diary, Hold, Reverse, Serve
from vhost_user.testing import connect as connected

PAGE = 4096
FEATURES = PROTOCOL_FEATURES | VERSION_1
PROTOCOL = REPLY_ACK | MQ | LOG_SHMFD


@pytest.fixture
def front(serve: Serve, connect: Connect) -> FrontEnd:
    """Connected to a device that reverses."""
    return connect(serve(Reverse()))


def ready(front: FrontEnd, memory: Memory, features: int = FEATURES) -> Ring:
    """A ring 0 that runs."""
    front.negotiate(features, PROTOCOL)
    front.share(memory)
    ring = Ring(memory)
    front.start(ring)
    return ring


def new_log(front: FrontEnd, memory: Memory) -> Log:
    log = front.own(Log.of(memory))
    front.set_log(log)
    return log


def answer_at(ring: Ring, address: int, length: int) -> None:
    """Offer one request of three bytes, whose answer goes there."""
    ring.add_pieces([(ring.memory.put(b"abc"), 3, 0), (address, length, WRITE)])


def pages(address: int, length: int) -> set[int]:
    return set(range(address // PAGE * PAGE, address + length, PAGE))


# --- Buffers ----------------------------------------------------------------------------------------------------------


def test_every_page_that_the_device_may_have_written_to_is_marked_and_no_other(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory, FEATURES | LOG_ALL)
    log = new_log(front, memory)
    answer = memory.allocate(3 * PAGE, PAGE) + 100
    answer_at(ring, answer, 2 * PAGE)
    front.kick(ring)
    ring.wait()
    assert memory.read(answer, 3) == b"cba"
    assert log.dirty() == pages(answer, 2 * PAGE)
    assert len(log.dirty()) == 3


def test_what_the_driver_wrote_itself_is_not_marked(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory, FEATURES | LOG_ALL)
    log = new_log(front, memory)
    assert front.exchange(ring, b"abc") == b""
    assert log.dirty() == set()


def test_logging_goes_on_and_off_while_the_ring_runs(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory)
    log = new_log(front, memory)
    answer = memory.allocate(PAGE, PAGE)
    for on in (False, True, False, True):
        front.tell(Id.SET_FEATURES, u64(FEATURES | (LOG_ALL if on else 0)))
        answer_at(ring, answer, 8)
        front.kick(ring)
        ring.wait()
        assert log.dirty() == (pages(answer, 8) if on else set())
        log.clear()


def test_the_device_is_not_bothered_with_the_feature_of_logging(serve: Serve, connect: Connect) -> None:
    device = Diary()
    front = connect(serve(device))
    front.negotiate(FEATURES, PROTOCOL)
    front.tell(Id.SET_FEATURES, u64(FEATURES | LOG_ALL))
    front.tell(Id.SET_FEATURES, u64(FEATURES))
    front.tell(Id.SET_FEATURES, u64(VERSION_1 | LOG_ALL))
    assert [entry for entry in device.entries if entry[0] == "features"] == [
        ("features", FEATURES),
        ("features", VERSION_1),
    ]


def test_a_request_in_flight_when_logging_begins_is_marked(serve: Serve, connect: Connect, memory: Memory) -> None:
    device = Hold()
    front = connect(serve(device))
    ring = ready(front, memory)
    answer = memory.allocate(PAGE, PAGE)
    answer_at(ring, answer, 8)
    front.kick(ring)
    request = device.next()
    log = new_log(front, memory)
    front.tell(Id.SET_FEATURES, u64(FEATURES | LOG_ALL))
    assert log.dirty() == set()
    request.write(b"answer")
    request.complete()
    ring.wait()
    assert log.dirty() == pages(answer, 8)


def test_what_was_written_through_a_buffer_is_marked_whatever_the_driver_is_told(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    class Direct(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()

        @requestq.handler
        def fill(self, request: vu.Request) -> None:
            for buffer in request.writable_buffers():
                buffer[-1] = 0xFF
                buffer.release()

    front = connect(serve(Direct()))
    ring = ready(front, memory, FEATURES | LOG_ALL)
    log = new_log(front, memory)
    answer = memory.allocate(2 * PAGE, PAGE)
    answer_at(ring, answer, 2 * PAGE)
    front.kick(ring)
    [(_, written)] = ring.wait()
    assert written == 0
    assert log.dirty() == pages(answer, 2 * PAGE)


def test_guest_addresses_count_whatever_region_they_are_in(front: FrontEnd, memory: Memory) -> None:
    with Memory(guest=0x10_0000, user=0x1000, offset=PAGE) as other:
        front.negotiate(FEATURES | LOG_ALL, PROTOCOL)
        front.share(memory, other)
        ring = Ring(memory)
        front.start(ring)
        log = new_log(front, memory)
        answer_at(ring, other.end - 8, 8)
        front.kick(ring)
        ring.wait()
        assert log.dirty() == {other.end - PAGE}


# --- The used ring ----------------------------------------------------------------------------------------------------


def test_writes_to_the_used_ring_are_marked_where_the_front_end_wants_them(front: FrontEnd, memory: Memory) -> None:
    front.negotiate(FEATURES, PROTOCOL)
    front.share(memory)
    # 512 entries are on two pages.
    ring = Ring(memory, size=512)
    front.start(ring)
    log = new_log(front, memory)
    base = 0x4000_0000
    front.tell(Id.SET_VRING_ADDR, ring.address_payload(flags=1, log=base))
    for _ in range(510):
        front.exchange(ring, b"abc", 8)
    assert log.dirty() == {base}
    log.clear()
    for _ in range(3):
        front.exchange(ring, b"abc", 8)
    assert log.dirty() == {base, base + PAGE}
    log.clear()
    front.tell(Id.SET_VRING_ADDR, ring.address_payload())
    front.exchange(ring, b"abc", 8)
    assert log.dirty() == set()


def test_what_is_published_when_the_ring_stops_is_marked(serve: Serve, connect: Connect, memory: Memory) -> None:
    device = Hold()
    front = connect(serve(device))
    ring = ready(front, memory)
    ring.add([b"abc"], [8])
    front.kick(ring)
    request = device.next()
    log = new_log(front, memory)
    front.tell(Id.SET_VRING_ADDR, ring.address_payload(flags=1, log=0))
    request.complete()
    front.stop(ring)
    assert ring.used_index == 1
    assert log.dirty() == {0}


# --- The log itself ---------------------------------------------------------------------------------------------------


def test_after_the_reply_nothing_is_marked_in_the_log_of_before(serve: Serve, connect: Connect, memory: Memory) -> None:
    """Under load: requests are completed by other threads all the while."""
    device = Hold()
    front = connect(serve(device))
    ring = ready(front, memory, FEATURES | LOG_ALL)
    front.tell(Id.SET_VRING_ADDR, ring.address_payload(flags=1, log=0))
    old = new_log(front, memory)
    stop = threading.Event()

    def complete() -> None:
        while not stop.is_set():
            if device.arrived.acquire(timeout=0.01):
                device.held.pop(0).complete()

    completers = [threading.Thread(target=complete) for _ in range(2)]
    for completer in completers:
        completer.start()
    try:
        answers = itertools.cycle([memory.allocate(PAGE, PAGE) for _ in range(8)])
        written: set[int] = set()
        marked: set[int] = set()
        for _ in range(100):
            for _ in range(4):
                answer = next(answers)
                written.add(answer)
                answer_at(ring, answer, 8)
            front.kick(ring)
            new = new_log(front, memory)
            marked |= old.dirty()
            old.clear()
            ring.wait(4)
            assert old.dirty() == set()
            old = new
    finally:
        stop.set()
        for completer in completers:
            completer.join()
    assert marked | old.dirty() == written | {0}


def test_a_log_begins_where_it_says_and_its_file_goes_on(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory, FEATURES | LOG_ALL)
    log = front.own(Log(memory.end // PAGE // 8, offset=100, slack=PAGE))
    front.set_log(log)
    front.exchange(ring, b"abc", 8)
    assert len(log.dirty()) == 1
    content = os.pread(log.descriptor, log.offset + log.size + PAGE, 0)
    outside = content[:100] + content[-PAGE:]
    assert outside == bytes(100 + PAGE)


def test_nothing_is_written_beyond_the_end_of_a_log_and_somebody_is_told_once(
    front: FrontEnd, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    ring = ready(front, memory, FEATURES | LOG_ALL)
    # The last page that it has a bit for is in the middle of the answer.
    answer = memory.allocate(16 * PAGE, 8 * PAGE)
    log = front.own(Log((answer + 8 * PAGE) // PAGE // 8, slack=PAGE))
    front.set_log(log)
    for _ in range(3):
        answer_at(ring, answer, 16 * PAGE)
        front.kick(ring)
        ring.wait()
    assert log.dirty() == pages(answer, 8 * PAGE)
    assert os.pread(log.descriptor, PAGE, log.size) == bytes(PAGE)
    front.tell(Id.SET_OWNER)
    complaints = [record for record in caplog.records if "dirty log" in record.getMessage()]
    assert [record.levelname for record in complaints] == ["WARNING"]
    assert f"{answer + 8 * PAGE:#x}" in complaints[0].getMessage()


def test_the_eventfd_is_told_of_marks(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory)
    new_log(front, memory)
    event = front.own(Eventfd())
    front.tell(Id.SET_LOG_FD, b"", [event.peer])
    front.exchange(ring, b"abc", 8)
    assert not event.came(0)
    front.tell(Id.SET_FEATURES, u64(FEATURES | LOG_ALL))
    front.exchange(ring, b"abc", 8)
    assert event.came()


def test_a_log_without_a_feature_and_a_feature_without_a_log_do_nothing(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory, FEATURES | LOG_ALL)
    front.tell(Id.SET_VRING_ADDR, ring.address_payload(flags=1, log=0))
    assert front.exchange(ring, b"abc", 8) == b"cba"


def test_a_log_ends_with_its_connection(serve: Serve, connect: Connect, memory: Memory) -> None:
    path = serve(Reverse())
    first = connect(path)
    ready(first, memory, FEATURES | LOG_ALL)
    log = Log.of(memory)
    first.set_log(log)
    first.close()
    second = connect(path)
    ring = ready(second, memory, FEATURES | LOG_ALL)
    assert second.exchange(ring, b"abc", 8) == b"cba"
    assert log.dirty() == set()
    log.close()


@pytest.mark.parametrize(
    ("size", "offset"), [(0, 0), (PAGE + 1, 0), (PAGE, 1), (1 << 63, 0), ((1 << 64) - 1, (1 << 64) - 1)]
)
def test_a_log_that_its_file_does_not_hold_closes_the_connection(front: FrontEnd, size: int, offset: int) -> None:
    front.negotiate(FEATURES, PROTOCOL)
    with Memory(PAGE) as file:
        front.send(Id.SET_LOG_BASE, struct.pack("=QQ", size, offset), [file.descriptor], flags=NEED_REPLY)
        assert front.is_closed()


def test_a_log_that_is_not_shared_is_refused(front: FrontEnd) -> None:
    front.negotiate(FEATURES, REPLY_ACK)
    assert front.ask(Id.SET_LOG_BASE, u64(0x1000)) != 0


def test_a_log_whose_file_shrinks_ends_the_session_and_not_the_process(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    device = Diary()
    front = connect(serve(device))
    ring = ready(front, memory, FEATURES | LOG_ALL)
    log = new_log(front, memory)
    os.truncate(log.descriptor, 0)
    ring.add([b"abc"], [8])
    front.kick(ring)
    assert front.is_closed()
    wait_until(lambda: ("disconnect",) in [entry[:1] for entry in device.entries], "the device is told")
    assert "shrank the file behind its dirty log" in str(device.entries[-1][1])


# --- The driver's half ------------------------------------------------------------------------------------------------


def test_a_log_has_the_pages_that_were_written_to_since_the_last_look() -> None:
    with connected(Reverse(), start=False) as frontend:
        queue = frontend.queue(0)
        log = vu.DirtyLog(frontend.memory)
        frontend.set_log(log)
        queue.request(b"abc", 3)
        assert log.take() == []
        frontend.log_all()
        queue.request(b"abc", 3)
        # What a request has changed is marked before the device answers a message.
        frontend.status()
        [region] = frontend.memory.regions
        first = log.take()
        assert first
        assert all(region[0] <= page * 4096 < sum(region) for page in first)
        assert log.take() == []
        queue.request(b"abc", 3)
        frontend.status()
        assert log.take() == first
        frontend.log_all(False)
        queue.request(b"abc", 3)
        assert log.take() == []


def test_a_log_is_swapped_while_requests_are_under_way() -> None:
    with connected(Reverse()) as frontend:
        log = vu.DirtyLog(frontend.memory)
        frontend.set_log(log)
        frontend.log_all()
        for _ in range(20):
            completions = [frontend.queues[0].submit(b"abc", 3) for _ in range(8)]
            new = vu.DirtyLog(frontend.memory)
            frontend.set_log(new)
            log.take()
            for completion in completions:
                completion.wait()
            assert log.take() == []
            log = new


def test_a_queue_that_starts_later_is_logged_and_marks_are_announced() -> None:
    with connected(Reverse(), start=False) as frontend:
        log = vu.DirtyLog(pages=(frontend.memory.regions[0][0] + (16 << 20)) // 4096)
        event = os.eventfd(0, os.EFD_NONBLOCK)
        frontend.set_log(log)
        frontend.set_log_fd(event)
        frontend.log_all()
        queue = frontend.queue(0)
        queue.request(b"abc", 3)
        used_page = (queue.addresses[2] - vu.Memory.user_address(0)) // 4096
        assert used_page in log.take()
        assert os.eventfd_read(event) > 0
        os.close(event)


def test_a_log_needs_its_feature_and_makes_sense() -> None:
    with connected(Reverse(), protocol=vu.ProtocolFeature.REPLY_ACK) as frontend:
        with pytest.raises(vu.StateError, match="LOG_SHMFD"):
            frontend.set_log(vu.DirtyLog(frontend.memory))
        with pytest.raises(vu.StateError, match="DEVICE_STATE"):
            frontend.save_state()
    with pytest.raises(ValueError, match="number of pages"):
        vu.DirtyLog()
    assert vu.DirtyLog(pages=1).pages == 64
