"""Each of QEMU's front-ends, and a device behind it that does its work: driven by hand, and some by Linux."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import vhost_user as vu
from devices.one_of_each import Crypto, Files, Gpio, Gpu, Keyboard, Network, Rtc, Scsi, Sound, Spi, Vsock, Windows
from devices.qtest import Machine, Pci
from devices.running import wait_for
from specimens import Serve
from vhost_user.devices import Blk, Console, Rng
from vhost_user.devices.i2c import Adapter
from vhost_user.devices.tmp102 import Tmp102
from vhost_user.guest import Qemu

#: Of the PCI bus; QEMU's own devices are elsewhere.
SLOT = 3

#: What a driver does with the device that it has set up.
Use = Callable[[Any, Pci, Machine], None]


class Parrot(Console):
    """Types what was printed."""

    def on_output(self, data: bytes) -> None:
        self.write(data)


@dataclass(frozen=True)
class FrontEnd:
    """A device model of QEMU, a device for it, what the driver does, and how many queues it has."""

    device: Callable[[], vu.Device]
    use: Use
    queues: int
    properties: str = ""


def read_random(device: Rng, pci: Pci, _: Machine) -> None:
    (random,) = pci.queues[0].request(64)
    assert random != bytes(64)


def read_and_write_a_disk(device: Blk, pci: Pci, _: Machine) -> None:
    assert struct.unpack("<Q", pci.config(0, 8)) == (2048,)
    assert pci.queues[0].request(struct.pack("<IIQ", 1, 0, 5), b"x" * 512, 1) == [b"\0"]
    assert pci.queues[0].request(struct.pack("<IIQ", 0, 0, 5), 512, 1) == [b"x" * 512, b"\0"]


def write_to_a_console(_: Parrot, pci: Pci, __: Machine) -> None:
    assert struct.unpack("<HH", pci.config(0, 4)) == (80, 24)
    pci.queues[1].request(b"hello")
    assert pci.queues[0].request(5) == [b"hello"]


def read_a_sensor(device: Adapter, pci: Pci, _: Machine) -> None:
    (requestq,) = pci.queues
    assert requestq.request(struct.pack("<HxxI", 0x48 << 1, 1), b"\0", 1) == [b"\0"]
    assert requestq.request(struct.pack("<HxxI", 0x48 << 1, 2), 2, 1) == [b"\x19\0", b"\0"]  # 25 °C
    assert requestq.request(struct.pack("<HxxI", 0x49 << 1, 2), 2, 1)[1] == b"\1"


def switch_lines(device: Gpio, pci: Pci, _: Machine) -> None:
    requestq, eventq = pci.queues
    assert struct.unpack("<HxxI", pci.config(0, 8)) == (4, len(Gpio.NAMES))
    assert requestq.request(struct.pack("<HHI", 1, 0, 0), 1 + len(Gpio.NAMES)) == [b"\0" + Gpio.NAMES]
    device.levels[1] = 1
    assert requestq.request(struct.pack("<HHI", 4, 1, 0), 2) == [b"\0\1"]
    requestq.request(struct.pack("<HHI", 5, 3, 1), 2)
    assert device.levels == [0, 1, 0, 1]
    requestq.request(struct.pack("<HHI", 6, 2, 1), 2)
    eventq.submit(struct.pack("<H", 2), 1)
    # Its turn comes after what the driver has told it of.
    requestq.request(struct.pack("<HHI", 4, 2, 0), 2)
    wait_for(lambda: device.eventq.in_flight == 1, 30)
    device.interrupt(2)
    assert eventq.wait() == [b"\1"]


def turn_bytes_over(device: Spi, pci: Pci, _: Machine) -> None:
    assert pci.config(0, 2) == b"\2\1"
    (requestq,) = pci.queues
    assert requestq.request(bytes([1, 8]).ljust(32, b"\0"), b"\x0f\xf0", 2, 1) == [b"\xf0\x0f", b"\0"]


def read_the_clock(device: Rtc, pci: Pci, _: Machine) -> None:
    (number,) = pci.queues[0].request(struct.pack("<H6x", 0x1000), 16)
    (time,) = pci.queues[0].request(struct.pack("<H6xH6x", 1, 0), 16)
    assert struct.unpack("<B7xH6x", number) == (0, 1)
    assert struct.unpack("<B7xQ", time) == (0, Rtc.nanoseconds)


def play(device: Sound, pci: Pci, _: Machine) -> None:
    controlq, _eventq, txq, _rxq = pci.queues
    assert struct.unpack("<III", pci.config(0, 12)) == (0, 1, 0)
    (info,) = controlq.request(struct.pack("<IIII", 0x100, 0, 1, 32), 4 + 32)
    assert struct.unpack_from("<IIIQ", info) == (0x8000, 0, 0, 1 << 5)
    for code in (0x101, 0x102, 0x104):
        assert controlq.request(struct.pack("<II16x", code, 0), 4) == [b"\0\x80\0\0"]
    assert txq.request(bytes(4), b"la la la", 8) == [b"\0\x80\0\0".ljust(8, b"\0")]
    assert device.played == b"la la la"


def type_a_letter(device: Keyboard, pci: Pci, _: Machine) -> None:
    eventq, statusq = pci.queues
    for (select, subselect), answer in device.ANSWERS.items():
        pci.configure(0, select)
        pci.configure(1, subselect)
        (size,) = pci.config(2, 1)
        assert pci.config(8, size) == answer
    device.press(30)
    events = [struct.unpack("<HHI", eventq.request(8)[0]) for _ in range(4)]
    assert events == [(1, 30, 1), (0, 0, 0), (1, 30, 0), (0, 0, 0)]
    statusq.request(struct.pack("<HHI", 0x11, 1, 1))
    assert device.lamps == [(0x11, 1, 1)]


def talk(device: Vsock, pci: Pci, _: Machine) -> None:
    rxq, txq = pci.queues[:2]
    header = Vsock._HEADER
    assert struct.unpack("<Q", pci.config(0, 8)) == (3,)
    txq.request(header.pack(3, 2, 1000, 2000, 0, 1, 1, 0, 1 << 16, 0))
    assert header.unpack(rxq.request(64)[0][:44])[:7] == (2, 3, 2000, 1000, 0, 1, 2)
    txq.request(header.pack(3, 2, 1000, 2000, 5, 1, 5, 0, 1 << 16, 0), b"hello")
    echo = rxq.request(64)[0]
    assert header.unpack(echo[:44])[:7] == (2, 3, 2000, 1000, 5, 1, 5)
    assert echo[44:49] == b"hello"


def read_and_write_a_scsi_disk(device: Scsi, pci: Pci, _: Machine) -> None:
    requestq = pci.queues[2]

    def command(cdb: bytes, *data: bytes | int, target: int = 0) -> tuple[int, int, bytes]:
        """Response, status and data."""
        header = struct.pack("<BBH4xQ3s32s", 1, target, 0, 7, b"", cdb)
        before = [part for part in data if isinstance(part, bytes)]
        after = [part for part in data if isinstance(part, int)]
        answer, *rest = requestq.request(header, *before, 108, *after)
        return answer[11], answer[10], b"".join(rest)

    response, status, inquiry = command(bytes([0x12, 0, 0, 0, 36]), 36)
    assert (response, status, inquiry[8:16]) == (0, 0, b"SNAKES  ")
    assert command(bytes([0x2A, 0, 0, 0, 0, 3, 0, 0, 1]), b"y" * 512)[:2] == (0, 0)
    assert command(bytes([0x28, 0, 0, 0, 0, 3, 0, 0, 1]), 512) == (0, 0, b"y" * 512)
    assert command(bytes([0x12]), 36, target=1)[0] == 3
    assert command(bytes([0xFF]))[:2] == (0, 2)


def encrypt(device: Crypto, pci: Pci, _: Machine) -> None:
    dataq, controlq = pci.queues
    key = bytes(range(16))
    header = struct.pack("<IIIIQ", 0x0002, 3, 0, 0, 0)[:16]  # a session for AES in CBC mode
    cipher = struct.pack("<IIIx3x", 3, len(key), 1).ljust(48, b"\0")
    (answer,) = controlq.request(header + cipher + struct.pack("<II", 1, 0), key, 16)
    session, status = struct.unpack("<QI4x", answer)
    assert (session, status) == (7, 0)
    assert device.sessions[7].key == key
    request = struct.pack("<IIQII", 0x0100, 3, session, 0, 0) + struct.pack("<IIII", 16, 4, 4, 0).ljust(40, b"\0")
    assert dataq.request(request + struct.pack("<II", 1, 0), bytes(16), bytes(4), 4, 1) == [key[:4], b"\0"]
    close = struct.pack("<IIII", 0x0003, 3, 0, 0) + struct.pack("<Q", session).ljust(56, b"\0")
    assert controlq.request(close, 1) == [b"\0"]
    wait_for(lambda: device.closed == [7], 30)


def draw(device: Gpu, pci: Pci, machine: Machine) -> None:
    controlq, cursorq = pci.queues
    wait_for(lambda: device.edid, 30)
    assert device.edid[:8] == bytes.fromhex("00ffffffffffff00")
    (info,) = controlq.request(struct.pack("<IIQII", 0x100, 0, 0, 0, 0), 24 + 16 * 24)
    assert struct.unpack_from("<I20xIIIII", info) == (0x1101, 0, 0, 1280, 800, 1)
    area = struct.pack("<IIII", 0, 0, 64, 32)
    controlq.request(struct.pack("<IIQII", 0x103, 0, 0, 0, 0) + area + bytes(8), 24)
    controlq.request(struct.pack("<IIQII", 0x104, 0, 0, 0, 0) + area + bytes(8), 24)
    cursorq.request(struct.pack("<IIQII", 0x301, 0, 0, 0, 0) + struct.pack("<IIII16x", 0, 5, 6, 0), 24)
    # What a person would see.
    wait_for(lambda: machine.screenshot("used") == b"P6\n64 32\n255\n" + b"\x10\x20\x30" * 64 * 32, 30)


def use_a_network(device: Network, pci: Pci, machine: Machine) -> None:
    rxq, txq = pci.queues[:2]
    assert device.told == [1400]
    assert pci.config(0, 6) == Network.ADDRESS
    txq.request(bytes(12) + b"a frame")
    assert rxq.request(64)[0][: 12 + 7] == bytes(10) + b"\1\0" + b"emarf a"
    machine.monitor("announce-self", initial=50, max=50, rounds=1, step=10)
    wait_for(lambda: Network.ADDRESS in device.told, 30)


def show_windows(device: Windows, pci: Pci, machine: Machine) -> None:
    (requestq,) = pci.queues
    address, page = pci.shared_memory, mmap.PAGESIZE
    os.pwrite(device.file, b"from the device", 3 * page)
    device.map_shared_memory(0, 2 * page, device.file, 2 * page, file_offset=3 * page).result(30)
    assert machine.read(address + 2 * page, 15) == b"from the device"
    machine.write(address + 3 * page, b"from the driver")
    assert os.pread(device.file, 15, 4 * page) == b"from the driver"
    device.unmap_shared_memory(0, 2 * page, 2 * page).result(30)
    assert machine.read(address + 2 * page, 15) == bytes(15)

    os.pwrite(device.file, b"....", 0)
    device.set_host_notifier(device.requestq, device.file).result(30)
    requestq.submit(b"abc", 3)
    assert os.pread(device.file, 4, 0) == b"\0\0.."  # the number of the queue
    device.remove_host_notifier(device.requestq).result(30)
    requestq.notify()
    assert requestq.wait() == [b"cba"]

    device.add_shared_object(device.NAME).result(30)
    device.remove_shared_object(device.NAME).result(30)
    with pytest.raises(vu.ProtocolError):
        device.look_up_shared_object(device.NAME).result(30)


def read_a_file(device: Files, pci: Pci, _: Machine) -> None:
    assert pci.config(0, 5) == b"files"
    requestq = pci.queues[1]

    def operate(operation: int, node: int, arguments: bytes, room: int) -> bytes:
        head = struct.pack("<IIQQIIII", 40 + len(arguments), operation, 9, node, 0, 0, 0, 0)
        answer, body = requestq.request(head + arguments, 16, room)
        assert struct.unpack("<4xiQ", answer) == (0, 9)
        return body

    operate(26, 0, struct.pack("<IIII", 7, 31, 0, 0), 64)
    (node,) = struct.unpack_from("<Q", operate(1, 1, b"poem\0", 128))
    assert operate(15, node, struct.pack("<QQII16x", 0, 0, 4096, 0), 4096).rstrip(b"\0") == Files.CONTENT


#: By QEMU's name of the device; the generic one is for types that have none of their own. The page on what is supported
#: lists them, too.
FRONT_ENDS = {
    "vhost-user-rng-pci": FrontEnd(Rng, read_random, 1),
    "vhost-user-blk-pci": FrontEnd(lambda: Blk(1 << 20), read_and_write_a_disk, 1),
    "vhost-user-test-device-pci (console)": FrontEnd(Parrot, write_to_a_console, 2),
    "vhost-user-test-device-pci (windows)": FrontEnd(Windows, show_windows, 1, "page-per-vq=on"),
    "vhost-user-i2c-pci": FrontEnd(lambda: Adapter(Tmp102()), read_a_sensor, 1),
    "vhost-user-gpio-pci": FrontEnd(Gpio, switch_lines, 2),
    "vhost-user-spi-pci": FrontEnd(Spi, turn_bytes_over, 1),
    "vhost-user-rtc-pci": FrontEnd(Rtc, read_the_clock, 2),
    "vhost-user-snd-pci": FrontEnd(Sound, play, 4),
    "vhost-user-input-pci": FrontEnd(Keyboard, type_a_letter, 2),
    "vhost-user-vsock-pci": FrontEnd(Vsock, talk, 3),
    "vhost-user-scsi-pci": FrontEnd(Scsi, read_and_write_a_scsi_disk, 3, "num_queues=1"),
    "vhost-user-fs-pci": FrontEnd(Files, read_a_file, 2, "tag=files"),
    "vhost-user-gpu-pci": FrontEnd(Gpu, draw, 2),
    "virtio-net-pci": FrontEnd(Network, use_a_network, 2, f"mac={Network.ADDRESS.hex(':')},host_mtu=1400"),
    "virtio-crypto-pci": FrontEnd(Crypto, encrypt, 2),
}


@pytest.mark.parametrize("model", FRONT_ENDS)
def test_a_device_does_its_work_behind_each_front_end(serve: Serve, tmp_path: Path, model: str) -> None:
    device = FRONT_ENDS[model].device()
    drive(model, device, serve(device), tmp_path)


def drive(model: str, device: vu.Device, path: Path, folder: Path) -> None:
    """Have a front-end connect to `path`, use the device, and reset it as a driver does before a reboot."""
    front_end = FRONT_ENDS[model]
    properties = ",".join(filter(None, [front_end.properties, "id=used", f"addr={SLOT}"]))
    with Machine(folder, Qemu()._device("socket", path, device.device_id, properties)) as machine:
        pci = Pci(machine, SLOT, front_end.queues)
        front_end.use(device, pci, machine)
        pci.reset()
        assert {queue.status for queue in device.queues} <= {"stopped"}


def test_linux_has_its_own_drivers_for_them(serve: Serve) -> None:
    keyboard, vsock, scsi, files, network = Keyboard(), Vsock(), Scsi(), Files(), Network()
    devices = [(keyboard, ""), (vsock, ""), (scsi, "num_queues=1"), (files, "tag=files"), (network, "host_mtu=1400")]
    sockets = [(serve(device), device.device_id, properties) for device, properties in devices]
    # The firmware asks for disks at each of 256 targets first, and waits for every answer.
    with Qemu(sockets) as guest:
        assert guest.run("cat /sys/bus/scsi/devices/0:0:0:0/vendor").text == Scsi.VENDOR.decode()
        assert guest.run("mount -t virtiofs files /mnt; cat /mnt/poem").stdout == Files.CONTENT
        assert guest.run("cat /sys/class/net/eth0/mtu").text == "1400"
        guest.run("ip link set eth0 up")
        wait_for(lambda: guest.run("cat /sys/class/net/eth0/statistics/rx_packets").text != "0", 60)
        keyboard.press(56, 99, 35)  # Alt, SysRq and H: the kernel prints what it can be told like that
        wait_for(lambda: "sysrq: HELP" in guest.run("dmesg").text, 60)
        vsock.call(port=1234)
        wait_for(lambda: vsock.refused == [1234], 60)
