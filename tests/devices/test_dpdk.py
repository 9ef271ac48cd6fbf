"""Against DPDK: its virtio-user driver with a network device, and a driver of ours with its vhost device.

testpmd answers pings, so that each side sees every byte of the other. It needs no huge pages.
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

import vhost_user as vu

#: Seconds for what takes one on a machine that does nothing else.
PATIENCE = 60.0

HEADER = bytes(10) + b"\1\0"
MRG_RXBUF, IN_ORDER, RING_PACKED = 1 << 15, 1 << 35, 1 << 34
#: Pings from this number on are for finding out whether somebody is there.
HELLO = 1 << 20
OURS, THEIRS = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")


def checksum(data: bytes) -> int:
    """The ones' complement sum of RFC 1071."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


def ping(number: int) -> bytes:
    """An echo request to whoever gets it, of a length and a content of its own."""
    payload = struct.pack(">I", number) * (1 + number % 200)
    echo = struct.pack(">BBHHH", 8, 0, 0, 7, number & 0xFFFF) + payload
    echo = echo[:2] + struct.pack(">H", checksum(echo)) + echo[4:]
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(echo), 0, 0, 64, 1, 0, b"\x0a\0\0\1", b"\x0a\0\0\2")
    ip = ip[:10] + struct.pack(">H", checksum(ip)) + ip[12:]
    return THEIRS + OURS + b"\x08\0" + ip + echo


def answer(packet: bytes) -> int | None:
    """The number of the ping that the packet answers in full; None if it is something else."""
    if packet[12:14] != b"\x08\0" or packet[23] != 1 or packet[34] != 0:
        return None
    (length,) = struct.unpack_from(">H", packet, 16)
    payload = packet[42 : 14 + length]
    (number,) = struct.unpack_from(">I", payload)
    sent = ping(number)
    assert packet[:12] == OURS + THEIRS
    assert payload == sent[42:]
    assert checksum(packet[14:34]) == 0
    return int(number)


