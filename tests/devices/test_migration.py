"""A guest that uses its disks moves from one QEMU, and one set of devices, to another one."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

import vhost_user as vu
from devices.running import wait_for
from specimens import Serve
from vhost_user.devices import Blk
from vhost_user.devices.blk import SECTOR
from vhost_user.guest import Qemu

MIB = 1 << 20
BLOCK = MIB // 4

#: Until it is told to stop: bytes to the first disk and back, past the page cache; and two readers of the other disks,
#: which have no end. Each has one buffer, of one block, that only the device writes to, and that waits for somebody to
#: take the block for most of the time: so no page of it is sent again because somebody else wrote there.
LOAD = """
copy() {
    round=0
    while [ ! -e stop ]; do
        at=$((round % 64 * 4))
        head -c 262144 /dev/urandom > out
        dd if=out of=/dev/vda bs=64K seek=$at oflag=direct 2>/dev/null || echo write $round >> failed
        dd if=/dev/vda of=in bs=64K skip=$at count=4 iflag=direct 2>/dev/null || echo read $round >> failed
        cmp out in >> failed 2>&1
        round=$((round + 1))
        echo $round > copied
    done
    touch ended.vda
}
read_on() {
    dd if=/dev/$1 bs=256K iflag=direct 2>/dev/null | while [ ! -e stop ]; do
        dd bs=256K count=1 iflag=fullblock 2>/dev/null | md5sum >> sums.$1
        sleep 0.2
    done
    touch ended.$1
}
touch failed sums.vdb sums.vdc
echo 0 > copied
copy &
read_on vdb &
read_on vdc &
"""


class Numbers(Blk):
    """A large disk. Every eight bytes of it are the number of their sector."""

    def __init__(self) -> None:
        super().__init__(1 << 40, read_only=True)
        self._lock = threading.Lock()
        self._held: list[vu.Request] | None = None

    def read(self, request: vu.Request, offset: int, count: int) -> None:
        request.write(numbers(offset, count))

    def hold(self) -> None:
        """Keep the requests from now on, until the queue is stopped."""
        self._held = []

    @property
    def holds(self) -> bool:
        return bool(self._held)

    def execute(self, request: vu.Request) -> None:
        if self._held is None:
            super().execute(request)
        else:
            self._held.append(request.detach())

    def on_queue_stop(self, queue: vu.DeviceQueue) -> None:
        held, self._held = self._held or [], None
        for request in held:
            super().execute(request)
            request.complete()


def numbers(offset: int, count: int) -> bytes:
    """What a disk of numbers has there."""
    sectors = range(offset // SECTOR, (offset + count) // SECTOR)
    return b"".join(sector.to_bytes(8, "little") * (SECTOR // 8) for sector in sectors)


def sums(guest: Qemu, disk: str) -> list[str]:
    """Of each block that was read from it."""
    return [line.split()[0] for line in guest.run(f"cat sums.{disk}").text.splitlines()]


@pytest.mark.timeout(300)
def test_a_guest_migrates_under_load_and_its_memory_is_what_the_devices_wrote(serve: Serve, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(16 * MIB))
    running, holding = Numbers(), Numbers()
    here, there = [Blk(disk), running, holding], [Blk(disk), Numbers(), Numbers()]
    # The disk that keeps requests has a split ring, the others packed ones.
    formats = ["packed=on", "packed=on", ""]
    for device, properties in zip(here + there, formats * 2, strict=True):
        device.packed_rings = bool(properties)

    def serve_all(devices: list[Blk]) -> list[tuple[Path, int, str]]:
        return [(serve(device), device.device_id, its) for device, its in zip(devices, formats, strict=True)]

    def some_requests() -> None:
        """Until the devices have filled buffers that were sent before, and one of them keeps requests; or the guest is
        gone already, as it is when it did nothing for a moment.
        """
        queues = [running.queues[0], holding.queues[0]]
        enough = [queue.statistics.requests + 4 for queue in queues]

        def is_gone() -> bool:
            return any(queue.status != "running" for queue in queues)

        def have_read() -> bool:
            return all(queue.statistics.requests > number for queue, number in zip(queues, enough, strict=True))

        wait_for(lambda: have_read() or is_gone(), 60)
        holding.hold()
        wait_for(lambda: holding.holds or is_gone(), 60)

    with Qemu(serve_all(here)) as source:
        source.run(LOAD)
        source.run("until [ -s sums.vdb -a -s sums.vdc ]; do sleep 0.1; done")
        with source.receiver(serve_all(there)) as target:
            source.migrate(target, some_requests, timeout=120)
            before = {name: len(sums(target, name)) for name in ("vdb", "vdc")}
            for name, number in before.items():
                target.run(f"until [ $(wc -l < sums.{name}) -gt {number + 2} ]; do sleep 0.1; done", timeout=60)
            ended = "[ -e ended.vda -a -e ended.vdb -a -e ended.vdc ]"
            target.run(f"touch stop; until {ended}; do sleep 0.1; done", timeout=60)
            assert target.run("cat failed").text == ""
            is_packed = [bool(device.negotiated & vu.TransportFeature.RING_PACKED) for device in there]
            assert is_packed == [True, True, False]
            # Nobody has read the blocks again that were in memory when the guest moved.
            for name in before:
                seen = sums(target, name)
                assert seen == [hashlib.md5(numbers(n * BLOCK, BLOCK)).hexdigest() for n in range(len(seen))]
