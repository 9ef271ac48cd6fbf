"""A process that serves or drives a device is forked: the child leaves what is its parent's alone."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vhost_user as vu
from raw import DEADLINE, FrontEnd, Id, Memory, Ring, vring_descriptor, wait_until
from specimens import NO_TYPE, Hold, Reverse, Serve

pytestmark = pytest.mark.usefixtures("level")


@contextlib.contextmanager
def child(work: Callable[[], object]) -> Iterator[int]:
    """A forked process that does `work`, and is killed if it is not done before."""
    with warnings.catch_warnings():
        # Other threads run: that is what this is about.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def do(work: Callable[[], object]) -> None:
    """Let a child do `work`, to its end."""
    with child(work) as pid:
        ended: list[int] = []

        def is_over() -> bool:
            found, status = os.waitpid(pid, os.WNOHANG)
            ended.extend([status] if found else [])
            return bool(found)

        wait_until(is_over, "the child ends")
        assert os.waitstatus_to_exitcode(ended[0]) == 0, "what the child printed says why"


class Source(vu.Device, device_id=NO_TYPE):
    eventq = vu.Queue()


# --- What is the parent's ---------------------------------------------------------------------------------------------


@pytest.fixture
def driver(level: None, tmp_path: Path) -> Iterator[Callable[[vu.Device], vu.Frontend]]:
    """Serve a device, and be its driver."""
    with contextlib.ExitStack() as stack:

        def start(device: vu.Device) -> vu.Frontend:
            path = tmp_path / "device.sock"
            stack.enter_context(device.start(path))
            return stack.enter_context(vu.Frontend.connect(path, timeout=DEADLINE)).negotiate()

        yield start


def test_a_request_that_a_child_lets_go_of_stays_the_parent_s(driver: Callable[[vu.Device], vu.Frontend]) -> None:
    device = Hold()
    queue = driver(device).queue(0)
    completion = queue.submit(b"abc", 3)
    assert device.arrived.acquire(timeout=DEADLINE)

    def work() -> None:
        (request,) = device.held
        with pytest.raises(vu.RequestRevoked):
            request.read()
        with pytest.raises(vu.RequestRevoked):
            request.complete()
        del request
        device.held.clear()
        gc.collect()

    do(work)
    assert not completion.done
    request = device.held.pop()
    request.write(request.read())
    request.complete()
    assert completion.wait() == b"abc"


def test_a_child_does_not_push_into_the_parent_s_queues(driver: Callable[[vu.Device], vu.Frontend]) -> None:
    device = Source()
    completion = driver(device).queue(0).submit(writable=4)
    wait_until(lambda: device.eventq.available, "a buffer")

    def work() -> None:
        with pytest.raises(vu.QueueFull, match="is stopped"):
            device.eventq.push(b"no")

    do(work)
    assert not completion.done
    device.eventq.push(b"yes")
    assert completion.wait() == b"yes"


def test_a_child_that_closes_a_front_end_closes_it_for_itself(driver: Callable[[vu.Device], vu.Frontend]) -> None:
    frontend = driver(Reverse())
    queue = frontend.queue(0)

    def work() -> None:
        with pytest.raises(vu.StateError, match="another process"):
            queue.request(b"abc", 3)
        with pytest.raises(vu.StateError, match="another process"):
            frontend.log_all()
        frontend.close()

    do(work)
    assert queue.request(b"abc", 3) == b"cba"
    queue.stop()


HANDLER = """
import os, sys, warnings
import vhost_user as vu

warnings.simplefilter("ignore", DeprecationWarning)
parent = os.getpid()

class Forking(vu.Device, device_id=0x7FFF):
    requestq = vu.Queue()
    workers = int(sys.argv[2])

    @requestq.handler
    def reverse(self, request: vu.Request) -> None:
        data = request.read()
        if data.startswith(b"fork"):
            pid = os.fork()
            if pid == 0:
                if data == b"fork exit":
                    sys.exit(7)
                return
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            request.write(b"%d" % status)
        else:
            request.write(data[::-1])

    def on_stop(self) -> None:
        print("stopped", os.getpid() == parent, flush=True)