class Net(vu.Device, device_id=vu.DeviceId.NET):
    """A network card with somebody who pings at the other end of its cable."""

    mac = vu.config.raw(6, default=THEIRS)
    status = vu.config.u16(1)
    max_virtqueue_pairs = vu.config.u16(1)

    queue_pairs = vu.Queue.many("count")

    def __init__(self, pairs: int = 1) -> None:
        self.count = 2 * pairs
        self.features = MRG_RXBUF | 1 << 22 | 1 << 17
        self.max_virtqueue_pairs = pairs
        self.answers: list[tuple[int, int]] = []
        self.greeted: set[int] = set()
        self.changed = threading.Condition()
        self.errors: list[str] = []

    def on_buffers(self, queue: vu.DeviceQueue) -> None:
        if queue.index % 2 == 0:
            return
        while (request := queue.take()) is not None:
            packet = request.read()
            request.complete()
            number = answer(packet[len(HEADER) :])
            if number is not None:
                with self.changed:
                    if number < HELLO:
                        self.answers.append((queue.index // 2, number))
                    else:
                        self.greeted.add(queue.index // 2)
                    self.changed.notify_all()

    def on_queue_error(self, queue: vu.DeviceQueue, error: str) -> None:
        self.errors.append(error)

    def greet(self) -> None:
        """Ping until there is an answer on every pair: a driver drops what came before it was ready."""
        deadline = time.monotonic() + PATIENCE
        for pair in range(self.count // 2):
            while pair not in self.greeted and time.monotonic() < deadline:
                with contextlib.suppress(vu.QueueFull):
                    self.queue_pairs[2 * pair].push(HEADER + ping(HELLO), timeout=1)
                with self.changed:
                    self.changed.wait(0.05)
        assert len(self.greeted) == self.count // 2

    def wait(self, count: int) -> list[tuple[int, int]]:
        """The answers, when there are so many."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.answers) >= count, PATIENCE)
            return list(self.answers)


@contextlib.contextmanager
def run_testpmd(vdev: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """testpmd with one device that answers pings, until the end of the block, where it must end by itself."""
    processors = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    lcores = f"--lcores=0@({processors}),1@({processors})"
    eal = [lcores, "--no-huge", "-m", "128", "--no-shconf", "--no-telemetry", "--no-pci", f"--vdev={vdev}"]
    command = [
        "dpdk-testpmd",
        *eal,
        "--",
        "-i",
        "--auto-start",
        "--no-flush-rx",
        "--forward-mode=icmpecho",
        "--total-num-mbufs=4096",
    ]
    # Debian has it in the package dpdk-dev.
    process = subprocess.Popen(
        [*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = b""
    try:
        yield process
        output, _ = process.communicate(b"stop\nquit\n", timeout=PATIENCE)
    finally:
        if process.poll() is None:
            process.kill()
            output, _ = process.communicate()
        print(output.decode(errors="replace"))
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        pytest.param("mrg_rxbuf=0,in_order=0", 0, id="split"),
        pytest.param("mrg_rxbuf=0,in_order=1,vectorized=1", IN_ORDER, id="split-in-order-vectorized"),
        pytest.param("mrg_rxbuf=1,in_order=1", IN_ORDER | MRG_RXBUF, id="split-in-order-mergeable"),
        pytest.param("packed_vq=1,mrg_rxbuf=0,in_order=0,queue_size=255", RING_PACKED, id="packed"),
        pytest.param("packed_vq=1,mrg_rxbuf=1,in_order=1", RING_PACKED | IN_ORDER | MRG_RXBUF, id="packed-in-order"),
    ],
)
def test_a_driver_of_dpdk_gets_and_sends_every_packet(tmp_path: Path, options: str, wanted: int) -> None:
    device = Net()
    device.packed_rings = bool(wanted & RING_PACKED)
    device.in_order = bool(wanted & IN_ORDER)
    with device.start(tmp_path / "s"), run_testpmd(f"net_virtio_user0,path={tmp_path / 's'},{options}"):
        device.greet()
        for number in range(1500):
            device.queue_pairs[0].push(HEADER + ping(number), timeout=PATIENCE)
            # Nothing is dropped for want of room in the other direction.
            device.wait(number - 64)
        answers = device.wait(1500)
        negotiated = device.negotiated & (RING_PACKED | IN_ORDER | MRG_RXBUF)
    assert answers == [(0, number) for number in range(1500)]
    assert negotiated == wanted
    assert device.errors == []


def test_a_driver_of_dpdk_uses_many_queues(tmp_path: Path) -> None:
    device = Net(pairs=4)
    device.packed_rings = True
    vdev = f"net_virtio_user0,path={tmp_path / 's'},queues=4,packed_vq=1"
    with device.start(tmp_path / "s"), run_testpmd(vdev, "--rxq=4", "--txq=4"):
        device.greet()
        for number in range(400):
            device.queue_pairs[2 * (number % 4)].push(HEADER + ping(number), timeout=PATIENCE)
        answers = device.wait(400)
    assert sorted(answers, key=lambda pair: pair[1]) == [(number % 4, number) for number in range(400)]
    assert device.errors == []


def test_a_driver_of_dpdk_may_be_the_one_that_listens(tmp_path: Path) -> None:
    device = Net()
    vdev = f"net_virtio_user0,path={tmp_path / 's'},server=1"
    # The driver ends before its device: one that listens writes to the socket of one that has left, and dies.
    with contextlib.ExitStack() as afterwards, run_testpmd(vdev):
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "s").is_socket() and time.monotonic() < deadline:
            time.sleep(0.05)
        afterwards.enter_context(device.start(connect=tmp_path / "s"))
        device.greet()
        device.queue_pairs[0].push(HEADER + ping(7), timeout=PATIENCE)
        assert device.wait(1) == [(0, 7)]


@pytest.mark.parametrize("packed", [False, True])
def test_our_driver_works_with_the_device_of_dpdk(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / "s"
    with run_testpmd(f"net_vhost0,iface={path},queues=1"):
        deadline = time.monotonic() + PATIENCE
        while not path.is_socket() and time.monotonic() < deadline:
            time.sleep(0.05)
        with vu.Frontend.connect(path, timeout=PATIENCE) as frontend:
            frontend.negotiate((RING_PACKED | IN_ORDER if packed else 0) | 1 << 32)
            receive, send = frontend.start_queues(2)
            buffers = deque(receive.submit(writable=2048) for _ in range(128))
            deadline = time.monotonic() + PATIENCE
            while not buffers[0].done and time.monotonic() < deadline:
                send.request(HEADER + ping(HELLO), timeout=PATIENCE)
                with contextlib.suppress(vu.PeerTimeout):
                    buffers[0].wait(0.05)
            found: list[int | None] = []
            for number in range(100):
                send.request(HEADER + ping(number), timeout=PATIENCE)
            while len(found) < 100:
                number_of = answer(buffers.popleft().wait(PATIENCE)[len(HEADER) :])
                buffers.append(receive.submit(writable=2048))
                if number_of is None or number_of < HELLO:
                    found.append(number_of)
            assert found == list(range(100))
