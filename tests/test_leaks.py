"""Descriptors, threads, mappings, memory and socket files are level, however often peers come, die, and code is loaded.

What is counted is looked at after some rounds and again at the end, so that caches have filled by the first look.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import raw
import vhost_user as vu
from conftest import belongings
from raw import HEADER, NEED_REPLY, REQUEST, Id, u64, vring_descriptor, vring_state, wait_until
from specimens import NO_TYPE, Reverse, ReverseMany
from vhost_user.reload import Reloader, swap

#: Bytes of memory by which a process may grow between the two looks, at which it has done the same many times.
SLACK = 4 << 20

CONNECTS = 10_000


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """What is logged is kept until the end of a test, which would be a leak."""
    caplog.set_level(logging.CRITICAL, "vhost_user")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "device.sock"


def resident() -> int:
    """Bytes of memory that this process has in use, without what it maps of guests."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


def check_level(folder: Path, rounds: int, work: Callable[[int], object], settled: Callable[[], bool]) -> None:
    """Do `work` again and again, and compare what there is after a quarter of it with what there is in the end."""
    first = max(rounds // 4, 1)

    def do(some: range) -> tuple[set[object], int]:
        for number in some:
            work(number)
        wait_until(settled, "the device is done with them")
        memory = resident()
        return belongings(folder), memory

    before, memory = do(range(first))
    after, more_memory = do(range(first, rounds))
    assert after == before
    grown = more_memory - memory
    assert grown < SLACK, f"{grown} bytes more after {rounds - first} rounds"


# --- Connections ------------------------------------------------------------------------------------------------------


def message(request: int, payload: bytes = b"", flags: int = REQUEST) -> bytes:
    return HEADER.pack(request, flags, len(payload)) + payload


class Hasty:
    """A front-end that says everything at once, and leaves in one of several ways."""

    def __init__(self, path: Path, memory: raw.Memory, kick: raw.Eventfd) -> None:
        self.path = str(path)
        ring = raw.Ring(memory)
        table = raw.memory_table(memory.region)
        self.parts: list[tuple[bytes, list[int]]] = [
            (
                message(Id.SET_OWNER)
                + message(Id.GET_FEATURES)
                + message(Id.SET_FEATURES, u64(raw.PROTOCOL_FEATURES | raw.VERSION_1))
                + message(Id.SET_PROTOCOL_FEATURES, u64(raw.REPLY_ACK | raw.MQ)),
                [],
            ),
            (message(Id.SET_MEM_TABLE, table), [memory.descriptor]),
            (
                message(Id.SET_VRING_NUM, vring_state(0, ring.size))
                + message(Id.SET_VRING_BASE, vring_state(0))
                + message(Id.SET_VRING_ADDR, ring.address_payload()),
                [],
            ),
            (message(Id.SET_VRING_CALL, vring_descriptor(0)), [kick.peer]),
            (message(Id.SET_VRING_KICK, vring_descriptor(0)), [kick.peer]),
            (message(Id.SET_VRING_ENABLE, vring_state(0, 1), NEED_REPLY), []),
        ]
        #: The answers to GET_FEATURES and SET_VRING_ENABLE.
        self.answers = 2 * (HEADER.size + 8)
        self.torn = message(Id.SET_MEM_TABLE, table)[:30], [memory.descriptor]

    def visit(self, number: int) -> None:
        # A busy device may turn it away, because it has not seen yet that the last one left.
        while True:
            with contextlib.suppress(ConnectionError):
                return self.try_to_visit(number)

    def try_to_visit(self, number: int) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self.path)
            for data, descriptors in self.parts:
                socket.send_fds(connection, [data], descriptors)
            if not connection.recv(1, socket.MSG_PEEK):
                raise ConnectionResetError
            leave = number % 4
            if leave == 0:
                return  # without another look at the answers
            answers = b""
            while len(answers) < self.answers:
                part = connection.recv(self.answers)
                assert part, "the device closed the connection"
                answers += part
            if leave == 1:
                # In the middle of a message, with a descriptor that nobody will ever use.
                socket.send_fds(connection, [self.torn[0]], self.torn[1])
            elif leave == 2:
                connection.send(b"nonsense, and more of it")


def test_ten_thousand_connections_leave_nothing(path: Path, tmp_path: Path) -> None:
    device = Reverse()
    with device.start(path), raw.Memory() as memory:
        kick = raw.Eventfd()
        hasty = Hasty(path, memory, kick)
        check_level(tmp_path, CONNECTS, hasty.visit, lambda: not device.connected)
        kick.close()
        with vu.Frontend.connect(path) as frontend:
            assert frontend.negotiate().queue(0).request(b"abc", 3) == b"cba"
    assert not path.exists()


