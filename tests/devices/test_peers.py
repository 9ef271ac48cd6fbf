"""Programs that nobody here wrote: libblkio, in QEMU's block layer, drives a disk of ours; virtiofsd, passt and
vhost-device-vsock have devices for a driver of ours. `guest/build peers` fetches them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vhost_user as vu
from devices.running import MIB, wait_for
from devices.test_dpdk import OURS, PATIENCE
from specimens import Serve, is_listening
from vhost_user.devices import Blk
from vhost_user.guest import _newest_build

CONTENT = b"".join(number.to_bytes(4, "little") for number in range(10000))
FUSE_LOOKUP, FUSE_OPEN, FUSE_READ, FUSE_INIT = 1, 14, 15, 26
VSOCK = struct.Struct("<QQIIIHHIII")
STREAM, REQUEST, RESPONSE, RW = 1, 1, 2, 5
HOST, GUEST = 2, 3


@contextlib.contextmanager
def running(path: Path, program: str, *arguments: str) -> Iterator[None]:
    """A program that makes a socket, until the end of the block."""
    log = path.with_suffix(".log")
    command = [str(_newest_build(f"peers-*/{program}")), *arguments]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            wait_for(lambda: is_listening(path) or process.poll() is not None, PATIENCE)
            assert process.poll() is None, log.read_text()
            yield
        finally:
            process.terminate()
            process.wait()
            path.unlink(missing_ok=True)


# --- libblkio ---


def use_disk(path: Path) -> None:
    """As a disk of QEMU's block layer. It compares what it reads with what it wrote."""
    commands = ["write -P 1 0 64k", "read -P 1 0 64k", "write -z 4k 4k", "discard 8k 4k", "flush", "read -P 0 4k 4k"]
    commands += [f"aio_write -P {number} {number}M 1M" for number in range(2, 10)]
    commands += ["aio_flush", *(f"read -P {number} {number}M 1M" for number in range(2, 10))]
    image = f"driver=virtio-blk-vhost-user,path={path},cache.direct=on"
    arguments = [argument for command in commands for argument in ("-c", command)]
    done = subprocess.run(
        [_newest_build("peers-*/qemu-io"), "--image-opts", image, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "failed" not in done.stdout


def test_libblkio_drives_a_disk(serve: Serve) -> None:
    disk = Blk(16 * MIB)
    use_disk(serve(disk))
    assert [os.pread(disk.fileno(), 1, number * MIB) for number in range(2, 10)] == [
        bytes([number]) for number in range(2, 10)
    ]
    assert not disk.requestqs[0].statistics.errors


# --- virtiofsd ---


@contextlib.contextmanager
def files(folder: Path, name: str = "files") -> Iterator[Path]:
    """A file system with a file."""
    shared = folder / "shared"
    shared.mkdir(exist_ok=True)
    (shared / "numbers").write_bytes(CONTENT)
    path = folder / name
    with running(path, "virtiofsd", f"--socket-path={path}", f"--shared-dir={shared}", "--tag=some", "--sandbox=none"):
        yield path


def fuse(queue: vu.DriverQueue, operation: int, node: int, body: bytes, room: int = 4096) -> bytes:
    """What FUSE answers."""
    header = struct.pack("<IIQQIIII", 40 + len(body), operation, 1, node, 0, 0, 0, 0)
    length, error, number, answer = struct.unpack(
        f"<IiQ{room}s", queue.request(header + body, 16 + room).ljust(16 + room)
    )
    assert (error, number) == (0, 1)
    return bytes(answer[: length - 16])


def read(queue: vu.DriverQueue, node: int, handle: int) -> bytes:
    return fuse(queue, FUSE_READ, node, struct.pack("<QQIIQII", handle, 0, len(CONTENT), 0, 0, 0, 0), len(CONTENT))


def use_files(path: Path, folder: Path) -> None:
    """A file is read, and read on in another virtiofsd, which gets the state of the first."""
    with vu.Frontend.connect(path, timeout=PATIENCE) as frontend:
        frontend.negotiate()
        assert frontend.read_config(40) == struct.pack("<36sI", b"some", 1)
        _, requests = frontend.start_queues(2)
        fuse(requests, FUSE_INIT, 0, struct.pack("<4I48x", 7, 38, 65536, 0))
        (node,) = struct.unpack_from("<Q", fuse(requests, FUSE_LOOKUP, 1, b"numbers\0"))
        (handle,) = struct.unpack_from("<Q", fuse(requests, FUSE_OPEN, node, bytes(8)))
        assert read(requests, node, handle) == CONTENT
        log = vu.DirtyLog(frontend.memory)
        frontend.set_log(log)
        frontend.log_all()
        assert read(requests, node, handle) == CONTENT
        assert log.take()
        for queue in frontend.queues:
            queue.stop()
        state = frontend.save_state()
    with files(folder, "other-files") as there, vu.Frontend.connect(there, timeout=PATIENCE) as frontend:
        frontend.negotiate()
        frontend.load_state(state)
        _, requests = frontend.start_queues(2)
        assert read(requests, node, handle) == CONTENT


# --- passt ---


@contextlib.contextmanager
def network(folder: Path) -> Iterator[Path]:
    """A network with a router at 10.0.2.2."""
    address = ["--ipv4-only", "--address=10.0.2.15", "--netmask=24", "--gateway=10.0.2.2", "--dns=none"]
    path = folder / "network"
    with running(path, "passt", "--vhost-user", "--foreground", f"--socket={path}", *address):
        yield path
    (folder / "network.repair").unlink()  # another socket of its own


def use_network(path: Path, _: Path) -> None:
    """The router tells its address."""
    question = bytes.fromhex("ffffffffffff") + OURS + struct.pack(">HHHBBH", 0x806, 1, 0x800, 6, 4, 1)
    question += OURS + bytes([10, 0, 2, 15]) + bytes(6) + bytes([10, 0, 2, 2])
    with vu.Frontend.connect(path, timeout=PATIENCE) as frontend:
        frontend.negotiate()
        receive, send = frontend.start_queues(2)
        frontend.send_rarp(OURS)
        log = vu.DirtyLog(frontend.memory)
        frontend.set_log(log)
        frontend.log_all()
        packets = [receive.submit(writable=2048) for _ in range(16)]
        send.request(bytes(12) + question)
        answer = next(packet for packet in map(vu.Completion.wait, packets) if packet[24:26] == b"\x08\x06")[12:]
        assert log.take()
        assert answer[:6] == OURS
        assert answer[20:22] == b"\0\2"
        assert answer[22:28] == answer[6:12]
        assert answer[28:42] == bytes([10, 0, 2, 2]) + OURS + bytes([10, 0, 2, 15])


# --- vhost-device-vsock ---


@contextlib.contextmanager
def connections(folder: Path) -> Iterator[Path]:
    """A socket device, whose host has a Unix socket beside it."""
    path, host = folder / "connections", folder / "host"
    with running(path, "vhost-device-vsock", "--vm", f"guest-cid={GUEST},socket={path},uds-path={host}"):
        yield path
    host.unlink(missing_ok=True)


def use_connections(path: Path, folder: Path) -> None:
    """The host connects, and bytes go both ways."""
    with vu.Frontend.connect(path, timeout=PATIENCE) as frontend, socket.socket(socket.AF_UNIX) as host:
        frontend.negotiate()
        assert frontend.read_config(8) == struct.pack("<Q", GUEST)
        receive, send = frontend.start_queues(2)
        packets = [receive.submit(writable=[VSOCK.size, 4096]) for _ in range(16)]
        host.settimeout(PATIENCE)
        host.connect(str(folder / "host"))
        host.sendall(b"CONNECT 1234\n")
        source, destination, port, *rest = VSOCK.unpack(packets[0].wait())
        assert [source, destination, *rest[:4]] == [HOST, GUEST, 1234, 0, STREAM, REQUEST]
        send.request(VSOCK.pack(GUEST, HOST, 1234, port, 0, STREAM, RESPONSE, 0, 65536, 0))
        assert host.recv(64).startswith(b"OK ")
        host.sendall(b"to the guest")
        # It may tell before how much it has room for.
        packet = next(packet for packet in map(vu.Completion.wait, packets[1:]) if VSOCK.unpack_from(packet)[6] == RW)
        assert packet[VSOCK.size :] == b"to the guest"
        send.request([VSOCK.pack(GUEST, HOST, 1234, port, 11, STREAM, RW, 0, 65536, 12), b"to the host"])
        assert host.recv(64) == b"to the host"


#: How each is started, and used.
BACK_ENDS: dict[str, tuple[Callable[[Path], contextlib.AbstractContextManager[Path]], Callable[[Path, Path], None]]] = {
    "virtiofsd": (files, use_files),
    "passt": (network, use_network),
    "vhost-device-vsock": (connections, use_connections),
}


@pytest.mark.parametrize("name", BACK_ENDS)
def test_a_driver_of_ours_drives_their_device(level: None, tmp_path: Path, name: str) -> None:
    start, use = BACK_ENDS[name]
    with start(tmp_path) as path:
        use(path, tmp_path)
