"""A guest without an operating system uses devices of ours in one virtual machine monitor after the other."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import threading
import time
from pathlib import Path

import pytest

from devices.running import MIB, MortalDisk, wait_for
from devices.vmms import CloudHypervisor, Crosvm, Firecracker, FirecrackerPci, Monitor, Orders, Qemu, monitors
from specimens import Serve
from vhost_user.devices import Blk, Rng

FOREVER = 1 << 40


class Numbers:
    """A source of numbers, each of eight bytes, that follow each other."""

    def __init__(self, first: int) -> None:
        self.next = first

    def __call__(self, count: int) -> bytes:
        begin, self.next = self.next, self.next + count // 8
        return b"".join(number.to_bytes(8, "little") for number in range(begin, self.next))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(16 * MIB))
    return path


@monitors(Qemu, CloudHypervisor, Crosvm, Firecracker, FirecrackerPci)
def test_a_driver_uses_a_disk_and_an_entropy_source_and_resets_them(
    serve: Serve, tmp_path: Path, bare: Path, image: Path, kind: type[Monitor]
) -> None:
    lives = 2 if kind.resets else 1
    entropy = None if issubclass(kind, Firecracker) else Rng(Numbers(1))
    Orders(image).give(rounds=40, lives=lives, entropy=entropy is not None)
    with kind(tmp_path / "monitor", bare, serve(Blk(image)), serve(entropy) if entropy else None) as monitor:
        said = monitor.wait_for("all is well")
    numbers = [int(line.split()[1]) for line in said.splitlines() if line.startswith("interrupts: ")]
    assert len(numbers) == lives
    assert numbers == sorted(set(numbers))
    assert bool(numbers[0]) == kind.interrupts


@monitors(Qemu, CloudHypervisor)
def test_a_driver_notices_nothing_of_a_disk_that_is_killed(tmp_path: Path, bare: Path, kind: type[Monitor]) -> None:
    dice = random.Random(7)
    with contextlib.closing(MortalDisk(tmp_path)) as disk:
        orders = Orders(disk.image)
        orders.give(rounds=FOREVER)
        wait_for(disk.socket.is_socket, 30)
        with kind(tmp_path / "monitor", bare, disk.socket, None) as monitor:
            for _ in range(10):
                orders.wait_for_rounds(32)
                time.sleep(dice.random() / 10)
                disk.die()
            orders.wait_for_rounds(32)
            orders.give(rounds=1)
            monitor.wait_for("all is well")


class Api(http.client.HTTPConnection):
    """To cloud-hypervisor."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=120)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))

    @classmethod
    def put(cls, folder: Path, request: str, **body: str) -> None:
        """Make a request of the monitor in `folder`."""
        wait_for((folder / "api").is_socket)
        with contextlib.closing(cls(folder / "api")) as connection:
            connection.request("PUT", f"/api/v1/{request}", json.dumps(body))
            response = connection.getresponse()
            said = response.read().decode()
            assert response.status in (200, 204), said


class Receiver(CloudHypervisor):
    """Waits for a machine."""

    def command(self) -> list[str]:
        return self.api()


@monitors(CloudHypervisor)
def test_a_guest_migrates_with_a_disk_and_an_entropy_source(
    serve: Serve, tmp_path: Path, bare: Path, image: Path, kind: type[Monitor]
) -> None:
    orders = Orders(image)
    orders.give(rounds=FOREVER, entropy=True)
    here, there = [Blk(image), Rng(Numbers(1))], [Blk(image), Rng(Numbers(FOREVER))]
    # The other monitor takes the same paths.
    paths = [tmp_path / "disk", tmp_path / "entropy"]
    for path, device in zip(paths, here, strict=True):
        path.symlink_to(serve(device))
    with kind(tmp_path / "source", bare, *paths) as source, Receiver(tmp_path / "target", bare, *paths) as target:
        orders.wait_for_rounds(100)
        for path, device in zip(paths, there, strict=True):
            path.unlink()
            path.symlink_to(serve(device))
        # In its folder, where what it leaves is removed.
        address = f"unix:{target.folder / 'machine'}"
        receiving = threading.Thread(
            target=Api.put, args=(target.folder, "vm.receive-migration"), kwargs={"receiver_url": address}
        )
        receiving.start()
        wait_for((target.folder / "machine").is_socket)
        Api.put(source.folder, "vm.send-migration", destination_url=address)
        receiving.join()
        # Not so many that what was filled before is filled again.
        orders.wait_for_rounds(1)
        assert all(device.connected for device in there)
        assert not any(device.connected for device in here)
        orders.give(rounds=1, entropy=True)
        # It goes on with the file of the source.
        target.said = source.said
        target.wait_for("all is well")
