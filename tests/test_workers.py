"""Queues of a device on threads of their own."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vhost_user as vu
from raw import wait_until
from vhost_user import _runtime
from vhost_user.testing import connect

PATIENCE = 60.0


class Pair(vu.Device, device_id=vu.DeviceId.CONSOLE):
    """The first queue waits for the second."""

    workers = 2
    first = vu.Queue()
    second = vu.Queue()

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.told = threading.Event()
        self.stopping = threading.Event()
        self.threads: dict[int, str] = {}

    def on_queue_stop(self, queue: vu.DeviceQueue) -> None:
        self.stopping.set()

    @first.handler
    def wait(self, request: vu.Request) -> None:
        self.threads[0] = threading.current_thread().name
        self.begun.set()
        request.write(b"together" if self.told.wait(PATIENCE) else b"alone")

    @second.handler
    def tell(self, request: vu.Request) -> None:
        self.threads[1] = threading.current_thread().name
        self.told.set()
        request.write(b"told")


def test_handlers_of_two_queues_run_at_the_same_time_on_two_workers() -> None:
    device = Pair()
    with connect(device) as frontend:
        first, second = frontend.queues
        done = first.submit(writable=16)
        assert device.begun.wait(PATIENCE)
        assert second.request(writable=16) == b"told"
        assert done.wait(PATIENCE) == b"together"
    assert device.threads == {0: "vhost-user Pair worker 0", 1: "vhost-user Pair worker 1"}


@contextlib.contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[threading.Event]:
    """Do `work` on another thread. Yields what is set when it is done."""
    done = threading.Event()

    def do() -> None:
        work()
        done.set()

    thread = threading.Thread(target=do)
    thread.start()
    try:
        yield done
    finally:
        thread.join()


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A device whose first handler returns at the end of the test, if it was not told to before."""
    device = Pair()
    yield device
    device.told.set()


def test_a_queue_is_not_stopped_before_its_worker_is_done_with_it(pair: Pair) -> None:
    with connect(pair) as frontend:
        first, second = frontend.queues
        done = first.submit(writable=16)
        assert pair.begun.wait(PATIENCE)
        with meanwhile(first.stop) as stopped:
            assert pair.stopping.wait(PATIENCE)
            # The device has seen GET_VRING_BASE, and the other queue shows that it goes on.
            assert not stopped.is_set()
            assert second.request(writable=16) == b"told"
            assert stopped.wait(PATIENCE)
        assert done.wait(PATIENCE) == b"together"


def test_requests_in_flight_on_a_worker_are_done_when_the_device_stops(pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "pair.sock"
    with pair.start(path) as server, vu.Frontend.connect(path) as frontend:
        frontend.negotiate()
        first, _ = frontend.start_queues(2)
        done = first.submit(writable=16)
        assert pair.begun.wait(PATIENCE)
        with meanwhile(server.stop) as stopped:
            assert pair.stopping.wait(PATIENCE)
            assert not stopped.is_set()
            pair.told.set()
            assert stopped.wait(PATIENCE)
        assert done.wait(PATIENCE) == b"together"
    assert not [thread for thread in threading.enumerate() if "worker" in thread.name]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_handler_that_does_not_return_is_named_when_the_device_should_stop(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    pair.workers = workers
    monkeypatch.setattr(_runtime, "STOP_REMINDER", 0.1)
    path = tmp_path / "pair.sock"
    with pair.start(path) as server, vu.Frontend.connect(path) as frontend:
        frontend.negotiate()
        frontend.start_queues(2)[0].submit(writable=16)
        assert pair.begun.wait(PATIENCE)
        with meanwhile(server.stop) as stopped:
            wait_until(lambda: "it was told to stop" in caplog.text, "a warning", PATIENCE)
            assert not stopped.is_set()
            pair.told.set()
    assert caplog.text.count("it was told to stop") == 1
    warning = caplog.text[caplog.text.index("Pair: it was told to stop 0.1 s ago") :]
    assert "(requests in flight: 1 on queue 0)" in warning
    assert f'File "{__file__}"' in warning
    assert 'request.write(b"together" if self.told.wait(PATIENCE) else b"alone")' in warning


class Eight(vu.Device, device_id=vu.DeviceId.CONSOLE):
    """Answers with the queue's index and what was sent, backwards; and knows if a queue was worked on twice at once."""

    queues_ = vu.Queue.many(8)

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.at_work = [0] * 8
        self.doubled = False

    @queues_.handler
    def reverse(self, request: vu.Request) -> None:
        self.at_work[request.queue] += 1
        self.doubled |= self.at_work[request.queue] > 1
        request.write(bytes([request.queue]) + request.read()[::-1])
        self.at_work[request.queue] -= 1


def use(queue: vu.DriverQueue, dice: random.Random) -> None:
    """Make requests, while the queue is disabled and enabled, stopped and started again."""
    for _ in range(20):
        sent = [dice.randbytes(dice.randint(1, 300)) for _ in range(dice.randint(1, 20))]
        made = [queue.submit(data, 301) for data in sent]
        what = dice.randrange(3)
        if what == 1:
            queue.enable(False)
            queue.enable(True)
        elif what == 2:
            queue.stop()
            queue.start()
        for data, completion in zip(sent, made, strict=True):
            assert completion.wait(PATIENCE) == bytes([queue.index]) + data[::-1]


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_eight_queues_lose_nothing_while_they_are_stopped_and_started(workers: int) -> None:
    device, dice = Eight(workers), random.Random(workers)
    with connect(device) as frontend:
        for _ in range(2):
            failures: list[BaseException] = []

            def attempt(queue: vu.DriverQueue, seed: int, failures: list[BaseException] = failures) -> None:
                try:
                    use(queue, random.Random(seed))
                except BaseException as error:
                    failures.append(error)

            queues = frontend.queues or frontend.start_queues(8)
            threads = [threading.Thread(target=attempt, args=(queue, dice.randrange(1000))) for queue in queues]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert failures == []
            frontend.reset()
    assert not device.doubled


def test_what_means_the_end_on_a_worker_ends_the_server(tmp_path: Path) -> None:
    class Ending(vu.Device, device_id=vu.DeviceId.CONSOLE):
        workers = 1
        requestq = vu.Queue()

        @requestq.handler
        def end(self, request: vu.Request) -> None:
            raise SystemExit(3)

    path = tmp_path / "ending.sock"
    server = Ending().start(path)
    with vu.Frontend.connect(path) as frontend:
        frontend.negotiate()
        frontend.start_queues(1)[0].submit(writable=1)
        with pytest.raises(SystemExit):
            server.wait(PATIENCE)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [({"workers": 3}, "0 to 2"), ({"workers": -1}, "0 to 2")],
)
def test_workers_that_cannot_be_are_refused(tmp_path: Path, attributes: dict[str, int], message: str) -> None:
    device = Pair()
    for name, value in attributes.items():
        setattr(device, name, value)
    with pytest.raises(vu.DeclarationError, match=message):
        device.start(tmp_path / "pair.sock")
