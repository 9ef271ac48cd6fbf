"""Where a device is served, who is let in, and how it ends."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import random
import signal
import socket
import stat
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import vhost_user as vu
import vhost_user.loop
from conftest import open_descriptors
from raw import DEADLINE, QUIET, Channel, FrontEnd, Id, Memory, Ring, wait_until
from specimens import NO_TYPE, Connect, Diary, Hold, Reverse, Serve

pytestmark = pytest.mark.usefixtures("level")

#: A program that serves a device; what it does is appended.
PROGRAM = """
import os, sys
import vhost_user as vu

class Reverse(vu.Device, device_id=0x7FFF):
    requestq = vu.Queue()

    @requestq.handler
    def reverse(self, request: vu.Request) -> None:
        request.write(request.read()[::-1])

    def on_start(self) -> None:
        print("started", flush=True)

    def on_stop(self) -> None:
        print("stopped", flush=True)
"""


@contextlib.contextmanager
def program(*lines: str, descriptors: tuple[int, ...] = (), **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Another process in which a device is served, from its start on."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM + "\n".join(lines)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=descriptors,
        env=os.environ | environment,
    )
    with process:
        try:
            assert line_of(process) == "started\n"
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    """The next line that a program prints. What comes after it stays in the pipe: `communicate` looks nowhere else."""
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(process.stdout.fileno(), 1)):
        line += byte
    return line.decode()


class Rude(Reverse, device_id=NO_TYPE):
    def on_disconnect(self, error: Exception | None) -> None:
        raise RuntimeError("no farewell")


def start(front: FrontEnd, memory: Memory, index: int = 0) -> Ring:
    memory.write(memory.guest, bytes(memory.size))
    front.negotiate()
    front.share(memory)
    ring = Ring(memory, index)
    front.start(ring)
    return ring


def works(path: Path, memory: Memory) -> bool:
    with FrontEnd(path) as front:
        return front.exchange(start(front, memory), b"abc", 8) == b"cba"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "device.sock"


# --- At a path --------------------------------------------------------------------------------------------------------


def test_a_socket_that_is_there_can_be_connected_to(path: Path) -> None:
    refused, over = [], threading.Event()

    def watch() -> None:
        while not over.is_set():
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(str(path))
                except FileNotFoundError:
                    pass
                except ConnectionRefusedError as error:
                    refused.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(30):
            with Reverse().start(path):
                pass
    finally:
        over.set()
        watcher.join()
    assert refused == []


def test_the_socket_is_there_while_the_device_is_served_and_gone_afterwards(path: Path, memory: Memory) -> None:
    device = Reverse()
    with device.start(path) as server:
        assert path.is_socket()
        assert server.address == device.address == str(path)
        assert works(path, memory)
    assert not path.exists()
    assert not server.running


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_the_socket_has_the_permissions_that_were_asked_for(path: Path, mode: int) -> None:
    before = os.umask(0o077)
    try:
        with Reverse().start(path, mode=mode):
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(before)


def test_only_the_owner_may_connect_unless_something_else_was_asked_for(path: Path) -> None:
    before = os.umask(0)
    try:
        with Reverse().start(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_a_socket_that_a_dead_process_left_is_replaced(path: Path, memory: Memory) -> None:
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
        left_over.listen()
    with Reverse().start(path):
        assert works(path, memory)


def test_a_socket_that_was_bound_but_never_listened_is_replaced(path: Path, memory: Memory) -> None:
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    with Reverse().start(path):
        assert works(path, memory)


def test_a_socket_at_which_somebody_listens_is_not_replaced(path: Path, memory: Memory) -> None:
    with Reverse().start(path):
        with pytest.raises(
            vu.AddressInUse, match="another process is listening there; stop it, or choose another"
        ) as e:
            Reverse().start(path)
        assert (e.value.errno, e.value.filename) == (errno.EADDRINUSE, str(path))
        assert works(path, memory)
    assert not path.exists()


def test_a_listener_that_is_too_busy_to_accept_is_not_replaced(path: Path) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen(0)
        # Its queue is full.
        for _ in range(2):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect(str(path))
        with pytest.raises(vu.AddressInUse):
            Reverse().start(path)
    path.unlink()


def test_what_is_not_a_socket_is_not_replaced(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(vu.AddressInUse, match="the file is not a socket; remove it, or choose another path"):
        Reverse().start(path)
    assert path.read_text() == "precious"
    path.unlink()
    path.mkdir()
    with pytest.raises(vu.AddressInUse):
        Reverse().start(path)


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(vu.AddressInUse, match="not a socket"):
        Reverse().start(path)


def test_a_path_that_is_too_long_is_refused_with_its_limit(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 120)
    with pytest.raises(OSError, match="a socket path has at most 107 bytes") as caught:
        Reverse().start(path)
    assert (caught.value.errno, caught.value.filename) == (errno.ENAMETOOLONG, str(path))


def test_a_missing_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "device.sock"
    with pytest.raises(FileNotFoundError) as caught:
        Reverse().start(path)
    assert str(tmp_path / "missing") in str(caught.value)


def test_a_socket_that_somebody_removed_or_replaced_is_not_missed(path: Path) -> None:
    with Reverse().start(path):
        path.unlink()
    with Reverse().start(path):
        path.unlink()
        path.write_text("somebody else's")
    assert path.read_text() == "somebody else's"


def test_a_folder_that_is_gone_is_not_missed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with Reverse().start(folder / "device.sock"):
        (folder / "device.sock").unlink()
        folder.rmdir()


def test_a_relative_path_and_a_path_in_bytes_are_paths_too(
    tmp_path: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Reverse().start("device.sock"):
        assert works(tmp_path / "device.sock", memory)
    assert not (tmp_path / "device.sock").exists()


def test_of_many_that_start_at_the_same_path_one_is_served(path: Path, memory: Memory) -> None:
    barrier = threading.Barrier(8)
    servers: list[vu.Server] = []
    failures: list[Exception] = []

    def begin() -> None:
        barrier.wait(DEADLINE)
        try:
            servers.append(Reverse().start(path))
        except vu.AddressInUse as error:
            failures.append(error)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(servers), len(failures)) == (1, 7)
    assert works(path, memory)
    servers[0].stop()


# --- In other ways ----------------------------------------------------------------------------------------------------


def test_only_one_way_is_chosen(path: Path) -> None:
    with pytest.raises(vu.StateError, match="choose one of a path, a descriptor, and a path to connect to"):
        Reverse().start(path, connect=path)
    with pytest.raises(vu.StateError, match="choose one"):
        Reverse().serve(path, fd=3)


def test_a_device_without_any_way_says_which_there_are() -> None:
    with pytest.raises(vu.StateError, match="say where to serve the device: a socket path, fd=, or connect="):
        Reverse().start()


def test_a_device_connects_to_a_front_end_that_listens(path: Path, memory: Memory) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        server = Reverse().start(connect=path)
        assert server.address == str(path)
        front = accepted(listener)
        assert front.exchange(start(front, memory), b"abc", 8) == b"cba"
        front.close()
        # There is nobody else to serve.
        assert server.wait(DEADLINE)
    path.unlink()


def accepted(listener: socket.socket) -> FrontEnd:
    """The front-end's end of a connection that the device made."""
    front = FrontEnd.__new__(FrontEnd)
    Channel.__init__(front, listener.accept()[0])
    front._owned, front._kicks = contextlib.ExitStack(), {}
    return front


