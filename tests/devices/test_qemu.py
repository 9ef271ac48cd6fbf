"""The same devices in QEMU: another front-end, another kernel, and other habits."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import time
from pathlib import Path

import pytest

import vhost_user as vu
from devices.running import MIB, MortalDisk, wait_for
from specimens import Serve
from vhost_user.devices import Blk, Console, Rng
from vhost_user.guest import Qemu

NOTHING = vu.TransportFeature(0)
RING_PACKED = vu.TransportFeature.RING_PACKED
IN_ORDER = vu.TransportFeature.IN_ORDER
ACCESS_PLATFORM = vu.TransportFeature.ACCESS_PLATFORM

#: Bytes from /dev/hwrng to the disk and back, and a word to the console.
USE = """
dd if=/dev/hwrng of=random bs=4096 count=16 iflag=fullblock
dd if=random of=/dev/vda oflag=direct bs=64k
dd if=/dev/vda of=copy iflag=direct bs=64k count=1
cmp random copy
sha256sum < copy
exec 3<>/dev/hvc0
stty raw -echo <&3
printf {0} >&3
head -c 6 <&3
"""


class Parrot(Console):
    def on_output(self, data: bytes) -> None:
        self.write(data * 2)


def test_devices_outlive_a_reboot_and_the_end_of_qemu(serve: Serve) -> None:
    disk, devices = Blk(16 * MIB, serial="outlives"), [Rng(), Parrot()]
    sockets = [(serve(device), device.device_id) for device in (disk, *devices)]

    def use(guest: Qemu, word: str) -> None:
        seen = guest.run(USE.format(word), timeout=60).text
        digest, answer = seen.split("  -\n")
        assert answer == 2 * word
        assert hashlib.sha256(os.pread(disk.fileno(), 65536, 0)).hexdigest() == digest
        assert guest.run("cat /sys/block/vda/serial").text == "outlives"

    with Qemu(sockets) as guest:
        use(guest, "one")
        guest.reboot()
        use(guest, "two")
        guest.kill()
        wait_for(lambda: not disk.connected)
    with Qemu(sockets) as guest:
        use(guest, "six")


@pytest.mark.parametrize(
    ("packed", "in_order"),
    [
        pytest.param(False, True, id="split-in-order"),
        pytest.param(True, False, id="packed"),
        pytest.param(True, True, id="packed-in-order"),
    ],
)
def test_linux_drives_the_rings_that_qemu_is_told_to_have(serve: Serve, packed: bool, in_order: bool) -> None:
    disk, devices = Blk(16 * MIB), [Rng(), Parrot()]
    for device in (disk, *devices):
        device.packed_rings, device.in_order = packed, in_order
    properties = ["packed=on"] * packed + ["in_order=on"] * in_order
    with Qemu([(serve(device), device.device_id, ",".join(properties)) for device in (disk, *devices)]) as guest:
        for word in ("one", "two"):
            digest, answer = guest.run(USE.format(word), timeout=60).text.split("  -\n")
            assert answer == 2 * word
            assert hashlib.sha256(os.pread(disk.fileno(), 65536, 0)).hexdigest() == digest
            for device in (disk, *devices):
                assert bool(device.negotiated & RING_PACKED) == packed
                assert bool(device.negotiated & IN_ORDER) == in_order
            guest.reboot()


def test_the_guest_sees_changes_of_the_configuration(serve: Serve) -> None:
    disk, console = Blk(16 * MIB), Console()
    with Qemu([(serve(disk), vu.DeviceId.BLOCK), (serve(console), vu.DeviceId.CONSOLE)]) as guest:
        disk.resize(32 * MIB)
        wait_for(lambda: guest.run("cat /sys/block/vda/size").text == str(32 * MIB // 512))
        console.resize(132, 43)
        wait_for(lambda: guest.run("stty size < /dev/hvc0").text == "43 132")
        guest.run("dd if=/dev/zero of=/dev/vda bs=1M seek=31 count=1 oflag=direct")


#: How often the disk is killed: more by hand.
DEATHS = int(os.environ.get("DEATHS", "6"))

#: Four writers at once, each with a piece of the disk to itself, until they are told to stop. Whatever they have
#: written they read again, twice, and write over it: a request that is lost fails, and one that is done again too late
#: brings the last content back.
WRITE_AND_VERIFY = """
writer() {
    until test -e enough; do
        head -c 65536 /dev/urandom > new$1
        dd if=new$1 of=/dev/vda bs=4k seek=$(($1 * 16)) count=16 oflag=direct conv=notrunc,fsync || return 1
        for again in 1 2; do
            dd if=/dev/vda of=read$1 bs=4k skip=$(($1 * 16)) count=16 iflag=direct || return 2
            cmp new$1 read$1 || return 3
        done
    done
}
for number in 0 1 2 3; do
    (writer $number; echo $? > status$number) > log$number 2>&1 &
