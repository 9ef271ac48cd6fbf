"""Packed rings, and requests completed in order, with a Linux that takes both wherever they are offered."""

from __future__ import annotations

import hashlib
import os

import pytest

import vhost_user as vu
from devices.running import Boot
from vhost_user.devices import Blk, Rng

MIB = 1 << 20

#: Bytes from /dev/hwrng to the disk and back, several requests at a time.
USE = """
mount -t tmpfs none /tmp
dd if=/dev/hwrng of=/tmp/random bs=4096 count=16 iflag=fullblock status=none
for part in 0 1 2 3; do
    dd if=/tmp/random of=/dev/vda bs=4096 count=4 skip=$((part * 4)) seek=$((part * 4)) conv=notrunc status=none &
done
wait
sync
echo 3 > /proc/sys/vm/drop_caches
head -c 65536 /dev/vda > /tmp/copy
cmp /tmp/random /tmp/copy
sha256sum < /tmp/copy
umount /tmp
"""


@pytest.mark.parametrize("in_order", [False, True], ids=["any_order", "in_order"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_linux_drives_both_formats_in_any_order_and_in_its_own(boot: Boot, packed: bool, in_order: bool) -> None:
    disk, rng = Blk(16 * MIB), Rng()
    for device in (disk, rng):
        device.packed_rings, device.in_order = packed, in_order
    guest = boot(disk, rng)
    for _ in range(2):
        digest = guest.run(USE, timeout=30).text.split()[0]
        assert hashlib.sha256(os.pread(disk.fileno(), 65536, 0)).hexdigest() == digest
        for device in (disk, rng):
            assert bool(device.negotiated & vu.TransportFeature.RING_PACKED) == packed
            assert bool(device.negotiated & vu.TransportFeature.IN_ORDER) == in_order
        # The driver goes away and comes back to rings that are new: it says that they begin at 0, of either format.
        guest.run("echo virtio1 > /sys/bus/virtio/drivers/virtio_rng/unbind")
        guest.run("echo virtio1 > /sys/bus/virtio/drivers/virtio_rng/bind")
