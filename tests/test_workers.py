"""Queues of a device on threads of their own."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import vhost_user as vu
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
        self.threads: dict[int, str] = {}

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


def test_a_queue_is_not_stopped_before_its_worker_is_done_with_it() -> None:
    device = Pair()
    with connect(device) as frontend:
        first, _ = frontend.queues or frontend.start_queues(2)
        done = first.submit(writable=16)
        assert device.begun.wait(PATIENCE)
        threading.Timer(0.1, device.told.set).start()
        first.stop()
        assert done.wait(PATIENCE) == b"together"


def test_requests_in_flight_on_a_worker_are_done_when_the_device_stops(tmp_path: Path) -> None:
    device = Pair()
    path = tmp_path / "pair.sock"
    with device.start(path) as server, vu.Frontend.connect(path) as frontend:
        frontend.negotiate()
        first, _ = frontend.queues or frontend.start_queues(2)
        done = first.submit(writable=16)
        assert device.begun.wait(PATIENCE)
        threading.Timer(0.1, device.told.set).start()
        server.stop()
        assert done.wait(PATIENCE) == b"together"
    assert not [thread for thread in threading.enumerate() if "worker" in thread.name]


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
    [({"workers": 3}, "0 to 2"), ({"workers": -1}, "0 to 2"), ({"busy_poll": 0.001}, "busy_poll")],
)
def test_workers_that_cannot_be_are_refused(tmp_path: Path, attributes: dict[str, float], message: str) -> None:
    device = Pair()
    for name, value in attributes.items():
        setattr(device, name, value)
    with pytest.raises(vu.DeclarationError, match=message):
        device.start(tmp_path / "pair.sock")