Forking().serve(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("how", "workers", "status", "complaint"),
    [
        ("exit", 0, 7, ""),
        ("return", 0, 1, "another process"),
        # An exception that ends a thread ends no process with an error.
        ("exit", 1, 0, ""),
        ("return", 1, 0, "another process"),
    ],
)
def test_a_child_that_a_handler_forks_ends_alone(
    tmp_path: Path, memory: Memory, how: str, workers: int, status: int, complaint: str
) -> None:
    path = tmp_path / "forking.sock"
    command = [sys.executable, "-W", "error", "-c", HANDLER, str(path), str(workers)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            wait_until(path.exists, "the device is served")
            for _ in range(2):
                with FrontEnd(path) as front:
                    memory.write(memory.guest, bytes(memory.size))
                    front.negotiate()
                    front.share(memory)
                    ring = Ring(memory)
                    front.start(ring)
                    assert front.exchange(ring, b"abc", 8) == b"cba"
                    assert front.exchange(ring, b"fork " + how.encode(), 8) == str(status).encode()
                    assert front.exchange(ring, b"abc", 8) == b"cba"
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=DEADLINE)
        finally:
            # With it, the children that it may have left.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert output == "stopped True\n"
    assert complaint in errors


# --- What is the child's ----------------------------------------------------------------------------------------------


def test_a_child_serves_a_device_of_its_own_in_full(serve: Serve, tmp_path: Path, memory: Memory) -> None:
    # The parent's call descriptors have somebody who looks after them.
    path, ours = tmp_path / "child.sock", serve(Reverse())
    with contextlib.ExitStack() as stack:
        parent = stack.enter_context(vu.Frontend.connect(ours, timeout=DEADLINE)).negotiate()
        assert parent.queue(0).request(b"abc", 3) == b"cba"
        stack.enter_context(child(lambda: Reverse().serve(path)))
        wait_until(path.exists, "the child serves its device")
        with FrontEnd(path) as front:
            front.negotiate()
            front.share(memory)
            ring = Ring(memory)
            front.start(ring)
            event = os.eventfd(0, os.EFD_NONBLOCK)
            front.tell(Id.SET_VRING_CALL, vring_descriptor(0), [event])
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(event)
            os.eventfd_write(event, 0xFFFF_FFFF_FFFF_FFFE)
            os.set_blocking(event, True)
            for _ in range(3):
                assert front.exchange(ring, b"abc", 8) == b"cba"
            os.close(event)
    path.unlink()


def test_a_child_serves_the_device_that_its_parent_serves(tmp_path: Path, memory: Memory) -> None:
    device = Reverse()
    paths = tmp_path / "parent.sock", tmp_path / "child.sock"
    with device.start(paths[0]), FrontEnd(paths[0]) as parent:
        parent.get_u64(Id.GET_FEATURES)

        def work() -> None:
            assert not device.connected
            assert device.address is None
            with device.start(paths[1]):
                signal.pause()

        with child(work):
            wait_until(paths[1].exists, "the child serves the device")
            for path in paths[1], paths[1]:
                with FrontEnd(path) as front:
                    memory.write(memory.guest, bytes(memory.size))
                    front.negotiate()
                    front.share(memory)
                    ring = Ring(memory)
                    front.start(ring)
                    assert front.exchange(ring, b"abc", 8) == b"cba"
        parent.get_u64(Id.GET_FEATURES)
    paths[1].unlink()


def test_a_child_drives_a_device_of_its_own(driver: Callable[[vu.Device], vu.Frontend], tmp_path: Path) -> None:
    frontend = driver(Reverse())
    queue = frontend.queue(0)

    def work() -> None:
        ours, theirs = socket.socketpair()
        with Reverse().start(fd=theirs.detach()), vu.Frontend(ours, timeout=DEADLINE) as mine:
            called: list[object] = []
            completion = mine.negotiate().queue(0).submit(b"abc", 3)
            completion.add_done_callback(called.append)
            assert completion.wait() == b"cba"
            wait_until(lambda: called, "the callback")

    do(work)
    assert queue.request(b"abc", 3) == b"cba"
