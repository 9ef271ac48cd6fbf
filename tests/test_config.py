"""The configuration space: how it is declared, what a driver reads and writes, and how it is told of changes.

Virtio 1.3, section 2.5; vhost-user specification, "VHOST_USER_GET_CONFIG".
"""

from __future__ import annotations

import struct

import pytest

import vhost_user as vu
from raw import BACKEND_REQ, CONFIG, CONFIG_CHANGE, REPLY_ACK, REQUEST, FrontEnd, Id, Memory, Ring, config
from specimens import NO_TYPE, Connect, Serve

pytestmark = pytest.mark.timeout(30)


class Dial(vu.Device, device_id=NO_TYPE):
    requestq = vu.Queue()
    scale = vu.config.u32(0x01020304)
    position = vu.config.u32(7, writable=True)
    label = vu.config.raw(4, b"ab", writable=True)

    @requestq.handler
    def nothing(self, request: vu.Request) -> None:
        pass


@pytest.fixture
def dial() -> Dial:
    return Dial()


@pytest.fixture
def knob(serve: Serve, connect: Connect, dial: Dial) -> FrontEnd:
    """Connected to a dial."""
    front = connect(serve(dial))
    front.negotiate(protocol=REPLY_ACK | CONFIG | BACKEND_REQ)
    return front


def test_configuration_is_read_in_little_endian_from_any_offset(knob: FrontEnd) -> None:
    assert knob.get_config(0, 12) == b"\x04\x03\x02\x01\x07\x00\x00\x00ab\x00\x00"
    assert knob.get_config(3, 3) == b"\x01\x07\x00"


@pytest.mark.parametrize(("offset", "size"), [(0, 256), (10, 8), (12, 4), (4000, 84), (0, 4084), (0, 0)])
def test_what_is_beyond_the_end_of_the_configuration_reads_as_zeroes(knob: FrontEnd, offset: int, size: int) -> None:
    space = b"\x04\x03\x02\x01\x07\x00\x00\x00ab\x00\x00".ljust(8192, b"\0")
    assert knob.get_config(offset, size) == space[offset : offset + size]


def test_flags_of_a_configuration_read_are_echoed_and_ignored(knob: FrontEnd) -> None:
    assert knob.get(Id.GET_CONFIG, config(4, bytes(4), flags=1)) == config(4, b"\x07\x00\x00\x00", flags=1)


@pytest.mark.parametrize("flags", [0, 1])
def test_a_driver_writes_parts_of_a_field(knob: FrontEnd, dial: Dial, flags: int) -> None:
    knob.tell(Id.SET_CONFIG, config(5, b"\x01\x02", flags=flags))
    assert dial.position == 0x020107
    assert knob.get_config(4, 4) == b"\x07\x01\x02\x00"


def test_a_write_over_several_fields_leaves_read_only_ones_alone(knob: FrontEnd, dial: Dial) -> None:
    # QEMU writes the whole space back.
    knob.tell(Id.SET_CONFIG, config(0, b"\xff\xff\xff\xff\x05\x00\x00\x00new!"))
    assert (dial.scale, dial.position, dial.label) == (0x01020304, 5, b"new!")
    assert knob.get_config(0, 12) == b"\x04\x03\x02\x01\x05\x00\x00\x00new!"


def test_a_write_beyond_the_end_of_the_configuration_is_refused_and_changes_nothing(knob: FrontEnd, dial: Dial) -> None:
    assert knob.set_config(8, b"12345") != 0
    assert knob.set_config(12, b"1") != 0
    assert knob.set_config(0xFFFF_FFFF, b"1") != 0
    assert dial.label == b"ab\0\0"


def test_a_change_is_announced_on_the_back_end_channel(knob: FrontEnd, dial: Dial, memory: Memory) -> None:
    knob.share(memory)
    channel = knob.open_backend_channel()
    knob.start(Ring(memory))
    dial.scale = 9
    message = channel.receive()
    assert (message.request, message.flags, message.payload) == (CONFIG_CHANGE, REQUEST, b"")
    assert knob.get_config(0, 4) == b"\x09\x00\x00\x00"
    with dial.config_update():
        dial.scale = 10
        dial.position = 11
    channel.receive()
    assert channel.is_silent()


def test_a_driver_s_own_write_is_not_announced_to_it(knob: FrontEnd, memory: Memory) -> None:
    knob.share(memory)
    channel = knob.open_backend_channel()
    knob.start(Ring(memory))
    assert knob.set_config(4, b"\x01") == 0
    assert channel.is_silent()


def test_a_change_is_announced_only_when_a_ring_runs(knob: FrontEnd, dial: Dial, memory: Memory) -> None:
    knob.share(memory)
    channel = knob.open_backend_channel()
    dial.scale = 9
    dial.scale = 10
    assert channel.is_silent()
    ring = Ring(memory)
    knob.start(ring)
    assert channel.receive().request == CONFIG_CHANGE
    assert channel.is_silent()
    knob.stop(ring)
    dial.scale = 11
    assert channel.is_silent()


def test_a_channel_that_nobody_reads_does_not_stop_the_device(knob: FrontEnd, dial: Dial, memory: Memory) -> None:
    knob.share(memory)
    channel = knob.open_backend_channel()
    ring = Ring(memory)
    knob.start(ring)
    for number in range(20_000):
        dial.scale = number
    assert knob.get_config(0, 4) == struct.pack("<I", 19_999)
    channel.close()
    dial.scale = 1
    knob.exchange(ring, b"x", 8)
