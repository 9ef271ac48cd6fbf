"""A guest that uses its disks moves from one QEMU, and one set of devices, to another one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from devices.running import wait_for
from specimens import Serve
from vhost_user.devices import Blk
from vhost_user.guest import Qemu

MIB = 1 << 20

#: Until it is told to stop: bytes to the first disk and back, past the page cache; and a little more of the second one,
#: into the page cache, where it stays as long as the disk is open.
LOAD = """
load() {
    exec 4< /dev/vdb
    round=0
    while [ ! -e stop ]; do
        at=$((round % 64 * 4))
        head -c 262144 /dev/urandom > out
        dd if=out of=/dev/vda bs=64K seek=$at oflag=direct 2>/dev/null || echo write $round >> failed
        dd if=/dev/vda of=in bs=64K skip=$at count=4 iflag=direct 2>/dev/null || echo read $round >> failed
        cmp out in >> failed 2>&1
        head -c 131072 <&4 > /dev/null
        round=$((round + 1))
        echo $round > rounds
    done
    touch ended
    sleep 1000
}
touch failed
echo 0 > rounds
load &
"""


@pytest.mark.timeout(300)
def test_a_guest_migrates_under_load_and_its_memory_is_what_the_devices_wrote(serve: Serve, tmp_path: Path) -> None:
    disk, content = tmp_path / "disk", tmp_path / "content"
    disk.write_bytes(bytes(16 * MIB))
    content.write_bytes(os.urandom(16 * MIB))
    here, there = [[Blk(disk), Blk(content, read_only=True)] for _ in range(2)]

    def some_requests() -> None:
        """Until the devices have filled some pages that were sent before, or the guest is gone already."""
        queue = here[1].queues[0]
        before = queue.statistics.requests
        wait_for(lambda: queue.statistics.requests > before + 8 or queue.status != "running", 60)

    with Qemu([(serve(device), device.device_id) for device in here]) as source:
        source.run(LOAD)
        with source.receiver([(serve(device), device.device_id) for device in there]) as target:
            source.migrate(target, some_requests, timeout=120)
            rounds = int(target.run("cat rounds").text)
            target.run(f"until [ $(cat rounds) -gt {rounds + 3} ]; do sleep 0.1; done", timeout=60)
            target.run("touch stop; until [ -e ended ]; do sleep 0.1; done", timeout=60)
            assert target.run("cat failed").text == ""
            # What the devices on the other side have read is still in memory, and not read again.
            seen = target.run("sha256sum < /dev/vdb", timeout=60).text.split()[0]
            assert seen == hashlib.sha256(content.read_bytes()).hexdigest()
    sizes = [device.queues[0].statistics.bytes_written for device in (here[1], there[1])]
    assert all(0 < size < 16 * MIB for size in sizes), sizes