# --- Deaths -----------------------------------------------------------------------------------------------------------

#: A driver that keeps a device busy until it is killed.
DRIVER = """
import sys
import vhost_user as vu
frontend = vu.Frontend.connect(sys.argv[1])
queues = frontend.negotiate().start_queues(4)
while True:
    for queue in queues:
        queue.submit(b"x" * 1000, 2000)
    if not frontend.queues[0].outstanding:
        print(flush=True)
    for queue in queues:
        while queue.outstanding:
            pass
        print(flush=True)
"""

#: A device that lives until it is killed.
DEVICE = """
import sys
import vhost_user as vu
class Echo(vu.Device, device_id=0x7FFF):
    requestq = vu.Queue()
    @requestq.handler
    def echo(self, request: vu.Request) -> None:
        request.write(request.read())
with Echo().start(sys.argv[1]) as server:
    print(flush=True)
    server.wait()
"""


def killed(script: str, path: Path, meanwhile: Callable[[], object]) -> None:
    """Run a program until it has printed a line, do something, and kill it."""
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        meanwhile()
        process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("workers", [0, 2])
def test_drivers_that_are_killed_leave_nothing(path: Path, tmp_path: Path, workers: int) -> None:
    device = ReverseMany()
    device.workers = workers
    with device.start(path):
        check_level(tmp_path, 12, lambda _: killed(DRIVER, path, lambda: None), lambda: not device.connected)
        with vu.Frontend.connect(path) as frontend:
            assert frontend.negotiate().queue(3).request(b"abc", 8) == b"\x03cba"


def test_devices_that_are_killed_leave_nothing_with_their_drivers(path: Path, tmp_path: Path) -> None:
    def round_(_: int) -> None:
        frontends: list[vu.Frontend] = []

        def connect() -> None:
            frontend = vu.Frontend.connect(path)
            frontends.append(frontend)
            assert frontend.negotiate().queue(0).request(b"abc", 3) == b"abc"

        killed(DEVICE, path, connect)
        with frontends.pop() as frontend:
            lost = frontend.queues[0].submit(b"abc", 3)
            with pytest.raises((vu.PeerClosed, vu.StateError)):
                lost.wait()
        path.unlink()

    check_level(tmp_path, 8, round_, lambda: True)


# --- New code ---------------------------------------------------------------------------------------------------------


def versions() -> Iterator[type[vu.Device]]:
    """The same class again and again."""
    while True:

        class Version(vu.Device, device_id=NO_TYPE):
            requestq = vu.Queue()

            @requestq.handler
            def answer(self, request: vu.Request) -> None:
                request.write(request.read()[::-1])

        yield Version


def test_a_thousand_classes_for_a_device_that_runs_leave_nothing(path: Path, tmp_path: Path) -> None:
    classes = versions()
    device = next(classes)()
    with device.start(path), vu.Frontend.connect(path) as frontend:
        queue = frontend.negotiate().queue(0)

        def change(_: int) -> None:
            swap(device, next(classes)).result(raw.DEADLINE)
            assert queue.request(b"abc", 3) == b"cba"

        check_level(tmp_path, 1000, change, lambda: True)
        del change
    gc.collect()
    assert sum(cls.__name__ == "Version" for cls in vu.Device.__subclasses__()) <= 2


def test_files_that_are_loaded_anew_leave_nothing(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = textwrap.dedent("""
        import vhost_user as vu
        class Saved(vu.Device, device_id=0x7FFF):
            requestq = vu.Queue()
            @requestq.handler
            def answer(self, request):
                request.write(b"%d")
    """)
    file = tmp_path / "saved_device.py"
    file.write_text(source % 0)
    monkeypatch.syspath_prepend(tmp_path)
    import importlib

    device: vu.Device = importlib.import_module("saved_device").Saved()
    reports: list[str] = []
    with device.start(path), Reloader(device, report=reports.append), vu.Frontend.connect(path) as frontend:
        queue = frontend.negotiate().queue(0)
        numbers = itertools.count(1)

        def save(_: int) -> None:
            number = next(numbers)
            new = tmp_path / "new"
            new.write_text(source % number)
            os.replace(new, file)
            wait_until(lambda: len(reports) == number, "the new code", timeout=30)
            assert queue.request(b"", 8) == b"%d" % number

        check_level(tmp_path, 12, save, lambda: True)
    del sys.modules["saved_device"]
    gc.collect()
    assert sum(cls.__name__ == "Saved" for cls in vu.Device.__subclasses__()) <= 1
