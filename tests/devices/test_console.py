"""The console, in a real guest."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vhost_user as vu
from devices.running import Boot, Program, wait_for
from raw import CONFIG, DEADLINE, MQ, PROTOCOL_FEATURES, REPLY_ACK, VERSION_1, WRITE, Memory, Ring
from specimens import Connect, Serve
from vhost_user.devices import Blk, Console, PtyConsole, Rng, SocketConsole, StreamConsole, Tmp102, i2c
from vhost_user.devices.console import BACKLOG
from vhost_user.guest import Guest, Uml

#: Another console for the kernel's messages, which it prints on the first one that it finds.
QUIET = ["console=tty0"]

#: Makes the terminal pass everything on as it is, as long as somebody has it open.
OPEN = "exec 3<>/dev/hvc0; stty raw -echo <&3; "

PATTERN = bytes(number * number % 251 for number in range(3 * BACKLOG))


class Recorder(Console):
    """Remembers what the guest printed."""

    def __init__(self) -> None:
        super().__init__()
        self.printed = b""

    def on_output(self, data: bytes) -> None:
        self.printed += data


class Parrot(Console):
    """Says everything twice."""

    def on_output(self, data: bytes) -> None:
        self.write(data * 2)


def receive(read: Callable[[int], bytes], count: int) -> bytes:
    """As many bytes from a stream."""
    data = b""
    while len(data) < count:
        part = read(count - len(data))
        assert part, f"the stream ended after {data!r}"
        data += part
    return data


@pytest.fixture
def boot_raw(boot: Boot) -> Boot:
    """A guest whose terminal passes everything on as it is."""

    def start(*devices: vu.Device) -> Uml:
        guest = boot(*devices, extra_args=QUIET)
        guest.run(f"({OPEN} touch open; exec sleep 1000) & until test -e open; do sleep 0.01; done")
        return guest

    return start


# --- Bytes from and to Python -----------------------------------------------------------------------------------------


def test_python_gets_what_the_guest_prints(boot_raw: Boot) -> None:
    console = Recorder()
    guest = boot_raw(console)
    guest.run("printf 'to be\\0 or not' > /dev/hvc0")
    assert console.printed == b"to be\0 or not"


def test_the_guest_reads_what_python_types(boot: Boot) -> None:
    console = Console()
    guest = boot(console, extra_args=QUIET)
    console.write(b"whether ")
    console.write(b"'tis nobler\n")
    assert guest.run("head -n 1 /dev/hvc0").text == "whether 'tis nobler"


def test_what_nobody_reads_waits(boot_raw: Boot) -> None:
    """In the guest, and then, when its driver is out of buffers, in the console."""
    console = Console()
    guest = boot_raw(console)
    # Each part takes one of the 256 buffers. The terminal takes from 4 to 64 KiB more, as quick as the guest is.
    data = PATTERN[: 15 * BACKLOG // 8]
    for start in range(0, len(data), 256):
        wait_for(lambda part=data[start : start + 256]: typed(console, part))  # type: ignore[misc]
    assert guest.run(f"head -c {len(data)} < /dev/hvc0").stdout == data


def test_the_kernel_prints_its_messages_on_it(boot: Boot) -> None:
    console = Recorder()
    boot(console).run("echo hello from the guest > /dev/kmsg")
    wait_for(lambda: b"hello from the guest\r\n" in console.printed)
    assert b"Run /bin/busybox as init process" in console.printed


def test_a_handler_may_answer(boot_raw: Boot) -> None:
    guest = boot_raw(Parrot())
    assert guest.run(
        "for word in ab cde f; do printf $word > /dev/hvc0; head -c $((2 * ${#word})) < /dev/hvc0; done"
    ).stdout == (b"ababcdecdeff")


def test_long_output_arrives_whole(boot_raw: Boot, tmp_path: Path) -> None:
    console = Recorder()
    (tmp_path / "text").write_bytes(PATTERN)
    guest = boot_raw(console)
    guest.run(f"cat {tmp_path / 'text'} > /dev/hvc0")
    assert console.printed == PATTERN


def test_long_input_arrives_whole(boot_raw: Boot) -> None:
    console = Recorder()
    guest = boot_raw(console)
    digest = ""

    def read() -> None:
        nonlocal digest
        digest = guest.run(f"echo ready > /dev/hvc0; head -c {len(PATTERN)} < /dev/hvc0 | sha256sum").text

    reader = threading.Thread(target=read)
    reader.start()
    wait_for(lambda: console.printed)
    for start in range(0, len(PATTERN), 10000):
        wait_for(lambda part=PATTERN[start : start + 10000]: typed(console, part))  # type: ignore[misc]
    reader.join()
    assert digest.split(maxsplit=1)[0] == hashlib.sha256(PATTERN).hexdigest()


def typed(console: Console, data: bytes) -> bool:
    """Whether there was room for `data`."""
    try:
        console.write(data)
    except vu.QueueFull:
        return False
    return True


def test_many_threads_may_type(boot: Boot) -> None:
    console = Console()
    guest = boot(console, extra_args=QUIET)

    def type_lines() -> None:
        for _ in range(256):
            console.write(b"1234567\n")

    writers = [threading.Thread(target=type_lines) for _ in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert guest.run("head -c 16384 /dev/hvc0").stdout == b"1234567\n" * 2048


def test_typing_into_a_full_backlog_is_refused_whole() -> None:
    console = Console()
    console.write(bytes(BACKLOG - 2))
    with pytest.raises(vu.QueueFull, match="65534 bytes wait for a guest that does not read; 3 do not fit"):
        console.write(b"abc")
    console.write(b"ab")


def test_typing_goes_on_while_drivers_come_and_go(serve: Serve, connect: Connect, memory: Memory) -> None:
    console = Console()
    path = serve(console)
    stop, failures = threading.Event(), list[Exception]()

    def type_on() -> None:
        while not stop.is_set():
            try:
                typed(console, b"12345678")
            except Exception as error:
                failures.append(error)
                raise

    writer = threading.Thread(target=type_on)
    writer.start()
    try:
        for _ in range(30):
            with connect(path) as front:
                front.negotiate(PROTOCOL_FEATURES | VERSION_1, REPLY_ACK | MQ | CONFIG)
                front.share(memory)
                ring = Ring(memory, size=64)
                for _ in range(64):
                    ring.add([], [8])
                front.start(ring)
                ring.wait(64)
    finally:
        stop.set()
        writer.join()
    assert failures == []


def test_typing_survives_a_driver_that_breaks_its_queue(serve: Serve, connect: Connect, memory: Memory) -> None:
    console = Console()
    front = connect(serve(console))
    front.negotiate()
    front.share(memory)
    ring = Ring(memory)
    ring.add_pieces([(0x10, 8, WRITE)])
    front.start(ring)
    console.write(b"typed")
    wait_for(lambda: console.receiveq.status == "broken")
    ring.clear()
    chain = ring.add([], [8])
    front.start(ring)
    [(_, length)] = ring.wait()
    assert chain.written(length) == b"typed"


def test_a_buffer_of_any_size_is_filled(serve: Serve, connect: Connect, memory: Memory) -> None:
    """Linux has pages; others have less."""
    console = Console()
    front = connect(serve(console))
    front.negotiate(PROTOCOL_FEATURES | VERSION_1, REPLY_ACK | MQ | CONFIG)
    front.share(memory)
    ring = Ring(memory, size=16)
    front.start(ring)
    chains = [ring.add([], [size]) for size in (1, 3, 2, 100)]
    front.kick(ring)
    console.write(b"abcdefgh")
    lengths = dict(ring.wait(len(chains)))
    assert [chain.written(lengths[chain.head]) for chain in chains] == [b"a", b"bcd", b"ef", b"gh"]


# --- Size and life ----------------------------------------------------------------------------------------------------


def test_the_guest_sees_the_size_and_its_changes(boot: Boot) -> None:
    console = Console(cols=100, rows=30)
    assert (console.cols, console.rows) == (100, 30)
    guest = boot(console, extra_args=QUIET)
    for cols, rows in ((100, 30), (132, 43), (80, 25)):
        console.resize(cols, rows)
        wait_for(lambda size=f"{rows} {cols}": guest.run("stty size < /dev/hvc0").text == size)  # type: ignore[misc]


def test_the_driver_can_be_unbound_and_bound_again(boot: Boot) -> None:
    console = Parrot()
    guest = boot(console, extra_args=QUIET)
    for _ in range(3):
        assert guest.run(OPEN + "printf ab >&3; head -c 4 <&3").stdout == b"abab"
        guest.run("echo virtio0 > /sys/bus/virtio/drivers/virtio_console/unbind")
        guest.run("echo virtio0 > /sys/bus/virtio/drivers/virtio_console/bind")
    assert guest.run("test -e /dev/hvc0 && cat /sys/bus/virtio/devices/virtio0/status").text == "0x0000000f"


def test_a_guest_that_died_is_followed_by_the_next(serve: Serve) -> None:
    console = Parrot()
    path = serve(console)
    for _ in range(3):
        with Uml([(path, vu.DeviceId.CONSOLE)], extra_args=QUIET) as guest:
            assert guest.run(OPEN + "printf ab >&3; head -c 4 <&3").stdout == b"abab"
            guest.kill()


def test_what_was_typed_before_the_guest_booted_is_there(boot: Boot) -> None:
    console = Console()
    console.write(b"early\n")
    assert boot(console).run("stty raw -echo < /dev/hvc0; head -n 1 < /dev/hvc0").text == "early"


def test_it_stops_while_a_guest_uses_it(tmp_path: Path) -> None:
    console = Recorder()
    server = console.start(tmp_path / "console.sock")
    with Uml([(tmp_path / "console.sock", vu.DeviceId.CONSOLE)]) as guest:
        wait_for(lambda: console.receiveq.available > 0)
        server.stop()
        # Without its console it would take its time to power off.
        guest.kill()


# --- A pseudo-terminal ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(name: str) -> Iterator[int]:
    fd = os.open(name, os.O_RDWR | os.O_NOCTTY)
    try:
        yield fd
    finally:
        os.close(fd)


def test_a_pty_is_both_ways(boot_raw: Boot) -> None:
    console = PtyConsole()
    guest = boot_raw(console)
    with opened(console.name) as terminal:
        os.write(terminal, b"typed\n")
        assert guest.run("head -c 6 < /dev/hvc0; printf 'printed\\n' > /dev/hvc0").stdout == b"typed\n"
        assert receive(lambda most: os.read(terminal, most), 8) == b"printed\n"
    # Whoever comes later finds it as it was.
    guest.run("printf later > /dev/hvc0")
    with opened(console.name) as terminal:
        assert receive(lambda most: os.read(terminal, most), 5) == b"later"


def test_a_pty_that_nobody_reads_holds_nobody_up(
    boot_raw: Boot, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    console = PtyConsole()
    (tmp_path / "text").write_bytes(PATTERN)
    guest = boot_raw(console)
    guest.run(f"cat {tmp_path / 'text'} {tmp_path / 'text'} > /dev/hvc0")
    told = "nobody reads what the guest prints; its last 65536 bytes are kept"
    wait_for(lambda: told in caplog.text)
    with opened(console.name) as terminal:
        # The terminal itself has kept the beginning, and the console the end.
        seen = b""
        while not seen.endswith(PATTERN[-BACKLOG:]):
            seen += os.read(terminal, 1 << 16)


def test_a_pty_types_faster_than_the_guest_reads(boot_raw: Boot) -> None:
    console = PtyConsole()
    guest = boot_raw(console)
    with opened(console.name) as terminal:

        def type_all() -> None:
            assert os.read(terminal, 6) == b"ready\n"
            for start in range(0, len(PATTERN), 512):
                assert os.write(terminal, PATTERN[start : start + 512]) == 512

        writer = threading.Thread(target=type_all)
        writer.start()
        digest = guest.run(f"echo ready > /dev/hvc0; sleep 1; head -c {len(PATTERN)} < /dev/hvc0 | sha256sum").text
        writer.join()
    assert digest.split(maxsplit=1)[0] == hashlib.sha256(PATTERN).hexdigest()


# --- A socket ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE)
        client.connect(str(path))
        yield client


def test_a_socket_serves_one_client_after_the_other(boot_raw: Boot, tmp_path: Path) -> None:
    path = tmp_path / "tty"
    guest = boot_raw(SocketConsole(path, mode=0o660))
    assert path.stat().st_mode & 0o777 == 0o660
    for word in (b"first", b"other"):
        with connected(path) as client:
            client.sendall(word)
            assert guest.run("head -c 5 < /dev/hvc0 | tee /dev/hvc0").stdout == word
            assert receive(client.recv, 5) == word


def test_a_second_client_waits_for_the_first(boot_raw: Boot, tmp_path: Path) -> None:
    guest = boot_raw(SocketConsole(tmp_path / "tty"))
    with connected(tmp_path / "tty") as first, connected(tmp_path / "tty") as second:
        second.sendall(b"2")
        first.sendall(b"1")
        assert guest.run("head -c 1 < /dev/hvc0").stdout == b"1"
        first.close()
        assert guest.run("head -c 1 < /dev/hvc0").stdout == b"2"


def test_a_client_gets_what_was_printed_before(boot_raw: Boot, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(PATTERN)
    guest = boot_raw(SocketConsole(tmp_path / "tty"))
    guest.run(f"cat {tmp_path / 'text'} > /dev/hvc0")
    with connected(tmp_path / "tty") as client:
        assert receive(client.recv, BACKLOG) == PATTERN[-BACKLOG:]


def test_a_client_that_has_said_everything_still_gets_the_answer(boot_raw: Boot, tmp_path: Path) -> None:
    console = SocketConsole(tmp_path / "tty")
    guest = boot_raw(console)
    with connected(tmp_path / "tty") as client:
        client.sendall(b"ask")
        client.shutdown(socket.SHUT_WR)
        guest.run("head -c 3 < /dev/hvc0; sleep 0.1; printf answer > /dev/hvc0")
        assert receive(client.recv, 6) == b"answer"
        assert console._stream is not None
    wait_for(lambda: console._stream is None)
    with connected(tmp_path / "tty") as client:
        client.sendall(b"next")
        assert guest.run("head -c 4 < /dev/hvc0").stdout == b"next"


def test_a_client_that_does_not_read_holds_nobody_up(boot_raw: Boot, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(PATTERN)
    console = SocketConsole(tmp_path / "tty")
    guest = boot_raw(console)
    with connected(tmp_path / "tty") as client:
        wait_for(lambda: console._stream)
        guest.run(f"cat {' '.join([str(tmp_path / 'text')] * 4)} > /dev/hvc0")
        client.sendall(b"alive")
        assert guest.run("head -c 5 < /dev/hvc0").stdout == b"alive"
        seen = b""
        while not seen.endswith(PATTERN[-BACKLOG:]):
            seen += client.recv(1 << 16)


def test_any_stream_will_do(boot_raw: Boot) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            console = StreamConsole(theirs)
        guest = boot_raw(console)
        ours.sendall(b"in")
        assert guest.run("head -c 2 < /dev/hvc0; printf out > /dev/hvc0").stdout == b"in"
        assert receive(ours.recv, 3) == b"out"
    wait_for(lambda: console._stream is None)
    guest.run("printf more > /dev/hvc0")


def test_a_stream_waits_for_a_slow_driver_and_then_goes_on(serve: Serve, connect: Connect, memory: Memory) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        console = StreamConsole(theirs)
        front = connect(serve(console))
        front.negotiate()
        front.share(memory)
        ring = Ring(memory, size=16)
        front.start(ring)
        sender = threading.Thread(target=ours.sendall, args=[PATTERN])
        sender.start()
        wait_for(lambda: console._room == 0)
        chain, received = ring.add([], [1000]), b""
        while len(received) < len(PATTERN):
            front.kick(ring)
            [(_, length)] = ring.wait()
            received += chain.written(length)
            chain = dataclasses.replace(chain, head=ring.add_pieces([(*piece, WRITE) for piece in chain.writable]))
        sender.join()
    assert received == PATTERN


# --- Together ---------------------------------------------------------------------------------------------------------


def test_four_devices_serve_one_guest(boot: Boot) -> None:
    console, disk, sensor = Parrot(), Blk(1 << 20), Tmp102()
    guest: Guest = boot(console, disk, i2c.Adapter(sensor), Rng(), extra_args=QUIET)
    sensor.celsius = -40
    guest.run("echo tmp102 0x48 > /sys/bus/i2c/devices/i2c-0/new_device; sleep 0.1")
    seen = guest.run(
        OPEN
        + "head -c 65536 /dev/hwrng > random; dd if=random of=/dev/vda oflag=direct status=none;"
        + "head -c 65536 /dev/vda | cmp random; printf x >&3; head -c 2 <&3; cat /sys/class/hwmon/hwmon0/temp1_input"
    )
    assert seen.text == "xx-40000"
    assert len(set(os.pread(disk.fileno(), 65536, 0))) == 256


def test_the_example_runs(program: Program) -> None:
    path, process = program("console.py")
    assert process.stdout
    screen, name = process.stdout.readline().split()
    assert screen == "screen"
    with Uml([(path, vu.DeviceId.CONSOLE)], extra_args=QUIET) as guest, opened(name) as terminal:
        guest.run(OPEN + "printf printed >&3")
        assert receive(lambda most: os.read(terminal, most), 7) == b"printed"
        os.write(terminal, b"typed\n")
        assert guest.run("head -n 1 /dev/hvc0").text == "typed"
