"""The state of a device, saved in one process and loaded in another.

vhost-user specification, "Migrating back-end state".
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

import vhost_user as vu
from raw import DEVICE_STATE, NEED_REPLY, REPLY_ACK, FrontEnd, Id, Memory, Ring, u64, vring_state, wait_until
from specimens import NO_TYPE, Connect, Reverse, Serve
from vhost_user.devices import Blk
from vhost_user.testing import connect as connected

SET_DEVICE_STATE_FD = 42
CHECK_DEVICE_STATE = 43
SAVE, LOAD = 0, 1
ACCEPTED, REFUSED = u64(0x100), u64(0x101)


class Register(vu.Device, device_id=NO_TYPE):
    """Keeps a value, of any length."""

    requestq = vu.Queue()

    def __init__(self, value: bytes = b"") -> None:
        self.value = value
        self.moved = threading.Event()

    @requestq.handler
    def answer(self, request: vu.Request) -> None:
        request.write(self.value[: request.writable])

    def on_save_state(self, file: BinaryIO) -> None:
        try:
            file.write(self.value)
            file.flush()
        finally:
            self.moved.set()

    def on_load_state(self, file: BinaryIO) -> None:
        try:
            self.value = file.read()
        finally:
            self.moved.set()


class Broken(Register, device_id=NO_TYPE):
    def on_save_state(self, file: BinaryIO) -> None:
        raise ValueError("no state today")

    def on_load_state(self, file: BinaryIO) -> None:
        file.read(1)
        raise ValueError("not this state")


@contextlib.contextmanager
def pipe() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    reader, writer = os.pipe()
    with open(reader, "rb", buffering=0) as reading, open(writer, "wb", buffering=0) as writing:
        yield reading, writing


@pytest.fixture
def device() -> Register:
    return Register(b"before")


@pytest.fixture
def front(device: Register, serve: Serve, connect: Connect) -> FrontEnd:
    front = connect(serve(device))
    front.negotiate(protocol=REPLY_ACK | DEVICE_STATE)
    return front


def begin(front: FrontEnd, direction: int, fd: int, phase: int = 0) -> bytes:
    front.send(SET_DEVICE_STATE_FD, struct.pack("=II", direction, phase), [fd])
    return front.reply_to(SET_DEVICE_STATE_FD)


def check(front: FrontEnd) -> int:
    return front.get_u64(CHECK_DEVICE_STATE)


# --- Both halves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 5 << 20])
def test_what_one_device_saved_another_one_loads(size: int) -> None:
    source, target = Register(os.urandom(size)), Register(b"something else")
    with connected(source, start=False) as frontend:
        state = frontend.save_state()
    with connected(target, start=False) as frontend:
        frontend.load_state(state)
        assert target.value == source.value
        assert frontend.queue(0).request(writable=max(size, 1)) == source.value


def test_a_device_without_a_state_saves_and_loads_nothing() -> None:
    with connected(Reverse(), start=False) as frontend:
        assert frontend.save_state() == b""
        frontend.load_state(b"")


def test_a_state_that_a_device_does_not_read_is_not_lost_silently(caplog: pytest.LogCaptureFixture) -> None:
    with connected(Reverse(), start=False) as frontend:
        with pytest.raises(vu.ProtocolError, match="CHECK_DEVICE_STATE"):
            frontend.load_state(b"x" * 100_000)
        assert "left 100000 bytes of its state unread" in caplog.text


@pytest.mark.parametrize(
    "move", [lambda frontend: frontend.save_state(), lambda frontend: frontend.load_state(b"x" * 500_000)]
)
def test_a_failure_is_told_and_logged_and_the_device_goes_on(move: object, caplog: pytest.LogCaptureFixture) -> None:
    assert callable(move)
    with connected(Broken(b"abc"), start=False) as frontend:
        with pytest.raises(vu.ProtocolError, match="CHECK_DEVICE_STATE"):
            move(frontend)
        assert "state today" in caplog.text or "not this state" in caplog.text
        assert frontend.queue(0).request(writable=3) == b"abc"


def test_a_state_goes_to_a_file_without_being_in_memory(tmp_path: Path) -> None:
    source = Register(os.urandom(5 << 20))
    with connected(source, start=False) as frontend:
        with open(tmp_path / "state", "wb") as file:
            assert frontend.save_state_to(file) == 5 << 20
        assert (tmp_path / "state").read_bytes() == source.value


def test_a_state_that_is_longer_than_its_limit_is_refused_and_the_device_goes_on() -> None:
    with connected(Register(b"x" * 100_001), start=False) as frontend:
        with pytest.raises(vu.StateTooLong, match="longer than 100000 bytes"):
            frontend.save_state(limit=100_000)
        assert len(frontend.save_state(limit=100_001)) == 100_001
        assert frontend.queue(0).request(writable=1) == b"x"


def test_a_file_that_cannot_be_written_ends_the_transfer_and_the_device_goes_on() -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "no space left")

    with connected(Register(b"x" * 500_000), start=False) as frontend:
        with pytest.raises(OSError, match="no space left"):
            frontend.save_state_to(Full())
        assert len(frontend.save_state()) == 500_000


# --- A front-end that does what it likes ------------------------------------------------------------------------------


def test_a_flood_of_failures_does_not_fill_the_log(front: FrontEnd, caplog: pytest.LogCaptureFixture) -> None:
    before = time.monotonic()
    for _ in range(200):
        assert check(front) != 0
        with pipe() as (reader, writer):
            writer.close()
            assert begin(front, 2, reader.fileno()) == REFUSED
    for _ in range(200):
        with socket.socket() as inet:
            assert begin(front, LOAD, inet.fileno()) == ACCEPTED
        assert check(front) != 0
    seconds = time.monotonic() - before
    assert 20 <= caplog.text.count("CHECK_DEVICE_STATE: ") + caplog.text.count("DEVICE_STATE_FD: ") <= 21 + seconds
    assert 20 <= caplog.text.count("loading its state failed") <= 21 + seconds


def test_the_state_goes_through_a_socket_as_well(front: FrontEnd, device: Register) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            assert begin(front, SAVE, theirs.fileno()) == ACCEPTED
        assert ours.recv(100) == b"before"
        assert ours.recv(100) == b""
    assert check(front) == 0
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            assert begin(front, LOAD, theirs.fileno()) == ACCEPTED
        ours.send(b"after")
    assert check(front) == 0
    assert device.value == b"after"


def test_a_file_is_written_and_read_from_where_it_is(front: FrontEnd, device: Register, tmp_path: Path) -> None:
    with open(tmp_path / "state", "w+b", buffering=0) as file:
        file.write(b"header:")
        assert begin(front, SAVE, file.fileno()) == ACCEPTED
        assert check(front) == 0
        assert (tmp_path / "state").read_bytes() == b"header:before"
        assert file.tell() == len(b"header:before")
        file.seek(len(b"header:be"))
        assert begin(front, LOAD, file.fileno()) == ACCEPTED
        assert check(front) == 0
    assert device.value == b"fore"


@pytest.mark.parametrize("direction", [SAVE, LOAD])
def test_a_pipe_of_another_user_is_used_although_it_cannot_be_opened_again(
    front: FrontEnd, device: Register, direction: int
) -> None:
    with pipe() as (reader, writer), contextlib.ExitStack() as stack:
        os.fchmod(reader.fileno(), 0)
        if os.geteuid() == 0:
            stack.callback(os.seteuid, 0)
            os.seteuid(65534)
        writer.write(b"after" if direction == LOAD else b"")
        assert begin(front, direction, (writer, reader)[direction].fileno()) == ACCEPTED
        writer.close()
        assert check(front) == 0
        assert (device.value if direction == LOAD else reader.read(100)) == (b"before", b"after")[direction]


def test_the_loop_goes_on_and_the_check_waits_until_the_state_is_there(front: FrontEnd, device: Register) -> None:
    with pipe() as (reader, writer):
        assert begin(front, LOAD, reader.fileno()) == ACCEPTED
        front.get_u64(Id.GET_FEATURES)
        front.send(CHECK_DEVICE_STATE)
        assert front.is_silent()
        writer.write(b"after")
        assert front.is_silent()
        writer.close()
        assert front.reply_to(CHECK_DEVICE_STATE) == u64(0)
    assert device.value == b"after"


def test_a_ring_that_is_started_meanwhile_waits(front: FrontEnd, memory: Memory) -> None:
    with pipe() as (reader, writer):
        assert begin(front, LOAD, reader.fileno()) == ACCEPTED
        front.share(memory)
        ring = Ring(memory)
        ring.add([], [5])
        front.start(ring)
        front.kick(ring)
        front.get_u64(Id.GET_FEATURES)
        assert ring.take() == []
        writer.write(b"after")
        writer.close()
        assert check(front) == 0
    assert ring.wait() == [(0, 5)]


def test_a_device_whose_rings_run_is_not_moved(front: FrontEnd, memory: Memory) -> None:
    front.share(memory)
    ring = Ring(memory)
    front.start(ring)
    with pipe() as (_, writer):
        assert begin(front, SAVE, writer.fileno()) == REFUSED
        front.stop(ring)
        assert begin(front, SAVE, writer.fileno()) == ACCEPTED
        assert check(front) == 0


def test_what_makes_no_sense_is_refused_and_its_descriptor_closed(front: FrontEnd, device: Register) -> None:
    with pipe() as (reader, writer), open("/dev/null", "r+b", buffering=0) as null:
        for direction, phase, fd in [
            (2, 0, writer.fileno()),
            (SAVE, 1, writer.fileno()),
            (SAVE, 0, reader.fileno()),
            (LOAD, 0, writer.fileno()),
            (LOAD, 0, null.fileno()),
        ]:
            assert begin(front, direction, fd, phase) == REFUSED
        front.send(SET_DEVICE_STATE_FD, struct.pack("=II", SAVE, 0), flags=NEED_REPLY)
        assert front.reply_to(SET_DEVICE_STATE_FD) == REFUSED
        writer.close()
        # Nobody else holds it.
        assert reader.read(1) == b""
    assert check(front) != 0
    assert not device.moved.is_set()


def test_a_second_transfer_waits_for_the_end_of_the_first(front: FrontEnd, device: Register) -> None:
    with pipe() as (reader, writer):
        assert begin(front, LOAD, reader.fileno()) == ACCEPTED
        assert begin(front, LOAD, reader.fileno()) == REFUSED
        writer.write(b"after")
    assert check(front) == 0
    assert check(front) != 0
    assert device.value == b"after"


def test_a_reader_that_closes_early_is_a_failure(front: FrontEnd, device: Register) -> None:
    device.value = bytes(1 << 20)
    with pipe() as (reader, writer):
        assert begin(front, SAVE, writer.fileno()) == ACCEPTED
        reader.read(1)
    assert check(front) != 0


@pytest.mark.parametrize("checks", [False, True])
@pytest.mark.parametrize("direction", [SAVE, LOAD])
def test_a_front_end_that_goes_away_ends_a_transfer_that_never_would(
    front: FrontEnd, device: Register, direction: int, checks: bool
) -> None:
    device.value = bytes(1 << 20)
    with pipe() as (reader, writer):
        assert begin(front, direction, (writer, reader)[direction].fileno()) == ACCEPTED
        if checks:
            front.send(CHECK_DEVICE_STATE)
            front.wait_until_read()
        front.close()
        wait_until(lambda: not device.connected, "the session ends")
        assert device.moved.wait(30)


@pytest.mark.parametrize("direction", [SAVE, LOAD])
def test_a_device_can_be_stopped_during_a_transfer_that_never_ends(
    direction: int, connect: Connect, tmp_path: object
) -> None:
    device = Register(bytes(1 << 20))
    path = f"{tmp_path}/stopped.sock"
    with pipe() as (reader, writer):
        with device.start(path):
            front = connect(path)  # type: ignore[arg-type]
            front.negotiate(protocol=REPLY_ACK | DEVICE_STATE)
            assert begin(front, direction, (writer, reader)[direction].fileno()) == ACCEPTED
            front.send(CHECK_DEVICE_STATE)
        assert device.moved.is_set()


def test_enabling_a_ring_does_not_start_it_during_a_transfer(front: FrontEnd) -> None:
    with pipe() as (reader, _):
        assert begin(front, LOAD, reader.fileno()) == ACCEPTED
        front.tell(Id.SET_VRING_ENABLE, vring_state(0, 1))
    assert check(front) == 0


def test_a_disk_keeps_what_the_driver_said_of_its_write_cache() -> None:
    with connected(Blk(1 << 20), start=False) as frontend:
        wce = Blk.wce.offset
        frontend.write_config(b"\0", wce)
        state = frontend.save_state()
    with connected(Blk(1 << 20), start=False) as frontend:
        assert frontend.read_config(1, wce) == b"\1"
        frontend.load_state(state)
        assert frontend.read_config(1, wce) == b"\0"
        with pytest.raises(vu.ProtocolError):
            frontend.load_state(b"\2")
        assert frontend.read_config(1, wce) == b"\0"
