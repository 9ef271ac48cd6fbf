"""A guest that uses its disks moves from one QEMU, and one set of devices, to another one."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import threading
from pathlib import Path
from typing import BinaryIO

import pytest

import vhost_user as vu
from devices.running import wait_for
from specimens import Serve, needs_userfault
from vhost_user.devices import Blk, Rng
from vhost_user.devices.blk import SECTOR
from vhost_user.guest import GuestError, Qemu

MIB = 1 << 20
BLOCK = MIB // 4

#: Until they are told to stop: bytes to the first disk and back, past the page cache; and readers of other disks, which
#: have no end. Each reader has one buffer, of one block, that only the device writes to, and that waits for somebody to
#: take the block for most of the time: so no page of it is sent again because somebody else wrote there.
FUNCTIONS = """
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
count() {
    while [ ! -e stop ]; do
        dd if=/dev/hwrng bs=64 count=1 iflag=fullblock >> numbers 2>/dev/null || sleep 0.1
    done
    touch ended.rng
}
"""
LOAD = """
echo vda vdb vdc > jobs
touch failed sums.vdb sums.vdc
echo 0 > copied
copy &
read_on vdb &
read_on vdc &
"""

COPY_AND_COUNT = """
echo vda vdb rng > jobs
touch failed sums.vdb numbers
echo 0 > copied
copy &
read_on vdb &
count &
"""

#: The same reader, and one write that nobody waits for.
WRITE_AND_READ = """
echo vdb > jobs
touch failed sums.vdb
read_on vdb &
(dd if=content of=/dev/vda bs=1M oflag=direct; echo $? > written) 2> /dev/null &
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


def check_and_stop(guest: Qemu, read: list[str]) -> None:
    """The load goes on, and nothing was wrong of what it has read from those disks."""
    before = {name: len(sums(guest, name)) for name in read}
    for name, number in before.items():
        guest.run(f"until [ $(wc -l < sums.{name}) -gt {number + 2} ]; do sleep 0.1; done", timeout=120)
    guest.run("touch stop; for job in $(cat jobs); do until [ -e ended.$job ]; do sleep 0.1; done; done", timeout=120)
    assert guest.run("cat failed").text == ""
    # Nobody has read the blocks again that were in memory when the guest moved.
    for name in before:
        seen = sums(guest, name)
        assert seen == [hashlib.md5(numbers(n * BLOCK, BLOCK)).hexdigest() for n in range(len(seen))]


# The rings are so large that behind an IOMMU Linux takes pages for them from all over its memory.
@pytest.mark.timeout(600)
@pytest.mark.parametrize("iommu", [False, True], ids=["", "iommu"])
def test_a_guest_migrates_under_load_and_its_memory_is_what_the_devices_wrote(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture, iommu: bool
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(16 * MIB))
    running, holding = Numbers(), Numbers()
    here, there = [Blk(disk), running, holding], [Blk(disk), Numbers(), Numbers()]
    # The disk that keeps requests has a split ring, the others packed ones.
    are_packed = [True, True, False]
    for device, is_packed in zip(here + there, are_packed * 2, strict=True):
        device.packed_rings, device.iommu = is_packed, iommu

    def serve_all(devices: list[Blk]) -> list[tuple[Path, int, str]]:
        properties = {True: "packed=on,queue-size=1024", False: "queue-size=1024"}
        return [(serve(device), device.device_id, properties[device.packed_rings]) for device in devices]

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

        wait_for(lambda: have_read() or is_gone(), 120)
        holding.hold()
        wait_for(lambda: holding.holds or is_gone(), 120)

    with Qemu(serve_all(here), iommu=iommu, boot_timeout=180) as source:
        source.run(FUNCTIONS + LOAD)
        source.run("until [ -s sums.vdb -a -s sums.vdc ]; do sleep 0.1; done")
        with source.receiver(serve_all(there)) as target:
            source.migrate(target, some_requests, timeout=240)
            check_and_stop(target, ["vdb", "vdc"])
            for feature, expected in (
                (vu.TransportFeature.RING_PACKED, are_packed),
                (vu.TransportFeature.ACCESS_PLATFORM, [iommu] * 3),
            ):
                assert [bool(device.negotiated & feature) for device in there] == expected
    assert "dirty log" not in caplog.text


class Counter:
    """A source of anything but random numbers, each on a line of eight bytes."""

    def __init__(self, first: int) -> None:
        self.first = self.next = first

    def __call__(self, count: int) -> bytes:
        begin, self.next = self.next, self.next + count // 8
        return b"".join(b"%07d\n" % number for number in range(begin, self.next))


