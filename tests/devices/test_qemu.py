"""The same devices in QEMU: another front-end, another kernel, and other habits."""

from __future__ import annotations

import hashlib
import os

import pytest

import vhost_user as vu
from devices.running import wait_for
from specimens import Serve
from vhost_user.devices import Blk, Console, Rng
from vhost_user.guest import Qemu

MIB = 1 << 20

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


@pytest.mark.timeout(180)
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


@pytest.mark.timeout(180)
def test_the_guest_sees_changes_of_the_configuration(serve: Serve) -> None:
    disk, console = Blk(16 * MIB), Console()
    with Qemu([(serve(disk), vu.DeviceId.BLOCK), (serve(console), vu.DeviceId.CONSOLE)]) as guest:
        disk.resize(32 * MIB)
        wait_for(lambda: guest.run("cat /sys/block/vda/size").text == str(32 * MIB // 512))
        console.resize(132, 43)
        wait_for(lambda: guest.run("stty size < /dev/hvc0").text == "43 132")
        guest.run("dd if=/dev/zero of=/dev/vda bs=1M seek=31 count=1 oflag=direct")