def test_a_front_end_that_does_not_listen_is_an_error_that_names_the_path(path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Reverse().start(connect=path)
    assert caught.value.filename == str(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    with pytest.raises(ConnectionRefusedError) as refused:
        Reverse().start(connect=path)
    assert refused.value.filename == str(path)
    path.unlink()


def test_an_inherited_descriptor_may_be_connected(memory: Memory) -> None:
    ours, theirs = socket.socketpair()
    server = Reverse().start(fd=theirs.detach())
    with ours:
        front = FrontEnd.__new__(FrontEnd)
        Channel.__init__(front, ours)
        front._owned, front._kicks = contextlib.ExitStack(), {}
        assert front.exchange(start(front, memory), b"abc", 8) == b"cba"
        front.close()
    assert server.wait(DEADLINE)


def test_an_inherited_descriptor_may_listen(path: Path, memory: Memory) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    with Reverse().start(fd=listener.detach()):
        assert works(path, memory)
        assert works(path, memory)
    # Whoever made the socket removes it.
    assert path.exists()
    path.unlink()


def test_a_descriptor_of_another_kind_is_refused_and_stays_open(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w") as file:
        with pytest.raises(vu.StateError, match=r"descriptor \d+ is not a socket"):
            Reverse().start(fd=file.fileno())
        os.fstat(file.fileno())
    with pytest.raises(vu.StateError, match="descriptor 9999 is not a socket"):
        Reverse().start(fd=9999)
    for family, kind in [(socket.AF_INET, socket.SOCK_STREAM), (socket.AF_UNIX, socket.SOCK_DGRAM)]:
        with socket.socket(family, kind) as other:
            with pytest.raises(vu.StateError, match="is not a UNIX stream socket"):
                Reverse().start(fd=other.fileno())
            os.fstat(other.fileno())


def test_a_socket_from_systemd_is_used(path: Path, memory: Memory) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        # What systemd does: the descriptor is number 3, and the variables are for this process alone.
        lines = (
            f"os.dup2({listener.fileno()}, 3)",
            "os.environ['LISTEN_PID'] = str(os.getpid())",
            "os.environ['LISTEN_FDS'] = '1'",
            "Reverse().serve()",
        )
        with program(*lines, descriptors=(listener.fileno(),)) as process:
            assert works(path, memory)
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE) == -signal.SIGINT
    path.unlink()


@pytest.mark.parametrize(
    ("variables", "error"),
    [
        ("LISTEN_PID='1', LISTEN_FDS='1'", "say where to serve the device"),
        ("LISTEN_PID=str(os.getpid()), LISTEN_FDS='2'", "systemd passed 2 sockets; a device needs one"),
    ],
)
def test_sockets_from_systemd_that_are_not_one_for_this_process_are_refused(variables: str, error: str) -> None:
    script = PROGRAM + f"os.environ.update({variables})\nReverse().serve()\n"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert result.returncode == 1
    assert error in result.stderr


# --- One front-end after the other ------------------------------------------------------------------------------------


def test_a_second_front_end_is_turned_away_while_the_first_goes_on(
    serve: Serve, connect: Connect, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    path = serve(Reverse())
    first = connect(path)
    ring = start(first, memory)
    second = connect(path)
    assert second.is_closed()
    assert (
        "Reverse: a front-end was turned away: another one is connected; a device serves one at a time" in caplog.text
    )
    assert first.exchange(ring, b"abc", 8) == b"cba"
    third = connect(path)
    fourth = connect(path)
    assert fourth.is_closed()
    assert third.is_closed()
    assert first.exchange(ring, b"abc", 8) == b"cba"


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second front-end is kept waiting for as long as a test takes."""
    monkeypatch.setattr("vhost_user._runtime.PATIENCE", 1000.0)


@pytest.mark.usefixtures("patience")
def test_a_second_front_end_is_served_if_the_first_one_leaves_soon(serve: Serve, connect: Connect) -> None:
    # QEMU killed and started again: the new one may connect before the old one's end was seen.
    path = serve(Reverse())
    first = connect(path)
    first.get_u64(Id.GET_FEATURES)
    second = connect(path)
    second.send(Id.GET_FEATURES)
    assert second.is_silent()
    first.close()
    second.reply_to(Id.GET_FEATURES)


@pytest.mark.usefixtures("patience")
def test_a_front_end_that_waits_is_served_although_the_hook_for_the_end_of_the_first_raises(path: Path) -> None:
    with Rude().start(path), FrontEnd(path) as first, FrontEnd(path) as second:
        first.get_u64(Id.GET_FEATURES)
        second.send(Id.GET_FEATURES)
        assert second.is_silent()
        first.close()
        second.reply_to(Id.GET_FEATURES)


def test_a_front_end_that_cannot_be_accepted_is_tried_again_and_not_all_the_time(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = textwrap.dedent(f"""
        import contextlib, resource
        server = Reverse().start({str(path)!r})
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        taken = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        print("full", flush=True)
        sys.stdin.readline()
        used = os.times().user + os.times().system
        print(used, flush=True)
        sys.stdin.readline()
        print(os.times().user + os.times().system - used, flush=True)
        for each in taken:
            os.close(each)
        sys.stdin.read()
    """)
    with program(lines) as process:
        assert process.stdin is not None
        assert line_of(process) == "full\n"
        with FrontEnd(path) as front:
            front.send(Id.GET_FEATURES)
            print(file=process.stdin, flush=True)
            line_of(process)
            time.sleep(1.5)
            print(file=process.stdin, flush=True)
            assert float(line_of(process)) < 0.5
            front.reply_to(Id.GET_FEATURES)
        _, errors = process.communicate(timeout=DEADLINE)
    assert "a front-end could not be accepted: [Errno 24] Too many open files; trying again in 1 s" in errors


@pytest.mark.usefixtures("patience")
def test_how_long_one_front_end_waited_is_not_held_against_the_next(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled: list[int] = []

    class Timed(vhost_user.loop.Timer):
        def cancel(self) -> None:
            cancelled.append(self._id)
            super().cancel()

    monkeypatch.setattr("vhost_user._runtime.Timer", Timed)
    device = Reverse()
    path = serve(device)
    first = connect(path)
    first.get_u64(Id.GET_FEATURES)
    second = connect(path)
    wait_until(lambda: device._runtime._patience, "the second one waits")
    assert device._runtime._patience
    timer = device._runtime._patience._id
    first.close()
    second.get_u64(Id.GET_FEATURES)
    assert cancelled == [timer]
    assert device._runtime._patience is None


def test_once_serves_one_front_end_and_ends(path: Path, memory: Memory) -> None:
    server = Reverse().start(path, once=True)
    assert not server.wait(QUIET)
    assert works(path, memory)
    assert server.wait(DEADLINE)
    assert not path.exists()


def test_once_ends_although_the_hook_for_the_end_raises(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Rude().start(path, once=True) as server:
        with FrontEnd(path) as front:
            front.get_u64(Id.GET_FEATURES)
        assert server.wait(DEADLINE)
    assert "RuntimeError: no farewell" in caplog.text


@pytest.mark.usefixtures("patience")
def test_once_turns_a_second_front_end_away_at_once(path: Path) -> None:
    with Reverse().start(path, once=True), FrontEnd(path) as first:
        first.get_u64(Id.GET_FEATURES)
        with FrontEnd(path) as second:
            assert second.is_closed()
        first.get_u64(Id.GET_FEATURES)


def test_front_ends_that_wait_are_closed_when_the_device_stops(path: Path) -> None:
    server = Reverse().start(path)
    with FrontEnd(path) as first, FrontEnd(path) as second, FrontEnd(path) as third:
        first.get_u64(Id.GET_FEATURES)
        server.stop()
        for front in (first, second, third):
            assert front.is_closed()


def test_two_devices_are_served_at_once(serve: Serve, connect: Connect, memory: Memory) -> None:
    class Upper(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()

        @requestq.handler
        def upper(self, request: vu.Request) -> None:
            request.write(request.read().upper())

    first, second = connect(serve(Reverse())), connect(serve(Upper()))
    with Memory() as more:
        rings = start(first, memory), start(second, more)
        for _ in range(10):
            assert first.exchange(rings[0], b"abc", 8) == b"cba"
            assert second.exchange(rings[1], b"abc", 8) == b"ABC"


# --- The end ----------------------------------------------------------------------------------------------------------


def test_a_device_is_served_again_after_it_was_stopped(path: Path, memory: Memory) -> None:
    device = Diary()
    for _ in range(3):
        with device.start(path):
            assert works(path, memory)
    assert [entry[0] for entry in device.entries].count("start") == 3
    assert [entry[0] for entry in device.entries].count("stop") == 3


def test_a_device_is_served_in_one_place_at_a_time(path: Path, tmp_path: Path, memory: Memory) -> None:
    device = Reverse()
    with device.start(path):
        with pytest.raises(vu.StateError, match="Reverse is being served already; make another instance, or"):
            device.start(tmp_path / "other.sock")
        assert works(path, memory)
    assert not (tmp_path / "other.sock").exists()


def test_stopping_what_is_stopped_does_nothing(path: Path) -> None:
    device = Reverse()
    device.stop()
    server = device.start(path)
    server.stop()
    server.stop()
    device.stop()
    assert server.wait()
    with device.start(path):
        assert path.exists()


def test_a_device_stops_itself_from_a_handler(path: Path, memory: Memory) -> None:
    class OneShot(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()

        @requestq.handler
        def answer(self, request: vu.Request) -> None:
            request.write(b"bye")
            self.stop()

    server = OneShot().start(path)
    with FrontEnd(path) as front:
        assert front.exchange(start(front, memory), b"", 8) == b"bye"
        assert server.wait(DEADLINE)


def test_a_handler_cannot_wait_for_its_own_device(path: Path, memory: Memory) -> None:
    servers: list[vu.Server] = []

    class Confused(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()

        @requestq.handler
        def answer(self, request: vu.Request) -> None:
            servers[0].stop()

        def on_request_error(self, request: vu.Request, error: BaseException) -> None:
            request.write(type(error).__name__.encode())

    with Confused().start(path) as server:
        servers.append(server)
        with FrontEnd(path) as front:
            assert front.exchange(start(front, memory), b"", 16) == b"StateError"


def test_requests_in_flight_are_finished_before_the_device_stops(path: Path, memory: Memory) -> None:
    device = Hold()
    server = device.start(path)
    with FrontEnd(path) as front:
        ring = start(front, memory)
        ring.add([], [8])
        front.kick(ring)
        request = device.next()
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        stopping.join(0.1)
        assert stopping.is_alive()
        assert ring.take() == []
        request.complete()
        stopping.join()
        assert len(ring.take()) == 1


def test_a_device_stops_although_a_request_is_never_completed(path: Path, memory: Memory) -> None:
    device = Hold()
    server = device.start(path)
    with FrontEnd(path) as front:
        ring = start(front, memory)
        ring.add([], [8])
        front.kick(ring)
        request = device.next()
        server.stop()
        with pytest.raises(vu.RequestRevoked):
            request.complete()
        assert ring.take() == []


@pytest.mark.parametrize("seed", range(8))
def test_a_device_stops_at_any_time_from_any_thread(path: Path, memory: Memory, seed: int) -> None:
    device = Reverse()
    stop = threading.Timer(random.Random(seed).uniform(0, 0.02), device.stop)
    server = device.start(path)
    stop.start()
    with contextlib.suppress(OSError, AssertionError), FrontEnd(path) as front:
        front.socket.settimeout(1)
        ring = start(front, memory)
        while True:
            ring.add([b"abc"], [8])
            front.kick(ring)
            ring.wait(timeout=0.2)
    assert server.wait(DEADLINE)
    stop.join()


@pytest.mark.parametrize(
    "line", ["Reverse().serve(sys.argv[1])", "import asyncio; asyncio.run(Reverse().serve_async(sys.argv[1]))"]
)
def test_ctrl_c_ends_serving_in_good_order(path: Path, memory: Memory, line: str) -> None:
    with program(f"sys.argv[1:] = [{str(path)!r}]", line) as process:
        wait_until(path.exists, "the socket")
        with FrontEnd(path) as front:
            assert front.exchange(start(front, memory), b"abc", 8) == b"cba"
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=DEADLINE)
            assert front.is_closed()
    assert process.returncode == -signal.SIGINT
    assert output == "stopped\n"
    assert "KeyboardInterrupt" in errors
    assert not path.exists()


@pytest.mark.parametrize("line", ["Reverse().serve(sys.argv[1])", "Reverse().start(sys.argv[1]).wait()"])
def test_a_signal_that_does_not_wake_who_waits_is_not_lost(path: Path, line: str) -> None:
    # As one that comes just before the wait: Python is told of it, and no system call ends.
    later = textwrap.dedent("""
        import _thread, threading

        def on_start(self):
            print("started", flush=True)
            threading.Timer(0.5, _thread.interrupt_main).start()

        Reverse.on_start = on_start
    """)
    with program(f"sys.argv[1:] = [{str(path)!r}]", later, line) as process:
        assert process.wait(DEADLINE) == -signal.SIGINT


def test_a_front_end_that_never_stops_talking_does_not_hold_the_end_up(path: Path) -> None:
    message = struct.pack("=III", Id.SET_OWNER, 1, 0)

    def talk(front: FrontEnd) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                front.socket.sendall(message * 1000)

    with program(f"Reverse().serve({str(path)!r})") as process, FrontEnd(path) as front:
        talking = threading.Thread(target=talk, args=[front])
        talking.start()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(DEADLINE) == -signal.SIGINT
        finally:
            process.kill()
            talking.join()


def test_ctrl_c_while_a_device_starts_stops_it(path: Path) -> None:
    lines = textwrap.dedent(f"""
        import signal, threading, time

        class Slow(Reverse):
            def on_start(self):
                super().on_start()
                threading.Thread(target=os.kill, args=[os.getpid(), signal.SIGINT]).start()
                time.sleep(1)

        try:
            Slow().start({str(path)!r})
        except KeyboardInterrupt:
            print("interrupted", os.path.exists({str(path)!r}))
    """)
    with program(lines) as process:
        output, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, output, errors) == (0, "stopped\ninterrupted False\n", "")


def test_ctrl_c_in_the_main_thread_leaves_a_device_in_another_one_alone_until_it_is_stopped(path: Path) -> None:
    lines = textwrap.dedent(f"""
        import time
        try:
            with Reverse().start({str(path)!r}):
                print("begun", flush=True)
                # Python does not see a signal that comes when it is about to sleep.
                for _ in range(600):
                    time.sleep(0.1)
        except KeyboardInterrupt:
            print("interrupted", os.path.exists({str(path)!r}))
    """)
    with program(lines) as process:
        assert line_of(process) == "begun\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, output, errors) == (0, "stopped\ninterrupted False\n", "")


def test_a_program_that_ends_stops_its_devices(path: Path, memory: Memory) -> None:
    lines = textwrap.dedent(f"""
        server = Reverse().start({str(path)!r})
        sys.stdin.read()
    """)
    with program(lines) as process:
        assert works(path, memory)
        with FrontEnd(path) as front:
            front.get_u64(Id.GET_FEATURES)
            output, errors = process.communicate(timeout=DEADLINE)
            assert front.is_closed()
    assert (process.returncode, output, errors) == (0, "stopped\n", "")
    assert not path.exists()


def test_a_child_that_is_forked_leaves_the_device_to_its_parent(path: Path, memory: Memory) -> None:
    lines = textwrap.dedent(f"""
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        with Reverse().start({str(path)!r}) as server:
            child = os.fork()
            if child == 0:
                server.stop()
                sys.exit(7)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), server.running, flush=True)
            sys.stdin.read()
    """)
    with program(lines) as process:
        assert line_of(process) == "7 True\n"
        assert works(path, memory)
        output, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, output, errors) == (0, "stopped\n", "")


def test_a_front_end_of_another_process_that_is_killed_is_followed_by_the_next(path: Path, memory: Memory) -> None:
    script = (
        "import socket, sys, time; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(); time.sleep(60)"
    )
    with Reverse().start(path) as server:
        for _ in range(3):
            with subprocess.Popen([sys.executable, "-uc", script, path], stdout=subprocess.PIPE) as peer:
                assert peer.stdout is not None
                peer.stdout.readline()
                wait_until(lambda: server.device.connected, "the front-end")
                peer.kill()
        assert works(path, memory)


def test_nothing_is_left_after_200_starts_and_stops(path: Path) -> None:
    device = Reverse()
    gc.collect()
    before = open_descriptors()
    for _ in range(200):
        with device.start(path), FrontEnd(path) as front:
            front.get_u64(Id.GET_FEATURES)
    assert open_descriptors() == before