done
"""
STOP = """
touch enough
for number in 0 1 2 3; do
    until test -s status$number; do sleep 0.1; done
    test $(cat status$number) = 0 || { cat log$number; exit 1; }
done
cat new0 new1 new2 new3 | sha256sum
"""


# The ring behind an IOMMU is so large that Linux takes pages for it from all over its memory.
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("options", "properties", "features"),
    [
        pytest.param([], "", NOTHING, id="split"),
        pytest.param(["--in-order"], "in_order=on", IN_ORDER, id="split-in-order"),
        pytest.param(["--packed-rings"], "packed=on", RING_PACKED, id="packed"),
        pytest.param(
            ["--packed-rings", "--in-order"], "packed=on,in_order=on", RING_PACKED | IN_ORDER, id="packed-in-order"
        ),
        pytest.param(["--iommu"], "queue-size=1024", ACCESS_PLATFORM, id="iommu"),
    ],
)
def test_a_guest_notices_nothing_of_a_disk_that_is_killed_while_it_writes(
    level: None, tmp_path: Path, options: list[str], properties: str, features: vu.TransportFeature
) -> None:
    iommu = bool(features & ACCESS_PLATFORM)
    dice = random.Random(4)
    with contextlib.closing(MortalDisk(tmp_path, *options)) as disk:
        wait_for(disk.socket.is_socket, 30)
        sockets = [(disk.socket, vu.DeviceId.BLOCK, properties)]
        with Qemu(sockets, reconnect=0.1, iommu=iommu, boot_timeout=180) as guest:
            negotiated = int(guest.run("cat /sys/bus/virtio/devices/*/features").text[::-1], 2)
            assert negotiated & (RING_PACKED | IN_ORDER | ACCESS_PLATFORM) == features
            guest.run(WRITE_AND_VERIFY)
            for _ in range(DEATHS):
                wait_for(lambda: disk.in_use, 30)
                time.sleep(dice.random() / 4)
                disk.die()
            written = guest.run(STOP, timeout=60).text.split()[0]
            assert "I/O error" not in guest.run("dmesg").text
        assert hashlib.sha256(disk.image.read_bytes()[: 4 * 65536]).hexdigest() == written


def test_two_queues_of_a_disk_are_worked_on_by_two_threads_until_qemu_is_killed(serve: Serve) -> None:
    disk = Blk(16 * MIB, num_queues=2)
    disk.workers = 2

    def wait_for_requests(number: int) -> None:
        enough = [queue.statistics.requests + number for queue in disk.requestqs]
        wait_for(lambda: all(q.statistics.requests > n for q, n in zip(disk.requestqs, enough, strict=True)), 60)

    with Qemu([(serve(disk), vu.DeviceId.BLOCK, "num-queues=2")], cpus=2) as guest:
        guest.run(WRITE_AND_VERIFY)
        wait_for_requests(100)
        written = guest.run(STOP, timeout=60).text.split()[0]
        assert hashlib.sha256(os.pread(disk.fileno(), 4 * 65536, 0)).hexdigest() == written
        assert "I/O error" not in guest.run("dmesg").text
        guest.run("rm enough\n" + WRITE_AND_VERIFY)
        wait_for_requests(50)
        guest.kill()
        wait_for(lambda: not disk.connected, 30)
    assert [queue.in_flight for queue in disk.requestqs] == [0, 0]