def test_a_guest_migrates_with_a_device_that_cannot_when_it_is_unplugged(serve: Serve, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(16 * MIB))
    counters = [Counter(0), Counter(5_000_000)]

    def disks() -> list[tuple[Path, int]]:
        return [(serve(disk), Qemu.DISK) for disk in (Blk(image), Numbers())]

    def plug(guest: Qemu, device: Rng) -> None:
        address = {"type": "unix", "data": {"path": str(serve(device))}}
        guest.monitor("chardev-add", id="rng", backend={"type": "socket", "data": {"addr": address, "server": False}})
        guest.monitor("device_add", driver="vhost-user-rng-pci", id="rng", bus="socket", chardev="rng")
        number = guest.run("wc -l < numbers").text
        guest.run(f"until [ $(wc -l < numbers) -gt {number} ]; do sleep 0.1; done")

    def unplug(guest: Qemu) -> None:
        def is_there() -> bool:
            return any(part["name"] == "rng" for part in guest.monitor("qom-list", path="/machine/peripheral"))

        guest.monitor("device_del", id="rng")
        wait_for(lambda: not is_there(), 60)

    with Qemu(disks(), extra_args=["-device", "pcie-root-port,id=socket"]) as source:
        source.run(FUNCTIONS + COPY_AND_COUNT)
        source.run("until [ -s sums.vdb ]; do sleep 0.1; done")
        plug(source, Rng(counters[0]))
        with pytest.raises(GuestError, match="non-migratable device"):
            source.monitor("migrate", uri="exec:cat >/dev/null")
        unplug(source)
        with source.receiver(disks()) as target:
            source.migrate(target, timeout=240)
            plug(target, Rng(counters[1]))
            check_and_stop(target, ["vdb"])
            numbers = [int(line) for line in target.run("cat numbers").text.splitlines()]
    # Each is one that a device has given, and was read once.
    assert numbers == sorted(set(numbers))
    for counter in counters:
        assert any(number in range(counter.first, counter.next) for number in numbers)
    assert all(any(number in range(counter.first, counter.next) for counter in counters) for number in numbers)


class Files(vu.Device, device_id=26):
    """A file system that answers every question with an error. What it knows of its driver is `state`."""

    hiprio = vu.Queue()
    requests = vu.Queue()

    def __init__(self, state: bytes = b"") -> None:
        self.state = state

    @requests.handler
    def refuse(self, request: vu.Request) -> None:
        _, _, unique = request.unpack("<IIQ")
        request.write(struct.pack("<IiQ", 16, -errno.ENOSYS, unique))

    def on_save_state(self, file: BinaryIO) -> None:
        file.write(self.state)

    def on_load_state(self, file: BinaryIO) -> None:
        self.state = file.read()


class Choosy(Files):
    def on_load_state(self, file: BinaryIO) -> None:
        raise ValueError("that is nothing that I know of")


def test_the_state_of_a_device_goes_along_or_the_guest_stays(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    # More than what fits in a pipe.
    here, choosy, there = Files(os.urandom(MIB)), Choosy(), Files()

    def attach(device: Files) -> list[tuple[Path, int, str]]:
        return [(serve(device), device.device_id, "tag=files")]

    def use(guest: Qemu, device: Files) -> None:
        before = device.queues[1].statistics.requests
        guest.run("mount -t virtiofs files /mnt; ls /mnt; umount /mnt", check=False)
        assert device.queues[1].statistics.requests > before

    with Qemu(attach(here)) as source:
        use(source, here)
        with source.receiver(attach(choosy)) as target, pytest.raises(GuestError, match="did not migrate"):
            source.migrate(target)
        assert "that is nothing that I know of" in caplog.text
        use(source, here)
        with source.receiver(attach(there)) as target:
            source.migrate(target)
            assert there.state == here.state
            use(target, there)


class Deaf(Blk):
    """A disk that begins with what it is to write, and never ends."""

    def __init__(self, image: Path) -> None:
        super().__init__(image)
        # One write of the guest's program may be several requests.
        self.begun: list[vu.Request] = []

    def execute(self, request: vu.Request) -> None:
        if request.readable < SECTOR:
            super().execute(request)
        else:
            self.begun.append(request.detach())


@needs_userfault
def test_a_guest_goes_on_before_its_memory_is_there_and_what_was_in_flight_is_done_there(
    serve: Serve, tmp_path: Path
) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    deaf, hearing = Deaf(image), Blk(image)
    here, there = [deaf, Numbers()], [hearing, Numbers()]
    for device in (*here, *there):
        device.postcopy = True

    def attach(devices: list[Blk]) -> list[tuple[Path, int, str]]:
        return [(serve(device), device.device_id, "inflight-migration=on") for device in devices]

    def take_up() -> None:
        """The device there asks for what the guest has written: nobody else looks at it."""
        wait_for(lambda: hearing.queues[0].statistics.requests, 120)

    # QEMU tells of each page that a device asks for.
    with Qemu(attach(here), extra_args=["-trace", "vhost_user_postcopy_fault_handler_found"]) as source:
        digest = source.run("head -c 1048576 /dev/urandom > content; sha256sum content").text.split()[0]
        source.run(FUNCTIONS + WRITE_AND_READ)
        source.run("until [ -s sums.vdb ]; do sleep 0.1; done")
        wait_for(lambda: deaf.begun, 30)
        with source.receiver(attach(there)) as target:
            source.migrate(target, take_up, postcopy=True, timeout=180)
            assert target.run("until [ -s written ]; do sleep 0.1; done; cat written", timeout=60).text == "0"
            assert hashlib.sha256(image.read_bytes()).hexdigest() == digest
            assert "vhost_user_postcopy_fault_handler_found 0:" in target.log
            check_and_stop(target, ["vdb"])
