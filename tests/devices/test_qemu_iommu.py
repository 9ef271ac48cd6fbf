"""Devices behind the IOMMU that QEMU emulates, with Linux's driver for it."""

from __future__ import annotations

import hashlib
import os

import pytest

from specimens import Serve
from vhost_user.devices import Blk, Rng
from vhost_user.guest import Qemu

MIB = 1 << 20

#: A disk is written and read several times, each time from and to other pages, and compared; with a few random bytes.
USE = """
dd if=/dev/hwrng of=random bs=512 count=2 iflag=fullblock
dd if=/dev/urandom of=random bs=64k count=4 oflag=append conv=notrunc
for place in 0 5 11; do
    dd if=random of=/dev/vda oflag=direct bs=512 seek=$place
    dd if=random of=/dev/vda oflag=direct bs=64k count=4 seek=$((16 * place + 16))
    dd if=/dev/vda of=copy iflag=direct bs=64k count=4 skip=$((16 * place + 16))
    head -c 262144 random | cmp - copy
done
sha256sum < copy
"""


@pytest.mark.timeout(400)
def test_a_disk_behind_an_iommu_keeps_what_is_written(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    disk, rng = Blk(16 * MIB), Rng()
    disk.iommu = rng.iommu = True
    sockets = [(serve(disk), disk.device_id), (serve(rng), rng.device_id)]

    def use(guest: Qemu) -> None:
        digest = guest.run(f"set -e; {USE}", timeout=120).text.split()[0]
        last = os.pread(disk.fileno(), 4 * 65536, (16 * 11 + 16) * 65536)
        assert hashlib.sha256(last).hexdigest() == digest

    with Qemu(sockets, iommu=True, boot_timeout=180) as guest:
        assert guest.run("cut -c 34 /sys/bus/virtio/devices/*/features").text.split() == ["1", "1"], "ACCESS_PLATFORM"
        use(guest)
        queue = disk.queues[0]
        strict = queue.statistics
        # Each request has pages of its own, which are taken back when it is done.
        assert strict.iotlb_misses > strict.requests > 10
        assert strict.iotlb_invalidations > strict.requests
        # From here on everything is taken back at once, from time to time: the rings, too.
        guest.run("for group in /sys/bus/virtio/devices/*/../iommu_group; do echo DMA-FQ > $group/type; done")
        use(guest)
        assert queue.statistics.iotlb_misses > strict.iotlb_misses
        assert guest.stop(timeout=60)
    assert [queue.statistics.errors for queue in (*disk.queues, *rng.queues)] == [0, 0]
    assert "not mapped" not in caplog.text
