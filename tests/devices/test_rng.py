"""The entropy source, in a real guest."""

from __future__ import annotations

import hashlib
import itertools

import vhost_user as vu
from devices.running import Boot, Program
from specimens import Serve
from vhost_user.devices import Rng
from vhost_user.guest import Uml

READ = "dd if=/dev/hwrng bs={0} count=1 iflag=fullblock status=none"


def stream(count: int) -> bytes:
    """The first `count` bytes of a sequence that nobody gets by chance."""
    blocks = (hashlib.sha256(bytes([number % 256])).digest() for number in itertools.count())
    return b"".join(itertools.islice(blocks, count // 32 + 1))[:count]


class Sequence:
    """A source that goes on where it was."""

    def __init__(self) -> None:
        self.given = 0

    def __call__(self, count: int) -> bytes:
        data = stream(self.given + count)[self.given :]
        self.given += count
        return data


def test_hwrng_gives_what_the_source_gave(boot: Boot) -> None:
    guest = boot(Rng(Sequence()))
    assert guest.run("cat /sys/class/misc/hw_random/rng_current").text == "virtio_rng.0"
    # The kernel takes some for itself before anybody reads.
    found = stream(1 << 14).find(guest.run(READ.format(4096)).stdout)
    assert 0 <= found < 1 << 12


def test_the_default_source_is_the_hosts(boot: Boot) -> None:
    guest = boot(Rng())
    first, second = (guest.run(READ.format(4096)).stdout for _ in range(2))
    assert len(first) == len(second) == 4096
    assert first != second


def test_fewer_bytes_than_asked_for_are_enough(boot: Boot) -> None:
    asked = []

    def one_at_a_time(count: int) -> bytes:
        asked.append(count)
        return b"!"

    assert boot(Rng(one_at_a_time)).run(READ.format(16)).stdout == b"!" * 16
    assert max(asked) > 1


def test_the_driver_can_be_unbound_and_bound_again(boot: Boot) -> None:
    guest = boot(Rng())
    for _ in range(3):
        guest.run("echo virtio0 > /sys/bus/virtio/drivers/virtio_rng/unbind")
        assert guest.run("cat /sys/class/misc/hw_random/rng_current").text == "none"
        guest.run("echo virtio0 > /sys/bus/virtio/drivers/virtio_rng/bind")
        assert len(guest.run(READ.format(512)).stdout) == 512


def test_one_guest_follows_another(serve: Serve) -> None:
    path = serve(Rng())
    for _ in range(3):
        with Uml([(path, vu.DeviceId.RNG)]) as guest:
            assert len(guest.run(READ.format(512)).stdout) == 512


def test_the_example_runs(program: Program) -> None:
    path, _ = program("rng.py")
    with Uml([(path, vu.DeviceId.RNG)]) as guest:
        assert len(guest.run(READ.format(64)).stdout) == 64
